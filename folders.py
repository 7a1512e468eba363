"""Sources that are picture files: what they share, folders of classes and folders of captions.

ImageFolder("train", 256)           train/CLASS/any/depth.jpg
Captions("mine", 256)               pictures, each with its text in metadata.jsonl or in a .txt of the same stem
Pictures                            what a new source builds on: it says what its files are called and what they hold

Nothing is written and nothing is guessed: a file that cannot be used is named, counted and replaced by another.
Dimensions: C channels, R resolution, H height, W width.
"""
import hashlib
import os
import posixpath
import sys
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from config import UserError
from pictures import BadImage, open_image
from rng import seed64
from wording import BadCaption, choose, decode, metadata

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
METADATA = "metadata.jsonl"
SPLITS = {"train", "val", "valid", "validation", "test"}                # names of folders that are no classes
ATTEMPTS = 20                           # to replace one sample that cannot be used
NAMED = 20                              # samples that are named in warnings as they turn up
CROPS = {"global": (0.9, 1.0), "local": (0.4, 0.6), "mix": (0.4, 1.0)}  # [COND] 1.9: sides, over the short one
BAD = (BadImage, BadCaption)


class Pictures:
    """A source of picture files, cropped and mirrored at random. A kind of source adds `__len__`, `name`, `load`.

    crop        random: a square anywhere, its side uniform in `side` times the short side; center: the largest
    flip        mirror half of them
    max_bad     samples that cannot be used are in `bad` and replaced; UserError beyond max(1, max_bad * files);
                0 lets none through"""
    channels = 3
    classes: list[str] = []
    labels: list[int] = []
    encoder = None                      # captions come as they are
    files = 0                           # that there are, whether they can be used or not

    def __init__(self, path: str | Path, resolution: int, seed: int = 0, flip: bool = True, max_bad: float = 0.01,
                 crop: str = "random", side: tuple[float, float] = CROPS["global"]):
        if crop not in ("random", "center"):
            raise UserError(f"crop wants random or center, got {crop!r}")
        self.path, self.resolution, self.seed, self.flip = Path(path).expanduser(), resolution, seed, flip
        self.max_bad, self.random = max_bad, crop == "random"
        self.side = side if self.random else (1.0, 1.0)
        self.controls = ("size", "crop", "flip") if flip else ("size", "crop")
        self.bad: dict[str, str] = {}
        self.skipped: Any = None                                # where else to name them: skipped.Skipped
        self.lock = threading.Lock()

    def name(self, index: int) -> str:
        """What to call a sample in a message."""
        raise TypeError(f"{type(self).__name__} names no samples")

    def load(self, index: int, epoch: int) -> tuple[Any, dict[str, Any]]:
        """The picture, as a path or a binary stream, and what is known of it: label, caption, size of the original.

        BadImage or BadCaption, or no such sample is ever seen."""
        raise TypeError(f"{type(self).__name__} loads no samples")

    def record(self, index: int, epoch: int) -> dict[str, Any]:
        """One Record; for a sample of no use that of another, drawn by (seed, index, epoch, attempt)."""
        use = index
        for attempt in range(ATTEMPTS):
            try:
                return self.render(use, epoch)
            except BAD as e:
                self.note_bad(self.name(use), str(e))
            use = seed64(self.seed, "replace", index, epoch, attempt) % len(self)
        raise UserError(f"{ATTEMPTS} images of {self.path} in a row are unreadable, see data.py --check")

    def render(self, index: int, epoch: int) -> dict[str, Any]:
        """One Record, its augmentation drawn by (seed, index, epoch). BadImage or BadCaption if it is of no use."""
        R, (low, high) = self.resolution, self.side
        file, known = self.load(index, epoch)
        picture, (h, w) = open_image(file, short=2 * R / low)
        rng = np.random.Generator(np.random.Philox(seed64(self.seed, "aug", index, epoch)))
        u = rng.random(4) if self.random else (0, 0.5, 0.5, rng.random(4)[3])
        a = max(1, round(min(h, w) * (low + (high - low) * u[0])))
        top, left = int(u[1] * (h - a + 1)), int(u[2] * (w - a + 1))
        mirrored = self.flip and u[3] < 0.5

        fy, fx = picture.height / h, picture.width / w          # below 1 where the decoder shrank the picture
        box = (left * fx, top * fy, (left + a) * fx, (top + a) * fy)
        picture = picture.resize((R, R), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)                   # (C, R, R)
        pixels = np.ascontiguousarray(pixels[:, :, ::-1] if mirrored else pixels)
        record = dict(image=torch.from_numpy(pixels / np.float32(127.5) - np.float32(1)), size=(h, w),
                      crop=(top * R / a, left * R / a), flip=float(mirrored), index=index)
        if "size" in known:                                     # of an original that is not turned upright
            H, W = known["size"]
            known["size"] = (W, H) if h != w and (h > w) != (H > W) else (H, W)
        return record | known

    def note_bad(self, name: str, reason: str) -> None:
        """Counts a sample of no use and names it, once; UserError if there are now more than max_bad allows."""
        with self.lock:
            where = f"; all are in {self.skipped.path}" if self.skipped else ""
            if name not in self.bad and len(self.bad) <= NAMED:
                last = (where or "; no more of these are named") if len(self.bad) == NAMED else ""
                tqdm.write(f"warning: {name!r} is passed over: {reason}{last}", sys.stderr)
            self.bad[name] = reason
            if self.skipped:
                self.skipped.note({name: reason})
            allowed = max(1, int(self.max_bad * self.files)) if self.max_bad > 0 else 0
            if len(self.bad) > allowed:
                some = ", ".join(f"{n!r} ({why})" for n, why in list(self.bad.items())[:3])
                raise UserError(f"{len(self.bad)} of {self.files} images of {str(self.path)!r} cannot be "
                                f"read, e.g. {some}{where}; mend or remove them, or raise --max_bad={self.max_bad}")


