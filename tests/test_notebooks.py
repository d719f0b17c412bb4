"""Notebooks run headless: parameters, one execution, plan and report, the stored copies."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from l2p_utils import notebooks
from l2p_utils.files import ROOT, UserError
from l2p_utils.notebooks import (
    FROM_DATA,
    NotebookError,
    check_data,
    check_parameters,
    duration,
    execute,
    execute_fresh,
    hold_gpus,
    main,
    normalise,
    parse_parameters,
    report,
    to_html,
)
from l2p_utils.profile import load_profile, parse_factors

KERNEL = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
STORED = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def make_notebook(path, *sources, parameters="size = 2"):
    """A notebook with a title, a cell of parameters, then a cell for each of `sources`."""
    cells = [new_markdown_cell("# Title"), new_code_cell(parameters)]
    cells[1].metadata["tags"] = ["parameters"]
    cells += [new_code_cell(source) for source in sources]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), path)
    return path


# --- parameters -----------------------------------------------------------------------------------


def check(*cells, known=None, **values):
    """Run the check after `cells`, in a namespace that holds `values`."""
    namespace = {"profile": "quick", "seed": 42, "In": ["", *cells], **values}
    check_parameters(namespace, **(known or {"profile": str, "seed": int}))


def test_known_names_and_a_readers_own_cells_raise_no_alarm():
    check('profile = "quick"', '# Parameters\nprofile = "smoke"\n', profile="smoke")
    check("limit = 10", "x = y\nfor i in range(3): pass", "%matplotlib inline")


@pytest.mark.parametrize(
    ("expected", "good", "bad", "message"),
    [
        (str, "quick", 3, "x = 3: .*type str"),
        (int, 42, "42", "x = '42': .*type int"),
        (int, 42, 1.0, "x = 1.0: .*type int"),
        (int, 42, True, "x = True: .*type int"),
        (int, 42, None, "x = None: .*type int"),
        (bool, False, 0, "x = 0: .*type bool"),
        (("none", "kmeans"), "none", "means", r"x = 'means': expected one of \['none', 'kmeans'\]"),
        ((1, 2), 2, True, "x = True"),
        (parse_factors, "1-6", "two", "x = 'two': .*whole number"),
    ],
)
def test_a_type_a_tuple_and_a_function_say_what_they_allow(expected, good, bad, message):
    check(known={"x": expected}, x=good)
    with pytest.raises(UserError, match=message):
        check(known={"x": expected}, x=bad)


def test_unknown_names_and_all_other_problems_are_named_at_once():
    with pytest.raises(UserError) as refused:
        check("x = 0", "# Parameters\nx = {'a': [1, -2.5]}\nseed = 'a'\ny = 2", profile=1, seed="a")
    unknown = "unknown: x, y. This notebook has: profile, seed"
    for problem in (unknown, "profile = 1", "seed = 'a'", "nothing was run"):
        assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("42", 42), ("5e-5", 5e-5), ("True", True), ("None", None), ("docs:scipy", "docs:scipy")]
    + [("1-6", "1-6"), ("2+4", "2+4"), ("a=b", "a=b"), ("", ""), ("合同 v1", "合同 v1")],
)
def test_a_parameter_has_the_type_that_it_looks_like(text, value):
    parsed = parse_parameters([f"name={text}"])["name"]
    assert parsed == value and type(parsed) is type(value)


def test_what_is_no_assignment_is_refused():
    for assignment in ("seed", "=3", "pool factor=3", ""):
        with pytest.raises(UserError, match="name=value"):
            parse_parameters([assignment])


# --- one execution --------------------------------------------------------------------------------


def test_a_job_leaves_the_executed_notebook_and_its_page(tmp_path):
    sources = ["print(size)", "import os, sys; print(os.getcwd()); print(sys.executable)"]
    notebook = make_notebook(tmp_path / "given.ipynb", *sources)
    before, output = notebook.read_bytes(), tmp_path / "out" / "job.ipynb"
    output.parent.mkdir()
    (tmp_path / "out" / "job.failed.ipynb").write_text("of an earlier failure")
    assert main(["run", str(notebook), str(output), "--of", "3", "--parameters", "size=5"]) == 0
    cells = nbformat.read(output, as_version=4).cells
    printed = [o.text for cell in cells for o in cell.get("outputs", [])]
    assert printed == ["5\n", f"{ROOT}\n{sys.executable}\n"]
    assert {path.name for path in output.parent.iterdir()} == {"job.ipynb", "job.html"}
    assert "<html" in output.with_suffix(".html").read_text("utf-8")
    assert notebook.read_bytes() == before


def test_a_failure_names_the_cell_and_keeps_what_was_executed(tmp_path):
    cell = "size += 1\nassert size < 9, f'size is {size}'"
    notebook = make_notebook(tmp_path / "given.ipynb", "print('before')", cell, cell, "'after'")
    for stale in ("job.ipynb", "job.html"):
        (tmp_path / stale).write_text("of an earlier success")
    with pytest.raises(NotebookError) as caught:
        execute(notebook, tmp_path / "job.ipynb", {"size": 7})
    message = str(caught.value)
    assert f"cell 5 of {notebook} failed" in message  # as the reader counts
    assert "    assert size < 9" in message and "AssertionError: size is 9" in message
    assert "\x1b" not in message and "after" not in message
    assert {path.name for path in tmp_path.iterdir()} == {"given.ipynb", "job.failed.ipynb"}
    assert "before" in (tmp_path / "job.failed.ipynb").read_text()


def test_a_dead_kernel_is_reported_with_the_cell_that_was_running(tmp_path):
    notebook = make_notebook(tmp_path / "given.ipynb", "1", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(NotebookError, match="(?s)cell 4 of.*os.getpid.*kernel died"):
        execute(notebook, tmp_path / "job.ipynb")
    assert not (tmp_path / "job.ipynb").exists() and (tmp_path / "job.failed.ipynb").exists()


def test_what_cannot_run_is_refused_before_a_kernel_starts(tmp_path, capsys):
    notebook = make_notebook(tmp_path / "given.ipynb")
    with pytest.raises(UserError, match="no parameter sise. It has: size"):
        execute(notebook, tmp_path / "out.ipynb", {"sise": 3})
    with pytest.raises(UserError, match="There is no notebook .*missing.ipynb"):
        execute(tmp_path / "missing.ipynb", tmp_path / "out.ipynb")
    with pytest.raises(UserError, match="another file"):
        execute(notebook, notebook)
    notebook.write_text('{"cells": ')
    assert main(["run", str(notebook), str(tmp_path / "out.ipynb")]) == 1
    assert "given.ipynb is not a valid notebook" in capsys.readouterr().err


def test_formulas_of_a_page_need_no_network():
    formula = r"$\mathrm{MaxSim}(q, d) = \sum_i \max_j q_i \cdot d_j$"
    page = to_html(new_notebook(cells=[new_markdown_cell(f"Inline {formula}, and ${formula}$")]))
    assert page.count("<math") == 2 and "<mi>MaxSim</mi>" in page and r"\sum" not in page
    for name in STORED:
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
        assert "\\sum" not in to_html(new_notebook(cells=cells))


def test_a_job_ends_with_the_process_that_started_it(tmp_path):
    sleep = "import os, pathlib, time; pathlib.Path(folder, 'new').write_text(str(os.getpid()))\n"
    sleep += "pathlib.Path(folder, 'new').rename(pathlib.Path(folder, 'pid')); time.sleep(60)"
    notebook = make_notebook(tmp_path / "given.ipynb", sleep, parameters="folder = ''")
    command = f":; {sys.executable} -m l2p_utils.notebooks run {notebook} {tmp_path}/job.ipynb"
    command += f" --end-with-parent --parameters folder={tmp_path}"
    shell = subprocess.Popen(["bash", "-c", f"{command}; :"], cwd=ROOT)  # stays, as the parent
    wait_for(lambda: (tmp_path / "pid").exists())
    kernel = Path("/proc", (tmp_path / "pid").read_text())
    assert kernel.exists()
    os.kill(shell.pid, signal.SIGKILL)
    shell.wait()
    wait_for(lambda: not kernel.exists())
    assert not (tmp_path / "job.ipynb").exists()


def wait_for(condition, seconds=90):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.1)


def test_each_job_gets_gpus_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv(notebooks.VISIBLE, "2,3,5")
    locks = []
    for count, given in ((2, "2,3"), (1, "5"), (1, "3")):
        os.environ[notebooks.VISIBLE] = "2,3,5"
        locks += hold_gpus(count)
        assert os.environ[notebooks.VISIBLE] == given
        if given == "5":
            locks[1].release()  # of 3
    for lock in locks:
        lock.release()
    assert hold_gpus(1) == []  # the one that is visible
    hold_gpus(0)
    assert os.environ[notebooks.VISIBLE] == ""


# --- a profile ------------------------------------------------------------------------------------

OWN = """
description: a collection of one's own
model: {}
mining: {}
adaptation: {}
training: {}
runs: [{collection: FOLDER, pool_method: kmeans, pool_factors: 2}]
evaluation: {collections: [FOLDER]}
"""


@pytest.fixture
def own(tmp_path):
    """A profile in a file `my own.yaml`, of a folder whose name has no Latin letter but one."""
    folder = tmp_path / "合同 v1"
    (folder / "qrels").mkdir(parents=True)
    for kind, count in {"corpus": 6, "queries": 6}.items():
        lines = [f'{{"_id": "{kind[0]}{n}", "text": "{kind} text {n}"}}' for n in range(count)]
        (folder / f"{kind}.jsonl").write_text("\n".join(lines))
    for split, numbers in {"train": [0, 1, 2], "dev": [3], "test": [4, 5]}.items():
        lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\tc{n}\t1" for n in numbers)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines))
    path = tmp_path / "my own.yaml"
    path.write_text(OWN.replace("FOLDER", f'"{folder}"'), "utf-8")
    return path, folder


def test_the_data_of_a_folder_are_looked_at_before_anything_runs(own, capsys):
    path, folder = own
    check_data(load_profile(path))
    (folder / "qrels" / "train.tsv").unlink()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq4\tunknown\t1\n")
    for command in ("check", "plan"):
        assert main([command, str(path)]) == 1
        said = capsys.readouterr().err
        assert "nothing was run" in said and "no split 'train'" in said and "unknown" in said
    shutil.rmtree(folder)
    assert main(["check", str(path)]) == 1
    assert str(folder) in capsys.readouterr().err


def test_a_dev_split_without_texts_is_seen_before_anything_runs(own):
    path, folder = own
    corpus = folder / "corpus.jsonl"
    lines = corpus.read_text().splitlines()
    lines[3] = '{"_id": "c3", "title": "All there is", "text": ""}'  # what dev is judged by
    corpus.write_text("\n".join(lines))
    profile = load_profile(path)
    check_data(profile)
    text_only = profile.mining.model_copy(update={"text_only": True})
    with pytest.raises(UserError, match="nothing was run"):
        check_data(profile.model_copy(update={"mining": text_only}))


def test_the_plan_is_a_table(own, capsys):
    assert main(["plan", str(own[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:4] for line in lines}
    assert rows["mine"] == rows["train"] == rows["baseline"] == ["1", "0", "1"]
    assert rows["evaluate"] == ["2", "0", "2"] and rows["read"] == ["5", "0", "5"]
    assert len(lines) < 12 and "fetch" not in rows and "In all" in lines[-1]


def write_timing(folder, job, seconds, end, memory="1500.0"):
    path = folder / "logs" / f"{job}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:01:00\t{memory}\n")
    os.utime(path, (end, end))


def test_the_report_shows_where_things_are_and_how_long_they_took(tmp_path):
    run = SimpleNamespace(folder=tmp_path)
    with pytest.raises(UserError, match="Nothing was run"):
        report(run)
    write_timing(tmp_path, "read/08_claims", 4, 1304, "NA")
    write_timing(tmp_path, "train/a", 60, 1060)
    write_timing(tmp_path, "train/b", 90, 1120)
    (tmp_path / "logs" / "train" / "killed.tsv").touch()
    for name in ("figures/figure1.png", "notebooks/08_claims.failed.ipynb"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    lines = report(run).splitlines()
    assert " ".join(lines[1].split()) == "train 2 2 min 30 s 1 min 30 s 1.5 GB"
    assert "Busy for 2 min 4 s; jobs side by side count once." in lines  # 1000–1120, and 4 s
    assert any(line.startswith("figures") and line.endswith("(1)") for line in lines)
    assert lines[-1].strip().endswith("08_claims.failed.ipynb")


def test_a_duration_is_in_minutes_and_seconds():
    assert [duration(s) for s in (0.2, 59.6, 3675)] == ["0 s", "1 min 0 s", "61 min 15 s"]


# --- what is stored -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FROM_DATA)
def test_stored_outputs_are_those_of_a_fresh_execution(name):
    stored = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    cells = zip(stored.cells, execute_fresh(name).cells, strict=True)
    stale = [old.id for old, new in cells if text_outputs(old) != text_outputs(new)]
    assert not stale, f"{name} is stale, `make notebooks` stores it anew"


@pytest.mark.parametrize("name", STORED)
def test_a_stored_notebook_is_fit_to_be_read(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    assert "**Question.**" in notebook.cells[0].source
    assert [_tags(cell) for cell in notebook.cells].count(["parameters"]) == 1
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in notebook.cells:
        text = cell.source + "\n".join(text_outputs(cell))
        assert not re.search(r"(?<![\w.:/-])/(?:home|Users|root|tmp|var|mnt|opt|work)/\w", text)
    for cell in code:
        assert len(cell.source.splitlines()) <= 20
        assert all(output.output_type != "error" for output in cell.outputs)
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef)
            if isinstance(node, ast.FunctionDef):  # a definition that the notebook explains
                assert node.end_lineno - node.lineno < 10


def text_outputs(cell):
    """A cell's outputs as text; of a picture only its kind."""
    found = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            found.append(output.text)
        for kind, value in sorted(output.get("data", {}).items()):
            found.append(value if kind.startswith("text/") else f"[{kind}]")
    return found


