"""Pooling, search and training steps timed beside the libraries that people use (notebook 10).

Token vectors come from the bundled encoder, before any training, on the bundled collections. All
contestants work on the same vectors with the same number of threads, in turns; medians count.
Libraries that do not fit into this environment take part from environments of their own.
``python -m l2p_utils.benchmark`` redraws figures/bench from data/bench.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import itertools
import os
import pickle
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
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
from scipy.spatial.distance import squareform
from threadpoolctl import threadpool_limits

from l2p_utils.collection import load_collection, subset
from l2p_utils.evaluation import Encoded, encode_collection, evaluate_collection
from l2p_utils.figures import COLOURS, MODEL_COLOURS, STYLE, NotebookFigure, save_figure
from l2p_utils.files import ROOT, UserError, atomic_path, read_json, versions, write_json
from l2p_utils.model import PooledColBERT, autocast, encode
from l2p_utils.pooling import pool, pool_padded, pool_sweep, unit_length
from l2p_utils.profile import load_profile, slug
from l2p_utils.search import exact_search
from l2p_utils.statistics import interval
from l2p_utils.teacher import untrained_model
from l2p_utils.training import PooledDistillation

Vectors = list[torch.Tensor]
METHODS = ("span", "kmeans", "hierarchical")
FACTORS = [2, 3, 4, 5, 6]
LENGTHS = (64, 128, 300, 512, 1024, 2048, 4096)  # in tokens
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


def poolers(peers: Mapping[str, Peer] | None = None) -> list[Pooler]:
    """Ours, then the libraries', with their own defaults; those of `peers` last."""
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
    for engine, peer in (peers or {}).items():
        if engine == "sentence-transformers":
            found.append(Pooler("hierarchical", engine, peer))
        elif engine == "colpali-engine":  # protects no token
            ours = bind(pool, pool_method="hierarchical", protected_tokens=0, variant="paper")
            variant = "hierarchical, paper"
            found += [Pooler(variant, "ours", ours), Pooler(variant, engine, peer)]
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
        distances = np.maximum(1 - tokens @ tokens.T, 0)
        tree = linkage(squareform(distances, checks=False), method="ward")
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
    """Median seconds of each, measured in turns: what disturbs the machine disturbs all alike.

    On one thread those of the processor, so that what else it does does not count.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(run: Callable[[], Any]) -> float:
        start = clock()
        found = run()
        return found.seconds if isinstance(found, Answer) else clock() - start

    runs = contestants.values()
    for run in runs if warm else ():
        run()
    taken = [[seconds(run) for run in runs] for _ in range(repetitions)]
    return dict(zip(contestants, np.median(taken, axis=0).tolist(), strict=True))


def same_groups(pooled: Vectors, others: Vectors) -> float:
    """Share of documents whose pooled vectors have the same directions, in any order."""
    same = []
    for a, b in zip(pooled, others, strict=True):
        near = torch.cdist(unit_length(a.double()), unit_length(b.double())) < 1e-3
        same.append(len(a) == len(b) and bool(near.any(0).all() and near.any(1).all()))
    return float(np.mean(same))


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


# ---------------------------------------------------------------- peers


def serve() -> None:
    """What the Python of a peer runs: pickled questions on standard input, answers on its output.

    It is sent there as source, with `peak_memory`, and has nothing else of this project.
    """
    import torch

    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the libraries print goes elsewhere
    engines: dict[str, Callable] = {}
    with contextlib.suppress(ModuleNotFoundError):
        from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

        engines["sentence-transformers"] = lambda d, f: HierarchicalTokenPooling(f).pool(d)
    with contextlib.suppress(ModuleNotFoundError):
        from colpali_engine.compression.token_pooling import HierarchicalTokenPooler

        pooler = HierarchicalTokenPooler()
        engines["colpali-engine"] = lambda d, f: pooler.pool_embeddings(d, pool_factor=f)
    with contextlib.suppress(ModuleNotFoundError):
        from maxsim_cpu import maxsim_scores_variable as maxsim

        def search(queries, documents):
            documents = [document.numpy() for document in documents]
            scores = [torch.tensor(maxsim(query.numpy(), documents)) for query in queries]
            return torch.stack(scores).topk(10).indices

        engines["maxsim-cpu"] = search
    answer: Any = {engine: version(engine) for engine in engines}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with contextlib.suppress(EOFError):  # no more questions
        while True:
            pickle.dump(answer, output)
            output.flush()
            engine, memory, given = pickle.load(sys.stdin.buffer)
            given = [[torch.from_numpy(v) for v in a] if isinstance(a, list) else a for a in given]
            start = clock()
            if memory:
                answer = peak_memory(lambda e=engine, a=given: engines[e](*a))
            else:
                found = engines[engine](*given)
                answer = clock() - start, [vectors.numpy() for vectors in found]


class Answer(list):
    """Tensors that a peer made in `seconds`."""

    seconds: float


@dataclass(frozen=True)
class Peer:
    """A library in a Python of its own: takes lists of tensors and numbers, and times itself."""

    engine: str
    version: str
    process: subprocess.Popen

    def __call__(self, *arguments: Any, memory: bool = False) -> Any:
        """Its `Answer`, or the MiB that it needs for it (`peak_memory`)."""
        # as arrays: of a tensor that is a part of another, the whole would travel
        given = [[v.numpy() for v in a] if isinstance(a, list) else a for a in arguments]
        pickle.dump((self.engine, memory, given), self.process.stdin)
        self.process.stdin.flush()
        found = pickle.load(self.process.stdout)
        if memory:
            return found
        answer = Answer(map(torch.from_numpy, found[1]))
        answer.seconds = found[0]
        return answer


@contextlib.contextmanager
def started(pythons: Sequence[str], threads: int) -> Iterator[dict[str, Peer]]:
    """The peers that the interpreters `pythons` have, by name, until the end of the block."""
    source = "from __future__ import annotations\n"
    source += "import contextlib, ctypes, os, pickle, re, sys, time\n"
    source += "from importlib.metadata import version\nfrom pathlib import Path\n"
    source += f"{inspect.getsource(peak_memory)}\n{inspect.getsource(serve)}\nserve()"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    environment.pop("PYTHONPATH", None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment}
    peers: dict[str, Peer] = {}
    with contextlib.ExitStack() as stack:
        for python in pythons:
            try:
                process = stack.enter_context(subprocess.Popen([python, "-c", source], **pipes))
                if not (found := pickle.load(process.stdout)):
                    raise EOFError("it has none of them")
            except (OSError, EOFError) as error:
                raise UserError(
                    f"{python} starts no peer: {error}. Expected the Python of an environment with "
                    "sentence-transformers ≥ 6.2, colpali-engine or maxsim-cpu."
                ) from error
            peers |= {engine: Peer(engine, number, process) for engine, number in found.items()}
        yield peers


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


def bench_scaling(
    vectors: Vectors, peers: Mapping[str, Peer], repetitions: int = 5
) -> pd.DataFrame:
    """Every contestant at factor 4, by tokens of a document: 8,192 tokens, or two documents.

    Who takes more than 1.5 s for the documents of one length gets no longer ones.
    """
    line, chosen, rows = torch.cat(vectors), poolers(peers), []
    for length in LENGTHS:
        documents = list(line.split(length)[: max(8192 // length, 2)])
        runs = {p: functools.partial(p.pool, documents, 4) for p in chosen}
        seconds, ours = in_turns(runs, repetitions), {}
        for p, run in runs.items():
            pooled = run()
            row = {"document_length": length, "method": p.method, "engine": p.engine}
            row |= {"documents": len(documents), "seconds": seconds[p]}
            row["documents_per_second"] = len(documents) / seconds[p]
            row["same_groups"] = same_groups(ours.setdefault(p.method, pooled), pooled)
            row["peak_mib"] = run(memory=True) if isinstance(p.pool, Peer) else peak_memory(run)
            rows.append(row)
        chosen = [p for p in chosen if seconds[p] < 1.5]
    return pd.DataFrame(rows)


def bench_search(
    encoded: Encoded, peers: Mapping[str, Peer], queries: int = 60, repetitions: int = 9
) -> pd.DataFrame:
    """Ours and others' searches of the same unpooled vectors: seconds, share of equal tops."""
    asked, documents = encoded.queries[:queries], encoded.documents
    ids = list(range(len(documents)))

    def scoring() -> torch.Tensor:
        padded = [torch.nn.utils.rnn.pad_sequence(v, batch_first=True) for v in (asked, documents)]
        return colbert_scores(*padded).topk(10, dim=1).indices  # zeros pad, as in PyLate

    runs = {
        "ours": lambda: exact_search(asked, documents, ids, 10).documents,
        "PyLate rank.rerank": lambda: [
            [hit["id"] for hit in hits[:10]]
            for hits in rank.rerank([ids] * len(asked), asked, [documents] * len(asked))
        ],
        "PyLate colbert_scores": scoring,
    }
    if peer := peers.get("maxsim-cpu"):
        runs["maxsim-cpu"] = functools.partial(peer, asked, documents)
    seconds, expected, rows = in_turns(runs, repetitions), runs["ours"](), []
    for engine, run in runs.items():
        same = [list(a) == list(b) for a, b in zip(run(), expected, strict=True)]
        memory = run(memory=True) if engine in peers else peak_memory(run)
        sizes = (len(asked), len(documents))
        rows.append((engine, *sizes, seconds[engine], float(np.mean(same)), memory))
    columns = ["engine", "queries", "documents", "seconds", "same_top_10", "peak_mib"]
    return pd.DataFrame(rows, columns=columns)


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


