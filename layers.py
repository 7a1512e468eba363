"""The parts of which plain diffusion transformers are made: linear layers, attention, MLP, norms, patches, modulation.

attention, mlp = split_parts(modulation(c), ADALN, ADALN)       # shift, scale and gate of two sub-layers
x = gated_sum(x, attention, self.attn(steer(norm(x), attention)))

Layers keep their weights in fp32 and compute in the type of their input. mp_layers.py has their magnitude-preserving
counterparts, model.py the blocks made of both.
Dimensions: B batch, N = h w image tokens, L context tokens, M keys, D width, H heads, d = D/H, C channels, P patch.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MLP_RATIO = 4                           # hidden width of a block's MLP over D, [DiT]
MAX_TOKENS_EXPLICIT_ATTENTION = 1024       # up to this many tokens a CPU's fused bf16 attention loses to plain products
MODULATION_PARTS = {"shift": 2, "scale": 2, "rotate": 1, "gate": 2}  # rows of each part of a modulation, in halves of D
ADALN = ("shift", "scale", "gate")      # the parts of [DiT]


# ---------------------------------------------------------------- linear layers and norms

class Linear(nn.Linear):
    """A linear layer that computes in the type of its input and keeps its weights in fp32. (..., K) -> (..., M)"""
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def mlp(K: int, D: int) -> nn.Sequential:
    """The two-layer SiLU network K -> D -> D that embeds every condition."""
    return nn.Sequential(Linear(K, D), nn.SiLU(), Linear(D, D))


class MLP(nn.Module):
    """[DiT] fc2(gelu(fc1(x))), tanh form. (B, N, D) -> (B, N, D)"""
    def __init__(self, D: int) -> None:
        super().__init__()
        self.fc1 = Linear(D, MLP_RATIO * D)
        self.fc2 = Linear(MLP_RATIO * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in float64 if it has that type."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without gain or bias, its statistics in fp32. (..., D)"""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class RMSNorm(nn.Module):
    """x / rms(x) with a learned gain over the last axis, in fp32. (..., d) -> (..., d)"""
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)   # F.rms_norm is half as fast on CPU
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)


# ---------------------------------------------------------------- attention

