"""The paper's figures and tables, from its printed numbers or from a run's, and the two compared.

Both become one tidy frame (`Exhibits`) with a row per printed cell; NaN is "not run".

`NOTE` says what counts as *inside*. Why so much: half-precision kernels, random starts and library
versions move the same model by tenths of a point; with NanoBEIR's 50 queries, one whose only
relevant document falls from rank 1 to 2 costs 0.74. PLAID adds random centroids, 4-bit residuals
and fast-plaid's scaling to unit length. The *paper's* baseline converts percentages to points, so
that no result of ours widens its own band.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from l2p_utils.files import UserError, from_root
from l2p_utils.results import (
    BASELINE,
    RELEASED,
    VARIANTS,
    default_variant,
    is_baseline,
    read_per_query,
    read_rows,
    relative_ndcg,
    searched,
)

# The bundled collection that stands for each of the paper's data sets.
ROLES = {
    "SciFact": "docs:scipy", "FiQA": "docs:torch", "NFCorpus": "docs:numpy",
    "SCIDOCS": "docs:pandas", "Touche": "docs:sklearn",
}  # fmt: skip
TRAINED = ("SciFact", "FiQA")  # what models were trained on

FIGURES, TABLES = [f"figure{i}" for i in range(1, 5)], [f"table{i}" for i in range(1, 5)]
PAPER_EXHIBITS = [*FIGURES, *TABLES]
CELL = ["exhibit", "dataset", "label", "pool_method", "pool_factor"]
TRAINING = ["trained_on", "train_method", "train_factors"]
QUANTITIES = ["ndcg", "relative", "delta"]  # relative in percent, the others on 0–1
PAPER_COLUMNS = [*CELL[:3], "engine", *TRAINING, *CELL[3:], *QUANTITIES]
ENGINE = dict.fromkeys([*PAPER_EXHIBITS, "overview"], "exact") | {"figure4": "plaid"}
# The paper's unpooled baseline, NDCG@10: exact as Table 2 prints it; PLAID from the result files
# that the authors published, since Figure 4 has percentages only.
PAPER_BASELINES = {
    "exact": {
        "SciFact": 0.808, "FiQA": 0.526, "NFCorpus": 0.375, "SCIDOCS": 0.396, "Touche": 0.596,
    },
    "plaid": {"SciFact": 0.736, "FiQA": 0.384, "NFCorpus": 0.354, "SCIDOCS": 0.164},
}  # fmt: skip
_UNPOOLED = [(e, d, x) for e, values in PAPER_BASELINES.items() for d, x in values.items()]
POINTS = {"exact": 1.0, "plaid": 1.5}  # tolerance in NDCG points
POINT = 0.01  # of NDCG@10
INSIDE, OUTSIDE, NOT_RUN = "inside", "outside", "not run"
COMPARISON_COLUMNS = [
    "exhibit", "engine", "dataset", "collection", "label", "pool_method", "pool_factor",
    "quantity", "paper", "ours", "difference", "tolerance", "points", "verdict",
]  # fmt: skip


# ---------------------------------------------------------------- roles of collections


@dataclass(frozen=True)
class Roles:
    """The collections that stand for the paper's data sets, the keys of each mapping."""

    exact: Mapping[str, str]  # what exact search is measured on
    plaid: Mapping[str, str]
    training: Mapping[str, str]  # what models are trained on
    own: bool = False  # whether they are the paper's own, so that values can be compared

    def evaluated(self, dataset: str, engine: str = "exact") -> str:
        """The collection of `dataset` that `engine` searches; "" where there is none."""
        return (self.plaid if engine == "plaid" else self.exact).get(dataset, "")

    def collections(self, frame: pd.DataFrame) -> list[str]:
        """The collection of each line's ``dataset`` and ``engine``."""
        return [self.evaluated(*pair) for pair in frame[["dataset", "engine"]].to_numpy()]


BUNDLED = Roles(ROLES, ROLES, ROLES)


