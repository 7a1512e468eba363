"""Tar shards as img2dataset writes them: pictures, captions and sizes of the originals, read in any order.

TarShards("cc12m", 256)                             a folder of .tar files
TarShards("cc12m/{00000..01242}.tar", 256)          a pattern; {a,b} works too

A sample is the members a/key.jpg, a/key.txt and a/key.json, one after the other; a key ends at the first dot of a
name. Each tar is walked once, to its very end: Python's tarfile takes damage in the middle for the end, so what
follows the last member has to be the end mark. Where samples lie is kept in INDEX beside the tars, and from then on
any sample is one read away: order is a function of seed and step, as for every source. Members are never extracted,
links and names that lead elsewhere are passed over, and nothing is unpickled.
Dimensions: n samples; the columns of an index are first 512-byte block and bytes of the picture, .txt and .json.
"""
import hashlib
import io
import os
import re
import sys
import tarfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

import checkpoint
from config import UserError
from folders import CROPS, SUFFIXES, Pictures
from pictures import BadImage
from wording import BadCaption, choose, clean, decode, parse_object

COLUMN = {**{suffix[1:]: 0 for suffix in SUFFIXES}, "txt": 2, "json": 4}        # of what a name ends in
INDEX, FORMAT = ".index", 1             # folder of the indices; a file of another FORMAT is made again
MOST = 1_000_000                        # names that a pattern may stand for
LARGEST = 64 * 2 ** 20                  # bytes of a member that are read
TARS = (".tar", ".tar.gz", ".tgz")      # what counts as a shard; the last two are refused by name
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BLOCK = tarfile.BLOCKSIZE


# ---------------------------------------------------------------- which files

def expand(pattern: str) -> list[str]:
    """The names that a pattern stands for: {a,b} either, {007..012} every number, as wide as it is written.

    Several of them multiply, the last running fastest; they do not nest. UserError for any other brace."""
    names, rest = [""], pattern
    while rest:
        text, brace, rest = rest.partition("{")
        inside, closed, rest = rest.partition("}") if brace else ("", "", "")
        if "}" in text or "{" in inside or brace and not closed:
            raise UserError(f"unbalanced braces in {pattern!r}; {{00000..01242}} and {{a,b}} are understood")
        choices = _choices(inside, pattern) if brace else [""]
        if len(names) * len(choices) > MOST:
            raise UserError(f"{pattern!r} stands for more than {MOST:,} names")
        names = [name + text + choice for name in names for choice in choices]
    return names


def _choices(inside: str, pattern: str) -> list[str]:
    """What one pair of braces stands for."""
    numbers = re.fullmatch(r"([0-9]{1,15})\.\.([0-9]{1,15})", inside)
    if numbers and int(numbers[1]) <= int(numbers[2]) < int(numbers[1]) + MOST:
        wide = len(numbers[1]) if numbers[1][0] == "0" else 0
        return [f"{k:0{wide}}" for k in range(int(numbers[1]), int(numbers[2]) + 1)]
    if "," in inside:
        return inside.split(",")
    raise UserError(f"{{{inside}}} in {pattern!r} is neither a rising range such as {{00000..01242}}, of at "
                    f"most {MOST:,} numbers, nor a list such as {{a,b}}")


def is_shards(where: str) -> bool:
    """Whether this path is one of tar shards: a pattern, a tar, or a folder with tars in it."""
    path = Path(where).expanduser()
    if path.is_dir():
        return any(name.endswith(TARS) and not name.startswith(".") for name in os.listdir(path))
    return path.name.endswith(TARS) or "{" in where and not path.exists()


def find_shards(where: str) -> list[Path]:
    """The tar files of a path that `is_shards`, in the order of the pattern or of their names."""
    path = Path(where).expanduser()
    if path.is_dir():
        return [path / name for name in sorted(os.listdir(path)) if name.endswith(TARS) and name[0] != "."]
    paths = [path] if path.exists() else [Path(name) for name in expand(str(path))]
    missing = [str(p) for p in paths if not p.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of the {len(paths)} tar shards of {where!r} are not there, e.g. "
                        f"{missing[0]!r} (looked at {Path(missing[0]).absolute()})")
    return paths


# ---------------------------------------------------------------- what is where in one of them

