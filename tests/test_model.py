"""The denoisers: shapes, zero start, gradients, purity, names of the weights, and parity with direct formulas.

No two sizes are equal: B 4, C 3, P 2, h 6, w 9, N 54, L 7, E 11, D 40, H 5, d 8, training grid 12.
"""
import copy
import math
import runpy
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import model
from conditioning import Condition, sincos_2d
from config import Config, ModelConfig, UserError, to_json

B, C, P, h, w, L, E, D, H, classes = 4, 3, 2, 6, 9, 7, 11, 40, 5, 10
BASE = ModelConfig(width=D, depth=3, heads=H, patch=P, channels=C, resolution=24)
KINDS = [("dit", "none"), ("dit", "class"), ("mmdit", "none"), ("mmdit", "class"), ("mmdit", "text")]
CONTROLS = ["", "crop", "flip", "size", "crop+flip+size"]
EVERY = [pytest.param(arch, semantics, controls, id=f"{arch}-{semantics}-{controls or 'free'}")
         for arch, semantics in KINDS for controls in CONTROLS]
ALL = [p for p in EVERY if p.values[2] in ("", "crop+flip+size")]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config(arch, semantics, controls="", **changes):
    extra = {"none": {}, "class": dict(classes=classes), "text": dict(text_dim=E, text_length=L)}[semantics]
    return replace(BASE, arch=arch, semantics=semantics, controls=controls, **extra, **changes)


def build(cfg, random=True):
    """A network from seed 0; `random` also draws what starts at zero, so that everything acts."""
    torch.manual_seed(0)
    net = model.build(cfg)
    for k, p in enumerate(net.parameters()):
        if random and not p.detach().any():
            nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(k))
    return net


def inputs(cfg, rows=h, columns=w):
    """x_t, i and a condition of everything that the network reads."""
    tables = {"label": torch.tensor([0, 9, -1, 4]), "text": normal(B, L, E, seed=1)}
    values = {"crop": normal(B, 2, seed=2) * 9, "flip": torch.tensor([0.0, 1, 0, 1]),
              "size": normal(B, 2, seed=3).abs() * 99}
    names = {"none": [], "class": ["label"], "text": ["text"]}[cfg.semantics]
    fields = {k: v for k, v in (tables | values).items() if k in names or k in cfg.controls.split("+")}
    cond = Condition(steered=torch.ones(B) if cfg.controls else None, **fields)
    return normal(B, cfg.channels, rows * P, columns * P), torch.tensor([0.0, 25.0, 500.0, 999.0]), cond


def ready(arch, semantics, controls="crop+flip+size"):
    cfg = config(arch, semantics, controls)
    return build(cfg), *inputs(cfg)


# ---------------------------------------------------------------- contract

@pytest.mark.parametrize("arch, semantics, controls", EVERY)
def test_output_is_exactly_zero_at_first_and_has_the_shape_of_the_input(arch, semantics, controls):
    cfg = config(arch, semantics, controls)
    eps = build(cfg, random=False)(*inputs(cfg))
    assert eps.shape == (B, C, h * P, w * P) and eps.dtype == torch.float32 and (eps == 0).all()


@pytest.mark.parametrize("arch, semantics, controls", ALL)
def test_everything_in_the_condition_acts_once_trained(arch, semantics, controls):
    net, x, i, cond = ready(arch, semantics, controls)
    i = torch.tensor([0.0, 10.0, 20.0, 30.0])               # where size has weight
    eps = net(x, i, cond)
    assert eps.std() > 0.01
    others = {"x": net(x + 0.1, i, cond), "i": net(x, i + 1, cond)}
    for k, v in vars(cond).items():
        if v is not None:
            others[k] = net(x, i, replace(cond, **{k: (v + 1) % classes if k == "label" else v * 0.5 + 0.1}))
    assert all((other - eps).flatten(1).abs().amax(1).gt(1e-5).all() for other in others.values()), others.keys()


@pytest.mark.parametrize("arch, semantics, controls", [p for p in EVERY if p.values[2]])
def test_controls_have_no_effect_at_first(arch, semantics, controls):
    """With every other layer acting, and the last layer of the control MLPs as it starts."""
    cfg = config(arch, semantics, controls)
    net, fresh = build(cfg), build(cfg, random=False)
    net.control_embedder.load_state_dict(fresh.control_embedder.state_dict())
    x, i, cond = inputs(cfg)
    assert torch.equal(net(x, i, cond), net(x, i, cond.drop(controls=True)))


