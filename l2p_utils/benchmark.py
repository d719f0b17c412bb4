"""Pooling, search and training steps timed beside the libraries that people use (notebook 10).

Token vectors come from the bundled encoder, before any training, on the bundled collections. All
contestants work on the same vectors with the same number of threads, in turns; medians count.
``python -m l2p_utils.benchmark`` redraws figures/bench from data/bench.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from timeit import timeit
from typing import Any

import fastcluster
import matplotlib
import numpy as np
import pandas as pd
import torch
from fastkmeans import FastKMeans
from pylate import models, rank
from pylate.scores import colbert_scores
from scipy.cluster import hierarchy
from threadpoolctl import threadpool_limits

from l2p_utils.collection import load_collection, subset
from l2p_utils.evaluation import Encoded, encode_collection, evaluate_collection
from l2p_utils.evaluation import measure as measure_ranking
from l2p_utils.figures import COLOURS, STYLE, NotebookFigure, save_figure
from l2p_utils.files import ROOT, atomic_path, read_json, versions, write_json
from l2p_utils.model import PooledColBERT, autocast, encode
from l2p_utils.pooling import pool, pool_padded, pool_sweep
from l2p_utils.profile import load_profile, slug
from l2p_utils.search import exact_search
from l2p_utils.statistics import interval
from l2p_utils.teacher import untrained_model
from l2p_utils.training import PooledDistillation

Vectors = list[torch.Tensor]
METHODS = ("span", "kmeans", "hierarchical")
FACTORS = [2, 3, 4, 5, 6]
REFERENCE = {"span": "loop over groups", "kmeans": "scikit-learn", "hierarchical": "PyLate"}
COLLECTIONS = ["docs:scipy", "docs:torch", "docs:numpy", "docs:pandas", "docs:sklearn"]
STORED = ROOT / "data" / "bench"
PAPER_BATCH = 16 * 16  # documents in one of the paper's training batches

# ---------------------------------------------------------------- contestants


@dataclass(frozen=True)
class Pooler:
    """Pools lists of (tokens, dim) tensors with the first token kept, as `pool` does."""

    method: str
    engine: str
    pool: Callable[[Vectors, int], Vectors]
    sweep: Callable[[Vectors, list[int]], dict[int, Vectors]] | None = None  # shares work


def poolers() -> list[Pooler]:
    """Ours, then the libraries', with their own defaults; each method's reference comes first."""
    bind, pylate = functools.partial, models.ColBERT.pool_embeddings_hierarchical
    found = [
        Pooler(m, "ours", bind(pool, pool_method=m), bind(pool_sweep, pool_method=m))
        for m in METHODS
    ]
    found += [
        Pooler("span", "loop over groups", span_loop),
        Pooler("kmeans", "scikit-learn", bind(pool, pool_method="kmeans", use_sklearn=True)),
        Pooler("kmeans", "fastkmeans", fastkmeans_pool),
        Pooler("hierarchical", "PyLate", lambda docs, f: pylate(None, docs, pool_factor=f)),
    ]
    for engine, library in {"SciPy": hierarchy, "fastcluster": fastcluster}.items():
        sweep = bind(linkage_sweep, linkage=library.linkage)
        single = bind(lambda sweep, docs, f: sweep(docs, [f])[f], sweep)
        found.append(Pooler("hierarchical", engine, single, sweep))
    return found


def span_loop(documents: Vectors, factor: int) -> Vectors:
    """A Python loop over documents and groups."""
    return [
        torch.cat([document[:1], *(group.mean(0, True) for group in document[1:].split(factor))])
        for document in documents
    ]


def fastkmeans_pool(documents: Vectors, factor: int) -> Vectors:
    """fastkmeans on the CPU, one document at a time."""
    pooled = []
    for document in documents:
        tokens = document[1:].numpy()
        kmeans = FastKMeans(tokens.shape[1], max(len(tokens) // factor, 1), gpu=False, seed=42)
        kmeans.train(tokens)
        pooled.append(_means(document, np.asarray(kmeans.predict(tokens))))
    return pooled


def linkage_sweep(documents: Vectors, factors: list[int], linkage: Callable) -> dict[int, Vectors]:
    """Ward's linkage of the condensed 1 - cosine matrix, a document at a time; SciPy's cuts."""
    pooled: dict[int, Vectors] = {factor: [] for factor in factors}
    for document in documents:
        tokens = document[1:].numpy()
        distances = np.maximum(1 - tokens @ tokens.T, 0)[np.triu_indices(len(tokens), k=1)]
        tree = linkage(distances, method="ward")
        for factor in factors:
            labels = hierarchy.fcluster(tree, max(len(tokens) // factor, 1), criterion="maxclust")
            pooled[factor].append(_means(document, labels))
    return pooled


def _means(document: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    index = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    sums = torch.zeros(int(index.max()) + 1, document.shape[1]).index_add_(0, index, document[1:])
    return torch.cat([document[:1], sums / torch.bincount(index)[:, None]])


# ---------------------------------------------------------------- instruments


def in_turns(
    contestants: Mapping[Any, Callable[[], Any]], repetitions: int, warm: bool = True
) -> dict[Any, float]:
    """Median seconds of each, measured in turns: what disturbs the machine disturbs all alike."""
    runs = contestants.values()
    for run in runs if warm else ():
        run()
    seconds = [[timeit(run, number=1) for run in runs] for _ in range(repetitions)]
    return dict(zip(contestants, np.median(seconds, axis=0).tolist(), strict=True))


def inertia(documents: Vectors, pooled: Vectors) -> float:
    """Squared distances of tokens to the nearest pooled vector: summed, averaged over documents.

    The first token is protected and left out.
    """
    distances = [
        torch.cdist(document[1:].double(), vectors[1:].double()).min(dim=1).values
        for document, vectors in zip(documents, pooled, strict=True)
    ]
    return float(torch.cat(distances).square().sum()) / len(documents)


def peak_memory(run: Callable[[], Any]) -> float:
    """MiB that a call needs beyond what is in use before it; NaN where Linux does not tell."""

    def status(key: str) -> int:
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls freed goes back first
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
        run()
        return max(status("VmHWM") - before, 0) / 1024
    except (OSError, AttributeError):
        return float("nan")


def processor() -> str:
    """The processor's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.is_file() and re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    return found[1] if found else platform.processor() or platform.machine()


