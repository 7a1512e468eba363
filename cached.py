"""A folder of cached latents: its format, and the data source that reads it.

meta.json              autoencoder, data, what was varied, scaling, statistics of every channel, sha256 of the files
latents-00000.npy      (n, K, F, 2C, h, w) float16: mean and standard deviation of the posterior of each picture
records-00000.npy      (n, K) RECORD: label, size, crop, and where its caption lies in
captions-00000.jsonl   one JSON string a line; only where the data has captions
tokens-, spans-00000.npy   what a text encoder makes of them, where that was asked for: tokens.py
originals.npy          (k, 3, R, R) uint8: the first pictures as they were, to compare with what is decoded

K stored crops of a picture, F = 2 with its mirror image beside each, else 1: a latent cannot be cropped or mirrored
afterwards. latents.py writes such a folder. Reading maps the files to memory and unpickles nothing.
Dimensions: n pictures of one file, B batch, C channels, h = w side of a latent, R resolution of a picture.
"""
import hashlib
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Config, UserError
from rng import seed64
from tokens import ENCODER, padded

META, ORIGINALS = "meta.json", "originals.npy"
FORMAT = 1                              # of these folders; a newer one is refused
ATTEMPTS = 20                           # to replace one damaged latent
SCALINGS = ("channel", "factor")
RECORD = np.dtype([("label", "<i8"), ("size", "<f4", 2), ("crop", "<f4", 2), ("caption", "<i8", 2)])
# What meta.json must say, and of which type.
PLAN = {"format": int, "autoencoder": dict, "data": dict, "n": int, "shard": int, "variants": int, "mirrored": bool,
        "resolution": int, "side": int, "channels": int, "augment": str, "crop": str, "seed": int, "controls": list,
        "labels": bool, "captions": bool, "classes": list, "scaling": str}
RESULT = {"statistics": dict, "sha256": dict}
AUTOENCODER = {"path": str, "sha256": str, "scaling_factor": float, "shift_factor": float}


# ---------------------------------------------------------------- the format

def file_names(meta: dict, s: int) -> dict[str, str]:
    """Names of the files of shard s by what they hold."""
    names = {"captions": f"captions-{s:05d}.jsonl"} if meta["captions"] else {}
    names |= {"records": f"records-{s:05d}.npy", "latents": f"latents-{s:05d}.npy"}
    return names | ({"spans": f"spans-{s:05d}.npy", "tokens": f"tokens-{s:05d}.npy"} if "encoder" in meta else {})


def shards(meta: dict) -> list[range]:
    """The pictures of every shard."""
    return [range(k, min(k + meta["shard"], meta["n"])) for k in range(0, meta["n"], meta["shard"])]


def latent_shape(meta: dict, n: int) -> tuple[int, ...]:
    """(n, K, F, 2C, h, w) of a file of n pictures."""
    return n, meta["variants"], 1 + meta["mirrored"], 2 * meta["channels"], meta["side"], meta["side"]


def is_latents(path: Path) -> bool:
    """Whether a folder is one of cached latents, finished or not."""
    return (path / META).is_file()


def read_meta(path: Path, finished: bool = True) -> dict:
    """meta.json of a folder. UserError if it is missing, damaged, newer than this code or, if that counts, not
    finished."""
    file = path / META
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or "format" not in meta:
            raise ValueError("no format in it")
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file} is not that of a folder of latents ({e}); latents.py encode writes one") from e
    if type(meta["format"]) is int and meta["format"] > FORMAT:
        raise UserError(f"{file} has format {meta['format']}, this code reads up to {FORMAT}; update it")
    if finished and not RESULT.keys() <= meta.keys():
        raise UserError(f"{path} is not finished; run latents.py encode with the same options again")
    wanted = PLAN | (RESULT if finished else {})
    wrong = [key for key, kind in wanted.items() if type(meta.get(key)) is not kind]
    wrong = wrong or [key for key, kind in AUTOENCODER.items() if type(meta["autoencoder"].get(key)) is not kind]
    if "encoder" in meta:
        about = meta["encoder"] if isinstance(meta["encoder"], dict) else {}
        wrong += [f"encoder.{key}" for key, kind in ENCODER.items() if type(about.get(key)) is not kind]
    if wrong:
        raise UserError(f"{file} is damaged in {', '.join(wrong)}; encode the data again")
    if meta["scaling"] not in SCALINGS or min(meta[k] for k in ("n", "shard", "variants", "side", "channels")) < 1:
        raise UserError(f"{file} is damaged: a scaling other than {', '.join(SCALINGS)}, or a number below 1")
    return meta


