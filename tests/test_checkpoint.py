"""The run folder: files are read back bit for bit or refused, and every damage is noticed."""
import errno
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from config import UserError
from runtime import checkpoint, log

META = {"config": {"lr": 0.001, "out": "out/a"}, "data": "f00d", "world": 1, "threads": 2, "torch": "2.13.0"}


def tensors(value=0.0):
    g = torch.Generator().manual_seed(3)
    return {"net.a.weight": torch.randn(5, 7, generator=g) + value, "opt.a.step": torch.tensor(3.0),
            "net.count": torch.arange(4), "ema.half": torch.randn(6, generator=g).bfloat16()}


def write(out, *steps):
    out.mkdir(exist_ok=True)
    assert all(checkpoint.save(out, step, tensors(step), META) for step in steps)


def files(out):
    return sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())


# ---------------------------------------------------------------- there and back

def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    write(tmp_path, 7)
    assert checkpoint.latest(tmp_path) == {**META, "format": 1, "step": 7, "sha256": checkpoint.sha256_file(
        tmp_path / "step-00000007" / "state.safetensors")}
    back = {k: torch.zeros_like(v) for k, v in tensors().items()}
    checkpoint.read_state(checkpoint.folder(tmp_path, 7), back)
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors(7).items())


def test_the_last_two_are_kept_and_nothing_else_is_left(tmp_path):
    write(tmp_path, 7, 9, 100_000_000, 12)                  # 12 after 100,000,000: the later one was damaged
    assert checkpoint.steps(tmp_path) == [12, 9]
    assert files(tmp_path) == [f"step-{s:08d}/{f}" for s in (9, 12) for f in ("meta.json", "state.safetensors")]


def test_other_folders_are_no_checkpoints_and_are_left_alone(tmp_path):
    for name in ("step-5", "step-0000005x", "mine", "step-00000003.bak"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path) is None
    write(tmp_path, 1, 2, 3, 4)
    assert checkpoint.steps(tmp_path) == [4, 3] and (tmp_path / "step-00000003.bak").is_dir()


def test_tensors_that_are_views_are_saved(tmp_path):
    """safetensors refuses tensors that share memory or are not contiguous as they lie."""
    base = torch.arange(12.0).view(3, 4)
    assert checkpoint.save(tmp_path, 1, {"t": base.t(), "row": base[1]}, META)
    back = {"t": torch.zeros(4, 3), "row": torch.zeros(4)}
    checkpoint.read_state(checkpoint.folder(tmp_path, 1), back)
    assert torch.equal(back["t"], base.t()) and torch.equal(back["row"], base[1])


# ---------------------------------------------------------------- damage

DAMAGE = {
    "state cut": lambda p: os.truncate(p / "state.safetensors", 100),
    "state empty": lambda p: os.truncate(p / "state.safetensors", 0),
    "state longer": lambda p: (p / "state.safetensors").write_bytes((p / "state.safetensors").read_bytes() + b"\0"),
    "state zero tail": lambda p: (os.truncate(p / "state.safetensors", 200), os.truncate(p / "state.safetensors", 500)),
    "state missing": lambda p: (p / "state.safetensors").unlink(),
    "state of another": lambda p: save_file(tensors(99), p / "state.safetensors"),
    "meta missing": lambda p: (p / "meta.json").unlink(),
    "meta empty": lambda p: (p / "meta.json").write_text(""),
    "meta no json": lambda p: (p / "meta.json").write_text("{'step': 9}"),
    "meta binary": lambda p: (p / "meta.json").write_bytes(bytes(range(256))),
    "meta a list": lambda p: (p / "meta.json").write_text("[1, 2]"),
    "meta a number": lambda p: (p / "meta.json").write_text("7"),
    "meta deep": lambda p: (p / "meta.json").write_text("[" * 100_000),
    "meta no hash": lambda p: rewrite(p, lambda m: m.pop("sha256_meta")),
    "meta no format": lambda p: rewrite(p, lambda m: m.pop("format")),
    "meta text format": lambda p: rewrite(p, lambda m: m.update(format="1")),
    "meta other rate": lambda p: rewrite(p, lambda m: m["config"].update(lr=0.002)),
    "meta other step": lambda p: rewrite(p, lambda m: m.update(step=8)),
    "empty folder": lambda p: [f.unlink() for f in p.iterdir()],
    "a file": lambda p: (shutil.rmtree(p), p.write_text("")),
}


