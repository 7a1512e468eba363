"""Sampling: samplers as functions of any callable, guidance, the condition of every image, the command line.

python sample.py --out=out/shapes --prompt="a red ring left of a blue square" --n=16
torchrun --nproc_per_node=8 -- sample.py --out=out/imagenet --n=50000          (resumes when run again after a stop)

Writes <out>/samples/<name>.npz (arr_0, uint8, for evaluators), <name>.txt (the prompt or class of each image, one a
line), <name>.json (all options) and, for up to 64 images, a grid <name>.png. The run folder describes the model.
To add a sampler, write a function and a row of SAMPLERS.
Dimensions: B batch, C channels, h x w pixels, T noise steps, L tokens of a caption, E their width.
"""
import difflib
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import model
from baselines import official_dit
from conditioning import CONTROLS, Condition, concatenate, guide, make_condition
from config import Config, UserError, check_name, parse, run
from data import read_prompts
from latents import decoder_of
from rng import keyed_noise, seed64
from runtime import checkpoint, distributed, log
from runtime.plot import from_uint8, to_uint8
from schedule import alpha_bar_table, ddim_indices, to_sigma
from text import WordVectors, make_encoder

Denoise = Callable[[Tensor, Tensor], Tensor]        # (x (B, C, h, w), i (B,)) -> eps like x

GRID = 64                               # up to this many images also become one PNG


# ---------------------------------------------------------------- samplers

def ddim(denoise: Denoise, noise: Tensor, alpha_bar: Tensor, steps: int, eta: float = 0.0, spacing: str = "trailing",
         draw: Callable[[int], Tensor] | None = None) -> Tensor:
    """[DDIM] eq. 12, 16: x0 = (x - sqrt(1-a) eps) / sqrt(a), x' = sqrt(a') x0 + sqrt(1-a'-s^2) eps + s z.

    s = eta sqrt((1-a')/(1-a)) sqrt(1 - a/a'); eta = 0 is deterministic, eta = 1 has the variance of [DDPM].
    noise (B, C, h, w) standard normal; alpha_bar (T,); draw(k) gives z of step k, needed when eta > 0."""
    if not 0 <= eta <= 1 or eta > 0 and draw is None:
        raise ValueError(f"eta={eta} must lie in [0, 1] and, above 0, needs draw, a function from step to noise")
    x, indices = noise, ddim_indices(len(alpha_bar), steps, spacing).tolist()
    levels = [alpha_bar[i].item() for i in indices] + [1.0]
    for k, i in enumerate(indices):
        a, a_next = levels[k], levels[k + 1]
        eps = denoise(x, torch.full((len(x),), float(i), device=x.device))
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        s = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        x = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - s ** 2) * eps
        if s > 0:
            x = x + s * draw(k)
    return x


def heun(denoise: Denoise, noise: Tensor, alpha_bar: Tensor, steps: int, spacing: str = "linspace") -> Tensor:
    """[EDM] alg. 1 without churn, for z = x / sqrt(alpha_bar): dz/dsigma = eps, each step corrected by the mean slope.

    Second order with "linspace" and "leading", whose last step to sigma = 0, Euler's, is a short one; first order with
    "trailing". 2 steps - 1 calls. Arguments as for ddim."""
    indices = ddim_indices(len(alpha_bar), steps, spacing).tolist()
    sigma = [to_sigma(alpha_bar[i]).item() for i in indices] + [0.0]

    def at(z: Tensor, k: int) -> Tensor:
        return denoise(z / math.sqrt(1 + sigma[k] ** 2), torch.full((len(z),), float(indices[k]), device=z.device))

    z = noise * math.sqrt(1 + sigma[0] ** 2)
    for k in range(steps):
        slope, h = at(z, k), sigma[k + 1] - sigma[k]
        ahead = z + h * slope
        z = ahead if k == steps - 1 else z + h * (slope + at(ahead, k + 1)) / 2
    return z


