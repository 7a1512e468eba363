"""Tar shards as img2dataset writes them: images, captions and original sizes, read in any order.

TarShards("cc12m", 256)                             a folder of .tar files
TarShards("cc12m/{00000..01242}.tar", 256)          a pattern; {a,b} works too

A sample is the members a/key.jpg, a/key.txt and a/key.json, one after the other; a key ends at the first dot of a
name. One walk over each tar finds where they lie, and INDEX beside the tars keeps it, so any sample is one read away.
Nothing is extracted or unpickled, and links and names that lead elsewhere are skipped.

Dimensions: n samples; an index row is the first 512-byte block and the bytes of the image, the .txt and the .json.
"""
import glob
import hashlib
import io
import itertools
import math
import os
import re
import sys
import tarfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from config import UserError
from runtime import log
from sources.images import (CROPS, SUFFIXES, BadCaption, BadImage, ImageSource, clean_caption, decode_utf8,
                            parse_object, pick_caption)

COLUMN = {**{suffix[1:]: 0 for suffix in SUFFIXES}, "txt": 2, "json": 4}        # of the end of a name, in an index
INDEX, FORMAT = ".index", 1             # folder of the indices, and the version of their format
MOST = 1_000_000                        # names in a pattern
LARGEST = 64 * 2 ** 20                  # bytes of a member
TARS = (".tar", ".tar.gz", ".tgz")      # the last two get an error that says to unpack them
BLOCK = tarfile.BLOCKSIZE


# ---------------------------------------------------------------- which files

def expand(pattern: str) -> list[str]:
    """All names of a pattern: {a,b} is either, {007..012} every number, as wide as the first. Braces do not nest."""
    parts = re.split(r"{([^{}]*)}", pattern)                            # text, braces, text, ..., text
    choices = [_choices(part) if k % 2 else [part] for k, part in enumerate(parts)]
    if re.search("[{}]", "".join(parts[::2])) or not 0 < math.prod(map(len, choices)) <= MOST:
        raise UserError(f"cannot expand {pattern!r}: braces hold a rising range such as {{00000..01242}} or a list "
                        f"such as {{a,b}}, do not nest, and make at most {MOST:,} names")
    return ["".join(words) for words in itertools.product(*choices)]


def _choices(inside: str) -> Sequence[str]:
    """All texts that one pair of braces stands for; none if it is neither a range nor a list."""
    if not (numbers := re.fullmatch(r"([0-9]{1,15})\.\.([0-9]{1,15})", inside)):
        return inside.split(",") if "," in inside else []
    span = range(int(numbers[1]), int(numbers[2]) + 1)
    wide = len(numbers[1]) if numbers[1][0] == "0" else 0
    return [f"{k:0{wide}}" for k in span] if len(span) <= MOST else []


def is_shards(where: str) -> bool:
    """Whether this path means tar shards: a pattern, a tar, or a folder with tars in it."""
    path = Path(where).expanduser()
    if path.is_dir():
        return bool(find_shards(where))
    return path.name.endswith(TARS) or "{" in where and not path.exists()


def find_shards(where: str) -> list[Path]:
    """The tar files of a pattern, in its order, or of a folder, by name and without hidden ones."""
    path = Path(where).expanduser()
    if path.is_dir():
        return [path / name for name in sorted(glob.glob("*", root_dir=path)) if name.endswith(TARS)]
    paths = [path] if path.exists() else [Path(name) for name in expand(str(path))]
    if missing := [str(p) for p in paths if not p.is_file()]:
        raise UserError(f"{len(missing)} of the {len(paths)} tar shards of {where!r} are missing, e.g. {missing[0]!r} "
                        f"(looked at {Path(missing[0]).absolute()})")
    return paths


# ---------------------------------------------------------------- where samples lie in a tar

def index(path: Path) -> tuple[np.ndarray, int]:
    """The samples (n, 6) uint32 of a tar, and the number of other members. Raises UserError for a damaged tar."""
    flat, seen, key, others = array("I"), set(), None, 0
    for name, offset, size in members(path):
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        column = COLUMN.get(suffix.lower())
        if column is None or not stem or name.startswith("/") or ".." in name.split("/"):
            others += 1
            continue
        before, key = key, (folder, stem)
        if key != before:
            flat.extend((0,) * 6)
        at = len(flat) - 6 + column
        if key != before and key in seen or flat[at]:
            raise UserError(f"{path}: {name!r} is there twice, is the second image of its sample, or lies apart from "
                            "the rest of it; write the tar again")
        seen.add(key)
        flat[at], flat[at + 1] = offset // BLOCK, min(size, 2 ** 32 - 1)
    if not seen:
        raise UserError(f"{path} holds no samples: none of its {others} members is an image, .txt or .json")
    return np.array(flat, np.uint32).reshape(-1, 6), others


