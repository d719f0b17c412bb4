"""The committed notebooks: stored outputs are those of a fresh execution, and fit to be read."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from l2p_utils import committed
from l2p_utils.committed import (
    FROM_DATA,
    FROM_SMOKE,
    NOTEBOOKS,
    WIDGET,
    differences,
    execute_fresh,
    normalise,
    problems,
    read_stored,
    text_outputs,
    update,
)
from l2p_utils.execute import NotebookError
from l2p_utils.files import ROOT, UserError

ALL = sorted([*FROM_DATA, *FROM_SMOKE])


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def shown(data, kind="display_data", **rest):
    return new_output(kind, data=data, **rest)


def code(source="x", outputs=(), tags=(), id="a", count=7):
    metadata = {"tags": list(tags), "papermill": {"duration": 1.5}, "execution": {"shell": "t"}}
    return new_code_cell(
        source, outputs=list(outputs), metadata=metadata, id=id, execution_count=count
    )


def notebook(*cells):
    metadata = {"papermill": {"start_time": "now"}, "widgets": {"state": {}}}
    return new_notebook(cells=list(cells), metadata=metadata, nbformat_minor=5)


# ---------------------------------------------------------------- what is committed


@pytest.mark.parametrize("name", FROM_DATA)
def test_stored_outputs_are_those_of_a_fresh_execution(name):
    data = ROOT / "data" / ("token_pooling" if name.startswith("00") else "offline")
    assert data.is_dir(), (
        f"{data.relative_to(ROOT)} is missing: {name} is executed from it. "
        "`git restore data`, or make it anew with `PROFILE=offline make run`."
    )
    found = differences(read_stored(name), execute_fresh(name))
    assert not found, f"{name} is stale, `make notebooks` stores it anew:\n" + "\n".join(found)


@pytest.mark.parametrize("name", ALL)
def test_a_committed_notebook_is_fit_to_be_read(name):
    stored = read_stored(name)
    assert problems(stored) == []
    assert stored.cells[0].cell_type == "markdown" and "**Question.**" in stored.cells[0].source
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
        f"{name} is stored without outputs: `make notebooks`"
    )
    assert any(cell.outputs for cell in cells)
    assert set(stored.metadata) == {"kernelspec", "language_info"}


def test_every_notebook_is_committed_with_outputs():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == ALL


@pytest.mark.parametrize("name", FROM_SMOKE)
def test_outputs_of_the_smallest_profile_say_so(name):
    cells = read_stored(name).cells
    note = next(cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    assert "profile = 'smoke'" in "\n".join(text_outputs(note)), f"{name}: `make notebooks`"


# ---------------------------------------------------------------- normalising


def test_what_papermill_adds_is_taken_out():
    executed = notebook(
        code("p = 1", tags=["parameters"], id="p"),
        code("p = 2", tags=["injected-parameters"], id="i"),
        code("p", [shown({"text/plain": "2"}, "execute_result", execution_count=9)], id="q"),
    )
    result = normalise(executed)
    assert [cell.id for cell in result.cells] == ["p", "q"]
    assert [cell.metadata for cell in result.cells] == [{"tags": ["parameters"]}, {}]
    assert [cell.execution_count for cell in result.cells] == [1, 2]
    assert result.cells[1].outputs[0].execution_count == 2
    assert set(result.metadata) == {"kernelspec", "language_info"}


def test_normalising_twice_changes_nothing_and_leaves_its_argument_alone():
    executed = notebook(new_markdown_cell("# Title", id="m"), code("x", [stream("1\n")]))
    before = nbformat.writes(executed)
    once = normalise(executed)
    assert nbformat.writes(normalise(once)) == nbformat.writes(once)
    assert nbformat.writes(executed) == before


def test_standard_error_widgets_and_progress_bars_are_dropped():
    outputs = [
        stream("a warning", "stderr"),
        shown({WIDGET: {"model_id": "f00"}, "text/plain": "0%|   | 0/3"}),
        shown({"text/html": "<div><progress value='1'></progress>[1/2 00:30]</div>"}),
        stream("done\n"),
    ]
    cell = normalise(notebook(code("x", outputs))).cells[0]
    assert text_outputs(cell) == ["done\n"]


def test_split_streams_are_joined():
    cell = normalise(notebook(code("x", [stream("a"), stream("b\n")]))).cells[0]
    assert text_outputs(cell) == ["ab\n"]


@pytest.mark.parametrize(
    "given, expected",
    [
        (f"in {ROOT}/runs/smoke", "in runs/smoke"),
        (f"root {ROOT}.", "root .."),
        ("<f at 0x7f3a2b4c5d6e>", "<f at 0x…>"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("10%\r50%\r100%\n", "100%\n"),
        ("windows\r\n", "windows\r\n"),
        ('<table id="T_1a2b3">', '<table id="T_table">'),
        ("0.95 and 12 s", "0.95 and 12 s"),
    ],
)
def test_text_loses_what_belongs_to_one_machine_or_moment(given, expected):
    assert text_outputs(normalise(notebook(code("x", [stream(given)]))).cells[0]) == [expected]


def test_stored_outputs_name_the_parameters_that_made_them():
    executed = notebook(code("profile = 'quick'", tags=["parameters"]), code("x", id="b"))
    result = normalise(executed, {"profile": "smoke", "model": "m"})
    (text,) = [output.data["text/markdown"] for output in result.cells[0].outputs]
    assert "`profile = 'smoke'`, `model = 'm'`" in text and "mean nothing" in text
    assert result.cells[0].source == "profile = 'quick'"
    assert not normalise(executed).cells[0].outputs


def test_pictures_stay_and_count_as_there_or_not():
    cell = normalise(notebook(code("x", [shown({"image/png": "aGk=", "text/plain": "P"})]))).cells[
        0
    ]
    assert cell.outputs[0].data["image/png"] == "aGk="
    assert text_outputs(cell) == ["[image/png]", "P"]


# ---------------------------------------------------------------- comparing and checking


def test_a_changed_number_is_found_and_shown():
    old, new = (normalise(notebook(code("x", [stream(f"ndcg {n}\n")]))) for n in (0.5, 0.6))
    assert differences(old, old) == []
    (found,) = differences(old, new)
    assert "cell a" in found and "-ndcg 0.5" in found and "+ndcg 0.6" in found


def test_a_missing_picture_or_cell_is_found():
    picture = normalise(notebook(code("x", [shown({"image/png": "aGk="})])))
    assert differences(picture, normalise(notebook(code("x"))))
    assert differences(picture, normalise(notebook(code("x"), code("y", id="b"))))
    other = normalise(notebook(code("x", [shown({"image/png": "b3RoZXI="})])))
    assert differences(picture, other) == []


PARAMETERS = code("p = 1", tags=["parameters"], id="p")


@pytest.mark.parametrize(
    "cell, expected",
    [
        (code("def f(): pass"), "defines"),
        (code("if x:\n    class A: pass"), "defines"),
        (code("\n".join(["x = 1"] * 21)), "20 lines"),
        (code("x", [new_output("error", ename="E", evalue="v", traceback=[])]), "an error"),
        (code("x", [stream("see /home/anna/runs")]), "one machine"),
        (new_markdown_cell("look in /tmp/figures", id="a"), "one machine"),
        (code("y", tags=["parameters"]), "2 cells are tagged"),
    ],
)
def test_what_does_not_belong_into_a_committed_notebook_is_named(cell, expected):
    assert problems(notebook(PARAMETERS)) == []
    assert expected in " ".join(problems(notebook(PARAMETERS, cell)))


def test_an_id_given_twice_is_named():
    twice = notebook(PARAMETERS, code("y"))
    twice.cells[1].id = "p"
    assert problems(twice) == ["every cell needs an id of its own"]


def test_a_web_address_is_no_machine_path():
    assert problems(notebook(PARAMETERS, new_markdown_cell("https://a.org/home/x", id="m"))) == []


# ---------------------------------------------------------------- storing


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "NOTEBOOKS", tmp_path)
    return tmp_path


def write(path, last):
    cells = [code("p = 2", tags=["parameters"], id="p"), code(last, id="b")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel, nbformat_minor=5), path)


def test_update_stores_outputs_and_a_second_time_the_same_bytes(folder):
    write(folder / "04_inference_pooling.ipynb", "p * 21")
    update("04_inference_pooling")
    first = (folder / "04_inference_pooling.ipynb").read_bytes()
    assert text_outputs(committed.read_stored("04_inference_pooling").cells[1]) == ["42"]
    update("04_inference_pooling")
    assert (folder / "04_inference_pooling.ipynb").read_bytes() == first


@pytest.mark.parametrize(
    "last, error", [("1 / 0", NotebookError), ("print('/home/anna')", UserError)]
)
def test_a_failed_update_leaves_the_stored_notebook_as_it_was(folder, last, error):
    path = folder / "04_inference_pooling.ipynb"
    write(path, last)
    before = path.read_bytes()
    with pytest.raises(error):
        update("04_inference_pooling")
    assert path.read_bytes() == before
    assert list(folder.iterdir()) == [path]


def test_check_fails_on_a_stale_notebook_and_changes_nothing(folder, capsys):
    path = folder / "04_inference_pooling.ipynb"
    write(path, "p")
    before = path.read_bytes()
    assert committed.main(["04_inference_pooling", "--check"]) == 1
    assert "STALE" in capsys.readouterr().out and path.read_bytes() == before


def test_an_unknown_name_is_refused(folder, capsys):
    with pytest.raises(SystemExit):
        committed.main(["09_nothing"])
    assert "09_nothing" in capsys.readouterr().err
    with pytest.raises(UserError, match="There is no notebook"):
        read_stored("09_nothing")
