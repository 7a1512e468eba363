"""What steers: embeddings of time and control, the weight of detail, positions, guidance, and the condition itself."""
import math
from dataclasses import replace

import pytest
import torch

import conditioning
from conditioning import (CONTROLS, CONTROL_WEIGHTS, NULL_LABEL, PADDINGS, TIME_FEATURES, Condition, ControlEmbedding,
                          LabelEmbedder, concatenate, control_weight, guide, interpolate_2d, make_condition, pad_text,
                          replicate_pad, sincos_2d, timestep_embedding)
from schedule import rescale_alpha_bar, scaled_linear_alpha_bar, to_sigma

B, D, L, E = 5, 24, 7, 11
SIGMA = to_sigma(scaled_linear_alpha_bar())         # (1000,)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def full():
    """A condition with every field."""
    return Condition(label=torch.arange(B), text=normal(B, L, E), crop=normal(B, 2, seed=1) * 9,
                     flip=torch.arange(B) % 2.0, size=normal(B, 2, seed=2) * 99, has_controls=torch.ones(B))


# ---------------------------------------------------------------- time

def test_timestep_embedding_is_cosines_then_sines_of_falling_frequencies():
    x, dim = torch.tensor([0.0, 1.0, 37.5, 999.0]), 10
    e = timestep_embedding(x, dim)
    assert e.shape == (4, dim) and e.dtype == torch.float32
    for k in range(dim // 2):
        angle = x.double() * 10000 ** (-2 * k / dim)
        assert torch.allclose(e[:, k].double(), angle.cos(), atol=2e-4)
        assert torch.allclose(e[:, dim // 2 + k].double(), angle.sin(), atol=2e-4)


def test_timestep_embedding_has_norm_sqrt_half_dim_and_takes_whole_numbers():
    assert torch.allclose(timestep_embedding(torch.arange(1000), 256).norm(dim=1), torch.tensor(math.sqrt(128)))


def test_timestep_embedding_tells_neighbouring_steps_apart():
    e = timestep_embedding(torch.arange(1000), TIME_FEATURES)
    assert torch.pdist(e).min() > 0.5


def test_label_embedder_maps_no_class_to_the_last_row():
    table = LabelEmbedder(4, D)
    rows = table.embedding_table.weight
    assert rows.shape == (5, D)
    assert torch.equal(table(torch.tensor([0, 3, NULL_LABEL])), rows[[0, 3, 4]])


# ---------------------------------------------------------------- the weight of detail

@pytest.mark.parametrize("alpha, half, mean", [(1, 0.5, 0.5), (2, 0.292893, 0.313009), (4, 0.159104, 0.178217),
                                               (8, 0.082996, 0.095610)])
def test_cosine_weight_has_the_published_half_time_and_mean(alpha, half, mean):
    t_half = torch.tensor(1 - 2 ** (-1 / alpha), dtype=torch.float64)
    assert t_half.item() == pytest.approx(half, abs=5e-7)
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    weight = control_weight(t, "cosine", alpha)
    assert control_weight(t_half, "cosine", alpha).item() == pytest.approx(0.5)
    assert torch.trapezoid(weight, t).item() == pytest.approx(mean, abs=1e-6)
    assert torch.allclose(weight, (1 - torch.cos(math.pi * (1 - t) ** alpha)) / 2, atol=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear", "step"])
@pytest.mark.parametrize("alpha", [1, 2, 4, 8])
def test_falling_weights_start_at_one_end_at_exactly_zero_and_fall(kind, alpha):
    weight = control_weight(torch.linspace(0, 1, 1000), kind, alpha, SIGMA)
    assert weight[0] == 1 and weight[-1] == 0 and (weight.diff() <= 0).all() and ((0 <= weight) & (weight <= 1)).all()


@pytest.mark.parametrize("threshold, last", [(1, 353), (2, 562)])
def test_step_ends_at_the_index_where_sigma_passes_the_threshold(threshold, last):
    i = torch.arange(1000)
    weight = control_weight(i / 999, "step", threshold, SIGMA)
    assert weight.dtype == torch.float32 and torch.equal(weight, (i <= last).float())
    assert SIGMA[last] <= threshold < SIGMA[last + 1]


def test_step_takes_any_length_of_table_and_rounds_to_its_index():
    sigma = torch.tensor([0.1, 0.9, 1.0, 3.0])
    t = torch.tensor([0, 0.45, 0.55, 0.82, 0.84, 1.0])      # indices 0, 1, 2, 2, 3, 3
    assert control_weight(t, "step", 1, sigma).tolist() == [1, 1, 1, 1, 0, 0]
    wider = to_sigma(rescale_alpha_bar(scaled_linear_alpha_bar(), 256, 512))
    ends = [int(control_weight(torch.arange(1000) / 999, "step", x, wider).sum()) - 1 for x in (1, 2)]
    assert ends == [169, 353]                               # of a rescaled table, were it given


def test_step_without_its_table_says_so():
    with pytest.raises(ValueError, match="'step'.*sigma"):
        control_weight(torch.zeros(1), "step")


def test_cosine_is_the_default_with_power_eight_and_a_higher_power_opens_later():
    t = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    assert torch.equal(control_weight(t), control_weight(t, "cosine", 8.0))
    for low, high in ((1, 2), (2, 4), (4, 8)):
        assert (control_weight(t, "cosine", high) < control_weight(t, "cosine", low)).all()
    for alpha in (1, 2, 4, 8):
        assert (control_weight(t, "cosine", alpha).diff() < 0).all()


def test_cosine_in_float32_keeps_small_weights():
    t = torch.tensor([0.8], dtype=torch.float64)            # 1 - cos is 0 in float32 here
    exact = torch.sin(math.pi / 2 * (1 - t) ** 8) ** 2
    assert control_weight(t.float()).item() == pytest.approx(exact.item(), rel=1e-4)


def test_other_weights():
    t = torch.tensor([0.0, 0.05, 0.08, 0.09, 0.5, 1.0])
    assert control_weight(t, "uniform").tolist() == [1] * 6
    assert control_weight(t, "zero").tolist() == [0] * 6
    assert torch.equal(control_weight(t, "linear"), 1 - t)


def test_an_unknown_weight_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="'cos'.*" + ", ".join(CONTROL_WEIGHTS)):
        control_weight(torch.zeros(1), "cos")


# ---------------------------------------------------------------- control

def embedding(controls=tuple(CONTROLS), kind="cosine", random=True, alpha=8.0):
    net = ControlEmbedding(controls, D, kind, alpha, SIGMA if kind == "step" else None)
    for k, p in enumerate(net.parameters()):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(k)) if random else None
    return net


@pytest.mark.parametrize("controls, n_high, n_low", [
    (("crop", "flip", "size"), 3, 2), (("flip",), 1, 0), (("size",), 0, 2), (("crop", "size"), 2, 2)])
def test_each_group_is_one_mlp_on_the_sinusoids_of_its_scalars(controls, n_high, n_low):
    count = sum(256 * n * D + D + D * D + D for n in (n_high, n_low) if n)
    net = embedding(controls)
    assert sum(p.numel() for p in net.parameters()) == count
    assert net(full(), torch.rand(B)).shape == (B, D)


def test_parameter_count_of_a_group_of_six_scalars_is_that_of_the_paper(monkeypatch):
    monkeypatch.setitem(conditioning.CONTROLS, "six", conditioning.Control(6, "high"))
    with torch.device("meta"):
        assert sum(p.numel() for p in ControlEmbedding(("six",), 1152, "cosine", 8.0).parameters()) == 3_098_880


def test_at_pure_noise_size_has_no_effect_to_the_last_bit_and_crop_and_flip_do():
    net, one, cond = embedding(), torch.ones(B), full()
    sizes = [net(replace(cond, size=size), one) for size in (torch.zeros(B, 2), cond.size, cond.size * 1e6)]
    assert torch.equal(sizes[0], sizes[1]) and torch.equal(sizes[0], sizes[2])
    assert torch.equal(embedding(("size",))(cond, one), torch.zeros(B, D))
    for other in (replace(cond, flip=1 - cond.flip), replace(cond, crop=cond.crop + 1)):
        assert ((net(other, one) - sizes[0]).abs().amax(1) > 1e-3).all()


def test_size_acts_with_weight_gamma_and_crop_and_flip_with_weight_one():
    net, cond, t = embedding(), full(), torch.tensor([0.0, 0.04, 0.083, 0.2, 1.0])
    high, low = (embedding(tuple(group)) for group in (net.high, net.low))
    high.mlps["high"], low.mlps["low"] = net.mlps["high"], net.mlps["low"]
    e_low = low(cond, torch.zeros(B))                       # gamma(0) = 1
    assert torch.allclose(low(cond, t), control_weight(t)[:, None] * e_low, atol=1e-6)
    assert torch.allclose(net(cond, t), high(cond, t) + control_weight(t)[:, None] * e_low, atol=1e-6)
    assert torch.equal(high(cond, t), high(cond, 1 - t))


@pytest.mark.parametrize("kind, alpha", [("uniform", 8), ("zero", 8), ("linear", 8), ("cosine", 2), ("step", 1),
                                         ("step", 2)])
def test_the_kind_of_weight_and_its_alpha_are_used(kind, alpha):
    cond, t = full(), torch.tensor([0.0, 300, 400, 600, 999]) / 999
    out, whole = (embedding(("size",), k, alpha=alpha)(cond, t) for k in (kind, "uniform"))
    assert torch.allclose(out, control_weight(t, kind, alpha, SIGMA)[:, None] * whole, atol=1e-6)


def test_the_table_of_sigma_moves_with_the_module_and_is_not_saved():
    net = embedding(kind="step")
    assert not [k for k in net.state_dict() if "sigma" in k]
    assert net.to("meta").sigma.is_meta and embedding().sigma is None


def test_dropped_controls_add_exactly_zero():
    net, cond, mask = embedding(), full(), torch.tensor([True, False, True, False, False])
    out = net(cond.drop(controls=mask), torch.rand(B))
    assert (out[mask] == 0).all() and (out[~mask].abs().amax(1) > 0).all()
    assert (net(cond.drop(controls=True), torch.rand(B)) == 0).all()


def test_one_scalar_moves_its_own_sinusoid_only():
    net, cond = embedding(), full()
    before = net.features(cond, net.high).unflatten(1, (3, TIME_FEATURES))      # top, left, flip
    left = torch.stack([cond.crop[:, 0], cond.crop[:, 1] + 1], dim=1)
    after = net.features(replace(cond, crop=left), net.high).unflatten(1, (3, TIME_FEATURES))
    assert (after - before).abs().amax((0, 2)).gt(0).tolist() == [False, True, False]
    assert torch.equal(before[:, 1], timestep_embedding(cond.crop[:, 1], TIME_FEATURES))
    assert torch.equal(before[:, 2], timestep_embedding(cond.flip, TIME_FEATURES))
    size = net.features(cond, net.low).unflatten(1, (2, TIME_FEATURES))
    assert torch.equal(size[:, 0], timestep_embedding(cond.size[:, 0], TIME_FEATURES))


# ---------------------------------------------------------------- short captions

def keyed(seed=0):
    return torch.Generator().manual_seed(seed)


def captions(lengths, room=L, seed=3):
    """Random tokens (len(lengths), room, E), zeros after each end, with a different spread in every channel."""
    lengths = torch.tensor(lengths)
    tokens = normal(len(lengths), room, E, seed=seed) * torch.arange(1, E + 1) + 5
    return torch.where(torch.arange(room)[:, None] < lengths[:, None, None], tokens, 0), lengths


@pytest.mark.parametrize("length", [3, 7, 10, 77])
def test_replication_without_noise_repeats_the_tokens_in_order(length):
    tokens, lengths = captions([1, 2, 5, 7, 0])
    out = replicate_pad(tokens, lengths, length, beta=0)
    assert out.shape == (5, length, E) and out.dtype == torch.float32
    for got, caption, n in zip(out, tokens, lengths.tolist()):
        assert all(torch.equal(got[j], caption[j % n]) if n else not got[j].any() for j in range(length))


def test_what_stands_after_the_end_of_a_caption_is_not_read():
    tokens, lengths = captions([1, 2, 5, 0])
    rubbish = torch.where(torch.arange(L)[:, None] < lengths[:, None, None], tokens, torch.nan)
    for beta in (0, 0.5):
        clean, other = (replicate_pad(x, lengths, 10, beta, keyed()) for x in (tokens, rubbish))
        assert torch.equal(clean, other)
    short = replicate_pad(tokens[:, :5], lengths, 10, 0.5, keyed())
    assert torch.equal(short, replicate_pad(tokens, lengths, 10, 0.5, keyed()))


def test_a_length_beyond_the_tokens_counts_the_tokens():
    tokens, _ = captions([3, 3], room=3)
    out = replicate_pad(tokens, torch.tensor([3, 9]), 8, beta=0)
    assert torch.equal(out[1], tokens[1][torch.arange(8) % 3])


@pytest.mark.parametrize("beta", [0.02, 0.2])
def test_noise_has_the_standard_deviation_of_equation_7_in_every_channel_and_position(beta):
    n, length, copies = 5, 12, 20_000                       # m = ceil(12 / 5) = 3
    tokens, _ = captions([n])
    out = replicate_pad(tokens.expand(copies, -1, -1), torch.full((copies,), n), length, beta, keyed())
    noise = out - tokens[0][torch.arange(length) % n]       # (copies, length, E)
    std = beta * math.sqrt(3 - 1) * tokens[0, :n].std(0, correction=0)          # (E,)
    for j in range(length):                                 # the first n positions too; 5 standard errors
        assert torch.allclose(noise[:, j].std(0), std, rtol=5 / math.sqrt(2 * copies), atol=0), j
        assert (noise[:, j].mean(0).abs() < 5 * std / math.sqrt(copies)).all(), j
    corr = torch.corrcoef((noise / std)[:, [0, 1, n, 2 * n], 0].T)     # every copy gets noise of its own
    assert (corr - torch.eye(4)).abs().max() < 5 / math.sqrt(copies)


@pytest.mark.parametrize("n, m", [(1, 77), (2, 39), (38, 3), (39, 2), (76, 2), (77, 1), (90, 1)])
def test_noise_grows_with_the_number_of_copies_and_a_cut_copy_counts(n, m):
    tokens, lengths = captions([n], room=90)
    clean, noisy = replicate_pad(tokens, lengths, 77, 0), replicate_pad(tokens, lengths, 77, 0.1, keyed())
    eps = torch.randn(1, 77, E, generator=keyed())
    want = 0.1 * math.sqrt(m - 1) * tokens[0, :n].std(0, correction=0) * eps
    assert torch.allclose(noisy - clean, want, rtol=1e-4, atol=2e-5)
    assert ((noisy - clean).abs().max() > 0.1) == (n > 1 and m > 1)


def test_noise_is_a_function_of_the_generator():
    tokens, lengths = captions([2, 5, 3])
    a, b, c = (replicate_pad(tokens, lengths, 10, 0.1, keyed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and (a - c).abs().amax((1, 2)).min() > 0.1
    generator = keyed(1)
    first, second = (replicate_pad(tokens, lengths, 10, 0.1, generator) for _ in range(2))
    assert torch.equal(first, a) and not torch.equal(second, a)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    replicate_pad(tokens, lengths, 10, 0.1, keyed())
    assert torch.equal(before, torch.get_rng_state())


def test_noise_without_a_generator_is_refused_and_replication_needs_none():
    tokens, lengths = captions([2, 5])
    with pytest.raises(ValueError, match="beta=0.02.*generator"):
        replicate_pad(tokens, lengths)
    assert replicate_pad(tokens, lengths, beta=0.0).shape == (2, 77, E)


@pytest.mark.parametrize("beta", [0, 0.1])
def test_a_caption_of_one_token_is_repeated_without_noise_and_an_empty_one_is_zero(beta):
    tokens, lengths = captions([1, 0])
    out = replicate_pad(tokens, lengths, 10, beta, keyed())
    assert torch.equal(out[0], tokens[0, :1].expand(10, -1)) and not out[1].any()
    assert torch.equal(out[1:], Condition(text=out[:1]).drop(semantics=True).text)      # both are the null condition


def test_padding_never_looks_at_a_value_on_the_host():
    tokens, lengths = (v.to("meta") for v in captions([2, 5, 0]))
    assert replicate_pad(tokens, lengths, 10, 0.1, keyed()).shape == (3, 10, E)     # meta tensors have no values


def test_half_precision_tokens_are_padded_in_fp32():
    tokens, lengths = captions([2, 5])
    tokens = tokens.bfloat16()
    out = replicate_pad(tokens, lengths, 10, 0.02, keyed())
    assert out.dtype == torch.float32
    assert torch.equal(out, replicate_pad(tokens.float(), lengths, 10, 0.02, keyed()))


def test_the_three_paddings():
    tokens, lengths = captions([2, 5, 7, 0])
    assert PADDINGS == ("zero", "replicate", "noisy")
    assert pad_text(tokens, lengths, "zero", 0.3, keyed()) is tokens
    assert torch.equal(pad_text(tokens, lengths, "replicate", 0.3), replicate_pad(tokens, lengths, L, 0))
    noisy = pad_text(tokens, lengths, "noisy", 0.3, keyed())
    assert torch.equal(noisy, replicate_pad(tokens, lengths, L, 0.3, keyed())) and noisy.shape == tokens.shape
    assert torch.equal(noisy[2:], tokens[2:]) and not torch.equal(noisy[:2], pad_text(tokens, lengths, "replicate")[:2])


def test_an_unknown_padding_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="'mirror'.*zero, replicate, noisy"):
        pad_text(*captions([2]), "mirror")


# ---------------------------------------------------------------- the condition

def test_drop_semantics_by_mask_and_everywhere():
    cond, mask = full(), torch.tensor([True, False, False, True, False])
    part = cond.drop(semantics=mask)
    assert part.label.tolist() == [NULL_LABEL, 1, 2, NULL_LABEL, 4]
    assert (part.text[mask] == 0).all() and torch.equal(part.text[~mask], cond.text[~mask])
    assert torch.equal(part.has_controls, cond.has_controls) and part.size is cond.size
    gone = cond.drop(semantics=True)
    assert (gone.label == NULL_LABEL).all() and (gone.text == 0).all()


def test_drop_controls_leaves_semantics():
    cond, mask = full(), torch.tensor([True, False, False, True, False])
    part = cond.drop(controls=mask)
    assert part.has_controls.tolist() == [0, 1, 1, 0, 1]
    assert torch.equal(part.label, cond.label) and torch.equal(part.text, cond.text)


def test_drop_of_nothing_changes_nothing_and_of_no_fields_gives_no_fields():
    cond = full()
    kept = cond.drop()
    assert all(torch.equal(getattr(kept, k), getattr(cond, k)) for k in vars(cond))
    assert Condition().drop(semantics=True, controls=True) == Condition()
    assert torch.equal(cond.label, torch.arange(B))         # and the old one is as it was


def test_map_applies_to_what_is_there():
    cond = full().map(lambda v: v[[3, 1]])
    assert cond.label.tolist() == [3, 1] and cond.text.shape == (2, L, E) and cond.has_controls.shape == (2,)
    assert Condition(flip=torch.ones(2)).map(lambda v: v + 1).flip.tolist() == [2, 2]
    assert Condition().map(lambda v: v + 1) == Condition()
    assert full().to(torch.device("meta")).size.device.type == "meta"


def test_concatenate_keeps_order_and_absence():
    cond = full()
    joint = concatenate([cond.map(lambda v: v[:2]), cond.map(lambda v: v[2:])])
    assert all(torch.equal(getattr(joint, k), getattr(cond, k)) for k in vars(cond))
    one, two = Condition(label=torch.tensor([1])), Condition(label=torch.tensor([2, 3]))
    assert concatenate([one, two]).label.tolist() == [1, 2, 3] and concatenate([one, two]).text is None


@pytest.mark.parametrize("semantics, controls, there", [
    ("none", (), set()), ("class", (), {"label"}), ("text", (), {"text"}),
    ("text", ("crop", "size"), {"text", "crop", "size", "has_controls"}), ("none", ("flip",), {"flip", "has_controls"})])
def test_a_condition_has_what_the_model_reads(semantics, controls, there):
    batch = vars(full()) | {"image": torch.zeros(B, 3, 4, 4), "caption": ["a"] * B}
    del batch["has_controls"]
    cond = make_condition(batch, semantics, controls)
    assert {k for k, v in vars(cond).items() if v is not None} == there
    assert all(getattr(cond, k) is batch[k] for k in there - {"has_controls"})
    assert "has_controls" not in there or cond.has_controls.tolist() == [1] * B


def test_captions_of_a_condition_are_padded_by_one_generator_or_one_each():
    text, lengths = captions([2, 5, 7])
    make = lambda *padding: make_condition({"text": text, "lengths": lengths}, "text", (), *padding).text
    assert make("zero", 0.3) is text and torch.equal(make("replicate"), pad_text(text, lengths, "replicate"))
    assert torch.equal(make("noisy", 0.3, keyed()), pad_text(text, lengths, "noisy", 0.3, keyed()))
    each = lambda seeds: make("noisy", 0.3, [torch.Generator().manual_seed(k) for k in seeds])
    one = lambda b: pad_text(text[b:b + 1], lengths[b:b + 1], "noisy", 0.3, torch.Generator().manual_seed(b))
    assert torch.equal(each([0, 1, 2]), torch.cat([one(0), one(1), one(2)]))
    assert not torch.equal(each([5, 1, 2])[0], each([0, 1, 2])[0])
    with pytest.raises(ValueError, match="'mirror'"):
        make("mirror")


# ---------------------------------------------------------------- guidance

@pytest.mark.parametrize("lam", [0.0, 1.0, 1.5, 7.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.375])
def test_guidance_is_the_two_scale_form_and_its_weights_sum_to_one(lam, beta):
    cs, s, null = normal(3, 2, 4, 5, 6).double()
    assert torch.allclose(guide(cs, cs, cs, lam, beta), cs)
    unit = torch.eye(3, dtype=torch.float64)
    weights = guide(*unit, lam, beta)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert torch.allclose(weights, torch.tensor([lam * beta, lam * (1 - beta), 1 - lam], dtype=torch.float64))
    assert torch.allclose(guide(cs, s, null, lam, beta), null + lam * (s - null) + lam * beta * (cs - s))


def test_guidance_at_its_ends():
    cs, s, null = normal(3, 2, 4, 5, 6)
    assert torch.equal(guide(cs, s, null, 1, 1), cs) and torch.equal(guide(cs, s, null, 1, 0), s)
    assert torch.equal(guide(cs, s, null, 0, 0.3), null)
    assert torch.allclose(guide(cs, s, null, 3, 1), null + 3 * (cs - null), atol=1e-6)     # classifier-free guidance
    assert torch.allclose(guide(cs, s, null, 3, 0), null + 3 * (s - null), atol=1e-6)


# ---------------------------------------------------------------- position

@pytest.mark.parametrize("base", [None, 6])
def test_positions_are_sines_and_cosines_of_column_then_row(base):
    h, w, dim = 3, 5, 16
    table = sincos_2d(h, w, dim, base)
    assert table.shape == (h * w, dim) and table.dtype == torch.float32
    for n in range(h * w):
        row, column = divmod(n, w)
        if base is not None:
            row, column = row * base / (h - 1), column * base / (w - 1)
        angles = [[x / 10000 ** (4 * k / dim) for k in range(dim // 4)] for x in (column, row)]
        want = [f(a) for side in angles for f in (math.sin, math.cos) for a in side]
        assert torch.allclose(table[n], torch.tensor(want), atol=1e-6), n


def test_positions_have_norm_sqrt_half_dim_and_are_all_different():
    for base in (None, 16):
        table = sincos_2d(7, 9, 1152, base)
        assert torch.allclose(table.norm(dim=1), torch.tensor(24.0)) and torch.pdist(table).min() > 0.1


def test_the_first_half_is_the_column_and_the_second_the_row():
    table = sincos_2d(3, 5, 16).unflatten(0, (3, 5))
    assert torch.equal(table[:1, :, :8].expand(3, -1, -1), table[..., :8])
    assert torch.equal(table[:, :1, 8:].expand(-1, 5, -1), table[..., 8:])
    assert not torch.equal(table[0, 0, :8], table[0, 1, :8]) and not torch.equal(table[0, 0, 8:], table[1, 0, 8:])


def test_a_base_extent_gives_every_resolution_the_same_limits():
    coarse, fine = sincos_2d(4, 6, 32, 16), sincos_2d(8, 12, 32, 16)
    assert torch.equal(coarse[0], fine[0]) and torch.equal(coarse[-1], fine[-1])
    assert torch.equal(sincos_2d(17, 17, 32, 16), sincos_2d(17, 17, 32))    # steps of one
    every_second = sincos_2d(5, 9, 32, 16).unflatten(0, (5, 9))[:, ::2]
    assert torch.equal(every_second.flatten(0, 1), sincos_2d(5, 5, 32, 16))


@pytest.mark.parametrize("dim", [2, 6, 9])
def test_a_width_that_positions_cannot_have(dim):
    with pytest.raises(ValueError, match=f"divisible by 4, got {dim}"):
        sincos_2d(2, 3, dim)


# ---------------------------------------------------------------- position, by interpolation

def test_an_interpolated_table_is_shorter_than_a_resampled_one():
    table = interpolate_2d(32, 32, 1152, 16)
    assert table.shape == (1024, 1152) and table.dtype == torch.float32 and table.is_contiguous()
    norm = table.double().norm(dim=1)
    assert norm.mean().item() == pytest.approx(23.886, abs=5e-4) and norm.max() < 24 + 1e-5 and norm.min() < 23.9
    assert torch.allclose(sincos_2d(32, 32, 1152, 16).norm(dim=1), torch.tensor(24.0))


def test_an_interpolated_table_keeps_rows_and_columns_apart_and_its_base_unchanged():
    assert torch.allclose(interpolate_2d(6, 6, 16, 6), sincos_2d(6, 6, 16), atol=1e-6)
    table, base = interpolate_2d(4, 12, 16, 6).unflatten(0, (4, 12)), sincos_2d(6, 6, 16).unflatten(0, (6, 6))
    assert torch.allclose(table[:1, :, :8].expand(4, -1, -1), table[..., :8], atol=1e-6)
    assert torch.allclose(table[:, :1, 8:].expand(-1, 12, -1), table[..., 8:], atol=1e-6)
    assert torch.allclose(table[0, 1, :8], 0.75 * base[0, 0, :8] + 0.25 * base[0, 1, :8], atol=1e-6)   # patch centres
    assert torch.allclose(table[0, -1, :8], base[0, -1, :8], atol=1e-6)
