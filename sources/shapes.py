"""Captioned shapes: an endless data set with exact ground truth, rendered on demand, with no download.

(seed, split, index) decides what a scene shows; the epoch also decides where it is cropped and whether it is mirrored.
`draw_scene` makes a scene from hashed numbers, `caption` describes it, `render` gives its pixels.

Lengths are fractions of the image's side, y points down, and (0, 0) is the top left corner. The canvas is a quarter
wider than the image, to the right and below, so a crop of the image's width at (0, 0) cuts nothing.
Dimensions: B batch, 3 places for objects (unused ones hold -1), R side of the crop, S side of the canvas (both in
pixels of the crop), K objects in a batch that share a native size, p side of the square around an object, in native
pixels.
"""
import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from config import Config, UserError, check_name
from rng import seed64, uniform
from sources.images import CROPS
from sources.shapes_grammar import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SceneFacts, facts_to_caption

LAYOUTS = ("free", "grid", "sides")
VERSION = "shapes 2"                        # changes when an index shows something else
HELD_OUT = (("green", "square"), ("purple", "star"), ("cyan", "heart"), ("orange", "cross"),
            ("yellow", "triangle"), ("white", "ring"))      # never in the splits train and test
NATIVE = (16, 20, 24, 32, 48, 96)           # sides in pixels at which a canvas is rendered
RADIUS = (0.14, 0.23)                       # half the width of an object among several
MAX_RADIUS_SINGLE = 0.36                    # largest half-width of an object that is alone
SMALL, LARGE = 0.163, 0.197                 # captions say small up to the first, large from the second
MARGIN, GAP = 0.03, 0.02                    # smallest distance to the border, and between objects
GRID_CENTRES = (2, 3, 4, 5, 6)              # grid: centres on either axis, in eighths of the side
GRID_PAIRS = ((2, 5), (3, 6), (2, 6))       # grid: near and far centre of two objects that must not touch
TWO_SIZES = (0.145, 0.21)                   # grid: half the width of a small and of a large object
DRAWS = 54                                  # random numbers for a scene and its caption
PAIR, CAPTION_DRAWS = 3, 48                 # first of those for a pair's layout, and for the caption
RELATION_DRAWS = CAPTION_DRAWS + 3          # below 0.75 the caption states a pair's relation


