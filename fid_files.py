"""Shim."""
from folders import Folder, Stack, open_pictures  # noqa: F401
