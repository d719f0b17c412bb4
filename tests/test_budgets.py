"""How many vectors are kept: budgets of a document and of a collection, and pooling once more."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster import hierarchy

from l2p_utils.files import UserError
from l2p_utils.pooling import (
    HIERARCHICAL_VARIANTS,
    Budget,
    cluster_labels,
    pool,
    pool_padded,
    pool_sweep,
    pool_to_mean,
    pooled_count,
)
from tests.test_pooling import METHODS, documents, equal_lists, groups, scipy_tree, unit_vectors

lengths = st.lists(st.integers(0, 20), min_size=1, max_size=8)


def counts(pooled):
    return [len(document) for document in pooled]


# --- of a document --------------------------------------------------------------------------------


def test_a_fraction_of_a_factor_by_hand():
    document = [unit_vectors(11)]  # ten without the first
    (span,) = pool(document, 1.5, "span", return_sizes=True)[1]
    assert span.tolist() == [1, 2, 1, 2, 1, 2, 1, 1]
    assert counts(pool(document, 1.5, "kmeans")) == [1 + 6]
    assert counts(pool([unit_vectors(4)], 1.5, "hierarchical")) == [1 + 2]  # not 1.999…
    for method in METHODS:
        assert pooled_count(11, 1.5, method) == counts(pool(document, 1.5, method))[0]
        assert equal_lists(pool(document, 2.0, method), pool(document, 2, method))


@pytest.mark.parametrize("most", [2, 5, 12, 13, 40])
@pytest.mark.parametrize("method", METHODS)
def test_a_number_of_vectors_is_met(method, most):
    batch = documents([0, 1, 2, 13, 30], dim=16)
    pooled, sizes = pool(batch, None, method, max_vectors=most, return_sizes=True)
    assert counts(pooled) == [min(len(document), most) for document in batch]
    assert [size.sum() for size in sizes] == [len(document) for document in batch]
    if method == "span":  # as even as can be
        assert all(np.ptp(size[1:]) <= 1 for size in sizes if len(size) > 1)
    padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
    mask = torch.arange(30) < torch.tensor([len(document) for document in batch])[:, None]
    vectors, kept = pool_padded(padded, mask, Budget(max_vectors=most), method)
    assert vectors.shape[1] == min(30, most)
    assert equal_lists([v[k] for v, k in zip(vectors, kept, strict=True)], pooled)


@pytest.mark.parametrize("variant", HIERARCHICAL_VARIANTS)
def test_one_tree_is_cut_by_number_and_height_as_scipy_cuts_it(variant):
    free = unit_vectors(30, seed=3).numpy()
    tree = scipy_tree(free.astype(np.float64), variant)
    heights = [0.0, *(tree[[3, 20], 2] + 1e-9), float(tree[-1, 2]) + 1]
    budgets = [Budget(max_vectors=9), 4, *(Budget(distance_threshold=h) for h in heights)]
    labels = cluster_labels(free, budgets, "hierarchical", 0, variant)
    judges = [hierarchy.fcluster(tree, k, "maxclust") for k in (9, 30 // 4)]
    judges += [hierarchy.fcluster(tree, h, "distance") for h in heights]
    for found, judge in zip(labels.values(), judges, strict=True):
        assert groups(found) == groups(judge)
    document = [torch.from_numpy(free)]
    assert counts(pool(document, None, "hierarchical", 0, distance_threshold=9)) == [1]
    start = cluster_labels(free, [budgets[2]], "kmeans", 0)  # Lloyd's steps keep the number
    euclidean = scipy_tree(free.astype(np.float64), "euclidean")
    assert start[budgets[2]].max() + 1 == hierarchy.fcluster(euclidean, 0.0, "distance").max()


@pytest.mark.parametrize(
    ("options", "method", "message"),
    [
        ({}, "span", "budget is empty"),
        ({"pool_factor": 2, "max_vectors": 4}, "span", "expected one of"),
        ({"max_vectors": 1}, "kmeans", "includes the 1 protected"),
        ({"max_vectors": 2.0}, "kmeans", "max_vectors is 2.0; expected a whole number"),
        ({"max_vectors": 0}, "kmeans", "of at least 1"),
        ({"distance_threshold": -0.1}, "kmeans", "of at least 0"),
        ({"distance_threshold": 0.1}, "span", "span builds none"),
        ({"distance_threshold": 0.1, "use_sklearn": True}, "kmeans", "scikit-learn's"),
        ({"pool_factor": 2, "weights": [[1, 1]]}, "span", r"weights.*\(2,\)"),
        ({"pool_factor": 2, "weights": [[1, 0, 1]]}, "span", "above 0"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(options, method, message):
    with pytest.raises(UserError, match=message):
        pool(documents([3]), options.pop("pool_factor", None), method, **options)


def test_scikit_learn_keeps_a_number_of_vectors_too():
    batch = documents([9, 30, 2])
    assert counts(pool(batch, None, "kmeans", max_vectors=8, use_sklearn=True)) == [8, 8, 2]


# --- of a collection ------------------------------------------------------------------------------


@given(lengths, st.floats(2, 20), st.sampled_from([0, 1]), st.sampled_from(METHODS))
def test_equal_shares_are_those_of_brute_force(sizes, mean, protected, method):
    batch = documents(sizes)
    found = counts(pool_to_mean(batch, mean, method, "equal", protected))
    total = int(mean * len(sizes) + 1e-9)
    assert sum(found) == min(total, sum(sizes))
    cut = [n for n, k in zip(sizes, found, strict=True) if k < n]
    kept = [k for n, k in zip(sizes, found, strict=True) if k < n]
    assert not cut or max(kept) - min(kept) <= 1 and max(found) <= min(kept) + 1


@given(lengths, st.floats(2, 20), st.sampled_from(["kmeans", "hierarchical"]))
def test_in_proportion_no_smaller_factor_would_do(sizes, mean, method):
    found = counts(pool_to_mean(documents(sizes), mean, method, "proportional"))
    total = int(mean * len(sizes) + 1e-9)
    # all factors at which a count changes
    factors = sorted({n / k for n in range(1, 20) for k in range(1, n + 1)} | {20.0})
    fitting = (
        [pooled_count(n, factor, method) for n in sizes]
        for factor in factors
        if sum(pooled_count(n, factor, method) for n in sizes) <= total
    )
    assert found == next(fitting)


@pytest.mark.parametrize("protected", [0, 1])
@pytest.mark.parametrize("method", ["kmeans", "hierarchical"])
def test_one_height_for_all_is_the_trees_cut_there(method, protected):
    batch = documents([12, 1, 0, 30, 7], dim=16)
    pooled, sizes = pool_to_mean(batch, 4.5, method, "threshold", protected, return_sizes=True)
    assert sum(counts(pooled)) == int(4.5 * 5)
    variant = "euclidean" if method == "kmeans" else "pylate"
    trees = [
        scipy_tree(d[protected:].double().numpy(), variant) for d in batch if len(d) > 1 + protected
    ]
    heights = np.sort(np.concatenate([tree[:, 2] for tree in trees]))
    free = sum(max(len(d) - protected, 0) for d in batch)
    merges = free - (int(4.5 * 5) - sum(min(len(d), protected) for d in batch))
    middle = heights[merges - 1 : merges + 1].mean()
    again = pool(batch, None, method, protected, distance_threshold=middle)
    assert equal_lists(pooled, again)
    assert [size.sum() for size in sizes] == counts(batch)


def test_no_clustering_is_done_twice_for_one_height(monkeypatch):
    from l2p_utils import pooling

    grown = []
    trees = pooling.ward_trees
    monkeypatch.setattr(pooling, "ward_trees", lambda *a, **k: grown.append(1) or trees(*a, **k))
    batch = documents([12, 30, 7], dim=16)
    pool_to_mean(batch, 5, "hierarchical", "threshold")
    once = len(grown)
    pool(batch, 2, "hierarchical")
    assert once == len(grown) - once  # as often as for a factor


def test_what_cannot_be_shared_out_is_refused():
    batch = documents([5, 9])
    with pytest.raises(UserError, match=re.escape("need 2 on average: the protected (1 each)")):
        pool_to_mean(batch, 1.5, "span")
    with pytest.raises(UserError, match="'proportional', 'equal', 'threshold'"):
        pool_to_mean(batch, 3, "span", "fair")
    with pytest.raises(UserError, match="span builds none"):
        pool_to_mean(batch, 3, "span", "threshold")
    assert equal_lists(pool_to_mean(batch, 100, "kmeans"), batch)
    assert pool_to_mean([], 3, "kmeans", "threshold") == []


# --- once more ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "variant"), [("span", "pylate"), ("hierarchical", "euclidean")])
def test_pooled_again_as_if_from_the_tokens(method, variant):
    batch = documents([33, 1, 0, 12, 5], dim=16, dtype=torch.float64)
    direct, expected = pool(batch, 6, method, variant=variant, return_sizes=True)
    means, sizes = pool(batch, 2, method, variant=variant, return_sizes=True)
    numbers = counts(direct)
    for i, k in enumerate(numbers):  # the same number of vectors
        options = {"max_vectors": max(k, 2)} if method == "hierarchical" else {}
        factor = None if options else 3
        (again,), (found,) = pool(
            [means[i]], factor, method, variant=variant, weights=[sizes[i]],
            return_sizes=True, **options,
        )  # fmt: skip
        assert found.tolist() == expected[i].tolist()
        torch.testing.assert_close(again, direct[i], atol=1e-12, rtol=0)


def test_weights_of_one_change_nothing_and_kmeans_takes_them():
    batch = documents([20, 9], dim=16)
    ones = [np.ones(len(document)) for document in batch]
    for method in METHODS:
        pairs = zip(pool(batch, 3, method), pool(batch, 3, method, weights=ones), strict=True)
        assert all(torch.allclose(*pair, atol=1e-6) for pair in pairs)
    heavy = [np.where(np.arange(len(o)) == 5, 1e6, 1.0) for o in ones]
    for use_sklearn in (False, True):
        pooled, sizes = pool(
            batch, 3, "kmeans", weights=heavy, use_sklearn=use_sklearn, return_sizes=True
        )
        for document, vectors, size in zip(batch, pooled, sizes, strict=True):
            torch.testing.assert_close(vectors[size.argmax()], document[5], atol=1e-4, rtol=0)


def test_a_sweep_takes_factors_and_budgets_together():
    batch = documents([20, 9])
    budgets = [2, 1.5, Budget(max_vectors=4), Budget(distance_threshold=0.5), 1]
    swept = pool_sweep(batch, budgets, "kmeans")
    assert list(swept) == budgets and equal_lists(swept[1], batch)
    alone = [pool_sweep(batch, [budget], "kmeans")[budget] for budget in budgets]
    assert all(itertools.starmap(equal_lists, zip(swept.values(), alone, strict=True)))
