"""Is it good? FID, KID and the Inception Score, of pictures in a folder or an npz, of a run, or during training.

python fid.py ref --images=data/train --square=256 --to=ref.npz         statistics of real pictures, once
python fid.py fid --images=samples.npz --ref=ref.npz                    or a folder of PNG files
python fid.py fid --out=out/imagenet --ref=ref.npz --n=50000 --lam=1.5  drawn as sample.py draws, never on the disk
torchrun --nproc_per_node=8 -- fid.py fid --out=out/imagenet --ref=ref.npz --metrics=fid+kid+is
python fid.py clip --images=samples.npz --prompts=prompts.txt           CLIPScore
python fid.py lpips --out=out/imagenet --n=100                          how far pictures differ by size alone
python fid.py toy --images=out/demo/samples/NAME.npz                    shapes: toy_fd, accuracy by attribute
python fid.py check                                                     golden and analytic tests, without weights
python fid.py speed                                                     of the distance and of the features

The last line is one JSON object. A number's name says N, features and resize: numbers of other names do not compare.
Dimensions: B batch, H x W pixels, D features, n pictures.
"""
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import data
import inception
import judge
import log
import machine
import perceptual
import sample
from autoencoder import decoder_of
from config import Config, UserError, parse
from distances import FeatureStats, InceptionScore, frechet_distance, kid
from fid_check import Check, Speed, checks, speeds
from fid_files import Reference, Stack, find_reference, first_pictures, write_reference
from inception import Extractor
from perceptual import clip_score, lpips_diversity      # noqa: F401 (of the public names of this room)

ENOUGH = 10_000                         # below so many pictures the bias of FID is no longer small


# ---------------------------------------------------------------- one pass over the pictures

class Failed(UserError):
    """Pictures of which no metric can be taken; all processes find it together."""


@dataclass
class Collected:
    """What one pass leaves: statistics for FID, rows for KID, sums for the Inception Score, one-coloured pictures."""
    stats: FeatureStats
    rows: Tensor | None
    score: InceptionScore | None
    blank: int = 0


def collect(pictures: Callable, n: int, batch: int, extract: Any, metrics: set[str],
            place: machine.Place) -> Collected:
    """Features of pictures 0 .. n - 1, by batches that the processes take in turn; the same sums on every process.

    pictures(numbers) -> (B, 3, H, W) uint8, with `workers`, the threads to call it from, and `broken`, how many were
    not finite. extract(images) -> features, logits; it has `dim` and `classes`. Every picture counts once: nothing is
    padded. Failed if one was not finite or all are blank."""
    stats = FeatureStats(extract.dim, place.device)
    rows = torch.zeros(n, extract.dim, device=place.device) if "kid" in metrics else None
    score = InceptionScore(n, extract.classes, place.device) if "is" in metrics else None
    batches = [np.arange(b, min(b + batch, n)) for b in range(0, n, batch)][place.rank::place.world]
    blank, keys = 0, ((indices,) for indices in batches)
    images = data.prefetch(pictures, keys, pictures.workers)
    for indices, x in zip(batches, tqdm(images, total=len(batches), unit="batch", disable=place.rank > 0 or None)):
        features, logits = extract(x)
        stats.update(features)
        if rows is not None:
            rows[indices[0]:indices[-1] + 1] = features.to(rows.device)
        if score is not None:
            score.update(logits, torch.from_numpy(indices))
        flat = x.flatten(1)
        blank += int((flat.amax(1) == flat.amin(1)).sum())

    stats.all_reduce(place)
    if rows is not None:
        rows = machine.add_up(rows, place)                  # every row is zero on all processes but one
    if score is not None:
        score.all_reduce(place)
    counts = torch.tensor([float(blank), float(pictures.broken)], device=place.device)
    blank, broken = map(int, machine.add_up(counts, place).tolist())
    if stats.n != n:
        raise RuntimeError(f"{stats.n} pictures were counted, {n} were asked for")
    if broken:
        raise Failed(f"{broken} of {n} pictures are not finite")
    if blank == n:
        raise Failed(f"all {n} pictures are of one colour each; the sampler has failed")
    return Collected(stats, rows, score, blank)


