"""The layout of the tree: who imports whom, how long things are, and that prose points at what is there."""
import ast
import importlib
import io
import re
import shlex
import sys
import tokenize
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from config import Config, UserError, load, parse

ROOT = Path(__file__).parent.parent
FILE, FUNCTION, MAIN = 600, 60, 120     # most lines of a file, of a function, of train.main
COLUMNS = 120                           # most characters of a line

# room -> the rooms that it may import; a new file is a new line here
MAY_IMPORT = {
    "config": "", "schedule": "", "layers": "", "mp_layers": "layers", "wording": "", "pictures": "", "magnitudes": "",
    "conditioning": "layers mp_layers",
    "checkpoint": "config", "machine": "config", "captions": "config", "tokens": "config", "cached": "config tokens",
    "log": "checkpoint config machine model", "plot": "checkpoint config log", "ema": "checkpoint config",
    "scenes": "captions config", "shapes": "captions config scenes", "text": "captions config outside tokens",
    "folders": "config pictures wording", "shards": "checkpoint config folders pictures wording",
    "coco": "config folders wording",
    "data": "cached captions coco config folders pictures shapes shards text tokens",
    "outside": "config",
    "autoencoder": "cached config outside",
    "latents": "autoencoder cached checkpoint config data machine skipped tokens",
    "skipped": "checkpoint",
    "unet": "config conditioning", "mdt": "config conditioning", "uvit": "config conditioning",
    "blocks": "layers model", "mp_blocks": "model mp_layers", "trunk": "model", "muon": "optim",
    "official": "checkpoint conditioning config model",
    "model": "checkpoint conditioning config layers mp_layers schedule", "tables": "config model",
    "transfer": "checkpoint config model",
    "optim": "conditioning config log machine mp_layers",
    "wishes": "coco conditioning config data model wording",
    "sample": "autoencoder checkpoint conditioning config data machine model official schedule wishes",
    "show": "autoencoder cached checkpoint conditioning config data fid latents log machine model sample wishes",
    "preflight": "checkpoint conditioning config data log machine model sample schedule transfer",
    "distances": "machine", "inception": "checkpoint config machine", "fid_check": "config distances inception",
    "fid_files": "checkpoint config distances folders pictures sample",
    "perceptual": "autoencoder checkpoint config fid_files inception machine model outside sample text wishes",
    "judge": "captions checkpoint config data distances fid_files machine model perceptual sample scenes shapes wishes",
    "fid": "autoencoder checkpoint config data distances fid_check fid_files inception judge log machine perceptual "
           "sample",
    "mup": "conditioning config model", "probe": "checkpoint conditioning config data machine model schedule",
    "demo": "captions checkpoint config data log machine model plot sample shapes wishes",
    "bench_data": "config data outside", "peers": "conditioning config model outside sample schedule",
    "train": "*", "bench": "* train", "claims": "* train",
}
OUTSIDE = {"torch", "numpy", "PIL", "tqdm", "safetensors"}      # what may be imported at the top of a file
TORCH_ONLY = {"schedule", "conditioning", "layers", "mp_layers"}

