"""Means with standard errors over processes, distances between images of one prompt, and images at several sizes.

mean_over(values, place)                        the mean of the values of all processes, with its standard error
for images in size_groups(o, (16, 48), place):  each prompt's images at every requested size, all else equal

Dimensions: P prompts, K images of one prompt, h x w pixels.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import machine
import model
import sample
from autoencoder import decoder_of
from config import UserError
from wishes import Wishes


@dataclass(frozen=True)
class Mean:
    """A mean over n, with its standard error: the spread of the n values over the square root of n."""
    value: float
    error: float
    n: int


def mean_over(values: list[float], place: machine.Place) -> Mean:
    """The mean of the values of all processes, each of which may have any number. UserError for fewer than two."""
    x = torch.tensor(values, dtype=torch.float64)
    device = "cpu" if place.device.type == "mps" else place.device          # MPS has no float64, and one process
    sums = torch.tensor([x.sum().item(), len(x)], dtype=torch.float64, device=device)
    total, n = machine.add_up(sums, place).tolist()
    if n < 2:
        raise UserError(f"a mean with a standard error wants at least 2 pictures or prompts, got {n:g}")
    squares = machine.add_up((x - total / n).square().sum().to(device), place).item()
    return Mean(total / n, math.sqrt(squares / (n - 1) / n), int(n))


def mean_pair_distance(features: list[Tensor]) -> Tensor:
    """(P,) float64: mean of |f_i - f_j|^2 over the K (K - 1) / 2 pairs, as 2 / (K - 1) sum_k |f_k - mean f|^2.

    Exact: sum over i, j of |f_i - f_j|^2 is 2 K sum |f_k|^2 - 2 |sum f_k|^2, which is 2 K times the centred sum of
    squares, and counts every pair twice. Centred first: with |f|^2 as large as 1 and distances of 1e-5, sums of
    squares in fp32 would lose them. features: (P, K, ...) each, parts of one long vector. ValueError for K = 1."""
    K = features[0].shape[1]
    if K < 2:
        raise ValueError("a distance wants at least two pictures of every prompt")
    squares = [(f - f.mean(1, keepdim=True)).square().flatten(1).sum(1) for f in features]      # (P,) each
    return sum(s.cpu().double() for s in squares) * 2 / (K - 1)


def size_groups(o: sample.Options, sizes: tuple[int, ...], place: machine.Place) -> Iterator[Tensor]:
    """[COND] sec. 3.1: for each of o.n prompts a picture at every requested size, all else equal. (P, K, 3, h, w)

    uint8, decoded if the model draws latents. Prompts are shared by the processes; a picture is a function of its
    prompt's number and its size alone."""
    net, cfg, header = sample.open_run(o)
    if "size" not in model.control_names(cfg.model) or o.size:
        raise UserError(f"pictures at several sizes need a model that is steered by size and no --size of their own; "
                        f"{o.out} has model.controls={cfg.model.controls!r}, size={o.size!r}")
    sample.check(o, cfg)
    decode = decoder_of(header, o.autoencoder, cfg.model.channels, place.device)[0]
    asked = Wishes(o, cfg, header)
    net = net.to(place.device)
    net.dtype = machine.precision(place.device, o.dtype)
    K, per = len(sizes), max(1, o.batch // len(sizes))
    for first in range(place.rank * per, o.n, place.world * per):
        index = np.repeat(np.arange(first, min(first + per, o.n)), K)                   # (P K,)
        size = torch.tensor(sizes, dtype=torch.float32)[:, None].expand(K, 2).repeat(len(index) // K, 1)
        x = decode(sample.draw(net, cfg, replace(asked(index)[0], size=size), index, o, place.device))
        yield torch.from_numpy(sample.to_uint8(x)).permute(0, 3, 1, 2).unflatten(0, (-1, K))
