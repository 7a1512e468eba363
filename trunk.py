"""The old name of model.py's trunk."""
from model import (ARCHS, POSITIONS, Denoiser, DiT, DiTAtt, MMDiT, MPDenoiser, MPDiT, MPMMDiT, SD3,  # noqa: F401
                   control_embedding, control_names, modulation_parts, names, position_table, preserved)
