"""skipped.jsonl: every bad file once, whoever meets it, whatever broke off in between; nothing if nothing is bad."""
import errno
import json
import os
import threading
import time

import pytest
from PIL import Image

import cached
import data
import train
from config import UserError
from skipped import FILE, Skipped, follow


def lines(out):
    return [tuple(json.loads(line).values()) for line in (out / FILE).read_text(encoding="utf-8").splitlines()]


def folder(root, count, **bad):
    """Class folder c with `count` pictures, and files with other content."""
    (root / "c").mkdir(parents=True)
    for k in range(count):
        Image.new("RGB", (20, 16), (k, 0, 0)).save(root / "c" / f"{k}.png")
    for name, content in bad.items():
        (root / "c" / f"{name}.png").write_bytes(content)
    return root


def test_a_file_is_named_once_with_the_reason_whoever_meets_it(tmp_path):
    one, two = Skipped(tmp_path), Skipped(tmp_path)
    one.note({})
    assert not (tmp_path / FILE).exists()
    one.note({"a": "cut", "b\nc \ud83d": "empty"})
    two.note({"a": "met again", "d": "cut"})
    one.note({"d": "met again"})
    Skipped(tmp_path).note({"a": "the run goes on"})
    assert lines(tmp_path) == [("a", "cut"), ("b\nc \ud83d", "empty"), ("d", "cut")]


def test_many_that_write_at_once_lose_nothing_and_repeat_nothing(tmp_path):
    def work(k):
        mine = Skipped(tmp_path)                            # as a process of its own has: another open file
        for j in range(40):
            mine.note({f"{(j + k) % 40}.png": f"by {k}"})

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert sorted(name for name, _ in lines(tmp_path)) == sorted(f"{k}.png" for k in range(40))


def test_one_waits_while_another_reads_and_writes(tmp_path):
    class Slow(Skipped):
        def catch_up(self, file):
            super().catch_up(file)
            time.sleep(0.05)

    threads = [threading.Thread(target=Slow(tmp_path).note, args=({"a": "cut"},)) for _ in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert lines(tmp_path) == [("a", "cut")]


def test_half_a_line_is_taken_away_and_what_is_of_another_hand_stays(tmp_path):
    Skipped(tmp_path).note({"a": "cut"})
    with open(tmp_path / FILE, "ab") as file:
        file.write(b'7\n{"reason": 1}\n\xff\n{"name": "b", "rea')
    Skipped(tmp_path).note({"b": "cut"})
    content = (tmp_path / FILE).read_bytes().splitlines()
    assert content[1:4] == [b"7", b'{"reason": 1}', b"\xff"] and json.loads(content[4])["name"] == "b"
    assert len(content) == 5


def test_a_name_that_is_known_opens_nothing(tmp_path, monkeypatch):
    mine = Skipped(tmp_path)
    mine.note({"a": "cut"})
    (tmp_path / FILE).unlink()
    mine.note({"a": "cut"}), mine.note({})
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError("read-only")])
def test_a_disk_that_refuses_is_a_warning_and_the_file_is_named_later(tmp_path, monkeypatch, capfd, error):
    mine, real = Skipped(tmp_path), open

    def refuse(*_, **__):
        raise error
    monkeypatch.setitem(Skipped.note.__globals__, "open", refuse)
    mine.note({"a": "cut"})
    assert "warning: skipped.jsonl not written" in capfd.readouterr().err
    monkeypatch.setitem(Skipped.note.__globals__, "open", real)
    mine.note({"a": "cut"})
    assert lines(tmp_path) == [("a", "cut")]


def test_a_source_names_what_it_has_passed_over_and_will(tmp_path):
    source = data.ImageFolder(folder(tmp_path / "set", 9, empty=b"", html=b"<html>"), 16, max_bad=0.5)
    follow(source, tmp_path)
    assert lines(tmp_path) == [("c/empty.png", "empty file or link to nothing")]
    for epoch in range(3):
        data.records(source, range(len(source)), [epoch] * len(source))
    assert lines(tmp_path)[1:] == [("c/html.png", "not a JPEG, PNG or WebP image")]


def test_the_messages_lead_to_the_file(tmp_path, capsys):
    source = data.ImageFolder(folder(tmp_path / "set", 1, **{f"bad{k:02}": b"x" for k in range(30)}), 16, max_bad=0.9)
    follow(source, tmp_path)
    with pytest.raises(UserError, match=f"28 of 31 images .*all are in .*{FILE}.*--max_bad=0.9"):
        for k in range(len(source)):
            source.note_bad(source.name(k), "x")
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"all are in {tmp_path / FILE}")
    assert len(lines(tmp_path)) == 28


def test_latents_that_are_not_finite_are_named_too(tmp_path):
    source = cached.Latents.__new__(cached.Latents)
    source.bad, source.lock, source.max_bad, source.meta = {}, threading.Lock(), 1.0, {"n": 9}
    follow(source, tmp_path)
    source.note_bad(5), source.note_bad(5)
    assert lines(tmp_path) == [("latent 5", "not finite")]


TINY = ["--threads=1", "--workers=2", "--batch=8", "--micro=4", "--warmup=0", "--save_every=2", "--sample_every=0",
        "--augment=", "--dtype=float32", "--model.semantics=class", "--model.arch=dit", "--model.width=16",
        "--model.depth=1", "--model.heads=2", "--model.resolution=16", "--max_bad=0.3"]


def test_a_run_names_each_bad_file_once_and_still_when_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(train.machine, "matmul_peak", lambda *_: 1.0)
    for name, bad in (("good", {}), ("bad", dict(html=b"<html>", empty=b""))):
        flags = [*TINY, f"--data={folder(tmp_path / name, 9, **bad)}", f"--out={tmp_path / 'out' / name}"]
        for steps in (4, 8):
            assert train.run([*flags, f"--steps={steps}"]) == 0
    assert sorted(lines(tmp_path / "out" / "bad")) == [("c/empty.png", "empty file or link to nothing"),
                                                       ("c/html.png", "not a JPEG, PNG or WebP image")]
    assert not (tmp_path / "out" / "good" / FILE).exists()
