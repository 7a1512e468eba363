"""The judge of shapes_judge.py, for modules that still import it from here."""
from shapes_judge import BATCH, FAR, JUDGE, NATIVE, REFERENCE, Judge, Options, Reading, add_features  # noqa: F401
from shapes_judge import content, largest, load, loss, main, read, render_stats, resized  # noqa: F401
from shapes_judge import toy_fd, toy_leak, train, truth, write  # noqa: F401
