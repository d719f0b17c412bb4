"""Made-up result rows in the shape of a run's, for tests of reading, comparing and drawing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from l2p_utils.results import MEASURES, ROW_COLUMNS, SETTING, write_rows

PER_QUERY_COLUMNS = [*SETTING, "query_id", *MEASURES]
PAPER = Path(__file__).parents[1] / "data" / "paper"
COLLECTIONS = ["docs:scipy", "docs:torch", "docs:numpy", "docs:pandas", "docs:sklearn"]
UNPOOLED = dict(zip(COLLECTIONS, [0.66, 0.58, 0.61, 0.55, 0.70], strict=True))
LOSS = {"none": 0.0, "hierarchical": 0.020, "kmeans": 0.024, "span": 0.045}  # per pool factor
VARIANT = {"none": "", "span": "", "kmeans": "sklearn", "hierarchical": "pylate"}
# (train_collection, train_method, train_factors), as an offline run trains them.
OFFLINE_MODELS = [
    ("", "", ""),
    ("docs:scipy", "none", "1"),
    *[("docs:scipy", "span", factors) for factors in ("2", "3", "1-6")],
    *[("docs:scipy", method, f) for method in ("hierarchical", "kmeans") for f in ("2", "1-6")],
    ("docs:torch", "none", "1"),
    *[("docs:torch", "span", factors) for factors in ("2", "3", "1-6")],
    *[("docs:torch", method, "1-6") for method in ("hierarchical", "kmeans")],
]
QUICK_MODELS = [("", "", ""), ("docs:scipy", "none", "1"), ("docs:scipy", "kmeans", "1-6")]


def model_name(train_collection: str, train_method: str, train_factors: str) -> str:
    """The name that a run gives the model trained so (seed 42)."""
    if not train_collection:
        return "baseline"
    method = "" if train_method == "none" else f"{train_method}-"
    return f"{train_collection.replace(':', '-')}-{method}pf{train_factors}-s42"


def expected_ndcg(model, collection, pool_method, pool_factor) -> float:
    """A smooth invented NDCG@10: training on a method halves that method's loss per factor."""
    trained_on, method, factors = model
    loss = LOSS[pool_method] * (pool_factor - 1) * UNPOOLED[collection]
    gain = 0.0
    if trained_on:
        gain = 0.012 if trained_on == collection else -0.004
        if method == "none":
            loss *= 1.15
        else:
            share = 0.45 if method == pool_method else 0.75
            loss *= share if factors == "1-6" else share + 0.15
    return UNPOOLED[collection] + gain - loss


def make_rows(
    models=OFFLINE_MODELS, queries: int = 60, seed: int = 0, plaid: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Result rows and per-query values of `models` on all five collections.

    Exact search everywhere; PLAID for the baseline and the PF1-6 models' own methods on four.
    """
    generator = np.random.default_rng(seed)
    hardness = {name: generator.normal(0, 0.3, queries) for name in COLLECTIONS}  # shared by models
    rows, per_query = [], []
    for setting in _settings(models, plaid):
        model, collection, engine, method, factor = setting
        center = expected_ndcg(model, collection, method, factor)
        noise = generator.normal(0, 0.05, queries)
        values = np.clip(center + hardness[collection] + noise, 0, 1)
        rows.append(_row(*setting, values))
        key = dict(zip(SETTING, _key(*setting), strict=True))
        ids = [f"q{i:03d}" for i in range(queries)]
        measures = dict(zip(MEASURES, [values, 0.9, 0.7], strict=True))
        per_query.append(pd.DataFrame({**key, "query_id": ids, **measures}))
    return pd.DataFrame(rows)[ROW_COLUMNS], pd.concat(per_query)[PER_QUERY_COLUMNS]


def _settings(models, plaid):
    pooled = [(method, factor) for method in list(LOSS)[1:] for factor in range(2, 7)]
    for model in models:
        for collection in COLLECTIONS:
            for method, factor in [("none", 1), *pooled]:
                yield model, collection, "exact", method, factor
        for collection in COLLECTIONS[:4] if plaid else []:
            if model[2] not in ("", "1-6"):
                continue
            for method, factor in [("none", 1), *pooled]:
                if model[1] in ("", method) or method == "none":
                    yield model, collection, "plaid", method, factor


def _key(model, collection, engine, method, factor):
    return model_name(*model), collection, engine, method, VARIANT[method], factor, False


def _row(model, collection, engine, method, factor, values):
    vectors = 100 / factor
    return {
        **dict(zip(SETTING, _key(model, collection, engine, method, factor), strict=True)),
        **dict(zip(["train_collection", "train_method", "train_factors"], model, strict=True)),
        "train_renormalized": False, "seed": 42, "query_length": 32, "document_length": 128,
        "ndcg@10": values.mean(), "recall@10": 0.9, "mrr@10": 0.7,
        "queries": len(values), "documents": 1000,
        "vectors_per_document": vectors, "bytes_per_document": vectors * 512,
        "index_bytes": int(vectors * 80_000) if engine == "plaid" else None,
        "query_ms": 3.0, "profile": "offline", "versions": "torch=2.11.0;pylate=1.6.0",
    }  # fmt: skip


def write_synthetic(folder, models=OFFLINE_MODELS, **options) -> None:
    """Store made-up rows in `folder`, one file per model, as an evaluation does."""
    rows, per_query = make_rows(models, **options)
    for model in sorted(rows["model"].unique()):
        chosen = rows["model"] == model
        write_rows(folder, model, rows[chosen], per_query[per_query["model"] == model])


def with_seeds_and_lengths(rows, per_query, seeds=(42, 43, 44), unit=0.05, trained=0.03):
    """Rows of three seeds, raw and at unit length, also at PF 8–24 and of models trained so.

    The seeds' baselines, and with them all models, lie .05 apart. Unit length adds `unit` to pooled
    values, and `trained` more to models that were trained with pooling.
    """

    def copies(frame):
        last = frame[frame["pool_factor"] == 6]
        frame = pd.concat([frame, *(last.assign(pool_factor=factor) for factor in (8, 12, 16, 24))])
        scaled = frame[frame["pool_factor"] > 1].assign(renormalized=True)
        gain = unit + trained * scaled["model"].str.contains("pf1-6")
        frame = pd.concat([frame, scaled.assign(**{"ndcg@10": scaled["ndcg@10"] + gain})])
        same = frame[frame["model"].str.contains("pf1-6")]
        return pd.concat([frame, same.assign(model=same["model"].str.replace("-s42", "-unit-s42"))])

    def of_seed(frame, seed):
        names = frame["model"].str.replace("s42", f"s{seed}")
        if seed != seeds[0]:
            names = names.replace("baseline", f"baseline-s{seed}")
        shift = 0.05 * (seed - seeds[0])
        return frame.assign(model=names, **{"ndcg@10": frame["ndcg@10"] + shift})

    rows, per_query = copies(rows), copies(per_query)
    rows["train_renormalized"] = rows["model"].str.contains("-unit-")
    rows = pd.concat([of_seed(rows, seed).assign(seed=seed) for seed in seeds])
    return rows, pd.concat([of_seed(per_query, seed) for seed in seeds])
