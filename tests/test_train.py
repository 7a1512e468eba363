"""The loop: the same run whatever interrupts it, on any number of processes; and its errors.

Runs are forked from one process that has imported everything (`python tests/test_train.py` is that process), so that a
run costs its steps and no start-up. It reads jobs from a pipe, one line of JSON each:
    argv    flags of train.py                         world   processes, as torchrun would start them
    kill    SIGKILL to all after so many seconds      faults  [how, k, n]: n calls to the disk fail, from the k-th on
    signals [step, rank, [pause, number], ...]: signals that this rank sends itself when it fetches that step
    bad     [step, what]: "image" or "rate" is not finite there; for rank 1 "flip" is a flipped bit of a weight and
            "user" an error of its data; "disk": it is nearly full from the start
    tty     give it a terminal
The answer to a job without argv is the list of imported modules.
How a call fails: "kill" before it, "half" with half of it done and then killed, "full" with no space left on the disk.
"""
import errno
import gc
import hashlib
import json
import math
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import config
import data
import fid
import model
import rng
import train
from runtime import checkpoint, distributed, log

TINY = ["--threads=1", "--workers=0", "--batch=8", "--microbatch=4", "--steps=12", "--save_every=4", "--log_every=3",
        "--warmup=5", "--sample_every=0", "--augment=", "--dtype=float32", "--model.semantics=none", "--model.width=16",
        "--model.depth=1", "--model.heads=2", "--model.resolution=8"]
CLOCK = {"images_per_second", "tflops", "share_of_peak", "waited_for_data", "memory_gb", "eta_s"}   # not the same twice
pytestmark = pytest.mark.xdist_group("train")               # one worker, so that one server forks all runs
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")


# ---------------------------------------------------------------- the other end of the pipes

