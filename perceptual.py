"""Numbers from networks of others: CLIPScore, is it what the caption says; LPIPS, how far apart are two pictures.

python perceptual.py --metric=clip --images=samples.npz --prompts=prompts.txt           (line k belongs to picture k)
python perceptual.py --metric=lpips --out=out/imagenet --sizes=hr --n=1000
torchrun --nproc_per_node=8 -- perceptual.py --metric=lpips --out=out/imagenet --sizes=hr --n=10000

Each is a mean with its standard error, and its last line one JSON object that names the weights by their sha256. No
weights, no number: nothing here scores with random ones. The networks compute in fp32 whatever a run has set.
Dimensions: B pictures and captions, P prompts, K pictures of one prompt, h x w pixels, C features of a layer, D of
CLIP's vectors.
"""
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import checkpoint
import machine
import model
import sample
import text
from autoencoder import decoder_of
from config import UserError, parse
from fid_files import open_pictures
from inception import precise
from outside import library
from wishes import Wishes, read_prompts


@dataclass(frozen=True)
class Mean:
    """A mean over n, with its standard error: the spread of the n values over the square root of n."""
    value: float
    error: float
    n: int


def mean_over(values: list[float], place: machine.Place) -> Mean:
    """The mean of the values of all processes, each of which may have any number. UserError for fewer than two."""
    x = torch.tensor(values, dtype=torch.float64)
    device = "cpu" if place.device.type == "mps" else place.device          # MPS has no float64, and one process
    sums = torch.tensor([x.sum().item(), len(x)], dtype=torch.float64, device=device)
    total, n = machine.add_up(sums, place).tolist()
    if n < 2:
        raise UserError(f"a mean with a standard error wants at least 2 pictures or prompts, got {n:g}")
    squares = machine.add_up((x - total / n).square().sum().to(device), place).item()
    return Mean(total / n, math.sqrt(squares / (n - 1) / n), int(n))


def check_pixels(images: Tensor) -> None:
    """ValueError unless these are pictures (..., 3, h, w) of uint8, as sample.to_uint8 rounds them."""
    if images.dtype != torch.uint8 or images.dim() < 4 or images.shape[-3] != 3:
        raise ValueError(f"wanted uint8 pictures (..., 3, h, w), got {images.dtype} {tuple(images.shape)}")


# ---------------------------------------------------------------- CLIPScore

@dataclass(frozen=True)
class Protocol:
    """How a CLIPScore is taken: scale * mean(max(cos, 0)) with `model`, `prefix` before every caption."""
    model: str
    scale: float
    prefix: str


# coco is l14 on pictures of one caption of each image of COCO's 2014 validation set, drawn as [COND] does
PROTOCOLS = {"l14": Protocol("ViT-L-14", 100.0, ""), "coco": Protocol("ViT-L-14", 100.0, ""),
             "hessel": Protocol("ViT-B-32", 2.5, "A photo depicts ")}       # [CLIPS] sec. 3
COCO = {"n": 40504, "steps": 25, "lam": 5.0}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)   # of OpenAI's pictures


