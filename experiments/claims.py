"""The papers' claims in miniature: trains every arm of a comparison on shapes over several seeds and measures it.

python -m experiments.claims --claim=flip               (or another of CLAIMS; the same command resumes)

Prints a column an arm, mean and standard deviation over the seeds, and writes it to <out>/<claim>.txt. The arms of a
claim share data, noise and initial weights, seed by seed. Dimensions: B images, R their side.
"""
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import model
import sample
from conditioning import make_condition
from config import Config, UserError, check_name, parse, run
from evaluation import shapes_judge
from evaluation.shapes_score import score, sharpness
from experiments.demo import generate
from fid import FeatureStats
from rng import keyed_noise
from runtime import distributed, log, magnitudes
from schedule import add_noise, rescale_guidance
from sources.shapes_grammar import SHAPES

SIZES = (16, 24, 48, 96)                # requested sizes, in pixels, compared at 32 px
BETAS = (0.5, 1.0, 1.5, 2.0)            # at 0 the size has no effect by construction
POOL = 4                                # images are compared in squares of so many pixels, which hides blur
LAM = 2.0                               # lambda at 32 px
STEPS = 25                              # sampling steps
FINETUNE = ("--lr=2e-3", "--lr_muon=0.007")    # peak rates of a run that starts from another
SLOW_MUON = ("--lr=2e-3", "--lr_muon=0.001")   # the same, with little change of the blocks' matrices
ADAM = ("--lr_muon=0", "--batch=16", "--microbatch=16")     # the optimizer of [MAG], in small steps
CLASSES = ("--model.semantics=class", "--model.text_length=0", "--model.prediction=eps", "--loss_sigma_power=0", *ADAM)
CONSTANT = ("--model.prediction=eps", "--loss_sigma_power=0", "--cooldown=0", "--dtype=bfloat16", *ADAM)
RATES = (2e-3, 6e-3, 2e-2, 6e-2)        # learning rates from which every arm of a [MAG] claim takes its best
STABILITY_LRS = (6e-3, 2e-2, 6e-2, 2e-1, 6e-1)  # learning rates of the stability claim
HELD = 1000                             # images of the held-out loss, one for each noise level
REAL = 10_000                           # renders in the reference of toy_fd


@dataclass(frozen=True)
class Options:
    """Which claim, and how much work."""
    claim: str = "flip"             # a key of CLAIMS
    out: str = "out/claims"         # folder of all runs
    seeds: int = 3                  # runs of every arm
    pretrain_steps: int = 1200      # size, transfer: training steps at 32 px of the run that the arms start from
    pretrain_steps_flip: int = 4000   # flip: of the run that the arms start from
    steps: int = 300                # training steps of an arm; flip 3 times as many, magnitude and modulation 4 times
    finetune_steps: int = 150       # transfer: training steps of an arm at 64 px
    tune_steps: int = 400           # magnitude, modulation: steps at every rate; stability: steps
    n: int = 200                    # images measured of every run
    jobs: int = 0                   # runs at a time, each on its share of the cores; 0 = one a core
    compile: str = "auto"           # as train.py's; on a CPU "on" is faster where there is a C++ compiler


Row = dict[str, float]                  # measure -> value


def train(o: Options, runs: dict[str, list[str]], may_diverge: bool = False) -> None:
    """Train every run, name -> flags, `jobs` at a time. UserError with the last line of a run that fails."""
    jobs = o.jobs or distributed.cores()
    flags = ["--config=configs/shapes.py", "--sample_every=0", "--save_every=100000", f"--compile={o.compile}",
             f"--threads={max(1, distributed.cores() // jobs)}"]

    def one(name: str) -> None:
        done = subprocess.run([sys.executable, "train.py", *flags, f"--out={o.out}/{name}", *runs[name]],
                              capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode and not (may_diverge and done.returncode == 3):
            raise UserError(f"run {name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")

    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(one, runs), total=len(runs), desc=f"training {o.claim}", unit="run"))


