"""Clustering many small sets of vectors at once: Ward's trees, and k-means that starts from them.

Squared distances within each set, (sets, n, n), and a mask give one label per vector. A tree is
grown once and cut at any number of places. Everything works on distances alone, in compiled code on
the CPU, with threads over the sets: a squared distance to a centre follows from those to its
members, so k-means never touches the vectors, and a step takes n² additions, not n · k · dim.

Sources: D. Müllner, *Modern hierarchical, agglomerative clustering algorithms* (2011), for the
nearest-neighbour chain; S. Lloyd, *Least squares quantization in PCM* (1982), for the steps of
k-means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba
import numpy as np
import torch

# Python's own check of a divisor would keep loops from taking several numbers at a time.
COMPILED = numba.njit(nogil=True, cache=True, error_model="numpy")
LLOYD_STEPS = 10  # from Ward's cut, most sets stand still after two or three
_INFINITY = np.array(np.inf).view(np.int64)[()]  # its bits


def squared_distances(vectors: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances within each set: (sets, n, dim) → (sets, n, n)."""
    norms = vectors.square().sum(dim=2)  # (sets, n)
    sums = torch.add(norms[:, :, None], norms[:, None, :], out=new_square(vectors))
    return sums.baddbmm_(vectors, vectors.transpose(1, 2), alpha=-2).clamp_(min=0)


def new_square(vectors: torch.Tensor) -> torch.Tensor:
    """A tensor (sets, n, n) to be filled, for vectors (sets, n, dim) of a dtype that NumPy has.

    NumPy asks Linux for pages of 2 MiB, torch does not: from 2,000 tokens on, a third of the time
    went by in giving out those of 4 KiB.
    """
    shape = (*vectors.shape[:2], vectors.shape[1])
    if not vectors.is_cpu:
        return vectors.new_empty(shape)
    return torch.from_numpy(np.empty(shape, str(vectors.dtype).removeprefix("torch.")))


class Trees(NamedTuple):
    """Ward's tree of each set.

    Attributes
    ----------
    merges
        (sets, n − 1, 2) int32: two members whose clusters join, lowest first; members are counted
        from 0 among those of a set.
    heights
        (sets, n − 1) float64, ascending: squared heights as SciPy's ``linkage`` has them; infinite
        behind a set's last merge.
    """

    merges: np.ndarray
    heights: np.ndarray


def ward_trees(
    distances: np.ndarray,
    mask: np.ndarray,
    same: np.ndarray,
    threads: int = 1,
    cosines: bool = False,
    sizes: np.ndarray | None = None,
) -> Trees:
    """Grow Ward's tree of each set.

    Parameters
    ----------
    distances
        (sets, n, n) squared distances, float32 or float64. With `cosines`, products of unit
        vectors: the distance is then 1 - cosine, or 0 where rounding makes that negative.
    mask
        (sets, n) bool: which vectors take part.
    same
        (sets, n) squared distances of two vectors up to the mean of their two values are rounding
        and count as 0: such vectors are never parted, which can give fewer clusters.
    threads
        Number of threads; each takes some of the sets.
    cosines
        Whether `distances` holds products of unit vectors.
    sizes
        (sets, n) float64: how many vectors each one is the mean of; 1 by default. The tree of means
        goes on where that of their members stopped.
    """
    sets, n = mask.shape
    sizes = np.ones(mask.shape) if sizes is None else sizes
    merges = np.zeros((sets, max(n - 1, 0), 2), dtype=np.int32)
    trees = Trees(merges, np.full(merges.shape[:2], np.inf))
    arrays = (distances, mask, same, sizes, *trees)
    # Rows of an odd number of cache lines: those of a power of two would bring a column's numbers
    # into few places of a cache.
    room = (n, 8 * (math.ceil(n / 8) | 1))

    def grow(part: slice) -> None:
        _ward_trees(*(a[part] for a in arrays), cosines, np.empty(room))

    _over_sets(grow, sets, threads)
    return trees


