"""From noise to pictures: samplers as functions of any callable, guidance, and the command line.

python sample.py --out=out/shapes --prompt="a red ring left of a blue square" --n=16
python sample.py --out=out/shapes32 --size=96,96 --crop=0,0 --flip=0 --lam=3 --beta=1.4
python sample.py --out=out/cc12m --prompts=captions.txt --n=5000        (line k belongs to picture k)
python sample.py --weights=DiT-XL-2-256x256.pt --autoencoder=stabilityai/sd-vae-ft-ema --label=207 --out=out/dit
torchrun --nproc_per_node=8 -- sample.py --out=out/imagenet --n=50000          (run again to go on after a stop)

Writes <out>/samples/<name>.npz (arr_0, uint8, for evaluators), <name>.txt (what each picture was to be, a line each),
<name>.json (all options) and, for a few pictures, a grid <name>.png. Everything about the model is read from the run
folder. Dimensions: B batch, C channels, h x w pixels, T noise steps.
"""
import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import data
import machine
import model
import official
from autoencoder import decoder_of
from conditioning import Condition, concatenate, guide
from config import Config, UserError, parse, seed64
from schedule import alpha_bar_table, ddim_indices, to_sigma
from wishes import Options, Wishes, numbers

Denoise = Callable[[Tensor, Tensor], Tensor]        # (x (B, C, h, w), i (B,)) -> eps like x

GRID = 64                                           # up to this many pictures also become one PNG


# ---------------------------------------------------------------- samplers

def ddim(denoise: Denoise, noise: Tensor, alpha_bar: Tensor, steps: int, eta: float = 0.0, spacing: str = "trailing",
         draw: Callable[[int], Tensor] | None = None) -> Tensor:
    """[DDIM] eq. 12, 16: x0 = (x - sqrt(1-a) eps) / sqrt(a), x' = sqrt(a') x0 + sqrt(1-a'-s^2) eps + s z.

    s = eta sqrt((1-a')/(1-a)) sqrt(1 - a/a'); eta = 0 is deterministic, eta = 1 has the variance of [DDPM].
    noise (B, C, h, w) standard normal; alpha_bar (T,); draw(k) gives z of step k, needed when eta > 0."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie between 0, no fresh noise, and 1, that of DDPM")
    if eta > 0 and draw is None:
        raise ValueError("eta > 0 adds noise at every step: pass draw, a function from step to noise")
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


SPACING = {"ddim": "trailing", "heun": "linspace"}      # of each sampler, if none is asked for


def guided(net: Denoise, cond: Condition, lam: float, beta: float = 1.0,
           interval: tuple[int, int] | None = None) -> Denoise:
    """[COND] eq. 2 closed over a network: only the passes whose weight is not zero, all in one batch.

    lam 1 is no guidance, beta 1 guides on semantics alone. A condition without controls has no use for beta.
    interval: the lowest and the highest noise index that are guided, [INT]; beyond them eps(c, s) alone."""
    beta = beta if cond.steered is not None else 1.0
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


# ---------------------------------------------------------------- pictures of a run

def noise_for(indices: Sequence[int], shape: tuple[int, ...], seed: int, purpose: str = "sample") -> Tensor:
    """Standard normal noise keyed by (seed, purpose, index) for each picture. (B, *shape) on the CPU"""
    keys = [seed64(seed, purpose, int(k)) for k in indices]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(key)) for key in keys])


def draw(net: Denoise, cfg: Config, cond: Condition, indices: Sequence[int], o: Options,
         device: torch.device) -> Tensor:
    """Pictures (or latents) number `indices` under `cond`, one row each. (B, C, h, w), about [-1, 1]"""
    shape = (cfg.model.channels, *side(o, cfg))
    alpha_bar = alpha_bar_table(cfg.model.schedule, cfg.model.noise_steps, cfg.model.rescale)
    o = settled(o, cfg)
    denoise = guided(net, cond.to(device), o.lam, o.beta, guided_indices(o, alpha_bar))
    noise, spacing = noise_for(indices, shape, o.seed).to(device), o.spacing or SPACING[o.sampler]
    with torch.inference_mode():
        if o.sampler == "heun":
            return heun(denoise, noise, alpha_bar, o.steps, spacing)
        fresh = lambda k: noise_for(indices, shape, o.seed, f"step {k}").to(device)
        return ddim(denoise, noise, alpha_bar, o.steps, o.eta, spacing, fresh)


def settled(o: Options, cfg: Config) -> Options:
    """The options with the run's own guidance scale and share of fresh noise where none is asked for."""
    eta = cfg.eta if o.sampler == "ddim" else 0.0
    return replace(o, lam=cfg.lam if o.lam < 0 else o.lam, eta=eta if o.eta == -1 else o.eta)


