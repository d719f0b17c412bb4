"""The notebooks as they are committed: with outputs of the reference run, the same every time.

Takes notebooks/*.ipynb and data/; executes them, strips what changes from one execution to the next
and stores the outputs in place. ``python -m l2p_utils.committed`` (``make notebooks``); ``--check``
compares instead and changes nothing.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from l2p_utils.execute import ANSI, NotebookError, execute
from l2p_utils.files import ROOT, UserError, atomic_path

NOTEBOOKS = ROOT / "notebooks"
# Executed from data/ with their own parameters, in seconds and without a model.
FROM_DATA = (
    "00_token_pooling", "04_inference_pooling", "05_pooling_aware", "06_cross_dataset",
    "07_beir_validation", "08_claims",
)  # fmt: skip
# These compute: their outputs are those of the smallest profile.
SMOKE = {"profile": "smoke"}
FROM_SMOKE: dict[str, dict[str, Any]] = {
    "01_data_mining": SMOKE,
    "02_training": SMOKE,
    "03_evaluation": SMOKE | {"model": "docs-scipy-kmeans-pf1-6-s42"},
    "09_release": SMOKE,
}
# What is made before them: the baseline, or else 02 would tell of making it in the first execution
# and not in the next; and its measurements.
ADAPTATION = SMOKE | {"collection": "docs:transformers"}
BEFORE_SMOKE: list[tuple[str, dict[str, Any]]] = [
    ("01_data_mining", ADAPTATION),
    ("02_training", ADAPTATION | {"pool_method": "none", "pool_factors": 1}),
    ("03_evaluation", SMOKE | {"model": "baseline"}),
]
INSERTED = {"injected-parameters", "papermill-error-cell-tag"}  # cells that papermill adds
MAX_LINES = 20
WIDGET = "application/vnd.jupyter.widget-view+json"
ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")
STYLER = re.compile(r"\bT_[0-9a-f]{5}\b")  # pandas' random ids of a styled table
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:home|Users|root|tmp|var|mnt|opt)/\w")

# ---------------------------------------------------------------- normalising


def normalise(executed: NotebookNode, parameters: Mapping[str, Any] | None = None) -> NotebookNode:
    """What of an executed notebook is stored: the same for every execution that shows the same.

    Out go what papermill added (cells, times, paths), standard error, progress bars and widgets
    (neither is drawn from a stored notebook), colour codes, addresses and this machine's folders.
    Execution counts become 1 … n.

    Parameters
    ----------
    executed
        As papermill left it; not changed.
    parameters
        Those that differ from the parameters cell: they are named in an output of that cell, since
        the stored outputs were made with them.

    Returns
    -------
    A valid notebook (nbformat 4.5).
    """
    cells = [cell for cell in executed.cells if not INSERTED & set(_tags(cell))]
    kept = []
    for number, cell in enumerate(cells):
        fixed = {"id": cell.get("id", f"cell-{number:02d}"), "source": cell.source}
        fixed["metadata"] = {"tags": _tags(cell)} if _tags(cell) else {}
        fixed["cell_type"] = cell.cell_type
        if cell.cell_type == "code":
            count = 1 + sum(before["cell_type"] == "code" for before in kept)
            fixed |= {"execution_count": count, "outputs": _outputs(cell.outputs, count)}
            if parameters and "parameters" in _tags(cell):
                fixed["outputs"] = [_made_with(parameters)]
        kept.append(fixed)
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook = nbformat.from_dict(
        {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": kept}
    )
    nbformat.validate(notebook)
    return notebook


def _tags(cell: NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def _made_with(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """An output that says which parameters the stored outputs below belong to."""
    named = ", ".join(f"`{name} = {value!r}`" for name, value in parameters.items())
    text = f"*The outputs stored below were made with* {named}"
    if parameters.get("profile") == SMOKE["profile"]:
        text += ": *a check that everything works, on few documents; its numbers mean nothing.*"
    data = {"text/markdown": text, "text/plain": "<IPython.core.display.Markdown object>"}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def _outputs(outputs: Iterable[NotebookNode], count: int) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for output in outputs:
        if _passing(output):
            continue
        fixed: dict[str, Any] = {"output_type": output.output_type}
        if output.output_type == "stream":
            if kept and kept[-1].get("name") == output.name:  # split where the kernel flushed
                kept[-1]["text"] += _clean(output.text)
                continue
            fixed |= {"name": output.name, "text": _clean(output.text)}
        elif output.output_type == "error":
            fixed |= {"ename": output.ename, "evalue": _clean(output.evalue)}
            fixed["traceback"] = [_clean(line) for line in output.traceback]
        else:
            fixed |= {"data": {k: _clean(v) for k, v in output.data.items()}, "metadata": {}}
            if output.output_type == "execute_result":
                fixed["execution_count"] = count
        kept.append(fixed)
    return kept


def _passing(output: NotebookNode) -> bool:
    """Standard error, a widget, or a progress bar: gone once the cell has run."""
    if output.output_type == "stream":
        return output.name == "stderr"
    data = output.get("data", {})
    return WIDGET in data or "<progress" in _joined(data.get("text/html", ""))


def _joined(value: Any) -> str:
    return "".join(value) if isinstance(value, list) else str(value)


def _clean(value: Any) -> Any:
    """Text without what belongs to one machine or one moment; anything else as it is."""
    if not isinstance(value, str | list) or (isinstance(value, list) and not _is_text(value)):
        return value
    text = ANSI.sub("", _joined(value))
    # A carriage return overwrites the line: what is seen is what came last.
    text = re.sub(r"[^\n]*\r(?!\n)", "", text)
    text = text.replace(f"{ROOT}/", "").replace(str(ROOT), ".").replace(str(Path.home()), "~")
    return STYLER.sub("T_table", ADDRESS.sub("0x…", text))


def _is_text(value: list) -> bool:
    return all(isinstance(line, str) for line in value)


# ---------------------------------------------------------------- comparing and checking


def text_outputs(cell: NotebookNode) -> list[str]:
    """A cell's outputs as text; of a picture only that there is one."""
    texts = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            texts.append(_joined(output.text))
        elif output.output_type == "error":
            texts.append(f"{output.ename}: {output.evalue}")
        else:
            for kind, value in sorted(output.data.items()):
                texts.append(_joined(value) if kind.startswith("text/") else f"[{kind}]")
    return texts


