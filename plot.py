"""The loss of a run as a picture, from its log.

>>> plot('out/shapes')          writes out/shapes/loss.png
"""
import io
from pathlib import Path

import checkpoint
import log

NAMES = ("cleanest quarter of the noise range", "second", "third", "noisiest quarter")


def plot(out: str | Path) -> str:
    """Draw <out>/loss.png: loss over steps, mean and by quarter of the noise range. Its path, or why there is none."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "not drawn; it needs matplotlib: pip install matplotlib"
    lines, path = log.read(Path(out)), Path(out) / "loss.png"
    if not lines:
        return f"not drawn; {out}/log.jsonl has no lines yet"

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes, steps = figure.subplots(), [line["step"] for line in lines]
    for k, name in enumerate(NAMES):
        quarter = [line["loss_by_noise"][k] for line in lines]
        axes.plot(steps, [float("nan") if v is None else v for v in quarter], linewidth=0.8, label=name)
    axes.plot(steps, [line["loss"] for line in lines], color="black", linewidth=1.6, label="mean")

    axes.set(xlabel="step", ylabel="squared error of eps", yscale="log")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(frameon=False, fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    checkpoint.write_bytes(path, picture.getvalue())
    return str(path)
