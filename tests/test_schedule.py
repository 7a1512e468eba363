"""Noise levels: the two tables, how they move with resolution, and which of them a sampler visits."""
import math

import pytest
import torch

from schedule import (SCHEDULES, add_noise, ddim_indices, linear_alpha_bar, loss_weights, rescale_alpha_bar,
                      rescale_guidance, scaled_linear_alpha_bar, to_sigma)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("T", [1000, 37])
def test_tables_are_float64_of_length_T_and_fall_from_nearly_one(name, T):
    alpha_bar = SCHEDULES[name](T)
    assert alpha_bar.dtype == torch.float64 and alpha_bar.shape == (T,)
    assert (alpha_bar.diff() < 0).all() and 0 < alpha_bar[-1] and 0.999 < alpha_bar[0] < 1
    assert (to_sigma(alpha_bar).diff() > 0).all()


@pytest.mark.parametrize("name, power, ends", [("scaled_linear", 0.5, (0.00085, 0.012)), ("linear", 1, (1e-4, 0.02))])
def test_betas_come_back_out_of_the_table(name, power, ends):
    alpha_bar = SCHEDULES[name]()
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    low, high = (end ** power for end in ends)
    expected = [(low + k / 999 * (high - low)) ** (1 / power) for k in range(1000)]
    assert torch.allclose(beta, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_other_ends_of_beta_are_used():
    assert scaled_linear_alpha_bar(5, 0.1, 0.1)[-1].item() == pytest.approx(0.9 ** 5)
    assert linear_alpha_bar(3, 0.1, 0.3)[-1].item() == pytest.approx(0.9 * 0.8 * 0.7)


def test_end_values_of_the_scaled_linear_table():
    alpha_bar = scaled_linear_alpha_bar()
    sigma = to_sigma(alpha_bar)
    assert alpha_bar[999].sqrt().item() == pytest.approx(0.068265, abs=5e-7)
    assert sigma[999].item() == pytest.approx(14.614641, abs=5e-7)
    assert sigma[997].item() == pytest.approx(14.438569, abs=5e-7)
    assert (int((sigma <= 1).sum()) - 1, int((sigma <= 2).sum()) - 1) == (353, 562)


# ---------------------------------------------------------------- noising

def test_add_noise_is_the_scaled_sum_and_broadcasts_over_a_batch():
    x0, eps = torch.randn(2, 5, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha_bar = scaled_linear_alpha_bar()[[0, 10, 400, 700, 999]]
    sigma = to_sigma(alpha_bar)[:, None, None, None]
    assert torch.allclose(add_noise(x0, eps, alpha_bar), (x0 + sigma * eps) / (1 + sigma ** 2).sqrt(), atol=1e-12)
    assert add_noise(x0[..., 0, 0], eps[..., 0, 0], alpha_bar).shape == (5, 3)


def test_add_noise_keeps_the_type_of_the_image():
    x0 = torch.randn(2, 3)
    assert add_noise(x0, x0, scaled_linear_alpha_bar(2)).dtype == torch.float32


@pytest.mark.parametrize("i", [0, 353, 999])
def test_noised_unit_data_has_unit_variance(i):
    n = 200_000
    x0, eps = torch.randn(2, 1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
    x_t = add_noise(x0, eps, scaled_linear_alpha_bar()[i:i + 1])
    assert abs(x_t.var().item() - 1) < 4 * math.sqrt(2 / n)


def test_plain_eps_error_is_the_denoising_error_over_sigma_squared():
    g = torch.Generator().manual_seed(0)
    x0, eps, eps_hat = torch.randn(3, 6, 3, 4, 5, dtype=torch.float64, generator=g)
    alpha_bar = scaled_linear_alpha_bar()[[1, 50, 200, 500, 800, 999]][:, None, None, None]
    x_t = add_noise(x0, eps, alpha_bar.flatten())
    x0_hat = (x_t - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()
    assert torch.allclose((x0_hat - x0) ** 2 / to_sigma(alpha_bar) ** 2, (eps_hat - eps) ** 2, rtol=1e-9)


# ---------------------------------------------------------------- other resolutions

def test_rescaling_multiplies_sigma_by_the_ratio_of_the_sides():
    alpha_bar = scaled_linear_alpha_bar()
    doubled = rescale_alpha_bar(alpha_bar, 256, 512)
    assert torch.allclose(to_sigma(doubled), 2 * to_sigma(alpha_bar), rtol=1e-10)
    assert torch.allclose(to_sigma(rescale_alpha_bar(alpha_bar, 32, 24)), 0.75 * to_sigma(alpha_bar), rtol=1e-10)
    assert doubled[999].sqrt().item() == pytest.approx(0.034192, abs=5e-7)
    assert rescale_alpha_bar(torch.tensor(0.5), 256, 512).item() == pytest.approx(0.2)


def test_rescaling_composes_and_undoes():
    alpha_bar = scaled_linear_alpha_bar()
    two = rescale_alpha_bar(rescale_alpha_bar(alpha_bar, 256, 384), 384, 640)
    assert torch.allclose(two, rescale_alpha_bar(alpha_bar, 256, 640), rtol=1e-12)
    assert torch.allclose(rescale_alpha_bar(two, 640, 256), alpha_bar, rtol=1e-12)
    assert torch.equal(rescale_alpha_bar(torch.tensor([0.0, 1.0]), 256, 512), torch.tensor([0.0, 1.0]))


def test_rescaling_keeps_the_doubt_about_the_mean_of_a_patch():
    """One pixel ~ N(0, 1) seen at one level, against the mean of 3 x 3 equal pixels seen at the level of side 3s."""
    alpha_bar, k = scaled_linear_alpha_bar()[[3, 300, 900]], 9
    doubt = lambda a, n: 1 / (1 + n * a / (1 - a))          # posterior variance after n looks with noise (1-a)/a
    assert torch.allclose(doubt(rescale_alpha_bar(alpha_bar, 64, 192), k), doubt(alpha_bar, 1), rtol=1e-10)


def test_guidance_law():
    assert rescale_guidance(1.5, 512 / 256) == pytest.approx(2.0)
    assert rescale_guidance(7.0, 1) == 7.0 and rescale_guidance(1.0, 3) == 1.0
    delta, lam, s = 0.3, 2.5, 4                             # guidance error (1-lam)^2 delta^2 / s^2 stays the same
    assert (1 - rescale_guidance(lam, s)) ** 2 * delta ** 2 / s ** 2 == pytest.approx((1 - lam) ** 2 * delta ** 2)


# ---------------------------------------------------------------- which levels a sampler visits

@pytest.mark.parametrize("steps, spacing, start, step, end", [
    (250, "leading", 997, -4, 1), (50, "leading", 981, -20, 1), (25, "leading", 961, -40, 1),
    (250, "trailing", 999, -4, 3), (50, "trailing", 999, -20, 19), (1000, "trailing", 999, -1, 0),
    (1000, "linspace", 999, -1, 0), (4, "linspace", 999, -333, 0), (2, "linspace", 999, -999, 0),
    (1, "leading", 1, -1, 1), (1, "trailing", 999, -1, 999), (1, "linspace", 999, -1, 999),
])
def test_indices(steps, spacing, start, step, end):
    indices = ddim_indices(1000, steps, spacing)
    assert indices.dtype == torch.int64 and indices.tolist() == list(range(start, end - 1, step))


def test_indices_are_rounded_where_the_steps_do_not_divide_the_table():
    assert ddim_indices(1000, 3, "trailing").tolist() == [999, 666, 332]
    assert ddim_indices(1000, 3, "leading").tolist() == [667, 334, 1]
    assert ddim_indices(1000, 5, "linspace").tolist() == [999, 749, 500, 250, 0]


def test_default_spacing_starts_where_the_noise_comes_from():
    assert ddim_indices(1000, 250).tolist() == ddim_indices(1000, 250, "trailing").tolist()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("T", [1000, 7, 1])
def test_every_number_of_steps_visits_that_many_levels_once(spacing, T):
    for steps in range(1, T + 1):
        indices = ddim_indices(T, steps, spacing)
        assert len(indices) == steps and (indices.diff() < 0).all() and 0 <= indices[-1] and indices[0] < T, steps


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_too_few_or_too_many_steps(steps):
    with pytest.raises(ValueError, match=rf"1 and T = 1000, got {steps}"):
        ddim_indices(1000, steps)


def test_unknown_spacing():
    with pytest.raises(ValueError, match="'even'.*leading, trailing, linspace"):
        ddim_indices(1000, 10, "even")


def test_loss_weights_are_a_power_of_sigma_with_mean_one():
    table = scaled_linear_alpha_bar()
    assert torch.equal(loss_weights(table, 0.0), torch.ones(1000, dtype=torch.float64))
    for power in (0.5, 1.0, 2.0):
        weights = loss_weights(table, power)
        assert weights.mean().item() == pytest.approx(1, abs=1e-12)
        assert weights[562].item() / weights[353].item() == pytest.approx(2 ** power, rel=0.01)    # sigma 2 and 1
