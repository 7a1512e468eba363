"""Stored tokens: the float16 of what the encoder gives, the same bytes after a kill, read in place of the tower.

No two sizes are equal: L 77, E 6, 4 images a file, 7 captions.
"""
import hashlib
import json
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import latents
import text
import train
from config import Config, ModelConfig, UserError
from sample import Options, SampleConditions
from sources import cached_latents
from sources.cached_latents import Latents, pack_tokens, pad_tokens

L, E, SHARD, N, C, SIDE = 77, 6, 4, 7, 5, 8
TEXTS = ["a red ring", "", "a cat on a mat", "a red ring", "a blue square", "cat", ""]
MODEL = ModelConfig(semantics="text", resolution=SIDE, channels=C, patch=2)


class Encoder:
    """A text encoder whose token of a word depends on the word alone; counts the captions that it encodes."""
    def __init__(self, name="clip:here", weights="w", scale=1.0):
        self.name, self.dim, self.length, self.weights, self.scale, self.count = name, E, L, weights, scale, 0

    def encode_each(self, captions):
        for caption in captions:
            self.count += 1
            words = caption.split()
            keys = [int.from_bytes(hashlib.sha256(w.encode()).digest()[:6], "big") for w in words]
            rows = [torch.randn(E, generator=torch.Generator().manual_seed(key)) for key in keys]
            yield torch.stack(rows) * self.scale if rows else torch.zeros(0, E)

    def encode(self, captions):
        return pad_tokens(list(self.encode_each(captions)), L, E)

    def describe(self):
        return {"name": self.name, "layer": "last", "dim": E, "length": L,
                "sha256": hashlib.sha256(self.weights.encode()).hexdigest()}


def write(root, encoder, meta=None):
    """Latents of N images of noise with the captions TEXTS, the second crop of image k with that of k + 1."""
    root.mkdir(exist_ok=True)
    meta = dict(format=1, autoencoder=dict(path="a", sha256="b", scaling_factor=1.0, shift_factor=0.0),
                data=dict(path="d", fingerprint="f"), n=N, shard=SHARD, variants=2, mirrored=False, resolution=16,
                side=SIDE, channels=C, augment="crop", crop="global", seed=0, controls=["size", "crop"], labels=False,
                captions=True, classes=[], scaling="factor", **(dict(encoder=encoder.describe()) if encoder else {}))
    rng = np.random.default_rng(0)
    for s, part in enumerate(cached_latents.shards(meta)):
        names, rows, lines = cached_latents.file_names(meta, s), np.zeros((len(part), 2), cached_latents.RECORD), b""
        for v in range(2):
            for r, k in enumerate(part):
                line = json.dumps(TEXTS[(k + v) % N]).encode()
                rows[r, v]["caption"] = len(lines), len(lines) + len(line)
                lines += line + b"\n"
        (root / names["captions"]).write_bytes(lines)
        latents.save(root / names["records"], rows)
        shape = cached_latents.latent_shape(meta, len(part))
        latents.save(root / names["latents"], rng.random(shape).astype(np.float16))
        if encoder:
            latents.write_tokens(root, s, meta, encoder)
    np.save(root / cached_latents.ORIGINALS, np.zeros((2, 3, 16, 16), np.uint8))
    latents.write_statistics(root, meta)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("tokens") / "set", Encoder())


def config(root, **other):
    return Config(**dict(data=str(root), augment="crop", encoder="clip:here", model=MODEL) | other)


@pytest.fixture
def tower(monkeypatch):
    """The loaded towers, a list; Encoder in place of CLIP."""
    loaded = []
    monkeypatch.setattr(text, "CLIPText", lambda path, device: loaded.append(Encoder(f"clip:{path}"))
                        or loaded[-1])
    return loaded


# ---------------------------------------------------------------- files

def test_stored_tokens_are_the_float16_of_the_encoded_ones(folder):
    source, encoder = Latents(folder), Encoder()
    batch = source.records(np.arange(N).repeat(30), np.tile(np.arange(30), N))
    assert {k: len(set(np.array(batch["caption"])[batch["index"] == k])) for k in (1, 2, 4)} == {1: 2, 2: 2, 4: 2}
    want, lengths = encoder.encode(batch["caption"])
    assert batch["text"].shape == (30 * N, L, E) and batch["text"].dtype == torch.float32
    assert torch.equal(batch["text"], want.half().float()) and torch.equal(batch["lengths"], lengths)
    assert set(lengths.tolist()) == {0, 1, 3, 5} and not torch.equal(batch["text"], want)
    empty = batch["lengths"] == 0
    assert not batch["text"][empty].any() and empty.sum() > 20


