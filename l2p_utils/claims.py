"""The paper's seven findings, and an eighth, as testable statements on its numbers and on ours.

A finding has parts, and a part one or more *comparisons*: differences of sums of curves over pool
factors. `NOTE` says how they are judged. Ours are judged twice, with pooled means searched as they
are (raw) and scaled to unit length (renormalized), both with models trained on raw means unless a
part says otherwise. Collections have equal weight, as in the paper; the unpooled baseline, the
100 %, is the mean of its seeds and held fixed. Within a part of m comparisons each interval is
taken at 1 − .05/m (Bonferroni), so that all hold together at 95 %.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from l2p_utils.files import UserError
from l2p_utils.paper import METRICS, NOT_RUN, ROLES, TRAINED, Roles, main_variants, roles_of
from l2p_utils.results import POOL_FACTORS, VARIANTS, find_models
from l2p_utils.statistics import above, detectable, equivalent, holm, interval

# What is said of a part of ours, with raw means; preceded by `UNIT`, with unit-length ones.
# `p_holm` is corrected for all parts of both; `seeds` are the fewest of a comparison.
JUDGED = [
    "ours", "difference", "low", "high", "verdict", "p_holm", "p_equivalent", "effect",
    "error_queries", "error_seeds", "detectable", "seeds", "collections",
]  # fmt: skip
UNIT = "renormalized_"
TINY = 1e-9  # of averages that are equal but for rounding: .015 lost is "at most .015"
CLAIM_COLUMNS = [
    "finding", "part", "statement", "unit", "paper", "paper_verdict",
    *JUDGED, *(UNIT + column for column in JUDGED),
]  # fmt: skip
HOLDS, FAILS, UNDECIDED, IN_PART = "holds", "does not hold", "undecided", "holds in part"
POOLED = POOL_FACTORS[1:]
LARGE = (8, 12, 16, 24)
PLAIN = {dataset: dataset for dataset in ROLES}  # names in the texts of the paper's side
FINDINGS = {
    1: "Inference only: hierarchical > kmeans > span on average; kmeans leads at PF3",
    2: "Lightweight fine-tuning makes models pooling-aware, kmeans most of the three",
    3: "It is the pooling in training that does it: FT PF1 does not survive pooling",
    4: "One model for all factors: PF1-6 is within a point of the best fixed-factor model",
    5: "Span gains most over its own baseline, and stays the weakest method",
    6: "Across methods: hierarchical and kmeans training also help span pooling",
    7: "Across collections: kmeans training does not lose elsewhere",
    8: "Ours: means of unit length beat raw ones, and training with pooling adds to them",
}
NOTE = (
    "Numbers are percent of the unpooled baseline's NDCG@10 (finding 7: differences in NDCG@10), "
    "means over pool factors and collections. If a part involves several comparisons, the weakest "
    "is shown. The paper's verdict is by the sign alone; ours by an interval over queries and, "
    "where there are several, training seeds: *holds* and *does not hold* where the 95 % interval "
    "(over all comparisons of a part together) lies on one side, else *undecided*. Bold verdicts "
    "stand when all parts of both columns are taken together (Holm, 5 %)."
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
    train_renormalized: bool = False
    renormalized: bool | None = None  # how it is searched; None: raw and unit length, in turn


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
    partial: bool = False  # whether comparisons that were not run are left out
    printed: bool = True  # whether the paper has values for it

    @property
    def pooled(self) -> bool:
        """Whether it is about pooled documents at all."""
        sides = [side for _, *both in self.build(self.datasets) for side in both]
        return any(cell.pool_factor > 1 for side in sides for _, cell in side)


def curve(
    model: str,
    pool_method: str,
    datasets: Sequence[str],
    factors: Sequence[int] = POOLED,
    trained_on: str | None = None,
    **lengths: bool,
) -> Side:
    """Mean over `datasets` and `factors` of one kind of model under one pool method.

    `model` is "baseline", "pf1", or a method and factors such as "kmeans 1-6"; without `trained_on`
    it was trained on the data set that it is evaluated on. `lengths` are `Cell`'s last two fields.
    """
    method, _, trained = {"baseline": "", "pf1": "none 1"}.get(model, model).partition(" ")
    weight = 1 / (len(datasets) * len(factors))
    return [
        (weight, Cell(dataset, source, method, trained, pool_method, factor, **lengths))
        for dataset in datasets
        for source in ["" if model == "baseline" else trained_on or dataset]
        for factor in factors
    ]


# ---------------------------------------------------------------- the seven findings


base = partial(curve, "baseline")


def multi(method, *where, **lengths) -> Side:
    """`curve` of a PF1-6 model under its own method."""
    return curve(f"{method} 1-6", method, *where, **lengths)


def _parts() -> list[Part]:
    every, own, scifact = tuple(ROLES), TRAINED, TRAINED[:1]
    methods, others = ("span", "hierarchical", "kmeans"), ("hierarchical", "span")

    def gain(method, *where):
        return multi(method, *where) + [(-w, cell) for w, cell in base(method, *where)]

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
        *[Part(f"2{x}", say2 + m, own, beats(m)) for x, m in zip("abc", methods, strict=True)],
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
             lambda d: [(m, multi(m, d), curve("pf1", m, d)) for m in methods],
             partial=True),
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
        *_unit_length(),
    ]  # fmt: skip


def _across(source: str, letters: str) -> list[Part]:
    """Finding 7 for the model trained on `source`."""
    others = tuple(dataset for dataset in ROLES if dataset != source)
    printed = (2, 4, 6)  # the factors of Table 2

    def compare(d, factors, label=""):
        return label, multi("kmeans", d, factors, source), base("kmeans", d, factors)

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


def _unit_length() -> list[Part]:
    """Finding 8, stated before it was run."""
    every, unit, raw = tuple(ROLES), {"renormalized": True}, {"renormalized": False}

    def gains(factors, train_renormalized=False):
        def compare(d, source):
            where = "kmeans", d, factors, source
            own = multi(*where, train_renormalized=train_renormalized, **unit)
            return f"trained on {{{source}}}", own, curve("pf1", *where, **unit)

        return lambda d: [compare(d, source) for source in TRAINED]

    say = "FT kmeans PF1-6 beats FT PF1, both with unit length, kmeans, "
    small, large = "PF 2–6", "PF 8, 12, 16, 24"
    common = dict(printed=False, partial=True)
    return [
        Part("8a", "baseline, PF 2–6: unit length beats raw means with each method", every,
             lambda d: [(m, base(m, d, **unit), base(m, d, **raw)) for m in list(VARIANTS)[1:]],
             **common),
        Part("8b", "baseline, PF 2–6, both with unit length: span within a point of kmeans", every,
             lambda d: [("", base("span", d, **unit), base("kmeans", d, **unit))], 1.0,
             printed=False),
        Part("8c", say + small, every, gains(POOLED), **common),
        Part("8d", say + large, every, gains(LARGE), **common),
        Part("8e", f"{say}{small}; trained with unit length", every, gains(POOLED, True), **common),
        Part("8f", f"{say}{large}; trained with unit length", every, gains(LARGE, True), **common),
    ]  # fmt: skip


PARTS = _parts()

# ---------------------------------------------------------------- numbers for cells


def paper_cells(paper: pd.DataFrame) -> dict[str, dict[Cell, float]]:
    """The paper's value of each cell by unit: relative NDCG@10, or Table 2's differences."""
    # PLAID (Figure 4) is another measurement; Figure 1 is read unrounded, so it goes first.
    exact = paper[(paper["exhibit"] != "figure4") & (paper["dataset"] != "Average")]
    keys = list(Cell._fields)[:6]
    relative = exact.drop_duplicates(keys).set_index(keys)["relative"]
    alone = relative.xs(1, level="pool_factor", drop_level=False)  # the same for each method
    alone = alone.rename({"span": "none"}, level="pool_method")
    # Differences as printed come from unrounded scores: the baseline counts as their zero.
    delta = exact[exact["exhibit"] == "table2"].set_index(keys)["delta"].fillna(0.0)
    points = alone.to_dict() | relative.to_dict()
    units = {"points": points, "ndcg": delta.to_dict()}
    return {unit: {Cell(*k): v for k, v in values.items()} for unit, values in units.items()}


class OurCells:
    """Our values of a cell, by query and training seed, under one engine.

    A baseline that all trainings share stands beside models of any seed; of several, each beside
    those that started from it.
    """

    def __init__(
        self, rows: pd.DataFrame, per_query: pd.DataFrame, roles: Roles, engine: str = "exact"
    ):
        exact = main_variants(per_query[per_query["engine"] == engine])
        keys = ["model", "collection", "pool_method", "pool_factor", "renormalized"]
        groups = exact.set_index("query_id").groupby(keys)["ndcg@10"]
        self._values = {key: values.sort_index() for key, values in groups}
        models = rows.drop_duplicates("model")
        self._seeds = models.set_index("model")["seed"]
        self._names = cache(partial(find_models, models))
        self._shared = len(self._names("", "", "")) == 1
        self._roles, self._engine = roles, engine
        self.values = cache(self._values_of)

    def _values_of(self, cell: Cell) -> pd.DataFrame | None:
        """NDCG@10, a line per query id (sorted), a column per seed; None where it was not run."""
        source = self._roles.training.get(cell.trained_on, "")
        training = (source, cell.train_method, cell.train_factors, cell.train_renormalized)
        names = self._names(*training) if source or not cell.trained_on else []
        pooling = ("none", 1, False)
        if cell.pool_factor > 1:
            pooling = (cell.pool_method, cell.pool_factor, bool(cell.renormalized))
        where = (self._roles.evaluated(cell.dataset, self._engine), *pooling)
        names = [name for name in names if (name, *where) in self._values]
        found = {self._seeds[name]: self._values[name, *where] for name in names}
        return pd.concat(found, axis=1) if found else None

    def seeds(self, comparison: Comparison) -> list[int]:
        """The seeds that all its cells have; none where a cell, or the baseline, was not run."""
        cells = [cell for side in comparison[1:] for _, cell in side]
        base = [self.values(unpooled(dataset)) for dataset in {cell.dataset for cell in cells}]
        # Of a baseline that found nothing there is no percentage.
        relative = all(values is not None and values.to_numpy().mean() > 0 for values in base)
        if not relative or any(self.values(cell) is None for cell in cells):
            return []
        trained = [cell for cell in cells if cell.trained_on or not self._shared] or cells[:1]
        return sorted(set.intersection(*(set(self.values(cell)) for cell in trained)))

    def sides(self, comparison: Comparison, unit: str) -> list[np.ndarray]:
        """Per collection, what seeds and queries add to the two sides: (2, seeds, queries)."""
        groups, seeds = {}, self.seeds(comparison)
        for row, side in enumerate(comparison[1:]):
            for weight, cell in side:
                base, values = self.values(unpooled(cell.dataset)), self.values(cell)
                if not values.index.equals(base.index) or values.isna().any(axis=None):
                    raise UserError(
                        f"{cell}: measured on {len(values)} queries that are not the {len(base)} "
                        "of the unpooled baseline. A paired comparison needs the same queries: "
                        "evaluate both again."
                    )
                shared = self._shared and not cell.trained_on
                chosen = values.to_numpy().T if shared else values[seeds].to_numpy().T
                scale = weight if unit == "ndcg" else weight * 100 / base.to_numpy().mean()
                empty = np.zeros((2, len(seeds), len(base)))
                groups.setdefault(cell.dataset, empty)[row] += scale * chosen
        return [groups[dataset] for dataset in sorted(groups)]

    def error_bar(self, cells: Sequence[Cell]) -> float:
        """Half the 95 % interval of a percentage of the unpooled baseline, mean over data sets.

        `cells` has one cell per data set. The percentage is a ratio of two means over the same
        queries and seeds: its error is that of value − ratio × baseline. NaN where not measured.
        """
        groups = []
        for cell in cells:
            base, values = self.values(unpooled(cell.dataset)), self.values(cell)
            if base is None or values is None or not values.index.equals(base.index):
                return np.nan
            start = base[values.columns] if {*values} <= {*base} else base.mean(axis=1).to_frame()
            ratio = values.to_numpy().mean() / start.to_numpy().mean()
            share = 100 / len(cells) / base.to_numpy().mean()
            groups.append(share * (values.to_numpy() - ratio * start.to_numpy()).T)
        found = interval(groups)
        return float(found.high - found.low) / 2


# ---------------------------------------------------------------- judging


def judge_paper(part: Part, cells: dict[str, dict[Cell, float]]) -> dict[str, str]:
    """The paper's numbers (`paper_cells`) for a part and the verdict by their sign."""
    if not part.printed:
        return {"paper": "–", "paper_verdict": "–"}
    comparisons, values = part.build(part.datasets), cells[part.unit]
    sums = [[sum(w * values[c] for w, c in side) for side in sides] for _, *sides in comparisons]
    differences = [first - second for first, second in sums]
    worst = int(np.argmin(differences))
    holds = differences[worst] >= -part.margin - TINY
    text = _sides(comparisons[worst][0], *sums[worst], part.unit)
    return {"paper": text, "paper_verdict": f"{HOLDS if holds else FAILS} (by sign)"}


