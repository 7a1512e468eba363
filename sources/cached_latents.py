"""Cached latents: the format of a folder of encoded images, and the data source that reads it.

meta.json              autoencoder, data, augmentation, scaling, statistics of every channel, sha256 of the files
latents-00000.npy      (n, K, F, 2C, h, w) float16: mean and standard deviation of the posterior of each image
records-00000.npy      (n, K) RECORD: label, size, crop, and the first and last byte of the caption in
captions-00000.jsonl   one JSON string a line; only where the data have captions
tokens-00000.npy       (T, E) float16: text tokens of these captions; only where an encoder was named
spans-00000.npy        (n, K, 2) int64: where the tokens of each caption begin and end
originals.npy          (k, 3, R, R) uint8: the first images, to compare with their decoded latents

A latent can be neither cropped nor mirrored, so K crops of each image are stored, and with F = 2 each one's mirror
image. Tokens have no padding, and equal captions of a file share them. Files are mapped to memory, never unpickled.
Dimensions: n images of a file, B batch, C channels, h = w side of a latent, R resolution of an image, L token
positions, E width of a token, T tokens of a file.
"""
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Config, UserError
from rng import seed64

META, ORIGINALS = "meta.json", "originals.npy"
FORMAT = 1                              # of these folders; a newer one is an error
SCALINGS = ("channel", "factor")
RECORD = np.dtype([("label", "<i8"), ("size", "<f4", 2), ("crop", "<f4", 2), ("caption", "<i8", 2)])
# The fields of meta.json and of two of them, with their types; encoding adds RESULTS at its end.
FIELDS = {"format": int, "autoencoder": dict, "data": dict, "n": int, "shard": int, "variants": int, "mirrored": bool,
          "resolution": int, "side": int, "channels": int, "augment": str, "crop": str, "seed": int, "controls": list,
          "labels": bool, "captions": bool, "classes": list, "scaling": str}
AUTOENCODER = {"path": str, "sha256": str, "scaling_factor": float, "shift_factor": float}
ENCODER = {"name": str, "layer": str, "dim": int, "length": int, "sha256": str}
RESULTS = ("statistics", "sha256")


def file_names(meta: dict, s: int) -> dict[str, str]:
    """Names of the files of shard s by what they hold."""
    names = {"captions": f"captions-{s:05d}.jsonl"} if meta["captions"] else {}
    names |= {"records": f"records-{s:05d}.npy", "latents": f"latents-{s:05d}.npy"}
    return names | ({"spans": f"spans-{s:05d}.npy", "tokens": f"tokens-{s:05d}.npy"} if "encoder" in meta else {})


def shards(meta: dict) -> list[range]:
    """The images of every shard."""
    return [range(k, min(k + meta["shard"], meta["n"])) for k in range(0, meta["n"], meta["shard"])]


def latent_shape(meta: dict, n: int) -> tuple[int, ...]:
    """(n, K, F, 2C, h, w) of a file of n images."""
    return n, meta["variants"], 1 + meta["mirrored"], 2 * meta["channels"], meta["side"], meta["side"]


def read_meta(path: Path, finished: bool = True) -> dict:
    """meta.json of a folder. UserError if it is missing, damaged, newer than this code or, with `finished`, partial."""
    file = path / META
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        if meta["format"] > FORMAT:
            raise ValueError(f"it has format {meta['format']}, and this code reads up to {FORMAT}")
        parts = [(meta, FIELDS), (meta["autoencoder"], AUTOENCODER), (meta.get("encoder"), ENCODER)]
        wrong = [key for part, kinds in parts[:2 + ("encoder" in meta)] for key, kind in kinds.items()
                 if type(part.get(key)) is not kind]
        wrong = wrong or [key for key in ("n", "shard", "variants", "side", "channels") if meta[key] < 1]
        if wrong or meta["scaling"] not in SCALINGS:
            raise ValueError(f"it is damaged in {', '.join(wrong) or 'scaling'}")
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"cannot use {file}: {e}; encode the data again") from e
    if finished and not all(type(meta.get(key)) is dict for key in RESULTS):
        raise UserError(f"{path} is not finished; run latents.py encode with the same options again")
    return meta


def content(meta: dict) -> dict[str, Any]:
    """meta.json without the paths of the autoencoder, the data and the text encoder, which may move."""
    places = {"autoencoder": "path", "data": "path", "encoder": "name"}
    return meta | {key: meta[key] | {place: ""} for key, place in places.items() if key in meta}


def header(meta: dict) -> dict[str, Any]:
    """The part of meta.json that decoding needs, for the header of a run's weights."""
    return {key: meta[key] for key in ("autoencoder", "scaling", "statistics", "resolution", "side", "channels")}


