from log import Skipped, follow  # noqa: F401
