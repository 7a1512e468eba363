"""Options: what the command line, config files and config.json take, and the errors for everything else."""
import dataclasses
import io
import json
import math
import re
from contextlib import redirect_stderr

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.run import get_args_parser

import config
import data
import fid
import sample
import train
from config import Config, ModelConfig, UserError, parse
from experiments import bench, claims
from runtime import checkpoint, distributed

KEYS = [key for key, *_ in config.fields(Config())]
NUMBERS = st.from_regex(r"[-+]?[0-9._]{1,6}(e[-+]?[0-9]{1,3})?", fullmatch=True)
QUIET = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def get(options, key):
    """The value of a field, also one level down."""
    for part in key.split("."):
        options = getattr(options, part)
    return options


def message(words, options=Config()):
    with pytest.raises(UserError) as e:
        parse(words, options)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---------------------------------------------------------------- overrides

@pytest.mark.parametrize("words, key, value", [
    (["--lr=3e-4"], "lr", 3e-4),
    (["--lr", "3e-4"], "lr", 3e-4),
    (["--lr=1"], "lr", 1.0),
    (["--steps=20"], "steps", 20),
    (["--steps=3e3"], "steps", 3000),
    (["--seed=-7"], "seed", -7),
    (["--seed", "-7"], "seed", -7),
    (["--out=a=b"], "out", "a=b"),
    (["--out="], "out", ""),
    (["--log-every=3"], "log_every", 3),
    (["--log_every", "3"], "log_every", 3),
    (["--model.depth=5"], "model.depth", 5),
    (["--model.text-dim", "9"], "model.text_dim", 9),
    (["--steps=1", "--steps=2"], "steps", 2),
])
def test_a_flag_sets_its_field_with_its_type_and_nothing_else(words, key, value):
    changed = parse(words, Config())
    assert get(changed, key) == value and type(get(changed, key)) is type(value)
    assert {k for k in KEYS if get(changed, k) != get(Config(), k)} == {key}


def test_large_whole_numbers_keep_every_digit():
    assert parse([f"--seed={2 ** 62 + 1}"], Config()).seed == 2 ** 62 + 1


def test_no_flags_change_nothing():
    assert parse([], Config()) == Config()


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1.0


@dataclasses.dataclass(frozen=True)
class Switches:
    """Options with a bool."""
    bright: bool = False            # more light
    name: str = ""                  # of the file


@pytest.mark.parametrize("words, bright", [
    (["--bright"], True), (["--bright=true"], True), (["--bright=0"], False), (["--bright=False"], False)])
def test_bool_reads_words_not_truthiness(words, bright):
    assert parse(words + ["--name=x"], Switches()) == Switches(bright, "x")


@QUIET
@given(key=st.sampled_from(KEYS), text=st.text() | NUMBERS)
@example(key="steps", text="9" * 5000)
@example(key="steps", text="1e400")
@example(key="steps", text="nan")
@example(key="steps", text="2.5")
def test_any_text_gives_a_value_of_the_fields_type_or_a_user_error(key, text):
    for words in ([f"--{key}={text}"], [f"--{key}", text]):
        try:
            value = get(parse(words, Config()), key)
        except UserError as e:
            assert f"--{key}" in str(e) and repr(text) in str(e)
        else:
            assert type(value) is config.find_field(Config(), key)[1]
            if type(value) is str:
                assert value == text
            elif not math.isnan(value):
                assert value == float(text)


@QUIET
@given(st.lists(st.text() | st.sampled_from([f"--{k}" for k in KEYS]), max_size=4))
def test_any_words_give_a_config_or_a_user_error(words):
    words = [w for w in words if w not in ("-h", "--help")]
    try:
        assert isinstance(parse(words, Config()), Config)
    except UserError:
        pass


# ---------------------------------------------------------------- messages