def _tags(cell):
    return cell.metadata.get("tags", [])


def code(source="x", *outputs, tags=(), id="a"):
    metadata = {"tags": list(tags), "papermill": {"duration": 1.5}}
    return new_code_cell(source, outputs=list(outputs), metadata=metadata, id=id, execution_count=7)


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def shown(data, **rest):
    return new_output("display_data", data=data, **rest)


def clean(*outputs):
    """The outputs as they are stored, as text."""
    return text_outputs(normalise(new_notebook(cells=[code("x", *outputs)])).cells[0])


def test_what_papermill_adds_is_taken_out_but_parameters_are_named():
    own = code("profile = 'quick'\nmodel = 'm'", tags=["parameters"], id="p")
    injected = code("# Parameters\nprofile = 'quick'\nmodel = 'n'", tags=["injected-parameters"])
    result = normalise(new_notebook(cells=[own, injected, code(id="q")], metadata={"papermill": 1}))
    assert [cell.id for cell in result.cells] == ["p", "q"]
    assert [cell.metadata for cell in result.cells] == [{"tags": ["parameters"]}, {}]
    assert [cell.execution_count for cell in result.cells] == [1, 2]
    (output,) = result.cells[0].outputs
    assert output.data["text/markdown"] == "*The outputs below were made with* `model = 'n'`."
    assert nbformat.writes(normalise(result)) == nbformat.writes(result)
    nbformat.validate(result)


