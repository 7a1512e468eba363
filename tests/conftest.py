"""Lets torchvision be imported, and gives every test the same precision."""
import pytest
import torch

from runtime.optional import mend_torchvision

mend_torchvision()                                          # before any test imports diffusers or open_clip


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 products begin every test at full precision: a run in bfloat16 lowers it for its whole process."""
    torch.set_float32_matmul_precision("highest")
