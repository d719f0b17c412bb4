"""The paper's seven findings as testable statements, judged on its numbers and on ours.

Takes the paper's tidy frame, result rows and per-query values; gives one line a part of a finding.

How a part is judged
--------------------
A part is one or more *comparisons*; each is a difference of sums of curves over pool factors, in
points of relative NDCG@10 (percent of the unpooled baseline) or in NDCG@10. A part holds where all
of its comparisons do.

- The paper's numbers have no per-query values: the verdict there goes by the sign alone.
- Ours: a paired bootstrap over queries. Queries are resampled within each collection, and the same
  resample serves both sides and all pool factors; collections are averaged with equal weight, as
  the paper averages its data sets. The unpooled baseline, the 100 %, is held fixed. *holds*: the
  95 % interval lies on the right side of the margin (0 unless the part says otherwise); *does not
  hold*: on the wrong side; else *undecided*; *not run* where a model or a setting is missing.
- Multiple testing. Within a part of m comparisons ("at every factor", "best of three") each
  interval is taken at 1 − .05/m (Bonferroni), so that the m of them hold together at 95 %; the one
  shown is the weakest for the statement. Between parts nothing is corrected: of some twenty-five
  parts, one may come out on a side by chance alone. Read the pattern, not a single line.
- The intervals speak of queries. They say nothing about another training seed; where several seeds
  were run, a query's value is their mean, as the paper averages two runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from l2p_utils.files import UserError
from l2p_utils.results import (
    BASELINE,
    POOL_FACTORS,
    ROLES,
    Roles,
    bootstrap_means,
    default_variant,
    find_models,
    roles_of,
)

CLAIM_COLUMNS = [
    "finding", "part", "statement", "paper", "paper_verdict",
    "ours", "difference", "low", "high", "verdict", "unit",
]  # fmt: skip
HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided", "not run"

BLANK = {**dict.fromkeys(["difference", "low", "high"], np.nan), "ours": "", "verdict": NOT_RUN}

FINDINGS = {
    1: "Inference only: hierarchical > kmeans > span on average; kmeans leads at PF3",
    2: "Lightweight fine-tuning makes models pooling-aware, kmeans most of the three",
    3: "It is the pooling in training that does it: FT PF1 does not survive pooling",
    4: "One model for all factors: PF1-6 is within a point of the best fixed-factor model",
    5: "Span gains most over its own baseline, and stays the weakest method",
    6: "Across methods: hierarchical and kmeans training also help span pooling",
    7: "Across collections: kmeans training does not lose elsewhere",
}

# ---------------------------------------------------------------- the vocabulary of a statement


class Cell(NamedTuple):
    """One measurement, in the paper's terms: which model, on which data set, pooled how."""

    dataset: str
    trained_on: str  # "" for the baseline
    train_method: str
    train_factors: str
    pool_method: str
    pool_factor: int


Side = list[tuple[float, Cell]]  # a weighted sum of cells


@dataclass(frozen=True)
class Comparison:
    """``first − second``, two weighted sums of cells; `label` says which one of several it is."""

    label: str
    first: Side
    second: Side

    def weights(self) -> Side:
        """The difference as one sum."""
        return self.first + [(-weight, cell) for weight, cell in self.second]

    @property
    def cells(self) -> set[Cell]:
        """Every measurement that it needs."""
        return {cell for _, cell in self.weights()}


@dataclass(frozen=True)
class Part:
    """A part of a finding: comparisons that must all exceed ``-margin``.

    Attributes
    ----------
    datasets
        The paper's data sets that it speaks of; ours are the collections in their roles.
    build
        Makes the comparisons from those of `datasets` that were run.
    unit
        "points" of relative NDCG@10, or "ndcg" for differences in NDCG@10 as Table 2 prints them.
    together
        Whether it makes sense only with all `datasets`.
    """

    finding: int
    name: str
    statement: str
    datasets: tuple[str, ...]
    build: Callable[[tuple[str, ...]], list[Comparison]]
    margin: float = 0.0
    unit: str = "points"
    together: bool = False


POOLED = POOL_FACTORS[1:]
TRAINED_ON = ("SciFact", "FiQA")


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
    weight = 1 / (len(datasets) * len(factors))
    side = []
    for dataset in datasets:
        source = "" if model == "baseline" else trained_on or dataset
        for factor in factors:
            side.append((weight, Cell(dataset, source, method, trained, pool_method, factor)))
    return side


def gain(method: str, datasets: Iterable[str], factors: Iterable[int] = POOLED) -> Side:
    """What PF1-6 training with `method` adds to the baseline under that method."""
    trained = curve(f"{method} 1-6", method, datasets, factors)
    return trained + [(-w, cell) for w, cell in curve("baseline", method, datasets, factors)]