class Server:
    """Starts runs and waits for their end."""
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def __call__(self, out, *flags, **job):
        """Exit codes of the processes, what they wrote to stderr, and the disk calls of each."""
        return self.ask({"argv": [*TINY, f"--out={out}", *flags], **job})

    def ask(self, job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def serve():
    """Fork the processes of every job on stdin."""
    import torch._dynamo                                    # every optimizer does

    modules = sorted(sys.modules)
    import multiprocessing.synchronize, numpy.ctypeslib, numpy.ma       # imported by every run
    model.flops(config.parse(TINY, config.Config()).model)  # counted once for all runs
    os.fsync = lambda handle: None                          # a killed process loses nothing that it has written
    config.help_text(config.Config())                       # reads the source, once for all runs
    distributed.matmul_peak = lambda *_: 1e12
    distributed.find_device = lambda *_: torch.device("cpu")
    train.plot = lambda out: "none"
    for line in sys.stdin:
        job = json.loads(line)
        if "argv" not in job:
            print(json.dumps(modules), flush=True)
            continue
        world, port, (read, write) = job.get("world", 1), free_port(), terminal() if job.get("tty") else os.pipe()
        pids = [fork(job, rank, world, port, write) for rank in range(world)]
        os.set_blocking(read, False)
        os.close(write)
        end, codes, text = time.monotonic() + job.get("kill", 1e9), {}, b""
        while len(codes) < world:
            time.sleep(0.002)
            text += drain(read)
            if time.monotonic() > end:
                end = math.inf
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            for rank, pid in enumerate(pids):
                if rank not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(found[1])
        text += drain(read)
        os.close(read)
        ended = {"codes": [codes[rank] for rank in range(world)], "text": text.decode(errors="replace")}
        print(json.dumps(ended), flush=True)


def terminal():
    """Two ends of a terminal of 120 columns."""
    import fcntl
    import termios
    ends = os.openpty()
    fcntl.ioctl(ends[1], termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    return ends


def drain(handle):
    """Everything that can be read now, without waiting for more."""
    parts = []
    try:
        while part := os.read(handle, 65536):
            parts.append(part)
    except OSError:                                         # nothing more now, or a terminal whose other end has gone
        pass
    return b"".join(parts)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fork(job, rank, world, port, handle):
    """The process id of a new process that does the job and exits with the code of the run."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.dup2(handle, 2)
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)
        os.environ |= {k: str(v) for k, v in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world,
                                                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items()}
        feed(job, rank)
        disk = Disk(*job.get("faults", ("none", 0, 0)))
        code = train.run(job["argv"])
        left = [t.name for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
        print(f"calls {disk.calls} halved {disk.halved} threads {left}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def feed(job, rank):
    """Signals and bad images come with the data, so that they come at an exact step."""
    real, (at, who, *numbers), (bad, what) = data.load_microbatch, job.get("signals", (-1, 0)), job.get("bad", (-1, ""))
    rate = train.learning_rate
    if what == "rate":
        train.learning_rate = lambda step, cfg: math.inf if step == bad else rate(step, cfg)
    if what == "disk":
        shutil.disk_usage = lambda path: SimpleNamespace(free=1000)
    def fetch(source, encoder, seed, batch, micro, step, m):
        out = real(source, encoder, seed, batch, micro, step, m)
        if (step, rank) == (at, who):
            for pause, number in numbers:
                time.sleep(pause)
                os.kill(os.getpid(), number)
        if step == bad and m == 1 and what == "image":
            out["image"][2, 0, 3, 3] = math.nan
        if step == bad and rank == 1 and what == "user":
            raise config.UserError("too many images cannot be read")
        if step == bad and rank == 1 and what == "flip":    # one bit of one weight of one process
            net = next(o for o in gc.get_objects() if isinstance(o, model.Denoiser) and o.training)
            net.final_layer.linear.bias.data.view(torch.int32)[1] ^= 1 << 20
        return out
    data.load_microbatch = fetch


class Disk:
    """Counts the calls that change the disk and makes some of them fail."""
    def __init__(self, how, first, count):
        self.how, self.failing, self.calls, self.halved = how, range(first, first + count), 0, []
        for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir"):
            self.wrap(os, name, None)
        self.wrap(checkpoint, "save_file", lambda tensors, path, **kw: os.truncate(path, os.path.getsize(path) // 2))
        self.wrap(Path, "write_bytes", lambda path, content: os.truncate(path, len(content) // 2))
        self.wrap(log, "append", lambda out, line: cut(out / "log.jsonl", 9))

    def wrap(self, owner, name, halve):
        real = getattr(owner, name)
        def call(*args, **kwargs):
            self.halved += [self.calls] if halve else []
            self.calls += 1
            if self.calls - 1 not in self.failing:
                return real(*args, **kwargs)
            if self.how == "full":
                raise OSError(errno.ENOSPC, "No space left on device")
            if self.how == "half" and halve:
                real(*args, **kwargs)
                halve(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(owner, name, call)


def cut(path, count):
    """Take the last bytes away."""
    os.truncate(path, path.stat().st_size - count)


@pytest.fixture(scope="module")
def run():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(30)


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    """The run that nothing interrupts: its folder, its number of disk calls, its text, and its calls that write."""
    out = tmp_path_factory.mktemp("straight") / "out"
    ended = run(out)
    assert ended["codes"] == [0], ended["text"]
    calls = ended["text"].split("calls ")[1]
    return out, int(calls.split()[0]), ended["text"], json.loads(calls.split("halved ")[1].split(" threads")[0])


def leaves(out):
    """What a run leaves behind: bytes of its checkpoints, its weights, log without the clock, names of all files."""
    files = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    exact = [f for f in files if f.endswith(("state.safetensors", ".png"))]
    hashes = {f: hashlib.sha256((out / f).read_bytes()).hexdigest() for f in exact}
    tensors, header = checkpoint.read_weights(out / "weights.safetensors")
    weights = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in tensors.items()}
    lines = [{k: v for k, v in line.items() if k not in CLOCK} for line in map(json.loads, (out / "log.jsonl").open())]
    return {"files": files, "hashes": hashes, "weights": weights, "log": lines, "state": log.read_status(out)["state"],
            "step": header["step"]}


def finish(run, out, *flags, **job):
    """Run to the end."""
    ended = run(out, *flags, **job)
    assert set(ended["codes"]) == {0}, ended["text"]
    return ended["text"]


def error(ended, *parts):
    """The one line that an expected failure prints last, with these parts in it."""
    lines = [line for line in ended["text"].splitlines() if not line.startswith("calls ")]
    assert "Traceback" not in ended["text"] and all(str(part) in lines[-1] for part in parts), ended["text"]
    return lines[-1]


# ---------------------------------------------------------------- killed

def check_faults(run, straight, tmp_path, points):
    expected = leaves(straight[0])
    for k, how in points:
        out = tmp_path / f"{how}-{k}"
        ended = run(out, faults=[how, k, 1])
        assert ended["codes"] == [-signal.SIGKILL], (how, k, ended["text"])
        finish(run, out)
        assert leaves(out) == expected, (how, k)


@needs_fork
def test_killed_at_some_disk_calls_and_run_again_it_is_the_same_run(run, straight, tmp_path):
    """Within the second checkpoint, within its half-written state, near the end."""
    calls, writes = straight[1], straight[3]
    assert calls > 60 and len(writes) > 12
    check_faults(run, straight, tmp_path, [(writes[len(writes) // 2], "half"), (calls // 2, "kill"),
                                           (calls - 4, "kill")])


@needs_fork
@pytest.mark.slow
def test_killed_at_every_disk_call_and_run_again_it_is_the_same_run(run, straight, tmp_path):
    """Before every call, and with every file half written."""
    check_faults(run, straight, tmp_path, [*((k, "kill") for k in range(straight[1])),
                                           *((k, "half") for k in straight[3])])


@needs_fork
@pytest.mark.slow
def test_killed_at_random_moments_it_is_the_same_run(run, tmp_path):
    """Kill runs at random moments, and resume each until it ends, until there were 50 kills."""
    flags, draw, kills, runs = ("--steps=40", "--save_every=7", "--log_every=5"), random.Random(0), 0, 0
    for name in ("warm-up", "straight"):
        t0 = time.monotonic()
        finish(run, tmp_path / name, *flags)
    whole = time.monotonic() - t0
    while kills < 50:
        out, runs = tmp_path / str(runs), runs + 1
        while run(out, *flags, kill=draw.uniform(0.1, 0.9) * whole)["codes"] != [0]:
            kills += 1
        assert leaves(out) == leaves(tmp_path / "straight")


# ---------------------------------------------------------------- several processes

def weights(out):
    return checkpoint.read_weights(out / "weights.safetensors")[0]


def losses(out):
    """Every number of the log that is no clock; a quarter without samples is 0."""
    keys = ("step", "loss", "grad_norm", "lr")
    return [v or 0 for line in leaves(out)["log"] for v in (*(line[k] for k in keys), *line["loss_by_noise"])]


@needs_fork
def test_two_processes_do_what_one_does(run, straight, tmp_path):
    """Two microbatches: a + b = b + a, so even the last bit is the same; on changing the number in mid-run too."""
    finish(run, tmp_path / "one-two", "--steps=6")
    assert "on 2 processes (was 1)" in finish(run, tmp_path / "one-two", world=2)
    finish(run, tmp_path / "two-one", "--steps=6", world=2)
    finish(run, tmp_path / "two-one")
    for name in ("one-two", "two-one"):
        assert leaves(tmp_path / name)["weights"] == leaves(straight[0])["weights"], name
        assert losses(tmp_path / name) == pytest.approx(losses(straight[0]), rel=2e-6), name


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--model.depth=2", "--lr_muon=0.01", "--model.arch=mpdit", "--forced_weight_norm=true", "--dtype=bfloat16"],
    ["--model.depth=2", "--model.arch=mpmmdit", "--forced_weight_norm=true", "--lr_mp=0.01", "--ema_snapshots=3",
     "--model.modulation=scale+rotate+gate"]])
def test_orthogonal_and_normalized_steps_are_the_same_on_two_processes_and_after_a_stop(flags, run, tmp_path):
    """Weights, averages and momentum bit for bit: each process takes the step for itself, from the same gradient."""
    finish(run, tmp_path / "one", *flags)
    finish(run, tmp_path / "two-one", *flags, "--steps=6", world=2)
    finish(run, tmp_path / "two-one", *flags)
    one, other = (load_file(tmp_path / name / "step-00000012" / "state.safetensors")
                  for name in ("one", "two-one"))
    assert one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())
    assert any(k.endswith("momentum") for k in one) == ("--lr_muon=0.01" in flags)
    if "--forced_weight_norm=true" in flags:
        rows = one["net.blocks.0.attn.qkv.weight"].square().mean(1)
        assert (rows - 1).abs().max() < 1e-5


@needs_fork
@pytest.mark.slow
def test_real_images_on_two_processes_then_one_are_those_of_one(run, tmp_path):
    """A class folder, cropped and mirrored, with two files of no use, which both processes meet."""
    for k in range(12):
        (tmp_path / "set" / f"class {k % 3}").mkdir(parents=True, exist_ok=True)
        image = Image.linear_gradient("L").rotate(30 * k).resize((30 + k, 24 + 2 * k))
        image.convert("RGB").save(tmp_path / "set" / f"class {k % 3}" / f"{k}.jpg")
    for name, content in (("html", b"<html>"), ("empty", b"")):
        (tmp_path / "set" / "class 1" / f"{name}.jpg").write_bytes(content)
    flags = [f"--data={tmp_path / 'set'}", "--augment=crop+flip", "--model.semantics=class", "--model.arch=dit",
             "--model.controls=crop+flip", "--max_bad_fraction=0.3", "--workers=2", "--steps=8"]
    finish(run, tmp_path / "one", *flags)
    finish(run, tmp_path / "two-one", *flags, "--steps=4", world=2)
    assert "on 1 processes (was 2)" in finish(run, tmp_path / "two-one", *flags)
    assert leaves(tmp_path / "two-one")["weights"] == leaves(tmp_path / "one")["weights"]
    assert losses(tmp_path / "two-one") == pytest.approx(losses(tmp_path / "one"), rel=2e-6)
    assert len(set(losses(tmp_path / "one")[1::8])) > 2
    for name in ("one", "two-one"):
        rows = map(json.loads, (tmp_path / name / "skipped.jsonl").read_text().splitlines())
        assert sorted(row["name"] for row in rows) == ["class 1/empty.jpg", "class 1/html.jpg"]


@pytest.mark.slow
@needs_fork
def test_four_microbatches_on_one_and_two_processes_differ_by_rounding_only(run, tmp_path):
    finish(run, tmp_path / "one", "--batch=16", "--steps=4")
    finish(run, tmp_path / "two", "--batch=16", "--steps=4", world=2)
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-6
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)


@needs_fork
def test_weights_that_differ_between_processes_are_not_saved(run, tmp_path):
    ended = run(tmp_path / "out", world=2, bad=[5, "flip"])
    assert set(ended["codes"]) == {1}
    assert "weights differ between processes at step 8; nothing was saved" in ended["text"]
    assert checkpoint.steps(tmp_path / "out") == [4]
    assert log.read_status(tmp_path / "out")["state"] == "failed:crash"


@needs_fork
def test_an_error_of_one_process_is_shown_and_is_the_status(run, tmp_path):
    ended = run(tmp_path / "out", world=2, bad=[5, "user"])
    assert ended["codes"][1] == 2 and ended["codes"][0] != 0
    assert "rank 1: error: too many images cannot be read." in ended["text"]
    status = log.read_status(tmp_path / "out")
    assert (status["state"], status["exit_code"]) == ("failed:user", 2) and "too many images" in status["reason"]


# ---------------------------------------------------------------- signals

@needs_fork
@pytest.mark.parametrize("number, flags", [(signal.SIGTERM, ()), (signal.SIGINT, ("--workers=2",))])
def test_a_signal_saves_and_stops_and_the_same_command_resumes(run, straight, tmp_path, number, flags):
    out = tmp_path / "out"
    ended = run(out, *flags, signals=[4, 0, [0, number]])
    assert ended["codes"] == [128 + number] and "threads []" in ended["text"]
    step = log.read_status(out)["step"]
    assert step == 6 or flags and step == 3                 # workers fetch ahead
    assert (f"stopped by {number.name} at step {step}; saved at step {step}; the same command resumes."
            in ended["text"])
    assert checkpoint.steps(out)[0] == step
    status = log.read_status(out)
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 128 + number, step)
    assert "resuming" in finish(run, out) and leaves(out) == leaves(straight[0])


@needs_fork
def test_a_signal_to_one_process_stops_all_of_them(run, straight, tmp_path):
    ended = run(tmp_path / "out", world=2, signals=[4, 1, [0, signal.SIGTERM]])
    assert ended["codes"] == [143, 143] and ended["text"].count("stopped by SIGTERM at step 6") == 1
    assert checkpoint.steps(tmp_path / "out") == [6, 4]


@needs_fork
def test_a_second_signal_ends_it_at_once_and_an_echo_of_the_first_does_not(run, tmp_path):
    ended = run(tmp_path / "out", signals=[4, 0, [0, signal.SIGINT], [1.05 * distributed.DEBOUNCE_S, signal.SIGTERM]])
    assert ended["codes"] == [143] and checkpoint.steps(tmp_path / "out") == [4]
    assert "once more to stop at once" in ended["text"] and "stopped by" not in ended["text"]
    ended = run(tmp_path / "out", signals=[4, 0, [0, signal.SIGINT], [0, signal.SIGTERM]])
    assert ended["codes"] == [130] and checkpoint.steps(tmp_path / "out") == [6, 4]


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("number, whole_group", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_under_torchrun_a_signal_saves_and_stops(tmp_path, number, whole_group):
    """Ctrl-C reaches the whole group and torchrun passes it on as well; a scheduler signals torchrun alone."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *TINY,
               f"--out={out}", "--steps=100000", "--save_every=100000"]
    with open(tmp_path / "text", "w+") as text:
        process = subprocess.Popen(command, cwd=ROOT, stderr=text, start_new_session=True)
        wait_for(lambda: len(log.read(out)) > 2)
        os.killpg(process.pid, number) if whole_group else os.kill(process.pid, number)
        process.wait(60)
        text.seek(0)
        printed = text.read()
    status = log.read_status(out)
    assert status["state"] == "stopped" and status["exit_code"] in (130, 143), printed
    assert checkpoint.latest(out)["step"] == status["step"] == log.read(out)[-1]["step"]
    wait_for(lambda: not alive(process.pid))


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition):
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# ---------------------------------------------------------------- not finite

