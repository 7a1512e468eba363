"""data: the sample stream, folders with all their faults, what a config opens, read-ahead."""
import hashlib
import io
import json
import os
import re
import runpy
import sys
import threading
import time
import tracemalloc
from array import array
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import data
from config import Config, UserError
from sources import folders
from text import make_encoder

MODEL = replace(Config().model, semantics="class", resolution=16)


def smooth(h, w):
    """A picture in which red says how far right a pixel is and green how far down."""
    x, y = np.meshgrid(np.arange(w) / (w - 1), np.arange(h) / (h - 1))
    return Image.fromarray(np.stack([255 * x, 255 * y, 0 * x], axis=-1).round().astype(np.uint8))


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


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

@settings(max_examples=30, deadline=None)
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
    whole = data.stream_positions(7, 0, 24, 24)
    assert whole.tolist() == list(range(168, 192))
    for micro in (1, 3, 8):
        parts = [data.stream_positions(7, m, 24, micro) for m in range(24 // micro)]
        assert np.array_equal(np.concatenate(parts), whole)


# ---------------------------------------------------------------- folders

def test_a_folder_of_class_folders(tmp_path):
    source = data.ImageFolder(tree(tmp_path / "set", {"zebra": 3, "ant": 2, "Bee/deep": 1}), 16)
    assert source.classes == ["Bee", "ant", "zebra"] and len(source) == 6
    assert list(source.names)[:2] == ["Bee/deep/000.png", "ant/000.png"] and list(source.labels) == [0, 1, 1, 2, 2, 2]
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
    source = data.ImageFolder(tmp_path, 20, flip=False, side=None)
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
    assert data.ImageFolder(root, 16, annotated=False).fingerprint != first
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
    assert list(source.names) == ["a/000.png", "a/001.png", "a/002.png", "a/UPPER.JPG"]
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
    assert list(source.names) == ["cat/000.png", "cat/001.png"] and list(source.bad) == ["cat/gone.png"]


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
    with pytest.raises(UserError, match=r"2 of 33 images .*bad0\.jpg.*bad1\.jpg.*--max_bad_fraction=0\.01"):
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
                        ("flat", "no images in class folders of .*3 unusable .*semantics=text or none")):
        with pytest.raises(UserError, match=match):
            data.ImageFolder(tmp_path / name, 16)
    source = data.ImageFolder(flat, 16, annotated=False)
    assert source.classes == [] and "label" not in source.record(1, 0) and len(source) == 3


def test_images_outside_class_folders_are_left_out_aloud(tmp_path, capsys):
    root = tree(tmp_path / "set", {"a": 2}, stray_png=encoded(smooth(20, 30), "PNG"))
    assert len(data.ImageFolder(root, 16)) == 2 and "stray.png" in capsys.readouterr().err
    assert len(data.ImageFolder(root, 16, annotated=False)) == 3


def test_parts_of_a_data_set_are_no_classes(tmp_path):
    tree(tmp_path, {"train/ant": 2, "train/bee": 1, "val/ant": 1})
    with pytest.raises(UserError, match="train, val, which are splits.*--data=.*/train$"):
        data.ImageFolder(tmp_path, 16)
    assert data.ImageFolder(tmp_path / "train", 16).classes == ["ant", "bee"]
    assert len(data.ImageFolder(tmp_path, 16, annotated=False)) == 4


def test_only_the_first_unreadable_files_are_named(tmp_path, capsys):
    root = tree(tmp_path / "set", {"a": 1}, **{f"a__bad{k:02}_jpg": b"" for k in range(30)})
    assert len(data.ImageFolder(root, 16, max_bad=1.0).bad) == 30
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and lines[-1].endswith("the next ones are not named")


# ---------------------------------------------------------------- folders of millions

def test_files_are_found_in_the_order_of_their_names(tmp_path):
    names = ["a/b.png", "a/b/c.png", "a-b/x.png", "a.png", "a/c-/d.png", "a/c/d.png", "a0/x.png", "aé/x.png",
             "b.JPG/y.png", "b.png/z.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    found = list(folders.walk(tmp_path, (".png",)))
    assert found == sorted((name, len(name)) for name in names)
    assert folders.index_classes(["a-b/x", "a/x", "a0/y", "a/z"]) == (["a", "a-b", "a0"], array("i", [1, 0, 2, 0]))


def test_a_file_costs_one_look(tmp_path, monkeypatch):
    tree(tmp_path / "set", {"a": 30, "b": 30})
    looked, real = [], os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **kw: looked.append(args) or real(*args, **kw))
    assert len(data.ImageFolder(tmp_path / "set", 16)) == 60 and len(looked) < 10


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(codec=None), max_size=9)))
def test_names_are_those_that_were_given(texts):
    names = folders.Names(texts)
    assert list(names) == texts == [names[k] for k in range(len(texts))] and len(names) == len(texts)
    assert not texts or names[-1] == texts[-1]
    with pytest.raises(IndexError):
        names[len(texts)]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="their names are text")
