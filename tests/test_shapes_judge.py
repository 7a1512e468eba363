"""The judge: it sees the objects, toy_fd rises with every kind of damage, the size leak is that of the content.

The shipped judge, on renders that it was not trained on. Tolerances of fractions are three standard errors.
"""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fid
from config import UserError
from evaluation import shapes_judge
from evaluation.shapes_judge import Prediction, ShapesClassifier, toy_fd, toy_leak
from fid import FeatureStats, frechet_distance
from runtime import distributed
from sources.shapes import LAYOUTS, Shapes
from sources.shapes_grammar import SHAPES
from test_generate import generated, run_folder

ALONE = distributed.Dist(torch.device("cpu"), 0, 1)


@pytest.fixture(scope="module")
def net():
    return shapes_judge.load()


@pytest.fixture(scope="module")
def renders():
    return Shapes(32, split="test").records(range(800))


@pytest.fixture(scope="module")
def reference(net):
    return shapes_judge.render_stats(net, Shapes(32, split="test"), range(shapes_judge.FAR, shapes_judge.FAR + 800))


def byte(images):
    return ((images + 1) * 127.5).round().to(torch.uint8)


# ---------------------------------------------------------------- what it sees

def test_shapes_of_what_it_says_with_no_two_sizes_equal():
    small = ShapesClassifier(width=24)
    seen = small(torch.zeros(3, 3, 50, 40))
    assert seen.there.shape == seen.x.shape == seen.y.shape == seen.r.shape == (3, 8)
    assert seen.shape.shape == (3, 8, len(SHAPES)) and seen.background.shape == (3, 5)
    assert small.map(torch.zeros(3, 3, 50, 40)).shape == (3, 24, 8, 8) and shapes_judge.largest(seen).shape == (3,)


@pytest.mark.parametrize("R, n", [(32, 200), (64, 100)])
def test_it_is_right_on_whole_renders_of_the_test_split(net, R, n):
    batch = Shapes(R, split="test", crop=False).records(range(n))           # mirrored half the time
    true, counts = shapes_judge.targets(batch["scene"])
    seen, there = shapes_judge.read(net, batch["image"]), true.there
    assert counts.all() and (there.sum(1) == batch["scene"]["n"]).all()
    assert (seen.there > 0).eq(there).float().mean() > 0.999
    assert seen.shape.argmax(2).eq(true.shape)[there].float().mean() > 0.97
    assert seen.background.argmax(1).eq(true.background).float().mean() > 0.97
    if R == shapes_judge.SIDE:                                                     # where sizes differ by a tenth
        assert shapes_judge.largest(seen).eq(batch["label"]).float().mean() > 0.97
    for a, b, most in ((seen.x, true.x, 0.03), (seen.y, true.y, 0.03), (seen.r, true.r, 0.02)):
        assert (a - b)[there].abs().mean() < most


def test_an_object_that_is_gone_is_absent_and_one_that_is_half_gone_does_not_count():
    three = torch.tensor
    scene = dict(n=three([3]), shape=three([[1, 2, 3]]), color=three([[4, 5, 6]]), background=three([2]),
                 native=three([0]), x=three([[0.5, -0.1, -0.4]]), y=three([[0.5, 0.5, 0.5]]),
                 r=three([[0.2, 0.2, 0.2]]))
    true, counts = shapes_judge.targets(scene)
    assert true.there[0].nonzero().flatten().tolist() == [4] and true.shape[0, 4] == 1
    assert not counts[0, 5] and counts[0, [0, 1, 2, 3, 4, 6, 7]].all()


@pytest.mark.slow
def test_a_short_training_learns_where_things_are_and_is_repeatable():
    small = shapes_judge.train(seed=3, steps=100, batch=48)
    batch = Shapes(32, split="test", crop=False).records(range(200))
    true, seen = shapes_judge.targets(batch["scene"])[0], shapes_judge.read(small, batch["image"])
    assert (seen.there > 0).eq(true.there).all(1).float().mean() > 0.9
    assert (seen.x - true.x)[true.there].abs().mean() < 0.05
    one, same, other = (shapes_judge.train(seed=s, steps=2, batch=8).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(one[k], same[k]) for k in one) and not torch.equal(one["r.weight"], other["r.weight"])


def test_every_weight_is_trained():
    net, batch = ShapesClassifier(), Shapes(32).records(range(16))
    shapes_judge.loss(net(batch["image"]), batch["scene"]).backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead, dead


# ---------------------------------------------------------------- toy_fd

