"""Averages of weights: their profile, their width, that they are networks of their own, and any width from two."""
import math
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ema
import model
from config import Config, ModelConfig, UserError, to_json
from ema import (WIDTHS, PowerEMA, find_snapshots, make_emas, posthoc, snapshot_due, solve_coefficients, std_to_gamma,
                 take_snapshot)
from runtime import checkpoint, log


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
    share = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
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


@pytest.mark.parametrize("std, share", [(0.05, 0.947), (0.10, 0.888)])
def test_after_t_steps_of_w_k_equal_to_k_the_average_is_t_times_gamma_plus_1_over_gamma_plus_2(std, share):
    """An average whose old and new weights are exchanged stays at t. A sum for an integral costs at most 1/t."""
    clock, steps = nn.Linear(1, 1, bias=False), 1000
    ema = PowerEMA(clock, std)
    for step in range(1, steps + 1):
        with torch.no_grad():
            clock.weight.fill_(step)
        ema.update(clock, step)
    gamma = std_to_gamma(std)
    assert ema.net.weight.item() / steps == pytest.approx((gamma + 1) / (gamma + 2), abs=1 / steps)
    assert (gamma + 1) / (gamma + 2) == pytest.approx(share, abs=5e-4)


def test_the_average_of_constant_weights_is_those_weights():
    model, other = net(1), PowerEMA(net(2), 0.05)
    for step in range(1, 50):
        other.update(model, step)
    assert torch.equal(flat(other.net), flat(model))


# ---------------------------------------------------------------- snapshots

ABOUT = {"config": to_json(Config()), "classes": "[]", "null_class": "0"}


class Weights(nn.Module):
    """P numbers, and a buffer that stays."""
    def __init__(self, P):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(P))
        self.register_buffer("frequency", 6.28 * torch.randn(7, generator=torch.Generator().manual_seed(3)))


def record(out, steps, snapshots, P=5, std=0.08):
    """A run whose weights are white noise: averages, that of width std among them, and the weights (steps, P)."""
    out.mkdir(exist_ok=True)
    g, weights, seen = torch.Generator().manual_seed(0), Weights(P), []
    kept = make_emas(weights, std, snapshots)
    for step in range(1, steps + 1):
        with torch.no_grad():
            weights.w.copy_(torch.randn(P, generator=g))
        seen.append(weights.w.detach().double().clone())
        ema.update(kept, weights, step)
        if snapshot_due(step, steps, snapshots):
            take_snapshot(out, step, kept, ABOUT)
    return kept, torch.stack(seen)


def profile(std, step, steps):
    """What each of the steps 1 .. steps counts in the average of width std after `step`. (steps,) float64"""
    time = torch.arange(steps + 1, dtype=torch.float64).clamp(max=step) / step
    return (time ** (std_to_gamma(std) + 1)).diff()


@pytest.mark.parametrize("steps, snapshots", [(1000, 7), (10, 10), (64, 1), (10, 25), (97, 10)])
def test_snapshots_are_spread_evenly_and_the_last_is_at_the_end(steps, snapshots):
    when = [step for step in range(1, steps + 1) if snapshot_due(step, steps, snapshots)]
    assert len(when) == min(steps, snapshots) and when[-1] == steps
    gaps = {b - a for a, b in zip([0, *when], when)}
    assert max(gaps) - min(gaps) <= 1
    assert not any(snapshot_due(step, steps, 0) for step in range(1, steps + 1))


def test_a_run_keeps_its_own_width_and_with_snapshots_those_of_the_paper():
    assert list(make_emas(net(), 0.1, 0)) == [0.1]
    assert list(make_emas(net(), 0.1, 5)) == [0.1, 0.05] and list(make_emas(net(), 0.2, 5)) == [0.2, 0.05, 0.1]


def test_a_snapshot_is_a_weights_file_of_its_own(tmp_path):
    cfg = Config(model=ModelConfig(semantics="none", width=16, depth=1, heads=2, resolution=16))
    kept = make_emas(model.build(cfg.model), 0.1, 2)
    with torch.no_grad():
        kept[0.05].net.final_layer.linear.bias.fill_(0.25)
    take_snapshot(tmp_path, 12, kept, {**ABOUT, "config": to_json(cfg)})
    files = sorted(p.name for p in (tmp_path / "snapshots").iterdir())
    assert files == ["step-00000012-ema0.05.safetensors", "step-00000012-ema0.1.safetensors"]
    got, config = model.load(tmp_path / "snapshots" / files[0])
    assert config == cfg and torch.equal(got.final_layer.linear.bias, torch.full((48,), 0.25))
    header = checkpoint.read_header(tmp_path / "snapshots" / files[1])
    assert (header["step"], header["ema"]) == ("12", "0.1")
    assert [(s.step, s.std) for s in find_snapshots(tmp_path)] == [(12, 0.05), (12, 0.1)]


