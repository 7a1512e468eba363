"""The denoiser's trunk, for every kind of block (blocks.py, mp_blocks.py). net(x_t, i, cond) -> eps

Dimensions: B batch, N = h w image tokens, L context tokens, D width, H heads, C channels, P patch, T noise steps.
"""
from functools import partial

import torch
from torch import Tensor, nn

from blocks import DiTAttBlock, DiTBlock, FinalLayer, MMDiTBlock, PatchEmbed, SD3Block
from conditioning import (CONTROLS, ClassContext, Condition, ControlEmbedding, LabelEmbedder, LearnedContext,
                          MPClassContext, MPControlEmbedding, MPLabelEmbedder, MPLearnedContext, MPTextContext,
                          MPTimestepEmbedder, TextContext, TimestepEmbedder, interpolate_2d, sincos_2d)
from config import ModelConfig, UserError
from mp_blocks import MPDiTBlock, MPFinalLayer, MPMMDiTBlock, MPPatchEmbed
from mp_layers import BOTH, FULL, LAYOUT, PRESERVE, mp_sum, normalize
from schedule import alpha_bar_table, to_sigma, velocity_to_eps

POSITIONS = {                           # (h, w, D, base) -> (h w, D), base in patches a side
    "grid": lambda h, w, D, base: sincos_2d(h, w, D),
    "resample": sincos_2d,
    "interpolate": interpolate_2d,
}


# ---------------------------------------------------------------- lists in a config

