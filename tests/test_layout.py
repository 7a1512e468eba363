"""The layout of the tree: who imports whom, how long things are, and that prose names what exists."""
import ast
import importlib
import io
import re
import shlex
import sys
import tokenize
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from config import Config, UserError, load, parse

ROOT = Path(__file__).parent.parent
TOP, FILE, SHORT, FUNCTION, MAIN = 17, 600, 50, 60, 110     # most modules at the top; lines of files and functions
COLUMNS = 120                           # most characters of a line
FOLDERS = ("sources", "baselines", "evaluation", "runtime", "experiments")
SUBJECT = {"layers", "mp_layers", "schedule", "conditioning"}          # know no file, no data, no process
OUTSIDE = {"torch", "filelock", "numpy", "PIL", "tqdm", "safetensors"}  # what may be imported at the top of a file
MAY_BE_SHORT = {"runtime.optional": "one function that every folder needs, and no other file could hold"}

# module or folder -> the modules and folders that it may import anywhere, in or out of functions (design, section 1)
BELOW_FOLDERS = "config rng runtime"
MAY_IMPORT = {
    "config": "", "rng": "", "schedule": "", "layers": "", "mp_layers": "layers", "conditioning": "layers mp_layers",
    "model": "config schedule layers mp_layers conditioning runtime.checkpoint",
    "text": f"{BELOW_FOLDERS} sources.shapes_grammar sources.cached_latents",
    "data": f"{BELOW_FOLDERS} sources text conditioning",
    "latents": f"{BELOW_FOLDERS} data sources.cached_latents text",
    "sample": f"{BELOW_FOLDERS} schedule conditioning model data text latents baselines",
    "optim": f"{BELOW_FOLDERS} layers mp_layers conditioning", "ema": f"{BELOW_FOLDERS}",
    "transfer": f"{BELOW_FOLDERS} model",
    "train": f"{BELOW_FOLDERS} schedule conditioning model data text latents sample optim ema transfer fid "
             "sources.cached_latents",
    "fid": f"{BELOW_FOLDERS} data latents sample sources evaluation model",
    "sources": BELOW_FOLDERS, "baselines": f"{BELOW_FOLDERS} conditioning layers model schedule",
    "evaluation": f"{BELOW_FOLDERS} fid sample model data text latents conditioning sources schedule",
    "experiments": "*",
}
RUNTIME = ("distributed", "log", "checkpoint", "plot")      # inside runtime each imports earlier ones only
PICTURES = {"sources.images", "sources.folders", "sources.shapes", "sources.shapes_grammar"}   # open to measures
CITED = {"sec": {"1", "2", "2.1", "2.2", "3", "3.1", "3.2", "3.3", "3.4"}, "app": set("ABCDE"),
         "table": {"1", "2", "3", "4", *(f"A{k}" for k in range(1, 7))}, "eq": {str(k) for k in range(1, 24)},
         "fig": {*map(str, range(1, 9)), *(f"A{k}" for k in range(1, 6))}}      # what [COND] has

