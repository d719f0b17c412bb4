"""The paper's seven findings as testable statements, judged on its numbers and on ours.

How a part of a finding is judged
---------------------------------
A part is one or more *comparisons*; each is a difference of sums of curves over pool factors, in
points of relative NDCG@10 (percent of the unpooled baseline) or in NDCG@10. A part holds where all
of its comparisons do.

- The paper's numbers have no per-query values: its verdict is by the sign alone.
- Ours: a paired bootstrap over queries. Queries are resampled within each collection, and the same
  resample serves both sides and all pool factors; collections are averaged with equal weight, as
  the paper averages its data sets. The unpooled baseline, the 100 %, is held fixed. *holds*: the
  95 % interval lies on the right side of the margin (0 unless the part says otherwise); *does not
  hold*: on the wrong side; else *undecided*; *not run* where a model or a setting is missing.
- Multiple testing. Within a part of m comparisons ("at every factor", "best of three") each
  interval is taken at 1 − .05/m (Bonferroni), so that the m of them hold together at 95 %; the
  weakest is shown. Between parts nothing is corrected: of some twenty-five parts, one may come out
  on a side by chance alone. Read the pattern, not a single line.
- The intervals speak of queries, not of another training seed; where several seeds were run, a
  query's value is their mean, as the paper averages two runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from l2p_utils.files import UserError
from l2p_utils.paper import ROLES, TRAINED, Roles, roles_of
from l2p_utils.results import BASELINE, POOL_FACTORS, VARIANTS, default_variant, find_models

CLAIM_COLUMNS = [
    "finding", "part", "statement", "paper", "paper_verdict",
    "ours", "difference", "low", "high", "verdict", "unit",
]  # fmt: skip
HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided", "not run"
FINDINGS = {
    1: "Inference only: hierarchical > kmeans > span on average; kmeans leads at PF3",
    2: "Lightweight fine-tuning makes models pooling-aware, kmeans most of the three",
    3: "It is the pooling in training that does it: FT PF1 does not survive pooling",
    4: "One model for all factors: PF1-6 is within a point of the best fixed-factor model",
    5: "Span gains most over its own baseline, and stays the weakest method",
    6: "Across methods: hierarchical and kmeans training also help span pooling",
    7: "Across collections: kmeans training does not lose elsewhere",
}
NOTE = (
    "Numbers are percent of the unpooled baseline's NDCG@10 (finding 7: differences in NDCG@10), "
    "means over pool factors and collections. If a part involves several comparisons, the weakest "
    "is shown. The paper's verdict is by the sign alone; ours by a paired bootstrap over queries: "
    "*holds* and *does not hold* where the 95 % interval (over all comparisons of a part together) "
    "lies on one side, else *undecided*. Parts are not corrected for each other, and the intervals "
    "do not cover the choice of training seed."
)

# ---------------------------------------------------------------- the terms of a statement


class Cell(NamedTuple):
    """One measurement, in the paper's terms: which model, on which data set, pooled how."""

    dataset: str
    trained_on: str  # "" for the baseline
    train_method: str
    train_factors: str
    pool_method: str
    pool_factor: int

    @classmethod
    def unpooled(cls, dataset: str) -> Cell:
        """The baseline's cell that percentages refer to."""
        return cls(dataset, "", "", "", "none", 1)


Side = list[tuple[float, Cell]]  # a weighted sum of cells


class Comparison(NamedTuple):
    """``first − second``, two weighted sums of cells; `label` tells it from others of its part."""

    label: str
    first: Side
    second: Side

    def weights(self) -> Side:
        """The difference as one sum."""
        return self.first + _negative(self.second)


def _negative(side: Side) -> Side:
    return [(-weight, cell) for weight, cell in side]


@dataclass(frozen=True)
class Part:
    """A part of a finding: comparisons that must all exceed ``-margin``."""

    name: str  # the finding's number and a letter
    statement: str  # {SciFact} stands for the collection in that role
    datasets: tuple[str, ...]  # the paper's data sets that it is about
    build: Callable[[tuple[str, ...]], list[Comparison]]  # from those of `datasets` that were run
    margin: float = 0.0
    unit: str = "points"  # of relative NDCG@10, or "ndcg"
    together: bool = False  # whether it makes sense only with all `datasets`

    @property
    def finding(self) -> int:
        """A key of `FINDINGS`."""
        return int(self.name[0])


POOLED = POOL_FACTORS[1:]


