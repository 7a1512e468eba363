"""Train a denoiser.

python train.py --config=configs/shapes.py                          one process, same code path as
torchrun --nproc_per_node=8 train.py --config=configs/shapes.py [--lr=3e-4 --model.depth=12]

Run the same command again to resume. Output: <out>/config.json, log.jsonl, status.json, loss.png, samples/*.png,
step-*/, weights.safetensors. Exit codes: 0 done; 1 crash, try again; 2 something for you to change; 3 not finite;
130, 143 stopped by SIGINT, SIGTERM, and saved.
Dimensions: B batch, C channels, R resolution, T noise steps.
"""
import json
import math
import os
import signal
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import config
import data
import ema
import latents
import model
import sample
from conditioning import PADDINGS, Condition, make_condition
from config import Config, UserError, check_fields, check_name, fields, read_config, to_json
from optim import learning_rate, normalized_rows, optimizer, project_grad_, renormalize_, set_lr
from rng import seed64
from runtime import checkpoint, distributed, log, magnitudes
from runtime.checkpoint import RETRY_HINT, Nonfinite, check_resume, check_retry
from runtime.log import LossWindow, RunLog, info
from runtime.plot import plot
from schedule import add_noise, alpha_bar_table, loss_weights
from sources import cached_latents
from text import make_encoder
from transfer import init_from

PREVIEWS, PREVIEW_STEPS = 16, 20        # images of a preview, and their sampling steps
CONTROL_ROWS = 1000                     # control values stored with the weights, for sampling from their distribution
READ = 50                               # images read at a time to find these


class Stopped(Exception):
    """A signal has stopped the run: its number, and what was saved."""


def check(cfg: Config, world: int) -> None:
    """UserError for a config that cannot run, before anything is opened or built."""
    check_fields(cfg, world)
    check_name("dtype", cfg.dtype, distributed.DTYPES)
    check_name("padding", cfg.padding, PADDINGS)
    from_data = ("classes", "text_dim", "text_length")
    model.check(replace(cfg.model, **{key: getattr(cfg.model, key) or 1 for key in from_data}))


def complete(cfg: Config, source: data.Source, encoder: data.TextEncoder | None) -> Config:
    """Fill in what only the data set knows: number of classes, shape of an encoded caption."""
    m = cfg.model
    if m.semantics == "class":
        if m.classes not in (0, len(source.classes)):
            raise UserError(f"{cfg.data} has {len(source.classes)} classes, but model.classes={m.classes}")
        m = replace(m, classes=len(source.classes))
    if m.semantics == "text":
        data.check_words(source, encoder, cfg)
        m = replace(m, text_dim=encoder.dim, text_length=encoder.length)
    model.check(m)
    return replace(cfg, model=m)


def start_or_resume(cfg: Config, dist: distributed.Dist, source: data.Source, tensors: dict[str, Tensor],
                    stack: ExitStack, status: log.Status) -> int:
    """Copy the newest good checkpoint into `tensors` and return its step, or 0. Rank 0 locks the folder and decides.

    UserError or Nonfinite on every rank if the run must not start."""
    out, step, error = Path(cfg.out), 0, None
    if dist.rank == 0:
        try:
            stack.enter_context(checkpoint.lock(out))
            check_retry(cfg, out)
            status.out = out
            if meta := checkpoint.latest(out):
                check_resume(cfg, meta, source.fingerprint, out)
                step = meta["step"]
                checkpoint.prune(out, step)                 # a kill may have come before that
                info(f"resuming {out} from step {step:,} on {dist.world} processes (was {meta['world']}).")
            checkpoint.need_space(out, tensors)
            log.drop_after(out, step)
            log.write_text(out / "config.json", to_json(cfg))
        except (UserError, Nonfinite) as e:
            error = e
        except OSError as e:
            error = UserError(f"cannot write to {out}: {e.strerror or e}")
    step = distributed.broadcast_from_rank0(-1 if error else step, dist)
    if step < 0:
        raise error or UserError("rank 0 cannot start; see its message")
    if step:
        checkpoint.read_state(checkpoint.folder(out, step), tensors)
    status.out, status.step = out, step
    return step


