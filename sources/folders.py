"""Folders of images as sources: classes by folder, or captions beside the images; and images for evaluation.

Dimensions: B batch, H x W pixels, n images.
"""
import hashlib
import os
import posixpath
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from config import Config, UserError
from rng import seed64
from runtime.plot import to_uint8
from sources.images import (SUFFIXES, BadSample, ImageSource, decode_utf8, open_image, parse_metadata,
                            pick_caption)

METADATA = "metadata.jsonl"
SPLITS = {"train", "val", "valid", "validation", "test"}                # names of folders that are no classes


class OnlySplits(UserError):
    """The folders inside a folder are splits of a data set, not classes."""


class ImageFolder(ImageSource):
    """A folder of class folders, which hold JPEG, PNG and WebP files at any depth. Classes are sorted by name.

    annotated   off: no labels, and class folders are optional"""
    can_have_classes = True

    @staticmethod
    def takes(where: str) -> bool:
        """Whether this value of --data is a folder: every value that no other source takes."""
        return True

    @classmethod
    def open(cls, cfg: Config, split: str = "train") -> ImageSource:
        """Open a folder, with captions for semantics=text, of class folders for class, of images for none."""
        return CaptionFolder.open(cfg, split) if cfg.model.semantics == "text" else super().open(cfg, split)

    def scan(self) -> Iterable[tuple[str, str]]:
        """Files without content are unusable and, where classes are wanted, images outside class folders."""
        self.names, sizes, bad = find_images(self.path, self.annotated)
        if self.annotated:
            self.classes, self.labels = index_classes(self.names)
            if set(self.classes) <= SPLITS:
                raise OnlySplits(f"{str(self.path)!r} has the folders {', '.join(self.classes)}, which are splits, not "
                                f"classes; use --data={(self.path / self.classes[0]).as_posix()}")
        self.fingerprint, self.files = fingerprint(self.names, sizes, self.classes), len(self.names) + len(bad)
        return bad.items()

    def load(self, index: int, epoch: int) -> tuple[Path, dict[str, Any]]:
        return self.path / self.names[index], {"label": self.labels[index]} if self.classes else {}


class CaptionFolder(ImageSource):
    """A folder of images with captions, at any depth: metadata.jsonl beside them, or .txt files of the same stem.

    A line of metadata.jsonl is {"file_name": "a/1.jpg", "text": "a cat"}, file_name relative to its own folder; text
    may be a list, and every epoch chooses one. All lines of a .txt are one caption. metadata.jsonl has precedence.
    Images without a caption, and lines without an image, are unusable."""
    def scan(self) -> Iterable[tuple[str, str]]:
        """`texts` holds the text of each image as metadata.jsonl has it, or the path of its .txt."""
        images, lengths, bad = find_images(self.path)
        files = dict(walk(self.path, (".txt", ".jsonl")))
        beside = {posixpath.splitext(name)[0]: name for name in files if name.lower().endswith(".txt")}
        texts, wrong, sources, parts, self.names, self.texts = {}, {}, [], [], [], []
        for file in [name for name in files if posixpath.basename(name) == METADATA]:
            content = (self.path / file).read_bytes()
            found, lines = parse_metadata(content, posixpath.dirname(file))
            texts, wrong = found | texts, wrong | {f"{file} {line}": reason for line, reason in lines.items()}
            sources.append((file, hashlib.sha256(content).hexdigest()))
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
        text = self.texts[index]
        text = decode_utf8(text.read_bytes()) if isinstance(text, Path) else text
        draw = seed64(self.seed, "caption", index, epoch) if isinstance(text, list) else 0
        return self.path / self.names[index], {"caption": pick_caption(text, draw)}


class Names(Sequence[str]):
    """File names in their UTF-8 bytes and eight more: a list takes four times as much in every process, and
    ImageNet-22k has 14 million."""
    def __init__(self, names: Iterable[str] = ()) -> None:
        self.letters, self.ends = bytearray(), array("q", [0])
        for name in names:
            self.letters += name.encode("utf-8", "surrogatepass")       # surrogates stand for other bytes
            self.ends.append(len(self.letters))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, k: int) -> str:
        k = range(len(self))[k]
        return self.letters[self.ends[k]:self.ends[k + 1]].decode("utf-8", "surrogatepass")


def find_images(root: Path, nested: bool = False) -> tuple[Names, array, dict[str, str]]:
    """Return names and bytes of the images below `root`, sorted by name, and {name: reason} of unusable ones.

    nested: those that lie in `root` itself are unusable"""
    sizes, bad = array("q"), {}

    def usable() -> Iterator[str]:
        for name, size in walk(root, SUFFIXES):
            if not size or nested and "/" not in name:
                bad[name] = "in no class folder" if size else "empty file or link to nothing"
            else:
                sizes.append(size)
                yield name

    names = Names(usable())
    if not names:
        hint = "; put them into folders named after their classes, or use --model.semantics=text or none" * nested
        raise UserError(f"no images in {'class folders of ' * nested}{str(root)!r}, {len(bad)} unusable files; looked "
                        f"for {' '.join(SUFFIXES)} in {root.absolute()} and all folders below{hint}")
    return names, sizes, bad


