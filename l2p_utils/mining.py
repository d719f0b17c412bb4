"""Data mining: one n-way training row per query, by the paper's candidate rules.

Takes a collection's training split and a teacher; gives a `datasets` set in PyLate's distillation
layout (`query_id, document_ids, scores`, and `labels`), saved with its provenance.

Source: S. Josef, *Learn to Pool* (LIR @ ECIR 2026), section on training data.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, load_from_disk
from tqdm.auto import tqdm

from l2p_utils.collection import Collection, load_collection
from l2p_utils.evaluation import subset, use_threads, versions
from l2p_utils.files import (
    PROVENANCE,
    UserError,
    atomic_path,
    read_json,
    settings_match,
    write_json,
)
from l2p_utils.model import PooledColBERT, build_embedded_model
from l2p_utils.profile import MiningSettings, Profile, slug
from l2p_utils.teacher import EmbeddedTeacher, embedded_teacher

POSITIVE, HARD, MEDIUM, RANDOM = "positive", "hard_negative", "medium_negative", "random_negative"


@dataclass(frozen=True)
class Row:
    """One training row: documents by descending teacher score, each with its label."""

    query_id: str
    document_ids: list[str]
    scores: list[float]
    labels: list[str]


def positives_of(collection: Collection, query_id: str) -> list[str]:
    """Documents judged above 0 that exist, by id."""
    judged = collection.qrels[query_id]
    return sorted(d for d, score in judged.items() if score > 0 and d in collection.corpus)


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
    by_id = sorted(range(len(document_ids)), key=lambda i: document_ids[i], reverse=True)
    order = np.array(by_id)[np.argsort(-similarities[by_id], kind="stable")]
    top = [document_ids[i] for i in order[: settings.hard_candidates]]
    hard = [document for document in top if document not in positives]
    taken = set(hard) | set(positives)
    rest = [document for document in sorted(document_ids) if document not in taken]
    count = min(settings.random_candidates, len(rest))
    return hard, [rest[i] for i in rng.choice(len(rest), count, replace=False)]


def negative_limit(positive_scores: Sequence[float], settings: MiningSettings) -> float:
    """The score above which a negative is dropped as probably relevant.

    95 % of the anchor's score, the best positive's (the paper's text) or the median positive's (the
    authors' script). Below zero, "95 % of" would lie above the anchor and keep negatives that beat
    the positive; there the same distance is taken below it: anchor − 0.05 · |anchor|.
    """
    median = settings.anchor == "median_positive"
    anchor = float(np.median(positive_scores) if median else max(positive_scores))
    return anchor - (1 - settings.threshold) * abs(anchor)


def select_row(
    query_id: str,
    positives: Sequence[str],
    hard: Sequence[str],
    random: Sequence[str],
    scores: Mapping[str, float],
    settings: MiningSettings,
    rng: np.random.Generator,
) -> Row | str:
    """Choose one query's documents, or say why there is no row for it.

    The best-scored positive; the best hard negatives; medium ones drawn from the remaining hard
    ones; random ones. Where a group runs short, the others fill up: the best remaining hard ones
    first (labelled medium), then remaining random ones.

    Parameters
    ----------
    scores
        Teacher score of every candidate.

    Returns
    -------
    Row or str
        The reason when the query is dropped: ``no positive`` or ``too few candidates``.
    """
    if not positives:
        return "no positive"
    limit = negative_limit([scores[document] for document in positives], settings)
    hard_left = _by_score([d for d in hard if scores[d] <= limit], scores)
    random_left = [d for d in random if scores[d] <= limit]
    chosen = {_by_score(positives, scores)[0]: POSITIVE}
    chosen |= dict.fromkeys(hard_left[: settings.hard], HARD)
    chosen |= dict.fromkeys(_draw(hard_left[settings.hard :], settings.medium, rng), MEDIUM)
    chosen |= dict.fromkeys(_draw(random_left, settings.random, rng), RANDOM)
    for document in hard_left + random_left:
        if len(chosen) < settings.n_ways and document not in chosen:
            chosen[document] = MEDIUM if document in hard_left else RANDOM
    if len(chosen) < settings.n_ways:
        return "too few candidates"
    ranked = _by_score(list(chosen), scores, first=next(iter(chosen)))
    return Row(query_id, ranked, [scores[d] for d in ranked], [chosen[d] for d in ranked])


def _by_score(
    documents: Sequence[str], scores: Mapping[str, float], first: str | None = None
) -> list[str]:
    """By descending score; ties: `first`, then by id, descending."""
    return sorted(documents, key=lambda d: (scores[d], d == first, d), reverse=True)


def _draw(documents: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    count = min(count, len(documents))
    return [documents[i] for i in rng.choice(len(documents), count, replace=False)]


def query_rng(seed: int, query_id: str) -> np.random.Generator:
    """A query's own random numbers: the same whatever other queries there are, in any order."""
    digest = hashlib.sha256(query_id.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def mine_rows(
    collection: Collection,
    teacher: EmbeddedTeacher,
    settings: MiningSettings,
    seed: int,
    progress: bool = True,
) -> tuple[list[Row], Counter[str]]:
    """Rows of all training queries, and how many queries were dropped for which reason."""
    rows, dropped = [], Counter()
    bar = tqdm(collection.queries, desc=f"Mining {collection.name}", disable=not progress)
    for number, query_id in enumerate(bar):
        rng = query_rng(seed, query_id)
        positives = positives_of(collection, query_id)
        hard, random = propose(
            teacher.dense[number], teacher.document_ids, positives, settings, rng
        )
        scores = teacher.scores(query_id, [*positives, *hard, *random], positives)
        if settings.teacher_scale == "sigmoid":
            scores = {d: float(1 / (1 + np.exp(-score))) for d, score in scores.items()}
        row = select_row(query_id, positives, hard, random, scores, settings, rng)
        if isinstance(row, Row):
            rows.append(row)
        else:
            dropped[row] += 1
    return rows, dropped


def training_split(name: str, settings: MiningSettings) -> Collection:
    """A collection's training split, limited to `max_queries` and `max_documents` (by id hash)."""
    collection = load_collection(name, split="train", text_only=settings.text_only)
    return subset(collection, settings.max_queries, settings.max_documents)


def untrained_model(profile: Profile) -> PooledColBERT:
    """The embedded model before its warm-up, made once per profile."""
    warm_up = load_collection(profile.warm_up.collection, split="train")
    texts = [warm_up.corpus[d] for d in sorted(warm_up.corpus)[: profile.model.projection_texts]]
    return build_embedded_model(
        profile.folder / "models" / "embedded",
        texts,
        profile.model.query_length,
        profile.model.document_length,
        profile.seed,
    )


def mined_folder(profile: Profile, name: str) -> Path:
    """Where a collection's training rows are kept."""
    return profile.folder / "mined" / slug(name)


def mine(profile: Profile, name: str, progress: bool = True) -> Dataset:
    """Mine a collection for a profile, or reuse what was mined with the same settings.

    Returns
    -------
    datasets.Dataset
        Columns `query_id, document_ids, scores, labels`; saved in `mined_folder` with its
        provenance: models, sizes, seed, and the dropped queries counted by reason.

    Raises
    ------
    UserError
        When no query gives a row.
    """
    use_threads(profile.threads)
    collection = training_split(name, profile.mining)
    folder = mined_folder(profile, name)
    settings = {
        "collection": name,
        "fingerprint": collection.fingerprint,
        "mining": profile.mining.model_dump(),
        "model": profile.model.model_dump(),
        "precision": profile.precision,
        "seed": profile.seed,
        "warm_up_collection": profile.warm_up.collection,
    }
    if not settings_match(folder, settings):
        model = untrained_model(profile)
        teacher = embedded_teacher(collection, model, profile.precision)
        rows, dropped = mine_rows(collection, teacher, profile.mining, profile.seed, progress)
        if not rows:
            raise UserError(
                f"None of the {len(collection.queries)} training queries of {name} gave a row of "
                f"{profile.mining.n_ways} documents ({dict(dropped)}). Ask for fewer negatives "
                "(mining.hard, medium, random), or more candidates."
            )
        _save(rows, dropped, collection, folder, settings)
    return load_mined(folder)


def _save(
    rows: list[Row], dropped: Counter, collection: Collection, folder: Path, settings: dict
) -> None:
    provenance = {
        "settings": settings,
        "miner": "all-MiniLM-L6-v2, cosine",
        "teacher": "mean of min-max-normalised dense cosine and unpooled late interaction "
        "(all-MiniLM-L6-v2), positives lifted to the top",
        "rows": len(rows),
        "documents": len(collection.corpus),
        "documents_without_text": collection.dropped,
        "queries": len(collection.queries),
        "queries_dropped": dict(dropped),
        "labels": dict(Counter(label for row in rows for label in row.labels)),
        "versions": versions(),
    }
    with atomic_path(folder) as temporary:
        Dataset.from_list([vars(row) for row in rows]).save_to_disk(temporary)
        write_json(temporary / PROVENANCE, provenance)


def load_mined(folder: str | Path) -> Dataset:
    """Mined rows from their folder.

    Raises
    ------
    UserError
        When the folder is not there or not whole.
    """
    _check_mined(Path(folder))
    try:
        return load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:  # Arrow's and JSON's among them
        raise UserError(
            f"The mined rows in {folder} are damaged ({error}). Delete the folder and run "
            "01_data_mining again."
        ) from error


def mined_provenance(folder: str | Path) -> dict:
    """How a folder of mined rows was made: settings, sizes, dropped queries.

    Raises
    ------
    UserError
        When the folder is not there or its provenance is damaged.
    """
    _check_mined(Path(folder))
    return read_json(Path(folder) / PROVENANCE)


def _check_mined(folder: Path) -> None:
    if not (folder / PROVENANCE).is_file():
        raise UserError(
            f"There are no mined rows in {folder}; expected a folder that notebook 01_data_mining "
            "made. Run it first (or `make run`)."
        )
