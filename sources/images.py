"""Image files and captions as training samples: decode, clean, crop, and replace what is unusable.

image, (h, w) = open_image("cat.jpg")       upright RGB
pick_caption(["a cat", "a tabby"], 7)       one caption of a list, cleaned

Dimensions: C channels, R resolution, H height, W width.
"""
import json
import math
import posixpath
import sys
import threading
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from config import Config, UserError
from rng import seed64
from runtime.plot import from_uint8

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS, MIN_SIDE = 64_000_000, 8
ORIENTATION = 0x0112                    # EXIF tag
MAX_CHARACTERS = 2000                   # of a caption; a text tower reads about 400
ATTEMPTS = 20                           # to replace one unusable sample
MAX_WARNINGS = 20                       # unusable samples that get a warning
CROPS = {"global": (0.9, 1.0), "local": (0.4, 0.6), "mix": (0.4, 1.0)}  # [COND] sec. 2.2: sides, over the short one


class BadSample(ValueError):
    """An unusable image or caption; the message says why."""


def open_image(file: Any, short: float = 0) -> tuple[Image.Image, tuple[int, int]]:
    """Return the upright RGB image in a file (path or binary stream), and its original (height, width) in pixels.

    Decodes a JPEG with a short side of 2, 4 or 8 times `short` that much smaller. Raises BadSample only."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            w, h = image.size
            if w * h > MAX_PIXELS or min(w, h) < MIN_SIDE:
                raise BadSample(f"{w} x {h} pixels; sides start at {MIN_SIDE}, areas end at {MAX_PIXELS:,}")
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:     # MPO: a JPEG with previews
                raise BadSample(f"animated, {image.n_frames} frames")
            if short:
                image.draft(None, (math.ceil(w * short / min(w, h)), math.ceil(h * short / min(w, h))))
            h, w = (w, h) if image.getexif().get(ORIENTATION) in (5, 6, 7, 8) else (h, w)
            return to_rgb(image), (h, w)
    except (BadSample, MemoryError):
        raise
    except UnidentifiedImageError as e:
        raise BadSample("not a JPEG, PNG or WebP image") from e
    except Exception as e:                              # damaged bytes raise nearly every type
        raise BadSample(f"{type(e).__name__}: {e}") from e


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image to upright RGB: upper 8 bits of 16-bit grey, alpha over white, EXIF rotation undone."""
    turn = image.getexif().get(ORIENTATION)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info.clear()                                  # exif_transpose writes EXIF anew, and fails on damaged tags
    image.getexif()[ORIENTATION] = turn
    ImageOps.exif_transpose(image, in_place=True)
    return image


