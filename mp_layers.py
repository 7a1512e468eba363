"""Magnitude-preserving operations and layers: [MAG], after [EDM2].

Magnitude is the root mean square, M[x] = sqrt((1/n) sum_i E[x_i^2]); means are not removed. An operation preserves it
if independent inputs of magnitude 1 give an output of magnitude 1, in expectation and for fresh weights. MPLinear and
MPEmbedding divide their weights by the norms of their rows on every use, so row norms have no effect. Forward changes
no weight. Norms, angles and Fourier features are in fp32, whatever the type of the tokens.

`mp` lists the changes that a network has (--model.mp):
cosine    q and k of every head have unit magnitude
weights   every linear layer divides its rows by their norms
stream    sums, SiLU, embeddings and positions preserve magnitude, and no layer normalises tokens; needs weights
heads     not in [MAG]: attention averages, so each head's output is brought back to unit magnitude
The paper's ladder: A none; B cosine; C cosine+weights; D as C with --forced_weight_norm, rows normalised every step;
E is D with stream. Without stream the sums, the norms and the gates are DiT's.
Dimensions: B batch, N = h w image tokens, L context tokens, K inputs and M outputs of a linear layer, D width, H heads,
d = D/H, C channels, P patch.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import (ADALN, at_least_fp32, attention, input_parts, modulate, modulation_width, norm as layer_norm,
                    patchify, rotate, split_heads, unpatchify)

EPS = 1e-4                              # added to a norm before division by it
SILU_MAGNITUDE = 0.5964692111227131     # sqrt(E[silu(z)^2]) of z ~ N(0, 1)
RES_BALANCE = 0.3                       # t of mp_sum where a branch joins the trunk, [EDM2]
EMBED_BALANCE = 0.5                     # t of mp_sum for patch and position, time and class
FULL = ("cosine", "weights", "stream")  # [MAG]'s changes, configuration E
MP_FEATURES = (*FULL, "heads")          # every change


# ---------------------------------------------------------------- operations

def magnitude(x: Tensor) -> Tensor:
    """[MAG] the root mean square of all elements, in fp32. A scalar"""
    return at_least_fp32(x).square().mean().sqrt()


def norm(x: Tensor) -> Tensor:
    """Length of every vector along the last axis, in fp32; its gradient at zero is zero. (..., n) -> (..., 1)"""
    x = at_least_fp32(x)
    return (torch.linalg.vecdot(x, x) + torch.finfo(x.dtype).tiny).sqrt()[..., None]


def normalize(x: Tensor, eps: float = EPS) -> Tensor:
    """[MAG] N(x) = sqrt(n) x / (|x| + eps) along the last axis: unit magnitude. N(0) = 0. (..., n) -> (..., n)"""
    return (at_least_fp32(x) * (math.sqrt(x.shape[-1]) / (norm(x) + eps))).to(x.dtype)


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


def identity(x: Tensor) -> Tensor:
    """x, where a network does not normalise."""
    return x


# ---------------------------------------------------------------- linear layers and embeddings

class MPLinear(nn.Module):
    """[MAG] lemma 3: W_i = gain w_i / (|w_i| + eps) for every row, without bias. (..., K) -> (..., M)

    M[W x] = M[x] if the rows' directions are random, or the x_i uncorrelated. w ~ N(0, 1); `gain` is a learned scalar,
    or None for 1. A layer that must not act at first has gain 0, never zero weights. `normed`: the optimizer step
    keeps all rows at |w_i| = sqrt(K), and forward relies on it: W_i = gain w_i / sqrt(K)."""
    def __init__(self, K: int, M: int, gain: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(M, K))
        self.gain = None if gain is None else nn.Parameter(torch.full((), gain))
        self.zero, self.normed = gain == 0, False

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.shape[1] ** -0.5 if self.normed else 1 / (norm(self.weight) + EPS)     # (M, 1)
        scale = scale if self.gain is None else scale * self.gain
        return F.linear(x, (self.weight * scale).to(x.dtype))


class PlainLinear(nn.Module):
    """MPLinear's counterpart without normalised weights: He-uniform rows of variance 2/K, all zero if gain is 0."""
    def __init__(self, K: int, M: int, gain: float | None = None) -> None:
        super().__init__()
        limit = 0.0 if gain == 0 else math.sqrt(6 / K)
        self.weight = nn.Parameter(torch.empty(M, K).uniform_(-limit, limit))
        self.zero = gain == 0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def linear_of(mp: tuple[str, ...]) -> type[MPLinear] | type[PlainLinear]:
    """The class of linear layers for these changes."""
    return MPLinear if "weights" in mp else PlainLinear