def guided_indices(o: Options, alpha_bar: Tensor) -> tuple[int, int] | None:
    """The lowest and the highest noise index whose sigma lies in --interval; None if all are guided."""
    if not o.interval:
        return None
    (low, high), sigma = numbers("interval", o.interval, 2), to_sigma(alpha_bar)
    inside = torch.nonzero((sigma >= low) & (sigma <= high)).flatten().tolist()
    if not inside:
        raise UserError(f"interval={o.interval!r} has no noise level; sigma goes from {sigma[0]:.3g} to "
                        f"{sigma[-1]:.3g}")
    return inside[0], inside[-1]


def side(o: Options, cfg: Config) -> tuple[int, int]:
    """(h, w) of the pictures: that of the training, or --resolution, which patches must fill."""
    if not o.resolution:
        return cfg.model.resolution, cfg.model.resolution
    h, w = numbers("resolution", o.resolution, 2)
    if min(h, w) < 1 or h % cfg.model.patch or w % cfg.model.patch:
        raise UserError(f"resolution={o.resolution!r} is not two multiples of the model's patch, {cfg.model.patch}")
    return int(h), int(w)


def to_uint8(x: Tensor) -> np.ndarray:
    """[-1, 1] -> 0 .. 255, rounded to nearest. (B, C, h, w) -> (B, h, w, C)"""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def check(o: Options, cfg: Config) -> Options:
    """The options, settled. UserError for those that cannot be drawn, before anything is."""
    if o.sampler not in SPACING:
        raise UserError(f"unknown sampler={o.sampler!r}; there are {', '.join(SPACING)}")
    if o.eta != -1 and not 0 <= o.eta <= 1:
        raise UserError(f"eta={o.eta} must lie between 0, no fresh noise, and 1, that of DDPM, or be -1, the run's own")
    if o.eta > 0 and o.sampler != "ddim":
        raise UserError(f"eta={o.eta} needs sampler='ddim', got {o.sampler!r}")
    if min(o.n, o.batch, o.steps) < 1 or o.steps > cfg.model.noise_steps:
        raise UserError(f"n={o.n}, batch={o.batch} and steps={o.steps} must be at least 1, steps at most "
                        f"{cfg.model.noise_steps}")
    if o.beta != 1 and not model.control_names(cfg.model):
        raise UserError(f"beta={o.beta} needs a model with controls; {o.out} has none")
    guided_indices(o, alpha_bar_table(cfg.model.schedule, cfg.model.noise_steps, cfg.model.rescale))
    side(o, cfg)
    if Path(o.name).name != o.name:
        raise UserError(f"name={o.name!r} is a file name without folders; files go to {o.out}/samples")
    try:
        ddim_indices(cfg.model.noise_steps, o.steps, o.spacing or SPACING[o.sampler])
    except ValueError as e:
        raise UserError(str(e)) from e
    return settled(o, cfg)


def open_run(o: Options) -> tuple[model.Denoiser, Config, dict[str, str]]:
    """The network, its config and the header of its weights: a run's, or published ones. UserError for both."""
    if o.weights:
        if o.file != Options.file:
            raise UserError(f"--file={o.file} is of the run {o.out}, --weights={o.weights} are published ones; give "
                            f"one of them")
        net, m = official.load_official_dit(o.weights)
        return net, *official.as_run(o.weights, m)
    file = Path(o.out) / o.file
    return *model.load(file), checkpoint.read_header(file)


