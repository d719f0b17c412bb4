"""Miniatures of the repositories that the paper profile names, each in its own layout.

Models with random weights and the real architectures; collections of made-up words, a topic each,
so that a query shares words with the documents that are relevant to it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tests.tiny import tiny_edge_colbert, tiny_miner
from tests.tiny_reranker import tiny_reranker

BASE = "mixedbread-ai/mxbai-edge-colbert-v0-32m"
MINER, TEACHER = "BAAI/bge-small-en-v1.5", "BAAI/bge-reranker-v2-gemma"
RELEASED = [
    f"stefan-jo/mxbai-edge-colbert-v0-32m-{name}-kmeans-pf1-6" for name in ("scifact", "fiqa")
]
ROWS = {name: f"stefan-jo/{name}-train-mined-reranker-scores" for name in ("scifact", "fiqa")}
NANO = ["NanoSciFact", "NanoFiQA2018", "NanoNFCorpus", "NanoSCIDOCS", "NanoTouche2020"]
BEIR = {"scifact": 24, "fiqa": 24, "nfcorpus": 0, "scidocs": 0}  # training queries
TOPICS, WORDS_PER_TOPIC, COMMON = 12, 8, 20
LABELS = ["positive", "hard_negative", "medium_negative", "random_negative"]


@dataclass(frozen=True)
class Table:
    """A collection as its repositories hold it: rows of documents and queries, judgments."""

    corpus: list[dict]
    queries: list[dict]
    splits: dict[str, list[tuple[str, str, int]]]


def make_repositories(root: Path, models: bool = True) -> Path:
    """Write ROOT/models and ROOT/datasets; give back ROOT."""
    rng, words = np.random.default_rng(0), vocabulary()
    if models:
        _models(root / "models", [" ".join(word for topic in words for word in topic)])
    for number, name in enumerate(NANO):
        nano(root / "datasets" / "zeta-alpha-ai" / name, table(rng, words, f"n{number}-", 30))
    for name, train in BEIR.items():
        collection = table(rng, words, "", 60, train)
        mteb(root / "datasets" / "mteb" / name, collection)
        if name in ROWS:
            _released_rows(root / "datasets" / ROWS[name], collection, rng)
    return root


def _models(root: Path, texts: list[str]) -> None:
    for seed, name in enumerate([BASE, *RELEASED]):
        tiny_edge_colbert(root / name, texts, seed)
    tiny_miner(root / MINER, texts)
    tiny_reranker(root / TEACHER)
    for folder in root.glob("*/*-encoder"):  # what they were built from is no repository
        shutil.rmtree(folder)


def vocabulary() -> list[list[str]]:
    """The words of each topic, then the words of all."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = [a + b for a in syllables for b in syllables]
    words = [words[(37 * i) % len(words)] for i in range(TOPICS * WORDS_PER_TOPIC + COMMON)]
    own = [words[t * WORDS_PER_TOPIC :][:WORDS_PER_TOPIC] for t in range(TOPICS)]
    return [*own, words[-COMMON:]]


def table(rng, words: list[list[str]], prefix: str, documents: int, train: int = 0) -> Table:
    """Document i is on topic i mod TOPICS; a query is two of its document's words and a common one.

    One document and one query have no text, and one judgment names a document that does not exist.
    """
    corpus, queries, splits = [], [], {"train": [], "test": []}
    for i in range(documents):
        topic = words[i % TOPICS]
        text = [*rng.choice(topic, 5, replace=False), *rng.choice(words[-1], 3 + i % 9)]
        rng.shuffle(text)
        corpus.append({"_id": f"{prefix}{i}", "title": topic[0], "text": " ".join(text) + "."})
    corpus.append({"_id": f"{prefix}{documents}", "title": "", "text": " "})
    for number in range(10 + train):
        query, document = f"{prefix}{1000 + number}", corpus[number % documents]
        own = [w for w in document["text"].strip(".").split() if w in words[number % TOPICS]]
        text = " ".join([*own[:2], words[-1][number % COMMON]])
        queries.append({"_id": query, "text": text})
        split = splits["train" if number < train else "test"]
        split.append((query, document["_id"], 1))
        split.append((query, corpus[(number + TOPICS) % documents]["_id"], 1))
    queries.append({"_id": f"{prefix}9999", "text": ""})
    splits["test"] += [(f"{prefix}9999", f"{prefix}1", 1), (f"{prefix}1000", f"{prefix}gone", 1)]
    return Table(corpus, queries, {name: rows for name, rows in splits.items() if rows})


def nano(folder: Path, collection: Table) -> None:
    """Three configs, each with one split that is called train; no titles, no scores."""
    pairs = pd.DataFrame(collection.splits["test"], columns=["query-id", "corpus-id", "score"])
    corpus = pd.DataFrame(collection.corpus).drop(columns="title")
    tables = {"corpus": corpus, "queries": collection.queries, "qrels": pairs.drop(columns="score")}
    for config, rows in tables.items():
        _parquet(folder / config / "train-00000-of-00001.parquet", rows)
    _readme(folder, {c: {"train": f"{c}/train-*"} for c in tables})


def mteb(folder: Path, collection: Table) -> None:
    """Configs corpus, queries and default, whose scores are floats."""
    (folder / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        (folder / f"{name}.jsonl").write_text(_lines(getattr(collection, name)), "utf-8")
    for split, rows in collection.splits.items():
        keys = ("query-id", "corpus-id", "score")
        records = [dict(zip(keys, (q, d, float(s)), strict=True)) for q, d, s in rows]
        (folder / "qrels" / f"{split}.jsonl").write_text(_lines(records), "utf-8")
    judged = {split: f"qrels/{split}.jsonl" for split in collection.splits}
    _readme(folder, {"default": judged, **{c: {c: f"{c}.jsonl"} for c in ("corpus", "queries")}})


def _released_rows(folder: Path, collection: Table, rng) -> None:
    """Four-way rows in PyLate's distillation layout, in the columns of the authors' sets."""
    ids = [row["_id"] for row in collection.corpus[:-1]]
    rows = []
    for query, positive, _ in collection.splits["train"][::2]:
        others = rng.choice([i for i in ids if i != positive], 3, replace=False)
        scores = np.sort(rng.normal(size=4))[::-1].round(4)
        documents = [positive, *map(str, others)]
        rows.append(dict(query_id=query, document_ids=documents, scores=scores, labels=LABELS))
    _parquet(folder / "data" / "train-00000-of-00001.parquet", rows)


def _parquet(path: Path, rows: pd.DataFrame | list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path, index=False)


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _readme(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    """Front matter as the hub has it: config → split → path."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), "utf-8")
