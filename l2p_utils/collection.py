"""Retrieval collections: corpus, queries and relevance judgments, wherever they come from.

Takes a name, ``docs:scipy``, ``nano:scifact``, ``beir:scifact`` or a folder in BEIR's layout, and
gives a `Collection`; whatever is wrong with the files ends in an error that names file and line.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from l2p_utils.files import UserError
from l2p_utils.profile import HUB, MiningSettings, Profile

logger = logging.getLogger(__name__)

BUNDLED = "docs:"
#: A folder without ``qrels/dev.tsv`` gives so much of its training queries to its dev split.
DEV_SHARE, MAX_DEV_QUERIES = 0.10, 100
Qrels = dict[str, dict[str, int]]
#: Half of a surrogate pair: JSON can escape it, but it is no character and no UTF-8.
HALF = re.compile(r"[\ud800-\udfff]")
QRELS_HEADER = ("query-id", "corpus-id", "score")


@dataclass(frozen=True)
class Collection:
    """One split of a test collection.

    Attributes
    ----------
    name : str
        What `load_collection` was asked for, without a hub collection's revision.
    corpus : dict of str to str
        Document id to text; the same documents in every split.
    queries : dict of str to str
        Query id to text, of the queries that the split judges.
    qrels : dict of str to dict of str to int
        Query id to {document id: relevance}; a relevance of 0 or less means judged irrelevant.
    split : str
        "train", "dev" or "test".
    dropped : int
        Documents that were left out because they have no text.
    """

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    split: str = "test"
    dropped: int = 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of corpus, queries, qrels and split, whatever the order they came in."""
        content = [self.split, self.corpus, self.queries, self.qrels]
        serialised = json.dumps(content, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(serialised.encode()).hexdigest()


def load_collection(
    name: str | Path,
    split: str = "test",
    text_only: bool = False,
    cache: str | Path | None = None,
    carve_dev: bool | None = None,
) -> Collection:
    """Load one split of a collection.

    Parameters
    ----------
    name : str or path
        ``docs:<package>``, a bundled collection (see `l2p_utils.docstrings`); ``nano:<set>`` or
        ``beir:<set>``, perhaps with ``@<revision>``, a collection from the hub (see
        `l2p_utils.hub_collections`: fetched once, then read from the cache); or a folder in
        BEIR's layout: ``corpus.jsonl`` (``_id``, ``text``, perhaps ``title``), ``queries.jsonl``
        (``_id``, ``text``), ``qrels/<split>.tsv`` (header ``query-id corpus-id score``).
    split : str
        "test", "train" or "dev", or another one that there are judgments for. NanoBEIR has "test"
        only.
    text_only : bool
        False joins title and text. True takes ``text`` alone: for mining and training where the
        training queries are the documents' titles. Bundled documents have no title.
    cache : path, optional
        Where bundled and hub collections are cached, see `l2p_utils.docstrings.cache_folder`.
    carve_dev : bool, optional
        What happens where there are training judgments and none for "dev". True: "dev" is a tenth
        of the training queries, at most 100, picked by hash of their ids, and "train" is without
        them. False: "train" is whole, "dev" an error. None: True for folders; False for hub
        collections, since the paper trains on all of BEIR's training queries. Who trains on "train"
        and picks the epoch on "dev" must give the same value for both. Bundled collections have
        fixed splits.

    Returns
    -------
    Collection
        Documents without text are dropped, their judgments with them, and counted.

    Raises
    ------
    UserError
        For a name or split that does not exist, and for anything wrong in the files: says which
        file and line, what was found and what was expected.
    """
    if str(name).startswith(BUNDLED):
        return _load_bundled(str(name), split, cache)
    if str(name).startswith(HUB):
        carve = bool(carve_dev)
        label, folder = _hub_collections().find_split(str(name), split, cache, carve)
    else:
        carve = carve_dev is None or carve_dev
        label, folder = str(name), _check_folder(name)
    corpus, dropped = _read_corpus(folder / "corpus.jsonl", text_only)
    queries = _read_queries(folder / "queries.jsonl")
    qrels = _read_split(folder, split, queries, corpus.keys() | dropped, carve)
    qrels = _without_documents(qrels, dropped)
    if dropped:
        logger.warning(
            "%s: %d of %d documents have no text: dropped, with their judgments.",
            label,
            len(dropped),
            len(dropped) + len(corpus),
        )
    if not qrels:
        raise UserError(f"{folder}: no document that the split {split!r} judges has any text.")
    queries = {query: queries[query] for query in qrels}
    return Collection(label, corpus, queries, qrels, split, len(dropped))


def _docstrings() -> ModuleType:
    """The module of the bundled collections; it comes after this one in the order of imports."""
    from l2p_utils import docstrings

    return docstrings


def _hub_collections() -> ModuleType:
    """Likewise of the collections from the hub."""
    from l2p_utils import hub_collections

    return hub_collections


def _load_bundled(name: str, split: str, cache: str | Path | None) -> Collection:
    entries = _docstrings().load_docstrings(name.removeprefix(BUNDLED), cache)
    splits = ("train", "dev", "test")
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}. It has: {', '.join(splits)}.")
    corpus = {entry.id: entry.document for entry in entries}
    queries = {entry.id: entry.query for entry in entries if entry.split == split}
    return Collection(name, corpus, queries, {key: {key: 1} for key in queries}, split)