@needs_fork
def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_spoilt(run, straight, tmp_path):
    out = tmp_path / "out"
    ended = run(out, bad=[7, "image"])
    assert ended["codes"] == [3]
    error(ended, "the gradient is not finite at step 8; the last checkpoint is of step 4; change --lr or")
    assert checkpoint.steps(out) == [4] and [line["step"] for line in log.read(out)] == [3, 4, 6]
    status = log.read_status(out)
    assert (status["state"], status["exit_code"], status["step"]) == ("failed:nonfinite", 3, 8)

    for _ in range(2):                                      # unchanged, it is refused, and again
        before = leaves_of_a_failure(out)
        ended = run(out, bad=[7, "image"])
        assert ended["codes"] == [3] and "step 3/12" not in ended["text"]
        error(ended, "diverged at step 8", "--lr", "--grad_clip", "status.json")
        assert leaves_of_a_failure(out) == before
    finish(run, out, "--lr=4e-4")
    assert leaves(out)["state"] == "done" and leaves(out)["weights"] != leaves(straight[0])["weights"]


def leaves_of_a_failure(out):
    return {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


@needs_fork
def test_a_loss_that_is_not_finite_on_one_process_stops_both(run, tmp_path):
    ended = run(tmp_path / "out", world=2, bad=[7, "image"])
    assert ended["codes"] == [3, 3] and ended["text"].count("is not finite at step 8") == 1
    assert log.read_status(tmp_path / "out")["state"] == "failed:nonfinite"


@needs_fork
def test_weights_that_are_not_finite_are_not_saved(run, tmp_path):
    ended = run(tmp_path / "out", bad=[7, "rate"])
    assert ended["codes"] == [3] and checkpoint.steps(tmp_path / "out") == [4]
    error(ended, "net.", "not finite at step 8; nothing was saved")


def test_after_a_bad_gradient_the_optimizer_touches_nothing():
    cfg, window = config.Config(lr=0.1), train.LossWindow(torch.device("cpu"))
    net = torch.nn.Linear(4, 3)
    opt = train.optimizer(net, cfg, window)
    def step(k, value):
        for p in net.parameters():
            p.grad = torch.full_like(p, value)
        window.add_norm(torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip), k)
        opt.step()
        return [v.clone() for p in net.parameters() for v in (p.detach(), *opt.state[p].values())]
    first, second = step(0, 0.3), step(1, 0.2)
    assert not any(torch.equal(a, b) for a, b in zip(first, second))
    for k, value in ((2, math.nan), (3, 0.1), (4, math.inf), (5, 0.1)):
        assert all(torch.equal(a, b) for a, b in zip(second, step(k, value)))
    assert window.bad.item() == 1 and window.bad_step.item() == 2
    assert [opt.state[p]["step"].item() for p in net.parameters()] == [2, 2]


