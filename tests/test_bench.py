"""The benchmark: what it times, the numbers it prints, and that it compares only networks that agree."""
import math
import re
from types import SimpleNamespace

import pytest
import torch

import model
from conditioning import Condition
from config import UserError
from experiments import bench
from runtime import distributed

TINY = ["--model.width=24", "--model.depth=2", "--model.heads=2", "--model.resolution=8", "--threads=1",
        "--rounds=3", "--seconds=0.01", "--batch=3"]
CLASSES = ["--model.arch=dit", "--model.semantics=class", "--model.classes=5"]
CPU = torch.device("cpu")


# The official interface and key names, as short as they come.
OFFICIAL = '''
import torch, math
from torch import nn
import torch.nn.functional as F

def mod(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

class Holder(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

class DiT(nn.Module):
    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio=4.0,
                 class_dropout_prob=0.1, num_classes=1000, learn_sigma=True):
        super().__init__()
        D, P, C = hidden_size, patch_size, in_channels
        self.P, self.C, self.heads = P, C, num_heads
        two = lambda a, b: nn.Sequential(nn.Linear(a, b), nn.SiLU(), nn.Linear(b, b))
        ada = lambda n: nn.Sequential(nn.SiLU(), nn.Linear(D, n * D))
        self.x_embedder = Holder(proj=nn.Conv2d(C, D, P, P))
        self.t_embedder = Holder(mlp=two(256, D))
        self.y_embedder = Holder(embedding_table=nn.Embedding(num_classes + 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, (input_size // P) ** 2, D), requires_grad=False)
        self.blocks = nn.ModuleList(Holder(
            attn=Holder(qkv=nn.Linear(D, 3 * D), proj=nn.Linear(D, D)),
            mlp=Holder(fc1=nn.Linear(D, 4 * D), fc2=nn.Linear(4 * D, D)),
            adaLN_modulation=ada(6)) for _ in range(depth))
        self.final_layer = Holder(linear=nn.Linear(D, P * P * C * (1 + learn_sigma)), adaLN_modulation=ada(2))

    def forward(self, x, t, y):
        w = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
        c = self.t_embedder.mlp(torch.cat([torch.cos(t[:, None] * w), torch.sin(t[:, None] * w)], 1).float())
        c = c + self.y_embedder.embedding_table(y)
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        for b in self.blocks:
            s1, m1, g1, s2, m2, g2 = b.adaLN_modulation(c).chunk(6, 1)
            qkv = b.attn.qkv(mod(x, s1, m1)).reshape(*x.shape[:2], 3, self.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            x = x + g1[:, None] * b.attn.proj(a)
            x = x + g2[:, None] * b.mlp.fc2(F.gelu(b.mlp.fc1(mod(x, s2, m2)), approximate="tanh"))
        x = self.final_layer.linear(mod(x, *self.final_layer.adaLN_modulation(c).chunk(2, 1)))
        n = math.isqrt(x.shape[1])
        x = torch.einsum("bhwpqc->bchpwq", x.reshape(-1, n, n, self.P, self.P, self.C))
        return SCALE * x.reshape(-1, self.C, n * self.P, n * self.P)
'''


class Theirs(torch.nn.Module):
    """The interface of diffusers' DiT around a DiT of ours, whose output is scaled."""
    def __init__(self, m, scale):
        super().__init__()
        net = model.build(m)
        for layer in net.zero_init_layers():
            torch.nn.init.normal_(layer.weight, std=0.02)
        self.scale, self.inner, self.state_dict = scale, net, net.state_dict

    def forward(self, x, i, label):
        return SimpleNamespace(sample=self.scale * self.inner(x, i.float(), Condition(label=label)))


class NoEMA:
    """The interface of diffusers' EMAModel."""
    def __init__(self, parameters):
        self.step = lambda parameters: None


@pytest.fixture(autouse=True)
def keep_globals():
    """bench sets the number of threads and the fp32 precision of the process."""
    threads, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul)


@pytest.fixture
def quick(monkeypatch):
    """A machine that knows its peak without measuring it: 1 TFLOP/s."""
    monkeypatch.setattr(distributed, "matmul_peak", lambda device, dtype: 1e12)


def stub(monkeypatch, seconds):
    """Networks a and b whose steps seem to take the next of the seconds named after them, and the order of turns."""
    clocks, order = {name: iter([math.nan] * bench.WARMUP + times) for name, times in seconds.items()}, []
    monkeypatch.setattr(bench, "time_once", lambda side, part, device: order.append(side.name) or
                        next(clocks[side.name]))
    return [bench.Implementation(name, torch.nn.Identity(), {}, 10 ** 9) for name in seconds], order


# ---------------------------------------------------------------- speeds

