"""The old name of layers.py and of model.py's blocks."""
from layers import (MLP, MLP_RATIO, PLAIN_ATTENTION, Attention, DualAttention, FinalLayer, JointAttention,  # noqa: F401
                    Linear, NormedAttention, PatchEmbed, RMSNorm, attention, modulation, norm, patchify, split_heads,
                    ungated, unpatchify)
from model import DiTAttBlock, DiTBlock, MMDiTBlock, SD3Block  # noqa: F401
