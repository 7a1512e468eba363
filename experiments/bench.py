"""Speed of a forward pass, a training step and a guided sampling step, beside the hardware's peak or another network.

python -m experiments.bench --config=configs/shapes.py --compile=on                  seconds, images/s, share of peak
python -m experiments.bench --size=DiT-S/2 --batch=8 --threads=1 --against=diffusers      against diffusers' DiT
python -m experiments.bench --size=DiT-S/2 --batch=8 --threads=1 --official_dit=PATH      a checkout of the official DiT
python -m experiments.bench --config=configs/mp/shapes_e.py --threads=1 --against=plain    the cost of MP

A training step is loss, backward pass, clipping, optimizer and weight averaging, as in train.py. Inputs are random and
already on the device. Comparisons alternate between the networks.
Dimensions: B batch, C channels, R resolution.
"""
import math
import re
import runpy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
import optim
import train
from baselines.official_dit import from_diffusers
from conditioning import CONTROLS, Condition, make_condition
from config import SIZES, Config, ModelConfig, UserError, check_name, load, parse, run
from ema import PowerEMA
from runtime import distributed
from runtime.log import LossWindow
from runtime.optional import optional_import, patch_torchvision_ops
from sample import ddim, with_guidance
from schedule import add_noise
from text import make_encoder

PASSES = {"forward": 1, "train": 3, "sample": 2}    # FLOPs of each step over those of one forward pass
WARMUP, MIN_ROUNDS = 2, 3               # untimed rounds, and the fewest timed ones
TOLERANCE = 1e-4                        # outputs count as equal up to this, over the largest output
LAM, LR = 2.0, 1e-6                     # guidance scale, of two passes; a rate too small to move the weights


@dataclass(frozen=True)
class Options(Config):
    """The config of a run, and what to time on it."""
    config: str = ""                    # config file of the run
    size: str = ""                      # model in place of the config's, such as DiT-S/2, for 32 x 32 x 4 inputs
    parts: str = "forward+train+sample"   # steps to time, joined with +
    batch: int = 0                      # images a step; 0 = microbatch of the config
    rounds: int = 30                    # most timed rounds of each step, after the warm-up
    seconds: float = 20.0               # longest time for each step
    against: str = ""                   # compare with diffusers (its DiT), or with plain (the twin of an mp arch)
    official_dit: str = ""              # compare with the official DiT code: the folder of its models.py


class Inputs(NamedTuple):
    """The inputs of every network."""
    x: Tensor                           # images (B, C, R, R)
    i: Tensor                           # noise indices (B,)
    cond: Condition


class Implementation(NamedTuple):
    """One implementation. "forward" returns eps and "sample" the image after a guided step, to be compared."""
    name: str
    net: nn.Module
    steps: dict[str, Callable[[], object]]
    flops: int                          # of a forward pass of one image
    matmul: str = "highest"             # precision of its fp32 matrix products


def read_options(argv: list[str]) -> Options:
    """The options with batch and model filled in. UserError for what cannot be timed, before any network exists."""
    o = parse(argv, Options())
    if o.config:
        o = parse(argv, Options(**vars(load(o.config)) | {"batch": 0}))
    m = model_of_size(o.size) if o.size else o.model
    if m.semantics == "class":
        m = replace(m, classes=m.classes or 1000)
    if m.semantics == "text" and not (m.text_dim and m.text_length):
        encoder = make_encoder(o)
        m = replace(m, text_dim=encoder.dim, text_length=encoder.length)
    batch = o.batch or o.microbatch
    o = replace(o, batch=batch, microbatch=batch, model=m)
    train.check(o, world=1)
    for part in o.parts.split("+"):
        check_name("parts", part, PASSES)
    check_name("against", o.against, ("", "diffusers", "plain"))
    if (o.against == "diffusers" or o.official_dit) and (m.arch, m.semantics, m.controls) != ("dit", "class", ""):
        raise UserError(f"against={o.against!r}, official_dit={o.official_dit!r} need a DiT of classes without "
                        f"controls, such as --size=DiT-S/2, got {m.arch!r} of {m.semantics!r}")
    if o.against == "plain" and not m.arch.startswith("mp"):
        raise UserError(f"against='plain' needs an mp architecture, got model.arch={m.arch!r}")
    return o


