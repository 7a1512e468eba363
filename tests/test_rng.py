"""Keyed draws: seeds, uniform numbers and noise are the same for ever, fair, and independent of their neighbours.

Permutations are tested through data.index_and_epoch in test_data.py.
"""
import math

import numpy as np
import pytest
import torch

from rng import keyed_noise, mix, permute, seed64, uniform

SHAPE = (2, 4, 6)


def test_seed64_is_the_same_for_ever():
    assert seed64() == 2847183694713211083
    assert seed64(0) == 2631537505891389924
    assert seed64(0, "noise", 12, 3) == 4852281077346460268
    assert seed64("scene", 0, "train") == 1715138473254454191


def test_seed64_fits_every_generator_and_tells_keys_apart():
    seeds = [seed64(a, b) for a in ("noise", "data") for b in range(10_000)]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) and 2 ** 62 < max(seeds) < 2 ** 63
    assert len({seed64(*key) for key in ((1, 2), (12,), ("1", 2), (2, 1), ((1, 2),), (1.0, 2))}) == 6


def test_bits_of_seed64_are_fair():
    n = 4000
    seeds = np.array([seed64("bit", k) for k in range(n)], np.uint64)
    ones = (seeds[:, None] >> np.arange(63, dtype=np.uint64) & np.uint64(1)).sum(0)
    assert (abs(ones - n / 2) < 5 * math.sqrt(n / 4)).all()


def test_mix_is_the_output_of_splitmix64():
    """The first numbers of the published generator from state 1234567."""
    state = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("n, pinned", [(10, [0, 5, 6, 2, 7]), (50_000, [5645, 46724, 9622, 44192, 17729])])
def test_permutations_are_the_same_for_ever(n, pinned):
    key = np.full(n, 12345, np.uint64)
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))
    assert permute(np.arange(5), n, key[:5]).tolist() == pinned


def test_uniform_numbers_are_the_same_for_ever_and_rows_do_not_know_each_other():
    u = uniform(99, np.arange(2000), 6)
    assert u.shape == (2000, 6) and 0 <= u.min() and u.max() < 1
    assert u[[0, 1999], [0, 5]].tolist() == [0.1150787343093348, 0.5847286807139029]
    assert np.array_equal(uniform(99, np.array([7, 3]), 4), u[[7, 3], :4])
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / u.size) and len(np.unique(u)) == u.size
    assert not (uniform(98, np.arange(2000), 6) == u).any()


def test_noise_belongs_to_its_index():
    together = keyed_noise([3, 0, 12], SHAPE, seed=5)
    assert together.shape == (3, *SHAPE) and torch.equal(together[2:], keyed_noise([12], SHAPE, seed=5))
    assert torch.equal(together, keyed_noise(np.array([3, 0, 12]), SHAPE, seed=5))
    assert together[0, 0, 0, :2].tolist() == pytest.approx([-0.4015822, 1.1341368], abs=1e-6)
    others = [keyed_noise([3], SHAPE, 6), keyed_noise([4], SHAPE, 5), keyed_noise([3], SHAPE, 5, "step 3")]
    assert all((other - together[:1]).abs().max() > 0.1 for other in others)


def test_noise_is_standard_normal():
    x = keyed_noise(range(200), (3, 16, 16), seed=0)
    n = x.numel()
    assert abs(x.mean().item()) < 4 / math.sqrt(n) and abs(x.var().item() - 1) < 4 * math.sqrt(2 / n)
    across = x.flatten(1).mean(1) * math.sqrt(n / 200)      # means of images, were they independent N(0, 1)
    assert abs(across.var().item() - 1) < 4 * math.sqrt(2 / 200)
