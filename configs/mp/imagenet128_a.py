"""[MAG]'s ladder, A, no change: the bias-free DiT that the ladder starts from, on ImageNet at 128 px.

torchrun --nproc_per_node=8 train.py --config=configs/mp/imagenet128_a.py
"""
from dataclasses import replace
from pathlib import Path

from config import load

base = load(str(Path(__file__).with_name("imagenet128_e.py")))
config = replace(base, out="out/mp/imagenet128_a", forced_weight_norm=False,
                 model=replace(base.model, mp="none"))
