"""The feature network of FID: TensorFlow's Inception of 2015-12-05 as a table, its weights and its input.

Another Inception gives other numbers, so every load compares the sha256 below.
Dimensions: B batch, C channels, H x W pixels.
"""
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError
from runtime import distributed, log

NAME, DIM, CLASSES = "inception-2015-12-05", 2048, 1008
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URLS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth")
VARIABLE = "INCEPTION_WEIGHTS"          # environment variable with the path of the file
SIDE = 299                              # height and width of the network's input
CHUNK = 64                              # images in the network at a time


# ---------------------------------------------------------------- the network

EPS = 1e-3                              # of its batch normalizations
POOLS = {"avg": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
         "max": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
         "max/2": partial(F.max_pool2d, kernel_size=3, stride=2)}

# A step is a pool of POOLS or KERNEL>CHANNELS: a convolution that keeps the size, or, as KERNEL/STRIDE, one without
# padding. 1x3&3x1 is a fork: two convolutions side by side. A branch begins with its name in the weights file.
A = "branch1x1 1>64, branch5x5 1>48 5>64, branch3x3dbl 1>64 3>96 3>96, branch_pool avg 1>{0}"
B = "branch3x3 3/2>384, branch3x3dbl 1>64 3>96 3/2>96, branch_pool max/2"
C = ("branch1x1 1>192, branch7x7 1>{0} 1x7>{0} 7x1>192, "
     "branch7x7dbl 1>{0} 7x1>{0} 1x7>{0} 7x1>{0} 1x7>192, branch_pool avg 1>192")
D = "branch3x3 1>192 3/2>320, branch7x7x3 1>192 1x7>192 7x1>192 3/2>192, branch_pool max/2"
E = ("branch1x1 1>320, branch3x3 1>384 1x3&3x1>384, branch3x3dbl 1>448 3>384 1x3&3x1>384, "
     "branch_pool {0} 1>192")
TABLE = {"Conv2d_1a_3x3": "3/2>32", "Conv2d_2a_3x3": "3/1>32", "Conv2d_2b_3x3": "3>64", "pool_1": "max/2",
         "Conv2d_3b_1x1": "1>80", "Conv2d_4a_3x3": "3/1>192", "pool_2": "max/2",
         "Mixed_5b": A.format(32), "Mixed_5c": A.format(64), "Mixed_5d": A.format(64), "Mixed_6a": B,
         "Mixed_6b": C.format(128), "Mixed_6c": C.format(160), "Mixed_6d": C.format(160), "Mixed_6e": C.format(192),
         "Mixed_7a": D, "Mixed_7b": E.format("avg"), "Mixed_7c": E.format("max")}   # max: an oddity of this one graph


