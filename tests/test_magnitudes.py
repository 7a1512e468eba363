"""Magnitudes of a network's layers: what is measured, that measuring changes nothing, and their picture."""
import json
import math
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import model
from conditioning import Condition
from config import ModelConfig, UserError
from runtime import log, magnitudes, plot

CFG = ModelConfig(arch="mmdit", semantics="class", classes=5, width=16, depth=3, heads=2, resolution=12)


def network(arch="mmdit"):
    """A network with every weight random, so that all of its parts say something."""
    torch.manual_seed(0)
    net = model.build(ModelConfig(**{**vars(CFG), "arch": arch}))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.2)
    return net


def inputs():
    g = torch.Generator().manual_seed(1)
    return (torch.randn(2, 3, 12, 12, generator=g), torch.tensor([3.0, 700.0]),
            Condition(label=torch.tensor([1, 4])))


def test_the_magnitude_is_the_mean_over_tokens_of_their_rms():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, 4000, generator=g) * torch.arange(1.0, 8.0)[:, None]              # tokens of RMS 1 .. 7
    error = 4 / math.sqrt(2 * 5 * 4000) * math.sqrt(140 / 7) / math.sqrt(7)                 # four standard errors
    assert magnitudes.magnitude_of_tokens(x).item() == pytest.approx(4.0, abs=error)
    assert magnitudes.magnitude_of_tokens(x).item() < x.square().mean().sqrt().item() - 0.3
    assert magnitudes.magnitude_of_tokens(torch.full((3, 4), 300.0).bfloat16()) == 300      # a mean is no part of it
    assert magnitudes.magnitude_of_tokens(torch.full((3, 4), 6e4).half()) == pytest.approx(6e4, rel=1e-3)


def test_every_layer_is_measured_as_if_it_were_run_by_hand():
    net, (x, i, cond) = network(), inputs()
    found = magnitudes.measure(net, partial(net, x, i, cond))
    tokens, (c, ctx), rms = net.x_embedder(x), net.embed_condition(i, cond), lambda v: v.square().mean(-1).sqrt().mean()
    wanted = {"x_embedder": rms(tokens)}
    tokens = tokens + net.positions(3, 3)
    for k, block in enumerate(net.blocks):
        tokens, ctx = block(tokens, ctx, c)
        wanted[f"blocks.{k}"] = rms(tokens)
        wanted[f"blocks.{k}.adaLN_modulation"] = rms(block.adaLN_modulation(c))
    got = found["activations"]
    assert {k: got[k] for k in wanted} == pytest.approx({k: v.item() for k, v in wanted.items()}, rel=1e-5)
    assert set(got) == {*wanted, *(f"blocks.{k}.{part}" for k in range(3) for part in ("attn", "mlp"))}
    assert found["weights"]["blocks.1.mlp.fc1.weight"] == pytest.approx(0.2, abs=4 * 0.2 / math.sqrt(2 * 16 * 64))
    assert set(found["weights"]) == {name for name, p in net.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("arch", ["dit", "ditatt", "sd3"])
def test_every_architecture_can_be_measured(arch):
    net = network(arch)
    found = magnitudes.measure(net, partial(net, *inputs()))["activations"]
    assert [k for k in found if k.count(".") == 1] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(math.isfinite(v) and v > 0 for v in found.values())


def test_scalars_and_outputs_that_have_names_are_measured_and_vectors_are_not():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.x_embedder, self.blocks = nn.Linear(4, 3), nn.ModuleList()
            self.gain = nn.Parameter(torch.tensor(-0.5))

        def forward(self, x):
            return {"scale": self.x_embedder(x), "shift": 2 * self.x_embedder(x)}
    net = Small()
    found = magnitudes.measure(net, partial(net, torch.randn(2, 4)))["weights"]
    assert set(found) == {"gain", "x_embedder.weight"} and found["gain"] == 0.5
    outer = Small()
    outer.x_embedder, x = net, torch.randn(2, 4)
    scale = net.x_embedder(x).square().mean(-1).sqrt().mean().item()
    found = magnitudes.measure(outer, partial(net, x))["activations"]
    assert found == pytest.approx({"x_embedder.scale": scale, "x_embedder.shift": 2 * scale})


def test_measuring_leaves_weights_gradients_mode_and_hooks_as_they_are():
    net, (x, i, cond) = network(), inputs()
    net(x, i, cond).square().mean().backward()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    grads = [p.grad.clone() for p in net.parameters()]
    def fails():
        net(x, i, cond)
        raise RuntimeError("in the middle")
    magnitudes.measure(net, partial(net, x, i, cond))
    with pytest.raises(RuntimeError):
        magnitudes.measure(net, fails)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads))
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.slow
def test_compiled_blocks_are_measured_and_nothing_is_compiled_for_that():
    from torch._dynamo.testing import CompileCounter
    (net, (x, i, cond)), counter = (network(), inputs()), CompileCounter()
    plain = magnitudes.measure(net, partial(net, x, i, cond))
    for block in net.blocks:
        block.compile(fullgraph=True, backend=counter)
    wanted = net(x, i, cond)
    compiled = counter.frame_count
    assert magnitudes.measure(net, partial(net, x, i, cond)) == plain
    assert torch.equal(net(x, i, cond), wanted) and counter.frame_count == compiled > 0