class CLIP:
    """OpenAI's CLIP, both towers, frozen, in fp32. path: as text.CLIPText takes it, of safetensors weights.

    UserError for weights that are missing, do not fit, or are not known to want QuickGELU: with another activation
    scores are wrong and nothing else tells. sha256 is that of the file."""
    def __init__(self, path: str, name: str, device: torch.device) -> None:
        open_clip = library("open_clip", "CLIP", "open_clip_torch")
        file, cfg = find_clip(path, name, open_clip)
        if not cfg.get("quick_gelu"):
            raise UserError(f"CLIPScore is taken with OpenAI's CLIP, which has QuickGELU, and nothing says that "
                            f"{file} has; if it is OpenAI's {name}, write openai:{path}")
        text.build_tower(cfg, open_clip)                                    # refuses what is no plain text tower
        with torch.device("meta"):
            net = open_clip.model.CLIP(cfg["embed_dim"], cfg["vision_cfg"], cfg["text_cfg"], quick_gelu=True)
        try:
            tensors = {k: v.float() for k, v in load_file(file).items()}
        except (OSError, SafetensorError) as e:
            raise UserError(f"{file} is no safetensors file: {e}; CLIPScore reads open_clip_model.safetensors") from e
        self.length, self.side = net.context_length, net.visual.image_size[0]
        checkpoint.load_strictly(net.to_empty(device="cpu"), tensors, str(file))
        net.attn_mask = torch.full((self.length, self.length), -math.inf).triu(1)   # no weight, so not in the file
        self.net, self.device = net.eval().requires_grad_(False).to(device), device
        self.words, self.sha256 = open_clip.tokenizer.SimpleTokenizer(), sha256(file)

    def pictures(self, images: Tensor) -> Tensor:
        """Unit vectors of uint8 pictures (B, 3, h, w), their short side resized, the middle cut out. (B, D)"""
        check_pixels(images)
        h, w = images.shape[2:]
        high, wide = (self.side * s // min(h, w) for s in (h, w))
        x = F.interpolate(images.cpu(), (high, wide), mode="bicubic", antialias=True)   # in uint8, as Pillow does
        top, left = round((high - self.side) / 2), round((wide - self.side) / 2)
        x = x[:, :, top:top + self.side, left:left + self.side].to(self.device).float() / 255
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (MEAN, STD))
        return F.normalize(self.net.encode_image((x - mean) / std), dim=1)

    def captions(self, captions: list[str]) -> tuple[Tensor, int]:
        """Unit vectors (B, D) of captions, and how many of them were too long and lost their end."""
        cut = sum(len(self.words.encode(c)) > self.length - 2 for c in captions)
        ids = self.words(captions, context_length=self.length).to(self.device)          # (B, L)
        return F.normalize(self.net.encode_text(ids), dim=1), cut


def find_clip(path: str, name: str, open_clip: Any) -> tuple[Path, dict]:
    """The file of weights, and the config beside it or else that of the model `name`. UserError for no such path."""
    if not Path(path.removeprefix("openai:")).exists() and name != text.MODEL:
        known = open_clip.get_pretrained_cfg(name, path)
        if not known:
            raise UserError(f"no CLIP weights at {path!r}: neither a file or folder nor one of the tags of {name}, "
                            f"{', '.join(open_clip.list_pretrained_tags_by_model(name))}")
        quick = known.get("quick_gelu", False)
        return text.download(path, known, open_clip), open_clip.get_model_config(name) | {"quick_gelu": quick}
    file, cfg, _ = text.find(path, open_clip)
    if not (file.parent / text.CONFIG).is_file():
        cfg = open_clip.get_model_config(name) | {"quick_gelu": cfg.get("quick_gelu", False)}
    return file, cfg


def clip_score(batches: Iterable[tuple[Tensor, list[str]]], clip: CLIP, protocol: Protocol,
               place: machine.Place) -> tuple[Mean, int]:
    """[CLIPS] eq. 1: scale * mean of max(cos(picture, caption), 0) over pairs; and how many captions were cut short.

    batches: this process's uint8 pictures (B, 3, h, w) with their B captions. Cosines below 0 count as 0."""
    values, cut = [], 0
    for images, captions in batches:
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} pictures with {len(captions)} captions: caption k belongs to picture k")
        with torch.no_grad(), precise(place.device):
            vectors, short = clip.captions([protocol.prefix + c for c in captions])
            cosine = (clip.pictures(images) * vectors).sum(1)                           # (B,)
        values += (protocol.scale * cosine.clamp(min=0)).tolist()
        cut += short
    result = mean_over(values, place)
    return result, int(machine.add_up(torch.tensor([cut], device=place.device), place).item())


# ---------------------------------------------------------------- LPIPS

