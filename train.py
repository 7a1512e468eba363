"""Train a denoiser.

python train.py --config=configs/shapes.py                          one process, same code path as
torchrun --nproc_per_node=8 train.py --config=configs/shapes.py [--lr=3e-4 --model.depth=12]

The same command again resumes. Output: <out>/config.json, log.jsonl, status.json, loss.png, samples/*.png, step-*/,
weights.safetensors. Exit codes: 0 done; 1 crash, try again; 2 something for you to change; 3 not finite; 130, 143
stopped by SIGINT, SIGTERM, and saved.
Dimensions: B batch, C channels, R resolution, T noise steps.
"""
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import data
import ema
import log
import machine
import magnitudes
import model
import skipped
from conditioning import Condition, from_batch, pad_text
from config import Config, UserError, fields, to_json
from log import Window
from optim import keep_rows, learning_rate, optimizer, renormalize_, set_rates, tangent_
from plot import plot
from preflight import TRY, Nonfinite, check, check_resume, check_retry, complete, read_config
from rng import seed64
from schedule import add_noise, alpha_bar_table, loss_weights
from show import Show, about_weights
from transfer import start_from

NAMED = 16                              # samples that an error names


class Stopped(Exception):
    """A signal asked the run to stop: the signal, and what became of it."""


# ---------------------------------------------------------------- one step

def denoising_loss(net: nn.Module, x0: Tensor, cond: Condition, g: torch.Generator, alpha_bar: Tensor,
                   cfg: Config) -> tuple[Tensor, Tensor]:
    """[DDPM] eq. 14: |eps_hat(x_t, i, cond) - eps|^2 with i uniform, of every picture, and i. (B,), (B,)

    Equal to the denoising error |x0_hat - x0|^2 weighted by 1/sigma^2 ([COND] app. A). For guidance a share cfg.drop
    has neither semantics nor controls, a share cfg.drop_controls no controls ([COND] sec. 2.4). All draws are g's."""
    B = len(x0)
    i = torch.randint(len(alpha_bar), (B,), generator=g, device=x0.device)
    eps = torch.randn(x0.shape, generator=g, device=x0.device)
    u = torch.rand(B, generator=g, device=x0.device)
    x_t = add_noise(x0, eps, alpha_bar[i])
    eps_hat = net(x_t, i.float(), cond.drop(semantics=u < cfg.drop, controls=u < cfg.drop + cfg.drop_controls))
    return (eps_hat - eps).square().flatten(1).mean(1), i


# ---------------------------------------------------------------- now and then

