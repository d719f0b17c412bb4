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
import re
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
    Trees,
    by_first_occurrence,
    cut_trees,
    lloyd,
    new_square,
    segment_sums,
    squared_distances,
    ward_trees,
)
from l2p_utils.files import UserError

PoolMethod = Literal["none", "span", "kmeans", "hierarchical"]
PoolVariant = Literal["pylate", "paper", "euclidean"]
PoolRule = Literal["proportional", "equal", "threshold"]
POOL_METHODS: tuple[str, ...] = get_args(PoolMethod)
HIERARCHICAL_VARIANTS: tuple[str, ...] = get_args(PoolVariant)
DEFAULT_VARIANT: PoolVariant = "pylate"
KMEANS_SEED = 42
ROUNDING = 0.02  # how far above 1 a squared norm may come out; bfloat16 vectors reach 1.004
# Squared distances below this share of the squared norm are rounding.
SAME = {torch.float32: 1e-6, torch.float64: 1e-12}
BLOCK_BYTES = 3 * 2**20  # of one block's distances: they stay in the processor's cache
SPAN_BLOCK_BYTES = 4 * 2**20  # span needs no distances, so blocks can be larger
#: Bump when pooling, search or evaluation changes results; it invalidates stored models and rows.
CACHE_VERSION = 1


@dataclass(frozen=True)
class Budget:
    """How many vectors a document may keep, by one of three measures.

    Parameters
    ----------
    pool_factor
        About how many token vectors become one, at least 1; fractions such as 1.5 too.
    max_vectors
        At most so many, protected ones among them.
    distance_threshold
        Clusters join up to this height of the tree that method and variant build, as SciPy's
        ``fcluster(…, criterion="distance")`` cuts it. Span has no tree.
    """

    pool_factor: float | None = None
    max_vectors: int | None = None
    distance_threshold: float | None = None

    def __post_init__(self) -> None:
        given = {key: value for key, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise UserError(
                f"The budget is {given or 'empty'}; expected one of pool_factor, max_vectors and "
                "distance_threshold."
            )
        if self.max_vectors is not None:
            check_whole("max_vectors", self.max_vectors, 1, "16 keeps at most 16 vectors")
            return
        (name, value), least = *given.items(), 1 if self.pool_factor is not None else 0
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not number or not least <= value < math.inf:
            hint = {
                "pool_factor": "1 keeps every vector, 2 about half of them",
                "distance_threshold": "0 joins equal vectors only",
            }[name]
            raise UserError(f"{name} is {value!r}; expected a number of at least {least} ({hint}).")

    @classmethod
    def of(cls, value: float | str | Budget) -> Budget:
        """`value` itself, or the budget of that pool factor, or of 16 vectors for ``"k16"``."""
        if isinstance(value, str) and re.fullmatch(r"k\d+", value):
            return cls(max_vectors=int(value[1:]))
        return value if isinstance(value, Budget) else cls(pool_factor=value)

    def check(self, pool_method: str, protected_tokens: int, use_sklearn: bool = False) -> None:
        """Refuse a budget that a pool method cannot keep."""
        if self.max_vectors is not None and self.max_vectors <= protected_tokens:
            raise UserError(
                f"max_vectors is {self.max_vectors}, which includes the {protected_tokens} "
                "protected; expected more. Raise it, or pass protected_tokens=0."
            )
        if self.distance_threshold is not None and (pool_method == "span" or use_sklearn):
            what = "scikit-learn's k-means" if use_sklearn else "span"
            raise UserError(
                f"distance_threshold is {self.distance_threshold}, a height of a tree; {what} "
                "builds none. Pass pool_factor or max_vectors."
            )

    def clusters(self, free: np.ndarray, protected: int, span: bool = False) -> np.ndarray:
        """How many clusters of the `free` tokens that are not protected; without a tree."""
        if self.max_vectors is not None:
            return np.minimum(free, self.max_vectors - protected)
        share = np.asarray(free) / self.pool_factor  # 3 / 1.5 must not come out below 2
        count = np.ceil(share - 1e-9) if span else np.floor(share + 1e-9)
        return np.minimum(np.maximum(count.astype(np.int64), 1), free)


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


def pooled_count(
    tokens: int, budget: float | Budget, pool_method: str, protected_tokens: int = 1
) -> int:
    """Number of vectors that remain of a document with `tokens` vectors, under a budget.

    `budget` is a pool factor, or a `Budget` of a pool factor or a number of vectors.

    Clustering gives fewer when vectors are identical but for rounding, and hierarchical also where
    the tree has no cut into exactly that many.
    """
    protected = min(tokens, protected_tokens)
    if pool_method == "none":
        return tokens
    free = np.array([tokens - protected])
    return protected + int(Budget.of(budget).clusters(free, protected, pool_method == "span")[0])


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
    pool_factor: float | None,
    pool_method: PoolMethod,
    protected_tokens: int = 1,
    *,
    max_vectors: int | None = None,
    distance_threshold: float | None = None,
    variant: PoolVariant = DEFAULT_VARIANT,
    use_sklearn: bool = False,
    renormalize: bool = False,
    weights: Sequence[Any] | None = None,
    return_sizes: bool = False,
) -> Any:
    """Pool the token vectors of documents.

    Parameters
    ----------
    embeddings
        (tokens, dim) tensors or arrays, one per document, of one floating dtype and device, or a
        padded batch (see `token_vectors`). A document may have no tokens.
    pool_factor, max_vectors, distance_threshold
        How many vectors are kept, see `Budget`; one of the three, the others None. Pool factor 1
        returns the input's values unchanged.
    pool_method
        ``span``: groups of neighbours, `pool_factor` of them or as even as can be. ``kmeans``:
        Lloyd's steps from Ward's cut of the vectors. ``hierarchical``: Ward's tree, cut. ``none``:
        unchanged.
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
    weights
        Of how many tokens each vector is the mean, (tokens,) per document: vectors that were pooled
        before are pooled further. With ``span``, and with ``hierarchical`` of variant
        ``euclidean``, raw means then come out as if pooled from the tokens.
    return_sizes
        Whether to return also of how many tokens each pooled vector is the mean.

    Returns
    -------
    list of torch.Tensor
        (vectors, dim) in the same order, dtype and device. Gradients reach every token. With
        `return_sizes` a pair: that list, and one of (vectors,) float64 arrays.

    Raises
    ------
    UserError
        For settings that do not exist, and vectors that are not finite or of no (tokens, dim).
    """
    others = (max_vectors, distance_threshold)
    budget = Budget.of(pool_factor) if others == (None, None) else Budget(pool_factor, *others)
    options = {"variant": variant, "use_sklearn": use_sklearn, "renormalize": renormalize}
    options |= {"weights": weights, "return_sizes": return_sizes}
    return pool_sweep(embeddings, [budget], pool_method, protected_tokens, **options)[budget]