def affine(meta: dict) -> tuple[Tensor, Tensor]:
    """shift and scale, (C, 1, 1) each, of z = (latent - shift) / scale.

    channel: those with which every channel of the data set has mean 0 and variance 1, as [EDM2] and [MAG] have it
    factor: those of the autoencoder's config, as [LDM], [DiT] have it, z = (latent - shift_factor) scaling_factor"""
    about, C = meta["autoencoder"], meta["channels"]
    if meta["scaling"] == "channel":
        shift, scale = meta["statistics"]["mean"], meta["statistics"]["std"]
    else:
        shift, scale = [about["shift_factor"]] * C, [1 / about["scaling_factor"]] * C
    if len(shift) != C or len(scale) != C or not all(map(math.isfinite, shift + scale)) or min(scale) <= 0:
        raise UserError(f"scaling {meta['scaling']!r} wants {C} finite numbers, the scales above 0; meta.json has "
                        f"{shift} and {scale}")
    return torch.tensor(shift).view(C, 1, 1), torch.tensor(scale).view(C, 1, 1)


def header(meta: dict) -> dict[str, Any]:
    """What is needed to decode, for the header of a run's weights."""
    return {key: meta[key] for key in ("autoencoder", "scaling", "statistics", "resolution", "side", "channels")}


# ---------------------------------------------------------------- the source

