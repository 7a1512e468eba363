"""Speed of a forward pass, a training step and a guided sampling step, beside the hardware's peak or another network.

python -m experiments.bench --config=configs/shapes.py --compile=on                  seconds, images/s, share of peak
python -m experiments.bench --size=DiT-S/2 --batch=8 --threads=1 --against=diffusers      against diffusers' DiT
python -m experiments.bench --size=DiT-S/2 --batch=8 --threads=1 --official_dit=PATH    a checkout of the official code
python -m experiments.bench --config=configs/mp/shapes_e.py --threads=1 --against=plain    what MP costs

A training step is loss, backward pass, clipping, AdamW and weight averaging, as in train.py. Inputs are random and
already on the device. Comparisons alternate between the networks; on a busy CPU use --threads=1.
Dimensions: B batch, C channels, R resolution, T noise steps.
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
from conditioning import CONTROLS, Condition
from config import SIZES, Config, ModelConfig, UserError, load, parse, run
from ema import PowerEMA
from runtime import distributed
from runtime.log import LossWindow
from runtime.optional import optional_import, patch_torchvision_ops
from sample import ddim, with_guidance
from schedule import add_noise, alpha_bar_table
from text import make_encoder

PASSES = {"forward": 1, "train": 3, "sample": 2}    # FLOPs of each step over those of one forward pass
WARMUP, LEAST = 2, 3                    # untimed turns, and the fewest timed ones
ALIKE = 1e-4                            # outputs count as equal up to this, over the largest output
LAM = 2.0                               # guidance scale: two passes, with and without the class or caption
LR = 1e-6                               # too small to move the weights, so that every step is the same work
CLASSES = 1000                          # of a model of classes whose config does not say how many


@dataclass(frozen=True)
class Options(Config):
    """The config of a run, and what to time on it."""
    config: str = ""                    # config file of the run
    size: str = ""                      # model in place of the config's, such as DiT-S/2, for 32 x 32 x 4 inputs
    parts: str = "forward+train+sample"   # steps to time, joined with +
    batch: int = 0                      # images a step; 0 = micro of the config
    rounds: int = 30                    # most timed turns of each step, after the warm-up
    seconds: float = 20.0               # longest time for each step
    against: str = ""                   # compare with diffusers (its DiT), or with plain (the twin of an mp arch)
    official_dit: str = ""              # compare with the official DiT code: the folder of its models.py


class Inputs(NamedTuple):
    """The inputs of every side: images x (B, C, R, R), noise indices i (B,), condition, alpha-bar (T,)."""
    x: Tensor
    i: Tensor
    cond: Condition
    alpha_bar: Tensor


class Implementation(NamedTuple):
    """One implementation. "forward" returns eps and "sample" the image after a guided step, to be compared."""
    name: str
    net: nn.Module
    steps: dict[str, Callable[[], object]]
    flops: int                          # of a forward pass of one image
    matmul: str = "highest"             # precision of its fp32 matrix products


# ---------------------------------------------------------------- options

def read_options(argv: list[str]) -> Options:
    """The options with batch and model filled in. UserError for what cannot be timed, before any network exists."""
    o = parse(argv, Options())
    if o.config:
        fields = vars(load(o.config)) | {"batch": 0}
        o = parse(argv, Options(**fields))
    m = sized(o.size) if o.size else o.model
    if m.semantics == "class":
        m = replace(m, classes=m.classes or CLASSES)
    if m.semantics == "text" and not (m.text_dim and m.text_length):
        encoder = make_encoder(o)
        m = replace(m, text_dim=encoder.dim, text_length=encoder.length)
    o = replace(o, batch=o.batch or o.micro, microbatch=o.batch or o.micro, model=m)
    train.check(o, world=1)
    if unknown := [w for w in o.parts.split("+") if w not in PASSES]:
        raise UserError(f"what={o.parts!r} names {unknown[0]!r}; there are {', '.join(PASSES)}, joined with +")
    is_dit = (m.arch, m.semantics, m.controls) == ("dit", "class", "")
    fits = {"": True, "diffusers": is_dit, "plain": m.arch.startswith("mp")}
    if not fits.get(o.against) or o.official_dit and (o.against or not is_dit):
        raise UserError(f"against={o.against!r}, official_dit={o.official_dit!r} do not fit model.arch={m.arch!r}, "
                        f"semantics={m.semantics!r}, controls={m.controls!r}: --against=diffusers or --official_dit "
                        "compares a DiT of classes without controls (--size=DiT-S/2), --against=plain an mp "
                        "architecture")
    return o


def sized(name: str) -> ModelConfig:
    """The model that a name such as DiT-S/2 stands for, with classes, for 32 x 32 x 4 inputs."""
    found = re.fullmatch(r"(\w+)-(\w+)/(\d+)", name)
    arch, size, patch = found.groups() if found else ("", "", "")
    if arch.lower() not in model.ARCHS or size not in SIZES:
        raise UserError(f"unknown size={name!r}; it is ARCH-SIZE/PATCH, such as DiT-S/2: ARCH one of "
                        f"{', '.join(model.ARCHS)}, SIZE one of {', '.join(SIZES)}")
    return ModelConfig(arch=arch.lower(), semantics="class", resolution=32, channels=4, patch=int(patch), **SIZES[size])


# ---------------------------------------------------------------- our side

def make_inputs(o: Options, device: torch.device) -> Inputs:
    """Random images, noise indices, classes or text tokens, and controls of a plausible range."""
    m, B, g = o.model, o.batch, torch.Generator(device).manual_seed(o.seed)
    normal = lambda *shape: torch.randn(shape, generator=g, device=device)
    whole = lambda high: torch.randint(high, (B,), generator=g, device=device)
    controls = {c: normal(B, row.width).abs().squeeze(1) for c, row in CONTROLS.items() if c in model.control_names(m)}
    cond = Condition(label=whole(m.classes) if m.semantics == "class" else None,
                     text=normal(B, m.text_length, m.text_dim) if m.semantics == "text" else None,
                     has_controls=torch.ones(B, device=device) if controls else None, **controls)
    alpha_bar = alpha_bar_table(m.schedule, m.timesteps, m.sigma_scale).float().to(device)
    return Inputs(normal(B, m.channels, m.resolution, m.resolution), whole(m.timesteps).float(), cond, alpha_bar)


def randomize(net: nn.Module) -> None:
    """Give the layers that start at zero random weights: products with zeros are faster, and hide other weights."""
    for layer in net.zero_init_layers():
        for p in layer.parameters():
            nn.init.normal_(p, std=0.02)


def ours(cfg: Config, s: Inputs, dtype: str, compiled: bool) -> Implementation:
    """This library as train.py and sample.py run it, with tokens of type `dtype`."""
    device = s.x.device
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("highest")
    net = model.build(cfg.model).to(device)
    randomize(net)
    net.dtype = distributed.compute_dtype(device, dtype)
    if compiled:
        for block in net.blocks:
            block.compile(fullgraph=True)
    ema, window, denoise = PowerEMA(net, cfg.ema_std), LossWindow(device), with_guidance(net, s.cond, LAM)
    rows = optim.normalized_rows(net, cfg)
    opt = optim.optimizer(net, replace(cfg, lr=LR), window)

    def train_step() -> None:
        g = torch.Generator(device).manual_seed(cfg.seed)
        loss, i = train.denoising_loss(net, s.x, s.cond, g, s.alpha_bar, cfg)
        loss.mean().backward()
        window.add(loss, i, len(s.alpha_bar))
        optim.project_grad_(rows)
        window.add_norm(nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip or math.inf, foreach=True), 0)
        opt.step()
        optim.renormalize_(rows, window.bad)
        opt.zero_grad(set_to_none=True)
        ema.update(net, 2)

    steps = {"forward": lambda: net(s.x, s.i, s.cond), "train": train_step,
             "sample": lambda: ddim(denoise, s.x, s.alpha_bar, 1)}
    name = f"{cfg.model.arch}, {str(net.dtype)[6:]}{', compiled' * compiled}"
    return Implementation(name, net, steps, model.flops(cfg.model), torch.get_float32_matmul_precision())


# ---------------------------------------------------------------- other people's DiT

def theirs(name: str, net: nn.Module, eps: Callable[..., Tensor], average: Callable[[], None], s: Inputs,
           m: ModelConfig) -> Implementation:
    """Another DiT in fp32 with default AdamW and the shortest code for loss, guidance and sampler.

    eps(x, i, label) calls the network; average() updates its averaged weights."""
    opt, label = torch.optim.AdamW(net.parameters(), LR), s.cond.label
    both = torch.cat([label, torch.full_like(label, m.classes)])

    def train_step() -> None:
        noise, i = torch.randn_like(s.x), torch.randint(len(s.alpha_bar), label.shape, device=s.x.device)
        F.mse_loss(eps(add_noise(s.x, noise, s.alpha_bar[i]), i, label), noise).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        average()

    def denoise(x: Tensor, i: Tensor) -> Tensor:
        cond, uncond = eps(torch.cat([x, x]), torch.cat([i, i]), both).chunk(2)
        return uncond + LAM * (cond - uncond)

    steps = {"forward": lambda: eps(s.x, s.i, label), "train": train_step,
             "sample": lambda: ddim(denoise, s.x, s.alpha_bar, 1)}
    return Implementation(name, net, steps, model.flops(m))


# diffusers' names of our layers; it splits q, k, v, and has a copy of both embeddings in every block
DIFFUSERS_NAMES = {
    "x_embedder.": "pos_embed.", "y_embedder": "class_embedder", "final_layer.linear": "proj_out_2",
    "final_layer.adaLN_modulation.1": "proj_out_1", "adaLN_modulation.1": "norm1.linear",
    "t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "blocks.": "transformer_blocks.", "attn.proj": "attn1.to_out.0", "attn.qkv": "attn1.to_qkv",
    "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}


def diffusers_dit(net: model.Denoiser) -> nn.Module:
    """diffusers' DiTTransformer2DModel with the size and the weights of `net`, a DiT of classes."""
    kind, m, weights = optional_import("diffusers", "--against=diffusers", part="DiTTransformer2DModel"), net.cfg, {}
    other = kind(num_layers=m.depth, num_attention_heads=m.heads, attention_head_dim=m.width // m.heads, norm_eps=1e-6,
                 in_channels=m.channels, sample_size=m.resolution, patch_size=m.patch, num_embeds_ada_norm=m.classes)
    for block in other.transformer_blocks:                  # our slowest frequency; theirs is exactly 1/10000
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    for name, p in net.state_dict().items():
        for mine, its in DIFFUSERS_NAMES.items():
            name = name.replace(mine, its)
        if ".to_qkv." in name:
            weights |= {name.replace("qkv", c): part for c, part in zip("qkv", p.chunk(3))}
        elif "_embedder." in name:
            weights |= {f"transformer_blocks.{k}.norm1.emb.{name}": p for k in range(m.depth)}
        else:
            weights[name] = p
    other.load_state_dict(weights)
    return other.to(next(net.parameters()).device)


