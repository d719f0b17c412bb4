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
import multiprocessing
import os
import pickle
import random
import re
import shutil
import sys
import tempfile
import threading
import uuid
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets
import matplotlib
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from IPython.display import HTML
from numpy.typing import ArrayLike
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BatchEncoding

from l2p_utils import frontier
from l2p_utils.collection import Collection, load_collection, subset
from l2p_utils.engines import ENGINES, Engine, QdrantServer, storage
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
from l2p_utils.frontier import CODES, STORED, UNPOOLED, Way, measure, sized_ways
from l2p_utils.model import PooledColBERT, encode, load_model, readable
from l2p_utils.pooling import Budget, check_whole, pool, unit_length
from l2p_utils.profile import slug

SEGMENT = 2000  # documents
TEXTS = 100  # documents whose texts are read together
SPARE_BYTES = 2**24  # that must stay free on a disk
INDEX = "index.json"
TEXT_COLUMNS = ("text", "content", "body", "abstract", "passage")
READERS = {  # of files in chunks of records
    ".jsonl": functools.partial(pd.read_json, lines=True, dtype=False),
    ".csv": functools.partial(pd.read_csv, dtype=str),
    ".tsv": functools.partial(pd.read_csv, dtype=str, sep="\t"),
}


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
    if beir := [*path.glob("corpus.jsonl"), *path.glob("corpus.jsonl.gz")]:
        path = beir[0]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (".txt", ".md"))
        if not files:
            raise UserError(f"{path} holds no .txt or .md files, and no corpus.jsonl.")
        for file in files:
            yield file.relative_to(path).as_posix(), file.read_text("utf-8", errors="replace")
        return
    for number, record in enumerate(_records(path)):
        field = column or next((name for name in TEXT_COLUMNS if name in record), "text")
        if field not in record:
            raise UserError(
                f"{path}, record {number + 1} has no {field} among its fields {list(record)}. Name "
                "the field with the text (--column)."
            )
        wanted = ("_id", "id", "title", field)
        known = {name: str(record[name]) for name in wanted if not pd.isna(record.get(name))}
        text = " ".join(known[name].strip() for name in ("title", field) if name in known)
        yield known.get("_id", known.get("id", str(number))), text


