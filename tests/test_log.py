"""The log: the arithmetic of a window, the lines and statuses that survive, and skipped files."""
import errno
import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data
from config import Config, UserError
from runtime import distributed, log
from runtime.log import SKIPPED, SkippedFiles, follow

CPU = torch.device("cpu")
ALONE = distributed.Dist(CPU, 0, 1)
QUIET = SimpleNamespace(signal=0)


def line(step, loss=0.5):
    return {"step": step, "loss": loss, "loss_by_noise": [0.1, None, 0.3, 0.4], "images_per_second": 12.0,
            "share_of_peak": 0.25, "eta_s": 125.0}


# ---------------------------------------------------------------- a window

def test_a_window_is_the_mean_over_its_images_by_quarter():
    g, window, T = torch.Generator().manual_seed(0), log.LossWindow(CPU), 1000
    i, loss = torch.randint(T, (3, 2, 5), generator=g), torch.rand(3, 2, 5, generator=g)
    i[0, 0] = torch.tensor([0, 249, 250, 749, 999])
    for step in range(3):
        for m in range(2):
            window.add(loss[step, m], i[step, m], T)
        window.add_norm(torch.tensor(2.0 + step), step)
    found, stop_signal, bad = window.read(3, QUIET, ALONE)
    quarter = i.div(250, rounding_mode="floor")
    assert found["loss"] == pytest.approx(loss.mean().item())
    assert found["loss_by_noise"] == pytest.approx([loss[quarter == k].mean().item() for k in range(4)])
    assert found["grad_norm"] == pytest.approx(3.0) and (stop_signal, bad) == (0, -1)


