"""The paper's seven findings as testable statements, judged on its numbers and on ours.

A finding has parts, and a part one or more *comparisons*: differences of sums of curves over pool
factors. `NOTE` says how they are judged. Intervals (`statistics.interval`) are of differences query
by query; collections have equal weight, as in the paper; the
unpooled baseline, the 100 %, is held fixed; several seeds are averaged by query. Within a part of m
comparisons each interval is taken at 1 − .05/m (Bonferroni), so that all hold together at 95 %. Of
28 parts, not corrected for each other, one may come out on a side by chance alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from l2p_utils.files import UserError
from l2p_utils.paper import NOT_RUN, ROLES, TRAINED, Roles, roles_of
from l2p_utils.results import BASELINE, POOL_FACTORS, VARIANTS, default_variant, find_models
from l2p_utils.statistics import interval

CLAIM_COLUMNS = [
    "finding", "part", "statement", "paper", "paper_verdict",
    "ours", "difference", "low", "high", "verdict", "unit",
]  # fmt: skip
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
POOLED = POOL_FACTORS[1:]
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
    "is shown. The paper's verdict is by the sign alone; ours by an interval over queries: "
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


def unpooled(dataset: str) -> Cell:
    """The baseline's cell that percentages refer to."""
    return Cell(dataset, "", "", "", "none", 1)


Side = list[tuple[float, Cell]]  # a weighted sum of cells
# ``first − second``, and a label that tells it from others of its part
Comparison = tuple[str, Side, Side]


@dataclass(frozen=True)
class Part:
    """A part of a finding: comparisons that must all exceed ``-margin``."""

    name: str  # the finding's number and a letter
    statement: str  # {SciFact} stands for the collection in that role
    datasets: Sequence[str]  # the paper's data sets that it is about
    build: Callable[[Sequence[str]], list[Comparison]]  # from those of `datasets` that were run
    margin: float = 0.0
    unit: str = "points"  # of relative NDCG@10, or "ndcg"
    together: bool = False  # whether it makes sense only with all `datasets`


def curve(
    model: str,
    pool_method: str,
    datasets: Sequence[str],
    factors: Sequence[int] = POOLED,
    trained_on: str | None = None,
) -> Side:
    """Mean over `datasets` and `factors` of one kind of model under one pool method.

    `model` is "baseline", "pf1", or a method and factors such as "kmeans 1-6"; without `trained_on`
    it was trained on the data set that it is evaluated on.
    """
    method, _, trained = {"baseline": "", "pf1": "none 1"}.get(model, model).partition(" ")
    weight = 1 / (len(datasets) * len(factors))
    return [
        (weight, Cell(dataset, source, method, trained, pool_method, factor))
        for dataset in datasets
        for source in ["" if model == "baseline" else trained_on or dataset]
        for factor in factors
    ]


# ---------------------------------------------------------------- the seven findings


