"""data: the sample stream, what a config opens, prefetching, --check."""
import re
import runpy
import sys
import threading
import time
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
from runtime import plot
from runtime.plot import to_uint8
from sources import folders
from test_folders import captioned, same, tree
from test_images import smooth
from text import make_encoder

MODEL = replace(Config().model, semantics="class", resolution=16)


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


def test_epochs_and_seeds_have_their_own_order_and_positions_can_be_queried_in_any_order():
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
    source = data.Shapes(8)
    whole, _ = data.index_and_epoch(np.arange(168, 192), len(source), 1)
    for micro in (1, 3, 8, 24):
        parts = [data.load_microbatch(source, None, 1, 24, micro, 7, m)["index"] for m in range(24 // micro)]
        assert np.array_equal(np.concatenate(parts), whole)


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
        for control in every:
            for augment in ["+".join(c for c in every if c != control), "", control]:
                cfg = Config(data=name, augment=augment, model=replace(MODEL, controls=control))
                if control in own or control in augment:
                    assert control in data.open_source(cfg).controls
                    continue
                with pytest.raises(UserError, match=f"controls='{control}'.* does not vary {control} with") as error:
                    data.open_source(cfg)
                cure = re.search(r"--augment=([\w+]+)$", str(error.value))[1]
                assert set(cure.split("+")) == {control, *augment.split("+")} - {""}
                assert control in data.open_source(replace(cfg, augment=cure)).controls
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
    taken, done = [], []
    keys = ((taken.append(k) or k,) for k in range(1000))
    reader = data.prefetch(lambda k: time.sleep(0.005) or done.append(k) or k, keys, workers=2, depth=3)
    assert not running()
    assert [next(reader) for _ in range(5)] == [0, 1, 2, 3, 4] and running()
    assert len(taken) <= 5 + 2 * 3
    reader.close()
    assert not running() and len(done) < len(taken) <= 11


# ---------------------------------------------------------------- looking

def test_to_uint8_is_the_inverse_of_scaling_rounds_and_clamps():
    every = torch.arange(256.0)
    assert to_uint8((every / 127.5 - 1).view(1, 1, 16, 16)).flatten().tolist() == list(range(256))
    near = torch.tensor([-9.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1 - 0.6 / 127.5, 1.0, 9.0]).view(1, 1, 1, 7)
    assert torch.equal(plot.from_uint8(np.arange(256, dtype=np.uint8)), every / 127.5 - 1)
    assert to_uint8(near).flatten().tolist() == [0, 0, 0, 1, 254, 255, 255]
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = to_uint8(x)
    assert out.dtype == np.uint8 and out.shape == (2, 4, 5, 3)
    assert out[1, 2, 4, 0] == to_uint8(x[1:, :1, 2:3, 4:]).item()


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
                 "captions of 1 to 2 words", "6 images, 2 broken", "4 of them below 45"):
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
