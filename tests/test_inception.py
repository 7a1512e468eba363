"""The network of FID against two independent ones with the same weights, every known slip of a port, and its loader.

No test has the published weights: these follow a formula, and only a changed sha256 lets an Extractor load them.
"""
import hashlib
import io
from copy import deepcopy
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config import UserError
from evaluation import inception
from evaluation.inception import Extractor, Inception, exact_fp32, tf1_resize
from runtime import distributed

CPU = torch.device("cpu")
ALONE = distributed.Dist(CPU, 0, 1)
PUBLISHED = inception.SHA256

# Features 0, 2 and 500, their mean, and logits 0 and 1000, of golden_image with formula weights in float64.
# The modules of pytorch-fid and torch-fidelity give the same, see below.
GOLDEN = (1.13632566466, 0.883459228125, 0.638190932149, 0.503075674075, 0.727769898574, -0.10979272435)


def by_formula():
    """The network in float64 with weights made of integers alone, the same on every machine.

    Value j of tensor k is a hash of (j, k), scaled such that activations keep their size."""
    with torch.device("meta"):
        net = Inception().double()
    for k, (name, tensor) in enumerate(net.to_empty(device="cpu").state_dict().items()):
        x = torch.arange(tensor.numel()).mul_(2654435761).add_((k + 1) * 40503).bitwise_and_(2 ** 32 - 1)
        x = x.bitwise_xor_(x >> 15).mul_(739982445).bitwise_and_(2 ** 32 - 1)
        x = x.bitwise_xor_(x >> 12).mul_(695872825).bitwise_and_(2 ** 32 - 1)
        u = x.bitwise_xor_(x >> 15).double().div_(2 ** 32).view(tensor.shape)
        if name.endswith(("conv.weight", "fc.weight")):
            u = u.mul_(2).sub_(1).mul_((6 / tensor[0].numel()) ** 0.5)
        elif name.endswith(("running_var", "bn.weight")):
            u = 0.5 + u
        elif name.endswith(("bias", "running_mean")):
            u = (u - 0.5) / 2
        tensor.copy_(u)
    return net.eval().requires_grad_(False)


def outputs(net, resize=tf1_resize):
    """Features and logits of an image by formula, at the smallest side where the last pool has several pixels."""
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(32), torch.arange(40), indexing="ij")
    image = ((x * x * (3 + c) + y * (17 + 5 * c) + x * y + 40 * c) % 256).double()[None]
    with torch.inference_mode():
        return [x[0] for x in net(resize(image, 107))]


def load(tensors):
    """A network with these tensors."""
    with torch.device("meta"):
        net = Inception()
    net.load_state_dict(tensors, assign=True)
    return net.eval()


@pytest.fixture(scope="module")
def net():
    return by_formula()


@pytest.fixture(scope="module")
def right(net):
    return outputs(net)


