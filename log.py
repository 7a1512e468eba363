"""What a run says about itself: log.jsonl while it goes on, status.json when it ends.

A line of the log is a window of steps: mean loss, the same by quarter of the noise range, gradient norm, learning rate,
and how fast it went. Sums are kept on the device; `Window.read` is where the training loop waits for it, nowhere else.
Dimensions: B batch, T noise steps.
"""
import errno
import json
import os
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import machine
import model
from config import Config

QUARTERS = 4                            # the loss is logged by quarter of the noise range, cleanest first


class Window:
    """Sums since the last line, kept on the device: loss and count by noise quarter, gradient norm.

    `bad` becomes 1 at the first step whose gradient is not finite and stays so; `bad_step` is its number."""
    def __init__(self, device: torch.device) -> None:
        self.loss, self.count = torch.zeros(QUARTERS, device=device), torch.zeros(QUARTERS, device=device)
        self.norm, self.bad = torch.zeros((), device=device), torch.zeros((), device=device)
        self.bad_step = torch.full((), -1.0, device=device)
        self.quarters = torch.arange(QUARTERS, device=device)

    def add(self, loss: Tensor, i: Tensor, T: int) -> None:
        """Losses (B,) of pictures at noise indices i (B,)."""
        here = (i * QUARTERS // T)[:, None] == self.quarters                    # (B, 4)
        self.loss += torch.where(here, loss.detach()[:, None], 0.0).sum(0)
        self.count += here.sum(0)

    def add_norm(self, norm: Tensor, step: int) -> None:
        """Norm of the whole gradient of a step; nothing is read, so the device is not waited for."""
        self.norm += norm
        bad = 1 - torch.isfinite(norm).float()
        self.bad_step.copy_(torch.where(bad > self.bad, float(step), self.bad_step))
        self.bad.copy_(torch.maximum(self.bad, bad))

    def read(self, steps: int, stop: machine.Stop, place: machine.Place) -> tuple[dict, int, int]:
        """A log line over all processes, the signal that any of them got (0 = none), the first bad step (-1 = none).

        Then the sums begin again."""
        asked = torch.tensor([float(stop.signal == s) for s in machine.SIGNALS], device=place.device)
        shared = machine.add_up(torch.cat([self.loss, self.count, asked]), place)
        *shared, norm, bad_step = torch.cat([shared, self.norm[None], self.bad_step[None]]).tolist()
        sums, counts, asked = shared[:QUARTERS], shared[QUARTERS:2 * QUARTERS], shared[2 * QUARTERS:]
        for t in (self.loss, self.count, self.norm):
            t.zero_()
        line = {"loss": sum(sums) / sum(counts), "loss_by_noise": [s / n if n else None for s, n in zip(sums, counts)],
                "grad_norm": norm / steps}
        return line, max(s if n else 0 for s, n in zip(machine.SIGNALS, asked)), int(bad_step)


# ---------------------------------------------------------------- log.jsonl

def append(out: Path, line: dict) -> None:
    """One more line, numbers to six digits: all of it or, with OSError, nothing."""
    short = json.loads(json.dumps(line), parse_float=lambda s: float(f"{float(s):.6g}"))
    text = (json.dumps(short) + "\n").encode()
    with open(out / "log.jsonl", "ab", buffering=0) as file:
        at = file.seek(0, os.SEEK_END)
        if file.write(text) < len(text):
            file.truncate(at)
            raise OSError(errno.ENOSPC, "no space left on the disk")


def read(out: Path) -> list[dict]:
    """The lines; one that a power cut has torn is left out."""
    path, found = out / "log.jsonl", []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found


def rewind(out: Path, step: int) -> None:
    """Drop lines and previews newer than the checkpoint, so that a resumed run leaves each once."""
    kept = [json.dumps(line) + "\n" for line in read(out) if line["step"] <= step]
    checkpoint.write_text(out / "log.jsonl", "".join(kept))
    for picture in out.glob("samples/step-*.png"):
        if (n := picture.stem.removeprefix("step-")).isdigit() and int(n) > step:
            picture.unlink()


def speeds(steps: int, seconds: float, waited: float, left: int, cfg: Config, peak: float,
           place: machine.Place) -> dict:
    """How fast the last `steps` steps were: images/s, FLOP/s and their share of the matmul peak, the share of the time
    that was waited for data, peak memory, and seconds until `left` more steps are done."""
    rate = cfg.batch * steps / seconds
    achieved = rate * 3 * model.flops(cfg.model)            # a backward pass costs two forward ones
    return {"images_per_second": rate, "tflops": achieved / 1e12, "share_of_peak": achieved / peak,
            "waited_for_data": waited / seconds, "memory_gb": machine.memory(place.device),
            "eta_s": left * seconds / steps}


def report(out: Path, line: dict, steps: int, bar: tqdm) -> None:
    """A line for the file; for people the end of the bar or, where there is no terminal for a bar, a line as well."""
    with checkpoint.tolerate("a line of log.jsonl"):
        append(out, line)
    loss = f"loss {line['loss']:.4f}"
    rate = f"{line['images_per_second']:.0f} images/s, {line['share_of_peak']:.0%} of peak"
    bar.set_postfix_str(f"{loss}, {rate}")
    if bar.disable:
        minutes, seconds = divmod(round(line["eta_s"]), 60)
        checkpoint.say(f"step {line['step']:,}/{steps:,}  {loss}  {rate}  {minutes}:{seconds:02} left")


# ---------------------------------------------------------------- status.json

class Status:
    """For supervisors, since torchrun turns every exit code into 1. Nothing is written before there is an `out`."""
    def __init__(self) -> None:
        self.out: Path | None = None
        self.step = 0

    def write(self, state: str, code: int = 0, reason: str = "") -> None:
        """running, done, stopped, failed:user, failed:nonfinite or failed:crash, and why.

        A crash hides no other reason: it may be that of a process whose peer has just left for it."""
        if self.out is None or state == "failed:crash" and read_status(self.out).get("state", "running") != "running":
            return
        utc = datetime.now(timezone.utc).isoformat(timespec="seconds")
        what = {"state": state, "exit_code": code, "step": self.step, "reason": reason, "utc": utc}
        with checkpoint.tolerate("status.json"):
            checkpoint.write_text(self.out / "status.json", json.dumps(what))


def read_status(out: Path) -> dict:
    """What status.json says; {} if there is none that can be read."""
    try:
        found = json.loads((out / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
