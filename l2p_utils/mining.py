"""Data mining: one n-way training row per query, by the paper's candidate rules.

Takes a collection's training split and a teacher; gives a `datasets` set in PyLate's distillation
layout (`query_id, document_ids, scores`, and `labels`), saved with its provenance. The teacher is
the bundled one, or a reranker from the hub; or the rows are those that the authors released.

Source: S. Josef, *Learn to Pool* (LIR @ ECIR 2026), section on training data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, load_from_disk
from tqdm.auto import tqdm

from l2p_utils.candidates import Candidates, Proposer, find_candidates, positives_of, query_rng
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
from l2p_utils.hub import find_source
from l2p_utils.hub_collections import provenance_of
from l2p_utils.model import use_threads
from l2p_utils.profile import MiningSettings, Profile, pinned, slug
from l2p_utils.released_rows import LABELS, Row, read_released
from l2p_utils.scoring import Scores, check_scored, make_plan, read_scores, score
from l2p_utils.teacher import BundledTeacher, bundled_teacher, untrained_model

POSITIVE, HARD, MEDIUM, RANDOM = LABELS
CHOICE = 1  # random numbers of a query's choice, where its candidates were drawn by another job


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


def mine_rows(
    collection: Collection,
    teacher: BundledTeacher,
    settings: MiningSettings,
    seed: int,
    progress: bool = True,
) -> tuple[list[Row], Counter[str]]:
    """Rows of all training queries, and how many queries were dropped for which reason."""
    rows, dropped = [], Counter()
    proposer = Proposer(teacher.document_ids, settings)
    bar = tqdm(collection.queries, desc=f"Mining {collection.name}", disable=not progress)
    for number, query_id in enumerate(bar):
        rng = query_rng(seed, query_id)
        positives = positives_of(collection, query_id)
        found = proposer.propose(teacher.dense[number], positives, rng)
        candidates = Candidates(query_id, positives, *found)
        scores = teacher.scores(query_id, candidates.documents, positives)
        _keep(_choose(candidates, scores, settings, rng), rows, dropped)
    return rows, dropped


def rows_of_scores(
    collection: Collection,
    candidates: Sequence[Candidates],
    scores: Scores,
    settings: MiningSettings,
    seed: int,
) -> tuple[list[Row], Counter[str]]:
    """As `mine_rows`, from candidates that have their scores.

    The positives keep the scores that the teacher gave them: this one may doubt the judgments.
    """
    rows, dropped = [], Counter()
    by_query = {found.query_id: found for found in candidates}
    for query_id in collection.queries:
        found = by_query.get(query_id, Candidates(query_id, [], [], []))
        rng = query_rng(seed, query_id, CHOICE)
        _keep(_choose(found, scores.get(query_id, {}), settings, rng), rows, dropped)
    return rows, dropped


def _choose(
    candidates: Candidates,
    scores: Mapping[str, float],
    settings: MiningSettings,
    rng: np.random.Generator,
) -> Row | str:
    if settings.teacher_scale == "sigmoid":
        scores = {d: float(1 / (1 + np.exp(-score))) for d, score in scores.items()}
    groups = (candidates.positives, candidates.hard, candidates.random)
    return select_row(candidates.query_id, *groups, scores, settings, rng)


def _keep(row: Row | str, rows: list[Row], dropped: Counter[str]) -> None:
    if isinstance(row, Row):
        rows.append(row)
    else:
        dropped[row] += 1


def mined_folder(profile: Profile, name: str) -> Path:
    """Where a collection's training rows are kept."""
    return profile.folder / "mined" / slug(name)


@dataclass(frozen=True)
class _Made:
    """Rows, why other queries have none, and what the provenance says beside the sizes."""

    rows: list[Row]
    dropped: Counter[str]
    provenance: dict[str, Any] = field(default_factory=dict)


def mine(profile: Profile, name: str, progress: bool = True) -> Dataset:
    """Mine a collection for a profile, or reuse what was mined with the same settings.

    A reranker's scores that jobs of `l2p_utils.scoring` made are used; what is missing is scored
    here, or refused where the profile has GPUs and none is here. With `training_data: released` the
    authors' rows are taken instead.

    Returns
    -------
    datasets.Dataset
        Columns `query_id, document_ids, scores, labels`; saved in `mined_folder` with its
        provenance: models, sizes, seed, and the dropped queries counted by reason.

    Raises
    ------
    UserError
        When no query gives a row, or a model or data set is not what it should be.
    """
    use_threads(profile.threads)
    collection = profile_split(profile, name)
    folder = mined_folder(profile, name)
    if profile.training_data == "released":
        way = _released
    else:
        way = _bundled if profile.scoring.teacher == "bundled" else _reranked
    settings, make = way(profile, collection, progress)
    if not settings_match(folder, settings):
        made = make()
        if not made.rows:
            raise UserError(
                f"None of the {len(collection.queries)} training queries of {name} gave a row of "
                f"{profile.mining.n_ways} documents ({dict(made.dropped)}). Ask for fewer "
                "negatives (mining.hard, medium, random), or more candidates."
            )
        _save(made, collection, folder, settings)
    return load_mined(folder)


