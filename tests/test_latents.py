"""Latents: encoded as the autoencoder says, the same bytes after any kill, read as a data source, decoded again."""
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import latents
import text
from config import Config, ModelConfig, UserError
from runtime import log
from sources import cached_latents
from sources.cached_latents import Latents, header, latent_scaling, read_meta
from sources.folders import ImageFolder
from sources.images import CROPS
from sources.shapes import Shapes
from test_cached_latents import Encoder

ROOT = Path(__file__).parent.parent
N, SIDE, C, R, SHARD, SCALING, SHIFT = 13, 8, 5, 16, 4, 0.3, 0.1
CPU = torch.device("cpu")


def save_autoencoder(path, seed=0):
    """A tiny AutoencoderKL of diffusers with random weights: 16 px to 5 x 8 x 8."""
    diffusers = pytest.importorskip("diffusers", reason="the autoencoder: pip install diffusers")
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        latent_channels=C, block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, scaling_factor=SCALING, shift_factor=SHIFT,
        mid_block_add_attention=False)
    torch.nn.init.constant_(vae.quant_conv.bias[C:], -8)    # std about exp(-4): small, as in trained ones
    vae.save_pretrained(path)
    return str(path)


class Autoencoder(nn.Module):
    """Stands for diffusers' AutoencoderKL, with one convolution each way."""
    def __init__(self, seed=0, scaling=SCALING):
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=scaling, shift_factor=SHIFT, latent_channels=C,
                                      block_out_channels=(4, 8))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.down, self.up = nn.Conv2d(3, 2 * C, 2, 2), nn.ConvTranspose2d(C, 3, 2, 2)

    def encode(self, x):
        mean, log_std = self.down(x).chunk(2, 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=(log_std - 4).exp()))

    def decode(self, z):
        return SimpleNamespace(sample=self.up(z))


REAL = latents.open_autoencoder
VAES = {"vae": Autoencoder(), "moved": Autoencoder(), "other": Autoencoder(1), "rescaled": Autoencoder(0, 0.5)}


def stand_in(patch):
    """VAES in place of diffusers' autoencoders, and Encoder in place of CLIP."""
    patch.setattr(latents, "open_autoencoder", lambda path, device: VAES[path])
    patch.setattr(text, "CLIPText", lambda path, device: Encoder(f"clip:{path}"))


