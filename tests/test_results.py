"""Stored rows come back as they were, wrong ones are refused, comparisons agree with hand work."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest
from synthetic import PAPER, QUICK_MODELS, make_rows, write_synthetic

from l2p_utils import results
from l2p_utils.files import UserError
from l2p_utils.results import ROW_COLUMNS, SETTING, read_per_query, read_rows, series, write_rows

OFFLINE = PAPER.with_name("offline")
KMEANS = "docs-scipy-kmeans-pf1-6-s42"
FILES = ("rows.csv", "per_query.parquet")


@pytest.fixture(scope="module")
def stored():
    rows, per_query = make_rows(QUICK_MODELS, queries=8)
    return results.validate_rows(rows), results.validate_per_query(per_query)


@pytest.fixture
def folder(tmp_path):
    write_synthetic(tmp_path / "results", QUICK_MODELS, queries=4)
    return tmp_path / "results"


def one_model(stored, model="baseline"):
    rows, per_query = stored
    return rows[rows["model"] == model].copy(), per_query[per_query["model"] == model].copy()


# --- storing --------------------------------------------------------------------------------------


def test_what_is_written_is_what_is_read_in_whatever_order_it_came(tmp_path, stored):
    rows, per_query = one_model(stored)
    shuffled = rows.sample(frac=1, random_state=1)[ROW_COLUMNS[::-1]]
    files = write_rows(tmp_path / "a", "baseline", rows, per_query)
    others = write_rows(tmp_path / "b", "baseline", shuffled, per_query.sample(frac=1))
    for one, other in zip(files, others, strict=True):
        assert one.read_bytes() == other.read_bytes()
    found = read_rows(tmp_path / "b")
    pd.testing.assert_frame_equal(found, rows.reset_index(drop=True))
    pd.testing.assert_frame_equal(read_per_query(tmp_path / "b"), per_query.reset_index(drop=True))
    # empty text stays text, factors stay names, what was not measured is no 0
    assert set(found["pool_variant"]) == {"", "sklearn", "pylate"}
    assert set(found["train_factors"]) == {""} and found["renormalized"].dtype == bool
    assert found.loc[found["engine"] == "exact", "index_bytes"].isna().all()


def test_merging_keeps_every_row_older_ones_with_one_measure_too(tmp_path, stored):
    write_rows(tmp_path, KMEANS, *one_model(stored, KMEANS))
    rows, per_query = one_model(stored)
    write_rows(tmp_path, "baseline", rows, per_query.assign(**{"recall@10": 0.9, "mrr@10": 0.7}))
    rows, values = read_rows(tmp_path), read_per_query(tmp_path)
    assert set(rows.loc[rows["model"] == KMEANS, "train_factors"]) == {"1-6"}
    assert set(values.loc[values["model"] == "baseline", "mrr@10"]) == {0.7}
    assert values.loc[values["model"] == KMEANS, "mrr@10"].isna().all()
    results.merge_results(tmp_path, tmp_path / "merged")
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {*FILES}
    pd.testing.assert_frame_equal(read_rows(tmp_path / "merged"), rows)
    pd.testing.assert_frame_equal(read_per_query(tmp_path / "merged"), values)


def test_the_reference_rows_are_the_means_of_their_queries_and_are_stored_as_we_store(tmp_path):
    rows, values = read_rows(OFFLINE), read_per_query(OFFLINE)
    means = values.groupby(SETTING)["ndcg@10"].mean()
    assert len(means) == len(rows)
    assert rows["ndcg@10"].to_numpy() == pytest.approx(means.to_numpy(), abs=1e-4)
    results.merge_results(OFFLINE, tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (OFFLINE / name).read_bytes()


def test_a_kill_leaves_no_csv_beside_values_of_another_run(tmp_path, stored, monkeypatch):
    rows, per_query = one_model(stored)
    csv, parquet = write_rows(tmp_path, "baseline", rows, per_query)
    replace = os.replace

    def killed(source, target):
        if str(target).endswith(".csv"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    half = {"ndcg@10": 0.5}
    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path, "baseline", rows.assign(**half), per_query.assign(**half))
    assert parquet.is_file() and not csv.exists() and not results.has_rows(tmp_path)


# --- refusing -------------------------------------------------------------------------------------


def test_a_missing_folder_says_which_command_makes_it(tmp_path):
    with pytest.raises(UserError, match="PROFILE=offline make run"):
        read_rows(tmp_path / "offline" / "results")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="make run"):
        read_per_query(tmp_path / "empty")


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"", b"\xff\xfe\x00", b"model,model\nx\n"])
def test_a_foreign_csv_is_named(folder, content):
    assert results.has_rows(folder)
    (folder / "a.csv").write_bytes(content)
    assert not results.has_rows(folder)  # by its first file
    with pytest.raises(UserError, match=r"a\.csv"):
        read_rows(folder)


def test_text_in_a_column_of_numbers_is_refused(folder):
    file = folder / "baseline.csv"
    file.write_text(file.read_text().replace(",42,", ",forty-two,", 1))
    with pytest.raises(UserError, match=r"baseline\.csv.*forty-two"):
        read_rows(folder)


def test_missing_or_broken_values_are_named(folder):
    file = folder / "baseline.per_query.parquet"
    for damage in (lambda: file.write_bytes(b"PAR1"), file.unlink):
        damage()
        with pytest.raises(UserError, match=r"baseline\.per_query\.parquet, .* cannot be read"):
            read_per_query(folder)


def test_merged_and_single_files_together_are_refused(folder):
    (folder / "rows.csv").write_text((folder / "baseline.csv").read_text())
    with pytest.raises(UserError, match="counts twice"):
        read_rows(folder)
    with pytest.raises(UserError, match="into itself"):
        results.merge_results(folder, folder)


def test_one_setting_twice_is_refused(stored):
    rows, per_query = one_model(stored)
    with pytest.raises(UserError, match="1 setting.*twice"):
        results.validate_rows(pd.concat([rows, rows.iloc[[0]]]))
    with pytest.raises(UserError, match="1 setting.*twice"):
        results.validate_per_query(pd.concat([per_query, per_query.iloc[[0]]]))


# --- selecting ------------------------------------------------------------------------------------


def test_relative_ndcg_is_percent_of_the_unpooled_baseline_of_the_same_engine(stored):
    rows = stored[0].assign(**{"ndcg@10": 0.3})
    unpooled = (rows["model"] == "baseline") & (rows["pool_method"] == "none")
    exact = rows["engine"] == "exact"
    rows.loc[unpooled & exact, "ndcg@10"] = 0.6
    rows.loc[unpooled & ~exact, "ndcg@10"] = 0.4
    relative = results.relative_ndcg(rows)["relative_ndcg@10"]
    assert np.allclose(relative[unpooled], 100)
    assert np.allclose(relative[~unpooled & exact], 50)
    assert np.allclose(relative[~unpooled & ~exact], 75)


def test_relative_ndcg_without_its_baseline_is_refused_or_nan(stored):
    rows = stored[0]
    torch = rows["collection"] == "docs:torch"
    lacking = rows[~((rows["model"] == "baseline") & torch)]
    with pytest.raises(UserError, match="docs:torch.*baseline"):
        results.relative_ndcg(lacking)
    relative = results.relative_ndcg(lacking, partial=True)["relative_ndcg@10"]
    assert relative.isna().equals(lacking["collection"] == "docs:torch")
    zero = rows.assign(**{"ndcg@10": rows["ndcg@10"].mask(torch, 0.0)})
    assert results.relative_ndcg(zero, partial=True)["relative_ndcg@10"].isna().equals(torch)


def test_kept_ndcg_is_percent_of_the_models_own_unpooled_ndcg(stored):
    rows = stored[0][(stored[0]["engine"] == "exact") & (stored[0]["model"] == KMEANS)]
    curves = results.kept_ndcg(rows)
    assert len(curves) == 5 * 3 * 6
    assert set(curves["pool_method"]) == {"span", "kmeans", "hierarchical"}
    assert np.allclose(curves.loc[curves["pool_factor"] == 1, "kept"], 100)
    one = curves[(curves["collection"] == "docs:numpy") & (curves["pool_method"] == "span")]
    assert list(one["pool_factor"]) == [1, 2, 3, 4, 5, 6]
    assert np.allclose(one["kept"], 100 * one["ndcg@10"] / one["ndcg@10"].iloc[0])
    unpooled = (rows["collection"] == "docs:numpy") & (rows["pool_method"] == "none")
    curves = results.kept_ndcg(rows.assign(**{"ndcg@10": rows["ndcg@10"].mask(unpooled, 0)}))
    assert curves["kept"].isna().equals(curves["collection"] == "docs:numpy")


def test_a_series_starts_with_the_unpooled_row_and_leaves_gaps_empty(stored):
    rows = stored[0]
    rows = rows[~((rows["pool_method"] == "kmeans") & (rows["pool_factor"] == 4))]
    curve = series(rows, KMEANS, "docs:numpy", "kmeans")
    own = rows[(rows["model"] == KMEANS) & (rows["collection"] == "docs:numpy")]
    exact = own[own["engine"] == "exact"].set_index(["pool_method", "pool_factor"])["ndcg@10"]
    assert list(curve.index) == [1, 2, 3, 4, 5, 6]
    assert curve[1] == exact["none", 1] and curve[6] == exact["kmeans", 6]
    assert np.isnan(curve[4])
    assert series(rows, "no-such-model", "docs:numpy", "span").isna().all()


def test_the_variant_that_most_models_have_is_the_default(stored):
    rows = stored[0]
    assert results.default_variant(rows, "kmeans") == "sklearn"
    fast = rows.assign(pool_variant=rows["pool_variant"].replace("sklearn", "fast"))
    assert results.default_variant(fast, "kmeans") == "fast"
    tied = pd.concat([rows, fast[fast["pool_variant"] == "fast"]])
    assert results.default_variant(tied, "kmeans") == "fast"
    extra = rows[(rows["pool_method"] == "hierarchical") & (rows["model"] == "baseline")]
    both = pd.concat([rows, extra.assign(pool_variant="paper", **{"ndcg@10": 0.123})])
    curve = ("baseline", "docs:scipy", "hierarchical")
    assert series(both, *curve).equals(series(rows, *curve))
    assert series(both, *curve, variant="paper")[3] == 0.123


def test_models_are_found_by_their_training(stored):
    rows = stored[0]
    released = rows[rows["model"] == "baseline"].assign(
        model="baseline-d180-q32", train_method="none"
    )
    rows = pd.concat([rows, released])
    assert results.find_models(rows, "docs:scipy", "kmeans", "1-6") == [KMEANS]
    assert results.find_models(rows, "docs:scipy", "none", "1") == ["docs-scipy-pf1-s42"]
    assert results.find_models(rows, "", "", "") == ["baseline"]
    assert results.find_models(rows, "", "none", "") == []
    assert results.find_models(rows, "docs:torch", "kmeans", "1-6") == []


def test_query_values_average_to_the_row(stored):
    rows, per_query = stored
    values = results.query_values(per_query, KMEANS, "docs:pandas", "kmeans", 5)
    assert len(values) == 8
    assert values.mean() == pytest.approx(series(rows, KMEANS, "docs:pandas", "kmeans")[5])
    unpooled = results.query_values(per_query, KMEANS, "docs:pandas", "kmeans", 1)
    assert unpooled.equals(results.query_values(per_query, KMEANS, "docs:pandas", "span", 1))


# --- comparing ------------------------------------------------------------------------------------


def test_the_bootstrap_interval_is_that_of_a_plain_loop():
    random = np.random.default_rng(0)
    a, b = random.random((2, 40))
    picks = np.random.default_rng(42).integers(0, 40, (10_000, 40))
    means = [(a[drawn] - b[drawn]).mean() for drawn in picks]
    expected = (a - b).mean(), *np.percentile(means, [2.5, 97.5])
    assert results.paired_bootstrap(a, b) == pytest.approx(expected)
    assert results.paired_bootstrap(a, b) == results.paired_bootstrap(a, b)
    assert results.paired_bootstrap(a, b, seed=7) != results.paired_bootstrap(a, b, seed=8)


def test_a_constant_difference_has_no_width_and_a_single_query_no_interval():
    a = np.random.default_rng(1).random(30)
    assert results.paired_bootstrap(a + 0.1, a) == pytest.approx((0.1, 0.1, 0.1))
    assert results.paired_bootstrap([0.5], [0.25]) == pytest.approx(
        (0.25, np.nan, np.nan), nan_ok=True
    )


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([1, 2], [1], "same queries"), ([], [], "same queries"), ([1, np.nan], [1, 2], "NaN")],
)
def test_what_cannot_be_paired_is_refused(a, b, message):
    with pytest.raises(UserError, match=message):
        results.paired_bootstrap(a, b)
