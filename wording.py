"""Caption cleaning, which is in images.py."""
from images import BadCaption, choose, clean, decode, metadata, parse_object  # noqa: F401
