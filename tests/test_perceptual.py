"""CLIPScore and LPIPS diversity: the arithmetic of open_clip and lpips, with random weights, which only tests may.

No two sizes are equal: B 5, pictures 37 x 52 and 48 x 40, CLIP's side 30, D 40; P 3 prompts of K 4 pictures.
"""
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from threading import Barrier

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fid
import sample
from config import UserError
from evaluation import lpips
from evaluation.clip_score import CLIP, CONFIG, PROTOCOLS, clip_score
from evaluation.lpips import lpips_diversity
from fid import mean_over, mean_pair_distance, size_groups
from rng import seed64
from runtime import checkpoint, distributed
from runtime.optional import optional_import
from sample import read_prompts
from sources import coco
from test_generate import run_folder

open_clip = optional_import("open_clip", "CLIP", "open_clip_torch")
CPU = torch.device("cpu")
ALONE = distributed.Dist(CPU, 0, 1)
TEXT = dict(context_length=77, vocab_size=49408, width=64, heads=4, layers=2)
VISION = dict(image_size=30, layers=2, width=48, patch_size=10, head_width=16)
CAPTIONS = ["a small red ring", "dog", "", "9 lives & more", "a dog and " * 30 + "cat"]
DRAW = torch.Generator().manual_seed(0)
PICTURES = torch.randint(0, 256, (5, 3, 37, 52), dtype=torch.uint8, generator=DRAW)


@pytest.fixture(scope="module")
def theirs():
    """open_clip's own small CLIP, its weights drawn wide enough that scores differ and some are negative."""
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


def cosines(net, pictures, captions):
    """By open_clip's own preprocessing of Pillow pictures, one pair at a time."""
    from PIL import Image
    prepare = open_clip.image_transform(30, is_train=False, mean=clip_score.MEAN, std=clip_score.STD)
    found = []
    for x, caption in zip(pictures, captions):
        image = prepare(Image.fromarray(x.permute(1, 2, 0).numpy()))[None]
        words = net.encode_text(open_clip.tokenize([caption]), normalize=True)
        found.append((net.encode_image(image, normalize=True) * words).sum().item())
    return torch.tensor(found, dtype=torch.float64)


# ---------------------------------------------------------------- means

def test_mean_and_standard_error_are_those_of_the_values():
    x = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1e6
    got = mean_over(x.tolist(), ALONE)
    assert got.value == pytest.approx(x.mean().item(), rel=1e-15) and got.n == 50
    assert got.error == pytest.approx((x.std() / math.sqrt(50)).item(), rel=1e-9)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_fewer_than_two_values_are_no_mean(values):
    with pytest.raises(UserError, match=f"at least 2 pictures or prompts, got {len(values)}"):
        mean_over(values, ALONE)


def test_three_processes_one_of_them_without_values_give_what_one_does(monkeypatch):
    meet, given = Barrier(3), {}

    def add_up(x, dist):
        given[dist.rank] = x
        meet.wait()
        total = sum(given.values())
        meet.wait()
        return total

    monkeypatch.setattr(distributed, "all_reduce_sum", add_up)
    parts = [1.0, 2.0, 4.0, 8.0], [], [16.0, 32.0, 64.5]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(lambda rank: mean_over(parts[rank], distributed.Dist(CPU, rank, 3)), range(3)))
    monkeypatch.undo()
    want = mean_over([v for part in parts for v in part], ALONE)
    assert got[0] == got[1] == got[2] and got[0].n == 7
    assert (got[0].value, got[0].error) == pytest.approx((want.value, want.error), rel=1e-14)


# ---------------------------------------------------------------- CLIPScore

