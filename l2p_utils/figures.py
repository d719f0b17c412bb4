"""The paper's Figures 1–4 and Tables 1–4, drawn from stored numbers: the paper's or a run's.

Both become one tidy frame first (`paper.Exhibits`), so the same code draws them. A run on other
collections than the paper's or the bundled ones is drawn by model and collection instead.
``python -m l2p_utils.figures`` redraws everything in ``figures/`` from ``data/``.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Iterable
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from l2p_utils import claims, paper
from l2p_utils.claims import UNIT
from l2p_utils.files import UserError, atomic_path, command
from l2p_utils.paper import ENGINE, FIGURES, ROLES, TABLES, Exhibits
from l2p_utils.results import BASELINE, curves, has_rows, kept_ndcg, relative_ndcg, searched

DPI = 220  # of files; notebooks show 110

# ---------------------------------------------------------------- how each exhibit looks

PANELS = {
    "figure1": ["FiQA", "NFCorpus", "SCIDOCS", "SciFact", "Touche", "Average"],
    "figure2": ["SciFact", "FiQA"],
    "figure3": ["SciFact", "FiQA"],
    "figure4": ["SciFact", "FiQA", "NFCorpus", "SCIDOCS"],
    "overview": ["SciFact"],
}
# Columns, and a panel's width and height in inches; of the others (2, (5.1, 3.6)).
LAYOUT = {"figure1": (3, (4.1, 3.0)), "overview": (1, (9.2, 4.4))}
# The paper's axes; 68 and not 70 in Figure 4, since one point (69.68) lies below the paper's axis.
PAPER_LIMITS = {
    "figure1": (20, 104), "figure2": (0, 106), "figure3": (70, 104), "figure4": (68, 104),
    "overview": (0, 106),
}  # fmt: skip
TITLES = {
    "figure1": "pooling at inference only: the baseline under three pool methods",
    "figure2": "span pooling: the baseline and models trained with one factor or all",
    "figure3": "models trained for all factors (PF1-6), each pooled by its own method",
    "figure4": "search through a PLAID index: the baseline and PF1-6 models",
    "table1": "across methods: models trained with each method, all pooled with span",
    "table2": "across collections: kmeans-trained models, kmeans pooling",
    "table3": "hierarchical pooling: models trained with one factor or with all",
    "table4": "kmeans pooling: models trained with one factor or with all",
    "overview": "NDCG@10 kept as documents shrink: k-means pooling on",
}
# The pool method under which a run's own collections are shown in an exhibit's place; else all.
OWN_METHOD = {
    "overview": "kmeans", "figure2": "span",
    "table1": "span", "table2": "kmeans", "table3": "hierarchical", "table4": "kmeans",
}  # fmt: skip
OVERVIEW = {
    "FT KMeans PF1-6": "trained with pooling",
    "FT PF1": "trained without pooling",
    "Baseline": "baseline",
}
SEARCH = {"exact": "Exact search", "plaid": "PLAID search"}
SUITES = {"exact": "NanoBEIR", "plaid": "BEIR"}  # the paper's own data sets
OWN = "Each model is trained on its panel's collection."
CAPTIONS = {"figure2": OWN, "figure3": f"{OWN} The baseline is pooled hierarchically."}
RELATIVE = "Relative NDCG@10 (%)"

# Okabe and Ito's colours (2008), which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E08A00", "#009E73", "#CC79A7"
SKY, GREY, PURPLE = "#56B4E9", "#555555", "#7B3294"
COLOURS = {"hierarchical": BLUE, "kmeans": ORANGE, "span": GREEN}
MARKERS = {"hierarchical": "o", "kmeans": "^", "span": "D"}
RAW = {"linestyle": (0, (4, 2)), "markerfacecolor": "white"}  # beside unit-length means
MODEL_COLOURS, MODEL_MARKERS = (GREY, SKY, PURPLE, ORANGE, BLUE, GREEN, PINK), "osXP^v"
# Where curves run together all are seen: wider lines and larger, open squares lie below.
NESTED = {
    "span": (3.2, 10.6, False), "FT FiQA KMeans PF1-6": (2.65, 8.4, False),
    "hierarchical": (2.1, 6.2, False), "kmeans": (1.5, 3.8, True),
}  # fmt: skip
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
    "font.sans-serif": ["DejaVu Sans"],  # comes with Matplotlib
    "lines.linewidth": 2.0,
    "lines.markersize": 6.5,
    "svg.hashsalt": "learn-to-pool",
}


class NotebookFigure(Figure):
    """A figure outside pyplot's state that shows itself in a notebook; `alt` says it in words."""

    alt = ""

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        # 256 colours look the same and take a third of the bytes in a stored notebook
        image = Image.open(BytesIO(render(self, "png", dpi=110))).convert("RGB")
        small = BytesIO()
        image.quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
        return small.getvalue(), {"alt": self.alt}


