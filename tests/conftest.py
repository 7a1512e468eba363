"""Every test computes on one thread at full fp32 precision, and torchvision can be imported."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")               # of processes that tests start, too
import pytest                                               # noqa: E402
import torch                                                # noqa: E402

from runtime.optional import patch_torchvision_ops          # noqa: E402

patch_torchvision_ops()                                     # before any test imports diffusers or open_clip


@pytest.fixture(autouse=True)
def one_thread_and_exact_products():
    """A run sets threads and, in bfloat16, a lower precision of fp32 products for its whole process: set them back."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