# ---------------------------------------------------------------- the seven findings


def _part1() -> list[Part]:
    every = tuple(ROLES)

    def ahead(first, second):
        return lambda d: [Comparison("", curve("baseline", first, d), curve("baseline", second, d))]

    def leads_at_3(d):
        kmeans = curve("baseline", "kmeans", d, [3])
        return [
            Comparison(f"against {other}", kmeans, curve("baseline", other, d, [3]))
            for other in ("hierarchical", "span")
        ]

    say = "baseline, mean of PF 2–6 and the collections: "
    return [
        Part(1, "1a", say + "hierarchical > kmeans", every, ahead("hierarchical", "kmeans")),
        Part(1, "1b", say + "kmeans > span", every, ahead("kmeans", "span")),
        Part(1, "1c", "baseline at PF3: kmeans leads the other two", every, leads_at_3),
    ]


def _part2() -> list[Part]:
    def beats(method):
        return lambda d: [
            Comparison("", curve(f"{method} 1-6", method, d), curve("baseline", method, d))
        ]

    def best(d):
        kmeans = curve("kmeans 1-6", "kmeans", d)
        return [
            Comparison(f"against {other}", kmeans, curve(f"{other} 1-6", other, d))
            for other in ("hierarchical", "span")
        ]

    def by_factor(d):
        return [Comparison("", gain("kmeans", d, [6]), gain("kmeans", d, [2]))]

    def by_collection(d):
        return [Comparison("", gain("kmeans", d[:1]), gain("kmeans", d[1:]))]

    say = "PF1-6 beats the baseline, own method, own collection, PF 2–6: "
    return [
        Part(2, "2a", say + "span", TRAINED_ON, beats("span")),
        Part(2, "2b", say + "hierarchical", TRAINED_ON, beats("hierarchical")),
        Part(2, "2c", say + "kmeans", TRAINED_ON, beats("kmeans")),
        Part(2, "2d", "kmeans PF1-6 is the best of the three, own method", TRAINED_ON, best),
        Part(2, "2e", "the gain of kmeans is larger at PF6 than at PF2", TRAINED_ON, by_factor),
        Part(
            2, "2f", "the gain of kmeans is larger on {SciFact} than on {FiQA}",
            TRAINED_ON, by_collection, together=True,
        ),
    ]  # fmt: skip


def _part3() -> list[Part]:
    def unpooled(d):
        first = curve("pf1", "none", d, [1])
        return [Comparison("", first, curve("baseline", "none", d, [1]))]

    def below(method):
        return lambda d: [Comparison("", curve("baseline", method, d), curve("pf1", method, d))]

    def pooling_matters(d):
        methods = ("span", "hierarchical", "kmeans")
        return [
            Comparison(m, curve(f"{m} 1-6", m, d), curve("pf1", m, d)) for m in methods
        ]  # fmt: skip

    own, one = TRAINED_ON, TRAINED_ON[:1]
    say = "pooled (PF 2–6), FT PF1 falls below the baseline: "
    return [
        Part(
            3, "3a", "unpooled, FT PF1 keeps the baseline's NDCG (within a point) or raises it",
            own, unpooled, margin=1.0,
        ),
        Part(3, "3b", say + "span", own, below("span")),
        Part(3, "3c", say + "hierarchical", one, below("hierarchical")),
        Part(3, "3d", say + "kmeans", one, below("kmeans")),
        Part(3, "3e", "pooled, PF1-6 beats FT PF1 with each method", one, pooling_matters),
    ]  # fmt: skip


def _part4() -> list[Part]:
    def near_best(method, factors):
        def build(d):
            multi = curve(f"{method} 1-6", method, d, POOL_FACTORS)
            return [
                Comparison(f"PF{f}", multi, curve(f"{method} {f}", method, d, POOL_FACTORS))
                for f in factors
            ]

        return build

    say = "mean of PF 1–6, PF1-6 within a point of the best fixed factor: "
    return [
        Part(4, name, f"{say}{method}, {{{dataset}}}", (dataset,), near_best(method, factors), 1.0)
        for name, method, dataset, factors in (
            ("4a", "span", "SciFact", "23"),
            ("4b", "span", "FiQA", "23"),
            ("4c", "hierarchical", "SciFact", "2"),
            ("4d", "kmeans", "SciFact", "2"),
        )
    ]


