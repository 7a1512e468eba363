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


@pytest.mark.parametrize("flags, words", [(["--claim=flop"], "flop.*flip, size"), (["--seeds=0"], "seeds=0"),
                                          (["--n=0"], "n=0"), (["--pretrain_steps_flip=0"], "long=0"), (["--step=3"], "--steps")])
def test_what_cannot_be_run_is_an_error_before_anything_runs(flags, words, monkeypatch):
    monkeypatch.setattr(claims, "train", lambda *_: pytest.fail("it ran"))
    with pytest.raises(UserError, match=words):
        claims.main(flags)


@pytest.mark.slow
def test_a_run_that_fails_ends_the_claim_with_its_name_and_its_last_words(tmp_path):
    with pytest.raises(UserError, match="run bad failed: error: .*lr=-1"):
        claims.train(claims.Options(out=str(tmp_path), jobs=1), {"bad": ["--lr=-1"]})


def test_the_right_answers_are_shares_and_what_is_not_asked_does_not_count():
    source = data.Shapes(resolution=32, split="test", flip=False)
    batch = data.records(source, list(range(40)), [0] * 40)
    real = claims.accuracy(batch["image"], batch["caption"], "color", "left_right")
    assert real == {"color": 1.0, "left_right": 1.0}
    mirrored = claims.accuracy(batch["image"].flip(3), batch["caption"], "color", "left_right")
    assert mirrored == {"color": 1.0, "left_right": 0.0}


def test_the_flip_claim_asks_each_run_for_its_flag_and_all_arms_for_the_same_captions(monkeypatch):
    trained, asked = {}, []
    monkeypatch.setattr(claims, "train", lambda o, runs, may_diverge: trained.update(runs))
    monkeypatch.setattr(claims, "test_captions", lambda o, name: [f"{name[-1]} left of"])
    monkeypatch.setattr(claims, "pictures", lambda o, name, captions, lam, controls: asked.append(
        (name, captions, controls)))
    monkeypatch.setattr(claims, "accuracy", lambda *_: {})
    rows = claims.flip(claims.Options(seeds=2, pretrain_steps_flip=50, steps=7))
    assert list(rows) == ["before", "not told", "told 0", "told 1"]
    assert asked == [(f"{name}-{seed}", [f"{seed} left of"], told) for name, told in (
        ("base50", {}), ("silent", {}), ("told", {"flip": 0.0}), ("told", {"flip": 1.0})) for seed in (0, 1)]
    assert trained["base50-1"] == ["--steps=50", "--seed=1"] and "--steps=21" in trained["told-1"]
    differ = set(trained["told-0"]) ^ set(trained["silent-0"])
    assert differ == {"--model.controls=flip", "--model.controls="}


@pytest.mark.slow
def test_a_claim_from_training_to_its_table_and_again_without_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(claims, "STEPS", 2)
    claims.main(["--claim=flip", f"--out={tmp_path}", "--seeds=1", "--pretrain_steps_flip=1", "--steps=1", "--n=3"])
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "flip.txt").read_text(encoding="utf-8").strip()
    assert [line.split()[0] for line in printed.splitlines()[1:]] == ["left_right", "color"]
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"base1-0", "silent-0", "told-0"}
    before = (tmp_path / "base1-0" / "log.jsonl").read_bytes()         # a second training would change its times
    claims.pretrain(claims.Options(out=str(tmp_path), seeds=1), 1)
    assert (tmp_path / "base1-0" / "log.jsonl").read_bytes() == before