def model_of_size(name: str) -> ModelConfig:
    """The model that a name such as DiT-S/2 stands for, with classes, for 32 x 32 x 4 inputs."""
    found = re.fullmatch(r"(\w+)-(\w+)/(\d+)", name)
    arch, size, patch = found.groups() if found else ("", "", "")
    if arch.lower() not in model.ARCHS or size not in SIZES:
        raise UserError(f"unknown size={name!r}; it is ARCH-SIZE/PATCH, such as DiT-S/2: ARCH one of "
                        f"{', '.join(model.ARCHS)}, SIZE one of {', '.join(SIZES)}")
    return ModelConfig(arch=arch.lower(), semantics="class", resolution=32, channels=4, patch=int(patch), **SIZES[size])


# ---------------------------------------------------------------- this library

def make_inputs(o: Options, device: torch.device) -> Inputs:
    """Random images, noise indices, classes or text tokens, and controls."""
    m, B, g = o.model, o.batch, torch.Generator().manual_seed(o.seed)
    batch = {"label": torch.randint(max(1, m.classes), (B,), generator=g),
             "text": torch.randn(B, m.text_length, m.text_dim, generator=g)}
    batch |= {name: torch.rand(B, row.width, generator=g) for name, row in CONTROLS.items()}
    cond = make_condition(batch, m.semantics, model.control_names(m), device=device)
    x = torch.randn(B, m.channels, m.resolution, m.resolution, generator=g)
    i = torch.randint(m.timesteps, (B,), generator=g).float()
    return Inputs(x.to(device), i.to(device), cond)


def ours(cfg: Config, s: Inputs, dtype: str, compiled: bool) -> Implementation:
    """This library as train.py and sample.py run it, with tokens of type `dtype`.

    Layers that start at zero get random weights: products with zeros are faster, and hide other weights."""
    device = s.x.device
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("highest")
    net = model.build(cfg.model).to(device)
    for p in [p for layer in net.zero_init_layers() for p in layer.parameters()]:
        nn.init.normal_(p, std=0.02)
    net.dtype = distributed.compute_dtype(device, dtype)
    if compiled:
        for block in net.blocks:
            block.compile(fullgraph=True)
    ema, window, denoise = PowerEMA(net, cfg.ema_std), LossWindow(device), with_guidance(net, s.cond, LAM)
    rows = optim.normalized_rows(net, cfg)
    opt = optim.optimizer(net, replace(cfg, lr=LR), window)

    def train_step() -> None:
        g = torch.Generator(device).manual_seed(cfg.seed)
        loss, i = train.denoising_loss(net, s.x, s.cond, g, net.alpha_bar, cfg)
        loss.mean().backward()
        window.add(loss, i, cfg.model.timesteps)
        optim.project_grad_(rows)
        window.add_norm(nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip or math.inf, foreach=True), 0)
        opt.step()
        optim.renormalize_(rows, window.bad)
        opt.zero_grad(set_to_none=True)
        ema.update(net, 2)

    steps = {"forward": lambda: net(s.x, s.i, s.cond), "train": train_step,
             "sample": lambda: ddim(denoise, s.x, net.alpha_bar, 1)}
    name = f"{cfg.model.arch}, {str(net.dtype)[6:]}{', compiled' * compiled}"
    return Implementation(name, net, steps, model.flops(cfg.model), torch.get_float32_matmul_precision())


# ---------------------------------------------------------------- diffusers