def test_a_name_that_is_not_utf_8_opens(tmp_path):
    root = tree(tmp_path / "set", {"a": 1})
    os.rename(root / "a" / "000.png", os.fsencode(root / "a") + b"/caf\xe9.png")
    source = data.ImageFolder(root, 16)
    assert source.names[0] == "a/caf\udce9.png" and source.record(0, 0)["index"] == 0 and not source.bad


def test_the_fingerprint_of_a_folder_is_the_same_for_ever(tmp_path):
    """Else a run that was begun before could not go on."""
    pairs, classes = [("a/'x.png", 3), ("b/caf\udce9 \"y.jpg", 2 ** 40)], ["a", "b\n"]
    for files in ([], pairs[:1], pairs):
        want = hashlib.sha256(ascii((files, classes)).encode()).hexdigest()
        assert folders.fingerprint([name for name, _ in files], [size for _, size in files], classes) == want


def test_fourteen_million_names_fit_into_memory(tmp_path, monkeypatch):
    """4,000 names for the 14 million of ImageNet-22k: bytes a file while it is opened, and afterwards."""
    n = 4_000
    monkeypatch.setattr(folders, "walk", lambda root, suffixes: (
        (f"n{k // 650:08}/n{k // 650:08}_{k}.JPEG", 1000 + k) for k in range(n)))
    data.ImageFolder(tmp_path, 16)
    tracemalloc.start()
    source = data.ImageFolder(tmp_path, 16)
    stays, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == n and source.labels[n - 1] == len(source.classes) - 1 == 6
    assert stays / n < 55 and peak / n < 80, (stays / n, peak / n)


# ---------------------------------------------------------------- folders of captions

