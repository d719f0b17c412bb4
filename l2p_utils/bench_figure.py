"""The bench's figure: how fast every contestant pools, and how time grows with tokens."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from l2p_utils.figures import COLOURS, STYLE, render
from l2p_utils.files import atomic_path

OURS = "ours"


def draw_bench(pooling: pd.DataFrame, scaling: pd.DataFrame) -> Figure:
    """Left: documents a second over PF 2–6, one panel's bars by method. Right: time by tokens."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4.6), layout="constrained")
        bars, lines = figure.subplots(1, 2)
        length = pooling["document_length"].min()
        sweeps = pooling[(pooling["pool_factor"] == "2-6") & (pooling["document_length"] == length)]
        _draw_bars(bars, sweeps.iloc[::-1])
        bars.set_title(f"Pooling with all of PF 2–6, documents of up to {length} word pieces")
        _draw_growth(lines, scaling[scaling["axis"] == "tokens"])
    return figure


def _draw_bars(axes, sweeps: pd.DataFrame) -> None:
    names = [f"{row.method} · {row.engine}" for row in sweeps.itertuples()]
    speeds = sweeps["documents_per_second"].to_numpy()
    drawn = axes.barh(names, speeds, color=[COLOURS[method] for method in sweeps["method"]])
    for bar, engine in zip(drawn, sweeps["engine"], strict=True):
        bar.set_alpha(1.0 if engine == OURS else 0.45)
    axes.bar_label(drawn, [f"{speed:,.0f}" for speed in speeds], padding=3, fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(right=speeds.max() * 4)
    axes.set_xlabel("documents per second, all five factors (log scale)")
    axes.grid(axis="y", visible=False)


def _draw_growth(axes, growth: pd.DataFrame) -> None:
    for (method, engine), part in growth.groupby(["method", "engine"], sort=False):
        ours = engine == OURS
        axes.plot(
            part["size"],
            1e3 * part["seconds_per_document"],
            color=COLOURS[method],
            linestyle="-" if ours else "--",
            marker="s" if ours else "o",
            label=f"{method} · {engine}",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(growth["size"].unique()), sorted(growth["size"].unique()))
    axes.set_xlabel("tokens in a document")
    axes.set_ylabel("milliseconds per document, PF 4 (log scale)")
    axes.set_title("How time grows with a document's length")
    axes.legend(fontsize=9)


def save_bench(pooling: pd.DataFrame, scaling: pd.DataFrame, folder: Path) -> list[Path]:
    """Write bench.png and bench.svg into `folder`."""
    figure = draw_bench(pooling, scaling)
    files = []
    for kind in ("png", "svg"):
        files.append(folder / f"bench.{kind}")
        with atomic_path(files[-1]) as temporary:
            temporary.write_bytes(render(figure, kind))
    return files
