"""Train a denoiser.

python train.py --config=configs/shapes.py                          one process, same code path as
torchrun --nproc_per_node=8 train.py --config=configs/shapes.py [--lr=3e-4 --model.depth=12]

The same command again resumes. Output: <out>/config.json, log.jsonl, status.json, samples/*.png, step-*/, weights.safetensors
Dimensions: B batch, C channels, R resolution, T noise steps.
"""
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import data
import machine
import model
import sample
from conditioning import Condition, from_batch
from config import Config, UserError, differences, fields, from_json, load, parse, seed64, to_json
from ema import PowerEMA
from schedule import SCHEDULES, add_noise

QUARTERS = 4                            # the loss is logged by quarter of the noise range, cleanest first
PREVIEWS = 16                           # pictures in a preview grid
PREVIEW_STEPS = 20                      # sampling steps of a preview
CONTROL_ROWS = 1000                     # control values kept with the weights, for sampling from their distribution
# What a run may change when it is resumed; everything else must stay, or the result is neither the old run nor a new one.
MAY_CHANGE = {"out", "steps", "lr", "warmup", "cooldown", "workers", "max_bad", "log_every", "save_every", "sample_every",
              "lam", "threads", "compile", "clip"}


class Stopped(Exception):
    """A signal asked the run to stop, and it has saved."""
    def __init__(self, signal: int, step: int) -> None:
        self.signal, self.step = signal, step


class Nonfinite(Exception):
    """The loss or a gradient is inf or nan."""


class Stop:
    """SIGINT and SIGTERM set a flag that the loop reads; a second signal ends the process at once."""
    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame: object) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number


# ---------------------------------------------------------------- before the loop

def read_config(argv: list[str]) -> Config:
    """The config of --config=FILE with the other flags put in; the default config if there is none."""
    rest, path = [], None
    words = iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or next(words, "")
        else:
            rest.append(word)
    return parse(rest, load(path) if path is not None else Config())


def complete(cfg: Config, source: data.Source, encoder: data.TextEncoder | None) -> Config:
    """The config with what only the data set knows filled in: number of classes, size of a caption's encoding."""
    m = cfg.model
    if m.semantics == "class":
        if m.classes not in (0, len(source.classes)):
            raise UserError(f"{cfg.data} has {len(source.classes)} classes, the config says model.classes={m.classes}")
        m = dataclasses.replace(m, classes=len(source.classes))
    if m.semantics == "text":
        m = dataclasses.replace(m, text_dim=encoder.dim, text_length=encoder.length)
    return dataclasses.replace(cfg, model=m)


def check(cfg: Config, world: int) -> None:
    """UserError for a config that cannot run, before anything is built."""
    for key in ("batch", "micro", "steps", "log_every", "save_every"):
        if getattr(cfg, key) < 1:
            raise UserError(f"{key}={getattr(cfg, key)} must be at least 1")
    if not cfg.lr > 0 or not math.isfinite(cfg.lr):
        raise UserError(f"lr={cfg.lr} must be a positive number")
    if cfg.batch % cfg.micro:
        raise UserError(f"batch={cfg.batch} is not a multiple of micro={cfg.micro}")
    n = cfg.batch // cfg.micro
    if n % world:
        fit = [w for w in range(1, n + 1) if n % w == 0]
        raise UserError(f"batch={cfg.batch} with micro={cfg.micro} is {n} microbatches, which {world} processes cannot "
                        f"share; use {', '.join(map(str, fit))} processes, or another micro")
    if cfg.schedule not in SCHEDULES:
        raise UserError(f"unknown schedule={cfg.schedule!r}; there are {', '.join(SCHEDULES)}")
    if cfg.compile not in ("auto", "on", "off"):
        raise UserError(f"unknown compile={cfg.compile!r}; there are auto, on, off")
    model.check(cfg.model)


