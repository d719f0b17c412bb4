"""Evaluation: encode a collection once, pool it many ways, search, measure.

Takes a model and a collection; gives result rows and per-query values. Each collection's result is
kept as soon as it is there, so that a killed evaluation goes on where it was.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from ranx import Qrels, Run, evaluate
from tqdm.auto import tqdm

from l2p_utils.collection import Collection, load_collection, subset
from l2p_utils.files import PROVENANCE, UserError, atomic_path, settings_match, versions, write_json
from l2p_utils.model import PooledColBERT, encode, fingerprint, forward_precision, use_threads
from l2p_utils.pooling import CODE, DEFAULT_VARIANT, pool_sweep, stored_variant
from l2p_utils.profile import BASELINE, HUB, Profile, factors_name, plain_name, slug
from l2p_utils.results import write_rows
from l2p_utils.search import Ranking, exact_search, plaid_search

METRICS = ["ndcg@10", "recall@10", "mrr@10"]
TOP_K = 20
BYTES_PER_VALUE = 4  # float32, as exact search holds the vectors


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
    """One way of storing and searching the documents."""

    pool_method: str
    pool_variant: str
    pool_factor: int


def encode_collection(
    model: PooledColBERT, collection: Collection, precision: str = "auto", progress: bool = True
) -> Encoded:
    """Encode queries and documents of a collection, once for all settings."""
    return Encoded(
        collection,
        encode(model, list(collection.queries.values()), True, precision),
        encode(model, list(collection.corpus.values()), False, precision, progress=progress),
    )


def measure(collection: Collection, ranking: Ranking) -> pd.DataFrame:
    """NDCG@10, recall@10 and MRR@10 of each query, through ranx, in [0, 1].

    A query whose id and text are also a document's (ArguAna, Quora) does not find itself: that
    document is taken out of its ranking unless it is judged relevant. Of the hub's collections the
    id alone decides. Judgments below 0 count as 0.

    Returns
    -------
    pandas.DataFrame
        Columns `query_id` and the metrics, in the order of the collection's queries.
    """
    ranked = {
        query: _without_itself(collection, query, found)
        for query, found in zip(collection.queries, ranking.documents, strict=True)
    }
    # Ranks instead of scores: ranx then keeps our order of ties, which is trec_eval's.
    run = {
        query: {document: float(len(found) - i) for i, document in enumerate(found)} or {"": 0.0}
        for query, found in ranked.items()
    }
    qrels = {
        query: {d: max(int(score), 0) for d, score in collection.qrels[query].items()}
        for query in collection.queries
    }
    found = Run.from_dict(run)
    evaluate(Qrels.from_dict(qrels), found, METRICS)
    table = {metric: [found.scores[metric][q] for q in collection.queries] for metric in METRICS}
    return pd.DataFrame({"query_id": list(collection.queries), **table})


def _without_itself(collection: Collection, query: str, found: list[str]) -> list[str]:
    text = collection.corpus.get(query)
    hub = collection.name.startswith(
        HUB
    )  # there one id names one text, as BEIR's own tools have it
    same = text is not None and (hub or collection.queries[query].strip() in text)
    if same and collection.qrels[query].get(query, 0) <= 0:
        return [document for document in found if document != query]
    return found


def pooled_documents(
    encoded: Encoded,
    pool_methods: Iterable[str],
    pool_factors: Iterable[int],
    variants: Sequence[str] = (DEFAULT_VARIANT,),
    use_sklearn: bool = False,
) -> Iterator[tuple[Setting, list[torch.Tensor]]]:
    """Every setting with its document vectors: unpooled first, then each method × factor."""
    yield Setting("none", "", 1), encoded.documents
    factors = [factor for factor in pool_factors if factor > 1]
    for method in pool_methods:
        for variant in variants if method == "hierarchical" else (DEFAULT_VARIANT,):
            pooled = pool_sweep(
                encoded.documents, factors, method, variant=variant, use_sklearn=use_sklearn
            )
            name = stored_variant(method, variant, use_sklearn)
            for factor, documents in pooled.items():
                yield Setting(method, name, factor), documents


def evaluate_collection(
    encoded: Encoded,
    pool_methods: Sequence[str],
    pool_factors: Sequence[int],
    engine: str = "exact",
    variants: Sequence[str] = (DEFAULT_VARIANT,),
    use_sklearn: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure one model on one collection in every setting.

    Parameters
    ----------
    engine
        ``exact``, or ``plaid`` (an index is built for each setting).
    variants, use_sklearn
        See `l2p_utils.pooling.pool`; of hierarchical, and of kmeans.

    Returns
    -------
    tuple of pandas.DataFrame
        One row a setting (the columns of `l2p_utils.results.ROW_COLUMNS` that are known here), and
        one row a setting and query.
    """
    search = {"exact": exact_search, "plaid": plaid_search}[engine]
    rows, per_query = [], []
    settings = pooled_documents(encoded, pool_methods, pool_factors, variants, use_sklearn)
    for setting, documents in settings:
        ranking = search(encoded.queries, documents, encoded.document_ids, TOP_K)
        values = measure(encoded.collection, ranking)
        where = {"collection": encoded.collection.name, "engine": engine, **vars(setting)}
        rows.append({**where, **_measurements(encoded, documents, ranking, values)})
        per_query.append(values.assign(**where))
    return pd.DataFrame(rows), pd.concat(per_query, ignore_index=True)


