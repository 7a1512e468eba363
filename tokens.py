"""Tokens of captions, stored beside latents, so that no text tower runs while a network trains on them.

tokens-00000.npy    (T, E) float16: those of all captions of a file of latents, one caption after the other
spans-00000.npy     (n, K, 2) int64: the first token of the caption of crop v of picture k, and the one after its last

Only the tokens that a caption has are stored, none of the padding; equal captions of a file share theirs. The empty
caption has none. meta.json says in "encoder" whose they are: ENCODER, with a sha256 of all that decides them.
Dimensions: n pictures of a file, K crops, B batch, L token positions, E width of a token, T tokens of a file.
"""
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import UserError

ENCODER = {"name": str, "layer": str, "dim": int, "length": int, "sha256": str}


def pack(captions: Sequence[str], encoder: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (T, E) float16 of these captions, and the span of each, (len(captions), 2) int64.

    A function of the captions alone: nothing that was encoded before has a part in it. UserError for tokens that are
    not finite in float16."""
    different = list(dict.fromkeys(captions))
    found = [tokens.half().numpy() for tokens, _ in encoder.each(different)]
    tokens = np.concatenate([np.zeros((0, encoder.dim), np.float16), *found])
    if not np.isfinite(tokens).all():
        raise UserError(f"tokens of {encoder.name} are not finite in float16; store none, --encoder=")
    ends = np.cumsum([0, *map(len, found)])
    spans = {caption: (ends[k], ends[k + 1]) for k, caption in enumerate(different)}
    return tokens, np.array([spans[caption] for caption in captions], np.int64).reshape(-1, 2)


def padded(rows: Sequence[Tensor], length: int, dim: int) -> tuple[Tensor, Tensor]:
    """Captions of n tokens (n, E) each as one tensor (B, L, E) float32, zeros after a caption's end, and n (B,)."""
    out = torch.zeros(len(rows), length, dim)
    for whole, row in zip(out, rows):
        whole[:len(row)] = row
    return out, torch.tensor([len(row) for row in rows], dtype=torch.long)


def check_same(encoder: Any, stored: dict) -> None:
    """UserError unless the encoder is the one that `stored`, an "encoder" of meta.json, is about."""
    if (found := encoder.describe())["sha256"] != stored["sha256"]:
        raise UserError(f"encoder={found['name']!r} has sha256 {found['sha256'][:12]}, but the stored tokens are of "
                        f"{stored['name']!r}, {stored['sha256'][:12]}; say --encoder={stored['name']}, or encode the "
                        f"data again")


class StoredText:
    """The encoder whose tokens are stored. Its sizes are known; the tower is loaded when another caption is asked for.

    stored: an "encoder" of meta.json; load: makes the encoder. May be called from several threads."""
    def __init__(self, stored: dict, load: Callable[[], Any]) -> None:
        self.name, self.dim, self.length = stored["name"], stored["dim"], stored["length"]
        self.stored, self.load, self.lock, self.tower = stored, load, threading.Lock(), None

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, E) and lengths (B,) of captions that are not stored. UserError if it is not that encoder."""
        with self.lock:
            if self.tower is None:
                tower = self.load()
                check_same(tower, self.stored)
                self.tower = tower
        return self.tower.encode(captions)