def captioned(root):
    """Pictures with captions of both kinds at two depths: a/0 and a/1 by .txt, b/0 and b/c/0 by metadata."""
    tree(root, {"a": 2, "b": 1, "b/c": 1})
    (root / "a" / "000.txt").write_text("a  first\n", encoding="utf-8")
    (root / "a" / "001.TXT").write_text("a second", encoding="utf-8")
    (root / "b" / "000.txt").write_text("not this", encoding="utf-8")
    rows = [{"file_name": "000.png", "text": "b first"}, {"file_name": "c/000.png", "text": ["one", "two", "three"]}]
    (root / "b" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def test_a_folder_of_captions(tmp_path):
    source = folders.CaptionFolder(captioned(tmp_path / "set"), 16)
    assert source.names == ["a/000.png", "a/001.png", "b/000.png", "b/c/000.png"] and not source.bad
    batch = data.records(source, [0, 1, 2, 3], [0] * 4)
    assert batch["caption"][:3] == ["a first", "a second", "b first"] and "label" not in batch
    drawn = [source.record(3, epoch)["caption"] for epoch in range(300)]
    counts = np.array([drawn.count(text) for text in ("one", "two", "three")])
    assert ((counts - 100) ** 2 / 100).sum() < 14 and source.record(3, 7)["caption"] == drawn[7]
    assert folders.CaptionFolder(tmp_path / "set", 16, seed=1).record(3, 0)["crop"] != source.record(3, 0)["crop"]


def test_captions_and_classes_show_the_same_pictures(tmp_path):
    root = captioned(tmp_path / "set")
    a, b = (make(root, 16).record(2, 5) for make in (folders.CaptionFolder, data.ImageFolder))
    assert all(torch.equal(a[k], b[k]) if k == "image" else a[k] == b[k] for k in ("image", "size", "crop", "flip"))


def test_the_fingerprint_of_captions_is_of_pictures_and_texts(tmp_path):
    root, seen = captioned(tmp_path / "set"), set()
    for change in (lambda: None, lambda: (root / "a" / "000.txt").write_text("a first, longer"),
                   lambda: (root / "b" / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "b other"}'),
                   lambda: (root / "a" / "001.png").unlink()):
        change()
        seen.add(folders.CaptionFolder(root, 16, max_bad=0.9).fingerprint)
        assert folders.CaptionFolder(root, 32, seed=2, max_bad=0.9).fingerprint in seen
    assert len(seen) == 4


# ---------------------------------------------------------------- config to batches

def test_what_a_path_is(tmp_path):
    root = captioned(tmp_path / "set")
    text = replace(MODEL, semantics="text")
    for semantics, kind in (("text", folders.CaptionFolder), ("class", data.ImageFolder), ("none", data.ImageFolder)):
        cfg = Config(data=str(root), model=replace(MODEL, semantics=semantics))
        assert data.source_type(cfg.data) == "folder" and type(data.open_source(cfg)) is kind
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "meta.json").write_text("{}")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(b"")
    names = {"shapes": "shapes", "coco:x": "coco", str(tmp_path / "latents"): "latents",
             str(tmp_path / "tars"): "tars", "x/{0..3}.tar": "tars", "x.tar": "tars", "nowhere": "folder"}
    assert {name: data.source_type(name) for name in names} == names and set(names.values()) == set(data.SOURCES)
    for name in ("coco:x", str(tmp_path / "tars")):
        with pytest.raises(UserError, match="captions and no classes; use --model.semantics=text"):
            data.open_source(Config(data=name, model=MODEL))
    with pytest.raises(UserError, match="1 of the 1 tar shards|not there"):
        data.open_source(Config(data="x.tar", model=text))


def test_captions_of_other_words_are_refused_before_the_first_step(tmp_path):
    cfg = Config(data=str(captioned(tmp_path / "set")), model=replace(MODEL, semantics="text"))
    source, words = data.open_source(cfg), make_encoder(cfg)
    with pytest.raises(UserError, match="encoder=words knows .* shapes only.* 'a first'; .*clip:PATH"):
        data.check_words(source, words, cfg)
    data.check_words(source, None, cfg), data.check_words(data.open_source(Config()), words, Config())
    source.texts = ["a red ring"] * 4
    data.check_words(source, words, cfg)


def test_captions_go_round(tmp_path):
    source = folders.CaptionFolder(captioned(tmp_path / "set"), 16)
    assert data.cyclic_batch(source, [5, 0, 2])["caption"] == ["a second", "a first", "b first"]
    shapes = data.Shapes(16)
    assert data.cyclic_batch(shapes, [3])["caption"] == shapes.records([3])["caption"]


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
    with pytest.raises(UserError, match="no images in class folders"):
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