def _parts() -> list[Part]:
    every, own, scifact = tuple(ROLES), TRAINED, TRAINED[:1]
    methods, others = ("span", "hierarchical", "kmeans"), ("hierarchical", "span")

    def base(method, d, factors=POOLED):
        return curve("baseline", method, d, factors)

    def multi(method, d, factors=POOLED):
        return curve(f"{method} 1-6", method, d, factors)

    def gain(method, d, factors=POOLED):
        return multi(method, d, factors) + [(-w, cell) for w, cell in base(method, d, factors)]

    def beats(method):
        return lambda d: [("", multi(method, d), base(method, d))]

    def below(method):
        return lambda d: [("", base(method, d), curve("pf1", method, d))]

    def near(method, *fixed):
        pf = POOL_FACTORS
        return lambda d: [
            (f"PF{f}", multi(method, d, pf), curve(f"{method} {f}", method, d, pf)) for f in fixed
        ]

    def under_span(method):
        return lambda d: [
            (f"PF{f}", curve(f"{method} 1-6", "span", d, [f]), base("span", d, [f])) for f in POOLED
        ]

    say1 = "baseline, mean of PF 2–6 and the collections: "
    say2 = "PF1-6 beats the baseline, own method, own collection, PF 2–6: "
    say3 = "pooled (PF 2–6), FT PF1 falls below the baseline: "
    say4 = "mean of PF 1–6, PF1-6 within a point of the best fixed factor: "
    say6 = "-trained beats the baseline under span pooling at every PF ≥ 2, {SciFact}"
    return [
        Part("1a", say1 + "hierarchical > kmeans", every,
             lambda d: [("", base("hierarchical", d), base("kmeans", d))]),
        Part("1b", say1 + "kmeans > span", every,
             lambda d: [("", base("kmeans", d), base("span", d))]),
        Part("1c", "baseline at PF3: kmeans leads the other two", every,
             lambda d: [(f"against {m}", base("kmeans", d, [3]), base(m, d, [3])) for m in others]),
        Part("2a", say2 + "span", own, beats("span")),
        Part("2b", say2 + "hierarchical", own, beats("hierarchical")),
        Part("2c", say2 + "kmeans", own, beats("kmeans")),
        Part("2d", "kmeans PF1-6 is the best of the three, own method", own,
             lambda d: [(f"against {m}", multi("kmeans", d), multi(m, d)) for m in others]),
        Part("2e", "the gain of kmeans is larger at PF6 than at PF2", own,
             lambda d: [("", gain("kmeans", d, [6]), gain("kmeans", d, [2]))]),
        Part("2f", "the gain of kmeans is larger on {SciFact} than on {FiQA}", own,
             lambda d: [("", gain("kmeans", d[:1]), gain("kmeans", d[1:]))], together=True),
        Part("3a", "unpooled, FT PF1 keeps the baseline's NDCG (within a point) or raises it", own,
             lambda d: [("", curve("pf1", "none", d, [1]), base("none", d, [1]))], 1.0),
        Part("3b", say3 + "span", own, below("span")),
        Part("3c", say3 + "hierarchical", scifact, below("hierarchical")),
        Part("3d", say3 + "kmeans", scifact, below("kmeans")),
        Part("3e", "pooled, PF1-6 beats FT PF1 with each method", scifact,
             lambda d: [(m, multi(m, d), curve("pf1", m, d)) for m in methods]),
        Part("4a", say4 + "span, {SciFact}", scifact, near("span", 2, 3), 1.0),
        Part("4b", say4 + "span, {FiQA}", TRAINED[1:], near("span", 2, 3), 1.0),
        Part("4c", say4 + "hierarchical, {SciFact}", scifact, near("hierarchical", 2), 1.0),
        Part("4d", say4 + "kmeans, {SciFact}", scifact, near("kmeans", 2), 1.0),
        Part("5a", "PF1-6 over its own baseline: span gains most", own,
             lambda d: [(f"against {m}", gain("span", d), gain(m, d)) for m in methods[1:]]),
        Part("5b", "of the PF1-6 models, span stays the weakest", own,
             lambda d: [(f"{m} − span", multi(m, d), multi("span", d)) for m in methods[1:]]),
        Part("6a", "hierarchical" + say6, scifact, under_span("hierarchical")),
        Part("6b", "kmeans" + say6, scifact, under_span("kmeans")),
        *_across("SciFact", "abc"),
        *_across("FiQA", "def"),
    ]  # fmt: skip


def _across(source: str, letters: str) -> list[Part]:
    """Finding 7 for the model trained on `source`."""
    others = tuple(dataset for dataset in ROLES if dataset != source)
    printed = (2, 4, 6)  # the factors of Table 2

    def compare(d, factors, label=""):
        trained = curve("kmeans 1-6", "kmeans", d, factors, source)
        return label, trained, curve("baseline", "kmeans", d, factors)

    say = f"kmeans-trained on {{{source}}}, on the other collections: "
    mean, each, alone = (f"7{letter}" for letter in letters)
    return [
        Part(mean, say + "Δ ≥ 0 on average over PF 2, 4, 6", others,
             lambda d: [compare(d, printed)], unit="ndcg"),
        Part(each, say + "Δ ≥ 0 at each of PF 2, 4, 6 on each", others,
             lambda d: [compare([x], [f], f"{{{x}}} PF{f}") for x in d for f in printed],
             unit="ndcg"),
        Part(alone, say + "at most .015 lost at PF1 on each", others,
             lambda d: [compare([x], [1], f"{{{x}}}") for x in d], 0.015, "ndcg"),
    ]  # fmt: skip


