"""Blocks and their parts against direct formulas.

No two sizes are equal: B 4, C 3, P 2, h 6, w 9, N 54, L 7, D 40, H 5, d 8.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import layers
import model

B, C, P, h, w, L, D, H = 4, 3, 2, 6, 9, 7, 40, 5
EVERY = ("shift", "scale", "rotate", "gate")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- parts

@pytest.mark.parametrize("n, m", [(6, 9), (9, 6), (3, layers.MAX_TOKENS_EXPLICIT_ATTENTION + 1)])
def test_attention_is_the_softmax_formula(n, m):
    q, k, v = normal(B, H, n, 8), normal(B, H, m, 8, seed=1), normal(B, H, m, 8, seed=2)
    weight = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double() / math.sqrt(8)).exp()
    exact = torch.einsum("bhnm,bhmd->bnhd", weight / weight.sum(-1, keepdim=True), v.double()).reshape(B, n, H * 8)
    assert torch.allclose(layers.attention(q, k, v).double(), exact, atol=1e-5)
    half = layers.attention(*(x.bfloat16() for x in (q, k, v)))
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).square().mean().sqrt() < 0.01 * exact.square().mean().sqrt() * math.sqrt(m) ** 0.5


def test_split_heads_gives_each_head_its_own_columns():
    n, tokens = 3, 4
    x = torch.arange(2 * tokens * n * D).view(2, tokens, n * D)
    q, k, v = layers.split_heads(x, n, H)
    for part, got in enumerate((q, k, v)):
        assert got.shape == (2, H, tokens, 8)
        for head in range(H):
            start = part * D + head * 8
            assert torch.equal(got[:, head], x[..., start:start + 8])


def test_norm_is_layer_norm_without_weights_in_fp32():
    x = normal(2, 5, D) * 30 + 7
    std = (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(layers.norm(x), (x - x.mean(-1, True)) / std, atol=1e-5)
    error = layers.norm(x.bfloat16()).float() - layers.norm(x.bfloat16().float())
    assert error.abs().max() < 0.016                        # rounding of the result alone


def test_rms_norm_divides_by_the_rms_and_has_a_gain():
    norm = layers.RMSNorm(8)
    nn.init.normal_(norm.weight)
    x = normal(2, H, 6, 8) * 30
    assert torch.allclose(norm(x), x / x.square().mean(-1, True).sqrt() * norm.weight, atol=1e-5)


def test_patch_embed_is_a_strided_convolution():
    embed, x = layers.PatchEmbed(C, P, D), normal(B, C, h * P, w * P)
    direct = F.conv2d(x, embed.proj.weight, embed.proj.bias, stride=P)          # (B, D, h, w)
    assert torch.allclose(embed(x), direct.flatten(2).transpose(1, 2), atol=1e-5)


def test_final_layer_puts_pixels_where_the_official_code_does():
    """Official DiT: reshape to (n, h, w, p, q, c), then einsum nhwpqc -> nchpwq."""
    last = layers.FinalLayer(D, P, C)
    x, c = normal(B, h * w, D), normal(B, D, seed=1)
    shift, scale = last.adaLN_modulation(c)[:, None].chunk(2, dim=2)
    tokens = last.linear(F.layer_norm(x, (D,), eps=1e-6) * (1 + scale) + shift)
    direct = torch.einsum("nhwpqc->nchpwq", tokens.reshape(B, h, w, P, P, C)).reshape(B, C, h * P, w * P)
    assert torch.allclose(last(x, c, h, w), direct, atol=1e-5)


def test_patches_taken_apart_and_put_together_are_the_image():
    """With identities for both linear layers, up to the order in a patch: (C, P, P) going in, (P, P, C) coming out."""
    width = C * P * P
    embed, last = layers.PatchEmbed(C, P, width), layers.FinalLayer(width, P, C)
    order = torch.arange(width).view(C, P, P).permute(1, 2, 0).flatten()
    embed.proj.weight.data = torch.eye(width).view(width, C, P, P)
    embed.proj.bias.data.zero_()
    last.linear.weight.data, last.linear.bias.data = torch.eye(width)[order], torch.zeros(width)
    last.adaLN_modulation[1].weight.data.zero_()
    last.adaLN_modulation[1].bias.data.zero_()
    x = normal(B, C, h * P, w * P)
    tokens = embed(x)
    mean, std = tokens.mean(-1, True), (tokens.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    back = last(tokens, normal(B, width), h, w)             # normalised a patch at a time
    grid = lambda v: v.view(B, 1, h, w).repeat_interleave(P, 2).repeat_interleave(P, 3)
    assert torch.allclose(back * grid(std) + grid(mean), x, atol=1e-5)


def test_dit_block_is_the_formula_of_the_paper():
    block = model.DiTBlock(D, H, False)
    x, c = normal(B, 6, D), normal(B, D, seed=1)
    s1, g1, a1, s2, g2, a2 = block.adaLN_modulation[1](F.silu(c))[:, None].chunk(6, dim=2)
    plain = lambda v: F.layer_norm(v, (D,), eps=1e-6)
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


def test_joint_attention_lets_image_and_context_see_each_other():
    attn = layers.JointAttention(D, H, False)
    x, ctx = normal(B, 6, D), normal(B, L, D, seed=1)
    a, a_ctx = attn(x, ctx)
    assert a.shape == (B, 6, D) and a_ctx.shape == (B, L, D)
    heads = lambda v, parts: v.unflatten(-1, (parts, H, 8)).permute(2, 0, 3, 1, 4)
    q, k, v = (torch.cat(two, 2) for two in zip(heads(attn.ctx_qkv(ctx), 3), heads(attn.qkv(x), 3)))
    rms = lambda v: v / v.square().mean(-1, True).sqrt()
    joint = ((rms(q) @ rms(k).mT) / math.sqrt(8)).softmax(-1) @ v
    assert torch.allclose(torch.cat([a_ctx, a], 1), attn.proj(joint.transpose(1, 2).flatten(2)), atol=1e-5)


# ---------------------------------------------------------------- blocks

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
