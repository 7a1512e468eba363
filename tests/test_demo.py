"""The demo: it plans by trial, keeps the plan of a run that exists, and its scorecard measures what it claims."""
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import config
import data
import model
import sample
from experiments import demo
from runtime import checkpoint, distributed
from sources.shapes_grammar import parse_caption
from text import WordVectors


def trials(monkeypatch, rates: dict[str, float]) -> list[str]:
    """Replace training by trials that write a log with their rate, or fail without one; return the choices tried."""
    tried = []

    def run(command, **kwargs):
        flags = dict(word.removeprefix("--").split("=", 1) for word in command if word.startswith("--"))
        tried.append(flags["compile"])
        if flags["compile"] not in rates:
            return SimpleNamespace(returncode=1, stderr="no compiler")
        rate = rates[flags["compile"]]
        lines = [{"step": k, "images_per_second": rate * (0.1 if k == 5 else 1)} for k in range(5, 41, 5)]
        Path(flags["out"], "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return SimpleNamespace(returncode=0, stderr="")
    monkeypatch.setattr(demo.subprocess, "run", run)
    return tried


@pytest.mark.parametrize("rates, choice", [({"on": 400.0, "off": 300.0}, "on"), ({"on": 200.0, "off": 300.0}, "off"),
                                           ({"off": 300.0}, "off")])
def test_the_faster_choice_trains_for_as_many_steps_as_fit(monkeypatch, tmp_path, rates, choice):
    tried = trials(monkeypatch, rates)
    o = demo.Options(minutes=2.0, out=str(tmp_path))
    steps, chosen = demo.plan(o)
    batch = config.load(o.config).batch
    assert tried == ["on", "off"] and chosen == choice and steps % 10 == 0
    assert steps == math.floor(demo.TRAINING * 120 * rates[choice] / batch / 10) * 10 > 0


def test_a_machine_that_cannot_train_says_why(monkeypatch, tmp_path):
    trials(monkeypatch, {})
    with pytest.raises(SystemExit, match="no compiler"):
        demo.plan(demo.Options(out=str(tmp_path)))


def test_a_plan_is_made_once(monkeypatch, tmp_path):
    tried = trials(monkeypatch, {"on": 1.0, "off": 1.0})
    (tmp_path / "config.json").write_text(config.to_json(config.Config(steps=1234, compile="off")))
    assert demo.plan(demo.Options(out=str(tmp_path))) == (1234, "off") and tried == []


@pytest.fixture
def out(monkeypatch, tmp_path):
    """A run folder with a random network, of whose scorecard 70 images are measured after two steps each."""
    monkeypatch.setattr(demo, "MEASURED", 70)
    monkeypatch.setattr(distributed, "setup", lambda: SimpleNamespace(device=demo.torch.device("cpu")))
    monkeypatch.setattr(sample, "Options", partial(sample.Options, steps=2))
    words = WordVectors()
    m = config.ModelConfig(width=16, depth=2, heads=2, resolution=16, text_dim=words.dim, text_length=words.length)
    checkpoint.write_weights(tmp_path / "weights.safetensors", model.build(m).state_dict(), {
        "config": config.to_json(config.Config(model=m)), "classes": "[]", "null_class": "0", "step": "12"})
    return str(tmp_path)


def test_the_scorecard_compares_with_chance_and_renders(out):
    lines = demo.scorecard(demo.Options(out=out)).splitlines()
    assert len(lines) == 1 + len(demo.MEANING)
    color = next(line for line in lines if line.startswith(demo.MEANING["color"])).split()
    generated, chance, real, n = float(color[-5]), float(color[-3]), float(color[-2]), int(color[-1])
    assert generated < 0.5 and chance < 0.5 and real > 0.95 and n == 70     # a random network makes no red rings


def test_chance_is_measured_against_captions_of_others(out, monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda net, cfg, cond, indices, o, device:         # a perfect network
                        data.open_source(cfg, "test").records(indices, [0] * len(indices))["image"])
    color = demo.scorecard(demo.Options(out=out)).splitlines()[1].split()
    assert float(color[-5]) > 0.95 and float(color[-3]) < 0.3


def test_every_prompt_of_the_demo_is_in_the_grammar():
    tokens, lengths = WordVectors(config.load("configs/shapes.py").model.text_length).encode(list(demo.PROMPTS))
    assert all(parse_caption(prompt).shapes for prompt in demo.PROMPTS) and lengths.min() > 0
