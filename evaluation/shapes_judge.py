"""A small classifier of shapes: its features give toy_fd, and its descriptions measure how far the size leaks.

python -m evaluation.shapes_judge --write=weights/judge.safetensors         trains the shipped file, two minutes
python -m evaluation.shapes_judge --images=out/demo/samples/NAME.npz      toy_fd and accuracy of images
python -m evaluation.shapes_judge --leak=out/shapes32 --n=100          how far the requested size leaks into the content

toy_fd is the Fréchet distance between the judge's features of two sets of images. It is no FID: the features know this
data set's shapes alone, and values compare within one judge only, so its hash goes along.
Dimensions: B images, R side of an image, F features, S side of their map, K objects: one place for every colour; for
the leak P prompts of K images.
"""
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import model
from config import Config, UserError, parse, run
from evaluation.shapes_score import score
from fid import FeatureStats, MeanWithError, frechet_distance, mean_over, mean_pair_distance, size_groups
from rng import seed64
from runtime import checkpoint, distributed
from sample import Options as Drawing, SampleConditions, check, read_prompts
from sources.folders import open_images
from sources.shapes import NATIVE, VERSION, Shapes, canvas_side, render
from sources.shapes_grammar import BACKGROUNDS, COLORS, SHAPES

JUDGE = Path(__file__).parents[1] / "weights" / "judge.safetensors"    # the shipped one
SIDE = 32                               # pixels a side that the judge sees
UNIT = 0.1                              # x, y and r are compared in tenths of the image's side
BATCH = 250                             # images in one pass
REFERENCE = 10_000                      # renders that toy_fd compares with, from a split that the judge never saw
FAR = 2 ** 24                           # renders from this index on have captions that no model was asked for


class Prediction(NamedTuple):
    """What the judge sees, for each colour: logits, except x, y and r in fractions of the image's side."""
    there: Tensor                       # (B, K) whether an object has this colour
    shape: Tensor                       # (B, K, shapes) its shape
    x: Tensor                           # (B, K) its centre, from the left
    y: Tensor                           # (B, K) and from the top
    r: Tensor                           # (B, K) half its width
    background: Tensor                  # (B, backgrounds)
    native: Tensor                      # (B, sizes) its native size, so that features know sharpness


class ShapesClassifier(nn.Module):
    """Four convolutions to a map of F features; for each colour a map of its place, which pools those features.

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

    def read_map(self, f: Tensor) -> Prediction:
        """Read the features (B, F, S, S)."""
        logits = self.where(f).flatten(2)                                       # (B, K, S S)
        at = logits.softmax(2)
        pooled = at @ f.flatten(2).transpose(1, 2)                              # (B, K, F)
        rows, S = at.unflatten(2, f.shape[2:]), f.shape[-1]
        dist, mean = (torch.arange(S, device=f.device) + 0.5) / S, f.mean((2, 3))
        return Prediction(there=logits.logsumexp(2) - math.log(S * S), shape=self.shape(pooled),
                       x=rows.sum(2) @ dist, y=rows.sum(3) @ dist, r=self.r(pooled)[..., 0] * UNIT,
                       background=self.background(mean), native=self.native(mean))

    def forward(self, images: Tensor) -> Prediction:
        return self.read_map(self.map(images))


class JudgeFeatures:
    """The judge as an extractor for fid.collect: `name`, `sha256` and `resize` go with every number.

    Features are the map's means; logits are those of the largest object's shape."""
    resize, classes = "area", len(SHAPES)

    def __init__(self, judge: ShapesClassifier) -> None:
        self.judge, self.name, self.sha256, self.dim = judge, f"judge-{judge.sha256[:8]}", judge.sha256, judge.width

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, F) and logits (B, shapes) of images (B, 3, R, R) uint8."""
        f = self.judge.map(images.float() / 127.5 - 1)
        return f.mean((2, 3)), largest_logits(self.judge.read_map(f))


@torch.inference_mode()
def read(judge: ShapesClassifier, images: Tensor) -> Prediction:
    """Read images (B, 3, R, R) in [-1, 1], BATCH at a time."""
    parts = [judge(part) for part in images.split(BATCH)]
    return Prediction(*(torch.cat(column) for column in zip(*parts)))


def largest_logits(seen: Prediction) -> Tensor:
    """Return the shape logits (B, shapes) of the largest object that the judge sees."""
    r = seen.r.masked_fill(seen.there <= 0, -1)                                 # (B, K)
    return seen.shape[torch.arange(len(r)), r.argmax(1)]


def largest(seen: Prediction) -> Tensor:
    """Return the shape (B,) of the largest object that the judge sees: the class of an image of this data set."""
    return largest_logits(seen).argmax(1)


