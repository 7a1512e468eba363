"""The old name of parts of mp_layers.py and of model.py's magnitude-preserving blocks."""
from model import MPDiTBlock, MPMMDiTBlock  # noqa: F401
from mp_layers import MPAttention, MPFinalLayer, MPJointAttention, MPPatchEmbed, normalize_heads  # noqa: F401