def latent_scaling(meta: dict) -> tuple[Tensor, Tensor]:
    """shift and scale, (C, 1, 1) each, of z = (latent - shift) / scale.

    channel: every channel of the data set gets mean 0 and variance 1, as in [EDM2] and [MAG]
    factor: from the autoencoder's config, z = (latent - shift_factor) scaling_factor, as in [LDM] and [DiT]"""
    about, C = meta["autoencoder"], meta["channels"]
    if meta["scaling"] == "channel":
        shift, scale = meta["statistics"]["mean"], meta["statistics"]["std"]
    else:
        shift, scale = [about["shift_factor"]] * C, [1 / about["scaling_factor"]] * C
    if len(shift) != C or len(scale) != C or not all(map(math.isfinite, shift + scale)) or min(scale) <= 0:
        raise UserError(f"scaling={meta['scaling']!r} needs {C} finite numbers and scales above 0, but {META} has "
                        f"{shift} and {scale}")
    return torch.tensor(shift).view(C, 1, 1), torch.tensor(scale).view(C, 1, 1)


def pack_tokens(captions: Sequence[str], encoder: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (T, E) float16 of these captions, and the span of each, (len(captions), 2) int64.

    Every caption is encoded alone, so no result depends on another. UserError for tokens beyond float16."""
    different = list(dict.fromkeys(captions))
    rows = [tokens.half().numpy() for tokens in encoder.encode_each(different)]
    tokens = np.concatenate([np.zeros((0, encoder.dim), np.float16), *rows])
    if not np.isfinite(tokens).all():
        raise UserError(f"tokens of {encoder.name} are not finite in float16; store none, with --encoder=")
    ends = np.cumsum([0, *map(len, rows)])
    spans = {caption: (ends[k], ends[k + 1]) for k, caption in enumerate(different)}
    return tokens, np.array([spans[caption] for caption in captions], np.int64).reshape(-1, 2)


def pad_tokens(rows: Sequence[Tensor], length: int, dim: int) -> tuple[Tensor, Tensor]:
    """Pad captions of n tokens (n, E) with zeros to one tensor (B, L, E) float32; also return n (B,)."""
    out = torch.zeros(len(rows), length, dim)
    for padded, row in zip(out, rows):
        padded[:len(row)] = row
    return out, torch.tensor([len(row) for row in rows], dtype=torch.long)


class Latents:
    """[LDM] sec. 3.1: latents of images, a new draw from each posterior every epoch, in the records of data.py.

    image is z = (mean + std eps - shift) / scale, (C, h, w); crop, mirror image and eps are functions of (seed,
    sample, epoch). size and crop are in pixels of the image.
    flip        use the mirror image half of the time if it is stored, else never
    text        give text and lengths of the captions if tokens are stored; `encoder` then describes their encoder"""
    bad: dict[str, str] = {}                                # a damaged latent is an error, so none is skipped
    can_have_classes = True

    @staticmethod
    def takes(where: str) -> bool:
        """Whether a folder holds cached latents, finished or not."""
        return (Path(where).expanduser() / META).is_file()

    @classmethod
    def open(cls, cfg: Config, split: str = "train") -> "Latents":
        """Open `cfg.data`, without splits. UserError if it cannot give what the config requests.

        Mirror images are used if they are stored and --augment names flip. The crops are the stored ones."""
        augment, size = {*cfg.augment.split("+")} - {""}, cfg.model.resolution
        source = cls(cfg.data, cfg.seed, "flip" in augment, cfg.model.semantics == "text")
        meta, stored = source.meta, source.meta["augment"].split("+")
        if size != meta["side"]:
            raise UserError(f"model.resolution={size}, but the latents in {cfg.data} have {meta['side']}, of images "
                            f"with {meta['resolution']}; use --model.resolution={meta['side']}")
        if ("crop" in augment) != ("crop" in stored) or "crop" in stored and cfg.crop != meta["crop"] or \
                not augment - {"crop"} <= {*source.controls, *stored}:
            raise UserError(f"augment={cfg.augment!r} and crop={cfg.crop!r}, but {cfg.data} was encoded with "
                            f"augment={meta['augment']!r} and crop={meta['crop']!r}; use those, or encode it again")
        semantics, needs = cfg.model.semantics, {"class": "labels", "text": "captions"}
        if semantics in needs and not meta[needs[semantics]]:
            raise UserError(f"{cfg.data} has no {needs[semantics]} for model.semantics={semantics}; encode the data "
                            f"again with --semantics={semantics}")
        return source

    def __init__(self, path: str | Path, seed: int = 0, flip: bool = True, text: bool = True) -> None:
        self.path, self.seed = Path(path).expanduser(), seed
        self.meta = meta = read_meta(self.path)
        self.flip = flip and meta["mirrored"]
        self.channels, self.classes = meta["channels"], meta["classes"] if meta["labels"] else []
        self.controls = tuple(meta["controls"]) + (("flip",) if self.flip else ())
        self.encoder = meta.get("encoder") if text else None
        self.fingerprint = hashlib.sha256(json.dumps(content(meta), sort_keys=True).encode()).hexdigest()
        self.shift, self.scale = latent_scaling(meta)
        self.latents, self.rows, self.captions, self.tokens, self.spans = [], [], [], [], []
        for s, part in enumerate(shards(meta)):
            names, crops = file_names(meta, s), (len(part), meta["variants"])
            self.latents.append(self._map(names["latents"], latent_shape(meta, len(part)), "f"))
            self.rows.append(self._map(names["records"], crops, RECORD.kind))
            if self.encoder:
                self.spans.append(self._map(names["spans"], (*crops, 2), "i"))
                self.tokens.append(self._map(names["tokens"], (-1, self.encoder["dim"]), "f"))
            if meta["captions"]:
                self.captions.append(self._map(names["captions"]))

    def _map(self, name: str, shape: tuple[int, ...] = (), kind: str = "u") -> np.ndarray:
        """Map an .npy file of this shape, -1 for any length, and kind, or without a shape the bytes of any file."""
        file = self.path / name
        try:
            array = np.lib.format.open_memmap(file, mode="r") if shape else np.memmap(file, np.uint8, "r")
            want = (array.shape[:1] if shape[:1] == (-1,) else shape[:1]) + shape[1:]
            if shape and (array.shape != want or array.dtype.kind != kind or kind == "V" and array.dtype != RECORD):
                raise ValueError(f"it has {array.dtype} {array.shape}, but {META} says {shape}")
        except (OSError, ValueError, EOFError, OverflowError) as e:
            raise UserError(f"cannot read {file}: {e}; remove it and run latents.py encode again") from e
        return np.asarray(array)

    def __len__(self) -> int:
        return self.meta["n"]

    def records(self, indices: Sequence[int], epochs: Sequence[int]) -> dict:
        """The batch of these samples in these epochs. UserError, with the files to make again, if it is damaged."""
        use, epochs = [int(i) for i in indices], [int(e) for e in epochs]
        meta, shard, side = self.meta, self.meta["shard"], self.meta["side"]
        keys = [seed64(self.seed, "latent", i, e) for i, e in zip(use, epochs)]
        flip = [key & 1 if self.flip else 0 for key in keys]
        places = [(i // shard, i % shard, (key >> 1) % meta["variants"]) for i, key in zip(use, keys)]
        moments = np.stack([self.latents[s][r, v, f] for (s, r, v), f in zip(places, flip)])    # (B, 2C, h, w)
        mean, std = torch.from_numpy(moments).float().chunk(2, dim=1)           # (B, C, h, w) each
        eps = torch.stack([torch.randn(self.channels, side, side, generator=torch.Generator().manual_seed(key))
                           for key in keys])
        rows = np.array([self.rows[s][r, v] for s, r, v in places], RECORD)     # (B,)
        batch = dict(image=(mean + std * eps - self.shift) / self.scale, index=torch.tensor(use),
                     size=torch.from_numpy(rows["size"].copy()), crop=torch.from_numpy(rows["crop"].copy()),
                     flip=torch.tensor(flip, dtype=torch.float32))
        if meta["labels"]:
            batch["label"] = torch.from_numpy(rows["label"].copy())
        try:
            if meta["captions"]:
                batch["caption"] = [str(json.loads(self.captions[s][start:stop].tobytes()))
                                    for (s, _, _), (start, stop) in zip(places, rows["caption"].tolist())]
            if self.encoder:
                batch["text"], batch["lengths"] = pad_tokens([self._tokens(*place) for place in places],
                                                             self.encoder["length"], self.encoder["dim"])
            if not all(batch[key].isfinite().all() for key in ("image", "text") if key in batch):
                raise ValueError("a number is not finite")
        except ValueError as e:
            raise UserError(f"samples {use} of {self.path} are damaged: {e}. latents.py check finds the files; remove "
                            "them, and encode with the same options again") from e
        return batch

    def _tokens(self, s: int, r: int, v: int) -> Tensor:
        """The tokens (n, E) of one caption. ValueError for a span outside of its file."""
        start, stop = self.spans[s][r, v].tolist()
        if not 0 <= start <= stop <= min(len(self.tokens[s]), start + self.encoder["length"]):
            raise ValueError(f"tokens {start} to {stop} of shard {s} cannot be")
        return torch.from_numpy(self.tokens[s][start:stop].astype(np.float16))

    def posterior_means(self, count: int) -> Tensor:
        """z of the first images: first crop, not mirrored, mean of the posterior. (B, C, h, w)"""
        shard = self.meta["shard"]
        mean = np.stack([self.latents[i // shard][i % shard, 0, 0] for i in range(count)])      # (B, 2C, h, w)
        return (torch.from_numpy(mean).float()[:, :self.channels] - self.shift) / self.scale
