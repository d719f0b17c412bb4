"""The words, small tables and notebooks that read results: computed from rows, whatever was run."""

import ast
import dataclasses
import re
from pathlib import Path

import nbformat
import pytest
from IPython.display import Markdown

from l2p_utils.claims import FAILS, HOLDS, NOT_RUN, UNDECIDED, check_claims
from l2p_utils.exhibits import FIGURES, TABLES, read_source
from l2p_utils.figures import Sheet, save
from l2p_utils.files import ROOT, UserError, from_root
from l2p_utils.reading import (
    _span,
    answer,
    conclusion,
    curves,
    describe,
    engines_table,
    finding,
    index_table,
    means_table,
    overall_verdict,
    pooling_loss,
    roles_table,
    unmeasured,
    variants_table,
    verdicts,
)
from l2p_utils.results import read_paper, read_per_query, read_rows, write_rows
from tests.synthetic import COLLECTIONS, OFFLINE_MODELS, QUICK_MODELS, make_rows

PAPER = ROOT / "data" / "paper"
NOTEBOOKS = [
    "04_inference_pooling", "05_pooling_aware", "06_cross_dataset", "07_beir_validation",
    "08_claims",
]  # fmt: skip


def _kmeans_plaid_on_scipy(frame):
    """What the small profiles keep of PLAID."""
    chosen = (frame["collection"] == "docs:scipy") & frame["pool_method"].isin(["none", "kmeans"])
    return (frame["engine"] == "exact") | chosen


def _smoke(frame):
    few = frame["collection"].isin(COLLECTIONS[:2]) & frame["pool_factor"].isin([1, 2, 4])
    return _kmeans_plaid_on_scipy(frame) & few


PROFILES = {
    "offline": (OFFLINE_MODELS, lambda frame: frame["model"] != ""),
    "quick": (QUICK_MODELS, _kmeans_plaid_on_scipy),
    "smoke": (QUICK_MODELS, _smoke),
}


@pytest.fixture(scope="module", params=list(PROFILES))
def folder(request, tmp_path_factory):
    """Made-up results as each profile leaves them."""
    models, keep = PROFILES[request.param]
    target = tmp_path_factory.mktemp(request.param)
    rows, per_query = make_rows(models, queries=20)
    rows, per_query = rows[keep(rows)], per_query[keep(per_query)]
    for model in sorted(rows["model"].unique()):
        mine = [frame[frame["model"] == model] for frame in (rows, per_query)]
        write_rows(target, model, *mine)
    return target


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    target = tmp_path_factory.mktemp("all")
    rows, per_query = make_rows(queries=20)
    for model in sorted(rows["model"].unique()):
        mine = [frame[frame["model"] == model] for frame in (rows, per_query)]
        write_rows(target, model, *mine)
    return target


@pytest.fixture(scope="module")
def paper():
    return read_source(PAPER)


def _run(notebook, **parameters):
    """Run a notebook's code cells in this process; gives what each cell's last line showed."""
    namespace, shown = {"__name__": "__main__"}, []
    for cell in nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells:
        if cell.cell_type != "code":
            continue
        tree = ast.parse(cell.source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, notebook, "exec"), namespace)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), notebook, "eval"), namespace))
        if "parameters" in cell.metadata.get("tags", []):
            namespace |= parameters
    return shown


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_reading_notebook_runs_on_what_any_profile_leaves(notebook, folder, tmp_path):
    shown = _run(notebook, source=str(folder), output=str(tmp_path))
    written = {path.suffix for path in tmp_path.iterdir()}
    drawn = {".png", ".svg"}
    tables = {".csv", ".md"}
    expected = {"05_pooling_aware": drawn | tables, "06_cross_dataset": tables, "08_claims": tables}
    assert written == expected.get(notebook, drawn)
    texts = "\n".join(item.data for item in shown if isinstance(item, Markdown))
    assert not re.search(r"\bnan\b", texts, re.I)  # a number that is missing, printed
    sheets = [item for item in shown if isinstance(item, Sheet)]
    assert len(sheets) == {"04": 2, "05": 6, "07": 2}.get(notebook[:2], 0)


