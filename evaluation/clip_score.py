"""CLIPScore: how well images match their captions, by OpenAI's CLIP.

python -m evaluation.clip_score --images=samples.npz --prompts=prompts.txt     (line k belongs to image k)
torchrun --nproc_per_node=8 -m evaluation.clip_score --images=samples.npz --prompts=captions.json --protocol=coco

The last line is one JSON object: a mean with its standard error, and the weights by their sha256. Random weights never
score anything, and the network computes in fp32 whatever a run has set.
Dimensions: B images and captions, h x w pixels, L tokens, D width of CLIP's vectors.
"""
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import UserError, parse, run
from evaluation.inception import exact_fp32
from fid import MeanWithError, mean_over
from runtime import checkpoint, distributed
from runtime.optional import optional_import
from sample import read_prompts
from sources.folders import open_images


@dataclass(frozen=True)
class Protocol:
    """How to take a CLIPScore: scale * mean(max(cos, 0)) with `model`, and `prefix` before every caption."""
    model: str
    scale: float
    prefix: str


# coco is l14 on images of one caption for each image of COCO's 2014 validation set, as [COND] takes it
PROTOCOLS = {"l14": Protocol("ViT-L-14", 100.0, ""), "coco": Protocol("ViT-L-14", 100.0, ""),
             "hessel": Protocol("ViT-B-32", 2.5, "A photo depicts ")}       # [CLIPS] sec. 3
COCO = {"n": 40504, "steps": 25, "guidance": 5.0}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)   # of OpenAI's images
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
CONFIG = "open_clip_config.json"