def cut_trees(
    trees: Trees, mask: np.ndarray, counts: np.ndarray, ties: bool, threads: int = 1
) -> np.ndarray:
    """Cut trees into each of several numbers of clusters.

    `counts` are (sets, cuts) int64. With `ties`, merges of equal height are all made or none, as
    SciPy's ``fcluster(…, criterion="maxclust")`` does, which can give fewer clusters.

    Returns
    -------
    numpy.ndarray
        (sets, cuts, n) int64: labels 0, 1, 2, … in order of first occurrence; −1 outside the mask.
    """
    labels = np.empty((len(mask), counts.shape[1], mask.shape[1]), dtype=np.int64)
    arrays = (*trees, mask, counts, labels)
    _over_sets(lambda part: _cut_trees(*(a[part] for a in arrays), ties), len(mask), threads)
    return labels


def lloyd(
    distances: np.ndarray,
    mask: np.ndarray,
    labels: np.ndarray,
    same: np.ndarray,
    threads: int = 1,
    steps: int = LLOYD_STEPS,
    sizes: np.ndarray | None = None,
) -> np.ndarray:
    """Improve clusterings by Lloyd's steps until no label changes: k-means from a given start.

    The squared distance of x to the mean of a cluster of n vectors is Σ_c d²(x, c) / n −
    Σ_cc' d²(c, c') / (2 n²), summed over its members. A vector moves only to a nearer centre. A
    cluster that loses its last vector takes over the one that is farthest from its own centre,
    unless that is no farther than its `same`.

    Parameters
    ----------
    distances, mask, same, threads, sizes
        As for `ward_trees`; a vector of size s counts as s equal ones.
    labels
        (sets, cuts, n) int64, the start: 0, 1, 2, … inside the mask.
    steps
        Upper limit of their number.

    Returns
    -------
    numpy.ndarray
        (sets, cuts, n) int64, in order of first occurrence; outside the mask as given.
    """
    labels = labels.copy()
    sizes = np.ones(mask.shape) if sizes is None else sizes
    arrays = (distances, mask, labels, same, sizes)

    def improve(part: slice) -> None:
        _lloyd(*(a[part] for a in arrays), steps, np.empty(mask.shape[1] ** 2))

    _over_sets(improve, len(mask), threads)
    return labels


def _over_sets(work: Callable[[slice], None], sets: int, threads: int) -> None:
    """Call `work` with slices that cover ``range(sets)``, on several threads."""
    if threads == 1 or sets < 2:
        return work(slice(0, sets))
    size = math.ceil(sets / (4 * threads))
    with ThreadPoolExecutor(threads) as pool:
        # list: an exception of a thread is raised here
        list(pool.map(work, [slice(start, start + size) for start in range(0, sets, size)]))


@COMPILED
def _ward_trees(
    distances, mask, same, sizes, merges, heights, cosines, buffer
):  # pragma: no cover (compiled)
    for i in range(len(mask)):
        members = np.flatnonzero(mask[i])
        n = len(members)
        # a copy: growing the tree uses it up; float64, for merges round again and again
        among = buffer[:n]
        _copy_among(distances[i], members, same[i], cosines, among)
        size = sizes[i][members]
        if (size != 1).any():  # as far apart as Ward's criterion has clusters of such sizes
            for j in range(n):
                for k in range(n):
                    among[j, k] *= 2 * size[j] * size[k] / (size[j] + size[k])
        first, second, found = _nearest_neighbour_chain(among, size)
        order = np.argsort(found, kind="mergesort")  # stable: children stay before parents
        for j in range(n - 1):
            merges[i, j, 0], merges[i, j, 1] = first[order[j]], second[order[j]]
            heights[i, j] = found[order[j]]


@COMPILED
def _cut_trees(merges, heights, mask, counts, labels, ties):  # pragma: no cover (compiled)
    for i in range(len(mask)):
        members = np.flatnonzero(mask[i])
        n = len(members)
        labels[i] = -1
        for cut in range(counts.shape[1]):
            made = max(n - counts[i, cut], 0)
            while 0 < made < n - 1:  # equal heights
                height = heights[i, made]
                if height > heights[i, made - 1] or (height > 0 and not ties):
                    break
                made += 1
            _join(merges[i, :made], members, labels[i, cut])


