"""Random numbers without a random state: every draw is a function of a key.

    seed64(seed, "noise", step, m)                  a seed for a generator, from any printable key
    permute(offset, n, key)                         where a permutation of range(n) sends each offset
    uniform(key, index, draws)                      numbers in [0, 1), a row for every index
    keyed_noise(indices, shape, seed)               standard normal noise, a tensor for every index

No generator lives from one step to the next, so a resumed run has the random numbers of one that never stopped. A key
is hashed by its repr: neither the purpose strings in keys nor the types of their parts may ever change. They are

    (seed, "weights")                               first values of the network, train.main
    (seed, "order", epoch)                          which sample a step sees, data.index_and_epoch
    (seed, "noise", step, microbatch)               padding noise, level, eps and dropout of a microbatch, train.inputs
    (seed, "sample", image), (seed, "step k", ...)  first noise, and that added at step k, sample.generate
    (seed, "controls", image), (.., "padding", ..)  controls and padding noise of an image, sample.SampleConditions
    "aug", "caption", "replace", "latent", "coco", "scene", "view", "word vectors", "judge", "held out": in sources/,
    text.py, evaluation/ and experiments/
Dimensions: B batch.
"""
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

STEP = np.uint64(0x9E3779B97F4A7C15)                # by which the state of SplitMix64 grows


def seed64(*key: Any) -> int:
    """A 63-bit seed from any printable key: the same in every process, on every machine, for ever."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of uint64 in which every input bit moves every output bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ z >> np.uint64(shift)) * np.uint64(factor)
    return z ^ z >> np.uint64(31)


def permute(x: np.ndarray, n: int, key: np.ndarray, rounds: int = 8) -> np.ndarray:
    """Where the permutation of range(n) named by `key` (uint64, shape of x) sends each x. n <= 2**31.

    A Feistel network on 2h bits permutes range(4**h) whatever its rounds do; results >= n pass through it again."""
    h = np.uint64(max(1, math.ceil((n - 1).bit_length() / 2)))
    low = np.uint64((1 << int(h)) - 1)
    x, todo = x.astype(np.uint64), np.ones(x.shape, dtype=bool)
    while todo.any():
        left, right, k = x[todo] >> h, x[todo] & low, key[todo]
        for r in range(rounds):
            left, right = right, left ^ (mix(right + mix(k + np.uint64(r) + STEP) + STEP) & low)
        x[todo] = left << h | right
        todo = x >= n
    return x.astype(np.int64)


def uniform(key: int, index: np.ndarray, draws: int) -> np.ndarray:
    """(B, draws) float64 in [0, 1): row b is the SplitMix64 stream that starts at a hash of (key, index[b]).

    A row does not depend on the other rows of its batch."""
    start = mix(mix(index.astype(np.uint64) * STEP + np.uint64(key)))                       # (B,)
    z = mix(start[:, None] + np.arange(1, draws + 1, dtype=np.uint64) * STEP)               # (B, draws)
    return (z >> np.uint64(11)) * 2.0 ** -53


def keyed_noise(indices: Sequence[int], shape: tuple[int, ...], seed: int, purpose: str = "sample") -> Tensor:
    """Standard normal noise for each index, keyed by (seed, purpose, index), on the CPU. (B, *shape)"""
    keys = [seed64(seed, purpose, int(k)) for k in indices]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(key)) for key in keys])
