"""pictures: decoding of real files with all their faults, and the page of pictures that a person looks at."""
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageFont

import pictures


def smooth(h, w):
    """A picture in which red says how far right a pixel is and green how far down."""
    x, y = np.meshgrid(np.arange(w) / (w - 1), np.arange(h) / (h - 1))
    return Image.fromarray(np.stack([255 * x, 255 * y, 0 * x], axis=-1).round().astype(np.uint8))


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rgb(content):
    return np.asarray(pictures.open_image(io.BytesIO(content))[0]).astype(float)


def png_header(w, h):
    """A valid PNG that claims w x h grey pixels and holds almost none."""
    head = struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0)
    body = {b"IHDR": head, b"IDAT": zlib.compress(bytes(99)), b"IEND": b""}
    number = lambda value: struct.pack(">I", value)
    chunks = (number(len(b)) + kind + b + number(zlib.crc32(kind + b)) for kind, b in body.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# ---------------------------------------------------------------- decoding

@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_three_formats_are_read(format):
    picture, size = pictures.open_image(io.BytesIO(encoded(smooth(40, 52), format, quality=95)))
    assert picture.mode == "RGB" and size == (40, 52)
    assert np.abs(np.asarray(picture).astype(float) - np.asarray(smooth(40, 52))).mean() < 4


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_other_formats_stay_closed(format):
    with pytest.raises(pictures.BadImage, match="not a JPEG, PNG or WebP"):
        rgb(encoded(smooth(40, 52), format))


def test_modes_become_rgb():
    true = np.asarray(smooth(40, 52)).astype(float)
    grey = smooth(40, 52).convert("L")
    assert np.abs(rgb(encoded(grey, "PNG")) - np.asarray(grey)[:, :, None]).max() == 0
    assert np.abs(rgb(encoded(smooth(40, 52).convert("CMYK"), "JPEG", quality=95)) - true).mean() < 6
    assert np.abs(rgb(encoded(smooth(40, 52).quantize(256), "PNG")) - true).mean() < 12
    assert set(np.unique(rgb(encoded(grey.convert("1"), "PNG")))) == {0, 255}


def test_16_bit_grey_is_not_white():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    out = rgb(encoded(Image.fromarray(ramp), "PNG"))
    assert abs(out.mean() - 127.5) < 0.5 and out.min() == 0 and out.max() == 255


def test_transparency_lies_over_white():
    hidden = Image.new("RGBA", (52, 40), (200, 0, 0, 0))
    assert (rgb(encoded(hidden, "PNG")) == 255).all()
    assert (rgb(encoded(hidden, "WEBP", lossless=True)) == 255).all()
    half = rgb(encoded(Image.new("RGBA", (52, 40), (200, 0, 0, 128)), "PNG"))
    assert np.abs(half[0, 0] - [227, 127, 127]).max() <= 1
    assert (rgb(encoded(Image.new("LA", (52, 40), (10, 0)), "PNG")) == 255).all()
    palette = Image.new("P", (52, 40), 1)
    palette.putpalette([0, 0, 0, 9, 99, 199])
    assert (rgb(encoded(palette, "PNG", transparency=1)) == 255).all()
    assert (rgb(encoded(palette, "PNG"))[0, 0] == [9, 99, 199]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    swap = lambda a: a.transpose(1, 0, 2)
    store = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: swap,
             6: lambda a: np.rot90(a, 1), 7: lambda a: swap(np.rot90(a, 2)), 8: lambda a: np.rot90(a, -1)}
    upright = np.asarray(smooth(40, 52))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(store[orientation](upright)))
    picture, size = pictures.open_image(io.BytesIO(encoded(stored, "JPEG", quality=95, exif=exif)))
    assert size == (40, 52) and np.abs(np.asarray(picture).astype(float) - upright).mean() < 4


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_exif_block_leaves_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert rgb(encoded(smooth(40, 52), "JPEG", exif=exif.tobytes()[:11] + b"\xff" * 9)).shape == (40, 52, 3)