def pool_sweep(
    embeddings: Iterable[Any],
    budgets: Sequence[float | Budget],
    pool_method: PoolMethod,
    protected_tokens: int = 1,
    *,
    variant: PoolVariant = DEFAULT_VARIANT,
    use_sklearn: bool = False,
    renormalize: bool = False,
    weights: Sequence[Any] | None = None,
    return_sizes: bool = False,
    trees: Sequence[Trees] = (),
) -> dict[Any, Any]:
    """Budget or pool factor → what `pool` returns for it. A document's tree is grown once.

    Or never, where `pool_to_mean` has grown all `trees` before, one for each of `_blocks`.
    """
    check_pooling(pool_method, variant)
    protected = check_protected_tokens(protected_tokens)
    asked = {given: given if isinstance(given, _Counts) else Budget.of(given) for given in budgets}
    for budget in asked.values():
        if isinstance(budget, Budget):
            budget.check(pool_method, protected, use_sklearn)
    embeddings = token_vectors(embeddings)
    if len(kinds := {(str(document.dtype), document.shape[1]) for document in embeddings}) > 1:
        raise UserError(
            f"The documents' (dtype, dim) are {sorted(kinds)}; expected one for all "
            "(document.float() makes one float32)."
        )
    lengths = np.array([len(document) for document in embeddings], dtype=np.int64)
    weights = _check_weights(weights, lengths)
    pooled = {given: list(embeddings) for given in asked}
    sizes = {given: [np.empty(0)] * len(lengths) for given in asked}
    for number, block in enumerate(_blocks(lengths, pool_method) if asked else ()):
        documents = [embeddings[i] for i in block]
        heavy = None if weights is None else [weights[i] for i in block]
        wanted = {
            given: replace(budget, shares=budget.shares[block])
            if isinstance(budget, _Counts) else budget
            for given, budget in asked.items()
        }  # fmt: skip
        if pool_method == "span":
            vectors = torch.cat(documents)
            segments = _span_segments(lengths[block], wanted, protected)
            heavy = heavy and torch.cat(heavy)
        else:
            vectors, mask = _pad(documents)
            heavy = heavy and pad_sequence(heavy, batch_first=True)
            labels = assign(
                vectors, mask, list(wanted.values()), pool_method, protected, variant, use_sklearn,
                None if heavy is None else heavy.numpy(), trees[number] if trees else None,
            )  # fmt: skip
            segments = _segments(dict(zip(wanted, labels.values(), strict=True)))
            vectors = vectors.flatten(0, 1)
        for given, (index, counts) in segments.items():
            index = index.to(vectors.device)
            if heavy is None:
                means, members = _means(vectors, index, sum(counts))
            else:
                means, members = _weighted_means(vectors, index, sum(counts), heavy.flatten())
            if pool_method == "span" and asked[given].pool_factor != 1:
                _check_finite(_wide(means.detach()).sum().isfinite())  # as every token is in a mean
            if renormalize:
                means = unit_length(means)
            for i, document in zip(block, means.split(counts), strict=True):
                pooled[given][i] = document
            if return_sizes:
                for i, size in zip(block, members.double().cpu().split(counts), strict=True):
                    sizes[given][i] = size.numpy()
    return {g: (pooled[g], sizes[g]) for g in asked} if return_sizes else pooled