# ---------------------------------------------------------------- measurements


def bench_pooling(vectors: Mapping[int, Vectors], repetitions: int = 3) -> pd.DataFrame:
    """Speed, inertia and memory of every contestant, by document length in word pieces.

    Besides a row per factor there is one of all factors, `2-6`: a single call where a contestant
    can share work, else the sum of five.
    """
    bind, rows = functools.partial, []
    for length, documents in vectors.items():
        runs: dict[tuple, Callable] = {}
        for p in poolers():
            runs |= {(p.method, p.engine, str(f)): bind(p.pool, documents, f) for f in FACTORS}
            if p.sweep:
                runs[p.method, p.engine, "2-6"] = bind(p.sweep, documents, FACTORS)
        seconds = in_turns(runs, repetitions)
        for p in poolers():
            total = sum(seconds[p.method, p.engine, str(factor)] for factor in FACTORS)
            seconds.setdefault((p.method, p.engine, "2-6"), total)
        for (method, engine, factor), value in seconds.items():
            row = {"document_length": length, "method": method, "engine": engine}
            row |= {"pool_factor": factor, "documents": len(documents), "seconds": value}
            row["documents_per_second"] = len(documents) / value
            if factor != "2-6":
                run = runs[method, engine, factor]
                row |= {"inertia": inertia(documents, run()), "peak_mib": peak_memory(run)}
            rows.append(row)
    return pd.DataFrame(rows)


def bench_scaling(vectors: Vectors, repetitions: int = 3) -> pd.DataFrame:
    """Seconds per document at factor 4, by tokens (16 documents) and by number of documents."""
    line = torch.cat(vectors)
    cases = {("tokens", n): list(line[: 16 * n].split(n)) for n in (64, 128, 256, 512, 1024)}
    cases |= {("documents", n): list(line[: n * 96].split(96)) for n in (16, 64, 256)}
    chosen = [p for p in poolers() if p.engine in ("ours", REFERENCE[p.method])]
    rows = []
    for (axis, size), documents in cases.items():
        runs = {p: functools.partial(p.pool, documents, 4) for p in chosen}
        for pooler, value in in_turns(runs, repetitions).items():
            rows.append((axis, size, pooler.method, pooler.engine, value / len(documents)))
    columns = ["axis", "size", "method", "engine", "seconds_per_document"]
    return pd.DataFrame(rows, columns=columns)


