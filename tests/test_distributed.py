"""Processes, signals, dtypes; and systems that lack something."""
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as c10d

from config import UserError
from runtime import distributed

CPU = torch.device("cpu")
ALONE = distributed.Dist(CPU, 0, 1)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def dist():
    before = torch.get_num_threads()
    yield distributed.setup(threads=1)
    torch.set_num_threads(before)


# ---------------------------------------------------------------- processes

def test_a_process_group_always_exists(dist):
    assert c10d.is_initialized() and (dist.rank, dist.world) == (0, 1) and torch.get_num_threads() == 1
    assert distributed.setup(threads=1) == dist                # again is no error
    distributed.cleanup()
    assert not c10d.is_initialized()
    distributed.cleanup()


def test_the_cores_that_a_process_may_use_are_shared_out(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for local, threads in (("1", 6), ("3", 2), ("8", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        distributed.setup()
        assert torch.get_num_threads() == threads
    monkeypatch.delattr(os, "sched_getaffinity")
    assert distributed.cores() == 64                            # macOS and Windows
    torch.set_num_threads(before)


def test_collectives_of_one_process_are_the_identity(dist):
    x = torch.tensor([1.5, -2.0])
    assert distributed.all_reduce_sum(x.clone(), dist).equal(x) and distributed.broadcast_from_rank0(-7, dist) == -7
    assert not distributed.replicas_differ(torch.nn.Linear(2, 3), dist)


TWO = """
import sys, torch
from runtime import distributed
rank = int(sys.argv[1])
dist = distributed.setup(threads=1)
assert (dist.rank, dist.world) == (rank, 2)
assert distributed.all_reduce_sum(torch.tensor([1.0 + rank, 2.0]), dist).tolist() == [3.0, 4.0]
assert distributed.broadcast_from_rank0(5 + rank, dist) == 5
assert distributed.broadcast_from_rank0(2 ** 40 - rank, dist) == 2 ** 40
torch.manual_seed(0)
net = torch.nn.Linear(3, 4)
assert not distributed.replicas_differ(net, dist)
if rank == 1:
    net.bias.data.view(torch.int32)[2] ^= 1
assert distributed.replicas_differ(net, dist)
x = torch.randn(2, 6, 3)[rank]
ddp = distributed.wrap_ddp(net, dist)
ddp(x).square().mean().backward()
whole = torch.nn.Linear(3, 4)
whole.load_state_dict(net.state_dict())
torch.manual_seed(0), torch.nn.Linear(3, 4)
whole(torch.randn(2, 6, 3)).square().mean().backward()
assert torch.allclose(whole.weight.grad, net.weight.grad, atol=1e-7)
print("fine", rank)
distributed.cleanup()
"""


@pytest.mark.slow
def test_two_processes_add_up_agree_average_and_notice_a_flipped_bit():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    both = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    runs = [subprocess.Popen([sys.executable, "-c", TWO, str(rank)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, env={**both, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)]
    for rank, run in enumerate(runs):
        said = run.communicate(timeout=120)[0]
        assert run.returncode == 0 and f"fine {rank}" in said, said


def test_windows_has_no_resource_limits(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delattr(os, "uname", raising=False)
    monkeypatch.setattr(distributed, "resource", None)
    assert distributed.setup(1).world == 1 and distributed.memory(CPU) != distributed.memory(CPU)       # nan
    assert set(distributed.versions()) == {"python", "torch", "numpy", "pillow", "device"}
    torch.set_num_threads(before)


# ---------------------------------------------------------------- signals

def test_a_signal_becomes_a_number_and_handlers_come_back(capfd):
    before = [signal.getsignal(s) for s in distributed.SIGNALS]
    with distributed.Stop(verbose=True) as stop:
        assert stop.signal == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)                 # at once: the same one, by another way
        assert stop.signal == signal.SIGTERM
    assert [signal.getsignal(s) for s in distributed.SIGNALS] == before
    assert capfd.readouterr().err.count("once more to stop at once") == 1


def test_a_second_signal_later_ends_the_process_unless_signals_are_ignored(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with distributed.Stop(verbose=False) as stop:
        stop.handle(signal.SIGINT, None)
        stop.received -= distributed.DEBOUNCE_S
        stop.ignore = True
        stop.handle(signal.SIGTERM, None)
        assert ended == []
        stop.ignore = False
        stop.handle(signal.SIGTERM, None)
        assert ended == [128 + signal.SIGTERM]


# ---------------------------------------------------------------- types and speed

def test_an_unknown_type_is_an_error_that_names_the_known(monkeypatch):
    with pytest.raises(UserError, match="dtype='half'; there are auto, float32, bfloat16"):
        distributed.compute_dtype(CPU, "half")
    assert distributed.compute_dtype(CPU, "float32") == torch.float32
    for able in (True, False):
        monkeypatch.setattr(distributed, "supports_bf16", lambda device: able)
        assert distributed.compute_dtype(CPU, "auto") == (torch.bfloat16 if able else torch.float32)
    torch.set_float32_matmul_precision("highest")


def test_the_peak_is_that_of_the_best_product(monkeypatch):
    clock = iter(range(10 ** 6))                            # every look at the clock costs a second
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert distributed.matmul_peak(CPU, torch.float32, seconds=4) == 2 * 1024 ** 3


def test_memory_counts_what_is_taken():
    before = distributed.memory(CPU)
    assert 0.05 < before < 100                              # GB: torch alone is more than 50 MB
    block = torch.ones(400_000_000, dtype=torch.uint8)
    assert distributed.memory(CPU) >= before and distributed.memory(CPU) >= 0.4 and block[-1] == 1


def test_only_a_gpu_wants_pinned_memory():
    batch = {"image": torch.ones(2, 3), "caption": ["a", "b"]}
    assert distributed.pin_memory(batch, ALONE) is batch
    seen = []
    tensor = SimpleNamespace(pin_memory=lambda: seen.append("pinned"))
    cuda = distributed.Dist(torch.device("cuda", 0), 0, 1)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(distributed, "Tensor", SimpleNamespace)
        assert distributed.pin_memory({"image": tensor, "caption": ["a"]}, cuda) == {"image": None, "caption": ["a"]}
    assert seen == ["pinned"]


def test_outside_of_the_main_thread_signals_are_left_alone():
    handlers, failed = [signal.getsignal(s) for s in distributed.SIGNALS], []

    def work():
        try:
            with distributed.Stop(verbose=False):
                pass
        except ValueError as e:
            failed.append(e)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and [signal.getsignal(s) for s in distributed.SIGNALS] == handlers
