"""Denoisers by their config: what can be built, building, loading, and what each costs.

Dimensions: N = h w image tokens, L context tokens, D width, C channels, P patch.

python model.py --table        parameters and FLOPs of every architecture and size, and beside those of the papers
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import checkpoint
from blocks import ungated
from conditioning import CONTROL_WEIGHTS, CONTROLS
from config import SIZES, Config, ModelConfig, UserError, from_json
from mp_layers import FULL, LAYOUT
from official import read_official
from schedule import SCHEDULES
from trunk import ARCHS, POSITIONS, Denoiser, control_names, modulation_parts, preserved

PREDICTIONS = ("eps", "v")
MP = ("mpdit", "mpmmdit")               # architectures with a model.preserve


def zero_layers(net: Denoiser) -> list[nn.Module]:
    """The layers of a network that start at zero."""
    return net.zero_layers()


# ---------------------------------------------------------------- building, loading

def check(cfg: ModelConfig) -> None:
    """UserError for a model that cannot be built, with the value and what would do."""
    if cfg.arch not in ARCHS:
        raise UserError(f"unknown model.arch={cfg.arch!r}; there are {', '.join(ARCHS)}")
    if cfg.semantics not in ("none", "class", "text"):
        raise UserError(f"unknown model.semantics={cfg.semantics!r}; there are none, class, text")
    if cfg.arch in ("dit", "ditatt", "mpdit") and cfg.semantics == "text":
        raise UserError(f"model.arch={cfg.arch!r} takes a class or nothing; for text use model.arch='mmdit', "
                        "'sd3' or 'mpmmdit'")
    for key in ("width", "depth", "heads", "patch", "channels", "resolution"):
        if getattr(cfg, key) < 1:
            raise UserError(f"model.{key}={getattr(cfg, key)} must be at least 1")
    if cfg.resolution % cfg.patch:
        raise UserError(f"model.resolution={cfg.resolution} is not divisible by model.patch={cfg.patch}")
    if cfg.width % cfg.heads:
        raise UserError(f"model.width={cfg.width} is not divisible by model.heads={cfg.heads}")
    if cfg.width % 4:
        raise UserError(f"model.width={cfg.width} is not divisible by 4, which sine-cosine positions need")
    if cfg.semantics == "class" and cfg.classes < 1:
        raise UserError(f"model.semantics='class' needs model.classes, got {cfg.classes}")
    if cfg.semantics == "text" and min(cfg.text_dim, cfg.text_length) < 1:
        raise UserError(f"model.semantics='text' needs model.text_dim and model.text_length, got {cfg.text_dim} and "
                        f"{cfg.text_length}")
    for key, known in (("schedule", SCHEDULES), ("prediction", PREDICTIONS), ("positions", POSITIONS)):
        if getattr(cfg, key) not in known:
            raise UserError(f"unknown model.{key}={getattr(cfg, key)!r}; there are {', '.join(known)}")
    if not 0.001 <= cfg.rescale <= 1000:
        raise UserError(f"model.rescale={cfg.rescale} must be between 0.001 and 1000")
    if cfg.base < 0:
        raise UserError(f"model.base={cfg.base} must be a number of patches, or 0 for this resolution's")
    if cfg.noise_steps < 2:
        raise UserError(f"model.noise_steps={cfg.noise_steps} must be at least 2")
    if control_names(cfg) and cfg.control_weight not in CONTROL_WEIGHTS:
        raise UserError(f"unknown model.control_weight={cfg.control_weight!r}; there are "
                        f"{', '.join(CONTROL_WEIGHTS)}")
    if control_names(cfg) and not cfg.control_alpha > 0:
        raise UserError(f"model.control_alpha={cfg.control_alpha} must be positive")
    if not ungated(modulation_parts(cfg)):
        raise UserError(f"model.modulation={cfg.modulation!r} leaves the last layer blind; it needs one or more of "
                        f"{', '.join(ungated(tuple(LAYOUT)))}")
    check_preserve(cfg)


def check_preserve(cfg: ModelConfig) -> None:
    """UserError for magnitude-preserving changes that do not go together, or not with the architecture."""
    if cfg.arch not in MP and cfg.preserve:
        raise UserError(f"model.preserve={cfg.preserve!r} is of {', '.join(MP)}; model.arch={cfg.arch!r} has none")
    have = preserved(cfg)
    if "stream" in have and "weights" not in have:
        raise UserError(f"model.preserve={cfg.preserve!r}: stream, without a norm between layers, needs weights")
    if cfg.arch == "mpmmdit" and not {*FULL} <= {*have}:
        raise UserError(f"model.preserve={cfg.preserve!r}: model.arch='mpmmdit' needs all of {'+'.join(FULL)}")
    if cfg.arch in MP and control_names(cfg) and "stream" not in have:
        raise UserError(f"model.controls={cfg.controls!r} of model.arch={cfg.arch!r} needs stream, got "
                        f"model.preserve={cfg.preserve!r}")


def build(cfg: ModelConfig) -> Denoiser:
    """A network with fresh weights, drawn from torch's default generator. UserError if the config cannot be built."""
    check(cfg)
    return ARCHS[cfg.arch](cfg)


