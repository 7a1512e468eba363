"""The demo: it plans by trial, keeps the plan of a run that exists, and its scorecard measures what it claims."""
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import config
import data
import sample
from experiments import demo
from runtime import distributed
from test_generate import run_folder


def trials(monkeypatch, rates: dict[str, float]) -> list[str]:
    """Trials that take no time: each writes a log with its rate, or fails where there is none. The choices tried."""
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
    monkeypatch.setattr(demo, "can_compile", lambda: True)
    return tried


@pytest.mark.parametrize("rates, choice", [({"on": 400.0, "off": 300.0}, "on"), ({"on": 200.0, "off": 300.0}, "off"),
                                           ({"off": 300.0}, "off")])
def test_the_faster_way_is_taken_for_as_many_steps_as_fit(monkeypatch, tmp_path, rates, choice):
    tried = trials(monkeypatch, rates)
    o = demo.Options(minutes=2.0, out=str(tmp_path))
    steps, chosen = demo.plan(o)
    batch = config.load(o.config).batch
    assert tried == ["on", "off"] and chosen == choice and steps % 10 == 0
    assert steps == math.floor(demo.STEPPING * 120 * rates[choice] / batch / 10) * 10 > 0


def test_a_machine_that_cannot_train_says_why(monkeypatch, tmp_path):
    trials(monkeypatch, {})
    with pytest.raises(SystemExit, match="no compiler"):
        demo.plan(demo.Options(out=str(tmp_path)))


def test_a_plan_is_made_once(monkeypatch, tmp_path):
    tried = trials(monkeypatch, {"on": 1.0, "off": 1.0})
    (tmp_path / "config.json").write_text(config.to_json(config.Config(steps=1234, compile="off")))
    assert demo.plan(demo.Options(out=str(tmp_path))) == (1234, "off") and tried == []


def test_the_scorecard_holds_pictures_against_chance_and_renders(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "MEASURED", 70)
    monkeypatch.setattr(distributed, "setup", lambda: SimpleNamespace(device=demo.torch.device("cpu")))
    monkeypatch.setattr(sample, "Options", partial(sample.Options, steps=2))
    out = run_folder(tmp_path / "run")
    lines = demo.scorecard(demo.Options(out=str(out))).splitlines()
    assert len(lines) == 1 + len(demo.ASKED)
    color = next(line for line in lines if line.startswith(demo.ASKED["color"])).split()
    drawn, chance, real, asked = float(color[-5]), float(color[-3]), float(color[-2]), int(color[-1])
    assert drawn < 0.5 and chance < 0.5 and real > 0.95 and asked == 70     # a random network draws no red rings


def test_chance_is_measured_against_captions_of_others(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "MEASURED", 70)
    monkeypatch.setattr(distributed, "setup", lambda: SimpleNamespace(device=demo.torch.device("cpu")))
    monkeypatch.setattr(sample, "generate", lambda net, cfg, cond, indices, o, device:         # a perfect network
                        data.open_source(cfg, "test").records(indices, [0] * len(indices))["image"])
    out = run_folder(tmp_path / "run")
    color = demo.scorecard(demo.Options(out=str(out))).splitlines()[1].split()
    assert float(color[-5]) > 0.95 and float(color[-3]) < 0.3


def test_every_prompt_of_the_demo_is_in_the_grammar():
    from sources.shapes_grammar import parse_caption
    from text import WordVectors
    tokens, lengths = WordVectors(config.load("configs/shapes.py").model.text_length).encode(list(demo.PROMPTS))
    assert all(parse_caption(prompt).shapes for prompt in demo.PROMPTS) and lengths.min() > 0
