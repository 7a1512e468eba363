"""Against independent code: DiT against diffusers' with the same weights, DDIM against its scheduler."""
import pytest
import torch

import model
from conditioning import NULL_LABEL, Condition
from baselines.official_dit import from_diffusers
from config import ModelConfig
from experiments import bench
from model import SD3Block
from sample import ddim
from schedule import ddim_indices, scaled_linear_alpha_bar

diffusers = pytest.importorskip("diffusers", reason="the other implementation: pip install diffusers")


# ---------------------------------------------------------------- network

def nets(**size):
    """Ours with every weight random, and diffusers' with the same weights."""
    torch.manual_seed(3)
    net = model.build(ModelConfig(arch="dit", semantics="class", **size)).eval()
    other = bench.diffusers_dit(net.cfg).eval()
    for name, p in other.named_parameters():
        if name.endswith("bias") and ".norm1.emb." not in name:     # those of the embeddings are copies of one another
            torch.nn.init.normal_(p, std=0.1)
    weights = from_diffusers(other.state_dict(), "diffusers")
    net.load_state_dict({k: v for k, v in weights.items() if k != "pos_embed"})
    return net, other


@pytest.mark.parametrize("size", [
    dict(width=32, depth=1, heads=4, resolution=12, patch=4, channels=3, classes=5),
    *(pytest.param(size, marks=pytest.mark.slow) for size in (
        dict(width=48, depth=3, heads=3, resolution=10, patch=2, channels=4, classes=7),
        dict(width=64, depth=2, heads=1, resolution=9, patch=3, channels=2, classes=1000),
        dict(width=384, depth=2, heads=6, resolution=32, patch=4, channels=4, classes=1000)))])
@torch.no_grad()
def test_dit_equals_diffusers(size):
    net, other = nets(**size)
    assert sum(p.numel() for p in net.parameters()) == parameters(other)
    B = 6
    x = torch.randn(B, size["channels"], size["resolution"], size["resolution"])
    i = torch.tensor([0, 1, 10, 500, 998, 999])
    label = torch.randint(size["classes"], (B,))
    label[2] = NULL_LABEL                                   # ours: -1; theirs: the row after the last class
    theirs = other(x, i, torch.where(label == NULL_LABEL, size["classes"], label)).sample
    ours = net(x, i.float(), Condition(label=label))
    assert ours.abs().max() > 0.05                          # every layer is felt
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    labelled = net(x[2:3], i[2:3].float(), Condition(label=torch.tensor([3])))
    assert not torch.allclose(ours[2:3], labelled, atol=1e-4)


def parameters(other):
    """Parameters of diffusers' DiT with the copies of the time and class embedding counted once."""
    return sum(p.numel() for name, p in other.named_parameters()
               if ".norm1.emb." not in name or name.startswith("transformer_blocks.0."))