def roles_of(rows: pd.DataFrame | None) -> Roles:
    """The roles in which result rows are read.

    Rows of ``nano:`` or ``beir:`` collections, without bundled ones beside them, are of the paper's
    own data sets. All others are read by `ROLES`.
    """
    found = set() if rows is None else set(rows["collection"])
    hub = any(name.startswith(("nano:", "beir:")) for name in found)
    if not hub or found & set(ROLES.values()):
        return BUNDLED
    trained = _hub_roles("beir", set(rows["train_collection"]))
    return Roles(_hub_roles("nano", found), _hub_roles("beir", found), trained, own=True)


def _hub_roles(prefix: str, names: set[str]) -> dict[str, str]:
    """Data set → its name among `names`, which may end in ``@revision``."""
    roles = {}
    for dataset in ROLES:
        plain = f"{prefix}:{dataset.lower()}"
        found = sorted(name for name in names if name.split("@")[0] == plain)
        if len(found) > 1:
            raise UserError(
                f"rows of {plain} in several revisions: {found}. Figures and tables read one. "
                "Move the files with the others out of the results folder, or evaluate again."
            )
        roles[dataset] = found[0] if found else plain
    return roles


# ---------------------------------------------------------------- the paper's numbers

# What a caption says once for all rows.
_CAPTIONS = {
    "figure1": {"label": "Baseline"},
    "figure2": {"pool_method": "span"},
    "table1": {"dataset": "SciFact", "pool_method": "span"},
    "table2": {"pool_method": "kmeans"},
    "table3": {"dataset": "SciFact", "pool_method": "hierarchical"},
    "table4": {"dataset": "SciFact", "pool_method": "kmeans"},
}
_NAMES = {
    "model": "label", "method": "pool_method", "pooling_method": "pool_method", "ndcg10": "ndcg",
    "relative_ndcg10": "relative", "relative_percent": "relative",
    # of the author's rows
    "train_collection": "trained_on", "seed_or_version": "version", "collection": "dataset",
    "query_length_in_filename": "query_length", "document_length_in_filename": "document_length",
}  # fmt: skip


def _read_csvs(folder: str | Path, files: Mapping[str, Mapping], what: str) -> pd.DataFrame:
    """Files of `folder` below each other; `files` has what each says once for all its rows."""
    frames = []
    for name, said in files.items():
        file = Path(folder) / f"{name}.csv"
        if not file.is_file():
            raise UserError(f"{file} is missing: {what}. `git restore data/paper`.")
        frames.append(pd.read_csv(file).rename(columns=_NAMES).assign(**said))
    return pd.concat(frames, ignore_index=True)


def read_paper(folder: str | Path) -> pd.DataFrame:
    """Read the paper's figures and tables (``data/paper``): a row per printed cell.

    Columns `PAPER_COLUMNS`: ``exhibit`` (figure1 … table4), ``dataset`` (a key of `ROLES` or
    "Average"), ``label`` (the model as printed), ``engine``, the model's training (empty for the
    baseline); `QUANTITIES` that are not printed are NaN.
    """
    files = {
        exhibit: {"exhibit": exhibit, "engine": ENGINE[exhibit]} | _CAPTIONS.get(exhibit, {})
        for exhibit in PAPER_EXHIBITS
    }
    paper = _read_csvs(folder, files, "the paper's numbers")
    paper["dataset"] = paper["dataset"].replace({"FiQA2018": "FiQA", "Touche2020": "Touche"})
    # "FT Span PF2" was trained on the data set that it is evaluated on, "FT FiQA KMeans PF1-6" not.
    found = paper["label"].str.extract(r"FT (?:(SciFact|FiQA) )?(?:(Span|Hier|KMeans) )?PF(.+)")
    methods = {"Span": "span", "Hier": "hierarchical", "KMeans": "kmeans"}
    trained = {
        "trained_on": found[0].fillna(paper["dataset"]),
        "train_method": found[1].map(methods).fillna("none"),
        "train_factors": found[2],
    }
    paper = paper.assign(**{key: text.where(found[2].notna(), "") for key, text in trained.items()})
    return paper[PAPER_COLUMNS]