SIZES = {"all": (64, 128, 256, 512, 1024), "hr": (256, 512, 1024)}  # [COND] table 2a: LPIPS and, at 256 px, LPIPS/HR
TRUNK = "alexnet-owt-7be5be79.pth"
TRUNK_SHA256 = "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02"
HEADS_SHA256 = "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"     # v0.1/alex.pth of the package


def load_lpips(path: str, device: torch.device) -> nn.Module:
    """[LPIPS] v0.1 over AlexNet, frozen, fp32. path: the trunk's file; "" = $LPIPS_TRUNK, else torch's cache.

    Trunk and heads are hashed at every load. UserError that says how to get them."""
    lpips = import_lpips()
    cache = Path(torch.hub.get_dir()) / "checkpoints" / TRUNK
    file = Path(path or os.environ.get("LPIPS_TRUNK", "") or cache)
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth"
    how = (f"get https://download.pytorch.org/models/{TRUNK} (244,408,911 bytes, sha256 {TRUNK_SHA256}) and put it "
           f"at {cache}, or name it by --trunk or LPIPS_TRUNK")
    for part, want, help in ((file, TRUNK_SHA256, how), (heads, HEADS_SHA256, "pip install --force-reinstall lpips")):
        if not part.is_file():
            raise UserError(f"LPIPS has no weights at {part}; {help}")
        if (found := sha256(part)) != want:
            raise UserError(f"LPIPS wants other weights than {part}: its sha256 is {found}, not {want}; {help}")
    with torch.random.fork_rng():                                           # drawn first, then all of it replaced
        net = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
    return fill_lpips(net, *(torch.load(f, map_location="cpu", weights_only=True) for f in (file, heads))).to(device)


def fill_lpips(net: nn.Module, trunk: dict[str, Tensor], heads: dict[str, Tensor]) -> nn.Module:
    """Put torchvision's AlexNet and the package's heads into the network: every weight of it, or KeyError."""
    state = net.state_dict()
    for name in state:
        if name.startswith("net.slice"):                                    # net.slice2.3.bias is features.3.bias
            state[name] = trunk["features." + name.split(".", 2)[2]]
        elif name.startswith("lin"):                                        # lins.2.model is lin2.model
            state[name] = heads[name.replace("lins.", "lin")]
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def import_lpips() -> Any:
    """The package lpips. UserError with the pip line where it or its torchvision will not be imported."""
    try:
        import lpips
    except (ImportError, RuntimeError) as e:
        raise UserError(f"LPIPS needs the package lpips and the torchvision that belongs to this torch ({e}): "
                        f"pip install lpips") from e
    return lpips


def lpips_features(net: nn.Module, images: Tensor) -> list[Tensor]:
    """The vectors whose squared distances are LPIPS, a part a layer: unit features times sqrt(w_c / (h w)).

    uint8 (B, 3, h, w) -> (B, C, h', w') for each of five layers; w_c are the heads, which are not negative."""
    check_pixels(images)
    lins = [net.lin0, net.lin1, net.lin2, net.lin3, net.lin4]
    weights = [lin.model[-1].weight[0].clamp(min=0) for lin in lins]        # (C, 1, 1)
    outs = net.net(net.scaling_layer(images.float() / 127.5 - 1))
    unit = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in outs]
    return [x * (w / (x.shape[2] * x.shape[3])).sqrt() for x, w in zip(unit, weights)]


def mean_pair_distance(features: list[Tensor]) -> Tensor:
    """(P,) float64: mean of |f_i - f_j|^2 over the K (K - 1) / 2 pairs, as 2 / (K - 1) sum_k |f_k - mean f|^2.

    Exact: sum over i, j of |f_i - f_j|^2 is 2 K sum |f_k|^2 - 2 |sum f_k|^2, which is 2 K times the centred sum of
    squares, and counts every pair twice. Centred first: with |f|^2 as large as 1 and distances of 1e-5, sums of
    squares in fp32 would lose them. features: (P, K, ...) each, parts of one long vector. ValueError for K = 1."""
    K = features[0].shape[1]
    if K < 2:
        raise ValueError("a distance wants at least two pictures of every prompt")
    squares = [(f - f.mean(1, keepdim=True)).square().flatten(1).sum(1) for f in features]      # (P,) each
    return sum(s.cpu().double() for s in squares) * 2 / (K - 1)


