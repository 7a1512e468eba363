"""Grids of images on a page."""
import numpy as np
import pytest
import torch
from PIL import ImageFont

from runtime import plot


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
