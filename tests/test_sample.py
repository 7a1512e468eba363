"""Samplers against closed forms, guidance by the passes it makes, and what the table of samplers decides.

Data ~ N(m, s^2) has an exact denoiser, so a sampler has an exact answer.
"""
import math
from dataclasses import replace

import pytest
import torch

import model
from conditioning import Condition, guide
from config import Config, ModelConfig, UserError, fields
from rng import keyed_noise
from sample import SAMPLERS, Options, Sampler, check, ddim, dpmpp, generate, guidance_indices, heun, with_guidance
from schedule import ddim_indices, scaled_linear_alpha_bar, to_sigma

M, S = 0.7, 0.5
SPACINGS = ("trailing", "leading", "linspace")
TABLE = scaled_linear_alpha_bar()
FINE = scaled_linear_alpha_bar(10 ** 6, 0.85e-6, 12e-6)         # the same noise levels, a thousand times as many
EVEN = torch.sigmoid(torch.linspace(14, -5.4, 20_001, dtype=torch.float64))     # uniform in ln(alpha/sigma), 7 to -2.7


def oracle(alpha_bar, s=S):
    """E[eps | x_t] for data ~ N(M, s^2)."""
    def denoise(x, i):
        a = alpha_bar[i.long()].to(x.dtype)[:, None, None, None]
        return (1 - a).sqrt() * (x - a.sqrt() * M) / (a * s ** 2 + 1 - a)
    return denoise


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(sampler, steps, spacing, alpha_bar):
    """Largest distance from the exact solution of dz/dsigma = eps: (z - M) / sqrt(S^2 + sigma^2) is constant."""
    noise = torch.linspace(-3, 3, 9, dtype=torch.float64).view(9, 1, 1, 1)
    sigma = to_sigma(alpha_bar)[ddim_indices(len(alpha_bar), steps, spacing)[0]].item()
    exact = M + (noise * math.sqrt(1 + sigma ** 2) - M) * S / math.sqrt(S ** 2 + sigma ** 2)
    return (sampler(oracle(alpha_bar), noise, alpha_bar, steps, spacing=spacing) - exact).abs().max().item()


# ---------------------------------------------------------------- order

@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_is_first_order(spacing):
    """On a table so fine that it does not show. Twice the steps, half the error."""
    errors = [error(ddim, steps, spacing, FINE) for steps in (80, 160, 320)]
    assert all(1.7 < a / b < 2.1 for a, b in zip(errors, errors[1:])) and errors[-1] < 0.02, errors


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_heun_is_second_order_when_its_last_level_is_next_to_zero(spacing):
    errors = [error(heun, steps, spacing, FINE) for steps in (40, 80, 160)]
    assert all(3.4 < a / b < 4.6 for a, b in zip(errors, errors[1:])) and errors[-1] < 5e-4, errors


def test_heun_gets_more_out_of_as_many_calls_on_the_real_table():
    assert error(heun, 10, "linspace", TABLE) < error(ddim, 20, "linspace", TABLE) / 2
    assert error(heun, 25, "linspace", TABLE) < error(ddim, 50, "linspace", TABLE) / 4


def test_dpmpp_is_second_order_where_levels_are_even_in_log_snr():
    """Twice the steps, a quarter of the error: order two inside, and first-order steps at both ends do not spoil it."""
    errors = [error(dpmpp, steps + 1, "linspace", EVEN) for steps in (40, 80, 160)]
    assert all(3.8 < a / b < 4.2 for a, b in zip(errors, errors[1:])) and errors[-1] < 4e-4, errors
    assert all(error(dpmpp, n, "linspace", EVEN) < error(ddim, n, "linspace", EVEN) / factor
               for n, factor in ((11, 5), (21, 8), (41, 15)))


def test_dpmpp_is_better_than_ddim_on_the_real_table_and_best_with_the_spacing_in_its_row():
    for steps, factor in ((10, 1.25), (20, 1.5), (50, 2)):
        assert error(dpmpp, steps, "trailing", TABLE) < error(ddim, steps, "trailing", TABLE) / factor
    zero_and_one = torch.tensor([0.0, 1]).double().view(2, 1, 1, 1)
    for steps in (10, 20, 50):                              # distance of the samples' normal law from that of the data
        ends = {s: dpmpp(oracle(TABLE), zero_and_one, TABLE, steps, s).flatten() for s in SPACINGS}
        distance = {s: math.hypot(x0[0] - M, x0[1] - x0[0] - S) for s, x0 in ends.items()}
        assert min(distance, key=distance.get) == "trailing" == SAMPLERS["dpmpp"].spacing, distance


