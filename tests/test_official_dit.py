"""Published DiT weights: loaded by name, equal to the official formulation and to diffusers', or an error."""
import argparse
import io
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import model
from baselines import official_dit
from baselines.official_dit import as_run, load_official_dit
from conditioning import NULL_LABEL, Condition
from config import SIZES, ModelConfig, UserError, from_json
from runtime import checkpoint

D, H, DEPTH, P, C, SIDE, CLASSES = 48, 3, 2, 2, 4, 10, 7


def weights(learned=True):
    """A state dict in the official layout with every number random; no two sizes are equal."""
    g = torch.Generator().manual_seed(5)
    rows = P * P * C * (1 + learned)
    shapes = {"x_embedder.proj": (D, C, P, P), "t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D),
              "final_layer.linear": (rows, D), "final_layer.adaLN_modulation.1": (2 * D, D)}
    for k in range(DEPTH):
        shapes |= {f"blocks.{k}.attn.qkv": (3 * D, D), f"blocks.{k}.attn.proj": (D, D),
                   f"blocks.{k}.mlp.fc1": (4 * D, D), f"blocks.{k}.mlp.fc2": (D, 4 * D),
                   f"blocks.{k}.adaLN_modulation.1": (6 * D, D)}
    state = {"pos_embed": positions(SIDE // P)}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = 0.15 * torch.randn(shape, generator=g)
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=g)
    state["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, D, generator=g)
    return state


def positions(grid):
    """The table of the official code, from its definition: columns first, frequencies 10000^(-k / (D/4))."""
    table = torch.zeros(1, grid * grid, D, dtype=torch.float64)
    for n in range(grid * grid):
        for half, place in enumerate((n % grid, n // grid)):
            for k in range(D // 4):
                angle = torch.tensor(place / 10000 ** (k / (D // 4)), dtype=torch.float64)
                table[0, n, half * D // 2 + k] = angle.sin()
                table[0, n, half * D // 2 + D // 4 + k] = angle.cos()
    return table.float()


def stand_in(w, x, t, y):
    """The official forward pass in plain functions, one step a line; returns all 2C channels."""
    lin = lambda name, v: v @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    ln = lambda v: (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    f = 10000 ** (-torch.arange(128) / 128)
    wave = torch.cat([torch.cos(t[:, None] * f), torch.sin(t[:, None] * f)], 1)
    c = lin("t_embedder.mlp.2", F.silu(lin("t_embedder.mlp.0", wave))) + w["y_embedder.embedding_table.weight"][y]
    tokens = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=P)
    v = tokens.flatten(2).transpose(1, 2) + w["pos_embed"]
    for k in range(DEPTH):
        b = f"blocks.{k}"
        s_a, m_a, g_a, s_m, m_m, g_m = (u[:, None] for u in lin(f"{b}.adaLN_modulation.1", F.silu(c)).split(D, 1))
        q, key, val = lin(f"{b}.attn.qkv", ln(v) * (1 + m_a) + s_a).split(D, 2)
        heads = []
        for j in range(H):
            here = slice(j * D // H, (j + 1) * D // H)
            score = q[..., here] @ key[..., here].transpose(1, 2) / (D // H) ** 0.5
            heads.append(score.softmax(-1) @ val[..., here])
        v = v + g_a * lin(f"{b}.attn.proj", torch.cat(heads, -1))
        hidden = lin(f"{b}.mlp.fc1", ln(v) * (1 + m_m) + s_m)
        v = v + g_m * lin(f"{b}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
    shift, scale = (u[:, None] for u in lin("final_layer.adaLN_modulation.1", F.silu(c)).split(D, 1))
    out = lin("final_layer.linear", ln(v) * (1 + scale) + shift)                # (B, N, P P O)
    B, n, O = len(x), SIDE // P, out.shape[-1] // P ** 2
    image = torch.zeros(B, O, SIDE, SIDE)
    for row in range(SIDE):
        for col in range(SIDE):
            patch = out[:, row // P * n + col // P].reshape(B, P, P, O)
            image[:, :, row, col] = patch[:, row % P, col % P]
    return image


def inputs():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(5, C, SIDE, SIDE, generator=g)
    return x, torch.tensor([0.0, 1, 250, 998, 999]), torch.tensor([0, 3, 6, CLASSES, 1])


# ---------------------------------------------------------------- the same function

@pytest.mark.parametrize("learned", [True, False])
@torch.no_grad()
def test_eps_is_that_of_the_official_formulation(learned, tmp_path):
    torch.save(weights(learned), tmp_path / "DiT.pt")
    net, cfg = load_official_dit(tmp_path / "DiT.pt", heads=H)
    assert (cfg.width, cfg.depth, cfg.heads, cfg.patch, cfg.channels, cfg.resolution, cfg.classes) == (
        D, DEPTH, H, P, C, SIDE, CLASSES)
    assert (cfg.arch, cfg.schedule, cfg.sigma_scale, cfg.timesteps, cfg.positions) == ("dit", "linear", 1, 1000, "grid")
    x, t, y = inputs()
    ours = net(x, t, Condition(label=torch.where(y == CLASSES, NULL_LABEL, y)))
    theirs = stand_in(weights(learned), x, t, y)
    assert theirs.shape[1] == C * (1 + learned) and ours.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs[:, :C], atol=5e-4, rtol=1e-3)   # angles up to 999 in fp32


def folder_of_diffusers(path, learned):
    """A pipeline folder that diffusers saved, and its transformer with the official frequencies of time."""
    from diffusers import DiTTransformer2DModel
    torch.manual_seed(4)
    other = DiTTransformer2DModel(
        num_layers=DEPTH, num_attention_heads=H, attention_head_dim=D // H, in_channels=C, norm_eps=1e-6,
        out_channels=C * (1 + learned), sample_size=SIDE, patch_size=P, num_embeds_ada_norm=CLASSES)
    for p in other.parameters():
        torch.nn.init.normal_(p, std=0.15)
    first = other.transformer_blocks[0].norm1.emb.state_dict()
    for block in other.transformer_blocks:                  # as it converts the published file
        block.norm1.emb.load_state_dict(first)
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    other.save_pretrained(path / "transformer")
    names = {str(k): f"animal {k}" for k in range(CLASSES)}
    (path / "model_index.json").write_text(json.dumps({"id2label": names}), encoding="utf-8")
    return other.eval()


@pytest.mark.slow
@torch.no_grad()
def test_a_folder_of_diffusers_gives_the_same_eps(tmp_path):
    pytest.importorskip("diffusers")
    other = folder_of_diffusers(tmp_path, True)
    x, t, y = inputs()
    theirs = other(x, t, y).sample
    for path in (tmp_path, tmp_path / "transformer"):
        net, cfg = load_official_dit(path)
        assert (cfg.heads, cfg.resolution, cfg.classes) == (H, SIDE, CLASSES)
        ours = net(x, t, Condition(label=torch.where(y == CLASSES, NULL_LABEL, y)))
        assert ours.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs[:, :C], atol=1e-4, rtol=1e-4)
        assert json.loads(as_run(path, cfg)[1]["classes"])[3] == "animal 3"
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = official_dit.read_tensors(file)
    torch.save(tensors, file.with_suffix(".bin"))
    file.unlink()
    again, _ = load_official_dit(tmp_path)
    assert all(torch.equal(v, again.state_dict()[name]) for name, v in net.state_dict().items())


def test_the_published_sizes_need_no_heads():
    """Width and depth of every DiT in the paper's table 1; shapes alone, no memory."""
    for name in ("S", "B", "L", "XL"):
        size = SIZES[name]
        with torch.device("meta"):
            net = model.build(ModelConfig(arch="dit", semantics="class", classes=1000, resolution=32, channels=4,
                                          patch=2, schedule="linear", **size))
        state = {**net.state_dict(), "pos_embed": torch.empty(1, 256, size["width"], device="meta")}
        assert official_dit.infer(state, 0, 0, "DiT") == net.cfg


# ---------------------------------------------------------------- errors

def broken(change):
    state = weights()
    change(state)
    return state


def without(*names):
    return lambda w: [w.pop(name) for name in names]


@pytest.mark.parametrize("state, words", [
    (broken(without("blocks.1.attn.qkv.bias")), "1 missing, 0 unexpected.*blocks.1.attn.qkv.bias"),
    (broken(without("y_embedder.embedding_table.weight")), "another architecture.*no 'y_embedder"),
    (broken(lambda w: w.update({"blocks.0.cross_attn.proj.weight": w["pos_embed"]})), "1 unexpected.*blocks.0.cross"),
    (broken(lambda w: w.update(pos_embed=w["pos_embed"].flip(1))), "positions"),
    (broken(lambda w: w.update(pos_embed=w["pos_embed"][:, :-1])), "positions"),
    (broken(without("pos_embed")), "no 'pos_embed'"),
    (broken(lambda w: w.update({"final_layer.linear.weight": torch.zeros(P * P * 3 * C, D)})), "of another shape"),
    ({"ema": weights(), "opt": {}}, "`ema` alone"),
    ({"ema": weights(), "args": argparse.Namespace(model="DiT-XL/2")}, "`ema` alone"),
    ([torch.zeros(2)], "cannot read .* as a state dict")])
def test_another_architecture_is_an_error(state, words, tmp_path):
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(UserError, match=words):
        load_official_dit(tmp_path / "file.pt", heads=H)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x80\x02}q\x00."])
def test_a_file_that_is_no_checkpoint_is_an_error(content, tmp_path):
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load_official_dit(tmp_path / name)
    with pytest.raises(UserError, match="cannot read .*none.pt"):
        load_official_dit(tmp_path / "none.pt")


class Bomb:
    def __reduce__(self):
        return print, ("this ran",)


def test_loading_runs_no_code(tmp_path, capsys):
    torch.save({"x_embedder.proj.weight": Bomb()}, tmp_path / "bad.pt")
    with pytest.raises(UserError):
        load_official_dit(tmp_path / "bad.pt")
    assert "this ran" not in capsys.readouterr().out


def test_unknown_heads_are_an_error(tmp_path):
    torch.save(weights(), tmp_path / "small.pt")
    for heads in (0, 5):
        with pytest.raises(UserError, match="width 48 and depth 2.*pass heads"):
            load_official_dit(tmp_path / "small.pt", heads)


@pytest.mark.parametrize("about, words", [
    ("{", "config.json"), ("[]", "config.json"), ('{"_class_name": "UNet2DModel"}', "config.json"),
    ('{"_class_name": "Transformer2DModel", "norm_type": "layer_norm", "num_attention_heads": 3, "sample_size": 10}',
     "layer_norm"),
    ('{"_class_name": "DiTTransformer2DModel", "num_attention_heads": null, "sample_size": 10}', "config.json"),
    ('{"_class_name": "DiTTransformer2DModel", "num_attention_heads": 3, "sample_size": 10}', "cannot read")])
def test_a_folder_of_another_kind_is_an_error(about, words, tmp_path):
    (tmp_path / "config.json").write_text(about, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        load_official_dit(tmp_path)


def test_embeddings_that_differ_between_blocks_are_an_error(tmp_path):
    """Every block of diffusers' has a copy of the class table; ours has one."""
    names = [f"transformer_blocks.{k}.norm1.emb.class_embedder.embedding_table.weight" for k in range(2)]
    about = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 3, "sample_size": 10}
    (tmp_path / "config.json").write_text(json.dumps(about), encoding="utf-8")
    save_file({name: torch.full((8, D), float(k)) for k, name in enumerate(names)},
              tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="transformer_blocks.1.norm1.* differs"):
        load_official_dit(tmp_path)


# ---------------------------------------------------------------- as a run

def test_converted_weights_are_a_run_folder(tmp_path, capsys):
    torch.save(weights(), tmp_path / "DiT.pt")
    command = [f"--pretrained={tmp_path / 'DiT.pt'}", f"--out={tmp_path / 'run'}", f"--heads={H}"]
    official_dit.main(command)
    assert "2 blocks" in capsys.readouterr().out
    net, cfg = model.load(tmp_path / "run")
    header = checkpoint.read_header(tmp_path / "run" / "weights.safetensors")
    assert json.loads(header["classes"]) == [str(k) for k in range(CLASSES)] and header["null_class"] == "7"
    assert from_json(header["config"]) == cfg and cfg.guidance == 4.0
    x, t, y = inputs()
    theirs = stand_in(weights(), x, t, y)[:, :C]
    ours = net(x, t, Condition(label=torch.where(y == CLASSES, NULL_LABEL, y)))
    torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=1e-3)   # angles up to 999 in fp32
    with pytest.raises(UserError, match="has weights already"):
        official_dit.main(command)


def test_the_hash_of_a_run_is_of_the_file(tmp_path):
    torch.save(weights(), tmp_path / "a.pt")
    _, cfg = load_official_dit(tmp_path / "a.pt", H)
    first = as_run(tmp_path / "a.pt", cfg)[1]["sha256"]
    assert first == as_run(tmp_path / "a.pt", cfg)[1]["sha256"]
    file = io.BytesIO()
    torch.save(broken(lambda w: w["pos_embed"].add_(1e-6)), file)
    (tmp_path / "a.pt").write_bytes(file.getvalue())
    assert first != as_run(tmp_path / "a.pt", cfg)[1]["sha256"]
