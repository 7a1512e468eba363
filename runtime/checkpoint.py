"""The run folder: checkpoints and weights that appear whole or not at all and are verified when read.

<out>/step-00012000/state.safetensors   network, averages, optimizer: every tensor of the state
<out>/step-00012000/meta.json           step, config, versions, data fingerprint, sha256 of the state and of all this
<out>/weights.safetensors               the averaged network for users, its config as JSON in the header

Nothing here runs code from a file or unpickles.
"""
import errno
import hashlib
import json
import os
import re
import shutil
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from config import Config, UserError, differences, from_json
from runtime import distributed, log
from runtime.log import TEMPORARY, atomic_path, info, remove, sync, warn_on_disk_error

FORMAT = 1                              # of checkpoints; a newer one is refused
KEEP = 2                                # checkpoints that stay
MARGIN = 1.2                            # free disk space that a checkpoint needs, as a multiple of its size
# Options that can keep a run from diverging.
RETRY_FIELDS = ("lr", "lr_mp", "warmup", "lr_decay_start", "cooldown", "grad_clip", "dtype")
RETRY_HINT = f"change {' or '.join('--' + key for key in RETRY_FIELDS)}"
# What a resumed run may change. `data` is a path: the data themselves are compared by fingerprint.
MAY_CHANGE = {*RETRY_FIELDS, "out", "data", "steps", "workers", "max_bad_fraction", "log_every", "save_every",
              "sample_every", "guidance", "eta", "magnitudes_every", "fid_every", "fid_ref", "fid_n", "threads",
              "compile"}


class Nonfinite(Exception):
    """The loss, a gradient or a weight is inf or nan."""


def lock(out: Path) -> AbstractContextManager:
    """Make the run folder, lock it against other runs within the context returned, and remove unfinished files."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{TEMPORARY}probe").touch()                 # an old lock file says nothing about the folder
        remove(out / f"{TEMPORARY}probe")
    except OSError as e:
        raise UserError(f"cannot write to the run folder {out}: {e}; choose another --out") from e
    held = nullcontext()
    try:
        held = FileLock(out / ".lock", timeout=0).acquire()
    except Timeout as e:
        raise UserError(f"another run is writing to {out}; wait for it or choose another --out") from e
    except PermissionError as e:                            # of another user's run
        raise UserError(f"cannot lock the run folder {out}: {e}; choose another --out") from e
    except (OSError, RuntimeError) as e:                    # some network disks have no locks
        info(f"note: {out} cannot be locked ({e}); let one run at a time write to it.")
    for stale in [path for sub in ("", "samples", "snapshots") for path in (out / sub).glob(f"{TEMPORARY}*")]:
        remove(stale)
    return held


def steps(out: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, newest first."""
    found = [re.fullmatch(r"step-(\d{8,})", p.name) for p in out.iterdir()] if out.is_dir() else []
    return sorted((int(m[1]) for m in found if m), reverse=True)


def folder(out: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return out / f"step-{step:08d}"


def need_space(out: Path, tensors: dict[str, Tensor]) -> None:
    """OSError unless the disk has room for one checkpoint of these tensors."""
    need = int(MARGIN * sum(t.numel() * t.element_size() for t in tensors.values()))
    if (free := shutil.disk_usage(out).free) < need:
        raise OSError(errno.ENOSPC, f"{free / 1e9:.3f} GB free in {out}, about {need / 1e9:.3f} GB needed")


def save(out: Path, step: int, tensors: dict[str, Tensor], meta: dict) -> bool:
    """Write one checkpoint, then drop old ones. A disk error is a warning and False."""
    tmp = out / f"{TEMPORARY}-{step:08d}"
    try:
        need_space(out, tensors)
        tmp.mkdir()
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, tmp / "state.safetensors")
        sync(tmp / "state.safetensors")
        meta = {"format": FORMAT, "step": step, **meta, "sha256": sha256_file(tmp / "state.safetensors")}
        (tmp / "meta.json").write_bytes(json.dumps({**meta, "sha256_meta": _sha256_of({}, meta)}, indent=1).encode())
        sync(tmp / "meta.json")
        sync(tmp)
        remove(folder(out, step))
        os.rename(tmp, folder(out, step))
        sync(out)
    except (OSError, SafetensorError) as e:
        remove(tmp)
        info(f"warning: checkpoint at step {step:,} not written: {e}. Training continues; last good checkpoint: "
             f"{', '.join(f'step {s:,}' for s in steps(out)[:1]) or 'none'}.")
        return False
    prune(out, step, newer=True)                            # damaged, or the run would have resumed there
    return True