# ---------------------------------------------------------------- the author's result rows

METRICS = ["ndcg@10", "mrr@10", "map@100", "recall@10"]
RUN_COLUMNS = [
    "run", *TRAINING, "version", "engine", "dataset", "pool_method", "pool_factor",
    *METRICS, "recall@100", "query_length", "document_length", "sweep",
]  # fmt: skip
_RUN_FILES = {"nanobeir_runs": {"engine": "exact"}, "beir_runs": {"engine": "plaid"}}


def read_runs(folder: str | Path) -> pd.DataFrame:
    """Read the result rows that the paper's author published (``data/paper/runs``).

    One row per run, engine, data set (a key of `ROLES`), pool method and factor, columns
    `RUN_COLUMNS`. Metrics are 0–1. ``version`` is 2 for the second run of a training, else 1;
    training is "" for the baseline; lengths that are not known are missing, as is ``recall@100``
    under exact search. Unpooled rows stand once under each pool method.
    """
    runs = _read_csvs(folder, _RUN_FILES, "the author's rows")
    lengths = runs[["query_length", "document_length"]].astype("Int64")
    training, version = runs[TRAINING].fillna(""), runs["version"].fillna(1).astype(int)
    return runs.assign(**training, version=version, **lengths)[RUN_COLUMNS]


# ---------------------------------------------------------------- figures and tables

# Data set → (panel title, short name).
NAMES = {name: (name, name) for name in ROLES} | {"Average": ("Average of the five", "Average")}


@dataclass(frozen=True, eq=False)
class Exhibits:
    """The cells of all figures and tables, and the names of their data sets."""

    name: str  # "paper", or the name of the folder of rows
    frame: pd.DataFrame  # columns PAPER_COLUMNS; of a run as from `fill`
    names: dict[str, tuple[str, str]]  # as `NAMES`
    note: str  # what the numbers are, in one line
    is_paper: bool = False
    roles: Roles = BUNDLED
    rows: pd.DataFrame | None = None  # a run's result rows
    per_query: pd.DataFrame | None = None  # and its values, raw and unit-length means
    unit: Exhibits | None = None  # the run with means of unit length, where it has any

    def rename(self, label: str) -> str:
        """A model's label with the short name of the collection that it was trained on."""
        for dataset in TRAINED:
            label = label.replace(f" {dataset} ", f" {self.names[dataset][1]} ")
        return label

    def rows_of(self, exhibit: str) -> pd.DataFrame:
        """A run's rows of the engine of one figure or table; none of the paper's numbers."""
        if self.rows is None:
            return pd.DataFrame()
        return self.rows[self.rows["engine"] == ENGINE[exhibit]]

    def note_on(self, exhibit: str) -> str:
        """The note on the engine of one figure or table."""
        part = self.rows_of(exhibit)
        return self.note if part.empty else _note(part, self.name)


def holds_paper(folder: str | Path) -> bool:
    """Whether `folder` holds the paper's CSVs."""
    return (Path(folder) / "figure1.csv").is_file()


def read_source(folder: str | Path) -> Exhibits:
    """Read `folder`: the paper's CSVs or a run's result rows, see `rows_source`."""
    if not holds_paper(folder):
        return rows_source(read_rows(folder), Path(folder).name, read_per_query(folder))
    note = "The paper's numbers (S. Josef, LIR @ ECIR 2026, CC BY 4.0)"
    return Exhibits("paper", read_paper(folder), NAMES, note, is_paper=True)


