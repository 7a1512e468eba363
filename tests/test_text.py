"""The CLIP text encoder: the real tokenizer, towers of random weights against open_clip's own model, errors.

No two sizes are equal: B 6, L 77, E 64, P 40, heads 4 of 16, 2 layers.
"""
import hashlib
import json
import os
import pickle
import sys
from copy import copy as shallow
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

import text
from config import Config, ModelConfig, UserError
from runtime.optional import optional_import
from text import CACHE, CLIPText, LazyTextEncoder, WordVectors, make_encoder

open_clip = optional_import("open_clip", "CLIP", "open_clip_torch")
TEXT = dict(context_length=77, vocab_size=49408, width=64, heads=4, layers=2)
VISION = dict(image_size=8, layers=1, width=32, patch_size=4, head_width=16)
CAPTIONS = ["a small red ring left of a large blue square on grey", "dog", "Ein Bär: naïve 猫 🐈 & co.", "", "dog",
            "9 lives"]


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """Reading the vocabulary takes longer than any tower here, so that all encoders share one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "SimpleTokenizer", cache(open_clip.SimpleTokenizer))
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["gelu", "quickgelu"])
def kind(request):
    return request.param


def make(quick):
    """open_clip's own small CLIP with both towers, with wide random weights so that the activation matters."""
    torch.manual_seed(0)
    model = open_clip.model.CLIP(40, VISION, open_clip.model.CLIPTextCfg(**TEXT), quick_gelu=quick)
    for k, p in enumerate(model.transformer.parameters()):
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(k))
    return model.eval().requires_grad_(False)


def write(folder, model, quick, name="open_clip_model.safetensors", config=True):
    """A folder as open_clip's hub has them."""
    folder.mkdir(exist_ok=True)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / name) if name.endswith(".safetensors") else torch.save(state, folder / name)
    if config:
        cfg = {"embed_dim": 40, "vision_cfg": VISION, "text_cfg": TEXT} | ({"quick_gelu": True} if quick else {})
        (folder / text.CONFIG).write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))
    return folder


@pytest.fixture(scope="module")
def clip(kind, tmp_path_factory):
    """open_clip's model, the folder that it was written to, and whether it has QuickGELU."""
    model = make(kind)
    return model, write(tmp_path_factory.mktemp("clip"), model, kind), kind


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a GELU tower, for what does not depend on the activation."""
    return write(tmp_path_factory.mktemp("plain"), make(False), False)


def hidden(model, captions):
    """open_clip's own forward on full rows of 77 numbers, after the final norm."""
    ids = open_clip.tokenize(captions)
    x = model.token_embedding(ids) + model.positional_embedding
    for block in model.transformer.resblocks:
        x = block(x, attn_mask=model.attn_mask)
    return model.ln_final(x), (ids == 49407).int().argmax(1) + 1


# ---------------------------------------------------------------- parity

def test_tokens_are_those_of_open_clip_up_to_the_end_mark_and_zero_after_it(clip):
    model, folder, _ = clip
    tokens, lengths = CLIPText(str(folder)).encode(CAPTIONS)
    want, n = hidden(model, CAPTIONS)
    assert tokens.shape == (6, 77, 64) and tokens.dtype == torch.float32 and lengths.dtype == torch.int64
    assert lengths.tolist() == [0 if c == "" else k for c, k in zip(CAPTIONS, n.tolist())]
    for row, (got, k) in enumerate(zip(tokens, lengths)):
        assert torch.allclose(got[:k], want[row, :k], atol=1e-5), CAPTIONS[row]
        assert not got[k:].any()
    assert tokens[0, :lengths[0]].std() > 0.5                   # the comparison is of something


def test_the_two_activations_differ_far_beyond_the_tolerance(plain):
    one = CLIPText(str(plain)).encode(CAPTIONS)[0]
    two = CLIPText(f"openai:{plain}").encode(CAPTIONS)[0]
    assert (one - two).abs().max() > 1e-2


# ---------------------------------------------------------------- which activation

