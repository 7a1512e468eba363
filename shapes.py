"""Captioned shapes: an endless data set with exact ground truth, drawn as it is asked for, with no download.

source = Shapes(resolution=32)
batch = source.records(range(64))       image, label, caption, size, crop, flip, index, scene
right = score(images, captions)         {"color": 1 or 0 an image, "side": ...}; NaN where not stated
python shapes.py --out=shapes.png       a sheet of samples with their captions

A scene is one to three objects of different colours on a plain background. What it shows depends on (seed,
split, index) alone; where it is cropped and whether it is mirrored, on the epoch as well.
Dimensions: B batch, n objects (3 places, the unused hold -1), R side of the crop, K objects of all images.
"""
import hashlib
import sys
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from captions import BACKGROUNDS, COLORS, RELATIONS, SHAPES, WordVectors, describe
from config import UserError, parse
from rng import seed64
from scenes import DRAWS, HELD_OUT, LARGE, NATIVE, PAIR, RADIUS, SAID, SMALL
from scenes import canvas, caption, draw_scene, render, rgb, sdf, uniform

SPLITS = ("train", "test", "held_out")
SCENES = ("free", "grid", "sides")
VERSION = "shapes 2"                        # changes when the same index would show something else
ANSWERS = ("color", "count", "background", "shape", "size", "side", "level")


