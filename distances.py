"""Moved into fid.py."""
from fid import FeatureStats, frechet_distance, kid  # noqa: F401
