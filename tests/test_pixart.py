"""PixArt-alpha in model.py: its block by hand and against diffusers, its shared modulation, its size and cost.

No two sizes are equal: B 4, C 3, P 2, h 6, w 9, N 54, L 7, E 11, D 40, H 5, d 8, training grid 12.
"""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
from conditioning import Condition
from config import ModelConfig, UserError
from experiments import tables
from layers import CrossAttention

B, C, P, h, w, L, E, D, H, classes = 4, 3, 2, 6, 9, 7, 11, 40, 5, 10
TEXT = ModelConfig(arch="pixart", semantics="text", text_dim=E, text_length=L, width=D, depth=3, heads=H, patch=P,
                   channels=C, resolution=24)
CLASS = replace(TEXT, semantics="class", classes=classes)
XL2 = replace(tables.XL2, arch="pixart", controls="crop+flip+size")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(module):
    """Every parameter random, so that everything acts and no two gains are alike."""
    for k, p in enumerate(module.parameters()):
        nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(k))
    return module


def build(cfg, random=True):
    torch.manual_seed(0)
    net = model.build(cfg)
    return randomize(net) if random else net


def inputs(cfg):
    cond = Condition(text=normal(B, L, E, seed=1)) if cfg.semantics == "text" else \
        Condition(label=torch.tensor([0, 9, -1, 4]))
    return normal(B, C, h * P, w * P), torch.tensor([0.0, 25.0, 500.0, 999.0]), cond


def plain(v):
    return F.layer_norm(v, (D,), eps=1e-6)