@pytest.mark.parametrize("words, parts", [
    (["--warmpu=3"], ["--warmpu", "Config", "--warmup"]),
    (["--model.dept=3"], ["--model.dept", "--model.depth"]),
    (["--depth=3"], ["--depth", "--model.depth"]),
    (["--model=3"], ["--model"]),
    (["--lr.x=3"], ["--lr.x"]),
    (["--zzzzzz=1"], ["--zzzzzz", "out, data", "model.arch"]),
    (["--lr=fast"], ["--lr", "float", "'fast'"]),
    (["--steps=2.5"], ["--steps", "int", "'2.5'"]),
    (["--steps="], ["--steps", "int", "''"]),
    (["--steps"], ["--steps", "int", "--help"]),
    (["steps=3"], ["--key=value", "'steps=3'", "--help"]),
    (["-lr=3"], ["--key=value", "'-lr=3'"]),
])
def test_a_bad_word_is_named_with_what_would_do(words, parts):
    text = message(words)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ModelConfig)])
def test_a_model_field_without_its_prefix_is_named_with_it(name):
    assert f"--model.{name}" in message([f"--{name}=3"])


def test_a_bad_bool_is_named():
    assert "--bright must be bool, got 'maybe'" in message(["--bright=maybe"], Switches())


def test_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


# ---------------------------------------------------------------- ranges

def test_the_default_config_and_every_bound_are_in_range():
    config.check_ranges(Config())
    for key, bounds in config.RANGES.items():
        kind = config.find_field(Config(), key)[1]
        for bound in bounds:
            config.check_ranges(config.put(Config(), key, kind(bound)))


@pytest.mark.parametrize("key", config.RANGES)
def test_a_number_outside_its_range_is_named_with_the_range(key):
    kind, (low, high) = config.find_field(Config(), key)[1], config.RANGES[key]
    step = 1 if kind is int else 1e-3 + 1e-3 * high
    for value in [kind(low - step), kind(high + step)] + [math.nan, math.inf] * (kind is float):
        with pytest.raises(UserError) as e:
            config.check_ranges(config.put(Config(), key, value))
        assert str(e.value).startswith(f"{key}={value} ") and str(low) in str(e.value) and f"{high:g}" in str(e.value)


def test_every_number_of_a_run_but_the_seed_has_a_range():
    numbers = {key for key, kind, *_ in config.fields(Config()) if kind in (int, float) and key[:6] != "model."}
    assert numbers - {"seed"} == set(config.RANGES)


# ---------------------------------------------------------------- help

@pytest.mark.parametrize("options", [Config(), sample.Options()])
def test_help_has_every_field_with_type_default_and_comment(options, capsys):
    with pytest.raises(SystemExit) as e:
        parse(["--help"], options)
    assert e.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    rows = config.fields(options)
    assert len(lines) == 1 + len(rows)
    for line, (key, kind, default, comment) in zip(lines[1:], rows):
        assert comment, f"{key} has no comment"
        want = " +".join(re.escape(part) for part in (f"--{key}={kind.__name__}", repr(default), comment))
        assert re.fullmatch(" +" + want, line)


def test_help_rows_are_the_fields_in_the_order_of_the_source():
    parts = {"model": ModelConfig, "shapes": config.ShapesConfig}
    flat = [f.name for f in dataclasses.fields(Config) if f.name not in parts]
    inner = [f"{part}.{f.name}" for part, kind in parts.items() for f in dataclasses.fields(kind)]
    assert [k for k in KEYS if "." not in k] == flat and [k for k in KEYS if "." in k] == inner


def test_help_shows_present_values_not_those_of_the_source():
    assert re.search(r"--lr=float +0.25 ", config.help_text(dataclasses.replace(Config(), lr=0.25)))


# ---------------------------------------------------------------- files

def write(tmp_path, text):
    path = tmp_path / "run.py"
    path.write_text("from config import Config, ModelConfig\n" + text)
    return str(path)


def test_a_config_file_builds_the_config(tmp_path):
    path = write(tmp_path, "config = Config(lr=1, model=ModelConfig(depth=3))")
    loaded = config.load(path)
    assert loaded == Config(lr=1.0, model=ModelConfig(depth=3)) and type(loaded.lr) is float


