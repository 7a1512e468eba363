"""Averages of weights: their profile, their width, and that they are a network of their own."""
import math

import pytest
import torch
from torch import nn

from ema import PowerEMA, std_to_gamma


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 2))


def run(steps, std):
    """The average of a run of random weights, and those weights (steps, P) in float64."""
    model = net()
    ema, seen = PowerEMA(model, std), []
    for step in range(1, steps + 1):
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape))
        seen.append(flat(model))
        ema.update(model, step)
    return ema, torch.stack(seen)


def flat(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("std, gamma", [(0.10, 6.94), (0.05, 16.97)])
def test_published_widths(std, gamma):
    assert std_to_gamma(std) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("std", [0.28, 0.2, 0.1, 0.03, 0.005])
def test_the_profile_t_to_the_gamma_has_that_width(std):
    gamma = std_to_gamma(std)
    share = (torch.arange(4_000_000, dtype=torch.float64) + 0.5) / 4_000_000
    weight = share ** gamma / (share ** gamma).sum()
    mean = (weight * share).sum()
    assert ((weight * (share - mean) ** 2).sum().sqrt()).item() == pytest.approx(std, rel=1e-4)


@pytest.mark.parametrize("std", [0.0, -0.1, 0.3, 1.0, math.nan])
def test_widths_that_no_profile_has(std):
    with pytest.raises(ValueError, match="0.289"):
        std_to_gamma(std)


@pytest.mark.parametrize("std", [0.25, 0.1, 0.05])
@pytest.mark.parametrize("steps", [1, 2, 3, 40])
def test_the_average_is_that_of_the_whole_run_with_weights_t_to_the_gamma(std, steps):
    """Step k stands for the time from k-1 to k: its weight is the integral of t^gamma over it, over that to n."""
    ema, seen = run(steps, std)
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    weight = (time ** (std_to_gamma(std) + 1)).diff()
    assert weight.sum().item() == pytest.approx(1)
    assert torch.allclose(flat(ema.net), weight @ seen, atol=1e-6)


def test_the_first_update_copies_to_the_last_bit():
    ema, seen = run(1, 0.1)
    assert torch.equal(flat(ema.net), seen[0])


def test_the_width_of_the_running_average_is_its_std():
    """Averaging the step number itself gives the profile's mean, averaging its square the variance."""
    class Clock(nn.Module):
        def __init__(self):
            super().__init__()
            self.time = nn.Parameter(torch.zeros(2))
    clock, steps = Clock(), 3000
    ema = PowerEMA(clock, 0.1)
    ema.net.double()                                        # sums of 3000 in fp32 would blur the fourth digit
    for step in range(1, steps + 1):
        clock.time = nn.Parameter(torch.tensor([step / steps, (step / steps) ** 2], dtype=torch.float64))
        ema.update(clock, step)
    mean, square = ema.net.time.tolist()
    assert mean == pytest.approx((ema.gamma + 1) / (ema.gamma + 2), abs=1e-3)
    assert math.sqrt(square - mean ** 2) == pytest.approx(0.1, rel=2e-3)


def test_resuming_from_the_average_and_the_step_alone_is_exact():
    ema, _ = run(9, 0.1)
    other = PowerEMA(ema.net, 0.1)
    last = net(7)
    ema.update(last, 10)
    other.update(last, 10)
    assert torch.equal(flat(ema.net), flat(other.net))


def test_the_average_is_a_copy_in_fp32_in_eval_mode_without_gradients():
    model = net().bfloat16()
    before = flat(model)
    ema = PowerEMA(model, 0.1)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in ema.net.parameters())
    assert model.training and not ema.net.training and all(p.requires_grad for p in model.parameters())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in ema.net.parameters()}
    ema.update(net(3), 5)
    assert torch.equal(flat(model), before) and not torch.equal(flat(ema.net), before)


def test_updating_builds_no_graph_and_leaves_the_weights():
    model = net(1)
    before = flat(model)
    ema = PowerEMA(net(2), 0.1)
    ema.update(model, 4)
    assert torch.equal(flat(model), before) and all(p.grad_fn is None for p in ema.net.parameters())
