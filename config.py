"""Every option, typed. A config file is a short Python module that builds one `Config`; flags override its fields.

python train.py --config=configs/shapes.py --lr=3e-4 --model.depth=12      (or: --lr 3e-4)
python train.py --help                                                     (every field, its meaning and its default)
"""
import dataclasses
import difflib
import functools
import inspect
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn


class UserError(ValueError):
    """Something the user can fix: one line that names the thing, its value and the alternatives. Exit code 2."""


# [DiT] table 1, and XS of [MAG]: depth, width D, heads H
SIZES = {
    "XS": dict(depth=6, width=256, heads=4),
    "S": dict(depth=12, width=384, heads=6),
    "B": dict(depth=12, width=768, heads=12),
    "L": dict(depth=24, width=1024, heads=16),
    "XL": dict(depth=28, width=1152, heads=16),
}


# Old names of options. The command line and config files take them with a note, older config.json files without.
RENAMED = {
    "lam": "guidance", "drop": "cond_dropout", "drop_controls": "control_dropout", "micro": "microbatch",
    "muon": "lr_muon", "decay": "lr_decay_start", "clip": "grad_clip", "ema": "ema_std", "snapshots": "ema_snapshots",
    "noise_weight": "loss_sigma_power", "max_bad": "max_bad_fraction", "init": "init_from",
    "normalize": "forced_weight_norm", "objects": "shapes.objects", "scenes": "shapes.layout",
    "model.base": "model.pos_base", "model.rescale": "model.sigma_scale", "model.noise_steps": "model.timesteps",
    "model.preserve": "model.mp",
    "beta": "control_guidance", "interval": "guidance_interval", "file": "ema_file", "weights": "pretrained",  # sample
    "base": "pretrain_steps", "long": "pretrain_steps_flip", "fine": "finetune_steps", "tune": "tune_steps",  # claims
    "square": "center_crop", "to": "save",                                                                     # fid
    "most": "limit", "what": "parts", "vs": "against", "peer": "official_dit"}                             # data, bench
# Names from other projects: the option here, or a sentence.
HABITS = {
    "cfg": "guidance", "cfg_scale": "guidance", "batch_size": "batch", "global_batch_size": "batch",
    "learning_rate": "lr", "output_dir": "out", "results_dir": "out", "num_steps": "steps",
    "num_inference_steps": "steps", "num_sampling_steps": "steps", "image_size": "model.resolution",
    "arr0": "is gone: `python sample.py --n=50000` writes the same .npz, and resumes",
    "resume": "is not needed: the same command again resumes the run in --out",
    "wandb": "does not exist: <out>/log.jsonl has every line, and `python -m runtime.plot` draws it",
    "epochs": "does not exist: a run has --steps, each of --batch images"}


class OldNames(type):
    """A dataclass that takes the old names of its fields, with a note, so that older config files still run."""
    def __call__(cls, *args: Any, **given: Any) -> Any:     # the one place that passes keywords through
        prefix, known = "model." if cls is ModelConfig else "", cls.__dataclass_fields__
        old = {}                                            # new name: value
        for key in [key for key in given if key not in known]:
            new = RENAMED.get(prefix + key, "").removeprefix(prefix)
            if new.split(".")[0] in known:
                print(f"note: {prefix + key} is now {prefix + new}", file=sys.stderr)
                old[new] = given.pop(key)
        options = super().__call__(*args, **given)
        for new, value in old.items():
            options = put(options, new, value)
        return options


@dataclass(frozen=True)
class ShapesConfig:
    """The captioned shapes, the data set that needs no files."""
    objects: int = 2                # most objects in an image
    layout: str = "free"            # free, grid (places a patch apart, two sizes), sides (pairs on the grid)