# ---------------------------------------------------------------- what is not resumed

@needs_fork
def test_a_run_with_other_options_is_refused_by_name(run, straight):
    before = leaves_of_a_failure(straight[0])
    for flags, parts in (
            (["--model.depth=3", "--microbatch=8"], ["model.depth: 1 -> 3", "microbatch: 4 -> 8"]),
            (["--ema_std=0.05"], ["ema_std: 0.1 -> 0.05"]),
            (["--seed=1", "--batch=16"], ["seed: 0 -> 1", "batch: 8 -> 16", "data fingerprint", "another --out"])):
        ended = run(straight[0], *flags)
        assert ended["codes"] == [2]
        error(ended, "cannot resume", *parts)
    error(run(straight[0], "--steps=8"), "step 12 already", "past steps=8")
    after = leaves_of_a_failure(straight[0])
    assert {p for p in before if before[p] != after[p]} == {straight[0] / "status.json"}
    assert before.keys() == after.keys()
    run(straight[0])                                        # the status as it was


@needs_fork
def test_a_damaged_checkpoint_falls_back_and_two_are_an_error(run, straight, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(straight[0], out)
    state = out / "step-00000012" / "state.safetensors"
    state.write_bytes(flip(state.read_bytes(), 1000))
    text = finish(run, out)
    assert "step-00000012: sha256 mismatch" in text and "from step 8 " in text
    assert leaves(out) == leaves(straight[0])

    for where in out.glob("step-*"):
        os.truncate(where / "state.safetensors", 5000)
    ended = run(out)
    assert ended["codes"] == [2] and checkpoint.steps(out) == [12, 8]
    error(ended, "none of the 2 checkpoints", "another --out")
    for where in out.glob("step-*"):
        shutil.rmtree(where)
    ended = run(out)
    assert ended["codes"] == [2]
    error(ended, "weights.safetensors but no checkpoint")


@needs_fork
def test_checkpoints_that_a_kill_left_over_go_when_the_run_resumes(run, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "out")
    shutil.copytree(tmp_path / "out" / "step-00000008", tmp_path / "out" / "step-00000004")
    finish(run, tmp_path / "out")
    assert leaves(tmp_path / "out") == leaves(straight[0])


def flip(content, at, bit=3):
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1:]


