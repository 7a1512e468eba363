"""Attention, norms and patches against direct formulas.

No two sizes are equal: B 4, C 3, P 2, h 6, w 9, N 54, L 7, D 40, H 5, d 8.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import layers

B, C, P, h, w, L, D, H = 4, 3, 2, 6, 9, 7, 40, 5


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