def pool_to_mean(
    embeddings: Iterable[Any],
    mean_vectors: float,
    pool_method: PoolMethod,
    rule: PoolRule = "equal",
    protected_tokens: int = 1,
    *,
    variant: PoolVariant = DEFAULT_VARIANT,
    renormalize: bool = False,
    return_sizes: bool = False,
) -> Any:
    """Pool a whole collection to at most `mean_vectors` vectors per document on average.

    The arguments are those of `pool`, but for `rule`, how the vectors are shared out:
    ``proportional``, by a pool factor for all; ``equal``, the same number for all, where short
    documents keep all of theirs and the others share what is left; ``threshold``, by one height at
    which all documents' trees are cut.

    Raises
    ------
    UserError
        Where the protected tokens, or one vector for each document, are more already.
    """
    embeddings = token_vectors(embeddings)
    lengths = np.array([len(document) for document in embeddings], dtype=np.int64)
    protected = np.minimum(lengths, check_protected_tokens(protected_tokens))
    free = lengths - protected
    total = math.floor(mean_vectors * len(lengths) + 1e-9) - protected.sum()
    least = np.minimum(free, 1).sum()
    if rule not in get_args(PoolRule):
        raise UserError(f"rule is {rule!r}; expected one of {list(get_args(PoolRule))}.")
    if total < least:
        fewest = (protected.sum() + least) / max(len(lengths), 1)
        raise UserError(
            f"mean_vectors is {mean_vectors!r}; these documents need {fewest:.3g} on average: the "
            f"protected ({protected_tokens} each) and one more. Raise it, or protect fewer."
        )
    trees: list[Trees] = []
    if rule == "threshold":
        Budget(distance_threshold=0).check(pool_method, 0)
        heights = np.full((len(lengths), max(int(free.max(initial=1)) - 1, 0)), np.inf)
        for block, tree in _block_trees(
            embeddings, lengths, pool_method, protected_tokens, variant
        ):
            trees.append(tree)
            heights[block, : tree.heights.shape[1]] = tree.heights[:, : heights.shape[1]]
        # every merge is one vector fewer; the lowest ones are made
        order = np.sort(heights[np.isfinite(heights)])
        merges = free.sum() - total
        height = order[merges - 1] if merges > 0 else -1.0
        shares = free - (heights <= height).sum(axis=1)
    elif rule == "equal":
        shares = _share_out(free, total)
    else:
        shares = _in_proportion(free, total)
    counts = _Counts(shares)
    options = {"variant": variant, "renormalize": renormalize, "return_sizes": return_sizes}
    options["trees"] = trees
    return pool_sweep(embeddings, [counts], pool_method, protected_tokens, **options)[counts]


