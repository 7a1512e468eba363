"""Tar shards as img2dataset writes them: images, captions and original sizes, read in any order.

A sample is the members a/key.jpg, a/key.txt and a/key.json, one after the other; a key ends at the first dot of a
name. One walk over each tar finds where they lie, and INDEX beside the tars keeps it, so any sample is one read away.
Nothing is extracted or unpickled, and links and names that lead elsewhere are skipped.

Dimensions: n samples; an index row is the first 512-byte block and the bytes of the image, the .txt and the .json.
"""
import glob
import hashlib
import io
import math
import os
import re
import tarfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from config import UserError
from runtime import log
from sources.images import SUFFIXES, BadSample, ImageSource, clean_caption, decode_utf8, parse_object, pick_caption

COLUMN = {**{suffix[1:]: 0 for suffix in SUFFIXES}, "txt": 2, "json": 4}        # of the end of a name, in an index
INDEX, FORMAT = ".index", 1             # folder of the indices, and the version of their format
BRACES = re.compile(r"{(?:([0-9]{1,15})\.\.([0-9]{1,15})|([^{}]*,[^{}]*))}")
MAX_NAMES = 1_000_000                   # of a pattern
MAX_BYTES = 64 * 2 ** 20                # of a member
BLOCK = tarfile.BLOCKSIZE


def expand(pattern: str) -> list[str]:
    """Return all names of a pattern: {a,b} is either, {007..012} every number, at least as wide as the first."""
    parts = BRACES.split(pattern)                                       # text, first, last, list, text, ..., text
    spans = [range(int(first), int(last) + 1) if first else words.split(",")
             for first, last, words in zip(*(parts[k::4] for k in (1, 2, 3)))]
    if re.search("[{}]", "".join(parts[::4])) or not 0 < math.prod(map(len, spans)) <= MAX_NAMES:
        raise UserError(f"cannot expand {pattern!r}: braces hold a rising range such as {{00000..01242}} or a list "
                        f"such as {{a,b}}, do not nest, and make at most {MAX_NAMES:,} names")
    names = [parts[0]]
    for first, span, text in zip(parts[1::4], spans, parts[4::4]):
        names = [name + str(word).zfill(len(first or "")) + text for name in names for word in span]
    return names


def find_shards(where: str) -> list[Path]:
    """Return the tar files of a pattern, in its order, or of a folder, by name and without hidden ones."""
    path = Path(where).expanduser()
    if path.is_dir():
        return [path / name for name in sorted(glob.glob("*.tar", root_dir=path))]
    paths = [path] if path.exists() else [Path(name) for name in expand(str(path))]
    if missing := [str(p) for p in paths if not p.is_file()]:
        raise UserError(f"{len(missing)} of the {len(paths)} tar shards of {where!r} are missing, e.g. {missing[0]!r} "
                        f"(looked at {Path(missing[0]).absolute()})")
    return paths


def index(path: Path) -> np.ndarray:
    """Return the samples (n, 6) uint32 of a tar. Raises UserError for a damaged tar."""
    flat, seen, key = array("I"), set(), None
    for name, offset, size in members(path):
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        column = COLUMN.get(suffix.lower())
        if column is None or not stem or name.startswith("/") or ".." in name.split("/"):
            continue
        before, key = key, (folder, stem)
        if key != before:
            flat.extend((0,) * 6)
        at = len(flat) - 6 + column
        if key != before and key in seen or flat[at]:
            raise UserError(f"{path}: {name!r} comes twice, is the second image of its sample, or lies apart from the "
                            "rest of it; write the tar again")
        seen.add(key)
        flat[at], flat[at + 1] = offset // BLOCK, min(size, 2 ** 32 - 1)
    if not seen:
        raise UserError(f"{path} holds no samples: none of its members is an image, .txt or .json")
    return np.array(flat, np.uint32).reshape(-1, 6)