def test_a_window_begins_again_and_a_quarter_without_images_is_none():
    window = log.LossWindow(CPU)
    window.add(torch.tensor([9.0, 9.0]), torch.tensor([1, 99]), 100)
    window.add_norm(torch.tensor(5.0), 0)
    window.read(1, QUIET, ALONE)
    window.add(torch.tensor([1.0, 2.0]), torch.tensor([30, 40]), 100)
    window.add_norm(torch.tensor(3.0), 1)
    found, _, _ = window.read(1, QUIET, ALONE)
    assert found == {"loss": 1.5, "loss_by_noise": [None, 1.5, None, None], "grad_norm": 3.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_window_remembers_the_first_bad_step(value):
    window = log.LossWindow(CPU)
    for step, norm in enumerate([1.0, 2.0, value, 1.0, value]):
        window.add(torch.tensor([1.0]), torch.tensor([0]), 10)
        window.add_norm(torch.tensor(norm), step)
        assert window.bad.item() == (step >= 2)
    assert window.read(5, QUIET, ALONE)[2] == 2
    window.add(torch.tensor([1.0]), torch.tensor([0]), 10)
    assert window.read(1, QUIET, ALONE)[2] == 2             # for good


@pytest.mark.parametrize("number", distributed.SIGNALS)
def test_a_window_tells_which_signal_arrived(number):
    window = log.LossWindow(CPU)
    window.add(torch.tensor([1.0]), torch.tensor([0]), 10)
    assert window.read(1, SimpleNamespace(signal=number), ALONE)[1] == number


def test_speeds_are_arithmetic(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    run_log = log.RunLog(tmp_path, 5, Config(batch=32, steps=40), 6_000, 1e9, ALONE)
    clock[0] += 50
    run_log.restart_clock()
    with run_log.timed("data"):
        clock[0] += 1
    with run_log.timed("aside"):
        clock[0] += 30
    clock[0] += 3
    found = run_log.throughput(15)
    assert found["images_per_second"] == 80 and found["waited_for_data"] == 0.25 and found["eta_s"] == 10
    assert found["tflops"] == pytest.approx(480e3 / 1e12) and found["share_of_peak"] == pytest.approx(480e3 / 1e9)


# ---------------------------------------------------------------- log.jsonl

def test_lines_come_back_with_six_digits(tmp_path):
    assert log.read(tmp_path) == []
    log.append(tmp_path, {"step": 1_234_567, "loss": 1 / 3, "none": None, "list": [2 / 3, 1e-9 / 3]})
    log.append(tmp_path, {"step": 1_234_577, "loss": 0.25})
    assert log.read(tmp_path) == [{"step": 1_234_567, "loss": 0.333333, "none": None, "list": [0.666667, 3.33333e-10]},
                                  {"step": 1_234_577, "loss": 0.25}]


@pytest.mark.parametrize("rubbish", [b'{"step": 30, "lo', b"\0\0\0\0\n", b"\0\0}\n", b"[3]\n", b"{}\n",
                                     b'{"step": "x"}\n', b"\xff\xfe\n", b"\n"])
def test_a_torn_line_is_left_out_and_rewinding_drops_it(rubbish, tmp_path):
    for step in (10, 20):
        log.append(tmp_path, line(step))
    clean = (tmp_path / "log.jsonl").read_bytes()
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(rubbish)
    assert [entry["step"] for entry in log.read(tmp_path)] == [10, 20]
    log.drop_after(tmp_path, 20)
    assert (tmp_path / "log.jsonl").read_bytes() == clean


def test_rewinding_drops_later_lines_and_later_previews_only(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in (10, 20, 30):
        log.append(tmp_path, line(step))
        (tmp_path / "samples" / f"step-{step:08d}.png").write_text("")
    (tmp_path / "samples" / "step-mine.png").write_text("")
    log.drop_after(tmp_path, 20)
    assert [entry["step"] for entry in log.read(tmp_path)] == [10, 20]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-00000010.png", "step-00000020.png",
                                                                        "step-mine.png"]


def test_a_disk_that_takes_half_a_line_gets_none_of_it(tmp_path, monkeypatch):
    log.append(tmp_path, line(10))
    before, real = (tmp_path / "log.jsonl").read_bytes(), open
    class Half:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)
            self.seek, self.truncate = self.file.seek, self.file.truncate
        def __enter__(self):
            return self
        def __exit__(self, *error):
            self.file.close()
        def write(self, text):
            return self.file.write(text[:len(text) // 2])
    monkeypatch.setattr("builtins.open", Half)
    with pytest.raises(OSError, match="no space left"):
        log.append(tmp_path, line(20))
    monkeypatch.undo()
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_line_for_people_and_for_the_file_on_rank_0_alone(tmp_path, capfd):
    entry = line(1200)
    for dist in (distributed.Dist(CPU, 1, 2), ALONE):
        run_log = log.RunLog(tmp_path, 0, Config(steps=5000), 1, 1.0, dist)
        run_log.report(entry.pop("step", 1200), entry)
        assert run_log.last == 1200
    assert capfd.readouterr().err == "step 1,200/5,000  loss 0.5000  12 images/s, 25% of peak  2:05 left\n"
    run_log.bar.disable = False
    run_log.bar.set_postfix_str = lambda text: None
    run_log.report(1210, entry)
    run_log.bar.disable = True
    assert capfd.readouterr().err == "" and log.read(tmp_path) == [line(1200), line(1210)]


# ---------------------------------------------------------------- status.json

def test_a_status_is_written_once_there_is_a_folder(tmp_path):
    status = log.Status()
    status.write("failed:user", 2, "nowhere")
    assert log.read_status(tmp_path) == {}
    status.out, status.step = tmp_path, 12
    status.write("stopped", 143, "stopped by SIGTERM")
    found = log.read_status(tmp_path)
    assert found.pop("utc").endswith("+00:00")
    assert found == {"state": "stopped", "exit_code": 143, "step": 12, "reason": "stopped by SIGTERM"}


def test_a_crash_hides_no_other_reason(tmp_path):
    status = log.Status()
    status.out = tmp_path
    for state, kept in (("running", "failed:crash"), ("failed:user", "failed:user"), ("done", "done")):
        status.write(state)
        status.write("failed:crash", 1, "connection closed by peer")
        assert log.read_status(tmp_path)["state"] == kept


@pytest.mark.parametrize("text", ["", "{", "[1]", "7"])
def test_a_status_that_cannot_be_read_is_none(text, tmp_path):
    (tmp_path / "status.json").write_text(text)
    assert log.read_status(tmp_path) == {}


# ---------------------------------------------------------------- skipped.jsonl

def skipped(out):
    return [tuple(json.loads(line).values()) for line in (out / SKIPPED).read_text(encoding="utf-8").splitlines()]


def folder(root, count, **bad):
    """Class folder c with `count` images, and files with other content."""
    (root / "c").mkdir(parents=True)
    for k in range(count):
        Image.new("RGB", (20, 16), (k, 0, 0)).save(root / "c" / f"{k}.png")
    for name, content in bad.items():
        (root / "c" / f"{name}.png").write_bytes(content)
    return root


def test_a_file_is_named_once_with_the_reason_whoever_meets_it(tmp_path):
    one, two = SkippedFiles(tmp_path), SkippedFiles(tmp_path)
    one.note({})
    assert not (tmp_path / SKIPPED).exists()
    one.note({"a": "cut", "b\nc \ud83d": "empty"})
    two.note({"a": "met again", "d": "cut"})
    one.note({"d": "met again"})
    SkippedFiles(tmp_path).note({"a": "the run resumes"})
    assert skipped(tmp_path) == [("a", "cut"), ("b\nc \ud83d", "empty"), ("d", "cut")]


def test_many_that_write_at_once_lose_nothing_and_repeat_nothing(tmp_path):
    def work(k):
        mine = SkippedFiles(tmp_path)                            # as a process of its own has: another open file
        for j in range(8):
            mine.note({f"{(j + k) % 8}.png": f"by {k}"})

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert sorted(name for name, _ in skipped(tmp_path)) == sorted(f"{k}.png" for k in range(8))


def test_one_waits_while_another_reads_and_writes(tmp_path, monkeypatch):
    real = json.dumps
    monkeypatch.setattr(json, "dumps", lambda line: (time.sleep(0.02), real(line))[1])      # after reading
    threads = [threading.Thread(target=SkippedFiles(tmp_path).note, args=({"a": "cut"},)) for _ in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert skipped(tmp_path) == [("a", "cut")]


def test_half_a_line_is_cut_off_and_foreign_lines_stay(tmp_path):
    SkippedFiles(tmp_path).note({"a": "cut"})
    with open(tmp_path / SKIPPED, "ab") as file:
        file.write(b'7\n{"reason": 1}\n\xff\n{"name": "b", "rea')
    SkippedFiles(tmp_path).note({"b": "cut"})
    content = (tmp_path / SKIPPED).read_bytes().splitlines()
    assert content[1:4] == [b"7", b'{"reason": 1}', b"\xff"] and json.loads(content[4])["name"] == "b"
    assert len(content) == 5


def test_a_name_that_is_known_opens_nothing(tmp_path, monkeypatch):
    mine = SkippedFiles(tmp_path)
    mine.note({"a": "cut"})
    (tmp_path / SKIPPED).unlink()
    mine.note({"a": "cut"}), mine.note({})
    assert not (tmp_path / SKIPPED).exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError("read-only")])
def test_a_disk_that_refuses_is_a_warning_and_the_file_is_named_later(tmp_path, monkeypatch, capfd, error):
    mine, real = SkippedFiles(tmp_path), open

    def refuse(*_, **__):
        raise error
    monkeypatch.setitem(vars(log), "open", refuse)
    mine.note({"a": "cut"})
    assert "warning: skipped.jsonl not written" in capfd.readouterr().err
    monkeypatch.setitem(vars(log), "open", real)
    mine.note({"a": "cut"})
    assert skipped(tmp_path) == [("a", "cut")]


def test_a_source_names_what_it_has_skipped_and_will(tmp_path):
    source = data.ImageFolder(folder(tmp_path / "set", 9, empty=b"", html=b"<html>"), 16, max_bad=0.5)
    follow(source, tmp_path)
    assert skipped(tmp_path) == [("c/empty.png", "empty file or link to nothing")]
    for epoch in range(3):
        data.records(source, range(len(source)), [epoch] * len(source))
    assert skipped(tmp_path)[1:] == [("c/html.png", "not a JPEG, PNG or WebP image")]


def test_the_messages_lead_to_the_file(tmp_path, capsys):
    source = data.ImageFolder(folder(tmp_path / "set", 1, **{f"bad{k:02}": b"x" for k in range(30)}), 16, max_bad=0.9)
    follow(source, tmp_path)
    with pytest.raises(UserError, match=f"28 of 31 images .*all are in .*{SKIPPED}.*--max_bad_fraction=0.9"):
        for k in range(len(source)):
            source.mark_bad(source.name(k), "x")
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"all are in {tmp_path / SKIPPED}")
    assert len(skipped(tmp_path)) == 28
