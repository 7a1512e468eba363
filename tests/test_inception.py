"""The network of FID against two independent ones under the same weights, every known slip of a port, and its loader.

No test has the published weights: those here are by formula, and only a changed sha256 lets an Extractor have them.
"""
import hashlib
import io
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import inception
import machine
from config import UserError
from fid_check import GOLDEN, golden, golden_image, relative
from inception import Extractor, Inception, by_formula, precise, tf1_resize

CPU = torch.device("cpu")
ALONE = machine.Place(CPU, 0, 1)
PUBLISHED = inception.SHA256


@pytest.fixture(scope="module")
def net():
    return by_formula(torch.float64)


@pytest.fixture(scope="module")
def content(net):
    """A weights file, its numbers by formula."""
    file = io.BytesIO()
    torch.save(like_float(net), file)
    return file.getvalue()


def like_float(net):
    return {k: v.float() if v.is_floating_point() else v for k, v in net.state_dict().items()}


@pytest.fixture(scope="module")
def weights(content, tmp_path_factory):
    """The path of that file, and a source that takes its hash for the published one."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(inception, "SHA256", hashlib.sha256(content).hexdigest())
        yield path


@pytest.fixture(scope="module")
def extract(weights):
    return Extractor(str(weights), "tf1", ALONE)


def pictures(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# ---------------------------------------------------------------- the graph

def test_there_are_as_many_tensors_and_bytes_as_in_the_published_file(net):
    state = like_float(net)
    assert len(state) == 566 and sum(v.numel() * v.element_size() for v in state.values()) == 95_542_320
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_7c.branch3x3_2b.conv.weight"].shape == (384, 384, 3, 1)


def test_golden_output(net):
    assert relative(golden(net), GOLDEN) < 1e-9


def half_pixel(x, side=299):
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)


def changed(net):
    """How far golden is off with TABLE, POOLS, EPS and the rest as they are now."""
    with torch.device("meta"):
        other = Inception()
    other.load_state_dict(net.state_dict(), assign=True)
    return relative(golden(other.eval()), GOLDEN)


@pytest.mark.parametrize("slip", ["padding", *[pytest.param(slip, marks=pytest.mark.slow) for slip in (
    "scale", "resize", "antialias", "last pool", "stem padding", "epsilon", "bias")]])
def test_a_slip_of_the_port_shows(net, slip, monkeypatch):
    """By a thousand times the tolerance or more."""
    import fid_check
    if slip == "scale":
        monkeypatch.setattr(Inception, "forward", scaled_by_127)
    if slip == "bias":
        monkeypatch.setattr(Inception, "forward", lambda self, x, forward=Inception.forward:
                            (forward(self, x)[0], self.fc(forward(self, x)[0])))
    if slip == "resize":
        monkeypatch.setattr(fid_check, "tf1_resize", half_pixel)
    if slip == "antialias":
        monkeypatch.setattr(fid_check, "tf1_resize", inception.clean_resize)
    if slip == "padding":
        monkeypatch.setitem(inception.POOLS, "avg", lambda x: F.avg_pool2d(x, 3, 1, 1))
    if slip == "last pool":
        monkeypatch.setitem(inception.TABLE, "Mixed_7c", inception.TABLE["Mixed_7b"])
    if slip == "stem padding":
        monkeypatch.setitem(inception.TABLE, "Conv2d_2b_3x3", "3/1>64")
    if slip == "epsilon":
        monkeypatch.setattr(inception, "EPS", 1e-5)
    assert changed(net) > 1e-6


def scaled_by_127(self, x, forward=Inception.forward):
    return forward(self, (x / 127.5 - 1) * 128 + 128)


@pytest.mark.slow
def test_pytorch_fid_has_the_same_graph(net, monkeypatch):
    """To the last bit, in float64 and float32."""
    theirs = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: net.state_dict())
    other = theirs.InceptionV3(resize_input=False, normalize_input=False).eval()
    x = pictures(2, 3, 107, 139)
    for dtype in (torch.float64, torch.float32):
        ours, other = by_formula(dtype), other.to(dtype)
        other.load_state_dict(renamed(other, ours.state_dict()))
        with torch.no_grad():
            a, b = ours(x.to(dtype))[0], other((x.to(dtype) - 128) / 128)[0][:, :, 0, 0]
        assert a.std() > 0.3 and relative_norm(a, b) < {torch.float32: 1e-6, torch.float64: 1e-15}[dtype]


def renamed(other, state):
    """Our tensors under the names of pytorch-fid's blocks, which have the same order."""
    rows = [v for k, v in state.items() if not k.startswith("fc.")]
    return dict(zip(other.state_dict(), rows, strict=True))


