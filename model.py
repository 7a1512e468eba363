"""Denoisers net(x_t, i, cond) -> eps: one trunk and one small class a block, plain and magnitude preserving.

net = build(ModelConfig(arch="mmdit", semantics="text", text_dim=24, text_length=16))
net, cfg = load("out/shapes")

To add an architecture, add a class, which says what semantics and options it takes, and a row of ARCHS.
Dimensions: B batch, N = h w image tokens, L context tokens, D width, H heads, C channels, P patch, T noise steps.
"""
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conditioning import (CONTROLS, CONTROL_WEIGHTS, ClassContext, Condition, ControlEmbedding, LabelEmbedder,
                          MPControlEmbedding, MPTimestepEmbedder, TextContext, TimestepEmbedder, UnconditionalContext,
                          interpolate_2d, sincos_2d)
from config import Config, ModelConfig, UserError, from_json
from layers import (ADALN, MLP, MLP_RATIO, MODULATION_PARTS, Attention, CrossAttention, DualStreamAttention, FinalLayer,
                    JointAttention, Linear, PatchEmbed, QKNormAttention, gated_residual, input_parts, modulate,
                    modulation, modulation_width, norm, split_modulation, unpatchify)
from mp_layers import (EMBED_BALANCE, FULL, MP_FEATURES, MPMLP, RES_BALANCE, MPAttention, MPFinalLayer,
                       MPJointAttention, MPModulation, MPPatchEmbed, identity, mp_gated_residual, mp_sum, normalize)
from runtime import checkpoint
from schedule import PREDICTIONS, SCHEDULES, alpha_bar_table, to_sigma

SEMANTICS = ("none", "class", "text")
OPTIONS = ("mp",)                       # fields of ModelConfig for the architectures whose class lists them
POSITIONS = {                           # (h, w, D, base) -> (h w, D), base in patches a side
    "grid": lambda h, w, D, base: sincos_2d(h, w, D),
    "resample": sincos_2d,
    "interpolate": interpolate_2d,
}


# ---------------------------------------------------------------- lists in a config