def render(figure: Figure, kind: str, dpi: int = DPI) -> bytes:
    """A figure as the bytes of a PNG or SVG file."""
    buffer = BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context(STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def _panels(
    count: int, columns: int, size: tuple[float, float], title: str, notes: Iterable[str]
) -> tuple[NotebookFigure, list[Axes], Axes]:
    """A figure of `count` panels of `size` inches on common axes, with a title and small print.

    Also gives the panels, and an empty strip for `_legend`.
    """
    columns = min(columns, count)
    lines = math.ceil(count / columns)
    width = max(size[0] * columns, 7)
    small = "\n".join(line for note in notes for line in textwrap.wrap(note, int(width * 15)))
    figure = NotebookFigure(figsize=(width, size[1] * lines + 1.1), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    grid = figure.add_gridspec(lines + 1, columns, height_ratios=[1] * lines + [0.01])
    axes: list[Axes] = []
    for place in range(count):
        first = axes[0] if axes else None
        axes.append(figure.add_subplot(grid[divmod(place, columns)], sharex=first, sharey=first))
    strip = figure.add_subplot(grid[lines, :])
    strip.axis("off")
    figure.suptitle(textwrap.fill(title, int(width * 9.3)), fontsize=12, fontweight="bold")
    figure.supxlabel(small, fontsize=8.5, color="#555555", x=0.012, ha="left")
    return figure, axes, strip


def _legend(strip: Axes, handles: dict[str, object]) -> None:
    """One legend for all panels; the figure grows with its lines."""
    width, height = strip.figure.get_size_inches()
    fitting = max(int(width * 10 // (max(map(len, handles)) + 9)), 1)
    columns = len(handles) if len(handles) <= min(fitting, 4) else min(fitting, 3)
    strip.figure.set_size_inches(width, height + 0.25 * (math.ceil(len(handles) / columns) - 1))
    strip.legend(
        handles.values(), handles, loc="center", ncols=columns, frameon=False, fontsize=10,
        handlelength=2.8, columnspacing=1.6, borderaxespad=0,
    )  # fmt: skip


class Line(NamedTuple):
    """A curve of a panel: percentages by pool factor."""

    name: str  # in the legend
    values: pd.Series
    style: dict
    half: pd.Series | None = None  # of a band around it


def _draw_lines(
    facets: dict[str, list[Line]], title: str, notes: Iterable[str], columns: int,
    size: tuple[float, float], ylabel: str = RELATIVE, limits: tuple[int, int] | None = None,
) -> NotebookFigure:  # fmt: skip
    """A panel per facet, by its title; common limits, whole fives around the data; 100 % dashed."""
    with matplotlib.rc_context(STYLE):
        figure, axes, strip = _panels(len(facets), columns, size, title, notes)
        handles: dict[str, object] = {}
        drawn: list[pd.Series] = []
        for place, (axis, (name, lines)) in enumerate(zip(axes, facets.items(), strict=True)):
            axis.axhline(100, color="#333333", linestyle="--", linewidth=1, zorder=1)
            for line in lines:
                (handles[line.name],) = axis.plot(line.values.index, line.values, **line.style)
                drawn.append(line.values)
                if line.half is not None:
                    ends = [line.values - line.half, line.values + line.half]
                    look = dict(color=line.style["color"], alpha=0.15, linewidth=0, zorder=1)
                    axis.fill_between(line.values.index, *ends, **look)
                    drawn += ends
            axis.set_title(name, fontsize=11.5)
            sns.despine(ax=axis)
            if place % columns == 0:
                axis.set_ylabel(ylabel)
            if place >= len(axes) - columns:
                axis.set_xlabel("Pool factor")
        if handles.pop(THIN_NAME, None):  # the last entry
            handles[THIN_NAME] = Line2D([], [], color=GREY, marker="o", **THIN)
        values = pd.concat(drawn)
        low, high = min(values.min(), 100.0), max(values.max(), 100.0)
        around = (5 * np.floor((low - 1) / 5), 5 * np.ceil((high + 1) / 5))
        axes[0].set(ylim=limits or around, xticks=sorted(set(values.index)))
        axes[0].yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
        _legend(strip, handles)
    return figure


def _by_factor(curve: pd.DataFrame, value: str = "relative") -> pd.Series:
    return curve.set_index("pool_factor")[value].sort_index()


# ---------------------------------------------------------------- raw and unit length, bands

THIN_NAME = "the same, raw means"
THIN = dict(linewidth=0.9, markersize=4.5, markerfacecolor="white", markevery=[-1], zorder=2)
LAYERS_NOTE = "Thick: pooled means scaled to unit length. Thin: raw means, as in the paper."
BANDS_NOTE = "Bands: 95 % intervals of the percentage, over queries{}."


def _layers(source: Exhibits, exhibit: str) -> list[Exhibits]:
    """What a figure shows, back to front: raw means too, where there are those of unit length."""
    plaid = ENGINE[exhibit] == "plaid"  # which has one length
    return [source] if source.unit is None or plaid else [source, source.unit]


def _band(source: Exhibits, curve: pd.DataFrame) -> pd.Series | None:
    """Half the 95 % intervals of a curve's cells; None where values per query are not known."""
    if source.per_query is None:
        return None
    unit, half = source.unit is None and bool(source.rows["renormalized"].any()), {}
    for cell in curve.itertuples():
        datasets = ROLES if cell.dataset == "Average" else [cell.dataset]
        how = [cell.trained_on, cell.train_method, cell.train_factors]
        how += ["none" if cell.pool_factor == 1 else cell.pool_method, cell.pool_factor]
        cells = [claims.Cell(dataset, *how, renormalized=unit) for dataset in datasets]
        half[cell.pool_factor] = _our_cells(source, cell.engine).error_bar(cells)
    found = pd.Series(half).sort_index()
    return found if found.notna().any() else None


@lru_cache(maxsize=4)
def _our_cells(source: Exhibits, engine: str) -> claims.OurCells:
    return claims.OurCells(source.rows, source.per_query, source.roles, engine)


# ---------------------------------------------------------------- the paper's figures


def _title(source: Exhibits, exhibit: str) -> str:
    if exhibit == "overview":
        who = "The paper" if source.is_paper else "This run"
        return f"{who}. {TITLES[exhibit]} {source.names['SciFact'][1]}"
    number = f"{exhibit[:-1].capitalize()} {exhibit[-1]}"
    where, title = "of the paper" if source.is_paper else "in this run", TITLES[exhibit]
    return f"{number} {where}. {title[0].upper()}{title[1:]}"


def _notes(source: Exhibits, exhibit: str) -> list[str]:
    engine, gaps = ENGINE[exhibit], paper.missing(source, exhibit)
    on = f" on {SUITES[engine]}" if source.roles.own else ""
    notes = [f"{source.note_on(exhibit)}. {SEARCH[engine]}{on}. {CAPTIONS.get(exhibit, '')}"]
    looks = [LAYERS_NOTE] if len(_layers(source, exhibit)) > 1 else []
    if source.per_query is not None:
        several = source.rows["seed"].nunique() > 1
        looks.append(BANDS_NOTE.format(" and training seeds" if several else ""))
    return notes + [" ".join(looks)] * bool(looks) + [f"Not run: {gaps}."] * bool(gaps)


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


def _cells(source: Exhibits, exhibit: str) -> pd.DataFrame:
    """The cells of an exhibit that have a number.

    The overview has three models of Table 4; of a run at all its factors, with mean ``vectors``.
    """
    number = "table4" if exhibit == "overview" else exhibit
    frame = source.frame[source.frame["exhibit"] == number]
    if exhibit == "overview":
        frame = pd.concat([frame[frame["label"] == label] for label in OVERVIEW])
        if source.rows is not None:
            factors = pd.DataFrame({"pool_factor": sorted(set(source.rows["pool_factor"]))})
            models = frame.drop_duplicates("label").drop(columns="pool_factor")
            frame = paper.fill(models.merge(factors, how="cross"), source.rows, source.roles)
    return frame.dropna(subset=["relative"])


def draw(source: Exhibits, exhibit: str) -> NotebookFigure:
    """Draw "figure1" … "figure4" or "overview" from `source`; UserError without rows for it.

    The overview is the project in one picture: baseline, FT PF1 and FT kmeans PF1-6 under kmeans
    pooling, on SciFact or the collection in its role; where the source knows them, mean vectors per
    document stand under the pool factors. Panels without any number are left out. Where a run has
    none at all, because its collections are others, its models are compared on its own collections.
    """
    if exhibit not in PANELS:
        raise UserError(f"no figure {exhibit!r}: expected one of {[*PANELS]}.")
    layers = _layers(source, exhibit)
    if _cells(source, exhibit).empty:
        return _draw_own(source, exhibit)
    big = dict(linewidth=2.6, markersize=8) if exhibit == "overview" else {}
    facets: dict[str, list[Line]] = {}
    for layer in layers:
        cells = _cells(layer, exhibit)
        groups = cells.groupby(["dataset", "label", "pool_method"], sort=False)
        for (dataset, label, method), curve in groups:
            values, style = _by_factor(curve), _style(label, method) | big
            line = Line(THIN_NAME, values, style | THIN)
            if layer is layers[-1]:
                name = _legend_name(source, exhibit, curve)
                line = Line(name, values, style, _band(layer, curve))
            facets.setdefault(dataset, []).append(line)
    shown = [dataset for dataset in PANELS[exhibit] if dataset in facets]
    facets = {"" if exhibit == "overview" else source.names[d][0]: facets[d] for d in shown}
    ylabel = "Relative NDCG@10\n(% of the unpooled baseline)" if exhibit == "overview" else RELATIVE
    limits = PAPER_LIMITS[exhibit] if source.is_paper else None
    title, layout = _title(source, exhibit), LAYOUT.get(exhibit, (2, (5.1, 3.6)))
    figure = _draw_lines(facets, title, _notes(source, exhibit), *layout, ylabel, limits)
    if exhibit == "overview":
        _label_factors(figure.axes[0], cells)
    ends = cells.sort_values("pool_factor").groupby(["dataset", "label", "pool_method"]).last()
    spoken = [
        f"{source.names[dataset][1]}, {source.rename(label)}, {method}: {end.relative:.0f} % at "
        f"pool factor {end.pool_factor}"
        for (dataset, label, method), end in ends.iterrows()
    ]
    figure.alt = f"{title}. {'; '.join(spoken)}"
    return figure


def _legend_name(source: Exhibits, exhibit: str, curve: pd.DataFrame) -> str:
    end = curve.loc[curve["pool_factor"].idxmax()]
    label = end["label"]
    if exhibit == "overview":
        return f"{OVERVIEW[label]} ({end['relative']:.1f} % at PF{end['pool_factor']})"
    if exhibit == "figure1":
        return end["pool_method"]
    # Figure 4 prints the training set; where that is the panel's own it is said once for both.
    if exhibit == "figure4" and "KMeans" not in label and label != "Baseline":
        label = label.replace(" SciFact ", " ").replace(" FiQA ", " ") + " (own collection)"
    name = source.rename(label)
    several = label == "Baseline" and exhibit != "figure2"
    return f"{name}, {end['pool_method']}" if several else name


def _label_factors(axis: Axes, cells: pd.DataFrame) -> None:
    factors = sorted(set(cells["pool_factor"]))
    if factors[-1] > 6:
        axis.set_xscale("log", base=2)
        axis.minorticks_off()
    axis.set_xticks(factors, map(str, factors))
    if "vectors" in cells and (vectors := cells.groupby("pool_factor")["vectors"].first()).all():
        axis.set_xticks(factors, [f"{factor}\n{count:.0f}" for factor, count in vectors.items()])
        axis.set_xlabel("Pool factor, and mean vectors stored per document")


# ---------------------------------------------------------------- any run, by model and collection


def _draw_own(source: Exhibits, exhibit: str) -> NotebookFigure:
    """Every model of a run on its collections: a row per collection, a column per pool method.

    In the place of Figure 1 the baseline alone.
    """
    rows = source.rows_of(exhibit)
    if rows.empty:
        raise UserError(f"{source.name}: there are no rows of {SEARCH[ENGINE[exhibit]]} to draw.")
    baseline = rows[rows["model"] == BASELINE]
    if exhibit == "figure1" and (baseline["pool_method"] != "none").any():
        return draw_kept(paper.main_variants(baseline))
    cells = _own_cells(rows, exhibit)
    methods, names = list(dict.fromkeys(cells["pool_method"])), _short(cells["dataset"])
    models = sorted(set(cells["label"]), key=lambda name: (name != BASELINE, name))
    facets: dict[str, list[Line]] = {}
    for (dataset, method, model), curve in cells.groupby(["dataset", "pool_method", "label"]):
        number = models.index(model)
        look = {"color": MODEL_COLOURS[number % 7], "marker": MODEL_MARKERS[number % 6]}
        look["linestyle"] = "--" if model == BASELINE else "-"
        line = Line(model, _by_factor(curve), look)
        facets.setdefault(f"{names[dataset]}, {method}", []).append(line)
    more = ", …" if len(names) > 3 else ""
    title = f"This run's models on {', '.join([*names.values()][:3])}{more}"
    title += f": {methods[0]} pooling" if len(methods) == 1 else ""
    note = f"100 %: the unpooled baseline. {_engine_note(rows)}"
    columns = len(methods) if len(methods) > 1 else 3
    figure = _draw_lines(facets, title, [note], columns, (3.6, 3.0))
    figure.alt = f"{title}: relative NDCG@10 of {', '.join(models)} by pool factor."
    return figure


def _own_cells(rows: pd.DataFrame, exhibit: str) -> pd.DataFrame:
    """Every model's curves as cells, of the exhibit's pool method where it was run, else of all.

    UserError without any baseline.
    """
    rows = relative_ndcg(paper.main_variants(rows), partial=True)
    if rows["relative_ndcg@10"].isna().all():
        relative_ndcg(rows)  # says what is missing
    if (rows["pool_method"] == OWN_METHOD.get(exhibit)).any():
        rows = rows[rows["pool_method"].isin(["none", OWN_METHOD[exhibit]])]
    found = curves(rows)
    names = {"collection": "dataset", "model": "label", "ndcg@10": "ndcg"}
    names["relative_ndcg@10"] = "relative"
    return (found if len(found) else rows).rename(columns=names).assign(delta=np.nan)


def _cells_or_own(source: Exhibits, exhibit: str) -> tuple[pd.DataFrame, bool]:
    """The cells of an exhibit, or instead of none those of a run's own collections; which."""
    cells, rows = _cells(source, exhibit), source.rows_of(exhibit)
    if len(cells) or rows.empty:
        return cells, False
    rows = rows[rows["model"] == BASELINE] if exhibit == "figure1" else rows
    return _own_cells(rows, exhibit), True


def _short(collections: Iterable[str]) -> dict[str, str]:
    """Names of collections, in their order; of folders the last part, where it tells them apart."""
    names = {name: Path(name).name for name in sorted(set(collections))}
    return names if len(set(names.values())) == len(names) else {name: name for name in names}


def _engine_note(rows: pd.DataFrame) -> str:
    queries = "–".join(str(n) for n in sorted({rows["queries"].min(), rows["queries"].max()}))
    return f"{SEARCH[rows['engine'].iloc[0]]}; {queries} test queries per collection."


def draw_kept(rows: pd.DataFrame) -> NotebookFigure:
    """What one model keeps of its own unpooled NDCG@10: a panel per collection, a curve per method.

    `rows` are the model's of one engine, one variant per method, with the unpooled ones.
    Unit-length means are drawn solid, raw ones dashed.
    """
    pooled = rows[rows["pool_method"] != "none"]
    if pooled.empty:
        raise UserError("There is no pooled measurement to draw: evaluate at pool factors above 1.")
    lengths = sorted(pooled["renormalized"].unique())
    kept = pd.concat([kept_ndcg(searched(rows, unit)).assign(unit=unit) for unit in lengths])
    kept, facets = kept.dropna(subset=["kept"]), {}
    names = _short(kept["collection"])
    for (collection, method, unit), curve in kept.groupby(["collection", "pool_method", "unit"]):
        name = method if len(lengths) == 1 else f"{method}, {'unit length' if unit else 'raw'}"
        look = {"color": COLOURS[method], "marker": MARKERS[method], "linestyle": "-"}
        look |= {} if unit or len(lengths) == 1 else RAW
        facets.setdefault(names[collection], []).append(Line(name, _by_factor(curve, "kept"), look))
    title = f"{rows['model'].iloc[0]}: NDCG@10 kept at each pool factor"
    note = f"100 %: the same model unpooled. {_engine_note(rows)}"
    columns = 2 if len(facets) in (2, 4) else 3
    figure = _draw_lines(facets, title, [note], columns, (3.7, 2.9), "NDCG@10 (%)")
    ends = kept[kept["pool_factor"] == kept["pool_factor"].max()]
    means = ends.groupby(["pool_method", "unit"])["kept"].mean().round()
    at = {False: "", True: " at unit length"}
    spoken = [f"{method} {kept:.0f} %{at[unit]}" for (method, unit), kept in means.items()]
    figure.alt = f"{title}; mean at the largest factor: {', '.join(spoken)}."
    return figure


# ---------------------------------------------------------------- the claims

# Of a verdict the marker and whether it is filled; of raw and unit-length means the looks.
VERDICTS = {
    claims.HOLDS: ("o", True), claims.UNDECIDED: ("o", False), claims.FAILS: ("X", True),
}  # fmt: skip
MEANS = {"": ("raw means", "#222222", 1.6, -0.17), UNIT: ("unit-length means", SKY, 3.2, 0.17)}


def draw_claims(judged: pd.DataFrame) -> NotebookFigure:
    """A forest plot: the difference and interval of each part, raw means above unit-length ones.

    `judged` is from `claims.check_claims`. NDCG@10 (finding 7) is drawn × 100, beside percentages.
    """
    judged, title = judged.reset_index(drop=True), "The findings, part by part"
    notes = ["Lines: 95 % intervals of a part's weakest comparison. Ticks: the margin, if not 0."]
    names, scale = judged["part"].tolist(), np.where(judged["unit"] == "ndcg", 100, 1)
    margins = scale * judged["part"].map({p.name: p.margin for p in claims.PARTS}).to_numpy()
    with matplotlib.rc_context(STYLE):
        figure, (axis,), strip = _panels(1, 1, (8.6, 0.3 * len(names) + 1), title, notes)
        axis.axvline(0, color="#333333", linestyle="--", linewidth=1, zorder=1)
        for place in np.flatnonzero(judged["finding"].diff() > 0):
            axis.axhline(place - 0.5, color="#999999", linewidth=0.8, zorder=0)
        for place in np.flatnonzero(margins):
            ends = [place - 0.4, place + 0.4]
            axis.plot([-margins[place]] * 2, ends, color="#777777", linewidth=1.5, zorder=1)
        handles, said = {}, []
        for head, (name, colour, width, offset) in MEANS.items():
            columns = [head + column for column in ("verdict", "difference", "low", "high")]
            for place, (verdict, *numbers) in enumerate(judged[columns].to_numpy()):
                if verdict not in VERDICTS:
                    continue
                middle, *ends = scale[place] * np.array(numbers)
                where = [place + offset] * 2
                (handles[name],) = axis.plot(ends, where, color=colour, linewidth=width, zorder=2)
                marker, filled = VERDICTS[verdict]
                look = {"color": colour, "markerfacecolor": colour if filled else "white"}
                look |= dict(markeredgecolor="#222222", linestyle="none", zorder=3)
                (dot,) = axis.plot(middle, where[0], marker=marker, **look)
                handles.setdefault(verdict, dot)
                said.append(f"{names[place]} {name}: {verdict}")
        axis.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
        axis.set_xlabel("Difference (percent of the unpooled baseline; finding 7: NDCG@10 × 100)")
        sns.despine(ax=axis)
        if handles:
            _legend(strip, {k: handles[k] for k in sorted(handles, key=lambda k: k in VERDICTS)})
    figure.alt = f"{title}. {'; '.join(said)}."
    return figure


# ---------------------------------------------------------------- the paper against ours


def draw_comparison(comparison: pd.DataFrame) -> NotebookFigure:
    """The paper's values against ours, in NDCG points: exact search, then PLAID.

    The shaded band is the tolerance. Percentages count as that part of the paper's unpooled
    baseline; Table 2's differences, averages and the baseline's own 100 % are not drawn.
    `comparison` is from `paper.compare_with_paper`.
    """
    drawn = comparison["quantity"].isin(["ndcg", "relative"]) & comparison["points"].notna()
    drawn &= (comparison["dataset"] != "Average") & ~paper.by_definition(comparison)
    dots = comparison[drawn]
    engines = [engine for engine in SUITES if (dots["engine"] == engine).any()]
    title = "The paper's values and ours"
    band = "Shaded: the tolerance, ± {exact:g} point (exact search), ± {plaid:g} points (PLAID)."
    notes = [f"{band.format(**paper.POINTS)} Filled: inside; open: outside."]
    for engine, part in comparison.groupby("engine"):
        counts = [f"{n} {verdict}" for verdict, n in part["verdict"].value_counts().items()]
        notes.append(f"{SEARCH[engine]}: of {len(part)} printed values {', '.join(counts)}.")
    with matplotlib.rc_context(STYLE):
        figure, axes, strip = _panels(max(len(engines), 1), 2, (5.1, 4.0), title, notes)
        handles: dict[str, object] = {}
        for axis, engine in zip(axes, engines, strict=False):
            here = dots[dots["engine"] == engine]
            points = paper.POINTS[engine]
            axis.axhspan(-points, points, color="#DDDDDD", linewidth=0, zorder=0)
            axis.axhline(0, color="#333333", linestyle="--", linewidth=1, zorder=1)
            percent = here["dataset"].map(paper.PAPER_BASELINES[engine])
            here = here.assign(x=here["paper"] * percent.where(here["quantity"] != "ndcg", 100.0))
            for (method, verdict), part in here.groupby(["pool_method", "verdict"]):
                look = dict(linestyle="none", marker=MARKERS.get(method, "s"), zorder=3)
                look["color"] = COLOURS.get(method, GREY)
                look["markerfacecolor"] = look["color"] if verdict == paper.INSIDE else "white"
                (drawn,) = axis.plot(part["x"], part["points"], markersize=5.5, **look)
                handles.setdefault("unpooled" if method == "none" else method, drawn)
            axis.set_title(f"{SEARCH[engine]}, {SUITES[engine]}", fontsize=11.5)
            axis.set(xlabel="The paper (NDCG@10 × 100)", ylabel="Ours − paper (NDCG points)")
            sns.despine(ax=axis)
        _legend(strip, handles)
    figure.alt = f"{title}. {' '.join(notes[1:])}"
    return figure


# ---------------------------------------------------------------- the paper's tables


def table(source: Exhibits, exhibit: str) -> pd.DataFrame:
    """One of the paper's tables, a model per line: ``PF1`` … columns of "NDCG@10 (relative %)".

    Table 2 adds the difference to the baseline at the same factor. Models that were not run have
    no line. A run on its own collections gives all its models there. UserError for another name.
    """
    if exhibit not in TABLES:
        raise UserError(f"no table {exhibit!r}: expected one of {TABLES}.")
    frame, own = _cells_or_own(source, exhibit)
    short = {dataset: names[1] for dataset, names in source.names.items()}
    cells = frame.assign(
        Collection=frame["dataset"].map(_short(frame["dataset"]) if own else short),
        Model=frame["label"].map(source.rename),
        text=[_cell(cell) for cell in frame.itertuples()],
    )
    lines = ["Collection", "Model"]
    wide = cells.pivot_table("text", lines, "pool_factor", aggfunc="first", sort=own)
    if not own:
        every = source.frame.loc[source.frame["exhibit"] == exhibit, "pool_factor"]
        wide = wide.reindex(columns=every.unique())
    wide = wide.fillna("not run").rename(columns="PF{}".format).rename_axis(columns=None)
    return wide.reset_index(lines if own or exhibit == "table2" else "Model").reset_index(drop=True)


def _cell(cell) -> str:
    text = f"{cell.ndcg:.3f} ({cell.relative:.1f})"
    return text if np.isnan(cell.delta) else f"{text} {cell.delta:+z.3f}".replace("-", "−")


def table_values(source: Exhibits, exhibit: str) -> pd.DataFrame:
    """A table's numbers, one per row, in the columns of ``data/paper/table*.csv``.

    Where a run has unit-length means, ``renormalized`` tells them from raw ones.
    """
    both = [source] if source.unit is None else [source, source.unit]
    frame = pd.concat([one.frame.assign(renormalized=one is not source) for one in both])
    names = {"label": "model", "ndcg": "ndcg10", "relative": "relative_percent"}
    frame = frame[frame["exhibit"] == exhibit].rename(columns=names)
    frame["model"] = frame["model"].map(source.rename)
    frame["dataset"] = [source.names[dataset][1] for dataset in frame["dataset"]]
    columns = ["model", "pool_factor", "ndcg10", "relative_percent"]
    columns = ["dataset", *columns, "delta"] if exhibit == "table2" else columns
    columns += ["renormalized"] if source.unit else []
    decimals = {"ndcg10": 4, "relative_percent": 2, "delta": 4}  # one more than is printed
    return frame[columns].round(decimals).reset_index(drop=True)


def table_markdown(source: Exhibits, exhibit: str) -> str:
    """A table as Markdown, with its title and what its cells hold."""
    shown, title = table(source, exhibit), _title(source, exhibit)
    cells = "Cells: NDCG@10 (percent of the unpooled baseline)"
    if _cells(source, exhibit).empty:
        title = f"This run's models on its own collections: {OWN_METHOD[exhibit]} pooling"
    elif exhibit == "table2":
        cells += ", then the difference to the baseline at the same factor"
    else:
        cells = f"Collection: {source.names['SciFact'][0]}. {cells}"
    text = shown.to_markdown(index=False) if len(shown) else "Not run."
    text = f"**{title}.** {source.note_on(exhibit)}. {cells}.\n\n{text}\n"
    return text if source.unit is None else f"{text}\n{table_markdown(source.unit, exhibit)}"


# ---------------------------------------------------------------- six tables for the notebooks


def means_table(sources: Iterable[Exhibits], exhibit: str) -> pd.DataFrame:
    """Relative NDCG@10 (%) of an exhibit's curves: unpooled, mean of the pooled factors, largest.

    A line per data set, model and pool method; three columns for each source that has any of them,
    "not run" where it has no number. Where a source is a run on its own collections, its lines
    alone: they have nothing in common with the paper's.
    """
    names, tables, keys = {}, {}, ["dataset", "label", "pool_method"]
    for source in sources:
        frame, own = _cells_or_own(source, exhibit)
        if frame.empty:
            continue
        if own:
            names, tables = _short(frame["dataset"]), {}
        wide = frame.pivot_table("relative", keys, "pool_factor", sort=own)
        pooled = [factor for factor in wide.columns if factor > 1]
        numbers = pd.DataFrame({"PF 1": wide[1]} if 1 in wide else {}, index=wide.index)
        if pooled:
            numbers[f"mean of PF {pooled[0]}–{pooled[-1]}"] = wide[pooled].mean(axis=1)
            numbers[f"PF {pooled[-1]}"] = wide[pooled[-1]]
        tables["the paper" if source.is_paper else "this run"] = numbers.round(1)
        if not (own or source.is_paper or source.roles.own):
            names = {dataset: f"{dataset} · {source.names[dataset][1]}" for dataset in ROLES}
    found = pd.concat(tables, axis=1).rename(index=names, level=0).astype(object)
    found = found.where(found.notna(), "not run")
    return found.rename_axis(index=["", "model", "pooled with"], columns=["", ""])


def _baseline(rows: pd.DataFrame, engine: str) -> pd.DataFrame:
    chosen = rows[(rows["model"] == BASELINE) & (rows["engine"] == engine)]
    return chosen.assign(collection=chosen["collection"].map(_short(rows["collection"])))


def _by_factors(rows: pd.DataFrame, value: str, index: str | list[str]) -> pd.DataFrame:
    """Means of a column with a column per pool factor."""
    return rows.pivot_table(value, index, "pool_factor").rename(columns="PF{}".format)


def roles_table(theirs: Exhibits, rows: pd.DataFrame) -> pd.DataFrame:
    """The collections of a run: whose part each plays, its size, the unpooled baseline's NDCG@10.

    Beside it that of `theirs`, the paper; without such columns for a run on its own collections.
    """
    frame = theirs.frame.query("exhibit == 'table2' and pool_factor == 1 and label == 'Baseline'")
    printed = frame.set_index("dataset")["ndcg"]
    roles = paper.roles_of(rows)
    parts = {roles.evaluated(dataset): dataset for dataset in ROLES}
    ours = _baseline(rows, "exact")
    ours = ours[ours["pool_method"] == "none"].set_index("collection")
    order = [*parts, *sorted(set(ours.index) - set(parts))]
    ours = ours.loc[sorted(ours.index, key=order.index)]
    names = [parts.get(name, "–") for name in ours.index]
    columns = {
        "documents": ours["documents"],
        "test queries": ours["queries"],
        "vectors per document": ours["vectors_per_document"].round(1),
        "NDCG@10, unpooled": ours["ndcg@10"].round(3),
    }
    found = pd.DataFrame(columns, index=ours.index)
    if set(names) & set(ROLES):
        found.insert(0, "the paper's data set" if roles.own else "in the role of", names)
        found["the paper's"] = [printed.get(name, "–") for name in names]
    return found


def storage_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Vectors per document by collection (line) and pool factor: the baseline's, kmeans pooling."""
    chosen = paper.main_variants(_baseline(rows, "exact"))
    chosen = chosen[chosen["pool_method"].isin(["none", "kmeans"])]
    return _by_factors(chosen, "vectors_per_document", "collection").round(1)


def variants_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Relative NDCG@10 (%) of the baseline under each variant of hierarchical, over collections."""
    chosen = _baseline(relative_ndcg(rows, partial=True), "exact")
    chosen = chosen[chosen["pool_method"] == "hierarchical"]
    wide = _by_factors(chosen, "relative_ndcg@10", "pool_variant")
    return wide.assign(mean=wide.mean(axis=1)).round(1)


def index_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Megabytes on disk of the baseline's PLAID indexes, and percent of the unpooled index."""
    chosen = _baseline(rows, "plaid").dropna(subset=["index_bytes"])
    chosen = chosen.assign(mb=chosen["index_bytes"].astype(float) / 1e6)
    alone = chosen["pool_method"] == "none"
    wide = _by_factors(chosen[~alone], "mb", ["collection", "pool_method"])
    unpooled = chosen[alone].set_index("collection")["mb"]
    wide.insert(0, "unpooled", wide.index.get_level_values("collection").map(unpooled))
    if len(wide):
        largest = wide.columns[-1]
        wide[f"{largest}, % of unpooled"] = 100 * wide[largest] / wide["unpooled"]
    return wide.round(2)


def engines_table(per_query: pd.DataFrame) -> pd.DataFrame:
    """NDCG@10 of exact search and of PLAID on the same queries, unpooled and at the largest factor.

    A line per model, collection and pool method that both engines searched; ``queries`` is how
    many both answered. Exact search of unit-length means, where it was run, has columns of its own.
    """
    keys = ["model", "collection", "pool_method", "pool_variant", "pool_factor", "query_id"]
    short = _short(per_query["collection"])
    values = per_query.assign(collection=per_query["collection"].map(short))
    exact, plaid = (values[values["engine"] == engine] for engine in SEARCH)
    lengths = {"": False}
    if exact["renormalized"].any():
        lengths = {", raw": False, ", unit length": True}
    parts = {SEARCH["exact"] + name: searched(exact, unit) for name, unit in lengths.items()}
    parts |= {SEARCH["plaid"]: plaid}
    split = {name: part.set_index(keys)["ndcg@10"] for name, part in parts.items()}
    both = pd.concat(split, axis=1, join="inner")
    if both.empty:
        return pd.DataFrame()
    groups = both.groupby(keys[:-1])
    means = groups.mean().assign(queries=groups.size()).reset_index()
    largest = means["pool_factor"].max()
    lines = means[means["pool_factor"] == largest].set_index(keys[:3])
    unpooled = means[means["pool_factor"] == 1].set_index(keys[:2])[list(split)]
    starts = unpooled.reindex(lines.index.droplevel("pool_method")).set_axis(lines.index)
    found = {"PF1": starts, f"PF{largest}": lines[list(split)], "": lines[["queries"]]}
    return pd.concat(found, axis=1).round(3)


# ---------------------------------------------------------------- writing


def save(source: Exhibits, exhibit: str, folder: str | Path) -> list[Path]:
    """Write one figure (PNG and SVG) or table (CSV and Markdown) of `source` into `folder`."""
    if exhibit not in TABLES:
        return save_figure(draw(source, exhibit), folder, exhibit)
    numbers, text = table_values(source, exhibit), table_markdown(source, exhibit)
    return save_figure(None, folder, exhibit, numbers, text)


def save_claims(judged: pd.DataFrame, folder: str | Path) -> list[Path]:
    """Write the judged findings into `folder` as ``claims`` (CSV, Markdown, PNG, SVG)."""
    text = claims.claims_table(judged)
    return save_figure(draw_claims(judged), folder, "claims", judged.round(4), text)


def save_comparison(rows: pd.DataFrame, numbers: pd.DataFrame, folder: str | Path) -> list[Path]:
    """Write the paper's values beside ours as ``paper_vs_ours`` (CSV, Markdown, PNG, SVG).

    Nothing is written for rows of other collections than the paper's own.
    """
    if not paper.roles_of(rows).own:
        return []
    found = paper.compare_with_paper(numbers, rows)
    text = paper.comparison_markdown(found, rows, numbers)
    return save_figure(draw_comparison(found), folder, "paper_vs_ours", found.round(6), text)


def save_figure(
    figure: NotebookFigure | None, folder: str | Path, name: str,
    numbers: pd.DataFrame | None = None, text: str = "",
) -> list[Path]:  # fmt: skip
    """Write a figure into `folder` as PNG and SVG, and numbers as CSV beside their Markdown."""
    files = {kind: render(figure, kind) for kind in ("png", "svg") if figure}
    if numbers is not None:
        csv = numbers.to_csv(index=False, lineterminator="\n")
        files |= {"csv": csv.encode(), "md": text.encode()}
    for suffix, content in files.items():
        with atomic_path(Path(folder) / f"{name}.{suffix}") as temporary:
            temporary.write_bytes(content)
    return [Path(folder) / f"{name}.{suffix}" for suffix in files]


def draw_all(source_folder: str | Path, output_folder: str | Path, paper_folder: str | Path) -> int:
    """Draw every figure and table of `source_folder`; how many files were written.

    Of result rows also the claims, and of the paper's own data sets ``paper_vs_ours``.
    `paper_folder` holds the paper's numbers, as ``data/paper``.
    """
    source, files = paper.read_source(source_folder), []
    for exhibit in [*FIGURES, "overview", *TABLES]:
        if source.is_paper or len(source.rows_of(exhibit)):
            files += save(source, exhibit, output_folder)
    if not source.is_paper:
        numbers = paper.read_paper(paper_folder)
        judged = claims.check_claims(source.rows, source.per_query, numbers)
        files += save_claims(judged, output_folder)
        files += save_comparison(source.rows, numbers, output_folder)
    return len(files)


@command
def main(arguments: list[str] | None = None) -> None:
    """Redraw ``<out>/<name>/`` for every subfolder ``<data>/<name>/`` (``make figures``)."""
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.figures", description=main.__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("figures"))
    given = parser.parse_args(arguments)
    if not paper.holds_paper(given.data / "paper"):
        raise UserError(f"{given.data} has no folder paper with the paper's numbers.")
    for folder in sorted(path for path in given.data.iterdir() if path.is_dir()):
        if paper.holds_paper(folder) or has_rows(folder):
            count = draw_all(folder, given.out / folder.name, given.data / "paper")
            print(f"{given.out / folder.name}: {count} files from {folder}")


if __name__ == "__main__":
    sys.exit(main())
