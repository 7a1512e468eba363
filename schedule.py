"""Noise levels: how much of the image is left at each of T steps, and what a network predicts of the noise.

    x_t = sqrt(alpha_bar_i) x0 + sqrt(1 - alpha_bar_i) eps,    sigma_i = sqrt((1 - alpha_bar_i) / alpha_bar_i)

alpha_bar_table("scaled_linear", 1000)      alpha_bar of every index i, one of SCHEDULES
PREDICTIONS["v"](out, x_t, alpha_bar)      eps from the output of a network
ddim_indices(1000, 50, "trailing")         the indices that a sampler visits

Tables are float64 tensors of length T, index 0 the cleanest and T-1 the noisiest; t = i / (T-1), so t = 1 is noise.
Dimensions: B batch, C channels, T noise steps.
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor

# The last index of "leading" spacing is shifted by one, as Stable Diffusion's samplers do.
LEADING_OFFSET = 1


def scaled_linear_alpha_bar(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """[COND] app. C, [LDM]: beta_i = linspace(sqrt(b0), sqrt(b1), T)^2, alpha_bar_i = prod_{j<=i} (1 - beta_j). (T,)"""
    return _alpha_bar(torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T, dtype=torch.float64) ** 2)


def linear_alpha_bar(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """[DDPM] sec. 4: beta_i = linspace(b0, b1, T), alpha_bar_i = prod_{j<=i} (1 - beta_j). (T,)"""
    return _alpha_bar(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))


def _alpha_bar(beta: Tensor) -> Tensor:
    return torch.cumprod(1 - beta, dim=0)


SCHEDULES = {"scaled_linear": scaled_linear_alpha_bar, "linear": linear_alpha_bar}


def alpha_bar_table(name: str, T: int, rescale: float = 1.0) -> Tensor:
    """The table that a model trains and samples with: one of SCHEDULES, each sigma multiplied by `rescale`. (T,)"""
    return rescale_alpha_bar(SCHEDULES[name](T), 1.0, rescale)


def rescale_alpha_bar(alpha_bar: Tensor, s: float, s_new: float) -> Tensor:
    """[COND] eq. 3: alpha_bar' = s^2 alpha_bar / (s'^2 + alpha_bar (s^2 - s'^2)), from side s to side s'.

    It multiplies sigma by s'/s: a patch of (s'/s)^2 pixels then leaves the same doubt about its mean as one pixel did
    before. The network sees the same index; training and sampling use the new table."""
    return s ** 2 * alpha_bar / (s_new ** 2 + alpha_bar * (s ** 2 - s_new ** 2))


def rescale_guidance(lam: float, s: float) -> float:
    """[COND] eq. 4: lambda'(s) = 1 + s (lambda - 1), s the linear upsampling factor (512/256 = 2: 1.5 becomes 2.0)."""
    return 1 + s * (lam - 1)


def to_sigma(alpha_bar: Tensor) -> Tensor:
    """[COND] app. C: sigma = sqrt((1 - alpha_bar) / alpha_bar), noise over signal."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """[DDPM] eq. 4: x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, for x0, eps (B, ...) and alpha_bar (B,)."""
    alpha_bar = alpha_bar.view(-1, *[1] * (x0.ndim - 1))                        # (B, 1, ...)
    return (alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps).to(x0.dtype)


def velocity_to_eps(v: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """[PD] app. D: eps = sqrt(1-alpha_bar) x_t + sqrt(alpha_bar) v, v = sqrt(alpha_bar) eps - sqrt(1-alpha_bar) x0.

    At high noise eps is nearly x_t; a network that predicts v need not copy it. v, x_t (B, ...), alpha_bar (B,)."""
    alpha_bar = alpha_bar.view(-1, *[1] * (v.ndim - 1))                         # (B, 1, ...)
    return (1 - alpha_bar).sqrt() * x_t + alpha_bar.sqrt() * v


PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {      # (out, x_t, alpha_bar (B,)) -> eps
    "eps": lambda out, x_t, alpha_bar: out,
    "v": velocity_to_eps,
}


def loss_weights(alpha_bar: Tensor, power: float) -> Tensor:
    """The weight of the loss at index i: sigma_i^power over its mean over all i. (T,)

    Power 0 is the plain loss of [DDPM] eq. 14. A higher power moves the gradient from the last traces of noise to
    high noise, which decides the composition."""
    weights = to_sigma(alpha_bar) ** power
    return weights / weights.mean()


def ddim_indices(T: int, steps: int, spacing: str = "trailing") -> Tensor:
    """[DDIM] sec. 4.2: the noise indices that a sampler visits in `steps` steps, noisiest first. (steps,) int64

    leading   i = (T // steps) k + 1                    Stable Diffusion's: never sees the noisiest index
    trailing  i = round(T - k T / steps) - 1           starts at T-1, the level of pure noise
    linspace  i = round(linspace(T-1, 0, steps))       both ends"""
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be between 1 and T = {T}, got {steps}")
    k = torch.arange(steps, dtype=torch.float64)
    if spacing == "leading":
        stride = T // steps
        return stride * k.flip(0).long() + min(LEADING_OFFSET, T - 1 - stride * (steps - 1))
    if spacing == "trailing":
        return (T - k * T / steps).round().long() - 1
    if spacing == "linspace":
        return torch.linspace(T - 1, 0, steps, dtype=torch.float64).round().long()
    raise ValueError(f"unknown spacing {spacing!r}; there are leading, trailing, linspace")
