"""Optimizers: learning-rate schedule, parameter groups, Muon, and forced weight normalisation.

A magnitude-preserving layer uses its weight w only through w / rms(w), row by row ([MAG], [EDM2] sec. 2.3). In the
forward pass that costs a normalisation a microbatch, and a gradient through it. The training step can do both once,
with equal results: where rows have unit RMS, w / rms(w) is w, and its gradient is that of w without the part along w:

    tangent_(rows)                      remove the part of the gradient along each row
    clip, opt.step()
    renormalize_(rows, window.bad)      bring rows back to unit RMS

with rows = keep_rows(net, cfg), empty unless cfg.normalize. AdamW moves all weights; with cfg.muon, Muon moves the
weights of the blocks' linear layers instead.
Dimensions: m rows, n columns of a weight; K squares of side D.
"""
import math

import torch
from torch import Tensor, nn

from conditioning import ControlEmbedding, MPTimestepEmbedder, TimestepEmbedder
from config import Config, UserError
from mp_layers import MPEmbedding, MPLinear, assume_normalized_
from runtime.distributed import compute_dtype
from runtime.log import LossWindow

MIN_NORM = 1e-30                        # length at which a row counts as zero
SINUSOID_LR_SCALE = 1 / 16                          # rate of weights that read sinusoids, over that of others
MOMENTUM = 0.95                         # mu of Muon
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)    # [MUON]: p(s) = a s + b s^3 + c s^5, steep at 0 and near 1 on [0.7, 1.2]
NS_STEPS = 5                              # number of times that Muon applies p


# ---------------------------------------------------------------- learning rate

