"""Plots of log.jsonl: the loss of a run, and the magnitudes of its layers.

python plot.py --out=out/shapes         writes out/shapes/loss.png and, if --magnitudes_every was set, magnitudes.png
"""
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import log
from config import UserError, parse, run

NAMES = ("cleanest quarter of the noise range", "second", "third", "noisiest quarter")
CURVES = 12                             # most measurements in a plot, spread over the run


def plot(out: str | Path) -> str:
    """Write <out>/loss.png: loss by step, mean and by quarter of the noise range. Returns its path, or why not."""
    lines, path = [line for line in log.read(Path(out)) if "loss" in line], Path(out) / "loss.png"
    if (figure := _figure()) is None:
        return "not plotted; it needs matplotlib: pip install matplotlib"
    if not lines:
        return f"not plotted; {out}/log.jsonl has no lines yet"
    axes, steps = figure.subplots(), [line["step"] for line in lines]
    for k, name in enumerate(NAMES):
        quarter = [line["loss_by_noise"][k] for line in lines]
        axes.plot(steps, [float("nan") if v is None else v for v in quarter], linewidth=0.8, label=name)
    axes.plot(steps, [line["loss"] for line in lines], color="black", linewidth=1.6, label="mean")

    axes.set(xlabel="step", ylabel="squared error of eps", yscale="log")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(frameon=False, fontsize="small")
    return _save(figure, path)


def plot_magnitudes(out: str | Path) -> str:
    """Write <out>/magnitudes.png: magnitude by depth, one curve a step. Returns its path, or why not.

    Left the tokens after each block, 0 the embedded patches; right the RMS of all weights of each block."""
    lines, path = [line for line in log.read(Path(out)) if "activations" in line], Path(out) / "magnitudes.png"
    if (figure := _figure()) is None:
        return "not plotted; it needs matplotlib: pip install matplotlib"
    if not lines:
        return f"not plotted; {out}/log.jsonl has no magnitudes, which train.py writes with --magnitudes_every=500"
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    left, right = figure.subplots(1, 2)
    color = ScalarMappable(Normalize(0, lines[-1]["step"]), "viridis")
    every = math.ceil(len(lines) / CURVES)
    for line in lines[(len(lines) - 1) % every::every]:     # the last one always
        shade = color.to_rgba(line["step"])
        for axes, (depth, values) in ((left, trunk(line["activations"])), (right, weights(line["weights"]))):
            axes.plot(depth, values, color=shade, linewidth=1.2, marker=".")

    left.set(xlabel="after block", ylabel="magnitude of the tokens", yscale="log")
    right.set(xlabel="block", ylabel="RMS of the weights", yscale="log")
    for axes in (left, right):
        axes.grid(True, which="both", linewidth=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(color, ax=right, label="step")
    return _save(figure, path)


def trunk(activations: dict[str, float]) -> tuple[list[int], list[float]]:
    """(depth, magnitude): the embedded patches, then the tokens after each block."""
    found = {0: activations["x_embedder"]}
    found |= {int(m[1]) + 1: v for name, v in activations.items() if (m := re.fullmatch(r"blocks\.(\d+)", name))}
    return list(found), list(found.values())


def weights(named: dict[str, float]) -> tuple[list[int], list[float]]:
    """(block, RMS over its weight matrices, each counting alike); scalars, such as gains, are left out."""
    squares: dict[int, list[float]] = {}
    for name, v in named.items():
        if m := re.fullmatch(r"blocks\.(\d+)\..*weight", name):
            squares.setdefault(int(m[1]) + 1, []).append(v * v)
    return list(squares), [math.sqrt(sum(s) / len(s)) for s in squares.values()]


def _figure() -> Any:
    """An empty matplotlib figure that no window will ever show; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> str:
    png = io.BytesIO()
    figure.savefig(png, dpi=150, format="png")
    log.write_bytes(path, png.getvalue())
    return str(path)


# ---------------------------------------------------------------- command line

@dataclass(frozen=True)
class Options:
    """Which run."""
    out: str = "out/shapes"         # run folder, as given to train.py


def main(argv: list[str]) -> None:
    out = Path(parse(argv, Options()).out)
    if not (out / "log.jsonl").is_file():
        raise UserError(f"--out={out} has no log.jsonl; it wants the folder of a run")
    print(f"loss: {plot(out)}\nmagnitudes: {plot_magnitudes(out)}")


if __name__ == "__main__":
    run(main)
