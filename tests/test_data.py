"""data: the sample stream, decoding of real files, folders with all their faults, read-ahead, grids."""
import io
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import data
import pictures
from config import Config, UserError

MODEL = replace(Config().model, semantics="class", resolution=16)


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


def tree(root, counts, size=(40, 52), **broken):
    """root/CLASS/k.png for counts {CLASS: number}, of a colour each; `broken` files with their content."""
    for c, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", size[::-1], (20 * c, 5 * k, 99)).save(root / name / f"{k:03}.png")
    for name, content in broken.items():
        (root / name.replace("__", "/").replace("_", ".")).write_bytes(content)
    return root


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


# ---------------------------------------------------------------- the sample stream

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2 ** 40), epoch=st.integers(0, 10 ** 6))
def test_each_epoch_is_a_permutation(n, seed, epoch):
    index, epochs = data.index_and_epoch(epoch * n + np.arange(n), n, seed)
    assert np.array_equal(np.sort(index), np.arange(n)) and (epochs == epoch).all()


@pytest.mark.parametrize("n", [2 ** 31, 2 ** 31 - 1, 2 ** 30 + 1, 1_281_167])
def test_a_huge_epoch_stays_in_range_spreads_out_and_does_not_repeat(n):
    index, epoch = data.index_and_epoch(5 * n + np.arange(40_000), n, 3)
    assert index.min() >= 0 and index.max() < n and len(np.unique(index)) == 40_000 and (epoch == 5).all()
    assert abs(index.mean() / n - 0.5) < 5 * (1 / 12 / 40_000) ** 0.5
    steps = np.diff(index / n)
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.03         # -1/2 for independent draws


@pytest.mark.parametrize("n", [2, 3, 5, 7, 16, 24])
def test_every_sample_is_as_likely_at_every_place(n):
    epochs = 4000
    index, _ = data.index_and_epoch(np.arange(epochs * n), n, seed=1)
    counts = np.stack([np.bincount(index.reshape(epochs, n)[:, place], minlength=n) for place in range(n)])
    chi2 = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5 + 3


def test_epochs_and_seeds_have_their_own_order_and_positions_can_be_asked_in_any_way():
    n, at = 1000, np.arange(3000)
    index, epoch = data.index_and_epoch(at, n, 0)
    assert [(index[:n] == other).mean() < 0.01 for other in (index[n:2 * n], index[2 * n:])] == [True, True]
    assert (index == data.index_and_epoch(at, n, 1)[0]).mean() < 0.01
    shuffled = np.random.default_rng(0).permutation(at)
    assert np.array_equal(data.index_and_epoch(shuffled, n, 0)[0], index[shuffled])
    assert data.index_and_epoch(at[990:1013], n, 0)[1].tolist() == [0] * 10 + [1] * 13


def test_the_order_is_the_same_for_ever():
    first = [4490, 5396, 48974, 19811, 20811, 47982, 8981, 34958]
    assert data.index_and_epoch(np.arange(8), 50_000, 0)[0].tolist() == first


