"""How weights move: the learning rate, the optimizer and its groups, and rows of weights that keep their magnitude.

A magnitude-preserving layer uses its weight w only through w / rms(w), row by row ([MAG], [EDM2] sec. 2.3). In the
forward pass that costs a normalisation a microbatch, and a gradient through it. Both can move here, once an optimizer
step and with equal results: if rows have unit RMS, w / rms(w) is w itself, and its gradient is that of w without the
part along w. So a training step is

    tangent_(rows)                      the part of the gradient along each row is taken away
    clip, opt.step()                    as ever
    renormalize_(rows, window.bad)      rows go back to unit RMS

with rows = keep_rows(net, cfg), an empty list unless cfg.normalize. AdamW moves all weights; with cfg.muon those of the
blocks' linear layers move as muon.py says. Dimensions: m rows, n columns of a weight.
"""
import math

import torch
from torch import Tensor, nn

from conditioning import ControlEmbedding, MPTimestepEmbedder, TimestepEmbedder
from config import Config, UserError
from log import Window
from machine import precision
from mp_layers import MPEmbedding, MPLinear, rely_on_norms_
from muon import Muon, matrices


SHORTEST = 1e-30                        # length at which a row counts as zero
WAVES = 1 / 16                          # rate of weights that read sinusoids, over that of others


# ---------------------------------------------------------------- learning rate

def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up, constant, linear cool-down to zero; a function of the step alone.

    With cfg.decay, the rate also falls as 1/sqrt(step) after that share of the run, [EDM2] sec. 2.3."""
    rising = (step + 1) / max(1, cfg.warmup)
    falling = (cfg.steps - step) / (cfg.steps * cfg.cooldown) if cfg.cooldown > 0 else 1.0
    decaying = math.sqrt(min(1.0, cfg.decay * cfg.steps / max(1, step))) if cfg.decay > 0 else 1.0
    return cfg.lr * min(1.0, rising, falling) * decaying


# ---------------------------------------------------------------- groups

def directed(net: nn.Module) -> list[Tensor]:
    """The weights (m, n) of which only the direction of each row counts: those of MPLinear and MPEmbedding."""
    return [m.weight for m in net.modules() if isinstance(m, (MPLinear, MPEmbedding))]


def readers_of_waves(net: nn.Module) -> list[Tensor]:
    """The weights (D, K) that read sinusoids: of the time embedding and of the embeddings of controls.

    Half of the waves are cosines, nearly all of them near 1 where the number is small against 10,000. Adam moves a
    row's weights on them by lr, all one way, which moves what the row gives by K/2 lr a step, as would a bias with
    K/2 times the rate. From lr = 1e-3 on that drives SiLU to where it has no gradient, for good (LOG.md)."""
    mlps = [m.mlp for m in net.modules() if isinstance(m, (TimestepEmbedder, MPTimestepEmbedder))]
    mlps += [mlp for m in net.modules() if isinstance(m, ControlEmbedding) for mlp in m.mlps.values()]
    return [(mlp[0] if isinstance(mlp, nn.Sequential) else mlp.fc1).weight for mlp in mlps]


def groups(net: nn.Module, cfg: Config) -> list[dict]:
    """The optimizer's groups: weights whose rows have a direction only, scalars such as gains, and the rest.

    The first learn at cfg.lr_mp, all else at cfg.lr, but for a share of it where plain weights read sinusoids; `scale`
    is what a group's rate is multiplied by. Directions and scalars do not decay: it would not change the ones, and it
    would turn gains down. With cfg.muon the last group is the blocks' matrices, at that rate.
    UserError if a rate is asked for without such weights, or with cfg.lr zero, which all are multiples of."""
    for key in ("lr_mp", "muon"):
        if getattr(cfg, key) > 0 and cfg.lr == 0:
            raise UserError(f"{key}={getattr(cfg, key)} needs lr above zero, got lr={cfg.lr}")
    rows = {id(w) for w in directed(net)}
    if cfg.lr_mp > 0 and not rows:
        raise UserError(f"lr_mp={cfg.lr_mp} is for magnitude-preserving weights; model.arch={cfg.model.arch!r} with "
                        f"model.preserve={cfg.model.preserve!r} has none")
    waves, cut = {id(p) for p in readers_of_waves(net)}, {id(p) for p in matrices(net)} if cfg.muon > 0 else set()
    kinds: dict[str, list[Tensor]] = {"rest": [], "waves": [], "scalars": [], "rows": [], "matrices": []}
    for p in net.parameters():
        kinds["matrices" if id(p) in cut else "rows" if id(p) in rows else "waves" if id(p) in waves
              else "scalars" if p.numel() == 1 else "rest"].append(p)
    if cfg.muon > 0 and not kinds["matrices"]:
        raise UserError(f"muon={cfg.muon} is for blocks' matrices; model.arch={cfg.model.arch!r} has none")
    rate = {"rows": cfg.lr_mp or cfg.lr, "waves": WAVES * cfg.lr, "matrices": cfg.muon}
    return [{"params": kinds[k], "lr": rate.get(k, cfg.lr), "scale": rate.get(k, cfg.lr) / cfg.lr if cfg.lr else 1.0,
             "weight_decay": 0.0 if id(kinds[k][0]) in rows or k == "scalars" else cfg.weight_decay}
            for k in kinds if kinds[k]]


def optimizer(net: nn.Module, cfg: Config, window: Window) -> torch.optim.Optimizer:
    """AdamW in a fused kernel, and Muon if asked for, all state there from the start.

    From the first bad gradient on neither changes anything."""
    parts = groups(net, cfg)
    last = parts.pop() if cfg.muon > 0 else None
    opt = torch.optim.AdamW(parts, cfg.lr, (cfg.beta1, cfg.beta2), fused=True)
    for p in (p for group in parts for p in group["params"]):
        opt.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p)}
    opt.found_inf, opt.grad_scale = window.bad, None        # a fused step changes nothing where found_inf is 1
    return opt if last is None else Muon(opt, last, window.bad, precision(window.bad.device, cfg.dtype))


def set_rates(opt: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the step's learning rate."""
    for group in opt.param_groups:
        group["lr"] = group["scale"] * rate


