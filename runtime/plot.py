"""Plots of a run's loss and magnitudes, and grids of images above their captions.

python -m runtime.plot --out=out/shapes         writes loss.png and, with --magnitudes_every, magnitudes.png

Dimensions: B batch, C channels, H height, W width.
"""
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from config import UserError, parse, run
from runtime import log

TOKENS = r"x_embedder|blocks\.(\d+)"   # measured: the embedded patches, and the tokens after each block
WEIGHTS = r"blocks\.(\d+)\..*weight"  # each block's matrices, without scalars such as gains
CURVES = 12                             # most measurements in a plot, spread over the run
MISSING = "not plotted; it needs matplotlib: pip install matplotlib"


def plot(out: str | Path) -> str:
    """Write <out>/loss.png: loss by step, mean and by quarter of the noise range. Returns its path, or why not."""
    lines = [line for line in log.read(Path(out)) if "loss" in line]
    if (figure := _figure()) is None:
        return MISSING
    if not lines:
        return f"not plotted; {out}/log.jsonl has no lines yet"
    axes, steps = figure.subplots(), [line["step"] for line in lines]
    for k, name in enumerate(("cleanest quarter of the noise range", "second", "third", "noisiest quarter")):
        axes.plot(steps, [line["loss_by_noise"][k] for line in lines], linewidth=0.8, label=name)
    axes.plot(steps, [line["loss"] for line in lines], color="black", linewidth=1.6, label="mean")
    axes.set(xlabel="step", ylabel="squared error of eps", yscale="log")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(frameon=False, fontsize="small")
    return _save(figure, Path(out) / "loss.png")


def plot_magnitudes(out: str | Path) -> str:
    """Write <out>/magnitudes.png: magnitudes of tokens and weights by depth. Returns its path, or why not."""
    lines = [line for line in log.read(Path(out)) if "activations" in line]
    if (figure := _figure()) is None:
        return MISSING
    if not lines:
        return f"not plotted; {out}/log.jsonl has no magnitudes, which train.py writes with --magnitudes_every=500"
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    left, right = figure.subplots(1, 2)
    color = ScalarMappable(Normalize(0, lines[-1]["step"]), "viridis")
    every = math.ceil(len(lines) / CURVES)
    for line in lines[(len(lines) - 1) % every::every]:     # the last one always
        for axes, key, pattern in ((left, "activations", TOKENS), (right, "weights", WEIGHTS)):
            axes.plot(*by_depth(line[key], pattern), color=color.to_rgba(line["step"]), linewidth=1.2, marker=".")
    left.set(xlabel="after block", ylabel="magnitude of the tokens", yscale="log")
    right.set(xlabel="block", ylabel="RMS of the weights", yscale="log")
    for axes in (left, right):
        axes.grid(True, which="both", linewidth=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(color, ax=right, label="step")
    return _save(figure, Path(out) / "magnitudes.png")


def by_depth(named: dict[str, float], pattern: str) -> tuple[list[int], list[float]]:
    """(depth, RMS over the values of that depth whose name is like `pattern`), 0 for a name without a number."""
    squares: dict[int, list[float]] = {}
    for name, v in named.items():
        if m := re.fullmatch(pattern, name):
            squares.setdefault(int(m[1] or -1) + 1, []).append(v * v)
    return list(squares), [math.sqrt(sum(s) / len(s)) for s in squares.values()]


def _figure() -> Any:
    """An empty matplotlib figure without a window; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(7, 4), layout="constrained")


def _save(figure: Any, path: Path) -> str:
    with log.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return str(path)


def to_uint8(x: Tensor) -> np.ndarray:
    """[-1, 1] -> 0 .. 255, rounded to nearest. (B, C, H, W) -> (B, H, W, C)"""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(pixels: np.ndarray | Tensor) -> Tensor:
    """0 .. 255 -> [-1, 1], float32, without a change of layout."""
    return torch.as_tensor(pixels).float() / 127.5 - 1


def grid(images: Tensor, columns: int, captions: Sequence[str] = (), scale: int = 0) -> Image.Image:
    """Put images (B, C, H, W) in [-1, 1] on a white page, `columns` a row, each above its caption.

    scale: integer enlargement; 0 = the smallest for tiles 96 pixels wide. ValueError unless C is 1 or 3."""
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
    pixels = to_uint8(images.expand(-1, 3, -1, -1))                                     # (B, H, W, 3)
    for row, space in zip(rows, below):
        for left, i in zip(range(gap, page.width, wide + gap), row):
            page.paste(Image.fromarray(pixels[i]).resize((wide, high), Image.Resampling.NEAREST), (left, top))
            for j, text in enumerate(texts[i]):
                pen.text((left, top + high + 2 + j * line), text, fill=(40, 40, 40), font=font)
        top += high + space
    return page


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Break `text` into at most 6 lines of about `width` pixels, by the mean width of its letters."""
    parts = text.splitlines()
    letters = int(width * len(text) / max(1, sum(font.getlength(part) for part in parts)))
    return [line for part in parts for line in textwrap.wrap(part, max(8, letters), max_lines=6)][:6]


@dataclass(frozen=True)
class Options:
    """Which run."""
    out: str = "out/shapes"         # run folder, as given to train.py


def main(argv: list[str]) -> None:
    out = Path(parse(argv, Options()).out)
    if not (out / "log.jsonl").is_file():
        raise UserError(f"--out={out} is no run folder: it has no log.jsonl")
    print(f"loss: {plot(out)}\nmagnitudes: {plot_magnitudes(out)}")


if __name__ == "__main__":
    run(main)
