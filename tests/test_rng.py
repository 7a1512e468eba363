"""Keyed draws: seeds, permutations, uniform numbers and noise are the same for ever, fair, and independent.

A pinned value that changes means that runs cannot resume and samples cannot be compared: fix the code, not the value.
"""
import ast
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data import index_and_epoch
from rng import keyed_noise, mix, permute, seed64, uniform

ROOT = Path(__file__).parent.parent
SHAPE = (2, 4, 6)
# Purpose of every keyed draw in the library -> its place in the key, and the number of parts of the key.
PURPOSES = {"order": (1, 3), "aug": (1, 4), "caption": (1, 4), "replace": (1, 5), "latent": (1, 4), "coco": (1, 3),
            "scene": (0, 3), "view": (0, 3), "word vectors": (0, 2), "noise": (1, 4), "weights": (1, 2),
            "judge": (1, 2), "padding": (1, 3), "controls": (1, 3), "sample": (1, 3), "step {k}": (1, 3),
            "held out": (1, 3)}


# ---------------------------------------------------------------- the same for ever

def test_seed64_is_the_same_for_ever():
    assert seed64() == 2847183694713211083
    assert seed64(0) == 2631537505891389924
    for key, seed in {(0, "noise", 12, 3): 4852281077346460268, ("scene", 0, "train"): 1715138473254454191,
                      (0, "order", 2): 472171082280217235, (0, "aug", 5, 1): 3740846118770407654,
                      (0, "controls", 7): 5746004398007081802, (0, "caption", 5, 1): 4786649597937616006,
                      (0, "replace", 5, 1, 0): 8311556985828458978, (1, "coco", 42): 4966073325552518790,
                      ("word vectors", 3): 655220656278404304, ("view", 0, "test"): 1336472031497993224}.items():
        assert seed64(*key) == seed, key


@pytest.mark.parametrize("n, seed, epoch, first, digest", [
    (7, 0, 0, [0, 4, 5, 6, 1, 2, 3], ""), (7, 0, 1, [6, 3, 5, 4, 1, 2, 0], ""), (7, 5, 3, [4, 1, 0, 5, 6, 2, 3], ""),
    (10, 0, 0, [0, 9, 5, 7, 1, 2, 3, 6, 4, 8], ""), (10, 5, 3, [4, 1, 0, 8, 7, 2, 9, 6, 5, 3], ""),
    (1000, 0, 0, [99, 606, 918], "d695e303278c59ba"), (1000, 0, 1, [508, 890, 436], "e0b110350faa317a"),
    (1000, 5, 3, [223, 981, 675], "e5f30fbc9fe4f2f0"), (50_000, 0, 0, [4490, 5396, 48974], "acdbc4e910cc16e1"),
    (50_000, 0, 1, [47564, 4515, 45729], "9cf29d71187529fa"),
    (50_000, 5, 3, [41486, 19487, 25292], "06f491f0b4406360")])
def test_the_order_of_samples_is_the_same_for_ever(n, seed, epoch, first, digest):
    """Whole permutations: listed for small n, hashed as int64 for larger ones."""
    order, epochs = index_and_epoch(epoch * n + np.arange(n), n, seed)
    assert order[:len(first)].tolist() == first and (epochs == epoch).all()
    assert np.array_equal(np.sort(order), np.arange(n))
    assert not digest or hashlib.sha256(order.tobytes()).hexdigest().startswith(digest)


def test_the_order_of_samples_of_endless_and_large_sets_is_the_same_for_ever():
    n = 1_281_167
    assert index_and_epoch(2 * n + np.arange(5), n, 3)[0].tolist() == [308435, 1275864, 299038, 1222413, 543890]
    assert index_and_epoch(np.arange(4), 2 ** 31, 1)[0].tolist() == [933810602, 413477005, 1037143683, 1163942701]


@pytest.mark.parametrize("n, pinned", [(10, [0, 5, 6, 2, 7]), (50_000, [5645, 46724, 9622, 44192, 17729])])
def test_permutations_are_the_same_for_ever(n, pinned):
    key = np.full(n, 12345, np.uint64)
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))
    assert permute(np.arange(5), n, key[:5]).tolist() == pinned


@pytest.mark.parametrize("key, pinned", [
    ((0, "noise", 12, 3), [-0.4558087, 0.0398683]), ((5, "sample", 3), [0.4837789, 0.7318547]),
    ((5, "step 3", 3), [1.4360843, -0.5734777]), ((0, "padding", 7), [-1.6901658, 0.9418679]),
    ((2, "latent", 4, 1), [0.2692487, 1.0821962]), ((0, "held out", 9), [-0.7327994, 0.6609039]),
    ((0, "weights"), [2.2816575, 0.2037565]), ((0, "judge"), [-1.3088641, 1.5428041])])
def test_normal_numbers_are_the_same_for_ever(key, pinned):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed64(*key)))
    assert [x[0, 0].item(), x[1, 2].item()] == pytest.approx(pinned, abs=1e-6)