# --- folders in BEIR's layout ---------------------------------------------------------------------


def _check_folder(name: str | Path) -> Path:
    folder = Path(name).expanduser()
    wanted = "a folder with corpus.jsonl, queries.jsonl and qrels/<split>.tsv"
    if not str(name).strip() or not folder.is_dir():
        found = "is a file" if folder.is_file() else "is no folder that is there"
        known = ", ".join(BUNDLED + package for package in _docstrings().PACKAGES)
        raise UserError(
            f"There is no collection {str(name)!r}: it {found}. "
            f"Give a bundled collection ({known}), one from the hub (nano:scifact, beir:scifact, "
            f"…) or {wanted}."
        )
    missing = [part for part in ("corpus.jsonl", "queries.jsonl") if not (folder / part).is_file()]
    if not (folder / "qrels").is_dir():
        missing.append("folder qrels")
    if missing:
        raise UserError(
            f"{folder} is not a collection: it has no {', no '.join(missing)}. Expected {wanted}."
        )
    return folder


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of a UTF-8 file, from 1, without empty lines."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8."
            ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (id, record, "file, line n") of each line; ids are strings and occur once."""
    first_line: dict[str, int] = {}
    for number, line in _read_lines(path):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{where}: bad JSON ({error}). Expected one JSON object a line."
            ) from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, found {line[:60]!r}.")
        identifier = _identifier(record, where)
        if identifier in first_line:
            raise UserError(
                f"{where}: the id {identifier!r} is there already, in line "
                f"{first_line[identifier]}. Ids must differ: rename or delete one of the two."
            )
        first_line[identifier] = number
        yield identifier, record, where


def _identifier(record: dict[str, Any], where: str) -> str:
    value = record.get("_id")
    if isinstance(value, bool) or not isinstance(value, str | int) or str(value).strip() == "":
        found = f"found {value!r}" if "_id" in record else f"there is only {sorted(record)}"
        raise UserError(f'{where}: expected an id, "_id": a string or a whole number; {found}.')
    return _whole(str(value), "_id", where)


def _text(record: dict[str, Any], key: str, where: str) -> str:
    """A record's text; absent and null count as empty."""
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f'{where}: expected "{key}" to be a string, found {value!r}.')
    return _whole((value or "").strip(), key, where)


def _whole(text: str, key: str, where: str) -> str:
    if half := HALF.search(text):
        raise UserError(
            f'{where}: "{key}" has {ascii(half[0])[1:-1]}, half of a surrogate pair. Expected '
            "whole characters: add the other half after it (as JSON escapes it), or delete it."
        )
    return text


def _read_corpus(path: Path, text_only: bool) -> tuple[dict[str, str], set[str]]:
    """Return (document id to text, ids of the documents that have none)."""
    corpus: dict[str, str] = {}
    dropped = set()
    for identifier, record, where in _read_jsonl(path):
        text = _text(record, "text", where)
        if not text_only:
            text = f"{_text(record, 'title', where)} {text}".strip()
        if text:
            corpus[identifier] = text
        else:
            dropped.add(identifier)
    if not corpus:
        found = f"none of its {len(dropped)} documents has any text" if dropped else "it is empty"
        raise UserError(f'{path}: no documents, {found}. Expected lines with "_id" and "text".')
    return corpus, dropped


def _read_queries(path: Path) -> dict[str, str]:
    queries = {}
    for identifier, record, where in _read_jsonl(path):
        queries[identifier] = _text(record, "text", where)
        if not queries[identifier]:
            raise UserError(
                f'{where}: the query {identifier!r} has no text. Give it a "text" or delete it.'
            )
    return queries


