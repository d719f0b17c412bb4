"""The paper's numbers and a run's in one form; verdicts value by value, counted by hand."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from l2p_utils.files import UserError
from l2p_utils.paper import (
    CELL,
    COMPARISON_COLUMNS,
    PAPER_BASELINES,
    PAPER_EXHIBITS,
    QUANTITIES,
    ROLES,
    RUN_COLUMNS,
    TRAINING,
    compare_lengths,
    compare_released,
    compare_with_paper,
    comparison_markdown,
    comparison_summary,
    markdown,
    missing,
    read_paper,
    read_runs,
    read_source,
    roles_of,
    rows_source,
)
from l2p_utils.profile import load_profile
from tests.hub_rows import hub_rows, paper_cells
from tests.synthetic import PAPER, QUICK_MODELS, make_rows, write_synthetic

# 492 cells, of which 132 in tables print NDCG as well, and 40 of Table 2 a difference; 9 baselines.
VALUES = 492 + 132 + 40 + 9
TRIVIAL = 18 + 2 + 2 + 12 + 1 + 5 + 1 + 1  # a baseline's own 100 % at factor 1, per exhibit
NAN = re.compile(r"\b(nan|NaN|inf|None)\b")


@pytest.fixture(scope="module")
def paper():
    return read_paper(PAPER)


@pytest.fixture(scope="module")
def runs():
    """The author's result rows."""
    return read_runs(PAPER / "runs")


@pytest.fixture(scope="module")
def same():
    """Rows whose values are the paper's."""
    return hub_rows()[0]


@pytest.fixture(scope="module")
def comparison(paper, same):
    return compare_with_paper(paper, same)


def value(comparison, exhibit, dataset, label, method, factor, quantity="relative"):
    cell = (comparison[CELL] == [exhibit, dataset, label, method, factor]).all(axis=1)
    return comparison[cell & (comparison["quantity"] == quantity)].squeeze()


def at(engine, dataset, model, method, factor, by):
    """Noise on one cell only."""
    return lambda key, _: by if key == (engine, dataset, model, method, factor) else 0.0


# --- the paper's numbers --------------------------------------------------------------------------


def test_the_papers_files_become_one_frame(paper, tmp_path):
    assert paper.groupby("exhibit").size().to_dict() == {
        "figure1": 108, "figure2": 60, "figure3": 48, "figure4": 144,
        "table1": 24, "table2": 60, "table3": 24, "table4": 24,
    }  # fmt: skip
    assert set(paper["dataset"]) == {*ROLES, "Average"}
    source = read_source(PAPER)
    assert source.is_paper and source.frame.equals(paper)
    assert [missing(source, exhibit) for exhibit in PAPER_EXHIBITS] == [""] * 8
    table = paper[(paper["exhibit"] == "table2") & (paper["label"] == "Baseline")]
    unpooled = table[table["pool_factor"] == 1].set_index("dataset")["ndcg"]
    assert unpooled.to_dict() == PAPER_BASELINES["exact"]
    with pytest.raises(UserError, match=r"figure1\.csv is missing"):
        read_paper(tmp_path)


@pytest.mark.parametrize(
    ("cell", "relative", "training"),
    [
        (("figure2", "SciFact", "FT PF1"), 38.6, ("SciFact", "none", "1")),
        (("figure2", "SciFact", "Baseline"), 84.1, ("", "", "")),
        (("table3", "SciFact", "FT Hier PF2"), 103.7, ("SciFact", "hierarchical", "2")),
        (("table2", "Touche", "FT FiQA KMeans PF1-6"), 100.8, ("FiQA", "kmeans", "1-6")),
    ],
)
def test_a_cell_keeps_its_value_and_its_label_says_the_training(paper, cell, relative, training):
    line = paper[(paper[[*CELL[:3], "pool_factor"]] == [*cell, 2]).all(axis=1)].squeeze()
    assert (line["relative"], *line[TRAINING]) == (relative, *training)


# --- the author's rows ----------------------------------------------------------------------------


