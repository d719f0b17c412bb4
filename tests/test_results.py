"""Stored rows come back as they were, wrong ones are refused, comparisons agree with hand work."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest
from synthetic import PAPER, QUICK_MODELS, make_rows, write_synthetic

from l2p_utils import results
from l2p_utils.files import UserError
from l2p_utils.results import (
    ROW_COLUMNS,
    compare,
    default_variant,
    find_models,
    has_rows,
    kept_ndcg,
    merge_results,
    paired_bootstrap,
    parse_label,
    query_values,
    read_paper,
    read_per_query,
    read_rows,
    relative_ndcg,
    series,
    validate_per_query,
    validate_rows,
    write_rows,
)

DATA = PAPER.parent
KMEANS = "docs-scipy-kmeans-pf1-6-s42"


@pytest.fixture(scope="module")
def made():
    rows, per_query = make_rows(QUICK_MODELS, queries=8)
    return validate_rows(rows), validate_per_query(per_query)


@pytest.fixture
def folder(tmp_path):
    write_synthetic(tmp_path / "results", QUICK_MODELS, queries=4)
    return tmp_path / "results"


def one_model(made, model="baseline"):
    rows, per_query = made
    return rows[rows["model"] == model].copy(), per_query[per_query["model"] == model].copy()


# ---------------------------------------------------------------- storing


def test_what_is_written_is_what_is_read(tmp_path, made):
    rows, per_query = one_model(made)
    write_rows(tmp_path, "baseline", rows, per_query)
    pd.testing.assert_frame_equal(read_rows(tmp_path), rows.reset_index(drop=True))
    pd.testing.assert_frame_equal(read_per_query(tmp_path), per_query.reset_index(drop=True))


def test_all_measures_are_kept_where_there_are_per_query_values(tmp_path, made):
    rows, per_query = one_model(made)
    measured = per_query.assign(**{"recall@10": 0.9, "mrr@10": 0.7})  # as the rows have them
    write_rows(tmp_path, "baseline", rows, measured)
    pd.testing.assert_frame_equal(read_per_query(tmp_path), measured.reset_index(drop=True))
    wrong = measured.assign(**{"mrr@10": 0.6})
    with pytest.raises(UserError, match=r"mrr@10 of .* differs from the mean .* by 0.1000"):
        write_rows(tmp_path, "baseline", rows, wrong)


def test_older_values_with_one_measure_are_read_beside_newer_ones(tmp_path, made):
    write_rows(tmp_path, KMEANS, *one_model(made, KMEANS))
    rows, per_query = one_model(made)
    write_rows(tmp_path, "baseline", rows, per_query.assign(**{"recall@10": 0.9, "mrr@10": 0.7}))
    values = read_per_query(tmp_path)
    assert set(values.loc[values["model"] == "baseline", "mrr@10"]) == {0.7}
    assert values.loc[values["model"] == KMEANS, "mrr@10"].isna().all()
    assert values["ndcg@10"].notna().all()
    merge_results(tmp_path, tmp_path / "merged")
    pd.testing.assert_frame_equal(read_per_query(tmp_path / "merged"), values)


def test_the_committed_values_are_read_as_they_are():
    stored = pd.read_parquet(DATA / "offline" / "per_query.parquet")
    pd.testing.assert_frame_equal(read_per_query(DATA / "offline"), stored, check_dtype=False)


def test_empty_text_stays_text_and_factors_stay_names(folder):
    rows = read_rows(folder)
    assert set(rows["pool_variant"]) == {"", "sklearn", "pylate"}
    assert set(rows["train_factors"]) == {"", "1", "1-6"}
    assert rows["renormalized"].dtype == bool
    assert rows.loc[rows["engine"] == "exact", "index_bytes"].isna().all()
    assert list(rows.columns) == ROW_COLUMNS


def test_order_of_columns_and_rows_does_not_matter(tmp_path, made):
    rows, per_query = one_model(made)
    shuffled = rows.sample(frac=1, random_state=1)[ROW_COLUMNS[::-1]]
    write_rows(tmp_path / "a", "baseline", rows, per_query)
    write_rows(tmp_path / "b", "baseline", shuffled, per_query.sample(frac=1, random_state=2))
    for name in ("baseline.csv", "baseline.per_query.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_merging_keeps_every_row_and_is_the_same_every_time(folder, tmp_path):
    merge_results(folder, tmp_path / "once")
    merge_results(folder, tmp_path / "again")
    pd.testing.assert_frame_equal(read_rows(tmp_path / "once"), read_rows(folder))
    pd.testing.assert_frame_equal(read_per_query(tmp_path / "once"), read_per_query(folder))
    for name in ("rows.csv", "per_query.parquet"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_kill_before_the_csv_leaves_no_csv_beside_values_of_another_run(
    tmp_path, made, monkeypatch
):
    rows, per_query = one_model(made)
    csv, parquet = write_rows(tmp_path, "baseline", rows, per_query)
    new_rows, new_values = rows.copy(), per_query.copy()
    new_rows["ndcg@10"], new_values["ndcg@10"] = 0.5, 0.5
    replace = os.replace

    def killed(source, target):
        if str(target).endswith(".csv"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path, "baseline", new_rows, new_values)
    assert parquet.is_file() and not csv.exists()
    assert not has_rows(tmp_path)


def test_a_failed_write_keeps_what_was_there(tmp_path, made, monkeypatch):
    rows, per_query = one_model(made)
    write_rows(tmp_path, "baseline", rows, per_query)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(UserError, match="disk is full"):
        write_rows(tmp_path, "baseline", rows, per_query)
    pd.testing.assert_frame_equal(read_rows(tmp_path), rows.reset_index(drop=True))


def test_a_file_that_is_being_written_is_not_read(folder):
    before = len(read_rows(folder))
    (folder / ".baseline.1-abc.tmp.csv").write_text("half a li")
    assert len(read_rows(folder)) == before


# ---------------------------------------------------------------- refusing


def test_a_missing_folder_says_which_command_makes_it(tmp_path):
    with pytest.raises(UserError, match="PROFILE=offline make run"):
        read_rows(tmp_path / "offline" / "results")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="make run"):
        read_per_query(tmp_path / "empty")


def test_a_foreign_csv_is_named(folder):
    (folder / "notes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"notes\.csv.*missing.*unknown \['a', 'b'\]"):
        read_rows(folder)


def test_a_truncated_csv_is_named(folder):
    file = folder / "baseline.csv"
    file.write_text(file.read_text()[:-150])
    with pytest.raises(UserError, match=r"baseline\.csv"):
        read_rows(folder)


def test_missing_or_broken_values_are_named(folder):
    file = folder / "baseline.per_query.parquet"
    file.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"baseline\.per_query\.parquet cannot be read"):
        read_per_query(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"baseline\.per_query\.parquet is missing"):
        read_per_query(folder)


def test_merged_and_single_files_together_are_refused(folder):
    (folder / "rows.csv").write_text((folder / "baseline.csv").read_text())
    with pytest.raises(UserError, match="counts twice"):
        read_rows(folder)
    with pytest.raises(UserError, match="into itself"):
        merge_results(folder, folder)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("engine", "faiss", "engine .*faiss"),
        ("pool_method", "mean", "pool_method .*mean"),
        ("pool_factor", 0, "unpooled row"),
        ("pool_factor", "two", "pool_factor.*numbers"),
        ("ndcg@10", 1.2, "0–1"),
        ("renormalized", "maybe", "renormalized"),
        ("model", "", "needs a model"),
    ],
)
def test_an_impossible_value_is_refused(made, column, value, message):
    rows = made[0].astype({column: object})
    rows.loc[rows.index[-1], column] = value
    with pytest.raises(UserError, match=message):
        validate_rows(rows)


def test_one_setting_twice_is_refused(made):
    rows, per_query = one_model(made)
    with pytest.raises(UserError, match="1 setting.*twice"):
        validate_rows(pd.concat([rows, rows.iloc[[0]]]))
    with pytest.raises(UserError, match="1 setting.*twice"):
        validate_per_query(pd.concat([per_query, per_query.iloc[[0]]]))


def test_rows_of_another_model_or_other_values_are_refused(tmp_path, made):
    rows, per_query = one_model(made)
    with pytest.raises(UserError, match=r"'mine' only, got \['baseline'\]"):
        write_rows(tmp_path, "mine", rows, per_query)
    with pytest.raises(UserError, match="cover different settings"):
        write_rows(tmp_path, "baseline", rows, per_query[per_query["pool_factor"] < 6])
    shifted = per_query.assign(**{"ndcg@10": per_query["ndcg@10"] * 0.9})
    with pytest.raises(UserError, match="differs from the mean"):
        write_rows(tmp_path, "baseline", rows, shifted)
    assert not list(tmp_path.glob("*"))


# ---------------------------------------------------------------- selecting


def test_relative_ndcg_is_percent_of_the_unpooled_baseline_of_the_same_engine(made):
    rows = made[0].copy()
    unpooled = (rows["model"] == "baseline") & (rows["pool_method"] == "none")
    rows["ndcg@10"] = 0.3
    rows.loc[unpooled & (rows["engine"] == "exact"), "ndcg@10"] = 0.6
    rows.loc[unpooled & (rows["engine"] == "plaid"), "ndcg@10"] = 0.4
    relative = relative_ndcg(rows)["relative_ndcg@10"]
    assert np.allclose(relative[unpooled], 100)
    assert np.allclose(relative[~unpooled & (rows["engine"] == "exact")], 50)
    assert np.allclose(relative[~unpooled & (rows["engine"] == "plaid")], 75)


def test_relative_ndcg_without_its_baseline_is_refused(made):
    rows = made[0]
    lacking = rows[~((rows["model"] == "baseline") & (rows["collection"] == "docs:torch"))]
    with pytest.raises(UserError, match="docs:torch.*baseline"):
        relative_ndcg(lacking)


def test_what_a_model_keeps_is_percent_of_its_own_unpooled_ndcg(made):
    rows = made[0][made[0]["engine"] == "exact"]
    curves = kept_ndcg(rows[rows["model"] == KMEANS])
    assert len(curves) == 5 * 3 * 6 and set(curves["pool_method"]) == {
        "span",
        "kmeans",
        "hierarchical",
    }
    assert np.allclose(curves.loc[curves["pool_factor"] == 1, "kept"], 100)
    one = curves[(curves["collection"] == "docs:numpy") & (curves["pool_method"] == "span")]
    assert list(one["pool_factor"]) == [1, 2, 3, 4, 5, 6]
    own = one["ndcg@10"].iloc[0]
    assert np.allclose(one["kept"], 100 * one["ndcg@10"] / own)


def test_of_an_unpooled_ndcg_of_0_no_part_is_kept(made):
    rows = made[0][(made[0]["engine"] == "exact") & (made[0]["model"] == KMEANS)]
    none = (rows["collection"] == "docs:numpy") & (rows["pool_method"] == "none")
    curves = kept_ndcg(rows.assign(**{"ndcg@10": rows["ndcg@10"].mask(none, 0)}))
    assert curves["kept"].isna().equals(curves["collection"] == "docs:numpy")


def test_a_series_starts_with_the_unpooled_row_and_leaves_gaps_empty(made):
    rows = made[0]
    rows = rows[~((rows["pool_method"] == "kmeans") & (rows["pool_factor"] == 4))]
    curve = series(rows, KMEANS, "docs:numpy", "kmeans")
    own = rows[(rows["model"] == KMEANS) & (rows["collection"] == "docs:numpy")]
    exact = own[own["engine"] == "exact"].set_index(["pool_method", "pool_factor"])["ndcg@10"]
    assert list(curve.index) == [1, 2, 3, 4, 5, 6]
    assert curve[1] == exact["none", 1] and curve[6] == exact["kmeans", 6]
    assert np.isnan(curve[4])
    assert series(rows, "no-such-model", "docs:numpy", "span").isna().all()


def test_another_variant_is_read_only_when_asked_for(made):
    rows = made[0]
    extra = rows[(rows["pool_method"] == "hierarchical") & (rows["model"] == "baseline")]
    extra = extra.assign(pool_variant="paper", **{"ndcg@10": 0.123})
    both = pd.concat([rows, extra])
    where = ("baseline", "docs:scipy", "hierarchical")
    assert series(both, *where).equals(series(rows, *where))
    assert series(both, *where, variant="paper")[3] == 0.123


def test_the_variant_that_most_models_have_is_the_default(made):
    rows = made[0]
    assert default_variant(rows, "kmeans") == "sklearn"
    fast = rows.assign(pool_variant=rows["pool_variant"].replace("sklearn", "fast"))
    assert default_variant(fast, "kmeans") == "fast"
    tied = pd.concat([rows, fast[fast["pool_variant"] == "fast"]])
    assert default_variant(tied, "kmeans") == "fast"
    with pytest.raises(UserError, match="mean"):
        default_variant(rows, "mean")


def test_models_are_found_by_their_training(made):
    rows = made[0]
    assert find_models(rows, "docs:scipy", "kmeans", "1-6") == [KMEANS]
    assert find_models(rows, "docs:scipy", "none", "1") == ["docs-scipy-pf1-s42"]
    assert find_models(rows, "", "", "") == ["baseline"]
    assert find_models(rows, "docs:torch", "kmeans", "1-6") == []


def test_query_values_average_to_the_row(made):
    rows, per_query = made
    values = query_values(per_query, KMEANS, "docs:pandas", "kmeans", 5)
    assert len(values) == 8
    assert values.mean() == pytest.approx(series(rows, KMEANS, "docs:pandas", "kmeans")[5])
    unpooled = query_values(per_query, KMEANS, "docs:pandas", "kmeans", 1)
    assert unpooled.equals(query_values(per_query, KMEANS, "docs:pandas", "span", 1))


# ---------------------------------------------------------------- comparing


def test_the_bootstrap_interval_is_that_of_a_plain_loop():
    random = np.random.default_rng(0)
    a, b = random.random(40), random.random(40)
    means = []
    for _ in range(4000):
        picks = random.integers(0, 40, 40)
        means.append((a[picks] - b[picks]).mean())
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx((a - b).mean())
    assert [low, high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.006)


def test_a_constant_difference_has_no_width_and_pairs_stay_together():
    a = np.random.default_rng(1).random(30)
    assert paired_bootstrap(a + 0.1, a) == pytest.approx((0.1, 0.1, 0.1))


def test_the_bootstrap_repeats_with_its_seed_only():
    a, b = np.random.default_rng(2).random((2, 25))
    assert paired_bootstrap(a, b, seed=7) == paired_bootstrap(a, b, seed=7)
    assert paired_bootstrap(a, b, seed=7) != paired_bootstrap(a, b, seed=8)


def test_collections_are_resampled_apart_and_weigh_alike():
    few, many = np.array([[0.0], [1.0]]), np.zeros((50, 1))
    draws = results.bootstrap_means([few / 2, many / 2], seed=0, resamples=4000)
    # Two queries: 0, .5 or 1 with probabilities 1/4, 1/2, 1/4, at half weight.
    values, counts = np.unique(draws, return_counts=True)
    assert values == pytest.approx([0, 0.25, 0.5])
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([1, 2], [1], "same queries"), ([], [], "same queries"), ([1, np.nan], [1, 2], "NaN")],
)
def test_what_cannot_be_paired_is_refused(a, b, message):
    with pytest.raises(UserError, match=message):
        paired_bootstrap(a, b)


def test_compare_gives_means_and_their_difference(made):
    first = dict(model=KMEANS, collection="docs:scipy", pool_method="kmeans", pool_factor=6)
    second = first | {"model": "baseline"}
    found = compare(made[1], first, second)
    assert found["difference"] == pytest.approx(found["first"] - found["second"])
    assert found["low"] <= found["difference"] <= found["high"] and found["queries"] == 8


def test_compare_with_what_was_not_run_is_nan_never_zero(made):
    first = dict(model="absent", collection="docs:scipy", pool_method="kmeans", pool_factor=6)
    found = compare(made[1], first, first | {"model": "baseline"})
    assert np.isnan([found["first"], found["difference"], found["low"]]).all()
    assert found["second"] > 0 and found["queries"] == 0


def test_compare_refuses_different_queries(made):
    per_query = made[1]
    gone = (per_query["model"] == "baseline") & (per_query["query_id"] == "q003")
    first = dict(model=KMEANS, collection="docs:scipy", pool_method="kmeans", pool_factor=6)
    with pytest.raises(UserError, match="same split"):
        compare(per_query[~gone], first, first | {"model": "baseline"})


# ---------------------------------------------------------------- the paper's numbers


def test_the_papers_files_become_one_frame():
    paper = read_paper(PAPER)
    sizes = paper.groupby("exhibit").size().to_dict()
    assert sizes == {
        "figure1": 108, "figure2": 60, "figure3": 48, "figure4": 144,
        "table1": 24, "table2": 60, "table3": 24, "table4": 24,
    }  # fmt: skip
    assert set(paper["dataset"]) == {
        "SciFact", "FiQA", "NFCorpus", "SCIDOCS", "Touche", "Average",
    }  # fmt: skip
    chosen = paper[(paper["exhibit"] == "figure2") & (paper["label"] == "FT PF1")]
    scifact = chosen[chosen["dataset"] == "SciFact"].set_index("pool_factor")["relative"]
    assert scifact[2] == 38.6
    assert set(chosen["train_method"]) == {"none"} and set(chosen["train_factors"]) == {"1"}


def test_the_papers_model_names_are_understood():
    assert parse_label("Baseline", "FiQA") == ("", "", "")
    assert parse_label("FT Hier PF2", "SciFact") == ("SciFact", "hierarchical", "2")
    assert parse_label("FT FiQA KMeans PF1-6", "Touche") == ("FiQA", "kmeans", "1-6")
    with pytest.raises(UserError, match="FT Mean PF2"):
        parse_label("FT Mean PF2", "FiQA")


def test_a_missing_file_of_the_paper_is_named(tmp_path):
    with pytest.raises(UserError, match=r"figure1\.csv is missing"):
        read_paper(tmp_path)


def test_the_papers_numbers_are_no_result_rows(folder):
    assert not has_rows(PAPER) and has_rows(folder)