def _share_out(free: np.ndarray, total: int) -> np.ndarray:
    """`total` vectors for documents with `free` tokens: min(n, k); the longest get what is left."""
    order = np.sort(free)
    # so many vectors if every document keeps at most the number of the i-th shortest
    sums = np.cumsum(order) - order + order * np.arange(len(order), 0, -1)
    whole = int(np.searchsorted(sums, total, side="right"))  # documents that keep all
    if whole == len(order):
        return free
    k, rest = divmod(total - order[:whole].sum(), len(order) - whole)
    shares = np.minimum(free, k)
    longer = np.flatnonzero(free > k)
    shares[longer[np.argsort(-free[longer], kind="stable")][:rest]] += 1
    return shares


def _in_proportion(free: np.ndarray, total: int) -> np.ndarray:
    """The counts of the smallest pool factor with which there are at most `total` vectors."""

    def shares(factor: float) -> np.ndarray:
        return Budget(factor).clusters(free, 0)

    # up to which factor a document keeps k of n vectors; 1 in case there are none at all
    ends = np.unique([1.0, *(n / k for n in np.unique(free) for k in range(1, n + 1))])
    return shares(ends[bisect_left(ends, True, key=lambda factor: shares(factor).sum() <= total)])


@dataclass(frozen=True, eq=False)
class _Counts:
    """Each document's own number of clusters; in place of a budget."""

    shares: np.ndarray  # (documents,)
    pool_factor = max_vectors = distance_threshold = None

    def clusters(self, free: np.ndarray, protected: int, span: bool = False) -> np.ndarray:
        return np.minimum(self.shares, free)


def _blocks(lengths: np.ndarray, pool_method: str) -> Iterator[np.ndarray]:
    return blocks(4 * lengths**2, SPAN_BLOCK_BYTES if pool_method == "span" else BLOCK_BYTES)