class MPMLP(nn.Module):
    """[MAG] W2 silu(W1 x), K -> H -> M; with "stream" mp_silu. (..., K) -> (..., M)"""
    def __init__(self, K: int, H: int, M: int, mp: tuple[str, ...], gain: float | None = None) -> None:
        super().__init__()
        linear = linear_of(mp)
        self.fc1, self.fc2 = linear(K, H), linear(H, M, gain)
        self.act = mp_silu if "stream" in mp else F.silu

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
    random, fixed, fp32, and saved with the weights."""
    def __init__(self, n: int, bandwidth: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("frequency", 2 * math.pi * bandwidth * torch.randn(n))
        self.register_buffer("phase", 2 * math.pi * torch.rand(n))

    def forward(self, t: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(t.float()[:, None] * self.frequency + self.phase)


@torch.no_grad()
def normalize_weights_(net: nn.Module) -> None:
    """[MAG] forced weight normalisation: every row of every MPLinear and MPEmbedding to unit magnitude, in place.

    The function stays the same, and growing weights no longer make steps relatively smaller. Training does it after
    every optimizer step, by optim.renormalize_."""
    for m in net.modules():
        if isinstance(m, (MPLinear, MPEmbedding)):
            m.weight.copy_(normalize(m.weight))


def assume_normalized_(net: nn.Module, normed: bool) -> None:
    """Set `normed` of all layers, for a network whose training step normalises its rows. Not for an EMA."""
    for m in net.modules():
        if isinstance(m, (MPLinear, MPEmbedding)):
            m.normed = normed


# ---------------------------------------------------------------- attention

def normalize_heads(a: Tensor, H: int) -> Tensor:
    """Bring each of the H parts of every token to unit magnitude. (B, N, H d) -> (B, N, H d)

    A head returns sum_j p_j v_j. Its magnitude is sqrt(sum_j p_j^2) < 1 for uncorrelated v_j, and nearer to 1 for the
    correlated ones of an image, so a division by sqrt(sum_j p_j^2) would overshoot, more in every block."""
    return normalize(a.unflatten(-1, (H, -1))).flatten(-2)


class MPAttention(nn.Module):
    """[MAG] cosine attention: softmax(N(q) N(k)^T / sqrt(d)) v, logits sqrt(d) cos(q, k). (B, N, D) -> (B, N, D)

    v is not normalised."""
    def __init__(self, D: int, H: int, mp: tuple[str, ...] = FULL) -> None:
        super().__init__()
        self.H, linear = H, linear_of(mp)
        self.qkv, self.proj = linear(D, 3 * D), linear(D, D)
        self.qk_norm = normalize if "cosine" in mp else identity
        self.heads = "heads" in mp

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.H)                           # (B, H, N, d) each
        a = attention(self.qk_norm(q), self.qk_norm(k), v)                      # (B, N, D)
        return self.proj(normalize_heads(a, self.H) if self.heads else a)


class MPJointAttention(nn.Module):
    """JointAttention as cosine attention: over [context; image], with one output projection.

    `last`: context gives only k and v and stays as it is. x (B, N, D), ctx (B, L, D) -> (B, N, D), (B, L, D) or None"""
    def __init__(self, D: int, H: int, last: bool, mp: tuple[str, ...] = FULL) -> None:
        super().__init__()
        self.H, self.last, self.heads = H, last, "heads" in mp
        self.qkv = MPLinear(D, 3 * D)
        self.ctx_qkv = MPLinear(D, (2 if last else 3) * D)                      # last: k and v
        self.proj = MPLinear(D, D)

    def forward(self, x: Tensor, ctx: Tensor) -> tuple[Tensor, Tensor | None]:
        L = ctx.shape[1]
        q, k, v = split_heads(self.qkv(x), 3, self.H)                           # (B, H, N, d) each
        *q_ctx, k_ctx, v_ctx = split_heads(self.ctx_qkv(ctx), 2 if self.last else 3, self.H)
        q, k, v = torch.cat([*q_ctx, q], 2), torch.cat([k_ctx, k], 2), torch.cat([v_ctx, v], 2)
        a = attention(normalize(q), normalize(k), v)                            # (B, L+N, D), last: (B, N, D)
        a = self.proj(normalize_heads(a, self.H) if self.heads else a)
        return (a, None) if self.last else (a[:, L:], a[:, :L])


# ---------------------------------------------------------------- modulation, patches and the final layer

def mp_gated_residual(x: Tensor, m: dict[str, Tensor], branch: Tensor) -> Tensor:
    """[MAG] mp_sum(x, (1 + gate) branch, t = 0.3): the whole branch at first, with or without a gate. (B, N, D)"""
    return mp_sum(x, branch * (1 + m["gate"]).to(x.dtype) if "gate" in m else branch, RES_BALANCE)


class MPModulation(nn.Module):
    """[MAG] sec. 3: modulation of a sub-layer by any of MODULATION_PARTS, one layer each. c (B, D) -> {part: v}

    For modulate before the sub-layer and mp_gated_residual after it. Every gain starts at zero, so modulate returns
    x to the last bit. v (B, 1, D), rotate (B, 1, D/2) in radians; of c's type."""
    def __init__(self, D: int, parts: tuple[str, ...], mp: tuple[str, ...] = FULL) -> None:
        super().__init__()
        linear = linear_of(mp)
        self.layers = nn.ModuleDict({part: linear(D, modulation_width((part,), D), gain=0.0) for part in parts})
        self.act = mp_silu if "stream" in mp else F.silu

    def forward(self, c: Tensor) -> dict[str, Tensor]:
        c = self.act(c)[:, None]                                                # (B, 1, D)
        return {part: layer(c) for part, layer in self.layers.items()}


