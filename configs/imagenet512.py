"""ImageNet-1k at 512 px from the weights of 256 px: latents of 4 x 64 x 64. [COND] sec. 2.2, tables 4c and A4.

python latents.py encode --data=imagenet/train --out=latents/imagenet512 --resolution=512 --scaling=factor
torchrun --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_addr=HEAD train.py --config=configs/imagenet512.py

(--node_rank=1 on the second node; encoding, too, runs under torchrun.) Run configs/imagenet256.py first. `data` is a
folder of 4-channel latents with classes, 168 GB with mirror images and one crop of each image; a folder of
images, which have 3, is refused, since model.channels=4.

Hardware    2 x 8 A100 of 80 GB
Size        791.9 M parameters
Hours       25.2 = 3 x 1,049.6 GFLOP x 384 x 150,000 images / (16 x 312 TFLOP/s x 40 %)
Paper       FID 2.76 of 50,000 samples against the training set: DDIM, 250 steps, lambda 2.0, beta 1.375

Hours and microbatch are arithmetic, not measured: 40 % of the bf16 peak is assumed.
What changes with s = 512 / 256 = 2:
noise       eq. 3, sigma' = 2 sigma: model.sigma_scale=2
guidance    eq. 4, lambda' = 1 + s (lambda - 1) = 1 + 2 (1.5 - 1) = 2
positions   the same extent of 16, at 32 x 32 patches
crops       global, 0.9 to 1 of the side: objects are then about as large in pixels as in the local crops of 256 px
"""
from config import Config, ModelConfig

config = Config(
    out="out/imagenet512", init_from="out/imagenet256", data="latents/imagenet512", augment="crop+flip+size",
    crop="global", steps=150_000, batch=384, microbatch=24, lr=1e-4, warmup=1000, guidance=2.0, log_every=100,
    save_every=5000, sample_every=10_000, workers=8,
    model=ModelConfig(
        semantics="class", classes=1000, resolution=64, channels=4, patch=2, width=1152, depth=28, heads=16,
        controls="crop+flip+size", positions="resample", pos_base=16, sigma_scale=2.0))
