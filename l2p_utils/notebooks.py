"""Notebooks run headless: one job, a profile's plan and report, the copies stored in notebooks/.

``python -m l2p_utils.notebooks run NOTEBOOK OUTPUT.ipynb --parameters name=value …`` is a job;
``check``, ``plan`` and ``report`` take a profile; ``refresh`` stores the outputs again.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from l2p_utils.files import ROOT, UserError, atomic_path, command, remove
from l2p_utils.profile import HUB, Profile, load_profile

NOTEBOOKS = ROOT / "notebooks"
READING = [
    "04_inference_pooling", "05_pooling_aware", "06_cross_dataset", "07_beir_validation",
    "08_claims",
]  # fmt: skip
FROM_DATA = ["00_token_pooling", *READING, "10_speed", "11_frontier"]  # read data/, in seconds
FROM_QUICK = {  # copied from a finished run of quick; 09 is executed on it
    "01_data_mining": "01_data_mining--docs-scipy",
    "02_training": "02_training--docs-scipy-kmeans-pf1-6-s42",
    "03_evaluation": "03_evaluation--docs-scipy-kmeans-pf1-6-s42",
    "09_release": None,
}
OWN = ["12_your_documents"]  # takes minutes: executed where it is named
VISIBLE = "CUDA_VISIBLE_DEVICES"
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# Seconds per job of `quick` on two cores without bfloat16: what a plan goes by before anything ran.
SECONDS = {
    "mine": 220, "baseline": 720, "train": 550, "evaluate": 640, "read": 15, "token_pooling": 25,
}  # fmt: skip


class NotebookError(UserError):
    """A cell failed; the message names notebook and cell and shows source and traceback."""


# --- parameters -----------------------------------------------------------------------------------


def check_parameters(namespace: Mapping[str, Any], **known: type | tuple | Callable) -> None:
    """Refuse parameters that a notebook does not have, and values of the wrong kind.

    `namespace` is the notebook's ``globals()``; its ``In``, the cells run so far, holds the one
    that papermill injected: papermill only warns about an unknown name and runs the default.
    `known` has what each parameter must be: a type, a tuple of the values allowed, or a function
    that raises ValueError for a bad value.
    """
    injected = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")]
    names = re.findall(r"^(\w+) = ", "\n".join(injected[-1:]), re.M)
    problems = []
    if unknown := sorted(set(names) - set(known)):
        problems = [f"unknown: {', '.join(unknown)}. This notebook has: {', '.join(known)}."]
    for name, expected in known.items():
        value = namespace.get(name)
        try:
            _check_value(value, expected)
        except (ValueError, TypeError) as error:
            problems.append(f"{name} = {value!r}: {error}")
    if problems:
        raise UserError("Parameters refused, nothing was run:\n  " + "\n  ".join(problems))


def _check_value(value: Any, expected: type | tuple | Callable) -> None:
    if isinstance(expected, tuple):  # to Python 1 == True == 1.0
        if not any(type(value) is type(allowed) and value == allowed for allowed in expected):
            raise ValueError(f"expected one of {list(expected)}")
    elif isinstance(expected, type):  # to Python a bool is an int
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise ValueError(f"expected a value of type {expected.__name__}")
    else:
        expected(value)


def parse_parameters(assignments: list[str]) -> dict[str, Any]:
    """`["seed=42", "source=data"]` → `{"seed": 42, "source": "data"}`."""
    parameters = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"The parameter {assignment!r} was refused; expected name=value.")
        try:
            parameters[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parameters[name] = value
    return parameters


# --- one notebook ---------------------------------------------------------------------------------


def execute(
    notebook: str | Path, output: str | Path, parameters: Mapping[str, Any] | None = None
) -> None:
    """Run `notebook` with `parameters` in this interpreter's environment, from the project's root.

    `output` is the executed notebook, written in one step, with its HTML beside it. When a cell
    fails or the kernel dies (NotebookError), what was executed is kept as ``<output>.failed.ipynb``
    and `output` does not exist.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError

    notebook, output = Path(notebook).resolve(), Path(output).resolve()
    _check_job(notebook, output, parameters or {})
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel, not the user's
    failed, page = output.with_suffix(".failed.ipynb"), output.with_suffix(".html")
    with atomic_path(output) as temporary:
        try:
            executed = papermill.execute_notebook(
                notebook,
                temporary,
                parameters,
                kernel_name="python3",
                language="python",
                progress_bar={"desc": output.stem} if sys.stderr.isatty() else False,
                cwd=ROOT,
                extra_arguments=["--log-level=50"],  # of its own shutdown, as an error
            )
        except (papermill.PapermillExecutionError, DeadKernelError) as error:
            remove(output)
            remove(page)
            os.replace(temporary, failed)
            raise NotebookError(_explain(notebook, failed, error)) from error
        executed.metadata.papermill["output_path"] = str(output)  # not the temporary's name
        nbformat.write(executed, temporary)
        with atomic_path(page) as half_written:
            half_written.write_text(to_html(executed), "utf-8")
    remove(failed)


