"""The magnitude-preserving blocks and trunks against direct formulas, their invariants, the ladder and its configs.

No two sizes are equal: B 4, C 3, P 2, h 6, w 9, N 54, L 7, E 11, D 40, H 5, d 8, training grid 12.
"""
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import layers
import model
import mp_layers
from conditioning import Condition, LabelEmbedder, MPTimestepEmbedder, TextContext, control_weight, sincos_2d
from config import Config, ModelConfig, UserError, load
from experiments import tables

B, C, P, h, w, L, E, D, H, classes = 4, 3, 2, 6, 9, 7, 11, 40, 5, 10
BASE = ModelConfig(arch="mpdit", semantics="class", classes=classes, width=D, depth=2, heads=H, patch=P, channels=C,
                   resolution=24)
TEXT = replace(BASE, arch="mpmmdit", semantics="text", text_dim=E, text_length=L)
LADDER = {"a": "none", "b": "cosine", "c": "cosine+weights", "e": "cosine+weights+stream"}
ALL = ("shift", "scale", "rotate", "gate")
MAG = dict(semantics="class", classes=1000, resolution=16, channels=4)


def normal(*shape, seed=10):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random(net):
    """Draw what starts at zero, so that everything acts."""
    for k, p in enumerate(net.parameters()):
        if not p.detach().any():
            nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(k))
    return net


def build(cfg, acting=True):
    torch.manual_seed(0)
    net = model.build(cfg)
    return random(net) if acting else net


def inputs(cfg=BASE):
    table = {"class": dict(label=torch.tensor([0, 9, -1, 4])), "text": dict(text=normal(B, L, E, seed=1)), "none": {}}
    cond = Condition(**table[cfg.semantics])
    return normal(B, cfg.channels, h * P, w * P), torch.tensor([0.0, 25.0, 500.0, 999.0]), cond


def unit(x):
    return math.sqrt(x.shape[-1]) * x / (x.norm(dim=-1, keepdim=True) + 1e-4)


def weight(layer):
    """The matrix that an MPLinear applies."""
    v = layer.weight / (layer.weight.norm(dim=1, keepdim=True) + 1e-4)
    return v if layer.gain is None else v * layer.gain


def heads(x, n):
    return x.unflatten(-1, (n, H, -1)).permute(2, 0, 3, 1, 4)


def softmax_attention(q, k, v):
    p = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (p @ v).transpose(1, 2).flatten(2)


# ---------------------------------------------------------------- attention

def test_attention_is_that_of_directions():
    torch.manual_seed(0)
    attn, x = mp_layers.MPAttention(D, H), normal(B, 6, D)
    q, k, v = heads(x @ weight(attn.qkv).T, 3)
    exact = softmax_attention(unit(q), unit(k), v) @ weight(attn.proj).T
    assert torch.allclose(attn(x), exact, atol=1e-5)
    plain = softmax_attention(q, k, v) @ weight(attn.proj).T
    attn = attn.__class__(D, H, ("weights",))
    attn.load_state_dict({n: p for n, p in attn.state_dict().items()})
    q, k, v = heads(x @ weight(attn.qkv).T, 3)
    assert torch.allclose(attn(x), softmax_attention(q, k, v) @ weight(attn.proj).T, atol=1e-5)
    assert (plain - exact).abs().max() > 1e-3