@pytest.mark.parametrize("more", [["--model.controls=crop+flip+size"], CLASSES])
def test_speeds_of_a_tiny_model(more, quick, capsys):
    bench.main([*TINY, *more])
    about, head, *rows = capsys.readouterr().out.splitlines()
    assert re.search(r"GFLOP an image forward; batch 3 on \w+, 1 CPU threads; matmul peak 1.000 TFLOP/s", about)
    assert head.split() == ["step", "network", "s/step", "(quartiles)", "images/s", "TFLOP/s", "of", "peak", "GB"]
    assert [row.split()[0] for row in rows] == ["forward", "train", "sample"]
    for row in rows:
        seconds, low, high, images, tflops, share, memory = map(float, re.findall(r"[\d.]+\d", row[37:]))
        assert 0 < low <= seconds <= high < 60 and images == pytest.approx(3 / seconds, rel=0.2) and memory > 0
        assert share == pytest.approx(100 * tflops, abs=0.15)


def test_rows_are_medians_and_quartiles_of_turns_that_alternate(monkeypatch):
    o = bench.read_options([*TINY, "--rounds=5", "--batch=2", "--seconds=9"])
    sides, order = stub(monkeypatch, {"a": [3.0, 1.0, 4.0, 2.0, 5.0], "b": [6.0, 2.0, 4.0, 6.0, 10.0]})
    a, b = bench.measure(sides, "train", o, CPU)
    assert order[2 * bench.WARMUP:] == ["a", "b"] * 5
    assert (a["low"], a["seconds"], a["high"]) == (2, 3, 4) and (a["least"], a["ratio"], a["most"]) == (2, 2, 2)
    assert a["images"] == 2 / 3 and a["tflops"] == pytest.approx(2 * 3 * 1e-3 / 3)
    assert (b["seconds"], b["ratio"]) == (6, 1)
    short, _ = stub(monkeypatch, {"a": [1.0] * 9})
    assert bench.measure(short, "train", bench.replace(o, seconds=0.0), CPU)[0]["high"] == 1     # at least a few turns


def test_every_weight_has_an_effect_and_is_trained():
    """No layer is zero when timed, and the timed step trains: it moves every weight."""
    o = bench.read_options([*TINY, *CLASSES])
    ours = bench.ours(o, bench.make_inputs(o, CPU), "float32", compiled=False)
    before = {k: p.detach().clone() for k, p in ours.net.named_parameters()}
    assert all(p.any() for layer in ours.net.zero_init_layers() for p in layer.parameters())
    ours.steps["train"]()
    assert all((p != before[k]).any() for k, p in ours.net.named_parameters())
    assert all(p.grad is None for p in ours.net.parameters())


@pytest.mark.parametrize("arch, twin", [("mpdit", "dit"), ("mpmmdit", "mmdit")])
def test_the_plain_twin_has_the_same_sizes_and_its_own_optimizer(arch, twin, monkeypatch):
    flags = [f"--model.arch={arch}", "--forced_weight_norm=true", "--lr_mp=0.01", "--against=plain"]
    o, built = bench.read_options([*TINY, *CLASSES, *flags]), []
    monkeypatch.setattr(bench, "ours", lambda cfg, *rest: built.append(cfg) or cfg.model.arch)
    assert bench.implementations(o, bench.make_inputs(o, CPU)) == [twin, arch]     # the last is the reference
    plain, cfg = built
    assert (plain.model.arch, plain.forced_weight_norm, plain.lr_mp) == (twin, False, 0)
    assert cfg.forced_weight_norm and cfg.lr_mp
    assert plain.model == bench.replace(cfg.model, arch=twin)


def test_plain_and_preserving_networks_are_timed(quick, capsys):
    bench.main([*TINY, *CLASSES, "--model.arch=mpdit", "--forced_weight_norm=true", "--parts=train", "--against=plain"])
    _, head, plain, preserving = capsys.readouterr().out.splitlines()
    assert head.endswith("times as fast as mpdit, float32") and preserving.endswith(" 1.000 (1.000 .. 1.000)")
    assert plain.split()[:2] == ["train", "dit,"] and preserving.split()[:2] == ["train", "mpdit,"]


def test_compile_compiles_every_block(monkeypatch):
    compiled = []
    monkeypatch.setattr(model.DiTBlock, "compile", lambda block, fullgraph: compiled.append(block))
    for choice in ("off", "auto", "on"):
        o = bench.read_options([*TINY, *CLASSES, f"--compile={choice}"])
        side, = bench.implementations(o, bench.make_inputs(o, CPU))
    assert len(compiled) == 2 and side.name == "dit, float32, compiled"


# ---------------------------------------------------------------- comparisons