def load(path: str | Path) -> tuple[Denoiser, Config]:
    """The EMA network of a run folder or of its weights.safetensors, and the run's config. Runs no code from them."""
    path = Path(path)
    tensors, header = checkpoint.read_weights(path / "weights.safetensors" if path.is_dir() else path)
    cfg = from_json(header["config"])
    net = build(cfg.model)
    checkpoint.load_strictly(net, tensors, str(path))
    return net.eval().requires_grad_(False), cfg


def load_official_dit(path: str | Path, heads: int = 0) -> tuple[Denoiser, ModelConfig]:
    """[DiT]: the network of published weights, a .pt file or diffusers folder, strictly by name (official.py)."""
    state, cfg = read_official(path, heads)
    net = build(cfg)
    checkpoint.load_strictly(net, state, str(path))
    return net.eval().requires_grad_(False), cfg


# ---------------------------------------------------------------- counting

def block_products(cfg: ModelConfig, last: bool, N: int, L: int) -> int:
    """Multiply-adds of one block: modulation, then the layers on N image and L context tokens, then q k^T and a v."""
    D, M, Q = cfg.width, N + L, N if last else N + L        # keys; queries, in blocks whose last drops context's
    parts = modulation_parts(cfg)
    m, before = (sum(LAYOUT[part] for part in p) for p in (parts, ungated(parts)))      # halves of D a sub-layer
    modulation, layers, attention = {
        "dit": (2 * m, 12 * N, N * N),
        "mmdit": (2 * m, 12 * N + (2 if last else 4) * L, Q * M),
        "ditatt": (2 * m + (before if last else m), 12 * N + 4 * L, M * M),
        "sd3": (2 * m + (before if last else 2 * m), 12 * N + (2 if last else 12) * L, Q * M),
    }[cfg.arch.removeprefix("mp")]
    return modulation * D * D // 2 + layers * D * D + 2 * attention * D


