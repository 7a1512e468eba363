"""The scenes of shapes.py, for modules that still import them from here."""
from shapes import DRAWS, EIGHTHS, HELD_OUT, LARGE, NATIVE, PAIR, SMALL, TWO_SIZES  # noqa: F401
from shapes import canvas, caption, draw, draw_scene, mix, render, resampler, sdf, uniform  # noqa: F401