def curve(
    model: str,
    pool_method: str,
    datasets: Iterable[str],
    factors: Iterable[int] = POOLED,
    trained_on: str | None = None,
) -> Side:
    """Mean over `datasets` and `factors` of one kind of model under one pool method.

    Parameters
    ----------
    model
        "baseline", "pf1", or a method and factors such as "kmeans 1-6".
    trained_on
        None: on the data set that it is evaluated on.
    """
    datasets, factors = tuple(datasets), tuple(factors)
    method, _, trained = {"baseline": "", "pf1": "none 1"}.get(model, model).partition(" ")
    side = []
    for dataset in datasets:
        source = "" if model == "baseline" else trained_on or dataset
        for factor in factors:
            cell = Cell(dataset, source, method, trained, pool_method, factor)
            side.append((1 / (len(datasets) * len(factors)), cell))
    return side


def gain(method: str, datasets: Iterable[str], factors: Iterable[int] = POOLED) -> Side:
    """What PF1-6 training with `method` adds to the baseline under that method."""
    baseline = curve("baseline", method, datasets, factors)
    return curve(f"{method} 1-6", method, datasets, factors) + _negative(baseline)


# ---------------------------------------------------------------- the seven findings


def _parts() -> list[Part]:
    every, own, scifact = tuple(ROLES), TRAINED, TRAINED[:1]
    methods = ("span", "hierarchical", "kmeans")

    def base(method, d, factors=POOLED):
        return curve("baseline", method, d, factors)

    def multi(method, d, factors=POOLED):
        return curve(f"{method} 1-6", method, d, factors)

    def one(first, second):  # a part of one comparison
        return lambda d: [Comparison("", first(d), second(d))]

    def several(labels, first, second):  # one comparison per label
        return lambda d: [Comparison(label, first(x, d), second(x, d)) for x, label in labels]

    def against(*others):
        return [(other, f"against {other}") for other in others]

    say1 = "baseline, mean of PF 2–6 and the collections: "
    say2 = "PF1-6 beats the baseline, own method, own collection, PF 2–6: "
    say3 = "pooled (PF 2–6), FT PF1 falls below the baseline: "
    leaders = several(
        against("hierarchical", "span"),
        lambda _, d: base("kmeans", d, [3]), lambda x, d: base(x, d, [3]),
    )  # fmt: skip
    best = several(
        against("hierarchical", "span"), lambda _, d: multi("kmeans", d), lambda x, d: multi(x, d)
    )

    def beats(method):
        return one(lambda d: multi(method, d), lambda d: base(method, d))

    def below(method):
        return one(lambda d: base(method, d), lambda d: curve("pf1", method, d))

    parts = [
        Part("1a", say1 + "hierarchical > kmeans", every,
             one(lambda d: base("hierarchical", d), lambda d: base("kmeans", d))),
        Part("1b", say1 + "kmeans > span", every,
             one(lambda d: base("kmeans", d), lambda d: base("span", d))),
        Part("1c", "baseline at PF3: kmeans leads the other two", every, leaders),
        Part("2a", say2 + "span", own, beats("span")),
        Part("2b", say2 + "hierarchical", own, beats("hierarchical")),
        Part("2c", say2 + "kmeans", own, beats("kmeans")),
        Part("2d", "kmeans PF1-6 is the best of the three, own method", own, best),
        Part("2e", "the gain of kmeans is larger at PF6 than at PF2", own,
             one(lambda d: gain("kmeans", d, [6]), lambda d: gain("kmeans", d, [2]))),
        Part("2f", "the gain of kmeans is larger on {SciFact} than on {FiQA}", own,
             one(lambda d: gain("kmeans", d[:1]), lambda d: gain("kmeans", d[1:])), together=True),
        Part("3a", "unpooled, FT PF1 keeps the baseline's NDCG (within a point) or raises it", own,
             one(lambda d: curve("pf1", "none", d, [1]), lambda d: base("none", d, [1])), 1.0),
        Part("3b", say3 + "span", own, below("span")),
        Part("3c", say3 + "hierarchical", scifact, below("hierarchical")),
        Part("3d", say3 + "kmeans", scifact, below("kmeans")),
        Part("3e", "pooled, PF1-6 beats FT PF1 with each method", scifact,
             several([(m, m) for m in methods], multi, lambda m, d: curve("pf1", m, d))),
    ]  # fmt: skip
    for name, method, dataset, fixed in (
        ("4a", "span", "SciFact", "23"),
        ("4b", "span", "FiQA", "23"),
        ("4c", "hierarchical", "SciFact", "2"),
        ("4d", "kmeans", "SciFact", "2"),
    ):
        say = "mean of PF 1–6, PF1-6 within a point of the best fixed factor: "
        near = several(
            [(f"{method} {f}", f"PF{f}") for f in fixed],
            lambda x, d: multi(x.split()[0], d, POOL_FACTORS),
            lambda x, d: curve(x, x.split()[0], d, POOL_FACTORS),
        )
        parts.append(Part(name, f"{say}{method}, {{{dataset}}}", (dataset,), near, 1.0))
    others = ("hierarchical", "kmeans")
    parts += [
        Part("5a", "PF1-6 over its own baseline: span gains most", own,
             several(against(*others), lambda _, d: gain("span", d), gain)),
        Part("5b", "of the PF1-6 models, span stays the weakest", own,
             several([(o, f"{o} − span") for o in others], multi, lambda _, d: multi("span", d))),
    ]  # fmt: skip
    for name, method in (("6a", "hierarchical"), ("6b", "kmeans")):
        say = f"{method}-trained beats the baseline under span pooling at every PF ≥ 2, {{SciFact}}"
        each = several(
            [((method, f), f"PF{f}") for f in POOLED],
            lambda x, d: curve(f"{x[0]} 1-6", "span", d, [x[1]]),
            lambda x, d: base("span", d, [x[1]]),
        )
        parts.append(Part(name, say, scifact, each))
    return parts + _across("SciFact", "abc") + _across("FiQA", "def")


