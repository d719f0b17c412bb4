"""Evaluation: encode a collection once, pool it in every way, search, measure.

`evaluate_model` runs what a profile asks for and keeps the result of each collection and engine as
soon as it is measured, so that an interrupted evaluation resumes there.
"""

from __future__ import annotations

import gzip
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ranx import Qrels, Run, evaluate
from tqdm.auto import tqdm

from l2p_utils.collection import Collection, load_collection, subset
from l2p_utils.files import PROVENANCE, UserError, atomic_path, settings_match, versions, write_json
from l2p_utils.hub import snapshot
from l2p_utils.model import (
    PooledColBERT,
    encode,
    fingerprint,
    forward_precision,
    load_checkpoint,
    load_model,
    readable,
    use_threads,
)
from l2p_utils.pooling import (
    CACHE_VERSION,
    DEFAULT_VARIANT,
    pool_sweep,
    stored_variant,
    unit_length,
)
from l2p_utils.profile import (
    BASELINE,
    HUB,
    Profile,
    factors_name,
    pinned,
    plain_name,
    released_name,
    slug,
)
from l2p_utils.results import RELEASED, write_rows
from l2p_utils.search import Ranking, exact_search, plaid_search

METRICS = ["ndcg@10", "recall@10", "mrr@10"]
TOP_K = 20
BYTES_PER_VALUE = 4  # float32, as exact search holds the vectors
CUT_NOTICE = (
    "{collection}: {cut} of {documents} documents are longer than document_length = "
    "{document_length} word pieces and end there: {lost} % of their word pieces are not read."
)
# What a profile can demand of a checkpoint.
EXPECTED = {"dim", "query_prefix", "document_prefix", "do_query_expansion", "skiplist"}


@dataclass(frozen=True)
class Encoded:
    """A collection's token vectors, unpooled: lists of (tokens, dim) float32 tensors."""

    collection: Collection
    queries: list[torch.Tensor]
    documents: list[torch.Tensor]

    @property
    def document_ids(self) -> list[str]:
        """Ids in the order of `documents`."""
        return list(self.collection.corpus)


@dataclass(frozen=True)
class Setting:
    """One way of pooling the documents."""

    pool_method: str
    pool_variant: str
    pool_factor: int
    renormalized: bool = False  # whether pooled means are scaled to unit length


# --- one collection -------------------------------------------------------------------------------


def encode_collection(
    model: PooledColBERT, collection: Collection, precision: str = "auto", progress: bool = True
) -> Encoded:
    """Encode the queries and documents of a collection, once for all settings."""
    return Encoded(
        collection,
        encode(model, list(collection.queries.values()), True, precision),
        encode(model, list(collection.corpus.values()), False, precision, progress=progress),
    )


