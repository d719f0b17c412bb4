"""Result rows and per-query values: write, read, merge, select.

A result row is one measurement: a model on a collection, searched by an engine, with its documents
pooled in one way. What was not measured is NaN, never 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from l2p_utils.files import UserError, atomic_path

# Columns of a result row, in order, with their types (integers are nullable). Measures are means
# over queries, in 0–1; bytes are those of float32 vectors; index_bytes is PLAID's index on disk,
# exact search has none; query_ms is the search alone, per query; lengths are in word pieces.
_TYPES = {
    "model": "str", "train_collection": "str", "train_method": "str", "train_factors": "str",
    "seed": "Int64", "collection": "str", "engine": "str", "pool_method": "str",
    "pool_variant": "str", "pool_factor": "Int64", "renormalized": "bool",
    "query_length": "Int64", "document_length": "Int64",
    "ndcg@10": "float64", "recall@10": "float64", "mrr@10": "float64",
    "queries": "Int64", "documents": "Int64", "vectors_per_document": "float64",
    "bytes_per_document": "float64", "index_bytes": "Int64", "query_ms": "float64",
    "profile": "str", "versions": "str",
}  # fmt: skip
ROW_COLUMNS = list(_TYPES)
# Key columns of a measurement; the per-query values carry them too.
SETTING = ["model", "collection", "engine", "pool_method", "pool_variant", "pool_factor"]
PER_QUERY_COLUMNS = [*SETTING, "query_id", "ndcg@10"]
# Kept per query as well, but not by the version that made data/offline.
FURTHER_MEASURES = ["recall@10", "mrr@10"]
_VALUE_TYPES = {
    **dict.fromkeys(SETTING, "str"), "pool_factor": "int64", "query_id": "str",
    **dict.fromkeys(["ndcg@10", *FURTHER_MEASURES], "float64"),
}  # fmt: skip

BASELINE = "baseline"
RELEASED = "released:"  # precedes the training collection of a checkpoint that others trained
POOL_FACTORS = (1, 2, 3, 4, 5, 6)
# Variants of each method, the preferred one first.
VARIANTS = {
    "none": ("",),
    "span": ("",),
    "kmeans": ("fast", "sklearn"),
    "hierarchical": ("pylate", "paper", "euclidean"),
}
MERGED_ROWS, MERGED_PER_QUERY = "rows.csv", "per_query.parquet"


def validate_rows(rows: pd.DataFrame, source: str | Path = "rows") -> pd.DataFrame:
    """Result rows with columns in order, typed, sorted by setting; `source` is for messages."""
    return _validate(rows, _TYPES, SETTING, source)


def validate_per_query(per_query: pd.DataFrame, source: str | Path = "values") -> pd.DataFrame:
    """As `validate_rows`, of per-query values, where `FURTHER_MEASURES` are optional."""
    optional = [measure for measure in FURTHER_MEASURES if measure not in per_query]
    types = {column: kind for column, kind in _VALUE_TYPES.items() if column not in optional}
    return _validate(per_query, types, [*SETTING, "query_id"], source)


def _validate(
    frame: pd.DataFrame, types: dict[str, str], key: list[str], source: str | Path
) -> pd.DataFrame:
    missing = [column for column in types if column not in frame]
    unknown = [str(column) for column in frame.columns if column not in types]
    if missing or unknown:
        raise UserError(
            f"{source} holds no results: missing columns {missing}, unknown {unknown}. Move the "
            "file away; if it is an old result, evaluate that model again."
        )
    text = [column for column, kind in types.items() if kind == "str"]
    typed = frame[list(types)].fillna(dict.fromkeys(text, "")).astype(types)
    twice = typed[typed.duplicated(key)]
    if len(twice):
        raise UserError(
            f"{source}: {len(twice)} setting(s) occur twice, the first of them "
            f"{twice.iloc[0][key].to_dict()}. Delete the file that should not be there."
        )
    return typed.sort_values(key, kind="stable", ignore_index=True)


def write_rows(
    folder: str | Path, model: str, rows: pd.DataFrame, per_query: pd.DataFrame
) -> tuple[Path, Path]:
    """Store one model's rows as ``<model>.csv`` and ``<model>.per_query.parquet``."""
    return _store(rows, per_query, Path(folder) / f"{model}.csv")


