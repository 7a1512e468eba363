"""How large things are on their way through a network: magnitude of every layer's output and of every weight.

A measurement is one forward pass of its own, without gradients, so the steps of a run neither wait for it nor change.
Dimensions: N tokens of all pictures, D width.
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def magnitude_of_tokens(x: Tensor) -> Tensor:
    """[MAG] M[x] = sqrt(E[x_i^2]), measured: mean over tokens of the RMS of each over its features. (..., D)"""
    return x.detach().float().square().mean(-1).sqrt().mean()


def layers(net: nn.Module) -> dict[str, nn.Module]:
    """What is measured, by depth: the embedded patches, then of each block its parts and the block itself."""
    found = {"x_embedder": net.x_embedder}
    for k, block in enumerate(net.blocks):
        found |= {f"blocks.{k}.{name}": part for name, part in block.named_children()}
        found[f"blocks.{k}"] = block
    return found


@torch.no_grad()
def measure(net: nn.Module, forward: Callable[[], object]) -> dict[str, dict[str, float]]:
    """One line's worth of magnitudes of a network with `x_embedder` and `blocks`, by name of the layer or the weight.

    activations: M of the first output (all outputs, if they have names) of every layer that `forward`, a call that
    runs the network once, comes through; weights: RMS of every matrix, absolute value of every scalar. Of a compiled
    block the plain code runs, this once."""
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