def test_a_step_is_the_same_samples_however_it_is_cut_into_microbatches():
    whole = data.positions(7, 0, 24, 24)
    assert whole.tolist() == list(range(168, 192))
    for micro in (1, 3, 8):
        parts = [data.positions(7, m, 24, micro) for m in range(24 // micro)]
        assert np.array_equal(np.concatenate(parts), whole)


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


# ---------------------------------------------------------------- folders

def test_a_folder_of_class_folders(tmp_path):
    source = data.ImageFolder(tree(tmp_path / "set", {"zebra": 3, "ant": 2, "Bee/deep": 1}), 16)
    assert source.classes == ["Bee", "ant", "zebra"] and len(source) == 6
    assert source.names[:2] == ["Bee/deep/000.png", "ant/000.png"] and source.labels == [0, 1, 1, 2, 2, 2]
    batch = data.records(source, [5, 0, 2], [0, 0, 4])
    assert batch["label"].tolist() == [2, 0, 1] and batch["index"].tolist() == [5, 0, 2]
    shapes = {k: (tuple(v.shape), v.dtype) for k, v in batch.items()}
    f, i = torch.float32, torch.int64
    assert shapes == {"image": ((3, 3, 16, 16), f), "label": ((3,), i), "index": ((3,), i),
                      "size": ((3, 2), f), "crop": ((3, 2), f), "flip": ((3,), f)}
    assert batch["image"].is_contiguous() and batch["image"].min() >= -1 and batch["image"].max() <= 1
    assert torch.allclose(batch["image"][0, :, 0, 0], torch.tensor([0, 10, 99]) / 127.5 - 1)


@pytest.mark.parametrize("name", ["x.png", "shrunk_by_the_decoder.jpg"])
def test_pixels_crop_size_and_flip_tell_the_truth(tmp_path, name):
    (tmp_path / "c").mkdir()
    H, W, R = 300, 420, 24
    smooth(H, W).save(tmp_path / "c" / name, quality=98)
    source = data.ImageFolder(tmp_path, R, side=(0.5, 0.9))
    sides, flips = [], 0
    for epoch in range(40):
        row = source.record(0, epoch)
        x, y = ((row["image"][c] + 1) / 2 * (n - 1) for c, n in ((0, W), (1, H)))    # places in the original
        x = x.flip(1) if row["flip"] else x
        a = (x[:, -1] - x[:, 0]).mean() * R / (R - 1)               # side of the crop, there too
        top, left = (value * a / R for value in row["crop"])
        assert abs(y[0].mean() + 0.5 - (top + a / R / 2)) < 2
        assert abs(x[:, 0].mean() + 0.5 - (left + a / R / 2)) < 2
        assert row["size"] == (H, W) and top > -1 and top + a < H + 2 and left + a < W + 2
        sides.append(float(a) / H)
        flips += row["flip"]
    assert 0.48 < min(sides) < 0.6 and 0.8 < max(sides) < 0.92 and 8 < flips < 32


def test_center_crop_is_the_middle(tmp_path):
    (tmp_path / "c").mkdir()
    smooth(60, 100).save(tmp_path / "c" / "x.png")
    source = data.ImageFolder(tmp_path, 20, flip=False, crop="center")
    rows = [source.record(0, epoch) for epoch in range(8)]
    assert all(torch.equal(row["image"], rows[0]["image"]) and row["flip"] == 0 for row in rows)
    assert rows[0]["crop"][0] == 0 and abs(rows[0]["crop"][1] - 20 * 20 / 60) < 0.5
    assert abs(rows[0]["image"].mean((1, 2))[:2]).max() < 0.02 and source.controls == ("size", "crop")


def test_augmentation_differs_by_epoch_and_seed_and_flip_can_be_off(tmp_path):
    root = tmp_path / "set"
    (root / "c").mkdir(parents=True)
    smooth(90, 120).save(root / "c" / "x.png")
    crops = [data.ImageFolder(root, 16, seed).record(0, epoch)["crop"] for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(crops)) == 4
    off = data.ImageFolder(root, 16, flip=False)
    assert not any(off.record(0, epoch)["flip"] for epoch in range(20)) and off.controls == ("size", "crop")


def test_fingerprint_is_names_sizes_and_classes_and_nothing_else(tmp_path):
    root = tree(tmp_path / "set", {"a": 2, "b": 2})
    first = data.ImageFolder(root, 16).fingerprint
    os.utime(root / "a" / "000.png", (1, 1))
    (root / "a" / "notes.txt").write_text("x")
    (root / "a" / "._000.png").write_text("x")
    assert data.ImageFolder(root, 32, seed=5).fingerprint == first and len(first) == 64
    assert data.ImageFolder(root, 16, classes=False).fingerprint != first
    with open(root / "b" / "001.png", "ab") as file:
        file.write(b"x")
    second = data.ImageFolder(root, 16).fingerprint
    (root / "b").rename(root / "c")
    assert len({first, second, data.ImageFolder(root, 16).fingerprint}) == 3


def test_only_regular_files_with_content_count(tmp_path, capsys):
    root = tree(tmp_path / "set", {"a": 3}, a__empty_jpg=b"")
    (root / "a" / "folder.jpg").mkdir()
    (root / "a" / "UPPER.JPG").write_bytes(encoded(smooth(20, 30), "JPEG"))
    (root / ".hidden").mkdir()
    Image.new("RGB", (20, 30)).save(root / ".hidden" / "x.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "a" / "pipe.png")
    source = data.ImageFolder(root, 16, max_bad=0.5)
    assert source.names == ["a/000.png", "a/001.png", "a/002.png", "a/UPPER.JPG"]
    assert list(source.bad) == ["a/empty.jpg"] and "a/empty.jpg" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_links(tmp_path):
    real = tree(tmp_path / "real", {"a": 2})
    root = tmp_path / "set"
    root.mkdir()
    (root / "cat").symlink_to(real / "a")
    (real / "a" / "round").symlink_to(real / "a")
    (real / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    source = data.ImageFolder(root, 16)
    assert source.names == ["cat/000.png", "cat/001.png"] and list(source.bad) == ["cat/gone.png"]


def test_unreadable_files_are_named_once_and_replaced_by_the_same_others(tmp_path, capsys):
    jpeg = encoded(smooth(40, 52), "JPEG")
    root = tree(tmp_path / "set", {"a": 20, "b": 20}, a__005b_jpg=jpeg[:300], b__page_jpg=b"<html>")
    make = lambda: data.ImageFolder(root, 16, max_bad=0.1)
    source = make()
    index, epoch = list(range(len(source))) * 2, [0] * len(source) + [1] * len(source)
    batch = data.records(source, index, epoch)
    assert set(source.bad) == {"a/005b.jpg", "b/page.jpg"}
    assert source.bad["b/page.jpg"] == "not a JPEG, PNG or WebP image"
    assert capsys.readouterr().err.count("page.jpg") == 1

    replaced = [k for k in range(len(index)) if batch["index"][k] != index[k]]
    assert len(replaced) == 4 and not {source.names[k] for k in batch["index"]} & set(source.bad)
    assert batch["label"].tolist() == [source.labels[k] for k in batch["index"]]
    late = make()                                       # asked backwards, one by one, by another process
    rows = [late.record(index[k], epoch[k]) for k in reversed(range(len(index)))][::-1]
    assert same(data.collate(rows), batch)


def test_too_many_unreadable_files_stop_the_run(tmp_path):
    root = tree(tmp_path / "set", {"a": 30}, **{f"a__bad{k}_jpg": b"x" for k in range(3)})
    tight, loose, none = (data.ImageFolder(root, 16, max_bad=share) for share in (0.01, 0.1, 0.0))
    bad = [k for k, name in enumerate(tight.names) if "bad" in name]
    assert tight.record(bad[0], 0) and tight.record(bad[0], 1)              # the same file counts once
    with pytest.raises(UserError, match=r"2 of 33 images .*bad0\.jpg.*bad1\.jpg.*--max_bad=0\.01"):
        tight.record(bad[1], 0)
    assert [loose.record(k, 0)["index"] not in bad for k in bad] == [True] * 3
    with pytest.raises(UserError, match="1 of 33"):
        none.record(bad[0], 0)


def test_empty_files_count_at_the_start_and_nothing_readable_ends(tmp_path):
    with pytest.raises(UserError, match="2 of 5 images .*empty file"):
        data.ImageFolder(tree(tmp_path / "one", {"a": 3}, a__x_png=b"", a__y_png=b""), 16)
    source = data.ImageFolder(tree(tmp_path / "two", {"a": 0}, a__x_png=b"x", a__y_png=b"y"), 16, max_bad=1.0)
    with pytest.raises(UserError, match="in a row are unreadable"):
        source.record(0, 0)


def test_what_is_missing_is_said(tmp_path):
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    flat = tree(tmp_path, {"flat": 3}) / "flat"
    for name, match in (("nowhere", "no folder .*nowhere.*looked at"), ("file", "no folder .*file"),
                        ("empty", r"no images in .*\.jpg \.jpeg \.png \.webp"),
                        ("flat", "no class folder: its 3 images")):
        with pytest.raises(UserError, match=match):
            data.ImageFolder(tmp_path / name, 16)
    with pytest.raises(UserError, match="random or center"):
        data.ImageFolder(flat, 16, crop="middle")
    source = data.ImageFolder(flat, 16, classes=False)
    assert source.classes == [] and "label" not in source.record(1, 0) and len(source) == 3


def test_images_outside_class_folders_are_left_out_aloud(tmp_path, capsys):
    root = tree(tmp_path / "set", {"a": 2}, stray_png=encoded(smooth(20, 30), "PNG"))
    assert len(data.ImageFolder(root, 16)) == 2 and "1 images" in capsys.readouterr().err
    assert len(data.ImageFolder(root, 16, classes=False)) == 3


# ---------------------------------------------------------------- config to batches

def test_open_source_refuses_what_the_model_cannot_use(tmp_path):
    root = str(tree(tmp_path / "set", {"a": 2, "b": 2}))
    assert data.open_source(Config(data=root, model=MODEL)).classes == ["a", "b"]
    assert data.open_source(Config(data=root, model=replace(MODEL, semantics="none"))).classes == []
    with pytest.raises(UserError, match="no captions .*semantics=text"):
        data.open_source(Config(data=root, model=replace(MODEL, semantics="text")))
    with pytest.raises(UserError, match="no folder 'shapez'.*data is shapes"):
        data.open_source(Config(data="shapez"))
    with pytest.raises(UserError, match="channels=4"):
        data.open_source(Config(data=root, model=replace(MODEL, channels=4)))
    with pytest.raises(UserError, match="no class folder"):
        data.open_source(Config(data=str(Path(root) / "a"), model=MODEL))


def test_open_source_varies_what_augment_names(tmp_path):
    root = str(tree(tmp_path / "set", {"a": 2}))
    all3 = {"size", "crop", "flip"}
    for augment, shapes, folder in (("crop+flip+size", all3, all3), ("flip", {"flip"}, all3),
                                    ("", set(), {"size", "crop"})):
        assert set(data.open_source(Config(augment=augment)).controls) == shapes
        source = data.open_source(Config(augment=augment, data=root, model=MODEL))
        assert set(source.controls) == folder and source.random == ("crop" in augment)
    with pytest.raises(UserError, match="augment='flip.zoom' names 'zoom'; there are crop, flip, size"):
        data.open_source(Config(augment="flip+zoom"))


def test_shapes_come_with_text_by_config():
    cfg = Config(model=replace(Config().model, resolution=16))
    source, encoder = data.open_source(cfg), data.text_encoder(cfg)
    batch = data.fetch(source, encoder, cfg.seed, 12, 6, 3, 1)
    assert batch["image"].shape == (6, 3, 16, 16) and batch["text"].shape == (6, encoder.length, encoder.dim)
    assert batch["lengths"].tolist() == [len(caption.split()) for caption in batch["caption"]]
    index, _ = data.index_and_epoch(np.arange(42, 48), len(source), cfg.seed)
    assert batch["index"].tolist() == index.tolist()
    assert data.text_encoder(Config(model=MODEL)) is None and isinstance(source, data.Shapes)
    assert "text" not in data.fetch(source, None, 0, 2, 2, 0, 0)


def test_records_of_a_step_do_not_depend_on_microbatch_or_workers(tmp_path):
    source = data.ImageFolder(tree(tmp_path / "set", {"a": 7, "b": 6}), 16)
    batches = {}
    for micro, workers in ((12, 0), (12, 1), (4, 4), (3, 2), (1, 4)):
        fetch = partial(data.fetch, source, None, 5, 12, micro)
        keys = [(step, m) for step in range(2) for m in range(12 // micro)]
        parts = list(data.prefetch(fetch, keys, workers))
        batches[micro, workers] = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
    assert all(same(batch, batches[12, 0]) for batch in batches.values())
    assert len(set(batches[12, 0]["index"][:13].tolist())) == 13        # 24 positions reach into epoch 1


# ---------------------------------------------------------------- read-ahead

@pytest.mark.parametrize("workers", [0, 1, 4])
def test_prefetch_keeps_the_order_and_raises_at_the_key(workers):
    def slow_first(k, scale):
        time.sleep(0.01 * (k % 3 == 0))
        if k == 11:
            raise KeyError("eleven")
        return k * scale

    got = []
    with pytest.raises(KeyError, match="eleven"):
        for value in data.prefetch(slow_first, ((k, 10) for k in range(20)), workers):
            got.append(value)
    assert got == [10 * k for k in range(11)] and not running()


def running():
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetch_reads_no_further_ahead_than_it_says_and_leaves_no_thread():
    asked, done = [], []
    keys = ((asked.append(k) or k,) for k in range(1000))
    reader = data.prefetch(lambda k: time.sleep(0.005) or done.append(k) or k, keys, workers=2, depth=3)
    assert not running()
    assert [next(reader) for _ in range(5)] == [0, 1, 2, 3, 4] and running()
    assert len(asked) <= 5 + 2 * 3
    reader.close()
    assert not running() and len(done) < len(asked) <= 11


# ---------------------------------------------------------------- looking

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
    font = data.ImageFont.load_default(size=11)
    assert pictures._wrap("many words " * 99, font, 96)[-1].endswith("[...]")
    assert pictures._wrap("one\ntwo", font, 96) == ["one", "two"]


def test_titles():
    image = torch.zeros(2, 3, 4, 4)
    assert data.titles({"image": image, "caption": ["x", "y"], "label": torch.tensor([1, 0])}) == ["x", "y"]
    assert data.titles({"image": image, "label": torch.tensor([1, 0])}, ["a", "b"]) == ["b", "a"]
    assert data.titles({"image": image, "label": torch.tensor([1, 0])}) == ["class 1", "class 0"]
    assert data.titles({"image": image}) == ["", ""]


def test_check_names_what_it_finds_and_draws_it(tmp_path):
    root = tree(tmp_path / "set", {"ant": 3, "bee": 4}, ant__broken_jpg=b"x", size=(50, 40))
    call = [sys.executable, str(Path(data.__file__)), "--check", str(root), "--resolution=45"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("4  ant", "4  bee", "8 images, 1 broken", "40 to 40 pixels, 7 of them below 45"):
        assert part in done.stdout
    assert "ant/broken.jpg" in done.stderr and Image.open(tmp_path / "check.png").width > 500
    done = subprocess.run(call[:3] + ["nowhere"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: no folder 'nowhere'")