def members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the content, bytes) of the members of a tar; the name of a link, pipe or folder is "/".

    Raises UserError unless the tar is whole: Python's tarfile takes some damage for the end, so nothing but the end
    mark, two blocks of zeros, may follow the last member."""
    end, count, total = 0, 0, path.stat().st_size
    try:
        with open(path, "rb") as file:
            tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
            while member := tar.next():
                if tar.offset <= end or member.size < 0:
                    raise tarfile.ReadError("a size below zero")
                end, count = tar.offset, count + 1
                tar.members.clear()                         # a million of them would be a gigabyte
                yield member.name if member.isreg() and not member.issparse() else "/", member.offset_data, member.size
            file.seek(end)
            if any(any(part) for part in iter(lambda: file.read(2 ** 20), b"")) or total < end + 2 * BLOCK:
                raise tarfile.ReadError("no end mark, or content after it")
    except Exception as e:                                  # damaged bytes raise nearly every type
        raise UserError(f"{path} is cut or damaged after entry {count:,} (byte {end:,} of {total:,}): {e}; fetch it "
                        "again, leave it out, or unpack it if it is compressed") from e


def cached_index(path: Path) -> tuple[np.ndarray, int]:
    """`index` of a tar, read from INDEX if the file there belongs to this tar as it is now."""
    stat, kept = path.stat(), path.parent / INDEX / f"{path.name}.npy"
    mark = zlib.crc32(repr((FORMAT, stat.st_size, stat.st_mtime_ns)).encode())
    try:
        table = np.load(kept, allow_pickle=False)
        if (table[0, 0], table[0, 2]) == (mark, zlib.crc32(table[1:].tobytes())):
            return table[1:], int(table[0, 1])
    except (OSError, ValueError, EOFError, IndexError):
        pass                                                # missing or damaged
    rows, others = index(path)
    head = np.array([[mark, others, zlib.crc32(rows.tobytes()), 0, 0, 0]], np.uint32)
    content = io.BytesIO()
    np.save(content, np.concatenate([head, rows]), allow_pickle=False)
    with log.warn_on_disk_error(f"the index of {path.name}"):
        kept.parent.mkdir(exist_ok=True)
        log.write_bytes(kept, content.getvalue())
    return rows, others


def read_member(file: BinaryIO, block: int, size: int) -> bytes | None:
    """The content of a member, None if block is 0. Raises BadImage if it is too large or the tar has been cut."""
    if block == 0:
        return None
    if size > LARGEST:
        raise BadImage(f"{size:,} bytes; at most {LARGEST:,} are read")
    file.seek(block * BLOCK)
    content = file.read(size)
    if len(content) < size:
        raise BadImage("the tar ends within it; it has changed since the start")
    return content


def member_name(shard: Path, row: np.ndarray) -> str:
    """Tar and member of the first file of a sample, such as 00012.tar/000120034.jpg, from its header."""
    with open(shard, "rb") as file:
        file.seek((min(int(block) for block in row[::2] if block) - 1) * BLOCK)
        name = file.read(100).split(b"\0")[0].decode("utf-8", "backslashreplace")
    return f"{shard.name}/{name}"


# ---------------------------------------------------------------- the source

class TarShards(ImageSource):
    """The samples of tar shards: image, caption from the .txt or else the .json, original size from the .json.

    captions    off: records have none, and samples need none; on: those without are unusable, like those without an
                image. Without original_height and original_width, the size is the image's own. The other arguments
                are those of Pictures."""
    def __init__(self, path: str | Path, resolution: int, seed: int = 0, flip: bool = True, max_bad: float = 0.01,
                 crop: str = "random", side: tuple[float, float] = CROPS["global"], captions: bool = True):
        self.with_captions = captions
        super().__init__(path, resolution, seed, flip, max_bad, crop, side)

    def scan(self) -> Iterator[tuple[str, str]]:
        """Processes that start together begin at different shards, and find the others' indices ready."""
        self.shards = find_shards(str(self.path))
        n, tables, others = len(self.shards), {}, 0
        start = os.getpid() * 7919 % n
        for s in tqdm([*range(start, n), *range(start)], desc="shards", unit="tar", disable=n < 10, leave=False):
            tables[s], more = cached_index(self.shards[s])
            others += more
        if others:
            tqdm.write(f"note: skipped {others:,} members of {self.path} that belong to no sample", sys.stderr)

        digest, whole, broken = hashlib.sha256(repr(self.with_captions).encode()), [], []
        for s, shard in enumerate(self.shards):
            digest.update(ascii((shard.name, tables[s].shape)).encode() + tables[s].tobytes())
            image, text, about = (tables[s][:, ::2] > 0).T
            usable = image & (text | about | (not self.with_captions))
            whole.append(tables[s][usable])
            broken += [(shard, row) for row in tables[s][~usable]]
        self.fingerprint, self.files = digest.hexdigest(), sum(map(len, tables.values()))
        self.rows, self.ends = np.concatenate(whole), np.cumsum([len(rows) for rows in whole])      # (n, 6), (shards,)
        if not len(self.rows):
            raise UserError(f"no sample of {str(self.path)!r} is whole: {self.files:,} lack an image or a text")
        return ((member_name(shard, row), "no caption, neither .txt nor .json" if row[0] else "no image with its text")
                for shard, row in broken)

    def __len__(self) -> int:
        return len(self.rows)

    def shard(self, index: int) -> Path:
        """The tar with this sample."""
        return self.shards[int(np.searchsorted(self.ends, index, side="right"))]

    def name(self, index: int) -> str:
        """Tar and member."""
        return member_name(self.shard(index), self.rows[index])

    def load(self, index: int, epoch: int) -> tuple[BinaryIO, dict[str, Any]]:
        """Its image, its caption, and the original size if the .json has it."""
        row = self.rows[index].tolist()
        try:
            with open(self.shard(index), "rb") as file:
                image, text, about = (read_member(file, *row[k:k + 2]) for k in (0, 2, 4))
        except OSError as e:
            raise BadImage(f"{type(e).__name__}: {e}") from e
        fields, known = parse_object(about) if about else {}, {}
        size = fields.get("original_height"), fields.get("original_width")
        if size != (None, None):
            if not all(type(side) is int and 0 < side < 10 ** 6 for side in size):
                raise BadCaption(f"original_height and original_width are {size} in its .json")
            known["size"] = size
        if self.with_captions:
            known["caption"] = (pick_caption(fields.get("caption"), 0) if text is None
                                else clean_caption(decode_utf8(text)))
        return io.BytesIO(image), known
