"""A frozen text encoder for the shapes' captions: fixed vectors of words.

tokens, lengths = WordVectors().encode(["a red ring", ""])

Dimensions: B batch, L token positions, E width of a token.
"""
import difflib
import math

import torch
from torch import Tensor

from config import UserError, seed64
from shapes_grammar import BACKGROUNDS, COLORS, GRAMMAR, RELATIONS, SHAPES, SIZES, WORDS  # noqa: F401
from shapes_grammar import Facts, describe, split, write  # noqa: F401


class WordVectors:
    """A frozen text encoder: each token names its word, the two words before it and the one after it.

    Token j joins four vectors of +-1, for the words j-2, j-1, j and j+1 (zeros beyond the ends), and a sinusoidal
    position, so the token of "ring" in "a small red ring" knows "small", "red" and "ring". The vectors are rows of a
    Hadamard matrix: words are exactly orthogonal and every number has unit variance. The encoder learns and loads
    nothing, so the same words give the same tokens on every machine."""
    name = "words"
    position = 16                                           # numbers of a token that encode its position
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
        """Return tokens (B, L, E) float32 and lengths (B,) int64 of B captions; zeros follow the end of a caption.

        The empty caption, all zeros and of length 0, is the null condition. UserError for an unknown word or a
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
        """Return the index in `words` of every word of a caption. UserError as in `encode`."""
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