def test_padding_is_not_stored_and_equal_captions_share_tokens(folder):
    for s, part in enumerate(([0, 1, 2, 3, 4], [4, 5, 6, 0])):
        wanted = {TEXTS[k]: len(TEXTS[k].split()) for k in part}
        stored = np.load(folder / f"tokens-{s:05}.npy")
        assert stored.dtype == np.float16 and stored.shape == (sum(wanted.values()), E)
    assert np.load(folder / "spans-00001.npy").shape == (3, 2, 2)


def test_a_caption_is_encoded_once_a_file_independent_of_others(tmp_path):
    encoder = Encoder()
    list(encoder.encode_each(["a cat"]))
    first = write(tmp_path / "a", encoder)
    assert encoder.count == 1 + 4 + 4
    assert {p.name: p.read_bytes() for p in first.iterdir() if "tok" in p.name or "spans" in p.name} == \
        {p.name: p.read_bytes() for p in write(tmp_path / "b", Encoder()).iterdir() if p.name[:3] in ("tok", "spa")}


def test_captions_that_are_all_empty_and_tokens_beyond_float16():
    found, spans = pack_tokens(["", ""], Encoder())
    assert found.shape == (0, E) and spans.tolist() == [[0, 0], [0, 0]]
    with pytest.raises(UserError, match="tokens of clip:here are not finite in float16"):
        pack_tokens(["a cat"], Encoder(scale=1e6))


def test_a_missing_file_of_tokens_is_made_again_from_the_captions(folder, tmp_path):
    root, encoder = write(tmp_path / "set", Encoder()), Encoder()
    meta = cached_latents.read_meta(root)
    for name in ("tokens-00001.npy", "spans-00000.npy"):
        (root / name).unlink()
    images = {k: v for k, v in meta.items() if k != "encoder"}
    assert latents.missing(root, meta) == [0, 1] and latents.missing(root, images) == []
    for s in (0, 1):
        latents.write_tokens(root, s, meta, encoder)
    assert all((root / name).read_bytes() == (folder / name).read_bytes() for name in meta["sha256"])


# ---------------------------------------------------------------- the encoder of stored tokens

