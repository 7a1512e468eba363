"""Magnitude-preserving operations and layers, and modulation by rotation. [MAG], after [EDM2].

Magnitude is the root mean square, M[x] = sqrt((1/n) sum_i E[x_i^2]); means are not removed. An operation preserves it
if independent inputs of magnitude 1 give an output of magnitude 1: in expectation, for fresh weights. MPLinear and
MPEmbedding divide their weights by their rows' norms on every use, so that the norms have no say. Forward changes no
weight. Norms, angles and Fourier features are in fp32, whatever the type of the tokens.
Dimensions: B batch, N tokens, K inputs and M outputs of a linear layer, D width.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-4                              # added to a norm before something is divided by it
SILU_MAGNITUDE = 0.5964692111227131     # sqrt(E[silu(z)^2]) of z ~ N(0, 1)
RESIDUAL = 0.3                          # t of mp_sum where a branch joins the trunk, [EDM2]
BOTH = 0.5                              # t of mp_sum for patch and position, time and class
FULL = ("cosine", "weights", "stream")  # [MAG]'s changes to a network, mp_blocks.py says which; configuration E
PRESERVE = (*FULL, "heads")             # all that there are
LAYOUT = {"shift": 2, "scale": 2, "rotate": 1, "gate": 2}       # rows of each part of a modulation, in halves of D
ADALN = ("shift", "scale", "gate")      # the parts of [DiT]


# ---------------------------------------------------------------- operations

def magnitude(x: Tensor) -> Tensor:
    """[MAG] the root mean square of all elements, in fp32. A scalar"""
    return _wide(x).square().mean().sqrt()


def norm(x: Tensor) -> Tensor:
    """Length of every vector along the last axis, in fp32; its gradient at zero is zero. (..., n) -> (..., 1)"""
    x = _wide(x)
    return (torch.linalg.vecdot(x, x) + torch.finfo(x.dtype).tiny).sqrt()[..., None]


def normalize(x: Tensor, eps: float = EPS) -> Tensor:
    """[MAG] N(x) = sqrt(n) x / (|x| + eps) along the last axis: unit magnitude. N(0) = 0. (..., n) -> (..., n)"""
    return (_wide(x) * (math.sqrt(x.shape[-1]) / (norm(x) + eps))).to(x.dtype)


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """[MAG] lemma 4, [EDM2] eq. 88: ((1-t) a + t b) / sqrt((1-t)^2 + t^2).

    Of magnitude 1 if a and b are, and are uncorrelated. Lemma 4 writes sqrt(alpha) a + sqrt(1-alpha) b with
    alpha = (1-t)^2 / ((1-t)^2 + t^2)."""
    length = math.hypot(1 - t, t)
    return torch.add(a * ((1 - t) / length), b, alpha=t / length)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """[EDM2] eq. 103: [a, b] along the last axis, t the weight of b: each adds to the magnitude as in mp_sum."""
    K, M = a.shape[-1], b.shape[-1]
    scale = math.sqrt((K + M) / ((1 - t) ** 2 + t ** 2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(K)), b * (scale * t / math.sqrt(M))], dim=-1)


def mp_silu(x: Tensor) -> Tensor:
    """[MAG] lemma 5, [EDM2] eq. 81: silu(x) / sqrt(E[silu(z)^2]); magnitude 1 for x ~ N(0, 1). Its mean is 0.346."""
    return F.silu(x) * (1 / SILU_MAGNITUDE)


def rotate(x: Tensor, theta: Tensor) -> Tensor:
    """[MAG] eq. 6: every pair (x_2i, x_2i+1) turned by theta_i, in fp32. x (..., D), theta (..., D/2) -> (..., D)

    A pair is a complex number, times e^(i theta). Lengths stay; theta = 0 is the identity to the last bit."""
    theta, pairs = _wide(theta), _wide(x).contiguous().unflatten(-1, (-1, 2))           # (..., D/2, 2)
    if torch.compiler.is_compiling():                       # torch.compile makes no code for complex numbers
        a, b, c, s = *pairs.unbind(-1), theta.cos(), theta.sin()
        turned = torch.stack([a * c - b * s, a * s + b * c], dim=-1)
    else:                                                   # 20 times as fast as the above on a CPU
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.polar(torch.ones_like(theta), theta))
    return turned.flatten(-2).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------- layers

class MPLinear(nn.Module):
    """[MAG] lemma 3: W_i = gain w_i / (|w_i| + eps) for every row, without bias. (..., K) -> (..., M)

    M[W x] = M[x] if the rows' directions are random, or the x_i uncorrelated. w ~ N(0, 1); `gain` is a scalar to be
    learned, or None for 1. A layer that must not act at first has gain 0, never zero weights. `normed`: the training
    step keeps all rows at |w_i| = sqrt(K), and forward relies on it: W_i = gain w_i / sqrt(K)."""
    def __init__(self, K: int, M: int, gain: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(M, K))
        self.gain = None if gain is None else nn.Parameter(torch.full((), gain))
        self.zero, self.normed = gain == 0, False

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.shape[1] ** -0.5 if self.normed else 1 / (norm(self.weight) + EPS)     # (M, 1)
        scale = scale if self.gain is None else scale * self.gain
        return F.linear(x, (self.weight * scale).to(x.dtype))


class BareLinear(nn.Module):
    """MPLinear's counterpart without normalised weights: He-uniform rows of variance 2/K, all zero if gain is 0."""
    def __init__(self, K: int, M: int, gain: float | None = None) -> None:
        super().__init__()
        limit = 0.0 if gain == 0 else math.sqrt(6 / K)
        self.weight = nn.Parameter(torch.empty(M, K).uniform_(-limit, limit))
        self.zero = gain == 0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def linear_of(preserve: tuple[str, ...]) -> type[MPLinear] | type[BareLinear]:
    """The linear layer of a network with these changes."""
    return MPLinear if "weights" in preserve else BareLinear