def members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset of the content, bytes) of the regular files in a tar.

    Raises UserError unless the tar is whole: Python's tarfile takes some damage for the end, so nothing but the end
    mark, two blocks of zeros, may follow the last member."""
    end, total = 0, path.stat().st_size
    try:
        with open(path, "rb") as file:
            tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
            while member := tar.next():
                if tar.offset <= end or member.size < 0:
                    raise tarfile.ReadError("a size below zero")
                end = tar.offset
                tar.members.clear()                         # a million of them would be a gigabyte
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
            file.seek(end)
            if any(any(part) for part in iter(lambda: file.read(2 ** 20), b"")) or total < end + 2 * BLOCK:
                raise tarfile.ReadError("no end mark, or content after it")
    except Exception as e:                                  # damaged bytes raise nearly every type
        raise UserError(f"{path} is cut, damaged or compressed after byte {end:,} of {total:,}: {e}") from e


def cached_index(path: Path) -> np.ndarray:
    """Return `index` of a tar, read from INDEX if the file there belongs to this tar as it is now."""
    stat, kept = path.stat(), path.parent / INDEX / f"{path.name}.npy"
    mark = zlib.crc32(repr((FORMAT, stat.st_size, stat.st_mtime_ns)).encode())
    try:
        table = np.load(kept, allow_pickle=False)
        if (table[0, 0], table[0, 2]) == (mark, zlib.crc32(table[1:].tobytes())):
            return table[1:]
    except (OSError, ValueError, EOFError, IndexError):
        pass                                                # missing or damaged
    rows, content = index(path), io.BytesIO()
    head = np.array([[mark, 0, zlib.crc32(rows.tobytes()), 0, 0, 0]], np.uint32)
    np.save(content, np.concatenate([head, rows]), allow_pickle=False)
    with log.warn_on_disk_error(f"the index of {path.name}"):
        kept.parent.mkdir(exist_ok=True)
        log.write_bytes(kept, content.getvalue())
    return rows


def read_member(file: BinaryIO, block: int, size: int) -> bytes | None:
    """Return the content of a member, None if block is 0. BadSample if it is too large or the tar has been cut."""
    if block == 0:
        return None
    if size > MAX_BYTES:
        raise BadSample(f"{size:,} bytes; at most {MAX_BYTES:,} are read")
    file.seek(block * BLOCK)
    content = file.read(size)
    if len(content) < size:
        raise BadSample("the tar ends within it; it has changed since the start")
    return content


def member_name(shard: Path, row: np.ndarray) -> str:
    """Return tar and member of the first file of a sample, such as 00012.tar/000120034.jpg, from its header."""
    with open(shard, "rb") as file:
        file.seek((min(int(block) for block in row[::2] if block) - 1) * BLOCK)
        name = file.read(100).split(b"\0")[0].decode("utf-8", "backslashreplace")
    return f"{shard.name}/{name}"


class TarShards(ImageSource):
    """The samples of tar shards: image, caption from the .txt or else the .json, original size from the .json.

    Without original_height and original_width, the size is the image's own. Samples without an image are unusable.
    annotated   on: so are those without a caption; off: records have none"""
    @staticmethod
    def takes(where: str) -> bool:
        """Whether this value of --data is tar shards: a pattern, a tar, or a folder with tars in it."""
        path = Path(where).expanduser()
        if path.is_dir():
            return bool(find_shards(where))
        return path.suffix == ".tar" or "{" in where and not path.exists()

    def scan(self) -> Iterator[tuple[str, str]]:
        """Processes that start together begin at different shards, and find the others' indices ready."""
        self.shards = find_shards(str(self.path))
        n, tables = len(self.shards), {}
        start = os.getpid() * 7919 % n
        for s in tqdm([*range(start, n), *range(start)], desc="shards", unit="tar", disable=n < 10, leave=False):
            tables[s] = cached_index(self.shards[s])

        digest, whole, broken = hashlib.sha256(repr(self.annotated).encode()), [], []
        for s, shard in enumerate(self.shards):
            digest.update(ascii((shard.name, tables[s].shape)).encode() + tables[s].tobytes())
            image, text, about = (tables[s][:, ::2] > 0).T
            usable = image & (text | about | (not self.annotated))
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
        return self.shards[int(np.searchsorted(self.ends, index, side="right"))]

    def name(self, index: int) -> str:
        return member_name(self.shard(index), self.rows[index])

    def load(self, index: int, epoch: int) -> tuple[BinaryIO, dict[str, Any]]:
        row = self.rows[index].tolist()
        with open(self.shard(index), "rb") as file:
            image, text, about = (read_member(file, *row[k:k + 2]) for k in (0, 2, 4))
        fields, known = parse_object(about) if about else {}, {}
        size = fields.get("original_height"), fields.get("original_width")
        if size != (None, None):
            if not all(type(side) is int and 0 < side < 10 ** 6 for side in size):
                raise BadSample(f"original_height and original_width are {size} in its .json")
            known["size"] = size
        if self.annotated:
            known["caption"] = (pick_caption(fields.get("caption"), 0) if text is None
                                else clean_caption(decode_utf8(text)))
        return io.BytesIO(image), known