def judge_ours(part: Part, cells: OurCells, renormalized: bool = False) -> dict[str, object]:
    """Our numbers for a part, those of its weakest comparison, and the verdict: `JUDGED` and p.

    With `renormalized` means, unless the part says itself how each side is searched.
    """
    run, comparisons = _what_was_run(part, cells, renormalized)
    if not comparisons:
        return _BLANK
    level = 1 - 0.05 / len(comparisons)
    sides = [cells.sides(comparison, part.unit) for comparison in comparisons]
    found = [interval([first - second for first, second in groups], level) for groups in sides]
    ends = ([getattr(one, end) for one in found] for end in ("low", "high"))
    verdict, worst = _verdict(*ends, -part.margin, TINY)
    weakest, label = found[worst], comparisons[worst][0]
    sums = sum(group.mean(axis=(1, 2)) for group in sides[worst])
    above_margin = np.max([above(one, -part.margin) for one in found])
    # Two-sided, at most .05 where the intervals at 1 − .05 / comparisons give a verdict.
    p_value = 2 * len(found) * min(above_margin, 1 - above_margin)
    numbers = {
        "difference": weakest.mean, "low": weakest.low, "high": weakest.high,
        "p": np.minimum(p_value, 1.0),
        "p_equivalent": np.max([equivalent(one, part.margin or np.nan) for one in found]),
        "effect": weakest.effect, "detectable": detectable(weakest, level=level),
        "error_queries": weakest.error_queries, "error_seeds": weakest.error_seeds,
        "seeds": min(one.seeds for one in found),
    }  # fmt: skip
    texts = {"ours": _sides(label, *sums, part.unit), "verdict": verdict}
    texts["collections"] = ", ".join(f"{{{dataset}}}" for dataset in run)
    return {key: float(number) for key, number in numbers.items()} | texts


