"""Image files and captions as training samples: decode, clean, crop, and replace what cannot be used.

image, (h, w) = open_image("cat.jpg")                   upright RGB; BadImage says why a file is unusable
clean(decode(content))                                  the caption in a .txt file; BadCaption says why not
choose(["a cat", "a tabby"], 7)                         one caption of a list, cleaned
metadata(b'{"file_name": "x.jpg", "text": "a cat"}')    {"x.jpg": "a cat"}, and {"line 3": reason} of unusable lines

Pictures is the base class of the sources in sources/folders.py, sources/shards.py and sources/coco.py.

Dimensions: C channels, R resolution, H height, W width.
"""
import json
import math
import sys
import threading
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from config import UserError
from rng import seed64

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS, MIN_SIDE = 64_000_000, 8
ORIENTATION = 0x0112                    # EXIF tag
LONGEST = 2000                          # characters kept of a caption; a text tower reads about 400
SHOWN = 60                              # characters that a message quotes of a wrong value
ATTEMPTS = 20                           # to replace one unusable sample
NAMED = 20                              # unusable samples named in warnings
CROPS = {"global": (0.9, 1.0), "local": (0.4, 0.6), "mix": (0.4, 1.0)}  # [COND] 1.9: sides, over the short one


# ---------------------------------------------------------------- from a file to RGB

class BadImage(ValueError):
    """An unusable image file; the message says why."""


def open_image(file: Any, short: float = 0) -> tuple[Image.Image, tuple[int, int]]:
    """The upright RGB image in a file (path or binary stream), and its original (height, width) in pixels.

    Decodes a JPEG with a short side of 2, 4 or 8 times `short` that much smaller. Raises BadImage only."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            w, h = image.size
            if w * h > MAX_PIXELS or min(w, h) < MIN_SIDE:
                raise BadImage(f"{w} x {h} pixels; sides start at {MIN_SIDE}, areas end at {MAX_PIXELS:,}")
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:     # MPO: a JPEG with previews
                raise BadImage(f"animated, {image.n_frames} frames")
            if short:
                image.draft(None, (math.ceil(w * short / min(w, h)), math.ceil(h * short / min(w, h))))
            h, w = (w, h) if image.getexif().get(ORIENTATION) in (5, 6, 7, 8) else (h, w)
            return to_rgb(image), (h, w)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as e:
        raise BadImage("not a JPEG, PNG or WebP image") from e
    except Exception as e:                              # damaged bytes raise nearly every type
        raise BadImage(f"{type(e).__name__}: {e}") from e


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as upright RGB: upper 8 bits of 16-bit grey, alpha over white, EXIF rotation undone.

    Raises BadImage for floating-point pixels: nothing states their range."""
    turn = image.getexif().get(ORIENTATION)
    if image.mode == "F":
        raise BadImage("floating-point pixels")
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


# ---------------------------------------------------------------- captions

class BadCaption(ValueError):
    """An unusable caption; the message says why."""


def decode_utf8(content: bytes) -> str:
    """UTF-8 bytes as text, with or without a byte order mark. Raises BadCaption for any other encoding."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadCaption(f"not UTF-8: {e.reason} at byte {e.start}") from e


def clean_caption(text: str) -> str:
    """One line: composed characters (NFC), no control characters, single blanks, at most LONGEST characters."""
    text = " ".join(text[:8 * LONGEST].split())
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs"))         # Cs: half a character
    return " ".join(unicodedata.normalize("NFC", text).split())[:LONGEST].rstrip()


def pick_caption(value: Any, draw: int) -> str:
    """A caption, or number `draw` (any whole number) of a list of captions. Raises BadCaption for other types."""
    if isinstance(value, list) and value:
        value = value[draw % len(value)]
    if not isinstance(value, str):
        raise BadCaption(f"a caption is text or a list of texts, got {json.dumps(value)[:SHOWN]}")
    return clean_caption(value)


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object in these bytes. Raises BadCaption if they hold none."""
    text = decode_utf8(content)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise BadCaption(f"not JSON: {type(e).__name__}: {e}") from e
    if not isinstance(found, dict):
        raise BadCaption(f"JSON, but not an object: {json.dumps(found)[:SHOWN]}")
    return found


