"""ImageNet-1k at 128 px: [MAG]'s S/4, configuration E, on latents of 4 x 16 x 16. The files beside it vary this one.

torchrun --nproc_per_node=8 train.py --config=configs/mp/imagenet128_e.py

imagenet128_a to imagenet128_e                    the ladder, what mp_layers.py calls A to E
imagenet128_e, _scale, _rotate, _scale_rotate     the modulation, each with gate; E has that of adaLN
--model.patch=2 --model.depth=6 --model.width=256 --model.heads=4          XS/2
"""
from config import SIZES, Config, ModelConfig

config = Config(
    out="out/mp/imagenet128_e", data="latents/imagenet128", augment="", steps=400_000, batch=256, microbatch=32,
    lr=1e-4, lr_mp=1e-2, lr_decay_start=0.1, warmup=2666, forced_weight_norm=True, beta2=0.99, weight_decay=0.0,
    log_every=100, save_every=5000, sample_every=10_000, workers=8, guidance=1.5,
    model=ModelConfig(arch="mpdit", semantics="class", classes=1000, resolution=16, channels=4, patch=4,
                      schedule="linear", **SIZES["S"]))
