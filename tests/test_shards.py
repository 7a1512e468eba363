"""Tar shards: what a pattern stands for, where samples lie in a tar, one order for all readers, damage."""
import io
import itertools
import json
import os
import pickle
import tarfile
import threading
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import data
from config import UserError
from sources import folders, shards
from test_folders import same

ROOT = Path(__file__).parent.parent


def png(k, h=24, w=30):
    """The bytes of an image in a colour of its own."""
    file = io.BytesIO()
    Image.new("RGB", (w, h), (9 * k % 256, 200 - 3 * k % 200, 7)).save(file, "PNG")
    return file.getvalue()


def sample(k, **about):
    """The three members of a sample."""
    about = {"caption": f"json {k}", "original_height": 300 + k, "original_width": 400, **about}
    members = {"png": png(k), "txt": f"number {k}".encode(), "json": json.dumps(about).encode()}
    return {f"{k:09}.{suffix}": content for suffix, content in members.items()}


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(root, counts):
    root.mkdir()
    numbers = iter(range(sum(counts)))
    for s, count in enumerate(counts):
        parts = [sample(k) for k in itertools.islice(numbers, count)]
        write_tar(root / f"{s:05}.tar", {name: body for part in parts for name, body in part.items()})
    return root


# ---------------------------------------------------------------- patterns

def test_what_a_pattern_stands_for():
    assert shards.expand("a/{008..011}.tar") == ["a/008.tar", "a/009.tar", "a/010.tar", "a/011.tar"]
    assert shards.expand("{8..11}") == ["8", "9", "10", "11"] and shards.expand("plain.tar") == ["plain.tar"]
    assert shards.expand("{a,b}/{1..2}x") == ["a/1x", "a/2x", "b/1x", "b/2x"]
    assert shards.expand("{0..0}{,z}") == ["0", "0z"]
    for wrong in ("{3..1}", "{a..c}", "{1}", "{}", "{1..2", "1..2}", "{{1..2}}", "{0..9999999}", "{0..999999999999999}",
                  "{0..9999}{0..9999}", "{²..3}"):
        with pytest.raises(UserError, match="cannot expand .*rising range such as .*at most 1,000,000 names"):
            shards.expand(wrong)


PLAIN = st.text("abc/.0-", max_size=4)
RANGES = st.tuples(st.integers(0, 60), st.integers(0, 6), st.integers(0, 4))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(PLAIN, RANGES, st.lists(PLAIN, min_size=2, max_size=4)), max_size=4))
def test_patterns_are_the_product_of_their_parts(parts):
    text, choices = "", []
    for part in parts:
        if isinstance(part, str):
            text, one = text + part, [part]
        elif isinstance(part, tuple):
            first, more, zeros = part
            wide = len("0" * zeros + str(first))
            text += f"{{{first:0{wide}}..{first + more}}}"
            one = [str(k).rjust(wide, "0") if zeros else str(k) for k in range(first, first + more + 1)]
        else:
            text, one = text + "{" + ",".join(part) + "}", part
        choices.append(one)
    assert shards.expand(text) == ["".join(p) for p in itertools.product(*choices)]


@settings(max_examples=60, deadline=None)
@given(st.text("{}.,0a9", max_size=14))
def test_any_pattern_is_names_or_an_error(pattern):
    try:
        assert shards.expand(pattern)
    except UserError:
        pass


def test_which_files_a_path_means(tmp_path):
    root = write_shards(tmp_path / "set", [2, 1])
    (root / ".00009.tar").write_bytes(b"")
    both = [root / "00000.tar", root / "00001.tar"]
    for where in (root, root / "{00000..00001}.tar", root / "{00000,00001}.tar"):
        assert data.TarShards.takes(str(where)) and shards.find_shards(str(where)) == both
    assert shards.find_shards(str(root / "00001.tar")) == both[1:]
    with pytest.raises(UserError, match="2 of the 4 tar shards .*00002.tar"):
        shards.find_shards(str(root / "{00000..00003}.tar"))
    (tmp_path / "b{1}").mkdir()
    assert not data.TarShards.takes(str(tmp_path / "b{1}")) and not data.TarShards.takes(str(tmp_path))


# ---------------------------------------------------------------- what is where in a tar