def diffusers_side(net: model.Denoiser, s: Inputs) -> Implementation:
    """diffusers as its training example uses it, with its default EMAModel."""
    other = diffusers_dit(net)
    from diffusers.training_utils import EMAModel
    ema = EMAModel(other.parameters(), use_ema_warmup=True)
    eps = lambda x, i, label: other(x, i, label).sample
    return theirs("diffusers", other, eps, lambda: ema.step(other.parameters()), s, net.cfg)


def official_side(net: model.Denoiser, s: Inputs, path: str) -> Implementation:
    """models.DiT of the official code in the folder `path`, with a dictionary of averaged weights."""
    file, m = Path(path) / "models.py", net.cfg
    if not file.is_file():
        raise UserError(f"--official_dit={path} has no models.py; give the folder of a checkout of the official DiT")
    patch_torchvision_ops()                                      # its timm imports torchvision
    try:
        kind = runpy.run_path(str(file))["DiT"]
    except ModuleNotFoundError as e:
        raise UserError(f"--official_dit={path} needs {e.name}: pip install {e.name}") from e
    other = kind(input_size=m.resolution, patch_size=m.patch, in_channels=m.channels, hidden_size=m.width,
                 num_heads=m.heads, depth=m.depth, num_classes=m.classes, learn_sigma=False).to(s.x.device)
    other.load_state_dict({**net.state_dict(), "pos_embed": net.pos_embed[None]})
    averages = {name: p.detach().clone() for name, p in other.named_parameters()}

    @torch.no_grad()
    def average() -> None:
        for name, p in other.named_parameters():
            averages[name].mul_(0.9999).add_(p, alpha=1e-4)
    return theirs("official", other, other, average, s, m)


