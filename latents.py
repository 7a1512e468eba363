"""Latents: encode a data set once with an autoencoder, train on the latents, and decode samples.

python latents.py encode --data=path/to/folder --out=latents/mine --autoencoder=stabilityai/sd-vae-ft-ema
torchrun --nproc_per_node=8 -- latents.py encode --data=path/to/folder --out=latents/mine     (resumes after a stop)
python latents.py check --data=latents/mine                 (hashes of all files, and a page of reconstructions)

A shard of --shard images appears whole or not at all, and a run resumes with the missing ones. The same --batch on the
same machine gives the same bytes, however often the run was killed and with any number of processes. --autoencoder is
a folder or a hub name of diffusers' AutoencoderKL, in safetensors; it runs frozen and in fp32. --encoder=clip:PATH also
stores the text tokens of captions, and adds them to latents that have none, so that training with the same --encoder
runs no text tower. sources/cached_latents.py describes the files.
Dimensions: B batch, C channels, h x w latent, f h x f w image, R resolution, n images of a file with K crops and F
mirror images each, T tokens of a file, E width of a token.
"""
import io
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
from config import Config, ModelConfig, UserError, check_name, help_text, parse, run
from runtime import checkpoint, distributed, log
from runtime.optional import optional_import
from runtime.plot import from_uint8, grid, to_uint8
from sources.cached_latents import (FORMAT, META, ORIGINALS, RECORD, RESULTS, SCALINGS, Latents, content, file_names,
                                    header, latent_scaling, latent_shape, pack_tokens, read_meta, shards)
from text import make_encoder, weights_sha256

SHOWN = 8                               # images on the page of reconstructions
CHUNK = 8                               # images decoded at a time
BLOCK = 64                              # images summed up at a time


def open_autoencoder(path: str, device: torch.device | str = "cpu") -> nn.Module:
    """Load the frozen fp32 autoencoder of a folder (or its vae/) or a hub name. UserError if it cannot be loaded."""
    kind, folder = optional_import("diffusers", "the autoencoder", part="AutoencoderKL"), Path(path).expanduser()
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    try:
        vae = kind.from_pretrained(str(folder) if folder.is_dir() else path, torch_dtype=torch.float32,
                                   use_safetensors=True, low_cpu_mem_usage=False)
    except Exception as e:                                  # the hub, the network and the file raise anything
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise UserError(f"no autoencoder at {path!r}: {reason}. Give a folder with config.json and "
                        f"diffusion_pytorch_model.safetensors, or a name like stabilityai/sd-vae-ft-ema") from e
    return vae.to(device).eval().requires_grad_(False)


def describe(vae: nn.Module, path: str) -> dict[str, Any]:
    """Identify an autoencoder, with the scaling in its config: z = (latent - shift_factor) scaling_factor."""
    scaling, shift = float(vae.config.scaling_factor), float(getattr(vae.config, "shift_factor", None) or 0)
    return {"path": path, "sha256": weights_sha256(vae, f"{scaling} {shift}"), "scaling_factor": scaling,
            "shift_factor": shift}


