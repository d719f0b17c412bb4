"""From a data set's tables to a folder in BEIR's layout, with what was left out counted.

What the hub's data sets get wrong nobody here can mend, so some of it is counted, reported and left
out instead of refused: queries without text, judgments of unknown queries or documents, a judgment
that is there twice with two scores (the last one counts, as in BEIR's own loader).
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from l2p_utils.collection import HALF, QRELS_HEADER
from l2p_utils.files import UserError
from l2p_utils.hub_tables import Files, Repository, Row, find_files, one_split, read_rows

logger = logging.getLogger(__name__)


def write_collection(
    folder: Path, name: str, texts: Repository, qrels: Repository, nano: bool
) -> dict[str, Any]:
    """Write corpus, queries and judgments of every split into `folder`.

    Parameters
    ----------
    texts, qrels : Repository
        Snapshots with corpus and queries, and with the judgments; perhaps the same.
    nano : bool
        Whether it is NanoBEIR: one split, called "train" there and "test" here, without scores.

    Returns
    -------
    dict
        What was counted: documents, queries, judgments of each split, and what was left out.

    Raises
    ------
    UserError
        For tables that are no collection: the repository, what is there, what was expected.
    """
    corpus = _table(texts, "corpus", nano)
    queries = _table(texts, "queries", nano)
    # Before the corpus is read, which takes long: are there judgments?
    judgments = find_files(qrels, ("qrels", "default"))
    if nano:
        judgments = {"test": _evaluation_split(qrels, judgments, "qrels")}
    mended: list[str] = []  # where a text had a half of a character
    documents, textless = _write_corpus(folder, name, texts, corpus, mended)
    known, empty = _write_queries(folder, texts, queries, mended)
    counts: dict[str, Any] = {
        "documents": len(documents),
        "documents without text": textless,
        "queries": len(known),
        "queries without text": len(empty),
        "splits": {},
    }
    for split, files in judgments.items():
        counts["splits"][split] = _write_qrels(
            folder, split, _judgments(qrels, files, nano), documents, known, empty
        )
    if not any(split["judgments"] for split in counts["splits"].values()):
        raise UserError(
            f"{qrels}: none of its judgments is of a query and a document that {texts} "
            f"has ({counts['splits']})."
        )
    if mended:
        counts["texts with half characters"] = len(mended)
        logger.warning(
            "%s: half characters in %d texts, replaced; the first in %s.",
            name,
            len(mended),
            mended[0],
        )
    _report(name, counts)
    return counts


def _table(repository: Repository, config: str, nano: bool) -> list[Path]:
    files = find_files(repository, (config,))
    if nano:
        return _evaluation_split(repository, files, config)
    return one_split(repository, files, config)


def _evaluation_split(repository: Repository, files: Files, config: str) -> list[Path]:
    """NanoBEIR calls its one split "train"; its queries are for evaluation all the same."""
    if "train" not in files:
        raise UserError(
            f"{repository}: the config {config!r} has no split 'train'. There is: "
            f"{', '.join(files)}. Expected NanoBEIR's one split, train."
        )
    return files["train"]


def _identifier(value: Any, column: str, where: str) -> str:
    """An id as a string: ids that are numbers in one table are strings in another."""
    if isinstance(value, float) and value.is_integer():  # a table that went through pandas
        value = int(value)
    text = str(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or not text.strip():
        raise UserError(f"{where}: expected {column!r} to be an id; found {value!r}.")
    if re.search(r"[\t\r\n]", text):
        raise UserError(f"{where}: the id {text!r} has a tab or a line break in it.")
    if HALF.search(text):
        raise UserError(f"{where}: the id {text!r} has half of a surrogate pair in it.")
    return text


def _text(row: dict[str, Any], column: str, where: str, mended: list[str]) -> str:
    """A row's text, stripped; absent and null count as empty. Adds to `mended` where it was."""
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        shown = f"{value!r:.60}"
        raise UserError(f"{where}: expected {column!r} to be text; found {shown}.")
    text, halves = HALF.subn("\ufffd", value or "")
    if halves:
        mended.append(where)
    return text.strip()