def _bundled(
    profile: Profile, collection: Collection, progress: bool
) -> tuple[dict[str, Any], Callable[[], _Made]]:
    """The settings of rows by the bundled teacher, and how to make them."""
    settings = {
        "collection": collection.name,
        "fingerprint": collection.fingerprint,
        "mining": profile.mining.model_dump(),
        "model": profile.model.model_dump(),
        "precision": profile.precision,
        "seed": profile.seed,
        "adaptation_collection": profile.adaptation.collection if profile.adaptation else None,
    }

    def make() -> _Made:
        model = untrained_model(profile)
        teacher = bundled_teacher(collection, model, profile.precision, progress)
        rows, dropped = mine_rows(collection, teacher, profile.mining, profile.seed, progress)
        by = {
            "miner": "all-MiniLM-L6-v2, cosine",
            "teacher": "mean of min-max-normalised dense cosine and unpooled late interaction "
            "(all-MiniLM-L6-v2), positives lifted to the top",
        }
        return _Made(rows, dropped, by)

    return settings, make


def _reranked(
    profile: Profile, collection: Collection, progress: bool
) -> tuple[dict[str, Any], Callable[[], _Made]]:
    """The settings of rows by a miner and a reranker from the hub, and how to make them."""
    scoring = profile.scoring
    miner = find_source(scoring.miner, scoring.miner_revision)
    teacher = find_source(scoring.teacher, scoring.teacher_revision)
    settings = {
        "collection": collection.name,
        "fingerprint": collection.fingerprint,
        "mining": profile.mining.model_dump(),
        "miner": [miner.name, miner.version],
        "teacher": [teacher.name, teacher.version],
        "max_length": scoring.max_length,
        "seed": profile.seed,
    }

    def make() -> _Made:
        candidates = find_candidates(profile, collection, progress)
        plan = make_plan(profile, collection, candidates)
        check_scored(profile, plan)
        score(profile, plan, progress=progress)
        scores, made = read_scores(plan)
        by = {
            "miner": f"{miner}, cosine",
            "teacher": f'{teacher}, logit of "Yes", {scoring.max_length} tokens',
            "source": provenance_of(collection.name),
            "pairs_scored": sum(map(len, scores.values())),
            "chunks_scored_in": made,
        }
        mined = rows_of_scores(collection, candidates, scores, profile.mining, profile.seed)
        return _Made(*mined, by)

    return settings, make


def _released(
    profile: Profile, collection: Collection, progress: bool
) -> tuple[dict[str, Any], Callable[[], _Made]]:
    """The settings of released rows, and how to get them."""
    name, rules = collection.name, profile.mining
    if name not in profile.released_rows:
        raise UserError(
            f"training_data: the profile {profile.name!r} has no released_rows of {name!r}; it has "
            f"{sorted(profile.released_rows) or 'none'}."
        )
    if rules.max_documents is not None:
        raise UserError(
            "mining.max_documents leaves out documents that released rows need; expected none with "
            "training_data: released."
        )
    repository, revision = pinned(profile.released_rows[name])
    released = find_source(repository, revision, "dataset")
    settings = {
        "collection": name,
        "fingerprint": collection.fingerprint,
        "released": [released.name, released.version],
        "n_ways": rules.n_ways,
    }

    def make() -> _Made:
        whole = load_collection(name, "train", rules.text_only, carve_dev=False)
        held_out = set(whole.queries) - set(collection.queries)
        found = read_released(released.folder, released.name, whole, held_out, rules.n_ways)
        by = {"miner": f"released: {released}", "teacher": f"released: {released}"}
        place = {"repository": released.name, "revision": revision, "commit": released.version}
        return _Made(*found, by | {"released": place, "source": provenance_of(name)})

    return settings, make


def _save(made: _Made, collection: Collection, folder: Path, settings: dict[str, Any]) -> None:
    provenance = {
        "settings": settings,
        **made.provenance,
        "rows": len(made.rows),
        "documents": len(collection.corpus),
        "documents_without_text": collection.dropped,
        "queries": len(collection.queries),
        "queries_dropped": dict(made.dropped),
        "labels": dict(Counter(label for row in made.rows for label in row.labels)),
        "versions": versions(),
    }
    with atomic_path(folder) as temporary:
        Dataset.from_list([vars(row) for row in made.rows]).save_to_disk(temporary)
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


def mined_fingerprint(mined: Dataset) -> str:
    """Hash of mined rows' content, the same for the same rows wherever they are stored."""
    content = pd.util.hash_pandas_object(mined.to_pandas().astype("str"), index=False)
    return f"{int(content.sum()) & (2**64 - 1):016x}"