# ---------------------------------------------------------------- magnitudes.png

def lines(out, measured, steps=(10, 20, 30)):
    for step in steps:
        line = {"step": step, "loss": 1 / step, "loss_by_noise": [0.1, None, 0.3, 0.4]}
        log.append(out, line | (measured if step > 10 else {}))


def test_depth_is_read_from_the_names():
    net = network()
    found = magnitudes.measure(net, partial(net, *inputs()))
    depth, values = plot.trunk(found["activations"])
    assert depth == [0, 1, 2, 3]
    assert values == [found["activations"][k] for k in ("x_embedder", "blocks.0", "blocks.1", "blocks.2")]
    assert plot.weights({"blocks.0.a.weight": 3.0, "blocks.0.b.weight": 4.0, "blocks.0.b.gain": 9.0,
                         "final.weight": 8.0, "blocks.11.a.weight": 2.0}) == ([1, 12], [math.sqrt(12.5), 2.0])


@pytest.mark.slow
def test_magnitudes_become_a_picture_beside_the_loss(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    net = network()
    lines(tmp_path, json.loads(json.dumps(magnitudes.measure(net, partial(net, *inputs())))))
    plot.main([f"--out={tmp_path}"])
    assert capsys.readouterr().out.split() == ["loss:", str(tmp_path / "loss.png"), "magnitudes:",
                                               str(tmp_path / "magnitudes.png")]
    for name in ("loss.png", "magnitudes.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (1050, 600) and len(picture.convert("RGB").getcolors(10 ** 6)) > 50
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "loss.png", "magnitudes.png"]


@pytest.mark.parametrize("count", [1, 12, 13, 40])
def test_of_many_measurements_a_few_are_drawn_and_the_last_always(tmp_path, monkeypatch, count):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: drawn.extend(
        line.get_color() for line in figure.axes[0].lines))
    steps = range(20, 20 + 10 * count, 10)
    measured = {"activations": {"x_embedder": 1.0, "blocks.0": 2.0}, "weights": {"blocks.0.w.weight": 1.0}}
    lines(tmp_path, measured, steps)
    plot.plot_magnitudes(tmp_path)
    assert count / 4 <= len(drawn) <= min(count, 12) and len(set(drawn)) == len(drawn)
    assert drawn[-1][:3] == pytest.approx((0.993248, 0.906157, 0.143936), abs=1e-5)         # viridis at its end


def test_a_run_without_magnitudes_says_how_to_get_them(tmp_path):
    pytest.importorskip("matplotlib")
    lines(tmp_path, {})
    assert "--magnitudes_every" in plot.plot_magnitudes(tmp_path)
    assert not (tmp_path / "magnitudes.png").exists()


def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="no log.jsonl"):
        plot.main([f"--out={tmp_path}"])
    monkeypatch.setattr(sys, "argv", ["runtime/plot.py", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(Path(plot.__file__)), run_name="__main__")
    assert e.value.code == 2 and capsys.readouterr().err.startswith("error: --out=")