def differences(stored: NotebookNode, fresh: NotebookNode) -> list[str]:
    """Where the stored text outputs are not those of a fresh execution; ``[]`` when they are.

    Both must be normalised. Pictures are not compared: fonts and libraries differ a little.
    """
    found = []
    old, new = ({cell.id: cell for cell in nb.cells} for nb in (stored, fresh))
    if list(old) != list(new):
        return [f"cells {sorted(set(old) ^ set(new)) or 'in another order'} differ"]
    for key in old:
        before, after = text_outputs(old[key]), text_outputs(new[key])
        if before != after:
            lines = ("\n".join(texts).splitlines() for texts in (before, after))
            changed = [
                line
                for line in difflib.unified_diff(*lines, "stored", "fresh", lineterm="", n=0)
                if not line.startswith("@@")
            ]
            found.append(f"cell {key}:\n  " + "\n  ".join(changed[:20]))
    return found


def problems(notebook: NotebookNode) -> list[str]:
    """What a committed notebook must not have, cell by cell; ``[]`` when it is fit to be committed.

    A definition, a cell of more than `MAX_LINES` lines, an error, a folder of somebody's machine,
    an id twice; and exactly one cell must be tagged ``parameters``.
    """
    found = []
    tagged = sum("parameters" in _tags(cell) for cell in notebook.cells)
    if tagged != 1:
        found.append(f"{tagged} cells are tagged 'parameters'; expected 1")
    ids = [cell.get("id") for cell in notebook.cells]
    if None in ids or len(set(ids)) < len(ids):
        found.append("every cell needs an id of its own")
    for cell in notebook.cells:
        found += [f"cell {cell.get('id')}: {problem}" for problem in _cell_problems(cell)]
    return found


