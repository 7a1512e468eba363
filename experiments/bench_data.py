"""Images/s that a data source yields, by number of workers, beside what training consumes.

python -m experiments.bench_data                    a class folder and tar shards of synthetic 256 px JPEGs
python -m experiments.bench_data --data=path/to/data --workers=0,1,2,4
python -m experiments.bench_data --need=4000                        beside a training run that consumes 4,000 images/s

Workers are threads; 0 reads in the loop itself. All combinations alternate, so that a busy machine slows all alike, and
figures are medians with quartiles. After an untimed first turn the files are in the disk cache.
"""
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import data
from config import Config, ModelConfig, UserError, parse, run

GFLOP = 237.2                           # of a forward pass of DiT-XL/2 at 256 px; python -m experiments.tables
PEAK, SHARE = 312e12, 0.4               # bf16 FLOP/s of an A100, and the share of it that training reaches
MICRO = 16                              # images that are read together


@dataclass(frozen=True)
class Options:
    """What to time."""
    data: str = ""              # a run's --data; empty = synthetic photographs
    semantics: str = "none"     # as model.semantics: none, class or text, which decides how a folder is read
    resolution: int = 256       # side of the images that a source yields
    workers: str = "0,1,2"      # numbers of workers to try
    n: int = 256                # images a turn, and number of synthetic photographs
    turns: int = 5              # timed turns of each combination
    need: float = 0.0           # images/s that training consumes; 0 = DiT-XL/2 on one A100


def read_images(source: data.Source, n: int, workers: int, turn: int) -> int:
    """Read about n images of a source as a run would; their exact number."""
    fetch = partial(data.load_microbatch, source, None, 0, n, MICRO)
    with closing(data.prefetch(fetch, ((turn, m) for m in range(n // MICRO)), workers)) as batches:
        return sum(len(batch["image"]) for batch in batches)


def in_turns(readers: dict[str, Callable[[int], int]], turns: int) -> dict[str, list[float]]:
    """Images/s of every reader, a function from turn to number of images, in every turn but the first."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(turns + 1):
        for name, read in readers.items():
            start = time.perf_counter()
            rate = read(turn) / (time.perf_counter() - start)
            rates[name] += [rate] if turn > 0 else []
    return rates


def images_needed(gflop: float) -> float:
    """Images/s of a training step, which costs three forward passes of `gflop` each, on one A100."""
    return PEAK * SHARE / (3e9 * gflop)


def synthetic_photos(n: int, long: int = 342, short: int = 256) -> Iterator[tuple[bytes, int, int]]:
    """JPEGs with the detail of photographs, noise that fades as 1/frequency, and their height and width."""
    for k in range(n):
        h, w = (short, long) if k % 2 else (long, short)
        fy, fx = np.fft.fftfreq(h)[:, None, None], np.fft.fftfreq(w)[None, :, None]
        spectrum = np.fft.fft2(np.random.default_rng(k).standard_normal((h, w, 3)), axes=(0, 1))
        field = np.fft.ifft2(spectrum / np.hypot(np.hypot(fy, fx), 1 / w), axes=(0, 1)).real
        file = io.BytesIO()
        pixels = (127.5 + 50 * field / field.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        yield file.getvalue(), h, w


def write_sources(root: Path, n: int) -> dict[str, str]:
    """Write n photographs to a folder of images and to tar shards like those of img2dataset; the paths of both."""
    (root / "folder" / "photos").mkdir(parents=True)
    (root / "tars").mkdir()
    for k, (content, h, w) in enumerate(synthetic_photos(n)):
        (root / "folder" / "photos" / f"{k:09}.jpg").write_bytes(content)
        text = json.dumps({"original_height": h, "original_width": w}).encode()
        with tarfile.open(root / "tars" / f"{k // 128:05}.tar", "a") as tar:
            for suffix, body in (("jpg", content), ("txt", b"a photograph"), ("json", text)):
                info = tarfile.TarInfo(f"{k:09}.{suffix}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return {name: str(root / name) for name in ("folder", "tars")}


def main(argv: list[str]) -> None:
    o = parse(argv, Options())
    if not all(word.isdigit() for word in o.workers.split(",")) or o.n < MICRO or o.turns < 2:
        raise UserError(f"workers={o.workers!r} wants whole numbers such as 0,1,2; n={o.n} at least {MICRO}; "
                        f"turns={o.turns} at least 2")
    with tempfile.TemporaryDirectory() as scratch:
        paths = {data.source_type(o.data): o.data} if o.data else write_sources(Path(scratch), o.n)
        model = ModelConfig(semantics=o.semantics if o.data else "none", resolution=o.resolution)
        cfgs = {name: Config(data=path, augment="flip", model=model) for name, path in paths.items()}
        sources = {name: data.SOURCES[data.source_type(c.data)].open(c, "train") for name, c in cfgs.items()}
        rates = in_turns({f"{name}, {workers} workers": partial(read_images, source, o.n, int(workers))
                          for workers in o.workers.split(",") for name, source in sources.items()}, o.turns)
    need = o.need or images_needed(GFLOP)
    print(f"{o.n} images a turn, {o.turns} turns, {o.resolution} px, {os.cpu_count()} cores; training needs "
          f"{need:.0f} images/s" + ("" if o.need else f": DiT-XL/2 on one A100 at {SHARE:.0%} of its peak"))
    for name, every in rates.items():
        low, mid, high = statistics.quantiles(every, n=4)
        print(f"{name:28} {mid:8.0f} images/s ({low:.0f} to {high:.0f}), {need / mid:6.2f} of these feed the training")


if __name__ == "__main__":
    run(main)