def test_the_committed_config_files_load():
    root = config.Path(config.__file__).parent
    found = sorted((root / "configs").glob("*.py"))
    assert found and all(isinstance(config.load(str(path)), Config) for path in found)


@pytest.mark.parametrize("text, parts", [
    ("cfg = Config()", ["config = Config(...)", "NoneType"]),
    ("config = ModelConfig()", ["config = Config(...)", "ModelConfig"]),
    ("config = Config(stepz=3)", ["'stepz'", "--help"]),
    ("config = Config(model=ModelConfig(dept=3))", ["'dept'", "--help"]),
    ("config = Config(lr='fast')", ["lr", "float", "'fast'"]),
    ("config = Config(steps=2.5)", ["steps", "int", "2.5"]),
    ("config = Config(steps=True)", ["steps", "int", "True"]),
    ("config = Config(out=None)", ["out", "str", "None"]),
    ("config = Config(model=ModelConfig(depth='x'))", ["depth", "int", "'x'"]),
    ("config = Config(model=3)", ["model", "ModelConfig", "3"]),
])
def test_a_config_file_with_a_mistake_is_a_user_error(tmp_path, text, parts):
    with pytest.raises(UserError) as e:
        config.load(write(tmp_path, text))
    assert all(part in str(e.value) for part in parts), e.value


def test_a_missing_config_file_is_answered_with_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'configs/tinny.py'.*none"):
        config.load("configs/tinny.py")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text("")
    with pytest.raises(UserError, match="'configs/tinny.py'.*configs/tiny.py"):
        config.load("configs/tinny.py")


# ---------------------------------------------------------------- JSON

def test_json_round_trip_of_a_config_in_which_every_field_is_changed():
    cfg = Config()
    for key, kind, value, _ in config.fields(cfg):
        other = value + "x" if kind is str else not value if kind is bool else value + 1
        cfg = config.put(cfg, key, other)
    assert len(config.differences(Config(), cfg)) == len(KEYS)
    assert config.from_json(config.to_json(cfg)) == cfg


@pytest.mark.parametrize("text", [
    "", "[]", "3", "null", "{}", '{"model": 3}', '{"model": {}, "old": 1}', '{"model": {"old": 1}}',
    '{"model": {}, "lr": "x"}', '{"model": {"depth": 1.5}}'])
def test_json_of_something_else_is_a_user_error(text):
    with pytest.raises(UserError):
        config.from_json(text)


def test_differences_name_key_old_and_new():
    a, b = Config(), parse(["--lr=0.5", "--model.depth=7"], Config())
    assert config.differences(a, a) == []
    assert config.differences(a, b) == [f"model.depth: {a.model.depth} -> 7", f"lr: {a.lr} -> 0.5"]


# ---------------------------------------------------------------- torchrun reads the whole line

def through_torchrun(words):
    with redirect_stderr(io.StringIO()):
        return get_args_parser().parse_args(words)


@pytest.mark.parametrize("key", ["config", *KEYS])
@pytest.mark.parametrize("form", ["{}=1", "{} 1"])
def test_torchrun_passes_every_flag_of_train_on(key, form):
    for name in {key, key.replace("_", "-")}:
        flags = form.format("--" + name).split()
        seen = through_torchrun(["--nproc_per_node=3", "train.py", *flags])
        assert (seen.training_script, seen.training_script_args, seen.nproc_per_node) == ("train.py", flags, "3")


@pytest.mark.parametrize("key", [key for key, *_ in config.fields(sample.Options())])
@pytest.mark.parametrize("form", ["{}=1", "{} 1"])
def test_torchrun_passes_every_flag_of_sample_on_after_two_dashes(key, form):
    flags = form.format("--" + key).split()
    seen = through_torchrun(["--nproc_per_node=3", "--", "sample.py", *flags])
    assert (seen.training_script, seen.training_script_args, seen.nproc_per_node) == ("sample.py", flags, "3")