@pytest.fixture(autouse=True, scope="module")
def stands_in():
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A class folder of 13 noisy images, and latents of them."""
    root = tmp_path_factory.mktemp("latents")
    rng = np.random.default_rng(0)
    for k in range(N):
        name = root / "images" / ("ring" if k % 3 else "cross") / f"{k}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((20 + k, 19 + 2 * k), Image.Resampling.BILINEAR).save(name)
    latents.main(words(options(root)))
    return root


def options(root, **other):
    """What makes the folder `out` of latents."""
    o = dict(data=root / "images", out=root / "out", autoencoder="vae", resolution=R, variants=2, shard=SHARD, batch=3,
             workers=0, threads=1, crop="mix") | other
    return latents.Encode(**{k: str(v) if isinstance(v, Path) else v for k, v in o.items()})


def captioned(root, **other):
    """What makes latents of shapes, with captions and their tokens."""
    return options(root, **dict(data="shapes", count=7, semantics="text", augment="size", crop="global", variants=1,
                                shard=3, encoder="clip:here") | other)


def words(o):
    """The same as a command."""
    return ["encode", *(f"--{k}={v}" for k, v in dataclasses.asdict(o).items())]


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name[0] != "."}


def config(root, **other):
    m = dict(resolution=SIDE, channels=C, semantics="class", patch=2) | other.pop("model", {})
    return Config(**dict(data=str(root / "out"), crop="mix") | other, model=ModelConfig(**m))


def moments(source):
    """All that is stored, in float64: mean and std, (N, K, F, C, h, w) each."""
    return np.split(np.concatenate(source.latents).astype(np.float64), 2, axis=3)


# ---------------------------------------------------------------- files

def test_files_hold_the_posteriors_of_images_and_mirror_images(folder):
    source = Latents(folder / "out")
    images = ImageFolder(folder / "images", R, side=CROPS["mix"], flip=False)
    mean, std = moments(source)
    assert mean.shape == (N, 2, 2, C, SIDE, SIDE)
    for k in range(N):
        for v in range(2):
            record = images.record(k, v)
            for f, x in enumerate((record["image"], record["image"].flip(2))):
                with torch.no_grad():
                    theirs = VAES["vae"].encode(x[None]).latent_dist
                np.testing.assert_allclose(mean[k, v, f], theirs.mean[0], rtol=2e-3, atol=2e-5)     # float16
                np.testing.assert_allclose(std[k, v, f], theirs.std[0], rtol=2e-3, atol=2e-5)
            row = source.rows[k // SHARD][k % SHARD, v]
            assert tuple(row["size"]) == record["size"] and row["label"] == record["label"]
            np.testing.assert_allclose(row["crop"], record["crop"], rtol=1e-6)
    assert abs(mean[:, 0] - mean[:, 1]).max() > 0.01 and abs(mean[:, :, 0] - mean[:, :, 1]).max() > 0.01
    assert source.classes == ["cross", "ring"] and len(source) == N


def test_every_channel_has_mean_0_and_variance_1(folder):
    """Over the mixture of all posteriors: E z = 0, E z^2 = 1, up to the rounding of its shift and scale to fp32."""
    source = Latents(folder / "out")
    mean, std = moments(source)
    shift, scale = (v.double().numpy() for v in latent_scaling(source.meta))
    axes = (0, 1, 2, 4, 5)
    np.testing.assert_allclose(((mean - shift) / scale).mean(axes), 0, atol=1e-6)
    np.testing.assert_allclose((((mean - shift) ** 2 + std ** 2) / scale ** 2).mean(axes), 1, atol=1e-6)
    assert source.meta["statistics"]["mean"] == pytest.approx(mean.mean(axes), rel=1e-12)


def test_factor_scaling_is_that_of_the_autoencoder(folder, tmp_path):
    latents.encode(options(folder, out=tmp_path / "out", scaling="factor", augment="", crop="global", variants=1))
    source = Latents(tmp_path / "out")
    mean = moments(source)[0][:, 0, 0]
    np.testing.assert_allclose(source.posterior_means(N), (mean - SHIFT) * SCALING, rtol=1e-5, atol=1e-6)
    batch = source.records(range(N), [3] * N)
    assert batch["flip"].sum() == 0 and not source.meta["mirrored"]


def test_latents_keep_the_captions_and_controls_of_their_source(folder, tmp_path):
    latents.encode(options(folder, data="shapes", count=7, out=tmp_path, semantics="text", augment="size",
                           crop="global", variants=1, shard=3))
    source, shapes = Latents(tmp_path), Shapes(R, objects=(1, 2), crop=False, flip=False)
    batch, theirs = source.records([6, 0, 3], [1, 4, 9]), shapes.records([6, 0, 3])
    assert batch["caption"] == theirs["caption"] and source.classes == shapes.classes
    for key in ("label", "size", "crop"):
        assert torch.equal(batch[key], theirs[key]), key
    assert source.controls == ("size",) and (tmp_path / "captions-00002.jsonl").is_file()
    assert source.records([6], [1])["caption"][0] == theirs["caption"][0]


# ---------------------------------------------------------------- kill and resume

def encode_and_die(command, monkeypatch, die_at):
    """Whether a run ends before write number die_at."""
    count, write = [0], log.write_bytes

    def dying(path, content):
        if count[0] == die_at:
            raise KeyboardInterrupt
        count[0] += 1
        write(path, content)
    with monkeypatch.context() as m:
        m.setattr(log, "write_bytes", dying)                 # write_text calls this one
        try:
            latents.encode(command)
        except KeyboardInterrupt:
            return True
    return False


def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(folder, tmp_path, monkeypatch):
    """First images, meta.json, 2 x (captions, records, latents, spans, tokens), meta.json."""
    command = captioned(folder, out=tmp_path / "whole", count=3, shard=2)
    latents.encode(command)
    want = hashes(tmp_path / "whole")
    assert len(want) == 13
    for die_at in range(14):
        out = tmp_path / f"out{die_at}"
        command = dataclasses.replace(command, out=str(out))
        assert encode_and_die(command, monkeypatch, die_at) == (die_at < 13)
        if die_at < 13:
            with pytest.raises(UserError, match="not finished|encode the data again"):
                Latents(out)
        latents.encode(command)
        assert hashes(out) == want, die_at


def test_a_missing_file_is_made_again_and_a_finished_folder_is_left_alone(copy, folder):
    stamps = {p.name: p.stat().st_mtime_ns for p in copy.glob("*-0*")}
    for name in ("records-00002.npy", "latents-00000.npy"):
        (copy / name).unlink()
    latents.encode(options(folder, out=copy))
    assert hashes(copy) == hashes(folder / "out")
    after = {p.name: p.stat().st_mtime_ns for p in copy.glob("*-0*")}
    assert {name for name in after if after[name] != stamps[name]} == {
        f"{kind}-0000{s}.npy" for kind in ("records", "latents") for s in (0, 2)}


STAND_IN = "import pytest, test_latents as t; t.stand_in(pytest.MonkeyPatch()); t.latents.main(t.sys.argv[1:]); " \
    "t.latents.distributed.cleanup()"


def start(command, rank=0, world=1, port=0):
    """Starts one process of the encoder."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "USE_LIBUV": "0", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
                        "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    return subprocess.Popen([sys.executable, "-c", STAND_IN, *words(command)], env=env, cwd=ROOT)


