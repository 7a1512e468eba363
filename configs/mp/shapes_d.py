"""[MAG]'s ladder, D: as c, and the training step normalises the weights too, on captioned shapes.

python train.py --config=configs/mp/shapes_d.py
"""
from dataclasses import replace
from pathlib import Path

from config import load

base = load(str(Path(__file__).with_name("shapes_e.py")))
config = replace(base, out="out/mp/shapes_d",
                 model=replace(base.model, mp="cosine+weights"))