# name -> a function of what was collected and of a Reference, to the value and its standard error
METRICS = {
    "fid": lambda got, ref: (frechet_distance(got.stats.mean, got.stats.cov, ref.mu, ref.sigma), None),
    "kid": lambda got, ref: kid(got.rows, ref.rows.to(got.rows.device)),
    "is": lambda got, ref: got.score.value(),
}


def metric_name(metric: str, n: int, extract: Any) -> str:
    """fid50k/inception-2015-12-05/tf1: what must be equal for two numbers to be compared."""
    return f"{metric}{f'{n // 1000}k' if n % 1000 == 0 else n}/{extract.name}/{extract.resize}"


def wanted(metrics: str, n: int, reference: Reference | None) -> list[str]:
    """The names in `metrics`, joined with +. UserError for one that there is not, or that lacks what it needs."""
    names = metrics.split("+")
    if unknown := [name for name in names if name not in METRICS]:
        raise UserError(f"unknown metric {unknown[0]!r} in metrics={metrics!r}; there are {', '.join(METRICS)}")
    if "kid" in names and (reference is None or reference.rows is None):
        raise UserError("KID needs the features themselves, which the reference does not hold; make it with: "
                        "python fid.py ref --kid=true")
    if n < (10 if "is" in names else 2):
        raise UserError(f"n={n} pictures are too few for {metrics}; IS needs 10, FID and KID 2, and FID "
                        f"wants {ENOUGH:,}")
    return names


def evaluate(pictures: Callable, n: int, batch: int, extract: Extractor, reference: Reference | None, metrics: str,
             place: machine.Place) -> dict[str, dict]:
    """{name: {value, se}} of n pictures on rank 0, {} elsewhere. Arguments as for collect; warns of what is doubtful.

    se is the standard error, None for FID: its bias, which falls as 1/n, is larger. ValueError unless the features
    are those of FID: there is no FID in other features."""
    if (extract.name, extract.sha256) != (inception.NAME, inception.SHA256):
        raise ValueError(f"{extract.name} is not the network of FID, KID and IS; name the metric after its own")
    names = wanted(metrics, n, reference)
    got = collect(pictures, n, batch, extract, set(names), place)
    if place.rank > 0:
        return {}
    if reference and not reference.labelled:
        checkpoint.say(f"note: unlabelled reference {reference.path}; it is taken to be of {extract.name} after the "
                       f"resize 'tf1', which is not checked.")
    if got.blank:
        checkpoint.say(f"warning: {got.blank} of {n} pictures are of one colour each.")
    if n < ENOUGH and "fid" in names:
        checkpoint.say(f"warning: FID of {n:,} pictures is biased upwards; compare it with the same N only, or use "
                       f"--metrics=kid, which is not biased.")
    values = {name: METRICS[name](got, reference) for name in names}
    return {metric_name(name, n, extract): {"value": value, "se": se} for name, (value, se) in values.items()}


# ---------------------------------------------------------------- pictures of a run

class Drawn:
    """Pictures of a network, by number: those that sample.py draws with the same options, whatever the processes."""
    jpegs, workers, broken = 0, 0, 0

    def __init__(self, o: sample.Options, net: nn.Module, cfg: Config, wishes: sample.Wishes,
                 decoder: tuple[Callable, int], device: torch.device) -> None:
        self.o, self.net, self.cfg, self.wishes, self.decoder, self.device = o, net, cfg, wishes, decoder, device

    def __call__(self, indices: np.ndarray) -> Tensor:
        """Pictures number `indices` (B,), of which only the last batch may be short. (B, 3, H, W) uint8"""
        first = int(indices[0])
        whole = np.arange(first, first + min(self.o.batch, self.o.n))       # every batch is drawn in full size
        x = self.decoder[0](sample.draw(self.net, self.cfg, self.wishes(whole)[0], whole, self.o, self.device))
        if broken := int((~x[:len(indices)].flatten(1).isfinite().all(1)).sum()):
            self.note(broken, f"pictures {first} to {indices[-1]} are not finite; try --dtype=float32")
        return torch.from_numpy(sample.to_uint8(x)[:len(indices)]).permute(0, 3, 1, 2)

    def note(self, broken: int, message: str) -> None:
        """Called for pictures that are not finite: nothing is worth going on for."""
        raise UserError(message)