def downscale(vae: nn.Module) -> int:
    """f, the side of an image divided by that of its latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.inference_mode()
def decode(z: Tensor, meta: dict, vae: nn.Module) -> Tensor:
    """Decode latents, scaled as `meta` says, to images of about [-1, 1]. (B, C, h, w) -> (B, 3, f h, f w)

    meta: of a folder of latents, or cached_latents.header of it from the weights of a run."""
    shift, scale = (v.to(z.device) for v in latent_scaling(meta))
    return torch.cat([vae.decode(part * scale + shift).sample for part in z.float().split(CHUNK)])


def decoder_of(about: dict[str, str], path: str, channels: int, device: torch.device) -> tuple[Callable, int]:
    """Return the decoder (B, C, h, w) -> (B, 3, f h, f w) of a run, and f; for a pixel network the identity and 1.

    about: the header of the run's weights. path: the autoencoder, if it has moved or, as for official weights, the
    header has no latents; then its own factor scales. UserError for another autoencoder than the header's."""
    meta = json.loads(about.get("latents", "null"))
    if not meta and not path and channels == 3:
        return Tensor.float, 1
    if not meta and not path:
        raise UserError(f"the model generates latents of {channels} channels; name their autoencoder, for example "
                        "--autoencoder=stabilityai/sd-vae-ft-ema")
    path = path or meta["autoencoder"]["path"]
    vae = open_autoencoder(path, device)
    found = describe(vae, path)
    meta = meta or {"autoencoder": found, "scaling": "factor", "channels": vae.config.latent_channels}
    if found["sha256"] != (stored := meta["autoencoder"])["sha256"]:
        raise UserError(f"autoencoder={path} has sha256 {found['sha256'][:12]}, but {stored['path']} with "
                        f"{stored['sha256'][:12]} encoded the latents")
    if channels != meta["channels"]:
        raise UserError(f"the model generates {channels} channels, but the autoencoder has {meta['channels']}")
    return partial(decode, meta=meta, vae=vae), downscale(vae)


def write_reconstruction(source: Latents, decoder: Callable, device: torch.device, path: Path) -> float:
    """Write a page of the first images above their reconstructions, and return the rms difference of the two.

    Training reads the latents in the same way, so a wrong scaling or autoencoder shows here."""
    file = source.path / ORIGINALS
    try:
        originals = from_uint8(np.load(file, allow_pickle=False))           # (B, 3, R, R)
        decoded = decoder(source.posterior_means(len(originals)).to(device)).cpu()
        both = torch.cat([originals, decoded])
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{file} does not match the latents ({e}); encode the data again") from e
    rms = (originals - decoded.clamp(-1, 1)).square().mean().sqrt().item()
    path.parent.mkdir(parents=True, exist_ok=True)
    with log.atomic_path(path) as tmp:
        grid(both, len(originals), ["data"] * len(originals) + ["decoded"] * len(originals)).save(tmp, "png")
    log.info(f"reconstruction by the autoencoder: rms difference {rms:.3f} of a range of 2, see {path}")
    return rms


@dataclass(frozen=True)
class Encode:
    """Options of `latents.py encode`."""
    data: str = ""                  # images: a folder, shards or "shapes", as for train.py
    out: str = "latents/mine"       # folder to write; the same command again resumes
    autoencoder: str = "stabilityai/sd-vae-ft-ema"  # folder or hub name of an AutoencoderKL
    resolution: int = 256           # R, side of the images in pixels
    semantics: str = "class"        # what every image must have: class, text, or none
    augment: str = "crop+flip"      # as for train.py; flip stores the mirror image too
    crop: str = "global"            # as for train.py: global, local, mix
    variants: int = 1               # K, random crops of each image
    encoder: str = ""               # also store text tokens of the captions: clip:PATH, as for train.py; empty = none
    scaling: str = "channel"        # channel: every channel to mean 0, variance 1; factor: the autoencoder's own
    count: int = 0                  # the first so many images; 0 = all
    seed: int = 0                   # keys the crops
    max_bad_fraction: float = 0.01  # share of unreadable images that is replaced before it is an error
    shard: int = 2048               # images a file, and the most that a kill can cost
    batch: int = 16                 # images encoded at a time
    workers: int = 4                # threads that load images ahead
    threads: int = 0                # CPU threads; 0 = all


