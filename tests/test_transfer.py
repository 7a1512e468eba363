"""Initializing from another run: kept weights are equal bit for bit, fresh ones untouched, and the report is right.

No two sizes are equal: C 3, P 2, D 24, H 3, d 8, depth 5, E 11, L 7, grids 9 and 18, classes 6 and 13.
"""
import dataclasses
import json
import os
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import model
from conditioning import Condition
from config import Config, ModelConfig, UserError, to_json
from runtime import checkpoint
from transfer import extent, init_from, layer_of

TEXT = ModelConfig(semantics="text", text_dim=11, text_length=7, resolution=18, patch=2, width=24, depth=5, heads=3,
                   controls="crop+size", positions="resample", pos_base=9)
CLASS = dataclasses.replace(TEXT, semantics="class", classes=6, text_dim=0, text_length=0)
LARGE = dict(resolution=36, sigma_scale=2.0)
PARTS = ("x_embedder", "t_embedder", "y_embedder", "control_embedder", "blocks", "final_layer")


def network(m, seed):
    """A network without a weight that is zero or equal to one of another seed."""
    torch.manual_seed(seed)
    net = model.build(m)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    return net


def run(path, m, **changes):
    """A run folder with the averaged weights of a model; returns them."""
    path.mkdir(exist_ok=True)
    weights = network(m, 1).state_dict()
    checkpoint.write_weights(path / "weights.safetensors", weights, {"config": to_json(Config(model=m, **changes))})
    return weights