@pytest.fixture(scope="module")
def content():
    """A weights file of the right names and shapes, each tensor one number."""
    with torch.device("meta"):
        shapes = Inception().state_dict()
    file = io.BytesIO()
    torch.save({k: torch.full((), 0.5, dtype=v.dtype).expand(v.shape) for k, v in shapes.items()}, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def weights(content, tmp_path_factory):
    """The path of that file, with its hash in the source in place of the published one."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(inception, "SHA256", hashlib.sha256(content).hexdigest())
        yield path


@pytest.fixture(scope="module")
def extract(weights):
    return Extractor(str(weights), "tf1", ALONE)


def random_images(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# ---------------------------------------------------------------- the graph

def test_there_are_as_many_tensors_and_bytes_as_in_the_published_file():
    with torch.device("meta"):
        state = Inception().state_dict()
    assert len(state) == 566 and sum(v.numel() * v.element_size() for v in state.values()) == 95_542_320
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_7c.branch3x3_2b.conv.weight"].shape == (384, 384, 3, 1)


@pytest.mark.slow
def test_golden_output(right):
    f, z = right
    found = [v.item() for v in (f[0], f[2], f[500], f.mean(), z[0], z[1000])]
    assert max(abs(v / want - 1) for v, want in zip(found, GOLDEN, strict=True)) < 1e-9


def half_pixel(x, side=299):
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)


@pytest.mark.slow
@pytest.mark.parametrize("slip", ["padding", "scale", "resize", "antialias", "last pool", "stem padding", "epsilon",
                                  "bias"])
def test_a_slip_of_the_port_shows(net, right, slip, monkeypatch):
    """By a thousand times the tolerance or more."""
    forward, resize = Inception.forward, {"resize": half_pixel, "antialias": inception.clean_resize}
    if slip == "scale":
        monkeypatch.setattr(Inception, "forward", lambda self, x: forward(self, (x / 127.5 - 1) * 128 + 128))
    if slip == "bias":
        monkeypatch.setattr(Inception, "forward", lambda self, x: (f := forward(self, x)[0], self.fc(f)))
    if slip == "padding":
        monkeypatch.setitem(inception.POOLS, "avg", lambda x: F.avg_pool2d(x, 3, 1, 1))
    if slip == "last pool":
        monkeypatch.setitem(inception.TABLE, "Mixed_7c", inception.TABLE["Mixed_7b"])
    if slip == "stem padding":
        monkeypatch.setitem(inception.TABLE, "Conv2d_2b_3x3", "3/1>64")
    if slip == "epsilon":
        monkeypatch.setattr(inception, "EPS", 1e-5)
    found = outputs(load(net.state_dict()), resize.get(slip, tf1_resize))
    assert relative_norm(torch.cat(found), torch.cat(right)) > 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_pytorch_fid_has_the_same_graph(net, monkeypatch):
    """To the last bits of float64."""
    theirs = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: net.state_dict())
    with torch.device("meta"):
        other = theirs.InceptionV3(resize_input=False, normalize_input=False).eval()
    other.load_state_dict(renamed(other, net.state_dict()), assign=True)
    x = random_images(1, 3, 79, 107).double()
    with torch.no_grad():
        a, b = net(x)[0], other((x - 128) / 128)[0][:, :, 0, 0]
    assert a.std() > 0.3 and relative_norm(a, b) < 1e-15


def renamed(other, state):
    """Our tensors under the names of pytorch-fid's blocks, which have the same order."""
    rows = [v for k, v in state.items() if not k.startswith("fc.")]
    return dict(zip(other.state_dict(), rows, strict=True))


def relative_norm(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.slow
def test_torch_fidelity_has_the_same_network_resize_and_logits(net, tmp_path, monkeypatch):
    """To the last bits; folded and in channels_last layout, which adds in another order, to fp32 rounding."""
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    plain, weights = deepcopy(net).float(), tmp_path / "weights.pth"
    torch.save(plain.state_dict(), weights)
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    other = theirs.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"],
                                               feature_extractor_weights_path=weights)
    x = random_images(1, 3, 300, 64)
    with torch.no_grad():
        a, b, c = other(x), plain(tf1_resize(x.float())), Extractor(str(weights), "tf1", ALONE)(x)
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
    x = random_images(1, 3, n, 299, seed=n).float()
    want = np.stack([[np.interp(np.arange(299) * n / 299, np.arange(n), column) for column in plane.T.numpy()]
                     for plane in x[0]])                    # (3, W, 299)
    assert np.abs(tf1_resize(x)[0].transpose(1, 2).numpy() - want).max() < 255 * n * 2.0 ** -23     # of a coordinate
    assert torch.equal(tf1_resize(x.transpose(2, 3)), tf1_resize(x).transpose(2, 3))
    assert n != 299 or torch.equal(tf1_resize(x), x)


@pytest.mark.slow
@pytest.mark.parametrize("side", [28, 64, 299, 512])
def test_torch_fidelity_resizes_alike(side):
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    x = random_images(2, 3, side, side + 5).float()
    other = theirs.interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    assert (tf1_resize(x) - other).abs().max() < 1e-4       # of 255
    assert side == 299 or (tf1_resize(x) - half_pixel(x)).abs().max() > 10


def test_clean_resize_is_pil_s():
    from PIL import Image
    x = random_images(1, 3, 64, 331)
    planes = [Image.fromarray(plane.numpy().astype(np.float32)) for plane in x[0]]
    want = np.stack([np.asarray(p.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for p in planes])
    assert np.abs(inception.clean_resize(x.float())[0].numpy() - want).max() < 0.01


def test_each_resize_gives_other_features(extract, monkeypatch):
    x, seen = random_images(1, 3, 48, 40), []
    monkeypatch.setattr(extract, "net", lambda x: seen.append(x) or (x[:, 0, 0], x[:, 0, 1]))
    for resize in ("tf1", "clean"):
        monkeypatch.setattr(extract, "resize", resize)
        extract(x)
    assert torch.equal(seen[0], tf1_resize(x.float())) and torch.equal(seen[1], inception.clean_resize(x.float()))
    assert (seen[0] - seen[1]).abs().max() > 10
    with pytest.raises(UserError, match="unknown resize='nearest'; there are tf1, clean"):
        Extractor("", "nearest", ALONE)


# ---------------------------------------------------------------- what surrounds a call

def test_the_settings_of_training_come_back_and_no_random_state_changes(extract, monkeypatch):
    weight, state = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0)), torch.get_rng_state()
    monkeypatch.setattr(extract, "net", lambda x: (F.conv2d(x, weight).mean((2, 3)),) * 2)
    torch.set_float32_matmul_precision("medium")
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    with torch.autocast("cpu", torch.bfloat16):
        features, _ = extract(random_images(1, 3, 20, 24))
        assert torch.is_autocast_enabled("cpu") and features.dtype == torch.float32
    assert torch.get_float32_matmul_precision() == "medium" and torch.equal(state, torch.get_rng_state())
    assert flags == (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark,
                     torch.backends.cudnn.deterministic)
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(features, extract(random_images(1, 3, 20, 24))[0])