PATHS = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
PATHS |= {f"{folder}.{path.stem}": path for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}/*.py"))
          if path.stem != "__init__"}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in PATHS.items()}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}
FUNCTIONS = [(name, n) for name, tree in TREES.items() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
TEXTS = sorted([*PATHS.values(), *(path for folder in ("configs", "tests", "assignments")
                                    for path in ROOT.glob(f"{folder}/**/*.py"))])
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def imported(nodes):
    """Modules that the import statements among `nodes` bring in: ours by full name, others by their first name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module in FOLDERS else {node.module}
    return {name if name in PATHS else name.split(".")[0] for name in found}


def at_the_top(tree):
    """The nodes that run when the file is imported."""
    inside = {id(n) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for n in ast.walk(node)}
    return [node for node in ast.walk(tree) if id(node) not in inside]


def within(name, allowed):
    return name in allowed or name.split(".")[0] in allowed


# ---------------------------------------------------------------- who imports whom

def test_a_module_imports_only_what_it_may():
    wrong = []
    for name, tree in TREES.items():
        folder = name.split(".")[0]
        ours = imported(ast.walk(tree)) & set(PATHS) - {name}
        if folder == "runtime":
            known = RUNTIME[:RUNTIME.index(name[8:])] if name[8:] in RUNTIME else RUNTIME
            allowed = {"config", "rng", *(f"runtime.{k}" for k in known)}
        else:
            assert folder in MAY_IMPORT, f"say in MAY_IMPORT what {name} may import"
            allowed = set(MAY_IMPORT[folder].split()) | ({folder} if folder in FOLDERS else set())
        if "*" not in allowed:
            wrong += [f"{name} imports {other}" for other in sorted(ours) if not within(other, allowed)]
    assert not wrong, wrong


def test_only_measures_programs_and_data_open_sources_themselves():
    wrong = [f"{name} imports {other}" for name, tree in TREES.items()
             if name == "fid" or name.split(".")[0] == "evaluation"
             for other in imported(ast.walk(tree)) if other.startswith("sources.") and other not in PICTURES]
    assert not wrong, wrong


def test_imports_have_no_circle():
    graph, done = {name: imported(at_the_top(tree)) & set(PATHS) - {name} for name, tree in TREES.items()}, set()
    while ready := [name for name in graph if name not in done and graph[name] <= done]:
        done |= set(ready)
    assert done == set(graph), f"a circle among {', '.join(sorted(set(graph) - done))}"


def test_only_six_packages_are_imported_at_the_top_of_a_file():
    wrong = []
    for name, tree in TREES.items():
        outside = set() if name == "config" else {"torch"} if name in SUBJECT else \
            {"torch", "numpy"} if name == "rng" else OUTSIDE
        extra = imported(at_the_top(tree)) - set(sys.stdlib_module_names) - set(PATHS) - outside
        if name.split(".")[0] not in ("evaluation", "experiments") and extra:
            wrong.append(f"{name} imports {sorted(extra)}")
    assert not wrong, wrong


def test_samplers_and_guidance_know_a_callable_and_no_model():
    import sample
    names = {row.function.__name__ for row in sample.SAMPLERS.values()} | {"with_guidance"}
    found = [n for name, n in FUNCTIONS if name == "sample" and n.name in names]
    assert {n.name for n in found} == names
    for function in found:
        used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
        assert not used & {"model", "data", "checkpoint", "distributed", "ema"}
        assert function.args.args[0].annotation.id == "Denoise"


# ---------------------------------------------------------------- sizes

def test_the_top_level_is_short_and_so_is_every_file_and_function():
    assert len([name for name in PATHS if "." not in name]) <= TOP
    lines = {name: len(text.splitlines()) for name, text in SOURCES.items()}
    assert not {name: n for name, n in lines.items() if n > FILE}
    assert not {name: n for name, n in lines.items() if n < SHORT and name not in MAY_BE_SHORT}
    long = [f"{name}.{n.name}: {n.end_lineno - n.lineno + 1}" for name, n in FUNCTIONS
            if n.end_lineno - n.lineno + 1 > (MAIN if (name, n.name) == ("train", "main") else FUNCTION)]
    assert not long, long


def test_lines_fit_the_page_and_end_in_no_blanks():
    bad = [f"{path.relative_to(ROOT)}:{k}: {len(line)}" for path in TEXTS
           for k, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
           if len(line) > COLUMNS or line != line.rstrip() or "\t" in line]
    assert not bad, bad


# ---------------------------------------------------------------- habits

def test_everything_public_says_what_it_is():
    silent = [name for name, tree in TREES.items() if not ast.get_docstring(tree)]
    silent += [f"{name}.{n.name}" for name, tree in TREES.items() for n in tree.body
               if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name != "main" and n.name[0] != "_"
               and not ast.get_docstring(n)]
    assert not silent, silent


def test_a_file_with_shape_comments_has_a_legend():
    bare = [name for name in PATHS if any(re.match(r"# \([A-Z]\b[^)]*,", text) for text in comments(name))
            and "Dimensions: " not in ast.get_docstring(TREES[name])]
    assert not bare, bare


def test_signatures_are_typed_and_take_no_bags_of_arguments():
    bags = [(name, n.name) for name, n in FUNCTIONS if n.args.kwarg]
    assert bags == [("config", "__call__")]                 # renames the fields of a dataclass, and no more
    bare = []
    nested = {id(n) for _, f in FUNCTIONS for n in ast.walk(f) if n is not f and isinstance(n, ast.FunctionDef)}
    for name, n in FUNCTIONS:
        if id(n) not in nested:
            bare += [f"{name}.{n.name}({a.arg})" for a in n.args.args + n.args.kwonlyargs
                     if a.annotation is None and a.arg not in ("self", "cls")]
            bare += [f"{name}.{n.name} ->"] if n.returns is None and n.name != "__init__" else []
    assert not bare, bare


def test_there_is_no_drawer_for_odds_and_ends():
    assert not {"utils", "util", "helpers", "common", "misc"} & {name.split(".")[-1] for name in PATHS}


def test_nothing_is_left_for_later():
    late = [f"{path.name}: {word}" for path in TEXTS if path != Path(__file__) and path.parent.name != "assignments"
            for word in ("TODO", "FIXME", "XXX", "NotImplementedError") if word in path.read_text(encoding="utf-8")]
    assert not late, late


def test_no_function_is_written_twice():
    """Equal but for names, types and docstring, in two modules."""
    seen = {}
    for name, node in FUNCTIONS:
        text = skeleton(node)
        if text.count("(") >= 30:                           # one-liners may look alike
            seen.setdefault(text, []).append((name, node.name))
    twice = [names for names in seen.values() if len({name for name, _ in names}) > 1]
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


# ---------------------------------------------------------------- prose names what exists

@cache
def comments(name):
    tokens = tokenize.generate_tokens(io.StringIO(SOURCES[name]).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def prose():
    """(where, text) of every docstring, comment and page."""
    for name, tree in TREES.items():
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        yield name, "\n".join([ast.get_docstring(n) or "" for n in nodes] + comments(name))
    for path in PAGES:
        yield path.name, path.read_text(encoding="utf-8")


def test_every_source_that_is_cited_is_in_the_references():
    known = set(re.findall(r"^- \[(\w+)\] ", (ROOT / "docs/references.md").read_text(encoding="utf-8"), re.M))
    wrong = [f"{where}: [{key}]" for where, text in prose() if not where.endswith(".md")
             for key in re.findall(r"\[([A-Z]\w+)\]", text) if key not in known]
    assert known and not wrong, wrong


def test_sections_of_the_main_paper_that_are_cited_exist():
    wrong = []
    for where, text in prose():
        place = r"(?:sec|app|table|eq|fig)s?\.? [A-E0-9][\w.]*"
        for said in re.findall(rf"\[COND\]((?:,? (?:and )?{place})+)", text):
            for kind, number in re.findall(r"(sec|app|table|eq|fig)s?\.? ([A-E]?[0-9.]*[0-9]|[A-E])", said):
                if number not in CITED[kind]:
                    wrong.append(f"{where}: {kind}. {number}")
        wrong += [f"{where}: [COND] {n}" for n in re.findall(r"\[COND\] (\d[\d.]*)", text)]
    assert not wrong, wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]


def test_files_that_prose_names_exist():
    """`sources/shapes.py`, `tests/test_fid.py`: a path with a folder that ends in .py, in docstrings and pages."""
    names = [(where, path) for where, text in prose() if where not in ("LOG.md", "extending.md")
             for path in re.findall(r"(?<![\w/<.-])((?:sources|baselines|evaluation|runtime|experiments|tests|configs)/"
                                    r"[\w/]+\.py)\b", text)]
    assert names and not [(where, path) for where, path in names if not (ROOT / path).exists()]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1400


def commands():
    """(where, command) in the code of the pages and in docstrings, without what explains them."""
    found = []
    for page in PAGES:
        text = "" if page.name == "LOG.md" else page.read_text(encoding="utf-8")    # the log's are of their time
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        found += [(page.name, line) for line in [line for block in blocks for line in block.splitlines()] + spans]
    for path in [*PATHS.values(), *sorted(ROOT.glob("configs/**/*.py"))]:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found += [(path.name, line.strip()) for line in text.splitlines()]
    start = re.compile("(python|torchrun|make|pip) ")
    return sorted({(where, re.split(r" {2,}|\s#", line)[0]) for where, line in found if start.match(line)})


@cache
def option_classes(name):
    """The dataclasses whose fields are flags of a program: those that it hands to `parse`."""
    calls = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.Call)]
    second = [n.args[1] for n in calls if ast.unparse(n.func) in ("parse", "config.parse")]
    made = [n.func for arg in second for n in ast.walk(arg) if isinstance(n, ast.Call)]
    names = {n.id for n in made if isinstance(n, ast.Name)} | {n.attr for n in made if isinstance(n, ast.Attribute)}
    module = importlib.import_module(name)
    found = [getattr(module, k) for k in names if k != "load" and hasattr(module, k)]
    return found + ([Config] if "read_config" in SOURCES[name] and Config not in found else [])


def check_flags(name, flags):
    """Every flag is one of the program's, with a value of its type; config files exist. UserError if not."""
    assert name in PATHS and "run(" in SOURCES[name], f"there is no program {name}"
    classes, words = option_classes(name), [w for w in flags if w != "--help"]
    if words and not words[0].startswith("-"):              # a word that says what to do, as in: latents.py encode
        assert re.search(rf'"{words[0]}": |\["{words[0]}"\]|"{words[0]}"', SOURCES[name]), f"{name} knows no {words[0]}"
        words = words[1:]
        reached = [r for r in PATHS if re.search(rf"\b{r.split('.')[-1]}\.main\b", SOURCES[name])]
        classes = classes + [c for r in reached for c in option_classes(r)]
    while words:
        word = words.pop(0)
        pair = [word] if "=" in word or not words or words[0].startswith("--") else [word, words.pop(0)]
        if Config in classes and word.startswith("--config"):
            load(pair[-1].removeprefix("--config="))
            continue
        refused = []
        for options in classes:
            try:
                parse(pair, options())
            except UserError as e:
                refused.append(e)
        if len(refused) == len(classes):
            raise refused[0] if refused else AssertionError(f"{name} takes no {word}")


