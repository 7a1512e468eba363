"""How many images a second a source yields, by number of workers, beside a plain torchvision ImageFolder.

python bench_data.py                                    a class folder and tar shards of 256 px JPEGs made for it
python bench_data.py --data=path/to/data --workers=0,1,2,4
python bench_data.py --need=4000                        beside what a training run eats, images/s

Everything is timed in turns, so that a busy machine slows all alike; a figure is the median of the turns, with the
quartiles. Workers are threads here and processes there, as each is meant to be used; 0 is the loop's own thread.
Files are in the disk cache after the untimed first turn. Where --data is a class folder, torchvision reads it too
and makes the same tensors: the largest square in the middle, bicubic to R x R, half of them mirrored, in [-1, 1].
"""
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import data
from config import Config, ModelConfig, UserError, parse
from outside import library

CLASSES = 4                             # folders of the pictures that are made
GFLOP = 237.2                           # of a forward pass of DiT-XL/2 at 256 px; python tables.py
SHARE = 0.4                             # of an accelerator's peak that training is assumed to reach


@dataclass(frozen=True)
class Options:
    """What to time."""
    data: str = ""              # what --data of a run is; empty = pictures made for it
    semantics: str = "none"     # as model.semantics: none, class or text, which decides how a folder is read
    resolution: int = 256       # R, side of what a source yields
    workers: str = "0,1,2"      # numbers of workers to try
    n: int = 256                # images a turn, and pictures that are made
    turns: int = 5              # timed turns of each
    need: float = 0.0           # images/s that training takes, to compare with; 0 = DiT-XL/2 on one A100


# ---------------------------------------------------------------- what is timed

