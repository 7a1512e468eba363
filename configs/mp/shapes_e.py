"""Captioned shapes by class, MP-DiT: configuration E of [MAG] in minutes. The files beside it vary this one.

python train.py --config=configs/mp/shapes_e.py

shapes_a to shapes_e                              the ladder, what mp_layers.py calls A to E
shapes_e, _scale, _rotate, _scale_rotate          the modulation, each with gate; E has that of adaLN
--model.mp=cosine+weights+stream+heads            E with the output of every head normalised to unit magnitude
"""
from config import Config, ModelConfig, ShapesConfig

config = Config(
    out="out/mp/shapes_e", data="shapes", augment="", shapes=ShapesConfig(objects=2), steps=2000, batch=16,
    microbatch=16, lr=2e-3, lr_mp=1e-2, lr_decay_start=0.5, warmup=50, forced_weight_norm=True, beta2=0.99,
    weight_decay=0.0, ema_std=0.05, loss_sigma_power=1.0, workers=0,
    model=ModelConfig(arch="mpdit", semantics="class", resolution=32, patch=4, width=128, depth=6, heads=4,
                      positions="resample", pos_base=28, prediction="v"))