ROOMS = {path.stem: path for path in sorted(ROOT.glob("*.py")) if path.stem != "conftest"}
SOURCES = {room: path.read_text(encoding="utf-8") for room, path in ROOMS.items()}
TREES = {room: ast.parse(text) for room, text in SOURCES.items()}
FUNCTIONS = [(room, n) for room, tree in TREES.items() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
TEXTS = sorted([*ROOMS.values(), *(path for folder in ("configs", "tests", "assignments")
                                    for path in ROOT.glob(f"{folder}/**/*.py"))])
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else None

each_room = pytest.mark.parametrize("room", ROOMS)
needs_readme = pytest.mark.skipif(README is None, reason="there is no README.md")


def imported(nodes):
    """First names of what the import statements among `nodes` bring in."""
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


# ---------------------------------------------------------------- who imports whom

@each_room
def test_a_room_imports_only_the_rooms_that_it_may(room):
    assert room in MAY_IMPORT, f"say in MAY_IMPORT what {room}.py may import"
    allowed = set(MAY_IMPORT[room].split())
    if "*" in allowed:
        allowed |= set(ROOMS) - {"train", "bench", "claims", "demo"}
    ours = imported(ast.walk(TREES[room])) & set(ROOMS)
    assert ours <= allowed, f"{room} imports {', '.join(sorted(ours - allowed))}"


def test_imports_go_one_way():
    graph, done = {room: imported(ast.walk(tree)) & set(ROOMS) for room, tree in TREES.items()}, set()
    while ready := [room for room in graph if room not in done and graph[room] <= done]:
        done |= set(ready)
    assert done == set(graph), f"a circle among {', '.join(sorted(set(graph) - done))}"


@each_room
def test_only_five_packages_are_imported_at_the_top_of_a_file(room):
    outside = set() if room == "config" else {"torch"} if room in TORCH_ONLY else OUTSIDE
    inside = {id(n) for node in ast.walk(TREES[room]) if isinstance(node, ast.FunctionDef) for n in ast.walk(node)}
    top = imported([node for node in ast.walk(TREES[room]) if id(node) not in inside])
    extra = top - set(sys.stdlib_module_names) - set(ROOMS) - outside
    assert not extra, f"{room} imports {sorted(extra)}"


@pytest.mark.parametrize("name", ["ddim", "heun", "guided"])
def test_samplers_and_guidance_know_a_callable_and_no_model(name):
    found = [n for room, n in FUNCTIONS if room == "sample" and n.name == name]
    used = {n.id for n in ast.walk(found[0]) if isinstance(n, ast.Name)}
    assert not used & {"model", "data", "checkpoint", "machine", "ema"}
    assert found[0].args.args[0].annotation.id == "Denoise"


# ---------------------------------------------------------------- sizes

@each_room
def test_a_file_can_be_read_in_one_sitting(room):
    assert len(SOURCES[room].splitlines()) <= FILE


def test_a_function_fits_a_screen():
    long = [f"{room}.{n.name}: {n.end_lineno - n.lineno + 1}" for room, n in FUNCTIONS
            if n.end_lineno - n.lineno + 1 > (MAIN if (room, n.name) == ("train", "main") else FUNCTION)]
    assert not long, long


def test_lines_fit_the_page():
    wide = [f"{path.relative_to(ROOT)}:{k}: {len(line)}" for path in TEXTS
            for k, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > COLUMNS]
    assert not wide, wide


def test_no_line_ends_in_blanks_and_no_tabs():
    bad = [f"{path.relative_to(ROOT)}:{k}" for path in TEXTS
           for k, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
           if line != line.rstrip() or "\t" in line]
    assert not bad, bad


# ---------------------------------------------------------------- habits

@each_room
def test_everything_public_says_what_it_is(room):
    tree = TREES[room]
    assert ast.get_docstring(tree), "the file has no docstring"
    nodes = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name != "main"]
    silent = [n.name for n in nodes if n.name[0] != "_" and not ast.get_docstring(n)]
    assert not silent, f"{room}: {silent}"


@each_room
def test_a_file_with_shape_comments_has_a_legend(room):
    if any(re.match(r"# \([A-Z]\b[^)]*,", text) for text in comments(room)):
        assert "Dimensions: " in ast.get_docstring(TREES[room])


@each_room
def test_signatures_are_typed_and_take_no_bags_of_arguments(room):
    mine = [n for where, n in FUNCTIONS if where == room]
    assert not [n.name for n in mine if n.args.kwarg], f"{room}: **kwargs"
    inner = {id(n) for f in mine for n in ast.walk(f) if n is not f and isinstance(n, ast.FunctionDef)}
    outer = [n for n in mine if id(n) not in inner]
    bare = [f"{n.name}({a.arg})" for n in outer for a in n.args.args + n.args.kwonlyargs
            if a.annotation is None and a.arg != "self"]
    bare += [f"{n.name} ->" for n in outer if n.returns is None and n.name != "__init__"]
    assert not bare, f"{room}: {bare}"


def test_there_is_no_drawer_for_odds_and_ends():
    assert not {"utils", "util", "helpers", "common", "misc"} & set(ROOMS)


def test_nothing_is_left_for_later():
    late = [f"{path.name}: {word}" for path in TEXTS if path != Path(__file__) and path.parent.name != "assignments"
            for word in ("TODO", "FIXME", "XXX", "NotImplementedError") if word in path.read_text(encoding="utf-8")]
    assert not late, late


def test_no_function_is_written_twice():
    """Equal but for names, types and docstring, in two rooms."""
    seen = {}
    for room, node in FUNCTIONS:
        text = skeleton(node)
        if text.count("(") >= 30:                           # one-liners may look alike
            seen.setdefault(text, []).append((room, node.name))
    twice = [names for names in seen.values() if len({room for room, _ in names}) > 1]
    assert not twice, twice


def skeleton(node):
    """The body of a function with every name replaced by the place where it first appears."""
    tree, numbers = ast.parse(ast.unparse(node)).body[0], {}
    body = tree.body[1:] if ast.get_docstring(tree) else tree.body
    for n in [m for part in (tree.args, *body) for m in ast.walk(part)]:
        for field in ("id", "arg"):
            if isinstance(getattr(n, field, None), str):
                setattr(n, field, str(numbers.setdefault(getattr(n, field), len(numbers))))
        for field in ("annotation", "returns"):
            if hasattr(n, field):
                setattr(n, field, None)
    return "".join(ast.dump(part) for part in (tree.args, *body))