def _verdict(low: ArrayLike, high: ArrayLike, bound: float, tiny: float) -> tuple[str, int]:
    """The verdict on intervals that must all lie above `bound`, and the place of the weakest."""
    low, high = np.array(low), np.array(high)
    if (high < bound - TINY).any():
        return FAILS, int(high.argmin())
    return HOLDS if (low > bound + tiny).all() else UNDECIDED, int(low.argmin())


_BLANK = dict.fromkeys(["p", *JUDGED], np.nan) | {"ours": "", "verdict": NOT_RUN, "collections": ""}
NOT_ASKED = "–"  # of unpooled documents there are no means; finding 8 is about those of unit length


def _what_was_run(part: Part, cells: OurCells, renormalized: bool) -> tuple:
    """The data sets that a part rests on, and its comparisons on them; none if it was not run."""

    def as_asked(cell: Cell) -> Cell:
        return cell._replace(renormalized=renormalized) if cell.renormalized is None else cell

    def measured(datasets):
        built = _with_cells(part.build(datasets), as_asked)
        found = [comparison for comparison in built if cells.seeds(comparison)]
        return found if part.partial or len(found) == len(built) else []

    run = tuple(d for d in part.datasets if part.together or measured((d,)))
    return run, measured(run) if run else []


def _with_cells(comparisons: list[Comparison], change: Callable[[Cell], Cell]) -> list[Comparison]:
    """`comparisons` with other cells in the place of theirs."""
    return [
        (label, *([(weight, change(cell)) for weight, cell in side] for side in sides))
        for label, *sides in comparisons
    ]


