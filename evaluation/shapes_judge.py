"""A small classifier of shapes: its features give toy_fd, and its descriptions measure how far the size leaks.

python -m evaluation.shapes_judge --write=weights/judge.safetensors         trains the shipped file, two minutes
python -m evaluation.shapes_judge --images=out/demo/samples/NAME.npz      toy_fd and accuracy of images
python -m evaluation.shapes_judge --leak=out/shapes32 --n=100          how far the requested size leaks into the content

Values of toy_fd and toy_leak compare within one judge only, so each carries its hash.
Dimensions: B images, R side of an image, F features, S side of their map, K objects: one place for every colour; for
the leak P prompts of K images.
"""
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import model
import sample
from config import Config, UserError, parse, run
from evaluation.shapes_score import score
from fid import FeatureStats, MeanWithError, frechet_distance, mean_over, mean_pair_distance, size_groups
from rng import seed64
from runtime import checkpoint, distributed
from runtime.plot import from_uint8, to_uint8
from sources.folders import open_images
from sources.shapes import NATIVE, VERSION, Shapes, canvas_side, render
from sources.shapes_grammar import BACKGROUNDS, COLORS, SHAPES

JUDGE = Path(__file__).parents[1] / "weights" / "judge.safetensors"    # the shipped one
SIDE = 32                               # pixels a side that the judge sees
UNIT = 0.1                              # x, y and r are compared in tenths of the image's side
BATCH = 250                             # images in one pass
REFERENCE = 10_000                      # renders that toy_fd compares with, from a split that the judge never saw
FAR = 2 ** 24                           # renders from this index on have captions that no image was generated for


class Prediction(NamedTuple):
    """What the classifier sees, for each colour: logits, except x, y and r in fractions of the image's side."""
    there: Tensor                       # (B, K) whether an object has this colour
    shape: Tensor                       # (B, K, shapes) its shape
    x: Tensor                           # (B, K) its centre, from the left
    y: Tensor                           # (B, K) and from the top
    r: Tensor                           # (B, K) half its width
    background: Tensor                  # (B, backgrounds)
    native: Tensor                      # (B, sizes) its native size, so that features know sharpness