def parse_list(cfg: ModelConfig, key: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Split field `key` of a config ("crop+flip"), in the order of `known`. UserError for an unknown name."""
    listed = [name for name in getattr(cfg, key).split("+") if name]
    if unknown := [name for name in listed if name not in known]:
        raise UserError(f"model.{key}={getattr(cfg, key)!r} names {unknown[0]!r}; there are {', '.join(known)}")
    return tuple(name for name in known if name in listed)


def control_names(cfg: ModelConfig) -> tuple[str, ...]:
    """The controls of a config, in the order of CONTROLS."""
    return parse_list(cfg, "controls", tuple(CONTROLS))


def modulation_parts(cfg: ModelConfig) -> tuple[str, ...]:
    """The parts of every modulation, in the order of their weights."""
    return parse_list(cfg, "modulation", tuple(MODULATION_PARTS))


def mp_features(cfg: ModelConfig) -> tuple[str, ...]:
    """The magnitude-preserving parts of an mp architecture: all of [MAG]'s unless the config lists some."""
    return FULL if not cfg.mp else () if cfg.mp == "none" else parse_list(cfg, "mp", MP_FEATURES)


# ---------------------------------------------------------------- blocks

# Block(D, H, last, parts), forward(x, ctx, c) -> x, ctx: x (B, N, D) image tokens, ctx (B, L, D) context tokens,
# c (B, D) modulates by `parts` of MODULATION_PARTS. `last`: context stays as it is, so no weights update it.

class DiTBlock(nn.Module):
    """[DiT] fig. 3, adaLN-Zero: attention and MLP, each shifted, scaled and gated by c."""
    def __init__(self, D: int, H: int, last: bool, parts: tuple[str, ...] = ADALN) -> None:
        super().__init__()
        self.groups = parts, parts
        self.attn = Attention(D, H)
        self.mlp = MLP(D)
        self.adaLN_modulation = modulation(D, *self.groups)

    def forward(self, x: Tensor, ctx: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, m = split_modulation(self.adaLN_modulation(c), *self.groups)
        x = gated_residual(x, a, self.attn(modulate(norm(x), a)))
        return gated_residual(x, m, self.mlp(modulate(norm(x), m))), ctx


class MPDiTBlock(nn.Module):
    """[MAG] the counterpart of DiTBlock: x <- mp_sum(x, (1 + gate) attn(R (x (1 + scale) + shift))), then the MLP."""
    def __init__(self, D: int, H: int, last: bool, parts: tuple[str, ...] = ADALN, mp: tuple[str, ...] = FULL) -> None:
        super().__init__()
        self.norm, self.add = (identity, mp_gated_residual) if "stream" in mp else (norm, gated_residual)
        self.attn = MPAttention(D, H, mp)
        self.mlp = MPMLP(D, MLP_RATIO * D, D, mp)
        self.attn_modulation = MPModulation(D, parts, mp)
        self.mlp_modulation = MPModulation(D, parts, mp)

    def forward(self, x: Tensor, ctx: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, m = self.attn_modulation(c), self.mlp_modulation(c)
        x = self.add(x, a, self.attn(modulate(self.norm(x), a)))
        return self.add(x, m, self.mlp(modulate(self.norm(x), m))), ctx


class DiTAttBlock(nn.Module):
    """[COND] table A1, DiT by attention: the class is one more token of the attention of DiTBlock.

    c gives the class token a shift, scale and gate of its own; it has no MLP. `last`: no gate."""
    def __init__(self, D: int, H: int, last: bool, parts: tuple[str, ...] = ADALN) -> None:
        super().__init__()
        self.last = last
        self.groups = parts, parts, input_parts(parts) if last else parts
        self.attn = QKNormAttention(D, H)
        self.mlp = MLP(D)
        self.adaLN_modulation = modulation(D, *self.groups)

    def forward(self, x: Tensor, ctx: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, m, a_ctx = split_modulation(self.adaLN_modulation(c), *self.groups)
        tokens = self.attn(torch.cat([modulate(norm(ctx), a_ctx), modulate(norm(x), a)], 1))      # (B, L+N, D)
        x = gated_residual(x, a, tokens[:, ctx.shape[1]:])
        x = gated_residual(x, m, self.mlp(modulate(norm(x), m)))
        return x, ctx if self.last else gated_residual(ctx, a_ctx, tokens[:, :ctx.shape[1]])


class MMDiTBlock(nn.Module):
    """[COND] sec. 2, the block that its parameter counts suggest: DiTBlock with joint attention.

    Context is normalised, not modulated; attention alone updates it."""
    def __init__(self, D: int, H: int, last: bool, parts: tuple[str, ...] = ADALN) -> None:
        super().__init__()
        self.last = last
        self.groups = parts, parts
        self.attn = JointAttention(D, H, last)
        self.mlp = MLP(D)
        self.adaLN_modulation = modulation(D, *self.groups)

    def forward(self, x: Tensor, ctx: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, m = split_modulation(self.adaLN_modulation(c), *self.groups)
        out, out_ctx = self.attn(modulate(norm(x), a), norm(ctx))
        x = gated_residual(x, a, out)
        x = gated_residual(x, m, self.mlp(modulate(norm(x), m)))
        return x, ctx if self.last else ctx + out_ctx


class MPMMDiTBlock(nn.Module):
    """The counterpart of MMDiTBlock: MPDiTBlock with joint cosine attention, which alone updates context, by mp_sum.

    It preserves magnitude throughout; `mp` may only add heads."""
    def __init__(self, D: int, H: int, last: bool, parts: tuple[str, ...] = ADALN, mp: tuple[str, ...] = FULL) -> None:
        super().__init__()
        self.last = last
        self.attn = MPJointAttention(D, H, last, mp)
        self.mlp = MPMLP(D, MLP_RATIO * D, D, mp)
        self.attn_modulation = MPModulation(D, parts, mp)
        self.mlp_modulation = MPModulation(D, parts, mp)

    def forward(self, x: Tensor, ctx: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, m = self.attn_modulation(c), self.mlp_modulation(c)
        out, out_ctx = self.attn(modulate(x, a), ctx)
        x = mp_gated_residual(x, a, out)
        x = mp_gated_residual(x, m, self.mlp(modulate(x, m)))
        return x, ctx if self.last else mp_sum(ctx, out_ctx, RES_BALANCE)


class SD3Block(nn.Module):
    """[SD3] fig. 2, mmDiT as published: context, a second stream, has its own modulation, projections and MLP.

    `last`: context is modulated for its k and v, and ends there."""
    def __init__(self, D: int, H: int, last: bool, parts: tuple[str, ...] = ADALN) -> None:
        super().__init__()
        self.last = last
        self.groups, self.ctx_groups = (parts, parts), (input_parts(parts),) if last else (parts, parts)
        self.attn = DualStreamAttention(D, H, last)
        self.mlp = MLP(D)
        self.ctx_mlp = None if last else MLP(D)
        self.adaLN_modulation = modulation(D, *self.groups)
        self.ctx_adaLN_modulation = modulation(D, *self.ctx_groups)

    def forward(self, x: Tensor, ctx: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, m = split_modulation(self.adaLN_modulation(c), *self.groups)
        a_ctx, *m_ctx = split_modulation(self.ctx_adaLN_modulation(c), *self.ctx_groups)
        out, out_ctx = self.attn(modulate(norm(x), a), modulate(norm(ctx), a_ctx))
        x = gated_residual(x, a, out)
        x = gated_residual(x, m, self.mlp(modulate(norm(x), m)))
        if self.last:
            return x, ctx
        ctx = gated_residual(ctx, a_ctx, out_ctx)
        return x, gated_residual(ctx, *m_ctx, self.ctx_mlp(modulate(norm(ctx), *m_ctx)))


class PixArtBlock(nn.Module):
    """[PIXART] fig. 4, adaLN-single: DiTBlock with cross-attention to context between attention and MLP.

    A modulation t that all blocks share (B, all parts) plus the block's own table modulates attention and MLP; nothing
    modulates, normalises or gates the cross-attention, and nothing updates context. `one`: as in CrossAttention."""
    def __init__(self, D: int, H: int, last: bool, parts: tuple[str, ...] = ADALN, one: bool = False) -> None:
        super().__init__()
        self.groups = parts, parts
        self.table = nn.Parameter(torch.randn(2 * modulation_width(parts, D)) / D ** 0.5)
        self.attn = QKNormAttention(D, H)
        self.cross_attn = CrossAttention(D, H, one)
        self.mlp = MLP(D)

    def forward(self, x: Tensor, ctx: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a, m = split_modulation(t + self.table.to(t.dtype), *self.groups)
        x = gated_residual(x, a, self.attn(modulate(norm(x), a)))
        x = x + self.cross_attn(x, ctx)
        return gated_residual(x, m, self.mlp(modulate(norm(x), m))), ctx


class PixArtFinalLayer(nn.Module):
    """[PIXART] FinalLayer modulated by a table plus c itself. (B, h w, D) -> (B, C, h P, w P)"""
    def __init__(self, D: int, P: int, C: int, parts: tuple[str, ...] = ADALN) -> None:
        super().__init__()
        self.P, self.parts = P, input_parts(parts)
        self.table = nn.Parameter(torch.randn(modulation_width(self.parts, D)) / D ** 0.5)
        self.linear = Linear(D, P * P * C)

    def forward(self, x: Tensor, c: Tensor, h: int, w: int) -> Tensor:
        m, = split_modulation(c.repeat(1, len(self.parts)) + self.table.to(c.dtype), self.parts)
        return unpatchify(self.linear(modulate(norm(x), m)), self.P, h, w)


# ---------------------------------------------------------------- trunk

class Denoiser(nn.Module):
    """The trunk: embed patches, run `blocks`, map to patches. x_t (B, C, h P, w P), i (B,) index -> eps like x_t

    `semantics` and `options` (of OPTIONS): what the architecture takes. `dtype`: the type of the tokens; weights,
    angles and eps stay fp32."""
    Block: type[nn.Module]
    Final: type[nn.Module] = FinalLayer
    semantics: tuple[str, ...] = SEMANTICS
    options: tuple[str, ...] = ()

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg, self.dtype = cfg, torch.float32
        grid = cfg.resolution // cfg.patch
        self.build_layers(cfg)
        self.register_buffer("pos_embed", position_table(cfg, grid, grid), persistent=False)
        table = alpha_bar_table(cfg.schedule, cfg.timesteps, cfg.sigma_scale).float()
        self.register_buffer("alpha_bar", table, persistent=False)              # (T,)
        self.initialize()

    @staticmethod
    def check_options(cfg: ModelConfig) -> None:
        """Raise a UserError for values that this architecture cannot combine."""

    def build_layers(self, cfg: ModelConfig) -> None:
        """Build the layers; their order decides which random weights each gets."""
        D, P = cfg.width, cfg.patch
        self.x_embedder = PatchEmbed(cfg.channels, P, D)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = self.make_y_embedder(cfg)
        self.control_embedder = make_control_embedder(ControlEmbedding, cfg)
        self.blocks = nn.ModuleList(self.make_block(cfg, k == cfg.depth - 1) for k in range(cfg.depth))
        self.final_layer = self.Final(D, P, cfg.channels, modulation_parts(cfg))

    def make_block(self, cfg: ModelConfig, last: bool) -> nn.Module:
        """Build one block."""
        return self.Block(cfg.width, cfg.heads, last, modulation_parts(cfg))

    @staticmethod
    def make_y_embedder(cfg: ModelConfig) -> nn.Module | None:
        """Build what embeds the class or the caption."""
        return make_context(cfg, mp=False)

    def embed_condition(self, i: Tensor, cond: Condition) -> tuple[Tensor, Tensor | None]:
        """Return c (B, D), which modulates the blocks, and ctx (B, L, D), to which they attend."""
        ctx = self.y_embedder(cond, self.dtype)                                 # (B or 1, L, D)
        return self.time(i, cond).to(self.dtype), ctx.expand(len(i), -1, -1)

    def initialize(self) -> None:
        """[DiT] sec. 3.2: Xavier for linear layers, deviation 0.02 for the class table, zero for zero_init_layers."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.view(m.weight.shape[0], -1))
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight, std=0.02)
        for layer in self.zero_init_layers():
            nn.init.zeros_(layer.weight)

    def zero_init_layers(self) -> list[nn.Module]:
        """The layers that start at zero: every modulation, the output, the last layer of every control MLP."""
        ends = [m[1] for name, m in self.named_modules() if name.endswith("adaLN_modulation")]
        ends += [mlp[2] for mlp in self.control_embedder.mlps.values()] if self.control_embedder is not None else []
        return ends + [self.final_layer.linear]

    def time(self, i: Tensor, cond: Condition) -> Tensor:
        """[COND] eq. 1: MLP(sinusoid(i)) plus the controls. (B, D)"""
        c = self.t_embedder(i)
        if self.control_embedder is not None:
            c = c + self.control_embedder(cond, i / (self.cfg.timesteps - 1))
        return c

    def for_blocks(self, c: Tensor) -> Tensor:
        """What every block gets of c (B, D)."""
        return c

    def positions(self, h: int, w: int) -> Tensor:
        """The stored table at the training resolution, a new one for any other grid. (h w, D)"""
        grid = self.cfg.resolution // self.cfg.patch
        return self.pos_embed if (h, w) == (grid, grid) else position_table(self.cfg, h, w).to(self.pos_embed)

    def embed(self, x_t: Tensor, h: int, w: int) -> Tensor:
        """Embed patches and add their positions. (B, C, h P, w P) -> (B, h w, D)"""
        return self.x_embedder(x_t.to(self.dtype)) + self.positions(h, w).to(self.dtype)

    def forward(self, x_t: Tensor, i: Tensor, cond: Condition) -> Tensor:
        h, w = (n // self.cfg.patch for n in x_t.shape[2:])
        x = self.embed(x_t, h, w)                                               # (B, N, D)
        c, ctx = self.embed_condition(i, cond)
        m = self.for_blocks(c)
        for block in self.blocks:
            x, ctx = block(x, ctx, m)
        out = self.final_layer(x, c, h, w).float()                              # (B, C, h P, w P)
        return PREDICTIONS[self.cfg.prediction](out, x_t, self.alpha_bar[i.long()])


class DiT(Denoiser):
    """[DiT]: the class joins the time vector and modulates. State dict as in the official weights."""
    Block = DiTBlock
    semantics = ("none", "class")

    @staticmethod
    def make_y_embedder(cfg: ModelConfig) -> LabelEmbedder | None:
        return LabelEmbedder(cfg.classes, cfg.width) if cfg.semantics == "class" else None

    def embed_condition(self, i: Tensor, cond: Condition) -> tuple[Tensor, None]:
        c = self.time(i, cond)
        if self.y_embedder is not None:
            c = c + self.y_embedder(cond.label)
        return c.to(self.dtype), None


class MMDiT(Denoiser):
    """[COND] sec. 2: the image attends to the class or the caption as tokens; time alone modulates."""
    Block = MMDiTBlock


class DiTAtt(Denoiser):
    """[COND] table A1, DiT by attention: a class token or a learned one joins the self-attention of the image."""
    Block = DiTAttBlock
    semantics = ("none", "class")


class SD3(Denoiser):
    """[SD3] fig. 2: mmDiT as published, with a second full stream for context; without the pooled text, as [COND]."""
    Block = SD3Block


class PixArt(Denoiser):
    """[PIXART]: cross-attention to the class or the caption; one modulation of time and controls for all blocks."""
    Block, Final = PixArtBlock, PixArtFinalLayer

    @staticmethod
    def check_options(cfg: ModelConfig) -> None:
        if "rotate" in modulation_parts(cfg):
            raise UserError(f"model.modulation={cfg.modulation!r}: model.arch={cfg.arch!r} takes no rotate, only "
                            "shift, scale and gate")

    def build_layers(self, cfg: ModelConfig) -> None:
        super().build_layers(cfg)
        self.shared_modulation = modulation(cfg.width, modulation_parts(cfg), modulation_parts(cfg))

    def make_block(self, cfg: ModelConfig, last: bool) -> PixArtBlock:
        one = cfg.semantics != "text" or cfg.text_length == 1
        return PixArtBlock(cfg.width, cfg.heads, last, modulation_parts(cfg), one)

    def initialize(self) -> None:
        """Gates are not zero at first: only the cross-attention and the output are."""
        super().initialize()
        nn.init.normal_(self.shared_modulation[1].weight, std=0.02)

    def zero_init_layers(self) -> list[nn.Module]:
        return [block.cross_attn.proj for block in self.blocks] + super().zero_init_layers()

    def for_blocks(self, c: Tensor) -> Tensor:
        return self.shared_modulation(c)


# ---------------------------------------------------------------- the magnitude-preserving trunk

class MPDenoiser(Denoiser):
    """[MAG]: the trunk of layers that preserve magnitude, as far as cfg.mp says (mp_layers.py). c stays in fp32.

    x_t has magnitude 1 at every noise level if images have; standardised latents do."""
    options = ("mp",)

    @staticmethod
    def check_options(cfg: ModelConfig) -> None:
        mp = mp_features(cfg)
        if "stream" in mp and "weights" not in mp:
            raise UserError(f"model.mp={cfg.mp!r}: stream, without a norm between layers, needs weights")
        if control_names(cfg) and "stream" not in mp:
            raise UserError(f"model.controls={cfg.controls!r} of model.arch={cfg.arch!r} needs stream, got "
                            f"model.mp={cfg.mp!r}")

    def build_layers(self, cfg: ModelConfig) -> None:
        D, P, mp = cfg.width, cfg.patch, mp_features(cfg)
        self.x_embedder = MPPatchEmbed(cfg.channels, P, D, mp)
        self.t_embedder = MPTimestepEmbedder(D, cfg.timesteps, mp)
        self.y_embedder = self.make_y_embedder(cfg)
        self.control_embedder = make_control_embedder(MPControlEmbedding, cfg)
        self.blocks = nn.ModuleList(self.make_block(cfg, k == cfg.depth - 1) for k in range(cfg.depth))
        self.final_layer = MPFinalLayer(D, P, cfg.channels, modulation_parts(cfg), mp)
        self.stream = "stream" in mp
        self.join = partial(mp_sum, t=EMBED_BALANCE) if self.stream else torch.add

    def make_block(self, cfg: ModelConfig, last: bool) -> nn.Module:
        return self.Block(cfg.width, cfg.heads, last, modulation_parts(cfg), mp_features(cfg))

    def initialize(self) -> None:
        """Layers draw their own weights; only a class table without unit rows needs [DiT]'s deviation, 0.02."""
        for m in self.modules():
            if isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight, std=0.02)

    def zero_init_layers(self) -> list[nn.Module]:
        return [m for m in self.modules() if getattr(m, "zero", False)]

    def embed(self, x_t: Tensor, h: int, w: int) -> Tensor:
        """Join patches and positions by equal weights. (B, C, h P, w P) -> (B, h w, D)"""
        positions = normalize(self.positions(h, w)) if self.stream else self.positions(h, w)
        return self.join(self.x_embedder(x_t.to(self.dtype)), positions.to(self.dtype))

    def time(self, i: Tensor, cond: Condition) -> Tensor:
        """Join the vectors of time, of the class (if it has no token) and of the controls. (B, D)"""
        c = self.t_embedder(i)
        if isinstance(self.y_embedder, LabelEmbedder):
            c = self.join(c, self.y_embedder(cond.label))
        if self.control_embedder is not None:
            c = self.control_embedder(c, cond, i / (self.cfg.timesteps - 1))
        return c


class MPDiT(MPDenoiser):
    """[MAG]: the counterpart of DiT. c = mp_sum(time, class, 0.5)."""
    Block = MPDiTBlock
    semantics = ("none", "class")

    @staticmethod
    def make_y_embedder(cfg: ModelConfig) -> LabelEmbedder | None:
        stream = "stream" in mp_features(cfg)
        return LabelEmbedder(cfg.classes, cfg.width, mp=stream) if cfg.semantics == "class" else None

    def embed_condition(self, i: Tensor, cond: Condition) -> tuple[Tensor, None]:
        return self.time(i, cond), None


class MPMMDiT(MPDenoiser):
    """The counterpart of MMDiT: class or caption are tokens of unit magnitude; time and controls modulate."""
    Block = MPMMDiTBlock

    @staticmethod
    def check_options(cfg: ModelConfig) -> None:
        MPDenoiser.check_options(cfg)
        if not {*FULL} <= {*mp_features(cfg)}:
            raise UserError(f"model.mp={cfg.mp!r}: model.arch={cfg.arch!r} needs all of {'+'.join(FULL)}")

    @staticmethod
    def make_y_embedder(cfg: ModelConfig) -> nn.Module:
        return make_context(cfg, mp=True)

    def embed_condition(self, i: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        return self.time(i, cond), self.y_embedder(cond, self.dtype).expand(len(i), -1, -1).contiguous()


def make_context(cfg: ModelConfig, mp: bool) -> nn.Module:
    """Build what turns the class or the caption into context tokens, magnitude preserving or not."""
    if cfg.semantics == "text":
        return TextContext(cfg.text_dim, cfg.width, mp)
    return ClassContext(cfg.classes, cfg.width, mp) if cfg.semantics == "class" else UnconditionalContext(cfg.width, mp)


def make_control_embedder(kind: type[ControlEmbedding], cfg: ModelConfig) -> ControlEmbedding | None:
    """Build what embeds the controls of a config; None without controls."""
    if not (controls := control_names(cfg)):
        return None
    sigma = to_sigma(alpha_bar_table(cfg.schedule, cfg.timesteps)).float()      # unscaled: gamma_c is a function of i
    return kind(controls, cfg.width, cfg.control_weight, cfg.control_alpha, sigma)


def position_table(cfg: ModelConfig, h: int, w: int) -> Tensor:
    """[COND] sec. 2.2: the position vectors of h x w patches, by cfg.positions. (h w, D)"""
    return POSITIONS[cfg.positions](h, w, cfg.width, cfg.pos_base or cfg.resolution // cfg.patch)


# ---------------------------------------------------------------- building, loading, counting

# A class, or "module:Class" for a network whose trunk differs. Like Denoiser, each has `semantics`, `options` and
# `check_options`; docs/extending.md has an example of each kind.
ARCHS: dict[str, type[nn.Module] | str] = {
    "dit": DiT, "mmdit": MMDiT, "ditatt": DiTAtt, "sd3": SD3, "pixart": PixArt, "mpdit": MPDiT, "mpmmdit": MPMMDiT}


def arch_class(arch: str) -> type[nn.Module]:
    """Return the class of a row of ARCHS; import a "module:Class"."""
    row = ARCHS[arch]
    if isinstance(row, str):
        module, _, name = row.partition(":")
        return getattr(import_module(module), name)
    return row


def check(cfg: ModelConfig) -> None:
    """Raise a UserError for a model that cannot be built."""
    for key, known in (("arch", ARCHS), ("semantics", SEMANTICS), ("schedule", SCHEDULES),
                       ("prediction", PREDICTIONS), ("positions", POSITIONS)):
        if getattr(cfg, key) not in known:
            raise UserError(f"unknown model.{key}={getattr(cfg, key)!r}; there are {', '.join(known)}")
    check_arch(cfg)
    for key, least in (*((key, 1) for key in ("width", "depth", "heads", "patch", "channels", "resolution")),
                       ("timesteps", 2), ("pos_base", 0)):
        if getattr(cfg, key) < least:
            raise UserError(f"model.{key}={getattr(cfg, key)} must be at least {least}")
    for key, by in (("resolution", "patch"), ("width", "heads")):
        if getattr(cfg, key) % getattr(cfg, by):
            raise UserError(f"model.{key}={getattr(cfg, key)} is not divisible by model.{by}={getattr(cfg, by)}")
    if cfg.width % 4:
        raise UserError(f"model.width={cfg.width} is not divisible by 4, which sine-cosine positions need")
    for key in {"none": (), "class": ("classes",), "text": ("text_dim", "text_length")}[cfg.semantics]:
        if getattr(cfg, key) < 1:
            raise UserError(f"model.semantics={cfg.semantics!r} needs model.{key}, got {getattr(cfg, key)}")
    if not 0.001 <= cfg.sigma_scale <= 1000:
        raise UserError(f"model.sigma_scale={cfg.sigma_scale} must be between 0.001 and 1000")
    if control_names(cfg) and cfg.control_weight not in CONTROL_WEIGHTS:
        raise UserError(f"unknown model.control_weight={cfg.control_weight!r}; there are {', '.join(CONTROL_WEIGHTS)}")
    if control_names(cfg) and not cfg.control_alpha > 0:
        raise UserError(f"model.control_alpha={cfg.control_alpha} must be positive")
    if not input_parts(modulation_parts(cfg)):
        raise UserError(f"model.modulation={cfg.modulation!r} gives the last layer no conditioning; add one or more of "
                        f"{', '.join(input_parts(tuple(MODULATION_PARTS)))}")


def check_arch(cfg: ModelConfig) -> None:
    """Raise a UserError for semantics or options that the architecture does not take."""
    kind = arch_class(cfg.arch)
    if cfg.semantics not in kind.semantics:
        others = [arch for arch in ARCHS if cfg.semantics in arch_class(arch).semantics]
        raise UserError(f"model.arch={cfg.arch!r} takes model.semantics {' or '.join(kind.semantics)}; for "
                        f"{cfg.semantics!r} use one of {', '.join(map(repr, others))}")
    for key in OPTIONS:
        if key not in kind.options and getattr(cfg, key) != getattr(ModelConfig, key):
            others = [arch for arch in ARCHS if key in arch_class(arch).options]
            raise UserError(f"model.{key}={getattr(cfg, key)!r} is an option of {', '.join(others)}, not of "
                            f"model.arch={cfg.arch!r}")
    kind.check_options(cfg)


def build(cfg: ModelConfig) -> Denoiser:
    """Build a network with fresh weights from torch's default generator. UserError if the config cannot be built."""
    check(cfg)
    return arch_class(cfg.arch)(cfg)


def load(path: str | Path) -> tuple[Denoiser, Config]:
    """Load the EMA network of a run folder or of its weights.safetensors, and its config. Runs no code from them."""
    path = Path(path)
    tensors, header = checkpoint.read_weights(path / "weights.safetensors" if path.is_dir() else path)
    cfg = from_json(header["config"])
    net = build(cfg.model)
    checkpoint.load_strictly(net, tensors, str(path))
    return net.eval().requires_grad_(False), cfg


@lru_cache(maxsize=None)
def flops(cfg: ModelConfig, h: int | None = None, w: int | None = None) -> int:
    """FLOPs of one forward pass of one image: two for every multiply-add of a matrix product, and nothing else.

    Torch counts them on the meta device. For DiT they are
    2 [ depth (12 D^2 N + 2 N^2 D + 6 D^2) + N D P^2 2 C + 2 D^2 + (256 + D) D ].
    A training step costs three times as much, sampling steps x passes."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net, i = build(cfg).requires_grad_(False), torch.zeros(1)
        controls = {name: torch.zeros(1, CONTROLS[name].width) for name in control_names(cfg)}
        cond = Condition(label=torch.zeros(1, dtype=torch.long), text=torch.zeros(1, cfg.text_length, cfg.text_dim),
                         has_controls=i, **controls)
        net(torch.zeros(1, cfg.channels, h or cfg.resolution, w or cfg.resolution), i, cond)
    return counter.get_total_flops()
