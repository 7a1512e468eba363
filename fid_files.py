"""Images for evaluation, in a folder or in one array, read by number.

images = open_pictures("folder")                    or an .npz (arr_0) or .npy of uint8
images(np.arange(8, 16))                            uint8 (8, 3, H, W)

Dimensions: B batch, H x W pixels, n images.
"""
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from config import UserError
from folders import ImageFolder, find_images
from pictures import BadImage, open_image


class Folder:
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


class Stack:
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


def open_pictures(path: str, resolution: int = 0) -> Folder | Stack:
    """A folder of images, or an .npz or .npy of them. UserError for anything else."""
    where = Path(path).expanduser()
    if where.is_dir():
        return Folder(where, resolution)
    if where.suffix not in (".npz", ".npy") or not where.is_file():
        raise UserError(f"no images at {path!r}; wanted a folder of PNG files, an .npz with arr_0 or an .npy")
    if resolution:
        raise UserError(f"--square={resolution} is for folders; the images of {path} have one size already")
    return Stack(where)
