"""Value by value: every number that the paper prints beside ours, from the paper's own data sets.

Takes the paper's tidy frame and result rows of NanoBEIR (exact search) and BEIR (PLAID); gives one
row a printed value with the difference, a tolerance and a verdict, and counts of verdicts.

When a value is inside
----------------------
A value is *inside* where ours differs from the printed one by no more than the tolerance. It is
stated in NDCG points (a point is .01 of NDCG@10) and is the same for every value of an engine:

- **Exact search: ± 1 point.** The same model on the same queries differs between machines by
  half-precision kernels, by k-means' random starts and by the versions of the libraries, tenths of
  a point together; models that are trained again add their data order and their seed. With 50
  queries a set (NanoBEIR), one query that finds its only document at rank 2 and not at rank 1 is
  already worth 0.74 points: a narrower band would judge single queries.
- **PLAID: ± 1.5 points.** On top of that the index is random (its centroids are trained on a
  sample), residuals are rounded to 4 bits, and the releases of fast-plaid differ: the present one
  scales decompressed vectors to unit length, so that it scores pooled vectors, which are shorter
  means, as if they were single tokens.
- **Printing.** Half a unit of the last printed digit is added: .0005 for NDCG and differences,
  0.05 % for percentages in tables and in Figures 2 and 3 (drawn from rounded ones), and the
  read-off error of 0.0001 % in Figures 1 and 4.

Percentages are relative to an unpooled baseline each, the paper's to the paper's and ours to ours;
what they differ by is converted to points with the *paper's* baseline, so that no result of ours
can widen its own band. A point is 1.2 % on SciFact and 2.7 % on NFCorpus, but 6.1 % on SCIDOCS
under PLAID (baseline .164): "inside" says little there, the difference itself says more. The
average of five percentages takes the mean of the five widths. Table 2's differences are held to the
same band, though two measurements enter them. The baselines themselves are rows of their own: a
shift of all absolute values shows there, and not again in every percentage.

What was not run is "not run" with an empty value: never 0, never left out. The baseline's 100 % at
factor 1 is inside by definition; the summary counts these apart and averages without them.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from tabulate import tabulate

from l2p_utils.exhibits import CROSS, ENGINE, rows_source
from l2p_utils.files import UserError
from l2p_utils.results import (
    BASELINE,
    HUB_SUITES,
    PAPER_EXHIBITS,
    RELEASED,
    Roles,
    default_variant,
    roles_of,
)

# The paper's unpooled baseline, NDCG@10: exact as its Table 2 prints it; PLAID from the result
# files that its authors published, since Figure 4 has percentages only.
PAPER_BASELINES = {
    "exact": {
        "SciFact": 0.808, "FiQA": 0.526, "NFCorpus": 0.375, "SCIDOCS": 0.396, "Touche": 0.596,
    },
    "plaid": {"SciFact": 0.736, "FiQA": 0.384, "NFCorpus": 0.354, "SCIDOCS": 0.164},
}  # fmt: skip
POINTS = {"exact": 1.0, "plaid": 1.5}  # tolerance in NDCG points
POINT = 0.01  # of NDCG@10
PRINTED = {"ndcg": 0.0005, "delta": 0.0005, "relative": 0.05}  # half of the last digit
READ_OFF = 0.0001  # percent, of curves drawn from unrounded values
UNROUNDED = ("figure1", "figure4")
LENGTHS = (300, 180)  # tokens of a document: as the paper says, and as its files suggest

INSIDE, OUTSIDE, NOT_RUN = "inside", "outside", "not run"
QUANTITIES = ("relative", "ndcg", "delta")
BASELINES = "baselines"
CELL = ["exhibit", "dataset", "label", "pool_method", "pool_factor"]
COMPARISON_COLUMNS = [
    "exhibit", "engine", "dataset", "collection", "label", "pool_method", "pool_factor",
    "quantity", "paper", "ours", "difference", "tolerance", "points", "verdict",
]  # fmt: skip

# ---------------------------------------------------------------- comparing


def compare_with_paper(paper: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Every value that the paper prints beside ours.

    Parameters
    ----------
    paper
        From `results.read_paper`.
    rows
        Result rows of ``nano:`` and ``beir:`` collections; the whole grid or any part of it.

    Returns
    -------
    One row a printed value (a table's cell prints up to three), baselines first, with
    `COMPARISON_COLUMNS`: ``quantity`` says what ``paper``, ``ours``, ``difference`` (ours − paper)
    and ``tolerance`` are: "relative" in percent, "ndcg" and "delta" on 0–1. ``points`` is the
    difference in NDCG points. ``verdict``: inside, outside, not run (NaN values).

    Raises
    ------
    UserError
        When the rows are of other collections than the paper's: other data, no comparison.
    """
    roles = _own_roles(rows)
    theirs = _long(paper).dropna(subset=["value"]).rename(columns={"value": "paper"})
    ours = _long(rows_source(rows, "", roles).frame).rename(columns={"value": "ours"})
    cells = theirs.merge(ours, on=[*CELL, "quantity"], how="left", validate="one_to_one")
    cells["engine"] = cells["exhibit"].map(ENGINE).fillna("exact")
    frame = pd.concat([_baselines(rows, roles), cells], ignore_index=True)
    pairs = zip(frame["dataset"], frame["engine"], strict=True)
    frame["collection"] = [roles.evaluated(*pair) for pair in pairs]
    return _judged(frame)[COMPARISON_COLUMNS]