def check_resume(cfg: Config, meta: dict, fingerprint: str, out: Path) -> None:
    """UserError if the run in `out` is another one than this config describes."""
    changed = [d for d in differences(from_json(json.dumps(meta["config"])), cfg) if d.split(":")[0] not in MAY_CHANGE]
    if meta["data"] != fingerprint:
        changed.append(f"data fingerprint: {meta['data'][:8]} -> {fingerprint[:8]}")
    if changed:
        raise UserError(f"cannot resume {out}: {', '.join(changed)}. Choose another --out, or set these back")
    if meta["threads"] != torch.get_num_threads() or meta["torch"] != torch.__version__:
        checkpoint.say("note: torch or the number of threads has changed; sums may differ in the last bit.")


# ---------------------------------------------------------------- one step

def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up, constant, linear cool-down to zero; a function of the step alone."""
    rising = (step + 1) / max(1, cfg.warmup)
    falling = (cfg.steps - step) / (cfg.steps * cfg.cooldown) if cfg.cooldown > 0 else 1.0
    return cfg.lr * min(1.0, rising, falling)


def denoising_loss(net: nn.Module, x0: Tensor, cond: Condition, g: torch.Generator, alpha_bar: Tensor,
                   cfg: Config) -> tuple[Tensor, Tensor]:
    """[DDPM] eq. 14: |eps_hat(x_t, i, cond) - eps|^2 with i uniform, of every picture, and i. (B,), (B,)

    Equal to the denoising error |x0_hat - x0|^2 weighted by 1/sigma^2 ([COND] app. A). All draws come from g."""
    B = len(x0)
    i = torch.randint(len(alpha_bar), (B,), generator=g, device=x0.device)
    eps = torch.randn(x0.shape, generator=g, device=x0.device)
    dropped = torch.rand(B, generator=g, device=x0.device) < cfg.drop
    x_t = add_noise(x0, eps, alpha_bar[i])
    eps_hat = net(x_t, i.float(), cond.drop(semantics=dropped))
    return (eps_hat - eps).square().flatten(1).mean(1), i


def generator(place: machine.Place, *key: object) -> torch.Generator:
    """Random numbers keyed by what they are for, never by process or clock."""
    return torch.Generator(place.device).manual_seed(seed64(*key))


class Window:
    """Sums since the last log line, kept on the device: loss and count by noise quarter, gradient norm.

    `bad` becomes 1 at the first step whose gradient is not finite, `bad_step` is its number."""
    def __init__(self, device: torch.device) -> None:
        self.loss, self.count = torch.zeros(QUARTERS, device=device), torch.zeros(QUARTERS, device=device)
        self.norm, self.bad = torch.zeros((), device=device), torch.zeros((), device=device)
        self.bad_step = torch.full((), -1.0, device=device)

    def reset(self) -> None:
        for t in (self.loss, self.count, self.norm):
            t.zero_()

    def add(self, loss: Tensor, i: Tensor, T: int) -> None:
        """Losses (B,) of pictures at noise indices i (B,)."""
        quarter = i * QUARTERS // T
        self.loss.index_add_(0, quarter, loss.detach())
        self.count.index_add_(0, quarter, torch.ones_like(loss))

    def add_norm(self, norm: Tensor, step: int) -> None:
        """Norm of the whole gradient of a step; nothing is read, so the device is not waited for."""
        self.norm += norm
        bad = 1 - torch.isfinite(norm).float()
        self.bad_step.copy_(torch.where(bad > self.bad, float(step), self.bad_step))
        self.bad.copy_(torch.maximum(self.bad, bad))


# ---------------------------------------------------------------- now and then

def state(net: nn.Module, ema: PowerEMA, opt: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that the run goes on from, by name."""
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.net.state_dict().items()}
    for (name, p) in net.named_parameters():
        tensors |= {f"opt.{name}.{k}": v for k, v in opt.state[p].items()}
    return {k: v.detach().contiguous() for k, v in tensors.items()}


