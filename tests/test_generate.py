"""The command line of sample.py: what it writes, that it resumes after a stop, and how it refuses wrong options."""
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model
import sample
from config import Config, ModelConfig, UserError, to_json
from runtime import checkpoint
from sample import Options, SampleConditions, read_prompts
from text import WordVectors

ROOT = Path(__file__).parent.parent
SMALL = ModelConfig(width=16, depth=2, heads=2, resolution=16, patch=4)
WORDS = WordVectors()

ROWS = {"size": [[16.0, 20.0], [96.0, 90.0], [30.0, 40.0]], "crop": [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]],
        "flip": [0.0, 1.0, 1.0]}


def run_folder(path: Path, semantics: str = "text", run: dict | None = None, about: dict | None = None,
               **kwargs) -> Path:
    """A run folder whose network answers at once: random weights, none of them zero.

    run: fields of its Config; about: more of the header; the rest: fields of its ModelConfig."""
    m = replace(SMALL, semantics=semantics, classes=3 if semantics == "class" else 0, **kwargs)
    if semantics == "text":
        m = replace(m, text_dim=WORDS.dim, text_length=WORDS.length)
    torch.manual_seed(1)
    net = model.build(m)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    path.mkdir()
    classes = ["golden retriever", "tench", "7"] if semantics == "class" else []
    checkpoint.write_weights(path / "weights.safetensors", net.state_dict(), {
        "config": to_json(Config(**{"out": "elsewhere", "model": m, "guidance": 1.5, "eta": 0.25,
                                    "augment": "crop+flip+size", **(run or {})})),
        "classes": json.dumps(classes),
        "null_class": str(len(classes)), "step": "12", **(about or {}),
        **({"controls": json.dumps({k: ROWS[k] for k in model.control_names(m)})} if m.controls else {})})
    return path