def state(net: nn.Module, emas: dict[float, ema.PowerEMA], opt: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a run's state by name; its own average, the first of `emas`, is "ema"."""
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    for n, (std, average) in enumerate(emas.items()):
        tensors |= {f"ema{std if n else ''}.{k}": v for k, v in average.net.state_dict().items()}
    return tensors | {f"opt.{name}.{k}": v for name, p in net.named_parameters() for k, v in opt.state[p].items()}


def weights_metadata(cfg: Config, source: data.Source) -> dict[str, str]:
    """The header of weights files: config, class names, null class, distribution of controls, scaling of latents."""
    about = {"config": to_json(cfg), "classes": json.dumps(source.classes), "null_class": str(len(source.classes)),
             "ema": f"{cfg.ema_std:g}"}
    if controls := model.control_names(cfg.model):
        rows = data.index_and_epoch(np.arange(min(CONTROL_ROWS, len(source))), len(source), cfg.seed)[0]
        parts = [data.records(source, part, [0] * len(part)) for part in np.array_split(rows, -(-len(rows) // READ))]
        about["controls"] = json.dumps({k: torch.cat([part[k] for part in parts]).tolist() for k in controls})
    if isinstance(source, data.Latents):
        about["latents"] = json.dumps(cached_latents.header(source.meta))
        about |= {"encoder": json.dumps(source.encoder)} if source.encoder else {}
    return about


def denoising_loss(net: nn.Module, x0: Tensor, cond: Condition, g: torch.Generator, alpha_bar: Tensor,
                   cfg: Config) -> tuple[Tensor, Tensor]:
    """[DDPM] eq. 14: |eps_hat(x_t, i, cond) - eps|^2 of every image with i uniform, and i. (B,), (B,)

    Equal to the denoising error |x0_hat - x0|^2 weighted by 1/sigma^2 ([COND] app. C). For guidance a share
    cond_dropout has neither semantics nor controls, a share control_dropout no controls ([COND] sec. 2.1)."""
    B = len(x0)
    i = torch.randint(len(alpha_bar), (B,), generator=g, device=x0.device)
    eps = torch.randn(x0.shape, generator=g, device=x0.device)
    u = torch.rand(B, generator=g, device=x0.device)
    x_t = add_noise(x0, eps, alpha_bar[i])
    bare = u < cfg.cond_dropout + cfg.control_dropout
    eps_hat = net(x_t, i.float(), cond.drop(semantics=u < cfg.cond_dropout, controls=bare))
    return (eps_hat - eps).square().flatten(1).mean(1), i


def inputs(batch: data.Batch, step: int, m: int, cfg: Config,
           device: torch.device) -> tuple[Tensor, Condition, torch.Generator]:
    """Images, their condition and the noise generator of microbatch m, on the device."""
    g = torch.Generator(device).manual_seed(seed64(cfg.seed, "noise", step, m))
    cond = make_condition(batch, cfg.model.semantics, model.control_names(cfg.model), cfg.padding, cfg.padding_noise, g,
                          device)
    return batch["image"].to(device, non_blocking=True), cond, g


class Previewer:
    """Previews by rank 0, and FID by all. Made before the first step, to notice a missing decoder or metric there."""
    def __init__(self, cfg: Config, source: data.Source, encoder: data.TextEncoder | None, about: dict[str, str],
                 dist: distributed.Dist) -> None:
        self.cfg, self.names, self.dist, self.monitor = cfg, source.classes, dist, None
        if cfg.sample_every and dist.rank == 0:
            self.decode = latents.decoder_of(about, "", cfg.model.channels, dist.device)[0]
            self.batch = data.load_microbatch(source, encoder, cfg.seed, PREVIEWS, PREVIEWS, 0, 0)
            if isinstance(source, data.Latents):
                latents.write_reconstruction(source, self.decode, dist.device, Path(cfg.out) / "samples/round-trip.png")
        if cfg.fid_every:
            import fid                                      # imports much that few runs need
            options = fid.Options(out=cfg.out, ref=cfg.fid_ref, n=cfg.fid_n, batch=cfg.microbatch)
            self.monitor = fid.Monitor(options, cfg, about, dist)
            measured = [line["step"] for line in log.read(Path(cfg.out)) if "evaluation_s" in line]     # if resumed
            self.measured = distributed.broadcast_from_rank0(max(measured, default=0), dist)

    def __call__(self, net: nn.Module, step: int) -> None:
        cfg, last = self.cfg, step == self.cfg.steps
        if self.dist.rank == 0 and cfg.sample_every and (step % cfg.sample_every == 0 or last):
            self.save_preview(net, Path(cfg.out) / f"samples/step-{step:08d}.png")
        if self.monitor and step > self.measured and (step % cfg.fid_every == 0 or last):
            self.monitor(net, step)

    def save_preview(self, net: nn.Module, path: Path) -> None:
        """Write one PNG of the same prompts and noise every time, unless it exists."""
        batch, cfg = self.batch, self.cfg
        if path.exists():
            return
        cond = make_condition(batch, cfg.model.semantics, model.control_names(cfg.model), cfg.padding,
                              cfg.padding_noise, sample.padding_generators(range(PREVIEWS), 0))
        options = sample.Options(steps=min(PREVIEW_STEPS, cfg.model.timesteps))
        images = sample.generate(net, cfg, cond, range(PREVIEWS), options, self.dist.device)
        page = data.grid(self.decode(images).cpu(), 4, data.titles(batch, self.names))
        with log.warn_on_disk_error(str(path)):
            path.parent.mkdir(exist_ok=True)
            with log.atomic_path(path) as temporary:
                page.save(temporary, "png")


def announce(cfg: Config, net: nn.Module, source: data.Source, dist: distributed.Dist, peak: float) -> None:
    """Print the config, the size of the model and how the processes share the work."""
    info("\n".join(f"{key} = {value!r}" for key, _, value, _ in fields(cfg)))
    count, n = sum(p.numel() for p in net.parameters()), cfg.batch // cfg.microbatch
    info(f"{count:,} parameters; {dist.world} x {dist.device} in {str(net.dtype)[6:]}, {peak / 1e12:.2f} TFLOP/s peak; "
         f"batch {cfg.batch} = {n} x {cfg.microbatch}, {n // dist.world} each; {len(source):,} images of {cfg.data}")


def main(argv: list[str], stack: ExitStack, status: log.Status) -> None:
    cfg = read_config(argv)
    check(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    dist = distributed.setup(cfg.threads)
    is_main, device, out = dist.rank == 0, dist.device, Path(cfg.out)
    source = data.open_source(cfg)
    encoder = make_encoder(cfg, source.encoder, device)
    cfg = complete(cfg, source, encoder)
    m = cfg.model
    alpha_bar = alpha_bar_table(m.schedule, m.timesteps, m.sigma_scale).float().to(device)
    weight = loss_weights(alpha_bar, cfg.loss_sigma_power)
    stop, window = stack.enter_context(distributed.Stop(verbose=is_main)), LossWindow(device)

    # The order of these lines keeps the names in a checkpoint free of prefixes: network, averages, optimizer, resume,
    # compile, DDP.
    torch.manual_seed(seed64(cfg.seed, "weights"))
    net = model.build(m).to(device)
    net.dtype = distributed.compute_dtype(device, cfg.dtype)
    if cfg.init_from and not any(out.glob("step-*")):       # a resumed run has weights of its own
        report = init_from(cfg.init_from, net, cfg, source)
        if is_main:
            info(report)
    emas = ema.make_emas(net, cfg.ema_std, cfg.ema_snapshots)
    average, rows = emas[cfg.ema_std].net, normalized_rows(net, cfg)
    opt = optimizer(net, cfg, window)
    tensors = state(net, emas, opt)
    start = start_or_resume(cfg, dist, source, tensors, stack, status)
    log.follow(source, out)
    if cfg.compile == "on" or cfg.compile == "auto" and device.type == "cuda":
        for block in net.blocks:
            block.compile(fullgraph=True)
    ddp = distributed.wrap_ddp(net, dist)

    def fetch(step: int, m: int) -> data.Batch:
        batch = data.load_microbatch(source, encoder, cfg.seed, cfg.batch, cfg.microbatch, step, m)
        return distributed.pin_memory(batch, dist)

    n, rounds = cfg.batch // cfg.microbatch, cfg.batch // cfg.microbatch // dist.world
    keys = ((step, m) for step in range(start, cfg.steps) for m in range(dist.rank, n, dist.world))
    batches = stack.enter_context(closing(data.prefetch(fetch, keys, cfg.workers)))
    peak = distributed.matmul_peak(device, net.dtype) * dist.world
    metadata = weights_metadata(cfg, source)
    meta = {"config": asdict(cfg), "data": source.fingerprint, "world": dist.world,
            "threads": torch.get_num_threads(), **distributed.versions()}
    checkpoints = checkpoint.Checkpointer(out, net, tensors, start, meta, dist)
    previews = Previewer(cfg, source, encoder, metadata, dist)
    if is_main:
        announce(cfg, net, source, dist, peak)
        status.write("running")
    flops = 3 * model.flops(m) if is_main else 0            # an image: a backward pass costs two forward passes
    run_log = RunLog(out, start, cfg, flops, peak, dist)
    stack.enter_context(run_log.bar)

    for step in range(start, cfg.steps + 1):
        last, stop_signal = step == cfg.steps, 0
        saving = step > start and (step % cfg.save_every == 0 or last)
        logging = saving or step > start and step % cfg.log_every == 0
        if logging:
            since = run_log.last
            line, stop_signal, bad = window.read(step - since, stop, dist)
            if bad >= 0:
                status.step = bad + 1
                raise Nonfinite(f"the gradient is not finite at step {bad + 1:,}; the last checkpoint is "
                                f"{f'of step {checkpoints.saved:,}' if checkpoints.saved else 'none'}; {RETRY_HINT}")
            line |= {"lr": opt.param_groups[0]["lr"], **run_log.throughput(step)}
            if is_main and cfg.magnitudes_every and step // cfg.magnitudes_every > since // cfg.magnitudes_every:
                batch = inputs(fetch(step - 1, 0), step - 1, 0, cfg, device)
                line |= magnitudes.measure(net, partial(denoising_loss, net, *batch, alpha_bar, cfg))
            run_log.report(step, line)
            status.step = step
        if saving or stop_signal:
            checkpoints.save(step)
        checkpoints.write_weights(step, average, metadata)
        if step > 0:
            with run_log.timed("aside"):
                previews(average, step)
        if is_main and step > 0 and ema.snapshot_due(step, cfg.steps, cfg.ema_snapshots):
            ema.take_snapshot(out, step, emas, metadata)
        if stop_signal or last:
            stop.ignore = True                              # torchrun signals the others as soon as the first has left
            saved = distributed.broadcast_from_rank0(checkpoints.saved, dist)  # wait until rank 0 has written
        if last:
            break
        if stop_signal:
            raise Stopped(stop_signal, f"at step {step:,}; saved at step {saved:,}; the same command resumes")
        if logging or step == start:
            run_log.restart_clock()
        # ---------------------------------------------------------------- one training step
        set_lr(opt, learning_rate(step, cfg))
        for r in range(rounds):
            with run_log.timed("data"):
                batch = next(batches)
            ddp.require_backward_grad_sync = r == rounds - 1
            k = dist.rank + r * dist.world
            loss, i = denoising_loss(ddp, *inputs(batch, step, k, cfg, device), alpha_bar, cfg)
            ((weight[i] * loss).mean() / rounds).backward()
            window.add(loss, i, len(alpha_bar))
        project_grad_(rows)
        window.add_norm(torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip or math.inf, foreach=True), step)
        opt.step()
        renormalize_(rows, window.bad)
        opt.zero_grad(set_to_none=True)
        ema.update(emas, net, step + 1)
        run_log.bar.update()
    if is_main:
        if saved < cfg.steps:
            raise UserError(f"all {cfg.steps:,} steps are done but the disk of {out} is too full for the last "
                            f"checkpoint; make room, and the same command resumes from step {saved:,}")
        status.write("done")
        info(f"done: {cfg.steps:,} steps in {out}; loss curve: {plot(out)}")


def run(argv: list[str]) -> int:
    """Call main; turn every expected end into status.json, one line and an exit code."""
    status, rank = log.Status(), int(os.environ.get("RANK", 0))
    with ExitStack() as stack:
        try:
            main(argv, stack, status)
            return 0
        except UserError as e:
            ending = ("failed:user", 2, f"error: {e}.")
        except torch.OutOfMemoryError as e:
            ending = ("failed:user", 2, f"error: a smaller --microbatch needs less memory: {str(e).splitlines()[0]}")
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
        info(ending[2] if rank == 0 else f"rank {rank}: {ending[2]}")
    return ending[1]


if __name__ == "__main__":
    config.run(run, cleanup=distributed.cleanup)