def _across(source: str, letters: str) -> list[Part]:
    """Finding 7 for the model trained on `source`."""
    others = tuple(dataset for dataset in ROLES if dataset != source)
    printed = (2, 4, 6)  # the factors of Table 2

    def compare(label, d, factors):
        trained = curve("kmeans 1-6", "kmeans", d, factors, source)
        return Comparison(label, trained, curve("baseline", "kmeans", d, factors))

    def on_average(d):
        return [compare("", d, printed)]

    def throughout(d):
        return [compare(f"{{{one}}} PF{f}", (one,), [f]) for one in d for f in printed]

    def unpooled(d):
        return [compare(f"{{{one}}}", (one,), [1]) for one in d]

    say = f"kmeans-trained on {{{source}}}, on the other collections: "
    texts = (
        ("Δ ≥ 0 on average over PF 2, 4, 6", on_average, 0.0),
        ("Δ ≥ 0 at each of PF 2, 4, 6 on each", throughout, 0.0),
        ("at most .015 lost at PF1 on each", unpooled, 0.015),
    )
    return [
        Part(f"7{letter}", say + text, others, build, margin, "ndcg")
        for letter, (text, build, margin) in zip(letters, texts, strict=True)
    ]


PARTS = _parts()

# ---------------------------------------------------------------- numbers for cells


class PaperCells:
    """The paper's value of a cell: relative NDCG@10, or Table 2's difference to the baseline."""

    def __init__(self, paper: pd.DataFrame):
        # PLAID (Figure 4) is another measurement; Figure 1 is read unrounded, so it goes first.
        exact = paper[(paper["exhibit"] != "figure4") & (paper["dataset"] != "Average")]
        keys = list(Cell._fields)
        self._relative = exact.drop_duplicates(keys).set_index(keys)["relative"].to_dict()
        table = exact[exact["exhibit"] == "table2"]
        # Differences as printed come from unrounded scores: the baseline counts as their zero.
        self._delta = table.set_index(keys)["delta"].fillna(0.0).to_dict()

    def total(self, side: Side, unit: str) -> float:
        """A weighted sum in `unit`; KeyError where the paper does not print a cell."""
        return sum(weight * self._value(cell, unit) for weight, cell in side)

    def _value(self, cell: Cell, unit: str) -> float:
        if unit == "ndcg":
            return self._delta[cell]
        method = "span" if cell.pool_method == "none" else cell.pool_method  # same at PF1
        return self._relative[cell._replace(pool_method=method)]


