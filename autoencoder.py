"""The autoencoder between pictures and latents: diffusers' AutoencoderKL, frozen, in fp32.

vae = open_autoencoder("stabilityai/sd-vae-ft-ema")         a folder, or a name that the hub knows
moments = encode_batch(x, vae)                              mean and standard deviation of the posterior
x = decode(z, meta, vae)                                    z scaled as meta says, that of a folder of latents

Dimensions: B batch, C channels, h x w latent, f h x f w picture.
"""
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cached import affine
from config import UserError
from outside import library

CHUNK = 8                               # pictures that are decoded at a time


def open_autoencoder(path: str, device: torch.device | str = "cpu") -> nn.Module:
    """The frozen fp32 autoencoder in a folder (or its vae/), or of a hub name. UserError if it cannot be had."""
    kind, local = library("diffusers", "the autoencoder", part="AutoencoderKL"), Path(path).expanduser()
    local = local / "vae" if (local / "vae").is_dir() else local
    try:
        where = str(local) if local.is_dir() else path
        vae = kind.from_pretrained(where, torch_dtype=torch.float32, use_safetensors=True,
                                   low_cpu_mem_usage=False)
    except Exception as e:                                  # whatever the hub, the network or the file raises
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise UserError(f"no autoencoder at {path!r}: {reason}. Wanted a folder with config.json and "
                        f"diffusion_pytorch_model.safetensors, or a name like stabilityai/sd-vae-ft-ema; "
                        f"`hf download NAME --local-dir vae` fetches one") from e
    return vae.to(device).eval().requires_grad_(False)


def describe(vae: nn.Module, path: str) -> dict[str, Any]:
    """What identifies an autoencoder, and the scaling of its config: z = (latent - shift_factor) scaling_factor."""
    scaling, shift = float(vae.config.scaling_factor), float(getattr(vae.config, "shift_factor", None) or 0)
    digest = hashlib.sha256(f"{scaling} {shift}".encode())
    for name, v in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(v.shape)}".encode())
        digest.update(v.float().cpu().contiguous().numpy())
    return {"path": path, "sha256": digest.hexdigest(), "scaling_factor": scaling, "shift_factor": shift}


def downscale(vae: nn.Module) -> int:
    """f, by how much a latent's side is smaller than a picture's."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.inference_mode()
def encode_batch(x: Tensor, vae: nn.Module) -> Tensor:
    """[LDM] sec. 3.1: mean and standard deviation of the posterior. (B, 3, H, W) in [-1, 1] -> (B, 2C, h, w)"""
    posterior = vae.encode(x).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1)


@torch.inference_mode()
def decode(z: Tensor, meta: dict, vae: nn.Module) -> Tensor:
    """Latents, scaled as `meta` says, to pictures about [-1, 1]. (B, C, h, w) -> (B, 3, f h, f w)

    meta: of a folder of latents, or its cached.header, which the weights of a run carry. UserError for another C."""
    if z.shape[1] != meta["channels"]:
        raise UserError(f"{z.shape[1]} channels cannot be decoded by an autoencoder of {meta['channels']}")
    shift, scale = (v.to(z.device) for v in affine(meta))
    return torch.cat([vae.decode(part * scale + shift).sample for part in z.float().split(CHUNK)])


def open_decoder(meta: dict | None, path: str, channels: int, device: torch.device) -> tuple[Callable, int]:
    """What turns the latents that a model draws into pictures, (B, C, h, w) -> (B, 3, f h, f w), and f.

    meta: of the latents that it was trained on; None: unknown, scaled by the autoencoder's own factor, as official
    weights are. path: the autoencoder, if not where meta has it. UserError for another one than meta's."""
    vae = open_autoencoder(path or meta["autoencoder"]["path"], device)
    about = describe(vae, path)
    if meta is None:
        meta = {"autoencoder": about, "scaling": "factor", "channels": vae.config.latent_channels}
    elif about["sha256"] != meta["autoencoder"]["sha256"]:
        raise UserError(f"autoencoder={path or meta['autoencoder']['path']} has sha256 {about['sha256'][:12]} and "
                        f"scaling factor {about['scaling_factor']:g}; the latents are of "
                        f"{meta['autoencoder']['path']}, {meta['autoencoder']['sha256'][:12]}, "
                        f"{meta['autoencoder']['scaling_factor']:g}")
    if channels != meta["channels"]:
        raise UserError(f"the model draws {channels} channels, the autoencoder has {meta['channels']}")
    return partial(decode, meta=meta, vae=vae), downscale(vae)


def decoder_of(about: dict[str, str], path: str, channels: int, device: torch.device) -> tuple[Callable, int]:
    """open_decoder for the weights with the header `about`; a network of pixels has nothing to decode, and f = 1.

    UserError for latents of which neither the header nor `path` says what decodes them."""
    if "latents" in about:
        return open_decoder(json.loads(about["latents"]), path, channels, device)
    if path:
        return open_decoder(None, path, channels, device)
    if channels != 3:
        raise UserError(f"the model draws latents of {channels} channels; say what decodes them, for example "
                        "--autoencoder=stabilityai/sd-vae-ft-ema")
    return torch.Tensor.float, 1
