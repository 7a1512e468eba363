"""Averages of the weights over the steps of a run, in fp32.

Dimensions: none; an average has the shapes of the weights.
"""
import copy
import math

import torch
from torch import nn


def std_to_gamma(std: float) -> float:
    """[EDM2] eq. 123: the exponent gamma of the profile t^gamma whose relative width is `std`.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic in gamma, solved by bisection."""
    if not 0 < std < math.sqrt(1 / 12):
        raise ValueError(f"the width of an average must lie in (0, {math.sqrt(1 / 12):.3f}), got {std}")
    low, high = 0.0, 1e6
    for _ in range(200):
        gamma = (low + high) / 2
        wide = math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) > std
        low, high = (gamma, high) if wide else (low, gamma)
    return (low + high) / 2


class PowerEMA:
    """[EDM2] eq. 121-127: theta_hat = beta theta_hat + (1 - beta) theta, beta = (1 - 1/n)^(gamma + 1), step n >= 1.

    Its width is a share of the run so far, so it never has to be matched to a run's length. Decay is a function of the
    step alone; the first update copies the weights. `net` is the average, a network of its own."""
    def __init__(self, net: nn.Module, std: float) -> None:
        self.gamma = std_to_gamma(std)
        self.net = copy.deepcopy(net).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Take in the weights after step `step` = 1, 2, ... of the run."""
        beta = (1 - 1 / step) ** (self.gamma + 1)
        torch._foreach_lerp_(list(self.net.parameters()), [p.detach() for p in net.parameters()], 1 - beta)
