"""MaxSim search: exact, over every document; and PLAID, PyLate's compressed index.

Token vectors come in any form that `encode` gives (see `pooling.token_vectors`): one (vectors, dim)
tensor or array per text, or a padded batch.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pylate import indexes
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from l2p_utils.files import UserError
from l2p_utils.pooling import blocks, check_whole, token_vectors

logger = logging.getLogger(__name__)

# Small enough that the allocator reuses memory: 1.4 times faster than 256 MiB.
BLOCK_BYTES = 8 * 2**20
PLAID_VECTORS = 10  # fast-plaid holds out a tenth of the vectors, and needs at least one


@dataclass(frozen=True)
class Ranking:
    """What a search found: per query, document ids from best to worst and their MaxSim scores.

    `seconds` is the time of the search, all queries together, without building an index;
    `index_bytes` the index's size on disk (see `index_size`), where there is one.
    """

    documents: list[list[str]]
    scores: list[list[float]]
    seconds: float
    index_bytes: int | None = None


def maxsim_scores(
    queries: Iterable[Any],
    documents: Iterable[Any],
    block_bytes: int = BLOCK_BYTES,
    progress: bool = False,
) -> torch.Tensor:
    """MaxSim(q, d) = Σ_i max_j q_i · d_j of every query with every document, in float32.

    The maximum is over the document's own vectors; padding never takes part. (PyLate's scoring
    multiplies padding's similarity by 0, so its maximum is never below 0 in a padded batch; the two
    differ only for a query token whose every similarity is negative.)

    Parameters
    ----------
    queries, documents
        (vectors, dim) per text, of any lengths.
    block_bytes
        Memory for one block of similarities; documents and queries are taken in blocks that fit.

    Returns
    -------
    torch.Tensor
        (queries, documents), float32. −inf for a document without vectors, 0 for a query without.
    """
    queries, documents = _texts(queries, documents)
    scores = torch.full((len(queries), len(documents)), -torch.inf)
    scored = sum(len(document) > 0 for document in documents) if queries else 0
    with tqdm(total=scored, desc="Late interaction", unit="doc", disable=not progress) as bar:
        for block, found in _score_blocks(queries, documents, block_bytes):
            scores[:, torch.from_numpy(block)] = found
            bar.update(len(block))
    return scores


def _texts(
    queries: Iterable[Any], documents: Iterable[Any], ids: Sequence[str] | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Queries and documents as lists of tensors on the CPU; refuses dims or ids that do not fit."""
    queries = [vectors.detach().cpu() for vectors in token_vectors(queries, "Query")]
    documents = [vectors.detach().cpu() for vectors in token_vectors(documents, "Document")]
    dims = [sorted({vectors.shape[1] for vectors in texts}) for texts in (queries, documents)]
    if len({*dims[0], *dims[1]}) > 1:
        raise UserError(
            f"The queries' dimensions are {dims[0]}, the documents' {dims[1]}; expected one for "
            "all. Encode both with the same model."
        )
    if ids is not None and not len(ids) == len(set(ids)) == len(documents):
        raise UserError(
            f"document_ids holds {len(ids)} ids, {len(set(ids))} of them different, for "
            f"{len(documents)} documents; expected one id per document."
        )
    return queries, documents


