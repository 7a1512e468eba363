"""Power-function EMA of the weights, in fp32, and its post-hoc reconstruction at any width from snapshots of two.

python ema.py --out=out/shapes --std=0.08            writes out/shapes/weights-ema0.08.safetensors

A run with --ema_snapshots=N keeps averages of WIDTHS and writes them N times into <out>/snapshots, one weights file
each. [EDM2] sec. 3.2: an average of another width is nearly a weighted sum of them. Dimensions: S snapshots.
"""
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from config import UserError, parse, run
from runtime import checkpoint, log

WIDTHS = (0.05, 0.10)                   # of the averages in snapshots, [EDM2] sec. 3.2
PINV_RTOL = 1e-13                       # singular values below this share of the largest count as zero


def std_to_gamma(std: float) -> float:
    """[EDM2] eq. 123: the exponent gamma of the profile t^gamma of relative width `std`.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved by bisection."""
    if not 0 < std < math.sqrt(1 / 12):
        raise UserError(f"the width of an average must lie in (0, {math.sqrt(1 / 12):.3f}), got {std}")
    low, high = 0.0, 1e6
    for _ in range(200):
        gamma = (low + high) / 2
        wide = math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) > std
        low, high = (gamma, high) if wide else (low, gamma)
    return (low + high) / 2


class PowerEMA:
    """[EDM2] eq. 121-127: theta_hat = beta theta_hat + (1 - beta) theta, beta = (1 - 1/n)^(gamma + 1), step n >= 1.

    Its width is a share of the run so far, so one width suits runs of any length. The decay is a function of the step
    alone; the first update copies the weights. `net` is the average, a network of its own."""
    def __init__(self, net: nn.Module, std: float) -> None:
        self.gamma = std_to_gamma(std)
        self.net = copy.deepcopy(net).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Add the weights after step `step` = 1, 2, ... to the average."""
        beta = (1 - 1 / step) ** (self.gamma + 1)
        torch._foreach_lerp_(list(self.net.parameters()), [p.detach() for p in net.parameters()], 1 - beta)


def make_emas(net: nn.Module, std: float, snapshots: int) -> dict[float, PowerEMA]:
    """Make the averages of a run, by width: its own first, then WIDTHS if it takes snapshots."""
    return {width: PowerEMA(net, width) for width in dict.fromkeys((std, *(WIDTHS if snapshots else ())))}


def update(emas: dict[float, PowerEMA], net: nn.Module, step: int) -> None:
    """Update all averages after step `step` = 1, 2, ..."""
    for ema in emas.values():
        ema.update(net, step)


def snapshot_due(step: int, steps: int, snapshots: int) -> bool:
    """Whether to take a snapshot after `step` = 1, 2, ...: they spread evenly over the run, the last at its end."""
    return step * snapshots // steps > (step - 1) * snapshots // steps


def take_snapshot(out: Path, step: int, emas: dict[float, PowerEMA], metadata: dict[str, str]) -> None:
    """Write the averages of WIDTHS after `step`, unless they exist; `metadata` is the header of the run's weights."""
    for std in WIDTHS:
        path = out / "snapshots" / f"step-{step:08d}-ema{std:g}.safetensors"
        if path.exists():
            continue
        with log.warn_on_disk_error(str(path)):
            path.parent.mkdir(exist_ok=True)
            header = {**metadata, "step": str(step), "ema": f"{std:g}"}
            checkpoint.write_weights(path, emas[std].net.state_dict(), header)


@dataclass(frozen=True)
class Snapshot:
    """One file of <out>/snapshots: the average of width `std` after `step`."""
    path: Path
    step: int
    std: float


def find_snapshots(out: Path) -> list[Snapshot]:
    """Find the snapshots of a run, oldest first. UserError if there are none."""
    paths = sorted((out / "snapshots").glob("step-*.safetensors"))
    if not paths:
        raise UserError(f"no snapshots in {out / 'snapshots'}; train.py writes them with --ema_snapshots=20")
    headers = [checkpoint.read_header(path) for path in paths]
    return [Snapshot(path, int(h["step"]), float(h["ema"])) for path, h in zip(paths, headers)]


def profile_inner_product(t_a: Tensor, gamma_a: Tensor, t_b: Tensor, gamma_b: Tensor) -> Tensor:
    """[EDM2] app. C: the integral of p_a p_b, p(t) = (gamma + 1) t^gamma / t_end^(gamma + 1) from 0 to t_end.

    (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) (t_a / t_b)^gamma_b / t_b for t_a <= t_b. Broadcasts."""
    gamma = torch.where(t_a <= t_b, gamma_b, gamma_a)       # that of the later one
    early, late = torch.minimum(t_a, t_b), torch.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (early / late) ** gamma / late