class OurCells:
    """Our per-query values of a cell under exact search, averaged over training seeds."""

    def __init__(self, rows: pd.DataFrame, per_query: pd.DataFrame, roles: Roles):
        exact = per_query[per_query["engine"] == "exact"]
        variants = {method: default_variant(exact, method) for method in VARIANTS}
        exact = exact[exact["pool_variant"] == exact["pool_method"].map(variants)]
        keys = ["model", "collection", "pool_method", "pool_factor"]
        self._values = {
            key: group.set_index("query_id")["ndcg@10"].sort_index()
            for key, group in exact.groupby(keys)
        }
        self._rows, self._roles = rows, roles
        self._cache: dict[Cell, pd.Series | None] = {}

    def values(self, cell: Cell) -> pd.Series | None:
        """NDCG@10 by query id (sorted); None where the cell was not run."""
        if cell not in self._cache:
            source = self._roles.training.get(cell.trained_on, "")
            training = (source, cell.train_method, cell.train_factors)
            names = find_models(self._rows, *training) if cell.trained_on else [BASELINE]
            method = "none" if cell.pool_factor == 1 else cell.pool_method
            where = (self._roles.evaluated(cell.dataset), method, cell.pool_factor)
            found = [self._values[name, *where] for name in names if (name, *where) in self._values]
            mean = pd.concat(found, axis=1).mean(axis=1, skipna=False) if found else None
            self._cache[cell] = mean
        return self._cache[cell]

    def scale(self, dataset: str, unit: str) -> float:
        """What one unit of NDCG@10 on `dataset` counts for in `unit`."""
        return 1.0 if unit == "ndcg" else 100 / self.values(Cell.unpooled(dataset)).mean()

    def total(self, side: Side, unit: str) -> float:
        """A weighted sum in `unit`."""
        return sum(w * self.values(c).mean() * self.scale(c.dataset, unit) for w, c in side)

    def has(self, comparisons: list[Comparison]) -> bool:
        """Whether every cell of `comparisons`, and the baseline they are relative to, was run."""
        cells = {cell for comparison in comparisons for _, cell in comparison.weights()}
        unpooled = [self.values(Cell.unpooled(dataset)) for dataset in {c.dataset for c in cells}]
        # Of a baseline that found nothing there is no percentage.
        relative = all(values is not None and values.mean() > 0 for values in unpooled)
        return relative and all(self.values(cell) is not None for cell in cells)

    def contributions(self, comparisons: list[Comparison], unit: str) -> list[np.ndarray]:
        """Per collection, what each query adds to each comparison: (comparisons, queries)."""
        groups: dict[str, np.ndarray] = {}
        for row, comparison in enumerate(comparisons):
            for weight, cell in comparison.weights():
                queries = self.values(Cell.unpooled(cell.dataset)).index
                values = self.values(cell)
                if not values.index.equals(queries) or values.isna().any():
                    raise UserError(
                        f"{cell}: measured on {len(values)} queries that are not the "
                        f"{len(queries)} of the unpooled baseline. A paired comparison needs the "
                        "same queries: evaluate both again."
                    )
                empty = np.zeros((len(comparisons), len(queries)))
                group = groups.setdefault(cell.dataset, empty)
                group[row] += weight * values.to_numpy() * self.scale(cell.dataset, unit)
        return [groups[dataset] for dataset in sorted(groups)]


# ---------------------------------------------------------------- judging


def judge_paper(part: Part, cells: PaperCells) -> dict[str, str]:
    """The paper's numbers for a part and the verdict by their sign."""
    comparisons = part.build(part.datasets)
    sums = np.array([[cells.total(s, part.unit) for s in (x.first, x.second)] for x in comparisons])
    differences = sums[:, 0] - sums[:, 1]
    worst = int(differences.argmin())
    # Rounding: .015 lost is still "at most .015".
    holds = differences[worst] >= -part.margin - 1e-9
    text = _sides(comparisons[worst].label, *sums[worst], part.unit)
    return {"paper": text, "paper_verdict": f"{HOLDS if holds else FAILS} (by sign)"}


def judge_ours(part: Part, cells: OurCells, seed: int, resamples: int) -> dict[str, object]:
    """Our numbers for a part, the bootstrap interval of its weakest comparison, the verdict."""
    run = tuple(d for d in part.datasets if part.together or cells.has(part.build((d,))))
    if not run or not cells.has(part.build(run)):
        return _blank()
    comparisons = part.build(run)
    groups = cells.contributions(comparisons, part.unit)
    means = _sum_of_means(*groups, axis=-1)
    low, high = intervals(groups, seed, resamples)
    tiny = 1e-9  # equal values differ by rounding errors once they are averaged
    verdict = FAILS if (high < -tiny - part.margin).any() else UNDECIDED
    verdict = HOLDS if (low > tiny - part.margin).all() else verdict
    worst = int(high.argmin() if verdict == FAILS else low.argmin())
    chosen = comparisons[worst]
    sides = [cells.total(side, part.unit) for side in (chosen.first, chosen.second)]
    text = _sides(chosen.label, *sides, part.unit)
    if run != part.datasets:
        text += " (only on " + ", ".join(f"{{{d}}}" for d in run) + ")"
    numbers = {"difference": means[worst], "low": low[worst], "high": high[worst]}
    return {"ours": text, **numbers, "verdict": verdict}


