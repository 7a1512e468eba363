"""The denoiser: one trunk, one small class for each kind of block. net(x_t, i, cond) -> eps

Block contract: Block(D, H, last), forward(x, ctx, c) -> x, ctx with x (B, N, D) image tokens, ctx (B, L, D) context
tokens, c (B, D) the modulation vector. Blocks without context hand ctx back untouched; only mmDiT reads `last`: its
last block owns no context weights that nothing would read.
Dimensions: B batch, N = h w image tokens, L context tokens, D width, H heads, d = D/H, C channels, P patch.

python model.py --table        parameters and FLOPs of every architecture and size
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from conditioning import (CONTROL_WEIGHTS, CONTROLS, ClassContext, Condition, ControlEmbedding, LabelEmbedder,
                          LearnedContext, Linear, TextContext, TimestepEmbedder, sincos_2d)
from config import SIZES, Config, ModelConfig, UserError, from_json
from schedule import SCHEDULES, alpha_bar_table, velocity_to_eps

MLP_RATIO = 4                           # hidden width of a block's MLP over D, [DiT]
POSITIONS = ("grid", "resample", "interpolate")
PREDICTIONS = ("eps", "v")
PLAIN_ATTENTION = 1024                  # up to this many tokens a CPU's fused bf16 attention loses to plain products


# ---------------------------------------------------------------- parts

def norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without gain or bias; its statistics are taken in fp32. (..., D)"""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """[DiT] adaLN: x (1 + scale) + shift, x (B, N, D), shift and scale (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q (B, H, N, d), k and v (B, H, M, d) -> (B, N, H d)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= PLAIN_ATTENTION:
        weight = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                # (B, H, N, M)
        a = weight.softmax(dim=-1) @ v
    else:
        a = F.scaled_dot_product_attention(q, k, v)
    return a.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, n: int, H: int) -> tuple[Tensor, ...]:
    """(B, N, n D) -> n tensors (B, H, N, d), for the n of q, k, v that one projection gives."""
    return x.unflatten(-1, (n, H, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), tanh form, [DiT]. (B, N, D) -> (B, N, D)"""
    def __init__(self, D: int) -> None:
        super().__init__()
        self.fc1 = Linear(D, MLP_RATIO * D)
        self.fc2 = Linear(MLP_RATIO * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    """Self-attention with one projection for q, k, v, [DiT]. (B, N, D) -> (B, N, D)"""
    def __init__(self, D: int, H: int) -> None:
        super().__init__()
        self.H = H
        self.qkv = Linear(D, 3 * D)
        self.proj = Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(*split_heads(self.qkv(x), 3, self.H)))


class RMSNorm(nn.Module):
    """x / rms(x) with a learned gain over the last axis, in fp32. (..., d) -> (..., d)"""
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)   # F.rms_norm is half as fast on CPU
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)


