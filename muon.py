"""Muon: a weight matrix moves by an orthogonal matrix, as far along its weakest directions as along its strongest.

g the gradient, U S V^T = u the singular values of what it is averaged to ([MUON]):

    m <- mu m + (1 - mu) g                  momentum
    u  = mu m + (1 - mu) g                  the same, one gradient ahead (Nesterov)
    W <- (1 - eta lambda) W - eta U V^T

U V^T is approached by polynomials of u (Newton-Schulz), which are matrix products and nothing else. LOG.md compares it
with AdamW, which scales every number of a gradient by itself, on shapes. Here a weight is cut into squares as wide as
its shorter side, so q, k and v are matrices of their own, and all squares of a size are one batched product.
Dimensions: D side of a square, K squares.
"""
import torch
from torch import Tensor, nn

MOMENTUM = 0.95                         # mu
QUINTIC = (3.4445, -4.7750, 2.0315)     # [MUON]: p(s) = a s + b s^3 + c s^5, steep at 0 and near 1 on [0.7, 1.2]
ROUNDS = 5                              # how often p is applied


def orthogonal(u: Tensor) -> Tensor:
    """[MUON] U p(..p(S)..) V^T, close to U V^T: singular values above a few thousandths of the norm go to [0.7, 1.2].

    u (K, D, D) -> (K, D, D), in the type of u. Zeros stay zeros."""
    a, b, c = QUINTIC
    x = u / (torch.linalg.matrix_norm(u, keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        s = x @ x.mT                                                            # U S^2 U^T
        x = a * x + (b * s + c * s @ s) @ x
    return x


def squares(w: Tensor) -> Tensor:
    """A matrix cut into squares as wide as its shorter side. (m, n) -> (K, D, D), D = min(m, n), K D D = m n"""
    D = min(w.shape)
    return torch.stack(w.split(D, dim=0 if w.shape[1] == D else 1))


def joined(parts: Tensor, w: Tensor) -> Tensor:
    """The inverse of `squares`, for a matrix of the shape of w."""
    return torch.cat(list(parts), dim=0 if w.shape[1] == parts.shape[1] else 1)


def matrices(net: nn.Module) -> list[Tensor]:
    """The weights (m, n) in blocks that can be cut into squares, without those that modulate, which begin at zero."""
    found = [(name, p) for name, p in net.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    return [p for name, p in found if "modulation" not in name and max(p.shape) % min(p.shape) == 0]


class Muon(torch.optim.Optimizer):
    """[MUON] for the matrices of `group`, and `adam` for all other weights, as one optimizer with one state.

    Both skip a step from the first bad gradient on, when `bad` is 1. `dtype`: of the products."""
    def __init__(self, adam: torch.optim.AdamW, group: dict, bad: Tensor, dtype: torch.dtype) -> None:
        super().__init__([*adam.param_groups, group], {})
        self.adam, self.group, self.bad, self.dtype = adam, self.param_groups[-1], bad, dtype
        self.state = adam.state
        for w in self.group["params"]:
            self.state[w] = {"momentum": torch.zeros_like(w)}
        self.sides = sorted({min(w.shape) for w in self.group["params"]})

    @torch.no_grad()
    def step(self) -> None:
        """Move all weights; nothing is read, so the device is not waited for."""
        self.adam.step()
        rate, decay = self.group["lr"], 1 - self.group["lr"] * self.group["weight_decay"]
        for D in self.sides:
            weights = [w for w in self.group["params"] if min(w.shape) == D]
            ahead = []
            for w in weights:
                m = self.state[w]["momentum"]
                m.copy_(torch.where(self.bad > 0, m, torch.lerp(w.grad, m, MOMENTUM)))
                ahead.append(squares(torch.lerp(w.grad, m, MOMENTUM)))
            moves = orthogonal(torch.cat(ahead).to(self.dtype)).split([len(part) for part in ahead])
            for w, move in zip(weights, moves):
                w.copy_(torch.where(self.bad > 0, w, (w * decay).add(joined(move, w), alpha=-rate)))