def merge_results(source: str | Path, destination: str | Path) -> tuple[Path, Path]:
    """Join the models' files of `source` into ``rows.csv`` and ``per_query.parquet``.

    This makes ``data/offline/`` from ``runs/offline/results``: equal input gives equal bytes.
    """
    if Path(source).resolve() == Path(destination).resolve():
        raise UserError(f"merge_results: {source} cannot be merged into itself: name another.")
    return _store(read_rows(source), read_per_query(source), Path(destination) / MERGED_ROWS)


def _store(rows: pd.DataFrame, per_query: pd.DataFrame, csv: Path) -> tuple[Path, Path]:
    parquet = _values_of(csv)
    rows, per_query = validate_rows(rows, csv), validate_per_query(per_query, parquet)
    with atomic_path(csv) as new_csv:
        rows.to_csv(new_csv, index=False, lineterminator="\n")
        with atomic_path(parquet) as new_parquet:
            per_query.to_parquet(new_parquet, index=False, compression="zstd")
            # Until the new CSV is in place there is none: it never stands beside other values.
            csv.unlink(missing_ok=True)
    return csv, parquet


def has_rows(folder: str | Path) -> bool:
    """Whether `folder` holds result rows: a merged ``rows.csv``, or one CSV per model."""
    files = _row_files(Path(folder))
    return bool(files) and files[0].read_bytes().startswith(b"model,train_collection,")


def read_rows(folder: str | Path) -> pd.DataFrame:
    """All result rows of a run's ``results`` folder or a merged one, sorted by setting."""
    # Only in numbers does "" mean "not measured"; train_factors "1" stays text.
    numbers = {column: [""] for column, kind in _TYPES.items() if kind in ("Int64", "float64")}
    frames = []
    for file in _row_files(Path(folder), needed=True):
        try:
            frame = pd.read_csv(file, dtype=_TYPES, keep_default_na=False, na_values=numbers)
        except (ValueError, TypeError) as error:  # also pandas' own and UnicodeDecodeError
            raise UserError(
                f"{file} cannot be read as result rows ({error}). Move it away if it is something "
                "else, or delete it and evaluate that model again."
            ) from error
        frames.append(validate_rows(frame, file))
    return validate_rows(pd.concat(frames, ignore_index=True), folder)


def read_per_query(folder: str | Path) -> pd.DataFrame:
    """All per-query values of `folder`, sorted by setting and query."""
    frames = []
    for file in map(_values_of, _row_files(Path(folder), needed=True)):
        try:
            frames.append(validate_per_query(pd.read_parquet(file), file))
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{file}, which belongs to the CSV beside it, cannot be read ({error}). Put it "
                "back (git restore), or evaluate that model again."
            ) from error
    return validate_per_query(pd.concat(frames, ignore_index=True), folder)


def _row_files(folder: Path, needed: bool = False) -> list[Path]:
    # A leading dot marks a file that is being written.
    files = sorted(file for file in folder.glob("*.csv") if not file.name.startswith("."))
    if folder / MERGED_ROWS in files and len(files) > 1:
        raise UserError(
            f"{folder} holds both a merged {MERGED_ROWS} and {len(files) - 1} other CSV file(s). "
            "Move one or the other away, so that nothing counts twice."
        )
    if needed and not files:
        name = folder.parent.name if folder.name == "results" else "quick"
        raise UserError(
            f"{folder} has no result rows (*.csv). `PROFILE={name} make run` makes "
            f"runs/{name}/results; the reference run's are in data/offline."
        )
    return files


def _values_of(csv: Path) -> Path:
    merged = csv.name == MERGED_ROWS
    return csv.with_name(MERGED_PER_QUERY if merged else f"{csv.stem}.per_query.parquet")