def _measurements(
    encoded: Encoded, documents: list[torch.Tensor], ranking: Ranking, values: pd.DataFrame
) -> dict[str, object]:
    vectors = float(np.mean([len(document) for document in documents]))
    return {
        "renormalized": False,
        **values[METRICS].mean().round(6).to_dict(),
        "queries": len(encoded.queries),
        "documents": len(documents),
        "vectors_per_document": round(vectors, 3),
        "bytes_per_document": round(vectors * documents[0].shape[1] * BYTES_PER_VALUE, 1),
        "index_bytes": ranking.index_bytes,
        "query_ms": round(1000 * ranking.seconds / max(len(encoded.queries), 1), 3),
    }


def describe_model(profile: Profile, name: str) -> dict[str, object]:
    """The columns of a result row that tell which model it is about.

    A released model's training is what its name says; the baseline at another document length has
    the method "none", which tells it from the baseline itself.
    """
    if name in profile.prepared_names or name == BASELINE:
        found = re.search(r"-([a-z0-9]+)-(span|kmeans|hierarchical)-pf([0-9+-]+)$", name)
        trained = ("", "" if name == BASELINE else "none", "")
        if name.startswith("released-"):
            trained = (f"released:{found[1]}", found[2], found[3]) if found else (name, "none", "")
        columns = ("train_collection", "train_method", "train_factors")
        return {"model": name, **dict(zip(columns, trained, strict=True)), "seed": profile.seed}
    run = profile.find_run(name)
    return {
        "model": name,
        "train_collection": plain_name(run.collection),
        "train_method": run.pool_method,
        "train_factors": factors_name(run.pool_factors),
        "seed": profile.seed if run.seed is None else run.seed,
    }


@dataclass(frozen=True)
class Task:
    """One part of a model's evaluation: a collection, an engine, and the settings to measure."""

    collection: str
    engine: str
    pool_methods: list[str]
    variants: list[str]
    max_queries: int | None


def evaluation_tasks(profile: Profile, name: str) -> list[Task]:
    """What the profile wants measured of the model `name`: a collection's tasks one after another.

    Exact search comes before PLAID.

    Raises
    ------
    UserError
        When the profile has no such model, or gives one PLAID index two numbers of queries.
    """
    if name not in profile.prepared_names and name != BASELINE:
        profile.find_run(name)
    settings = profile.evaluation
    others = settings.baseline_variants if name == BASELINE else []
    variants = list(dict.fromkeys([profile.hierarchical, *others]))
    exact = [
        Task(collection, "exact", list(settings.pool_methods), variants, None)
        for collection in settings.collections
    ]
    plaid = _plaid_tasks(profile, name)
    order = list(dict.fromkeys(task.collection for task in exact + plaid))
    return sorted(exact + plaid, key=lambda task: order.index(task.collection))