def diffusers_dit(m: ModelConfig) -> nn.Module:
    """diffusers' DiTTransformer2DModel of the same size, with our slowest frequency, one copy of it in every block."""
    kind = optional_import("diffusers", "--against=diffusers", part="DiTTransformer2DModel")
    net = kind(num_layers=m.depth, num_attention_heads=m.heads, attention_head_dim=m.width // m.heads, norm_eps=1e-6,
               in_channels=m.channels, sample_size=m.resolution, patch_size=m.patch, num_embeds_ada_norm=m.classes)
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0              # 10000^(-127/128); theirs is exactly 1/10000
    return net


def diffusers_side(ours: Implementation, s: Inputs) -> Implementation:
    """diffusers with its default EMAModel. `ours` gets its weights."""
    net = diffusers_dit(ours.net.cfg).to(s.x.device)
    weights = from_diffusers(net.state_dict(), "diffusers")
    ours.net.load_state_dict({k: v for k, v in weights.items() if k != "pos_embed"})
    ema = optional_import("diffusers.training_utils", "--against=diffusers", part="EMAModel")(net.parameters())
    return theirs("diffusers", net, lambda x, i, label: net(x, i, label).sample, lambda: ema.step(net.parameters()), s,
                  ours)


def official_side(ours: Implementation, s: Inputs, path: str) -> Implementation:
    """models.py of a checkout of [DiT] in the folder `path`, with an average of its weights. It gets our weights."""
    m = ours.net.cfg
    patch_torchvision_ops()                                 # its timm imports torchvision
    try:
        kind = runpy.run_path(str(Path(path) / "models.py"))["DiT"]
    except (OSError, ImportError) as e:
        raise UserError(f"--official_dit={path} wants a checkout of the official DiT and its packages: {e}") from e
    net = kind(input_size=m.resolution, patch_size=m.patch, in_channels=m.channels, hidden_size=m.width,
               num_heads=m.heads, depth=m.depth, num_classes=m.classes, learn_sigma=False).to(s.x.device)
    net.load_state_dict({**ours.net.state_dict(), "pos_embed": ours.net.pos_embed[None]})
    ema = PowerEMA(net, 0.1)
    return theirs("official", net, net, lambda: ema.update(net, 2), s, ours)


def theirs(name: str, net: nn.Module, eps: Callable[..., Tensor], average: Callable[[], None], s: Inputs,
           ours: Implementation) -> Implementation:
    """Another DiT in fp32 with default AdamW and the shortest code for the rest. eps(x, i, label) calls it."""
    label, alpha_bar, opt = s.cond.label, ours.net.alpha_bar, torch.optim.AdamW(net.parameters(), LR)
    both = torch.cat([label, torch.full_like(label, ours.net.cfg.classes)])

    def train_step() -> None:
        noise, i = torch.randn_like(s.x), torch.randint(len(alpha_bar), label.shape, device=label.device)
        F.mse_loss(eps(add_noise(s.x, noise, alpha_bar[i]), i, label), noise).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        average()

    def denoise(x: Tensor, i: Tensor) -> Tensor:
        cond, uncond = eps(torch.cat([x, x]), torch.cat([i, i]), both).chunk(2)
        return uncond + LAM * (cond - uncond)

    steps = {"forward": lambda: eps(s.x, s.i, label), "train": train_step,
             "sample": lambda: ddim(denoise, s.x, alpha_bar, 1)}
    return Implementation(name, net, steps, ours.flops)


@torch.inference_mode()
def check_equal(a: Implementation, b: Implementation) -> None:
    """UserError unless both return the same eps and the same image after a guided step."""
    for part in ("forward", "sample"):
        y, z = (side.steps[part]() for side in (a, b) if side.net.eval())
        if not (worst := ((y - z).abs().max() / y.abs().max()).item()) <= TOLERANCE:
            raise UserError(f"{a.name} and {b.name} differ in {part} by {worst:.2g} of the largest output")


# ---------------------------------------------------------------- timing

