"""The paper's Figures 1–4 and Tables 1–4, drawn from stored numbers: the paper's or a run's.

Takes a folder of ``data/``; gives PNG, SVG, CSV and Markdown. Both sources become one tidy frame
first, so the same code draws them. ``python -m l2p_utils.figures`` redraws everything.
"""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Iterator
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
from l2p_utils.paper import (
    ENGINE,
    FIGURES,
    HUB_SUITES,
    INSIDE,
    NOT_RUN,
    OUTSIDE,
    PAPER_BASELINES,
    POINTS,
    TABLES,
    Exhibits,
    by_definition,
    compare_with_paper,
    comparison_markdown,
    holds_paper,
    missing,
    read_paper,
    read_source,
    roles_of,
)
from l2p_utils.results import POOL_FACTORS, has_rows, kept_ndcg, read_per_query, read_rows

DPI = 220
KINDS = ("png", "svg")

# ---------------------------------------------------------------- how each exhibit looks

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
SEARCH = {"exact": "Exact search", "plaid": "PLAID search"}
OWN = "; each model is trained on its panel’s collection"
CAPTIONS = {
    "figure2": OWN,
    "figure3": f"{OWN}; the baseline is pooled hierarchically",
}

# ---------------------------------------------------------------- drawing

# Okabe and Ito's colours (2008), which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E08A00", "#009E73", "#CC79A7"
SKY, GREY, PURPLE = "#56B4E9", "#555555", "#7B3294"
COLOURS = {"hierarchical": BLUE, "kmeans": ORANGE, "span": GREEN}
MARKERS = {"hierarchical": "o", "kmeans": "^", "span": "D"}
METHOD_NAMES = {"hierarchical": "hierarchical", "kmeans": "kmeans", "span": "span"}
# Trained models' squares fit into each other and wider lines lie below, so that of curves that run
# together all are seen: line width, marker size, and whether the marker is filled.
NESTED = {
    "span": (3.2, 10.6, False),
    "hierarchical": (2.1, 6.2, False),
    "kmeans": (1.5, 3.8, True),
    "FT FiQA KMeans PF1-6": (2.65, 8.4, False),
}
SPAN_STYLES = {
    "FT PF1": dict(color=GREY, linestyle=":", marker="X", zorder=3),
    "FT Span PF2": dict(color=SKY, linestyle="-", marker="v", zorder=3),
    "FT Span PF3": dict(color=PURPLE, linestyle="-", marker="P", zorder=3),
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


BAND = {"color": "#DDDDDD", "linewidth": 0, "zorder": 0}


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
        return style | dict(color=COLOURS[pool_method], linewidth=1.7, alpha=0.9, zorder=2.5)
    if label in SPAN_STYLES:
        return SPAN_STYLES[label]
    colour = PINK if label == "FT FiQA KMeans PF1-6" else COLOURS[pool_method]
    width, size, filled = NESTED.get(label, NESTED[pool_method])
    return dict(
        color=colour, linestyle="-", linewidth=width, marker="s", markersize=size,
        markerfacecolor=colour if filled else "none", markeredgewidth=1.6, zorder=3 - width / 10,
    )  # fmt: skip


def draw(source: Exhibits, exhibit: str) -> Sheet:
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


def _panel(axis: Axes, source: Exhibits, frame: pd.DataFrame, dataset: str, exhibit: str) -> dict:
    """Draw one data set's curves; returns legend entries by label."""
    axis.axhline(100, color="#333333", linestyle="--", linewidth=1, zorder=1)
    handles = {}
    for (label, method), curve in frame.groupby(["label", "pool_method"], sort=False):
        curve = curve.dropna(subset=["relative"]).sort_values("pool_factor")
        if curve.empty:
            continue
        name = _legend_name(source, exhibit, label, method)
        (handles[name],) = axis.plot(
            curve["pool_factor"], curve["relative"], **_style(label, method)
        )
    if not handles:
        blank = {"facecolor": "white", "edgecolor": "none"}  # hides the line at 100 behind it
        place = {"transform": axis.transAxes, "ha": "center", "va": "center"}
        axis.text(0.5, 0.5, "not run", color="#777777", bbox=blank, **place)
    axis.set_title(_panel_name(source, dataset, exhibit), fontsize=11.5)
    axis.tick_params(labelbottom=True)
    sns.despine(ax=axis)
    return handles


def _panel_name(source: Exhibits, dataset: str, exhibit: str) -> str:
    own = source.is_paper or source.suites
    if own and exhibit == "figure1" and dataset in ("FiQA", "Touche"):
        return {"FiQA": "FiQA2018", "Touche": "Touche2020"}[dataset]  # as printed there
    return source.names[dataset][0]


def _legend_name(source: Exhibits, exhibit: str, label: str, method: str) -> str:
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


def _limits(source: Exhibits, exhibit: str, frame: pd.DataFrame) -> tuple[float, float]:
    if source.is_paper:
        return PAPER_LIMITS[exhibit]
    values = [*frame["relative"].dropna(), 100.0]
    # Whole fives around the data, with room for the markers.
    return 5 * np.floor((min(values) - 1) / 5), 5 * np.ceil((max(values) + 1) / 5)


def _furnish(
    figure: Figure, axes: np.ndarray, source: Exhibits, exhibit: str, handles: dict
) -> None:
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


def _notes(source: Exhibits, exhibit: str) -> list[str]:
    """Small print: what the numbers are, and what was not run."""
    gaps = missing(source, exhibit) if exhibit != "overview" else ""
    note = f"{source.note_on(exhibit)}. {_caption(source, exhibit)}"
    return [note, *([f"Not run: {gaps}."] if gaps else [])]


def _caption(source: Exhibits, exhibit: str) -> str:
    """How an exhibit's numbers were measured, and on what where the name says more."""
    engine = ENGINE.get(exhibit, "exact")
    on = f" on {source.suites[engine]}" if source.suites else ""
    return f"{SEARCH[engine]}{on}{CAPTIONS.get(exhibit, '')}."


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


def draw_overview(source: Exhibits) -> Sheet:
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
                axis.plot(curve["pool_factor"], curve["relative"], **style)
                ends[text] = (curve["relative"].iloc[-1], style["color"])
        _finish_overview(axis, source, frame[frame["label"].isin(wanted)], ends)
        title = f"{TITLES['overview']} {source.names['SciFact'][1]}"
        _foot(figure, title, _notes(source, "overview"), {})
    return figure


def _finish_overview(axis: Axes, source: Exhibits, frame: pd.DataFrame, ends: dict) -> None:
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
    axis.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    ticks = _ticks(source.vectors)
    axis.set_xticks(POOL_FACTORS, ticks)
    unit = ", and mean vectors stored per document"
    axis.set_xlabel("Pool factor" + (unit if "\n" in ticks[0] else ""))
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


# ---------------------------------------------------------------- one model


def draw_kept(rows: pd.DataFrame) -> Sheet:
    """What one model keeps of its own unpooled NDCG@10: a panel a collection, a curve a method.

    Parameters
    ----------
    rows
        The model's rows of exact search, one variant a method; the unpooled ones among them.
    """
    curves, collections = kept_ndcg(rows), sorted(rows["collection"].unique())
    with matplotlib.rc_context(STYLE):
        figure, axes = _grid_of(len(collections))
        handles: dict[str, object] = {}
        for axis, collection in zip(axes, collections, strict=True):
            handles |= _kept(axis, curves[curves["collection"] == collection])
            axis.set_title(collection, fontsize=11.5)
        values = [*curves["kept"].dropna(), 100.0]
        axes[0].set_ylim(5 * np.floor((min(values) - 1) / 5), 5 * np.ceil((max(values) + 1) / 5))
        axes[0].set_xticks(sorted({1, *rows["pool_factor"]}))
        axes[0].yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
        title = f"{rows['model'].iloc[0]}: NDCG@10 kept at each pool factor"
        counts = "–".join(str(n) for n in sorted({rows["queries"].min(), rows["queries"].max()}))
        note = f"100 %: the same model unpooled. Exact search; {counts} test queries a collection."
        _foot(figure, title, [note], handles)
    return figure


def _grid_of(count: int) -> tuple[Sheet, list[Axes]]:
    """A figure of `count` panels on one scale, at most three side by side, and none empty."""
    columns = min(count, 2 if count == 4 else 3)
    lines = -(-count // columns)
    figure = Sheet(figsize=(max(3.3 * columns + 0.4, 6.4), 3.0 * lines), dpi=DPI)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count:columns]:
        axis.set_ylabel("NDCG@10\n(% of unpooled)")
    for axis in axes[max(0, count - columns) : count]:  # nothing below them
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("Pool factor")
    return figure, list(axes[:count])


def _kept(axis: Axes, curves: pd.DataFrame) -> dict[str, object]:
    """Draw one collection's curves; returns legend entries by label."""
    axis.axhline(100, color="#333333", linestyle="--", linewidth=1, zorder=1)
    handles = {}
    for method, colour in COLOURS.items():
        curve = curves[curves["pool_method"] == method].dropna(subset=["kept"])
        if len(curve):
            look = {"color": colour, "marker": MARKERS[method]}
            (handles[method],) = axis.plot(curve["pool_factor"], curve["kept"], **look)
    if not handles:
        blank = {"facecolor": "white", "edgecolor": "none"}  # hides the line at 100 behind it
        place = {"transform": axis.transAxes, "ha": "center", "va": "center"}
        axis.text(0.5, 0.5, "not run", color="#777777", bbox=blank, **place)
    sns.despine(ax=axis)
    return handles


# ---------------------------------------------------------------- the paper against ours


def draw_comparison(comparison: pd.DataFrame) -> Sheet:
    """The paper's values against ours: exact search on the left, PLAID on the right.

    Above, ours over the paper's on one scale; below, what they differ by, since the band of the
    tolerance is narrow on the whole scale. Everything in NDCG points; percentages count as that
    part of the paper's unpooled baseline, a table's cell once.

    Parameters
    ----------
    comparison
        From `comparison.compare_with_paper`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Sheet(figsize=(10.6, 8.0), dpi=DPI, layout="constrained")
        axes = figure.subplots(2, 2, sharex="col", height_ratios=(1.5, 1))
        handles: dict[str, object] = {}
        notes = []
        for column, (engine, suite) in enumerate(HUB_SUITES.items()):
            chosen = comparison[comparison["engine"] == engine]
            dots = _dots(chosen)
            handles |= _compared(axes[0, column], axes[1, column], dots, engine)
            axes[0, column].set_title(f"{SEARCH[engine]}, {suite[1]}", fontsize=11.5)
            notes.append(f"{SEARCH[engine]}: {_verdicts(chosen)}.")
        axes[0, 0].set_ylabel("Ours (NDCG@10 × 100)")
        axes[1, 0].set_ylabel("Ours − paper (NDCG points)")
        band = "Shaded: the tolerance, ± {exact:g} point and ± {plaid:g} points".format(**POINTS)
        notes += [
            f"{band}. Filled: inside; open: outside.",
            "Counted but not drawn: differences (Table 2), averages of data sets (Figure 1), the "
            "baseline’s own 100 %.",
        ]
        _foot(figure, "The paper’s values and ours", notes, handles)
    return figure


def _verdicts(values: pd.DataFrame) -> str:
    counts = values["verdict"].value_counts()
    said = ", ".join(
        f"{counts.get(verdict, 0)} {verdict}" for verdict in (INSIDE, OUTSIDE, NOT_RUN)
    )
    return f"of {len(values)} printed values {said}"


def _dots(values: pd.DataFrame) -> pd.DataFrame:
    """Values with a place on the NDCG scale: ``x`` the paper's, ``y`` ours, in points."""
    drawn = values["quantity"].isin(["ndcg", "relative"]) & (values["dataset"] != "Average")
    drawn &= ~by_definition(values)
    values = values[drawn & values["points"].notna()]
    scale = [
        100.0 if value.quantity == "ndcg" else PAPER_BASELINES[value.engine][value.dataset]
        for value in values.itertuples()
    ]
    x = values["paper"] * np.array(scale, dtype=float)
    return values.assign(x=x, y=x + values["points"])


def _compared(above: Axes, below: Axes, dots: pd.DataFrame, engine: str) -> dict[str, object]:
    """Draw one engine's two panels; returns legend entries by label."""
    width = POINTS[engine]
    for axis in (above, below):
        sns.despine(ax=axis)
    below.set_xlabel("The paper (NDCG@10 × 100)")
    if dots.empty:
        for axis in (above, below):
            place = {"transform": axis.transAxes, "ha": "center", "va": "center"}
            axis.text(0.5, 0.5, "not run", color="#777777", **place)
            axis.set(xticks=[], yticks=[])
        return {}
    ends = [dots[["x", "y"]].min().min() - 2, dots[["x", "y"]].max().max() + 2]
    above.fill_between(ends, [e - width for e in ends], [e + width for e in ends], **BAND)
    above.plot(ends, ends, color="#333333", linestyle="--", linewidth=1, zorder=1)
    above.set(xlim=ends, ylim=ends)
    below.axhspan(-width, width, **BAND)
    below.axhline(0, color="#333333", linestyle="--", linewidth=1, zorder=1)
    limit = 1.15 * max(2 * width, dots["points"].abs().max())
    below.set_ylim(-limit, limit)
    handles: dict[str, object] = {}
    for (method, verdict), part in dots.groupby(["pool_method", "verdict"], sort=True):
        style = _dot(method, verdict)
        (drawn,) = above.plot(part["x"], part["y"], **style)
        handles.setdefault(METHOD_NAMES.get(method, "unpooled"), drawn)  # filled, where any is
        below.plot(part["x"], part["points"], **style)
    return handles


def _dot(method: str, verdict: str) -> dict:
    """How a value looks: colour and marker by method, filled where it lies inside."""
    colour = COLOURS.get(method, GREY)
    style = dict(linestyle="none", marker=MARKERS.get(method, "s"), color=colour, markersize=5)
    if verdict == INSIDE:
        return style | dict(alpha=0.65, markeredgecolor="white", markeredgewidth=0.4, zorder=3)
    return style | dict(markerfacecolor="white", markeredgewidth=1.5, markersize=7, zorder=4)


def save_comparison(rows: pd.DataFrame, paper: pd.DataFrame, folder: str | Path) -> list[Path]:
    """Write the paper's values beside ours into `folder`: ``paper_vs_ours`` as CSV, Markdown,
    PNG and SVG.

    Parameters
    ----------
    rows, paper
        From `results.read_rows` and `results.read_paper`.

    Returns
    -------
    The files written; none where the rows are not of the paper's own data sets.
    """
    if not roles_of(rows).own:
        return []
    comparison, output = compare_with_paper(paper, rows), Path(folder)
    csv = comparison.round(6).to_csv(index=False, lineterminator="\n")
    text = comparison_markdown(comparison, rows, paper)
    figure = draw_comparison(comparison)
    return [
        _write(output / "paper_vs_ours.csv", csv.encode()),
        _write(output / "paper_vs_ours.md", text.encode()),
        *(_write(output / f"paper_vs_ours.{kind}", render(figure, kind)) for kind in KINDS),
    ]


# ---------------------------------------------------------------- tables


def table(source: Exhibits, exhibit: str) -> pd.DataFrame:
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


def table_values(source: Exhibits, exhibit: str) -> pd.DataFrame:
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


def table_markdown(source: Exhibits, exhibit: str) -> str:
    """A table as Markdown, with its title and what its cells hold."""
    where = "" if exhibit == "table2" else f" Collection: {source.names['SciFact'][0]}."
    cells = "Cells: NDCG@10 (percent of the unpooled baseline)"
    cells += ", then the difference to the baseline at the same factor." if where == "" else "."
    lines = [f"**{TITLES[exhibit]}.**", "", f"{source.note_on(exhibit)}.{where} {cells}", ""]
    wide = table(source, exhibit)
    lines.append("| " + " | ".join(wide.columns) + " |")
    lines.append("|" + "|".join(" --- " for _ in wide.columns) + "|")
    lines += ["| " + " | ".join(line) + " |" for line in wide.itertuples(index=False)]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- writing


def save(source: Exhibits, exhibit: str, folder: str | Path) -> list[Path]:
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
    ``table1.md`` …; from result rows also ``claims.csv`` and ``claims.md``; from rows of the
    paper's own data sets also ``paper_vs_ours`` as CSV, Markdown, PNG and SVG.
    """
    source, output = read_source(source_folder), Path(output_folder)
    files = []
    for exhibit in [*FIGURES, "overview", *TABLES]:
        files += save(source, exhibit, output)
    beside = (Path(source_folder).parent / "paper", Path("data/paper"))
    paper = next((p for p in (paper_folder, *beside) if p and holds_paper(p)), None)
    if paper and not source.is_paper:
        rows, numbers = read_rows(source_folder), read_paper(paper)
        claims = check_claims(rows, read_per_query(source_folder), numbers)
        files += save_claims(claims, output) + save_comparison(rows, numbers, output)
    return files


def save_claims(claims: pd.DataFrame, folder: str | Path) -> list[Path]:
    """Write the judged findings into `folder` as ``claims.csv`` and ``claims.md``."""
    output = Path(folder)
    # Four decimals: more would tell of nothing but floating-point order.
    csv = claims.round(4).to_csv(index=False, lineterminator="\n")
    return [
        _write(output / "claims.csv", csv.encode()),
        _write(output / "claims.md", claims_table(claims).encode()),
    ]


def _write(path: Path, content: bytes) -> Path:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def sources(data: str | Path) -> Iterator[Path]:
    """Subfolders of `data` that hold rows or the paper's numbers, in order of name."""
    for folder in sorted(Path(data).iterdir()):
        if folder.is_dir() and (holds_paper(folder) or has_rows(folder)):
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