def train_seeds(o: Options, arms: dict[str, list[str]], steps: int, base: int = 0, may_diverge: bool = False) -> None:
    """Train every arm, name -> flags, with every seed: <name>-<seed>, from base<base>-<seed> of `base` steps if any."""
    if base:
        train_seeds(o, {f"base{base}": []}, base)
    train(o, {f"{name}-{seed}": [f"--steps={steps}", f"--seed={seed}", *flags]
              + ([f"--init_from={o.out}/base{base}-{seed}"] if base else [])
              for name, flags in arms.items() for seed in range(o.seeds)}, may_diverge)


def images_of(o: Options, name: str, lam: float, captions: Sequence[str] = (), beta: float = 1.0, eta: float = -1.0,
              controls: dict[str, float | tuple[float, float]] | None = None) -> Tensor:
    """o.n images by run `name`, of these captions or all classes in turn, with the same controls. (B, 3, R, R)"""
    options = sample.Options(out=f"{o.out}/{name}", guidance=lam, control_guidance=beta, eta=eta, steps=STEPS,
                             batch=100, prompt=";".join(captions))
    run = sample.load_run(options, distributed.setup().device)
    rows = {key: torch.tensor([value] * o.n) for key, value in (controls or {}).items()}
    return generate(run, o.n, replace(run.conditions(range(o.n))[0], **rows))


def test_captions(o: Options, name: str) -> list[str]:
    """The first n captions of the test split of a run's data."""
    return data.open_source(model.load(f"{o.out}/{name}")[1], "test").records(np.arange(o.n))["caption"]


def accuracy(images: Tensor, captions: list[str], *keys: str) -> Row:
    """Share of images that match their captions, by attribute, a key of shapes_score.score."""
    right = score(images, captions)
    return {key: right[key].nanmean().item() for key in keys}


def by_seed(o: Options, arms: dict[str, str], measure: Callable[[str], Row]) -> dict[str, list[Row]]:
    """The rows of every arm, its title -> the name of its runs without the seed."""
    return {title: [measure(f"{name}-{seed}") for seed in range(o.seeds)] for title, name in arms.items()}


# ---------------------------------------------------------------- claims of [COND]

def flip(o: Options) -> dict[str, list[Row]]:
    """[COND] sec. 2.1, table 2c: half of the images are mirrored and their captions are not; is the side right?

    Compares training without and with the flip flag as a control: flag 0 should give the caption's side, flag 1 the
    other one. All start from a run that knows left from right, on scenes whose captions all name a side; without that
    start neither word nor flag alone says anything, and a short one unlearns the word before it learns the flag."""
    flags = ["--shapes.layout=sides", "--augment=flip", *SLOW_MUON]
    train_seeds(o, {"without": [*flags, "--model.controls="], "with": [*flags, "--model.controls=flip"]}, 3 * o.steps,
                o.pretrain_steps_flip)

    def measure(name: str, seed: int, flag: dict[str, float]) -> Row:
        captions = test_captions(o, f"with-{seed}")
        return accuracy(images_of(o, f"{name}-{seed}", LAM, captions, controls=flag), captions, "left_right", "color")
    return {arm: [measure(name, seed, flag) for seed in range(o.seeds)] for arm, name, flag in (
        ("before", f"base{o.pretrain_steps_flip}", {}), ("without flag", "without", {}),
        ("flag 0", "with", {"flip": 0.0}), ("flag 1", "with", {"flip": 1.0}))}


