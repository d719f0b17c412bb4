"""The paper's Figures 1–4 and Tables 1–4, drawn from stored numbers: the paper's or a run's.

Takes a folder of ``data/``; gives PNG, SVG, CSV and Markdown. Both sources become one tidy frame
first, so the same code draws them. ``python -m l2p_utils.figures`` redraws everything.
"""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from l2p_utils.claims import check_claims, claims_table
from l2p_utils.files import UserError, atomic_path
from l2p_utils.results import (
    BASELINE,
    PAPER_COLUMNS,
    PAPER_EXHIBITS,
    POOL_FACTORS,
    ROLES,
    default_variant,
    find_models,
    has_rows,
    parse_label,
    read_paper,
    read_per_query,
    read_rows,
    relative_ndcg,
    series,
)

FIGURES, TABLES = PAPER_EXHIBITS[:4], PAPER_EXHIBITS[4:]
TRAINED = ("SciFact", "FiQA")
DPI = 220
KINDS = ("png", "svg")

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
PANELS = {
    "figure1": [["FiQA", "NFCorpus", "SCIDOCS"], ["SciFact", "Touche", "Average"]],
    "figure2": [["SciFact", "FiQA"]],
    "figure3": [["SciFact", "FiQA"]],
    "figure4": [["SciFact", "FiQA"], ["NFCorpus", "SCIDOCS"]],
}
# The paper's axes; 68 and not 70 in Figure 4, since one point (69.68) lies below the paper's axis.
PAPER_LIMITS = {
    "figure1": (20, 104),
    "figure2": (0, 106),
    "figure3": (70, 104),
    "figure4": (68, 104),
    "overview": (0, 106),
}
TITLES = {
    "figure1": "Figure 1. Pooling at inference only: the baseline under three pool methods",
    "figure2": "Figure 2. Span pooling: the baseline and models trained with one factor or all",
    "figure3": "Figure 3. Models trained for all factors (PF1-6), each pooled by its own method",
    "figure4": "Figure 4. Search through a PLAID index: the baseline and PF1-6 models",
    "table1": "Table 1. Across methods: models trained with each method, all pooled with span",
    "table2": "Table 2. Across collections: kmeans-trained models, kmeans pooling",
    "table3": "Table 3. Hierarchical pooling: models trained with one factor or with all",
    "table4": "Table 4. K-means pooling: models trained with one factor or with all",
    "overview": "NDCG@10 kept as documents shrink: k-means pooling on",
}
OWN = "each model is trained on its panel’s collection"
CAPTIONS = {
    "figure1": "Exact search.",
    "figure2": f"Exact search; {OWN}.",
    "figure3": f"Exact search; {OWN}; the baseline is pooled hierarchically.",
    "figure4": "PLAID search.",
    "overview": "Exact search.",
}

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
    """

    name: str
    frame: pd.DataFrame
    names: dict[str, tuple[str, str]]
    note: str
    vectors: pd.Series | None = None

    @property
    def is_paper(self) -> bool:
        """Whether these are the paper's own numbers."""
        return self.name == "paper"

    def rename(self, label: str) -> str:
        """A model's label with this source's name for the collection that it was trained on."""
        for dataset in TRAINED:
            label = label.replace(f" {dataset} ", f" {self.names[dataset][1]} ")
        return label


def read_source(folder: str | Path) -> Source:
    """Read `folder`: the paper's CSVs (it has a ``figure1.csv``) or a run's result rows.

    Raises
    ------
    UserError
        When it holds neither.
    """
    folder = Path(folder)
    if _holds_paper(folder):
        return paper_source(read_paper(folder))
    return rows_source(read_rows(folder), folder.name)


def paper_source(frame: pd.DataFrame) -> Source:
    """The paper's numbers as a source."""
    names = {dataset: (dataset, dataset) for dataset in [*ROLES, "Average"]}
    names["Average"] = ("Average of the five", "Average")
    return Source(
        "paper", frame, names, "The paper's numbers (S. Josef, LIR @ ECIR 2026, CC BY 4.0)"
    )


