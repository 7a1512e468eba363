"""What a run shows of itself: control values from all over the data, previews, and measurements that no kill loses."""
import json

import numpy as np
import pytest
import torch

import config
import fid
import log
import machine
import show
import train
from config import UserError

TINY = ["--threads=1", "--workers=0", "--batch=4", "--micro=4", "--steps=4", "--save_every=2", "--log_every=2",
        "--augment=", "--dtype=float32", "--model.semantics=none", "--model.width=16", "--model.depth=1",
        "--model.heads=2", "--model.resolution=8", "--warmup=0"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "matmul_peak", lambda *_: 1.0)


class Rows:
    """A source of 5,000 samples whose size is their number, and how many were asked for at a time."""
    classes, fingerprint = ["a"], "f"

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 5000

    def records(self, indices, epochs):
        self.asked.append(len(indices))
        numbers = torch.as_tensor(np.asarray(indices), dtype=torch.float32)
        return {"size": numbers[:, None].expand(-1, 2)}


def test_control_values_come_from_all_over_the_data_and_few_pictures_are_read_at_a_time():
    cfg = config.Config(model=config.ModelConfig(semantics="none", controls="size"))
    source = Rows()
    sizes = [h for h, _ in json.loads(show.about_weights(cfg, source)["controls"])["size"]]
    assert len(sizes) == show.CONTROL_ROWS == sum(source.asked) and len(set(sizes)) == len(sizes)
    assert max(source.asked) <= show.READ
    assert abs(np.mean(sizes) - 2499.5) < 4 * 5000 / 12 ** 0.5 / len(sizes) ** 0.5      # uniform, 4 standard errors


def test_previews_take_no_more_steps_than_there_are_noise_levels(tmp_path):
    assert train.run([*TINY, f"--out={tmp_path}", "--model.noise_steps=10", "--sample_every=4"]) == 0
    assert (tmp_path / "samples" / "step-00000004.png").is_file()


def test_a_measurement_that_a_kill_cut_off_is_made_when_the_run_goes_on(tmp_path, monkeypatch):
    class Monitor:
        """Stands for fid.Monitor, which needs the weights of Inception."""
        def __init__(self, *_):
            pass

        def __call__(self, net, step):
            if step == 2 and killed:
                killed.pop()
                raise RuntimeError("killed within the measurement")
            log.append(tmp_path, {"step": step, "evaluation_s": 0.1})

    killed = [True]
    monkeypatch.setattr(fid, "Monitor", Monitor)
    flags = [*TINY, f"--out={tmp_path}", "--sample_every=0", "--fid_every=2", "--fid_ref=ref.npz"]
    with pytest.raises(RuntimeError):
        train.run(flags)
    assert train.run(flags) == 0
    measured = [line["step"] for line in log.read(tmp_path) if "evaluation_s" in line]
    assert measured == [2, 4]
    assert train.run(flags) == 0                            # and not once more
    assert [line["step"] for line in log.read(tmp_path) if "evaluation_s" in line] == measured


@pytest.mark.parametrize("flags", [["--fid_every=2"], ["--fid_ref=ref.npz"]])
def test_how_often_and_against_what_belong_together(flags, tmp_path, capsys):
    assert train.run([*TINY, f"--out={tmp_path}", *flags]) == 2
    assert "belong together" in capsys.readouterr().err
    with pytest.raises(UserError, match="belong together"):
        train.check(train.read_config([*TINY, *flags]), 1)
