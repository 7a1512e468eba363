"""How fast, and against what limit: forward pass, training step, one guided sampling step.

python bench.py --config=configs/shapes.py [--compile=on]            seconds, images/s, share of peak
python bench.py --size=DiT-S/2 --batch=8 --threads=1 --vs=diffusers   in turns with diffusers' DiT
python bench.py --size=DiT-S/2 --batch=8 --threads=1 --peer=PATH      in turns with the official code
python bench.py --config=configs/mp/shapes_e.py --threads=1 --vs=plain   what preserving magnitudes costs
python bench.py --data=PATH                                          how fast data comes: see bench_data.py
python bench.py --fid                                                how fast FID is: see fid_check.py

Data is synthetic and on the device; layers that start at zero are made random, since zeros multiply faster.
A training step is loss, backward pass, clipping, AdamW and the average of the weights, as in train.py.
Dimensions: B batch, C channels, R resolution, L context tokens, E width of a text token, T noise steps.
"""
import dataclasses
import importlib
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import data
import machine
import model
import optim
import train
from conditioning import CONTROLS, NULL_LABEL, Condition
from config import SIZES, Config, ModelConfig, UserError, help_text, parse
from ema import PowerEMA
from log import Window
from peers import LAM, LR, Inputs, Side, diffusers_side, official_side
from sample import ddim, guided
from schedule import alpha_bar_table

WARMUP = 2                              # untimed turns before the timed ones
PASSES = {"forward": 1, "train": 3, "sample": 2}    # FLOPs of each over those of one forward pass
CLASSES = 1000                          # of a --size, and of a model of classes that does not say how many
ALIKE = 1e-4                            # outputs count as equal up to this, over the largest output
AGREE = 0.15                            # CPU-time and wall-clock ratios that differ by more are not printed
GROUPS = 3                              # runs of turns whose best wall-clock ratios give the spread


@dataclass(frozen=True)
class Options:
    """What to time; the fields of Config and --config say what it is timed on."""
    what: str = "forward+train+sample"  # what is timed, joined with +
    size: str = ""                      # such as DiT-S/2, for 32 x 32 x 4 inputs; empty = the config's model
    batch: int = 0                      # images at a time; 0 = micro of the config
    rounds: int = 30                    # most timed turns of each, after the warm-up
    seconds: float = 20.0               # longest that one thing is timed for
    vs: str = ""                        # compare with diffusers' DiT; or with plain, the twin of an mp architecture
    peer: str = ""                      # compare with the official DiT code, the folder of its models.py


# ---------------------------------------------------------------- what is asked for

def read_options(argv: list[str]) -> tuple[Options, Config]:
    """The options of this file and, from the other flags, the config to time."""
    mine, others, names = [], [], [f.name for f in dataclasses.fields(Options)]
    words = iter(argv)
    for word in words:
        if word in ("-h", "--help"):
            print(f"{help_text(Options())}\n\n--config=FILE and, of Config:\n{help_text(Config())}")
            sys.exit(0)
        key, equals, _ = word.removeprefix("--").partition("=")
        if key in names:
            mine += [word] if equals else [word, *islice(words, 1)]
        else:
            others.append(word)
    o, cfg = parse(mine, Options()), train.read_config(others)
    return check(o, dataclasses.replace(cfg, model=complete(o, cfg)))


def complete(o: Options, cfg: Config) -> ModelConfig:
    """The config's model or the one that --size names, with what else the data set would say filled in."""
    m = cfg.model
    if o.size:
        found = re.fullmatch(r"(\w+)-(\w+)/(\d+)", o.size)
        archs = {name.lower(): name for name in model.ARCHS}
        if not found or found[1].lower() not in archs or found[2] not in SIZES:
            raise UserError(f"unknown size={o.size!r}; it is ARCH-SIZE/PATCH, such as DiT-S/2: ARCH one of "
                            f"{', '.join(archs)}, SIZE one of {', '.join(SIZES)}")
        m = ModelConfig(arch=archs[found[1].lower()], semantics="class", classes=CLASSES, resolution=32,
                        channels=4, patch=int(found[3]), **SIZES[found[2]])
    if m.semantics == "class":
        m = dataclasses.replace(m, classes=m.classes or CLASSES)
    if m.semantics == "text" and not (m.text_dim and m.text_length):
        encoder = data.text_encoder(cfg)
        m = dataclasses.replace(m, text_dim=encoder.dim, text_length=encoder.length)
    return m


