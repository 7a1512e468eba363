"""The captioned shapes: language, word vectors, random numbers, scenes, pixels, scores."""
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch

from config import UserError
from evaluation import shapes_score
from evaluation.shapes_score import score, sharpness, touches_border
from rng import uniform
from sources import shapes
from sources.shapes import HELD_OUT, LARGE, NATIVE, SMALL, Shapes
from sources.shapes_grammar import (BACKGROUNDS, COLORS, RELATIONS, SHAPES, WORDS, facts_to_caption, parse_caption,
                                    split)
from text import WordVectors

PLAIN = dict(native=False, crop=False, flip=False)


@pytest.fixture(scope="module")
def whole():
    """Renders at every native size, uncut and not mirrored."""
    return Shapes(32, crop=False, flip=False).records(range(800))


# ---------------------------------------------------------------- language

def test_captions_are_of_the_grammar_and_use_all_of_it():
    texts = Shapes(8, **PLAIN).records(range(500))["caption"]
    lengths = [len(split(text)) for text in texts]
    assert all(facts_to_caption(parse_caption(text)) == text for text in texts)
    assert (min(lengths), max(lengths) <= 20) == (3, True) and max(lengths) >= 17
    assert set(" ".join(texts).split()) == set(WORDS) and len(set(WORDS)) == len(WORDS)


def test_describe_reads_what_a_person_types():
    facts = parse_caption("A small RED ring, left of a blue square; on grey.")
    assert facts.colors == ("red", "blue") and facts.shapes == ("ring", "square")
    assert facts.sizes == ("small", None)
    assert facts.relations == ("left of",) and facts.background == "grey"
    assert parse_caption("red ring and large orange star").relations == (None,)
    assert facts_to_caption(parse_caption("red ring and large orange star")) == "a red ring and a large orange star"


@pytest.mark.parametrize("text, part", [
    ("a ring", "'ring' (word 2)"), ("", "its end"), ("a red ring left a blue star", "wanted of"),
    ("a red ring on mars", "'mars'"), ("a red ring on grey above a blue star", "nothing may follow"),
    ("a red ring blue", "wanted on")])
def test_describe_says_where_a_caption_leaves_the_grammar(text, part):
    with pytest.raises(UserError) as error:
        parse_caption(text)
    assert part in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- word vectors

def test_tokens_name_the_words_around_them_exactly():
    coder = WordVectors(length=7)
    tokens, lengths = coder.encode(["a small red ring", "", "A red star."])
    assert tokens.shape == (3, 7, coder.dim) and tokens.dtype == torch.float32
    assert lengths.tolist() == [4, 0, 3]
    for b, n in enumerate(lengths):
        assert (tokens[b, n:] == 0).all() and (tokens[b, :n] != 0).any(1).all()

    V = len(coder.table[0])
    read = (tokens[0, :4, :4 * V].reshape(4, 4, V) @ coder.table.T / V)      # 1 where the window shows a word
    words = [[coder.words[k] for k in row.nonzero()[:, 0]] for row in read.reshape(16, -1).round(decimals=5)]
    a, small, red, ring = ["a"], ["small"], ["red"], ["ring"]
    assert words == [[], [], a, small, [], a, small, red, a, small, red, ring, small, red, ring, []]


def test_word_vectors_are_orthogonal_distinct_in_place_and_of_unit_variance():
    coder = WordVectors()
    gram = coder.table[:-1] @ coder.table[:-1].T
    assert torch.equal(gram, torch.eye(len(coder.words)) * coder.table.shape[1])
    tokens, lengths = coder.encode(Shapes(8, **PLAIN).records(range(150))["caption"])
    power = (tokens ** 2).sum((1, 2)) / (lengths * coder.dim)
    assert 0.85 < power.mean() < 1 and torch.pdist(coder.positions).min() > 0.5
    assert torch.equal(tokens, WordVectors().encode(Shapes(8, **PLAIN).records(range(150))["caption"])[0])


def test_encoder_refuses_what_it_does_not_know():
    with pytest.raises(UserError, match="unknown word 'rings'.*did you mean ring.*known: a, an"):
        WordVectors().encode(["a red rings"])
    with pytest.raises(UserError, match="has 4 words; the encoder takes 3"):
        WordVectors(length=3).encode(["a small red ring"])


# ---------------------------------------------------------------- random numbers