def open_images(o: Encode) -> data.Source:
    """Open the source of the images, not mirrored. UserError for options that do not fit together or to the data."""
    for key in ("resolution", "variants", "shard", "batch"):
        if getattr(o, key) < 1:
            raise UserError(f"{key}={getattr(o, key)} must be at least 1")
    check_name("scaling", o.scaling, SCALINGS)
    check_name("semantics", o.semantics, ("class", "text", "none"))
    if not o.data or Latents.takes(o.data):
        raise UserError(f"data={o.data!r} must be images: a folder, shards or shapes")
    augment = o.augment.split("+")
    if o.variants > 1 and "crop" not in augment:
        raise UserError(f"variants={o.variants} needs random crops; add crop to augment={o.augment!r}")
    if o.encoder and (o.semantics != "text" or not o.encoder.startswith("clip:")):
        raise UserError(f"encoder={o.encoder!r} with semantics={o.semantics!r} stores no tokens; use "
                        "--encoder=clip:PATH with --semantics=text, or --encoder= for none")
    model = ModelConfig(semantics=o.semantics, resolution=o.resolution, channels=3)
    source = data.open_source(Config(data=o.data, augment="+".join(a for a in augment if a != "flip"), crop=o.crop,
                                     seed=o.seed, max_bad_fraction=o.max_bad_fraction, model=model,
                                     encoder="clip:none"))
    if not 0 <= o.count <= len(source):
        raise UserError(f"count={o.count}, but {o.data} has {len(source):,} images")
    return source


def make_meta(o: Encode, source: data.Source, vae: nn.Module, encoder: data.TextEncoder | None) -> dict[str, Any]:
    """Make meta.json as it is before anything is encoded."""
    f = downscale(vae)
    if o.resolution % f:
        raise UserError(f"resolution={o.resolution} must be a multiple of {f}, the autoencoder's downscaling")
    record = data.records(source, [0], [0])
    meta = {"format": FORMAT, "autoencoder": describe(vae, o.autoencoder),
            "data": {"path": o.data, "fingerprint": source.fingerprint},
            "n": o.count or len(source), "shard": o.shard, "variants": o.variants,
            "mirrored": "flip" in o.augment.split("+"), "resolution": o.resolution, "side": o.resolution // f,
            "channels": int(vae.config.latent_channels), "augment": o.augment, "crop": o.crop, "seed": o.seed,
            "controls": [c for c in source.controls if c != "flip"], "labels": "label" in record,
            "captions": "caption" in record, "classes": list(source.classes), "scaling": o.scaling}
    return meta | ({"encoder": encoder.describe()} if encoder else {})


def missing(out: Path, meta: dict) -> list[int]:
    """List the shards of which a file does not exist."""
    return [s for s in range(len(shards(meta)))
            if not all((out / name).exists() for name in file_names(meta, s).values())]


def start_or_resume(out: Path, meta: dict, source: data.Source) -> None:
    """Write meta.json without results, and the first images, unless the folder is finished.

    Latents without tokens may get some. UserError if the folder holds other latents or the disk is too small."""
    if Latents.takes(out):
        old, new = content(read_meta(out, finished=False)), content(meta)
        keys = [key for key in old | new if key not in RESULTS and (key != "encoder" or key in old)]
        if changed := [f"{key}: {old[key]!r} -> {new.get(key)!r}" for key in keys if old[key] != new.get(key)]:
            raise UserError(f"{out} holds other latents: {'; '.join(changed)[:2000]}. Choose another --out")
        if not missing(out, meta):
            return
    else:
        if any(out.glob("latents-*.npy")):
            raise UserError(f"{out} holds latents without {META}. Choose another --out")
        need, free = 2 * int(np.prod(latent_shape(meta, meta["n"]), dtype=object)), shutil.disk_usage(out).free
        if need > free:
            raise UserError(f"{meta['n']:,} images need {need / 1e9:.1f} GB, but {out} has {free / 1e9:.1f} GB free; "
                            "choose another --out or a smaller --count")
        first = range(min(SHOWN, meta["n"]))
        pixels = data.records(source, first, [0] * len(first))["image"]
        save(out / ORIGINALS, to_uint8(pixels).transpose(0, 3, 1, 2))
    log.write_text(out / META, json.dumps(meta, indent=1))


