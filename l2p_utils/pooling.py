"""Token pooling: fewer vectors per document, by span, k-means or hierarchical clustering.

Takes lists of (tokens, dim) tensors or a padded batch with a mask; gives the clusters' means, in
the order in which the clusters first occur in the document, differentiable with respect to every
token. Cluster assignments are computed on detached vectors.

Source: S. Josef, *Learn to Pool* (LIR @ ECIR 2026); B. Clavié et al., *Reducing the Footprint of
Multi-Vector Retrieval with Minimal Performance Impact via Token Pooling* (2024).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import sklearn
import torch
from scipy.cluster import hierarchy
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import ThreadpoolController

from l2p_utils.files import UserError

PoolMethod = Literal["none", "span", "kmeans", "hierarchical"]
PoolVariant = Literal["pylate", "paper", "euclidean"]
POOL_METHODS: tuple[str, ...] = get_args(PoolMethod)
HIERARCHICAL_VARIANTS: tuple[str, ...] = get_args(PoolVariant)
DEFAULT_VARIANT: PoolVariant = "pylate"
KMEANS_SEED = 42
ROUNDING = 0.02  # how far above 1 a cosine may come out; bfloat16 vectors reach 1.004


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


def check_pooling(
    pool_method: str, variant: str = DEFAULT_VARIANT, use_sklearn: bool = True
) -> None:
    """Refuse an unknown method or variant, and the k-means engine that does not exist.

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
    if pool_method == "kmeans" and not use_sklearn:
        raise UserError(
            "use_sklearn=False asks for a k-means engine other than scikit-learn's; there is none "
            "here. Leave use_sklearn=True."
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


def stored_variant(pool_method: str, variant: str = DEFAULT_VARIANT) -> str:
    """The name under which result rows keep the variant of a pool method ('' if it has none)."""
    return {"hierarchical": variant, "kmeans": "sklearn"}.get(pool_method, "")


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
    use_sklearn: bool = True,
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
        ``span``: groups of `pool_factor` neighbours. ``kmeans``: scikit-learn's k-means++ with one
        initialisation. ``hierarchical``: Ward's tree, cut. ``none``: unchanged.
    protected_tokens
        How many vectors at each document's beginning are kept as they are ([CLS] in the paper).
    variant
        What Ward's linkage is given: ``pylate``, the condensed 1 - cosine matrix; ``paper``, the
        square 1 - cosine matrix read as observations; ``euclidean``, the vectors themselves.
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
    use_sklearn: bool = True,
    renormalize: bool = False,
) -> dict[int, list[torch.Tensor]]:
    """`pool` for several pool factors at once: a document's Ward tree is built once for all.

    Returns
    -------
    dict
        Pool factor → what `pool` returns for it.
    """
    factors = [check_pool_factor(factor) for factor in pool_factors]
    check_pooling(pool_method, variant, use_sklearn)
    check_protected_tokens(protected_tokens)
    lengths = [_check_document(i, document) for i, document in enumerate(embeddings)]
    if not lengths:
        return {factor: [] for factor in factors}
    flat = torch.cat(list(embeddings))  # (total tokens, dim)
    labels = _segment_labels(flat, lengths, factors, pool_method, protected_tokens, variant)
    return {
        factor: list(_means(flat, labels[factor], renormalize).split(_counts(labels[factor])))
        for factor in factors
    }