@pytest.mark.slow
@needs_fork
def test_data_that_has_changed_is_named_and_data_that_has_moved_is_not(run, tmp_path):
    for k in range(8):
        path = tmp_path / "images" / f"class {k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (30 * k, 9, 90)).save(path)
    flags = ["--model.semantics=class", "--workers=2", "--augment=crop+flip"]
    finish(run, tmp_path / "out", *flags, f"--data={tmp_path / 'images'}", "--steps=4")
    (tmp_path / "images").rename(tmp_path / "moved")
    flags.append(f"--data={tmp_path / 'moved'}")
    assert "from step 4" in finish(run, tmp_path / "out", *flags, "--steps=8")
    shutil.copy(tmp_path / "moved/class 0/0.png", tmp_path / "moved/class 0/9.png")
    error(run(tmp_path / "out", *flags, "--steps=12"), "cannot resume", "data fingerprint: ", " -> ")
    with open(tmp_path / "moved/class 0/0.png", "r+b") as file:
        file.truncate(30)
    ended = run(tmp_path / "new", *flags, "--max_bad_fraction=0")
    assert ended["codes"] == [2] and log.read_status(tmp_path / "new")["state"] == "failed:user"
    error(ended, "class 0/0.png", "--max_bad_fraction")


@needs_fork
def test_one_run_at_a_time_writes_to_a_folder(run, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "out")
    with checkpoint.lock(tmp_path / "out"):
        ended = run(tmp_path / "out", "--steps=14")
    assert ended["codes"] == [2]
    error(ended, "another run is writing to")
    assert leaves(tmp_path / "out") == leaves(straight[0])


# ---------------------------------------------------------------- the disk

@needs_fork
@pytest.mark.slow
def test_a_disk_that_fails_at_any_call_costs_a_checkpoint_and_not_the_run(run, straight, tmp_path):
    for k in range(straight[1]):
        out = tmp_path / str(k)
        ended = run(out, faults=["full", k, 1])
        assert ended["codes"] in ([0], [2]) and "Traceback" not in ended["text"], (k, ended["text"])
        assert "No space left" in ended["text"] or last(out) == last(straight[0]), (k, ended["text"])
        finish(run, out)
        assert last(out) == last(straight[0]), k


