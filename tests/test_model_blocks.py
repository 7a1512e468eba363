"""The plain blocks of model.py against direct formulas.

No two sizes are equal: B 4, L 7, D 40, H 5, d 8, 6 image tokens.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model

B, L, D, H = 4, 7, 40, 5
EVERY = ("shift", "scale", "rotate", "gate")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(v):
    return F.layer_norm(v, (D,), eps=1e-6)


def heads(v, parts):
    return v.unflatten(-1, (parts, H, 8)).permute(2, 0, 3, 1, 4)


def rms(v, norm):
    return v / v.square().mean(-1, True).sqrt() * norm.weight


def softmax_attention(q, k, v):
    return ((q @ k.mT) / math.sqrt(8)).softmax(-1).matmul(v).transpose(1, 2).flatten(2)


def made(Block, last):
    """A block in which no two gains are alike, and x, ctx, c."""
    torch.manual_seed(0)
    block = Block(D, H, last)
    for name, p in block.named_parameters():
        if "norm" in name:
            nn.init.uniform_(p, 0.5, 2)
    return block, normal(B, 6, D), normal(B, L, D, seed=1), normal(B, D, seed=2)


def test_dit_block_is_the_formula_of_the_paper():
    block = model.DiTBlock(D, H, False)
    x, c = normal(B, 6, D), normal(B, D, seed=1)
    s1, g1, a1, s2, g2, a2 = block.adaLN_modulation[1](F.silu(c))[:, None].chunk(6, dim=2)
    y = x + a1 * block.attn(plain(x) * (1 + g1) + s1)
    y = y + a2 * block.mlp(plain(y) * (1 + g2) + s2)
    out, ctx = block(x, None, c)
    assert torch.allclose(out, y, atol=1e-5) and ctx is None


@pytest.mark.parametrize("parts", [("scale", "gate"), ("rotate",), ("shift", "rotate", "gate"), EVERY], ids="+".join)
def test_a_dit_block_with_other_parts_scales_then_shifts_then_rotates_and_gates_after(parts):
    block = model.DiTBlock(D, H, False, parts)
    x, c = normal(B, 6, D), normal(B, D, seed=1)
    sizes = [D // 2 if part == "rotate" else D for part in parts]
    m = block.adaLN_modulation[1](F.silu(c))[:, None].split(2 * sizes, dim=2)
    groups = [dict(zip(parts, m[:len(parts)])), dict(zip(parts, m[len(parts):]))]
    y = x
    for m, layer in zip(groups, (block.attn, block.mlp)):
        z = F.layer_norm(y, (D,), eps=1e-6) * (1 + m.get("scale", 0)) + m.get("shift", 0)
        if "rotate" in m:
            turn = torch.polar(torch.ones_like(m["rotate"]), m["rotate"])
            z = torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        y = y + m.get("gate", 1) * layer(z)
    assert torch.allclose(block(x, None, c)[0], y, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_dit_by_attention_is_dit_on_image_and_class_tokens_under_the_same_weights(last):
    block, x, ctx, c = made(model.DiTAttBlock, last)
    m = block.adaLN_modulation[1](F.silu(c))[:, None].split(D, dim=2)           # shift, scale, gate three times
    assert len(m) == (8 if last else 9)
    tokens = torch.cat([plain(x) * (1 + m[1]) + m[0], plain(ctx) * (1 + m[7]) + m[6]], 1)  # order does not matter
    q, k, v = heads(block.attn.qkv(tokens), 3)
    a = block.attn.proj(softmax_attention(rms(q, block.attn.q_norm), rms(k, block.attn.k_norm), v))
    y = x + m[2] * a[:, :6]
    y = y + m[5] * block.mlp(plain(y) * (1 + m[4]) + m[3])
    out, ctx_out = block(x, ctx, c)
    assert torch.allclose(out, y, atol=1e-5)
    assert torch.allclose(ctx_out, ctx if last else ctx + m[8] * a[:, 6:], atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_mmdit_block_is_dit_with_joint_attention_and_context_changed_by_attention_alone(last):
    block, x, ctx, c = made(model.MMDiTBlock, last)
    m = block.adaLN_modulation[1](F.silu(c))[:, None].split(D, dim=2)
    a, a_ctx = block.attn(plain(x) * (1 + m[1]) + m[0], plain(ctx))
    y = x + m[2] * a
    y = y + m[5] * block.mlp(plain(y) * (1 + m[4]) + m[3])
    out, ctx_out = block(x, ctx, c)
    assert torch.allclose(out, y, atol=1e-5)
    assert torch.allclose(ctx_out, ctx if last else ctx + a_ctx, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_sd3_block_is_two_dit_blocks_that_share_attention(last):
    block, x, ctx, c = made(model.SD3Block, last)
    attn = block.attn
    m = block.adaLN_modulation[1](F.silu(c))[:, None].split(D, dim=2)
    n = block.ctx_adaLN_modulation[1](F.silu(c))[:, None].split(D, dim=2)
    q, k, v = heads(attn.qkv(plain(x) * (1 + m[1]) + m[0]), 3)
    *q_ctx, k_ctx, v_ctx = heads(attn.ctx_qkv(plain(ctx) * (1 + n[1]) + n[0]), 2 if last else 3)
    k, v = torch.cat([rms(k, attn.k_norm), rms(k_ctx, attn.ctx_k_norm)], 2), torch.cat([v, v_ctx], 2)
    y = x + m[2] * attn.proj(softmax_attention(rms(q, attn.q_norm), k, v))
    y = y + m[5] * block.mlp(plain(y) * (1 + m[4]) + m[3])
    z = ctx
    if not last:
        z = z + n[2] * attn.ctx_proj(softmax_attention(rms(*q_ctx, attn.ctx_q_norm), k, v))
        z = z + n[5] * block.ctx_mlp(plain(z) * (1 + n[4]) + n[3])
    out, ctx_out = block(x, ctx, c)
    assert torch.allclose(out, y, atol=1e-5) and torch.allclose(ctx_out, z, atol=1e-5)
    assert last or (ctx_out - ctx).abs().max() > 0.1