def _identified(rows: Iterator[Row]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (id, row, where); ids occur once."""
    first: dict[str, int] = {}
    for number, (row, where) in enumerate(rows, start=1):
        identifier = _identifier(row.get("_id"), "_id", where)
        if first.setdefault(identifier, number) != number:
            raise UserError(
                f"{where}: the id {identifier!r} is there already, as number {first[identifier]} "
                "of the table. Ids must differ; take another revision or another source."
            )
        yield identifier, row, where


def _write_corpus(
    folder: Path, name: str, repository: Repository, files: list[Path], mended: list[str]
) -> tuple[set[str], int]:
    """Write every document, those without text too; return all ids and how many have no text.

    The reader drops the latter, with their judgments, and says so.
    """
    documents, textless = set(), 0
    rows = read_rows(repository, files, ("_id", "text"), ("title",))
    bar = tqdm(rows, desc=f"{name}: documents", unit="", unit_scale=True, delay=2)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for identifier, row, where in _identified(iter(bar)):
            title, text = (_text(row, column, where, mended) for column in ("title", "text"))
            documents.add(identifier)
            textless += not (title or text)
            file.write(json.dumps({"_id": identifier, "title": title, "text": text}) + "\n")
    if len(documents) == textless:
        found = f"none of its {textless} documents has any text" if textless else "it is empty"
        raise UserError(f"{repository}: no documents, the corpus has no text: {found}.")
    return documents, textless


def _write_queries(
    folder: Path, repository: Repository, files: list[Path], mended: list[str]
) -> tuple[set[str], set[str]]:
    """Write the queries that have text; return their ids and those of the others."""
    known, empty = set(), set()
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as file:
        for identifier, row, where in _identified(read_rows(repository, files, ("_id", "text"))):
            text = _text(row, "text", where, mended)
            if text:
                known.add(identifier)
                file.write(json.dumps({"_id": identifier, "text": text}) + "\n")
            else:
                empty.add(identifier)
    if not known:
        raise UserError(f"{repository}: there is no query with any text.")
    return known, empty


def _judgments(
    repository: Repository, files: list[Path], nano: bool
) -> Iterator[tuple[str, str, int]]:
    """Yield (query id, document id, relevance); NanoBEIR lists relevant pairs, without a score."""
    needed = QRELS_HEADER[:2] if nano else QRELS_HEADER
    for row, where in read_rows(repository, files, needed, QRELS_HEADER[2:] if nano else ()):
        query, document = (_identifier(row[column], column, where) for column in needed[:2])
        yield query, document, _score(row.get("score", 1), where)


def _score(value: Any, where: str) -> int:
    """A relevance; whole numbers, also where a table has them as 1.0 or "1"."""
    whole = isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+(\.0*)?", value.strip())
    if isinstance(value, bool) or not (
        isinstance(value, int) or (isinstance(value, float) and value.is_integer()) or whole
    ):
        raise UserError(f"{where}: expected 'score' to be a whole number; found {value!r}.")
    return int(float(value))


def _write_qrels(
    folder: Path,
    split: str,
    judgments: Iterator[tuple[str, str, int]],
    documents: set[str],
    queries: set[str],
    empty: set[str],
) -> dict[str, int]:
    """Write the judgments of known queries and documents; return what was counted."""
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise UserError(f"The split {split!r} has a name that no file can have.")
    left_out: Counter[str] = Counter()
    qrels: dict[str, dict[str, int]] = {}
    for query, document, score in judgments:
        if query in empty:
            left_out["of queries without text"] += 1
        elif query not in queries:
            left_out["of unknown queries"] += 1
        elif document not in documents:
            left_out["of unknown documents"] += 1
        else:
            judged = qrels.setdefault(query, {})
            left_out["with another score"] += judged.get(document, score) != score
            judged[document] = score
    kept = sum(map(len, qrels.values()))
    if kept:
        path = folder / "qrels" / f"{split}.tsv"
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.write("\t".join(QRELS_HEADER) + "\n")
            for query, judged in qrels.items():
                file.writelines(f"{query}\t{d}\t{score}\n" for d, score in judged.items())
    return {"queries": len(qrels), "judgments": kept, **{k: n for k, n in left_out.items() if n}}


def _report(name: str, counts: dict[str, Any]) -> None:
    """Say what was left out."""
    reported = []
    if counts["queries without text"]:
        reported.append(f"{counts['queries without text']} queries have no text")
    for split, found in counts["splits"].items():
        kinds = [f"{n} {kind}" for kind, n in found.items() if kind not in ("queries", "judgments")]
        if kinds:
            reported.append(f"judgments of {split}: {', '.join(kinds)}")
    if reported:
        logger.warning(
            "%s: left out, since the data set has them so: %s.", name, "; ".join(reported)
        )
