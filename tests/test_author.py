"""The findings on the author's own result rows: hand-worked cases, his counts, false alarms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from l2p_utils.claims import (
    PARTS,
    AuthorCells,
    Part,
    author_claims,
    author_table,
    curve,
    judge_author,
)
from l2p_utils.paper import ROLES, TRAINING, read_runs
from tests.synthetic import PAPER

BY_NAME = {part.name: part for part in PARTS}
BASE, PF1, KMEANS = ("", "", ""), ("SciFact", "none", "1"), ("SciFact", "kmeans", "1-6")


@pytest.fixture(scope="module")
def runs():
    return read_runs(PAPER / "runs")


@pytest.fixture(scope="module")
def found(runs):
    return author_claims(runs)


def frame(*lines):
    """Rows of kmeans pooling under exact search: training, version, data set, factor, NDCG@10."""
    columns = [*TRAINING, "version", "dataset", "pool_factor", "ndcg@10"]
    rows = pd.DataFrame([(*model, *rest) for model, *rest in lines], columns=columns)
    return rows.assign(engine="exact", pool_method="kmeans")


def against(other, factors=(2,)):
    """A part about SciFact alone: kmeans PF1-6 against another model."""

    def build(d):
        return [("", *(curve(m, "kmeans", d, factors) for m in ("kmeans 1-6", other)))]

    return Part("0x", "x", ("SciFact",), build, together=True)


# Unpooled .5: an NDCG@10 of .01 is two points.
TINY = frame(
    (BASE, 1, "SciFact", 1, 0.50), (BASE, 1, "SciFact", 2, 0.40),
    (KMEANS, 1, "SciFact", 2, 0.45), (KMEANS, 2, "SciFact", 2, 0.43),
    (PF1, 1, "SciFact", 2, 0.44),
)  # fmt: skip


def test_two_runs_give_a_mean_difference_and_its_error_by_hand():
    # +10 and +6 points. Variance of a run: 4² / 2 = 8; of the mean of two: 4; the error: 2.
    line = judge_author(against("baseline"), TINY)
    assert line["author"] == "2 of 2 hold; +8.0 ± 4.0" and line["author_verdict"] == "holds"
    assert [line["author_difference"], line["author_error"]] == pytest.approx([8, 2])


def test_a_model_that_was_trained_once_has_the_noise_of_the_others_in_every_case():
    # +2 and −2 points. kmeans: 4, as above; FT PF1 is the same run in both cases: 8.
    line = judge_author(against("pf1"), TINY)
    assert line["author"] == "1 of 2 hold; +0.0 ± 6.9" and line["author_verdict"] == "undecided"
    assert line["author_error"] == pytest.approx(12**0.5)
    below = judge_author(against("baseline"), TINY.replace({"ndcg@10": {0.4: 0.47}}))
    assert below["author"] == "0 of 2 hold; −6.0 ± 4.0"
    assert below["author_verdict"] == "does not hold"
    margin = replace(against("baseline"), margin=11.0)  # −6 is further above −11 than 4
    within = judge_author(margin, TINY.replace({"ndcg@10": {0.4: 0.47}}))
    assert within["author_verdict"] == "holds" and within["author"].startswith("2 of 2")


def test_the_noise_is_of_the_same_sum_over_factors_and_of_all_collections():
    # SciFact: the runs differ by +.02 at PF2 and −.02 at PF3, which cancels; FiQA: by .02 at both.
    more = frame(
        (BASE, 1, "SciFact", 3, 0.40), (KMEANS, 1, "SciFact", 3, 0.43),
        (KMEANS, 2, "SciFact", 3, 0.45), (BASE, 1, "FiQA", 1, 0.25),
        *[(KMEANS, v, "FiQA", f, 0.2 + 0.02 * v) for v in (1, 2) for f in (2, 3)],
    )  # fmt: skip
    line = judge_author(against("baseline", (2, 3)), pd.concat([TINY, more]))
    # Gaps of 0 and 4 points (in SciFact's percent): variance (0 + 4²) / 2 / 2 = 4, of two runs 2.
    assert line["author_error"] == pytest.approx(2**0.5)
    assert line["author_difference"] == pytest.approx(8)


def test_unpooled_rows_under_several_methods_are_averaged_and_own_ones_kept():
    other = frame((PF1, 1, "SciFact", 1, 0.40)).assign(pool_method="span")
    cells = AuthorCells(pd.concat([TINY, frame((PF1, 1, "SciFact", 1, 0.44)), other]))
    for method, value in (("none", 0.42), ("kmeans", 0.44), ("span", 0.40)):
        assert cells.total(curve("pf1", method, ["SciFact"], [1]), 0) == pytest.approx(value)


def test_a_cell_that_lacks_is_not_run(runs):
    assert judge_author(against("span 2"), TINY)["author_verdict"] == "not run"
    lacking = runs[(runs["run"] != "baseline") | (runs["pool_factor"] > 1)]
    assert judge_author(BY_NAME["7a"], lacking)["author_verdict"] == "not run"
    assert judge_author(BY_NAME["3b"], runs, engine="plaid")["author"] == ""


@pytest.mark.parametrize(
    ("parts", "change", "engine", "hold", "cases"),
    [
        # Counted from the rows by other means: NanoBEIR, all collections × runs, by sign.
        ("2d", {}, "exact", 10, 15),
        ("2b", {}, "exact", 13, 15),
        ("3a", {"margin": 0.0}, "exact", 3, 10),
        ("3b 3c 3d", {}, "exact", 29, 30),
        ("6a", {"statement": ""}, "exact", 11, 15),  # "" names no data set: both count
        ("6b", {"statement": ""}, "exact", 13, 15),
        ("7b 7e", {}, "exact", 11, 12),
        ("5a", {}, "plaid", 0, 3),
        ("6b", {}, "plaid", 2, 4),
    ],
)
def test_cases_are_counted_as_by_other_means(runs, parts, change, engine, hold, cases):
    counts = np.zeros(2, dtype=int)
    for name in parts.split():
        text = judge_author(replace(BY_NAME[name], **change), runs, engine=engine)["author"]
        first, of, total, *_ = text.split()
        assert of == "of"
        counts += int(first), int(total)
    assert list(counts) == [hold, cases]


@pytest.mark.parametrize(("method", "gain"), [("hierarchical", 8), ("kmeans", 15), ("span", 42)])
def test_gains_on_scifact_are_far_above_the_distance_of_two_runs(runs, method, gain):
    def build(d):
        return [("", *(curve(m, method, d) for m in (f"{method} 1-6", "baseline")))]

    line = judge_author(Part("0x", "x", ("SciFact",), build, together=True), runs)
    assert line["author_difference"] == pytest.approx(gain, abs=0.5)
    cells = AuthorCells(runs)
    one, two = (cells.total(curve(f"{method} 1-6", method, ["SciFact"]), v) for v in (0, 1))
    assert abs(one - two) * 100 / 0.80828 < 0.4


def test_two_standard_errors_raise_few_false_alarms():
    """Models that differ from the baseline by noise of training alone: about one in twenty."""
    generator = np.random.default_rng(0)
    methods = ("span", "kmeans", "hierarchical")
    trained = [(("SciFact", method, "1-6"), v) for method in methods for v in (1, 2)]
    models = [(BASE, 1), *trained, (("FiQA", "kmeans", "1-6"), 1)]
    keys = [(*model, d, f) for model in models for d in ROLES for f in range(1, 7)]
    rows = frame(*[(*key, 0.5) for key in keys])
    noisy = (rows["trained_on"] != "").to_numpy()
    outside = []
    for _ in range(300):
        values = 0.5 + noisy * generator.normal(0, 0.02, len(rows))
        line = judge_author(BY_NAME["2c"], rows.assign(**{"ndcg@10": values}))
        outside.append(abs(line["author_difference"]) > 2 * line["author_error"])
    assert 0.02 < np.mean(outside) < 0.11


def test_every_part_is_shown_for_every_metric(found):
    assert len(found) == 4 * len(PARTS)
    not_run = found["author_verdict"] == "not run"  # finding 8 is about means of unit length
    assert set(found.loc[not_run, "part"]) == {part.name for part in PARTS if not part.printed}
    text = author_table(found)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(PARTS) and {line.count("|") for line in lines} == {7}
    assert "nan" not in text and "{" not in text
    one = found.set_index(["part", "metric"])["author"]
    assert one["1b", "ndcg@10"] == "5 of 5 hold; +26.0"  # 89.5 − 63.4 as printed in the paper
    assert one["7b", "ndcg@10"].startswith("7 of 8 hold; NFCorpus PF2: +0.000 ± ")
