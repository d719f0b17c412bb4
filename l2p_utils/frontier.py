"""Ways of storing less, measured: what each keeps of NDCG@10, and at how many bytes (notebook 11).

A `Way` turns a collection's token vectors into those that are stored, and says how they are coded.
``python -m l2p_utils.frontier`` measures models of a run and stores the rows, model by model and
collection by collection; it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter
from tqdm.auto import tqdm

from l2p_utils.collection import Collection, load_collection, subset
from l2p_utils.evaluation import load_evaluated
from l2p_utils.evaluation import measure as measure_ranking
from l2p_utils.figures import STYLE, NotebookFigure, save_figure
from l2p_utils.files import (
    PROVENANCE,
    ROOT,
    UserError,
    atomic_path,
    from_root,
    settings_match,
    versions,
    write_json,
)
from l2p_utils.model import PooledColBERT, autocast, encode, fingerprint, use_threads
from l2p_utils.pooling import CACHE_VERSION, Budget, pool, pool_groups, pool_to_mean, unit_length
from l2p_utils.profile import load_profile, slug
from l2p_utils.search import exact_search
from l2p_utils.statistics import interval

Vectors = list[torch.Tensor]
STORED = ROOT / "data" / "frontier"
FACTORS = (2, 3, 4, 6, 8, 12, 16, 24)
METHODS = ("span", "kmeans", "hierarchical")
OFFSET_BYTES = 8  # where a document's vectors begin; its id is the user's own
PANEL = ["model", "document_length"]  # of the figure
UNPOOLED = "unpooled"

# ---------------------------------------------------------------- what ways look at


@dataclass(frozen=True)
class Tokens:
    """A collection's token vectors, unpooled, and what else a way of storing less may look at."""

    collection: Collection
    documents: Vectors  # (tokens, dim) float32 of unit length, in the collection's order
    queries: Vectors
    norms: list[np.ndarray]  # (tokens,) of the documents' vectors before they were normalised
    pieces: list[np.ndarray]  # (tokens,) word pieces of the documents, as numbers
    words: list[np.ndarray]  # (tokens,) which word of its document a token belongs to, ascending
    sentences: list[np.ndarray]  # (tokens,) which sentence, ascending


def read_tokens(
    model: PooledColBERT, collection: Collection, precision: str = "auto", progress: bool = False
) -> Tokens:
    """Encode a collection; tokens that take no part in search (punctuation) are left out."""
    queries, found = encode(model, list(collection.queries.values()), True, precision), []
    texts = list(collection.corpus.values())
    for ids, vectors, counted in every_token(model, texts, False, precision, progress):
        names = model.tokenizer.convert_ids_to_tokens(ids.tolist())
        words, ended = np.cumsum(_word_starts(names)), np.isin(names, [".", "!", "?", "Ġ.", "▁."])
        parts = (vectors.norm(dim=1), ids, words, np.cumsum(ended) - ended)
        parts = [np.asarray(part)[counted.numpy()] for part in parts]
        found.append((unit_length(vectors[counted]), *parts))
    documents, *others = map(list, zip(*found, strict=True))
    return Tokens(collection, documents, queries, *others)


