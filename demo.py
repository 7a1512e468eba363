"""Five minutes from nothing to pictures: train on captioned shapes, draw, measure. What `make demo` runs.

python demo.py --minutes=5          (run again to go on after a stop; --minutes=15 shows what more time buys)

Leaves <out>/samples/demo.png (pictures with the captions they were drawn from), <out>/loss.png and <out>/scorecard.txt.
Dimensions: B batch, R resolution.
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

import checkpoint
import config
import data
import log
import machine
import model
import plot
import sample
from shapes_score import score

PROMPTS = ("a red ring left of a blue square", "a green star", "a large yellow heart on navy", "a small purple cross",
           "an orange triangle above a cyan circle", "a blue diamond right of a red circle", "a white ring on grey",
           "a large red square", "a yellow star below a purple heart", "a cyan cross on brown")
MEASURED = 200                          # pictures behind every number of the scorecard
ASKED = {"color": "named colours are there", "side": "left and right as asked", "level": "above and below as asked",
         "size": "small or large as asked", "shape": "shape as asked, of eight", "count": "number of objects"}
TRIAL = 40                              # steps that measure this machine's speed
STEPPING = 0.88                         # share of the minutes for steps; starting and saving take the rest


@dataclass(frozen=True)
class Options:
    """How long, and where to."""
    minutes: float = 5.0            # training time; the number of steps follows from this machine's speed
    config: str = "configs/shapes.py"   # config file of the run
    out: str = ""                   # run folder; empty = out/demo, with the minutes in its name if they are not five


def train(o: Options, out: str, *flags: str) -> None:
    """train.py as a user would call it, with its progress on this terminal. Ends the demo if it fails."""
    code = subprocess.call([sys.executable, "train.py", f"--config={o.config}", f"--out={out}", *flags])
    if code:
        sys.exit(code)


def plan(o: Options) -> tuple[int, str]:
    """Steps that fit into the minutes on this machine, and whether to compile, from a short trial of each.

    Those of the run if there is one: a plan is made once."""
    if (Path(o.out) / "config.json").is_file():
        cfg = config.from_json((Path(o.out) / "config.json").read_text(encoding="utf-8"))
        return cfg.steps, cfg.compile
    rates, cfg = {}, config.load(o.config)
    for choice in ("on", "off") if can_compile() else ("off",):
        print(f"{TRIAL} steps to see how fast this machine is, compile={choice} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            flags = (f"--out={folder}", f"--compile={choice}", f"--steps={TRIAL}", "--log_every=5", "--sample_every=0")
            tried = subprocess.run([sys.executable, "train.py", f"--config={o.config}", *flags], stderr=subprocess.PIPE,
                                   encoding="utf-8", errors="replace")
            if tried.returncode == 0:
                rates[choice] = sorted(line["images_per_second"] for line in log.read(Path(folder)))[-3]
    if not rates:
        sys.exit(tried.stderr)
    choice = max(rates, key=rates.get)
    return max(1, int(STEPPING * 60 * o.minutes * rates[choice] / cfg.batch / 10)) * 10, choice


def can_compile() -> bool:
    """Whether torch.compile finds on this CPU what it needs: a C++ compiler and Python's headers."""
    headers = os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
    return headers and bool(shutil.which("g++") or shutil.which("clang++"))


def scorecard(o: Options) -> str:
    """Colour, side, size and the rest of pictures drawn from unseen captions, beside chance and beside real renders.

    Chance is the same pictures measured against captions that belong to others."""
    place = machine.setup()
    net, cfg = model.load(o.out)
    net.dtype = machine.precision(place.device, "auto")
    batch = data.open_source(cfg, "test").records(np.arange(MEASURED), np.zeros(MEASURED, int))
    options = sample.Options(out=o.out, n=MEASURED)
    wishes = sample.Wishes(options, cfg, checkpoint.read_header(Path(o.out) / "weights.safetensors"))
    cond, captions = wishes(np.arange(MEASURED))
    parts = torch.arange(MEASURED).split(options.batch)
    drawn = torch.cat([sample.draw(net.to(place.device), cfg, cond.map(lambda v: v[part]), part.tolist(), options,
                                   place.device).cpu() for part in parts])
    others = captions[1:] + captions[:1]
    columns = [score(drawn, captions), score(drawn, others), score(batch["image"], captions)]
    lines = [f"{'share that is right':28} {'drawn':>12} {'by chance':>10} {'real':>6} {'asked':>6}"]
    for key, meaning in ASKED.items():
        ours, chance, real = (c[key].nanmean().item() for c in columns)
        n = int((~columns[0][key].isnan()).sum())
        error = (ours * (1 - ours) / max(n, 1)) ** 0.5
        lines.append(f"{meaning:28} {ours:6.2f} ±{error:.2f} {chance:10.2f} {real:6.2f} {n:6}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    o, begun = config.parse(argv, Options()), time.monotonic()
    o = replace(o, out=o.out or ("out/demo" if o.minutes == Options.minutes else f"out/demo-{o.minutes:g}-minutes"))
    steps, choice = plan(o)
    print(f"training {steps:,} steps, about {o.minutes:g} minutes, compile={choice} ...", flush=True)
    train(o, o.out, f"--steps={steps}", f"--compile={choice}")
    card = scorecard(o)
    checkpoint.write_text(Path(o.out) / "scorecard.txt", card + "\n")
    sample.main([f"--out={o.out}", f"--prompt={';'.join(PROMPTS)}", f"--n={2 * len(PROMPTS)}", "--name=demo"])
    print(f"\n{card}\n\npictures   {o.out}/samples/demo.png\nloss       {plot.plot(Path(o.out))}\n"
          f"scorecard  {o.out}/scorecard.txt\nall in {(time.monotonic() - begun) / 60:.1f} minutes; draw your own:\n"
          f"{Path(sys.executable).as_posix()} sample.py --out={o.out} --prompt=\"{PROMPTS[0]}\"")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except config.UserError as e:
        checkpoint.say(f"error: {e}.")
        sys.exit(2)
