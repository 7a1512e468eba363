"""folders: class folders and captioned folders with all their faults, and millions of names."""
import hashlib
import json
import os
import sys
import tracemalloc
from array import array

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import data
from config import UserError
from sources import folders
from sources.folders import CaptionFolder, ImageFolder
from test_images import encoded, smooth


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


# ---------------------------------------------------------------- folders

def test_a_folder_of_class_folders(tmp_path):
    source = ImageFolder(tree(tmp_path / "set", {"zebra": 3, "ant": 2, "Bee/deep": 1}), 16)
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
    source = ImageFolder(tmp_path, R, side=(0.5, 0.9))
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
    source = ImageFolder(tmp_path, 20, flip=False, side=None)
    rows = [source.record(0, epoch) for epoch in range(8)]
    assert all(torch.equal(row["image"], rows[0]["image"]) and row["flip"] == 0 for row in rows)
    assert rows[0]["crop"][0] == 0 and abs(rows[0]["crop"][1] - 20 * 20 / 60) < 0.5
    assert abs(rows[0]["image"].mean((1, 2))[:2]).max() < 0.02 and source.controls == ("size", "crop")


def test_augmentation_differs_by_epoch_and_seed_and_flip_can_be_off(tmp_path):
    root = tmp_path / "set"
    (root / "c").mkdir(parents=True)
    smooth(90, 120).save(root / "c" / "x.png")
    crops = [ImageFolder(root, 16, seed).record(0, epoch)["crop"] for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(crops)) == 4
    off = ImageFolder(root, 16, flip=False)
    assert not any(off.record(0, epoch)["flip"] for epoch in range(20)) and off.controls == ("size", "crop")


def test_fingerprint_is_names_sizes_and_classes_and_nothing_else(tmp_path):
    root = tree(tmp_path / "set", {"a": 2, "b": 2})
    first = ImageFolder(root, 16).fingerprint
    os.utime(root / "a" / "000.png", (1, 1))
    (root / "a" / "notes.txt").write_text("x")
    (root / "a" / "._000.png").write_text("x")
    assert ImageFolder(root, 32, seed=5).fingerprint == first and len(first) == 64
    assert ImageFolder(root, 16, annotated=False).fingerprint != first
    with open(root / "b" / "001.png", "ab") as file:
        file.write(b"x")
    second = ImageFolder(root, 16).fingerprint
    (root / "b").rename(root / "c")
    assert len({first, second, ImageFolder(root, 16).fingerprint}) == 3


