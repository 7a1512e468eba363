"""Five minutes from nothing to pictures: train on captioned shapes, draw, measure. What `make demo` runs.

python demo.py --minutes=5          (run again to go on after a stop; --minutes=15 shows what more time buys)

Leaves <out>/samples/demo.png (pictures with the captions they were drawn from), <out>/loss.png and <out>/scorecard.txt.
Dimensions: B batch, R resolution.
"""
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
import config
import data
import machine
import model
import plot
import sample
from shapes import score

PROMPTS = ("a red ring left of a blue square", "a green star", "a large yellow heart on navy", "a small purple cross",
           "an orange triangle above a cyan circle", "a blue diamond right of a red circle", "a white ring on grey",
           "a large red square", "a yellow star below a purple heart", "a cyan cross on brown")
MEASURED = 200                          # pictures behind every number of the scorecard
ASKED = {"color": "named colours are there", "side": "left and right as asked", "level": "above and below as asked",
         "size": "small or large as asked", "shape": "shape as asked, of eight", "count": "number of objects"}
TRIAL = 40                              # steps that measure this machine's speed
DRAWING = 0.85                          # share of the minutes for steps; starting and saving take the rest


@dataclass(frozen=True)
class Options:
    """How long, and where to."""
    minutes: float = 5.0            # training time; the number of steps follows from this machine's speed
    config: str = "configs/shapes.py"   # config file of the run
    out: str = "out/demo"           # run folder


def train(o: Options, out: str, *flags: str) -> None:
    """train.py as a user would call it, with its progress on this terminal. Ends the demo if it fails."""
    code = subprocess.call([sys.executable, "train.py", f"--config={o.config}", f"--out={out}", *flags])
    if code:
        sys.exit(code)


def steps_for(o: Options) -> int:
    """How many steps fit into the minutes on this machine, from a short trial; those of the run if there is one."""
    if (Path(o.out) / "config.json").is_file():
        return config.from_json((Path(o.out) / "config.json").read_text()).steps
    print(f"measuring the speed of this machine with {TRIAL} steps ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        train(o, folder, f"--steps={TRIAL}", "--log_every=10", f"--save_every={TRIAL}", "--sample_every=0")
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        batch = json.loads((Path(folder) / "config.json").read_text())["batch"]
    rate = sorted(line["images_per_second"] for line in lines[1:])[len(lines[1:]) // 2]
    return max(1, int(DRAWING * 60 * o.minutes * rate / batch / 100)) * 100


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
    drawn = sample.draw(net.to(place.device), cfg, cond, range(MEASURED), options, place.device).cpu()
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
    steps = steps_for(o)
    print(f"training {steps:,} steps, about {o.minutes:g} minutes ...", flush=True)
    train(o, o.out, f"--steps={steps}")
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