def cut_documents(model: PooledColBERT, collection: Collection) -> dict[str, Any]:
    """How much of a collection the model does not read, because documents end at its length.

    ``cut`` is the number of longer documents, ``lost`` the percentage of those documents' word
    pieces that come after the cut.
    """
    kept = readable(model)
    lengths = [
        len(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in collection.corpus.values()
    ]
    long = np.array([length for length in lengths if length > kept])
    return {
        "collection": collection.name,
        "documents": len(lengths),
        "document_length": model.document_length,
        "cut": len(long),
        "lost": round(100 * (1 - kept * len(long) / long.sum()), 1) if len(long) else 0.0,
    }


def measure(collection: Collection, ranking: Ranking) -> pd.DataFrame:
    """NDCG@10, recall@10 and MRR@10 of each query, through ranx, in [0, 1].

    The document that is the query itself (ArguAna, Quora) is ignored, as BEIR does, unless it is
    judged relevant. Judgments below 0 count as 0. Rows are in the order of the queries.
    """
    ranked, qrels = {}, {}
    # Numbers in place of ids: ranx compares padded strings, and long ids take it ten times as long.
    numbers = defaultdict(lambda: str(len(numbers)))
    for query, found in zip(collection.queries, ranking.documents, strict=True):
        found = _without_itself(collection, query, found)
        # Ranks instead of scores: ranx then keeps our order of ties, which is trec_eval's.
        best_first = {numbers[d]: float(len(found) - i) for i, d in enumerate(found)}
        ranked[query] = best_first or {"": 0.0}
        judged = collection.qrels[query].items()
        qrels[query] = {numbers[d]: max(int(score), 0) for d, score in judged}
    run = Run.from_dict(ranked)
    evaluate(Qrels.from_dict(qrels), run, METRICS)
    table = {metric: [run.scores[metric][query] for query in ranked] for metric in METRICS}
    return pd.DataFrame({"query_id": list(ranked), **table})


def run_name(setting: Setting) -> str:
    """A setting as a run's name: ``kmeans-fast-pf6-unit``, ``none-pf1``."""
    parts = [setting.pool_method, setting.pool_variant, f"pf{setting.pool_factor}"]
    return "-".join([part for part in parts if part] + ["unit"] * setting.renormalized)


def write_trec(file: Path, collection: Collection, ranking: Ranking, tag: str) -> None:
    """Write a ranking as a gzipped TREC run: query, ``Q0``, document, rank, score, `tag`.

    trec_eval measures on it what `measure` does; equal rankings give equal bytes. UserError for ids
    with blanks, which the format cannot hold.
    """
    lines = []
    for query, *found in zip(collection.queries, ranking.documents, ranking.scores, strict=True):
        scores = dict(zip(*found, strict=True))
        for rank, document in enumerate(_without_itself(collection, query, found[0]), 1):
            lines.append(f"{query} Q0 {document} {rank} {scores[document]:.9g} {tag}\n")
            if len(lines[-1].split()) != 6:
                raise UserError(
                    f"A TREC run cannot hold ids with blanks: query {query!r}, document "
                    f"{document!r} of {collection.name}. Rename them, or set evaluation.trec_runs "
                    "to false."
                )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def _without_itself(collection: Collection, query: str, found: list[str]) -> list[str]:
    """`found` without the document that has the query's id and text (on the hub: its id)."""
    text = collection.corpus.get(query)
    same_id_is_enough = collection.name.startswith(HUB)
    same = text is not None and (same_id_is_enough or collection.queries[query].strip() in text)
    if same and collection.qrels[query].get(query, 0) <= 0:
        return [document for document in found if document != query]
    return found


def pooled_documents(
    encoded: Encoded,
    pool_methods: Iterable[str],
    pool_factors: Iterable[int],
    variants: Sequence[str] = (DEFAULT_VARIANT,),
    use_sklearn: bool = False,
    means: Sequence[str] = ("raw",),
) -> Iterator[tuple[Setting, list[torch.Tensor]]]:
    """Every setting with its document vectors: unpooled first, then each method × factor.

    `means` are ``raw``, ``unit`` or both, of the same clusters.
    """
    yield Setting("none", "", 1), encoded.documents
    factors = [factor for factor in pool_factors if factor > 1]
    for method in pool_methods:
        for variant in variants if method == "hierarchical" else (DEFAULT_VARIANT,):
            pooled = pool_sweep(
                encoded.documents, factors, method, variant=variant, use_sklearn=use_sklearn
            )
            name = stored_variant(method, variant, use_sklearn)
            for factor, documents in pooled.items():
                if "raw" in means:
                    yield Setting(method, name, factor), documents
                if "unit" in means:
                    yield Setting(method, name, factor, True), [*map(unit_length, documents)]


def evaluate_collection(
    encoded: Encoded,
    pool_methods: Sequence[str],
    pool_factors: Sequence[int],
    engine: str = "exact",
    variants: Sequence[str] = (DEFAULT_VARIANT,),
    use_sklearn: bool = False,
    means: Sequence[str] = ("raw",),
    runs: Path | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure one model on one collection in every setting, by ``exact`` search or ``plaid``.

    `variants` are hierarchical's, `use_sklearn` is kmeans', see `l2p_utils.pooling.pool`. `means`
    are ``raw``, ``unit`` (scaled to unit length) or both. PLAID, which scales by itself, is given
    raw ones and builds an index for each setting. In the folder `runs`, if given, every ranking is
    kept (`write_trec`).

    Returns
    -------
    tuple of pandas.DataFrame
        One row per setting (the columns of `l2p_utils.results.ROW_COLUMNS` that are known here),
        and one row per setting and query.
    """
    search = {"exact": exact_search, "plaid": plaid_search}[engine]
    rows, per_query = [], []
    means = means if engine == "exact" else ["raw"]
    pooled = pooled_documents(encoded, pool_methods, pool_factors, variants, use_sklearn, means)
    for setting, documents in pooled:
        ranking = search(encoded.queries, documents, encoded.document_ids, TOP_K)
        values = measure(encoded.collection, ranking)
        if runs is not None:
            name = run_name(setting)
            write_trec(runs / f"{name}.trec.gz", encoded.collection, ranking, name)
        key = {"collection": encoded.collection.name, "engine": engine, **vars(setting)}
        vectors = float(np.mean([len(document) for document in documents]))
        row = {
            **values[METRICS].mean().round(6).to_dict(),
            "queries": len(encoded.queries),
            "documents": len(documents),
            "vectors_per_document": round(vectors, 3),
            "bytes_per_document": round(vectors * documents[0].shape[1] * BYTES_PER_VALUE, 1),
            "index_bytes": ranking.index_bytes,
            "query_ms": round(1000 * ranking.seconds / max(len(encoded.queries), 1), 3),
        }
        rows.append(key | row)
        per_query.append(values.assign(**key))
    return pd.DataFrame(rows), pd.concat(per_query, ignore_index=True)


# --- a profile's model ----------------------------------------------------------------------------


def describe_model(profile: Profile, name: str) -> dict[str, Any]:
    """The columns of a result row that say which model it is about.

    A released model's training is read from its name. The baseline at other lengths has
    the training method "none", which tells it from the baseline itself.
    """
    seed, renormalized = profile.baselines.get(name, profile.seed), False
    if name in profile.baselines:
        training = ("", "", "")
    elif name in profile.prepared_names:
        found = re.search(r"-([a-z0-9]+)-(span|kmeans|hierarchical)-pf([0-9+-]+)$", name)
        training = (name if name.startswith("released-") else "", "none", "")
        if found:
            training = (RELEASED + found[1], found[2], found[3])
    else:
        run = profile.find_run(name)
        training = (plain_name(run.collection), run.pool_method, factors_name(run.pool_factors))
        seed, renormalized = profile.seed_of(run), run.renormalize
    columns = ("train_collection", "train_method", "train_factors")
    named = {"model": name, **dict(zip(columns, training, strict=True))}
    return named | {"train_renormalized": renormalized, "seed": seed}


def load_evaluated(profile: Profile, name: str) -> PooledColBERT:
    """Load a model that the profile evaluates.

    A trained one comes from its folder. A baseline from the hub, at any lengths, and a released
    model come from their snapshot, with the profile's lengths; a checkpoint that is not
    what the profile expects is refused.
    """
    source, folder = _weights(profile, name)
    if not source:
        return load_model(folder)
    settings = profile.model
    cut = settings.baselines.get(name, settings)
    lengths = cut.query_length, cut.document_length
    return load_checkpoint(folder, source, settings.model_dump(include=EXPECTED), *lengths)


def _weights(profile: Profile, name: str) -> tuple[str, Path]:
    """Where a model's weights are: the hub repository ("" for a trained model) and the folder."""
    if name in profile.prepared_names:
        released = {released_name(source): source for source in profile.released_models}
        base = (profile.model.base, profile.model.revision)
        source, revision = pinned(released[name]) if name in released else base
        return source, Path(snapshot(source, "model", revision).folder)
    if name not in profile.baselines:
        profile.find_run(name)  # refuses an unknown name
    return "", profile.folder / "models" / name


@dataclass(frozen=True)
class Task:
    """One part of a model's evaluation: a collection, an engine, and the settings to measure."""

    collection: str
    engine: str
    pool_methods: list[str]
    variants: list[str]
    max_queries: int | None
    document_length: int | None = None  # where it is not the model's


def evaluation_tasks(profile: Profile, name: str) -> list[Task]:
    """What the profile measures of the model `name`, ordered by collection, exact before PLAID.

    Other document lengths come last. Several PLAID jobs on one collection are one task: its
    unpooled index is built only once.
    """
    settings = profile.evaluation
    others = settings.baseline_variants if name == BASELINE else []
    variants = list(dict.fromkeys([profile.hierarchical, *others]))
    methods = settings.methods(name)
    tasks = [
        Task(collection, "exact", methods, variants, None) for collection in settings.collections
    ]
    jobs = [job for job in profile.plaid if job.model == name]
    for collection in dict.fromkeys(c for job in jobs for c in job.collections):
        asked = [job for job in jobs if collection in job.collections]
        limits = list(dict.fromkeys(job.max_queries for job in asked))
        if len(limits) > 1:
            raise UserError(
                f"plaid: max_queries is {limits} for the model {name!r} on {collection!r}; "
                "expected one number for all pool methods. Give these jobs the same max_queries."
            )
        asked_methods = [method for job in asked for method in job.pool_methods]
        tasks.append(Task(collection, "plaid", asked_methods, [profile.hierarchical], limits[0]))
    order = list(dict.fromkeys(task.collection for task in tasks))
    tasks.sort(key=lambda task: order.index(task.collection))
    return tasks + [
        Task(collection, "exact", methods, [profile.hierarchical], None, job.document_length)
        for job in settings.further
        if any(fnmatchcase(name, pattern) for pattern in job.models)
        for collection in job.collections
    ]


def evaluate_model(
    profile: Profile, name: str, model: PooledColBERT, progress: bool = True
) -> pd.DataFrame:
    """Run every evaluation task of one model; give its result rows and store them in `results/`.

    Those at another document length are stored in ``results/d<length>``. Finished tasks are reused
    when model, collection and settings are the same. Prints of each collection that it encodes how
    many documents the model's length cuts.
    """
    use_threads(profile.threads)
    tasks = evaluation_tasks(profile, name)
    weights = fingerprint(_weights(profile, name)[1])
    parts = []
    with tqdm(total=len(tasks), desc=f"Evaluating {name}", disable=not progress) as bar:
        own = model.document_length
        for (length, collection), group in itertools.groupby(
            tasks, key=lambda task: (task.document_length or own, task.collection)
        ):
            bar.set_postfix_str(collection if length == own else f"{collection}, {length} pieces")
            model.document_length = length
            for rows, values in _run_tasks(profile, name, model, weights, list(group)):
                parts.append((length, rows.assign(document_length=length), values))
                bar.update()
        model.document_length = own
    model_columns = describe_model(profile, name)
    model_columns |= {"profile": profile.name, "versions": versions()}
    for length in dict.fromkeys(length for length, *_ in parts):
        chosen = [part for part in parts if part[0] == length]
        rows = pd.concat([rows for _, rows, _ in chosen], ignore_index=True).assign(**model_columns)
        per_query = pd.concat([values for *_, values in chosen], ignore_index=True)
        folder = profile.folder / "results" / ("" if length == own else f"d{length}")
        write_rows(folder, name, rows, per_query.assign(model=name))
    return pd.concat([rows for _, rows, _ in parts], ignore_index=True).assign(**model_columns)


def _run_tasks(
    profile: Profile, name: str, model: PooledColBERT, weights: str, tasks: list[Task]
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Rows and per-query values of one collection's tasks, read from their folders or measured."""
    limits = profile.evaluation
    source = tasks[0].collection
    whole = subset(load_collection(source), limits.max_queries, limits.max_documents)
    # The bundled model was trained at one length; a baseline at other lengths has its own.
    if not profile.model.bundled and name not in profile.model.baselines:
        model.query_length = profile.model.query_length_on(source)
    precision = limits.precision or profile.precision
    encoded = None
    for task in tasks:
        collection = subset(whole, task.max_queries, None)
        other = f"-d{task.document_length}" if task.document_length else ""
        folder = profile.folder / "evaluated" / name / f"{slug(source)}-{task.engine}{other}"
        settings = {
            "model": weights,
            "versions": versions(),
            **vars(task),
            "code": CACHE_VERSION,
            "pool_factors": list(limits.pool_factors),
            "means": list(limits.means),
            "kmeans": stored_variant("kmeans", use_sklearn=profile.use_sklearn),
            "fingerprint": collection.fingerprint,
            "lengths": [model.query_length, model.document_length],
            "precision": forward_precision(precision, model.device),
        } | ({"trec_runs": True} if limits.trec_runs else {})
        if not settings_match(folder, settings):
            if encoded is None:
                cut = cut_documents(model, whole)
                if cut["cut"]:
                    tqdm.write(CUT_NOTICE.format(**cut))
                encoded = encode_collection(model, whole, precision, progress=False)
            vectors = dict(zip(whole.queries, encoded.queries, strict=True))
            queries = [vectors[query] for query in collection.queries]
            with atomic_path(folder) as temporary:
                temporary.mkdir()
                rows, per_query = evaluate_collection(
                    Encoded(collection, queries, encoded.documents),
                    task.pool_methods,
                    limits.pool_factors,
                    task.engine,
                    task.variants,
                    profile.use_sklearn,
                    limits.means,
                    temporary / "runs" if limits.trec_runs else None,
                )
                rows.to_parquet(temporary / "rows.parquet", index=False)
                per_query.to_parquet(temporary / "per_query.parquet", index=False)
                write_json(temporary / PROVENANCE, {"settings": settings})
        rows = pd.read_parquet(folder / "rows.parquet")
        values = pd.read_parquet(folder / "per_query.parquet")
        yield rows.assign(query_length=model.query_length), values