@dataclass(frozen=True)
class ModelConfig(metaclass=OldNames):
    """The options that decide the state dict. Every checkpoint stores them; only an equal model resumes it."""
    arch: str = "mmdit"             # block type, a key of model.ARCHS
    semantics: str = "text"         # content of the images: none, class or text
    classes: int = 0                # number of classes; 0 = take it from the data set
    text_dim: int = 0               # width E of one text token; 0 = take it from the text encoder
    text_length: int = 0            # number of text tokens L; 0 = take it from the text encoder
    resolution: int = 32            # height and width of the training images or latents
    channels: int = 3               # C, 3 for pixels and 4 for Stable Diffusion latents
    patch: int = 4                  # P, side of the square that becomes one token
    width: int = 256                # D
    depth: int = 6                  # number of blocks
    heads: int = 4                  # H
    timesteps: int = 1000           # T, the number of noise levels
    schedule: str = "scaled_linear" # alpha-bar table: scaled_linear or linear
    sigma_scale: float = 1.0        # s'/s: sigma is multiplied by it; 2 after the side of the images has doubled
    controls: str = ""              # control conditioning, joined with +: any of crop, flip, size; empty = none
    control_weight: str = "cosine"  # gamma_c(t) on size: cosine, uniform, linear, step, zero
    control_alpha: float = 8.0      # power of the cosine weight; of step: the sigma below which size acts
    positions: str = "grid"         # grid: 0, 1, 2, ...; resample: a fixed extent, finer; interpolate: a resized table
    pos_base: int = 0               # patches a side that resample and interpolate start from; 0 = this resolution's
    prediction: str = "eps"         # output of the last layer: eps, the noise, or v, noise and image mixed
    modulation: str = "scale+shift+gate"    # how time and class act on a sub-layer, joined with +: also rotate
    mp: str = ""                    # mp archs: none, or cosine, weights, stream, heads with +; empty = first three


@dataclass(frozen=True)
class Config(metaclass=OldNames):
    """A run. `model` decides the weights; the rest decides how they are trained and on what."""
    out: str = "out/shapes"         # run folder; the same command again resumes from it
    data: str = "shapes"            # "shapes", or a path: folder of classes or captions, tar shards, latents; coco:PATH
    augment: str = "crop+flip"      # random variation of the images, joined with +: crop, flip, size
    crop: str = "global"            # side of a random crop, of the short side: global .9-1, local .4-.6, mix .4-1
    seed: int = 0                   # keys every random draw: initial weights, data order, noise, samples
    model: ModelConfig = field(default_factory=ModelConfig)
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    init_from: str = ""             # run folder or weights file with the averaged weights to start from; empty = fresh
    encoder: str = "words"          # of captions: words (shapes), or clip:PATH, CLIP weights (text.py says which PATHs)
    padding: str = "zero"           # of short captions: zero, replicate (tokens again) or noisy (with noise on them)
    padding_noise: float = 0.02     # beta of noisy padding, in standard deviations of a caption's tokens
    steps: int = 2000               # optimizer steps of the whole run
    batch: int = 64                 # global batch: images of an optimizer step, for any number of processes
    microbatch: int = 64            # images of a forward pass; the processes share batch/microbatch of them
    lr: float = 1e-3                # peak learning rate
    warmup: int = 100               # steps of linear warm-up
    lr_decay_start: float = 0.0     # share of the run after which the rate falls as 1/sqrt(step); 0 = never
    cooldown: float = 0.0           # share of the run at its end over which the rate falls linearly to zero
    lr_muon: float = 0.0            # peak rate of Muon for the blocks' weight matrices; 0 = AdamW for everything
    lr_mp: float = 0.0              # peak rate of magnitude-preserving weights; 0 = lr
    forced_weight_norm: bool = False # magnitude-preserving weights: rows back to unit magnitude after every step
    beta1: float = 0.9              # AdamW
    beta2: float = 0.95             # AdamW
    weight_decay: float = 0.03      # AdamW
    grad_clip: float = 1.0          # largest gradient norm; 0 = no clipping
    ema_std: float = 0.1            # width of the power-function average, as a share of the run so far
    ema_snapshots: int = 0          # averages of two widths kept so many times over a run, for ema.py; 0 = none
    cond_dropout: float = 0.1       # share of samples trained without semantics and without controls, for guidance
    control_dropout: float = 0.1    # share trained with semantics and without controls
    loss_sigma_power: float = 0.0   # weight the loss by sigma to this power; 0 = the paper's, 1 favours composition
    dtype: str = "auto"             # auto, float32 or bfloat16; auto = bfloat16 where the hardware multiplies it
    compile: str = "auto"           # auto, on or off; auto = on for CUDA
    workers: int = 2                # threads that load and decode images ahead of the loop; 0 = none, between the steps
    max_bad_fraction: float = 0.01  # share of unreadable images that is skipped before the run stops
    log_every: int = 10             # steps between lines of log.jsonl
    save_every: int = 500           # steps between checkpoints; the last two are kept
    sample_every: int = 500         # steps between preview grids; 0 = none
    magnitudes_every: int = 0       # steps between lines with every layer's magnitude; 0 = none
    fid_every: int = 0              # steps between measurements of FID; 0 = none
    fid_ref: str = ""               # statistics of real images, made by fid.py ref
    fid_n: int = 10_000             # images in each
    guidance: float = 2.0           # guidance scale of previews, and the default of sample.py
    eta: float = 0.0                # share of fresh noise in a DDIM step, likewise: 0 none, 1 DDPM's
    threads: int = 0                # CPU threads; 0 = all cores, shared by the processes of this machine