@pytest.mark.parametrize("arch, semantics, controls", EVERY)
def test_every_parameter_gets_a_gradient(arch, semantics, controls):
    net, x, i, cond = ready(arch, semantics, controls)
    (net(x, i, cond) - normal(*x.shape, seed=9)).square().mean().backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead, dead


@pytest.mark.parametrize("arch, semantics, controls", EVERY)
def test_what_starts_at_zero_learns_within_five_steps(arch, semantics, controls):
    """Zero layers in series would never move; here each gets a gradient once the one after it has."""
    cfg = config(arch, semantics, controls)
    net, (x, i, cond) = build(cfg, random=False), inputs(cfg)
    start, opt = copy.deepcopy(net.state_dict()), torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(5):
        opt.zero_grad()
        (net(x, i, cond) - normal(*x.shape, seed=9)).square().mean().backward()
        opt.step()
    still = [n for n, p in net.named_parameters() if torch.equal(p, start[n])]
    assert not still, still


@pytest.mark.parametrize("arch, semantics, controls", ALL)
def test_forward_is_pure(arch, semantics, controls):
    net, x, i, cond = ready(arch, semantics, controls)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    kept = [v.clone() for v in (x, i, *(v for v in vars(cond).values() if v is not None))]
    assert torch.equal(net(x, i, cond), net(x, i, cond))
    assert torch.equal(net.eval()(x, i, cond), net.train()(x, i, cond))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, i, *(v for v in vars(cond).values() if v is not None))))


@pytest.mark.parametrize("arch, semantics", KINDS)
def test_two_forwards_before_one_backward(arch, semantics):
    net, x, i, cond = ready(arch, semantics)
    one, two = (torch.autograd.grad(net(x * k, i, cond).square().mean(), list(net.parameters())) for k in (1, 2))
    (net(x, i, cond).square().mean() + net(x * 2, i, cond).square().mean()).backward()
    assert all(torch.allclose(p.grad, a + b, rtol=1e-3, atol=1e-6) for p, a, b in zip(net.parameters(), one, two))


@pytest.mark.parametrize("arch, semantics", KINDS)
def test_pictures_of_a_batch_do_not_see_each_other(arch, semantics):
    net, x, i, cond = ready(arch, semantics)
    eps, order = net(x, i, cond), torch.tensor([2, 0, 3, 1])
    assert torch.allclose(net(x[order], i[order], cond.map(lambda v: v[order])), eps[order], atol=1e-5)
    assert torch.allclose(net(x[2:3], i[2:3], cond.map(lambda v: v[2:3])), eps[2:3], atol=1e-5)


def test_mmdit_does_not_care_about_the_order_of_context_tokens():
    net, x, i, cond = ready("mmdit", "text")
    eps, order = net(x, i, cond), torch.randperm(L, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(net(x, i, replace(cond, text=cond.text[:, order])), eps, atol=1e-5)
    shorter = net(x, i, replace(cond, text=cond.text[:, :3]))
    assert shorter.shape == eps.shape and (shorter - eps).abs().max() > 1e-3


@pytest.mark.parametrize("arch", model.ARCHS)
def test_image_tokens_are_told_apart_by_position_alone(arch):
    net, x, i, cond = ready(arch, "class")
    eps = net(torch.ones_like(x), i, cond)
    assert eps.flatten(2).std(dim=2).min() > 1e-3
    net.positions = lambda rows, columns: torch.zeros(rows * columns, D)
    flat = net(torch.ones_like(x), i, cond).unflatten(3, (w, P)).unflatten(2, (h, P))
    assert torch.allclose(flat, flat[:, :, :1, :, :1].expand_as(flat), atol=1e-5)


@pytest.mark.parametrize("arch, semantics", KINDS)
def test_at_the_noisiest_level_size_has_no_effect_to_the_last_bit(arch, semantics):
    cfg = config(arch, semantics, "crop+flip+size", control_weight="linear")
    net, (x, i, cond) = build(cfg), inputs(cfg)             # i is 0, 25, 500, 999
    one, two = net(x, i, cond), net(x, i, replace(cond, size=cond.size * 3 + 100))
    assert torch.equal(one[3], two[3]) and (one[:3] - two[:3]).flatten(1).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("rows, columns", [(12, 12), (6, 9), (9, 6), (1, 1), (12, 5), (5, 12)])
def test_positions_are_those_of_the_grid(rows, columns):
    net = build(config("dit", "none"))
    assert torch.allclose(net.positions(rows, columns), sincos_2d(rows, columns, D))


@pytest.mark.parametrize("arch, semantics", KINDS)
def test_bfloat16_tokens_give_nearly_the_same_and_weights_stay_fp32(arch, semantics):
    net, x, i, cond = ready(arch, semantics)
    exact = net(x, i, cond)
    net.dtype = torch.bfloat16
    seen = []
    hook = net.blocks[0].register_forward_hook(lambda block, args, out: seen.append(out[0].dtype))
    eps = net(x, i, cond)
    hook.remove()
    error = ((eps - exact).square().mean() / exact.square().mean()).sqrt()
    assert seen == [torch.bfloat16] and eps.dtype == torch.float32 and 1e-4 < error < 0.04, error
    assert all(p.dtype == torch.float32 for p in net.parameters())


# ---------------------------------------------------------------- parts

@pytest.mark.parametrize("n, m", [(6, 9), (9, 6), (3, model.PLAIN_ATTENTION + 1)])
def test_attention_is_the_softmax_formula(n, m):
    q, k, v = normal(B, H, n, 8), normal(B, H, m, 8, seed=1), normal(B, H, m, 8, seed=2)
    weight = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double() / math.sqrt(8)).exp()
    exact = torch.einsum("bhnm,bhmd->bnhd", weight / weight.sum(-1, keepdim=True), v.double()).reshape(B, n, H * 8)
    assert torch.allclose(model.attention(q, k, v).double(), exact, atol=1e-5)
    half = model.attention(*(x.bfloat16() for x in (q, k, v)))
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).square().mean().sqrt() < 0.01 * exact.square().mean().sqrt() * math.sqrt(m) ** 0.5