def check(o: Options, cfg: Config) -> tuple[Options, Config]:
    """The same with batch filled in; UserError for options that cannot be timed, before anything is built."""
    o = dataclasses.replace(o, batch=o.batch or cfg.micro)
    if o.batch < 1 or o.rounds < GROUPS or not o.seconds > 0:
        raise UserError(f"batch={o.batch} must be at least 1, rounds={o.rounds} at least {GROUPS}, and "
                        f"seconds={o.seconds} positive")
    if unknown := [w for w in o.what.split("+") if w not in PASSES]:
        raise UserError(f"what={o.what!r} names {unknown[0]!r}; there are {', '.join(PASSES)}, joined with +")
    if o.vs not in ("", "diffusers", "plain") or o.vs and o.peer:
        raise UserError(f"vs={o.vs!r}, peer={o.peer!r}: vs can be diffusers or plain, and only one can be given")
    m = cfg.model
    if o.vs == "plain" and not m.arch.startswith("mp"):
        raise UserError(f"--vs=plain compares an mp architecture with its twin, got model.arch={m.arch!r}")
    if (o.vs == "diffusers" or o.peer) and (m.arch, m.semantics, m.controls) != ("dit", "class", ""):
        raise UserError("--vs=diffusers and --peer compare a DiT of classes without controls (--size=DiT-S/2), got "
                        f"model.arch={m.arch!r}, semantics={m.semantics!r}, controls={m.controls!r}")
    train.check(cfg, world=1)
    return o, cfg


# ---------------------------------------------------------------- ours

def make_inputs(cfg: Config, B: int, device: torch.device) -> Inputs:
    """Normal images, uniform noise indices and classes, normal text tokens, controls of a plausible range."""
    m, g = cfg.model, torch.Generator(device).manual_seed(cfg.seed)
    normal = lambda *shape: torch.randn(shape, generator=g, device=device)
    whole = lambda high: torch.randint(high, (B,), generator=g, device=device)
    controls = {c: normal(B, row.width).abs().squeeze(1) for c, row in CONTROLS.items() if c in model.control_names(m)}
    cond = Condition(label=whole(m.classes) if m.semantics == "class" else None,
                     text=normal(B, m.text_length, m.text_dim) if m.semantics == "text" else None,
                     steered=torch.ones(B, device=device) if controls else None, **controls)
    alpha_bar = alpha_bar_table(m.schedule, m.noise_steps, m.rescale).float().to(device)
    return Inputs(normal(B, m.channels, m.resolution, m.resolution), whole(m.noise_steps).float(), cond, alpha_bar)


def randomize(net: nn.Module) -> None:
    """Draw the layers that start at zero, so that nothing is multiplied by zero and every weight is felt."""
    for layer in model.zero_layers(net):
        for p in layer.parameters():
            nn.init.normal_(p, std=0.02)


def ours(cfg: Config, s: Inputs, asked: str, compiled: bool) -> Side:
    """This library as train.py and sample.py run it, tokens in the type that `asked` names."""
    device = s.x.device
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("highest")
    net = model.build(cfg.model).to(device)
    randomize(net)
    net.dtype = machine.precision(device, asked)
    if compiled:
        for block in net.blocks:
            block.compile(fullgraph=True)
    ema, window, denoise = PowerEMA(net, cfg.ema), Window(device), guided(net, s.cond, LAM)
    rows = optim.keep_rows(net, cfg)
    opt = optim.optimizer(net, dataclasses.replace(cfg, lr=LR), window)

    def train_step() -> None:
        g = torch.Generator(device).manual_seed(cfg.seed)
        loss, i = train.denoising_loss(net, s.x, s.cond, g, s.alpha_bar, cfg)
        loss.mean().backward()
        window.add(loss, i, len(s.alpha_bar))
        optim.tangent_(rows)
        window.add_norm(nn.utils.clip_grad_norm_(net.parameters(), cfg.clip or math.inf, foreach=True), 0)
        opt.step()
        optim.renormalize_(rows, window.bad)
        opt.zero_grad(set_to_none=True)
        ema.update(net, 2)

    steps = {"forward": lambda: net(s.x, s.i, s.cond), "sample": lambda: ddim(denoise, s.x, s.alpha_bar, 1)}
    steps = {k: torch.inference_mode()(f) for k, f in steps.items()} | {"train": train_step}
    return Side("ours", net, steps, torch.get_float32_matmul_precision())