@pytest.mark.parametrize("joint", [False, True])
def test_logits_are_cosines_of_at_most_sqrt_d_and_do_not_follow_the_length_of_tokens(joint, monkeypatch):
    seen = []
    monkeypatch.setattr(mp_layers, "attention", lambda q, k, v: seen.append((q, k)) or layers.attention(q, k, v))
    torch.manual_seed(0)
    x, ctx = normal(B, 6, D), normal(B, L, D, seed=1)
    net = mp_layers.MPJointAttention(D, H, False) if joint else mp_layers.MPAttention(D, H)
    for scale in (1, 50):
        net(scale * x, scale * ctx) if joint else net(scale * x)
    (q, k), (q_long, k_long) = seen
    logits = q @ k.transpose(-1, -2) / math.sqrt(D // H)
    assert logits.abs().max() <= math.sqrt(D // H) + 1e-5 and logits.std() > 0.5
    assert torch.allclose(q_long @ k_long.transpose(-1, -2) / math.sqrt(D // H), logits, atol=1e-3)


@pytest.mark.parametrize("T, expected", [(4, 0.626), (16, 0.365), (64, 0.197), (256, 0.102)])
def test_attention_averages_by_its_squared_weights(T, expected):
    """M[out] = sqrt(E sum p^2) for independent tokens; of one sequence all outputs share the v, so S values count."""
    S, d = 24, 64
    q, k, v = (normal(S, 1, T, d, seed=s) for s in (1, 2, 3))
    out = layers.attention(mp_layers.normalize(q), mp_layers.normalize(k), v)
    p = (mp_layers.normalize(q) @ mp_layers.normalize(k).transpose(-1, -2) / math.sqrt(d)).softmax(-1)
    spread = p.square().sum(-1).mean().sqrt().item()
    assert mp_layers.magnitude(out).item() == pytest.approx(spread, rel=5 / math.sqrt(2 * S * d))
    assert spread == pytest.approx(expected, rel=0.06)      # the notes average over other draws
    assert mp_layers.magnitude(mp_layers.normalize_heads(out, 1)).item() == pytest.approx(1, abs=0.002)


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_attention_of_correlated_tokens_averages_less_and_the_squared_weights_no_longer_say_how_much(rho):
    """Out is sqrt(rho) u + sqrt(1-rho) sum_j p_j v_j. Divided by sqrt(sum p^2) it would be several times too long."""
    S, T, d = 24, 64, 64
    q, k, own, shared = normal(S, 1, T, d, seed=1), normal(S, 1, T, d, seed=2), normal(S, 1, T, d, seed=3), \
        normal(S, 1, 1, d, seed=4)
    v = math.sqrt(rho) * shared + math.sqrt(1 - rho) * own
    p = (mp_layers.normalize(q) @ mp_layers.normalize(k).transpose(-1, -2) / math.sqrt(d)).softmax(-1)
    s = p.square().sum(-1).mean().item()
    out = layers.attention(mp_layers.normalize(q), mp_layers.normalize(k), v)
    assert mp_layers.magnitude(out).item() == pytest.approx(math.sqrt(rho + (1 - rho) * s), rel=5 / math.sqrt(2 * S * d))
    assert mp_layers.magnitude(out).item() / math.sqrt(s) > 3
    assert mp_layers.magnitude(mp_layers.normalize_heads(out, 1)).item() == pytest.approx(1, abs=0.002)


def test_heads_are_normalised_one_by_one_before_the_projection():
    torch.manual_seed(0)
    mp = ("cosine", "weights", "stream", "heads")
    attn, x = mp_layers.MPAttention(D, H, mp), normal(B, 6, D)
    q, k, v = heads(x @ weight(attn.qkv).T, 3)
    a = softmax_attention(unit(q), unit(k), v).unflatten(-1, (H, -1))
    assert torch.allclose(attn(x), unit(a).flatten(-2) @ weight(attn.proj).T, atol=1e-5)
    joint, ctx = mp_layers.MPJointAttention(D, H, False, mp), normal(B, L, D, seed=1)
    joint.proj.weight.data = torch.eye(D)
    both = torch.cat(joint(x, ctx), 1).unflatten(-1, (H, -1)) * math.sqrt(D)
    assert torch.allclose(both.square().mean(-1).sqrt(), torch.tensor(math.sqrt(D)), rtol=1e-3)


@pytest.mark.parametrize("last", [False, True])
def test_joint_attention_is_the_formula(last):
    torch.manual_seed(0)
    attn, x, ctx = mp_layers.MPJointAttention(D, H, last), normal(B, 6, D), normal(B, L, D, seed=1)
    q, k, v = heads(x @ weight(attn.qkv).T, 3)
    *q_ctx, k_ctx, v_ctx = heads(ctx @ weight(attn.ctx_qkv).T, 2 if last else 3)
    k, v = torch.cat([unit(k), unit(k_ctx)], 2), torch.cat([v, v_ctx], 2)
    out, out_ctx = attn(x, ctx)
    assert torch.allclose(out, softmax_attention(unit(q), k, v) @ weight(attn.proj).T, atol=1e-5)
    assert (out_ctx is None) == last
    if not last:
        assert torch.allclose(out_ctx, softmax_attention(unit(*q_ctx), k, v) @ weight(attn.proj).T, atol=1e-5)


# ---------------------------------------------------------------- blocks

def modulated(x, m):
    y = x * (1 + m["scale"]) + m["shift"]
    turn, (a, b) = m["rotate"], (y[..., ::2], y[..., 1::2])
    return torch.stack([a * turn.cos() - b * turn.sin(), a * turn.sin() + b * turn.cos()], -1).flatten(-2)


def blend(x, branch, t=0.3):
    return ((1 - t) * x + t * branch) / math.sqrt((1 - t) ** 2 + t ** 2)


def test_mp_dit_block_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    block, x, c = random(model.MPDiTBlock(D, H, False, ALL)), normal(B, 6, D), normal(B, D, seed=1)
    a, m = ({k: (F.silu(c) / 0.5964692 @ weight(layer).T)[:, None] for k, layer in part.layers.items()}
            for part in (block.attn_modulation, block.mlp_modulation))
    y = blend(x, (1 + a["gate"]) * block.attn(modulated(x, a)))
    y = blend(y, (1 + m["gate"]) * block.mlp(modulated(y, m)))
    out, ctx = block(x, None, c)
    assert ctx is None and torch.allclose(out, y, atol=1e-4)


@pytest.mark.parametrize("mp", [(), ("cosine",), ("cosine", "weights")])
def test_without_stream_the_block_is_dit_s(mp):
    """LayerNorm, plain sums, a gate of zero at first; SiLU and no biases, as in the ladder of the paper."""
    torch.manual_seed(0)
    block, x, c = model.MPDiTBlock(D, H, False, ALL, mp), normal(B, 6, D), normal(B, D, seed=1)
    assert torch.equal(block(x, None, c)[0], x)
    a, m = random(block).attn_modulation(c), block.mlp_modulation(c)
    layer = block.attn_modulation.layers["scale"]
    matrix = weight(layer) if "weights" in mp else layer.weight
    assert torch.allclose(a["scale"][:, 0], F.silu(c) @ matrix.T, atol=1e-5)
    plain = lambda v: F.layer_norm(v, (D,), eps=1e-6)
    y = x + a["gate"] * block.attn(modulated(plain(x), a))
    y = y + m["gate"] * block.mlp.fc2(F.silu(block.mlp.fc1(modulated(plain(y), m))))
    assert torch.allclose(block(x, None, c)[0], y, atol=1e-4)


@pytest.mark.parametrize("last", [False, True])
def test_mp_mmdit_block_is_the_formula(last):
    torch.manual_seed(0)
    block = random(model.MPMMDiTBlock(D, H, last, ALL))
    x, ctx, c = normal(B, 6, D), normal(B, L, D, seed=2), normal(B, D, seed=1)
    a, m = block.attn_modulation(c), block.mlp_modulation(c)
    out, out_ctx = block.attn(modulated(x, a), ctx)
    y = blend(x, (1 + a["gate"]) * out)
    y = blend(y, (1 + m["gate"]) * block.mlp(modulated(y, m)))
    got, got_ctx = block(x, ctx, c)
    assert torch.allclose(got, y, atol=1e-4)
    assert got_ctx is ctx if last else torch.allclose(got_ctx, blend(ctx, out_ctx), atol=1e-5)


@pytest.mark.parametrize("depth, left", [(6, 0.3636), (12, 0.1322)])
def test_the_trunk_shrinks_by_its_weight_where_branches_are_dead(depth, left):
    """0.919145^(2 depth): what a zero gate did at first in the code of the paper; here a gate is 1 + g."""
    torch.manual_seed(0)
    x, c = normal(B, 6, D), normal(B, D, seed=1)
    y = x
    for _ in range(depth):
        block = model.MPDiTBlock(D, H, False)
        block.attn.proj.weight.data.zero_()
        block.mlp.fc2.weight.data.zero_()
        y, _ = block(y, None, c)
    assert torch.allclose(y, 0.9191450 ** (2 * depth) * x, atol=1e-5)
    assert 0.9191450 ** (2 * depth) == pytest.approx(left, abs=1e-4)


def test_ends_of_the_trunk_are_their_formulas():
    torch.manual_seed(0)
    embed, x = mp_layers.MPPatchEmbed(C, P, D), normal(B, C, h * P, w * P)
    assert embed.proj.weight.shape == (D, P * P * C + 1)
    kernel = weight(embed.proj)
    direct = F.conv2d(x, kernel[:, :-1].view(D, C, P, P), stride=P) + kernel[:, -1, None, None]
    assert torch.allclose(embed(x), direct.flatten(2).transpose(1, 2), atol=1e-5)
    tokens, c = normal(B, h * w, D), normal(B, D, seed=1)
    for mp, before in ((mp_layers.FULL, lambda v: v), (("weights",), lambda v: F.layer_norm(v, (D,), eps=1e-6))):
        last = random(mp_layers.MPFinalLayer(D, P, C, ALL, mp))
        assert set(last.modulation.layers) == {"shift", "scale", "rotate"}
        y = modulated(before(tokens), last.modulation(c)) @ weight(last.linear).T
        y = torch.einsum("nhwpqc->nchpwq", y.reshape(B, h, w, P, P, C)).reshape(B, C, h * P, w * P)
        assert torch.allclose(last(tokens, c, h, w), y, atol=1e-5)


# ---------------------------------------------------------------- network

@pytest.mark.parametrize("cfg", [BASE, TEXT, replace(BASE, mp="cosine+weights")], ids=["E", "text", "C"])
def test_the_first_backward_pass_reaches_the_gain_of_the_output_alone(cfg):
    net = build(cfg, acting=False)
    x, i, cond = inputs(cfg)
    eps = normal(*x.shape, seed=9)
    loss = (net(x, i, cond) - eps).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(eps.square().mean().item())         # the output is zero
    assert {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()} == {"final_layer.linear.gain"}


def test_adaln_and_rotation_start_as_one_function():
    adaln, rotation = build(BASE, acting=False), build(replace(BASE, modulation="scale+rotate+gate"), acting=False)
    rotation.load_state_dict({k: v for k, v in adaln.state_dict().items() if "shift" not in k}, strict=False)
    for net in (adaln, rotation):
        net.final_layer.linear.gain.data.fill_(1.0)
    x, i, cond = inputs()
    assert torch.equal(adaln(x, i, cond), rotation(x, i, cond)) and adaln(x, i, cond).std() > 0.1


@pytest.mark.parametrize("cfg", [BASE, TEXT, replace(TEXT, semantics="class"), replace(TEXT, semantics="none")],
                         ids=["dit", "text", "class", "none"])
def test_no_bias_anywhere_and_row_lengths_have_no_say(cfg):
    net, (x, i, cond) = build(cfg), inputs(cfg)
    assert not [n for n in net.state_dict() if "bias" in n]
    assert not [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv2d))]
    eps = net(x, i, cond)
    for k, m in enumerate(net.modules()):
        if isinstance(m, (mp_layers.MPLinear, mp_layers.MPEmbedding)):
            m.weight.data *= torch.rand(len(m.weight), 1, generator=torch.Generator().manual_seed(k)) * 9 + 1
    assert torch.allclose(net(x, i, cond), eps, atol=2e-3 * eps.abs().max().item())
    mp_layers.normalize_weights_(net)
    mp_layers.assume_normalized_(net, True)
    assert torch.allclose(net(x, i, cond), eps, atol=2e-3 * eps.abs().max().item())


def test_magnitudes_enter_the_trunk_at_one():
    cfg = replace(BASE, width=256, heads=4, classes=1000)
    net, (x, i, _) = build(cfg, acting=False), inputs(cfg)
    c = net.time(i, Condition(label=torch.tensor([1, 2, 3, -1])))
    assert mp_layers.magnitude(c).item() == pytest.approx(1, abs=5 / math.sqrt(2 * 256))       # one table row in common
    assert mp_layers.magnitude(net.embed(x, h, w)).item() == pytest.approx(1, abs=0.15)    # position has few directions
    table = net.embed(torch.zeros_like(x), h, w) * math.sqrt(2)
    flat = net.x_embedder(torch.zeros_like(x))
    assert torch.allclose(table - flat, unit(sincos_2d(h, w, 256)).expand_as(flat), atol=1e-4)


def test_a_network_keeps_its_magnitude_with_heads_normalised_and_slowly_loses_it_without():
    found = {}
    for mp in ("cosine+weights+stream", "cosine+weights+stream+heads"):
        cfg = ModelConfig(arch="mpdit", patch=2, mp=mp, **MAG, width=256, depth=6, heads=4)
        net, trunk = build(cfg, acting=False), []
        for block in net.blocks:
            block.register_forward_hook(lambda block, args, out: trunk.append(mp_layers.magnitude(out[0]).item()))
        net(normal(2, 4, 16, 16), torch.tensor([100.0, 800]), Condition(label=torch.tensor([1, 700])))
        found[mp] = trunk
    without, normalised = found.values()
    assert all(0.9 < m < 1.1 for m in normalised), normalised
    assert 0.6 < without[-1] < 0.9 and without[-1] == min(without), without


# ---------------------------------------------------------------- conditions

def test_time_features_are_smooth_from_step_to_step_with_stream_and_dit_s_without():
    torch.manual_seed(0)
    i = torch.tensor([0.0, 1, 400, 401, 998, 999])
    features = MPTimestepEmbedder(D, 1000, mp_layers.FULL).features(i).double()
    near = F.cosine_similarity(features[::2], features[1::2])
    far = F.cosine_similarity(features[0], features[3], dim=0)
    assert near.min() > 0.99 and far.abs() < 5 / math.sqrt(256)
    assert MPTimestepEmbedder(D, 1000, ("weights",)).features(i)[:, 0].tolist() == pytest.approx(i.cos().tolist())


def test_no_class_is_the_last_row():
    torch.manual_seed(0)
    table = LabelEmbedder(classes, D, mp=True)
    rows = table(torch.tensor([-1, 10, 3]))
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert torch.allclose(rows, unit(table.embedding_table.weight)[[10, 10, 3]], atol=1e-5)


def test_text_tokens_enter_with_unit_magnitude_the_empty_one_too():
    torch.manual_seed(0)
    net, text, seen = TextContext(E, D, mp=True), normal(B, L, E) * 30, []
    text[1, 3:] = 0
    net.mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    ctx = net(Condition(text=text), torch.float32)
    assert torch.allclose(seen[0].square().mean(-1), torch.ones(B, L), atol=1e-3) and ctx.shape == (B, L, D)
    assert torch.allclose(seen[0][0, 0, :E] / seen[0][0, 0, E], unit(text[0, 0]), atol=1e-4)
    assert (seen[0][1, 3:, :E] == 0).all() and torch.equal(ctx[1, 3], ctx[1, 6]) and ctx[1, 3].abs().max() > 0.1
    assert torch.allclose(net(Condition(text=text * 7), torch.float32), ctx, atol=1e-4)


def test_controls_blend_in_by_magnitude():
    """(c + w_h e_h + w_l e_l) / sqrt(1 + w_h^2 + w_l^2), w a gain times has_controls, of size times gamma_c as well."""
    net = build(replace(BASE, controls="crop+flip+size")).control_embedder
    gain = {"high": 0.8, "low": -1.7}
    for name, mlp in net.mlps.items():
        mlp.fc2.gain.data.fill_(gain[name])
    cond = Condition(crop=normal(B, 2) * 9, flip=torch.tensor([0.0, 1, 0, 1]), size=normal(B, 2).abs() * 99,
                     has_controls=torch.tensor([1.0, 1, 0, 1]))
    c, t = normal(B, D, seed=1), torch.tensor([0.0, 0.1, 0.2, 1.0])
    e = {}
    for name, mlp in net.mlps.items():
        x = math.sqrt(2) * net.features(cond, net.high if name == "high" else net.low)
        assert torch.allclose(x.square().mean(1), torch.ones(B), atol=1e-4)
        e[name] = (F.silu(x @ weight(mlp.fc1).T) / 0.5964692) @ (weight(mlp.fc2) / mlp.fc2.gain).T
    a, b = (cond.has_controls * gain["high"])[:, None], (cond.has_controls * gain["low"] * control_weight(t))[:, None]
    exact = (c + a * e["high"] + b * e["low"]) / (1 + a ** 2 + b ** 2).sqrt()
    assert torch.allclose(net(c, cond, t), exact, atol=1e-4)
    assert torch.equal(net(c, cond, t)[2], c[2])            # without controls


# ---------------------------------------------------------------- counts

# [MAG]'s code, counted with a variance beside every output channel; 1000 classes and none
COUNTS = {
    "XS/2": (5_118_465, 5_970_446, 5_544_462, 6_822_427, 6_396_443, 6_756_890, 6_330_906, 7_608_871, 7_182_887,
             8_034_868),
    "S/4": (21_937_921, 25_624_346, 23_781_146, 29_310_771, 27_467_571, 29_163_314, 27_320_114, 32_849_739, 31_006_539,
            34_692_964),
    "S/2": (21_882_625, 25_569_050, 23_725_850, 29_255_475, 27_412_275, 29_108_018, 27_264_818, 32_794_443, 30_951_243,
            34_637_668),
    "B/4": (86_638_081, 101_383_706, 94_010_906, 116_129_331, 108_756_531, 115_539_506, 108_166_706, 130_285_131,
            122_912_331, 137_657_956),
    "B/2": (86_527_489, 101_273_114, 93_900_314, 116_018_739, 108_645_939, 115_428_914, 108_056_114, 130_174_539,
            122_801_739, 137_547_364),
    "XL/2": (448_738_561, 524_383_546, 486_561_082, 600_028_531, 562_206_067, 598_701_426, 560_878_962, 674_346_411,
             636_523_947, 712_168_932),
}


@pytest.mark.parametrize("size", [pytest.param(s, marks=() if s == "S/4" else pytest.mark.slow) for s in COUNTS])
def test_parameters_are_those_of_the_paper_s_code(size):
    none, *counts = COUNTS[size]
    assert [tables.counted_as_mag(tables.mag_config(size, m)) for m in tables.MODULATIONS] == counts
    with torch.device("meta"):                              # what model.check refuses: nothing reads time and class
        blind = model.ARCHS["mpdit"](tables.mag_config(size, ""))
    variances = blind.cfg.patch ** 2 * 4 * blind.cfg.width
    assert sum(p.numel() for p in blind.parameters()) + variances == none


@pytest.mark.parametrize("size, saved", [("XS/2", 5.599), ("S/2", 5.620), ("S/4", 5.611), ("B/4", 5.659),
                                         ("XL/2", 5.609)])
def test_rotation_for_shift_saves_a_square_a_block_and_half_a_square(size, saved):
    adaln, rotation = (tables.mag_config(size, m) for m in ("scale+shift+gate", "scale+rotate+gate"))
    a, b = tables.counted_as_mag(adaln), tables.counted_as_mag(rotation)
    assert a - b == adaln.depth * adaln.width ** 2 + adaln.width ** 2 // 2
    assert 100 * (1 - b / a) == pytest.approx(saved, abs=0.0006)
    if size == "S/4":
        assert 100 * adaln.depth * adaln.width ** 2 / a == pytest.approx(5.387, abs=0.0006)


@pytest.mark.parametrize("sizes", [("XS/2",), pytest.param(tables.MAG_SIZES, marks=pytest.mark.slow)],
                         ids=["XS", "all"])
def test_the_table_prints_these_counts(sizes, monkeypatch):
    monkeypatch.setattr(tables, "MAG_SIZES", sizes)
    lines = tables.table_mag().splitlines()
    for line in lines[1:1 + len(sizes)]:
        size, *counts, saved = line.replace(",", "").replace("%", "").split()
        assert tuple(map(int, counts)) == COUNTS[size][1:] and 5.59 < float(saved) < 5.67
    assert [line.split()[0] for line in lines[1:1 + len(sizes)]] == list(sizes)


# ---------------------------------------------------------------- what can be chosen

@pytest.mark.parametrize("changes, parts", [
    (dict(mp="cosin"), ["model.mp='cosin'", "'cosin'", "cosine, weights, stream, heads"]),
    (dict(mp="none+cosine"), ["'none'", "cosine, weights"]),
    (dict(mp="cosine+stream"), ["model.mp='cosine+stream'", "needs weights"]),
    (dict(arch="dit", mp="cosine"), ["model.mp='cosine'", "mpdit, mpmmdit", "model.arch='dit'"]),
    (dict(arch="mpmmdit", mp="cosine+weights"), ["model.arch='mpmmdit'", "cosine+weights+stream"]),
    (dict(arch="mpmmdit", mp="none"), ["model.arch='mpmmdit'", "cosine+weights+stream"]),
    (dict(controls="size", mp="cosine+weights"), ["model.controls='size'", "stream"]),
    (dict(semantics="text", text_dim=3, text_length=2), ["model.arch='mpdit'", "'mpmmdit'"]),
    (dict(modulation="scale+rotation"), ["model.modulation='scale+rotation'", "'rotation'", "shift, scale, rotate"]),
    (dict(modulation=""), ["model.modulation=''", "shift, scale, rotate"]),
    (dict(modulation="gate", arch="dit"), ["model.modulation='gate'", "shift, scale, rotate"]),
])
def test_what_does_not_go_together_is_a_user_error(changes, parts):
    with pytest.raises(UserError) as e:
        model.build(replace(BASE, **changes))
    assert all(part in str(e.value) for part in parts) and "\n" not in str(e.value), e.value


def test_an_mp_architecture_has_every_change_of_the_paper_by_default():
    assert model.mp_features(BASE) == model.mp_features(replace(BASE, mp="weights+stream+cosine")) == mp_layers.FULL
    assert model.mp_features(replace(BASE, mp="none")) == ()
    assert model.mp_features(replace(BASE, mp="heads+cosine")) == ("cosine", "heads")


@pytest.mark.parametrize("mp", [*LADDER.values(), "cosine+weights+stream+heads"])
def test_every_rung_starts_at_zero_and_learns_with_every_parameter(mp):
    cfg = replace(BASE, mp=mp)
    x, i, cond = inputs()
    assert (build(cfg, acting=False)(x, i, cond) == 0).all()
    net = build(cfg)
    (net(x, i, cond) - normal(*x.shape, seed=9)).square().mean().backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("arch", ["mpdit", "mpmmdit"])
def test_without_semantics_every_parameter_learns_too(arch):
    cfg = replace(BASE, arch=arch, semantics="none")
    net, (x, i, cond) = build(cfg), inputs(cfg)
    (net(x, i, cond) - normal(*x.shape, seed=9)).square().mean().backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]


CONFIGS = Path(__file__).parent.parent / "configs" / "mp"


def read(name):
    cfg = load(str(CONFIGS / f"{name}.py"))
    return replace(cfg, model=replace(cfg.model, classes=cfg.model.classes or classes))


@pytest.mark.parametrize("data", ["shapes", "imagenet128"])
def test_the_ladder_and_the_modulations_are_one_config_but_for_what_they_vary(data):
    e = read(f"{data}_e")
    assert e.forced_weight_norm and model.mp_features(e.model) == mp_layers.FULL and e.model.modulation == "scale+shift+gate"
    rungs = {k: (replace(e.model, mp=LADDER["c" if k == "d" else k]), k == "d") for k in "abcd"}
    rungs |= {k: (replace(e.model, modulation=k.replace("_", "+") + "+gate"), True)
              for k in ("scale", "rotate", "scale_rotate")}
    for name, (m, forced) in rungs.items():
        cfg = read(f"{data}_{name}")
        assert cfg == replace(e, out=f"out/mp/{data}_{name}", model=m, forced_weight_norm=forced)
        model.check(cfg.model)
    assert len(list(CONFIGS.glob(f"{data}_*.py"))) == len(rungs) + 1


def test_the_imagenet_recipe_is_the_paper_s():
    cfg = read("imagenet128_e")
    assert tables.counted_as_mag(cfg.model) == COUNTS["S/4"][7] and cfg.model.schedule == "linear"
    assert (cfg.batch, cfg.steps, cfg.beta1, cfg.beta2, cfg.weight_decay) == (256, 400_000, 0.9, 0.99, 0.0)
    assert (cfg.warmup, cfg.lr_decay_start * cfg.steps) == (400_000 // 150, 40_000) and isinstance(cfg, Config)