class ShapesClassifier(nn.Module):
    """The judge: four convolutions to a map of F features; for each colour a map of its place pools those features.

    Images (B, 3, R, R) in [-1, 1], of any R, are averaged down to SIDE pixels first."""
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = ((3, width // 2, 5, 2), (width // 2, width, 3, 2), (width, 2 * width, 3, 1), (2 * width, width, 3, 1))
        self.trunk = nn.Sequential(*(layer for a, b, k, stride in sizes for layer in (
            nn.Conv2d(a, b, k, stride, k // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())))
        self.where = nn.Conv2d(width, len(COLORS), 1)
        self.shape, self.r = nn.Linear(width, len(SHAPES)), nn.Linear(width, 1)
        self.background, self.native = nn.Linear(width, len(BACKGROUNDS)), nn.Linear(width, len(NATIVE))
        self.width, self.sha256 = width, "untrained"

    def map(self, images: Tensor) -> Tensor:
        """Return the features at every place. (B, 3, R, R) -> (B, F, S, S)"""
        return self.trunk(F.interpolate(images, (SIDE, SIDE), mode="area") if images.shape[-1] != SIDE else images)

    def forward(self, images: Tensor) -> Prediction:
        f = self.map(images)
        logits = self.where(f).flatten(2)                                       # (B, K, S S)
        at = logits.softmax(2)
        pooled = at @ f.flatten(2).transpose(1, 2)                              # (B, K, F)
        rows, S = at.unflatten(2, f.shape[2:]), f.shape[-1]
        place, mean = (torch.arange(S, device=f.device) + 0.5) / S, f.mean((2, 3))
        return Prediction(there=logits.logsumexp(2) - math.log(S * S), shape=self.shape(pooled),
                          x=rows.sum(2) @ place, y=rows.sum(3) @ place, r=self.r(pooled)[..., 0] * UNIT,
                          background=self.background(mean), native=self.native(mean))


@torch.inference_mode()
def read(judge: ShapesClassifier, images: Tensor) -> Prediction:
    """Read images (B, 3, R, R) in [-1, 1], BATCH at a time."""
    parts = [judge(part) for part in images.split(BATCH)]
    return Prediction(*(torch.cat(column) for column in zip(*parts)))


def largest(seen: Prediction) -> Tensor:
    """Return the shape (B,) of the largest object that the judge sees: the class of an image of this data set."""
    r = seen.r.masked_fill(seen.there <= 0, -1)                                 # (B, K)
    return seen.shape[torch.arange(len(r)), r.argmax(1)].argmax(1)


# ---------------------------------------------------------------- training

def targets(scene: dict[str, Tensor]) -> tuple[Prediction, Tensor]:
    """Return the right Prediction, with class numbers for logits, and (B, K) whether each object counts.

    An object whose centre is cropped away while its rim is not does not count: nobody could tell whether it exists."""
    has = scene["shape"] >= 0                                                   # (B, 3)
    row, color = has.nonzero()[:, 0], scene["color"][has]

    def placed(values: Tensor) -> Tensor:
        out = torch.zeros(len(has), len(COLORS), dtype=values.dtype)
        out[row, color] = values[has]
        return out

    x, y, r = (placed(scene[name].float()) for name in "xyr")                   # (B, K)
    inside = (x > 0) & (x < 1) & (y > 0) & (y < 1) & placed(has)
    gone = (x + r < 0) | (x - r > 1) | (y + r < 0) | (y - r > 1) | ~placed(has)
    true = Prediction(inside, placed(scene["shape"]), x, y, r, scene["background"], scene["native"])
    return true, inside | gone


def loss(seen: Prediction, scene: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of presence, shape, background and native size, plus the squared error of x, y and r in UNITs."""
    true, counts = targets(scene)
    there = F.binary_cross_entropy_with_logits(seen.there[counts], true.there[counts].float())
    k = true.there
    pairs = ((seen.x, true.x), (seen.y, true.y), (seen.r, true.r))
    places = sum(((a[k] - b[k]) / UNIT).square().mean() for a, b in pairs)
    return (4 * there + F.cross_entropy(seen.shape[k], true.shape[k]) + places
            + F.cross_entropy(seen.background, true.background) + F.cross_entropy(seen.native, true.native))


def train(seed: int, steps: int, batch: int = 128, peak: float = 4e-3) -> ShapesClassifier:
    """Train a judge on renders of the split train, each once: up to three objects, cropped, mirrored, all sizes."""
    torch.manual_seed(seed64(seed, "judge"))
    net, source = ShapesClassifier(), Shapes(SIDE, seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    for step in tqdm(range(steps), desc="training the judge", unit="step", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        records = source.records(range(step * batch, (step + 1) * batch))
        value = loss(net(records["image"]), records["scene"])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def load(path: Path = JUDGE) -> ShapesClassifier:
    """Load a judge that `make` wrote; its sha256 is that of its weights. UserError for any other file."""
    tensors, header = checkpoint.read_weights(path)
    cfg = json.loads(header["config"])
    if header.get("judge") != "shapes" or cfg["data"] != VERSION:
        raise UserError(f"{path} is no judge of {VERSION!r}; make one with --write={path}")
    net = ShapesClassifier(cfg["width"])
    checkpoint.load_strictly(net, tensors, str(path))
    net.sha256 = header["sha256"]
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------- toy_fd and toy_leak

def to_bytes(images: Tensor | np.ndarray) -> Tensor:
    """Round images in [-1, 1] to uint8, as files hold them."""
    return torch.from_numpy(to_uint8(torch.as_tensor(images))).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def add_features(stats: FeatureStats, judge: ShapesClassifier, images: Tensor) -> None:
    """Add the mean features of images (B, 3, R, R) in [-1, 1], rounded to 8 bits like those of a file."""
    for part in to_bytes(images).split(BATCH):
        stats.update(judge.map(part.float() / 127.5 - 1).mean((2, 3)))


def render_stats(judge: ShapesClassifier, source: Shapes, indices: Iterable[int]) -> FeatureStats:
    """Return the statistics of the renders `indices` of a data set."""
    stats = FeatureStats(judge.width)
    for part in torch.tensor(list(indices)).split(BATCH):
        add_features(stats, judge, source.records(part.tolist())["image"])
    return stats


def toy_fd(judge: ShapesClassifier, images: Tensor, reference: FeatureStats) -> float:
    """Fréchet distance between images (n, 3, R, R) in [-1, 1] and renders, in the features of this judge. No FID.

    reference: render_stats of the same judge, on a split that it did not train on. The bias falls as 1/n."""
    stats = FeatureStats(judge.width)
    add_features(stats, judge, images)
    return frechet_distance(stats.mean, stats.cov, reference.mean, reference.cov)


def descriptor(seen: Prediction) -> Tensor:
    """Describe an image by numbers that ignore sharpness: (B, K (shapes + 2)).

    For each colour these are the probabilities of every shape, and the centre in fractions of the image's side, all
    times the probability of an object. A lost object is a squared distance of 1 + x^2 + y^2; another shape is 2."""
    there = seen.there.sigmoid()[..., None]                                     # (B, K, 1)
    return (there * torch.cat([seen.shape.softmax(2), seen.x[..., None], seen.y[..., None]], 2)).flatten(1)


def toy_leak(judge: ShapesClassifier, groups: Iterable[Tensor], dist: distributed.Dist) -> MeanWithError:
    """[COND] sec. 3.1 in miniature: mean squared distance in content of images that differ in requested size alone.

    The mean runs over all pairs of a prompt's K images, then over prompts, as LPIPS diversity does. groups: this
    process's prompts, uint8 (P, K, 3, R, R) at a time. Low is good; even renders are not at 0."""
    values = []
    for images in groups:
        seen = descriptor(read(judge, from_uint8(images.flatten(0, 1))))
        values += mean_pair_distance([seen.unflatten(0, images.shape[:2])]).tolist()
    return mean_over(values, dist)


def resized(source: Shapes, indices: Sequence[int]) -> Tensor:
    """Render the same scenes at every native size: the leak of a model that leaks nothing. uint8 (P, K, 3, R, R)"""
    scene, zero, R = source.random_scenes(np.asarray(indices))[1], np.zeros(len(indices), int), source.resolution
    return torch.stack([to_bytes(render(scene | {"native": zero + k}, zero + canvas_side(R), zero, zero, zero > 0, R))
                        for k in range(len(NATIVE))], 1)


# ---------------------------------------------------------------- the command

@dataclass(frozen=True)
class Options(sample.Options):
    """What to do: --write, --images or --leak; the sampling options are for --leak."""
    write: str = ""                 # train a judge and write it to this .safetensors
    images: str = ""                # measure this .npz, which sample.py wrote for a model of shapes
    leak: str = ""                  # run folder: measure how far the requested size leaks into the content
    judge: str = ""                 # judge to use; empty = the shipped one
    n: int = 100                    # leak: number of prompts
    train_steps: int = 800          # write: training steps


def make(o: Options) -> dict:
    """Train and write a judge; return the last line, with its accuracy on the class of unseen renders."""
    net, training = train(o.seed, o.train_steps), {"seed": o.seed, "steps": o.train_steps}
    header = {"config": json.dumps({"width": net.width, "data": VERSION, **training}), "judge": "shapes"}
    checkpoint.write_weights(Path(o.write), net.state_dict(), header)
    batch = Shapes(SIDE, split="test", crop=False).records(range(500))
    right = largest(read(net, batch["image"])) == batch["label"]
    return {"judge": load(Path(o.write)).sha256, **training, "by_class": fraction_with_error(right.float())}


def open_shapes(cfg: Config) -> Shapes:
    """The test split of a run's data. UserError for a run on other data than shapes."""
    if cfg.data != "shapes":
        raise UserError(f"the judge knows shapes alone; {cfg.out} was trained on data={cfg.data!r}")
    return data.open_source(cfg, "test")


def measure(o: Options, judge: ShapesClassifier) -> dict:
    """Measure toy_fd and accuracy of the images of an npz, beside as many renders; return the last line."""
    file = Path(o.images)
    cfg, captions = model.load(file.parent.parent)[1], sample.read_prompts(str(file.with_suffix(".txt")))
    source, pixels = open_shapes(cfg), open_images(o.images)
    n = len(pixels)
    images, real = from_uint8(pixels(np.arange(n))), source.records(range(2 * FAR, 2 * FAR + n))["image"]
    reference = render_stats(judge, source, range(FAR, FAR + REFERENCE))
    line = {"metric": f"toy_fd{n}/judge-{judge.sha256[:8]}", "value": toy_fd(judge, images, reference),
            "renders": toy_fd(judge, real, reference), "n": n, "reference_n": REFERENCE, "judge": judge.sha256,
            "images": o.images}
    if cfg.model.semantics == "text":
        line["by_pixels"] = {key: fraction_with_error(v) for key, v in score(images, captions).items()}
    elif cfg.model.semantics == "class":
        right = [SHAPES[k] == name for k, name in zip(largest(read(judge, images)), captions)]
        line["by_class"] = fraction_with_error(torch.tensor(right).float())
    return line


def fraction_with_error(right: Tensor) -> list[float | None]:
    """Return the fraction of 1s among 1, 0 and NaN, its standard error, and how many are not NaN."""
    right = right[~right.isnan()]
    n, p = len(right), right.mean().item()
    return [round(p, 4), round(math.sqrt(p * (1 - p) / n), 4), n] if n else [None, None, 0]


def leak(o: Options, judge: ShapesClassifier, dist: distributed.Dist) -> dict:
    """Measure toy_leak of a run, beside that of renders, which leak nothing; return the last line."""
    run = sample.load_run(replace(o, out=o.leak), dist.device)
    result = toy_leak(judge, size_groups(run, NATIVE, dist), dist)
    mine = np.arange(dist.rank, o.n, dist.world)
    floor = toy_leak(judge, [resized(open_shapes(run.cfg), mine)] if len(mine) else [], dist)
    return {**asdict(run.options), "metric": f"toy_leak/judge-{judge.sha256[:8]}", **result._asdict(),
            "renders": floor.value, "sizes": NATIVE, "judge": judge.sha256, "weights_sha256": run.header["sha256"]}


def main(argv: list[str]) -> None:
    o = parse(argv, Options())
    if sum(map(bool, (o.write, o.images, o.leak))) != 1:
        raise UserError("give one of --write=FILE, --images=FILE.npz and --leak=RUN; --help explains them")
    dist = distributed.setup(o.threads)
    if o.write:
        line = make(o)
    else:
        judge = load(Path(o.judge or JUDGE))
        line = measure(o, judge) if o.images else leak(o, judge, dist)
    if dist.rank == 0:
        print(json.dumps({**line, "torch": torch.__version__}))


if __name__ == "__main__":
    run(main, cleanup=distributed.cleanup)
