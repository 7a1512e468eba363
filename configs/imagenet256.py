"""ImageNet-1k at 256 px: mmDiT-XL/2 on latents of 4 x 32 x 32, the class as one token. [COND] sec. 2, table A4.

python latents.py encode --data=imagenet/train --out=latents/imagenet256 --crop=local --scaling=factor
torchrun --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_addr=HEAD train.py --config=configs/imagenet256.py

(--node_rank=1 on the second node; encoding, too, runs under torchrun.) `data` is a folder of 4-channel latents with
classes; a folder of images, which have 3, is refused, since model.channels=4. Latents cannot be cropped, so local
crops are made once: 42 GB with mirror images, and as much again for each of --variants.

Hardware    2 x 8 A100 of 80 GB
Size        791.9 M parameters
Hours       101.5 = 3 x 237.6 GFLOP x 2,048 x 500,000 images / (16 x 312 TFLOP/s x 40 %)
Paper       FID 1.59 of 50,000 samples against the training set: DDIM, 250 steps, lambda 1.5, beta 1.375

Hours and microbatch are arithmetic, not measured: 40 % of the bf16 peak is assumed. Local crops are for the 512 px run
that follows; --crop=global suits images at 256 px. Rate and warm-up are our choices: DEVIATIONS.md.
"""
from config import Config, ModelConfig

config = Config(
    out="out/imagenet256", data="latents/imagenet256", augment="crop+flip+size", crop="local", steps=500_000,
    batch=2048, microbatch=128, lr=5e-4, warmup=5000, guidance=1.5, log_every=100, save_every=5000,
    sample_every=10_000, workers=8,
    model=ModelConfig(
        semantics="class", classes=1000, resolution=32, channels=4, patch=2, width=1152, depth=28, heads=16,
        controls="crop+flip+size", positions="resample", pos_base=16))