def names(cfg: ModelConfig, key: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """What the field `key` of a config lists ("crop+flip"), in the order of `known`. UserError for another name."""
    asked = [name for name in getattr(cfg, key).split("+") if name]
    if unknown := [name for name in asked if name not in known]:
        raise UserError(f"model.{key}={getattr(cfg, key)!r} names {unknown[0]!r}; there are {', '.join(known)}")
    return tuple(name for name in known if name in asked)


def control_names(cfg: ModelConfig) -> tuple[str, ...]:
    """The controls of a config in the order in which a Condition lists them."""
    return names(cfg, "controls", tuple(CONTROLS))


def modulation_parts(cfg: ModelConfig) -> tuple[str, ...]:
    """What time and class do to a sub-layer, in the order of their weights."""
    return names(cfg, "modulation", tuple(LAYOUT))


def preserved(cfg: ModelConfig) -> tuple[str, ...]:
    """The magnitude-preserving changes of a network of an MP arch: all of [MAG]'s unless the config says which."""
    return FULL if not cfg.preserve else () if cfg.preserve == "none" else names(cfg, "preserve", PRESERVE)


# ---------------------------------------------------------------- trunk

class Denoiser(nn.Module):
    """The trunk: patches and positions in, blocks, patches out. x_t (B, C, h P, w P), i (B,) index -> eps like x_t

    `dtype` is the type in which the tokens are computed; weights, angles and the returned eps stay fp32."""
    Block: type[nn.Module]

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg, self.dtype = cfg, torch.float32
        grid = cfg.resolution // cfg.patch
        self.make(cfg)
        self.register_buffer("pos_embed", position_table(cfg, grid, grid), persistent=False)
        table = alpha_bar_table(cfg.schedule, cfg.noise_steps, cfg.rescale).float()
        self.register_buffer("alpha_bar", table, persistent=False)              # (T,)
        self.initialize()

    def make(self, cfg: ModelConfig) -> None:
        """The layers, in the order in which their weights are drawn."""
        D, P, parts = cfg.width, cfg.patch, modulation_parts(cfg)
        self.x_embedder = PatchEmbed(cfg.channels, P, D)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = self.semantics(cfg)
        self.control_embedder = control_embedding(ControlEmbedding, cfg)
        self.blocks = nn.ModuleList(self.Block(D, cfg.heads, k == cfg.depth - 1, parts) for k in range(cfg.depth))
        self.final_layer = FinalLayer(D, P, cfg.channels, parts)

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
        for layer in self.zero_layers():
            nn.init.zeros_(layer.weight)

    def zero_layers(self) -> list[nn.Module]:
        """The layers that start at zero: every modulation, the output, the end of every control MLP."""
        ends = [m[1] for name, m in self.named_modules() if name.endswith("adaLN_modulation")]
        ends += [mlp[2] for mlp in self.control_embedder.mlps.values()] if self.control_embedder is not None else []
        return ends + [self.final_layer.linear]

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

    def embed(self, x_t: Tensor, h: int, w: int) -> Tensor:
        """Patches and where they are. (B, C, h P, w P) -> (B, h w, D)"""
        return self.x_embedder(x_t.to(self.dtype)) + self.positions(h, w).to(self.dtype)

    def forward(self, x_t: Tensor, i: Tensor, cond: Condition) -> Tensor:
        h, w = (n // self.cfg.patch for n in x_t.shape[2:])
        x = self.embed(x_t, h, w)                                               # (B, N, D)
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


# ---------------------------------------------------------------- the magnitude-preserving trunk

class MPDenoiser(Denoiser):
    """[MAG]: the trunk out of layers that preserve magnitude, as many of them as cfg.preserve says. c stays in fp32.

    x_t has magnitude 1 at every noise level where pictures have: standardised latents do. No layer is initialised
    here: each draws its own weights."""

    def make(self, cfg: ModelConfig) -> None:
        """The layers, in the order in which their weights are drawn."""
        D, P, parts, preserve = cfg.width, cfg.patch, modulation_parts(cfg), preserved(cfg)
        self.x_embedder = MPPatchEmbed(cfg.channels, P, D, preserve)
        self.t_embedder = MPTimestepEmbedder(D, cfg.noise_steps, preserve)
        self.y_embedder = self.semantics(cfg)
        self.control_embedder = control_embedding(MPControlEmbedding, cfg)
        last = cfg.depth - 1
        self.blocks = nn.ModuleList(self.Block(D, cfg.heads, k == last, parts, preserve) for k in range(cfg.depth))
        self.final_layer = MPFinalLayer(D, P, cfg.channels, parts, preserve)
        self.stream = "stream" in preserve
        self.join = partial(mp_sum, t=BOTH) if self.stream else torch.add

    def initialize(self) -> None:
        """Nothing but a class table that is not of unit rows: 0.02, as in [DiT]."""
        for m in self.modules():
            if isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight, std=0.02)

    def zero_layers(self) -> list[nn.Module]:
        """The layers that start at zero: every modulation, the output, the end of every control MLP."""
        return [m for m in self.modules() if getattr(m, "zero", False)]

    def embed(self, x_t: Tensor, h: int, w: int) -> Tensor:
        """Patches and where they are, as much of one as of the other. (B, C, h P, w P) -> (B, h w, D)"""
        where = normalize(self.positions(h, w)) if self.stream else self.positions(h, w)
        return self.join(self.x_embedder(x_t.to(self.dtype)), where.to(self.dtype))

    def time(self, i: Tensor, cond: Condition) -> Tensor:
        """The time vector, that of the class (where it has no tokens), then the controls. (B, D)"""
        c = self.t_embedder(i)
        if isinstance(self.y_embedder, LabelEmbedder):
            c = self.join(c, self.y_embedder(cond.label))
        if self.control_embedder is not None:
            c = self.control_embedder(c, cond, i / (self.cfg.noise_steps - 1))
        return c


class MPDiT(MPDenoiser):
    """[MAG]: DiT's twin. c = mp_sum(time, class, 0.5)."""
    Block = MPDiTBlock

    @staticmethod
    def semantics(cfg: ModelConfig) -> nn.Module | None:
        table = MPLabelEmbedder if "stream" in preserved(cfg) else LabelEmbedder
        return {"class": lambda: table(cfg.classes, cfg.width), "none": lambda: None}[cfg.semantics]()

    def condition(self, i: Tensor, cond: Condition) -> tuple[Tensor, None]:
        return self.time(i, cond), None


class MPMMDiT(MPDenoiser):
    """mmDiT's twin: the class or the caption enters as tokens of unit magnitude; time and controls modulate."""
    Block = MPMMDiTBlock

    @staticmethod
    def semantics(cfg: ModelConfig) -> nn.Module:
        return {"class": lambda: MPClassContext(cfg.classes, cfg.width), "none": lambda: MPLearnedContext(cfg.width),
                "text": lambda: MPTextContext(cfg.text_dim, cfg.width)}[cfg.semantics]()

    def condition(self, i: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        return self.time(i, cond), self.y_embedder(cond, self.dtype).expand(len(i), -1, -1).contiguous()


ARCHS: dict[str, type[Denoiser]] = {"dit": DiT, "mmdit": MMDiT, "ditatt": DiTAtt, "sd3": SD3, "mpdit": MPDiT,
                                    "mpmmdit": MPMMDiT}


def control_embedding(kind: type[ControlEmbedding], cfg: ModelConfig) -> ControlEmbedding | None:
    """What reads the controls of a config, if it has any."""
    if not (controls := control_names(cfg)):
        return None
    sigma = to_sigma(alpha_bar_table(cfg.schedule, cfg.noise_steps)).float()    # gamma_c is of i: no rescale
    return kind(controls, cfg.width, cfg.control_weight, cfg.control_alpha, sigma)


def position_table(cfg: ModelConfig, h: int, w: int) -> Tensor:
    """[COND] sec. 2.3: what tells h x w patches apart; cfg.positions says how it follows the resolution. (h w, D)"""
    return POSITIONS[cfg.positions](h, w, cfg.width, cfg.base or cfg.resolution // cfg.patch)
