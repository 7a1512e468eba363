"""[MAG]'s modulations: rotation and gate, on captioned shapes.

python train.py --config=configs/mp/shapes_rotate.py
"""
from dataclasses import replace
from pathlib import Path

from config import load

base = load(str(Path(__file__).with_name("shapes_e.py")))
config = replace(base, out="out/mp/shapes_rotate",
                 model=replace(base.model, modulation="rotate+gate"))