def test_hashed_numbers_are_uniform_and_uncorrelated():
    u = uniform(17, np.arange(20000), 8)
    assert u.min() >= 0 and u.max() < 1
    cells = np.stack([np.bincount((u[:, k] * 64).astype(int), minlength=64) for k in range(8)])
    chi = ((cells - 312.5) ** 2 / 312.5).sum()                              # 8 x 63 degrees of freedom
    assert abs(chi - 504) < 5 * math.sqrt(2 * 504)
    z = (u - 0.5) * math.sqrt(12)
    other = (uniform(18, np.arange(20000), 8) - 0.5) * math.sqrt(12)       # columns, rows, keys
    beside = [z.T @ z / 20000 - np.diag((z * z).mean(0)), z[1:].T @ z[:-1] / 20000, z.T @ other / 20000]
    assert np.abs(beside).max() < 5 / math.sqrt(20000)


def test_mix_is_splitmix64():
    """The first output of the published generator from state 0, and avalanche: a flipped bit flips half."""
    step = np.array([0x9E3779B97F4A7C15], np.uint64)
    assert shapes.mix(step)[0] == 0xE220A8397B1DCDAF
    flips = shapes.mix(step ^ (np.uint64(1) << np.arange(64, dtype=np.uint64))) ^ shapes.mix(step)
    assert abs(np.mean([bin(k).count("1") for k in flips.tolist()]) - 32) < 5 * 4 / 8


def test_hashed_numbers_do_not_depend_on_the_other_rows_or_draws():
    u = uniform(3, np.arange(50), 6)
    assert np.array_equal(uniform(3, np.array([41, 7]), 4), u[[41, 7], :4])


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
    cases = (dict(split="val"), "'val'"), (dict(objects=(0, 1)), "objects"), (dict(resolution=4), "4")
    cases += tuple((dict(side=side), "side wants a range") for side in ((0, 1), (0.6, 0.4), (0.5, 1.1)))
    for wrong, word in cases:
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
    scene, n = Shapes(8, objects=objects, layout=kind).drawn(np.arange(800))[1], objects[0]
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
    scene = source.drawn(np.arange(2000))[1]
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
    assert [parse_caption(text).relations for text in batch["caption"]] == [(RELATIONS[k],) for k in scene["relation"][:, 0]]
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
        scene = Shapes(8, split=split_name, layout=kind).drawn(np.arange(3000))[1]
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
    mask = shapes.draw(np.arange(8), x, y, r, n, zero + shapes.canvas_side(R), zero, zero, zero > 0, R)
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
    room = (1.25 / side - 1)[:, None] * R                                   # pixels by which the crop can be moved
    place = (batch["crop"] + 0.5) / (room + 1)
    assert batch["crop"].min() == 0 and ((room - batch["crop"]) > -0.01).all() and (place > 0.97).any(0).all()
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


# ---------------------------------------------------------------- scores

def test_scores_are_right_on_renders_of_every_native_size(whole):
    right = score(whole["image"], whole["caption"])
    for name, value in right.items():
        assert value.nanmean() >= 0.985, name
    for n in NATIVE:
        assert right["shape"][whole["size"][:, 0] == n].mean() >= 0.95
    asked = {name: (~value.isnan()).float().mean().item() for name, value in right.items()}
    assert asked["color"] == asked["count"] == asked["all"] == 1 and min(asked.values()) > 0.3


def test_scores_are_near_chance_on_captions_of_other_images(whole):
    right = {k: v.nanmean().item() for k, v in score(whole["image"][:400], whole["caption"][1:401]).items()}
    assert right["all"] < 0.02 and right["color"] < 0.15 and right["shape"] < 0.2
    assert abs(right["count"] - 1 / 3) < 0.07
    assert abs(right["background"] - 0.2) < 0.09 and abs(right["size"] - 0.5) < 0.2 and right["side"] < 0.9


def test_mirrored_images_are_wrong_on_side_alone(whole):
    right = score(whole["image"][:300].flip(-1), whole["caption"][:300])
    assert right.pop("side").nanmean() == 0
    assert all(value.nanmean() > 0.98 for name, value in right.items() if name != "all")


