"""[MAG]'s modulations: scale and gate, on captioned shapes.

python train.py --config=configs/mp/shapes_scale.py
"""
from dataclasses import replace
from pathlib import Path

from config import load

base = load(str(Path(__file__).with_name("shapes_e.py")))
config = replace(base, out="out/mp/shapes_scale",
                 model=replace(base.model, modulation="scale+gate"))