def rewrite(where, change):
    meta = json.loads((where / "meta.json").read_text())
    change(meta)
    (where / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(damage, tmp_path, capfd):
    write(tmp_path, 7, 9)
    DAMAGE[damage](checkpoint.folder(tmp_path, 9))
    assert checkpoint.latest(tmp_path)["step"] == 7
    said = capfd.readouterr().err
    assert said.startswith("warning: checkpoint step-00000009: ") and "it is damaged" in said and said.count("\n") == 1
    write(tmp_path, 9)                                      # it can be written again
    assert checkpoint.latest(tmp_path)["step"] == 9


@pytest.mark.parametrize("damage", DAMAGE)
def test_when_none_can_be_read_a_run_does_not_start_afresh(damage, tmp_path):
    write(tmp_path, 9)
    DAMAGE[damage](checkpoint.folder(tmp_path, 9))
    with pytest.raises(UserError, match="none of the 1 checkpoints .*another --out"):
        checkpoint.latest(tmp_path)


def test_a_folder_renamed_to_another_step_is_noticed(tmp_path):
    write(tmp_path, 7, 9)
    checkpoint.folder(tmp_path, 9).rename(checkpoint.folder(tmp_path, 11))
    assert checkpoint.latest(tmp_path)["step"] == 7


@pytest.mark.parametrize("name", ["state.safetensors", "meta.json"])
def test_every_flipped_bit_is_noticed(name, tmp_path, capfd):
    """In meta.json a bit may turn one blank into another; then what is read is the same."""
    write(tmp_path, 7)
    where = checkpoint.folder(tmp_path, 7)
    content, good = (where / name).read_bytes(), checkpoint.read_meta(where)
    passed = 0
    for at in range(0, len(content) * 8, 7 if name == "meta.json" else 13):
        changed = bytearray(content)
        changed[at // 8] ^= 1 << at % 8
        (where / name).write_bytes(changed)
        try:
            passed += 1
            assert checkpoint.read_meta(where) == good and name == "meta.json"
        except (ValueError, KeyError, TypeError):
            passed -= 1
    assert passed < 10 and (passed == 0 or name == "meta.json")


def test_a_checkpoint_of_a_newer_format_is_refused_and_not_passed_over(tmp_path):
    write(tmp_path, 7, 9)
    rewrite(checkpoint.folder(tmp_path, 9), lambda m: m.update(format=checkpoint.FORMAT + 1))
    with pytest.raises(UserError, match="step-00000009 has checkpoint format 2, this code reads up to 1"):
        checkpoint.latest(tmp_path)


def test_weights_without_a_checkpoint_are_not_written_over(tmp_path):
    write(tmp_path, 7)
    checkpoint.write_weights(tmp_path / "weights.safetensors", tensors(), {"config": "{}"})
    shutil.rmtree(checkpoint.folder(tmp_path, 7))
    with pytest.raises(UserError, match="weights.safetensors but no checkpoint"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("change, parts", [
    (lambda t: t.pop("net.count"), ["0 missing, 1 unexpected, 0 of another shape", "net.count"]),
    (lambda t: t.update(extra=torch.zeros(2)), ["1 missing, 0 unexpected", "extra"]),
    (lambda t: t.update({"net.a.weight": torch.zeros(7, 5)}), ["1 of another shape", "net.a.weight (5, 7) for (7, 5)"]),
])
def test_a_state_that_does_not_fit_is_refused_before_anything_is_copied(change, parts, tmp_path):
    write(tmp_path, 7)
    want = {k: torch.zeros_like(v) for k, v in tensors().items()}
    change(want)
    with pytest.raises(UserError) as e:
        checkpoint.read_state(checkpoint.folder(tmp_path, 7), want)
    assert all(part in str(e.value) for part in parts) and "\n" not in str(e.value), e.value
    assert not any(v.any() for v in want.values())


# ---------------------------------------------------------------- the disk

def test_a_full_disk_is_a_warning_and_leaves_what_was_there(tmp_path, monkeypatch, capfd):
    write(tmp_path, 7)
    need = sum(t.numel() * t.element_size() for t in tensors().values())
    for free, fits in ((int(1.1 * need), False), (int(1.3 * need), True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        assert checkpoint.save(tmp_path, 9, tensors(), META) == fits
    said = capfd.readouterr().err
    assert said.count("warning: checkpoint at step 9 not written") == 1 and "last good checkpoint: step 7." in said


@pytest.mark.parametrize("call, error", [("os.mkdir", errno.EROFS), ("os.fsync", errno.EIO),
                                         ("os.rename", errno.EDQUOT), ("runtime.checkpoint.save_file", errno.ENOSPC)])
def test_any_call_that_fails_leaves_the_old_checkpoint_and_no_rubbish(call, error, tmp_path, monkeypatch, capfd):
    write(tmp_path, 7)
    module, _, name = call.rpartition(".")
    def fail(*args, **kwargs):
        raise OSError(error, os.strerror(error))
    with monkeypatch.context() as m:
        m.setattr(sys.modules[module], name, fail)
        assert not checkpoint.save(tmp_path, 9, tensors(), META)
    assert os.strerror(error) in capfd.readouterr().err
    assert files(tmp_path) == ["step-00000007/meta.json", "step-00000007/state.safetensors"]
    assert checkpoint.latest(tmp_path)["step"] == 7
    write(tmp_path, 9)
    assert checkpoint.steps(tmp_path) == [9, 7]


def test_everything_is_on_the_disk_before_the_name_says_so(tmp_path, monkeypatch):
    """state and meta are flushed, then their folder, then renamed, then the run folder is flushed."""
    done, fsync, rename = [], os.fsync, os.rename
    named = lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("names of open files are read from /proc")
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(named(handle)), fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("rename"), rename(a, b)))
    out = tmp_path / "out"
    write(out, 7)
    assert done == ["state.safetensors", "meta.json", ".tmp-00000007", "rename", "out"]


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    log.write_text(path, "old \u00e9")
    def fail(*args):
        raise OSError(errno.ENOSPC, "full")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as m, pytest.raises(OSError):
            m.setattr(os, name, fail)
            log.write_text(path, "new")
        assert path.read_text(encoding="utf-8") == "old \u00e9" and files(tmp_path) == ["config.json"]
    log.write_text(path, "new")
    assert path.read_text() == "new"


# ---------------------------------------------------------------- one run at a time

def test_a_folder_is_locked_until_its_run_ends_and_cleaned_when_one_begins(tmp_path):
    out = tmp_path / "a" / "b"
    with checkpoint.lock(out):
        (out / ".tmp-00000004").mkdir()
        (out / ".tmp-00000004" / "state.safetensors").write_text("half")
        (out / ".tmp-12-status.json").write_text("half")
        (out / "samples").mkdir()
        (out / "samples" / ".tmp-12-x.png").write_text("half")
        with pytest.raises(UserError, match="another run is writing to"), checkpoint.lock(out):
            pass
        assert len(files(out)) == 4
    with checkpoint.lock(out):
        assert files(out) == [".lock"]


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the run folder .*another --out"):
        checkpoint.lock(tmp_path / "file").__enter__()


def test_a_disk_without_locks_is_a_note(tmp_path, monkeypatch, capfd):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(checkpoint.FileLock, "acquire", fail)
    with checkpoint.lock(tmp_path):
        assert "cannot be locked" in capfd.readouterr().err


def test_the_lock_of_another_user_is_an_error(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(checkpoint.FileLock, "acquire", fail)
    with pytest.raises(UserError, match="cannot lock the run folder .*Permission denied.*another --out"):
        checkpoint.lock(tmp_path)


def test_windows_does_not_flush_folders(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(os, "name", "nt")
        m.setattr(os, "open", lambda *a: 1 / 0)
        log.sync(str_path(tmp_path))


class str_path:
    """A folder's path whose class os.name does not change."""
    def __init__(self, path):
        self.path = path

    def is_dir(self):
        return True


# ---------------------------------------------------------------- weights for users

HEADER = {"config": '{"lr": 1}', "step": "7", "classes": '["caf\u00e9"]'}


def test_weights_come_back_with_their_header(tmp_path):
    path = tmp_path / "weights.safetensors"
    checkpoint.write_weights(path, tensors(), HEADER)
    back, header = checkpoint.read_weights(path)
    assert all(torch.equal(back[k], v) for k, v in tensors().items()) and back.keys() == tensors().keys()
    assert {k: v for k, v in header.items() if k != "sha256"} == HEADER and checkpoint.read_header(path) == header
    assert files(tmp_path) == ["weights.safetensors"]


def test_every_flipped_bit_of_the_weights_is_noticed(tmp_path):
    path = tmp_path / "weights.safetensors"
    checkpoint.write_weights(path, tensors(), HEADER)
    content = path.read_bytes()
    for at in range(0, len(content) * 8, 13):
        changed = bytearray(content)
        changed[at // 8] ^= 1 << at % 8
        path.write_bytes(changed)
        try:
            back, header = checkpoint.read_weights(path)
        except UserError as e:
            assert "\n" not in str(e) and str(path) in str(e)
            continue
        # safetensors takes any blank in its header's padding: then everything that is read is the same
        assert {k: v for k, v in header.items() if k != "sha256"} == HEADER
        assert all(torch.equal(back[k], v) for k, v in tensors().items())


@pytest.mark.parametrize("content, part", [(b"", "no safetensors"), (b"<html>", "no safetensors"),
                                           (b"\x80\x04pickle" * 9, "no safetensors"), (None, "no weights at")])
def test_a_file_that_is_no_weights_is_a_user_error(content, part, tmp_path):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=part):
        checkpoint.read_weights(path)


def test_weights_of_others_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(tensors(), path)
    with pytest.raises(UserError, match="no plaindit config in its header"):
        checkpoint.read_weights(path)
    save_file(tensors(), path, metadata={"config": "{}"})
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read_weights(path)


@pytest.mark.parametrize("change, parts", [
    (lambda t: t.pop("bias"), ["1 missing", "bias"]),
    (lambda t: t.update(more=torch.zeros(1)), ["1 unexpected", "more"]),
    (lambda t: t.update(weight=torch.zeros(4, 3)), ["1 of another shape", "weight (4, 3) for (3, 4)"]),
    (lambda t: t.update(bias=torch.tensor([0, float("nan"), 1])), ["inf or nan", "bias"]),
])
def test_weights_that_do_not_fit_are_named(change, parts):
    net = torch.nn.Linear(4, 3)
    found = {k: v.clone() + 1 for k, v in net.state_dict().items()}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    change(found)
    with pytest.raises(UserError) as e:
        checkpoint.load_strictly(net, found, "it")
    assert all(part in str(e.value) for part in parts), e.value
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ---------------------------------------------------------------- any order of events

EVENTS = st.lists(st.sampled_from(["save", "full", "kill in save", "spoil newest", "restart"]), max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(EVENTS)
def test_whatever_happens_the_newest_good_one_is_found(tmp_path, events):
    """A model beside the real thing: what was saved and not spoilt since; only spoiling can lose more than one save."""
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    step, good, bad = 0, [], set()
    for event in events:
        step += 1
        if event == "save":
            write(tmp_path, step)
            good, bad = (good + [step])[-checkpoint.KEEP:], {b for b in bad if b in checkpoint.steps(tmp_path)}
            good = [g for g in good if g in checkpoint.steps(tmp_path)]
        if event == "full":
            real, shutil.disk_usage = shutil.disk_usage, lambda path: SimpleNamespace(free=0)
            assert not checkpoint.save(tmp_path, step, tensors(), META)
            shutil.disk_usage = real
        if event == "kill in save":
            (tmp_path / f".tmp-{step:08d}").mkdir()
            (tmp_path / f".tmp-{step:08d}" / "state.safetensors").write_bytes(b"half")
        if event == "spoil newest" and good:
            bad.add(good[-1])
            os.truncate(checkpoint.folder(tmp_path, good.pop()) / "state.safetensors", 10)
        if event == "restart":
            with checkpoint.lock(tmp_path):
                pass
        if good:
            assert checkpoint.latest(tmp_path)["step"] == good[-1]
            back = {k: torch.zeros_like(v) for k, v in tensors().items()}
            checkpoint.read_state(checkpoint.folder(tmp_path, good[-1]), back)
            assert torch.equal(back["net.a.weight"], tensors(good[-1])["net.a.weight"])
        elif bad:
            with pytest.raises(UserError):
                checkpoint.latest(tmp_path)
        else:
            assert checkpoint.latest(tmp_path) is None


def test_nothing_here_unpickles_or_runs_code():
    source = open(checkpoint.__file__, encoding="utf-8").read()
    assert not any(word in source for word in ("torch.load", "import pickle", "eval(", "exec(", "runpy"))