# ---------------------------------------------------------------- prose points at what is there

def comments(room):
    tokens = tokenize.generate_tokens(io.StringIO(SOURCES[room]).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


@needs_readme
@each_room
def test_every_source_that_is_cited_is_in_the_readme(room):
    known = set(re.findall(r"^- \[(\w+)\] ", README, re.M))
    nodes = [n for n in ast.walk(TREES[room]) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    prose = [ast.get_docstring(n) or "" for n in nodes] + comments(room)
    cited = {key for text in prose for key in re.findall(r"\[([A-Z]\w+)\]", text)}
    assert cited <= known, f"{room} cites {sorted(cited - known)}; README.md has {sorted(known)}"


@needs_readme
def test_links_of_the_readme_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and not [link for link in links if not (ROOT / link).exists()]


def commands():
    """(where, command) of the README's code and of the files' docstrings, without what explains them."""
    found = []
    if README is not None:
        blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S)
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))
        found += [("README.md", line) for line in [line for block in blocks for line in block.splitlines()] + spans]
    for path in [*ROOMS.values(), *sorted(ROOT.glob("configs/**/*.py"))]:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found += [(path.name, line.strip()) for line in text.splitlines()]
    start = re.compile("(python|torchrun|make|pip) ")
    return [(where, re.split(r" {2,}|\s#", line)[0]) for where, line in found if start.match(line)]


def option_classes(room):
    """The dataclasses whose fields are flags of a script: those that it hands to `parse`."""
    calls = [n for n in ast.walk(TREES[room]) if isinstance(n, ast.Call)]
    second = [n.args[1] for n in calls if ast.unparse(n.func) in ("parse", "config.parse")]
    made = [n.func for arg in second for n in ast.walk(arg) if isinstance(n, ast.Call)]
    names = {n.id for n in made if isinstance(n, ast.Name)}
    found = [getattr(importlib.import_module(room), name) for name in names if name != "load"]
    return found + ([Config] if "read_config" in SOURCES[room] and Config not in found else [])


def check_flags(script, flags):
    """Every flag is one of the script's, with a value of its type; config files are there. UserError if not."""
    room = Path(script).stem
    assert script == f"{room}.py" and room in ROOMS, f"there is no {script}"
    if room == "bench" and flags[0].partition("=")[0] in ("--fid", "--data"):
        return
    classes, words = option_classes(room), [w for w in flags if w != "--help"]
    if words and not words[0].startswith("-"):              # a word that says what to do, as in: latents.py encode
        assert re.search(rf'"{words[0]}": |\["{words[0]}"\]', SOURCES[room]), f"{script} knows no {words[0]}"
        words = words[1:]
        classes = classes + [c for r in ROOMS if f"{r}.main([" in SOURCES[room] or f"{r}.main(argv)" in SOURCES[room]
                             for c in option_classes(r)]
    while words:
        word = words.pop(0)
        pair = [word] if "=" in word or not words or words[0].startswith("--") else [word, words.pop(0)]
        if Config in classes and word.startswith("--config"):
            load(pair[-1].removeprefix("--config="))
        elif not classes:
            assert f'"{word}"' in SOURCES[room], f"{script} knows no {word}"
        else:
            refused = []
            for options in classes:
                try:
                    parse(pair, options())
                except UserError as e:
                    refused.append(e)
            if len(refused) == len(classes):
                raise refused[0]


def check_command(command):
    words = shlex.split(re.sub(r"[\[\]]", "", command))
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"no target {words[1]}"
    elif words[0] == "pip":
        assert all((ROOT / name).exists() for flag, name in zip(words, words[1:]) if flag == "-r"), command
    elif words[0] == "torchrun":
        with redirect_stderr(io.StringIO()):
            seen = get_args_parser().parse_args(words[1:])
        check_flags(seen.training_script, seen.training_script_args)
    elif words[1] != "-m":
        check_flags(words[1], words[2:])


@pytest.mark.parametrize("where, command", commands())
def test_commands_that_are_shown_are_understood(where, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(command)


@pytest.mark.parametrize("command", [
    "python train.py --stepz=3", "python train.py --steps=many", "python train.py --config=configs/none.py",
    "python trian.py", "python sample.py --lr=3", "python model.py --tabel", "torchrun sample.py --n=3",
    "torchrun train.py --stepz 3", "make demon", "pip install -r none.txt"])
def test_commands_with_a_slip_are_not(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((UserError, AssertionError, SystemExit)):
        check_command(command)