@pytest.mark.parametrize("protocol", ["l14", pytest.param("hessel", marks=pytest.mark.slow)])
def test_clip_score_is_the_hand_computation_of_open_clip(clip, theirs, protocol):
    scale, prefix = {"l14": (100, ""), "hessel": (2.5, "A photo depicts ")}[protocol]
    want = scale * cosines(theirs, PICTURES, [prefix + c for c in CAPTIONS]).clamp(min=0)
    got, cut = clip_score([(PICTURES, CAPTIONS)], clip, PROTOCOLS[protocol], ALONE)
    assert got.value == pytest.approx(want.mean().item(), abs=2e-3 * scale)     # the resize differs by a level or two
    assert got.error == pytest.approx((want.std() / math.sqrt(5)).item(), abs=2e-3 * scale)
    assert got.n == 5 and cut == 1 and want.std() > 0.05 * scale


def test_negative_cosines_count_as_zero_pair_by_pair(clip, theirs):
    raw = cosines(theirs, PICTURES, CAPTIONS)
    assert (raw < -0.01).any() and (raw > 0.01).any()           # else nothing is tested
    got, _ = clip_score([(PICTURES, CAPTIONS)], clip, PROTOCOLS["l14"], ALONE)
    assert got.value > 100 * max(raw.mean().item(), 0) + 0.1