class MPMLP(nn.Module):
    """[MAG] W2 silu(W1 x), K -> H -> M; with "stream" mp_silu. (..., K) -> (..., M)"""
    def __init__(self, K: int, H: int, M: int, preserve: tuple[str, ...], gain: float | None = None) -> None:
        super().__init__()
        linear = linear_of(preserve)
        self.fc1, self.fc2 = linear(K, H), linear(H, M, gain)
        self.act = mp_silu if "stream" in preserve else F.silu

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class MPEmbedding(nn.Module):
    """[MAG] a table whose rows have unit magnitude. `normed` as in MPLinear. index (...) -> (..., D), fp32"""
    def __init__(self, rows: int, D: int) -> None:
        super().__init__()
        self.num_embeddings, self.normed = rows, False
        self.weight = nn.Parameter(torch.randn(rows, D))

    def forward(self, index: Tensor) -> Tensor:
        row = F.embedding(index, self.weight)
        return row if self.normed else normalize(row)


class MPFourier(nn.Module):
    """[EDM2] eq. 75: sqrt(2) cos(2 pi (f t + u)), f ~ N(0, bandwidth^2), u ~ U(0, 1). t (B,) -> (B, n), fp32

    Unit magnitude for every t. Features of t and t + d have correlation exp(-(2 pi bandwidth d)^2 / 2). f and u are
    drawn once, in fp32, and kept with the weights."""
    def __init__(self, n: int, bandwidth: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("frequency", 2 * math.pi * bandwidth * torch.randn(n))
        self.register_buffer("phase", 2 * math.pi * torch.rand(n))

    def forward(self, t: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(t.float()[:, None] * self.frequency + self.phase)


@torch.no_grad()
def normalize_weights_(net: nn.Module) -> None:
    """[MAG] forced weight normalisation: every row of every MPLinear and MPEmbedding to unit magnitude, in place.

    It leaves the function alone, and keeps the size of a step relative to the weights from shrinking as they grow.
    The training step does the same, once an optimizer step, with optim.renormalize_."""
    for m in net.modules():
        if isinstance(m, (MPLinear, MPEmbedding)):
            m.weight.copy_(normalize(m.weight))


def rely_on_norms_(net: nn.Module, normed: bool) -> None:
    """Set `normed` of all layers: before training, where the step keeps the rows normalised. Not for an average."""
    for m in net.modules():
        if isinstance(m, (MPLinear, MPEmbedding)):
            m.normed = normed


# ---------------------------------------------------------------- modulation

def rows(parts: tuple[str, ...], D: int) -> int:
    """Width of all of these parts of a modulation together."""
    return sum(LAYOUT[part] for part in parts) * D // 2


def split_parts(m: Tensor, *groups: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """One dict a group, from parts to their vectors in m (B, all rows). (B, 1, D) each, rotate (B, 1, D/2)"""
    named = [(k, part) for k, group in enumerate(groups) for part in group]
    half = m.shape[-1] // sum(LAYOUT[part] for _, part in named)
    found: list[dict[str, Tensor]] = [{} for _ in groups]
    for (k, part), v in zip(named, m[:, None].split([half * LAYOUT[part] for _, part in named], dim=-1)):
        found[k][part] = v
    return found


def steer(x: Tensor, m: dict[str, Tensor]) -> Tensor:
    """[MAG] eqs. 4, 6: R(rotate) (x (1 + scale) + shift), as much of it as m has. (B, N, D)"""
    if "scale" in m and "shift" in m:
        x = torch.addcmul(m["shift"].to(x.dtype), x, (1 + m["scale"]).to(x.dtype))
    elif "scale" in m:
        x = x * (1 + m["scale"]).to(x.dtype)
    elif "shift" in m:
        x = x + m["shift"].to(x.dtype)
    return rotate(x, m["rotate"]) if "rotate" in m else x


def gated_sum(x: Tensor, m: dict[str, Tensor], branch: Tensor) -> Tensor:
    """[DiT] adaLN-Zero: x + gate branch, nothing of the branch at first; without a gate all of it. (B, N, D)"""
    return torch.addcmul(x, m["gate"].to(x.dtype), branch) if "gate" in m else x + branch


def mp_gated_sum(x: Tensor, m: dict[str, Tensor], branch: Tensor) -> Tensor:
    """[MAG] mp_sum(x, (1 + gate) branch, t = 0.3): all of the branch at first, gate or no gate. (B, N, D)"""
    return mp_sum(x, branch * (1 + m["gate"]).to(x.dtype) if "gate" in m else branch, RESIDUAL)


class Modulation(nn.Module):
    """[MAG] sec. 3: what c does to a sub-layer, any parts of LAYOUT, a layer each. c (B, D) -> {part: v}

    For steer before the sub-layer (scale, then shift, then rotate) and mp_gated_sum after it. Every layer's gain is
    zero at first, and steer gives x back to the last bit. v (B, 1, D), rotate (B, 1, D/2) in radians; of c's type."""
    def __init__(self, D: int, parts: tuple[str, ...], preserve: tuple[str, ...] = FULL) -> None:
        super().__init__()
        linear = linear_of(preserve)
        self.layers = nn.ModuleDict({part: linear(D, rows((part,), D), gain=0.0) for part in parts})
        self.act = mp_silu if "stream" in preserve else F.silu

    def forward(self, c: Tensor) -> dict[str, Tensor]:
        c = self.act(c)[:, None]                                                # (B, 1, D)
        return {part: layer(c) for part, layer in self.layers.items()}