def index_classes(names: Sequence[str]) -> tuple[list[str], array]:
    """Return the outermost folders of these files, sorted, and the index of each file's folder."""
    classes = sorted({name.partition("/")[0] for name in names})
    index = {name: k for k, name in enumerate(classes)}
    return classes, array("i", (index[name.partition("/")[0]] for name in names))


def fingerprint(names: Sequence[str], sizes: Sequence[int], classes: list[str]) -> str:
    """Return sha256 of ascii(([(name, size), ...], classes)), made pair by pair."""
    digest, between = hashlib.sha256(b"(["), ""
    for pair in zip(names, sizes):
        digest.update(f"{between}{pair!a}".encode())
        between = ", "
    digest.update(f"], {classes!a})".encode())
    return digest.hexdigest()


def walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yield relative name and bytes of the files below `root` with these suffixes, sorted by name; 0 for a broken link.

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
            found = []
            try:
                for entry in [entry for entry in os.scandir(here) if not entry.name.startswith(".")]:
                    if entry.is_dir():
                        found.append((f"{name}{entry.name}/", 0))
                    elif entry.name.lower().endswith(suffixes) and (entry.is_file() or entry.is_symlink()):
                        found.append((name + entry.name, entry.stat().st_size if entry.is_file() else 0))
            except OSError as e:
                raise UserError(f"cannot read {e.filename!r}: {e.strerror}") from e
            todo += sorted(found, reverse=True)


class FolderImages:
    """All images of a folder and its subfolders, numbered in the order of their names.

    resolution: crop to the largest centred square and resize it to this side, as training does; 0 = leave them.
    `jpegs` counts JPEG files. An unreadable file raises a UserError: skipping it would change the result."""
    workers, broken = 4, 0              # threads that may read ahead; images that are not finite

    def __init__(self, path: Path, resolution: int) -> None:
        self.path, self.resolution = path, resolution
        self.source = ImageFolder(path, resolution, flip=False, max_bad=1, side=None, annotated=False)
        if empty := self.source.bad:
            raise UserError(f"{len(empty)} files of {path} are empty, e.g. {next(iter(empty))!r}; remove them")
        self.jpegs = sum(name.lower().endswith((".jpg", ".jpeg")) for name in self.source.names)

    def __len__(self) -> int:
        return len(self.source)

    def __call__(self, indices: np.ndarray) -> Tensor:
        """Return images number `indices` (B,) as uint8 (B, 3, H, W)."""
        images = [self.read(k) for k in indices]
        if len(shapes := {image.shape for image in images}) > 1:
            raise UserError(f"images of {self.path} have different sizes, e.g. {min(shapes)[:2]} and "
                            f"{max(shapes)[:2]}; give --center_crop=R to crop and resize them all")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def read(self, index: int) -> np.ndarray:
        """Return one image, uint8 (H, W, 3)."""
        file = self.path / self.source.names[index]
        try:
            if self.resolution:
                return to_uint8(self.source.load_record(index, 0)["image"][None])[0]
            return np.asarray(open_image(file)[0])
        except BadSample as e:
            raise UserError(f"{file} cannot be read: {e}") from e


class ArrayImages:
    """Images (n, H, W, 3) uint8 in an .npz (arr_0, as sample.py and [ADM] write it) or .npy, read when needed."""
    workers, broken, jpegs = 0, 0, 0

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.open() as file:
            np.lib.format.read_magic(file)
            self.shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            self.start = file.tell()
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or fortran or not self.shape[0]:
            raise UserError(f"{path} holds {dtype} {self.shape}; wanted uint8 (n, height, width, 3), values 0 to 255")

    def __len__(self) -> int:
        return self.shape[0]

    def __call__(self, indices: np.ndarray) -> Tensor:
        """Return images number `indices` (B,), which are consecutive, as uint8 (B, 3, H, W)."""
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
        """Open the bytes of the array. An uncompressed .npz can seek, so nothing else is read."""
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
    """Open a folder of images, or an .npz or .npy of them. UserError for anything else."""
    where = Path(path).expanduser()
    if where.is_dir():
        return FolderImages(where, resolution)
    if where.suffix not in (".npz", ".npy") or not where.is_file():
        raise UserError(f"no images at {path!r}; wanted a folder of PNG files, an .npz with arr_0 or an .npy")
    if resolution:
        raise UserError(f"--center_crop={resolution} is for folders; the images of {path} have one size already")
    return ArrayImages(where)
