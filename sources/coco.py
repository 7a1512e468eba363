"""COCO captions, for evaluation: images with five captions each, one chosen by seed.

A seed always chooses the same caption of an image, so all evaluations see the same prompts.
"""
import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from config import Config, UserError
from rng import seed64
from sources.images import ImageSource, clean_caption, decode_utf8, pick_caption

CAPTIONS = "annotations/captions_val2014.json"      # papers evaluate on it


class CocoCaptions(ImageSource):
    """Images of a COCO captions file in the order of their numbers, each with one of its captions.

    path: the captions json, or the folder with CAPTIONS. Images without a caption or a file are unusable."""
    @staticmethod
    def takes(where: str) -> bool:
        return where.startswith("coco:")

    @classmethod
    def open(cls, cfg: Config, split: str = "train") -> ImageSource:
        return super().open(replace(cfg, data=cfg.data.removeprefix("coco:")), split)

    def scan(self) -> Iterable[tuple[str, str]]:
        """captions_val2014.json describes the images in val2014 beside annotations/, or beside itself."""
        file = self.path / CAPTIONS if self.path.is_dir() else self.path
        names, captions = read(file)
        root = file.parent.parent if file.parent.name == "annotations" else file.parent
        named = root / file.stem.removeprefix("captions_")
        self.folder = named if named.is_dir() else root
        bad = {name: "no caption" if number not in captions else f"no such file in {self.folder}"
               for number, name in names.items() if number not in captions or not (self.folder / name).is_file()}
        self.numbers = [number for number in sorted(names) if names[number] not in bad]
        if not self.numbers:
            raise UserError(f"none of the {len(names)} images of {file} is in {self.folder} and has a caption")
        self.names = [names[number] for number in self.numbers]
        self.captions = [captions[number] for number in self.numbers]
        self.fingerprint = hashlib.sha256(ascii((self.numbers, self.names, self.captions)).encode()).hexdigest()
        self.files = len(names)
        return bad.items()

    def load(self, index: int, epoch: int) -> tuple[Path, dict[str, Any]]:
        draw = seed64(self.seed, "coco", self.numbers[index])
        return self.folder / self.names[index], {"caption": pick_caption(self.captions[index], draw)}


def read(file: Path | str) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Return {image: file name} and {image: captions in the order of their own numbers} of a COCO captions json.

    Raises UserError for any other content, and for file names that lead out of the folder."""
    try:
        tree = json.loads(decode_utf8(Path(file).read_bytes()))
        names = {row["id"]: row["file_name"] for row in tree["images"]}
        captions: dict[int, list[str]] = {}
        for _, number, text in sorted((row["id"], row["image_id"], row["caption"]) for row in tree["annotations"]):
            captions.setdefault(number, []).append(clean_caption(text))
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in names.values()):
            raise ValueError("a file name leads out of the folder of images")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{file} is not a COCO captions json: {type(e).__name__}: {e}; coco:PATH is such a file, or a "
                        f"folder with {CAPTIONS}") from e
    return names, captions
