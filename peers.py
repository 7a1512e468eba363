"""Other people's DiT behind the same three steps, for bench.py and the tests: diffusers' and the official code's.

Dimensions: B batch, C channels, R resolution, T noise steps.
"""
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
from conditioning import Condition
from config import UserError
from outside import library, mend_torchvision
from sample import ddim
from schedule import add_noise

LAM = 2.0                               # guidance scale: two passes, with the class or caption and without
LR = 1e-6                               # weights stay where they are, so that every step is the same work


@dataclass(frozen=True)
class Inputs:
    """What all implementations see: images x (B, C, R, R), noise indices i (B,), condition, alpha-bar."""
    x: Tensor
    i: Tensor
    cond: Condition
    alpha_bar: Tensor


@dataclass(frozen=True)
class Side:
    """One implementation: its network, its step of each kind, the precision of fp32 products it runs under.

    "forward" returns eps and "sample" the picture after a guided step, so that they can be compared."""
    name: str
    net: nn.Module
    steps: dict[str, Callable[[], object]]
    matmul: str


def theirs(name: str, other: nn.Module, eps: Callable[..., Tensor], average: Callable[[], None], s: Inputs,
           null: int) -> Side:
    """Another network in fp32, `eps(x, i, label)`, with default AdamW and its own `average` of the weights.

    Noise, loss, guidance and sampler are the shortest that do the same. `null`: its number for "no class"."""
    opt, label = torch.optim.AdamW(other.parameters(), LR), s.cond.label
    both = torch.cat([label, torch.full_like(label, null)])

    def train() -> None:
        noise, i = torch.randn_like(s.x), torch.randint(len(s.alpha_bar), label.shape, device=s.x.device)
        F.mse_loss(eps(add_noise(s.x, noise, s.alpha_bar[i]), i, label), noise).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        average()

    def denoise(x: Tensor, i: Tensor) -> Tensor:
        cond, uncond = eps(torch.cat([x, x]), torch.cat([i, i]), both).chunk(2)
        return uncond + LAM * (cond - uncond)

    steps = {"forward": lambda: eps(s.x, s.i, label), "sample": lambda: ddim(denoise, s.x, s.alpha_bar, 1)}
    return Side(name, other, {k: torch.no_grad()(f) for k, f in steps.items()} | {"train": train}, "highest")


DIFFUSERS_NAMES = {
    "x_embedder.": "pos_embed.", "y_embedder": "class_embedder", "final_layer.linear": "proj_out_2",
    "final_layer.adaLN_modulation.1": "proj_out_1", "adaLN_modulation.1": "norm1.linear",
    "t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "blocks.": "transformer_blocks.", "attn.proj": "attn1.to_out.0", "attn.qkv": "attn1.to_qkv",
    "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}


def diffusers_weights(net: model.Denoiser) -> dict[str, Tensor]:
    """The weights of a DiT of classes as diffusers has them: q, k, v apart, the embeddings in every block."""
    weights = {}
    for name, p in net.state_dict().items():
        for mine, other in DIFFUSERS_NAMES.items():
            name = name.replace(mine, other)
        if ".to_qkv." in name:
            weights |= {name.replace("qkv", c): part for c, part in zip("qkv", p.chunk(3))}
        elif "_embedder." in name:
            weights |= {f"transformer_blocks.{k}.norm1.emb.{name}": p for k in range(len(net.blocks))}
        else:
            weights[name] = p
    return weights


def diffusers_dit(net: model.Denoiser) -> nn.Module:
    """diffusers' DiTTransformer2DModel with the size and the weights of `net`, a DiT of classes.

    There every block has a copy of the time and class embedding, and the slowest frequency of the time is
    1/10000 exactly; the latter is set to ours. UserError where diffusers is missing."""
    kind = library("diffusers", "--vs=diffusers", part="DiTTransformer2DModel")
    m = net.cfg
    other = kind(
        num_layers=m.depth, num_attention_heads=m.heads, attention_head_dim=m.width // m.heads, norm_eps=1e-6,
        in_channels=m.channels, sample_size=m.resolution, patch_size=m.patch, num_embeds_ada_norm=m.classes)
    for block in other.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    other.load_state_dict(diffusers_weights(net))
    return other.to(next(net.parameters()).device)


def diffusers_side(net: model.Denoiser, s: Inputs) -> Side:
    """diffusers as its training example uses it: fp32, AdamW and EMAModel by default."""
    other = diffusers_dit(net)
    from diffusers.training_utils import EMAModel
    ema = EMAModel(other.parameters(), use_ema_warmup=True)
    eps, average = lambda x, i, label: other(x, i, label).sample, lambda: ema.step(other.parameters())
    return theirs("diffusers", other, eps, average, s, net.cfg.classes)


def official_side(net: model.Denoiser, s: Inputs, path: str) -> Side:
    """models.DiT of the official code in `path`: fp32, AdamW by default, a dictionary of averages."""
    file, m = Path(path) / "models.py", net.cfg
    if not file.is_file():
        raise UserError(f"--peer={path} has no models.py; give the folder of a checkout of the official DiT")
    spec = importlib.util.spec_from_file_location("official_dit_models", file)
    module = importlib.util.module_from_spec(spec)
    mend_torchvision()                                      # which its timm imports
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as e:
        raise UserError(f"--peer={path} needs {e.name}: pip install {e.name}") from e
    other = module.DiT(
        input_size=m.resolution, patch_size=m.patch, in_channels=m.channels, hidden_size=m.width,
        num_heads=m.heads, depth=m.depth, num_classes=m.classes, learn_sigma=False).to(s.x.device)
    other.load_state_dict({**net.state_dict(), "pos_embed": net.pos_embed[None]})
    averages = {name: p.detach().clone() for name, p in other.named_parameters()}

    @torch.no_grad()
    def average() -> None:
        for name, p in other.named_parameters():
            averages[name].mul_(0.9999).add_(p, alpha=1e-4)
    return theirs("official", other, other, average, s, m.classes)