def _sides(label: str, first: float, second: float, unit: str) -> str:
    text = f"{first:.1f} vs {second:.1f}"
    if unit == "ndcg":
        text = f"Δ {first - second:+z.3f}".replace("-", "−").replace("+0.000", "0.000")
    return f"{label}: {text}" if label else text


def check_claims(
    rows: pd.DataFrame | None, per_query: pd.DataFrame | None, paper: pd.DataFrame
) -> pd.DataFrame:
    """Judge the findings on the paper's numbers (`read_paper`) and on ours.

    Without `rows` and `per_query` on the paper's alone. One row per part, columns `CLAIM_COLUMNS`:
    numbers are ours, of the weakest comparison, in ``unit``; NaN where not run. Parts about
    unpooled documents are in the columns of raw means alone; so is, in those of unit length,
    finding 8. Models measured on different queries are refused.
    """
    theirs, roles, run = paper_cells(paper), roles_of(rows), per_query is not None
    cells = OurCells(rows, per_query, roles) if run else None
    ours = {dataset: roles.evaluated(dataset) or dataset for dataset in ROLES}
    both = {dataset: f"{dataset} ({ours[dataset]})" if run else dataset for dataset in ROLES}
    lines = []
    for part in PARTS:
        line = {"finding": int(part.name[0]), "part": part.name, "unit": part.unit}
        line |= {"statement": part.statement.format_map(both)}
        line |= {key: text.format_map(PLAIN) for key, text in judge_paper(part, theirs).items()}
        for head, asked in {"": part.printed, UNIT: part.pooled}.items():
            judged = judge_ours(part, cells, head == UNIT) if run and asked else _BLANK
            named = {key: judged[key].format_map(ours) for key in ("ours", "collections")}
            named |= {} if asked else {"verdict": NOT_ASKED}
            line |= {head + key: value for key, value in (judged | named).items()}
        lines.append(line)
    claims = pd.DataFrame(lines)
    p_values = claims[["p", UNIT + "p"]].to_numpy(dtype=float)
    claims[["p_holm", UNIT + "p_holm"]] = holm(p_values.ravel()).reshape(-1, 2)
    return claims[CLAIM_COLUMNS]


