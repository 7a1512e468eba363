"""The notebooks: stored outputs belong to the code, nothing is copied from the library, links and index are right.

Quick tests read the stored files; a slow one runs every notebook again, from top to bottom in a fresh process.
"""
import ast
import base64
import importlib
import inspect
import io
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))

import build                                                # noqa: E402
import config                                               # noqa: E402

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOKS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in PATHS}
INDEX = ROOT / "notebooks" / "README.md"
CELLS, LINES, COLUMNS = 20, 22, 120     # most code cells of a notebook, lines of one, characters of a line
FOLDERS = ("sources", "baselines", "evaluation", "runtime", "experiments")
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
           for folder in (".", *FOLDERS) for path in (ROOT / folder).glob("*.py")}
OURS = {n.name for tree in MODULES.values() for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}

each_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def prose(notebook):
    return "\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def printed(cell):
    return "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")


def tree(notebook):
    return ast.parse("\n".join(source(cell) for cell in code_cells(notebook)))


def library_names(notebook):
    """{name in the notebook: module, class or function} of everything that it imports from the library."""
    names = {}
    for node in ast.walk(tree(notebook)):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name: importlib.import_module(a.name) for a in node.names if a.name in MODULES}
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in {*MODULES, *FOLDERS}:
            for a in node.names:
                whole = f"{node.module}.{a.name}"
                names[a.asname or a.name] = (importlib.import_module(whole) if whole in MODULES
                                             else getattr(importlib.import_module(node.module), a.name))
    return names


def small(body):
    """A function's statements as text, without docstring and names of variables: what a copy has in common."""
    body = body[1:] if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) else body
    return re.sub(r"(id|arg)='\w+'", "", "".join(ast.dump(n) for n in body))


@cache
def bodies():
    """Of every function of the library."""
    return {small(n.body) for module in MODULES.values() for n in ast.walk(module) if isinstance(n, ast.FunctionDef)}


# ---------------------------------------------------------------- stored outputs

def test_there_are_notebooks_and_each_is_numbered():
    numbers = [path.name[:2] for path in PATHS]
    assert PATHS and len(set(numbers)) == len(numbers) and all(n.isdigit() for n in numbers)


@each_notebook
def test_outputs_are_those_of_one_run_from_top_to_bottom(name):
    cells = code_cells(NOTEBOOKS[name])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {out["output_type"] for cell in cells for out in cell["outputs"]}
    assert "error" not in kinds and not [o for c in cells for o in c["outputs"] if o.get("name") == "stderr"]


@each_notebook
def test_outputs_belong_to_the_code_above_them(name):
    """build.py stored the hash of the code that it ran."""
    stored = NOTEBOOKS[name]["metadata"].get("code_sha256")
    assert stored == build.code_hash(NOTEBOOKS[name]), f"run python notebooks/build.py --only={name[:2]}"


@each_notebook
def test_library_code_that_is_shown_is_todays(name):
    """Every print(inspect.getsource(X)) printed what X is now."""
    notebook, seen = NOTEBOOKS[name], 0
    names = library_names(notebook)
    for cell in code_cells(notebook):
        for shown in re.findall(r"inspect\.getsource\(([\w.]+)\)", source(cell)):
            first, *rest = shown.split(".")
            assert first in names, f"{shown} is not of the library"
            thing = names[first]
            for part in rest:
                thing = getattr(thing, part)
            seen += 1
            assert inspect.getsource(thing) in printed(cell), (
                f"{shown} has changed; run python notebooks/build.py --only={name[:2]}")
    assert seen, "a notebook shows code of the library"


@each_notebook
def test_every_library_name_exists(name):
    """Every module.name and every imported name is one of the library; flags of train.py are options."""
    names, found = library_names(NOTEBOOKS[name]), tree(NOTEBOOKS[name])
    assert not [f"{n.value.id}.{n.attr}" for n in ast.walk(found)
                if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
                and inspect.ismodule(names.get(n.value.id)) and not hasattr(names[n.value.id], n.attr)]
    options = {key for key, *_ in config.fields(config.Config())} | {"config"}
    dicts = [{k.value for k in n.keys if isinstance(k, ast.Constant)} for n in ast.walk(found)
             if isinstance(n, ast.Dict)]
    flags = [keys for keys in dicts if keys & {"config", "lr", "lr_mp", "forced_weight_norm"}]
    assert not [keys - options for keys in flags if not keys <= options]


@each_notebook
def test_a_notebook_is_small(name):
    assert (ROOT / "notebooks" / name).stat().st_size <= build.BYTES


# ---------------------------------------------------------------- no second copy

@each_notebook
def test_nothing_is_copied_from_the_library(name):
    """No class, no function or lambda of a name that the library has, no function with the body of one of its own."""
    found = tree(NOTEBOOKS[name])
    assert not [n.name for n in ast.walk(found) if isinstance(n, ast.ClassDef)]
    named = {n.name for n in ast.walk(found) if isinstance(n, ast.FunctionDef)}
    named |= {t.id for n in ast.walk(found) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda)
              for t in n.targets if isinstance(t, ast.Name)}
    assert not named & OURS, f"the library has {sorted(named & OURS)}"
    twice = [n.name for n in ast.walk(found) if isinstance(n, ast.FunctionDef) and small(n.body) in bodies()]
    assert not twice, f"the library has the body of {twice}"


