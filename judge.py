"""A judge of the captioned shapes: a small network that says what it sees, and whose features measure likeness.

python judge.py --write=docs/judge.safetensors      makes the file that is shipped, in under two minutes on two cores
python judge.py --images=out/demo/samples/NAME.npz  toy_fd and accuracy of what sample.py drew for a model of shapes
python judge.py --leak=out/shapes32 --n=100         how far the requested size leaks into what is shown

toy_fd is the Fréchet distance between the judge's features of two sets of pictures. It is no FID: the features know
this data set's shapes and nothing else, and the number compares with others of one judge only: its hash goes along.
Dimensions: B pictures, R side of a picture, F features, S side of their map, K objects: one place for every colour.
"""
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import data
import machine
import model
from captions import BACKGROUNDS, COLORS, RELATIONS, SHAPES, describe
from config import Config, UserError, parse
from distances import FeatureStats, frechet_distance
from fid_files import open_pictures
from perceptual import Mean, mean_over, mean_pair_distance, size_groups
from rng import seed64
from sample import settled
from scenes import LARGE, NATIVE, SMALL, canvas, render
from shapes import ANSWERS, VERSION, Shapes, score
from wishes import Options as Drawing
from wishes import Wishes, read_prompts

JUDGE = Path(__file__).parent / "docs" / "judge.safetensors"    # the one that is shipped
SIDE = 32                               # pixels a side that the judge sees
UNIT = 0.1                              # errors of x, y and r are counted in tenths of the picture's side
BATCH = 250                             # pictures a pass
REFERENCE = 10_000                      # renders that toy_fd compares with, of a split the judge was not trained on
FAR = 2 ** 24                           # from here on are renders whose captions no model was asked for


class Reading(NamedTuple):
    """What the judge sees, a place for each colour. Logits, except x, y and r in shares of the picture's side."""
    there: Tensor                       # (B, K) is there an object of this colour?
    shape: Tensor                       # (B, K, shapes) which one, if there is
    x: Tensor                           # (B, K) its centre, from the left
    y: Tensor                           # (B, K) and from the top
    r: Tensor                           # (B, K) half its width
    background: Tensor                  # (B, backgrounds)
    native: Tensor                      # (B, sizes) at which side it was drawn; asked so that features know sharpness


class Judge(nn.Module):
    """Four convolutions to a map of F features; for each colour a map of where it is, by which features are pooled.

    Pictures (B, 3, R, R) in [-1, 1], of any R, are averaged down to SIDE pixels first."""
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
        """Features at every place. (B, 3, R, R) -> (B, F, S, S)"""
        return self.trunk(F.interpolate(images, (SIDE, SIDE), mode="area") if images.shape[-1] != SIDE else images)

    def features(self, images: Tensor) -> Tensor:
        """Their means over the picture, which toy_fd compares. (B, 3, R, R) -> (B, F)"""
        return self.map(images).mean((2, 3))

    def forward(self, images: Tensor) -> Reading:
        f = self.map(images)                                                    # (B, F, S, S)
        logits = self.where(f).flatten(2)                                       # (B, K, S S)
        at = logits.softmax(2)
        pooled = at @ f.flatten(2).transpose(1, 2)                              # (B, K, F)
        rows, S = at.unflatten(2, f.shape[2:]), f.shape[-1]
        place, mean = (torch.arange(S, device=f.device) + 0.5) / S, f.mean((2, 3))
        return Reading(there=logits.logsumexp(2) - math.log(S * S), shape=self.shape(pooled),
                       x=rows.sum(2) @ place, y=rows.sum(3) @ place, r=self.r(pooled)[..., 0] * UNIT,
                       background=self.background(mean), native=self.native(mean))


# ---------------------------------------------------------------- training

def truth(scene: dict[str, Tensor]) -> tuple[Reading, Tensor]:
    """What a Reading should be, as class numbers, and (B, K) whether an object counts.

    An object whose centre is cut off and whose rim is not does not count: nobody could say whether it is there."""
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
    true = Reading(inside, placed(scene["shape"]), x, y, r, scene["background"], scene["native"])
    return true, inside | gone


