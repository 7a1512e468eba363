"""CLIPScore: the arithmetic of open_clip with random weights, which only tests may use.

No two sizes are equal: B 5, images 37 x 52 and 48 x 40, CLIP's side 30, D 40.
"""
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from config import UserError
from evaluation.clip_score import CLIP, MEAN, PROTOCOLS, STD, clip_score, main
from rng import seed64
from runtime import distributed
from runtime.optional import optional_import
from sample import read_prompts
from sources import coco
from text import CONFIG

open_clip = optional_import("open_clip", "CLIP", "open_clip_torch")
CPU = torch.device("cpu")
ALONE = distributed.Dist(CPU, 0, 1)
TEXT = dict(context_length=77, vocab_size=49408, width=64, heads=4, layers=2)
VISION = dict(image_size=30, layers=2, width=48, patch_size=10, head_width=16)
CAPTIONS = ["a small red ring", "dog", "", "9 lives & more", "a dog and " * 30 + "cat"]
IMAGES = torch.randint(0, 256, (5, 3, 37, 52), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def theirs():
    """open_clip's own small CLIP, with weights so wide that scores differ and some are negative."""
    torch.manual_seed(0)
    net = open_clip.model.CLIP(40, VISION, open_clip.model.CLIPTextCfg(**TEXT), quick_gelu=True)
    for k, p in enumerate(net.parameters()):
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(k))
    return net.eval().requires_grad_(False)