@pytest.mark.slow
def test_two_processes_one_of_them_killed_write_the_same_bytes(folder, tmp_path):
    """SIGKILL to a single process that has written some files; then two on gloo finish."""
    latents.encode(captioned(folder, out=tmp_path / "whole", shard=1))
    command = captioned(folder, out=tmp_path / "out", shard=1)
    one = start(command)
    while one.poll() is None and not (tmp_path / "out" / "latents-00000.npy").exists():
        time.sleep(0.01)
    one.send_signal(signal.SIGKILL)
    one.wait()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    two = [start(command, rank, 2, port) for rank in range(2)]
    assert [process.wait() for process in two] == [0, 0]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


# ---------------------------------------------------------------- text tokens

@pytest.fixture(scope="module")
def with_tokens(folder):
    latents.encode(captioned(folder, out=folder / "tokens"))
    return folder / "tokens"


def test_tokens_are_encoded_with_the_images_or_added_afterwards(folder, tmp_path, with_tokens, capsys):
    latents.encode(captioned(folder, out=tmp_path, encoder=""))
    stamps = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("latents-*")}
    latents.encode(captioned(folder, out=tmp_path))
    assert hashes(tmp_path) == hashes(with_tokens) and len(stamps) == 3
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("latents-*")} == stamps
    source = Latents(tmp_path)
    batch = source.records(range(7), [0] * 7)
    assert torch.equal(batch["text"], Encoder().encode(batch["caption"])[0].half().float()) and batch["text"].any()
    assert set(source.meta["sha256"]) >= {f"{kind}-{s:05}.npy" for kind in ("tokens", "spans") for s in range(3)}
    latents.main(["check", f"--data={tmp_path}"])
    assert f"\ntokens       {sum(map(len, source.tokens))}\n" in capsys.readouterr().out


