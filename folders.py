"""Folders of images as sources: classes by folder, or captions beside the images.

ImageFolder("train", 256)           train/CLASS/any/depth.jpg
Captions("mine", 256)               images, each with its text in metadata.jsonl or in a .txt of the same stem
find_images(path)                   names and bytes of all images below a folder
"""
import hashlib
import os
import posixpath
import stat
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config import UserError
from images import BAD, CROPS, SUFFIXES, BadCaption, Pictures, choose, decode, metadata  # noqa: F401
from rng import seed64

METADATA = "metadata.jsonl"
SPLITS = {"train", "val", "valid", "validation", "test"}                # names of folders that are no classes


class ImageFolder(Pictures):
    """A folder of class folders, which hold JPEG, PNG and WebP files at any depth. Classes are sorted by name.

    classes     off: no labels, and class folders are optional. The other arguments are those of Pictures"""
    def __init__(self, path: str | Path, resolution: int, seed: int = 0, flip: bool = True, max_bad: float = 0.01,
                 crop: str = "random", side: tuple[float, float] = CROPS["global"], classes: bool = True):
        self.with_classes = classes
        super().__init__(path, resolution, seed, flip, max_bad, crop, side)

    def scan(self) -> Iterable[tuple[str, str]]:
        """Files without content are unusable; images outside class folders only get a warning."""
        names, sizes, bad = find_images(self.path)
        if self.with_classes and (stray := sum("/" not in name for name in names)):
            if stray == len(names):
                raise no_classes(self.path, names)
            tqdm.write(f"warning: {stray} images of {self.path} are in no class folder", sys.stderr)
            inside = [k for k, name in enumerate(names) if "/" in name]
            names, sizes = Names(names[k] for k in inside), [sizes[k] for k in inside]
        self.names = names
        if self.with_classes:
            self.classes, self.labels = number(names)
            if set(self.classes) <= SPLITS:
                raise UserError(f"{str(self.path)!r} has the folders {', '.join(self.classes)}, which are splits, not "
                                f"classes; use --data={(self.path / self.classes[0]).as_posix()}")
        self.fingerprint, self.files = fingerprint(names, sizes, self.classes), len(names) + len(bad)
        return bad.items()

    def load(self, index: int, epoch: int) -> tuple[Path, dict[str, Any]]:
        """Its path, and its label if the source has classes."""
        return self.path / self.names[index], {"label": self.labels[index]} if self.classes else {}


class Captions(Pictures):
    """A folder of images with captions, at any depth: metadata.jsonl beside them, or .txt files of the same stem.

    A line of metadata.jsonl is {"file_name": "a/1.jpg", "text": "a cat"}, file_name relative to its own folder; text
    may be a list, and every epoch chooses one. All lines of a .txt are one caption. metadata.jsonl has precedence.
    Images without a caption, and lines without an image, are unusable."""
    def scan(self) -> Iterable[tuple[str, str]]:
        """`texts` holds the text of each image as metadata.jsonl has it, or the path of its .txt."""
        images, lengths, bad = find_images(self.path)
        files, beside = find_texts(self.path)
        texts, wrong, sources = self.read_metadata([name for name in files if posixpath.basename(name) == METADATA])
        self.names, self.texts, parts = [], [], []
        for name, size in zip(images, lengths):
            txt = beside.get(posixpath.splitext(name)[0])
            if name in texts or txt:
                self.names.append(name)
                self.texts.append(texts.pop(name) if name in texts else self.path / txt)
                parts.append((name, size, files.get(txt, 0)))
            else:
                bad[name] = f"no caption, neither in {METADATA} nor in a .txt of this name"
        if not self.names:
            raise UserError(f"folder {str(self.path)!r} has no captions for model.semantics=text: none of its "
                            f"{len(images)} images is in a {METADATA} or has a .txt of its name; use class or none")
        self.fingerprint = hashlib.sha256(ascii((parts, sources)).encode()).hexdigest()
        bad |= wrong | {name: f"{METADATA} names it, but there is no such JPEG, PNG or WebP file"
                        for name in texts if name not in bad}
        self.files = len(self.names) + len(bad)
        return sorted(bad.items())

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
        """{image: text} of these metadata.jsonl, {line or image: reason}, and (file, sha256) of each.

        Image names are relative to the folder of the source; those outside it are unusable."""
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


