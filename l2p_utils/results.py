"""Stored result rows and per-query values: write, read, merge, compare.

Takes data frames with one row a measurement; gives relative scores, curves over pool factors, and
paired bootstrap intervals. What was not run is NaN here, never 0.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from l2p_utils.files import UserError, atomic_path

ROW_COLUMNS = [
    "model", "train_collection", "train_method", "train_factors", "seed",
    "collection", "engine", "pool_method", "pool_variant", "pool_factor", "renormalized",
    "query_length", "document_length", "ndcg@10", "recall@10", "mrr@10",
    "queries", "documents", "vectors_per_document", "bytes_per_document", "index_bytes",
    "query_ms", "profile", "versions",
]  # fmt: skip
# What tells one measurement from another; the per-query values carry the same columns.
SETTING = ["model", "collection", "engine", "pool_method", "pool_variant", "pool_factor"]
PER_QUERY_COLUMNS = [*SETTING, "query_id", "ndcg@10"]
# Files of earlier versions, data/offline's among them, are without these.
FURTHER_MEASURES = ["recall@10", "mrr@10"]

TEXT_COLUMNS = [
    "model", "train_collection", "train_method", "train_factors",
    "collection", "engine", "pool_method", "pool_variant", "profile", "versions",
]  # fmt: skip
INTEGER_COLUMNS = [
    "seed", "pool_factor", "query_length", "document_length", "queries", "documents", "index_bytes",
]  # fmt: skip
FLOAT_COLUMNS = [
    "ndcg@10", "recall@10", "mrr@10", "vectors_per_document", "bytes_per_document", "query_ms",
]  # fmt: skip

BASELINE = "baseline"
ENGINES = ("exact", "plaid")
POOL_METHODS = ("none", "span", "kmeans", "hierarchical")
POOL_FACTORS = (1, 2, 3, 4, 5, 6)
# In order of preference, where nobody says which variant of a method is meant.
VARIANTS = {
    "none": ("",),
    "span": ("",),
    "kmeans": ("fast", "sklearn"),
    "hierarchical": ("pylate", "paper", "euclidean"),
}
# The bundled collection that plays the part of each of the paper's data sets.
ROLES = {
    "SciFact": "docs:scipy",
    "FiQA": "docs:torch",
    "NFCorpus": "docs:numpy",
    "SCIDOCS": "docs:pandas",
    "Touche": "docs:sklearn",
}
# The paper's own data sets as they are called on the hub: `nano:scifact`, `beir:scifact`.
HUB_NAMES = {name: name.lower() for name in ROLES}
HUB_SUITES = {"exact": ("nano", "NanoBEIR"), "plaid": ("beir", "BEIR")}
RELEASED = "released:"  # before the training collection of a checkpoint that others trained
PAPER_EXHIBITS = [*(f"figure{i}" for i in range(1, 5)), *(f"table{i}" for i in range(1, 5))]
PAPER_COLUMNS = [
    "exhibit", "dataset", "label", "trained_on", "train_method", "train_factors",
    "pool_method", "pool_factor", "ndcg", "relative", "delta",
]  # fmt: skip
MERGED_ROWS = "rows.csv"
MERGED_PER_QUERY = "per_query.parquet"


# ---------------------------------------------------------------- checking


def validate_rows(rows: pd.DataFrame, source: str | Path = "rows") -> pd.DataFrame:
    """Check result rows and return them with columns in order, typed and sorted.

    Parameters
    ----------
    rows
        One row a measurement, with the columns of `ROW_COLUMNS` in any order.
    source
        What to call the rows in an error message: the file that they come from.

    Raises
    ------
    UserError
        On missing or unknown columns, a value that a column cannot hold, an unpooled row whose
        factor is not 1 (or the reverse), and two rows for one setting.
    """
    _check_columns(rows, ROW_COLUMNS, source)
    rows = _typed(rows, source)
    _check_values(rows, source)
    _check_unique(rows, SETTING, source)
    return _ordered(rows, SETTING)


def validate_per_query(per_query: pd.DataFrame, source: str | Path = "values") -> pd.DataFrame:
    """Check per-query values and return them with columns in order, typed and sorted.

    NDCG@10 is always there, `FURTHER_MEASURES` are where they were kept (NaN where only other
    models' were).

    Raises
    ------
    UserError
        On missing or unknown columns, and on two values for one setting and query.
    """
    kept = [measure for measure in FURTHER_MEASURES if measure in per_query.columns]
    _check_columns(per_query, [*PER_QUERY_COLUMNS, *kept], source)
    keys = ["model", "collection", "engine", "pool_method", "pool_variant", "query_id"]
    measures = dict.fromkeys(["ndcg@10", *kept], "float64")
    typed = per_query[[*PER_QUERY_COLUMNS, *kept]].astype(
        {**dict.fromkeys(keys, "str"), "pool_factor": "int64", **measures}
    )
    typed["pool_variant"] = typed["pool_variant"].fillna("")
    _check_unique(typed, [*SETTING, "query_id"], source)
    return _ordered(typed, [*SETTING, "query_id"])


def _check_columns(frame: pd.DataFrame, expected: list[str], source: str | Path) -> None:
    missing = [column for column in expected if column not in frame.columns]
    unknown = [str(column) for column in frame.columns if column not in expected]
    if missing or unknown:
        raise UserError(
            f"{source}: these are not result columns: missing {missing}, unknown {unknown}. "
            f"Expected exactly {expected}. Move the file away if it is something else; "
            "if it is an old result, evaluate that model again."
        )


def _typed(rows: pd.DataFrame, source: str | Path) -> pd.DataFrame:
    rows = rows[ROW_COLUMNS].copy()
    for column in TEXT_COLUMNS:
        rows[column] = rows[column].fillna("").astype("str")
    try:
        for column in INTEGER_COLUMNS:  # nullable: an unmeasured index size stays empty
            rows[column] = pd.to_numeric(rows[column]).astype("Int64")
        for column in FLOAT_COLUMNS:
            rows[column] = pd.to_numeric(rows[column]).astype("float64")
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: column {column!r} must hold numbers ({error}).") from error
    flags = rows["renormalized"].astype("str").str.lower()
    if not flags.isin(["true", "false"]).all():
        raise UserError(f"{source}: renormalized must be True or False, got {sorted(set(flags))}.")
    rows["renormalized"] = flags == "true"
    return rows


def _check_values(rows: pd.DataFrame, source: str | Path) -> None:
    for column, allowed in (("engine", ENGINES), ("pool_method", POOL_METHODS)):
        wrong = sorted(set(rows[column]) - set(allowed))
        if wrong:
            raise UserError(f"{source}: {column} {wrong} is none of {list(allowed)}.")
    if (rows["model"] == "").any() or (rows["collection"] == "").any():
        raise UserError(f"{source}: every row needs a model and a collection.")
    factor = rows["pool_factor"].fillna(0)
    if (factor < 1).any() or ((rows["pool_method"] == "none") != (factor == 1)).any():
        raise UserError(
            f"{source}: an unpooled row has pool_method 'none' and pool_factor 1, a pooled row "
            "another method and a factor of 2 or more."
        )
    for column in ("ndcg@10", "recall@10", "mrr@10"):
        measured = rows[column].dropna()
        # The sum of ten discounted gains may pass 1 by a rounding error.
        if ((measured < 0) | (measured > 1 + 1e-9)).any():
            raise UserError(f"{source}: {column} must lie in 0–1, got {measured.max():.4g}.")


def _check_unique(frame: pd.DataFrame, key: list[str], source: str | Path) -> None:
    twice = frame[frame.duplicated(key)]
    if len(twice):
        raise UserError(
            f"{source}: {len(twice)} setting(s) occur twice, the first of them "
            f"{twice.iloc[0][key].to_dict()}. Delete the file that should not be there."
        )


def _ordered(frame: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    return frame.sort_values(key, kind="stable").reset_index(drop=True)


def _check_agreement(rows: pd.DataFrame, per_query: pd.DataFrame, source: str | Path) -> None:
    """Every measured row must be the mean of its per-query values, and none be without a row."""
    kept = [measure for measure in ["ndcg@10", *FURTHER_MEASURES] if measure in per_query]
    means = per_query.groupby(SETTING)[kept].mean()
    stored = rows.dropna(subset=["ndcg@10"]).set_index(SETTING)[kept]
    stored.index = stored.index.set_levels(stored.index.levels[-1].astype("int64"), level=-1)
    lone = stored.index.symmetric_difference(means.index)
    if len(lone):
        raise UserError(
            f"{source}: rows and per-query values cover different settings, for instance "
            f"{dict(zip(SETTING, lone[0], strict=True))}. Evaluate that model again."
        )
    for measure, gap in (stored - means).abs().items():
        if gap.max() > 1e-4:
            raise UserError(
                f"{source}: {measure} of {dict(zip(SETTING, gap.idxmax(), strict=True))} differs "
                f"from the mean of its per-query values by {gap.max():.4f}. Evaluate that model "
                "again."
            )


# ---------------------------------------------------------------- storing


def write_rows(
    folder: str | Path, model: str, rows: pd.DataFrame, per_query: pd.DataFrame
) -> tuple[Path, Path]:
    """Store one model's rows as ``<model>.csv`` and ``<model>.per_query.parquet``.

    The per-query file is renamed into place first and an older CSV removed just before, so a CSV
    that can be seen always stands beside the values that it was made with.

    Returns
    -------
    (CSV path, Parquet path)

    Raises
    ------
    UserError
        When the frames are malformed, disagree, or speak of another model.
    """
    csv = Path(folder) / f"{model}.csv"
    parquet = Path(folder) / f"{model}.per_query.parquet"
    for frame, path in ((rows, csv), (per_query, parquet)):
        if set(frame.get("model", ())) != {model}:
            found = sorted(map(str, set(frame.get("model", ()))))
            raise UserError(f"{path}: expected rows of model {model!r} only, got {found}.")
    _store(rows, per_query, csv, parquet)
    return csv, parquet


def _store(rows: pd.DataFrame, per_query: pd.DataFrame, csv: Path, parquet: Path) -> None:
    rows = validate_rows(rows, csv)
    per_query = validate_per_query(per_query, parquet)
    _check_agreement(rows, per_query, csv)
    with atomic_path(csv) as new_csv:
        rows.to_csv(new_csv, index=False, lineterminator="\n")
        with atomic_path(parquet) as new_parquet:
            per_query.to_parquet(new_parquet, index=False, compression="zstd")
            csv.unlink(missing_ok=True)


def merge_results(source: str | Path, destination: str | Path) -> tuple[Path, Path]:
    """Join all models' files of `source` into ``rows.csv`` and ``per_query.parquet``.

    This makes ``data/offline/`` from ``runs/offline/results``: the same input gives the same bytes.

    Returns
    -------
    (CSV path, Parquet path) in `destination`.
    """
    if Path(source).resolve() == Path(destination).resolve():
        raise UserError(f"merge_results: {source} cannot be merged into itself: name another.")
    csv, parquet = Path(destination) / MERGED_ROWS, Path(destination) / MERGED_PER_QUERY
    _store(read_rows(source), read_per_query(source), csv, parquet)
    return csv, parquet


def has_rows(folder: str | Path) -> bool:
    """Whether `folder` holds result rows (``rows.csv``, or per-model files with their values)."""
    files = _row_files(Path(folder))
    return bool(files) and files[0].read_text("utf-8").startswith("model,train_collection,")


def read_rows(folder: str | Path) -> pd.DataFrame:
    """Read all result rows of `folder`, sorted by setting.

    Parameters
    ----------
    folder
        A run's ``results`` folder (one CSV a model), or one with a merged ``rows.csv``.

    Raises
    ------
    UserError
        When the folder or its rows are missing, or a file's columns or values are not a result's.
    """
    folder = Path(folder)
    files = _row_files(folder)
    if not files:
        raise UserError(_nothing_there(folder, "result rows (*.csv)"))
    frames = [validate_rows(_read_csv(file), file) for file in files]
    return validate_rows(pd.concat(frames, ignore_index=True), folder)


def read_per_query(folder: str | Path) -> pd.DataFrame:
    """Read all per-query values of `folder`, sorted by setting and query.

    Raises
    ------
    UserError
        As `read_rows`; also when a CSV's per-query file is not beside it.
    """
    folder = Path(folder)
    files = [_values_of(file) for file in _row_files(folder)]
    if not files:
        raise UserError(_nothing_there(folder, "per-query values (*.parquet)"))
    frames = [validate_per_query(_read_parquet(file), file) for file in files]
    return validate_per_query(pd.concat(frames, ignore_index=True), folder)


def _row_files(folder: Path) -> list[Path]:
    # A leading dot marks a file that is being written.
    files = sorted(file for file in folder.glob("*.csv") if not file.name.startswith("."))
    merged = folder / MERGED_ROWS
    if merged in files and len(files) > 1:
        raise UserError(
            f"{folder} holds both a merged {MERGED_ROWS} and {len(files) - 1} other CSV file(s). "
            "Move one or the other away, so that nothing counts twice."
        )
    return files


def _values_of(csv: Path) -> Path:
    if csv.name == MERGED_ROWS:
        return csv.with_name(MERGED_PER_QUERY)
    return csv.with_name(f"{csv.stem}.per_query.parquet")


def _read_csv(file: Path) -> pd.DataFrame:
    try:
        # As text, so that "" stays "" and train_factors "1" no number; `validate_rows` converts.
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} cannot be read as CSV ({error}). Delete it and evaluate that model again."
        ) from error
    return frame.replace({column: {"": None} for column in INTEGER_COLUMNS + FLOAT_COLUMNS})


def _read_parquet(file: Path) -> pd.DataFrame:
    if not file.is_file():
        raise UserError(
            f"{file} is missing beside its CSV. Put it back (git restore), or evaluate again."
        )
    try:
        return pd.read_parquet(file)
    except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UserError(
            f"{file} cannot be read as Parquet ({error}). Delete it and its CSV, evaluate again."
        ) from error


def _nothing_there(folder: Path, what: str) -> str:
    state = "has no" if folder.is_dir() else "does not exist, so there are no"
    name = folder.parent.name if folder.name == "results" else "quick"
    return (
        f"{folder} {state} {what}. `PROFILE={name} make run` makes runs/{name}/results; "
        "the reference run's are in data/offline."
    )


# ---------------------------------------------------------------- roles


@dataclass(frozen=True)
class Roles:
    """Which collections stand for the paper's data sets, by what is done with them.

    Attributes
    ----------
    exact, plaid
        Data set (a key of `ROLES`) → the collection that each engine searches.
    training
        Data set → the collection whose training split models are trained on.
    suites
        Engine → what its collections are called together; empty unless they are the paper's own.
    """

    exact: Mapping[str, str]
    plaid: Mapping[str, str]
    training: Mapping[str, str]
    suites: Mapping[str, str] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Whether the collections are the paper's own, so that values can be compared."""
        return bool(self.suites)

    def evaluated(self, dataset: str, engine: str = "exact") -> str:
        """The collection of `dataset` that `engine` searches; "" where there is none."""
        return {"exact": self.exact, "plaid": self.plaid}[engine].get(dataset, "")

    def trained(self, dataset: str) -> str:
        """The collection that models "trained on `dataset`" were trained on; "" for none."""
        return self.training.get(dataset, "")


def roles_of(rows: pd.DataFrame | None, given: Roles | Mapping[str, str] | None = None) -> Roles:
    """The roles that `rows` are read with.

    Rows of NanoBEIR or BEIR collections are the paper's own data sets: exact search reads
    ``nano:…``, PLAID ``beir:…``, and models were trained on ``beir:…``, as in the paper. All other
    rows, and a folder that holds bundled collections beside the hub's, go by `ROLES`.

    Parameters
    ----------
    rows
        Result rows; None for the default roles.
    given
        Roles that somebody chose, or one collection a data set for all purposes: then these.

    Raises
    ------
    UserError
        When one collection is there in several revisions, so that curves would mix them.
    """
    if isinstance(given, Roles):
        return given
    if given is not None:
        return Roles(given, given, given)
    found = [] if rows is None else sorted(set(rows["collection"]))
    if set(found) & set(ROLES.values()) or not any(map(_on_hub, found)):
        return Roles(ROLES, ROLES, ROLES)
    trained = sorted(set(rows["train_collection"]))
    return Roles(
        exact=_hub_roles("nano", found),
        plaid=_hub_roles("beir", found),
        training=_hub_roles("beir", trained),
        suites={engine: title for engine, (_, title) in HUB_SUITES.items()},
    )


def _on_hub(collection: str) -> bool:
    return collection.startswith(tuple(f"{prefix}:" for prefix, _ in HUB_SUITES.values()))


def _hub_roles(prefix: str, names: list[str]) -> dict[str, str]:
    """Data set → its name among `names`, which may end in ``@revision``."""
    roles = {}
    for dataset, name in HUB_NAMES.items():
        plain = f"{prefix}:{name}"
        found = [one for one in names if one.split("@")[0] == plain]
        if len(found) > 1:
            raise UserError(
                f"rows of {plain} in several revisions: {found}. Figures and tables read one. "
                "Move the files with the others out of the results folder, or evaluate again."
            )
        roles[dataset] = found[0] if found else plain
    return roles


# ---------------------------------------------------------------- selecting


def default_variant(frame: pd.DataFrame, pool_method: str) -> str:
    """The variant of `pool_method` that most models in `frame` were measured with.

    One variant for all models, so that no comparison mixes two. Ties go by `VARIANTS`' order.
    """
    if pool_method not in VARIANTS:
        raise UserError(f"pool_method {pool_method!r} is none of {list(VARIANTS)}.")
    order = VARIANTS[pool_method]
    measured = frame[frame["pool_method"] == pool_method]
    models = measured.groupby("pool_variant")["model"].nunique()
    if models.empty:
        return order[0]
    rank = {variant: -place for place, variant in enumerate(order)}
    return max(models.index, key=lambda name: (models[name], rank.get(name, -len(order))))


def find_models(
    rows: pd.DataFrame, train_collection: str, train_method: str, train_factors: str
) -> list[str]:
    """Names of the models trained so, one a seed, sorted; ``[]`` where none was evaluated.

    ``train_method="none", train_factors="1"`` is FT PF1; three empty strings are the baseline. The
    baseline at other document lengths and released checkpoints are found by neither.
    """
    if not train_collection:  # nothing but the baseline itself is untrained in a curve
        asked = not (train_method or train_factors)
        return [BASELINE] if asked and (rows["model"] == BASELINE).any() else []
    chosen = rows[
        (rows["train_collection"] == train_collection)
        & (rows["train_method"] == train_method)
        & (rows["train_factors"] == train_factors)
    ]
    return sorted(chosen["model"].unique())


def relative_ndcg(rows: pd.DataFrame, partial: bool = False) -> pd.DataFrame:
    """Add ``relative_ndcg@10``: percent of the unpooled baseline's NDCG@10.

    The baseline is the one of the same collection and engine.

    Parameters
    ----------
    partial
        Whether rows may lack their baseline, as in a run that is not finished: NaN there.

    Raises
    ------
    UserError
        When that baseline row is missing or 0 for a collection and engine in `rows`.
    """
    unpooled = rows[(rows["model"] == BASELINE) & (rows["pool_method"] == "none")]
    reference = unpooled.set_index(["collection", "engine"])["ndcg@10"]
    pairs = pd.MultiIndex.from_frame(rows[["collection", "engine"]])
    denominator = reference.reindex(pairs).to_numpy()
    denominator = np.where(denominator > 0, denominator, np.nan)
    lacking = pairs[np.isnan(denominator)].unique()
    if len(lacking) and not partial:
        raise UserError(
            f"no unpooled baseline for {sorted(lacking)}: relative NDCG@10 is a percentage of it. "
            "Evaluate the model 'baseline' on these first (notebook 03, or `make run`)."
        )
    return rows.assign(**{"relative_ndcg@10": 100 * rows["ndcg@10"].to_numpy() / denominator})


def kept_ndcg(rows: pd.DataFrame) -> pd.DataFrame:
    """What one model keeps when it is pooled: ``kept``, percent of its own unpooled NDCG@10.

    Parameters
    ----------
    rows
        One model's, of one engine.

    Returns
    -------
    pandas.DataFrame
        The pooled rows, and for each method that pools a collection its unpooled row, as the
        method's point at factor 1. NaN where the unpooled NDCG@10 is 0.
    """
    unpooled = rows[rows["pool_method"] == "none"]
    pooled = rows[rows["pool_method"] != "none"]
    pairs = pooled[["collection", "pool_method"]].drop_duplicates()
    starts = unpooled.drop(columns="pool_method").merge(pairs, on="collection")
    curves = pd.concat([starts[rows.columns], pooled], ignore_index=True)
    own = curves["collection"].map(unpooled.set_index("collection")["ndcg@10"])
    curves = curves.assign(kept=100 * curves["ndcg@10"] / own.where(own > 0))
    return curves.sort_values(["collection", "pool_method", "pool_factor"], ignore_index=True)


def without_baseline(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """(collection, engine) pairs in `rows` without an unpooled baseline above 0, sorted."""
    relative = relative_ndcg(rows, partial=True)
    gaps = relative[relative["relative_ndcg@10"].isna() & relative["ndcg@10"].notna()]
    return sorted(set(zip(gaps["collection"], gaps["engine"], strict=True)))


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
    """One curve: `value` by pool factor, with the unpooled row at factor 1.

    Parameters
    ----------
    variant
        Of the pool method; None takes `default_variant`.
    value
        A numeric column of `rows` (after `relative_ndcg` also ``relative_ndcg@10``).

    Returns
    -------
    Series indexed by `factors`; NaN where a factor was not run.
    """
    variant = default_variant(rows, pool_method) if variant is None else variant
    same = (
        (rows["model"] == model) & (rows["collection"] == collection) & (rows["engine"] == engine)
    )
    pooled = (rows["pool_method"] == pool_method) & (rows["pool_variant"] == variant)
    chosen = rows[same & (pooled | (rows["pool_method"] == "none"))]
    curve = pd.Series(
        chosen[value].to_numpy(dtype=float), index=chosen["pool_factor"].to_numpy(dtype=int)
    )
    return curve.reindex(pd.Index(list(factors), name="pool_factor")).rename(value)


def query_values(
    per_query: pd.DataFrame,
    model: str,
    collection: str,
    pool_method: str,
    pool_factor: int,
    engine: str = "exact",
    variant: str | None = None,
) -> pd.Series:
    """NDCG@10 of each query in one setting, indexed by query id (sorted); empty if not run.

    Factor 1 is the unpooled measurement, whatever the method.
    """
    if pool_factor == 1:
        pool_method, variant = "none", ""
    variant = default_variant(per_query, pool_method) if variant is None else variant
    chosen = per_query[
        (per_query["model"] == model)
        & (per_query["collection"] == collection)
        & (per_query["engine"] == engine)
        & (per_query["pool_method"] == pool_method)
        & (per_query["pool_variant"] == variant)
        & (per_query["pool_factor"] == pool_factor)
    ]
    return chosen.set_index("query_id")["ndcg@10"].sort_index()


# ---------------------------------------------------------------- comparing


@functools.lru_cache(maxsize=8)
def _draws(queries: int, seed: int, group: int, resamples: int) -> np.ndarray:
    """How often each resample holds each query: (resamples, queries), rows sum to `queries`."""
    generator = np.random.default_rng([seed, group])
    picks = generator.integers(0, queries, size=(resamples, queries))
    picks += np.arange(resamples)[:, None] * queries  # one range of numbers a resample
    counts = np.bincount(picks.ravel(), minlength=resamples * queries)
    return counts.reshape(resamples, queries).astype(np.float32)


def bootstrap_means(
    groups: Sequence[np.ndarray], seed: int = 42, resamples: int = 10_000
) -> np.ndarray:
    """Bootstrap the sum over groups of the groups' means, resampling within each group.

    Parameters
    ----------
    groups
        One array a collection, each (queries, statistics): the values of a query in one row, so
        that they are resampled together. The number of queries may differ between collections.

    Returns
    -------
    (resamples, statistics) array of sums of means.
    """
    total = 0.0
    for place, group in enumerate(groups):
        group = np.asarray(group, dtype=float)
        # (resamples, queries) @ (queries, statistics)
        total = total + _draws(len(group), seed, place, resamples) @ group / len(group)
    return np.asarray(total)


def paired_bootstrap(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    seed: int = 42,
    resamples: int = 10_000,
) -> tuple[float, float, float]:
    """Mean of ``a - b`` over queries and its 95 % percentile interval.

    Parameters
    ----------
    a, b
        (queries,) values of the same queries in the same order.

    Returns
    -------
    (difference, low, high)

    Raises
    ------
    UserError
        When the two differ in length, are empty, or hold a NaN.

    Notes
    -----
    Queries are drawn with replacement, each with both its values (Efron and Tibshirani, *An
    Introduction to the Bootstrap*, 1993, chapter 13; for retrieval: Sakai, SIGIR 2006).
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UserError(
            f"paired_bootstrap: expected two lists of the same queries, got shapes {a.shape} and "
            f"{b.shape}. Compare settings that were measured on the same queries."
        )
    if np.isnan(a).any() or np.isnan(b).any():
        raise UserError("paired_bootstrap: NaN among the values; leave out what was not run.")
    difference = a - b
    low, high = np.percentile(bootstrap_means([difference[:, None]], seed, resamples), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def compare(
    per_query: pd.DataFrame,
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    seed: int = 42,
    resamples: int = 10_000,
) -> dict[str, float | int]:
    """Compare two settings query by query.

    Parameters
    ----------
    first, second
        Arguments of `query_values`: model, collection, pool_method, pool_factor and, where it
        matters, engine and variant.

    Returns
    -------
    dict with ``first``, ``second`` (mean NDCG@10), ``difference``, ``low``, ``high``, ``queries``;
    NaN and 0 queries where one of the two was not run.

    Raises
    ------
    UserError
        When the two were measured on different queries.
    """
    a, b = query_values(per_query, **first), query_values(per_query, **second)
    if a.empty or b.empty:
        nan = float("nan")
        means = {"first": nan if a.empty else float(a.mean())}
        means["second"] = nan if b.empty else float(b.mean())
        return {**means, "difference": nan, "low": nan, "high": nan, "queries": 0}
    if not a.index.equals(b.index):
        raise UserError(
            f"compare: {dict(first)} ({len(a)} queries) and {dict(second)} ({len(b)}) were not "
            "measured on the same queries. Evaluate both on the same split."
        )
    difference, low, high = paired_bootstrap(a.to_numpy(), b.to_numpy(), seed, resamples)
    means = {"first": float(a.mean()), "second": float(b.mean())}
    return {**means, "difference": difference, "low": low, "high": high, "queries": len(a)}


# ---------------------------------------------------------------- the paper's numbers


def read_paper(folder: str | Path) -> pd.DataFrame:
    """Read the paper's figures and tables (``data/paper``) as one tidy frame.

    Returns
    -------
    One row a value with the columns of `PAPER_COLUMNS`: ``exhibit`` (figure1 … table4),
    ``dataset`` (the keys of `ROLES`, and "Average"), ``label`` (the model as printed),
    ``trained_on`` / ``train_method`` / ``train_factors`` (empty for the baseline), ``ndcg`` and
    ``delta`` on 0–1, ``relative`` in percent; NaN where an exhibit does not print it.

    Raises
    ------
    UserError
        When a file is missing or lacks a column.
    """
    frames = [_read_exhibit(Path(folder), exhibit) for exhibit in PAPER_EXHIBITS]
    return pd.concat(frames, ignore_index=True)


# What an exhibit's caption says once for all its rows.
_CAPTIONS = {
    "figure1": {"model": "Baseline"},
    "figure2": {"pool_method": "span"},
    "table1": {"dataset": "SciFact", "pool_method": "span"},
    "table2": {"pool_method": "kmeans"},
    "table3": {"dataset": "SciFact", "pool_method": "hierarchical"},
    "table4": {"dataset": "SciFact", "pool_method": "kmeans"},
}
_NAMES = {
    "method": "pool_method",
    "pooling_method": "pool_method",
    "relative_ndcg10": "relative",
    "relative_percent": "relative",
    "ndcg10": "ndcg",
}


def _read_exhibit(folder: Path, exhibit: str) -> pd.DataFrame:
    file = folder / f"{exhibit}.csv"
    if not file.is_file():
        raise UserError(
            f"{file} is missing: the paper's numbers belong there. `git restore data/paper`."
        )
    frame = pd.read_csv(file).rename(columns=_NAMES).assign(**_CAPTIONS.get(exhibit, {}))
    lacking = {"dataset", "model", "pool_method", "pool_factor", "relative"} - set(frame.columns)
    if lacking:
        raise UserError(f"{file} lacks {sorted(lacking)}. `git restore data/paper` brings it back.")
    frame["dataset"] = frame["dataset"].replace({"FiQA2018": "FiQA", "Touche2020": "Touche"})
    trained = [parse_label(*pair) for pair in zip(frame["model"], frame["dataset"], strict=True)]
    frame[["trained_on", "train_method", "train_factors"]] = trained
    frame = frame.assign(exhibit=exhibit, label=frame["model"])
    return frame.reindex(columns=PAPER_COLUMNS).astype(dict.fromkeys(PAPER_COLUMNS[-3:], "float64"))


def parse_label(label: str, dataset: str) -> tuple[str, str, str]:
    """What a model's name in the paper says: (trained_on, train_method, train_factors).

    A name without a data set is a model trained on the one that it is evaluated on, `dataset`:
    ``parse_label("FT Span PF2", "FiQA")`` is ``("FiQA", "span", "2")``.

    Raises
    ------
    UserError
        When the name is not one of the paper's.
    """
    if label == "Baseline":
        return "", "", ""
    found = re.fullmatch(r"FT (?:(SciFact|FiQA) )?(?:(Span|Hier|KMeans) )?PF([1-6](?:-6)?)", label)
    if not found:
        raise UserError(
            f"{label!r} is not a model of the paper: expected 'Baseline' or a name such as "
            "'FT PF1', 'FT Hier PF2', 'FT SciFact KMeans PF1-6'."
        )
    methods = {None: "none", "Span": "span", "Hier": "hierarchical", "KMeans": "kmeans"}
    return found[1] or dataset, methods[found[2]], found[3]
