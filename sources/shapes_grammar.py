"""The grammar of the shapes' captions: its words, captions to facts and back.

facts = parse_caption("a small red ring left of a large blue square on grey")
facts.shapes, facts.relations           ("ring", "square"), ("left of",)
facts_to_caption(facts)                 the caption again

    caption  = object {link object} ["on" background]
    object   = ["a" | "an"] ["small" | "large"] colour shape
    link     = "left of" | "right of" | "above" | "below" | "and"

A link says where the object before it lies, seen from the object after it.
"""
import re
from dataclasses import dataclass
from functools import lru_cache

from config import UserError

SHAPES = ("circle", "square", "triangle", "ring", "cross", "star", "diamond", "heart")
COLORS = {"red": (225, 25, 35), "orange": (255, 140, 0), "yellow": (250, 240, 50), "green": (20, 165, 45),
          "cyan": (50, 220, 240), "blue": (35, 70, 245), "purple": (165, 30, 200), "white": (255, 255, 255)}
BACKGROUNDS = {"grey": (125, 125, 125), "navy": (20, 20, 80), "beige": (205, 180, 150), "brown": (95, 60, 35),
               "teal": (15, 95, 100)}
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
WORDS = ("a", "an", "and", "on", "of", "left", "right", "above", "below",
         *SIZES, *COLORS, *SHAPES, *BACKGROUNDS)
GRAMMAR = "[a] [small|large] COLOUR SHAPE [left of|right of|above|below|and ...] [on BACKGROUND]"


@dataclass(frozen=True)
class SceneFacts:
    """What a caption states about its n objects, in its order; None where it states nothing."""
    colors: tuple[str, ...]                 # n
    shapes: tuple[str, ...]                 # n
    sizes: tuple[str | None, ...]           # n
    relations: tuple[str | None, ...]       # n - 1: where object k lies, seen from k + 1; None for "and"
    background: str | None


def facts_to_caption(facts: SceneFacts) -> str:
    """Return the caption that states these facts, the inverse of parse_caption."""
    words = []
    for k, (size, color, shape) in enumerate(zip(facts.sizes, facts.colors, facts.shapes)):
        if k:
            words.append(facts.relations[k - 1] or "and")
        head = size or color
        words += ["an" if head[0] in "aeiou" else "a", *([size] if size else []), color, shape]
    if facts.background:
        words += ["on", facts.background]
    return " ".join(words)


@lru_cache(maxsize=65536)
def parse_caption(caption: str) -> SceneFacts:
    """Return the facts that a caption states. UserError names the word that breaks the grammar."""
    words, at = split(caption), 0
    colors, shapes, sizes, relations = [], [], [], []

    def take(expected, required):
        nonlocal at
        if at < len(words) and words[at] in expected:
            at += 1
            return words[at - 1]
        if required:
            found = f"{words[at]!r} (word {at + 1})" if at < len(words) else "its end"
            raise UserError(f"caption {caption!r}: wanted {' or '.join(expected)}, found {found}; a caption reads "
                            f"{GRAMMAR}")

    while True:
        take(("a", "an"), False)
        sizes.append(take(SIZES, False))
        colors.append(take(tuple(COLORS), True))
        shapes.append(take(SHAPES, True))
        link = take(("left", "right", "above", "below", "and"), False)
        if link is None:
            break
        if link in ("left", "right"):
            link += " " + take(("of",), True)
        relations.append(None if link == "and" else link)

    background = take(tuple(BACKGROUNDS), True) if take(("on",), at < len(words)) else None
    if at < len(words):
        raise UserError(f"caption {caption!r}: nothing may follow the background, found {words[at]!r}")
    return SceneFacts(tuple(colors), tuple(shapes), tuple(sizes), tuple(relations), background)


def split(caption: str) -> list[str]:
    """Return the words of a caption in lower case, without punctuation."""
    return re.findall(r"[^\W_]+", caption.lower())
