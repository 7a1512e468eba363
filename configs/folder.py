"""Your own images: a folder of class folders, at 64 px.

python train.py --config=configs/folder.py --data=path/to/folder --out=out/mine
"""
from config import Config, ModelConfig

config = Config(
    out="out/folder", data="pictures", augment="crop+flip", steps=20_000, batch=64, microbatch=32, lr=5e-4, warmup=500,
    sample_every=1000, save_every=1000,
    model=ModelConfig(semantics="class", resolution=64, patch=4, width=256, depth=8, heads=4))