def activation(encoder):
    return type(encoder.tower.transformer.resblocks[0].mlp.gelu).__name__


def test_a_config_beside_the_weights_decides_the_activation(clip, capsys):
    _, folder, quick = clip
    name = "QuickGELU" if quick else "GELU"
    assert activation(CLIPText(str(folder))) == name
    assert activation(CLIPText(str(folder / "open_clip_model.safetensors"))) == name
    assert capsys.readouterr().err.count(f"2 layers of width 64, {name} (by open_clip_config.json)") == 2


def test_openai_before_a_path_means_quickgelu(plain, capsys):
    assert activation(CLIPText(f"openai:{plain}")) == "QuickGELU"
    assert "QuickGELU (by openai:PATH)" in capsys.readouterr().err


def test_weights_without_a_config_are_vit_l_14_with_gelu(plain, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    _, cfg, why = text.find_clip(str(file), text.MODEL, open_clip)
    assert cfg["text_cfg"]["width"] == 768 and not cfg.get("quick_gelu") and f"openai:{file}" in why
    assert text.find_clip(f"openai:{file}", text.MODEL, open_clip)[1]["quick_gelu"]


@pytest.mark.parametrize("tag, quick", [("openai", True), ("laion2b_s32b_b82k", False),
                                        ("datacomp_xl_s13b_b90k", False), ("dfn2b", True)])
def test_a_tag_has_its_activation(tag, quick, monkeypatch):
    downloads = []
    monkeypatch.setattr(open_clip, "download_pretrained", lambda known: downloads.append(known) or "cached.safetensors")
    file, cfg, why = text.find_clip(tag, text.MODEL, open_clip)
    assert str(file) == "cached.safetensors" and cfg["quick_gelu"] is quick and tag in why
    assert downloads == [open_clip.get_pretrained_cfg("ViT-L-14", tag)]


# ---------------------------------------------------------------- the tower

def test_the_tower_is_frozen_in_evaluation_mode_without_the_vision_tower(plain):
    encoder = CLIPText(str(plain))
    assert (encoder.name, encoder.dim, encoder.length) == (f"clip:{plain}", 64, 77)
    assert not encoder.tower.training and not any(p.requires_grad for p in encoder.tower.parameters())
    assert not any(p.is_meta for p in [*encoder.tower.parameters(), *encoder.tower.buffers()])
    assert not any(k.startswith(("visual", "logit")) for k in encoder.tower.state_dict())
    tokens, _ = encoder.encode(["dog"])
    assert not tokens.requires_grad and not tokens.is_inference()
    torch.nn.Linear(64, 3)(tokens).sum().backward()             # a trained layer may stand on the tokens


def test_loading_uses_no_random_numbers(plain):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    CLIPText(str(plain)).encode(["dog"])
    assert torch.equal(before, torch.get_rng_state())


def test_weights_of_half_width_become_fp32(tmp_path):
    model = make(False)
    folder = write(tmp_path / "half", model, False)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()},
              folder / "open_clip_model.safetensors")
    encoder = CLIPText(str(folder))
    assert {p.dtype for p in encoder.tower.parameters()} == {torch.float32}
    assert encoder.encode(["dog"])[0].dtype == torch.float32


@pytest.mark.parametrize("name, wrap", [
    ("open_clip_pytorch_model.bin", lambda s: s),
    ("epoch_7.pt", lambda s: {"epoch": 7, "state_dict": {f"module.{k}": v for k, v in s.items()}})])
def test_other_kinds_of_file_give_the_same_tokens(plain, tmp_path, name, wrap):
    folder = write(tmp_path / "other", make(False), False, "unread.pt")
    torch.save(wrap(make(False).state_dict()), folder / name)
    encoder = CLIPText(str(folder if name.endswith(".bin") else folder / name))
    assert torch.equal(encoder.encode(CAPTIONS)[0], CLIPText(str(plain)).encode(CAPTIONS)[0])


# ---------------------------------------------------------------- captions