class Watched(Drawn):
    """Pictures of a network in training, which goes on: those that are not finite are counted, for all to know."""
    def note(self, broken: int, message: str) -> None:
        self.broken += broken


@dataclass(frozen=True)
class Options(sample.Options):
    """What to measure and against what; the rest, for a run, as for sample.py."""
    images: str = ""                # folder, .npz (arr_0) or .npy of uint8 pictures; empty = draw those of --out
    ref: str = ""                   # statistics of real pictures, .npz; `fid.py ref` makes them
    metrics: str = "fid"            # joined with +: fid, kid, is
    n: int = 0                      # pictures; 0 = all of --images, 50,000 of a run
    resize: str = "tf1"             # to the network's 299 pixels: tf1, as papers do, or clean, antialiased
    square: int = 0                 # --images: cut to centred squares of so many pixels; 0 = as they are
    inception: str = ""             # weights file; empty = $INCEPTION_WEIGHTS, the cache, or the network
    arr0: str = ""                  # also write the run's pictures into this .npz, for the evaluator of ADM


def run_pictures(o: Options, place: machine.Place) -> tuple[Callable, dict]:
    """Pictures of the run o.out, and what is to be known of them. UserError for options that cannot be drawn."""
    net, cfg, header = sample.open_run(o)
    o = sample.check(o, cfg)
    decoder = decoder_of(header, o.autoencoder, cfg.model.channels, place.device)
    net = net.to(place.device)
    net.dtype = machine.precision(place.device, o.dtype)
    wishes = sample.Wishes(o, cfg, header)
    pictures = Drawn(o, net, cfg, wishes, decoder, place.device)
    asked = {"class": "all classes in turn", "none": "nothing",
             "text": f"captions of {'the test split' if cfg.data == 'shapes' else cfg.data}"}[cfg.model.semantics]
    about = {"samples": o.weights or (Path(o.out) / o.file).as_posix(), "weights_sha256": header["sha256"],
             "train_step": int(header["step"]), "ema": float(header["ema"]) if "ema" in header else None,
             "sampler": o.sampler, "steps": o.steps, "spacing": o.spacing or sample.SPACING[o.sampler], "eta": o.eta,
             "lambda": o.lam, "beta": o.beta, "interval": o.interval, "seed": o.seed,
             "size": o.size, "crop": o.crop, "flip": o.flip, "dtype": str(net.dtype)[6:],
             "resolution": [decoder[1] * s for s in sample.side(o, cfg)],
             "asked": o.prompt or o.prompts or o.label or asked, "prompts_sha256": wishes.prompts_sha256}
    return (export(o, pictures, about, place) if o.arr0 else pictures), about


def export(o: Options, drawn: Drawn, about: dict, place: machine.Place) -> Stack:
    """Draw into the .npz o.arr0, going on after a stop as sample.py does, and read the pictures from there."""
    path = Path(o.arr0)
    if path.suffix != ".npz" or not path.parent.is_dir():
        raise UserError(f"arr0={o.arr0!r} wants a name that ends in .npz, in a folder that is there")
    key = hashlib.sha256(json.dumps(about | {"n": o.n, "batch": o.batch}).encode()).hexdigest()[:8]
    part = path.with_name(f"{path.stem}-{key}.part")        # unfinished pictures of exactly these options
    run = sample.Run(o, drawn.net, drawn.cfg, {}, drawn.wishes, drawn.decoder, place.device)
    images = sample.draw_all(run, place, part)
    if place.rank == 0:
        sample.write_npz(path, images)
    del images
    machine.agree(0, place)                                 # the file is there, and nobody needs the part any more
    if place.rank == 0:
        sample.discard(part)
    return Stack(path)


