"""What the paper's figures and tables show, cell by cell, from its numbers or from a run's rows.

Takes a folder of ``data/`` or of a run's results; gives one tidy frame in the same form for both,
NaN where a cell was not run. Drawn by `figures`, worded by `reading`, compared by `comparison`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from l2p_utils.results import (
    BASELINE,
    PAPER_COLUMNS,
    PAPER_EXHIBITS,
    POOL_FACTORS,
    RELEASED,
    ROLES,
    Roles,
    default_variant,
    find_models,
    parse_label,
    read_paper,
    read_rows,
    relative_ndcg,
    roles_of,
    series,
    without_baseline,
)

FIGURES, TABLES = PAPER_EXHIBITS[:4], PAPER_EXHIBITS[4:]
TRAINED = ("SciFact", "FiQA")

# ---------------------------------------------------------------- what each exhibit shows

BASELINES = [("Baseline", method) for method in ("hierarchical", "kmeans", "span")]
MULTI = [
    ("FT Span PF1-6", "span"),
    ("FT Hier PF1-6", "hierarchical"),
    ("FT KMeans PF1-6", "kmeans"),
]
CROSS = ["Baseline", "FT SciFact KMeans PF1-6", "FT FiQA KMeans PF1-6"]
SPAN = ["Baseline", "FT PF1", "FT Span PF2", "FT Span PF3", "FT Span PF1-6"]


def _own(dataset: str) -> list[tuple[str, str]]:
    """Figure 4's trained models: every method on its own data set, kmeans also across."""
    across = [(label, "kmeans") for label in CROSS[1:]]
    own = [
        (f"FT {dataset} {name} PF1-6", method)
        for name, method in (("Hier", "hierarchical"), ("Span", "span"))
        if dataset in TRAINED
    ]
    return across + own


# exhibit → data set → the (label, pool method) pairs that it shows there, in order.
CONTENTS: dict[str, dict[str, list[tuple[str, str]]]] = {
    "figure1": {d: BASELINES for d in ("FiQA", "NFCorpus", "SCIDOCS", "SciFact", "Touche")},
    "figure2": {d: [(label, "span") for label in SPAN] for d in TRAINED},
    "figure3": {d: [("Baseline", "hierarchical"), *MULTI] for d in TRAINED},
    "figure4": {d: BASELINES + _own(d) for d in ("SciFact", "FiQA", "NFCorpus", "SCIDOCS")},
    "table1": {"SciFact": [("Baseline", "span"), *((label, "span") for label, _ in MULTI)]},
    "table2": {d: [(label, "kmeans") for label in CROSS] for d in ROLES},
    "table3": {
        "SciFact": [
            (label, "hierarchical")
            for label in ("Baseline", "FT PF1", "FT Hier PF2", "FT Hier PF1-6")
        ]
    },
    "table4": {
        "SciFact": [
            (label, "kmeans")
            for label in ("Baseline", "FT PF1", "FT KMeans PF2", "FT KMeans PF1-6")
        ]
    },
}
FACTORS = {"table2": (1, 2, 4, 6)}
ENGINE = {"figure4": "plaid"}

# ---------------------------------------------------------------- the tidy frame


@dataclass(frozen=True)
class Source:
    """Numbers to draw: where they come from and how their data sets are called.

    Attributes
    ----------
    name
        "paper", or the name of the folder of rows.
    frame
        Tidy numbers with the columns of `PAPER_COLUMNS`; NaN is "not run".
    names
        Data set → (panel title, short name in labels and notes).
    note
        One line on what the numbers are.
    vectors
        Mean vectors a document at each pool factor (kmeans, SciFact's role), where known.
    suites
        Engine → what its collections are called together, where they are the paper's own.
    notes
        Engine → `note` on what that engine searched alone, where there is more than one.
    """

    name: str
    frame: pd.DataFrame
    names: dict[str, tuple[str, str]]
    note: str
    vectors: pd.Series | None = None
    suites: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    is_paper: bool = False  # the paper's own numbers, wherever they lie

    def rename(self, label: str) -> str:
        """A model's label with this source's name for the collection that it was trained on."""
        for dataset in TRAINED:
            label = label.replace(f" {dataset} ", f" {self.names[dataset][1]} ")
        return label

    def note_on(self, exhibit: str) -> str:
        """What the numbers of one figure or table are: of the engine that it shows, no other."""
        return self.notes.get(ENGINE.get(exhibit, "exact"), self.note)


