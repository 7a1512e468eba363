"""Stored text: an encoder whose tokens lie beside cached latents, so that no text tower runs while a network trains.

Dimensions: B batch, L token positions, E width of a token, n tokens of a caption.
"""
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from config import UserError


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