def test_dpmpp_equals_ddim_for_one_and_two_steps_and_differs_from_three_on():
    """Its first and last step are first order, and such a step is DDIM's."""
    noise = normal(4, 1, 2, 3)
    gap = [(dpmpp(oracle(TABLE), noise, TABLE, n) - ddim(oracle(TABLE), noise, TABLE, n)).abs().max().item()
           for n in (1, 2, 3)]
    assert max(gap[:2]) < 1e-12 and gap[2] > 5e-3, gap


@pytest.mark.parametrize("sampler, spacing, steps, calls", [(ddim, "trailing", 5, [999, 799, 599, 399, 199]),
                                                            (heun, "linspace", 3, [999, 500, 500, 0, 0]),
                                                            (dpmpp, "trailing", 5, [999, 799, 599, 399, 199])])
def test_calls_of_the_denoiser(sampler, spacing, steps, calls):
    """One at a level for DDIM and DPM-Solver++; for Heun one before and one after each step, except the last.

    i is (B,) float."""
    seen = []

    def denoise(x, i):
        assert i.shape == (2,) and i.dtype == torch.float32 and x.shape == (2, 3, 4, 5)
        seen.append(int(i[0]))
        return torch.zeros_like(x)
    sampler(denoise, normal(2, 3, 4, 5), TABLE, steps, spacing=spacing)
    assert seen == calls


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_data_that_is_one_point_is_hit_exactly(spacing, steps):
    denoise, noise = oracle(TABLE, s=0.0), normal(4, 1, 2, 3)
    for x0 in (ddim(denoise, noise, TABLE, steps, spacing=spacing), heun(denoise, noise, TABLE, steps, spacing),
               dpmpp(denoise, noise, TABLE, steps, spacing),
               ddim(denoise, noise, TABLE, steps, 1.0, spacing, lambda k: normal(4, 1, 2, 3, seed=k))):
        assert torch.allclose(x0, torch.full_like(x0, M), atol=1e-9)


@pytest.mark.parametrize("sampler", [ddim, heun, dpmpp])
def test_one_step_is_the_mean_of_the_data_given_the_noise(sampler):
    noise, a = normal(6, 1, 2, 3), TABLE[999]
    mean = M + a.sqrt() * S ** 2 / (a * S ** 2 + 1 - a) * (noise - a.sqrt() * M)
    assert torch.allclose(sampler(oracle(TABLE), noise, TABLE, 1), mean, atol=1e-12)


@pytest.mark.parametrize("sampler", [ddim, heun, dpmpp])
def test_a_table_of_another_length_and_law_is_followed(sampler):
    alpha_bar = torch.linspace(0.99, 0.01, 37, dtype=torch.float64)
    assert torch.allclose(sampler(oracle(alpha_bar, 0.0), normal(2, 1, 2, 3), alpha_bar, 37), torch.tensor(M).double())


# ---------------------------------------------------------------- added noise

def test_eta_one_is_ancestral_sampling_of_ddpm():
    """x' ~ N(posterior mean, posterior variance) of [DDPM] eq. 7, written with the betas between the levels visited."""
    steps, noise = 20, normal(5, 1, 2, 3)
    z = lambda k: normal(5, 1, 2, 3, seed=100 + k)
    x, visited = noise, ddim_indices(1000, steps).tolist()
    for k, i in enumerate(visited):
        a, a_next = TABLE[i].item(), TABLE[visited[k + 1]].item() if k + 1 < steps else 1.0
        beta = 1 - a / a_next
        x0 = (x - math.sqrt(1 - a) * oracle(TABLE)(x, torch.full((5,), i))) / math.sqrt(a)
        mean = math.sqrt(a_next) * beta / (1 - a) * x0 + math.sqrt(1 - beta) * (1 - a_next) / (1 - a) * x
        x = mean + math.sqrt((1 - a_next) / (1 - a) * beta) * z(k)
    assert torch.allclose(ddim(oracle(TABLE), noise, TABLE, steps, eta=1.0, draw=z), x, atol=1e-10)


