"""[MAG]'s ladder, B: cosine attention, on captioned shapes.

python train.py --config=configs/mp/shapes_b.py
"""
from dataclasses import replace
from pathlib import Path

from config import load

base = load(str(Path(__file__).with_name("shapes_e.py")))
config = replace(base, out="out/mp/shapes_b", forced_weight_norm=False,
                 model=replace(base.model, mp="cosine"))