def test_the_same_run_writes_the_same_files_and_keeps_those_that_exist(tmp_path):
    record(tmp_path / "a", 20, 4)
    record(tmp_path / "b", 20, 4)
    a, b = ({s.path.name: checkpoint.read_header(s.path)["sha256"] for s in find_snapshots(tmp_path / name)}
            for name in "ab")
    assert len(a) == 8 and a == b
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a" / "snapshots").iterdir()}
    record(tmp_path / "a", 20, 4)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "a" / "snapshots").iterdir()}


def test_a_full_disk_leaves_no_partial_file_and_training_continues(tmp_path, monkeypatch, capsys):
    real = checkpoint.save_file
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "no space left")
    monkeypatch.setattr(checkpoint, "save_file", full)
    kept = make_emas(Weights(3), 0.1, 2)
    take_snapshot(tmp_path, 1, kept, ABOUT)
    assert list((tmp_path / "snapshots").iterdir()) == [] and "Training continues" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "save_file", real)
    take_snapshot(tmp_path, 1, kept, ABOUT)
    assert len(find_snapshots(tmp_path)) == 2


def test_resuming_deletes_newer_and_unfinished_snapshots(tmp_path):
    log.drop_after(tmp_path, 5)                                 # there are none yet
    record(tmp_path, 20, 4)
    folder = tmp_path / "snapshots"
    (folder / ".tmp-1-step-00000010-ema0.1.safetensors").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    with checkpoint.lock(tmp_path):
        log.drop_after(tmp_path, 14)
    assert sorted({s.step for s in find_snapshots(tmp_path)}) == [5, 10]
    assert sorted(p.name for p in folder.iterdir() if "-ema" not in p.name) == ["notes.txt"]
    assert not list(folder.glob(".tmp*"))


# ---------------------------------------------------------------- any width

def test_coefficients_are_those_of_least_squares_on_a_fine_grid(tmp_path):
    """Independently: profiles as vectors of 4000 cells, the sum of the coefficients eliminated, numpy's solver."""
    record(tmp_path, 24, 6)
    for std, limit in ((0.03, 0.3), (0.07, 0.03), (0.2, 0.2)):
        x, error = solve_coefficients(find_snapshots(tmp_path), std)
        columns = np.stack([profile(s.std, s.step / 24 * 4000, 4000).numpy() for s in find_snapshots(tmp_path)], 1)
        target = profile(std, 4000, 4000).numpy()
        free = columns[:, :-1] - columns[:, -1:]            # the last coefficient is 1 minus the others
        y = np.linalg.lstsq(free, target - columns[:, -1], rcond=None)[0]
        ours, theirs = columns @ x.numpy() - target, free @ y + columns[:, -1] - target
        assert x.sum().item() == pytest.approx(1, abs=1e-12)
        assert np.linalg.norm(ours) == pytest.approx(np.linalg.norm(theirs), rel=2e-3)
        assert np.allclose(x.numpy(), [*y, 1 - y.sum()], atol=2e-2 * abs(x).max().item())
        assert error == pytest.approx(np.linalg.norm(ours) / np.linalg.norm(target), rel=1e-2) and error < limit


@pytest.mark.parametrize("std", WIDTHS)
def test_a_width_that_was_kept_comes_back(tmp_path, std):
    kept, _ = record(tmp_path, 60, 6)
    _, error = solve_coefficients(find_snapshots(tmp_path), std)
    got = posthoc(find_snapshots(tmp_path), std)
    assert error < 1e-6 and torch.allclose(got["w"], kept[std].net.w, rtol=1e-6, atol=1e-7)
    assert got["w"].dtype == torch.float32


def test_another_width_is_the_average_of_that_width_up_to_the_error_that_is_stated(tmp_path):
    """White noise of unit variance: the error is N(0, |sum_s x_s p_s - p|^2), the average itself N(0, |p|^2).

    The RMS over P of them has a relative standard error of 1 / sqrt(2 P); steps for an integral cost 1 / steps."""
    steps, P = 400, 20_000
    kept, seen = record(tmp_path, steps, 10, P)
    x, error = solve_coefficients(find_snapshots(tmp_path), 0.08)
    got = posthoc(find_snapshots(tmp_path), 0.08)["w"].double()
    found = sum(v * profile(s.std, s.step, steps) for v, s in zip(x, find_snapshots(tmp_path)))
    missed = found - profile(0.08, steps, steps)
    off, five = got - kept[0.08].net.w.double(), 5 / math.sqrt(2 * P)
    assert torch.allclose(off, missed @ seen, atol=2e-6)    # fp32 rounding of 400 updates of numbers near 1
    assert off.square().mean().sqrt().item() == pytest.approx(missed.norm().item(), rel=five + 0.01)
    noise = kept[0.08].net.w.double().square().mean().sqrt().item()
    assert off.square().mean().sqrt().item() == pytest.approx(error * noise, rel=2 * five + 0.02)
    assert error < 0.01