def ours(source: data.Source, n: int, workers: int, turn: int, micro: int = 16) -> int:
    """Reads n images of a source as a run would, and says how many."""
    fetch = partial(data.fetch, source, None, 0, n, micro)
    with closing(data.prefetch(fetch, ((turn, m) for m in range(n // micro)), workers)) as batches:
        return sum(len(batch["image"]) for batch in batches)


def theirs(loader: Any, turn: int) -> int:
    """The same through torchvision's ImageFolder and PyTorch's DataLoader, whose workers stay for the next turn."""
    return sum(len(images) for images, _ in loader)


def torchvision_loader(folder: Path, R: int, n: int, workers: int, micro: int = 16) -> Any:
    """A DataLoader over n images of a class folder, drawn at random. UserError without torchvision."""
    library("torchvision", "the comparison")
    from torch.utils.data import DataLoader, Subset
    from torchvision import transforms
    from torchvision.datasets import ImageFolder
    steps = [middle, transforms.Resize((R, R), transforms.InterpolationMode.BICUBIC),
             transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    every = ImageFolder(str(folder), transforms.Compose(steps))
    rows = np.resize(np.random.default_rng(0).permutation(len(every)), n).tolist()
    return DataLoader(Subset(every, rows), micro, shuffle=True, num_workers=workers, drop_last=True,
                      persistent_workers=workers > 0)


def middle(image: Image.Image) -> Image.Image:
    """The largest square in the middle of a picture."""
    w, h = image.size
    a = min(w, h)
    left, top = (w - a + 1) // 2, (h - a + 1) // 2
    return image.crop((left, top, left + a, top + a))


def in_turns(readers: dict[str, Callable[[int], int]], turns: int) -> dict[str, list[float]]:
    """Images/s of every reader in every turn but the first. A reader says how many it has read."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(turns + 1):
        for name, read in readers.items():
            begun = time.perf_counter()
            count = read(turn)
            rates[name] += [count / (time.perf_counter() - begun)] * (turn > 0)
    return rates


def eaten(gflop: float, peak: float = 312e12, share: float = SHARE) -> float:
    """Images/s of a training step: peak x share / (3 x FLOPs of a forward pass). 312e12 is an A100's bf16 peak."""
    return peak * share / (3e9 * gflop)


# ---------------------------------------------------------------- pictures made for it

def photographs(n: int, long: int = 342, short: int = 256) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """JPEGs with the detail of photographs, noise that fades as 1/frequency, and their (h, w)."""
    for k in range(n):
        h, w = (short, long) if k % 2 else (long, short)
        rng = np.random.default_rng(k)
        fy, fx = np.fft.fftfreq(h)[:, None, None], np.fft.fftfreq(w)[None, :, None]
        field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((h, w, 3)), axes=(0, 1))
                             / np.hypot(np.hypot(fy, fx), 1 / w), axes=(0, 1)).real
        pixels = (127.5 + 50 * field / field.std()).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        yield file.getvalue(), (h, w)


def write_folder(root: Path, n: int) -> None:
    """root/CLASS/k.jpg."""
    for k, (content, _) in enumerate(photographs(n)):
        path = root / f"class{k % CLASSES}" / f"{k:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_shards(root: Path, n: int, each: int = 128) -> None:
    """root/00000.tar, ... of the same pictures, as img2dataset writes them."""
    root.mkdir(parents=True)
    for k, (content, (h, w)) in enumerate(photographs(n)):
        about = json.dumps({"caption": f"picture {k}", "original_height": h, "original_width": w})
        members = {"jpg": content, "txt": f"picture {k}".encode(), "json": about.encode()}
        with tarfile.open(root / f"{k // each:05}.tar", "a") as tar:
            for suffix, body in members.items():
                info = tarfile.TarInfo(f"{k:09}.{suffix}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))


# ---------------------------------------------------------------- the command

def open_sources(o: Options, scratch: Path) -> tuple[dict[str, data.Source], Path | None]:
    """The sources to time by name, and the class folder that torchvision can read, if there is one."""
    model = ModelConfig(semantics=o.semantics, resolution=o.resolution)
    cfg = Config(data=o.data, augment="flip", model=model)
    if o.data:
        what = data.kind(o.data)
        folder = Path(o.data).expanduser() if what == "folder" and o.semantics == "class" else None
        return {what: data.KINDS[what](cfg, "train")}, folder
    write_folder(scratch / "folder", o.n)
    write_shards(scratch / "tars", o.n)
    cfg = replace(cfg, model=replace(model, semantics="none"))
    made = {name: replace(cfg, data=str(scratch / name)) for name in ("folder", "tars")}
    return {name: data.KINDS[name](c, "train") for name, c in made.items()}, scratch / "folder"


def main(argv: list[str]) -> None:
    """Times what the options say and prints a line each."""
    o = parse(argv, Options())
    if not all(word.isdigit() for word in o.workers.split(",")) or o.n < 16 or o.turns < 1:
        raise UserError(f"workers={o.workers!r} wants whole numbers such as 0,1,2; n={o.n} at least 16; "
                        f"turns={o.turns} at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        sources, folder = open_sources(o, Path(scratch))
        readers: dict[str, Callable[[int], int]] = {}
        for workers in map(int, o.workers.split(",")):
            for name, source in sources.items():
                readers[f"{name}, {workers} workers"] = partial(ours, source, o.n, workers)
            if folder is not None:
                readers[f"torchvision, {workers} workers"] = partial(
                    theirs, torchvision_loader(folder, o.resolution, o.n, workers))
        rates = in_turns(readers, o.turns)
    need = o.need or eaten(GFLOP)
    print(f"{o.n} images a turn, {o.turns} turns, R = {o.resolution}, {os.cpu_count()} cores")
    for name, every in rates.items():
        low, mid, high = statistics.quantiles(every, n=4) if len(every) > 1 else every * 3
        print(f"{name:28} {mid:8.0f} images/s ({low:.0f} to {high:.0f}), "
              f"{need / mid:6.2f} of these feed {need:.0f} images/s")
    if not o.need:
        print(f"{need:.0f} images/s is what DiT-XL/2 eats on one A100: {SHARE:.0%} of 312 TFLOP/s over "
              f"3 x {GFLOP} GFLOP")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