def check_command(command):
    words = shlex.split(re.sub(r"[\[\]]", "", command))
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"no target {words[1]}"
    elif words[0] == "pip":
        assert all((ROOT / name).exists() for flag, name in zip(words, words[1:]) if flag == "-r"), command
    elif words[0] == "torchrun":
        with redirect_stderr(io.StringIO()):
            seen = get_args_parser().parse_args(words[1:])
        program = seen.training_script
        assert seen.module == ("." in program.removesuffix(".py")), command
        check_flags(program if seen.module else program.removesuffix(".py"), seen.training_script_args)
    elif words[1] == "-m":
        if words[2].split(".")[0] in FOLDERS:
            check_flags(words[2], words[3:])
    elif (ROOT / words[1]).exists() and "/" in words[1]:
        pass                                                # notebooks/build.py parses its own
    else:
        assert words[1].endswith(".py") and "/" not in words[1], command
        check_flags(words[1].removesuffix(".py"), words[2:])


def test_commands_that_are_shown_are_understood(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    found, wrong = commands(), []
    for where, command in found:
        try:
            check_command(command)
        except (UserError, AssertionError, SystemExit) as e:
            wrong.append(f"{where}: {command}: {e}")
    assert len(found) > 60 and not wrong, "\n".join(wrong)
    assert "note:" not in capsys.readouterr().err           # no page shows an option by its old name


@pytest.mark.parametrize("command", [
    "python train.py --stepz=3", "python train.py --steps=many", "python train.py --config=configs/none.py",
    "python trian.py", "python sample.py --lr=3", "python -m experiments.table", "torchrun sample.py --n=3",
    "torchrun train.py --stepz 3", "python claims.py", "make demon", "pip install -r none.txt"])
def test_commands_with_a_slip_are_not(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((UserError, AssertionError, SystemExit)):
        check_command(command)