def test_without_the_two_dashes_torchrun_takes_n_for_its_own():
    with pytest.raises(SystemExit):
        through_torchrun(["--nproc_per_node=3", "sample.py", "--n=5"])


# ---------------------------------------------------------------- old names of options, and those of other projects

def example(options, key):
    """A value of the field that is not its default, and the same as text."""
    kind, value = config.find_field(options, key)[1], get(options, key)
    other = {bool: True, int: 3, float: 0.25, str: "other"}[kind]
    assert other != value
    return other, str(other)


PROGRAMS = {"train": Config(), "sample": sample.Options(), "claims": claims.Options(), "fid": fid.Options(),
            "fid ref": fid.RefOptions(), "data": data.Options(), "bench": bench.Options()}
OF_RUNS = {old: new for old, new in config.RENAMED.items() if new in KEYS}


@pytest.mark.parametrize("old", config.RENAMED)
def test_an_old_name_is_taken_by_the_command_line_with_a_note(old, capsys):
    new, taken = config.RENAMED[old], 0
    for program, options in PROGRAMS.items():
        names = {key for key, *_ in config.fields(options)}
        if new in names and old not in names:
            value, text = example(options, new)
            for words in ([f"--{old}={text}"], [f"--{old.replace('_', '-')}", text])[:1 if value is True else 2]:
                assert parse(words, options) == config.put(options, new, value), program
                assert capsys.readouterr().err == f"note: --{old} is now --{new}\n"
            taken += 1
    assert taken


@pytest.mark.parametrize("old", OF_RUNS)
def test_an_old_name_is_taken_by_a_config_file_with_a_note(old, tmp_path, capsys):
    new = OF_RUNS[old]
    value, _ = example(Config(), new)
    inside = old.removeprefix("model.")
    call = f"Config(seed=7, {old}={value!r})"
    if inside != old:
        call = f"Config(seed=7, model=ModelConfig({inside}={value!r}))"
    for text in (f"config = {call}", f"import dataclasses\nconfig = dataclasses.replace({call}, out='there')"):
        assert getattr(config.load(write(tmp_path, text)), "seed") == 7
        assert get(config.load(write(tmp_path, text)), new) == value
        assert capsys.readouterr().err == 2 * f"note: {old} is now {new}\n"


def test_a_config_file_may_mix_old_and_new_names(tmp_path, capsys):
    text = ("from config import ShapesConfig\nconfig = Config(lam=3, objects=1, shapes=ShapesConfig(layout='grid'), "
            "model=ModelConfig(base=4, depth=3))")
    cfg = config.load(write(tmp_path, text))
    assert cfg == Config(guidance=3.0, shapes=config.ShapesConfig(1, "grid"), model=ModelConfig(pos_base=4, depth=3))
    assert capsys.readouterr().err.count("note: ") == 3
    with pytest.raises(UserError, match="'square'"):        # an old name of another program's option
        config.load(write(tmp_path, "config = Config(square=3)"))


def with_old_names(tree):
    """The tree of a config.json as it was before options got their present names."""
    flat = {key: get(config.from_json(json.dumps(tree)), key) for key in KEYS}
    old = {new: name for name, new in config.RENAMED.items() if name in OF_RUNS}
    flat = {old.get(key, key): value for key, value in flat.items()}
    model = {key.removeprefix("model."): value for key, value in flat.items() if key.startswith("model.")}
    return {"model": model, **{key: value for key, value in flat.items() if "." not in key}}


def test_an_old_config_json_is_read_without_a_note(capsys):
    cfg = Config()
    for new in OF_RUNS.values():
        cfg = config.put(cfg, new, example(cfg, new)[0])
    tree = with_old_names(json.loads(config.to_json(cfg)))
    assert tree["objects"] == 3 and tree["lam"] == 0.25 and tree["model"]["preserve"] == "other"
    assert not {"guidance", "shapes", "microbatch"} & set(tree) and "mp" not in tree["model"]
    assert config.from_json(json.dumps(tree)) == cfg
    assert capsys.readouterr() == ("", "")


