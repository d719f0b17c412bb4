"""Where an index keeps its vectors, and how they are searched: Qdrant, our exact scan, PLAID."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import qdrant_edge as edge
import torch
from filelock import FileLock, Timeout

from l2p_utils.files import UserError, atomic_path, remove
from l2p_utils.frontier import CODES, stored_bytes
from l2p_utils.search import BLOCK_BYTES, PLAID_VECTORS, index_size, plaid_index, plaid_ranking

GRAPH_FROM = 50_000  # documents: fewer are scanned fast enough
BLOCK_VECTORS = 4096  # decoded at a time: they stay in the processor's cache
REQUEST_VECTORS = 4000  # of 128 values: a Qdrant server takes requests of up to 32 MiB
Vectors = list[torch.Tensor]
Found = list[tuple[np.ndarray, np.ndarray]]  # numbers and scores, per query


class Engine:
    """Keeps an index's vectors, and searches them.

    A document's number is its place among all that were stored, removed ones too: its label in
    `Index.rows`, of which an engine gets lines. `write` stores a segment's vectors, durably, under
    the numbers from `start` on. `read` gives vectors as they are stored, (vectors, dim) float32.
    `search` gives numbers and scores of each query's `k` best living documents, in any order.
    """

    codes: Iterable[str] = CODES  # how it can store vectors
    default = "float16"
    here = True  # vectors are in this process's memory

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings

    def nothing(self, *_: Any) -> None:
        """What an engine need not do, or allows."""

    editable = nothing  # refuse what it cannot do, such as "grow"
    begin = nothing  # something will be written
    delete = nothing  # documents, by number, that `rows` calls dead already
    finish = nothing  # everything is written; gets `rows`
    publish = nothing  # the index has taken its place
    drop = nothing  # delete what lies outside the index's folder
    close = nothing  # let other processes in

    def size(self, rows: pd.DataFrame) -> float:
        """Bytes of the living documents' vectors."""
        vectors = rows["vectors"][rows["live"]]
        mean = vectors.mean() if len(vectors) else 0.0
        return len(vectors) * stored_bytes(mean, self.settings["dim"], self.settings["code"])