def no_classes(path: Path, images: Sequence[str]) -> UserError:
    """The error for images without class folders, which says what would work."""
    files, beside = find_texts(path)
    stems = {posixpath.splitext(name)[0] for name in images}
    if stems & beside.keys() or any(posixpath.basename(name) == METADATA for name in files):
        return UserError(f"{str(path)!r} has no class folder, but captions beside its {len(images)} images; train on "
                         "those with --model.semantics=text --model.arch=mmdit --encoder=clip:PATH")
    return UserError(f"{str(path)!r} has no class folder: put its {len(images)} images into folders named after "
                     f"their classes, {path}/CLASS/; or use --model.semantics=none")


# ---------------------------------------------------------------- what is in a folder

class Names(Sequence[str]):
    """File names in their UTF-8 bytes and eight more: a list takes four times as much in every process, and
    ImageNet-22k has 14 million."""
    def __init__(self, names: Iterable[str]) -> None:
        self.letters, self.ends = bytearray(), array("q", [0])
        for name in names:
            self.letters += name.encode("utf-8", "surrogatepass")       # surrogates stand for other bytes
            self.ends.append(len(self.letters))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, k: int) -> str:
        k = range(len(self))[k]
        return self.letters[self.ends[k]:self.ends[k + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self.letters[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(self.ends))


def find_images(root: Path) -> tuple[Names, array, dict[str, str]]:
    """Names and bytes of the images below `root`, sorted by name, and {name: reason} of files without content."""
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


def number(names: Sequence[str]) -> tuple[list[str], array]:
    """The outermost folders of these files, sorted, and the index of each file's folder."""
    classes = sorted({name.partition("/")[0] for name in names})
    index = {name: k for k, name in enumerate(classes)}
    return classes, array("i", (index[name.partition("/")[0]] for name in names))


def fingerprint(names: Sequence[str], sizes: Sequence[int], classes: list[str]) -> str:
    """sha256 of ascii(([(name, size), ...], classes)), made pair by pair."""
    digest, between = hashlib.sha256(b"(["), ""
    for pair in zip(names, sizes):
        digest.update(f"{between}{pair!a}".encode())
        between = ", "
    digest.update(f"], {classes!a})".encode())
    return digest.hexdigest()


def find_texts(root: Path) -> tuple[dict[str, int], dict[str, str]]:
    """{name: bytes} of the .txt and .jsonl files below `root`, and the .txt files by stem."""
    files = find_files(root, (".txt", ".jsonl"))
    return files, {posixpath.splitext(name)[0]: name for name in files if name.lower().endswith(".txt")}


def find_files(root: Path, suffixes: tuple[str, ...]) -> dict[str, int]:
    """All that `walk` finds, as {name: bytes}."""
    return dict(walk(root, suffixes))


def walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Relative name and bytes of the files below `root` with these suffixes, sorted by name; 0 for a broken link.

    Skips hidden and irregular files, and follows links, but enters no folder twice. Sorting a folder as its name and
    a slash gives the order of the whole without a list of the whole, which os.walk would need."""
    if not root.is_dir():
        raise UserError(f"no folder {str(root)!r} (looked at {root.absolute()}); data is shapes, a folder of "
                        "images, latents or tar shards, a {a..b} pattern of shards, or coco:PATH")
    seen, todo = set(), [("", 0)]
    while todo:
        name, size = todo.pop()
        if name and not name.endswith("/"):
            yield name, size
        elif (here := os.path.realpath(root / name)) not in seen:
            seen.add(here)
            try:
                with os.scandir(here) as entries:
                    found = [row for entry in entries if (row := measure(entry, suffixes))]
            except OSError as e:
                raise UserError(f"cannot read {e.filename!r}: {e.strerror}") from e
            todo += sorted(((name + below, size) for below, size in found), reverse=True)


def measure(entry: os.DirEntry, suffixes: tuple[str, ...]) -> tuple[str, int] | None:
    """(name, bytes) of a file with these suffixes, (name/, 0) of a folder, None for all else."""
    named, link = entry.name.lower().endswith(suffixes), entry.is_symlink()
    if entry.name.startswith(".") or not (named or link or entry.is_dir()):
        return None
    try:
        found = entry.stat()
    except OSError:
        return (entry.name, 0) if named else None               # a link to nothing, or to itself
    if stat.S_ISDIR(found.st_mode):
        return entry.name + "/", 0
    return (entry.name, found.st_size) if named and stat.S_ISREG(found.st_mode) else None