def dpmpp(denoise: Denoise, noise: Tensor, alpha_bar: Tensor, steps: int, spacing: str = "trailing") -> Tensor:
    """[DPMS] alg. 2, DPM-Solver++(2M): x' = (sigma'/sigma) x - alpha' (exp(-h) - 1) D, h the step in ln(alpha/sigma).

    D = x0 + (x0 - x0_before) / (2 r), r = h_before / h. The first step and the last, to sigma = 0, take D = x0 and are
    DDIM's. alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar). One call a step. Arguments as for ddim."""
    x, x0_before, indices = noise, noise, ddim_indices(len(alpha_bar), steps, spacing).tolist()
    alpha = [math.sqrt(alpha_bar[i].item()) for i in indices] + [1.0]
    sigma = [math.sqrt(1 - alpha_bar[i].item()) for i in indices] + [0.0]
    decay = [alpha[k] / alpha[k + 1] * sigma[k + 1] / sigma[k] for k in range(steps)]       # exp(-h)
    for k, i in enumerate(indices):
        eps = denoise(x, torch.full((len(x),), float(i), device=x.device))
        D = x0 = (x - sigma[k] * eps) / alpha[k]
        if 0 < k < steps - 1:
            r = math.log(decay[k - 1]) / math.log(decay[k])
            D = x0 + (x0 - x0_before) / (2 * r)
        x = sigma[k + 1] / sigma[k] * x - alpha[k + 1] * (decay[k] - 1) * D
        x0_before = x0
    return x


class Sampler(NamedTuple):
    """A row of SAMPLERS: function(denoise, noise, alpha_bar, steps, spacing=), with eta= and draw= if stochastic."""
    function: Callable[..., Tensor]
    spacing: str                        # of its noise levels, unless --spacing says otherwise
    stochastic: bool = False            # adds noise at every step


SAMPLERS = {"ddim": Sampler(ddim, "trailing", stochastic=True), "heun": Sampler(heun, "linspace"),
            "dpmpp": Sampler(dpmpp, "trailing")}


def with_guidance(net: Denoise, cond: Condition, lam: float, beta: float = 1.0,
                  interval: tuple[int, int] | None = None) -> Denoise:
    """[COND] eq. 2 closed over a network: only the passes with a weight other than zero, all in one batch.

    lam 1 is no guidance, beta 1 guides on semantics alone; a condition without controls ignores beta.
    interval: the lowest and the highest noise index that are guided, [INT]; beyond them eps(c, s) alone."""
    beta = beta if cond.has_controls is not None else 1.0
    weights = {"cs": lam * beta, "s": lam * (1 - beta), "null": 1 - lam}
    parts = {"cs": cond, "s": cond.drop(controls=True), "null": cond.drop(semantics=True, controls=True)}
    parts = {k: c for k, c in parts.items() if weights[k] != 0}
    joint = concatenate(list(parts.values()))

    def denoise(x: Tensor, i: Tensor) -> Tensor:
        if interval is not None and not interval[0] <= i[0].item() <= interval[1]:
            return net(x, i, cond)
        eps = net(x.repeat(len(parts), 1, 1, 1), i.repeat(len(parts)), joint)   # (passes B, C, h, w)
        eps = dict(zip(parts, eps.chunk(len(parts))))
        return guide(*(eps.get(k, torch.zeros_like(x)) for k in weights), lam, beta)
    return denoise


# ---------------------------------------------------------------- options