@pytest.mark.parametrize("name, low, high", [("global", 0.9, 1), ("local", 0.4, 0.6), ("mix", 0.4, 1)])
def test_crop_names_the_range_of_sides_of_both_sources(tmp_path, name, low, high):
    (tmp_path / "set" / "c").mkdir(parents=True)
    H, W, n = 100, 130, 150
    smooth(H, W).save(tmp_path / "set" / "c" / "x.png")
    cfg = Config(data=str(tmp_path / "set"), crop=name, model=MODEL)
    R, source = MODEL.resolution, data.open_source(cfg)
    down = torch.stack([source.record(0, epoch)["image"][1].mean(1) for epoch in range(n)])     # green, (n, R)
    sides = (down[:, -1] - down[:, 0]) / 2 * (H - 1) * R / (R - 1) / H
    assert low - 0.02 < sides.min() < low + 0.05 and high - 0.05 < sides.max() < high + 0.02
    assert abs(sides.mean() - (low + high) / 2) < 5 * (high - low) * (1 / 12 / n) ** 0.5 + 0.01
    assert data.open_source(replace(cfg, augment="flip")).side == (1, 1)                       # the largest square

    assert data.open_source(Config(crop=name)).side == ((1, 1) if name == "global" else (low, high))
    assert data.open_source(Config(crop=name, augment="flip")).side == (1, 1)


def test_an_unknown_crop_is_named():
    for source in ("shapes", "nowhere"):
        with pytest.raises(UserError, match="crop='centre'; there are global, local, mix"):
            data.open_source(Config(data=source, crop="centre", augment=""))


def test_a_control_that_the_data_does_not_vary_is_an_error_that_says_what_would(tmp_path):
    root = str(tree(tmp_path / "set", {"a": 2}))
    every = ("crop", "flip", "size")
    for name, own in (("shapes", ()), (root, ("crop", "size"))):
        for asked in every:
            for augment in ["+".join(c for c in every if c != asked), "", asked]:
                cfg = Config(data=name, augment=augment, model=replace(MODEL, controls=asked))
                if asked in own or asked in augment:
                    assert asked in data.open_source(cfg).controls
                    continue
                with pytest.raises(UserError, match=f"controls='{asked}'.* does not vary {asked} with") as error:
                    data.open_source(cfg)
                cure = re.search(r"--augment=([\w+]+)$", str(error.value))[1]
                assert set(cure.split("+")) == {asked, *augment.split("+")} - {""}
                assert asked in data.open_source(replace(cfg, augment=cure)).controls
    with pytest.raises(UserError, match=r"vary size and crop with augment='flip'; .*--augment=crop\+flip\+size"):
        data.open_source(Config(augment="flip", model=replace(MODEL, controls="size+crop+flip")))


def test_shapes_come_with_text_by_config():
    cfg = Config(model=replace(Config().model, resolution=16))
    source, encoder = data.open_source(cfg), make_encoder(cfg)
    batch = data.load_microbatch(source, encoder, cfg.seed, 12, 6, 3, 1)
    assert batch["image"].shape == (6, 3, 16, 16) and batch["text"].shape == (6, encoder.length, encoder.dim)
    assert batch["lengths"].tolist() == [len(caption.split()) for caption in batch["caption"]]
    index, _ = data.index_and_epoch(np.arange(42, 48), len(source), cfg.seed)
    assert batch["index"].tolist() == index.tolist()
    assert make_encoder(Config(model=MODEL)) is None and isinstance(source, data.Shapes)
    assert "text" not in data.load_microbatch(source, None, 0, 2, 2, 0, 0)


def test_records_of_a_step_do_not_depend_on_microbatch_or_workers(tmp_path):
    source = data.ImageFolder(tree(tmp_path / "set", {"a": 7, "b": 6}), 16)
    batches = {}
    for micro, workers in ((12, 0), (12, 1), (4, 4), (3, 2), (1, 4)):
        fetch = partial(data.load_microbatch, source, None, 5, 12, micro)
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

def test_to_uint8_is_the_inverse_of_scaling_rounds_and_clamps():
    every = torch.arange(256.0)
    assert data.to_uint8((every / 127.5 - 1).view(1, 1, 16, 16)).flatten().tolist() == list(range(256))
    near = torch.tensor([-9.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1 - 0.6 / 127.5, 1.0, 9.0]).view(1, 1, 1, 7)
    assert data.to_uint8(near).flatten().tolist() == [0, 0, 0, 1, 254, 255, 255]
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = data.to_uint8(x)
    assert out.dtype == np.uint8 and out.shape == (2, 4, 5, 3)
    assert out[1, 2, 4, 0] == data.to_uint8(x[1:, :1, 2:3, 4:]).item()


