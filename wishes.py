"""What is asked of a drawing: its options, and for every picture a caption or class and how it was taken.

Dimensions: B batch, L tokens of a caption, E their width.
"""
import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import coco
import data
import model
from conditioning import CONTROLS, Condition, pad_text
from config import Config, UserError, seed64
from wording import BadCaption, choose, clean, decode


@dataclass(frozen=True)
class Options:
    """What to draw."""
    out: str = "out/demo"           # run folder, as given to train.py
    file: str = "weights.safetensors"   # in the run folder: the weights to draw with; ema.py makes others
    weights: str = ""               # published DiT in place of a run: .pt file or diffusers folder; out is for pictures
    autoencoder: str = ""           # what decodes latents: folder or hub name; empty = that of the run's latents
    prompt: str = ""                # caption; several are separated by ";"; empty = captions of the data set
    prompts: str = ""               # file of captions, one a line, each for one picture; or COCO's captions json
    label: str = ""                 # class, by name or number; several are separated by ";"; empty = all in turn
    n: int = 16                     # number of pictures
    steps: int = 50                 # sampling steps
    sampler: str = "ddim"           # ddim or heun
    spacing: str = ""               # noise levels visited: trailing, leading, linspace; empty = the sampler's own
    eta: float = -1.0               # share of fresh noise in a DDIM step, 1 = DDPM's; -1 = that of the run
    lam: float = -1.0               # guidance scale lambda, 1 = none; -1 = that of the run
    beta: float = 1.0               # share of lambda that goes to the controls too: 0 none, 1 all, above 1 exaggerates
    interval: str = ""              # LOW,HIGH: guide only where sigma lies between these; empty = everywhere
    size: str = ""                  # H,W of the original, for detail; empty = drawn as in training, like crop and flip
    crop: str = ""                  # TOP,LEFT corner of the crop; 0,0 cuts nothing off
    flip: str = ""                  # 0 as the caption says, 1 mirrored
    resolution: str = ""            # H,W of the pictures (or latents); empty = as in training
    seed: int = 0                   # keys the noise; picture k is the same whatever n and batch are
    batch: int = 64                 # pictures at a time
    name: str = ""                  # of the files in <out>/samples; empty = made from the options
    dtype: str = "auto"             # auto, float32 or bfloat16
    threads: int = 0                # CPU threads; 0 = all


