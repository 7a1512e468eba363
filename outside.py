"""Libraries that can be used and are not needed: imported where they are used, with pip's line if they are missing."""
import importlib
from contextlib import suppress
from typing import Any

import torch

from config import UserError


def library(name: str, need: str, package: str = "", part: str = "") -> Any:
    """The module `name`, or a part of it, of a package that may be called otherwise. UserError if it is not there.

    need: what the error says does not go without it."""
    mend_torchvision()
    try:
        module = importlib.import_module(name)
        return getattr(module, part) if part else module
    except (ImportError, AttributeError) as e:
        raise UserError(f"{need} needs {name} ({e}): pip install {package or name}") from e


def mend_torchvision() -> None:
    """Let torchvision be imported, as diffusers and open_clip do, where it was built for CUDA and torch was not.

    There it stops over two operators that nobody defined. With their names defined it imports; nothing calls them."""
    with suppress(ImportError):                             # not installed, nothing to mend
        try:
            importlib.import_module("torchvision")
        except RuntimeError as e:
            if "torchvision::" not in str(e):
                raise
            for operator in ("nms", "qnms"):
                torch.library.define(f"torchvision::{operator}", "(Tensor x) -> Tensor")
            importlib.import_module("torchvision")
