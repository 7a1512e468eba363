"""Shim: everything here is in sample.py."""
from sample import Options, Wishes, numbers, pad, read_prompts  # noqa: F401
