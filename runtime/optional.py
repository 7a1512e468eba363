"""Optional dependencies, imported where they are used; an error names the pip line for a missing one."""
import importlib
from contextlib import suppress
from typing import Any

import torch

from config import UserError


def optional_import(name: str, need: str, package: str = "", part: str = "") -> Any:
    """Import the module `name`, or a part of it. UserError with the pip line if it is missing.

    need: what needs it, for the error. package: pip's name for it, if another."""
    patch_torchvision_ops()
    try:
        module = importlib.import_module(name)
        return getattr(module, part) if part else module
    except (ImportError, AttributeError) as e:
        raise UserError(f"{need} needs {name} ({e}): pip install {package or name}") from e


def patch_torchvision_ops() -> None:
    """Make a torchvision built for CUDA importable beside a CPU build of torch: diffusers and open_clip import it.

    It stops at two operators that nobody defined. Defining their names is enough; nothing calls them."""
    with suppress(ImportError):                             # not installed
        try:
            importlib.import_module("torchvision")
        except RuntimeError as e:
            if "torchvision::" not in str(e):
                raise
            for operator in ("nms", "qnms"):
                torch.library.define(f"torchvision::{operator}", "(Tensor x) -> Tensor")
            importlib.import_module("torchvision")