@COMPILED
def _copy_among(distances, members, same, cosines, among):  # pragma: no cover (compiled)
    """Fill `among` (n, n), which a tree is grown from, with the distances between a set's members.

    Where the members stand side by side, as they do in documents without masked tokens, a row is
    read as it stands, several numbers at a time.
    """
    n = len(members)
    side_by_side = n > 0 and members[n - 1] - members[0] == n - 1
    near = same[members] / 2
    zero, one = distances.dtype.type(0), distances.dtype.type(1)
    for i in range(n):
        row = distances[members[i]]
        row = row[members[0] : members[0] + n] if side_by_side else row[members]
        if cosines:
            for j in range(n):
                apart = max(one - row[j], zero)  # that of equal vectors can come out as -1e-7
                squared = np.float64(apart * apart)
                among[i, j] = 0.0 if squared <= near[i] + near[j] else squared
        else:
            for j in range(n):
                squared = np.float64(row[j])
                among[i, j] = 0.0 if squared <= near[i] + near[j] else squared
        among[i, i] = np.inf  # nothing is its own neighbour


@COMPILED
def _nearest_neighbour_chain(distances, size):  # pragma: no cover (compiled)
    """Merges of Ward's tree, unordered: vectors `first` and `second` join at squared `heights`.

    `size` are floats, for they are multiplied with distances; both arrays are used up.

    A cluster is named by its last vector, and has that vector's slot: a row and a column. When half
    of the slots are empty, the others move together: rows are shorter then, and in a nearer cache.
    """
    n = len(distances)
    name = np.arange(n)  # of the cluster in each slot
    empty = np.zeros(n, distances.dtype)  # infinity where a slot is empty, whatever its distances
    first = np.empty(max(n - 1, 0), np.int64)
    second = np.empty(max(n - 1, 0), np.int64)
    heights = np.empty(max(n - 1, 0), distances.dtype)
    chain = np.empty(n, np.int64)
    length = 0
    slots = n
    for merge in range(n - 1):
        if 2 * (n - merge) <= slots:
            slots = _move_together(distances, name, size, empty, chain[:length], slots)
        if length == 0:
            chain[0] = 0
            while size[chain[0]] == 0:
                chain[0] += 1
            length = 1
        while True:  # until the two last in the chain are each other's nearest
            x = chain[length - 1]
            row = distances[x, :slots]
            y = _nearest(row, empty[:slots])
            nearest = row[y]
            if length > 1 and row[chain[length - 2]] == nearest:
                y = chain[length - 2]
                break
            chain[length] = y
            length += 1
        length -= 2
        if x > y:
            x, y = y, x
        first[merge], second[merge], heights[merge] = name[x], name[y], nearest
        nx, ny = size[x], size[y]
        size[x], size[y], empty[x] = 0, nx + ny, np.inf
        gone, kept = distances[x], distances[y]
        for i in range(slots):  # Lance and Williams' formula; at y itself it stays infinite
            ni = size[i]
            kept[i] = ((ni + nx) * gone[i] + (ni + ny) * kept[i] - ni * nearest) / (ni + nx + ny)
        for i in range(slots):
            distances[i, y] = kept[i]
    return first, second, heights


@COMPILED
def _move_together(distances, name, size, empty, chain, slots):  # pragma: no cover (compiled)
    """Move the clusters to the first slots, in place and in order; returns their number."""
    used = np.flatnonzero(size[:slots])
    target = np.empty(slots, np.int64)
    for to, i in enumerate(used):
        target[i] = to
        name[to], size[to], empty[to] = name[i], size[i], 0
        for column, j in enumerate(used):  # never to a place that is still to be read
            distances[to, column] = distances[i, j]
    for i in range(len(chain)):
        chain[i] = target[chain[i]]
    return len(used)


@COMPILED
def _nearest(row, empty):  # pragma: no cover (compiled)
    """The first of the slots with the least distance that are not empty.

    Numbers that are not negative have the order of their bits; of integers, but not of floats, a
    compiler finds the least several at a time.
    """
    values, more = row.view(np.int64), empty.view(np.int64)
    least, at = _INFINITY, 0
    for start in range(0, len(values), 32):
        best = _INFINITY
        for i in range(start, min(start + 32, len(values))):
            best = min(best, values[i] | more[i])
        if best < least:
            least, at = best, start
    while values[at] | more[at] != least:
        at += 1
    return at


@COMPILED
def _join(merges, members, labels):  # pragma: no cover (compiled)
    """Labels, by first occurrence, after the given merges."""
    parent = np.arange(len(members))
    for merge in range(len(merges)):
        x, y = merges[merge, 0], merges[merge, 1]
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