def draw_all(o: Options, net: Denoise, cfg: Config, wishes: Wishes, place: machine.Place, part: Path,
             decoder: tuple[Callable[[Tensor], Tensor], int] = (Tensor.float, 1)) -> np.ndarray:
    """All n pictures, (n, f h, f w, C) uint8, by batches that the processes take in turn, in one file mapped to memory.

    A batch is marked when it is on the disk, so that the same command after a stop draws only the missing ones.
    part: that file; the marks are beside it, with another suffix. decoder: what makes pictures of latents, and by how
    much f it enlarges them."""
    (h, w), batches, (decode, f) = side(o, cfg), -(-o.n // o.batch), decoder
    files = (((o.n, f * h, f * w, 3), part), ((batches,), part.with_suffix(".done")))
    if place.rank == 0 and any(not f.exists() or f.stat().st_size != math.prod(shape) for shape, f in files):
        discard(part)                                       # neither is of use without the other
        for shape, file in files:
            np.memmap(file, np.uint8, "w+", shape=shape).flush()
    machine.agree(0, place)                                 # the files are there before anyone opens them
    images, done = (np.memmap(file, np.uint8, "r+", shape=shape) for shape, file in files)
    mine = [b for b in range(place.rank, batches, place.world) if not done[b]]
    for b in tqdm(mine, desc="drawing", unit="batch", disable=place.rank > 0 or None):
        indices = np.arange(b * o.batch, (b + 1) * o.batch) if batches > 1 else np.arange(o.n)
        x = decode(draw(net, cfg, wishes(indices)[0], indices, o, place.device))   # the last batch in full size too
        if not torch.isfinite(x).all():
            raise UserError(f"pictures {indices[0]} to {indices[-1]} are not finite; try --dtype=float32")
        images[indices[0]:indices[-1] + 1] = to_uint8(x)[:o.n - indices[0]]
        images.flush()
        done[b] = 1
        done.flush()
    machine.add_up(torch.zeros(1, device=place.device), place).item()           # every process is through
    return images


def discard(part: Path) -> None:
    """Take away unfinished pictures, their marks first: marks alone would call pictures done that are not there."""
    for suffix in (".done", ".part"):
        part.with_suffix(suffix).unlink(missing_ok=True)


def write_npz(path: Path, images: np.ndarray) -> None:
    """Replace an .npz by one of these pictures, (n, H, W, C) uint8, in one step and when they are on the disk."""
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "wb") as f:
        np.savez(f, arr_0=images)
        f.flush()
        os.fsync(f.fileno())
    os.replace(unfinished, path)


def write_grid(path: Path, images: np.ndarray, titles: list[str]) -> None:
    """All pictures, (n, H, W, C) uint8, on one page, a square of them, with their titles."""
    pixels, page = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2) / 127.5 - 1, io.BytesIO()
    data.grid(pixels, math.ceil(math.sqrt(len(images))), titles).save(page, "png")
    checkpoint.write_bytes(path, page.getvalue())


def main(argv: list[str]) -> None:
    o = parse(argv, Options())
    place = machine.setup(o.threads)
    net, cfg, header = open_run(o)
    o = check(o, cfg)
    out, decoder = Path(o.out), decoder_of(header, o.autoencoder, cfg.model.channels, place.device)
    net = net.to(place.device)
    net.dtype = machine.precision(place.device, o.dtype)
    wishes = Wishes(o, cfg, header)
    protocol = {**asdict(o), "train_step": int(header["step"]),
                "weights_sha256": header["sha256"], "prompts_sha256": wishes.prompts_sha256, "dtype": str(net.dtype)}
    key = hashlib.sha256(json.dumps({**protocol, "threads": 0, "name": ""}).encode()).hexdigest()[:8]
    path = out / "samples" / f"{o.name or key}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)

    part = path.with_name(f"{path.stem}-{key}.part")        # unfinished pictures of exactly these options
    images = draw_all(o, net, cfg, wishes, place, part, decoder)
    if place.rank == 0:
        write_npz(path, images)
        parts = np.split(np.arange(o.n), range(o.batch, o.n, o.batch))
        titles = [" ".join(title.split()) for indices in parts for title in wishes.titles(indices)]
        checkpoint.write_text(path.with_suffix(".txt"), "".join(f"{title}\n" for title in titles))
        checkpoint.write_text(path.with_suffix(".json"), json.dumps(protocol, indent=1))
        print(f"{o.n} pictures in {path}, what they were to be in {path.with_suffix('.txt')}")
        if o.n <= GRID:
            write_grid(path.with_suffix(".png"), images, titles)
            print(f"grid in {path.with_suffix('.png')}")
        del images
        discard(part)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        machine.leave()
    except UserError as e:
        checkpoint.say(f"error: {e}.")
        sys.exit(2)
