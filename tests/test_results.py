"""Stored rows come back as they were, wrong ones are refused."""

from __future__ import annotations

import math
import os

import numpy as np
import pandas as pd
import pytest
from synthetic import PAPER, QUICK_MODELS, make_rows, write_synthetic

from l2p_utils import results
from l2p_utils.files import UserError
from l2p_utils.results import ROW_COLUMNS, SETTING, read_per_query, read_rows, write_rows

OFFLINE = PAPER.with_name("offline")
KMEANS = "docs-scipy-kmeans-pf1-6-s42"


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


def test_pandas_alone_reads_all_models_rows(folder):
    plain = pd.read_parquet(folder / "rows")
    assert plain["model"].nunique() == 3 and len(plain) == len(read_rows(folder))


def test_the_reference_rows_are_the_means_of_their_queries():
    rows, values = read_rows(OFFLINE), read_per_query(OFFLINE)
    means = values.groupby(SETTING)["ndcg@10"].mean()
    assert len(means) == len(rows)
    assert rows.set_index(SETTING)["ndcg@10"].to_numpy() == pytest.approx(
        means.reindex(pd.MultiIndex.from_frame(rows[SETTING])).to_numpy(), abs=1e-4
    )


@pytest.mark.parametrize("part", ["rows", "per_query"])
def test_a_kill_leaves_no_rows_beside_values_of_another_run(tmp_path, stored, monkeypatch, part):
    rows, per_query = one_model(stored)
    write_rows(tmp_path, "baseline", rows, per_query)
    replace = os.replace

    def killed(source, target):
        if target.parent.name == part:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    half = {"ndcg@10": 0.5}
    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path, "baseline", rows.assign(**half), per_query.assign(**half))
    assert (tmp_path / "per_query" / "baseline.parquet").is_file()
    assert not results.has_rows(tmp_path)
    with pytest.raises(UserError, match="no result rows"):
        read_per_query(tmp_path)


# --- refusing -------------------------------------------------------------------------------------


def test_a_missing_folder_says_which_command_makes_it(tmp_path):
    with pytest.raises(UserError, match="PROFILE=offline make run"):
        read_rows(tmp_path / "offline" / "results")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="make run"):
        read_per_query(tmp_path / "empty")


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"", b"PAR1"])
def test_a_broken_file_is_named(folder, content):
    (folder / "rows" / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"rows/a\.parquet cannot be read"):
        read_rows(folder)


def test_other_columns_and_text_among_numbers_are_refused(folder):
    file = folder / "rows" / "baseline.parquet"
    frame = pd.read_parquet(file)
    frame.drop(columns="renormalized").to_parquet(file)
    with pytest.raises(UserError, match=r"baseline\.parquet.*missing columns \['renormalized'\]"):
        read_rows(folder)
    frame.astype({"seed": str}).assign(seed="forty-two").to_parquet(file)
    with pytest.raises(UserError, match=r"baseline\.parquet.*forty-two"):
        read_rows(folder)


def test_missing_or_broken_values_are_named(folder):
    file = folder / "per_query" / "baseline.parquet"
    for damage in (lambda: file.write_bytes(b"PAR1"), file.unlink):
        damage()
        with pytest.raises(UserError, match=r"per_query/baseline\.parquet cannot be read"):
            read_per_query(folder)


def test_a_model_in_two_files_is_refused(folder):
    for part in ("rows", "per_query"):
        copy = folder / part / "copy.parquet"
        copy.write_bytes((folder / part / "baseline.parquet").read_bytes())
    for read in (read_rows, read_per_query):
        with pytest.raises(UserError, match=r"copy\.parquet both hold results of 'baseline'"):
            read(folder)


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
    own = rows[rows["collection"] == "docs:numpy"].set_index(["pool_method", "pool_factor"])
    own = own.loc[[("none", 1), *(("span", factor) for factor in range(2, 7))], "ndcg@10"]
    assert list(one["ndcg@10"]) == list(own)
    assert np.allclose(one["kept"], 100 * own / own.iloc[0])
    unpooled = (rows["collection"] == "docs:numpy") & (rows["pool_method"] == "none")
    curves = results.kept_ndcg(rows.assign(**{"ndcg@10": rows["ndcg@10"].mask(unpooled, 0)}))
    assert curves["kept"].isna().equals(curves["collection"] == "docs:numpy")