PARTS = _parts()

# ---------------------------------------------------------------- numbers for cells


def paper_cells(paper: pd.DataFrame) -> dict[str, dict[Cell, float]]:
    """The paper's value of each cell by unit: relative NDCG@10, or Table 2's differences."""
    # PLAID (Figure 4) is another measurement; Figure 1 is read unrounded, so it goes first.
    exact = paper[(paper["exhibit"] != "figure4") & (paper["dataset"] != "Average")]
    keys = list(Cell._fields)
    relative = exact.drop_duplicates(keys).set_index(keys)["relative"]
    alone = relative.xs(1, level="pool_factor", drop_level=False)  # the same for each method
    alone = alone.rename({"span": "none"}, level="pool_method")
    # Differences as printed come from unrounded scores: the baseline counts as their zero.
    delta = exact[exact["exhibit"] == "table2"].set_index(keys)["delta"].fillna(0.0)
    return {"points": alone.to_dict() | relative.to_dict(), "ndcg": delta.to_dict()}


class OurCells:
    """Our per-query values of a cell under exact search, averaged over training seeds."""

    def __init__(self, rows: pd.DataFrame, per_query: pd.DataFrame, roles: Roles):
        exact = per_query[per_query["engine"] == "exact"]
        variants = {method: default_variant(exact, method) for method in VARIANTS}
        exact = exact[exact["pool_variant"] == exact["pool_method"].map(variants)]
        keys = ["model", "collection", "pool_method", "pool_factor"]
        groups = exact.set_index("query_id").groupby(keys)["ndcg@10"]
        self._values = {key: values.sort_index() for key, values in groups}
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

    def has(self, comparisons: list[Comparison]) -> bool:
        """Whether every cell of `comparisons`, and the baseline they are relative to, was run."""
        cells = {cell for _, first, second in comparisons for _, cell in first + second}
        base = [self.values(unpooled(dataset)) for dataset in {c.dataset for c in cells}]
        # Of a baseline that found nothing there is no percentage.
        relative = all(values is not None and values.mean() > 0 for values in base)
        return relative and all(self.values(cell) is not None for cell in cells)

    def sides(self, comparisons: list[Comparison], unit: str) -> list[np.ndarray]:
        """Per collection, what queries add to the two sides: (comparisons, 2, queries)."""
        groups: dict[str, np.ndarray] = {}
        for row, (_, *sides) in enumerate(comparisons):
            for column, side in enumerate(sides):
                for weight, cell in side:
                    base, values = self.values(unpooled(cell.dataset)), self.values(cell)
                    if not values.index.equals(base.index) or values.isna().any():
                        raise UserError(
                            f"{cell}: measured on {len(values)} queries that are not the "
                            f"{len(base)} of the unpooled baseline. A paired comparison needs the "
                            "same queries: evaluate both again."
                        )
                    scale = weight if unit == "ndcg" else weight * 100 / base.mean()
                    empty = np.zeros((len(comparisons), 2, len(base)))
                    group = groups.setdefault(cell.dataset, empty)
                    group[row, column] += scale * values.to_numpy()
        return [groups[dataset] for dataset in sorted(groups)]


# ---------------------------------------------------------------- judging


def judge_paper(part: Part, cells: dict[str, dict[Cell, float]]) -> dict[str, str]:
    """The paper's numbers (`paper_cells`) for a part and the verdict by their sign."""
    comparisons, values = part.build(part.datasets), cells[part.unit]
    sums = [[sum(w * values[c] for w, c in side) for side in sides] for _, *sides in comparisons]
    differences = [first - second for first, second in sums]
    worst = int(np.argmin(differences))
    # Rounding: .015 lost is still "at most .015".
    holds = differences[worst] >= -part.margin - 1e-9
    text = _sides(comparisons[worst][0], *sums[worst], part.unit)
    return {"paper": text, "paper_verdict": f"{HOLDS if holds else FAILS} (by sign)"}


