"""Result rows as a run of the paper profile leaves them, made from the paper's own numbers.

Ours are the paper's plus a noise that a test chooses, so that it can count by hand what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from l2p_utils.paper import PAPER_BASELINES, read_paper
from l2p_utils.results import (
    MEASURES,
    ROW_COLUMNS,
    SETTING,
    validate_per_query,
    validate_rows,
)
from tests.synthetic import PAPER, VARIANT

# (engine, data set, (trained on, method, factors), pool method, factor) → added NDCG@10.
Key = tuple[str, str, tuple[str, str, str], str, int]
Noise = Callable[[Key, int], float]
# Curves that were drawn unrounded come first: a cell printed twice has the exacter value.
ORDER = ["figure1", "figure4", "figure2", "figure3", "table2", "table1", "table3", "table4"]
SPREAD = np.array([0.02, -0.02, 0.01, -0.01])  # of the queries around the mean


def paper_cells(paper: pd.DataFrame | None = None) -> dict[Key, float]:
    """NDCG@10 of every cell that the paper prints, once: percentages times its baselines."""
    paper = read_paper(PAPER) if paper is None else paper
    cells: dict[Key, float] = {}
    for exhibit in ORDER:
        engine = "plaid" if exhibit == "figure4" else "exact"
        for line in paper[paper["exhibit"] == exhibit].itertuples():
            if line.dataset == "Average":
                continue
            model = line.trained_on, line.train_method, line.train_factors
            method = "none" if line.pool_factor == 1 else line.pool_method
            key = engine, line.dataset, model, method, int(line.pool_factor)
            cells.setdefault(key, line.relative / 100 * PAPER_BASELINES[engine][line.dataset])
    return cells


def no_noise(_: Key, __: int) -> float:
    """Ours are the paper's."""
    return 0.0


def hub_rows(noise: Noise = no_noise, extras: bool = True) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and per-query values (four queries) of the paper's whole grid.

    SciFact's PF1-6 models have two seeds, 42 and 43. With `extras` also what no curve may take in:
    the baseline at 180 tokens, twice, and two released checkpoints, all with an NDCG@10 of .05.
    """
    rows, values = [], []
    for setting, training, ndcg in _measurements(noise, extras):
        queries = np.clip(ndcg + SPREAD, 0, 1)
        key = dict(zip(SETTING, setting, strict=True))
        rows.append(_row(key, training, queries))
        ids = ["q0", "q1", "q2", "q3"]
        values += [(*setting, *pair, 0.9, 0.7) for pair in zip(ids, queries, strict=True)]
    per_query = pd.DataFrame(values, columns=[*SETTING, "query_id", *MEASURES])
    return validate_rows(pd.DataFrame(rows)[ROW_COLUMNS]), validate_per_query(per_query)


def _measurements(noise: Noise, extras: bool) -> Iterator[tuple]:
    for key, ndcg in paper_cells().items():
        engine, dataset, model, method, factor = key
        two = model[0] == "SciFact" and model[2] == "1-6"
        for seed in (42, 43) if two else (42,):
            setting = _setting(_name(model, seed), engine, dataset, method, factor)
            yield setting, (*_training(model), seed, 300), ndcg + noise(key, seed)
        if extras and not model[0]:
            others = {
                "baseline-d180-q32": ("", "none", "", 42, 180),
                "baseline-d180-q48": ("", "none", "", 42, 180),
                "released-scifact": ("released:scifact", "kmeans", "1-6", 7, 300),
                "released-fiqa": ("released:fiqa", "kmeans", "1-6", 8, 300),
            }
            for name, training in others.items():
                yield _setting(name, engine, dataset, method, factor), training, 0.05


def _name(model: tuple[str, str, str], seed: int) -> str:
    dataset, method, factors = model
    if not dataset:
        return "baseline"
    method = "" if method == "none" else f"{method}-"
    return f"beir-{dataset.lower()}-{method}pf{factors}-s{seed}"


def _training(model: tuple[str, str, str]) -> tuple[str, str, str]:
    return (f"beir:{model[0].lower()}" if model[0] else "", *model[1:])


def _setting(name, engine, dataset, method, factor):
    prefix = {"exact": "nano", "plaid": "beir"}[engine]
    return name, f"{prefix}:{dataset.lower()}", engine, method, VARIANT[method], factor, False


def _row(key, training, queries):
    vectors = 200 / key["pool_factor"]
    named = ["train_collection", "train_method", "train_factors", "seed", "document_length"]
    return {
        **key, **dict(zip(named, training, strict=True)),
        "train_renormalized": False, "query_length": 48,
        "ndcg@10": queries.mean(), "recall@10": 0.9, "mrr@10": 0.7,
        "queries": len(queries), "documents": 3000,
        "vectors_per_document": vectors, "bytes_per_document": vectors * 128,
        "index_bytes": int(vectors * 80_000) if key["engine"] == "plaid" else None,
        "query_ms": 3.0, "profile": "paper", "versions": "torch=2.11.0;pylate=1.6.0",
    }  # fmt: skip