def _plaid_tasks(profile: Profile, name: str) -> list[Task]:
    """One task a collection, also where several PLAID jobs name it: it is unpooled only once."""
    jobs = [job for job in profile.plaid if job.model == name]
    tasks = []
    for collection in dict.fromkeys(c for job in jobs for c in job.collections):
        asked = [job for job in jobs if collection in job.collections]
        limits = list(dict.fromkeys(job.max_queries for job in asked))
        if len(limits) > 1:
            raise UserError(
                f"plaid: max_queries is {limits} for the model {name!r} on {collection!r}; "
                "expected one number for all pool methods. Give these jobs the same max_queries."
            )
        methods = [method for job in asked for method in job.pool_methods]
        tasks.append(Task(collection, "plaid", methods, [profile.hierarchical], limits[0]))
    return tasks


def evaluate_model(
    profile: Profile, name: str, model: PooledColBERT, progress: bool = True
) -> pd.DataFrame:
    """Run every evaluation task of one model; write `results/<model>.csv` and the per-query file.

    Finished tasks are reused when model, collection and settings are the same.

    Returns
    -------
    pandas.DataFrame
        The model's result rows.

    Raises
    ------
    UserError
        When the profile has no such model, or its folder no weights.
    """
    use_threads(profile.threads)
    tasks = evaluation_tasks(profile, name)
    identity = {"model": fingerprint(profile.folder / "models" / name), "versions": versions()}
    parts = []
    encoded: dict[str, Encoded] = {}
    with tqdm(tasks, desc=f"Evaluating {name}", disable=not progress) as bar:
        for task in bar:
            bar.set_postfix_str(f"{task.collection}, {task.engine}")
            parts.append(_run_task(profile, name, model, task, identity, encoded))
    model_columns = describe_model(profile, name) | {
        "document_length": model.document_length,
        "profile": profile.name,
        "versions": versions(),
    }
    rows = pd.concat([rows for rows, _ in parts], ignore_index=True).assign(**model_columns)
    per_query = pd.concat([values for _, values in parts], ignore_index=True).assign(model=name)
    write_rows(profile.folder / "results", name, rows, per_query)
    return rows


def _run_task(
    profile: Profile,
    name: str,
    model: PooledColBERT,
    task: Task,
    identity: dict[str, str],
    encoded: dict[str, Encoded],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One task's rows and per-query values, from its folder or made now."""
    limits = profile.evaluation
    everything = subset(load_collection(task.collection), limits.max_queries, limits.max_documents)
    collection = subset(everything, task.max_queries, None)
    if not profile.model.bundled:  # the bundled one has one length, from the beginning
        model.query_length = profile.model.query_length_on(task.collection)
    precision = profile.evaluation.precision or profile.precision
    folder = profile.folder / "evaluated" / name / f"{slug(task.collection)}-{task.engine}"
    settings = {
        **identity,
        **vars(task),
        "code": CODE,
        "pool_factors": list(limits.pool_factors),
        "kmeans": stored_variant("kmeans", use_sklearn=profile.use_sklearn),
        "fingerprint": collection.fingerprint,
        "lengths": [model.query_length, model.document_length],
        "precision": forward_precision(precision, model.device),
    }
    if not settings_match(folder, settings):
        start = time.perf_counter()
        if task.collection not in encoded:
            encoded.clear()  # one collection's vectors at a time
            encoded[task.collection] = encode_collection(model, everything, precision, False)
        encoding = time.perf_counter() - start
        rows, per_query = evaluate_collection(
            _restrict(encoded[task.collection], collection),
            task.pool_methods,
            limits.pool_factors,
            task.engine,
            task.variants,
            profile.use_sklearn,
        )
        seconds = {"encoding": encoding, "all": time.perf_counter() - start}
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            rows.to_csv(temporary / "rows.csv", index=False)
            per_query.to_parquet(temporary / "per_query.parquet", index=False)
            write_json(temporary / PROVENANCE, {"settings": settings, "seconds": seconds})
    rows = pd.read_csv(folder / "rows.csv", keep_default_na=False, na_values={"index_bytes": [""]})
    rows["query_length"] = model.query_length
    return rows, pd.read_parquet(folder / "per_query.parquet")


def _restrict(encoded: Encoded, collection: Collection) -> Encoded:
    """The vectors of the same documents with fewer queries."""
    by_id = dict(zip(encoded.collection.queries, encoded.queries, strict=True))
    return Encoded(collection, [by_id[query] for query in collection.queries], encoded.documents)
