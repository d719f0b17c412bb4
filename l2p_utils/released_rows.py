"""Released rows: training rows that somebody published, checked against the collection.

Takes a hub data set (or a folder) in PyLate's distillation layout and a training split; gives its
rows as this project keeps mined ones.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from l2p_utils.collection import Collection
from l2p_utils.files import UserError

COLUMNS = ("query_id", "document_ids", "scores", "labels")
LABELS = ("positive", "hard_negative", "medium_negative", "random_negative")
MAX_UNKNOWN = 0.01  # of the rows; more, and these are rows of another collection
OTHER_SPLITS = ("test", "dev", "valid", "validation", "eval")


@dataclass(frozen=True)
class Row:
    """One training row: documents by descending teacher score, each with its label."""

    query_id: str
    document_ids: list[str]
    scores: list[float]
    labels: list[str]


def read_released(
    folder: Path, name: str, collection: Collection, held_out: set[str], n_ways: int
) -> tuple[list[Row], Counter[str]]:
    """Read the split `train` of a released set.

    A row that is there twice, the same query with the same documents, is taken once. What others
    may do otherwise than this project is taken as it is: several rows of a query, queries without
    a row, equal scores, how many documents have which label, a negative above the positive (the
    authors' anchor, the median positive, allows it), ids that are numbers.

    Parameters
    ----------
    name
        What errors call the data set.
    collection
        All of the training split, before queries are held out.
    held_out
        Queries whose rows are left out: kept for picking the epoch, or beyond `max_queries`.

    Returns
    -------
    tuple of list of Row, Counter
        The rows as released, ids as strings; and how many were left out for which reason.

    Raises
    ------
    UserError
        When there is no such split, a column is missing or of another type, lengths differ within a
        row or from `n_ways`, a row has a document twice, a label that is none of `LABELS` or scores
        that do not descend, or more than 1 % of the rows name unknown queries or documents.
    """
    rows, dropped, seen = [], Counter(), set()
    for where, record in _records(folder, name):
        row = _row(record, where, n_ways)
        content = (row.query_id, frozenset(row.document_ids))
        if content in seen:
            dropped["row twice"] += 1
        elif row.query_id not in collection.queries:
            dropped["unknown query"] += 1
        elif not all(document in collection.corpus for document in row.document_ids):
            dropped["unknown document"] += 1
        elif row.query_id in held_out:
            dropped["held out"] += 1
        else:
            rows.append(row)
        seen.add(content)
    total = len(rows) + dropped.total()
    unknown = dropped["unknown query"] + dropped["unknown document"]
    if not total or unknown > MAX_UNKNOWN * total:
        raise UserError(
            f"{name}: {unknown} of its {total} rows name queries or documents that "
            f"{collection.name} does not have ({dict(dropped)}). Expected the rows of that "
            f"collection, at most {MAX_UNKNOWN:.0%} unknown: check released_rows and "
            "the collection's revision."
        )
    return rows, dropped


def _records(folder: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in _train_files(folder, name):
        where = f"{name}, {path.relative_to(folder)}"
        try:
            records = _read_parquet(path) if path.suffix == ".parquet" else _read_lines(path)
        except (OSError, ValueError) as error:  # Arrow's, JSON's and bad UTF-8 among them
            raise UserError(
                f"{where} cannot be read ({error}). Expected Parquet, or JSON Lines in UTF-8; "
                "delete it from the cache and fetch it again."
            ) from error
        for number, record in enumerate(records, start=1):
            yield f"{where}, row {number}", record


def _train_files(folder: Path, name: str) -> list[Path]:
    """Files of the split `train`, by name; files that name no split are it where none does."""
    for suffixes in ((".parquet",), (".jsonl", ".json")):
        there = sorted(p for p in folder.rglob("*") if p.suffix in suffixes and _is_data(p, folder))
        train = [path for path in there if "train" in _words(path, folder)]
        if train:
            return train
        if there and not any(set(_words(path, folder)) & set(OTHER_SPLITS) for path in there):
            return there
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    raise UserError(
        f"{name} has no split `train`: expected Parquet or JSON Lines files (data/train-*.parquet, "
        f"train.jsonl); there is {files or 'nothing'}."
    )


def _is_data(path: Path, folder: Path) -> bool:
    named = path.name in ("dataset_infos.json", "provenance.json", "state.json")
    return not named and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _words(path: Path, folder: Path) -> list[str]:
    parts = "/".join(path.relative_to(folder).with_suffix("").parts).lower()
    return "".join(c if c.isalnum() else " " for c in parts).split()


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text("utf-8-sig").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def _row(record: Any, where: str, n_ways: int) -> Row:
    missing = [c for c in COLUMNS if not isinstance(record, dict) or c not in record]
    if missing:
        there = sorted(record) if isinstance(record, dict) else repr(record)[:60]
        raise UserError(
            f"{where}: no column {', '.join(missing)}; expected {', '.join(COLUMNS)}, "
            f"found {there}."
        )
    lists = {column: _list(record[column], column, where) for column in COLUMNS[1:]}
    lengths = {column: len(values) for column, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{where}: lists of different lengths, {lengths}; expected the same.")
    if lengths["document_ids"] != n_ways:
        raise UserError(
            f"{where}: {lengths['document_ids']} documents, but the profile's rows have {n_ways} "
            "(mining: 1 + hard + medium + random). Set these to what was released."
        )
    row = Row(
        _identifier(record["query_id"], "query_id", where),
        [_identifier(value, "document_ids", where) for value in lists["document_ids"]],
        [_number(value, where) for value in lists["scores"]],
        [_label(value, where) for value in lists["labels"]],
    )
    _check_documents(row, where)
    return row


def _check_documents(row: Row, where: str) -> None:
    """Each document once, by descending score."""
    mend = "Take another revision (owner/name@revision), or mend a copy and give its folder."
    document, times = Counter(row.document_ids).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"{where}: the document {document!r} is there twice; expected each once. {mend}"
        )
    for score, following in itertools.pairwise(row.scores):
        if following > score:
            raise UserError(
                f"{where}: scores rise, from {score} to {following}; expected descending ones, the "
                f"teacher's best first. {mend}"
            )


def _list(value: Any, column: str, where: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise UserError(f"{where}: {column} is {value!r}; expected a list.")
    return value


def _identifier(value: Any, column: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or str(value) == "":
        raise UserError(f"{where}: {column} has {value!r}; expected a string or a whole number.")
    return str(value)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: scores has {value!r}; expected a number.")
    return float(value)


def _label(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: labels has {value!r}; expected a string.")
    if value not in LABELS:
        raise UserError(f"{where}: labels has {value!r}; expected {', '.join(LABELS)}.")
    return value
