"""CLIPScore: how well images match their captions, by OpenAI's CLIP.

python -m evaluation.clip_score --images=samples.npz --prompts=prompts.txt     (line k belongs to image k)
torchrun --nproc_per_node=8 -m evaluation.clip_score --images=samples.npz --prompts=captions_val2014.json

The last line is one JSON object: a mean with its standard error, and the weights by their sha256. The network computes
in fp32 whatever a run has set.
Dimensions: B images and captions, h x w pixels, L tokens, D width of CLIP's vectors.
"""
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import UserError, parse, run
from evaluation.inception import exact_fp32
from fid import MeanWithError, mean_over
from runtime import checkpoint, distributed
from runtime.optional import optional_import
from sample import read_prompts
from sources.folders import open_images
from text import load_clip


class Protocol(NamedTuple):
    """How to take a CLIPScore: scale * mean(max(cos, 0)) with `model`, and `prefix` before every caption."""
    model: str
    scale: float
    prefix: str


PROTOCOLS = {"l14": Protocol("ViT-L-14", 100.0, ""),                       # [COND], with COCO's captions_val2014.json
             "hessel": Protocol("ViT-B-32", 2.5, "A photo depicts ")}       # [CLIPS] sec. 3
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)   # of OpenAI's images


class CLIP:
    """OpenAI's CLIP, both towers, frozen, in fp32. path: as for text.CLIPText. sha256 is that of the file.

    UserError for weights without QuickGELU: with another activation the scores are wrong and no error shows it."""
    def __init__(self, path: str, name: str, device: torch.device) -> None:
        net, file, activation, why = load_clip(path, name)
        if activation != "QuickGELU":
            raise UserError(f"CLIPScore needs OpenAI's CLIP with QuickGELU, but {file} has {activation} ({why})")
        if bad := checkpoint.not_finite(net.state_dict()):
            raise UserError(f"{file} holds inf or nan in {', '.join(bad[:5])}")
        self.net, self.device = net.to(device), device
        self.length, self.side = net.context_length, net.visual.image_size[0]
        self.tokenizer = optional_import("open_clip", "CLIP", "open_clip_torch").SimpleTokenizer()
        with open(file, "rb") as f:
            self.sha256 = hashlib.file_digest(f, "sha256").hexdigest()

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit vectors (B, D) of uint8 images (B, 3, h, w), resized by the short side and center-cropped."""
        h, w = images.shape[2:]
        high, wide = (self.side * s // min(h, w) for s in (h, w))
        x = F.interpolate(images.cpu(), (high, wide), mode="bicubic", antialias=True)   # in uint8, as Pillow does
        top, left = round((high - self.side) / 2), round((wide - self.side) / 2)
        x = x[:, :, top:top + self.side, left:left + self.side].to(self.device).float() / 255
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (MEAN, STD))
        return F.normalize(self.net.encode_image((x - mean) / std), dim=1)

    def embed_captions(self, captions: list[str]) -> tuple[Tensor, int]:
        """Return unit vectors (B, D) of captions, and how many of them were too long and lost their end."""
        cut = sum(len(self.tokenizer.encode(c)) > self.length - 2 for c in captions)
        ids = self.tokenizer(captions, context_length=self.length).to(self.device)      # (B, L)
        return F.normalize(self.net.encode_text(ids), dim=1), cut


def clip_score(batches: Iterable[tuple[Tensor, list[str]]], clip: CLIP, protocol: Protocol,
               dist: distributed.Dist) -> tuple[MeanWithError, int]:
    """[CLIPS] eq. 1: scale * mean of max(cos(image, caption), 0) over pairs; and how many captions were cut short.

    batches: this process's uint8 images (B, 3, h, w) with their B captions."""
    values, cut = [], 0
    for images, captions in batches:
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images with {len(captions)} captions: caption k belongs to image k")
        with torch.no_grad(), exact_fp32(dist.device):
            vectors, short = clip.embed_captions([protocol.prefix + c for c in captions])
            cosine = (clip.embed_images(images) * vectors).sum(1)                       # (B,)
        values += (protocol.scale * cosine.clamp(min=0)).tolist()
        cut += short
    result = mean_over(values, dist)
    return result, int(distributed.all_reduce_sum(torch.tensor([cut], device=dist.device), dist).item())


@dataclass(frozen=True)
class Options:
    """Which images and captions to compare, and how."""
    images: str = ""                # .npz of images, as sample.py writes them, or a folder, in order of names
    prompts: str = ""               # captions, one a line; or COCO's captions_val2014.json
    protocol: str = "l14"           # l14 (100 max(cos, 0), ViT-L/14) or hessel (2.5 max(cos, 0), ViT-B/32)
    clip: str = "openai"            # weights: a tag, file or folder of open_clip, or openai:PATH
    seed: int = 0                   # chooses one of the five captions of a COCO image
    batch: int = 64                 # images at a time


def main(argv: list[str]) -> None:
    o = parse(argv, Options())
    if o.protocol not in PROTOCOLS:
        raise UserError(f"unknown protocol={o.protocol!r}; there are {', '.join(PROTOCOLS)}")
    captions, images = read_prompts(o.prompts, o.seed), open_images(o.images)
    n = len(images)
    if len(captions) != n:
        raise UserError(f"{n} images in {o.images}, {len(captions)} captions in {o.prompts}")
    dist, protocol = distributed.setup(), PROTOCOLS[o.protocol]
    clip = CLIP(o.clip, protocol.model, dist.device)
    parts = [np.arange(k, min(k + o.batch, n)) for k in range(0, n, o.batch)][dist.rank::dist.world]
    batches = ((images(part), captions[part[0]:part[-1] + 1]) for part in parts)
    result, cut = clip_score(batches, clip, protocol, dist)
    if dist.rank == 0:
        line = {"metric": f"clip_{o.protocol}", **result._asdict(), **protocol._asdict(), "captions_cut": cut,
                "weights": clip.sha256, "images": o.images, "dtype": "float32", "torch": torch.__version__}
        print(f"{line['metric']} {result.value:.4f} ± {result.error:.4f} over {n}")
        print(json.dumps(line))


if __name__ == "__main__":
    run(main, cleanup=distributed.cleanup)