def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q (B, H, N, d), k and v (B, H, M, d) -> (B, N, H d)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= MAX_TOKENS_EXPLICIT_ATTENTION:
        weight = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                # (B, H, N, M)
        a = weight.softmax(dim=-1) @ v
    else:
        a = F.scaled_dot_product_attention(q, k, v)
    return a.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, n: int, H: int) -> tuple[Tensor, ...]:
    """(B, N, n D) -> n tensors (B, H, N, d): the q, k, v that one projection gives."""
    return x.unflatten(-1, (n, H, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Attention(nn.Module):
    """[DiT] self-attention with one projection for q, k, v. (B, N, D) -> (B, N, D)"""
    def __init__(self, D: int, H: int) -> None:
        super().__init__()
        self.H = H
        self.qkv = Linear(D, 3 * D)
        self.proj = Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(*split_heads(self.qkv(x), 3, self.H)))


class QKNormAttention(Attention):
    """Attention with RMSNorm on the q and k of every head, which [COND] needs wherever semantics are tokens."""
    def __init__(self, D: int, H: int) -> None:
        super().__init__(D, H)
        self.q_norm, self.k_norm = RMSNorm(D // H), RMSNorm(D // H)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.H)                           # (B, H, N, d) each
        return self.proj(attention(self.q_norm(q), self.k_norm(k), v))


class JointAttention(nn.Module):
    """[SD3] fig. 2, [COND] table A1: attention over [context; image] with RMSNorm on the q and k of every head.

    Context has its own q, k, v and shares the output projection. `last`: context gives only k and v and stays as it is.
    x (B, N, D), ctx (B, L, D) -> (B, N, D), (B, L, D) or None"""
    def __init__(self, D: int, H: int, last: bool) -> None:
        super().__init__()
        self.H, self.last = H, last
        self.qkv = Linear(D, 3 * D)
        self.ctx_qkv = Linear(D, (2 if last else 3) * D)                        # last: k and v
        self.q_norm, self.k_norm = RMSNorm(D // H), RMSNorm(D // H)
        self.proj = Linear(D, D)

    def forward(self, x: Tensor, ctx: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v = split_heads(self.qkv(x), 3, self.H)                           # (B, H, N, d) each
        *q_ctx, k_ctx, v_ctx = split_heads(self.ctx_qkv(ctx), 2 if self.last else 3, self.H)
        q, k, v = torch.cat([*q_ctx, q], 2), torch.cat([k_ctx, k], 2), torch.cat([v_ctx, v], 2)
        a = self.proj(attention(self.q_norm(q), self.k_norm(k), v))             # (B, L+N, D), last: (B, N, D)
        return (a, None) if self.last else (a[:, ctx.shape[1]:], a[:, :ctx.shape[1]])


class DualStreamAttention(nn.Module):
    """[SD3] fig. 2: attention over [context; image]; each has its own q, k, v, RMSNorm and projection.

    `last` as in JointAttention. x (B, N, D), ctx (B, L, D) -> (B, N, D), (B, L, D) or None"""
    def __init__(self, D: int, H: int, last: bool) -> None:
        super().__init__()
        self.H, self.last = H, last
        self.qkv = Linear(D, 3 * D)
        self.ctx_qkv = Linear(D, (2 if last else 3) * D)                        # last: k and v
        self.q_norm, self.k_norm = RMSNorm(D // H), RMSNorm(D // H)
        self.ctx_k_norm = RMSNorm(D // H)
        self.proj = Linear(D, D)
        if not last:
            self.ctx_q_norm = RMSNorm(D // H)
            self.ctx_proj = Linear(D, D)

    def forward(self, x: Tensor, ctx: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v = split_heads(self.qkv(x), 3, self.H)                           # (B, H, N, d) each
        *q_ctx, k_ctx, v_ctx = split_heads(self.ctx_qkv(ctx), 2 if self.last else 3, self.H)
        q, k = self.q_norm(q), torch.cat([self.ctx_k_norm(k_ctx), self.k_norm(k)], 2)
        v = torch.cat([v_ctx, v], 2)                                            # (B, H, L+N, d)
        if self.last:
            return self.proj(attention(q, k, v)), None
        a = attention(torch.cat([self.ctx_q_norm(*q_ctx), q], 2), k, v)         # (B, L+N, D)
        a_ctx, a = (part.contiguous() for part in a.split([ctx.shape[1], x.shape[1]], 1))
        return self.proj(a), self.ctx_proj(a_ctx)


# ---------------------------------------------------------------- modulation

def modulation(D: int, *groups: tuple[str, ...]) -> nn.Sequential:
    """[DiT] adaLN-Zero: one layer, zero at first, gives all parts of all groups; split_parts splits them."""
    return nn.Sequential(nn.SiLU(), Linear(D, sum(modulation_width(parts, D) for parts in groups)))


def input_parts(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The parts that act before a sub-layer."""
    return tuple(part for part in parts if part != "gate")


def modulation_width(parts: tuple[str, ...], D: int) -> int:
    """The width of these parts of a modulation together."""
    return sum(MODULATION_PARTS[part] for part in parts) * D // 2


def split_modulation(m: Tensor, *groups: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """One dict a group that maps parts to their vectors in m (B, all rows): (B, 1, D) each, rotate (B, 1, D/2)."""
    named = [(k, part) for k, group in enumerate(groups) for part in group]
    half = m.shape[-1] // sum(MODULATION_PARTS[part] for _, part in named)
    found: list[dict[str, Tensor]] = [{} for _ in groups]
    for (k, part), v in zip(named, m[:, None].split([half * MODULATION_PARTS[part] for _, part in named], dim=-1)):
        found[k][part] = v
    return found


def rotate(x: Tensor, theta: Tensor) -> Tensor:
    """[MAG] eq. 6: turn every pair (x_2i, x_2i+1) by theta_i, in fp32. x (..., D), theta (..., D/2) -> (..., D)

    A pair is a complex number, times e^(i theta). Lengths stay; theta = 0 is the identity to the last bit."""
    theta, pairs = at_least_fp32(theta), at_least_fp32(x).contiguous().unflatten(-1, (-1, 2))       # (..., D/2, 2)
    if torch.compiler.is_compiling():                       # torch.compile makes no code for complex numbers
        a, b, c, s = *pairs.unbind(-1), theta.cos(), theta.sin()
        turned = torch.stack([a * c - b * s, a * s + b * c], dim=-1)
    else:                                                   # 20 times as fast as the above on a CPU
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.polar(torch.ones_like(theta), theta))
    return turned.flatten(-2).to(x.dtype)


def modulate(x: Tensor, m: dict[str, Tensor]) -> Tensor:
    """[MAG] eqs. 4, 6: R(rotate) (x (1 + scale) + shift), with those parts that m has. (B, N, D)"""
    if "scale" in m and "shift" in m:
        x = torch.addcmul(m["shift"].to(x.dtype), x, (1 + m["scale"]).to(x.dtype))
    elif "scale" in m:
        x = x * (1 + m["scale"]).to(x.dtype)
    elif "shift" in m:
        x = x + m["shift"].to(x.dtype)
    return rotate(x, m["rotate"]) if "rotate" in m else x


def gated_residual(x: Tensor, m: dict[str, Tensor], branch: Tensor) -> Tensor:
    """[DiT] adaLN-Zero: x + gate branch, where the gate starts at zero; without a gate x + branch. (B, N, D)"""
    return torch.addcmul(x, m["gate"].to(x.dtype), branch) if "gate" in m else x + branch


# ---------------------------------------------------------------- patches and the final layer

def patchify(x: Tensor, P: int) -> Tensor:
    """(B, C, h P, w P) -> (B, h w, C P P), every P x P patch as a vector."""
    x = x.unflatten(3, (-1, P)).unflatten(2, (-1, P))                           # (B, C, h, P, w, P)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(x: Tensor, P: int, h: int, w: int) -> Tensor:
    """(B, h w, P P C) -> (B, C, h P, w P). In an output vector the channel is last, as in [DiT]'s weights."""
    x = x.unflatten(2, (P, P, -1)).unflatten(1, (h, w))                         # (B, h, w, P, P, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class PatchEmbed(nn.Module):
    """[DiT] sec. 3.2: every P x P patch through one linear layer. (B, C, h P, w P) -> (B, h w, D)

    The weight has the shape of the equivalent convolution, (D, C, P, P), as in published weights."""
    def __init__(self, C: int, P: int, D: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(C, D, P, stride=P)

    def forward(self, x: Tensor) -> Tensor:
        P = self.proj.stride[0]
        return F.linear(patchify(x, P), self.proj.weight.flatten(1).to(x.dtype), self.proj.bias.to(x.dtype))


class FinalLayer(nn.Module):
    """[DiT] sec. 3.2: adaLN, then a linear layer to patches, zero at first. (B, h w, D) -> (B, C, h P, w P)"""
    def __init__(self, D: int, P: int, C: int, parts: tuple[str, ...] = ADALN) -> None:
        super().__init__()
        self.P, self.parts = P, input_parts(parts)
        self.linear = Linear(D, P * P * C)
        self.adaLN_modulation = modulation(D, self.parts)

    def forward(self, x: Tensor, c: Tensor, h: int, w: int) -> Tensor:
        m, = split_modulation(self.adaLN_modulation(c), self.parts)
        return unpatchify(self.linear(modulate(norm(x), m)), self.P, h, w)