def size(o: Options) -> dict[str, list[Row]]:
    """[COND] sec. 2.1, tables 2a and A6, eq. 2: does the requested size change only detail, and can one exaggerate it?

    apart: root mean square distance of images that differ only in the requested size, over all pairs, in squares of
    POOL pixels; color: share that matches; sharp H: sharpness at requested size H; at beta b: two-scale guidance."""
    arms = {"size0": "uniform", "size1": "cosine"}
    flags = ["--augment=size", "--model.controls=size", *FINETUNE]
    train_seeds(o, {name: [*flags, f"--model.control_weight={kind}"] for name, kind in arms.items()}, o.steps,
                o.pretrain_steps)

    def measure(name: str) -> Row:
        captions = test_captions(o, name)
        at = lambda s, beta=1.0: images_of(o, name, LAM, captions, beta, controls={"size": (float(s), float(s))})
        images = {s: at(s) for s in SIZES}
        rough = [F.avg_pool2d(x, POOL) for x in images.values()]
        row = {"apart": mean((a - b).square().mean().sqrt().item() for a, b in combinations(rough, 2)),
               "color": mean(accuracy(x, captions, "color")["color"] for x in images.values())}
        row |= {f"sharp {s}": sharpness(x).mean().item() for s, x in images.items()}
        for beta in BETAS:
            low, high = (sharpness(images[s] if beta == 1 else at(s, beta)).mean() for s in (SIZES[0], SIZES[-1]))
            row[f"sharp 96/16 at beta {beta:g}"] = (high / low).item()
        return row
    return by_seed(o, {"uniform": "size0", "cosine 8": "size1"}, measure)


def transfer(o: Options) -> dict[str, list[Row]]:
    """[COND] sec. 2.2, table A3: from 32 to 64 px in few steps, with sigma doubled and positions resampled, or without.

    Positions at 32 px are 0, 4, ..., 28; extrapolation continues them to 60, resampling keeps their extent."""
    arms = {"neither": ["--model.pos_base=60"], "positions": [], "positions, sigma": ["--model.sigma_scale=2"]}
    train_seeds(o, {f"high{k}": ["--model.resolution=64", *FINETUNE, *flags] for k, flags in enumerate(arms.values())},
                o.finetune_steps, o.pretrain_steps)

    def measure(name: str) -> Row:
        captions = test_captions(o, name)
        images = images_of(o, name, rescale_guidance(LAM, 2), captions)
        return accuracy(images, captions, "color", "count", "left_right", "size", "shape")
    return by_seed(o, {title: f"high{k}" for k, title in enumerate(arms)}, measure)


# ---------------------------------------------------------------- claims of [MAG]

@torch.inference_mode()
def held_out(net: model.Denoiser, cfg: Config) -> float:
    """The plain eps loss on HELD images of the test split, each at its own noise level, the same at every call."""
    batch, alpha_bar = data.records(data.open_source(cfg, "test"), range(HELD), [0] * HELD), net.alpha_bar
    i = torch.arange(HELD) * len(alpha_bar) // HELD
    eps = keyed_noise(range(HELD), batch["image"].shape[1:], 0, "held out")
    x_t = add_noise(batch["image"], eps, alpha_bar[i])
    cond = make_condition(batch, cfg.model.semantics, model.control_names(cfg.model))
    parts = [(net(x_t[k], i[k].float(), cond.map(lambda v: v[k])) - eps[k]).square().mean()
             for k in torch.arange(HELD).view(-1, 10).T]                    # each spans all noise levels
    return torch.stack(parts).mean().item()


def by_class(o: Options, judge: shapes_judge.ShapesClassifier, reference: FeatureStats, name: str) -> Row:
    """The quality of a run of classes: held-out loss, and toy_fd and class accuracy of o.n images without guidance.

    M k: magnitude of the tokens after block k, on held-out images at all noise levels."""
    net, cfg = model.load(f"{o.out}/{name}")
    found = magnitudes.measure(net, lambda: held_out(net, cfg))["activations"]
    row = {f"M {k.split('.')[1]}": v for k, v in found.items() if k.count(".") == 1}
    images, label = images_of(o, name, lam=1.0, eta=0.0), torch.arange(o.n) % len(SHAPES)
    seen = shapes_judge.largest(shapes_judge.read(judge, images))
    return {"held-out loss": held_out(net, cfg)} | row | {f"toy_fd{o.n}": shapes_judge.toy_fd(judge, images, reference),
                  "class": (seen == label).float().mean().item()}