def read_source(folder: str | Path) -> Source:
    """Read `folder`: the paper's CSVs (it has a ``figure1.csv``) or a run's result rows.

    Raises
    ------
    UserError
        When it holds neither.
    """
    folder = Path(folder)
    if holds_paper(folder):
        return paper_source(read_paper(folder))
    return rows_source(read_rows(folder), folder.name)


def holds_paper(folder: str | Path) -> bool:
    """Whether `folder` holds the paper's CSVs."""
    return (Path(folder) / "figure1.csv").is_file()


def paper_source(frame: pd.DataFrame) -> Source:
    """The paper's numbers as a source."""
    names = {dataset: (dataset, dataset) for dataset in [*ROLES, "Average"]}
    names["Average"] = ("Average of the five", "Average")
    note = "The paper's numbers (S. Josef, LIR @ ECIR 2026, CC BY 4.0)"
    return Source("paper", frame, names, note, is_paper=True)


def rows_source(
    rows: pd.DataFrame, name: str, roles: Roles | Mapping[str, str] | None = None
) -> Source:
    """A run's result rows as a source: every exhibit's cells, NaN where one was not run.

    Parameters
    ----------
    rows
        Result rows (see `results.read_rows`), of the whole grid or of any part of it. Percentages
        need the unpooled baseline: without it, NaN, and the note says so.
    name
        What to call the run in the figures' notes.
    roles
        The collections that stand for the paper's data sets; by default those that `rows` hold
        (see `results.roles_of`).
    """
    roles = roles_of(rows, roles)
    note = _note(rows, name, roles)
    notes = {engine: _note(part, name, roles, engine) for engine, part in rows.groupby("engine")}
    rows = relative_ndcg(rows, partial=True)
    frames = [_exhibit_rows(rows, exhibit, roles) for exhibit in CONTENTS]
    names = {d: (f"{c} (in {d}’s role)", c) for d, c in roles.exact.items()}
    if roles.own:
        names = {dataset: (dataset, dataset) for dataset in roles.exact}
    names["Average"] = ("Average of the five", "Average")
    frame = pd.concat(frames, ignore_index=True)
    return Source(name, frame, names, note, _vectors(rows, roles), roles.suites, notes)


def _note(rows: pd.DataFrame, name: str, roles: Roles, only: str = "") -> str:
    """What a run's numbers are, in one line: profile, queries, seeds; of all engines or one."""
    note = f"Run “{' + '.join(sorted(set(rows['profile']) - {''})) or name}”"
    if roles.own and not only:
        note += f" on {roles.suites['exact']} (exact search) and {roles.suites['plaid']} (PLAID)"
    for engine, part in rows.dropna(subset=["queries"]).groupby("engine"):  # exact before plaid
        few, many = part["queries"].min(), part["queries"].max()
        number = f"{few}–{many}" if few < many else f"{few}"
        first = engine in ("exact", only)
        note += f", {number} test queries a collection" if first else f" (PLAID: {number})"
    # Checkpoints that others trained have no seed of ours.
    trained = (rows["train_collection"] != "") & ~rows["train_collection"].str.startswith(RELEASED)
    seeds = rows.loc[trained, "seed"].nunique()
    note += f", {seeds} training seed{'s' if seeds > 1 else ''}" if seeds else ""
    note += "; where a model has more than one, their mean" if seeds > 1 else ""
    lacking = [f"{collection} ({engine})" for collection, engine in without_baseline(rows)]
    return note + (f"; no unpooled baseline yet on {', '.join(lacking)}" if lacking else "")


