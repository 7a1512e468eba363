"""Distributed runs: process group, device, compute dtype, collectives, signals.

A process group always exists, of one process if need be, so nothing below `setup` branches on it.
"""
import faulthandler
import os
import platform
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import PIL
import torch
import torch.distributed as c10d
from torch import Tensor, nn

from config import check_name

try:
    import resource
except ImportError:                     # Windows
    resource = None

TIMEOUT = timedelta(minutes=30)         # a collective that takes longer has hung
SIGNALS = (signal.SIGINT, signal.SIGTERM)   # they make a run save and stop
DTYPES = ("auto", "float32", "bfloat16")
FILES = (65_536, 10_240)                # open files that a process requests; macOS grants the second
DEBOUNCE_S = 2.0                        # seconds within which a signal repeats the one before


@dataclass(frozen=True)
class Dist:
    """The device of this process, its rank, and the number of processes."""
    device: torch.device
    rank: int
    world: int


def setup(threads: int = 0) -> Dist:
    """Join the process group that torchrun describes, or make one of a single process; share out the CPU's cores."""
    world, local_world = (int(os.environ.get(k, 1)) for k in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    rank, local_rank = (int(os.environ.get(k, 0)) for k in ("RANK", "LOCAL_RANK"))
    device = find_device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not c10d.is_initialized():
        c10d.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world,
                                store=c10d.HashStore() if world == 1 else None, timeout=TIMEOUT)
    raise_file_limit()
    torch.set_num_threads(threads or max(1, cores() // local_world))
    if hasattr(faulthandler, "register") and sys.__stderr__:    # kill -USR2 prints where every thread is
        faulthandler.register(signal.SIGUSR2, file=sys.__stderr__, all_threads=True)
    return Dist(device, rank, world)


def raise_file_limit() -> None:
    """Raise this process's limit of open files: a data set may be thousands of memory-mapped files."""
    if resource is None:                                    # Windows does not count mapped files
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in FILES if hard < 0 else (min(FILES[0], hard), min(FILES[1], hard)):     # < 0: no limit
        if 0 <= soft < limit:
            with suppress(ValueError, OSError):             # macOS grants less than it says
                return resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def cleanup() -> None:
    """Leave the process group, at the end of a program."""
    if c10d.is_initialized():
        c10d.destroy_process_group()


def cores() -> int:
    """CPU cores that this process may use: a cluster may allot fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_device(local_rank: int = 0) -> torch.device:
    """cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def compute_dtype(device: torch.device, name: str) -> torch.dtype:
    """The dtype of the tokens; "auto" is bfloat16 where the hardware multiplies it."""
    check_name("dtype", name, DTYPES)
    if name == "float32" or name == "auto" and not supports_bf16(device):
        return torch.float32
    # The remaining fp32 products may use fast units too: TF32 on CUDA, oneDNN's kernels on CPU.
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "medium")
    return torch.bfloat16


def supports_bf16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 products: Ampere and later, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, p, bool)() for p in probes)


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest matrix product measured on this machine: the bound on the speed of a step."""
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


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished; a CPU always has."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def memory(device: torch.device) -> float:
    """Peak memory of this process in GB, on the accelerator if there is one; nan on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else float("nan")
    return peak / (1e9 if sys.platform == "darwin" else 1e6)    # bytes there, kB elsewhere


def versions() -> dict[str, str]:
    """Versions and hardware that decide the last bit of a result."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "pillow": PIL.__version__, "device": gpu or f"{platform.system()} {platform.machine()}"}


def pin_memory(batch: dict, dist: Dist) -> dict:
    """The batch in memory from which a GPU copies while it computes; other devices need none."""
    if dist.device.type != "cuda":
        return batch
    return {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}


def wrap_ddp(net: nn.Module, dist: Dist) -> nn.Module:
    """Wrap the network so that its backward pass averages gradients over processes. MPS has no collectives."""
    if dist.device.type == "mps":
        return net
    ddp = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False                           # they never change
    return ddp


def all_reduce_sum(x: Tensor, dist: Dist) -> Tensor:
    """The sum of x over all processes."""
    if dist.world > 1:
        c10d.all_reduce(x)
    return x


def broadcast_from_rank0(number: int, dist: Dist) -> int:
    """Rank 0's number, on every process; all wait for rank 0 here."""
    box = torch.tensor([number], device=dist.device)
    if dist.world > 1:
        c10d.broadcast(box, 0)
    return int(box.item())


def replicas_differ(net: nn.Module, dist: Dist) -> bool:
    """Whether the fp32 weights of any two processes differ: compares the sum of each parameter's bits."""
    if dist.world == 1:
        return False
    sums = torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for p in net.parameters()])
    both = torch.cat([sums, -sums])
    c10d.all_reduce(both, c10d.ReduceOp.MAX)                # largest, and minus smallest
    return bool((both[:len(sums)] + both[len(sums):]).any())


class Stop:
    """A context in which SIGINT and SIGTERM only set `signal`; a second one, DEBOUNCE_S later, ends the process.

    torchrun repeats a Ctrl-C that its processes got already: that is no second signal. `ignore` = True drops all."""
    def __init__(self, verbose: bool) -> None:
        self.signal, self.received, self.verbose, self.ignore = 0, 0.0, verbose, False

    def __enter__(self) -> "Stop":
        here = threading.current_thread() is threading.main_thread()    # elsewhere Python has no handlers
        self.before = {s: signal.signal(s, self.handle) for s in SIGNALS} if here else {}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def handle(self, number: int, frame: object) -> None:
        if self.ignore or self.signal and time.monotonic() - self.received < DEBOUNCE_S:
            return
        if self.signal:
            os._exit(128 + number)
        self.signal, self.received = number, time.monotonic()
        if self.verbose:
            with suppress(OSError):                         # a closed terminal
                os.write(2, b"\nsaving and stopping at the next line of the log; once more to stop at once\n")
