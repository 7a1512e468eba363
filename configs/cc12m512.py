"""CC12M at 512 px from the weights of 256 px: latents of 4 x 64 x 64. [COND] sec. 2.2, tables A3 and A4.

python latents.py encode --data=cc12m --out=latents/cc12m512 --resolution=512 --semantics=text --scaling=factor
    --encoder=clip:openai --shard=8192
torchrun --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_addr=HEAD train.py --config=configs/cc12m512.py

(--node_rank=1 on the second node; encoding, too, runs under torchrun.) Run configs/cc12m256.py first;
--init_from=out/imagenet256 starts from classes instead, and only what reads the caption is then fresh. `data` is a
folder
of 4-channel latents with captions, 1.4 TB for 11 million pictures with mirror images and one crop of each, and
0.42 TB of their tokens if a caption has 25; of a folder of pictures without captions the error says so.

Hardware    2 x 8 A100 of 80 GB
Size        790.3 M parameters, beside the text encoder's
Hours       26.3 = 3 x 1,092.6 GFLOP x 384 x 150,000 images / (16 x 312 TFLOP/s x 40 %)
Paper       FID 6.27 and CLIPScore 26.17 (table 1; 25.91 in table A3); on COCO captions lambda is 5.0, 25 steps

Hours and micro are arithmetic, not measured: 40 % of the bf16 peak is assumed, and that the tokens are stored.
What changes with s = 512 / 256 = 2:
noise       eq. 3, sigma' = 2 sigma: model.sigma_scale=2
guidance    eq. 4, lambda' = 1 + s (lambda - 1) = 1 + 2 (1.5 - 1) = 2
positions   the same extent of 16, at 32 x 32 patches
crops       global, 0.9 to 1 of the side: objects are then about as large in pixels as in the local crops of 256 px
"""
from config import Config, ModelConfig

config = Config(
    out="out/cc12m512", init_from="out/cc12m256", data="latents/cc12m512", augment="crop+flip+size", crop="global",
    encoder="clip:openai", padding="noisy", padding_noise=0.02, steps=150_000, batch=384, microbatch=24, lr=1e-4,
    warmup=1000, guidance=2.0, log_every=100, save_every=5000, sample_every=10_000, workers=8,
    model=ModelConfig(
        semantics="text", text_dim=768, text_length=77, resolution=64, channels=4, patch=2, width=1152, depth=28,
        heads=16, controls="crop+flip+size", positions="resample", pos_base=16, sigma_scale=2.0))
