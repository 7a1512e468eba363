"""A few hundred images of your own with captions, on a laptop or one GPU, from scratch or from another run.

python data.py --check=mine
python train.py --config=configs/finetune_folder.py --data=mine --encoder=clip:clip
python train.py --config=configs/finetune_folder.py --data=mine --encoder=clip:clip --init_from=out/shapes64

`mine` has images with a .txt beside each, or a metadata.jsonl; `clip` is the folder of CLIP's weights (README). A run
to start from may have another resolution, other data, classes for captions: what fits is kept, the rest is listed.

5.2 M parameters, 64 px. Of 200 images each is seen some 400 times, cropped and mirrored anew: a model from scratch
memorises them; one that starts from a run on many images, less so.
"""
from config import Config, ModelConfig

config = Config(
    out="out/finetune", data="mine", augment="crop+flip", encoder="clip:clip", padding="noisy", steps=5000, batch=16,
    microbatch=16, lr=1e-3, warmup=100, cooldown=0.5, ema_std=0.1, loss_sigma_power=1.0, save_every=500,
    sample_every=500, guidance=3.0,
    model=ModelConfig(semantics="text", text_dim=768, text_length=77, resolution=64, patch=4, width=192, depth=6,
                      heads=4, controls="crop+flip", positions="resample", prediction="v"))
