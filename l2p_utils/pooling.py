"""Token pooling: fewer vectors per document, by span, k-means or hierarchical clustering.

Each cluster becomes its mean, in the order in which the clusters first occur in the document,
differentiable with respect to every token. Clusters are found on detached vectors, for whole
batches at once.

Source: S. Josef, *Learn to Pool* (LIR @ ECIR 2026); B. Clavié et al., *Reducing the Footprint of
Multi-Vector Retrieval with Minimal Performance Impact via Token Pooling* (2024).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np
import sklearn
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import ThreadpoolController
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from l2p_utils.clustering import (
    by_first_occurrence,
    lloyd,
    segment_sums,
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
ROUNDING = 0.02  # how far above 1 a squared norm may come out; bfloat16 vectors reach 1.004
# Squared distances below this share of the squared norm are rounding.
SAME = {torch.float32: 1e-6, torch.float64: 1e-12}
BLOCK_BYTES = 2**20  # of one block's distances: they stay in the processor's cache
SPAN_BLOCK_BYTES = 4 * 2**20  # span needs no distances, so blocks can be larger
#: Bump when pooling, search or evaluation changes results: invalidates stored models and rows.
CACHE_VERSION = 1


def check_pool_factor(pool_factor: object) -> int:
    hint = "1 keeps every vector, 2 keeps about half of them"
    return check_whole("pool_factor", pool_factor, 1, hint)


def check_protected_tokens(protected_tokens: object) -> int:
    hint = "1 keeps the first vector of each document as it is"
    return check_whole("protected_tokens", protected_tokens, 0, hint)


def check_whole(name: str, value: object, least: int, hint: str) -> int:
    """`value` as an int, if it is a whole number of at least `least`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least:
        raise UserError(
            f"{name} is {value!r}; expected a whole number of at least {least} ({hint})."
        )
    return int(value)


def check_pooling(pool_method: str, variant: str = DEFAULT_VARIANT) -> None:
    """Refuse an unknown method or variant, naming those that exist."""
    if pool_method not in POOL_METHODS:
        raise UserError(f"pool_method is {pool_method!r}; expected one of {list(POOL_METHODS)}.")
    if variant not in HIERARCHICAL_VARIANTS:
        raise UserError(
            f"pool variant is {variant!r}; expected one of {list(HIERARCHICAL_VARIANTS)} "
            "(they differ only for pool_method='hierarchical')."
        )


def stored_variant(
    pool_method: str, variant: str = DEFAULT_VARIANT, use_sklearn: bool = False
) -> str:
    """The name under which result rows keep the variant of a pool method ('' if it has none)."""
    kmeans = "sklearn" if use_sklearn else "fast"
    return {"hierarchical": variant, "kmeans": kmeans}.get(pool_method, "")


def pooled_count(tokens: int, pool_factor: int, pool_method: str, protected_tokens: int = 1) -> int:
    """Number of vectors that remain of a document with `tokens` vectors.

    Clustering gives fewer when vectors are identical but for rounding, and hierarchical also where
    the tree has no cut into exactly that many.
    """
    protected = min(tokens, protected_tokens)
    free = tokens - protected
    if free == 0 or pool_method == "none" or pool_factor == 1:
        return tokens
    clusters = math.ceil(free / pool_factor) if pool_method == "span" else free // pool_factor
    return protected + max(clusters, 1)


