"""Clustering many small sets of vectors at once: Ward's trees, and k-means that starts from them.

Takes the squared distances within each set, (sets, n, n), and a mask; gives one label a vector. A
tree is grown once and cut at any number of places. Both work on distances alone, in compiled code
on the CPU, threads over the sets: a squared distance to a centre follows from those to its members,
so k-means never touches the vectors, and a step takes n² additions instead of n · k · dim.

Sources: D. Müllner, *Modern hierarchical, agglomerative clustering algorithms* (2011), for the
nearest-neighbour chain; S. Lloyd, *Least squares quantization in PCM* (1982), for the steps of
k-means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

LLOYD_STEPS = 10  # from Ward's cut, most sets stand still after two or three


def squared_distances(vectors: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances within each set: (sets, n, dim) → (sets, n, n)."""
    norms = vectors.square().sum(dim=2)  # (sets, n)
    sums = norms[:, :, None] + norms[:, None, :]
    return sums.baddbmm_(vectors, vectors.transpose(1, 2), alpha=-2).clamp_(min=0)


def ward_labels(
    distances: np.ndarray,
    mask: np.ndarray,
    counts: np.ndarray,
    same: np.ndarray,
    ties: bool,
    threads: int = 1,
) -> np.ndarray:
    """Grow Ward's tree of each set and cut it into each of several numbers of clusters.

    Parameters
    ----------
    distances
        (sets, n, n) squared distances, float32 or float64.
    mask
        (sets, n) bool: which vectors take part.
    counts
        (sets, cuts) int64: how many clusters are wanted.
    same
        (sets,) distances up to this are rounding and count as 0: their vectors are never parted,
        which can give fewer clusters.
    ties
        Whether merges of equal height are all made or none, as SciPy's
        ``fcluster(…, criterion="maxclust")`` does, which gives fewer clusters too.
    threads
        Sets are shared out among so many.

    Returns
    -------
    numpy.ndarray
        (sets, cuts, n) int64: labels 0, 1, 2, … in order of first occurrence; −1 outside the mask.
    """
    labels = np.empty((len(mask), counts.shape[1], mask.shape[1]), dtype=np.int64)
    arrays = (distances, mask, counts, same, labels)
    _over_sets(lambda part: _ward_labels(*(a[part] for a in arrays), ties), len(mask), threads)
    return labels


def lloyd(
    distances: np.ndarray,
    mask: np.ndarray,
    labels: np.ndarray,
    same: np.ndarray,
    threads: int = 1,
    steps: int = LLOYD_STEPS,
) -> np.ndarray:
    """Improve clusterings by Lloyd's steps until no label changes: k-means from a given start.

    The squared distance of x to the mean of a cluster C is Σ_c d²(x, c) / |C| − Σ_cc' d²(c, c') /
    (2 |C|²). A vector moves only to a nearer centre. A cluster that loses its last vector takes
    over the one that is farthest from its own centre, unless that is no farther than `same`.

    Parameters
    ----------
    distances, mask, same, threads
        As for `ward_labels`.
    labels
        (sets, cuts, n) int64, the start: 0, 1, 2, … inside the mask.
    steps
        At most so many.

    Returns
    -------
    numpy.ndarray
        (sets, cuts, n) int64, in order of first occurrence; outside the mask as given.
    """
    labels = labels.copy()
    arrays = (distances, mask, labels, same)
    _over_sets(lambda part: _lloyd(*(a[part] for a in arrays), steps), len(mask), threads)
    return labels


def _over_sets(work: Callable[[slice], None], sets: int, threads: int) -> None:
    """Call `work` with slices that cover ``range(sets)``, on several threads."""
    if threads == 1 or sets < 2:
        return work(slice(0, sets))
    size = math.ceil(sets / (4 * threads))
    with ThreadPoolExecutor(threads) as pool:
        # list: an exception of a thread is raised here
        list(pool.map(work, [slice(start, start + size) for start in range(0, sets, size)]))


@numba.njit(nogil=True, cache=True)
def _ward_labels(distances, mask, counts, same, labels, ties):  # pragma: no cover (compiled)
    for i in range(len(mask)):
        members = np.flatnonzero(mask[i])
        n = len(members)
        labels[i] = -1
        # a copy: growing the tree uses it up; float64, for merges round again and again
        among = _among(distances[i], members, np.float64)
        first, second, heights = _nearest_neighbour_chain(among, same[i])
        order = np.argsort(heights, kind="mergesort")  # stable: children stay before parents
        for cut in range(counts.shape[1]):
            merges = max(n - counts[i, cut], 0)
            while 0 < merges < n - 1:  # equal heights
                height = heights[order[merges]]
                if height > heights[order[merges - 1]] or (height > 0 and not ties):
                    break
                merges += 1
            _join(first, second, order[:merges], members, labels[i, cut])


@numba.njit(nogil=True, cache=True)
def _among(distances, members, dtype):  # pragma: no cover (compiled)
    n = len(members)
    among = np.empty((n, n), dtype)
    for i in range(n):
        for j in range(n):
            among[i, j] = distances[members[i], members[j]]
    return among