def _part5() -> list[Part]:
    others = ("hierarchical", "kmeans")

    def most(d):
        return [Comparison(f"against {o}", gain("span", d), gain(o, d)) for o in others]

    def weakest(d):
        span = curve("span 1-6", "span", d)
        return [Comparison(f"{o} − span", curve(f"{o} 1-6", o, d), span) for o in others]

    return [
        Part(5, "5a", "PF1-6 over its own baseline: span gains most", TRAINED_ON, most),
        Part(5, "5b", "of the PF1-6 models, span stays the weakest", TRAINED_ON, weakest),
    ]


def _part6() -> list[Part]:
    def every_factor(method):
        return lambda d: [
            Comparison(
                f"PF{f}", curve(f"{method} 1-6", "span", d, [f]), curve("baseline", "span", d, [f])
            )
            for f in POOLED
        ]

    say = "-trained beats the baseline under span pooling at every PF ≥ 2, {SciFact}"
    return [
        Part(6, name, method + say, TRAINED_ON[:1], every_factor(method))
        for name, method in (("6a", "hierarchical"), ("6b", "kmeans"))
    ]


def _part7() -> list[Part]:
    printed = (2, 4, 6)  # the factors of Table 2

    def across(source, d, factors):
        first = curve("kmeans 1-6", "kmeans", d, factors, source)
        return first, curve("baseline", "kmeans", d, factors)

    def on_average(source):
        return lambda d: [Comparison("", *across(source, d, printed))]

    def throughout(source):
        return lambda d: [
            Comparison(f"{{{one}}} PF{f}", *across(source, (one,), [f]))
            for one in d
            for f in printed
        ]

    def unpooled(source):
        return lambda d: [Comparison(f"{{{one}}}", *across(source, (one,), [1])) for one in d]

    parts = []
    for source, letters in zip(TRAINED_ON, ("abc", "def"), strict=True):
        others = tuple(dataset for dataset in ROLES if dataset != source)
        say = f"kmeans-trained on {{{source}}}, on the other collections: "
        for letter, rest, build, margin in (
            (letters[0], "Δ ≥ 0 on average over PF 2, 4, 6", on_average(source), 0.0),
            (letters[1], "Δ ≥ 0 at each of PF 2, 4, 6 on each", throughout(source), 0.0),
            (letters[2], "at most .015 lost at PF1 on each", unpooled(source), 0.015),
        ):
            parts.append(Part(7, f"7{letter}", say + rest, others, build, margin, "ndcg"))
    return parts


PARTS = [
    *_part1(), *_part2(), *_part3(), *_part4(), *_part5(), *_part6(), *_part7(),
]  # fmt: skip

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

    def value(self, cell: Cell, unit: str) -> float:
        """The cell's value in `unit`; KeyError where the paper does not print it."""
        if unit == "ndcg":
            return self._delta[cell]
        method = "span" if cell.pool_method == "none" else cell.pool_method  # same at PF1
        return self._relative[cell._replace(pool_method=method)]


class OurCells:
    """Our per-query values of a cell under exact search, averaged over training seeds."""

    def __init__(
        self, rows: pd.DataFrame, per_query: pd.DataFrame, roles: Roles | Mapping[str, str] | None
    ):
        exact = per_query[per_query["engine"] == "exact"]
        variants = {
            m: default_variant(exact, m) for m in ("none", "span", "kmeans", "hierarchical")
        }
        exact = exact[exact["pool_variant"] == exact["pool_method"].map(variants)]
        keys = ["model", "collection", "pool_method", "pool_factor"]
        self._values = {
            key: group.set_index("query_id")["ndcg@10"].sort_index()
            for key, group in exact.groupby(keys)
        }
        self._rows, self._roles = rows, roles_of(rows, roles)
        self._cache: dict[Cell, pd.Series | None] = {}

    def values(self, cell: Cell) -> pd.Series | None:
        """NDCG@10 by query id (sorted); None where the cell was not run."""
        if cell not in self._cache:
            self._cache[cell] = self._find(cell)
        return self._cache[cell]

    def _find(self, cell: Cell) -> pd.Series | None:
        names = [BASELINE]
        if cell.trained_on:
            source = self._roles.trained(cell.trained_on)
            names = find_models(self._rows, source, cell.train_method, cell.train_factors)
        method = "none" if cell.pool_factor == 1 else cell.pool_method
        collection = self._roles.evaluated(cell.dataset)
        found = [self._values.get((name, collection, method, cell.pool_factor)) for name in names]
        found = [values for values in found if values is not None]
        if not found:
            return None
        return pd.concat(found, axis=1).mean(axis=1, skipna=False)

    def scale(self, dataset: str, unit: str) -> float:
        """What one unit of NDCG@10 on `dataset` counts for in `unit`."""
        if unit == "ndcg":
            return 1.0
        unpooled = self.values(Cell(dataset, "", "", "", "none", 1))
        return 100.0 / unpooled.mean()

    def has(self, comparisons: list[Comparison]) -> bool:
        """Whether every cell of `comparisons`, and the baseline they are relative to, was run."""
        cells = set().union(*(comparison.cells for comparison in comparisons))
        if not all(self.values(cell) is not None for cell in cells):
            return False
        unpooled = [self.values(Cell(d, "", "", "", "none", 1)) for d in {c.dataset for c in cells}]
        # Of a baseline that found nothing there is no percentage.
        return all(values is not None and values.mean() > 0 for values in unpooled)


