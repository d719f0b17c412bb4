"""One notebook run headless: what it leaves when it succeeds, and when it fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from l2p_utils.execute import NotebookError, duration, execute, main, parse_parameters
from l2p_utils.files import UserError
from l2p_utils.report import report

ROOT = Path(__file__).parents[1]


def make_notebook(path, *sources, parameters="size = 2"):
    """A notebook with a title, a cell of parameters, then a cell for each of `sources`."""
    cells = [new_markdown_cell("# Title"), new_code_cell(parameters)]
    cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=cells + [new_code_cell(source) for source in sources]), path)
    return path


def text_outputs(path):
    """What the executed notebook's cells printed."""
    cells = nbformat.read(path, as_version=4).cells
    return [output.text.strip() for cell in cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("5e-5", 5e-5),
        ("True", True),
        ("None", None),
        ("docs:scipy", "docs:scipy"),
        ("1-6", "1-6"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_a_parameter_has_the_type_that_it_looks_like(text, value):
    parsed = parse_parameters([f"name={text}"])["name"]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("assignment", ["seed", "=3", "pool factor=3", ""])
def test_what_is_no_assignment_is_refused(assignment):
    with pytest.raises(UserError, match="name=value"):
        parse_parameters([assignment])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3675, "61 min 15 s")]
)
def test_a_duration_is_told_in_minutes_and_seconds(seconds, text):
    assert duration(seconds) == text


@pytest.fixture(scope="module")
def succeeded(tmp_path_factory):
    """The folder of one successful execution with size = 5."""
    folder = tmp_path_factory.mktemp("succeeded")
    sources = ["print(size)", "import os, sys; print(os.getcwd()); print(sys.executable)"]
    notebook = make_notebook(folder / "given.ipynb", "import l2p_utils", *sources)
    before = notebook.read_bytes()
    (folder / "out").mkdir()
    (folder / "out" / "job.failed.ipynb").write_text("of an earlier failure")
    (folder / "out" / ".job.123-abc.tmp.ipynb").write_text("half-written, of a killed execution")
    # A process of its own, as jobs have: the peak is of that process's kernel, no earlier child's.
    command = [sys.executable, "-m", "l2p_utils.execute", notebook, folder / "out" / "job.ipynb"]
    command += ["--log", folder / "logs" / "job.json", "--parameters", "size=5"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert notebook.read_bytes() == before
    return folder


def test_the_parameters_reach_the_cells(succeeded):
    assert text_outputs(succeeded / "out" / "job.ipynb")[0] == "5"


def test_the_kernel_is_this_interpreter_at_the_projects_root(succeeded):
    folder, interpreter = text_outputs(succeeded / "out" / "job.ipynb")[1].splitlines()
    assert (folder, interpreter) == (str(ROOT), sys.executable)


def test_a_page_lies_beside_the_notebook_and_nothing_else(succeeded):
    assert {path.name for path in (succeeded / "out").iterdir()} == {"job.ipynb", "job.html"}
    assert "<html" in (succeeded / "out" / "job.html").read_text("utf-8")


def test_the_log_tells_time_and_memory(succeeded):
    log = json.loads((succeeded / "logs" / "job.json").read_text("utf-8"))
    (entry,) = log["entries"]
    assert (log["job"], entry["status"]) == ("job", "done")
    assert 0 < entry["seconds"] < 120
    assert entry["start"] <= entry["end"]
    assert 20 < entry["peak_megabytes"] < 2000  # a kernel that imports next to nothing


def test_the_report_tells_where_things_are_and_how_long_they_took(tmp_path):
    for name, status, start, seconds in [
        ("02_training--a", "done", "10:00:00", 60),
        ("02_training--b", "done", "10:00:30", 90),
        ("08_claims", "failed", "10:05:00", 4),
    ]:
        end = {"10:00:00": "10:01:00", "10:00:30": "10:02:00", "10:05:00": "10:05:04"}[start]
        entry = {"status": status, "seconds": seconds, "peak_megabytes": 1500}
        entry |= {"start": f"2026-01-01T{start}+00:00", "end": f"2026-01-01T{end}+00:00"}
        (tmp_path / "logs").mkdir(exist_ok=True)
        log = {"job": name, "entries": [entry]}
        (tmp_path / "logs" / f"{name}.json").write_text(json.dumps(log))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "figure1.png").touch()
    lines = report(tmp_path).splitlines()
    assert " ".join(lines[1].split()) == "02_training 2 2 min 30 s 1 min 30 s 1.5 GB"
    assert "At work for 2 min 4 s" in report(tmp_path)  # 10:00:00–10:02:00 and 4 s
    assert any(line.startswith("figures") and str(tmp_path / "figures") in line for line in lines)
    assert lines[-1].strip() == f"{tmp_path}/notebooks/08_claims.failed.ipynb"


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="No notebook was run"):
        report(tmp_path)