class Monitor:
    """FID and its kin during training: a line in log.jsonl for each call, of the same pictures each time.

    Made before the first step, so that missing weights or references stop the run there. about: the header of
    weights.safetensors, with classes and controls. All processes make it and call it. Pictures of which no metric can
    be taken are a line that says so: training goes on."""
    def __init__(self, o: Options, cfg: Config, about: dict[str, str], place: machine.Place) -> None:
        self.o, self.cfg, self.place = sample.check(o, cfg), cfg, place
        self.extract = Extractor(o.inception, o.resize, place)
        self.reference = find_reference(o.ref, o.metrics, self.extract)
        wanted(o.metrics, o.n, self.reference)
        self.wishes = sample.Wishes(o, cfg, about)
        self.decoder = decoder_of(about, o.autoencoder, cfg.model.channels, place.device)

    def __call__(self, net: nn.Module, step: int) -> dict[str, dict]:
        """The values of `net` at `step`, on rank 0; {} elsewhere."""
        began = time.monotonic()
        pictures, lost = Watched(self.o, net, self.cfg, self.wishes, self.decoder, self.place.device), {}
        try:
            values = evaluate(pictures, self.o.n, self.o.batch, self.extract, self.reference, self.o.metrics,
                              self.place)
        except Failed as e:
            values, lost = {}, {"evaluation_failed": str(e)}
            if self.place.rank == 0:
                checkpoint.say(f"warning: no metric at step {step:,}: {e}. Training goes on.")
        if self.place.rank == 0:
            line = {"step": step, **{name: v["value"] for name, v in values.items()}, **lost,
                    "evaluation_s": time.monotonic() - began}
            with checkpoint.tolerate("a line of log.jsonl"):
                log.append(Path(self.o.out), line)
        return values


# ---------------------------------------------------------------- the command line

def check_use(o: Options) -> None:
    """UserError for options of which these pictures would make no use."""
    for key in ("arr0", "file", "weights"):
        if o.images and getattr(o, key) != getattr(Options, key):
            raise UserError(f"--{key}={getattr(o, key)} is of pictures that are drawn, and --images={o.images} are "
                            f"there; give one of them")
    if o.square and not o.images:
        raise UserError(f"--square={o.square} is of --images; pictures of a run have the size they are drawn in")


def main_fid(argv: list[str]) -> None:
    """fid, kid, is: of a folder, an npz or a run."""
    o = parse(argv, Options())
    check_use(o)
    place = machine.setup(o.threads)
    extract = Extractor(o.inception, o.resize, place)
    reference = find_reference(o.ref, o.metrics, extract)
    if o.images:
        pictures, n = first_pictures(o.images, o.n, o.square)
        about = {"samples": o.images}
        if pictures.jpegs and place.rank == 0:
            checkpoint.say(f"warning: {pictures.jpegs} of the samples are JPEG files, which changes FID; draw PNG or "
                           f"npz.")
    else:
        o = dataclasses.replace(o, n=o.n or 50_000)
        n = o.n
        wanted(o.metrics, n, reference)                     # before anything is drawn
        pictures, about = run_pictures(o, place)

    began = time.monotonic()
    values = evaluate(pictures, n, o.batch, extract, reference, o.metrics, place)
    seconds = time.monotonic() - began
    if place.rank > 0:
        return
    for name, v in values.items():
        print(f"{name}  {v['value']:.6g}" + (f" +- {v['se']:.2g}" if v["se"] is not None else ""))
    against = {"reference": reference.path, "reference_sha256": reference.sha256, "reference_n": reference.n or None,
               "reference_data": reference.data, "reference_labelled": reference.labelled} if reference else {}
    print(json.dumps({"metrics": values, "n": n, **against, "features": extract.name,
                      "features_sha256": extract.sha256, "resize": o.resize, **about,
                      "precision": "float32", "torch": torch.__version__,
                      "processes": place.world, "seconds": round(seconds, 2), "images_per_second": n / seconds}))