def test_the_authors_files_become_one_frame(runs, tmp_path):
    assert list(runs.columns) == RUN_COLUMNS and set(runs["dataset"]) == set(ROLES)
    assert runs.groupby("engine").size().to_dict() == {"exact": 1170, "plaid": 210}
    cell = ["engine", "dataset", "pool_method", "pool_factor"]
    for model in (["run"], [*TRAINING, "version"]):
        assert not runs.duplicated([*model, *cell]).any()
    base = runs[runs["run"] == "baseline"]
    assert set(base["trained_on"]) == {""} and set(base["version"]) == {1}
    assert base[base["engine"] == "exact"]["document_length"].isna().all()
    assert ((runs["version"] == 2) == runs["run"].str.endswith("-v2")).all()
    numbers = runs.loc[runs["engine"] == "plaid", ["ndcg@10", "recall@10", "recall@100"]]
    assert numbers.notna().all().all() and numbers.stack().between(0, 1).all()
    with pytest.raises(UserError, match=r"nanobeir_runs\.csv is missing"):
        read_runs(tmp_path)


def test_the_authors_rows_give_every_printed_value(paper, runs):
    """Two SciFact runs are averaged, NDCG first; everything else is single."""
    cell = ["engine", "dataset", *TRAINING, "pool_method", "pool_factor"]
    ndcg = runs.groupby(cell)["ndcg@10"].agg(["mean", "size"])
    assert set(ndcg[ndcg["size"] == 2].reset_index()["trained_on"]) == {"SciFact"}

    def values(**change):
        places = paper.assign(**change)[cell]
        return ndcg["mean"].reindex(pd.MultiIndex.from_frame(places)).to_numpy()

    baseline = dict.fromkeys(TRAINING, "")
    found = paper.assign(ndcg=values())
    found["relative"] = 100 * found["ndcg"] / values(**baseline, pool_factor=1)
    found["delta"] = found["ndcg"] - values(**baseline)
    curve = ["label", "pool_method", "pool_factor"]
    average = found["dataset"] == "Average"
    five = found[~average & (found["exhibit"] == "figure1")].groupby(curve)["relative"].mean()
    places = pd.MultiIndex.from_frame(found.loc[average, curve])
    found.loc[average, "relative"] = five.reindex(places).to_numpy()

    # Figures 1 and 4 were drawn unrounded and read to .0001; elsewhere the last printed digit.
    drawn = paper["exhibit"].isin(["figure1", "figure4"])
    rounding = {"ndcg": 5e-4, "relative": np.where(drawn, 1e-4, 0.05), "delta": 5e-4}
    for quantity in QUANTITIES:
        gap = (found[quantity] - paper[quantity]).abs()
        assert (gap <= rounding[quantity] + 1e-9)[paper[quantity].notna()].all(), quantity
    assert (len(paper), paper[QUANTITIES].notna().sum(axis=None)) == (492, 664)


# --- roles ----------------------------------------------------------------------------------------


def test_hub_rows_take_the_papers_roles_and_other_rows_the_bundled_ones(same):
    roles = roles_of(same)
    assert roles.own and roles.evaluated("FiQA") == "nano:fiqa"
    assert roles.evaluated("FiQA", "plaid") == roles.training["FiQA"] == "beir:fiqa"
    assert roles.evaluated("no such data set") == ""
    bundled = make_rows(QUICK_MODELS[:1], queries=3)[0]
    for rows in (bundled, bundled.assign(collection="my/folder"), pd.concat([bundled, same]), None):
        roles = roles_of(rows)
        assert not roles.own and roles.exact == roles.plaid == roles.training == ROLES


def test_a_revision_belongs_to_the_name_and_two_of_them_are_refused(same, paper):
    pinned = same.assign(collection=same["collection"].replace("nano:fiqa", "nano:fiqa@4f2a"))
    assert roles_of(pinned).evaluated("FiQA") == "nano:fiqa@4f2a"
    assert not (compare_with_paper(paper, pinned)["verdict"] == "not run").any()
    with pytest.raises(UserError, match=r"nano:fiqa in several revisions.*nano:fiqa@4f2a"):
        roles_of(pd.concat([same, pinned[pinned["collection"] == "nano:fiqa@4f2a"]]))


# --- figures and tables of a run ------------------------------------------------------------------


