"""Every file in configs/: it loads, its run may begin, and what its docstring states of size and time is so."""
import ast
import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import model
import train
from config import SIZES, Config, UserError, load, to_json
from runtime import checkpoint
from schedule import alpha_bar_table, rescale_guidance, to_sigma
from text import make_encoder
from transfer import init_from

ROOT = Path(__file__).parent.parent
FILES = {path.stem: path for path in sorted((ROOT / "configs").glob("*.py"))}
TEXTS = {name: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for name, path in FILES.items()}
RECIPES = ("imagenet256", "imagenet512", "cc12m256", "cc12m512")
PAIRS = (("shapes32", "shapes64"), ("imagenet256", "imagenet512"), ("cc12m256", "cc12m512"))
A100, SHARE = 312e12, 0.4               # dense bf16 FLOP/s, and the part of it that the hours assume

each = pytest.mark.parametrize("name", FILES)
recipe = pytest.mark.parametrize("name", RECIPES)
pair = pytest.mark.parametrize("low, high", PAIRS)


@cache
def complete(name):
    """The config with what its data would fill in: 10 classes for a folder."""
    cfg = load(str(FILES[name]))
    m = cfg.model
    if m.semantics == "class":
        m = dataclasses.replace(m, classes=m.classes or 10)
    if m.semantics == "text" and not m.text_dim:
        encoder = make_encoder(cfg)
        m = dataclasses.replace(m, text_dim=encoder.dim, text_length=encoder.length)
    return dataclasses.replace(cfg, model=m)


def parameters(m):
    with torch.device("meta"):
        return sum(p.numel() for p in model.build(m).parameters())


def stated(name, pattern):
    """The numbers, as they are written, that the only match of `pattern` in a docstring has."""
    found = re.findall(pattern, re.sub(r"\s+", " ", TEXTS[name]))
    assert len(found) == 1, f"configs/{name}.py states {pattern!r} {len(found)} times"
    words = [found[0]] if isinstance(found[0], str) else found[0]
    return [word.replace(",", "") for word in words]


def agrees(said, true):
    """`said`, a number as it is written, is `true` rounded to as many digits."""
    return f"{true:.{len(said.partition('.')[2])}f}" == said


# ---------------------------------------------------------------- every file

@each
def test_its_run_may_begin(name):
    train.check(load(str(FILES[name])), 1)


@each
def test_its_model_can_be_built_and_agrees_with_what_is_varied(name):
    cfg = complete(name)
    assert parameters(cfg.model) > 0 and model.flops(cfg.model) > 0
    assert {*model.control_names(cfg.model)} <= {*cfg.augment.split("+")}, "a control that does not vary"


@each
def test_two_files_do_not_share_a_run_folder_and_each_names_itself(name):
    assert [n for n in FILES if load(str(FILES[n])).out == load(str(FILES[name])).out] == [name]
    assert f"train.py --config=configs/{name}.py" in TEXTS[name]


def test_rounding_is_judged_by_the_digits_that_are_written():
    assert agrees("101.5", 101.54) and agrees("2.39", 2.386) and agrees("5.0", 5.04)
    assert not agrees("101.5", 101.56) and not agrees("2.39", 2.396) and not agrees("0.840", 0.8407)


# ---------------------------------------------------------------- size and time

@pytest.mark.parametrize("name", [*RECIPES, "shapes32", "shapes64"])
def test_the_docstring_counts_parameters_operations_and_images(name):
    cfg = complete(name)
    assert agrees(stated(name, r"([\d.]+) M parameters")[0], parameters(cfg.model) / 1e6)
    gflop, batch, steps = stated(name, r"3 x ([\d.,]+) GFLOP x ([\d,]+) x ([\d,]+) images")
    assert agrees(gflop, model.flops(cfg.model) / 1e9) and (int(batch), int(steps)) == (cfg.batch, cfg.steps)


@recipe
def test_hours_are_three_forward_passes_at_the_share_of_peak_that_is_stated(name):
    cfg = complete(name)
    hours, machines, peak, share = stated(
        name, r"Hours ([\d.]+) = .* images / \((\d+) x (\d+) TFLOP/s x (\d+) %\)")
    assert (int(machines), int(peak), int(share)) == (16, A100 / 1e12, SHARE * 100)
    assert "2 x 8 A100 of 80 GB" in TEXTS[name]
    total = 3 * model.flops(cfg.model) * cfg.batch * cfg.steps
    assert agrees(hours, total / (16 * A100 * SHARE) / 3600)


@pytest.mark.parametrize("name", ["shapes32", "shapes64"])
def test_minutes_on_two_cores_are_the_same_arithmetic(name):
    cfg = complete(name)
    minutes, rate = stated(name, r"([\d.]+) minutes = .* / ([\d.]+) TFLOP/s")
    assert agrees(minutes, 3 * model.flops(cfg.model) * cfg.batch * cfg.steps / (float(rate) * 1e12) / 60)