def _select(frame: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Rows that have these values in these columns."""
    return frame[np.logical_and.reduce([frame[key] == value for key, value in values.items()])]


def default_variant(frame: pd.DataFrame, pool_method: str) -> str:
    """The variant of `pool_method` that most models in `frame` were measured with.

    One for all models, so that no comparison mixes two; ties go by the order of `VARIANTS`.
    """
    measured = _select(frame, pool_method=pool_method)
    models = measured.groupby("pool_variant")["model"].nunique()
    return max(VARIANTS[pool_method], key=lambda variant: models.get(variant, 0))


def find_models(
    rows: pd.DataFrame, train_collection: str, train_method: str, train_factors: str
) -> list[str]:
    """Names of the models with this training, one per seed, sorted.

    ``train_method="none", train_factors="1"`` is FT PF1; three empty strings are the baseline.
    """
    training = {"train_method": train_method, "train_factors": train_factors}
    trained = _select(rows, train_collection=train_collection, **training)
    # Released checkpoints and the baseline at other lengths have no training collection either.
    names = set(trained["model"]) if train_collection else {BASELINE} & set(trained["model"])
    return sorted(names)


def relative_ndcg(rows: pd.DataFrame, partial: bool = False) -> pd.DataFrame:
    """Add ``relative_ndcg@10``: percent of the unpooled baseline's, by collection and engine.

    Where that was not measured, or is 0, `partial` gives NaN instead of an error.
    """
    unpooled = _select(rows, model=BASELINE, pool_method="none")
    reference = unpooled.set_index(["collection", "engine"])["ndcg@10"]
    pairs = pd.MultiIndex.from_frame(rows[["collection", "engine"]])
    denominator = reference.where(reference > 0).reindex(pairs).to_numpy(dtype=float)
    lacking = pairs[np.isnan(denominator)].unique()
    if len(lacking) and not partial:
        raise UserError(
            f"no unpooled baseline for {sorted(lacking)}: relative NDCG@10 is a percentage of it. "
            "Evaluate the model 'baseline' on these first (notebook 03, or `make run`)."
        )
    return rows.assign(**{"relative_ndcg@10": 100 * rows["ndcg@10"].to_numpy() / denominator})


def kept_ndcg(rows: pd.DataFrame) -> pd.DataFrame:
    """What a model keeps when it is pooled: ``kept``, percent of its own unpooled NDCG@10.

    `rows` are of one model and one engine. Returned are the pooled ones and, for each method that
    pools a collection, the unpooled one as its point at factor 1. NaN where unpooled NDCG@10 is 0.
    """
    unpooled = _select(rows, pool_method="none")
    pooled = rows[rows["pool_method"] != "none"]
    pairs = pooled[["collection", "pool_method"]].drop_duplicates()
    starts = unpooled.drop(columns="pool_method").merge(pairs, on="collection")
    curves = pd.concat([starts[rows.columns], pooled], ignore_index=True)
    own = curves["collection"].map(unpooled.set_index("collection")["ndcg@10"])
    curves = curves.assign(kept=100 * curves["ndcg@10"] / own.where(own > 0))
    return curves.sort_values(["collection", "pool_method", "pool_factor"], ignore_index=True)


def series(
    rows: pd.DataFrame,
    model: str,
    collection: str,
    pool_method: str,
    engine: str = "exact",
    variant: str | None = None,
    value: str = "ndcg@10",
    factors: Iterable[int] = POOL_FACTORS,
) -> pd.Series:
    """One curve: the column `value` indexed by `factors`, with the unpooled row at factor 1.

    NaN where a factor was not measured. `variant` None takes `default_variant`.
    """
    variant = default_variant(rows, pool_method) if variant is None else variant
    measured = _select(rows, model=model, collection=collection, engine=engine)
    unpooled = _select(measured, pool_method="none")
    pooled = _select(measured, pool_method=pool_method, pool_variant=variant)
    chosen = pd.concat([unpooled, pooled]) if pool_method != "none" else unpooled
    curve = chosen.astype({"pool_factor": int, value: float}).set_index("pool_factor")[value]
    return curve.reindex(pd.Index(list(factors), name="pool_factor"))


def query_values(
    per_query: pd.DataFrame,
    model: str,
    collection: str,
    pool_method: str,
    pool_factor: int,
    engine: str = "exact",
    variant: str | None = None,
) -> pd.Series:
    """NDCG@10 per query in one setting, indexed by query id (sorted); empty if not measured.

    Factor 1 is the unpooled measurement, whatever the method.
    """
    if pool_factor == 1:
        pool_method, variant = "none", ""
    variant = default_variant(per_query, pool_method) if variant is None else variant
    pooling = {"pool_method": pool_method, "pool_variant": variant, "pool_factor": pool_factor}
    chosen = _select(per_query, model=model, collection=collection, engine=engine, **pooling)
    return chosen.set_index("query_id")["ndcg@10"].sort_index()
