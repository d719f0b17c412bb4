"""Pooling, judged by scikit-learn, SciPy and PyLate, and by hand where the answer is small."""

import itertools
import math
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pylate.models import ColBERT
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist
from torch.utils._python_dispatch import TorchDispatchMode

from l2p_utils import pooling
from l2p_utils.files import UserError
from l2p_utils.pooling import (
    HIERARCHICAL_VARIANTS,
    POOL_METHODS,
    blocks,
    cluster_labels,
    kmeans_settings,
    pool,
    pool_padded,
    pool_sweep,
    pooled_count,
    token_vectors,
)

METHODS = ["span", "kmeans", "hierarchical"]
SETTINGS = [("span", "pylate"), ("kmeans", "pylate")] + [
    ("hierarchical", variant) for variant in HIERARCHICAL_VARIANTS
]


def unit_vectors(tokens, dim=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=-1).to(dtype)


def documents(lengths, dim=8, dtype=torch.float32):
    return [unit_vectors(n, dim, seed, dtype) for seed, n in enumerate(lengths)]


def groups(labels):
    """A clustering without its names: the set of its groups of tokens."""
    return {frozenset(np.flatnonzero(labels == label)) for label in np.unique(labels)}


def same_vectors(ours, theirs, atol=1e-6):
    """Whether two lists of vectors are equal but for their order."""
    ours, theirs = (sorted(np.asarray(x, dtype=np.float64).tolist()) for x in (ours, theirs))
    return len(ours) == len(theirs) and np.allclose(ours, theirs, atol=atol)