def rows_source(rows: pd.DataFrame, name: str, roles: dict[str, str] | None = None) -> Source:
    """A run's result rows as a source: every exhibit's cells, NaN where one was not run.

    Parameters
    ----------
    rows
        Result rows (see `results.read_rows`), among them the unpooled baseline.
    name
        What to call the run in the figures' notes.
    roles
        The collection that plays each of the paper's data sets; default `ROLES`.
    """
    roles = ROLES if roles is None else roles
    rows = relative_ndcg(rows)
    frames = [_exhibit_rows(rows, exhibit, roles) for exhibit in CONTENTS]
    names = {d: (f"{c} (in {d}’s role)", c) for d, c in roles.items()}
    names["Average"] = ("Average of the five", "Average")
    return Source(
        name, pd.concat(frames, ignore_index=True), names, _note(rows, name), _vectors(rows, roles)
    )


def _note(rows: pd.DataFrame, name: str) -> str:
    """What a run's numbers are, in one line: profile, queries, seeds."""
    note = f"Run “{' + '.join(sorted(set(rows['profile']) - {''})) or name}”"
    for engine, part in rows.dropna(subset=["queries"]).groupby("engine"):  # exact before plaid
        few, many = part["queries"].min(), part["queries"].max()
        number = f"{few}–{many}" if few < many else f"{few}"
        exact = engine == "exact"
        note += f", {number} test queries a collection" if exact else f" (PLAID: {number})"
    seeds = rows.loc[rows["model"] != BASELINE, "seed"].nunique()
    return note + f", {seeds} training seed{'s' if seeds > 1 else ''}" if seeds else note


def _exhibit_rows(rows: pd.DataFrame, exhibit: str, roles: dict[str, str]) -> pd.DataFrame:
    """All cells of one exhibit: the grid of `CONTENTS`, filled where rows exist."""
    tidy = []
    for dataset, lines in CONTENTS[exhibit].items():
        curves = [_curve(rows, exhibit, dataset, *line, roles) for line in lines]
        first = curves[0]["ndcg"].to_numpy()  # the baseline at the same factors
        for curve in curves:
            trained = curve["label"].iloc[0] != "Baseline"
            delta = curve["ndcg"] - first if exhibit == "table2" and trained else np.nan
            tidy.append(curve.assign(delta=delta))
    frame = pd.concat(tidy, ignore_index=True)
    if exhibit == "figure1":
        frame = pd.concat([frame, _average(frame)], ignore_index=True)
    return frame.reindex(columns=PAPER_COLUMNS)


def _curve(rows, exhibit, dataset, label, pool_method, roles) -> pd.DataFrame:
    """One model's values at the exhibit's factors; several seeds are averaged, as in the paper."""
    trained = parse_label(label, dataset)
    names = find_models(rows, roles.get(trained[0], ""), *trained[1:])
    factors = FACTORS.get(exhibit, POOL_FACTORS)
    where = (roles[dataset], pool_method, ENGINE.get(exhibit, "exact"))
    # Settled on all rows, so that every model is read in the same variant.
    variant = default_variant(rows, pool_method)

    def mean(value: str) -> np.ndarray:
        curves = [series(rows, name, *where, variant, value, factors) for name in names]
        return np.mean(curves, axis=0) if curves else np.full(len(factors), np.nan)

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


def _vectors(rows: pd.DataFrame, roles: dict[str, str]) -> pd.Series | None:
    try:
        return series(rows, "baseline", roles["SciFact"], "kmeans", value="vectors_per_document")
    except KeyError:
        return None


# ---------------------------------------------------------------- drawing

# Okabe and Ito's colours (2008), which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E08A00", "#009E73", "#CC79A7"
SKY, GREY, PURPLE = "#56B4E9", "#555555", "#7B3294"
COLOURS = {"hierarchical": BLUE, "kmeans": ORANGE, "span": GREEN}
MARKERS = {"hierarchical": "o", "kmeans": "^", "span": "D"}
METHOD_NAMES = {"hierarchical": "hierarchical", "kmeans": "kmeans", "span": "span"}
SPAN_STYLES = {
    "FT PF1": dict(color=GREY, linestyle=":", marker="X"),
    "FT Span PF2": dict(color=SKY, linestyle="-", marker="v"),
    "FT Span PF3": dict(color=PURPLE, linestyle="-", marker="P"),
}
STYLE = {
    **sns.axes_style("whitegrid"),
    **sns.plotting_context("notebook", font_scale=1.0),
    "grid.color": "#E6E6E6",
    "axes.edgecolor": "#999999",
    "font.sans-serif": ["DejaVu Sans"],  # comes with Matplotlib: the same letters everywhere
    "lines.linewidth": 2.0,
    "lines.markersize": 6.5,
    "svg.hashsalt": "learn-to-pool",
}


