"""Old names of what lies in train now."""
from train import CONTROL_ROWS, READ, Show, about_weights  # noqa: F401
