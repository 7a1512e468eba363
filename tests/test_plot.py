"""Plots of loss and magnitudes, and grids of images."""
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from config import UserError
from runtime import log, plot

MEASURED = {"activations": {"x_embedder": 1.0, "blocks.0.attn": 7.0, "blocks.0": 2.0, "blocks.1": 1.5},
            "weights": {"blocks.0.w.weight": 1.0, "blocks.1.w.weight": 1.1, "final.weight": 8.0}}


def lines(out, measured, steps=(10, 20, 30)):
    """A log.jsonl with measurements of magnitudes after step 10."""
    for step in steps:
        line = {"step": step, "loss": 1 / step, "loss_by_noise": [0.1, None, 0.3, 0.4]}
        log.append(out, line | (measured if step > 10 else {}))


# ---------------------------------------------------------------- loss.png, magnitudes.png

def test_without_matplotlib_it_says_how_to_get_it(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"] + ["matplotlib", "matplotlib.figure",
                                                                               "matplotlib.backends.backend_agg"]:
        monkeypatch.setitem(sys.modules, name, None)
    lines(tmp_path, {}, [10])
    assert "pip install matplotlib" in plot.plot(tmp_path) and not (tmp_path / "loss.png").exists()


def test_depth_is_read_from_the_names():
    assert plot.by_depth(MEASURED["activations"], plot.TOKENS) == ([0, 1, 2], [1.0, 2.0, 1.5])
    named = {"blocks.0.a.weight": 3.0, "blocks.0.b.weight": 4.0, "blocks.0.b.gain": 9.0, "final.weight": 8.0,
             "blocks.11.a.weight": 2.0}
    assert plot.by_depth(named, plot.WEIGHTS) == ([1, 12], [math.sqrt(12.5), 2.0])


def test_loss_and_magnitudes_become_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert "no lines yet" in plot.plot(str(tmp_path))
    lines(tmp_path, MEASURED)
    plot.main([f"--out={tmp_path}"])
    assert capsys.readouterr().out.split() == ["loss:", str(tmp_path / "loss.png"), "magnitudes:",
                                               str(tmp_path / "magnitudes.png")]
    for name in ("loss.png", "magnitudes.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (1050, 600) and len(image.convert("RGB").getcolors(10 ** 6)) > 50
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "loss.png", "magnitudes.png"]


@pytest.mark.parametrize("count", [1, 12, 13, 40])
def test_of_many_measurements_a_few_are_plotted_and_the_last_always(tmp_path, monkeypatch, count):
    pytest.importorskip("matplotlib")
    plotted = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: plotted.extend(
        line.get_color() for line in figure.axes[0].lines))
    steps = range(20, 20 + 10 * count, 10)
    lines(tmp_path, MEASURED, steps)
    plot.plot_magnitudes(tmp_path)
    assert count / 4 <= len(plotted) <= min(count, 12) and len(set(plotted)) == len(plotted)
    assert plotted[-1][:3] == pytest.approx((0.993248, 0.906157, 0.143936), abs=1e-5)         # viridis at its end


def test_a_run_without_magnitudes_says_how_to_get_them(tmp_path):
    pytest.importorskip("matplotlib")
    lines(tmp_path, {})
    assert "--magnitudes_every" in plot.plot_magnitudes(tmp_path)
    assert not (tmp_path / "magnitudes.png").exists()


def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="no log.jsonl"):
        plot.main([f"--out={tmp_path}"])
    monkeypatch.setattr(sys, "argv", ["runtime/plot.py", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(Path(plot.__file__)), run_name="__main__")
    assert e.value.code == 2 and capsys.readouterr().err.startswith("error: --out=")


# ---------------------------------------------------------------- grids of images

def test_grid_shows_each_image_in_its_place():
    colors = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [0, 0, 0], [9, -9, 0.5]])
    images = colors[:, :, None, None].expand(-1, -1, 20, 30)
    page = plot.grid(images, 3, [f"number {k}" for k in range(5)])
    seen = np.asarray(page)
    assert page.size == (8 + 3 * (30 * 4 + 8), 8 + 2 * (20 * 4 + 8 + 15))
    for k, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        y, x = 8 + row * 103, 8 + column * 128
        tile = seen[y:y + 80, x:x + 120]
        assert (tile == ((colors[k].clamp(-1, 1) + 1) * 127.5).round().numpy()).all()
        assert (seen[y + 80:y + 95, x:x + 120] < 100).any()                 # there is text under it
        assert (seen[y - 8:y - 2, x:x + 120] == 255).all() and (seen[y:y + 80, x - 8:x] == 255).all()
    assert (seen[103:, 8 + 2 * 128:] == 255).all()


def test_grid_sizes_captions_and_channels():
    plain = plot.grid(torch.zeros(2, 1, 200, 150), 5)
    assert plain.size == (8 + 2 * 158, 8 + 208)
    assert plot.grid(torch.zeros(1, 3, 8, 8), 1, scale=2).size == (32, 32)
    one, many = (plot.grid(torch.zeros(1, 3, 32, 32), 1, [text]).height for text in ("short", "words " * 300))
    assert one < many == one + 5 * 15
    for text in ("", "\n", "\x00\x07", "W" * 500, "日本語 ✓ é"):
        assert plot.grid(torch.zeros(1, 3, 32, 32), 1, [text]).width == 112
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        plot.grid(torch.zeros(1, 4, 8, 8), 1)


def test_grid_enlarges_without_blur_and_marks_what_it_cuts():
    page = np.asarray(plot.grid(torch.tensor([[1.0, -1], [-1, 1]])[None, None], 1))
    assert set(np.unique(page)) == {0, 255} and page[8, 8, 0] == 255 and page[8, 60, 0] == 0
    font = ImageFont.load_default(size=11)
    assert plot._wrap("many words " * 99, font, 96)[-1].endswith("[...]")
    assert plot._wrap("one\ntwo", font, 96) == ["one", "two"]