def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up, constant, linear cool-down to zero; a function of the step alone.

    With cfg.decay, the rate also falls as 1/sqrt(step) after that share of the run, [EDM2] sec. 2.3."""
    rising = (step + 1) / max(1, cfg.warmup)
    falling = (cfg.steps - step) / (cfg.steps * cfg.cooldown) if cfg.cooldown > 0 else 1.0
    decaying = math.sqrt(min(1.0, cfg.lr_decay_start * cfg.steps / max(1, step))) if cfg.lr_decay_start > 0 else 1.0
    return cfg.lr * min(1.0, rising, falling) * decaying


# ---------------------------------------------------------------- groups

def mp_weights(net: nn.Module) -> list[Tensor]:
    """The weights (m, n) of MPLinear and MPEmbedding: only the direction of each row counts."""
    return [m.weight for m in net.modules() if isinstance(m, (MPLinear, MPEmbedding))]


def sinusoid_weights(net: nn.Module) -> list[Tensor]:
    """The first layers (D, K) of the time and control embeddings, which read sinusoids.

    Half of the waves are cosines, nearly all of them near 1 where the number is small against 10,000. Adam moves a
    row's weights on them by lr, all one way. That moves the row's output by K/2 lr a step, as a bias with K/2 times the
    rate would. From lr = 1e-3 on it drives SiLU to where it has no gradient, for good (LOG.md)."""
    mlps = [m.mlp for m in net.modules() if isinstance(m, (TimestepEmbedder, MPTimestepEmbedder))]
    mlps += [mlp for m in net.modules() if isinstance(m, ControlEmbedding) for mlp in m.mlps.values()]
    return [(mlp[0] if isinstance(mlp, nn.Sequential) else mlp.fc1).weight for mlp in mlps]


def hidden_matrices(net: nn.Module) -> list[Tensor]:
    """The weights (m, n) in blocks that split into squares, without the modulation layers, which start at zero."""
    found = [(name, p) for name, p in net.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    return [p for name, p in found if "modulation" not in name and max(p.shape) % min(p.shape) == 0]


def param_groups(net: nn.Module, cfg: Config) -> list[dict]:
    """The optimizer's groups: weights with rows of fixed length, scalars such as gains, readers of waves, the rest.

    The first learn at cfg.lr_mp, readers of waves at a share of cfg.lr, all others at cfg.lr; a group's `scale` is its
    rate over cfg.lr. Directions and scalars do not decay: it would not change the former, and would turn gains down.
    With cfg.muon the last group holds the blocks' matrices, at that rate.
    UserError for a rate whose weights the network lacks, or with cfg.lr zero, of which all rates are multiples."""
    for key in ("lr_mp", "lr_muon"):
        if getattr(cfg, key) > 0 and cfg.lr == 0:
            raise UserError(f"{key}={getattr(cfg, key)} needs lr above zero, got lr={cfg.lr}")
    rows, waves = ({id(w) for w in weights} for weights in (mp_weights(net), sinusoid_weights(net)))
    cut = {id(p) for p in hidden_matrices(net)} if cfg.lr_muon > 0 else set()
    if cfg.lr_mp > 0 and not rows:
        raise UserError(f"lr_mp={cfg.lr_mp} is for magnitude-preserving weights; {_network(cfg)} has none")
    kinds: dict[str, list[Tensor]] = {"rest": [], "waves": [], "scalars": [], "rows": [], "matrices": []}
    for p in net.parameters():
        kinds["matrices" if id(p) in cut else "rows" if id(p) in rows else "waves" if id(p) in waves
              else "scalars" if p.numel() == 1 else "rest"].append(p)
    if cfg.lr_muon > 0 and not kinds["matrices"]:
        raise UserError(f"lr_muon={cfg.lr_muon} is for blocks' matrices; {_network(cfg)} has none")
    rate = {"rows": cfg.lr_mp or cfg.lr, "waves": SINUSOID_LR_SCALE * cfg.lr, "matrices": cfg.lr_muon}
    return [{"params": kinds[k], "lr": rate.get(k, cfg.lr), "scale": rate.get(k, cfg.lr) / cfg.lr if cfg.lr else 1.0,
             "weight_decay": 0.0 if id(kinds[k][0]) in rows or k == "scalars" else cfg.weight_decay}
            for k in kinds if kinds[k]]


def _network(cfg: Config) -> str:
    return f"model.arch={cfg.model.arch!r} with model.mp={cfg.model.mp!r}"


def optimizer(net: nn.Module, cfg: Config, window: LossWindow) -> torch.optim.Optimizer:
    """AdamW in a fused kernel, with Muon beside it if cfg.muon, and all state allocated.

    Neither changes anything after the first bad gradient."""
    parts = param_groups(net, cfg)
    last = parts.pop() if cfg.lr_muon > 0 else None
    opt = torch.optim.AdamW(parts, cfg.lr, (cfg.beta1, cfg.beta2), fused=True)
    for p in (p for group in parts for p in group["params"]):
        opt.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p)}
    opt.found_inf, opt.grad_scale = window.bad, None        # a fused step changes nothing where found_inf is 1
    return opt if last is None else Muon(opt, last, window.bad, compute_dtype(window.bad.device, cfg.dtype))


def set_lr(opt: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the step's learning rate."""
    for group in opt.param_groups:
        group["lr"] = group["scale"] * rate


# ---------------------------------------------------------------- Muon

