"""One notebook, run headless: executed copy, HTML, log of time and memory; or a readable error.

Takes a notebook and its parameters; gives OUTPUT.ipynb, OUTPUT.html and a log entry.
``python -m l2p_utils.execute NOTEBOOK OUTPUT.ipynb --log LOG.json --parameters name=value …``
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import re
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError

from l2p_utils.files import UserError, atomic_path, read_json, remove, write_json

ROOT = Path(__file__).parent.parent
KERNEL = "python3"
PARAMETERS, ERROR_MARKER = "injected-parameters", "papermill-error-cell-tag"  # papermill's cells
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
KEPT_ENTRIES = 20


class NotebookError(Exception):
    """A cell failed; the message names the notebook and the cell and holds source and traceback."""


def execute(
    notebook: str | Path,
    output: str | Path,
    parameters: dict[str, Any] | None = None,
    log: str | Path | None = None,
) -> None:
    """Run `notebook` with `parameters` in this interpreter's environment, from the project's root.

    Parameters
    ----------
    notebook
        The notebook to run; it is not changed.
    output
        Where the executed notebook goes (written in one step); its HTML goes beside it.
    parameters
        Values for the cell tagged ``parameters``. papermill itself accepts any name: notebooks
        refuse those that they do not know (`l2p_utils.parameters`).
    log
        JSON file that gets one entry more: status, start and end (UTC), seconds, peak memory.

    Raises
    ------
    UserError
        When `notebook` is not there or is no notebook.
    NotebookError
        When a cell fails or the kernel dies. What was executed is kept as ``<output>.failed.ipynb``
        and `output` does not exist afterwards.
    """
    notebook, output = Path(notebook).resolve(), Path(output).resolve()
    log = log and Path(log).resolve()
    _check(notebook, output)
    started = time.time()
    status = "failed"
    try:
        _run(notebook, output, parameters or {})
        status = "done"
    finally:
        if log:
            _write_entry(log, output, status, started)


def parse_parameters(assignments: list[str]) -> dict[str, Any]:
    """`["seed=42"]` → `{"seed": 42}`, with the types that ``papermill -p`` gives.

    Raises
    ------
    UserError
        For anything that is not ``name=value``.
    """
    parameters = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"The parameter {assignment!r} was refused; expected name=value.")
        parameters[name] = _typed(value)
    return parameters


def duration(seconds: float) -> str:
    """`75` → `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def main(arguments: list[str] | None = None) -> int:
    """Run one notebook from the command line; see the module's first lines."""
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.execute", description=main.__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("output", type=Path, help="the executed notebook (.ipynb)")
    parser.add_argument("--log", type=Path, help="JSON file for time and memory")
    parser.add_argument("--parameters", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--stop-with-parent", action="store_true", help="end as soon as the starting process ends"
    )
    parser.add_argument("--of", type=int, help="how many notebooks OUTPUT's folder will hold")
    options = parser.parse_args(arguments)
    if options.stop_with_parent:
        threading.Thread(target=_stop_with_parent, args=(os.getppid(),), daemon=True).start()
    name, start = options.output.stem, time.time()
    _say(f"{name}: started")
    try:
        execute(options.notebook, options.output, parse_parameters(options.parameters), options.log)
    except (UserError, NotebookError) as error:
        _say(f"{name}: FAILED after {duration(time.time() - start)}\n{error}\n")
        return 1
    took = f"done in {duration(time.time() - start)}, peak {_peak_megabytes() / 1000:.1f} GB"
    _say(f"{name}: {took}{_progress(options.output.parent, options.of)}")
    return 0


def _check(notebook: Path, output: Path) -> None:
    if not notebook.is_file():
        raise UserError(f"There is no notebook {notebook}; expected one of notebooks/*.ipynb.")
    if output.suffix != ".ipynb" or output == notebook:
        raise UserError(f"The output {output} was refused; expected another file ending in .ipynb.")
    try:
        nbformat.read(notebook, as_version=4)
    except Exception as error:  # nbformat raises several unrelated types for a broken file
        raise UserError(f"{notebook} is not a valid notebook: {error}") from error


def _run(notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
    failed = output.with_suffix(".failed.ipynb")
    for half_written in output.parent.glob(f".{output.stem}.*.tmp.*"):  # by an execution killed
        remove(half_written)
    with atomic_path(output) as temporary, _own_kernel():
        try:
            executed = papermill.execute_notebook(
                notebook,
                temporary,
                parameters,
                kernel_name=KERNEL,
                language="python",
                progress_bar={"desc": output.stem} if sys.stderr.isatty() else False,
                cwd=ROOT,
            )
        except (papermill.PapermillExecutionError, DeadKernelError) as error:
            for stale in (output, output.with_suffix(".html")):
                remove(stale)
            os.replace(temporary, failed)
            raise NotebookError(_explain(notebook, failed, error)) from error
        # papermill noted the temporary name
        executed.metadata.papermill["output_path"] = str(output)
        nbformat.write(executed, temporary)
        _write_html(executed, output.with_suffix(".html"))
    remove(failed)


@contextmanager
def _own_kernel() -> Iterator[None]:
    """Let `python3` be this interpreter, whatever kernels the user has installed elsewhere."""
    from ipykernel.kernelspec import write_kernel_spec

    before = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory() as folder:
        # quiet: it warns that the connection, which stays on this machine, is not encrypted, and
        # reports its own shutdown as an error
        write_kernel_spec(Path(folder) / "kernels" / KERNEL, extra_arguments=["--log-level=50"])
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, before]))
        try:
            yield
        finally:
            del os.environ["JUPYTER_PATH"]
            if before is not None:
                os.environ["JUPYTER_PATH"] = before


def _write_html(executed: nbformat.NotebookNode, path: Path) -> None:
    from nbconvert import HTMLExporter

    logging.getLogger("traitlets").setLevel(logging.ERROR)  # warns of pictures without alt text
    page, _ = HTMLExporter().from_notebook_node(executed)
    with atomic_path(path) as temporary:
        temporary.write_text(page, "utf-8")


def _explain(notebook: Path, failed: Path, error: Exception) -> str:
    """The failed cell by its number in `notebook`, its source and what it raised."""
    cells = nbformat.read(failed, as_version=4).cells
    tags = [cell.metadata.get("tags", []) for cell in cells]
    cells = [cell for cell, of in zip(cells, tags, strict=True) if ERROR_MARKER not in of]
    if isinstance(error, DeadKernelError):
        states = [cell.metadata.get("papermill", {}).get("status") for cell in cells]
        index = max(n for n, state in enumerate(states) if state != "pending")
        reason = "The kernel died: stopped from outside, or out of memory."
    else:
        index = error.cell_index
        reason = ANSI.sub("", "\n".join(error.traceback)) or f"{error.ename}: {error.evalue}"
    source = cells[index].source
    number = sum(PARAMETERS not in cell.metadata.get("tags", []) for cell in cells[:index])
    where = f"cell {number + 1} of {_short(notebook)}"
    indented = "\n".join(f"    {line}" for line in source.splitlines())
    return f"{where} failed:\n{indented}\n\n{reason}\n\nExecuted so far: {_short(failed)}"


def _write_entry(log: Path, output: Path, status: str, started: float) -> None:
    ended = time.time()
    entries = read_json(log)["entries"] if log.is_file() else []
    entries.append(
        {
            "status": status,
            "start": _timestamp(started),
            "end": _timestamp(ended),
            "seconds": round(ended - started, 1),
            "peak_megabytes": round(_peak_megabytes()),
        }
    )
    write_json(log, {"job": output.stem, "entries": entries[-KEPT_ENTRIES:]})


def _timestamp(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _peak_megabytes() -> float:
    """The most memory that the kernel held.

    It is the largest of this process's children that have ended: right in a process that executes
    one notebook, as jobs do, and an upper bound in one that started others before.
    """
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes on macOS, kB on Linux


def _progress(folder: Path, total: int | None) -> str:
    done = [path for path in folder.glob("[!.]*.ipynb") if not path.stem.endswith(".failed")]
    return f" ({len(done)} of {total} notebooks are there)" if total else ""


def _typed(value: str) -> Any:
    constants = {"True": True, "False": False, "None": None}
    if value in constants:
        return constants[value]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _stop_with_parent(parent: int) -> None:
    """End when `parent` does (killed, say): the next run must not meet this one still at work.

    The kernel watches its own parent in the same way and ends a second later.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
