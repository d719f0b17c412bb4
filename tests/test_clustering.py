"""Clustering of whole batches, judged by SciPy and scikit-learn, and by hand where it is small."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from l2p_utils import pooling
from l2p_utils.clustering import (
    LLOYD_STEPS,
    by_first_occurrence,
    lloyd,
    squared_distances,
    ward_labels,
)
from l2p_utils.docstrings import load_docstrings
from l2p_utils.files import UserError
from l2p_utils.model import load_model
from l2p_utils.pooling import (
    HIERARCHICAL_VARIANTS,
    POOL_METHODS,
    cluster_labels,
    kmeans_settings,
    pool_padded,
    pool_sweep,
    segment_means,
)

CLUSTERED = [("kmeans", "pylate")] + [("hierarchical", v) for v in HIERARCHICAL_VARIANTS]
MANY = 100  # Lloyd's steps: more than any set here takes to stand still

rows = st.lists(st.lists(st.booleans(), min_size=14, max_size=14), min_size=1, max_size=6)
seeds = st.integers(0, 2**32 - 1)


def points(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def square(vectors):
    """Squared distances within each set: (sets, n, dim) → (sets, n, n), exact on a grid."""
    return np.square(vectors[:, :, None] - vectors[:, None]).sum(-1)


def unit(*shape, seed=0, dtype=torch.float32):
    return torch.nn.functional.normalize(torch.from_numpy(points(*shape, seed=seed)), dim=-1).to(
        dtype
    )


def ward(vectors, mask, counts, ties=True, threads=1, same=0.0):
    counts = np.zeros((len(mask), 1), np.int64) + counts
    equal = np.full(mask.shape, same)
    return ward_labels(square(vectors), mask, counts, equal, ties, threads)


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
    """0, 1, 2, … in the order in which the labels first occur."""
    return [list(dict.fromkeys(labels)).index(label) for label in labels]


# --- distances ------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.float64, 1e-13)])
def test_squared_distances_are_scipys(dtype, atol):
    vectors = torch.from_numpy(points(3, 20, 16)).to(dtype)
    ours = squared_distances(vectors)
    assert ours.dtype == dtype and (ours >= 0).all()
    judge = np.stack([cdist(x, x, "sqeuclidean") for x in vectors.double().numpy()])
    np.testing.assert_allclose(ours.numpy(), judge, atol=atol, rtol=1e-5)


def test_squared_distances_of_no_vectors_and_of_no_sets():
    assert squared_distances(torch.ones(2, 0, 4)).shape == (2, 0, 0)
    assert squared_distances(torch.ones(0, 3, 4)).shape == (0, 3, 3)


# --- Ward's trees ---------------------------------------------------------------------------


@given(rows, seeds, st.lists(st.integers(1, 16), min_size=1, max_size=4))
def test_ward_is_scipys_tree_cut(mask, seed, cuts):
    mask = np.array(mask)
    vectors = points(*mask.shape, 5, seed=seed)
    vectors[~mask] = math.nan
    labels = ward(vectors, mask, cuts)
    assert (labels == -1).sum() == (~mask).sum() * len(cuts)
    for i, (cut, k) in itertools.product(range(len(mask)), enumerate(cuts)):
        found = labels[i, cut, mask[i]]
        assert found.tolist() == expected_order(found.tolist())
        if len(found) > 1:
            tree = hierarchy.ward(vectors[i, mask[i]])
            assert groups(found) == groups(hierarchy.fcluster(tree, k, criterion="maxclust"))
        else:
            assert found.tolist() == [0] * len(found)


def test_each_set_is_cut_at_its_own_counts():
    vectors, mask = points(2, 9, 3), np.ones((2, 9), bool)
    both = ward(vectors, mask, [[2, 3], [5, 4]])
    assert (both.max(2) + 1).tolist() == [[2, 3], [5, 4]]
    assert (both[1, 1] == ward(vectors[1:], mask[1:], [4])[0, 0]).all()


def test_float32_distances_give_the_tree_of_float64():
    vectors, mask = points(30, 40, 16), np.ones((30, 40), bool)
    single = ward_labels(
        square(vectors).astype(np.float32), mask, np.full((30, 1), 10), np.zeros((30, 40)), True
    )
    assert (single == ward(vectors, mask, [10])).all()


@pytest.mark.parametrize("sets", [0, 1, 2, 7, 30])
def test_threads_change_nothing(sets):
    vectors, mask = points(sets, 12, 4), points(sets, 12, seed=1) < 1
    trees = [ward(vectors, mask, [2, 4], threads=threads) for threads in (1, 2, 3)]
    assert (trees[0] == trees[1]).all() and (trees[0] == trees[2]).all()
    start = np.where(mask, random_starts(sets, 12, 3, 0) if sets else trees[0][:, 0], -1)
    moved = [improved(vectors, start, mask, threads=threads) for threads in (1, 2, 3)]
    assert (moved[0] == moved[1]).all() and (moved[0] == moved[2]).all()


def test_inputs_are_left_as_they_were():
    distances, mask = square(points(3, 8, 2)), np.ones((3, 8), bool)
    start = random_starts(3, 8, 3, 0)[:, None]
    before = distances.copy(), start.copy()
    ward_labels(distances, mask, np.full((3, 1), 2), np.full((3, 8), 0.5), True)
    lloyd(distances, mask, start, np.zeros((3, 8)))
    assert (distances == before[0]).all() and (start == before[1]).all()


@given(st.integers(2, 7), st.integers(1, 14), st.booleans(), seeds)
def test_tied_pairs_are_all_joined_or_none(pairs, k, ties, seed):
    # pairs at distance 1, each far from the others: `pairs` merges of one height
    far = 100.0 * 2.0 ** np.arange(pairs)
    vectors = np.random.default_rng(seed).permutation(np.concatenate([far, far + 1]))[None, :, None]
    labels = ward(vectors, np.ones((1, 2 * pairs), bool), [k], ties)[0, 0]
    tree = hierarchy.ward(vectors[0])
    judge = len(groups(hierarchy.fcluster(tree, k, criterion="maxclust")))
    assert labels.max() + 1 == (judge if ties else min(k, 2 * pairs))


@given(st.integers(2, 30), st.integers(1, 12), st.sampled_from([np.float32, np.float64]), seeds)
def test_distinct_points_on_a_grid_make_at_most_k_clusters_with_ties_and_exactly_k_without(
    n, k, dtype, seed
):
    grid = np.array(list(itertools.product(range(6), repeat=2)), float)
    vectors = np.random.default_rng(seed).permutation(grid)[None, :n]
    arguments = (
        square(vectors).astype(dtype),
        np.ones((1, n), bool),
        np.array([[k]]),
        np.zeros((1, n)),
    )
    assert ward_labels(*arguments, ties=True).max() + 1 <= k
    assert ward_labels(*arguments, ties=False).max() + 1 == min(k, n)


@pytest.mark.parametrize("ties", [False, True])
def test_vectors_no_farther_apart_than_rounding_are_never_parted(ties):
    vectors = np.array([0.0, 1, 5, 6.5, 9])[None, :, None]
    mask = np.ones((1, 5), bool)
    assert ward(vectors, mask, [4], ties, same=2.25)[0, 0].tolist() == [0, 0, 1, 1, 2]
    assert ward(vectors, mask, [4], ties, same=1.0)[0, 0].tolist() == [0, 0, 1, 2, 3]


# --- Lloyd's steps --------------------------------------------------------------------------


def scikit_learn(vectors, labels):
    """Inertia where Lloyd's steps end, by scikit-learn, from the centres of these labels."""
    start = centres(vectors, labels)
    judge = KMeans(len(start), init=start, n_init=1, algorithm="lloyd", tol=0, max_iter=MANY)
    return judge.fit(vectors).inertia_


