"""The learning rate, the groups of the optimizer, and rows of unit magnitude: in the step as in the forward pass."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
import optim
from conditioning import timestep_embedding
from config import Config, ModelConfig, UserError
from ema import PowerEMA
from layers import mlp
from mp_layers import MPEmbedding, MPLinear, mp_silu
from runtime.log import LossWindow

CPU = torch.device("cpu")


class Net(nn.Module):
    """A class (of 7) and 5 numbers in, 3 numbers out: rows with a direction, gains, and a plain layer."""
    def __init__(self):
        super().__init__()
        self.embed, self.first = MPEmbedding(7, 11), MPLinear(5, 11)
        self.plain, self.last = nn.Linear(11, 13), MPLinear(13, 3, gain=0.5)

    def forward(self, x, label):
        return self.last(mp_silu(self.plain(mp_silu(self.first(x) + self.embed(label)))))


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Net().to(dtype)


def batch(step, m, dtype=torch.float32):
    """Microbatch m of a step: inputs (4, 5), classes (4,), targets (4, 3)."""
    g = torch.Generator().manual_seed(1000 * step + m)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    return draw(4, 5), torch.randint(7, (4,), generator=g), draw(4, 3)


def train(net, cfg, steps, start=0, dtype=torch.float32, opt=None, window=None, microbatches=2):
    """The step of train.py on microbatches of `batch`; losses, optimizer, rows and window."""
    window = window or LossWindow(CPU)
    rows, losses = optim.normalized_rows(net, cfg), []
    opt = opt or optim.optimizer(net, cfg, window)
    for step in range(start, start + steps):
        optim.set_lr(opt, optim.learning_rate(step, cfg))
        losses.append(0.0)
        for m in range(microbatches):
            x, label, y = batch(step, m, dtype)
            loss = F.mse_loss(net(x, label), y) / microbatches
            loss.backward()
            losses[-1] += loss.item()
        optim.project_grad_(rows)
        window.add_norm(torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip or math.inf), step)
        opt.step()
        optim.renormalize_(rows, window.bad)
        opt.zero_grad(set_to_none=True)
    return losses, opt, rows, window


def rms(w):
    return w.detach().double().square().mean(1).sqrt()


# ---------------------------------------------------------------- learning rate

def test_the_rate_falls_as_one_over_the_root_of_the_step_after_a_constant_phase():
    """[MAG] has a tenth of 400,000 steps constant: 1 at 40,000, a half at 160,000, 0.316228 at the end."""
    cfg = Config(steps=400_000, lr=0.01, warmup=2666, lr_decay_start=0.1)
    rates = [optim.learning_rate(step, cfg) / 0.01 for step in (0, 2665, 39_999, 40_000, 160_000, 400_000)]
    assert rates == pytest.approx([1 / 2666, 1, 1, 1, 0.5, 0.316228], rel=1e-6)
    product = {optim.learning_rate(s, cfg) ** 2 * s for s in range(50_000, 400_000, 50_000)}
    assert max(product) == pytest.approx(min(product), rel=1e-12)


def test_decay_goes_with_warm_up_and_cool_down_and_is_off_at_zero():
    cfg = Config(steps=100, lr=2.0, warmup=50, lr_decay_start=0.04, cooldown=0.2)
    assert optim.learning_rate(0, cfg) == 2.0 / 50
    assert optim.learning_rate(24, cfg) == pytest.approx(2.0 * 0.5 * math.sqrt(4 / 24))
    assert optim.learning_rate(90, cfg) == pytest.approx(2.0 * 0.5 * math.sqrt(4 / 90))
    assert [optim.learning_rate(s, Config(steps=100, warmup=10)) for s in (9, 50, 99)] == [1e-3] * 3


# ---------------------------------------------------------------- groups

def test_groups_have_their_own_rates_and_only_the_rest_decays():
    net, cfg = network(), Config(lr=1e-3, lr_mp=1e-2, weight_decay=0.03)
    opt = optim.optimizer(net, cfg, LossWindow(CPU))
    optim.set_lr(opt, 5e-4)
    names = {id(p): name for name, p in net.named_parameters()}
    found = {tuple(sorted(names[id(p)] for p in g["params"])): (g["lr"], g["weight_decay"]) for g in opt.param_groups}
    assert found == {("plain.bias", "plain.weight"): (5e-4, 0.03), ("last.gain",): (5e-4, 0.0),
                     ("embed.weight", "first.weight", "last.weight"): (pytest.approx(5e-3), 0.0)}
    assert opt.param_groups[0]["lr"] == 5e-4                # which is the one that is logged


def test_rates_of_rows_are_those_of_all_by_default_and_plain_networks_are_one_group():
    opt = optim.optimizer(network(), Config(lr=1e-3), LossWindow(CPU))
    assert {g["lr"] for g in opt.param_groups} == {1e-3} and len(opt.param_groups) == 3
    plain = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    (group,) = optim.optimizer(plain, Config(lr=1e-3, weight_decay=0.03), LossWindow(CPU)).param_groups
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (1e-3, 0.03, 4)
    with pytest.raises(UserError, match="lr_mp=0.01 is for magnitude-preserving weights.*has none"):
        optim.optimizer(plain, Config(lr=1e-3, lr_mp=1e-2), LossWindow(CPU))


def test_the_first_step_of_every_weight_is_its_rate():
    """Adam's first step is lr sign(g); AdamW takes lr weight_decay w off before."""
    net, cfg = network(), Config(lr=1e-3, lr_mp=1e-2, weight_decay=0.5, warmup=0, grad_clip=0.0)
    with torch.no_grad():
        net.last.gain.fill_(2.0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    train(net, cfg, 1)
    for name, rate, decay in (("embed.weight", 1e-2, 0), ("last.weight", 1e-2, 0), ("last.gain", 1e-3, 0),
                              ("plain.weight", 1e-3, 0.5)):
        moved = (net.state_dict()[name] - before[name] * (1 - rate * decay)).abs()
        moved = moved[moved > 0] if name == "embed.weight" else moved           # classes that no sample has
        assert torch.allclose(moved, torch.full_like(moved, rate), rtol=1e-2), name


# ---------------------------------------------------------------- matrices that Muon moves

class Blocks(nn.Module):
    """Two blocks of a square and an oblong layer and one that modulates, and an end that is in no block."""
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(5, 15), "fc2": nn.Linear(15, 5),
                                                   "proj": nn.Linear(3, 3), "odd": nn.Linear(5, 7),
                                                   "adaLN_modulation": nn.Linear(5, 5)}) for _ in range(2))
        self.end = nn.Linear(5, 5)


