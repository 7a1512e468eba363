"""Folders of images as sources: classes by folder, or captions beside the images.

ImageFolder("train", 256)           train/CLASS/any/depth.jpg
Captions("mine", 256)               images, each with its text in metadata.jsonl or in a .txt of the same stem
find_images(path)                   names and bytes of all images below a folder
open_pictures("folder")             images for evaluation, of a folder or an array, read by number

Dimensions: B batch, H x W pixels, n images.
"""
import hashlib
import os
import posixpath
import stat
import sys
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import UserError
from rng import seed64
from sources.images import (CROPS, SUFFIXES, UNUSABLE, BadCaption, BadImage, ImageSource, decode_utf8, open_image,
                            parse_metadata, pick_caption)

METADATA = "metadata.jsonl"
SPLITS = {"train", "val", "valid", "validation", "test"}                # names of folders that are no classes


class ImageFolder(ImageSource):
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
            self.classes, self.labels = index_classes(names)
            if set(self.classes) <= SPLITS:
                raise UserError(f"{str(self.path)!r} has the folders {', '.join(self.classes)}, which are splits, not "
                                f"classes; use --data={(self.path / self.classes[0]).as_posix()}")
        self.fingerprint, self.files = fingerprint(names, sizes, self.classes), len(names) + len(bad)
        return bad.items()

    def load(self, index: int, epoch: int) -> tuple[Path, dict[str, Any]]:
        """Its path, and its label if the source has classes."""
        return self.path / self.names[index], {"label": self.labels[index]} if self.classes else {}


class CaptionFolder(ImageSource):
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
            text = decode_utf8(text.read_bytes()) if isinstance(text, Path) else text
        except OSError as e:
            raise BadCaption(f"{type(e).__name__}: {e}") from e
        draw = seed64(self.seed, "caption", index, epoch) if isinstance(text, list) else 0
        return self.path / self.names[index], {"caption": pick_caption(text, draw)}

    def read_metadata(self, files: list[str]) -> tuple[dict[str, Any], dict[str, str], list[tuple[str, str]]]:
        """{image: text} of these metadata.jsonl, {line or image: reason}, and (file, sha256) of each.

        Image names are relative to the folder of the source; those outside it are unusable."""
        texts, bad, sources = {}, {}, []
        for file in files:
            content = (self.path / file).read_bytes()
            found, wrong = parse_metadata(content)
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


def index_classes(names: Sequence[str]) -> tuple[list[str], array]:
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


# ---------------------------------------------------------------- images for evaluation

class FolderImages:
    """All images of a folder and its subfolders, numbered in the order of their names.

    resolution: crop to the largest centred square and resize it to this side, as training does; 0 = leave them.
    `jpegs` counts JPEG files. An unreadable file raises a UserError: skipping it would change the result."""
    workers, broken = 4, 0              # threads that may read ahead; images that are not finite

    def __init__(self, path: Path, resolution: int = 0) -> None:
        self.path, (self.names, _, empty) = path, find_images(path)
        if empty:
            raise UserError(f"{len(empty)} files of {path} are empty, e.g. {next(iter(empty))!r}; remove them")
        self.jpegs = sum(name.lower().endswith((".jpg", ".jpeg")) for name in self.names)
        self.square = None
        if resolution:
            self.square = ImageFolder(path, resolution, flip=False, max_bad=0, crop="center", classes=False)

    def __len__(self) -> int:
        return len(self.names)

    def __call__(self, indices: np.ndarray) -> Tensor:
        """Images number `indices` (B,) as uint8 (B, 3, H, W)."""
        images = [self.read(int(k)) for k in indices]
        if len(shapes := {image.shape for image in images}) > 1:
            raise UserError(f"images of {self.path} have different sizes, e.g. {min(shapes)[:2]} and "
                            f"{max(shapes)[:2]}; give --square=R to crop and resize them all")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def read(self, index: int) -> np.ndarray:
        """One image, uint8 (H, W, 3)."""
        try:
            if self.square is None:
                return np.asarray(open_image(self.path / self.names[index])[0])
            image = (self.square.render(index, 0)["image"] + 1) * 127.5
            return image.round().to(torch.uint8).permute(1, 2, 0).numpy()
        except BadImage as e:
            raise UserError(f"{self.path / self.names[index]} cannot be read: {e}") from e


class ArrayImages:
    """Images (n, H, W, 3) uint8 in an .npz (arr_0, as sample.py and [ADM] write it) or .npy, read when needed."""
    workers, broken, jpegs = 0, 0, 0

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.open() as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, fortran, dtype = header(file)
            self.start = file.tell()
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or fortran or not self.shape[0]:
            raise UserError(f"{path} holds {dtype} {self.shape}; wanted uint8 (n, height, width, 3), values 0 to 255")

    def __len__(self) -> int:
        return self.shape[0]

    def __call__(self, indices: np.ndarray) -> Tensor:
        """Images number `indices` (B,), which are consecutive, as uint8 (B, 3, H, W)."""
        size = int(np.prod(self.shape[1:]))
        with self.open() as file:
            file.seek(self.start + int(indices[0]) * size)
            content = file.read(len(indices) * size)
        if len(content) < len(indices) * size:
            raise UserError(f"{self.path} ends before image {indices[-1]}; it is damaged")
        images = torch.from_numpy(np.frombuffer(bytearray(content), np.uint8).reshape(-1, *self.shape[1:]))
        return images.permute(0, 3, 1, 2)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The bytes of the array. An uncompressed .npz can seek, so nothing else is read."""
        try:
            if self.path.suffix == ".npy":
                with open(self.path, "rb") as file:
                    yield file
            else:
                with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                    yield file
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as e:
            raise UserError(f"cannot read {self.path}: {e}; wanted an array arr_0 of images") from e


def open_images(path: str, resolution: int = 0) -> FolderImages | ArrayImages:
    """A folder of images, or an .npz or .npy of them. UserError for anything else."""
    where = Path(path).expanduser()
    if where.is_dir():
        return FolderImages(where, resolution)
    if where.suffix not in (".npz", ".npy") or not where.is_file():
        raise UserError(f"no images at {path!r}; wanted a folder of PNG files, an .npz with arr_0 or an .npy")
    if resolution:
        raise UserError(f"--square={resolution} is for folders; the images of {path} have one size already")
    return ArrayImages(where)