def generated(out: Path, *flags: str) -> tuple[np.ndarray, Path]:
    """arr_0 and the path of the npz that sample.py writes."""
    before = set(out.glob("samples/*.npz"))
    sample.main([f"--out={out}", "--steps=3", "--dtype=float32", "--threads=1", *flags])
    path, = set(out.glob("samples/*.npz")) - before
    with np.load(path) as file:
        assert set(file) == {"arr_0"}
        return file["arr_0"], path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder for each kind of semantics, with weights that no test changes."""
    root = tmp_path_factory.mktemp("runs")
    return {name: run_folder(root / name, name) for name in ("text", "class")}


def test_images_a_grid_and_the_protocol(tmp_path, capsys):
    out = run_folder(tmp_path / "run")
    images, path = generated(out, "--n=5", "--prompt=a red ring left of a blue square")
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8 and images.std() > 1
    protocol = json.loads(path.with_suffix(".json").read_text())
    assert (protocol["n"], protocol["steps"], protocol["train_step"]) == (5, 3, 12)
    assert (protocol["guidance"], protocol["eta"]) == (1.5, 0.25)               # the run's own
    sha256 = checkpoint.read_header(out / "weights.safetensors")["sha256"]
    assert (protocol["pretrained"], protocol["weights_sha256"], protocol["prompts_sha256"]) == ("", sha256, "")
    assert path.with_suffix(".txt").read_text(encoding="utf-8") == "a red ring left of a blue square\n" * 5
    grid = np.asarray(Image.open(path.with_suffix(".png")))
    assert grid.shape[0] > 2 * 96 and (grid < 100).any()        # captions in dark letters
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"5 images in {path}, their prompts in .txt, a grid in .png"
    assert re.fullmatch(r"cpu, float32, ddim, guidance 1.5, eta 0.25, \d+\.\d seconds", last)
    assert not [p for p in path.parent.iterdir() if p.suffix in (".part", ".done", ".tmp")]


def test_an_image_does_not_depend_on_n_or_batch(tmp_path):
    out = run_folder(tmp_path / "run")
    four = generated(out, "--n=4", "--batch=4")[0].astype(int)
    assert len({image.tobytes() for image in four}) == 4
    assert abs(generated(out, "--n=3", "--batch=2")[0] - four[:3]).max() <= 1       # other shapes round otherwise
    assert abs(generated(out, "--n=3", "--batch=2", "--seed=1")[0] - four[:3]).max() > 1


def conditions(out: Path, **options) -> SampleConditions:
    o = Options(out=str(out), **options)
    return SampleConditions(o, model.load(o.out)[1], checkpoint.read_header(out / "weights.safetensors"))


def test_several_prompts_and_labels_take_turns(runs):
    cond, titles = conditions(runs["text"], prompt="a red ring; a blue star")(np.arange(1, 4))
    assert titles == ["a blue star", "a red ring", "a blue star"]
    assert torch.equal(cond.text, WORDS.encode(titles)[0])
    cond, titles = conditions(runs["class"], label="tench;7;0")(np.arange(4))
    assert cond.label.tolist() == [1, 2, 0, 1] and titles[0] == "tench"         # "7" is a name here, "0" a number
    assert conditions(runs["class"])(np.arange(4))[0].label.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("semantics", ["class", "none"])
def test_models_without_text_generate(tmp_path, semantics):
    assert generated(run_folder(tmp_path / "run", semantics), "--n=2")[0].shape == (2, 16, 16, 3)


def test_controls_come_together_from_one_training_sample(tmp_path):
    out, many = run_folder(tmp_path / "run", "class", controls="crop+flip+size"), np.arange(300)
    cond, _ = conditions(out)(many)
    known = [(*ROWS["size"][k], *ROWS["crop"][k], ROWS["flip"][k]) for k in range(3)]
    seen = [(*s, *c, f) for s, c, f in zip(cond.size.tolist(), cond.crop.tolist(), cond.flip.tolist())]
    assert set(seen) == set(known) and (cond.has_controls == 1).all()
    shares = np.array([seen.count(row) for row in known]) / 300         # a third each, to 4 standard errors
    assert abs(shares - 1 / 3).max() < 4 * np.sqrt(2 / 9 / 300)
    assert conditions(out)(many[7:9])[0].size.tolist() == cond.size[7:9].tolist()           # by number, not by batch
    assert conditions(out, seed=1)(many)[0].size.tolist() != cond.size.tolist()


def test_controls_of_the_options_replace_those_of_training(tmp_path):
    out = run_folder(tmp_path / "run", "none", controls="crop+flip+size")
    own, _ = conditions(out)(np.arange(9))
    fixed, _ = conditions(out, size="64,48", flip="1")(np.arange(9))
    assert fixed.size.tolist() == [[64, 48]] * 9 and fixed.flip.tolist() == [1] * 9
    assert torch.equal(fixed.crop, own.crop)
    assert conditions(out, crop="0,7")(np.arange(2))[0].crop.tolist() == [[0, 7]] * 2


def test_size_and_control_guidance_change_the_image_and_at_zero_size_has_no_effect(tmp_path):
    out = run_folder(tmp_path / "run", "class", controls="size", control_weight="uniform")
    image = lambda **o: sample.load_run(Options(out=str(out), steps=2, dtype="float32", **o), torch.device("cpu"))([0])
    assert abs(image(size="16,16") - image(size="96,96")).max() > 0.04
    assert abs(image(size="16,16", control_guidance=2.0) - image(size="16,16", control_guidance=1.5)).max() > 0.04
    assert torch.equal(image(size="16,16", control_guidance=0.0), image(size="96,96", control_guidance=0.0))


def test_a_run_generates_under_its_own_conditions_or_another_and_decodes(tmp_path):
    out = run_folder(tmp_path / "run", "class")
    run = sample.load_run(Options(out=str(out), steps=2, dtype="float32"), torch.device("cpu"))
    assert (run.options.guidance, run.options.eta, run.header["step"]) == (1.5, 0.25, "12")
    own = run.conditions(np.arange(2))[0]
    assert torch.equal(run([0, 1]), run([0, 1], own))
    other = replace(own, label=own.label.flip(0))
    assert not torch.equal(run([0, 1]), run([0, 1], other))
    halved = run._replace(decoder=(lambda x: x / 2, 1))
    assert torch.equal(halved([0, 1]), run([0, 1]) / 2)


def test_another_resolution(tmp_path):
    out = run_folder(tmp_path / "run", positions="resample")
    assert generated(out, "--n=2", "--resolution=24,12")[0].shape == (2, 24, 12, 3)


def test_noise_of_padding_belongs_to_the_image(tmp_path):
    out = run_folder(tmp_path / "run", run=dict(padding="noisy", padding_noise=0.5))
    text = conditions(out, prompt="a red ring")(np.arange(4))[0].text
    plain = run_folder(tmp_path / "exact", run=dict(padding="replicate"))
    exact = conditions(plain, prompt="a red ring")(np.arange(4))[0].text
    tokens, _ = WORDS.encode(["a red ring"])
    assert torch.equal(exact, tokens[:, [j % 3 for j in range(WORDS.length)]].expand(4, -1, -1))
    assert (text - exact).abs().amax((1, 2)).min() > 0.1 and (text[1:] - text[:1]).abs().amax((1, 2)).min() > 0.1
    assert torch.equal(conditions(out, prompt="a red ring")(np.arange(2, 4))[0].text, text[2:])
    assert not torch.equal(conditions(out, prompt="a red ring", seed=1)(np.arange(4))[0].text, text)


def test_after_a_stop_the_same_command_generates_only_what_is_missing(tmp_path, monkeypatch):
    out = run_folder(tmp_path / "run")
    whole, _ = generated(out, "--n=6", "--batch=2", "--name=whole")
    calls, generate = [], sample.generate

    def breaks(net, cfg, cond, indices, o, device):
        calls.append(list(indices))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(net, cfg, cond, indices, o, device)
    monkeypatch.setattr(sample, "generate", breaks)
    with pytest.raises(KeyboardInterrupt):
        generated(out, "--n=6", "--batch=2", "--name=again")
    again, _ = generated(out, "--n=6", "--batch=2", "--name=again")
    assert calls == [[0, 1], [2, 3], [4, 5], [4, 5]] and np.array_equal(again, whole)


def stopped(out: Path, monkeypatch, *flags: str) -> list[Path]:
    """The unfinished files of a command that a signal ends before its third batch of two."""
    calls, generate = [], sample.generate

    def breaks(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "generate", breaks)
        generated(out, "--n=6", "--batch=2", *flags)
    return sorted((out / "samples").iterdir())


def test_a_name_with_a_dot_keeps_unfinished_images_of_other_options_apart(tmp_path, monkeypatch):
    out = run_folder(tmp_path / "run")
    want, _ = generated(out, "--n=6", "--batch=2", "--seed=1", "--name=plain")
    for file in (out / "samples").iterdir():
        file.unlink()
    left = stopped(out, monkeypatch, "--name=cfg1.5")
    assert [file.suffix for file in left] == [".done", ".part"] and all(f.name.startswith("cfg1.5-") for f in left)
    got, path = generated(out, "--n=6", "--batch=2", "--seed=1", "--name=cfg1.5")
    assert np.array_equal(got, want)                        # nothing of seed 0 is in it
    there = {file.name for file in path.parent.iterdir()} - {file.name for file in left}
    assert there == {f"cfg1.5.{kind}" for kind in ("npz", "txt", "json", "png")}


@pytest.mark.parametrize("lost, how", [(".part", "gone"), (".part", "short"), (".done", "gone")])
def test_images_without_marks_and_marks_without_images_count_for_nothing(tmp_path, monkeypatch, lost, how):
    out = run_folder(tmp_path / "run")
    want, _ = generated(out, "--n=6", "--batch=2", "--name=whole")
    for file in (out / "samples").iterdir():
        file.unlink()
    file = next(file for file in stopped(out, monkeypatch) if file.suffix == lost)
    content, memmap, made = file.read_bytes(), np.memmap, []
    file.write_bytes(content[:len(content) // 3])
    if how == "gone":
        file.unlink()

    def killed(*args, **kwargs):
        made.append(args)
        if len(made) == 2:
            raise KeyboardInterrupt                         # one of the two is made again, the other not yet
        return memmap(*args, **kwargs)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "memmap", killed)
        generated(out, "--n=6", "--batch=2")
    assert np.array_equal(generated(out, "--n=6", "--batch=2")[0], want)


def test_marks_are_removed_before_the_images(tmp_path, monkeypatch):
    gone, unlink = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, *a, **k: gone.append(self.suffix) or unlink(self, *a, **k))
    for suffix in (".part", ".done"):
        (tmp_path / f"x-1{suffix}").touch()
    sample.remove_partial(tmp_path / "x-1.part")
    assert gone == [".done", ".part"] and not list(tmp_path.iterdir())


def test_images_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_size) or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(Path(b).name) or rename(a, b))
    sample.write_npz(tmp_path / "x.npz", np.zeros((3, 5, 7, 3), np.uint8))
    assert done[:2] == [(tmp_path / "x.npz").stat().st_size, "x.npz"]


def test_a_grid_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    class Full:
        def save(self, file, *format):
            (open(file, "wb") if isinstance(file, Path) else file).write(b"half")
            raise OSError("no space left on device")
    monkeypatch.setattr(data, "grid", lambda *args: Full())
    (tmp_path / "x.png").write_bytes(b"old")
    with pytest.raises(OSError, match="no space"):
        sample.write_grid(tmp_path / "x.png", np.zeros((3, 5, 7, 3), np.uint8), ["a", "b", "c"])
    assert (tmp_path / "x.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- captions from a file, and beside the images

def test_line_k_of_a_file_of_prompts_is_of_image_k_and_an_empty_one_of_no_caption(tmp_path):
    out, file = run_folder(tmp_path / "run"), tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa red ring\r\n\r\n  a blue \t star\n")
    w = conditions(out, prompts=str(file))
    cond, titles = w(np.arange(4))
    assert titles == ["a red ring", "", "a blue star", "a red ring"] == w.titles(np.arange(4))
    assert torch.equal(cond.text, WORDS.encode(titles)[0]) and not cond.text[1].any()

    images, path = generated(out, "--n=3", "--batch=3", f"--prompts={file}")
    one_by_one = [generated(out, "--n=3", "--batch=3", f"--prompt={p}", f"--name={k}")[0][k]
                  for k, p in ((0, "a red ring"), (2, "a blue star"))]
    assert np.array_equal(images[[0, 2]], one_by_one)
    assert read_prompts(str(path.with_suffix(".txt"))) == titles[:3]            # what CLIPScore reads, line by line
    file.write_text("a red ring\n", encoding="utf-8")
    assert generated(out, "--n=3", "--batch=2", f"--prompts={file}")[1] != path     # other captions, other images


def test_the_captions_of_the_data_set_are_beside_their_images(tmp_path):
    out = run_folder(tmp_path / "run")
    path = generated(out, "--n=5", "--batch=2")[1]
    titles = conditions(out)(np.arange(5))[1]
    assert len(set(titles)) == 5 and path.with_suffix(".txt").read_text(encoding="utf-8").splitlines() == titles
    path = generated(run_folder(tmp_path / "classes", "class"), "--n=4", "--name=x")[1]
    assert path.with_suffix(".txt").read_text(encoding="utf-8").splitlines() == [
        "golden retriever", "tench", "7", "golden retriever"]
    path = generated(out, "--n=2", "--prompt=a red\nring", "--name=x")[1]
    assert path.with_suffix(".txt").read_text(encoding="utf-8") == "a red ring\n" * 2


@pytest.mark.parametrize("content, says", [(None, "No such file"), (b"", "is empty"),
                                           (b"a caf\xe9", "not UTF-8"), (b"a red ring\na crimson ring", "crimson")])
def test_a_file_without_captions_is_an_error(tmp_path, runs, content, says):
    out, file = runs["text"], tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=says):
        sample.main([f"--out={out}", "--threads=1", f"--prompts={file}"])
    assert not list(out.glob("samples/*"))


@pytest.mark.parametrize("flags, says", [
    (["--name=../x"], "file name without folders"),
    (["--pretrained=DiT.pt", "--ema_file=weights-ema0.08.safetensors"], "give one of them")])
def test_options_that_would_be_ignored_or_leave_the_folder_are_errors(runs, flags, says):
    with pytest.raises(UserError, match=says):
        sample.main([f"--out={runs['text']}", "--threads=1", "--prompt=a red ring", *flags])


FORK = """import os, sys, sample
for rank in range(2):
    if not os.fork():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        sample.main(sys.argv[1:])
        sample.distributed.cleanup()
        os._exit(0)