def parse_metadata(content: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """{file_name: text} of a metadata.jsonl, each text as it stands there, and {"line 3": reason} of unusable lines."""
    texts, bad = {}, {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_object(line)
            name = row.get("file_name")
            if not isinstance(name, str) or "text" not in row:
                raise BadCaption(f"wants file_name and text, has {', '.join(map(repr, row))[:SHOWN] or 'nothing'}")
            if name in texts:
                raise BadCaption(f"{name[:SHOWN]!r} is named a second time")
            texts[name] = row["text"]
        except BadCaption as e:
            bad[f"line {number}"] = str(e)
    return texts, bad


UNUSABLE = (BadImage, BadCaption)


# ---------------------------------------------------------------- the base class of sources

class ImageSource(ABC):
    """A source of image files, cropped and mirrored at random. A subclass adds `scan` and `load`.

    crop        random: a square anywhere, its side uniform in `side` times the short side; center: the largest
    flip        mirror half of them
    max_bad     unusable samples are listed in `bad` and replaced by others; more than max(1, max_bad * files) raise
                UserError, and with 0 the first does"""
    channels = 3
    classes: list[str] = []             # their names; [] without classes
    labels: Sequence[int] = ()          # the class of each sample
    encoder = None                      # captions are text: no tokens are stored
    names: Sequence[str]                # of usable samples
    files: int                          # number of samples, usable or not
    fingerprint: str                    # sha256 of what decides the content

    def __init__(self, path: str | Path, resolution: int, seed: int = 0, flip: bool = True, max_bad: float = 0.01,
                 crop: str = "random", side: tuple[float, float] = CROPS["global"]):
        if crop not in ("random", "center"):
            raise UserError(f"crop is random or center, got {crop!r}")
        self.path, self.resolution, self.seed, self.flip = Path(path).expanduser(), resolution, seed, flip
        self.max_bad, self.random = max_bad, crop == "random"
        self.side = side if self.random else (1.0, 1.0)
        self.controls = ("size", "crop", "flip") if flip else ("size", "crop")
        self.bad: dict[str, str] = {}
        self.skipped: Any = None                                # a log of the files in `bad`, as skipped.Skipped
        self.lock = threading.Lock()
        for name, reason in self.scan():
            self.note_bad(name, reason)

    @abstractmethod
    def scan(self) -> Iterable[tuple[str, str]]:
        """Finds the samples, sets `names`, `files` and `fingerprint`, and returns (name, reason) of unusable ones."""

    @abstractmethod
    def load(self, index: int, epoch: int) -> tuple[Any, dict[str, Any]]:
        """The image, as a path or a binary stream, and what else is known: label, caption, size of the original.

        Raises BadImage or BadCaption for an unusable sample."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """What messages call a sample: its path below the folder."""
        return self.names[index]

    def record(self, index: int, epoch: int) -> dict[str, Any]:
        """One Record. (seed, index, epoch, attempt) chooses another sample for an unusable one."""
        use = index
        for attempt in range(ATTEMPTS):
            try:
                return self.render(use, epoch)
            except UNUSABLE as e:
                self.note_bad(self.name(use), str(e))
            use = seed64(self.seed, "replace", index, epoch, attempt) % len(self)
        raise UserError(f"{ATTEMPTS} images of {self.path} in a row are unreadable, see data.py --check")

    def render(self, index: int, epoch: int) -> dict[str, Any]:
        """One Record, augmented by (seed, index, epoch). Raises BadImage or BadCaption for an unusable sample."""
        R, (low, high) = self.resolution, self.side
        file, known = self.load(index, epoch)
        image, (h, w) = open_image(file, short=2 * R / low)
        rng = np.random.Generator(np.random.Philox(seed64(self.seed, "aug", index, epoch)))
        u = rng.random(4) if self.random else (0, 0.5, 0.5, rng.random(4)[3])
        a = max(1, round(min(h, w) * (low + (high - low) * u[0])))
        top, left = int(u[1] * (h - a + 1)), int(u[2] * (w - a + 1))
        mirrored = self.flip and u[3] < 0.5

        fy, fx = image.height / h, image.width / w              # below 1 where the decoder shrank the image
        box = (left * fx, top * fy, (left + a) * fx, (top + a) * fy)
        image = image.resize((R, R), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)                     # (C, R, R)
        pixels = np.ascontiguousarray(pixels[:, :, ::-1] if mirrored else pixels)
        record = dict(image=torch.from_numpy(pixels / np.float32(127.5) - np.float32(1)), size=(h, w),
                      crop=(top * R / a, left * R / a), flip=float(mirrored), index=index)
        if "size" in known:                                     # of an original that is not turned upright
            H, W = known["size"]
            known["size"] = (W, H) if h != w and (h > w) != (H > W) else (H, W)
        return record | known

    def note_bad(self, name: str, reason: str) -> None:
        """Adds an unusable sample to `bad`, with a warning. Raises UserError beyond max_bad."""
        with self.lock:
            where = f"; all are in {self.skipped.path}" if self.skipped else ""
            if name not in self.bad and len(self.bad) <= NAMED:
                last = (where or "; the next ones are not named") if len(self.bad) == NAMED else ""
                tqdm.write(f"warning: skipped {name!r}: {reason}{last}", sys.stderr)
            self.bad[name] = reason
            if self.skipped:
                self.skipped.note({name: reason})
            allowed = max(1, int(self.max_bad * self.files)) if self.max_bad > 0 else 0
            if len(self.bad) > allowed:
                some = ", ".join(f"{n!r} ({why})" for n, why in list(self.bad.items())[:3])
                raise UserError(f"{len(self.bad)} of {self.files} images of {str(self.path)!r} cannot be "
                                f"read, e.g. {some}{where}; mend or remove them, or raise "
                                f"--max_bad_fraction={self.max_bad}")
