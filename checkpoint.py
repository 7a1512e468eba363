"""The run folder: files that appear whole or not at all, and are checked when they are read.

<out>/step-00012000/state.safetensors   network, averages, optimizer: every tensor that training goes on from
<out>/step-00012000/meta.json           step, config, versions, data fingerprint, sha256 of the state and of all this
<out>/weights.safetensors               the averaged network for users, its config as JSON in the header

Everything is written under a temporary name, flushed to the disk and renamed. The name of a checkpoint is its step; the
last KEEP are kept; a damaged one falls back to the one before. Nothing here runs code from a file or unpickles.
"""
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from config import UserError

FORMAT = 1                              # of checkpoints; a newer one is refused
KEEP = 2                                # checkpoints that stay
MARGIN = 1.2                            # free disk space wanted, as a multiple of what is to be written
TEMPORARY = ".tmp"                      # how the name of an unfinished file or folder begins, safetensors' own too


def say(line: str) -> None:
    """One line to the terminal, past any progress bar."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


@contextmanager
def tolerate(what: str) -> Iterator[None]:
    """A disk that refuses `what` is a warning: training goes on without it."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        say(f"warning: {what} not written: {e}. Training goes on.")


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Make the run folder and hold it: one run at a time writes to it. The lock goes when the process does."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")
        (out / f"{TEMPORARY}probe").touch()                 # the lock file may be there and the folder closed
        (out / f"{TEMPORARY}probe").unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to the run folder {out}: {e}; choose another --out") from e
    with file:
        try:
            _lock(file.fileno())
        except (BlockingIOError, PermissionError) as e:
            raise UserError(f"another run is writing to {out}; wait for it or choose another --out") from e
        except OSError as e:                                # some network disks have no locks
            say(f"note: {out} cannot be locked ({e}); let one run at a time write to it.")
        for stale in (*out.glob(f"{TEMPORARY}*"), *out.glob(f"samples/{TEMPORARY}*")):
            _remove(stale)
        yield


def wait_for(file: BinaryIO) -> None:
    """Wait until no other process holds this open file; it is held until it is closed. Without locks, go on at once."""
    file.seek(0)
    with suppress(OSError):
        _lock(file.fileno(), wait=True)