@pytest.fixture(scope="module")
def failure(tmp_path_factory):
    """Folder and error of an execution whose second code cell fails after a first, good run."""
    folder = tmp_path_factory.mktemp("failure")
    sources = ["print('before')", "x = 1\nraise ValueError(f'size is {size}')", "print('after')"]
    notebook = make_notebook(folder / "given.ipynb", *sources)
    for stale in ("job.ipynb", "job.html"):
        (folder / stale).write_text("of an earlier success")
    with pytest.raises(NotebookError) as caught:
        execute(notebook, folder / "job.ipynb", {"size": 7}, folder / "log.json")
    return folder, str(caught.value)


def test_a_failure_names_notebook_and_cell_and_shows_source_and_error(failure):
    folder, message = failure
    assert f"cell 4 of {folder / 'given.ipynb'} failed" in message  # as the reader counts
    assert "    raise ValueError(f'size is {size}')" in message
    assert "ValueError: size is 7" in message
    assert "\x1b" not in message and "print('after')" not in message


def test_a_failure_keeps_what_was_executed_and_no_output(failure):
    folder, message = failure
    assert {path.name for path in folder.iterdir()} == {
        "given.ipynb",
        "job.failed.ipynb",
        "log.json",
    }
    assert str(folder / "job.failed.ipynb") in message
    cells = nbformat.read(folder / "job.failed.ipynb", as_version=4).cells
    assert any("before" in str(cell.get("outputs")) for cell in cells)
    assert json.loads((folder / "log.json").read_text())["entries"][0]["status"] == "failed"


def test_of_two_equal_cells_the_failed_one_is_named(tmp_path):
    cell = "size += 1\nassert size < 4"
    notebook = make_notebook(tmp_path / "given.ipynb", cell, cell)
    with pytest.raises(NotebookError, match="cell 4 of"):
        execute(notebook, tmp_path / "job.ipynb", {"size": 2})


def test_a_dead_kernel_is_told_with_the_cell_that_was_running(tmp_path):
    notebook = make_notebook(tmp_path / "given.ipynb", "1", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(NotebookError, match="(?s)cell 4 of.*os.getpid.*kernel died"):
        execute(notebook, tmp_path / "job.ipynb")
    assert not (tmp_path / "job.ipynb").exists()
    assert (tmp_path / "job.failed.ipynb").exists()


def test_a_missing_or_broken_notebook_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="There is no notebook .*missing.ipynb"):
        execute(tmp_path / "missing.ipynb", tmp_path / "out.ipynb")
    broken = tmp_path / "broken.ipynb"
    broken.write_text('{"cells": ')
    with pytest.raises(UserError, match="broken.ipynb is not a valid notebook"):
        execute(broken, tmp_path / "out.ipynb")
    assert main([str(broken), str(tmp_path / "out.ipynb")]) == 1
    assert "FAILED" in capsys.readouterr().out
    with pytest.raises(UserError, match="another file"):
        execute(broken, broken)


def start(tmp_path, prefix=""):
    """Start an execution that would sleep for a minute; return it once its kernel is at work."""
    sleeper = "import os, pathlib, time; here = pathlib.Path(folder, 'pid')\n"
    sleeper += "here.with_suffix('.new').write_text(str(os.getpid())); "
    sleeper += "here.with_suffix('.new').rename(here); time.sleep(60)"
    notebook = make_notebook(tmp_path / "given.ipynb", sleeper, parameters="folder = ''")
    command = f"{prefix} {sys.executable} -m l2p_utils.execute {notebook} {tmp_path}/job.ipynb"
    command += f" --stop-with-parent --parameters folder={tmp_path}"
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell's background job ignores interrupts, and so would all that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: (tmp_path / "pid").exists())
    return process, int((tmp_path / "pid").read_text())


def wait_for(condition, seconds=90):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.2)


def is_running(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_nothing_keeps_working_after_the_starting_process_was_killed(tmp_path):
    process, kernel = start(tmp_path, prefix=":;")  # bash stays, as the parent
    process.kill()
    process.wait()
    wait_for(lambda: not is_running(kernel))
    assert not (tmp_path / "job.ipynb").exists()


def test_an_interrupted_execution_ends_with_its_kernel(tmp_path):
    process, kernel = start(tmp_path, prefix="exec")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    wait_for(lambda: not is_running(kernel))
    assert not (tmp_path / "job.ipynb").exists()
