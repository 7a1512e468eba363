"""The denoisers: shapes, zero start, gradients, purity, names of the weights, and parity with direct formulas.

No two sizes are equal: B 4, C 3, P 2, h 6, w 9, N 54, L 7, E 11, D 40, H 5, d 8, training grid 12.
"""
import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
from conditioning import Condition, sincos_2d
from config import SIZES, Config, ModelConfig, UserError, to_json
from experiments import tables
from layers import MODULATION_PARTS, input_parts
from runtime import checkpoint
from schedule import alpha_bar_table, to_sigma

B, C, P, h, w, L, E, D, H, classes = 4, 3, 2, 6, 9, 7, 11, 40, 5, 10
BASE = ModelConfig(width=D, depth=2, heads=H, patch=P, channels=C, resolution=24)
KINDS = [("dit", "none"), ("dit", "class"), ("mmdit", "none"), ("mmdit", "class"), ("mmdit", "text"),
         ("ditatt", "none"), ("ditatt", "class"), ("sd3", "none"), ("sd3", "class"), ("sd3", "text"),
         ("pixart", "none"), ("pixart", "class"), ("pixart", "text"),
         ("mpdit", "none"), ("mpdit", "class"), ("mpmmdit", "none"), ("mpmmdit", "class"), ("mpmmdit", "text")]
CONTROLS = "crop+flip+size"
EVERY = [pytest.param(arch, semantics, controls, id=f"{arch}-{semantics}-{controls or 'free'}")
         for arch, semantics in KINDS for controls in ("", CONTROLS)]
EVERY += [pytest.param("mmdit", "text", controls, id=f"mmdit-text-{controls}") for controls in ("crop", "flip", "size")]

each_kind = pytest.mark.parametrize("arch, semantics", KINDS)
each_arch = pytest.mark.parametrize("arch", model.ARCHS)


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
    cond = Condition(has_controls=torch.ones(B) if cfg.controls else None, **fields)
    return normal(B, cfg.channels, rows * P, columns * P), torch.tensor([0.0, 25.0, 500.0, 999.0]), cond


def ready(arch, semantics, controls=CONTROLS):
    cfg = config(arch, semantics, controls)
    return build(cfg), *inputs(cfg)


# ---------------------------------------------------------------- contract

@pytest.mark.parametrize("arch, semantics, controls", EVERY)
def test_at_first_the_output_is_exactly_zero_and_controls_have_no_effect(arch, semantics, controls):
    """The latter with every other layer acting, and the last layer of the control MLPs as it starts."""
    cfg = config(arch, semantics, controls)
    net, fresh, (x, i, cond) = build(cfg), build(cfg, random=False), inputs(cfg)
    eps = fresh(x, i, cond)
    assert eps.shape == (B, C, h * P, w * P) and eps.dtype == torch.float32 and (eps == 0).all()
    if controls:
        net.control_embedder.load_state_dict(fresh.control_embedder.state_dict())
        assert torch.equal(net(x, i, cond), net(x, i, cond.drop(controls=True)))


@each_kind
def test_everything_in_the_condition_acts_once_trained(arch, semantics):
    net, x, i, cond = ready(arch, semantics)
    i = torch.tensor([0.0, 10.0, 20.0, 30.0])               # where size has weight
    eps = net(x, i, cond)
    assert eps.std() > 0.01
    others = {"x": net(x + 0.1, i, cond), "i": net(x, i + 1, cond)}
    for k, v in vars(cond).items():
        if v is not None:
            others[k] = net(x, i, replace(cond, **{k: (v + 1) % classes if k == "label" else v * 0.5 + 0.1}))
    assert all((other - eps).flatten(1).abs().amax(1).gt(1e-5).all() for other in others.values()), others.keys()


@pytest.mark.parametrize("arch, semantics, controls", EVERY)
def test_every_parameter_learns_within_five_steps(arch, semantics, controls):
    """So all get a gradient. Zero layers in series would never move; each gets one once the layer after it has."""
    cfg = config(arch, semantics, controls)
    net, (x, i, cond) = build(cfg, random=False), inputs(cfg)
    start, opt, steps = copy.deepcopy(net.state_dict()), torch.optim.Adam(net.parameters(), 1e-3), 0
    while steps < 5 and (still := [n for n, p in net.named_parameters() if torch.equal(p, start[n])]):
        opt.zero_grad()
        (net(x, i, cond) - normal(*x.shape, seed=9)).square().mean().backward()
        opt.step()
        steps += 1
    still = [n for n, p in net.named_parameters() if torch.equal(p, start[n])]
    assert not still, still


