"""docs/extending.md: its diffs apply to the files as they are, its examples run, and its table counts the lines."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("sources", "baselines", "evaluation", "runtime", "configs")
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
INTRO, *PARTS = re.split(r"^## ", PAGE, flags=re.M)
SECTIONS = {part.splitlines()[0]: part for part in PARTS}


def blocks(text, language):
    """The code blocks of a section in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def hunks(section):
    """(file, lines before, lines after) of every hunk of a section's diffs; no lines before for a new file."""
    for diff in blocks(section, "diff"):
        for path, body in re.findall(r"^--- \S+\n\+\+\+ b/(\S+)\n(.*?)(?=^--- |\Z)", diff, re.M | re.S):
            for hunk in body.split("@@\n")[1:]:
                lines = hunk.splitlines(keepends=True)
                assert {line[0] for line in lines} <= set("+- ")
                yield path, *("".join(line[1:] for line in lines if line[0] in keep) for keep in ("- ", "+ "))


def apply(section, root):
    """Change the files of a copy of the tree."""
    for path, before, after in hunks(section):
        file = root / path
        if not before:
            assert not file.exists(), f"{path} exists"
            file.write_text(after, encoding="utf-8")
            continue
        text = file.read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{path} does not have once:\n{before}"
        file.write_text(text.replace(before, after), encoding="utf-8")


def copy(root):
    """Copy the library."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, root)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What one process prints that has all changes and runs the examples of all sections, without plots."""
    root = tmp_path_factory.mktemp("tree")
    copy(root)
    for section in SECTIONS.values():
        apply(section, root)
    common = "".join(blocks(INTRO, "python"))
    script = ["import traceback", "import train", "train.plot = str", "train.distributed.matmul_peak = lambda *_: 1e12"]
    for title, section in SECTIONS.items():
        script += ["try:", f"    exec({common + ''.join(blocks(section, 'python'))!r}, {{}})",
                   f"    print('ran:', {title!r}, flush=True)", "except BaseException:", "    traceback.print_exc()"]
    (root / "examples.py").write_text("\n".join(script), encoding="utf-8")
    done = subprocess.run([sys.executable, "examples.py"], cwd=root, capture_output=True, encoding="utf-8")
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("extending")
@pytest.mark.parametrize("title", SECTIONS)
def test_the_example_runs(printed, title):
    assert f"ran: {title}\n" in printed, printed


@pytest.mark.parametrize("title", SECTIONS)
def test_the_change_needs_no_other_and_its_lines_are_counted(title, tmp_path):
    copy(tmp_path)
    apply(SECTIONS[title], tmp_path)
    added = {}
    for diff in blocks(SECTIONS[title], "diff"):
        path = ""
        for line in diff.splitlines():
            if line.startswith("+++ b/"):
                path = line.removeprefix("+++ b/")
            elif line.startswith("+"):
                added[path] = added.get(path, 0) + 1
    row = re.search(rf"^\| \[{title.lower()}\]\(#\S+\) \| (.*) \|$", INTRO, re.M)
    assert row[1] == ", ".join(f"{path} {count}" for path, count in added.items())


def test_every_line_of_the_examples_fits_the_page():
    lines = [line for text in (INTRO, *PARTS) for language in ("diff", "python") for block in blocks(text, language)
             for line in block.splitlines()]
    assert not [line for line in lines if len(line) > 121]          # one column is the mark of a diff