def rewrite_with_old_names(out):
    """Give a run folder the names of options that it would have had before they changed, with its hashes."""
    old = with_old_names(json.loads((out / "config.json").read_text()))
    (out / "config.json").write_text(json.dumps(old))
    for path in out.glob("step-*/meta.json"):
        meta = {**json.loads(path.read_text()), "config": old}
        meta.pop("sha256_meta")
        path.write_text(json.dumps({**meta, "sha256_meta": checkpoint._sha256_of({}, meta)}))
    tensors, header = checkpoint.read_weights(out / "weights.safetensors")
    del header["sha256"]
    checkpoint.write_weights(out / "weights.safetensors", tensors, {**header, "config": json.dumps(old)})
    assert '"lam"' in checkpoint.read_header(out / "weights.safetensors")["config"]


def test_a_run_with_old_names_resumes_with_old_and_new_flags_and_is_sampled(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(distributed, "matmul_peak", lambda *_: 1.0)
    monkeypatch.setattr(distributed, "find_device", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(train, "plot", lambda out: "none")
    same = ["--threads=1", "--workers=0", "--batch=4", "--sample_every=0", "--model.semantics=none", "--model.width=16",
            "--model.depth=1", "--model.heads=2", "--model.resolution=8", f"--out={tmp_path}"]
    old = ["--micro=2", "--lam=3", "--drop=0.2", "--ema=0.05", "--clip=2", "--objects=1", "--scenes=grid",
           "--model.noise_steps=50", "--model.rescale=2"]
    new = ["--microbatch=2", "--guidance=3", "--cond_dropout=0.2", "--ema_std=0.05", "--grad_clip=2",
           "--shapes.objects=1", "--shapes.layout=grid", "--model.timesteps=50", "--model.sigma_scale=2"]
    assert train.run([*same, *old, "--steps=2"]) == 0
    for steps, flags in ((4, old), (6, new)):
        rewrite_with_old_names(tmp_path)
        capfd.readouterr()
        assert train.run([*same, *flags, f"--steps={steps}"]) == 0
        text = capfd.readouterr().err
        assert f"from step {steps - 2} " in text and text.count("note: --") == (len(old) if flags is old else 0)
    rewrite_with_old_names(tmp_path)
    assert train.run([*same, *new, "--steps=8", "--seed=1"]) == 2 and "seed: 0 -> 1" in capfd.readouterr().err
    sample.main([f"--out={tmp_path}", "--n=2", "--steps=2", "--threads=1", "--beta=1", "--file=weights.safetensors"])
    text = capfd.readouterr().err
    assert "--beta is now --control_guidance" in text and "--file is now --ema_file" in text
    assert len(list((tmp_path / "samples").glob("*.png"))) == 1
    assert config.from_json(sample.load_run(sample.Options(out=str(tmp_path)), torch.device("cpu")).header["config"]
                            ).guidance == 3.0


@pytest.mark.parametrize("words, part", [
    (["--cfg=3"], "--cfg is --guidance here"), (["--cfg_scale=3"], "--cfg_scale is --guidance here"),
    (["--guidance-scale", "3"], "did you mean --guidance or"), (["--wandb"], "<out>/log.jsonl has every line"),
    (["--resume=out/a"], "the same command again resumes"), (["configs/shapes.py"], "--config=configs/shapes.py"),
    (["--lr=1", "configs/shapes.py"], "--config=configs/shapes.py")])
def test_a_habit_is_an_error_that_names_the_right_option(words, part):
    assert part in message(words)


@pytest.mark.parametrize("key", config.HABITS)
def test_every_habit_has_an_answer(key):
    here, answered = config.HABITS[key], 0
    for options in (Config(), sample.Options()):
        if " " in here or here in {name for name, *_ in config.fields(options)}:
            text = message([f"--{key}=3"], options)
            assert text == (f"--{key} {here}" if " " in here else f"--{key} is --{here} here")
            answered += 1
    assert answered