def test_toy_fd_is_the_frechet_distance_of_mean_features_of_8_bit_images(net, renders):
    one, two = renders["image"][:80], renders["image"][80:200]
    means = [net.map(byte(x).float() / 127.5 - 1).mean((2, 3)).double() for x in (one, two)]
    want = frechet_distance(*(v for m in means for v in (m.mean(0), m.T.cov())))
    stats = FeatureStats(net.width)
    shapes_judge.add_features(stats, net, two)
    assert toy_fd(net, one, stats) == pytest.approx(want, rel=1e-6)
    assert toy_fd(net, byte(one).float() / 127.5 - 1, stats) == pytest.approx(want, rel=1e-6)


def blur(images, sigma):
    at = torch.arange(-9, 10).float()
    k = torch.exp(-at ** 2 / (2 * sigma ** 2))
    k = k / k.sum()
    x = F.pad(images, (9, 9, 9, 9), mode="reflect").flatten(0, 1)[:, None]
    return F.conv2d(F.conv2d(x, k[None, None, None]), k[None, None, :, None])[:, 0].unflatten(0, images.shape[:2])


def rises(values, first):
    return all(a < b for a, b in zip(values, values[1:])) and values[1] > first * values[0]


@pytest.mark.slow
def test_toy_fd_rises_with_blur_and_with_noise(net, renders, reference):
    x = renders["image"][:200]
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    floor = toy_fd(net, x, reference)
    assert rises([floor] + [toy_fd(net, blur(x, s), reference) for s in (0.5, 1.0, 2.0)], 1.3)
    assert rises([floor] + [toy_fd(net, (x + s * z).clamp(-1, 1), reference) for s in (0.05, 0.15, 0.4)], 1.3)


