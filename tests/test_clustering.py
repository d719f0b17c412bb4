"""Clustering of whole batches, judged by SciPy and scikit-learn, and by hand where it is small."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans

from l2p_utils.clustering import (
    by_first_occurrence,
    cut_trees,
    lloyd,
    squared_distances,
    ward_trees,
)

MANY = 100  # Lloyd's steps: more than any set here takes to stand still

rows = st.lists(st.lists(st.booleans(), min_size=14, max_size=14), min_size=1, max_size=6)
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([np.float32, np.float64])


def points(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def square(vectors):
    """Squared distances within each set: (sets, n, dim) → (sets, n, n), exact on a grid."""
    return np.square(vectors[:, :, None] - vectors[:, None]).sum(-1)


def ward(vectors, mask, counts, ties=True, threads=1, same=0.0, dtype=float):
    counts = np.zeros((len(mask), 1), np.int64) + counts
    equal = np.full(mask.shape, same)
    trees = ward_trees(square(vectors).astype(dtype), mask, equal, threads)
    return cut_trees(trees, mask, counts, ties)


def improved(vectors, labels, mask=None, steps=MANY, threads=1, same=0.0):
    """`lloyd` on one cut of each set; labels (sets, n)."""
    mask = np.ones(labels.shape, bool) if mask is None else mask
    equal = np.full(mask.shape, same)
    return lloyd(square(vectors), mask, labels[:, None], equal, threads, steps)[:, 0]


def groups(labels):
    """A clustering without its names: the set of its groups of vectors."""
    return {frozenset(np.flatnonzero(labels == label)) for label in np.unique(labels)}


def centres(vectors, labels):
    return np.stack([vectors[labels == label].mean(0) for label in range(labels.max() + 1)])


def inertia(vectors, labels):
    return np.square(vectors - centres(vectors, labels)[labels]).sum()


def random_starts(sets, n, k, seed):
    """(sets, n) labels that use every number below k."""
    generator = np.random.default_rng(seed)
    every = np.concatenate([np.arange(k), generator.integers(0, k, n - k)])
    return np.stack([generator.permutation(every) for _ in range(sets)])


def expected_order(labels):
    """The labels renamed to 0, 1, 2, … in the order in which they first occur."""
    return [list(dict.fromkeys(labels)).index(label) for label in labels]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.float64, 1e-13)])
def test_squared_distances_are_scipys(dtype, atol):
    vectors = torch.from_numpy(points(3, 20, 16)).to(dtype)
    ours = squared_distances(vectors)
    assert ours.dtype == dtype and (ours >= 0).all()
    judge = np.stack([cdist(x, x, "sqeuclidean") for x in vectors.double().numpy()])
    np.testing.assert_allclose(ours.numpy(), judge, atol=atol, rtol=1e-5)


@given(rows, seeds, st.lists(st.integers(1, 16), min_size=1, max_size=4), dtypes)
def test_ward_is_scipys_tree_cut(mask, seed, cuts, dtype):
    mask = np.array(mask)
    vectors = points(*mask.shape, 5, seed=seed)
    vectors[~mask] = math.nan
    labels = ward(vectors, mask, cuts, dtype=dtype)
    assert (labels == -1).sum() == (~mask).sum() * len(cuts)
    for i, (cut, k) in itertools.product(range(len(mask)), enumerate(cuts)):
        found = labels[i, cut, mask[i]]
        assert found.tolist() == expected_order(found.tolist())
        if len(found) > 1:
            tree = hierarchy.ward(vectors[i, mask[i]])
            assert groups(found) == groups(hierarchy.fcluster(tree, k, criterion="maxclust"))
        else:
            assert found.tolist() == [0] * len(found)


@pytest.mark.parametrize("sets", [0, 1, 7, 30])
def test_threads_change_nothing(sets):
    vectors, mask = points(sets, 12, 4), points(sets, 12, seed=1) < 1
    trees = [ward(vectors, mask, [2, 4], threads=threads) for threads in (1, 2, 3)]
    assert (trees[0] == trees[1]).all() and (trees[0] == trees[2]).all()
    start = np.where(mask, random_starts(sets, 12, 3, 0) if sets else trees[0][:, 0], -1)
    moved = [improved(vectors, start, mask, threads=threads) for threads in (1, 2, 3)]
    assert (moved[0] == moved[1]).all() and (moved[0] == moved[2]).all()


@given(st.integers(2, 7), st.integers(1, 14), st.booleans(), seeds)
def test_tied_pairs_are_all_joined_or_none(pairs, k, ties, seed):
    # pairs at distance 1, each far from the others: `pairs` merges of one height
    far = 100.0 * 2.0 ** np.arange(pairs)
    vectors = np.random.default_rng(seed).permutation(np.concatenate([far, far + 1]))[None, :, None]
    labels = ward(vectors, np.ones((1, 2 * pairs), bool), [k], ties)[0, 0]
    tree = hierarchy.ward(vectors[0])
    judge = len(groups(hierarchy.fcluster(tree, k, criterion="maxclust")))
    assert labels.max() + 1 == (judge if ties else min(k, 2 * pairs))


@given(st.integers(2, 30), st.integers(1, 12), dtypes, seeds)
def test_distinct_points_on_a_grid_make_at_most_k_clusters_with_ties_and_exactly_k_without(
    n, k, dtype, seed
):
    grid = np.array(list(itertools.product(range(6), repeat=2)), float)
    vectors = np.random.default_rng(seed).permutation(grid)[None, :n]
    with_ties, without = (
        ward(vectors, np.ones((1, n), bool), [k], ties, dtype=dtype).max() + 1
        for ties in (True, False)
    )
    assert with_ties <= k and without == min(k, n)


@pytest.mark.parametrize("ties", [False, True])
def test_vectors_no_farther_apart_than_rounding_are_never_parted(ties):
    vectors = np.array([0.0, 1, 5, 6.5, 9])[None, :, None]
    mask = np.ones((1, 5), bool)
    assert ward(vectors, mask, [4], ties, same=2.25)[0, 0].tolist() == [0, 0, 1, 1, 2]
    assert ward(vectors, mask, [4], ties, same=1.0)[0, 0].tolist() == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("noise", [0.1, 1, 20])
@pytest.mark.parametrize("k", [2, 5, 9])
def test_lloyd_ends_where_scikit_learn_ends(noise, k):
    for seed in range(10):
        generator = np.random.default_rng(seed)
        blobs = 10 * generator.standard_normal((k, 6))
        # every centre begins in the right blob or, for much noise, near it
        labels = np.arange(45) % k
        vectors = blobs[labels] + noise * generator.standard_normal((45, 6))
        wrong = generator.random(45) < 0.2
        labels = np.where(wrong, (labels + 1) % k, labels)
        moved = improved(vectors[None], labels[None])[0]
        start = centres(vectors, labels)
        judge = KMeans(k, init=start, n_init=1, algorithm="lloyd", tol=0, max_iter=MANY)
        assert inertia(vectors, moved) == pytest.approx(judge.fit(vectors).inertia_, rel=1e-9)


@given(st.integers(1, 9), seeds)
def test_no_step_makes_inertia_larger_and_at_the_end_every_vector_is_with_its_nearest_centre(
    k, seed
):
    (vectors,), start = points(1, 18, 2, seed=seed), random_starts(1, 18, k, seed)
    path = [inertia(vectors, improved(vectors[None], start, steps=s)[0]) for s in range(12)]
    assert path[0] == pytest.approx(inertia(vectors, start[0]))
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(path))
    (moved,) = improved(vectors[None], start)
    assert moved.max() + 1 == k  # distinct vectors: no cluster stays empty
    assert moved.tolist() == expected_order(moved.tolist())
    assert (cdist(vectors, centres(vectors, moved)).argmin(1) == moved).all()
    assert (improved(vectors[None], moved[None]) == moved).all()  # it stands still


# Centres are -3, 0 and 3: the middle cluster loses both its points, 3 and -3, to the others.
EMPTIED = np.array([-4.0, -2, -3, 3, 2, 4])[None, :, None]
EMPTIED_START = np.array([[0, 0, 1, 1, 2, 2]])


def test_an_emptied_cluster_takes_the_farthest_vector():
    after_one = improved(EMPTIED, EMPTIED_START, steps=1)
    assert after_one.tolist() == [[0, 1, 1, 2, 2, 2]]  # -4 is first of four at distance 1
    assert (improved(EMPTIED, EMPTIED_START) == after_one).all()


def test_an_emptied_cluster_takes_no_vector_that_is_alone():
    # 4.5 leaves 20, the farthest from its centre, alone: so it is 4.5 that is taken, not 20
    vectors = np.concatenate([np.array([20, 4.5])[None, :, None], EMPTIED], axis=1)
    start = np.concatenate([[[0, 0]], EMPTIED_START + 1], axis=1)
    assert improved(vectors, start, steps=1).tolist() == [[0, 1, 2, 2, 2, 3, 3, 3]]
    assert improved(vectors, start).tolist() == [[0, 1, 2, 2, 2, 3, 3, 1]]


def test_an_emptied_cluster_stays_empty_where_all_is_rounding():
    assert improved(EMPTIED, EMPTIED_START, same=1.0).tolist() == [[0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(("line", "start"), [([0, 2, 3], [0, 0, 1]), ([0, 1, 3], [0, 1, 1])])
def test_no_vector_moves_to_a_centre_that_is_only_as_near(line, start):
    vectors = np.array(line, float)[None, :, None]  # the middle one is 1 away from both centres
    assert improved(vectors, np.array([start]))[0].tolist() == start


@given(rows, seeds, st.integers(1, 4), st.integers(0, 5), st.randoms())
def test_neither_order_nor_padding_nor_masked_vectors_matter(mask, seed, k, extra, random):
    mask = np.array(mask)
    vectors, counts = points(*mask.shape, 3, seed=seed), np.full((len(mask), 1), k)
    expected = improved(vectors, ward(vectors, mask, counts)[:, 0], mask)
    order = random.sample(range(len(mask)), len(mask))
    wide = ((0, 0), (0, extra))
    longer = np.pad(mask[order], wide)
    garbage = np.where(longer[..., None], np.pad(vectors[order], (*wide, (0, 0))), math.nan)
    found = improved(garbage, ward(garbage, longer, counts)[:, 0], longer)
    assert (found == np.pad(expected[order], wide, constant_values=-1)).all()


@given(st.lists(st.integers(0, 9), max_size=20))
def test_names_come_in_order_of_first_occurrence(labels):
    assert by_first_occurrence(np.array(labels, dtype=np.int32)).tolist() == expected_order(labels)


# --- heights and sizes ----------------------------------------------------------------------------


@given(seeds, st.integers(2, 12) | st.sampled_from([33, 64, 65, 150]))
def test_heights_are_scipys(seed, n):
    vectors = points(3, n, 4, seed=seed)
    mask = np.ones((3, n), bool)
    mask[1, 0] = mask[2] = False
    trees = ward_trees(square(vectors), mask, np.zeros(mask.shape))
    for heights, (whole, free) in zip(trees.heights, zip(vectors, mask, strict=True), strict=True):
        members = whole[free]
        expected = hierarchy.linkage(members, "ward")[:, 2] ** 2 if len(members) > 1 else []
        assert heights[: len(expected)] == pytest.approx(expected)
        assert np.isinf(heights[len(expected) :]).all()


@given(seeds, st.integers(3, 14), st.data())
def test_a_tree_of_means_goes_on_where_their_members_stopped(seed, n, data):
    vectors, mask = points(1, n, 3, seed=seed), np.ones((1, n), bool)
    first = data.draw(st.integers(2, n))
    then = data.draw(st.integers(1, first))
    labels, direct = (ward(vectors, mask, k)[0, 0] for k in (first, then))
    means, sizes = centres(vectors[0], labels)[None], np.bincount(labels)[None].astype(float)
    some = np.ones(sizes.shape, bool)
    trees = ward_trees(square(means), some, np.zeros(sizes.shape), sizes=sizes)
    again = cut_trees(trees, some, np.array([[then]]), True)[0, 0]
    assert groups(again[labels]) == groups(direct)
    heights = ward_trees(square(vectors), mask, np.zeros(mask.shape)).heights[0]
    assert trees.heights[0, : first - 1] == pytest.approx(heights[n - first :])


@given(seeds, st.integers(3, 9), st.integers(1, 3))
def test_a_vector_of_size_s_counts_as_s_equal_ones(seed, n, k):
    generator = np.random.default_rng(seed)
    vectors, sizes = points(1, n, 3, seed=seed), generator.integers(1, 5, (1, n)).astype(float)
    start = np.arange(n)[None] % k
    settings = np.ones((1, n), bool), start[:, None], np.zeros((1, n))
    found = lloyd(square(vectors), *settings, steps=MANY, sizes=sizes)[0, 0]
    weighted = np.stack(
        [np.average(vectors[0, start[0] == j], 0, sizes[0, start[0] == j]) for j in range(k)]
    )
    judge = KMeans(k, init=weighted, n_init=1, max_iter=MANY, tol=0).fit(
        vectors[0], sample_weight=sizes[0]
    )
    assert groups(found) == groups(judge.labels_)
