"""Scenes of coloured shapes: what is in them, drawn from hashed numbers, and what they look like.

u = uniform(key, indices, DRAWS)                            a row of random numbers for every index
scene = draw_scene(u, objects=(1, 2, 3), held_out=False)    what is where
image = render(scene, S, top, left, flip, R)                pixels

Lengths are shares of the picture's side, y points down, and (0, 0) is its top left corner. The canvas is a quarter
wider than the picture, to the right and below. A crop of the canvas as wide as the picture, at (0, 0), cuts nothing.
Dimensions: B batch, n objects (3 places, the unused hold -1), R side of the crop, S side of the canvas (both in
pixels of the crop), K objects of a batch that share a native size, p side of the square that holds an object, in
native pixels.
"""
import math
from functools import lru_cache

import numpy as np

from captions import BACKGROUNDS, COLORS, RELATIONS, SHAPES, Facts, write

HELD_OUT = (("green", "square"), ("purple", "star"), ("cyan", "heart"), ("orange", "cross"),
            ("yellow", "triangle"), ("white", "ring"))      # never in the splits train and test
NATIVE = (16, 20, 24, 32, 48, 96)           # sides in pixels at which a canvas is drawn
RADIUS = (0.14, 0.23)                       # half the width of an object among others
ALONE = 0.36                                # most of the only object of a scene
SMALL, LARGE = 0.163, 0.197                 # a caption may say small up to the one and large from the other
MARGIN, GAP = 0.03, 0.02                    # least distance to the border and between two objects
EIGHTHS = (2, 3, 4, 5, 6)                   # on the grid: where a centre may be on either axis, in eighths of the side
APART = ((2, 5), (3, 6), (2, 6))            # and the places, near and far, of two objects that must not touch
TWO_SIZES = (0.145, 0.21)                   # and half the width of an object, small or large
DRAWS = 54                                  # random numbers of a scene and its caption
PAIR, TOLD = 3, 48                          # where those begin that lay out a pair, and those of the caption
SAID = TOLD + 3                             # below 0.75 the caption says where the first object of a pair is


def rgb(palette: dict[str, tuple[int, int, int]]) -> np.ndarray:
    """(names, 3) float32 in [-1, 1]."""
    return np.array(list(palette.values()), np.float32) / 127.5 - 1


# ---------------------------------------------------------------- random numbers

def mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of uint64 in which every input bit moves every output bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(key: int, index: np.ndarray, draws: int) -> np.ndarray:
    """(B, draws) float64 in [0, 1): row b is the SplitMix64 stream whose state is a hash of (key, index[b]).

    No generator is made and none advances, so a row does not know which other rows are drawn with it."""
    step = np.uint64(0x9E3779B97F4A7C15)
    state = mix(mix(index.astype(np.uint64) * step + np.uint64(key)))                       # (B,)
    z = mix(state[:, None] + np.arange(1, draws + 1, dtype=np.uint64) * step)               # (B, draws)
    return (z >> np.uint64(11)) * 2.0 ** -53


# ---------------------------------------------------------------- scenes

def native_table() -> np.ndarray:
    """(classes, len(NATIVE)) cumulative probabilities: the first classes are mostly coarse, the last fine."""
    tilt = np.linspace(-1, 1, len(SHAPES))[:, None] * np.linspace(-1, 1, len(NATIVE))
    p = np.exp(1.5 * tilt)
    return np.cumsum(p / p.sum(1, keepdims=True), axis=1)


def draw_scene(u: np.ndarray, objects: tuple[int, ...], held_out: bool, grid: bool = False) -> dict[str, np.ndarray]:
    """Uniform numbers (B, DRAWS) to scenes: shape, color, x, y, r (B, 3), relation (B, 2), the rest (B,).

    grid: centres are eighths of the side apart, which at 32 px is a patch of 4, and one object of several is large."""
    B, rows = len(u), np.arange(len(u))
    n = np.array(objects)[(u[:, 0] * len(objects)).astype(int)]                             # (B,)
    there = np.arange(3) < n[:, None]                                                       # (B, 3)
    shape = (u[:, 12:15] * len(SHAPES)).astype(int)
    r = sizes_on_grid(u[:, 6:9], n) if grid else sizes(u[:, 6:9], n)
    r = np.where(there, r, 0)
    main = r.argmax(1)                                                               # (B,) the largest object

    colors, kept = list(COLORS), [(SHAPES.index(s), list(COLORS).index(c)) for c, s in HELD_OUT]
    rank = u[:, 24:48].reshape(B, 3, len(COLORS)).copy()    # an object takes the colour that ranks first
    if held_out:
        pair = np.array(kept)[(u[:, 11] * len(kept)).astype(int)]                           # (B, 2)
        shape[rows, main] = pair[:, 0]
    barred = np.zeros((len(SHAPES), len(colors)), bool)
    barred[tuple(np.array(kept).T)] = True
    rank[barred[shape]] = -1
    if held_out:
        rank[rows, :, pair[:, 1]] = -1
        rank[rows, main, pair[:, 1]] = 2
    color = np.empty((B, 3), int)
    for k in range(3):
        color[:, k] = rank[:, k].argmax(1)
        rank[rows, k + 1:, color[:, k]] = -1

    x, y, relation = (place_on_grid if grid else place)(u[:, PAIR:PAIR + 3] < 0.5, u[:, 17:24], n, r)
    native = (u[:, 1, None] > native_table()[shape[rows, main], :-1]).sum(1)
    scene = dict(shape=shape, color=color, x=x, y=y, r=r)
    scene = {name: np.where(there, value, -1) for name, value in scene.items()}
    return dict(scene, n=n, main=main, relation=np.where(there[:, 1:], relation, -1), native=native,
                background=(u[:, 2] * len(BACKGROUNDS)).astype(int))


