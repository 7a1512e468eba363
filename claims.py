"""The papers' claims in miniature: every arm of a comparison trained on shapes, over several seeds, and measured.

python claims.py --claim=flip               (or another of CLAIMS; run again to go on after a stop)

Prints one row an arm, mean and standard deviation over the seeds, and leaves it in <out>/<claim>.txt. Arms of a claim
share data, noise and initial weights, seed by seed. Dimensions: B pictures measured.
"""
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
import judge
import log
import machine
import magnitudes
import model
import sample
from captions import SHAPES
from conditioning import Condition, from_batch
from config import Config, UserError, parse
from data import open_source
from distances import FeatureStats
from schedule import add_noise, rescale_guidance
from shapes_score import score, sharpness

SIZES = (16, 24, 48, 96)                # requested sizes, in pixels, that are compared at 32 px
BETAS = (0.5, 1.5, 2.0)                 # beside 1; at 0 the size has no effect by construction
POOL = 4                                # pictures are compared in squares of so many pixels, which blur does not change
LAM = 2.0                               # lambda at 32 px
STEPS = 25                              # sampling steps
FINE = ("--lr=2e-3", "--muon=0.007")    # peak rates of a run that goes on from another
STILL = ("--lr=2e-3", "--muon=0.001")   # and of one whose blocks' matrices are to move little
ADAM = ("--muon=0", "--batch=16", "--micro=16")     # as [MAG] has it, in small steps
CLASSES = ("--model.semantics=class", "--model.text_length=0", "--model.prediction=eps", "--noise_weight=0", *ADAM)
RATES = (2e-3, 6e-3, 2e-2, 6e-2)        # that a claim of [MAG] chooses from, for every arm
STEEP = (6e-3, 2e-2, 6e-2, 2e-1, 6e-1)  # that are compared for stability
CONSTANT = ("--model.prediction=eps", "--noise_weight=0", "--cooldown=0", "--dtype=bfloat16", *ADAM)
HELD = 1000                             # pictures of the held-out loss, one for each noise level
REAL = 10_000                           # renders that toy_fd compares with


@dataclass(frozen=True)
class Options:
    """Which claim, and how much work."""
    claim: str = "flip"             # a key of CLAIMS
    out: str = "out/claims"         # folder of all runs
    seeds: int = 3                  # runs of every arm
    base: int = 1200                # size, transfer: training steps of the run, at 32 px, that others go on from
    long: int = 4000                # flip: of the run that others go on from
    steps: int = 300                # training steps of an arm; flip 3 times as many, magnitude and modulation 4 times
    fine: int = 150                 # transfer: training steps of an arm at 64 px
    tune: int = 400                 # magnitude, modulation: steps at every rate; stability: steps
    n: int = 200                    # pictures measured of every run
    jobs: int = 0                   # runs at a time, each on its share of the cores; 0 = one a core
    compile: str = "auto"           # as train.py's; on a CPU "on" is faster where there is a C++ compiler


Row = dict[str, float]                  # measure -> value


# ---------------------------------------------------------------- running

def train(o: Options, runs: dict[str, list[str]], may_diverge: bool = False) -> None:
    """Train every run, name -> flags, as many at a time as there are jobs. UserError with a failure's last words."""
    jobs = o.jobs or os.cpu_count() or 1
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def one(name: str) -> None:
        command = [sys.executable, "train.py", "--config=configs/shapes.py", f"--out={o.out}/{name}",
                   "--sample_every=0", "--save_every=100000", f"--threads={threads}", f"--compile={o.compile}",
                   *runs[name]]
        done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, encoding="utf-8",
                              errors="replace")
        if done.returncode and not (may_diverge and done.returncode == 3):
            raise UserError(f"run {name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")

    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(one, runs), total=len(runs), desc=f"training {o.claim}", unit="run"))


@torch.inference_mode()
def pictures(o: Options, name: str, captions: list[str], lam: float, beta: float = 1.0,
             controls: dict[str, Tensor] | None = None) -> Tensor:
    """Pictures of these captions by run `name`, same noise at every call; controls: one value for all. (B, 3, R, R)"""
    place = machine.setup()
    net, cfg = model.load(Path(o.out) / name)
    net.dtype = machine.precision(place.device, "auto")
    header = checkpoint.read_header(Path(o.out) / name / "weights.safetensors")
    options, parts = sample.Options(lam=lam, beta=beta, steps=STEPS, prompt=";".join(captions)), []
    wishes = sample.Wishes(options, cfg, header)
    for part in torch.arange(len(captions)).split(100):
        cond = wishes(part.numpy())[0]
        cond = replace(cond, **{k: v.expand(len(part), *v.shape) for k, v in (controls or {}).items()})
        parts.append(sample.draw(net.to(place.device), cfg, cond, part.tolist(), options, place.device).float().cpu())
    return torch.cat(parts)