def test_big_jpegs_are_decoded_smaller_but_keep_their_size():
    content = encoded(smooth(801, 1003), "JPEG", quality=95)
    picture, size = pictures.open_image(io.BytesIO(content), short=150)
    assert size == (801, 1003) and 150 <= min(picture.size) <= 300
    enlarged = np.asarray(picture.resize((1003, 801))).astype(float)
    assert np.abs(enlarged - np.asarray(smooth(801, 1003))).mean() < 3
    assert pictures.open_image(io.BytesIO(content), short=500)[0].size == (1003, 801)


def broken_files():
    picture, thin = smooth(40, 52), Image.new("RGB", (1, 10_000))
    jpeg, png = encoded(picture, "JPEG"), encoded(picture, "PNG")
    frames = dict(save_all=True, append_images=[Image.new("RGB", (52, 40))])
    return {"empty": b"", "html": b"<html>404</html>", "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "jpeg cut": jpeg[:len(jpeg) // 2], "jpeg -2": jpeg[:-2], "jpeg head": jpeg[:20],
            "png cut": png[:len(png) // 2], "png damaged": png[:60] + b"\x00" * 9 + png[69:],
            "animated png": encoded(picture, "PNG", **frames),
            "animated webp": encoded(picture, "WEBP", **frames),
            "animated gif": encoded(picture, "GIF", **frames),
            "1x10000": encoded(thin, "PNG"), "1x1": encoded(Image.new("RGB", (1, 1)), "PNG"),
            "100 MP": png_header(10_000, 10_000), "70 MP": png_header(10_000, 7_000),
            "2^62": png_header(2 ** 31 - 1, 2 ** 31 - 1)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", broken_files())
def test_what_is_no_picture_is_named_so(name):
    words = {"100 MP": "64,000,000", "70 MP": "64,000,000", "1x1": "side of 8", "animated png": "2 frames"}
    with pytest.raises(pictures.BadImage, match=words.get(name)):
        rgb(broken_files()[name])


def test_floating_point_pixels_are_refused():
    with pytest.raises(pictures.BadImage, match="floating-point"):
        pictures.to_rgb(Image.fromarray(np.zeros((9, 9), np.float32)))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(st.integers(0, 900), st.integers(0, 900), st.integers(0, 255), st.sampled_from(pictures.FORMATS))
def test_any_bytes_give_a_picture_or_badimage(cut, at, byte, kind):
    content = bytearray(encoded(smooth(40, 52), kind))
    content[at % len(content)] = byte
    try:
        picture, size = pictures.open_image(io.BytesIO(bytes(content[:max(cut, 1) if cut < 450 else None])))
        assert picture.mode == "RGB" and min(size) >= 8
    except pictures.BadImage:
        pass


# ---------------------------------------------------------------- a page

def test_grid_shows_each_image_in_its_place():
    colors = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [0, 0, 0], [9, -9, 0.5]])
    images = colors[:, :, None, None].expand(-1, -1, 20, 30)
    page = pictures.grid(images, 3, [f"number {k}" for k in range(5)])
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
    plain = pictures.grid(torch.zeros(2, 1, 200, 150), 5)
    assert plain.size == (8 + 2 * 158, 8 + 208)
    assert pictures.grid(torch.zeros(1, 3, 8, 8), 1, scale=2).size == (32, 32)
    one, many = (pictures.grid(torch.zeros(1, 3, 32, 32), 1, [text]).height for text in ("short", "words " * 300))
    assert one < many == one + 5 * 15
    for text in ("", "\n", "\x00\x07", "W" * 500, "日本語 ✓ é"):
        assert pictures.grid(torch.zeros(1, 3, 32, 32), 1, [text]).width == 112
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        pictures.grid(torch.zeros(1, 4, 8, 8), 1)


def test_grid_enlarges_without_blur_and_marks_what_it_cuts():
    page = np.asarray(pictures.grid(torch.tensor([[1.0, -1], [-1, 1]])[None, None], 1))
    assert set(np.unique(page)) == {0, 255} and page[8, 8, 0] == 255 and page[8, 60, 0] == 0
    font = ImageFont.load_default(size=11)
    assert pictures._wrap("many words " * 99, font, 96)[-1].endswith("[...]")
    assert pictures._wrap("one\ntwo", font, 96) == ["one", "two"]
