"""Old names of what lies in log now."""
from log import Skipped, follow  # noqa: F401