class Muon(torch.optim.Optimizer):
    """[MUON] momentum with orthogonal updates for the matrices of `group`, and `adam` for all others, as one optimizer.

    With g the gradient and u = U S V^T its average (S singular values):
        m <- mu m + (1 - mu) g                  momentum
        u  = mu m + (1 - mu) g                  the same, one gradient ahead (Nesterov)
        W <- (1 - eta lambda) W - eta U V^T     as far along the weakest directions as along the strongest
    A weight is split into squares as wide as its shorter side, so q, k and v are matrices of their own, and all squares
    of a size are one batched product of type `dtype`. LOG.md compares it with AdamW on shapes. Nothing moves once `bad`
    is 1, after the first bad gradient."""
    def __init__(self, adam: torch.optim.AdamW, group: dict, bad: Tensor, dtype: torch.dtype) -> None:
        super().__init__([*adam.param_groups, group], {})
        self.adam, self.group, self.bad, self.dtype = adam, self.param_groups[-1], bad, dtype
        self.state = adam.state
        for w in self.group["params"]:
            self.state[w] = {"momentum": torch.zeros_like(w)}
        self.sides = sorted({min(w.shape) for w in self.group["params"]})

    @torch.no_grad()
    def step(self) -> None:
        """Move all weights; nothing is read, so nothing waits for the device."""
        self.adam.step()
        rate, decay = self.group["lr"], 1 - self.group["lr"] * self.group["weight_decay"]
        for D in self.sides:
            weights = [w for w in self.group["params"] if min(w.shape) == D]
            ahead = []
            for w in weights:
                m = self.state[w]["momentum"]
                m.copy_(torch.where(self.bad > 0, m, torch.lerp(w.grad, m, MOMENTUM)))
                ahead.append(split_squares(torch.lerp(w.grad, m, MOMENTUM)))
            moves = newton_schulz(torch.cat(ahead).to(self.dtype)).split([len(part) for part in ahead])
            for w, move in zip(weights, moves):
                w.copy_(torch.where(self.bad > 0, w, (w * decay).add(merge_squares(move, w), alpha=-rate)))


def newton_schulz(u: Tensor) -> Tensor:
    """[MUON] Newton-Schulz: U p(..p(S)..) V^T, close to U V^T. u (K, D, D) -> (K, D, D), in the type of u

    Singular values above a few thousandths of the norm go to [0.7, 1.2]. Zeros stay zeros."""
    a, b, c = NS_COEFFICIENTS
    x = u / (torch.linalg.matrix_norm(u, keepdim=True) + 1e-7)
    for _ in range(NS_STEPS):
        s = x @ x.mT                                                            # U S^2 U^T
        x = a * x + (b * s + c * s @ s) @ x
    return x


def split_squares(w: Tensor) -> Tensor:
    """A matrix split into squares as wide as its shorter side. (m, n) -> (K, D, D), D = min(m, n), K D D = m n"""
    D = min(w.shape)
    return torch.stack(w.split(D, dim=0 if w.shape[1] == D else 1))


def merge_squares(parts: Tensor, w: Tensor) -> Tensor:
    """The inverse of `squares`, for a matrix of the shape of w."""
    return torch.cat(list(parts), dim=0 if w.shape[1] == parts.shape[1] else 1)


# ---------------------------------------------------------------- rows of unit magnitude

def normalized_rows(net: nn.Module, cfg: Config) -> list[Tensor]:
    """[EDM2] sec. 2.3, [MAG]: the weights (m, n) that the step keeps at rows of unit RMS; [] unless cfg.normalize.

    Normalises them and tells their layers, which then normalise nothing. UserError if the network has no such weights.
    Copy averages from the network before: a mean of unit rows is shorter than one."""
    if not cfg.forced_weight_norm:
        return []
    rows = mp_weights(net)
    if not rows:
        raise UserError(f"normalize=true needs magnitude-preserving weights; {_network(cfg)} has none")
    renormalize_(rows)
    assume_normalized_(net, True)
    return rows


@torch.no_grad()
def project_grad_(rows: list[Tensor]) -> None:
    """[EDM2] sec. 2.3, for rows w with |w|^2 = n: g <- g - (g w^T / n) w, in the gradients.

    Linear in g, so it may follow the sum over microbatches and processes."""
    for w in rows:
        along = torch.linalg.vecdot(w.grad, w)[:, None]                         # (m, 1)
        w.grad.addcmul_(w, along, value=-1 / w.shape[1])


@torch.no_grad()
def renormalize_(rows: list[Tensor], bad: Tensor | None = None) -> None:
    """[EDM2] eq. 66: w <- w / rms(w), row by row; a row of zeros stays. Not one bit changes where `bad` is 1."""
    lengths = [torch.linalg.vector_norm(w, dim=1, keepdim=True) for w in rows]  # (m, 1) each
    for w, length in zip(rows, lengths):
        scale = math.sqrt(w.shape[1]) / length.clamp_min(MIN_NORM)
        w.mul_(scale if bad is None else torch.where(bad > 0, torch.ones_like(scale), scale))
