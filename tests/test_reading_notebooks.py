"""Notebooks 04 to 08 on other runs than the reference: own collections, no PLAID, few models."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from synthetic import OFFLINE_MODELS, QUICK_MODELS, make_rows

from l2p_utils.results import write_rows

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
READING = sorted(path.stem for path in NOTEBOOKS.glob("0[4-8]_*.ipynb"))
FOLDER = "/x/my docs"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of result rows, by what is particular about them."""

    def store(name, frames):
        folder = tmp_path_factory.mktemp(name)
        write_rows(folder, "all", *frames)
        return folder

    def own(frame):
        frame = frame[(frame["collection"] == "docs:scipy") & ~frame["model"].str.contains("torch")]
        renamed = [name.replace("docs-scipy", "my-docs") for name in frame["model"]]
        frame = frame.assign(collection=FOLDER, model=renamed)
        if "train_collection" in frame:
            frame["train_collection"] = frame["train_collection"].replace("docs:scipy", FOLDER)
        return frame

    quick = make_rows(QUICK_MODELS, queries=8, plaid=False)
    return {
        "own": store("own", [own(frame) for frame in quick]),
        "own with PLAID": store("own", [own(f) for f in make_rows(OFFLINE_MODELS, queries=8)]),
        "few models, no PLAID": store("few", quick),
    }


@pytest.fixture
def outputs(monkeypatch, runs):
    """Run a notebook's code in this process: what each cell after the parameters shows."""
    monkeypatch.chdir(NOTEBOOKS.parent)

    def run(notebook, name):
        shell = InteractiveShell.instance()
        shell.reset()
        shown = []
        for cell in nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells:
            if cell.cell_type != "code":
                continue
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = f'source = {str(runs[name])!r}\noutput = ""'
            with capture_output() as captured:
                result = shell.run_cell(cell.source, store_history=True)
            result.raise_error()
            shown.append(captured.stdout if result.result is None else _text(result.result))
        return shown

    yield run
    InteractiveShell.clear_instance()


def _text(value):
    """What a reader sees: a table or Markdown as text, of a figure its words and its alt text."""
    if hasattr(value, "savefig"):
        titles = [axis.get_title() for axis in value.axes]
        return " ".join([value.alt, value._suptitle.get_text(), *titles])
    if hasattr(value, "to_html"):
        assert len(value), "an empty table"
        return value.to_html()
    return getattr(value, "data", "") or ""


OWN = [("own", notebook) for notebook in READING] + [("own with PLAID", "07_beir_validation")]


@pytest.mark.parametrize(("name", "notebook"), OWN)
def test_own_collections_are_shown_and_nothing_is_blank(outputs, name, notebook):
    shown = outputs(notebook, name)
    text = "\n".join(shown)
    assert not re.search(r"\bnan\b|docs:scipy \(in", text, flags=re.IGNORECASE)
    if notebook == "08_claims":
        assert "0 of 34 parts" in text and "other collections" in text
    elif (name, notebook) != ("own", "07_beir_validation"):
        assert "my docs" in text
    silent = [place for place, output in enumerate(shown) if not output.strip()]
    assert silent == [0, 1, len(shown) - 1]  # parameters, their check, and files


@pytest.mark.parametrize("notebook", READING)
def test_few_models_without_plaid_are_shown_as_far_as_they_go(outputs, notebook):
    text = "\n".join(outputs(notebook, "few models, no PLAID"))
    assert not re.search(r"\bnan\b", text, flags=re.IGNORECASE)
    if notebook == "07_beir_validation":
        assert "no rows of PLAID" in text and "Figure 4 of the paper" in text
        assert "Figure 4 in this run" not in text
    else:
        assert "docs:scipy" in text
    if notebook in ("05_pooling_aware", "08_claims"):
        assert "not run" in text
