"""LPIPS diversity: how far apart the images of a prompt lie that differ in requested size alone.

python -m evaluation.lpips --out=out/imagenet --sizes=hr --n=1000
torchrun --nproc_per_node=8 -m -- evaluation.lpips --out=out/imagenet --sizes=hr --n=10000

The last line is one JSON object: a mean with its standard error, and the weights by their sha256. The network computes
in fp32 whatever a run has set.
Dimensions: B images, P prompts, K images of one prompt, h x w pixels, C features of a layer.
"""
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import sample
from config import UserError, parse, run
from evaluation.inception import exact_fp32
from fid import MeanWithError, mean_over, mean_pair_distance, size_groups
from runtime import distributed
from runtime.optional import optional_import
from runtime.plot import from_uint8

SIZES = {"all": "64+128+256+512+1024", "hr": "256+512+1024"}        # [COND] table 2a: LPIPS and, at 256 px, LPIPS/HR
TRUNK = "alexnet-owt-7be5be79.pth"
TRUNK_SHA256 = "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02"
HEADS_SHA256 = "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"     # v0.1/alex.pth of the package


def load_lpips(path: str, device: torch.device) -> nn.Module:
    """Load [LPIPS] v0.1 over AlexNet, frozen, fp32. path: the trunk's file; "" = $LPIPS_TRUNK, else torch's cache.

    UserError for a trunk or heads of another hash."""
    lpips = optional_import("lpips", "LPIPS")
    cache = Path(torch.hub.get_dir()) / "checkpoints" / TRUNK
    file = Path(path or os.environ.get("LPIPS_TRUNK", "") or cache)
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth"
    how = (f"get https://download.pytorch.org/models/{TRUNK} (244,408,911 bytes) and put it at {cache}, or name it by "
           f"--trunk or LPIPS_TRUNK")
    for part, want, help in ((file, TRUNK_SHA256, how), (heads, HEADS_SHA256, "pip install --force-reinstall lpips")):
        found = hashlib.sha256(part.read_bytes()).hexdigest() if part.is_file() else "missing"
        if found != want:
            raise UserError(f"LPIPS needs {part} with sha256 {want}, got {found}; {help}")
    with torch.random.fork_rng():                           # it loads its heads; its trunk is random, replaced below
        net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = torch.load(file, map_location="cpu", weights_only=True)
    net.net.load_state_dict({name: trunk["features." + name.split(".", 1)[1]]       # slice2.3.bias is features.3.bias
                             for name in net.net.state_dict()})
    return net.eval().requires_grad_(False).to(device)


def lpips_features(net: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the vectors whose squared distances are LPIPS, one part per layer: unit features * sqrt(w_c / (h w)).

    uint8 (B, 3, h, w) -> (B, C, h', w') for each of five layers; w_c are the heads, which are not negative."""
    weights = [lin.model[-1].weight[0].clamp(min=0) for lin in net.lins]    # (C, 1, 1)
    outs = net.net(net.scaling_layer(from_uint8(images)))
    unit = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in outs]
    return [x * (w / (x.shape[2] * x.shape[3])).sqrt() for x, w in zip(unit, weights)]


def lpips_diversity(groups: Iterable[Tensor], net: nn.Module, dist: distributed.Dist) -> MeanWithError:
    """[COND] sec. 3.1: LPIPS between images that differ in one control, mean over pairs, then prompts. Low is good.

    groups: this process's prompts, uint8 (P, K, 3, h, w) at a time."""
    values = []
    for images in groups:
        with torch.no_grad(), exact_fp32(dist.device):
            features = lpips_features(net, images.flatten(0, 1).to(dist.device))
            values += mean_pair_distance([f.unflatten(0, images.shape[:2]) for f in features]).tolist()
    return mean_over(values, dist)


@dataclass(frozen=True)
class Options(sample.Options):
    """How to measure a model with the control size; the rest, for a run, as for sample.py."""
    sizes: str = "hr"               # hr, all, or sizes in pixels joined with +
    n: int = 1000                   # prompts; the paper takes 10000
    trunk: str = ""                 # AlexNet's file; empty = $LPIPS_TRUNK, else torch's cache


def main(argv: list[str]) -> None:
    o = parse(argv, Options())
    words = SIZES.get(o.sizes, o.sizes).split("+")
    if len(words) < 2 or not all(w.isdecimal() and int(w) > 0 for w in words):
        raise UserError(f"sizes={o.sizes!r} is neither a preset, {', '.join(SIZES)}, nor two sizes, like 64+256")
    dist, sizes = distributed.setup(o.threads), tuple(int(w) for w in words)
    net, run = load_lpips(o.trunk, dist.device), sample.load_run(o, dist.device)
    result = lpips_diversity(size_groups(run, sizes, dist), net, dist)
    if dist.rank == 0:
        print(f"lpips_alex {result.value:.4f} ± {result.error:.4f} over {result.n}")
        print(json.dumps({**asdict(run.options), "metric": "lpips_alex", **result._asdict(), "sizes": sizes,
                          "weights": TRUNK_SHA256, "weights_sha256": run.header["sha256"], "dtype": str(run.net.dtype),
                          "torch": torch.__version__}))


if __name__ == "__main__":
    run(main, cleanup=distributed.cleanup)