def relative_norm(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("h, w", [(32, 41), (300, 64)])
def test_torch_fidelity_has_the_same_network_resize_and_logits(h, w, weights, extract):
    """To the last bit; folded and in channels_last layout, which adds in another order, to fp32 rounding."""
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    other = theirs.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"],
                                               feature_extractor_weights_path=weights)
    x, plain = pictures(1, 3, h, w), by_formula(torch.float32)
    with torch.no_grad():
        a, b, c = other(x), plain(tf1_resize(x.float())), extract(x)
    for k in range(2):
        assert relative_norm(a[k], b[k]) < 1e-6 and relative_norm(a[k], c[k]) < 1e-4


def test_folding_moves_normalization_into_the_convolutions_and_changes_nothing():
    """A Mixed block in float64 whose every statistic, gain and bias differs from what it starts from."""
    torch.manual_seed(0)
    net = inception.Mixed(5, "branch1x1 1>7, branch_pool avg 1>3, branch3x3 1>4 3x1&1x3>6").double().eval()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point() and ".bn." in name:
                tensor.uniform_(0.5, 2.0)
    x = torch.randn(2, 5, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        before = net(x)
        after = inception.fold_(net)(x)
    assert torch.allclose(before, after, rtol=1e-12, atol=1e-12)
    assert before.std() > 0.1 and not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())


# ---------------------------------------------------------------- resize

@pytest.mark.parametrize("n", [28, 64, 299, 512])
def test_tf1_resize_reads_pixel_k_at_k_n_over_side(n):
    """Row by row with numpy's interpolation; beyond the last pixel it is that pixel. At 299 nothing changes."""
    x = pictures(1, 3, n, 299, seed=n).float()
    want = np.stack([[np.interp(np.arange(299) * n / 299, np.arange(n), column) for column in plane.T.numpy()]
                     for plane in x[0]])                    # (3, W, 299)
    assert np.abs(tf1_resize(x)[0].transpose(1, 2).numpy() - want).max() < 255 * n * 2.0 ** -23     # of a coordinate
    assert torch.equal(tf1_resize(x.transpose(2, 3)), tf1_resize(x).transpose(2, 3))
    assert n != 299 or torch.equal(tf1_resize(x), x)


@pytest.mark.slow
@pytest.mark.parametrize("side", [28, 64, 299, 512])
def test_torch_fidelity_resizes_alike(side):
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    x = pictures(2, 3, side, side + 5).float()
    other = theirs.interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    assert (tf1_resize(x) - other).abs().max() < 1e-4       # of 255
    assert side == 299 or (tf1_resize(x) - half_pixel(x)).abs().max() > 10


def test_clean_resize_is_pil_s():
    from PIL import Image
    x = pictures(1, 3, 64, 331)
    planes = [Image.fromarray(plane.numpy().astype(np.float32)) for plane in x[0]]
    want = np.stack([np.asarray(p.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for p in planes])
    assert np.abs(inception.clean_resize(x.float())[0].numpy() - want).max() < 0.01


def test_each_resize_gives_other_features(weights, extract):
    x, seen = pictures(1, 3, 48, 40), []
    for resize in ("tf1", "clean"):
        extractor = Extractor(str(weights), resize, ALONE)
        extractor.net = lambda x: seen.append(x) or (x[:, 0, 0], x[:, 0, 1])
        extractor(x)
    assert torch.equal(seen[0], tf1_resize(x.float())) and torch.equal(seen[1], inception.clean_resize(x.float()))
    assert (seen[0] - seen[1]).abs().max() > 10
    with pytest.raises(UserError, match="unknown resize='nearest'; there are tf1, clean"):
        Extractor(str(weights), "nearest", ALONE)


# ---------------------------------------------------------------- what surrounds a call

def test_only_rgb_bytes_are_pictures(extract):
    for x in (pictures(2, 3, 8, 9).float(), pictures(2, 1, 8, 9), pictures(3, 8, 9), pictures(2, 8, 9, 3)):
        with pytest.raises(ValueError, match="wanted .B, 3, H, W. uint8"):
            extract(x)


def test_what_was_set_for_training_comes_back_and_no_random_number_is_drawn(extract):
    state = torch.get_rng_state()
    torch.set_float32_matmul_precision("medium")
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    with torch.autocast("cpu", torch.bfloat16):
        features, _ = extract(pictures(1, 3, 20, 24))
        assert torch.is_autocast_enabled("cpu") and features.dtype == torch.float32
    assert torch.get_float32_matmul_precision() == "medium" and torch.equal(state, torch.get_rng_state())
    assert flags == (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark,
                     torch.backends.cudnn.deterministic)
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(features, extract(pictures(1, 3, 20, 24))[0]) and not extract.net.training


def test_tf32_is_off_inside():
    with precise(CPU):
        assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


# ---------------------------------------------------------------- weights

def test_any_other_byte_is_refused(content, weights, tmp_path):
    damaged, path = bytearray(content), tmp_path / "weights.pth"
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="which is not that of the Inception of FID"):
        Extractor(str(path), "tf1", ALONE)