@each_kind
def test_forward_is_pure(arch, semantics):
    """Nothing changes in a forward pass, and two of them before one backward pass give the sum of their gradients."""
    net, x, i, cond = ready(arch, semantics)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    kept = [v.clone() for v in (x, i, *(v for v in vars(cond).values() if v is not None))]
    eps = net.eval()(x, i, cond)
    assert torch.equal(eps, net.train()(x, i, cond))
    one, two = (torch.autograd.grad(net(x * k, i, cond).square().mean(), list(net.parameters())) for k in (1, 2))
    (net(x, i, cond).square().mean() + net(x * 2, i, cond).square().mean()).backward()
    assert all(torch.allclose(p.grad, a + b, rtol=1e-3, atol=1e-6) for p, a, b in zip(net.parameters(), one, two))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, i, *(v for v in vars(cond).values() if v is not None))))


@each_kind
def test_images_of_a_batch_do_not_see_each_other(arch, semantics):
    net, x, i, cond = ready(arch, semantics)
    eps, order = net(x, i, cond), torch.tensor([2, 0, 3, 1])
    assert torch.allclose(net(x[order], i[order], cond.map(lambda v: v[order])), eps[order], atol=1e-5)
    assert torch.allclose(net(x[2:3], i[2:3], cond.map(lambda v: v[2:3])), eps[2:3], atol=1e-5)


