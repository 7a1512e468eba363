"""FID, KID and the Inception Score: closed forms, independent implementations, any split into batches and processes,
files that are refused, and the commands. Features here are a few linear ones under the name of Inception.
"""
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import sample
from config import UserError
from evaluation import inception
from fid import (FeatureStats, frechet_distance, inception_score, kid, mean_over, mean_pair_distance, read_reference,
                 write_reference)
from runtime import checkpoint, distributed, log
from sources.folders import open_images
from test_generate import generated, run_folder

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ALONE = distributed.Dist(CPU, 0, 1)
D, K = 6, 11


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(dim, rank, seed=0):
    A = normal(dim, rank, seed=seed)
    return A @ A.T / rank


class Few:
    """D features and K logits, linear in the colours of a 4 x 4 reduction, with the papers of the real network."""
    name, sha256, resize, dim, classes = inception.NAME, inception.SHA256, "tf1", D, K
    device = CPU

    def __init__(self, weights="", resize="tf1", dist=ALONE):
        self.resize = resize

    def __call__(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        small = torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1) / 64     # (B, 48)
        return small @ normal(48, D, seed=1).float() / 7, small @ normal(48, K, seed=2).float() / 7


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(inception, "Extractor", Few)
    before = torch.get_num_threads()
    yield Few()
    torch.set_num_threads(before)


def images(n, h=11, w=9, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


def stats_of(features, splits=1):
    stats = FeatureStats(features.shape[1])
    for part in features.tensor_split(splits):
        stats.update(part)
    return stats


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ---------------------------------------------------------------- the distance

def non_commuting(dim, rank):
    """mu1, C1, mu2, C2 = T C1 T for a positive T, and their exact distance |dmu|^2 + tr (1-T) C1 (1-T)."""
    Q, C1 = torch.linalg.qr(normal(dim, dim, seed=1))[0], covariance(dim, rank)
    mu1, mu2 = normal(dim, seed=2), normal(dim, seed=3)
    T = Q * torch.linspace(0.3, 2.0, dim, dtype=torch.float64) @ Q.T
    gap = torch.eye(dim, dtype=torch.float64) - T
    return mu1, C1, mu2, T @ C1 @ T, ((mu1 - mu2).square().sum() + (gap @ C1 @ gap).trace()).item()


@pytest.mark.parametrize("rank, tolerance", [(100, 1e-12), (30, 1e-6)])
def test_exact_for_covariances_that_do_not_commute(rank, tolerance):
    """C2 = T C1 T: tr (C1 C2)^1/2 = tr C1 T, of full rank and singular."""
    *gaussians, exact = non_commuting(60, rank)
    C1, C2 = gaussians[1], gaussians[3]
    assert (C1 @ C2 - C2 @ C1).norm() > 0.1 * (C1 @ C2).norm()
    assert abs(frechet_distance(*gaussians) / exact - 1) < tolerance
    assert abs(frechet_distance(*gaussians[2:], *gaussians[:2]) / exact - 1) < tolerance       # symmetric
    zero = torch.zeros(60)
    assert abs(frechet_distance(zero, C1, zero, C2) / frechet_distance(zero, C2, zero, C1) - 1) < 10 * tolerance


def test_exact_for_covariances_that_commute_and_for_a_shifted_mean():
    Q, a, b = torch.linalg.qr(normal(30, 30))[0], normal(30, seed=1).square(), normal(30, seed=2).square()
    mu, step = normal(30, seed=3), normal(30, seed=4)
    exact = (a.sqrt() - b.sqrt()).square().sum() + step.square().sum()
    assert math.isclose(frechet_distance(mu, (Q * a) @ Q.T, mu + step, (Q * b) @ Q.T), exact, rel_tol=1e-12)
    C = covariance(30, 40)
    assert math.isclose(frechet_distance(mu, C, mu + step, C), step.square().sum(), rel_tol=1e-12)
    assert frechet_distance(mu, C, mu, C) < 1e-12


def test_fewer_images_than_features():
    """Then tr (C1 C2)^1/2 is the nuclear norm of the centred features' product, over sqrt((n - 1) (m - 1))."""
    x, y = normal(21, 40, seed=5), normal(34, 40, seed=6) * 1.5
    a, b = stats_of(x), stats_of(y)
    root = torch.linalg.matrix_norm((x - x.mean(0)) @ (y - y.mean(0)).T, "nuc") / math.sqrt(20 * 33)
    exact = (x.mean(0) - y.mean(0)).square().sum() + x.T.cov().trace() + y.T.cov().trace() - 2 * root
    assert math.isclose(frechet_distance(a.mean, a.cov, b.mean, b.cov), exact, rel_tol=1e-6)
    assert frechet_distance(a.mean, a.cov, a.mean, a.cov) < 1e-5 * a.cov.trace()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [80, 25])
