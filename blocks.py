"""One small class for each kind of block, the parts they are made of, and what stands before and after them.

Block contract: Block(D, H, last, parts), forward(x, ctx, c) -> x, ctx with x (B, N, D) image tokens, ctx (B, L, D)
context tokens, c (B, D) the modulation vector. `parts` says what c does: adaLN's shift, scale and gate, or another
choice of mp_layers.LAYOUT. DiTBlock has no use for context and hands it back untouched; of the others the last of a
network (`last`) hands it back too and owns no context weights that nothing would read.
Dimensions: B batch, N = h w image tokens, L context tokens, M keys, D width, H heads, d = D/H, C channels, P patch.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditioning import Linear
from mp_layers import ADALN, gated_sum, rows, split_parts, steer

MLP_RATIO = 4                           # hidden width of a block's MLP over D, [DiT]
PLAIN_ATTENTION = 1024                  # up to this many tokens a CPU's fused bf16 attention loses to plain products


# ---------------------------------------------------------------- parts

def norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without gain or bias; its statistics are taken in fp32. (..., D)"""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q (B, H, N, d), k and v (B, H, M, d) -> (B, N, H d)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= PLAIN_ATTENTION:
        weight = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                # (B, H, N, M)
        a = weight.softmax(dim=-1) @ v
    else:
        a = F.scaled_dot_product_attention(q, k, v)
    return a.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, n: int, H: int) -> tuple[Tensor, ...]:
    """(B, N, n D) -> n tensors (B, H, N, d), for the n of q, k, v that one projection gives."""
    return x.unflatten(-1, (n, H, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), tanh form, [DiT]. (B, N, D) -> (B, N, D)"""
    def __init__(self, D: int) -> None:
        super().__init__()
        self.fc1 = Linear(D, MLP_RATIO * D)
        self.fc2 = Linear(MLP_RATIO * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    """Self-attention with one projection for q, k, v, [DiT]. (B, N, D) -> (B, N, D)"""
    def __init__(self, D: int, H: int) -> None:
        super().__init__()
        self.H = H
        self.qkv = Linear(D, 3 * D)
        self.proj = Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(*split_heads(self.qkv(x), 3, self.H)))


class RMSNorm(nn.Module):
    """x / rms(x) with a learned gain over the last axis, in fp32. (..., d) -> (..., d)"""
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)   # F.rms_norm is half as fast on CPU
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)


class NormedAttention(Attention):
    """Attention with RMSNorm on the q and k of every head, which [COND] needs where semantics are attended to."""
    def __init__(self, D: int, H: int) -> None:
        super().__init__(D, H)
        self.q_norm, self.k_norm = RMSNorm(D // H), RMSNorm(D // H)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.H)                           # (B, H, N, d) each
        return self.proj(attention(self.q_norm(q), self.k_norm(k), v))


class JointAttention(nn.Module):
    """[SD3] eq. 6, [COND] table A1: attention over [context; image] with RMSNorm on the q and k of every head.

    Context has its own q, k, v and shares the output projection. `last`: context gives k and v and is not updated.
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


class DualAttention(nn.Module):
    """[SD3] fig. 2: attention over [context; image] in which each has its own q, k, v, RMSNorm and projection.

    `last`: context gives k and v and is not updated. x (B, N, D), ctx (B, L, D) -> (B, N, D), (B, L, D) or None"""
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


def modulation(D: int, *groups: tuple[str, ...]) -> nn.Sequential:
    """[DiT] adaLN-Zero: all parts from c, side by side, zero at first; split_parts parts them. (B, D) -> (B, rows)"""
    return nn.Sequential(nn.SiLU(), Linear(D, sum(rows(parts, D) for parts in groups)))


def ungated(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The parts that act before a sub-layer."""
    return tuple(part for part in parts if part != "gate")


# ---------------------------------------------------------------- ends of the trunk

def patchify(x: Tensor, P: int) -> Tensor:
    """(B, C, h P, w P) -> (B, h w, C P P), every P x P patch as a vector."""
    x = x.unflatten(3, (-1, P)).unflatten(2, (-1, P))                           # (B, C, h, P, w, P)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(x: Tensor, P: int, h: int, w: int) -> Tensor:
    """(B, h w, P P C) -> (B, C, h P, w P): in a vector that comes out the channel is last, as in [DiT]'s weights."""
    x = x.unflatten(2, (P, P, -1)).unflatten(1, (h, w))                         # (B, h, w, P, P, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class PatchEmbed(nn.Module):
    """[DiT] sec. 3.2: every P x P patch through one linear layer. (B, C, h P, w P) -> (B, h w, D)

    The weight is kept in the shape of the equivalent convolution, (D, C, P, P), as published weights are."""
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
        self.P, self.parts = P, ungated(parts)
        self.linear = Linear(D, P * P * C)
        self.adaLN_modulation = modulation(D, self.parts)

    def forward(self, x: Tensor, c: Tensor, h: int, w: int) -> Tensor:
        m, = split_parts(self.adaLN_modulation(c), self.parts)
        return unpatchify(self.linear(steer(norm(x), m)), self.P, h, w)


# ---------------------------------------------------------------- blocks

class DiTBlock(nn.Module):
    """[DiT] fig. 3, adaLN-Zero: attention and MLP, each shifted, scaled and gated by c."""
    def __init__(self, D: int, H: int, last: bool, parts: tuple[str, ...] = ADALN) -> None:
        super().__init__()
        self.groups = parts, parts
        self.attn = Attention(D, H)
        self.mlp = MLP(D)
        self.adaLN_modulation = modulation(D, *self.groups)

    def forward(self, x: Tensor, ctx: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, m = split_parts(self.adaLN_modulation(c), *self.groups)
        x = gated_sum(x, a, self.attn(steer(norm(x), a)))
        return gated_sum(x, m, self.mlp(steer(norm(x), m))), ctx


class DiTAttBlock(nn.Module):
    """[COND] table A1, DiT by attention: the class is one more token of DiTBlock's attention, under the same weights.

    Its token has a shift, scale and gate of its own, also from c, and no MLP. `last`: no gate."""
    def __init__(self, D: int, H: int, last: bool, parts: tuple[str, ...] = ADALN) -> None:
        super().__init__()
        self.last = last
        self.groups = parts, parts, ungated(parts) if last else parts
        self.attn = NormedAttention(D, H)
        self.mlp = MLP(D)
        self.adaLN_modulation = modulation(D, *self.groups)

    def forward(self, x: Tensor, ctx: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, m, a_ctx = split_parts(self.adaLN_modulation(c), *self.groups)
        tokens = self.attn(torch.cat([steer(norm(ctx), a_ctx), steer(norm(x), a)], 1))      # (B, L+N, D)
        x = gated_sum(x, a, tokens[:, ctx.shape[1]:])
        x = gated_sum(x, m, self.mlp(steer(norm(x), m)))
        return x, ctx if self.last else gated_sum(ctx, a_ctx, tokens[:, :ctx.shape[1]])


class MMDiTBlock(nn.Module):
    """[COND] sec. 2, the block that its parameter counts suggest: DiTBlock with joint attention.

    Context is normalised, not modulated, and changed by attention alone; it has no MLP."""
    def __init__(self, D: int, H: int, last: bool, parts: tuple[str, ...] = ADALN) -> None:
        super().__init__()
        self.last = last
        self.groups = parts, parts
        self.attn = JointAttention(D, H, last)
        self.mlp = MLP(D)
        self.adaLN_modulation = modulation(D, *self.groups)

    def forward(self, x: Tensor, ctx: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, m = split_parts(self.adaLN_modulation(c), *self.groups)
        out, out_ctx = self.attn(steer(norm(x), a), norm(ctx))
        x = gated_sum(x, a, out)
        x = gated_sum(x, m, self.mlp(steer(norm(x), m)))
        return x, ctx if self.last else ctx + out_ctx


class SD3Block(nn.Module):
    """[SD3] fig. 2, mmDiT as published: context, a second stream, has its own modulation, projections and MLP.

    `last`: context is steered for its k and v, and ends there."""
    def __init__(self, D: int, H: int, last: bool, parts: tuple[str, ...] = ADALN) -> None:
        super().__init__()
        self.last = last
        self.groups, self.ctx_groups = (parts, parts), (ungated(parts),) if last else (parts, parts)
        self.attn = DualAttention(D, H, last)
        self.mlp = MLP(D)
        self.ctx_mlp = None if last else MLP(D)
        self.adaLN_modulation = modulation(D, *self.groups)
        self.ctx_adaLN_modulation = modulation(D, *self.ctx_groups)

    def forward(self, x: Tensor, ctx: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, m = split_parts(self.adaLN_modulation(c), *self.groups)
        a_ctx, *m_ctx = split_parts(self.ctx_adaLN_modulation(c), *self.ctx_groups)
        out, out_ctx = self.attn(steer(norm(x), a), steer(norm(ctx), a_ctx))
        x = gated_sum(x, a, out)
        x = gated_sum(x, m, self.mlp(steer(norm(x), m)))
        if self.last:
            return x, ctx
        ctx = gated_sum(ctx, a_ctx, out_ctx)
        return x, gated_sum(ctx, *m_ctx, self.ctx_mlp(steer(norm(ctx), *m_ctx)))
