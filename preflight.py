"""May this run begin? Everything that can be wrong with it is found here, before the first step.

Nothing here touches a weight: a config is read, checked by itself, completed from its data, and compared with the run
that lies in the folder. Errors are UserError, for something to change, or Nonfinite, for a run that would fail again.
"""
import dataclasses
import json
from contextlib import suppress
from pathlib import Path

import torch

import checkpoint
import data
import log
import machine
import model
from conditioning import PADDINGS
from config import Config, UserError, check_ranges, differences, from_json, load, parse

# what to change after a loss that is not finite
CURES = ("lr", "lr_mp", "warmup", "decay", "cooldown", "clip", "dtype")
# What a run may change when it is resumed; all else must stay, or the result is neither the old run nor a new one.
# Where the data lies may change, not what it is: that is in its fingerprint. Snapshots are part of the state.
MAY_CHANGE = {*CURES, "out", "data", "steps", "workers", "max_bad", "log_every", "save_every", "sample_every", "lam",
              "eta", "magnitudes_every", "fid_every", "fid_ref", "fid_n", "threads", "compile"}
TRY = f"change {' or '.join('--' + key for key in CURES)}"


class Nonfinite(Exception):
    """The loss, a gradient or a weight is inf or nan."""


def read_config(argv: list[str]) -> Config:
    """The config of --config=FILE with the other flags put in; the default config if there is none."""
    rest, path = [], None
    words = iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or next(words, "")
        else:
            rest.append(word)
    return parse(rest, load(path) if path is not None else Config())


def check(cfg: Config, world: int) -> None:
    """UserError for a config that cannot run, before anything is opened or built."""
    check_ranges(cfg)
    for key, known in (("compile", ("auto", "on", "off")), ("dtype", machine.DTYPES),
                       ("padding", PADDINGS)):
        if getattr(cfg, key) not in known:
            raise UserError(f"unknown {key}={getattr(cfg, key)!r}; there are {', '.join(known)}")
    if cfg.drop + cfg.drop_controls > 1:
        raise UserError(f"drop={cfg.drop} and drop_controls={cfg.drop_controls} are shares of one whole; lower one")
    if bool(cfg.fid_every) != bool(cfg.fid_ref):
        raise UserError(f"fid_every={cfg.fid_every} and fid_ref={cfg.fid_ref!r} belong together: how often, and "
                        "against what")
    if cfg.encoder != "words" and cfg.model.semantics != "text":
        raise UserError(f"encoder={cfg.encoder!r} reads captions; model.semantics={cfg.model.semantics!r} has none")
    if cfg.padding != "zero" and cfg.model.semantics != "text":
        raise UserError(f"padding={cfg.padding!r} is of captions; model.semantics={cfg.model.semantics!r} has none")
    if cfg.crop != "global" and "crop" not in cfg.augment.split("+"):
        enough = "+".join(filter(None, (cfg.augment, "crop")))
        raise UserError(f"crop={cfg.crop!r} needs crops to be random; say --augment={enough}")
    if cfg.batch % cfg.micro:
        near = max(d for d in range(1, min(cfg.micro, cfg.batch) + 1) if cfg.batch % d == 0)
        raise UserError(f"batch={cfg.batch} is not a multiple of micro={cfg.micro}; try --micro={near}")
    n = cfg.batch // cfg.micro
    if n % world:
        fit = [w for w in range(1, n + 1) if n % w == 0]
        raise UserError(f"batch={cfg.batch} with micro={cfg.micro} is {n} microbatches, which {world} processes "
                        f"cannot share; use {', '.join(map(str, fit))} processes, or another micro")
    m, open_ended = cfg.model, ("classes", "text_dim", "text_length")       # 0 = for the data to say
    model.check(dataclasses.replace(m, **{key: getattr(m, key) or 1 for key in open_ended}))


def complete(cfg: Config, source: data.Source, encoder: data.TextEncoder | None) -> Config:
    """The config with what only the data set knows filled in: number of classes, size of a caption's encoding."""
    m = cfg.model
    if m.semantics == "class":
        if m.classes not in (0, len(source.classes)):
            raise UserError(f"{cfg.data} has {len(source.classes)} classes, but model.classes={m.classes}")
        m = dataclasses.replace(m, classes=len(source.classes))
    if m.semantics == "text":
        data.check_words(source, encoder, cfg)
        m = dataclasses.replace(m, text_dim=encoder.dim, text_length=encoder.length)
    model.check(m)
    return dataclasses.replace(cfg, model=m)


def check_retry(cfg: Config, out: Path) -> None:
    """Nonfinite if the last run in `out` ended so and nothing has changed that could make this one end otherwise."""
    last, path = log.read_status(out), out / "config.json"
    if last.get("state") != "failed:nonfinite" or not path.is_file():
        return
    with suppress(UserError):                               # a config of another version
        old = from_json(path.read_text(encoding="utf-8"))
        if all(getattr(old, key) == getattr(cfg, key) for key in CURES):
            raise Nonfinite(f"the last run in {out} was not finite at step {last.get('step')} and this one would not "
                            f"be; {TRY}, or delete {out / 'status.json'} to try anyway")


def check_resume(cfg: Config, meta: dict, fingerprint: str, out: Path) -> None:
    """UserError if the run in `out` is another one than this config describes."""
    old = from_json(json.dumps(meta["config"]))
    changed = [d for d in differences(old, cfg) if d.split(":")[0] not in MAY_CHANGE]
    if meta["data"] != fingerprint:
        changed.append(f"data fingerprint: {meta['data'][:8]} -> {fingerprint[:8]}")
    if changed:
        raise UserError(f"cannot resume {out}: {', '.join(changed)}. Choose another --out, or set these back")
    if meta["step"] > cfg.steps:
        raise UserError(f"{out} is at step {meta['step']:,} already, past steps={cfg.steps:,}; choose more --steps "
                        "or another --out")
    now = {"threads": torch.get_num_threads(), **machine.versions()}
    if other := [f"{k} {meta.get(k)} -> {v}" for k, v in now.items() if meta.get(k) != v]:
        checkpoint.say(f"note: {', '.join(other)}; sums may differ in the last bit.")