@pytest.mark.parametrize("spread", [0.1, 1, 20])
@pytest.mark.parametrize("k", [2, 5, 9])
def test_lloyd_ends_where_scikit_learn_ends(spread, k):
    for seed in range(10):
        generator = np.random.default_rng(seed)
        blobs = 10 * generator.standard_normal((k, 6))
        # every centre begins in the right blob or, for a wide spread, near it
        labels = np.arange(45) % k
        vectors = blobs[labels] + spread * generator.standard_normal((45, 6))
        wrong = generator.random(45) < 0.2
        labels = np.where(wrong, (labels + 1) % k, labels)
        moved = improved(vectors[None], labels[None])[0]
        assert inertia(vectors, moved) == pytest.approx(scikit_learn(vectors, labels), rel=1e-9)


@given(st.integers(1, 9), seeds)
def test_a_step_never_makes_inertia_larger(k, seed):
    (vectors,), start = points(1, 18, 2, seed=seed), random_starts(1, 18, k, seed)
    path = [inertia(vectors, improved(vectors[None], start, steps=s)[0]) for s in range(12)]
    assert path[0] == pytest.approx(inertia(vectors, start[0]))
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(path))


@given(st.integers(1, 9), seeds)
def test_where_lloyd_ends_every_vector_is_with_its_nearest_centre(k, seed):
    (vectors,), start = points(1, 18, 2, seed=seed), random_starts(1, 18, k, seed)
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