def decode_utf8(content: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark. Raises BadSample for any other encoding."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadSample(f"not UTF-8: {e.reason} at byte {e.start}") from e


def clean_caption(text: str) -> str:
    """Return one line: composed characters (NFC), no control characters, single blanks, at most MAX_CHARACTERS."""
    text = " ".join(text[:8 * MAX_CHARACTERS].split())
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs"))         # Cs: half a character
    return " ".join(unicodedata.normalize("NFC", text).split())[:MAX_CHARACTERS].rstrip()


def pick_caption(value: Any, draw: int) -> str:
    """Clean a caption, or number `draw` (any whole number) of a list. Raises BadSample for other types."""
    if isinstance(value, list) and value:
        value = value[draw % len(value)]
    if not isinstance(value, str):
        raise BadSample(f"a caption is text or a list of texts, got {type(value).__name__}")
    return clean_caption(value)


def parse_object(content: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises BadSample for anything else."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise BadSample(f"not JSON: {type(e).__name__}: {e}") from e
    if not isinstance(found, dict):
        raise BadSample(f"not a JSON object but {type(found).__name__}")
    return found


def parse_metadata(content: bytes, folder: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """Return {file_name: text} of a metadata.jsonl in `folder`, and {"line 3": reason} of unusable lines.

    The names get the path of the folder; those that leave the folder of the source are unusable."""
    texts, bad = {}, {}
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip(b" \t\r\xef\xbb\xbf"):             # no more than a byte order mark
            continue
        try:
            row = parse_object(line)
            if not isinstance(row.get("file_name"), str) or "text" not in row:
                raise BadSample("lacks file_name or text")
            name = posixpath.normpath(posixpath.join(folder, row["file_name"]))
            if name in texts or name.startswith(("/", "..")):
                raise BadSample(f"{name!r} is outside or named a second time")
            texts[name] = row["text"]
        except BadSample as e:
            bad[f"line {number}"] = str(e)
    return texts, bad


class ImageSource(ABC):
    """A source of image files, cropped and mirrored at random. A subclass adds `scan` and `load`.

    flip        mirror half of the images
    max_bad     list unusable samples in `bad` and replace them by others; more than max(1, max_bad * files) raise
                UserError, and with 0 the first does
    side        range of the crop's side over the short side; None: the largest square in the centre
    annotated   off: records have neither label nor caption"""
    channels = 3
    can_have_classes = False            # whether --model.semantics=class may be possible
    classes: list[str] = []             # their names; [] without classes
    labels: Sequence[int] = ()          # the class of each sample
    encoder = None                      # captions are text: no tokens are stored
    names: Sequence[str]                # of usable samples
    files: int                          # number of samples, usable or not
    fingerprint: str                    # sha256 of what decides the content

    def __init__(self, path: str | Path, resolution: int, seed: int = 0, flip: bool = True, max_bad: float = 0.01,
                 side: tuple[float, float] | None = CROPS["global"], annotated: bool = True):
        self.path, self.resolution, self.seed, self.flip = Path(path).expanduser(), resolution, seed, flip
        self.max_bad, self.annotated, self.random, self.side = max_bad, annotated, bool(side), side or (1.0, 1.0)
        self.controls = ("size", "crop", "flip") if flip else ("size", "crop")
        self.bad: dict[str, str] = {}
        self.skipped: Any = None                                # optional log of unusable files, log.SkippedFiles
        self.lock = threading.Lock()
        for name, reason in self.scan():
            self.mark_bad(name, reason)

    @classmethod
    def open(cls, cfg: Config, split: str = "train") -> "ImageSource":
        """Open `cfg.data`, augmented as the config says. Files have no splits."""
        varied = cfg.augment.split("+")
        return cls(cfg.data, cfg.model.resolution, cfg.seed, "flip" in varied, cfg.max_bad_fraction,
                   CROPS[cfg.crop] if "crop" in varied else None, cfg.model.semantics != "none")

    @abstractmethod
    def scan(self) -> Iterable[tuple[str, str]]:
        """Find the samples, set `names`, `files` and `fingerprint`, and return (name, reason) of unusable ones."""

    @abstractmethod
    def load(self, index: int, epoch: int) -> tuple[Any, dict[str, Any]]:
        """Return the image, as a path or a binary stream, and what else is known: label, caption, original size.

        Raises BadSample for an unusable sample."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return what messages call a sample: its path below the folder."""
        return self.names[index]

    def record(self, index: int, epoch: int) -> dict[str, Any]:
        """Return one Record. (seed, index, epoch, attempt) chooses another sample for an unusable one."""
        use = index
        for attempt in range(ATTEMPTS):
            try:
                return self.load_record(use, epoch)
            except BadSample as e:
                self.mark_bad(self.name(use), str(e))
            use = seed64(self.seed, "replace", index, epoch, attempt) % len(self)
        raise UserError(f"{ATTEMPTS} images of {self.path} in a row are unreadable, see data.py --check")

    def load_record(self, index: int, epoch: int) -> dict[str, Any]:
        """Return one Record, augmented by (seed, index, epoch). Raises BadSample."""
        R, (low, high) = self.resolution, self.side
        try:
            file, known = self.load(index, epoch)
        except OSError as e:
            raise BadSample(f"{type(e).__name__}: {e}") from e
        image, (h, w) = open_image(file, short=2 * R / low)
        u = np.random.Generator(np.random.Philox(seed64(self.seed, "aug", index, epoch))).random(4)
        u = u if self.random else (0, 0.5, 0.5, u[3])
        a = max(1, round(min(h, w) * (low + (high - low) * u[0])))
        top, left = int(u[1] * (h - a + 1)), int(u[2] * (w - a + 1))
        mirrored = self.flip and u[3] < 0.5

        fy, fx = image.height / h, image.width / w              # below 1 where the decoder shrank the image
        box = (left * fx, top * fy, (left + a) * fx, (top + a) * fy)
        image = image.resize((R, R), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        pixels = np.asarray(image).transpose(2, 0, 1)[:, :, ::-1 if mirrored else 1].copy()     # (C, R, R)
        record = dict(image=from_uint8(pixels), size=(h, w), crop=(top * R / a, left * R / a), flip=float(mirrored),
                      index=index)
        if "size" in known:                                     # of an original that is not turned upright
            H, W = known["size"]
            known["size"] = (W, H) if h != w and (h > w) != (H > W) else (H, W)
        return record | known

    def mark_bad(self, name: str, reason: str) -> None:
        """Add an unusable sample to `bad`, with a warning. Raises UserError beyond max_bad."""
        with self.lock:
            listed = f"; all are in {self.skipped.path}" if self.skipped else ""
            if name not in self.bad and len(self.bad) <= MAX_WARNINGS:
                last = (listed or "; the next ones are not named") if len(self.bad) == MAX_WARNINGS else ""
                tqdm.write(f"warning: skipped {name!r}: {reason}{last}", sys.stderr)
            self.bad[name] = reason
            if self.skipped:
                self.skipped.note({name: reason})
            if len(self.bad) > (max(1, int(self.max_bad * self.files)) if self.max_bad > 0 else 0):
                some = ", ".join(f"{n!r} ({why})" for n, why in list(self.bad.items())[:3])
                raise UserError(f"{len(self.bad)} of {self.files} images of {str(self.path)!r} cannot be read, e.g. "
                                f"{some}{listed}; repair or remove them, or raise --max_bad_fraction={self.max_bad}")