def _check_job(notebook: Path, output: Path, parameters: Mapping[str, Any]) -> None:
    import papermill

    if not notebook.is_file():
        raise UserError(f"There is no notebook {notebook}; expected one of notebooks/*.ipynb.")
    if output.suffix != ".ipynb" or output == notebook:
        raise UserError(f"The output {output} was refused; expected another file ending in .ipynb.")
    try:
        known = papermill.inspect_notebook(str(notebook))
    except Exception as error:  # several unrelated types for a broken file
        raise UserError(f"{notebook} is not a valid notebook: {error}") from error
    if unknown := sorted(set(parameters) - set(known)):
        raise UserError(
            f"{notebook.name} has no parameter {', '.join(unknown)}. It has: {', '.join(known)}."
        )


def to_html(executed: Any) -> str:
    """The notebook as a page; formulas become MathML, which browsers draw without a network."""
    from docutils.utils.math.latex2mathml import tex2mathml
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str) -> str:
            return tex2mathml(body)

        def block_math(self, body: str) -> str:
            return tex2mathml(body, as_block=True)

    def markdown_to_html(source: str) -> str:
        return MarkdownWithMath(renderer=Renderer(escape=False)).render(source)

    logging.getLogger("traitlets").setLevel(logging.ERROR)  # its advice on alt text
    return HTMLExporter(filters={"markdown2html": markdown_to_html}).from_notebook_node(executed)[0]


def _explain(notebook: Path, failed: Path, error: Exception) -> str:
    """The failed cell by its number in `notebook`, its source and what it raised."""
    import nbformat

    cells = nbformat.read(failed, as_version=4).cells
    cells = [cell for cell in cells if "papermill-error-cell-tag" not in _tags(cell)]
    if hasattr(error, "cell_index"):
        index = error.cell_index
        reason = ANSI.sub("", "\n".join(error.traceback)) or f"{error.ename}: {error.evalue}"
    else:
        states = [cell.metadata.get("papermill", {}).get("status") for cell in cells]
        index = max(n for n, state in enumerate(states) if state != "pending")
        reason = "The kernel died: stopped from outside, or out of memory."
    number = 1 + sum("injected-parameters" not in _tags(cell) for cell in cells[:index])
    source = "\n".join(f"    {line}" for line in cells[index].source.splitlines())
    short = os.path.relpath(failed)
    return f"cell {number} of {notebook} failed:\n{source}\n\n{reason}\n\nExecuted so far: {short}"