def _lock(handle: int, wait: bool = False) -> None:
    """BlockingIOError or, on Windows, PermissionError if another process holds the lock and one is not to wait."""
    try:
        import fcntl
    except ImportError:
        import msvcrt
        return msvcrt.locking(handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def steps(out: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, newest first."""
    found = [re.fullmatch(r"step-(\d{8,})", p.name) for p in out.iterdir()] if out.is_dir() else []
    return sorted((int(m[1]) for m in found if m), reverse=True)


def folder(out: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return out / f"step-{step:08d}"


# ---------------------------------------------------------------- state of a run

def need_space(out: Path, tensors: dict[str, Tensor]) -> None:
    """OSError unless the disk has room for one checkpoint of these tensors."""
    need = int(MARGIN * sum(t.numel() * t.element_size() for t in tensors.values()))
    if (free := shutil.disk_usage(out).free) < need:
        raise OSError(errno.ENOSPC, f"{free / 1e9:.3f} GB free in {out}, about {need / 1e9:.3f} GB needed")


def save(out: Path, step: int, tensors: dict[str, Tensor], meta: dict) -> bool:
    """Write one checkpoint, then drop old ones. False, with a warning, when the disk says no: training can go on."""
    tmp, final = out / f"{TEMPORARY}-{step:08d}", folder(out, step)
    try:
        _remove(tmp)
        need_space(out, tensors)
        tmp.mkdir()
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, tmp / "state.safetensors")
        _sync(tmp / "state.safetensors")
        meta = {"format": FORMAT, "step": step, **meta, "sha256": _sha256(tmp / "state.safetensors")}
        _write(tmp / "meta.json", json.dumps({**meta, "sha256_meta": _sha256_of({}, meta)}, indent=1).encode())
        _sync(tmp)

        _remove(final)
        os.rename(tmp, final)
        _sync(out)
    except (OSError, SafetensorError) as e:
        _remove(tmp)
        say(f"warning: checkpoint at step {step:,} not written: {e}. Training goes on; last good checkpoint: "
            f"{', '.join(f'step {s:,}' for s in steps(out)[:1]) or 'none'}.")
        return False
    for newer in [s for s in steps(out) if s > step]:       # damaged, or the run would have begun there
        _remove(folder(out, newer))
    prune(out, step)
    return True


def prune(out: Path, step: int) -> None:
    """Drop checkpoints older than the last KEEP up to `step`."""
    for old in [s for s in steps(out) if s <= step][KEEP:]:
        _remove(folder(out, old))


def newest(out: Path) -> dict | None:
    """The meta of the newest checkpoint whose hashes are right; None if there is none at all.

    A damaged one is named and passed over. UserError if there are checkpoints and none can be read, or if only their
    weights are left: a run never starts afresh over an old one."""
    damaged = []
    for step in steps(out):
        try:
            return read_meta(folder(out, step))
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            damaged.append(f"{folder(out, step).name}: {e or type(e).__name__}")
            say(f"warning: checkpoint {damaged[-1]}; it is damaged, trying the one before.")
    if damaged:
        raise UserError(f"none of the {len(damaged)} checkpoints in {out} can be read ({'; '.join(damaged)}). "
                        f"Put a good copy back or choose another --out")
    if (out / "weights.safetensors").exists():
        raise UserError(f"{out} has weights.safetensors but no checkpoint to go on from; choose another --out")
    return None


def read_meta(where: Path) -> dict:
    """The meta.json of one checkpoint after everything in it has been hashed. ValueError if anything disagrees."""
    meta = json.loads((where / "meta.json").read_text(encoding="utf-8"))
    if meta["format"] > FORMAT:
        raise UserError(f"{where} has checkpoint format {meta['format']}, this code reads up to {FORMAT}; update it")
    if meta.pop("sha256_meta") != _sha256_of({}, meta):
        raise ValueError("sha256 mismatch in meta.json")
    if folder(where.parent, meta["step"]) != where:
        raise ValueError(f"holds step {meta['step']}")
    if _sha256(where / "state.safetensors") != meta["sha256"]:
        raise ValueError("sha256 mismatch in state.safetensors")
    return meta


def read_state(where: Path, tensors: dict[str, Tensor]) -> None:
    """Copy the state of a checkpoint into `tensors`. UserError that lists what does not fit, before any is copied."""
    with safe_open(where / "state.safetensors", "pt") as file:
        _fit(tensors, {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}, where)
        with torch.no_grad():
            for k, v in tensors.items():
                v.copy_(file.get_tensor(k))


def load_strictly(net: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Load every weight of `net` from `tensors` of the same names; UserError that lists what does not fit."""
    _fit(net.state_dict(), {k: tuple(v.shape) for k, v in tensors.items()}, name)
    if bad := not_finite(tensors):
        raise UserError(f"{name} holds inf or nan in {', '.join(bad[:5])}")
    net.load_state_dict(tensors)


def _fit(want: dict[str, Tensor], found: dict[str, tuple], name: object) -> None:
    missing, extra = [k for k in want if k not in found], [k for k in found if k not in want]
    shapes = [f"{k} {found[k]} for {tuple(v.shape)}" for k, v in want.items() if k in found and found[k] != v.shape]
    if missing or extra or shapes:
        raise UserError(f"{name} does not fit the model: {len(missing)} missing, {len(extra)} unexpected, "
                        f"{len(shapes)} of another shape: {', '.join((shapes + missing + extra)[:5])}")


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold inf or nan."""
    good = torch.stack([v.isfinite().all() for v in tensors.values()]).tolist()
    return [k for k, fine in zip(tensors, good) if not fine]


# ---------------------------------------------------------------- weights for users

def write_weights(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """A safetensors file with text in its header, among it the sha256 of its tensors and of that text."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in sorted(tensors.items())}
    with _whole(path) as tmp:
        save_file(tensors, tmp, metadata={**header, "sha256": _sha256_of(tensors, header)})
        _sync(tmp)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header that write_weights wrote; UserError if the file is missing, foreign or damaged."""
    header = read_header(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is damaged: {e}") from e
    if header.get("sha256") != _sha256_of(tensors, {k: v for k, v in header.items() if k != "sha256"}):
        raise UserError(f"{path} is damaged: its sha256 is not the one in its header")
    return tensors, header


def read_header(path: Path) -> dict[str, str]:
    """The text in the header of a file that write_weights wrote, without its tensors. UserError for any other file."""
    if not path.is_file():
        raise UserError(f"no weights at {path}; train.py writes weights.safetensors into its run folder at the first "
                        f"checkpoint")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is damaged or no safetensors file: {e}") from e
    if "config" not in header:
        raise UserError(f"{path} has no plaindit config in its header; wanted a weights.safetensors of a run folder")
    return header


# ---------------------------------------------------------------- whole or not at all

@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it if all goes well and removed if not."""
    tmp = path.with_name(f"{TEMPORARY}-{os.getpid()}-{path.name}")
    try:
        yield tmp
        os.replace(tmp, path)
        _sync(path.parent)
    finally:
        _remove(tmp)                                        # not there any more if all went well


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    with _whole(path) as tmp:
        _write(tmp, content)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    write_bytes(path, text.encode())


def _remove(path: Path) -> None:
    """Take away a file or a folder as far as the disk allows."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk itself. Windows cannot open folders and does not need it."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        _full_sync(handle)
    finally:
        os.close(handle)


def _full_sync(handle: int) -> None:
    """fsync; on macOS also empty the drive's own cache, which fsync leaves alone there."""
    os.fsync(handle)
    if sys.platform == "darwin":
        import fcntl
        with suppress(OSError):                             # network disks refuse it
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sha256_of(tensors: dict[str, Tensor], text: dict) -> str:
    """Of names, shapes, types and bytes of the tensors, and of the text beside them."""
    digest = hashlib.sha256(json.dumps(text, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