def heads(v, parts):
    return v.unflatten(-1, (parts, H, D // H)).permute(2, 0, 3, 1, 4)


def rms(v, norm):
    return v / v.square().mean(-1, True).sqrt() * norm.weight


def softmax_attention(q, k, v):
    return (q @ k.mT / math.sqrt(D // H)).softmax(-1).matmul(v).transpose(1, 2).flatten(2)


# ---------------------------------------------------------------- block

@pytest.mark.parametrize("one", [False, True])
def test_the_block_is_dit_s_with_cross_attention_without_norm_modulation_or_gate(one):
    block = randomize(model.PixArtBlock(D, H, False, one=one))
    x, ctx, t = normal(B, 6, D), normal(B, 1 if one else L, D, seed=1), normal(B, 6 * D, seed=2)
    b1, s1, g1, b2, s2, g2 = (t + block.table)[:, None].split(D, dim=2)
    q, k, v = heads(block.attn.qkv((1 + s1) * plain(x) + b1), 3)
    y = x + g1 * block.attn.proj(softmax_attention(rms(q, block.attn.q_norm), rms(k, block.attn.k_norm), v))
    cross = block.cross_attn
    if one:
        y = y + cross.proj(cross.v(ctx))
    else:
        (q,), (k, v) = heads(cross.q(y), 1), heads(cross.kv(ctx), 2)
        y = y + cross.proj(softmax_attention(rms(q, cross.q_norm), rms(k, cross.k_norm), v))
    y = y + g2 * block.mlp((1 + s2) * plain(y) + b2)
    out, ctx_out = block(x, ctx, t)
    assert torch.allclose(out, y, atol=1e-4) and ctx_out is ctx


def test_attention_to_one_token_does_not_depend_on_the_query_so_it_has_no_q_and_k():
    full, one = randomize(CrossAttention(D, H, False)), CrossAttention(D, H, True)
    x, ctx = normal(B, 6, D), normal(B, 1, D)
    one.proj.load_state_dict(full.proj.state_dict())
    one.v.weight.data, one.v.bias.data = full.kv.weight[D:].detach(), full.kv.bias[D:].detach()
    assert torch.allclose(full(x, ctx), one(x, ctx).expand(B, 6, D), atol=1e-5)
    assert torch.allclose(full(normal(B, 6, D, seed=5), ctx), full(x, ctx), atol=1e-5)
    assert {n for n, _ in one.named_children()} == {"v", "proj"}


def test_a_network_with_one_context_token_has_no_q_and_k():
    q = lambda cfg: [n for n in model.build(cfg).state_dict() if "cross_attn.q" in n or "cross_attn.k" in n]
    assert not q(CLASS) and not q(replace(TEXT, semantics="none")) and not q(replace(TEXT, text_length=1))
    assert len(q(TEXT)) == 3 * 6


@torch.no_grad()
def test_the_block_equals_diffusers():
    """Their block has no norm of q and k, so ours goes without too; their modulation is table plus t0, as ours."""
    attention = pytest.importorskip("diffusers.models.attention", reason="needs pip install diffusers")
    ours = randomize(model.PixArtBlock(D, H, False))
    for module in (ours.attn, ours.cross_attn):
        module.q_norm = module.k_norm = nn.Identity()
    theirs = attention.BasicTransformerBlock(D, H, D // H, cross_attention_dim=D, attention_bias=True,
                                             activation_fn="gelu-approximate", norm_type="ada_norm_single",
                                             norm_elementwise_affine=False, norm_eps=1e-6)
    state = {"scale_shift_table": ours.table.view(6, D)}
    for name, layer, targets in (("attn1", ours.attn.qkv, "qkv"), ("attn2", ours.cross_attn.q, "q"),
                                 ("attn2", ours.cross_attn.kv, "kv")):
        for kind in ("weight", "bias"):
            state |= {f"{name}.to_{k}.{kind}": part for k, part in
                      zip(targets, getattr(layer, kind).chunk(len(targets)))}
    for name, layer in (("attn1.to_out.0", ours.attn.proj), ("attn2.to_out.0", ours.cross_attn.proj),
                        ("ff.net.0.proj", ours.mlp.fc1), ("ff.net.2", ours.mlp.fc2)):
        state |= {f"{name}.{kind}": getattr(layer, kind) for kind in ("weight", "bias")}
    theirs.load_state_dict(state)
    x, ctx, t = normal(B, 13, D), normal(B, L, D, seed=1), normal(B, 6 * D, seed=2)
    out = theirs(x, encoder_hidden_states=ctx, timestep=t)
    torch.testing.assert_close(ours(x, ctx, t)[0], out, atol=1e-4, rtol=1e-4)
    assert (out - x).abs().max() > 0.1


# ---------------------------------------------------------------- network

def test_one_modulation_is_computed_once_a_forward_pass_and_read_by_every_block():
    net, (x, i, cond), calls, read = build(TEXT), inputs(TEXT), [], []
    net.shared_modulation.register_forward_hook(lambda layer, args, out: calls.append((args[0], out)))
    for block in net.blocks:
        block.register_forward_pre_hook(lambda block, args: read.append(args[2]))
    net(x, i, cond)
    (c, t0), = calls
    assert torch.equal(t0, net.shared_modulation[1](F.silu(c))) and t0.shape == (B, 6 * D)
    assert len(read) == 3 and all(t is t0 for t in read)


def test_the_table_of_a_block_changes_that_block_alone():
    net, (x, i, cond) = build(TEXT), inputs(TEXT)
    ctx, t0 = net.embed_condition(i, cond)[1], normal(B, 6 * D, seed=3)
    tokens = normal(B, 6, D)
    before = [block(tokens, ctx, t0)[0] for block in net.blocks]
    net.blocks[1].table.data += 1
    same = [torch.equal(block(tokens, ctx, t0)[0], b) for block, b in zip(net.blocks, before)]
    assert same == [True, False, True]


def test_the_last_layer_adds_c_itself_to_its_table():
    last = randomize(model.PixArtFinalLayer(D, P, C))
    x, c = normal(B, h * w, D), normal(B, D, seed=1)
    shift, scale = last.table.split(D)
    tokens = last.linear(plain(x) * (1 + (c + scale)[:, None]) + (c + shift)[:, None])
    exact = torch.einsum("nhwpqc->nchpwq", tokens.reshape(B, h, w, P, P, C)).reshape(B, C, h * P, w * P)
    assert torch.allclose(last(x, c, h, w), exact, atol=1e-4)


@pytest.mark.parametrize("cfg", [TEXT, CLASS], ids=["text", "class"])
def test_gates_are_not_zero_at_first_and_yet_eps_is(cfg):
    net, (x, i, cond) = build(replace(cfg, width=400), random=False), inputs(cfg)
    tables_at_first = [block.table for block in net.blocks] + [net.final_layer.table]
    for table in tables_at_first:
        assert table.std().item() == pytest.approx(1 / 20, rel=0.1)
    assert net.shared_modulation[1].weight.std().item() == pytest.approx(0.02, rel=0.02)
    tokens = []
    net.blocks[0].register_forward_hook(lambda block, args, out: tokens.append((args[0], out[0])))
    assert (net(x, i, cond) == 0).all()
    (before, after), = tokens
    assert (after - before).abs().max() > 0.01              # the block acts
    assert not any(p.any() for block in net.blocks for p in block.cross_attn.proj.parameters())


def test_rotation_is_refused():
    with pytest.raises(UserError, match="model.modulation='scale.rotate.gate'.*shift, scale and gate"):
        model.build(replace(TEXT, modulation="scale+rotate+gate"))


@pytest.mark.parametrize("modulation", ["scale", "shift+gate"])
def test_other_parts_modulate_alone_and_every_weight_learns(modulation):
    cfg = replace(CLASS, modulation=modulation)
    net, (x, i, cond) = build(cfg), inputs(cfg)
    assert (build(cfg, random=False)(x, i, cond) == 0).all()
    (net(x, i, cond) - normal(*x.shape, seed=9)).square().mean().backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]


# ---------------------------------------------------------------- size and cost, [COND] table A1

class PublishedBlock(model.PixArtBlock):
    """Has q and k in every cross-attention, which the paper counts also where a class is the one token."""
    def __init__(self, D, H, last, parts, one):
        super().__init__(D, H, last, parts, one=False)


@pytest.mark.parametrize("semantics, count", [("class", 611_698_192), ("text", 610_102_672)])
def test_parameters_are_those_of_the_closed_form_to_the_last_digit(semantics, count, monkeypatch):
    """One control MLP of six scalars, as in the paper, and without the gains of RMSNorm: 4 d a block."""
    monkeypatch.setattr(model, "PixArtBlock", PublishedBlock)
    cfg = replace(XL2, semantics=semantics, controls="")
    gains = 28 * 4 * (1152 // 16)
    assert tables.parameters(cfg) - gains + tables.control_parameters(6, 1152) == count
    assert count / 1e6 == pytest.approx({"class": 611.7, "text": 610.12}[semantics], abs=0.02)


def test_a_class_saves_q_and_k_of_every_cross_attention(monkeypatch):
    ours = tables.parameters(replace(XL2, semantics="class"))
    monkeypatch.setattr(model, "PixArtBlock", PublishedBlock)
    assert tables.parameters(replace(XL2, semantics="class")) - ours == 28 * (2 * 1152 * 1153 + 2 * 72)


@pytest.mark.slow
@pytest.mark.parametrize("changes, gflop", [(dict(semantics="class"), 275.04), (dict(semantics="text"), 322.49),
                                            (dict(semantics="text", text_length=77), 289.18)])
def test_flops_are_those_of_the_closed_form(changes, gflop, monkeypatch):
    """A pass through control MLPs of six scalars costs 2 (256 6 D + D^2), ours of two groups D^2 more."""
    monkeypatch.setattr(model, "PixArtBlock", PublishedBlock)
    cfg, D = replace(XL2, **changes), 1152
    assert (model.flops.__wrapped__(cfg) - 2 * D * D) / 1e9 == pytest.approx(gflop, abs=0.005)     # past the cache
