"""Token pooling: fewer vectors per document, by span, k-means or hierarchical clustering.

Takes lists of (tokens, dim) tensors or a padded batch with a mask; gives the clusters' means, in
the order in which the clusters first occur in the document, differentiable with respect to every
token. Cluster assignments are computed on detached vectors, for whole batches at once.

Source: S. Josef, *Learn to Pool* (LIR @ ECIR 2026); B. Clavié et al., *Reducing the Footprint of
Multi-Vector Retrieval with Minimal Performance Impact via Token Pooling* (2024).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import sklearn
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import ThreadpoolController

from l2p_utils.clustering import (
    by_first_occurrence,
    lloyd,
    squared_distances,
    ward_labels,
)
from l2p_utils.files import UserError

PoolMethod = Literal["none", "span", "kmeans", "hierarchical"]
PoolVariant = Literal["pylate", "paper", "euclidean"]
POOL_METHODS: tuple[str, ...] = get_args(PoolMethod)
HIERARCHICAL_VARIANTS: tuple[str, ...] = get_args(PoolVariant)
DEFAULT_VARIANT: PoolVariant = "pylate"
KMEANS_SEED = 42
ROUNDING = 0.02  # how far above 1 a cosine may come out; bfloat16 vectors reach 1.004
SAME = 1e-6  # squared distances below this share of the squared norm are rounding
BLOCK_BYTES = 4 * 2**20  # of one block's distances: they stay in the processor's cache
#: Raise this by one whenever the same vectors come out pooled, searched or measured differently
#: (here, in clustering, search or evaluation): what older code trained or measured is made again.
CODE = 1


def check_pool_factor(pool_factor: object) -> int:
    """Return `pool_factor` as an int.

    Raises
    ------
    UserError
        Unless it is a whole number of at least 1 (1 is: no pooling).
    """
    whole = isinstance(pool_factor, int | np.integer) and not isinstance(pool_factor, bool)
    if not whole or pool_factor < 1:
        raise UserError(
            f"pool_factor is {pool_factor!r}; expected a whole number of at least 1 "
            "(1 keeps every vector, 2 keeps about half of them)."
        )
    return int(pool_factor)


def check_pooling(pool_method: str, variant: str = DEFAULT_VARIANT) -> None:
    """Refuse an unknown method or variant.

    Raises
    ------
    UserError
        With the value given and the values that are known.
    """
    if pool_method not in POOL_METHODS:
        raise UserError(f"pool_method is {pool_method!r}; expected one of {list(POOL_METHODS)}.")
    if variant not in HIERARCHICAL_VARIANTS:
        raise UserError(
            f"pool variant is {variant!r}; expected one of {list(HIERARCHICAL_VARIANTS)} "
            "(they differ only for pool_method='hierarchical')."
        )


def check_protected_tokens(protected_tokens: object) -> None:
    """Refuse anything but a whole number of at least 0.

    Raises
    ------
    UserError
    """
    whole = isinstance(protected_tokens, int | np.integer) and not isinstance(
        protected_tokens, bool
    )
    if not whole or protected_tokens < 0:
        raise UserError(
            f"protected_tokens is {protected_tokens!r}; expected a whole number of at least 0 "
            "(1 keeps the first vector of each document as it is)."
        )


def stored_variant(
    pool_method: str, variant: str = DEFAULT_VARIANT, use_sklearn: bool = False
) -> str:
    """The name under which result rows keep the variant of a pool method ('' if it has none)."""
    kmeans = "sklearn" if use_sklearn else "fast"
    return {"hierarchical": variant, "kmeans": kmeans}.get(pool_method, "")


def pooled_count(tokens: int, pool_factor: int, pool_method: str, protected_tokens: int = 1) -> int:
    """Number of vectors that remain of a document with `tokens` vectors (at most, see below).

    ``protected + ceil(n / p)`` for span, ``protected + max(n // p, 1)`` for the clustering methods,
    where n counts the unprotected vectors. Clustering gives fewer when vectors are identical, and
    hierarchical also where the tree has no cut into exactly that many.
    """
    protected = min(tokens, protected_tokens)
    free = tokens - protected
    if free == 0 or pool_method == "none" or pool_factor == 1:
        return tokens
    if pool_method == "span":
        return protected + math.ceil(free / pool_factor)
    return protected + max(free // pool_factor, 1)


def pool(
    embeddings: Sequence[torch.Tensor],
    pool_factor: int,
    pool_method: PoolMethod,
    protected_tokens: int = 1,
    *,
    variant: PoolVariant = DEFAULT_VARIANT,
    use_sklearn: bool = False,
    renormalize: bool = False,
) -> list[torch.Tensor]:
    """Pool the token vectors of documents.

    Parameters
    ----------
    embeddings
        One tensor of shape (tokens, dim) a document, of one floating dtype and device; a document
        may have no tokens.
    pool_factor
        About how many token vectors become one; 1 returns the input's values unchanged.
    pool_method
        ``span``: groups of `pool_factor` neighbours. ``kmeans``: Lloyd's steps from Ward's cut of
        the vectors. ``hierarchical``: Ward's tree, cut. ``none``: unchanged.
    protected_tokens
        How many vectors at each document's beginning are kept as they are ([CLS] in the paper).
    variant
        What Ward's linkage is given: ``pylate``, the condensed 1 - cosine matrix; ``paper``, the
        square 1 - cosine matrix read as observations; ``euclidean``, the vectors themselves.
    use_sklearn
        For ``kmeans``: the paper's scikit-learn k-means++ with one initialisation, one document at
        a time. Slower by far, and its clusters are no tighter.
    renormalize
        Scale the pooled vectors back to unit length. Off, as in the paper.

    Returns
    -------
    list of torch.Tensor
        (vectors, dim) tensors in the same order, dtype and device. Gradients reach every token.

    Raises
    ------
    UserError
        For an impossible pool factor, an unknown method or variant, vectors that are not finite.
    """
    (pooled,) = pool_sweep(
        embeddings,
        [pool_factor],
        pool_method,
        protected_tokens,
        variant=variant,
        use_sklearn=use_sklearn,
        renormalize=renormalize,
    ).values()
    return pooled


def pool_sweep(
    embeddings: Sequence[torch.Tensor],
    pool_factors: Sequence[int],
    pool_method: PoolMethod,
    protected_tokens: int = 1,
    *,
    variant: PoolVariant = DEFAULT_VARIANT,
    use_sklearn: bool = False,
    renormalize: bool = False,
) -> dict[int, list[torch.Tensor]]:
    """`pool` for several pool factors at once: a document's Ward tree is grown once for all.

    Returns
    -------
    dict
        Pool factor → what `pool` returns for it.
    """
    factors = [check_pool_factor(factor) for factor in pool_factors]
    check_pooling(pool_method, variant)
    check_protected_tokens(protected_tokens)
    lengths = np.array([_check_document(i, d) for i, d in enumerate(embeddings)], dtype=np.int64)
    pooled: dict[int, list[torch.Tensor]] = {f: list(embeddings) for f in factors}
    for block in _blocks(lengths):
        padded = torch.nn.utils.rnn.pad_sequence([embeddings[i] for i in block], True)
        there = torch.from_numpy(lengths[block])[:, None]
        mask = (torch.arange(padded.shape[1]) < there).to(padded.device)
        labels = assign(padded, mask, factors, pool_method, protected_tokens, variant, use_sklearn)
        for factor in factors:
            means, kept = segment_means(padded, labels[factor])
            if renormalize:
                means = torch.nn.functional.normalize(_wide(means), dim=-1).to(padded.dtype)
            # one compact tensor a block: no document keeps the padding alive
            for i, document in zip(block, means[kept].split(kept.sum(1).tolist()), strict=True):
                pooled[factor][i] = document
    return pooled


def _blocks(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of the documents with tokens, shortest first, in blocks of bounded size."""
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    while len(order):
        # the last document of a block is its longest: its square times their number must fit
        sizes = 4 * lengths[order] ** 2 * np.arange(1, len(order) + 1)
        size = max(int((sizes <= BLOCK_BYTES).sum()), 1)
        yield order[:size]
        order = order[size:]


def pool_padded(
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    pool_factor: int,
    pool_method: PoolMethod,
    protected_tokens: int = 1,
    *,
    variant: PoolVariant = DEFAULT_VARIANT,
    use_sklearn: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool a padded batch, as training has it.

    Parameters
    ----------
    embeddings
        (documents, tokens, dim).
    mask
        (documents, tokens), true where a token counts. Masked tokens (padding, punctuation) take
        no part in any group, also between two that do.

    Returns
    -------
    tuple of torch.Tensor
        Pooled vectors (documents, vectors, dim), zero where there are none, and their boolean mask
        (documents, vectors). `vectors` is what a document without masked tokens keeps: it is known
        without asking the device. With pool factor 1 the input comes back as it was.
    """
    factor = check_pool_factor(pool_factor)
    check_pooling(pool_method, variant)
    check_protected_tokens(protected_tokens)
    mask = mask.bool()
    if factor == 1 or pool_method == "none":
        return embeddings, mask
    labels = assign(embeddings, mask, [factor], pool_method, protected_tokens, variant, use_sklearn)
    vectors = pooled_count(embeddings.shape[1], factor, pool_method, protected_tokens)
    return segment_means(embeddings, labels[factor], vectors)


def segment_means(
    embeddings: torch.Tensor, labels: torch.Tensor, segments: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of each document's segments, in one sum over the padded batch.

    Parameters
    ----------
    embeddings
        (documents, tokens, dim).
    labels
        (documents, tokens) int64: the segment of each token, −1 for those that take no part.
    segments
        More than every label; by default, one more than the largest.

    Returns
    -------
    tuple of torch.Tensor
        Means (documents, segments, dim) in the embeddings' dtype, zero for empty segments; and
        (documents, segments) bool, where there are any. The gradient of a token is its segment's,
        divided by the segment's size.
    """
    documents, _, dim = embeddings.shape
    if segments is None:
        segments = int(labels.max()) + 1 if labels.numel() else 0
    start = torch.arange(documents, device=labels.device)[:, None] * segments
    dump = documents * segments  # one more segment, for the tokens that take no part
    index = torch.where(labels >= 0, labels + start, dump).flatten()
    # Sums in float32 (or better): a half-precision sum of many vectors loses digits.
    wide = _wide(embeddings)
    sums = _segment_sums(wide.flatten(0, 1), index, dump + 1)
    sizes = _segment_sums(torch.ones_like(index), index, dump + 1)[:-1]
    means = sums[:-1] / sizes.clamp(min=1)[:, None]
    means = means.to(embeddings.dtype).view(documents, segments, dim)
    return means, sizes.view(documents, segments) > 0


def _wide(vectors: torch.Tensor) -> torch.Tensor:
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def _segment_sums(values: torch.Tensor, index: torch.Tensor, segments: int) -> torch.Tensor:
    zeros = values.new_zeros(segments, *values.shape[1:])
    if values.is_cuda:  # index_add adds in any order there; this sorts first
        return zeros.index_put((index,), values, accumulate=True)
    return zeros.index_add(0, index, values)


def cluster_labels(
    vectors: np.ndarray,
    pool_factors: Sequence[int],
    pool_method: PoolMethod,
    protected_tokens: int = 1,
    variant: PoolVariant = DEFAULT_VARIANT,
    use_sklearn: bool = False,
) -> dict[int, np.ndarray]:
    """Which pooled vector each token of one document goes to.

    Parameters
    ----------
    vectors
        (tokens, dim), float32 or float64, L2-normalised.

    Returns
    -------
    dict
        Pool factor → (tokens,) int64 labels 0, 1, 2, … in order of first occurrence; protected
        tokens are alone in theirs.
    """
    batch = torch.from_numpy(np.ascontiguousarray(vectors))[None]
    mask = torch.ones(batch.shape[:2], dtype=torch.bool)
    labels = assign(batch, mask, pool_factors, pool_method, protected_tokens, variant, use_sklearn)
    return {factor: found[0].numpy() for factor, found in labels.items()}


@torch.no_grad()
def assign(
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    pool_factors: Sequence[int],
    pool_method: str,
    protected_tokens: int = 1,
    variant: str = DEFAULT_VARIANT,
    use_sklearn: bool = False,
) -> dict[int, torch.Tensor]:
    """Which pooled vector each token of a padded batch goes to.

    Parameters
    ----------
    embeddings, mask
        (documents, tokens, dim) and (documents, tokens) bool.

    Returns
    -------
    dict
        Pool factor → (documents, tokens) int64 labels 0, 1, 2, … in order of first occurrence, the
        protected tokens first; −1 where the mask is false.

    Raises
    ------
    UserError
        For vectors that cannot be clustered: not finite, or longer than 1 with variant ``pylate``.
    """
    rank = mask.cumsum(dim=1) - 1  # of a token among those that count
    whole = torch.where(mask, rank, -1)
    free = mask & (rank >= protected_tokens)
    labels = dict.fromkeys(pool_factors, whole)
    pooling = [factor for factor in labels if factor > 1]
    if not pooling or pool_method == "none" or not mask.numel():
        return labels
    if pool_method == "span":
        found = {f: (rank - protected_tokens).div(f, rounding_mode="floor") for f in pooling}
    else:
        # Under autocast, the products in here would be half precision.
        with torch.autocast(embeddings.device.type, enabled=False):
            found = _cluster(embeddings, mask, free, pooling, pool_method, variant, use_sklearn)
    protected = rank.clamp(max=protected_tokens - 1).amax(dim=1, keepdim=True) + 1
    for factor in pooling:
        labels[factor] = torch.where(free, found[factor] + protected, whole)
    return labels


def _cluster(
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    free: torch.Tensor,
    factors: Sequence[int],
    pool_method: str,
    variant: str,
    use_sklearn: bool,
) -> dict[int, torch.Tensor]:
    """Labels of the tokens in `free`, from 0 for every document."""
    wide = _wide(embeddings).masked_fill(~mask[:, :, None], 0)
    if pool_method == "kmeans" and use_sklearn:
        return _sklearn_kmeans(wide, free, factors)
    if pool_method == "kmeans":
        return _fast_kmeans(wide, free, factors)
    return _hierarchical(wide, free, factors, variant)


def _fast_kmeans(
    vectors: torch.Tensor, free: torch.Tensor, factors: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Lloyd's steps from Ward's cut of the vectors; trees once for all factors."""
    return _grow(vectors, squared_distances(vectors), free, factors, _same(vectors), kmeans=True)


def _hierarchical(
    vectors: torch.Tensor,
    free: torch.Tensor,
    factors: Sequence[int],
    variant: str,
) -> dict[int, torch.Tensor]:
    """Ward's tree, cut into at most n // factor clusters, in float64 as SciPy grows it."""
    if variant != "pylate":  # PyLate's products are float32; SciPy's own distances are not
        vectors = vectors.double()
    distances = _dissimilarities(vectors, free, variant)
    # 1 - cos is half the squared distance of unit vectors, and is squared once more
    same = _same(vectors) if variant == "euclidean" else _same(vectors).square() / 4
    return _grow(vectors, distances, free, factors, same, kmeans=False)


def _same(vectors: torch.Tensor) -> torch.Tensor:
    """Squared distances up to this are rounding: (documents,)."""
    return SAME * vectors.square().sum(dim=2).amax(dim=1)


def _dissimilarities(vectors: torch.Tensor, free: torch.Tensor, variant: str) -> torch.Tensor:
    """(documents, tokens, tokens) squares of what the variant's Ward linkage takes for distances.

    Raises
    ------
    UserError
        For vectors longer than 1 with variant ``pylate``, whose distances would be negative.
    """
    if variant == "euclidean":
        return squared_distances(vectors)
    both = free[:, :, None] & free[:, None, :]
    distances = (1 - torch.bmm(vectors, vectors.transpose(1, 2))).masked_fill_(~both, 0)
    if variant == "paper":  # the rows of the matrix, read as observations
        return squared_distances(distances)
    distances.diagonal(dim1=1, dim2=2).zero_()  # no pair
    if -math.inf < (lowest := float(distances.min())) < -ROUNDING:
        raise UserError(
            f"Two vectors have a dot product of {1 - lowest:.3g}; expected at most 1: "
            "L2-normalised token vectors (leave normalize_embeddings=True)."
        )
    return distances.clamp_(min=0).square_()  # rounding makes 1 - cos of equal vectors -1e-7


def _grow(
    vectors: torch.Tensor,
    distances: torch.Tensor,
    free: torch.Tensor,
    factors: Sequence[int],
    same: torch.Tensor,
    kmeans: bool,
) -> dict[int, torch.Tensor]:
    """Labels from squared distances (documents, tokens, tokens), with or without Lloyd's steps.

    From a GPU everything travels in one copy, and the labels back in one.
    """
    # of a vector with NaN or infinity, the sum is not finite either
    parts = [distances.flatten(1), vectors.sum(dim=2), free.to(distances), same[:, None]]
    if distances.is_cuda:
        widths = [part.shape[1] for part in parts]
        parts = torch.cat(parts, dim=1).cpu().split(widths, dim=1)
    square = parts[0].reshape(distances.shape).numpy()
    free = parts[2].numpy() > 0
    same = parts[3].flatten().double().numpy()
    _refuse_infinite(parts[1].numpy())
    _refuse_infinite(square)  # vectors so long that their distances are not finite
    counts = np.maximum(free.sum(axis=1, keepdims=True) // np.array(factors), 1)
    threads = torch.get_num_threads()
    labels = ward_labels(square, free, counts, same, ties=not kmeans, threads=threads)
    if kmeans:
        labels = lloyd(square, free, labels, same, threads)
    found = torch.from_numpy(labels).to(distances.device)  # (documents, factors, tokens)
    return {factor: found[:, cut] for cut, factor in enumerate(factors)}


def _refuse_infinite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise UserError(
            "The embeddings hold NaN or infinite values, which cannot be clustered; expected "
            "L2-normalised token vectors. Check the model that made them (half precision?)."
        )


def _sklearn_kmeans(
    vectors: torch.Tensor, free: torch.Tensor, factors: Sequence[int]
) -> dict[int, torch.Tensor]:
    """scikit-learn's k-means, one document and factor after another."""
    # float64 spares scikit-learn the chunked upcasts that it makes for float32: 1.4 times faster.
    documents = vectors.double().cpu().numpy()
    _refuse_infinite(documents.sum(axis=2))
    rows = free.cpu().numpy()
    labels = {factor: np.zeros(rows.shape, dtype=np.int64) for factor in factors}
    with (
        _threads().limit(limits=1),  # more threads make such small fits several times slower
        sklearn.config_context(assume_finite=True, skip_parameter_validation=True),
        warnings.catch_warnings(),
    ):
        # Identical vectors make fewer clusters than asked for; that is right and needs no warning.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for i, row in enumerate(rows):
            n = int(row.sum())
            for factor in factors if n else ():
                fitted = kmeans_settings(n, max(n // factor, 1)).fit(documents[i, row])
                labels[factor][i, row] = by_first_occurrence(fitted.labels_)
    return {f: torch.from_numpy(array).to(vectors.device) for f, array in labels.items()}


def kmeans_settings(n: int, k: int) -> KMeans:
    """scikit-learn's k-means with the paper's settings for n vectors in k clusters."""
    ratio = max(n / k, 2)
    iterations = min(max(12 + math.ceil(6 * math.log2(ratio)), 20), 50)
    return KMeans(
        k, init="k-means++", n_init=1, random_state=KMEANS_SEED, tol=1e-4, max_iter=iterations
    )


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


def _check_document(position: int, document: torch.Tensor) -> int:
    """Number of tokens of a document's (tokens, dim) tensor."""
    if not isinstance(document, torch.Tensor) or document.ndim != 2:
        given = tuple(getattr(document, "shape", ())) or type(document).__name__
        raise UserError(f"Document {position} is {given}; expected a tensor of (tokens, dim).")
    if not document.is_floating_point():
        raise UserError(f"Document {position} is {document.dtype}; expected a floating dtype.")
    return len(document)