def test_pictures_that_need_no_resize_give_open_clips_vectors_to_rounding(clip, theirs):
    x = PICTURES[..., :30, :30]
    mean, std = (torch.tensor(v)[:, None, None] for v in (clip_score.MEAN, clip_score.STD))
    want = theirs.encode_image((x.float() / 255 - mean) / std, normalize=True)
    assert torch.allclose(clip.pictures(x), want, atol=1e-6)
    tall = torch.randint(0, 256, (2, 3, 48, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    assert clip.pictures(tall).shape == (2, 40)


def test_batches_do_not_matter_and_pairs_do(clip):
    one = clip_score([(PICTURES, CAPTIONS)], clip, PROTOCOLS["l14"], ALONE)
    split = clip_score([(PICTURES[:2], CAPTIONS[:2]), (PICTURES[2:], CAPTIONS[2:])], clip, PROTOCOLS["l14"], ALONE)
    assert split[0].value == pytest.approx(one[0].value, abs=1e-3) and split[1] == one[1]
    moved = clip_score([(PICTURES, CAPTIONS[1:] + CAPTIONS[:1])], clip, PROTOCOLS["l14"], ALONE)
    assert abs(moved[0].value - one[0].value) > 0.1
    with pytest.raises(ValueError, match="5 images with 4 captions"):
        clip_score([(PICTURES, CAPTIONS[:4])], clip, PROTOCOLS["l14"], ALONE)


def test_captions_that_are_cut_are_counted_at_the_edge(clip):
    assert [clip.captions([c])[1] for c in ("dog " * 75, "dog " * 76)] == [0, 1]


def test_it_computes_in_true_fp32_whatever_the_run_has_set(clip):
    want = clip_score([(PICTURES, CAPTIONS)], clip, PROTOCOLS["l14"], ALONE)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert clip_score([(PICTURES, CAPTIONS)], clip, PROTOCOLS["l14"], ALONE) == want
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_without_quickgelu_or_weights_there_is_no_score(theirs, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="QuickGELU.*openai:"):
        CLIP(str(write(tmp_path, theirs, quick=False)), "ViT-L-14", CPU)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(UserError, match="QuickGELU"):
        CLIP(str(tmp_path), "ViT-L-14", CPU)
    with pytest.raises(UserError, match="does not fit"):        # told so, it is taken for the model of that name
        CLIP(f"openai:{tmp_path}", "ViT-B-32", CPU)
    for name in ("ViT-L-14", "ViT-B-32"):
        with pytest.raises(UserError, match=f"no CLIP weights at 'gone'.*{name}"):
            CLIP("gone", name, CPU)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda known: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match="no network.*timm/vit_base_patch32_clip_224.openai"):
        CLIP("openai", "ViT-B-32", CPU)


def test_one_weight_missing_or_not_finite_is_refused(theirs, tmp_path):
    write(tmp_path, theirs)
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    save_file({k: v for k, v in state.items() if k != "visual.proj"}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="1 missing.*visual.proj"):
        CLIP(str(tmp_path), "ViT-L-14", CPU)
    state["visual.proj"][0, 0] = math.nan
    save_file(state, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="inf or nan in visual.proj"):
        CLIP(str(tmp_path), "ViT-L-14", CPU)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="no safetensors file"):
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
    np.savez(tmp_path / "x.npz", arr_0=PICTURES.permute(0, 2, 3, 1).numpy())
    (tmp_path / "x.json").write_text(json.dumps({"steps": 50, "lam": 5.0, "n": 5}), encoding="utf-8")
    (tmp_path / "p.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    flags = [f"--images={tmp_path}/x.npz", f"--prompts={tmp_path}/p.txt", f"--clip={folder}", "--batch=2"]
    clip_score.main([*flags, "--protocol=coco"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    want, _ = clip_score([(PICTURES, CAPTIONS)], CLIP(str(folder), "ViT-L-14", CPU), PROTOCOLS["l14"], ALONE)
    assert line["metric"] == "clip_coco" and line["value"] == pytest.approx(want.value, abs=1e-3)
    assert line["captions_cut"] == 1 and len(line["weights"]) == 64 and line["n"] == 5 and line["error"] > 0
    assert line["departs"] == ["n: 40504 -> 5", "steps: 25 -> 50"]
    (tmp_path / "p.txt").write_text("dog\n", encoding="utf-8")
    with pytest.raises(UserError, match="5 images.*1 captions"):
        clip_score.main(flags)
    for flag, says in (("--protocol=x", "unknown protocol='x'"), ("--prompts=gone.txt", "no file at --prompts")):
        with pytest.raises(UserError, match=says):
            clip_score.main([*flags, flag])


# ---------------------------------------------------------------- LPIPS

@pytest.fixture(scope="module")
def random_lpips():
    """lpips's own network, its trunk random; the heads are those of the package."""
    lpips = lpips.import_lpips()
    torch.manual_seed(0)
    return lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False)


def groups(noise):
    """P 3 prompts of K 4 pictures that differ a little."""
    g = torch.Generator().manual_seed(5)
    base = torch.randint(0, 256, (3, 1, 3, 70, 64), generator=g).float()
    return (base + noise * torch.randn(3, 4, 3, 70, 64, generator=g)).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("noise, rel", [(60, 1e-5), pytest.param(2, 1e-4, marks=pytest.mark.slow)])
def test_diversity_is_the_pair_loop_of_the_lpips_package(random_lpips, noise, rel):
    x = groups(noise)
    scaled = x.float() / 127.5 - 1
    first, second = zip(*((i, j) for i in range(4) for j in range(i)))
    one, two = (scaled[:, list(k)].flatten(0, 1) for k in (first, second))     # the 6 pairs of every prompt
    want = random_lpips(one, two).flatten().unflatten(0, (3, 6)).double().mean(1)
    got = lpips_diversity([x[:1], x[1:]], random_lpips, ALONE)
    assert got.value == pytest.approx(want.mean().item(), rel=rel) and got.n == 3 and got.value > 0
    assert got.error == pytest.approx((want.std() / math.sqrt(3)).item(), rel=1e-3)


def test_equal_pictures_are_at_zero_and_their_order_does_not_matter(random_lpips):
    x = groups(20)
    same = lpips_diversity([x[:, :1].expand(-1, 4, -1, -1, -1)], random_lpips, ALONE)
    assert same.value < 1e-10
    one, two = (lpips_diversity([y], random_lpips, ALONE).value for y in (x, x[:, [2, 0, 3, 1]]))
    assert one == pytest.approx(two, rel=1e-5) and one > 1e6 * same.value


def test_the_variance_form_is_the_mean_over_pairs_for_any_vectors():
    g = torch.Generator().manual_seed(2)
    for K in (2, 3, 7):
        parts = [torch.randn(4, K, 6, 5, generator=g).double() + 3, torch.randn(4, K, 9, generator=g).double()]
        flat = torch.cat([p.flatten(2) for p in parts], 2)
        want = torch.stack([(flat[:, i] - flat[:, j]).square().sum(1) for i in range(K) for j in range(i)]).mean(0)
        assert torch.allclose(mean_pair_distance(parts), want, rtol=1e-12)
    near = 1 + 1e-4 * torch.randn(1, 5, 1000, generator=g)      # fp32: differences far below the vectors' length
    far = near.double()
    want = torch.stack([(far[:, i] - far[:, j]).square().sum(1) for i in range(5) for j in range(i)])
    assert torch.allclose(mean_pair_distance([near]), want.mean(0), rtol=1e-4)
    with pytest.raises(ValueError, match="at least two"):
        mean_pair_distance([torch.zeros(3, 1, 5)])


def test_pictures_that_are_not_bytes_are_refused(random_lpips, clip):
    for wrong in (torch.zeros(2, 3, 64, 70), torch.zeros(2, 4, 64, 70, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="wanted uint8 images"):
            lpips.lpips_features(random_lpips, wrong)
        with pytest.raises(ValueError, match="wanted uint8 images"):
            clip.pictures(wrong)


def test_no_lpips_without_its_very_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("LPIPS_TRUNK", "")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="no weights at .*7be5be79.pth; get https://.*--trunk or LPIPS_TRUNK"):
        lpips.load_lpips("", CPU)
    (tmp_path / "wrong.pth").write_bytes(b"some other weights")
    with pytest.raises(UserError, match="its sha256 is .*, not 7be5be79"):
        lpips.load_lpips(str(tmp_path / "wrong.pth"), CPU)
    monkeypatch.setenv("LPIPS_TRUNK", str(tmp_path / "wrong.pth"))
    with pytest.raises(UserError, match="its sha256 is"):
        lpips.load_lpips("", CPU)


def test_the_lpips_command(random_lpips, tmp_path, monkeypatch, capsys):
    """With small groups in place of a run's images, which AlexNet cannot see at 16 pixels."""
    run_folder(tmp_path / "run", controls="size", control_weight="uniform")
    monkeypatch.setattr(lpips, "load_lpips", lambda path, device: random_lpips)
    monkeypatch.setattr(lpips, "size_groups", lambda o, sizes, dist: [groups(20)[:, :len(sizes)]])
    lpips.main([f"--out={tmp_path}/run", "--sizes=16+48+96", "--n=3", "--steps=2"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    want = lpips_diversity([groups(20)[:, :3]], random_lpips, ALONE)
    assert (line["value"], line["error"], line["n"]) == (want.value, want.error, 3) and line["metric"] == "lpips_alex"
    assert (line["sizes"], line["K"], line["pairs"], line["lam"], line["eta"]) == ([16, 48, 96], 3, 3, 1.5, 0.25)


@pytest.mark.slow
def test_trunk_and_heads_are_filled_in_by_name(random_lpips, tmp_path, monkeypatch):
    """A file with torchvision's names and the wanted hash gives that trunk; the package's heads are checked."""
    from torchvision.models import alexnet
    torch.manual_seed(7)
    theirs = alexnet(weights=None).features
    trunk = {f"features.{k}": v for k, v in theirs.state_dict().items()}
    torch.save(trunk, tmp_path / "trunk.pth")
    monkeypatch.setattr(lpips, "TRUNK_SHA256", sha256((tmp_path / "trunk.pth").read_bytes()).hexdigest())
    before = torch.get_rng_state()
    net = lpips.load_lpips(str(tmp_path / "trunk.pth"), CPU)
    assert torch.equal(before, torch.get_rng_state()) and not any(p.requires_grad for p in net.parameters())
    x = torch.randn(2, 3, 64, 70, generator=torch.Generator().manual_seed(1))
    assert torch.equal(net.net(x)[4], theirs[:12](x))
    heads = random_lpips.lins.state_dict()
    assert all(torch.equal(v, heads[k]) for k, v in net.lins.state_dict().items())
    assert all((p >= 0).all() for p in net.lins.parameters())
    monkeypatch.setattr(lpips, "HEADS_SHA256", "0" * 64)
    with pytest.raises(UserError, match="alex.pth.*not 000.*pip install"):
        lpips.load_lpips(str(tmp_path / "trunk.pth"), CPU)
    with pytest.raises(KeyError):
        lpips.fill_lpips(net, {k: v for k, v in trunk.items() if k != "features.6.bias"}, {})


# ---------------------------------------------------------------- sizes of one prompt

def test_sizes_are_presets_or_numbers():
    for text, want in ("hr", (256, 512, 1024)), ("all", (64, 128, 256, 512, 1024)), ("8+16", (8, 16)):
        assert lpips.read_sizes(text) == want
    for text in ("", "64", "64+x", "0+4", "low"):
        with pytest.raises(UserError, match="neither a preset, all, hr"):
            lpips.read_sizes(text)


def test_groups_of_latents_are_decoded_and_of_the_file_that_is_named(tmp_path, monkeypatch):
    out = run_folder(tmp_path / "run", "class", channels=4, controls="size", control_weight="uniform")
    o, seen = sample.Options(out=str(out), n=2, steps=2, dtype="float32"), []
    with pytest.raises(UserError, match="latents of 4 channels"):
        next(size_groups(o, (16, 48, 96), ALONE))

    def decoder_of(about, path, channels, device):
        seen.append((about["file"], path, channels))
        return lambda z: z[:, :3].repeat(1, 1, 2, 2), 2
    monkeypatch.setattr(fid, "decoder_of", decoder_of)
    tensors, header = checkpoint.read_weights(out / "weights.safetensors")
    header = {k: v for k, v in header.items() if k != "sha256"}
    for file, scale in (("weights.safetensors", 1), ("wide.safetensors", 0.5)):
        checkpoint.write_weights(out / file, {k: scale * v for k, v in tensors.items()}, {**header, "file": file})
    asked = [replace(o, ema_file=file, autoencoder="vae") for file in ("weights.safetensors", "wide.safetensors")]
    first, other = (torch.cat(list(size_groups(a, (16, 48, 96), ALONE))) for a in asked)
    assert seen == [(a.file, "vae", 4) for a in asked]
    assert first.shape == (2, 3, 3, 32, 32) and torch.equal(first[..., :16, :16], first[..., 16:, 16:])
    assert not torch.equal(first, other) and (first[:, 0] != first[:, 2]).flatten(1).any(1).all()


def test_groups_differ_in_size_alone_and_do_not_know_the_processes(tmp_path):
    run_folder(tmp_path / "run", controls="size", control_weight="uniform")
    o = sample.Options(out=f"{tmp_path}/run", n=5, steps=2, batch=8, dtype="float32")
    alone = torch.cat(list(size_groups(o, (16, 48, 96), ALONE)))
    assert alone.shape == (5, 3, 3, 16, 16) and alone.dtype == torch.uint8
    assert (alone[:, 0] != alone[:, 2]).flatten(1).any(1).all()
    shared = [list(size_groups(o, (16, 48, 96), distributed.Dist(CPU, r, 2))) for r in range(2)]
    assert sum(len(part) for parts in shared for part in parts) == 5
    apart = (torch.cat([part for parts in zip(*shared) for part in parts]
                       + [p for parts in shared for p in parts[min(map(len, shared)):]]).int() - alone.int()).abs()
    assert apart.max() <= 1                                     # a batch of another size rounds differently
    turned = torch.cat(list(size_groups(o, (96, 16, 48), ALONE)))
    assert (turned[:, [1, 2, 0]].int() - alone.int()).abs().max() <= 1
    with pytest.raises(UserError, match="no --size of their own"):
        next(size_groups(sample.Options(out=o.out, size="16,16"), (16, 48), ALONE))
