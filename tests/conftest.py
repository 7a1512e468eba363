"""Every test computes on one thread at full fp32 precision, and torchvision can be imported."""
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")               # of processes that tests start, too


def pytest_configure(config):
    """Before any test imports diffusers or open_clip. The process that only hands tests to others imports nothing."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        from runtime.optional import patch_torchvision_ops
        patch_torchvision_ops()


@pytest.fixture(autouse=True)
def one_thread_and_exact_products():
    """A run sets threads and, in bfloat16, a lower precision of fp32 products for its whole process: set them back."""
    import torch
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