@pytest.mark.slow
def test_toy_fd_rises_with_dropped_classes_and_with_collapse(net, reference, renders):
    kept = [renders["image"][renders["label"] < k][:80] for k in (8, 4, 1)]        # equally many images each
    assert {len(x) for x in kept} == {80}
    assert rises([toy_fd(net, x, reference) for x in kept], 1.2)
    x = renders["image"][:300]
    assert rises([toy_fd(net, x[:k].repeat(300 // k, 1, 1, 1), reference) for k in (300, 50, 10, 2)], 1.2)


@pytest.mark.slow
def test_the_floor_falls_as_one_over_n(net, reference, renders):
    x = renders["image"]
    few = np.mean([toy_fd(net, part, reference) for part in x.split(100)])
    many = toy_fd(net, x, reference)
    assert few > 3 * many                   # 1/100 + 1/800 against 1/800 + 1/800 is 4.5 times; the rest is no bias


def test_statistics_do_not_know_the_order_and_are_those_of_the_one_pass_of_fid(net):
    source = Shapes(32, split="test")
    whole, other = (shapes_judge.render_stats(net, source, order) for order in (range(150), range(149, -1, -1)))

    class Renders:
        workers, broken = 0, 0

        def __call__(self, indices):
            return byte(source.records(indices)["image"])

    class Features:
        dim, classes = net.width, len(SHAPES)

        def __call__(self, images):
            x = images.float() / 127.5 - 1
            return net.map(x).mean((2, 3)), net(x).shape[:, 0]

    for stats in (other, fid.collect(Renders(), 150, 70, Features(), set(), ALONE)[0]):
        assert stats.n == whole.n == 150
        assert torch.allclose(whole.mean, stats.mean, atol=1e-6) and torch.allclose(whole.cov, stats.cov, atol=1e-5)


# ---------------------------------------------------------------- the leak

def test_content_counts_a_lost_object_and_a_wrong_shape_as_stated():
    def one(there, shape, x, y):
        seen = Prediction(torch.full((1, 8), -50.0), torch.zeros(1, 8, 8), *torch.zeros(3, 1, 8), None, None)
        if there:
            seen.there[0, 3], seen.x[0, 3], seen.y[0, 3] = 50.0, x, y
        seen.shape[0, 3, shape] = 100.0
        return shapes_judge.descriptor(seen)

    def apart(a, b):
        return (one(*a) - one(*b)).square().sum().item()

    assert apart((1, 2, 0.3, 0.4), (0, 2, 0.0, 0.0)) == pytest.approx(1 + 0.09 + 0.16, rel=1e-5)
    assert apart((1, 2, 0.3, 0.4), (1, 5, 0.3, 0.4)) == pytest.approx(2, rel=1e-5)
    assert apart((1, 2, 0.3, 0.4), (1, 2, 0.8, 0.4)) == pytest.approx(0.25, rel=1e-5)
    assert apart((0, 2, 0.3, 0.4), (0, 5, 0.9, 0.1)) == pytest.approx(0, abs=1e-10)


def test_the_leak_is_zero_for_equal_images_small_for_sharpness_and_large_for_other_scenes(net):
    source = Shapes(32, split="test", crop=False, flip=False)
    sizes = shapes_judge.resized(source, range(40))
    assert sizes.shape == (40, 6, 3, 32, 32) and sizes.dtype == torch.uint8
    assert (sizes[:, 0] != sizes[:, 5]).flatten(1).any(1).all()             # they do differ, in sharpness
    same = toy_leak(net, [sizes[:, :1].expand(-1, 6, -1, -1, -1)], ALONE)
    floor = toy_leak(net, [sizes[:15], sizes[15:]], ALONE)
    other = toy_leak(net, [byte(source.records(range(240))["image"]).unflatten(0, (40, 6))], ALONE)
    assert same.value < 1e-10 and same.value < floor.value < 0.15 * other.value
    assert floor.n == 40 and 0 < floor.error < floor.value
    assert floor == toy_leak(net, [sizes], ALONE) or floor.value == pytest.approx(toy_leak(net, [sizes], ALONE).value)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_scenes_that_are_resized_are_those_of_the_data_set(kind):
    source = Shapes(24, split="test", crop=False, flip=False, layout=kind)
    native = source.records(range(30))
    sizes = shapes_judge.resized(source, range(30))
    k = torch.tensor([shapes_judge.NATIVE.index(int(s)) for s in native["size"][:, 0]])
    assert torch.equal(sizes[torch.arange(30), k], byte(native["image"]))


# ---------------------------------------------------------------- files and the command

def test_a_judge_that_is_missing_foreign_or_damaged_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no weights at .*none.safetensors"):
        shapes_judge.load(tmp_path / "none.safetensors")
    file = tmp_path / "a.safetensors"
    file.write_bytes(shapes_judge.JUDGE.read_bytes())
    monkeypatch.setattr(shapes_judge, "VERSION", "shapes 99")
    with pytest.raises(UserError, match="no judge of 'shapes 99'"):
        shapes_judge.load(file)
    monkeypatch.undo()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        shapes_judge.load(file)


def test_the_shipped_judge_is_small():
    assert shapes_judge.JUDGE.stat().st_size < 1e6


@pytest.mark.parametrize("flags, says", [
    ([], "give one of"), (["--leak=a", "--write=b"], "give one of"),
    (["--images=gone/samples/x.npz"], "no weights at gone"), (["--leak=gone"], "no weights at gone"),
    (["--leak=x", "--judge=none.safetensors"], "no weights at none.safetensors")])
def test_what_cannot_be_measured_is_an_error(flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        shapes_judge.main(flags)


def test_images_of_a_run_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes_judge, "REFERENCE", 100)
    out = run_folder(tmp_path / "run", controls="size")
    path = generated(out, "--n=10", "--name=x")[1]
    capsys.readouterr()
    shapes_judge.main([f"--images={path}", "--threads=1"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    sha = shapes_judge.load().sha256
    assert line["metric"] == f"toy_fd10/judge-{sha[:8]}" and line["judge"] == sha and line["n"] == 10
    assert line["value"] > 2 * line["renders"] and line["by_pixels"]["count"][2] == 10

    shapes_judge.main([f"--leak={out}", "--n=2", "--steps=5", "--threads=1"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["steps"], line["guidance"], line["eta"]) == (5, 1.5, 0.25)      # the run's own guidance and eta
    assert line["n"] == 2 and line["sizes"] == list(shapes_judge.NATIVE) and line["value"] >= 0 and line["renders"] > 0


@pytest.mark.slow
def test_a_judge_is_made_by_the_command_and_examined(tmp_path, capsys):
    file = tmp_path / "small.safetensors"
    shapes_judge.main([f"--write={file}", "--train_steps=1", "--threads=1"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["judge"] == shapes_judge.load(file).sha256 and line["steps"] == 1 and line["by_class"][2] == 500


def test_images_of_classes_are_measured_by_the_judge(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes_judge, "REFERENCE", 80)
    path = generated(run_folder(tmp_path / "run", "class"), "--n=3", "--name=x")[1]
    images = byte(Shapes(16, split="test", crop=False).records(range(3))["image"]).permute(0, 2, 3, 1).numpy()
    np.savez(path, arr_0=images)
    capsys.readouterr()
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    names = [SHAPES[k] for k in shapes_judge.largest(shapes_judge.read(shapes_judge.load(), x))]
    names[0] = SHAPES[SHAPES.index(names[0]) - 1]           # one of three is another class
    path.with_suffix(".txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    shapes_judge.main([f"--images={path}", "--threads=1"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["by_class"] == [0.6667, 0.2722, 3]