def rows_source(rows: pd.DataFrame, name: str, per_query: pd.DataFrame | None = None) -> Exhibits:
    """A run's result rows as exhibits: every cell that the paper prints, NaN where not run.

    `rows` may be any part of the grid; without the unpooled baseline percentages are NaN. `name`
    is the run's where the rows have no profile. Exact search is that of raw means, as in the paper;
    `unit` has that of unit-length ones.
    """
    roles, paper = roles_of(rows), read_paper(from_root("data/paper"))
    played = {d: (f"{c} (in {d}’s role)", c) for d, c in roles.exact.items()}
    names = NAMES if roles.own else NAMES | played

    def exhibits(part: pd.DataFrame, unit: Exhibits | None = None) -> Exhibits:
        frame, note = fill(paper, part, roles), _note(part, name)
        return Exhibits(name, frame, names, note, False, roles, part, per_query, unit)

    unit = exhibits(searched(rows, True)) if rows["renormalized"].any() else None
    return exhibits(searched(rows), unit)


def main_variants(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` in one variant of each pool method, the one that most models have."""
    variants = {method: default_variant(rows, method) for method in VARIANTS}
    return rows[rows["pool_variant"] == rows["pool_method"].map(variants)]


def fill(cells: pd.DataFrame, rows: pd.DataFrame, roles: Roles) -> pd.DataFrame:
    """`cells`, columns `PAPER_COLUMNS`, with our values; several seeds are averaged.

    Adds ``vectors``, the mean number per document.
    """
    names = {"ndcg@10": "ndcg", "relative_ndcg@10": "relative", "vectors_per_document": "vectors"}
    rows = relative_ndcg(main_variants(rows), partial=True).rename(columns=names)
    values = list(names.values())
    # Released checkpoints and the baseline at other lengths are in no figure.
    # The paper trains with raw means.
    known = (rows["train_collection"] != "") | is_baseline(rows)
    keys = ["train_collection", *TRAINING[1:], "collection", "engine", *CELL[3:]]
    means = rows[known & ~rows["train_renormalized"]].groupby(keys)[values].mean().astype(float)
    places = cells.assign(
        train_collection=cells["trained_on"].map(roles.training).fillna(""),
        collection=roles.collections(cells),
        pool_method=cells["pool_method"].mask(cells["pool_factor"] == 1, "none"),
    )[keys]
    cells = cells.assign(**places.join(means, on=keys)[values])

    average = cells.groupby(["exhibit", *CELL[2:]])["relative"]  # NaN where one is lacking
    average = average.transform("sum", min_count=len(ROLES)) / len(ROLES)
    baseline, table = cells["label"] == "Baseline", cells["exhibit"] == "table2"
    # Table 2 prints differences to the baseline at the same factor.
    base = cells.assign(base=cells["ndcg"].where(baseline & table))
    base = base.groupby(["exhibit", "dataset", "pool_factor"])["base"].transform("first")
    return cells.assign(
        relative=cells["relative"].mask(cells["dataset"] == "Average", average),
        delta=(cells["ndcg"] - base).mask(baseline),
    )


def _note(rows: pd.DataFrame, name: str) -> str:
    """What rows are, in one line: profile, queries, seeds, missing baselines."""
    note = f"Run “{' + '.join(sorted(set(rows['profile']) - {''})) or name}”"
    pooled = rows[(rows["pool_method"] != "none") & (rows["engine"] == "exact")]
    if pooled["renormalized"].any():
        note += ", means scaled to unit length"
    queries = rows["queries"].dropna()
    if len(queries):
        number = "–".join(map(str, sorted({queries.min(), queries.max()})))
        note += f", {number} test queries per collection"
    trained = (rows["train_collection"] != "") & ~rows["train_collection"].str.startswith(RELEASED)
    seeds = rows.loc[trained, "seed"].nunique()
    note += f", {seeds} training seed{'s' if seeds > 1 else ''}" if seeds else ""
    note += "; where a model has more than one, their mean" if seeds > 1 else ""
    gaps = rows[relative_ndcg(rows, partial=True)["relative_ndcg@10"].isna()]
    lacking = sorted(set(gaps["collection"] + " (" + gaps["engine"] + ")"))
    return note + (f"; no unpooled baseline yet on {', '.join(lacking)}" if lacking else "")


def missing(source: Exhibits, exhibit: str) -> str:
    """What `exhibit` should show and `source` did not run, as one line; "" if nothing."""
    frame = source.frame[source.frame["exhibit"] == exhibit].query("dataset != 'Average'")
    parts, gaps = [], {}
    for dataset, cells in frame.groupby("dataset", sort=False):
        short = source.names[dataset][1]
        if cells["relative"].isna().all():
            parts.append(f"{short} (everything)")
            continue
        for (label, method), curve in cells.groupby(["label", "pool_method"], sort=False):
            lacking = curve.loc[curve["relative"].isna(), "pool_factor"].map(str)
            name = source.rename(label) + (f" {method}" if label == "Baseline" else "")
            name += f" at PF {', '.join(lacking)}" if len(lacking) < len(curve) else ""
            if len(lacking):
                gaps.setdefault(name, []).append(short)
    for name, places in gaps.items():
        everywhere = len(places) == frame["dataset"].nunique()
        parts.append(name if everywhere else f"{name} on {', '.join(places)}")
    return "; ".join(parts)


# ---------------------------------------------------------------- value by value


def compare_with_paper(paper: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Every value that the paper prints (`read_paper`) beside that of ``nano:``/``beir:`` rows.

    One row per printed value (a table's cell prints up to three), the unpooled baselines first,
    columns `COMPARISON_COLUMNS`. ``quantity`` is the unit of ``paper``, ``ours``, ``difference``
    (ours − paper) and ``tolerance``; ``points`` is the difference in NDCG points; values that were
    not run are NaN. Rows of other collections than the paper's are refused.
    """
    roles = roles_of(rows)
    if not roles.own:
        found = ", ".join(sorted(set(rows["collection"])))
        raise UserError(
            f"these rows are of other collections than the paper's ({found}): expected rows of "
            "nano: and beir: collections (profile paper)."
        )
    keys = [*CELL, "engine"]
    long = paper.melt(keys, QUANTITIES, "quantity", "paper", ignore_index=False)
    long["ours"] = fill(paper, rows, roles).melt(keys, QUANTITIES)["value"].to_numpy()
    long["collection"] = roles.collections(long)
    long = long.dropna(subset=["paper"]).sort_index(kind="stable")
    return _judge(pd.concat([_unpooled(rows), long], ignore_index=True))[COMPARISON_COLUMNS]


def _unpooled(rows: pd.DataFrame, model: str = BASELINE) -> pd.DataFrame:
    """The paper's unpooled baselines beside those of `model`, as rows of the comparison."""
    chosen = rows[(rows["model"] == model) & (rows["pool_method"] == "none")]
    frame = pd.DataFrame(_UNPOOLED, columns=["engine", "dataset", "paper"])
    cell = {"exhibit": "baselines", "label": "Baseline", "pool_method": "none", "pool_factor": 1}
    frame = frame.assign(**cell, quantity="ndcg", collection=roles_of(rows).collections(frame))
    keys = ["collection", "engine"]
    ours = chosen.set_index(keys)["ndcg@10"].reindex(pd.MultiIndex.from_frame(frame[keys]))
    return frame.assign(ours=ours.to_numpy(float))


def _judge(frame: pd.DataFrame) -> pd.DataFrame:
    point = _point(frame)
    # Half of the last digit; Figures 1 and 4 were drawn from unrounded values.
    unrounded = frame["exhibit"].isin(["figure1", "figure4"])
    percent = np.where(unrounded, 0.0001, 0.05)
    printed = np.where(frame["quantity"] == "relative", percent, 0.0005)
    tolerance = frame["engine"].map(POINTS) * point + printed
    difference = frame["ours"] - frame["paper"]
    numbers = {"difference": difference, "tolerance": tolerance, "points": difference / point}
    return frame.assign(**numbers, verdict=_verdict(difference, tolerance))


def _point(frame: pd.DataFrame) -> np.ndarray:
    """One NDCG point in each line's unit; in percent it is of the paper's baseline."""
    percent = {(engine, dataset): 100 * POINT / value for engine, dataset, value in _UNPOOLED}
    percent["exact", "Average"] = np.mean([percent["exact", d] for d in PAPER_BASELINES["exact"]])
    points = [percent[pair] for pair in zip(frame["engine"], frame["dataset"], strict=True)]
    return np.where(frame["quantity"] == "relative", points, POINT)


def _verdict(difference: pd.Series, tolerance: pd.Series) -> np.ndarray:
    # 1e-9: a decimal number on the edge must not fall off by its binary form.
    verdict = np.where(difference.abs() <= tolerance + 1e-9, INSIDE, OUTSIDE)
    return np.where(difference.isna(), NOT_RUN, verdict)


def by_definition(comparison: pd.DataFrame) -> pd.Series:
    """Mask of the values that are the baseline's own 100 %."""
    unpooled = (comparison["label"] == "Baseline") & (comparison["pool_factor"] == 1)
    return unpooled & (comparison["quantity"] == "relative") & comparison["ours"].notna()


def comparison_summary(comparison: pd.DataFrame) -> pd.DataFrame:
    """Counts of verdicts and sizes of differences per figure or table, and over all ("all").

    ``by definition`` counts among those inside; ``mean`` (of absolute differences), ``largest``
    (with its sign) and its place, ``where``, leave them out and are in NDCG points.
    """
    both = pd.concat([comparison, comparison.assign(exhibit="all")], ignore_index=True)
    trivial = by_definition(both)
    counts = pd.crosstab(both["exhibit"], both["verdict"])
    verdicts = [INSIDE, OUTSIDE, NOT_RUN]
    counts = counts.reindex(both["exhibit"].unique(), columns=verdicts, fill_value=0)
    counts.insert(0, "values", counts.sum(axis=1))
    measured = both[~trivial & both["points"].notna()]
    sizes = measured["points"].abs().groupby(measured["exhibit"])
    worst = measured.loc[sizes.idxmax()].set_index("exhibit")
    pooled = worst["pool_method"] + " PF" + worst["pool_factor"].astype(str)
    counts["by definition"] = trivial.groupby(both["exhibit"]).sum()
    counts["mean"], counts["largest"] = sizes.mean(), worst["points"]
    counts["where"] = worst["dataset"] + ", " + worst["label"] + ", " + pooled
    return counts.reset_index()


def compare_released(paper: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The paper's kmeans PF1-6 models beside the checkpoints that its authors released.

    Training is theirs on both sides: this judges the evaluation. The frame is
    `compare_with_paper`'s, of these models only; empty where no checkpoint was measured. The
    paper's SciFact values average two runs, of which the checkpoint is one: there the tolerance is
    wider by `half_spread`.
    """
    theirs = rows["train_collection"].str.startswith(RELEASED)
    if not theirs.any():
        return pd.DataFrame(columns=COMPARISON_COLUMNS)
    named = "beir:" + rows["train_collection"].str.removeprefix(RELEASED)
    stand_in = rows.assign(train_collection=named.where(theirs, ""))
    found = compare_with_paper(paper, stand_in[theirs | (rows["model"] == BASELINE)])
    own = found["label"].isin([f"FT {dataset} KMeans PF1-6" for dataset in TRAINED])
    found = found[own].reset_index(drop=True)
    wider = found["tolerance"] + half_spread(found)
    return found.assign(tolerance=wider, verdict=_verdict(found["difference"], wider))


def half_spread(comparison: pd.DataFrame) -> np.ndarray:
    """How far each of two averaged runs lies from their mean, which the paper prints.

    By row of the comparison of released kmeans PF1-6 models, in the row's unit, from the author's
    rows: half of the distance between his two SciFact runs; 0 for FiQA, which was trained once.
    """
    runs = read_runs(from_root("data/paper/runs"))
    cell = ["engine", "dataset", "trained_on", "train_method", "pool_method", "pool_factor"]
    ndcg = runs[runs["train_factors"] == "1-6"].groupby(cell)["ndcg@10"]
    source = comparison["label"].str.split().str[1]
    places = comparison.assign(trained_on=source, train_method="kmeans")[cell]
    half = ((ndcg.max() - ndcg.min()) / 2).reindex(pd.MultiIndex.from_frame(places))
    return half.to_numpy() / POINT * _point(comparison)


# ---------------------------------------------------------------- showing

NOTE = (
    f"Inside: ours differs from the printed value by at most {POINTS['exact']:g} NDCG point (.01 "
    f"NDCG@10) under exact search, {POINTS['plaid']:g} points under PLAID, plus half of the last "
    "printed digit. Percentages are converted with the paper's unpooled baseline: where that is "
    "low (SCIDOCS under PLAID: .164), a point is many percent and “inside” says little. The mean "
    "is of absolute differences, ours − paper, in points, without what is 100 % *by definition* "
    "(the baseline relative to itself). Tables print up to three values per cell."
)


def variants_note(rows: pd.DataFrame) -> str:
    """Which variants of the pool methods our values were read in, in a sentence."""
    kmeans, tree = (default_variant(rows, method) for method in ("kmeans", "hierarchical"))
    return (
        f"Ours are read in the variants that most models have: kmeans `{kmeans}`, hierarchical "
        f"`{tree}`. The paper used scikit-learn's kmeans (`sklearn`) and Ward on the square matrix "
        "of cosine distances (`paper`); others group tokens differently."
    )


def markdown(frame: pd.DataFrame, decimals: int = 3) -> str:
    """A frame as a Markdown table, NaN as "not run"."""
    shown = frame.astype(object).where(frame.notna(), None)
    return shown.to_markdown(index=False, floatfmt=f"z.{decimals}f", missingval=NOT_RUN) + "\n"


# Document/query length → the model measured so by the profile `paper`.
_BASELINES = {
    "300/48": BASELINE, "180/48": f"{BASELINE}-d180-q48", "180/32": f"{BASELINE}-d180-q32",
}  # fmt: skip


def compare_lengths(rows: pd.DataFrame) -> pd.DataFrame:
    """The unpooled baseline on NanoBEIR at three document/query lengths, beside the paper's."""
    table = _unpooled(rows).query("engine == 'exact'")[["dataset", "paper"]]
    ours = {lengths: _unpooled(rows, model)["ours"] for lengths, model in _BASELINES.items()}
    gaps = {f"{lengths} − paper": values - table["paper"] for lengths, values in ours.items()}
    return table.assign(**ours, **gaps)


def comparison_markdown(comparison: pd.DataFrame, rows: pd.DataFrame, paper: pd.DataFrame) -> str:
    """Everything in one document: summary, lengths, checkpoints, then all values."""
    lengths = (
        "Unpooled NDCG@10 under exact search, documents/queries cut at as many tokens. The paper "
        "says 300/48; its author's result files suggest 180/48 or 180/32 for NanoBEIR (300 for "
        "BEIR). The closest is the likeliest."
    )
    checkpoints = (
        "The authors' two checkpoints, measured here, beside the paper's values of its kmeans "
        "PF1-6 models: this judges the evaluation alone. The paper's SciFact values average two "
        "runs, of which the checkpoint is one: there the tolerance is wider by half of the "
        "distance between the author's two runs in that cell."
    )
    sections = {
        "# The paper's values and ours": f"{NOTE}\n\n{variants_note(rows)}\n",
        "## Summary": markdown(comparison_summary(comparison), 2),
        "## The baseline's lengths": f"{lengths}\n\n{markdown(compare_lengths(rows), 4)}",
    }
    released = compare_released(paper, rows)
    if len(released):
        summary = markdown(comparison_summary(released), 2)
        sections["## The released checkpoints"] = f"{checkpoints}\n\n{summary}"
    for exhibit, values in comparison.groupby("exhibit", sort=False):
        title = re.sub(r"(\d)$", r" \1", exhibit).capitalize()
        sections[f"## {title}"] = markdown(values.drop(columns=["exhibit", "engine"]))
    return "\n".join(f"{head}\n\n{text}" for head, text in sections.items())