@pytest.mark.parametrize("arguments, pinned", [
    (([3], SHAPE, 5), [-0.4015822, 0.6178170]), (([3], SHAPE, 5, "step 3"), [0.0893678, -1.8036674]),
    (([9], (3, 32, 32), 0, "held out"), [-0.0915898, 0.7769384])])
def test_noise_is_the_same_for_ever(arguments, pinned):
    assert keyed_noise(*arguments).flatten()[[0, -1]].tolist() == pytest.approx(pinned, abs=1e-6)


def test_uniform_numbers_are_the_same_for_ever_and_rows_and_draws_do_not_know_each_other():
    u = uniform(99, np.arange(2000), 6)
    assert u.shape == (2000, 6) and 0 <= u.min() and u.max() < 1
    assert u[[0, 1999], [0, 5]].tolist() == [0.1150787343093348, 0.5847286807139029]
    for key, pinned in ((("scene", 0, "train"), [0.6897623775232038, 0.46448976735742853]),
                        (("view", 0, "test"), [0.6474310573014114, 0.3532559559705919])):
        assert uniform(seed64(*key), np.array([0, 2 ** 31 - 1]), 54)[[0, 1], [0, 53]].tolist() == pinned
    assert np.array_equal(uniform(99, np.array([7, 3]), 4), u[[7, 3], :4])
    assert len(np.unique(u)) == u.size and not (uniform(98, np.arange(2000), 6) == u).any()


def test_purposes_and_shapes_of_keys_never_change():
    """Every string in a key of the library: in calls of seed64 and keyed_noise, and of `noise` in sample.generate."""
    found = {"sample": PURPOSES["sample"]}                  # the default of keyed_noise
    folders = ("", "sources/", "baselines/", "evaluation/", "runtime/", "experiments/")
    for path in [file for folder in folders for file in ROOT.glob(f"{folder}*.py")]:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text if "seed64" in text or "keyed_noise" in text else "")
        for call in [n for n in ast.walk(tree) if isinstance(n, ast.Call)]:
            name = ast.unparse(call.func).split(".")[-1]
            for place, part in enumerate(call.args) if name in ("seed64", "keyed_noise", "noise") else ():
                if isinstance(part, ast.JoinedStr) or isinstance(part, ast.Constant) and isinstance(part.value, str):
                    purpose = ast.unparse(part).removeprefix("f")[1:-1]
                    key = (place, len(call.args)) if name == "seed64" else (1, 3)       # (seed, purpose, index)
                    assert found.setdefault(purpose, key) == key, f"{path.name}: {ast.unparse(call)}"
    assert found == PURPOSES


# ---------------------------------------------------------------- fair and independent

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
    """The first numbers of the published generator from two states, and avalanche: a flipped bit flips half."""
    state = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    step = np.array([0x9E3779B97F4A7C15], np.uint64)
    assert mix(step)[0] == 0xE220A8397B1DCDAF
    flips = mix(step ^ (np.uint64(1) << np.arange(64, dtype=np.uint64))) ^ mix(step)
    assert abs(np.mean([bin(k).count("1") for k in flips.tolist()]) - 32) < 5 * 4 / 8


def test_uniform_numbers_are_uniform_and_uncorrelated():
    u = uniform(17, np.arange(20000), 8)
    assert u.min() >= 0 and u.max() < 1
    cells = np.stack([np.bincount((u[:, k] * 64).astype(int), minlength=64) for k in range(8)])
    chi = ((cells - 312.5) ** 2 / 312.5).sum()                              # 8 x 63 degrees of freedom
    assert abs(chi - 504) < 5 * math.sqrt(2 * 504)
    z = (u - 0.5) * math.sqrt(12)
    other = (uniform(18, np.arange(20000), 8) - 0.5) * math.sqrt(12)       # columns, rows, keys
    beside = [z.T @ z / 20000 - np.diag((z * z).mean(0)), z[1:].T @ z[:-1] / 20000, z.T @ other / 20000]
    assert np.abs(beside).max() < 5 / math.sqrt(20000)


def test_noise_belongs_to_its_index():
    together = keyed_noise([3, 0, 12], SHAPE, seed=5)
    assert together.shape == (3, *SHAPE) and torch.equal(together[2:], keyed_noise([12], SHAPE, seed=5))
    assert torch.equal(together, keyed_noise(np.array([3, 0, 12]), SHAPE, seed=5))
    others = [keyed_noise([3], SHAPE, 6), keyed_noise([4], SHAPE, 5), keyed_noise([3], SHAPE, 5, "step 3")]
    assert all((other - together[:1]).abs().max() > 0.1 for other in others)


def test_noise_is_standard_normal():
    x = keyed_noise(range(200), (3, 16, 16), seed=0)
    n = x.numel()
    assert abs(x.mean().item()) < 4 / math.sqrt(n) and abs(x.var().item() - 1) < 4 * math.sqrt(2 / n)
    across = x.flatten(1).mean(1) * math.sqrt(n / 200)      # means of images, were they independent N(0, 1)
    assert abs(across.var().item() - 1) < 4 * math.sqrt(2 / 200)