def state(net: nn.Module, kept: dict[float, ema.PowerEMA], opt: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that the run goes on from, by name; the run's own average, the first of `kept`, is "ema"."""
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    for n, (std, average) in enumerate(kept.items()):
        tensors |= {f"ema{std if n else ''}.{k}": v for k, v in average.net.state_dict().items()}
    return tensors | {f"opt.{name}.{k}": v for name, p in net.named_parameters() for k, v in opt.state[p].items()}


def announce(cfg: Config, net: nn.Module, source: data.Source, place: machine.Place, peak: float) -> None:
    """The resolved config and how the work is split, once, before the first step."""
    checkpoint.say("\n".join(f"{key} = {value!r}" for key, _, value, _ in fields(cfg)))
    count, n = sum(p.numel() for p in net.parameters()), cfg.batch // cfg.micro
    checkpoint.say(f"{count:,} parameters; {place.world} x {place.device} in {str(net.dtype)[6:]}, {peak / 1e12:.2f} "
                   f"TFLOP/s matmul peak; batch {cfg.batch} = {n} x {cfg.micro}, {n // place.world} each; "
                   f"{len(source):,} images of {cfg.data}")


@torch.no_grad()
def diagnose(net: nn.Module, fetch: Callable, inputs: Callable, alpha_bar: Tensor, cfg: Config, step: int) -> str:
    """What was not finite at `step`, found by doing it again: no update has touched the weights since.

    Names the samples with a bad loss in the first microbatch that has any, and each block's root mean square on it."""
    found: dict[str, Tensor] = {}
    def note(k: int, module: nn.Module, args: tuple, out: tuple) -> None:
        found[f"block {k}"] = out[0].float().square().mean().sqrt()
    hooks = [block.register_forward_hook(partial(note, k)) for k, block in enumerate(net.blocks)]
    with torch.compiler.set_stance("force_eager"):          # a compiled block calls no hooks
        for m in range(cfg.batch // cfg.micro):
            batch = fetch(step, m)
            loss, _ = denoising_loss(net, *inputs(batch, step, m), alpha_bar, cfg)
            bad = batch["index"][~loss.isfinite().cpu()].tolist()
            if bad:
                break
    for hook in hooks:
        hook.remove()
    what = f"the loss of samples {bad[:NAMED]}" if bad else "the gradient, though no loss,"
    return (f"{what} is not finite at step {step + 1:,}; magnitudes: "
            f"{', '.join(f'{k} {v:.3g}' for k, v in found.items())}. The last checkpoint is kept; {TRY}")


def look(net: nn.Module, fetch: Callable, inputs: Callable, alpha_bar: Tensor, cfg: Config, since: int,
         step: int) -> dict:
    """Magnitudes for a line of the log: at the first one after every cfg.magnitudes_every steps, else {}."""
    if not cfg.magnitudes_every or step // cfg.magnitudes_every == since // cfg.magnitudes_every:
        return {}
    batch = inputs(fetch(step - 1, 0), step - 1, 0)
    return magnitudes.measure(net, partial(denoising_loss, net, *batch, alpha_bar, cfg))


def fit_to_save(net: nn.Module, tensors: dict[str, Tensor], step: int, place: machine.Place) -> None:
    """RuntimeError if weights differ between processes, Nonfinite if anything of the state is not finite."""
    if machine.replicas_differ(net, place):
        raise RuntimeError(f"weights differ between processes at step {step:,}; nothing was saved")
    if broken := checkpoint.not_finite(tensors):
        raise Nonfinite(f"{', '.join(broken[:NAMED])} are not finite at step {step:,}; nothing was saved")


def begin(cfg: Config, place: machine.Place, source: data.Source, tensors: dict[str, Tensor], held: ExitStack,
          status: log.Status) -> int:
    """The step to go on from: that of the newest good checkpoint, whose tensors are put back, or 0.

    Rank 0 locks the folder and decides for all. UserError or Nonfinite, on all, for a run that is not to go on."""
    out, step, refused = Path(cfg.out), 0, None
    if place.rank == 0:
        try:
            held.enter_context(checkpoint.lock(out))
            check_retry(cfg, out)
            status.out = out
            if meta := checkpoint.newest(out):
                check_resume(cfg, meta, source.fingerprint, out)
                step = meta["step"]
                checkpoint.prune(out, step)                 # the kill may have come before that
                checkpoint.say(f"resuming {out} from step {step:,} on {place.world} processes (was {meta['world']}).")
            checkpoint.need_space(out, tensors)
            log.rewind(out, step)
            ema.rewind(out, step)
            checkpoint.write_text(out / "config.json", to_json(cfg))
        except (UserError, Nonfinite) as e:
            refused = e
        except OSError as e:
            refused = UserError(f"cannot write to {out}: {e.strerror or e}")
    step = machine.agree(-1 if refused else step, place)
    if step < 0:
        raise refused or UserError("rank 0 does not start; its message says why")
    if step:
        checkpoint.read_state(checkpoint.folder(out, step), tensors)
    status.out, status.step = out, step
    return step


def main(argv: list[str], held: ExitStack, status: log.Status) -> None:
    cfg = read_config(argv)
    check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    place = machine.setup(cfg.threads)
    source = data.open_source(cfg)
    encoder = data.text_encoder(cfg, source.encoder, place.device)
    cfg = complete(cfg, source, encoder)
    out, user_file, chief = Path(cfg.out), Path(cfg.out) / "weights.safetensors", place.rank == 0
    m = cfg.model
    alpha_bar = alpha_bar_table(m.schedule, m.noise_steps, m.rescale).float().to(place.device)
    weight = loss_weights(alpha_bar, cfg.noise_weight)
    controls, semantics = model.control_names(m), m.semantics
    stop, window = held.enter_context(machine.Stop(loud=chief)), Window(place.device)

    # net: the weights; average: their average; ddp: what is called. The order of these lines keeps every name in a
    # checkpoint free of prefixes: net, average, optimizer, resume, compile, parallel.
    torch.manual_seed(seed64(cfg.seed, "weights"))
    net = model.build(cfg.model).to(place.device)
    net.dtype = machine.precision(place.device, cfg.dtype)
    if cfg.init and not any(out.glob("step-*")):            # a run that goes on has weights of its own
        report = start_from(cfg.init, net, cfg, source)
        if chief:
            checkpoint.say(report)
    kept = ema.averages(net, cfg.ema, cfg.snapshots)
    average, rows = kept[cfg.ema].net, keep_rows(net, cfg)
    opt = optimizer(net, cfg, window)
    tensors = state(net, kept, opt)
    start = saved = begin(cfg, place, source, tensors, held, status)
    skipped.follow(source, out)
    if cfg.compile == "on" or cfg.compile == "auto" and place.device.type == "cuda":
        for block in net.blocks:
            block.compile(fullgraph=True)
    ddp = machine.parallel(net, place)

    def fetch(step: int, m: int) -> data.Batch:
        return machine.pinned(data.fetch(source, encoder, cfg.seed, cfg.batch, cfg.micro, step, m), place)

    def inputs(batch: data.Batch, step: int, m: int) -> tuple[Tensor, Condition, torch.Generator]:
        g = torch.Generator(place.device).manual_seed(seed64(cfg.seed, "noise", step, m))
        cond = from_batch(batch, semantics, controls).to(place.device)
        if cond.text is not None:
            lengths = batch["lengths"].to(place.device, non_blocking=True)
            cond = dataclasses.replace(cond, text=pad_text(cond.text, lengths, cfg.padding, cfg.padding_noise, g))
        return batch["image"].to(place.device, non_blocking=True), cond, g

    n, rounds = cfg.batch // cfg.micro, cfg.batch // cfg.micro // place.world
    keys = ((step, m) for step in range(start, cfg.steps) for m in range(place.rank, n, place.world))
    batches = held.enter_context(closing(data.prefetch(fetch, keys, cfg.workers)))
    peak = machine.matmul_peak(place.device, net.dtype) * place.world
    meta = {"config": dataclasses.asdict(cfg), "data": source.fingerprint, "world": place.world,
            "threads": torch.get_num_threads(), **machine.versions()}
    about = about_weights(cfg, source)
    show = Show(cfg, source, encoder, about, place)
    if chief:
        announce(cfg, net, source, place, peak)
        status.write("running")
    quiet, since, begun = not chief or not sys.stderr.isatty(), start, time.monotonic()
    bar = held.enter_context(tqdm(total=cfg.steps, initial=start, disable=quiet, unit="step", dynamic_ncols=True))

    for step in range(start, cfg.steps + 1):
        last, asked = step == cfg.steps, 0
        saving = step > start and (step % cfg.save_every == 0 or last)
        if step > start and (step % cfg.log_every == 0 or saving):
            line, asked, bad = window.read(step - since, stop, place)
            if bad >= 0:
                status.step = bad + 1
                raise Nonfinite(diagnose(net, fetch, inputs, alpha_bar, cfg, bad))
            line |= {"lr": opt.param_groups[0]["lr"]}
            line |= log.speeds(step - since, time.monotonic() - begun, waited, cfg.steps - step, cfg, peak, place)
            if chief:
                line |= look(net, fetch, inputs, alpha_bar, cfg, since, step)
                log.report(out, {"step": step, **line}, cfg.steps, bar)
            status.step = since = step
        if saving or asked:
            fit_to_save(net, tensors, step, place)
            if chief and checkpoint.save(out, step, tensors, meta):
                saved = step
        if chief and saved == step > 0:                     # on resuming too: the kill may have come just before this
            with checkpoint.tolerate("weights.safetensors"):
                checkpoint.write_weights(user_file, average.state_dict(), {**about, "step": str(step)})
        if step > 0:
            before = time.monotonic()
            show(average, step)
            begun += time.monotonic() - before              # is not training
        if chief and step > 0 and ema.due(step, cfg.steps, cfg.snapshots):
            ema.take_snapshot(out, step, kept, about)
        if asked or last:
            stop.deaf = True                                # torchrun signals the others as soon as the first has left
            saved = machine.agree(saved, place)             # wait until rank 0 has written
        if last:
            break
        if asked:
            raise Stopped(asked, f"at step {step:,}; checkpoint saved at step {saved:,}; the same command goes on")
        if since == step:
            begun, waited = time.monotonic(), 0.0
        # ---------------------------------------------------------------- one training step
        set_rates(opt, learning_rate(step, cfg))
        for r in range(rounds):
            before = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - before
            ddp.require_backward_grad_sync = r == rounds - 1
            loss, i = denoising_loss(ddp, *inputs(batch, step, place.rank + r * place.world), alpha_bar, cfg)
            ((weight[i] * loss).mean() / rounds).backward()
            window.add(loss, i, len(alpha_bar))
        tangent_(rows)
        window.add_norm(torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip or math.inf, foreach=True), step)
        opt.step()
        renormalize_(rows, window.bad)
        opt.zero_grad(set_to_none=True)
        ema.update(kept, net, step + 1)
        bar.update()
    if chief and saved < cfg.steps:
        raise UserError(f"all {cfg.steps:,} steps are done but {out} does not take the last checkpoint; make room, and "
                        f"the same command goes on from step {saved:,}")
    if chief:
        status.write("done")
        checkpoint.say(f"done: {cfg.steps:,} steps in {out}; loss curve: {plot(out)}")


def run(argv: list[str]) -> int:
    """main, with every expected ending turned into status.json, one line and an exit code."""
    status, rank = log.Status(), int(os.environ.get("RANK", 0))
    with ExitStack() as held:
        try:
            main(argv, held, status)
            return 0
        except UserError as e:
            ending = ("failed:user", 2, f"error: {e}.")
        except torch.OutOfMemoryError as e:
            ending = ("failed:user", 2, f"error: a smaller --micro needs less memory: {str(e).splitlines()[0]}")
        except Nonfinite as e:
            ending = ("failed:nonfinite", 3, f"error: {e}.")
        except Stopped as e:
            ending = ("stopped", 128 + e.args[0], f"stopped by {signal.Signals(e.args[0]).name} {e.args[1]}.")
        except KeyboardInterrupt:
            ending = ("stopped", 130, "stopped by SIGINT before training began.")
        except Exception as e:
            status.write("failed:crash", 1, f"{type(e).__name__}: {e}")
            raise
        if rank == 0 or ending[0] == "failed:user":
            status.write(*ending)
    if rank == 0 or ending[0] == "failed:user" and (status.out or os.environ.get("LOCAL_RANK") == "0"):
        checkpoint.say(ending[2] if rank == 0 else f"rank {rank}: {ending[2]}")
    return ending[1]


if __name__ == "__main__":
    code = run(sys.argv[1:])
    if code in (0, 130, 143):                               # every process came to the same end
        machine.leave()
    sys.exit(code)
