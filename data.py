"""Images with their metadata, and which of them a training step sees.

    python data.py --check PATH     decode a folder: what it holds, what is broken, what the network will see

A source has len() and `records(indices, epochs) -> Batch` or `record(index, epoch) -> Record`, one row of it.
A Batch is a dict; label and caption are in it if the source has them, text and lengths with an encoder:
    image (B, C, R, R) float32 in [-1, 1]        label, index (B,) int64        caption list[str]
    size (B, 2) float32: height, width of the original in pixels
    crop (B, 2) float32: top, left in pixels of the original scaled like the crop, before mirroring
    flip (B,) float32: 1 where the image is mirrored
    text (B, L, E) float32: tokens of the caption, of which the first lengths (B,) int64 count
A source has `classes` (names; [] if none), `channels`, `controls` (those of size, crop, flip that vary) and
`fingerprint` (sha256 of what decides its content). Sample and augmentation are pure functions of (seed, step,
position in the global batch): no order is stored and no random state exists.

Dimensions: B batch, C channels, R resolution, H height, W width, L text tokens, E width of a text token.
"""
import hashlib
import math
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from config import Config, UserError, parse, seed64
from pictures import BadImage, grid, open_image
from shapes import Shapes, WordVectors

Record, Batch = dict[str, Any], dict[str, Any]
Source, TextEncoder = Any, Any          # contracts, stated above and at text_encoder

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
ATTEMPTS = 20                           # to replace one unreadable image
CROPS = {"global": (0.9, 1.0), "local": (0.4, 0.6), "mix": (0.4, 1.0)}  # [COND] 1.9: sides, over the short one


# ---------------------------------------------------------------- which sample a step sees

def positions(step: int, m: int, batch: int, micro: int) -> np.ndarray:
    """Positions (micro,) of microbatch `m` of `step` in the endless stream of samples."""
    return step * batch + m * micro + np.arange(micro, dtype=np.int64)