def assert_alike(a: Side, b: Side) -> None:
    """UserError unless both give the same eps and the same picture after a guided step."""
    for what in ("forward", "sample"):
        y, z = (side.steps[what]() for side in (a, b) if side.net.eval())
        worst = ((y - z).abs().max() / y.abs().max()).item()
        if not worst <= ALIKE:
            raise UserError(f"{a.name} and {b.name} differ in {what} by {worst:.2g} of the largest output, "
                            f"more than {ALIKE}")


# ---------------------------------------------------------------- timing

def turn(side: Side, what: str, device: torch.device) -> tuple[float, float]:
    """Seconds of one step: CPU time of this process (on an accelerator wall clock), and wall clock."""
    torch.set_float32_matmul_precision(side.matmul)
    machine.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    side.steps[what]()
    machine.synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return (cpu if device.type == "cpu" else wall), wall


def alternate(sides: list[Side], what: str, o: Options, device: torch.device) -> list[list]:
    """Steps of every side in turns, A B A B, at least GROUPS of each: [k][side] is (work, wall clock)."""
    for side in sides:
        side.net.train(what == "train")
        for _ in range(WARMUP):
            turn(side, what, device)
    turns, end = [], time.perf_counter() + o.seconds
    while len(turns) < GROUPS or len(turns) < o.rounds and time.perf_counter() < end:
        turns.append([turn(side, what, device) for side in sides])
    return turns