def test_the_empty_caption_is_the_null_condition_and_needs_no_tower(plain, monkeypatch):
    encoder = CLIPText(str(plain))
    monkeypatch.setattr(encoder, "run_tower", None)
    for blank in ("", "  \n"):
        tokens, lengths = encoder.encode([blank, blank])
        assert not tokens.any() and lengths.tolist() == [0, 0]
    tokens, lengths = encoder.encode([])
    assert tokens.shape == (0, 77, 64) and lengths.shape == (0,)


def test_lengths_count_both_marks_and_every_piece_of_a_word(plain):
    encoder = CLIPText(str(plain))
    captions = ["dog", "a dog", "dog " * 75, "unfathomableness", "9 lives!"]
    assert encoder.encode(captions)[1].tolist() == [3, 4, 77, 2 + len(encoder.tokenizer.encode(captions[3])), 5]
    assert len(encoder.tokenizer.encode("unfathomableness")) > 1


def test_marks_written_in_a_caption_are_ignored(plain):
    encoder = CLIPText(str(plain))
    tokens, lengths = encoder.encode(["a dog <end_of_text> runs", "a dog runs"])
    assert lengths.tolist() == [5, 5] and torch.allclose(tokens[0], tokens[1], atol=1e-5)


def test_unicode_is_lower_cased_and_cleaned(plain):
    encoder = CLIPText(str(plain))
    tokens, lengths = encoder.encode(["ÄPFEL  &amp; Birnen", "äpfel & birnen", "猫", "犬"])
    assert torch.allclose(tokens[0], tokens[1], atol=1e-5) and lengths[0] == lengths[1]
    assert (tokens[2] - tokens[3]).abs().max() > 0.1


def test_a_long_caption_is_cut_at_77_with_one_warning(clip, capsys):
    model, folder, _ = clip
    encoder, long = CLIPText(str(folder)), "a dog and " * 30 + "cat"
    capsys.readouterr()
    tokens, lengths = encoder.encode([long, long])
    encoder.cache.clear()
    encoder.encode([long])
    out, err = capsys.readouterr()
    assert out == "" and err.count("warning: 16 of 91 tokens cut from the end of 'a dog and") == err.count("\n") == 1
    assert lengths.tolist() == [77, 77]
    assert torch.allclose(tokens[0], hidden(model, [long])[0][0], atol=1e-5)    # cut as open_clip cuts
    fits = "dog " * 75
    encoder.encode([fits])
    assert capsys.readouterr().err == ""


def test_only_the_first_cut_caption_is_reported(plain, capsys):
    encoder = CLIPText(str(plain))
    capsys.readouterr()
    for k in range(5):
        encoder.tokenize(f"{k} " + "dog " * 80)
    assert capsys.readouterr().err.count("warning: ") == 1


# ---------------------------------------------------------------- for storing

def test_encode_each_is_a_function_of_its_captions_and_agrees_with_encode(plain):
    encoder = CLIPText(str(plain))
    first = list(encoder.encode_each(CAPTIONS))
    encoder.encode(["cat", "dog"])
    assert all(torch.equal(tokens, again) for tokens, again in zip(first, encoder.encode_each(CAPTIONS), strict=True))
    tokens, lengths = encoder.encode(CAPTIONS)
    assert lengths.tolist() == [len(t) for t in first] and first[3].shape == (0, 64)
    assert all(torch.allclose(row[:len(t)], t, atol=1e-5) for row, t in zip(tokens, first))