class Sheet(Figure):
    """A figure outside pyplot's state: shows itself in a notebook, and the same every time."""

    def _repr_png_(self) -> bytes:
        return render(self, "png", dpi=110)


def render(figure: Figure, kind: str, dpi: int = DPI) -> bytes:
    """A figure as the bytes of a PNG or SVG file, the same every time."""
    buffer = BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context(STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def _style(label: str, pool_method: str) -> dict:
    """How a line looks: colour by method, baselines dashed, trained models solid with squares."""
    if label == "Baseline":
        style = dict(linestyle=(0, (4, 2)), marker=MARKERS[pool_method], markersize=5.5)
        return style | dict(color=COLOURS[pool_method], linewidth=1.7, alpha=0.9)
    if label in SPAN_STYLES:
        return SPAN_STYLES[label]
    colour = PINK if label == "FT FiQA KMeans PF1-6" else COLOURS[pool_method]
    return dict(color=colour, linestyle="-", marker="s")


def draw(source: Source, exhibit: str) -> Sheet:
    """Draw one of the paper's figures, or the overview, from `source`.

    Parameters
    ----------
    exhibit
        "figure1" … "figure4", or "overview".

    Raises
    ------
    UserError
        When there is no such figure.
    """
    if exhibit == "overview":
        return draw_overview(source)
    if exhibit not in PANELS:
        raise UserError(f"no figure {exhibit!r}: expected one of {[*PANELS, 'overview']}.")
    panels = PANELS[exhibit]
    rows, columns = len(panels), len(panels[0])
    with matplotlib.rc_context(STYLE):
        size = (4.1 * columns + 0.4, 3.3 * rows + 0.3) if columns > 2 else (10.2, 3.9 * rows + 0.3)
        figure = Sheet(figsize=size, dpi=DPI, layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        frame = source.frame[source.frame["exhibit"] == exhibit]
        handles: dict[str, object] = {}
        for axis, dataset in zip(axes.flat, itertools.chain(*panels), strict=True):
            handles |= _panel(axis, source, frame[frame["dataset"] == dataset], dataset, exhibit)
        _furnish(figure, axes, source, exhibit, handles)
    return figure


def _panel(axis: Axes, source: Source, frame: pd.DataFrame, dataset: str, exhibit: str) -> dict:
    """Draw one data set's curves; returns legend entries by label."""
    axis.axhline(100, color="#333333", linestyle="--", linewidth=1, zorder=1)
    handles = {}
    for (label, method), curve in frame.groupby(["label", "pool_method"], sort=False):
        curve = curve.dropna(subset=["relative"]).sort_values("pool_factor")
        if curve.empty:
            continue
        name = _legend_name(source, exhibit, label, method)
        (handles[name],) = axis.plot(
            curve["pool_factor"], curve["relative"], zorder=3, **_style(label, method)
        )
    if not handles:
        blank = {"facecolor": "white", "edgecolor": "none"}  # hides the line at 100 behind it
        place = {"transform": axis.transAxes, "ha": "center", "va": "center"}
        axis.text(0.5, 0.5, "not run", color="#777777", bbox=blank, **place)
    axis.set_title(_panel_name(source, dataset, exhibit), fontsize=11.5)
    axis.tick_params(labelbottom=True)
    sns.despine(ax=axis)
    return handles


def _panel_name(source: Source, dataset: str, exhibit: str) -> str:
    if source.is_paper and exhibit == "figure1" and dataset in ("FiQA", "Touche"):
        return {"FiQA": "FiQA2018", "Touche": "Touche2020"}[dataset]  # as printed there
    return source.names[dataset][0]


def _legend_name(source: Source, exhibit: str, label: str, method: str) -> str:
    if exhibit == "figure1":
        return METHOD_NAMES[method]
    if exhibit == "figure2":
        return source.rename(label)
    # Figure 4 prints the training set; where that is the panel's own it is said once for both.
    if exhibit == "figure4" and "KMeans" not in label:
        label = label.replace(" SciFact ", " ").replace(" FiQA ", " ")
        label = label if label == "Baseline" else f"{label} (own collection)"
    name = source.rename(label)
    return f"{name}, {METHOD_NAMES[method]}" if label == "Baseline" else name


def _limits(source: Source, exhibit: str, frame: pd.DataFrame) -> tuple[float, float]:
    if source.is_paper:
        return PAPER_LIMITS[exhibit]
    values = [*frame["relative"].dropna(), 100.0]
    # Whole fives around the data, with room for the markers.
    return 5 * np.floor((min(values) - 1) / 5), 5 * np.ceil((max(values) + 1) / 5)


def _furnish(figure: Figure, axes: np.ndarray, source: Source, exhibit: str, handles: dict) -> None:
    """Title, axes, one legend below all panels, and under it what was not run."""
    frame = source.frame[source.frame["exhibit"] == exhibit]
    axes[0, 0].set_ylim(*_limits(source, exhibit, frame))
    axes[0, 0].set_xticks(POOL_FACTORS)
    axes[0, 0].yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    for axis in axes[:, 0]:
        axis.set_ylabel("Relative NDCG@10 (%)")
    for axis in axes[-1]:
        axis.set_xlabel("Pool factor")
    _foot(figure, TITLES[exhibit], _notes(source, exhibit), handles)


def _notes(source: Source, exhibit: str) -> list[str]:
    """Small print: what the numbers are, and what was not run."""
    gaps = missing(source, exhibit)
    return [f"{source.note}. {CAPTIONS[exhibit]}", *([f"Not run: {gaps}."] if gaps else [])]


def _foot(figure: Figure, title: str, notes: list[str], handles: dict) -> None:
    """Add a title above, and below the panels a strip for the legend and the notes.

    The strip makes the figure higher, so that the panels keep their size whatever it holds.
    """
    width, height = figure.get_size_inches()
    notes = list(itertools.chain(*(textwrap.wrap(note, int(width * 16)) for note in notes)))
    columns = len(handles) if len(handles) <= 5 else 3
    entries = -(-len(handles) // max(columns, 1))  # lines of the legend
    small = 0.06 + 0.155 * len(notes)  # inches
    large = 0.1 + 0.25 * entries if handles else 0.0
    total = height + small + large
    figure.set_size_inches(width, total)
    bottom = (small + large) / total
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, rect=(0, bottom, 1, 1 - bottom))
    text = textwrap.fill(title, int(width * 8.5))
    heading = figure.suptitle(text, fontsize=13, fontweight="bold", x=0.012, ha="left")
    strip = [figure.text(0.012, small / total, "\n".join(notes), va="top", fontsize=8.5)]
    strip[0].set_color("#555555")
    if handles:
        strip.append(
            figure.legend(
                handles.values(), handles, loc="lower center", ncols=columns, frameon=False,
                bbox_to_anchor=(0.5, small / total), borderaxespad=0, fontsize=10.5,
                handlelength=2.8, columnspacing=1.6,
            )
        )  # fmt: skip
    for artist in strip:
        artist.set_in_layout(False)
    _freeze(figure, heading)


def _freeze(figure: Figure, heading: Text) -> None:
    """Lay out once and round: the solver's last digits differ from one process to the next.

    At the resolution of the files, since hinting makes text narrower at a lower one.
    """
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axis in figure.axes:
        axis.set_position([round(number, 4) for number in axis.get_position().bounds])
    heading.set_y(round(heading.get_position()[1], 4))


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


def draw_overview(source: Source) -> Sheet:
    """The project in one picture: baseline, FT PF1 and FT kmeans PF1-6 under kmeans pooling.

    Drawn from Table 4's cells (SciFact or the collection in its role). Where the source knows
    them, mean vectors a document stand under the pool factors.
    """
    frame = source.frame[(source.frame["exhibit"] == "table4")]
    wanted = {
        "FT KMeans PF1-6": "trained with pooling",
        "FT PF1": "trained without pooling",
        "Baseline": "baseline",
    }
    with matplotlib.rc_context(STYLE):
        figure = Sheet(figsize=(9.6, 4.6), dpi=DPI, layout="constrained")
        axis = figure.subplots()
        axis.axhline(100, color="#333333", linestyle="--", linewidth=1, zorder=1)
        ends = {}
        for label, text in wanted.items():
            curve = frame[frame["label"] == label].dropna(subset=["relative"])
            if len(curve):
                style = _style(label, "kmeans") | dict(linewidth=2.6, markersize=8)
                axis.plot(curve["pool_factor"], curve["relative"], zorder=3, **style)
                ends[text] = (curve["relative"].iloc[-1], style["color"])
        _finish_overview(axis, source, frame[frame["label"].isin(wanted)], ends)
        title = f"{TITLES['overview']} {source.names['SciFact'][1]}"
        _foot(figure, title, [f"{source.note}. {CAPTIONS['overview']}"], {})
    return figure


def _finish_overview(axis: Axes, source: Source, frame: pd.DataFrame, ends: dict) -> None:
    low, high = _limits(source, "overview", frame)
    axis.set_ylim(low, high)
    axis.set_xlim(0.8, 6.1)
    heights = _spread([end[0] for end in ends.values()], (high - low) * 0.07)
    beside = axis.get_yaxis_transform()  # x in parts of the axis, y in percent
    for (text, (y, colour)), height in zip(ends.items(), heights, strict=True):
        axis.text(
            1.015, height, f"{y:.1f} %  {text}", transform=beside, va="center", color=colour,
            fontsize=11, fontweight="bold",
        )  # fmt: skip
    axis.set_xticks(POOL_FACTORS, _ticks(source.vectors))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    unit = ", and mean vectors stored per document"
    axis.set_xlabel("Pool factor" + (unit if source.vectors is not None else ""))
    axis.set_ylabel("Relative NDCG@10\n(% of the unpooled baseline)")
    sns.despine(ax=axis)


def _ticks(vectors: pd.Series | None) -> list[str]:
    if vectors is None or vectors.isna().any():
        return [f"{factor}" for factor in POOL_FACTORS]
    return [f"{factor}\n{vectors[factor]:.0f} vectors" for factor in POOL_FACTORS]


def _spread(heights: list[float], gap: float) -> list[float]:
    """Move labels apart to at least `gap`, keeping their order, around where they were."""
    placed = np.array(heights, dtype=float)
    order = np.argsort(placed)
    for _ in range(200):
        for lower, upper in itertools.pairwise(order):
            overlap = gap - (placed[upper] - placed[lower])
            if overlap > 1e-6:
                placed[lower] -= overlap / 2
                placed[upper] += overlap / 2
    return list(placed)


# ---------------------------------------------------------------- tables


def table(source: Source, exhibit: str) -> pd.DataFrame:
    """One of the paper's tables, a model a line: ``PF1`` … columns of "NDCG@10 (relative %)".

    Table 2 adds the difference to the baseline at the same factor. "not run" where nothing is.

    Raises
    ------
    UserError
        When there is no such table.
    """
    if exhibit not in TABLES:
        raise UserError(f"no table {exhibit!r}: expected one of {TABLES}.")
    frame = source.frame[source.frame["exhibit"] == exhibit]
    lines = []
    for (dataset, label), cells in frame.groupby(["dataset", "label"], sort=False):
        where = {"Collection": source.names[dataset][1]} if exhibit == "table2" else {}
        texts = {f"PF{int(cell.pool_factor)}": _cell(cell) for cell in cells.itertuples()}
        lines.append({**where, "Model": source.rename(label), **texts})
    return pd.DataFrame(lines)


def _cell(cell) -> str:
    if np.isnan(cell.relative):
        return "not run"
    text = f"{cell.ndcg:.3f} ({cell.relative:.1f})"
    if np.isnan(cell.delta):
        return text
    # "+ 0.0" turns a negative zero into zero.
    return f"{text} {round(cell.delta, 3) + 0.0:+.3f}".replace("-", "−")


def table_values(source: Source, exhibit: str) -> pd.DataFrame:
    """A table's numbers, one a row, in the columns of ``data/paper/table*.csv``."""
    frame = source.frame[source.frame["exhibit"] == exhibit]
    frame = frame.rename(
        columns={"label": "model", "ndcg": "ndcg10", "relative": "relative_percent"}
    )
    columns = ["model", "pool_factor", "ndcg10", "relative_percent"]
    if exhibit == "table2":
        columns = ["dataset", *columns, "delta"]
        frame["dataset"] = [source.names[dataset][1] for dataset in frame["dataset"]]
    frame["model"] = [source.rename(label) for label in frame["model"]]
    decimals = {"ndcg10": 4, "relative_percent": 2, "delta": 4}  # one more than is printed
    return frame[columns].round(decimals)


def table_markdown(source: Source, exhibit: str) -> str:
    """A table as Markdown, with its title and what its cells hold."""
    where = "" if exhibit == "table2" else f" Collection: {source.names['SciFact'][0]}."
    cells = "Cells: NDCG@10 (percent of the unpooled baseline)"
    cells += ", then the difference to the baseline at the same factor." if where == "" else "."
    lines = [f"**{TITLES[exhibit]}.**", "", f"{source.note}.{where} {cells}", ""]
    wide = table(source, exhibit)
    lines.append("| " + " | ".join(wide.columns) + " |")
    lines.append("|" + "|".join(" --- " for _ in wide.columns) + "|")
    lines += ["| " + " | ".join(line) + " |" for line in wide.itertuples(index=False)]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- writing


def save(source: Source, exhibit: str, folder: str | Path) -> list[Path]:
    """Write one figure (PNG and SVG) or table (CSV and Markdown) of `source` into `folder`.

    Returns
    -------
    The two files written.
    """
    output = Path(folder)
    if exhibit not in TABLES:
        figure = draw(source, exhibit)
        return [_write(output / f"{exhibit}.{kind}", render(figure, kind)) for kind in KINDS]
    values = table_values(source, exhibit).to_csv(index=False, lineterminator="\n")
    return [
        _write(output / f"{exhibit}.csv", values.encode()),
        _write(output / f"{exhibit}.md", table_markdown(source, exhibit).encode()),
    ]


def draw_all(
    source_folder: str | Path, output_folder: str | Path, paper_folder: str | Path | None = None
) -> list[Path]:
    """Draw every figure and table of `source_folder` into `output_folder`.

    Parameters
    ----------
    paper_folder
        The paper's numbers, for the claims of a run; default: ``paper`` beside `source_folder`,
        else ``data/paper``. Without them no claims are written.

    Returns
    -------
    The files written: ``figure1.png``, ``figure1.svg`` …, ``overview``, ``table1.csv``,
    ``table1.md`` …; from result rows also ``claims.csv`` and ``claims.md``.
    """
    source, output = read_source(source_folder), Path(output_folder)
    files = []
    for exhibit in [*FIGURES, "overview", *TABLES]:
        files += save(source, exhibit, output)
    beside = (Path(source_folder).parent / "paper", Path("data/paper"))
    paper = next((p for p in (paper_folder, *beside) if p and _holds_paper(p)), None)
    if paper and not source.is_paper:
        files += _write_claims(Path(source_folder), Path(paper), output)
    return files


def _write_claims(folder: Path, paper: Path, output: Path) -> list[Path]:
    return save_claims(
        check_claims(read_rows(folder), read_per_query(folder), read_paper(paper)), output
    )


def save_claims(claims: pd.DataFrame, folder: str | Path) -> list[Path]:
    """Write the judged findings into `folder` as ``claims.csv`` and ``claims.md``."""
    output = Path(folder)
    # Four decimals: more would tell of nothing but floating-point order.
    csv = claims.round(4).to_csv(index=False, lineterminator="\n")
    return [
        _write(output / "claims.csv", csv.encode()),
        _write(output / "claims.md", claims_table(claims).encode()),
    ]


def _holds_paper(folder: str | Path) -> bool:
    return (Path(folder) / "figure1.csv").is_file()


def _write(path: Path, content: bytes) -> Path:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def sources(data: str | Path) -> Iterator[Path]:
    """Subfolders of `data` that hold rows or the paper's numbers, in order of name."""
    for folder in sorted(Path(data).iterdir()):
        if folder.is_dir() and (_holds_paper(folder) or has_rows(folder)):
            yield folder


def main(arguments: list[str] | None = None) -> None:
    """Redraw ``<out>/<name>/`` for every subfolder ``<data>/<name>/`` (``make figures``)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("figures"))
    given = parser.parse_args(arguments)
    if not given.data.is_dir():
        raise SystemExit(
            f"{given.data} is no folder: expected one such as data/, with data/paper/."
        )
    for folder in sources(given.data):
        files = draw_all(folder, given.out / folder.name)
        print(f"{given.out / folder.name}: {len(files)} files from {folder}")


if __name__ == "__main__":
    main()