# ---------------------------------------------------------------- judging


def _verdict(low: np.ndarray, high: np.ndarray, margin: float) -> str:
    tiny = 1e-9  # equal values differ by rounding errors once they are averaged
    if (low > tiny - margin).all():
        return HOLDS
    return FAILS if (high < -tiny - margin).any() else UNDECIDED


def judge_paper(part: Part, cells: PaperCells) -> dict[str, str]:
    """The paper's numbers for a part and the verdict by their sign."""
    comparisons = part.build(part.datasets)
    sums = [
        [sum(w * cells.value(c, part.unit) for w, c in side) for side in (x.first, x.second)]
        for x in comparisons
    ]
    differences = np.array([first - second for first, second in sums])
    worst = int(differences.argmin())
    # Rounding: .015 lost is still "at most .015".
    holds = differences.min() >= -part.margin - 1e-9
    text = _sides(comparisons[worst].label, *sums[worst], part.unit)
    return {"paper": text, "paper_verdict": f"{HOLDS if holds else FAILS} (by sign)"}


def judge_ours(part: Part, cells: OurCells, seed: int, resamples: int) -> dict[str, object]:
    """Our numbers for a part, the bootstrap interval of its weakest comparison, the verdict."""
    run = tuple(d for d in part.datasets if _can_run(part, d, cells))
    if not run or (part.together and run != part.datasets):
        return dict(BLANK)
    comparisons = part.build(run)
    means, low, high = _intervals(comparisons, cells, part.unit, seed, resamples)
    verdict = _verdict(low, high, part.margin)
    worst = int(high.argmin() if verdict == FAILS else low.argmin())
    chosen = comparisons[worst]
    sides = [_total(side, cells, part.unit) for side in (chosen.first, chosen.second)]
    text = _sides(chosen.label, *sides, part.unit)
    if run != part.datasets:
        text += " (only on " + ", ".join(f"{{{d}}}" for d in run) + ")"
    numbers = {"difference": means[worst], "low": low[worst], "high": high[worst]}
    return {"ours": text, **{k: float(v) for k, v in numbers.items()}, "verdict": verdict}


def _can_run(part: Part, dataset: str, cells: OurCells) -> bool:
    if part.together:
        return cells.has(part.build(part.datasets))
    return cells.has(part.build((dataset,)))


def _total(side: Side, cells: OurCells, unit: str) -> float:
    return sum(w * cells.values(c).mean() * cells.scale(c.dataset, unit) for w, c in side)


def _intervals(comparisons, cells: OurCells, unit: str, seed: int, resamples: int):
    """Means and simultaneous 95 % intervals of all comparisons, each (comparisons,)."""
    datasets = sorted({cell.dataset for x in comparisons for cell in x.cells})
    groups = []
    for dataset in datasets:  # per-query contributions: (queries, comparisons)
        queries = cells.values(Cell(dataset, "", "", "", "none", 1)).index
        matrix = np.zeros((len(queries), len(comparisons)))
        for column, comparison in enumerate(comparisons):
            for weight, cell in comparison.weights():
                if cell.dataset == dataset:
                    values = _aligned(cells.values(cell), queries, cell)
                    matrix[:, column] += weight * values * cells.scale(dataset, unit)
        groups.append(matrix)
    tail = 2.5 / len(comparisons)  # percent on each side, Bonferroni
    draws = bootstrap_means(groups, seed, resamples)
    low, high = np.percentile(draws, [tail, 100 - tail], axis=0)
    return sum(group.mean(axis=0) for group in groups), low, high


def _aligned(values: pd.Series, queries: pd.Index, cell: Cell) -> np.ndarray:
    if not values.index.equals(queries) or values.isna().any():
        raise UserError(
            f"{cell}: measured on {len(values)} queries that are not the {len(queries)} of the "
            "unpooled baseline. A paired comparison needs the same queries: evaluate both again."
        )
    return values.to_numpy()


