"""COCO captions, for evaluation: pictures that people have described five times each, one of the five by seed.

CocoCaptions("coco", 256)           coco/annotations/captions_val2014.json, pictures in coco/val2014/
read("captions_val2014.json")       file names and captions by image, with no picture opened

The same seed gives the same caption of an image wherever it is asked, so that two evaluations see the same prompts.
"""
import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from config import UserError
from folders import CROPS, Pictures
from rng import seed64
from wording import BadCaption, choose, clean, decode

PREFERRED = "captions_val2014.json"     # what papers evaluate on


class CocoCaptions(Pictures):
    """Images of a COCO captions file in the order of their numbers, each with one of its captions, drawn by seed.

    path: the captions json, or the folder above annotations/. Images without a caption or a file count as bad. The
    other arguments are those of Pictures."""
    def __init__(self, path: str | Path, resolution: int, seed: int = 0, flip: bool = True, max_bad: float = 0.01,
                 crop: str = "random", side: tuple[float, float] = CROPS["global"]):
        super().__init__(path, resolution, seed, flip, max_bad, crop, side)
        file = find_json(self.path)
        names, captions = read(file)
        root = file.parent.parent if file.parent.name == "annotations" else file.parent
        named = root / file.stem.removeprefix("captions_")              # captions_val2014.json: val2014
        self.folder, bad = named if named.is_dir() else root, {}
        for number, name in names.items():
            if number not in captions:
                bad[name] = "no caption"
            elif not (self.folder / name).is_file():
                bad[name] = f"no such file in {self.folder}"
        self.numbers = [number for number in sorted(names) if names[number] not in bad]
        if not self.numbers:
            raise UserError(f"none of the {len(names)} images of {file} is in {self.folder} and has a caption")
        self.names = [names[number] for number in self.numbers]
        self.captions = [captions[number] for number in self.numbers]
        self.fingerprint = hashlib.sha256(ascii((self.numbers, self.names, self.captions)).encode()).hexdigest()
        self.files = len(names)
        for name, reason in bad.items():
            self.note_bad(name, reason)

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        """Its file name."""
        return self.names[index]

    def load(self, index: int, epoch: int) -> tuple[Path, dict[str, Any]]:
        """Its path and the caption that the seed draws of it, the same in every epoch."""
        draw = seed64(self.seed, "coco", self.numbers[index])
        return self.folder / self.names[index], {"caption": choose(self.captions[index], draw)}


def find_json(path: Path) -> Path:
    """The captions file of this path. UserError if there is none or no way to tell which."""
    if path.is_file():
        return path
    found = sorted(path.glob("annotations/captions_*.json"))
    wanted = [file for file in found if file.name == PREFERRED] or found
    if len(wanted) != 1:
        raise UserError(f"coco:PATH wants a captions json, or a folder with annotations/{PREFERRED}; in "
                        f"{str(path)!r} there are {', '.join(file.name for file in found) or 'none'}")
    return wanted[0]


def read(file: Path | str) -> tuple[dict[int, str], dict[int, list[str]]]:
    """{image: file name} and {image: captions, in the order of their own numbers} of a COCO captions json.

    UserError if it is not one, or if a file name leads out of the folder."""
    try:
        tree = json.loads(decode(Path(file).read_bytes()))
        names = {row["id"]: row["file_name"] for row in tree["images"]}
        rows = sorted((row["id"], row["image_id"], row["caption"]) for row in tree["annotations"])
        captions: dict[int, list[str]] = {}
        for _, number, text in rows:
            captions.setdefault(number, []).append(clean(text))
        outside = [n for n in names.values() if PurePosixPath(n).is_absolute() or ".." in PurePosixPath(n).parts]
        if not all(type(number) is int for number in (*names, *captions)):
            raise TypeError("a number of an image is no whole number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        why = str(e) if isinstance(e, (BadCaption, OSError)) else f"{type(e).__name__}: {e}"
        raise UserError(f"{file} is not a COCO captions json, images and annotations by id: {why}") from e
    if outside:
        raise UserError(f"{file} names {outside[0]!r}, which leads out of the folder of images")
    if len(set(names.values())) < len(names):
        raise UserError(f"{file} names a file twice")
    return names, captions
