"""Load pretrained DiT checkpoints: the .pt files of the [DiT] authors, or folders in the format of diffusers.

net, cfg = load_official_dit("DiT-XL-2-256x256.pt")
python -m baselines.official_dit --pretrained=DiT-XL-2-256x256.pt --out=out/dit-xl   for sample.py, train.py --init_from

Names are strict, and sizes follow from the shapes. The published last layer also predicts a variance; its rows are
dropped, which leaves eps as it is. The published networks were trained with linear betas, T = 1000, on latents scaled
by their autoencoder's own factor. Loading runs no code from a file.
Dimensions: C channels, P patch, D width, N image tokens, O = C or 2C output channels.
"""
import hashlib
import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import model
from conditioning import sincos_2d
from config import SIZES, Config, ModelConfig, UserError, parse, run, to_json
from runtime import checkpoint

GUIDANCE = 4.0                          # scale of the official sampler
FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # in a folder of diffusers
# our names for diffusers' layers, as regular expressions; every block there has a copy of the embeddings
OURS = {r"pos_embed\.proj": "x_embedder.proj", r"proj_out_1": "final_layer.adaLN_modulation.1",
        r"proj_out_2": "final_layer.linear", r"pos_embed\.pos_embed": "pos_embed",
        r"transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
        r"transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
        r"transformer_blocks\.\d+\.norm1\.emb\.class_embedder": "y_embedder",
        r"transformer_blocks\.(\d+)\.norm1\.linear": r"blocks.\1.adaLN_modulation.1",
        r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])": r"blocks.\1.attn.\2",  # joined as qkv below
        r"transformer_blocks\.(\d+)\.attn1\.to_out\.0": r"blocks.\1.attn.proj",
        r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"blocks.\1.mlp.fc1",
        r"transformer_blocks\.(\d+)\.ff\.net\.2": r"blocks.\1.mlp.fc2"}


def load_official_dit(path: str | Path, heads: int = 0) -> tuple[model.Denoiser, ModelConfig]:
    """[DiT]: the network of published weights, loaded strictly by name, and its config. UserError for other files.

    path: a .pt file, or a folder of diffusers or its parent. heads: H, which no shape shows; 0 = by config.json or, for
    the published sizes, by width and depth."""
    path = Path(path).expanduser()
    about, tensors = read_folder(path) if path.is_dir() else ({}, read_tensors(path))
    cfg = infer(tensors, about.get("sample_size", 0), heads or about.get("num_attention_heads", 0), path)
    if "pos_embed" in tensors:
        table, n = tensors.pop("pos_embed"), cfg.resolution // cfg.patch
        ours = sincos_2d(n, n, cfg.width)[None]                                 # (1, N, D)
        if table.shape != ours.shape or not torch.allclose(table, ours, atol=1e-4):
            raise UserError(f"{path} has other positions than the sines and cosines of {n} x {n} patches")
    C, P = cfg.channels, cfg.patch
    for key in [k for k in tensors if k.startswith("final_layer.linear.") and len(tensors[k]) == P * P * 2 * C]:
        rows = tensors[key].unflatten(0, (P, P, 2 * C))     # [DiT] sec. 3.1: the first C of O channels are eps
        tensors[key] = rows[:, :, :C].flatten(0, 2).contiguous()
    net = model.build(cfg)
    checkpoint.load_strictly(net, tensors, str(path))
    return net.eval().requires_grad_(False), cfg


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read name -> tensor, fp32, from a .pt, .bin or .safetensors file without running code. UserError otherwise."""
    try:
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        return {str(k): v.float() for k, v in found.items()}
    except Exception as e:              # torch and safetensors raise anything for a foreign file
        raise UserError(f"cannot read {file} as a state dict: {next(iter(str(e).splitlines()), 'empty')}. Give a file "
                        "like DiT-XL-2-256x256.pt, or a folder of diffusers; of a training checkpoint, save the state "
                        "dict of its `ema` alone") from e


def read_folder(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Read config.json and the tensors of a DiT's folder that diffusers wrote, by the names of the official code."""
    path = path / "transformer" if (path / "transformer").is_dir() else path
    try:
        about = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if about.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
            raise ValueError(f"norm_type={about['norm_type']!r} is of another architecture than DiT")
        about = {k: int(about[k]) for k in ("num_attention_heads", "sample_size")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path / 'config.json'} is not that of a DiT in diffusers: {e!r}") from e
    file = next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
    return about, from_diffusers(read_tensors(file), path)


