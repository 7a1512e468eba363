"""What fid.py reads and writes: statistics of a data set, and pictures from a folder or an array.

read_reference("ref.npz", extract)              Reference; refused if made with other features, weights or resize
open_pictures("folder" or "samples.npz")        called with numbers (B,), gives pictures (B, 3, H, W) uint8

Dimensions: B batch, H x W pixels, n pictures, D features.
"""
import hashlib
import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

import checkpoint
from config import UserError
from distances import FeatureStats
from folders import ImageFolder, find_images
from pictures import BadImage, open_image
from sample import to_uint8

FORMAT = 1                              # of our statistics files; a newer one is refused
DECODERS = 4                            # threads that decode files


# ---------------------------------------------------------------- statistics of real pictures

@dataclass(frozen=True)
class Reference:
    """Mean (D,) and covariance (D, D) of real pictures, and what is known of them; rows (n, D) if kept for KID."""
    path: str
    sha256: str
    mu: Tensor
    sigma: Tensor
    n: int = 0                          # 0 = not said
    data: str = ""
    labelled: bool = False              # the file says what it was made with
    rows: Tensor | None = None


def write_reference(path: Path, stats: FeatureStats, extract: Any, source: str, rows: Tensor | None) -> None:
    """Statistics that pytorch-fid and other tools read too (mu, sigma), and what they were made with."""
    arrays = dict(mu=stats.mean.cpu().numpy(), sigma=stats.cov.cpu().numpy(), n=stats.n, features=extract.name,
                  weights_sha256=extract.sha256, resize=extract.resize, data=source, version=FORMAT)
    content = io.BytesIO()
    np.savez(content, **arrays, **({} if rows is None else {"rows": rows.cpu().numpy()}))
    checkpoint.write_bytes(path, content.getvalue())


