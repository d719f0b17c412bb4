"""The bench's report: targets and their verdicts, tables, the figure.

Takes a folder of the bench's measurements (CSV files, machine.json); writes table.md and the figure
beside them. Nothing is measured here: ``python -m l2p_utils.bench_report figures/bench``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from l2p_utils.bench_figure import save_bench
from l2p_utils.files import UserError, atomic_path
from l2p_utils.results import paired_bootstrap

FACTORS = [2, 3, 4, 5, 6]
REFERENCE = {"span": "loop over groups", "kmeans": "scikit-learn", "hierarchical": "PyLate"}
PAPER_BATCH = 16 * 16  # documents in one of the paper's training batches
PARTS = ["pooling", "scaling", "search", "sweep", "training", "ndcg", "quality"]


@dataclass(frozen=True)
class Target:
    """What was aimed at, and what came out; met where `value` is on the right side of `limit`."""

    name: str
    value: float
    sign: str  # "≥" or "≤"
    limit: float

    @property
    def met(self) -> bool:
        """Whether the target was met."""
        return self.value >= self.limit if self.sign == "≥" else self.value <= self.limit


def quality_difference(quality: pd.DataFrame) -> tuple[float, float, float]:
    """Mean difference in NDCG@10 points, ours minus scikit-learn's, and its 95 % interval.

    A query's values at all factors are averaged first: they are not independent.
    """
    means = quality.groupby(["collection", "query_id"])[["ours", "scikit-learn"]].mean()
    found = paired_bootstrap(means["ours"].to_numpy(), means["scikit-learn"].to_numpy())
    return tuple(100 * value for value in found)


def targets(parts: Mapping[str, pd.DataFrame]) -> list[Target]:
    """The targets with what was measured."""
    pooling = parts["pooling"].set_index(["document_length", "method", "engine", "pool_factor"])
    speed, tightness = pooling["documents_per_second"], pooling["spread"]
    found = []
    for length in parts["pooling"]["document_length"].unique():

        def faster(method: str, factor: str, length=length) -> float:
            place = (length, method)
            theirs = speed[*place, REFERENCE[method], factor]
            return speed[*place, "ours", factor] / theirs

        def separate(method: str, length=length) -> float:
            one = sum(pooling["seconds"][length, method, "ours", str(f)] for f in FACTORS)
            return one / pooling["seconds"][length, method, "ours", "2-6"]

        at = f"{length} word pieces"
        worst = max(
            tightness[length, "kmeans", "ours", str(f)]
            / tightness[length, "kmeans", "scikit-learn", str(f)]
            for f in FACTORS
        )
        found += [
            Target(f"kmeans PF 2–6, times scikit-learn, {at}", faster("kmeans", "2-6"), "≥", 6),
            Target(f"kmeans inertia / scikit-learn's, worst factor, {at}", worst, "≤", 1.005),
            Target(
                f"hierarchical, times PyLate at one factor (least), {at}",
                min(faster("hierarchical", str(f)) for f in FACTORS),
                "≥",
                2,
            ),
            Target(
                f"span, times a loop over groups (least), {at}",
                min(faster("span", str(f)) for f in FACTORS),
                "≥",
                10,
            ),
            Target(f"kmeans, five poolings / one sweep, {at}", separate("kmeans"), "≥", 3),
            Target(
                f"hierarchical, five poolings / one sweep, {at}", separate("hierarchical"), "≥", 3
            ),
        ]
    search = parts["search"].set_index("engine")
    stages = parts["sweep"].set_index("stage")["seconds"]
    found += [
        Target("exact search, times PyLate's rank",
               search["seconds"]["PyLate rank.rerank"] / search["seconds"]["ours"], "≥", 3),
        Target("exact search, times PyLate's bare scoring",
               search["seconds"]["PyLate colbert_scores"] / search["seconds"]["ours"], "≥", 3),
        Target("exact search, share of equal top 10 (least)", search["same_top_10"].min(), "≥", 1),
        Target("all 16 settings / encoding once", stages["all settings"] / stages["encode"],
               "≤", 1),
    ]  # fmt: skip
    limits = {"span": 1.10, "kmeans": 1.15, "hierarchical": 1.20}
    for _, row in parts["training"][parts["training"]["method"] != "none"].iterrows():
        name = f"training step with {row['method']} / unpooled, {row['document_length']} tokens"
        found.append(Target(name, row["ratio"], "≤", limits[row["method"]]))
    quality = parts["quality"]
    per_factor = quality.groupby(["collection", "pool_factor"])[
        ["spread_ours", "spread_scikit-learn"]
    ].first()
    ratios = per_factor["spread_ours"] / per_factor["spread_scikit-learn"]
    factors = ratios.groupby("pool_factor").mean()
    low = quality_difference(quality)[0]
    found += [
        Target("kmeans inertia / scikit-learn's over collections, worst factor", factors.max(),
               "≤", 1.005),
        Target("NDCG@10 points of kmeans less scikit-learn's: not lower than", low, "≥", -0.3),
        Target("NDCG@10 points of kmeans less scikit-learn's: not higher than", low, "≤", 0.3),
    ]  # fmt: skip
    return found


def tables(parts: Mapping[str, pd.DataFrame], aims: Sequence[Target]) -> str:
    """The measurements in Markdown: contestants, NDCG, search, training steps, targets."""
    pooling = parts["pooling"].copy()
    ours = pooling[pooling["engine"] == "ours"].set_index(
        ["document_length", "method", "pool_factor"]
    )["seconds"]
    keys = zip(pooling["document_length"], pooling["method"], pooling["pool_factor"], strict=True)
    pooling["times"] = pooling["seconds"] / [ours[key] for key in keys]
    lines = [
        "| method | engine | word pieces | documents/s PF2 | PF3 | PF4 | PF5 | PF6 | all five "
        "| ours faster at PF4 | at all five | spread PF2 | PF4 | PF6 | MiB |",
        "| --- | --- |" + " ---: |" * 13,
    ]
    for (length, method, engine), part in pooling.groupby(
        ["document_length", "method", "engine"], sort=False
    ):
        row = part.set_index("pool_factor")
        speeds = [f"{row['documents_per_second'][f]:,.0f}" for f in [*map(str, FACTORS), "2-6"]]
        by = ["" if engine == "ours" else f"{row['times'][f]:.1f} ×" for f in ("4", "2-6")]
        tight = [f"{row['spread'][f]:.2f}" for f in ("2", "4", "6")]
        memory = f"{row['peak_mib'].max():.0f}"
        cells = [method, engine, str(length), *speeds, *by, *tight, memory]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_ndcg_lines(parts["ndcg"]), "", *_search_lines(parts["search"], parts["sweep"])]
    lines += [
        "",
        "| training step with | tokens | seconds | times unpooled | of it pooling "
        "| pooling, ms a document | a batch of 256, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for _, row in parts["training"].iterrows():
        each = row["pooling_ms_per_document"]
        lines.append(
            f"| {row['method']} | {row['document_length']} | {row['seconds']:.2f} "
            f"| {row['ratio']:.2f} | {row['pooling_share']:.1%} | {each:.2f} "
            f"| {each * PAPER_BATCH:.0f} |"
        )
    lines += ["", *_quality_lines(parts["quality"])]
    lines += ["", "| target | aim | measured | |", "| --- | ---: | ---: | --- |"]
    for aim in aims:
        verdict = "met" if aim.met else "**not met**"
        lines.append(f"| {aim.name} | {aim.sign} {aim.limit:g} | {aim.value:.3g} | {verdict} |")
    return "\n".join(lines) + "\n"


def _ndcg_lines(ndcg: pd.DataFrame) -> list[str]:
    lines = [
        "| NDCG@10, docs:scipy | engine | " + " | ".join(f"PF{f}" for f in FACTORS) + " |",
        "| --- | --- |" + " ---: |" * len(FACTORS),
    ]
    for (method, engine), part in ndcg.groupby(["method", "engine"], sort=False):
        cells = [f"{value:.3f}" for value in part.set_index("pool_factor")["ndcg@10"][FACTORS]]
        lines.append(f"| {method} | {engine} | " + " | ".join(cells) + " |")
    return lines


def _search_lines(search: pd.DataFrame, sweep: pd.DataFrame) -> list[str]:
    """Searches, and an evaluation's two stages, with their seconds."""
    lines = [
        "| exact search, unpooled | queries | documents | seconds | ours is faster by "
        "| same top 10 | MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    ours = search.set_index("engine")["seconds"]["ours"]
    for _, row in search.iterrows():
        by = "" if row["engine"] == "ours" else f"{row['seconds'] / ours:.1f} ×"
        lines.append(
            f"| {row['engine']} | {row['queries']} | {row['documents']:,} | {row['seconds']:.3f} "
            f"| {by} | {row['same_top_10']:.0%} | {row['peak_mib']:.0f} |"
        )
    lines += ["", "| 500 documents and their queries | seconds |", "| --- | ---: |"]
    lines += [f"| {row['stage']} | {row['seconds']:.1f} |" for _, row in sweep.iterrows()]
    return lines


def _quality_lines(quality: pd.DataFrame) -> list[str]:
    """A line a collection: difference in NDCG@10 points and ratio of spreads, by factor."""
    factors = sorted(quality["pool_factor"].unique())
    heads = [f"PF{factor}" for factor in factors]
    lines = [
        "| k-means, ours less scikit-learn's, NDCG@10 points | " + " | ".join(heads) + " | mean "
        "| 95 % | spread, ours / theirs |",
        "| --- |" + " ---: |" * (len(factors) + 3),
    ]
    groups = [*quality.groupby("collection", sort=False), ("all", quality)]
    for name, part in groups:
        points = 100 * (part["ours"] - part["scikit-learn"]).groupby(part["pool_factor"]).mean()
        mean, low, high = quality_difference(part)
        spreads = part.drop_duplicates(["collection", "pool_factor"])
        ratio = (spreads["spread_ours"] / spreads["spread_scikit-learn"]).mean()
        cells = [f"{points[factor]:+.1f}" for factor in factors]
        cells += [f"{mean:+.2f}", f"[{low:+.2f}, {high:+.2f}]", f"{ratio:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def projection(training: pd.DataFrame) -> str:
    """What pooling's time here would be of a GPU's step, for steps of several lengths."""
    longest = training[training["document_length"] == training["document_length"].max()]
    lines = [
        f"Projection: pooling {PAPER_BATCH} documents (the paper's batch) in this time on the "
        "host, beside a GPU that waits for it, would be of a step of 0.25 / 0.5 / 1 s (assumed; "
        "the paper gives ratios only: span 3×, hierarchical 7–9×, k-means 10–13× unpooled):"
    ]
    for _, row in longest[longest["method"] != "none"].iterrows():
        seconds = row["pooling_ms_per_document"] * PAPER_BATCH / 1e3
        shares = " / ".join(f"{seconds / (seconds + step):.0%}" for step in (0.25, 0.5, 1.0))
        lines.append(f"  {row['method']:<13} {1e3 * seconds:6.0f} ms: {shares}")
    return "\n".join(lines)


def read_parts(folder: Path) -> dict[str, pd.DataFrame]:
    """The measurements that `make bench` left in `folder`, by the names of its functions."""
    missing = [name for name in PARTS if not (folder / f"{name}.csv").is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(f'{name}.csv' for name in missing)}: expected a folder of "
            "the bench's measurements. `make bench` writes one, runs/bench/."
        )
    parts = {name: pd.read_csv(folder / f"{name}.csv") for name in PARTS}
    parts["pooling"] = parts["pooling"].astype({"pool_factor": str})  # 2 … 6, and 2-6
    return parts


def write_report(folder: Path) -> str:
    """Write table.md, bench.png and bench.svg of the measurements in `folder`.

    Returns
    -------
    str
        The tables, and what follows for a GPU.
    """
    parts = read_parts(folder)
    text = tables(parts, targets(parts))
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(text, "utf-8")
    machine = json.loads((folder / "machine.json").read_text("utf-8"))
    save_bench(parts["pooling"], parts["scaling"], folder, machine)
    return f"{text}\n{projection(parts['training'])}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of measurements, as `make bench` leaves it")
    folder = parser.parse_args(arguments).folder
    try:
        write_report(folder)
    except UserError as error:
        raise SystemExit(str(error)) from None
    print(f"{folder}: table.md, bench.png and bench.svg")


if __name__ == "__main__":
    main()