def test_scipy_and_torch_fidelity_find_the_same(rank):
    linalg = pytest.importorskip("scipy.linalg")
    a = normal(40).numpy(), covariance(40, rank, 1).numpy(), normal(40, seed=2).numpy(), covariance(40, 90, 3).numpy()
    root = linalg.sqrtm(a[1] @ a[3])                        # neither `disp` nor a second result: any SciPy
    want = ((a[0] - a[2]) ** 2).sum() + np.trace(a[1] + a[3] - 2 * np.real(root))
    assert math.isclose(frechet_distance(*a), want, rel_tol=1e-10 if rank > 40 else 1e-5)
    theirs = pytest.importorskip("torch_fidelity.metric_fid").fid_statistics_to_metric(
        {"mu": a[0], "sigma": a[1]}, {"mu": a[2], "sigma": a[3]}, False)
    assert math.isclose(frechet_distance(*a), next(iter(theirs.values())), rel_tol=1e-10 if rank > 40 else 1e-5)


def test_the_distance_needs_no_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    assert frechet_distance([0.0], [[1.0]], [2.0], [[9.0]]) == pytest.approx(4 + 4)


def test_moments_of_no_gaussian_are_refused():
    mu, C = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match="inf or nan"):
        frechet_distance(mu, C, mu, C * math.nan)
    with pytest.raises(ValueError, match="is negative"):
        frechet_distance(mu, C, mu, -4 * C)


# ---------------------------------------------------------------- streaming

@pytest.mark.parametrize("splits", [1, 2, 7, 50])
def test_any_split_into_batches_gives_mean_and_covariance(splits):
    x = normal(50, D).float()
    stats = stats_of(x, splits)
    assert stats.n == 50 and stats.cov.dtype == torch.float64
    assert (stats.mean - x.double().mean(0)).abs().max() < 1e-15
    assert (stats.cov - x.double().T.cov()).abs().max() < 1e-14


def test_float32_sums_would_not_do():
    x = (normal(4000, D) + 30).float()                      # mean^2 / variance 900
    assert (stats_of(x, 9).cov - x.double().T.cov()).abs().max() < 1e-10


def test_one_feature_has_no_covariance():
    with pytest.raises(ValueError, match="needs two features, got 1"):
        stats_of(normal(1, D)).cov


CASES = [(37, 5), (37, 30), (10, 10)]       # (n, batch): 8, 2 and 1 batches, the last one short or the only one
WORKER = """
import sys, json
sys.path.insert(0, "tests")
from runtime import distributed
from test_fid import everything
print(json.dumps(everything(distributed.setup(threads=1))))
distributed.cleanup()
"""


def everything(dist):
    """Of each case what this process has seen, and what it holds after the pass."""
    return [one_pass(n, batch, dist) for n, batch in CASES]


def one_pass(n, batch, dist):
    seen, every = [], torch.from_numpy(images(40)).permute(0, 3, 1, 2)
    loaded = counted(lambda indices: seen.extend(indices.tolist()) or every[indices])
    stats, rows = fid.collect(loaded, n, batch, Few(), {"features", "logits"}, dist)
    return [seen, stats.n, stats.sum.tolist(), stats.outer.tolist(), rows["features"].tolist(), rows["logits"].tolist()]


