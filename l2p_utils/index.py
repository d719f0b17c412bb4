"""An index of your own documents: build, search, grow, shrink (notebook 12).

Pooled, coded token vectors in memory-mapped files, searched exactly. An index is a folder of
segments, each some thousand documents; what is added becomes a new one, what is removed is noted.

``python -m l2p_utils.index build DOCUMENTS --model bundled --out DIR`` makes one, ``search DIR
"how to interpolate"`` asks it; ``--help`` has the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from l2p_utils.files import (
    PROVENANCE,
    UserError,
    atomic_path,
    read_json,
    remove,
    settings_match,
    write_json,
)
from l2p_utils.frontier import CODES, stored_bytes
from l2p_utils.model import PooledColBERT, encode, load_model, readable
from l2p_utils.pooling import Budget, pool, unit_length
from l2p_utils.search import exact_search

SEGMENT = 2000  # documents
INDEX = "index.json"
ENCODED = ("input_ids", "token_embeddings", "masks")  # what PyLate gives of each text
TEXT_COLUMNS = ("text", "content", "body", "abstract", "passage")
SUFFIXES = (".txt", ".md")


class Hit(NamedTuple):
    """A document that was found."""

    id: str
    score: float
    text: str


# ---------------------------------------------------------------- documents


def read_documents(source: str | Path, column: str | None = None) -> Iterator[tuple[str, str]]:
    """Ids and texts, one after the other: nothing is held but the document at hand.

    Parameters
    ----------
    source
        A folder of .txt and .md files (also in folders within), whose id is the file's path; a
        folder in BEIR's layout; or a JSONL, CSV or Parquet file. Of a file the id is the field
        ``_id`` or ``id``, else the row's number.
    column
        The field with the text; by default the first of `TEXT_COLUMNS` that there is. A field
        ``title`` stands before it.

    Raises
    ------
    UserError
        For a source that does not exist or has no text.
    """
    path = Path(source)
    if path.is_dir():
        if beir := [*path.glob("corpus.jsonl"), *path.glob("corpus.jsonl.gz")]:
            yield from read_documents(beir[0], column)
            return
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{path} holds no {' or '.join(SUFFIXES)} files, and no corpus.jsonl.")
        for file in files:
            yield file.relative_to(path).as_posix(), file.read_text("utf-8", errors="replace")
        return
    if not path.is_file():
        raise UserError(
            f"{path} does not exist. Expected a folder of .txt or .md files, or a JSONL, CSV or "
            "Parquet file."
        )
    for number, record in enumerate(_records(path)):
        fields = [column] if column else [name for name in TEXT_COLUMNS if name in record]
        if not fields or fields[0] not in record:
            raise UserError(
                f"{path}, record {number + 1} has no {column or 'text'} among its fields "
                f"{list(record)}. Name the field with the text (--column)."
            )
        identifier = record.get("_id", record.get("id"))
        parts = (record.get("title"), record[fields[0]])
        text = " ".join(str(part).strip() for part in parts if part is not None and part == part)
        yield str(number if identifier is None else identifier), text


def _records(path: Path) -> Iterator[dict[str, Any]]:
    suffix = "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).lower()
    try:
        if suffix.startswith((".jsonl", ".ndjson")):
            chunks = pd.read_json(path, lines=True, chunksize=SEGMENT, dtype=False)
        elif suffix.startswith((".csv", ".tsv")):
            separator = "\t" if suffix.startswith(".tsv") else ","
            chunks = pd.read_csv(path, chunksize=SEGMENT, dtype=str, sep=separator)
        elif suffix == ".parquet":
            batches = pq.ParquetFile(path).iter_batches(SEGMENT)
            chunks = (batch.to_pandas() for batch in batches)
        else:
            raise UserError(
                f"{path} is {suffix or 'without a suffix'}; expected a folder, or a .jsonl, .csv, "
                ".tsv or .parquet file."
            )
        for chunk in chunks:
            yield from chunk.to_dict("records")
    except (ValueError, pa.ArrowInvalid) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read: {error}.") from error


def passages(
    model: PooledColBERT, documents: Iterable[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """Documents that are longer than the model reads, in parts: ``id#1``, ``id#2``, …"""
    most = readable(model)
    for identifier, text in documents:
        found = model.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        spans, words = found["offset_mapping"], found.word_ids()
        if len(spans) <= most:
            yield identifier, text
            continue
        start = number = 0
        while start < len(spans):
            end = min(start + most, len(spans))
            whole = end  # back to where a word ends
            while start < whole < len(spans) and words[whole] == words[whole - 1]:
                whole -= 1
            end, number = whole if whole > start else end, number + 1
            yield f"{identifier}#{number}", text[spans[start][0] : spans[end - 1][1]]
            start = end