def law(steps, eta):
    """Mean and variance of what DDIM makes of noise that follows the law of the noisiest level.

    For Gaussian data the sampler is an affine map of all its noise, so unit impulses show every coefficient."""
    rows = steps + 2                                        # row 0: nothing; 1: the noise; k + 2: the noise of step k
    unit = torch.eye(rows, dtype=torch.float64).view(rows, rows, 1, 1, 1)
    out = ddim(oracle(TABLE), unit[1], TABLE, steps, eta=eta, draw=lambda k: unit[k + 2]).flatten()
    effect, a = out[1:] - out[0], TABLE[999]
    mean = out[0] + effect[0] * a.sqrt() * M
    return mean.item(), (effect[0] ** 2 * (a * S ** 2 + 1 - a) + (effect[1:] ** 2).sum()).item()


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_samples_have_the_mean_of_the_data_and_with_enough_steps_its_variance(eta):
    (_, v250), (mean, v500) = (law(steps, eta) for steps in (250, 500))
    assert mean == pytest.approx(M, abs=1e-9)
    assert S ** 2 - v500 < 0.04 * S ** 2 and 1.6 < (S ** 2 - v250) / (S ** 2 - v500) < 2.1, (v250, v500)


def test_samples_of_the_usual_noise_agree_with_the_law_within_standard_errors():
    n, a = 20_000, TABLE[999]
    noise = a.sqrt() * M + (a * S ** 2 + 1 - a).sqrt() * normal(n, 1, 1, 1, seed=1)
    x0 = ddim(oracle(TABLE), noise, TABLE, 20, eta=0.7, draw=lambda k: normal(n, 1, 1, 1, seed=2 + k))
    mean, variance = law(20, 0.7)
    assert abs(x0.mean().item() - mean) < 4 * math.sqrt(variance / n)
    assert abs(x0.var().item() - variance) < 4 * variance * math.sqrt(2 / n)


def test_added_noise_grows_with_eta_and_is_zero_at_zero():
    noise = normal(3, 1, 2, 2)
    one, two = (lambda k: normal(3, 1, 2, 2, seed=k + 10), lambda k: normal(3, 1, 2, 2, seed=k + 99))
    run = lambda eta, z: ddim(oracle(TABLE), noise, TABLE, 2, eta=eta, draw=z)
    gap = lambda eta: run(eta, one) - run(eta, two)
    assert (gap(0.0) == 0).all() and gap(0.3).abs().mean() > 1e-3
    assert torch.allclose(gap(0.6), 2 * gap(0.3)) and torch.allclose(gap(0.9), 3 * gap(0.3))       # two steps, one draw


def test_noise_is_added_after_each_step_but_the_last():
    steps = []
    ddim(oracle(TABLE), normal(2, 1, 2, 3), TABLE, 4, eta=0.5, draw=lambda k: steps.append(k) or normal(2, 1, 2, 3))
    assert steps == [0, 1, 2]


# ---------------------------------------------------------------- errors

def test_eta_without_a_source_of_noise():
    with pytest.raises(ValueError, match="draw"):
        ddim(oracle(TABLE), normal(1, 1, 2, 3), TABLE, 5, eta=0.5)


@pytest.mark.parametrize("eta", [-0.5, 1.5])
def test_eta_outside_its_range(eta):
    with pytest.raises(ValueError, match=f"eta.*{eta}"):
        ddim(oracle(TABLE), normal(1, 1, 2, 3), TABLE, 5, eta=eta, draw=lambda k: normal(1, 1, 2, 3))


@pytest.mark.parametrize("sampler", [ddim, heun, dpmpp])
def test_more_steps_than_levels_and_unknown_spacing(sampler):
    with pytest.raises(ValueError, match="1001"):
        sampler(oracle(TABLE), normal(1, 1, 2, 3), TABLE, 1001)
    with pytest.raises(ValueError, match="'even'"):
        sampler(oracle(TABLE), normal(1, 1, 2, 3), TABLE, 5, spacing="even")


