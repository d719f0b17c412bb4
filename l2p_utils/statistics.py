"""How sure a difference is: intervals over queries and training seeds, tests, effect, power.

The data are paired differences, seeds × queries per collection, with the same seeds everywhere: one
model per seed is measured on all collections. As readers × cases where diagnostic tests are
evaluated (Hillis, *Statistics in Medicine* 26, 2007), both are samples; a difference varies with
seeds, with queries and with their pairing, the rest. Collections are not a sample: no interval says
what another collection would give.

Variances come from mean squares, and the quantile is Cochran's (*Biometrics* 20, 1964): the mean of
the terms' own t quantiles, weighted by their variances. Of 4,000 simulated experiments without an
effect (5 collections of 280 queries, 3 or 5 seeds) 3.3 to 5.4 % were false alarms at a nominal 5,
whatever varied most. Satterthwaite's degrees of freedom (*Biometrics Bulletin* 2, 1946), too many
where few seeds vary most, gave up to 8.3 %; the bootstrap that resamples seeds and queries (Owen,
*Annals of Applied Statistics* 1, 2007), too narrow in the direction of a few seeds and counting the
rest up to three times, 2.8 to 26 %. With one seed these are Student's t intervals over queries,
which Urbano, Lima and Hanjalic (SIGIR 2019) found no less reliable than the bootstrap; they do not
cover the choice of the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from l2p_utils.files import UserError


class Interval(NamedTuple):
    """Differences and how sure they are; arrays have one entry per comparison.

    `error` is the standard error over queries and seeds; `error_queries` what it were if the seeds
    were fixed, `error_seeds` if the queries were: the larger names what varies more. With one seed
    `error_seeds` is NaN and nothing covers the choice of the seed. All but `mean` are NaN where a
    collection has a single query.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error: np.ndarray
    error_queries: np.ndarray
    error_seeds: np.ndarray
    effect: np.ndarray  # see `effect_size`
    seeds: int
    variances: np.ndarray  # (…, terms): seeds first, if several, then queries by collection
    degrees: np.ndarray  # (terms,): of freedom


def interval(groups: Sequence[ArrayLike], level: float = 0.95) -> Interval:
    """Two-sided intervals of sums, over collections, of means over seeds and queries.

    `groups` has an array of differences per collection, (comparisons, seeds, queries); for a single
    comparison (seeds, queries), or (queries,) of one seed. Seeds are the same in all and in the
    same order, queries are each collection's own. For a mean over collections the differences carry
    its weights. Refused: NaN, no values, unequal seeds.
    """
    groups = [np.atleast_2d(np.asarray(group, dtype=float)) for group in groups]
    shapes = [group.shape for group in groups]
    if len({shape[:-1] for shape in shapes}) != 1 or any(group.size == 0 for group in groups):
        raise UserError(
            f"statistics: differences of shapes {shapes}; expected the same comparisons and seeds "
            "in every collection. Compare what was measured on the same seeds and queries."
        )
    if any(np.isnan(group).any() for group in groups):
        raise UserError("statistics: NaN among the values; leave out what was not measured.")
    mean = sum(group.mean(axis=(-1, -2)) for group in groups)
    variances, degrees, fixed = _variances(groups)
    error = np.sqrt(variances.sum(axis=-1))
    seeds, effect = groups[0].shape[-2], effect_size(groups)
    found = Interval(mean, mean, mean, error, *fixed, effect, seeds, variances, degrees)
    half = _half_width(found, (1 - level) / 2)
    return found._replace(low=mean - half, high=mean + half)


def _variances(groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, tuple]:
    """The terms of the mean's variance, their degrees of freedom, the errors with one side fixed.

    The mean squares of seeds and of queries both contain the rest's; it is counted once.
    """
    seeds, counts = groups[0].shape[-2], np.array([group.shape[-1] for group in groups])
    queries = np.stack([_of_mean(group.mean(axis=-2)) for group in groups], axis=-1)
    error_queries = np.sqrt(queries.sum(axis=-1))
    if seeds == 1:
        return queries, counts - 1, (error_queries, np.full_like(error_queries, np.nan))
    by_seed = _of_mean(sum(group.mean(axis=-1) for group in groups))
    rest = np.stack([_of_rest(group) for group in groups], axis=-1)
    terms = [by_seed[..., None], np.maximum(queries - rest, 0.0)]
    degrees = np.array([seeds - 1, *counts - 1])
    return np.concatenate(terms, axis=-1), degrees, (error_queries, np.sqrt(by_seed))


