"""[MAG]'s ladder, A, no change: the bias-free DiT that the ladder starts from, on captioned shapes.

python train.py --config=configs/mp/shapes_a.py
"""
from dataclasses import replace
from pathlib import Path

from config import load

base = load(str(Path(__file__).with_name("shapes_e.py")))
config = replace(base, out="out/mp/shapes_a", forced_weight_norm=False,
                 model=replace(base.model, mp="none"))