def solve_coefficients(snapshots: list[Snapshot], std: float) -> tuple[Tensor, float]:
    """[EDM2] app. C: x (S,) such that sum_s x_s p_s is closest to p, the profile of width `std` at the last snapshot.

    Least squares in float64 among the x with sum 1, which leave constant weights unchanged. Also returns the error
    |sum_s x_s p_s - p| / |p|. UserError for fewer than two steps or an impossible width."""
    gamma_r = torch.tensor(std_to_gamma(std), dtype=torch.float64)
    if len({s.step for s in snapshots}) < 2:
        raise UserError(f"one snapshot, {snapshots[0].path.name}, is too few: another width needs two or more; "
                        "train.py writes as many as --ema_snapshots")
    last = max(s.step for s in snapshots)
    t = torch.tensor([s.step / last for s in snapshots], dtype=torch.float64)               # (S,)
    gamma = torch.tensor([std_to_gamma(s.std) for s in snapshots], dtype=torch.float64)
    norm = profile_inner_product(t, gamma, t, gamma).sqrt()         # unit length, as early profiles are very short
    A = profile_inner_product(t[:, None], gamma[:, None], t, gamma) / norm[:, None] / norm                  # (S, S)
    b = profile_inner_product(t, gamma, torch.ones_like(t), gamma_r) / norm
    best, rise = (torch.linalg.pinv(A, rtol=PINV_RTOL, hermitian=True) @ torch.stack([b, 1 / norm], 1)).unbind(1)
    y = best + rise * (1 - (best / norm).sum()) / (rise / norm).sum()
    power = (gamma_r + 1) ** 2 / (2 * gamma_r + 1)          # the squared length of p
    error = (power - 2 * (y @ b) + y @ A @ y).clamp_min(0) / power
    return y / norm, error.sqrt().item()


def posthoc(snapshots: list[Snapshot], std: float) -> dict[str, Tensor]:
    """[EDM2] sec. 3.2: reconstruct the average of width `std` at the last of the snapshots from all of them, by name.

    Sums in float64. UserError as for solve_coefficients, and for a file that is damaged."""
    x, _ = solve_coefficients(snapshots, std)
    total: dict[str, Tensor] = {}
    for share, s in zip(x.tolist(), snapshots):
        tensors, _ = checkpoint.read_weights(s.path)
        for k, v in tensors.items():
            total[k] = total[k].add_(v.double(), alpha=share) if k in total else v.double() * share
    return {k: v.float() for k, v in total.items()}


@dataclass(frozen=True)
class Options:
    """The average to reconstruct."""
    out: str = "out/shapes"         # run folder, as given to train.py
    std: float = 0.1                # width of the average, as a share of the run so far, below 0.289
    step: int = 0                   # step of a snapshot, at which the average ends; 0 = the last
    name: str = ""                  # of the file in <out>, without its ending; empty = from width and step


def main(argv: list[str]) -> None:
    o = parse(argv, Options())
    out, snapshots = Path(o.out), find_snapshots(Path(o.out))
    steps = sorted({s.step for s in snapshots})
    if o.step and o.step not in steps:
        raise UserError(f"--step={o.step} has no snapshot; there are {', '.join(map(str, steps))}")
    name = o.name or f"weights-ema{o.std:g}" + (f"-step-{o.step:08d}" if o.step else "")
    if Path(name).name != name or name == "weights":
        raise UserError(f"--name={name!r} must name a new file in {out}: no folders, and not 'weights'")
    used = [s for s in snapshots if s.step <= (o.step or steps[-1])]
    _, error = solve_coefficients(used, o.std)
    tensors, header = posthoc(used, o.std), checkpoint.read_header(used[-1].path)
    path = out / f"{name}.safetensors"
    header.pop("sha256")                                    # the snapshot's
    checkpoint.write_weights(path, tensors, {**header, "ema": f"{o.std:g}"})
    print(f"average of width {o.std:g} at step {used[-1].step:,} from {len(used)} snapshots, its profile met to "
          f"{100 * error:.2g} %: {path}")
    if error > 0.1:
        log.info(f"note: the error is large; use more snapshots, or a width closer to {WIDTHS[0]} and {WIDTHS[1]}")


if __name__ == "__main__":
    run(main)
