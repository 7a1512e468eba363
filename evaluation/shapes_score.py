"""Exact scores for images of shapes: pixel arithmetic checks what a caption states, without a network.

Dimensions: B batch, R side of an image, K objects of all images.
"""
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sources.shapes import LARGE, RADIUS, SMALL, rgb, sdf
from sources.shapes_grammar import BACKGROUNDS, COLORS, RELATIONS, SHAPES, parse_caption

ATTRIBUTES = ("color", "count", "background", "shape", "size", "left_right", "above_below")


@lru_cache(maxsize=None)
def moments() -> tuple[np.ndarray, np.ndarray]:
    """Return area and height of the centroid (shapes,) of every shape at radius 1."""
    at = (np.arange(-440, 440) + 0.5) / 400
    inside = np.stack([sdf(s, at[None], at[:, None]) < 0 for s in SHAPES])                # (shapes, 880, 880)
    area = inside.sum((1, 2))
    return area / 400 ** 2, (inside * at[:, None]).sum((1, 2)) / area


def unmix(images: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split images (B, 3, R, R) into background (B,), owner (B, R, R) and share (B, R, R).

    pixel = (1 - share) BACKGROUNDS[background] + share COLORS[owner]. The background is the one nearest to most pixels;
    a pixel's owner is the colour that comes closest to it when mixed with the background."""
    pixel = images.detach().float().cpu().numpy().reshape(len(images), 3, -1).transpose(0, 2, 1)  # (B, RR, 3)
    palette = np.concatenate([rgb(BACKGROUNDS), rgb(COLORS)])
    nearest = (palette ** 2).sum(1) - 2 * pixel @ palette.T                                 # (B, RR, palette)
    votes = nearest.argmin(2)
    back = np.stack([(votes == k).sum(1) for k in range(len(BACKGROUNDS))], 1).argmax(1)
    start = rgb(BACKGROUNDS)[back]
    way = rgb(COLORS) - start[:, None]                                                      # (B, colours, 3)
    power = (way ** 2).sum(2)[:, None]
    along = (pixel - start[:, None]) @ way.transpose(0, 2, 1)                               # (B, RR, colours)
    share = np.clip(along / power, 0, 1)
    owner = (share * share * power - 2 * share * along).argmin(2)                           # least squared remainder
    share = np.take_along_axis(share, owner[..., None], 2)
    form = (len(images), *images.shape[2:])
    return back, owner.reshape(form), share.reshape(form)


def count(owner: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Count the connected patches of one colour that are large enough to be an object. (B,)"""
    B, R, _ = owner.shape
    ink = share > 0.5
    patch = np.where(ink, np.arange(1, R * R + 1).reshape(R, R), 0)
    down = ink[:, 1:] & ink[:, :-1] & (owner[:, 1:] == owner[:, :-1])
    right = ink[:, :, 1:] & ink[:, :, :-1] & (owner[:, :, 1:] == owner[:, :, :-1])
    joined = ((patch[:, 1:], patch[:, :-1], down), (patch[:, :, 1:], patch[:, :, :-1], right))
    while True:                                             # a patch's largest number floods it
        before = patch.copy()
        for one, two, same in joined:
            np.copyto(one, np.maximum(one, two), where=same)
            np.copyto(two, np.maximum(one, two), where=same)
        if (patch == before).all():
            break
    size = np.bincount((patch + np.arange(B)[:, None, None] * (R * R + 1)).ravel(), minlength=B * (R * R + 1))
    return (size.reshape(B, -1)[:, 1:] >= min_object_pixels(R)).sum(1)


def min_object_pixels(R: int) -> float:
    """Return the fewest pixels that count as an object: 0.4 of the smallest whole one."""
    return 0.4 * moments()[0].min() * (RADIUS[0] * R) ** 2


def match_shape(mask: np.ndarray) -> np.ndarray:
    """Return the shape (K,) that overlaps each mask (K, R, R) best when rendered with its area and centroid.

    The rendered edge is a twentieth of the image wide, between the sharpest and the most blurred originals."""
    (area, low), edge = moments(), max(1, mask.shape[1] / 20)
    at = np.arange(mask.shape[1], dtype=np.float32) + 0.5
    total = np.maximum(mask.sum((1, 2)), 1e-6)
    cx, cy = (mask.sum(1) @ at) / total, (mask.sum(2) @ at) / total
    overlap = np.empty((len(mask), len(SHAPES)))
    for s, name in enumerate(SHAPES):
        r = np.sqrt(total / np.float32(area[s]))[:, None]
        x = (at - cx[:, None]) / r
        y = (at - cy[:, None]) / r + np.float32(low[s])
        rendered = np.clip(0.5 - r[..., None] * sdf(name, x[:, None], y[..., None]) / edge, 0, 1)
        overlap[:, s] = np.minimum(mask, rendered).sum((1, 2)) / np.maximum(mask, rendered).sum((1, 2))
    return overlap.argmax(1)


def score(images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Check each image (B, 3, R, R), in [-1, 1], against its caption, attribute by attribute.

    Every attribute gets (B,) float32: 1 right, 0 wrong, NaN where the caption is silent:
    color       the image has the stated colours and no other
    count       it has as many objects as the caption
    background  it has the stated background
    shape       every object found by its colour has the stated shape of the eight
    size        every object found by its colour has the stated size of the two
    left_right  left of and right of hold between the centroids of the objects found
    above_below above and below, likewise; a mirrored image is wrong on left_right and right on above_below
    all         every attribute that the caption states is right
    Objects that share a colour are scored for colour and count only. UserError for a caption outside the grammar."""
    facts = [parse_caption(text) for text in captions]
    back, owner, share = unmix(images)
    R, values = images.shape[-1], {name: np.full(len(facts), np.nan) for name in ATTRIBUTES}

    def record(name, rows, right):
        np.fmin.at(values[name], np.asarray(rows, int), np.asarray(right, float))

    record("count", range(len(facts)), count(owner, share) == [len(f.shapes) for f in facts])
    named = [b for b, f in enumerate(facts) if f.background]
    record("background", named, [list(BACKGROUNDS)[back[b]] == facts[b].background for b in named])

    row = np.array([b for b, f in enumerate(facts) for _ in f.shapes], int)
    after = [link for f in facts for link in (*f.relations, None)]          # to the object after it
    color = np.array([list(COLORS).index(name) for f in facts for name in f.colors], int)   # (K,)
    shape = np.array([SHAPES.index(name) for f in facts for name in f.shapes], int)
    size = [name for f in facts for name in f.sizes]
    alone = np.array([f.colors.count(name) == 1 for f in facts for name in f.colors], bool)
    mask = np.where((owner[row] == color[:, None, None]) & (share[row] > 0.15), share[row], 0)
    near = F.max_pool2d(torch.from_numpy(mask > 0.5).float()[:, None], 2 * (R // 16) + 1, 1, R // 16)
    mask = mask * near[:, 0].numpy()                        # (K, R, R), without what is far from the object's core
    found = (mask > 0.5).sum((1, 2)) >= min_object_pixels(R)
    record("color", row, found)
    area = np.stack([((owner == c) & (share > 0.5)).sum((1, 2)) for c in range(len(COLORS))], axis=1)
    unstated = np.array([[name not in f.colors for name in COLORS] for f in facts])          # (B, colours)
    record("color", range(len(facts)), ~((area >= min_object_pixels(R)) & unstated).any(1))

    scored = np.flatnonzero(found & alone)
    best = match_shape(mask[scored])
    record("shape", row[scored], best == shape[scored])
    large = mask[scored].sum((1, 2)) > moments()[0][best] * ((SMALL + LARGE) / 2 * R) ** 2
    sized = [k for k, j in enumerate(scored) if size[j]]
    record("size", row[scored[sized]], [large[k] == (size[scored[k]] == "large") for k in sized])

    at, total = np.arange(R), np.maximum(mask.sum((1, 2)), 1e-6)
    x, y = mask.sum(1) @ at / total, mask.sum(2) @ at / total                               # (K,)
    ahead = dict(zip(RELATIONS, (x[:-1] < x[1:], x[:-1] > x[1:], y[:-1] < y[1:], y[:-1] > y[1:])))
    both = [k for k, next_one in zip(scored, scored[1:]) if next_one == k + 1 and after[k]]
    for name, kinds in (("left_right", RELATIONS[:2]), ("above_below", RELATIONS[2:])):
        pairs = [k for k in both if after[k] in kinds]
        record(name, row[pairs], [ahead[after[k]][k] for k in pairs])
    values["all"] = np.fmin.reduce(list(values.values()))
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}


def sharpness(images: Tensor) -> Tensor:
    """Return (B,) one over the width in pixels of the objects' edges, which rises with native size.

    The exception is a native size equal to the canvas: nothing is resampled and edges are sharpest."""
    share = torch.from_numpy(unmix(images)[2])
    step = torch.cat([share.diff(dim=1).flatten(1), share.diff(dim=2).flatten(1)], dim=1)
    return step.square().sum(1) / step.abs().sum(1).clamp(min=1e-6)


def touches_border(images: Tensor) -> Tensor:
    """Return (B,) bool: whether an object reaches the border of the image."""
    share = unmix(images)[2] > 0.6
    border = np.concatenate([share[:, 0], share[:, -1], share[:, :, 0], share[:, :, -1]], axis=1)
    return torch.from_numpy(border.sum(1) >= 2)