@COMPILED
def _lloyd(distances, mask, labels, same, sizes, steps, sums):  # pragma: no cover (compiled)
    buffer = np.empty(mask.shape[1] ** 2, distances.dtype)
    for i in range(len(mask)):
        members = np.flatnonzero(mask[i])
        n = len(members)
        if n > 1:
            among, start = distances[i], members[0]
            if members[n - 1] - start != n - 1:  # not side by side
                among, start = buffer[: n * n].reshape(n, n), 0
                for j in range(n):
                    for k in range(n):
                        among[j, k] = distances[i, members[j], members[k]]
            for cut in range(labels.shape[1]):
                moved = labels[i, cut][members]
                _refine(among, start, moved, same[i][members], sizes[i][members], steps, sums)
                _rename(moved)
                labels[i, cut][members] = moved


@COMPILED
def _add(total, times, row):  # pragma: no cover (compiled)
    for i in range(len(total)):
        total[i] += times * row[i]


@COMPILED
def _refine(distances, start, labels, same, sizes, steps, buffer):  # pragma: no cover (compiled)
    """Lloyd's steps for one set, in place; labels, same, sizes (n,).

    The set's distances are those of `distances` from row and column `start` on.
    """
    n = len(labels)
    clusters = labels.max() + 1
    count = np.zeros(clusters, np.int64)  # of vectors
    weight = np.zeros(clusters)
    # of each vector's squared distances to the cluster's members
    sums = buffer[: clusters * n].reshape(clusters, n)
    sums[:] = 0
    for j in range(n):
        weight[labels[j]] += sizes[j]
        _add(sums[labels[j]], sizes[j], distances[start + j, start : start + n])
    nearest = np.empty(n, np.int64)
    least = np.empty(n)  # squared distance to the nearest centre
    for _ in range(steps):
        inertia = np.zeros(clusters)
        for j in range(n):
            inertia[labels[j]] += sizes[j] * sums[labels[j], j]
        for j in range(n):  # ties go to the present cluster, then to the smaller number
            k = labels[j]
            nearest[j] = k
            least[j] = sums[k, j] / weight[k] - inertia[k] / (2 * weight[k] ** 2)
        for k in range(clusters):
            if weight[k] > 0:
                share = 1 / weight[k]
                half = inertia[k] * share * share / 2
                for j in range(n):
                    squared = sums[k, j] * share - half
                    if squared < least[j]:
                        least[j] = squared
                        nearest[j] = k
        count[:] = 0
        for j in range(n):
            count[nearest[j]] += 1
        for k in range(clusters):
            if count[k] == 0:
                farthest = -1
                for j in range(n):
                    if count[nearest[j]] > 1 and (farthest < 0 or least[j] > least[farthest]):
                        farthest = j
                if farthest >= 0 and least[farthest] > same[farthest]:
                    count[nearest[farthest]] -= 1
                    count[k] = 1
                    nearest[farthest] = k
        changed = False
        for j in range(n):
            if nearest[j] != labels[j]:
                changed = True
                row = distances[start + j, start : start + n]
                _add(sums[labels[j]], -sizes[j], row)
                _add(sums[nearest[j]], sizes[j], row)
                weight[labels[j]] -= sizes[j]
                weight[nearest[j]] += sizes[j]
                labels[j] = nearest[j]
        if not changed:
            break


@COMPILED
def _rename(labels):  # pragma: no cover (compiled)
    """Rename labels, in place, to 0, 1, 2, … in the order in which they first occur."""
    names = np.full(labels.max() + 1, -1)
    found = 0
    for j in range(len(labels)):
        if names[labels[j]] < 0:
            names[labels[j]] = found
            found += 1
        labels[j] = names[labels[j]]


@COMPILED
def segment_sums(vectors, index, segments):  # pragma: no cover (compiled)
    """Sums (segments, dim) and sizes (segments,) of vectors (n, dim) by their segment (n,).

    Vectors whose segment is `segments` take no part. They are added in their order.
    """
    sums = np.zeros((segments, vectors.shape[1]), vectors.dtype)
    sizes = np.zeros(segments, np.int64)
    for i in range(len(vectors)):
        segment = index[i]
        if segment < segments:
            sizes[segment] += 1
            for j in range(vectors.shape[1]):
                sums[segment, j] += vectors[i, j]
    return sums, sizes


def by_first_occurrence(labels: np.ndarray) -> np.ndarray:
    """Rename labels (n,) to 0, 1, 2, … in the order in which they first occur."""
    renamed = labels.astype(np.int64)
    if len(renamed):
        _rename(renamed)
    return renamed