def test_gradients_equal_diffusers():
    """Gradients of the attention, MLP, modulation and patch weights agree."""
    net, other = nets(width=48, depth=2, heads=3, resolution=10, patch=2, channels=4, classes=7)
    x = torch.randn(5, 4, 10, 10)
    i, label = torch.tensor([0, 20, 300, 700, 999]), torch.tensor([0, 1, 2, 3, 6])
    (net(x, i.float(), Condition(label=label)) - x).square().mean().backward()
    (other(x, i, label).sample - x).square().mean().backward()
    pairs = [(net.x_embedder.proj, other.pos_embed.proj), (net.final_layer.linear, other.proj_out_2)]
    for mine, theirs in zip(net.blocks, other.transformer_blocks):
        pairs += [(mine.mlp.fc1, theirs.ff.net[0].proj), (mine.adaLN_modulation[1], theirs.norm1.linear),
                  (mine.attn.proj, theirs.attn1.to_out[0])]
    for mine, theirs in pairs:
        assert mine.weight.grad.abs().max() > 0
        torch.testing.assert_close(mine.weight.grad, theirs.weight.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("last", [False, True])
@torch.no_grad()
def test_sd3_block_equals_diffusers(last):
    """Their last block besides has a query of context, whose answer it drops, and gives scale before shift."""
    from diffusers.models.attention import JointTransformerBlock
    D, H, B, N, L = 48, 3, 5, 7, 4
    torch.manual_seed(3)
    ours = SD3Block(D, H, last)
    theirs = JointTransformerBlock(D, H, D // H, context_pre_only=last, qk_norm="rms_norm")
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.2)
    theirs.load_state_dict(sd3_weights(ours.state_dict(), last), strict=not last)
    x, ctx, c = torch.randn(B, N, D), torch.randn(B, L, D), torch.randn(B, D)
    ctx_out, out = theirs(x, ctx, c)
    torch.testing.assert_close(ours(x, ctx, c)[0], out, atol=1e-4, rtol=1e-4)
    if not last:
        torch.testing.assert_close(ours(x, ctx, c)[1], ctx_out, atol=1e-4, rtol=1e-4)
    assert (out - x).abs().max() > 0.1


def sd3_weights(state, last):
    """The weights of an SD3Block under the names of diffusers' block."""
    names = {"adaLN_modulation.1": "norm1.linear", "ctx_adaLN_modulation.1": "norm1_context.linear",
             "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
             "ctx_mlp.fc1": "ff_context.net.0.proj", "ctx_mlp.fc2": "ff_context.net.2",
             "attn.proj": "attn.to_out.0", "attn.ctx_proj": "attn.to_add_out",
             "attn.q_norm": "attn.norm_q", "attn.k_norm": "attn.norm_k",
             "attn.ctx_q_norm": "attn.norm_added_q", "attn.ctx_k_norm": "attn.norm_added_k"}
    split = {"attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
             "attn.ctx_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"][last:]}
    found = {}
    for key, v in state.items():
        layer, kind = key.rsplit(".", 1)
        if last and layer == "ctx_adaLN_modulation.1":
            v = v.roll(len(v) // 2, 0)
        targets = split.get(layer) or [names[layer]]
        found |= {f"{name}.{kind}": part for name, part in zip(targets, v.chunk(len(targets)))}
    return found


# ---------------------------------------------------------------- sampler

def scheduler(spacing, steps):
    made = diffusers.DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1 if spacing == "leading" else 0, timestep_spacing=spacing)
    made.alphas_cumprod = scaled_linear_alpha_bar()         # theirs is the same table in fp32
    made.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    made.set_timesteps(steps)
    return made


def test_the_noise_tables_are_equal():
    theirs = diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear").alphas_cumprod
    torch.testing.assert_close(scaled_linear_alpha_bar().float(), theirs, atol=0, rtol=1e-4)


@pytest.mark.parametrize("spacing, steps", [
    ("leading", 20), ("trailing", 20), ("linspace", 20), ("trailing", 7)])
def test_indices_equal_diffusers(spacing, steps):
    assert ddim_indices(1000, steps, spacing).tolist() == scheduler(spacing, steps).timesteps.tolist()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing, steps", [("leading", 20), ("trailing", 20), ("linspace", 1000)])
def test_ddim_equals_diffusers(spacing, steps, eta):
    """Whole trajectories in float64 with the same eps and the same fresh noise, ending at alpha-bar = 1.

    Theirs takes alpha-bar of the next step at i - T // steps whatever the spacing, so linspace is only right
    there when it visits every index."""
    g = torch.Generator().manual_seed(0)
    noise, *fresh = torch.randn(1 + steps, 2, 3, 5, 4, generator=g, dtype=torch.float64)
    denoise = lambda x, i: torch.tanh(x * (1 + i.view(-1, 1, 1, 1) / 500))
    ours = ddim(denoise, noise, scaled_linear_alpha_bar(), steps, eta, spacing, lambda k: fresh[k])
    x, made = noise, scheduler(spacing, steps)
    for k, i in enumerate(made.timesteps):
        x = made.step(denoise(x, i.expand(len(x)).double()), i, x, eta, variance_noise=fresh[k]).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)