def test_a_finished_folder_runs_no_text_tower(folder, with_tokens, monkeypatch):
    encoder = Encoder("clip:here")
    monkeypatch.setattr(text, "CLIPText", lambda path, device: encoder)
    latents.encode(captioned(folder, out=with_tokens))
    assert encoder.count == 0


@pytest.mark.parametrize("change, named", [
    (dict(encoder="words"), "encoder='words' with semantics='text' stores no tokens; use --encoder=clip:PATH"),
    (dict(semantics="class"), "encoder='clip:here' with semantics='class' stores no tokens"),
    (dict(encoder=""), "holds other latents: encoder: {.* -> None"),
    (dict(encoder="clip:other"), "holds other latents: encoder: {.* -> {")])
def test_tokens_of_another_encoder_are_an_error(folder, with_tokens, monkeypatch, change, named):
    before = hashes(with_tokens)
    monkeypatch.setattr(text, "CLIPText", lambda path, device: Encoder(f"clip:{path}", weights=path))
    with pytest.raises(UserError, match=named):
        latents.encode(captioned(folder, out=with_tokens, **change))
    assert hashes(with_tokens) == before


# ---------------------------------------------------------------- options

@pytest.mark.parametrize("change, named", [
    (dict(crop="local", seed=3, scaling="factor", count=12, augment="crop", shard=5),
     "n: 13 -> 12; shard: 4 -> 5; .*mirrored: True -> False; .*crop: 'mix' -> 'local'; seed: 0 -> 3; .*scaling: "),
    (dict(resolution=32), "resolution: 16 -> 32.*side: 8 -> 16"), (dict(data="shapes", count=N), "data: .* -> "),
    (dict(autoencoder="other"), "autoencoder: .* -> "),     # other weights, or the same weights with another scaling
    (dict(autoencoder="rescaled"), "autoencoder: .*'scaling_factor': 0.3.* -> .*'scaling_factor': 0.5")])
def test_other_options_do_not_change_a_folder(folder, change, named):
    before = hashes(folder / "out")
    with pytest.raises(UserError, match=f"other latents: .*{named}"):
        latents.encode(options(folder, **change))
    assert hashes(folder / "out") == before


def test_data_and_autoencoder_may_move(folder, copy, tmp_path):
    shutil.copytree(folder / "images", tmp_path / "images")
    (copy / "latents-00000.npy").unlink()
    latents.encode(options(folder, out=copy, data=tmp_path / "images", autoencoder="moved"))
    assert read_meta(copy)["autoencoder"]["path"] == "moved"
    assert Latents(copy).fingerprint == Latents(folder / "out").fingerprint


@pytest.mark.parametrize("change, named", [
    (dict(data=""), "data=''"), (dict(scaling="zero"), "channel, factor"),
    (dict(semantics="word"), "class, text, none"), (dict(batch=0), "batch=0"),
    (dict(variants=3, augment="flip"), "variants=3"), (dict(count=14), "13 images"), (dict(count=-1), "count=-1"),
    (dict(resolution=15), "multiple of 2"), (dict(augment="turn"), "'turn'")])
def test_options_that_contradict_each_other_are_an_error(folder, tmp_path, change, named):
    with pytest.raises(UserError, match=named):
        latents.encode(options(folder, out=tmp_path / "out", **change))
    assert not (tmp_path / "out" / "meta.json").exists()


def test_a_small_disk_is_an_error_at_once(folder, tmp_path, monkeypatch):
    """Shapes have no end: without --count they never fit."""
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda path: SimpleNamespace(free=13 * 2 * 4 * 10 * 64))
    with pytest.raises(UserError, match="images need .* GB free; choose another --out or a smaller --count"):
        latents.encode(options(folder, data="shapes", out=tmp_path / "shapes"))
    latents.encode(options(folder, out=tmp_path / "out"))
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda path: SimpleNamespace(free=13 * 2 * 4 * 10 * 64 - 1))
    with pytest.raises(UserError, match="13 images need 0.0 GB"):
        latents.encode(options(folder, out=tmp_path / "other"))