def _pad(documents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(documents, tokens, dim) and a mask (documents, tokens), on the documents' device."""
    vectors = pad_sequence(documents, batch_first=True)
    lengths = torch.tensor([len(document) for document in documents])
    mask = torch.arange(vectors.shape[1]) < lengths[:, None]
    return vectors, mask.to(vectors.device)


def _check_weights(weights: Sequence[Any] | None, lengths: np.ndarray) -> list[torch.Tensor] | None:
    if weights is None:
        return None
    found = [torch.as_tensor(weight, dtype=torch.float64) for weight in weights]
    shapes = [tuple(weight.shape) for weight in found]
    if shapes != [(length,) for length in lengths] or any((w <= 0).any() for w in found):
        raise UserError(
            f"weights are of shapes {shapes[:3]} … for documents of {lengths[:3].tolist()} … "
            "vectors; expected a number above 0 for each vector of each document."
        )
    return found


def _weighted_means(
    vectors: torch.Tensor, index: torch.Tensor, segments: int, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_means`, of vectors that stand for `weights` (n,) tokens each; sizes are sums of them."""
    weights = weights.to(_wide(vectors))[:, None]
    sums, count = _means(torch.cat([_wide(vectors) * weights, weights], dim=1), index, segments)
    means = sums[:, :-1] / sums[:, -1:].clamp(min=torch.finfo(sums.dtype).tiny)
    return means.to(vectors.dtype), sums[:, -1] * count


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
    lengths: np.ndarray, budgets: dict[Any, Any], protected_tokens: int
) -> dict[Any, tuple[torch.Tensor, list[int]]]:
    """As `_segments`, for concatenated documents with `lengths` tokens that are pooled by span."""
    protected = np.minimum(lengths, protected_tokens)
    first = np.cumsum(lengths) - lengths  # tokens before each document
    # a token's place among the unprotected ones of its document, negative for a protected one
    place = np.arange(lengths.sum()) - np.repeat(first + protected, lengths)
    found = {}
    for given, budget in budgets.items():
        clusters = budget.clusters(lengths - protected, protected_tokens, True)
        counts = protected + clusters
        start = np.cumsum(counts) - counts + protected
        free, groups = (np.repeat(x, lengths) for x in (lengths - protected, clusters))
        group = np.where(place < 0, place, _span_group(place, free, groups, budget))
        found[given] = torch.from_numpy(group + np.repeat(start, lengths)), counts.tolist()
    return found


def _span_group(place: Any, free: Any, groups: Any, budget: Any) -> Any:
    """Group of the token at a place among `free` ones, of arrays or tensors of whole numbers.

    `groups` of the pool factor's size, the last one smaller; or as even as can be.
    """
    if (factor := budget.pool_factor) is None:
        return place * groups // (free + (free == 0))
    if factor == int(factor):
        return place // int(factor)
    whole = (place / factor + 1e-9) // 1
    return whole.astype(np.int64) if isinstance(whole, np.ndarray) else whole.long()


def pool_groups(vectors: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    """Raw means (groups, dim) of vectors (tokens, dim) by labels 0, 1, 2, … (tokens,)."""
    index = torch.as_tensor(labels, device=vectors.device)
    return _means(vectors, index, int(index.max()) + 1 if len(index) else 0)[0]


def pool_padded(
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    pool_factor: float | Budget,
    pool_method: PoolMethod,
    protected_tokens: int = 1,
    *,
    variant: PoolVariant = DEFAULT_VARIANT,
    use_sklearn: bool = False,
    renormalize: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool a padded batch, as training has it; see `pool`.

    `pool_factor` may also be a `Budget` of a number of vectors.

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
    budget = Budget.of(pool_factor)
    check_pooling(pool_method, variant)
    protected = check_protected_tokens(protected_tokens)
    budget.check(pool_method, protected, use_sklearn)
    mask = mask.bool()
    if budget.pool_factor == 1 or pool_method == "none":
        return embeddings, mask
    found = assign(embeddings, mask, [budget], pool_method, protected, variant, use_sklearn)
    labels = found[budget]
    documents, tokens, dim = embeddings.shape
    vectors = pooled_count(tokens, budget, pool_method, protected)
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
    budgets: Sequence[float | Budget],
    pool_method: PoolMethod,
    protected_tokens: int = 1,
    variant: PoolVariant = DEFAULT_VARIANT,
    use_sklearn: bool = False,
) -> dict[Any, np.ndarray]:
    """`assign` for one document, (tokens, dim): pool factor or budget → (tokens,) int64 labels."""
    batch = torch.tensor(vectors)[None]
    mask = torch.ones(batch.shape[:2], dtype=torch.bool)
    labels = assign(batch, mask, budgets, pool_method, protected_tokens, variant, use_sklearn)
    return {budget: found[0].numpy() for budget, found in labels.items()}


@torch.no_grad()
def assign(
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    budgets: Sequence[Any],
    pool_method: str,
    protected_tokens: int = 1,
    variant: str = DEFAULT_VARIANT,
    use_sklearn: bool = False,
    sizes: np.ndarray | None = None,
    trees: Trees | None = None,
) -> dict[Any, torch.Tensor]:
    """Which pooled vector each token of a padded batch goes to.

    `embeddings` are (documents, tokens, dim), L2-normalised, and `mask` (documents, tokens) bool.
    `budgets` are pool factors or `Budget`; `sizes` (documents, tokens) are `pool`'s weights, and
    `trees` those that were grown before.
    Returns, per budget, (documents, tokens) int64 labels 0, 1, 2, … in order of first occurrence,
    the protected tokens first, each alone; −1 where the mask is false.

    Raises
    ------
    UserError
        For vectors that are not finite (span does not look on a GPU, where looking means waiting),
        or longer than 1 with variant ``pylate``.
    """
    rank = mask.cumsum(dim=1) - 1  # of a token among those that count
    whole = torch.where(mask, rank, -1)
    free = mask & (rank >= protected_tokens)
    labels = dict.fromkeys(budgets, whole)
    asked = {b: b if isinstance(b, _Counts) else Budget.of(b) for b in labels}
    asked = {b: budget for b, budget in asked.items() if budget.pool_factor != 1}
    if not asked or pool_method == "none" or not mask.numel():
        return labels
    if pool_method == "span":
        if embeddings.is_cpu:
            _check_finite((embeddings.isfinite().all(dim=2) | ~mask).all())
        found = _span_labels(rank - protected_tokens, free, asked, protected_tokens)
    else:
        # Under autocast, the products in here would be half precision.
        with torch.autocast(embeddings.device.type, enabled=False):
            wide = _wide(embeddings).masked_fill(~mask[:, :, None], 0)  # what is masked may be NaN
            if use_sklearn and pool_method == "kmeans":
                found = _sklearn_kmeans(wide, free, asked, protected_tokens, sizes)
            else:
                grown = _Grown(wide, free, pool_method, variant, sizes, trees)
                found = grown.labels(asked, protected_tokens)
    protected = rank.clamp(max=protected_tokens - 1).amax(dim=1, keepdim=True) + 1
    for budget in asked:
        labels[budget] = torch.where(free, found[budget] + protected, whole)
    return labels


def _span_labels(
    place: torch.Tensor, free: torch.Tensor, budgets: dict[Any, Any], protected_tokens: int
) -> dict[Any, torch.Tensor]:
    """Groups of neighbours, by each token's place among the free ones (documents, tokens)."""
    count, found = free.sum(dim=1, keepdim=True), {}
    for given, budget in budgets.items():
        most = budget.max_vectors
        groups = count if most is None else count.clamp(max=most - protected_tokens)
        found[given] = _span_group(place, count, groups, budget)
    return found


class _Grown:
    """The Ward trees of a padded batch, and what cutting them needs; on the host.

    For the arguments see `assign`; `vectors` are zero where they are masked.
    """

    def __init__(
        self,
        vectors: torch.Tensor,
        free: torch.Tensor,
        pool_method: str,
        variant: str,
        sizes: np.ndarray | None = None,
        trees: Trees | None = None,
    ) -> None:
        self.kmeans, self.sizes, self.device = pool_method == "kmeans", sizes, vectors.device
        self.threads = torch.get_num_threads()
        if trees is not None and not self.kmeans:  # nothing but cutting is left to do
            self.free, self.trees = free.cpu().numpy(), trees
            return
        if self.kmeans:
            variant = "euclidean"
        elif variant != "pylate":  # PyLate's products are float32; SciPy's distances are float64
            vectors = vectors.double()
        distances, norms, same = _distances(vectors, free, variant)
        parts = [distances.flatten(1), norms, same, free.to(distances)]
        if not distances.is_cpu:  # everything travels in one copy, and the labels back in one
            widths = [part.shape[1] for part in parts]
            parts = torch.cat(parts, dim=1).cpu().split(widths, dim=1)
        self.square = parts[0].reshape(distances.shape).numpy()
        self.same, self.free = parts[2].double().numpy(), parts[3].numpy() > 0
        cosines = variant == "pylate"
        _check_vectors(self.square, parts[1].numpy(), self.free, cosines)
        self.trees = trees or ward_trees(
            self.square, self.free, self.same, self.threads, cosines, sizes
        )

    def labels(self, budgets: dict[Any, Any], protected_tokens: int) -> dict[Any, torch.Tensor]:
        """Budget → labels (documents, tokens) of the free tokens, from 0."""
        free, counts = self.free.sum(axis=1), []
        for budget in budgets.values():
            if (height := budget.distance_threshold) is not None:
                counts.append(free - (np.sqrt(self.trees.heights) <= height).sum(axis=1))
            else:
                counts.append(budget.clusters(free, protected_tokens))
        counts = np.stack(counts, axis=1)
        labels = cut_trees(self.trees, self.free, counts, not self.kmeans, self.threads)
        if self.kmeans:
            labels = lloyd(
                self.square, self.free, labels, self.same, self.threads, sizes=self.sizes
            )
        found = torch.from_numpy(labels).to(self.device)  # (documents, budgets, tokens)
        return {budget: found[:, cut] for cut, budget in enumerate(budgets)}


def _distances(
    vectors: torch.Tensor, free: torch.Tensor, variant: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What Ward's tree is grown from, (documents, tokens, tokens), and norms, see `ward_trees`.

    Squared distances, or products for variant ``pylate``; squared norms and what counts as the same
    are (documents, tokens).
    """
    norms = vectors.square().sum(dim=2)
    if variant == "euclidean":
        return squared_distances(vectors), norms, SAME[norms.dtype] * norms
    # (documents, tokens, tokens)
    products = torch.bmm(vectors, vectors.transpose(1, 2), out=new_square(vectors))
    if variant == "pylate":
        # 1 - cos is half the squared distance of unit vectors, and is squared once more; vectors of
        # any dtype may have been normalised in float32
        return products, norms, (SAME[torch.float32] * norms).square() / 4
    both = free[:, :, None] & free[:, None, :]
    rows = (1 - products).masked_fill_(~both, 0)  # read as observations
    return squared_distances(rows), norms, SAME[rows.dtype] * rows.square().sum(dim=2)


def _block_trees(
    embeddings: list[torch.Tensor],
    lengths: np.ndarray,
    pool_method: str,
    protected_tokens: int,
    variant: str,
) -> Iterator[tuple[np.ndarray, Trees]]:
    """Positions of the documents of each block, in the order of `_pool`, and their trees."""
    for block in _blocks(lengths, pool_method):
        vectors, mask = _pad([embeddings[i] for i in block])
        with torch.no_grad():
            free = mask & (mask.cumsum(dim=1) > protected_tokens)
            yield block, _Grown(_wide(vectors), free, pool_method, variant).trees


def _check_vectors(square: np.ndarray, norms: np.ndarray, free: np.ndarray, cosines: bool) -> None:
    _check_finite(np.isfinite(norms).all())
    if not cosines:  # the tree adds up to so many of them
        with np.errstate(over="ignore"):
            _check_finite(np.isfinite(np.float64(square.max(initial=0)) * 4 * square.shape[1]))
    elif (longest := norms[free].max(initial=0)) > 1 + ROUNDING:  # distances would be negative
        raise UserError(
            f"A vector has length {math.sqrt(longest):.3g}; expected at most 1: L2-normalised "
            "token vectors (leave normalize_embeddings=True), or variant='euclidean'."
        )


def _check_finite(finite: Any) -> None:
    if not finite:
        raise UserError(
            "The embeddings hold NaN or infinite values, which cannot be pooled; expected "
            "L2-normalised token vectors. Check the model that made them (half precision?)."
        )


def _sklearn_kmeans(
    vectors: torch.Tensor,
    free: torch.Tensor,
    budgets: dict[Any, Any],
    protected_tokens: int,
    sizes: np.ndarray | None,
) -> dict[Any, torch.Tensor]:
    """scikit-learn's k-means, one document and budget after another."""
    # float64 spares scikit-learn the chunked upcasts that it makes for float32: 1.4 times faster.
    documents = vectors.cpu().double().numpy()
    _check_finite(np.isfinite(documents).all())
    rows = free.cpu().numpy()
    clusters = {
        given: budget.clusters(rows.sum(axis=1), protected_tokens)
        for given, budget in budgets.items()
    }
    labels = {given: np.zeros(rows.shape, dtype=np.int64) for given in budgets}
    with (
        _threads().limit(limits=1),  # more threads make such small fits several times slower
        sklearn.config_context(assume_finite=True, skip_parameter_validation=True),
        warnings.catch_warnings(),
    ):
        # Identical vectors make fewer clusters than asked for; that is right and needs no warning.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for i, row in enumerate(rows):
            n, weight = int(row.sum()), None if sizes is None else sizes[i, row]
            for given, counts in clusters.items() if n else ():
                fitted = kmeans_settings(n, int(counts[i])).fit(documents[i, row], None, weight)
                labels[given][i, row] = by_first_occurrence(fitted.labels_)
    return {given: torch.from_numpy(array).to(vectors.device) for given, array in labels.items()}


def kmeans_settings(n: int, k: int) -> KMeans:
    """scikit-learn's k-means with the paper's settings for n vectors in k clusters."""
    iterations = min(max(12 + math.ceil(6 * math.log2(max(n / k, 2))), 20), 50)
    return KMeans(
        k, init="k-means++", n_init=1, random_state=KMEANS_SEED, tol=1e-4, max_iter=iterations
    )


_threads = functools.cache(ThreadpoolController)  # looking for the libraries takes long