def _tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def hold_gpus(count: int) -> list[Any]:
    """Show this process and its children `count` free GPUs, and hold them until it ends.

    Snakemake counts the GPUs that its jobs use but does not tell them apart. Where as many are
    visible as are asked for, as in a Slurm job, or none at all, there is no choice.
    """
    import torch
    from filelock import FileLock, Timeout

    if not count:
        os.environ[VISIBLE] = ""  # they belong to other jobs
        return []
    names = list(filter(None, os.environ.get(VISIBLE, "").split(",")))
    names = names or [str(number) for number in range(torch.cuda.device_count())]
    if len(names) <= count:
        return []
    folder = Path(tempfile.gettempdir(), f"l2p-gpus-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    while True:
        held: dict[str, FileLock] = {}
        for name in names:
            lock = FileLock(folder / name, timeout=0)
            with contextlib.suppress(Timeout):
                lock.acquire()
                held[name] = lock
            if len(held) == count:
                os.environ[VISIBLE] = ",".join(held)
                return list(held.values())
        for lock in held.values():
            lock.release()
        time.sleep(1)


def _run(options: argparse.Namespace) -> None:
    if options.end_with_parent:  # the next run must not meet this one still at work
        from ipykernel.parentpoller import ParentPollerUnix

        ParentPollerUnix(os.getppid()).start()
    name, start = options.output.stem, time.time()
    gpus = [] if options.gpus is None else hold_gpus(options.gpus)
    print(f"{name}: started", flush=True)
    try:
        execute(options.notebook, options.output, parse_parameters(options.parameters))
    except UserError as error:
        failed = f"{name}: FAILED after {duration(time.time() - start)}"
        raise UserError(f"{failed}\n{error}\n") from error
    finally:
        for lock in gpus:
            lock.release()
    done = [p for p in options.output.parent.glob("[!.]*.ipynb") if ".failed" not in p.name]
    count = f" ({len(done)} of {options.of} notebooks)" if options.of else ""
    page = os.path.relpath(options.output.with_suffix(".html"))
    print(f"{name}: done in {duration(time.time() - start)}{count}: {page}", flush=True)


# --- a profile: data, plan, report ----------------------------------------------------------------


def duration(seconds: float) -> str:
    """`75` → `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def check_data(profile: Profile) -> None:
    """Load every split that the profile's jobs read, but what the hub has not brought yet.

    A missing folder, a missing split and broken judgments are refused, all at once.
    """
    from l2p_utils.collection import carves_dev, load_collection

    splits: list[tuple] = []
    for name in profile.fitted_collections:
        how = profile.mining.text_only, carves_dev(profile, name)
        other = profile.dev_collections.get(name)
        splits += [(name, "train", *how), (other,) if other else (name, "dev", *how)]
    splits += [(name,) for name in profile.measured_collections]
    fetched = (profile.folder / "fetched.json").exists()
    problems: dict[str, None] = {}  # each once, in their order
    for name, *rest in splits:
        try:
            if fetched or not name.startswith(HUB):
                load_collection(name, *rest)
        except UserError as error:
            problems[str(error)] = None
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(f"The data of {profile.name} were refused, nothing was run:\n  {listed}")


def plan(profile: Profile, name: str, have: str = "") -> str:
    """Jobs per stage of the profile (`name` as the user gave it): all, still to do, how long.

    Models whose rows are in the folder `have` need not be made; the others are named.
    """
    jobs = {
        "fetch": int(profile.needs_hub),
        "mine": len(profile.training_collections),
        "baseline": len(profile.baselines),
        "train": len(profile.runs),
        "evaluate": len(profile.evaluated_names),
        "read": len(READING),
        "token_pooling": 1,
    }
    command = ["-m", "snakemake", "-n", "--cores", "1", "--nolock", "--config", f"profile={name}"]
    command += [f"have={have}"] if have else []
    shown = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if shown.returncode:
        raise UserError(shown.stdout + shown.stderr)
    left = {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", shown.stdout, re.M)}
    row, total, timings = "{:<14} {:>5} {:>6} {:>6}   {}".format, 0.0, _timings(profile)
    lines = [row("stage", "jobs", "done", "to do", "about")]
    for stage, count in jobs.items():
        todo, before = left.get(stage, 0), [seconds for seconds, *_ in timings.get(stage, [])]
        guess = 0 if profile.needs_hub else SECONDS.get(stage, 0)
        seconds = todo * (sum(before) / len(before) if before else guess)
        total += seconds
        if count:
            about = duration(seconds) if seconds else "?" if todo else ""
            lines.append(row(stage, count, count - todo, todo, about))
    if total:
        lines.append(f"In all {duration(total)}, one job at a time.")
    if have:
        stored = {path.stem for path in Path(have, "rows").glob("*.parquet")}
        lacking = [model for model in profile.evaluated_names if model not in stored]
        lines.append(f"Not in {have}: {', '.join(lacking) or 'none'}.")
    return "\n".join(lines)


def _timings(profile: Profile) -> dict[str, list[tuple[float, float, float]]]:
    """By stage each job's last run, as Snakemake's `benchmark:` noted it: seconds, MB, its end."""
    found = defaultdict(list)
    for path in sorted(profile.folder.glob("logs/*/*.tsv")):
        with path.open() as file:
            entry = next(csv.DictReader(file, delimiter="\t"), None)
        if entry is None:  # a job was killed while it was written
            continue
        memory = 0.0 if entry["max_rss"] in ("NA", "-") else float(entry["max_rss"])
        found[path.parent.name].append((float(entry["s"]), memory, path.stat().st_mtime))
    return found


def report(profile: Profile) -> str:
    """A run as text: how long each stage took, where things are, which jobs failed."""
    folder, timings = profile.folder, _timings(profile)
    failed = sorted(folder.glob("notebooks/*.failed.ipynb"))
    if not timings and not failed:
        raise UserError(f"Nothing was run in {os.path.relpath(folder)}. Try `make run`.")
    row = "{:<20} {:>5} {:>13} {:>13} {:>9}".format
    lines = [row("stage", "jobs", "total", "longest", "memory")]
    for stage in filter(timings.get, ["fetch", *SECONDS]):
        seconds, memory, _ = zip(*timings[stage], strict=True)
        times = (duration(sum(seconds)), duration(max(seconds)))
        lines.append(row(stage, len(seconds), *times, f"{max(memory) / 1000:.1f} GB"))
    busy = until = 0.0
    for start, end in sorted((end - s, end) for jobs in timings.values() for s, _, end in jobs):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    lines += ["", f"Busy for {duration(busy)}; jobs side by side count once.", ""]
    for what, pattern in {
        "executed notebooks": "notebooks/*.html",
        "result rows": "results/rows/*.parquet",
        "figures, tables": "figures/*.png",
    }.items():
        if found := list(folder.glob(pattern)):
            lines.append(f"{what:<20} {os.path.relpath(folder / pattern)}  ({len(found)})")
    if failed:
        lines += ["", "FAILED (errors above; what depends on them was not run):"]
        lines += [f"  {os.path.relpath(path)}" for path in failed]
    return "\n".join(lines)


# --- the notebooks in notebooks/, stored with their outputs ---------------------------------------


def normalise(executed: Any) -> Any:
    """What of an executed notebook is stored: equal for executions that show the same.

    Gone are papermill's cells and times, standard error, progress bars and widgets, colour codes,
    addresses and this machine's folders. Parameters other than the notebook's own are named in an
    output of their cell.
    """
    import nbformat

    injected = [cell for cell in executed.cells if "injected-parameters" in _tags(cell)]
    cells, count = [], 0
    for cell in executed.cells:
        if {"injected-parameters", "papermill-error-cell-tag"} & set(_tags(cell)):
            continue
        kept = {key: cell[key] for key in ("id", "cell_type", "source")}
        kept["metadata"] = {"tags": _tags(cell)} if _tags(cell) else {}
        if cell.cell_type == "code":
            count += 1
            kept |= {"execution_count": count, "outputs": list(_outputs(cell.outputs, count))}
            if "parameters" in _tags(cell) and injected:
                kept["outputs"] = _changed(cell.source, injected[0].source)
        cells.append(kept)
    spec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": spec, "language_info": {"name": "python"}}
    return nbformat.from_dict(
        {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells}
    )


def _changed(own: str, injected: str) -> list[dict[str, Any]]:
    """An output that names the injected parameters that are not the notebook's own."""
    new = [line for line in injected.splitlines()[1:] if line and line not in own.splitlines()]
    text = "*The outputs below were made with* " + ", ".join(f"`{line}`" for line in new) + "."
    data = {"text/markdown": text, "text/plain": "<IPython.core.display.Markdown object>"}
    return [{"output_type": "display_data", "data": data, "metadata": {}}] if new else []


def _outputs(outputs: list[Any], count: int) -> Iterator[dict[str, Any]]:
    printed = "".join(_clean(o.text) for o in outputs if o.get("name") == "stdout")
    for output in outputs:
        if output.output_type == "stream":  # split where the kernel flushed
            if output.name == "stdout" and printed:
                yield {"output_type": "stream", "name": "stdout", "text": printed}
                printed = ""
            continue
        data = {k: _clean(v) if k.startswith("text/") else v for k, v in output.data.items()}
        if "<progress" in data.get("text/html", "") or any("widget-view" in kind for kind in data):
            continue
        fixed = {"output_type": output.output_type, "data": data}
        fixed["metadata"] = output.metadata  # alt text
        if output.output_type == "execute_result":
            fixed["execution_count"] = count
        yield fixed


def _clean(text: str) -> str:
    """Text without what belongs to one machine or one moment."""
    text = re.sub(r"[^\n]*\r(?!\n)", "", ANSI.sub("", text))  # what a carriage return overwrites
    text = text.replace(f"{ROOT}/", "").replace(str(ROOT), ".").replace(str(Path.home()), "~")
    return re.sub(r"\bT_[0-9a-f]{5}\b", "T_table", re.sub(r"\b0x[0-9a-f]{6,}\b", "0x…", text))


def execute_fresh(name: str) -> Any:
    """Execute notebooks/`name` with its own parameters; the normalised result."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        execute(NOTEBOOKS / f"{name}.ipynb", Path(folder) / "fresh.ipynb")
        return normalise(nbformat.read(Path(folder) / "fresh.ipynb", as_version=4))


def refresh(names: list[str]) -> None:
    """Store the outputs of notebooks anew: from data/, and from the run of `quick` if finished."""
    import nbformat

    known = [*FROM_DATA, *FROM_QUICK, *OWN]
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"There is no notebook {', '.join(unknown)}; expected some of {known}.")
    quick = load_profile("quick")
    whole = (quick.folder / "notebooks" / "08_claims.ipynb").exists()
    for name in names or sorted({*known} - {*OWN}):
        if name in FROM_QUICK and not whole:
            print(f"{name}: left as it is; it takes a finished `make run`", flush=True)
            continue
        if source := FROM_QUICK.get(name):
            path = quick.folder / "notebooks" / f"{source}.ipynb"
            fresh = normalise(nbformat.read(path, as_version=4))
        else:
            fresh = execute_fresh(name)
        with atomic_path(NOTEBOOKS / f"{name}.ipynb") as temporary:
            nbformat.write(fresh, temporary)
        print(f"{name}: stored", flush=True)


@command
def main(arguments: list[str] | None = None) -> None:
    """Run one notebook; check, plan or report a profile's run; refresh the stored notebooks."""
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.notebooks", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run one notebook")
    run.add_argument("notebook", type=Path)
    run.add_argument("output", type=Path, help="the executed notebook (.ipynb)")
    run.add_argument("--parameters", nargs="*", default=[], metavar="NAME=VALUE")
    run.add_argument("--gpus", type=int, help="show the notebook so many free GPUs; default: all")
    run.add_argument("--of", type=int, help="how many notebooks OUTPUT's folder will hold")
    run.add_argument("--end-with-parent", action="store_true")
    for name, text in {
        "check": "check a profile and its data",
        "plan": "check it and show its jobs",
        "report": "show what its run made",
    }.items():
        about = commands.add_parser(name, help=text)
        about.add_argument("profile")
        about.add_argument("--have", default="", help="rows that need not be made again")
    commands.add_parser("refresh", help="store outputs again").add_argument("names", nargs="*")
    options = parser.parse_args(arguments)
    if options.command == "run":
        _run(options)
    elif options.command == "refresh":
        refresh(options.names)
    elif options.command == "report":
        print("\n" + report(load_profile(options.profile)))
    else:
        profile = load_profile(options.profile)
        check_data(profile)
        if options.command == "plan":
            print(plan(profile, options.profile, options.have))


if __name__ == "__main__":
    sys.exit(main())
