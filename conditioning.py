"""Conditioning: one typed value, `Condition`, and the modules that embed time, class, text and controls.

cond = make_condition(batch, "text", ("size",), "noisy", 0.02, generator)      from tokens, lengths and controls
cond.drop(semantics=mask)                       no class or caption where the mask is true

Semantics are what an image shows: a class (`label`) or a caption (`text`). Controls are how it was taken: where it was
cropped, whether it was mirrored, how large the original was. `Condition.drop` alone removes them, in training and in
guidance.
Dimensions: B batch, L context tokens, n tokens of one caption, E width of a text token, D width, h x w image tokens,
T noise levels.
"""
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import mlp
from mp_layers import FULL, MPMLP, MPEmbedding, MPFourier, normalize

NULL_LABEL = -1                         # "no class"; the embedding maps it to the last row of its table
TIME_FEATURES = 256                     # width of the sinusoid that an MLP turns into the time vector, [DiT]
BANDWIDTH = 3.0                         # of MPFourier over t in [0, 1]: as [EDM2]'s 1 over ln(sigma)/4
PADDINGS = ("zero", "replicate", "noisy")       # what fills the positions after a short caption


class Control(NamedTuple):
    """A row of CONTROLS: the field of that name in Condition has `width` numbers an image.

    group: "high" controls composition at every noise level; "low" controls detail alone, weighted by gamma_c(t)."""
    width: int
    group: str


CONTROLS = {"crop": Control(2, "high"), "flip": Control(1, "high"), "size": Control(2, "low")}


@dataclass(frozen=True)
class Condition:
    """The condition of B images; fields that the model does not use are None.

    label (B,) int64, -1 = none; text (B, L, E) float, zeros = none; crop (B, 2) top and left, in pixels of the resized
    original; flip (B,) 0 or 1; size (B, 2) height and width of the original in pixels; has_controls (B,) 1,
    or 0 = no controls."""
    label: Tensor | None = None
    text: Tensor | None = None
    crop: Tensor | None = None
    flip: Tensor | None = None
    size: Tensor | None = None
    has_controls: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> "Condition":
        """Apply f to every tensor of the condition."""
        return replace(self, **{k.name: f(v) for k in fields(self) if (v := getattr(self, k.name)) is not None})

    def to(self, device: torch.device) -> "Condition":
        return self.map(lambda v: v.to(device, non_blocking=True))

    def drop(self, semantics: Tensor | bool = False, controls: Tensor | bool = False) -> "Condition":
        """[COND] sec. 2.1: remove semantics or controls where a mask (B,) is true, or from all images."""
        return replace(self, label=_blank(self.label, semantics, NULL_LABEL), text=_blank(self.text, semantics, 0),
                       has_controls=_blank(self.has_controls, controls, 0))


def _blank(v: Tensor | None, where: Tensor | bool, empty: float) -> Tensor | None:
    if v is None:
        return None
    mask = torch.as_tensor(where, device=v.device).view(-1, *[1] * (v.ndim - 1))    # (B or 1, 1, ...)
    return torch.where(mask, torch.full_like(v, empty), v)


def concatenate(conditions: list[Condition]) -> Condition:
    """Join conditions of B1, B2, ... images into one of B1 + B2 + ..., in order."""
    parts = {k.name: [getattr(c, k.name) for c in conditions] for k in fields(Condition)}
    return Condition(**{k: torch.cat(v) for k, v in parts.items() if v[0] is not None})


def make_condition(batch: Mapping[str, Tensor], semantics: str, controls: Sequence[str], padding: str = "zero",
                   padding_noise: float = 0.0, generator: torch.Generator | Sequence[torch.Generator] | None = None,
                   device: torch.device | None = None) -> Condition:
    """Make the condition of B images from what a model with these semantics and controls reads of `batch`, on `device`.

    batch has label (B,) for a class; text (B, L, E) and, to pad it, lengths (B,) for captions; and a tensor for each
    control. Other keys are ignored. padding, padding_noise and generator are those of pad_text."""
    names = (*{"class": ("label",), "text": ("text",), "none": ()}[semantics], *controls)
    has_controls = torch.ones(len(batch[controls[0]])) if controls else None
    cond = Condition(has_controls=has_controls, **{k: batch[k] for k in names}).to(device)
    if semantics != "text" or padding == "zero":
        return cond
    lengths = batch["lengths"].to(device, non_blocking=True)
    return replace(cond, text=pad_text(cond.text, lengths, padding, padding_noise, generator))


