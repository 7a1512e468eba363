"""Published DiT weights as ours: the checkpoints of the [DiT] authors, and folders in the format of diffusers.

state, cfg = read_official("DiT-XL-2-256x256.pt")
python official.py --weights=DiT-XL-2-256x256.pt --out=out/dit-xl      a run folder: sample.py --out, train.py --init

Names of the tensors are strict and sizes follow from their shapes. The published networks state a variance besides
eps, in rows of the last layer that are dropped here: what is left gives the same eps. Positions are compared with
ours and dropped. They were trained with linear betas, T = 1000, on latents scaled by their autoencoder's own factor.
No code in a file is run.
Dimensions: C channels, P patch, D width, H heads, N image tokens, O = C or 2C output channels.
"""
import hashlib
import json
import math
import pickle
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import checkpoint
import model
from conditioning import sincos_2d
from config import SIZES, Config, ModelConfig, UserError, parse, to_json

LAM = 4.0                               # guidance scale of the official sampler
LAYERS = ("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear",
          "final_layer.adaLN_modulation.1")                                     # weight and bias each
BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")   # of every block, likewise
TABLE = "y_embedder.embedding_table.weight"
FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # in a folder of diffusers
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")                       # what its config.json may call a DiT
# diffusers' names of ours; q, k and v are three layers there, and every block has a copy of the embeddings
OURS = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear"}
OURS_BLOCK = {"attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
              "norm1.linear": "adaLN_modulation.1"}
SHARED = {"norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
          "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
          "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table"}


def read_official(path: str | Path, heads: int = 0) -> tuple[dict[str, Tensor], ModelConfig]:
    """The state dict of ours, fp32, and the config of the DiT in a .pt file, or in a folder of diffusers or above it.

    heads: H, which no shape shows; 0 = by config.json or, for the sizes that were published, by width and depth.
    UserError for a path that is no such thing, names that are missing or too many, another architecture."""
    path = Path(path).expanduser()
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        tensors, about = read_folder(folder)
        tensors, heads = from_diffusers(tensors, folder), heads or about["num_attention_heads"]
    else:
        tensors, about = read_tensors(path), {}
    check_names(tensors, path)
    cfg = infer(tensors, about, heads, path)
    if (table := tensors.pop("pos_embed", None)) is not None:
        check_positions(table, cfg, path)
    return drop_sigma(tensors, cfg), cfg


def load_official_dit(path: str | Path, heads: int = 0) -> tuple[model.Denoiser, ModelConfig]:
    """[DiT]: the network of published weights, loaded strictly by name, and its config. heads as in read_official."""
    state, cfg = read_official(path, heads)
    net = model.build(cfg)
    checkpoint.load_strictly(net, state, str(path))
    return net.eval().requires_grad_(False), cfg


# ---------------------------------------------------------------- files