def at_best_rate(o: Options, arms: dict[str, list[str]]) -> dict[str, list[Row]]:
    """Every arm over the seeds, at the rate of RATES with the lowest held-out loss after o.tune_steps steps."""
    train(o, {f"{arm}-{rate:g}": [*CLASSES, *flags, f"--lr={rate}", f"--steps={o.tune_steps}"]
              for arm, flags in arms.items() for rate in RATES}, may_diverge=True)
    best = {}
    for arm in arms:
        losses = {rate: held_out(*model.load(f"{o.out}/{arm}-{rate:g}")) for rate in RATES
                  if (Path(o.out) / f"{arm}-{rate:g}" / "weights.safetensors").is_file()}
        if not losses:
            raise UserError(f"{arm} diverged at every rate of {', '.join(f'{rate:g}' for rate in RATES)}")
        print(f"{arm}: held-out loss {', '.join(f'{v:.4f} at {k:g}' for k, v in losses.items())}", flush=True)
        best[arm] = min(losses, key=losses.get)
    train_seeds(o, {arm: [*CLASSES, *flags, f"--lr={best[arm]}"] for arm, flags in arms.items()}, 4 * o.steps)
    judge = shapes_judge.load()
    source = data.open_source(model.load(f"{o.out}/{next(iter(arms))}-0")[1], "test")
    reference = shapes_judge.render_stats(judge, source, range(REAL))
    return by_seed(o, {arm: arm for arm in arms}, partial(by_class, o, judge, reference))


MP = ["--model.arch=mpdit", "--forced_weight_norm=true"]
# [MAG] table 1: DiT against the same without normalisation layers; a remedy for attention, which averages
MAGNITUDE = {"DiT": ["--model.arch=dit"], "MP-DiT": MP, "MP-DiT heads": [*MP, "--model.mp=cosine+weights+stream+heads"]}
# [MAG] table 2: how time and class modulate the input of a sub-layer, always with a gate
MODULATION = {"MP-DiT": MP, "scale": [*MP, "--model.modulation=scale+gate"],
              "rotate": [*MP, "--model.modulation=rotate+gate"],
              "scale rotate": [*MP, "--model.modulation=scale+rotate+gate"]}


def stability(o: Options) -> dict[str, list[Row]]:
    """[MAG] sec. 1: at which rates does training stay finite in bfloat16? Loss of the last steps; inf: it did not."""
    arms = {"mmDiT": ["--model.arch=mmdit"], "MP-mmDiT": ["--model.arch=mpmmdit", "--forced_weight_norm=true"]}
    train_seeds(o, {f"{arm}-rate{rate:g}": [*flags, f"--lr={rate}", *CONSTANT]
                    for arm, flags in arms.items() for rate in STABILITY_LRS}, o.tune_steps, may_diverge=True)

    def last_loss(name: str) -> float:
        lines = log.read(Path(o.out) / name)
        return lines[-1]["loss"] if lines and lines[-1]["step"] == o.tune_steps else math.inf
    return {arm: [{f"lr {rate:g}": last_loss(f"{arm}-rate{rate:g}-{seed}") for rate in STABILITY_LRS}
                  for seed in range(o.seeds)] for arm in arms}


CLAIMS: dict[str, Callable[[Options], dict[str, list[Row]]]] = {
    "flip": flip, "size": size, "transfer": transfer, "magnitude": partial(at_best_rate, arms=MAGNITUDE),
    "modulation": partial(at_best_rate, arms=MODULATION), "stability": stability}


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
    check_name("claim", o.claim, CLAIMS)
    for key, value in vars(o).items():
        if isinstance(value, int) and value < (key != "jobs"):
            raise UserError(f"{key}={value} must be at least 1, jobs at least 0")
    text = table(CLAIMS[o.claim](o))
    log.write_text(Path(o.out) / f"{o.claim}.txt", text + "\n")
    print(text)


if __name__ == "__main__":
    run(main, cleanup=distributed.cleanup)
