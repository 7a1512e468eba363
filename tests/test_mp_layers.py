"""Magnitude-preserving operations and layers: the lemmas and invariants of the paper.

A root mean square over n independent normal numbers has a standard error of 1/sqrt(2 n) of itself; five of them are
allowed. What has a closed form or an integral is compared with that instead.
"""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import layers
import mp_layers

B, N, D, K, M = 4, 6, 40, 384, 512
ORDER = ("shift", "scale", "rotate", "gate")
SUBSETS = [s for n in range(1, 5) for s in itertools.combinations(ORDER, n)]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rms(x):
    return x.double().square().mean(-1).sqrt()


def gaussian(f):
    """E[f(z)] of z ~ N(0, 1): the trapezoid rule, exact to rounding for a smooth f."""
    z = torch.arange(-20 * 512, 20 * 512 + 1, dtype=torch.float64) / 512
    return (f(z) * torch.exp(-z * z / 2)).sum().item() / 512 / math.sqrt(2 * math.pi)


# ---------------------------------------------------------------- operations

@pytest.mark.parametrize("sigma", [0.25, 1.0, 3.0])
def test_magnitude_of_normal_numbers_is_their_deviation_and_means_count(sigma):
    n = 40_000
    x = sigma * normal(n)
    assert mp_layers.magnitude(x).item() == pytest.approx(sigma, rel=5 / math.sqrt(2 * n))
    assert mp_layers.magnitude(x + 2).item() == pytest.approx(math.hypot(sigma, 2), rel=5 / math.sqrt(n))
    assert mp_layers.magnitude(torch.full((7,), -2.0)).item() == 2.0
    assert mp_layers.magnitude(torch.full((4096,), 300.0).half()).dtype == torch.float32      # 300^2 is beyond fp16


def test_normalize_adds_eps_to_the_norm():
    x = normal(5, K, seed=1, dtype=torch.float64) * torch.tensor([1e-6, 1e-2, 1, 30, 1e4], dtype=torch.float64)[:, None]
    length = x.norm(dim=-1)
    assert torch.allclose(rms(mp_layers.normalize(x)), length / (length + 1e-4), rtol=1e-12)
    assert torch.allclose(mp_layers.normalize(x, eps=0.5), math.sqrt(K) * x / (length[:, None] + 0.5), rtol=1e-12)
    unit = torch.ones(K, dtype=torch.float64)
    assert rms(mp_layers.normalize(unit)).item() == pytest.approx(0.9999949, abs=1e-7)      # not 0.9999, eps on the RMS
    chunks = mp_layers.normalize(x[1:].view(2, 2, K)).view(4, K)
    assert torch.equal(chunks, mp_layers.normalize(x[1:]))


def test_normalize_of_zero_is_zero_forwards_and_backwards():
    x = torch.zeros(3, K, requires_grad=True)
    y = mp_layers.normalize(x)
    y.sum().backward()
    assert (y == 0).all() and x.grad.isfinite().all()


def test_norms_are_taken_in_fp32_under_bf16():
    x = normal(64, K).bfloat16()
    assert mp_layers.normalize(x).dtype == torch.bfloat16
    assert torch.equal(mp_layers.normalize(x), mp_layers.normalize(x.float()).bfloat16())
    big = torch.full((1, 3), 1e30).bfloat16()
    assert torch.isinf(mp_layers.norm(big)).all() == torch.isinf(mp_layers.norm(big.float())).all()


@pytest.mark.parametrize("t, trunk, branch", [(0.3, 0.919145, 0.393919), (0.5, 0.7071068, 0.7071068)])
def test_mp_sum_has_the_weights_of_lemma_4(t, trunk, branch):
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert mp_layers.mp_sum(one, none, t).item() == pytest.approx(trunk, abs=5e-7)
    assert mp_layers.mp_sum(none, one, t).item() == pytest.approx(branch, abs=5e-7)
    alpha = (1 - t) ** 2 / ((1 - t) ** 2 + t ** 2)
    x, y = normal(9, dtype=torch.float64), normal(9, seed=1, dtype=torch.float64)
    assert torch.allclose(mp_layers.mp_sum(x, y, t), math.sqrt(alpha) * x + math.sqrt(1 - alpha) * y, rtol=1e-12)


@pytest.mark.parametrize("tau, rho, expected", [
    (0, 0, 0.91915), (0.25, 0, 0.92441), (0.5, 0, 0.94001), (1, 0, 1), (2, 0, 1.21059),
    (1, -1, 0.52523), (1, -0.5, 0.79871), (1, 0.5, 1.16708), (1, 1, 1.31306)])