@pytest.mark.slow
def test_against_diffusers(quick, capsys):
    pytest.importorskip("diffusers", reason="the other implementation: pip install diffusers")
    bench.main([*TINY, *CLASSES, "--dtype=float32", "--against=diffusers"])
    lines = capsys.readouterr().out.splitlines()
    assert [tuple(line.split()[:2]) for line in lines[2:]] == [
        (part, name) for part in bench.PASSES for name in ("dit,", "diffusers")]


@pytest.fixture
def fake_diffusers(monkeypatch):
    """diffusers in miniature; it returns a function that sets the scale of its output."""
    monkeypatch.setattr(bench, "optional_import", lambda *names, part: NoEMA)
    return lambda scale: monkeypatch.setattr(bench, "diffusers_dit", lambda m: Theirs(m, scale))


def test_ours_is_compared_in_fp32_and_as_shipped(monkeypatch, fake_diffusers):
    fake_diffusers(1.0)
    monkeypatch.setattr(model.DiTBlock, "compile", lambda block, fullgraph: None)
    o = bench.read_options([*TINY, *CLASSES, "--against=diffusers", "--compile=on", "--dtype=bfloat16"])
    sides = bench.implementations(o, bench.make_inputs(o, CPU))
    assert [side.name for side in sides] == ["dit, float32", "dit, bfloat16, compiled", "diffusers"]
    assert [side.matmul for side in sides] == ["highest", "medium", "highest"]
    assert all(row["ratio"] > 0 for row in bench.measure([sides[0], sides[-1]], "train", o, CPU))


def test_a_network_that_computes_something_else_is_not_timed(fake_diffusers):
    fake_diffusers(1.001)
    with pytest.raises(UserError, match="differ in forward by 0.001"):
        bench.main([*TINY, *CLASSES, "--against=diffusers", "--dtype=float32"])


# ---------------------------------------------------------------- options

def test_a_published_size():
    o = bench.read_options(["--size=DiT-S/2", "--batch", "8", "--lr", "1e-4"])
    m = o.model
    assert (m.arch, m.width, m.depth, m.patch, m.channels, m.classes) == ("dit", 384, 12, 2, 4, 1000)
    assert o.batch == 8 and o.lr == 1e-4


def test_the_config_file_says_the_rest():
    o = bench.read_options(["--lr=5e-4", "--config=configs/shapes.py", "--model.depth=3"])
    cfg = bench.load("configs/shapes.py")
    assert (o.lr, o.model.depth, o.model.width) == (5e-4, 3, cfg.model.width)
    assert (o.steps, o.batch) == (cfg.steps, cfg.microbatch)
    assert o.model.text_dim > 0 and o.model.text_length > 0


def test_help_names_all_options(capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["--help"])
    assert not end.value.code
    printed = capsys.readouterr().out
    assert all(f"--{key}" in printed for key in ("against", "parts", "lr", "model.depth", "config"))


@pytest.mark.parametrize("flag, message", [
    ("--parts=forward+dance", "'dance'"), ("--size=DiT-S", "DiT-S/2"), ("--size=CNN-S/2", "dit, mmdit"),
    ("--against=keras", "keras"), ("--against=plain", "mp architecture"), ("--against=diffusers", "--size=DiT-S/2"),
    ("--batch=-1", "batch=-1"), ("--compile=maybe", "maybe"),
    ("--model.patch=5", "patch=5"), ("--depht=3", "--model.depth")])
def test_options_that_cannot_be_timed(flag, message):
    with pytest.raises(UserError, match=message):
        bench.read_options([flag])


def test_against_an_official_checkout(monkeypatch, tmp_path):
    """Ours meets it in fp32 and as shipped, here compiled in bfloat16; it gets our weights."""
    monkeypatch.setattr(model.DiTBlock, "compile", lambda block, fullgraph: None)
    (tmp_path / "models.py").write_text(OFFICIAL.replace("SCALE", "1"))
    o = bench.read_options([*TINY, *CLASSES, f"--official_dit={tmp_path}", "--compile=on", "--dtype=bfloat16"])
    sides = bench.implementations(o, bench.make_inputs(o, CPU))
    assert [side.name for side in sides] == ["dit, float32", "dit, bfloat16, compiled", "official"]
    assert [side.matmul for side in sides] == ["highest", "medium", "highest"]
    assert all(row["ratio"] > 0 for row in bench.measure([sides[0], sides[-1]], "train", o, CPU))


@pytest.mark.parametrize("text, message", [
    (OFFICIAL.replace("SCALE", "1.001"), "differ in forward by 0.001"),
    ("import a_package_that_is_not_there", "its packages: No module named 'a_package_that_is_not_there'"),
    ("", "wants a checkout of the official DiT .*models.py")])
def test_an_official_network_that_is_not_the_same_is_not_timed(text, message, tmp_path):
    if text:
        (tmp_path / "models.py").write_text(text)
    with pytest.raises(UserError, match=message):
        bench.main([*TINY, *CLASSES, f"--official_dit={tmp_path}"])