def restore(tensors: dict[str, Tensor], net: nn.Module, ema: PowerEMA, opt: torch.optim.Optimizer) -> None:
    """Put the tensors of `state` back."""
    checkpoint.load_strictly(net, {k[4:]: v for k, v in tensors.items() if k.startswith("net.")}, "the checkpoint")
    checkpoint.load_strictly(ema.net, {k[4:]: v for k, v in tensors.items() if k.startswith("ema.")}, "the checkpoint")
    for name, p in net.named_parameters():
        prefix = f"opt.{name}."
        opt.state[p] = {k[len(prefix):]: v.clone() for k, v in tensors.items() if k.startswith(prefix)}


def rewind_log(path: Path, step: int) -> None:
    """Drop the lines of log.jsonl that are newer than the checkpoint, so that a resumed log has each step once."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        checkpoint.write_text(path, "".join(line + "\n" for line in lines))


def write_status(out: Path, state: str, code: int, step: int, reason: str = "") -> None:
    """status.json, for supervisors: torchrun turns every exit code into 1."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    checkpoint.write_text(out / "status.json", json.dumps(
        {"state": state, "exit_code": code, "step": step, "reason": reason, "utc": now}))


def header(cfg: Config, source: data.Source, step: int) -> dict[str, str]:
    """What sample.py needs beside the weights: config, class names, null class, the distribution of the controls."""
    out = {"config": to_json(cfg), "step": str(step), "classes": json.dumps(source.classes),
           "null_class": str(len(source.classes))}
    if controls := model.control_names(cfg.model):
        batch = data.records(source, list(range(CONTROL_ROWS)), [0] * CONTROL_ROWS)
        out["controls"] = json.dumps({k: batch[k].tolist() for k in controls})
    return out