def gradients(net, seed):
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=g)


def test_orthogonal_sends_singular_values_to_about_one_and_keeps_their_directions():
    """p(p(..p(s)..)) of every singular value s / |s|, by the singular value decomposition of double precision."""
    torch.manual_seed(0)
    u = torch.randn(3, 11, 11, dtype=torch.float64)
    U, S, V = torch.linalg.svd(u)
    s = S / S.norm(dim=1, keepdim=True)
    for _ in range(optim.NS_STEPS):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    assert torch.allclose(optim.newton_schulz(u), U @ torch.diag_embed(s) @ V, atol=1e-6)
    assert 0.67 < s[S / S.norm(dim=1, keepdim=True) > 0.005].min() and s.max() < 1.22
    assert not optim.newton_schulz(torch.zeros(1, 4, 4)).any()


@pytest.mark.parametrize("m, n", [(15, 5), (5, 15), (5, 5)])
def test_a_matrix_is_cut_into_squares_and_put_together_again(m, n):
    w = torch.arange(float(m * n)).view(m, n)
    parts = optim.split_squares(w)
    assert parts.shape == (3 if m != n else 1, 5, 5) and torch.equal(optim.merge_squares(parts, w), w)
    assert torch.equal(parts[-1], w[-5:, -5:])              # three q, k, v of a width of 5, not every third row