@pytest.mark.parametrize("arch", ["mmdit", "sd3", "pixart", "mpmmdit"])
def test_nothing_depends_on_the_order_of_context_tokens(arch):
    net, x, i, cond = ready(arch, "text")
    eps, order = net(x, i, cond), torch.randperm(L, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(net(x, i, replace(cond, text=cond.text[:, order])), eps, atol=1e-5)
    shorter = net(x, i, replace(cond, text=cond.text[:, :3]))
    assert shorter.shape == eps.shape and (shorter - eps).abs().max() > 1e-3


@each_arch
def test_image_tokens_differ_by_position_alone(arch):
    net, x, i, cond = ready(arch, "class")
    eps = net(torch.ones_like(x), i, cond)
    assert eps.flatten(2).std(dim=2).min() > 1e-3
    net.positions = lambda rows, columns: torch.zeros(rows * columns, D)
    flat = net(torch.ones_like(x), i, cond).unflatten(3, (w, P)).unflatten(2, (h, P))
    assert torch.allclose(flat, flat[:, :, :1, :, :1].expand_as(flat), atol=1e-5)


@each_arch
def test_at_the_noisiest_level_size_has_no_effect_to_the_last_bit(arch):
    cfg = config(arch, "class", CONTROLS, control_weight="linear")
    net, (x, i, cond) = build(cfg), inputs(cfg)             # i is 0, 25, 500, 999
    one, two = net(x, i, cond), net(x, i, replace(cond, size=cond.size * 3 + 100))
    assert torch.equal(one[3], two[3]) and (one[:3] - two[:3]).flatten(1).abs().amax(1).min() > 1e-4


@each_kind
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


@pytest.mark.parametrize("modulation", ["scale+rotate+gate", *(
    pytest.param(m, marks=pytest.mark.slow) for m in ("scale", "rotate+gate", "scale+shift+rotate+gate"))])
@pytest.mark.parametrize("arch", [arch for arch in model.ARCHS if arch != "pixart"])
def test_any_modulation_starts_at_zero_moves_every_weight_and_is_counted(arch, modulation):
    cfg = config(arch, "class", modulation=modulation)
    x, i, cond = inputs(cfg)
    fresh, net = build(cfg, random=False), build(cfg)
    assert (fresh(x, i, cond) == 0).all()
    (net(x, i, cond) - normal(*x.shape, seed=9)).square().mean().backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    other = net(x, (i + 1) % 1000, cond)
    assert model.flops(cfg, h * P, w * P) == formula(cfg, h * P, w * P)
    assert (other - net(x, i, cond)).flatten(1).abs().amax(1).min() > 1e-5


# ---------------------------------------------------------------- context

def sizes(block):
    """Rows of every context weight of a block, and of its modulation."""
    named = {n.removesuffix(".weight"): len(p) for n, p in block.named_parameters() if p.ndim == 2}
    return {n: rows for n, rows in named.items() if "ctx" in n or n.startswith("adaLN")}


@pytest.mark.parametrize("arch, inner, last", [
    ("mpmmdit", {"attn.ctx_qkv": 3 * D}, {"attn.ctx_qkv": 2 * D}),
    ("mmdit", {"attn.ctx_qkv": 3 * D, "adaLN_modulation.1": 6 * D},
     {"attn.ctx_qkv": 2 * D, "adaLN_modulation.1": 6 * D}),
    ("ditatt", {"adaLN_modulation.1": 9 * D}, {"adaLN_modulation.1": 8 * D}),
    ("sd3", {"attn.ctx_qkv": 3 * D, "attn.ctx_proj": D, "ctx_mlp.fc1": 4 * D, "ctx_mlp.fc2": D,
             "adaLN_modulation.1": 6 * D, "ctx_adaLN_modulation.1": 6 * D},
     {"attn.ctx_qkv": 2 * D, "adaLN_modulation.1": 6 * D, "ctx_adaLN_modulation.1": 2 * D})])
def test_the_last_block_owns_no_context_weights_that_nothing_reads(arch, inner, last):
    blocks = build(config(arch, "class")).blocks
    assert [sizes(b) for b in blocks] == [inner, last]
    x, ctx, c = normal(B, 6, D), normal(B, L, D, seed=1), normal(B, D, seed=2)
    assert blocks[-1](x, ctx, c)[1] is ctx and not torch.equal(blocks[0](x, ctx, c)[1], ctx)


@pytest.mark.parametrize("arch, moves", [("mmdit", False), ("ditatt", True), ("sd3", True)])
def test_time_modulates_context_only_in_dit_by_attention_and_sd3(arch, moves):
    """And the class never modulates: c is that of time and controls, whatever the class."""
    net = build(config(arch, "class"))
    x, ctx, c = normal(B, 6, D), normal(B, L, D, seed=1), normal(B, D, seed=2)
    block = net.blocks[0]
    for p in block.adaLN_modulation.parameters():           # leaves the image's modulation as it is
        p.data[:6 * D] = 0
    out = [block(x, ctx, v)[1] for v in (c, c + 1)]
    assert torch.equal(*out) != moves
    i, labels = torch.full((B,), 7.0), [torch.tensor([3, 1, 3, -1]), torch.tensor([0, 2, 9, 4])]
    (c1, ctx1), (c2, ctx2) = (net.embed_condition(i, Condition(label=label)) for label in labels)
    assert torch.equal(c1, c2) and not torch.equal(ctx1, ctx2)


@pytest.mark.slow
@each_arch
def test_blocks_compile_whole(arch):
    net, x, i, cond = ready(arch, "class")
    eps = net(x, i, cond)
    for block in net.blocks:
        block.compile(fullgraph=True, backend="eager")
    assert torch.allclose(net(x, i, cond), eps, atol=1e-5)


@pytest.mark.parametrize("arch", ["mmdit", "ditatt", "sd3", "pixart", "mpmmdit"])
def test_a_class_is_one_context_token_and_no_semantics_one_learned_token(arch):
    i = torch.zeros(B)
    _, ctx = build(config(arch, "class")).embed_condition(i, Condition(label=torch.tensor([3, 1, 3, -1])))
    assert ctx.shape == (B, 1, D) and torch.equal(ctx[0], ctx[2])
    assert min((ctx[0] - ctx[1]).abs().max(), (ctx[0] - ctx[3]).abs().max()) > 1e-3
    _, ctx = build(config(arch, "none")).embed_condition(i, Condition())
    assert ctx.shape == (B, 1, D) and torch.equal(ctx[0], ctx[3])


# ---------------------------------------------------------------- positions

GRIDS = [(12, 12), (6, 9), (9, 6), (1, 1), (12, 5), (5, 12), (24, 24), (31, 2)]


def position_net(**changes):
    return build(config("dit", "none", depth=1, **changes))


@pytest.mark.parametrize("base", [0, 7])
def test_positions_are_those_of_the_grid(base):
    net = position_net(pos_base=base)
    assert all(torch.equal(net.positions(rows, columns), sincos_2d(rows, columns, D)) for rows, columns in GRIDS)


@pytest.mark.parametrize("base", [0, 7])
def test_resampled_positions_run_from_0_to_base_at_any_size(base):
    """The first D/2 features are sin and cos of column x f_k, the last of row y f_k; f_k = 10000^(-4k/D)."""
    net, extent = position_net(positions="resample", pos_base=base), base or 12     # 24 pixels in patches of 2
    for rows, columns in GRIDS:
        found = net.positions(rows, columns)
        assert found.shape == (rows * columns, D)
        for axis, n, start in ((1, columns, 0), (0, rows, D // 2)):
            step = extent / (n - 1) if n > 1 else 0
            at = torch.tensor([step * k for k in range(n)], dtype=torch.float64)
            angle = at[:, None] * 10000.0 ** (-4 / D * torch.arange(D // 4, dtype=torch.float64))
            exact = torch.cat([angle.sin(), angle.cos()], 1).float()            # (n, D/2)
            part = found.view(rows, columns, D)[..., start:start + D // 2]
            assert torch.allclose(part, (exact[None] if axis else exact[:, None]).expand_as(part), atol=1e-5)
        assert torch.allclose(found.norm(dim=1), torch.tensor(math.sqrt(D / 2)), rtol=1e-5)


def test_interpolated_positions_are_the_resized_table_and_shorter():
    net = position_net(positions="interpolate", pos_base=8)
    base = sincos_2d(8, 8, D).view(1, 8, 8, D).permute(0, 3, 1, 2)
    for rows, columns in GRIDS:
        found = net.positions(rows, columns)
        exact = F.interpolate(base, (rows, columns), mode="bilinear")[0].flatten(1).T
        assert torch.allclose(found, exact, atol=1e-5) and found.norm(dim=1).max() <= math.sqrt(D / 2) + 1e-4
        assert found.norm(dim=1).mean() < math.sqrt(D / 2) - 1e-3


def test_a_network_at_twice_the_resolution_sees_the_extent_it_was_trained_on():
    small, large = position_net(positions="resample"), position_net(positions="resample", resolution=48, pos_base=12)
    assert torch.equal(large.positions(12, 12), small.pos_embed) and large.pos_embed.shape == (24 * 24, D)
    for name in ("first", "last"):
        corner = {"first": 0, "last": -1}[name]
        assert torch.allclose(large.pos_embed[corner], small.pos_embed[corner], atol=1e-5)
    grid = position_net(resolution=48)
    assert torch.equal(grid.pos_embed.view(24, 24, D)[:12, :12].flatten(0, 1), position_net().pos_embed)


@pytest.mark.parametrize("positions", model.POSITIONS)
def test_positions_are_in_no_state_dict_and_act_at_any_size(positions):
    cfg = config("mmdit", "class", positions=positions, pos_base=5)
    net = build(cfg)
    assert "pos_embed" not in net.state_dict()
    x, i, cond = inputs(cfg, 5, 8)
    eps = net(x, i, cond)
    net.positions = lambda rows, columns: torch.zeros(rows * columns, D)
    assert eps.shape == x.shape and (net(x, i, cond) - eps).abs().max() > 1e-3


# ---------------------------------------------------------------- noise levels

@each_kind
def test_a_network_that_states_v_returns_the_eps_of_its_v(arch, semantics):
    """With v = sqrt(a) eps - sqrt(1-a) x0 for the last layer's answer, x_t = sqrt(a) x0 + sqrt(1-a) eps."""
    cfg = config(arch, semantics, prediction="v")
    net, (x, i, cond) = build(cfg), inputs(cfg)
    said = []
    net.final_layer.register_forward_hook(lambda layer, args, out: said.append(out))
    eps, a = net(x, i, cond), alpha_bar_table("scaled_linear", 1000)[i.long()].float().view(B, 1, 1, 1)
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    assert said[0].std() > 0.01 and torch.allclose(a.sqrt() * eps - (1 - a).sqrt() * x0, said[0], atol=1e-4)
    plain = build(replace(cfg, prediction="eps"))           # the same weights: the same answer, taken for eps
    assert torch.equal(plain(x, i, cond), said[0])


@each_kind
def test_a_network_that_states_v_starts_from_the_best_linear_guess(arch, semantics):
    """v = 0 is eps = sqrt(1-a) x_t, the least-squares estimate from x_t alone of images of unit variance."""
    cfg = config(arch, semantics, CONTROLS, prediction="v", sigma_scale=2.0, schedule="linear")
    x, i, cond = inputs(cfg)
    a = alpha_bar_table("linear", 1000, 2.0)[i.long()].float().view(B, 1, 1, 1)
    assert torch.allclose(build(cfg, random=False)(x, i, cond), (1 - a).sqrt() * x, atol=1e-6)


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_rescale_multiplies_sigma_and_leaves_the_index_and_the_weights_alone(schedule):
    plain, double = (build(config("dit", "class", "size", schedule=schedule, sigma_scale=s)) for s in (1.0, 2.0))
    assert torch.allclose(to_sigma(double.alpha_bar.double()), 2 * to_sigma(plain.alpha_bar.double()), rtol=1e-3)
    assert plain.alpha_bar.shape == (1000,) and "alpha_bar" not in plain.state_dict()
    x, i, cond = inputs(plain.cfg)
    assert torch.equal(plain(x, i, cond), double(x, i, cond))       # x_t changes, the network does not


@pytest.mark.parametrize("rescale", [1.0, 2.0])
@pytest.mark.parametrize("x, last", [(1.0, 353), (2.0, 562)])
def test_the_step_weight_lets_size_act_up_to_the_sigma_of_control_alpha(x, last, rescale):
    """[COND] table A6: sigma <= 1 is i <= 353, sigma <= 2 i <= 562, whatever the rescale: gamma_c is of the index."""
    cfg = config("dit", "none", "size", control_weight="step", control_alpha=x, sigma_scale=rescale)
    net, (x_t, _, cond) = build(cfg), inputs(cfg)
    i = torch.tensor([0.0, last, last + 1, 999])
    moved = (net(x_t, i, cond) - net(x_t, i, replace(cond, size=cond.size * 3 + 100))).flatten(1).abs().amax(1)
    assert (moved > 0).tolist() == [True, True, False, False]


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
    assert set(state) == official_names(2)
    assert state["y_embedder.embedding_table.weight"].shape == (classes + 1, D)
    assert state["x_embedder.proj.weight"].shape == (D, C, P, P)
    assert state["blocks.1.attn.qkv.weight"].shape == (3 * D, D)
    assert state["t_embedder.mlp.0.weight"].shape == (D, 256)
    assert state["final_layer.linear.weight"].shape == (P * P * C, D)


@each_arch
def test_building_is_decided_by_the_seed(arch):
    cfg = config(arch, "class", CONTROLS)
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
    assert zero == ends | {f"blocks.{k}.adaLN_modulation.1.weight" for k in range(2)}
    assert not any(p.any() for n, p in net.named_parameters() if n.endswith("bias"))


@each_arch
def test_load_gives_back_network_and_config(arch, tmp_path):
    cfg = Config(lr=0.5, model=config(arch, "class", CONTROLS))
    net = build(cfg.model)
    path = tmp_path / "weights.safetensors"
    checkpoint.write_weights(path, net.state_dict(), {"config": to_json(cfg)})
    x, i, cond = inputs(cfg.model)
    for where in (path, str(tmp_path)):
        back, read = model.load(where)
        assert read == cfg and torch.equal(back(x, i, cond), net(x, i, cond))
        assert not back.training and not any(p.requires_grad for p in back.parameters())


def test_load_refuses_weights_of_another_model(tmp_path):
    checkpoint.write_weights(tmp_path / "weights.safetensors", build(config("dit", "class")).state_dict(),
                             {"config": to_json(Config(model=config("dit", "class", depth=1)))})
    with pytest.raises(UserError, match="blocks.1"):
        model.load(tmp_path)


# ---------------------------------------------------------------- counting

def formula(cfg, height, width):
    """FLOPs in closed form: two for every multiply-add of blocks, embeddings, modulations and the final layer.

    Context tokens add to the blocks and have layers of their own; controls add an MLP a group; the mp architectures
    have the number 1 beside a patch and beside a token of text."""
    D, P, N = cfg.width, cfg.patch, (height // cfg.patch) * (width // cfg.patch)
    L, one = {"none": 1, "class": 1, "text": cfg.text_length}[cfg.semantics], cfg.arch.startswith("mp")
    mac = sum(block_products(cfg, k == cfg.depth - 1, N, L) for k in range(cfg.depth))
    mac += N * D * (2 * P * P * cfg.channels + one) + (256 + D) * D
    m, before = halves(cfg)
    mac += (2 * m if cfg.arch == "pixart" else before) * D * D // 2     # one layer for all blocks, or of the last layer
    if cfg.arch not in ("dit", "mpdit"):
        mac += {"none": 0, "class": 2 * D * D, "text": L * D * (cfg.text_dim + one + D)}[cfg.semantics]
    numbers, names = {"crop": 2, "flip": 1, "size": 2}, model.control_names(cfg)
    groups = [sum(numbers[c] for c in names if (c == "size") == low) for low in (False, True)]
    return 2 * (mac + sum(256 * n * D + D * D for n in groups if n))


def halves(cfg):
    """The rows of one sub-layer's modulation, and of the parts before it, in halves of D."""
    parts = model.modulation_parts(cfg)
    return [sum(MODULATION_PARTS[part] for part in p) for p in (parts, input_parts(parts))]


def block_products(cfg, last, N, L):
    """Multiply-adds of one block: modulation, then the layers on N image and L context tokens, then q k^T and a v."""
    D, M, Q = cfg.width, N + L, N if last else N + L        # keys; queries, in blocks whose last drops context's
    m, before = halves(cfg)
    modulation, layers, attention = {
        "dit": (2 * m, 12 * N, N * N),
        "mmdit": (2 * m, 12 * N + (2 if last else 4) * L, Q * M),
        "ditatt": (2 * m + (before if last else m), 12 * N + 4 * L, M * M),
        "sd3": (2 * m + (before if last else 2 * m), 12 * N + (2 if last else 12) * L, Q * M),
        "pixart": (0, 14 * N + 2 * L, N * M) if cfg.semantics == "text" else (0, 12 * N + 2 * L, N * N),
    }[cfg.arch.removeprefix("mp")]
    return modulation * D * D // 2 + layers * D * D + 2 * attention * D


@pytest.mark.parametrize("arch, semantics, controls", [
    pytest.param(*p.values, marks=[] if p.values[0] in ("dit", "mpmmdit") else pytest.mark.slow)
    for p in EVERY if p.values[2] or p.values[0] == "dit"])
def test_flops_are_those_of_the_closed_formula(arch, semantics, controls):
    cfg = config(arch, semantics, controls)
    assert model.flops(cfg, h * P, w * P) == formula(cfg, h * P, w * P)


@each_arch
def test_flops_are_those_of_a_pass_with_values_and_counting_draws_nothing(arch):
    cfg, state = config(arch, "class", control_alpha=7.0), torch.get_rng_state()        # alpha: no count is cached
    flops = model.flops(cfg, h * P, w * P)
    assert torch.equal(state, torch.get_rng_state())
    net, (x, i, cond) = build(cfg).requires_grad_(False), inputs(cfg)
    for net.dtype in (torch.float32, torch.bfloat16):       # on a CPU attention is fused in one, products in the other
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            net(x, i, cond)
        assert counter.get_total_flops() == B * flops


def test_the_formula_of_dit_is_that_of_the_docstring():
    cfg = config("dit", "class")
    N, depth = 12 * 12, cfg.depth
    blocks = depth * (12 * D * D * N + 2 * N * N * D + 6 * D * D)
    assert model.flops(cfg) == 2 * (blocks + N * D * P * P * 2 * C + 2 * D * D + (256 + D) * D)
    assert "2 [ depth (12 D^2 N + 2 N^2 D + 6 D^2) + N D P^2 2 C" in model.flops.__doc__


@each_arch
def test_flops_of_two_blocks_of_xl_are_those_of_the_closed_formula(arch):
    cfg = replace(tables.XL2, arch=arch, semantics=model.arch_class(arch).semantics[-1], depth=2)
    assert model.flops(cfg, 32, 64) == formula(cfg, 32, 64)


def test_flops_are_of_the_training_resolution_by_default():
    cfg = config("mmdit", "text")
    assert model.flops(cfg) == model.flops(cfg, 24, 24) != model.flops(cfg, 24, 48)


@pytest.mark.parametrize("size, millions, gmac", [
    ("S", 33, 6.06), *(pytest.param(*row, marks=pytest.mark.slow) for row in (
        ("B", 130, 23.01), ("L", 458, 80.71), ("XL", 675, 118.64)))])
def test_dit_has_the_published_size_and_cost(size, millions, gmac):
    """Table 4 of the DiT paper, whose Gflops are multiply-adds and whose output also has variances."""
    cfg = ModelConfig(arch="dit", semantics="class", classes=1000, channels=4, patch=2, **SIZES[size])
    with torch.device("meta"):
        count = sum(p.numel() for p in model.build(cfg).parameters())
    assert round(count / 1e6) == millions
    assert model.flops(cfg) / 2e9 == pytest.approx(gmac, abs=0.03)


def test_the_table_prints_every_architecture_and_size(monkeypatch):
    sizes = {"XXS": dict(width=D, depth=1, heads=H), "XXL": dict(width=2 * D, depth=1, heads=H)}
    monkeypatch.setattr(tables, "SIZES", sizes)
    monkeypatch.setattr(model, "ARCHS", {arch: model.ARCHS[arch] for arch in ("dit", "pixart", "mpmmdit")})
    lines = tables.table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == [f"{a}-{s}/2" for a in model.ARCHS for s in sizes]
    for line, (arch, size) in zip(lines[1:], ((a, s) for a in model.ARCHS for s in sizes)):
        cfg = replace(tables.XL2, arch=arch, semantics="class", **sizes[size])
        assert line.split()[1:] == [f"{tables.parameters(cfg):,}", f"{formula(cfg, 32, 32) / 1e9:.2f}"]


def test_the_command_prints_three_tables_and_takes_no_options(monkeypatch, capsys):
    for name in ("table", "table_a1", "table_mag"):
        monkeypatch.setattr(tables, name, lambda name=name: name)
    tables.main([])
    assert capsys.readouterr().out.split() == ["table", "table_a1", "table_mag"]
    with pytest.raises(UserError, match="--table"):
        tables.main(["--table"])


# parameters of the reading; what our last block leaves out, in layers D -> D; streams with an RMSNorm of q and k
READ = {"DiT class": (678.210, 0, 0), "DiT by attention, class": (792.440, 1, 1), "mmDiT class": (792.440, 1, 1),
        "mmDiT text": (790.845, 1, 1), "mmDiT of SD3, text": (1331.351, 1, 2), "PixArt class": (611.698, 0, 1),
        "PixArt text": (610.103, 0, 2)}


@pytest.mark.parametrize("name", READ)
def test_xl_models_have_the_parameters_of_the_reading(name):
    """But for one layer of the last block that nothing would read, and for 2 d gains a block and stream."""
    D, d, depth, (reading, layers, streams) = 1152, 72, 28, READ[name]
    gains = 2 * d * depth * streams - (d if "SD3" in name else 0)             # the last context has no q
    alike = tables.counted_alike(replace(tables.XL2, **tables.TABLE_A1[name][0]))
    assert alike - gains + layers * (D * D + D) == pytest.approx(reading * 1e6, abs=501)    # given to 1000
    assert alike == pytest.approx(reading * 1e6, rel=0.002) and tables.TABLE_A1[name][1] == reading


def test_the_controls_are_counted_as_one_mlp():
    """[COND]'s six scalars have 3,098,880 weights at D = 1152; ours are those of the control embedding."""
    assert tables.control_parameters(6, 1152) == 3_098_880
    for controls, ours in (("crop", 2), ("crop+flip", 3), ("size", 2)):
        net = build(config("dit", "none", controls))
        assert sum(p.numel() for p in net.control_embedder.parameters()) == tables.control_parameters(ours, D)
    small = config("mmdit", "class", "crop+flip+size")
    swapped = tables.parameters(small) - sum(tables.control_parameters(n, D) for n in (3, 2))
    assert tables.counted_alike(small) == swapped + tables.control_parameters(6, D) + 144 * D     # 12 x 12 positions


@pytest.mark.slow
def test_table_a1_prints_ours_the_reading_and_the_paper_with_their_differences(monkeypatch):
    """At depth 2: what the numbers are at depth 28 is tested beside."""
    monkeypatch.setattr(tables, "XL2", replace(tables.XL2, depth=2))
    lines = tables.table_a1().splitlines()
    rows = {line[:23].strip(): line[23:].replace("%", "").split() for line in lines[2:lines.index("")]}
    assert list(rows) == list(tables.TABLE_A1)
    for name, (fields, reading, *paper) in tables.TABLE_A1.items():
        cfg = replace(tables.XL2, controls="crop+flip+size", **fields)
        millions = [tables.parameters(cfg) / 1e6, tables.counted_alike(cfg) / 1e6]
        costs = [model.flops(cfg, n, n) / 1e9 for n in (32, 64)]
        beside = [(millions[1], reading), (millions[1], paper[0]), (costs[0], paper[1]), (costs[1], paper[2])]
        one, two, three, four = [[theirs, 100 * (ours / theirs - 1)] if theirs else ["-"] for ours, theirs in beside]
        row = [*millions, *one, *two, costs[0], *three, costs[1], *four]
        assert len(row) == len(rows[name])
        for found, exact in zip(rows[name], row):
            assert found == exact or float(found) == pytest.approx(exact, abs=0.006)


@pytest.mark.slow
@pytest.mark.parametrize("name, rel", [
    ("DiT class", 0.001), ("DiT by attention, class", 0.001), ("mmDiT class", 0.002)])
def test_xl_flops_of_a_class_are_those_of_table_a1(name, rel):
    """The paper's profiler counts norms and activations besides; ours leaves context's work out of the last block."""
    cfg = replace(tables.XL2, controls="crop+flip+size", **tables.TABLE_A1[name][0])
    paper = tables.TABLE_A1[name][-2:]
    assert [model.flops(cfg, n, n) / 1e9 for n in (32, 64)] == pytest.approx(paper, rel=rel)


@pytest.mark.slow
def test_xl_flops_of_text_differ_by_three_layers_a_token():
    """2 x 3 D^2 x 256 tokens x 28 blocks and what the last block leaves out: its two layers and its queries."""
    cfg, D, L = replace(tables.XL2, arch="mmdit", semantics="text"), 1152, 256
    for n in (32, 64):
        N = (n // 2) ** 2
        theirs = model.flops(cfg, n, n) + 2 * (28 * 3 * L * D * D + 2 * L * D * D + 2 * L * (N + L) * D)
        assert theirs / 1e9 == pytest.approx({32: 397.06, 64: 1260}[n], rel=0.0015)


# ---------------------------------------------------------------- what can and cannot be built

TRUNK = """
import torch
from torch import nn

class Mean(nn.Module):
    semantics, options = ("class",), ()

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.blocks = cfg, nn.ModuleList([nn.Linear(cfg.channels, 5), nn.Linear(5, cfg.channels)])

    @staticmethod
    def check_options(cfg):
        pass

    def forward(self, x_t, i, cond):
        mean = self.blocks[1](self.blocks[0](x_t.mean((2, 3))))
        return mean[:, :, None, None].expand_as(x_t)
"""


def test_a_row_of_archs_may_name_a_class_with_a_trunk_of_its_own(tmp_path, monkeypatch):
    """It is imported when it is built, its FLOPs are counted and its errors follow from what it says of itself."""
    (tmp_path / "trunk_of_a_test.py").write_text(TRUNK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(model.ARCHS, "mean", "trunk_of_a_test:Mean")
    cfg = config("mean", "class")
    net, (x, i, cond) = build(cfg), inputs(cfg)
    assert type(net) is model.arch_class("mean") and len(net.blocks) == 2 and net(x, i, cond).shape == x.shape
    assert model.flops(cfg) == 2 * (C * 5 + 5 * C)
    for changes, parts in ((dict(semantics="none"), ["model.arch='mean'", "'mmdit'", "'dit'"]),
                           (dict(mp="cosine"), ["model.arch='mean'", "mpdit, mpmmdit"])):
        with pytest.raises(UserError) as e:
            model.check(replace(cfg, **changes))
        assert all(part in str(e.value) for part in parts), e.value
    with pytest.raises(UserError, match="model.arch='none'.*mpmmdit, mean"):
        model.check(replace(cfg, arch="none"))


@pytest.mark.parametrize("changes, parts", [
    (dict(arch="ditt"), ["model.arch='ditt'", "dit, mmdit, ditatt, sd3, pixart"]),
    (dict(semantics="words"), ["model.semantics='words'", "none, class, text"]),
    (dict(arch="dit", semantics="text"), ["model.arch='dit'", "'mmdit'", "'sd3'"]),
    (dict(arch="ditatt", semantics="text"), ["model.arch='ditatt'", "'mmdit'", "'sd3'"]),
    (dict(positions="grids"), ["model.positions='grids'", "grid, resample, interpolate"]),
    (dict(prediction="x0"), ["model.prediction='x0'", "eps, v"]),
    (dict(schedule="cosine"), ["model.schedule='cosine'", "scaled_linear, linear"]),
    (dict(sigma_scale=0.0), ["model.sigma_scale=0.0", "0.001"]),
    (dict(pos_base=-1), ["model.pos_base=-1"]),
    (dict(width=0), ["model.width=0", "at least 1"]),
    (dict(depth=-1), ["model.depth=-1", "at least 1"]),
    (dict(patch=0), ["model.patch=0", "at least 1"]),
    (dict(heads=0), ["model.heads=0", "at least 1"]),
    (dict(channels=0), ["model.channels=0", "at least 1"]),
    (dict(timesteps=0), ["model.timesteps=0", "at least"]),
    (dict(resolution=25), ["model.resolution=25", "model.patch=2"]),
    (dict(heads=7), ["model.width=40", "model.heads=7"]),
    (dict(width=30), ["model.width=30", "4"]),
    (dict(semantics="class", classes=0), ["model.classes", "0"]),
    (dict(semantics="text", text_dim=0), ["model.semantics='text'", "model.text_dim, got 0"]),
    (dict(controls="crop+zoom"), ["model.controls='crop+zoom'", "'zoom'", "crop, flip, size"]),
    (dict(controls="size", control_weight="cosin"), ["model.control_weight='cosin'", "cosine, uniform, linear"]),
    (dict(controls="size", control_alpha=0.0), ["model.control_alpha=0.0"]),
    (dict(controls="size", timesteps=1), ["model.timesteps=1"]),
])
def test_a_model_that_cannot_be_built_is_a_user_error(changes, parts):
    cfg = replace(config("mmdit", "text"), **changes)
    with pytest.raises(UserError) as e:
        model.build(cfg)
    assert all(part in str(e.value) for part in parts) and "\n" not in str(e.value), e.value


def test_controls_come_in_one_order_however_they_are_written():
    assert model.control_names(config("dit", "none", "size+crop")) == ("crop", "size")
    assert model.control_names(config("dit", "none", "")) == ()