def _sum_of_means(*groups: np.ndarray, axis: int) -> np.ndarray:
    return sum(np.mean(group, axis=axis) for group in groups)


def intervals(groups: list[np.ndarray], seed: int, resamples: int) -> tuple:
    """Simultaneous 95 % intervals of sums over collections of means over queries: (low, high).

    `groups` are (comparisons, queries) per collection. Queries are drawn within each, and a draw
    serves all comparisons. The ends, each (comparisons,), are percentiles at 1 − .05 / comparisons
    (Bonferroni); NaN where a collection has a single query.
    """
    count = len(groups[0])
    if min(group.shape[1] for group in groups) < 2:
        return np.full(count, np.nan), np.full(count, np.nan)
    options = {"n_resamples": resamples, "batch": 5_000, "axis": -1, "method": "percentile"}
    options |= {"confidence_level": 1 - 0.05 / count, "rng": np.random.default_rng(seed)}
    interval = bootstrap(groups, _sum_of_means, **options).confidence_interval
    return interval.low, interval.high


def _sides(label: str, first: float, second: float, unit: str) -> str:
    text = f"{first:.1f} vs {second:.1f}"
    if unit == "ndcg":
        text = f"Δ {first - second:+z.3f}".replace("-", "−").replace("+0.000", "0.000")
    return f"{label}: {text}" if label else text


def check_claims(
    rows: pd.DataFrame | None,
    per_query: pd.DataFrame | None,
    paper: pd.DataFrame,
    roles: Mapping[str, str] | None = None,
    seed: int = 42,
    resamples: int = 10_000,
) -> pd.DataFrame:
    """Judge the seven findings on the paper's numbers and on ours.

    Parameters
    ----------
    rows, per_query
        From `results.read_rows` and `results.read_per_query`; None for the paper alone.
    paper
        From `paper.read_paper`.
    roles
        As in `paper.roles_of`.

    Returns
    -------
    pandas.DataFrame
        One row per part, columns `CLAIM_COLUMNS`. ``difference``, ``low``, ``high`` are ours, of
        the part's weakest comparison, in ``unit``; NaN where not run.

    Raises
    ------
    UserError
        When models were measured on different queries.
    """
    roles = roles_of(rows, roles)
    names = {f"{{{dataset}}}": dataset for dataset in ROLES}
    ours = {key: roles.evaluated(dataset) or dataset for key, dataset in names.items()}
    theirs, run = PaperCells(paper), rows is not None and per_query is not None
    both = {key: f"{names[key]} ({ours[key]})" if run else names[key] for key in names}
    cells = OurCells(rows, per_query, roles) if run else None
    lines = []
    for part in PARTS:
        line = {"finding": part.finding, "part": part.name, "unit": part.unit}
        line |= {"statement": _named(part.statement, both)}
        line |= {key: _named(text, names) for key, text in judge_paper(part, theirs).items()}
        line |= judge_ours(part, cells, seed, resamples) if run else _blank()
        lines.append(line | {"ours": _named(line["ours"], ours)})
    return pd.DataFrame(lines)[CLAIM_COLUMNS]


def _blank() -> dict[str, object]:
    return {"difference": np.nan, "low": np.nan, "high": np.nan, "ours": "", "verdict": NOT_RUN}


def _named(text: str, names: Mapping[str, str]) -> str:
    for key, name in names.items():
        text = text.replace(key, name)
    return text


# ---------------------------------------------------------------- showing


def claims_table(claims: pd.DataFrame) -> str:
    """The claims as a Markdown table, finding by finding, with a note on how they are judged."""
    lines = ["| | statement | the paper | by its sign | ours | difference [95 %] | verdict |"]
    lines.append("|" + " --- |" * 7)
    for finding, parts in claims.groupby("finding", sort=False):
        lines.append(f"| **{finding}** | **{FINDINGS[finding]}** | | | | | |")
        for part in parts.itertuples():
            sign = part.paper_verdict.removesuffix(" (by sign)")
            verdict = f"**{part.verdict}**" if part.verdict in (HOLDS, FAILS) else part.verdict
            cells = [part.part, part.statement, part.paper, sign, part.ours or "–"]
            lines.append(f"| {' | '.join([*cells, _interval(part), verdict])} |")
    return "\n".join([*lines, "", NOTE]) + "\n"


def _interval(part) -> str:
    digits = 3 if part.unit == "ndcg" else 1
    numbers = [f"{x:+.{digits}f}" for x in (part.difference, part.low, part.high)]
    middle, low, high = (n.replace("-", "−").replace("+nan", "–") for n in numbers)
    return middle if low == "–" else f"{middle} [{low}, {high}]"
