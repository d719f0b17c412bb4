"""Intervals, tests and power against SciPy, worked cases and simulated experiments."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from l2p_utils.files import UserError
from l2p_utils.statistics import above, detectable, effect_size, equivalent, holm, interval


def experiments(seeds, by_seed, by_query, rest=0.0, count=2_000, queries=(60, 90), mean=0.0):
    """`count` experiments; the arguments are what each source adds to the variance of the mean."""
    generator = np.random.default_rng(7)
    shared = generator.normal(0, (by_seed * seeds) ** 0.5, (count, seeds, 1))
    groups = []
    for number in queries:
        share = number / len(queries)
        own = generator.normal(0, (by_query * share) ** 0.5, (count, 1, number))
        noise = generator.normal(0, (rest * seeds * share) ** 0.5, (count, seeds, number))
        groups.append((mean + shared) / len(queries) + own + noise)
    return groups


# ---------------------------------------------------------------- worked cases


def test_one_seed_of_one_collection_is_the_paired_t_test():
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.1, 1, (2, 40))
    found, reference = interval([a - b]), stats.ttest_rel(a, b)
    assert [found.low, found.high] == pytest.approx([*reference.confidence_interval()])
    assert above(found) == pytest.approx(stats.ttest_rel(a, b, alternative="greater").pvalue)
    shifted = stats.ttest_1samp(a - b, -0.3, alternative="greater").pvalue
    assert above(found, -0.3) == pytest.approx(shifted)
    assert found.seeds == 1 and np.isnan(found.error_seeds).all()


def test_one_seed_of_several_collections_agrees_with_the_bootstrap_over_queries():
    generator = np.random.default_rng(1)
    groups = [generator.normal(0.1, 1, 400), generator.exponential(2, 900)]
    found = interval(groups)
    reference = stats.bootstrap(
        groups, lambda *g, axis: sum(x.mean(axis=axis) for x in g), method="percentile", rng=2
    ).confidence_interval
    assert [found.low, found.high] == pytest.approx([*reference], abs=0.01)


def test_two_seeds_and_two_queries_by_hand():
    # seed means 1 and 5, query means 2 and 4, nothing left over
    found = interval([np.array([[0.0, 2.0], [4.0, 6.0]])])
    assert found.mean == pytest.approx(3)
    assert found.error_seeds == pytest.approx(2) and found.error_queries == pytest.approx(1)
    assert found.error == pytest.approx(5**0.5)
    half = stats.t.ppf(0.975, 1) * 5**0.5  # both terms have one degree of freedom
    assert [found.low, found.high] == pytest.approx([3 - half, 3 + half])


def test_the_rest_is_counted_once():
    # seed means 2 and 2, query means 2 and 2: all variance is in the pairing
    found = interval([np.array([[0.0, 4.0], [4.0, 0.0]])])
    assert found.error == found.error_queries == found.error_seeds == 0
    # seed means 0 and 1, query means 0 and 1, the rest ± .5: .25 each, and once too often in two
    found = interval([np.array([[0.0, 0.0], [0.0, 2.0]])])
    assert found.error_queries**2 + found.error_seeds**2 == pytest.approx(0.5)
    assert found.error**2 == pytest.approx(0.25)


def test_a_draw_of_seeds_is_shared_by_collections_and_queries_are_drawn_apart():
    values = np.random.default_rng(2).normal(size=(3, 50))
    found = interval([values, -values])
    assert found.mean == pytest.approx(0) and found.error_seeds == pytest.approx(0)
    assert found.error_queries > 0.05


def test_comparisons_are_judged_apart_and_equal_values_have_no_width():
    values = np.random.default_rng(3).normal(size=(2, 4, 30))
    both, second = interval([values]), interval([values[1]])
    assert [both.low[1], both.high[1]] == [second.low, second.high]
    same = interval([np.full((1, 3, 20), 0.25)])
    assert [*same.low, *same.high] == pytest.approx([0.25, 0.25])
    assert above(same) < 1e-9 and above(same, 0.3) > 1 - 1e-9


def test_p_values_are_those_of_the_intervals():
    found = interval(experiments(3, 1, 1, 1, count=40, mean=1.5))
    p = above(found)
    for level in (0.8, 0.95, 0.99):
        low = interval(experiments(3, 1, 1, 1, count=40, mean=1.5), level).low
        assert ((p < (1 - level) / 2) == (low > 0)).all()


def test_a_single_query_has_a_mean_and_no_interval():
    for seeds in (1, 3):
        found = interval([np.ones((seeds, 1))])
        assert found.mean == 1 and np.isnan([found.low, found.high, found.error]).all()
        assert np.isnan([above(found), equivalent(found, 1), detectable(found)]).all()


@pytest.mark.parametrize(
    "groups", [[np.ones((2, 9)), np.ones((3, 9))], [np.ones((2, 0))], [np.array([1, np.nan])]]
)
def test_what_cannot_be_compared_is_refused(groups):
    with pytest.raises(UserError, match="statistics"):
        interval(groups)


def test_holm_by_hand():
    # .01·4, .03·2, .04·1 → not below .06, .02·3; NaN is no test
    assert holm([0.01, 0.04, np.nan, 0.03, 0.02]) == pytest.approx(
        [0.04, 0.06, np.nan, 0.06, 0.06], nan_ok=True
    )
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])


def test_effect_size_by_hand():
    values = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])  # mean 2, deviation 1
    assert effect_size([values]) == pytest.approx(2)
    assert effect_size([values / 2, values / 2]) == pytest.approx(2)  # a mean over collections


# ---------------------------------------------------------------- simulated experiments


@pytest.mark.parametrize(
    ("seeds", "by_seed", "by_query", "rest", "between"),
    [
        (1, 0, 1, 0, (0.040, 0.060)),
        (3, 1, 0, 0, (0.040, 0.060)),
        (5, 1, 0, 0, (0.040, 0.060)),
        (3, 0, 1, 0, (0.040, 0.060)),
        (5, 0, 1, 0, (0.040, 0.060)),
        (3, 1, 1, 0, (0.020, 0.055)),  # mixed: never above 5 %, somewhat below
        (5, 1, 1, 0, (0.025, 0.055)),
        (3, 4, 1, 2, (0.020, 0.055)),
        (5, 1, 1, 1, (0.025, 0.055)),
        (3, 0, 0, 1, (0.015, 0.055)),
    ],
)
def test_without_an_effect_there_are_five_percent_of_false_alarms(
    seeds, by_seed, by_query, rest, between
):
    found = interval(experiments(seeds, by_seed, by_query, rest))
    alarms = (found.low > 0) | (found.high < 0)
    assert between[0] <= alarms.mean() <= between[1]


def test_the_two_errors_say_what_varies_more():
    seeds = interval(experiments(5, 4, 1))
    queries = interval(experiments(5, 1, 4))
    assert (seeds.error_seeds > seeds.error_queries).mean() > 0.8
    assert (queries.error_seeds < queries.error_queries).mean() > 0.95


@pytest.mark.parametrize("seeds", [1, 5])
def test_the_detectable_difference_is_detected_four_times_in_five(seeds):
    found = interval(experiments(seeds, 0.3 * (seeds > 1), 0.7))
    typical = np.median(detectable(found))
    shifted = interval(experiments(seeds, 0.3 * (seeds > 1), 0.7, mean=typical))
    assert 0.75 < (shifted.low > 0).mean() < 0.85


def test_equivalence_is_seen_where_it_is_and_rarely_at_the_margin():
    inside = interval(experiments(5, 0.3, 0.7))
    assert (equivalent(inside, 4.0) < 0.05).mean() > 0.8
    margin = interval(experiments(5, 0.3, 0.7, mean=4.0))
    assert 0.02 < (equivalent(margin, 4.0) < 0.05).mean() < 0.06