def implementations(o: Options, s: Inputs) -> list[Implementation]:
    """The networks to time; the last is the reference of a comparison. diffusers meets ours in fp32 and as shipped."""
    dtype = str(distributed.compute_dtype(s.x.device, o.dtype))[6:]
    compiled = o.compile == "on" or o.compile == "auto" and s.x.device.type == "cuda"
    if o.against == "diffusers" or o.official_dit:
        equal = ours(o, s, "float32", False)
        other = official_side(equal, s, o.official_dit) if o.official_dit else diffusers_side(equal, s)
        check_equal(equal, other)
        shipped = [] if (dtype, compiled) == ("float32", False) else [ours(o, s, dtype, compiled)]
        return [equal, *shipped, other]
    plain = replace(o, model=replace(o.model, arch=o.model.arch.removeprefix("mp"), mp=""), forced_weight_norm=False,
                    lr_mp=0.0)
    return [ours(cfg, s, dtype, compiled) for cfg in ((plain, o) if o.against else (o,))]


def time_once(side: Implementation, part: str, device: torch.device) -> float:
    """Seconds of one step."""
    torch.set_float32_matmul_precision(side.matmul)
    distributed.synchronize(device)
    start = time.perf_counter()
    with torch.inference_mode(part != "train"):
        side.steps[part]()
    distributed.synchronize(device)
    return time.perf_counter() - start


def measure(sides: list[Implementation], part: str, o: Options, device: torch.device) -> list[dict]:
    """Time a step of all networks in turns, A B A B. A row for each: its speed, and the last one's time over its.

    Both are medians, with quartiles low and high, least and most."""
    torch.compiler.reset()                                  # compile for this step's shapes alone
    for side in sides:
        side.net.train(part == "train")
        for _ in range(WARMUP):
            time_once(side, part, device)
    times, end, rows = [], time.perf_counter() + o.seconds, []
    while len(times) < MIN_ROUNDS or len(times) < o.rounds and time.perf_counter() < end:
        times.append([time_once(side, part, device) for side in sides])
    for k, side in enumerate(sides):
        low, seconds, high = statistics.quantiles([t[k] for t in times], n=4, method="inclusive")
        least, ratio, most = statistics.quantiles([t[-1] / t[k] for t in times], n=4, method="inclusive")
        images = o.batch / seconds
        rows.append({"part": part, "side": side.name, "seconds": seconds, "low": low, "high": high, "images": images,
                     "tflops": images * PASSES[part] * side.flops / 1e12, "ratio": ratio, "least": least, "most": most})
    return rows


def main(argv: list[str]) -> None:
    o, device = read_options(argv), distributed.find_device()
    torch.set_num_threads(o.threads or torch.get_num_threads())
    sides = implementations(o, make_inputs(o, device))
    peak = distributed.matmul_peak(device, distributed.compute_dtype(device, o.dtype)) / 1e12
    print(f"{o.size or o.model.arch}: {model.flops(o.model) / 1e9:.3f} GFLOP an image forward; batch {o.batch} on "
          f"{device}, {torch.get_num_threads()} CPU threads; matmul peak {peak:.3f} TFLOP/s\n{'step':8} {'network':28} "
          f"{'s/step':>8} {'(quartiles)':>18} {'images/s':>9} {'TFLOP/s':>8} "
          + (f"times as fast as {sides[-1].name}" if sides[1:] else "of peak     GB"))
    line = "{part:8} {side:28} {seconds:8.4f} ({low:.4f} .. {high:.4f}) {images:9.1f} {tflops:8.3f} "
    line += "{ratio:.3f} ({least:.3f} .. {most:.3f})" if sides[1:] else "{share:7.1%} {memory:6.2f}"
    for part in o.parts.split("+"):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for row in measure(sides, part, o, device):
            row |= {"share": row["tflops"] / peak, "memory": distributed.memory(device)}
            print(line.format(**row), flush=True)


if __name__ == "__main__":
    run(main)