@needs_fork
def test_a_disk_that_stays_full_is_an_error_at_the_end(run, straight, tmp_path):
    out = tmp_path / "out"
    ended = run(out, faults=["full", straight[1] // 2, 10 ** 6])
    assert ended["codes"] == [2] and checkpoint.latest(out)["step"] == 4
    error(ended, "all 12 steps are done", "too full for the last checkpoint", "resumes from step 4")
    assert "warning: checkpoint at step 8 not written" in ended["text"]
    assert "last good checkpoint: step 4." in ended["text"]
    finish(run, out)
    assert last(out) == last(straight[0])


def last(out):
    """The last checkpoint and the weights; lines and earlier checkpoints may have been lost."""
    found = leaves(out)
    return found["weights"], found["hashes"]["step-00000012/state.safetensors"], found["state"]


@needs_fork
def test_a_disk_without_room_for_one_checkpoint_is_an_error_before_training(run, tmp_path):
    ended = run(tmp_path / "out", bad=[-1, "disk"])
    assert ended["codes"] == [2] and "step 3/12" not in ended["text"]
    error(ended, "cannot write to", "GB free", "GB needed")


# ---------------------------------------------------------------- errors before training

@pytest.mark.parametrize("flags, parts", [
    (["--batch=17"], ["batch=17", "microbatch=4", "--microbatch=1"]), (["--batch=0"], ["batch=0", "1"]),
    (["--microbatch=0"], ["microbatch=0"]), (["--steps=-1"], ["steps=-1"]), (["--lr=nan"], ["lr=nan"]),
    (["--lr=inf"], ["lr=inf"]), (["--lr=-1"], ["lr=-1"]), (["--ema_std=0.5"], ["ema_std=0.5", "0.288"]),
    (["--cond_dropout=1.5"], ["cond_dropout=1.5"]),
    (["--threads=-1"], ["threads=-1"]), (["--workers=-1"], ["workers=-1"]), (["--cooldown=2"], ["cooldown=2"]),
    (["--beta1=1"], ["beta1=1"]), (["--sample_every=-1"], ["sample_every=-1"]), (["--log_every=0"], ["log_every=0"]),
    (["--model.patch=5"], ["model.resolution=8", "model.patch=5"]), (["--model.width=18"], ["model.width=18"]),
    (["--model.heads=3"], ["model.width=16", "model.heads=3"]), (["--model.resolution=0"], ["model.resolution=0"]),
    (["--model.arch=ditt"], ["ditt", "dit, mmdit"]), (["--model.schedule=cosine"], ["cosine", "scaled_linear, linear"]),
    (["--dtype=float16"], ["float16", "auto, float32, bfloat16"]), (["--compile=yes"], ["yes", "auto, on, off"]),
    (["--data=/nowhere"], ["/nowhere"]), (["--augment=zoom"], ["zoom", "crop, flip, size"]),
    (["--model.controls=zoom"], ["zoom"]), (["--shapes.objects=0"], ["objects=0"]),
    (["--shapes.layout=left"], ["free, grid, sides"]),
    (["--shapes.layout=sides", "--shapes.objects=3"], ["layout='sides'", "objects=3"]),
    (["--model.semantics=class", "--model.classes=1"], ["model.classes=1"]), (["--stepz=3"], ["--stepz", "--steps"]),
    (["--steps=many"], ["--steps", "'many'"]), (["--config=none.py"], ["none.py"]), (["--steps=1e30"], ["steps=1"]),
    (["--fid_every=2"], ["fid_every=2", "belong together"]), (["--fid_ref=ref.npz"], ["belong together"]),
    (["--out=/dev/null/x"], ["/dev/null/x", "another --out"]),
])
def test_an_error_is_one_line_before_training(flags, parts, tmp_path, capfd):
    code = train.run([*TINY, f"--out={tmp_path / 'out'}", *flags])
    lines = capfd.readouterr().err.splitlines()
    assert code == 2 and lines[-1].startswith("error: ") and lines[-1].endswith("."), lines
    assert len(lines) == 1 and all(part in lines[0] for part in parts), lines
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_microbatches_that_processes_cannot_share_are_an_error():
    with pytest.raises(config.UserError, match="8 microbatches, which 3 processes cannot share; use 1, 2, 4, 8 proc"):
        train.check(config.Config(batch=256, microbatch=32), world=3)
    train.check(config.Config(batch=256, microbatch=32), world=4)


@pytest.mark.parametrize("error, code, parts", [
    (KeyboardInterrupt(), 130, ["stopped by SIGINT before training began"]),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nMore."), 2,
     ["--microbatch", "allocate 3 GiB"]),
])
def test_other_endings_are_one_line_too(error, code, parts, tmp_path, monkeypatch, capfd):
    def fail(*args):
        raise error
    monkeypatch.setattr(model, "build", fail)
    assert train.run([*TINY, f"--out={tmp_path}"]) == code
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and all(part in lines[0] for part in parts), lines


def test_a_crash_keeps_its_traceback_and_its_status(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "matmul_peak", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.run([*TINY, f"--out={tmp_path}"])
    status = log.read_status(tmp_path)
    assert (status["state"], status["exit_code"]) == ("failed:crash", 1) and "ZeroDivisionError" in status["reason"]
    with checkpoint.lock(tmp_path):                         # the lock has gone with it
        pass


# ---------------------------------------------------------------- one step

def test_the_first_step_is_what_a_loop_by_hand_gives(tmp_path, monkeypatch):
    """Loss, gradient norm, weights after AdamW: four microbatches are the mean over all their images."""
    monkeypatch.setattr(distributed, "matmul_peak", lambda *_: 1.0)
    monkeypatch.setattr(distributed, "find_device", lambda *_: torch.device("cpu"))
    flags = [*TINY, f"--out={tmp_path}", "--batch=16", "--steps=1", "--log_every=1", "--warmup=4", "--grad_clip=0.01",
             "--loss_sigma_power=1.5"]
    assert train.run(flags) == 0
    cfg = config.from_json((tmp_path / "config.json").read_text())
    source = data.open_source(cfg)
    torch.manual_seed(rng.seed64(0, "weights"))
    net = model.build(cfg.model)
    alpha_bar = net.alpha_bar

    losses, quarters, weight = [], [], []
    for m in range(4):
        g = torch.Generator().manual_seed(rng.seed64(0, "noise", 0, m))
        x0 = data.load_microbatch(source, None, 0, 16, 4, 0, m)["image"]
        loss, i = train.denoising_loss(net, x0, train.Condition(), g, alpha_bar, cfg)
        losses, quarters = losses + [loss], quarters + (i // 250).tolist()
        weight.append(((1 - alpha_bar[i]) / alpha_bar[i]) ** 0.75)
    loss = torch.cat(losses)
    every = ((1 - alpha_bar) / alpha_bar) ** 0.75           # sigma ** 1.5
    (loss * torch.cat(weight) / every.mean()).mean().backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in net.parameters()))
    for p in net.parameters():
        p.grad *= 0.01 / norm
    torch.optim.AdamW(net.parameters(), 1e-3 / 4, (0.9, 0.95), weight_decay=cfg.weight_decay, foreach=False).step()

    line = log.read(tmp_path)[0]
    means = [loss[[q == k for q in quarters]].mean().item() for k in range(4)]
    assert line["loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert line["loss_by_noise"] == pytest.approx(means, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and line["lr"] == pytest.approx(1e-3 / 4)
    for name, tensor in weights(tmp_path).items():          # the average of one step is that step
        assert torch.allclose(tensor, net.state_dict()[name], atol=2e-6), name


def test_the_learning_rate_is_a_function_of_the_step():
    cfg = config.Config(steps=100, lr=2.0, warmup=10, cooldown=0.2)
    rates = [train.learning_rate(step, cfg) for step in range(100)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6]) and rates[9:81] == [2.0] * 72
    assert rates[81] == pytest.approx(1.9) and rates[99] == pytest.approx(0.1)
    assert train.learning_rate(0, config.Config(warmup=0, lr=3.0)) == 3.0


class Reads(TorchDispatchMode):
    """Notes every operation whose result the host waits for, outside of the making of a batch."""
    WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "item"}

    def __init__(self):
        super().__init__()
        self.step, self.seen, self.inside = -1, {}, False

    def note(self, what):
        if not self.inside:
            self.seen.setdefault(self.step, []).append(what)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITS:
            self.note(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_the_loop_waits_for_the_device_at_lines_of_the_log_only(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "matmul_peak", lambda *_: 1.0)
    reads, real = Reads(), data.load_microbatch
    def fetch(*args):
        reads.inside = True
        out = real(*args)
        reads.step, reads.inside = args[5], False
        return out
    monkeypatch.setattr(data, "load_microbatch", fetch)
    for name in ("tolist", "numpy", "cpu", "item"):
        method = getattr(torch.Tensor, name)
        def noted(self, *args, method=method, name=name, **kwargs):
            reads.note(name)
            return method(self, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, noted)
    with reads:
        assert train.run([*TINY, f"--out={tmp_path}", "--steps=20", "--log_every=10", "--save_every=20"]) == 0
    at = {k for k, v in reads.seen.items() if k >= 0}
    assert at == {9, 19}                                    # read after these, before the next begins
    assert reads.seen[9] == ["tolist"]


class Remembers(torch.nn.Module):
    """A network that keeps the condition that it was given."""
    def forward(self, x, i, cond):
        self.cond = cond
        return torch.zeros_like(x)


@pytest.mark.parametrize("drop, drop_controls", [(0.1, 0.1), (0.3, 0.0), (0.0, 0.25)])
def test_shares_that_are_trained_without_controls_and_without_everything(drop, drop_controls):
    n, net = 20000, Remembers()
    cond = train.Condition(label=torch.ones(n, dtype=torch.long), flip=torch.ones(n), has_controls=torch.ones(n))
    g, alpha_bar = torch.Generator().manual_seed(3), torch.linspace(0.99, 0.01, 50)
    train.denoising_loss(net, torch.zeros(n, 1, 2, 4), cond, g, alpha_bar,
                         config.Config(cond_dropout=drop, control_dropout=drop_controls))
    null, free = net.cond.label == -1, net.cond.has_controls == 0
    assert not (null & ~free).any()                         # never controls without semantics
    for share, expected in ((null, drop), (free & ~null, drop_controls)):
        error = (expected * (1 - expected) / n) ** 0.5
        assert abs(share.float().mean().item() - expected) <= 4 * error


@pytest.mark.slow
def test_captions_are_padded_as_configured_and_with_fresh_noise_every_step(tmp_path, monkeypatch):
    """The input of the network, step by step: copies of the tokens, and noise that no two steps share."""
    monkeypatch.setattr(distributed, "matmul_peak", lambda *_: 1.0)
    monkeypatch.setattr(distributed, "find_device", lambda *_: torch.device("cpu"))
    seen, loss = [], train.denoising_loss

    def spy(net, x0, cond, *rest):
        seen.append(cond.text)
        return loss(net, x0, cond, *rest)
    monkeypatch.setattr(train, "denoising_loss", spy)
    texts = {}
    for padding in ("zero", "replicate", "noisy"):
        seen.clear()
        flags = [*TINY, f"--out={tmp_path / padding}", "--model.semantics=text", "--steps=2", f"--padding={padding}",
                 "--batch=4"]
        assert train.run(flags) == 0
        texts[padding] = seen[0]
    cfg = config.from_json((tmp_path / "noisy" / "config.json").read_text())
    batch = data.load_microbatch(data.open_source(cfg), train.make_encoder(cfg), 0, 4, 4, 0, 0)
    assert torch.equal(texts["zero"], batch["text"])
    for b, n in enumerate(batch["lengths"].tolist()):
        copies = batch["text"][b, [j % n for j in range(cfg.model.text_length)]]
        assert torch.equal(texts["replicate"][b], copies)
        assert 0 < (texts["noisy"][b] - copies).abs().max() < 1             # beta 0.02, std of a token below 2
    assert not torch.equal(seen[0] - seen[1], torch.zeros_like(seen[0]))


# ---------------------------------------------------------------- output

@needs_fork
def test_without_a_terminal_there_is_one_line_for_each_of_the_log(run, straight):
    text = straight[2]
    assert "\r" not in text and "it/s" not in text
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["3/12", "4/12", "6/12", "8/12", "9/12", "12/12"]
    assert all("loss " in line and "images/s" in line and "left" in line for line in lines)
    assert "batch = 8" in text and "2 x 4" in text


@needs_fork
def test_on_a_terminal_there_is_a_bar(run, tmp_path):
    text = run(tmp_path / "out", tty=True)["text"]
    assert "\r" in text and "12/12" in text and "images/s" in text and "step 3/12" not in text


@needs_fork
def test_the_log_says_how_fast_it_was(straight):
    for line in log.read(straight[0]):
        assert CLOCK | {"step", "loss", "loss_by_noise", "grad_norm", "lr"} == set(line)
        assert all(line[key] >= 0 for key in CLOCK) and line["waited_for_data"] <= 1
        flops = 3 * model.flops(config.from_json((straight[0] / "config.json").read_text()).model)
        assert line["tflops"] == pytest.approx(line["images_per_second"] * flops / 1e12, rel=1e-4)
        assert line["share_of_peak"] == pytest.approx(line["tflops"], rel=1e-4)


@pytest.mark.slow
@needs_fork
def test_previews_are_made_once_and_again_when_lost(run, tmp_path):
    flags = ["--sample_every=6", "--steps=6", "--model.timesteps=10"]        # fewer than a preview's steps
    finish(run, tmp_path, *flags)
    image = tmp_path / "samples" / "step-00000006.png"
    first = image.read_bytes()
    image.unlink()
    finish(run, tmp_path, *flags)
    assert image.read_bytes() == first and [p.name for p in image.parent.iterdir()] == [image.name]


class Rows:
    """A source of 5,000 samples whose size is their number, and how many were read at a time."""
    classes, fingerprint = ["a"], "f"

    def __init__(self):
        self.reads = []

    def __len__(self):
        return 5000

    def records(self, indices, epochs):
        self.reads.append(len(indices))
        numbers = torch.as_tensor(np.asarray(indices), dtype=torch.float32)
        return {"size": numbers[:, None].expand(-1, 2)}


def test_control_values_come_from_all_over_the_data_and_few_images_are_read_at_a_time():
    cfg = config.Config(model=config.ModelConfig(semantics="none", controls="size"))
    source = Rows()
    sizes = [h for h, _ in json.loads(train.weights_metadata(cfg, source)["controls"])["size"]]
    assert len(sizes) == train.CONTROL_ROWS == sum(source.reads) and len(set(sizes)) == len(sizes)
    assert max(source.reads) <= train.READ
    assert abs(np.mean(sizes) - 2499.5) < 4 * 5000 / 12 ** 0.5 / len(sizes) ** 0.5      # uniform, 4 standard errors


@pytest.mark.slow
def test_a_measurement_that_a_kill_cut_off_is_made_when_the_run_resumes(tmp_path, monkeypatch):
    class Monitor:
        """Stands for fid.Monitor, which needs the weights of Inception."""
        def __init__(self, *_):
            pass

        def __call__(self, net, step):
            if step == 2 and killed:
                killed.pop()
                raise RuntimeError("killed within the measurement")
            log.append(tmp_path, {"step": step, "evaluation_s": 0.1})

    killed = [True]
    monkeypatch.setattr(fid, "Monitor", Monitor)
    monkeypatch.setattr(distributed, "matmul_peak", lambda *_: 1.0)
    flags = [*TINY, "--steps=4", "--save_every=2", "--log_every=2", f"--out={tmp_path}", "--fid_every=2",
             "--fid_ref=ref.npz"]
    with pytest.raises(RuntimeError):
        train.run(flags)
    assert train.run(flags) == 0
    measured = [line["step"] for line in log.read(tmp_path) if "evaluation_s" in line]
    assert measured == [2, 4]
    assert train.run(flags) == 0                            # and not once more
    assert [line["step"] for line in log.read(tmp_path) if "evaluation_s" in line] == measured


def test_weights_carry_what_sampling_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "matmul_peak", lambda *_: 1.0)
    flags = ["--model.semantics=class", "--model.controls=size+crop", "--augment=size+crop", "--steps=1"]
    assert train.run([*TINY, f"--out={tmp_path}", *flags]) == 0
    header, (net, cfg) = checkpoint.read_header(tmp_path / "weights.safetensors"), model.load(tmp_path)
    classes = json.loads(header["classes"])
    assert len(classes) == cfg.model.classes == int(header["null_class"]) > 1 and header["step"] == "1"
    controls = json.loads(header["controls"])
    assert set(controls) == {"size", "crop"} and len(controls["size"]) == train.CONTROL_ROWS
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in net.state_dict())


@needs_fork
def test_starting_brings_in_nothing_heavy(run):
    heavy = {"torchvision", "open_clip", "lpips", "scipy", "diffusers", "transformers", "matplotlib", "pandas"}
    modules = run.ask({})
    assert "train" in modules and not heavy & set(modules)


if __name__ == "__main__":
    serve()