def token_vectors(texts: Iterable[Any], name: str = "Document") -> list[torch.Tensor]:
    """Token vectors in any form that `encode` gives, as a list of (tokens, dim) tensors.

    `texts` are tensors or NumPy arrays of (tokens, dim), one per text; or a padded batch: one
    tensor or array of (texts, tokens, dim), or a list of (1, tokens, dim) as `encode` gives with
    ``padding=True``. In a padded batch, zero vectors at a text's end are padding and left out.
    Anything else raises a UserError, which calls a text `name` and tells its position.
    """
    found = []
    for i, vectors in enumerate(texts):
        padded = getattr(texts, "ndim", 0) == 3
        if isinstance(vectors, np.ndarray) and vectors.dtype.kind in "biuf":
            shared = vectors.flags.writeable and min(vectors.strides, default=0) >= 0
            vectors = torch.from_numpy(vectors if shared else vectors.copy())
        if getattr(vectors, "ndim", 0) == 3 and len(vectors) == 1:
            vectors, padded = vectors[0], True
        if not isinstance(vectors, torch.Tensor) or vectors.ndim != 2:
            given = tuple(getattr(vectors, "shape", ())) or type(vectors).__name__
            raise UserError(
                f"{name} {i} is {given}; expected a tensor or an array of (tokens, dim). "
                "Put the vectors of a single text into a list."
            )
        if not vectors.is_floating_point():
            raise UserError(f"{name} {i} is {vectors.dtype}; expected a floating dtype.")
        if padded:
            used = vectors.detach().any(dim=1).nonzero()
            vectors = vectors[: int(used[-1]) + 1 if len(used) else 0]
        found.append(vectors)
    return found


