"""Old names of what lies in train, checkpoint and config now."""
from checkpoint import CURES, MAY_CHANGE, TRY, Nonfinite, check_resume, check_retry  # noqa: F401
from config import read_config  # noqa: F401
from train import check, complete  # noqa: F401