def test_what_passes_is_dropped_and_pictures_stay():
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "f"}, "text/plain": "0%"}
    bar = shown({"text/html": "<div><progress value='1'></progress>[1/2 00:30]</div>"})
    assert clean(stream("a warning", "stderr"), shown(widget), bar, stream("do"), stream("ne")) == [
        "done"
    ]
    assert clean(shown({"image/png": "aGk=", "text/plain": "P"})) == ["[image/png]", "P"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (f"in {ROOT}/runs/smoke", "in runs/smoke"),
        ("<f at 0x7f3a2b4c5d6e>", "<f at 0x…>"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("10%\r50%\r100%\n", "100%\n"),
        ('<table id="T_1a2b3">', '<table id="T_table">'),
        ("0.95 and 12 s", "0.95 and 12 s"),
    ],
)
def test_text_loses_what_belongs_to_one_machine_or_moment(given, expected):
    assert clean(stream(given)) == [expected]


def test_refresh_stores_outputs_and_a_second_time_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    path = make_notebook(tmp_path / "08_claims.ipynb", "size * 21")
    stored = []
    for _ in range(2):
        assert main(["refresh", "08_claims"]) == 0
        stored.append(path.read_bytes())
    assert stored[0] == stored[1] and b"42" in stored[0]
    make_notebook(path, "1 / 0")
    before = path.read_bytes()
    assert main(["refresh", "08_claims"]) == main(["refresh", "08_nothing"]) == 1
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