@torch.no_grad()
def magnitudes(net: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """Root mean square of what every block puts out while `run` calls the network."""
    found: dict[str, float] = {}
    def note(name: str) -> Callable:
        return lambda module, args, out: found.update({name: out[0].float().square().mean().sqrt().item()})
    hooks = [block.register_forward_hook(note(f"block {k}")) for k, block in enumerate(net.blocks)]
    run()
    for hook in hooks:
        hook.remove()
    return found


def measure(window: Window, opt: torch.optim.Optimizer, place: machine.Place, steps: int, stop: Stop) -> dict:
    """One reading of the window, agreed between all processes; the only place where the loop waits for the device."""
    asked = torch.tensor([float(stop.signal)], device=place.device)
    shared = machine.add_up(torch.cat([window.loss, window.count, asked]), place).tolist()
    sums, counts = shared[:QUARTERS], shared[QUARTERS:-1]
    return {"loss": sum(sums) / sum(counts), "loss_by_noise": [s / n if n else None for s, n in zip(sums, counts)],
            "grad_norm": window.norm.item() / steps, "lr": opt.param_groups[0]["lr"], "stop": shared[-1] > 0}


def speeds(seconds: float, steps: int, waited: float, cfg: Config, peak: float, left: int, place: machine.Place) -> dict:
    """How fast the last `steps` steps were: images/s, FLOP/s and their share of the matmul peak, memory, time to go."""
    rate = cfg.batch * steps / seconds
    achieved = rate * 3 * model.flops(cfg.model)
    return {"images_per_second": rate, "tflops": achieved / 1e12, "share_of_peak": achieved / peak,
            "waited_for_data": waited / seconds, "memory_gb": machine.memory(place.device), "eta_s": left * seconds / steps}


def append(path: Path, line: dict) -> None:
    """One more line of log.jsonl, numbers to six digits."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(json.loads(json.dumps(line), parse_float=lambda s: float(f"{float(s):.6g}"))) + "\n")


def announce(cfg: Config, net: nn.Module, source: data.Source, place: machine.Place, dtype: torch.dtype, peak: float) -> None:
    """The resolved config and how the work is split, once, before the first step; config.json."""
    checkpoint.write_text(Path(cfg.out) / "config.json", to_json(cfg))
    checkpoint.say("\n".join(f"{key} = {value!r}" for key, _, value, _ in fields(cfg)))
    count, n = sum(p.numel() for p in net.parameters()), cfg.batch // cfg.micro
    checkpoint.say(f"{count:,} parameters; {place.world} x {place.device} in {str(dtype)[6:]}, {peak / 1e12:.2f} TFLOP/s matmul peak; "
                   f"batch {cfg.batch} = {n} x {cfg.micro}, {n // place.world} each; {len(source):,} images of {cfg.data}")


def preview(net: nn.Module, cfg: Config, batch: data.Batch, place: machine.Place, path: Path) -> None:
    """Draw the same pictures as at every other time with the averaged network, into one PNG."""
    options = sample.Options(steps=PREVIEW_STEPS, seed=cfg.seed)
    cond = from_batch(batch, cfg.model.semantics, model.control_names(cfg.model))
    images = sample.draw(net, cfg, cond, list(range(PREVIEWS)), options, place.device)
    path.parent.mkdir(exist_ok=True)
    data.grid(images.float().cpu(), 4, data.titles(batch)).save(path)


def fail_nonfinite(step: int, found: dict[str, float], cfg: Config, source: data.Source) -> None:
    """Nonfinite, with the step, the samples that it saw, and the magnitude of every block's output at that step."""
    at = data.positions(step, 0, cfg.batch, cfg.batch)
    indices = data.index_and_epoch(at, len(source), cfg.seed)[0].tolist()
    raise Nonfinite(f"loss or gradient is not finite at step {step + 1:,}; the last checkpoint is kept. Samples: {indices}. "
                    f"Magnitudes: {', '.join(f'{k} {v:.3g}' for k, v in found.items())}. A lower --lr may help")


def resume(cfg: Config, out: Path, place: machine.Place, source: data.Source, parts: tuple) -> int:
    """The step to go on from: that of the newest good checkpoint, with its tensors put back, or 0. Processes agree on it."""
    found = checkpoint.newest(out) if place.rank == 0 else None
    step = int(machine.agree(found[0] if found else -1, place))
    if step < 0:
        return 0
    meta = json.loads((checkpoint.folder(out, step) / "meta.json").read_text())
    check_resume(cfg, meta, source.fingerprint, out)
    restore(checkpoint.read_state(out, step, place.device), *parts)
    if place.rank == 0:
        rewind_log(out / "log.jsonl", step)
        checkpoint.say(f"resuming {out} from step {step:,} on {place.world} processes (was {meta['world']}).")
    return step


def main(argv: list[str]) -> None:
    cfg = read_config(argv)
    place = machine.setup(cfg.threads)
    source, encoder = data.open_source(cfg), data.text_encoder(cfg)
    cfg = complete(cfg, source, encoder)
    check(cfg, place.world)
    dtype, out, chief = machine.precision(place.device, cfg.dtype), Path(cfg.out), place.rank == 0
    alpha_bar = SCHEDULES[cfg.schedule](cfg.model.noise_steps).float().to(place.device)
    controls, semantics = model.control_names(cfg.model), cfg.model.semantics

    # net: the weights; ema.net: their average; ddp: what is called. The order of these lines keeps every name in a
    # checkpoint free of prefixes: net, average, optimizer, resume, compile, parallel.
    torch.manual_seed(seed64(cfg.seed, "weights"))
    net = model.build(cfg.model).to(place.device)
    net.dtype = dtype
    ema = PowerEMA(net, cfg.ema)
    opt = torch.optim.AdamW(net.parameters(), cfg.lr, (cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay, fused=True)
    window, stop = Window(place.device), Stop()
    opt.found_inf, opt.grad_scale = window.bad, None        # a fused step does nothing where found_inf is 1
    checkpoint.lock(out, chief)
    start = resume(cfg, out, place, source, (net, ema, opt))
    if cfg.compile == "on" or cfg.compile == "auto" and place.device.type == "cuda":
        for block in net.blocks:
            block.compile(fullgraph=True)
    ddp = machine.parallel(net, place)

    def inputs(batch: data.Batch, step: int, m: int) -> tuple[Tensor, Condition, torch.Generator]:
        cond = from_batch(batch, semantics, controls).to(place.device)
        return batch["image"].to(place.device, non_blocking=True), cond, generator(place, cfg.seed, "noise", step, m)

    n, rounds = cfg.batch // cfg.micro, cfg.batch // cfg.micro // place.world
    fetch = partial(data.fetch, source, encoder, cfg.seed, cfg.batch, cfg.micro)
    keys = ((step, m) for step in range(start, cfg.steps) for m in range(place.rank, n, place.world))
    batches = data.prefetch(fetch, keys, cfg.workers)
    shown = data.fetch(source, encoder, cfg.seed, PREVIEWS, PREVIEWS, 0, 0) if chief else {}
    peak = machine.matmul_peak(place.device, dtype) * place.world
    meta = {"config": dataclasses.asdict(cfg), "data": source.fingerprint, "world": place.world,
            "threads": torch.get_num_threads(), "torch": torch.__version__}
    if chief:
        announce(cfg, net, source, place, dtype, peak)
        write_status(out, "running", 0, start)
    bar = tqdm(total=cfg.steps, initial=start, disable=not chief, unit="step", dynamic_ncols=True)
    begun, since, waited = time.monotonic(), start, 0.0

    for step in range(start, cfg.steps + 1):
        last, stopping, due = step == cfg.steps, False, step > start
        if due and (step % cfg.log_every == 0 or step % cfg.save_every == 0 or last):
            line, seconds = measure(window, opt, place, step - since, stop), time.monotonic() - begun
            if window.bad.item():                           # no update since, so the weights are those of that step
                bad = int(window.bad_step.item())
                replay = partial(denoising_loss, net, *inputs(fetch(bad, place.rank), bad, place.rank), alpha_bar, cfg)
                fail_nonfinite(bad, magnitudes(net, replay), cfg, source)
            stopping = line.pop("stop")
            line |= speeds(seconds, step - since, waited, cfg, peak, cfg.steps - step, place)
            if chief:
                append(out / "log.jsonl", {"step": step, **line})
                bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['images_per_second']:.0f} images/s")
            window.reset()
            begun, since, waited = time.monotonic(), step, 0.0
        if chief and due and (step % cfg.save_every == 0 or last or stopping):
            if checkpoint.save(out, step, state(net, ema, opt), meta):
                checkpoint.write_weights(out / "weights.safetensors", ema.net.state_dict(), header(cfg, source, step))
        if chief and due and cfg.sample_every and (step % cfg.sample_every == 0 or last):
            preview(ema.net, cfg, shown, place, out / "samples" / f"step-{step:08d}.png")
        if stopping and not last:
            raise Stopped(stop.signal, step)
        if last:
            break
        # ---------------------------------------------------------------- one training step
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, cfg)
        for r in range(rounds):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            ddp.require_backward_grad_sync = r == rounds - 1
            loss, i = denoising_loss(ddp, *inputs(batch, step, place.rank + r * place.world), alpha_bar, cfg)
            (loss.mean() / rounds).backward()
            window.add(loss, i, len(alpha_bar))
        window.add_norm(torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip or math.inf, foreach=True), step)
        opt.step()
        opt.zero_grad(set_to_none=True)
        ema.update(net, step + 1)
        bar.update()
    bar.close()
    if chief:
        write_status(out, "done", 0, cfg.steps)


def run(argv: list[str]) -> int:
    """main, with expected endings turned into one line and an exit code: 2 user, 3 not finite, 143 and 130 signal."""
    try:
        main(argv)
        return 0
    except UserError as e:
        ending = ("failed:user", 2, f"error: {e}.")
    except Nonfinite as e:
        ending = ("failed:nonfinite", 3, f"error: {e}.")
    except Stopped as e:
        name = signal.Signals(e.signal).name
        ending = ("stopped", 128 + e.signal, f"stopped by {name} at step {e.step:,}; checkpoint saved; the same command goes on.")
    if int(os.environ.get("RANK", 0)) == 0:
        checkpoint.say(ending[2])
    return ending[1]


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