def side(pixels: int) -> dict[str, Tensor]:
    """The control that asks for the detail of a square original."""
    return {"size": torch.full((2,), float(pixels))}


def asked(o: Options, name: str) -> list[str]:
    """The first n captions of the test split of a run's data."""
    return open_source(model.load(Path(o.out) / name)[1], "test").records(np.arange(o.n))["caption"]


def right(images: Tensor, captions: list[str], *keys: str) -> Row:
    """Share of the answers of shapes.score that are yes, by key."""
    answers = score(images, captions)
    return {key: answers[key].nanmean().item() for key in keys}


# ---------------------------------------------------------------- claims

def base(o: Options, steps: int) -> dict[int, str]:
    """A run for every seed on pictures that nothing was done to, which others start from: seed -> its name."""
    names = {seed: f"base{steps}-{seed}" for seed in range(o.seeds)}
    train(o, {name: [f"--steps={steps}", f"--seed={seed}"] for seed, name in names.items()})
    return names


def flip(o: Options) -> dict[str, list[Row]]:
    """[COND] sec. 2.1, table 2c: pictures are mirrored half the time and captions are not; is the side right?

    Nothing said of it, against the flag as a control: with 0 asked for the side is to be as in the caption, with 1 the
    other one. All go on from a run that knows left from right, on scenes whose captions all name a side. From nothing
    word and flag tell nothing but together, and after a short run the word is unlearned before the flag is learned."""
    names = base(o, o.long)
    arms = {"before": (f"base{o.long}", None), "not told": ("silent", None), "told 0": ("told", 0.0),
            "told 1": ("told", 1.0)}
    runs = {f"{kind}-{seed}": ["--scenes=sides", "--augment=flip", f"--model.controls={control}",
                               f"--init={o.out}/{names[seed]}", f"--steps={3 * o.steps}", f"--seed={seed}", *STILL]
            for kind, control in (("silent", ""), ("told", "flip")) for seed in range(o.seeds)}
    train(o, runs)
    rows = {arm: [] for arm in arms}
    for arm, (kind, flag) in arms.items():
        for seed in range(o.seeds):
            captions, told = asked(o, f"told-{seed}"), {} if flag is None else {"flip": torch.tensor(flag)}
            drawn = pictures(o, f"{kind}-{seed}", captions, LAM, controls=told)
            rows[arm].append(right(drawn, captions, "side", "color"))
    return rows


def size(o: Options) -> dict[str, list[Row]]:
    """[COND] sec. 2.1, tables 2a and A6, eq. 2: does the requested size change detail only, and can it be exaggerated?

    apart: root mean square distance of two pictures that differ in the requested size alone, all pairs, in squares of
    POOL pixels; color: captions met; sharp H: sharpness at requested size H; at beta b: with two-scale guidance."""
    names = base(o, o.base)
    arms = {"uniform": ["--model.control_weight=uniform"], "cosine 8": ["--model.control_weight=cosine"]}
    runs = {f"size{k}-{seed}": ["--augment=size", "--model.controls=size", *flags, f"--init={o.out}/{names[seed]}",
                                f"--steps={o.steps}", f"--seed={seed}", *FINE]
            for k, flags in enumerate(arms.values()) for seed in range(o.seeds)}
    train(o, runs)
    rows = {arm: [] for arm in arms}
    for k, arm in enumerate(arms):
        for seed in range(o.seeds):
            name = f"size{k}-{seed}"
            captions = asked(o, name)
            drawn = {s: pictures(o, name, captions, LAM, controls=side(s)) for s in SIZES}
            rough = [F.avg_pool2d(x, POOL) for x in drawn.values()]
            pairs = [(a - b).square().mean().sqrt().item() for i, a in enumerate(rough) for b in rough[i + 1:]]
            row = {"apart": mean(pairs), "color": mean(right(x, captions, "color")["color"] for x in drawn.values())}
            row |= {f"sharp {s}": sharpness(x).mean().item() for s, x in drawn.items()}
            for beta in sorted({1.0, *BETAS}):
                low, high = (drawn[s] if beta == 1 else pictures(o, name, captions, LAM, beta, side(s))
                             for s in (SIZES[0], SIZES[-1]))
                row[f"sharp 96/16 at beta {beta:g}"] = (sharpness(high).mean() / sharpness(low).mean()).item()
            rows[arm].append(row)
    return rows


