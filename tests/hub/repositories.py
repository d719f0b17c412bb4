"""Miniatures of the repositories that the paper profile names, each in its own layout.

Models with random weights and the real architectures; collections of made-up words, a topic each,
so that a query shares words with the documents that are relevant to it.
"""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
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
TOPICS, WORDS_PER_TOPIC, COMMON = 12, 8, 20
LABELS = ["positive", "hard_negative", "medium_negative", "random_negative"]
LONG = 100_000  # characters of one of FiQA's documents


@dataclass(frozen=True)
class Table:
    """A collection as its repositories hold it: rows of documents and queries, judgments."""

    corpus: list[dict]
    queries: list[dict]
    splits: dict[str, list[tuple[str, str, int]]]


def make_repositories(root: Path) -> Path:
    """Write ROOT/models, ROOT/datasets and ROOT/zips; give back ROOT."""
    rng = np.random.default_rng(0)
    vocabulary = _vocabulary()
    texts = [" ".join(word for words in vocabulary for word in words)]
    _models(root / "models", texts)
    for number, name in enumerate(NANO):
        _nano(
            root / "datasets" / "zeta-alpha-ai" / name, _table(rng, vocabulary, f"n{number}-", 30)
        )
    scifact, fiqa = (_table(rng, vocabulary, "", 60, train=24) for _ in range(2))
    fiqa.corpus[7]["text"] += " " + (" ".join(vocabulary[7 % TOPICS]) + " ") * (LONG // 40)
    _beir_parquet(root / "datasets" / "BeIR", "scifact", scifact)
    _beir_lines(root / "datasets" / "BeIR", "fiqa", fiqa)
    _mteb(root / "datasets" / "mteb" / "nfcorpus", _table(rng, vocabulary, "MED-", 40))
    _zip(root / "zips", "scidocs", _table(rng, vocabulary, "s", 40))
    for name, table in (("scifact", scifact), ("fiqa", fiqa)):
        _released_rows(root / "datasets" / ROWS[name], table, rng)
    return root


# --- models ---------------------------------------------------------------------------------------


def _models(root: Path, texts: list[str]) -> None:
    for seed, name in enumerate([BASE, *RELEASED]):
        tiny_edge_colbert(root / name, texts, seed)
    tiny_miner(root / MINER, texts)
    tiny_reranker(root / TEACHER)
    for folder in root.glob("*/*-encoder"):  # what they were built from is no repository
        shutil.rmtree(folder)


# --- texts ----------------------------------------------------------------------------------------


def _vocabulary() -> list[list[str]]:
    """The words of each topic, then the words of all."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = [a + b for a in syllables for b in syllables]
    words = [words[(37 * i) % len(words)] for i in range(TOPICS * WORDS_PER_TOPIC + COMMON)]
    own = [words[t * WORDS_PER_TOPIC :][:WORDS_PER_TOPIC] for t in range(TOPICS)]
    return [*own, words[-COMMON:]]


def _table(
    rng: np.random.Generator,
    vocabulary: list[list[str]],
    prefix: str,
    documents: int,
    train: int = 0,
) -> Table:
    """Document i is on topic i mod TOPICS; a query is two of its document's words and a common one.

    One document has no text, one query has none, and one judgment names a document that is not
    there: each is to be left out and counted.
    """
    corpus, queries, splits = [], [], {"train": [], "test": []}
    for i in range(documents):
        words = vocabulary[i % TOPICS]
        text = [*rng.choice(words, 5, replace=False), *rng.choice(vocabulary[-1], 3 + i % 9)]
        rng.shuffle(text)
        corpus.append({"_id": f"{prefix}{i}", "title": words[0], "text": " ".join(text) + "."})
    corpus.append({"_id": f"{prefix}{documents}", "title": "", "text": " "})
    for number in range(10 + train):
        query, document = f"{prefix}{1000 + number}", corpus[number % documents]
        own = [w for w in document["text"].strip(".").split() if w in vocabulary[number % TOPICS]]
        text = " ".join([*own[:2], vocabulary[-1][number % COMMON]])
        queries.append({"_id": query, "text": text})
        split = splits["train" if number < train else "test"]
        split.append((query, document["_id"], 1))
        split.append((query, corpus[(number + TOPICS) % documents]["_id"], 1))
    queries.append({"_id": f"{prefix}9999", "text": ""})
    splits["test"] += [(f"{prefix}9999", f"{prefix}1", 1), (f"{prefix}1000", f"{prefix}gone", 1)]
    return Table(corpus, queries, {name: rows for name, rows in splits.items() if rows})


# --- layouts --------------------------------------------------------------------------------------


def _records(rows: list[tuple[str, str, int]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["query-id", "corpus-id", "score"])


def _parquet(path: Path, rows: pd.DataFrame | list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path, index=False)


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _tsv(rows: list[tuple[str, str, int]]) -> str:
    return "query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t{s}\n" for q, d, s in rows)


def _readme(folder: Path, configs: dict[str, dict[str, str]]) -> None:
    """Front matter as the hub has it: config → split → path."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), "utf-8")


def _nano(folder: Path, table: Table) -> None:
    """Three configs, each with one split that is called train; no titles, no scores."""
    pairs = _records(table.splits["test"]).drop(columns="score")
    corpus = pd.DataFrame(table.corpus).drop(columns="title")
    for config, rows in {"corpus": corpus, "queries": table.queries, "qrels": pairs}.items():
        _parquet(folder / config / "train-00000-of-00001.parquet", rows)
    _readme(folder, {c: {"train": f"{c}/train-*"} for c in ("corpus", "queries", "qrels")})


def _beir_parquet(owner: Path, name: str, table: Table) -> None:
    """Parquet in parts, judgments in a repository of their own with ids that are numbers."""
    half = len(table.corpus) // 2
    for part, rows in enumerate((table.corpus[:half], table.corpus[half:])):
        _parquet(owner / name / "corpus" / f"corpus-{part:05}-of-00002.parquet", rows)
    _parquet(owner / name / "queries" / "queries-00000-of-00001.parquet", table.queries)
    _readme(owner / name, {c: {c: f"{c}/{c}-*"} for c in ("corpus", "queries")})
    for split, rows in table.splits.items():
        numbers = _records([row for row in rows if row[1] != "gone"])
        numbers = numbers.astype({"query-id": int, "corpus-id": int})
        _parquet(owner / f"{name}-qrels" / "data" / f"{split}-00000-of-00001.parquet", numbers)


def _beir_lines(owner: Path, name: str, table: Table) -> None:
    """As BeIR's repositories were first: gzipped JSON lines, TSV, no configs."""
    for file, rows in (("corpus", table.corpus), ("queries", table.queries)):
        (owner / name).mkdir(parents=True, exist_ok=True)
        content = gzip.compress(_lines(rows).encode(), mtime=0)
        (owner / name / f"{file}.jsonl.gz").write_bytes(content)
    (owner / f"{name}-qrels").mkdir()
    for split, rows in table.splits.items():
        (owner / f"{name}-qrels" / f"{split}.tsv").write_text(_tsv(rows), "utf-8")


def _mteb(folder: Path, table: Table) -> None:
    """One repository for all; scores are floats."""
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(_lines(table.corpus), "utf-8")
    (folder / "queries.jsonl").write_text(_lines(table.queries), "utf-8")
    for split, rows in table.splits.items():
        records = _records(rows).astype({"score": float}).to_dict("records")
        (folder / "qrels" / f"{split}.jsonl").write_text(_lines(records), "utf-8")
    judged = {split: f"qrels/{split}.jsonl" for split in table.splits}
    texts = {c: {c: f"{c}.jsonl"} for c in ("corpus", "queries")}
    _readme(folder, {"default": judged, **texts})


def _zip(folder: Path, name: str, table: Table) -> None:
    """BEIR's own archive."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/corpus.jsonl", _lines(table.corpus))
        archive.writestr(f"{name}/queries.jsonl", _lines(table.queries))
        for split, rows in table.splits.items():
            archive.writestr(f"{name}/qrels/{split}.tsv", _tsv(rows))


def _released_rows(folder: Path, table: Table, rng: np.random.Generator) -> None:
    """Four-way rows in PyLate's distillation layout, in the columns of the authors' sets."""
    ids = [row["_id"] for row in table.corpus[:-1]]
    rows = []
    for query, positive, _ in table.splits["train"][::2]:
        others = rng.choice([i for i in ids if i != positive], 3, replace=False)
        scores = np.sort(rng.normal(size=4))[::-1].round(4)
        documents = [positive, *map(str, others)]
        rows.append(dict(query_id=query, document_ids=documents, scores=scores, labels=LABELS))
    _parquet(folder / "data" / "train-00000-of-00001.parquet", rows)