class Conv(nn.Module):
    """[INC] sec. 5: convolution without bias, batch normalization, ReLU. step: "3>64", "1x7>64", or "3/2>64"."""
    def __init__(self, channels: int, step: str) -> None:
        super().__init__()
        kernels, width = step.split(">")
        (kernel, _, stride), self.width = kernels.partition("/"), int(width)
        size = tuple(int(k) for k in kernel.split("x")) * (1 if "x" in kernel else 2)
        padding = (0, 0) if stride else (size[0] // 2, size[1] // 2)
        self.conv = nn.Conv2d(channels, self.width, size, int(stride or 1), padding, bias=False)
        self.bn = nn.BatchNorm2d(self.width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """[INC] fig. 5 to 7: parallel branches with joined channels, `width` in all."""
    def __init__(self, channels: int, branches: str) -> None:
        super().__init__()
        self.plan, self.width = [], 0                       # for each branch its steps, for each step a pool or layers
        for branch in branches.split(", "):
            name, *steps = branch.split()
            plan, c, numbered = [], channels, sum(">" in step for step in steps) > 1
            for step in steps:
                kernels, _, width = step.partition(">")
                layers = [step]
                if width:
                    number = 1 + sum(layer[0] not in POOLS for layer in plan)
                    stem, kernels = f"{name}_{number}" if numbered else name, kernels.split("&")
                    layers = [stem + letter for letter in ("ab" if len(kernels) > 1 else [""])]
                    for layer, kernel in zip(layers, kernels):
                        self.add_module(layer, Conv(c, f"{kernel}>{width}"))
                    c = int(width) * len(layers)
                plan.append(layers)
            self.plan.append(plan)
            self.width += c

    def forward(self, x: Tensor) -> Tensor:
        branches = []
        for plan in self.plan:
            y = x
            for step in plan:
                y = torch.cat([POOLS[k](y) if k in POOLS else self.get_submodule(k)(y) for k in step], 1)
            branches.append(y)
        return torch.cat(branches, 1)


class Inception(nn.Module):
    """The graph of TABLE with the names of the file and fresh weights. Input: pixels 0 .. 255, (B, 3, 299, 299)."""
    def __init__(self) -> None:
        super().__init__()
        c = 3
        for name, line in TABLE.items():
            if line not in POOLS:
                self.add_module(name, layer := (Mixed if name.startswith("Mixed") else Conv)(c, line))
                c = layer.width
        self.fc = nn.Linear(c, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """pool_3 features (B, 2048), and logits (B, 1008) without the bias, as the Inception Score takes them."""
        x = (x - 128) / 128
        for name, line in TABLE.items():
            x = POOLS[line](x) if line in POOLS else self.get_submodule(name)(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def fold_(net: Inception) -> Inception:
    """W' = W g / sqrt(v + eps), b' = b - m g / sqrt(v + eps): fold each normalization into its convolution, once.

    The same function to fp32 accuracy, with one pass less over every layer's activations."""
    for layer in [m for m in net.modules() if isinstance(m, Conv)]:
        conv, bn = layer.conv, layer.bn
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()                    # (channels out,)
        conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
        conv.bias = nn.Parameter(bn.bias - bn.running_mean * scale, requires_grad=False)
        layer.bn = nn.Identity()
    return net


# ---------------------------------------------------------------- its input

def tf1_resize(x: Tensor, side: int = SIDE) -> Tensor:
    """TensorFlow 1's resize_bilinear: read pixel k at k n / side, without half-pixel shift and antialiasing.

    x (B, C, H, W) float -> (B, C, side, side). FID's default, in every paper that follows [FID] or [ADM]."""
    for axis in (3, 2):
        n = x.shape[axis]
        at = torch.arange(side, device=x.device, dtype=torch.float32) * (n / side)
        low = at.long().clamp(max=n - 1)
        share = (at - low).to(x.dtype).view(-1, *[1] * (3 - axis))
        a, b = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * share
    return x


def clean_resize(x: Tensor, side: int = SIDE) -> Tensor:
    """[CLEAN]: bicubic with antialiasing, in floating point. (B, C, H, W) float -> (B, C, side, side)"""
    return F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 255)


RESIZE = {"tf1": tf1_resize, "clean": clean_resize}


@contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """Compute in true fp32, repeatably: no TF32, no autocast, no algorithm search. Restores the settings at the end."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False), \
                torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------- its weights

def find_weights(path: str, dist: distributed.Dist) -> Path:
    """The weights file: `path`, else $INCEPTION_WEIGHTS, else torch's cache, which one process of a machine fills.

    If one process fails, all raise a UserError, so that none waits for another."""
    cache = Path(torch.hub.get_dir()) / "checkpoints" / URLS[0].rsplit("/", 1)[1]
    file, error = Path(path or os.environ.get(VARIABLE, "") or cache), ""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not file.is_file():
        try:
            if file != cache:
                raise FileNotFoundError(f"no file {str(file)!r}")
            log.info(f"downloading 95.6 MB of Inception weights from {URLS[0]}")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URLS[0], str(file), hash_prefix=SHA256, progress=False)
        except (OSError, RuntimeError) as e:
            error = str(e) or type(e).__name__
    if distributed.all_reduce_sum(torch.tensor([float(bool(error))], device=dist.device), dist).item():
        raise UserError(f"{error or 'another process has none'}; FID, KID and IS need the Inception weights. Download "
                        f"{' or '.join(URLS)} (95.6 MB, sha256 {SHA256}) and name it by --inception=FILE or "
                        f"{VARIABLE}, or put it at {cache}")
    return file


class Extractor:
    """The published Inception after a resize. Its `name`, `sha256` and `resize` belong to every number.

    weights: as for find_weights; resize: a key of RESIZE. UserError for another one, or for weights of another hash."""
    name, dim, classes = NAME, DIM, CLASSES

    def __init__(self, weights: str, resize: str, dist: distributed.Dist) -> None:
        if resize not in RESIZE:
            raise UserError(f"unknown resize={resize!r}; there are {', '.join(RESIZE)}")
        file = find_weights(weights, dist)
        content = file.read_bytes()
        if (found := hashlib.sha256(content).hexdigest()) != SHA256:
            raise UserError(f"{file} has sha256 {found}, not {SHA256}, that of the Inception of FID")
        with torch.device("meta"):
            net = Inception()
        net.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), assign=True)
        self.net = fold_(net.eval().requires_grad_(False)).to(dist.device, memory_format=torch.channels_last)
        self.sha256, self.resize, self.device = SHA256, resize, dist.device

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 2048) and logits (B, 1008), fp32, of images (B, 3, H, W) uint8."""
        found = []
        with torch.inference_mode(), exact_fp32(self.device):
            for part in images.split(CHUNK):
                x = RESIZE[self.resize](part.to(self.device).float())
                found.append(self.net(x.contiguous(memory_format=torch.channels_last)))
        return tuple(torch.cat(part) for part in zip(*found))