def read_tensors(file: Path) -> dict[str, Tensor]:
    """Name -> tensor, fp32, of a .pt, .bin or .safetensors file; runs no code from it. UserError if it is none."""
    if not file.is_file():
        raise UserError(f"no weights at {str(file)!r}; wanted a file like DiT-XL-2-256x256.pt, or a folder that "
                        "diffusers wrote")
    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as e:
        raise UserError(f"{file} is damaged, or holds more than weights: {next(iter(str(e).splitlines()), 'empty')} "
                        "(of a training checkpoint save the state dict of its `ema` alone)") from e
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{file} holds {type(found).__name__}, wanted the state dict of a DiT")
    if odd := [str(k) for k, v in found.items() if not isinstance(v, Tensor) or v.layout != torch.strided]:
        raise UserError(f"{file} is not a state dict: {', '.join(odd[:5])} are no tensors; of a training checkpoint "
                        "save the state dict of its `ema` alone")
    return {str(k): v.float() for k, v in found.items()}


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and config.json of a folder that diffusers wrote. UserError unless it is a DiT."""
    file = folder / "config.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        name, size = about["_class_name"], {k: about[k] for k in ("num_attention_heads", "sample_size")}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file} is not that of a diffusers transformer: {e!r}; wanted the folder of a DiT, or the "
                        "one above its transformer/") from e
    if name not in CLASSES or about.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
        raise UserError(f"{folder} is a {name} with norm_type={about.get('norm_type')!r}, another architecture; a "
                        f"DiT is a {CLASSES[0]} with 'ada_norm_zero'")
    if any(type(v) is not int or v < 1 for v in size.values()):
        raise UserError(f"{file} wants whole numbers above 0, got {size}")
    there = [folder / name for name in FILES if (folder / name).is_file()]
    if not there:
        raise UserError(f"no weights in {folder}; wanted {' or '.join(FILES)}")
    return read_tensors(there[0]), size


def from_diffusers(theirs: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The same tensors under official names. UserError where the copies of an embedding are not one."""
    found: dict[str, Tensor] = {}
    for key, v in theirs.items():
        layer, _, kind = key.rpartition(".")
        in_block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
        if in_block and in_block[2] in SHARED:
            name = f"{SHARED[in_block[2]]}.{kind}"
            if name in found and not torch.equal(found[name], v):
                raise UserError(f"{folder} is no DiT of [DiT]: {key} differs from that of another block")
        elif in_block and in_block[2] in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
            continue                                        # joined below
        elif in_block:
            name = f"blocks.{in_block[1]}.{OURS_BLOCK.get(in_block[2], in_block[2])}.{kind}"
        else:
            name = "pos_embed" if key == "pos_embed.pos_embed" else f"{OURS.get(layer, layer)}.{kind}"
        found[name] = v
    for key in [k for k in theirs if ".attn1.to_q." in k]:
        parts = [theirs.get(key.replace("to_q", name)) for name in ("to_q", "to_k", "to_v")]
        if all(part is not None for part in parts):
            name = key.replace("transformer_blocks", "blocks").replace("attn1.to_q", "attn.qkv")
            found[name] = torch.cat(parts)                                      # (3D, D) or (3D,)
    return found


# ---------------------------------------------------------------- what the tensors say

def check_names(tensors: dict[str, Tensor], name: Path) -> None:
    """UserError that lists names of a DiT that are missing, and names that no DiT has."""
    depth = len({k.split(".")[1] for k in tensors if re.match(r"blocks\.\d+\.", k)})
    layers = [*LAYERS, *(f"blocks.{k}.{layer}" for k in range(depth) for layer in BLOCK)]
    want = {TABLE, *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))}
    missing, extra = sorted(want - tensors.keys()), sorted(tensors.keys() - want - {"pos_embed"})
    if not depth or missing or extra:
        some = ", ".join([f"no {k}" for k in missing[:4]] + [f"unexpected {k}" for k in extra[:4]])
        raise UserError(f"{name} holds another architecture than DiT, or a part of one: {depth} blocks, "
                        f"{len(missing)} names missing, {len(extra)} unexpected: {some}")


def infer(tensors: dict[str, Tensor], about: dict, heads: int, name: Path) -> ModelConfig:
    """Sizes from shapes: x_embedder (D, C, P, P), class table (classes + 1, D), pos_embed (1, N, D).

    UserError for shapes that are not those of a DiT, or without heads or resolution."""
    patches, table = tensors["x_embedder.proj.weight"], tensors[TABLE]
    if patches.ndim != 4 or table.ndim != 2 or patches.shape[2] != patches.shape[3]:
        raise UserError(f"{name} is another architecture: patches {tuple(patches.shape)}, classes "
                        f"{tuple(table.shape)}")
    D, C, P, _ = patches.shape
    depth = sum(k.endswith(".attn.qkv.weight") for k in tensors)
    known = {(size["width"], size["depth"]): size["heads"] for size in SIZES.values()}
    heads = heads or known.get((D, depth), 0)
    if heads < 1 or D % heads:
        raise UserError(f"{name} has width {D} and depth {depth}, none of the published sizes, and no shape shows "
                        f"its heads; pass heads, a divisor of {D}")
    if "sample_size" not in about and "pos_embed" not in tensors:
        raise UserError(f"{name} has no pos_embed, which shows the resolution")
    side = math.isqrt(tensors["pos_embed"].shape[-2]) * P if "pos_embed" in tensors else about["sample_size"]
    return ModelConfig(arch="dit", semantics="class", classes=len(table) - 1, resolution=side, channels=C, patch=P,
                       width=D, depth=depth, heads=heads, schedule="linear")


