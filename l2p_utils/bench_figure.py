"""The bench's figure: how fast every contestant pools, and how time grows.

Takes the bench's tables; gives one figure. Log scales: equal distances are equal ratios.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from l2p_utils.figures import COLOURS, STYLE, render
from l2p_utils.files import atomic_path

OURS = "ours"


def draw_bench(
    pooling: pd.DataFrame, scaling: pd.DataFrame, machine: Mapping[str, object]
) -> Figure:
    """Above: documents a second at PF4 and with all factors, a panel a length. Below: growth."""
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 9.4), layout="constrained")
        panels = figure.subplots(2, 2)
        for axes, (length, part) in zip(
            panels[0], pooling.groupby("document_length"), strict=False
        ):
            _draw_speeds(axes, part)
            documents = part["documents"].iloc[0]
            axes.set_title(f"Speed: {documents} documents of up to {length} word pieces")
        for axes, (axis, part) in zip(panels[1], scaling.groupby("axis", sort=False), strict=False):
            _draw_growth(axes, part, axis)
        lines, labels = panels[1][0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=len(lines), fontsize=9)
        figure.suptitle(
            f"Token pooling beside other libraries: {threads}, {machine['processor']}; medians\n"
            "above: full mark PF4, hollow mark all of PF 2–6; below: PF4",
            fontsize=12,
        )
    return figure


def _draw_speeds(axes, part: pd.DataFrame) -> None:
    """One line a contestant: a full mark at PF4, a hollow one for the five factors together."""
    speeds = part.pivot_table(
        index=["method", "engine"], columns="pool_factor", values="documents_per_second", sort=False
    ).iloc[::-1]
    for place, ((method, engine), row) in enumerate(speeds.iterrows()):
        colour = COLOURS[method]
        axes.plot([row["2-6"], row["4"]], [place] * 2, color=colour, alpha=0.4, zorder=1)
        marker = "s" if engine == OURS else "o"
        axes.plot(row["4"], place, marker, color=colour, markersize=8)
        axes.plot(row["2-6"], place, marker, color=colour, markersize=8, markerfacecolor="white")
        axes.annotate(
            f"{row['4']:,.0f}", (row["4"], place), (8, -4), textcoords="offset points", fontsize=9
        )
    axes.set_yticks(range(len(speeds)), [f"{method} · {engine}" for method, engine in speeds.index])
    axes.set_xscale("log")
    axes.set_xlim(right=speeds["4"].max() * 4)
    axes.set_xlabel("documents a second (log scale)")


def _draw_growth(axes, growth: pd.DataFrame, axis: str) -> None:
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
    sizes = sorted(growth["size"].unique())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, sizes)
    axes.set_ylabel("milliseconds a document (log scale)")
    if axis == "tokens":
        axes.set_xlabel("tokens in each of 16 documents")
        axes.set_title("Growth with a document's length")
    else:
        axes.set_xlabel("documents of 96 tokens")
        axes.set_title("Growth with the number of documents")


def save_bench(
    pooling: pd.DataFrame, scaling: pd.DataFrame, folder: Path, machine: Mapping[str, object]
) -> list[Path]:
    """Write bench.png and bench.svg into `folder`."""
    figure = draw_bench(pooling, scaling, machine)
    files = []
    for kind in ("png", "svg"):
        files.append(folder / f"bench.{kind}")
        with atomic_path(files[-1]) as temporary:
            temporary.write_bytes(render(figure, kind))
    return files