def prune(out: Path, step: int, newer: bool = False) -> None:
    """Drop checkpoints older than the last KEEP up to `step`; with `newer`, also later ones."""
    kept = [s for s in steps(out) if s <= step][:KEEP]
    for other in [s for s in steps(out) if s not in kept and (newer or s < step)]:
        remove(folder(out, other))


def latest(out: Path) -> dict | None:
    """Return the meta of the newest undamaged checkpoint, with a warning for each damaged one; None without any.

    UserError if all are damaged, or if only weights are left: a run never starts over an old one."""
    for step in steps(out):
        try:
            return read_meta(folder(out, step))
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            info(f"warning: checkpoint {folder(out, step).name}: {e or type(e).__name__}; it is damaged.")
    if found := steps(out):
        raise UserError(f"none of the {len(found)} checkpoints in {out} can be read; choose another --out")
    if (out / "weights.safetensors").exists():
        raise UserError(f"{out} has weights.safetensors but no checkpoint to resume from; choose another --out")
    return None


def read_meta(where: Path) -> dict:
    """Read the meta.json of one checkpoint and verify all hashes; ValueError if any disagrees."""
    meta = json.loads((where / "meta.json").read_text(encoding="utf-8"))
    if meta["format"] > FORMAT:
        raise UserError(f"{where} has checkpoint format {meta['format']}, this code reads up to {FORMAT}; update it")
    if meta.pop("sha256_meta") != _sha256_of({}, meta):
        raise ValueError("sha256 mismatch in meta.json")
    if folder(where.parent, meta["step"]) != where:
        raise ValueError(f"holds step {meta['step']}")
    if sha256_file(where / "state.safetensors") != meta["sha256"]:
        raise ValueError("sha256 mismatch in state.safetensors")
    return meta


def read_state(where: Path, tensors: dict[str, Tensor]) -> None:
    """Copy the state of a checkpoint into `tensors`. UserError before any copy if names or shapes differ."""
    with safe_open(where / "state.safetensors", "pt") as file:
        _check_keys(tensors, {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}, where)
        with torch.no_grad():
            for k, v in tensors.items():
                v.copy_(file.get_tensor(k))


class Checkpointer:
    """Saves the state of a run, last at step `saved`. Every process calls every method; rank 0 alone writes."""
    def __init__(self, out: Path, net: nn.Module, tensors: dict[str, Tensor], saved: int, meta: dict,
                 dist: distributed.Dist) -> None:
        self.out, self.net, self.tensors, self.saved, self.meta, self.dist = out, net, tensors, saved, meta, dist

    def save(self, step: int) -> None:
        """Write a checkpoint. RuntimeError if weights differ between processes, Nonfinite for inf or nan in them."""
        if distributed.replicas_differ(self.net, self.dist):
            raise RuntimeError(f"weights differ between processes at step {step:,}; nothing was saved")
        if broken := not_finite(self.tensors):
            raise Nonfinite(f"{', '.join(broken[:5])} are not finite at step {step:,}; nothing was saved")
        if self.dist.rank == 0 and save(self.out, step, self.tensors, self.meta):
            self.saved = step

    def write_weights(self, step: int, net: nn.Module, header: dict[str, str]) -> None:
        """Write weights.safetensors if `step` has a checkpoint; a resumed run makes up for a kill between the two."""
        if self.dist.rank == 0 and self.saved == step > 0:
            with warn_on_disk_error("weights.safetensors"):
                write_weights(self.out / "weights.safetensors", net.state_dict(), {**header, "step": str(step)})