def check_positions(table: Tensor, cfg: ModelConfig, name: Path) -> None:
    """UserError unless the table (1, N, D) is ours for this resolution."""
    grid = cfg.resolution // cfg.patch
    ours = sincos_2d(grid, grid, cfg.width)[None]
    if table.shape != ours.shape or not torch.allclose(table, ours, atol=1e-4):
        raise UserError(f"{name} has positions {tuple(table.shape)} other than the sines and cosines of {grid} x "
                        f"{grid} patches; it is another architecture")


def drop_sigma(tensors: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """[DiT] sec. 3.1: the last layer without its rows for the variance: of P P O rows, O = 2C, those of eps, O = C.

    The rows are ordered (P, P, O), eps before variance. UserError if O is neither."""
    C, P, out = cfg.channels, cfg.patch, dict(tensors)
    rows = len(tensors["final_layer.linear.weight"])
    if rows not in (P * P * C, P * P * 2 * C) or len(tensors["final_layer.linear.bias"]) != rows:
        raise UserError(f"final_layer.linear has {rows} rows; eps takes {P * P * C}, with a variance {P * P * 2 * C}")
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        kept = tensors[key].unflatten(0, (P, P, -1))[:, :, :C]                  # (P, P, C, ...)
        out[key] = kept.flatten(0, 2).contiguous()
    return out


# ---------------------------------------------------------------- as a run

def class_names(path: Path, classes: int) -> list[str]:
    """Names of the classes: those of model_index.json beside or above a folder of diffusers, else their numbers."""
    for file in (path / "model_index.json", path.parent / "model_index.json"):
        try:
            names = json.loads(file.read_text(encoding="utf-8"))["id2label"]
            return [str(names[str(k)]) for k in range(classes)]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [str(k) for k in range(classes)]


def as_run(path: str | Path, cfg: ModelConfig) -> tuple[Config, dict[str, str]]:
    """The config and the header that the weights of a run have, for published ones. Class names, step 0, a hash."""
    path = Path(path).expanduser()
    run = Config(data="", augment="", encoder="words", lam=LAM, model=cfg)
    names = class_names(path, cfg.classes)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("diffusion_pytorch_model.*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return run, {"config": to_json(run), "classes": json.dumps(names), "null_class": str(cfg.classes), "step": "0",
                 "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Options:
    """What to convert."""
    weights: str = ""               # .pt file as published, or folder of diffusers
    out: str = "out/dit"            # run folder to make, with weights.safetensors in it
    heads: int = 0                  # H; 0 = by width and depth, or config.json


def main(argv: list[str]) -> None:
    o = parse(argv, Options())
    state, cfg = read_official(o.weights, o.heads)
    _, header = as_run(o.weights, cfg)
    out = Path(o.out)
    if (out / "weights.safetensors").exists():
        raise UserError(f"{out} has weights already; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    header = {k: v for k, v in header.items() if k != "sha256"}                 # the file gets its own
    checkpoint.write_weights(out / "weights.safetensors", state, header)
    print(f"{sum(v.numel() for v in state.values()):,} parameters of a DiT of {cfg.depth} blocks, width {cfg.width}, "
          f"{cfg.classes} classes in {out / 'weights.safetensors'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as e:
        checkpoint.say(f"error: {e}.")
        sys.exit(2)