@torch.inference_mode()
def assert_alike(a: Implementation, b: Implementation) -> None:
    """UserError unless both sides return the same eps and the same image after a guided step."""
    for what in ("forward", "sample"):
        y, z = (side.steps[what]() for side in (a, b) if side.net.eval())
        if not (worst := ((y - z).abs().max() / y.abs().max()).item()) <= ALIKE:
            raise UserError(f"{a.name} and {b.name} differ in {what} by {worst:.2g} of the largest output")


# ---------------------------------------------------------------- timing

def choose_sides(o: Options, s: Inputs) -> list[Implementation]:
    """The sides to time; the last is the reference of a comparison. A peer meets ours in fp32 and as it ships."""
    dtype = str(distributed.compute_dtype(s.x.device, o.dtype))[6:]
    compiled = o.compile == "on" or o.compile == "auto" and s.x.device.type == "cuda"
    if o.against == "plain":
        twin = replace(o.model, arch=o.model.arch.removeprefix("mp"), mp="")
        plain = replace(o, model=twin, forced_weight_norm=False, lr_mp=0.0)
        return [ours(cfg, s, dtype, compiled) for cfg in (plain, o)]
    if not (o.against or o.official_dit):
        return [ours(o, s, dtype, compiled)]
    equal = ours(o, s, "float32", False)
    other = diffusers_side(equal.net, s) if o.against else official_side(equal.net, s, o.official_dit)
    assert_alike(equal, other)
    more = {("float32", compiled), (dtype, compiled)} - {("float32", False)}
    return [equal, *(ours(o, s, *kind) for kind in sorted(more, reverse=True)), other]