# ---------------------------------------------------------------- guidance

B, SHAPE = 3, (2, 4, 6)


class Spy:
    """A network whose eps tells what it saw: x, i, label and has_controls; counts calls and rows."""
    def __init__(self):
        self.calls, self.rows = 0, 0

    def __call__(self, x, i, cond):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        out = x * 0.5 + i.to(x).view(-1, 1, 1, 1)
        for weight, v in ((10, cond.label), (100, cond.has_controls), (1000, cond.flip)):
            if v is not None:
                assert len(v) == len(x)
                out = out + weight * (1 + v.to(x)).view(-1, 1, 1, 1)
        return out


def condition():
    return Condition(label=torch.tensor([4, 0, 2]), flip=torch.tensor([1.0, 0, 1]), has_controls=torch.ones(B))


@pytest.mark.parametrize("lam, beta, passes", [
    (2.0, 1.375, 3), (2.0, 0.5, 3), (0.5, 0.5, 3), (2.0, 1.0, 2), (2.0, 0.0, 2), (1.0, 1.375, 2), (1.0, 1.0, 1),
    (1.0, 0.0, 1), (0.0, 0.5, 1)])
def test_only_passes_with_a_weight_are_made_in_one_batch_and_give_the_same(lam, beta, passes):
    spy, cond, x, i = Spy(), condition(), normal(B, *SHAPE), torch.tensor([7.0, 8.0, 9.0])
    eps = with_guidance(spy, cond, lam, beta)(x, i)
    assert (spy.calls, spy.rows) == (1, passes * B)
    s, null = cond.drop(controls=True), cond.drop(semantics=True, controls=True)
    assert torch.allclose(eps, guide(*(Spy()(x, i, c) for c in (cond, s, null)), lam, beta))


def test_guidance_is_confined_to_its_interval():
    cond, x = condition(), normal(B, *SHAPE)
    for i, passes in ((99.0, 1), (100.0, 3), (250.0, 3), (400.0, 3), (401.0, 1)):
        spy, at = Spy(), torch.full((B,), i)
        eps = with_guidance(spy, cond, 2.0, 0.5, interval=(100, 400))(x, at)
        assert (spy.calls, spy.rows) == (1, passes * B)
        assert torch.allclose(eps, with_guidance(Spy(), cond, 2.0, 0.5)(x, at) if passes == 3 else Spy()(x, at, cond))


@pytest.mark.parametrize("low, high", [(0.5, 2.0), (0.0, 1.0), (3.0, 100.0)])
def test_an_interval_of_sigma_is_one_of_indices(low, high):
    first, last = guidance_indices(Options(guidance_interval=f"{low},{high}"), TABLE)
    sigma = to_sigma(TABLE)
    inside = [k for k in range(len(TABLE)) if low <= sigma[k] <= high]
    assert (first, last) == (inside[0], inside[-1])
    assert guidance_indices(Options(), TABLE) is None


def test_guidance_without_controls_has_no_use_for_beta():
    spy, cond, x, i = Spy(), replace(condition(), flip=None, has_controls=None), normal(B, *SHAPE), torch.zeros(B)
    eps = with_guidance(spy, cond, 3.0, 0.3)(x, i)
    assert spy.rows == 2 * B
    assert torch.allclose(eps, 3 * Spy()(x, i, cond) - 2 * Spy()(x, i, cond.drop(semantics=True)))


@pytest.mark.parametrize("cond", [Condition(), Condition(flip=torch.ones(B), has_controls=torch.ones(B))])
def test_guidance_without_semantics(cond):
    x, i = normal(B, *SHAPE), torch.zeros(B)
    free = Spy()(x, i, cond.drop(controls=True))
    assert torch.allclose(with_guidance(Spy(), cond, 3.0)(x, i), free + 3 * (Spy()(x, i, cond) - free))


