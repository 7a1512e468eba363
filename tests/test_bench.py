"""The benchmark's printed numbers, its comparisons, and the FLOP formula against a counter."""
import dataclasses
import math
import statistics

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import blocks
import model
from conditioning import Condition
from config import SIZES, ModelConfig, UserError

TINY = ["--model.width=24", "--model.depth=2", "--model.heads=2", "--model.resolution=8", "--threads=1"]
CLASSES = ["--model.arch=dit", "--model.semantics=class", "--model.classes=5"]
FEW = ["--rounds=3", "--seconds=0.01", "--batch=3"]

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


@pytest.fixture(autouse=True)
def keep_globals():
    """bench sets the number of threads and the fp32 precision of the process."""
    threads, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul)


def side(name, seconds):
    """An implementation that takes so long by each clock, for tests that stub the clocks."""
    return bench.Side(name, torch.nn.Identity(), {"train": seconds}, "highest")


# ---------------------------------------------------------------- speeds

@pytest.mark.parametrize("more", [["--model.controls=crop+flip+size"], [*CLASSES, "--dtype=float32"]])
def test_speeds_of_a_tiny_model(more, capsys):
    rows = bench.main([*TINY, *FEW, *more])
    printed = capsys.readouterr().out
    assert [row["what"] for row in rows] == ["forward", "train", "sample"]
    for word in ("GFLOP an image", "matmul peak", "images/s", "of peak", "GB", "forward", "train", "sample"):
        assert word in printed
    cfg = bench.read_options([*TINY, *FEW, *more])[1]
    for row in rows:
        assert 0 < row["low"] <= row["seconds"] <= row["high"] < 60
        assert row["images"] == pytest.approx(3 / row["seconds"])
        work = bench.PASSES[row["what"]] * model.flops(cfg.model)
        assert row["tflops"] * 1e12 == pytest.approx(work * row["images"])
        assert 0 < row["share"] < 1 and row["memory"] > 0


def test_median_and_quartiles_of_the_turns(monkeypatch):
    o, cfg = bench.read_options([*TINY, "--rounds=5", "--batch=2"])
    walls = iter([9.0] * bench.WARMUP + [3.0, 1.0, 4.0, 2.0, 5.0])
    monkeypatch.setattr(bench, "turn", lambda side, what, device: (0.0, next(walls)))
    row = bench.measure(side("ours", None), "train", o, cfg, torch.device("cpu"), peak=1e6)
    assert (row["low"], row["seconds"], row["high"]) == (2.0, 3.0, 4.0)
    assert row["share"] == pytest.approx(2 * 3 * model.flops(cfg.model) / 3.0 / 1e6)


def test_every_weight_is_felt_and_trained():
    """No layer is zero when timed, and the timed step is one of training: it moves every weight."""
    o, cfg = bench.read_options([*TINY, *FEW, *CLASSES])
    ours = bench.ours(cfg, bench.make_inputs(cfg, o.batch, torch.device("cpu")), "float32", compiled=False)
    before = {k: p.detach().clone() for k, p in ours.net.named_parameters()}
    assert all(p.any() for layer in model.zero_layers(ours.net) for p in layer.parameters())
    ours.steps["train"]()
    assert all((p != before[k]).any() for k, p in ours.net.named_parameters())
    assert all(p.grad is None for p in ours.net.parameters())