def test_a_runs_cells_are_read_from_its_rows_by_hand(tmp_path):
    rows, _ = make_rows(queries=5)
    write_synthetic(tmp_path, queries=5)
    source = read_source(tmp_path)
    keys = ["model", "collection", "engine", "pool_method", "pool_factor"]
    ndcg = rows.set_index(keys)["ndcg@10"]
    model = "docs-torch-kmeans-pf1-6-s42"
    base = ndcg.sort_index()["baseline", "docs:numpy", "exact"]
    own = ndcg[model, "docs:numpy", "exact", "kmeans", 4]
    cell = ("table2", "NFCorpus", "FT FiQA KMeans PF1-6", "kmeans", 4)
    expected = [own, 100 * own / base["none", 1], own - base["kmeans", 4]]
    assert list(source.frame.set_index(CELL).loc[cell, QUANTITIES]) == pytest.approx(expected)
    figure = source.frame[source.frame["exhibit"] == "figure1"].set_index(CELL[1:])["relative"]
    five = [figure[d, "Baseline", "span", 6] for d in ROLES]
    assert figure["Average", "Baseline", "span", 6] == pytest.approx(np.mean(five))
    assert source.names["FiQA"] == ("docs:torch (in FiQA’s role)", "docs:torch")
    assert source.rename("FT FiQA KMeans PF1-6") == "FT docs:torch KMeans PF1-6"
    note = "Run “offline”, 5 test queries per collection, 1 training seed"
    assert source.note_on("figure4") == note


def test_other_lengths_and_released_checkpoints_enter_no_curve(same):
    extra = same["model"].str.startswith(("baseline-d180", "released-"))
    with_them, without = rows_source(same, "x"), rows_source(same[~extra], "x")
    pd.testing.assert_frame_equal(with_them.frame, without.frame)
    assert with_them.note == without.note and extra.any()


def test_seeds_are_averaged_and_one_that_is_under_way_leaves_no_gap(paper):
    def apart(key, seed):
        return {42: 0.03, 43: -0.01}[seed] if key[2] == ("SciFact", "kmeans", "1-6") else 0.0

    rows, _ = hub_rows(apart, extras=False)
    second = (rows["model"] == "beir-scifact-kmeans-pf1-6-s43") & (rows["pool_factor"] == 4)
    for part, points in ((rows, 1.0), (rows[~second], 3.0)):  # the mean of 3 and −1; 3 alone
        where = ("table4", "SciFact", "FT KMeans PF1-6", "kmeans", 4, "ndcg")
        line = value(compare_with_paper(paper, part), *where)
        assert line["points"] == pytest.approx(points, abs=0.06)
    assert "2 training seeds; where a model has more than one" in rows_source(rows, "x").note


def test_what_was_not_run_is_named(same):
    factor = (same["pool_factor"] == 6) & (same["collection"] == "nano:scifact")
    other = same["model"].str.startswith("beir-scifact-kmeans-pf1-6")
    span = same["model"].str.contains("span-pf2")
    fiqa = (same["collection"] == "nano:fiqa") & (same["engine"] == "exact")
    source = rows_source(same[~(factor & other) & ~span & ~fiqa], "x")
    assert missing(source, "table4") == "FT KMeans PF1-6 at PF 6"
    assert missing(source, "figure2") == "FiQA (everything); FT Span PF2 on SciFact"
    assert missing(source, "figure4") == ""
    average = source.frame.query("exhibit == 'figure1' and dataset == 'Average'")
    assert average["relative"].isna().all()


def test_without_the_unpooled_baseline_there_are_ndcgs_but_no_percentages(paper, same):
    part = same[(same["model"] != "baseline") | (same["collection"] != "nano:scifact")]
    cell = (compare_with_paper(paper, part), "table4", "SciFact", "FT PF1", "kmeans", 3)
    assert [value(*cell, unit)["verdict"] for unit in ("ndcg", "relative")] == ["inside", "not run"]
    assert "no unpooled baseline yet on nano:scifact (exact)" in rows_source(part, "x").note


# --- verdicts -------------------------------------------------------------------------------------


def test_every_printed_value_comes_back_once_when_ours_are_the_papers(comparison, paper, same):
    assert list(comparison.columns) == COMPARISON_COLUMNS
    assert len(comparison) == VALUES == paper[["relative", "ndcg", "delta"]].notna().sum().sum() + 9
    assert not comparison.duplicated([*CELL, "engine", "quantity"]).any()
    assert (comparison["verdict"] == "inside").all()
    # Figures 1 and 4 have four decimals; of others the last is printed.
    rounding = comparison["quantity"].map({"relative": 0.07, "ndcg": 0.0011, "delta": 0.0016})
    rounding = rounding.mask(comparison["exhibit"].isin(["figure1", "figure4"]), 5e-5)
    assert (comparison["difference"].abs() <= rounding).all()
    ours = rows_source(same, "results")
    assert [missing(ours, exhibit) for exhibit in PAPER_EXHIBITS] == [""] * 8
    total = comparison_summary(comparison).set_index("exhibit").loc["all"]
    assert list(total[["values", "inside", "by definition"]]) == [VALUES, VALUES, TRIVIAL]