def test_weights_that_are_not_the_published_ones_are_refused(content, weights, tmp_path, monkeypatch):
    """The hash in the source is that of the published file, so no file of tests passes without changing it."""
    monkeypatch.setattr(inception, "SHA256", PUBLISHED)
    with pytest.raises(UserError, match="not that of the Inception of FID"):
        Extractor(str(weights), "tf1", ALONE)
    assert PUBLISHED.startswith("6726825d") and all("6726825d" in url for url in inception.URLS)


def test_a_file_with_the_right_hash_and_another_net_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "w.pth"
    torch.save({"fc.weight": torch.ones(2, 3)}, path)
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(RuntimeError, match="Missing key"):
        Extractor(str(path), "tf1", ALONE)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache, no environment variable, and a network whose calls are listed and fail."""
    calls = []
    def refuse(url, *_, **__):
        calls.append(url)
        raise URLError("Name or service not known")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    return calls


def test_missing_weights_say_what_to_fetch_from_where_and_where_to_put_it(offline, tmp_path):
    with pytest.raises(UserError) as e:
        Extractor("", "tf1", ALONE)
    for text in (*inception.URLS, inception.SHA256, str(tmp_path / "hub"), "--inception=FILE", "INCEPTION_WEIGHTS",
                 "95.6 MB", "there is no FID"):
        assert text in str(e.value)
    assert offline == list(inception.URLS)                  # both mirrors, in turn


def test_flag_then_variable_then_cache_then_network(offline, content, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(content).hexdigest())
    for k, path in enumerate(inception.cached()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        assert inception.find_weights("", ALONE) == path
        path.unlink()
    (tmp_path / "b.pth").touch()
    monkeypatch.setenv(inception.VARIABLE, str(tmp_path / "b.pth"))
    assert inception.find_weights("", ALONE) == tmp_path / "b.pth"
    (tmp_path / "a.pth").touch()
    assert inception.find_weights(str(tmp_path / "a.pth"), ALONE) == tmp_path / "a.pth"
    with pytest.raises(UserError, match="no file '.*c.pth', given by --inception"):
        inception.find_weights(str(tmp_path / "c.pth"), ALONE)
    monkeypatch.setenv(inception.VARIABLE, "nowhere.pth")
    with pytest.raises(UserError, match="no file 'nowhere.pth', given by INCEPTION_WEIGHTS"):
        inception.find_weights("", ALONE)
    assert not offline


def test_a_download_is_checked_against_the_whole_hash(offline, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, hash_prefix, progress: seen.append(
        (url, path, hash_prefix)))
    assert inception.find_weights("", ALONE) == inception.cached()[0]
    assert seen == [(inception.URLS[0], str(inception.cached()[0]), inception.SHA256)] and len(inception.SHA256) == 64


def test_a_process_whose_neighbour_has_no_weights_stops_too(offline, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(machine, "add_up", lambda x, place: x + 1)
    with pytest.raises(UserError, match="another process has no Inception weights"):
        inception.find_weights("", machine.Place(CPU, 1, 2))
    assert not offline                                      # it asks nobody itself
