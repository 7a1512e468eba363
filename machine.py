"""The machine: its device, its processes, the number type it multiplies fastest, and how fast that is.

There is always a process group, of one process if need be, so nothing below `setup` asks whether there is one.
"""
import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import UserError

TIMEOUT = timedelta(minutes=30)         # a collective that takes longer has hung


@dataclass(frozen=True)
class Place:
    """Where this process is: its device, and its number among all processes."""
    device: torch.device
    rank: int
    world: int


def setup(threads: int = 0) -> Place:
    """Join the process group that torchrun describes, or make one of a single process; share out the CPU's cores."""
    world, local_world = (int(os.environ.get(k, 1)) for k in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    rank, local_rank = (int(os.environ.get(k, 0)) for k in ("RANK", "LOCAL_RANK"))
    device = find_device(local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        store = dist.HashStore() if world == 1 else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_world))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Place(device, rank, world)


def find_device(local_rank: int = 0) -> torch.device:
    """cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def precision(device: torch.device, asked: str) -> torch.dtype:
    """The type of the tokens: what was asked for, or by "auto" bfloat16 where the hardware multiplies it.

    Also lets the remaining fp32 products use the fast units beside (TF32 on CUDA, oneDNN's kernels on CPU)."""
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if asked not in ("auto", *types):
        raise UserError(f"unknown dtype {asked!r}; there are auto, {', '.join(types)}")
    dtype = types.get(asked, torch.bfloat16 if multiplies_bfloat16(device) else torch.float32)
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("high" if device.type == "cuda" else "medium")
    return dtype


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 products: Ampere and later, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, p, bool)() for p in probes)


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of this machine's best matrix product, the roof under which a step runs: largest rate over a few sizes."""
    best = 0.0
    for n in (8192, 4096) if device.type == "cuda" else (512, 1024):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        a @ b
        synchronize(device)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            a @ b
            synchronize(device)
            best = max(best, 2 * n ** 3 / (time.perf_counter() - start))
    return best


def parallel(net: nn.Module, place: Place) -> nn.Module:
    """The network whose backward pass averages gradients over processes. MPS is one process and has no collectives."""
    if place.device.type == "mps":
        return net
    return nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)


def add_up(x: Tensor, place: Place) -> Tensor:
    """The sum of x over all processes."""
    if place.world > 1:
        dist.all_reduce(x)
    return x


def agree(number: int, place: Place) -> int:
    """Rank 0's number, on every process."""
    box = torch.tensor([number], device=place.device)
    if place.world > 1:
        dist.broadcast(box, 0)
    return int(box.item())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def memory(device: torch.device) -> float:
    """Peak memory of this process in GB: on the accelerator if there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:                                     # Windows has no resource module
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if os.uname().sysname == "Darwin" else 1e6)
