"""Retrieval collections: corpus, queries and relevance judgments, wherever they come from.

A name (``docs:scipy``, ``nano:scifact``, ``beir:scifact``) or a folder in BEIR's layout gives a
`Collection`. What cannot be read is refused, with file and line; what has no text, or judges what
does not exist, is left out and counted.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

from l2p_utils.files import ROOT, UserError
from l2p_utils.hub import collection_repository, snapshot
from l2p_utils.profile import BUNDLED, HUB, Profile, plain_name

logger = logging.getLogger(__name__)

DOCS = ROOT / "data" / "docs"
#: A collection without a dev split gives so much of its training queries to it.
DEV_SHARE, MAX_DEV_QUERIES = 0.10, 100
#: Judgments of unknown queries or documents are dropped up to this share; ArguAna has some.
UNKNOWN_SHARE = 0.05
QRELS_HEADER = ("query-id", "corpus-id", "score")
Qrels = dict[str, dict[str, int]]
Records = Iterable[tuple[str, dict[str, Any]]]  # where, record
Judgment = tuple[str, str, str, int]  # where, query id, document id, relevance


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
        Query id to {document id: relevance}; 0 or less means judged irrelevant.
    split : str
        "train", "dev" or "test".
    dropped : int
        Documents that were left out because they have no text.
    judgments_dropped : int
        Judgments that were left out because their query or document does not exist.
    """

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: Qrels
    split: str = "test"
    dropped: int = 0
    judgments_dropped: int = 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of corpus, queries, qrels and split, whatever the order they came in."""
        content = [self.split, self.corpus, self.queries, self.qrels]
        serialised = json.dumps(content, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(serialised.encode()).hexdigest()


def load_collection(
    name: str | Path, split: str = "test", text_only: bool = False, carve_dev: bool | None = None
) -> Collection:
    """Load one split of a collection.

    Parameters
    ----------
    name : str or path
        ``docs:<package>``, a bundled collection; ``nano:<set>`` or ``beir:<set>``, perhaps with
        ``@<revision>``, from the hub; or a folder in BEIR's layout: ``corpus.jsonl`` (``_id``,
        ``text``, perhaps ``title``), ``queries.jsonl`` (``_id``, ``text``), both perhaps gzipped
        (``.jsonl.gz``), ``qrels/<split>.tsv`` (header ``query-id corpus-id score``).
    split : str
        "test", "train" or "dev", or another that there are judgments for. NanoBEIR has "test" only.
    text_only : bool
        Take ``text`` without the title: for training queries that are the documents' titles.
    carve_dev : bool, optional
        Where there are training judgments and none for "dev": True makes "dev" of a tenth of the
        training queries (at most 100, by the hash of their ids) and leaves them out of "train";
        False does not. None means True for folders and False for the hub, since the paper trains on
        all of BEIR's training queries. Pass the same value when loading train and dev.

    Raises
    ------
    UserError
        For an unknown name or split, anything unreadable (with file and line), and too many
        judgments of what does not exist.
    """
    name = str(name)
    hub, bundled = name.startswith(HUB), name.startswith(BUNDLED)
    documents, queries, judgments = _from_hub(name) if hub else _from_folder(name)
    carve = not bundled and (not hub if carve_dev is None else carve_dev)
    carved = carve and split in ("train", "dev") and "train" in judgments and "dev" not in judgments
    source = "train" if carved else split
    if source not in judgments:
        known = ", ".join(sorted(judgments)) or "none"
        raise UserError(f"{name} has no split {split!r}. It has: {known}.")
    collection = _assemble(name, split, documents, queries, judgments[source], text_only, carved)
    tested = judgments.get("test", []) if split == "train" and not hub else []
    if both := {query for _, query, *_ in tested} & collection.queries.keys():
        logger.warning(
            "%s: %d of %d training queries are test queries, too: the model will have seen them.",
            collection.name,
            len(both),
            len(collection.queries),
        )
    return collection


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
    left = len(others) if max_documents is None else max(max_documents - len(relevant), 0)
    kept = relevant | set(others[:left])
    return replace(
        collection,
        corpus={d: text for d, text in collection.corpus.items() if d in kept},
        queries={q: text for q, text in collection.queries.items() if q in qrels},
        qrels={q: {d: s for d, s in judged.items() if d in kept} for q, judged in qrels.items()},
    )


def carves_dev(profile: Profile, name: str) -> bool | None:
    """`carve_dev` of `load_collection` in a profile's training.

    Where another collection picks the epoch, no training queries are held out; else some are, of a
    hub collection too.
    """
    if name in profile.dev_collections:
        return False
    return True if name.startswith(HUB) else None


def profile_split(profile: Profile, name: str) -> Collection:
    """The training split of a collection as a profile mines it and trains on it.

    Limited to `max_queries` and `max_documents` of its `mining` (by id hash).
    """
    mining = profile.mining
    collection = load_collection(name, "train", mining.text_only, carves_dev(profile, name))
    return subset(collection, mining.max_queries, mining.max_documents)


# --- what all sources share -----------------------------------------------------------------------


def _assemble(
    name: str,
    split: str,
    documents: Records,
    queries: Records,
    judgments: Iterable[Judgment],
    text_only: bool,
    carved: bool,
) -> Collection:
    """A collection from records and judgments, with what cannot be used counted."""
    corpus = _texts(documents, () if text_only else ("title",))
    texts = _texts(queries)
    if not any(corpus.values()):
        raise UserError(f'{name}: no document has any text. Expected lines with "_id" and "text".')
    qrels: Qrels = {}
    unknown, total = [], 0
    for where, query, document, score in judgments:
        total += 1
        if query not in texts or document not in corpus:
            unknown.append(f"query {query!r}, document {document!r} ({where})")
            continue
        if qrels.setdefault(query, {}).setdefault(document, score) != score:
            raise UserError(
                f"{where}: query {query!r} and document {document!r} are judged twice, {score} "
                f"here and {qrels[query][document]} before. Delete one of the two lines."
            )
    if len(unknown) > UNKNOWN_SHARE * total:
        raise UserError(
            f"{name}: {len(unknown)} of {total} judgments in {split!r} name a query or a document "
            f"that does not exist, for instance {'; '.join(unknown[:3])}. Up to "
            f"{UNKNOWN_SHARE:.0%} are dropped with a notice. Do the ids of qrels, queries and "
            "corpus belong together?"
        )
    if carved:  # before anything is left out for want of text, so that text_only moves no query
        count = min(max(int(DEV_SHARE * len(qrels)), 1), MAX_DEV_QUERIES, len(qrels) - 1)
        dev = set(sorted(qrels, key=_hash)[:count])
        qrels = {query: qrels[query] for query in qrels if (query in dev) == (split == "dev")}
    qrels = {
        query: usable
        for query, judged in qrels.items()
        if texts[query] and (usable := {d: score for d, score in judged.items() if corpus[d]})
    }
    if not qrels:
        raise UserError(f"{name}: the split {split!r} judges no query and document with any text.")
    empty = [sum(not text for text in mapping.values()) for mapping in (corpus, texts)]
    for count, what in [
        (empty[0], f"of {len(corpus)} documents have no text"),
        (empty[1], f"of {len(texts)} queries have no text"),
        (len(unknown), f"of {total} judgments name a query or a document that does not exist"),
    ]:
        if count:
            logger.warning("%s: %d %s; left out.", name, count, what)
    kept = {identifier: text for identifier, text in corpus.items() if text}
    chosen = {query: texts[query] for query in qrels}
    return Collection(plain_name(name), kept, chosen, qrels, split, empty[0], len(unknown))


def _texts(records: Records, before: tuple[str, ...] = ()) -> dict[str, str]:
    """Id → text, "" where there is none; the fields `before` come first in the text."""
    texts: dict[str, str] = {}
    for where, record in records:
        identifier = record.get("_id")
        if isinstance(identifier, bool) or not isinstance(identifier, str | int):
            raise UserError(f'{where}: expected "_id", a string or a whole number; {record!r:.80}.')
        parts = [record.get(key) or "" for key in (*before, "text")]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f'{where}: expected "text" and "title" to be strings; {record!r:.80}.')
        identifier, text = str(identifier), " ".join(part.strip() for part in parts).strip()
        if not identifier.strip() or identifier in texts:
            raise UserError(f"{where}: the id {identifier!r} is empty, or occurs a second time.")
        try:
            f"{identifier} {text}".encode()
        except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
            raise UserError(f"{where}: {error.object[error.start]!a} is no character.") from error
        texts[identifier] = text
    return texts


def _hash(identifier: str) -> str:
    return hashlib.sha256(identifier.encode()).hexdigest()


# --- folders in BEIR's layout ---------------------------------------------------------------------


def _from_folder(name: str) -> tuple[Records, Records, dict[str, Iterable[Judgment]]]:
    """Documents, queries, and judgments by split; each file is read when it is iterated over."""
    folder = _bundled_folder(name) if name.startswith(BUNDLED) else _own_folder(name)
    documents, queries = _jsonl(folder, "corpus"), _jsonl(folder, "queries")
    if not (folder / "qrels").is_dir():
        raise UserError(f"{folder} is not a collection: it has no folder qrels with <split>.tsv.")
    judgments = {path.stem: _read_qrels(path) for path in (folder / "qrels").glob("*.tsv")}
    return documents, queries, judgments


def _bundled_folder(name: str) -> Path:
    known = {BUNDLED + path.name: path for path in sorted(DOCS.glob("*")) if path.is_dir()}
    if not known:
        raise UserError(
            f"The bundled collections are not in {DOCS}. They are part of the project's folder: "
            "install it from a clone with `pip install -e .` (make setup)."
        )
    if name not in known:
        raise UserError(f"There is no collection {name}. Known are: {', '.join(known)}.")
    return known[name]


def _own_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not name.strip() or not folder.is_dir():
        found = "a file" if folder.is_file() else "not there"
        raise UserError(
            f"There is no collection {name!r}: this folder is {found}. Expected a bundled "
            "collection (docs:scipy, …), one from the hub (nano:scifact, beir:scifact, …) or a "
            "folder with corpus.jsonl, queries.jsonl and qrels/<split>.tsv."
        )
    return folder


def _jsonl(folder: Path, part: str) -> Records:
    for path in (folder / f"{part}.jsonl", folder / f"{part}.jsonl.gz"):
        if path.is_file():
            return _read_jsonl(path)
    raise UserError(f"{folder} is not a collection: it has no {part}.jsonl (or {part}.jsonl.gz).")


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ("file, line n", line) of a UTF-8 file, perhaps gzipped, without empty lines."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}).") from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _read_lines(path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{where}: bad JSON ({error}). Expected one object per line."
            ) from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, found {line[:60]!r}.")
        yield where, record


def _read_qrels(path: Path) -> Iterator[Judgment]:
    for number, (where, line) in enumerate(_read_lines(path)):
        fields = line.split("\t")
        if number == 0 and tuple(fields) == QRELS_HEADER:
            continue
        if len(fields) != len(QRELS_HEADER):
            raise UserError(
                f"{where}: expected {', '.join(QRELS_HEADER)} with tabs between; found "
                f"{line[:80]!r}."
            )
        yield where, fields[0], fields[1], _relevance(fields[2], where)


def _relevance(value: Any, where: str) -> int:
    """A whole number that 64 bits hold, also written as 1.0."""
    found = re.fullmatch(r"([+-]?[0-9]{1,19})(\.0*)?", str(value).strip())
    if not found or abs(int(found[1])) >= 2**63:
        raise UserError(f"{where}: expected a whole number as the score; found {value!r}.")
    return int(found[1])


# --- the hub --------------------------------------------------------------------------------------


def _from_hub(name: str) -> tuple[Records, Records, dict[str, Iterable[Judgment]]]:
    """NanoBEIR: configs corpus, queries, qrels. BEIR through mteb: corpus, queries, default."""
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError

    repository, revision = collection_repository(name)
    folder = str(snapshot(repository, "dataset", revision).folder)
    nano = name.startswith("nano:")
    judged = "qrels" if nano else "default"
    disable_progress_bars()
    try:
        tables = [load_dataset(folder, config) for config in ("corpus", "queries", judged)]
        (corpus,), (queries,) = (table.values() for table in tables[:2])
    except (ValueError, FileNotFoundError, DatasetsError) as error:
        raise UserError(f"{name}: {repository} is not laid out as expected: {error}") from error
    # NanoBEIR calls its only split train, and some of BEIR's sets call dev validation
    names = {"train": "test"} if nano else {"validation": "dev"}
    judgments = {}
    for found, rows in tables[2].items():
        split = names.get(found, found)
        judgments[split] = _hub_judgments(f"{repository}, {judged}/{split}", rows)
    return zip(repeat(repository), corpus), zip(repeat(repository), queries), judgments


def _hub_judgments(where: str, rows: Iterable[dict[str, Any]]) -> Iterator[Judgment]:
    for row in rows:
        score = _relevance(row.get("score", 1), where)  # NanoBEIR has none: all are relevant
        yield where, str(row["query-id"]), str(row["corpus-id"]), score
