"""experiments/claims.py: its table, which runs it measures on which captions, and a comparison from start to end."""
import re

import pytest

import data
from config import UserError
from experiments import claims


def test_a_table_row_is_the_mean_and_the_sample_deviation_over_seeds():
    rows = {"off": [{"left_right": 0.5, "color": 1.0}, {"left_right": 0.7, "color": 1.0}],
            "on": [{"left_right": 1.0, "color": 0.0}]}
    head, side, color = claims.table(rows).splitlines()
    assert head.split() == ["off", "on"]
    assert re.split(r"\s{2,}", side) == ["left_right", "0.600 ± 0.141", "1.000 ± ?"]          # sqrt(2 * 0.1^2 / 1)
    assert re.split(r"\s{2,}", color) == ["color", "1.000 ± 0.000", "0.000 ± ?"]


@pytest.mark.parametrize("flags, words", [
    (["--claim=flop"], "flop.*flip, size"), (["--seeds=0"], "seeds=0"), (["--n=0"], "n=0"), (["--jobs=-1"], "jobs=-1"),
    (["--pretrain_steps_flip=0"], "pretrain_steps_flip=0"), (["--step=3"], "--steps")])
def test_wrong_options_are_an_error_before_anything_runs(flags, words, monkeypatch):
    monkeypatch.setattr(claims, "train", lambda *_: pytest.fail("it ran"))
    with pytest.raises(UserError, match=words):
        claims.main(flags)


@pytest.mark.slow
def test_a_run_that_fails_ends_the_claim_with_its_name_and_its_last_line(tmp_path):
    with pytest.raises(UserError, match="run bad failed: error: .*lr=-1"):
        claims.train(claims.Options(out=str(tmp_path), jobs=1), {"bad": ["--lr=-1"]})


def test_accuracy_is_a_share_of_the_captions_that_name_the_attribute():
    source = data.Shapes(resolution=32, split="test", flip=False)
    batch = data.records(source, list(range(40)), [0] * 40)
    real = claims.accuracy(batch["image"], batch["caption"], "color", "left_right")
    assert real == {"color": 1.0, "left_right": 1.0}
    mirrored = claims.accuracy(batch["image"].flip(3), batch["caption"], "color", "left_right")
    assert mirrored == {"color": 1.0, "left_right": 0.0}


def test_the_flip_claim_gives_each_run_its_flag_and_all_arms_the_same_captions(monkeypatch):
    trained, calls = {}, []
    monkeypatch.setattr(claims, "train", lambda o, runs, may_diverge: trained.update(runs))
    monkeypatch.setattr(claims, "test_captions", lambda o, name: [f"{name} left of"])
    monkeypatch.setattr(claims, "images_of", lambda o, name, lam, captions, controls: calls.append(
        (name, captions, controls)))
    monkeypatch.setattr(claims, "accuracy", lambda *_: {})
    rows = claims.flip(claims.Options(seeds=2, pretrain_steps_flip=50, steps=7))
    assert list(rows) == ["before", "without flag", "flag 0", "flag 1"]
    assert calls == [(f"{name}-{seed}", [f"with-{seed} left of"], flag) for name, flag in (
        ("base50", {}), ("without", {}), ("with", {"flip": 0.0}), ("with", {"flip": 1.0})) for seed in (0, 1)]
    assert trained["base50-1"] == ["--steps=50", "--seed=1"] and "--steps=21" in trained["with-1"]
    differ = set(trained["with-0"]) ^ set(trained["without-0"])
    assert differ == {"--model.controls=flip", "--model.controls="}


@pytest.fixture
def small_runs(monkeypatch):
    """Runs of a tiny network, sampled in two steps."""
    small = ["--model.width=16", "--model.depth=1", "--model.heads=1", "--batch=2", "--microbatch=2"]
    train = claims.train
    monkeypatch.setattr(claims, "STEPS", 2)
    monkeypatch.setattr(claims, "train", lambda o, runs, may_diverge: train(
        o, {name: [*flags, *small] for name, flags in runs.items()}, may_diverge))


@pytest.mark.slow
def test_an_arm_at_its_best_rate(tmp_path, capsys, monkeypatch, small_runs):
    for key, value in {"RATES": (1e-2,), "HELD": 20, "REAL": 20}.items():
        monkeypatch.setattr(claims, key, value)
    o = claims.Options(claim="magnitude", out=str(tmp_path), seeds=1, steps=1, tune_steps=1, n=8)
    row, = claims.at_best_rate(o, {"DiT": ["--model.arch=dit"]})["DiT"]
    assert "DiT: held-out loss " in capsys.readouterr().out
    assert list(row) == ["held-out loss", "M 0", "toy_fd8", "class"] and 0 < row["held-out loss"] < 3


@pytest.mark.slow
def test_a_claim_from_training_to_its_table_and_again_without_training(tmp_path, capsys, small_runs):
    claims.main(["--claim=flip", f"--out={tmp_path}", "--seeds=1", "--pretrain_steps_flip=1", "--steps=1", "--n=3"])
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "flip.txt").read_text(encoding="utf-8").strip()
    assert [line.split()[0] for line in printed.splitlines()[1:]] == ["left_right", "color"]
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"base1-0", "without-0", "with-0"}
    before = (tmp_path / "base1-0" / "log.jsonl").read_bytes()         # a second training would change its times
    claims.train_seeds(claims.Options(out=str(tmp_path), seeds=1), {"base1": []}, 1)
    assert (tmp_path / "base1-0" / "log.jsonl").read_bytes() == before