def judge_ours(part: Part, cells: OurCells) -> dict[str, object]:
    """Our numbers for a part, the interval of its weakest comparison, the verdict."""
    run = tuple(d for d in part.datasets if part.together or cells.has(part.build((d,))))
    if not run or not cells.has(part.build(run)):
        return _BLANK
    comparisons = part.build(run)
    sides = cells.sides(comparisons, part.unit)
    sums = _sum_of_means(*sides)  # (comparisons, 2)
    differences = [(group[:, 0] - group[:, 1])[:, None] for group in sides]  # one "seed"
    found = interval(differences, 1 - 0.05 / len(comparisons))
    low, high = found.low, found.high
    tiny = 1e-9  # equal values differ by rounding errors once they are averaged
    verdict = FAILS if (high < -tiny - part.margin).any() else UNDECIDED
    verdict = HOLDS if (low > tiny - part.margin).all() else verdict
    worst = int(high.argmin() if verdict == FAILS else low.argmin())
    text = _sides(comparisons[worst][0], *sums[worst], part.unit)
    if run != part.datasets:
        text += " (only on " + ", ".join(f"{{{d}}}" for d in run) + ")"
    numbers = [sums[worst][0] - sums[worst][1], low[worst], high[worst]]
    return dict(zip(_BLANK, [*numbers, text, verdict], strict=True))


_BLANK = {"difference": np.nan, "low": np.nan, "high": np.nan, "ours": "", "verdict": NOT_RUN}


def _sum_of_means(*groups: np.ndarray, axis: int = -1) -> np.ndarray:
    return sum(np.mean(group, axis=axis) for group in groups)


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
) -> pd.DataFrame:
    """Judge the seven findings on the paper's numbers (`read_paper`) and on ours.

    Without `rows` and `per_query` on the paper's alone; `roles` as in `paper.roles_of`. One row per
    part, columns `CLAIM_COLUMNS`: ``difference``, ``low`` and ``high`` are ours, of the weakest
    comparison, in ``unit``; NaN where not run. Models measured on different queries are refused.
    """
    roles = roles_of(rows, roles)
    names = {dataset: dataset for dataset in ROLES}
    ours = {dataset: roles.evaluated(dataset) or dataset for dataset in ROLES}
    theirs, run = paper_cells(paper), rows is not None and per_query is not None
    both = {dataset: f"{dataset} ({ours[dataset]})" for dataset in ROLES} if run else names
    cells = OurCells(rows, per_query, roles) if run else None
    lines = []
    for part in PARTS:
        line = {"finding": int(part.name[0]), "part": part.name, "unit": part.unit}
        line |= {"statement": part.statement.format_map(both)}
        line |= {key: text.format_map(names) for key, text in judge_paper(part, theirs).items()}
        line |= judge_ours(part, cells) if run else _BLANK
        lines.append(line | {"ours": line["ours"].format_map(ours)})
    return pd.DataFrame(lines)[CLAIM_COLUMNS]


# ---------------------------------------------------------------- showing


def claims_table(claims: pd.DataFrame, note: bool = True) -> str:
    """The claims as a Markdown table, finding by finding; with a note on how they are judged."""
    lines = ["| | statement | the paper | by its sign | ours | difference [95 %] | verdict |"]
    lines.append("|" + " --- |" * 7)
    for finding, parts in claims.groupby("finding", sort=False):
        lines.append(f"| **{finding}** | **{FINDINGS[finding]}** | | | | | |")
        for part in parts.itertuples():
            sign = part.paper_verdict.removesuffix(" (by sign)")
            verdict = f"**{part.verdict}**" if part.verdict in (HOLDS, FAILS) else part.verdict
            cells = [part.part, part.statement, part.paper, sign, part.ours or "–"]
            lines.append(f"| {' | '.join([*cells, _interval(part), verdict])} |")
    return "\n".join([*lines, "", NOTE] if note else lines) + "\n"


def _interval(part) -> str:
    digits = 3 if part.unit == "ndcg" else 1
    numbers = [f"{x:+.{digits}f}" for x in (part.difference, part.low, part.high)]
    middle, low, high = (n.replace("-", "−").replace("+nan", "–") for n in numbers)
    return middle if low == "–" else f"{middle} [{low}, {high}]"
