from train import CONTROL_ROWS, READ, Show, about_weights  # noqa: F401
