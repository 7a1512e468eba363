"""bench_data: what it reads and writes, and that turns alternate."""
import pytest

from config import UserError
from experiments import bench_data


@pytest.fixture(autouse=True)
def small_photos(monkeypatch):
    """Photos without detail, which are made at once."""
    monkeypatch.setattr(bench_data, "synthetic_photo", lambda k: bench_data.Image.new("RGB", (20, 16 + k)))


def test_combinations_alternate_and_the_first_turn_is_not_counted(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(bench_data.time, "perf_counter", lambda: next(clock))
    readers = {name: (lambda turn, name=name: calls.append((name, turn)) or 6 * turn) for name in "ab"}
    assert bench_data.in_turns(readers, 3) == {"a": [6, 12, 18], "b": [6, 12, 18]}
    assert calls == [(name, turn) for turn in range(4) for name in "ab"]


def test_the_default_need_is_an_a100_at_two_fifths_of_its_peak():
    assert bench_data.Options().need == pytest.approx(312e12 * 0.4 / (3 * 237.2e9)) == pytest.approx(175.4, abs=0.1)


@pytest.mark.parametrize("flag", ["--workers=two", "--n=3", "--turns=1", "--data=nowhere"])
def test_options_that_cannot_be_timed(flag):
    with pytest.raises(UserError, match=flag[2:].partition("=")[0] if "data" not in flag else "nowhere"):
        bench_data.main([flag])


def test_every_source_is_timed_with_every_number_of_workers(monkeypatch, capsys):
    counts, read = [], bench_data.read_images
    monkeypatch.setattr(bench_data, "read_images", lambda *args: counts.append(read(*args)) or counts[-1])
    bench_data.main(["--n=16", "--workers=0,2", "--turns=2", "--resolution=16", "--need=50"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert "training consumes 50 images/s" in head and counts == [16] * 12      # three turns of four combinations
    assert [row[:17].strip() for row in rows] == [f"{name}, {k} workers" for k in (0, 2) for name in ("folder", "tars")]


def test_data_of_a_user_are_read_as_a_run_would(tmp_path, capsys):
    paths = bench_data.write_sources(tmp_path, 16)
    bench_data.main([f"--data={paths['tars']}", "--semantics=text", "--n=16", "--workers=0", "--turns=2",
                     "--resolution=16"])
    head, row = capsys.readouterr().out.splitlines()
    assert "training consumes 175 images/s" in head and row.startswith("tars, 0 workers")


def test_photos_have_detail(monkeypatch):
    monkeypatch.undo()
    x = bench_data.np.asarray(bench_data.synthetic_photo(1), float)
    assert x.shape == (256, 342, 3) and 40 < x.std() < 60 and abs(x[:, 1:] - x[:, :-1]).mean() > 2