def test_only_regular_files_with_content_count(tmp_path, capsys):
    root = tree(tmp_path / "set", {"a": 3}, a__empty_jpg=b"")
    (root / "a" / "folder.jpg").mkdir()
    (root / "a" / "UPPER.JPG").write_bytes(encoded(smooth(20, 30), "JPEG"))
    (root / ".hidden").mkdir()
    Image.new("RGB", (20, 30)).save(root / ".hidden" / "x.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "a" / "pipe.png")
    source = ImageFolder(root, 16, max_bad=0.5)
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
    source = ImageFolder(root, 16)
    assert list(source.names) == ["cat/000.png", "cat/001.png"] and list(source.bad) == ["cat/gone.png"]


def test_unreadable_files_are_named_once_and_replaced_by_the_same_others(tmp_path, capsys):
    jpeg = encoded(smooth(40, 52), "JPEG")
    root = tree(tmp_path / "set", {"a": 20, "b": 20}, a__005b_jpg=jpeg[:300], b__page_jpg=b"<html>")
    make = lambda: ImageFolder(root, 16, max_bad=0.1)
    source = make()
    index, epoch = list(range(len(source))) * 2, [0] * len(source) + [1] * len(source)
    batch = data.records(source, index, epoch)
    assert set(source.bad) == {"a/005b.jpg", "b/page.jpg"}
    assert source.bad["b/page.jpg"] == "not a JPEG, PNG or WebP image"
    assert capsys.readouterr().err.count("page.jpg") == 1

    replaced = [k for k in range(len(index)) if batch["index"][k] != index[k]]
    assert len(replaced) == 4 and not {source.names[k] for k in batch["index"]} & set(source.bad)
    assert batch["label"].tolist() == [source.labels[k] for k in batch["index"]]
    late = make()                                       # read backwards, one by one, by another process
    rows = [late.record(index[k], epoch[k]) for k in reversed(range(len(index)))][::-1]
    assert same(data.collate(rows), batch)


def test_too_many_unreadable_files_stop_the_run(tmp_path):
    root = tree(tmp_path / "set", {"a": 30}, **{f"a__bad{k}_jpg": b"x" for k in range(3)})
    tight, loose, none = (ImageFolder(root, 16, max_bad=share) for share in (0.01, 0.1, 0.0))
    bad = [k for k, name in enumerate(tight.names) if "bad" in name]
    assert tight.record(bad[0], 0) and tight.record(bad[0], 1)              # the same file counts once
    with pytest.raises(UserError, match=r"2 of 33 images .*bad0\.jpg.*bad1\.jpg.*--max_bad_fraction=0\.01"):
        tight.record(bad[1], 0)
    assert [loose.record(k, 0)["index"] not in bad for k in bad] == [True] * 3
    with pytest.raises(UserError, match="1 of 33"):
        none.record(bad[0], 0)


def test_empty_files_count_at_the_start_and_nothing_readable_ends(tmp_path):
    with pytest.raises(UserError, match="2 of 5 images .*empty file"):
        ImageFolder(tree(tmp_path / "one", {"a": 3}, a__x_png=b"", a__y_png=b""), 16)
    source = ImageFolder(tree(tmp_path / "two", {"a": 0}, a__x_png=b"x", a__y_png=b"y"), 16, max_bad=1.0)
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
            ImageFolder(tmp_path / name, 16)
    source = ImageFolder(flat, 16, annotated=False)
    assert source.classes == [] and "label" not in source.record(1, 0) and len(source) == 3


def test_images_outside_class_folders_are_left_out_aloud(tmp_path, capsys):
    root = tree(tmp_path / "set", {"a": 2}, stray_png=encoded(smooth(20, 30), "PNG"))
    assert len(ImageFolder(root, 16)) == 2 and "stray.png" in capsys.readouterr().err
    assert len(ImageFolder(root, 16, annotated=False)) == 3


def test_parts_of_a_data_set_are_no_classes(tmp_path):
    tree(tmp_path, {"train/ant": 2, "train/bee": 1, "val/ant": 1})
    with pytest.raises(UserError, match="train, val, which are splits.*--data=.*/train$"):
        ImageFolder(tmp_path, 16)
    assert ImageFolder(tmp_path / "train", 16).classes == ["ant", "bee"]
    assert len(ImageFolder(tmp_path, 16, annotated=False)) == 4
    with pytest.raises(UserError, match="which are splits.*--data=.*/train$"):      # --check says the same
        data.check(str(tmp_path), 16)


def test_only_the_first_unreadable_files_are_named(tmp_path, capsys):
    root = tree(tmp_path / "set", {"a": 1}, **{f"a__bad{k:02}_jpg": b"" for k in range(30)})
    assert len(ImageFolder(root, 16, max_bad=1.0).bad) == 30
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
    assert len(ImageFolder(tmp_path / "set", 16)) == 60 and len(looked) < 10


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
    source = ImageFolder(root, 16)
    assert source.names[0] == "a/caf\udce9.png" and source.record(0, 0)["index"] == 0 and not source.bad


def test_the_fingerprint_of_a_folder_is_the_same_for_ever(tmp_path):
    """Otherwise a run that started before could not resume."""
    pairs, classes = [("a/'x.png", 3), ("b/caf\udce9 \"y.jpg", 2 ** 40)], ["a", "b\n"]
    for files in ([], pairs[:1], pairs):
        want = hashlib.sha256(ascii((files, classes)).encode()).hexdigest()
        assert folders.fingerprint([name for name, _ in files], [size for _, size in files], classes) == want


def test_fourteen_million_names_fit_into_memory(tmp_path, monkeypatch):
    """4,000 names for the 14 million of ImageNet-22k: bytes a file while it is opened, and afterwards."""
    n = 4_000
    monkeypatch.setattr(folders, "walk", lambda root, suffixes: (
        (f"n{k // 650:08}/n{k // 650:08}_{k}.JPEG", 1000 + k) for k in range(n)))
    ImageFolder(tmp_path, 16)
    tracemalloc.start()
    source = ImageFolder(tmp_path, 16)
    stays, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == n and source.labels[n - 1] == len(source.classes) - 1 == 6
    assert stays / n < 55 and peak / n < 80, (stays / n, peak / n)


# ---------------------------------------------------------------- folders of captions

def captioned(root):
    """Images with captions of both kinds at two depths: a/0 and a/1 by .txt, b/0 and b/c/0 by metadata."""
    tree(root, {"a": 2, "b": 1, "b/c": 1})
    (root / "a" / "000.txt").write_text("a  first\n", encoding="utf-8")
    (root / "a" / "001.TXT").write_text("a second", encoding="utf-8")
    (root / "b" / "000.txt").write_text("not this", encoding="utf-8")
    rows = [{"file_name": "000.png", "text": "b first"}, {"file_name": "c/000.png", "text": ["one", "two", "three"]}]
    (root / "b" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def test_a_folder_of_captions(tmp_path):
    source = CaptionFolder(captioned(tmp_path / "set"), 16)
    assert source.names == ["a/000.png", "a/001.png", "b/000.png", "b/c/000.png"] and not source.bad
    batch = data.records(source, [0, 1, 2, 3], [0] * 4)
    assert batch["caption"][:3] == ["a first", "a second", "b first"] and "label" not in batch
    texts = [source.record(3, epoch)["caption"] for epoch in range(300)]
    counts = np.array([texts.count(text) for text in ("one", "two", "three")])
    assert ((counts - 100) ** 2 / 100).sum() < 14 and source.record(3, 7)["caption"] == texts[7]
    assert CaptionFolder(tmp_path / "set", 16, seed=1).record(3, 0)["crop"] != source.record(3, 0)["crop"]


def test_captions_and_classes_show_the_same_images(tmp_path):
    root = captioned(tmp_path / "set")
    a, b = (make(root, 16).record(2, 5) for make in (CaptionFolder, ImageFolder))
    assert all(torch.equal(a[k], b[k]) if k == "image" else a[k] == b[k] for k in ("image", "size", "crop", "flip"))


def test_the_fingerprint_of_captions_is_of_images_and_texts(tmp_path):
    root, seen = captioned(tmp_path / "set"), set()
    for change in (lambda: None, lambda: (root / "a" / "000.txt").write_text("a first, longer"),
                   lambda: (root / "b" / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "b other"}'),
                   lambda: (root / "a" / "001.png").unlink()):
        change()
        seen.add(CaptionFolder(root, 16, max_bad=0.9).fingerprint)
        assert CaptionFolder(root, 32, seed=2, max_bad=0.9).fingerprint in seen
    assert len(seen) == 4