def test_muon_is_as_torch_has_it_on_squares_and_adamw_moves_the_rest():
    """Ten steps of another implementation: torch.optim.Muon on the squares themselves, AdamW alone on all else.

    torch's works in bfloat16, whose last bit, 0.4 %, small singular values magnify up to 3.44^5 times: 2.1 % in all."""
    cfg = Config(lr=1e-3, lr_muon=0.02, weight_decay=0.1, warmup=0)
    torch.manual_seed(1)
    net = Blocks()
    theirs, alone, steps = copy.deepcopy(net), copy.deepcopy(net), 10
    opt = optim.optimizer(net, cfg, LossWindow(CPU))
    assert {len(g["params"]): g["lr"] for g in opt.param_groups}[6] == 0.02
    cut = [(b[k].weight, [nn.Parameter(part.clone()) for part in optim.split_squares(b[k].weight.detach())])
           for b in theirs.blocks for k in ("fc1", "fc2", "proj")]
    muons = [torch.optim.Muon(parts, 0.02, 0.1, momentum=0.95, eps=1e-7) for _, parts in cut]
    adam = torch.optim.AdamW(alone.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        for one in (net, theirs, alone):
            gradients(one, step)
        for (w, parts), other in zip(cut, muons):
            for part, g in zip(parts, optim.split_squares(w.grad)):
                part.grad = g
            other.step()
        opt.step()
        adam.step()
    moved, start = dict(net.named_parameters()), dict(theirs.named_parameters())
    for name, p in alone.named_parameters():
        if not any(k in name for k in ("fc1.w", "fc2.w", "proj.w")):
            assert torch.allclose(moved[name], p, atol=1e-6), name
    for w, parts in cut:
        (name,) = [k for k, v in start.items() if v is w]
        ours = optim.split_squares(moved[name].detach())
        other = torch.stack([part.detach() for part in parts])
        assert (ours - other).norm() < 0.04 * (ours - optim.split_squares(w.detach())).norm()


def test_muon_changes_nothing_from_a_bad_gradient_on_and_its_rate_follows():
    net, window = Blocks(), LossWindow(CPU)
    opt = optim.optimizer(net, Config(lr=1e-3, lr_muon=0.02), window)
    optim.set_lr(opt, 5e-4)
    assert opt.group["lr"] == pytest.approx(0.01) and opt.param_groups[0]["lr"] == 5e-4

    def step(k, value):
        gradients(net, k)
        net.end.weight.grad[0, 0] = net.blocks[1]["fc1"].weight.grad[0, 0] = value
        window.add_norm(torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0), k)
        opt.step()
        return [v.clone() for p in net.parameters() for v in (p.detach(), *opt.state[p].values())]
    first, second = step(0, 0.3), step(1, 0.2)
    assert not any(torch.equal(a, b) for a, b in zip(first, second))
    for k, value in ((2, math.nan), (3, 0.1), (4, math.inf)):
        assert all(torch.equal(a, b) for a, b in zip(second, step(k, value)))


def test_muon_wants_matrices():
    with pytest.raises(UserError, match="muon=0.02 is for blocks' matrices"):
        optim.optimizer(nn.Linear(3, 3), Config(lr=1e-3, lr_muon=0.02), LossWindow(CPU))


def test_muon_moves_every_layer_of_a_block_but_its_modulation():
    cfg = ModelConfig(arch="mmdit", semantics="text", text_dim=24, text_length=4, width=16, depth=2, heads=2)
    net = model.build(cfg)
    named = {id(p): k for k, p in net.named_parameters()}
    assert {named[id(w)] for w in optim.hidden_matrices(net)} == {
        f"blocks.{k}.{part}.weight" for k in (0, 1) for part in ("attn.qkv", "attn.ctx_qkv", "attn.proj", "mlp.fc1",
                                                                 "mlp.fc2")}


