"""Five minutes from nothing to images: trains on captioned shapes, samples and scores. `make demo` runs it.

python -m experiments.demo --minutes=5          (the same command resumes; --minutes=15 shows the effect of more time)

Writes <out>/samples/demo.png (images with their captions), <out>/loss.png and <out>/scorecard.txt.
Dimensions: B images, C channels, R their side.
"""
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import config
import data
import model
import sample
from conditioning import Condition
from evaluation.shapes_score import score
from runtime import checkpoint, distributed, log, plot

PROMPTS = ("a red ring left of a blue square", "a green star", "a large yellow heart on navy", "a small purple cross",
           "an orange triangle above a cyan circle", "a blue diamond right of a red circle", "a white ring on grey",
           "a large red square", "a yellow star below a purple heart", "a cyan cross on brown")
MEASURED = 200                          # images behind every number of the scorecard
ASKED = {"color": "named colours are there", "left_right": "left and right as asked",
         "above_below": "above and below as asked", "size": "small or large as asked",
         "shape": "shape as asked, of eight", "count": "number of objects"}
TRIAL = 40                              # steps that measure this machine's speed
STEPPING = 0.88                         # share of the minutes for steps; starting and saving take the rest


@dataclass(frozen=True)
class Options:
    """How long, and where to."""
    minutes: float = 5.0            # training time; the number of steps follows from this machine's speed
    config: str = "configs/shapes.py"   # config file of the run
    out: str = ""                   # run folder; empty = out/demo, with the minutes in its name if they are not five


def plan(o: Options) -> tuple[int, str]:
    """Steps that fit into the minutes on this machine, and whether to compile, from a short trial of each.

    A run that exists keeps its own."""
    if (Path(o.out) / "config.json").is_file():
        cfg = config.from_json((Path(o.out) / "config.json").read_text(encoding="utf-8"))
        return cfg.steps, cfg.compile
    rates = {}
    for choice in ("on", "off") if can_compile() else ("off",):
        print(f"{TRIAL} steps to see how fast this machine is, compile={choice} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            tried = subprocess.run([sys.executable, "train.py", f"--config={o.config}", f"--out={folder}",
                                    f"--compile={choice}", f"--steps={TRIAL}", "--log_every=5", "--sample_every=0"],
                                   stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
            if tried.returncode == 0:
                rates[choice] = sorted(line["images_per_second"] for line in log.read(Path(folder)))[-3]
    if not rates:
        sys.exit(tried.stderr)
    choice, batch = max(rates, key=rates.get), config.load(o.config).batch
    return max(1, int(STEPPING * 60 * o.minutes * rates[choice] / batch / 10)) * 10, choice


def can_compile() -> bool:
    """Whether torch.compile finds its requirements on this CPU: a C++ compiler and Python's headers."""
    headers = os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
    return headers and bool(shutil.which("g++") or shutil.which("clang++"))


def generate(net: model.Denoiser, cfg: config.Config, cond: Condition, options: sample.Options) -> Tensor:
    """An image for every row of a condition, numbered from 0, options.batch at a time. (B, C, R, R)"""
    device = distributed.setup().device
    net.dtype, rows = distributed.compute_dtype(device, "auto"), cond.label if cond.text is None else cond.text
    parts = [sample.generate(net.to(device), cfg, cond.map(lambda v: v[k]), k.tolist(), options, device).float().cpu()
             for k in torch.arange(len(rows)).split(options.batch)]
    return torch.cat(parts)


def scorecard(o: Options) -> str:
    """Accuracy of images of unseen captions, by attribute, beside chance and beside real renders.

    Chance scores the same images against the captions of others."""
    net, cfg = model.load(o.out)
    real = data.open_source(cfg, "test").records(np.arange(MEASURED), np.zeros(MEASURED, int))["image"]
    options = sample.Options(out=o.out, n=MEASURED)
    wishes = sample.SampleConditions(options, cfg, checkpoint.read_header(Path(o.out) / "weights.safetensors"))
    cond, captions = wishes(np.arange(MEASURED))
    images, others = generate(net, cfg, cond, options), captions[1:] + captions[:1]
    columns = [score(images, captions), score(images, others), score(real, captions)]
    lines = [f"{'share that is right':28} {'drawn':>12} {'by chance':>10} {'real':>6} {'asked':>6}"]
    for key, meaning in ASKED.items():
        ours, chance, true = (c[key].nanmean().item() for c in columns)
        n = int((~columns[0][key].isnan()).sum())
        error = (ours * (1 - ours) / max(n, 1)) ** 0.5
        lines.append(f"{meaning:28} {ours:6.2f} ±{error:.2f} {chance:10.2f} {true:6.2f} {n:6}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    o, begun = config.parse(argv, Options()), time.monotonic()
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
          f"scorecard  {o.out}/scorecard.txt\nall in {(time.monotonic() - begun) / 60:.1f} minutes; your own images:\n"
          f"{Path(sys.executable).as_posix()} sample.py --out={o.out} --prompt=\"{PROMPTS[0]}\"")
    return 0


if __name__ == "__main__":
    config.run(main, cleanup=distributed.cleanup)