def time_once(side: Implementation, what: str, device: torch.device) -> float:
    """Seconds of one step."""
    torch.set_float32_matmul_precision(side.matmul)
    distributed.synchronize(device)
    start = time.perf_counter()
    with torch.inference_mode(what != "train"):
        side.steps[what]()
    distributed.synchronize(device)
    return time.perf_counter() - start


def measure(sides: list[Implementation], what: str, o: Options, device: torch.device) -> list[dict]:
    """Time a step of all sides in turns, A B A B. A row for every side: its speed, and the last side's time over its.

    Both are medians, with quartiles low and high, least and most."""
    torch.compiler.reset()                                  # compile for this step's shapes alone
    for side in sides:
        side.net.train(what == "train")
        for _ in range(WARMUP):
            time_once(side, what, device)
    turns, end, rows = [], time.perf_counter() + o.seconds, []
    while len(turns) < LEAST or len(turns) < o.rounds and time.perf_counter() < end:
        turns.append([time_once(side, what, device) for side in sides])
    for k, side in enumerate(sides):
        low, seconds, high = statistics.quantiles([t[k] for t in turns], n=4, method="inclusive")
        least, ratio, most = statistics.quantiles([t[-1] / t[k] for t in turns], n=4, method="inclusive")
        images = o.batch / seconds
        rows.append({"what": what, "side": side.name, "seconds": seconds, "low": low, "high": high, "images": images,
                     "tflops": images * PASSES[what] * side.flops / 1e12, "ratio": ratio, "least": least, "most": most})
    return rows


def main(argv: list[str]) -> None:
    o, device = read_options(argv), distributed.find_device()
    torch.set_num_threads(o.threads or torch.get_num_threads())
    sides = choose_sides(o, make_inputs(o, device))
    peak = distributed.matmul_peak(device, distributed.compute_dtype(device, o.dtype)) / 1e12
    print(f"{o.size or o.model.arch}: {model.flops(o.model) / 1e9:.3f} GFLOP an image forward; batch {o.batch} on "
          f"{device}, {torch.get_num_threads()} CPU threads; matmul peak {peak:.3f} TFLOP/s\n{'step':8} {'network':28} "
          f"{'s/step':>8} {'(quartiles)':>18} {'images/s':>9} {'TFLOP/s':>8} "
          + (f"times as fast as {sides[-1].name}" if sides[1:] else "of peak     GB"))
    line = "{what:8} {side:28} {seconds:8.4f} ({low:.4f} .. {high:.4f}) {images:9.1f} {tflops:8.3f} "
    line += "{ratio:.3f} ({least:.3f} .. {most:.3f})" if sides[1:] else "{share:7.1%} {memory:6.2f}"
    for what in o.parts.split("+"):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for row in measure(sides, what, o, device):
            row |= {"share": row["tflops"] / peak, "memory": distributed.memory(device)}
            print(line.format(**row), flush=True)


if __name__ == "__main__":
    run(main)