def _own_roles(rows: pd.DataFrame) -> Roles:
    roles = roles_of(rows)
    if not roles.own:
        found = ", ".join(sorted(set(rows["collection"])))
        raise UserError(
            f"these rows are of other collections than the paper's ({found}): values cannot be "
            "compared one by one. Expected rows of nano: and beir: collections (profile paper)."
        )
    return roles


def _long(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a value, in the order of `frame`'s cells."""
    tall = frame.melt(
        CELL, list(QUANTITIES), var_name="quantity", value_name="value", ignore_index=False
    )
    return tall.sort_index(kind="stable").reset_index(drop=True)


def _baselines(rows: pd.DataFrame, roles: Roles) -> pd.DataFrame:
    """The unpooled baselines as printed and as measured, one row a data set and engine."""
    unpooled = rows[(rows["model"] == BASELINE) & (rows["pool_method"] == "none")]
    measured = unpooled.set_index(["collection", "engine"])["ndcg@10"].to_dict()
    lines = [
        {
            "engine": engine, "dataset": dataset, "paper": value,
            "ours": measured.get((roles.evaluated(dataset, engine), engine), np.nan),
        }
        for engine, values in PAPER_BASELINES.items()
        for dataset, value in values.items()
    ]  # fmt: skip
    fixed = {"exhibit": BASELINES, "label": "Baseline", "pool_method": "none", "pool_factor": 1}
    return pd.DataFrame(lines).assign(**fixed, quantity="ndcg")


def _judged(frame: pd.DataFrame) -> pd.DataFrame:
    triples = frame[["exhibit", "engine", "dataset", "quantity"]].itertuples(index=False)
    bands = [_band(*values) for values in triples]
    point, printed = np.array(bands).T
    difference = (frame["ours"] - frame["paper"]).to_numpy(dtype=float)
    tolerance = frame["engine"].map(POINTS).to_numpy() * point + printed
    # Decimal numbers that lie on the edge must not fall off by their binary form.
    inside = np.abs(difference) <= tolerance + 1e-9
    verdict = np.where(np.isnan(difference), NOT_RUN, np.where(inside, INSIDE, OUTSIDE))
    return frame.assign(
        difference=difference, tolerance=tolerance, points=difference / point, verdict=verdict
    )


def _band(exhibit: str, engine: str, dataset: str, quantity: str) -> tuple[float, float]:
    """What one NDCG point is in the value's unit, and the error of its printing."""
    if quantity != "relative":
        return POINT, PRINTED[quantity]
    baselines = PAPER_BASELINES[engine]
    ours = list(baselines.values()) if dataset == "Average" else [baselines[dataset]]
    return float(np.mean([100 * POINT / value for value in ours])), (
        READ_OFF if exhibit in UNROUNDED else PRINTED[quantity]
    )


def by_definition(comparison: pd.DataFrame) -> pd.Series:
    """Which values are the baseline's own 100 %, which cannot be otherwise (a mask)."""
    unpooled = (comparison["label"] == "Baseline") & (comparison["pool_factor"] == 1)
    return unpooled & (comparison["quantity"] == "relative") & comparison["ours"].notna()


def comparison_summary(comparison: pd.DataFrame) -> pd.DataFrame:
    """Counts of verdicts and sizes of differences, exhibit by exhibit, and over all.

    Returns
    -------
    Index (exhibit, engine), the last line ("all", ""). Columns: ``values``, ``inside``,
    ``outside``, ``not run``; ``by definition``, how many of those inside are a baseline's own
    100 %; ``mean``, the mean absolute difference, and ``largest``, the largest one with its sign,
    in NDCG points, without the former; ``where``, the value with the largest. NaN and "" where
    nothing was run.
    """
    groups = dict(list(comparison.groupby(["exhibit", "engine"], sort=False)))
    lines = {key: _counts(part) for key, part in groups.items()} | {
        ("all", ""): _counts(comparison)
    }
    table = pd.DataFrame.from_dict(lines, orient="index")
    return table.set_axis(pd.MultiIndex.from_tuples(table.index, names=["exhibit", "engine"]))


def _counts(part: pd.DataFrame) -> dict[str, object]:
    counts = part["verdict"].value_counts()
    trivial = by_definition(part)
    line = {"values": len(part), **{v: int(counts.get(v, 0)) for v in (INSIDE, OUTSIDE, NOT_RUN)}}
    line |= {"by definition": int(trivial.sum()), "mean": np.nan, "largest": np.nan, "where": ""}
    measured = part[~trivial].dropna(subset=["points"])
    if len(measured):
        worst = measured.loc[measured["points"].abs().idxmax()]
        line |= {"mean": measured["points"].abs().mean(), "largest": worst["points"]}
        line |= {"where": _place(worst)}
    return line


def _place(value: pd.Series) -> str:
    pooled = (
        "unpooled" if value["pool_factor"] == 1 else f"{value.pool_method} PF{value.pool_factor}"
    )
    return f"{value.dataset}, {value.label}, {pooled}"


# ---------------------------------------------------------------- 300 tokens or 180


def baseline_lengths(rows: pd.DataFrame) -> pd.DataFrame:
    """The unpooled baseline with its documents cut at several lengths, beside the paper's.

    The paper says 300 tokens; its authors' result files suggest that the baseline's rows were
    measured at 180. The length whose values are closer is the likelier one.

    Returns
    -------
    One row a data set and engine: ``dataset``, ``engine``, ``paper``, for each length ``N tokens``
    (NDCG@10) and ``N − paper`` (NDCG points), and ``closer``: a length, "equal", or "not run" where
    fewer than two were.

    Raises
    ------
    UserError
        As `compare_with_paper`.
    """
    roles = _own_roles(rows)
    # `baseline` and `baseline-d180`, whose numbers are found by the length in their rows.
    named = rows["model"].str.fullmatch(rf"{re.escape(BASELINE)}(-d\d+)?")
    unpooled = rows[named & (rows["pool_method"] == "none")].dropna(subset=["document_length"])
    keys = ["collection", "engine", "document_length"]
    measured = unpooled.drop_duplicates(keys).set_index(keys)["ndcg@10"].to_dict()
    lengths = sorted({*LENGTHS, *map(int, unpooled["document_length"])}, reverse=True)
    lines = []
    for engine, values in PAPER_BASELINES.items():
        for dataset, value in values.items():
            place = roles.evaluated(dataset, engine), engine
            ours = {n: measured.get((*place, n), np.nan) for n in lengths}
            lines.append({"dataset": dataset, "engine": engine, **_side_by_side(value, ours)})
    return pd.DataFrame(lines)


def _side_by_side(paper: float, ours: dict[int, float]) -> dict[str, object]:
    line: dict[str, object] = {"paper": paper}
    gaps = {}
    for length, value in ours.items():
        points = (value - paper) / POINT
        line |= {f"{length} tokens": value, f"{length} − paper": points}
        if not np.isnan(points):
            gaps[length] = abs(points)
    if len(gaps) < 2:
        return line | {"closer": NOT_RUN}
    near = [length for length, gap in gaps.items() if gap <= min(gaps.values()) + 1e-9]
    return line | {"closer": str(near[0]) if len(near) == 1 else "equal"}


def fit(lengths: pd.DataFrame) -> str:
    """Which document length fits the paper's baselines better, a sentence an engine (Markdown)."""
    return "\n".join(
        f"- {_suite(engine)}: {_fit(part)}"
        for engine, part in lengths.groupby("engine", sort=False)
    )


def _fit(part: pd.DataFrame) -> str:
    gaps = part.filter(regex=r"^\d+ − paper$").abs()
    gaps = gaps.loc[:, gaps.notna().any()]
    both = gaps.dropna()
    if gaps.shape[1] < 2 or both.empty:
        return "not run at two lengths on any data set, so nothing is settled."
    means = both.mean().rename(lambda name: name.split()[0])
    order = means.sort_values()
    said = ", ".join(f"{value:.2f} points at {name} tokens" for name, value in means.items())
    tied = order.iloc[1] - order.iloc[0] < 1e-9
    result = "neither fits better" if tied else f"**{order.index[0]} tokens fit better**"
    return f"mean distance from the paper's baselines {said} ({len(both)} data sets): {result}."


# ---------------------------------------------------------------- the released checkpoints


def compare_released(paper: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The paper's values of its kmeans PF1-6 models beside those of the checkpoints it released.

    The checkpoints were measured here, but trained by the authors: what differs is evaluation
    alone. Paper and checkpoint need not be the same run (SciFact's rows average two).

    Returns
    -------
    The rows of `compare_with_paper` for these models, with the checkpoints in the place of ours;
    none where no checkpoint was measured.

    Raises
    ------
    UserError
        As `compare_with_paper`.
    """
    theirs = rows["train_collection"].str.startswith(RELEASED)
    if not theirs.any():
        return pd.DataFrame(columns=COMPARISON_COLUMNS)
    named = "beir:" + rows["train_collection"].str.removeprefix(RELEASED)
    ours = (rows["train_method"] == "kmeans") & (rows["train_factors"] == "1-6") & ~theirs
    stand_in = rows.assign(train_collection=named.where(theirs, rows["train_collection"]))[~ours]
    found = compare_with_paper(paper, stand_in)
    return found[found["label"].isin(CROSS[1:])].reset_index(drop=True)


# ---------------------------------------------------------------- showing


def _suite(engine: str) -> str:
    search = {"exact": "exact search", "plaid": "PLAID"}[engine]
    return f"{HUB_SUITES[engine][1]}, {search}"


def tolerance_note() -> str:
    """How values are judged, in one paragraph."""
    return (
        f"Inside: ours differs from the printed value by at most {POINTS['exact']:g} NDCG point "
        f"(.01 NDCG@10) under exact search on NanoBEIR, {POINTS['plaid']:g} points under PLAID on "
        "BEIR (fast-plaid re-normalises pooled vectors, and its index is random), plus half of the "
        "last printed digit. Percentages are converted to points with the paper's unpooled "
        "baseline: where that is low (SCIDOCS under PLAID: .164), a point is many percent and "
        "“inside” says little. Not run: no value of ours; it counts for neither side."
    )


SUMMARY_NOTE = (
    "Differences in NDCG points, ours − paper; means of absolute values, without what is 100 % *by "
    "definition* (the baseline relative to itself). Tables print up to three values a cell."
)


RELEASED_NOTE = (
    "The two checkpoints that the authors released, measured here, against the paper's values of "
    "its kmeans PF1-6 models. Training is theirs on both sides: this judges the evaluation alone."
)


def variants_note(rows: pd.DataFrame) -> str:
    """Which variants of the pool methods our values were read in, in a sentence."""
    kmeans, tree = (default_variant(rows, method) for method in ("kmeans", "hierarchical"))
    return (
        f"Ours are read in the variants that most models have: kmeans `{kmeans}`, hierarchical "
        f"`{tree}`. The paper used scikit-learn's kmeans (`sklearn`) and Ward on the square matrix "
        "of cosine distances (`paper`); others group tokens differently."
    )


def markdown(frame: pd.DataFrame, digits: dict[str, int] | None = None) -> str:
    """A frame as a Markdown table; numbers rounded to `digits` (default 3), NaN as "not run"."""
    digits = digits or {}
    shown = {c: [_text(x, digits.get(c, 3)) for x in frame[c]] for c in frame.columns}
    return tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True) + "\n"


def _text(value: object, digits: int) -> str:
    if not isinstance(value, float):
        return str(value)
    if np.isnan(value):
        return NOT_RUN
    # "+ 0.0" turns a negative zero into zero.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def summary_markdown(comparison: pd.DataFrame) -> str:
    """The summary as a Markdown table."""
    table = comparison_summary(comparison).reset_index()
    table["engine"] = [_suite(engine) if engine else "" for engine in table["engine"]]
    heads = {"engine": "measured on", "mean": "mean difference", "largest": "largest difference"}
    return markdown(table.rename(columns=heads), dict.fromkeys(heads.values(), 2))


def released_markdown(paper: pd.DataFrame, rows: pd.DataFrame) -> str:
    """The released checkpoints and the paper's values, summed up; "" where none was measured."""
    found = compare_released(paper, rows)
    if found.empty:
        return ""
    return f"{RELEASED_NOTE}\n\n{summary_markdown(found)}"


def lengths_markdown(rows: pd.DataFrame) -> str:
    """The table of `baseline_lengths` and what it says, in Markdown."""
    table = baseline_lengths(rows)
    shown = table.assign(engine=[_suite(engine) for engine in table["engine"]])
    points = {column: 2 for column in table.columns if column.endswith("− paper")}
    return f"{markdown(shown, points)}\n{fit(table)}\n"


def comparison_markdown(comparison: pd.DataFrame, rows: pd.DataFrame, paper: pd.DataFrame) -> str:
    """Everything in one document: summary, document lengths, then all values by exhibit."""
    released = released_markdown(paper, rows)
    parts = [
        "# The paper's values and ours\n",
        tolerance_note() + "\n",
        variants_note(rows) + "\n",
        "## Summary\n",
        SUMMARY_NOTE + "\n",
        summary_markdown(comparison),
        "## The baseline's document length\n",
        "Unpooled NDCG@10; differences in NDCG points. The paper says 300 tokens; its authors' "
        "result files suggest 180.\n",
        lengths_markdown(rows),
    ]
    if released:
        parts += ["## The released checkpoints\n", released]
    for exhibit in [BASELINES, *PAPER_EXHIBITS]:
        values = comparison[comparison["exhibit"] == exhibit].drop(columns=["exhibit", "engine"])
        title = exhibit if exhibit == BASELINES else f"{exhibit[:-1]} {exhibit[-1]}"
        parts += [f"## {title.capitalize()}\n", markdown(values, {"points": 2, "tolerance": 4})]
    return "\n".join(parts)