def test_guidance_of_a_network_follows_the_form_at_three_passes():
    cfg = ModelConfig(semantics="class", classes=5, width=24, depth=2, heads=3, resolution=8, controls="flip+size")
    net = network(cfg)
    cond = replace(condition(), size=torch.tensor([[20.0, 90], [64, 48], [33, 33]]))
    x, i = normal(B, 3, 8, 8).float(), torch.tensor([7.0, 400.0, 999.0])
    one = [net(x, i, c) for c in (cond, cond.drop(controls=True), cond.drop(semantics=True, controls=True))]
    assert (one[0] - one[1]).abs().max() > 1e-3 and (one[1] - one[2]).abs().max() > 1e-3
    assert torch.allclose(with_guidance(net, cond, 2.5, 1.375)(x, i), guide(*one, 2.5, 1.375), atol=1e-4)


# ---------------------------------------------------------------- images

def network(cfg):
    torch.manual_seed(0)
    net = model.build(cfg).eval().requires_grad_(False)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


CFG = Config(guidance=2.0, model=ModelConfig(semantics="class", classes=5, width=16, depth=1, heads=2, resolution=8))
NET = network(CFG.model)
CPU = torch.device("cpu")


@pytest.mark.parametrize("options", [*(Options(sampler=name) for name in SAMPLERS), Options(eta=0.7, guidance=1.0)])
def test_an_image_does_not_depend_on_its_batch(options):
    labels, options = torch.tensor([4, 0, 2]), replace(options, steps=2)
    together = generate(NET, CFG, Condition(label=labels), [3, 0, 12], options, CPU)
    alone = generate(NET, CFG, Condition(label=labels[2:]), [12], options, CPU)
    assert together.shape == (3, 3, 8, 8) and torch.isfinite(together).all()
    assert torch.allclose(together[2:], alone, atol=1e-3 * together.abs().max().item())


def generated(cfg=CFG, **changes):
    """One image of NET, two steps."""
    return generate(NET, cfg, Condition(label=torch.tensor([4])), [1], replace(Options(steps=2), **changes), CPU)


def test_guidance_and_eta_are_the_run_s_own_unless_an_option_sets_them():
    cfg = replace(CFG, guidance=3.0, eta=0.25)
    of = lambda **options: [getattr(check(Options(**options), cfg), key) for key in ("guidance", "eta")]
    assert of() == [3.0, 0.25] and of(guidance=1.0, eta=0.0) == [1.0, 0.0] and of(sampler="heun") == [3.0, 0.0]
    assert check(Options(steps=4), cfg).eta == 0.25
    assert torch.equal(generated(cfg), generated(replace(cfg, eta=0.0), eta=0.25))
    assert not torch.equal(generated(cfg), generated(cfg, eta=0.0))


def test_generate_reads_sampler_steps_spacing_eta_guidance_and_seed():
    usual = generated()
    for changes in (dict(sampler="heun"), dict(steps=3), dict(spacing="linspace"), dict(eta=1.0), dict(guidance=5.0),
                    dict(seed=1)):
        assert (generated(**changes) - usual).abs().max() > 1e-3, changes
    assert torch.equal(usual, generated(guidance=2.0))               # -1 is the guidance scale of the run
    denoise = with_guidance(NET, Condition(label=torch.tensor([4])), 2.0)
    assert torch.allclose(usual, ddim(denoise, keyed_noise([1], (3, 8, 8), 0), TABLE, 2), atol=1e-4)


def test_a_row_of_the_table_is_all_that_a_sampler_needs(monkeypatch):
    """Options, their errors and generate follow from it; only a stochastic sampler is given eta and draw."""
    seen = []

    def euler(denoise, noise, alpha_bar, steps, spacing):
        seen.append((steps, spacing))
        return heun(denoise, noise, alpha_bar, steps, spacing)
    monkeypatch.setitem(SAMPLERS, "euler", Sampler(euler, "leading"))
    assert torch.equal(generated(sampler="euler"), generated(sampler="heun", spacing="leading"))
    assert seen == [(2, "leading")]
    assert check(Options(sampler="euler"), CFG).eta == 0
    with pytest.raises(UserError, match="such as ddim, got sampler='euler'"):
        check(Options(sampler="euler", eta=0.5), CFG)
    with pytest.raises(UserError, match="sampler='x'; there are ddim, heun, dpmpp, euler"):
        check(Options(sampler="x"), CFG)
    assert [row[3] for row in fields(Options()) if row[0] == "sampler"] == ["ddim, heun, dpmpp"]