class Exact(Engine):
    """Packed vectors in memory-mapped files, one per segment; a search reads all of them."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        super().__init__(folder, settings)
        self.code, self._mapped = CODES[settings["code"]], {}

    def write(self, segment: Path, start: int, ids: Sequence[str], vectors: Vectors) -> None:
        np.save(segment / "vectors.npy", self.code.pack(np.concatenate(vectors)))

    def _packed(self, name: str) -> np.ndarray:
        if name not in self._mapped:
            self._mapped[name] = np.load(self.folder / name / "vectors.npy", mmap_mode="c")
        return self._mapped[name]

    def _decoded(self, packed: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.code.unpack(np.asarray(packed), self.settings["dim"]))

    def read(self, rows: pd.DataFrame) -> Vectors:
        places = zip(rows["segment"], rows["first_vector"], rows["vectors"], strict=True)
        return [self._decoded(self._packed(name)[a : a + n]) for name, a, n in places]

    def search(self, queries: Vectors, k: int, rows: pd.DataFrame) -> Found:
        tokens = torch.cat(queries).T.contiguous()
        begins = np.cumsum([0, *map(len, queries[:-1])])  # of each query, among the tokens
        block = int(np.clip(BLOCK_BYTES // (4 * tokens.shape[1]), 64, BLOCK_VECTORS))
        found: list[list] = [[] for _ in queries]
        for name, part in rows.groupby("segment", sort=False, observed=True):
            packed, live = self._packed(name), part["live"].to_numpy()
            firsts = np.append(part["first_vector"], len(packed))
            cuts = np.searchsorted(firsts, [*range(0, len(packed), block), len(packed)])
            scores = np.empty((len(queries), len(part)), np.float32)
            for a, b in itertools.pairwise(np.unique(cuts)):
                similar = (self._decoded(packed[firsts[a] : firsts[b]]) @ tokens).numpy()
                best = np.maximum.reduceat(similar, firsts[a:b] - firsts[a], axis=0)
                scores[:, a:b] = np.add.reduceat(best, begins, axis=1).T
            scores[:, ~live] = -np.inf
            for hits, line in zip(found, scores, strict=True):
                least = np.partition(line, -k)[-k] if len(line) > k else -np.inf
                places = np.flatnonzero((line >= least) & live)  # with all that tie
                hits.append((part.index.to_numpy()[places], line[places]))
        return [tuple(map(np.concatenate, zip(*hits, strict=True))) for hits in found]


_OPEN: dict[tuple[str, str], tuple[edge.EdgeShard, FileLock]] = {}  # by this process


class Qdrant(Engine):
    """Qdrant Edge: a shard in the index's folder, which one process at a time holds open.

    It keeps no log: points are flushed before their segment counts as written, and points that no
    segment knows are passed over.
    """

    # Turbo8 is Qdrant's 8-bit code of rotated values. Its Uint8 wants whole numbers from 0 to 255:
    # of a unit vector it keeps zeros.
    codes = {"float32": "Float32", "float16": "Float16", "int8": "Turbo8"}

    @property
    def _key(self) -> tuple[str, str]:
        return str(self.folder.resolve()), self.settings["collection"]

    @property
    def shard(self) -> edge.EdgeShard:
        """The shard, opened where it is not."""
        if self._key in _OPEN:
            return _OPEN[self._key][0]
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "qdrant.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"Another process holds the index {self.folder} open, and Qdrant Edge lets one in "
                "at a time. Wait until it has ended; many may read an exact index (--engine "
                "exact), or use a server (--url)."
            ) from None
        config = edge.EdgeConfig(
            vectors=edge.EdgeVectorParams(
                self.settings["dim"],
                edge.Distance.Dot,
                multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim),
                datatype=getattr(edge.VectorStorageDatatype, self.codes[self.settings["code"]]),
            ),
            hnsw_config=edge.HnswIndexConfig(16 if self.settings["graph"] else 0, 100, 10),
            optimizers=edge.EdgeOptimizersConfig(indexing_threshold=1),
            wal_enabled=False,
        )
        place = self.folder / "qdrant"
        if not place.exists():
            with atomic_path(place) as temporary:
                edge.EdgeShard.create(str(temporary), config).close()
        _OPEN[self._key] = edge.EdgeShard.load(str(place), config), lock
        return _OPEN[self._key][0]

    def begin(self) -> None:
        self._count()  # refused, if need be, before anything is encoded

    def close(self) -> None:
        shard, lock = _OPEN.pop(self._key, (None, None))
        if shard:
            shard.close()
            lock.release()

    def _put(self, points: list[tuple[int, list, dict]]) -> None:
        given = [edge.Point(*point) for point in points]
        self.shard.update(edge.UpdateOperation.upsert_points(given))

    def _get(self, numbers: list[int]) -> list[Any]:
        return self.shard.retrieve(numbers, False, True)

    def _count(self) -> int:
        return self.shard.count(edge.CountRequest())

    def _ask(self, queries: list[list], k: int, exact: bool) -> list[list[Any]]:
        how = {"limit": k, "params": edge.SearchParams(exact=exact)}
        asked = [edge.QueryRequest(query=edge.Query.Nearest(query), **how) for query in queries]
        return self.shard.query_batch(edge.QueryBatchRequest(asked))

    def _flush(self) -> None:
        self.shard.flush()

    def _link(self) -> None:
        self.close()  # opened again with the graph's settings
        self.shard.optimize()
        self.close()

    def delete(self, numbers: list[int]) -> None:
        self.shard.update(edge.UpdateOperation.delete_points(numbers))
        self._flush()

    def write(self, segment: Path, start: int, ids: Sequence[str], vectors: Vectors) -> None:
        points = [(start + i, vectors[i], {"id": name}) for i, name in enumerate(ids)]
        for some in self._requests(points, max(map(len, vectors))):
            self._put([(number, v.tolist(), payload) for number, v, payload in some])
        self._flush()

    def read(self, rows: pd.DataFrame) -> Vectors:
        found = {}
        for some in self._requests(rows.index.tolist(), rows["vectors"].max()):
            found |= {point.id: torch.tensor(point.vector) for point in self._get(some)}
        return [found[number] for number in rows.index]

    @staticmethod
    def _requests(items: list, vectors: int) -> Iterator[list]:
        step = max(REQUEST_VECTORS // vectors, 1) if items else 1
        return (items[i : i + step] for i in range(0, len(items), step))

    def search(
        self, queries: Vectors, k: int, rows: pd.DataFrame, exact: bool | None = None
    ) -> Found:
        live = np.append(rows["live"], False)  # the last for numbers beyond
        others = self._count() - live.sum()  # removed, or of an addition that was broken off
        if others < 0:
            raise UserError(
                f"{self.folder} has {live.sum()} documents, Qdrant {live.sum() + others} of them: "
                "some were deleted elsewhere. Build the index again."
            )
        exact = not self.settings["graph"] if exact is None else exact
        found = []
        for hits in self._ask([query.tolist() for query in queries], k + int(others), exact):
            numbers = np.array([hit.id for hit in hits], dtype=int)
            kept = live[np.minimum(numbers, len(rows))]
            found.append((numbers[kept], np.array([hit.score for hit in hits])[kept]))
        return found

    def finish(self, rows: pd.DataFrame) -> None:
        """Build the graph, where one is wanted, and note how much it finds of what a scan does."""
        if self.settings["graph"] is None:
            self.settings["graph"] = len(rows) >= GRAPH_FROM
        if not self.settings["graph"]:
            return
        self._link()
        sample = rows[rows["live"]]
        documents = self.read(sample.sample(min(100, len(sample)), random_state=0))
        # a quarter of a document's vectors is found as well, or as badly, as a query
        asked = [vectors[::4] for vectors in documents]
        scan, graph = (self.search(asked, 10, rows, exact) for exact in (True, False))
        pairs = zip(scan, graph, strict=True)
        shares = [len(np.intersect1d(a, b)) / len(a) for (a, _), (b, _) in pairs]
        self.settings["graph_recall"] = round(float(np.mean(shares)), 3)


def connect(url: str) -> Any:
    """A client of the Qdrant server at `url`; its key is in $QDRANT_API_KEY."""
    from qdrant_client import QdrantClient  # takes a second to import

    key = os.environ.get("QDRANT_API_KEY") or None
    return QdrantClient(location=url, api_key=key, timeout=60, check_compatibility=False)


class QdrantServer(Qdrant):
    """A collection on a Qdrant server or cluster."""

    here = False

    def __init__(self, folder: Path, settings: dict[str, Any]):
        super().__init__(folder, settings)
        import qdrant_client

        self.models, self.client = qdrant_client.models, connect(settings["url"])

    def _call(self, method: str, **given: Any) -> Any:
        """A method of the client; what goes wrong becomes a sentence, without the key."""
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        try:
            return getattr(self.client, method)(self.settings["collection"], **given)
        except ResponseHandlingException as error:
            what = f"does not answer: {error.source}. Is it running, and is the address right?"
        except UnexpectedResponse as error:
            what = f"refused {method}: {error.status_code} {error.reason_phrase}."
            if error.status_code in (401, 403):
                what = "asks for a key; set a valid one in the environment, as QDRANT_API_KEY."
            elif b'"error":' in error.content:
                what = f"refused {method}: {error.structured()['status']['error']}"
        raise UserError(f"The Qdrant server at {self.settings['url']} {what}")

    def begin(self) -> None:
        if self._call("collection_exists"):
            return
        models = self.models
        most = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        vectors = models.VectorParams(
            size=self.settings["dim"],
            distance=models.Distance.DOT,
            datatype=models.Datatype(self.codes[self.settings["code"]].lower()),
            multivector_config=most,
        )
        scanned = models.HnswConfigDiff(m=0)
        self._call("create_collection", vectors_config=vectors, hnsw_config=scanned)

    def _put(self, points: list[tuple[int, list, dict]]) -> None:
        point = self.models.PointStruct
        given = [point(id=number, vector=v, payload=payload) for number, v, payload in points]
        self._call("upsert", points=given, wait=True)

    def _get(self, numbers: list[int]) -> list[Any]:
        return self._call("retrieve", ids=numbers, with_vectors=True, with_payload=False)

    def _count(self) -> int:
        return self._call("count").count

    def _ask(self, queries: list[list], k: int, exact: bool) -> list[list[Any]]:
        how = {"limit": k, "params": self.models.SearchParams(exact=exact)}
        asked = [self.models.QueryRequest(query=query, **how) for query in queries]
        return [found.points for found in self._call("query_batch_points", requests=asked)]

    def _flush(self) -> None:
        """A server keeps a log."""

    def _link(self) -> None:
        graph = self.models.HnswConfigDiff(m=16)
        always = self.models.OptimizersConfigDiff(indexing_threshold=1)  # KiB
        self._call("update_collection", hnsw_config=graph, optimizers_config=always)
        time.sleep(1)  # the server begins a little later
        while self._call("get_collection").status != self.models.CollectionStatus.GREEN:
            time.sleep(1)

    def delete(self, numbers: list[int]) -> None:
        self._call("delete", points_selector=self.models.PointIdsList(points=numbers))

    def drop(self) -> None:
        self._call("delete_collection")

    def close(self) -> None:
        """A server lets everybody in."""


class Plaid(Exact):
    """PyLate's PLAID: centroids, and residuals of so many bits; a search reads some of them.

    Segments hold float16 vectors until the index is built, of all of them at once.
    """

    codes = ("4 bits", "int8", "1 bit")
    default = "4 bits"

    def __init__(self, folder: Path, settings: dict[str, Any]):
        super().__init__(folder, settings)
        self.code, self.place = CODES["float16"], folder / "plaid"

    def editable(self, action: str) -> None:
        raise UserError(
            f"A PLAID index keeps no vectors, and cannot {action}. Build it again; or keep an "
            "exact index, which can, and make PLAID's of it with `shrink … --engine plaid`."
        )

    def _decoded(self, packed: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(packed.view(np.float16))  # of the mapped file: nothing is copied

    def finish(self, rows: pd.DataFrame) -> None:
        if (count := rows["vectors"].sum()) < PLAID_VECTORS:
            raise UserError(
                f"PLAID needs at least {PLAID_VECTORS} vectors; these documents have {count}. Pass "
                "--engine exact."
            )
        numbers = rows.index.astype(str).tolist()
        plaid_index(self.place, self.read(rows), numbers, nbits=CODES[self.settings["code"]].bits)

    def publish(self) -> None:
        for name in self.settings["segments"]:
            remove(self.folder / name / "vectors.npy")

    def search(self, queries: Vectors, k: int, rows: pd.DataFrame) -> Found:
        live, found = rows["live"].to_numpy(), []
        most = min(k + int((~live).sum()), len(rows))
        for hits in plaid_ranking(self.plaid, queries, most):
            numbers = np.array([number for _, number in hits], dtype=int)
            scores = np.array([score for score, _ in hits])
            found.append((numbers[live[numbers]], scores[live[numbers]]))
        return found

    @cached_property
    def plaid(self) -> Any:
        """PyLate's index, open."""
        return plaid_index(self.place)

    def size(self, rows: pd.DataFrame) -> float:
        return index_size(self.place)