def transfer(tmp_path, old, new, **changes):
    """(report, names of the kept weights, names of the fresh ones, old weights); every weight is one or the other."""
    there, net = run(tmp_path / "old", old), network(new, 2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    report = init_from(str(tmp_path / "old"), net, Config(model=new, **changes))
    after = net.state_dict()
    kept = [k for k in after if k in there and torch.equal(after[k], there[k])]
    fresh = [k for k in after if torch.equal(after[k], before[k])]
    assert not {*kept} & {*fresh} and {*kept} | {*fresh} == {*after}
    assert_reported(report, kept, fresh, after)
    return report, kept, fresh, there


def assert_reported(report, kept, fresh, own):
    """The report counts tensors and parameters of every part as they are."""
    for word, names in (("kept", kept), ("fresh", fresh)):
        for part in PARTS:
            mine = [own[n].numel() for n in names if n.startswith(part + ".")]
            said = re.findall(rf"^  {part} +{word} +([\d,]+) tensors?, ([\d,]+) parameters", report, re.M)
            assert said == ([(f"{len(mine):,}", f"{sum(mine):,}")] if mine else [])


# ---------------------------------------------------------------- what is kept

@pytest.mark.parametrize("arch, semantics", [*((arch, "class") for arch in model.ARCHS), ("mmdit", "none")])
def test_across_resolution_every_weight_is_kept(arch, semantics, tmp_path):
    small = dataclasses.replace(CLASS, arch=arch, semantics=semantics)
    report, kept, fresh, there = transfer(tmp_path, small, dataclasses.replace(small, **LARGE))
    assert {*kept} == {*there} and not fresh
    assert "changed           resolution: 18 -> 36, sigma_scale: 1.0 -> 2.0" in report and "note: " not in report


def test_an_initialized_network_computes_what_the_old_run_does(tmp_path):
    run(tmp_path / "old", TEXT)
    old, _ = model.load(tmp_path / "old")
    net = network(TEXT, 2)
    init_from(str(tmp_path / "old" / "weights.safetensors"), net, Config(model=TEXT))     # the file does as well
    g = torch.Generator().manual_seed(0)
    x, i = torch.randn(4, 3, 18, 18, generator=g), torch.tensor([0.0, 25, 500, 999])
    cond = Condition(text=torch.randn(4, 7, 11, generator=g), crop=torch.rand(4, 2, generator=g),
                     size=99 * torch.rand(4, 2, generator=g), has_controls=torch.ones(4))
    assert torch.equal(net(x, i, cond), old(x, i, cond))


def test_another_number_of_classes_makes_the_class_embedder_fresh(tmp_path):
    report, kept, fresh, _ = transfer(tmp_path, CLASS, dataclasses.replace(CLASS, classes=13))
    assert {layer_of(n) for n in fresh} == {"y_embedder"} and len(fresh) == 5
    assert "y_embedder.table.embedding_table.weight (7, 24) -> (14, 24)" in report


def started(tmp_path, m, about, source, **changes):
    """The notes on starting from a run of `m` with `about` in its header for one of `m` on `source`."""
    path = tmp_path / "old"
    path.mkdir(exist_ok=True)
    header = {"config": to_json(Config(model=m))} | {key: json.dumps(value) for key, value in about.items()}
    checkpoint.write_weights(path / "weights.safetensors", network(m, 1).state_dict(), header)
    report = init_from(str(path), network(dataclasses.replace(m, **changes), 2),
                        Config(model=dataclasses.replace(m, **changes)), source)
    return [line for line in report.splitlines() if line.startswith("note: ")]


def test_classes_of_other_names_are_reported(tmp_path):
    names = ["tench", "goldfish", "shark", "ray", "cock", "hen"]
    said = partial(started, tmp_path, CLASS, {"classes": names})
    assert said(SimpleNamespace(classes=names)) == []
    note, = said(SimpleNamespace(classes=["tench", "shark", "goldfish", *names[3:]]))
    assert "2 of 6 have other names: 1 was 'goldfish' and is 'shark', 2 was 'shark' and is 'goldfish'" in note
    assert said(None) == []
    assert said(SimpleNamespace(classes=[f"c{k}" for k in range(13)]), classes=13) == []    # none of them is kept
    text = started(tmp_path, TEXT, {"classes": []}, SimpleNamespace(classes=names))
    assert text == []


LATENTS = {"autoencoder": {"path": "a/vae", "sha256": "a" * 64}, "scaling": "channel",
           "statistics": {"mean": [0.1, 0.2, 0.3, 0.4], "std": [1.0, 2.0, 3.0, 4.0]}}
OTHER_VAE = LATENTS | {"autoencoder": {"path": "b/vae", "sha256": "b" * 64}}
MOVED = LATENTS | {"autoencoder": {"path": "elsewhere", "sha256": "a" * 64}}
OTHER_DATA = LATENTS | {"statistics": {"mean": [0.1, 0.2, 0.3, 0.5], "std": [1.0, 2.0, 3.0, 4.0]}}
FACTOR = LATENTS | {"scaling": "factor"}


@pytest.mark.parametrize("was, now, says", [
    (LATENTS, LATENTS, None), (LATENTS, MOVED, None), (FACTOR, OTHER_DATA | {"scaling": "factor"}, None),
    (LATENTS, OTHER_VAE, "latents of aaaaaaaaaaaa .* latents of bbbbbbbbbbbb"),
    (LATENTS, FACTOR, "scaled by channel.* scaled by factor"),
    (LATENTS, OTHER_DATA, "std .0.1, 0.2, 0.3, 0.4, 1.* std .0.1, 0.2, 0.3, 0.5, 1."),
    (LATENTS, None, "saw latents .* and sees pixels now"), (None, LATENTS, None)])
def test_other_latents_are_reported(was, now, says, tmp_path):
    source = SimpleNamespace(classes=[], **({"meta": now} if now else {}))
    notes = started(tmp_path, dataclasses.replace(TEXT, channels=4, depth=1), {"latents": was} if was else {}, source)
    assert len(notes) == (says is not None) and re.search(says or "", "".join(notes))


def test_latents_instead_of_pixels_are_reported(tmp_path):
    pixels, latents = SimpleNamespace(classes=[]), SimpleNamespace(classes=[], meta=LATENTS)
    assert started(tmp_path, TEXT, {}, pixels) == []
    assert "saw pixels and sees latents of" in started(tmp_path, TEXT, {}, latents)[0]


@pytest.mark.parametrize("old, new", [(CLASS, TEXT), (TEXT, CLASS), (TEXT, dataclasses.replace(TEXT, text_dim=13))])
def test_other_semantics_keep_all_but_what_reads_them(old, new, tmp_path):
    report, kept, fresh, there = transfer(tmp_path, old, new)
    assert {layer_of(n) for n in fresh} == {"y_embedder"} and not [n for n in kept if n.startswith("y_")]
    assert f"semantics {old.semantics}" in report.splitlines()[0]
    left = [n for n in there if n.startswith("y_") and n not in fresh]
    assert bool(left) == bool(re.search(rf"  y_embedder +left out +{len(left)} tensor", report))


def test_another_architecture_keeps_weights_of_the_same_name_and_shape(tmp_path):
    report, kept, fresh, _ = transfer(tmp_path, dataclasses.replace(CLASS, arch="dit"), CLASS)
    assert {layer_of(n).split(".", 2)[-1] for n in fresh} == {"y_embedder", "attn.ctx_qkv", "attn.q_norm",
                                                              "attn.k_norm"}
    assert report.startswith("starting from ") and "arch dit" in report.splitlines()[0]


def test_another_text_encoder_is_reported(tmp_path):
    report, _, fresh, _ = transfer(tmp_path, TEXT, TEXT, encoder="clip:openai")
    assert not fresh and "note: captions were encoded by words and are encoded by clip:openai now" in report


# ---------------------------------------------------------------- depth, controls, output

@pytest.mark.parametrize("arch", model.ARCHS)
@pytest.mark.parametrize("depth", [4, 7])
def test_blocks_are_kept_from_the_first_on(arch, depth, tmp_path):
    """A last block owns fewer weights for its context than the same block in the middle: only those do not fit."""
    old = dataclasses.replace(CLASS, arch=arch)
    report, kept, fresh, there = transfer(tmp_path, old, dataclasses.replace(old, depth=depth))
    common = min(depth, 5)
    whole = {n for n in there if n.startswith("blocks.") and int(n.split(".")[1]) < common - 1}
    assert whole and whole <= {*kept}
    beyond = {n for n in fresh if n.startswith("blocks.") and int(n.split(".")[1]) >= 5}
    assert {int(n.split(".")[1]) for n in beyond} == set(range(5, depth))
    rest = {n for n in fresh if n not in beyond}
    of_context = r"\.(attn\.ctx_\w+|ctx_\w+\.\w+|adaLN_modulation\.1)\.(weight|bias)"   # ditatt has one for all
    assert all(re.fullmatch(rf"blocks\.{common - 1}{of_context}", n) for n in rest)
    assert bool(rest) == (arch not in ("dit", "pixart", "mpdit")) and f"blocks.{common - 1}.attn.qkv.weight" in kept
    assert ("left out" in report) == (depth < 5)


def test_a_group_of_controls_is_kept_or_fresh_as_a_whole(tmp_path):
    """With a trained last layer on a fresh first one a new control would have an effect, and a random one."""
    report, kept, fresh, _ = transfer(tmp_path, TEXT, dataclasses.replace(TEXT, controls="crop+flip+size"))
    assert {layer_of(n) for n in fresh} == {"control_embedder.mlps.high"} and len(fresh) == 4
    assert "control_embedder.mlps.low.2.weight" in kept
    assert "control_embedder.mlps.high.0.weight (24, 512) -> (24, 768)" in report


def test_new_controls_are_fresh_and_old_ones_left_out(tmp_path):
    free = dataclasses.replace(TEXT, controls="")
    report, _, fresh, _ = transfer(tmp_path, free, TEXT)
    assert {layer_of(n) for n in fresh} == {"control_embedder.mlps.high", "control_embedder.mlps.low"}
    report, _, fresh, _ = transfer(tmp_path, TEXT, free)
    assert not fresh and re.search("control_embedder +left out +8 tensors", report)


def test_another_patch_keeps_the_blocks(tmp_path):
    report, _, fresh, _ = transfer(tmp_path, TEXT, dataclasses.replace(TEXT, patch=3, pos_base=6))
    assert {layer_of(n) for n in fresh} == {"x_embedder", "final_layer.linear"}
    assert "x_embedder.proj.weight (24, 3, 2, 2) -> (24, 3, 3, 3)" in report and "--model.pos_base=9" in report


def test_another_prediction_makes_the_last_layer_fresh(tmp_path):
    report, _, fresh, _ = transfer(tmp_path, TEXT, dataclasses.replace(TEXT, prediction="v"))
    assert {layer_of(n) for n in fresh} == {"final_layer.linear"}
    assert "  changed           prediction: 'eps' -> 'v'" in report


# ---------------------------------------------------------------- the report

def test_changed_fields_are_reported(tmp_path):
    new = dataclasses.replace(TEXT, timesteps=500, schedule="linear")
    report = transfer(tmp_path, TEXT, new)[0]
    assert "changed           timesteps: 1000 -> 500, schedule: 'scaled_linear' -> 'linear'" in report


def test_a_finer_resolution_with_the_old_noise_is_reported(tmp_path):
    """The flag that the note names makes it go away."""
    grid = dict(positions="grid", pos_base=0)
    old = dataclasses.replace(TEXT, sigma_scale=1.5, **grid)
    report = transfer(tmp_path, old, dataclasses.replace(old, resolution=36))[0]
    assert "the resolution is 2 times as large and sigma is as before" in report and "--model.sigma_scale=3" in report
    assert "reached to 8 and reach to 17 now" in report and "--model.positions=resample --model.pos_base=8" in report
    heeded = dataclasses.replace(old, resolution=36, sigma_scale=3.0, positions="resample", pos_base=8)
    assert "note" not in transfer(tmp_path, old, heeded)[0]


def test_resampling_on_the_extent_of_each_resolution_is_reported(tmp_path):
    old = dataclasses.replace(TEXT, pos_base=0)
    report = transfer(tmp_path, old, dataclasses.replace(old, **LARGE))[0]
    assert "note: positions reached to 9 and reach to 18 now" in report and "--model.pos_base=9" in report


def test_the_extent_that_is_compared_is_that_of_the_positions_of_the_network():
    """sin(x f) with f = 1 is the first channel: its argument runs from 0 to the extent."""
    for m in (TEXT, dataclasses.replace(TEXT, positions="grid"), dataclasses.replace(TEXT, **LARGE)):
        assert extent(m) == (8 if m.positions == "grid" else 9)
        n = m.resolution // 2
        assert torch.allclose(model.build(m).pos_embed[n - 1, 0], torch.tensor(float(extent(m))).sin(), atol=1e-5)


# ---------------------------------------------------------------- errors

def refuse(path, m, match):
    """UserError, and no weight of the network has changed."""
    net = network(m, 2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError, match=match):
        init_from(str(path), net, Config(model=m))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("heads", [2, 4])
def test_another_width_is_an_error(heads, tmp_path):
    """Nor when the gains of heads of the same width, alone, would fit."""
    run(tmp_path / "old", TEXT)
    m = dataclasses.replace(TEXT, width=32, heads=heads)
    refuse(tmp_path / "old", m, r"no block of --init_from=.*old fits: it has arch mmdit, .*width 24, depth 5, this run "
                                r"arch mmdit, .*width 32, .*--model.width must be the same")


def test_a_path_that_is_no_run_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", TEXT, "no weights at .*empty/weights.safetensors")
    refuse(tmp_path / "odl", TEXT, "no weights at .*odl")


def test_a_damaged_or_foreign_file_is_an_error(tmp_path):
    run(tmp_path / "old", TEXT)
    file = tmp_path / "old" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    refuse(tmp_path / "old", TEXT, "weights.safetensors is damaged: its sha256")
    os.truncate(file, 1000)
    refuse(file, TEXT, "is damaged")
    file.write_text("a letter")
    refuse(file, TEXT, "no safetensors file")
    checkpoint.save_file({"w": torch.ones(3)}, file)
    refuse(file, TEXT, "no plaindit config")
    run(tmp_path / "old", TEXT)
    for change, match in ((dict(positions="spiral"), "unknown model.positions='spiral'"),
                          (dict(patch=0), "model.patch")):
        header = {"config": to_json(Config(model=dataclasses.replace(TEXT, **change)))}
        checkpoint.write_weights(file, network(TEXT, 1).state_dict(), header)
        refuse(file, TEXT, match)


def test_weights_that_are_not_finite_are_an_error(tmp_path):
    weights = network(TEXT, 1).state_dict()
    weights["blocks.2.mlp.fc1.bias"][5] = float("nan")
    checkpoint.write_weights(tmp_path / "w.safetensors", weights, {"config": to_json(Config(model=TEXT))})
    refuse(tmp_path / "w.safetensors", TEXT, "inf or nan in blocks.2.mlp.fc1.bias")


def test_the_averaged_weights_are_used(tmp_path):
    """A run folder has both: weights.safetensors, and net and ema in the state of its checkpoint."""
    averaged, last = run(tmp_path / "old", TEXT), network(TEXT, 3).state_dict()
    state = {f"net.{k}": v for k, v in last.items()} | {f"ema.{k}": v for k, v in averaged.items()}
    assert checkpoint.save(tmp_path / "old", 8, state, {})
    net = network(TEXT, 2)
    init_from(str(tmp_path / "old"), net, Config(model=TEXT))
    assert all(torch.equal(v, averaged[k]) and not torch.equal(v, last[k]) for k, v in net.state_dict().items())
