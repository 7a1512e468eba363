"""Five minutes from nothing to images: trains on captioned shapes, samples and scores. `make demo` runs it.

python -m experiments.demo --minutes=5          (the same command resumes; --minutes=15 shows the effect of more time)

Writes <out>/samples/demo.png (images with their captions), <out>/loss.png and <out>/scorecard.txt.
Dimensions: B images, C channels, R their side.
"""
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import config
import data
import sample
from conditioning import Condition
from evaluation.shapes_score import score
from runtime import distributed, log, plot

PROMPTS = ("a red ring left of a blue square", "a green star", "a large yellow heart on navy", "a small purple cross",
           "an orange triangle above a cyan circle", "a blue diamond right of a red circle", "a white ring on grey",
           "a large red square", "a yellow star below a purple heart", "a cyan cross on brown")
MEASURED = 200                          # images behind every number of the scorecard
MEANING = {"color": "named colours", "left_right": "left and right", "above_below": "above and below",
           "size": "small or large", "shape": "shape, of eight", "count": "number of objects"}   # of the keys of score
TRIAL = 40                              # steps that measure this machine's speed
TRAINING = 0.88                         # share of the minutes for steps; starting and saving take the rest


@dataclass(frozen=True)
class Options:
    """How long, and where to."""
    minutes: float = 5.0            # training time; the number of steps follows from this machine's speed
    config: str = "configs/shapes.py"   # config file of the run
    out: str = ""                   # run folder; empty = out/demo, with the minutes in its name if they are not five


def plan(o: Options) -> tuple[int, str]:
    """Steps that fit into the minutes on this machine, and whether to compile, from a short trial of each.

    A run that exists keeps its own."""
    if (saved := Path(o.out) / "config.json").is_file():
        cfg = config.from_json(saved.read_text(encoding="utf-8"))
        return cfg.steps, cfg.compile
    rates, flags = {}, [f"--config={o.config}", f"--steps={TRIAL}", "--log_every=5", "--sample_every=0"]
    for choice in ("on", "off"):                            # "on" fails without a C++ compiler
        print(f"{TRIAL} steps to see how fast this machine is, compile={choice} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "train.py", f"--out={folder}", f"--compile={choice}", *flags]
            trial = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
            if trial.returncode == 0:
                rates[choice] = sorted(line["images_per_second"] for line in log.read(Path(folder)))[-3]
    if not rates:
        sys.exit(trial.stderr)
    choice, batch = max(rates, key=rates.get), config.load(o.config).batch
    return max(1, int(TRAINING * 60 * o.minutes * rates[choice] / batch / 10)) * 10, choice


def generate(run: sample.Run, n: int, cond: Condition) -> Tensor:
    """The first n images of a run under a condition of n rows, options.batch at a time. (B, C, R, R)"""
    parts = [run(k.numpy(), cond.map(lambda v: v[k])) for k in torch.arange(n).split(run.options.batch)]
    return torch.cat(parts).float().cpu()


def scorecard(o: Options) -> str:
    """Share of right images of unseen captions, by attribute, beside chance and beside real renders.

    Chance scores the same images against the captions of others."""
    indices = np.arange(MEASURED)
    run = sample.load_run(sample.Options(out=o.out, n=MEASURED), distributed.setup().device)
    real = data.open_source(run.cfg, "test").records(indices, 0 * indices)["image"]
    cond, captions = run.conditions(indices)
    images = generate(run, MEASURED, cond)
    columns = [score(images, captions), score(images, captions[1:] + captions[:1]), score(real, captions)]
    lines = [f"{'share of images that are right':32} {'generated':>12} {'by chance':>10} {'real':>6} {'images':>7}"]
    for key, meaning in MEANING.items():
        ours, chance, true = (c[key].nanmean().item() for c in columns)
        n = int((~columns[0][key].isnan()).sum())
        error = (ours * (1 - ours) / max(n, 1)) ** 0.5
        lines.append(f"{meaning:32} {ours:6.2f} ±{error:.2f} {chance:10.2f} {true:6.2f} {n:7}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    o, start = config.parse(argv, Options()), time.monotonic()
    o = replace(o, out=o.out or ("out/demo" if o.minutes == Options.minutes else f"out/demo-{o.minutes:g}-minutes"))
    steps, choice = plan(o)
    print(f"training {steps:,} steps, about {o.minutes:g} minutes, compile={choice} ...", flush=True)
    code = subprocess.call([sys.executable, "train.py", f"--config={o.config}", f"--out={o.out}", f"--steps={steps}",
                            f"--compile={choice}"])
    if code:
        return code
    card = scorecard(o)
    log.write_text(Path(o.out) / "scorecard.txt", card + "\n")
    sample.main([f"--out={o.out}", f"--prompt={';'.join(PROMPTS)}", f"--n={2 * len(PROMPTS)}", "--name=demo"])
    print(f"\n{card}\n\nimages     {o.out}/samples/demo.png\nloss       {plot.plot(Path(o.out))}\n"
          f"scorecard  {o.out}/scorecard.txt\nall in {(time.monotonic() - start) / 60:.1f} minutes; your own images:\n"
          f"{Path(sys.executable).as_posix()} sample.py --out={o.out} --prompt=\"{PROMPTS[0]}\"")
    return 0


if __name__ == "__main__":
    config.run(main, cleanup=distributed.cleanup)