def transfer(o: Options) -> dict[str, list[Row]]:
    """[COND] sec. 2.3, table A3: from 32 to 64 px in few steps, with sigma doubled and positions resampled, or without.

    At 32 px positions are 0, 4, ..., 28; extrapolated they go on to 60, resampled they keep their extent."""
    arms = {"neither": ["--model.base=60"], "positions": [], "positions, sigma": ["--model.rescale=2"]}
    names = base(o, o.base)
    runs = {f"high{k}-{seed}": ["--model.resolution=64", f"--init={o.out}/{names[seed]}", f"--steps={o.fine}",
                                f"--seed={seed}", *FINE, *flags]
            for k, flags in enumerate(arms.values()) for seed in range(o.seeds)}
    train(o, runs)
    rows = {arm: [] for arm in arms}
    for k, arm in enumerate(arms):
        for seed in range(o.seeds):
            captions = asked(o, f"high{k}-{seed}")
            drawn = pictures(o, f"high{k}-{seed}", captions, rescale_guidance(LAM, 2))
            rows[arm].append(right(drawn, captions, "color", "count", "side", "size", "shape"))
    return rows


# ---------------------------------------------------------------- claims of [MAG]

def held_out(net: model.Denoiser, cfg: Config) -> float:
    """The plain eps loss on HELD pictures of the test split, each under noise of its own level, the same every time."""
    batch, alpha_bar = data.records(data.open_source(cfg, "test"), range(HELD), [0] * HELD), net.alpha_bar
    i = torch.arange(HELD) * len(alpha_bar) // HELD
    eps = sample.noise_for(range(HELD), batch["image"].shape[1:], 0, "held out")
    x_t = add_noise(batch["image"], eps, alpha_bar[i])
    cond = from_batch(batch, cfg.model.semantics, model.control_names(cfg.model))
    with torch.inference_mode():
        parts = [(net(x_t[k], i[k].float(), cond.map(lambda v: v[k])) - eps[k]).square().mean()
                 for k in torch.arange(HELD).view(-1, 10).T]            # of all noise levels each
    return torch.stack(parts).mean().item()


def by_class(o: Options, name: str, eye: judge.Judge, reference: FeatureStats) -> Row:
    """How good a run of classes is: loss on held-out pictures, toy_fd and class of o.n pictures drawn without guidance.

    M k: magnitude of the tokens after block k, on held-out pictures at noise of all levels."""
    place = machine.setup()
    net, cfg = model.load(Path(o.out) / name)
    row = {"held-out loss": held_out(net, cfg)}
    row |= {f"M {k.split('.')[1]}": v for k, v in magnitudes.measure(net, lambda: held_out(net, cfg))["activations"]
            .items() if k.count(".") == 1}
    label = torch.arange(o.n) % len(SHAPES)
    net.dtype, options = machine.precision(place.device, "auto"), sample.Options(lam=1.0, eta=0.0, steps=STEPS)
    drawn = torch.cat([sample.draw(net.to(place.device), cfg, Condition(label=label[k]), k.tolist(), options,
                                   place.device).float().cpu() for k in torch.arange(o.n).split(100)])
    seen = judge.largest(judge.read(eye, drawn))
    return row | {f"toy_fd{o.n}": judge.toy_fd(eye, drawn, reference), "class": (seen == label).float().mean().item()}