def test_split_heads_gives_each_head_its_own_columns():
    n, tokens = 3, 4
    x = torch.arange(2 * tokens * n * D).view(2, tokens, n * D)
    q, k, v = model.split_heads(x, n, H)
    for part, got in enumerate((q, k, v)):
        assert got.shape == (2, H, tokens, 8)
        for head in range(H):
            start = part * D + head * 8
            assert torch.equal(got[:, head], x[..., start:start + 8])


def test_norm_is_layer_norm_without_weights_in_fp32():
    x = normal(2, 5, D) * 30 + 7
    std = (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(model.norm(x), (x - x.mean(-1, True)) / std, atol=1e-5)
    error = model.norm(x.bfloat16()).float() - model.norm(x.bfloat16().float())
    assert error.abs().max() < 0.016                        # rounding of the result alone


def test_rms_norm_divides_by_the_rms_and_has_a_gain():
    norm = model.RMSNorm(8)
    nn.init.normal_(norm.weight)
    x = normal(2, H, 6, 8) * 30
    assert torch.allclose(norm(x), x / x.square().mean(-1, True).sqrt() * norm.weight, atol=1e-5)


def test_modulate():
    x, shift, scale = normal(B, 6, D), normal(B, 1, D, seed=1), normal(B, 1, D, seed=2)
    assert torch.allclose(model.modulate(x, shift, scale), x * (1 + scale) + shift, atol=1e-6)


def test_patch_embed_is_a_strided_convolution():
    embed, x = model.PatchEmbed(C, P, D), normal(B, C, h * P, w * P)
    direct = F.conv2d(x, embed.proj.weight, embed.proj.bias, stride=P)          # (B, D, h, w)
    assert torch.allclose(embed(x), direct.flatten(2).transpose(1, 2), atol=1e-5)


def test_final_layer_puts_pixels_where_the_official_code_does():
    """Official DiT: reshape to (n, h, w, p, q, c), then einsum nhwpqc -> nchpwq."""
    last = model.FinalLayer(D, P, C)
    x, c = normal(B, h * w, D), normal(B, D, seed=1)
    shift, scale = last.adaLN_modulation(c)[:, None].chunk(2, dim=2)
    tokens = last.linear(F.layer_norm(x, (D,), eps=1e-6) * (1 + scale) + shift)
    direct = torch.einsum("nhwpqc->nchpwq", tokens.reshape(B, h, w, P, P, C)).reshape(B, C, h * P, w * P)
    assert torch.allclose(last(x, c, h, w), direct, atol=1e-5)


def test_patches_taken_apart_and_put_together_are_the_picture():
    """With identities for both linear layers, up to the order in a patch: (C, P, P) going in, (P, P, C) coming out."""
    width = C * P * P
    embed, last = model.PatchEmbed(C, P, width), model.FinalLayer(width, P, C)
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


def test_joint_attention_lets_image_and_context_see_each_other():
    attn = model.JointAttention(D, H, False)
    x, ctx = normal(B, 6, D), normal(B, L, D, seed=1)
    a, a_ctx = attn(x, ctx)
    assert a.shape == (B, 6, D) and a_ctx.shape == (B, L, D)
    heads = lambda v, parts: v.unflatten(-1, (parts, H, 8)).permute(2, 0, 3, 1, 4)
    q, k, v = (torch.cat(two, 2) for two in zip(heads(attn.ctx_qkv(ctx), 3), heads(attn.qkv(x), 3)))
    rms = lambda v: v / v.square().mean(-1, True).sqrt()
    joint = ((rms(q) @ rms(k).mT) / math.sqrt(8)).softmax(-1) @ v
    assert torch.allclose(torch.cat([a_ctx, a], 1), attn.proj(joint.transpose(1, 2).flatten(2)), atol=1e-5)


def test_the_last_mmdit_block_owns_no_context_weights_that_nothing_reads():
    blocks = build(config("mmdit", "text")).blocks
    assert [b.attn.ctx_qkv.out_features for b in blocks] == [3 * D, 3 * D, 2 * D]
    x, ctx, c = normal(B, 6, D), normal(B, L, D, seed=1), normal(B, D, seed=2)
    assert blocks[-1](x, ctx, c)[1] is ctx and not torch.equal(blocks[0](x, ctx, c)[1], ctx)


def test_a_class_is_one_context_token_and_no_semantics_one_learned_token():
    i = torch.zeros(B)
    _, ctx = build(config("mmdit", "class")).condition(i, Condition(label=torch.tensor([3, 1, 3, -1])))
    assert ctx.shape == (B, 1, D) and torch.equal(ctx[0], ctx[2])
    assert min((ctx[0] - ctx[1]).abs().max(), (ctx[0] - ctx[3]).abs().max()) > 1e-3
    _, ctx = build(config("mmdit", "none")).condition(i, Condition())
    assert ctx.shape == (B, 1, D) and torch.equal(ctx[0], ctx[3])


# ---------------------------------------------------------------- weights

def official_names(depth):
    """Names of the official DiT weights, without pos_embed, which is not learned and made anew here."""
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    layers += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    parts = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]
    layers += [f"blocks.{k}.{part}" for k in range(depth) for part in parts]
    return {f"{layer}.{k}" for layer in layers for k in ("weight", "bias")} | {"y_embedder.embedding_table.weight"}