def write(folder, net, quick=True, config=True):
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / "open_clip_model.safetensors")
    if config:
        cfg = {"embed_dim": 40, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": quick}
        (folder / CONFIG).write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    return write(tmp_path_factory.mktemp("clip"), theirs)


@pytest.fixture(scope="module")
def clip(folder):
    return CLIP(str(folder), "ViT-L-14", CPU)


def cosines(net, images, captions):
    """By open_clip's own preprocessing of Pillow images, one pair at a time."""
    from PIL import Image
    prepare = open_clip.image_transform(30, is_train=False, mean=MEAN, std=STD)
    found = []
    for x, caption in zip(images, captions):
        image = prepare(Image.fromarray(x.permute(1, 2, 0).numpy()))[None]
        words = net.encode_text(open_clip.tokenize([caption]), normalize=True)
        found.append((net.encode_image(image, normalize=True) * words).sum().item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("protocol", ["l14", pytest.param("hessel", marks=pytest.mark.slow)])
def test_clip_score_is_the_hand_computation_of_open_clip(clip, theirs, protocol):
    scale, prefix = {"l14": (100, ""), "hessel": (2.5, "A photo depicts ")}[protocol]
    want = scale * cosines(theirs, IMAGES, [prefix + c for c in CAPTIONS]).clamp(min=0)
    got, cut = clip_score([(IMAGES, CAPTIONS)], clip, PROTOCOLS[protocol], ALONE)
    assert got.value == pytest.approx(want.mean().item(), abs=2e-3 * scale)     # the resize differs by a level or two
    assert got.error == pytest.approx((want.std() / math.sqrt(5)).item(), abs=2e-3 * scale)
    assert got.n == 5 and cut == 1 and want.std() > 0.05 * scale


def test_negative_cosines_count_as_zero_pair_by_pair(clip, theirs):
    raw = cosines(theirs, IMAGES, CAPTIONS)
    assert (raw < -0.01).any() and (raw > 0.01).any()           # else nothing is tested
    got, _ = clip_score([(IMAGES, CAPTIONS)], clip, PROTOCOLS["l14"], ALONE)
    assert got.value > 100 * max(raw.mean().item(), 0) + 0.1


def test_images_that_need_no_resize_give_open_clips_vectors_to_rounding(clip, theirs):
    x = IMAGES[..., :30, :30]
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    want = theirs.encode_image((x.float() / 255 - mean) / std, normalize=True)
    assert torch.allclose(clip.embed_images(x), want, atol=1e-6)
    tall = torch.randint(0, 256, (2, 3, 48, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    assert clip.embed_images(tall).shape == (2, 40)


def test_batches_do_not_matter_and_pairs_do(clip):
    one = clip_score([(IMAGES, CAPTIONS)], clip, PROTOCOLS["l14"], ALONE)
    split = clip_score([(IMAGES[:2], CAPTIONS[:2]), (IMAGES[2:], CAPTIONS[2:])], clip, PROTOCOLS["l14"], ALONE)
    assert split[0].value == pytest.approx(one[0].value, abs=1e-3) and split[1] == one[1]
    moved = clip_score([(IMAGES, CAPTIONS[1:] + CAPTIONS[:1])], clip, PROTOCOLS["l14"], ALONE)
    assert abs(moved[0].value - one[0].value) > 0.1
    with pytest.raises(ValueError, match="5 images with 4 captions"):
        clip_score([(IMAGES, CAPTIONS[:4])], clip, PROTOCOLS["l14"], ALONE)


def test_captions_that_are_cut_are_counted_at_the_edge(clip):
    assert [clip.embed_captions([c])[1] for c in ("dog " * 75, "dog " * 76)] == [0, 1]


def test_it_computes_in_true_fp32_whatever_the_run_has_set(clip):
    want = clip_score([(IMAGES, CAPTIONS)], clip, PROTOCOLS["l14"], ALONE)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert clip_score([(IMAGES, CAPTIONS)], clip, PROTOCOLS["l14"], ALONE) == want
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_without_quickgelu_or_weights_there_is_no_score(theirs, tmp_path):
    with pytest.raises(UserError, match="needs OpenAI's CLIP with QuickGELU, but .* has GELU"):
        CLIP(str(write(tmp_path, theirs, quick=False)), "ViT-L-14", CPU)
    with pytest.raises(UserError, match="CLIP.*'gone'.*ViT-B-32"):
        CLIP("gone", "ViT-B-32", CPU)


def test_one_weight_missing_or_not_finite_is_refused(theirs, tmp_path):
    write(tmp_path, theirs)
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    save_file({k: v for k, v in state.items() if k != "visual.proj"}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="visual.proj"):
        CLIP(str(tmp_path), "ViT-L-14", CPU)
    state["visual.proj"][0, 0] = math.nan
    save_file(state, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="inf or nan in visual.proj"):
        CLIP(str(tmp_path), "ViT-L-14", CPU)


def test_coco_prompts_are_those_of_the_data_set(tmp_path):
    rows = [{"id": k, "image_id": 7 + k % 3, "caption": f" words {k}\n"} for k in (9, 2, 5, 3, 4, 1, 6)]
    file = tmp_path / "captions_val2014.json"
    images = [{"id": k, "file_name": f"{k}.jpg"} for k in (9, 8, 7, 20)]            # nobody described the last
    file.write_text(json.dumps({"images": images, "annotations": rows}), encoding="utf-8")
    _, known = coco.read(file)
    for seed in (0, 1):
        want = [known[k][seed64(seed, "coco", k) % len(known[k])] for k in (7, 8, 9)]
        assert read_prompts(str(file), seed) == want


@pytest.mark.slow
def test_the_clip_command(folder, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", arr_0=IMAGES.permute(0, 2, 3, 1).numpy())
    (tmp_path / "p.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    flags = [f"--images={tmp_path}/x.npz", f"--prompts={tmp_path}/p.txt", f"--clip={folder}", "--batch=2"]
    main(flags)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    want, _ = clip_score([(IMAGES, CAPTIONS)], CLIP(str(folder), "ViT-L-14", CPU), PROTOCOLS["l14"], ALONE)
    assert line["metric"] == "clip_l14" and line["value"] == pytest.approx(want.value, abs=1e-3)
    assert line["captions_cut"] == 1 and len(line["weights"]) == 64 and line["n"] == 5 and line["error"] > 0
    assert (line["model"], line["scale"], line["prefix"]) == ("ViT-L-14", 100.0, "")
    (tmp_path / "p.txt").write_text("dog\n", encoding="utf-8")
    with pytest.raises(UserError, match="5 images.*1 captions"):
        main(flags)
    for flag, says in (("--protocol=x", "unknown protocol='x'"), ("--prompts=gone.txt", "gone.txt cannot be read")):
        with pytest.raises(UserError, match=says):
            main([*flags, flag])