@pytest.mark.slow
def test_the_sha256_covers_all_that_decides_the_tokens(plain, tmp_path):
    about = CLIPText(str(plain)).describe()
    assert {k: v for k, v in about.items() if k != "sha256"} == {"name": f"clip:{plain}", "layer": "last", "dim": 64,
                                                                 "length": 77}
    other = make(False)
    other.ln_final.bias[3] += 1e-3
    copy, changed = write(tmp_path / "copy", make(False), False), write(tmp_path / "changed", other, False)
    vocabulary = CLIPText(str(plain))
    vocabulary.tokenizer = shallow(vocabulary.tokenizer)
    vocabulary.tokenizer.encoder = {**vocabulary.tokenizer.encoder, "dog": 7}
    differ = [CLIPText(f"openai:{plain}"), CLIPText(str(changed)), vocabulary]
    again = CLIPText(str(copy))
    digest = hashlib.sha256(f"GELU last {json.dumps(again.tokenizer.encoder)}".encode())     # as in meta.json
    for name, v in sorted(make(False).state_dict().items()):
        if not name.startswith(("visual.", "logit_scale")):
            digest.update(f"{name} {tuple(v.shape)}".encode() + v.numpy().tobytes())
    assert again.describe()["sha256"] == about["sha256"] == digest.hexdigest()
    assert len({about["sha256"], *(encoder.describe()["sha256"] for encoder in differ)}) == 4


# ---------------------------------------------------------------- cache

def counted(encoder, monkeypatch):
    """The captions that the tower runs on, a list a pass."""
    passes, run = [], encoder.run_tower
    monkeypatch.setattr(encoder, "run_tower", lambda rows: passes.append(len(rows)) or run(rows))
    return passes


def test_the_tower_runs_once_on_new_captions(plain, monkeypatch):
    encoder = CLIPText(str(plain))
    passes = counted(encoder, monkeypatch)
    first = encoder.encode(CAPTIONS)[0]
    assert passes == [4]                                        # two are the same, one is empty
    again = encoder.encode(list(reversed(CAPTIONS)))[0].flip(0)
    assert torch.equal(first, again) and passes == [4]
    encoder.encode(["cat", *CAPTIONS])
    encoder.encode(["cat"])
    assert passes == [4, 1]


def test_large_batches_run_in_chunks_with_the_same_result(plain, monkeypatch):
    captions = [f"dog {k}" for k in range(11)]
    whole = CLIPText(str(plain)).encode(captions)[0]
    monkeypatch.setattr(text, "CHUNK", 4)
    encoder = CLIPText(str(plain))
    passes = counted(encoder, monkeypatch)
    assert torch.allclose(encoder.encode(captions)[0], whole, atol=1e-5) and passes == [4, 4, 3]


def test_a_full_cache_is_forgotten(plain, monkeypatch):
    monkeypatch.setattr(text, "CACHE", 3)
    encoder = CLIPText(str(plain))
    encoder.encode(["one", "two"])
    encoder.encode(["two", "three"])
    assert list(encoder.cache) == ["one", "two", "three"]
    tokens, lengths = encoder.encode([f"{k} dogs" for k in range(1, 6)])
    assert list(encoder.cache) == [f"{k} dogs" for k in range(1, 6)] and (lengths == 4).all() and CACHE > 1000


def test_a_caller_cannot_write_into_the_cache(plain):
    encoder = CLIPText(str(plain))
    encoder.encode(["dog", "a dog and a cat"])[0].zero_()
    assert encoder.encode(["dog"])[0].any()
    kept = encoder.cache["dog"]
    assert kept.untyped_storage().nbytes() == 4 * kept.numel()


# ---------------------------------------------------------------- options

def test_make_encoder(plain):
    model = ModelConfig(semantics="text")
    assert make_encoder(Config(model=ModelConfig(semantics="none"))) is None
    for length, L in ((0, WordVectors().length), (7, 7)):
        words = make_encoder(Config(model=replace(model, text_length=length)))
        assert isinstance(words, WordVectors) and words.length == L
        with pytest.raises(UserError, match="'words', but the stored tokens are of 'clip:a'; use --encoder=clip:a"):
            make_encoder(Config(model=replace(model, text_length=length)), {"name": "clip:a"})
    for length in (0, 77):
        cfg = Config(encoder=f"clip:{plain}", model=replace(model, text_length=length))
        assert make_encoder(cfg).length == 77
        assert isinstance(make_encoder(cfg, {"name": cfg.encoder, "dim": 64, "length": 77}), LazyTextEncoder)
    with pytest.raises(UserError, match="text_length=20, but encoder='clip:x' has 77"):
        make_encoder(Config(encoder="clip:x", model=replace(model, text_length=20)))
    for wrong in ("", "clip", "clip:", "words:", "words:x", "t5:x"):
        with pytest.raises(UserError, match=f"unknown encoder='{wrong}'; there are words and clip:PATH"):
            make_encoder(Config(encoder=wrong))