def run(main: Callable[[list[str]], int | None], cleanup: Callable[[], None] | None = None) -> NoReturn:
    """The main guard of every command: call `main` with the command line and exit with its code, 0 for None.

    `cleanup` leaves the process group; it runs only when all processes end alike, normally or by a signal."""
    try:
        code = main(sys.argv[1:]) or 0
    except UserError as e:
        print(f"error: {e}.", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C.", file=sys.stderr)
        code = 130
    if cleanup is not None and code in (0, 130, 143):
        cleanup()
    sys.exit(code)


def read_config(argv: list[str]) -> Config:
    """Read the config of --config=FILE, or the default one, and put the other flags into it."""
    rest, path, words = [], None, iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or next(words, "")
        else:
            rest.append(word)
    return parse(rest, load(path) if path is not None else Config())


def load(path: str) -> Config:
    """Run a config file and return its `config`. UserError if the file is missing or builds none."""
    if not Path(path).is_file():
        found = ", ".join(sorted(p.as_posix() for p in Path("configs").glob("*.py"))) or "none"
        raise UserError(f"no config file {path!r}; configs/ has: {found}")
    try:
        built = runpy.run_path(path).get("config")
    except TypeError as e:                                  # Config(dept=4): Python's own message has the name
        raise UserError(f"{path}: {e}; see --help for the fields") from e
    if not isinstance(built, Config):
        raise UserError(f"{path} must define `config = Config(...)`, but `config` is {type(built).__name__}")
    return check_types(built)


def check_types(options: Any) -> Any:
    """Convert every int in a float field to float; UserError on a value of a wrong type."""
    fixed = {}
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if dataclasses.is_dataclass(value):
            fixed[f.name] = check_types(value)
        elif f.type is float and type(value) is int:
            fixed[f.name] = float(value)
        elif type(value) is not f.type:
            raise UserError(f"{f.name} must be {f.type.__name__}, got {value!r}")
    return dataclasses.replace(options, **fixed)


# Lowest and highest value of every number; ModelConfig's are checked by model.check.
MANY = 2 ** 31
RANGES = {"batch": (1, 2 ** 20), "microbatch": (1, 2 ** 20), "steps": (1, MANY), "warmup": (0, MANY),
          "log_every": (1, MANY), "save_every": (1, MANY), "sample_every": (0, MANY), "shapes.objects": (1, MANY),
          "workers": (0, 256), "threads": (0, 1024), "lr": (1e-9, 1e3), "cooldown": (0, 1), "beta1": (0, 0.9999),
          "beta2": (0, 0.999999), "weight_decay": (0, 1e3), "grad_clip": (0, 1e30), "ema_std": (0.001, 0.288),
          "cond_dropout": (0, 1), "max_bad_fraction": (0, 1), "guidance": (-1e3, 1e3), "eta": (0, 1),
          "loss_sigma_power": (-8, 8), "control_dropout": (0, 1), "padding_noise": (0, 10), "lr_decay_start": (0, 1),
          "lr_mp": (0, 1e3), "lr_muon": (0, 1e3), "ema_snapshots": (0, 10_000), "magnitudes_every": (0, MANY),
          "fid_every": (0, MANY), "fid_n": (10, MANY)}


def check_ranges(cfg: Config) -> None:
    """UserError for a number outside its range, nan included."""
    for key, (low, high) in RANGES.items():
        value = attrgetter(key)(cfg)
        if not low <= value <= high:
            raise UserError(f"{key}={value} must be between {low} and {high:g}")


def check_name(key: str, name: str, known: Iterable[str]) -> None:
    """UserError for a name that the option `key` does not know."""
    if name not in known:
        raise UserError(f"unknown {key}={name!r}; there are {', '.join(known)}")


def check_fields(cfg: Config, world: int) -> None:
    """UserError for numbers out of range and for fields that contradict each other or the number of processes."""
    check_ranges(cfg)
    check_name("compile", cfg.compile, ("auto", "on", "off"))
    if cfg.cond_dropout + cfg.control_dropout > 1:
        raise UserError(f"cond_dropout={cfg.cond_dropout} and control_dropout={cfg.control_dropout} exceed 1 together")
    if bool(cfg.fid_every) != bool(cfg.fid_ref):
        raise UserError(f"fid_every={cfg.fid_every} and fid_ref={cfg.fid_ref!r} belong together: set both or neither")
    for key, default in (("encoder", "words"), ("padding", "zero")):
        if getattr(cfg, key) != default and cfg.model.semantics != "text":
            raise UserError(f"{key}={getattr(cfg, key)!r} needs model.semantics='text', got {cfg.model.semantics!r}")
    if cfg.crop != "global" and "crop" not in cfg.augment.split("+"):
        raise UserError(f"crop={cfg.crop!r} needs random crops; set --augment={f'{cfg.augment}+crop'.lstrip('+')}")
    if cfg.batch % cfg.microbatch:
        near = max(d for d in range(1, min(cfg.microbatch, cfg.batch) + 1) if cfg.batch % d == 0)
        raise UserError(f"batch={cfg.batch} is not a multiple of microbatch={cfg.microbatch}; try --microbatch={near}")
    n = cfg.batch // cfg.microbatch
    if n % world:
        fit = ", ".join(str(w) for w in range(1, n + 1) if n % w == 0)
        raise UserError(f"batch={cfg.batch} with microbatch={cfg.microbatch} is {n} microbatches, which {world} "
                        f"processes cannot share; use {fit} processes, or another --microbatch")


def parse(argv: list[str], options: Any) -> Any:
    """Put `--key=value` and `--key value` into `options` (a dataclass), each read as its field's type.

    `--help` prints every field and exits. UserError for an unknown field, a wrong type, a missing value."""
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(help_text(options))
            sys.exit(0)
        if word.endswith(".py") and not word.startswith("--"):
            raise UserError(f"a config file is given as --config={word}")
        if not word.startswith("--"):
            raise UserError(f"expected --key=value, got {word!r}; --help lists the keys")
        name, equals, text = word[2:].partition("=")
        key, kind = find_field(options, name.replace("-", "_"))
        if not equals and kind is not bool and not words:
            raise UserError(f"--{key} needs a value of type {kind.__name__}; --help lists the keys")
        if not equals:
            text = "true" if kind is bool else words.pop(0)
        options = put(options, key, read_as(kind, key, text))
    return options


def find_field(options: Any, key: str) -> tuple[str, type]:
    """Name today and type of the field `key` ("lr", "model.depth"). UserError with the nearest names if unknown."""
    known = {name: kind for name, kind, _, _ in fields(options)}
    if key not in known and RENAMED.get(key) in known:
        print(f"note: --{key} is now --{RENAMED[key]}", file=sys.stderr)
        key = RENAMED[key]
    if key in known:
        return key, known[key]
    habit = HABITS.get(key, "")
    if habit in known or " " in habit:
        raise UserError(f"--{key} {habit if ' ' in habit else f'is --{habit} here'}")
    near = [k for k in known if k.endswith("." + key)] or difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join('--' + k for k in near)}?" if near else f"it has: {', '.join(known)}"
    raise UserError(f"unknown field --{key} of {type(options).__name__}; {hint}")