def save(path: Path, array: np.ndarray) -> None:
    """Write an array as an .npy file that appears whole or not at all."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    log.write_bytes(path, file.getvalue())


@torch.inference_mode()
def write_shard(o: Encode, s: int, meta: dict, source: data.Source, vae: nn.Module, bar: tqdm) -> None:
    """[LDM] sec. 3.1: write mean and standard deviation of the posteriors of shard s, and its other files.

    Crop v of image k is the source's k in epoch v."""
    part, K, device = shards(meta)[s], meta["variants"], next(vae.parameters()).device
    moments = np.empty(latent_shape(meta, len(part)), np.float16)
    rows, captions = np.zeros((len(part), K), RECORD), bytearray()
    starts = [(k, v) for v in range(K) for k in range(part.start, part.stop, o.batch)]
    fetch = lambda k, v: data.records(source, (ks := range(k, min(k + o.batch, part.stop))), [v] * len(ks))
    with closing(data.prefetch(fetch, starts, o.workers)) as batches:
        for (k, v), batch in zip(starts, batches):
            x = batch["image"].to(device)                                       # (B, 3, R, R)
            here = slice(k - part.start, k - part.start + len(x))
            for f, view in enumerate((x, x.flip(3))[:1 + meta["mirrored"]]):
                posterior = vae.encode(view).latent_dist                        # (B, C, h, w)
                moments[here, v, f] = torch.cat([posterior.mean, posterior.std], dim=1).cpu().numpy()
            if not np.isfinite(moments[here, v]).all():
                raise UserError(f"latents of images {k} to {k + len(x) - 1} are not finite in float16; use another "
                                f"autoencoder than {o.autoencoder}")
            rows[here, v]["size"], rows[here, v]["crop"] = batch["size"].numpy(), batch["crop"].numpy()
            rows[here, v]["label"] = batch["label"].numpy() if meta["labels"] else -1
            for row, caption in zip(rows[here, v], batch.get("caption", [])):
                line = json.dumps(caption, ensure_ascii=False).encode("utf-8", "surrogatepass")
                row["caption"] = len(captions), len(captions) + len(line)
                captions += line + b"\n"
            bar.update(len(x))
    out, names = Path(o.out), file_names(meta, s)
    if meta["captions"]:
        log.write_bytes(out / names["captions"], bytes(captions))
    save(out / names["records"], rows)
    save(out / names["latents"], moments)


def write_tokens(out: Path, s: int, meta: dict, encoder: data.TextEncoder) -> None:
    """Encode the stored captions of shard s and write their tokens."""
    names = file_names(meta, s)
    rows, lines = np.load(out / names["records"], allow_pickle=False), (out / names["captions"]).read_bytes()
    captions = [json.loads(lines[a:b]) for a, b in rows["caption"].reshape(-1, 2).tolist()]
    tokens, spans = pack_tokens(captions, encoder)                              # (T, E), (n K, 2)
    save(out / names["spans"], spans.reshape(*rows.shape, 2))
    save(out / names["tokens"], tokens)


def write_statistics(out: Path, meta: dict) -> None:
    """Write the final meta.json: with hashes of all files, and in float64 mean and std of every channel.

    They are those of the mixture of all posteriors: E mean, and E (mean^2 + std^2) - (E mean)^2."""
    total, count, names = 0.0, 0, [ORIGINALS]
    for s in tqdm(range(len(shards(meta))), desc="statistics", unit="file", disable=None):
        names += file_names(meta, s).values()
        moments = np.load(out / file_names(meta, s)["latents"], mmap_mode="r", allow_pickle=False)
        for k in range(0, len(moments), BLOCK):
            mean, std = np.split(moments[k:k + BLOCK].astype(np.float64), 2, axis=3)    # (B, K, F, C, h, w)
            total = total + np.stack([mean.sum((0, 1, 2, 4, 5)), (mean ** 2 + std ** 2).sum((0, 1, 2, 4, 5))])
            count += mean.size // meta["channels"]
    mean, square = total / count                                                # (C,) each
    std = np.sqrt(square - mean ** 2)
    hashes = {name: checkpoint.sha256_file(out / name) for name in names}
    meta = meta | {"statistics": {"mean": mean.tolist(), "std": std.tolist()}, "sha256": hashes}
    latent_scaling(meta)                                    # an error now rather than in training
    log.write_text(out / META, json.dumps(meta, indent=1))