def test_latents_cannot_be_encoded_and_foreign_files_are_not_overwritten(folder, tmp_path):
    with pytest.raises(UserError, match="must be images"):
        latents.encode(options(folder, data=folder / "out", out=tmp_path))
    (tmp_path / "latents-00000.npy").write_bytes(b"")
    with pytest.raises(UserError, match="without meta.json"):
        latents.encode(options(folder, out=tmp_path))
    with pytest.raises(UserError, match="encode or check"):
        latents.main(["decode"])


def test_help_lists_the_options_of_both_commands(capsys):
    latents.main(["--help"])
    out = capsys.readouterr().out
    assert "--scaling=str" in out and out.count("--autoencoder=str") == 2


# ---------------------------------------------------------------- reading

def test_eps_is_standard_normal_and_a_function_of_seed_sample_and_epoch(folder):
    source, B = Latents(folder / "out", flip=False), 13 * 40
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
    assert worst < 6 * (2 / flat.shape[1]) ** 0.5                              # no two latents have the same eps
    assert abs(np.mean(crop) - 0.5) < 4 * 0.5 / B ** 0.5                       # both crops, equally often

    again = Latents(folder / "out", flip=False).records(index[::-1], epoch[::-1])
    assert torch.equal(again["image"].flip(0), batch["image"])
    row = source.records(index[77:78], epoch[77:78])
    assert torch.equal(row["image"][0], batch["image"][77]) and row["label"] == batch["label"][77]
    other = Latents(folder / "out", seed=1, flip=False).records(index, epoch)
    assert (other["image"] != batch["image"]).float().mean() > 0.99


def test_half_are_mirrored_and_those_are_the_stored_mirror_images(folder):
    source = Latents(folder / "out")
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
    assert Latents(folder / "out", flip=False).controls == ("size", "crop")


def test_training_opens_latents(folder):
    source = data.open_source(config(folder))
    assert isinstance(source, Latents) and (source.channels, len(source)) == (C, N)
    assert source.fingerprint == Latents(folder / "out").fingerprint
    batch = data.load_microbatch(source, None, 0, 6, 6, 5, 0)
    assert batch["image"].shape == (6, C, SIDE, SIDE) and batch["image"].dtype == torch.float32
    assert set(batch) == {"image", "index", "size", "crop", "flip", "label"}
    assert data.open_source(config(folder, augment="crop")).controls == ("size", "crop")


@pytest.mark.parametrize("change, named", [
    (dict(model=dict(resolution=16)), "model.resolution=16.*have 8, of images with 16.*model.resolution=8"),
    (dict(model=dict(channels=4)), "model.channels=4.*5"),
    (dict(model=dict(semantics="text"), encoder="clip:none"), "no captions for model.semantics=text"),
    (dict(augment="flip"), "augment='flip'.*encoded with augment='crop.flip'"),
    (dict(crop="local"), "crop='local', but .*crop='mix'"),
    (dict(augment="crop", model=dict(controls="flip")), "does not vary flip")])
def test_training_on_latents_that_do_not_fit_is_an_error(folder, change, named):
    with pytest.raises(UserError, match=named):
        data.open_source(config(folder, **change))


def test_augmentation_that_was_not_encoded_is_an_error(folder, tmp_path):
    latents.encode(options(folder, out=tmp_path / "out", augment="", variants=1, count=3, crop="global"))
    for augment in ("flip", "crop", "flip+size"):
        with pytest.raises(UserError, match=f"augment='{augment.replace('+', '.')}'.*encoded with augment=''"):
            Latents.open(config(tmp_path, augment=augment, crop="global"))
    assert Latents.open(config(tmp_path, augment="size", crop="mix")).controls == ("size", "crop")


# ---------------------------------------------------------------- damage

@pytest.fixture
def copy(folder, tmp_path):
    for path in (folder / "out").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def object_array(file):
    np.save(file, np.array([{}, {}], dtype=object), allow_pickle=True)


