"""Makes the rooms importable from tests/, whatever directory pytest starts in, and lets torchvision be imported."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from outside import mend_torchvision  # noqa: E402

mend_torchvision()                                          # before any test imports diffusers or open_clip


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 products begin every test at full precision: a run in bfloat16 lowers it for its whole process."""
    torch.set_float32_matmul_precision("highest")
