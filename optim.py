"""Optimizers: learning-rate schedule, parameter groups, Muon, and forced weight normalisation.

A magnitude-preserving layer uses its weight w only through w / rms(w), row by row ([MAG], [EDM2] sec. 2.3). Its forward
pass normalises w in every microbatch. The training step can do so once, with equal results: where rows have unit RMS,
w / rms(w) is w, and its gradient is that of w without the part along w.
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

MIN_NORM = 1e-30                        # norm below which a row counts as zero
SINUSOID_LR_SCALE = 1 / 16              # rate of weights that read sinusoids, over cfg.lr
MOMENTUM = 0.95                         # mu of Muon
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)    # [MUON]: p(s) = a s + b s^3 + c s^5, steep at 0 and near 1 on [0.7, 1.2]
NS_STEPS = 5                            # number of times that Muon applies p


def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up, constant, linear cool-down to zero; a function of the step alone.

    With cfg.lr_decay_start, the rate also falls as 1/sqrt(step) after that share of the run, [EDM2] sec. 2.3."""
    rising = (step + 1) / max(1, cfg.warmup)
    falling = (cfg.steps - step) / (cfg.steps * cfg.cooldown) if cfg.cooldown > 0 else 1.0
    decaying = math.sqrt(min(1.0, cfg.lr_decay_start * cfg.steps / max(1, step))) if cfg.lr_decay_start > 0 else 1.0
    return cfg.lr * min(1.0, rising, falling) * decaying


def mp_weights(net: nn.Module) -> list[Tensor]:
    """The weights (m, n) of MPLinear and MPEmbedding, of which only the direction of each row matters."""
    return [m.weight for m in net.modules() if isinstance(m, (MPLinear, MPEmbedding))]


def sinusoid_weights(net: nn.Module) -> list[Tensor]:
    """The first layers (D, K) of the time and control embeddings. Adam at the full rate saturates their SiLU (LOG.md).

    Nearly all K/2 cosines are close to 1, and Adam moves a row's weights on them by lr, all one way."""
    mlps = [m.mlp for m in net.modules() if isinstance(m, (TimestepEmbedder, MPTimestepEmbedder))]
    mlps += [mlp for m in net.modules() if isinstance(m, ControlEmbedding) for mlp in m.mlps.values()]
    return [(mlp[0] if isinstance(mlp, nn.Sequential) else mlp.fc1).weight for mlp in mlps]


def hidden_matrices(net: nn.Module) -> list[Tensor]:
    """The weights (m, n) in blocks that split into squares, without modulation layers, which start at zero."""
    found = [(name, p) for name, p in net.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    return [p for name, p in found if "modulation" not in name and max(p.shape) % min(p.shape) == 0]


def param_groups(net: nn.Module, cfg: Config) -> list[dict]:
    """The optimizer's groups: magnitude-preserving weights, scalars such as gains, readers of sinusoids, the rest.

    A group's `scale` is its rate over cfg.lr. The first and gains have no weight decay: it has no effect on the former,
    and lowers gains. With cfg.lr_muon the last group holds the blocks' matrices. UserError for a rate without weights.
    """
    rows, sinusoid = ({id(w) for w in weights} for weights in (mp_weights(net), sinusoid_weights(net)))
    matrices = {id(p) for p in hidden_matrices(net)} if cfg.lr_muon > 0 else set()
    for key, held, what in (("lr_mp", rows, "magnitude-preserving weights"), ("lr_muon", matrices, "blocks' matrices")):
        if getattr(cfg, key) > 0 and not held:
            raise UserError(f"{key}={getattr(cfg, key)} is for {what}; {_network(cfg)} has none")
    kinds: dict[str, list[Tensor]] = {"rest": [], "sinusoid": [], "scalars": [], "rows": [], "matrices": []}
    for p in net.parameters():
        kinds["matrices" if id(p) in matrices else "rows" if id(p) in rows else "sinusoid" if id(p) in sinusoid
              else "scalars" if p.numel() == 1 else "rest"].append(p)
    rate = {"rows": cfg.lr_mp or cfg.lr, "sinusoid": SINUSOID_LR_SCALE * cfg.lr, "matrices": cfg.lr_muon}
    return [{"params": kinds[k], "lr": rate.get(k, cfg.lr), "scale": rate.get(k, cfg.lr) / cfg.lr,
             "weight_decay": 0.0 if id(kinds[k][0]) in rows or k == "scalars" else cfg.weight_decay}
            for k in kinds if kinds[k]]


def _network(cfg: Config) -> str:
    return f"model.arch={cfg.model.arch!r} with model.mp={cfg.model.mp!r}"


def optimizer(net: nn.Module, cfg: Config, window: LossWindow) -> torch.optim.Optimizer:
    """Fused AdamW, joined by Muon if cfg.lr_muon is set, with all state allocated; both halt at a bad gradient."""
    groups = param_groups(net, cfg)
    matrices = groups.pop() if cfg.lr_muon > 0 else None
    opt = torch.optim.AdamW(groups, cfg.lr, (cfg.beta1, cfg.beta2), fused=True)
    for p in (p for group in groups for p in group["params"]):
        opt.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p)}
    opt.found_inf, opt.grad_scale = window.bad, None        # a fused step changes nothing where found_inf is 1
    return opt if matrices is None else Muon(opt, matrices, window.bad, compute_dtype(window.bad.device, cfg.dtype))