def numbers(key: str, text: str, count: int) -> list[float]:
    """`text` as `count` numbers from 0 up, joined by commas; UserError otherwise."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != count or not all(0 <= v < math.inf for v in values):
        raise UserError(f"--{key} wants {('one number', 'two numbers')[count - 1]} from 0 up, like "
                        f"--{key}={','.join(['16', '24'][:count])}, got {text!r}")
    return values


def read_prompts(file: str, seed: int = 0) -> list[str]:
    """A caption for every picture: the lines of a UTF-8 file, of which an empty one is the empty caption.

    Of a COCO captions json one of each image, images by number, drawn by seed as coco.CocoCaptions draws it.
    UserError for a file that is missing, empty or in another encoding."""
    if not Path(file).is_file():
        raise UserError(f"no file at --prompts={file!r}; wanted captions, one a line, or COCO's captions json")
    if file.endswith(".json"):
        names, captions = coco.read(file)
        return [choose(captions[k], seed64(seed, "coco", k)) for k in sorted(names) if k in captions]
    try:
        lines = decode(Path(file).read_bytes()).splitlines()
    except (OSError, BadCaption) as e:
        raise UserError(f"--prompts={file} cannot be read: {e}") from e
    if not lines:
        raise UserError(f"--prompts={file} is empty; wanted captions, one a line")
    return [clean(line) for line in lines]


def pad(text: Tensor, lengths: Tensor, cfg: Config, indices: Sequence[int], seed: int) -> Tensor:
    """[COND] sec. 2.1: captions (B, L, E) padded as in training, the noise drawn once for each picture. (B, L, E)"""
    keys = [seed64(seed, "padding", int(k)) for k in indices]
    return torch.cat([pad_text(text[b:b + 1], lengths[b:b + 1], cfg.padding, cfg.padding_noise,
                               torch.Generator().manual_seed(key)) for b, key in enumerate(keys)])


class Wishes:
    """What each picture of a run is asked to be, by its number: caption or class, and how it was taken.

    From the options; else captions of the data set, all classes in turn, and controls drawn as they are in training."""
    def __init__(self, o: Options, cfg: Config, header: dict[str, str]) -> None:
        self.cfg, self.seed = cfg, o.seed
        self.semantics, self.classes = cfg.model.semantics, json.loads(header["classes"])
        for key, other in (("prompt", "text"), ("prompts", "text"), ("label", "class")):
            if getattr(o, key) and self.semantics != other:
                raise UserError(f"--{key} needs a model of {other}; {o.out} has semantics={self.semantics!r}")
        if o.prompt and o.prompts:
            raise UserError(f"--prompt={o.prompt!r} and --prompts={o.prompts!r} both say what to draw; give one")
        asked = o.prompt or o.label
        self.asked = read_prompts(o.prompts, o.seed) if o.prompts else [a.strip() for a in asked.split(";") if asked]
        self.prompts_sha256 = hashlib.sha256("\n".join(self.asked).encode()).hexdigest() if o.prompts else ""
        self.encoder = data.text_encoder(cfg, json.loads(header.get("encoder", "null")))
        if self.semantics == "text":
            self.source = None if self.asked else data.open_source(cfg, split="test")
        for caption in self.asked if isinstance(self.encoder, data.WordVectors) else self.asked[:1]:
            if self.encoder:                                # an unknown word, or another encoder than in training, is
                self.encoder.encode([caption])              # an error before anything is drawn
        self.labels = [self.number(a) for a in self.asked] if self.semantics == "class" else []

        self.controls, known = {}, model.control_names(cfg.model)
        for key, count in CONTROLS.items():
            if (text := getattr(o, key)) and key not in known:
                raise UserError(f"--{key} needs a model that is steered by it; {o.out} has model.controls="
                                f"{cfg.model.controls!r}")
            if text:
                self.controls[key] = torch.tensor(numbers(key, text, count))
        if self.controls.get("flip", torch.zeros(1)).item() not in (0, 1):
            raise UserError(f"--flip wants 0 or 1, got {o.flip!r}")
        self.rows = {key: torch.tensor(rows) for key, rows in json.loads(header.get("controls", "{}")).items()}

    def number(self, label: str) -> int:
        """The number of a class given by name or number; UserError with the nearest names."""
        if label in self.classes:
            return self.classes.index(label)
        if label.isdigit() and int(label) < len(self.classes):
            return int(label)
        near = difflib.get_close_matches(label, self.classes, n=5, cutoff=0.4) or self.classes[:5]
        raise UserError(f"unknown class {label!r} among {len(self.classes)}; near: {', '.join(near)}")

    def steering(self, indices: np.ndarray) -> Condition:
        """The controls of the pictures `indices`: those that were asked for, the rest from one training sample each."""
        if not self.rows:
            return Condition()
        total = len(next(iter(self.rows.values())))
        row = torch.tensor([seed64(self.seed, "controls", int(k)) % total for k in indices])
        drawn = {key: rows[row].float() for key, rows in self.rows.items()}     # (B, 2) or (B,)
        asked = {key: v.expand(len(indices), -1).reshape(drawn[key].shape) for key, v in self.controls.items()}
        return Condition(steered=torch.ones(len(indices)), **{**drawn, **asked})

    def titles(self, indices: np.ndarray) -> list[str]:
        """What the pictures `indices` (B,) are to be: caption, name of the class, or nothing."""
        if self.semantics == "none":
            return [""] * len(indices)
        if self.semantics == "class":
            return [self.classes[k] for k in self.label(indices)]
        if self.asked:
            return [self.asked[k % len(self.asked)] for k in indices]
        return data.captions(self.source, indices)

    def label(self, indices: np.ndarray) -> list[int]:
        """The numbers of their classes."""
        return [self.labels[k % len(self.labels)] if self.labels else k % len(self.classes) for k in indices]

    def __call__(self, indices: np.ndarray) -> tuple[Condition, list[str]]:
        """The condition of the pictures `indices` (B,) and a title for each."""
        steering = self.steering(indices)
        if self.semantics == "none":
            return steering, self.titles(indices)
        if self.semantics == "class":
            return replace(steering, label=torch.tensor(self.label(indices))), self.titles(indices)
        batch = {"caption": self.titles(indices)} if self.asked else data.around(self.source, indices)
        batch = data.with_text(batch, self.encoder)
        text = pad(batch["text"], batch["lengths"], self.cfg, indices, self.seed)       # (B, L, E)
        return replace(steering, text=text), batch["caption"]
