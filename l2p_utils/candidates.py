"""Candidates: the documents of which a training row is chosen, proposed by a miner.

Takes a collection's training split; gives each query's positives, the miner's nearest documents and
random ones. What a miner from the hub proposes is kept, so that several jobs score the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from l2p_utils.collection import Collection
from l2p_utils.files import (
    PROVENANCE,
    UserError,
    atomic_path,
    locked,
    settings_match,
    versions,
    write_json,
)
from l2p_utils.hub import find_source
from l2p_utils.model import quiet_loading
from l2p_utils.profile import MiningSettings, Profile, slug
from l2p_utils.teacher import LOADING_ERRORS

SIMILARITIES = 4_000_000  # held at a time: 16 MB
FILE = "candidates.parquet"


@dataclass(frozen=True)
class Candidates:
    """One query's documents: known positives, the miner's nearest, and random ones."""

    query_id: str
    positives: list[str]
    hard: list[str]
    random: list[str]

    @property
    def documents(self) -> list[str]:
        """All of them, each once: what the teacher scores."""
        return [*self.positives, *self.hard, *self.random]


# --- training split -------------------------------------------------------------------------------


def positives_of(collection: Collection, query_id: str) -> list[str]:
    """Documents judged above 0 that exist, by id."""
    judged = collection.qrels[query_id]
    return sorted(d for d, score in judged.items() if score > 0 and d in collection.corpus)


def query_rng(seed: int, query_id: str, *purpose: int) -> np.random.Generator:
    """A query's own random numbers: the same whatever other queries there are, in any order."""
    digest = hashlib.sha256(query_id.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big"), *purpose])


# --- the rule -------------------------------------------------------------------------------------


class Proposer:
    """Proposes candidates among the documents `document_ids`, whose order it finds once."""

    def __init__(self, document_ids: Sequence[str], settings: MiningSettings) -> None:
        self.settings = settings
        self.order = np.array(sorted(range(len(document_ids)), key=document_ids.__getitem__))
        self.ids = [document_ids[i] for i in self.order]
        self.position = {document: i for i, document in enumerate(self.ids)}

    def propose(
        self, similarities: np.ndarray, positives: Sequence[str], rng: np.random.Generator
    ) -> tuple[list[str], list[str]]:
        """Hard and random candidates of one query; see `propose`."""
        last = len(self.ids) - 1
        by_id_descending = similarities[self.order[::-1]]
        top = [
            self.ids[last - i] for i in _largest(by_id_descending, self.settings.hard_candidates)
        ]
        hard = [document for document in top if document not in set(positives)]
        taken = [self.position[document] for document in {*hard, *positives}]
        rest = np.delete(np.arange(len(self.ids)), taken)  # by id
        count = min(self.settings.random_candidates, len(rest))
        drawn = rest[rng.choice(len(rest), count, replace=False)]
        return hard, [self.ids[i] for i in drawn]


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` largest values, descending; of equal ones the first."""
    kept = np.arange(len(values))
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        kept = np.flatnonzero(values >= least)
    return kept[np.argsort(-values[kept], kind="stable")][:count]


def propose(
    similarities: np.ndarray,
    document_ids: Sequence[str],
    positives: Sequence[str],
    settings: MiningSettings,
    rng: np.random.Generator,
) -> tuple[list[str], list[str]]:
    """Hard and random candidates of one query.

    Parameters
    ----------
    similarities
        (documents,) the miner's cosine with each document.

    Returns
    -------
    tuple of list of str
        The miner's top `hard_candidates` without the positives (ties by id, descending), and
        `random_candidates` drawn uniformly from what is neither positive nor hard.
    """
    return Proposer(document_ids, settings).propose(similarities, positives, rng)


# --- a miner from the hub -------------------------------------------------------------------------


def find_candidates(
    profile: Profile, collection: Collection, progress: bool = True
) -> list[Candidates]:
    """Candidates of every training query that has a positive: those kept, or proposed now.

    Processes that start at once wait for the first one, and see what it proposed.

    Raises
    ------
    UserError
        When the miner cannot be loaded, or the file that is kept is damaged.
    """
    folder = candidates_folder(profile, collection.name)
    miner = find_source(profile.scoring.miner, profile.scoring.miner_revision)
    used = {"hard_candidates", "random_candidates"}
    settings = {
        "collection": collection.name,
        "fingerprint": collection.fingerprint,
        "miner": [miner.name, miner.version],
        "mining": profile.mining.model_dump(include=used),
        "seed": profile.seed,
    }
    with locked(folder.with_suffix(".lock"), "finds candidates"):
        if not settings_match(folder, settings):
            encoder = load_miner(miner.folder)
            found = propose_all(collection, encoder, profile.mining, profile.seed, progress)
            _save(found, collection, folder, settings)
        return _load(folder)


def candidates_folder(profile: Profile, name: str) -> Path:
    """Where a collection's candidates are kept."""
    return profile.folder / "mined" / f"{slug(name)}.candidates"


def load_miner(folder: Path) -> SentenceTransformer:
    """Load a Sentence Transformers model, on a GPU if there is one.

    Raises
    ------
    UserError
        When the folder holds none.
    """
    if not (folder / "modules.json").is_file():
        raise UserError(
            f"The miner in {folder} is no Sentence Transformers model (no modules.json in it). "
            "Expected one, like BAAI/bge-small-en-v1.5 (scoring.miner)."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with quiet_loading():
            return SentenceTransformer(str(folder), device=device, local_files_only=True)
    except LOADING_ERRORS as error:
        raise UserError(
            f"The miner in {folder} could not be loaded: {error}. Expected a whole Sentence "
            "Transformers model, like BAAI/bge-small-en-v1.5 (scoring.miner)."
        ) from error


def propose_all(
    collection: Collection,
    encoder: SentenceTransformer,
    settings: MiningSettings,
    seed: int,
    progress: bool = True,
) -> list[Candidates]:
    """Candidates of all queries that have a positive, in the collection's order.

    Queries and documents are encoded as the model's own prompts want it. Cosines are computed for
    as many queries at a time as fit into `SIMILARITIES`, never for all.
    """
    positives = {q: found for q in collection.queries if (found := positives_of(collection, q))}
    asked = [collection.queries[query] for query in positives]
    options = {"convert_to_tensor": True, "normalize_embeddings": True}
    queries = encoder.encode_query(asked, show_progress_bar=False, **options)
    documents = encoder.encode_document(
        list(collection.corpus.values()), show_progress_bar=progress, **options
    )
    proposer = Proposer(list(collection.corpus), settings)
    found = []
    bar = tqdm(positives, desc=f"Candidates of {collection.name}", disable=not progress)
    for query, row in zip(bar, _cosines(queries, documents), strict=True):
        chosen = proposer.propose(row, positives[query], query_rng(seed, query))
        found.append(Candidates(query, positives[query], *chosen))
    return found


def _cosines(queries: torch.Tensor, documents: torch.Tensor) -> Iterator[np.ndarray]:
    """Each query's cosines with all documents, (documents,) float32."""
    for block in queries.float().split(max(SIMILARITIES // len(documents), 1)):
        yield from (block @ documents.float().T).cpu().numpy()


def _save(
    found: list[Candidates], collection: Collection, folder: Path, settings: dict[str, Any]
) -> None:
    provenance = {
        "settings": settings,
        "queries": len(collection.queries),
        "queries_without_positive": len(collection.queries) - len(found),
        "documents": len(collection.corpus),
        "pairs": sum(len(candidates.documents) for candidates in found),
        "versions": versions(),
    }
    columns = list(Candidates.__dataclass_fields__)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        table = pd.DataFrame([vars(candidates) for candidates in found], columns=columns)
        table.to_parquet(temporary / FILE, index=False)
        write_json(temporary / PROVENANCE, provenance)


def _load(folder: Path) -> list[Candidates]:
    try:
        records = pd.read_parquet(folder / FILE).to_dict("records")
        return [Candidates(row.pop("query_id"), **{k: list(v) for k, v in row.items()})
                for row in records]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The candidates in {folder} are damaged ({error}). Delete the folder and run again."
        ) from error


def fingerprint_of(found: Sequence[Candidates]) -> str:
    """Hash of candidates, so that scores of other ones are told apart."""
    content = json.dumps([vars(candidates) for candidates in found])
    return hashlib.sha256(content.encode()).hexdigest()
