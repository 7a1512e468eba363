"""Run the notebooks from top to bottom, each in a fresh process, and store their outputs.

python notebooks/build.py                               all of them, in place
python notebooks/build.py --only=01,04                  some
python notebooks/build.py --only=01 --to=out/copy       a run copy; the notebook itself stays as it is
python notebooks/build.py --ship=out/shapes32:shapes    the averaged weights of a run, in half precision, as
                                                        weights/shapes.safetensors

A notebook imports the library and holds no copy of it. It stores a hash of its code, by which a test finds outputs that
belong to older code. Needs pip install -r requirements-dev.txt.
"""
import base64
import hashlib
import io
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import model  # noqa: E402
from config import UserError, parse, run, to_json  # noqa: E402
from runtime import checkpoint, log  # noqa: E402

BYTES = 300_000                         # most bytes of a notebook's file
COLORS = 128                            # of an image's palette: a third of the bytes of full colour
CLOCK = "import os; print(sum(os.times()[:4]))"             # seconds of one core, child processes included


@dataclass(frozen=True)
class Options:
    only: str = ""                      # numbers of notebooks, separated by commas; empty = all
    to: str = ""                        # folder for the notebooks that were run; empty = in place
    ship: str = ""                      # RUN:NAME, write the weights of a run as weights/NAME.safetensors instead


def paths(only: str = "") -> list[Path]:
    """The notebooks, in order, or those whose number is in `only` ("01,04"). UserError for a number without one."""
    known = {path.name[:2]: path for path in sorted(HERE.glob("[0-9][0-9]_*.ipynb"))}
    numbers = [n.strip().zfill(2) for n in only.split(",") if n.strip()] or list(known)
    if unknown := [n for n in numbers if n not in known]:
        raise UserError(f"only={only!r}: no notebook {unknown[0]}; there are {', '.join(known)}")
    return [known[n] for n in numbers]


def code_hash(notebook: dict) -> str:
    """sha256 of the code cells' text, in order. Prose may change without a new run."""
    sources = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def execute(path: Path) -> tuple[Any, float]:
    """The notebook with the outputs of one run in a fresh process on one core, and the seconds of processor time.

    UserError with the cell and its traceback where a cell fails."""
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
    except ImportError as e:
        raise UserError(f"running notebooks needs {e.name}: pip install -r requirements-dev.txt") from e
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CLOCK))                     # removed below
    os.environ["OMP_NUM_THREADS"] = "1"                                         # the kernel's, and its children's
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False,
                            coalesce_streams=True,
                            extra_arguments=["--IPKernelApp.log_level=40"],     # errors, no hints
                            resources={"metadata": {"path": str(HERE)}})
    try:
        client.execute()
    except CellExecutionError as e:
        raise UserError(f"{path.name} stopped:\n{e}") from e
    seconds = float(notebook.cells.pop().outputs[0].text)
    return tidy(notebook), seconds


def tidy(notebook: Any) -> Any:
    """Keep what a reader sees: numbered cell ids, no metadata but the hash of the code, images with a palette."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                         "language_info": {"name": "python"}, "code_sha256": code_hash(notebook)}
    for k, cell in enumerate(notebook.cells, 1):
        cell.id, cell.metadata = f"cell-{k}", {}
        for output in cell.get("outputs", []):
            output.pop("metadata", None) if output.output_type == "stream" else output.update(metadata={})
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = palette(output.data["image/png"])
    return notebook


def file_text(notebook: Any) -> str:
    """The text of a notebook's file: one line of JSON for each line of a cell, so that diffs are readable."""
    import nbformat
    return nbformat.writes(notebook, ensure_ascii=False) + "\n"


def palette(png: str) -> str:
    """A base64 PNG with at most COLORS colours."""
    from PIL import Image
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    small = io.BytesIO()
    image.save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def ship(run_folder: str, name: str) -> Path:
    """Write the averaged weights of a run, in half precision, to weights/<name>.safetensors, with the run's header.

    Its config has today's names of options, and names neither the run's folder nor that of its first weights."""
    source, target = Path(run_folder), HERE.parent / "weights" / f"{name}.safetensors"
    _, cfg = model.load(source)
    tensors, header = checkpoint.read_weights(source / "weights.safetensors" if source.is_dir() else source)
    header = {**header, "config": to_json(replace(cfg, out=f"weights/{name}", init_from=""))}
    del header["sha256"]
    checkpoint.write_weights(target, {k: v.half() for k, v in tensors.items()}, header)
    model.load(target)                                      # an error now rather than for a reader
    return target


def main(argv: list[str]) -> None:
    """Run notebooks, or write weights with --ship."""
    o = parse(argv, Options())
    if o.ship:
        folder, _, name = o.ship.rpartition(":")
        if not folder or not name.isidentifier():
            raise UserError(f"ship={o.ship!r} must be RUN:NAME, a run folder and a plain name, as out/shapes32:shapes")
        target = ship(folder, name)
        print(f"{target}, {target.stat().st_size / 1e6:.1f} MB")
        return
    to = Path(o.to) if o.to else HERE
    to.mkdir(parents=True, exist_ok=True)
    for path in paths(o.only):
        notebook, seconds = execute(path)
        text = file_text(notebook)
        size = len(text.encode())
        print(f"{path.name}: {seconds:.0f} s, {size / 1000:.0f} kB", flush=True)
        if size > BYTES:
            raise UserError(f"{path.name} has {size:,} bytes; the limit is {BYTES:,}. It was not written")
        log.write_text(to / path.name, text)


if __name__ == "__main__":
    run(main)
