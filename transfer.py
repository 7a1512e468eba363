"""Initialize a run from the averaged weights of another: across resolution, data sets, classes, captions and depth.

    python train.py --config=configs/shapes64.py --init_from=out/shapes32

A layer is kept if its weights have the same names and shapes in both networks; otherwise the whole layer stays fresh.
The embedder of the class or caption counts as one layer, and so does the MLP of a group of controls: a fresh one has no
effect at first, while a trained last layer on a fresh first one would have a random effect. Positions follow from the
config and are not weights. [COND] sec. 2.2 has what else changes with resolution; the report hints at what has not.
"""
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import model
from config import Config, ModelConfig, UserError, differences, from_json
from runtime import checkpoint


def init_from(path: str, net: model.Denoiser, cfg: Config, source: Any = None) -> str:
    """Copy the averaged weights of a run that fit into `net`, a fresh network of `cfg`; return a report.

    path: a run folder or a weights file; no code in it is run. source: the data of this run, to compare class names
    and latents; None skips that. UserError, before any weight changes, if the path is not a run, the file is damaged
    or not finite, or no block fits."""
    file = Path(path).expanduser()
    tensors, header = checkpoint.read_weights(file / "weights.safetensors" if file.is_dir() else file)
    if bad := checkpoint.not_finite(tensors):
        raise UserError(f"--init_from={path} holds inf or nan in {', '.join(bad[:5])}")
    run, own = from_json(header["config"]), net.state_dict()
    model.check(run.model)
    kept = matching_keys(tensors, own, run.model, cfg.model)
    if not any(name.startswith("blocks.") and own[name].ndim == 2 for name in kept):
        raise UserError(f"no block of --init_from={path} fits: it has {summary(run.model)}, this run "
                        f"{summary(cfg.model)}; the architecture and --model.width must be the same")
    with torch.no_grad():
        for name in kept:
            own[name].copy_(tensors[name])
    lines = [f"starting from the averaged weights of {path}: {summary(run.model)}", *table(tensors, own, kept)]
    if changed := differences(run.model, cfg.model):
        lines.append(f"  {'changed':16}  {', '.join(changed)}")
    return "\n".join([*lines, *(f"note: {hint}" for hint in hints(run, cfg, header, source, kept))])


def layer_of(name: str) -> str:
    """Return what is kept or fresh as a whole: an embedder, the MLP of one group of controls, or a single layer."""
    if name.startswith("control_embedder."):
        return ".".join(name.split(".")[:3])                # control_embedder.mlps.high
    first = name.partition(".")[0]
    return first if first.endswith("_embedder") else name.rpartition(".")[0]


def matching_keys(found: dict[str, Tensor], own: dict[str, Tensor], old: ModelConfig, m: ModelConfig) -> list[str]:
    """Return the names of the weights to keep, in the order of the network's own."""
    both = own.keys() & found.keys()
    misfit = {layer_of(n) for n in own.keys() | found.keys() if n not in both or own[n].shape != found[n].shape}
    if old.prediction != m.prediction:                      # the same shape has another meaning
        misfit.add("final_layer.linear")
    return [n for n in own if layer_of(n) not in misfit]


def summary(m: ModelConfig) -> str:
    """Describe a model in a few words."""
    return ", ".join(f"{key} {vars(m)[key]}" for key in ("arch", "semantics", "resolution", "patch", "width", "depth"))


def table(found: dict[str, Tensor], own: dict[str, Tensor], kept: list[str]) -> list[str]:
    """Count what of each part was kept, is fresh or was left out; one line for each weight of another shape."""
    sizes, lines = {}, []                                   # (part, word) -> numbers of parameters
    for name, v in (found | own).items():
        word = "kept" if name in kept else "fresh" if name in own else "left out"
        sizes.setdefault((name.partition(".")[0], word), []).append(v.numel())
        if name in found and found[name].shape != v.shape:
            lines.append(f"    {name} {tuple(found[name].shape)} -> {tuple(v.shape)}")
    return [f"  {part:16}  {word:8}  {len(n):,} tensors, {sum(n):,} parameters"
            for (part, word), n in sorted(sizes.items())] + lines


def extent(m: ModelConfig) -> float:
    """Return the largest coordinate of the positions in a row of patches."""
    n = m.resolution // m.patch
    return {"grid": n - 1, "resample": m.pos_base or n, "interpolate": (m.pos_base or n) - 1}[m.positions]


def hints(run: Config, cfg: Config, header: dict, source: Any, kept: list[str]) -> list[str]:
    """Name what is likely to be an oversight, with the flag that would change it."""
    old, m, found = run.model, cfg.model, []
    ratio = m.resolution / old.resolution
    if ratio != 1 and old.sigma_scale == m.sigma_scale:
        found.append(f"the resolution is {ratio:g} times as large and sigma is as before; to scale it as [COND] eq. 3 "
                     f"does: --model.sigma_scale={m.sigma_scale * ratio:g}")
    if extent(old) != extent(m):
        found.append(f"positions reached to {extent(old)} and reach to {extent(m)} now; to keep the old extent: "
                     f"--model.positions=resample --model.pos_base={extent(old)}")
    if m.semantics == old.semantics == "text" and run.encoder != cfg.encoder:
        found.append(f"captions were encoded by {run.encoder} and are encoded by {cfg.encoder} now")
    if source is None:
        return found
    names = zip(json.loads(header.get("classes", "[]")), source.classes)
    renamed = [f"{k} was {a!r} and is {b!r}" for k, (a, b) in enumerate(names) if a != b]
    if old.semantics == m.semantics == "class" and renamed and any(n.startswith("y_embedder.") for n in kept):
        found.append(f"classes are kept by number, and {len(renamed)} of {len(source.classes)} have other names: "
                     f"{', '.join(renamed[:3])}")
    was = describe_latents(json.loads(header.get("latents", "null")))
    now = describe_latents(getattr(source, "meta", None))
    if was != now and ("latents" in header or old.channels == 3):               # published weights say nothing
        found.append(f"the network saw {was} and sees {now} now: the same numbers are other images")
    return found


def describe_latents(meta: dict | None) -> str:
    """Describe what a network sees: pixels, or latents by their autoencoder and scaling."""
    if not meta:
        return "pixels"
    numbers = [round(v, 3) for key in ("mean", "std") for v in meta["statistics"][key]]
    scale = f", mean and std {numbers}" if meta["scaling"] == "channel" else ""
    return f"latents of {meta['autoencoder']['sha256'][:12]} scaled by {meta['scaling']}{scale}"