def measure(
    folder: str | Path, threads: int = 1, collections: Sequence[str] = (), peers: Sequence[str] = ()
) -> Path:
    """Measure everything (about 10 minutes) and write it to `folder` as CSV files.

    `threads` is that of every contestant: torch, BLAS and OpenMP. K-means is compared on the five
    bundled collections and on `collections`. `peers` are the interpreters of environments that hold
    sentence-transformers ≥ 6.2, colpali-engine or maxsim-cpu.
    """
    profile = load_profile("quick").model_copy(update={"name": "bench"})
    folder, before = Path(folder), torch.get_num_threads()
    torch.set_num_threads(threads)
    with threadpool_limits(threads), started(peers, threads) as found:
        model = untrained_model(profile)
        collection = subset(load_collection("docs:scipy"), None, 1000)
        encoded = encode_collection(model, collection, progress=False)
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
            "scaling": lambda: bench_scaling(longer, found),
            "search": lambda: bench_search(encoded, found),
            "training": training,
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
    machine["peers"] = {engine: peer.version for engine, peer in found.items()}
    write_json(folder / "machine.json", machine)
    return folder


# ---------------------------------------------------------------- tables and figures


def read(folder: str | Path = STORED) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """The measurements that `measure` left in `folder`, by name, and the machine."""
    folder = Path(folder)
    parts = {file.stem: pd.read_csv(file) for file in sorted(folder.glob("*.csv"))}
    parts["pooling"] = parts["pooling"].astype({"pool_factor": str})  # 2 … 6, and 2-6
    return parts, read_json(folder / "machine.json")