def pool_padded(
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    pool_factor: int,
    pool_method: PoolMethod,
    protected_tokens: int = 1,
    *,
    variant: PoolVariant = DEFAULT_VARIANT,
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
        Pooled vectors (documents, most vectors, dim), zero where there are none, and their boolean
        mask (documents, most vectors). With pool factor 1 the input comes back as it was.
    """
    factor = check_pool_factor(pool_factor)
    check_pooling(pool_method, variant)
    check_protected_tokens(protected_tokens)
    mask = mask.bool()
    if factor == 1 or pool_method == "none":
        return embeddings, mask
    lengths = mask.sum(dim=1).tolist()
    flat = embeddings[mask]  # (total tokens, dim)
    labels = _segment_labels(flat, lengths, [factor], pool_method, protected_tokens, variant)
    pooled = _means(flat, labels[factor], renormalize=False).split(_counts(labels[factor]))
    counts = torch.tensor(_counts(labels[factor]), device=mask.device)
    padded = torch.nn.utils.rnn.pad_sequence(list(pooled), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=mask.device) < counts[:, None]


def cluster_labels(
    vectors: np.ndarray,
    pool_factors: Sequence[int],
    pool_method: PoolMethod,
    protected_tokens: int = 1,
    variant: PoolVariant = DEFAULT_VARIANT,
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
    protected = min(len(vectors), protected_tokens)
    free = vectors[protected:]
    assign = {"span": _span, "kmeans": _kmeans, "hierarchical": _hierarchical}.get(pool_method)
    whole = np.arange(len(vectors))
    pooling = [factor for factor in pool_factors if factor > 1]
    if assign is None or len(free) <= 1 or not pooling:
        return dict.fromkeys(pool_factors, whole)
    found = dict(zip(pooling, assign(free, pooling, variant), strict=True))
    return {
        factor: np.concatenate([whole[:protected], protected + _by_first_occurrence(found[factor])])
        if factor in found
        else whole
        for factor in pool_factors
    }


def _span(free: np.ndarray, factors: Sequence[int], variant: str) -> list[np.ndarray]:
    return [np.arange(len(free)) // factor for factor in factors]


def _kmeans(free: np.ndarray, factors: Sequence[int], variant: str) -> list[np.ndarray]:
    # float64 spares scikit-learn the chunked upcasts that it makes for float32: 1.4 times faster.
    free = free.astype(np.float64)
    counts = [max(len(free) // factor, 1) for factor in factors]
    with (
        _threads().limit(limits=1),  # more threads make such small fits several times slower
        sklearn.config_context(assume_finite=True, skip_parameter_validation=True),
        warnings.catch_warnings(),
    ):
        # Identical vectors make fewer clusters than asked for; that is right and needs no warning.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return [kmeans_settings(len(free), k).fit(free).labels_ for k in counts]


def kmeans_settings(n: int, k: int) -> KMeans:
    """scikit-learn's k-means with the paper's settings for n vectors in k clusters."""
    ratio = max(n / k, 2)
    iterations = min(max(12 + math.ceil(6 * math.log2(ratio)), 20), 50)
    return KMeans(
        k, init="k-means++", n_init=1, random_state=KMEANS_SEED, tol=1e-4, max_iter=iterations
    )


def _hierarchical(free: np.ndarray, factors: Sequence[int], variant: str) -> list[np.ndarray]:
    tree = ward_tree(free, variant)
    return [
        hierarchy.fcluster(tree, t=max(len(free) // factor, 1), criterion="maxclust")
        for factor in factors
    ]


def ward_tree(vectors: np.ndarray, variant: PoolVariant = DEFAULT_VARIANT) -> np.ndarray:
    """Ward's linkage of (n, dim) vectors, n ≥ 2, as SciPy's (n - 1, 4) linkage matrix.

    Raises
    ------
    UserError
        For vectors longer than 1 with variant ``pylate``, whose distances would be negative.
    """
    if variant == "euclidean":
        return hierarchy.linkage(vectors, method="ward")
    distances = 1 - vectors @ vectors.T  # (n, n)
    if variant == "pylate":
        distances = distances[np.triu_indices(len(vectors), k=1)]  # condensed: (n (n - 1) / 2,)
        if distances.min() < -ROUNDING:
            raise UserError(
                f"Two vectors have a dot product of {1 - distances.min():.3g}; expected at most 1: "
                "L2-normalised token vectors (leave normalize_embeddings=True)."
            )
        # Rounding makes 1 - cos of equal vectors -1e-7, which SciPy refuses as a distance.
        return hierarchy.linkage(np.maximum(distances, 0), method="ward")
    with warnings.catch_warnings():
        # SciPy notices that the observations look like a distance matrix. They do: see `pool`.
        warnings.simplefilter("ignore", hierarchy.ClusterWarning)
        return hierarchy.linkage(distances, method="ward")


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


def _by_first_occurrence(labels: np.ndarray) -> np.ndarray:
    """Rename labels to 0, 1, 2, … in the order in which they first occur."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _segment_labels(
    flat: torch.Tensor,
    lengths: Sequence[int],
    factors: Sequence[int],
    pool_method: str,
    protected_tokens: int,
    variant: str,
) -> dict[int, list[np.ndarray]]:
    """Labels of every document: pool factor → one (tokens,) array a document."""
    vectors = flat.detach().float().cpu().numpy()
    if pool_method in ("kmeans", "hierarchical") and not np.isfinite(vectors).all():
        raise UserError(
            "The embeddings hold NaN or infinite values, which cannot be clustered; expected "
            "L2-normalised token vectors. Check the model that made them (half precision?)."
        )
    documents = np.split(vectors, np.cumsum(lengths)[:-1])
    found = [
        cluster_labels(document, factors, pool_method, protected_tokens, variant)
        for document in documents
    ]
    return {factor: [labels[factor] for labels in found] for factor in factors}


def _counts(labels: Sequence[np.ndarray]) -> list[int]:
    """Vectors per document after pooling."""
    return [int(document.max()) + 1 if len(document) else 0 for document in labels]


def _means(flat: torch.Tensor, labels: Sequence[np.ndarray], renormalize: bool) -> torch.Tensor:
    """Mean of each segment, over all documents at once: (total pooled vectors, dim)."""
    counts = _counts(labels)
    offsets = np.cumsum([0, *counts])
    if offsets[-1] == len(flat) and not renormalize:
        return flat  # every token is its own segment: unchanged to the bit
    segments = np.concatenate([d + o for d, o in zip(labels, offsets[:-1], strict=True)])
    index = torch.from_numpy(segments).to(flat.device)  # (total tokens,)
    # Sums in float32 (or better): a half-precision sum of many vectors loses digits.
    wide = flat if flat.dtype == torch.float64 else flat.float()
    sums = wide.new_zeros(int(offsets[-1]), flat.shape[1]).index_add(0, index, wide)
    means = sums / torch.bincount(index, minlength=int(offsets[-1]))[:, None]
    if renormalize:
        means = torch.nn.functional.normalize(means, dim=-1)
    return means.to(flat.dtype)


def _check_document(position: int, document: torch.Tensor) -> int:
    """Number of tokens of a document's (tokens, dim) tensor."""
    if not isinstance(document, torch.Tensor) or document.ndim != 2:
        given = tuple(getattr(document, "shape", ())) or type(document).__name__
        raise UserError(f"Document {position} is {given}; expected a tensor of (tokens, dim).")
    if not document.is_floating_point():
        raise UserError(f"Document {position} is {document.dtype}; expected a floating dtype.")
    return len(document)
