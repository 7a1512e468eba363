"""Shim."""
from images import FORMATS, MAX_PIXELS, MIN_SIDE, BadImage, open_image, to_rgb  # noqa: F401
from plot import grid  # noqa: F401