def _sides(label: str, first: float, second: float, unit: str) -> str:
    points = f"{first:.1f} vs {second:.1f}"
    text = f"Δ {first - second:+.3f}" if unit == "ndcg" else points
    # "−0.000" would say that something was lost.
    text = text.replace("-", "−").replace("−0.000", "0.000").replace("+0.000", "0.000")
    return f"{label}: {text}" if label else text


def check_claims(
    rows: pd.DataFrame | None,
    per_query: pd.DataFrame | None,
    paper: pd.DataFrame,
    roles: Roles | Mapping[str, str] | None = None,
    seed: int = 42,
    resamples: int = 10_000,
) -> pd.DataFrame:
    """Judge the seven findings on the paper's numbers and on ours.

    Parameters
    ----------
    rows, per_query
        From `results.read_rows` and `results.read_per_query`; None for the paper alone.
    paper
        From `results.read_paper`.
    roles
        The collections that stand for the paper's data sets; by default those that `rows` hold
        (see `results.roles_of`).

    Returns
    -------
    One row a part, columns `CLAIM_COLUMNS`. ``difference``, ``low``, ``high`` are ours, of the
    part's weakest comparison, in `unit`; NaN where not run.
    """
    roles = roles_of(rows, roles)
    theirs = PaperCells(paper)
    ours = None if rows is None or per_query is None else OurCells(rows, per_query, roles)
    lines = []
    for part in PARTS:
        line = {"finding": part.finding, "part": part.name, "unit": part.unit, **BLANK}
        line |= {"statement": _named(part.statement, roles, ours is not None)}
        line |= {key: _named(text, None, False) for key, text in judge_paper(part, theirs).items()}
        if ours is not None:
            judged = judge_ours(part, ours, seed, resamples)
            line |= judged | {"ours": _named(judged["ours"], roles, False)}
        lines.append(line)
    return pd.DataFrame(lines)[CLAIM_COLUMNS]


def _named(text: str, roles: Roles | None, both: bool) -> str:
    """Fill in data set names: {SciFact} → SciFact, docs:scipy, or "SciFact (docs:scipy)"."""
    for dataset in ROLES:
        name = dataset
        if both:
            name = f"{dataset} ({roles.evaluated(dataset) or '–'})"
        elif roles is not None:
            name = roles.evaluated(dataset) or dataset
        text = text.replace(f"{{{dataset}}}", name)
    return text


# ---------------------------------------------------------------- showing

NOTE = (
    "Numbers are percent of the unpooled baseline's NDCG@10 (finding 7: differences in NDCG@10), "
    "means over pool factors and collections. A part that makes several comparisons shows the one "
    "that speaks least for it. The paper's verdict goes by the sign alone; ours by a paired "
    "bootstrap over queries: *holds* and *does not hold* where the 95 % interval (over all "
    "comparisons of a part together) lies on one side, else *undecided*. Parts are not corrected "
    "for each other, and the intervals do not cover the choice of training seed."
)


def claims_table(claims: pd.DataFrame) -> str:
    """The claims as a Markdown table, finding by finding, with a note on how they are judged."""
    head = ["", "statement", "the paper", "by its sign", "ours", "difference [95 %]", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for finding, parts in claims.groupby("finding", sort=False):
        lines.append(f"| **{finding}** | **{FINDINGS[finding]}** | | | | | |")
        lines += ["| " + " | ".join(_line(part)) + " |" for part in parts.itertuples()]
    return "\n".join([*lines, "", NOTE]) + "\n"


def _line(part) -> list[str]:
    sign = part.paper_verdict.removesuffix(" (by sign)")
    shown = part.verdict if part.verdict in (UNDECIDED, NOT_RUN) else f"**{part.verdict}**"
    return [
        part.part, part.statement, part.paper, sign,
        part.ours or "–", _interval(part), shown,
    ]  # fmt: skip


def _interval(part) -> str:
    if np.isnan(part.difference):
        return "–"
    digits = 3 if part.unit == "ndcg" else 1
    numbers = (f"{x:+.{digits}f}" for x in (part.difference, part.low, part.high))
    middle, low, high = (number.replace("-", "−") for number in numbers)
    return f"{middle} [{low}, {high}]"


def summary(claims: pd.DataFrame) -> pd.DataFrame:
    """How many parts of each finding hold, fail, are undecided or were not run.

    Returns
    -------
    Index: finding; columns: the finding's sentence, and a count for each verdict.
    """
    counts = pd.crosstab(claims["finding"], claims["verdict"])
    counts = counts.reindex(columns=[HOLDS, FAILS, UNDECIDED, NOT_RUN], fill_value=0)
    counts.insert(0, "statement", [FINDINGS[finding] for finding in counts.index])
    return counts