# ---------------------------------------------------------------- rows of unit magnitude

def in_forward(net, x, label):
    """Net's function with rows w / |w| inside the graph, written out, without the layers' eps."""
    unit = lambda w: w / w.square().sum(1, keepdim=True).sqrt()
    h = x @ unit(net.first.weight).T + math.sqrt(11) * unit(net.embed.weight)[label]
    h = net.plain(F.silu(h) / 0.5964692111226791)
    return net.last.gain * (F.silu(h) / 0.5964692111226791) @ unit(net.last.weight).T


@pytest.mark.parametrize("forward, tolerance", [
    (in_forward, 1e-11), pytest.param(Net.forward, 1e-3, marks=pytest.mark.slow)])
def test_in_the_step_is_equal_to_in_the_forward_pass_over_100_steps(forward, tolerance):
    """float64, two microbatches a step, a clip that acts, all kinds of weights, warm-up and decay, decaying weights.

    The other form: rows are set to unit RMS before every step, and the forward pass normalises them again inside its
    graph; Adam one tensor at a time. With the layers' own forward, eps 1e-4 beside norms from 2.2 up, nearly so."""
    cfg = Config(steps=100, lr=3e-3, lr_mp=1e-2, warmup=20, lr_decay_start=0.3, grad_clip=0.2, weight_decay=0.1,
                 forced_weight_norm=True)
    ours, theirs = network(dtype=torch.float64), network(dtype=torch.float64)
    losses, _, _, _ = train(ours, cfg, 100, dtype=torch.float64)

    names, clipped = ("embed.weight", "first.weight", "last.weight"), 0
    opts = {name: torch.optim.AdamW([p], 1.0, (0.9, 0.95), weight_decay=0.1 if name.startswith("plain.") else 0.0,
                                    foreach=False) for name, p in theirs.named_parameters()}
    for step in range(100):
        unit_rows_(theirs, names)
        total = torch.zeros((), dtype=torch.float64)
        for x, label, y in (batch(step, m, torch.float64) for m in range(2)):
            total = total + F.mse_loss(forward(theirs, x, label), y) / 2
        theirs.zero_grad()
        total.backward()
        clipped += torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.2).item() > 0.2
        rate = 3e-3 * min(1, (step + 1) / 20) * min(1, 30 / max(1, step)) ** 0.5
        for name, opt in opts.items():
            opt.param_groups[0]["lr"] = rate * (10 / 3 if name in names else 1)
            opt.step()
        assert losses[step] == pytest.approx(total.item(), rel=tolerance), step
    unit_rows_(theirs, names)
    assert 20 < clipped and losses[0] != pytest.approx(losses[-1], rel=0.1)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.allclose(a, b, rtol=0, atol=tolerance), name


@torch.no_grad()
def unit_rows_(net, names):
    for name in names:
        w = net.get_parameter(name)
        w.copy_(w / w.square().mean(1, keepdim=True).sqrt())


def test_one_forward_pass_is_the_same_function_before_and_after_the_rows_are_kept():
    net = network(dtype=torch.float64)
    x, label, _ = batch(0, 0, torch.float64)
    before = net(x, label)
    optim.normalized_rows(net, Config(forced_weight_norm=True))
    assert net.first.normed and net.embed.normed
    assert torch.allclose(net(x, label), before, rtol=1e-3, atol=1e-3)         # eps 1e-4 beside norms from 0.7 up


