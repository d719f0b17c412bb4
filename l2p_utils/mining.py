"""Data mining: candidates, teacher scores, one n-way training row per query.

The rows are a `datasets` set in PyLate's distillation layout (`query_id, document_ids, scores`, and
`labels`), saved with its provenance. Candidates and scores come from the bundled encoder or from a
miner and a reranker of the hub; or the rows are those that the authors released.

Source: S. Josef, *Learn to Pool* (LIR @ ECIR 2026), section on training data.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from l2p_utils.collection import Collection, load_collection, profile_split
from l2p_utils.files import (
    PROVENANCE,
    UserError,
    atomic_path,
    read_json,
    settings_match,
    versions,
    write_json,
)
from l2p_utils.hub import Snapshot, collection_repository, snapshot
from l2p_utils.model import quiet_loading, use_threads
from l2p_utils.profile import HUB, MiningSettings, Profile, pinned, slug
from l2p_utils.teacher import LOADING_ERRORS, bundled_teacher, load_reranker, untrained_model

LABELS = ("positive", "hard_negative", "medium_negative", "random_negative")
POSITIVE, HARD, MEDIUM, RANDOM = LABELS
MAX_UNKNOWN = 0.01  # of released rows; with more, they are rows of another collection
CHOICE = 1  # random numbers of a query's choice where its candidates are stored

Scored = tuple["Candidates", Mapping[str, float], np.random.Generator]


@dataclass(frozen=True)
class Row:
    """One training row: documents by descending teacher score, each with its label."""

    query_id: str
    document_ids: list[str]
    scores: list[float]
    labels: list[str]


@dataclass(frozen=True)
class Candidates:
    """One query's documents: known positives, the miner's nearest, and random ones."""

    query_id: str
    positives: list[str]
    hard: list[str]
    random: list[str]

    @property
    def documents(self) -> list[str]:
        """What the teacher scores: all of them, each once."""
        return [*self.positives, *self.hard, *self.random]


# --- candidates -----------------------------------------------------------------------------------


class Proposer:
    """Proposes a training query's candidates from the miner's similarities.

    Documents judged above 0 are positives, also those of the same question under another id. Their
    copies, other documents of the same text, are no candidates. Texts are compared without regard
    to white space. `repeated` counts the queries whose question occurs under another id too.
    """

    def __init__(self, collection: Collection, settings: MiningSettings) -> None:
        self.settings = settings
        corpus, queries = list(collection.corpus), collection.queries
        self.order = np.array(sorted(range(len(corpus)), key=corpus.__getitem__))
        self.ids = [corpus[i] for i in self.order]
        questions, texts = _by_text(queries), _by_text(collection.corpus)
        self.repeated = sum(len(same) for same in questions.values() if len(same) > 1)
        self.positives: dict[str, list[str]] = {}  # of the queries that have one, in their order
        self.copies: dict[str, list[str]] = {}
        for query, question in queries.items():
            judged = [collection.qrels[q].items() for q in questions[_plain(question)]]
            relevant = {d for d, score in itertools.chain(*judged) if score > 0}
            positives = relevant & collection.corpus.keys()
            equal = {d for p in positives for d in texts[_plain(collection.corpus[p])]}
            if positives:
                self.positives[query] = sorted(positives)
                self.copies[query] = sorted(equal - positives)

    def propose(
        self, query_id: str, similarities: np.ndarray, rng: np.random.Generator
    ) -> Candidates:
        """Candidates of one query that has a positive.

        Hard: the miner's top `hard_candidates` without positives and copies, ties by id,
        descending. Random: `random_candidates`, drawn uniformly from the other documents.
        `similarities`, (documents,), are the miner's cosines, in the collection's order.
        """
        positives = self.positives[query_id]
        excluded = {*positives, *self.copies[query_id]}
        ascending = np.argsort(similarities[self.order], kind="stable")  # ties by id
        nearest = [self.ids[i] for i in ascending[::-1][: self.settings.hard_candidates]]
        hard = [document for document in nearest if document not in excluded]
        used = {*hard, *excluded}
        rest = [document for document in self.ids if document not in used]
        drawn = _draw(rest, self.settings.random_candidates, rng)
        return Candidates(query_id, positives, hard, drawn)


def _by_text(texts: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for identifier, text in texts.items():
        groups[_plain(text)].append(identifier)
    return groups


def _plain(text: str) -> str:
    return " ".join(text.split())


def query_rng(seed: int, query_id: str, *purpose: int) -> np.random.Generator:
    """A query's own random numbers: the same whatever other queries there are, in any order."""
    digest = hashlib.sha256(query_id.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big"), *purpose])


# --- rows -----------------------------------------------------------------------------------------


def negative_limit(positive_scores: Sequence[float], settings: MiningSettings) -> float:
    """The score above which a negative is dropped as probably relevant.

    95 % of the anchor's score, the best positive's (the paper's text) or the median positive's (the
    authors' script). Below zero, "95 % of" would lie above the anchor and keep negatives that beat
    the positive; there the limit lies as far below it: anchor − 0.05 · abs(anchor).
    """
    median = settings.anchor == "median_positive"
    anchor = float(np.median(positive_scores) if median else max(positive_scores))
    return anchor - (1 - settings.threshold) * abs(anchor)


def select_row(
    candidates: Candidates,
    scores: Mapping[str, float],
    settings: MiningSettings,
    rng: np.random.Generator,
) -> Row | None:
    """Choose one query's documents; None where there are too few.

    The best-scored positive; the best hard negatives; medium ones drawn from the remaining hard
    ones; random ones. Where a group runs short, the others fill up: the best remaining hard ones
    first (labelled medium), then remaining random ones.
    """
    limit = negative_limit([scores[document] for document in candidates.positives], settings)
    hard = _by_score([d for d in candidates.hard if scores[d] <= limit], scores)
    random = [d for d in candidates.random if scores[d] <= limit]
    best = _by_score(candidates.positives, scores)[0]
    chosen = {best: POSITIVE} | dict.fromkeys(hard[: settings.hard], HARD)
    chosen |= dict.fromkeys(_draw(hard[settings.hard :], settings.medium, rng), MEDIUM)
    chosen |= dict.fromkeys(_draw(random, settings.random, rng), RANDOM)
    for document in hard + random:
        if len(chosen) < settings.n_ways and document not in chosen:
            chosen[document] = MEDIUM if document in hard else RANDOM
    if len(chosen) < settings.n_ways:
        return None
    ranked = _by_score(chosen, scores, first=best)
    found = [scores[d] for d in ranked], [chosen[d] for d in ranked]
    return Row(candidates.query_id, ranked, *found)


def _by_score(
    documents: Iterable[str], scores: Mapping[str, float], first: str | None = None
) -> list[str]:
    """By descending score; ties: `first`, then by id, descending."""
    return sorted(documents, key=lambda d: (scores[d], d == first, d), reverse=True)


def _draw(documents: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    count = min(count, len(documents))
    return [documents[i] for i in rng.choice(len(documents), count, replace=False)]


# --- scored candidates ----------------------------------------------------------------------------


def score_bundled(
    profile: Profile, collection: Collection, proposer: Proposer, progress: bool
) -> Iterator[Scored]:
    """Candidates and their scores, query by query, by the bundled encoder."""
    model = untrained_model(profile)
    teacher = bundled_teacher(collection, model, profile.precision, progress)
    for query in tqdm(proposer.positives, desc=f"Mining {collection.name}", disable=not progress):
        rng = query_rng(profile.seed, query)
        found = proposer.propose(query, teacher.dense.loc[query].to_numpy(), rng)
        yield found, teacher.scores(query, found.documents, found.positives), rng


def score_reranked(
    profile: Profile,
    collection: Collection,
    proposer: Proposer,
    models: Mapping[str, Snapshot],
    folder: Path,
    progress: bool,
) -> Iterator[Scored]:
    """As `score_bundled`, by a miner and a reranker from the hub, on a GPU if there is one.

    `folder` keeps the scores in files of `checkpoint_queries` queries; only missing files are made.
    Each query is scored by itself, so an interrupted run gives the scores of an unbroken one.
    """
    scoring, corpus, queries = profile.scoring, collection.corpus, list(proposer.positives)
    size = scoring.checkpoint_queries
    chunks = {
        folder / f"chunk-{start // size:05d}.json": queries[start : start + size]
        for start in range(0, len(queries), size)
    }
    missing = {path: queries for path, queries in chunks.items() if not path.is_file()}
    if missing:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        miner = load_miner(models["miner"].folder, device)
        sizes = scoring.max_length, device, profile.precision
        teacher = load_reranker(models["teacher"].folder, *sizes)
        options = {"convert_to_tensor": True, "normalize_embeddings": True}
        texts = list(corpus.values())
        documents = miner.encode_document(texts, show_progress_bar=progress, **options).float()
    for path, queries in tqdm(missing.items(), f"Scoring {collection.name}", disable=not progress):
        records = []
        for query_id in queries:
            query = collection.queries[query_id]
            vector = miner.encode_query(query, show_progress_bar=False, **options).float()
            cosines = (documents @ vector).cpu().numpy()  # (documents,)
            found = proposer.propose(query_id, cosines, query_rng(profile.seed, query_id))
            pairs = [(query, corpus[document]) for document in found.documents]
            records.append({**asdict(found), "scores": teacher.scores(pairs, scoring.batch_size)})
        write_json(path, records)
    for stored in itertools.chain.from_iterable(map(read_json, chunks)):
        scores = stored.pop("scores")
        found = Candidates(**stored)
        rng = query_rng(profile.seed, found.query_id, CHOICE)
        yield found, dict(zip(found.documents, scores, strict=True)), rng


def load_miner(folder: Path, device: torch.device) -> SentenceTransformer:
    """Load a Sentence Transformers model, which has its own prompts for queries and documents."""
    try:
        if not (folder / "modules.json").is_file():  # a pooling of tokens would be made up
            raise OSError("no modules.json")
        with quiet_loading():
            return SentenceTransformer(str(folder), device=str(device), local_files_only=True)
    except LOADING_ERRORS as error:
        raise UserError(
            f"The miner in {folder} could not be loaded: {error}. Expected a whole Sentence "
            "Transformers model, like BAAI/bge-small-en-v1.5 (scoring.miner)."
        ) from error


# --- released rows --------------------------------------------------------------------------------


def read_released(
    released: Snapshot, collection: Collection, queries: Mapping[str, str]
) -> tuple[list[Row], Counter[str]]:
    """Read the split `train` of a released set, and count what is left out for which reason.

    Rows of unknown queries or documents are left out, up to `MAX_UNKNOWN` of them. `queries` are
    all of the training split: rows of those that `collection` is without are left out too, since
    these queries pick the epoch or lie beyond `max_queries`.
    """
    try:
        table = load_dataset(str(released.folder), split="train")
        columns = [table[column] for column in ("query_id", "document_ids", "scores", "labels")]
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise UserError(
            f"{released.name} has no readable split `train` with the columns query_id, "
            f"document_ids, scores and labels: {error}."
        ) from error
    rows, dropped = [], Counter()
    for query, documents, scores, labels in zip(*columns, strict=True):
        row = Row(str(query), list(map(str, documents)), list(map(float, scores)), labels)
        if row.query_id not in queries:
            dropped["unknown query"] += 1
        elif not collection.corpus.keys() >= set(row.document_ids):
            dropped["unknown document"] += 1
        elif row.query_id not in collection.queries:
            dropped["held out"] += 1
        else:
            rows.append(row)
    lengths = {len(part) for row in rows for part in (row.document_ids, row.scores, row.labels)}
    if len(lengths) > 1:
        raise UserError(
            f"{released.name}: rows have {', '.join(map(str, sorted(lengths)))} documents, scores "
            "or labels; expected as many in every row."
        )
    unknown = dropped["unknown query"] + dropped["unknown document"]
    if unknown > MAX_UNKNOWN * len(table):
        raise UserError(
            f"{released.name}: {unknown} of its {len(table)} rows name queries or documents that "
            f"{collection.name} does not have. Expected at most {MAX_UNKNOWN:.0%}: check "
            "released_rows, the collection's revision and mining.max_documents."
        )
    return rows, dropped


# --- the stage ------------------------------------------------------------------------------------


def mined_folder(profile: Profile, name: str) -> Path:
    """Where a collection's training rows are kept."""
    return profile.folder / "mined" / slug(name)


def mine(
    profile: Profile, name: str, progress: bool = True, folder: str | Path | None = None
) -> Dataset:
    """Mine a collection for a profile, or reuse what was mined with the same settings.

    With `training_data: released` the authors' rows are taken instead. A reranker's scores are
    kept beside the rows, some queries at a time: an interrupted run resumes. The rows, with columns
    `query_id, document_ids, scores, labels`, are saved in `folder` (None: `mined_folder`) with
    their provenance: models, sizes, seed, and the dropped queries counted by reason.
    """
    use_threads(profile.threads)
    collection = profile_split(profile, name)
    folder = Path(folder or mined_folder(profile, name))
    models = _snapshots(profile, name)
    settings = {
        "collection": name,
        "fingerprint": collection.fingerprint,
        "mining": profile.mining.model_dump(),
        "seed": profile.seed,
        "precision": profile.precision,
        **{part: [found.name, found.commit] for part, found in models.items()},
    }
    if models:
        settings["max_length"] = profile.scoring.max_length
    else:
        settings["model"] = profile.model.model_dump()
    if not settings_match(folder, settings):
        rows, dropped, notes = _make_rows(profile, collection, models, folder, settings, progress)
        if not rows:
            raise UserError(
                f"None of the {len(collection.queries)} training queries of {name} gave a row of "
                f"{profile.mining.n_ways} documents ({dict(dropped)}). Ask for fewer "
                "negatives (mining.hard, medium, random), or more candidates."
            )
        places = [models["released"]] if "released" in models else []
        if name.startswith(HUB):
            repository, revision = collection_repository(name)
            places.append(snapshot(repository, "dataset", revision))
        provenance = {
            "settings": settings,
            **notes,
            "repositories": {place.name: place.commit for place in places},
            "rows": len(rows),
            "documents": len(collection.corpus),
            "documents_without_text": collection.dropped,
            "queries": len(collection.queries),
            "queries_dropped": dict(dropped),
            "labels": dict(Counter(label for row in rows for label in row.labels)),
            "versions": versions(),
        }
        with atomic_path(folder) as temporary:
            Dataset.from_list([asdict(row) for row in rows]).save_to_disk(temporary)
            write_json(temporary / PROVENANCE, provenance)
    return load_mined(folder)


def _snapshots(profile: Profile, name: str) -> dict[str, Snapshot]:
    """What comes from the hub: nothing, `released`, or `miner` and `teacher`."""
    scoring = profile.scoring
    if profile.training_data == "released":
        if name not in profile.released_rows:
            raise UserError(
                f"training_data: the profile {profile.name!r} has no released_rows of {name!r}; "
                f"it has {sorted(profile.released_rows)}."
            )
        repository, revision = pinned(profile.released_rows[name])
        return {"released": snapshot(repository, "dataset", revision)}
    if scoring.teacher == "bundled":
        return {}
    return {
        "miner": snapshot(scoring.miner, "model", scoring.miner_revision),
        "teacher": snapshot(scoring.teacher, "model", scoring.teacher_revision),
    }


def _make_rows(
    profile: Profile,
    collection: Collection,
    models: Mapping[str, Snapshot],
    folder: Path,
    settings: dict[str, Any],
    progress: bool,
) -> tuple[list[Row], Counter[str], dict[str, Any]]:
    """Rows, queries without one by reason, and who made them."""
    rules = profile.mining
    named = {part: f"{found.name} @ {found.commit}" for part, found in models.items()}
    if "released" in models:
        whole = load_collection(settings["collection"], "train", rules.text_only, carve_dev=False)
        rows, dropped = read_released(models["released"], collection, whole.queries)
        return rows, dropped, dict.fromkeys(["miner", "teacher"], f"released: {named['released']}")
    proposer = Proposer(collection, rules)
    if models:
        # the rules of choice can change without new scores
        scored_with = settings | {"mining": [rules.hard_candidates, rules.random_candidates]}
        key = hashlib.sha256(json.dumps([scored_with, profile.scoring.checkpoint_queries]).encode())
        chunks = folder.with_name(f"{folder.name}.scores") / key.hexdigest()[:12]
        scored = score_reranked(profile, collection, proposer, models, chunks, progress)
        teacher = f'{named["teacher"]}, logit of "Yes", {profile.scoring.max_length} tokens'
        notes = {"miner": f"{named['miner']}, cosine", "teacher": teacher}
    else:
        scored = score_bundled(profile, collection, proposer, progress)
        notes = {
            "miner": "all-MiniLM-L6-v2, cosine",
            "teacher": "mean of min-max-normalised dense cosine and unpooled late interaction "
            "(all-MiniLM-L6-v2), positives lifted to the top",
        }
    notes["queries_under_several_ids"] = proposer.repeated
    notes["copies_of_positives_left_out"] = sum(map(len, proposer.copies.values()))
    rows, short = mine_rows(scored, rules)
    without = len(collection.queries) - len(proposer.positives)
    return rows, +Counter({"too few candidates": short, "no positive": without}), notes


def mine_rows(scored: Iterable[Scored], settings: MiningSettings) -> tuple[list[Row], int]:
    """A row per query that has enough candidates, and how many queries have not."""
    rows = []
    for candidates, scores, rng in scored:
        if settings.teacher_scores == "sigmoid":
            scores = {d: float(1 / (1 + np.exp(-score))) for d, score in scores.items()}
        rows.append(select_row(candidates, scores, settings, rng))
    return list(filter(None, rows)), rows.count(None)


# --- reading --------------------------------------------------------------------------------------


def load_mined(folder: str | Path) -> Dataset:
    """Mined rows from their folder."""
    mined_provenance(folder)
    return load_from_disk(str(folder))


def mined_provenance(folder: str | Path) -> dict[str, Any]:
    """How a folder of mined rows was made: settings, sizes, dropped queries."""
    path = Path(folder) / PROVENANCE
    if not path.is_file():
        raise UserError(
            f"There are no mined rows in {folder}; expected a folder that notebook 01_data_mining "
            "made. Run it first (or `make run`)."
        )
    return read_json(path)


def mined_fingerprint(mined: Dataset) -> str:
    """Hash of mined rows' content, the same for the same rows wherever they are stored."""
    content = pd.util.hash_pandas_object(mined.to_pandas().astype("str"), index=False)
    return f"{int(content.sum()) & (2**64 - 1):016x}"
