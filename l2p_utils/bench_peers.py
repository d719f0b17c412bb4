"""The poolers that the bench compares: ours, and the libraries that people use.

Each takes lists of (tokens, dim) float32 tensors and gives lists of pooled tensors, with the first
token kept. The libraries' own defaults are used, except where the paper says otherwise.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import fastcluster
import numpy as np
import torch
from fastkmeans import FastKMeans
from pylate import models
from scipy.cluster import hierarchy

from l2p_utils.pooling import pool, pool_sweep

Vectors = list[torch.Tensor]


@dataclass(frozen=True)
class Pooler:
    """One contestant; `sweep` where it pools with several factors at once."""

    method: str
    engine: str
    pool: Callable[[Vectors, int], Vectors]
    sweep: Callable[[Vectors, list[int]], dict[int, Vectors]] | None = None


def poolers() -> list[Pooler]:
    """All contestants that are installed; the reference of each method comes after ours."""
    found = [
        Pooler(
            method,
            "ours",
            functools.partial(pool, pool_method=method),
            functools.partial(pool_sweep, pool_method=method),
        )
        for method in ("span", "kmeans", "hierarchical")
    ]
    found += [
        Pooler("span", "loop over groups", span_loop),
        Pooler(
            "kmeans",
            "scikit-learn",
            functools.partial(pool, pool_method="kmeans", use_sklearn=True),
        ),
        Pooler("kmeans", "fastkmeans", fastkmeans_pool),
        Pooler("hierarchical", "PyLate", pylate_pool),
        _linkage_pooler("SciPy", hierarchy.linkage),
        _linkage_pooler("fastcluster", fastcluster.linkage),
    ]
    if importlib.util.find_spec("colpali_engine"):
        found.append(Pooler("hierarchical", "colpali-engine", colpali_pool))
    return found


def span_loop(documents: Vectors, factor: int) -> Vectors:
    """A Python loop over documents and groups."""
    return [
        torch.cat([document[:1], *(g.mean(0, True) for g in document[1:].split(factor))])
        for document in documents
    ]


def fastkmeans_pool(documents: Vectors, factor: int) -> Vectors:
    """fastkmeans on the CPU, one document at a time."""
    pooled = []
    with _generators_kept():  # its train() seeds torch's, NumPy's and Python's generators
        for document in documents:
            free = document[1:]
            k = max(len(free) // factor, 1)
            fitted = FastKMeans(free.shape[1], k, gpu=False, seed=42)
            fitted.train(free.numpy())
            pooled.append(_means(document, np.asarray(fitted.predict(free.numpy()))))
    return pooled


def pylate_pool(documents: Vectors, factor: int) -> Vectors:
    """PyLate's own step of `ColBERT.encode`."""
    return models.ColBERT.pool_embeddings_hierarchical(None, documents, pool_factor=factor)


def _linkage_pooler(engine: str, linkage: Callable) -> Pooler:
    def pool_one(documents: Vectors, factor: int) -> Vectors:
        return linkage_sweep(documents, [factor], linkage)[factor]

    sweep = functools.partial(linkage_sweep, linkage=linkage)
    return Pooler("hierarchical", engine, pool_one, sweep)


def linkage_sweep(documents: Vectors, factors: list[int], linkage: Callable) -> dict[int, Vectors]:
    """Ward's linkage of the condensed 1 - cosine matrix, a document at a time; SciPy's cuts."""
    pooled: dict[int, Vectors] = {factor: [] for factor in factors}
    for document in documents:
        free = document[1:].numpy()
        distances = np.maximum(1 - free @ free.T, 0)[np.triu_indices(len(free), k=1)]
        tree = linkage(distances, method="ward")
        for factor in factors:
            count = max(len(free) // factor, 1)
            labels = hierarchy.fcluster(tree, count, criterion="maxclust") - 1
            pooled[factor].append(_means(document, labels))
    return pooled


def colpali_pool(documents: Vectors, factor: int) -> Vectors:
    """colpali-engine's pooler, which protects no token; not among the dependencies."""
    pooling = importlib.import_module("colpali_engine.compression.token_pooling")
    free = [document[1:] for document in documents]
    pooled = pooling.HierarchicalTokenPooler().pool_embeddings(free, pool_factor=factor)
    return [torch.cat([d[:1], p]) for d, p in zip(documents, pooled, strict=True)]


def _means(document: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    _, inverse = np.unique(labels, return_inverse=True)
    index = torch.from_numpy(inverse)
    sums = torch.zeros(int(index.max()) + 1, document.shape[1]).index_add_(0, index, document[1:])
    return torch.cat([document[:1], sums / torch.bincount(index)[:, None]])


@contextmanager
def _generators_kept() -> Iterator[None]:
    states = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])
