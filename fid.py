"""Fréchet distance (FID), KID and Inception Score of images in a folder or an npz, of a run, or during training.

python fid.py ref --images=data/train --center_crop=256 --save=ref.npz         statistics of real images, once
python fid.py fid --images=samples.npz --ref=ref.npz                    or a folder of PNG files
python fid.py fid --out=out/imagenet --ref=ref.npz --n=50000 --guidance=1.5     generated, never on the disk
torchrun --nproc_per_node=8 -- fid.py fid --out=out/imagenet --ref=ref.npz --metrics=fid+kid+is

The last line of the output is one JSON object. The name of a number states N, features and resize: compare it only
with numbers of the same name. To add a metric, write a function and a row of METRICS. CLIPScore, LPIPS and the judge
of shapes are programs of their own, in evaluation/.
Dimensions: B batch, H x W pixels, D features, K classes or images of one prompt, P prompts, n and m images.
"""
import hashlib
import importlib
import io
import json
import math
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import model
import sample
from config import Config, UserError, parse, run
from evaluation import inception
from latents import decoder_of
from runtime import distributed, log
from runtime.plot import to_uint8
from sources.folders import ArrayImages, FolderImages, open_images

ENOUGH = 10_000                         # images below which the bias of FID matters
BLOCK = 1024                            # rows of KID's kernel matrix in memory
NEGATIVE = 1e-6                         # rounding may take a distance this far below zero, relative to the traces
LABELS = ("n", "features", "weights_sha256", "resize", "data", "rows")    # of our reference files, beside mu and sigma


# ---------------------------------------------------------------- Fréchet distance, KID, Inception Score, means

def _exact(device: torch.device | str) -> torch.device:
    """The device for float64 sums: `device`, or the CPU for MPS, which has no float64."""
    return torch.device("cpu" if torch.device(device).type == "mps" else device)