def side_by_side(world):
    """What each of `world` gloo processes finds."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
           "LOCAL_WORLD_SIZE": str(world), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                             env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert all(run.returncode == 0 for run in runs)
    return [json.loads(text.splitlines()[-1]) for text in outputs]


@pytest.mark.slow
def test_any_number_of_processes_counts_every_image_once():
    """Some of the three have more batches than others, and some have none."""
    torch.set_num_threads(1)                                # as theirs
    alone, ranks = everything(ALONE), side_by_side(3)
    for k, (n, _) in enumerate(CASES):
        assert sorted(alone[k][0]) == sorted(i for rank in ranks for i in rank[k][0]) == list(range(n))
        for rank in ranks:
            assert rank[k][1] == n and rank[k][4:] == alone[k][4:]
            assert np.allclose(rank[k][2], alone[k][2], rtol=1e-14, atol=1e-14)
            assert np.allclose(rank[k][3], alone[k][3], rtol=1e-14, atol=1e-14)
    assert [] in [rank[2][0] for rank in ranks]


def test_memory_does_not_grow_with_the_number_of_images(few):
    """Batches of images alive at once, however many there are: those fetched ahead, the one in use, the next."""
    alive, most = weakref.WeakSet(), []

    def generate(indices):
        x = torch.from_numpy(images(5)).permute(0, 3, 1, 2)[:len(indices)].clone()
        alive.add(x)
        most.append(len(alive))
        return x
    for n in (20, 100):
        stats, rows = fid.collect(counted(generate), n, 5, few, set(), ALONE)
        assert stats.n == n and not rows
    assert len(most) == 24 and max(most) <= 4 and max(most[4:]) <= max(most[:4])


def counted(call):
    call.workers = call.broken = 0
    return call


# ---------------------------------------------------------------- KID and the Inception Score

def test_kid_is_its_definition():
    x, y = normal(37, 12).float(), normal(45, 12, seed=1).float() + 0.4
    k = lambda a, b: (a.double() @ b.double().T / 12 + 1) ** 3
    off = lambda z: (k(z, z).sum() - k(z, z).trace()) / (len(z) * (len(z) - 1))
    assert math.isclose(kid(x, y)[0], off(x) + off(y) - 2 * k(x, y).mean(), rel_tol=1e-12)
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 2.0], [0.0, 0.0]])      # by hand
    assert math.isclose(kid(x, y)[0], 1 + 1 - (2 ** 3 + 1 + 3 ** 3 + 1) / 2, rel_tol=1e-12)


@pytest.mark.slow
def test_kid_is_that_of_torch_fidelity():
    theirs = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = normal(37, 12).float(), normal(37, 12, seed=1).float() + 0.4
    found = theirs.kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=37, verbose=False)
    assert math.isclose(kid(x, y)[0], found[theirs.KEY_METRIC_KID_MEAN], rel_tol=1e-5)          # float32 kernels


def test_kid_in_blocks_is_kid(monkeypatch):
    x, y = normal(23, D), normal(31, D, seed=1)
    whole = kid(x, y)
    monkeypatch.setattr(fid, "BLOCK", 5)
    assert kid(x, y) == pytest.approx(whole, rel=1e-12)


@pytest.mark.slow
def test_kid_has_no_bias_and_its_error_is_its_spread():
    """Over 400 pairs of sets of 20 and 30: mean within 4 standard errors of the value of large sets, spread within
    25 % (a spread of 400 has a standard error of 3.5 %; the projection leaves out what falls as 1/n^2)."""
    found = np.array([kid(normal(20, 3, seed=2 * k), normal(30, 3, seed=2 * k + 1) + 1) for k in range(400)])
    truth = np.mean([kid(normal(2000, 3, seed=9000 + k), normal(2000, 3, seed=9500 + k) + 1)[0] for k in range(5)])
    spread = found[:, 0].std()
    assert abs(found[:, 0].mean() - truth) < 4 * spread / 20
    assert 0.75 < np.sqrt((found[:, 1] ** 2).mean()) / spread < 1.25


@pytest.mark.slow
@pytest.mark.parametrize("n", [40, 43])
def test_the_inception_score_is_that_of_torch_fidelity(n):
    theirs = pytest.importorskip("torch_fidelity.metric_isc")
    logits = (2 * normal(n, K)).float()
    want = theirs.isc_features_to_metric(logits, splits=10, shuffle=False)
    value, error = inception_score(logits)
    assert math.isclose(value, want[theirs.KEY_METRIC_ISC_MEAN], rel_tol=1e-12)
    assert math.isclose(error * 3, want[theirs.KEY_METRIC_ISC_STD], rel_tol=1e-9)      # std / sqrt(splits - 1)


def test_the_inception_score_lies_between_one_and_the_number_of_classes():
    assert inception_score(normal(1, K).expand(10, K), splits=2)[0] == pytest.approx(1)
    assert inception_score(1000 * torch.eye(K).repeat(2, 1), splits=2) == pytest.approx((K, 0))


# ---------------------------------------------------------------- references

def reference(path, few, n=200, kid=False):
    rows, _ = few(torch.from_numpy(images(n, seed=3)).permute(0, 3, 1, 2))
    write_reference(path, stats_of(rows), few, "some images", rows if kid else None)
    return path


def test_a_reference_comes_back(tmp_path, few):
    path = reference(tmp_path / "ref.npz", few, kid=True)
    ref = read_reference(str(path), few)
    rows, _ = few(torch.from_numpy(images(200, seed=3)).permute(0, 3, 1, 2))
    assert torch.equal(ref.mu, stats_of(rows).mean) and torch.equal(ref.sigma, stats_of(rows).cov)
    assert torch.equal(ref.rows, rows)
    assert ref.origin == {"reference": str(path), "reference_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                          "reference_n": 200, "reference_data": "some images", "reference_labelled": True}


@pytest.mark.slow
def test_pytorch_fid_reads_our_references(tmp_path, few):
    theirs, path = pytest.importorskip("pytorch_fid.fid_score"), reference(tmp_path / "ref.npz", few)
    ref = read_reference(str(path), few)
    mu, sigma = theirs.compute_statistics_of_path(str(path), None, 1, D, "cpu")
    assert np.array_equal(mu, ref.mu.numpy()) and np.array_equal(sigma, ref.sigma.numpy())


def test_references_of_other_tools_are_read_and_reported_as_unlabelled(tmp_path, few):
    mu, sigma = normal(D).numpy(), covariance(D, 9).numpy()
    np.savez(tmp_path / "pytorch_fid.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "adm.npz", mu=mu.astype(np.float32), sigma=sigma, mu_s=np.ones(3), sigma_s=np.eye(3),
             arr_0=images(4))
    for name in ("pytorch_fid", "adm"):
        ref = read_reference(str(tmp_path / f"{name}.npz"), few)
        assert np.allclose(ref.mu, mu, rtol=1e-6) and ref.mu.dtype == torch.float64
        assert not ref.origin["reference_labelled"] and ref.origin["reference_n"] is None
        loaded = counted(lambda k: torch.from_numpy(images(9)).permute(0, 3, 1, 2)[k])
        got = fid.Evaluation(fid.Options(ref=str(tmp_path / f"{name}.npz"), batch=5), 9, ALONE)(loaded)
        assert list(got) == ["fid9/inception-2015-12-05/tf1"]
    with pytest.raises(UserError, match="resize tf1, wanted clean"):
        read_reference(str(tmp_path / "adm.npz"), Few(resize="clean"))


@pytest.mark.parametrize("key, other, said", [("resize", "clean", "resize tf1, wanted clean"),
                                              ("name", "judge", "features inception-2015-12-05, wanted judge"),
                                              ("sha256", "0" * 64, "weights_sha256 6726825d")])
def test_a_reference_made_otherwise_is_refused(tmp_path, few, key, other, said):
    path, theirs = reference(tmp_path / "ref.npz", few), Few()
    setattr(theirs, key, other)
    with pytest.raises(UserError, match=said):
        read_reference(str(path), theirs)


def test_a_file_that_is_no_reference_is_refused(tmp_path, few):
    def said(**arrays):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(UserError) as e:
            read_reference(str(tmp_path / "x.npz"), few)
        return str(e.value)
    mu, sigma = normal(D).numpy(), covariance(D, 9).numpy()
    assert "plain arrays mu and sigma" in said(arr_0=images(2))
    assert "mu (7,)" in said(mu=normal(7).numpy(), sigma=sigma)
    assert "wanted finite" in said(mu=mu * math.nan, sigma=sigma)
    assert "pickles could run code" in said(mu=np.array([mu, None], dtype=object), sigma=sigma)
    (tmp_path / "edm.pkl").write_bytes(b"\x80\x04}q\x00.")
    with pytest.raises(UserError, match="pickles could run code"):
        read_reference(str(tmp_path / "edm.pkl"), few)
    for path, text in (("", "need --ref=FILE.npz"), ("none.npz", "cannot read 'none.npz' .*No such file")):
        with pytest.raises(UserError, match=text):
            read_reference(path, few)


# ---------------------------------------------------------------- images in files

def saved(folder, array, suffix=".png"):
    folder.mkdir(exist_ok=True)
    for k, image in enumerate(array):
        Image.fromarray(image).save(folder / f"{k:03}{suffix}")
    return folder


def test_a_folder_an_npz_and_an_npy_hold_the_same_images(tmp_path):
    x = images(11, 12, 10)
    np.savez(tmp_path / "a.npz", arr_0=x)
    np.savez_compressed(tmp_path / "b.npz", other=x[:2], arr_0=x)
    np.save(tmp_path / "c.npy", x)
    for path in (saved(tmp_path / "d", x), *(tmp_path / name for name in ("a.npz", "b.npz", "c.npy"))):
        opened = open_images(str(path))
        for first, last in ((8, 11), (0, 3), (2, 9)):
            found = opened(np.arange(first, last))
            assert found.shape == (last - first, 3, 12, 10) and found.dtype == torch.uint8
            assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), x[first:last])
        assert len(opened) == 11 and opened.jpegs == 0


def test_square_cuts_the_middle_out_and_resizes_it(tmp_path):
    x = np.zeros((2, 40, 64, 3), np.uint8)
    x[:, :, 12:52] = 200                                    # the middle; what is beside it stays out
    found = open_images(str(saved(tmp_path / "d", x)), 16)(np.arange(2))
    assert found.shape == (2, 3, 16, 16) and (found[:, :, :, 2:-2] == 200).all()     # the filter looks beyond an edge


def test_unusable_images_are_errors(tmp_path):
    saved(tmp_path / "d", [*images(2, 9, 8), images(1, 9, 12)[0]])
    with pytest.raises(UserError, match="different sizes, e.g. .9, 8. and .9, 12.; give"):
        open_images(str(tmp_path / "d"))(np.arange(3))
    (tmp_path / "d/000.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="000.png cannot be read: not a JPEG"):
        open_images(str(tmp_path / "d"))(np.arange(1))
    (tmp_path / "d/000.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 files of .* are empty, e.g. '000.png'"):
        open_images(str(tmp_path / "d"))
    for wrong in (images(2).astype(np.float32), images(2)[..., :1], images(2)[0], images(0)):
        np.savez(tmp_path / "x.npz", arr_0=wrong)
        with pytest.raises(UserError, match="wanted uint8 .n, height, width, 3."):
            open_images(str(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", mu=images(2))
    with pytest.raises(UserError, match="wanted an array arr_0"):
        open_images(str(tmp_path / "x.npz"))
    np.save(tmp_path / "x.npy", images(3))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-5])
    with pytest.raises(UserError, match="ends before image 2"):
        open_images(str(tmp_path / "x.npy"))(np.arange(3))
    with pytest.raises(UserError, match="no images at 'nowhere'"):
        open_images("nowhere")
    with pytest.raises(UserError, match="is for folders"):
        open_images(str(tmp_path / "x.npz"), 16)


# ---------------------------------------------------------------- the command line

def test_reference_then_metrics_of_files(tmp_path, few, capsys):
    real, generated = images(60), images(50, seed=1) // 2
    np.savez(tmp_path / "generated.npz", arr_0=generated)
    ref = tmp_path / "ref.npz"
    fid.main(["ref", f"--images={saved(tmp_path / 'real', real)}", f"--save={ref}", "--kid=true", "--batch=7",
              "--threads=1"])
    assert last_json(capsys)["n"] == 60
    fid.main(["fid", f"--images={tmp_path / 'generated.npz'}", f"--ref={ref}", "--metrics=fid+kid+is", "--batch=8",
              "--threads=1"])
    said = capsys.readouterr()
    line = json.loads(said.out.splitlines()[-1])
    x, y = (few(torch.from_numpy(z).permute(0, 3, 1, 2))[0] for z in (generated, real))
    a, b, ending = stats_of(x), stats_of(y), "50/inception-2015-12-05/tf1"
    assert list(line["metrics"]) == ["fid" + ending, "kid" + ending, "is" + ending]
    want = frechet_distance(a.mean, a.cov, b.mean, b.cov)
    assert line["metrics"]["fid" + ending] == {"value": pytest.approx(want, rel=1e-6), "se": None}
    assert tuple(line["metrics"]["kid" + ending].values()) == pytest.approx(kid(x, y), rel=1e-5)
    assert line["n"] == 50 and line["reference_n"] == 60
    assert line["features_sha256"] == inception.SHA256
    assert "warning: FID of 50 images is biased" in said.err
    fid.main(["fid", f"--images={tmp_path / 'generated.npz'}", "--metrics=is", "--threads=1"])     # needs no reference
    assert list(last_json(capsys)["metrics"]) == ["is" + ending]


def test_doubtful_images_give_a_warning_and_wrong_options_an_error(tmp_path, few, capsys):
    ref, x = reference(tmp_path / "ref.npz", few), images(12)
    def run(*flags):
        fid.main(["fid", f"--ref={ref}", "--threads=1", *flags])
        return capsys.readouterr().err
    assert "12 images are JPEG" in run(f"--images={saved(tmp_path / 'jpeg', x, '.jpg')}")
    x[3:5] = 0
    np.save(tmp_path / "x.npy", x)
    assert "2 of 12 images are uniform" in run(f"--images={tmp_path / 'x.npy'}", "--batch=5")
    np.save(tmp_path / "black.npy", x * 0)
    for flags, text in (([f"--images={tmp_path / 'black.npy'}"], "all 12 images are uniform"),
                        ([f"--images={tmp_path / 'x.npy'}", "--n=13"], "n=13 images were requested, but .* has 12"),
                        ([f"--images={tmp_path / 'x.npy'}", "--metrics=fid+fud"], "'fud' .*there are fid, kid, is"),
                        ([f"--images={tmp_path / 'x.npy'}", "--metrics=fid+kid"], "fid.py ref --kid=true"),
                        ([f"--images={tmp_path / 'x.npy'}", "--metrics=is", "--n=9"], "n=9 .* too few for is"),
                        ([f"--images={tmp_path / 'x.npy'}", "--resize=clean"], "resize tf1, wanted clean")):
        with pytest.raises(UserError, match=text):
            run(*flags)
    with pytest.raises(UserError, match="there are fid, ref, clip, lpips, toy$"):
        fid.main(["fud"])
    for flags in (["--images=a", "--save=b.txt"], ["--save=b.npz"], ["--images=a", "--save=none/b.npz"]):
        with pytest.raises(UserError, match="ref needs --images, the real images, and --save=FILE.npz"):
            fid.main(["ref", "--threads=1", *flags])


def test_without_weights_there_is_an_error_and_no_number(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()                                      # the real Extractor
    np.save(tmp_path / "x.npy", images(3))
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (tmp_path / "weights.pth").write_bytes(b"other weights")
    with pytest.raises(UserError, match="has sha256 .*, that of the Inception of FID"):
        fid.main(["fid", f"--images={tmp_path / 'x.npy'}", "--threads=1", f"--ref={tmp_path / 'ref.npz'}",
                  f"--inception={tmp_path / 'weights.pth'}"])
    assert capsys.readouterr().out == ""


def test_help_shows_the_commands(capsys):
    fid.main(["--help"])
    said = capsys.readouterr().out
    assert "fid.py fid" in said and "fid.py ref" in said


def test_a_metric_is_a_function_and_a_row_of_the_table(tmp_path, few, monkeypatch, capsys):
    """Rows of images, an error, no reference, a least number of images: the commands follow whatever the row states."""
    def confidence(logits):
        p = logits.softmax(1).amax(1)
        return p.mean().item(), (p.std() / len(p) ** 0.5).item()

    monkeypatch.setitem(fid.METRICS, "confidence", fid.Metric(
        lambda stats, rows, ref: confidence(rows), rows="logits", least=4, reference=False))
    x = images(12)
    np.savez(tmp_path / "x.npz", arr_0=x)
    flags = ["fid", f"--images={tmp_path / 'x.npz'}", "--threads=1"]
    fid.main([*flags, "--metrics=confidence"])
    value, error = confidence(few(torch.from_numpy(x).permute(0, 3, 1, 2))[1])
    found = last_json(capsys)["metrics"]["confidence12/inception-2015-12-05/tf1"]
    assert found == {"value": pytest.approx(value, rel=1e-6), "se": pytest.approx(error, rel=1e-6)}
    fid.main([*flags, "--metrics=fid+confidence", f"--ref={reference(tmp_path / 'ref.npz', few)}"])
    assert last_json(capsys)["metrics"]["confidence12/inception-2015-12-05/tf1"] == found
    with pytest.raises(UserError, match="n=3 images are too few for confidence, which needs 4"):
        fid.main([*flags, "--metrics=confidence", "--n=3"])
    with pytest.raises(UserError, match="there are fid, kid, is, confidence"):
        fid.main([*flags, "--metrics=confident"])


# ---------------------------------------------------------------- of a run, and during training

FLAGS = ["--n=7", "--batch=4", "--steps=2", "--dtype=float32", "--threads=1", "--prompt=a red ring; a blue square"]


def test_a_run_is_measured_on_the_images_that_sample_generates(tmp_path, few, capsys):
    out, ref = run_folder(tmp_path / "run", about={"ema": "0.07"}), reference(tmp_path / "ref.npz", few)
    path = generated(out, *FLAGS)[1]
    before, values = sorted(p.name for p in out.rglob("*")), []
    capsys.readouterr()
    for source in ([f"--out={out}", *FLAGS], [f"--images={path}", "--threads=1"]):
        fid.main(["fid", f"--ref={ref}", *source])
        values.append(last_json(capsys))
    name = "fid7/inception-2015-12-05/tf1"
    assert values[0]["metrics"][name]["value"] == pytest.approx(values[1]["metrics"][name]["value"], rel=1e-9)
    line = values[0]
    assert (line["train_step"], line["guidance"], line["eta"], line["steps"]) == (12, 1.5, 0.25, 2)     # the run's own
    assert (line["sampler"], line["dtype"], line["ema_std"]) == ("ddim", "float32", "0.07")
    assert line["weights_sha256"] == checkpoint.read_header(out / "weights.safetensors")["sha256"]
    assert line["prompt"] == "a red ring; a blue square" and line["prompts_sha256"] == ""
    assert before == sorted(p.name for p in out.rglob("*"))                 # nothing is left on the disk


def test_a_run_that_generates_latents_or_nothing_finite_is_refused(tmp_path, few, monkeypatch):
    ref = reference(tmp_path / "ref.npz", few)
    latents = run_folder(tmp_path / "latents", "none", channels=4)
    with pytest.raises(UserError, match="latents of 4 channels"):
        fid.main(["fid", f"--out={latents}", f"--ref={ref}", "--threads=1"])
    monkeypatch.setattr(sample, "generate", lambda *a: torch.full((4, 3, 16, 16), math.nan))
    with pytest.raises(UserError, match="7 of 7 images are not finite; try --dtype=float32"):
        fid.main(["fid", f"--out={run_folder(tmp_path / 'run')}", f"--ref={ref}", *FLAGS])


def test_during_training_a_line_is_logged_and_nothing_else_changes(tmp_path, few, capsys):
    monitor, net, out = monitored(tmp_path, few)
    o, cfg, about = monitor.o, monitor.run.cfg, checkpoint.read_header(out / "weights.safetensors")
    state = torch.get_rng_state()
    first, second = monitor(net, 100), monitor(net, 200)
    assert first == second and torch.equal(state, torch.get_rng_state())
    lines = log.read(out)
    assert [line["step"] for line in lines] == [100, 200]
    (name, value), = first.items()
    assert lines[0][name] == pytest.approx(value["value"], rel=1e-5)
    capsys.readouterr()
    fid.main(["fid", f"--out={out}", f"--ref={o.ref}", *[flag for flag in FLAGS if "prompt" not in flag]])
    assert last_json(capsys)["metrics"][name] == value
    with pytest.raises(UserError, match="unknown sampler"):
        fid.Monitor(replace(o, sampler="euler"), cfg, about, ALONE)
    with pytest.raises(UserError, match="need --ref"):
        fid.Monitor(replace(o, ref=""), cfg, about, ALONE)


@pytest.mark.parametrize("flags, says", [
    (["--images=x.npz", "--ema_file=e.safetensors"], "--ema_file=e.safetensors has no effect with --images"),
    (["--images=x.npz", "--pretrained=dit.pt"], "--pretrained=dit.pt has no effect with --images"),
    (["--out=run", "--center_crop=64"], "--center_crop=64 has no effect without --images")])
def test_an_option_without_effect_is_an_error(flags, says):
    with pytest.raises(UserError, match=says):
        fid.main(["fid", *flags])


def monitored(tmp_path, few):
    """A Monitor of a run, its network and its folder."""
    import model
    out, ref = run_folder(tmp_path / "run", "class"), reference(tmp_path / "ref.npz", few)
    net, cfg = model.load(out)
    net.dtype = torch.float32
    o = fid.Options(out=str(out), ref=str(ref), n=7, batch=4, steps=2)
    return fid.Monitor(o, cfg, checkpoint.read_header(out / "weights.safetensors"), ALONE), net, out


def test_a_measurement_that_fails_during_training_is_a_line_in_the_log(tmp_path, few, monkeypatch, capsys):
    monitor, net, out = monitored(tmp_path, few)
    generate = sample.generate

    def broken(net, cfg, cond, indices, o, device):
        x = generate(net, cfg, cond, indices, o, device).clone()
        x[np.isin(indices, (2, 6, 7)), 1, 3] = math.nan     # number 7 is generated too, but not counted: n is 7
        return x
    monkeypatch.setattr(sample, "generate", broken)
    assert monitor(net, 100) == {} and "step 100" in (said := capsys.readouterr().err) and "continues" in said
    monkeypatch.setattr(sample, "generate", lambda *args: torch.zeros(4, 3, 16, 16))
    assert monitor(net, 200) == {}
    monkeypatch.setattr(sample, "generate", generate)
    assert monitor(net, 300)
    first, second, third = log.read(out)
    assert first["step"] == 100 and first["evaluation_failed"].startswith("2 of 7 images are not finite")
    assert "all 7 images are uniform" in second["evaluation_failed"]
    assert all("evaluation_s" in line and not any(key.startswith("fid") for key in line) for line in (first, second))
    assert "evaluation_failed" not in third and any(key.startswith("fid") for key in third)


def add_up_over(world):
    """all_reduce_sum for `world` threads that stand for processes."""
    meet, given = Barrier(world), {}

    def add_up(x, dist):
        given[dist.rank] = x
        meet.wait(20)
        total = sum(given.values())
        meet.wait(20)
        return total
    return add_up


def test_processes_without_broken_images_stop_with_those_that_have_some(few, monkeypatch):
    def one(rank):
        loaded = counted(lambda indices: torch.from_numpy(images(20)).permute(0, 3, 1, 2)[indices])
        loaded.broken = (0, 2, 1)[rank]
        with pytest.raises(fid.Failed, match="3 of 20 images are not finite"):
            fid.collect(loaded, 20, 5, Few(), set(), distributed.Dist(CPU, rank, 3))
        return rank

    monkeypatch.setattr(distributed, "all_reduce_sum", add_up_over(3))
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(one, range(3))) == [0, 1, 2]


# ---------------------------------------------------------------- means of other metrics

def test_mean_and_standard_error_are_those_of_the_values():
    x = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1e6
    got = mean_over(x.tolist(), ALONE)
    assert got.value == pytest.approx(x.mean().item(), rel=1e-15) and got.n == 50
    assert got.error == pytest.approx((x.std() / math.sqrt(50)).item(), rel=1e-9)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_fewer_than_two_values_are_no_mean(values):
    with pytest.raises(UserError, match=f"at least 2 images or prompts, got {len(values)}"):
        mean_over(values, ALONE)


def test_three_processes_one_of_them_without_values_give_what_one_does(monkeypatch):
    monkeypatch.setattr(distributed, "all_reduce_sum", add_up_over(3))
    parts = [1.0, 2.0, 4.0, 8.0], [], [16.0, 32.0, 64.5]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(lambda rank: mean_over(parts[rank], distributed.Dist(CPU, rank, 3)), range(3)))
    monkeypatch.undo()
    want = mean_over([v for part in parts for v in part], ALONE)
    assert got[0] == got[1] == got[2] and got[0].n == 7
    assert (got[0].value, got[0].error) == pytest.approx((want.value, want.error), rel=1e-14)


def test_the_variance_form_is_the_mean_over_pairs_for_any_vectors():
    g = torch.Generator().manual_seed(2)
    for K in (2, 3, 7):
        parts = [torch.randn(4, K, 6, 5, generator=g).double() + 3, torch.randn(4, K, 9, generator=g).double()]
        flat = torch.cat([p.flatten(2) for p in parts], 2)
        want = torch.stack([(flat[:, i] - flat[:, j]).square().sum(1) for i in range(K) for j in range(i)]).mean(0)
        assert torch.allclose(mean_pair_distance(parts), want, rtol=1e-12)
    near = 1 + 1e-4 * torch.randn(1, 5, 1000, generator=g)      # fp32: differences far below the vectors' length
    far = near.double()
    want = torch.stack([(far[:, i] - far[:, j]).square().sum(1) for i in range(5) for j in range(i)])
    assert torch.allclose(mean_pair_distance([near]), want.mean(0), rtol=1e-4)
    with pytest.raises(ValueError, match="at least two"):
        mean_pair_distance([torch.zeros(3, 1, 5)])


# ---------------------------------------------------------------- sizes of one prompt

def groups_of(o, sizes=(16, 48, 96)):
    """All groups of one process. (P, K, 3, H, W)"""
    return torch.cat(list(fid.size_groups(sample.load_run(o, CPU), sizes, ALONE)))


def test_groups_of_latents_are_decoded_and_of_the_file_that_is_named(tmp_path, monkeypatch):
    out = run_folder(tmp_path / "run", "class", channels=4, controls="size", control_weight="uniform")
    o, seen = sample.Options(out=str(out), n=2, steps=2, dtype="float32"), []
    with pytest.raises(UserError, match="latents of 4 channels"):
        groups_of(o)

    def decoder_of(about, path, channels, device):
        seen.append((about["file"], path, channels))
        return lambda z: z[:, :3].repeat(1, 1, 2, 2), 2
    monkeypatch.setattr(sample, "decoder_of", decoder_of)
    tensors, header = checkpoint.read_weights(out / "weights.safetensors")
    header = {k: v for k, v in header.items() if k != "sha256"}
    for file, scale in (("weights.safetensors", 1), ("wide.safetensors", 0.5)):
        checkpoint.write_weights(out / file, {k: scale * v for k, v in tensors.items()}, {**header, "file": file})
    requested = [replace(o, ema_file=file, autoencoder="vae") for file in ("weights.safetensors", "wide.safetensors")]
    first, other = (groups_of(a) for a in requested)
    assert seen == [(a.ema_file, "vae", 4) for a in requested]
    assert first.shape == (2, 3, 3, 32, 32) and torch.equal(first[..., :16, :16], first[..., 16:, 16:])
    assert not torch.equal(first, other) and (first[:, 0] != first[:, 2]).flatten(1).any(1).all()


def test_groups_differ_in_size_alone_and_do_not_know_the_processes(tmp_path):
    run_folder(tmp_path / "run", controls="size", control_weight="uniform")
    o = sample.Options(out=f"{tmp_path}/run", n=5, steps=2, batch=8, dtype="float32")
    alone = groups_of(o)
    assert alone.shape == (5, 3, 3, 16, 16) and alone.dtype == torch.uint8
    assert (alone[:, 0] != alone[:, 2]).flatten(1).any(1).all()
    run = sample.load_run(o, CPU)
    shared = [list(fid.size_groups(run, (16, 48, 96), distributed.Dist(CPU, r, 2))) for r in range(2)]
    assert sum(len(part) for parts in shared for part in parts) == 5
    apart = (torch.cat([part for parts in zip(*shared) for part in parts]
                       + [p for parts in shared for p in parts[min(map(len, shared)):]]).int() - alone.int()).abs()
    assert apart.max() <= 1                                     # a batch of another size rounds differently
    turned = groups_of(o, (96, 16, 48))
    assert (turned[:, [1, 2, 0]].int() - alone.int()).abs().max() <= 1
    with pytest.raises(UserError, match="no --size of their own"):
        groups_of(replace(o, size="16,16"))


@pytest.mark.parametrize("command, option", [("clip", "--prompts="), ("lpips", "--sizes="), ("toy", "--write=")])
def test_measures_of_other_files_are_commands_here_too(command, option, capsys):
    with pytest.raises(SystemExit):
        fid.main([command, "--help"])
    assert option in capsys.readouterr().out
