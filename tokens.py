"""Stored text; moved to text.py."""
from text import StoredText, check_same, padded  # noqa: F401