def _records(path: Path) -> Iterator[dict[str, Any]]:
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if not path.is_file() or (kind := kind.lower()) not in (*READERS, ".parquet"):
        raise UserError(
            f"{path} {'is of another kind' if path.is_file() else 'does not exist'}; expected a "
            "folder of .txt or .md files, or a .jsonl, .csv, .tsv or .parquet file."
        )
    try:
        if kind == ".parquet":
            chunks = (batch.to_pandas() for batch in pq.ParquetFile(path).iter_batches(SEGMENT))
        else:
            chunks = READERS[kind](path, chunksize=SEGMENT)
        for chunk in chunks:
            yield from chunk.to_dict("records")
    except (ValueError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _pieces(model: PooledColBERT, text: str) -> BatchEncoding:
    """A text's word pieces, without special ones, and where in it they stand."""
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    return model.tokenizer(text, **options)


def passages(
    model: PooledColBERT, documents: Iterable[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """Documents that are longer than the model reads, in parts: ``id#1``, ``id#2``, …"""
    most = readable(model)
    for identifier, text in documents:
        found = _pieces(model, text)
        spans, words = found["offset_mapping"], found.word_ids()
        if len(spans) <= most:
            yield identifier, text
            continue
        ends = [i for i, word in enumerate(words) if not i or word != words[i - 1]] + [len(words)]
        start = number = 0
        while start < len(spans):
            whole = ends[bisect_right(ends, start + most) - 1]  # where a word ends
            end, number = whole if whole > start else start + most, number + 1
            yield f"{identifier}#{number}", text[spans[start][0] : spans[end - 1][1]]
            start = end


def matched_words(
    model: PooledColBERT, query: str, texts: Sequence[str]
) -> list[list[tuple[int, int]]]:
    """Where in each text (start, end) the words stand that the query's tokens match best.

    By MaxSim over the texts' own tokens: a pooled vector stands for several words.
    """
    prefixes = {model.query_prefix_id, model.document_prefix_id} - {None}
    special = torch.tensor([*model.tokenizer.all_special_ids, *model.skiplist, *prefixes])

    def tokens(given: Sequence[str], is_query: bool) -> Iterator[tuple[torch.Tensor, ...]]:
        for ids, vectors, counted in frontier.every_token(model, list(given), is_query):
            counted = counted & ~torch.isin(ids, special)
            yield torch.nonzero(counted)[:, 0], unit_length(vectors[counted])

    ((_, asked),) = tokens([query], True)
    before = 2 if model.document_prefix_id is not None else 1  # [CLS], and the prefix
    spans = []
    for text, (places, vectors) in zip(texts, tokens(texts, False), strict=True):
        best = places[(asked @ vectors.T).argmax(dim=1)] - before if len(places) else places
        pieces = _pieces(model, text)
        words = sorted({pieces.token_to_word(place) for place in best.tolist()})
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
    index = (folder / INDEX).is_file()
    if folder.exists() and not index and (not folder.is_dir() or any(folder.iterdir())):
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
    model = load_model(name) if Path(name).is_dir() else PooledColBERT(name)
    return name, model.eval()


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


# ---------------------------------------------------------------- choosing


class Choice(NamedTuple):
    """The smallest index that `choose` found to be good enough.

    `table` has a row per budget and code, the smallest first, in percent: ``loss`` of NDCG@10
    against the unpooled float32 index, measured or predicted; ``upper``, the upper end of its 95 %
    interval; ``qualifies``; and what the loss is predicted from (see `choose`): ``best``, ``known``
    and ``same``, the share of the ten best documents that stays. `row` is the chosen one's.
    """

    budget: Budget
    code: str
    row: pd.Series
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
        read = _pieces(model, text)["offset_mapping"][:most]
        end = read[-1][1] if read else 0
        parts = re.split(r"\n+" if titles else r"(?<=[.!?])\s+|\n+", text[:end])
        if end < len(text):
            parts.pop()  # it may be broken off
        words = range(2 if titles else 5, min(30, len(text.split()) - 10) + 1)
        fit = [part for part in parts[: 1 if titles else None] if len(part.split()) in words]
        if fit:
            queries[identifier] = rng.choice(fit)
            corpus[identifier] = text.replace(queries[identifier], " ", 1)
    return Collection("known items", corpus, queries, {q: {q: 1} for q in queries})


def write_known_items(found: Collection, folder: str | Path) -> int:
    """Write `known_items` in BEIR's layout, to train on; how many queries are kept for testing.

    It is a fifth of them, by the hash of their ids. UserError if the folder exists.
    """
    tested = {q: int(hashlib.sha256(q.encode()).hexdigest(), 16) % 5 == 0 for q in found.queries}
    if Path(folder).exists():
        raise UserError(f"{folder} exists. Give another folder, or remove it.")
    with atomic_path(folder) as temporary:
        (temporary / "qrels").mkdir(parents=True)
        for name, texts in (("corpus", found.corpus), ("queries", found.queries)):
            table = pd.DataFrame(texts.items(), columns=["_id", "text"])
            table.to_json(temporary / f"{name}.jsonl", orient="records", lines=True)
        for split, asked in (("train", False), ("test", True)):
            ids = [query for query in found.queries if tested[query] == asked]
            table = pd.DataFrame({"query-id": ids, "corpus-id": ids, "score": 1})
            table.to_csv(temporary / "qrels" / f"{split}.tsv", sep="\t", index=False)
    return sum(tested.values())


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
    judged, made = isinstance(documents, Collection), isinstance(queries, str)
    chosen = {} if judged else _sampled(documents, sample, seed)
    if judged:
        collection = subset(documents, None, sample)
    elif made:
        collection = known_items(model, chosen, queries == "titles", seed)
    else:  # what is right is not known: the judgments, all equal, are not used
        asked = {str(i): text for i, text in enumerate(queries) if text.strip()}
        collection = Collection(
            "own", chosen, asked, dict.fromkeys(asked, dict.fromkeys(chosen, 1))
        )
    if len(collection.queries) < 30:
        raise UserError(
            f"{len(collection.queries)} queries are too few to choose by; expected 30 or more. "
            "Give more documents or queries of your own, or name a budget."
        )
    table = _losses(model, collection, sized_ways(codes), progress)
    if judged:
        table = table.rename(columns={"known": "loss", "known_error": "error"})
    else:
        table["loss"], table["error"] = predicted_loss(table["best"], table["best_error"])
        table = table if made else table.drop(columns="known")
    table["upper"] = table["loss"] + 1.96 * table["error"]
    table["qualifies"] = (table["upper"] <= 100 * max_loss) | (table["way"] == UNPOOLED)
    table = table.sort_values("bytes_per_document", ignore_index=True)
    best = table[table["qualifies"]].iloc[0]
    return Choice(best["budget"], best["code"], best, table)


def draw_choice(choice: Choice, max_loss: float) -> NotebookFigure:
    """Loss against bytes per document, with 95 % intervals; what qualifies is filled."""
    table, best = choice.table[choice.table["way"] != UNPOOLED], choice.row
    with matplotlib.rc_context(STYLE):
        figure = NotebookFigure(figsize=(8, 5), layout="constrained")
        axis = figure.subplots()
        for (code, part), marker in zip(table.groupby("code", sort=False), "^oDsv", strict=False):
            x, y, good = part["bytes_per_document"], part["loss"], part["qualifies"]
            axis.errorbar(x, y, part["upper"] - y, fmt="none", color="#AAAAAA", zorder=1)
            axis.plot(x, y, marker, markerfacecolor="white", color="#0072B2", label=code)
            axis.plot(x[good], y[good], marker, color="#0072B2")
        axis.axhline(100 * max_loss, color="black", linestyle="--", linewidth=1)
        axis.annotate(
            best["way"], (best["bytes_per_document"], best["loss"]), (-30, -28),
            textcoords="offset points", ha="center", arrowprops={"arrowstyle": "->"},
        )  # fmt: skip
        frontier.log_bytes(axis)
        axis.set(ylabel="Loss of NDCG@10 (%)", ylim=(min(-6, table["loss"].min()), 40))
        axis.legend(title="values as", fontsize=9)
        figure.suptitle(f"Filled: sure to lose at most {100 * max_loss:g} %", fontweight="bold")
    figure.alt = (
        "Loss against bytes per document. The smallest that is sure to lose at most "
        f"{100 * max_loss:g} % is {best['way']}: {best['bytes_per_document']:,.0f} bytes, "
        f"{best['loss']:.1f} %, at most {best['upper']:.1f} %."
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
    rows, values = measure(
        frontier.read_tokens(model, collection, progress=progress), ways, progress
    )
    keys = dict.fromkeys(["model", "collection", "document_length"], "")
    found = frontier.summary(rows.assign(**keys), values.assign(**keys))
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


def predict(model: PooledColBERT, name: str, folder: str | Path = STORED) -> None:
    """Store what `choose` would see of a collection's documents beside what its judgments say."""
    collection, name = load_collection(name), Path(name).name
    items = known_items(model, _sampled(collection.corpus.items(), 1000, 42))
    seen, true = (_losses(model, part, sized_ways()) for part in (items, collection))
    true = true[["known", "known_error"]].set_axis(["true", "true_error"], axis=1)
    table = seen.drop(columns="budget").join(true).assign(collection=name)
    with atomic_path(Path(folder, "predicted", f"{slug(name)}.csv")) as temporary:
        table.round(3).to_csv(temporary, index=False)


def predictions(folder: str | Path = STORED) -> pd.DataFrame:
    """The rows of `predict` for all stored collections."""
    return frontier.read(folder, "predicted")


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
    told = []
    with matplotlib.rc_context(STYLE):
        figure = NotebookFigure(figsize=(7, 5.4), layout="constrained")
        axis = figure.subplots()
        for (name, part), marker in zip(rows.groupby("collection"), "o^sDvP*X", strict=False):
            others = rows[rows["collection"] != name]
            loss, error = predicted_loss(part["best"], part["best_error"], others)
            axis.plot(loss, part["true"], marker, markersize=4, label=name)
            told.append(part.assign(loss=loss, upper=loss + 1.96 * error))
        x = np.linspace(0, rows["true"].max(), 50)
        half = 1.96 * predicted_loss(0, 0, rows)[1] * (1 + x)
        axis.fill_between(x, x - half, x + half, color="#BBBBBB", alpha=0.4, label="95 % of errors")
        axis.plot(x, x, color="black", linewidth=1)
        axis.set(xlabel="Predicted loss (% of NDCG@10)", ylabel="Loss by judgments (%)")
        axis.legend(fontsize=9)
        figure.suptitle("Loss, predicted without judgments", fontweight="bold")
    found = pd.concat(told)
    figure.alt = (
        f"Predicted against true loss of {len(found)} ways on {len(told)} collections: the mean "
        f"absolute error is {(found['true'] - found['loss']).abs().mean():.1f} percent, "
        f"{100 * (found['true'] <= found['upper']).mean():.0f} % lie below the upper bound."
    )
    return figure


# ---------------------------------------------------------------- the index


def _pool(vectors: list, sizes: list | None, pool_method: str, budget: Budget) -> tuple[list, list]:
    options = {"renormalize": True, "weights": sizes, "return_sizes": True, **vars(budget)}
    return pool(vectors, pool_method=pool_method, **options)


class _Encoder:
    """What a segment stores of its documents; PyTorch's loader calls it, in processes or here."""

    def __init__(self, model: PooledColBERT, settings: dict[str, Any]):
        self.model, self.settings = model, settings

    def __getstate__(self) -> bytes:  # by value: containers have little shared memory
        return pickle.dumps(vars(self))

    def __setstate__(self, state: bytes) -> None:
        vars(self).update(pickle.loads(state))

    def __getitem__(self, part: tuple) -> tuple:
        """Segment, first number, hash, documents (id, text) → arguments of `Index._store`."""
        *place, documents = part
        frame = pd.DataFrame(documents, columns=["id", "text"])
        frame["pieces"] = [len(_pieces(self.model, text)["input_ids"]) for text in frame["text"]]
        frame["lost"] = (frame["pieces"] - readable(self.model)).clip(lower=0)
        vectors, sizes = encode(self.model, frame["text"].tolist(), is_query=False), None
        frame["tokens"] = [*map(len, vectors)]
        for budget in self.settings["budgets"]:
            vectors, sizes = _pool(vectors, sizes, self.settings["pool_method"], Budget(**budget))
        return *place, frame, [some.numpy() for some in vectors], sizes


def _begin_worker(threads: int, number: int) -> None:
    """Limit a process that encodes to so many threads, and end it with its parent."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class Index:
    """An index in a folder; `build` makes one, `open` opens it.

    Examples
    --------
    >>> index = Index.open("my-index")                                         # doctest: +SKIP
    >>> index.search(["how to interpolate"], k=5)[0][0].id                     # doctest: +SKIP
    """

    def __init__(self, folder: Path, settings: dict[str, Any], model: PooledColBERT | None = None):
        self.folder, self.settings, self._model = folder, settings, model

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
        graph: bool | None = None,
        progress: bool = True,
        processes: int | None = 1,
        **stored: str | None,
    ) -> Index:
        """Encode, pool and code documents (ids and texts), and put the index in place of a former.

        What was finished when a build was broken off is not encoded twice: the same call goes on.
        Means have unit length. Empty texts and ids that come again are left out and counted (see
        `stats`).

        Parameters
        ----------
        name
            What `open` loads the model from.
        graph
            Whether Qdrant searches through an HNSW graph, which misses some documents: `stats`
            says how many. By default from `engines.GRAPH_FROM` documents on.
        processes
            That encode, segments of `SEGMENT` documents; None: as many as there are cores for the
            threads of each. Started by a script, they need its ``if __name__ == "__main__":``.
        stored
            ``code``, ``engine`` and ``url``: see `engines.storage`.
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
            **storage(**stored),
        }
        work = folder.with_name(f".{folder.name}.building")
        if not settings_match(work, settings):
            if (work / PROVENANCE).is_file():
                begun = read_json(work / PROVENANCE)
                cls(work, begun["settings"] | begun["new"]).engine.drop()
            remove(work)
            write_json(work / PROVENANCE, {"settings": settings, "new": _empty(folder)})
        index = cls(work, settings | read_json(work / PROVENANCE)["new"], model)
        index._extend(documents, progress, processes)
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
        return index

    @cached_property
    def engine(self) -> Engine:
        """What keeps the vectors."""
        kind = QdrantServer if self.settings["url"] else ENGINES[self.settings["engine"]]
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
        model = self._model or named_model(self.settings["model"])[1]
        if self.settings["weights"] != _weights(model):
            raise UserError(
                f"{self.folder} was made with another model than {self.settings['model']} now is. "
                "Expected the same weights: open the index with that model, or build it again."
            )
        model.document_length = self.settings["document_length"]
        return model.eval()

    def _save(self) -> None:
        write_json(self.folder / INDEX, self.settings)

    def _extend(
        self, documents: Iterable[tuple[str, str]], progress: bool, processes: int | None
    ) -> set[str]:
        """Write documents as further segments, if they are not there already; gives their ids."""
        seen, left_out = set(), Counter(self.settings["left_out"])

        def fresh() -> Iterator[tuple[str, str]]:
            for identifier, text in documents:
                if not text.strip():
                    left_out["empty"] += 1
                elif identifier in seen:
                    left_out["repeated"] += 1
                else:
                    seen.add(identifier)
                    yield identifier, text

        names = list(self.settings["segments"])

        def missing() -> Iterator[tuple]:
            rest, start = fresh(), len(self.rows) if names else 0
            while part := list(itertools.islice(rest, SEGMENT)):
                names.append(f"{len(names):05d}")
                segment = self.folder / names[-1]
                content = hashlib.sha256(json.dumps([start, part]).encode()).hexdigest()
                if settings_match(segment, {"content": content}):
                    bar.update(len(part))
                else:
                    yield segment, start, content, part
                start += len(part)

        self.engine.begin()
        cores = len(os.sched_getaffinity(0))
        if processes is None:
            on_cpu = self.model.device.type == "cpu"
            processes = max(cores // torch.get_num_threads(), 1) if on_cpu else 1
        with tqdm(desc="Indexing", unit=" documents", disable=not progress) as bar:
            todo = missing()
            first = list(itertools.islice(todo, processes))
            workers = len(first) if len(first) > 1 else 0
            threads = min(torch.get_num_threads(), max(cores // max(workers, 1), 1))
            loader = DataLoader(
                _Encoder(self.model, self.settings),
                batch_size=None,
                sampler=itertools.chain(first, todo),
                num_workers=workers,
                collate_fn=tuple,
                multiprocessing_context="spawn" if workers else None,
                worker_init_fn=functools.partial(_begin_worker, threads),
                generator=torch.Generator(),
            )
            try:
                for segment in loader:
                    self._store(*segment)
                    bar.update(len(segment[3]))
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise UserError(
                    "A process that encodes was ended, perhaps because memory ran out. What was "
                    "finished is kept: give the same command again, with fewer --processes."
                ) from error
        self.settings |= {"left_out": dict(left_out), "segments": names}
        self.__dict__.pop("rows", None)
        return seen

    def _store(
        self, segment: Path, start: int, content: str, frame: pd.DataFrame, vectors: Any, sizes: Any
    ) -> None:
        """Write a segment: its table, and each document's vectors and sizes of clusters."""
        with atomic_path(segment) as temporary:
            temporary.mkdir(parents=True)
            frame = frame.assign(vectors=[*map(len, vectors)])
            # Qdrant Edge maps its files: on a full disk the process would be killed.
            needed = (
                4 * self.settings["dim"] * frame["vectors"].sum() + frame["text"].str.len().sum()
            )
            if (free := shutil.disk_usage(temporary).free) < needed + SPARE_BYTES:
                raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB are free", str(self.folder))
            self.engine.write(temporary, start, frame["id"].tolist(), vectors)
            np.save(temporary / "sizes.npy", np.concatenate(sizes).astype(np.uint16))
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

    def add(
        self,
        documents: Iterable[tuple[str, str]],
        progress: bool = False,
        processes: int | None = 1,
    ) -> None:
        """Add documents; one whose id is there already takes its place. See `build`."""
        self.engine.editable("grow")
        before = len(self.rows)
        replaced = self._forget(self._extend(documents, progress, processes), before)
        self.engine.finish(self.rows)
        self._save()
        if replaced:
            self.engine.delete(replaced)

    def remove(self, ids: Iterable[str]) -> int:
        """Remove documents; gives how many there were."""
        removed = self._forget(ids, len(self.rows))
        self._save()
        if removed:
            self.engine.delete(removed)
        return len(removed)

    def _forget(self, ids: Iterable[str], before: int) -> list[int]:
        """Note as removed the documents with these ids and a number below `before`."""
        rows = self.rows[:before]
        rows = rows[rows["live"] & rows["id"].isin([*ids])]
        for name, part in rows.groupby("segment", observed=True):
            gone = self.settings["removed"].get(name, [])
            self.settings["removed"][name] = sorted([*gone, *part["id"]])
        self.__dict__.pop("rows", None)
        return rows.index.tolist()

    def shrink(
        self, folder: str | Path, budget: float | Budget = 1, code: str | None = None, **where: Any
    ) -> Index:
        """Another index, in `folder`, of the same documents with fewer vectors or bits.

        The model is not needed: what is stored is pooled further, by its clusters' sizes. Removed
        documents are gone for good. The engine stays the same, if it can store `code` and no other
        is named (``engine``, ``url``).
        """
        return Index.merge(folder, [self], Budget.of(budget), code=code, **where)

    @classmethod
    def merge(
        cls,
        folder: str | Path,
        indexes: Sequence[Index],
        budget: Budget | None = None,
        **where: str | None,
    ) -> Index:
        """One index, in `folder`, of several that were made alike, such as parts of a collection.

        Of documents with the same id the first stays; the others are counted as repeated. `budget`
        and the rest are as in `shrink`.
        """
        target, first, own = _free_place(folder), indexes[0], indexes[0].settings
        for source in indexes:
            for key in ("weights", "document_length", "dim", "pool_method", "budgets", "code"):
                if own[key] != (other := source.settings[key]):
                    raise UserError(
                        f"{first.folder} and {source.folder} were made differently: {key} is "
                        f"{own[key]} and {other}. Expected parts of one collection, built with the "
                        "same options."
                    )
            source.engine.editable("be written anew")
            if target.resolve() == source.folder.resolve():
                raise UserError(f"{folder} is the index itself; name another folder for the new.")
        new = storage(**where, own=own) | _empty(target)
        if budget:
            new["budgets"] = [*own["budgets"], vars(budget)]
        work = target.with_name(f".{target.name}.writing")
        remove(work)
        made = cls(work, own | new, first._model)
        left_out, seen, names, start = Counter(), set(), made.settings["segments"], 0
        made.engine.begin()
        try:
            for source in indexes:
                left_out.update(source.settings["left_out"])
                for name in tqdm(source.settings["segments"], "Writing", disable=None):
                    frame, *stored = source._segment(name)
                    fresh = ~frame["id"].isin(seen)
                    left_out["repeated"] += int((~fresh).sum())
                    seen.update(frame["id"])
                    if not fresh.any():
                        continue
                    stored = [list(itertools.compress(part, fresh)) for part in stored]
                    if budget:
                        stored = _pool(*stored, own["pool_method"], budget)
                    names.append(f"{len(names):05d}")
                    made._store(work / names[-1], start, "", frame[fresh], *stored)
                    start += int(fresh.sum())
            if not start:
                raise UserError(f"{first.folder} has no documents left.")
        except BaseException:
            made.engine.drop()
            made.engine.close()
            remove(work)
            raise
        made.settings["left_out"] = dict(+left_out)
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
        whole = count * frontier.stored_bytes(documents["tokens"].mean() if count else 0.0, dim)
        disk = sum(file.stat().st_blocks * 512 for file in self.folder.rglob("*"))
        memory = self.rows.memory_usage(deep=True).sum() + (size if self.engine.here else 0)
        settings = self.settings
        lost = documents["lost"].sum() / max(documents["pieces"].sum(), 1)
        found = {
            "engine": f"{settings['engine']}, {settings['code']}",
            "server": settings["url"],
            "recall@10 of the graph, against a scan": settings["graph_recall"],
            "documents": count,
            "vectors per document": round(documents["vectors"].mean(), 1),
            "bytes per document": round(size / max(count, 1), 1),
            "times smaller than unpooled float32": round(whole / max(size, 1), 1),
            "bytes of vectors": round(size),
            "bytes on this disk, texts included": disk,
            "bytes of memory that search needs here": round(memory),
            "documents cut": int((documents["lost"] > 0).sum()),
            "word pieces lost, %": round(100 * lost, 1),
        }
        found |= {f"left out: {kind}": n for kind, n in settings["left_out"].items()}
        return pd.Series(found, dtype=object).dropna()


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
    return ipywidgets.interactive(show, {"auto_display": True}, query=box, factor=slider)


# ---------------------------------------------------------------- the shell


BITS = {str(how.bits): code for code, how in CODES.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.index", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    graph = "search through a graph: faster, and misses documents (from 50,000 documents on)"
    loss = "choose size and bits: lose at most so much of NDCG@10, such as 1%%"
    known: dict[str, dict[str, Any]] = {
        "ids": {"nargs": "+"},
        "indexes": {"nargs": "+"},
        "collections": {"nargs": "*"},
        "--out": {"required": True, "help": "the folder that is made"},
        "--model": {"default": "bundled", "help": "bundled, a folder or a hub id"},
        "--document-length": {"type": int, "help": "word pieces that are read"},
        "--column": {"help": "the field with the text"},
        "--passages": {"action": "store_true", "help": "split what is too long to read"},
        "--part": {"help": "such as 2/3: every third document, from the second on"},
        "--processes": {"type": int, "help": "that encode; by default, one for each core"},
        "--queries": {"help": "titles (first lines); with --max-loss also a file of yours"},
        "--max-loss": {"type": _share, "help": loss},
        "--pool-factor": {"type": float, "help": "about how many vectors become one"},
        "--max-vectors": {"type": int, "help": "at most so many per document"},
        "--bits": {"choices": BITS, "help": "per value (as they are, at first 16; 4 for PLAID)"},
        "--engine": {"choices": ENGINES, "help": "qdrant, unless --bits is 4 or 1"},
        "--url": {"help": "of a Qdrant server; its key is in $QDRANT_API_KEY"},
        "--graph": {"action": argparse.BooleanOptionalAction, "help": graph},
        "-k": {"type": int, "default": 10, "help": "how many documents"},
    }

    def command(name: str, what: str, arguments: str) -> None:
        sub = commands.add_parser(name, help=what, description=what)
        budget = sub.add_mutually_exclusive_group()
        for argument in arguments.split():
            one = argument in ("--pool-factor", "--max-vectors", "--max-loss")
            (budget if one else sub).add_argument(argument, **known.get(argument, {}))

    read, where = " --column --passages --processes", " --engine --url"
    sized = " --pool-factor --max-vectors --bits" + where
    how = "documents --out --model --document-length --part --graph --max-loss --queries"
    command("build", "Make an index, or go on with one that was broken off.", how + sized + read)
    command("search", "Print the best documents for a query.", "index query -k")
    command("add", "Add documents; known ids are replaced.", "index documents" + read)
    command("remove", "Remove documents.", "index ids")
    command("stats", "What is stored, and how much smaller it is.", "index")
    command("shrink", "Another index with fewer vectors, without the model.", "index out" + sized)
    command("merge", "One index of several, such as those of --part.", "indexes --out" + where)
    command("export", "Write ids, texts and vectors as Parquet.", "index file")
    made = "documents --out --model --document-length --queries --column --passages"
    command("queries", "Make queries of documents, and a collection to train on.", made)
    what = "How well `choose` predicts collections' judgments; of none: redraw the figure."
    command("predict", what, "collections --model")
    return parser


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def _chosen(options: argparse.Namespace, model: PooledColBERT) -> tuple[Budget, str]:
    """What `choose` finds, told."""
    documents, queries = _documents(options, model), options.queries or "sentences"
    if Path(options.documents, "qrels", "test.tsv").is_file():
        documents = load_collection(options.documents)
    if queries not in ("sentences", "titles"):
        if not Path(queries).is_file():
            raise UserError(f"{queries} does not exist; expected a file with a query in each line.")
        queries = Path(queries).read_text("utf-8").splitlines()
    engine = options.engine or ("qdrant" if options.url else "exact")
    if engine == "plaid":
        raise UserError("--max-loss chooses for exact search; with PLAID, name a budget and bits.")
    choice = choose(model, documents, options.max_loss, queries, ENGINES[engine].codes)
    print(choice.table.drop(columns="budget").round(2).to_string(index=False))
    best = choice.row
    if best["way"] == UNPOOLED:
        print(f"Nothing smaller is sure to lose at most {100 * options.max_loss:g} %: all is kept.")
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


def _documents(options: argparse.Namespace, model: PooledColBERT) -> Iterable[tuple[str, str]]:
    documents = read_documents(options.documents, options.column)
    if part := getattr(options, "part", None):
        first, parts = map(int, part.split("/")) if re.fullmatch(r"\d+/\d+", part) else (0, 0)
        if not 1 <= first <= parts:
            raise UserError(f"--part is {part}; expected such as 1/2 and 2/2.")
        documents = itertools.islice(documents, first - 1, None, parts)
    return passages(model, documents) if options.passages else documents


def _build(options: argparse.Namespace, **stored: str | None) -> Index:
    name, model = named_model(options.model)
    model.document_length = options.document_length or model.document_length
    if options.max_loss is None:
        budget = _budget(options, 4)
    else:
        budget, stored["code"] = _chosen(options, model)
    documents, how = _documents(options, model), {"processes": options.processes, **stored}
    return Index.build(options.out, documents, model, name, budget, graph=options.graph, **how)


def _make_queries(options: argparse.Namespace) -> None:
    if options.queries not in (None, "titles"):
        raise UserError(f"--queries is {options.queries}; expected titles, or nothing.")
    model = named_model(options.model)[1]
    model.document_length = options.document_length or model.document_length
    found = known_items(model, dict(_documents(options, model)), options.queries == "titles")
    tested = write_known_items(found, options.out)
    print(
        f"{len(found.corpus)} documents and {len(found.queries)} queries are in {options.out}; "
        f"{tested} queries are kept for testing."
    )


def _run(options: argparse.Namespace) -> None:
    where = {key: getattr(options, key, None) for key in ("engine", "url")}
    code = BITS.get(getattr(options, "bits", None))
    match options.command:
        case "predict":
            for collection in options.collections:
                predict(named_model(options.model)[1], collection)
            save_figure(draw_predictions(predictions()), from_root("figures/frontier"), "predicted")
            return
        case "queries":
            return _make_queries(options)
        case "build":
            index = _build(options, code=code, **where)
        case "merge":
            index = Index.merge(options.out, [*map(Index.open, options.indexes)], **where)
        case _:
            index = Index.open(options.index)
    match options.command:
        case "search":
            hits = index.search([options.query], options.k)[0]
            words = matched_words(index.model, options.query, [hit.text for hit in hits])
            for hit, spans in zip(hits, words, strict=True):
                print(f"{hit.score:6.2f}  {hit.id}\n        {excerpt(hit.text, spans)}")
            return
        case "export":
            return index.export(options.file)
        case "add":
            index.add(_documents(options, index.model), True, options.processes)
        case "remove":
            print(f"{index.remove(options.ids)} of {len(options.ids)} were in the index.")
        case "shrink":
            index = index.shrink(options.out, _budget(options, 1), code, **where)
    print(index.stats().to_string())


def main(arguments: list[str] | None = None) -> int:
    """Build, search, grow and shrink an index of your own documents."""
    try:
        _run(_parser().parse_args(arguments))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. What was finished is kept: the same command goes on.", file=sys.stderr)
        return 130
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