def test_each_false_word_is_found_by_its_own_score():
    batch = Shapes(32, objects=(2,), **PLAIN).records(range(60))
    scene, full, swap = {k: v.numpy() for k, v in batch["scene"].items()}, [], dataclasses.replace
    for b in range(60):                                                     # captions that leave nothing out
        sizes = tuple("small" if r <= SMALL else "large" if r >= LARGE else None for r in scene["r"][b, :2])
        background, link = list(BACKGROUNDS)[scene["background"][b]], RELATIONS[scene["relation"][b, 0]]
        facts = parse_caption(batch["caption"][b])
        full.append(swap(facts, sizes=sizes, background=background, relations=(link,)))

    def other(name, names, *taken):
        return next(n for n in names if n not in (name, *taken))

    opposite = {"small": "large", "large": "small", None: None}
    lies = dict(
        color=[swap(f, colors=(f.colors[0], other(f.colors[1], COLORS, f.colors[0]))) for f in full],
        shape=[swap(f, shapes=(f.shapes[0], other(f.shapes[1], SHAPES))) for f in full],
        size=[swap(f, sizes=tuple(opposite[s] for s in f.sizes)) for f in full],
        side=[swap(f, relations=(RELATIONS[RELATIONS.index(f.relations[0]) ^ 1],)) for f in full],
        background=[swap(f, background=other(f.background, BACKGROUNDS)) for f in full],
        count=[parse_caption(facts_to_caption(f).split(f.relations[0])[0]) for f in full])
    lies["level"] = lies["side"]
    assert score(batch["image"], [facts_to_caption(f) for f in full])["all"].mean() == 1
    for name, facts in lies.items():
        right = score(batch["image"], [facts_to_caption(f) for f in facts])
        assert right[name].nansum() == 0 and (~right[name].isnan()).sum() > 20, name
        tied = ({"side", "level"}, {"count", "color"})      # an object that is not asked for brings its colour along
        others = [right[k] for k in right if k not in (name, "all") and {k, name} not in tied]
        assert all(value.nanmean() == 1 or value.isnan().all() for value in others), name


def test_scores_stand_some_noise_and_range(whole):
    noise = torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    right = score(whole["image"][:200] * 1.03 + 0.08 * noise, whole["caption"][:200])
    assert all(value.nanmean() > 0.95 for value in right.values())
    assert score(noise, whole["caption"][:200])["all"].mean() < 0.02


def test_objects_of_one_colour_are_counted_but_not_told_apart():
    image = Shapes(32, **PLAIN).record(3)["image"][None]
    right = score(image, ["a white cross left of a white star"])
    assert right["color"] == 1 and right["count"] == 0
    assert all(right[name].isnan() for name in ("shape", "size", "side", "level", "background"))


def test_sharpness_rises_with_native_size(whole):
    for batch in (whole, Shapes(64, crop=False).records(range(100))):
        value = sharpness(batch["image"])
        sharp = torch.stack([value[batch["size"][:, 0] == n].mean() for n in NATIVE])
        assert (sharp.diff() > 0).all() and sharp[-1] > 2 * sharp[0]
    pair = torch.stack([sharpness(whole["image"]), whole["size"][:, 0].log()])
    assert torch.corrcoef(pair)[0, 1] > 0.9


def test_cut_finds_the_objects_that_the_crop_cuts(whole):
    assert not touches_border(whole["image"]).any()
    batch = Shapes(32, native=False).records(range(300))
    at = (np.arange(-200, 200) + 0.5) / 200
    reach = []                                                       # of each shape: left and right, up, down
    for name in SHAPES:
        inside = shapes.sdf(name, at[None], at[:, None]) < 0
        rows, cols = at[inside.any(1)], at[inside.any(0)]
        reach.append((cols.max(), -rows.min(), rows.max()))
    scene = batch["scene"]
    wide, up, down = torch.tensor(reach).float()[scene["shape"]].unbind(2)
    x, y, r = (scene[name].float() for name in "xyr")
    beyond = torch.stack([wide * r - x, x + wide * r - 1, up * r - y, y + down * r - 1]).amax(0) * 32
    beyond = beyond.where(scene["shape"] >= 0, torch.tensor(-9.0)).amax(1)  # pixels that are cut off
    found = touches_border(batch["image"]).float()
    assert found[beyond > 2].mean() > 0.97 and found[beyond < -0.5].mean() < 0.01
    assert (beyond > 0.5).float().mean() > 0.4


def test_a_image_with_more_colours_than_asked_is_wrong():
    noise = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (9, 3, 32, 32)).astype(np.float32))
    assert not score(noise, ["a red ring left of a blue square"] * 9)["color"].any()