def _of_mean(values: np.ndarray) -> np.ndarray:
    """Variance of the mean of the last axis; NaN of a single value."""
    count = values.shape[-1]
    squares = (values - values.mean(axis=-1, keepdims=True)) ** 2
    return squares.sum(axis=-1) / ((count - 1 or np.nan) * count)


def _of_rest(group: np.ndarray) -> np.ndarray:
    """What the pairing of seeds with queries adds to the variance of a collection's mean."""
    rest = group - group.mean(axis=-1, keepdims=True)
    rest = rest - rest.mean(axis=-2, keepdims=True)
    seeds, queries = group.shape[-2:]
    square = (rest**2).sum(axis=(-1, -2)) / ((seeds - 1) * (queries - 1) or np.nan)
    return square / (seeds * queries)


def _half_width(found: Interval, tail: ArrayLike) -> np.ndarray:
    """Cochran's quantile, exceeded with probability `tail` on one side, times the error."""
    quantiles = -stdtrit(found.degrees, np.asarray(tail, dtype=float)[..., None])
    return (found.variances * quantiles).sum(axis=-1) / np.where(found.error > 0, found.error, 1)


# ---------------------------------------------------------------- tests


def above(found: Interval, bound: float = 0.0) -> np.ndarray:
    """One-sided p-values of "the difference is above `bound`", at least 1e-15.

    Consistent with the intervals: p < .025 where the 95 % interval lies above `bound`.
    """
    distance = found.mean - bound
    low, high = np.full_like(distance, np.log(1e-15)), np.full_like(distance, np.log(0.5))
    for _ in range(50):  # bisection: widths fall as the tail grows
        middle = (low + high) / 2
        wide = _half_width(found, np.exp(middle)) > abs(distance)
        low, high = np.where(wide, middle, low), np.where(wide, high, middle)
    tail = np.where(distance == 0, 0.5, np.exp(high))
    return np.where(np.isnan(found.error), np.nan, np.where(distance < 0, 1 - tail, tail))


def equivalent(found: Interval, margin: float) -> np.ndarray:
    """P-values of "the difference is within ± `margin`": the larger of two one-sided tests.

    Source: Schuirmann, *Journal of Pharmacokinetics and Biopharmaceutics* 15, 1987.
    """
    return np.maximum(above(found, -margin), 1 - above(found, margin))


def holm(p_values: ArrayLike) -> np.ndarray:
    """P-values (tests,) corrected for their number: each ≤ .05 stands at 5 % for all together.

    NaN is no test. Source: Holm, *Scandinavian Journal of Statistics* 6, 1979.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN sorts last
    steps = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1))
    corrected = np.full_like(p, np.nan)
    corrected[order] = np.minimum(steps, 1)
    return corrected


# ---------------------------------------------------------------- sizes


def effect_size(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Cohen's d for pairs: the mean in standard deviations over queries, seeds averaged first.

    `groups` as in `interval`. Of several collections the deviation is their root mean square, in
    the size that a query's difference has where n collections have weight 1/n each.
    """
    means = [group.mean(axis=-2) for group in groups]
    squares = sum(_of_mean(mean) * mean.shape[-1] for mean in means)
    deviation = np.sqrt(len(groups) * squares)
    total = sum(mean.mean(axis=-1) for mean in means)
    return np.divide(total, deviation, out=np.full_like(total, np.nan), where=deviation > 1e-12)


def detectable(found: Interval, power: float = 0.8, level: float = 0.95) -> np.ndarray:
    """The smallest true difference that such data show to be above 0 with probability `power`."""
    return _half_width(found, (1 - level) / 2) + _half_width(found, 1 - power)