class CLIP:
    """OpenAI's CLIP, both towers, frozen, in fp32, from a tag, file or folder of open_clip, or openai:PATH.

    UserError for weights that are missing, do not fit, or may not want QuickGELU: with another activation the scores
    are wrong and no error shows it. sha256 is that of the file."""
    def __init__(self, path: str, name: str, device: torch.device) -> None:
        open_clip = optional_import("open_clip", "CLIP", "open_clip_torch")
        file, cfg = find_clip(path, name, open_clip)
        if not cfg.get("quick_gelu"):
            raise UserError(f"CLIPScore needs OpenAI's CLIP with QuickGELU, and nothing says that {file} has it; if "
                            f"it is OpenAI's {name}, write openai:{path}")
        try:
            tensors = {k: v.float() for k, v in load_file(file).items()}
        except (OSError, SafetensorError) as e:
            raise UserError(f"{file} is no safetensors file: {e}; CLIPScore reads {WEIGHTS[0]}") from e
        with torch.device("meta"):                                          # no random weights, no memory
            net = open_clip.CLIP(cfg["embed_dim"], cfg["vision_cfg"], cfg["text_cfg"], quick_gelu=True)
        self.length, self.side = net.context_length, net.visual.image_size[0]
        checkpoint.load_strictly(net.to_empty(device="cpu"), tensors, str(file))
        net.attn_mask = torch.full((self.length, self.length), -math.inf).triu(1)   # no weight, so not in the file
        self.net, self.device = net.eval().requires_grad_(False).to(device), device
        with open(file, "rb") as f:
            self.words, self.sha256 = open_clip.SimpleTokenizer(), hashlib.file_digest(f, "sha256").hexdigest()

    def pictures(self, images: Tensor) -> Tensor:
        """Return unit vectors (B, D) of uint8 images (B, 3, h, w), resized by the short side and center-cropped."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"wanted uint8 images (B, 3, h, w), got {images.dtype} {tuple(images.shape)}")
        h, w = images.shape[2:]
        high, wide = (self.side * s // min(h, w) for s in (h, w))
        x = F.interpolate(images.cpu(), (high, wide), mode="bicubic", antialias=True)   # in uint8, as Pillow does
        top, left = round((high - self.side) / 2), round((wide - self.side) / 2)
        x = x[:, :, top:top + self.side, left:left + self.side].to(self.device).float() / 255
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (MEAN, STD))
        return F.normalize(self.net.encode_image((x - mean) / std), dim=1)

    def captions(self, captions: list[str]) -> tuple[Tensor, int]:
        """Return unit vectors (B, D) of captions, and how many of them were too long and lost their end."""
        cut = sum(len(self.words.encode(c)) > self.length - 2 for c in captions)
        ids = self.words(captions, context_length=self.length).to(self.device)          # (B, L)
        return F.normalize(self.net.encode_text(ids), dim=1), cut


def find_clip(path: str, name: str, open_clip: Any) -> tuple[Path, dict]:
    """Return the weights' file, and the config beside it or else that of the model `name`. UserError if none exists."""
    local, cfg = Path(path.removeprefix("openai:")), open_clip.get_model_config(name)
    if not local.exists():
        if not (known := open_clip.get_pretrained_cfg(name, path)):
            raise UserError(f"no CLIP weights at {path!r}: neither a file or folder nor one of the tags of {name}, "
                            f"{', '.join(open_clip.list_pretrained_tags_by_model(name))}")
        try:
            file = Path(open_clip.download_pretrained(known))
        except Exception as e:          # whatever the hub, the network or the disk raises
            repo = known["hf_hub"].rstrip("/")
            raise UserError(f"cannot get the CLIP weights {path!r}: {e}. With network: `hf download {repo} --include "
                            f"'open_clip*' --local-dir clip`; then --clip=clip") from e
        return file, cfg | {"quick_gelu": known.get("quick_gelu", False)}
    file = next((local / w for w in WEIGHTS if (local / w).is_file()), local / WEIGHTS[0]) if local.is_dir() else local
    if (file.parent / CONFIG).is_file():
        try:
            cfg = json.loads((file.parent / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{file.parent / CONFIG} is not a config that open_clip wrote: {e!r}") from e
    return file, cfg | ({"quick_gelu": True} if path.startswith("openai:") else {})


def clip_score(batches: Iterable[tuple[Tensor, list[str]]], clip: CLIP, protocol: Protocol,
               dist: distributed.Dist) -> tuple[MeanWithError, int]:
    """[CLIPS] eq. 1: scale * mean of max(cos(image, caption), 0) over pairs; and how many captions were cut short.

    batches: this process's uint8 images (B, 3, h, w) with their B captions."""
    values, cut = [], 0
    for images, captions in batches:
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images with {len(captions)} captions: caption k belongs to image k")
        with torch.no_grad(), exact_fp32(dist.device):
            vectors, short = clip.captions([protocol.prefix + c for c in captions])
            cosine = (clip.pictures(images) * vectors).sum(1)                           # (B,)
        values += (protocol.scale * cosine.clamp(min=0)).tolist()
        cut += short
    result = mean_over(values, dist)
    return result, int(distributed.all_reduce_sum(torch.tensor([cut], device=dist.device), dist).item())


# ---------------------------------------------------------------- the command

@dataclass(frozen=True)
class Options:
    """Which images and captions to compare, and how."""
    images: str = ""                # .npz of images, as sample.py writes them, or a folder, in order of names
    prompts: str = ""               # captions, one a line; or COCO's captions_val2014.json
    protocol: str = "l14"           # l14, coco (100 max(cos, 0), ViT-L/14), hessel (2.5 max(cos, 0), ViT-B/32)
    clip: str = "openai"            # weights: a tag, file or folder of open_clip, or openai:PATH
    seed: int = 0                   # chooses one of the five captions of a COCO image
    batch: int = 64                 # images at a time


def protocol_differences(images: Path, n: int) -> list[str]:
    """Return "key: COCO's -> this" for each difference from [COND], by the .json that sample.py puts beside images."""
    beside = images.with_suffix(".json")
    used = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return [f"{key}: {want} -> {found}" for key, want in COCO.items() if (found := {**used, "n": n}.get(key)) != want]


def main(argv: list[str]) -> None:
    o = parse(argv, Options())
    if o.protocol not in PROTOCOLS:
        raise UserError(f"unknown protocol={o.protocol!r}; there are {', '.join(PROTOCOLS)}")
    captions, pictures = read_prompts(o.prompts, o.seed), open_images(o.images)
    n = len(pictures)
    if len(captions) != n:
        raise UserError(f"{n} images in {o.images}, {len(captions)} captions in {o.prompts}; caption k belongs to "
                        f"image k")
    dist, protocol = distributed.setup(), PROTOCOLS[o.protocol]
    clip = CLIP(o.clip, protocol.model, dist.device)
    parts = [np.arange(k, min(k + o.batch, n)) for k in range(0, n, o.batch)][dist.rank::dist.world]
    batches = ((pictures(part), captions[part[0]:part[-1] + 1]) for part in parts)
    result, cut = clip_score(batches, clip, protocol, dist)
    if dist.rank == 0:
        line = {"metric": f"clip_{o.protocol}", **dataclasses.asdict(result), "scale": protocol.scale,
                "model": protocol.model, "prefix": protocol.prefix, "captions_cut": cut, "weights": clip.sha256,
                "images": o.images}
        line |= {"departs": protocol_differences(Path(o.images), n)} if o.protocol == "coco" else {}
        print(f"{line['metric']} {result.value:.4f} ± {result.error:.4f} over {n}")
        print(json.dumps({**line, "dtype": "float32", "torch": torch.__version__}))


if __name__ == "__main__":
    run(main, cleanup=distributed.cleanup)