@dataclass(frozen=True)
class Options:
    """Which images to generate, and how."""
    out: str = "out/demo"           # run folder, as given to train.py
    ema_file: str = "weights.safetensors"  # averaged weights in the run folder; ema.py makes others
    pretrained: str = ""            # published DiT in place of a run: .pt file or diffusers folder; out is for images
    autoencoder: str = ""           # decodes latents: folder or hub name; empty = the one that made the run's latents
    prompt: str = ""                # caption; several are separated by ";"; empty = captions of the data set
    prompts: str = ""               # file of captions, one a line, each for one image; or COCO's captions json
    label: str = ""                 # class, by name or number; several are separated by ";"; empty = all in turn
    n: int = 16                     # number of images
    steps: int = 50                 # sampling steps
    sampler: str = field(default=next(iter(SAMPLERS)), metadata={"help": ", ".join(SAMPLERS)})
    spacing: str = ""               # of the noise levels: trailing, leading, linspace; empty = the sampler's own
    eta: float = -1.0               # noise added per step by a stochastic sampler: 0 none, 1 DDPM's; -1 = the run's
    guidance: float = -1.0          # guidance scale lambda, 1 = none; -1 = the run's
    control_guidance: float = 1.0   # share of lambda that goes to the controls too: 0 none, 1 all, above 1 exaggerates
    guidance_interval: str = ""     # LOW,HIGH: guide only where sigma lies between these; empty = everywhere
    size: str = ""                  # H,W of the original, for detail; empty = of training samples, like crop and flip
    crop: str = ""                  # TOP,LEFT corner of the crop; 0,0 cuts nothing off
    flip: str = ""                  # 0 as the caption says, 1 mirrored
    resolution: str = ""            # H,W of the images (or latents); empty = as in training
    seed: int = 0                   # keys the noise; image k is the same for every n and batch
    batch: int = 64                 # images at a time
    name: str = ""                  # of the files in <out>/samples; empty = made from the options
    dtype: str = "auto"             # auto, float32 or bfloat16
    threads: int = 0                # CPU threads; 0 = all


def check(o: Options, cfg: Config) -> Options:
    """Return the options with the run's guidance scale and eta in place of -1. UserError if they do not fit the run."""
    check_name("sampler", o.sampler, SAMPLERS)
    sampler, m = SAMPLERS[o.sampler], cfg.model
    if o.eta != -1 and not 0 <= o.eta <= sampler.stochastic:
        raise UserError(f"eta={o.eta} must lie between 0 and 1, or be -1, the run's own; above 0 it needs a sampler "
                        f"that adds noise, such as ddim, got sampler={o.sampler!r}")
    if min(o.n, o.batch) < 1:
        raise UserError(f"n={o.n} and batch={o.batch} must be at least 1")
    if Path(o.name).name != o.name:
        raise UserError(f"name={o.name!r} is a file name without folders; files go to {o.out}/samples")
    if o.control_guidance != 1 and not model.control_names(m):
        raise UserError(f"control_guidance={o.control_guidance} needs a model with controls; {o.out} has none")
    guidance_indices(o, alpha_bar_table(m.schedule, m.timesteps, m.sigma_scale))
    image_size(o, cfg)
    try:
        ddim_indices(m.timesteps, o.steps, o.spacing or sampler.spacing)
    except ValueError as e:
        raise UserError(str(e)) from e
    eta = o.eta if o.eta != -1 else cfg.eta if sampler.stochastic else 0.0
    return replace(o, guidance=cfg.guidance if o.guidance < 0 else o.guidance, eta=eta)


def guidance_indices(o: Options, alpha_bar: Tensor) -> tuple[int, int] | None:
    """Return the lowest and the highest noise index with a sigma in --guidance_interval; None if all are guided."""
    if not o.guidance_interval:
        return None
    (low, high), sigma = parse_numbers("guidance_interval", o.guidance_interval, 2), to_sigma(alpha_bar)
    inside = torch.nonzero((sigma >= low) & (sigma <= high)).flatten().tolist()
    if not inside:
        raise UserError(f"guidance_interval={o.guidance_interval!r} has no noise level; sigma goes from "
                        f"{sigma[0]:.3g} to {sigma[-1]:.3g}")
    return inside[0], inside[-1]


def image_size(o: Options, cfg: Config) -> tuple[int, int]:
    """Return (h, w) of the images: those of training, or --resolution in multiples of the patch."""
    h, w = parse_numbers("resolution", o.resolution, 2) if o.resolution else [cfg.model.resolution] * 2
    if min(h, w) < 1 or h % cfg.model.patch or w % cfg.model.patch:
        raise UserError(f"resolution={o.resolution!r} must be two multiples of the model's patch, {cfg.model.patch}")
    return int(h), int(w)


