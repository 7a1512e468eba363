"""The language of the captioned shapes: its words, its grammar both ways, and a frozen word-vector encoder.

facts = describe("a small red ring left of a large blue square on grey")
facts.shapes, facts.relations           ("ring", "square"), ("left of",)
write(facts)                            the caption again
tokens, lengths = WordVectors().encode(["a red ring", ""])

    caption  = object {link object} ["on" background]
    object   = ["a" | "an"] ["small" | "large"] colour shape
    link     = "left of" | "right of" | "above" | "below" | "and"

A link states where the object before it is, seen from the object after it.
Dimensions: B batch, L token positions, E width of a token.
"""
import difflib
import math
import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from config import UserError
from rng import seed64

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
class Facts:
    """What a caption states of n objects, in its order. None where it is silent."""
    colors: tuple[str, ...]                 # n
    shapes: tuple[str, ...]                 # n
    sizes: tuple[str | None, ...]           # n
    relations: tuple[str | None, ...]       # n - 1: where object k is, seen from object k + 1; None for "and"
    background: str | None


# ---------------------------------------------------------------- grammar

def write(facts: Facts) -> str:
    """The caption that states these facts; `describe` is its inverse."""
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
def describe(caption: str) -> Facts:
    """The facts that a caption states. UserError, naming the word, where it leaves the grammar."""
    words, at = split(caption), 0
    colors, shapes, sizes, relations = [], [], [], []

    def take(kinds, needed):
        nonlocal at
        if at < len(words) and words[at] in kinds:
            at += 1
            return words[at - 1]
        if needed:
            place = f"{words[at]!r} (word {at + 1})" if at < len(words) else "its end"
            wanted = " or ".join(kinds)
            raise UserError(f"caption {caption!r}: wanted {wanted}, found {place}; a caption reads {GRAMMAR}")

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
    return Facts(tuple(colors), tuple(shapes), tuple(sizes), tuple(relations), background)


def split(caption: str) -> list[str]:
    """The words of a caption, lower case, without punctuation."""
    return re.findall(r"[^\W_]+", caption.lower())


# ---------------------------------------------------------------- encoder

class WordVectors:
    """Frozen text encoder: a token says which word stands here, which two before it and which one after it.

    Token j joins four vectors of +-1, of the words j-2, j-1, j and j+1 (zeros beyond the ends), and a
    sinusoidal position, so the token of "ring" in "a small red ring" knows "small", "red" and "ring". The
    vectors are rows of a Hadamard matrix: words are exactly orthogonal and every number has unit variance.
    Nothing is learned or loaded: the same words give the same tokens on every machine."""
    name = "words"
    position = 16                                           # numbers of a token that say where it stands
    window = (-2, -1, 0, 1)

    def __init__(self, length: int = 20):
        self.length, self.words = length, list(WORDS)
        self.row = {word: k for k, word in enumerate(self.words)}

        table = torch.ones(1, 1)
        while len(table) < len(self.words):                 # Sylvester: [[H, H], [H, -H]]
            table = torch.cat([torch.cat([table, table], 1), torch.cat([table, -table], 1)], 0)
        sign = torch.tensor([1.0 - 2 * (seed64("word vectors", k) & 1) for k in range(len(table))])
        blank = torch.zeros(1, len(table))
        self.table = torch.cat([table[:len(self.words)] * sign, blank])                     # (words + 1, V)
        self.dim = len(self.window) * len(table) + self.position

        rate = 4.0 ** -torch.arange(0, 4, 8 / self.position)
        angle = torch.arange(length)[:, None] * rate                                    # (L, position / 2)
        self.where = math.sqrt(2) * torch.cat([angle.cos(), angle.sin()], dim=1)        # (L, position)

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """B captions to tokens (B, L, E) float32 and lengths (B,) int64; zeros past the end of a caption.

        The empty caption is all zeros and of length 0: the null condition. UserError for an unknown word or a
        caption of more than `length` words."""
        rows = [self.rows(caption) for caption in captions]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        blank, before, after = len(self.words), -self.window[0], self.window[-1]
        full = [[blank] * before + row + [blank] * (self.length - len(row) + after) for row in rows]
        ids = torch.tensor(full, dtype=torch.long).reshape(len(rows), self.length + before + after)

        near = ids.unfold(1, len(self.window), 1)                               # (B, L, 4)
        inside = torch.arange(self.length) < lengths[:, None]                   # (B, L)
        tokens = torch.cat([self.table[near].flatten(2), self.where.expand(len(rows), -1, -1)], dim=2)
        return tokens * inside[..., None], lengths                              # (B, L, E), (B,)

    def rows(self, caption: str) -> list[int]:
        """The place of every word of a caption in `words`. UserError as in `encode`."""
        words = split(caption)
        for word in words:
            if word not in self.row:
                near = difflib.get_close_matches(word, self.words, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(near)}? " if near else ""
                known = ", ".join(self.words)
                raise UserError(f"unknown word {word!r} in caption {caption!r}; {hint}known: {known}")
        if len(words) > self.length:
            raise UserError(f"caption {caption!r} has {len(words)} words; the encoder takes {self.length}")
        return [self.row[word] for word in words]