def zip_bomb(file):
    with open(file, "wb") as f:
        np.savez_compressed(f, arr_0=np.zeros(10 ** 6, np.float16))


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
    "wrong scaling": (lambda d: edit(d, scaling="edm"), "damaged in scaling"),
    "scale 0": (lambda d: edit(d, statistics={"mean": [0.0] * C, "std": [1.0] * 4 + [0.0]}), "above 0"),
    "scale nan": (lambda d: edit(d, statistics={"mean": [float("nan")] * C, "std": [1.0] * C}), "finite"),
    "four channels": (lambda d: edit(d, statistics={"mean": [0.0] * 4, "std": [1.0] * 4}), "5 finite numbers"),
    "unfinished": (lambda d: edit(d, statistics=None), "not finished"),
    "no autoencoder": (lambda d: edit(d, autoencoder={}), "damaged in path")}


@pytest.mark.parametrize("name", DAMAGE)
def test_opening_a_damaged_folder_is_an_error(copy, name):
    damage, named = DAMAGE[name]
    Latents(copy)
    damage(copy)
    with pytest.raises(UserError, match=named):
        Latents(copy)


def test_latents_may_be_stored_in_another_float_type(copy):
    wide = np.load(copy / FILE).astype(np.float64)
    before = Latents(copy).records([5], [0])["image"]
    np.save(copy / FILE, wide)
    assert torch.equal(Latents(copy).records([5], [0])["image"], before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_latent_that_is_not_finite_is_an_error_and_can_be_encoded_again(copy, folder, value):
    array = np.load(copy / FILE)
    array[1] = value                                        # sample 5, all crops
    np.save(copy / FILE, array)
    source = Latents(copy)
    assert source.records([4, 6], [0, 0])["image"].isfinite().all()
    with pytest.raises(UserError, match=r"samples \[4, 5, 6\] of .* not finite.*remove them, and encode"):
        source.records([4, 5, 6], [0, 0, 0])
    with pytest.raises(UserError, match=f"damaged or missing: {FILE}; remove"):
        latents.main(["check", f"--data={copy}"])
    (copy / FILE).unlink()
    latents.encode(options(folder, out=copy))
    assert hashes(copy) == hashes(folder / "out")


def test_check_finds_a_single_bit(copy, capsys):
    latents.main(["check", f"--data={copy}"])
    out = capsys.readouterr()
    assert "resolution   16" in out.out and "reconstruction" in out.err
    raw = bytearray((copy / FILE).read_bytes())
    raw[-1000] ^= 1
    (copy / FILE).write_bytes(raw)
    with pytest.raises(UserError, match=f"1 files of .* damaged or missing: {FILE}"):
        latents.main(["check", f"--data={copy}"])


# ---------------------------------------------------------------- decoding

@pytest.mark.parametrize("scaling", ["channel", "factor"])
def test_decoding_undoes_the_scaling(folder, scaling):
    meta, vae = {**read_meta(folder / "out"), "scaling": scaling}, VAES["vae"]
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


def test_another_autoencoder_than_that_of_the_latents_is_an_error(folder):
    about = {"latents": json.dumps(header(read_meta(folder / "out")))}
    for path in ("", "moved"):
        decoder, f = latents.decoder_of(about, path, C, CPU)
        assert f == 2 and decoder(torch.zeros(1, C, 3, 5)).shape == (1, 3, 6, 10)
    with pytest.raises(UserError, match="autoencoder=other has sha256 .* but vae .*encoded the latents"):
        latents.decoder_of(about, "other", C, CPU)
    with pytest.raises(UserError, match="generates 3 channels, but the autoencoder has 5"):
        latents.decoder_of(about, "", 3, CPU)
    plain, _ = latents.decoder_of({}, "vae", C, CPU)                                       # official weights
    z = torch.randn(1, C, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(plain(z), VAES["vae"].decode(z / SCALING + SHIFT).sample, atol=1e-4, rtol=1e-4)
    pixels, f = latents.decoder_of({}, "", 3, CPU)                                         # a network of pixels
    assert f == 1 and torch.equal(pixels(z), z)
    with pytest.raises(UserError, match="latents of 4 channels; name their autoencoder"):
        latents.decoder_of({}, "", 4, CPU)


def test_the_page_shows_images_above_their_reconstructions(folder, tmp_path):
    """With a decoder that gives the images back the difference is the rounding to bytes; with another it is not."""
    source = Latents(folder / "out")
    images = ImageFolder(folder / "images", R, side=CROPS["mix"], flip=False)
    pixels = data.records(images, range(latents.SHOWN), [0] * latents.SHOWN)["image"]
    seen = []

    def oracle(z):
        seen.append(z)
        return pixels
    assert latents.write_reconstruction(source, oracle, CPU, tmp_path / "page.png") < 0.5 / 127.5
    assert torch.equal(seen[0], source.posterior_means(latents.SHOWN))
    width, height = Image.open(tmp_path / "page.png").size
    assert width > height
    assert latents.write_reconstruction(source, lambda z: pixels.flip(3), CPU, tmp_path / "page.png") > 0.1
    assert (folder / "out" / "panel.png").stat().st_size > 1000


@pytest.mark.slow
def test_diffusers_autoencoder_encodes_and_decodes(folder, tmp_path, monkeypatch):
    """The posterior and the decoder that diffusers documents, from a folder or from its vae/."""
    path = save_autoencoder(tmp_path / "model" / "vae")
    vae = REAL(path)
    monkeypatch.setattr(latents, "open_autoencoder", REAL)
    latents.encode(options(folder, out=tmp_path / "out", autoencoder=tmp_path / "model", count=3, variants=1))
    source = Latents(tmp_path / "out")
    originals = torch.from_numpy(np.load(tmp_path / "out" / "originals.npy")).float() / 127.5 - 1
    mean, std = moments(source)
    with torch.no_grad():
        theirs = vae.encode(originals).latent_dist
        np.testing.assert_allclose(mean[:, 0, 0], theirs.mean, atol=0.02)       # pixels rounded to bytes
        np.testing.assert_allclose(std[:, 0, 0], theirs.std, rtol=0.02)
        decoded = vae.decode(torch.from_numpy(mean[:, 0, 0]).float()).sample
    decoder, f = latents.decoder_of({"latents": json.dumps(header(source.meta))}, "", C, CPU)
    torch.testing.assert_close(decoder(source.posterior_means(3)), decoded, atol=1e-4, rtol=1e-4)
    assert f == 2 and source.meta["autoencoder"]["scaling_factor"] == SCALING and mean.std() > 0.05
    with pytest.raises(UserError, match="no autoencoder at 'tests'"):
        REAL("tests")


def test_the_fingerprint_ignores_paths(copy):
    first = Latents(copy).fingerprint
    meta = read_meta(copy)
    edit(copy, autoencoder={**meta["autoencoder"], "path": "/elsewhere"}, data={**meta["data"], "path": "moved"})
    assert Latents(copy).fingerprint == first
    edit(copy, scaling="factor")
    assert Latents(copy).fingerprint != first


def test_names_of_files_and_shards_cover_the_data_once():
    meta = {"n": 13, "shard": 4, "captions": True, "variants": 3, "mirrored": True, "channels": 5, "side": 8}
    assert [k for part in cached_latents.shards(meta) for k in part] == list(range(13))
    assert list(cached_latents.file_names(meta, 2)) == ["captions", "records", "latents"]
    assert cached_latents.latent_shape(meta, 7) == (7, 3, 2, 10, 8, 8)
    assert dataclasses.asdict(latents.Encode())["crop"] == Config().crop
    assert latents.Encode().augment == Config().augment      # what is encoded by default can be trained by default