class Shapes:
    """An endless source of captioned images of shapes, labelled by the shape of the largest object.

    split       train, test (other scenes, same distribution) or held_out (the largest object is one of HELD_OUT)
    objects     possible numbers of objects: some of 1, 2 and 3
    native      render at a side from NATIVE, likelier coarse for the first classes; off: at the finest
    crop, side  crop anywhere, to a fraction of the image's side from this range; off: at (0, 0), which cuts nothing
    flip        mirror half of the images but not their captions
    layout      free: any place and size; grid: places eighths of the side apart and two sizes, which a small network
                learns sooner; sides: a grid of two objects side by side, with a caption that says which is left"""
    channels, encoder, bad, can_have_classes = 3, None, {}, True
    classes = list(SHAPES)

    def __init__(self, resolution: int = 32, seed: int = 0, split: str = "train",
                 objects: tuple[int, ...] = (1, 2, 3), native: bool = True, crop: bool = True,
                 flip: bool = True, side: tuple[float, float] = (1.0, 1.0), layout: str = "free"):
        check_name("layout", layout, LAYOUTS)
        if not set(objects) <= {1, 2, 3}:
            raise UserError(f"objects wants numbers of 1, 2 and 3, got {objects!r}")
        if resolution < 8:
            raise UserError(f"shapes want a resolution of at least 8, got {resolution}")
        self.resolution, self.split, self.layout = resolution, split, layout
        self.objects = (2,) if layout == "sides" else tuple(objects)
        self.native, self.crop, self.flip = native, crop, flip
        self.side = (float(side[0]), float(side[1])) if crop else (1.0, 1.0)
        self.controls = tuple(c for c, on in (("size", native), ("crop", crop), ("flip", flip)) if on)
        self.scene_key, self.view_key = seed64("scene", seed, split), seed64("view", seed, split)
        parts = (VERSION, resolution, seed, split, self.objects, native, crop, flip)
        parts += self.side if self.side != (1, 1) else ()   # a default leaves the fingerprint as it was
        parts += (layout,) if layout != "free" else ()
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return 2 ** 31

    def records(self, indices: Sequence[int], epochs: Sequence[int] | int = 0) -> dict:
        """Return the batch of these samples; scene holds the truth in coordinates of the cropped, flipped image.

        scene: n, main, background (B,); shape, color, x, y, r (B, 3); relation (B, 2), an index into RELATIONS of
        object k seen from k + 1, before flipping."""
        index = np.asarray(indices, np.int64).reshape(-1)
        epoch = np.broadcast_to(np.asarray(epochs, np.int64), index.shape)
        u, scene = self.random_scenes(index)
        if not self.native:
            scene["native"][:] = len(NATIVE) - 1

        R, (low, high) = self.resolution, self.side
        v = uniform(self.view_key, index * len(self) + epoch, 4)
        S = np.rint(canvas_side(R) / (low + (high - low) * v[:, 3])).astype(int)
        top, left = (v[:, :2] * (S - R + 1)[:, None] * self.crop).astype(int).T
        flip = (v[:, 2] < 0.5) & self.flip
        image = render(scene, S, top, left, flip, R)
        captions = [caption(scene, b, u[b]) for b in range(len(index))]
        label = scene["shape"][np.arange(len(index)), scene["main"]]
        size = np.array(NATIVE, np.float32)[scene["native"]]
        finer, exists = S[:, None] / canvas_side(R), scene["shape"] >= 0
        x, y, r = (scene[name] * finer for name in "xyr")   # in fractions of the crop's side, (B, 3) each
        x, y = x - left[:, None] / R, y - top[:, None] / R
        x = np.where(flip[:, None], 1 - x, x)
        scene |= {name: np.where(exists, value, -1) for name, value in (("x", x), ("y", y), ("r", r))}
        return dict(
            image=torch.from_numpy(image), caption=captions, label=torch.from_numpy(label),
            size=torch.from_numpy(size)[:, None].repeat(1, 2),
            crop=torch.from_numpy(np.stack([top, left], 1).astype(np.float32)),
            flip=torch.from_numpy(flip.astype(np.float32)), index=torch.from_numpy(index),
            scene={k: torch.from_numpy(v) for k, v in scene.items()})

    def random_scenes(self, index: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the random numbers (B, DRAWS) of these scenes (B,), and the scenes that draw_scene makes of them."""
        u = uniform(self.scene_key, index, DRAWS)
        if self.layout == "sides":
            u[:, PAIR], u[:, RELATION_DRAWS] = 1, 0         # side by side, and the caption says which is left
        return u, draw_scene(u, self.objects, self.split == "held_out", self.layout != "free")

    def record(self, index: int, epoch: int = 0) -> dict:
        """Return one sample: the only row of `records([index], epoch)`."""
        batch = self.records([index], epoch)
        scene = {key: value[0] for key, value in batch.pop("scene").items()}
        return {**{key: value[0] for key, value in batch.items()}, "scene": scene}

    @staticmethod
    def takes(where: str) -> bool:
        return where == "shapes"

    @classmethod
    def open(cls, cfg: Config, split: str = "train") -> "Shapes":
        """Open a split. A global crop is as wide as the image and moves over a wider canvas, so it cuts too."""
        n, layout, varied = cfg.shapes.objects, cfg.shapes.layout, cfg.augment.split("+")
        if layout == "sides" and n != 2:
            raise UserError(f"shapes.layout='sides' needs shapes.objects=2, got shapes.objects={n}")
        side = (1.0, 1.0) if cfg.crop == "global" else CROPS[cfg.crop]
        return cls(cfg.model.resolution, cfg.seed, split, tuple(range(1, n + 1)),
                   *(name in varied for name in ("size", "crop", "flip")), side, layout)


def rgb(palette: dict[str, tuple[int, int, int]]) -> np.ndarray:
    """Return a palette as (names, 3) float32 in [-1, 1]."""
    return np.array(list(palette.values()), np.float32) / 127.5 - 1


def draw_scene(u: np.ndarray, objects: tuple[int, ...], held_out: bool, grid: bool = False) -> dict[str, np.ndarray]:
    """Turn uniform numbers (B, DRAWS) into scenes: shape, color, x, y, r (B, 3), relation (B, 2), the rest (B,).

    grid: centres lie eighths of the side apart, a patch of 4 at 32 px, and one object of several is large."""
    B, rows = len(u), np.arange(len(u))
    n = np.array(objects)[(u[:, 0] * len(objects)).astype(int)]                             # (B,)
    exists = np.arange(3) < n[:, None]                                                      # (B, 3)
    shape = (u[:, 12:15] * len(SHAPES)).astype(int)
    r = sizes_on_grid(u[:, 6:9], n) if grid else sizes(u[:, 6:9], n)
    r = np.where(exists, r, 0)
    main = r.argmax(1)                                                      # (B,) the largest object

    colors, held = list(COLORS), [(SHAPES.index(s), list(COLORS).index(c)) for c, s in HELD_OUT]
    rank = u[:, 24:48].reshape(B, 3, len(COLORS)).copy()    # an object takes its highest-ranked colour
    if held_out:
        pair = np.array(held)[(u[:, 11] * len(held)).astype(int)]                           # (B, 2)
        shape[rows, main] = pair[:, 0]
    barred = np.zeros((len(SHAPES), len(colors)), bool)
    barred[tuple(np.array(held).T)] = True
    rank[barred[shape]] = -1
    if held_out:
        rank[rows, :, pair[:, 1]] = -1
        rank[rows, main, pair[:, 1]] = 2
    color = np.empty((B, 3), int)
    for k in range(3):
        color[:, k] = rank[:, k].argmax(1)
        rank[rows, k + 1:, color[:, k]] = -1

    vertical, far, before = (u[:, PAIR:PAIR + 3] < 0.5).astype(int).T
    along, across = (place_on_grid if grid else place)(far, before, u[:, 17:24], n, r)
    x, y = np.where(vertical[:, None], (across, along), (along, across))
    relation = np.stack([2 * vertical + far, 2 * (1 - vertical) + before], axis=1)
    p = np.exp(1.5 * (np.linspace(-1, 1, len(SHAPES))[:, None] * np.linspace(-1, 1, len(NATIVE))))
    table = np.cumsum(p / p.sum(1, keepdims=True), axis=1)      # the first classes are mostly coarse, the last fine
    native = (u[:, 1, None] > table[shape[rows, main], :-1]).sum(1)
    scene = dict(shape=shape, color=color, x=x, y=y, r=r)
    scene = {name: np.where(exists, value, -1) for name, value in scene.items()}
    return dict(scene, n=n, main=main, relation=np.where(exists[:, 1:], relation, -1), native=native,
                background=(u[:, 2] * len(BACKGROUNDS)).astype(int))


def sizes(u: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return half the width of every object, with one clearly the largest. u (B, 3), n (B,) -> (B, 3)"""
    rows, exists = np.arange(len(n)), np.arange(3) < n[:, None]
    most = np.where(n == 1, MAX_RADIUS_SINGLE, RADIUS[1])[:, None]
    r = np.where(exists, RADIUS[0] + (most - RADIUS[0]) * u, 0)
    main = r.argmax(1)
    r[rows, main] = np.maximum(r[rows, main], RADIUS[0] / 0.89)
    return np.where(np.arange(3) == main[:, None], r, np.minimum(r, 0.9 * r[rows, main][:, None]))


def sizes_on_grid(u: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Make a lone object small or large, and one of several large, each equally likely. u (B, 3), n (B,) -> (B, 3)"""
    large = np.where(n == 1, 2 * u[:, 0], u[:, 0] * n).astype(int)                          # (B,)
    return np.where(np.arange(3) == large[:, None], TWO_SIZES[1], TWO_SIZES[0])


def place(far: np.ndarray, before: np.ndarray, u: np.ndarray, n: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the centres (B, 3) along and across the axis on which object 1 follows object 0; object 2 is beside both.

    far, before (B,): whether object 0 is the far one of the pair, and object 2 is nearer than both."""
    rows, span = np.arange(len(n)), 1 - 2 * MARGIN
    low, high = np.sort(u[:, :2], axis=1).T
    near = np.where(far, r[:, 1], r[:, 0])                              # radius of the pair's near one
    slack = span - GAP - 2 * r[:, 0] - 2 * r[:, 1]
    edge = np.stack([MARGIN + low * slack, MARGIN + 2 * near + GAP + high * slack], axis=1)     # (B, 2)
    along = MARGIN + r + u[:, :3] * (span - 2 * r)                      # (B, 3) unless the pair decides
    for k in (0, 1):
        along[:, k] = np.where(n > 1, edge[rows, far ^ k] + r[:, k], along[:, k])

    band = 2 * r[:, :2].max(1)
    low, high = np.sort(u[:, 3:5], axis=1).T
    slack = span - GAP - band - 2 * r[:, 2]
    first = np.where(before, 2 * r[:, 2], band)
    edge = np.stack([MARGIN + low * slack, MARGIN + first + GAP + high * slack], axis=1)
    across = MARGIN + r + u[:, 3:6] * (span - 2 * r)
    for k, jitter in ((0, u[:, 5]), (1, u[:, 6])):
        inside = edge[rows, before] + r[:, k] + jitter * (band - 2 * r[:, k])
        across[:, k] = np.where(n > 2, inside, across[:, k])
    across[:, 2] = edge[rows, 1 - before] + r[:, 2]
    return along, across


def place_on_grid(far: np.ndarray, before: np.ndarray, u: np.ndarray, n: np.ndarray,
                  r: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return what `place` does, with centres on the grid. Objects of either size do not touch."""
    rows = np.arange(len(n))
    free = np.array(GRID_CENTRES)[(u[:, :6] * len(GRID_CENTRES)).astype(int)]               # (B, 6)
    along, across = free[:, :3].copy(), free[:, 3:].copy()
    pair, band = (np.array(GRID_PAIRS)[(v * len(GRID_PAIRS)).astype(int)] for v in (u[:, 6], u[:, 0]))  # (B, 2)
    for k in (0, 1):
        along[:, k] = np.where(n > 1, pair[rows, far ^ k], along[:, k])
        across[:, k] = np.where(n > 2, band[rows, before], across[:, k])
    across[:, 2] = band[rows, 1 - before]
    return along / 8, across / 8


def caption(scene: dict[str, np.ndarray], b: int, u: np.ndarray) -> str:
    """Return the caption of row b: every object, and those of the other facts that its numbers u (DRAWS,) choose."""
    n, names, links = scene["n"][b], list(COLORS), scene["relation"][b]
    r = scene["r"][b]
    word = ["small" if r[k] <= SMALL else "large" if r[k] >= LARGE else None for k in range(n)]
    return facts_to_caption(SceneFacts(
        colors=tuple(names[k] for k in scene["color"][b, :n]),
        shapes=tuple(SHAPES[k] for k in scene["shape"][b, :n]),
        sizes=tuple(word[k] if u[CAPTION_DRAWS + k] < 0.5 else None for k in range(n)),
        relations=tuple(RELATIONS[links[k]] if u[RELATION_DRAWS + k] < 0.75 else None for k in range(n - 1)),
        background=list(BACKGROUNDS)[scene["background"][b]] if u[CAPTION_DRAWS + 5] < 0.5 else None))


def sdf(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the signed distance to the outline of a shape in [-1, 1]^2: negative inside, exact near the outline."""
    x = np.abs(x)
    if shape == "circle":
        return np.hypot(x, y) - 0.94
    if shape == "square":
        return np.maximum(x, np.abs(y)) - 0.84
    if shape == "diamond":
        return (x + np.abs(y) - 1) * math.sqrt(0.5)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76) - 0.24
    if shape == "cross":
        y = np.abs(y)
        return np.maximum(np.maximum(x, y) - 0.98, np.minimum(x, y) - 0.3)
    if shape == "triangle":
        return np.maximum(y - 0.78, (1.74 * x - 0.98 * (y + 0.96)) / math.hypot(1.74, 0.98))
    if shape == "heart":                                   # a square on its tip and a disc on each upper side
        y, h = y - 0.08, 0.8
        disc = np.hypot(x - h / 2, y + h / 2) - h * math.sqrt(0.5)
        return np.minimum(disc, (x + np.abs(y) - h) * math.sqrt(0.5))
    y = y - 0.08                                            # star: fold the plane onto half a point
    cos, sin = math.cos(0.2 * math.pi), math.sin(0.2 * math.pi)
    for _ in range(2):                                # by the mirror at 36 degrees from the upper tip (0, -1)
        beyond = np.maximum(cos * x + sin * y, 0)
        x, y = np.abs(x - 2 * cos * beyond), y - 2 * sin * beyond
    dx, dy = 0.44 * sin, 1 - 0.44 * cos                     # from the tip to the dent
    return (dy * x - dx * (y + 1)) / math.hypot(dx, dy)


@lru_cache(maxsize=1024)
def resampler(n: int, S: int, pad: int) -> np.ndarray:
    """Return (S, pad + n + pad) float32: n pixels to S by a triangle two pixels of the coarser grid wide."""
    at = (np.arange(S)[:, None] + 0.5) * n / S - (np.arange(n) + 0.5)
    weight = np.maximum(0, 1 - np.abs(at) / max(1, n / S))
    return np.pad(weight / weight.sum(1, keepdims=True), ((0, 0), (pad, pad))).astype(np.float32)


def render(scene: dict[str, np.ndarray], S: np.ndarray, top: np.ndarray, left: np.ndarray, flip: np.ndarray,
           R: int) -> np.ndarray:
    """Return the crops (B, 3, R, R) float32 in [-1, 1]; S, top, left in pixels of the canvas, flip bool, (B,) each.

    A crop shows canvas_side(R) / S of the image's side: all of it at S = canvas_side(R), half of it at twice that.
    Resampling is linear and objects do not overlap, so each object is rendered on a small square of native pixels,
    resampled directly to the crop, and laid over the background in its colour."""
    back = rgb(BACKGROUNDS)[scene["background"]]                                            # (B, 3)
    image = np.repeat(back, R * R, axis=1).reshape(-1, 3, R, R)
    paint = rgb(COLORS)[scene["color"]] - back[:, None]                                    # (B, 3 objects, 3)
    for k, n in enumerate(NATIVE):
        b, j = np.nonzero((scene["native"] == k)[:, None] & (scene["shape"] >= 0))          # (K,) each
        if len(b):
            x, y, r = (scene[name][b, j] for name in ("x", "y", "r"))
            mask = coverage(scene["shape"][b, j], x, y, r, n, S[b], top[b], left[b], flip[b], R)    # (K, R, R)
            for o in range(3):
                one = j == o
                image[b[one]] += mask[one, None] * paint[b[one], o, :, None, None]
    return np.clip(image, -1, 1)


def coverage(shape: np.ndarray, x: np.ndarray, y: np.ndarray, r: np.ndarray, n: int, S: np.ndarray,
             top: np.ndarray, left: np.ndarray, flip: np.ndarray, R: int) -> np.ndarray:
    """Return the coverage (K, R, R) of objects, clip(1/2 - distance in native pixels), resampled to the crop."""
    unit = n * R / canvas_side(R)                           # native pixels per image side
    p = math.ceil(2 * MAX_RADIUS_SINGLE * unit) + 3
    corner = np.floor(np.stack([x, y]) * unit - p / 2).astype(int)                          # (2, K)
    pixel = corner[..., None] + np.arange(p) + 0.5 - np.stack([x, y])[..., None] * unit     # (2, K, p)
    px, py = (pixel / (r[:, None] * unit)).astype(np.float32)
    scale = (r * unit).astype(np.float32)[:, None, None]
    cover = np.empty((len(x), p, p), np.float32)
    for s in np.unique(shape):
        one = shape == s
        cover[one] = sdf(SHAPES[s], px[one, None, :], py[one, :, None]) * scale[one]
    cover = np.clip(0.5 - cover, 0, 1)

    sides, which = np.unique(S, return_inverse=True)
    weight = np.concatenate([resampler(n, int(side), p) for side in sides])                 # (sum of sides, ...)
    start, pixels = (np.cumsum(sides) - sides)[which][:, None], np.arange(R)
    rows = start + top[:, None] + pixels                                                    # (K, R)
    cols = start + left[:, None] + np.where(flip[:, None], pixels[::-1], pixels)
    inside = corner[..., None] + np.arange(p) + p                                           # (2, K, p)
    wx = weight[cols[:, :, None], inside[0][:, None]]                                       # (K, R, p)
    wy = weight[rows[:, :, None], inside[1][:, None]]
    return wy @ cover @ wx.transpose(0, 2, 1)                                               # (K, R, R)


def canvas_side(R: int) -> int:
    """Return the side S of the canvas for which a crop of side R is as wide as the image."""
    return round(1.25 * R)
