"""An index of your own documents: build, search, grow, shrink (notebook 12).

An index is a folder of segments, each some thousand documents: ids, texts, sizes of clusters. An
engine keeps the pooled token vectors and searches them: Qdrant Edge in the folder, a Qdrant server,
our exact scan of packed files, or PLAID. What is added becomes a new segment, what is removed is
noted.

``python -m l2p_utils.index build DOCUMENTS --model bundled --out DIR`` makes one, ``search DIR
"how to interpolate"`` asks it; ``--help`` has the rest.
"""

from __future__ import annotations

import argparse
import errno
import functools
import hashlib
import heapq
import html
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets
import matplotlib
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import qdrant_edge as edge
import torch
from filelock import FileLock, Timeout
from IPython.display import HTML
from matplotlib.ticker import FuncFormatter
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from l2p_utils.collection import Collection, load_collection, subset
from l2p_utils.explain import is_live
from l2p_utils.figures import STYLE, NotebookFigure, save_figure
from l2p_utils.files import (
    PROVENANCE,
    UserError,
    atomic_path,
    from_root,
    read_json,
    remove,
    settings_match,
    write_json,
)
from l2p_utils.frontier import (
    CODES,
    STORED,
    UNPOOLED,
    Way,
    measure,
    read_tokens,
    sized_ways,
    stored_bytes,
    summary,
)
from l2p_utils.model import PooledColBERT, encode, load_model, readable
from l2p_utils.pooling import Budget, check_whole, pool, unit_length
from l2p_utils.profile import slug
from l2p_utils.search import BLOCK_BYTES, PLAID_VECTORS, index_size, plaid_index, plaid_ranking

SEGMENT = 2000  # documents
PREDICTED = STORED / "predicted"
TEXTS = 100  # documents whose texts are read together
GRAPH_FROM = 50_000  # documents: fewer are scanned fast enough
BLOCK_VECTORS = 4096  # decoded at a time: they stay in the processor's cache
REQUEST_VECTORS = 4000  # of 128 values: a Qdrant server takes requests of up to 32 MiB
SPARE_BYTES = 2**24  # that must stay free on a disk
Vectors = list[torch.Tensor]
Found = list[tuple[np.ndarray, np.ndarray]]  # numbers and scores, per query
INDEX = "index.json"
ENCODED = ("input_ids", "token_embeddings", "masks")  # what PyLate gives of each text
TEXT_COLUMNS = ("text", "content", "body", "abstract", "passage")
SUFFIXES = (".txt", ".md")


class Hit(NamedTuple):
    """A document that was found."""

    id: str
    score: float
    text: str


# ---------------------------------------------------------------- documents


def read_documents(source: str | Path, column: str | None = None) -> Iterator[tuple[str, str]]:
    """Ids and texts, one after the other: nothing is held but the document at hand.

    Parameters
    ----------
    source
        A folder of .txt and .md files (also in folders within), whose id is the file's path; a
        folder in BEIR's layout; or a JSONL, CSV or Parquet file. Of a file the id is the field
        ``_id`` or ``id``, else the row's number.
    column
        The field with the text; by default the first of `TEXT_COLUMNS` that there is. A field
        ``title`` stands before it.

    Raises
    ------
    UserError
        For a source that does not exist or has no text.
    """
    path = Path(source)
    if path.is_dir():
        if beir := [*path.glob("corpus.jsonl"), *path.glob("corpus.jsonl.gz")]:
            yield from read_documents(beir[0], column)
            return
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{path} holds no {' or '.join(SUFFIXES)} files, and no corpus.jsonl.")
        for file in files:
            yield file.relative_to(path).as_posix(), file.read_text("utf-8", errors="replace")
        return
    if not path.is_file():
        raise UserError(
            f"{path} does not exist. Expected a folder of .txt or .md files, or a JSONL, CSV or "
            "Parquet file."
        )
    for number, record in enumerate(_records(path)):
        fields = [column] if column else [name for name in TEXT_COLUMNS if name in record]
        if not fields or fields[0] not in record:
            raise UserError(
                f"{path}, record {number + 1} has no {column or 'text'} among its fields "
                f"{list(record)}. Name the field with the text (--column)."
            )
        identifier = record.get("_id", record.get("id"))
        parts = (record.get("title"), record[fields[0]])
        text = " ".join(str(part).strip() for part in parts if part is not None and part == part)
        yield str(number if identifier is None else identifier), text


def _records(path: Path) -> Iterator[dict[str, Any]]:
    suffix = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).lower()
    try:
        if suffix.startswith((".jsonl", ".ndjson")):
            chunks = pd.read_json(path, lines=True, chunksize=SEGMENT, dtype=False)
        elif suffix.startswith((".csv", ".tsv")):
            separator = "\t" if suffix.startswith(".tsv") else ","
            chunks = pd.read_csv(path, chunksize=SEGMENT, dtype=str, sep=separator)
        elif suffix == ".parquet":
            batches = pq.ParquetFile(path).iter_batches(SEGMENT)
            chunks = (batch.to_pandas() for batch in batches)
        else:
            raise UserError(
                f"{path} is {suffix or 'without a suffix'}; expected a folder, or a .jsonl, .csv, "
                ".tsv or .parquet file."
            )
        for chunk in chunks:
            yield from chunk.to_dict("records")
    except (ValueError, pa.ArrowInvalid) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read: {error}.") from error