def test_the_state_dict_of_dit_has_the_official_names_and_shapes():
    state = build(config("dit", "class")).state_dict()
    assert set(state) == official_names(3)
    assert state["y_embedder.embedding_table.weight"].shape == (classes + 1, D)
    assert state["x_embedder.proj.weight"].shape == (D, C, P, P)
    assert state["blocks.2.attn.qkv.weight"].shape == (3 * D, D)
    assert state["t_embedder.mlp.0.weight"].shape == (D, 256)
    assert state["final_layer.linear.weight"].shape == (P * P * C, D)


@pytest.mark.parametrize("arch, semantics, controls", ALL)
def test_building_is_decided_by_the_seed(arch, semantics, controls):
    cfg = config(arch, semantics, controls)
    one, two = build(cfg, random=False).state_dict(), build(cfg, random=False).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    torch.manual_seed(1)
    assert not torch.equal(model.build(cfg).state_dict()["blocks.0.mlp.fc1.weight"], one["blocks.0.mlp.fc1.weight"])


def test_initial_weights_are_those_that_the_docstring_says():
    net = build(config("dit", "class", "size", width=256, heads=8), random=False)
    limit = math.sqrt(6 / (256 + 1024))
    fc1 = net.blocks[0].mlp.fc1.weight
    assert 0.99 * limit < fc1.abs().max() <= limit and fc1.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.01)
    patch = math.sqrt(6 / (256 + C * P * P))
    assert 0.98 * patch < net.x_embedder.proj.weight.abs().max() <= patch
    assert net.t_embedder.mlp[2].weight.std().item() == pytest.approx(math.sqrt(2 / (256 + 256)), rel=0.02)   # Xavier
    assert net.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    zero = {n for n, p in net.named_parameters() if n.endswith("weight") and not p.any()}
    ends = {"final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight", "control_embedder.mlps.low.2.weight"}
    assert zero == ends | {f"blocks.{k}.adaLN_modulation.1.weight" for k in range(3)}
    assert not any(p.any() for n, p in net.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize("arch, semantics, controls", ALL)
def test_load_gives_back_network_and_config(arch, semantics, controls, tmp_path):
    cfg = Config(lr=0.5, model=config(arch, semantics, controls))
    net = build(cfg.model)
    path = tmp_path / "weights.safetensors"
    checkpoint.write_weights(path, net.state_dict(), {"config": to_json(cfg)})
    x, i, cond = inputs(cfg.model)
    for where in (path, tmp_path, str(tmp_path)):
        back, read = model.load(where)
        assert read == cfg and torch.equal(back(x, i, cond), net(x, i, cond))
        assert not back.training and not any(p.requires_grad for p in back.parameters())


def test_load_refuses_weights_of_another_model(tmp_path):
    checkpoint.write_weights(tmp_path / "weights.safetensors", build(config("dit", "class")).state_dict(),
                             {"config": to_json(Config(model=config("dit", "class", depth=2)))})
    with pytest.raises(UserError, match="blocks.2"):
        model.load(tmp_path)


# ---------------------------------------------------------------- counting

@pytest.mark.parametrize("arch, semantics, controls", EVERY)
def test_flops_are_those_of_the_matrix_products(arch, semantics, controls):
    cfg = config(arch, semantics, controls)
    net, (x, i, cond) = build(cfg).requires_grad_(False), inputs(cfg)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x, i, cond)
    assert counter.get_total_flops() == B * model.flops(cfg, h * P, w * P)