def guide(eps_cs: Tensor, eps_s: Tensor, eps_null: Tensor, lam: float, beta: float) -> Tensor:
    """[COND] eq. 2: lambda [beta eps(c,s) + (1-beta) eps(0,s)] + (1-lambda) eps(0,0), c control, s semantics.

    On all channels. beta = 1 is classifier-free guidance; lambda = 1 none."""
    return lam * (beta * eps_cs + (1 - beta) * eps_s) + (1 - lam) * eps_null


# ---------------------------------------------------------------- time, class, text

def timestep_embedding(x: Tensor, dim: int) -> Tensor:
    """[DiT]: [cos(x f_k), sin(x f_k)], f_k = 10000^(-2k/dim), k < dim/2. x (B,) -> (B, dim), fp32"""
    f = torch.exp(-math.log(10000) / (dim // 2) * torch.arange(dim // 2, dtype=torch.float32, device=x.device))
    angle = x.float()[:, None] * f                                              # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """[DiT] sec. 3.2: MLP(sinusoid(i)), SiLU between its two layers. i (B,) -> (B, D)"""
    def __init__(self, D: int) -> None:
        super().__init__()
        self.mlp = mlp(TIME_FEATURES, D)

    def forward(self, i: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(i, TIME_FEATURES))


class MPTimestepEmbedder(nn.Module):
    """[MAG] MPMLP(features(i)): random Fourier features, smooth in i, with "stream", else [DiT]'s. i (B,) -> (B, D)"""
    def __init__(self, D: int, T: int, mp: tuple[str, ...]) -> None:
        super().__init__()
        sinusoid = partial(timestep_embedding, dim=TIME_FEATURES)
        self.features = MPFourier(TIME_FEATURES, BANDWIDTH / (T - 1)) if "stream" in mp else sinusoid
        self.mlp = MPMLP(TIME_FEATURES, D, D, mp)

    def forward(self, i: Tensor) -> Tensor:
        return self.mlp(self.features(i))


class LabelEmbedder(nn.Module):
    """[DiT] sec. 3.2: a table of classes + 1 rows, the last for "no class". label (B,) -> (B, D)

    mp, here and below: rows and layers that preserve magnitude, [MAG]."""
    def __init__(self, classes: int, D: int, mp: bool = False) -> None:
        super().__init__()
        self.embedding_table = (MPEmbedding if mp else nn.Embedding)(classes + 1, D)

    def forward(self, label: Tensor) -> Tensor:
        null = self.embedding_table.num_embeddings - 1
        return self.embedding_table(torch.where(label == NULL_LABEL, null, label))


class ClassContext(nn.Module):
    """[COND] sec. 2: the class as one context token, by a table and a two-layer MLP. label (B,) -> (B, 1, D)"""
    def __init__(self, classes: int, D: int, mp: bool = False) -> None:
        super().__init__()
        self.mp, self.table = mp, LabelEmbedder(classes, D, mp)
        self.mlp = MPMLP(D, D, D, FULL) if mp else mlp(D, D)

    def forward(self, cond: Condition, dtype: torch.dtype) -> Tensor:
        row = self.table(cond.label)
        return self.mlp(row if self.mp else row.to(dtype))[:, None].to(dtype)


class TextContext(nn.Module):
    """[COND] sec. 2: one two-layer MLP on every text token. text (B, L, E) -> (B, L, D)

    mp: tokens have unit magnitude, each with the number 1 beside it, and so has the pair. An empty token, all zeros, is
    thus a learned vector."""
    def __init__(self, E: int, D: int, mp: bool = False) -> None:
        super().__init__()
        self.mp = mp
        self.mlp = MPMLP(E + 1, D, D, FULL) if mp else mlp(E, D)

    def forward(self, cond: Condition, dtype: torch.dtype) -> Tensor:
        text = cond.text
        if self.mp:
            text = normalize(text.float())
            text = normalize(torch.cat([text, torch.ones_like(text[..., :1])], dim=-1))
        return self.mlp(text.to(dtype))


class UnconditionalContext(nn.Module):
    """Without semantics: one learned context token, so that blocks stay the same. -> (1, 1, D)"""
    def __init__(self, D: int, mp: bool = False) -> None:
        super().__init__()
        self.mp = mp
        self.token = MPEmbedding(1, D) if mp else nn.Parameter(torch.randn(1, 1, D) * 0.02)

    def forward(self, cond: Condition, dtype: torch.dtype) -> Tensor:
        if self.mp:
            return self.token(torch.zeros(1, 1, dtype=torch.long, device=self.token.weight.device)).to(dtype)
        return self.token.to(dtype)


# ---------------------------------------------------------------- short captions

def replicate_pad(tokens: Tensor, lengths: Tensor, length: int = 77, beta: float = 0.02,
                  generator: torch.Generator | None = None) -> Tensor:
    """[COND] sec. 2.1, eq. 7: phi[j mod n] + beta sqrt(m-1) sigma_ch eps, m = ceil(length / n). (B, length, E) fp32

    Repeats the first n = lengths (B,) of tokens (B, any, E) to the end, then adds noise to every position, the first n
    too. sigma_ch (E,) is their population standard deviation. A caption that fills all positions gets no noise (m = 1),
    nor does a single token (sigma_ch = 0). n = 0, the null condition, stays all zeros. beta = 0 repeats without noise.
    ValueError for noise without a generator."""
    if beta and generator is None:
        raise ValueError(f"noise on repeated tokens (beta={beta}) needs a generator")
    tokens = tokens.float()
    n = lengths.to(tokens.device).clamp(max=tokens.shape[1])[:, None]           # (B, 1)
    count = n.clamp(min=1)
    source = torch.arange(length, device=tokens.device) % count                 # (B, length)
    phi = tokens.gather(1, source[..., None].expand(-1, -1, tokens.shape[2]))   # (B, length, E)
    phi = torch.where((n > 0)[..., None], phi, 0.0)
    if not beta:
        return phi
    valid = (torch.arange(tokens.shape[1], device=tokens.device) < n)[..., None]
    mean = torch.where(valid, tokens, 0.0).sum(1) / count                       # (B, E)
    var = torch.where(valid, tokens - mean[:, None], 0.0).square().sum(1) / count
    m = (length + count - 1) // count                                           # (B, 1) copies, a cut one counts
    eps = torch.randn(phi.shape, generator=generator, device=generator.device).to(phi.device)
    return phi + (beta * (m - 1).sqrt() * var.sqrt())[:, None] * eps


def pad_text(tokens: Tensor, lengths: Tensor, mode: str, beta: float = 0.02,
             generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """[COND] table 3: fill the positions after short captions (B, L, E) by one of PADDINGS. ValueError for another.

    An encoder (text.py) gives n = lengths tokens, CLIP's with marks of beginning and end, then zeros up to L. zero
    leaves those, replicate repeats the tokens, noisy adds noise of beta: from one generator a microbatch in training
    (train.inputs), from one an image in sampling (sample.SampleConditions)."""
    if mode not in PADDINGS:
        raise ValueError(f"unknown padding {mode!r}; there are {', '.join(PADDINGS)}")
    if mode == "zero":
        return tokens
    if mode == "replicate":
        return replicate_pad(tokens, lengths, tokens.shape[1], 0.0)
    if isinstance(generator, Sequence):
        return torch.cat([replicate_pad(tokens[b:b + 1], lengths[b:b + 1], tokens.shape[1], beta, g)
                          for b, g in enumerate(generator)])
    return replicate_pad(tokens, lengths, tokens.shape[1], beta, generator)


# ---------------------------------------------------------------- control

def control_weight(t: Tensor, kind: str = "cosine", alpha: float = 8.0, sigma: Tensor | None = None) -> Tensor:
    """[COND] table A4: gamma_c(t) = [1 - cos(pi (1-t)^alpha)] / 2, computed as sin^2(pi (1-t)^alpha / 2). t in [0, 1]

    Zero at t = 1 (noise), one at t = 0: size acts on detail once the composition stands. The other kinds of table A6:
    uniform 1; linear 1-t; zero 0; step 1 where sigma(t) <= alpha, in the paper 1, 2 or 6. Only step reads sigma (T,),
    the table before any rescale, which keeps gamma a function of the index; ValueError without it."""
    if kind not in CONTROL_WEIGHTS:
        raise ValueError(f"unknown control weight {kind!r}; there are {', '.join(CONTROL_WEIGHTS)}")
    if kind == "step" and sigma is None:
        raise ValueError("the control weight 'step' is a threshold on sigma and needs its table")
    return CONTROL_WEIGHTS[kind](t, alpha, sigma)


CONTROL_WEIGHTS: dict[str, Callable[[Tensor, float, Tensor | None], Tensor]] = {
    "cosine": lambda t, alpha, sigma: torch.sin(math.pi / 2 * (1 - t) ** alpha) ** 2,
    "uniform": lambda t, alpha, sigma: torch.ones_like(t),
    "linear": lambda t, alpha, sigma: 1 - t,
    "step": lambda t, alpha, sigma: (sigma[(t * (len(sigma) - 1)).round().long()] <= alpha).to(t.dtype),
    "zero": lambda t, alpha, sigma: torch.zeros_like(t),
}


class ControlEmbedding(nn.Module):
    """[COND] eq. 1: c_emb = E_h(phi_h) + gamma_c(t) E_l(phi_l), added to the time vector. -> (B, D)

    Every scalar becomes a sinusoid; one two-layer MLP reads the sinusoids of a group together. Its last layer starts at
    zero, so at first controls have no effect. kind, alpha, sigma: see control_weight."""
    mlp = staticmethod(mlp)

    def __init__(self, controls: tuple[str, ...], D: int, kind: str, alpha: float, sigma: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("sigma", sigma, persistent=False)                  # (T,)
        self.high, self.low = ([c for c in controls if CONTROLS[c].group == group] for group in ("high", "low"))
        self.kind, self.alpha = kind, alpha
        self.mlps = nn.ModuleDict({name: self.mlp(TIME_FEATURES * sum(CONTROLS[c].width for c in group), D)
                                   for name, group in (("high", self.high), ("low", self.low)) if group})

    def forward(self, cond: Condition, t: Tensor) -> Tensor:
        gamma = control_weight(t, self.kind, self.alpha, self.sigma)[:, None]   # (B, 1)
        c_emb = self.mlps["high"](self.features(cond, self.high)) if self.high else 0   # (B, D)
        if self.low:
            c_emb = c_emb + gamma * self.mlps["low"](self.features(cond, self.low))
        return cond.has_controls[:, None] * c_emb

    def features(self, cond: Condition, group: list[str]) -> Tensor:
        values = [getattr(cond, c).reshape(-1, CONTROLS[c].width) for c in group]
        scalars = torch.cat(values, dim=1)                                      # (B, K)
        return timestep_embedding(scalars.flatten(), TIME_FEATURES).unflatten(0, scalars.shape).flatten(1)


class MPControlEmbedding(ControlEmbedding):
    """[COND] eq. 1 blended by magnitude: (c + w_h e_h + w_l e_l) / sqrt(1 + w_h^2 + w_l^2), c and e of magnitude 1.

    w_h is a learned gain, w_l another times gamma_c(t): mp_sum with a learned t. Where both are zero, as at first and
    without controls, c is returned to the last bit. -> (B, D)"""
    @staticmethod
    def mlp(K: int, D: int) -> MPMLP:
        """An MLP whose output has the magnitude of its gain, zero at first."""
        return MPMLP(K, D, D, FULL, gain=0.0)

    def forward(self, c: Tensor, cond: Condition, t: Tensor) -> Tensor:
        gamma = control_weight(t, self.kind, self.alpha, self.sigma)
        power = 1.0
        for name, mlp in self.mlps.items():
            group, share = (self.high, cond.has_controls) if name == "high" else (self.low, cond.has_controls * gamma)
            share = share[:, None]                                              # (B, 1)
            c = c + share * mlp(math.sqrt(2) * self.features(cond, group))      # a sinusoid has magnitude 1/sqrt(2)
            power = power + (share * mlp.fc2.gain).square()
        return c / power.sqrt()


# ---------------------------------------------------------------- position

def sincos_2d(h: int, w: int, dim: int, base: int | None = None) -> Tensor:
    """[DiT], [COND] sec. 2.2: fixed sines and cosines of column (first dim/2) and row (last dim/2). (h w, dim) fp32

    base None: coordinates 0, 1, 2, ... Otherwise linspace(0, base, n) on both axes, so that a finer grid spans the same
    extent. Every row has norm sqrt(dim/2)."""
    if dim % 4:
        raise ValueError(f"the width of positions must be divisible by 4, got {dim}")
    rows, columns = (torch.arange(n, dtype=torch.float64) if base is None else
                     torch.linspace(0, base, n, dtype=torch.float64) for n in (h, w))
    f = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (dim/4,)
    angle = {name: grid.flatten()[:, None] * f for name, grid in
             zip(("row", "column"), torch.meshgrid(rows, columns, indexing="ij"))}  # (h w, dim/4) each
    waves = [f(angle[name]) for name in ("column", "row") for f in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=1).float()


def interpolate_2d(h: int, w: int, dim: int, base: int) -> Tensor:
    """[COND] sec. 2.2, to compare: the table of base x base patches, resized bilinearly. (h w, dim) fp32

    Averages of neighbours are shorter than sqrt(dim/2), the norm of every row of sincos_2d."""
    table = sincos_2d(base, base, dim).unflatten(0, (base, base)).permute(2, 0, 1)      # (dim, base, base)
    return F.interpolate(table[None], size=(h, w), mode="bilinear")[0].flatten(1).T.contiguous()