def test_sets_that_end_at_different_steps_end_as_they_do_alone():
    vectors, start = points(40, 30, 2), random_starts(40, 30, 6, 0)
    ends = [improved(vectors, start, steps=steps) for steps in range(MANY)]
    needed = {next(s for s in range(MANY) if (ends[s][i] == ends[-1][i]).all()) for i in range(40)}
    assert len(needed) > 3
    alone = [improved(vectors[i : i + 1], start[i : i + 1])[0] for i in range(40)]
    assert (ends[-1] == np.stack(alone)).all()


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


# --- k-means of documents -------------------------------------------------------------------


@given(st.integers(0, 25), st.integers(0, 2), seeds)
def test_kmeans_makes_exactly_k_clusters_of_distinct_vectors(n, protected, seed):
    labels = cluster_labels(unit(n, 6, seed=seed).numpy(), range(1, 8), "kmeans", protected)
    for factor, found in labels.items():
        free = max(n - protected, 0)
        k = free if factor == 1 else max(free // factor, 1) if free else 0
        assert found.tolist() == expected_order(found.tolist())
        assert len(set(found)) == n - free + k


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_kmeans_of_tiny_documents_by_hand(n):
    labels = cluster_labels(np.eye(4)[:n], [1, 2, 3], "kmeans", protected_tokens=0)
    assert labels[1].tolist() == [0, 1, 2][:n]
    assert labels[2].tolist() == labels[3].tolist() == [0] * n


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-12, 1e4])
@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize(
    ("method", "variant"), [("kmeans", "pylate"), ("hierarchical", "euclidean")]
)
def test_one_vector_of_another_length_leaves_the_others_apart(method, variant, first, scale, dtype):
    document = unit(21, 16).numpy().astype(dtype)
    document[first] *= scale
    found = cluster_labels(document, [2], method, 1, variant)[2]
    assert found.max() + 1 == 1 + 10
    tree = hierarchy.fcluster(hierarchy.ward(document[1:].astype(float)), 10, criterion="maxclust")
    if method == "hierarchical":
        assert groups(found[1:]) == groups(tree)


@pytest.mark.parametrize(("method", "variant"), CLUSTERED)
@pytest.mark.parametrize("angle", [0.02, 0.005])
def test_close_but_distinct_vectors_are_parted(angle, method, variant):
    # all within a narrow cone, which is still far wider than rounding in float32
    axis, aside = unit(1, 16, seed=3).numpy(), angle * unit(20, 16, seed=4).numpy()
    document = (axis + aside) / np.linalg.norm(axis + aside, axis=1, keepdims=True)
    found = cluster_labels(document.astype(np.float32), [2, 5], method, 0, variant)
    assert found[2].max() + 1 == 10 and found[5].max() + 1 == 4


def test_kmeans_goes_on_until_it_stands_still():
    batch = torch.stack([unit(120, 4, seed=seed) for seed in range(20)])
    mask = torch.ones(20, 120, dtype=torch.bool)
    labels = pooling.assign(batch, mask, [6], "kmeans", 0)[6].numpy()
    start = ward(batch.numpy(), mask.numpy(), [20], ties=False)[:, 0]
    end = improved(batch.numpy(), start)
    one = improved(batch.numpy(), start, steps=1)
    assert (labels == end).all(1).mean() >= 0.9 > (one == end).all(1).mean()


@pytest.mark.parametrize("size", [6e153, 1e154])
@pytest.mark.parametrize(("method", "variant"), CLUSTERED[:1] + CLUSTERED[-1:])
def test_vectors_whose_trees_would_overflow_are_refused(size, method, variant):
    with pytest.raises(UserError, match="not be clustered|cannot be clustered|length"):
        cluster_labels(size * unit(60, 8, dtype=torch.float64).numpy(), [2], method, 0, variant)


def test_an_array_that_cannot_be_written_to_is_no_matter():
    vectors = unit(8, 4).numpy()
    vectors.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(cluster_labels(vectors, [2], "kmeans")[2]) == 8


