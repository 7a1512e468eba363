"""Data: what a record is, which records a training step sees, and the table of sources.

    python data.py --check PATH     decodes it and says what it holds, what is broken, what the network will see

A source has len() and `records(indices, epochs) -> Batch` or `record(index, epoch) -> Record`, one row of it.
A Batch is a dict; label and caption are in it if the source has them, text and lengths with an encoder:
    image (B, C, R, R) float32 in [-1, 1]        label, index (B,) int64        caption list[str]
    size (B, 2) float32: height, width of the original in pixels
    crop (B, 2) float32: top, left in pixels of the original scaled like the crop, before mirroring
    flip (B,) float32: 1 where the image is mirrored
    text (B, L, E) float32: tokens of the caption; the first lengths (B,) int64 count
A source has `classes` (names; [] if none), `channels`, `controls` (the keys of CONTROLS that vary), `fingerprint`
(sha256 of what decides its content), `encoder` (names the one that made its stored text; None if it stores none) and
`bad` ({name: reason} of unusable samples). Its class is a row of SOURCES: `takes(where)` recognises its values of
--data, `open(cfg, split)` makes the source, `can_have_classes` says whether that may be with classes.

Sample and augmentation are pure functions of (seed, step, position in the global batch): no order is stored and no
random state exists.

Dimensions: B batch, C channels, R resolution, H height, W width, L text tokens, E width of a text token.
"""
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from conditioning import CONTROLS
from config import Config, ModelConfig, UserError, check_name, parse, run
from rng import permute, seed64
from runtime.plot import grid
from sources.cached_latents import Latents
from sources.coco import CocoCaptions
from sources.coco import read as read_coco
from sources.folders import ImageFolder, OnlySplits
from sources.images import CROPS, BadSample, ImageSource, clean_caption, decode_utf8, pick_caption
from sources.shapes import Shapes
from sources.shards import TarShards
from text import WordVectors

Record, Batch = dict[str, Any], dict[str, Any]
Source, TextEncoder = Any, Any          # contracts, stated above and at text.make_encoder
SHOWN = 16                              # records in check.png