# ---------------------------------------------------------------- training

def targets(scene: dict[str, Tensor]) -> tuple[Prediction, Tensor]:
    """Return what a Reading should be, as class numbers, and (B, K) whether each object counts.

    An object whose centre is cropped away while its rim is not does not count: nobody could tell whether it exists."""
    B, rows = len(scene["n"]), torch.arange(len(scene["n"]))[:, None].expand(-1, 3)
    has = scene["shape"] >= 0                                                   # (B, 3)
    color, row = scene["color"][has], rows[has]

    def placed(values: Tensor) -> Tensor:
        out = torch.zeros(B, len(COLORS), dtype=values.dtype)
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
    bar = tqdm(range(steps), desc="training the judge", unit="step", disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        records = source.records(range(step * batch, (step + 1) * batch))
        value = loss(net(records["image"]), records["scene"])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}")
    return net.eval().requires_grad_(False)


def write(net: ShapesClassifier, path: Path, about: dict) -> None:
    """Write the judge as safetensors, with `about`, its training, in the header."""
    header = {"config": json.dumps({"width": net.width, "data": VERSION, **about}), "judge": "shapes"}
    checkpoint.write_weights(path, net.state_dict(), header)


def load(path: Path = JUDGE) -> ShapesClassifier:
    """Load a judge that `write` wrote; its sha256 is that of its weights. UserError for any other file."""
    if not path.is_file():
        raise UserError(f"no judge at {path}; make one with: python -m evaluation.shapes_judge --write={path}")
    tensors, header = checkpoint.read_weights(path)
    about = json.loads(header["config"])
    if header.get("judge") != "shapes" or about["data"] != VERSION:
        raise UserError(f"{path} is no classifier of {VERSION!r}; make one with: python -m evaluation.shapes_judge "
                        f"--write={path}")
    net = ShapesClassifier(about["width"])
    checkpoint.load_strictly(net, tensors, str(path))
    net.sha256 = header["sha256"]
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------- toy_fd