def by_finding(claims: pd.DataFrame, head: str = "") -> pd.Series:
    """One verdict per finding, of raw means, or with `UNIT` of unit-length ones.

    "Holds in part" needs a part about pooled documents that holds.
    """
    pooled = {part.name for part in PARTS if part.pooled}
    verdicts = {}
    for finding, parts in claims.set_index("part").groupby("finding")[head + "verdict"]:
        asked = parts[parts != NOT_ASKED]
        found = {verdict for part, verdict in asked.items() if part in pooled}
        order = (FAILS, UNDECIDED, NOT_RUN)
        verdict = IN_PART if HOLDS in found else next((v for v in order if v in found), NOT_ASKED)
        verdicts[finding] = HOLDS if {*asked} == {HOLDS} else verdict
    return pd.Series(verdicts, name="verdict").rename_axis("finding")


# ---------------------------------------------------------------- showing


def claims_table(claims: pd.DataFrame, note: bool = True) -> str:
    """The claims as a Markdown table, finding by finding; with a note on how they are judged."""
    heads = "statement | the paper | by its sign | raw means | verdict | unit length | verdict"
    lines = [f"| | {heads} | rests on |", "|" + " --- |" * 9]
    for finding, parts in claims.groupby("finding", sort=False):
        lines.append(f"| **{finding}** | **{FINDINGS[finding]}** |" + " |" * 7)
        for part in parts.to_dict("records"):
            sign = part["paper_verdict"].removesuffix(" (by sign)")
            cells = [part["part"], part["statement"], part["paper"], sign]
            cells += [*_shown(part, ""), *_shown(part, UNIT), _rests_on(part)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{NOTE} {power(claims)}"] if note else lines) + "\n"


def _shown(part: Mapping, head: str) -> tuple[str, str]:
    """The numbers of ours and the verdict, as the table has them."""
    verdict = part[head + "verdict"]
    if verdict in (NOT_RUN, NOT_ASKED):
        return "–", verdict
    digits = 3 if part["unit"] == "ndcg" else 1
    numbers = [f"{part[head + key]:+.{digits}f}" for key in ("difference", "low", "high")]
    middle, low, high = (number.replace("-", "−") for number in numbers)
    text, span = part[head + "ours"], middle if low == "+nan" else f"{middle} [{low}, {high}]"
    text = f"{text.split('Δ')[0]}Δ {span}" if part["unit"] == "ndcg" else f"{text}; {span}"
    if part[head + "p_holm"] <= 0.05 and verdict in (HOLDS, FAILS):
        verdict = f"**{verdict}**"
    return text, verdict + (" (equivalent)" if part[head + "p_equivalent"] <= 0.05 else "")


def _rests_on(part: Mapping) -> str:
    """Collections and seeds; of unit length after a semicolon, if they are others."""
    found = []
    for head in ("", UNIT):
        names = part[head + "collections"]
        if names:
            seeds = int(part[head + "seeds"])
            count = f"all {len(ROLES)}" if names.count(",") == len(ROLES) - 1 else names
            found.append(f"{count}, {seeds} seed{'s' if seeds > 1 else ''}")
    return "; ".join(dict.fromkeys(found)) or "–"


def power(claims: pd.DataFrame) -> str:
    """What the design can see, and what its intervals do not cover: the table's foot."""
    both = [claims[["part", "unit", *(head + c for c in JUDGED)]] for head in ("", UNIT)]
    both = pd.concat([frame.set_axis(["part", "unit", *JUDGED], axis=1) for frame in both])
    found = both.loc[both["unit"] == "points", "detectable"].dropna()
    if found.empty:
        return ""
    text = (
        f"With 80 % power the design detects a true difference of {found.median():.1f} points "
        f"(median of the parts; {found.min():.1f} to {found.max():.1f})."
    )
    several, single = both[both["seeds"] > 1], both.loc[both["seeds"] == 1, "part"].unique()
    if len(several):
        more = (several["error_seeds"] > several["error_queries"]).sum()
        text += f" Seeds vary more than queries in {more} of {len(several)} verdicts."
    if len(single):
        names = ", ".join(single) if len(several) else "all"
        text += f" Of one training seed, whose choice no interval covers: {names}."
    return text


# ---------------------------------------------------------------- the author's rows

AUTHOR_COLUMNS = ["author", "author_difference", "author_error", "author_verdict"]
AUTHOR_NOTE = (
    "A case is one collection and one training run of the author's; by sign, a part holds in so "
    "many. Models trained on the data set that a statement names (on either, where it names none) "
    "count on all five collections; in brackets are the cases on their own. The difference is the "
    "mean over cases, of the weakest comparison; ± is two standard errors of training noise, from "
    "the three models that he trained twice. *Holds* and *does not hold*: beyond that noise. The "
    "baseline is one run: what concerns it alone has no ± and is judged by sign. On NanoBEIR it "
    "probably read 180 word pieces and the trained models 300, which flatters them. Without values "
    "per query, whether other queries would agree is not part of it."
)


class AuthorCells:
    """The author's result rows (`paper.read_runs`) as cells, of one metric and engine.

    A cell has two values, those of the versions of its model's training, or twice that of the only.
    """

    def __init__(self, runs: pd.DataFrame, metric: str = "ndcg@10", engine: str = "exact"):
        rows = runs[runs["engine"] == engine]
        # A few models were evaluated unpooled under each pool method, with small differences.
        alone = rows[rows["pool_factor"] == 1].assign(pool_method="none")
        keys = [*Cell._fields[:6], "version"]
        means = pd.concat([rows, alone]).groupby(keys)[metric].mean().unstack("version")
        both = means.reindex(columns=[1, 2])
        self._twice = {Cell(*key) for key in both.dropna().index}
        values = both.ffill(axis=1).bfill(axis=1).to_numpy()
        self._values = {Cell(*key): pair for key, pair in zip(both.index, values, strict=True)}

    def versions(self, terms: Side) -> range:
        """Versions of training that tell `terms` apart: 0, or 0 and 1; empty if a cell lacks."""
        cells = {cell for _, cell in terms} | {unpooled(cell.dataset) for _, cell in terms}
        return range((2 if cells & self._twice else 1) if cells <= {*self._values} else 0)

    def scaled(self, terms: Side, unit: str) -> Side:
        """`terms` in percent of the unpooled baseline where `unit` is "points"."""
        if unit == "ndcg":
            return terms
        return [(100 * w / self._values[unpooled(c.dataset)][0], c) for w, c in terms]

    def total(self, terms: Side, version: int) -> float:
        """The weighted sum."""
        return sum(w * self._values[cell][version] for w, cell in terms)

    def error(self, cases: list[tuple[Side, int]]) -> float:
        """Standard error, from training noise, of the mean over `cases` (terms, version).

        A run's share is its weighted sum on one collection, over all cases, for they may have the
        run in common. Its variance is that of the same sum between the two runs of SciFact PF1-6
        models, mean over the three such models and all collections (in NDCG@10, their noise is
        much alike): they stand for what was trained once, too. Shares of different runs and
        collections count as independent; the baseline has none. NaN where nothing was run twice.
        """
        shares: dict[tuple, Side] = {}
        for terms, version in cases:
            for weight, cell in terms:
                if cell.trained_on:
                    share = cell[:4], version if cell in self._twice else 0
                    shares.setdefault(share, []).append((weight / len(cases), cell))
        return float(np.sqrt(sum(map(self._variance, shares.values()))))

    def _variance(self, terms: Side) -> float:
        gaps = []
        for dataset, *training in sorted({cell[:4] for cell in self._twice}):
            twins = [(w, Cell(dataset, *training, *cell[4:])) for w, cell in terms]
            if {cell for _, cell in twins} <= self._twice:
                gaps.append(self.total(twins, 0) - self.total(twins, 1))
        return float(np.mean(np.square(gaps)) / 2) if gaps else np.nan


def _on_all(part: Part) -> list[tuple[bool, list[Comparison]]]:
    """A part's comparisons on every collection, and whether each is as the part states it.

    Models that a part measures on the collection that they were trained on are moved to the others.
    """
    if part.together:
        return [(True, part.build(part.datasets))]
    stated = [part.build((dataset,)) for dataset in part.datasets]
    cells = [cell for built in stated for _, *sides in built for _, cell in sum(sides, [])]
    if {cell.trained_on == cell.dataset for cell in cells if cell.trained_on} != {True}:
        return [(True, built) for built in stated]
    sources = [d for d in TRAINED if f"{{{d}}}" in part.statement] or TRAINED
    pairs = [(source, dataset) for source in sources for dataset in ROLES]
    return [
        (s == d, _with_cells(part.build((s,)), lambda cell, d=d: cell._replace(dataset=d)))
        for s, d in pairs
    ]


def judge_author(
    part: Part, runs: pd.DataFrame, metric: str = "ndcg@10", engine: str = "exact"
) -> dict[str, object]:
    """How a part comes out on the author's result rows (`paper.read_runs`), see `AUTHOR_NOTE`.

    Columns `AUTHOR_COLUMNS`: ``author_difference``, of the weakest comparison, and
    ``author_error``, one standard error, are in the part's unit, of `metric` in place of NDCG@10;
    in ``author``, as in `judge_paper`, {SciFact} stands for a data set.
    """
    cells = AuthorCells(runs, metric, engine)
    cases: list[tuple[bool, bool]] = []  # as stated, holds
    groups: dict[str, list[tuple[Side, int]]] = {}  # by comparison
    for stated, comparisons in _on_all(part):
        signed = {label: a + [(-w, c) for w, c in b] for label, a, b in comparisons}
        for version in cells.versions(sum(signed.values(), [])):
            terms = {label: cells.scaled(t, part.unit) for label, t in signed.items()}
            least = min(cells.total(t, version) for t in terms.values())
            cases.append((stated, bool(least >= -part.margin - TINY)))
            for label, t in terms.items():
                groups.setdefault(label, []).append((t, version))
    if not cases:
        return dict(zip(AUTHOR_COLUMNS, ["", np.nan, np.nan, NOT_RUN], strict=True))
    means = np.array([np.mean([cells.total(*case) for case in group]) for group in groups.values()])
    errors = np.array([cells.error(group) for group in groups.values()])
    ends = means - 2 * errors, means + 2 * errors
    verdict, worst = _verdict(*ends, -part.margin, -TINY)
    mean, error, digits = means[worst], errors[worst], 3 if part.unit == "ndcg" else 1
    text = f"{sum(holds for _, holds in cases)} of {len(cases)} hold"
    own = [holds for stated, holds in cases if stated]
    text += f" ({sum(own)} of {len(own)})" if 0 < len(own) < len(cases) else ""
    label = [*groups][worst]
    text += f"; {label}: " if label else "; "
    text += f"{mean:+z.{digits}f}".replace("-", "−")
    text += "" if error == 0 else f" ± {2 * error:.{digits}f}".replace("nan", "?")
    values = [text, float(mean), float(error), verdict]
    return dict(zip(AUTHOR_COLUMNS, values, strict=True))


def author_claims(runs: pd.DataFrame, engine: str = "exact") -> pd.DataFrame:
    """A row per part and metric: ``part``, ``statement``, ``metric``, `AUTHOR_COLUMNS`."""
    lines = []
    for part in PARTS:
        for metric in METRICS:
            found = judge_author(part, runs, metric, engine)
            found["author"] = found["author"].format_map(PLAIN)
            key = {"part": part.name, "statement": part.statement.format_map(PLAIN)}
            lines.append(key | {"metric": metric} | found)
    return pd.DataFrame(lines)


def author_table(found: pd.DataFrame, note: bool = True) -> str:
    """`author_claims` as a Markdown table with a column per metric; verdicts in italics."""
    cell = found["author"].where(found["author"] != "", "–") + ", *" + found["author_verdict"] + "*"
    index = ["part", "statement"]
    wide = found.assign(cell=cell).pivot(index=index, columns="metric", values="cell")[METRICS]
    text = wide.reset_index().to_markdown(index=False)
    return text + (f"\n\n{AUTHOR_NOTE}\n" if note else "\n")
