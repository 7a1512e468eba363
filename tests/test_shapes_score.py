"""Exact scores of images of shapes: right on renders, near chance on other captions, wrong on each false word."""
import dataclasses

import numpy as np
import pytest
import torch

from evaluation.shapes_score import score, sharpness, touches_border
from sources import shapes
from sources.shapes import LARGE, NATIVE, SMALL, Shapes
from sources.shapes_grammar import BACKGROUNDS, COLORS, RELATIONS, SHAPES, facts_to_caption, parse_caption

PLAIN = dict(native=False, crop=False, flip=False)


@pytest.fixture(scope="module")
def whole():
    """Renders at every native size, uncut and not mirrored."""
    return Shapes(32, crop=False, flip=False).records(range(800))


def test_scores_are_right_on_renders_of_every_native_size(whole):
    right = score(whole["image"], whole["caption"])
    for name, value in right.items():
        assert value.nanmean() >= 0.985, name
    for n in NATIVE:
        assert right["shape"][whole["size"][:, 0] == n].mean() >= 0.95
    stated = {name: (~value.isnan()).float().mean().item() for name, value in right.items()}
    assert stated["color"] == stated["count"] == stated["all"] == 1 and min(stated.values()) > 0.3


def test_scores_are_near_chance_on_captions_of_other_images(whole):
    right = {k: v.nanmean().item() for k, v in score(whole["image"][:400], whole["caption"][1:401]).items()}
    assert right["all"] < 0.02 and right["color"] < 0.15 and right["shape"] < 0.2
    assert abs(right["count"] - 1 / 3) < 0.07
    assert abs(right["background"] - 0.2) < 0.09 and abs(right["size"] - 0.5) < 0.2 and right["left_right"] < 0.9


def test_mirrored_images_are_wrong_on_left_and_right_alone(whole):
    right = score(whole["image"][:300].flip(-1), whole["caption"][:300])
    assert right.pop("left_right").nanmean() == 0
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
        left_right=[swap(f, relations=(RELATIONS[RELATIONS.index(f.relations[0]) ^ 1],)) for f in full],
        background=[swap(f, background=other(f.background, BACKGROUNDS)) for f in full],
        count=[parse_caption(facts_to_caption(f).split(f.relations[0])[0]) for f in full])
    lies["above_below"] = lies["left_right"]
    assert score(batch["image"], [facts_to_caption(f) for f in full])["all"].mean() == 1
    for name, facts in lies.items():
        right = score(batch["image"], [facts_to_caption(f) for f in facts])
        assert right[name].nansum() == 0 and (~right[name].isnan()).sum() > 20, name
        tied = ({"left_right", "above_below"}, {"count", "color"})      # an object no caption states has a colour too
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
    assert all(right[name].isnan() for name in ("shape", "size", "left_right", "above_below", "background"))


def test_sharpness_rises_with_native_size(whole):
    for batch in (whole, Shapes(64, crop=False).records(range(100))):
        value = sharpness(batch["image"])
        sharp = torch.stack([value[batch["size"][:, 0] == n].mean() for n in NATIVE])
        assert (sharp.diff() > 0).all() and sharp[-1] > 2 * sharp[0]
    pair = torch.stack([sharpness(whole["image"]), whole["size"][:, 0].log()])
    assert torch.corrcoef(pair)[0, 1] > 0.9


def test_touches_border_finds_the_objects_that_the_crop_cuts(whole):
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


def test_an_image_with_more_colours_than_stated_is_wrong():
    noise = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (9, 3, 32, 32)).astype(np.float32))
    assert not score(noise, ["a red ring left of a blue square"] * 9)["color"].any()