def test_after_every_step_rows_have_unit_magnitude_and_the_gradient_has_had_no_part_along_them():
    net, cfg = network(), Config(lr=0.1, warmup=0, forced_weight_norm=True)
    _, _, rows, _ = train(net, cfg, 3)
    assert [id(w) for w in rows] == [id(w) for w in (net.embed.weight, net.first.weight, net.last.weight)]
    for w in rows:
        assert torch.allclose(rms(w), torch.ones(len(w), dtype=torch.float64), atol=3e-7)
    x, label, y = batch(9, 0)
    F.mse_loss(net(x, label), y).backward()
    raw = [w.grad.clone() for w in rows]
    optim.project_grad_(rows)
    for w, g in zip(rows, raw):
        kept, w, g = w.grad.double(), w.detach().double(), g.double()
        along = (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True)
        assert torch.allclose(kept, g - along * w, atol=1e-6) and along.abs().max() > 1e-3
        assert (kept * w).sum(1).abs().max() < 1e-6 * g.norm() * w.norm(dim=1).max()


def test_without_normalize_rows_are_left_to_grow():
    """Gradients stand at right angles to rows that are normalised on use: on the whole, steps make them longer."""
    net, cfg = network(), Config(lr=0.1, warmup=0, weight_decay=0.5)
    before = {name: rms(net.get_parameter(name)).mean() for name in ("embed.weight", "first.weight", "last.weight")}
    _, _, rows, _ = train(net, cfg, 60)
    assert rows == [] and not net.first.normed
    assert all(rms(net.get_parameter(name)).mean() > 1.1 * old for name, old in before.items())


def test_a_row_of_zeros_stays_and_renormalizing_again_moves_the_last_bit_at_most():
    w = nn.Parameter(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)))
    w.data[2] = 0
    optim.renormalize_([w])
    once = w.detach().clone()
    optim.renormalize_([w])
    assert not w[2].any() and torch.isfinite(w).all() and torch.allclose(w, once, rtol=2.5e-7)
    wide = nn.Parameter(torch.zeros(2, 1000))
    optim.renormalize_([wide])
    assert not wide.any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_from_a_bad_gradient_on_not_one_bit_changes(value):
    net, cfg = network(), Config(lr=0.1, warmup=0, forced_weight_norm=True, grad_clip=1.0)
    _, opt, rows, window = train(net, cfg, 3)
    state = lambda: [v.clone() for p in net.parameters() for v in (p.detach(), *opt.state[p].values())]
    before = state()
    for step, poison in ((3, value), (4, 0.1), (5, 0.1)):
        for p in net.parameters():
            p.grad = torch.full_like(p, 0.1)
        net.first.weight.grad[1, 2] = poison
        optim.project_grad_(rows)
        window.add_norm(torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip), step)
        opt.step()
        optim.renormalize_(rows, window.bad)
        assert all(torch.equal(a, b) for a, b in zip(before, state()))
    assert window.bad.item() == 1 and window.bad_step.item() == 3


def test_going_on_from_weights_and_optimizer_is_exact():
    cfg = Config(steps=20, lr=1e-2, lr_mp=2e-2, warmup=4, lr_decay_start=0.5, forced_weight_norm=True)
    whole, first, second = network(), network(), network(5)
    straight, _, _, _ = train(whole, cfg, 12)
    _, opt, _, _ = train(first, cfg, 7)
    window = LossWindow(CPU)
    optim.normalized_rows(second, cfg)
    resumed = optim.optimizer(second, cfg, window)
    with torch.no_grad():                                   # as checkpoint.read_state does
        for (_, p), (_, q) in zip(second.named_parameters(), first.named_parameters()):
            p.copy_(q)
            for key, v in resumed.state[p].items():
                v.copy_(opt.state[q][key])
    rows = optim.mp_weights(second)
    losses = []
    for step in range(7, 12):
        optim.set_lr(resumed, optim.learning_rate(step, cfg))
        for m in range(2):
            x, label, y = batch(step, m)
            loss = F.mse_loss(second(x, label), y) / 2
            loss.backward()
            losses.append(loss.item())
        optim.project_grad_(rows)
        window.add_norm(torch.nn.utils.clip_grad_norm_(second.parameters(), cfg.grad_clip), step)
        resumed.step()
        optim.renormalize_(rows, window.bad)
        resumed.zero_grad(set_to_none=True)
    assert [a + b for a, b in zip(losses[::2], losses[1::2])] == straight[7:]
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), whole.parameters()))