def measure(side: Side, what: str, o: Options, cfg: Config, device: torch.device, peak: float) -> dict:
    """One row: median seconds a step and quartiles, images/s, FLOP/s, their share of `peak`, memory in GB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    walls = [wall for ((_, wall),) in alternate([side], what, o, device)]
    low, middle, high = statistics.quantiles(walls, n=4, method="inclusive")
    rate = o.batch * PASSES[what] * model.flops(cfg.model) / middle
    return {"seconds": middle, "low": low, "high": high, "images": o.batch / middle, "tflops": rate / 1e12,
            "share": rate / peak, "memory": machine.memory(device)}


def compare(a: Side, b: Side, what: str, o: Options, device: torch.device) -> dict[str, float]:
    """One row: how many times as fast a is as b, by CPU time a turn and by best wall clock, with spreads.

    UserError when the two disagree: then something else on the machine was timed as well."""
    turns = alternate([a, b], what, o, device)
    low, cpu, high = statistics.quantiles([y / x for (x, _), (y, _) in turns], n=4, method="inclusive")
    best = lambda rows: min(y for _, (_, y) in rows) / min(x for (_, x), _ in rows)
    wall, walls = best(turns), [best(turns[k::GROUPS]) for k in range(GROUPS)]
    if not abs(cpu / wall - 1) <= AGREE:
        raise UserError(f"{what}: {b.name} / {a.name} is {cpu:.2f} by CPU time but {wall:.2f} by wall clock, "
                        "so the machine is busy; use --threads=1, more --rounds, or another time")
    mine, other = (statistics.median(row[k][0] for row in turns) for k in (0, 1))
    return {"mine": mine, "other": other, "ratio": cpu, "low": low, "high": high, "wall": wall,
            "wall_low": min(walls), "wall_high": max(walls), "turns": len(turns)}


def speeds(o: Options, cfg: Config, device: torch.device) -> list[dict]:
    """Print and return the speed of every kind of step, without compiling and, if asked for, with."""
    inputs, rows, dtype = make_inputs(cfg, o.batch, device), [], machine.precision(device, cfg.dtype)
    peak = machine.matmul_peak(device, dtype)
    print(f"{str(dtype)[6:]}, matmul peak {peak / 1e12:.3f} TFLOP/s\n{'what':8} {'compile':7} {'s/step':>8} "
          f"{'(quartiles)':>18} {'images/s':>9} {'TFLOP/s':>8} {'of peak':>7} {'GB':>6}")
    for compiled in (False, True) if cfg.compile == "on" else (False,):
        side = ours(cfg, inputs, cfg.dtype, compiled)
        for what in o.what.split("+"):
            torch.compiler.reset()                          # one graph a kind of step, no size left open
            rows.append({"what": what, "compile": "on" if compiled else "off"})
            rows[-1] |= measure(side, what, o, cfg, device, peak)
            print("{what:8} {compile:7} {seconds:8.4f} ({low:.4f} .. {high:.4f}) {images:9.1f} {tflops:8.3f} "
                  "{share:7.1%} {memory:6.2f}".format(**rows[-1]), flush=True)
    return rows


def compiles(cfg: Config, device: torch.device) -> bool:
    """Does train.py compile the blocks of such a run?"""
    return cfg.compile == "on" or cfg.compile == "auto" and device.type == "cuda"


def ratios(o: Options, cfg: Config, device: torch.device) -> list[dict]:
    """Print and return how much faster ours is, at equal fp32 precision and with each as it ships.

    With --compile=on ours as shipped is compiled, and fp32 is measured in both ways; theirs is as it comes."""
    inputs, rows = make_inputs(cfg, o.batch, device), []
    equal = ours(cfg, inputs, "float32", compiled=False)
    other = diffusers_side(equal.net, inputs) if o.vs else official_side(equal.net, inputs, o.peer)
    assert_alike(equal, other)
    compiled = compiles(cfg, device)
    shipped = ours(cfg, inputs, cfg.dtype, compiled)
    label = f"{str(shipped.net.dtype)[6:]}, as shipped"
    sides = [(equal, "float32 both"), (shipped, f"{label}, compiled" if compiled else label)]
    if compiled:
        sides.insert(1, (ours(cfg, inputs, "float32", compiled), "float32, ours compiled"))
    print(f"{other.name}: outputs equal to {ALIKE} in fp32\n{'what':8} {'precision':30} {'ours s':>7} "
          f"{'theirs s':>8} {'faster, by CPU time':>21} {'by best wall clock':>21} turns")
    for what in o.what.split("+"):
        for side, label in sides:
            rows.append({"what": what, "precision": label, **compare(side, other, what, o, device)})
            print("{what:8} {precision:30} {mine:7.3f} {other:8.3f} {ratio:5.2f} ({low:.2f} .. {high:.2f}) "
                  "{wall:5.2f} ({wall_low:.2f} .. {wall_high:.2f}) {turns:5d}".format(**rows[-1]), flush=True)
    return rows


def costs(o: Options, cfg: Config, device: torch.device) -> list[dict]:
    """Print and return how many times as long a network that preserves magnitudes takes as its plain twin."""
    m = cfg.model
    twin = dataclasses.replace(m, arch=m.arch.removeprefix("mp"), preserve="")
    plain = dataclasses.replace(cfg, model=twin, normalize=False, lr_mp=0.0)
    inputs, rows, compiled = make_inputs(cfg, o.batch, device), [], compiles(cfg, device)
    a, b = (dataclasses.replace(ours(c, inputs, c.dtype, compiled), name=c.model.arch) for c in (plain, cfg))
    print(f"{'what':8} {a.name + ' s':>9} {b.name + ' s':>9} {'cost, by CPU time':>22} {'by best wall clock':>22} "
          "turns")
    for what in o.what.split("+"):
        torch.compiler.reset()
        rows.append({"what": what, **compare(a, b, what, o, device)})
        print("{what:8} {mine:9.4f} {other:9.4f} {ratio:5.3f} ({low:.3f} .. {high:.3f}) "
              "{wall:5.3f} ({wall_low:.3f} .. {wall_high:.3f}) {turns:5d}".format(**rows[-1]), flush=True)
    return rows


ELSEWHERE = {"--fid": "fid speed", "--data": "bench_data"}      # what is measured in a room of its own


def main(argv: list[str]) -> list[dict]:
    if argv and (name := argv[0].partition("=")[0]) in ELSEWHERE:
        room, *first = ELSEWHERE[name].split()
        importlib.import_module(room).main(first + (argv[1:] if first else argv))
        return []
    o, cfg = read_options(argv)
    device = machine.find_device()
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    print(f"{o.size or cfg.model.arch}: {model.flops(cfg.model) / 1e9:.3f} GFLOP an image forward; "
          f"batch {o.batch} on {device}, {torch.get_num_threads()} CPU threads")
    kind = costs if o.vs == "plain" else ratios if o.vs or o.peer else speeds
    return kind(o, cfg, device)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as e:
        checkpoint.say(f"error: {e}.")
        sys.exit(2)
