"""Captioned shapes at 32 px: a small mmDiT whose caption enters through attention. What `make demo` trains.

python train.py --config=configs/shapes.py

Two CPU cores: about 470 images/s compiled, 5 minutes. Scenes are on a grid of patches and Muon updates the
blocks' matrices: without either, shapes stay blobs. See the README for results and LOG.md for what was tried.
"""
from config import Config, ModelConfig, ShapesConfig

config = Config(
    out="out/demo", data="shapes", augment="", shapes=ShapesConfig(objects=2, layout="grid"), steps=1500, batch=64,
    microbatch=64, lr=4e-3, lr_muon=0.014, warmup=50, cooldown=0.5, ema_std=0.05, loss_sigma_power=1.0, guidance=2.0,
    eta=1.0, workers=0, save_every=250, sample_every=250,
    model=ModelConfig(semantics="text", text_length=12, resolution=32, patch=4, width=128, depth=6, heads=4,
                      positions="resample", pos_base=28, prediction="v"))
