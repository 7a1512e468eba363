"""Magnitudes of a network: of every layer's output and of every weight.

found = measure(net, partial(net, x, i, cond))          found["activations"]["blocks.0"], found["weights"]["gain"]

A measurement is a forward pass of its own, without gradients: it does not change the steps of a run.
Dimensions: N tokens of all images, D width.
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def magnitude_of_tokens(x: Tensor) -> Tensor:
    """[MAG] M[x] = sqrt(E[x_i^2]), measured: mean over tokens of the RMS of each over its features. (..., D)"""
    return x.detach().float().square().mean(-1).sqrt().mean()


def layers(net: nn.Module) -> dict[str, nn.Module]:
    """The measured layers by depth: the patch embedding, then the parts of each block and the block itself."""
    found = {"x_embedder": net.x_embedder}
    for k, block in enumerate(net.blocks):
        found |= {f"blocks.{k}.{name}": part for name, part in block.named_children()}
        found[f"blocks.{k}"] = block
    return found


@torch.no_grad()
def measure(net: nn.Module, forward: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Measure a network with `x_embedder` and `blocks`; `forward` runs it once. Compiled blocks run uncompiled.

    activations, by layer: M of the first output, or of all outputs that have names. weights, by name: RMS of every
    matrix, absolute value of every scalar."""
    seen: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Module, args: tuple, out: Tensor | tuple | dict) -> None:
        parts = out if isinstance(out, dict) else {"": out[0] if isinstance(out, tuple) else out}
        for part, x in parts.items():
            seen[f"{name}.{part}".rstrip(".")] = magnitude_of_tokens(x)

    hooks = [layer.register_forward_hook(partial(note, name)) for name, layer in layers(net).items()]
    try:
        with torch.compiler.set_stance("force_eager"):      # a compiled block calls no hooks
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    held = {name: torch.linalg.vector_norm(p) / p.numel() ** 0.5 for name, p in net.named_parameters()
            if p.ndim > 1 or p.numel() == 1}
    values = torch.stack([*seen.values(), *held.values()]).tolist()             # the only wait for the device
    return {"activations": dict(zip(seen, values)), "weights": dict(zip(held, values[len(seen):]))}
