"""Captioned shapes at 32 px: a small mmDiT whose caption enters through attention. What `make demo` trains.

python train.py --config=configs/shapes.py

Two CPU cores: about 400 images/s compiled, 5 minutes. See the README for what comes out and LOG.md for what was tried.
"""
from config import Config, ModelConfig

config = Config(
    out="out/demo", data="shapes", augment="", objects=2, steps=7000, batch=16, micro=16, lr=6e-3, warmup=50,
    cooldown=0.5, ema=0.05, noise_weight=1.0, lam=3.0, save_every=1000, sample_every=1000,
    model=ModelConfig(semantics="text", text_length=12, resolution=32, patch=4, width=128, depth=6, heads=4,
                      positions="resample", base=28, prediction="v"))