def sizes(u: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Half the width of every object, the largest clearly so. u (B, 3), n (B,) -> (B, 3)"""
    rows, there = np.arange(len(n)), np.arange(3) < n[:, None]
    most = np.where(n == 1, ALONE, RADIUS[1])[:, None]
    r = np.where(there, RADIUS[0] + (most - RADIUS[0]) * u, 0)
    main = r.argmax(1)
    r[rows, main] = np.maximum(r[rows, main], RADIUS[0] / 0.89)
    return np.where(np.arange(3) == main[:, None], r, np.minimum(r, 0.9 * r[rows, main][:, None]))


def sizes_on_grid(u: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Small or large where an object is alone; else one is large, each as likely. u (B, 3), n (B,) -> (B, 3)"""
    large = np.where(n == 1, 2 * u[:, 0], u[:, 0] * n).astype(int)                          # (B,)
    return np.where(np.arange(3) == large[:, None], TWO_SIZES[1], TWO_SIZES[0])


def place(coin: np.ndarray, u: np.ndarray, n: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, ...]:
    """Centres x, y (B, 3) and relation (B, 2): object 0 beside object 1, object 2 across from both.

    coin (B, 3): is the axis of the pair vertical, is object 0 the far one, is object 2 the near one."""
    rows, room = np.arange(len(n)), 1 - 2 * MARGIN
    vertical, far, before = coin.astype(int).T
    low, high = np.sort(u[:, :2], axis=1).T
    near = np.where(far, r[:, 1], r[:, 0])                              # radius of the near one of the pair
    slack = room - GAP - 2 * r[:, 0] - 2 * r[:, 1]
    edge = np.stack([MARGIN + low * slack, MARGIN + 2 * near + GAP + high * slack], axis=1)     # (B, 2)
    along = MARGIN + r + u[:, :3] * (room - 2 * r)                      # (B, 3) where nothing else decides
    for k in (0, 1):
        along[:, k] = np.where(n > 1, edge[rows, far ^ k] + r[:, k], along[:, k])

    band = 2 * r[:, :2].max(1)
    low, high = np.sort(u[:, 3:5], axis=1).T
    slack = room - GAP - band - 2 * r[:, 2]
    first = np.where(before, 2 * r[:, 2], band)
    edge = np.stack([MARGIN + low * slack, MARGIN + first + GAP + high * slack], axis=1)
    across = MARGIN + r + u[:, 3:6] * (room - 2 * r)
    for k, jitter in ((0, u[:, 5]), (1, u[:, 6])):
        inside = edge[rows, before] + r[:, k] + jitter * (band - 2 * r[:, k])
        across[:, k] = np.where(n > 2, inside, across[:, k])
    across[:, 2] = edge[rows, 1 - before] + r[:, 2]

    x, y = np.where(vertical[:, None], (across, along), (along, across))
    return x, y, np.stack([2 * vertical + far, 2 * (1 - vertical) + before], axis=1)


def place_on_grid(coin: np.ndarray, u: np.ndarray, n: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, ...]:
    """What `place` gives, with centres on the grid. Objects do not touch at any of the two sizes."""
    rows = np.arange(len(n))
    vertical, far, before = coin.astype(int).T
    free = np.array(EIGHTHS)[(u[:, :6] * len(EIGHTHS)).astype(int)]                         # (B, 6)
    along, across = free[:, :3].copy(), free[:, 3:].copy()
    pair, band = (np.array(APART)[(v * len(APART)).astype(int)] for v in (u[:, 6], u[:, 0]))    # (B, 2)
    for k in (0, 1):
        along[:, k] = np.where(n > 1, pair[rows, far ^ k], along[:, k])
        across[:, k] = np.where(n > 2, band[rows, before], across[:, k])
    across[:, 2] = band[rows, 1 - before]

    x, y = np.where(vertical[:, None], (across, along), (along, across)) / 8
    return x, y, np.stack([2 * vertical + far, 2 * (1 - vertical) + before], axis=1)


def caption(scene: dict[str, np.ndarray], b: int, u: np.ndarray) -> str:
    """What the caption of row b says: every object, and of the rest what its numbers u (DRAWS,) decide."""
    n, names, links = scene["n"][b], list(COLORS), scene["relation"][b]
    r = scene["r"][b]
    word = ["small" if r[k] <= SMALL else "large" if r[k] >= LARGE else None for k in range(n)]
    return write(Facts(
        colors=tuple(names[k] for k in scene["color"][b, :n]),
        shapes=tuple(SHAPES[k] for k in scene["shape"][b, :n]),
        sizes=tuple(word[k] if u[TOLD + k] < 0.5 else None for k in range(n)),
        relations=tuple(RELATIONS[links[k]] if u[SAID + k] < 0.75 else None for k in range(n - 1)),
        background=list(BACKGROUNDS)[scene["background"][b]] if u[TOLD + 5] < 0.5 else None))


# ---------------------------------------------------------------- drawing

def sdf(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape that fills [-1, 1]^2, negative inside, exact close by."""
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
    """(S, pad + n + pad) float32: n pixels to S by a triangle as wide as two pixels of the coarser grid."""
    at = (np.arange(S)[:, None] + 0.5) * n / S - (np.arange(n) + 0.5)
    weight = np.maximum(0, 1 - np.abs(at) / max(1, n / S))
    return np.pad(weight / weight.sum(1, keepdims=True), ((0, 0), (pad, pad))).astype(np.float32)


def render(scene: dict[str, np.ndarray], S: np.ndarray, top: np.ndarray, left: np.ndarray, flip: np.ndarray,
           R: int) -> np.ndarray:
    """The crops (B, 3, R, R) float32 in [-1, 1]; S, top, left in pixels of the canvas, flip bool, (B,) each.

    A crop shows canvas(R) / S of the picture's side: all of it at S = canvas(R), half of it at twice that. Resampling
    is linear and objects do not overlap, so each object's coverage is drawn on a small square of native pixels,
    resampled straight to the crop, and laid over the background in its colour."""
    back = rgb(BACKGROUNDS)[scene["background"]]                                            # (B, 3)
    image = np.repeat(back, R * R, axis=1).reshape(-1, 3, R, R)
    paint = rgb(COLORS)[scene["color"]] - back[:, None]                                    # (B, 3 objects, 3)
    for k, n in enumerate(NATIVE):
        b, j = np.nonzero((scene["native"] == k)[:, None] & (scene["shape"] >= 0))          # (K,) each
        if len(b):
            x, y, r = (scene[name][b, j] for name in ("x", "y", "r"))
            mask = draw(scene["shape"][b, j], x, y, r, n, S[b], top[b], left[b], flip[b], R)        # (K, R, R)
            for o in range(3):
                one = j == o
                image[b[one]] += mask[one, None] * paint[b[one], o, :, None, None]
    return np.clip(image, -1, 1)


def draw(shape: np.ndarray, x: np.ndarray, y: np.ndarray, r: np.ndarray, n: int, S: np.ndarray,
         top: np.ndarray, left: np.ndarray, flip: np.ndarray, R: int) -> np.ndarray:
    """Coverage (K, R, R) of single objects, clip(1/2 - distance in native pixels), resampled to the crop."""
    unit = n * R / canvas(R)                                # native pixels a picture's side
    p = math.ceil(2 * ALONE * unit) + 3
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
    start, seen = (np.cumsum(sides) - sides)[which][:, None], np.arange(R)
    rows = start + top[:, None] + seen                                                      # (K, R)
    cols = start + left[:, None] + np.where(flip[:, None], seen[::-1], seen)
    inside = corner[..., None] + np.arange(p) + p                                           # (2, K, p)
    wx = weight[cols[:, :, None], inside[0][:, None]]                                       # (K, R, p)
    wy = weight[rows[:, :, None], inside[1][:, None]]
    return wy @ cover @ wx.transpose(0, 2, 1)                                               # (K, R, R)


def canvas(R: int) -> int:
    """Side S of the canvas from which a crop of side R shows as much as the picture is wide."""
    return round(1.25 * R)
