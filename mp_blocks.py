"""The magnitude-preserving twins of DiT's and mmDiT's blocks, and of what stands before and after them. [MAG]

`preserve` says which of [MAG]'s changes a network has, chosen when it is built:
cosine    q and k of every head have unit magnitude
weights   every linear layer divides its rows by their norms
stream    sums, SiLU, embeddings and positions preserve magnitude, and no token is normalised between them
heads     not in [MAG]: attention averages, so what leaves a head is brought back to unit magnitude
Its ladder: A none; B cosine; C cosine+weights; D the same, normalised by the training step too (--normalize); E is D
with stream. Without stream the sums, the norms and the gates are DiT's. The contract is that of blocks.py.
Dimensions: B batch, N = h w image tokens, L context tokens, M keys, D width, H heads, d = D/H, C channels, P patch.
"""
import torch
from torch import Tensor, nn

from blocks import MLP_RATIO, attention, norm, patchify, split_heads, ungated, unpatchify
from mp_layers import (ADALN, FULL, RESIDUAL, MPLinear, MPMLP, Modulation, gated_sum, linear_of, mp_gated_sum, mp_sum,
                       normalize, steer)


# ---------------------------------------------------------------- parts

def as_is(x: Tensor) -> Tensor:
    """x: where a network does not normalise."""
    return x


def normalize_heads(a: Tensor, H: int) -> Tensor:
    """Each of the H parts of every token to unit magnitude. (B, N, H d) -> (B, N, H d)

    A head gives sum_j p_j v_j: for uncorrelated v_j of magnitude 1 that is sqrt(sum_j p_j^2) < 1, and nearer to 1 for
    correlated ones, as those of a picture are. To divide by sqrt(sum_j p_j^2) is right only for the former; in a deep
    network, whose tokens grow alike, the error multiplies from block to block. This gives 1 in either case."""
    return normalize(a.unflatten(-1, (H, -1))).flatten(-2)


class MPAttention(nn.Module):
    """[MAG] cosine attention: softmax(N(q) N(k)^T / sqrt(d)) v, logits sqrt(d) cos(q, k). (B, N, D) -> (B, N, D)

    v is not normalised."""
    def __init__(self, D: int, H: int, preserve: tuple[str, ...] = FULL) -> None:
        super().__init__()
        self.H, linear = H, linear_of(preserve)
        self.qkv, self.proj = linear(D, 3 * D), linear(D, D)
        self.unit = normalize if "cosine" in preserve else as_is
        self.heads = "heads" in preserve

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.H)                           # (B, H, N, d) each
        a = attention(self.unit(q), self.unit(k), v)                            # (B, N, D)
        return self.proj(normalize_heads(a, self.H) if self.heads else a)


class MPJointAttention(nn.Module):
    """JointAttention with cosine attention: over [context; image], one output projection.

    `last`: context gives k and v and is not updated. x (B, N, D), ctx (B, L, D) -> (B, N, D), (B, L, D) or None"""
    def __init__(self, D: int, H: int, last: bool, preserve: tuple[str, ...] = FULL) -> None:
        super().__init__()
        self.H, self.last, self.heads = H, last, "heads" in preserve
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


# ---------------------------------------------------------------- ends of the trunk

class MPPatchEmbed(nn.Module):
    """[MAG] a patch and the number 1, the network's only bias, through one layer. (B, C, h P, w P) -> (B, h w, D)

    Unit magnitude where that of the pixels is: for noise, and for pictures of unit variance."""
    def __init__(self, C: int, P: int, D: int, preserve: tuple[str, ...] = FULL) -> None:
        super().__init__()
        self.P = P
        self.proj = linear_of(preserve)(P * P * C + 1, D)

    def forward(self, x: Tensor) -> Tensor:
        x = patchify(x, self.P)                                                 # (B, h w, C P P)
        return self.proj(torch.cat([x, torch.ones_like(x[..., :1])], dim=-1))


class MPFinalLayer(nn.Module):
    """[MAG] steered, then one layer to patches whose gain is zero at first. (B, h w, D) -> (B, C, h P, w P)"""
    def __init__(self, D: int, P: int, C: int, parts: tuple[str, ...] = ADALN,
                 preserve: tuple[str, ...] = FULL) -> None:
        super().__init__()
        self.P, self.norm = P, as_is if "stream" in preserve else norm
        self.modulation = Modulation(D, ungated(parts), preserve)
        self.linear = linear_of(preserve)(D, P * P * C, gain=0.0)

    def forward(self, x: Tensor, c: Tensor, h: int, w: int) -> Tensor:
        return unpatchify(self.linear(steer(self.norm(x), self.modulation(c))), self.P, h, w)


# ---------------------------------------------------------------- blocks

class MPDiTBlock(nn.Module):
    """[MAG] DiTBlock's twin: x <- mp_sum(x, (1 + gate) attn(R (x (1 + scale) + shift))), the same with the MLP."""
    def __init__(self, D: int, H: int, last: bool, parts: tuple[str, ...] = ADALN,
                 preserve: tuple[str, ...] = FULL) -> None:
        super().__init__()
        self.norm, self.add = (as_is, mp_gated_sum) if "stream" in preserve else (norm, gated_sum)
        self.attn = MPAttention(D, H, preserve)
        self.mlp = MPMLP(D, MLP_RATIO * D, D, preserve)
        self.attn_modulation = Modulation(D, parts, preserve)
        self.mlp_modulation = Modulation(D, parts, preserve)

    def forward(self, x: Tensor, ctx: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, m = self.attn_modulation(c), self.mlp_modulation(c)
        x = self.add(x, a, self.attn(steer(self.norm(x), a)))
        return self.add(x, m, self.mlp(steer(self.norm(x), m))), ctx


class MPMMDiTBlock(nn.Module):
    """MMDiTBlock's twin: MPDiTBlock with joint cosine attention. Context is changed by attention alone, in mp_sum.

    It has every change but heads, which `preserve` may add."""
    def __init__(self, D: int, H: int, last: bool, parts: tuple[str, ...] = ADALN,
                 preserve: tuple[str, ...] = FULL) -> None:
        super().__init__()
        self.last = last
        self.attn = MPJointAttention(D, H, last, preserve)
        self.mlp = MPMLP(D, MLP_RATIO * D, D, preserve)
        self.attn_modulation = Modulation(D, parts, preserve)
        self.mlp_modulation = Modulation(D, parts, preserve)

    def forward(self, x: Tensor, ctx: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, m = self.attn_modulation(c), self.mlp_modulation(c)
        out, out_ctx = self.attn(steer(x, a), ctx)
        x = mp_gated_sum(x, a, out)
        x = mp_gated_sum(x, m, self.mlp(steer(x, m)))
        return x, ctx if self.last else mp_sum(ctx, out_ctx, RESIDUAL)
