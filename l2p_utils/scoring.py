"""Scoring: the teacher's score of every candidate, by as many jobs as there are, at any pace.

Takes a profile and a collection; gives scores in chunks of some queries, each written whole. Chunk
i belongs to shard i % shards, and batches are made within a chunk: any number of jobs gives the
same scores, and a killed one loses no more than a chunk.
``python -m l2p_utils.scoring --profile paper --collection beir:scifact --shard 0``
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from l2p_utils.candidates import Candidates, find_candidates, fingerprint_of
from l2p_utils.collection import Collection, profile_split
from l2p_utils.files import PROVENANCE, UserError, atomic_path, settings_match, versions, write_json
from l2p_utils.hub import Source, find_source
from l2p_utils.model import use_threads
from l2p_utils.profile import Profile, load_profile, slug
from l2p_utils.teacher import RerankerTeacher, load_reranker, scoring_dtype

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Plan:
    """What there is to score: chunks of queries, and the folder of their scores.

    The folder's name is a hash of the settings: jobs of other settings cannot mix with these.
    """

    collection: Collection
    chunks: list[list[Candidates]]
    teacher: Source
    folder: Path
    settings: dict[str, Any]

    def path(self, number: int) -> Path:
        """The file of one chunk's scores."""
        return self.folder / f"chunk-{number:05d}.parquet"

    def missing(self, numbers: range) -> list[int]:
        """Which of these chunks have no scores yet."""
        return [number for number in numbers if not self.path(number).is_file()]


