"""Start a run from the averaged weights of another one: across resolution, data sets, classes and captions, depth.

    python train.py --config=configs/shapes64.py --init=out/shapes32

A layer is kept if its weights have the same names and shapes in both networks, otherwise it stays fresh, as a whole.
What reads the class or the caption is one unit, and so is the MLP of a group of controls: fresh, it has no effect at
first; with its last layer trained and its first one not, it would have a random one. Positions are not weights, they
follow from the config. [COND] sec. 2.3 has what else changes with resolution; the report notes what has not.
"""
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
import model
from config import Config, ModelConfig, UserError, differences, from_json

WEIGHTS = "weights.safetensors"
MEANT = ("arch", "semantics", "resolution", "patch", "width", "depth")      # what a model is called by
# Of these the report speaks in words; whatever else changed is listed.
REPORTED = (*MEANT, "classes", "text_dim", "positions", "base", "rescale", "controls", "prediction")


def start_from(path: str, net: model.Denoiser, cfg: Config, source: Any = None) -> str:
    """Copy into `net`, a fresh network of `cfg`, what fits of the averaged weights of a run; says what was kept.

    path: a run folder or a weights file, of which no code is run. source: the data of this run, whose class names and
    latents are compared with those of the other one; None: they are not. UserError, before any weight is changed, for
    a path that is no run, a file that is damaged or not finite, and one of which no block fits."""
    tensors, header = checkpoint.read_weights(weights_file(path))
    if bad := checkpoint.not_finite(tensors):
        raise UserError(f"--init={path} holds inf or nan in {', '.join(bad[:5])}")
    run, own = from_json(header["config"]), net.state_dict()
    old, m = run.model, cfg.model
    model.check(old)
    kept = fitting(tensors, own, old, m)
    if not any(name.startswith("blocks.") and own[name].ndim == 2 for name in kept):
        fit = " ".join(f"--model.{key}={getattr(old, key)}" for key in ("arch", "width") if differ(key, old, m))
        raise UserError(f"no block of --init={path} fits: it has {about(old)}, this run {about(m)}; "
                        f"{f'{fit} would fit' if fit else 'start from another run, or from none'}")
    with torch.no_grad():
        for name in kept:
            own[name].copy_(tensors[name])
    lines = [f"starting from the averaged weights of {path}: {about(old)}", *table(tensors, own, kept)]
    found = notes(run, cfg, kept) + class_notes(header, source, old, m, kept) + latent_notes(header, source, old)
    return "\n".join(lines + changes(old, m) + [f"note: {note}" for note in found])


def weights_file(path: str) -> Path:
    """The weights of a run folder, or the file itself. UserError with what was looked for and what is beside it."""
    where = Path(path).expanduser()
    file = where / WEIGHTS if where.is_dir() else where
    if not file.is_file():
        beside = sorted(p.parent.as_posix() for p in where.parent.glob(f"*/{WEIGHTS}"))
        raise UserError(f"--init={path} is no run: there is no file {file}; it wants a run folder with {WEIGHTS}, or "
                        f"such a file; runs beside it: {', '.join(beside) or 'none'}")
    return file


# ---------------------------------------------------------------- what fits

def unit(name: str) -> str:
    """What is kept or fresh as a whole: an embedder, the MLP of one group of controls, else a single layer."""
    if name.startswith("control_embedder."):
        return ".".join(name.split(".")[:3])                # control_embedder.mlps.high
    first = name.partition(".")[0]
    return first if first.endswith("_embedder") else name.rpartition(".")[0]


def fitting(found: dict[str, Tensor], own: dict[str, Tensor], old: ModelConfig, m: ModelConfig) -> list[str]:
    """Names of the weights to keep, in the order of the network's own."""
    names, both = [*own, *(n for n in found if n not in own)], own.keys() & found.keys()
    misfit = {unit(n) for n in names if n not in both or own[n].shape != found[n].shape}
    if differ("prediction", old, m):                        # the same shape stands for something else
        misfit.add("final_layer.linear")
    return [n for n in own if unit(n) not in misfit]


# ---------------------------------------------------------------- what to say about it

def about(m: ModelConfig) -> str:
    """A model in a few words."""
    return ", ".join(f"{key} {getattr(m, key)}" for key in MEANT)


def differ(key: str, old: ModelConfig, m: ModelConfig) -> bool:
    """Has this field another value in the two models?"""
    return getattr(old, key) != getattr(m, key)


def count(names: list[str], own: dict[str, Tensor]) -> str:
    """How many tensors, and how many parameters they have."""
    return f"{len(names):,} tensor{'s' * (len(names) != 1)}, {sum(own[n].numel() for n in names):,} parameters"


def table(found: dict[str, Tensor], own: dict[str, Tensor], kept: list[str]) -> list[str]:
    """What of each part was kept, is fresh or was left out; a line for each fresh weight that had another shape."""
    lines = []
    for part in dict.fromkeys(n.partition(".")[0] for n in (*own, *found)):
        mine = {n for n in own if n.partition(".")[0] == part}
        keep, fresh = [n for n in own if n in mine & {*kept}], [n for n in own if n in mine - {*kept}]
        left = [n for n in found if n.partition(".")[0] == part and n not in own]
        lines += [f"  {part:16}  kept      {count(keep, own)}"] if keep else []
        lines += [f"  {part:16}  fresh     {count(fresh, own)}{which(fresh)}"] if fresh else []
        lines += [f"    {n} {tuple(found[n].shape)} -> {tuple(own[n].shape)}" for n in fresh
                  if n in found and own[n].shape != found[n].shape]
        lines += [f"  {part:16}  left out  {count(left, found)}{which(left)}"] if left else []
    return lines


