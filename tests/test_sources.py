"""Every source, from files that the tests write: two steps with previews, a resume, sampling; its memory.

One table, SOURCES: what writes a source's files and gives its flags. Latents need diffusers, their tokens open_clip.
"""
import gc
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
import text
import train
from runtime import distributed
from test_coco import write_coco
from test_shards import sample as members, write_tar

N, R = 12, 16
COLOURS = ("red", "blue", "green")
TEXT = ["--model.semantics=text"]
CLASS = ["--model.semantics=class", "--model.arch=dit", "--model.controls=crop+flip"]


def caption(k):
    return f"a {COLOURS[k % 3]} ring"


def image_files(root, suffix="jpg"):
    """N images in three folders, named by number."""
    for k in range(N):
        (root / COLOURS[k % 3]).mkdir(parents=True, exist_ok=True)
        image = Image.linear_gradient("L").rotate(30 * k).resize((20 + k, 19 + 2 * k)).convert("RGB")
        image.save(root / COLOURS[k % 3] / f"{k}.{suffix}")
    return root


def classes(tmp):
    return [f"--data={image_files(tmp / 'set')}", *CLASS]


def texts(tmp):
    """Half of the captions in .txt files, half in a metadata.jsonl."""
    for k, path in enumerate(sorted(image_files(tmp / "set", "png").rglob("*.png"))):
        if k % 2:
            path.with_suffix(".txt").write_text(caption(k))
        else:
            with open(path.parent / "metadata.jsonl", "a") as file:
                file.write(json.dumps({"file_name": path.name, "text": [caption(k), "a ring"]}) + "\n")
    return [f"--data={tmp / 'set'}", *TEXT]


def tars(tmp):
    (tmp / "set").mkdir()
    for s in range(2):
        parts = [{**members(k), f"{k:09}.txt": caption(k).encode()} for k in range(s * N // 2, (s + 1) * N // 2)]
        write_tar(tmp / "set" / f"{s:05}.tar", {name: body for part in parts for name, body in part.items()})
    return [f"--data={tmp / 'set'}" + "/{00000..00001}.tar", *TEXT]


def coco(tmp):
    rings = [{"id": k, "image_id": 10 * k, "caption": caption(k)} for k in range(N)]
    return [f"--data=coco:{write_coco(tmp / 'set', N, annotations=rings)}", *TEXT]


def latents(tmp, *flags):
    """Encoded by the command, with an autoencoder of random weights: 5 x 8 x 8 for 16 px."""
    pytest.importorskip("diffusers")
    import latents
    from test_latents import C, SIDE, save_autoencoder
    save_autoencoder(tmp / "vae")
    flags = flags or (f"--data={image_files(tmp / 'images')}",)
    latents.main(["encode", f"--out={tmp / 'set'}", f"--autoencoder={tmp / 'vae'}", f"--resolution={R}", "--shard=5",
                  "--batch=3", "--workers=0", "--threads=1", *flags])
    return [f"--data={tmp / 'set'}", *CLASS, f"--model.resolution={SIDE}", f"--model.channels={C}", "--model.patch=2"]


def tokens(tmp):
    """With the tokens of a CLIP of random weights beside them."""
    from test_text import make, write
    clip = f"--encoder=clip:{write(tmp / 'clip', make(False), False)}"
    captions = texts(tmp / "images")[0]
    flags = latents(tmp, captions, "--semantics=text", clip)
    return [flags[0], *TEXT, clip, "--padding=noisy", *flags[1 + len(CLASS):]]


SOURCES = {"classes": classes, "texts": texts, "tars": tars, "coco": coco, "latents": latents, "tokens": tokens}
TINY = ["--threads=1", "--workers=1", "--batch=6", "--microbatch=3", "--warmup=0", "--save_every=1", "--sample_every=1",
        "--log_every=1", "--dtype=float32", "--compile=off", "--model.width=16", "--model.depth=1", "--model.heads=2",
        f"--model.resolution={R}"]


def losses(out):
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


@pytest.fixture
def made(monkeypatch):
    """Runs on the CPU, and draws no loss curve; the text towers that were loaded."""
    loaded, real = [], text.CLIPText
    monkeypatch.setattr(distributed, "find_device", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(distributed, "matmul_peak", lambda *_: 1.0)
    monkeypatch.setattr(train, "plot", lambda out: out)
    monkeypatch.setattr(text, "CLIPText", lambda *args, **kw: loaded.append(args) or real(*args, **kw))
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_two_steps_a_resume_and_samples(tmp_path, made, kind):
    flags, whole, parts = [*TINY, *SOURCES[kind](tmp_path)], tmp_path / "whole", tmp_path / "parts"
    made.clear()
    for out, steps in ((whole, 2), (parts, 1), (parts, 2)):
        assert train.run([*flags, f"--out={out}", f"--steps={steps}"]) == 0
    assert losses(whole) == losses(parts) and len(losses(whole)) == 2
    for name in ("step-00000001", "step-00000002"):
        one, two = (out / "samples" / f"{name}.png" for out in (whole, parts))
        assert one.read_bytes() == two.read_bytes()         # the preview too
        assert (whole / name / "state.safetensors").read_bytes() == (parts / name / "state.safetensors").read_bytes()
    assert (whole / "samples" / "round-trip.png").exists() == (kind in ("latents", "tokens"))

    requested = ["--label=blue;1"] if "--model.semantics=class" in flags else ["--prompt=a red ring; a blue ring"]
    for options, towers in (([], 0), (requested, kind == "tokens")):
        sample.main([f"--out={parts}", "--n=3", "--steps=2", "--name=x", "--batch=2", "--threads=1", *options])
        with np.load(parts / "samples" / "x.npz") as file:
            assert file["arr_0"].shape == (3, R, R, 3) and file["arr_0"].std() > 0
        titles = (parts / "samples" / "x.txt").read_text().splitlines()
        assert len(titles) == 3 and len(set(titles)) > 1 and len(made) == towers
    assert titles == (["blue", "green", "blue"] if requested[0] == "--label=blue;1" else
                      ["a red ring", "a blue ring", "a red ring"])


BATCHES = 400


def measure(source, batches):
    """Growth of the process in bytes, and in blocks that Python holds: the least of three quarters of the batches.

    A leak grows in each; Python's table of interned strings, to which every Path adds, is made anew now and then."""
    page, seen = os.sysconf("SC_PAGE_SIZE"), []
    for step in range(batches):
        data.load_microbatch(source, None, 0, 2, 2, step, 0)
        if (step + 1) % (batches // 4) == 0:
            gc.collect()
            seen.append((int(Path("/proc/self/statm").read_text().split()[1]) * page, sys.getallocatedblocks()))
    return np.diff(np.array(seen), axis=0).min(0).tolist()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's count of pages")
@pytest.mark.parametrize("kind", SOURCES)
def test_memory_stays_flat_over_many_batches(tmp_path, made, kind):
    cfg = train.read_config([*TINY, *SOURCES[kind](tmp_path)])
    resident, blocks = measure(data.open_source(cfg), BATCHES)
    assert resident < 3000 * BATCHES / 4 and blocks < BATCHES / 4, (resident, blocks)         # a batch has 6 kB