class ImageFolder(Pictures):
    """A folder of class folders with JPEG, PNG and WebP files at any depth; classes are in sorted order.

    classes     off: no labels, and no class folders needed. The other arguments are those of Pictures"""
    def __init__(self, path: str | Path, resolution: int, seed: int = 0, flip: bool = True, max_bad: float = 0.01,
                 crop: str = "random", side: tuple[float, float] = CROPS["global"], classes: bool = True):
        super().__init__(path, resolution, seed, flip, max_bad, crop, side)
        found, sizes, bad = find_images(self.path)
        names = found
        if classes and any("/" not in name for name in found):
            inside = [k for k, name in enumerate(found) if "/" in name]
            names, sizes = Names(found[k] for k in inside), [sizes[k] for k in inside]
        if not names and captioned(self.path, found):
            raise UserError(f"{str(path)!r} has no class folder, but captions beside its {len(found)} images, which "
                            f"another model reads: --model.semantics=text --model.arch=mmdit --encoder=clip:PATH")
        if not names:
            raise UserError(f"{str(path)!r} has no class folder: its {len(found)} images belong in folders "
                            f"named after their classes, {path}/CLASS/; or --model.semantics=none")
        if len(names) < len(found):
            tqdm.write(f"warning: {len(found) - len(names)} images of {path} are in no class", sys.stderr)

        self.names, (self.classes, self.labels) = names, number(names) if classes else ([], [])
        if classes and set(self.classes) <= SPLITS:
            raise UserError(f"{str(path)!r} has the folders {', '.join(self.classes)}, which are parts of a data set "
                            f"and no classes; use --data={(self.path / self.classes[0]).as_posix()}")
        self.fingerprint = fingerprint(names, sizes, self.classes)
        self.files = len(names) + len(bad)
        for name, reason in bad.items():
            self.note_bad(name, reason)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Its path below the folder."""
        return self.names[index]

    def load(self, index: int, epoch: int) -> tuple[Path, dict[str, Any]]:
        """Its path, and its label if there are classes."""
        return self.path / self.names[index], {"label": self.labels[index]} if self.classes else {}


class Captions(Pictures):
    """A folder of pictures with captions, at any depth: metadata.jsonl beside them, or .txt files of the same stem.

    A line of metadata.jsonl is {"file_name": "a/1.jpg", "text": "a cat"}, file_name seen from its own folder; text
    may be a list, of which every epoch draws one. All lines of a .txt are one caption. Where both are,
    metadata.jsonl counts; pictures without a caption, and lines without a picture, count as bad. The arguments are
    those of Pictures."""
    def __init__(self, path: str | Path, resolution: int, seed: int = 0, flip: bool = True, max_bad: float = 0.01,
                 crop: str = "random", side: tuple[float, float] = CROPS["global"]):
        super().__init__(path, resolution, seed, flip, max_bad, crop, side)
        images, lengths, bad = find_images(self.path)
        sizes = find_files(self.path, (".txt", ".jsonl"))
        texts, wrong, sources = self.read_metadata([name for name in sizes if Path(name).name == METADATA])
        beside = {posixpath.splitext(name)[0]: name for name in sizes if name.lower().endswith(".txt")}

        self.names, self.texts, parts = [], [], []              # a text is as metadata has it, or a Path to read
        for name, size in zip(images, lengths):
            txt = beside.get(posixpath.splitext(name)[0])
            if name in texts or txt:
                self.names.append(name)
                self.texts.append(texts.pop(name) if name in texts else self.path / txt)
                parts.append((name, size, 0 if txt is None else sizes[txt]))
            else:
                bad[name] = f"no caption, neither in {METADATA} nor in a .txt of this name"
        if not self.names:
            raise UserError(f"folder {str(path)!r} has no captions for model.semantics=text: of its {len(images)} "
                            f"images none is in a {METADATA} or has a .txt of its name; use class or none")
        bad |= wrong | {name: f"{METADATA} names it, but there is no such JPEG, PNG or WebP file"
                        for name in texts if name not in bad}
        self.fingerprint = hashlib.sha256(ascii((parts, sources)).encode()).hexdigest()
        self.files = len(self.names) + len(bad)
        for name, reason in sorted(bad.items()):
            self.note_bad(name, reason)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Its path below the folder."""
        return self.names[index]

    def load(self, index: int, epoch: int) -> tuple[Path, dict[str, Any]]:
        """Its path and its caption."""
        text = self.texts[index]
        try:
            text = decode(text.read_bytes()) if isinstance(text, Path) else text
        except OSError as e:
            raise BadCaption(f"{type(e).__name__}: {e}") from e
        draw = seed64(self.seed, "caption", index, epoch) if isinstance(text, list) else 0
        return self.path / self.names[index], {"caption": choose(text, draw)}

    def read_metadata(self, files: list[str]) -> tuple[dict[str, Any], dict[str, str], list[tuple[str, str]]]:
        """{picture: text} of these metadata.jsonl, {line or picture: reason}, and (file, sha256) of each.

        A picture is named from the folder of the source; one that lies outside it is bad."""
        texts, bad, sources = {}, {}, []
        for file in files:
            content = (self.path / file).read_bytes()
            found, wrong = metadata(content)
            bad |= {f"{file} {line}": reason for line, reason in wrong.items()}
            for name, text in found.items():
                place = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
                if place.startswith(("/", "..")):
                    bad[f"{file}: {name}"] = "lies outside the folder"
                elif place in texts:
                    bad[f"{file}: {name}"] = "is named a second time"
                else:
                    texts[place] = text
            sources.append((file, hashlib.sha256(content).hexdigest()))
        return texts, bad, sources


