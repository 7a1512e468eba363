"""Captioned shapes at 32 px with every control: the model that configs/shapes64.py starts from.

python train.py --config=configs/shapes32.py

2.39 M parameters. Two CPU cores: 4.6 minutes = 3 x 0.181 GFLOP x 64 x 2,000 images / 0.25 TFLOP/s, the rate at which
`make demo` trained (LOG.md).

[COND] sec. 2.2 pre-trains on local crops, 0.4 to 0.6 of the side, so that objects are as large in pixels as they are
later on. Here crops are global: a caption names every object of a scene, of which a local crop would show half.
Positions are resampled on an extent of 28, so that those of the 8 x 8 patches here are 0, 4, ... 28, pixels rather
than patches: a small network tells them apart sooner (LOG.md).
"""
from config import Config, ModelConfig, ShapesConfig

config = Config(
    out="out/shapes32", data="shapes", augment="crop+flip+size", crop="global",
    shapes=ShapesConfig(objects=2, layout="grid"), padding="noisy", steps=2000, batch=64, microbatch=64, lr=4e-3,
    lr_muon=0.014, warmup=50, cooldown=0.5, ema_std=0.05, loss_sigma_power=1.0, guidance=3.0, eta=1.0, workers=0,
    model=ModelConfig(
        semantics="text", text_length=12, resolution=32, patch=4, width=128, depth=6, heads=4, prediction="v",
        controls="crop+flip+size", positions="resample", pos_base=28))
