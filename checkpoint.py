"""The run folder: files that appear whole or not at all, and are checked when they are read.

<out>/config.json, log.jsonl, status.json, samples/*.png
<out>/step-00012000/state.safetensors   network, averages, optimizer: every tensor that training goes on from
<out>/step-00012000/meta.json           step, config, versions, data fingerprint, sha256 of the state
<out>/weights.safetensors               the averaged network for users, its config as JSON in the header

Everything is written under a temporary name, flushed to the disk and renamed. The name of a checkpoint is its step; the
last KEEP are kept; a damaged one falls back to the one before. Nothing here runs code from a file or unpickles.
"""
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from config import UserError

FORMAT = 1                              # of checkpoints; a newer one is refused
KEEP = 2                                # checkpoints that stay
MARGIN = 1.2                            # free disk space wanted, as a multiple of what is to be written


def say(line: str) -> None:
    """One line to the terminal, past any progress bar."""
    print(line, file=sys.stderr, flush=True)


def lock(out: Path, chief: bool) -> None:
    """Make the run folder, and let one run at a time write to it; the lock goes when the process does."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the run folder {out}: {e}") from e
    try:
        import fcntl
    except ImportError:                                     # Windows
        return
    if chief:
        _locks.append(open(out / ".lock", "w"))
        try:
            fcntl.flock(_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UserError(f"another run is writing to {out}; wait for it or choose another --out") from e


_locks: list = []                       # kept open as long as the process lives


def steps(out: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, newest first."""
    found = [re.fullmatch(r"step-(\d{8})", p.name) for p in out.iterdir()] if out.is_dir() else []
    return sorted((int(m[1]) for m in found if m), reverse=True)


def folder(out: Path, step: int) -> Path:
    return out / f"step-{step:08d}"


# ---------------------------------------------------------------- state of a run

def save(out: Path, step: int, tensors: dict[str, Tensor], meta: dict) -> bool:
    """Write one checkpoint and prune old ones. False, with a warning, when the disk says no: training can go on."""
    tmp, final = out / f".tmp-{step:08d}", folder(out, step)
    need = int(MARGIN * sum(t.numel() * t.element_size() for t in tensors.values()))
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        if (free := shutil.disk_usage(out).free) < need:
            raise OSError(f"{free / 1e9:.2f} GB free in {out}, about {need / 1e9:.2f} GB needed")
        tmp.mkdir()
        save_file(tensors, tmp / "state.safetensors")
        _sync(tmp / "state.safetensors")
        meta = {"format": FORMAT, "step": step, "sha256": _sha256(tmp / "state.safetensors"), **meta}
        _write(tmp / "meta.json", json.dumps(meta, indent=1))
        _sync(tmp)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(tmp, final)
        _sync(out)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(tmp, ignore_errors=True)
        say(f"warning: checkpoint at step {step:,} not written: {e}. Last good: {steps(out)[:1] or 'none'}.")
        return False
    for old in steps(out)[KEEP:]:
        shutil.rmtree(folder(out, old), ignore_errors=True)
    return True


def newest(out: Path) -> tuple[int, dict] | None:
    """Step and meta of the newest checkpoint whose hash is right; None if there is none at all.

    A damaged one is named and passed over. UserError if there are checkpoints and none can be read: a run never starts
    afresh over an old one."""
    for tmp in out.glob(".tmp-*") if out.is_dir() else ():
        shutil.rmtree(tmp, ignore_errors=True)
    damaged = []
    for step in steps(out):
        try:
            return step, read_meta(folder(out, step))
        except (OSError, ValueError, KeyError) as e:
            damaged.append(folder(out, step).name)
            say(f"warning: checkpoint {damaged[-1]} is damaged ({e}); trying the one before.")
    if damaged:
        raise UserError(f"none of the {len(damaged)} checkpoints in {out} can be read ({', '.join(damaged)}). "
                        f"Put a good copy back or choose another --out")
    return None


def read_meta(where: Path) -> dict:
    """The meta.json of one checkpoint, after its state has been hashed. ValueError if the two disagree."""
    meta = json.loads((where / "meta.json").read_text(encoding="utf-8"))
    if meta["format"] > FORMAT:
        raise UserError(f"{where} has checkpoint format {meta['format']}, this code reads up to {FORMAT}")
    if _sha256(where / "state.safetensors") != meta["sha256"]:
        raise ValueError("sha256 mismatch")
    return meta


def read_state(out: Path, step: int, device: torch.device) -> dict[str, Tensor]:
    """Tensors of a checkpoint that `newest` has found good."""
    return load_file(folder(out, step) / "state.safetensors", device=str(device))


def load_strictly(net: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Load every weight of `net` from `tensors` of the same names; UserError that lists what does not fit."""
    want = net.state_dict()
    missing = [k for k in want if k not in tensors]
    extra = [k for k in tensors if k not in want]
    shapes = [f"{k} {tuple(tensors[k].shape)} for {tuple(want[k].shape)}" for k in want
              if k in tensors and tensors[k].shape != want[k].shape]
    if missing or extra or shapes:
        raise UserError(f"{name} does not fit the model: {len(missing)} missing, {len(extra)} unexpected, {len(shapes)} "
                        f"of another shape: {', '.join((shapes + missing + extra)[:5])}")
    net.load_state_dict(tensors)


# ---------------------------------------------------------------- weights for users

def write_weights(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """A safetensors file with text in its header, among it the sha256 of its tensors."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in sorted(tensors.items())}
    save_file(tensors, path.with_suffix(".tmp"), metadata={**header, "sha256": _sha256_of(tensors)})
    _sync(path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header that write_weights wrote; UserError if the file is missing, foreign or damaged."""
    if not path.is_file():
        raise UserError(f"no weights at {path}; train.py writes weights.safetensors into its run folder at the first "
                        f"checkpoint")
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as f:
            header = f.metadata() or {}
    except SafetensorError as e:
        raise UserError(f"{path} is damaged or no safetensors file: {e}") from e
    if "config" not in header:
        raise UserError(f"{path} has no plaindit config in its header; wanted a weights.safetensors of a run folder")
    if header.get("sha256") != _sha256_of(tensors):
        raise UserError(f"{path} is damaged: its sha256 is not the one in its header")
    return tensors, header


# ---------------------------------------------------------------- whole or not at all

def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    tmp = path.with_name(path.name + ".tmp")
    _write(tmp, text)
    os.replace(tmp, path)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk. Windows cannot open folders and does not need it."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sha256_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