def test_the_variant_that_most_models_have_is_the_default(stored):
    rows = stored[0]
    assert results.default_variant(rows, "kmeans") == "sklearn"
    fast = rows.assign(pool_variant=rows["pool_variant"].replace("sklearn", "fast"))
    assert results.default_variant(fast, "kmeans") == "fast"
    tied = pd.concat([rows, fast[fast["pool_variant"] == "fast"]])
    assert results.default_variant(tied, "kmeans") == "fast"


def test_raw_and_unit_length_rows_are_told_apart_and_share_what_is_not_pooled(stored):
    rows, _ = one_model(stored, KMEANS)
    pooled = (rows["pool_method"] != "none") & (rows["engine"] == "exact")
    unit = rows[pooled].assign(renormalized=True, **{"ndcg@10": 0.25})
    both = results.validate_rows(pd.concat([rows, unit]))
    expected = rows.reset_index(drop=True)
    pd.testing.assert_frame_equal(results.searched(both).reset_index(drop=True), expected)
    other = results.searched(both, True)
    assert len(other) == len(rows) and set(other["engine"]) == {"exact", "plaid"}
    exact = other[other["engine"] == "exact"].set_index("pool_method")["ndcg@10"]
    assert set(exact.drop("none")) == {0.25}


def test_relative_ndcg_takes_the_mean_of_the_baselines_of_all_seeds(stored):
    rows = one_model(stored)[0].assign(**{"ndcg@10": 0.6})
    other = rows.assign(model="baseline-s43", seed=43, **{"ndcg@10": 0.4})
    relative = results.relative_ndcg(pd.concat([rows, other], ignore_index=True))
    assert np.allclose(relative["relative_ndcg@10"], 100 * relative["ndcg@10"] / 0.5)


def test_models_are_found_by_their_training(stored):
    rows = stored[0]
    other = {"seed": 43, "train_renormalized": False}
    more = [
        rows[rows["model"] == KMEANS].assign(model="b", **other),
        rows[rows["model"] == KMEANS].assign(model="unit", train_renormalized=True),
        rows[rows["model"] == "baseline"].assign(model="a", **other),
    ]
    several = pd.concat([*more, rows])
    assert results.find_models(several, "docs:scipy", "kmeans", "1-6") == [KMEANS, "b"]
    assert results.find_models(several, "docs:scipy", "kmeans", "1-6", True) == ["unit"]
    assert results.find_models(several, "", "", "") == ["baseline", "a"]
    released = rows[rows["model"] == "baseline"].assign(
        model="baseline-d180-q32", train_method="none"
    )
    rows = pd.concat([rows, released])
    assert results.find_models(rows, "docs:scipy", "kmeans", "1-6") == [KMEANS]
    assert results.find_models(rows, "docs:scipy", "none", "1") == ["docs-scipy-pf1-s42"]
    assert results.find_models(rows, "", "", "") == ["baseline"]
    assert results.find_models(rows, "", "none", "") == []
    assert results.find_models(rows, "docs:torch", "kmeans", "1-6") == []


# --- a run against the reference ------------------------------------------------------------------


def seeds_of(numbers, **columns):
    """Rows of one cell, one per training seed."""
    row = make_rows([("docs:scipy", "kmeans", "1-6")], queries=2)[0].iloc[[0]]
    rows = [
        row.assign(model=f"m{seed}", seed=seed, **{"ndcg@10": value, **columns})
        for seed, value in enumerate(numbers)
    ]
    return results.validate_rows(pd.concat(rows))


