"""Latents: encode a data set once, so that training reads them in place of pictures.

python latents.py encode --data=path/to/folder --out=latents/mine --autoencoder=stabilityai/sd-vae-ft-ema
torchrun --nproc_per_node=8 -- latents.py encode --data=path/to/folder --out=latents/mine   (again after a stop)
python latents.py check --data=latents/mine            hashes of all files, and a picture of the round trip
python train.py --config=configs/imagenet256.py --data=latents/mine

A file of `shard` pictures is written whole or not at all, so a run that was killed goes on with the first one that
is missing. With the same --batch on the same machine the bytes are the same, however often it was killed and whatever
the number of processes. cached.py says what is written, autoencoder.py how. --autoencoder is a folder or a name that
diffusers' hub knows; its weights are safetensors. --encoder=clip:PATH stores the tokens of the captions too, and adds
them to latents that are there already: training with the same --encoder then runs no text tower.
Dimensions: B batch, C channels, h x w latent, f h x f w picture, R resolution, K stored crops, F mirror images.
"""
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import data
import machine
import skipped
import tokens
from autoencoder import decode, describe, downscale, encode_batch, open_autoencoder, open_decoder
from cached import (FORMAT, META, ORIGINALS, RECORD, RESULT, SCALINGS, Latents, affine, file_names, is_latents,
                    latent_shape, read_meta, shards)
from config import Config, ModelConfig, UserError, parse

SHOWN = 8                               # pictures in the round-trip panel
BLOCK = 64                              # pictures that are summed up at a time
MOST = 10 ** 8                          # pictures; more are a data set without an end


# ---------------------------------------------------------------- the round trip

def panel(source: Latents, decoder: Callable, device: torch.device) -> tuple[Image.Image, float]:
    """Round trip: the first pictures above what their latents decode to, and the rms difference of the two.

    The latents come by the way that training takes, so that a wrong scaling or autoencoder is seen here."""
    file = source.path / ORIGINALS
    try:
        originals = torch.from_numpy(np.load(file, allow_pickle=False)).float() / 127.5 - 1         # (k, 3, R, R)
        decoded = decoder(source.first(len(originals)).to(device)).cpu()
        both = torch.cat([originals, decoded])
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{file} does not go with the latents ({e}); encode the data again") from e
    rms = (originals - decoded.clamp(-1, 1)).square().mean().sqrt().item()
    return data.grid(both, len(originals), ["data"] * len(originals) + ["decoded"] * len(originals)), rms