def equal_lists(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_span_by_hand():
    document = torch.tensor([[9.0, 9.0], [1, 0], [3, 0], [0, 2], [0, 4], [5, 5]])
    (pooled,) = pool([document], 2, "span", protected_tokens=1)
    assert pooled.tolist() == [[9, 9], [2, 0], [0, 3], [5, 5]]
    (pooled,) = pool([document], 4, "span", protected_tokens=0)
    assert pooled.tolist() == [[3.25, 2.75], [2.5, 4.5]]


@pytest.mark.parametrize(("method", "variant"), SETTINGS[1:])
def test_clear_clusters_are_found_and_come_in_order_of_first_occurrence(method, variant):
    east, north, west = torch.eye(3)
    document = torch.stack([north, east, north, west, east, west])
    (pooled,) = pool([document], 2, method, 0, variant=variant)
    torch.testing.assert_close(pooled, torch.stack([north, east, west]))


@pytest.mark.parametrize("tokens", [2, 5, 17, 60])
@pytest.mark.parametrize("factor", [2, 3, 6])
def test_kmeans_is_scikit_learns_with_the_papers_settings(tokens, factor):
    free = unit_vectors(tokens, dim=16, seed=tokens).numpy().astype(np.float64)
    judge = kmeans_settings(tokens, max(tokens // factor, 1)).fit(free)
    labels = cluster_labels(free, [factor], "kmeans", protected_tokens=0, use_sklearn=True)[factor]
    assert groups(labels) == groups(judge.labels_)


@pytest.mark.parametrize(
    ("n", "k", "iterations"), [(10, 10, 20), (10, 5, 20), (12, 3, 24), (300, 1, 50), (300, 3, 50)]
)
def test_kmeans_settings_by_hand(n, k, iterations):
    papers = {"n_clusters": k, "n_init": 1, "init": "k-means++", "tol": 1e-4, "random_state": 42}
    papers["max_iter"] = iterations  # clamp(12 + ceil(6 log2(max(n/k, 2))), 20, 50)
    assert papers.items() <= kmeans_settings(n, k).get_params().items()


def scipy_tree(vectors, variant):
    """Ward's linkage as each variant is described, by SciPy's own distance functions."""
    square = 1 - vectors @ vectors.T
    if variant == "pylate":
        return hierarchy.ward(square[np.triu_indices(len(square), 1)])
    return hierarchy.ward(pdist(square if variant == "paper" else vectors))


@pytest.mark.parametrize("variant", HIERARCHICAL_VARIANTS)
@pytest.mark.parametrize("tokens", [2, 3, 9, 40])
def test_hierarchical_is_scipys_tree_cut(variant, tokens):
    free = unit_vectors(tokens, seed=tokens).numpy()
    labels = cluster_labels(free, [1, 2, 3, 6], "hierarchical", 0, variant)
    for factor in (2, 3, 6):
        tree = scipy_tree(free.astype(np.float64), variant)
        judge = hierarchy.fcluster(tree, max(tokens // factor, 1), criterion="maxclust")
        assert groups(labels[factor]) == groups(judge)


@pytest.mark.parametrize("factor", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("protected", [0, 1, 3])
def test_variant_pylate_gives_pylates_vectors(factor, protected):
    batch = documents([30, 1, 2, 7, 4, 18])
    ours = pool(batch, factor, "hierarchical", protected, variant="pylate")
    theirs = ColBERT.pool_embeddings_hierarchical(None, batch, factor, protected)
    assert all(map(same_vectors, ours, theirs))


@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize(("method", "variant"), SETTINGS)
def test_number_of_vectors_and_protected_ones_for_every_length(method, variant, protected):
    factors = list(range(1, 9))
    batch = documents(range(41), dim=16)
    pooled = pool_sweep(batch, factors, method, protected, variant=variant)
    for factor in factors:
        counts = np.array([len(document) for document in pooled[factor]])
        expected = np.array([pooled_count(n, factor, method, protected) for n in range(41)])
        assert (counts <= expected if method == "hierarchical" else counts == expected).all()
        assert equal_lists([p[:protected] for p in pooled[factor]], [d[:protected] for d in batch])


@pytest.mark.parametrize(
    ("tokens", "factor", "protected", "span", "clustered"),
    [(41, 4, 1, 11, 11), (42, 4, 1, 12, 11), (3, 8, 1, 2, 2), (2, 8, 3, 2, 2), (9, 1, 1, 9, 9)],
)
def test_pooled_count_by_hand(tokens, factor, protected, span, clustered):
    # protected + ⌈n / p⌉ for span, protected + max(⌊n / p⌋, 1) for the others
    found = [pooled_count(tokens, factor, method, protected) for method in POOL_METHODS]
    assert found == [tokens, span, clustered, clustered]


@pytest.mark.parametrize("use_sklearn", [False, True])
@pytest.mark.parametrize(("method", "variant"), SETTINGS[1:])
def test_identical_tokens_make_one_vector_and_no_warning(method, variant, use_sklearn):
    for seed in range(20):  # of some, the squared length comes out above 1
        document = unit_vectors(1, dim=128, seed=seed).expand(9, 128)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (pooled,) = pool([document], 2, method, variant=variant, use_sklearn=use_sklearn)
        torch.testing.assert_close(pooled, document[:2])


@pytest.mark.parametrize("method", POOL_METHODS)
def test_factor_one_is_the_identity_with_its_gradient(method):
    batch = [document.requires_grad_() for document in documents([5, 0, 1, 12])]
    pooled = pool(batch, 1, method)
    assert equal_lists(pooled, batch)
    weights = [torch.randn_like(document) for document in batch]
    sum((p * w).sum() for p, w in zip(pooled, weights, strict=True)).backward()
    assert all(map(torch.equal, [document.grad for document in batch], weights))


@pytest.mark.parametrize("method", POOL_METHODS)
def test_nothing_to_pool(method):
    assert pool([], 8, method) == []
    assert pool_sweep(documents([3]), [], method) == {}
    only_empty = pool(documents([0, 0]), 2, method, renormalize=True)
    assert [tuple(p.shape) for p in only_empty] == [(0, 8), (0, 8)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("method", "variant"), SETTINGS)
def test_pooled_vectors_are_the_means_of_their_groups_in_the_same_dtype(method, variant, dtype):
    for document in documents([2, 3, 12, 30], dtype=dtype):
        (pooled,) = pool([document], 3, method, variant=variant)
        wide = document.double().numpy()
        labels = cluster_labels(wide, [3], method, variant=variant)[3]
        expected = np.stack([wide[labels == label].mean(0) for label in range(len(pooled))])
        assert pooled.dtype == dtype
        # half-precision means are rounded once, at the end
        np.testing.assert_allclose(pooled.double(), expected, rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1, 3])
def test_input_is_not_modified_nor_shared(method, factor):
    batch = documents([12, 3])
    for renormalize in (False, True):
        for document in pool(batch, factor, method, renormalize=renormalize):
            document.zero_()
    assert equal_lists(batch, documents([12, 3]))


@pytest.mark.parametrize("use_sklearn", [False, True])
def test_global_random_states_are_untouched_and_results_repeat(use_sklearn):
    def call():
        return pool(documents([40, 20]), 3, "kmeans", use_sklearn=use_sklearn)

    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state is what is looked at
    expected = torch.rand(2).tolist(), np.random.rand(2).tolist()  # noqa: NPY002
    first = call()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert equal_lists(call(), first)
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist()) == expected  # noqa: NPY002


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("method", "variant"), SETTINGS)
def test_gradients_agree_with_finite_differences(method, variant, renormalize):
    def pooled(document):
        return pool([document], 3, method, 0, variant=variant, renormalize=renormalize)[0]

    # nine tokens of three clusters far apart: a small step changes no assignment
    centres = torch.eye(4, dtype=torch.float64)[[0, 1, 2] * 3]
    document = centres + 0.05 * unit_vectors(9, 4, dtype=torch.float64)
    document = torch.nn.functional.normalize(document, dim=-1).requires_grad_()
    assert pooled(document).shape == (3, 4)
    assert torch.autograd.gradcheck(pooled, [document], eps=1e-6)


@pytest.mark.parametrize(("method", "variant"), SETTINGS)
def test_padded_gradients_reach_unmasked_tokens_only(method, variant):
    embeddings = torch.stack([unit_vectors(10, seed=seed) for seed in range(3)]).requires_grad_()
    mask = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) < 0.7
    pool_padded(embeddings, mask, 2, method, variant=variant)[0].sum().backward()
    assert torch.equal((embeddings.grad != 0).all(-1), mask)


settings = st.sampled_from(SETTINGS)
protected_tokens = st.integers(0, 2)


@given(
    st.lists(st.integers(0, 12), max_size=6),
    settings,
    st.booleans(),
    protected_tokens,
    st.randoms(),
)
def test_neither_order_nor_other_factors_matter(lengths, setting, renormalize, protected, random):
    method, variant = setting
    options = {"variant": variant, "renormalize": renormalize}
    batch = documents(lengths)
    order = random.sample(range(len(batch)), len(batch))
    sweep = pool_sweep([batch[i] for i in order], [3, 1, 2], method, protected, **options)
    assert list(sweep) == [3, 1, 2]
    for factor, pooled in sweep.items():
        expected = pool(batch, factor, method, protected, **options)
        assert equal_lists(pooled, [expected[i] for i in order])


@given(
    st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=5),
    settings,
    st.integers(1, 5),
    protected_tokens,
    st.sampled_from([0.0, 1e30, -3.5, math.nan, math.inf]),
    st.integers(0, 5),
)
def test_padding_and_masked_tokens_change_nothing(rows, setting, factor, protected, garbage, extra):
    method, variant = setting
    mask = torch.tensor(rows)
    batch = documents(mask.sum(1).tolist())
    expected = pool(batch, factor, method, protected, variant=variant)
    longer = torch.cat([mask, torch.zeros(len(mask), extra, dtype=torch.bool)], dim=1)
    padded = torch.full((*longer.shape, 8), garbage)
    padded[longer] = torch.cat(batch)
    vectors, kept = pool_padded(padded, longer, factor, method, protected, variant=variant)
    assert kept.dtype == torch.bool and vectors.shape[:2] == kept.shape
    assert equal_lists([v[k] for v, k in zip(vectors, kept, strict=True)], expected)
    if factor > 1:  # factor 1 gives the input back
        assert (vectors[~kept] == 0).all()
        assert kept.shape[1] == pooled_count(mask.shape[1] + extra, factor, method, protected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1, 3])