def test_a_cell_is_inside_the_prediction_interval_worked_by_hand():
    # three seeds .50 .52 .54: mean .52, s = .02; t(.975, 2) = 4.3027; half = t · s · sqrt(4/3)
    half = 4.302653 * 0.02 * math.sqrt(4 / 3)
    reference = seeds_of([0.50, 0.52, 0.54])
    for value, inside in ((0.52 + half - 1e-6, True), (0.52 + half + 1e-6, False), (0.4, False)):
        (cell,) = results.compare_runs(seeds_of([value]), reference).itertuples()
        assert (cell.ours, cell.mean) == pytest.approx((value, 0.52))
        assert (cell.low, cell.high) == pytest.approx((0.52 - half, 0.52 + half), abs=1e-6)
        assert cell.inside == inside
    other = seeds_of([0.5], collection="docs:else")
    assert results.compare_runs(other, reference).empty


def test_the_spread_is_pooled_over_models_and_collections():
    # variances .0004 (2 degrees of freedom) and .0016 (2): pooled .001, t(.975, 4) = 2.7764
    second = {"collection": "docs:torch", "model": ["n0", "n1", "n2"]}
    alone = {"collection": "docs:numpy", "model": "o0"}  # one seed, so the interval is wider
    unit = {"renormalized": True}  # a spread of its own
    parts = [
        seeds_of([0.50, 0.52, 0.54]),
        seeds_of([0.30, 0.34, 0.38]).assign(**second),
        seeds_of([0.20]).assign(**alone),
        seeds_of([0.1, 0.9]).assign(**unit),
    ]
    run = pd.concat([seeds_of([0.5]), seeds_of([0.2]).assign(**alone)])
    found = results.compare_runs(run, pd.concat(parts)).set_index("collection")
    for collection, seeds in {"docs:scipy": 3, "docs:numpy": 1}.items():
        half = 2.776445 * math.sqrt(0.001 * (1 + 1 / seeds))
        assert found.loc[collection, "high"] - found.loc[collection, "mean"] == pytest.approx(half)
    with pytest.raises(UserError, match="one training seed"):
        results.compare_runs(run, seeds_of([0.5]))


