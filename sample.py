"""From noise to pictures: samplers as functions of any callable, guidance, and the command line.

python sample.py --out=out/shapes --prompt="a red ring left of a blue square" --n=16
torchrun --nproc_per_node=8 -- sample.py --out=out/imagenet --n=50000          (run again to go on after a stop)

Writes <out>/samples/<name>.npz (arr_0, uint8, for evaluators) and, for a few pictures, a grid <name>.png. Everything
about the model is read from the run folder. Dimensions: B batch, C channels, h x w pixels, T noise steps.
"""
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import checkpoint
import machine
import model
from conditioning import Condition, concatenate, from_batch, guide
from config import Config, UserError, parse, seed64
from schedule import SCHEDULES, ddim_indices, to_sigma

Denoise = Callable[[Tensor, Tensor], Tensor]        # (x (B, C, h, w), i (B,)) -> eps like x

GRID = 64                                           # up to this many pictures also become one PNG


# ---------------------------------------------------------------- samplers

def ddim(denoise: Denoise, noise: Tensor, alpha_bar: Tensor, steps: int, eta: float = 0.0, spacing: str = "trailing",
         draw: Callable[[int], Tensor] | None = None) -> Tensor:
    """[DDIM] eq. 12, 16: x0 = (x - sqrt(1-a) eps) / sqrt(a), x' = sqrt(a') x0 + sqrt(1-a'-s^2) eps + s z.

    s = eta sqrt((1-a')/(1-a)) sqrt(1 - a/a'); eta = 0 is deterministic, eta = 1 has the variance of [DDPM].
    noise (B, C, h, w) standard normal; alpha_bar (T,); draw(k) gives z of step k, needed when eta > 0."""
    if eta > 0 and draw is None:
        raise ValueError("eta > 0 adds noise at every step: pass draw, a function from step to noise")
    x, indices = noise, ddim_indices(len(alpha_bar), steps, spacing).tolist()
    levels = [alpha_bar[i].item() for i in indices] + [1.0]
    for k, i in enumerate(indices):
        a, a_next = levels[k], levels[k + 1]
        eps = denoise(x, torch.full((len(x),), float(i), device=x.device))
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        s = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        x = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - s ** 2) * eps
        if s > 0:
            x = x + s * draw(k)
    return x


def heun(denoise: Denoise, noise: Tensor, alpha_bar: Tensor, steps: int, spacing: str = "trailing") -> Tensor:
    """[EDM] alg. 1 without churn, for z = x / sqrt(alpha_bar): dz/dsigma = eps, each step corrected by the mean slope.

    Second order; 2 steps - 1 calls, the last step to sigma = 0 is Euler's. Arguments as for ddim."""
    indices = ddim_indices(len(alpha_bar), steps, spacing).tolist()
    sigma = [to_sigma(alpha_bar[i]).item() for i in indices] + [0.0]
    at = lambda z, k: denoise(z / math.sqrt(1 + sigma[k] ** 2), torch.full((len(z),), float(indices[k]), device=z.device))
    z = noise * math.sqrt(1 + sigma[0] ** 2)
    for k in range(steps):
        slope, h = at(z, k), sigma[k + 1] - sigma[k]
        ahead = z + h * slope
        z = ahead if k == steps - 1 else z + h * (slope + at(ahead, k + 1)) / 2
    return z


SAMPLERS = ("ddim", "heun")


def guided(net: Denoise, cond: Condition, lam: float, beta: float = 1.0) -> Denoise:
    """[COND] eq. 2 closed over a network: only the passes whose weight is not zero, all in one batch.

    lam 1 is no guidance, beta 1 guides on semantics alone. A condition without controls has no use for beta."""
    beta = beta if cond.steered is not None else 1.0
    weights = {"cs": lam * beta, "s": lam * (1 - beta), "null": 1 - lam}
    parts = {"cs": cond, "s": cond.drop(controls=True), "null": cond.drop(semantics=True, controls=True)}
    parts = {k: c for k, c in parts.items() if weights[k] != 0}
    joint = concatenate(list(parts.values()))

    def denoise(x: Tensor, i: Tensor) -> Tensor:
        eps = net(x.repeat(len(parts), 1, 1, 1), i.repeat(len(parts)), joint)   # (passes B, C, h, w)
        eps = dict(zip(parts, eps.chunk(len(parts))))
        return guide(*(eps.get(k, torch.zeros_like(x)) for k in weights), lam, beta)
    return denoise


# ---------------------------------------------------------------- pictures of a run

@dataclass(frozen=True)
class Options:
    """What to draw."""
    out: str = "out/shapes"         # run folder, as given to train.py
    prompt: str = ""                # caption; several are separated by ";"; empty = captions of the data set
    label: str = ""                 # class name or number; several are separated by ";"; empty = all in turn
    n: int = 16                     # pictures (under torchrun put -- before sample.py, which has an option --n... itself)
    steps: int = 50                 # sampling steps
    sampler: str = "ddim"           # ddim or heun
    spacing: str = "trailing"       # which noise levels are visited: trailing, leading or linspace
    eta: float = 0.0                # share of fresh noise a DDIM step; 1 = DDPM's
    lam: float = -1.0               # guidance scale lambda, 1 = none; -1 = that of the run
    seed: int = 0                   # keys the noise; picture k is the same whatever n and batch are
    batch: int = 64                 # pictures at a time
    resolution: int = 0             # side in pixels; 0 = that of the run
    name: str = ""                  # of the files in <out>/samples; empty = made from the options
    dtype: str = "auto"             # auto, float32 or bfloat16
    threads: int = 0                # CPU threads; 0 = all


def noise_for(indices: list[int], shape: tuple[int, ...], seed: int, purpose: str = "sample") -> Tensor:
    """Standard normal noise keyed by (seed, purpose, index) for each picture. (B, *shape) on the CPU"""
    draw = lambda k: torch.randn(shape, generator=torch.Generator().manual_seed(seed64(seed, purpose, k)))
    return torch.stack([draw(k) for k in indices])


def draw(net: Denoise, cfg: Config, cond: Condition, indices: list[int], o: Options, device: torch.device) -> Tensor:
    """Pictures (or latents) number `indices` under `cond`. (B, C, h, w), about [-1, 1]"""
    side = o.resolution or cfg.model.resolution
    shape = (cfg.model.channels, side, side)
    alpha_bar = SCHEDULES[cfg.schedule](cfg.model.noise_steps)
    denoise = guided(net, cond.to(device), cfg.lam if o.lam < 0 else o.lam)
    noise = noise_for(indices, shape, o.seed).to(device)
    with torch.inference_mode():
        if o.sampler == "heun":
            return heun(denoise, noise, alpha_bar, o.steps, o.spacing)
        fresh = lambda k: noise_for(indices, shape, o.seed, f"step {k}").to(device)
        return ddim(denoise, noise, alpha_bar, o.steps, o.eta, o.spacing, fresh)


def to_uint8(x: Tensor) -> np.ndarray:
    """[-1, 1] -> 0 .. 255, rounded to nearest. (B, C, h, w) -> (B, h, w, C)"""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
