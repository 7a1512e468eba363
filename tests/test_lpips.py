"""LPIPS diversity: the arithmetic of the lpips package with a random trunk, which only tests may use.

No two sizes are equal: P 3 prompts of K 4 images of 70 x 64.
"""
import json
import math
from hashlib import sha256

import pytest
import torch

from config import UserError
from evaluation import lpips
from evaluation.lpips import lpips_diversity
from runtime import distributed
from runtime.optional import optional_import
from test_generate import run_folder

CPU = torch.device("cpu")
ALONE = distributed.Dist(CPU, 0, 1)


@pytest.fixture(scope="module")
def random_lpips():
    """lpips's own network, its trunk random; the heads are those of the package."""
    package = optional_import("lpips", "LPIPS")
    torch.manual_seed(0)
    return package.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False)


def groups(noise):
    """P 3 prompts of K 4 images that differ a little."""
    g = torch.Generator().manual_seed(5)
    base = torch.randint(0, 256, (3, 1, 3, 70, 64), generator=g).float()
    return (base + noise * torch.randn(3, 4, 3, 70, 64, generator=g)).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("noise, rel", [(60, 1e-5), pytest.param(2, 1e-4, marks=pytest.mark.slow)])
def test_diversity_is_the_pair_loop_of_the_lpips_package(random_lpips, noise, rel):
    x = groups(noise)
    scaled = x.float() / 127.5 - 1
    first, second = zip(*((i, j) for i in range(4) for j in range(i)))
    one, two = (scaled[:, list(k)].flatten(0, 1) for k in (first, second))     # the 6 pairs of every prompt
    want = random_lpips(one, two).flatten().unflatten(0, (3, 6)).double().mean(1)
    got = lpips_diversity([x[:1], x[1:]], random_lpips, ALONE)
    assert got.value == pytest.approx(want.mean().item(), rel=rel) and got.n == 3 and got.value > 0
    assert got.error == pytest.approx((want.std() / math.sqrt(3)).item(), rel=1e-3)


def test_equal_images_are_at_zero_and_their_order_does_not_matter(random_lpips):
    x = groups(20)
    same = lpips_diversity([x[:, :1].expand(-1, 4, -1, -1, -1)], random_lpips, ALONE)
    assert same.value < 1e-10
    one, two = (lpips_diversity([y], random_lpips, ALONE).value for y in (x, x[:, [2, 0, 3, 1]]))
    assert one == pytest.approx(two, rel=1e-5) and one > 1e6 * same.value


def test_no_lpips_without_its_very_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("LPIPS_TRUNK", "")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="needs .*7be5be79.pth .* got missing; get https://.*--trunk or LPIPS_TRUNK"):
        lpips.load_lpips("", CPU)
    (tmp_path / "wrong.pth").write_bytes(b"some other weights")
    with pytest.raises(UserError, match="wrong.pth with sha256 7be5be79.*, got"):
        lpips.load_lpips(str(tmp_path / "wrong.pth"), CPU)
    monkeypatch.setenv("LPIPS_TRUNK", str(tmp_path / "wrong.pth"))
    with pytest.raises(UserError, match="wrong.pth with sha256"):
        lpips.load_lpips("", CPU)


def test_the_lpips_command(random_lpips, tmp_path, monkeypatch, capsys):
    """With small groups in place of a run's images, which AlexNet cannot see at 16 pixels."""
    run_folder(tmp_path / "run", controls="size", control_weight="uniform")
    monkeypatch.setattr(lpips, "load_lpips", lambda path, device: random_lpips)
    monkeypatch.setattr(lpips, "size_groups", lambda run, sizes, dist: [groups(20)[:, :len(sizes)]])
    lpips.main([f"--out={tmp_path}/run", "--sizes=16+48+96", "--n=3", "--steps=2"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    want = lpips_diversity([groups(20)[:, :3]], random_lpips, ALONE)
    assert (line["value"], line["error"], line["n"]) == (want.value, want.error, 3) and line["metric"] == "lpips_alex"
    assert (line["sizes"], line["guidance"], line["eta"], line["steps"]) == ([16, 48, 96], 1.5, 0.25, 2)
    lpips.main([f"--out={tmp_path}/run", "--sizes=hr", "--n=3", "--steps=2"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sizes"] == [256, 512, 1024]


@pytest.mark.slow
def test_trunk_and_heads_are_filled_in_by_name(random_lpips, tmp_path, monkeypatch):
    """A file with torchvision's names and the wanted hash gives that trunk; the package's heads are checked."""
    from torchvision.models import alexnet
    torch.manual_seed(7)
    theirs = alexnet(weights=None).features
    trunk = {f"features.{k}": v for k, v in theirs.state_dict().items()}
    torch.save(trunk, tmp_path / "trunk.pth")
    monkeypatch.setattr(lpips, "TRUNK_SHA256", sha256((tmp_path / "trunk.pth").read_bytes()).hexdigest())
    before = torch.get_rng_state()
    net = lpips.load_lpips(str(tmp_path / "trunk.pth"), CPU)
    assert torch.equal(before, torch.get_rng_state()) and not any(p.requires_grad for p in net.parameters())
    x = torch.randn(2, 3, 64, 70, generator=torch.Generator().manual_seed(1))
    assert torch.equal(net.net(x)[4], theirs[:12](x))
    heads = random_lpips.lins.state_dict()
    assert all(torch.equal(v, heads[k]) for k, v in net.lins.state_dict().items())
    assert all((p >= 0).all() for p in net.lins.parameters())
    monkeypatch.setattr(lpips, "HEADS_SHA256", "0" * 64)
    with pytest.raises(UserError, match="alex.pth with sha256 000.*pip install"):
        lpips.load_lpips(str(tmp_path / "trunk.pth"), CPU)


def test_sizes_are_presets_or_numbers():
    for text in ("", "64", "64+x", "0+4", "low"):
        with pytest.raises(UserError, match="neither a preset, all, hr"):
            lpips.main([f"--sizes={text}"])
