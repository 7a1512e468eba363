"""bench_data: both sides read the same pictures, turns are turns, and the arithmetic of what training eats."""
import time

import pytest
import torch

import bench_data
import data
from config import Config, ModelConfig, UserError


def test_pictures_are_made_alike_in_folder_and_tars(tmp_path):
    o = bench_data.Options(n=16, resolution=24)
    sources, folder = bench_data.open_sources(o, tmp_path)
    assert folder == tmp_path / "folder" and {len(source) for source in sources.values()} == {16}
    names = {name: [source.name(k).rpartition("/")[2] for k in range(16)] for name, source in sources.items()}
    by_number = sorted(range(16), key=lambda k: names["folder"][k])
    for k, j in enumerate(by_number):
        a, b = sources["tars"].load(k, 0)[0].getvalue(), sources["folder"].load(j, 0)[0].read_bytes()
        assert a == b
    assert bench_data.ours(sources["tars"], 16, 2, 1, micro=4) == 16


@pytest.mark.slow
def test_torchvision_makes_the_same_tensors(tmp_path):
    bench_data.write_folder(tmp_path / "set", 8)
    model = ModelConfig(semantics="none", resolution=100)       # too large for JPEGs to be decoded smaller
    source = data.open_source(Config(data=str(tmp_path / "set"), augment="", model=model))
    ours = torch.stack([source.record(k, 0)["image"] for k in range(8)])
    got = torch.cat([images for images, _ in bench_data.torchvision_loader(tmp_path / "set", 100, 8, 0, micro=4)])
    both = torch.cat([ours, ours.flip(-1)])                                 # theirs may be mirrored
    apart, which = ((got[:, None] - both[None]) ** 2).mean((2, 3, 4)).sqrt().min(1)
    # half a step of 8 bits: at the edge of a crop we see the pixels beyond it, a picture that was cut out does not
    assert apart.max() < 0.004 and sorted((which % 8).tolist()) == list(range(8)), apart


def test_turns_alternate_and_the_first_is_not_counted():
    calls = []
    readers = {name: (lambda turn, name=name: calls.append((name, turn)) or time.sleep(0.002) or 6) for name in "ab"}
    rates = bench_data.in_turns(readers, 3)
    assert calls == [(name, turn) for turn in range(4) for name in "ab"]
    assert all(len(every) == 3 and max(every) <= 6 / 0.002 for every in rates.values())


def test_what_training_eats():
    assert bench_data.eaten(237.2) == pytest.approx(312e12 * 0.4 / (3 * 237.2e9))
    assert bench_data.eaten(100, peak=3e14, share=1) == 1000


def test_options_that_cannot_be_timed(tmp_path, capsys):
    for flags in (["--workers=two"], ["--n=3"], ["--turns=0"], ["--data=nowhere"]):
        with pytest.raises(UserError):
            bench_data.main(flags)
    bench_data.write_shards(tmp_path / "set", 16)
    short = ["--n=16", "--workers=0", "--turns=1", "--resolution=16", "--need=50"]
    bench_data.main([f"--data={tmp_path / 'set'}", *short])
    assert "tars, 0 workers" in (shown := capsys.readouterr().out) and "feed 50 images/s" in shown