def loss(seen: Reading, scene: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of what is there, of shape, background and native size; squared error of x, y and r in UNITs."""
    true, counts = truth(scene)
    there = F.binary_cross_entropy_with_logits(seen.there[counts], true.there[counts].float())
    k = true.there
    pairs = ((seen.x, true.x), (seen.y, true.y), (seen.r, true.r))
    places = sum(((a[k] - b[k]) / UNIT).square().mean() for a, b in pairs)
    return (4 * there + F.cross_entropy(seen.shape[k], true.shape[k]) + places
            + F.cross_entropy(seen.background, true.background) + F.cross_entropy(seen.native, true.native))


def train(seed: int, steps: int, batch: int = 128, peak: float = 4e-3) -> Judge:
    """A judge from renders of the split train, each seen once: up to three objects, cropped, mirrored, all sizes."""
    torch.manual_seed(seed64(seed, "judge"))
    net, source = Judge(), Shapes(SIDE, seed)
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


def write(net: Judge, path: Path, about: dict) -> None:
    """The judge as safetensors, with what it was trained on in the header."""
    header = {"config": json.dumps({"width": net.width, "data": VERSION, **about}), "judge": "shapes"}
    checkpoint.write_weights(path, net.state_dict(), header)


def load(path: Path = JUDGE) -> Judge:
    """The judge in a file that `write` wrote; sha256 is that of its weights. UserError for any other file."""
    if not path.is_file():
        raise UserError(f"no judge at {path}; make one with: python judge.py --write={path}")
    tensors, header = checkpoint.read_weights(path)
    about = json.loads(header["config"])
    if header.get("judge") != "shapes" or about["data"] != VERSION:
        raise UserError(f"{path} is no judge of {VERSION!r}; make one with: python judge.py --write={path}")
    net = Judge(about["width"])
    checkpoint.load_strictly(net, tensors, str(path))
    net.sha256 = header["sha256"]
    return net.eval().requires_grad_(False)


# ---------------------------------------------------------------- is it what the caption says?

@torch.inference_mode()
def read(judge: Judge, images: Tensor) -> Reading:
    """What the judge sees on pictures (B, 3, R, R) in [-1, 1], BATCH at a time."""
    parts = [judge(part) for part in images.split(BATCH)]
    return Reading(*(torch.cat(column) for column in zip(*parts)))


def answers(judge: Judge, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """The questions of shapes.score, answered by the judge rather than by pixels: (B,) 1 yes, 0 no, NaN not asked.

    Its count is the number of colours: unlike the pixels' it takes two objects of one colour for one. A picture on
    which pixels and judge disagree is worth a look: neither is made for blobs that are nearly a shape."""
    seen, names = read(judge, images), list(COLORS)
    out = {name: torch.full((len(images),), math.nan) for name in (*ANSWERS, "all")}
    there, shape, back = seen.there > 0, seen.shape.argmax(2), seen.background.argmax(1)
    large = seen.r > (SMALL + LARGE) / 2
    for b, text in enumerate(captions):
        facts = describe(text)
        k = [names.index(color) for color in facts.colors]                      # the place of each object
        said: dict[str, list[bool]] = {
            "color": [set(there[b].nonzero().flatten().tolist()) == set(k)], "count": [int(there[b].sum()) == len(k)],
            "background": [list(BACKGROUNDS)[back[b]] == facts.background] if facts.background else [],
            "shape": [], "size": [], "side": [], "level": []}
        found = [bool(there[b, c]) and k.count(c) == 1 for c in k]
        for j, c in enumerate(k):
            if found[j]:
                said["shape"].append(SHAPES[shape[b, c]] == facts.shapes[j])
                said["size"] += [bool(large[b, c]) == (facts.sizes[j] == "large")] if facts.sizes[j] else []
        for j, link in enumerate(facts.relations):
            if link and found[j] and found[j + 1]:
                axis = seen.x[b] if link in RELATIONS[:2] else seen.y[b]
                step = axis[k[j + 1]] - axis[k[j]]                              # to the right, or down
                right = step > 0 if link in ("left of", "above") else step < 0
                said["side" if link in RELATIONS[:2] else "level"].append(bool(right))
        for name, right in said.items():
            if right:
                out[name][b] = float(all(right))
        out["all"][b] = float(all(all(right) for right in said.values()))
    return out


def largest(seen: Reading) -> Tensor:
    """(B,) the shape of the largest object that the judge sees: the class of a picture of this data set."""
    r = seen.r.masked_fill(seen.there <= 0, -1)                                 # (B, K)
    return seen.shape.argmax(2)[torch.arange(len(r)), r.argmax(1)]


# ---------------------------------------------------------------- toy_fd

@torch.inference_mode()
def add_features(stats: FeatureStats, judge: Judge, images: Tensor) -> None:
    """Add pictures (B, 3, R, R) in [-1, 1] to the statistics, rounded to 8 bits as those of a file are."""
    for part in images.split(BATCH):
        stats.update(judge.features(((part + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1))


def render_stats(judge: Judge, source: Shapes, indices: Iterable[int]) -> FeatureStats:
    """Statistics of the renders `indices` of a data set."""
    stats, indices = FeatureStats(judge.width), list(indices)
    for k in range(0, len(indices), BATCH):
        add_features(stats, judge, source.records(indices[k:k + BATCH])["image"])
    return stats


def toy_fd(judge: Judge, images: Tensor, reference: FeatureStats) -> float:
    """Fréchet distance between pictures (n, 3, R, R) in [-1, 1] and renders, in the features of this judge. No FID.

    reference: render_stats of the same judge, on a split that it was not trained on. Its bias falls as 1/n."""
    stats = FeatureStats(judge.width)
    add_features(stats, judge, images)
    return frechet_distance(stats.mean, stats.cov, reference.mean, reference.cov)


# ---------------------------------------------------------------- does the size leak?

def content(seen: Reading) -> Tensor:
    """What a picture shows, as numbers in which sharpness has no place: (B, K (shapes + 2)).

    For each colour the chances of every shape, and the centre in shares of the picture's side, all times the chance
    that an object of it is there. One object gone is a squared distance of 1 + x^2 + y^2; another shape is 2."""
    there = seen.there.sigmoid()[..., None]                                     # (B, K, 1)
    return (there * torch.cat([seen.shape.softmax(2), seen.x[..., None], seen.y[..., None]], 2)).flatten(1)


def toy_leak(judge: Judge, groups: Iterable[Tensor], place: machine.Place) -> Mean:
    """[COND] sec. 3.1 in miniature: mean squared distance of the content of pictures that differ in requested size.

    All pairs of a prompt's K pictures, then over prompts: LPIPS diversity with what the judge sees for LPIPS.
    groups: this process's prompts, uint8 (P, K, 3, R, R) at a time. Low is good; renders themselves are not at 0."""
    values = []
    for images in groups:
        seen = content(read(judge, images.flatten(0, 1).float() / 127.5 - 1))
        values += mean_pair_distance([seen.unflatten(0, images.shape[:2])]).tolist()
    return mean_over(values, place)


def resized(source: Shapes, indices: Sequence[int]) -> Tensor:
    """The same scenes rendered at every native size: the leak of a model that leaks nothing. uint8 (P, K, 3, R, R)"""
    scene = source.drawn(np.asarray(indices))[1]
    P, R, kinds = len(indices), source.resolution, []
    zero = np.zeros(P, int)
    for k in range(len(NATIVE)):
        image = render(scene | {"native": zero + k}, zero + canvas(R), zero, zero, zero > 0, R)
        kinds.append(torch.from_numpy(((image + 1) * 127.5).round().astype(np.uint8)))
    return torch.stack(kinds, 1)


# ---------------------------------------------------------------- the command

@dataclass(frozen=True)
class Options:
    """Which of the three things to do, and with what."""
    write: str = ""                 # train a judge and write it to this .safetensors
    images: str = ""                # measure this .npz, which sample.py has drawn with a model of shapes
    leak: str = ""                  # run folder: measure how far the requested size leaks into what is shown
    judge: str = ""                 # the judge to ask; empty = the one that is shipped
    n: int = 100                    # leak: number of prompts
    steps: int = 800                # write: training steps
    seed: int = 0                   # write: of the weights and of the data; leak: of the noise
    threads: int = 0                # CPU threads; 0 = all


def make(o: Options) -> dict:
    """Train, write and examine a judge; what goes into the last line."""
    net = train(o.seed, o.steps)
    write(net, Path(o.write), {"seed": o.seed, "steps": o.steps})
    return {"judge": load(Path(o.write)).sha256, "seed": o.seed, "steps": o.steps, **exam(net, 2000)}


def exam(net: Judge, n: int) -> dict:
    """Shares of right answers on n unseen renders a resolution, whole and sharp ones, beside the pixels' own."""
    table = {}
    for R in (32, 64):
        batch = Shapes(R, split="test", crop=False, flip=False).records(range(n))
        images, captions = batch["image"], batch["caption"]
        for who, said in (("judge", answers(net, images, captions)), ("pixels", score(images, captions))):
            table[f"{who}{R}"] = {key: round(v.nanmean().item(), 4) for key, v in said.items()}
    return table


def measure(o: Options, judge: Judge) -> dict:
    """toy_fd and accuracy of the pictures of an npz, beside as many renders; what goes into the last line."""
    file = Path(o.images)
    beside, run = file.with_suffix(".json"), file.parent.parent
    if not beside.is_file():
        raise UserError(f"{beside} is not there: the judge reads pictures that sample.py wrote into a run folder")
    asked = json.loads(beside.read_text(encoding="utf-8"))
    cfg = model.load(run)[1]
    if cfg.data != "shapes":
        raise UserError(f"the judge knows shapes alone; {run} was trained on data={cfg.data!r}")
    pictures, source = open_pictures(o.images), data.open_source(cfg, "test")
    index = np.arange(len(pictures))
    images = pictures(index).float() / 127.5 - 1
    reference = render_stats(judge, source, range(FAR, FAR + REFERENCE))
    real = source.records(range(2 * FAR, 2 * FAR + len(index)))
    line = {"metric": f"toy_fd{len(index)}/judge-{judge.sha256[:8]}", "value": toy_fd(judge, images, reference),
            "renders": toy_fd(judge, real["image"], reference), "n": len(index), "reference_n": REFERENCE,
            "judge": judge.sha256, "images": o.images,
            "weights_sha256": asked.get("weights_sha256", asked.get("weights"))}

    titles = asked_for(file, asked, cfg, index)
    if cfg.model.semantics == "text":
        for who, said in (("judge", answers(judge, images, titles)), ("pixels", score(images, titles))):
            line[f"by_{who}"] = {key: shares(v) for key, v in said.items()}
    elif cfg.model.semantics == "class":
        right = [SHAPES[k] == title for k, title in zip(largest(read(judge, images)), titles)]
        line["by_class"] = shares(torch.tensor(right).float())
    return line


def asked_for(file: Path, asked: dict, cfg: Config, index: np.ndarray) -> list[str]:
    """What each picture of `file` was to be: the lines beside it; made again from its options where there are none.

    asked: those options, of whatever version: one that is not among them was not there yet, and is as it is today."""
    if file.with_suffix(".txt").is_file():
        return read_prompts(str(file.with_suffix(".txt")))
    known = {f.name: asked[f.name] for f in dataclasses.fields(Drawing) if f.name in asked}
    run = file.parent.parent
    header = checkpoint.read_header(run / "weights.safetensors")
    return Wishes(Drawing(**known | {"out": str(run)}), cfg, header).titles(index)


def shares(said: Tensor) -> list[float | None]:
    """Share of yes, its standard error, and how many were asked; None if nobody was."""
    asked = said[~said.isnan()]
    if not len(asked):
        return [None, None, 0]
    p = asked.mean().item()
    return [round(p, 4), round(math.sqrt(p * (1 - p) / len(asked)), 4), len(asked)]


def leak(o: Options, judge: Judge, place: machine.Place) -> dict:
    """toy_leak of a run, beside that of renders, which leak nothing; what goes into the last line."""
    cfg = model.load(o.leak)[1]
    source, drawing = data.open_source(cfg, "test"), settled(Drawing(out=o.leak, n=o.n, seed=o.seed), cfg)
    if not isinstance(source, Shapes):
        raise UserError(f"the judge knows shapes alone; {o.leak} was trained on other pictures")
    result = toy_leak(judge, size_groups(drawing, NATIVE, place), place)
    mine = np.arange(place.rank, o.n, place.world)
    floor = toy_leak(judge, [resized(source, mine)] if len(mine) else [], place)
    return {"metric": f"toy_leak/judge-{judge.sha256[:8]}", **dataclasses.asdict(result), "renders": floor.value,
            "sizes": NATIVE, "judge": judge.sha256, "run": o.leak, "seed": o.seed, "steps": drawing.steps,
            "lam": drawing.lam, "eta": drawing.eta}


def main(argv: list[str]) -> None:
    o = parse(argv, Options())
    if sum(map(bool, (o.write, o.images, o.leak))) != 1:
        raise UserError("give one of --write=FILE, --images=FILE.npz and --leak=RUN; --help says what they do")
    place = machine.setup(o.threads)
    if o.write:
        line = make(o)
    else:
        judge = load(Path(o.judge or JUDGE))
        line = measure(o, judge) if o.images else leak(o, judge, place)
    if place.rank == 0:
        print(json.dumps({**line, "torch": torch.__version__}))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        machine.leave()
    except UserError as e:
        checkpoint.say(f"error: {e}.")
        sys.exit(2)
