"""Logging: printed lines, files that appear whole, log.jsonl and skipped.jsonl during a run, status.json at its end.

Dimensions: B batch, T noise steps.
"""
import errno
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from config import Config
from runtime import distributed

QUARTERS = 4                            # the log splits the loss by quarter of the noise range, cleanest first
TEMPORARY = ".tmp"                      # prefix of unfinished files and folders, also those of safetensors
SKIPPED = "skipped.jsonl"


def info(line: str) -> None:
    """Print one line on stderr, past any progress bar."""
    tqdm.write(line, file=sys.stderr)


@contextmanager
def warn_on_disk_error(what: str) -> Iterator[None]:
    """Turn a disk error while writing `what` into a warning."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        info(f"warning: {what} not written: {e}. Training continues.")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; flush it and rename it to `path` on success, remove it on failure."""
    temporary = path.with_name(f"{TEMPORARY}-{os.getpid()}-{path.name}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        remove(temporary)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    write_bytes(path, text.encode())


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk. Windows cannot open folders and does not need it."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or a folder as far as the disk allows."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


class LossWindow:
    """Sums since the last line of the log, on the device: loss and count by noise quarter, gradient norm.

    `bad` becomes 1 at the first step whose gradient is not finite, and stays so; `bad_step` is that step, before -1."""
    def __init__(self, device: torch.device) -> None:
        self.loss, self.count = torch.zeros(QUARTERS, device=device), torch.zeros(QUARTERS, device=device)
        self.norm, self.bad = torch.zeros((), device=device), torch.zeros((), device=device)
        self.bad_step = torch.full((), -1.0, device=device)

    def add(self, loss: Tensor, i: Tensor, T: int) -> None:
        """Add the losses (B,) of images at noise indices i (B,)."""
        here = (i * QUARTERS // T)[:, None] == torch.arange(QUARTERS, device=i.device)          # (B, 4)
        self.loss += torch.where(here, loss.detach()[:, None], 0.0).sum(0)
        self.count += here.sum(0)

    def add_norm(self, norm: Tensor, step: int) -> None:
        self.norm += norm
        bad = 1 - torch.isfinite(norm).float()
        self.bad_step.copy_(torch.where(bad > self.bad, float(step), self.bad_step))
        self.bad.copy_(torch.maximum(self.bad, bad))

    def read(self, steps: int, stop: distributed.Stop, dist: distributed.Dist) -> tuple[dict, int, int]:
        """Return means over all processes, the signal that any got (0 = none), the first bad step; start again."""
        signals = torch.tensor([float(stop.signal == s) for s in distributed.SIGNALS], device=dist.device)
        shared = distributed.all_reduce_sum(torch.cat([self.loss, self.count, signals]), dist)
        *shared, norm, bad_step = torch.cat([shared, self.norm[None], self.bad_step[None]]).tolist()
        sums, counts, signals = shared[:QUARTERS], shared[QUARTERS:2 * QUARTERS], shared[2 * QUARTERS:]
        for t in (self.loss, self.count, self.norm):
            t.zero_()
        line = {"loss": sum(sums) / sum(counts), "loss_by_noise": [s / n if n else None for s, n in zip(sums, counts)],
                "grad_norm": norm / steps}
        return line, max(s if n else 0 for s, n in zip(distributed.SIGNALS, signals)), int(bad_step)


def append(out: Path, line: dict) -> None:
    """Append one line to log.jsonl, with numbers of six digits: all of it or, with OSError, nothing."""
    short = json.loads(json.dumps(line), parse_float=lambda s: float(f"{float(s):.6g}"))
    content = json.dumps(short).encode() + b"\n"
    with open(out / "log.jsonl", "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(content) < len(content):
            file.truncate(end)
            raise OSError(errno.ENOSPC, "no space left on the disk")


def read(out: Path) -> list[dict]:
    """Read the lines, without any that a power cut has torn."""
    path, found = out / "log.jsonl", []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                found.append(line)
    return found


def drop_after(out: Path, step: int) -> None:
    """Drop lines, previews and snapshots newer than the checkpoint, so that a resumed run leaves each once."""
    write_text(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in read(out) if line["step"] <= step))
    for path in (*out.glob("samples/*.png"), *out.glob("snapshots/*.safetensors")):
        if (m := re.match(r"step-(\d+)[.-]", path.name)) and int(m[1]) > step:
            path.unlink()


class RunLog:
    """Times a run and reports it, on rank 0. flops: of a training step per image; peak: FLOP/s of all processes."""
    def __init__(self, out: Path, start: int, cfg: Config, flops: int, peak: float, dist: distributed.Dist) -> None:
        self.out, self.cfg, self.flops, self.peak, self.dist, self.last = out, cfg, flops, peak, dist, start
        hidden = dist.rank > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=cfg.steps, initial=start, disable=hidden, unit="step", dynamic_ncols=True)
        self.restart_clock()

    def restart_clock(self) -> None:
        self.t0, self.seconds = time.monotonic(), Counter()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time inside as "data", waiting for it, or as "aside" from training."""
        before = time.monotonic()
        yield
        self.seconds[part] += time.monotonic() - before

    def throughput(self, step: int) -> dict[str, float]:
        """Speed since the last report, the share of time spent waiting for data, and seconds left."""
        steps, seconds = step - self.last, time.monotonic() - self.t0 - self.seconds["aside"]
        rate = self.cfg.batch * steps / seconds
        return {"images_per_second": rate, "tflops": rate * self.flops / 1e12,
                "share_of_peak": rate * self.flops / self.peak, "waited_for_data": self.seconds["data"] / seconds,
                "memory_gb": distributed.memory(self.dist.device), "eta_s": (self.cfg.steps - step) * seconds / steps}

    def report(self, step: int, line: dict) -> None:
        """Add a line to log.jsonl; show it at the end of the bar or, without a terminal for a bar, print it."""
        self.last = step
        if self.dist.rank > 0:
            return
        with warn_on_disk_error("a line of log.jsonl"):
            append(self.out, {"step": step, **line})
        text = f"loss {line['loss']:.4f}  {line['images_per_second']:.0f} images/s, {line['share_of_peak']:.0%} of peak"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            minutes, seconds = divmod(round(line["eta_s"]), 60)
            info(f"step {step:,}/{self.cfg.steps:,}  {text}  {minutes}:{seconds:02} left")


class Status:
    """status.json, for supervisors: torchrun turns every exit code into 1. Writes nothing before `out` is set."""
    def __init__(self) -> None:
        self.out: Path | None = None
        self.step = 0

    def write(self, state: str, code: int = 0, reason: str = "") -> None:
        """State is running, done, stopped, failed:user, failed:nonfinite or failed:crash.

        A crash replaces no other reason: a process crashes too when its peer has left for that reason."""
        if self.out is None or state == "failed:crash" and read_status(self.out).get("state", "running") != "running":
            return
        utc = datetime.now(timezone.utc).isoformat(timespec="seconds")
        content = {"state": state, "exit_code": code, "step": self.step, "reason": reason, "utc": utc}
        with warn_on_disk_error("status.json"):
            write_text(self.out / "status.json", json.dumps(content))


def read_status(out: Path) -> dict:
    """Read status.json; {} if it is missing or damaged."""
    with suppress(OSError, ValueError):
        found = json.loads((out / "status.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


class SkippedFiles:
    """skipped.jsonl: every unusable file of a run once, with the reason; its processes and threads share the file."""
    def __init__(self, out: Path) -> None:
        self.path, self.names, self.end = out / SKIPPED, set(), 0               # names in the file up to byte `end`

    def note(self, bad: dict[str, str]) -> None:
        """Add those {name: reason} that the file lacks."""
        if bad.keys() <= self.names:
            return
        with warn_on_disk_error(SKIPPED), FileLock(self.path.with_name(".skipped.lock")):
            with open(self.path, "a+b") as file:
                file.seek(self.end)
                whole, newline, _ = file.read().rpartition(b"\n")               # a kill may have left half a line
                self.end += len(whole + newline)
                file.truncate(self.end)
                for line in whole.splitlines():
                    with suppress(ValueError, TypeError, KeyError):             # a line that we did not write
                        self.names.add(json.loads(line)["name"])
                new = {name: reason for name, reason in bad.items() if name not in self.names}
                file.writelines(json.dumps({"name": k, "reason": v}).encode() + b"\n" for k, v in new.items())
            self.names |= new.keys()


def follow(source: Any, out: Path) -> None:
    """List the files that the source has skipped, and will skip from now on, in this folder."""
    source.skipped = SkippedFiles(out)
    source.skipped.note(source.bad)