def test_mp_sum_of_other_magnitudes_and_correlated_terms(tau, rho, expected):
    n = 100_000
    x, z = normal(n), normal(n, seed=1)
    y = tau * (rho * x + math.sqrt(1 - rho ** 2) * z)
    found = mp_layers.magnitude(mp_layers.mp_sum(x, y, 0.3)).item()
    assert found == pytest.approx(expected, rel=5 / math.sqrt(2 * n) + 1e-5)


@pytest.mark.parametrize("t", [0.2, 0.5])
def test_mp_cat_gives_each_part_its_weight_whatever_its_width(t):
    a, b = torch.ones(3, 5, dtype=torch.float64), torch.ones(3, 11, dtype=torch.float64)
    y = mp_layers.mp_cat(a, b, t)
    assert y.shape == (3, 16) and torch.allclose(rms(y), torch.ones(3, dtype=torch.float64), rtol=1e-12)
    shares = [part[0].square().sum().sqrt().item() for part in (y[:, :5], y[:, 5:])]
    assert shares[1] / shares[0] == pytest.approx(t / (1 - t), rel=1e-12)


def test_mp_silu_has_its_exact_constant():
    assert gaussian(lambda z: F.silu(z) ** 2) ** 0.5 == pytest.approx(mp_layers.SILU_MAGNITUDE, abs=1e-14)
    assert mp_layers.SILU_MAGNITUDE == pytest.approx(0.5964692, abs=5e-8)
    assert gaussian(lambda z: mp_layers.mp_silu(z) ** 2) == pytest.approx(1, abs=1e-12)
    assert gaussian(lambda z: mp_layers.mp_silu(z)) == pytest.approx(0.2066210 / 0.5964692, abs=1e-6)


@pytest.mark.parametrize("sigma, ratio", [(0.25, .857), (0.5, .902), (0.707, .945), (1, 1), (1.5, 1.070), (2, 1.112),
                                          (4, 1.169)])
def test_mp_silu_of_other_magnitudes(sigma, ratio):
    """The notes divide by the rounded 0.596, which makes their ratios 1.0008 times as large."""
    found = gaussian(lambda z: mp_layers.mp_silu(sigma * z) ** 2) ** 0.5 / sigma
    assert found == pytest.approx(ratio, abs=0.0005 + 0.0008 * ratio)


# ---------------------------------------------------------------- rotation