def to_bytes(images: Tensor | np.ndarray) -> Tensor:
    """Round images in [-1, 1] to uint8, as files hold them."""
    return ((torch.as_tensor(images) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def add_features(stats: FeatureStats, judge: ShapesClassifier, images: Tensor) -> None:
    """Add images (B, 3, R, R) in [-1, 1] to the statistics, rounded to 8 bits like those of a file."""
    for part in to_bytes(images).split(BATCH):
        stats.update(JudgeFeatures(judge)(part)[0])


def render_stats(judge: ShapesClassifier, source: Shapes, indices: Iterable[int]) -> FeatureStats:
    """Return the statistics of the renders `indices` of a data set."""
    stats, indices = FeatureStats(judge.width), list(indices)
    for k in range(0, len(indices), BATCH):
        add_features(stats, judge, source.records(indices[k:k + BATCH])["image"])
    return stats


def toy_fd(judge: ShapesClassifier, images: Tensor, reference: FeatureStats) -> float:
    """Fréchet distance between images (n, 3, R, R) in [-1, 1] and renders, in the features of this judge. No FID.

    reference: render_stats of the same judge, on a split that it did not train on. The bias falls as 1/n."""
    stats = FeatureStats(judge.width)
    add_features(stats, judge, images)
    return frechet_distance(stats.mean, stats.cov, reference.mean, reference.cov)


# ---------------------------------------------------------------- the leak

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
        seen = descriptor(read(judge, images.flatten(0, 1).float() / 127.5 - 1))
        values += mean_pair_distance([seen.unflatten(0, images.shape[:2])]).tolist()
    return mean_over(values, dist)


def resized(source: Shapes, indices: Sequence[int]) -> Tensor:
    """Render the same scenes at every native size: the leak of a model that leaks nothing. uint8 (P, K, 3, R, R)"""
    scene, zero, R = source.random_scenes(np.asarray(indices))[1], np.zeros(len(indices), int), source.resolution
    return torch.stack([to_bytes(render(scene | {"native": zero + k}, zero + canvas_side(R), zero, zero, zero > 0, R))
                        for k in range(len(NATIVE))], 1)


# ---------------------------------------------------------------- the command

@dataclass(frozen=True)
class Options:
    """What to do: --write, --images or --leak, and its settings."""
    write: str = ""                 # train a judge and write it to this .safetensors
    images: str = ""                # measure this .npz, which sample.py wrote for a model of shapes
    leak: str = ""                  # run folder: measure how far the requested size leaks into the content
    judge: str = ""                 # judge to use; empty = the shipped one
    n: int = 100                    # leak: number of prompts
    steps: int = 800                # write: training steps
    seed: int = 0                   # write: seed of weights and data; leak: seed of the noise
    threads: int = 0                # CPU threads; 0 = all


def make(o: Options) -> dict:
    """Train and write a judge; return the last line, with its accuracy on the class of unseen renders."""
    net = train(o.seed, o.steps)
    write(net, Path(o.write), {"seed": o.seed, "steps": o.steps})
    batch = Shapes(SIDE, split="test", crop=False).records(range(500))
    right = largest(read(net, batch["image"])) == batch["label"]
    return {"judge": load(Path(o.write)).sha256, "seed": o.seed, "steps": o.steps,
            "by_class": fraction_with_error(right.float())}


def open_run(folder: Path) -> tuple[Config, Shapes]:
    """Return the config of a run and its test split. UserError for a run on other data than shapes."""
    cfg = model.load(folder)[1]
    if cfg.data != "shapes":
        raise UserError(f"the judge knows shapes alone; {folder} was trained on data={cfg.data!r}")
    return cfg, data.open_source(cfg, "test")


def measure(o: Options, judge: ShapesClassifier) -> dict:
    """Measure toy_fd and accuracy of the images of an npz, beside as many renders; return the last line."""
    file = Path(o.images)
    beside = file.with_suffix(".json")
    if not beside.is_file():
        raise UserError(f"{beside} is missing: the judge reads images that sample.py wrote into a run folder")
    used = json.loads(beside.read_text(encoding="utf-8"))
    cfg, source = open_run(file.parent.parent)
    pictures = open_images(o.images)
    index = np.arange(len(pictures))
    images = pictures(index).float() / 127.5 - 1
    reference = render_stats(judge, source, range(FAR, FAR + REFERENCE))
    real = source.records(range(2 * FAR, 2 * FAR + len(index)))
    line = {"metric": f"toy_fd{len(index)}/{JudgeFeatures(judge).name}", "value": toy_fd(judge, images, reference),
            "renders": toy_fd(judge, real["image"], reference), "n": len(index), "reference_n": REFERENCE,
            "judge": judge.sha256, "images": o.images,
            "weights_sha256": used.get("weights_sha256", used.get("weights"))}

    titles = asked_for(file, used, cfg, index)
    if cfg.model.semantics == "text":
        line["by_pixels"] = {key: fraction_with_error(v) for key, v in score(images, titles).items()}
    elif cfg.model.semantics == "class":
        right = [SHAPES[k] == title for k, title in zip(largest(read(judge, images)), titles)]
        line["by_class"] = fraction_with_error(torch.tensor(right).float())
    return line


def asked_for(file: Path, used: dict, cfg: Config, index: np.ndarray) -> list[str]:
    """Return the prompt or class of each image of `file`: the lines beside it, or else what its options give.

    used: those options, of any version; one that is missing did not exist then and takes today's default."""
    if file.with_suffix(".txt").is_file():
        return read_prompts(str(file.with_suffix(".txt")))
    known = {f.name: used[f.name] for f in dataclasses.fields(Drawing) if f.name in used}
    folder = file.parent.parent
    header = checkpoint.read_header(folder / "weights.safetensors")
    return SampleConditions(Drawing(**known | {"out": str(folder)}), cfg, header).titles(index)


def fraction_with_error(said: Tensor) -> list[float | None]:
    """Return the fraction of 1s among 1, 0 and NaN, its standard error, and how many are not NaN."""
    stated = said[~said.isnan()]
    if not len(stated):
        return [None, None, 0]
    p = stated.mean().item()
    return [round(p, 4), round(math.sqrt(p * (1 - p) / len(stated)), 4), len(stated)]


def leak(o: Options, judge: ShapesClassifier, dist: distributed.Dist) -> dict:
    """Measure toy_leak of a run, beside that of renders, which leak nothing; return the last line."""
    cfg, source = open_run(Path(o.leak))
    drawing = check(Drawing(out=o.leak, n=o.n, seed=o.seed), cfg)
    result = toy_leak(judge, size_groups(drawing, NATIVE, dist), dist)
    mine = np.arange(dist.rank, o.n, dist.world)
    floor = toy_leak(judge, [resized(source, mine)] if len(mine) else [], dist)
    return {"metric": f"toy_leak/{JudgeFeatures(judge).name}", **dataclasses.asdict(result), "renders": floor.value,
            "sizes": NATIVE, "judge": judge.sha256, "run": o.leak, "seed": o.seed, "steps": drawing.steps,
            "guidance": drawing.guidance, "eta": drawing.eta}


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