def encode(o: Encode) -> None:
    """Encode all images of a source into a folder of latents; the processes take shards in turn."""
    dist, out, error = distributed.setup(o.threads), Path(o.out), None
    source, vae = open_images(o), open_autoencoder(o.autoencoder, dist.device)
    text = Config(encoder=o.encoder, model=ModelConfig(semantics="text"))
    encoder = make_encoder(text, device=dist.device) if o.encoder else None
    meta = make_meta(o, source, vae, encoder)
    mine = lambda meta: [s for s in missing(out, meta) if s % dist.world == dist.rank]
    with ExitStack() as stack:
        if dist.rank == 0:
            try:
                stack.enter_context(checkpoint.lock(out))
                start_or_resume(out, meta, source)
            except UserError as e:
                error = e
        if distributed.broadcast_from_rank0(-1 if error else 0, dist) < 0:
            raise error or UserError("rank 0 cannot start; see its message")
        log.follow(source, out)
        images, K = {key: value for key, value in meta.items() if key != "encoder"}, meta["variants"]
        with tqdm(total=K * sum(len(shards(meta)[s]) for s in mine(images)), desc="encoding", unit="image",
                  disable=dist.rank > 0 or None) as bar:
            for s in mine(images):
                write_shard(o, s, meta, source, vae, bar)
        for s in tqdm(mine(meta), desc="tokens", unit="file", disable=dist.rank > 0 or not encoder or None):
            write_tokens(out, s, meta, encoder)
        distributed.all_reduce_sum(torch.zeros(1, device=dist.device), dist).item()         # wait for every process
        if dist.rank == 0:
            if not read_meta(out, finished=False).keys() >= set(RESULTS):
                write_statistics(out, meta)
            latents = Latents(out)
            write_reconstruction(latents, partial(decode, meta=latents.meta, vae=vae), dist.device, out / "panel.png")
            log.info(f"{len(latents):,} images in {out}; latents.py check --data={out} shows their statistics")


@dataclass(frozen=True)
class Check:
    """Options of `latents.py check`."""
    data: str = "latents/mine"      # folder of latents
    autoencoder: str = ""           # where its autoencoder is now; empty = where it was


def check(o: Check) -> None:
    """Compare the hashes of all files, print meta.json, and write the page of reconstructions."""
    source, cpu = Latents(o.data), torch.device("cpu")
    meta = source.meta
    bad = [name for name, digest in tqdm(meta["sha256"].items(), desc="hashing", unit="file", disable=None)
           if not (file := source.path / name).is_file() or checkpoint.sha256_file(file) != digest]
    if bad:
        raise UserError(f"{len(bad)} files of {source.path} are damaged or missing: {', '.join(bad[:10])}; remove "
                        "these, and encode with the same options again")
    rows = {key: value for key, value in meta.items() if key != "sha256"} | {"classes": len(meta["classes"])}
    rows |= {"tokens": sum(map(len, source.tokens))} if source.encoder else {}
    print("\n".join(f"{key:12} {value}" for key, value in rows.items()))
    decoder, _ = decoder_of({"latents": json.dumps(header(meta))}, o.autoencoder, meta["channels"], cpu)
    write_reconstruction(source, decoder, cpu, source.path / "panel.png")


def main(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        print(f"latents.py encode: {help_text(Encode())}\n\nlatents.py check: {help_text(Check())}")
    elif argv[:1] == ["encode"]:
        encode(parse(argv[1:], Encode()))
    elif argv[:1] == ["check"]:
        check(parse(argv[1:], Check()))
    else:
        raise UserError(f"latents.py wants encode or check, got {' '.join(argv[:1]) or 'nothing'}; see --help")


if __name__ == "__main__":
    run(main, cleanup=distributed.cleanup)
