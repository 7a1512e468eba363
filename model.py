"""The denoiser: one trunk for every kind of block (blocks.py). net(x_t, i, cond) -> eps

Dimensions: B batch, N = h w image tokens, L context tokens, D width, H heads, C channels, P patch, T noise steps.

python model.py --table        parameters and FLOPs of every architecture and size, and beside those of [COND]
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
from blocks import DiTAttBlock, DiTBlock, FinalLayer, MMDiTBlock, PatchEmbed, SD3Block
from conditioning import (CONTROL_WEIGHTS, CONTROLS, LOW_LEVEL, ClassContext, Condition, ControlEmbedding,
                          LabelEmbedder, LearnedContext, TextContext, TimestepEmbedder, interpolate_2d, sincos_2d)
from config import SIZES, Config, ModelConfig, UserError, from_json
from schedule import SCHEDULES, alpha_bar_table, to_sigma, velocity_to_eps

POSITIONS = {                           # (h, w, D, base) -> (h w, D), base in patches a side
    "grid": lambda h, w, D, base: sincos_2d(h, w, D),
    "resample": sincos_2d,
    "interpolate": interpolate_2d,
}
PREDICTIONS = ("eps", "v")


# ---------------------------------------------------------------- trunk

class Denoiser(nn.Module):
    """The trunk: patches and positions in, blocks, patches out. x_t (B, C, h P, w P), i (B,) index -> eps like x_t

    `dtype` is the type in which the tokens are computed; weights, angles and the returned eps stay fp32."""
    Block: type[nn.Module]

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg, self.dtype = cfg, torch.float32
        D, P, grid = cfg.width, cfg.patch, cfg.resolution // cfg.patch
        self.x_embedder = PatchEmbed(cfg.channels, P, D)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = self.semantics(cfg)
        controls = control_names(cfg)
        self.control_embedder = None
        if controls:
            sigma = to_sigma(alpha_bar_table(cfg.schedule, cfg.noise_steps)).float()     # gamma_c is of i: no rescale
            self.control_embedder = ControlEmbedding(controls, D, cfg.control_weight, cfg.control_alpha, sigma)
        self.blocks = nn.ModuleList(self.Block(D, cfg.heads, k == cfg.depth - 1) for k in range(cfg.depth))
        self.final_layer = FinalLayer(D, P, cfg.channels)
        self.register_buffer("pos_embed", position_table(cfg, grid, grid), persistent=False)
        table = alpha_bar_table(cfg.schedule, cfg.noise_steps, cfg.rescale).float()
        self.register_buffer("alpha_bar", table, persistent=False)              # (T,)
        self.initialize()

    @staticmethod
    def semantics(cfg: ModelConfig) -> nn.Module | None:
        """The module that reads the class or the caption."""
        raise TypeError("a trunk says how semantics enter")

    def condition(self, i: Tensor, cond: Condition) -> tuple[Tensor, Tensor | None]:
        """c (B, D), what modulates the blocks, and ctx (B, L, D), what they attend to."""
        raise TypeError("a trunk says how semantics enter")

    def initialize(self) -> None:
        """[DiT] sec. 3.2: Xavier for linear layers, 0.02 for the class table, zero for what must not act at first."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.view(m.weight.shape[0], -1))
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight, std=0.02)
        for layer in zero_layers(self):
            nn.init.zeros_(layer.weight)

    def time(self, i: Tensor, cond: Condition) -> Tensor:
        """[COND] eq. 1: MLP(sinusoid(i)), plus the controls. (B, D)"""
        c = self.t_embedder(i)
        if self.control_embedder is not None:
            c = c + self.control_embedder(cond, i / (self.cfg.noise_steps - 1))
        return c

    def positions(self, h: int, w: int) -> Tensor:
        """(h w, D); the grid of the training resolution is kept, any other is made when asked for."""
        grid = self.cfg.resolution // self.cfg.patch
        return self.pos_embed if (h, w) == (grid, grid) else position_table(self.cfg, h, w).to(self.pos_embed)

    def forward(self, x_t: Tensor, i: Tensor, cond: Condition) -> Tensor:
        h, w = (n // self.cfg.patch for n in x_t.shape[2:])
        x = self.x_embedder(x_t.to(self.dtype)) + self.positions(h, w).to(self.dtype)   # (B, N, D)
        c, ctx = self.condition(i, cond)
        for block in self.blocks:
            x, ctx = block(x, ctx, c)
        out = self.final_layer(x, c, h, w).float()                              # (B, C, h P, w P)
        return out if self.cfg.prediction == "eps" else velocity_to_eps(out, x_t, self.alpha_bar[i.long()])


class DiT(Denoiser):
    """[DiT]: the class is added to the time vector and modulates. State dict as in the official weights."""
    Block = DiTBlock

    @staticmethod
    def semantics(cfg: ModelConfig) -> nn.Module | None:
        return {"class": lambda: LabelEmbedder(cfg.classes, cfg.width), "none": lambda: None}[cfg.semantics]()

    def condition(self, i: Tensor, cond: Condition) -> tuple[Tensor, None]:
        c = self.time(i, cond)
        if self.y_embedder is not None:
            c = c + self.y_embedder(cond.label)
        return c.to(self.dtype), None


class MMDiT(Denoiser):
    """[COND] sec. 2: the class or the caption enters as tokens that the image attends to; time alone modulates."""
    Block = MMDiTBlock

    @staticmethod
    def semantics(cfg: ModelConfig) -> nn.Module:
        return {"class": lambda: ClassContext(cfg.classes, cfg.width), "none": lambda: LearnedContext(cfg.width),
                "text": lambda: TextContext(cfg.text_dim, cfg.width)}[cfg.semantics]()

    def condition(self, i: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        ctx = self.y_embedder(cond, self.dtype)                                 # (B or 1, L, D)
        return self.time(i, cond).to(self.dtype), ctx.expand(len(i), -1, -1)


class DiTAtt(MMDiT):
    """[COND] table A1, DiT by attention: class or learned token joins the image's in self-attention."""
    Block = DiTAttBlock


class SD3(MMDiT):
    """[SD3] fig. 2: mmDiT as published, with a second full stream for context; without the pooled text, as [COND]."""
    Block = SD3Block


ARCHS: dict[str, type[Denoiser]] = {"dit": DiT, "mmdit": MMDiT, "ditatt": DiTAtt, "sd3": SD3}


def position_table(cfg: ModelConfig, h: int, w: int) -> Tensor:
    """[COND] sec. 2.3: what tells h x w patches apart; cfg.positions says how it follows the resolution. (h w, D)"""
    return POSITIONS[cfg.positions](h, w, cfg.width, cfg.base or cfg.resolution // cfg.patch)


def zero_layers(net: nn.Module) -> list[nn.Linear]:
    """The layers that start at zero: every modulation, the output, the end of every control MLP."""
    ends = [m[1] for name, m in net.named_modules() if name.endswith("adaLN_modulation")]
    ends += [mlp[2] for mlp in net.control_embedder.mlps.values()] if net.control_embedder is not None else []
    return ends + [net.final_layer.linear]


# ---------------------------------------------------------------- building, loading, counting

def control_names(cfg: ModelConfig) -> tuple[str, ...]:
    """The controls of a config ("crop+flip") in the order in which a Condition lists them."""
    asked = [c for c in cfg.controls.split("+") if c]
    if unknown := [c for c in asked if c not in CONTROLS]:
        raise UserError(f"model.controls={cfg.controls!r} names {unknown[0]!r}; there are {', '.join(CONTROLS)}")
    return tuple(c for c in CONTROLS if c in asked)


def check(cfg: ModelConfig) -> None:
    """UserError for a model that cannot be built, with the value and what would do."""
    if cfg.arch not in ARCHS:
        raise UserError(f"unknown model.arch={cfg.arch!r}; there are {', '.join(ARCHS)}")
    if cfg.semantics not in ("none", "class", "text"):
        raise UserError(f"unknown model.semantics={cfg.semantics!r}; there are none, class, text")
    if cfg.arch in ("dit", "ditatt") and cfg.semantics == "text":
        raise UserError(f"model.arch={cfg.arch!r} takes a class or nothing; for text use model.arch='mmdit' or 'sd3'")
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


def block_products(arch: str, last: bool, D: int, N: int, L: int) -> int:
    """Multiply-adds of one block: modulation, then the layers on N image and L context tokens, then q k^T and a v."""
    M, Q = N + L, N if last else N + L                      # keys; queries, in blocks whose last drops context's
    return {
        "dit": 6 * D * D + 12 * N * D * D + 2 * N * N * D,
        "mmdit": 6 * D * D + (12 * N + (2 if last else 4) * L) * D * D + 2 * Q * M * D,
        "ditatt": (8 if last else 9) * D * D + (12 * N + 4 * L) * D * D + 2 * M * M * D,
        "sd3": (8 if last else 12) * D * D + (12 * N + (2 if last else 12) * L) * D * D + 2 * Q * M * D,
    }[arch]


def flops(cfg: ModelConfig, h: int | None = None, w: int | None = None) -> int:
    """FLOPs of one forward pass of one image, two for every multiply-add of a matrix product, nothing else counted.

    DiT    2 [ depth (12 D^2 N + 2 N^2 D + 6 D^2) + N D P^2 2 C + 2 D^2 + (256 + D) D ]
    Others have context tokens besides, in their blocks and in the layers that make them; controls add an MLP a group.
    A training step costs three of these, sampling costs steps x passes."""
    D, N = cfg.width, ((h or cfg.resolution) // cfg.patch) * ((w or cfg.resolution) // cfg.patch)
    L = {"none": 1, "class": 1, "text": cfg.text_length}[cfg.semantics]
    mac = sum(block_products(cfg.arch, k == cfg.depth - 1, D, N, L) for k in range(cfg.depth))
    mac += 2 * N * D * cfg.patch ** 2 * cfg.channels + 2 * D * D + (256 + D) * D
    if cfg.arch != "dit":
        mac += {"none": 0, "class": 2 * D * D, "text": L * D * (cfg.text_dim + D)}[cfg.semantics]
    groups = [sum(CONTROLS[c] for c in control_names(cfg) if (c in LOW_LEVEL) == low) for low in (False, True)]
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


if __name__ == "__main__":
    if sys.argv[1:] != ["--table"]:
        sys.exit(__doc__)
    print(table(), table_a1(), sep="\n\n")