def from_diffusers(theirs: dict[str, Tensor], name: object) -> dict[str, Tensor]:
    """The tensors of a DiT of diffusers by our names. UserError if its blocks' copies of an embedding differ."""
    found: dict[str, Tensor] = {}
    for key, v in theirs.items():
        ours = next((re.sub(old, new, key) for old, new in OURS.items() if re.match(old + r"(\.|$)", key)), key)
        if ours in found and not torch.equal(found[ours], v):
            raise UserError(f"{name} is not a DiT of [DiT]: {key} differs from that of another block")
        found[ours] = v
    for key in [k for k in found if ".attn.q." in k]:
        parts = [found.pop(part) for n in "qkv" if (part := key.replace(".q.", f".{n}.")) in found]
        found[key.replace(".q.", ".qkv.")] = torch.cat(parts)                   # (3D, D) or (3D,)
    return found


def infer(tensors: dict[str, Tensor], side: int, heads: int, name: object) -> ModelConfig:
    """Infer the sizes from x_embedder (D, C, P, P), the class table (classes + 1, D) and pos_embed (1, N, D)."""
    try:
        (D, C, P, _), rows = tensors["x_embedder.proj.weight"].shape, len(tensors["y_embedder.embedding_table.weight"])
        side = side or math.isqrt(tensors["pos_embed"].shape[-2]) * P
    except (KeyError, ValueError) as e:
        raise UserError(f"{name} holds another architecture than DiT, or a part of one: no {e}") from e
    depth = sum(k.endswith(".attn.qkv.weight") for k in tensors)
    known = {(size["width"], size["depth"]): size["heads"] for size in SIZES.values()}
    heads = heads or known.get((D, depth), 0)
    if heads < 1 or D % heads:
        raise UserError(f"{name} has width {D} and depth {depth}, none of the published sizes, and no shape shows "
                        f"its heads; pass heads, a divisor of {D}")
    return ModelConfig(arch="dit", semantics="class", classes=rows - 1, resolution=side, channels=C, patch=P,
                       width=D, depth=depth, heads=heads, schedule="linear")


def as_run(path: str | Path, cfg: ModelConfig) -> tuple[Config, dict[str, str]]:
    """Return the config and header that a run's weights would have. Class names come from diffusers, or are numbers."""
    path, names = Path(path).expanduser(), [str(k) for k in range(cfg.classes)]
    made = Config(data="", augment="", encoder="words", guidance=GUIDANCE, model=cfg)
    for file in (path / "model_index.json", path.parent / "model_index.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            labels = json.loads(file.read_text(encoding="utf-8"))["id2label"]
            names = [str(labels[str(k)]) for k in range(cfg.classes)]
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("diffusion_pytorch_model.*") if p.is_file()):
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return made, {"config": to_json(made), "classes": json.dumps(names), "null_class": str(cfg.classes), "step": "0",
                  "sha256": digest.hexdigest()}


@dataclass(frozen=True)
class Options:
    """What to convert."""
    pretrained: str = ""            # .pt file as published, or folder of diffusers
    out: str = "out/dit"            # run folder to make, with weights.safetensors in it
    heads: int = 0                  # H; 0 = by width and depth, or config.json


def main(argv: list[str]) -> None:
    o = parse(argv, Options())
    file = Path(o.out) / "weights.safetensors"
    if file.exists():
        raise UserError(f"{o.out} has weights already; choose another --out")
    net, cfg = load_official_dit(o.pretrained, o.heads)
    _, header = as_run(o.pretrained, cfg)
    file.parent.mkdir(parents=True, exist_ok=True)
    del header["sha256"]                                                        # the file gets its own
    checkpoint.write_weights(file, net.state_dict(), header)
    print(f"a DiT of {cfg.depth} blocks, width {cfg.width}, {cfg.classes} classes in {file}")


if __name__ == "__main__":
    run(main)