@pytest.mark.parametrize(
    ("engine", "exhibit", "by", "verdict"),
    [
        # NFCorpus, baseline, hierarchical, PF5: printed unrounded, and in one exhibit only.
        ("exact", "figure1", 0.0099, "inside"),
        ("exact", "figure1", -0.0101, "outside"),
        ("plaid", "figure4", 0.0149, "inside"),
        ("plaid", "figure4", -0.0151, "outside"),
    ],
)
def test_the_band_is_a_point_under_exact_search_and_one_and_a_half_under_plaid(
    paper, engine, exhibit, by, verdict
):
    rows, _ = hub_rows(at(engine, "NFCorpus", ("", "", ""), "hierarchical", 5, by), extras=False)
    comparison = compare_with_paper(paper, rows)
    line = value(comparison, exhibit, "NFCorpus", "Baseline", "hierarchical", 5)
    assert line["verdict"] == verdict and line["collection"].endswith(":nfcorpus")
    assert line["points"] == pytest.approx(100 * by)
    assert line["difference"] == pytest.approx(100 * by / PAPER_BASELINES[engine]["NFCorpus"])
    # A fifth of it reaches the average of the data sets, far inside.
    assert (comparison["verdict"] == "outside").sum() == (verdict == "outside")
    if engine == "plaid":  # of 144 cells 12 are 100 % by definition
        mean = comparison_summary(comparison).set_index("exhibit").loc["figure4", "mean"]
        assert mean == pytest.approx(abs(100 * by) / (144 - 12), abs=1e-3)


def test_printing_adds_half_a_digit_and_the_conversion_is_the_papers_baseline(comparison):
    five = sum(1 / value for value in PAPER_BASELINES["exact"].values()) / 5
    for exhibit, dataset, factor, quantity, expected in (
        ("table1", "SciFact", 2, "ndcg", 0.0105),
        ("table1", "SciFact", 2, "relative", 1 / 0.808 + 0.05),
        ("figure4", "SCIDOCS", 6, "relative", 1.5 / 0.164 + 1e-4),
        ("figure1", "Average", 6, "relative", five + 1e-4),
    ):
        line = value(comparison, exhibit, dataset, "Baseline", "span", factor, quantity)
        assert line["tolerance"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("model", "method", "factor", "outside"),
    [
        # Figure 2 alone prints it, as a percentage.
        (("SciFact", "none", "1"), "span", 3, {"figure2": 1, "all": 1}),
        # Figure 1; Table 2 and Table 4, twice each; both trained models' differences in Table 2.
        (("", "", ""), "kmeans", 4, {"figure1": 1, "table2": 4, "table4": 2, "all": 7}),
    ],
)
def test_one_cell_off_is_counted_in_each_exhibit_that_prints_it(
    paper, model, method, factor, outside
):
    rows, _ = hub_rows(at("exact", "SciFact", model, method, factor, 0.03), extras=False)
    counts = comparison_summary(compare_with_paper(paper, rows)).set_index("exhibit")
    assert counts["outside"][counts["outside"] > 0].to_dict() == outside
    assert counts.loc["all", "largest"] == pytest.approx(3.0, abs=0.1)
    assert counts.loc["all", "where"].endswith(f"{method} PF{factor}")


def test_a_shift_of_everything_shows_in_absolute_values_and_not_in_percentages(paper):
    cells = paper_cells()
    rows, _ = hub_rows(lambda key, _: 0.02 * cells[key] / PAPER_BASELINES[key[0]][key[1]])
    comparison = compare_with_paper(paper, rows)
    assert set(comparison.loc[comparison["quantity"] == "relative", "verdict"]) == {"inside"}
    baselines = comparison[comparison["exhibit"] == "baselines"]
    assert set(baselines["verdict"]) == {"outside"} and (baselines["points"].round(9) == 2).all()


def test_what_was_not_run_is_listed_without_a_value(paper, same):
    few = same[(same["engine"] == "exact") & (same["model"] == "baseline")]
    comparison = compare_with_paper(paper, few)
    assert len(comparison) == VALUES
    lacking = comparison[comparison["verdict"] == "not run"]
    assert lacking[["ours", "difference", "points"]].isna().all().all()
    counts = comparison_summary(comparison).set_index("exhibit")
    assert counts.loc[["figure1", "figure4"], "not run"].tolist() == [0, 144]
    text = comparison_markdown(comparison, few, paper)
    assert not NAN.search(text) and "kmeans `sklearn`, hierarchical `pylate`" in text


