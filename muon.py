"""The old name of optim.py's Muon."""
from optim import MOMENTUM, QUINTIC, ROUNDS, Muon, joined, matrices, orthogonal, squares  # noqa: F401
