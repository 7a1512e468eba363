"""Re-imports."""
from shapes_grammar import BACKGROUNDS, COLORS, GRAMMAR, RELATIONS, SHAPES, SIZES, WORDS  # noqa: F401
from shapes_grammar import Facts, describe, split, write  # noqa: F401
from text import WordVectors  # noqa: F401