def matched_words(
    model: PooledColBERT, query: str, texts: Sequence[str]
) -> list[list[tuple[int, int]]]:
    """Where in each text (start, end) the words stand that the query's tokens match best.

    By MaxSim over the texts' own tokens: a pooled vector stands for several words.
    """

    def tokens(given: list[str], is_query: bool) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        options = {"output_value": None, "pool_factor": 1, "show_progress_bar": False}
        found = model.encode(given, is_query=is_query, **options)
        prefixes = {model.query_prefix_id, model.document_prefix_id} - {None}
        special = [*model.tokenizer.all_special_ids, *model.skiplist, *prefixes]
        for ids, vectors, mask in zip(*map(found.get, ENCODED), strict=True):
            ids, vectors, mask = (torch.as_tensor(part).cpu() for part in (ids, vectors, mask))
            counted = mask.bool() & ~torch.isin(ids, torch.tensor(special))
            yield torch.nonzero(counted)[:, 0].numpy(), unit_length(vectors[counted].float())

    ((_, asked),) = tokens([query], True)
    before = 2 if model.document_prefix_id is not None else 1  # [CLS], and the prefix
    spans = []
    for text, (places, vectors) in zip(texts, tokens(list(texts), False), strict=True):
        pieces = model.tokenizer(text, add_special_tokens=False, verbose=False)
        best = places[(asked @ vectors.T).argmax(dim=1).numpy()] - before if len(places) else []
        words = sorted({pieces.token_to_word(int(place)) for place in best})
        spans.append([tuple(pieces.word_to_chars(word)) for word in words])
    return spans


def excerpt(text: str, spans: Sequence[tuple[int, int]], width: int = 160) -> str:
    """The part of a text with most of the spans, these in **bold**, on one line."""

    def within(start: int) -> list[tuple[int, int]]:
        return [(a, b) for a, b in spans if start <= a and b <= start + width]

    start = end = max([0, *(a for a, _ in spans)], key=lambda place: (len(within(place)), -place))
    parts = ["… " if start else ""]
    for a, b in within(start):
        parts += [text[end:a], f"**{text[a:b]}**"]
        end = b
    parts += [text[end : start + width], " …" if start + width < len(text) else ""]
    return " ".join("".join(parts).split())


