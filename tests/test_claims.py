"""The seven findings: the paper's numbers as PROTOCOL states them, ours by hand-made effects."""

from __future__ import annotations

import pandas as pd
import pytest

from l2p_utils.claims import (
    CLAIM_COLUMNS,
    FINDINGS,
    PARTS,
    OurCells,
    Part,
    check_claims,
    claims_table,
    curve,
    judge_ours,
    paper_cells,
)
from l2p_utils.files import UserError
from l2p_utils.paper import read_paper, roles_of
from l2p_utils.results import read_per_query, read_rows
from tests.hub_rows import hub_rows
from tests.synthetic import OFFLINE_MODELS, PAPER, QUICK_MODELS, make_rows

KMEANS = "docs-scipy-kmeans-pf1-6-s42"


@pytest.fixture(scope="module")
def paper():
    return read_paper(PAPER)


@pytest.fixture(scope="module")
def offline():
    return make_rows(OFFLINE_MODELS, queries=60)


@pytest.fixture(scope="module")
def quick():
    return make_rows(QUICK_MODELS, queries=20)


@pytest.fixture(scope="module")
def on_paper(paper):
    return check_claims(None, None, paper).set_index("part")


def claims_of(runs, paper):
    return check_claims(*runs, paper).set_index("part")


# ---------------------------------------------------------------- the paper's numbers


@pytest.mark.parametrize(
    ("part", "text", "verdict"),
    [
        ("1a", "91.9 vs 89.5", "holds"),  # the brackets of the protocol
        ("1b", "89.5 vs 63.4", "holds"),
        ("1c", "against hierarchical: 94.7 vs 91.2", "holds"),
        ("4a", "PF3: 91.0 vs 89.6", "holds"),
        ("4b", "PF3: 85.7 vs 87.8", "does not hold"),  # 87.85: printed elsewhere as 87.9
        ("6a", "PF2: 97.1 vs 84.1", "holds"),
        ("7c", "SCIDOCS: Δ −0.003", "holds"),
        ("7f", "SCIDOCS: Δ −0.015", "holds"),  # exactly the margin
    ],
)
def test_the_papers_side_gives_the_papers_values(on_paper, part, text, verdict):
    assert list(on_paper.loc[part, ["paper", "paper_verdict"]]) == [text, f"{verdict} (by sign)"]


def test_the_paper_disagrees_with_its_findings_only_for_span_on_fiqa(on_paper):
    assert list(on_paper.index[on_paper["paper_verdict"] != "holds (by sign)"]) == ["4b"]
    assert set(on_paper["finding"]) == set(FINDINGS) and on_paper.index.is_unique


@pytest.mark.parametrize(
    ("side", "value"),
    [
        (curve("pf1", "span", ["SciFact"], [2]), 38.6),  # the protocol's example of finding 3
        (curve("baseline", "span", ["SciFact"], [2]), 84.1),
        (curve("kmeans 1-6", "kmeans", ["FiQA"], [4, 5]), 96.35),  # 97.6 and 95.1 in Figure 3
    ],
)
def test_curves_are_the_means_that_the_paper_prints(paper, side, value):
    cells = paper_cells(paper)["points"]
    assert sum(weight * cells[cell] for weight, cell in side) == pytest.approx(value, abs=0.05)


# ---------------------------------------------------------------- ours


def shifted(per_query, model, by):
    """`model` pooled: every query exactly the baseline's value plus `by`."""
    keys = ["collection", "engine", "pool_method", "pool_factor", "query_id"]
    base = per_query[per_query["model"] == "baseline"].set_index(keys)["ndcg@10"]
    own = per_query["model"] == model
    changed = per_query.copy()
    index = pd.MultiIndex.from_frame(changed.loc[own, keys])
    changed.loc[own, "ndcg@10"] = base.reindex(index).to_numpy() + by
    return changed


@pytest.mark.parametrize(
    ("by", "average", "within"),
    [
        (0.05, "holds", "holds"),
        (-0.05, "does not hold", "does not hold"),
        (0.0, "undecided", "holds"),  # 7c: at most .015 lost
    ],
)
def test_a_planted_difference_is_found_with_its_sign_and_size(paper, quick, by, average, within):
    rows, per_query = quick
    claims = claims_of((rows, shifted(per_query, KMEANS, by)), paper)
    assert list(claims.loc[["7a", "7c"], "verdict"]) == [average, within]
    assert list(claims.loc["7a", ["difference", "low", "high"]]) == pytest.approx([by] * 3)


def test_points_are_percent_of_the_unpooled_baseline(paper, quick):
    rows, per_query = quick
    per_query = shifted(per_query, KMEANS, 0.05)
    exact = per_query[(per_query["engine"] == "exact") & (per_query["model"] == "baseline")]
    unpooled = exact[(exact["pool_method"] == "none") & (exact["collection"] == "docs:scipy")]
    line = claims_of((rows, per_query), paper).loc["2c"]
    assert line["difference"] == pytest.approx(100 * 0.05 / unpooled["ndcg@10"].mean())
    assert line["ours"].endswith("(only on docs:scipy)")


def test_what_was_not_run_is_said_and_never_judged(paper, quick):
    claims = claims_of(quick, paper)
    lacking = claims.loc[["2a", "2d", "2f", "3e", "4a", "5a", "6a", "7d"]]
    assert set(lacking["verdict"]) == {"not run"}
    assert lacking[["difference", "low", "high"]].isna().all().all()
    assert (claims.loc[["1a", "2c", "3b", "6b", "7a"], "verdict"] != "not run").all()


