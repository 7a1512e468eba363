"""Makes the rooms importable from tests/, whatever directory pytest starts in, and lets torchvision be imported."""
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# diffusers imports torchvision where it is there, and open_clip brings it. Built for CUDA beside a CPU torch it stops
# over two operators that nobody has defined; no test calls them. See text.import_open_clip.
with suppress(ImportError):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 products begin every test at full precision: a run in bfloat16 lowers it for its whole process."""
    torch.set_float32_matmul_precision("highest")