@dataclass(frozen=True)
class RefOptions:
    """Which pictures are the real ones, and where their statistics go."""
    images: str = ""                # folder, .npz (arr_0) or .npy of uint8 pictures
    to: str = ""                    # the .npz to write
    square: int = 0                 # cut to centred squares of so many pixels, as the samples have; 0 = as they are
    n: int = 0                      # the first n pictures; 0 = all
    kid: bool = False               # keep the features too, 8 kB a picture, for --metrics=kid
    resize: str = "tf1"             # as in `fid.py fid`; the two must be the same
    inception: str = ""             # weights file; empty = $INCEPTION_WEIGHTS, the cache, or the network
    batch: int = 64                 # pictures at a time
    threads: int = 0                # CPU threads; 0 = all


def main_ref(argv: list[str]) -> None:
    """ref: statistics of real pictures."""
    o = parse(argv, RefOptions())
    place, path = machine.setup(o.threads), Path(o.to)
    if not o.images or path.suffix != ".npz" or not path.parent.is_dir():
        raise UserError(f"ref wants --images=FOLDER and --to=FILE.npz in a folder that is there, got {o.images!r} "
                        f"and {o.to!r}")
    pictures, n = first_pictures(o.images, o.n, o.square)
    extract = Extractor(o.inception, o.resize, place)
    got = collect(pictures, n, o.batch, extract, {"kid"} if o.kid else set(), place)
    if place.rank == 0:
        write_reference(path, got.stats, extract, o.images, got.rows)
        print(json.dumps({"to": o.to, "n": n, "data": o.images, "square": o.square, "features": extract.name,
                          "features_sha256": extract.sha256, "resize": o.resize}))


def main_check(argv: list[str]) -> None:
    """check: golden and analytic tests, without weights."""
    machine.setup(parse(argv, Check()).threads)
    failed = 0
    for name, error, limit in checks():
        failed += not error <= limit
        print(f"{'ok  ' if error <= limit else 'FAIL'} {name}: off by {error:.1e}, at most {limit:.0e}")
    if failed:
        raise UserError(f"{failed} checks failed; numbers of this machine are not to be trusted")


def main_speed(argv: list[str]) -> None:
    """speed: of the distance against scipy's sqrtm, and of the features."""
    o = parse(argv, Speed())
    machine.setup(o.threads)
    print(json.dumps(speeds(o)))


def main_clip(argv: list[str]) -> None:
    """clip: CLIPScore of pictures and their captions."""
    perceptual.main(["--metric=clip", *argv])


def main_lpips(argv: list[str]) -> None:
    """lpips: how far pictures of a run differ when only the requested size does."""
    perceptual.main(["--metric=lpips", *argv])


def main_toy(argv: list[str]) -> None:
    """toy: of pictures of shapes, toy_fd and accuracy by attribute, or the leak of size."""
    judge.main(argv)


# A command is a function of the words after it.
COMMANDS = {"fid": main_fid, "ref": main_ref, "check": main_check, "speed": main_speed, "clip": main_clip,
            "lpips": main_lpips, "toy": main_toy}


def main(argv: list[str]) -> None:
    if not argv or argv[0] not in COMMANDS:
        told = "\n".join(f"  {f.__doc__.splitlines()[0]}" for f in COMMANDS.values())
        if argv[:1] in (["--help"], ["-h"]):
            print(f"fid.py COMMAND --key=value ...; fid.py COMMAND --help lists the keys\n{told}")
            return
        raise UserError(f"fid.py wants a command first, got {' '.join(argv[:1])!r}; there are {', '.join(COMMANDS)}")
    COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        machine.leave()
    except UserError as e:
        checkpoint.say(f"error: {e}.")
        sys.exit(2)