NAMES = st.text("abcdefé0123456789_", min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["", "a/", "é/" + "x" * 120 + "/"]), NAMES, st.sets(st.sampled_from(
    ["jpg", "JPEG", "txt", "json", "seg.png", "pkl"]), min_size=1), st.integers(0, 1500)), min_size=1, max_size=6,
    unique_by=lambda row: row[:2]), st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_an_index_points_at_what_was_written(tmp_path_factory, rows, format):
    rng, members, want = np.random.default_rng(0), {}, []
    for folder, stem, suffixes, size in rows:
        suffixes = suffixes - ({"JPEG"} if "jpg" in suffixes else set())
        found = {}
        for suffix in sorted(suffixes):
            members[f"{folder}{stem}.{suffix}"] = found[suffix.lower()] = rng.bytes(size)
        if kept := {"jpg", "jpeg", "txt", "json"} & found.keys():
            want.append([found.get("jpg", found.get("jpeg")), found.get("txt"), found.get("json")])
            assert kept
    path = write_tar(tmp_path_factory.mktemp("t") / "x.tar", members, format)
    if not want:
        with pytest.raises(UserError, match="holds no samples"):
            shards.index(path)
        return
    table = shards.index(path)
    with open(path, "rb") as file:
        got = [[shards.read_member(file, *row[k:k + 2]) for k in (0, 2, 4)] for row in table.tolist()]
    assert got == want


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 20_000))
def test_a_cut_tar_is_an_error_wherever_it_is_cut(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("t") / "x.tar"
    write_tar(path, {name: body for k in range(6) for name, body in sample(k).items()})
    content = path.read_bytes()
    end = (int(shards.index(path)[:, ::2].max()) + 1) * 512          # of the last member; then comes the end mark
    path.write_bytes(content[:cut % (end + 1024)])
    with pytest.raises(UserError, match="cut, damaged or compressed after byte"):
        shards.index(path)


@settings(max_examples=25, deadline=None)
@given(which=st.integers(0, 17), bit=st.integers(0, 512 * 8 - 1))
def test_a_flipped_bit_of_a_header_is_an_error_or_changes_nothing(tmp_path_factory, which, bit):
    path = tmp_path_factory.mktemp("t") / "x.tar"
    write_tar(path, {name: body for k in range(6) for name, body in sample(k).items()})
    table = shards.index(path)
    content = bytearray(path.read_bytes())
    starts = np.sort(table[:, ::2].ravel()) - 1
    content[int(starts[which]) * 512 + bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))
    try:
        assert np.array_equal(shards.index(path), table)
    except UserError:
        pass


def test_the_index_is_kept_and_made_again_when_the_tar_or_it_has_changed(tmp_path, monkeypatch):
    root, walks = write_shards(tmp_path / "set", [4]), []
    real = shards.members
    monkeypatch.setattr(shards, "members", lambda path: walks.append(path) or real(path))
    tar, kept = root / "00000.tar", root / ".index" / "00000.tar.npy"
    first = shards.cached_index(tar)
    assert np.array_equal(shards.cached_index(tar), first) and len(walks) == 1
    for damage in (b"", kept.read_bytes()[:-7], b"x" * 300, kept.read_bytes()[:-1] + b"\x07"):
        kept.write_bytes(damage)
        assert np.array_equal(shards.cached_index(tar), first)
    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    kept.write_bytes(objects.getvalue())
    assert np.array_equal(shards.cached_index(tar), first) and len(walks) == 6
    write_tar(tar, {**sample(1), **sample(2)})
    os.utime(tar, (1, 1))
    assert len(shards.cached_index(tar)) == 2 and len(walks) == 7


def test_an_index_that_cannot_be_kept_is_a_warning(tmp_path, capsys):
    root = write_shards(tmp_path / "set", [3])
    (root / ".index").write_text("in the way")
    assert len(data.TarShards(root, 8)) == 3 and "the index of 00000.tar not written" in capsys.readouterr().err


# ---------------------------------------------------------------- the source

def test_a_sample_is_the_image_the_text_and_the_size_of_the_original(tmp_path):
    source = data.TarShards(write_shards(tmp_path / "set", [3, 1, 2]), 16)
    assert len(source) == 6 and source.channels == 3 and source.classes == []
    batch = data.records(source, [4, 0, 3], [0, 0, 1])
    assert batch["caption"] == ["number 4", "number 0", "number 3"]
    assert batch["size"].tolist() == [[304, 400], [300, 400], [303, 400]] and batch["index"].tolist() == [4, 0, 3]
    assert source.name(3) == "00001.tar/000000003.png"
    for row, k in zip(batch["image"], (4, 0, 3)):
        colour = np.array([9 * k % 256, 200 - 3 * k % 200, 7], np.float32)
        assert np.abs(row.mean((1, 2)).numpy() - (colour / 127.5 - 1)).max() < 1e-6


def test_size_and_caption_of_the_json(tmp_path):
    bare, odd = {"a.png": png(1), "a.json": b"{}"}, {"b.png": png(2), "b.json": b'{"caption": "from json"}'}
    turned = sample(3, original_height=900, original_width=1600)
    turned["000000003.png"] = png(3, h=40, w=24)                        # stored upright, its original was not
    source = data.TarShards(write_tar(tmp_path / "x.tar", {**odd, **turned, **bare, **sample(5)}), 8, max_bad=0.5)
    row = source.load_record(0, 0)
    assert row["caption"] == "from json" and row["size"] == (24, 30)
    assert source.load_record(1, 0)["size"] == (1600, 900)
    square = {**sample(4), "000000004.png": png(4, h=24, w=24)}         # nothing says that it was turned
    assert data.TarShards(write_tar(tmp_path / "y.tar", square), 8).load_record(0, 0)["size"] == (304, 400)
    with pytest.raises(ValueError, match="a caption is text"):
        source.load_record(2, 0)
    plain = data.TarShards(tmp_path / "x.tar", 8, annotated=False)
    assert len(plain) == 4 and "caption" not in plain.record(2, 0) and plain.fingerprint != source.fingerprint