def write_panel(source: Latents, decoder: Callable, device: torch.device, path: Path) -> None:
    """The round trip as a PNG, and a line that says how close it is."""
    page, rms = panel(source, decoder, device)
    png = io.BytesIO()
    page.save(png, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_bytes(path, png.getvalue())
    checkpoint.say(f"round trip through the autoencoder: rms difference {rms:.3f} of a range of 2, see {path}")


# ---------------------------------------------------------------- encoding

@dataclass(frozen=True)
class Encode:
    """What to encode."""
    data: str = ""                  # folder or shards of pictures, or "shapes"; whatever train.py takes
    out: str = "latents/mine"       # folder to write; the same command again goes on
    autoencoder: str = "stabilityai/sd-vae-ft-ema"  # folder or hub name of an AutoencoderKL
    resolution: int = 256           # R, side of the pictures in pixels
    semantics: str = "class"        # what must be there of every picture: class, text, or none
    augment: str = "crop+flip"      # as for train.py; flip stores the mirror image too
    crop: str = "global"            # as for train.py: global, local, mix
    variants: int = 1               # K, random crops of each picture
    encoder: str = ""               # of captions whose tokens are stored too: clip:PATH, as for train.py; empty = none
    scaling: str = "channel"        # channel: every channel to mean 0, variance 1; factor: the autoencoder's own
    count: int = 0                  # the first so many pictures; 0 = all
    seed: int = 0                   # keys the crops
    max_bad: float = 0.01           # share of unreadable pictures that is replaced before it is an error
    shard: int = 2048               # pictures a file, and most that a kill can cost
    batch: int = 16                 # pictures that are encoded at a time
    workers: int = 4                # threads that load pictures ahead
    threads: int = 0                # CPU threads; 0 = all


def open_pictures(o: Encode) -> data.Source:
    """The source of the pictures, not mirrored. UserError for options that go with no data."""
    for key in ("resolution", "variants", "shard", "batch"):
        if getattr(o, key) < 1:
            raise UserError(f"{key}={getattr(o, key)} must be at least 1")
    if o.scaling not in SCALINGS:
        raise UserError(f"unknown scaling={o.scaling!r}; there are {', '.join(SCALINGS)}")
    if o.semantics not in ("class", "text", "none"):
        raise UserError(f"unknown semantics={o.semantics!r}; there are class, text, none")
    if not o.data or is_latents(Path(o.data).expanduser()):
        raise UserError(f"data={o.data!r} must be pictures: a folder, shards or shapes")
    if o.variants > 1 and "crop" not in o.augment.split("+"):
        raise UserError(f"variants={o.variants} needs crops to be random; add crop to augment={o.augment!r}")
    kept = "+".join(a for a in o.augment.split("+") if a != "flip")
    m = ModelConfig(semantics=o.semantics, resolution=o.resolution, channels=3)
    source = data.open_source(Config(data=o.data, augment=kept, crop=o.crop, seed=o.seed, max_bad=o.max_bad, model=m,
                                     encoder="clip:none"))          # captions are kept as they are
    if not 0 <= o.count <= len(source) or (o.count or len(source)) > MOST:
        raise UserError(f"count={o.count}, but {o.data} has {len(source):,} pictures; choose at most "
                        f"{min(MOST, len(source)):,}")
    return source


def open_encoder(o: Encode, device: torch.device) -> data.TextEncoder | None:
    """The text encoder whose tokens are stored; None if none are. UserError for one that there is not."""
    if o.encoder and not o.encoder.startswith("clip:"):
        raise UserError(f"encoder={o.encoder!r} is not stored; there are clip:PATH, and empty for none")
    if o.encoder and o.semantics != "text":
        raise UserError(f"encoder={o.encoder!r} reads captions; semantics={o.semantics!r} has none, say "
                        "--semantics=text")
    wanted = Config(encoder=o.encoder, model=ModelConfig(semantics="text"))
    return data.text_encoder(wanted, device=device) if o.encoder else None


def plan(o: Encode, source: data.Source, vae: nn.Module, encoder: data.TextEncoder | None) -> dict[str, Any]:
    """meta.json before anything is encoded. UserError for a resolution that the autoencoder cannot halve so often."""
    f = downscale(vae)
    if o.resolution % f:
        raise UserError(f"resolution={o.resolution} is not a multiple of {f}, by which the autoencoder divides it")
    row = data.records(source, [0], [0])
    controls = [c for c in source.controls if c != "flip"]
    return {"format": FORMAT, "autoencoder": describe(vae, o.autoencoder),
            "data": {"path": o.data, "fingerprint": source.fingerprint},
            "n": o.count or len(source), "shard": o.shard, "variants": o.variants,
            "mirrored": "flip" in o.augment.split("+"), "resolution": o.resolution, "side": o.resolution // f,
            "channels": int(vae.config.latent_channels), "augment": o.augment, "crop": o.crop, "seed": o.seed,
            "controls": controls, "labels": "label" in row, "captions": "caption" in row,
            "classes": list(source.classes), "scaling": o.scaling,
            **({"encoder": encoder.describe()} if encoder else {})}


def missing(out: Path, meta: dict, shard_numbers: Iterable[int]) -> list[int]:
    """Those of these shards of which a file is not there."""
    return [s for s in shard_numbers if not all((out / name).exists() for name in file_names(meta, s).values())]


def begin(out: Path, meta: dict, source: data.Source) -> None:
    """meta.json without results, and the first pictures, unless all is done already.

    Tokens may be added to latents that have none. UserError if the folder holds other latents, or the disk has no
    room."""
    if is_latents(out):
        old = read_meta(out, finished=False)
        if changed := other(old, meta):
            raise UserError(f"{out} holds other latents: {'; '.join(changed)[:2000]}. Choose another --out")
        if missing(out, meta, range(len(shards(meta)))):
            checkpoint.write_text(out / META, json.dumps(meta, indent=1))
        return
    if any(out.glob("latents-*.npy")):
        raise UserError(f"{out} holds latents without {META}, of nobody knows what. Choose another --out")
    need, free = 2 * int(np.prod(latent_shape(meta, meta["n"]), dtype=object)), shutil.disk_usage(out).free
    if need > free:
        raise UserError(f"{meta['n']:,} pictures take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {out}")
    rows = list(range(min(SHOWN, meta["n"])))
    pixels = data.records(source, rows, [0] * len(rows))["image"]
    save(out / ORIGINALS, ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())
    checkpoint.write_text(out / META, json.dumps(meta, indent=1))


def other(old: dict, meta: dict) -> list[str]:
    """What is planned otherwise than in the folder, a line each; where a thing lies may differ, and tokens be new."""
    changed = [f"{key}: {old[key]!r} -> {meta[key]!r}" for key in meta if key not in ("data", "autoencoder", "encoder")
               and old[key] != meta[key]]
    for key, where, what in (("autoencoder", "path", "sha256"), ("data", "path", "fingerprint"),
                             ("encoder", "name", "sha256")):
        a, b = old.get(key, {}), meta.get(key, {})
        if a and a.get(what) != b.get(what):
            changed.append(f"{key}: {a.get(where)} -> {b.get(where, 'none')}, whose {what} differs")
    return changed


def save(path: Path, array: np.ndarray) -> None:
    """An array as an .npy file that appears whole."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    checkpoint.write_bytes(path, file.getvalue())


def write_shard(o: Encode, s: int, meta: dict, source: data.Source, vae: nn.Module, bar: tqdm) -> None:
    """Encodes the pictures of shard s and writes its files; the shard is done where all of them are there.

    Crop v of picture k is what the source gives of k in epoch v."""
    part, K, device = shards(meta)[s], meta["variants"], next(vae.parameters()).device
    moments = np.empty(latent_shape(meta, len(part)), np.float16)
    rows, captions = np.zeros((len(part), K), RECORD), bytearray()
    starts = [(k, v) for v in range(K) for k in range(part.start, part.stop, o.batch)]
    fetch = lambda k, v: data.records(source, (ks := range(k, min(k + o.batch, part.stop))), [v] * len(ks))
    with closing(data.prefetch(fetch, starts, o.workers)) as batches:
        for (k, v), batch in zip(starts, batches):
            here = slice(k - part.start, k - part.start + len(batch["image"]))
            x = batch["image"].to(device)                                       # (B, 3, R, R)
            for f, view in enumerate((x, x.flip(3))[:1 + meta["mirrored"]]):
                moments[here, v, f] = encode_batch(view, vae).cpu().numpy()     # (B, 2C, h, w)
            if not np.isfinite(moments[here, v]).all():
                raise UserError(f"latents of pictures {k} to {k + len(x) - 1} are not finite in float16; "
                                f"{o.autoencoder} does not suit them")
            rows[here, v]["size"], rows[here, v]["crop"] = batch["size"].numpy(), batch["crop"].numpy()
            rows[here, v]["label"] = batch["label"].numpy() if meta["labels"] else -1
            for b, caption in enumerate(batch.get("caption", [])):
                line = json.dumps(caption, ensure_ascii=False).encode("utf-8", "surrogatepass")
                rows[k - part.start + b, v]["caption"] = len(captions), len(captions) + len(line)
                captions += line + b"\n"
            bar.update(len(x))

    out, names = Path(o.out), file_names(meta, s)
    if meta["captions"]:
        checkpoint.write_bytes(out / names["captions"], bytes(captions))
    save(out / names["records"], rows)
    save(out / names["latents"], moments)


def write_tokens(out: Path, s: int, meta: dict, encoder: data.TextEncoder) -> None:
    """Encodes the captions of shard s, as they were written, and writes its tokens."""
    names = file_names(meta, s)
    rows, lines = np.load(out / names["records"], allow_pickle=False), (out / names["captions"]).read_bytes()
    captions = [json.loads(lines[a:b]) for a, b in rows["caption"].reshape(-1, 2).tolist()]
    found, spans = tokens.pack(captions, encoder)                               # (T, E), (n K, 2)
    save(out / names["spans"], spans.reshape(*rows.shape, 2))
    save(out / names["tokens"], found)


def finish(out: Path, meta: dict) -> None:
    """Statistics of every channel in float64, hashes of all files, and with them the final meta.json.

    Mean and variance are those of the mixture of all posteriors: E mean, and E (mean^2 + std^2) - (E mean)^2."""
    C, total, count, digests = meta["channels"], 0.0, 0, {ORIGINALS: digest(out / ORIGINALS)}
    for s in tqdm(range(len(shards(meta))), desc="statistics", unit="file", disable=None):
        digests |= {name: digest(out / name) for name in file_names(meta, s).values()}
        moments = np.load(out / file_names(meta, s)["latents"], mmap_mode="r", allow_pickle=False)
        for k in range(0, len(moments), BLOCK):
            mean, std = np.split(moments[k:k + BLOCK].astype(np.float64), 2, axis=3)    # (B, K, F, C, h, w)
            total = total + np.stack([mean.sum((0, 1, 2, 4, 5)), (mean ** 2 + std ** 2).sum((0, 1, 2, 4, 5))])
            count += mean.size // C
    mean, square = total / count                                                # (C,) each
    std = np.sqrt(square - mean ** 2)
    result = {"statistics": {"mean": mean.tolist(), "std": std.tolist()}, "sha256": digests}
    affine(meta | result)
    checkpoint.write_text(out / META, json.dumps(meta | result, indent=1))


def digest(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def encode(o: Encode) -> None:
    """All pictures of a source to a folder of latents; the processes take files in turn."""
    place, out = machine.setup(o.threads), Path(o.out)
    source, vae = open_pictures(o), open_autoencoder(o.autoencoder, place.device)
    encoder = open_encoder(o, place.device)
    meta = plan(o, source, vae, encoder)
    with ExitStack() as held:
        refused = None
        if place.rank == 0:
            try:
                held.enter_context(checkpoint.lock(out))
                begin(out, meta, source)
            except UserError as e:
                refused = e
        if machine.agree(-1 if refused else 0, place) < 0:
            raise refused or UserError("rank 0 does not start; its message says why")
        skipped.follow(source, out)
        parts = shards(meta)
        mine = range(place.rank, len(parts), place.world)
        todo = missing(out, {k: v for k, v in meta.items() if k != "encoder"}, mine)
        with tqdm(total=meta["variants"] * sum(len(parts[s]) for s in todo), desc="encoding", unit="image",
                  disable=place.rank > 0 or None) as bar:
            for s in todo:
                write_shard(o, s, meta, source, vae, bar)
        todo = missing(out, meta, mine) if encoder else []
        for s in tqdm(todo, desc="captions", unit="file", disable=place.rank > 0 or not todo or None):
            write_tokens(out, s, meta, encoder)

        machine.add_up(torch.zeros(1, device=place.device), place).item()       # every process is through
        if place.rank == 0:
            if not RESULT.keys() <= read_meta(out, finished=False).keys():
                finish(out, meta)
            latents = Latents(out)
            write_panel(latents, partial(decode, meta=latents.meta, vae=vae), place.device, out / "panel.png")
            moments = {k: [round(x, 3) for x in v] for k, v in latents.meta["statistics"].items()}
            shape = f"{meta['channels']} x {meta['side']} x {meta['side']}"
            checkpoint.say(f"{len(latents):,} pictures in {out}, {shape}, with {moments}")


# ---------------------------------------------------------------- checking

@dataclass(frozen=True)
class Check:
    """What to check."""
    data: str = "latents/mine"      # folder of latents
    autoencoder: str = ""           # where its autoencoder is now; empty = where it was


def check(o: Check) -> None:
    """Compares the hashes of all files, prints what is there, draws the round trip. UserError for what differs."""
    path = Path(o.data).expanduser()
    source = Latents(path)
    meta, bad = source.meta, []
    for name, wanted in tqdm(meta["sha256"].items(), desc="hashing", unit="file", disable=None):
        if not (path / name).is_file() or digest(path / name) != wanted:
            bad.append(name)
    if bad:
        raise UserError(f"{len(bad)} files of {path} are damaged or missing: {', '.join(bad[:10])}; remove "
                        f"these, and encode with the same options again")
    keys = ("n", "resolution", "side", "channels", "variants", "mirrored", "augment", "crop", "scaling", "statistics")
    print("\n".join(f"{key:12} {meta[key]}" for key in keys))
    print(f"{'classes':12} {len(meta['classes'])}\n{'captions':12} {meta['captions']}\n"
          f"{'autoencoder':12} {meta['autoencoder']['path']} {meta['autoencoder']['sha256'][:12]}")
    if source.encoder:
        print(f"{'encoder':12} {source.encoder['name']} {source.encoder['sha256'][:12]}, {source.encoder['length']} x "
              f"{source.encoder['dim']}, {sum(map(len, source.tokens)):,} tokens stored")
    decoder, _ = open_decoder(meta, o.autoencoder, meta["channels"], torch.device("cpu"))
    write_panel(source, decoder, torch.device("cpu"), path / "panel.png")


def main(argv: list[str]) -> None:
    if argv[:1] == ["encode"]:
        encode(parse(argv[1:], Encode()))
    elif argv[:1] == ["check"]:
        check(parse(argv[1:], Check()))
    else:
        raise UserError(f"latents.py wants encode or check, got {' '.join(argv[:1]) or 'nothing'}; "
                        "latents.py encode --help lists the options")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        machine.leave()
    except UserError as e:
        checkpoint.say(f"error: {e}.")
        sys.exit(2)
    except KeyboardInterrupt:
        checkpoint.say("stopped; the same command goes on.")
        sys.exit(130)
