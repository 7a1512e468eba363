"""images: decoding of files, which test_malformed.py does with damaged ones."""
import io

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from sources import images


def smooth(h=40, w=52):
    """An image in which red says how far right a pixel is and green how far down."""
    x, y = np.meshgrid(np.arange(w) / (w - 1), np.arange(h) / (h - 1))
    return Image.fromarray(np.stack([255 * x, 255 * y, 0 * x], axis=-1).round().astype(np.uint8))


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rgb(content):
    return np.asarray(images.open_image(io.BytesIO(content))[0]).astype(float)


# ---------------------------------------------------------------- decoding

@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_three_formats_are_read(format):
    image, size = images.open_image(io.BytesIO(encoded(smooth(40, 52), format, quality=95)))
    assert image.mode == "RGB" and size == (40, 52)
    assert np.abs(np.asarray(image).astype(float) - np.asarray(smooth(40, 52))).mean() < 4


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_other_formats_stay_closed(format):
    with pytest.raises(images.BadSample, match="not a JPEG, PNG or WebP"):
        rgb(encoded(smooth(40, 52), format))


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


SWAP = lambda a: a.transpose(1, 0, 2)
STORED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: SWAP, 6: lambda a: np.rot90(a, 1),
          7: lambda a: SWAP(np.rot90(a, 2)), 8: lambda a: np.rot90(a, -1)}         # how a camera turned so stores it


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone(orientation):
    upright, exif = np.asarray(smooth(40, 52)), Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    for image, format in ((stored, "PNG"), (stored.convert("RGBA"), "WEBP"), (stored, "JPEG")):
        options = dict(quality=95) if format == "JPEG" else dict(lossless=True)
        out, size = images.open_image(io.BytesIO(encoded(image, format, exif=exif, **options)))
        assert size == (40, 52) and out.size == (52, 40)
        assert np.abs(np.asarray(out).astype(float) - upright).mean() < (4 if format == "JPEG" else 1e-9)
    _, size = images.open_image(io.BytesIO(encoded(stored.resize((900, 901)), "JPEG", exif=exif)), short=100)
    assert size == ((900, 901) if orientation > 4 else (901, 900))              # equal sides once it is decoded smaller


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at, byte", [(17, 1), (41, 7), (43, 2)])
def test_damaged_exif_still_turns_the_image(at, byte):
    """Tags with a wrong type: Pillow reads the orientation, and fails to write these tags."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x011A] = "make", 6, (72, 1)
    damaged = bytearray(exif.tobytes())
    damaged[at] = byte
    for format in images.FORMATS:
        assert rgb(encoded(smooth(40, 52), format, exif=bytes(damaged))).shape == (52, 40, 3)


def test_big_jpegs_are_decoded_smaller_but_keep_their_size():
    content = encoded(smooth(801, 1003), "JPEG", quality=95)
    image, size = images.open_image(io.BytesIO(content), short=150)
    assert size == (801, 1003) and 150 <= min(image.size) <= 300
    enlarged = np.asarray(image.resize((1003, 801))).astype(float)
    assert np.abs(enlarged - np.asarray(smooth(801, 1003))).mean() < 3
    assert images.open_image(io.BytesIO(content), short=500)[0].size == (1003, 801)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 900), st.integers(0, 900), st.integers(0, 255), st.sampled_from(images.FORMATS))
def test_any_bytes_give_an_image_or_badimage(cut, at, byte, kind):
    content = bytearray(encoded(smooth(40, 52), kind))
    content[at % len(content)] = byte
    try:
        image, size = images.open_image(io.BytesIO(bytes(content[:max(cut, 1) if cut < 450 else None])))
        assert image.mode == "RGB" and min(size) >= 8
    except images.BadSample:
        pass
