"""[MAG]'s ladder, C: cosine attention, normalised weights, on captioned shapes.

python train.py --config=configs/mp/shapes_c.py
"""
from dataclasses import replace
from pathlib import Path

from config import load

base = load(str(Path(__file__).with_name("shapes_e.py")))
config = replace(base, out="out/mp/shapes_c", forced_weight_norm=False,
                 model=replace(base.model, mp="cosine+weights"))
