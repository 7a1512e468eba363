"""Pictures in and out: a file of any kind to upright RGB, and tensors to a page that a person can look at.

image, (h, w) = open_image("cat.jpg")           BadImage says why a file is not usable
grid(images, columns=4, captions=texts)         a PIL image

Dimensions: B batch, C channels, H height, W width.
"""
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS, MIN_SIDE = 64_000_000, 8
TURN, ORIENTATION = Image.Transpose, 0x0112
UPRIGHT = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
           6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}       # EXIF orientation: what undoes it


# ---------------------------------------------------------------- from a file to RGB

class BadImage(ValueError):
    """A file that is not a usable picture; the message says why. It is counted and replaced."""


def open_image(file: Any, short: float = 0) -> tuple[Image.Image, tuple[int, int]]:
    """The upright RGB picture in a file (path or binary stream), and its original (height, width) in pixels.

    A JPEG with a short side of 2, 4 or 8 times `short` is decoded that much smaller. Raises BadImage only."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            w, h = image.size
            if w * h > MAX_PIXELS or min(w, h) < MIN_SIDE:
                raise BadImage(f"{w} x {h} pixels; a side of {MIN_SIDE} up to {MAX_PIXELS:,} in all are read")
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
    except Exception as e:                              # damaged bytes raise nearly every type there is
        raise BadImage(f"{type(e).__name__}: {e}") from e


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as upright RGB: upper 8 bits of 16-bit grey, alpha over white, EXIF rotation undone.

    BadImage for floating-point pixels: nothing states their range."""
    turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    if image.mode == "F":
        raise BadImage("floating-point pixels")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


# ---------------------------------------------------------------- from tensors to a page

def grid(images: Tensor, columns: int, captions: Sequence[str] = (), scale: int = 0) -> Image.Image:
    """Images (B, C, H, W) in [-1, 1], C 1 or 3, on a white page, `columns` a row, each above its caption.

    scale: enlargement, a whole number; 0 = the least for tiles 96 pixels wide. ValueError for another C."""
    B, C, H, W = images.shape
    if C not in (1, 3):
        raise ValueError(f"grid shows 1 or 3 channels, got {C}")
    scale = scale or math.ceil(96 / W)
    wide, high, gap, line = W * scale, H * scale, 8, 15
    font = ImageFont.load_default(size=11)
    texts = [_wrap(text, font, wide) for text in captions] or [[]] * B
    rows = [range(i, min(i + columns, B)) for i in range(0, B, columns)]
    below = [gap + line * max(len(texts[i]) for i in row) for row in rows]

    size = gap + min(columns, B) * (wide + gap), gap + len(rows) * high + sum(below)
    page = Image.new("RGB", size, "white")
    pen, top = ImageDraw.Draw(page), gap
    pixels = (images.detach().float().cpu().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()                   # (B, H, W, 3)
    for row, space in zip(rows, below):
        for left, i in zip(range(gap, page.width, wide + gap), row):
            page.paste(Image.fromarray(pixels[i]).resize((wide, high), Image.Resampling.NEAREST), (left, top))
            for j, text in enumerate(texts[i]):
                pen.text((left, top + high + 2 + j * line), text, fill=(40, 40, 40), font=font)
        top += high + space
    return page


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """`text` in at most 6 lines of about `width` pixels, by the mean width of its letters."""
    parts = text.splitlines()
    letters = int(width * len(text) / max(1, sum(font.getlength(part) for part in parts)))
    return [line for part in parts for line in textwrap.wrap(part, max(8, letters), max_lines=6)][:6]