def test_rotation_turns_neighbours_by_their_own_angle():
    x, theta = normal(B, N, D), normal(B, 1, D // 2, seed=1)
    y = torch.empty_like(x)
    for k in range(D // 2):
        a, b, c, s = x[..., 2 * k], x[..., 2 * k + 1], theta[..., k].cos(), theta[..., k].sin()
        y[..., 2 * k], y[..., 2 * k + 1] = a * c - b * s, a * s + b * c
    assert torch.allclose(mp_layers.rotate(x, theta), y, atol=1e-6)
    order = torch.cat([torch.arange(0, D, 2), torch.arange(1, D, 2)])      # pairs (i, i + D/2) of the permuted vector
    half = x[..., order]
    a, b = half.chunk(2, -1)
    turned = torch.cat([a * theta.cos() - b * theta.sin(), a * theta.sin() + b * theta.cos()], -1)
    assert torch.allclose(mp_layers.rotate(x, theta)[..., order], turned, atol=1e-6)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_rotation_preserves_the_magnitude_of_every_token_and_plane(dtype, atol):
    x, theta = normal(B, N, D, dtype=dtype), 9 * normal(B, 1, D // 2, seed=1, dtype=dtype)
    y = mp_layers.rotate(x, theta)
    assert y.dtype == dtype and torch.allclose(rms(y), rms(x), atol=atol, rtol=0)
    planes = [v.unflatten(-1, (-1, 2)).norm(dim=-1) for v in (x, y)]
    assert torch.allclose(*planes, atol=atol, rtol=0)
    assert torch.allclose(mp_layers.rotate(y, -theta), x, atol=10 * atol)
    assert torch.allclose(mp_layers.rotate(x, theta + 2 * math.pi), y, atol=10 * atol)


def test_no_angle_is_the_identity_to_the_last_bit():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = normal(B, N, D).to(dtype)
        assert torch.equal(mp_layers.rotate(x, torch.zeros(B, 1, D // 2)), x)


@pytest.mark.slow
def test_compiled_rotation_is_the_same():
    x, theta = normal(B, N, D), normal(B, 1, D // 2, seed=1)
    compiled = torch.compile(mp_layers.rotate, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x, theta), mp_layers.rotate(x, theta), atol=1e-6)
    assert torch.equal(compiled(x, torch.zeros_like(theta)), x)


def test_angles_are_in_fp32_under_bf16():
    x, theta = normal(B, N, D).bfloat16(), 50 * normal(B, 1, D // 2, seed=1)
    assert torch.equal(mp_layers.rotate(x, theta), mp_layers.rotate(x.float(), theta).bfloat16())
    assert not torch.equal(mp_layers.rotate(x, theta), mp_layers.rotate(x, theta.bfloat16()))


def test_rotation_commutes_with_a_number_and_not_with_a_vector():
    x, theta, s = normal(B, N, D), normal(B, 1, D // 2, seed=1), normal(D, seed=2)
    assert torch.allclose(mp_layers.rotate(3 * x, theta), 3 * mp_layers.rotate(x, theta), atol=1e-5)
    assert (mp_layers.rotate(s * x, theta) - s * mp_layers.rotate(x, theta)).abs().max() > 0.1


@pytest.mark.parametrize("s", [0.5, 1.0])
def test_random_angles_shrink_what_is_left_of_x_by_the_characteristic_function(s):
    n = 40_000
    x, theta = normal(1, n), s * normal(1, n // 2, seed=1)
    left = (x * mp_layers.rotate(x, theta)).sum() / x.square().sum()              # |x_i|^2-weighted mean of cos theta_i
    spread = math.sqrt((1 + math.exp(-2 * s * s)) / 2 - math.exp(-s * s))
    assert left.item() == pytest.approx(math.exp(-s * s / 2), abs=5 * spread * math.sqrt(2) / math.sqrt(n / 2))


# ---------------------------------------------------------------- layers

@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0])
def test_a_linear_layer_preserves_any_magnitude(sigma):
    """Lemma 3. Outputs of one input are M independent normal numbers."""
    torch.manual_seed(0)
    layer, x = mp_layers.MPLinear(K, M), sigma * normal(B, K, seed=5)
    assert layer(x).shape == (B, M)
    found = [mp_layers.magnitude(y).item() / mp_layers.magnitude(v).item() for y, v in zip(layer(x), x)]
    assert found == pytest.approx([1] * B, abs=5 / math.sqrt(2 * M))
    uneven = x * torch.linspace(0, 2, K)                                    # features of unequal magnitude
    before, after = mp_layers.magnitude(uneven).item(), mp_layers.magnitude(layer(uneven)).item()
    assert after == pytest.approx(before, rel=5 / math.sqrt(2 * M))


def test_lemma_3_needs_features_that_do_not_add_up():
    layer = mp_layers.MPLinear(K, M)
    layer.weight.data.fill_(0.7)
    assert mp_layers.magnitude(layer(torch.ones(1, K))).item() == pytest.approx(math.sqrt(K), rel=1e-4)


def test_linear_is_the_formula_and_keeps_fp32_weights_under_bf16():
    torch.manual_seed(0)
    layer, x = mp_layers.MPLinear(K, M, gain=0.8), normal(B, K)
    w = layer.weight.double()
    exact = 0.8 * x.double() @ (w / (w.norm(dim=1, keepdim=True) + 1e-4)).T
    assert torch.allclose(layer(x).double(), exact, atol=1e-5)
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16 and layer.weight.dtype == torch.float32
    assert rms((half.double() - exact).flatten()) < 0.01 * rms(exact.flatten())
    assert {n for n, _ in layer.named_parameters()} == {"weight", "gain"}
    assert {n for n, _ in mp_layers.MPLinear(3, 4).named_parameters()} == {"weight"}


def test_gradients_are_at_right_angles_to_the_rows():
    torch.manual_seed(0)
    layer = mp_layers.MPLinear(K, M, gain=1.0)
    layer(normal(64, K)).mul(normal(64, M, seed=1)).sum().backward()
    g, w = layer.weight.grad.double(), layer.weight.double()
    assert ((g * w).sum(1) / g.norm(dim=1) / w.norm(dim=1)).abs().max() < 1e-5
    assert layer.gain.grad != 0


def test_the_length_of_a_row_has_no_effect_and_the_gain_has():
    torch.manual_seed(0)
    layer, x = mp_layers.MPLinear(K, M, gain=1.0), normal(B, K)
    y = layer(x).detach()
    layer.weight.data[::2] *= 1000
    layer.weight.data[1::2] *= 0.1
    assert (layer(x) - y).abs().max() < 1e-4 * y.abs().max()
    layer.gain.data *= 2
    assert torch.allclose(layer(x), 2 * y, rtol=1e-3, atol=1e-3)


def test_a_layer_with_gain_zero_gives_zero_and_only_its_gain_learns():
    torch.manual_seed(0)
    layer = mp_layers.MPLinear(K, M, gain=0.0)
    y = layer(normal(B, K))
    y.mul(normal(B, M, seed=1)).sum().backward()
    assert (y == 0).all() and layer.gain.grad != 0 and not layer.weight.grad.any() and layer.weight.any()
    assert layer.zero and not mp_layers.MPLinear(K, M).zero and not mp_layers.MPLinear(K, M, gain=1.0).zero


def test_a_plain_layer_is_he_uniform():
    torch.manual_seed(0)
    layer, x = mp_layers.PlainLinear(K, M), normal(B, K)
    assert layer.weight.var().item() == pytest.approx(2 / K, rel=5 * math.sqrt(0.8 / (K * M)))
    assert layer.weight.abs().max() <= math.sqrt(6 / K)
    assert torch.allclose(layer(x), x @ layer.weight.T, atol=1e-5)
    assert layer.zero is False and not mp_layers.PlainLinear(K, M, gain=0.0).weight.any()


def test_an_embedding_has_rows_of_unit_magnitude():
    torch.manual_seed(0)
    table = mp_layers.MPEmbedding(7, K)
    table.weight.data *= torch.arange(1.0, 8)[:, None]
    index = torch.tensor([[0, 6], [3, 3]])
    assert table(index).shape == (2, 2, K) and torch.allclose(rms(table(index)), torch.ones(2, 2).double(), atol=1e-5)
    assert torch.allclose(table(index), mp_layers.normalize(table.weight)[index])


def test_mlp_is_its_formula():
    torch.manual_seed(0)
    x = normal(B, K)
    for mp, act in ((mp_layers.FULL, mp_layers.mp_silu), (("weights",), F.silu), ((), F.silu)):
        net = mp_layers.MPMLP(K, 50, D, mp)
        assert isinstance(net.fc1, mp_layers.MPLinear if mp else mp_layers.PlainLinear)
        assert torch.allclose(net(x), net.fc2(act(net.fc1(x)))) and net(x).shape == (B, D)


# ---------------------------------------------------------------- time features

def test_fourier_features_have_unit_magnitude_at_any_time():
    torch.manual_seed(0)
    n = 2 ** 14
    features = mp_layers.MPFourier(n)(torch.linspace(-3, 3, 9))
    assert features.shape == (9, n)                         # of 2 cos^2 the variance is 1/2
    assert rms(features).tolist() == pytest.approx([1] * 9, abs=5 * math.sqrt(0.5 / n) / 2)


@pytest.mark.parametrize("bandwidth", [1.0, 3.0])
def test_fourier_features_are_smooth_as_their_bandwidth_says(bandwidth):
    torch.manual_seed(0)
    n, distance = 2 ** 14, torch.tensor([0, 0.02, 0.05, 0.1, 0.3])
    features = mp_layers.MPFourier(n, bandwidth)(0.4 + distance).double()
    kernel = torch.exp(-(2 * math.pi * bandwidth * distance.double()) ** 2 / 2)
    assert torch.allclose((features[0] * features).mean(1), kernel, atol=5 / math.sqrt(n))


def test_fourier_features_are_kept_with_the_weights_in_fp32():
    one, two = mp_layers.MPFourier(256), mp_layers.MPFourier(256)
    t = torch.linspace(0, 999, 5)
    assert not torch.equal(one(t), two(t)) and not list(one.parameters())
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(t), two(t)) and all(v.dtype == torch.float32 for v in one.state_dict().values())
    assert one(t.bfloat16()).dtype == torch.float32


# ---------------------------------------------------------------- forced weight normalisation

def network():
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"a": mp_layers.MPLinear(K, D, gain=1.5), "b": mp_layers.MPLinear(D, N),
                               "t": mp_layers.MPEmbedding(5, K),
                               "plain": torch.nn.Linear(N, 3), "bare": mp_layers.PlainLinear(3, 2)})
    for p in net.parameters():
        p.data *= 3
    return net


def run(net, x):
    return net["bare"](net["plain"](net["b"](net["a"](x + net["t"](torch.tensor([4]))))))


def test_normalize_weights_makes_every_mp_row_unit_and_leaves_the_function_and_the_rest_alone():
    net, x = network(), normal(B, K)
    y, before = run(net, x), {k: v.clone() for k, v in net.state_dict().items()}
    mp_layers.normalize_weights_(net)
    after = {k: v.clone() for k, v in net.state_dict().items()}
    for k in ("a.weight", "b.weight", "t.weight"):
        assert torch.allclose(rms(after[k]), torch.ones(len(after[k])).double(), atol=3e-5)
        assert not torch.equal(before[k], after[k])
    assert all(torch.equal(before[k], after[k]) for k in ("a.gain", "plain.weight", "plain.bias", "bare.weight"))
    assert torch.allclose(run(net, x), y, rtol=1e-3, atol=1e-4)
    mp_layers.normalize_weights_(net)
    assert all(torch.allclose(v, after[k], rtol=3e-5) for k, v in net.state_dict().items())


def test_normalised_rows_may_be_relied_on_and_only_those():
    net, x = network(), normal(B, K)
    y = run(net, x)
    mp_layers.assume_normalized_(net, True)
    assert not torch.allclose(run(net, x), y, rtol=0.1)
    mp_layers.normalize_weights_(net)
    relied = run(net, x)
    assert torch.allclose(relied, y, rtol=1e-3, atol=1e-3)
    mp_layers.assume_normalized_(net, False)
    assert torch.allclose(run(net, x), relied, rtol=1e-3, atol=1e-3) and not torch.equal(run(net, x), relied)


# ---------------------------------------------------------------- modulation

def test_parts_lie_side_by_side_as_in_dit():
    m = normal(B, 6 * D)
    a, b = layers.split_modulation(m, layers.ADALN, layers.ADALN)
    for got, exact in zip((a["shift"], a["scale"], a["gate"], b["shift"], b["scale"], b["gate"]), m.chunk(6, 1)):
        assert torch.equal(got, exact[:, None])
    only, none, both = layers.split_modulation(normal(B, 3 * D), ("rotate", "gate"), (), ("rotate", "scale"))
    assert [only["rotate"].shape, only["gate"].shape, both["scale"].shape] == [(B, 1, D // 2), (B, 1, D), (B, 1, D)]
    assert none == {} and layers.modulation_width(ORDER, D) == 7 * D // 2


@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_modulation_by_any_parts_is_scale_then_shift_then_rotate_and_a_gate_after(parts):
    torch.manual_seed(0)
    modulation, x, c = mp_layers.MPModulation(D, parts), normal(B, N, D), normal(B, D, seed=1)
    assert torch.equal(layers.modulate(x, modulation(c)), x)   # at first, to the last bit
    for layer in modulation.layers.values():
        layer.gain.data.fill_(0.7)
    m = modulation(c)
    assert set(m) == set(parts)
    assert all(torch.allclose(v[:, 0], modulation.layers[k](mp_layers.mp_silu(c)), atol=1e-6) for k, v in m.items())
    y = x * (1 + m["scale"]) if "scale" in m else x
    y = y + m["shift"] if "shift" in m else y
    y = mp_layers.rotate(y, m["rotate"]) if "rotate" in m else y
    assert torch.allclose(layers.modulate(x, m), y, atol=1e-5)
    branch, gate = normal(B, N, D, seed=2), m.get("gate")
    gated = branch if gate is None else gate * branch
    assert torch.allclose(layers.gated_residual(x, m, branch), x + gated, atol=1e-5)
    whole = mp_layers.mp_sum(x, branch if gate is None else branch * (1 + gate), 0.3)
    assert torch.allclose(mp_layers.mp_gated_residual(x, m, branch), whole, atol=1e-5)


def test_scale_is_not_magnitude_preserving():
    """M[(1+s) x] = sqrt(1 + M[s]^2) M[x] for s of mean zero; the product of two normal numbers has kurtosis 9."""
    n = 40_000
    x, s = normal(1, 1, n), normal(1, 1, n, seed=1)
    found = mp_layers.magnitude(layers.modulate(x, {"scale": s})).item()
    assert found == pytest.approx(math.sqrt(2), rel=5 * 2 / math.sqrt(n))


def test_modulation_keeps_the_type_of_tokens_and_angles_in_fp32():
    x, m = normal(B, N, D).bfloat16(), {p: normal(B, 1, D // 2 if p == "rotate" else D, seed=k)
                                        for k, p in enumerate(ORDER)}
    assert all(y.dtype == torch.bfloat16
               for y in (layers.modulate(x, m), layers.gated_residual(x, m, x), mp_layers.mp_gated_residual(x, m, x)))
    assert torch.equal(layers.modulate(x, {"rotate": m["rotate"]}), mp_layers.rotate(x.float(), m["rotate"]).bfloat16())