# ---------------------------------------------------------------- the paper's recipes

@recipe
def test_a_recipe_is_what_the_paper_says(name):
    """[COND] table A4 and sec. 2; iterations, batch and guidance are by resolution."""
    cfg, low = complete(name), name.endswith("256")
    m = cfg.model
    assert (m.arch, m.channels, m.patch, m.resolution) == ("mmdit", 4, 2, 32 if low else 64)
    assert dict(depth=m.depth, width=m.width, heads=m.heads) == SIZES["XL"]
    assert (m.controls, m.control_weight, m.control_alpha) == ("crop+flip+size", "cosine", 8.0)
    assert (cfg.beta1, cfg.beta2, cfg.weight_decay, cfg.cooldown) == (0.9, 0.95, 0.03, 0.0) and cfg.warmup > 0
    assert (cfg.cond_dropout, cfg.control_dropout, m.prediction, cfg.loss_sigma_power) == (0.1, 0.1, "eps", 0.0)
    assert (cfg.batch, cfg.crop, cfg.guidance) == ((2048, "local", 1.5) if low else (384, "global", 2.0))
    if name.startswith("cc12m"):
        assert (m.text_dim, m.text_length, cfg.padding, cfg.padding_noise) == (768, 77, "noisy", 0.02)
        assert cfg.encoder.startswith("clip:")
    else:
        assert (m.semantics, m.classes) == ("class", 1000)


@recipe
def test_sixteen_processes_share_the_batch_of_a_recipe(name):
    cfg = load(str(FILES[name]))
    train.check(cfg, 16)
    assert cfg.batch == 16 * cfg.microbatch
    with pytest.raises(UserError, match="17 processes"):
        train.check(cfg, 17)


@recipe
def test_a_folder_of_pictures_is_refused_as_the_docstring_says(name, tmp_path):
    (tmp_path / "ring").mkdir()
    Image.new("RGB", (99, 80)).save(tmp_path / "ring" / "0.png")
    cfg = dataclasses.replace(complete(name), data=str(tmp_path), encoder="words")
    with pytest.raises(UserError, match="channels=4" if "imagenet" in name else "captions"):
        data.open_source(cfg)


# ---------------------------------------------------------------- low and high resolution

@pair
def test_the_high_resolution_run_goes_on_from_the_low_one(low, high):
    """Sigma, guidance and positions follow s = 2; nothing else of the model changes."""
    a, b = complete(low), complete(high)
    s = b.model.resolution / a.model.resolution
    assert s == 2 and b.init_from == a.out and a.init_from == ""
    changed = {f.name for f in dataclasses.fields(a.model) if getattr(a.model, f.name) != getattr(b.model, f.name)}
    assert changed == {"resolution", "sigma_scale"}
    sigma = [to_sigma(alpha_bar_table(m.schedule, m.timesteps, m.sigma_scale)) for m in (a.model, b.model)]
    assert torch.allclose(sigma[1], s * sigma[0], rtol=1e-12)
    assert b.guidance == rescale_guidance(a.guidance, s)
    assert a.model.positions == b.model.positions == "resample" and a.model.pos_base == b.model.pos_base > 0


def test_the_weights_of_32_px_all_go_into_the_model_of_64_px(tmp_path):
    a, b = complete("shapes32"), complete("shapes64")
    torch.manual_seed(0)
    weights = model.build(a.model).state_dict()
    weights = {k: torch.randn(v.shape) for k, v in weights.items()}
    checkpoint.write_weights(tmp_path / "weights.safetensors", weights, {"config": to_json(a)})
    net = model.build(b.model)
    report = init_from(str(tmp_path), net, b)
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    assert "fresh" not in report and "left out" not in report and "note" not in report
    assert "resolution: 32 -> 64" in report and ": 1.0 -> 2.0" in report        # sigma grows with the side


def test_the_text_run_can_start_from_the_classes_of_imagenet_but_for_what_reads_the_caption(tmp_path):
    """--init_from=out/imagenet256, as configs/cc12m512.py says, at a width that a test can afford."""
    small = dict(width=32, depth=2, heads=4)
    a, b = (dataclasses.replace(complete(n).model, **small) for n in ("imagenet256", "cc12m512"))
    file = tmp_path / "weights.safetensors"
    checkpoint.write_weights(file, model.build(a).state_dict(), {"config": to_json(Config(model=a))})
    report = init_from(str(file), model.build(b), dataclasses.replace(complete("cc12m512"), model=b))
    assert re.findall(r"^  (\w+) +fresh", report, re.M) == ["y_embedder"] and "note" not in report
