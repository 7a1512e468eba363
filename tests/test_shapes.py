"""The captioned shapes: records, scenes and pixels."""
import math
import pickle

import numpy as np
import pytest
import torch

from config import UserError
from evaluation import shapes_score
from rng import uniform
from sources import shapes
from sources.shapes import HELD_OUT, LARGE, NATIVE, SMALL, Shapes
from sources.shapes_grammar import BACKGROUNDS, COLORS, RELATIONS, SHAPES, parse_caption

PLAIN = dict(native=False, crop=False, flip=False)


# ---------------------------------------------------------------- records

def same(a, b):
    return all(same(a[k], b[k]) if isinstance(a[k], dict) else
               torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_record_is_a_pure_function_of_index_and_epoch():
    source = Shapes(16, seed=4)
    batch, part = source.records(range(30), 2), pickle.loads(pickle.dumps(source)).records([28, 3], [2, 2])
    pick = [28, 3]
    for key in ("image", "label", "size", "crop", "flip", "index"):
        assert torch.equal(part[key], batch[key][pick])
    assert part["caption"] == [batch["caption"][k] for k in pick]
    row = {k: v[28] for k, v in batch.items() if k != "scene"}
    assert same(source.record(28, 2), {**row, "scene": {k: v[28] for k, v in batch["scene"].items()}})

    other = source.records(range(30), 3)                                   # scene by index, view by epoch too
    for key in ("label", "caption", "size"):
        assert same({key: batch[key]}, {key: other[key]})
    assert (batch["flip"] != other["flip"]).any() and (batch["crop"] != other["crop"]).any()
    for kind in (Shapes(16, seed=5), Shapes(16, seed=4, split="test"), Shapes(16, seed=4, split="held_out")):
        assert sum(a == b for a, b in zip(kind.records(range(30))["caption"], batch["caption"])) < 6


def test_record_has_the_contract_shapes():
    source = Shapes(24)
    batch = source.records([5, 2 ** 31 - 1, 9])
    form = {k: (tuple(v.shape), v.dtype) for k, v in batch.items() if isinstance(v, torch.Tensor)}
    f, i = torch.float32, torch.int64
    assert form == dict(image=((3, 3, 24, 24), f), label=((3,), i), size=((3, 2), f), crop=((3, 2), f),
                        flip=((3,), f), index=((3,), i))
    assert batch["image"].abs().max() <= 1 and source.record(5)["image"].shape == (3, 24, 24)
    assert len(source) >= 2 ** 31 and source.channels == 3 and len(source.classes) == 8


def test_switches_decide_the_controls_and_the_fingerprint():
    all_on, off = Shapes(16), Shapes(16, **PLAIN)
    assert all_on.controls == ("size", "crop", "flip") and off.controls == ()
    batch, plain = all_on.records(range(400)), off.records(range(400))
    assert set(batch["size"].unique().tolist()) == set(NATIVE)
    assert abs(batch["flip"].mean() - 0.5) < 5 * 0.5 / 20
    assert batch["crop"].min() == 0 and batch["crop"].max() == 4
    assert batch["crop"].unique(dim=0).shape == (25, 2)
    assert (plain["size"] == NATIVE[-1]).all() and not plain["crop"].any() and not plain["flip"].any()
    assert plain["caption"] == batch["caption"]                             # the same scenes, seen otherwise
    kinds = [Shapes(16), Shapes(8), Shapes(16, 1), Shapes(16, split="test"), Shapes(16, objects=(1,)), off]
    kinds += [Shapes(16, side=side) for side in ((0.4, 0.6), (0.4, 1))]
    assert len({kind.fingerprint for kind in kinds}) == 8
    assert Shapes(16).fingerprint == Shapes(16, side=(1, 1)).fingerprint == all_on.fingerprint
    assert off.fingerprint == Shapes(16, **PLAIN, side=(0.4, 0.6)).fingerprint     # without crop there is no side
    assert torch.equal(Shapes(16, **PLAIN, side=(0.4, 0.6)).records(range(9))["image"], plain["image"][:9])


def test_wrong_arguments_are_named():
    for wrong, word in (dict(objects=(0, 1)), "objects"), (dict(resolution=4), "4"):
        with pytest.raises(UserError, match=word):
            Shapes(**wrong)


# ---------------------------------------------------------------- scenes

@pytest.mark.parametrize("kind", ["free", "grid"])
def test_captions_are_true_of_the_scene(kind):
    batch = Shapes(8, seed=2, layout=kind, **PLAIN).records(range(800))
    scene = {k: v.numpy() for k, v in batch["scene"].items()}
    claims = 0
    for b, text in enumerate(batch["caption"]):
        facts, n = parse_caption(text), scene["n"][b]
        assert facts.colors == tuple(list(COLORS)[k] for k in scene["color"][b, :n])
        assert facts.shapes == tuple(SHAPES[k] for k in scene["shape"][b, :n])
        assert facts.background in (None, list(BACKGROUNDS)[scene["background"][b]])
        x, y, r = (scene[name][b] for name in "xyr")
        bounds = {"small": (0, SMALL), "large": (LARGE, 1), None: (0, 1)}
        assert all(bounds[size][0] <= r[k] <= bounds[size][1] for k, size in enumerate(facts.sizes))
        for k, link in enumerate(facts.relations):
            gap = dict(zip(RELATIONS, (x[k + 1] - x[k], x[k] - x[k + 1], y[k + 1] - y[k], y[k] - y[k + 1])))
            assert link is None or gap[link] > r[k] + r[k + 1]
            claims += link is not None
    assert claims > 300


@pytest.mark.parametrize("objects", [(1,), (2,), (3,)])
@pytest.mark.parametrize("kind", ["free", "grid"])
def test_objects_are_whole_apart_and_of_different_colours(objects, kind):
    scene, n = Shapes(8, objects=objects, layout=kind).random_scenes(np.arange(800))[1], objects[0]
    assert (scene["n"] == n).all()
    assert (scene["shape"][:, n:] == -1).all() and (scene["shape"][:, :n] >= 0).all()
    x, y, r = (scene[name][:, :n] for name in "xyr")
    assert min((x - r).min(), (y - r).min()) > 0.029 and max((x + r).max(), (y + r).max()) < 0.971
    for a in range(n):
        for b in range(a):
            apart = np.maximum(np.abs(x[:, a] - x[:, b]), np.abs(y[:, a] - y[:, b])) - r[:, a] - r[:, b]
            assert apart.min() > 0.019 and (scene["color"][:, a] != scene["color"][:, b]).all()
    assert x.std() > 0.1 and y.std() > 0.1 and set(scene["background"]) == set(range(len(BACKGROUNDS)))


def test_on_the_grid_centres_are_corners_of_patches_and_sizes_are_two_one_large_among_several():
    source = Shapes(32, layout="grid", **PLAIN)
    scene = source.random_scenes(np.arange(2000))[1]
    there = scene["r"] > 0
    for name in "xy":
        place = scene[name][there] * 8
        assert (place == place.round()).all() and set(place) == set(shapes.GRID_CENTRES)
    small, large = ((scene["r"] == r).sum(1) for r in shapes.TWO_SIZES)
    several = scene["n"] > 1
    assert (large[several] == 1).all() and (small + large == scene["n"]).all()
    assert abs(large[~several].mean() - 0.5) < 5 * 0.5 / (~several).sum() ** 0.5
    first = (scene["r"][several, 0] == shapes.TWO_SIZES[1]).mean()          # as likely as any other: 1/2 or 1/3
    assert abs(first - 5 / 12) < 5 * 0.5 / several.sum() ** 0.5
    free = Shapes(32, **PLAIN)
    assert free.fingerprint != source.fingerprint and not torch.equal(free.records([3])["image"],
                                                                      source.records([3])["image"])


def test_scenes_of_sides_are_pairs_on_the_grid_beside_each_other_and_every_caption_says_how():
    source = Shapes(32, layout="sides", **PLAIN)
    batch = source.records(range(300))
    scene = {k: v.numpy() for k, v in batch["scene"].items()}
    assert (scene["n"] == 2).all() and set(np.unique(scene["relation"][:, 0])) == {0, 1}    # left of, right of
    relations = [parse_caption(text).relations for text in batch["caption"]]
    assert relations == [(RELATIONS[k],) for k in scene["relation"][:, 0]]
    left = scene["x"][:, 0] < scene["x"][:, 1]
    assert (left == (scene["relation"][:, 0] == 0)).all() and abs(left.mean() - 0.5) < 5 * 0.5 / 300 ** 0.5
    assert (scene["x"][:, :2] * 8 % 1 == 0).all() and (scene["y"][:, :2] * 8 % 1 == 0).all()
    assert len({Shapes(32, layout=kind).fingerprint for kind in ("free", "grid", "sides")}) == 3
    rare = {(list(COLORS).index(c), SHAPES.index(s)) for c, s in HELD_OUT}
    scene = Shapes(32, layout="sides", split="held_out", **PLAIN).records(range(50))["scene"]
    assert all((c[m].item(), s[m].item()) in rare for c, s, m in zip(scene["color"], scene["shape"], scene["main"]))
    with pytest.raises(UserError, match="unknown layout='left'; there are free, grid, sides"):
        Shapes(layout="left")


@pytest.mark.parametrize("kind", ["free", "grid"])
def test_label_is_the_clearly_largest_object_and_sets_the_native_size(kind):
    batch = Shapes(8, layout=kind).records(range(2000))
    r = batch["scene"]["r"].sort(dim=1, descending=True)
    assert (r.values[:, 1] <= 0.9 * r.values[:, 0] + 1e-9).all()
    assert torch.equal(batch["label"], batch["scene"]["shape"].gather(1, r.indices[:, :1])[:, 0])
    share = torch.bincount(batch["label"], minlength=8) / 2000
    assert (share - 1 / 8).abs().max() < 5 * math.sqrt(1 / 8 * 7 / 8 / 2000)
    fine = torch.stack([(batch["size"][batch["label"] == k, 0] >= 32).float().mean() for k in range(8)])
    assert fine[0] < 0.25 and fine[-1] > 0.75 and (fine.diff() > -0.1).all()
    for k in (0, 7):                                                        # the ranges overlap
        assert len(batch["size"][batch["label"] == k, 0].unique()) == len(NATIVE)


@pytest.mark.parametrize("kind", ["free", "grid"])
def test_held_out_pairs_are_only_where_they_belong(kind):
    pairs = {(list(COLORS).index(c), SHAPES.index(s)) for c, s in HELD_OUT}
    for split_name in ("train", "test", "held_out"):
        scene = Shapes(8, split=split_name, layout=kind).random_scenes(np.arange(3000))[1]
        main = [(c[m], s[m]) for c, s, m in zip(scene["color"], scene["shape"], scene["main"])]
        every = [p for c, s in zip(scene["color"], scene["shape"]) for p in zip(c.tolist(), s.tolist())]
        found = sum(p in pairs for p in every)
        assert found == (3000 if split_name == "held_out" else 0)
        assert set(main) == pairs if split_name == "held_out" else len(set(main)) == 64 - len(pairs)


# ---------------------------------------------------------------- pixels

def some(count):
    """A few scenes of one to three objects at all native sizes."""
    return shapes.draw_scene(uniform(1, np.arange(count), shapes.DRAWS), (1, 2, 3), False)


@pytest.mark.parametrize("n", NATIVE)
def test_coverage_has_the_area_and_place_of_the_shape_at_every_native_size(n):
    x, y, r, R = np.full(8, 0.47), np.full(8, 0.56), np.full(8, 0.21), 48
    zero = np.zeros(8, int)
    mask = shapes.coverage(np.arange(8), x, y, r, n, zero + shapes.canvas_side(R), zero, zero, zero > 0, R)
    area, low = shapes_score.moments()
    assert np.abs(mask.sum((1, 2)) / (area * (0.21 * R) ** 2) - 1).max() < 2 / n     # blunt tips
    at = (np.arange(R) + 0.5) / R
    assert np.abs(mask.sum(1) @ at / mask.sum((1, 2)) - 0.47).max() < 0.003
    assert np.abs(mask.sum(2) @ at / mask.sum((1, 2)) - 0.56 - low * 0.21).max() < 0.006


def test_distances_have_slope_one_at_the_outline_and_stay_in_the_box():
    at = (np.arange(-300, 300) + 0.5) / 250
    for name in SHAPES:
        d = shapes.sdf(name, at[None], at[:, None])
        slope = np.hypot(*np.gradient(d, 1 / 250))[np.abs(d) < 0.01]
        assert abs(np.median(slope) - 1) < 0.01 and (np.abs(slope - 1) < 0.02).mean() > 0.9, name
        inside = np.abs(at[np.nonzero(d < 0)[0]]).max(), np.abs(at[np.nonzero(d < 0)[1]]).max()
        assert 0.78 < min(inside) and max(inside) <= 1, name


@pytest.mark.parametrize("n, width", [(40, 1), (16, 2), (96, 5)])
def test_resampling_keeps_ramps_and_widens_with_shrinking(n, width):
    weight = shapes.resampler(n, 40, 3)
    assert weight.shape == (40, n + 6) and not weight[:, :3].any() and not weight[:, -3:].any()
    ramp = weight[:, 3:-3] @ ((np.arange(n) + 0.5) / n)
    assert np.allclose(ramp[4:-4], ((np.arange(40) + 0.5) / 40)[4:-4], atol=1e-3)
    assert np.median((weight > 0).sum(1)) in (width, width - 1) and np.allclose(weight.sum(1), 1, atol=1e-6)


def test_crop_is_a_window_and_flip_a_mirror():
    zero, off, R = np.zeros(12, int), np.zeros(12, bool), 20
    S = zero + shapes.canvas_side(R)
    base = shapes.render(some(12), S, zero, zero, off, R)
    moved = shapes.render(some(12), S, zero + 2, zero + 3, off, R)
    assert np.allclose(base[:, :, 2:, 3:], moved[:, :, :-2, :-3], atol=1e-6)
    assert not np.allclose(base, moved, atol=0.1)
    assert np.allclose(shapes.render(some(12), S, zero + 2, zero + 3, ~off, R), moved[..., ::-1], atol=1e-6)


@pytest.mark.parametrize("k", [2, 3])
def test_a_crop_of_a_kth_of_the_side_is_a_window_of_the_image_at_k_times_the_resolution(k):
    R, B, u = 20, 24, np.random.default_rng(k)
    top, left = u.integers(0, (k - 1) * R + 1, (2, B))
    flip, zero = u.random(B) < 0.5, np.zeros(B, int)
    S = zero + k * shapes.canvas_side(R)
    fine = shapes.render(some(B), zero + shapes.canvas_side(k * R), zero, zero, zero > 0, k * R)
    window = np.stack([fine[b, :, top[b]:top[b] + R, left[b]:left[b] + R] for b in range(B)])
    window[flip] = window[flip][..., ::-1]
    near = shapes.render(some(B), S, top, left, flip, R)
    assert np.allclose(near, window, atol=2e-6) and np.ptp(near, axis=(2, 3)).max() > 1

    mixed = np.where(np.arange(B) % 2, S, S // k)                           # a side of its own for every sample
    top, left = top * (mixed - R) // (S - R), left * (mixed - R) // (S - R)
    every = [shapes.render(some(B), zero + side, top % (side - R + 1), left % (side - R + 1), flip, R)
             for side in (S[0] // k, S[0])]
    both = np.where((mixed == S)[:, None, None, None], every[1], every[0])
    assert np.allclose(shapes.render(some(B), mixed, top, left, flip, R), both, atol=2e-6)


def test_side_and_place_of_a_crop_are_uniform_in_their_ranges():
    n, R, low, high = 600, 64, 0.4, 0.6
    batch, whole = Shapes(R, side=(low, high)).records(range(n)), Shapes(R, crop=False).records(range(n))
    side = whole["scene"]["r"][:, 0] / batch["scene"]["r"][:, 0]
    assert low - 0.004 < side.min() < low + 0.01 and high - 0.01 < side.max() < high + 0.004    # canvas: whole pixels
    u = (side - low) / (high - low)
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5 and abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    slack = (1.25 / side - 1)[:, None] * R                                   # pixels by which the crop can be moved
    place = (batch["crop"] + 0.5) / (slack + 1)
    assert batch["crop"].min() == 0 and ((slack - batch["crop"]) > -0.01).all() and (place > 0.97).any(0).all()
    assert (place.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / n) ** 0.5
    mixed = torch.corrcoef(torch.stack([u, place[:, 0], place[:, 1], batch["flip"]]).double())
    assert (mixed - torch.eye(4)).abs().max() < 5 / n ** 0.5


def test_a_side_changes_the_view_and_nothing_else():
    pick, near, far = [28, 3], Shapes(16, seed=4, side=(0.4, 0.6)), Shapes(16, seed=4)
    batch, again, plain = near.records(range(30), 2), near.records(pick, 2), far.records(range(30), 2)
    for key in ("image", "label", "size", "crop", "flip", "index"):
        assert torch.equal(again[key], batch[key][pick])
    assert all(same({key: batch[key]}, {key: plain[key]}) for key in ("caption", "label", "size", "flip", "index"))
    assert not torch.equal(batch["image"], plain["image"])
    sides = [(far.records([k], e)["scene"]["r"] / near.records([k], e)["scene"]["r"])[0, 0].item()
             for k, e in ((0, 0), (0, 1), (1, 0))]
    assert len(set(sides)) == 3                                             # of index and epoch
    almost = Shapes(16, seed=4, side=(0.999999, 1)).records(range(30), 2)
    assert same(almost, plain)


@pytest.mark.slow
def test_truth_is_in_coordinates_of_a_crop_of_any_side():
    R = 64
    batch = Shapes(R, objects=(1,), native=False, side=(0.4, 1)).records(range(400))
    share, at = shapes_score.unmix(batch["image"])[2], (np.arange(R) + 0.5) / R
    scene = {name: batch["scene"][name][:, 0].numpy() for name in "xyr"}
    ink = np.where(share > 0.05, share, 0)
    x, y, r = (scene[k] for k in "xyr")
    inside = (x - r > 0) & (x + r < 1) & (y - r > 0) & (y + r < 1)
    outside = (x + r < -0.02) | (x - r > 1.02) | (y + r < -0.02) | (y - r > 1.02)
    assert inside.sum() > 40 and batch["flip"].numpy()[inside].mean() > 0.3 and r[inside].max() > 0.4
    assert outside.sum() > 10 and ink[outside].sum((1, 2)).max() < 1
    area, low = (value[batch["label"].numpy()] for value in shapes_score.moments())
    total = np.maximum(ink.sum((1, 2)), 1e-6)
    assert np.abs(ink.sum(1) @ at / total - x)[inside].max() < 0.005
    assert np.abs(ink.sum(2) @ at / total - low * r - y)[inside].max() < 0.005
    assert np.abs(total / (area * (r * R) ** 2) - 1)[inside].max() < 0.08


def test_truth_moves_with_the_crop_and_the_flip():
    batch = Shapes(32, objects=(1,), native=False).records(range(200))
    back, owner, share = shapes_score.unmix(batch["image"])
    scene, at = batch["scene"], (np.arange(32) + 0.5) / 32
    ink = np.where(share > 0.3, share, 0)
    mid = (scene["x"][:, 0] > 0.25) & (scene["x"][:, 0] < 0.75) & (scene["y"][:, 0] > 0.25)
    x = torch.from_numpy(ink.sum(1) @ at / ink.sum((1, 2)))
    assert mid.sum() > 50 and batch["flip"][mid].mean() > 0.3
    assert (x - scene["x"][:, 0])[mid].abs().max() < 0.01