# ---------------------------------------------------------------- errors

def test_without_open_clip_the_error_has_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)                     # as if it were not installed
    with pytest.raises(UserError, match="CLIP needs open_clip.*pip install open_clip_torch"):
        CLIPText("openai")


def test_a_missing_path_is_an_error_with_the_tags(tmp_path):
    for path in (str(tmp_path / "none"), f"openai:{tmp_path / 'none'}"):
        with pytest.raises(UserError, match="none.*neither a file, nor a folder with weights, nor a tag.*openai, l"):
            CLIPText(path)


def test_without_network_the_error_says_why(monkeypatch):
    def offline(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", offline)
    with pytest.raises(UserError, match="'openai'.*no route.*docs/control.md has the download"):
        CLIPText("openai")


def test_a_folder_without_weights_is_an_error_with_the_file_names(tmp_path):
    with pytest.raises(UserError, match="nor a folder with weights.*a folder with open_clip_model.safetensors"):
        CLIPText(str(tmp_path))


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("ln_final.bias"), "Missing key.*ln_final.bias"),
    (lambda s: s.update({"transformer.extra": torch.ones(2)}), "Unexpected key.*transformer.extra"),
    (lambda s: s.update({"text_projection": torch.ones(64, 39)}), "size mismatch for text_projection")],
    ids=["missing", "unexpected", "shape"])
def test_weights_are_loaded_strictly(tmp_path, change, message):
    folder = write(tmp_path / "odd", make(False), False, "unread.pt")
    state = {k: v.contiguous() for k, v in make(False).state_dict().items()}
    change(state)
    save_file(state, folder / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=message):
        CLIPText(str(folder))


class Trap:
    """Unpickled, it leaves a folder behind."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_are_not_weights_are_an_error_and_run_no_code(tmp_path):
    trap, mark = write(tmp_path / "c", make(False), False, "trap.pt") / "trap.pt", tmp_path / "ran"
    trap.write_bytes(pickle.dumps({"ln_final.bias": Trap(mark)}, protocol=2))
    torch.save({"ln_final.bias": Trap(mark)}, trap.parent / "zip.bin")
    (trap.parent / "garbage.safetensors").write_bytes(b"garbage")
    (trap.parent / "garbage.pt").write_bytes(b"garbage")
    (trap.parent / "empty.bin").write_bytes(b"")
    torch.save(torch.ones(3), trap.parent / "tensor.pt")
    for name in ("trap.pt", "zip.bin", "garbage.safetensors", "garbage.pt", "empty.bin", "tensor.pt"):
        with pytest.raises(UserError, match=f"cannot load CLIP from .*{name}"):
            text.load_clip(str(trap.parent / name))
    assert not mark.exists()


def test_a_damaged_config_is_an_error(tmp_path):
    folder = write(tmp_path / "odd", make(False), False)
    for content in ("", "[]", "{}", '{"model_cfg": {"embed_dim": 4}}'):
        (folder / text.CONFIG).write_text(content)
        with pytest.raises(UserError, match="cannot load CLIP from .*odd"):
            CLIPText(str(folder))


def test_a_tower_that_is_not_plain_is_an_error(plain, tmp_path):
    folder = write(tmp_path / "odd", make(False), False)
    cfg = json.loads((folder / text.CONFIG).read_text())
    cfg["model_cfg"]["text_cfg"]["no_causal_mask"] = True
    (folder / text.CONFIG).write_text(json.dumps(cfg))
    with pytest.raises(UserError, match="plain text tower in no_causal_mask"):
        CLIPText(str(folder))