def test_rows_of_other_collections_are_not_compared(paper):
    with pytest.raises(UserError, match=r"other collections than the paper's.*docs:numpy"):
        compare_with_paper(paper, make_rows(QUICK_MODELS[:1], queries=3)[0])


# --- released checkpoints, lengths ----------------------------------------------------------------


def test_released_checkpoints_stand_beside_the_papers_models_by_their_own_rows(paper, same):
    found = compare_released(paper, same)  # whose released rows are .05 throughout
    assert set(found["label"]) == {"FT SciFact KMeans PF1-6", "FT FiQA KMeans PF1-6"}
    # Table 2: 2 models × 5 data sets × 4 factors, three values per cell
    assert (found["exhibit"] == "table2").sum() == 2 * 5 * 4 * 3
    line = value(found, "table2", "FiQA", "FT FiQA KMeans PF1-6", "kmeans", 4, "ndcg")
    assert line["ours"] == pytest.approx(0.05) and line["verdict"] == "outside"
    none = same[~same["train_collection"].str.startswith("released:")]
    assert compare_released(paper, none).empty
    for rows, count in ((same, 1), (none, 0)):
        text = comparison_markdown(compare_with_paper(paper, rows), rows, paper)
        assert text.count("## The released checkpoints") == count


@pytest.mark.parametrize(
    ("exhibit", "dataset", "trained_on", "factor", "quantity", "extra"),
    [
        # .366561 and .358792 in the author's rows
        ("table2", "NFCorpus", "SciFact", 4, "ndcg", 0.003884),
        ("table2", "NFCorpus", "SciFact", 4, "relative", 0.3884 / 0.375),
        # .332880 and .328310 through PLAID
        ("figure4", "FiQA", "SciFact", 6, "relative", 0.2285 / 0.384),
        ("table2", "NFCorpus", "FiQA", 4, "ndcg", 0.0),
    ],
)
def test_a_checkpoint_may_be_either_of_two_averaged_runs(
    paper, same, exhibit, dataset, trained_on, factor, quantity, extra
):
    cell = exhibit, dataset, f"FT {trained_on} KMeans PF1-6", "kmeans", factor, quantity
    wide, usual = (value(f(paper, same), *cell) for f in (compare_released, compare_with_paper))
    assert wide["tolerance"] - usual["tolerance"] == pytest.approx(extra, rel=1e-3)


def test_lengths_stand_side_by_side(same):
    table = compare_lengths(same.replace({"ndcg@10": {0.05: 0.8}}))
    assert list(table.columns[2:5]) == ["300/48", "180/48", "180/32"] and len(table) == 5
    numbers = [0.808, 0.808, 0.8, 0.8, 0.0, -0.008, -0.008]
    assert table.iloc[0, 0] == "SciFact" and list(table.iloc[0, 1:]) == pytest.approx(numbers)
    lacking = compare_lengths(same[same["model"] != "baseline-d180-q48"])
    assert list(lacking.columns[lacking.isna().all()]) == ["180/48", "180/48 − paper"]
    names = set(load_profile("paper").evaluated_names) & set(same["model"])
    assert {"baseline", "baseline-d180-q32", "baseline-d180-q48"} <= names


def test_markdown_has_no_negative_zero_and_no_nan():
    text = markdown(pd.DataFrame({"n": [1, 2], "x": [-0.0001, np.nan]}), 2)
    assert text.replace(" ", "").splitlines()[2:] == ["|1|0.00|", "|2|notrun|"]


@settings(max_examples=8, phases=[Phase.generate])
@given(st.data())
def test_any_part_of_the_grid_can_be_read(paper, same, data):
    def some(column):
        return data.draw(st.sets(st.sampled_from(sorted(set(same[column]))), min_size=1))

    part = same
    for column in ("model", "collection", "pool_factor"):
        part = part[part[column].isin(some(column))]
    if len(part):
        ours = rows_source(part, "results")
        assert ours.frame[CELL].equals(paper[CELL])
        text = comparison_markdown(compare_with_paper(paper, part), part, paper)
        assert not NAN.search(text + "".join(missing(ours, exhibit) for exhibit in PAPER_EXHIBITS))
