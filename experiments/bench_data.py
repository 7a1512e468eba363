"""Images/s that a data source yields, by number of workers, beside what training consumes.

python -m experiments.bench_data                    a class folder and tar shards of synthetic 256 px JPEGs
python -m experiments.bench_data --data=path/to/data --workers=0,1,2,4

Workers are threads; 0 reads in the loop itself. All combinations alternate; figures are medians with quartiles. After
an untimed first turn the files are in the disk cache.
"""
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import data
from config import Config, ModelConfig, UserError, parse, run

MICROBATCH = 16                         # images that are read together
NEED = 312e12 * 0.4 / (3 * 237.2e9)     # images/s of DiT-XL/2 at 256 px: 40 % of an A100's peak over FLOPs a step


@dataclass(frozen=True)
class Options:
    """What to time."""
    data: str = ""              # a run's --data; empty = synthetic photographs
    semantics: str = "none"     # as model.semantics: none, class or text, which decides how a folder is read
    resolution: int = 256       # side of the images that a source yields
    workers: str = "0,1,2"      # numbers of workers to try
    n: int = 256                # images a turn, and number of synthetic photographs
    turns: int = 5              # timed turns of each combination
    need: float = NEED          # images/s that training consumes; the default is DiT-XL/2 on one A100, by arithmetic


def read_images(source: data.Source, n: int, workers: int, turn: int) -> int:
    """Read about n images of a source as a run would; return their exact number."""
    fetch = partial(data.load_microbatch, source, None, 0, n, MICROBATCH)
    with closing(data.prefetch(fetch, ((turn, m) for m in range(n // MICROBATCH)), workers)) as batches:
        return sum(len(batch["image"]) for batch in batches)


def in_turns(readers: dict[str, Callable[[int], int]], turns: int) -> dict[str, list[float]]:
    """Images/s of every reader, a function from turn to number of images, in every turn but the first."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(turns + 1):
        for name, read in readers.items():
            start = time.perf_counter()
            rates[name].append(read(turn) / (time.perf_counter() - start))
    return {name: rate[1:] for name, rate in rates.items()}


def synthetic_photo(k: int) -> Image.Image:
    """Photo number k, 342 x 256 or 256 x 342: noise that fades as 1/frequency, which has the detail of photographs."""
    h, w = (256, 342) if k % 2 else (342, 256)
    fy, fx = np.fft.fftfreq(h)[:, None, None], np.fft.fftfreq(w)[None, :, None]
    spectrum = np.fft.fft2(np.random.default_rng(k).standard_normal((h, w, 3)), axes=(0, 1))
    field = np.fft.ifft2(spectrum / np.hypot(np.hypot(fy, fx), 1 / w), axes=(0, 1)).real
    return Image.fromarray((127.5 + 50 * field / field.std()).clip(0, 255).astype(np.uint8))


def write_sources(root: Path, n: int) -> dict[str, str]:
    """Write n photos with captions to a folder and to tar shards; return the paths of both."""
    (root / "folder" / "photos").mkdir(parents=True)
    (root / "tars").mkdir()
    for k in range(n):
        image = root / "folder" / "photos" / f"{k:09}.jpg"
        synthetic_photo(k).save(image, quality=90)
        image.with_suffix(".txt").write_text("a photograph")
        with tarfile.open(root / "tars" / f"{k // 128:05}.tar", "a") as tar:
            for file in (image, image.with_suffix(".txt")):
                tar.add(file, file.name)
    return {name: str(root / name) for name in ("folder", "tars")}


def main(argv: list[str]) -> None:
    o = parse(argv, Options())
    if not all(word.isdigit() for word in o.workers.split(",")) or o.n < MICROBATCH or o.turns < 2:
        raise UserError(f"workers={o.workers!r} must be whole numbers such as 0,1,2; n={o.n} at least {MICROBATCH}; "
                        f"turns={o.turns} at least 2")
    with tempfile.TemporaryDirectory() as scratch:
        paths = {data.source_type(o.data): o.data} if o.data else write_sources(Path(scratch), o.n)
        model = ModelConfig(semantics=o.semantics if o.data else "none", resolution=o.resolution)
        sources = {name: data.open_source(Config(data=path, augment="flip", model=model))
                   for name, path in paths.items()}
        rates = in_turns({f"{name}, {workers} workers": partial(read_images, source, o.n, int(workers))
                          for workers in o.workers.split(",") for name, source in sources.items()}, o.turns)
    print(f"{o.n} images a turn, {o.turns} turns, {o.resolution} px, {os.cpu_count()} cores; training consumes "
          f"{o.need:.0f} images/s")
    for name, rate in rates.items():
        low, mid, high = statistics.quantiles(rate, n=4)
        print(f"{name:28} {mid:8.0f} images/s ({low:.0f} to {high:.0f}), {o.need / mid:6.2f} of these feed training")


if __name__ == "__main__":
    run(main)