def test_tars_and_a_folder_of_the_same_files_give_the_same_records(tmp_path):
    tars = data.TarShards(write_shards(tmp_path / "set", [5, 4, 3]), 16, seed=3)
    (tmp_path / "loose").mkdir()
    for k in range(12):
        for name, body in list(sample(k).items())[:2]:
            (tmp_path / "loose" / name).write_bytes(body)
    loose = folders.CaptionFolder(tmp_path / "loose", 16, seed=3)
    keys = [(source, step, m) for source in (tars, loose) for step in (0, 1) for m in range(3)]
    rows = [data.load_microbatch(source, None, 7, 12, 4, step, m) for source, step, m in keys]
    for a, b in zip(rows[:6], rows[6:]):
        a.pop("size"), b.pop("size")                            # of the original, and of the stored image
        assert same(a, b)


def test_order_does_not_depend_on_micro_workers_or_what_was_read_before(tmp_path):
    root, seen = write_shards(tmp_path / "set", [5, 6, 2]), {}
    for micro, workers in ((12, 0), (4, 3), (1, 2)):
        fetch = partial(data.load_microbatch, data.TarShards(root, 8, seed=1), None, 5, 12, micro)
        keys = [(step, m) for step in range(3) for m in range(12 // micro)]
        parts = list(data.prefetch(fetch, keys, workers))
        seen[micro] = {k: torch.cat([p[k] for p in parts]) for k in ("image", "index", "crop", "flip", "size")}
    assert same(seen[12], seen[4]) and same(seen[12], seen[1])
    late = data.load_microbatch(data.TarShards(root, 8, seed=1), None, 5, 12, 12, 2, 0)           # resumed at step 2
    assert torch.equal(late["image"], seen[12]["image"][24:])


def test_the_fingerprint_is_of_names_and_members(tmp_path):
    root = write_shards(tmp_path / "set", [3, 3])
    first = data.TarShards(root, 8).fingerprint
    os.utime(root / "00000.tar", (5, 5))
    assert data.TarShards(root, 32, seed=4).fingerprint == first
    write_tar(root / "00001.tar", {**sample(3), **sample(4), "5.png": png(5), "5.txt": b"other"})
    assert data.TarShards(root, 8).fingerprint != first


def test_readers_at_once_get_what_one_gets(tmp_path):
    source = data.TarShards(write_shards(tmp_path / "set", [7, 8]), 8)
    want, wrong = [source.record(k, 0)["caption"] for k in range(15)], []

    def read():
        wrong.extend(k for k in list(range(15)) * 4 if source.record(k, 0)["caption"] != want[k])

    threads = [threading.Thread(target=read) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


def test_nothing_is_extracted_or_unpickled(tmp_path, monkeypatch):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    bad = {**sample(0), "000000000.pkl": pickle.dumps(Canary()), "../out.jpg": png(1), "/etc/x.jpg": png(1)}
    path = write_tar(tmp_path / "x.tar", {**bad, **sample(2)})
    def refuse(*args, **kwargs):
        raise AssertionError("unsafe")
    for name in ("extract", "extractall", "_extract_member"):
        monkeypatch.setattr(tarfile.TarFile, name, refuse)
    monkeypatch.setattr(pickle, "load", refuse), monkeypatch.setattr(pickle, "loads", refuse)
    source = data.TarShards(path, 8)
    assert len(source) == 2 and len(data.records(source, [0, 1], [0, 0])["caption"]) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"x.tar", ".index"} and not (tmp_path.parent / "out.jpg").exists()


def test_a_tar_that_changes_under_a_run_is_a_bad_sample(tmp_path):
    path = write_tar(tmp_path / "x.tar", {name: body for k in range(4) for name, body in sample(k).items()})
    source = data.TarShards(path, 8)
    path.write_bytes(path.read_bytes()[:512 * 5])
    with pytest.raises(UserError, match="in a row|cannot be read"):
        [source.record(k, 0) for k in range(4)]


def test_many_members_take_little_memory(tmp_path):
    n = 1500
    head = [tarfile.TarInfo(f"{k:09}.{suffix}").tobuf() for k in range(n) for suffix in ("jpg", "txt")]
    (tmp_path / "x.tar").write_bytes(b"".join(head) + bytes(1024))
    tracemalloc.start()
    table = shards.index(tmp_path / "x.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.shape == (n, 6) and (table[:, 2] == table[:, 0] + 1).all()
    assert peak < 1000 * n                                      # a TarInfo takes more than this, and a sample has two