def blocks(costs: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Positions of texts in blocks whose size times largest cost is at most `most`.

    Cheapest first: neighbours in length share a block, with little padding. A text that costs more
    than `most` is a block of its own; one that costs nothing, as it has no vectors, is in none.
    """
    order = np.argsort(costs, kind="stable")
    order = order[costs[order] > 0]
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * costs[order[end]] > most:
            yield order[start:end]
            start = end


def pool(
    embeddings: Iterable[Any],
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
        (tokens, dim) tensors or arrays, one per document, of one floating dtype and device, or a
        padded batch (see `token_vectors`). A document may have no tokens.
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
        (vectors, dim) in the same order, dtype and device. Gradients reach every token.

    Raises
    ------
    UserError
        For settings that do not exist, and vectors that are not finite or of no (tokens, dim).
    """
    factor = check_pool_factor(pool_factor)
    options = {"variant": variant, "use_sklearn": use_sklearn, "renormalize": renormalize}
    return pool_sweep(embeddings, [factor], pool_method, protected_tokens, **options)[factor]


def pool_sweep(
    embeddings: Iterable[Any],
    pool_factors: Sequence[int],
    pool_method: PoolMethod,
    protected_tokens: int = 1,
    *,
    variant: PoolVariant = DEFAULT_VARIANT,
    use_sklearn: bool = False,
    renormalize: bool = False,
) -> dict[int, list[torch.Tensor]]:
    """Pool factor → what `pool` returns for it. A document's Ward tree is grown once for all."""
    factors = [check_pool_factor(factor) for factor in pool_factors]
    check_pooling(pool_method, variant)
    protected = check_protected_tokens(protected_tokens)
    embeddings = token_vectors(embeddings)
    if len(kinds := {(str(document.dtype), document.shape[1]) for document in embeddings}) > 1:
        raise UserError(
            f"The documents' (dtype, dim) are {sorted(kinds)}; expected one for all "
            "(document.float() makes one float32)."
        )
    lengths = np.array([len(document) for document in embeddings], dtype=np.int64)
    pooled = {factor: list(embeddings) for factor in factors}
    if not factors:
        return pooled
    most = SPAN_BLOCK_BYTES if pool_method == "span" else BLOCK_BYTES
    for block in blocks(4 * lengths**2, most):
        documents = [embeddings[i] for i in block]
        if pool_method == "span":
            vectors = torch.cat(documents)
            segments = _span_segments(lengths[block], factors, protected)
        else:
            vectors = pad_sequence(documents, batch_first=True)
            mask = torch.arange(vectors.shape[1]) < torch.from_numpy(lengths[block])[:, None]
            mask = mask.to(vectors.device)
            segments = _segments(
                assign(vectors, mask, factors, pool_method, protected, variant, use_sklearn)
            )
            vectors = vectors.flatten(0, 1)
        for factor, (index, counts) in segments.items():
            means, _ = _means(vectors, index.to(vectors.device), sum(counts))
            if pool_method == "span" and factor == max(factors) > 1:
                _check_finite(_wide(means.detach()).sum().isfinite())  # as every token is in a mean
            if renormalize:
                means = unit_length(means)
            for i, document in zip(block, means.split(counts), strict=True):
                pooled[factor][i] = document
    return pooled


def _segments(labels: dict[int, torch.Tensor]) -> dict[int, tuple[torch.Tensor, list[int]]]:
    """Segments (documents · tokens,) of a whole padded batch, and each document's number of them.

    Labels, (documents, tokens) per factor, are numbered on from document to document; masked tokens
    get the total number.
    """
    counts = torch.stack([found.amax(dim=1) + 1 for found in labels.values()])
    starts = (counts.cumsum(dim=1) - counts)[:, :, None]  # (factors, documents, 1)
    segments = {}
    for (factor, found), start, count in zip(labels.items(), starts, counts.tolist(), strict=True):
        segments[factor] = torch.where(found >= 0, found + start, sum(count)).flatten(), count
    return segments


def _span_segments(
    lengths: np.ndarray, factors: Sequence[int], protected_tokens: int
) -> dict[int, tuple[torch.Tensor, list[int]]]:
    """As `_segments`, for concatenated documents with `lengths` tokens that are pooled by span."""
    protected = np.minimum(lengths, protected_tokens)
    first = np.cumsum(lengths) - lengths  # tokens before each document
    found = {}
    for factor in factors:
        counts = protected + -(-(lengths - protected) // factor)
        start = np.cumsum(counts) - counts
        # behind the protected ones, a token's segment is a quotient
        rank = np.arange(lengths.sum()) - np.repeat(first + protected, lengths)
        rank = np.where(rank < 0, rank, rank // factor) + np.repeat(start + protected, lengths)
        found[factor] = torch.from_numpy(rank), counts.tolist()
    return found


def pool_padded(
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    pool_factor: int,
    pool_method: PoolMethod,
    protected_tokens: int = 1,
    *,
    variant: PoolVariant = DEFAULT_VARIANT,
    use_sklearn: bool = False,
    renormalize: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool a padded batch, as training has it; see `pool`.

    `embeddings` are (documents, tokens, dim), and `mask` is (documents, tokens), true where a token
    counts. Masked tokens (padding, punctuation) join no group, also where they stand between two
    tokens that do.

    Returns
    -------
    tuple of torch.Tensor
        Pooled vectors (documents, vectors, dim), zero where there are none, and their boolean mask
        (documents, vectors). `vectors` is what a document without masked tokens keeps: it is known
        without asking the device. With pool factor 1 the input comes back as it was.
    """
    factor = check_pool_factor(pool_factor)
    check_pooling(pool_method, variant)
    protected = check_protected_tokens(protected_tokens)
    mask = mask.bool()
    if factor == 1 or pool_method == "none":
        return embeddings, mask
    found = assign(embeddings, mask, [factor], pool_method, protected, variant, use_sklearn)
    labels = found[factor]
    documents, tokens, dim = embeddings.shape
    vectors = pooled_count(tokens, factor, pool_method, protected)
    first = torch.arange(documents, device=labels.device)[:, None] * vectors
    index = torch.where(labels >= 0, labels + first, documents * vectors).flatten()
    means, sizes = _means(embeddings.flatten(0, 1), index, documents * vectors)
    means = unit_length(means) if renormalize else means
    return means.view(documents, vectors, dim), sizes.view(documents, vectors) > 0


def unit_length(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (…, dim) scaled to length 1, in float32 at least; zero vectors stay zero."""
    return normalize(_wide(vectors), dim=-1).to(vectors.dtype)


def _means(
    vectors: torch.Tensor, index: torch.Tensor, segments: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means (segments, dim) and sizes (segments,) of vectors (n, dim) by their segment (n,).

    Vectors whose segment is `segments` take no part. Half-precision vectors are summed in float32.
    """
    means, sizes = _SegmentMeans.apply(_wide(vectors), index, segments)
    return means.to(vectors.dtype), sizes


class _SegmentMeans(torch.autograd.Function):
    """Means and sizes of segments; on the CPU, in one compiled pass."""

    @staticmethod
    def forward(ctx, vectors, index, segments):
        if not vectors.is_cpu:  # index_add adds in any order on a GPU; this sorts first
            sums = vectors.new_zeros(segments + 1, vectors.shape[1])
            sums = sums.index_put_((index,), vectors, accumulate=True)[:-1]
            sizes = index.new_zeros(segments + 1)
            sizes = sizes.index_put_((index,), torch.ones_like(index), accumulate=True)[:-1]
        else:
            arrays = segment_sums(vectors.detach().contiguous().numpy(), index.numpy(), segments)
            sums, sizes = map(torch.from_numpy, arrays)
        ctx.save_for_backward(index, sizes)
        ctx.mark_non_differentiable(sizes)
        return sums / sizes.clamp(min=1)[:, None], sizes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        index, sizes = ctx.saved_tensors
        share = gradient / sizes.clamp(min=1)[:, None]
        none = share.new_zeros(1, share.shape[1])
        return torch.cat([share, none])[index], None, None


def _wide(vectors: torch.Tensor) -> torch.Tensor:
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def cluster_labels(
    vectors: np.ndarray,
    pool_factors: Sequence[int],
    pool_method: PoolMethod,
    protected_tokens: int = 1,
    variant: PoolVariant = DEFAULT_VARIANT,
    use_sklearn: bool = False,
) -> dict[int, np.ndarray]:
    """`assign` for one document, (tokens, dim): pool factor → (tokens,) int64 labels."""
    batch = torch.tensor(vectors)[None]
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

    `embeddings` are (documents, tokens, dim), L2-normalised, and `mask` (documents, tokens) bool.
    Returns, per pool factor, (documents, tokens) int64 labels 0, 1, 2, … in order of first
    occurrence, the protected tokens first, each alone; −1 where the mask is false.

    Raises
    ------
    UserError
        For vectors that are not finite (span does not look on a GPU, where looking means waiting),
        or longer than 1 with variant ``pylate``.
    """
    rank = mask.cumsum(dim=1) - 1  # of a token among those that count
    whole = torch.where(mask, rank, -1)
    free = mask & (rank >= protected_tokens)
    labels = dict.fromkeys(pool_factors, whole)
    pooling = [factor for factor in labels if factor > 1]
    if not pooling or pool_method == "none" or not mask.numel():
        return labels
    if pool_method == "span":
        if embeddings.is_cpu:
            _check_finite((embeddings.isfinite().all(dim=2) | ~mask).all())
        found = {f: (rank - protected_tokens).div(f, rounding_mode="floor") for f in pooling}
    else:
        # Under autocast, the products in here would be half precision.
        with torch.autocast(embeddings.device.type, enabled=False):
            wide = _wide(embeddings).masked_fill(~mask[:, :, None], 0)  # what is masked may be NaN
            if pool_method == "hierarchical":
                found = _hierarchical(wide, free, pooling, variant)
            elif use_sklearn:
                found = _sklearn_kmeans(wide, free, pooling)
            else:  # Lloyd's steps from Ward's cut
                norms = wide.square().sum(dim=2)
                same = SAME[norms.dtype] * norms
                found = _grow(squared_distances(wide), norms, same, free, pooling, kmeans=True)
    protected = rank.clamp(max=protected_tokens - 1).amax(dim=1, keepdim=True) + 1
    for factor in pooling:
        labels[factor] = torch.where(free, found[factor] + protected, whole)
    return labels


def _hierarchical(
    vectors: torch.Tensor, free: torch.Tensor, factors: Sequence[int], variant: str
) -> dict[int, torch.Tensor]:
    """Ward's tree, cut into at most n // factor clusters; labels of the `free` tokens, from 0."""
    if variant != "pylate":  # PyLate's products are float32; SciPy's own distances are float64
        vectors = vectors.double()
    norms = vectors.square().sum(dim=2)
    if variant == "euclidean":
        same = SAME[norms.dtype] * norms
        return _grow(squared_distances(vectors), norms, same, free, factors)
    products = torch.bmm(vectors, vectors.transpose(1, 2))  # (documents, tokens, tokens)
    if variant == "pylate":
        # 1 - cos is half the squared distance of unit vectors, and is squared once more; vectors of
        # any dtype may have been normalised in float32
        same = (SAME[torch.float32] * norms).square() / 4
        return _grow(products, norms, same, free, factors, cosines=True)
    both = free[:, :, None] & free[:, None, :]
    rows = (1 - products).masked_fill_(~both, 0)  # read as observations
    same = SAME[rows.dtype] * rows.square().sum(dim=2)
    return _grow(squared_distances(rows), norms, same, free, factors)


def _grow(
    distances: torch.Tensor,
    norms: torch.Tensor,
    same: torch.Tensor,
    free: torch.Tensor,
    factors: Sequence[int],
    kmeans: bool = False,
    cosines: bool = False,
) -> dict[int, torch.Tensor]:
    """Labels from squared distances or cosines, (documents, tokens, tokens)."""
    parts = [distances.flatten(1), norms, same, free.to(distances)]
    if not distances.is_cpu:  # everything travels in one copy, and the labels back in one
        widths = [part.shape[1] for part in parts]
        parts = torch.cat(parts, dim=1).cpu().split(widths, dim=1)
    square = parts[0].reshape(distances.shape).numpy()
    norms, same = parts[1].numpy(), parts[2].double().numpy()
    free = parts[3].numpy() > 0
    _check_finite(np.isfinite(norms).all())
    if cosines:
        if (longest := norms[free].max(initial=0)) > 1 + ROUNDING:  # distances would be negative
            raise UserError(
                f"A vector has length {math.sqrt(longest):.3g}; expected at most 1: L2-normalised "
                "token vectors (leave normalize_embeddings=True), or variant='euclidean'."
            )
    else:  # the tree adds up to so many of them
        with np.errstate(over="ignore"):
            _check_finite(np.isfinite(np.float64(square.max(initial=0)) * 4 * square.shape[1]))
    counts = np.maximum(free.sum(axis=1, keepdims=True) // np.array(factors), 1)
    threads = torch.get_num_threads()
    labels = ward_labels(square, free, counts, same, not kmeans, threads, cosines)
    if kmeans:
        labels = lloyd(square, free, labels, same, threads)
    found = torch.from_numpy(labels).to(distances.device)  # (documents, factors, tokens)
    return {factor: found[:, cut] for cut, factor in enumerate(factors)}


def _check_finite(finite: Any) -> None:
    if not finite:
        raise UserError(
            "The embeddings hold NaN or infinite values, which cannot be pooled; expected "
            "L2-normalised token vectors. Check the model that made them (half precision?)."
        )


def _sklearn_kmeans(
    vectors: torch.Tensor, free: torch.Tensor, factors: Sequence[int]
) -> dict[int, torch.Tensor]:
    """scikit-learn's k-means, one document and factor after another."""
    # float64 spares scikit-learn the chunked upcasts that it makes for float32: 1.4 times faster.
    documents = vectors.cpu().double().numpy()
    _check_finite(np.isfinite(documents).all())
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
    iterations = min(max(12 + math.ceil(6 * math.log2(max(n / k, 2))), 20), 50)
    return KMeans(
        k, init="k-means++", n_init=1, random_state=KMEANS_SEED, tol=1e-4, max_iter=iterations
    )


_threads = functools.cache(ThreadpoolController)  # looking for the libraries takes long
