"""CC12M at 256 px: mmDiT-XL/2 on latents of 4 x 32 x 32, the caption as 77 CLIP tokens. [COND] sec. 2, table A4.

python latents.py encode --data=cc12m --out=latents/cc12m256 --crop=local --semantics=text --scaling=factor
    --encoder=clip:openai --shard=16384
torchrun --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_addr=HEAD train.py --config=configs/cc12m256.py

(--node_rank=1 on the second node; encoding, too, runs under torchrun.) `data` is a folder of 4-channel latents with
captions, 0.36 TB for 11 million images with mirror images and one crop of each; a folder of images without
captions is refused. --encoder stores the tokens of open_clip's ViT-L-14 with OpenAI's weights beside them,
0.42 TB if a caption has 25; without, the tower encodes every caption at every step while the network trains.

Hardware    2 x 8 A100 of 80 GB
Size        790.3 M parameters, beside the text encoder's
Hours       113.6 = 3 x 265.8 GFLOP x 2,048 x 500,000 images / (16 x 312 TFLOP/s x 40 %)
Paper       FID 6.79 and CLIPScore 26.60; on COCO captions lambda is 5.0 and DDIM takes 25 steps

Hours and microbatch are arithmetic, not measured: 40 % of the bf16 peak is assumed, and that the tokens are stored.
Local crops are for the 512 px run that follows; --crop=global suits images at 256 px. Rate and warm-up are our
choices: DEVIATIONS.md.
"""
from config import Config, ModelConfig

config = Config(
    out="out/cc12m256", data="latents/cc12m256", augment="crop+flip+size", crop="local", encoder="clip:openai",
    padding="noisy", padding_noise=0.02, steps=500_000, batch=2048, microbatch=128, lr=5e-4, warmup=5000, guidance=1.5,
    log_every=100, save_every=5000, sample_every=10_000, workers=8,
    model=ModelConfig(
        semantics="text", text_dim=768, text_length=77, resolution=32, channels=4, patch=2, width=1152, depth=28,
        heads=16, controls="crop+flip+size", positions="resample", pos_base=16))