def read_as(kind: type, key: str, text: str) -> Any:
    """Read `text` as a value of `kind`: int takes 2000 and 2e3, bool takes true and false."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int and not re.fullmatch(r"[+-]?\d+", text) and float(text) == int(float(text)):
            return int(float(text))
        return kind(text)
    except (ValueError, KeyError, OverflowError) as e:
        raise UserError(f"--{key} must be {kind.__name__}, got {text!r}") from e


def put(options: Any, key: str, value: Any) -> Any:
    """A copy of the dataclass with the field `key` set; `key` may reach one level down ("model.depth")."""
    head, _, rest = key.partition(".")
    return dataclasses.replace(options, **{head: put(getattr(options, head), rest, value) if rest else value})


def fields(options: Any, prefix: str = "") -> list[tuple[str, type, Any, str]]:
    """(key, type, value, comment) of every field, in the order of the source, one level of nesting flattened."""
    rows, comments = [], _comments(type(options))
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if dataclasses.is_dataclass(value):
            rows += fields(value, prefix + f.name + ".")
        else:
            rows.append((prefix + f.name, f.type, value, f.metadata.get("help") or comments.get(f.name, "")))
    return rows


@functools.cache
def _comments(kind: type) -> dict[str, str]:
    """The comment of each field in the source of a dataclass and its bases."""
    source = "".join(inspect.getsource(c) for c in reversed(kind.__mro__) if dataclasses.is_dataclass(c))
    return dict(re.findall(r"^    (\w+):[^#\n]*# (.+)$", source, re.M))


def help_text(options: Any) -> str:
    """The text of `--help`: one line a field with its type, its present value and its comment."""
    rows = [(f"--{key}={kind.__name__}", f"{value!r}", comment) for key, kind, value, comment in fields(options)]
    wide = [max(len(row[k]) for row in rows) for k in (0, 1)]
    lines = [f"  {flag:{wide[0]}}  {value:{wide[1]}}  {comment}" for flag, value, comment in rows]
    return "\n".join(["options, each with its type, its value if not given, and its meaning", *lines])


def to_json(options: Any) -> str:
    """The dataclass as JSON text, for config.json and the headers of weight files."""
    return json.dumps(dataclasses.asdict(options), indent=1)


def from_json(text: str) -> Config:
    """The inverse of to_json for a Config, by today's or older names. Runs no code. UserError for any other text."""
    try:
        tree, cfg = json.loads(text), Config()
        parts = {"model": tree.pop("model"), "shapes": tree.pop("shapes", {})}
        flat = {f"{part}.{k}": v for part, inner in parts.items() for k, v in inner.items()}
        for key, value in {**tree, **flat}.items():
            cfg = put(cfg, RENAMED.get(key, key), value)
        return check_types(cfg)
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as e:
        raise UserError(f"not a config of this version of plaindit: {e}") from e


def differences(a: Any, b: Any) -> list[str]:
    """"key: old -> new" for every field in which two configs differ."""
    pairs = ((key, old, new) for (key, _, old, _), (_, _, new, _) in zip(fields(a), fields(b)))
    return [f"{key}: {old!r} -> {new!r}" for key, old, new in pairs if old != new]