def test_renormalized_vectors_have_length_one(method, factor):
    for document in pool(documents([20, 1, 5]), factor, method, renormalize=True):
        torch.testing.assert_close(document.norm(dim=-1), torch.ones(len(document)))
    lengths = pool(documents([20]), 3, method)[0][1:].norm(dim=-1)
    assert (lengths < 0.999).any()  # a mean of unit vectors is shorter, and stays so by default


FORMS = {
    "tensors": list,
    "arrays": lambda batch: [document.numpy() for document in batch],
    "reversed arrays": lambda batch: [document.flip(0).numpy()[::-1] for document in batch],
    "array of arrays": lambda batch: np.array([None, *[d.numpy() for d in batch]], object)[1:],
    "padded tensor": lambda batch: torch.nn.utils.rnn.pad_sequence(batch, batch_first=True),
    "padded array": lambda batch: FORMS["padded tensor"](batch).numpy(),
    "batches of one": lambda batch: list(FORMS["padded tensor"](batch).split(1)),
    "arrays of one": lambda batch: np.split(FORMS["padded array"](batch), len(batch)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", POOL_METHODS)
def test_every_form_of_token_vectors_is_pooled_alike(form, method):
    batch = documents([9, 0, 1, 12])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pool(FORMS[form](batch), 3, method)
    assert equal_lists(found, pool(batch, 3, method))


def test_a_read_only_array_is_copied_without_a_warning():
    array = np.ones((3, 2), np.float32)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (document,) = token_vectors([array])
    document.zero_()
    assert array.all()


def test_only_zero_vectors_at_the_end_of_a_padded_text_are_padding():
    text = torch.tensor([[0.0, 0], [1, 0], [0, 0], [0, 1], [0, 0]])
    assert torch.equal(token_vectors(text[None])[0], text[:4])
    assert torch.equal(token_vectors([text])[0], text)  # not a padded batch


@pytest.mark.parametrize(
    "document",
    [torch.ones(3), np.ones(3), torch.ones(2, 2, 3), torch.ones(3, 2).int(), "text", None],
)
def test_what_is_no_document_is_refused_by_its_position(document):
    with pytest.raises(UserError, match="Document 1 is .* expected a"):
        pool([torch.ones(3, 2), document], 2, "span")
    with pytest.raises(UserError, match="Document 0 is .2,.*single text into a list"):
        pool(torch.ones(3, 2), 2, "span")


@pytest.mark.parametrize("other", [unit_vectors(4).half(), unit_vectors(4, dim=6)])
def test_documents_of_different_kinds_are_refused(other):
    with pytest.raises(UserError, match="expected one for all"):
        pool([unit_vectors(4), other], 2, "span")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("pool_factor", f, "a number of at least 1") for f in (0, 0.9, math.nan, True, "two", [2])]
    + [("protected_tokens", n, "whole number of at least 0") for n in (-1, 1.0, "one", None, True)]
    + [("pool_method", m, "'span', 'kmeans', 'hierarchical'") for m in ("means", None, "KMeans")]
    + [("variant", "ward", "'pylate', 'paper', 'euclidean'")],
)
def test_settings_that_do_not_exist_are_refused_with_those_that_do(name, value, message):
    options = {"pool_factor": 2, "pool_method": "hierarchical", name: value}
    message = re.escape(f"{name} is {value!r}; expected ") + ".*" + message
    with pytest.raises(UserError, match=message):
        pool(documents([5]), **options)
    with pytest.raises(UserError, match=message):
        pool_padded(torch.ones(1, 2, 8), torch.ones(1, 2), **options)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("position", [0, 5], ids=["protected", "last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize(("method", "variant"), [*SETTINGS, ("kmeans", "sklearn")])
def test_what_is_not_finite_is_refused_but_where_it_is_masked(
    method, variant, dtype, position, value
):
    options = {"variant": variant} if variant != "sklearn" else {"use_sklearn": True}
    clean = torch.stack(documents([6, 6], dtype=dtype))
    embeddings, mask = clean.clone(), torch.ones(2, 6, dtype=torch.bool)
    embeddings[1, position, 2] = value
    with pytest.raises(UserError, match="NaN or infinite"):
        pool(list(embeddings), 2, method, **options)
    with pytest.raises(UserError, match="NaN or infinite"):
        pool_padded(embeddings, mask, 2, method, **options)
    mask[1, position] = False
    vectors, _ = pool_padded(embeddings, mask, 2, method, **options)
    assert torch.equal(vectors, pool_padded(clean, mask, 2, method, **options)[0])


@pytest.mark.parametrize("size", [6e153, 1e154])
@pytest.mark.parametrize(("method", "variant"), [SETTINGS[1], SETTINGS[-1]])
def test_vectors_whose_trees_would_overflow_are_refused(size, method, variant):
    document = size * unit_vectors(60, dtype=torch.float64)
    with pytest.raises(UserError, match="cannot be pooled"):
        pool([document], 2, method, variant=variant)


def test_vectors_that_are_not_normalised_are_refused_where_cosines_are_needed():
    with pytest.raises(UserError, match="length 3; .*L2-normalised"):
        pool([3 * unit_vectors(9)], 2, "hierarchical")


@pytest.mark.parametrize("n", [6, 41])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("method", "variant"), SETTINGS[1:])
def test_duplicates_are_never_parted_and_make_no_more_clusters_than_asked(
    n, dtype, method, variant
):
    once = unit_vectors(n, dim=128, seed=n, dtype=dtype).double().numpy().astype(np.float32)
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


@pytest.mark.parametrize(("method", "variant"), SETTINGS[1:])
@pytest.mark.parametrize("angle", [0.02, 0.005])
def test_close_but_distinct_vectors_are_parted(angle, method, variant):
    # all within a narrow cone, which is still far wider than rounding in float32
    cone = unit_vectors(1, 16, seed=3) + angle * unit_vectors(20, 16, seed=4)
    document = torch.nn.functional.normalize(cone, dim=1).numpy()
    found = cluster_labels(document, [2, 5], method, 0, variant)
    assert found[2].max() + 1 == 10 and found[5].max() + 1 == 4


@pytest.mark.parametrize("scale", [1e-12, 1e4])
@pytest.mark.parametrize("first", [0, 1, 5])
def test_one_vector_of_another_length_leaves_the_others_apart(first, scale):
    document = unit_vectors(21, 16).numpy()
    document[first] *= scale
    assert cluster_labels(document, [2], "kmeans")[2].max() + 1 == 1 + 10
    found = cluster_labels(document, [2], "hierarchical", 1, "euclidean")[2]
    tree = hierarchy.fcluster(hierarchy.ward(document[1:].astype(float)), 10, criterion="maxclust")
    assert groups(found[1:]) == groups(tree)


def test_kmeans_is_as_tight_as_scikit_learns():
    generator = np.random.default_rng(0)
    ours, theirs = np.zeros(5), np.zeros(5)
    for n in generator.integers(20, 121, 30):  # tokens around 15 directions
        directions = generator.standard_normal((15, 128))[generator.integers(0, 15, n)]
        vectors = directions + 0.7 * generator.standard_normal((n, 128))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        labels = cluster_labels(vectors, range(2, 7), "kmeans", protected_tokens=0)
        for i, found in enumerate(labels.values()):
            kinds = [vectors[found == label] for label in range(found.max() + 1)]
            ours[i] += sum(np.square(kind - kind.mean(0)).sum() for kind in kinds)
        theirs += [kmeans_settings(n, max(n // f, 1)).fit(vectors).inertia_ for f in labels]
    assert (ours <= 1.005 * theirs).all(), ours / theirs


@pytest.mark.parametrize("method", POOL_METHODS)
@pytest.mark.parametrize("limit", [1, 4000, 2**40])
def test_small_blocks_and_one_block_give_the_same_vectors(method, limit, monkeypatch):
    batch = documents([30, 0, 1, 12, 7, 30, 19, 2, 0, 25])
    expected = pool_sweep(batch, [1, 2, 5], method, renormalize=True)
    monkeypatch.setattr(pooling, "BLOCK_BYTES", limit)
    monkeypatch.setattr(pooling, "SPAN_BLOCK_BYTES", limit)
    for factor, found in pool_sweep(batch, [1, 2, 5], method, renormalize=True).items():
        assert equal_lists(found, expected[factor])


@given(st.lists(st.integers(0, 60), max_size=60), st.integers(1, 300))
def test_blocks_hold_every_text_with_vectors_once_and_are_as_large_as_fits(costs, most):
    costs = np.array(costs, dtype=np.int64)
    found = [np.empty(0, np.int64), *blocks(costs, most)]
    placed = np.concatenate(found)
    assert sorted(placed) == np.flatnonzero(costs).tolist()
    assert (np.diff(costs[placed]) >= 0).all()
    assert all(len(block) < 2 or len(block) * costs[block[-1]] <= most for block in found)
    for block, after in itertools.pairwise(found[1:]):
        assert (len(block) + 1) * costs[after[0]] > most


@pytest.mark.parametrize(("method", "variant"), SETTINGS)
def test_autocast_and_threads_change_nothing(method, variant):
    embeddings, mask = torch.stack(documents([50] * 8)), torch.ones(8, 50, dtype=torch.bool)
    expected = pool_padded(embeddings, mask, 3, method, variant=variant)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.autocast("cpu", torch.bfloat16):
            vectors, kept = pool_padded(embeddings, mask, 3, method, variant=variant)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(vectors, expected[0]) and torch.equal(kept, expected[1])


class Questions(TorchDispatchMode):
    """Notes the operations whose shapes or results depend on values that a device holds."""

    ASKING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"})

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) else []
        if name in self.ASKING or any(i is not None and i.dtype == torch.bool for i in indices):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["span", "kmeans"])
def test_the_path_of_a_gpu_gives_the_same_without_waiting_for_the_device(method, monkeypatch):
    embeddings = torch.stack(documents([20] * 4)).requires_grad_()
    mask = torch.rand(4, 20, generator=torch.Generator().manual_seed(1)) < 0.8
    expected = pool_padded(embeddings, mask, 3, method)
    weights = unit_vectors(4 * expected[0].shape[1], seed=2).view_as(expected[0])
    (expected_gradient,) = torch.autograd.grad(expected[0], embeddings, weights)
    # every tensor says that it is on no CPU
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False), raising=False)
    with Questions() as questions:
        vectors, kept = pool_padded(embeddings, mask, 3, method)
        (gradient,) = torch.autograd.grad(vectors, embeddings, weights)
        assert not questions.found
        torch.ones(1).item()
    assert questions.found == {"_local_scalar_dense"}  # a question is noticed
    torch.testing.assert_close(vectors, expected[0])
    torch.testing.assert_close(gradient, expected_gradient)
    assert torch.equal(kept, expected[1])