ENGINES: dict[str, type[Engine]] = {"qdrant": Qdrant, "exact": Exact, "plaid": Plaid}


def storage(
    engine: str | None = None,
    code: str | None = None,
    url: str | None = None,
    own: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Settings of where and how vectors are stored; what does not go together is refused.

    Parameters
    ----------
    engine
        ``"qdrant"``, ``"exact"`` or ``"plaid"``; by default Qdrant, if it can store `code`.
    code
        A key of `frontier.CODES`; float16 by default, 4 bits for PLAID.
    url
        A Qdrant server's; without one, Qdrant Edge keeps the vectors in the index's folder.
    own
        Settings of an index whose documents are stored anew: what is not given stays, if it can.
    """
    if own and not (engine or url) and (code or own["code"]) in ENGINES[own["engine"]].codes:
        engine, url = own["engine"], own["url"]
    if own and not code and own["code"] in getattr(ENGINES.get(engine), "codes", CODES):
        code = own["code"]
    engine = engine or ("qdrant" if url or code in (None, *Qdrant.codes) else "exact")
    if engine not in ENGINES or (url and engine != "qdrant"):
        raise UserError(
            f"engine is {engine!r}, url {url!r}; expected one of {list(ENGINES)}, and a url for "
            "Qdrant's server alone."
        )
    code = code or ENGINES[engine].default
    if code not in ENGINES[engine].codes:
        raise UserError(
            f"code is {code!r}; expected one of {list(ENGINES[engine].codes)}, which the {engine} "
            "engine can store. Choose among these (--bits), or --engine exact."
        )
    return {"engine": engine, "code": code, "url": url}
