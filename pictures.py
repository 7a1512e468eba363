"""A page of images, each above its caption.

grid(images, columns=4, captions=texts)         a PIL image

Dimensions: B batch, C channels, H height, W width.
"""
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from images import FORMATS, MAX_PIXELS, MIN_SIDE, BadImage, open_image, to_rgb  # noqa: F401


def grid(images: Tensor, columns: int, captions: Sequence[str] = (), scale: int = 0) -> Image.Image:
    """Draws images (B, C, H, W) in [-1, 1], C 1 or 3, on a white page, `columns` a row, each above its caption.

    scale: enlargement, a whole number; 0 = the smallest for tiles 96 pixels wide. Raises ValueError for another C."""
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
    """Breaks `text` into at most 6 lines of about `width` pixels, by the mean width of its letters."""
    parts = text.splitlines()
    letters = int(width * len(text) / max(1, sum(font.getlength(part) for part in parts)))
    return [line for part in parts for line in textwrap.wrap(part, max(8, letters), max_lines=6)][:6]