def passages(
    model: PooledColBERT, documents: Iterable[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """Documents that are longer than the model reads, in parts: ``id#1``, ``id#2``, …"""
    most = readable(model)
    for identifier, text in documents:
        found = model.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        spans, words = found["offset_mapping"], found.word_ids()
        if len(spans) <= most:
            yield identifier, text
            continue
        start = number = 0
        while start < len(spans):
            end = min(start + most, len(spans))
            whole = end  # back to where a word ends
            while start < whole < len(spans) and words[whole] == words[whole - 1]:
                whole -= 1
            end, number = whole if whole > start else end, number + 1
            yield f"{identifier}#{number}", text[spans[start][0] : spans[end - 1][1]]
            start = end


def matched_words(
    model: PooledColBERT, query: str, texts: Sequence[str]
) -> list[list[tuple[int, int]]]:
    """Where in each text (start, end) the words stand that the query's tokens match best.

    By MaxSim over the texts' own tokens: a pooled vector stands for several words.
    """

    def tokens(given: list[str], is_query: bool) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        options = {"output_value": None, "pool_factor": 1, "show_progress_bar": False}
        found = model.encode(given, is_query=is_query, **options)
        prefixes = {model.query_prefix_id, model.document_prefix_id} - {None}
        special = [*model.tokenizer.all_special_ids, *model.skiplist, *prefixes]
        for ids, vectors, mask in zip(*map(found.get, ENCODED), strict=True):
            ids, vectors, mask = (torch.as_tensor(part).cpu() for part in (ids, vectors, mask))
            counted = mask.bool() & ~torch.isin(ids, torch.tensor(special))
            yield torch.nonzero(counted)[:, 0].numpy(), unit_length(vectors[counted].float())

    ((_, asked),) = tokens([query], True)
    before = 2 if model.document_prefix_id is not None else 1  # [CLS], and the prefix
    spans = []
    for text, (places, vectors) in zip(texts, tokens(list(texts), False), strict=True):
        pieces = model.tokenizer(text, add_special_tokens=False, verbose=False)
        best = places[(asked @ vectors.T).argmax(dim=1).numpy()] - before if len(places) else []
        words = sorted({pieces.token_to_word(int(place)) for place in best})
        spans.append([tuple(pieces.word_to_chars(word)) for word in words])
    return spans


def excerpt(
    text: str,
    spans: Sequence[tuple[int, int]],
    width: int = 160,
    marks: tuple[str, str] = ("**", "**"),
) -> str:
    """The part of a text with most of the spans, these between marks, on one line."""

    def within(start: int) -> list[tuple[int, int]]:
        return [(a, b) for a, b in spans if start <= a and b <= start + width]

    start = end = max([0, *(a for a, _ in spans)], key=lambda place: (len(within(place)), -place))
    parts = ["… " if start else ""]
    for a, b in within(start):
        parts += [text[end:a], marks[0], text[a:b], marks[1]]
        end = b
    parts += [text[end : start + width], " …" if start + width < len(text) else ""]
    return " ".join("".join(parts).split())


def _free_place(folder: str | Path) -> Path:
    """`folder`, if an index may take its place: it is missing, empty, or an index itself."""
    folder = Path(folder)
    if (
        folder.exists()
        and not (folder / INDEX).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise UserError(
            f"{folder} holds something else than an index, which would be lost; expected a new "
            "folder, an empty one, or an index. Name another."
        )
    return folder


def named_model(name: str) -> tuple[str, PooledColBERT]:
    """Where a model is, and the model: ``bundled`` (made if missing), a folder or a hub id."""
    if name == "bundled":
        from l2p_utils.profile import load_profile
        from l2p_utils.training import make_baseline  # takes seconds to import

        name = str(make_baseline(load_profile("quick")))
    return name, load_any(name).eval()


def _weights(model: PooledColBERT) -> str:
    """Hash of a loaded model's weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _empty(folder: Path) -> dict[str, Any]:
    """Settings of an index that begins: nothing in it, and its own name for a collection."""
    name = f"{folder.name}-{uuid.uuid4().hex[:8]}"
    return {"collection": name, "segments": [], "removed": {}, "left_out": {}, "graph_recall": None}


def load_any(name: str) -> PooledColBERT:
    """A model from its folder, or from the hub by its id."""
    return load_model(name) if Path(name).is_dir() else PooledColBERT(name)


# ---------------------------------------------------------------- choosing


class Choice(NamedTuple):
    """The smallest index that `choose` found to be good enough.

    `table` has a row per budget and code, the smallest first, in percent: ``loss`` of NDCG@10
    against the unpooled float32 index, measured or predicted; ``upper``, the upper end of its 95 %
    interval; ``qualifies``; and what the loss is predicted from (see `choose`): ``best``, ``known``
    and ``same``, the share of the ten best documents that stays.
    """

    budget: Budget
    code: str
    table: pd.DataFrame


def known_items(
    model: PooledColBERT, documents: dict[str, str], titles: bool = False, seed: int = 42
) -> Collection:
    """A sentence of each document, or its first line, as a query for the document it is taken from.

    The sentence has 5 to 30 words, a first line 2 to 30; it lies in the part that the model reads,
    and what is left of the document has at least 10. Documents without one have no query.
    """
    rng, most = random.Random(seed), readable(model)
    corpus, queries = dict(documents), {}
    for identifier, text in documents.items():
        pieces = model.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        end = pieces["offset_mapping"][:most][-1][1] if pieces["offset_mapping"] else 0
        parts = re.split(r"\n+" if titles else r"(?<=[.!?])\s+|\n+", text[:end])
        if end < len(text):
            parts.pop()  # it may be broken off
        least, words = 2 if titles else 5, len(text.split())
        fit = [
            part
            for part in (parts[:1] if titles else parts)
            if least <= len(part.split()) <= min(30, words - 10)
        ]
        if fit:
            queries[identifier] = rng.choice(fit)
            corpus[identifier] = text.replace(queries[identifier], " ", 1)
    return Collection("known items", corpus, queries, {q: {q: 1} for q in queries})


def choose(
    model: PooledColBERT,
    documents: Iterable[tuple[str, str]] | Collection,
    max_loss: float = 0.01,
    queries: str | Sequence[str] = "sentences",
    codes: Iterable[str] = CODES,
    sample: int = 1000,
    seed: int = 42,
    progress: bool = True,
) -> Choice:
    """The smallest index of these documents that loses at most so much of NDCG@10.

    Every budget and code of `frontier.sized_ways` is tried on a sample of the documents. Without
    judgments the loss is predicted (`predicted_loss`) from ``best``: the loss where the one right
    document of a query is what the unpooled index finds first. Beside it stands ``known``, the loss
    where it is the document that a made query was taken from (`known_items`).

    Parameters
    ----------
    documents
        Ids and texts; or a collection with judgments, whose loss is measured.
    max_loss
        0.01 means: the upper end of the loss's 95 % interval, prediction error included, is at most
        1 % of the unpooled index's NDCG@10.
    queries
        ``sentences`` taken out of their documents, ``titles`` (first lines), or your own.
    codes
        Those that the index's engine can store.

    Raises
    ------
    UserError
        Where there are fewer than 30 queries.
    """
    if not 0 < max_loss < 1:
        raise UserError(f"max_loss is {max_loss!r}; expected a share such as 0.01, for 1 %.")
    if isinstance(documents, Collection):
        collection = subset(documents, None, sample)
    else:
        chosen = _sampled(documents, sample, seed)
        if isinstance(queries, str):
            collection = known_items(model, chosen, queries == "titles", seed)
        else:  # what is right is not known: the judgments are not used
            asked = {str(i): text for i, text in enumerate(queries) if text.strip()}
            collection = Collection("own", chosen, asked, dict.fromkeys(asked, {min(chosen): 1}))
    if len(collection.queries) < 30:
        raise UserError(
            f"{len(collection.queries)} queries are too few to choose by; expected 30 or more. "
            "Give more documents or queries of your own, or name a budget."
        )
    table = _losses(model, collection, sized_ways(codes=codes), progress)
    if isinstance(documents, Collection):
        table = table.rename(columns={"known": "loss", "known_error": "error"})
    else:
        table["loss"], table["error"] = predicted_loss(table["best"], table["best_error"])
        table = table.drop(columns="known" if isinstance(queries, list) else [])
    table["upper"] = table["loss"] + 1.96 * table["error"]
    table["qualifies"] = (table["upper"] <= 100 * max_loss) | (table["way"] == UNPOOLED)
    table = table.sort_values("bytes_per_document", ignore_index=True)
    best = table[table["qualifies"]].iloc[0]
    return Choice(best["budget"], best["code"], table)


def draw_choice(choice: Choice, max_loss: float) -> NotebookFigure:
    """Loss against bytes per document, with 95 % intervals; what qualifies is filled."""
    table = choice.table[choice.table["way"] != UNPOOLED]
    with matplotlib.rc_context(STYLE):
        figure = NotebookFigure(figsize=(8, 5), layout="constrained")
        axis = figure.subplots()
        for (code, part), marker in zip(table.groupby("code", sort=False), "^oDsv", strict=False):
            x, y = part["bytes_per_document"], part["loss"]
            axis.errorbar(x, y, part["upper"] - y, fmt="none", color="#AAAAAA", zorder=1)
            axis.plot(x, y, marker, markerfacecolor="white", color="#0072B2", label=code)
            good = part["qualifies"]
            axis.plot(x[good], y[good], marker, color="#0072B2")
        axis.axhline(100 * max_loss, color="black", linestyle="--", linewidth=1)
        chosen = choice.table[choice.table["qualifies"]].iloc[0]
        axis.annotate(
            chosen["way"], (chosen["bytes_per_document"], chosen["loss"]), (0, -30),
            textcoords="offset points", ha="center", arrowprops={"arrowstyle": "->"},
        )  # fmt: skip
        axis.set(xscale="log", xlabel="Bytes per document (log scale)")
        axis.set(ylabel="Loss of NDCG@10 (%)", ylim=(min(-8, table["loss"].min()), 40))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.legend(title="values as", fontsize=9)
        figure.suptitle(f"Filled: sure to lose at most {max_loss:.0%}", fontweight="bold")
    figure.alt = (
        "Loss against bytes per document. The smallest that is sure to lose at most "
        f"{max_loss:.0%} is {chosen['way']}: {chosen['bytes_per_document']:,.0f} bytes, "
        f"{chosen['loss']:.1f} %, at most {chosen['upper']:.1f} %."
    )
    return figure


def _sampled(documents: Iterable[tuple[str, str]], most: int, seed: int) -> dict[str, str]:
    """At most so many documents with a text, all equally likely; no others are held."""
    rng, kept = random.Random(seed), []
    for number, document in enumerate(pair for pair in documents if pair[1].strip()):
        if number < most:
            kept.append(document)
        elif (place := rng.randrange(number + 1)) < most:
            kept[place] = document
    return dict(kept)


def _losses(
    model: PooledColBERT, collection: Collection, ways: Sequence[Way], progress: bool = True
) -> pd.DataFrame:
    """What each of the ways loses, percent: ``known`` and ``best`` with their standard errors, and
    ``same``, which stays.
    """
    rows, values = measure(read_tokens(model, collection, progress=progress), ways, progress)
    keys = dict.fromkeys(["model", "collection", "document_length"], "")
    found = summary(rows.assign(**keys), values.assign(**keys))
    table = found[["way", "code", "vectors_per_document", "bytes_per_document", "smaller"]]
    by_way = values.groupby("way", sort=False)
    return table.assign(
        budget=[way.budget for way in ways],
        known=100 - found["kept"],
        known_error=(found["high"] - found["low"]) / 2 / 1.96,
        best=100 - 100 * by_way["best@10"].mean().to_numpy(),
        best_error=100 * by_way["best@10"].sem().to_numpy(),
        same=100 * by_way["same@10"].mean().to_numpy(),
    )


def predict(model: PooledColBERT, name: str, folder: str | Path = PREDICTED) -> None:
    """Store what `choose` would see of a collection's documents beside what its judgments say."""
    collection = load_collection(name)
    items = known_items(model, _sampled(collection.corpus.items(), 1000, 42))
    seen, true = (_losses(model, part, sized_ways()) for part in (items, collection))
    table = seen.drop(columns="budget").assign(
        true=true["known"], true_error=true["known_error"], collection=Path(name).name
    )
    with atomic_path(Path(folder) / f"{slug(Path(name).name)}.csv") as temporary:
        table.round(3).to_csv(temporary, index=False)


def predictions(folder: str | Path = PREDICTED) -> pd.DataFrame:
    """The rows of `predict` for all stored collections."""
    if not (files := sorted(Path(folder).glob("*.csv"))):
        raise UserError(
            f"{folder} holds no rows of `python -m l2p_utils.index predict`; `git restore "
            "data/frontier` brings the stored ones back."
        )
    return pd.concat(map(pd.read_csv, files), ignore_index=True)


def predicted_loss(
    best: ArrayLike, best_error: ArrayLike = 0.0, rows: pd.DataFrame | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The true loss, percent, that a loss of the unpooled index's best documents stands for.

    It grows with the square of that: loss = factor · best² / 100, with a standard error of
    relative · (1 + loss), which `best_error` comes on top of. Both are fitted to `rows`, by default
    to all of `predictions`. Gives the loss and its standard error.
    """
    rows = predictions() if rows is None else rows
    seen, true = rows["best"] ** 2 / 100, rows["true"]
    # what few judgments say counts less
    weights = 1 / ((1 + seen) ** 2 + rows["true_error"] ** 2)
    factor = (weights * seen * true).sum() / (weights * seen**2).sum()
    errors = ((true - factor * seen) / (1 + factor * seen)) ** 2
    relative = np.sqrt(np.average(errors, weights=weights * (1 + seen) ** 2))
    best = np.asarray(best)
    loss = factor * best**2 / 100
    return loss, np.hypot(relative * (1 + loss), factor * best * best_error / 50)


def draw_predictions(rows: pd.DataFrame) -> NotebookFigure:
    """Predicted against true loss, each collection's predicted from the others, with 95 % bands."""
    with matplotlib.rc_context(STYLE):
        figure = NotebookFigure(figsize=(7, 5.4), layout="constrained")
        axis = figure.subplots()
        errors, inside = [], []
        for (name, part), marker in zip(rows.groupby("collection"), "o^sDvP*X", strict=False):
            others = rows[rows["collection"] != name]
            loss, error = predicted_loss(part["best"], part["best_error"], others)
            axis.plot(loss, part["true"], marker, markersize=4, label=name)
            errors += [*(part["true"] - loss)]
            inside += [*(part["true"] <= loss + 1.96 * error)]
        x = np.linspace(0, rows["true"].max(), 50)
        relative = predicted_loss(0, 0, rows)[1]
        half = 1.96 * relative * (1 + x)
        axis.fill_between(x, x - half, x + half, color="#BBBBBB", alpha=0.4, label="95 % of errors")
        axis.plot(x, x, color="black", linewidth=1)
        axis.set(xlabel="Predicted loss (% of NDCG@10)", ylabel="Loss by judgments (%)")
        axis.legend(fontsize=9)
        figure.suptitle("What `choose` predicts without judgments", fontweight="bold")
    figure.alt = (
        f"Predicted against true loss of {len(rows)} ways on {rows['collection'].nunique()} "
        f"collections: the mean absolute error is {np.abs(errors).mean():.1f} percent, "
        f"{100 * np.mean(inside):.0f} % lie below the upper bound."
    )
    return figure


# ---------------------------------------------------------------- engines


class Engine:
    """Keeps an index's vectors, and searches them.

    A document's number is its place among all that were stored, removed ones too: its label in
    `Index.rows`, of which an engine gets lines. `write` stores a segment's vectors, durably, under
    the numbers from `start` on. `read` gives vectors as they are stored, (vectors, dim) float32.
    `search` gives numbers and scores of each query's `k` best living documents, in any order.
    """

    codes: Iterable[str] = CODES  # how it can store vectors
    default = "float16"
    here = True  # vectors are in this process's memory

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings

    def nothing(self, *_: Any) -> None:
        """What an engine need not do, or allows."""

    editable = nothing  # refuse what it cannot do, such as "grow"
    begin = nothing  # something will be written
    delete = nothing  # documents, by number, that `rows` calls dead already
    finish = nothing  # everything is written; gets `rows`
    publish = nothing  # the index has taken its place
    drop = nothing  # delete what lies outside the index's folder
    close = nothing  # let other processes in

    def size(self, rows: pd.DataFrame) -> float:
        """Bytes of the living documents' vectors."""
        vectors = rows["vectors"][rows["live"]]
        mean = vectors.mean() if len(vectors) else 0.0
        return len(vectors) * stored_bytes(mean, self.settings["dim"], self.settings["code"])


class Exact(Engine):
    """Packed vectors in memory-mapped files, one per segment; a search reads all of them."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        super().__init__(folder, settings)
        self.code, self._mapped = CODES[settings["code"]], {}

    def write(self, segment: Path, start: int, ids: Sequence[str], vectors: Vectors) -> None:
        np.save(segment / "vectors.npy", self.code.pack(torch.cat(vectors).numpy()))

    def _packed(self, name: str) -> np.ndarray:
        if name not in self._mapped:
            self._mapped[name] = np.load(self.folder / name / "vectors.npy", mmap_mode="c")
        return self._mapped[name]

    def _decoded(self, packed: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.code.unpack(np.asarray(packed), self.settings["dim"]))

    def read(self, rows: pd.DataFrame) -> Vectors:
        places = zip(rows["segment"], rows["first_vector"], rows["vectors"], strict=True)
        return [self._decoded(self._packed(name)[a : a + n]) for name, a, n in places]

    def search(self, queries: Vectors, k: int, rows: pd.DataFrame) -> Found:
        tokens = torch.cat(queries).T.contiguous()
        begins = np.cumsum([0, *map(len, queries[:-1])])  # of each query, among the tokens
        block = int(np.clip(BLOCK_BYTES // (4 * tokens.shape[1]), 64, BLOCK_VECTORS))
        found: list[list] = [[] for _ in queries]
        for name, part in rows.groupby("segment", sort=False, observed=True):
            packed, live = self._packed(name), part["live"].to_numpy()
            firsts = np.append(part["first_vector"], len(packed))
            cuts = np.searchsorted(firsts, [*range(0, len(packed), block), len(packed)])
            scores = np.empty((len(queries), len(part)), np.float32)
            for a, b in itertools.pairwise(np.unique(cuts)):
                similar = (self._decoded(packed[firsts[a] : firsts[b]]) @ tokens).numpy()
                best = np.maximum.reduceat(similar, firsts[a:b] - firsts[a], axis=0)
                scores[:, a:b] = np.add.reduceat(best, begins, axis=1).T
            scores[:, ~live] = -np.inf
            for hits, line in zip(found, scores, strict=True):
                least = np.partition(line, -k)[-k] if len(line) > k else -np.inf
                places = np.flatnonzero((line >= least) & live)  # with all that tie
                hits.append((part.index.to_numpy()[places], line[places]))
        return [tuple(map(np.concatenate, zip(*hits, strict=True))) for hits in found]


_OPEN: dict[tuple[str, str], tuple[edge.EdgeShard, FileLock]] = {}  # by this process


class Qdrant(Engine):
    """Qdrant Edge: a shard in the index's folder, which one process at a time holds open.

    It keeps no log: points are flushed before their segment counts as written, and points that no
    segment knows are passed over.
    """

    # Turbo8 is Qdrant's 8-bit code of rotated values. Its Uint8 wants whole numbers from 0 to 255:
    # of a unit vector it keeps zeros.
    codes = {"float32": "Float32", "float16": "Float16", "int8": "Turbo8"}

    @property
    def _key(self) -> tuple[str, str]:
        return str(self.folder.resolve()), self.settings["collection"]

    @property
    def shard(self) -> edge.EdgeShard:
        """The shard, opened where it is not."""
        if self._key in _OPEN:
            return _OPEN[self._key][0]
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "qdrant.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"Another process holds the index {self.folder} open, and Qdrant Edge lets one in "
                "at a time. Wait until it has ended; many may read an exact index (--engine "
                "exact), or use a server (--url)."
            ) from None
        config = edge.EdgeConfig(
            vectors=edge.EdgeVectorParams(
                self.settings["dim"],
                edge.Distance.Dot,
                multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim),
                datatype=getattr(edge.VectorStorageDatatype, self.codes[self.settings["code"]]),
            ),
            hnsw_config=edge.HnswIndexConfig(16 if self.settings["graph"] else 0, 100, 10),
            optimizers=edge.EdgeOptimizersConfig(indexing_threshold=1),
            wal_enabled=False,
        )
        place = self.folder / "qdrant"
        if not place.exists():
            with atomic_path(place) as temporary:
                edge.EdgeShard.create(str(temporary), config).close()
        _OPEN[self._key] = edge.EdgeShard.load(str(place), config), lock
        return _OPEN[self._key][0]

    def begin(self) -> None:
        self._count()  # refused, if need be, before anything is encoded

    def close(self) -> None:
        shard, lock = _OPEN.pop(self._key, (None, None))
        if shard:
            shard.close()
            lock.release()

    def _put(self, points: list[tuple[int, list, dict]]) -> None:
        given = [edge.Point(*point) for point in points]
        self.shard.update(edge.UpdateOperation.upsert_points(given))

    def _get(self, numbers: list[int]) -> list[Any]:
        return self.shard.retrieve(numbers, False, True)

    def _count(self) -> int:
        return self.shard.count(edge.CountRequest())

    def _ask(self, queries: list[list], k: int, exact: bool) -> list[list[Any]]:
        how = {"limit": k, "params": edge.SearchParams(exact=exact)}
        asked = [edge.QueryRequest(query=edge.Query.Nearest(query), **how) for query in queries]
        return self.shard.query_batch(edge.QueryBatchRequest(asked))

    def _flush(self) -> None:
        self.shard.flush()

    def _link(self) -> None:
        self.close()  # opened again with the graph's settings
        self.shard.optimize()
        self.close()

    def delete(self, numbers: list[int]) -> None:
        self.shard.update(edge.UpdateOperation.delete_points(numbers))
        self._flush()

    def write(self, segment: Path, start: int, ids: Sequence[str], vectors: Vectors) -> None:
        points = [(start + i, vectors[i], {"id": name}) for i, name in enumerate(ids)]
        for some in self._requests(points, max(map(len, vectors))):
            self._put([(number, v.tolist(), payload) for number, v, payload in some])
        self._flush()

    def read(self, rows: pd.DataFrame) -> Vectors:
        found = {}
        for some in self._requests(rows.index.tolist(), rows["vectors"].max()):
            found |= {point.id: torch.tensor(point.vector) for point in self._get(some)}
        return [found[number] for number in rows.index]

    @staticmethod
    def _requests(items: list, vectors: int) -> Iterator[list]:
        step = max(REQUEST_VECTORS // vectors, 1) if items else 1
        return (items[i : i + step] for i in range(0, len(items), step))

    def search(
        self, queries: Vectors, k: int, rows: pd.DataFrame, exact: bool | None = None
    ) -> Found:
        live = np.append(rows["live"], False)  # the last for numbers beyond
        others = self._count() - live.sum()  # removed, or of an addition that was broken off
        if others < 0:
            raise UserError(
                f"{self.folder} has {live.sum()} documents, Qdrant {live.sum() + others} of them: "
                "some were deleted elsewhere. Build the index again."
            )
        exact = not self.settings["graph"] if exact is None else exact
        found = []
        for hits in self._ask([query.tolist() for query in queries], k + int(others), exact):
            numbers = np.array([hit.id for hit in hits], dtype=int)
            kept = live[np.minimum(numbers, len(rows))]
            found.append((numbers[kept], np.array([hit.score for hit in hits])[kept]))
        return found

    def finish(self, rows: pd.DataFrame) -> None:
        """Build the graph, where one is wanted, and note how much it finds of what a scan does."""
        if self.settings["graph"] is None:
            self.settings["graph"] = len(rows) >= GRAPH_FROM
        if not self.settings["graph"]:
            return
        self._link()
        sample = rows[rows["live"]]
        documents = self.read(sample.sample(min(100, len(sample)), random_state=0))
        # a quarter of a document's vectors is found as well, or as badly, as a query
        asked = [vectors[::4] for vectors in documents]
        scan, graph = (self.search(asked, 10, rows, exact) for exact in (True, False))
        pairs = zip(scan, graph, strict=True)
        shares = [len(np.intersect1d(a, b)) / len(a) for (a, _), (b, _) in pairs]
        self.settings["graph_recall"] = round(float(np.mean(shares)), 3)


def connect(url: str) -> Any:
    """A client of the Qdrant server at `url`; its key is in $QDRANT_API_KEY."""
    from qdrant_client import QdrantClient  # takes a second to import

    key = os.environ.get("QDRANT_API_KEY") or None
    return QdrantClient(location=url, api_key=key, timeout=60, check_compatibility=False)


class QdrantServer(Qdrant):
    """A collection on a Qdrant server or cluster."""

    here = False

    def __init__(self, folder: Path, settings: dict[str, Any]):
        super().__init__(folder, settings)
        import qdrant_client

        self.models, self.client = qdrant_client.models, connect(settings["url"])

    def _call(self, method: str, **given: Any) -> Any:
        """A method of the client; what goes wrong becomes a sentence, without the key."""
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        try:
            return getattr(self.client, method)(self.settings["collection"], **given)
        except ResponseHandlingException as error:
            what = f"does not answer: {error.source}. Is it running, and is the address right?"
        except UnexpectedResponse as error:
            what = f"refused {method}: {error.status_code} {error.reason_phrase}."
            if error.status_code in (401, 403):
                what = "asks for a key; set a valid one in the environment, as QDRANT_API_KEY."
            elif b'"error":' in error.content:
                what = f"refused {method}: {error.structured()['status']['error']}"
        raise UserError(f"The Qdrant server at {self.settings['url']} {what}")

    def begin(self) -> None:
        if self._call("collection_exists"):
            return
        models = self.models
        most = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        vectors = models.VectorParams(
            size=self.settings["dim"],
            distance=models.Distance.DOT,
            datatype=models.Datatype(self.codes[self.settings["code"]].lower()),
            multivector_config=most,
        )
        scanned = models.HnswConfigDiff(m=0)
        self._call("create_collection", vectors_config=vectors, hnsw_config=scanned)

    def _put(self, points: list[tuple[int, list, dict]]) -> None:
        point = self.models.PointStruct
        given = [point(id=number, vector=v, payload=payload) for number, v, payload in points]
        self._call("upsert", points=given, wait=True)

    def _get(self, numbers: list[int]) -> list[Any]:
        return self._call("retrieve", ids=numbers, with_vectors=True, with_payload=False)

    def _count(self) -> int:
        return self._call("count").count

    def _ask(self, queries: list[list], k: int, exact: bool) -> list[list[Any]]:
        how = {"limit": k, "params": self.models.SearchParams(exact=exact)}
        asked = [self.models.QueryRequest(query=query, **how) for query in queries]
        return [found.points for found in self._call("query_batch_points", requests=asked)]

    def _flush(self) -> None:
        """A server keeps a log."""

    def _link(self) -> None:
        graph = self.models.HnswConfigDiff(m=16)
        always = self.models.OptimizersConfigDiff(indexing_threshold=1)  # KiB
        self._call("update_collection", hnsw_config=graph, optimizers_config=always)
        time.sleep(1)  # the server begins a little later
        while self._call("get_collection").status != self.models.CollectionStatus.GREEN:
            time.sleep(1)

    def delete(self, numbers: list[int]) -> None:
        self._call("delete", points_selector=self.models.PointIdsList(points=numbers))

    def drop(self) -> None:
        self._call("delete_collection")

    def close(self) -> None:
        """A server lets everybody in."""


class Plaid(Exact):
    """PyLate's PLAID: centroids, and residuals of so many bits; a search reads some of them.

    Segments hold float16 vectors until the index is built, of all of them at once.
    """

    codes = ("4 bits", "int8", "1 bit")
    default = "4 bits"

    def __init__(self, folder: Path, settings: dict[str, Any]):
        super().__init__(folder, settings)
        self.code, self.place = CODES["float16"], folder / "plaid"

    def editable(self, action: str) -> None:
        raise UserError(
            f"A PLAID index keeps no vectors, and cannot {action}. Build it again; or keep an "
            "exact index, which can, and make PLAID's of it with `shrink … --engine plaid`."
        )

    def finish(self, rows: pd.DataFrame) -> None:
        if (count := rows["vectors"].sum()) < PLAID_VECTORS:
            raise UserError(
                f"PLAID needs at least {PLAID_VECTORS} vectors; these documents have {count}. Pass "
                "--engine exact."
            )
        numbers = rows.index.astype(str).tolist()
        plaid_index(self.place, self.read(rows), numbers, nbits=CODES[self.settings["code"]].bits)

    def publish(self) -> None:
        for name in self.settings["segments"]:
            remove(self.folder / name / "vectors.npy")

    def search(self, queries: Vectors, k: int, rows: pd.DataFrame) -> Found:
        live, found = rows["live"].to_numpy(), []
        most = min(k + int((~live).sum()), len(rows))
        for hits in plaid_ranking(self.plaid, queries, most):
            numbers = np.array([number for _, number in hits], dtype=int)
            scores = np.array([score for score, _ in hits])
            found.append((numbers[live[numbers]], scores[live[numbers]]))
        return found

    @cached_property
    def plaid(self) -> Any:
        """PyLate's index, open."""
        return plaid_index(self.place)

    def size(self, rows: pd.DataFrame) -> float:
        return index_size(self.place)


ENGINES: dict[str, type[Engine]] = {"qdrant": Qdrant, "exact": Exact, "plaid": Plaid}


def _storage(engine: str | None, code: str | None, url: str | None) -> dict[str, Any]:
    """Engine, code and address as settings; what does not go together is refused."""
    engine = engine or ("qdrant" if url or code in (None, *Qdrant.codes) else "exact")
    if engine not in ENGINES or (url and engine != "qdrant"):
        raise UserError(
            f"engine is {engine!r}, url {url!r}; expected one of {list(ENGINES)}, and a url for "
            "Qdrant's server alone."
        )
    code = code or ENGINES[engine].default
    if code not in ENGINES[engine].codes:
        raise UserError(
            f"code is {code!r}; expected one of {list(ENGINES[engine].codes)}, which the {engine} "
            "engine can store. Choose among these (--bits), or --engine exact."
        )
    return {"engine": engine, "code": code, "url": url}


# ---------------------------------------------------------------- the index


class Index:
    """An index in a folder; `build` makes one, `open` opens it.

    Examples
    --------
    >>> index = Index.open("my-index")                                         # doctest: +SKIP
    >>> index.search(["how to interpolate"], k=5)[0][0].id                     # doctest: +SKIP
    """

    def __init__(self, folder: Path, settings: dict[str, Any], model: PooledColBERT | None = None):
        self.folder, self.settings, self._model = folder, settings, model
        self.timing: dict[str, float] = {}  # of what was encoded last

    @classmethod
    def open(cls, folder: str | Path, model: PooledColBERT | None = None) -> Index:
        """An index that was built; `model` where its own folder has moved."""
        if not (Path(folder) / INDEX).is_file():
            raise UserError(f"{folder} holds no index ({INDEX}). Build one: `build DOCUMENTS`.")
        return cls(Path(folder), read_json(Path(folder) / INDEX), model)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        documents: Iterable[tuple[str, str]],
        model: PooledColBERT,
        name: str,
        budget: float | Budget = 4,
        pool_method: str = "kmeans",
        code: str | None = None,
        progress: bool = True,
        engine: str | None = None,
        url: str | None = None,
        graph: bool | None = None,
    ) -> Index:
        """Encode, pool and code documents (ids and texts), and put the index in place of a former.

        What was finished when a build was broken off is not encoded twice: the same call goes on.
        Means have unit length. Empty texts and ids that come again are left out and counted (see
        `stats`). `name` is what `open` loads the model from.

        Parameters
        ----------
        code
            A key of `frontier.CODES`; float16 by default, 4 bits for PLAID.
        engine
            ``"qdrant"``, ``"exact"`` or ``"plaid"``; by default Qdrant, if it can store `code`.
        url
            A Qdrant server's; without one, Qdrant Edge keeps the vectors in the folder.
        graph
            Whether Qdrant searches through an HNSW graph, which misses some documents: `stats`
            says how many. By default from `GRAPH_FROM` documents on.
        """
        folder, budget = _free_place(folder), Budget.of(budget)
        budget.check(pool_method, 1)
        settings = {
            "model": name,
            "document_length": model.document_length,
            "dim": model[-1].out_features,
            "pool_method": pool_method,
            "budgets": [vars(budget)],  # and those that it was shrunk by
            "weights": _weights(model),
            "graph": graph,
            **_storage(engine, code, url),
        }
        work = folder.with_name(f".{folder.name}.building")
        if not settings_match(work, settings):
            if (work / PROVENANCE).is_file():
                begun = read_json(work / PROVENANCE)
                cls(work, begun["settings"] | begun.get("new", {})).engine.drop()
            remove(work)
            write_json(work / PROVENANCE, {"settings": settings, "new": _empty(folder)})
        index = cls(work, settings | read_json(work / PROVENANCE)["new"], model)
        index._extend(documents, progress)
        if not index.settings["segments"]:
            raise UserError("There are no documents with a text to make an index of.")
        return index._publish(folder)

    def _publish(self, folder: Path) -> Index:
        """Put this index, which is whole, in the place of a former one at `folder`."""
        self.engine.finish(self.rows)
        self._save()
        self.engine.close()
        former = Index.open(folder) if (folder / INDEX).is_file() else None
        with atomic_path(folder) as temporary:
            os.rename(self.folder, temporary)
        if former:
            former.engine.drop()
        index = Index.open(folder, self._model)
        index.engine.publish()
        index.timing = self.timing
        return index

    @cached_property
    def engine(self) -> Engine:
        """What keeps the vectors."""
        server = self.settings.get("url")
        kind = QdrantServer if server else ENGINES[self.settings.get("engine", "exact")]
        return kind(self.folder, self.settings)

    def close(self) -> None:
        """Let other processes in: one at a time has a Qdrant Edge index open."""
        self.engine.close()

    @cached_property
    def rows(self) -> pd.DataFrame:
        """A line for each document that was stored, by its number, without its text.

        Columns ``id``; ``vectors``, ``tokens``, ``pieces`` and ``lost``, how many; ``segment``,
        ``place`` and ``first_vector``, where it is; ``live``, whether it was not removed.
        """
        columns = ["id", "vectors", "tokens", "pieces", "lost"]
        parts = []
        for name in self.settings["segments"]:
            part = pd.read_parquet(self.folder / name / "documents.parquet", columns=columns)
            removed = self.settings["removed"].get(name, [])
            part["segment"], part["place"] = name, np.arange(len(part))
            part["first_vector"] = part["vectors"].cumsum() - part["vectors"]
            parts.append(part.assign(live=~part["id"].isin(removed)))
        return pd.concat(parts, ignore_index=True).astype({"segment": "category"})

    @cached_property
    def model(self) -> PooledColBERT:
        """The model that encodes queries and what is added."""
        model = self._model or load_any(self.settings["model"])
        if self.settings.get("weights", made := _weights(model)) != made:
            raise UserError(
                f"{self.folder} was made with another model than {self.settings['model']} now is. "
                "Expected the same weights: open the index with that model, or build it again."
            )
        model.document_length = self.settings["document_length"]
        return model.eval()

    def _save(self) -> None:
        write_json(self.folder / INDEX, self.settings)

    def _extend(self, documents: Iterable[tuple[str, str]], progress: bool) -> None:
        """Write documents as further segments; of one that is there already nothing is encoded."""
        seen, left_out = set(), Counter(self.settings["left_out"])

        def fresh() -> Iterator[tuple[str, str]]:
            for identifier, text in documents:
                kind = "empty" if not text.strip() else "repeated" if identifier in seen else ""
                left_out[kind or "none"] += 1
                if not kind:
                    seen.add(identifier)
                    yield identifier, text

        self.engine.begin()
        bar = tqdm(desc="Indexing", unit=" documents", disable=not progress)
        rest, names = fresh(), list(self.settings["segments"])
        start, encoded, began = len(self.rows) if names else 0, 0, time.perf_counter()
        while part := list(itertools.islice(rest, SEGMENT)):
            names.append(f"{len(names):05d}")
            content = hashlib.sha256(json.dumps([start, part]).encode()).hexdigest()
            segment = self.folder / names[-1]
            if not settings_match(segment, {"content": content}):
                self._write(segment, start, *zip(*part, strict=True), content)
                encoded += len(part)
            start += len(part)
            bar.update(len(part))
        bar.close()
        seconds = time.perf_counter() - began
        self.timing = {"documents encoded": encoded, "seconds": round(seconds, 1)}
        self.timing["documents per second"] = round(encoded / seconds, 1)
        del left_out["none"]
        self.settings |= {"left_out": dict(left_out), "segments": names}
        self.__dict__.pop("rows", None)

    def _write(
        self, segment: Path, start: int, ids: Sequence[str], texts: Sequence[str], content: str
    ) -> None:
        lengths = [
            len(self.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            for text in texts
        ]
        lost = np.maximum(np.array(lengths) - readable(self.model), 0)
        tokens = encode(self.model, texts, is_query=False)
        vectors, sizes = tokens, None
        for budget in self.settings["budgets"]:
            vectors, sizes = self._pool(vectors, sizes, Budget(**budget))
        frame = pd.DataFrame({"id": ids, "text": texts, "pieces": lengths, "lost": lost})
        frame["tokens"] = [*map(len, tokens)]
        self._store(segment, start, frame, vectors, sizes, content)

    def _pool(self, vectors: list[torch.Tensor], sizes: list | None, budget: Budget) -> tuple:
        options = {"renormalize": True, "weights": sizes, "return_sizes": True, **vars(budget)}
        return pool(vectors, pool_method=self.settings["pool_method"], **options)

    def _store(
        self,
        segment: Path,
        start: int,
        frame: pd.DataFrame,
        vectors: list[torch.Tensor],
        sizes: list[np.ndarray],
        content: str = "",
    ) -> None:
        with atomic_path(segment) as temporary:
            temporary.mkdir(parents=True)
            # Qdrant Edge maps its files: on a full disk the process would be killed.
            needed = 4 * sum(v.numel() for v in vectors) + frame["text"].str.len().sum()
            if (free := shutil.disk_usage(temporary).free) < needed + SPARE_BYTES:
                raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB are free", str(self.folder))
            self.engine.write(temporary, start, frame["id"].tolist(), vectors)
            np.save(temporary / "sizes.npy", np.concatenate(sizes).astype(np.uint16))
            frame = frame.assign(vectors=[*map(len, vectors)])
            options = {"index": False, "compression": "zstd", "row_group_size": TEXTS}
            frame.to_parquet(temporary / "documents.parquet", **options)
            write_json(temporary / PROVENANCE, {"settings": {"content": content}})

    def _segment(self, name: str) -> tuple[pd.DataFrame, list[torch.Tensor], list[np.ndarray]]:
        """What is left of a segment: its documents' table, vectors (decoded) and cluster sizes."""
        rows = self.rows[self.rows["segment"] == name]
        ends, live = rows["first_vector"].to_numpy()[1:], rows["live"].to_numpy()
        frame = pd.read_parquet(self.folder / name / "documents.parquet")
        sizes = np.split(np.load(self.folder / name / "sizes.npy").astype(float), ends)
        kept = [sizes[i] for i in np.flatnonzero(live)]
        return frame[live].reset_index(drop=True), self.engine.read(rows[live]), kept

    # ------------------------------------------------------------ use

    def search(self, queries: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """The `k` best documents of each query by MaxSim, best first; ties by id, descending."""
        check_whole("k", k, 1, "how many documents per query")
        asked = encode(self.model, list(queries), is_query=True) if len(queries) else []
        if not asked or not self.rows["live"].any():
            return [[] for _ in asked]
        found = []
        for numbers, scores in self.engine.search(asked, k, self.rows):
            ids = self.rows["id"].iloc[numbers]
            best = heapq.nlargest(k, zip(scores.tolist(), ids, numbers.tolist(), strict=True))
            found.append([Hit(name, score, self._text(number)) for score, name, number in best])
        return found

    def _text(self, number: int) -> str:
        segment, place = (self.rows[column].iat[number] for column in ("segment", "place"))
        file = pq.ParquetFile(self.folder / segment / "documents.parquet")
        group, row = divmod(int(place), file.metadata.row_group(0).num_rows)
        return file.read_row_group(group, ["text"], use_threads=False)["text"][row].as_py()

    def add(self, documents: Iterable[tuple[str, str]], progress: bool = False) -> None:
        """Add documents; one whose id is there already takes its place."""
        self.engine.editable("grow")
        documents, before = list(documents), len(self.rows)
        self._extend(documents, progress)
        replaced = self._forget([name for name, _ in documents], before)
        self.engine.finish(self.rows)
        self._save()
        if replaced:
            self.engine.delete(replaced)

    def remove(self, ids: Iterable[str]) -> int:
        """Remove documents; gives how many there were."""
        removed = self._forget(list(ids), len(self.rows))
        self._save()
        if removed:
            self.engine.delete(removed)
        return len(removed)

    def _forget(self, ids: Sequence[str], before: int) -> list[int]:
        """Note as removed the documents with these ids and a number below `before`."""
        rows = self.rows[:before]
        rows = rows[rows["live"] & rows["id"].isin(ids)]
        for name, part in rows.groupby("segment", observed=True):
            gone = self.settings["removed"].get(name, [])
            self.settings["removed"][name] = sorted([*gone, *part["id"]])
        self.__dict__.pop("rows", None)
        return rows.index.tolist()

    def shrink(
        self,
        folder: str | Path,
        budget: float | Budget = 1,
        code: str | None = None,
        engine: str | None = None,
        url: str | None = None,
    ) -> Index:
        """Another index, in `folder`, of the same documents with fewer vectors or bits.

        The model is not needed: what is stored is pooled further, by its clusters' sizes. Removed
        documents are gone for good. The engine stays the same, if it can store `code` and no other
        is named.
        """
        budget = Budget.of(budget)
        new = self._stored_anew(code, engine, url)
        new["budgets"] = [*self.settings["budgets"], vars(budget)]
        return Index._rewritten(folder, [self], new, lambda *stored: self._pool(*stored, budget))

    @classmethod
    def merge(
        cls,
        folder: str | Path,
        indexes: Sequence[Index],
        engine: str | None = None,
        url: str | None = None,
    ) -> Index:
        """One index, in `folder`, of several that were made alike, such as parts of a collection.

        Of documents with the same id the first stays; the others are counted as repeated.
        """
        alike = ["weights", "document_length", "dim", "pool_method", "budgets", "code"]
        first, *others = indexes
        for other in others:
            for key in alike:
                one, two = first.settings.get(key), other.settings.get(key)
                if one != two:
                    raise UserError(
                        f"{first.folder} and {other.folder} were made differently: {key} is {one} "
                        f"and {two}. Expected parts of one collection, built with the same options."
                    )
        new = first._stored_anew(None, engine, url)
        return cls._rewritten(folder, indexes, new, lambda *stored: stored)

    def _stored_anew(self, code: str | None, engine: str | None, url: str | None) -> dict[str, Any]:
        """Settings of another index of these documents: what is not given stays, if it can."""
        own = {"engine": "exact", "url": None, "graph": False} | self.settings
        code = code or own["code"]
        if engine is None and url is None and code in ENGINES[own["engine"]].codes:
            engine, url = own["engine"], own["url"]
        if engine in ENGINES and code == own["code"] and code not in ENGINES[engine].codes:
            code = None
        return {"graph": own["graph"]} | _storage(engine, code, url)

    @classmethod
    def _rewritten(
        cls, folder: str | Path, sources: Sequence[Index], new: dict[str, Any], change: Callable
    ) -> Index:
        """An index in `folder` of what is left of others, their vectors and sizes changed."""
        target = _free_place(folder)
        for source in sources:
            source.engine.editable("be written anew")
            if target.resolve() == source.folder.resolve():
                raise UserError(f"{folder} is the index itself; name another folder for the new.")
        work = target.with_name(f".{target.name}.writing")
        remove(work)
        made = cls(work, sources[0].settings | new | _empty(target), sources[0]._model)
        left_out, seen, start = Counter(), set(), 0
        made.engine.begin()
        try:
            for source in sources:
                left_out.update(source.settings["left_out"])
                for name in tqdm(source.settings["segments"], "Writing", disable=None):
                    frame, vectors, sizes = source._segment(name)
                    kept = [i for i, known in enumerate(frame["id"].isin(seen)) if not known]
                    left_out["repeated"] += len(frame) - len(kept)
                    seen.update(frame["id"])
                    if not kept:
                        continue
                    stored = change([vectors[i] for i in kept], [sizes[i] for i in kept])
                    made.settings["segments"].append(f"{len(made.settings['segments']):05d}")
                    segment = work / made.settings["segments"][-1]
                    made._store(segment, start, frame.iloc[kept], *stored)
                    start += len(kept)
            if not start:
                raise UserError(f"{sources[0].folder} has no documents left.")
        except BaseException:
            made.engine.drop()
            made.engine.close()
            remove(work)
            raise
        made.settings["left_out"] = {kind: n for kind, n in left_out.items() if n}
        return made._publish(target)

    def export(self, file: str | Path) -> None:
        """Write ids, texts, vectors (as stored, decoded) and cluster sizes as one Parquet file."""
        self.engine.editable("be exported")
        schema = pa.schema(
            [("id", pa.string()), ("text", pa.string())]
            + [("vectors", pa.list_(pa.list_(pa.float32()))), ("sizes", pa.list_(pa.uint16()))]
        )
        with atomic_path(file) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for name in self.settings["segments"]:
                frame, vectors, sizes = self._segment(name)
                columns = [frame["id"], frame["text"], [v.tolist() for v in vectors]]
                columns.append([size.astype(np.uint16).tolist() for size in sizes])
                writer.write_table(pa.table(columns, schema=schema))

    def stats(self) -> pd.Series:
        """Documents, vectors, bytes of vectors, and how much less that is than unpooled float32.

        ``lost``: the share of word pieces that come after the model's length and are not read.
        """
        documents, dim = self.rows[self.rows["live"]], self.settings["dim"]
        count, size = len(documents), self.engine.size(self.rows)
        whole = count * stored_bytes(documents["tokens"].mean() if count else 0.0, dim)
        disk = sum(file.stat().st_blocks * 512 for file in self.folder.rglob("*"))
        memory = self.rows.memory_usage(deep=True).sum() + (size if self.engine.here else 0)
        settings = {"engine": "exact", "code": None} | self.settings
        where = {"url": "server", "graph_recall": "recall@10 of the graph, against a scan"}
        return pd.Series(
            {
                "engine": f"{settings['engine']}, {settings['code']}",
                **{label: settings[key] for key, label in where.items() if settings.get(key)},
                "documents": count,
                "vectors per document": round(documents["vectors"].mean(), 1),
                "bytes per document": round(size / max(count, 1), 1),
                "times smaller than unpooled float32": round(whole / max(size, 1), 1),
                "bytes of vectors": round(size),
                "bytes on this disk, texts included": disk,
                "bytes of memory that search needs here": round(memory),
                "documents cut": int((documents["lost"] > 0).sum()),
                "word pieces lost, %": round(
                    100 * documents["lost"].sum() / max(documents["pieces"].sum(), 1), 1
                ),
                **{f"left out: {kind}": n for kind, n in self.settings["left_out"].items()},
            },
            dtype=object,
        )


# ---------------------------------------------------------------- the notebook


def search_box(
    index: Index, query: str, k: int = 5, factors: Sequence[int] = (1, 2, 4, 8)
) -> ipywidgets.Widget | HTML:
    """A query box, and a slider that pools the index further; elsewhere their first position.

    Hits have the words that match in colour. Below stands what the index itself finds and the
    smaller one does not.
    """

    @functools.cache
    def shrunken(factor: int) -> Index:
        folder = Path(tempfile.mkdtemp(prefix="smaller-index-")) / "index"
        return index if factor == 1 else index.shrink(folder, factor)

    def show(query: str, factor: int) -> HTML:
        hits, whole = (some.search([query], k)[0] for some in (shrunken(factor), index))
        words = matched_words(index.model, query, [hit.text for hit in hits])
        lines = ""
        for hit, spans in zip(hits, words, strict=True):
            part = html.escape(excerpt(hit.text, spans, 240, ("\0", "\1")))
            part = part.replace("\0", "<mark>").replace("\1", "</mark>")
            lines += f"<li><b>{html.escape(hit.id)}</b> ({hit.score:.2f}) {part}</li>"
        gone = [hit.id for hit in whole if hit.id not in {hit.id for hit in hits}]
        size = shrunken(factor).stats()["bytes per document"]
        note = f"{size:,.0f} bytes per document" + (f"; lost: {', '.join(gone)}" if gone else "")
        return HTML(f"<ol>{lines}</ol><p>{html.escape(note)}</p>")

    if not is_live():
        return show(query, factors[0])
    box = ipywidgets.Text(query, description="query", continuous_update=False)
    slider = ipywidgets.SelectionSlider(options=factors, description="pooled again")
    return ipywidgets.interactive(show, query=box, factor=slider)


# ---------------------------------------------------------------- the shell


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.index", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, what: str, *places: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what, description=what)
        for place in places:
            sub.add_argument(place)
        return sub

    def placed(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--engine", choices=ENGINES, help="qdrant, unless --bits is 4 or 1")
        sub.add_argument("--url", help="of a Qdrant server; its key is in $QDRANT_API_KEY")

    def sized(sub: argparse.ArgumentParser, default: str, losing: bool = False) -> None:
        budget = sub.add_mutually_exclusive_group()
        budget.add_argument("--pool-factor", type=float, help="about how many vectors become one")
        budget.add_argument("--max-vectors", type=int, help="at most so many per document")
        if losing:
            what = "choose size and bits: lose at most so much of NDCG@10, such as 1%%"
            budget.add_argument("--max-loss", type=_share, help=what)
        bits = dict(zip(("32", "16", "8", "4", "1"), CODES, strict=True))
        sub.add_argument("--bits", choices=bits, help=f"per value ({default})")
        placed(sub)

    def read(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--column", help="the field with the text")
        sub.add_argument("--passages", action="store_true", help="split what is too long to read")

    build = command("build", "Make an index, or go on with one that was broken off.", "documents")
    build.add_argument("--out", required=True, help="the index's folder")
    build.add_argument("--model", default="bundled", help="bundled, a folder or a hub id")
    build.add_argument("--document-length", type=int, help="word pieces that are read")
    build.add_argument("--queries", help="with --max-loss: a file of yours, or titles")
    build.add_argument("--part", help="such as 2/3: every third document, from the second on")
    graph = "search through a graph: faster, and misses documents (from 50,000 documents on)"
    build.add_argument("--graph", action=argparse.BooleanOptionalAction, help=graph)
    sized(build, "16; 4 for PLAID", losing=True)
    read(build)
    search = command("search", "Print the best documents for a query.", "index", "query")
    search.add_argument("-k", type=int, default=10)
    read(command("add", "Add documents; known ids are replaced.", "index", "documents"))
    command("remove", "Remove documents.", "index").add_argument("ids", nargs="+")
    predicts = command("predict", "How well `choose` predicts judgments.", "collection")
    predicts.add_argument("--model", default="bundled", help="bundled, a folder or a hub id")
    command("stats", "What is stored, and how much smaller it is.", "index")
    sized(
        command("shrink", "Another index with fewer vectors, without the model.", "index", "out"),
        "as they are",
    )
    merge = command("merge", "One index of several, such as those of --part.")
    merge.add_argument("indexes", nargs="+")
    merge.add_argument("--out", required=True, help="the index's folder")
    placed(merge)
    command("export", "Write ids, texts and vectors as Parquet.", "index", "file")
    return parser


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def _chosen(options: argparse.Namespace, model: PooledColBERT) -> tuple[Budget, str]:
    """What `choose` finds, told."""
    documents, queries = _documents(options, model), options.queries or "sentences"
    if (Path(options.documents) / "qrels" / "test.tsv").is_file():
        documents = load_collection(options.documents)
    if queries not in ("sentences", "titles"):
        if not Path(queries).is_file():
            raise UserError(f"{queries} does not exist; expected a file with a query in each line.")
        queries = Path(queries).read_text("utf-8").splitlines()
    engine = options.engine or ("qdrant" if options.url else "exact")
    if engine == "plaid":
        raise UserError("--max-loss chooses for exact search; with PLAID, name a budget and bits.")
    choice = choose(model, documents, options.max_loss, queries, ENGINES[engine].codes)
    best = choice.table[choice.table["qualifies"]].iloc[0]
    print(choice.table.drop(columns="budget").round(2).to_string(index=False))
    if best["way"] == UNPOOLED:
        print(f"Nothing smaller is sure to lose at most {options.max_loss:.1%}: all is kept.")
    else:
        print(
            f"Chosen: {best['way']}, {best['smaller']:.0f} times smaller than unpooled float32. "
            f"It loses about {best['loss']:.1f} % of NDCG@10, and at most {best['upper']:.1f} %."
        )
    return choice.budget, choice.code


def _budget(options: argparse.Namespace, factor: float) -> Budget:
    if options.max_vectors is not None:
        return Budget(max_vectors=options.max_vectors)
    return Budget(factor if options.pool_factor is None else options.pool_factor)


def _code(bits: str | None) -> str | None:
    return None if bits is None else next(c for c, how in CODES.items() if how.bits == int(bits))


def _documents(options: argparse.Namespace, model: PooledColBERT) -> Iterable[tuple[str, str]]:
    documents = read_documents(options.documents, options.column)
    if part := getattr(options, "part", None):
        first, parts = map(int, part.split("/")) if re.fullmatch(r"\d+/\d+", part) else (0, 0)
        if not 1 <= first <= parts:
            raise UserError(f"--part is {part}; expected such as 1/2 and 2/2.")
        documents = itertools.islice(documents, first - 1, None, parts)
    return passages(model, documents) if options.passages else documents


def main(arguments: list[str] | None = None) -> int:
    """Build, search, grow and shrink an index of your own documents."""
    options = _parser().parse_args(arguments)
    try:
        if getattr(options, "bits", None) in ("4", "1") and not (options.engine or options.url):
            print(
                f"The exact engine is taken: Qdrant does not store {options.bits} bits per value."
            )
        if options.command == "build":
            name, model = named_model(options.model)
            model.document_length = options.document_length or model.document_length
            if options.max_loss is None:
                budget, code = _budget(options, 4), _code(options.bits)
            else:
                budget, code = _chosen(options, model)
            documents = _documents(options, model)
            where = {"engine": options.engine, "url": options.url, "graph": options.graph}
            index = Index.build(options.out, documents, model, name, budget, code=code, **where)
            print(pd.concat([index.stats(), pd.Series(index.timing, dtype=object)]).to_string())
            return 0
        if options.command == "merge":
            parts = [Index.open(folder) for folder in options.indexes]
            print(Index.merge(options.out, parts, options.engine, options.url).stats().to_string())
            return 0
        if options.command == "predict":
            predict(named_model(options.model)[1], options.collection)
            save_figure(draw_predictions(predictions()), from_root("figures/frontier"), "predicted")
            return 0
        index = Index.open(options.index)
        if options.command == "search":
            hits = index.search([options.query], options.k)[0]
            words = matched_words(index.model, options.query, [hit.text for hit in hits])
            for hit, spans in zip(hits, words, strict=True):
                print(f"{hit.score:6.2f}  {hit.id}\n        {excerpt(hit.text, spans)}")
        elif options.command == "add":
            index.add(_documents(options, index.model), progress=True)
        elif options.command == "remove":
            print(f"{index.remove(options.ids)} of {len(options.ids)} were in the index.")
        elif options.command == "export":
            index.export(options.file)
        elif options.command == "shrink":
            how = _budget(options, 1), _code(options.bits), options.engine, options.url
            index = index.shrink(options.out, *how)
        if options.command in ("add", "remove", "stats", "shrink"):
            print(index.stats().to_string())
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            f"The disk is full ({error}). What stood there before is whole, and what was finished "
            "is kept: free some space, and give the same command again.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