@pytest.mark.parametrize("arch, twin", [("mpdit", "dit"), ("mpmmdit", "mmdit")])
def test_the_cost_of_preserving_magnitudes_is_over_the_plain_twin(arch, twin, monkeypatch, capsys):
    """Both sides are of the same sizes, each with its own optimizer step; the printed ratio is theirs in that order."""
    built, ours = [], bench.ours
    monkeypatch.setattr(bench, "ours", lambda cfg, *rest: built.append(cfg) or ours(cfg, *rest))
    monkeypatch.setattr(bench, "AGREE", math.inf)
    monkeypatch.setattr(bench, "turn", lambda side, what, device: (3.0, 3.0) if side.name == arch else (2.0, 2.0))
    flags = [f"--model.arch={arch}", "--normalize=true", "--lr_mp=0.01", "--what=forward+train", "--vs=plain"]
    rows = bench.main([*TINY, *FEW, *CLASSES, *flags])
    assert [(row["what"], row["ratio"], row["wall"]) for row in rows] == [("forward", 1.5, 1.5), ("train", 1.5, 1.5)]
    plain, cfg = built
    assert (plain.model.arch, plain.normalize, plain.lr_mp) == (twin, False, 0) and cfg.normalize and cfg.lr_mp
    assert plain.model == dataclasses.replace(cfg.model, arch=twin) and f"{twin} s" in capsys.readouterr().out


def test_compiled_and_not(monkeypatch):
    """--compile=on times every step twice, the second time with every block compiled on its own."""
    compiled = []
    monkeypatch.setattr(blocks.DiTBlock, "compile", lambda block, fullgraph: compiled.append(block))
    rows = bench.main([*TINY, *FEW, *CLASSES, "--compile=on", "--what=forward+train"])
    assert [row["compile"] for row in rows] == ["off", "off", "on", "on"] and len(compiled) == 2


# ---------------------------------------------------------------- comparisons

def test_against_diffusers(monkeypatch, capsys):
    pytest.importorskip("diffusers", reason="the other implementation: pip install diffusers")
    monkeypatch.setattr(bench, "AGREE", math.inf)           # so few turns say nothing about time
    rows = bench.main([*TINY, *FEW, *CLASSES, "--vs=diffusers"])
    assert [r["what"] for r in rows[::2]] == list(bench.PASSES)
    assert {r["precision"] for r in rows[::2]} == {"float32 both"}
    assert len(rows) == 6 and all(0 < r["low"] <= r["ratio"] <= r["high"] and r["turns"] >= 3 for r in rows)
    assert "outputs equal" in capsys.readouterr().out


def test_against_an_official_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "AGREE", math.inf)
    (tmp_path / "models.py").write_text(OFFICIAL.replace("SCALE", "1"))
    rows = bench.main([*TINY, *FEW, *CLASSES, "--what=train", f"--peer={tmp_path}"])
    assert len(rows) == 2 and all(row["ratio"] > 0 for row in rows)


@pytest.mark.parametrize("text, message", [
    (OFFICIAL.replace("SCALE", "1.001"), "differ in forward by 0.001"),
    ("import a_package_that_is_not_there", "pip install a_package_that_is_not_there")])
def test_what_is_not_the_same_is_not_timed(text, message, tmp_path):
    (tmp_path / "models.py").write_text(text)
    with pytest.raises(UserError, match=message):
        bench.main([*TINY, *FEW, *CLASSES, f"--peer={tmp_path}"])


def test_ratios_and_their_refusal(monkeypatch):
    """Ours 1 s, theirs 2 s by both clocks is a ratio of 2; a wall clock that says otherwise is refused."""
    o = bench.Options(rounds=6, batch=1)
    clocks = {"a": (1.0, 1.5), "b": (2.0, 3.0)}
    monkeypatch.setattr(bench, "turn", lambda side, what, device: clocks[side.name])
    row = bench.compare(side("a", None), side("b", None), "train", o, torch.device("cpu"))
    assert (row["ratio"], row["wall"], row["wall_low"], row["wall_high"], row["turns"]) == (2, 2, 2, 2, 6)
    clocks["b"] = (2.0, 3.6)
    with pytest.raises(UserError, match="2.00 by CPU time but 2.40 by wall clock"):
        bench.compare(side("a", None), side("b", None), "train", o, torch.device("cpu"))


def test_turns_alternate(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "turn", lambda side, what, device: seen.append(side.name) or (1.0, 1.0))
    bench.alternate([side("a", None), side("b", None)], "train", bench.Options(rounds=4), torch.device("cpu"))
    assert seen[2 * bench.WARMUP:] == ["a", "b"] * 4