def index(path: Path) -> tuple[np.ndarray, int]:
    """The samples (n, 6) uint32 of a tar, and how many members are none of theirs. UserError for any damage."""
    flat, seen, key, others = array("I"), set(), None, 0
    for name, offset, size in members(path):
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        column = COLUMN.get(suffix.lower())
        if column is None or not stem or name.startswith("/") or ".." in name.split("/"):
            others += 1
            continue
        if key != (key := (folder, stem)):
            if key in seen:
                raise UserError(f"{path}: the files of {name!r} are not all together, or there twice; write it again")
            seen.add(key)
            flat.extend((0,) * 6)
        at = len(flat) - 6 + column
        if flat[at]:
            raise UserError(f"{path}: there are two of {name!r}, or two pictures of its name; write it again")
        flat[at], flat[at + 1] = offset // BLOCK, min(size, 2 ** 32 - 1)
    if not seen:
        raise UserError(f"{path} holds no samples: of its {others} members none is a picture, .txt or .json")
    return np.array(flat, np.uint32).reshape(-1, 6), others


def members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the content, bytes) of the files of a tar, and an offset of 0 for what is no file.

    UserError unless the tar is whole up to its end mark. A byte of a name that is not UTF-8 stays what it is."""
    total, count, end = path.stat().st_size, 0, 0

    def damaged(why: Any) -> UserError:
        return UserError(f"{path} is cut or damaged after entry {count:,} (byte {end:,} of {total:,}): {why}; fetch "
                         "it again or leave it out")

    with open(path, "rb") as file:
        magic = file.read(6)
        if packed := [kind for start, kind in PACKED.items() if magic.startswith(start)]:
            raise UserError(f"{path} is packed with {packed[0]}, which has to be read from its beginning; "
                            "unpack it to a .tar")
        file.seek(0)
        tar = None
        while True:
            try:                                            # damaged bytes raise nearly every type there is
                tar = tar or tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
                member = tar.next()
            except Exception as e:
                raise damaged(str(e) or type(e).__name__) from e
            if member is None:
                break
            if tar.offset <= end or member.size < 0:
                raise damaged("a size below zero")
            end, count = tar.offset, count + 1
            tar.members.clear()                             # a million of them would be a gigabyte
            real = member.isreg() and not member.issparse()
            yield member.name if real else "/", member.offset_data, member.size

        file.seek(end)
        mark = file.read(2 * BLOCK)
        if len(mark) < 2 * BLOCK or any(mark):
            raise damaged("no end mark")
        while rest := file.read(2 ** 20):
            if any(rest):
                raise damaged("content after the end mark")


def cached_index(path: Path) -> tuple[np.ndarray, int]:
    """`index` of a tar, from the file in INDEX beside it if that was made from this tar as it is now."""
    stat, kept = path.stat(), path.parent / INDEX / f"{path.name}.npy"
    mark = zlib.crc32(repr((FORMAT, stat.st_size, stat.st_mtime_ns)).encode())
    try:
        table = np.load(kept, allow_pickle=False)
        if table.dtype == np.uint32 and table.ndim == 2 and table.shape[1] == 6:
            (made_of, others, check, *_), rows = table[0].tolist(), table[1:]
            if made_of == mark and check == zlib.crc32(rows.tobytes()):
                return rows, others
    except (OSError, ValueError, EOFError, IndexError):
        pass                                                # not there yet, or not whole
    rows, others = index(path)
    head = np.array([[mark, others, zlib.crc32(rows.tobytes()), 0, 0, 0]], np.uint32)
    content = io.BytesIO()
    np.save(content, np.concatenate([head, rows]), allow_pickle=False)
    try:
        kept.parent.mkdir(exist_ok=True)
        checkpoint.write_bytes(kept, content.getvalue())
    except OSError as e:
        tqdm.write(f"warning: the index of {path.name} is not kept, and made again next time: {e}", sys.stderr)
    return rows, others


# ---------------------------------------------------------------- the source

class TarShards(Pictures):
    """The samples of tar shards: picture, caption from .txt or else the .json, size of the original from the .json.

    Samples without a picture or, with `captions`, without a text count as bad; with captions off they need none, and
    records have none. The size is original_height and original_width of the .json, else the picture's own. The other
    arguments are those of Pictures."""
    def __init__(self, path: str | Path, resolution: int, seed: int = 0, flip: bool = True, max_bad: float = 0.01,
                 crop: str = "random", side: tuple[float, float] = CROPS["global"], captions: bool = True):
        super().__init__(path, resolution, seed, flip, max_bad, crop, side)
        self.shards, self.with_captions = find_shards(str(path)), captions
        tables, others = self.read_tables()
        whole = [(t[:, 0] > 0) & ((t[:, 2] > 0) | (t[:, 4] > 0) | (not captions)) for t in tables]
        self.rows = np.concatenate([t[w] for t, w in zip(tables, whole)])                           # (n, 6)
        self.ends = np.cumsum([w.sum() for w in whole])                 # of each shard, among all samples
        digest = hashlib.sha256(repr(captions).encode())
        for shard, table in zip(self.shards, tables):
            digest.update(ascii((shard.name, table.shape)).encode() + table.tobytes())
        self.fingerprint, self.files = digest.hexdigest(), sum(map(len, tables))
        if others:
            tqdm.write(f"note: {others:,} members of {path} are no part of a sample and are passed over", sys.stderr)

        for shard, table, ok in zip(self.shards, tables, whole):
            for row in table[~ok]:
                lacking = "caption, neither .txt nor .json" if row[0] else "picture beside its text"
                self.note_bad(member_name(shard, row), f"no {lacking}")
        if not len(self.rows):
            raise UserError(f"no sample of {str(path)!r} is whole: {self.files:,} lack a picture or a text")

    def read_tables(self) -> tuple[list[np.ndarray], int]:
        """The index of every shard, in order, and the members that are no part of a sample.

        Processes that start together begin at different shards, and find the others' work done."""
        n, tables, others = len(self.shards), {}, 0
        start = os.getpid() * 7919 % n
        for k in tqdm([*range(start, n), *range(start)], desc="shards", unit="tar", disable=n < 10, leave=False):
            tables[k], more = cached_index(self.shards[k])
            others += more
        return [tables[k] for k in range(n)], others

    def __len__(self) -> int:
        return len(self.rows)

    def shard(self, index: int) -> Path:
        """The tar that a sample lies in."""
        return self.shards[int(np.searchsorted(self.ends, index, side="right"))]

    def name(self, index: int) -> str:
        """Tar and member, such as 00012.tar/000120034.jpg."""
        return member_name(self.shard(index), self.rows[index])

    def load(self, index: int, epoch: int) -> tuple[BinaryIO, dict[str, Any]]:
        """Its picture; its caption, if they are wanted; the size of the original, if the .json says it."""
        row = self.rows[index].tolist()
        try:
            with open(self.shard(index), "rb") as file:
                picture, text, about = (read_member(file, *row[k:k + 2]) for k in (0, 2, 4))
        except OSError as e:
            raise BadImage(f"{type(e).__name__}: {e}") from e
        fields, known = parse_object(about) if about else {}, {}
        size = fields.get("original_height"), fields.get("original_width")
        if size != (None, None):
            if not all(type(side) is int and 0 < side < 10 ** 6 for side in size):
                raise BadCaption(f"original_height and original_width are {size} in its .json")
            known["size"] = size
        if self.with_captions:
            known["caption"] = choose(fields.get("caption"), 0) if text is None else clean(decode(text))
        return io.BytesIO(picture), known


def read_member(file: BinaryIO, block: int, size: int) -> bytes | None:
    """The content of a member; None if there is none. BadImage if it is too large or the tar has become shorter."""
    if block == 0:
        return None
    if size > LARGEST:
        raise BadImage(f"{size:,} bytes; up to {LARGEST:,} are read")
    file.seek(block * BLOCK)
    content = file.read(size)
    if len(content) < size:
        raise BadImage("the tar ends within it; it has changed since the start")
    return content


def member_name(shard: Path, row: np.ndarray) -> str:
    """What the header in front of the first member of a sample calls it."""
    first = min(int(block) for block in row[::2] if block)
    with open(shard, "rb") as file:
        file.seek((first - 1) * BLOCK)
        header = file.read(BLOCK)
    name = header[:100].split(b"\0")[0].decode("utf-8", "backslashreplace")
    return f"{shard.name}/{name}"