def parse_numbers(key: str, text: str, count: int) -> list[float]:
    """Read `count` numbers from 0 up, joined by commas; UserError for any other text."""
    if not re.fullmatch(",".join([r" *\d*\.?\d+(e-?\d+)? *"] * count), text):
        raise UserError(f"--{key} wants {count} number{'s' * (count > 1)} from 0 up with commas, got {text!r}")
    return [float(part) for part in text.split(",")]


# ---------------------------------------------------------------- the condition of every image

def padding_generators(indices: Sequence[int], seed: int) -> list[torch.Generator]:
    """[COND] sec. 2.1: make a generator for the padding noise of each image, keyed by its number."""
    return [torch.Generator().manual_seed(seed64(seed, "padding", int(k))) for k in indices]


class SampleConditions:
    """The condition of every image of a run, by number: prompt or class, and controls.

    The options set them; otherwise captions of the data set, all classes in turn, and controls of training samples."""
    def __init__(self, o: Options, cfg: Config, header: dict[str, str]) -> None:
        self.cfg, self.seed, self.semantics = cfg, o.seed, cfg.model.semantics
        self.classes = json.loads(header["classes"])
        for key, needed in (("prompt", "text"), ("prompts", "text"), ("label", "class")):
            if getattr(o, key) and self.semantics != needed:
                raise UserError(f"--{key} needs a model of {needed}; {o.out} has semantics={self.semantics!r}")
        if o.prompt and o.prompts:
            raise UserError(f"--prompt={o.prompt!r} and --prompts={o.prompts!r} exclude each other; give one")
        split = lambda text: [part.strip() for part in text.split(";")] if text else []
        self.prompts = read_prompts(o.prompts, o.seed) if o.prompts else split(o.prompt)
        self.prompts_sha256 = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest() if o.prompts else ""
        self.labels = list(map(self.class_index, split(o.label))) or list(range(len(self.classes)))
        self.encoder = make_encoder(cfg, json.loads(header.get("encoder", "null")))
        self.source = data.open_source(cfg, "test") if self.semantics == "text" and not self.prompts else None
        for caption in self.prompts if isinstance(self.encoder, WordVectors) else self.prompts[:1]:
            self.encoder.encode([caption])      # fails early for unknown words, or another encoder than in training

        stored = json.loads(header.get("controls", "{}"))
        self.rows = {key: torch.tensor(rows).float() for key, rows in stored.items()}       # (rows, 2) or (rows,)
        for key in [key for key in CONTROLS if getattr(o, key)]:
            if key not in self.rows:
                raise UserError(f"--{key} needs a model with this control; {o.out} has controls={cfg.model.controls!r}")
            value = torch.tensor(parse_numbers(key, getattr(o, key), CONTROLS[key].width))
            self.rows[key] = value.squeeze().expand_as(self.rows[key])
        if o.flip and self.rows["flip"][0] not in (0, 1):
            raise UserError(f"--flip wants 0 or 1, got {o.flip!r}")

    def class_index(self, label: str) -> int:
        known = [*self.classes, *map(str, range(len(self.classes)))]        # a name that is a number is a name
        if label in known:
            return known.index(label) % len(self.classes)
        near = difflib.get_close_matches(label, self.classes, n=5, cutoff=0.4) or self.classes[:5]
        raise UserError(f"unknown class {label!r} among {len(self.classes)}; near: {', '.join(near)}")

    def controls(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Return the controls of these images (B,), (B, 2) or (B,): an image's come from one training sample."""
        keys = [seed64(self.seed, "controls", int(k)) for k in indices]
        return {name: rows[[key % len(rows) for key in keys]] for name, rows in self.rows.items()}

    def batch(self, indices: np.ndarray) -> data.Batch:
        """Return a batch with the caption or the label of each of these images (B,)."""
        if self.semantics == "class":
            return {"label": torch.tensor([self.labels[k % len(self.labels)] for k in indices])}
        if self.prompts:
            return {"caption": [self.prompts[k % len(self.prompts)] for k in indices]}
        return data.cyclic_batch(self.source, indices) if self.source else {"caption": [""] * len(indices)}

    def titles(self, indices: np.ndarray) -> list[str]:
        """Return a title for each of these images (B,): caption, name of the class, or nothing."""
        return data.titles(self.batch(indices), self.classes)

    def __call__(self, indices: np.ndarray) -> tuple[Condition, list[str]]:
        """Return the condition of these images (B,) and a title for each."""
        controls, batch = self.controls(indices), data.with_text(self.batch(indices), self.encoder)
        cond = make_condition(batch | controls, self.semantics, tuple(controls), self.cfg.padding,
                              self.cfg.padding_noise, padding_generators(indices, self.seed))
        return cond, data.titles(batch, self.classes)


# ---------------------------------------------------------------- generating

@torch.inference_mode()
def generate(net: Denoise, cfg: Config, cond: Condition, indices: Sequence[int], o: Options,
             device: torch.device) -> Tensor:
    """Sample images (or latents) number `indices` under `cond`, one row each. (B, C, h, w), about [-1, 1]"""
    o, sampler, m = check(o, cfg), SAMPLERS[o.sampler], cfg.model
    alpha_bar = alpha_bar_table(m.schedule, m.timesteps, m.sigma_scale)
    denoise = with_guidance(net, cond.to(device), o.guidance, o.control_guidance, guidance_indices(o, alpha_bar))

    def noise(purpose: str) -> Tensor:
        return keyed_noise(indices, (m.channels, *image_size(o, cfg)), o.seed, purpose).to(device)

    added = {"eta": o.eta, "draw": lambda k: noise(f"step {k}")} if sampler.stochastic else {}
    spacing = o.spacing or sampler.spacing
    return sampler.function(denoise, noise("sample"), alpha_bar, o.steps, spacing=spacing, **added)


class Run(NamedTuple):
    """A network ready to sample: run(indices) gives images about [-1, 1], decoded if it makes latents."""
    options: Options                    # with the run's defaults filled in
    net: nn.Module
    cfg: Config
    header: dict[str, str]              # of the weights
    conditions: SampleConditions
    decoder: tuple[Callable[[Tensor], Tensor], int]     # latents to images, and how many times larger they are
    device: torch.device

    def __call__(self, indices: Sequence[int], cond: Condition | None = None) -> Tensor:
        """Generate images number `indices` under their own condition, or under `cond`. (B, C, h, w)"""
        cond = self.conditions(indices)[0] if cond is None else cond
        return self.decoder[0](generate(self.net, self.cfg, cond, indices, self.options, self.device))


def load_run(o: Options, device: torch.device) -> Run:
    """Load the run that the options name, or published weights. UserError if the options do not fit it."""
    if o.pretrained and o.ema_file != Options.ema_file:
        raise UserError(f"--ema_file={o.ema_file} is of a run, --pretrained={o.pretrained} is not; give one of them")
    if o.pretrained:
        net, m = official_dit.load_official_dit(o.pretrained)
        cfg, header = official_dit.as_run(o.pretrained, m)
    else:
        file = Path(o.out) / o.ema_file
        (net, cfg), header = model.load(file), checkpoint.read_header(file)
    o = check(o, cfg)
    decoder = decoder_of(header, o.autoencoder, cfg.model.channels, device)
    net = net.to(device)
    net.dtype = distributed.compute_dtype(device, o.dtype)
    return Run(o, net, cfg, header, SampleConditions(o, cfg, header), decoder, device)


# ---------------------------------------------------------------- files

def generate_all(images_of: Run, dist: distributed.Dist, part: Path) -> np.ndarray:
    """Generate all n images of a run, (n, f h, f w, C) uint8, in one file mapped to memory; processes share batches.

    A batch is marked once it is on the disk, so that the same command after a stop generates only the missing ones.
    part: that file; the marks lie beside it, with another suffix."""
    o, (_, f) = images_of.options, images_of.decoder
    (h, w), batches = image_size(o, images_of.cfg), -(-o.n // o.batch)
    files = (((o.n, f * h, f * w, 3), part), ((batches,), part.with_suffix(".done")))
    if dist.rank == 0 and any(not f.exists() or f.stat().st_size != math.prod(shape) for shape, f in files):
        remove_partial(part)                                # neither is of use without the other
        for shape, file in files:
            np.memmap(file, np.uint8, "w+", shape=shape).flush()
    distributed.broadcast_from_rank0(0, dist)               # the files exist before anyone opens them
    images, done = (np.memmap(file, np.uint8, "r+", shape=shape) for shape, file in files)
    mine = [b for b in range(dist.rank, batches, dist.world) if not done[b]]
    for b in tqdm(mine, desc="sampling", unit="batch", disable=dist.rank > 0 or None):
        indices = b * o.batch + np.arange(min(o.batch, o.n))
        x = images_of(indices)                              # the last batch in full size too
        if not torch.isfinite(x).all():
            raise UserError(f"images {indices[0]} to {indices[-1]} are not finite; try --dtype=float32")
        images[indices[0]:indices[-1] + 1] = to_uint8(x)[:o.n - indices[0]]
        images.flush()
        done[b] = 1
        done.flush()
    distributed.all_reduce_sum(torch.zeros(1, device=dist.device), dist).item()     # every process has finished
    return images


def remove_partial(part: Path) -> None:
    """Remove unfinished images, their marks first: marks alone would count missing images as done."""
    for suffix in (".done", ".part"):
        part.with_suffix(suffix).unlink(missing_ok=True)


def write_npz(path: Path, images: np.ndarray) -> None:
    """Replace an .npz by one of these images, (n, H, W, C) uint8, in one step, once they are on the disk."""
    with log.atomic_path(path) as unfinished:
        with open(unfinished, "wb") as f:
            np.savez(f, arr_0=images)


def write_grid(path: Path, images: np.ndarray, titles: list[str]) -> None:
    """Write all images, (n, H, W, C) uint8, with their titles in a square on one page."""
    pixels = from_uint8(np.array(images)).permute(0, 3, 1, 2)
    with log.atomic_path(path) as unfinished:
        data.grid(pixels, math.ceil(math.sqrt(len(images))), titles).save(unfinished, "png")


def main(argv: list[str]) -> None:
    o = parse(argv, Options())
    dist = distributed.setup(o.threads)
    images_of = load_run(o, dist.device)
    o, conditions, header = images_of.options, images_of.conditions, images_of.header
    protocol = {**asdict(o), "train_step": int(header["step"]), "weights_sha256": header["sha256"],
                "prompts_sha256": conditions.prompts_sha256, "dtype": str(images_of.net.dtype)}
    key = hashlib.sha256(json.dumps({**protocol, "threads": 0, "name": ""}).encode()).hexdigest()[:8]
    path = Path(o.out) / "samples" / f"{o.name or key}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)

    part, began = path.with_name(f"{path.stem}-{key}.part"), time.monotonic()   # images of exactly these options
    images = generate_all(images_of, dist, part)
    if dist.rank > 0:
        return
    seconds = time.monotonic() - began
    write_npz(path, images)
    batches = np.split(np.arange(o.n), range(o.batch, o.n, o.batch))
    titles = [" ".join(title.split()) for indices in batches for title in conditions.titles(indices)]
    log.write_text(path.with_suffix(".txt"), "".join(f"{title}\n" for title in titles))
    log.write_text(path.with_suffix(".json"), json.dumps(protocol, indent=1))
    if o.n <= GRID:
        write_grid(path.with_suffix(".png"), images, titles)
    del images
    remove_partial(part)
    print(f"{o.n} images in {path}, their prompts in .txt{', a grid in .png' if o.n <= GRID else ''}\n{dist.device}, "
          f"{protocol['dtype'][6:]}, {o.sampler}, guidance {o.guidance:g}, eta {o.eta:g}, {seconds:.1f} seconds")


if __name__ == "__main__":
    run(main, cleanup=distributed.cleanup)