def test_weights_and_buffers_that_never_change_come_back_to_the_last_bit(tmp_path):
    weights = Weights(300)
    with torch.no_grad():
        weights.w.normal_(generator=torch.Generator().manual_seed(1))
    kept = make_emas(weights, 0.1, 5)
    for step in range(1, 31):
        ema.update(kept, weights, step)
        if snapshot_due(step, 30, 5):
            take_snapshot(tmp_path, step, kept, ABOUT)
    for std in (0.02, 0.08, 0.28):
        got = posthoc(find_snapshots(tmp_path), std)
        assert torch.equal(got["w"], weights.w.detach()) and torch.equal(got["frequency"], weights.frequency)


def test_more_snapshots_and_nearer_widths_meet_the_profile_better(tmp_path):
    record(tmp_path / "few", 100, 5)
    record(tmp_path / "many", 100, 25)
    few, many = ([solve_coefficients(find_snapshots(tmp_path / name), std)[1] for std in (0.08, 0.15, 0.2, 0.25)]
                 for name in ("few", "many"))
    assert all(b < a / 3 for a, b in zip(few, many)) and sorted(few) == few


# ---------------------------------------------------------------- the command

def test_the_command_writes_weights_that_say_their_width(tmp_path, capsys):
    kept, _ = record(tmp_path, 40, 8)
    ema.main([f"--out={tmp_path}", "--std=0.08"])
    assert "width 0.08 at step 40 from 16 snapshots" in capsys.readouterr().out
    tensors, header = checkpoint.read_weights(tmp_path / "weights-ema0.08.safetensors")
    assert torch.equal(tensors["w"], posthoc(find_snapshots(tmp_path), 0.08)["w"])
    assert {k: header[k] for k in (*ABOUT, "step", "ema")} == {**ABOUT, "step": "40", "ema": "0.08"}
    ema.main([f"--out={tmp_path}", "--std=0.1", "--step=20"])
    early, header = checkpoint.read_weights(tmp_path / "weights-ema0.1-step-00000020.safetensors")
    (there,) = [s.path for s in find_snapshots(tmp_path) if (s.step, s.std) == (20, 0.1)]
    assert header["step"] == "20" and torch.allclose(early["w"], checkpoint.read_weights(there)[0]["w"], atol=1e-6)
    ema.main([f"--out={tmp_path}", "--std=0.28", "--name=wide"])
    assert (tmp_path / "wide.safetensors").exists() and "error is large" in capsys.readouterr().err


@pytest.mark.parametrize("flags, parts", [
    (["--std=0.3"], ["0.289", "0.3"]), (["--std=0"], ["0.289"]), (["--std=-1"], ["0.289"]),
    (["--step=21"], ["--step=21", "10, 20, 30, 40"]), (["--step=10"], ["one snapshot", "--ema_snapshots"]),
    (["--name=a/b"], ["a/b", "folders"]), (["--name=weights"], ["weights"]), (["--sdt=1"], ["--std"]),
    (["--out=nowhere"], ["no snapshots", "nowhere", "--ema_snapshots"]),
])
def test_an_impossible_request_is_an_error_before_anything_is_written(tmp_path, flags, parts):
    record(tmp_path, 40, 4)
    with pytest.raises(UserError) as e:
        ema.main([f"--out={tmp_path}", *flags])
    assert all(part in str(e.value) for part in parts), e.value
    assert os.listdir(tmp_path) == ["snapshots"]


def test_errors_name_snapshots_that_are_damaged(tmp_path):
    record(tmp_path, 40, 4)
    first = find_snapshots(tmp_path)[0].path
    whole = first.read_bytes()
    for content in (whole[:-1], whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:], b""):
        first.write_bytes(content)
        with pytest.raises(UserError, match="damaged") as e:
            posthoc(find_snapshots(tmp_path), 0.08)
        assert first.name in str(e.value)


def test_an_error_of_the_command_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ema.py", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(Path(ema.__file__)), run_name="__main__")
    assert e.value.code == 2 and capsys.readouterr().err.startswith("error: no snapshots")