@numba.njit(nogil=True, cache=True)
def _nearest_neighbour_chain(distances, same):  # pragma: no cover (compiled)
    """Merges of Ward's tree, unordered: slots `first` and `second` join at squared `heights`."""
    n = len(distances)
    size = np.ones(n, np.int64)  # of the cluster in each slot, 0: none
    first = np.empty(max(n - 1, 0), np.int64)
    second = np.empty(max(n - 1, 0), np.int64)
    heights = np.empty(max(n - 1, 0), distances.dtype)
    for i in range(n):
        for j in range(n):
            if distances[i, j] <= same:
                distances[i, j] = 0
        distances[i, i] = np.inf  # nothing is its own neighbour
    chain = np.empty(n, np.int64)
    length = 0
    for merge in range(n - 1):
        if length == 0:
            chain[0] = 0
            while size[chain[0]] == 0:
                chain[0] += 1
            length = 1
        while True:  # until the two last in the chain are each other's nearest
            x = chain[length - 1]
            nearest = _least(distances[x])
            if length > 1 and distances[x, chain[length - 2]] == nearest:
                y = chain[length - 2]
                break
            y = 0
            while distances[x, y] != nearest:
                y += 1
            chain[length] = y
            length += 1
        length -= 2
        if x > y:
            x, y = y, x
        first[merge], second[merge], heights[merge] = x, y, nearest
        nx, ny = size[x], size[y]
        size[x], size[y] = 0, nx + ny
        for i in range(n):  # Lance and Williams' formula: the new cluster is in slot y
            ni = size[i]
            if ni > 0 and i != y:
                distances[y, i] = (
                    (ni + nx) * distances[x, i] + (ni + ny) * distances[y, i] - ni * nearest
                ) / (ni + nx + ny)
                distances[i, y] = distances[y, i]
                distances[i, x] = np.inf  # slot x is empty
        distances[y, x] = np.inf
    return first, second, heights


# Without NaN the smallest of several can be found in any order, so several at a time.
@numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def _least(values):  # pragma: no cover (compiled)
    least = values[0]
    for value in values:
        least = min(least, value)
    return least


@numba.njit(nogil=True, cache=True)
def _join(first, second, merges, members, labels):  # pragma: no cover (compiled)
    """Labels, by first occurrence, after the given merges."""
    parent = np.arange(len(members))
    for merge in merges:
        x, y = first[merge], second[merge]
        while parent[x] != x:
            x = parent[x]
        while parent[y] != y:
            y = parent[y]
        # the smaller index becomes the root, so every root comes before its members
        parent[max(x, y)] = min(x, y)
    found = 0
    for i in range(len(members)):
        root = i
        while parent[root] != root:
            root = parent[root]
        if root == i:
            labels[members[i]] = found
            found += 1
        else:
            labels[members[i]] = labels[members[root]]


@numba.njit(nogil=True, cache=True)
def _lloyd(distances, mask, labels, same, steps):  # pragma: no cover (compiled)
    for i in range(len(mask)):
        members = np.flatnonzero(mask[i])
        if len(members) > 1:
            among = _among(distances[i], members, distances.dtype)
            for cut in range(labels.shape[1]):
                moved = labels[i, cut][members]
                _refine(among, moved, same[i], steps)
                _rename(moved)
                labels[i, cut][members] = moved


@numba.njit(nogil=True, cache=True)
def _refine(distances, labels, same, steps):  # pragma: no cover (compiled)
    """Lloyd's steps for one set, in place; `distances` (n, n), `labels` (n,)."""
    n = len(labels)
    clusters = labels.max() + 1
    size = np.zeros(clusters, np.int64)
    sums = np.zeros((clusters, n))  # of each vector's squared distances to the cluster's members
    for j in range(n):
        size[labels[j]] += 1
        sums[labels[j]] += distances[j]
    nearest = np.empty(n, np.int64)
    least = np.empty(n)  # squared distance to the nearest centre
    for _ in range(steps):
        spread = np.zeros(clusters)
        for j in range(n):
            spread[labels[j]] += sums[labels[j], j]
        for j in range(n):  # ties go to the present cluster, then to the smaller number
            k = labels[j]
            nearest[j] = k
            least[j] = sums[k, j] / size[k] - spread[k] / (2 * size[k] ** 2)
        for k in range(clusters):
            if size[k] > 0:
                share = 1 / size[k]
                half = spread[k] * share * share / 2
                for j in range(n):
                    squared = sums[k, j] * share - half
                    if squared < least[j]:
                        least[j] = squared
                        nearest[j] = k
        size[:] = 0
        for j in range(n):
            size[nearest[j]] += 1
        for k in range(clusters):
            if size[k] == 0:
                farthest = -1
                for j in range(n):
                    if size[nearest[j]] > 1 and (farthest < 0 or least[j] > least[farthest]):
                        farthest = j
                if farthest >= 0 and least[farthest] > same:
                    size[nearest[farthest]] -= 1
                    size[k] = 1
                    nearest[farthest] = k
        changed = False
        for j in range(n):
            if nearest[j] != labels[j]:
                changed = True
                sums[labels[j]] -= distances[j]
                sums[nearest[j]] += distances[j]
                labels[j] = nearest[j]
        if not changed:
            break


@numba.njit(nogil=True, cache=True)
def _rename(labels):  # pragma: no cover (compiled)
    """Rename labels, in place, to 0, 1, 2, … in the order in which they first occur."""
    names = np.full(labels.max() + 1, -1)
    found = 0
    for j in range(len(labels)):
        if names[labels[j]] < 0:
            names[labels[j]] = found
            found += 1
        labels[j] = names[labels[j]]


def by_first_occurrence(labels: np.ndarray) -> np.ndarray:
    """Rename labels (n,) to 0, 1, 2, … in the order in which they first occur."""
    renamed = labels.astype(np.int64)
    if len(renamed):
        _rename(renamed)
    return renamed