@each_notebook
def test_imports_are_the_library_and_what_is_required(name):
    nodes = [n for n in ast.walk(tree(NOTEBOOKS[name])) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    others = {"torch", "numpy", "PIL", "safetensors", "matplotlib"}
    assert names <= set(sys.stdlib_module_names) | {*MODULES, *FOLDERS} | others


# ---------------------------------------------------------------- fit to be read

@each_notebook
def test_cells_fit_a_screen(name):
    cells = code_cells(NOTEBOOKS[name])
    lines = [line for cell in cells for line in source(cell).splitlines()]
    assert len(cells) <= CELLS and max(len(source(cell).splitlines()) for cell in cells) <= LINES
    assert not [line for line in lines if len(line) > COLUMNS]


@each_notebook
def test_there_are_figures_equations_questions_and_checks(name):
    """Figures that are not blank, equations, questions with answers, and claims that would stop the notebook."""
    notebook, text = NOTEBOOKS[name], prose(NOTEBOOKS[name])
    figures = [out["data"]["image/png"] for c in code_cells(notebook) for out in c["outputs"]
               if "image/png" in out.get("data", {})]
    assert len(figures) >= 3 and "$" in text and "/work" not in text
    for png in figures:
        shown = Image.open(io.BytesIO(base64.b64decode("".join(png)))).convert("L")
        assert shown.getextrema()[0] < shown.getextrema()[1]
    assert text.count("**Question.**") == text.count("**Answer.**") >= 1
    assert [n for n in ast.walk(tree(notebook)) if isinstance(n, ast.Assert)]


@each_notebook
def test_keys_and_links_in_the_prose_lead_somewhere(name):
    text = prose(NOTEBOOKS[name])
    known = set(re.findall(r"^- \[(\w+)\] ", (ROOT / "docs/references.md").read_text(encoding="utf-8"), re.M))
    cited = set(re.findall(r"\[([A-Z][A-Za-z]+\d*)\](?!\()", re.sub(r"\$[^$]+\$", "", text)))
    assert cited <= known, f"{sorted(cited - known)} are not in docs/references.md"
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links and not [k for k in links if "://" not in k and not (ROOT / "notebooks" / k).exists()]


# ---------------------------------------------------------------- the index of equations

def rows():
    """[equation, function, test, notebook] of every row of the tables of four columns in notebooks/README.md."""
    table = [line for line in INDEX.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    return [row for row in cells if len(row) == 4 and row[0] != "equation"]


def linked(cell):
    """(path, names) of the links in a cell: `[name](../file.py)`, in which the name may be Class.method."""
    return [(link, re.findall(r"[\w.]+", text)) for text, link in re.findall(r"\[([^]]+)\]\(([^)]+)\)", cell)]


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def defined(path, dotted):
    """Does a file of the library define this name, or this Class.method?"""
    found = parsed(path)
    for part in dotted.split("."):
        inside = [n for n in found.body
                  if getattr(n, "name", None) == part or isinstance(n, (ast.Assign, ast.AnnAssign))
                  and part in {t.id for t in getattr(n, "targets", [getattr(n, "target", None)]) if hasattr(t, "id")}]
        if not inside:
            return False
        found = inside[0]
    return True


@pytest.mark.parametrize("row", rows(), ids=lambda row: re.sub(r"\W+", " ", row[0])[:40])
def test_the_index_leads_to_functions_tests_and_notebooks(row):
    """Every file is there, defines what is named, and the notebook shows that function's code or calls it."""
    _, functions, tests, notebooks = (linked(cell) for cell in row)
    assert functions and tests and notebooks, row
    for link, names in functions + tests:
        path = (INDEX.parent / link).resolve()
        assert path.is_file() and names, link
        assert not [n for n in names if not defined(path, n)], f"{path.name} does not define {names}"
    code = ""
    for link, _ in notebooks:
        assert link in NOTEBOOKS, f"there is no notebooks/{link}"
        code += "\n".join(source(cell) for cell in code_cells(NOTEBOOKS[link]))
    for _, names in functions:
        last = [part for name in names for part in name.split(".")]
        assert [part for part in last if re.search(rf"\b{part}\b", code)], f"{names} is not in {row[3]}"


def test_every_notebook_is_in_the_index():
    used = {link for row in rows() for link, _ in linked(row[3])}
    text = INDEX.read_text(encoding="utf-8")
    assert used <= set(NOTEBOOKS) and not [name for name in NOTEBOOKS if f"]({name})" not in text]


# ---------------------------------------------------------------- running them

@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_from_top_to_bottom_and_says_the_same(name, tmp_path):
    """In a fresh process; text agrees up to its numbers."""
    pytest.importorskip("nbclient")
    command = [sys.executable, "notebooks/build.py", f"--only={name[:2]}", f"--to={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    again = json.loads((tmp_path / name).read_text(encoding="utf-8"))
    words = lambda cell: re.sub(r"[-+]?\d[\d.,e+-]*", "#", printed(cell)).split()
    for old, new in zip(code_cells(NOTEBOOKS[name]), code_cells(again), strict=True):
        assert words(old) == words(new), source(old)
        kinds = [[out["output_type"] for out in cell["outputs"] if out["output_type"] != "stream"]
                 for cell in (old, new)]
        assert kinds[0] == kinds[1]                         # as many figures