def make_plan(profile: Profile, collection: Collection, candidates: list[Candidates]) -> Plan:
    """Divide a collection's candidates into chunks; no model is loaded."""
    scoring = profile.scoring
    teacher = find_source(scoring.teacher, scoring.teacher_revision)
    settings = {
        "collection": collection.name,
        "fingerprint": collection.fingerprint,
        "candidates": fingerprint_of(candidates),
        "teacher": [teacher.name, teacher.version],
        "max_length": scoring.max_length,
        "checkpoint_queries": scoring.checkpoint_queries,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = profile.folder / "mined" / f"{slug(collection.name)}.scores" / key
    size = scoring.checkpoint_queries
    chunks = [candidates[start : start + size] for start in range(0, len(candidates), size)]
    return Plan(collection, chunks, teacher, folder, settings)


def score(profile: Profile, plan: Plan, shard: int | None = None, progress: bool = True) -> int:
    """Score what is missing of one shard's chunks, or of all.

    Returns
    -------
    int
        How many chunks were scored now.

    Raises
    ------
    UserError
        When the profile has no such shard, or the teacher cannot be loaded.
    """
    mine = _chunks_of(profile, plan, shard)
    missing = plan.missing(mine)
    if not missing:
        return 0
    use_threads(profile.threads)
    if not settings_match(plan.folder, plan.settings):
        write_json(plan.folder / PROVENANCE, {"settings": plan.settings})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = scoring_dtype(profile.precision, device)
    teacher = load_reranker(plan.teacher.folder, profile.scoring.max_length, device, dtype)
    part = "" if shard is None else f", shard {shard} of {profile.scoring.shards}"
    name = f"Scoring {plan.collection.name}{part}"
    pairs = {number: sum(len(c.documents) for c in plan.chunks[number]) for number in mine}
    bar = tqdm(total=sum(pairs.values()), desc=name, unit="pair", disable=not progress)
    done = 0
    with bar:
        bar.update(sum(pairs[number] for number in mine if number not in missing))
        for number in missing:
            if not plan.path(number).is_file():  # another job may have scored it meanwhile
                _score_chunk(plan, number, teacher, profile.scoring.batch_size)
                done += 1
            bar.update(pairs[number])
    return done


def _chunks_of(profile: Profile, plan: Plan, shard: int | None) -> range:
    shards = profile.scoring.shards
    if shard is None:
        return range(len(plan.chunks))
    if not 0 <= shard < shards:
        raise UserError(
            f"There is no shard {shard}: the profile {profile.name!r} has {shards}, numbered from "
            f"0 to {shards - 1} (scoring.shards)."
        )
    return range(shard, len(plan.chunks), shards)


def _score_chunk(plan: Plan, number: int, teacher: RerankerTeacher, batch_size: int) -> None:
    queries, corpus = plan.collection.queries, plan.collection.corpus
    asked = [(c.query_id, document) for c in plan.chunks[number] for document in c.documents]
    pairs = [(queries[query], corpus[document]) for query, document in asked]
    found = teacher.scores(pairs, batch_size)
    made = f"{teacher.model.dtype} on {teacher.model.device.type}, {versions()}"
    table = pa.table(
        {
            "query_id": [query for query, _ in asked],
            "document_id": [document for _, document in asked],
            "score": pa.array(found, pa.float64()),
        }
    )
    with atomic_path(plan.path(number)) as temporary:
        pq.write_table(table.replace_schema_metadata({"made": made}), temporary)


def check_scored(profile: Profile, plan: Plan) -> None:
    """Refuse missing scores where a GPU is expected for the teacher and none is here.

    Raises
    ------
    UserError
        With how to have them scored.
    """
    missing = plan.missing(range(len(plan.chunks)))
    if missing and profile.gpu and not torch.cuda.is_available():
        name = plan.collection.name
        raise UserError(
            f"{len(missing)} of the {len(plan.chunks)} chunks of the teacher's scores of {name} "
            f"are missing in {plan.folder}, and there is no GPU here to run the teacher on (`gpu: "
            f"true` in the profile). Delete {profile.folder}/logs/scored--{slug(name)}--* and "
            "start the run again, or run `python -m l2p_utils.scoring --profile "
            f"{profile.name} --collection {name}` where you want them scored."
        )


def read_scores(plan: Plan) -> tuple[Scores, dict[str, int]]:
    """Scores of all chunks: query id → document id → score; and in how many chunks made how.

    Raises
    ------
    UserError
        When a chunk is missing, damaged, or holds other documents than its candidates.
    """
    scores: Scores = {}
    made: Counter[str] = Counter()
    for number, chunk in enumerate(plan.chunks):
        path = plan.path(number)
        try:
            table = pq.read_table(path)
            columns = [table[name].to_pylist() for name in ("query_id", "document_id", "score")]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"The scores in {path} are missing or damaged ({error}). Delete that file and run "
                "again: only this part is scored anew."
            ) from error
        expected = [(c.query_id, document) for c in chunk for document in c.documents]
        if list(zip(*columns[:2], strict=True)) != expected:
            raise UserError(f"The scores in {path} are of other documents. Delete it, run again.")
        for query, document, value in zip(*columns, strict=True):
            scores.setdefault(query, {})[document] = value
        made[(table.schema.metadata or {}).get(b"made", b"unknown").decode()] += 1
    return scores, dict(made)


def check_reranked(profile: Profile) -> None:
    """Refuse a profile that has nothing to score in this way.

    Raises
    ------
    UserError
    """
    if profile.training_data == "released" or profile.scoring.teacher == "bundled":
        why = (
            "takes released rows (training_data: released)"
            if profile.training_data == "released"
            else "uses the bundled teacher (scoring.teacher: bundled)"
        )
        raise UserError(
            f"The profile {profile.name!r} {why}: notebook 01_data_mining does all. Expected a "
            "profile with a reranker from the hub, like `paper`."
        )


def main(arguments: list[str] | None = None) -> int:
    """Score one shard of a collection's candidates; run it again to go on after a kill."""
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.scoring", description=main.__doc__)
    parser.add_argument("--profile", required=True, help="a profile's name or YAML file")
    parser.add_argument("--collection", required=True, help="a training collection")
    parser.add_argument("--shard", type=int, default=None, help="from 0; default: all of them")
    options = parser.parse_args(arguments)
    try:
        profile = load_profile(options.profile)
        check_reranked(profile)
        use_threads(profile.threads)
        collection = profile_split(profile, options.collection)
        plan = make_plan(profile, collection, find_candidates(profile, collection))
        done = score(profile, plan, options.shard)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    there = len(plan.chunks) - len(plan.missing(range(len(plan.chunks))))
    print(f"Scored {done} chunks now; {there} of {len(plan.chunks)} are in {plan.folder}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
