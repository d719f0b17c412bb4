"""Side-by-side measurements of pooling, search and training steps (`make bench`).

Takes nothing but the installed packages: real token vectors come from the embedded encoder, before
any training, on the embedded collections. All contestants work on the same vectors with the same
number of threads, in turns; medians. Writes tables (CSV, Markdown) and a figure to runs/bench/.
``python -m l2p_utils.bench [--threads N] [--collections FOLDER …]``; `make bench COLLECTIONS="…"`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pylate import rank
from pylate.scores import colbert_scores
from threadpoolctl import threadpool_limits

from l2p_utils.bench_figure import save_bench
from l2p_utils.bench_peers import Pooler, Vectors, poolers
from l2p_utils.collection import load_collection
from l2p_utils.distillation import PooledDistillation
from l2p_utils.evaluation import (
    Encoded,
    autocast,
    encode,
    encode_collection,
    evaluate_collection,
    measure,
    subset,
    versions,
)
from l2p_utils.execute import duration
from l2p_utils.files import atomic_path, write_json
from l2p_utils.mining import untrained_model
from l2p_utils.model import PooledColBERT
from l2p_utils.pooling import pool_sweep
from l2p_utils.profile import EMBEDDED, load_profile
from l2p_utils.results import paired_bootstrap
from l2p_utils.search import exact_search

FACTORS = [2, 3, 4, 5, 6]
METHODS = ["span", "kmeans", "hierarchical"]
REFERENCE = {"span": "loop over groups", "kmeans": "scikit-learn", "hierarchical": "PyLate"}
COLLECTIONS = ["docs:scipy", "docs:torch", "docs:numpy", "docs:pandas", "docs:sklearn"]
PAPER_BATCH = 16 * 16  # documents in one of the paper's training batches


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


def in_turns(
    contestants: Mapping[Any, Callable[[], Any]], repetitions: int, warm: bool = True
) -> dict[Any, float]:
    """Median seconds of each, measured in turns: what disturbs the machine disturbs all alike."""
    seconds: dict[Any, list[float]] = {name: [] for name in contestants}
    if warm:
        for run in contestants.values():
            run()
    for _ in range(repetitions):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def spread(documents: Vectors, pooled: Vectors) -> float:
    """Mean over documents of the squared distances of tokens to the nearest pooled vector, summed.

    The first token is protected and left out. For k-means that has converged this is its inertia.
    """
    total = 0.0
    for document, vectors in zip(documents, pooled, strict=True):
        squared = torch.cdist(document[1:].double(), vectors[1:].double()).square()
        total += float(squared.min(dim=1).values.sum()) if squared.numel() else 0.0
    return total / len(documents)


def peak_memory(run: Callable[[], Any]) -> float:
    """MiB that a call needs beyond what is in use before it; NaN where Linux does not tell."""
    try:
        # What earlier calls left to the allocator goes back first, then the peak starts anew.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return max(_status("VmHWM") - before, 0) / 1024
    except (OSError, AttributeError):
        return float("nan")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def bench_pooling(vectors: Mapping[int, Vectors], repetitions: int = 3) -> pd.DataFrame:
    """Every contestant at every factor, and sweeps.

    Parameters
    ----------
    vectors
        Document length in word pieces → token vectors.

    Returns
    -------
    pandas.DataFrame
        One row a length, method, engine and factor (`2-6`: all five, from one tree where a
        contestant has a `sweep`, else one after another): seconds, documents_per_second, spread,
        peak_mib (beyond what was in use before; of single factors only).
    """
    rows, contestants = [], poolers()
    for length, documents in vectors.items():
        runs: dict[tuple, Callable] = {}
        for pooler in contestants:
            for factor in FACTORS:
                runs[pooler, str(factor)] = _bind(pooler.pool, documents, factor)
            if pooler.sweep:
                runs[pooler, "2-6"] = _bind(pooler.sweep, documents, FACTORS)
        seconds = in_turns(runs, repetitions)
        for (pooler, factor), value in seconds.items():
            tightness = spread(documents, runs[pooler, factor]()) if factor != "2-6" else np.nan
            peak = peak_memory(runs[pooler, factor]) if factor != "2-6" else np.nan
            rows.append(
                _pooling_row(length, pooler, factor, len(documents), value, tightness)
                | {"peak_mib": peak}
            )
        for pooler in contestants:
            if not pooler.sweep:
                total = sum(seconds[pooler, str(factor)] for factor in FACTORS)
                rows.append(_pooling_row(length, pooler, "2-6", len(documents), total, np.nan))
    return pd.DataFrame(rows)


def _bind(function: Callable, *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def _pooling_row(
    length: int, pooler: Pooler, factor: str, documents: int, seconds: float, tightness: float
) -> dict[str, Any]:
    return {
        "document_length": length,
        "method": pooler.method,
        "engine": pooler.engine,
        "pool_factor": factor,
        "documents": documents,
        "seconds": seconds,
        "documents_per_second": documents / seconds,
        "spread": tightness,
    }


def bench_scaling(vectors: Vectors, repetitions: int = 3) -> pd.DataFrame:
    """Seconds a document at pool factor 4, by tokens (16 documents) and by number of documents."""
    line = torch.cat(vectors)
    cases = {("tokens", n): list(line[: 16 * n].split(n)) for n in (64, 128, 256, 512, 1024)}
    cases |= {("documents", n): list(line[: n * 96].split(96)) for n in (16, 64, 256)}
    chosen = [p for p in poolers() if p.engine in ("ours", REFERENCE[p.method])]
    rows = []
    for (axis, size), documents in cases.items():
        runs = {pooler: _bind(pooler.pool, documents, 4) for pooler in chosen}
        for pooler, value in in_turns(runs, repetitions).items():
            rows.append(
                {
                    "axis": axis,
                    "size": size,
                    "method": pooler.method,
                    "engine": pooler.engine,
                    "seconds_per_document": value / len(documents),
                }
            )
    return pd.DataFrame(rows)


def bench_search(encoded: Encoded, queries: int = 60, repetitions: int = 9) -> pd.DataFrame:
    """Ours and PyLate's two ways on the same unpooled embeddings: seconds, share of equal tops."""
    asked, documents = encoded.queries[:queries], encoded.documents
    ids = encoded.document_ids
    runs = {
        "ours": lambda: exact_search(asked, documents, ids, 10).documents,
        "PyLate rank.rerank": lambda: [
            [hit["id"] for hit in hits[:10]]
            for hits in rank.rerank([ids] * len(asked), asked, [documents] * len(asked))
        ],
        "PyLate colbert_scores": lambda: _tops(colbert_scores(*_padded(asked, documents)), ids),
    }
    seconds = in_turns(runs, repetitions)
    expected = runs["ours"]()
    rows = []
    for engine, value in seconds.items():
        same = [a == b for a, b in zip(runs[engine](), expected, strict=True)]
        peak = peak_memory(runs[engine])
        rows.append(
            {
                "engine": engine,
                "queries": len(asked),
                "documents": len(documents),
                "seconds": value,
                "same_top_10": float(np.mean(same)),
                "peak_mib": peak,
            }
        )
    return pd.DataFrame(rows)