def times_faster(pooling: pd.DataFrame, columns: str = "pool_factor") -> pd.DataFrame:
    """Our speed by each contestant's; a column per pool factor, or per `document_length`."""
    keys = [key for key in ("document_length", "method", "engine") if key != columns]
    speed = pooling.pivot_table("documents_per_second", keys, columns, sort=False)
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
        for axes, method in zip(panels[1], ("kmeans", "hierarchical"), strict=True):
            _draw_growth(axes, parts["scaling"], method)
        title = f"Token pooling beside other libraries: {threads}, {machine['processor']}; medians"
        marks = "above: full mark PF4, hollow mark all of PF 2–6; below: PF4"
        figure.suptitle(f"{title}\n{marks}", fontsize=12)
    figure.alt = (
        "Documents pooled per second by method and library, and milliseconds per document as "
        "documents get longer. The tables of speeds have the numbers."
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


def _draw_growth(axes, growth: pd.DataFrame, method: str) -> None:
    engines = growth[growth["method"] == method].groupby("engine", sort=False)
    for number, (engine, part) in enumerate(engines):
        look = {"color": MODEL_COLOURS[number - 1], "linestyle": "--", "marker": "oDv^"[number - 1]}
        if engine == "ours":
            look = {"color": COLOURS[method], "linewidth": 2.2, "marker": "s"}
        milliseconds = 1e3 / part["documents_per_second"]
        axes.plot(part["document_length"], milliseconds, **look, label=engine)
    sizes = sorted(growth["document_length"].unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, sizes)
    axes.set(yscale="log", ylabel="milliseconds per document (log scale)")
    axes.set(xlabel="tokens in each document", title=f"Growth with document length: {method}")
    axes.legend(fontsize=9)


def save(folder: str | Path = ROOT / "figures" / "bench") -> None:
    """Redraw bench.png and bench.svg from data/bench."""
    save_figure(draw(*read()), folder, "bench")


if __name__ == "__main__":
    save()