def test_a_part_of_several_comparisons_shows_its_weakest_and_widens_its_interval(offline):
    cells = OurCells(*offline, roles_of(offline[0]))

    def judge(*factors):
        comparisons = [
            (f"PF{f}", *(curve(m, "kmeans", ["SciFact"], [f]) for m in ("kmeans 1-6", "baseline")))
            for f in factors
        ]
        return judge_ours(Part("0x", "x", ("SciFact",), lambda _: comparisons), cells)

    alone = {factor: judge(factor) for factor in range(2, 7)}
    together = judge(*alone)
    weakest = min(alone, key=lambda factor: alone[factor]["low"])
    assert together["ours"].startswith(f"PF{weakest}:")
    assert together["low"] < alone[weakest]["low"] < alone[weakest]["high"] < together["high"]


def test_one_comparison_below_fails_the_whole_part(paper, quick):
    rows, per_query = quick
    per_query = shifted(per_query, KMEANS, 0.05)
    bad = (per_query["model"] == KMEANS) & (per_query["collection"] == "docs:pandas")
    bad &= per_query["pool_factor"] == 4
    per_query.loc[bad, "ndcg@10"] -= 0.08
    line = claims_of((rows, per_query), paper).loc["7b"]
    assert line["verdict"] == "does not hold"
    assert line["ours"].startswith("docs:pandas PF4")
    assert line["difference"] == pytest.approx(-0.03)


def test_two_seeds_are_averaged(paper, quick):
    rows, per_query = quick
    first, second = shifted(per_query, KMEANS, 0.02), shifted(per_query, KMEANS, 0.06)
    twin = {"model": KMEANS.replace("s42", "s43")}
    second = second[second["model"] == KMEANS].assign(**twin)
    rows = pd.concat([rows, rows[rows["model"] == KMEANS].assign(**twin, seed=43)])
    claims = claims_of((rows, pd.concat([first, second])), paper)
    assert claims.loc["7a", "difference"] == pytest.approx(0.04)


def test_plaid_rows_and_other_variants_play_no_part(paper, quick):
    rows, per_query = quick
    plaid = per_query["engine"] == "plaid"
    changed = per_query.assign(**{"ndcg@10": per_query["ndcg@10"].mask(plaid, 0.0)})
    extra = per_query[(per_query["pool_method"] == "hierarchical") & ~plaid]
    extra = extra[extra["model"] == "baseline"].assign(pool_variant="paper", **{"ndcg@10": 0.0})
    changed = pd.concat([changed, extra])
    expected = claims_of(quick, paper)
    pd.testing.assert_frame_equal(claims_of((rows, changed), paper), expected)


def test_models_measured_on_other_queries_are_refused(paper, quick):
    rows, per_query = quick
    gone = (per_query["model"] == "docs-scipy-pf1-s42") & (per_query["query_id"] == "q001")
    with pytest.raises(UserError, match="same queries"):
        claims_of((rows, per_query[~gone]), paper)


# ---------------------------------------------------------------- showing


def test_the_table_shows_every_part_with_interval_and_verdict(paper, quick):
    claims = claims_of(quick, paper)
    text = claims_table(claims.reset_index())
    lines = [line for line in text.split("\n") if line.startswith("|")]
    assert len(lines) == 2 + len(FINDINGS) + len(PARTS)
    assert {line.count("|") for line in lines} == {8}
    assert "{" not in text and "nan" not in text and "interval" in text
    seven = next(line for line in lines if line.startswith("| 7a"))
    number = f"{claims.loc['7a', 'difference']:+.3f}".replace("-", "−")
    assert f"{number} [" in seven and "docs:scipy" in seven


# ---------------------------------------------------------------- the reference run


def test_the_reference_runs_claims_are_the_stored_ones(paper):
    """`tests/fixtures/claims.csv` holds verdicts and intervals by bootstrap."""
    stored = pd.read_csv(PAPER.parents[1] / "tests" / "fixtures" / "claims.csv", dtype=str)
    folder = PAPER.with_name("offline")
    claims = check_claims(read_rows(folder), read_per_query(folder), paper)
    numbers = ["difference", "low", "high"]
    texts = [column for column in CLAIM_COLUMNS if column not in ["finding", *numbers]]
    pd.testing.assert_frame_equal(claims[texts], stored[texts], check_dtype=False)
    gaps = (claims[numbers] - stored[numbers].astype(float)).abs()
    points = claims["unit"] == "points"
    assert gaps["difference"].max() < 1e-4
    assert gaps[points].to_numpy().max() < 0.2 and gaps[~points].to_numpy().max() < 0.002


def test_a_single_query_has_no_interval_and_is_undecided(paper, quick):
    rows, per_query = quick
    claims = claims_of((rows, per_query[per_query["query_id"] == "q001"]), paper)
    assert set(claims["verdict"]) == {"undecided", "not run"}
    assert claims[["low", "high"]].isna().all().all()
    assert "nan" not in claims_table(claims.reset_index())


def test_a_baseline_that_finds_nothing_gives_no_percentages(paper, quick):
    rows, per_query = quick
    found = per_query["ndcg@10"].mask(per_query["model"] == "baseline", 0.0)
    nothing = per_query.assign(**{"ndcg@10": found})
    assert set(claims_of((rows, nothing), paper)["verdict"]) == {"not run"}


def test_the_papers_numbers_as_rows_give_the_papers_side_of_every_finding(paper):
    claims = claims_of(hub_rows(), paper)
    assert not (claims["verdict"] == "not run").any()
    assert claims.loc["1a", "ours"] == claims.loc["1a", "paper"] == "91.9 vs 89.5"
    assert claims.loc["4a", "ours"] == "PF3: 91.0 vs 89.6"
    assert "SciFact (nano:scifact)" in claims.loc["2f", "statement"]