def every_token(
    model: PooledColBERT,
    texts: list[str],
    is_query: bool,
    precision: str = "auto",
    progress: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each text all word pieces, their vectors (tokens, dim), and whether search counts them.

    Vectors are float32, as long as the model makes them.
    """
    options = {"pool_factor": 1, "normalize_embeddings": False, "show_progress_bar": progress}
    with autocast(precision, model.device):  # without an output_value, PyLate gives every token's
        found = model.encode(texts, is_query=is_query, output_value=None, **options)
    names = ("input_ids", "token_embeddings", "masks")
    for parts in zip(*(found[name] for name in names), strict=True):
        ids, vectors, counted = (torch.as_tensor(part).cpu() for part in parts)
        yield ids, vectors.float(), counted.bool()


def _word_starts(names: Sequence[str]) -> list[bool]:
    """Whether each piece begins a word: WordPiece marks those that do not, others those that do."""
    marked = any(name[:1] in "Ġ▁" for name in names)
    return [name[:1] in "Ġ▁" if marked else not name.startswith("##") for name in names]


# ---------------------------------------------------------------- codes


class Code(NamedTuple):
    """How a vector is stored: its scale, if any, and then its values, in whole bytes."""

    bits: int  # per value: of a float, of a whole number, or 1 of its sign
    extra: int = 0  # bytes per vector: its scale, in float16

    def pack(self, vectors: np.ndarray) -> np.ndarray:
        """Bytes, (vectors, bytes) uint8, of (vectors, dim) float32."""
        if self.bits == 1:
            return np.packbits(vectors >= 0, axis=1)
        if not self.extra:
            return np.ascontiguousarray(vectors.astype(f"f{self.bits // 8}")).view(np.uint8)
        most = 2 ** (self.bits - 1) - 1
        scale = (np.abs(vectors).max(axis=1, initial=0, keepdims=True) / most).astype(np.float16)
        levels = (vectors / np.maximum(scale.astype(np.float32), 1e-8)).round().clip(-most, most)
        values = levels.astype(np.int8).view(np.uint8)
        if self.bits == 4:  # two to a byte
            values = np.pad(values + 8, ((0, 0), (0, values.shape[1] % 2)))
            values = values[:, ::2] << 4 | values[:, 1::2]
        return np.hstack([scale.view(np.uint8), values])

    def unpack(self, rows: np.ndarray, dim: int) -> np.ndarray:
        """What comes back, (vectors, dim) float32, of such bytes."""
        if self.bits == 1:  # of each byte its eight signs, looked up
            signs = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
            signs = (2 * signs.astype(np.float32) - 1) / np.float32(math.sqrt(dim))
            return np.take(signs, rows, axis=0).reshape(len(rows), 8 * rows.shape[1])[:, :dim]
        # torch converts small numbers several times as fast as NumPy
        packed = torch.from_numpy(np.ascontiguousarray(rows))
        if not self.extra:
            return packed.view(getattr(torch, f"float{self.bits}")).float().numpy()
        scale, values = packed[:, :2].contiguous().view(torch.float16), packed[:, 2:]
        if self.bits == 4:
            halves = torch.stack([values >> 4, values & 15], dim=2)
            values = halves.flatten(1)[:, :dim].float().sub_(8)
        else:
            values = values.view(torch.int8).float()
        return values.mul_(scale.float()).numpy()

    def decode(self, vectors: torch.Tensor) -> torch.Tensor:
        """What comes back of vectors (n, dim) that were stored."""
        return torch.from_numpy(self.unpack(self.pack(vectors.numpy()), vectors.shape[1]))


CODES = {
    "float32": Code(32),
    "float16": Code(16),
    "int8": Code(8, 2),
    "4 bits": Code(4, 2),
    "1 bit": Code(1),  # signs alone: for vectors of unit length, which all have the same scale
}


def stored_bytes(vectors: float, dim: int, code: str = "float32") -> float:
    """Bytes of a document with so many vectors: values, scales, and its offset in the index."""
    how = CODES[code]
    return vectors * (math.ceil(dim * how.bits / 8) + how.extra) + OFFSET_BYTES


# ---------------------------------------------------------------- ways


@dataclass(frozen=True)
class Way:
    """A way of storing less."""

    name: str
    family: str  # what the legend calls it
    store: Callable[[Tokens], Vectors]  # the documents' vectors, before they are coded
    code: str = "float32"  # a key of `CODES`
    ask: Callable[[Tokens], Vectors] = attrgetter("queries")
    budget: Budget | None = None  # where an index of one's own documents can take it


def of_tokens(way: Callable) -> Callable:
    """Take a way's settings first, and `Tokens` then: ``pooled("span", 4)(tokens)``."""

    @functools.wraps(way)
    def with_settings(*settings: Any, **options: Any) -> Callable[[Tokens], Vectors]:
        return lambda tokens: way(tokens, *settings, **options)

    return with_settings


@of_tokens
def pooled(
    tokens: Tokens, method: str, budget: float | Budget, renormalize: bool = True
) -> Vectors:
    """`pool` under a budget, unit-length means by default."""
    budget = vars(Budget.of(budget))
    return pool(tokens.documents, pool_method=method, renormalize=renormalize, **budget)


@of_tokens
def to_mean(tokens: Tokens, method: str, factor: float, rule: str) -> Vectors:
    """As many vectors in all as a pool factor gives, shared out by a rule of `pool_to_mean`."""
    mean = np.mean([len(document) for document in pool(tokens.documents, factor, method)])
    return pool_to_mean(tokens.documents, mean, method, rule, renormalize=True)


@of_tokens
def pooled_again(tokens: Tokens, method: str, first: float, then: float, **options: Any) -> Vectors:
    """Pooled by one factor, and what was stored by another, with the clusters' sizes."""
    means, sizes = pool(tokens.documents, first, method, return_sizes=True, **options)
    return pool(means, then, method, weights=sizes, renormalize=True, **options)


@of_tokens
def span_within(tokens: Tokens, unit: str, factor: int) -> Vectors:
    """Groups of up to `factor` neighbours that end where a word ends (``words``) or do not cross
    the end of a sentence (``sentences``); the first token alone.
    """

    def labels(places: np.ndarray) -> np.ndarray:
        found, size = [0][: len(places)], factor
        for _, run in itertools.groupby(places[1:]):
            words = [len(list(run))]
            if unit == "sentences":  # of which each begins a group
                words, size = [1] * words[0], factor
            for word in words:  # it joins the group if it fits
                new = size + word > factor
                found += [found[-1] + new] * word
                size = word if new else size + word
        return np.array(found, dtype=np.int64)

    groups = zip(tokens.documents, map(labels, getattr(tokens, unit)), strict=True)
    return [unit_length(pool_groups(*group)) for group in groups]


@of_tokens
def kept(tokens: Tokens, score: Callable[[Tokens], Iterable[np.ndarray]], factor: float) -> Vectors:
    """Pruning: the first token and, of the others, the 1 / factor with the highest scores."""
    chosen = []
    for document, scores in zip(tokens.documents, score(tokens), strict=True):
        count = max(int((len(document) - 1) // factor), 1)
        best = 1 + np.argsort(-np.asarray(scores)[1:], kind="stable")[:count]
        chosen.append(document[np.sort(np.append(0, best))[: len(document)]])
    return chosen


def first_tokens(tokens: Tokens) -> Iterable[np.ndarray]:
    """Scores of pruning: the earlier, the higher."""
    return (-np.arange(len(document)) for document in tokens.documents)


def by_idf(tokens: Tokens) -> Iterable[np.ndarray]:
    """Scores of pruning: the fewer documents have the word piece, the higher."""
    counts = pd.Series(np.concatenate([np.unique(p) for p in tokens.pieces])).value_counts()
    return [-counts.reindex(pieces).to_numpy() for pieces in tokens.pieces]


@of_tokens
def fewer_dimensions(tokens: Tokens, vectors: Callable[[Tokens], Vectors], dim: int) -> Vectors:
    """Some `vectors` of tokens in the `dim` principal directions of the documents'."""
    some = torch.cat(tokens.documents)[::7]  # dot products are kept: not centred
    basis = torch.linalg.eigh(some.T @ some).eigenvectors[:, -dim:]
    return [found @ basis for found in vectors(tokens)]


@of_tokens
def fewer_query_vectors(tokens: Tokens, factor: float) -> Vectors:
    """Queries pooled too, by k-means."""
    return pool(tokens.queries, factor, "kmeans", renormalize=True)


def all_ways() -> list[Way]:
    """What `measure` compares: the unpooled index first, then family by family."""
    few = (2, 4, 6, 12)
    ways = [Way(UNPOOLED, UNPOOLED, attrgetter("documents"))]
    for method in METHODS:
        ways += [Way(f"{method} PF{f}", method, pooled(method, f)) for f in FACTORS]
        raw = f"{method}, raw means"
        ways += [Way(f"{raw} PF{f}", "raw means", pooled(method, f, False)) for f in FACTORS]
    for k in (32, 24, 16, 12, 8, 6, 4, 3):
        budget = Budget(max_vectors=k)
        ways.append(Way(f"kmeans, {k} vectors", "same number for all", pooled("kmeans", budget)))
    for rule, family in {"equal": "same number for all", "threshold": "one height for all"}.items():
        for f in (4, 6, 12, 16):
            name = f"kmeans, {family}, mean of PF{f}"
            ways.append(Way(name, family, to_mean("kmeans", f, rule)))
    for unit in ("words", "sentences"):
        ways += [Way(f"span within {unit} PF{f}", "span", span_within(unit, f)) for f in few]
    for name, score in {"first": first_tokens, "norm": attrgetter("norms"), "IDF": by_idf}.items():
        ways += [Way(f"pruned by {name} PF{f}", "pruning", kept(score, f)) for f in few]
    for method, options in {"kmeans": {}, "hierarchical": {"variant": "euclidean"}}.items():
        for first, then in ((2, 3), (4, 3)):
            name = f"{method} PF{first}, again PF{then}"
            ways.append(Way(name, "pooled again", pooled_again(method, first, then, **options)))
    for f in (1, 4, 6, 12):
        store = pooled("kmeans", f)
        for q in (2, 4):
            name = f"kmeans PF{f}, queries PF{q}"
            ways.append(Way(name, "fewer query vectors", store, ask=fewer_query_vectors(q)))
        for dim in (64, 32):
            ask = fewer_dimensions(attrgetter("queries"), dim)
            less, name = fewer_dimensions(store, dim), f"kmeans PF{f}, {dim} dimensions"
            ways.append(Way(name, "fewer dimensions", less, ask=ask))
    for code in list(CODES)[1:]:
        for method, some in {"kmeans": (1, *FACTORS), "span": FACTORS}.items():
            ways += [Way(f"{method} PF{f}, {code}", code, pooled(method, f), code) for f in some]
    for k in (24, 16, 12, 8, 6, 4):
        store = pooled("kmeans", Budget(max_vectors=k))
        ways.append(Way(f"kmeans, {k} vectors, 1 bit", "1 bit", store, "1 bit"))
    return ways


def sized_ways(codes: Iterable[str] = CODES) -> list[Way]:
    """What `index.choose` tries: the unpooled index, and k-means budgets with these codes."""
    budgets = {f"PF{f}": Budget(f) for f in (1, *FACTORS)}
    budgets |= {f"{k} vectors": Budget(max_vectors=k) for k in (32, 16, 12, 8, 6, 4)}
    ways = [Way(UNPOOLED, UNPOOLED, pooled("kmeans", 1), budget=Budget(1))]
    for name, code in [("PF1", "float16"), *itertools.product(budgets, list(CODES)[2:])]:
        if code in codes:
            budget = budgets[name]
            store = pooled("kmeans", budget)
            ways.append(Way(f"{name}, {code}", code, store, code, budget=budget))
    return ways


# ---------------------------------------------------------------- measuring


def measure(
    tokens: Tokens, ways: Iterable[Way], progress: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Search a collection with each way, exactly, the unpooled index first.

    Returns
    -------
    tuple of pandas.DataFrame
        A row per way: ``way``, ``family``, ``code``, ``vectors_per_document``,
        ``bytes_per_document``, ``ndcg@10`` (0–1), ``store_ms`` (per document, reducing and coding),
        ``query_ms``, ``queries``, ``documents``. And a row per way and query: ``ndcg@10``;
        ``best@10``, NDCG where the one relevant document is the best of the first way; and
        ``same@10``, the share of the first way's ten best documents that are found.
    """
    ids, count = list(tokens.collection.corpus), len(tokens.documents)
    rows, per_query, whole = [], [], None
    for way in tqdm(list(ways), desc=f"Ways on {tokens.collection.name}", disable=not progress):
        began = time.process_time()
        stored = way.store(tokens)
        decoded = [CODES[way.code].decode(document) for document in stored]
        seconds = time.process_time() - began
        ranking = exact_search(way.ask(tokens), decoded, ids, top_k=10)
        values = measure_ranking(tokens.collection, ranking)[["query_id", "ndcg@10"]]
        whole = whole or ranking.documents
        pairs = list(zip(whole, ranking.documents, strict=True))
        values["best@10"] = [1 / np.log2(2 + b.index(a[0])) if a[0] in b else 0 for a, b in pairs]
        values["same@10"] = [len(set(a) & set(b)) / len(a) for a, b in pairs]
        vectors = float(np.mean([len(document) for document in stored]))
        row = {
            "way": way.name, "family": way.family, "code": way.code,
            "vectors_per_document": vectors,
            "bytes_per_document": stored_bytes(vectors, stored[0].shape[1], way.code),
            "ndcg@10": values["ndcg@10"].mean(), "store_ms": 1000 * seconds / count,
            "query_ms": 1000 * ranking.seconds / len(tokens.queries),
            "queries": len(tokens.queries), "documents": count,
        }  # fmt: skip
        rows.append(row)
        per_query.append(values.assign(way=way.name))
    return pd.DataFrame(rows), pd.concat(per_query, ignore_index=True)


def measure_model(
    profile_name: str,
    name: str,
    collections: Sequence[str],
    output: str | Path,
    document_length: int | None = None,
    ways: Sequence[Way] | None = None,
) -> None:
    """Measure a model of a profile on collections; finished ones of `output` are kept.

    Rows are stored in ``<output>/ways``, values per query in ``<output>/per_query``: a Parquet file
    per model, collection and document length.
    """
    profile = load_profile(profile_name)
    use_threads(profile.threads)
    model = load_evaluated(profile, name).eval()
    model.document_length = document_length or model.document_length
    ways = ways or all_ways()
    for source in collections:
        collection = subset(load_collection(source), None, profile.evaluation.max_documents)
        stem = f"{name}--{slug(source)}-{model.document_length}"
        done = Path(output) / "settings" / stem
        settings = {
            "weights": fingerprint(profile.folder / "models" / name),
            "fingerprint": collection.fingerprint,
            "length": model.document_length,
            "ways": [way.name for way in ways],
            "code": CACHE_VERSION,
            "versions": versions(),
        }
        if settings_match(done, settings):
            continue
        tokens = read_tokens(model, collection, profile.precision, progress=True)
        keys = {"model": name, "collection": source, "document_length": model.document_length}
        rows, values = measure(tokens, ways)
        values = values[["query_id", "ndcg@10", "way"]]
        for part, frame in {"per_query": values, "ways": rows}.items():
            with atomic_path(Path(output, part, f"{stem}.parquet")) as temporary:
                frame.assign(**keys).to_parquet(temporary, index=False, compression="zstd")
        write_json(done / PROVENANCE, {"settings": settings})


def read(folder: str | Path = STORED, part: str = "ways") -> pd.DataFrame:
    """All stored rows; of ``per_query`` each query's values, of ``predicted`` what `index` adds."""
    if not (files := sorted(Path(folder, part).glob("*.[cp]*"))):
        raise UserError(
            f"{folder} holds no measured ways ({part}). `python -m l2p_utils.frontier` and, for "
            "predicted, `python -m l2p_utils.index predict` measure them; `git restore "
            "data/frontier` brings the stored ones back."
        )
    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    return pd.concat([readers[file.suffix](file) for file in files], ignore_index=True)


# ---------------------------------------------------------------- what came out


def summary(rows: pd.DataFrame, per_query: pd.DataFrame) -> pd.DataFrame:
    """Each way beside the unpooled index of the same model: mean over the model's collections.

    Columns ``model``, ``document_length``, ``way``, ``family``, ``code``; ``kept``, percent of the
    unpooled NDCG@10; ``vectors_per_document``, ``bytes_per_document``; ``low`` and ``high``, the
    95 % interval of `kept` over queries; ``smaller``, how many times; ``front``, whether no other
    way of that model keeps as much in fewer bytes; ``collections``, how many.
    """
    tables, values = {}, per_query.groupby(PANEL)
    for panel, here in rows.groupby(PANEL, sort=False):
        order, groups, count = here["way"].unique(), [], here["collection"].nunique()
        for _, part in values.get_group(panel).groupby("collection"):
            wide = part.pivot(index="way", columns="query_id", values="ndcg@10").loc[order]
            base = wide.loc[UNPOOLED].to_numpy()
            # the percentage is a ratio: its error is that of value − ratio × unpooled
            ratio = (wide.mean(axis=1) / base.mean()).to_numpy()[:, None]
            groups.append(100 / count / base.mean() * (wide.to_numpy() - ratio * base)[:, None])
        found = interval(groups)
        kept = here["ndcg@10"] / here.groupby("collection")["ndcg@10"].transform("first")
        ways = here.assign(kept=100 * kept).groupby("way", sort=False)
        table = ways[["family", "code"]].first()
        table = table.join(ways[["kept", "vectors_per_document", "bytes_per_document"]].mean())
        half, size = (found.high - found.low) / 2, table["bytes_per_document"]
        table["low"], table["high"] = table["kept"] - half, table["kept"] + half
        table["smaller"], table["front"] = size[UNPOOLED] / size, pareto(size, table["kept"])
        tables[panel] = table.assign(collections=count)
    return pd.concat(tables, names=PANEL).reset_index()


def compare(
    per_query: pd.DataFrame, pairs: Sequence[tuple[tuple[str, str], tuple[str, str]]]
) -> pd.DataFrame:
    """NDCG@10 of one (model, way) minus that of another, in points, mean over collections.

    With 95 % intervals over queries. Collections and document lengths are those that both have, of
    which `per_query` should hold one length.
    """
    queries = ["collection", "query_id"]
    wide = per_query.pivot(index=["model", "way"], columns=queries, values="ndcg@10")
    lines = {}
    for left, right in pairs:
        both = (wide.loc[left] - wide.loc[right]).dropna().groupby(level="collection")
        found = interval([100 * part.to_numpy() / both.ngroups for _, part in both])
        key = " · ".join(left), " · ".join(right)
        lines[key] = found.mean, found.low, found.high, both.ngroups
    index = pd.MultiIndex.from_tuples(lines, names=["", "against"])
    columns = ["points", "low", "high", "collections"]
    return pd.DataFrame(lines.values(), index, columns).round(1)


def pareto(costs: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """Mask of the points with a larger value than all that cost no more."""
    costs, values = np.asarray(costs, float), np.asarray(values, float)
    order = np.lexsort((-values, costs))
    best = np.maximum.accumulate(np.append(-np.inf, values[order][:-1]))
    front = np.zeros(len(costs), dtype=bool)
    front[order] = values[order] > best
    return front


LOOKS = {  # family or code: colour and marker
    UNPOOLED: ("#000000", "*"),
    "raw means": ("#8C8C8C", "s"),
    "span": ("#009E73", "D"),
    "kmeans": ("#E08A00", "^"),
    "hierarchical": ("#0072B2", "o"),
    "same number for all": ("#7B3294", "v"),
    "one height for all": ("#7B3294", "1"),
    "pruning": ("#CC79A7", "x"),
    "pooled again": ("#E08A00", "2"),
    "fewer query vectors": ("#555555", "3"),
    "fewer dimensions": ("#555555", "4"),
    "float16": ("#56B4E9", "h"),
    "int8": ("#56B4E9", "P"),
    "4 bits": ("#56B4E9", "X"),
    "1 bit": ("#56B4E9", "d"),
}


def draw(found: pd.DataFrame, titles: Mapping[str, str] | None = None) -> NotebookFigure:
    """Percent of the unpooled NDCG@10 against bytes per document, a panel per model and length.

    `found` is from `summary`; `titles` are those of models. The black line is the Pareto front;
    bars on it are 95 % intervals over queries.
    """
    titles, panels, told = titles or {}, list(found.groupby(PANEL, sort=False)), []
    columns = min(len(panels), 2)
    lines = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        size = (1 + 6.2 * columns, 1 + 4.6 * lines)
        figure = NotebookFigure(figsize=size, layout="constrained")
        axes = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
        for axis in axes[len(panels) :]:
            axis.axis("off")
        for axis, ((model, length), part) in zip(axes, panels, strict=False):
            axis.axhline(100, color="#333333", linestyle="--", linewidth=1, zorder=1)
            for family, (colour, marker) in LOOKS.items():
                some = part[part["family"] == family]
                look = {"markerfacecolor": "none" if family == "raw means" else colour}
                look |= {"color": colour, "linestyle": "none", "markersize": 6, "zorder": 2}
                x, y = some["bytes_per_document"], some["kept"]
                axis.plot(x, y, marker=marker, label=family, **look)
            front = part[part["front"]].sort_values("bytes_per_document")
            x, y = front["bytes_per_document"], front["kept"]
            axis.plot(x, y, color="black", linewidth=1.2, label="Pareto front", zorder=3)
            bars = [y - front["low"], front["high"] - y]
            axis.errorbar(x, y, bars, fmt="none", color="black", elinewidth=0.7, zorder=1.5)
            log_bytes(axis)
            axis.set(ylim=(60, None), ylabel="NDCG@10 (% of the unpooled index)")
            name, count = titles.get(model, model), part["collections"].iloc[0]
            on = f"{count} collection{'s' if count > 1 else ''}"
            axis.set_title(f"{name}, {length} word pieces, {on}")
            ends = zip(front["way"], y, x, strict=True)
            told += [
                f"{name}, {way}: {kept:.0f} % in {size:,.0f} bytes" for way, kept, size in ends
            ]
        look = {"ncols": 4 * columns, "fontsize": 9, "frameon": False}
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", **look)
        figure.suptitle("What an index keeps, and what it takes", fontweight="bold")
    figure.alt = f"NDCG@10 kept against bytes per document. The Pareto front: {'; '.join(told)}"
    return figure


def log_bytes(axis: Axes) -> None:
    """Bytes per document along a logarithmic x-axis."""
    axis.set(xscale="log", xlabel="Bytes per document (log scale)")
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def recommended(found: pd.DataFrame, losses: Sequence[float] = (1, 2, 5, 10)) -> pd.DataFrame:
    """Per model, the fewest bytes with which at most so many percent are lost, two ways: by the
    mean, and at the lower end of the interval, which is not corrected for choosing among ways.
    """
    lines, which = {}, {"on average": "kept", "at the lower end": "low"}
    shown = {"way": 0, "bytes_per_document": 0, "smaller": 1, "kept": 1, "low": 1}  # decimals
    for panel, part in found.groupby(PANEL, sort=False):
        part = part.sort_values("bytes_per_document")
        for loss, (name, column) in itertools.product(losses, which.items()):
            lines[*panel, f"{loss} %", name] = part[part[column] >= 100 - loss].iloc[0][[*shown]]
    table = pd.DataFrame.from_dict(lines, orient="index").infer_objects()
    return table.rename_axis([*PANEL, "loss", ""]).round(shown)


def main(arguments: list[str] | None = None) -> int:
    """Measure ways of storing less for models of a run; without models, redraw the figure."""
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.frontier", description=main.__doc__)
    parser.add_argument("models", nargs="*", help="such as baseline docs-scipy-pf1-s42")
    parser.add_argument("--profile", default="offline")
    parser.add_argument("--collections", nargs="+", help="default: the profile's")
    parser.add_argument("--document-length", type=int, help="in word pieces; default: the model's")
    parser.add_argument("--out", type=Path, default=STORED)
    options = parser.parse_args(arguments)
    try:
        chosen = options.collections or load_profile(options.profile).evaluation.collections
        for model in options.models:
            measure_model(options.profile, model, chosen, options.out, options.document_length)
        figure = draw(summary(read(options.out), read(options.out, "per_query")))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    save_figure(figure, from_root("figures/frontier"), "frontier")
    return 0


if __name__ == "__main__":
    sys.exit(main())