def test_one_more_seed_is_outside_in_a_twentieth_of_cells():
    # 400 spreads of five cells with two seeds each: with 1.96 in place of t it were 11 %
    random, factors = np.random.default_rng(0), np.repeat(np.arange(2, 402), 5)
    row = seeds_of([0.0])

    def seed(n):
        rows = row.loc[row.index.repeat(len(factors))].assign(pool_factor=factors, model=f"m{n}")
        values = random.normal(0.5, 0.01, len(factors))
        return rows.assign(collection=[f"c{i % 5}" for i in range(2_000)], **{"ndcg@10": values})

    found = results.compare_runs(seed(9), pd.concat([seed(0), seed(1)]))
    assert len(found) == 2_000 and 0.035 < 1 - found["inside"].mean() < 0.065


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Five seeds; a second training collection, on which kmeans gains much more."""
    both = [*QUICK_MODELS, ("docs:torch", "none", "1"), ("docs:torch", "kmeans", "1-6")]
    return runs_of(tmp_path_factory.mktemp("reference"), range(40, 45), both)


def runs_of(folder, seeds, models=QUICK_MODELS, shift=0.0, factors=range(1, 7)):
    """Rows of models with these training seeds; those trained with kmeans are shifted."""
    random, parts = np.random.default_rng(len(seeds)), []
    rows, values = make_rows(models, queries=4, plaid=False)
    kmeans, torch = rows["train_method"] == "kmeans", rows["train_collection"] == "docs:torch"
    more = np.where(torch, 0.1, shift) * (kmeans & rows["pool_factor"].isin(factors))
    for seed in seeds:
        moved = rows["ndcg@10"] + more + random.normal(0, 0.002, len(rows))
        names = rows["model"] + f"-{seed}"
        parts.append(rows.assign(model=names, seed=seed, **{"ndcg@10": moved}))
    write_rows(folder, "all", pd.concat(parts), values)
    return str(folder)


def test_another_seed_and_the_reference_itself_are_within_its_spread(tmp_path, reference, capsys):
    assert results.main([runs_of(tmp_path, [50]), "--reference", reference]) == 0
    shown = capsys.readouterr().out
    assert "240 cells of exact search" in shown and "; 0 rows equal" in shown
    cells = results.compare_runs(*map(read_rows, (tmp_path, reference)))
    assert f"\n{(~cells['inside']).sum()} cells (" in shown
    assert "The run is within the spread" in shown and "docs:torch False" not in shown
    assert results.main([reference, "--reference", reference]) == 0
    assert "400 cells of exact search" in (shown := capsys.readouterr().out)
    assert "; 2000 rows equal" in shown and "\n0 cells (0.0 %) are outside" in shown


@pytest.mark.parametrize(("shift", "factors", "few"), [(-0.03, range(1, 7), 0), (-0.005, [6], 1)])
def test_another_training_fails_as_does_a_headline_alone(
    tmp_path, reference, capsys, shift, factors, few
):
    run = runs_of(tmp_path, [40], shift=shift, factors=factors)
    assert results.main([run, "--reference", reference]) == 1
    cells = results.compare_runs(*map(read_rows, (run, reference)))
    outside = cells[~cells["inside"]]
    assert (len(outside) <= 0.1 * len(cells)) == few
    shown = capsys.readouterr().out
    assert "NOT within" in shown
    listed = shown.count("docs-scipy-kmeans-pf1-6-s42-40")
    assert listed == (outside["train_method"] == "kmeans").sum() > 0
    headlines = results.compare_headlines(*map(read_rows, (run, reference)))
    assert headlines["rival"].tolist() == ["FT PF1", "the baseline"]
    assert headlines["train_collection"].tolist() == ["docs:scipy"] * 2
    assert not headlines["inside"].any()


def test_a_headline_worked_by_hand():
    # gains over FT PF1 of seeds 0 and 1: .02 and .04 on one collection, .06 and .05 on the other
    def one(model, method, seed, collection, value):
        training = {"train_method": method, "train_factors": "1-6" if method == "kmeans" else "1"}
        cell = {"pool_method": "kmeans", "pool_factor": 6, "collection": collection, **training}
        return seeds_of([value], **cell).assign(model=f"{model}{seed}", seed=seed)

    values = {("a", 0): 0.02, ("a", 1): 0.04, ("b", 0): 0.06, ("b", 1): 0.05}
    parts = [one("k", "kmeans", s, c, 0.5 + gain) for (c, s), gain in values.items()]
    parts += [one("p", "none", s, c, 0.5) for c, s in values]
    rows = pd.concat(parts)
    found = results.compare_headlines(rows[rows["seed"] == 0], rows).iloc[0]
    # means over collections .04 and .045: mean .0425, s = .0035355; t(.975, 1) = 12.7062
    half = 12.7062047 * 0.0035355339 * math.sqrt(1.5)
    assert (found["ours"], found["mean"]) == pytest.approx((0.04, 0.0425))
    assert found["high"] - found["mean"] == pytest.approx(half)


def test_without_a_spread_or_a_headline_no_run_passes(tmp_path, reference, capsys):
    one = runs_of(tmp_path / "one", [42])
    assert results.main([one, "--reference", one]) == 1
    assert "one training seed" in capsys.readouterr().err
    baseline = runs_of(tmp_path / "baseline", [42], QUICK_MODELS[:1])
    assert results.main([baseline, "--reference", reference]) == 1
    assert "no headline difference in common" in capsys.readouterr().err
    assert results.main([str(tmp_path / "none"), "--reference", one]) == 1
    assert "no result rows" in capsys.readouterr().err