class Latents:
    """[LDM] sec. 3.1: latents of pictures, a new draw from each posterior every epoch. The record is data.py's.

    image is z = (mean + std eps - shift) / scale, (C, h, w); crop, mirror image and eps are functions of (seed,
    sample, epoch). size and crop are in pixels of the picture.
    flip        take the mirror image half of the time, if it is stored; off: never
    max_bad     latents that are not finite are counted in `bad` and replaced; UserError beyond max(1, max_bad n)
    text        give text and lengths of the captions where tokens are stored; `encoder` then says whose they are"""
    def __init__(self, path: str | Path, seed: int = 0, flip: bool = True, max_bad: float = 0.01, text: bool = True):
        self.path, self.seed, self.max_bad = Path(path).expanduser(), seed, max_bad
        self.meta = meta = read_meta(self.path)
        self.flip = flip and meta["mirrored"]
        self.channels, self.classes = meta["channels"], meta["classes"] if meta["labels"] else []
        self.controls = tuple(meta["controls"]) + (("flip",) if self.flip else ())
        self.encoder = meta.get("encoder") if text else None
        where = {"autoencoder": {**meta["autoencoder"], "path": ""}, "data": {**meta["data"], "path": ""}}
        where |= {"encoder": {**meta["encoder"], "name": ""}} if "encoder" in meta else {}
        self.fingerprint = hashlib.sha256(json.dumps({**meta, **where}, sort_keys=True).encode()).hexdigest()

        self.shift, self.scale = affine(meta)
        self.latents, self.rows, self.captions, self.tokens, self.spans = [], [], [], [], []
        for s, part in enumerate(shards(meta)):
            names = file_names(meta, s)
            self.latents.append(self.open(names["latents"], latent_shape(meta, len(part)), "f"))
            self.rows.append(self.open(names["records"], (len(part), meta["variants"]), RECORD.kind))
            if self.encoder:
                self.spans.append(self.open(names["spans"], (len(part), meta["variants"], 2), "i"))
                self.tokens.append(self.open(names["tokens"], (-1, self.encoder["dim"]), "f"))
            self.captions.append(self.open_bytes(names["captions"]) if meta["captions"] else None)
        self.bad: dict[str, str] = {}
        self.skipped: Any = None                            # where else to name them: skipped.Skipped
        self.lock = threading.Lock()

    def open(self, name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
        """A file mapped to memory; UserError unless it is an array of this shape, -1 for any length, and kind."""
        try:
            array = np.lib.format.open_memmap(self.path / name, mode="r")
        except (OSError, ValueError, EOFError, OverflowError) as e:
            raise UserError(f"{self.path / name} cannot be read: {e}; remove it and run latents.py encode "
                            "again") from e
        shape = (*array.shape[:1], *shape[1:]) if shape[0] == -1 else shape
        if array.shape != shape or array.dtype.kind != kind or kind == "V" and array.dtype != RECORD:
            raise UserError(f"{self.path / name} has {array.dtype} {array.shape}, {META} says {shape}; remove it and "
                            f"run latents.py encode again")
        return np.asarray(array)

    def open_bytes(self, name: str) -> np.ndarray:
        """The bytes of a file, mapped to memory."""
        try:
            return np.asarray(np.memmap(self.path / name, np.uint8, "r"))
        except (OSError, ValueError) as e:
            raise UserError(f"{self.path / name} cannot be read: {e}; remove its latents file and run latents.py "
                            "encode again") from e

    def __len__(self) -> int:
        return self.meta["n"]

    def record(self, index: int, epoch: int) -> dict:
        """One row of `records`."""
        batch = self.records([index], [epoch])
        return {key: value[0] for key, value in batch.items()}

    def records(self, indices: Sequence[int], epochs: Sequence[int]) -> dict:
        """The batch of these samples; for a damaged one another, drawn by (seed, index, epoch, attempt)."""
        use = [int(i) for i in indices]
        for attempt in range(ATTEMPTS):
            batch = self.draw(use, [int(e) for e in epochs])
            good = torch.stack([batch[key].flatten(1).sum(1).isfinite() for key in ("image", "text") if key in batch])
            good = good.all(0).tolist()
            if all(good):
                return batch
            for b in [b for b, fine in enumerate(good) if not fine]:
                self.note_bad(use[b])
                use[b] = seed64(self.seed, "replace", int(indices[b]), int(epochs[b]), attempt) % len(self)
        raise UserError(f"{ATTEMPTS} latents of {self.path} in a row are not finite; see latents.py check")

    def draw(self, use: list[int], epochs: list[int]) -> dict:
        """The batch of exactly these samples, finite or not."""
        K, shard, side = self.meta["variants"], self.meta["shard"], self.meta["side"]
        keys = [seed64(self.seed, "latent", i, e) for i, e in zip(use, epochs)]
        flip = [key & 1 if self.flip else 0 for key in keys]
        places = [(i // shard, i % shard, (key >> 1) % K) for i, key in zip(use, keys)]
        moments = np.stack([self.latents[s][r, v, f] for (s, r, v), f in zip(places, flip)])    # (B, 2C, h, w)
        eps = torch.stack([torch.randn(self.channels, side, side, generator=torch.Generator().manual_seed(key))
                           for key in keys])
        mean, std = torch.from_numpy(moments).float().chunk(2, dim=1)           # (B, C, h, w) each
        rows = np.array([self.rows[s][r, v] for s, r, v in places], RECORD)     # (B,)
        batch = dict(image=(mean + std * eps - self.shift) / self.scale, index=torch.tensor(use),
                     size=torch.from_numpy(rows["size"].copy()), crop=torch.from_numpy(rows["crop"].copy()),
                     flip=torch.tensor(flip, dtype=torch.float32))
        if self.meta["labels"]:
            batch["label"] = torch.from_numpy(rows["label"].copy())
        if self.meta["captions"]:
            batch["caption"] = [self.caption(s, *span) for (s, _, _), span in zip(places, rows["caption"].tolist())]
        if self.encoder:
            found = [self.text(s, *self.spans[s][r, v].tolist()) for s, r, v in places]
            batch["text"], batch["lengths"] = padded(found, self.encoder["length"], self.encoder["dim"])
        return batch

    def caption(self, s: int, start: int, stop: int) -> str:
        """The caption at these bytes of shard s. UserError if there is none."""
        try:
            return str(json.loads(self.captions[s][start:stop].tobytes()))
        except ValueError as e:
            raise UserError(f"the captions of shard {s} in {self.path} are damaged ({e}); latents.py check lists all "
                            "that is") from e

    def text(self, s: int, start: int, stop: int) -> Tensor:
        """The tokens (n, E) float16 of this span of shard s. UserError if there are none such."""
        if not 0 <= start <= stop <= min(len(self.tokens[s]), start + self.encoder["length"]):
            raise UserError(f"the tokens of shard {s} in {self.path} are damaged; latents.py check lists all that is")
        return torch.from_numpy(self.tokens[s][start:stop].astype(np.float16))

    def first(self, count: int) -> Tensor:
        """z of the first pictures: first crop, not mirrored, mean of the posterior. (B, C, h, w)"""
        shard = self.meta["shard"]
        mean = np.stack([self.latents[i // shard][i % shard, 0, 0] for i in range(count)])      # (B, 2C, h, w)
        return (torch.from_numpy(mean).float()[:, :self.channels] - self.shift) / self.scale

    def note_bad(self, index: int) -> None:
        """Counts a latent that is not finite; UserError if there are now more than max_bad allows."""
        with self.lock:
            self.bad[f"latent {index}"] = why = "not finite"
            if self.skipped:
                self.skipped.note({f"latent {index}": why})
            allowed = max(1, int(self.max_bad * len(self))) if self.max_bad > 0 else 0
            if len(self.bad) > allowed:
                raise UserError(f"{len(self.bad)} of {len(self):,} latents of {self.path} are not finite, e.g. "
                                f"number {index}; encode them again, or raise --max_bad={self.max_bad}")


def open_latents(cfg: Config) -> Latents:
    """The source of `cfg.data`, a folder of latents; UserError, by name, for what they cannot give.

    They are mirrored where --augment asks for it and mirror images are stored. Crops are those that are stored."""
    path, varied = Path(cfg.data).expanduser(), cfg.augment.split("+")
    source = Latents(path, cfg.seed, "flip" in varied, cfg.max_bad, cfg.model.semantics == "text")
    meta, again = source.meta, f"; encode the data again, or say --augment={source.meta['augment']!r}"
    if cfg.model.resolution != meta["side"]:
        raise UserError(f"model.resolution={cfg.model.resolution}, but {cfg.data} has latents with a side of "
                        f"{meta['side']}, of pictures with {meta['resolution']}; say "
                        f"--model.resolution={meta['side']}")
    stored = [a for a in meta["augment"].split("+") if a]
    if lacking := [a for a in varied if a and a not in stored and (a == "crop" or a not in source.controls)]:
        raise UserError(f"augment={cfg.augment!r} asks for {lacking[0]}, which latents cannot vary afterwards; "
                        f"{cfg.data} was encoded with augment={meta['augment']!r}{again}")
    if "crop" in stored and "crop" not in varied:
        raise UserError(f"augment={cfg.augment!r}, but the crops in {cfg.data} were encoded with "
                        f"augment={meta['augment']!r}{again}")
    if "crop" in varied and cfg.crop != meta["crop"]:
        raise UserError(f"crop={cfg.crop!r}, but {cfg.data} holds {meta['crop']} crops; encode the data again, or "
                        f"say --crop={meta['crop']}")
    for kind, key in (("class", "labels"), ("text", "captions")):
        if cfg.model.semantics == kind and not meta[key]:
            raise UserError(f"{cfg.data} has no {key} for model.semantics={kind}; encode it with --semantics={kind}")
    return source