def test_tf32_is_off_inside():
    with exact_fp32(CPU):
        assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


# ---------------------------------------------------------------- weights

def test_any_other_byte_is_refused(content, weights, tmp_path):
    damaged, path = bytearray(content), tmp_path / "weights.pth"
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="has sha256 .*, that of the Inception of FID"):
        Extractor(str(path), "tf1", ALONE)


def test_the_hash_in_the_source_is_that_of_the_published_file():
    """So no file of tests passes without changing it."""
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
                 "95.6 MB", "FID, KID and IS need"):
        assert text in str(e.value)
    assert offline == [inception.URLS[0]]


def test_flag_then_variable_then_cache_then_network(offline, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "checkpoints" / inception.URLS[0].rsplit("/", 1)[1]
    cache.parent.mkdir(parents=True)
    for file in (cache, tmp_path / "a.pth", tmp_path / "b.pth"):
        file.touch()
    assert inception.find_weights("", ALONE) == cache
    monkeypatch.setenv(inception.VARIABLE, str(tmp_path / "b.pth"))
    assert inception.find_weights("", ALONE) == tmp_path / "b.pth"
    assert inception.find_weights(str(tmp_path / "a.pth"), ALONE) == tmp_path / "a.pth"
    with pytest.raises(UserError, match="no file '.*c.pth'"):
        inception.find_weights(str(tmp_path / "c.pth"), ALONE)
    monkeypatch.setenv(inception.VARIABLE, "nowhere.pth")
    with pytest.raises(UserError, match="no file 'nowhere.pth'"):
        inception.find_weights("", ALONE)
    assert not offline


def test_a_download_is_checked_against_the_whole_hash(offline, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, hash_prefix, progress: seen.append(
        (url, path, hash_prefix)))
    file = inception.find_weights("", ALONE)
    assert file.parent == tmp_path / "hub" / "checkpoints"
    assert seen == [(inception.URLS[0], str(file), inception.SHA256)] and len(inception.SHA256) == 64


def test_a_process_whose_neighbour_has_no_weights_stops_too(offline, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda x, dist: x + 1)
    with pytest.raises(UserError, match="another process has none; FID, KID and IS need the Inception weights"):
        inception.find_weights("", distributed.Dist(CPU, 1, 2))
    assert not offline                                      # it downloads nothing itself