class Shapes:
    """Endless captioned pictures of shapes. The label is the shape of the largest object.

    resolution  R
    split       train, test (other scenes, same law) or held_out (the largest object is one of HELD_OUT)
    objects     how many objects a scene may have, of 1, 2 and 3
    native      draw at a side from NATIVE, likelier coarse for the first classes; off: at the finest
    crop        cut the crop out of the canvas anywhere, objects or not; off: at (0, 0), which cuts nothing
    side        range of the share of the picture's side that a crop shows; with crop off all of it, always
    flip        mirror every other picture but not its caption; off: never
    scenes      free, any place and size; grid, places eighths of the side apart and two sizes, which a small network
                learns sooner; sides, likewise, of two objects beside each other whose caption says which is left"""
    channels, encoder, bad = 3, None, {}
    classes = list(SHAPES)
    describe = staticmethod(describe)

    def __init__(self, resolution: int = 32, seed: int = 0, split: str = "train",
                 objects: tuple[int, ...] = (1, 2, 3), native: bool = True, crop: bool = True,
                 flip: bool = True, side: tuple[float, float] = (1.0, 1.0), scenes: str = "free"):
        if scenes not in SCENES:
            raise UserError(f"unknown scenes={scenes!r}; there are {', '.join(SCENES)}")
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r} of shapes; it has: {', '.join(SPLITS)}")
        if not objects or not set(objects) <= {1, 2, 3}:
            raise UserError(f"objects wants numbers of 1, 2 and 3, got {objects!r}")
        if resolution < 8:
            raise UserError(f"shapes want a resolution of at least 8, got {resolution}")
        if not 0 < side[0] <= side[1] <= 1:
            raise UserError(f"side wants a range in (0, 1], got {side!r}")
        self.resolution, self.split, self.scenes = resolution, split, scenes
        self.objects = (2,) if scenes == "sides" else tuple(objects)
        self.native, self.crop, self.flip = native, crop, flip
        self.side = (float(side[0]), float(side[1])) if crop else (1.0, 1.0)
        self.controls = tuple(c for c, on in (("size", native), ("crop", crop), ("flip", flip)) if on)
        self.scene_key, self.view_key = seed64("scene", seed, split), seed64("view", seed, split)
        parts = (VERSION, resolution, seed, split, self.objects, native, crop, flip)
        parts += self.side if self.side != (1, 1) else ()   # what is the same as without it has the same fingerprint
        parts += (scenes,) if scenes != "free" else ()
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return 2 ** 31

    def records(self, indices: Sequence[int], epochs: Sequence[int] | int = 0) -> dict:
        """The batch of these samples; scene holds the truth, seen in the picture as cropped and flipped.

        scene: n, main, background (B,); shape, color, x, y, r (B, 3), -1 where no object is; relation (B, 2),
        places in RELATIONS of object k seen from k + 1, before flipping."""
        index = np.asarray(indices, np.int64).reshape(-1)
        epoch = np.broadcast_to(np.asarray(epochs, np.int64), index.shape)
        u, scene = self.drawn(index)
        if not self.native:
            scene["native"][:] = len(NATIVE) - 1

        R, (low, high) = self.resolution, self.side
        v = uniform(self.view_key, index * len(self) + epoch, 4)
        S = np.rint(canvas(R) / (low + (high - low) * v[:, 3])).astype(int)
        top, left = (v[:, :2] * (S - R + 1)[:, None] * self.crop).astype(int).T
        flip = (v[:, 2] < 0.5) & self.flip
        image = render(scene, S, top, left, flip, R)
        captions = [caption(scene, b, u[b]) for b in range(len(index))]
        label = scene["shape"][np.arange(len(index)), scene["main"]]
        size = np.array(NATIVE, np.float32)[scene["native"]]
        return dict(
            image=torch.from_numpy(image), caption=captions, label=torch.from_numpy(label),
            size=torch.from_numpy(size)[:, None].repeat(1, 2),
            crop=torch.from_numpy(np.stack([top, left], 1).astype(np.float32)),
            flip=torch.from_numpy(flip.astype(np.float32)), index=torch.from_numpy(index),
            scene={k: torch.from_numpy(v) for k, v in seen(scene, S, top, left, flip, R).items()})

    def drawn(self, index: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The random numbers (B, DRAWS) of these scenes, and the scenes as draw_scene gives them."""
        u = uniform(self.scene_key, index, DRAWS)
        if self.scenes == "sides":
            u[:, PAIR], u[:, SAID] = 1, 0                   # beside each other, and the caption says how
        return u, draw_scene(u, self.objects, self.split == "held_out", self.scenes != "free")

    def record(self, index: int, epoch: int = 0) -> dict:
        """One sample: the only row of `records([index], epoch)`."""
        batch = self.records([index], epoch)
        scene = {key: value[0] for key, value in batch.pop("scene").items()}
        return {**{key: value[0] for key, value in batch.items()}, "scene": scene}


def seen(scene: dict[str, np.ndarray], S: np.ndarray, top: np.ndarray, left: np.ndarray, flip: np.ndarray,
         R: int) -> dict:
    """The scene in shares of the crop's side: enlarged and moved by the crop, mirrored by the flip."""
    there, finer = scene["shape"] >= 0, S[:, None] / canvas(R)
    x, y, r = (scene[name] * finer for name in "xyr")                                      # (B, 3)
    x, y = x - left[:, None] / R, y - top[:, None] / R
    x = np.where(flip[:, None], 1 - x, x)
    return dict(scene, **{name: np.where(there, value, -1) for name, value in (("x", x), ("y", y), ("r", r))})


# ---------------------------------------------------------------- scoring

@lru_cache(maxsize=None)
def moments() -> tuple[np.ndarray, np.ndarray]:
    """Area and height of the centroid (shapes,) of every shape at radius 1."""
    at = (np.arange(-440, 440) + 0.5) / 400
    inside = np.stack([sdf(s, at[None], at[:, None]) < 0 for s in SHAPES])                # (shapes, 880, 880)
    area = inside.sum((1, 2))
    return area / 400 ** 2, (inside * at[:, None]).sum((1, 2)) / area


def unmix(images: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures (B, 3, R, R) to background (B,), owner and share (B, R, R): what was mixed where.

    pixel = (1 - share) BACKGROUNDS[background] + share COLORS[owner]. The background is the one nearest to
    most pixels; the owner of a pixel is the colour whose mixtures with the background come closest to it."""
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
    owner = (share * share * power - 2 * share * along).argmin(2)                    # least squared remainder
    share = np.take_along_axis(share, owner[..., None], 2)
    form = (len(images), *images.shape[2:])
    return back, owner.reshape(form), share.reshape(form)


def count(owner: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Number (B,) of patches of one colour that are large enough to be an object."""
    B, R, _ = owner.shape
    ink = share > 0.5
    patch = np.where(ink, np.arange(1, R * R + 1).reshape(R, R), 0)
    down = ink[:, 1:] & ink[:, :-1] & (owner[:, 1:] == owner[:, :-1])
    right = ink[:, :, 1:] & ink[:, :, :-1] & (owner[:, :, 1:] == owner[:, :, :-1])
    joined = ((patch[:, 1:], patch[:, :-1], down), (patch[:, :, 1:], patch[:, :, :-1], right))
    while True:                                             # the largest number of a patch floods it
        before = patch.copy()
        for one, two, same in joined:
            np.copyto(one, np.maximum(one, two), where=same)
            np.copyto(two, np.maximum(one, two), where=same)
        if (patch == before).all():
            break
    size = np.bincount((patch + np.arange(B)[:, None, None] * (R * R + 1)).ravel(), minlength=B * (R * R + 1))
    return (size.reshape(B, -1)[:, 1:] >= least(R)).sum(1)


def around(ink: np.ndarray, pixels: int) -> np.ndarray:
    """1 where a mask (K, R, R) is set within so many pixels, else 0."""
    wide = torch.from_numpy(ink).float()[:, None]
    return torch.nn.functional.max_pool2d(wide, 2 * pixels + 1, 1, pixels)[:, 0].numpy()


def least(R: int) -> float:
    """Pixels that make an object: 0.4 of the smallest whole one."""
    return 0.4 * moments()[0].min() * (RADIUS[0] * R) ** 2


def fit(mask: np.ndarray) -> np.ndarray:
    """The shape (K,) whose drawing, with the area and centroid of a mask (K, R, R), overlaps it best.

    Its edge is a twentieth of the picture wide, between the sharpest and the most blurred originals."""
    (area, low), edge = moments(), max(1, mask.shape[1] / 20)
    at = np.arange(mask.shape[1], dtype=np.float32) + 0.5
    total = np.maximum(mask.sum((1, 2)), 1e-6)
    cx, cy = (mask.sum(1) @ at) / total, (mask.sum(2) @ at) / total
    overlap = np.empty((len(mask), len(SHAPES)))
    for s, name in enumerate(SHAPES):
        r = np.sqrt(total / np.float32(area[s]))[:, None]
        x = (at - cx[:, None]) / r
        y = (at - cy[:, None]) / r + np.float32(low[s])
        drawn = np.clip(0.5 - r[..., None] * sdf(name, x[:, None], y[..., None]) / edge, 0, 1)
        overlap[:, s] = np.minimum(mask, drawn).sum((1, 2)) / np.maximum(mask, drawn).sum((1, 2))
    return overlap.argmax(1)


def score(images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Is each picture (B, 3, R, R), in [-1, 1], what its caption says? By pixel arithmetic, no network.

    Answers (B,) float32, 1 yes, 0 no, NaN where the caption does not ask:
    color       the colours that are named are there, and no other is
    count       as many objects as the caption has
    background  the one that is named
    shape       every object found by its colour has the stated shape, of all eight
    size        every object found by its colour has the stated size, of the two
    side        left of and right of hold between the centroids of two objects that were found
    level       above and below, likewise; a mirrored picture is wrong on side and right on level
    all         all of these that were asked
    An object that shares its colour with another is judged for colour and count only. UserError for a caption
    that is not of the grammar."""
    facts = [describe(text) for text in captions]
    back, owner, share = unmix(images)
    R, wanted = images.shape[-1], {name: np.full(len(facts), np.nan) for name in ANSWERS}

    def answer(name, rows, right):
        rows, right = np.asarray(rows, int), np.asarray(right, float)
        np.fmin.at(wanted[name], rows, right)

    answer("count", range(len(facts)), count(owner, share) == [len(f.shapes) for f in facts])
    named = [b for b, f in enumerate(facts) if f.background]
    answer("background", named, [list(BACKGROUNDS)[back[b]] == facts[b].background for b in named])

    row = np.array([b for b, f in enumerate(facts) for _ in f.shapes], int)
    after = [link for f in facts for link in (*f.relations, None)]          # to the object after it
    color = np.array([list(COLORS).index(name) for f in facts for name in f.colors], int)   # (K,)
    shape = np.array([SHAPES.index(name) for f in facts for name in f.shapes], int)
    size = [name for f in facts for name in f.sizes]
    alone = np.array([f.colors.count(name) == 1 for f in facts for name in f.colors], bool)
    mask = np.where((owner[row] == color[:, None, None]) & (share[row] > 0.15), share[row], 0)
    mask = mask * around(mask > 0.5, R // 16)                                               # (K, R, R)
    found = (mask > 0.5).sum((1, 2)) >= least(R)
    answer("color", row, found)
    area = np.stack([((owner == c) & (share > 0.5)).sum((1, 2)) for c in range(len(COLORS))], axis=1)
    unasked = np.array([[name not in f.colors for name in COLORS] for f in facts])          # (B, colours)
    answer("color", range(len(facts)), ~((area >= least(R)) & unasked).any(1))

    judged = np.flatnonzero(found & alone)
    seen_as = fit(mask[judged])
    answer("shape", row[judged], seen_as == shape[judged])
    large = mask[judged].sum((1, 2)) > moments()[0][seen_as] * ((SMALL + LARGE) / 2 * R) ** 2
    sized = [k for k, j in enumerate(judged) if size[j]]
    answer("size", row[judged[sized]], [large[k] == (size[judged[k]] == "large") for k in sized])

    at, total = np.arange(R), np.maximum(mask.sum((1, 2)), 1e-6)
    x, y = mask.sum(1) @ at / total, mask.sum(2) @ at / total                               # (K,)
    ahead = dict(zip(RELATIONS, (x[:-1] < x[1:], x[:-1] > x[1:], y[:-1] < y[1:], y[:-1] > y[1:])))
    both = [k for k, next_one in zip(judged, judged[1:]) if next_one == k + 1 and after[k]]
    for name, kinds in (("side", RELATIONS[:2]), ("level", RELATIONS[2:])):
        pairs = [k for k in both if after[k] in kinds]
        answer(name, row[pairs], [ahead[after[k]][k] for k in pairs])
    wanted["all"] = np.fmin.reduce(list(wanted.values()))
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in wanted.items()}


def sharpness(images: Tensor) -> Tensor:
    """(B,) one over the width in pixels of the edges between objects and background; rises with native size.

    Except where the native size is the canvas itself: then nothing is resampled and edges are sharpest."""
    share = torch.from_numpy(unmix(images)[2])
    step = torch.cat([share.diff(dim=1).flatten(1), share.diff(dim=2).flatten(1)], dim=1)
    return step.square().sum(1) / step.abs().sum(1).clamp(min=1e-6)


def cut(images: Tensor) -> Tensor:
    """(B,) bool: does an object reach the border of the picture?"""
    share = unmix(images)[2] > 0.6
    border = np.concatenate([share[:, 0], share[:, -1], share[:, :, 0], share[:, :, -1]], axis=1)
    return torch.from_numpy(border.sum(1) >= 2)


# ---------------------------------------------------------------- a sheet to look at

@dataclass(frozen=True)
class Sheet:
    """Which samples to draw, and where to."""
    out: str = "out/shapes.png"     # the picture to write
    count: int = 24                 # samples on it
    resolution: int = 32            # side of a sample in pixels
    seed: int = 0                   # of the data set
    split: str = "train"            # train, test or held_out
    plain: bool = False             # whole, sharp and unmirrored samples only
    scenes: str = "free"            # free, grid or sides


def main() -> None:
    """Draw a sheet of samples, each above its caption and its controls."""
    o = parse(sys.argv[1:], Sheet())
    source = Shapes(o.resolution, o.seed, o.split, native=not o.plain, crop=not o.plain, flip=not o.plain,
                    scenes=o.scenes)
    batch, side, across = source.records(range(o.count)), 192, 6
    pixels = ((batch["image"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    sheet = Image.new("RGB", (across * (side + 8), -(-o.count // across) * (side + 56)), "white")
    pen = ImageDraw.Draw(sheet)

    for k in range(o.count):
        at = (k % across * (side + 8) + 4, k // across * (side + 56) + 4)
        sheet.paste(Image.fromarray(pixels[k]).resize((side, side), Image.Resampling.NEAREST), at)
        top, left = batch["crop"][k].int().tolist()
        control = f"size {batch['size'][k, 0]:.0f}, crop {top} {left}, flip {batch['flip'][k]:.0f}"
        lines = textwrap.wrap(batch["caption"][k], 31) + [control]
        pen.multiline_text((at[0], at[1] + side + 1), "\n".join(lines), fill="black", spacing=1)

    Path(o.out).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(o.out)
    right = score(batch["image"], batch["caption"])
    print(f"{o.out}: " + ", ".join(f"{name} {value.nanmean():.2f}" for name, value in right.items()))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