# ---------------------------------------------------------------- what is in a folder

class Names(Sequence[str]):
    """Names of files in as many bytes as they have letters, and eight: a list takes four times as much in every
    process, and ImageNet-22k has 14 million."""
    def __init__(self, names: Iterable[str]) -> None:
        self.letters, self.ends = bytearray(), array("q", [0])
        for name in names:
            self.letters += name.encode("utf-8", "surrogatepass")       # what is not UTF-8 comes as surrogates
            self.ends.append(len(self.letters))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, k: int) -> str:
        k = range(len(self))[k]
        return self.letters[self.ends[k]:self.ends[k + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self.letters[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(self.ends))


def find_images(root: Path) -> tuple[Names, array, dict[str, str]]:
    """Names and bytes of the images below `root`, in order, and {name: reason} of files without content."""
    sizes, bad = array("q"), {}

    def good() -> Iterator[str]:
        for name, size in walk(root, SUFFIXES):
            if size:
                sizes.append(size)
                yield name
            else:
                bad[name] = "empty file or link to nothing"

    names = Names(good())
    if not names:
        raise UserError(f"no images in {str(root)!r}, {len(bad)} empty files; looked for {' '.join(SUFFIXES)}"
                        f" in {root.absolute()} and all folders below")
    return names, sizes, bad


def number(names: Iterable[str]) -> tuple[list[str], array]:
    """The outermost folders of these files, sorted, and the number of each file's."""
    seen, found = {}, array("i")
    for name in names:
        found.append(seen.setdefault(name.partition("/")[0], len(seen)))
    classes = sorted(seen)
    place = np.empty(len(seen), np.int32)
    place[[seen[name] for name in classes]] = np.arange(len(seen))
    return classes, array("i", place[np.frombuffer(found, np.int32)].tobytes())


def fingerprint(names: Sequence[str], sizes: Sequence[int], classes: list[str]) -> str:
    """sha256 of names, sizes and classes as Python writes a list of pairs beside a list, made part by part."""
    digest, between = hashlib.sha256(b"(["), ""
    for pair in zip(names, sizes):
        digest.update(f"{between}{pair!a}".encode())
        between = ", "
    digest.update(f"], {classes!a})".encode())
    return digest.hexdigest()


def captioned(root: Path, images: Iterable[str]) -> bool:
    """Whether there is a metadata.jsonl below `root`, or a .txt of the same stem as one of the images."""
    texts = [posixpath.splitext(name) for name in find_files(root, (".txt", ".jsonl"))]
    stems = {posixpath.splitext(name)[0] for name in images} if texts else set()
    return any(stem in stems if suffix.lower() == ".txt" else posixpath.basename(stem + suffix) == METADATA
               for stem, suffix in texts)


def find_files(root: Path, suffixes: tuple[str, ...]) -> dict[str, int]:
    """What `walk` finds, as {name: bytes}."""
    return dict(walk(root, suffixes))


def walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Relative name and bytes of the files below `root` with these suffixes, sorted by name; 0 for a link to nothing.

    Hidden and irregular files are passed over; a folder that links lead to twice counts once. What is to come is kept
    of the folders that are open only: in each of them a folder sorts as its name and the slash that follows it."""
    if not root.is_dir():
        raise UserError(f"no folder {str(root)!r} (looked at {root.absolute()}); data is shapes, a folder of "
                        "pictures, latents or tar shards, a {a..b} pattern of shards, or coco:PATH")
    seen, todo = set(), [("", 0)]
    while todo:
        name, size = todo.pop()
        if name and not name.endswith("/"):
            yield name, size
        elif (here := os.path.realpath(root / name)) not in seen:
            seen.add(here)
            try:
                todo += sorted(entries(here, name, suffixes), reverse=True)
            except OSError as e:
                raise UserError(f"cannot read {e.filename!r}: {e.strerror}") from e


def entries(folder: str, below: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """The files of one folder with these suffixes, and their bytes, and its folders with a slash. One look a file."""
    with os.scandir(folder) as found:
        for entry in found:
            link, named = entry.is_symlink(), entry.name.lower().endswith(suffixes)     # of a link os.path bears more
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry) if link else entry.is_dir():
                yield f"{below}{entry.name}/", 0
            elif named and (os.path.isfile(entry) if link else entry.is_file()):
                yield below + entry.name, entry.stat().st_size
            elif named and link and not os.path.exists(entry):
                yield below + entry.name, 0