def lpips_diversity(groups: Iterable[Tensor], net: nn.Module, place: machine.Place) -> Mean:
    """[COND] sec. 3.1: LPIPS between pictures that differ in one control, mean over pairs, over prompts. Low is good.

    groups: this process's prompts, uint8 (P, K, 3, h, w) at a time."""
    values, device = [], next(net.parameters()).device
    for images in groups:
        with torch.no_grad(), precise(place.device):
            features = lpips_features(net, images.flatten(0, 1).to(device))
            values += mean_pair_distance([f.unflatten(0, images.shape[:2]) for f in features]).tolist()
    return mean_over(values, place)


# ---------------------------------------------------------------- pictures

def size_groups(o: sample.Options, sizes: tuple[int, ...], place: machine.Place) -> Iterator[Tensor]:
    """[COND] sec. 3.1: for each of o.n prompts a picture at every requested size, all else equal. (P, K, 3, h, w)

    uint8, decoded if the model draws latents. Prompts are shared by the processes; a picture is a function of its
    prompt's number and its size alone."""
    net, cfg, header = sample.open_run(o)
    if "size" not in model.control_names(cfg.model) or o.size:
        raise UserError(f"pictures at several sizes need a model that is steered by size and no --size of their own; "
                        f"{o.out} has model.controls={cfg.model.controls!r}, size={o.size!r}")
    sample.check(o, cfg)
    decode = decoder_of(header, o.autoencoder, cfg.model.channels, place.device)[0]
    asked = Wishes(o, cfg, header)
    net = net.to(place.device)
    net.dtype = machine.precision(place.device, o.dtype)
    K, per = len(sizes), max(1, o.batch // len(sizes))
    for first in range(place.rank * per, o.n, place.world * per):
        index = np.repeat(np.arange(first, min(first + per, o.n)), K)                   # (P K,)
        size = torch.tensor(sizes, dtype=torch.float32)[:, None].expand(K, 2).repeat(len(index) // K, 1)
        x = decode(sample.draw(net, cfg, replace(asked(index)[0], size=size), index, o, place.device))
        yield torch.from_numpy(sample.to_uint8(x)).permute(0, 3, 1, 2).unflatten(0, (-1, K))


def sha256(path: Path) -> str:
    """Of the bytes of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------- the command

@dataclass(frozen=True)
class Options:
    """What to measure."""
    metric: str = "clip"            # clip or lpips
    images: str = ""                # clip: .npz of pictures, as sample.py writes them, or a folder, in order of names
    prompts: str = ""               # clip: captions, one a line; or COCO's captions_val2014.json
    protocol: str = "l14"           # clip: l14, coco (100 max(cos, 0), ViT-L/14), hessel (2.5 max(cos, 0), ViT-B/32)
    clip: str = "openai"            # clip: weights, as text.py takes them
    out: str = ""                   # lpips: run folder of a model that is steered by size
    file: str = sample.Options.file     # lpips: in the run folder, the weights to draw with
    autoencoder: str = ""           # lpips: what decodes latents; empty = that of the run's latents
    sizes: str = "hr"               # lpips: hr, all, or sizes in pixels joined with +
    n: int = 1000                   # lpips: prompts; the paper takes 10000
    steps: int = 50                 # lpips: sampling steps
    lam: float = -1.0               # lpips: guidance scale; -1 = that of the run
    seed: int = 0                   # lpips: keys the noise; clip: which of its five captions a COCO picture has
    batch: int = 64                 # pictures at a time
    trunk: str = ""                 # lpips: AlexNet's file; empty = $LPIPS_TRUNK, else torch's cache


def read_sizes(asked: str) -> tuple[int, ...]:
    """The sizes of a preset, or numbers joined with "+". UserError for anything else, or for fewer than two."""
    if asked in SIZES:
        return SIZES[asked]
    words = asked.split("+")
    if len(words) < 2 or not all(w.isdecimal() and int(w) > 0 for w in words):
        raise UserError(f"sizes={asked!r} is neither a preset, {', '.join(SIZES)}, nor two sizes, like 64+256")
    return tuple(int(w) for w in words)


def measure_clip(o: Options, place: machine.Place) -> dict:
    """CLIPScore of the pictures of an npz, as what goes into the last line."""
    if o.protocol not in PROTOCOLS:
        raise UserError(f"unknown protocol={o.protocol!r}; there are {', '.join(PROTOCOLS)}")
    captions, pictures = read_prompts(o.prompts, o.seed), open_pictures(o.images)
    if len(captions) != len(pictures):
        raise UserError(f"{len(pictures)} pictures in {o.images}, {len(captions)} captions in {o.prompts}; caption k "
                        f"belongs to picture k")
    protocol = PROTOCOLS[o.protocol]
    clip = CLIP(o.clip, protocol.model, place.device)
    numbers = np.arange(len(pictures))
    parts = [numbers[k:k + o.batch] for k in range(0, len(numbers), o.batch)][place.rank::place.world]
    batches = ((pictures(part), captions[part[0]:part[-1] + 1]) for part in parts)
    result, cut = clip_score(batches, clip, protocol, place)
    line = {"metric": f"clip_{o.protocol}", **dataclasses.asdict(result), "scale": protocol.scale,
            "model": protocol.model, "prefix": protocol.prefix, "captions_cut": cut, "weights": clip.sha256,
            "images": o.images}
    return line | ({"departs": departures(Path(o.images), len(pictures))} if o.protocol == "coco" else {})


def departures(images: Path, n: int) -> list[str]:
    """"key: COCO's -> this" for what [COND] does otherwise, by the .json that sample.py puts beside its pictures."""
    beside = images.with_suffix(".json")
    used = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return [f"{key}: {want} -> {found}" for key, want in COCO.items() if (found := {**used, "n": n}.get(key)) != want]


def measure_lpips(o: Options, place: machine.Place) -> dict:
    """LPIPS diversity of a run under the requested size, as what goes into the last line."""
    sizes = read_sizes(o.sizes)
    net = load_lpips(o.trunk, place.device)
    drawing = sample.Options(out=o.out, file=o.file, autoencoder=o.autoencoder, n=o.n, steps=o.steps, lam=o.lam,
                             seed=o.seed, batch=o.batch)
    drawing = sample.settled(drawing, sample.open_run(drawing)[1])
    result = lpips_diversity(size_groups(drawing, sizes, place), net, place)
    return {"metric": "lpips_alex", **dataclasses.asdict(result), "sizes": sizes, "K": len(sizes),
            "pairs": math.comb(len(sizes), 2), "version": "0.1", "weights": TRUNK_SHA256, "run": o.out,
            "file": o.file, "steps": o.steps, "lam": drawing.lam, "eta": drawing.eta, "seed": o.seed}


def main(argv: list[str]) -> None:
    o, metrics = parse(argv, Options()), {"clip": measure_clip, "lpips": measure_lpips}
    if o.metric not in metrics:
        raise UserError(f"unknown metric={o.metric!r}; there are {', '.join(metrics)}")
    place = machine.setup()
    line = metrics[o.metric](o, place)
    if place.rank == 0:
        print(f"{line['metric']} {line['value']:.4f} ± {line['error']:.4f} over {line['n']}")
        print(json.dumps({**line, "dtype": "float32", "torch": torch.__version__}))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        machine.leave()
    except UserError as e:
        checkpoint.say(f"error: {e}.")
        sys.exit(2)
