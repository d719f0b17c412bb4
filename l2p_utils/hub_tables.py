"""Tables of a hub data set: which files hold a config's splits, and their rows.

Takes the folder of a snapshot; gives rows with the place they came from. What a repository lacks
ends in an error that names the repository, what is there and what was expected.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from l2p_utils.files import UserError

#: Names under which the hub's data sets keep a column.
COLUMNS = {
    "_id": ("_id", "id"),
    "title": ("title",),
    "text": ("text",),
    "query-id": ("query-id", "query_id"),
    "corpus-id": ("corpus-id", "corpus_id"),
    "score": ("score",),
}
TABLES = ("corpus", "queries")  # the others are judgments
SPLITS = {"validation": "dev", "valid": "dev", "val": "dev"}  # the hub's names for our dev
SPLIT_NAME = re.compile(r"(train|test|dev|validation|valid|val|corpus|queries)(?=[-_.]|$)")
BATCH = 256  # rows of a parquet file in memory at a time

Row = tuple[dict[str, Any], str]
Files = dict[str, list[Path]]


@dataclass(frozen=True)
class Repository:
    """A snapshot on this disk: the repository's id (or a zip's address), its folder, its commit."""

    id: str
    folder: Path
    commit: str

    def __str__(self) -> str:
        return f"{self.id} (commit {self.commit[:12]})"

    def place(self, path: Path) -> str:
        """A file of the repository, as errors name it."""
        return f"{self}: {path.relative_to(self.folder).as_posix()}"


# --- which files ----------------------------------------------------------------------------------


def find_files(repository: Repository, configs: Sequence[str]) -> Files:
    """Files of each split of the first of `configs` that the repository has.

    What ``configs:`` of the README says counts; where it says nothing, the files' names do
    (``corpus/corpus-00000-of-00001.parquet``, ``queries.jsonl.gz``, ``qrels/test.tsv``, …).

    Returns
    -------
    dict of str to list of path
        Split ("validation" is called "dev") to its files, in order.

    Raises
    ------
    UserError
        When there is no such config, or it names files that are not there or cannot be read.
    """
    declared = _declared(repository)
    for config in configs:
        if config in declared:
            return {
                split: _matching(repository, config, patterns)
                for split, patterns in declared[config].items()
            }
    found = {} if declared else _by_name(repository, configs[0])
    if not found:
        if declared:
            there = f"the configs {', '.join(declared)}"
        else:
            there = ", ".join(_place(repository, path) for path in _data_files(repository)[:12])
        raise UserError(
            f"{repository} has no config {' or '.join(map(repr, configs))}. "
            f"There is: {there or 'no data file'}. Expected {_layout(configs[0])}."
        )
    return found


def _layout(config: str) -> str:
    if config in TABLES:
        return f"a config {config!r} in its README, or files {config}.jsonl or {config}/*.parquet"
    return f"a config {config!r} in its README, or a file of judgments a split: test.tsv, …"


def one_split(repository: Repository, files: Files, config: str) -> list[Path]:
    """Files of a corpus or of queries: of the split that is named like the config, or the only one.

    Raises
    ------
    UserError
        When there are several and none is named so.
    """
    if config in files or len(files) == 1:
        return files.get(config) or next(iter(files.values()))
    raise UserError(
        f"{repository}: the config {config!r} has the splits {', '.join(files)}. "
        f"Expected one split, or one called {config!r}."
    )


def _place(repository: Repository, path: Path) -> str:
    return path.relative_to(repository.folder).as_posix()


def _suffix(path: Path) -> str:
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), "")


def _data_files(repository: Repository) -> list[Path]:
    files = sorted(path for path in repository.folder.rglob("*") if _suffix(path))
    return [path for path in files if not _place(repository, path).startswith(".")]


def _declared(repository: Repository) -> dict[str, dict[str, list[str]]]:
    """Config → split → patterns, as the front matter of the README has them."""
    readme = repository.folder / "README.md"
    if not readme.is_file():
        return {}
    try:
        found = re.match(r"---\s*\n(.*?)\n---", readme.read_text("utf-8-sig"), re.DOTALL)
        front = yaml.safe_load(found[1]) if found else None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{repository.place(readme)}: its front matter is unreadable ({error})."
        ) from error
    configs = front.get("configs") if isinstance(front, dict) else None
    if not isinstance(configs, list):
        return {}
    return {
        str(config.get("config_name", "default")): _patterns(config)
        for config in configs
        if isinstance(config, dict) and config.get("data_files")
    }


def _patterns(config: dict[str, Any]) -> dict[str, list[str]]:
    """Split → patterns of one config; files that are given without a split are its "train"."""
    given = config["data_files"]
    patterns: dict[str, list[str]] = {}
    for entry in given if isinstance(given, list) else [given]:
        if not isinstance(entry, dict):
            entry = {"split": "train", "path": entry}
        paths = entry.get("path", [])
        paths = paths if isinstance(paths, list) else [paths]
        split = str(entry.get("split", "train"))
        base = PurePosixPath(str(config.get("data_dir") or "."))
        patterns.setdefault(SPLITS.get(split, split), []).extend(str(base / str(p)) for p in paths)
    return patterns


def _matching(repository: Repository, config: str, patterns: list[str]) -> list[Path]:
    files: dict[Path, None] = {}
    for pattern in patterns:
        parts = PurePosixPath(pattern)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts:
            raise UserError(
                f"{repository}: the config {config!r} names {pattern!r}; expected a path inside "
                "the repository."
            )
        found = sorted(path for path in repository.folder.glob(pattern) if path.is_file())
        if not found:
            raise UserError(
                f"{repository}: the config {config!r} names {pattern!r}, and no such file is there."
            )
        for path in found:
            if not _suffix(path):
                raise UserError(
                    f"{repository.place(path)}: expected one of {', '.join(READERS)} for the "
                    f"config {config!r}."
                )
            files[path] = None
    return list(files)


def _by_name(repository: Repository, config: str) -> Files:
    """Files of a config by their names and folders; of several formats the first of `READERS`."""
    found: dict[str, dict[str, list[Path]]] = {}
    for path in _data_files(repository):
        parts = PurePosixPath(_place(repository, path)).parts
        tables = [table for part in parts for table in TABLES if _begins(part, table)]
        if (tables[:1] or ["qrels"]) != [config if config in TABLES else "qrels"]:
            continue
        splits = [match[1] for match in map(SPLIT_NAME.match, reversed(parts)) if match]
        if splits:
            split = SPLITS.get(splits[0], splits[0])
            found.setdefault(split, {}).setdefault(_suffix(path), []).append(path)
    return {
        split: next(formats[suffix] for suffix in READERS if suffix in formats)
        for split, formats in found.items()
    }


def _begins(part: str, table: str) -> bool:
    return re.match(rf"{table}([-_.]|$)", part) is not None


# --- their rows -----------------------------------------------------------------------------------


def read_rows(
    repository: Repository,
    files: Sequence[Path],
    required: Sequence[str],
    optional: Sequence[str] = (),
) -> Iterator[Row]:
    """Yield (row, where) of the files; a row's keys are `required` and those `optional` it has.

    Raises
    ------
    UserError
        For a missing column, bad JSON, a damaged file, text that is not UTF-8.
    """
    for path in files:
        where = repository.place(path)
        columns, rows = READERS[_suffix(path)](path, where)
        names = {}
        for column in (*required, *optional):
            name = next((name for name in COLUMNS[column] if name in columns), None)
            if name is not None:
                names[column] = name
            elif column in required and columns:
                raise UserError(
                    f"{where}: there is no column {column!r}. There is: {', '.join(columns)}. "
                    f"Expected {', '.join(required)}."
                )
        for row, place in rows:
            yield {column: row.get(name) for column, name in names.items()}, place


def _damaged(where: str, error: Exception) -> UserError:
    return UserError(
        f"{where} is damaged ({error}). Delete this data set from the hub's cache and run again; "
        "if it stays so, its owners have to mend it."
    )


def _not_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{where} is not UTF-8 text ({error.reason} at byte {error.start}). Its owners have to "
        "mend it; take another revision (<name>@<revision>) or another source."
    )


def _lines(path: Path, where: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of a text file, packed by gzip or not, without empty lines."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _damaged(where, error) from error


def _jsonl(path: Path, where: str) -> tuple[list[str], Iterator[Row]]:
    rows = _json_rows(path, where)
    first = next(rows, None)
    # The first object stands for all: one that lacks a key later has no text there.
    return (list(first[0]), itertools.chain([first], rows)) if first else ([], rows)


def _json_rows(path: Path, where: str) -> Iterator[Row]:
    for number, line in _lines(path, where):
        place = f"{where}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{place}: bad JSON ({error}). Expected one JSON object a line."
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected a JSON object, found {line[:60]!r}.")
        yield row, place


def _separated(path: Path, where: str) -> tuple[list[str], Iterator[Row]]:
    """Tab-separated without quoting, as BEIR writes judgments; or CSV."""
    lines = _lines(path, where)
    if ".csv" in path.suffixes[-2:]:
        fields = csv.reader(line for _, line in lines)
        numbered = enumerate(fields, start=1)
    else:
        numbered = ((number, line.split("\t")) for number, line in lines)
    header = next(numbered, (0, []))[1]
    return header, _records(numbered, header, where)


def _records(
    numbered: Iterator[tuple[int, list[str]]], header: list[str], where: str
) -> Iterator[Row]:
    for number, fields in numbered:
        if len(fields) != len(header):
            raise UserError(
                f"{where}, line {number}: expected {len(header)} fields ({', '.join(header)}); "
                f"found {len(fields)}."
            )
        yield dict(zip(header, fields, strict=True)), f"{where}, line {number}"


def _parquet(path: Path, where: str) -> tuple[list[str], Iterator[Row]]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(where, error) from error
    return list(file.schema_arrow.names), _parquet_rows(file, where)


def _parquet_rows(file: pq.ParquetFile, where: str) -> Iterator[Row]:
    known = {name for names in COLUMNS.values() for name in names}
    columns = [name for name in file.schema_arrow.names if name in known]
    number = 0
    try:
        for batch in file.iter_batches(BATCH, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{where}, row {number}"
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error
    except (pa.ArrowException, OSError) as error:
        raise _damaged(where, error) from error


Reader = Callable[[Path, str], tuple[list[str], Iterator[Row]]]
#: What can be read, the preferred format first where a table is there in several.
READERS: dict[str, Reader] = {
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".tsv": _separated,
    ".tsv.gz": _separated,
    ".csv": _separated,
    ".csv.gz": _separated,
}
#: Patterns of the files to fetch.
PATTERNS = ["README.md", *(f"*{suffix}" for suffix in READERS)]