def _free_place(folder: str | Path) -> Path:
    """`folder`, if an index may take its place: it is missing, empty, or an index itself."""
    folder = Path(folder)
    if (
        folder.exists()
        and not (folder / INDEX).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise UserError(
            f"{folder} holds something else than an index, which would be lost; expected a new "
            "folder, an empty one, or an index. Name another."
        )
    return folder


def load_any(name: str) -> PooledColBERT:
    """A model from its folder, or from the hub by its id."""
    return load_model(name) if Path(name).is_dir() else PooledColBERT(name)


# ---------------------------------------------------------------- the index


class Index:
    """An index in a folder; `build` makes one, `open` opens it.

    Examples
    --------
    >>> index = Index.open("my-index")                                         # doctest: +SKIP
    >>> index.search(["how to interpolate"], k=5)[0][0].id                     # doctest: +SKIP
    """

    def __init__(self, folder: Path, settings: dict[str, Any], model: PooledColBERT | None = None):
        self.folder, self.settings, self._model = folder, settings, model

    @classmethod
    def open(cls, folder: str | Path, model: PooledColBERT | None = None) -> Index:
        """An index that was built; `model` where its own folder has moved."""
        if not (Path(folder) / INDEX).is_file():
            raise UserError(f"{folder} holds no index ({INDEX}). Build one: `build DOCUMENTS`.")
        return cls(Path(folder), read_json(Path(folder) / INDEX), model)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        documents: Iterable[tuple[str, str]],
        model: PooledColBERT,
        name: str,
        budget: float | Budget = 4,
        pool_method: str = "kmeans",
        code: str = "float16",
        progress: bool = True,
    ) -> Index:
        """Encode, pool and code documents (ids and texts), and put the index in place of a former.

        What was finished when a build was broken off is not encoded twice: the same call goes on.
        Means have unit length. Empty texts and ids that come again are left out and counted (see
        `stats`). `name` is what `open` loads the model from.
        """
        if code not in CODES:
            raise UserError(f"code is {code!r}; expected one of {list(CODES)}.")
        folder, budget = _free_place(folder), Budget.of(budget)
        budget.check(pool_method, 1)
        settings = {
            "model": name,
            "document_length": model.document_length,
            "dim": model[-1].out_features,
            "pool_method": pool_method,
            "budgets": [vars(budget)],  # and those that it was shrunk by
            "code": code,
        }
        work = folder.with_name(f".{folder.name}.building")
        if not settings_match(work, settings):
            remove(work)
            write_json(work / PROVENANCE, {"settings": settings})
        index = cls(work, settings | {"segments": [], "removed": {}, "left_out": {}}, model)
        index._extend(documents, progress)
        if not index.settings["segments"]:
            raise UserError("There are no documents with a text to make an index of.")
        index._save()
        with atomic_path(folder) as temporary:
            os.rename(work, temporary)
        return cls.open(folder, model)

    @cached_property
    def model(self) -> PooledColBERT:
        """The model that encodes queries and what is added."""
        model = self._model or load_any(self.settings["model"])
        model.document_length = self.settings["document_length"]
        return model.eval()

    @property
    def code(self):
        """How vectors are stored, see `frontier.CODES`."""
        return CODES[self.settings["code"]]

    def _save(self) -> None:
        write_json(self.folder / INDEX, self.settings)

    def _extend(self, documents: Iterable[tuple[str, str]], progress: bool) -> None:
        """Write documents as further segments; of one that is there already nothing is encoded."""
        seen, left_out = set(), Counter(self.settings["left_out"])

        def fresh() -> Iterator[tuple[str, str]]:
            for identifier, text in documents:
                kind = "empty" if not text.strip() else "repeated" if identifier in seen else ""
                left_out[kind or "none"] += 1
                if not kind:
                    seen.add(identifier)
                    yield identifier, text

        bar = tqdm(desc="Indexing", unit=" documents", disable=not progress)
        rest = fresh()
        while part := list(itertools.islice(rest, SEGMENT)):
            name = f"{len(self.settings['segments']):05d}"
            content = hashlib.sha256(json.dumps(part).encode()).hexdigest()
            segment = self.folder / name
            if not settings_match(segment, {"content": content}):
                self._write(segment, *zip(*part, strict=True), content)
            self.settings["segments"].append(name)
            bar.update(len(part))
        bar.close()
        del left_out["none"]
        self.settings["left_out"] = dict(left_out)

    def _write(self, segment: Path, ids: Sequence[str], texts: Sequence[str], content: str) -> None:
        lengths = [
            len(self.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            for text in texts
        ]
        lost = np.maximum(np.array(lengths) - readable(self.model), 0)
        tokens = encode(self.model, texts, is_query=False)
        vectors, sizes = tokens, None
        for budget in self.settings["budgets"]:
            vectors, sizes = self._pool(vectors, sizes, Budget(**budget))
        frame = pd.DataFrame({"id": ids, "text": texts, "pieces": lengths, "lost": lost})
        self._store(segment, frame.assign(tokens=[*map(len, tokens)]), vectors, sizes, content)

    def _pool(self, vectors: list[torch.Tensor], sizes: list | None, budget: Budget) -> tuple:
        options = {"renormalize": True, "weights": sizes, "return_sizes": True, **vars(budget)}
        return pool(vectors, pool_method=self.settings["pool_method"], **options)

    def _store(
        self,
        segment: Path,
        frame: pd.DataFrame,
        vectors: list[torch.Tensor],
        sizes: list[np.ndarray],
        content: str = "",
    ) -> None:
        with atomic_path(segment) as temporary:
            temporary.mkdir(parents=True)
            np.save(temporary / "vectors.npy", self.code.pack(torch.cat(vectors).numpy()))
            np.save(temporary / "sizes.npy", np.concatenate(sizes).astype(np.uint16))
            frame = frame.assign(vectors=[*map(len, vectors)])
            frame.to_parquet(temporary / "documents.parquet", index=False, compression="zstd")
            write_json(temporary / PROVENANCE, {"settings": {"content": content}})

    def _segment(self, name: str) -> tuple[pd.DataFrame, list[torch.Tensor], list[np.ndarray]]:
        """What is left of a segment: its documents' table, vectors (decoded) and cluster sizes."""
        folder = self.folder / name
        frame = pd.read_parquet(folder / "documents.parquet")
        ends = np.cumsum(frame["vectors"].to_numpy())[:-1]
        rows = np.load(folder / "vectors.npy", mmap_mode="r")
        decoded = torch.from_numpy(self.code.unpack(np.asarray(rows), self.settings["dim"]))
        sizes = np.split(np.load(folder / "sizes.npy").astype(float), ends)
        kept = ~frame["id"].isin(self.settings["removed"].get(name, []))
        places = np.flatnonzero(kept)
        parts = torch.tensor_split(decoded, torch.from_numpy(ends))
        return (
            frame[kept].reset_index(drop=True),
            [parts[i] for i in places],
            [sizes[i] for i in places],
        )

    # ------------------------------------------------------------ use

    def search(self, queries: Sequence[str], k: int = 10) -> list[list[Hit]]:
        """The `k` best documents of each query by exact MaxSim, best first; ties by id."""
        asked = encode(self.model, list(queries), is_query=True)
        found: list[list[Hit]] = [[] for _ in queries]
        for name in self.settings["segments"]:
            frame, vectors, _ = self._segment(name)
            if not len(frame):
                continue
            ranking = exact_search(asked, vectors, frame["id"].tolist(), k)
            texts = dict(zip(frame["id"], frame["text"], strict=True))
            for best, ids, scores in zip(found, ranking.documents, ranking.scores, strict=True):
                hits = [Hit(i, s, texts[i]) for i, s in zip(ids, scores, strict=True)]
                best[:] = heapq.nlargest(k, [*best, *hits], key=lambda hit: (hit.score, hit.id))
        return found

    def add(self, documents: Iterable[tuple[str, str]], progress: bool = False) -> None:
        """Add documents; one whose id is there already takes its place."""
        documents = list(documents)
        before = list(self.settings["segments"])
        self._extend(documents, progress)
        self._forget([identifier for identifier, _ in documents], before)
        self._save()

    def remove(self, ids: Iterable[str]) -> int:
        """Remove documents; gives how many there were."""
        removed = self._forget(list(ids), self.settings["segments"])
        self._save()
        return removed

    def _forget(self, ids: Sequence[str], segments: Sequence[str]) -> int:
        count = 0
        for name in segments:
            frame = pd.read_parquet(self.folder / name / "documents.parquet", columns=["id"])
            gone = self.settings["removed"].get(name, [])
            here = sorted(set(ids) & set(frame["id"]) - set(gone))
            count += len(here)
            if here:
                self.settings["removed"][name] = sorted([*gone, *here])
        return count

    def shrink(self, folder: str | Path, budget: float | Budget, code: str | None = None) -> Index:
        """Another index, in `folder`, of the same documents with fewer vectors or fewer bits.

        The model is not needed: what is stored is pooled further, by its clusters' sizes. Removed
        documents are gone for good.
        """
        budget, code = Budget.of(budget), code or self.settings["code"]
        target = _free_place(folder)
        if target.resolve() == self.folder.resolve():
            raise UserError(
                f"{folder} is the index itself; name another folder for the smaller one."
            )
        budgets = [*self.settings["budgets"], vars(budget)]
        new = {"code": code, "budgets": budgets, "segments": [], "removed": {}}
        with atomic_path(target) as temporary:
            small = Index(temporary, self.settings | new, self._model)
            for name in self.settings["segments"]:
                frame, vectors, sizes = self._segment(name)
                if frame.empty:
                    continue
                number = f"{len(small.settings['segments']):05d}"
                small._store(temporary / number, frame, *self._pool(vectors, sizes, budget))
                small.settings["segments"].append(number)
            small._save()
        return Index.open(target, self._model)

    def export(self, file: str | Path) -> None:
        """Write ids, texts, vectors (as stored, decoded) and cluster sizes as one Parquet file."""
        schema = pa.schema(
            [("id", pa.string()), ("text", pa.string())]
            + [("vectors", pa.list_(pa.list_(pa.float32()))), ("sizes", pa.list_(pa.uint16()))]
        )
        with atomic_path(file) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for name in self.settings["segments"]:
                frame, vectors, sizes = self._segment(name)
                columns = [frame["id"], frame["text"], [v.tolist() for v in vectors]]
                columns.append([size.astype(np.uint16).tolist() for size in sizes])
                writer.write_table(pa.table(columns, schema=schema))

    def stats(self) -> pd.Series:
        """Documents, vectors, bytes of vectors, and how much less that is than unpooled float32.

        ``lost``: the share of word pieces that come after the model's length and are not read.
        """
        frames = []
        for name in self.settings["segments"]:
            frame = pd.read_parquet(self.folder / name / "documents.parquet").drop(columns="text")
            frames.append(frame[~frame["id"].isin(self.settings["removed"].get(name, []))])
        documents = pd.concat(frames, ignore_index=True)
        dim, count = self.settings["dim"], len(documents)
        mean = documents[["vectors", "tokens"]].mean().fillna(0.0)
        size = count * stored_bytes(mean["vectors"], dim, self.settings["code"])
        whole = count * stored_bytes(mean["tokens"], dim)
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        return pd.Series(
            {
                "documents": count,
                "vectors per document": round(documents["vectors"].mean(), 1),
                "bytes per document": round(size / max(count, 1), 1),
                "times smaller than unpooled float32": round(whole / max(size, 1), 1),
                "bytes of vectors": round(size),
                "bytes on disk, texts included": sum(file.stat().st_size for file in files),
                "documents cut": int((documents["lost"] > 0).sum()),
                "word pieces lost, %": round(
                    100 * documents["lost"].sum() / max(documents["pieces"].sum(), 1), 1
                ),
                **{f"left out: {kind}": n for kind, n in self.settings["left_out"].items()},
            },
            dtype=object,
        )


# ---------------------------------------------------------------- the shell


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.index", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, what: str, *places: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what, description=what)
        for place in places:
            sub.add_argument(place)
        return sub

    def sized(sub: argparse.ArgumentParser, code: str | None) -> None:
        budget = sub.add_mutually_exclusive_group()
        budget.add_argument("--pool-factor", type=float, help="about how many vectors become one")
        budget.add_argument("--max-vectors", type=int, help="at most so many per document")
        bits = dict(zip(("32", "16", "8", "4", "1"), CODES, strict=True))
        sub.add_argument("--bits", choices=bits, default=code, help="per value")

    def read(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--column", help="the field with the text")
        sub.add_argument("--passages", action="store_true", help="split what is too long to read")

    build = command("build", "Make an index, or go on with one that was broken off.", "documents")
    build.add_argument("--out", required=True, help="the index's folder")
    build.add_argument("--model", default="bundled", help="bundled, a folder or a hub id")
    build.add_argument("--document-length", type=int, help="word pieces that are read")
    sized(build, "16")
    read(build)
    search = command("search", "Print the best documents for a query.", "index", "query")
    search.add_argument("-k", type=int, default=10)
    read(command("add", "Add documents; known ids are replaced.", "index", "documents"))
    command("remove", "Remove documents.", "index").add_argument("ids", nargs="+")
    command("stats", "What is stored, and how much smaller it is.", "index")
    sized(
        command("shrink", "Another index with fewer vectors, without the model.", "index", "out"),
        None,
    )
    command("export", "Write ids, texts and vectors as Parquet.", "index", "file")
    return parser


def _budget(options: argparse.Namespace, factor: float) -> Budget:
    if options.max_vectors is not None:
        return Budget(max_vectors=options.max_vectors)
    return Budget(factor if options.pool_factor is None else options.pool_factor)


def _code(bits: str | None) -> str | None:
    return None if bits is None else next(c for c, how in CODES.items() if how.bits == int(bits))


def _documents(options: argparse.Namespace, model: PooledColBERT) -> Iterable[tuple[str, str]]:
    documents = read_documents(options.documents, options.column)
    return passages(model, documents) if options.passages else documents


def _bundled() -> str:
    """The folder of the bundled baseline, which is made if it is missing."""
    from l2p_utils.profile import load_profile
    from l2p_utils.training import make_baseline  # takes seconds to import

    return str(make_baseline(load_profile("quick")))


def main(arguments: list[str] | None = None) -> int:
    """Build, search, grow and shrink an index of your own documents."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "build":
            name = _bundled() if options.model == "bundled" else options.model
            model = load_any(name).eval()
            model.document_length = options.document_length or model.document_length
            budget, code = _budget(options, 4), _code(options.bits)
            documents = _documents(options, model)
            index = Index.build(options.out, documents, model, name, budget, code=code)
            print(index.stats().to_string())
            return 0
        index = Index.open(options.index)
        if options.command == "search":
            hits = index.search([options.query], options.k)[0]
            words = matched_words(index.model, options.query, [hit.text for hit in hits])
            for hit, spans in zip(hits, words, strict=True):
                print(f"{hit.score:6.2f}  {hit.id}\n        {excerpt(hit.text, spans)}")
        elif options.command == "add":
            index.add(_documents(options, index.model), progress=True)
        elif options.command == "remove":
            print(f"{index.remove(options.ids)} of {len(options.ids)} were in the index.")
        elif options.command == "export":
            index.export(options.file)
        elif options.command == "shrink":
            index = index.shrink(options.out, _budget(options, 1), _code(options.bits))
        if options.command in ("add", "remove", "stats", "shrink"):
            print(index.stats().to_string())
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