def _cell_problems(cell: NotebookNode) -> list[str]:
    found = []
    if MACHINE_PATH.search(cell.source + "\n".join(text_outputs(cell))):
        found.append("a folder of one machine")
    if cell.cell_type != "code":
        return found
    if len(cell.source.splitlines()) > MAX_LINES:
        found.append(f"more than {MAX_LINES} lines")
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if any(isinstance(node, kinds) for node in ast.walk(ast.parse(cell.source))):
        found.append("defines a function or a class; they belong in l2p_utils")
    if any(output.output_type == "error" for output in cell.outputs):
        found.append("an error among its outputs")
    return found


# ---------------------------------------------------------------- executing


def read_stored(name: str) -> NotebookNode:
    """The committed notebook `name` as it stands in notebooks/.

    Raises
    ------
    UserError
        When there is none.
    """
    path = NOTEBOOKS / f"{name}.ipynb"
    if not path.is_file():
        known = [*FROM_DATA, *FROM_SMOKE]
        raise UserError(f"There is no notebook {path.name}; expected one of {sorted(known)}.")
    return nbformat.read(path, as_version=4)


def execute_fresh(name: str, parameters: Mapping[str, Any] | None = None) -> NotebookNode:
    """Execute the notebook `name` in a temporary copy and normalise it.

    Raises
    ------
    UserError, NotebookError
        As `l2p_utils.execute.execute`.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / f"{name}.ipynb"
        execute(NOTEBOOKS / f"{name}.ipynb", output, dict(parameters or {}))
        return normalise(nbformat.read(output, as_version=4), parameters)


def update(name: str) -> None:
    """Execute the notebook `name` and store its outputs in place; on failure it stays as it was.

    Raises
    ------
    UserError, NotebookError
        When it fails, or is not fit to be committed (see `problems`).
    """
    fresh = execute_fresh(name, FROM_SMOKE.get(name))
    found = problems(fresh)
    if found:
        raise UserError(f"{name} was not stored:\n  " + "\n  ".join(found))
    with atomic_path(NOTEBOOKS / f"{name}.ipynb") as temporary:
        nbformat.write(fresh, temporary)


def stale(name: str) -> list[str]:
    """How the stored outputs of `name` (one of `FROM_DATA`) differ from a fresh execution's."""
    return differences(read_stored(name), execute_fresh(name))


def main(arguments: list[str] | None = None) -> int:
    """Execute the committed notebooks again and store their outputs, or only compare."""
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.committed", description=main.__doc__)
    known = sorted([*FROM_DATA, *FROM_SMOKE])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(known)}")
    parser.add_argument("--check", action="store_true", help="compare those made from data/")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"no committed notebook {', '.join(unknown)}; expected some of {known}")
    names = options.names or known
    try:
        if options.check:
            return _check([name for name in names if name in FROM_DATA])
        _update_all(names)
    except (UserError, NotebookError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _check(names: list[str]) -> int:
    failed = 0
    for name in names:
        found = stale(name)
        failed += bool(found)
        print(f"{name}: {'as stored' if not found else 'STALE'}", *found, sep="\n  ", flush=True)
    if failed:
        print(f"{failed} of {len(names)} are stale: `make notebooks` stores them anew.")
    return int(failed > 0)


def _update_all(names: list[str]) -> None:
    if set(names) & set(FROM_SMOKE):
        for name, parameters in BEFORE_SMOKE:
            about = parameters.get("collection") or parameters["model"]
            print(f"{name} ({about}): preparing", flush=True)
            execute_fresh(name, parameters)
    for name in names:
        update(name)
        print(f"{name}: stored", flush=True)


if __name__ == "__main__":
    sys.exit(main())
