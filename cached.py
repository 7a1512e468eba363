"""The data source of cached latents is in cached_latents.py."""
from cached_latents import Latents, header, is_latents, open_latents  # noqa: F401