def test_a_reading_notebook_writes_nothing_without_output(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # as in JupyterLab, paths do not depend on where it runs
    _run("04_inference_pooling", source=str(offline), output="")
    assert not list(tmp_path.iterdir())


def test_a_reading_notebook_says_where_rows_should_be_when_there_are_none(tmp_path):
    with pytest.raises(UserError, match=r"make run"):
        _run("04_inference_pooling", source=str(tmp_path / "nothing"), output="")


def test_reading_notebooks_do_not_load_torch():
    sources = "".join(
        path.read_text("utf-8") for path in (ROOT / "notebooks").glob("0[4-8]_*.ipynb")
    )
    modules = [
        "reading",
        "comparison",
        "exhibits",
        "figures",
        "claims",
        "results",
        "parameters",
        "profile",
    ]
    for module in modules:
        sources += (ROOT / "l2p_utils" / f"{module}.py").read_text("utf-8")
    assert not any(f"import {name}" in sources for name in ("torch", "pylate", "transformers"))


@pytest.mark.parametrize("notebook", NOTEBOOKS[:4])
def test_a_reading_notebook_closes_with_what_was_found(notebook, folder):
    last = _run(notebook, source=str(folder), output="")[-1].data
    theirs, ours = last.split("**This run.** ")
    said = theirs.removeprefix("**The paper.** ").strip()
    assert said != theirs.strip() and 2 <= len(said.split(". ")) <= 3
    assert ours.strip()


def test_answers_are_computed_from_the_numbers(paper, offline):
    assert "hierarchical 91.9 %, kmeans 89.5 %, span 63.4 %" in answer([paper], "04")
    assert "hierarchical and span differ by 28.5 points" in answer([paper], "04")
    training = answer([paper], "05")
    assert "86.8 % with span where the baseline keeps 55.2 % (+31.6 points)" in training
    assert "−30.2 points with span" in training and "by −2.1 to +2.3 points" in training
    assert "no loss in 24 of 24 cells" in answer([paper], "06")
    assert "above the baseline with the same pool method in 11 of 12" in answer([paper], "07")
    rows = read_rows(offline)
    found = answer([paper, read_source(offline)], "07", rows)
    assert found.count("% of the unpooled one's bytes") == 1
    with pytest.raises(UserError, match="no answer for '08': expected one of"):
        answer([paper], "08")


def test_without_numbers_an_answer_says_not_run(paper):
    nothing = dataclasses.replace(paper, frame=paper.frame.iloc[:0])
    for notebook in ("04", "05", "06", "07"):
        assert answer([nothing], notebook) == "**The paper.** Not run.\n"


@pytest.mark.parametrize("exhibit", [*FIGURES, *TABLES])
def test_words_name_what_was_not_run(exhibit, folder, paper):
    ours = read_source(folder)
    words = describe([paper, ours], exhibit)
    theirs, mine = words.split("**This run**")
    assert "Not run" not in theirs
    profile = folder.name.rstrip("0123456789")
    whole = profile == "offline" or (profile, exhibit) == ("quick", "figure1")
    assert ("Not run" in mine) == (not whole)


def test_the_papers_words_for_figure_1_are_its_findings(paper):
    words = describe([paper], "figure1")
    assert "hierarchical 91.9 %, kmeans 89.5 %, span 63.4 %" in words
    assert "hierarchical at PF 2, 4–6; kmeans at PF 3" in words


def test_words_refuse_what_they_do_not_know(paper):
    with pytest.raises(UserError, match="figure9"):
        describe([paper], "figure9")


def test_curves_have_the_same_factors_or_are_left_out(paper):
    wide = curves(paper, "figure2")
    assert list(wide.columns) == [1, 2, 3, 4, 5, 6] and wide.notna().all().all()
    lacking = paper.frame.copy()  # one curve measured unpooled only
    one = (lacking["exhibit"] == "figure2") & (lacking["label"] == "FT PF1")
    lacking.loc[one & (lacking["pool_factor"] > 1), "relative"] = float("nan")
    rest = curves(dataclasses.replace(paper, frame=lacking), "figure2")
    assert list(rest.columns) == list(wide.columns)
    assert len(rest) == len(wide) - 2 and "FT PF1" not in rest.index.get_level_values("label")


def test_means_table_gives_the_difference_to_the_baseline(paper, offline):
    table = means_table([paper, read_source(offline)], "figure2")
    cell = table.loc[("SciFact · docs:scipy", "FT Span PF1-6", "span"), "the paper"]
    assert cell["mean of PF 2–6"] == "89.5 (+41.9)"
    assert cell["PF 1"] == "98.8 (−1.2)"


def test_ranges_of_factors_read_as_a_person_would_write_them():
    assert _span([2]) == "2"
    assert _span([3, 2]) == "2, 3"
    assert _span([1, 3, 4, 5]) == "1, 3–5"
    assert _span([2, 4]) == "2, 4"


def test_small_tables_keep_what_was_run(folder, paper):
    rows, per_query = read_rows(folder), read_per_query(folder)
    roles = roles_table(paper, rows)
    assert list(roles.index) == COLLECTIONS
    lacking = set(COLLECTIONS) - set(rows["collection"])
    assert set(roles.index[roles["documents"] == "not run"]) == lacking
    assert list(variants_table(rows).index) == ["pylate"]
    largest = f"PF{rows['pool_factor'].max()}"
    sizes = index_table(rows)
    assert ("docs:scipy", "kmeans") in sizes.index
    assert sizes[f"{largest}, %"].between(10, 30).all()
    both = engines_table(per_query, (1, 2))
    assert list(both.columns) == ["PF1 exact", "PF1 PLAID", "PF2 exact", "PF2 PLAID", "queries"]
    assert both.notna().all().all()


def test_engines_are_compared_on_the_queries_that_both_answered():
    rows, per_query = make_rows(QUICK_MODELS[:1], queries=20)
    few = per_query["query_id"] < "q005"
    part = per_query[(per_query["engine"] == "exact") | few]
    table = engines_table(part, (1,))
    assert (table["queries"] == 5).all()
    exact = part[(part["engine"] == "exact") & (part["pool_factor"] == 1)]
    exact = exact[exact["query_id"] < "q005"]
    expected = exact[exact["collection"] == "docs:scipy"]["ndcg@10"].mean()
    shown = table.loc[("baseline", "docs:scipy", "kmeans"), "PF1 exact"]
    assert shown == pytest.approx(expected, abs=5e-4)


def test_without_plaid_the_loss_says_not_run():
    _, per_query = make_rows(QUICK_MODELS[:1], queries=5, plaid=False)
    assert pooling_loss(per_query) == "Not run: PLAID."


@pytest.fixture(scope="module")
def claims(offline):
    rows, per_query = read_rows(offline), read_per_query(offline)
    return check_claims(rows, per_query, read_paper(PAPER), resamples=500)


def test_a_findings_words_count_its_parts(claims):
    for number in range(1, 8):
        parts = claims[claims["finding"] == number]
        text = finding(claims, number)
        assert all(f"| {part} |" in text for part in parts["part"])
        assert f"of {len(parts)} parts hold" in text
    with pytest.raises(UserError, match="no finding 9"):
        finding(claims, 9)


@pytest.mark.parametrize(
    "given, expected",
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, NOT_RUN], "holds as far as it was run"),
        ([NOT_RUN, NOT_RUN], NOT_RUN),
        ([FAILS, FAILS], FAILS),
        ([UNDECIDED, NOT_RUN], UNDECIDED),
        ([HOLDS, UNDECIDED], "holds in part, nothing contradicts it"),
        ([HOLDS, FAILS, UNDECIDED], "holds in part, and in part does not"),
        ([FAILS, UNDECIDED], FAILS),
    ],
)
def test_a_findings_verdict_follows_from_its_parts(claims, given, expected):
    parts = claims.head(len(given)).assign(verdict=given)
    assert overall_verdict(parts) == expected


def test_the_conclusion_follows_the_verdicts(claims):
    turned = claims.assign(verdict=HOLDS)
    assert "**Holds**: 1" in conclusion(turned) and "disagrees" not in conclusion(turned)
    turned.loc[0, "verdict"] = FAILS
    assert "disagrees with the paper**: 1a" in conclusion(turned)
    assert len(verdicts(turned).splitlines()) == 2 + 7


def test_unmeasured_lists_gaps_by_exhibit(folder, paper):
    text = unmeasured(read_rows(folder), paper, read_source(folder))
    assert ("Figure 2: " in text) == (not folder.name.startswith("offline"))


def test_save_writes_a_figure_or_table_and_overwrites_it(paper, tmp_path):
    assert [path.name for path in save(paper, "table1", tmp_path)] == ["table1.csv", "table1.md"]
    assert [path.name for path in save(paper, "table1", tmp_path)] == ["table1.csv", "table1.md"]
    assert len(list(tmp_path.iterdir())) == 2


def test_paths_are_relative_to_the_root(tmp_path):
    assert from_root("data/paper") == ROOT / "data" / "paper"
    assert from_root(tmp_path) == Path(tmp_path)