def _exhibit_rows(rows: pd.DataFrame, exhibit: str, roles: Roles) -> pd.DataFrame:
    """All cells of one exhibit: the grid of `CONTENTS`, filled where rows exist."""
    tidy = []
    engine = ENGINE.get(exhibit, "exact")
    methods = {method for lines in CONTENTS[exhibit].values() for _, method in lines}
    # Settled on all rows, so that every model is read in the same variant.
    variants = {method: default_variant(rows, method) for method in methods}
    for dataset, lines in CONTENTS[exhibit].items():
        collection = roles.evaluated(dataset, engine)
        here = rows[(rows["collection"] == collection) & (rows["engine"] == engine)]
        curves = [_curve(here, exhibit, dataset, *line, roles, variants) for line in lines]
        first = curves[0]["ndcg"].to_numpy()  # the baseline at the same factors
        for curve in curves:
            trained = curve["label"].iloc[0] != "Baseline"
            delta = curve["ndcg"] - first if exhibit == "table2" and trained else np.nan
            tidy.append(curve.assign(delta=delta))
    frame = pd.concat(tidy, ignore_index=True)
    if exhibit == "figure1":
        frame = pd.concat([frame, _average(frame)], ignore_index=True)
    return frame.reindex(columns=PAPER_COLUMNS)


def _curve(rows, exhibit, dataset, label, pool_method, roles: Roles, variants) -> pd.DataFrame:
    """One model's values at the exhibit's factors; several seeds are averaged, as in the paper."""
    trained = parse_label(label, dataset)
    names = find_models(rows, roles.trained(trained[0]), *trained[1:])
    factors = FACTORS.get(exhibit, POOL_FACTORS)
    engine = ENGINE.get(exhibit, "exact")
    where = (roles.evaluated(dataset, engine), pool_method, engine, variants[pool_method])

    def mean(value: str) -> np.ndarray:
        curves = [series(rows, name, *where, value, factors) for name in names]
        # Of the seeds that were run: one may still be under way.
        return pd.DataFrame(curves, columns=list(factors)).mean().to_numpy(dtype=float)

    values = {"pool_factor": factors, "ndcg": mean("ndcg@10"), "relative": mean("relative_ndcg@10")}
    fixed = dict(zip(["trained_on", "train_method", "train_factors"], trained, strict=True))
    return pd.DataFrame(values).assign(
        exhibit=exhibit, dataset=dataset, label=label, pool_method=pool_method, **fixed
    )


def _average(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean of the data sets' percentages; NaN where one of them was not run."""
    columns = [c for c in frame.columns if c not in ("dataset", "ndcg", "relative", "delta")]
    mean = frame.groupby(columns, sort=False)["relative"].agg(lambda x: x.mean(skipna=False))
    return mean.reset_index().assign(dataset="Average")


def _vectors(rows: pd.DataFrame, roles: Roles) -> pd.Series:
    where = (BASELINE, roles.evaluated("SciFact"), "kmeans")
    return series(rows, *where, value="vectors_per_document")


# ---------------------------------------------------------------- what was not run


def missing(source: Source, exhibit: str) -> str:
    """What `exhibit` should show and `source` did not run, as one line; "" if nothing."""
    frame = source.frame[source.frame["exhibit"] == exhibit]
    parts: list[str] = []
    gaps: dict[str, list[str]] = {}
    for dataset in CONTENTS[exhibit]:
        here = frame[frame["dataset"] == dataset]
        if here["relative"].isna().all():
            parts.append(f"{source.names[dataset][1]} (everything)")
            continue
        for (label, method), curve in here.groupby(["label", "pool_method"], sort=False):
            if curve["relative"].isna().any():
                name = _gap(source, label, method, curve)
                gaps.setdefault(name, []).append(source.names[dataset][1])
    for name, places in gaps.items():
        everywhere = len(places) == len(CONTENTS[exhibit])
        parts.append(name if everywhere else f"{name} on {', '.join(places)}")
    return "; ".join(parts)


def _gap(source: Source, label: str, method: str, curve: pd.DataFrame) -> str:
    name = f"{source.rename(label)} {method}" if label == "Baseline" else source.rename(label)
    lacking = curve.loc[curve["relative"].isna(), "pool_factor"]
    if len(lacking) == len(curve):
        return name
    return f"{name} at PF {', '.join(str(factor) for factor in lacking)}"
