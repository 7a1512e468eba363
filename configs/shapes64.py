"""Captioned shapes at 64 px from the weights of 32 px: [COND] sec. 2.2 in minutes. Run configs/shapes32.py first.

python train.py --config=configs/shapes64.py

2.39 M parameters. Two CPU cores: 4.8 minutes = 3 x 0.840 GFLOP x 64 x 450 images / 0.25 TFLOP/s, the rate at which
`make demo` trained (LOG.md).

What changes with the side of the pictures, s = 64 / 32 = 2:
noise       eq. 3, sigma' = 2 sigma: model.sigma_scale=2
guidance    eq. 4, lambda' = 1 + s (lambda - 1) = 1 + 2 (3 - 1) = 5
positions   the same extent of 28, at 16 x 16 patches
To compare, each into another --out: --model.sigma_scale=1, --guidance=3, --model.pos_base=60 (extrapolated).
"""
from config import Config, ModelConfig, ShapesConfig

config = Config(
    out="out/shapes64", init_from="out/shapes32", data="shapes", augment="crop+flip+size", crop="global",
    shapes=ShapesConfig(objects=2, layout="grid"), padding="noisy", steps=450, batch=64, microbatch=64, lr=2e-3,
    lr_muon=0.007, warmup=50, cooldown=0.5, ema_std=0.05, loss_sigma_power=1.0, guidance=5.0, eta=1.0, workers=0,
    model=ModelConfig(
        semantics="text", text_length=12, resolution=64, patch=4, width=128, depth=6, heads=4, prediction="v",
        controls="crop+flip+size", positions="resample", pos_base=28, sigma_scale=2.0))