def test_flops_are_of_the_training_resolution_unless_told():
    cfg = config("mmdit", "text")
    assert model.flops(cfg) == model.flops(cfg, 24, 24) != model.flops(cfg, 24, 48)


@pytest.mark.parametrize("size, millions, gmac", [
    ("S", 33, 6.06), ("B", 130, 23.01), ("L", 458, 80.71), ("XL", 675, 118.64)])
def test_dit_has_the_published_size_and_cost(size, millions, gmac):
    """Table 4 of the DiT paper, whose Gflops are multiply-adds and whose output also has variances."""
    cfg = ModelConfig(arch="dit", semantics="class", classes=1000, channels=4, patch=2, **model.SIZES[size])
    with torch.device("meta"):
        count = sum(p.numel() for p in model.build(cfg).parameters())
    assert round(count / 1e6) == millions
    assert model.flops(cfg) / 2e9 == pytest.approx(gmac, abs=0.03)


def test_the_table_prints_every_architecture_and_size(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model.py", "--table"])
    runpy.run_path(model.__file__, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [f"{a}-{s}/2" for a in model.ARCHS for s in model.SIZES]
    assert all(int(line.split()[1].replace(",", "")) > 7e6 for line in lines[1:])


# ---------------------------------------------------------------- what cannot be built

@pytest.mark.parametrize("changes, parts", [
    (dict(arch="ditt"), ["model.arch='ditt'", "dit, mmdit"]),
    (dict(semantics="words"), ["model.semantics='words'", "none, class, text"]),
    (dict(arch="dit", semantics="text"), ["model.arch='dit'", "'mmdit'"]),
    (dict(width=0), ["model.width=0", "at least 1"]),
    (dict(depth=-1), ["model.depth=-1", "at least 1"]),
    (dict(patch=0), ["model.patch=0", "at least 1"]),
    (dict(heads=0), ["model.heads=0", "at least 1"]),
    (dict(channels=0), ["model.channels=0", "at least 1"]),
    (dict(noise_steps=0), ["model.noise_steps=0", "at least"]),
    (dict(resolution=25), ["model.resolution=25", "model.patch=2"]),
    (dict(heads=7), ["model.width=40", "model.heads=7"]),
    (dict(width=30), ["model.width=30", "4"]),
    (dict(semantics="class", classes=0), ["model.classes", "0"]),
    (dict(semantics="text", text_dim=0), ["model.text_dim", "model.text_length"]),
    (dict(controls="crop+zoom"), ["model.controls='crop+zoom'", "'zoom'", "crop, flip, size"]),
    (dict(controls="size", control_weight="cosin"), ["model.control_weight='cosin'", "cosine, uniform, linear"]),
    (dict(controls="size", control_alpha=0.0), ["model.control_alpha=0.0"]),
    (dict(controls="size", noise_steps=1), ["model.noise_steps=1"]),
])
def test_a_model_that_cannot_be_built_is_a_user_error(changes, parts):
    cfg = replace(config("mmdit", "text"), **changes)
    with pytest.raises(UserError) as e:
        model.build(cfg)
    assert all(part in str(e.value) for part in parts) and "\n" not in str(e.value), e.value


def test_controls_come_in_one_order_however_they_are_written():
    assert model.control_names(config("dit", "none", "size+crop")) == ("crop", "size")
    assert model.control_names(config("dit", "none", "")) == ()
