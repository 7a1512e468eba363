"""Latents: encoded as the autoencoder says, the same bytes after any kill, read as a data source, refused by name."""
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import autoencoder
import cached
import data
import latents
from cached import Latents, affine, header, open_latents, read_meta
from config import Config, ModelConfig, UserError
from test_tokens import Encoder

diffusers = pytest.importorskip("diffusers", reason="the autoencoder: pip install diffusers")

ROOT = Path(__file__).parent.parent
N, SIDE, C, R, SHARD, SCALING, SHIFT = 13, 8, 5, 16, 4, 0.3, 0.1


def save_autoencoder(path, seed=0, scaling=SCALING):
    """A tiny AutoencoderKL with random weights: 16 px to 5 x 8 x 8."""
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        latent_channels=C, block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, scaling_factor=scaling, shift_factor=SHIFT,
        mid_block_add_attention=False)
    torch.nn.init.constant_(vae.quant_conv.bias[C:], -8)    # std about exp(-4): small, as in trained ones
    vae.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an autoencoder, a class folder of 13 noisy pictures, and latents of them."""
    root = tmp_path_factory.mktemp("latents")
    save_autoencoder(root / "vae")
    rng = np.random.default_rng(0)
    for k in range(N):
        name = root / "pictures" / ("ring" if k % 3 else "cross") / f"{k}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((20 + k, 19 + 2 * k), Image.Resampling.BILINEAR).save(name)
    latents.main(words(root))
    return root


def options(root, **other):
    """What makes the folder `out` of latents."""
    o = dict(data=root / "pictures", out=root / "out", autoencoder=root / "vae", resolution=R, variants=2,
             shard=SHARD, batch=3, workers=0, threads=1, crop="mix") | other
    return latents.Encode(**{k: str(v) if isinstance(v, Path) else v for k, v in o.items()})


def words(root, **other):
    """The same as a command."""
    return ["encode", *(f"--{k}={v}" for k, v in dataclasses.asdict(options(root, **other)).items())]


@pytest.fixture(autouse=True)
def opened_once(monkeypatch):
    monkeypatch.setattr(latents, "open_autoencoder", open_once)


@cache
def open_once(path, device):
    return autoencoder.open_autoencoder(path, device)


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name[0] != "."}


def config(root, **other):
    m = dict(resolution=SIDE, channels=C, semantics="class", patch=2) | other.pop("model", {})
    return Config(**dict(data=str(root / "out"), crop="mix") | other, model=ModelConfig(**m))


def moments(source):
    """All that is stored, in float64: mean and std, (N, K, F, C, h, w) each."""
    return np.split(np.concatenate(source.latents).astype(np.float64), 2, axis=3)


# ---------------------------------------------------------------- what is written

def test_what_is_stored_is_the_posterior_of_the_pictures_and_of_their_mirror_images(place):
    source = Latents(place / "out")
    pictures = data.ImageFolder(place / "pictures", R, side=data.CROPS["mix"], flip=False)
    vae = autoencoder.open_autoencoder(str(place / "vae"))
    mean, std = moments(source)
    assert mean.shape == (N, 2, 2, C, SIDE, SIDE)
    for k in range(N):
        for v in range(2):
            record = pictures.record(k, v)
            for f, x in enumerate((record["image"], record["image"].flip(2))):
                with torch.no_grad():
                    theirs = vae.encode(x[None]).latent_dist
                np.testing.assert_allclose(mean[k, v, f], theirs.mean[0], rtol=2e-3, atol=2e-5)     # float16
                np.testing.assert_allclose(std[k, v, f], theirs.std[0], rtol=2e-3, atol=2e-5)
            row = source.rows[k // SHARD][k % SHARD, v]
            assert tuple(row["size"]) == record["size"] and row["label"] == record["label"]
            np.testing.assert_allclose(row["crop"], record["crop"], rtol=1e-6)
    assert abs(mean[:, 0] - mean[:, 1]).max() > 0.01 and abs(mean[:, :, 0] - mean[:, :, 1]).max() > 0.01
    assert source.classes == ["cross", "ring"] and len(source) == N


def test_every_channel_is_brought_to_mean_0_and_variance_1(place):
    """Over the mixture of all posteriors: E z = 0, E z^2 = 1, up to the rounding of its shift and scale to fp32."""
    source = Latents(place / "out")
    mean, std = moments(source)
    shift, scale = (v.double().numpy() for v in affine(source.meta))
    axes = (0, 1, 2, 4, 5)
    np.testing.assert_allclose(((mean - shift) / scale).mean(axes), 0, atol=1e-6)
    np.testing.assert_allclose((((mean - shift) ** 2 + std ** 2) / scale ** 2).mean(axes), 1, atol=1e-6)
    assert source.meta["statistics"]["mean"] == pytest.approx(mean.mean(axes), rel=1e-12)


def test_the_scaling_of_the_autoencoder_is_there_on_request(place, tmp_path):
    latents.encode(options(place, out=tmp_path / "out", scaling="factor", augment="", crop="global", variants=1))
    source = Latents(tmp_path / "out")
    mean = moments(source)[0][:, 0, 0]
    np.testing.assert_allclose(source.first(N), (mean - SHIFT) * SCALING, rtol=1e-5, atol=1e-6)
    batch = source.records(range(N), [3] * N)
    assert batch["flip"].sum() == 0 and not source.meta["mirrored"]


def test_captions_and_controls_of_any_source_go_with_the_latents(place, tmp_path):
    latents.encode(options(place, data="shapes", count=7, out=tmp_path, semantics="text", augment="size",
                           crop="global", variants=1, shard=3))
    source, shapes = Latents(tmp_path), data.Shapes(R, objects=(1, 2), crop=False, flip=False)
    batch, theirs = source.records([6, 0, 3], [1, 4, 9]), shapes.records([6, 0, 3])
    assert batch["caption"] == theirs["caption"] and source.classes == shapes.classes
    for key in ("label", "size", "crop"):
        assert torch.equal(batch[key], theirs[key]), key
    assert source.controls == ("size",) and (tmp_path / "captions-00002.jsonl").is_file()
    assert source.record(6, 1)["caption"] == theirs["caption"][0]


# ---------------------------------------------------------------- killed and started again

def encode_and_die(command, monkeypatch, die_at):
    """A run that ends before write number die_at."""
    count, write = [0], latents.checkpoint.write_bytes

    def dying(path, content):
        if count[0] == die_at:
            raise KeyboardInterrupt
        count[0] += 1
        write(path, content)
    with monkeypatch.context() as m:
        m.setattr(latents.checkpoint, "write_bytes", dying)
        m.setattr(latents.checkpoint.log, "write_bytes", dying)                 # write_text calls this one
        with pytest.raises(KeyboardInterrupt):
            latents.encode(command)


@pytest.mark.parametrize("die_at", [
    5, *(pytest.param(k, marks=pytest.mark.slow) for k in (0, 1, 2, 3, 7, 8, 9, 10, 11))])
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(place, tmp_path, monkeypatch, die_at):
    """Before write number die_at of 12: first pictures, meta.json, 4 x (records, latents), meta.json, the panel."""
    command = options(place, out=tmp_path / "out")
    encode_and_die(command, monkeypatch, die_at)
    if die_at < 11:
        with pytest.raises(UserError, match="not finished|encode writes one"):
            Latents(tmp_path / "out")
    latents.encode(command)
    assert hashes(tmp_path / "out") == hashes(place / "out")


def test_a_missing_file_is_made_again_and_a_finished_folder_is_left_alone(place, tmp_path):
    command = options(place, out=tmp_path / "out")
    latents.encode(command)
    stamp = (tmp_path / "out" / "latents-00001.npy").stat().st_mtime_ns
    for name in ("records-00002.npy", "latents-00000.npy"):
        (tmp_path / "out" / name).unlink()
    latents.encode(command)
    assert hashes(tmp_path / "out") == hashes(place / "out")
    assert (tmp_path / "out" / "latents-00001.npy").stat().st_mtime_ns == stamp


def run_command(argv, *launch):
    env = os.environ | {"OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
    return subprocess.Popen([sys.executable, *launch, str(ROOT / "latents.py"), *argv], env=env, cwd=ROOT)


@pytest.mark.slow
def test_two_processes_one_of_them_killed_write_the_same_bytes(place, tmp_path):
    """SIGKILL to a single process that has written some files; then two on gloo, under torchrun, finish."""
    from test_text import make, write
    clip = f"clip:{write(tmp_path / 'clip', make(False), False)}"
    latents.encode(captioned(place, out=tmp_path / "whole", shard=1, encoder=clip))
    asked = dataclasses.asdict(captioned(place, out=tmp_path / "out", shard=1, encoder=clip))
    command = ["encode", *(f"--{k}={v}" for k, v in asked.items())]
    one = run_command(command)
    while one.poll() is None and not (tmp_path / "out" / "latents-00000.npy").exists():
        time.sleep(0.01)
    one.send_signal(signal.SIGKILL)
    one.wait()
    two = run_command(command, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert two.wait() == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


# ---------------------------------------------------------------- with the tokens of the captions

def captioned(root, **other):
    return options(root, **dict(data="shapes", count=7, semantics="text", augment="size", crop="global", variants=1,
                                shard=3, encoder="clip:here") | other)


@pytest.fixture
def encoder(monkeypatch):
    """What stands for CLIP."""
    encoder = Encoder()
    monkeypatch.setattr(data, "open_clip_text", lambda path, device: encoder)
    return encoder


def test_tokens_are_encoded_with_the_pictures_or_added_afterwards(place, tmp_path, encoder, capsys):
    latents.encode(captioned(place, out=tmp_path / "at once"))
    before = encoder.count
    latents.encode(captioned(place, out=tmp_path / "at once"))
    assert encoder.count == before                          # a finished folder is left alone
    latents.encode(captioned(place, out=tmp_path / "later", encoder=""))
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "later").glob("latents-*")}
    latents.encode(captioned(place, out=tmp_path / "later"))
    assert hashes(tmp_path / "later") == hashes(tmp_path / "at once") and len(stamps) == 3
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "later").glob("latents-*")} == stamps
    source = Latents(tmp_path / "later")
    batch = source.records(range(7), [0] * 7)
    assert torch.equal(batch["text"], encoder.encode(batch["caption"])[0].half().float()) and batch["text"].any()
    assert set(source.meta["sha256"]) >= {f"{kind}-{s:05}.npy" for kind in ("tokens", "spans") for s in range(3)}
    latents.main(["check", f"--data={tmp_path / 'later'}"])
    assert f"clip:here {source.encoder['sha256'][:12]}, 77 x 6, {sum(map(len, source.tokens))} tokens" in \
        capsys.readouterr().out


@pytest.mark.parametrize("die_at", [2, 8, 10, 11, 13, 16, 17])
def test_a_run_that_is_killed_among_its_tokens_ends_with_the_same_bytes(place, tmp_path, monkeypatch, encoder, die_at):
    """First pictures, meta.json, 3 x (captions, records, latents), 3 x (spans, tokens), meta.json, the panel."""
    encode_and_die(captioned(place, out=tmp_path / "out"), monkeypatch, die_at)
    if die_at < 17:
        with pytest.raises(UserError, match="not finished"):
            Latents(tmp_path / "out")
    latents.encode(captioned(place, out=tmp_path / "out"))
    latents.encode(captioned(place, out=tmp_path / "whole"))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("change, named", [
    (dict(encoder="words"), "encoder='words' is not stored; there are clip:PATH"),
    (dict(semantics="class"), "encoder='clip:here' reads captions; semantics='class' has none"),
    (dict(encoder=""), "holds other latents: encoder: clip:here -> none"),
    (dict(encoder="clip:other"), "holds other latents: encoder: clip:here -> clip:other, whose sha256 differs")])
def test_tokens_go_on_only_as_what_they_are(place, tmp_path, monkeypatch, encoder, change, named):
    latents.encode(captioned(place, out=tmp_path / "out"))
    before = hashes(tmp_path / "out")
    monkeypatch.setattr(data, "open_clip_text", lambda path, device: Encoder(f"clip:{path}", weights=path))
    with pytest.raises(UserError, match=named):
        latents.encode(captioned(place, out=tmp_path / "out", **change))
    assert hashes(tmp_path / "out") == before


# ---------------------------------------------------------------- another folder, other options

@pytest.mark.parametrize("change, named", [
    (dict(crop="local"), "crop: 'mix' -> 'local'"), (dict(resolution=32), "resolution: 16 -> 32.*side: 8 -> 16"),
    (dict(seed=3), "seed: 0 -> 3"), (dict(scaling="factor"), "scaling"), (dict(count=12), "n: 13 -> 12"),
    (dict(augment="crop"), "mirrored: True -> False"), (dict(shard=5), "shard: 4 -> 5"),
    (dict(data="shapes", count=N), "data: .*shapes, whose fingerprint differs")])
def test_a_folder_goes_on_only_as_what_it_is(place, change, named):
    before = hashes(place / "out")
    with pytest.raises(UserError, match=f"other latents.*{named}"):
        latents.encode(options(place, **change))
    assert hashes(place / "out") == before


def test_another_autoencoder_is_another_encoding(place, tmp_path):
    """Even with the same weights, if its scaling differs."""
    for name, seed, scaling in (("b", 1, SCALING), ("c", 0, 0.5)):
        save_autoencoder(tmp_path / name, seed, scaling)
        with pytest.raises(UserError, match="autoencoder: .*sha256 differs"):
            latents.encode(options(place, autoencoder=tmp_path / name))


@pytest.mark.parametrize("change, named", [
    (dict(data=""), "data=''"), (dict(scaling="zero"), "channel, factor"),
    (dict(semantics="word"), "class, text, none"), (dict(batch=0), "batch=0"),
    (dict(variants=3, augment="flip"), "variants=3"), (dict(count=14), "13 pictures"), (dict(count=-1), "count=-1"),
    (dict(data="shapes"), "choose at most 100,000,000"), (dict(resolution=15), "multiple of 2"),
    (dict(augment="turn"), "'turn'"), (dict(autoencoder="tests"), "no autoencoder at")])
def test_options_that_do_not_go_together_are_named(place, tmp_path, change, named):
    with pytest.raises(UserError, match=named):
        latents.encode(options(place, out=tmp_path / "out", **change))
    assert not (tmp_path / "out" / "meta.json").exists()


def test_latents_are_not_encoded_again_and_strangers_not_taken_over(place, tmp_path):
    with pytest.raises(UserError, match="must be pictures"):
        latents.encode(options(place, data=place / "out", out=tmp_path))
    (tmp_path / "latents-00000.npy").write_bytes(b"")
    with pytest.raises(UserError, match="without meta.json"):
        latents.encode(options(place, out=tmp_path))
    with pytest.raises(UserError, match="encode or check"):
        latents.main(["decode"])


# ---------------------------------------------------------------- what is read

def test_eps_is_standard_normal_and_a_function_of_seed_sample_and_epoch(place):
    source, B = Latents(place / "out", flip=False), 13 * 40
    index, epoch = np.tile(np.arange(N), 40), np.repeat(np.arange(40), N)
    batch = source.records(index, epoch)
    latent = batch["image"] * source.scale + source.shift                      # (B, C, h, w)
    crop = [int(not np.allclose(source.rows[i // SHARD][i % SHARD, 0]["crop"], c))
            for i, c in zip(index, batch["crop"])]
    mean, std = moments(source)
    eps = (latent.numpy() - mean[index, crop, 0]) / std[index, crop, 0]
    n = eps.size
    assert abs(eps.mean()) < 4 / n ** 0.5 and abs(eps.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((eps ** 4).mean() - 3) < 4 * (96 / n) ** 0.5
    flat = eps.reshape(B, -1)
    worst = np.abs(flat @ flat.T / flat.shape[1] - np.eye(B)).max()
    assert worst < 6 * (2 / flat.shape[1]) ** 0.5                              # no two draws are alike
    assert abs(np.mean(crop) - 0.5) < 4 * 0.5 / B ** 0.5                       # both crops, equally often

    again = Latents(place / "out", flip=False).records(index[::-1], epoch[::-1])
    assert torch.equal(again["image"].flip(0), batch["image"])
    row = source.record(int(index[77]), int(epoch[77]))
    assert torch.equal(row["image"], batch["image"][77]) and row["label"] == batch["label"][77]
    other = Latents(place / "out", seed=1, flip=False).records(index, epoch)
    assert (other["image"] != batch["image"]).float().mean() > 0.99


def test_half_are_mirrored_and_those_are_the_stored_mirror_images(place):
    source = Latents(place / "out")
    index, epoch = np.tile(np.arange(N), 40), np.repeat(np.arange(40), N)
    batch = source.records(index, epoch)
    flip = batch["flip"].numpy().astype(int)
    assert abs(flip.mean() - 0.5) < 4 * 0.5 / len(flip) ** 0.5
    latent = (batch["image"] * source.scale + source.shift).numpy()
    mean, std = moments(source)
    error = [[np.abs((latent - mean[index, v, f]) / std[index, v, f]).mean((1, 2, 3)) for v in (0, 1)]
             for f in (0, 1)]
    assert (np.argmin(np.min(error, axis=1), axis=0) == flip).all()
    assert source.controls == ("size", "crop", "flip")
    assert Latents(place / "out", flip=False).controls == ("size", "crop")


def test_the_source_is_what_training_opens(place):
    source = data.open_source(config(place))
    assert isinstance(source, data.Latents) and (source.channels, len(source)) == (C, N)
    assert source.fingerprint == Latents(place / "out").fingerprint
    batch = data.fetch(source, None, 0, 6, 6, 5, 0)
    assert batch["image"].shape == (6, C, SIDE, SIDE) and batch["image"].dtype == torch.float32
    assert set(batch) == {"image", "index", "size", "crop", "flip", "label"}
    assert data.open_source(config(place, augment="crop")).controls == ("size", "crop")


@pytest.mark.parametrize("change, named", [
    (dict(model=dict(resolution=16)), "model.resolution=16.*side of 8.*pictures with 16"),
    (dict(model=dict(channels=4)), "model.channels=4.*5"),
    (dict(model=dict(semantics="text"), encoder="clip:none"), "no captions for model.semantics=text"),
    (dict(augment="flip"), "encoded with augment='crop.flip'"), (dict(crop="local"), "crop='local'.*holds mix crops"),
    (dict(augment="crop", model=dict(controls="flip")), "does not vary flip")])
def test_training_refuses_a_mismatch_by_name(place, change, named):
    with pytest.raises(UserError, match=named):
        data.open_source(config(place, **change))


def test_what_latents_cannot_vary_afterwards_is_an_error_that_names_it(place, tmp_path):
    latents.encode(options(place, out=tmp_path / "out", augment="", variants=1, count=3, crop="global"))
    for asked, named in (("flip", "asks for flip"), ("crop", "asks for crop"), ("flip+size", "asks for flip")):
        with pytest.raises(UserError, match=f"{named}.*cannot vary afterwards.*augment=''"):
            open_latents(config(tmp_path, augment=asked, crop="global"))
    assert open_latents(config(tmp_path, augment="size", crop="global")).controls == ("size", "crop")


# ---------------------------------------------------------------- damage

@pytest.fixture
def copy(place, tmp_path):
    for path in (place / "out").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def object_array(file):
    np.save(file, np.array([{}, {}], dtype=object), allow_pickle=True)


def zip_bomb(file):
    with open(file, "wb") as f:
        np.savez_compressed(f, arr_0=np.zeros(10 ** 7, np.float16))


def edit(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in {**meta, **changes}.items() if v is not None}),
                                      encoding="utf-8")


FILE = "latents-00001.npy"
DAMAGE = {
    "object array": (lambda d: object_array(d / FILE), FILE),
    "zip bomb": (lambda d: zip_bomb(d / FILE), FILE),
    "wrong shape": (lambda d: np.save(d / FILE, np.zeros((SHARD, 2, 2, C, SIDE, SIDE), np.float16)), "says"),
    "whole numbers": (lambda d: np.save(d / FILE, np.zeros((SHARD, 2, 2, 2 * C, SIDE, SIDE), np.int16)), "int16"),
    "cut": (lambda d: (d / FILE).write_bytes((d / FILE).read_bytes()[:-7]), FILE),
    "empty": (lambda d: (d / FILE).write_bytes(b""), FILE),
    "missing": (lambda d: (d / FILE).unlink(), FILE),
    "records of another kind": (lambda d: np.save(d / "records-00000.npy", np.zeros((SHARD, 2), "i8,i8")), "records"),
    "no meta.json": (lambda d: (d / "meta.json").unlink(), "meta.json"),
    "meta.json cut": (lambda d: (d / "meta.json").write_text('{"format": 1,'), "meta.json"),
    "meta.json is a list": (lambda d: (d / "meta.json").write_text("[1]"), "meta.json"),
    "a number as text": (lambda d: edit(d, n="13"), "damaged in n"),
    "newer": (lambda d: edit(d, format=2), "format 2.*up to 1"),
    "wrong scaling": (lambda d: edit(d, scaling="edm"), "channel, factor"),
    "scale 0": (lambda d: edit(d, statistics={"mean": [0.0] * C, "std": [1.0] * 4 + [0.0]}), "above 0"),
    "scale nan": (lambda d: edit(d, statistics={"mean": [float("nan")] * C, "std": [1.0] * C}), "finite"),
    "four channels": (lambda d: edit(d, statistics={"mean": [0.0] * 4, "std": [1.0] * 4}), "5 finite numbers"),
    "unfinished": (lambda d: edit(d, statistics=None), "not finished"),
    "no autoencoder": (lambda d: edit(d, autoencoder={}), "damaged in path")}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_when_it_is_opened(copy, name):
    damage, named = DAMAGE[name]
    Latents(copy)
    damage(copy)
    with pytest.raises(UserError, match=named):
        Latents(copy)


def test_other_floating_point_numbers_will_do(copy):
    wide = np.load(copy / FILE).astype(np.float64)
    before = Latents(copy).records([5], [0])["image"]
    np.save(copy / FILE, wide)
    assert torch.equal(Latents(copy).records([5], [0])["image"], before)


def test_a_latent_that_is_not_finite_is_counted_replaced_and_limited(copy):
    array = np.load(copy / FILE)
    array[1] = np.nan                                       # sample 5, all crops
    np.save(copy / FILE, array)
    source = Latents(copy)
    batch = source.records([4, 5, 6], [0, 0, 0])
    assert source.bad == {"latent 5": "not finite"} and batch["image"].isfinite().all()
    assert batch["index"][[0, 2]].tolist() == [4, 6] and batch["index"][1] != 5
    used = batch["index"][1].item()
    assert batch["label"][1] == source.rows[used // SHARD][used % SHARD, 0]["label"]
    assert torch.equal(Latents(copy).records([5], [0])["image"][0], batch["image"][1])      # whatever it is read with
    array[2] = np.inf
    np.save(copy / FILE, array)
    source = Latents(copy)
    source.records([5], [0])
    with pytest.raises(UserError, match="2 of 13 latents.*number 6.*max_bad"):
        source.records([6], [0])
    with pytest.raises(UserError, match="1 of 13"):
        Latents(copy, max_bad=0.0).records([5], [0])


def test_check_finds_a_single_bit(copy, capsys):
    latents.main(["check", f"--data={copy}"])
    out = capsys.readouterr()
    assert "resolution   16" in out.out and "round trip" in out.err
    raw = bytearray((copy / FILE).read_bytes())
    raw[-1000] ^= 1
    (copy / FILE).write_bytes(raw)
    with pytest.raises(UserError, match=f"1 files of .* damaged or missing: {FILE}"):
        latents.main(["check", f"--data={copy}"])


# ---------------------------------------------------------------- back to pictures

@pytest.mark.parametrize("scaling", ["channel", "factor"])
def test_decoding_undoes_the_scaling(place, scaling):
    source = Latents(place / "out")
    meta = {**source.meta, "scaling": scaling}
    vae = autoencoder.open_autoencoder(str(place / "vae"))
    latent = torch.randn(11, C, 6, 9, generator=torch.Generator().manual_seed(0))          # more than one chunk
    if scaling == "channel":
        mean, std = (torch.tensor(meta["statistics"][k]).view(C, 1, 1) for k in ("mean", "std"))
        z = (latent - mean) / std
    else:
        z = (latent - SHIFT) * SCALING
    with torch.no_grad():
        theirs = vae.decode(latent).sample
    ours = latents.decode(z, header(meta), vae)
    assert ours.shape == (11, 3, 12, 18)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="4 channels.*5"):
        latents.decode(z[:, :4], meta, vae)


def test_a_decoder_is_that_of_the_latents_or_is_refused(place, tmp_path):
    meta, cpu = json.loads(json.dumps(header(read_meta(place / "out")))), torch.device("cpu")
    decoder, f = autoencoder.open_decoder(meta, "", C, cpu)
    assert f == 2 and decoder(torch.zeros(1, C, 3, 5)).shape == (1, 3, 6, 10)
    other = save_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="the latents are of .*vae"):
        autoencoder.open_decoder(meta, other, C, cpu)
    with pytest.raises(UserError, match="draws 3 channels, the autoencoder has 5"):
        autoencoder.open_decoder(meta, "", 3, cpu)
    plain, _ = autoencoder.open_decoder(None, str(place / "vae"), C, cpu)                    # official weights
    z = torch.randn(1, C, 4, 4, generator=torch.Generator().manual_seed(1))
    vae = autoencoder.open_autoencoder(str(place / "vae"))
    torch.testing.assert_close(plain(z), vae.decode(z / SCALING + SHIFT).sample, atol=1e-4, rtol=1e-4)


def test_the_panel_shows_the_data_above_what_is_decoded(place):
    """With a decoder that gives the pictures back the difference is the rounding to bytes; with another it is not."""
    source, cpu = Latents(place / "out"), torch.device("cpu")
    pictures = data.ImageFolder(place / "pictures", R, side=data.CROPS["mix"], flip=False)
    pixels = data.records(pictures, range(latents.SHOWN), [0] * latents.SHOWN)["image"]
    seen = []

    def oracle(z):
        seen.append(z)
        return pixels
    page, rms = latents.panel(source, oracle, cpu)
    assert rms < 0.5 / 127.5 and torch.equal(seen[0], source.first(latents.SHOWN)) and page.width > page.height
    assert latents.panel(source, lambda z: pixels.flip(3), cpu)[1] > 0.1
    assert (place / "out" / "panel.png").stat().st_size > 1000


@pytest.mark.slow
def test_two_steps_a_resume_and_an_error_on_latents(place, tmp_path, capsys):
    import train
    m = ["--model.arch=dit", "--model.semantics=class", f"--model.resolution={SIDE}", f"--model.channels={C}",
         "--model.patch=2", "--model.width=32", "--model.depth=1", "--model.heads=2",
         "--model.controls=crop+flip+size"]
    argv = [*m, f"--data={place / 'out'}", f"--out={tmp_path / 'run'}", "--crop=mix", "--augment=crop+flip+size",
            "--batch=6", "--micro=3", "--workers=1", "--threads=1", "--sample_every=0", "--save_every=1"]
    assert train.run([*argv, "--steps=2"]) == 0
    assert train.run([*argv, "--steps=3"]) == 0
    assert train.run([*argv, "--steps=4", "--crop=global"]) == 2
    assert "holds mix crops" in capsys.readouterr().err


def test_the_fingerprint_is_of_the_content_and_not_of_where_it_lies(copy):
    first = Latents(copy).fingerprint
    meta = read_meta(copy)
    edit(copy, autoencoder={**meta["autoencoder"], "path": "/elsewhere"}, data={**meta["data"], "path": "moved"})
    assert Latents(copy).fingerprint == first
    edit(copy, scaling="factor")
    assert Latents(copy).fingerprint != first


def test_names_of_files_and_shards_cover_the_data_once():
    meta = {"n": 13, "shard": 4, "captions": True, "variants": 3, "mirrored": True, "channels": 5, "side": 8}
    assert [k for part in cached.shards(meta) for k in part] == list(range(13))
    assert list(cached.file_names(meta, 2)) == ["captions", "records", "latents"]
    assert cached.latent_shape(meta, 7) == (7, 3, 2, 10, 8, 8)
    assert dataclasses.asdict(latents.Encode())["crop"] == Config().crop
    assert latents.Encode().augment == Config().augment      # what is encoded by default can be trained by default