def set_lr(opt: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group: `rate` times its scale."""
    for group in opt.param_groups:
        group["lr"] = group["scale"] * rate


class Muon(torch.optim.Optimizer):
    """[MUON] momentum with orthogonal updates for the matrices of `group`, and `adam` for all others, in one optimizer.

    With g the gradient and u = U S V^T its average (S singular values):
        m <- mu m + (1 - mu) g                  momentum
        u  = mu m + (1 - mu) g                  the same, one gradient ahead (Nesterov)
        W <- (1 - eta lambda) W - eta U V^T     equally far along all singular directions
    A weight is split into squares as wide as its shorter side, so q, k and v are matrices of their own; all squares of
    a size are one batched product of type `dtype`. LOG.md compares it with AdamW on shapes. Nothing changes once
    `bad` is 1, after the first bad gradient."""
    def __init__(self, adam: torch.optim.AdamW, group: dict, bad: Tensor, dtype: torch.dtype) -> None:
        super().__init__([*adam.param_groups, group], {})
        self.adam, self.group, self.bad, self.dtype = adam, self.param_groups[-1], bad, dtype
        self.state = adam.state
        for w in self.group["params"]:
            self.state[w] = {"momentum": torch.zeros_like(w)}
        self.sides = sorted({min(w.shape) for w in self.group["params"]})

    @torch.no_grad()
    def step(self) -> None:
        self.adam.step()
        rate, decay = self.group["lr"], 1 - self.group["lr"] * self.group["weight_decay"]
        for D in self.sides:
            weights = [w for w in self.group["params"] if min(w.shape) == D]
            ahead = []
            for w in weights:
                m = self.state[w]["momentum"]
                m.copy_(torch.where(self.bad > 0, m, torch.lerp(w.grad, m, MOMENTUM)))
                ahead.append(split_squares(torch.lerp(w.grad, m, MOMENTUM)))
            updates = newton_schulz(torch.cat(ahead).to(self.dtype)).split([len(part) for part in ahead])
            for w, update in zip(weights, updates):
                w.copy_(torch.where(self.bad > 0, w, (w * decay).add(merge_squares(update, w), alpha=-rate)))


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
    """Split a matrix into squares as wide as its shorter side. (m, n) -> (K, D, D), D = min(m, n), K D D = m n"""
    D = min(w.shape)
    return torch.stack(w.split(D, dim=0 if w.shape[1] == D else 1))


def merge_squares(parts: Tensor, w: Tensor) -> Tensor:
    """The inverse of split_squares, for a matrix of the shape of w."""
    return torch.cat(list(parts), dim=0 if w.shape[1] == parts.shape[1] else 1)


def normalized_rows(net: nn.Module, cfg: Config) -> list[Tensor]:
    """[EDM2] sec. 2.3, [MAG]: weights (m, n) whose rows stay at unit RMS; [] unless cfg.forced_weight_norm.

    Normalises them once and sets their layers to rely on it, which those of an average, made before, may not.
    UserError if the network has no such weights."""
    if not cfg.forced_weight_norm:
        return []
    rows = mp_weights(net)
    if not rows:
        raise UserError(f"forced_weight_norm=true needs magnitude-preserving weights; {_network(cfg)} has none")
    renormalize_(rows)
    assume_normalized_(net, True)
    return rows


@torch.no_grad()
def project_grad_(rows: list[Tensor]) -> None:
    """[EDM2] sec. 2.3, for rows w with |w|^2 = n: g <- g - (g w^T / n) w, in the gradients.

    Linear in g, so it may follow the sum over microbatches and processes."""
    for w in rows:
        dot = torch.linalg.vecdot(w.grad, w)[:, None]                           # (m, 1)
        w.grad.addcmul_(w, dot, value=-1 / w.shape[1])


@torch.no_grad()
def renormalize_(rows: list[Tensor], bad: Tensor | None = None) -> None:
    """[EDM2] eq. 66: w <- w / rms(w), row by row; a row of zeros stays. Nothing changes where `bad` is 1."""
    for w in rows:
        length = torch.linalg.vector_norm(w, dim=1, keepdim=True)               # (m, 1)
        scale = math.sqrt(w.shape[1]) / length.clamp_min(MIN_NORM)
        w.mul_(scale if bad is None else torch.where(bad > 0, torch.ones_like(scale), scale))