def index_and_epoch(positions: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample index and epoch, int64, at each position. Epoch e permutes range(n) by a key from (seed, e)."""
    epoch, offset = np.divmod(positions, n)
    epochs, which = np.unique(epoch, return_inverse=True)
    keys = np.array([seed64(seed, "order", int(e)) for e in epochs], dtype=np.uint64)
    return permute(offset, n, keys[which]), epoch


def permute(x: np.ndarray, n: int, key: np.ndarray, rounds: int = 8) -> np.ndarray:
    """Where the permutation of range(n) named by `key` (uint64, shape of x) sends each x. n <= 2**31.

    A Feistel network on 2h bits permutes range(4**h) whatever its rounds do; results >= n go in again."""
    h = np.uint64(max(1, math.ceil((n - 1).bit_length() / 2)))
    low = np.uint64((1 << int(h)) - 1)
    x, todo = x.astype(np.uint64), np.ones(x.shape, dtype=bool)
    while todo.any():
        left, right, k = x[todo] >> h, x[todo] & low, key[todo]
        for r in range(rounds):
            left, right = right, left ^ (_mix(right + _mix(k + np.uint64(r))) & low)
        x[todo] = left << h | right
        todo = x >= n
    return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 on a uint64 array: every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


# ---------------------------------------------------------------- sources

class ImageFolder:
    """A folder of class folders with JPEG, PNG and WebP files at any depth; classes are in sorted order.

    crop        random: a square anywhere, its side uniform in `side` times the short side; center: the largest
    flip        mirror half of them
    classes     off: no labels, and no class folders needed
    max_bad     unreadable files are listed in `bad` and replaced; UserError beyond max(1, max_bad * files);
                0 lets none through"""
    channels = 3

    def __init__(self, path: str | Path, resolution: int, seed: int = 0, flip: bool = True,
                 max_bad: float = 0.01, crop: str = "random", side: tuple[float, float] = CROPS["global"],
                 classes: bool = True):
        if crop not in ("random", "center"):
            raise UserError(f"crop wants random or center, got {crop!r}")
        self.path, self.resolution, self.seed, self.flip = Path(path).expanduser(), resolution, seed, flip
        self.max_bad, self.random = max_bad, crop == "random"
        self.side = side if self.random else (1.0, 1.0)
        self.controls = ("size", "crop", "flip") if flip else ("size", "crop")

        found, bad = find_images(self.path)
        files = [(name, size) for name, size in found if "/" in name or not classes]
        if not files:
            raise UserError(f"{str(path)!r} has no class folder: its {len(found)} images belong in folders "
                            f"named after their classes, {path}/CLASS/; or --model.semantics=none")
        if len(files) < len(found):
            tqdm.write(f"warning: {len(found) - len(files)} images of {path} are in no class", sys.stderr)

        self.names = [name for name, _ in files]
        names, labels = np.unique([name.split("/")[0] for name in self.names], return_inverse=True)
        self.classes, self.labels = (names.tolist(), labels.tolist()) if classes else ([], [])
        self.fingerprint = hashlib.sha256(ascii((files, self.classes)).encode()).hexdigest()

        self.bad, self.files, self.lock = {}, len(files) + len(bad), threading.Lock()
        for name, reason in bad.items():
            self.note_bad(name, reason)

    def __len__(self) -> int:
        return len(self.names)

    def record(self, index: int, epoch: int) -> Record:
        """One Record; for an unreadable file that of another, drawn by (seed, index, epoch, attempt)."""
        use = index
        for attempt in range(ATTEMPTS):
            try:
                return self.render(use, epoch)
            except BadImage as e:
                self.note_bad(self.names[use], str(e))
            use = seed64(self.seed, "replace", index, epoch, attempt) % len(self)
        raise UserError(f"{ATTEMPTS} images of {self.path} in a row are unreadable, see data.py --check")

    def render(self, index: int, epoch: int) -> Record:
        """One Record, its augmentation drawn by (seed, index, epoch). BadImage for an unreadable file."""
        R, (low, high) = self.resolution, self.side
        picture, (h, w) = open_image(self.path / self.names[index], short=2 * R / low)
        rng = np.random.Generator(np.random.Philox(seed64(self.seed, "aug", index, epoch)))
        u = rng.random(4) if self.random else (0, 0.5, 0.5, rng.random(4)[3])
        a = max(1, round(min(h, w) * (low + (high - low) * u[0])))
        top, left = int(u[1] * (h - a + 1)), int(u[2] * (w - a + 1))
        mirrored = self.flip and u[3] < 0.5

        fy, fx = picture.height / h, picture.width / w          # below 1 where the decoder shrank the picture
        box = (left * fx, top * fy, (left + a) * fx, (top + a) * fy)
        picture = picture.resize((R, R), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)                   # (C, R, R)
        pixels = np.ascontiguousarray(pixels[:, :, ::-1] if mirrored else pixels)
        record = dict(image=torch.from_numpy(pixels / np.float32(127.5) - np.float32(1)), size=(h, w),
                      crop=(top * R / a, left * R / a), flip=float(mirrored), index=index)
        return record | ({"label": self.labels[index]} if self.classes else {})

    def note_bad(self, name: str, reason: str) -> None:
        """Counts an unusable file and names it, once; UserError if there are now more than max_bad allows."""
        with self.lock:
            if name not in self.bad:
                tqdm.write(f"warning: {name!r} is passed over: {reason}", sys.stderr)
            self.bad[name] = reason
            allowed = max(1, int(self.max_bad * self.files)) if self.max_bad > 0 else 0
            if len(self.bad) > allowed:
                some = ", ".join(f"{n!r} ({why})" for n, why in list(self.bad.items())[:3])
                raise UserError(f"{len(self.bad)} of {self.files} images of {str(self.path)!r} cannot be "
                                f"read, e.g. {some}; mend or remove them, or raise --max_bad={self.max_bad}")


def find_images(root: Path) -> tuple[list[tuple[str, int]], dict[str, str]]:
    """Sorted (relative name, bytes) of the images below `root`, and {name: reason} of files without content.

    Hidden and irregular files are passed over; a folder that links lead to twice counts once."""
    def refuse(e):
        raise UserError(f"cannot read folder {e.filename!r}: {e.strerror}")

    if not root.is_dir():
        raise UserError(f"no folder {str(root)!r} (looked at {root.absolute()}); data is shapes or a folder")
    found, seen = [], set()
    for folder, below, files in os.walk(root, onerror=refuse, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if (here := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(here)
        for path in (Path(folder, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES and (path.is_file() or not path.exists()):
                size = path.stat().st_size if path.exists() else 0
                found.append((path.relative_to(root).as_posix(), size))
    bad = {name: "empty file or link to nothing" for name, size in found if size == 0}
    found = sorted((name, size) for name, size in found if size)
    if not found:
        raise UserError(f"no images in {str(root)!r}, {len(bad)} empty files; looked for {' '.join(SUFFIXES)}"
                        f" in {root.absolute()} and all folders below")
    return found, bad


def open_source(cfg: Config, split: str = "train") -> Source:
    """The source of `cfg.data`; UserError where it lacks what the model needs. Only shapes have splits.

    A global crop of shapes is as wide as the picture and moves over a wider canvas, so that it cuts objects too."""
    want, folder, varied = cfg.model, Path(cfg.data).expanduser(), cfg.augment.split("+")
    if unknown := [a for a in varied if a not in ("", "crop", "flip", "size")]:
        raise UserError(f"augment={cfg.augment!r} names {unknown[0]!r}; there are crop, flip, size")
    if cfg.crop not in CROPS:
        raise UserError(f"unknown crop={cfg.crop!r}; there are {', '.join(CROPS)}")
    if cfg.data == "shapes":
        vary = [name in varied for name in ("size", "crop", "flip")]
        side = (1.0, 1.0) if cfg.crop == "global" else CROPS[cfg.crop]
        source = Shapes(want.resolution, cfg.seed, split, tuple(range(1, cfg.objects + 1)), *vary, side)
    elif want.semantics == "text" and folder.is_dir():
        raise UserError(f"folder {cfg.data!r} has no captions for model.semantics=text; use class or none")
    else:
        crop = "random" if "crop" in varied else "center"
        source = ImageFolder(folder, want.resolution, cfg.seed, "flip" in varied, cfg.max_bad, crop,
                             CROPS[cfg.crop], want.semantics == "class")

    if want.channels != source.channels:
        raise UserError(f"--model.channels={want.channels}, but {cfg.data!r} has images of {source.channels}")
    if lacking := [c for c in want.controls.split("+") if c and c not in source.controls]:
        enough = "+".join(c for c in ("crop", "flip", "size") if c in varied or c in lacking)
        raise UserError(f"model.controls={want.controls!r}, but {cfg.data!r} does not vary {' and '.join(lacking)} "
                        f"with augment={cfg.augment!r}; it would with --augment={enough}")
    return source


def text_encoder(cfg: Config) -> TextEncoder | None:
    """Has `dim` E, `length` L and `encode(captions) -> (tokens, lengths)`; None for a model without text.

    UserError for an encoder that there is not, and for a length that it cannot have."""
    kind, colon, path = cfg.encoder.partition(":")
    if (kind, bool(colon), bool(path)) not in (("words", False, False), ("clip", True, True)):
        raise UserError(f"unknown encoder={cfg.encoder!r}; there are words and clip:PATH, where PATH is an open_clip "
                        "model folder or hub name")
    if cfg.model.semantics != "text":
        return None
    length = cfg.model.text_length
    if kind == "words":
        return WordVectors(length) if length else WordVectors()
    if length not in (0, 77):
        raise UserError(f"model.text_length={length}, but encoder={cfg.encoder!r} has 77 tokens; leave it at 0")
    from text import CLIPText
    return CLIPText(path)


# ---------------------------------------------------------------- batches

def records(source: Source, indices: Sequence[int], epochs: Sequence[int]) -> Batch:
    """The Batch of these samples in these epochs, of any source."""
    if hasattr(source, "records"):
        return source.records(indices, epochs)
    return collate([source.record(int(i), int(e)) for i, e in zip(indices, epochs)])


def collate(rows: list[Record]) -> Batch:
    """The Batch with these rows."""
    column = {key: [row[key] for row in rows] for key in rows[0]}
    kinds = {"label": np.int64, "index": np.int64, "size": np.float32, "crop": np.float32, "flip": np.float32}
    batch = {key: torch.from_numpy(np.array(column[key], kinds[key])) for key in kinds if key in column}
    batch["image"] = torch.from_numpy(np.stack([image.numpy() for image in column["image"]]))   # (B, C, R, R)
    return batch | ({"caption": column["caption"]} if "caption" in column else {})


def fetch(source: Source, encoder: Any, seed: int, batch: int, micro: int, step: int, m: int) -> Batch:
    """Microbatch `m` of `step`; text and lengths are in it if there are captions and an encoder."""
    out = records(source, *index_and_epoch(positions(step, m, batch, micro), len(source), seed))
    if encoder is not None and "caption" in out:
        out["text"], out["lengths"] = encoder.encode(out["caption"])
    return out


def prefetch(fetch_fn: Callable, keys: Iterable[tuple], workers: int, depth: int = 2) -> Iterator[Any]:
    """fetch_fn(*key) of every key, in order; `workers` threads are up to workers * depth ahead, 0 = none.

    An exception is raised at its key. Closing the generator cancels what has not begun, leaves no thread."""
    if workers == 0:
        yield from (fetch_fn(*key) for key in keys)
        return
    pool, ahead = ThreadPoolExecutor(workers, thread_name_prefix="prefetch"), deque()
    try:
        for key in keys:
            ahead.append(pool.submit(fetch_fn, *key))
            if len(ahead) > workers * depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ---------------------------------------------------------------- looking

def titles(batch: Batch, classes: Sequence[str] = ()) -> list[str]:
    """What each image is of: its caption, or its class by name or number, or nothing."""
    labels = [classes[k] if classes else f"class {k}" for k in batch.get("label", torch.tensor([])).tolist()]
    return batch.get("caption") or labels or [""] * len(batch["image"])


@dataclass(frozen=True)
class Options:
    """What to check."""
    check: str = "."            # folder of class folders or of images
    resolution: int = 64        # R, side of the squares that the network will see


def check(root: Path, R: int) -> None:
    """Decodes all files, prints classes, sizes and what is broken, draws 16 records with their controls."""
    nested = root.is_dir() and any(child.is_dir() for child in root.iterdir())
    source = ImageFolder(root, R, max_bad=1.0, classes=nested)

    def short_side(i):
        try:
            return min(source.render(i, 0)["size"])
        except BadImage as e:
            source.note_bad(source.names[i], str(e))

    every = prefetch(short_side, ((i,) for i in range(len(source))), workers=os.cpu_count() or 1)
    sides = [side for side in tqdm(every, total=len(source), desc="decoding", unit="image") if side] or [0]
    for label, count in sorted(Counter(source.labels).items()):
        print(f"{count:>9,}  {source.classes[label]}")
    print(f"{len(source):,} images, {len(source.bad)} broken; short side {min(sides)} to {max(sides)} "
          f"pixels, {sum(side < R for side in sides):,} of them below {R}")

    shown = fetch(source, None, 0, 16, 16, 0, 0)
    controls = zip(titles(shown, source.classes), *(shown[key].tolist() for key in ("size", "crop", "flip")))
    texts = [f"{name}\nsize {h:.0f}, {w:.0f}\ncrop {top:.1f}, {left:.1f}\nflip {flip:.0f}"
             for name, (h, w), (top, left), flip in controls]
    grid(shown["image"], 8, texts).save("check.png")
    print("16 of them are in check.png")


if __name__ == "__main__":
    try:
        options = parse(sys.argv[1:], Options())
        check(Path(options.check).expanduser(), options.resolution)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