def test_training_with_the_same_encoder_loads_no_tower(folder, tower):
    cfg = config(folder)
    source = data.open_source(cfg)
    encoder = text.make_encoder(cfg, source.encoder)
    assert (encoder.dim, encoder.length) == (E, L)
    batch = data.load_microbatch(source, encoder, 0, 6, 6, 3, 0)
    assert torch.equal(batch["text"], Encoder().encode(batch["caption"])[0].half().float()) and not tower
    words, _ = encoder.encode(["a dog"])
    assert torch.equal(words, Encoder().encode(["a dog"])[0]) and len(tower) == 1
    threads = [threading.Thread(target=encoder.encode, args=(["a dog"],)) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(tower) == 1


def test_another_encoder_is_an_error(folder, monkeypatch):
    cfg, stored = config(folder), Latents.open(config(folder)).encoder
    with pytest.raises(UserError, match="encoder='words'.*of 'clip:here'; use --encoder=clip:here"):
        text.make_encoder(replace(cfg, encoder="words"), stored)
    for weights, error in (("w", False), ("other", True)):
        monkeypatch.setattr(text, "CLIPText", lambda path, device: Encoder(f"clip:{path}", weights))
        moved = replace(cfg, encoder="clip:moved")
        if not error:
            assert text.make_encoder(moved, stored).loaded.name == "clip:moved"
            continue
        with pytest.raises(UserError, match="encoder='clip:moved' has sha256 .*of 'clip:here'.*--encoder=clip:here"):
            text.make_encoder(moved, stored)
        with pytest.raises(UserError, match="encoder='clip:here' has sha256 .*of 'clip:here'"):
            text.make_encoder(cfg, stored).encode(["a dog"])         # other weights at the same path


def test_a_run_without_text_reads_no_tokens(folder):
    for semantics in ("none", "text"):
        source = Latents.open(config(folder, model=replace(MODEL, semantics=semantics), encoder="clip:here"))
        assert bool(source.encoder) == ("text" in source.records([0], [0])) == (semantics == "text")


def test_latents_without_tokens_load_the_tower(tmp_path, tower):
    cfg = config(write(tmp_path / "set", None))
    source = data.open_source(cfg)
    assert source.encoder is None and "text" not in source.records([0], [0]) and "encoder" not in source.meta
    encoder = text.make_encoder(cfg, source.encoder)
    assert data.load_microbatch(source, encoder, 0, 6, 6, 0, 0)["text"].shape == (6, L, E) and len(tower) == 1


def test_the_tower_runs_on_cuda_or_the_cpu(monkeypatch):
    loaded = []
    monkeypatch.setattr(text, "CLIPText", lambda path, device: loaded.append((path, device)) or Encoder())
    for device in ("cpu", "mps", torch.device("cuda", 3)):
        text.make_encoder(Config(encoder="clip:x", model=MODEL), None, device)
    assert loaded == [("x", "cpu"), ("x", "cpu"), ("x", torch.device("cuda", 3))]


def test_the_fingerprint_covers_tokens_and_not_the_path_of_their_encoder(tmp_path):
    seen = {}
    for name, encoder in (("none", None), ("here", Encoder()), ("there", Encoder("clip:there")),
                          ("other", Encoder(weights="other"))):
        seen[name] = Latents(write(tmp_path / name, encoder)).fingerprint
    assert seen["here"] == seen["there"] and len(set(seen.values())) == 3


# ---------------------------------------------------------------- sampling

def test_sampling_uses_stored_tokens_and_checks_the_tower_for_new_prompts(folder, tower, monkeypatch):
    cfg = replace(config(folder), model=replace(MODEL, text_dim=E, text_length=L), padding="zero")
    about = train.weights_metadata(cfg, data.open_source(cfg))
    condition, titles = SampleConditions(Options(), cfg, about)(np.arange(5, 9))
    assert titles == data.open_source(cfg).records([5, 6, 0, 1], [0] * 4)["caption"] and not tower
    assert torch.equal(condition.text, Encoder().encode(titles)[0].half().float())
    condition, titles = SampleConditions(Options(prompt="a dog; cat"), cfg, about)(np.arange(2))
    assert torch.equal(condition.text, Encoder().encode(["a dog", "cat"])[0]) and len(tower) == 1
    monkeypatch.setattr(text, "CLIPText", lambda path, device: Encoder(weights="other"))
    with pytest.raises(UserError, match="stored tokens are of 'clip:here'"):
        SampleConditions(Options(prompt="a dog"), cfg, about)


# ---------------------------------------------------------------- damage

def test_damaged_tokens_are_an_error(tmp_path):
    root = write(tmp_path / "set", Encoder())
    meta = json.loads((root / "meta.json").read_text())
    wide, spans = np.load(root / "tokens-00000.npy"), np.load(root / "spans-00000.npy")
    for name, array, named in (("tokens-00000", wide[:, :-1], "float16"), ("tokens-00000", wide.astype(int), "int"),
                               ("tokens-00000", wide[0, 0], "float16"), ("spans-00000", spans[:, :1], "int64"),
                               ("spans-00000", spans.astype(float), "float64")):
        keep = (root / f"{name}.npy").read_bytes()
        np.save(root / f"{name}.npy", array)
        with pytest.raises(UserError, match=f"{name}.*{named}.*encode again"):
            Latents(root)
        (root / f"{name}.npy").write_bytes(keep)
    for wrong in ([0, len(wide) + 1], [-2, 1], [3, 2]):
        np.save(root / "spans-00000.npy", np.where(True, wrong, spans))
        with pytest.raises(UserError, match="damaged: tokens .* of shard 0 cannot be"):
            Latents(root).records([0], [0])
    np.save(root / "spans-00000.npy", spans)
    wide[0] = np.nan                                        # the first token of "a red ring"
    np.save(root / "tokens-00000.npy", wide)
    with pytest.raises(UserError, match="damaged: a number is not finite"):
        Latents(root).records(range(N), [0] * N)
    for wrong in (7, {**meta["encoder"], "dim": "6"}, {}):
        (root / "meta.json").write_text(json.dumps({**meta, "encoder": wrong}))
        with pytest.raises(UserError, match="cannot use .*meta.json: .*encode the data again"):
            Latents(root)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_as_many_files_may_be_open_as_the_system_allows():
    """Each file of latents is one to five; the usual limit is 1,024."""
    import resource

    from runtime import distributed
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
    try:
        distributed.raise_file_limit()
        most = max(distributed.FILES)
        wanted = most if before[1] == resource.RLIM_INFINITY else min(most, before[1])
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] in (wanted, min(wanted, min(distributed.FILES)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