def _read_split(
    folder: Path, split: str, queries: dict[str, str], documents: set[str], carve: bool
) -> Qrels:
    """Read a split's judgments; with `carve`, a dev split that is missing comes out of train."""
    available = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
    carved = carve and "dev" not in available and "train" in available
    source = "train" if split == "dev" and carved else split
    if source not in available:
        there = ", ".join(f"{found}.tsv" for found in available) or "nothing"
        raise UserError(
            f"{folder} has no split {split!r}: there is no qrels/{source}.tsv. In qrels/ there is: "
            f"{there}."
        )
    qrels = _read_qrels(folder / "qrels" / f"{source}.tsv", queries, documents)
    if carved and split in ("train", "dev"):
        dev = _dev_queries(list(qrels))
        qrels = {query: qrels[query] for query in qrels if (query in dev) == (split == "dev")}
    if not qrels:
        raise UserError(
            f"{folder}: the split {split!r} has no judgments (read from qrels/{source}.tsv)."
        )
    return qrels


def _dev_queries(train: list[str]) -> set[str]:
    if len(train) < 2:
        return set()
    count = min(max(int(DEV_SHARE * len(train)), 1), MAX_DEV_QUERIES)
    return set(sorted(train, key=lambda query: hashlib.sha256(query.encode()).hexdigest())[:count])


def _read_qrels(path: Path, queries: dict[str, str], documents: set[str]) -> Qrels:
    qrels: Qrels = {}
    for number, line in _read_lines(path):
        where = f"{path}, line {number}"
        if number == 1 and tuple(line.split("\t")) == QRELS_HEADER:
            continue
        query, document, score = _fields(line, number, where)
        _check_known(query, queries, "query", "queries.jsonl", where)
        _check_known(document, documents, "document", "corpus.jsonl", where)
        judged = qrels.setdefault(query, {})
        if judged.setdefault(document, score) != score:
            raise UserError(
                f"{where}: query {query!r} and document {document!r} have the score {score} here "
                f"and {judged[document]} above. Delete one of the two lines."
            )
    return qrels


def _fields(line: str, number: int, where: str) -> tuple[str, str, int]:
    fields = line.split("\t")
    expected = f"{' '.join(QRELS_HEADER)}, with tabs between" + (" (a header)" * (number == 1))
    if len(fields) != len(QRELS_HEADER):
        raise UserError(f"{where}: expected {expected}; found {len(fields)} fields: {line[:80]!r}.")
    query, document, score = fields
    if not re.fullmatch(r"[+-]?[0-9]+", score.strip()):
        raise UserError(f"{where}: expected {expected}, score a whole number; found {score!r}.")
    return query, document, int(score)


def _check_known(
    identifier: str, known: dict[str, str] | set[str], kind: str, file: str, where: str
) -> None:
    if identifier not in known:
        raise UserError(
            f"{where}: a judgment of {kind} {identifier!r}, which {file} does not have. "
            "Add it there or delete the judgment."
        )


def _without_documents(qrels: Qrels, dropped: set[str]) -> Qrels:
    """Judgments without those of dropped documents, which no search could find."""
    kept = {
        query: {document: judged[document] for document in judged if document not in dropped}
        for query, judged in qrels.items()
    }
    return {query: judged for query, judged in kept.items() if judged}


def subset(
    collection: Collection, max_queries: int | None, max_documents: int | None
) -> Collection:
    """Part of a collection: the queries and documents with the smallest id hashes.

    Every judged-relevant document of a kept query is kept, also beyond `max_documents`.
    """
    queries = sorted(collection.queries, key=_hash)[:max_queries]
    qrels = {query: collection.qrels[query] for query in queries}
    relevant = {d for judged in qrels.values() for d, score in judged.items() if score > 0}
    others = [d for d in sorted(collection.corpus, key=_hash) if d not in relevant]
    room = len(others) if max_documents is None else max(max_documents - len(relevant), 0)
    kept = relevant | set(others[:room])
    return Collection(
        collection.name,
        {d: text for d, text in collection.corpus.items() if d in kept},
        {query: collection.queries[query] for query in collection.queries if query in qrels},
        {q: {d: s for d, s in judged.items() if d in kept} for q, judged in qrels.items()},
        collection.split,
        collection.dropped,
    )


def _hash(identifier: str) -> str:
    return hashlib.sha256(identifier.encode()).hexdigest()


def training_split(
    name: str, settings: MiningSettings, carve_dev: bool | None = None
) -> Collection:
    """A collection's training split, limited to `max_queries` and `max_documents` (by id hash)."""
    collection = load_collection(
        name, split="train", text_only=settings.text_only, carve_dev=carve_dev
    )
    return subset(collection, settings.max_queries, settings.max_documents)


def carves_dev(profile: Profile, name: str) -> bool | None:
    """`carve_dev` of `load_collection`: whether training queries are kept back to pick the epoch.

    None are where another collection picks it; else some, of a hub collection too.
    """
    if name in profile.dev_collections:
        return False
    return True if name.startswith(HUB) else None


def profile_split(profile: Profile, name: str) -> Collection:
    """The training split of a collection as a profile mines it and trains on it."""
    return training_split(name, profile.mining, carves_dev(profile, name))