# ---------------------------------------------------------------- options

def test_a_published_size():
    o, cfg = bench.read_options(["--size=DiT-S/2", "--batch", "8", "--lr", "1e-4"])
    m = cfg.model
    assert (m.arch, m.width, m.depth, m.patch, m.channels, m.classes) == ("dit", 384, 12, 2, 4, 1000)
    assert o.batch == 8 and cfg.lr == 1e-4


def test_help_names_the_options_of_both(capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["--help"])
    assert not end.value.code
    printed = capsys.readouterr().out
    assert all(f"--{key}" in printed for key in ("vs", "peer", "what", "lr", "model.depth", "config"))


@pytest.mark.parametrize("flag, message", [
    ("--what=forward+dance", "'dance'"), ("--size=DiT-S", "DiT-S/2"), ("--size=CNN-S/2", "dit, mmdit"),
    ("--vs=keras", "keras"), ("--vs=plain", "mp architecture"), ("--vs=diffusers", "--size=DiT-S/2"),
    ("--rounds=1", "rounds=1"), ("--batch=-1", "batch=-1"), ("--compile=maybe", "maybe"),
    ("--model.patch=5", "patch=5"),
    ("--depht=3", "--model.depth")])
def test_options_that_cannot_be_timed(flag, message):
    with pytest.raises(UserError, match=message):
        bench.read_options([flag])


def test_peer_without_models(tmp_path):
    with pytest.raises(UserError, match="has no models.py"):
        bench.main([*TINY, *FEW, *CLASSES, f"--peer={tmp_path}"])


# ---------------------------------------------------------------- FLOPs

def counted(cfg, h, w, B=1, device="cpu"):
    """FLOPs of one forward pass as torch counts them; only the plain attention kernel is counted on a CPU."""
    with torch.device(device):
        net = model.build(cfg).requires_grad_(False)
        given = {"class": dict(label=torch.zeros(B, dtype=torch.int64)), "none": {},
                 "text": dict(text=torch.zeros(B, cfg.text_length, cfg.text_dim))}[cfg.semantics]
        controls = dict(crop=torch.zeros(B, 2), flip=torch.zeros(B), size=torch.zeros(B, 2),
                        steered=torch.ones(B))
        cond = Condition(**given, **(controls if cfg.controls else {}))
        x, i = torch.zeros(B, cfg.channels, h, w), torch.zeros(B)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            net(x, i, cond)
    return counter.get_total_flops()


@pytest.mark.parametrize("controls", ["", "crop+flip+size"])
@pytest.mark.parametrize("arch, semantics", [
    ("dit", "class"), ("dit", "none"), ("mmdit", "text"), ("mmdit", "class"), ("mmdit", "none")])
@pytest.mark.parametrize("h, w, depth", [(12, 12, 3), (6, 15, 1)])
def test_flops_formula_is_what_torch_counts(arch, semantics, controls, h, w, depth):
    cfg = ModelConfig(arch=arch, semantics=semantics, controls=controls, classes=7, text_dim=11,
                      text_length=5, width=24, depth=depth, heads=2, resolution=12, patch=3, channels=4)
    assert counted(cfg, h, w, B=2) == 2 * model.flops(cfg, h, w)


@pytest.mark.parametrize("size, side, gflop", [
    ("S", 32, 12.1), ("B", 32, 46.0), ("L", 32, 161.4), ("XL", 32, 237.2), ("XL", 64, 1049.1),
    ("XL", 128, 5818)])
def test_flops_of_published_sizes(size, side, gflop):
    """GFLOP of the official networks, counted; these also put out a variance, which costs below 0.1 %."""
    cfg = ModelConfig(arch="dit", semantics="class", classes=1000, resolution=side, channels=4, patch=2,
                      **SIZES[size])
    assert model.flops(cfg) / 1e9 == pytest.approx(gflop, rel=1e-3)
    assert counted(cfg, side, side, device="meta") == model.flops(cfg)