def test_kmeans_with_one_cluster_takes_all():
    for n in (4, 7):
        assert not cluster_labels(unit(n, 4).numpy(), [4], "kmeans", 0)[4].any()


@pytest.mark.parametrize("n", [6, 20, 41])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("method", "variant"), CLUSTERED)
def test_duplicated_vectors_are_never_parted_and_make_no_more_clusters_than_asked(
    n, dtype, method, variant
):
    once = unit(n, 128, seed=n).numpy().astype(dtype)
    twice = np.concatenate([once, once])
    most = np.where(np.arange(n)[:, None] < 0.9 * n, once[0], once)  # 90 % are one vector
    for vectors in (twice, most, once[:1].repeat(n, 0)):
        distinct = np.unique(vectors, axis=0, return_inverse=True)[1]
        for factor, found in cluster_labels(vectors, [2, 3, 6], method, 0, variant).items():
            assert len(set(found)) <= max(len(vectors) // factor, 1)
            assert all(len(set(found[distinct == d])) == 1 for d in set(distinct))
    # half of the vectors are doubles: k-means finds the pairs, all of them
    if method == "kmeans":
        assert cluster_labels(twice, [2], method, 0)[2].tolist() == [*range(n), *range(n)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1, 5], ids=["protected", "free", "last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("method", "variant"), CLUSTERED)
def test_what_is_not_finite_is_refused_but_where_it_is_masked(
    method, variant, dtype, position, value
):
    clean = unit(2, 6, 4, dtype=dtype)
    embeddings, mask = clean.clone(), torch.ones(2, 6, dtype=torch.bool)
    embeddings[1, position, 2] = value
    with pytest.raises(UserError, match="NaN or infinite"):
        pool_padded(embeddings, mask, 2, method, 1, variant=variant)
    mask[1, position] = False
    vectors, kept = pool_padded(embeddings, mask, 2, method, 1, variant=variant)
    assert torch.equal(vectors, pool_padded(clean, mask, 2, method, 1, variant=variant)[0])


@pytest.mark.parametrize(("method", "variant"), CLUSTERED)
def test_calls_and_threads_give_the_same_labels(method, variant):
    embeddings, mask = unit(9, 40, 32), torch.from_numpy(points(9, 40, seed=1) < 1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            found.append(pooling.assign(embeddings, mask, [2, 3, 5], method, 1, variant))
    finally:
        torch.set_num_threads(before)
    for factor in (2, 3, 5):
        assert torch.equal(found[0][factor], found[1][factor])
        assert torch.equal(found[0][factor], found[2][factor])


# --- how tight ------------------------------------------------------------------------------


def assert_as_tight_as_scikit_learn(documents):
    factors = range(2, 7)
    ours, theirs = np.zeros(len(factors)), np.zeros(len(factors))
    for document in documents:
        document = document.astype(np.float64)
        labels = cluster_labels(document, factors, "kmeans", protected_tokens=0)
        ours += [inertia(document, labels[factor]) for factor in factors]
        n = len(document)
        theirs += [kmeans_settings(n, max(n // f, 1)).fit(document).inertia_ for f in factors]
    assert (ours <= 1.005 * theirs).all(), ours / theirs


def test_clusters_of_directions_are_as_tight_as_scikit_learns():
    generator = np.random.default_rng(0)
    documents = []
    for _ in range(40):
        n, directions = generator.integers(20, 121), generator.standard_normal((15, 128))
        noise = 0.7 * generator.standard_normal((n, 128))
        vectors = directions[generator.integers(0, 15, n)] + noise
        documents.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    assert_as_tight_as_scikit_learn(documents)


def test_kmeans_is_lloyds_steps_from_wards_cut_and_tighter_than_the_cut():
    vectors = points(10, 60, 8)
    cut = ward(vectors, np.ones((10, 60), bool), [15])[:, 0]
    ends = improved(vectors, cut, steps=LLOYD_STEPS)
    found = [cluster_labels(document, [4], "kmeans", 0)[4] for document in vectors]
    assert (np.stack(found) == ends).all()
    before, after = (sum(map(inertia, vectors, labels)) for labels in (cut, ends))
    assert after < before


def test_clusters_of_an_encoders_tokens_are_as_tight_as_scikit_learns(
    model_folder, tmp_path_factory
):
    model = load_model(model_folder)
    model.document_length = 128
    texts = [e.document for e in load_docstrings("numpy", tmp_path_factory.mktemp("docs"))[:40]]
    documents = model.encode(texts, is_query=False, show_progress_bar=False)
    assert_as_tight_as_scikit_learn(documents)


# --- means ----------------------------------------------------------------------------------


def means_by_loop(embeddings, labels, segments):
    means = torch.zeros(len(embeddings), segments, embeddings.shape[2], dtype=embeddings.dtype)
    kept = torch.zeros(len(embeddings), segments, dtype=torch.bool)
    for i, segment in itertools.product(range(len(embeddings)), range(segments)):
        there = labels[i] == segment
        if there.any():
            means[i, segment] = embeddings[i, there].mean(0)
            kept[i, segment] = True
    return means, kept


segment_labels = st.integers(1, 8).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(-1, 4), min_size=n, max_size=n), min_size=1, max_size=4
    ).map(torch.tensor)
)


@given(segment_labels, st.sampled_from([None, 5, 9]), seeds)
def test_segment_means_are_a_loops(labels, segments, seed):
    embeddings = torch.from_numpy(points(*labels.shape, 3, seed=seed))
    means, kept = segment_means(embeddings, labels, segments)
    expected = means_by_loop(embeddings, labels, segments or int(labels.max()) + 1)
    torch.testing.assert_close(means, expected[0])
    assert torch.equal(kept, expected[1])


def test_segment_means_of_nothing():
    for shape in [(0, 3, 2), (2, 0, 2)]:
        labels = torch.zeros(shape[:2], dtype=torch.int64)
        means, kept = segment_means(torch.ones(shape), labels)
        assert means.shape == (shape[0], 0, 2) and kept.shape == (shape[0], 0)


LABELS = torch.tensor([[0, -1, 2, 0, 2, 2], [-1, -1, 3, 3, -1, 1], [-1] * 6])


def test_gradient_of_segment_means_agrees_with_finite_differences():
    embeddings = torch.from_numpy(points(3, 6, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: segment_means(x, LABELS, 5)[0], [embeddings])


def test_gradient_of_a_token_is_its_segments_divided_by_its_size():
    embeddings = torch.from_numpy(points(3, 6, 2)).requires_grad_()
    means, _ = segment_means(embeddings, LABELS)
    means.backward(gradient := torch.from_numpy(points(*means.shape, seed=1)))
    for i, j in itertools.product(range(3), range(6)):
        label = LABELS[i, j]
        share = gradient[i, label] / (LABELS[i] == label).sum() if label >= 0 else torch.zeros(2)
        torch.testing.assert_close(embeddings.grad[i, j], share, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_means_of_half_precision_are_rounded_only_once(dtype):
    embeddings = (100 + torch.from_numpy(points(2, 3000, 4))).to(dtype)
    labels = torch.arange(6000).view(2, 3000) % 3
    means, _ = segment_means(embeddings, labels)
    judge = means_by_loop(embeddings.double(), labels, 3)[0]
    assert means.dtype == dtype
    tolerance = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(means.double(), judge, atol=0, rtol=tolerance)


@pytest.mark.parametrize("method", ["kmeans", "hierarchical"])
def test_vectors_whose_distances_are_not_finite_are_refused(method):
    vectors = np.zeros((40, 2))
    vectors[:, 0] = np.where(np.arange(40) % 2, 1e200, -1e200)
    with pytest.raises(UserError):
        cluster_labels(vectors, [2], method, 0)


# --- autocast -------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "variant"), [("span", "pylate"), *CLUSTERED])
def test_autocast_changes_nothing(method, variant):
    embeddings, mask = unit(8, 50, 32), torch.ones(8, 50, dtype=torch.bool)
    expected = pool_padded(embeddings, mask, 3, method, variant=variant)
    with torch.autocast("cpu", torch.bfloat16):
        vectors, kept = pool_padded(embeddings, mask, 3, method, variant=variant)
        swept = pool_sweep(list(embeddings), [3], method, variant=variant)[3]
    assert torch.equal(vectors, expected[0]) and torch.equal(kept, expected[1])
    assert torch.equal(torch.cat(swept), vectors[kept])


# --- on a GPU -------------------------------------------------------------------------------


def fake_batch():
    """Embeddings and mask of a GPU without any data: whatever asks for the values raises."""
    mask = torch.empty(3, 10, dtype=torch.bool, device="cuda")
    return torch.empty(3, 10, 4, device="cuda", requires_grad=True), mask


def test_span_asks_the_device_nothing():
    with FakeTensorMode():
        vectors, kept = pool_padded(*fake_batch(), 3, "span")
    assert vectors.is_cuda and vectors.shape == (3, 4, 4) and kept.shape == (3, 4)


def test_kmeans_asks_the_device_nothing_before_its_labels_nor_after(monkeypatch):
    shapes = []

    def labels_of(distances, norms, same, free, factors, kmeans):
        shapes.append([tuple(tensor.shape) for tensor in (distances, norms, same, free)])
        return {factor: torch.zeros_like(free, dtype=torch.int64) for factor in factors}

    monkeypatch.setattr(pooling, "_grow", labels_of)
    with FakeTensorMode():
        vectors, kept = pool_padded(*fake_batch(), 3, "kmeans")
    assert shapes == [[(3, 10, 10), (3, 10), (3, 10), (3, 10)]]
    assert vectors.is_cuda and vectors.shape == (3, 4, 4) and kept.shape == (3, 4)


class Questions(TorchDispatchMode):
    """Notes the operations whose shapes or results depend on values that a device holds."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) else []
        if any(index is not None and index.dtype == torch.bool for index in indices):
            self.found.add(name)
        if name in {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def test_questions_are_noticed():
    with Questions() as questions:
        vector = torch.ones(3)
        vector[vector > 0].sum().item()
    assert questions.found == {"index", "_local_scalar_dense"}


@pytest.mark.parametrize("method", ["span", "kmeans"])
def test_the_path_of_a_gpu_asks_nothing_and_gives_the_same(method, monkeypatch):
    embeddings = unit(4, 20, 8).requires_grad_()
    mask = torch.from_numpy(points(4, 20, seed=1) < 1)
    expected = pool_padded(embeddings, mask, 3, method)
    weights = unit(*expected[0].shape, seed=2)
    (expected_gradient,) = torch.autograd.grad(expected[0], embeddings, weights)
    # every tensor says that it is on a GPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    with Questions() as questions:
        vectors, kept = pool_padded(embeddings, mask, 3, method)
        (gradient,) = torch.autograd.grad(vectors, embeddings, weights)
    assert not questions.found
    torch.testing.assert_close(vectors, expected[0])
    torch.testing.assert_close(gradient, expected_gradient)
    assert torch.equal(kept, expected[1])


@pytest.mark.parametrize("method", ["span", "kmeans"])
def test_a_list_is_asked_about_on_a_gpu_once_a_block(method, monkeypatch):
    batch = [unit(n, 8, seed=n) for n in (9, 4, 20, 0, 7)]
    expected = pool_sweep(batch, [1, 2, 5], method)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    with Questions() as questions:
        found = pool_sweep(batch, [1, 2, 5], method)
    assert not questions.found  # besides the copies to the host
    for factor in expected:
        for one, other in zip(found[factor], expected[factor], strict=True):
            torch.testing.assert_close(one, other)


# --- blocks ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 60), max_size=60), st.integers(1, 40_000))
def test_blocks_hold_every_document_with_tokens_once_and_keep_to_their_size(lengths, limit):
    lengths = np.array(lengths, dtype=np.int64)
    blocks = list(pooling._blocks(lengths, limit))
    placed = np.concatenate([*blocks, np.empty(0, np.int64)])
    assert sorted(placed) == np.flatnonzero(lengths).tolist()
    for block in blocks:
        assert len(block) == 1 or 4 * len(block) * lengths[block].max() ** 2 <= limit


@pytest.mark.parametrize("method", POOL_METHODS)
@pytest.mark.parametrize("limit", [1, 4000, 2**40])
def test_small_blocks_and_one_block_give_the_same_vectors(method, limit, monkeypatch):
    batch = [unit(n, 16, seed=n) for n in [30, 0, 1, 12, 7, 30, 19, 2, 0, 25]]
    expected = pool_sweep(batch, [1, 2, 5], method, renormalize=True)
    monkeypatch.setattr(pooling, "BLOCK_BYTES", limit)
    monkeypatch.setattr(pooling, "SPAN_BLOCK_BYTES", limit)
    found = pool_sweep(batch, [1, 2, 5], method, renormalize=True)
    for factor in (1, 2, 5):
        assert all(map(torch.equal, found[factor], expected[factor]))