def read_reference(path: str, extract: Any) -> Reference:
    """Statistics in an .npz of ours, of pytorch-fid, [ADM], [EDM] or clean-fid. Nothing is unpickled.

    UserError for a missing or damaged file, and for one that says it was made with other features than `extract`."""
    if not path:
        raise UserError("FID and KID need --ref=FILE.npz, the statistics of real pictures; make one with: "
                        "python fid.py ref --images=FOLDER --to=FILE.npz")
    content = _read(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            keys = ("mu", "sigma", "n", "features", "weights_sha256", "resize", "data", "version", "rows")
            found = {key: file[key] for key in keys if key in file.files}
            there = ", ".join(file.files)
    except (ValueError, OSError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is no .npz of plain arrays (pickles are not read, they run code): {e}") from e
    if not {"mu", "sigma"} <= set(found):
        raise UserError(f"{path} has no mu and sigma; it holds {there or 'nothing'}. Pictures become statistics "
                        f"with: python fid.py ref --images={path} --to=FILE.npz")
    if found.get("version", 0) > FORMAT:
        raise UserError(f"{path} has format {found['version']}, this code reads up to {FORMAT}; update it")

    made = {"features": extract.name, "weights_sha256": extract.sha256, "resize": extract.resize}
    wrong = [f"{key} {found[key]}, wanted {want}" for key, want in made.items() if found.get(key, want) != want]
    if wrong:
        raise UserError(f"{path} was made with {'; '.join(wrong)}. Such numbers cannot be compared")
    labelled = set(made) <= set(found)
    if not labelled and extract.resize != "tf1":
        raise UserError(f"{path} does not say how its pictures were resized, so --resize={extract.resize} cannot be "
                        f"compared with it; make one with: python fid.py ref --resize={extract.resize}")
    mu, sigma = (torch.from_numpy(found[key].astype(np.float64)) for key in ("mu", "sigma"))
    check_statistics(path, mu, sigma, extract.dim)
    rows = torch.from_numpy(found["rows"]) if "rows" in found else None
    return Reference(path, hashlib.sha256(content).hexdigest(), mu, sigma, int(found.get("n", 0)),
                     str(found.get("data", "")), labelled, rows)


def find_reference(path: str, metrics: str, extract: Any) -> Reference | None:
    """What pictures are compared with; None if nothing is to be: the Inception Score has no reference."""
    return read_reference(path, extract) if set(metrics.split("+")) - {"is"} else None


def check_statistics(path: str, mu: Tensor, sigma: Tensor, dim: int) -> None:
    """UserError unless these are a mean and a covariance of `dim` features."""
    if mu.shape != (dim,) or sigma.shape != (dim, dim):
        raise UserError(f"{path} has mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)}; wanted ({dim},) and "
                        f"({dim}, {dim}): other features")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise UserError(f"{path} holds inf or nan")
    if not torch.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * sigma.abs().max().item()):
        raise UserError(f"{path}: sigma is not symmetric, so it is no covariance")


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as e:
        raise UserError(f"cannot read the reference {path!r}: {e.strerror or e}") from e


# ---------------------------------------------------------------- pictures

class Folder:
    """The pictures of a folder and of those below it, in the order of their names, which is their number.

    resolution: cut to the largest centred square and resized to it, as training does; 0 = as they are. `jpegs` counts
    files that have lost detail. An unreadable file is a UserError: nothing is passed over or drawn twice."""
    broken = 0                          # pictures that are not finite: none where all are bytes

    def __init__(self, path: Path, resolution: int = 0) -> None:
        self.names, _, bad = find_images(path)
        if bad:
            raise UserError(f"{len(bad)} files of {path} are empty, e.g. {next(iter(bad))!r}; remove them")
        self.path, self.workers = path, DECODERS
        self.jpegs = sum(name.lower().endswith((".jpg", ".jpeg")) for name in self.names)
        self.square = None
        if resolution:
            self.square = ImageFolder(path, resolution, flip=False, max_bad=0, crop="center", classes=False)

    def __len__(self) -> int:
        return len(self.names)

    def __call__(self, indices: np.ndarray) -> Tensor:
        """Pictures number `indices` (B,), (B, 3, H, W) uint8."""
        images = [self.read(int(k)) for k in indices]
        if len({image.shape for image in images}) > 1:
            sizes = sorted({image.shape[:2] for image in images})
            raise UserError(f"pictures of {self.path} have different sizes, e.g. {sizes[0]} and {sizes[-1]}; give "
                            f"--square=R to cut and resize all alike, as the others of the comparison were")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def read(self, index: int) -> np.ndarray:
        """One picture, (H, W, 3) uint8."""
        try:
            if self.square:
                return to_uint8(self.square.render(index, 0)["image"][None])[0]
            return np.asarray(open_image(self.path / self.names[index])[0])
        except BadImage as e:
            raise UserError(f"{self.path / self.names[index]} cannot be read: {e}") from e


class Stack:
    """Pictures (n, H, W, 3) uint8 in an .npz (arr_0, as sample.py and [ADM] write it) or .npy, read when wanted."""
    jpegs, workers, broken = 0, 0, 0

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0
        with self.reading("its header") as file:
            magic = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if magic == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(file)
            self.start = file.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or not shape[0]:
            raise UserError(f"{path} holds {dtype} {shape}; wanted uint8 (n, height, width, 3), values 0 to 255")
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __call__(self, indices: np.ndarray) -> Tensor:
        """Pictures number `indices` (B,), a run of numbers. (B, 3, H, W) uint8"""
        row, (first, last) = int(np.prod(self.shape[1:])), (int(indices[0]), int(indices[-1]))
        with self.reading(f"pictures {first} to {last}") as file:
            file.seek(self.start + first * row)
            content = file.read((last + 1 - first) * row)
        if len(content) < (last + 1 - first) * row:
            raise UserError(f"{self.path} ends before picture {last}; it is damaged")
        images = torch.from_numpy(np.frombuffer(bytearray(content), np.uint8).reshape(-1, *self.shape[1:]))
        return images.permute(0, 3, 1, 2)

    @contextmanager
    def reading(self, what: str) -> Iterator[BinaryIO]:
        """The array's bytes. An .npz that is not compressed is not read up to where it is wanted."""
        try:
            if self.path.suffix == ".npy":
                with open(self.path, "rb") as file:
                    yield file
            else:
                with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                    yield file
        except UserError:
            raise
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as e:
            raise UserError(f"cannot read {what} of {self.path}: {e}; wanted an array arr_0 of pictures") from e


def open_pictures(path: str, resolution: int = 0) -> Folder | Stack:
    """A folder of pictures, or an .npz or .npy of them. UserError for anything else."""
    where = Path(path).expanduser()
    if where.is_dir():
        return Folder(where, resolution)
    if where.suffix not in (".npz", ".npy") or not where.is_file():
        raise UserError(f"no pictures at {path!r}; wanted a folder of PNG files, an .npz with arr_0 or an .npy")
    if resolution:
        raise UserError(f"--square={resolution} is for folders; {path} has pictures of one size already")
    return Stack(where)


def first_pictures(path: str, n: int, square: int) -> tuple[Folder | Stack, int]:
    """The pictures at `path` and how many of them to take: n, or all if n is 0. UserError if there are fewer."""
    pictures = open_pictures(path, square)
    if n > len(pictures):
        raise UserError(f"n={n} pictures were asked for, but {path} has {len(pictures)}; draw more, or ask "
                        f"for fewer")
    return pictures, n or len(pictures)