def test_microbatches_add_up_to_the_batch_because_the_part_along_a_row_is_linear():
    g = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(4, 6, generator=g, dtype=torch.float64))
    optim.renormalize_([w])
    parts = torch.randn(3, 4, 6, generator=g, dtype=torch.float64)
    apart = []
    for part in (*parts, parts.sum(0)):
        w.grad = part.clone()
        optim.project_grad_([w])
        apart.append(w.grad)
    assert torch.allclose(sum(apart[:3]), apart[3], atol=1e-14)


def test_the_average_of_unit_rows_is_normalised_on_use():
    """It is copied before rows are kept; its own rows are shorter than one, and its function may not rely on them."""
    net, cfg = network(), Config(lr=0.3, warmup=0, forced_weight_norm=True)
    ema = PowerEMA(net, 0.25)
    rows, window = optim.normalized_rows(net, cfg), LossWindow(CPU)
    opt = optim.optimizer(net, cfg, window)
    for step in range(8):
        train(net, cfg, 1, step, opt=opt, window=window)
        ema.update(net, step + 1)
    assert rows and net.first.normed and not ema.net.first.normed
    assert rms(ema.net.first.weight).max() < 0.999 and torch.allclose(rms(net.first.weight),
                                                                      torch.ones(11, dtype=torch.float64), atol=3e-7)
    x, label, _ = batch(0, 0)
    longer = copy.deepcopy(ema.net)
    longer.first.weight.data *= 7
    assert torch.allclose(longer(x, label), ema.net(x, label), atol=1e-3)


def test_a_network_without_such_weights_says_so():
    with pytest.raises(UserError, match="forced_weight_norm=true needs magnitude-preserving.* model.arch='mmdit'"):
        optim.normalized_rows(nn.Linear(3, 2), Config(forced_weight_norm=True))
    assert optim.normalized_rows(nn.Linear(3, 2), Config()) == []


@pytest.mark.parametrize("arch", ["mmdit", "mpmmdit", "mpdit"])
def test_weights_that_read_sinusoids_learn_at_a_share_of_the_rate(arch):
    """All of them and no others; but where rows keep their magnitude, the layer divides by sqrt(K) itself."""
    m = ModelConfig(arch=arch, semantics="none", width=16, depth=1, heads=2, resolution=8, controls="size+flip",
                    mp="")
    net, cfg = model.build(m), Config(lr=1e-3, model=m)
    names = {id(p): name for name, p in net.named_parameters()}
    slow = {names[id(p)] for group in optim.param_groups(net, cfg) if group["scale"] < 1 for p in group["params"]}
    plain = {"t_embedder.mlp.0.weight", "control_embedder.mlps.high.0.weight", "control_embedder.mlps.low.0.weight"}
    assert slow == (plain if arch == "mmdit" else set())


def test_forty_steps_one_way_leave_units_alive_that_read_sinusoids():
    """What pushes all units down moves them by some 128 lr a step at the rate of the rest: SiLU's gradient is gone."""
    alive, x = [], timestep_embedding(torch.arange(0.0, 1000.0, 10), 256)
    for scale in (1.0, optim.SINUSOID_LR_SCALE):
        torch.manual_seed(0)
        net = mlp(256, 8)
        opt = torch.optim.AdamW([net[0].weight], 6e-3 * scale, (0.9, 0.95))
        for _ in range(40):
            net[0](x).mean().backward()
            opt.step()
            opt.zero_grad()
        alive.append((net[0](x) > -3).float().mean().item())
    assert alive[0] < 0.1 and alive[1] > 0.9, alive