def _padded(queries: Vectors, documents: Vectors) -> tuple[torch.Tensor, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence  # as PyLate's evaluators pad with zeros
    return pad(queries, batch_first=True), pad(documents, batch_first=True)


def _tops(scores: torch.Tensor, ids: Sequence[str]) -> list[list[str]]:
    return [[ids[i] for i in row] for row in scores.topk(10, dim=1).indices.tolist()]


def bench_sweep(model: PooledColBERT, encoded: Encoded, texts: Sequence[str]) -> pd.DataFrame:
    """Encoding a collection once, beside all 1 + 3 × 5 settings from stored vectors to NDCG@10."""
    found = exact_search(encoded.queries, encoded.documents, encoded.document_ids)
    measure(encoded.collection, found)  # ranx compiles itself when it is first used
    queries = list(encoded.collection.queries.values())
    seconds = in_turns(
        {
            "encode": lambda: (encode(model, texts, False), encode(model, queries, True)),
            "all settings": lambda: evaluate_collection(encoded, METHODS, [1, *FACTORS]),
        },
        repetitions=2,
        warm=False,
    )
    return pd.DataFrame([{"stage": stage, "seconds": value} for stage, value in seconds.items()])


def bench_training(
    model: PooledColBERT, texts: Sequence[str], queries: Sequence[str], repetitions: int
) -> pd.DataFrame:
    """Seconds of one 16-way distillation step, unpooled and with each method; its part in pooling.

    Two queries with 16 documents each, a pool factor drawn from 2 to 6 in every step, the same for
    all methods: every step pools, while of a training over 1 to 6 one step in six does not. The
    part in pooling is that of the forward pass.
    """
    batch = [
        model.tokenize(list(queries[:2]), is_query=True),
        model.tokenize(list(texts[:32]), is_query=False),
    ]
    labels = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    losses = {"none": PooledDistillation(model)}
    losses |= {method: PooledDistillation(model, method, FACTORS) for method in METHODS}
    drawn = {"step": 0}

    def step(method: str) -> None:
        loss = losses[method]
        loss.step = drawn["step"]
        drawn["step"] += method == METHODS[-1]  # the last of a round
        with autocast("auto", model.device):
            value = loss(batch, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    for method in losses:
        step(method)  # warm
    drawn["step"] = 0
    for loss in losses.values():
        loss.pooling_seconds = 0.0
    runs = {method: _bind(step, method) for method in losses}
    seconds = in_turns(runs, repetitions, warm=False)
    model.eval()
    return pd.DataFrame(
        [
            {
                "document_length": model.document_length,
                "method": method,
                "seconds": value,
                "ratio": value / seconds["none"],
                "pooling_share": losses[method].pooling_seconds / repetitions / value,
                "pooling_ms_per_document": losses[method].pooling_seconds / repetitions / 32 * 1e3,
            }
            for method, value in seconds.items()
        ]
    )


def bench_ndcg(encoded: Encoded) -> pd.DataFrame:
    """Mean NDCG@10 with every contestant's pooled vectors: one row an engine and factor."""
    rows = []
    for pooler in poolers():
        for factor in FACTORS:
            pooled = pooler.pool(encoded.documents, factor)
            found = exact_search(encoded.queries, pooled, encoded.document_ids)
            ndcg = measure(encoded.collection, found)["ndcg@10"].mean()
            where = {"method": pooler.method, "engine": pooler.engine, "pool_factor": factor}
            rows.append({**where, "ndcg@10": ndcg})
    return pd.DataFrame(rows)


def bench_quality(
    model: PooledColBERT, collections: Sequence[str], progress: Callable[[str], None]
) -> pd.DataFrame:
    """NDCG@10 of every query with our k-means and with scikit-learn's, and both spreads."""
    rows = []
    for name in collections:
        progress(f"  {name}")
        collection = subset(load_collection(name), 100, 300)
        encoded = encode_collection(model, collection, progress=False)
        values, spreads = {}, {}
        for engine, use_sklearn in {"ours": False, "scikit-learn": True}.items():
            _, values[engine] = evaluate_collection(
                encoded, ["kmeans"], FACTORS, use_sklearn=use_sklearn
            )
            pooled = pool_sweep(encoded.documents, FACTORS, "kmeans", use_sklearn=use_sklearn)
            spreads[engine] = {f: spread(encoded.documents, p) for f, p in pooled.items()}
        ours, theirs = values["ours"], values["scikit-learn"]
        joined = ours.merge(theirs, on=["collection", "query_id", "pool_method", "pool_factor"])
        joined = joined[joined["pool_method"] == "kmeans"]
        for factor, part in joined.groupby("pool_factor"):
            rows += [
                {
                    "collection": name if name.startswith(EMBEDDED) else Path(name).name,
                    "pool_factor": factor,
                    "query_id": query,
                    "ours": a,
                    "scikit-learn": b,
                    "spread_ours": spreads["ours"][factor],
                    "spread_scikit-learn": spreads["scikit-learn"][factor],
                }
                for query, a, b in zip(
                    part["query_id"], part["ndcg@10_x"], part["ndcg@10_y"], strict=True
                )
            ]
    return pd.DataFrame(rows)


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


@contextlib.contextmanager
def limited(threads: int) -> Iterator[None]:
    """torch, BLAS and OpenMP on `threads` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)


def run(threads: int = 1, collections: Sequence[str] = ()) -> Path:
    """Measure everything and write it to runs/bench/.

    Parameters
    ----------
    threads
        Of every contestant.
    collections
        Further collections for the comparison of quality, besides the embedded five.

    Returns
    -------
    pathlib.Path
        The folder.
    """
    start = time.perf_counter()
    profile = load_profile("quick").model_copy(update={"name": "bench"})
    folder = profile.folder
    folder.mkdir(parents=True, exist_ok=True)

    def note(what: str) -> None:
        print(f"{duration(time.perf_counter() - start):>12}  {what}", flush=True)

    parts = {}
    with limited(threads):
        note("vectors of docs:scipy")
        model = untrained_model(profile)
        collection = subset(load_collection("docs:scipy"), None, 1000)
        texts = list(collection.corpus.values())
        encoded = encode_collection(model, collection, progress=False)
        model.document_length = 300
        longer = encode(model, texts[:128], False)
        note("pooling, contestants in turns")
        parts["pooling"] = bench_pooling({96: encoded.documents[:256], 300: longer})
        note("how time grows")
        parts["scaling"] = bench_scaling(longer)
        note("exact search")
        parts["search"] = bench_search(encoded)
        steps = []
        for length, repetitions in ((128, 6), (300, 4)):
            note(f"training steps, documents of {length} tokens")
            model.document_length = length
            longest = sorted(texts, key=len, reverse=True)  # all of them fill the length
            steps.append(
                bench_training(model, longest, list(collection.queries.values()), repetitions)
            )
        parts["training"] = pd.concat(steps, ignore_index=True)
        model.document_length = profile.model.document_length
        note("a sweep beside encoding")
        half = subset(collection, None, 500)
        some = encode_collection(model, half, progress=False)
        parts["sweep"] = bench_sweep(model, some, list(half.corpus.values()))
        note("NDCG with every contestant's vectors")
        few = subset(collection, 100, 300)
        parts["ndcg"] = bench_ndcg(encode_collection(model, few, progress=False))
        note("quality: k-means, ours and scikit-learn's")
        parts["quality"] = bench_quality(model, [*COLLECTIONS, *collections], note)
    aims = targets(parts)
    for name, part in parts.items():
        with atomic_path(folder / f"{name}.csv") as temporary:
            part.to_csv(temporary, index=False)
    text = tables(parts, aims)
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(text, "utf-8")
    machine = {"processor": processor(), "threads": threads, "versions": versions()}
    save_bench(parts["pooling"], parts["scaling"], folder, machine)
    write_json(folder / "machine.json", machine)
    difference, low, high = quality_difference(parts["quality"])
    print(text)
    print(projection(parts["training"]))
    print(
        f"NDCG@10, our k-means less scikit-learn's, PF 2–6: {difference:+.2f} points "
        f"[{low:+.2f}, {high:+.2f}]"
    )
    print(f"{processor()}, {threads} thread(s); took {duration(time.perf_counter() - start)}")
    print(f"Tables and figure: {folder}")
    return folder


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="l2p_utils.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="of every contestant (1)")
    parser.add_argument("--collections", nargs="*", default=[], help="BEIR folders, for quality")
    chosen = parser.parse_args()
    run(chosen.threads, chosen.collections)


if __name__ == "__main__":
    main()