def _score_blocks(
    queries: list[torch.Tensor], documents: list[torch.Tensor], block_bytes: int
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Positions of b documents with vectors, and all queries' scores with them, (queries, b)."""
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    if not queries or not lengths.any():
        return
    parts = _query_parts(queries, max(block_bytes // (4 * int(lengths.max())), 1))
    tokens = max(1, *(len(part[0]) for part in parts))
    chosen = list(blocks(4 * tokens * lengths, block_bytes))
    # One buffer for all blocks' similarities: new memory takes as long to come as to be filled.
    buffer = torch.empty(max(len(block) * int(lengths[block[-1]]) for block in chosen) * tokens)
    for block in chosen:
        padded = pad_sequence([documents[i].float() for i in block], batch_first=True)
        padding = torch.arange(padded.shape[1]) >= torch.from_numpy(lengths[block])[:, None]
        # Pad with the document's first vector: duplicates do not affect the maximum.
        padded = torch.where(padding[:, :, None], padded[:, :1], padded)
        yield block, torch.cat([_maxsim(*part, padded, buffer) for part in parts])


def _query_parts(
    queries: list[torch.Tensor], most_tokens: int
) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Queries in groups of up to `most_tokens` tokens: (tokens, dim), each one's query, queries."""
    ends = np.cumsum([len(query) for query in queries])
    parts, start = [], 0
    while start < len(queries):
        before = ends[start - 1] if start else 0
        end = max(int(np.searchsorted(ends, before + most_tokens, side="right")), start + 1)
        group = [query.float() for query in queries[start:end]]
        owner = torch.repeat_interleave(torch.tensor([len(query) for query in group]))
        parts.append((torch.cat(group), owner, len(group)))
        start = end
    return parts


def _maxsim(
    tokens: torch.Tensor,
    owner: torch.Tensor,
    queries: int,
    documents: torch.Tensor,
    buffer: torch.Tensor,
) -> torch.Tensor:
    """Scores (queries, documents) of query tokens with padded documents; overwrites `buffer`."""
    # Tokens last: the product is faster so, and the maximum is one over whole rows.
    vectors = documents.flatten(0, 1)
    similarities = buffer[: len(vectors) * len(tokens)].view(len(vectors), len(tokens))
    torch.mm(vectors, tokens.T, out=similarities)
    best = similarities.unflatten(0, documents.shape[:2]).amax(dim=1)  # (documents, tokens)
    return torch.zeros(queries, len(documents)).index_add_(0, owner, best.T)


def exact_search(
    queries: Iterable[Any],
    documents: Iterable[Any],
    document_ids: Sequence[str],
    top_k: int = 20,
    block_bytes: int = BLOCK_BYTES,
) -> Ranking:
    """The `top_k` best documents of each query by exact MaxSim.

    Equal scores are ordered by document id, descending, as trec_eval does. Documents without
    vectors are never found. Only the best so far are kept: memory beside the vectors does not grow
    with the number of documents.
    """
    check_whole("top_k", top_k, 1, "how many documents per query")
    queries, documents = _texts(queries, documents, document_ids)
    start = time.perf_counter()
    # a document's place in the order of ids, descending: what ties are broken by
    order = sorted(range(len(documents)), key=document_ids.__getitem__, reverse=True)
    place = np.argsort(np.array(order, dtype=np.int64))
    positions = np.empty((len(queries), 0), dtype=np.int64)
    scores = np.empty(positions.shape, dtype=np.float32)
    scored = _score_blocks(queries, documents, block_bytes)
    while some := list(itertools.islice(scored, 64)):  # sorted together: one block is few documents
        seen = np.concatenate([block for block, _ in some])
        seen = np.broadcast_to(seen, (len(queries), len(seen)))
        positions = np.hstack([positions, seen])
        scores = np.hstack([scores, *(found.numpy() for _, found in some)])
        order = np.lexsort((place[positions], -scores), axis=1)[:, :top_k]
        positions = np.take_along_axis(positions, order, axis=1)
        scores = np.take_along_axis(scores, order, axis=1)
    ids = [[document_ids[i] for i in row] for row in positions]
    return Ranking(ids, scores.tolist(), time.perf_counter() - start)


def plaid_search(
    queries: Iterable[Any],
    documents: Iterable[Any],
    document_ids: Sequence[str],
    top_k: int = 20,
    *,
    nbits: int = 4,
    n_ivf_probe: int = 8,
    n_full_scores: int = 8192,
    seed: int = 42,
    folder: str | Path | None = None,
) -> Ranking:
    """The `top_k` best documents of each query through PyLate's PLAID index (fast-plaid).

    fast-plaid L2-normalises vectors when it decompresses them, so pooled means are scored at unit
    length here, while `exact_search` scores them as they are, shorter. Documents without vectors
    are left out. Equal scores are ordered by document id, descending, among the documents that
    fast-plaid returns; which of them it returns at the last rank is its own choice. It makes no
    index of fewer than ten vectors: those are searched exactly, at unit length, with a warning.

    `nbits`, `n_ivf_probe` and `n_full_scores` are the paper's by default; `seed` is that of the
    index's centroids, and the caller's random numbers are left alone. The index is built in
    `folder`; by default in a temporary one, deleted afterwards.
    """
    check_whole("top_k", top_k, 1, "how many documents per query")
    queries, documents = _texts(queries, documents, document_ids)
    kept = [i for i, document in enumerate(documents) if len(document)]
    vectors = sum(len(document) for document in documents)
    if not vectors or not queries:  # fast-plaid makes no empty index and takes no empty batch
        return exact_search(queries, documents, document_ids)
    if vectors < PLAID_VECTORS:
        logger.warning(
            "PLAID needs at least %d vectors; these %d are searched exactly, without an index.",
            PLAID_VECTORS, vectors,
        )  # fmt: skip
        unit = [normalize(document.float(), dim=1) for document in documents]
        return exact_search(queries, unit, document_ids, top_k)
    with contextlib.ExitStack() as stack:
        place = folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="l2p-plaid-"))
        options = {"nbits": nbits, "n_ivf_probe": n_ivf_probe, "n_full_scores": n_full_scores}
        built = [documents[i].float() for i in kept], [document_ids[i] for i in kept]
        index = plaid_index(place, *built, seed=seed, **options)
        size = index_size(place)
        start = time.perf_counter()
        found = plaid_ranking(index, queries, min(top_k, len(kept)))
        seconds = time.perf_counter() - start
    ids = [[name for _, name in row] for row in found]
    return Ranking(ids, [[score for score, _ in row] for row in found], seconds, size)


def plaid_index(
    folder: str | Path,
    documents: list[torch.Tensor] | None = None,
    ids: list[str] | None = None,
    seed: int = 42,
    **options: Any,
) -> indexes.PLAID:
    """PyLate's PLAID index in `folder`: opened, or built of documents (float32) and their ids."""
    with contextlib.redirect_stdout(io.StringIO()), _seeded(seed):
        # fast-plaid draws the documents for its centroids before it sets its seed.
        index = indexes.PLAID(
            index_folder=str(folder),
            index_name="index",
            override=documents is not None,
            seed=seed,
            num_threads=1,
            show_progress=False,
            **options,
        )
        if documents is not None:
            index.add_documents(documents_ids=ids, documents_embeddings=documents)
    return index


def plaid_ranking(
    index: indexes.PLAID, queries: list[torch.Tensor], k: int
) -> list[list[tuple[float, str]]]:
    """Scores and ids of the `k` best documents of each query; equal scores by id, descending."""
    with contextlib.redirect_stdout(io.StringIO()):
        found = index([query.float() for query in queries], k=k)
    return [sorted(((float(h["score"]), h["id"]) for h in hits), reverse=True) for hits in found]


def index_size(folder: str | Path) -> int:
    """Bytes of an index on disk, without two copies that fast-plaid keeps beside it.

    ``embeddings.npy`` are the uncompressed vectors of a small index, up to about a thousand
    documents; ``merged_*`` the codes and residuals once more, for memory mapping.
    """
    files = [file for file in Path(folder).rglob("*") if file.is_file()]
    copies = ("embeddings.npy", "merged_")
    return sum(file.stat().st_size for file in files if not file.name.startswith(copies))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's and NumPy's global generators, and put them back as they were."""
    state = np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            np.random.seed(seed)
            yield
    finally:
        np.random.set_state(state)