def check_retry(cfg: Config, out: Path) -> None:
    """Nonfinite if the last run in `out` diverged and no option that could change this has changed."""
    last = log.read_status(out)
    if last.get("state") != "failed:nonfinite":
        return
    with suppress(UserError, OSError):                      # a config of another version, or none
        old = from_json((out / "config.json").read_text(encoding="utf-8"))
        if all(getattr(old, key) == getattr(cfg, key) for key in RETRY_FIELDS):
            raise Nonfinite(f"the last run in {out} diverged at step {last.get('step')} and nothing relevant has "
                            f"changed; {RETRY_HINT}, or delete {out / 'status.json'} to try anyway")


def check_resume(cfg: Config, meta: dict, fingerprint: str, out: Path) -> None:
    """UserError if the checkpoint in `out` belongs to another run than this config and data describe."""
    old = from_json(json.dumps(meta["config"]))
    changed = [d for d in differences(old, cfg) if d.split(":")[0] not in MAY_CHANGE]
    if meta["data"] != fingerprint:
        changed.append(f"data fingerprint: {meta['data'][:8]} -> {fingerprint[:8]}")
    if changed:
        raise UserError(f"cannot resume {out}: {', '.join(changed)}. Choose another --out, or set these back")
    if meta["step"] > cfg.steps:
        raise UserError(f"{out} is at step {meta['step']:,} already, past steps={cfg.steps:,}; raise --steps or choose "
                        "another --out")


def load_strictly(net: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Load every weight of `net`; UserError if names or shapes differ or a number is not finite."""
    _check_keys(net.state_dict(), {k: tuple(v.shape) for k, v in tensors.items()}, name)
    if bad := not_finite(tensors):
        raise UserError(f"{name} holds inf or nan in {', '.join(bad[:5])}")
    net.load_state_dict(tensors)


def _check_keys(want: dict[str, Tensor], found: dict[str, tuple], name: object) -> None:
    missing, extra = [k for k in want if k not in found], [k for k in found if k not in want]
    shapes = [f"{k} {found[k]} for {tuple(v.shape)}" for k, v in want.items() if k in found and found[k] != v.shape]
    if missing or extra or shapes:
        raise UserError(f"{name} does not fit the model: {len(missing)} missing, {len(extra)} unexpected, "
                        f"{len(shapes)} of another shape: {', '.join((shapes + missing + extra)[:5])}")


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold inf or nan."""
    good = torch.stack([v.isfinite().all() for v in tensors.values()]).tolist()
    return [k for k, fine in zip(tensors, good) if not fine]


def write_weights(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file with text in its header, which includes the sha256 of the tensors and of that text."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in sorted(tensors.items())}
    with atomic_path(path) as tmp:
        save_file(tensors, tmp, metadata={**header, "sha256": _sha256_of(tensors, header)})


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and header of a file that write_weights wrote; UserError if it is missing, foreign or damaged."""
    header = read_header(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is damaged: {e}") from e
    if header.get("sha256") != _sha256_of(tensors, {k: v for k, v in header.items() if k != "sha256"}):
        raise UserError(f"{path} is damaged: its sha256 is not the one in its header")
    return tensors, header


def read_header(path: Path) -> dict[str, str]:
    """Read the header of a file that write_weights wrote, without its tensors. UserError for any other file."""
    if not path.is_file():
        raise UserError(f"no weights at {path}; train.py writes weights.safetensors at the first checkpoint")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is damaged or no safetensors file: {e}") from e
    if "config" not in header:
        raise UserError(f"{path} has no plaindit config in its header; it must be the weights.safetensors of a run")
    return header


def sha256_file(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sha256_of(tensors: dict[str, Tensor], text: dict) -> str:
    """sha256 of the tensors' names, shapes, types and bytes, and of the text beside them."""
    digest = hashlib.sha256(json.dumps(text, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