class FeatureStats:
    """Mean and covariance of any number of features, as running sums in O(D^2) memory and float64.

    The split into batches and processes changes nothing but rounding. The relative error of a variance is about
    1e-16 (mean/std)^2, so shift features that are far from zero."""
    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros(1, dtype=torch.float64, device=_exact(device))
        self.sum = self.count.new_zeros(dim)                                        # (D,)
        self.outer = self.count.new_zeros(dim, dim)                                 # (D, D)

    def update(self, features: Tensor) -> None:
        """Add features (B, D)."""
        f = features.detach().to(self.sum.device).double()
        self.count += len(f)
        self.sum += f.sum(0)
        self.outer.addmm_(f.T, f)

    def all_reduce(self, dist: distributed.Dist) -> None:
        """Add up over the processes, once, at the end; a process may have seen no images."""
        sums = self.count, self.sum, self.outer
        self.count, self.sum, self.outer = (distributed.all_reduce_sum(x, dist) for x in sums)

    @property
    def n(self) -> int:
        """The number of features."""
        return int(self.count.item())

    @property
    def mean(self) -> Tensor:
        """(D,) float64"""
        return self.sum / self.count

    @property
    def cov(self) -> Tensor:
        """(D, D) float64, over n - 1. ValueError below two features."""
        if self.n < 2:
            raise ValueError(f"a covariance needs two features, got {self.n}")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """[FID] sec. 3: |mu1 - mu2|^2 + tr C1 + tr C2 - 2 tr (C1^1/2 C2 C1^1/2)^1/2 of two Gaussians, without a root.

    For any R R^T = C1, the last trace is the sum of the roots of the eigenvalues of R^T C2 R: real, no iteration.
    R is Cholesky's factor, or that of eigh for a singular C1. mu (D,), cov (D, D), tensors or arrays. ValueError for
    inf, nan, or C < 0."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(x).detach().cpu().double() for x in (mu1, cov1, mu2, cov2))
    if not all(x.isfinite().all() for x in (mu1, cov1, mu2, cov2)):
        raise ValueError("means or covariances hold inf or nan")
    R, singular = torch.linalg.cholesky_ex(cov1)
    if singular:
        values, vectors = torch.linalg.eigh(cov1)
        R = vectors * values.clamp(min=0).sqrt()
    root = torch.linalg.eigvalsh(R.T @ cov2 @ R).clamp(min=0).sqrt().sum()
    traces = cov1.trace() + cov2.trace()
    distance = ((mu1 - mu2).square().sum() + traces - 2 * root).item()
    if distance < -NEGATIVE * max(1.0, traces.item()):
        raise ValueError(f"distance {distance:.3g} is negative: one of the covariances is not positive")
    return max(0.0, distance)


def kid(x: Tensor, y: Tensor) -> tuple[float, float]:
    """[KID] eq. 4: the unbiased squared MMD of the kernel (x.y/D + 1)^3, over all pairs, and its standard error.

    x (n, D), y (m, D); memory (BLOCK, max(n, m)) float64. The value may be negative. The error is first order
    (Hoeffding's projection): right for sets that differ, too small for sets that do not."""
    x, y = (z.to(_exact(z.device)).double() for z in (x, y))

    def across(a: Tensor, b: Tensor) -> Tensor:             # mean kernel of each row of a with the rows of b
        return torch.cat([((part @ b.T / b.shape[1] + 1) ** 3).mean(1) for part in a.split(BLOCK)])

    def within(z: Tensor) -> Tensor:                        # mean kernel of each row with the others
        return (len(z) * across(z, z) - (z.square().mean(1) + 1) ** 3) / (len(z) - 1)

    h_x, h_y = within(x) - across(x, y), within(y) - across(y, x)                   # (n,), (m,)
    error = 2 * (h_x.var() / len(x) + h_y.var() / len(y)).sqrt()
    return (h_x.mean() + h_y.mean()).item(), error.item()


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """[IS] exp(E KL(p(y|x) || p(y))): the mean over consecutive splits, as equal as n allows, and its standard error.

    logits (n, K), in the order of the images, n >= splits."""
    n, scores = len(logits), []
    for k in range(splits):
        log_p = logits[k * n // splits:(k + 1) * n // splits].to(_exact(logits.device)).double().log_softmax(1)
        p = log_p.exp()
        marginal = p.mean(0)                                                        # (K,)
        scores.append(((p * log_p).sum(1).mean() - torch.special.xlogy(marginal, marginal).sum()).exp())
    scores = torch.stack(scores)
    return scores.mean().item(), (scores.std() / splits ** 0.5).item()


class MeanWithError(NamedTuple):
    """A mean over n values, with its standard error: their standard deviation over the square root of n."""
    value: float
    error: float
    n: int


def mean_over(values: list[float], dist: distributed.Dist) -> MeanWithError:
    """The mean over the values of all processes, any number each. UserError for fewer than two."""
    x, device = torch.tensor(values, dtype=torch.float64), _exact(dist.device)
    sums = torch.tensor([x.sum().item(), len(x)], dtype=torch.float64, device=device)
    total, n = distributed.all_reduce_sum(sums, dist).tolist()
    if n < 2:
        raise UserError(f"a mean with a standard error needs at least 2 images or prompts, got {n:g}")
    squares = distributed.all_reduce_sum((x - total / n).square().sum().to(device), dist).item()
    return MeanWithError(total / n, math.sqrt(squares / (n - 1) / n), int(n))


def mean_pair_distance(features: list[Tensor]) -> Tensor:
    """(P,) float64: mean of |f_i - f_j|^2 over the K (K - 1) / 2 pairs, as 2 / (K - 1) sum_k |f_k - mean f|^2.

    Centred first, because sums of squares in fp32 would lose distances near 1e-5. features: (P, K, ...) each, parts of
    one long vector. ValueError for K = 1."""
    K = features[0].shape[1]
    if K < 2:
        raise ValueError("a distance needs at least two images of every prompt")
    squares = [(f - f.mean(1, keepdim=True)).square().flatten(1).sum(1) for f in features]      # (P,) each
    return sum(s.cpu().double() for s in squares) * 2 / (K - 1)


# ---------------------------------------------------------------- reference statistics

class Reference(NamedTuple):
    """Mean (D,) and covariance (D, D) of real images, features (n, D) if kept for KID, and the origin of the file."""
    mu: Tensor
    sigma: Tensor
    rows: Tensor | None
    origin: dict[str, Any]


def write_reference(path: Path, stats: FeatureStats, extract: Any, source: str, rows: Tensor | None) -> None:
    """Save statistics as pytorch-fid and other tools read them (mu, sigma), with features, resize and source."""
    content, more = io.BytesIO(), {} if rows is None else {"rows": rows.cpu().numpy()}
    np.savez(content, mu=stats.mean.cpu().numpy(), sigma=stats.cov.cpu().numpy(), n=stats.n, features=extract.name,
             weights_sha256=extract.sha256, resize=extract.resize, data=source, **more)
    log.write_bytes(path, content.getvalue())


def read_reference(path: str, extract: Any) -> Reference:
    """Load an .npz of ours, of pytorch-fid, [ADM], [EDM] or clean-fid, and unpickle nothing.

    UserError for a missing or damaged file, and for one of other features than `extract`'s. One without labels is taken
    to have them and resize tf1."""
    make = f"make one with: python fid.py ref --images=FOLDER --save=FILE.npz --resize={extract.resize}"
    if not path:
        raise UserError(f"FID and KID need --ref=FILE.npz, the statistics of real images; {make}")
    try:
        content = Path(path).expanduser().read_bytes()
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            found = {key: file[key] for key in ("mu", "sigma", *(key for key in LABELS if key in file.files))}
        mu, sigma = (torch.from_numpy(found[key].astype(np.float64)) for key in ("mu", "sigma"))
    except (ValueError, OSError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as e:
        raise UserError(f"cannot read {path!r} as an .npz of plain arrays mu and sigma (pickles could run code): {e}; "
                        f"{make}") from e
    made, D = {"features": extract.name, "weights_sha256": extract.sha256, "resize": extract.resize}, extract.dim
    stated = {**made, "resize": "tf1", **{key: str(found[key]) for key in made if key in found}}
    wrong = [f"{key} {stated[key]}, wanted {want}" for key, want in made.items() if stated[key] != want]
    if (mu.shape, sigma.shape) != ((D,), (D, D)) or not (mu.isfinite().all() and sigma.isfinite().all()):
        wrong += [f"mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}, wanted finite ({D},) and ({D}, {D})"]
    if wrong:
        raise UserError(f"{path} has {'; '.join(wrong)}; {make}")
    origin = {"reference": path, "reference_sha256": hashlib.sha256(content).hexdigest(),
              "reference_n": int(found["n"]) if "n" in found else None,
              "reference_data": str(found.get("data", "")), "reference_labelled": set(made) <= set(found)}
    return Reference(mu, sigma, torch.from_numpy(found["rows"]) if "rows" in found else None, origin)


# ---------------------------------------------------------------- one pass over the images

class Failed(UserError):
    """No metric exists for these images; all processes raise it together."""


def collect(images: Callable, n: int, batch: int, extract: Any, keep: set[str],
            dist: distributed.Dist) -> tuple[FeatureStats, dict[str, Tensor]]:
    """Statistics of images 0 .. n - 1, and the rows in `keep`: {"features": (n, D), "logits": (n, K)}.

    The processes share the batches and all return the same. images(indices) returns uint8 (B, 3, H, W); `workers`
    is its number of threads, `broken` its count of images that were not finite. extract(images) returns features and
    logits; it has `dim` and `classes`. Every image counts once. Failed if one was not finite or all are uniform."""
    stats, blank = FeatureStats(extract.dim, dist.device), 0
    widths = {"features": extract.dim, "logits": extract.classes}
    rows = {key: torch.zeros(n, width, device=dist.device) for key, width in widths.items() if key in keep}
    batches = [np.arange(b, min(b + batch, n)) for b in range(0, n, batch)][dist.rank::dist.world]
    loaded = data.prefetch(images, ((indices,) for indices in batches), images.workers)
    for indices, x in zip(batches, tqdm(loaded, total=len(batches), unit="batch", disable=dist.rank > 0 or None)):
        found = dict(zip(widths, extract(x)))
        stats.update(found["features"])
        for key, kept in rows.items():
            kept[indices[0]:indices[-1] + 1] = found[key]
        flat = x.flatten(1)
        blank += int((flat.amax(1) == flat.amin(1)).sum())

    stats.all_reduce(dist)
    rows = {key: distributed.all_reduce_sum(kept, dist) for key, kept in rows.items()}      # one process has each row
    counts = torch.tensor([float(blank), float(images.broken)], device=dist.device)
    blank, broken = map(int, distributed.all_reduce_sum(counts, dist).tolist())
    if broken:
        raise Failed(f"{broken} of {n} images are not finite; try --dtype=float32")
    if blank == n:
        raise Failed(f"all {n} images are uniform; the sampler has failed")
    if blank and dist.rank == 0:
        log.info(f"warning: {blank} of {n} images are uniform.")
    return stats, rows


class Metric(NamedTuple):
    """A row of METRICS: function(stats, rows, reference) returns the value and its standard error, None if unknown."""
    function: Callable[[FeatureStats, Tensor | None, Reference | None], tuple[float, float | None]]
    rows: str = ""                      # what `rows` holds of every image: features or logits; empty = nothing
    least: int = 2                      # images
    reference: bool = True              # whether it compares with real images


METRICS = {
    "fid": Metric(lambda stats, rows, ref: (frechet_distance(stats.mean, stats.cov, ref.mu, ref.sigma), None)),
    "kid": Metric(lambda stats, rows, ref: kid(rows, ref.rows.to(rows.device)), rows="features"),
    "is": Metric(lambda stats, rows, ref: inception_score(rows), rows="logits", least=10, reference=False),
}


# ---------------------------------------------------------------- images of a run

@dataclass
class GeneratedImages:
    """The images of a run by number, equal to those of sample.py with the same options, for any number of processes."""
    run: sample.Run
    workers: int = 0                    # threads: none
    broken: int = 0                     # images that were not finite

    def __call__(self, indices: np.ndarray) -> Tensor:
        """Images number `indices` (B,), uint8 (B, 3, H, W). Only the last batch may be short."""
        first, o = int(indices[0]), self.run.options
        x = self.run(np.arange(first, first + min(o.batch, o.n)))[:len(indices)]     # batches of one size round alike
        self.broken += int((~x.flatten(1).isfinite().all(1)).sum())
        return torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2)


def size_groups(run: sample.Run, sizes: tuple[int, ...], dist: distributed.Dist) -> Iterator[Tensor]:
    """[COND] sec. 3.1: for every prompt of a run an image at each requested size, all else equal. uint8 (P, K, 3, H, W)

    The processes share the prompts; an image depends on the number of its prompt and on its size alone."""
    o, K = run.options, len(sizes)
    if "size" not in model.control_names(run.cfg.model) or o.size:
        raise UserError(f"images at several sizes need a model with size among its controls, and no --size of their "
                        f"own; {o.out} has model.controls={run.cfg.model.controls!r}, size={o.size!r}")
    per = max(1, o.batch // K)
    for first in range(dist.rank * per, o.n, dist.world * per):
        index = np.repeat(np.arange(first, min(first + per, o.n)), K)                   # (P K,)
        size = torch.tensor(sizes, dtype=torch.float32)[:, None].expand(K, 2).repeat(len(index) // K, 1)
        x = run(index, replace(run.conditions(index)[0], size=size))
        yield torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).unflatten(0, (-1, K))


@dataclass(frozen=True)
class Options(sample.Options):
    """What to measure and against what; the rest, for a run, as for sample.py."""
    images: str = ""                # folder, .npz (arr_0) or .npy of uint8 images; empty = generate those of --out
    ref: str = ""                   # statistics of real images, .npz; `fid.py ref` makes them
    metrics: str = field(default=next(iter(METRICS)), metadata={"help": f"joined with +: {', '.join(METRICS)}"})
    n: int = 0                      # images; 0 = all of --images, 50,000 of a run
    resize: str = "tf1"             # to the network's 299 pixels: tf1, as papers do, or clean, antialiased
    center_crop: int = 0            # --images: crop to centred squares, resized to this side; 0 = as they are
    inception: str = ""             # weights file; empty = $INCEPTION_WEIGHTS, the cache, or the network


class Evaluation:
    """The metrics of n images: evaluation(images) is {name: {value, se}} on rank 0, {} elsewhere, with warnings.

    A name is fid50k/inception-2015-12-05/tf1: only equal names are comparable. se is the standard error, None for FID,
    where the bias, which falls as 1/n, is larger. `reference` is None if no metric compares with one. UserError for an
    unknown metric, too few images, or a reference without the features that KID needs."""
    def __init__(self, o: Options, n: int, dist: distributed.Dist) -> None:
        for name in (names := o.metrics.split("+")):
            if name not in METRICS:
                raise UserError(f"unknown metric {name!r} in metrics={o.metrics!r}; there are {', '.join(METRICS)}")
            if n < METRICS[name].least:
                raise UserError(f"n={n} images are too few for {name}, which needs {METRICS[name].least}")
        self.n, self.batch, self.dist, self.wanted = n, o.batch, dist, {name: METRICS[name] for name in names}
        self.extract, self.reference = inception.Extractor(o.inception, o.resize, dist), None
        if comparing := [metric for metric in self.wanted.values() if metric.reference]:
            self.reference = read_reference(o.ref, self.extract)
            if any(metric.rows for metric in comparing) and self.reference.rows is None:
                raise UserError(f"{o.metrics} needs a reference with features; make it with: fid.py ref --kid=true")

    def __call__(self, images: Callable) -> dict[str, dict]:
        n, extract, keep = self.n, self.extract, {metric.rows for metric in self.wanted.values()}
        stats, rows = collect(images, n, self.batch, extract, keep, self.dist)
        if self.dist.rank > 0:
            return {}
        if n < ENOUGH and "fid" in self.wanted:
            log.info(f"warning: FID of {n:,} images is biased upwards; compare it at the same N only, or use "
                     f"--metrics=kid, which has no bias.")
        ending = f"{f'{n // 1000}k' if n % 1000 == 0 else n}/{extract.name}/{extract.resize}"
        values = {name: metric.function(stats, rows.get(metric.rows), self.reference)
                  for name, metric in self.wanted.items()}
        return {name + ending: {"value": value, "se": se} for name, (value, se) in values.items()}


class Monitor:
    """FID and other metrics during training: each call measures the same images and adds a line to log.jsonl.

    Make it in all processes before the first step, so that missing weights or references stop the run there, and call
    it in all. header: that of weights.safetensors, with classes and controls. A measurement that fails is logged, and
    training continues."""
    def __init__(self, o: Options, cfg: Config, header: dict[str, str], dist: distributed.Dist) -> None:
        self.o, self.dist = sample.check(o, cfg), dist
        self.evaluation = Evaluation(o, o.n, dist)
        decoder = decoder_of(header, o.autoencoder, cfg.model.channels, dist.device)
        conditions = sample.SampleConditions(self.o, cfg, header)
        self.run = sample.Run(self.o, None, cfg, header, conditions, decoder, dist.device)

    def __call__(self, net: nn.Module, step: int) -> dict[str, dict]:
        """The values of `net` at `step`, on rank 0; {} elsewhere."""
        t0, values, failed = time.monotonic(), {}, {}
        try:
            values = self.evaluation(GeneratedImages(self.run._replace(net=net)))
        except Failed as e:
            failed = {"evaluation_failed": str(e)}
        if self.dist.rank == 0:
            if failed:
                log.info(f"warning: no metric at step {step:,}: {failed['evaluation_failed']}. Training continues.")
            with log.warn_on_disk_error("a line of log.jsonl"):
                numbers = {name: v["value"] for name, v in values.items()}
                log.append(Path(self.o.out), {"step": step, **failed, **numbers, "evaluation_s": time.monotonic() - t0})
        return values


# ---------------------------------------------------------------- the command line

def open_first(path: str, n: int, center_crop: int) -> tuple[FolderImages | ArrayImages, int]:
    """The images at `path` and how many to use: n, or all for n = 0. UserError if it has fewer."""
    images = open_images(path, center_crop)
    if n > len(images):
        raise UserError(f"n={n} images were requested, but {path} has {len(images)}")
    return images, n or len(images)


def main_fid(argv: list[str]) -> None:
    """FID, KID and Inception Score of a folder, an npz or a run."""
    o = parse(argv, Options())
    for key in ("ema_file", "pretrained") if o.images else ("center_crop",):
        if getattr(o, key) != getattr(Options, key):
            raise UserError(f"--{key}={getattr(o, key)} has no effect {'with' if o.images else 'without'} --images")
    dist = distributed.setup(o.threads)
    if o.images:
        (images, n), origin = open_first(o.images, o.n, o.center_crop), {"images": o.images}
        if images.jpegs and dist.rank == 0:
            log.info(f"warning: {images.jpegs} images are JPEG files, which changes FID; save PNG or npz.")
    else:
        n = o.n or 50_000
        run = sample.load_run(replace(o, n=n), dist.device)
        images, origin = GeneratedImages(run), {
            **asdict(run.options), "weights_sha256": run.header["sha256"], "train_step": int(run.header["step"]),
            "ema_std": run.header.get("ema"), "prompts_sha256": run.conditions.prompts_sha256,
            "dtype": str(run.net.dtype)[6:]}
    evaluation = Evaluation(o, n, dist)
    values = evaluation(images)
    if dist.rank == 0:
        for name, v in values.items():
            print(f"{name}  {v['value']:.6g}" + (f" +- {v['se']:.2g}" if v["se"] is not None else ""))
        reference = evaluation.reference.origin if evaluation.reference else {}
        print(json.dumps({**origin, "metrics": values, "n": n, **reference, "resize": o.resize,
                          "features_sha256": evaluation.extract.sha256, "torch": torch.__version__}))


@dataclass(frozen=True)
class RefOptions:
    """The real images, and the file for their statistics."""
    images: str = ""                # folder, .npz (arr_0) or .npy of uint8 images
    save: str = ""                  # the .npz to write
    center_crop: int = 0            # crop to centred squares, resized to the side of the samples; 0 = as they are
    n: int = 0                      # the first n images; 0 = all
    kid: bool = False               # keep the features too, 8 kB an image, for --metrics=kid
    resize: str = "tf1"             # as in `fid.py fid`; the two must be equal
    inception: str = ""             # weights file; empty = $INCEPTION_WEIGHTS, the cache, or the network
    batch: int = 64                 # images at a time
    threads: int = 0                # CPU threads; 0 = all


def main_ref(argv: list[str]) -> None:
    """Statistics of real images."""
    o = parse(argv, RefOptions())
    dist, path = distributed.setup(o.threads), Path(o.save)
    if not o.images or path.suffix != ".npz" or not path.parent.is_dir():
        raise UserError(f"ref needs --images, the real images, and --save=FILE.npz in an existing folder; got "
                        f"images={o.images!r}, save={o.save!r}")
    images, n = open_first(o.images, o.n, o.center_crop)
    extract = inception.Extractor(o.inception, o.resize, dist)
    stats, rows = collect(images, n, o.batch, extract, {"features"} if o.kid else set(), dist)
    if dist.rank == 0:
        write_reference(path, stats, extract, o.images, rows.get("features"))
        print(json.dumps({**asdict(o), "n": n, "features": extract.name, "features_sha256": extract.sha256}))


# A function here, or the module of evaluation/ whose command it is.
COMMANDS = {"fid": main_fid, "ref": main_ref, "clip": "evaluation.clip_score", "lpips": "evaluation.lpips",
            "toy": "evaluation.shapes_judge"}


def main(argv: list[str]) -> None:
    if argv[:1] in (["--help"], ["-h"]):
        return print(f"{__doc__}\nfid.py COMMAND --help lists the options of a command")
    if not argv or argv[0] not in COMMANDS:
        raise UserError(f"fid.py wants a command first, got {' '.join(argv)!r}; there are {', '.join(COMMANDS)}")
    command = COMMANDS[argv[0]]
    (importlib.import_module(command).main if isinstance(command, str) else command)(argv[1:])


if __name__ == "__main__":
    run(main, cleanup=distributed.cleanup)
