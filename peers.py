"""Moved to bench.py."""
from bench import diffusers_dit  # noqa: F401