def bench_search(encoded: Encoded, queries: int = 60, repetitions: int = 9) -> pd.DataFrame:
    """Ours and PyLate's two searches of the same unpooled vectors: seconds, share of equal tops."""
    asked, documents, ids = encoded.queries[:queries], encoded.documents, encoded.document_ids

    def scoring() -> list[list[str]]:
        padded = [torch.nn.utils.rnn.pad_sequence(v, batch_first=True) for v in (asked, documents)]
        tops = colbert_scores(*padded).topk(10, dim=1).indices  # zeros pad, as in PyLate
        return [[ids[i] for i in row] for row in tops.tolist()]

    runs = {
        "ours": lambda: exact_search(asked, documents, ids, 10).documents,
        "PyLate rank.rerank": lambda: [
            [hit["id"] for hit in hits[:10]]
            for hits in rank.rerank([ids] * len(asked), asked, [documents] * len(asked))
        ],
        "PyLate colbert_scores": scoring,
    }
    seconds, expected, rows = in_turns(runs, repetitions), runs["ours"](), []
    for engine, run in runs.items():
        same = [list(a) == list(b) for a, b in zip(run(), expected, strict=True)]
        sizes = (len(asked), len(documents))
        rows.append((engine, *sizes, seconds[engine], float(np.mean(same)), peak_memory(run)))
    columns = ["engine", "queries", "documents", "seconds", "same_top_10", "peak_mib"]
    return pd.DataFrame(rows, columns=columns)


def bench_sweep(model: PooledColBERT, encoded: Encoded) -> pd.DataFrame:
    """Encoding a collection once, beside all 1 + 3 × 5 settings from vectors to NDCG@10."""
    found = exact_search(encoded.queries, encoded.documents, encoded.document_ids)
    measure_ranking(encoded.collection, found)  # ranx compiles itself when it is first used
    runs = {
        "encode": lambda: encode_collection(model, encoded.collection, progress=False),
        "all settings": lambda: evaluate_collection(encoded, METHODS, [1, *FACTORS]),
    }
    seconds = in_turns(runs, repetitions=2, warm=False)
    return pd.DataFrame(seconds.items(), columns=["stage", "seconds"])