# ---------------------------------------------------------------- rows of unit magnitude

def keep_rows(net: nn.Module, cfg: Config) -> list[Tensor]:
    """[EDM2] sec. 2.3, [MAG]: the weights (m, n) whose rows are from now on at unit RMS before every forward pass.

    Puts them there and tells their layers, which then normalise nothing; [] unless cfg.normalize. UserError if the
    network has no such weights. Averages are copied from it before: a mean of unit rows is shorter than one."""
    if not cfg.normalize:
        return []
    rows = directed(net)
    if not rows:
        raise UserError(f"normalize=true needs magnitude-preserving weights; model.arch={cfg.model.arch!r} with "
                        f"model.preserve={cfg.model.preserve!r} has none")
    renormalize_(rows)
    rely_on_norms_(net, True)
    return rows


@torch.no_grad()
def tangent_(rows: list[Tensor]) -> None:
    """[EDM2] sec. 2.3, for rows w with |w|^2 = n: g <- g - (g w^T / n) w, in the gradients.

    It is linear in g, so microbatches and processes are summed first and this is done once."""
    for w in rows:
        along = torch.linalg.vecdot(w.grad, w)[:, None]                         # (m, 1)
        w.grad.addcmul_(w, along, value=-1 / w.shape[1])


@torch.no_grad()
def renormalize_(rows: list[Tensor], bad: Tensor | None = None) -> None:
    """[EDM2] eq. 66: w <- w / rms(w), row by row; a row of zeros stays. Not one bit changes where `bad` is 1."""
    lengths = [torch.linalg.vector_norm(w, dim=1, keepdim=True) for w in rows]  # (m, 1) each
    for w, length in zip(rows, lengths):
        scale = math.sqrt(w.shape[1]) / length.clamp_min(SHORTEST)
        w.mul_(scale if bad is None else torch.where(bad > 0, torch.ones_like(scale), scale))
