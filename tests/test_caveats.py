"""Prose that depends on the rows: true of the paper's data sets, of bundled and of other ones."""

import json
from pathlib import Path

import pytest

from l2p_utils.caveats import CAVEATS, caveats, collections_note, kind_of
from l2p_utils.files import UserError
from tests.hub_rows import hub_rows
from tests.synthetic import make_rows

ROOT = Path(__file__).parents[1]
BUNDLED = ("bundled", "docstring", "Python packages", "MiniLM", "22 million", "22-million")


@pytest.fixture(scope="module")
def bundled():
    return make_rows(queries=100)[0]


@pytest.fixture(scope="module")
def paper():
    return hub_rows()[0]


def test_rows_are_told_apart(bundled, paper):
    assert kind_of(bundled) == "bundled" and kind_of(paper) == "paper"
    assert kind_of(bundled.assign(collection="mine")) == "other"


@pytest.mark.parametrize("notebook", [n for n in CAVEATS if n != "08"])
def test_nothing_bundled_is_said_of_the_papers_own_data(paper, notebook):
    said = collections_note(paper) + caveats(notebook, paper)
    assert not [word for word in BUNDLED if word in said]


def test_the_bundled_collections_are_named_as_what_they_are(bundled):
    assert "made from the documentation of Python packages" in collections_note(bundled)
    assert "docstring's first line" in caveats("04", bundled)
    assert "from SciPy to pandas" in caveats("06", bundled)
    assert "less far" not in caveats("06", bundled.assign(collection="mine"))


def test_collections_of_ones_own_are_neither(bundled):
    mine = bundled.assign(collection="mine")
    assert "neither the paper's nor the bundled" in collections_note(mine)
    assert "docstring" not in caveats("04", mine)


def test_noise_follows_from_the_number_of_queries(bundled):
    # 2 · 20 / √100
    assert "some 100 test queries a collection: a difference under 4 points" in caveats(
        "04", bundled
    )
    fewer = bundled.assign(queries=25)
    assert "some 25 test queries a collection: a difference under 8 points" in caveats("07", fewer)


def test_seeds_are_counted(bundled, paper):
    assert "Each model of this run was trained once" in caveats("05", bundled)
    said = caveats("05", paper)
    kinds = paper[
        ~paper["train_collection"].str.startswith("released") & (paper["train_collection"] != "")
    ]
    number = len(kinds.drop_duplicates(["train_collection", "train_method", "train_factors"]))
    assert f"Of {number} kinds of training 3 were run with more than one seed" in said


def test_the_control_is_explained_only_where_it_gains_and_only_as_a_guess(bundled):
    pf1 = (bundled["train_method"] == "none") & (bundled["pool_method"] != "none")
    worse, better = (
        bundled.assign(**{"ndcg@10": bundled["ndcg@10"].where(~pf1, value)})
        for value in (0.01, 0.99)
    )
    assert "no run here tests it" not in caveats("05", worse)
    assert "FT PF1" not in caveats("05", bundled[~pf1])
    said = caveats("05", better)
    assert "lifts pooled search here" in said
    assert "may be because" in said and "no run here tests it" in said


def test_nothing_is_said_of_a_training_that_the_rows_do_not_tell(bundled):
    said = caveats("05", bundled.assign(document_length=180))
    assert "one epoch" not in said and "MiniLM" not in said and "minutes" not in said
    assert "Documents are cut at 180 tokens" in said
    assert "minutes" not in caveats("08", bundled)


def test_pruning_is_tested_where_there_are_more_documents_than_candidates(bundled, paper):
    assert "All that is tested is compression" in caveats("07", bundled)
    large = paper.assign(documents=57_638)
    assert "of the largest (57,638 documents) a part" in caveats("07", large)
    exact = bundled[bundled["engine"] == "exact"]
    assert "PLAID" not in caveats("07", exact)


def test_every_caveat_is_a_line_of_a_list(bundled):
    for notebook, parts in CAVEATS.items():
        lines = caveats(notebook, bundled).splitlines()
        assert len(lines) == len(parts) and all(line.startswith("- **") for line in lines)


def test_an_unknown_notebook_is_refused(bundled):
    with pytest.raises(UserError, match="expected one of"):
        caveats("03", bundled)


@pytest.mark.parametrize("number", CAVEATS)
def test_the_notebooks_own_words_say_nothing_of_whose_collections_these_are(number):
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    said = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert not [word for word in BUNDLED[1:] if word in said]
    assert f'caveats("{number}", rows)' in "".join("".join(c["source"]) for c in cells)