class JointAttention(nn.Module):
    """[SD3] eq. 6, [COND] table A1: attention over [context; image] with RMSNorm on the q and k of every head.

    Context has its own q, k, v and shares the output projection. `last`: context gives k and v and is not updated.
    x (B, N, D), ctx (B, L, D) -> (B, N, D), (B, L, D) or None"""
    def __init__(self, D: int, H: int, last: bool) -> None:
        super().__init__()
        self.H, self.last = H, last
        self.qkv = Linear(D, 3 * D)
        self.ctx_qkv = Linear(D, (2 if last else 3) * D)                        # last: k and v
        self.q_norm, self.k_norm = RMSNorm(D // H), RMSNorm(D // H)
        self.proj = Linear(D, D)

    def forward(self, x: Tensor, ctx: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v = split_heads(self.qkv(x), 3, self.H)                           # (B, H, N, d) each
        *q_ctx, k_ctx, v_ctx = split_heads(self.ctx_qkv(ctx), 2 if self.last else 3, self.H)
        q, k, v = torch.cat([*q_ctx, q], 2), torch.cat([k_ctx, k], 2), torch.cat([v_ctx, v], 2)
        a = self.proj(attention(self.q_norm(q), self.k_norm(k), v))             # (B, L+N, D), last: (B, N, D)
        return (a, None) if self.last else (a[:, ctx.shape[1]:], a[:, :ctx.shape[1]])


def modulation(D: int, n: int) -> nn.Sequential:
    """[DiT] adaLN-Zero: n vectors of width D from c, all zero at first. (B, D) -> (B, n D)"""
    return nn.Sequential(nn.SiLU(), Linear(D, n * D))


# ---------------------------------------------------------------- blocks

class DiTBlock(nn.Module):
    """[DiT] fig. 3, adaLN-Zero: attention and MLP, each shifted, scaled and gated by c."""
    def __init__(self, D: int, H: int, last: bool) -> None:
        super().__init__()
        self.attn = Attention(D, H)
        self.mlp = MLP(D)
        self.adaLN_modulation = modulation(D, 6)

    def forward(self, x: Tensor, ctx: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = torch.addcmul(x, gate_a, self.attn(modulate(norm(x), shift_a, scale_a)))
        x = torch.addcmul(x, gate_m, self.mlp(modulate(norm(x), shift_m, scale_m)))
        return x, ctx


class MMDiTBlock(nn.Module):
    """[COND] sec. 2, the block that its parameter counts suggest: DiTBlock with joint attention.

    Context is normalised, not modulated, and changed by attention alone; it has no MLP."""
    def __init__(self, D: int, H: int, last: bool) -> None:
        super().__init__()
        self.last = last
        self.attn = JointAttention(D, H, last)
        self.mlp = MLP(D)
        self.adaLN_modulation = modulation(D, 6)

    def forward(self, x: Tensor, ctx: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        a, a_ctx = self.attn(modulate(norm(x), shift_a, scale_a), norm(ctx))
        x = torch.addcmul(x, gate_a, a)
        x = torch.addcmul(x, gate_m, self.mlp(modulate(norm(x), shift_m, scale_m)))
        return x, ctx if self.last else ctx + a_ctx


# ---------------------------------------------------------------- trunk

class PatchEmbed(nn.Module):
    """[DiT] sec. 3.2: every P x P patch through one linear layer. (B, C, h P, w P) -> (B, h w, D)

    The weight is kept in the shape of the equivalent convolution, (D, C, P, P), as published weights are."""
    def __init__(self, C: int, P: int, D: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(C, D, P, stride=P)

    def forward(self, x: Tensor) -> Tensor:
        P = self.proj.stride[0]
        x = x.unflatten(3, (-1, P)).unflatten(2, (-1, P))                       # (B, C, h, P, w, P)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)                # (B, h w, C P P)
        return F.linear(x, self.proj.weight.flatten(1).to(x.dtype), self.proj.bias.to(x.dtype))


class FinalLayer(nn.Module):
    """[DiT] sec. 3.2: adaLN, then a linear layer to patches, zero at first. (B, h w, D) -> (B, C, h P, w P)"""
    def __init__(self, D: int, P: int, C: int) -> None:
        super().__init__()
        self.P = P
        self.linear = Linear(D, P * P * C)
        self.adaLN_modulation = modulation(D, 2)

    def forward(self, x: Tensor, c: Tensor, h: int, w: int) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        x = self.linear(modulate(norm(x), shift, scale))                        # (B, h w, P P C)
        x = x.unflatten(2, (self.P, self.P, -1)).unflatten(1, (h, w))           # (B, h, w, P, P, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


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
            self.control_embedder = ControlEmbedding(controls, D, cfg.control_weight, cfg.control_alpha)
        self.blocks = nn.ModuleList(self.Block(D, cfg.heads, k == cfg.depth - 1) for k in range(cfg.depth))
        self.final_layer = FinalLayer(D, P, cfg.channels)
        self.register_buffer("pos_embed", sincos_2d(grid, grid, D), persistent=False)
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
        return self.pos_embed if (h, w) == (grid, grid) else sincos_2d(h, w, self.cfg.width).to(self.pos_embed)

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


ARCHS: dict[str, type[Denoiser]] = {"dit": DiT, "mmdit": MMDiT}


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
    if cfg.arch == "dit" and cfg.semantics == "text":
        raise UserError("model.arch='dit' takes a class or nothing; for text use model.arch='mmdit'")
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
        raise UserError(f"unknown model.control_weight={cfg.control_weight!r}; there are {', '.join(CONTROL_WEIGHTS)}")
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


def flops(cfg: ModelConfig, h: int | None = None, w: int | None = None) -> int:
    """FLOPs of one forward pass of one image, two for every multiply-add of a matrix product, nothing else counted.

    DiT    2 [ depth (12 D^2 N + 2 N^2 D + 6 D^2) + N D P^2 2 C + 2 D^2 + (256 + D) D ]
    mmDiT  per block also 4 L D^2 (the last: 2) and attention over L + N tokens; text also 2 layers a token
    A training step costs three of these, sampling costs steps x passes."""
    D, N = cfg.width, ((h or cfg.resolution) // cfg.patch) * ((w or cfg.resolution) // cfg.patch)
    P2C = cfg.patch ** 2 * cfg.channels
    mac = cfg.depth * (12 * D * D * N + 6 * D * D) + 2 * N * D * P2C + 2 * D * D + (256 + D) * D
    if cfg.arch == "dit":
        mac += cfg.depth * 2 * N * N * D
    else:
        L = {"none": 1, "class": 1, "text": cfg.text_length}[cfg.semantics]
        mac += (cfg.depth - 1) * (2 * (N + L) ** 2 * D + 4 * L * D * D) + 2 * N * (N + L) * D + 2 * L * D * D
        mac += {"none": 0, "class": 2 * D * D, "text": L * D * (cfg.text_dim + D)}[cfg.semantics]
    groups = [sum(CONTROLS[c] for c in control_names(cfg) if (c == "size") == low) for low in (False, True)]
    return 2 * (mac + sum(256 * n * D + D * D for n in groups if n))


def table() -> str:
    """Parameters and forward GFLOPs of every architecture and size, patch 2 on 32 x 32 x 4 latents, 1000 classes."""
    rows = [f"{'model':12} {'parameters':>12} {'GFLOP/image':>12}"]
    for arch in ARCHS:
        for name, size in SIZES.items():
            cfg = ModelConfig(arch=arch, semantics="class", classes=1000, resolution=32, channels=4, patch=2, **size)
            with torch.device("meta"):
                count = sum(p.numel() for p in build(cfg).parameters())
            rows.append(f"{arch + '-' + name + '/2':12} {count:12,} {flops(cfg) / 1e9:12.2f}")
    return "\n".join(rows)


if __name__ == "__main__":
    if sys.argv[1:] != ["--table"]:
        sys.exit(__doc__)
    print(table())