def index_and_epoch(positions: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sample index and epoch, int64, at each position. Epoch e permutes range(n) by a key from (seed, e)."""
    epoch, offset = np.divmod(positions, n)
    epochs, which = np.unique(epoch, return_inverse=True)
    keys = np.array([seed64(seed, "order", int(e)) for e in epochs], dtype=np.uint64)
    return permute(offset, n, keys[which]), epoch


SOURCES = {                             # the first that takes a value of --data opens it
    "shapes": Shapes,
    "coco": CocoCaptions,
    "latents": Latents,
    "tars": TarShards,
    "folder": ImageFolder,
}


def source_type(where: str) -> str:
    """Return the key of SOURCES that takes this value of --data."""
    return next(name for name, source in SOURCES.items() if source.takes(where))


def open_source(cfg: Config, split: str = "train") -> Source:
    """Open the source of `cfg.data`; UserError if it lacks what the model needs. Only shapes have splits."""
    want, varied = cfg.model, cfg.augment.split("+")
    if unknown := [a for a in varied if a and a not in CONTROLS]:
        raise UserError(f"augment={cfg.augment!r} names {unknown[0]!r}; there are {', '.join(CONTROLS)}")
    check_name("crop", cfg.crop, CROPS)
    kind = SOURCES[source_type(cfg.data)]
    if want.semantics == "class" and not kind.can_have_classes:
        raise UserError(f"{cfg.data!r} has captions and no classes; use --model.semantics=text, or none")
    source = kind.open(cfg, split)
    if want.channels != source.channels:
        raise UserError(f"--model.channels={want.channels}, but {cfg.data!r} has images of {source.channels}")
    if lacking := [c for c in want.controls.split("+") if c and c not in source.controls]:
        enough = "+".join(c for c in CONTROLS if c in varied or c in lacking)
        raise UserError(f"model.controls={want.controls!r}, but {cfg.data!r} does not vary {' and '.join(lacking)} "
                        f"with augment={cfg.augment!r}; it would with --augment={enough}")
    return source


def check_words(source: Source, encoder: TextEncoder | None, cfg: Config) -> None:
    """Raise UserError if the encoder is the shapes' and lacks words of the first captions of another source."""
    if not isinstance(encoder, WordVectors) or isinstance(source, Shapes):
        return
    for caption in cyclic_batch(source, range(100))["caption"]:
        try:
            encoder.encode([caption])
        except UserError as e:
            raise UserError(f"encoder=words knows the captions of the shapes only, and {cfg.data!r} has others, e.g. "
                            f"{caption[:80]!r}; use --encoder=clip:PATH") from e


def records(source: Source, indices: Sequence[int], epochs: Sequence[int]) -> Batch:
    """Return the Batch of these samples in these epochs, of any source."""
    if hasattr(source, "records"):
        return source.records(indices, epochs)
    return collate([source.record(int(i), int(e)) for i, e in zip(indices, epochs)])


def cyclic_batch(source: Source, indices: Sequence[int]) -> Batch:
    """Return the Batch of these samples; an index past the end starts again at the first."""
    return records(source, np.asarray(indices) % len(source), np.zeros(len(indices), int))


def with_text(batch: Batch, encoder: TextEncoder | None) -> Batch:
    """Add text and lengths of the captions to a batch, unless it has them or there is no encoder."""
    if encoder is None or "caption" not in batch or "text" in batch:
        return batch
    text, lengths = encoder.encode(batch["caption"])
    return {**batch, "text": text, "lengths": lengths}


def collate(rows: list[Record]) -> Batch:
    """Stack records into a Batch."""
    column = {key: [row[key] for row in rows] for key in rows[0]}
    types = {"label": np.int64, "index": np.int64} | dict.fromkeys(CONTROLS, np.float32)
    batch = {key: torch.from_numpy(np.array(column[key], types[key])) for key in types if key in column}
    batch["image"] = torch.from_numpy(np.stack([image.numpy() for image in column["image"]]))   # (B, C, R, R)
    return batch | ({"caption": column["caption"]} if "caption" in column else {})


def load_microbatch(source: Source, encoder: Any, seed: int, batch: int, microbatch: int, step: int, m: int) -> Batch:
    """Load microbatch `m` of `step`, with text and lengths if there are captions and an encoder."""
    positions = step * batch + m * microbatch + np.arange(microbatch, dtype=np.int64)       # in the endless stream
    return with_text(records(source, *index_and_epoch(positions, len(source), seed)), encoder)


def prefetch(fetch_fn: Callable, keys: Iterable[tuple], workers: int, depth: int = 2) -> Iterator[Any]:
    """Yield fetch_fn(*key) of every key, in order; `workers` threads work up to workers * depth keys ahead, 0 = none.

    An exception is raised at its key. Closing the generator cancels what has not begun and leaves no thread."""
    if workers == 0:
        yield from (fetch_fn(*key) for key in keys)
        return
    pool, ahead = ThreadPoolExecutor(workers, thread_name_prefix="prefetch"), deque()
    try:
        for key in keys:
            ahead.append(pool.submit(fetch_fn, *key))
            if len(ahead) > workers * depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_prompts(file: str, seed: int = 0) -> list[str]:
    """Read a caption for every image: the lines of a UTF-8 file; an empty line is the empty caption.

    A COCO captions json gives one caption of each image, in the order of their numbers, chosen by seed as
    CocoCaptions does. UserError for a file that is missing, empty or in another encoding."""
    if file.endswith(".json"):
        names, captions = read_coco(file)
        return [pick_caption(captions[k], seed64(seed, "coco", k)) for k in sorted(names) if k in captions]
    try:
        lines = decode_utf8(Path(file).read_bytes()).splitlines()
    except (OSError, BadSample) as e:
        raise UserError(f"--prompts={file} cannot be read: {e}") from e
    if not lines:
        raise UserError(f"--prompts={file} is empty; wanted captions, one a line")
    return [clean_caption(line) for line in lines]


def titles(batch: Batch, classes: Sequence[str] = ()) -> list[str]:
    """Return a title for each image: its caption, or its class by name or number, or nothing."""
    labels = [classes[k] if classes else f"class {k}" for k in batch.get("label", torch.tensor([])).tolist()]
    return batch.get("caption") or labels or [""] * len(batch["image"])


@dataclass(frozen=True)
class Options:
    """What to check."""
    check: str = "."            # what --data would be: a folder, tar shards, coco:PATH, shapes
    resolution: int = 64        # R, side of the squares that the network will see
    limit: int = 0              # images to decode, spread over all; 0 = every one


def check(where: str, R: int, limit: int = 0) -> None:
    """Print what the image files hold and which are broken, and write 16 records with their controls to check.png.

    The images have captions, else classes, else neither."""
    kind, source = SOURCES[source_type(where)], None
    if kind is Latents:
        raise UserError(f"{where!r} holds no image files; python latents.py check shows it")
    cfg = Config(data=where, max_bad_fraction=1.0, augment="+".join(CONTROLS))
    for semantics in ("text", "class", "none"):
        try:
            source = kind.open(replace(cfg, model=ModelConfig(semantics=semantics, resolution=R)))
            break
        except OnlySplits:                                  # one of its folders should be named
            raise
        except UserError:
            if semantics == "none":
                raise
    if isinstance(source, ImageSource):
        check_files(source, R, limit)
    shown = load_microbatch(source, None, 0, SHOWN, SHOWN, 0, 0)
    controls = zip(titles(shown, source.classes), *(shown[key].tolist() for key in ("size", "crop", "flip")))
    texts = [f"{name}\nsize {h:.0f}, {w:.0f}\ncrop {top:.1f}, {left:.1f}\nflip {flip:.0f}"
             for name, (h, w), (top, left), flip in controls]
    grid(shown["image"], 8, texts).save("check.png")
    print(f"{SHOWN} of them are in check.png")


def check_files(source: ImageSource, R: int, limit: int) -> None:
    """Decode `limit` files, or all for 0, and print classes, sizes, lengths of captions and every broken file."""
    def decode(i: int) -> tuple[int, str | None] | None:
        try:
            row = source.load_record(i, 0)
            return min(row["size"]), row.get("caption")
        except BadSample as e:
            source.mark_bad(source.name(i), str(e))

    n = len(source)
    indices = range(n) if limit <= 0 else [k * n // min(limit, n) for k in range(min(limit, n))]
    every = prefetch(decode, ((i,) for i in indices), workers=os.cpu_count() or 1)
    good = [row for row in tqdm(every, total=len(indices), desc="decoding", unit="image") if row]
    for label, count in sorted(Counter(source.labels).items()):
        print(f"{count:>9,}  {source.classes[label]}")
    for name, reason in sorted(source.bad.items()):
        print(f"broken: {name!r}: {reason}")
    sides = [side for side, _ in good] or [0]
    part = "" if len(indices) == n else f"{len(indices):,} of them decoded, "
    print(f"{source.files:,} images, {part}{len(source.bad)} broken; short side {min(sides)} to {max(sides)} "
          f"pixels, {sum(side < R for side in sides):,} of them below {R}")
    if words := sorted(len(text.split()) for _, text in good if text is not None):
        print(f"captions of {words[0]} to {words[-1]} words, half of them up to {words[len(words) // 2]}; "
              f"{words.count(0):,} empty, {sum(count > 75 for count in words):,} certainly too long for 77 tokens")


def main(argv: list[str]) -> None:
    o = parse(argv, Options())
    check(o.check, o.resolution, o.limit)


if __name__ == "__main__":
    run(main)