def at_best_rate(o: Options, arms: dict[str, list[str]]) -> dict[str, list[Row]]:
    """Every arm at the rate of RATES with the lowest held-out loss after o.tune steps, then over the seeds."""
    runs = {f"{arm}-{rate:g}": [*CLASSES, *flags, f"--lr={rate}", f"--steps={o.tune}"]
            for arm, flags in arms.items() for rate in RATES}
    train(o, runs, may_diverge=True)
    best: dict[str, float] = {}
    for arm in arms:
        done = {rate: model.load(Path(o.out) / f"{arm}-{rate:g}") for rate in RATES
                if (Path(o.out) / f"{arm}-{rate:g}" / "weights.safetensors").is_file()}
        losses = {rate: held_out(*loaded) for rate, loaded in done.items()}
        if not losses:
            raise UserError(f"{arm} stayed finite at none of the rates {', '.join(f'{rate:g}' for rate in RATES)}")
        best[arm] = min(losses, key=losses.get)
        print(f"{arm}: held-out loss {', '.join(f'{v:.4f} at {k:g}' for k, v in losses.items())}", flush=True)
    train(o, {f"{arm}-{seed}": [*CLASSES, *flags, f"--lr={best[arm]}", f"--steps={4 * o.steps}", f"--seed={seed}"]
              for arm, flags in arms.items() for seed in range(o.seeds)})
    eye = judge.load()
    reference = judge.render_stats(eye, open_source(model.load(Path(o.out) / f"{next(iter(arms))}-0")[1], "test"),
                                   range(REAL))
    return {arm: [by_class(o, f"{arm}-{seed}", eye, reference) for seed in range(o.seeds)] for arm in arms}


MP = ["--model.arch=mpdit", "--normalize=true"]


def magnitude(o: Options) -> dict[str, list[Row]]:
    """[MAG] table 1: DiT against the same without normalisation layers; a remedy for attention, which averages."""
    heads = "--model.preserve=cosine+weights+stream+heads"
    return at_best_rate(o, {"DiT": ["--model.arch=dit"], "MP-DiT": MP, "MP-DiT heads": [*MP, heads]})


def modulation(o: Options) -> dict[str, list[Row]]:
    """[MAG] table 2: what time and class do to a sub-layer's input, each with a gate."""
    subsets = {"MP-DiT": "scale+shift+gate", "scale": "scale+gate", "rotate": "rotate+gate",
               "scale rotate": "scale+rotate+gate"}
    return at_best_rate(o, {arm: [*MP, f"--model.modulation={parts}"] for arm, parts in subsets.items()})


def stability(o: Options) -> dict[str, list[Row]]:
    """[MAG] sec. 1: at which rates does training stay finite in bfloat16? Loss of the last steps; inf: it did not."""
    arms = {"mmDiT": ["--model.arch=mmdit"], "MP-mmDiT": ["--model.arch=mpmmdit", "--normalize=true"]}
    names = {(arm, rate, seed): f"{arm}-rate{rate:g}-{seed}"
             for arm in arms for rate in STEEP for seed in range(o.seeds)}
    train(o, {name: [*arms[arm], f"--lr={rate}", f"--steps={o.tune}", f"--seed={seed}", *CONSTANT]
              for (arm, rate, seed), name in names.items()}, may_diverge=True)

    def ending(name: str) -> float:
        lines = log.read(Path(o.out) / name)
        return lines[-1]["loss"] if lines and lines[-1]["step"] == o.tune else float("inf")
    return {arm: [{f"lr {rate:g}": ending(names[arm, rate, seed]) for rate in STEEP} for seed in range(o.seeds)]
            for arm in arms}


CLAIMS: dict[str, Callable[[Options], dict[str, list[Row]]]] = {
    "flip": flip, "size": size, "transfer": transfer, "magnitude": magnitude, "modulation": modulation,
    "stability": stability}


def table(rows: dict[str, list[Row]]) -> str:
    """One line a measure, one column an arm: mean and standard deviation over the seeds."""
    lines = [f"{'':24}" + "".join(f"{arm:>22}" for arm in rows)]
    for key in next(iter(rows.values()))[0]:
        cells = [[row[key] for row in arm] for arm in rows.values()]
        digits = 3 if max(map(max, cells)) >= 0.1 else 5
        spread = [f"{stdev(c):.{digits}f}" if len(c) > 1 and all(map(math.isfinite, c)) else "?" for c in cells]
        lines.append(f"{key:24}" + "".join(f"{f'{mean(c):.{digits}f} ± {s}':>22}" for c, s in zip(cells, spread)))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    o = parse(argv, Options())
    if o.claim not in CLAIMS:
        raise UserError(f"unknown claim={o.claim!r}; there are {', '.join(CLAIMS)}")
    least = {key: getattr(o, key) for key in ("seeds", "base", "long", "steps", "fine", "tune", "n")}
    if min(least.values()) < 1:
        raise UserError(f"{', '.join(f'{k}={v}' for k, v in least.items())} must all be at least 1")
    text = table(CLAIMS[o.claim](o))
    checkpoint.write_text(Path(o.out) / f"{o.claim}.txt", text + "\n")
    print(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as e:
        checkpoint.say(f"error: {e}.")
        sys.exit(2)