def bench_training(
    model: PooledColBERT, texts: Sequence[str], queries: Sequence[str], repetitions: int
) -> pd.DataFrame:
    """Seconds of a 16-way distillation step, unpooled and with each method, and of its pooling.

    Two queries with 16 documents each. Every step pools, at a factor drawn from 2 to 6, the same
    for all methods. The pooling is timed by itself, on the step's vectors (its forward pass).
    """
    documents = model.tokenize(list(texts[:32]), is_query=False)
    batch = [model.tokenize(list(queries[:2]), is_query=True), documents]
    labels = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # changes nothing
    losses = {"none": PooledDistillation(model)}
    losses |= {method: PooledDistillation(model, method, FACTORS) for method in METHODS}

    def step(method: str) -> None:
        with autocast("auto", model.device):
            value = losses[method](batch, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[method].step += 1  # which the factor is drawn by

    model.train()
    seconds = in_turns({m: functools.partial(step, m) for m in losses}, repetitions)
    model.eval()
    with torch.inference_mode():
        vectors = model(dict(documents))["token_embeddings"].float()
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    mask = documents["attention_mask"].bool()
    runs = {
        (method, factor): functools.partial(pool_padded, vectors, mask, factor, method)
        for method, factor in itertools.product(METHODS, FACTORS)
    }
    pooling = in_turns(runs, repetitions)
    parts = np.array([np.mean([pooling.get((m, f), 0.0) for f in FACTORS]) for m in seconds])
    table = pd.DataFrame(seconds.items(), columns=["method", "seconds"])
    table.insert(0, "document_length", model.document_length)
    table["ratio"] = table["seconds"] / seconds["none"]
    table["pooling_share"] = parts / table["seconds"]
    return table.assign(pooling_ms_per_document=1e3 * parts / len(vectors))


def bench_ndcg(encoded: Encoded) -> pd.DataFrame:
    """Mean NDCG@10 with every contestant's pooled vectors: one row per engine and factor."""
    rows = []
    for pooler, factor in itertools.product(poolers(), FACTORS):
        pooled = pooler.pool(encoded.documents, factor)
        found = exact_search(encoded.queries, pooled, encoded.document_ids)
        ndcg = measure_ranking(encoded.collection, found)["ndcg@10"].mean()
        rows.append((pooler.method, pooler.engine, factor, ndcg))
    return pd.DataFrame(rows, columns=["method", "engine", "pool_factor", "ndcg@10"])


def bench_quality(model: PooledColBERT, collections: Sequence[str]) -> pd.DataFrame:
    """NDCG@10 of every query with our k-means and with scikit-learn's, and both inertias."""
    tables = []
    for name in collections:
        collection = subset(load_collection(name), 100, 300)
        encoded = encode_collection(model, collection, progress=False)
        columns = {}
        for engine, use_sklearn in {"ours": False, "scikit-learn": True}.items():
            _, values = evaluate_collection(encoded, ["kmeans"], FACTORS, use_sklearn=use_sklearn)
            values = values[values["pool_method"] == "kmeans"]
            values = values.set_index(["pool_factor", "query_id"])
            pooled = pool_sweep(encoded.documents, FACTORS, "kmeans", use_sklearn=use_sklearn)
            tightness = {f: inertia(encoded.documents, part) for f, part in pooled.items()}
            factors = values.index.get_level_values("pool_factor")
            columns |= {engine: values["ndcg@10"], f"inertia_{engine}": factors.map(tightness)}
        table = pd.DataFrame(columns).reset_index()
        table.insert(0, "collection", name if name.startswith("docs:") else slug(name))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def measure(folder: str | Path, threads: int = 1, collections: Sequence[str] = ()) -> Path:
    """Measure everything (about 8 minutes) and write it to `folder` as CSV files.

    `threads` is that of every contestant: torch, BLAS and OpenMP. K-means is compared on the five
    bundled collections and on `collections`.
    """
    profile = load_profile("quick").model_copy(update={"name": "bench"})
    folder, before = Path(folder), torch.get_num_threads()
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        model = untrained_model(profile)
        collection = subset(load_collection("docs:scipy"), None, 1000)
        encoded, half, few = (
            encode_collection(model, part, progress=False)
            for part in (collection, subset(collection, None, 500), subset(collection, 100, 300))
        )
        texts, queries = (list(part.values()) for part in (collection.corpus, collection.queries))
        longest = sorted(texts, key=len, reverse=True)  # all of the first fill the length
        model.document_length = 300
        longer = encode(model, texts[:128], False)

        def training() -> pd.DataFrame:
            tables = []
            for model.document_length, repetitions in ((128, 6), (300, 4)):
                tables.append(bench_training(model, longest, queries, repetitions))
            model.document_length = profile.model.document_length
            return pd.concat(tables)

        measurements = {
            "pooling": lambda: bench_pooling({96: encoded.documents[:256], 300: longer}),
            "scaling": lambda: bench_scaling(longer),
            "search": lambda: bench_search(encoded),
            "training": training,
            "sweep": lambda: bench_sweep(model, half),
            "ndcg": lambda: bench_ndcg(few),
            "quality": lambda: bench_quality(model, [*COLLECTIONS, *collections]),
        }
        start, parts = time.perf_counter(), {}
        for name, run in measurements.items():
            print(f"{time.perf_counter() - start:5.0f} s  {name}", flush=True)
            parts[name] = run()
    torch.set_num_threads(before)
    for name, part in parts.items():
        with atomic_path(folder / f"{name}.csv") as temporary:
            part.to_csv(temporary, index=False)
    machine = {"processor": processor(), "threads": threads, "versions": versions()}
    write_json(folder / "machine.json", machine)
    return folder


# ---------------------------------------------------------------- tables and figures


def read(folder: str | Path = STORED) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """The measurements that `measure` left in `folder`, by name, and the machine."""
    folder = Path(folder)
    parts = {file.stem: pd.read_csv(file) for file in sorted(folder.glob("*.csv"))}
    parts["pooling"] = parts["pooling"].astype({"pool_factor": str})  # 2 … 6, and 2-6
    return parts, read_json(folder / "machine.json")


def times_faster(pooling: pd.DataFrame) -> pd.DataFrame:
    """Our speed by each contestant's: a row per length, method and engine, a column per factor."""
    keys = ["document_length", "method", "engine"]
    speed = pooling.pivot_table("documents_per_second", keys, "pool_factor", sort=False)
    ours = speed.xs("ours", level="engine").reindex(speed.index.droplevel("engine"))
    return (ours.to_numpy() / speed).drop("ours", level="engine")


def quality_table(quality: pd.DataFrame) -> pd.DataFrame:
    """NDCG@10 points of our k-means above scikit-learn's, and the ratio of the inertias.

    The 95 % interval is of queries, with their values at all factors averaged first: those are
    not independent.
    """
    rows = {}
    for name, part in [*quality.groupby("collection", sort=False), ("all", quality)]:
        points = 100 * (part["ours"] - part["scikit-learn"]).groupby(part["pool_factor"]).mean()
        means = part.groupby(["collection", "query_id"])[["ours", "scikit-learn"]].mean()
        found = interval([100 * (means["ours"] - means["scikit-learn"])])
        each = part.drop_duplicates(["collection", "pool_factor"])
        ratio = (each["inertia_ours"] / each["inertia_scikit-learn"]).mean()
        rows[name] = {f"PF{factor}": f"{value:+.1f}" for factor, value in points.items()}
        rows[name]["mean"] = f"{found.mean:+.2f}"
        rows[name]["95 %"] = f"[{found.low:+.2f}, {found.high:+.2f}]"
        rows[name] |= {"inertia, ours / theirs": f"{ratio:.3f}"}
    return pd.DataFrame(rows).T.rename_axis("collection")


def draw(parts: Mapping[str, pd.DataFrame], machine: Mapping[str, Any]) -> NotebookFigure:
    """Above: documents per second, a panel per document length. Below: how time grows at PF4."""
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    with matplotlib.rc_context(STYLE):
        figure = NotebookFigure(figsize=(13, 9.4), layout="constrained")
        panels = figure.subplots(2, 2)
        lengths = parts["pooling"].groupby("document_length")
        for axes, (length, part) in zip(panels[0], lengths, strict=False):
            _draw_speeds(axes, part)
            count = part["documents"].iloc[0]
            axes.set_title(f"Speed: {count} documents of up to {length} word pieces")
        growth = parts["scaling"].groupby("axis", sort=False)
        for axes, (axis, part) in zip(panels[1], growth, strict=False):
            _draw_growth(axes, part, axis)
        lines, labels = panels[1][0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=len(lines), fontsize=9)
        title = f"Token pooling beside other libraries: {threads}, {machine['processor']}; medians"
        marks = "above: full mark PF4, hollow mark all of PF 2–6; below: PF4"
        figure.suptitle(f"{title}\n{marks}", fontsize=12)
    figure.alt = (
        "Documents pooled per second by method and library, and milliseconds per document as "
        "documents get longer and more. The table of speeds has the numbers."
    )
    return figure


def _draw_speeds(axes, part: pd.DataFrame) -> None:
    keys = ["method", "engine"]
    speeds = part.pivot_table("documents_per_second", keys, "pool_factor", sort=False).iloc[::-1]
    for place, ((method, engine), row) in enumerate(speeds.iterrows()):
        look, marker = {"color": COLOURS[method]}, "s" if engine == "ours" else "o"
        axes.plot([row["2-6"], row["4"]], [place] * 2, **look, alpha=0.4, zorder=1)
        axes.plot(row["4"], place, marker, **look, markersize=8)
        axes.plot(row["2-6"], place, marker, **look, markersize=8, markerfacecolor="white")
        offset = {"xytext": (8, -4), "textcoords": "offset points"}
        axes.annotate(f"{row['4']:,.0f}", (row["4"], place), **offset, fontsize=9)
    axes.set_yticks(range(len(speeds)), [f"{method} · {engine}" for method, engine in speeds.index])
    label = "documents per second (log scale)"
    axes.set(xscale="log", xlim=(None, speeds["4"].max() * 4), xlabel=label)


def _draw_growth(axes, growth: pd.DataFrame, axis: str) -> None:
    for (method, engine), part in growth.groupby(["method", "engine"], sort=False):
        line, marker = ("-", "s") if engine == "ours" else ("--", "o")
        look = {"color": COLOURS[method], "linestyle": line, "marker": marker}
        milliseconds = 1e3 * part["seconds_per_document"]
        axes.plot(part["size"], milliseconds, **look, label=f"{method} · {engine}")
    sizes = sorted(growth["size"].unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, sizes)
    axes.set(yscale="log", ylabel="milliseconds per document (log scale)")
    by_length = axis == "tokens"
    axes.set_xlabel("tokens in each of 16 documents" if by_length else "documents of 96 tokens")
    axes.set_title("Growth with " + ("document length" if by_length else "number of documents"))


def save(folder: str | Path = ROOT / "figures" / "bench") -> None:
    """Redraw bench.png and bench.svg from data/bench."""
    save_figure(draw(*read()), folder, "bench")


if __name__ == "__main__":
    save()