sys.exit(sum(os.wait()[1] for rank in range(2)) and 1)"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks of one that has imported torch")
def test_two_processes_generate_the_same_images(tmp_path):
    out = run_folder(tmp_path / "run")
    flags = ["--n=5", "--batch=2", "--steps=3", "--dtype=float32", "--threads=1", f"--out={out}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = subprocess.run([sys.executable, "-c", FORK, *flags, "--name=two"], cwd=ROOT, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                          timeout=120, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr
    with np.load(out / "samples" / "two.npz") as file:
        assert np.array_equal(file["arr_0"], generated(out, *flags)[0])


@pytest.mark.parametrize("semantics, flags, parts", [
    ("text", ["--prompt=a crimson ring"], ["crimson", "red"]),
    ("text", ["--label=tench"], ["--label", "class", "text"]),
    ("class", ["--prompt=a red ring"], ["--prompt", "text", "class"]),
    ("class", ["--label=tensh"], ["tensh", "tench"]),
    ("class", ["--label=3"], ["'3'"]),
    ("text", ["--sampler=euler"], ["euler", *sample.SAMPLERS]),
    ("text", ["--sampler=heun", "--eta=0.5"], ["eta", "ddim"]),
    ("text", ["--eta=1.5"], ["eta=1.5"]),
    ("text", ["--eta=-0.5"], ["eta=-0.5", "-1, the run's own"]),
    ("text", ["--eta=nan"], ["eta=nan"]),
    ("text", ["--spacing=even"], ["even", "trailing"]),
    ("text", ["--steps=1001"], ["1001", "1000"]),
    ("text", ["--n=0"], ["n=0"]),
    ("text", ["--size=16,16"], ["--size", "controls"]),
    ("text", ["--control_guidance=1.4"], ["control_guidance=1.4", "controls"]),
    ("text", ["--guidance_interval=1"], ["--guidance_interval", "2 numbers"]),
    ("text", ["--guidance_interval=900,1000"], ["900,1000", "14.6"]),
    ("text", ["--resolution=18,16"], ["18,16", "patch, 4"]),
    ("text", ["--resolution=-4,4"], ["-4,4"]),
    ("text", ["--resolution=large"], ["large"]),
    ("text", ["--dtype=half"], ["half", "bfloat16"]),
    ("text", ["--prompt=a red ring", "--prompts=p.txt"], ["--prompt", "'p.txt'", "give one"]),
    ("class", ["--prompts=p.txt"], ["--prompts", "text", "class"]),
])
def test_options_that_do_not_fit_the_run(runs, semantics, flags, parts):
    out = runs[semantics]
    with pytest.raises(UserError) as e:
        sample.main([f"--out={out}", "--threads=1", *flags])
    assert all(part in str(e.value) for part in parts) and "\n" not in str(e.value)
    assert not list(out.glob("samples/*"))


def test_controls_that_no_image_has(tmp_path):
    out = run_folder(tmp_path / "run", "class", controls="crop+flip+size")
    for key, text in (("flip", "0.5"), ("size", "16"), ("crop", "1,2,3"), ("size", "-1,4"), ("size", "nan,4")):
        with pytest.raises(UserError, match=f"--{key}"):
            conditions(out, **{key: text})


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(UserError, match="weights"):
        sample.main([f"--out={tmp_path / 'nowhere'}"])


def test_images_that_are_not_finite_are_an_error(tmp_path, monkeypatch):
    out = run_folder(tmp_path / "run")
    monkeypatch.setattr(sample, "generate", lambda *args: torch.full((2, 3, 16, 16), torch.nan))
    with pytest.raises(UserError, match="not finite"):
        sample.main([f"--out={out}", "--n=2"])


def test_different_options_have_different_file_names(tmp_path, monkeypatch):
    """Every option that changes the images changes the name of the file, so no old images pass for new ones."""
    out = run_folder(tmp_path / "run")
    monkeypatch.setattr(sample, "generate", lambda *args: torch.zeros(len(args[3]), 3, 16, 16))
    changes = ["--n=2", "--seed=3", "--steps=4", "--guidance=3", "--eta=1", "--sampler=heun",
               "--sampler=dpmpp", "--prompt=a red ring"]
    names = {generated(out, "--n=2", flag)[1].name for flag in changes}
    assert len(names) == 8 and asdict(Options())["name"] == ""
