"""Side-by-side measurements of pooling, search and training steps (`make bench`).

Takes nothing but the installed packages: real token vectors come from the bundled encoder, before
any training, on the bundled collections. All contestants work on the same vectors with the same
number of threads, in turns; medians. Writes them to runs/bench/ (CSV), and a report of them.
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
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pylate import rank
from pylate.scores import colbert_scores
from threadpoolctl import threadpool_limits

from l2p_utils.bench_peers import Pooler, Vectors, poolers
from l2p_utils.bench_report import FACTORS, REFERENCE, write_report
from l2p_utils.collection import load_collection, subset
from l2p_utils.distillation import PooledDistillation
from l2p_utils.evaluation import Encoded, encode_collection, evaluate_collection, measure
from l2p_utils.execute import duration
from l2p_utils.files import atomic_path, versions, write_json
from l2p_utils.model import PooledColBERT, autocast, encode
from l2p_utils.pooling import pool_sweep
from l2p_utils.profile import BUNDLED, load_profile
from l2p_utils.search import exact_search
from l2p_utils.teacher import untrained_model

METHODS = ["span", "kmeans", "hierarchical"]
COLLECTIONS = ["docs:scipy", "docs:torch", "docs:numpy", "docs:pandas", "docs:sklearn"]


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
                    "collection": name if name.startswith(BUNDLED) else Path(name).name,
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
        Further collections for the comparison of quality, besides the bundled five.

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
    for name, part in parts.items():
        with atomic_path(folder / f"{name}.csv") as temporary:
            part.to_csv(temporary, index=False)
    machine = {"processor": processor(), "threads": threads, "versions": versions()}
    write_json(folder / "machine.json", machine)
    print(write_report(folder))
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