def test_titles():
    image = torch.zeros(2, 3, 4, 4)
    assert data.titles({"image": image, "caption": ["x", "y"], "label": torch.tensor([1, 0])}) == ["x", "y"]
    assert data.titles({"image": image, "label": torch.tensor([1, 0])}, ["a", "b"]) == ["b", "a"]
    assert data.titles({"image": image, "label": torch.tensor([1, 0])}) == ["class 1", "class 0"]
    assert data.titles({"image": image}) == ["", ""]


def checked(tmp_path, monkeypatch, capsys, root, *rest):
    monkeypatch.chdir(tmp_path)
    data.check(str(root), *rest)
    width = Image.open(tmp_path / "check.png").width
    assert width > 500
    return capsys.readouterr().out


def test_check_counts_captions_and_names_every_broken_file(tmp_path, monkeypatch, capsys):
    root = captioned(tmp_path / "set")
    (root / "a" / "002.png").write_bytes(b"x")
    (root / "a" / "002.txt").write_text("word " * 80)
    (root / "a" / "003.png").write_bytes(b"")
    shown = checked(tmp_path, monkeypatch, capsys, root, 45)
    for part in ("broken: 'a/002.png': not a JPEG, PNG or WebP image", "broken: 'a/003.png': empty file",
                 "captions of 1 to 2 words", "6 images, 2 broken", "4 of them below 45", "1  broken: not a JPEG"):
        assert part in shown, (part, shown)
    (root / "a" / "000.txt").write_text("word " * 80)
    assert "1 certainly too long" in checked(tmp_path, monkeypatch, capsys, root, 45)
    assert "2 of them decoded" in checked(tmp_path, monkeypatch, capsys, root, 16, 2)


def test_check_opens_flat_folders_shows_shapes_and_refuses_latents(tmp_path, monkeypatch, capsys):
    assert "3 images, 0 broken" in checked(tmp_path, monkeypatch, capsys, tree(tmp_path, {"flat": 3}) / "flat", 16)
    shown, grid = {}, data.grid
    monkeypatch.setattr(data, "grid", lambda images, columns, texts: shown.update(
        zip(texts, images)) or grid(images, columns, texts))
    assert checked(tmp_path, monkeypatch, capsys, "shapes", 16) == "16 of them are in check.png\n"
    source = data.open_source(Config(augment="crop+flip+size", model=replace(MODEL, semantics="text")))
    batch = data.load_microbatch(source, None, 0, 16, 16, 0, 0)
    for k, text in enumerate(shown):
        assert text.startswith(batch["caption"][k]) and f"flip {batch['flip'][k]:.0f}" in text
        assert f"size {batch['size'][k, 0]:.0f}" in text and torch.equal(shown[text], batch["image"][k])
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="python latents.py check shows it"):
        data.check(str(tmp_path / "latents"), 16)


def test_the_command_names_what_it_finds_and_draws_it(tmp_path, monkeypatch, capsys):
    root = tree(tmp_path / "set", {"ant": 3, "bee": 4}, ant__broken_jpg=b"x", size=(50, 40))
    monkeypatch.chdir(tmp_path)
    codes = []
    for place in (str(root), "nowhere"):
        monkeypatch.setattr(sys, "argv", ["data.py", "--check", place, "--resolution=45"])
        try:
            runpy.run_path(data.__file__, run_name="__main__")
        except SystemExit as e:
            codes.append(e.code or 0)
    out, err = capsys.readouterr()
    for part in ("4  ant", "4  bee", "8 images, 1 broken", "40 to 40 pixels, 7 of them below 45"):
        assert part in out
    assert "ant/broken.jpg" in err and Image.open(tmp_path / "check.png").width > 500
    assert codes in ([2], [0, 2]) and "error: no folder 'nowhere'" in err