class MPPatchEmbed(nn.Module):
    """[MAG] a patch and the number 1, the network's only bias, through one layer. (B, C, h P, w P) -> (B, h w, D)

    Unit magnitude for pixels of unit magnitude: noise, and images of unit variance."""
    def __init__(self, C: int, P: int, D: int, mp: tuple[str, ...] = FULL) -> None:
        super().__init__()
        self.P = P
        self.proj = linear_of(mp)(P * P * C + 1, D)

    def forward(self, x: Tensor) -> Tensor:
        x = patchify(x, self.P)                                                 # (B, h w, C P P)
        return self.proj(torch.cat([x, torch.ones_like(x[..., :1])], dim=-1))


class MPFinalLayer(nn.Module):
    """[MAG] modulation, then one layer to patches whose gain starts at zero. (B, h w, D) -> (B, C, h P, w P)"""
    def __init__(self, D: int, P: int, C: int, parts: tuple[str, ...] = ADALN, mp: tuple[str, ...] = FULL) -> None:
        super().__init__()
        self.P, self.norm = P, identity if "stream" in mp else layer_norm
        self.modulation = MPModulation(D, input_parts(parts), mp)
        self.linear = linear_of(mp)(D, P * P * C, gain=0.0)

    def forward(self, x: Tensor, c: Tensor, h: int, w: int) -> Tensor:
        return unpatchify(self.linear(modulate(self.norm(x), self.modulation(c))), self.P, h, w)