def flops(cfg: ModelConfig, h: int | None = None, w: int | None = None) -> int:
    """FLOPs of one forward pass of one image, two for every multiply-add of a matrix product, nothing else counted.

    DiT    2 [ depth (12 D^2 N + 2 N^2 D + 6 D^2) + N D P^2 2 C + 2 D^2 + (256 + D) D ]
    Others have context tokens besides, in their blocks and in the layers that make them; controls add an MLP a group;
    MP architectures have the number 1 beside a patch and beside a token of text.
    A training step costs three of these, sampling costs steps x passes."""
    D, P, N = cfg.width, cfg.patch, ((h or cfg.resolution) // cfg.patch) * ((w or cfg.resolution) // cfg.patch)
    L, one = {"none": 1, "class": 1, "text": cfg.text_length}[cfg.semantics], cfg.arch in MP
    mac = sum(block_products(cfg, k == cfg.depth - 1, N, L) for k in range(cfg.depth))
    mac += N * D * (2 * P * P * cfg.channels + one) + (256 + D) * D
    mac += sum(LAYOUT[part] for part in ungated(modulation_parts(cfg))) * D * D // 2
    if cfg.arch not in ("dit", "mpdit"):
        mac += {"none": 0, "class": 2 * D * D, "text": L * D * (cfg.text_dim + one + D)}[cfg.semantics]
    rows = [CONTROLS[c] for c in control_names(cfg)]
    groups = [sum(row.width for row in rows if row.group == group) for group in ("high", "low")]
    return 2 * (mac + sum(256 * n * D + D * D for n in groups if n))


# ---------------------------------------------------------------- tables

# [COND] table A1: millions of parameters that our best reading of each model has, and that are printed; GFLOP printed
# for 256 and for 512 pixels. 0 = not in the paper.
TABLE_A1 = {
    "DiT class": (dict(arch="dit", semantics="class"), 678.210, 679.09, 237.4, 1050),
    "DiT by attention, class": (dict(arch="ditatt", semantics="class"), 792.440, 792.44, 237.93, 1050),
    "mmDiT class": (dict(arch="mmdit", semantics="class"), 792.440, 679.09, 237.93, 1050),
    "mmDiT text": (dict(arch="mmdit", semantics="text"), 790.845, 791.64, 397.06, 1260),
    "mmDiT of SD3, text": (dict(arch="sd3", semantics="text"), 1331.351, 0, 0, 0),
}
XL2 = ModelConfig(classes=1000, text_dim=768, text_length=256, resolution=32, channels=4, patch=2, **SIZES["XL"])


def parameters(cfg: ModelConfig) -> int:
    """Number of weights of a network that is not built."""
    with torch.device("meta"):
        return sum(p.numel() for p in build(cfg).parameters())


def control_parameters(n: int, D: int) -> int:
    """[COND]: weights and biases of the MLP of n controls, 256 n -> D -> D."""
    return 256 * n * D + D + D * D + D


def counted_alike(cfg: ModelConfig) -> int:
    """Parameters with [COND]'s baseline's one control MLP over six scalars in place of ours, and its position table.

    The table, which is fixed, counts among the weights of [DiT]'s code and is no parameter here."""
    table = (cfg.resolution // cfg.patch) ** 2 * cfg.width
    return parameters(replace(cfg, controls="")) + control_parameters(6, cfg.width) + table


def table() -> str:
    """Parameters and forward GFLOPs of every architecture and size, patch 2 on 32 x 32 x 4 latents, 1000 classes."""
    rows = [f"{'model':12} {'parameters':>13} {'GFLOP/image':>12}"]
    for arch in ARCHS:
        for name, size in SIZES.items():
            cfg = replace(XL2, arch=arch, semantics="class", **size)
            rows.append(f"{arch + '-' + name + '/2':12} {parameters(cfg):13,} {flops(cfg) / 1e9:12.2f}")
    return "\n".join(rows)


def table_a1() -> str:
    """The XL/2 models beside [COND] table A1, each difference in percent of the number before it."""
    share = lambda ours, theirs: f"{100 * (ours / theirs - 1):+6.2f}%"
    beside = lambda ours, theirs: f"{theirs:8g} {share(ours, theirs)}" if theirs else f"{'-':>8} {'':7}"
    ours, theirs = f"{'here':>8}", f"{'paper':>8} {'':7}"
    rows = [f"{'XL/2':23} {'millions of parameters':>26} {'':26}   {'GFLOP at 256':>20} {'':7} {'GFLOP at 512':>20}",
            f"{'':23} {ours} {'alike':>8} {'reading':>8} {'':7} {theirs}   {ours} {theirs}   {ours} {theirs}"]
    for name, (fields, reading, *paper) in TABLE_A1.items():
        cfg = replace(XL2, controls="crop+flip+size", **fields)
        alike, cost = counted_alike(cfg) / 1e6, [flops(cfg, side, side) / 1e9 for side in (32, 64)]
        rows.append(f"{name:23} {parameters(cfg) / 1e6:8.2f} {alike:8.2f} {beside(alike, reading)} "
                    f"{beside(alike, paper[0])}   {cost[0]:8.2f} {beside(cost[0], paper[1])}   "
                    f"{cost[1]:8.2f} {beside(cost[1], paper[2])}")
    D, L = XL2.width, XL2.text_length
    high, low, one = (control_parameters(n, D) for n in (3, 2, 6))
    return "\n".join(row.rstrip() for row in rows) + f"""

here     with two control MLPs: {high:,} parameters for crop and flip, {low:,} for size
alike    with the paper's one of six scalars instead, {one:,}, and with its fixed position table, {256 * D:,}
reading  the model that the paper's parameters and FLOPs suggest; ours lacks what nothing would read in the last block
         and has the gains of the RMSNorm of q and k
paper    table A1; 679.09 for mmDiT class is probably a slip, for its FLOPs are those of DiT by attention
GFLOP    two for every multiply-add of a matrix product. In a block each of the {L} text tokens has 4 D^2 of them
         here and probably 7 D^2 in the paper, where the image's q, k, v see it too"""


# The columns of [MAG]'s table of modulations, and the models that the paper trains or that its code offers.
MODULATIONS = ("scale", "rotate", "scale+shift", "scale+rotate", "scale+gate", "rotate+gate", "scale+shift+gate",
               "scale+rotate+gate", "scale+shift+rotate+gate")
MAG_SIZES = ("XS/2", "S/4", "B/4", "XL/2")


def mag_config(size: str, modulation: str) -> ModelConfig:
    """[MAG]'s model of a size ("S/4") on latents of 4 x 16 x 16, 1000 classes."""
    name, patch = size.split("/")
    return ModelConfig(arch="mpdit", semantics="class", classes=1000, resolution=16, channels=4, patch=int(patch),
                       modulation=modulation, **SIZES[name])


def counted_as_mag(cfg: ModelConfig) -> int:
    """Parameters with [MAG]'s output, which has a variance beside every channel: P^2 C rows of D more than ours."""
    return parameters(cfg) + cfg.patch ** 2 * cfg.channels * cfg.width


def table_mag() -> str:
    """Parameters of the MP-DiT with every modulation, counted as [MAG] does, and what rotation for shift saves."""
    short = {m: m.replace("scale", "sc").replace("shift", "sh").replace("rotate", "rot") for m in MODULATIONS}
    rows = ["".join([f"{'mpdit':6}", *(f"{short[m]:>15}" for m in MODULATIONS), f"{'saved':>9}"])]
    for size in MAG_SIZES:
        counts = {m: counted_as_mag(mag_config(size, m)) for m in MODULATIONS}
        saved = 1 - counts["scale+rotate+gate"] / counts["scale+shift+gate"]
        rows.append("".join([f"{size:6}", *(f"{n:15,}" for n in counts.values()), f"{100 * saved:8.3f}%"]))
    return "\n".join(rows) + """

sc scale, sh shift, rot rotate. Counted with a variance beside every output channel, as in the paper; ours has none
saved    by sc+rot+gate of sc+sh+gate: depth D^2 + D^2 / 2 parameters. The paper says about 5.4 %;
         5.387 % at S/4 if what the last layer saves is left out"""


if __name__ == "__main__":
    if sys.argv[1:] != ["--table"]:
        sys.exit(__doc__)
    print(table(), table_a1(), table_mag(), sep="\n\n")