def which(names: list[str]) -> str:
    """The numbers of the blocks that the names belong to; nothing for other parts."""
    numbers = sorted({int(n.split(".")[1]) for n in names if n.startswith("blocks.")})
    return f", of block {', '.join(map(str, numbers))}" if numbers else ""


def extent(m: ModelConfig) -> float:
    """The largest coordinate among the positions of a row of patches, model.positions' and model.base's doing."""
    n = m.resolution // m.patch
    return {"grid": n - 1, "resample": m.base or n, "interpolate": (m.base or n) - 1}[m.positions]


def positions(m: ModelConfig) -> str:
    """The grid of patches of a model and how its positions come about."""
    n = m.resolution // m.patch
    how = {"grid": "counted", "resample": "resampled", "interpolate": "interpolated"}[m.positions]
    return f"{n} x {n}, {how} on extent {extent(m)}"


def changes(old: ModelConfig, m: ModelConfig) -> list[str]:
    """What no weight shows: positions, noise levels, and every other field that changed."""
    lines = [f"  {'positions':16}  {positions(old)} -> {positions(m)}",
             f"  {'noise levels':16}  sigma times {old.rescale:g} -> sigma times {m.rescale:g}"]
    other = [d for d in differences(old, m) if d.split(":")[0] not in REPORTED]
    return lines + ([f"  {'also changed':16}  {', '.join(other)}"] if other else [])


def notes(run: Config, cfg: Config, kept: list[str]) -> list[str]:
    """What is likely to be an oversight, with the flag that would change it."""
    old, m = run.model, cfg.model
    found, ratio = [], m.resolution / old.resolution
    if ratio != 1 and not differ("rescale", old, m):
        found.append(f"the resolution is {ratio:g} times as large and sigma is as before; to rescale it by that, as "
                     f"[COND] eq. 3 does: --model.rescale={m.rescale * ratio:g}")
    if not math.isclose(extent(old), extent(m)):
        found.append(f"positions reached to {extent(old)} and reach to {extent(m)} now; to resample them on the old "
                     f"extent: --model.positions=resample --model.base={extent(old)}")
    if differ("prediction", old, m):
        found.append(f"the last layer is fresh: it stated {old.prediction} and states {m.prediction} now")
    if m.semantics == old.semantics == "text" and run.encoder != cfg.encoder:
        found.append(f"captions were encoded by {run.encoder} and are encoded by {cfg.encoder} now")
    return found


def class_notes(header: dict, source: Any, old: ModelConfig, m: ModelConfig, kept: list[str]) -> list[str]:
    """What becomes of classes whose table is kept: the number of each stays, whatever it is called."""
    if not old.semantics == m.semantics == "class" or not any(n.startswith("y_embedder.") for n in kept):
        return []
    if source is None or "classes" not in header:
        return ["the classes are kept by number; whether their names are the same is not compared"]
    was, now = json.loads(header["classes"]), list(source.classes)
    other = [k for k, names in enumerate(zip(was, now)) if names[0] != names[1]]
    some = ", ".join(f"{k} was {was[k]!r} and is {now[k]!r}" for k in other[:3])
    return [f"classes are kept by number, and {len(other)} of {len(now)} have other names: {some}"] if other else []


def latent_notes(header: dict, source: Any, old: ModelConfig) -> list[str]:
    """In what the latents of the other run are others than those of this one: its autoencoder, or their scaling."""
    was = json.loads(header["latents"]) if "latents" in header else None
    now = getattr(source, "meta", None)                     # of data.Latents; pictures have none
    if source is None or not (was or now):
        return []
    if now and not was and old.channels != 3:               # published weights, for one
        return ["what the latents of that run were is not in its file, and not compared"]
    if not (was and now):
        return [f"that run drew {'latents' if was else 'pixels'}, this one draws {'latents' if now else 'pixels'}"]
    vae, own = was["autoencoder"], now["autoencoder"]
    if vae["sha256"] != own["sha256"]:
        return [f"the latents were of the autoencoder {vae['path']}, {vae['sha256'][:12]}, and are of {own['path']}, "
                f"{own['sha256'][:12]}, now: the same numbers are other pictures"]
    if was["scaling"] != now["scaling"]:
        return [f"the latents were scaled by {was['scaling']} and are scaled by {now['scaling']} now: the same "
                f"pictures are other numbers"]
    if was["scaling"] == "channel" and was["statistics"] != now["statistics"]:
        pairs = ((key, was["statistics"][key], now["statistics"][key]) for key in ("mean", "std"))
        parts = [f"{key} {[round(v, 3) for v in a]} -> {[round(v, 3) for v in b]}" for key, a, b in pairs]
        return [f"the latents are scaled by the statistics of other data: {'; '.join(parts)}"]
    return []
