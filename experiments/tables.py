"""Parameters and FLOPs of every architecture and size, beside those that the papers print.

python -m experiments.tables
"""
from dataclasses import replace

import torch

import model
from config import SIZES, ModelConfig, UserError, run

# [COND] table A1: millions of parameters, by our best reading of each model and as printed; GFLOP printed for 256 and
# for 512 pixels. 0 = not in the paper.
TABLE_A1 = {
    "DiT class": (dict(arch="dit", semantics="class"), 678.210, 679.09, 237.4, 1050),
    "PixArt class": (dict(arch="pixart", semantics="class"), 611.698, 611.7, 275.14, 1200),
    "PixArt text": (dict(arch="pixart", semantics="text"), 610.103, 610.12, 314.68, 1140),
    "DiT by attention, class": (dict(arch="ditatt", semantics="class"), 792.440, 792.44, 237.93, 1050),
    "mmDiT class": (dict(arch="mmdit", semantics="class"), 792.440, 679.09, 237.93, 1050),
    "mmDiT text": (dict(arch="mmdit", semantics="text"), 790.845, 791.64, 397.06, 1260),
    "mmDiT of SD3, text": (dict(arch="sd3", semantics="text"), 1331.351, 0, 0, 0),
}
XL2 = ModelConfig(classes=1000, text_dim=768, text_length=256, resolution=32, channels=4, patch=2, **SIZES["XL"])

# The columns of [MAG]'s table of modulations, and the models that the paper trains or that its code offers.
MODULATIONS = ("scale", "rotate", "scale+shift", "scale+rotate", "scale+gate", "rotate+gate", "scale+shift+gate",
               "scale+rotate+gate", "scale+shift+rotate+gate")
MAG_SIZES = ("XS/2", "S/4", "B/4", "XL/2")


def parameters(cfg: ModelConfig) -> int:
    """Count the parameters, without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in model.build(cfg).parameters())


def control_parameters(n: int, D: int) -> int:
    """[COND]: weights and biases of the MLP of n controls, 256 n -> D -> D."""
    return 256 * n * D + D + D * D + D


def counted_alike(cfg: ModelConfig) -> int:
    """Count parameters as [COND] does: one control MLP of six scalars, the fixed position table of [DiT]'s code.

    PixArt's code has no such parameter, but the q and k of its cross-attention also where the context is one token."""
    D, found = cfg.width, parameters(replace(cfg, controls="")) + control_parameters(6, cfg.width)
    if cfg.arch != "pixart":
        return found + (cfg.resolution // cfg.patch) ** 2 * D
    return found + (cfg.depth * 2 * D * (D + 1) if cfg.semantics == "class" else 0)


def table() -> str:
    """Parameters and forward GFLOPs of every architecture and size, patch 2 on 32 x 32 x 4 latents, 1000 classes."""
    rows = [f"{'model':12} {'parameters':>13} {'GFLOP/image':>12}"]
    for arch in model.ARCHS:
        for name, size in SIZES.items():
            cfg = replace(XL2, arch=arch, semantics="class", **size)
            rows.append(f"{arch + '-' + name + '/2':12} {parameters(cfg):13,} {model.flops(cfg) / 1e9:12.2f}")
    return "\n".join(rows)


def table_a1() -> str:
    """The XL/2 models beside [COND] table A1, each difference in percent of the number before it."""
    beside = lambda ours, theirs: f"{theirs:8g} {100 * (ours / theirs - 1):+6.2f}%" if theirs else f"{'-':>8} {'':7}"
    ours, theirs = f"{'here':>8}", f"{'paper':>8} {'':7}"
    rows = [f"{'XL/2':23} {'millions of parameters':>26} {'':26}   {'GFLOP at 256':>20} {'':7} {'GFLOP at 512':>20}",
            f"{'':23} {ours} {'alike':>8} {'reading':>8} {'':7} {theirs}   {ours} {theirs}   {ours} {theirs}"]
    for name, (fields, reading, *paper) in TABLE_A1.items():
        cfg = replace(XL2, controls="crop+flip+size", **fields)
        alike, cost = counted_alike(cfg) / 1e6, [model.flops(cfg, side, side) / 1e9 for side in (32, 64)]
        rows.append(f"{name:23} {parameters(cfg) / 1e6:8.2f} {alike:8.2f} {beside(alike, reading)} "
                    f"{beside(alike, paper[0])}   {cost[0]:8.2f} {beside(cost[0], paper[1])}   "
                    f"{cost[1]:8.2f} {beside(cost[1], paper[2])}")
    return "\n".join(row.rstrip() for row in rows) + """

here     with two control MLPs, of crop and flip and of size
alike    as the paper counts: one control MLP of six scalars, [DiT]'s fixed position table, all q and k of PixArt
reading  the model that the paper's parameters and FLOPs suggest; 679.09 for mmDiT class is probably a slip
GFLOP    two for every multiply-add of a matrix product, at 256 text tokens"""


def mag_config(size: str, modulation: str) -> ModelConfig:
    """[MAG]'s model of a size ("S/4") on latents of 4 x 16 x 16, 1000 classes."""
    name, patch = size.split("/")
    return ModelConfig(arch="mpdit", semantics="class", classes=1000, resolution=16, channels=4, patch=int(patch),
                       modulation=modulation, **SIZES[name])


def counted_as_mag(cfg: ModelConfig) -> int:
    """Count parameters with [MAG]'s output, which has a variance beside every channel: P^2 C rows of D more."""
    return parameters(cfg) + cfg.patch ** 2 * cfg.channels * cfg.width


def table_mag() -> str:
    """Parameters of the MP-DiT with every modulation, counted as [MAG] does, and the saving of rotation for shift."""
    short = {m: m.replace("scale", "sc").replace("shift", "sh").replace("rotate", "rot") for m in MODULATIONS}
    rows = ["".join([f"{'mpdit':6}", *(f"{short[m]:>15}" for m in MODULATIONS), f"{'saved':>9}"])]
    for size in MAG_SIZES:
        counts = {m: counted_as_mag(mag_config(size, m)) for m in MODULATIONS}
        saved = 1 - counts["scale+rotate+gate"] / counts["scale+shift+gate"]
        rows.append("".join([f"{size:6}", *(f"{n:15,}" for n in counts.values()), f"{100 * saved:8.3f}%"]))
    return "\n".join(rows) + """

sc scale, sh shift, rot rotate. Counted with a variance beside every output channel, as in the paper; ours has none
saved    by sc+rot+gate of sc+sh+gate: depth D^2 + D^2 / 2 parameters; the paper says about 5.4 %"""


def main(argv: list[str]) -> None:
    if argv:
        raise UserError(f"experiments/tables.py takes no options, got {' '.join(argv)}")
    print(table(), table_a1(), table_mag(), sep="\n\n")


if __name__ == "__main__":
    run(main)
