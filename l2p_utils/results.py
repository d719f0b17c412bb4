"""Result rows and per-query values: write, read, select, compare runs.

A result row is one measurement: a model on a collection, searched by an engine, with its documents
pooled in one way. What was not measured is NaN, never 0. A folder of results holds one Parquet file
per model in ``rows/`` and one in ``per_query/``: ``pandas.read_parquet("data/offline/rows")`` reads
all rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.stats import t

from l2p_utils.files import UserError, atomic_path, command, from_root

# Columns of a result row, in order, with their types (integers are nullable). Measures are means
# over queries, in 0–1; bytes are those of float32 vectors; index_bytes is PLAID's index on disk,
# exact search has none; query_ms is the search alone, per query; lengths are in word pieces.
# `renormalized`: whether the means that were searched, `train_renormalized`: those that were
# trained with, had been scaled to unit length.
_TYPES = {
    "model": "str", "train_collection": "str", "train_method": "str", "train_factors": "str",
    "train_renormalized": "bool", "seed": "Int64", "collection": "str", "engine": "str",
    "pool_method": "str", "pool_variant": "str", "pool_factor": "Int64", "renormalized": "bool",
    "query_length": "Int64", "document_length": "Int64",
    "ndcg@10": "float64", "recall@10": "float64", "mrr@10": "float64",
    "queries": "Int64", "documents": "Int64", "vectors_per_document": "float64",
    "bytes_per_document": "float64", "index_bytes": "Int64", "query_ms": "float64",
    "profile": "str", "versions": "str",
}  # fmt: skip
ROW_COLUMNS = list(_TYPES)
# Key columns of a measurement; the per-query values carry them too.
SETTING = [
    "model", "collection", "engine", "pool_method", "pool_variant", "pool_factor", "renormalized",
]  # fmt: skip
MEASURES = ["ndcg@10", "recall@10", "mrr@10"]
_VALUE_TYPES = {
    **{column: _TYPES[column] for column in SETTING}, "pool_factor": "int64", "query_id": "str",
    **dict.fromkeys(MEASURES, "float64"),
}  # fmt: skip
ROWS, PER_QUERY = "rows", "per_query"  # subfolders

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


def validate_rows(rows: pd.DataFrame, source: str | Path = "rows") -> pd.DataFrame:
    """Result rows with columns in order, typed, sorted by setting; `source` is for messages."""
    return _validate(rows, _TYPES, SETTING, source)


def validate_per_query(per_query: pd.DataFrame, source: str | Path = "values") -> pd.DataFrame:
    """As `validate_rows`, of per-query values."""
    return _validate(per_query, _VALUE_TYPES, [*SETTING, "query_id"], source)


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
    try:
        typed = frame[list(types)].fillna(dict.fromkeys(text, "")).astype(types)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{source} holds no results: {error}. Delete it and evaluate that model again."
        ) from error
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
    """Store one model's rows and values in `folder`: ``rows/<model>.parquet``, ``per_query/…``.

    Equal results give equal bytes.
    """
    files = [Path(folder) / part / f"{model}.parquet" for part in (ROWS, PER_QUERY)]
    frames = validate_rows(rows, files[0]), validate_per_query(per_query, files[1])
    # Until all is written there are no rows: they never stand beside another run's values.
    files[0].unlink(missing_ok=True)
    for file, frame in reversed(list(zip(files, frames, strict=True))):
        with atomic_path(file) as temporary:
            # values of text repeat: as categories they are stored once
            text = {c: "category" for c in frame if isinstance(frame[c].dtype, pd.StringDtype)}
            frame.astype(text).to_parquet(temporary, index=False, compression="zstd")
    return files[0], files[1]


def has_rows(folder: str | Path) -> bool:
    """Whether `folder` holds result rows."""
    return bool(_files(folder, ROWS))


def read_rows(folder: str | Path) -> pd.DataFrame:
    """All result rows of a run's ``results`` folder, or of ``data/offline``, model by model."""
    return _read(folder, ROWS, validate_rows)


def read_per_query(folder: str | Path) -> pd.DataFrame:
    """All per-query values of `folder`, of the models whose rows are complete."""
    return _read(folder, PER_QUERY, validate_per_query)


def _files(folder: str | Path, part: str) -> list[Path]:
    # A leading dot marks a file that is being written.
    files = sorted(Path(folder, part).glob("*.parquet"))
    return [file for file in files if not file.name.startswith(".")]


def _read(folder: str | Path, part: str, validate: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    folder, frames, owners = Path(folder), [], {}
    for file in _files(folder, ROWS):
        file = folder / part / file.name
        try:
            frame = pd.read_parquet(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{file} cannot be read ({error}). Put it back (git restore), or delete "
                f"{folder / ROWS / file.name} and evaluate that model again."
            ) from error
        frames.append(validate(frame, file))
        for model in frames[-1]["model"].unique():
            if (owner := owners.setdefault(model, file)) != file:
                raise UserError(
                    f"{owner} and {file} both hold results of {model!r}. Delete one, and the file "
                    "of the same name beside it, so that nothing counts twice."
                )
    if not frames:
        name = folder.parent.name if folder.name == "results" else "quick"
        raise UserError(
            f"{folder} has no result rows ({ROWS}/*.parquet). `PROFILE={name} make run` makes "
            f"runs/{name}/results; the reference run's are in data/offline."
        )
    return pd.concat(frames, ignore_index=True)


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


def is_baseline(rows: pd.DataFrame) -> pd.Series:
    """Mask of the rows of baselines, one per training seed, at the profile's own lengths."""
    return (rows["train_collection"] == "") & (rows["train_method"] == "")


def searched(rows: pd.DataFrame, renormalized: bool = False) -> pd.DataFrame:
    """The rows (or per-query values) of raw or of unit-length means.

    Unpooled ones are in both, and so are PLAID's: it scales to unit length whatever it is given.
    """
    both = (rows["pool_method"] == "none") | (rows["engine"] == "plaid")
    return rows[both | (rows["renormalized"] == renormalized)]


def find_models(
    rows: pd.DataFrame,
    train_collection: str,
    train_method: str,
    train_factors: str,
    train_renormalized: bool = False,
) -> list[str]:
    """Names of the models with this training, one per seed, in the order of the seeds.

    ``train_method="none", train_factors="1"`` is FT PF1; three empty strings are the baseline.
    """
    training = {"train_method": train_method, "train_factors": train_factors}
    training |= {"train_collection": train_collection, "train_renormalized": train_renormalized}
    trained = _select(rows, **training)
    if not train_collection:  # others of the hub have none either
        trained = trained[is_baseline(trained)]
    trained = trained[["seed", "model"]].drop_duplicates()
    return trained.sort_values(["seed", "model"])["model"].tolist()


def relative_ndcg(rows: pd.DataFrame, partial: bool = False) -> pd.DataFrame:
    """Add ``relative_ndcg@10``: percent of the unpooled baseline's, by collection and engine.

    With several training seeds that is the mean of their baselines. Where it was not measured, or
    is 0, `partial` gives NaN instead of an error.
    """
    unpooled = _select(rows[is_baseline(rows)], pool_method="none")
    reference = unpooled.groupby(["collection", "engine"])["ndcg@10"].mean()
    pairs = pd.MultiIndex.from_frame(rows[["collection", "engine"]])
    denominator = reference.where(reference > 0).reindex(pairs).to_numpy(dtype=float)
    lacking = pairs[np.isnan(denominator)].unique()
    if len(lacking) and not partial:
        raise UserError(
            f"no unpooled baseline for {sorted(lacking)}: relative NDCG@10 is a percentage of it. "
            "Evaluate the model 'baseline' on these first (notebook 03, or `make run`)."
        )
    return rows.assign(**{"relative_ndcg@10": 100 * rows["ndcg@10"].to_numpy() / denominator})


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Pooled rows, with the unpooled ones as the points at factor 1 of each method beside them."""
    keys = ["model", "collection", "engine"]
    pooled = rows[rows["pool_method"] != "none"]
    unpooled = _select(rows, pool_method="none").drop(columns="pool_method")
    starts = unpooled.merge(pooled[[*keys, "pool_method"]].drop_duplicates(), on=keys)
    return pd.concat([starts[rows.columns], pooled], ignore_index=True)


def kept_ndcg(rows: pd.DataFrame) -> pd.DataFrame:
    """What a model keeps when it is pooled: ``kept``, percent of its own unpooled NDCG@10.

    `rows` are of one model and one engine, searched with raw or with unit-length means (see
    `searched`); returned are their `curves`. NaN where unpooled NDCG@10 is 0.
    """
    unpooled = _select(rows, pool_method="none").set_index("collection")["ndcg@10"]
    found = curves(rows)
    kept = 100 * found["ndcg@10"] / found["collection"].map(unpooled.where(unpooled > 0))
    order = ["collection", "pool_method", "pool_factor"]
    return found.assign(kept=kept).sort_values(order, ignore_index=True)


# ---------------------------------------------------------------- a run against the reference

# What makes a measurement the same one, whatever its training seed.
CELL = [
    "train_collection", "train_method", "train_factors", "train_renormalized", "collection",
    "engine", "pool_method", "pool_variant", "pool_factor", "renormalized", "query_length",
    "document_length", "queries", "documents",
]  # fmt: skip
MOST_OUTSIDE = 0.10  # share of cells: a twentieth is to be expected
HEADLINE = {"pool_method": "kmeans", "pool_factor": 6}


def compare_runs(rows: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """NDCG@10 of a run's cells beside where one more seed of the reference is expected.

    The 95 % prediction interval of a cell with n seeds is mean ± t · s · √(1 + 1/n). Its standard
    deviation over seeds, s, is pooled over the models and collections with the same pool method,
    pool factor and length of the means, and so are the degrees of freedom of t. Exact search only.
    A row per cell that both have: `CELL`, ``ours``, ``mean``, ``low``, ``high``, ``inside``. Cells
    whose spread is unknown, for the reference has one seed of them all, are refused.
    """
    pooled = ["pool_method", "pool_factor", "renormalized"]
    return _beside(_select(reference, engine="exact"), rows, CELL, pooled)


def compare_headlines(rows: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """The headline differences of a run beside where one more seed of the reference is expected.

    What kmeans PF1-6 training has over FT PF1 and over the baseline of its seed at kmeans PF6, in
    NDCG@10, mean of the collections that both runs searched. A row per rival, training collection
    and length of the means; numbers as in `compare_runs`, but all together are inside with 95 %
    probability (Bonferroni), as one that is outside counts.
    """
    both = set(rows["collection"]) & set(reference["collection"])
    keys = ["rival", "train_collection", "renormalized"]
    gains = [_gains(frame[frame["collection"].isin(both)]) for frame in (reference, rows)]
    return _beside(*gains, keys, keys, together=True)


def _gains(rows: pd.DataFrame) -> pd.DataFrame:
    """``ndcg@10``, the gains, by rival, training collection, length of the means and seed."""
    rows, parts = _select(rows, engine="exact", train_renormalized=False, **HEADLINE), []
    trained = _select(rows, train_method="kmeans", train_factors="1-6")
    for rival, method in {"FT PF1": "none", "the baseline": ""}.items():
        keys = ["seed", "collection", "renormalized", *(["train_collection"] if method else [])]
        others = _select(rows, train_method=method).set_index(keys)["ndcg@10"].rename("theirs")
        pairs = trained.join(others, on=keys, how="inner").assign(rival=rival)
        parts.append(pairs.assign(**{"ndcg@10": pairs["ndcg@10"] - pairs["theirs"]}))
    keys = ["rival", "train_collection", "renormalized", "seed"]
    return pd.concat(parts).groupby(keys)["ndcg@10"].mean().reset_index()


def _beside(
    reference: pd.DataFrame,
    rows: pd.DataFrame,
    cell: list[str],
    pooled: list[str],
    together: bool = False,
) -> pd.DataFrame:
    """Means of `rows` by `cell` beside the prediction intervals of `compare_runs`."""
    cells = reference.groupby(cell)["ndcg@10"].agg(["mean", "count", "var"]).reset_index()
    cells["freedom"] = cells["count"] - 1
    cells["squares"] = cells["freedom"] * cells["var"].fillna(0.0)
    sums = cells.groupby(pooled)[["squares", "freedom"]].transform("sum")
    # NaN of one seed
    cells["error"] = np.sqrt(sums["squares"] / sums["freedom"] * (1 + 1 / cells["count"]))
    ours = rows.groupby(cell)["ndcg@10"].mean().rename("ours").reset_index()
    found = cells.assign(freedom=sums["freedom"]).merge(ours, on=cell)
    tail = 0.025 / max(len(found) if together else 1, 1)
    half = t.ppf(1 - tail, found["freedom"]) * found["error"]
    found = found.assign(low=found["mean"] - half, high=found["mean"] + half)
    if found["low"].isna().any():
        raise UserError(
            "The reference has rows of one training seed, so it shows no spread to compare a run "
            "with. Expected rows of two seeds or more."
        )
    inside = found["ours"].between(found["low"], found["high"])
    return found.assign(inside=inside)[[*cell, "ours", "mean", "low", "high", "inside"]]


@command
def main(arguments: list[str] | None = None) -> int:
    """Hold a run's rows against the spread of the reference's seeds; 1 where they are outside."""
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.results", description=main.__doc__)
    parser.add_argument("run", help="a folder of result rows, such as runs/quick/results")
    parser.add_argument("--reference", default=from_root("data/offline"))
    options = parser.parse_args(arguments)
    rows, reference = read_rows(options.run), read_rows(options.reference)
    cells, headlines = compare_runs(rows, reference), compare_headlines(rows, reference)
    if cells.empty or headlines.empty:
        raise UserError(
            f"{options.run} and {options.reference} have no headline difference in common. "
            "Expected the baseline, FT PF1 and kmeans PF1-6 in both, of the same lengths, queries "
            "and documents, as `make run` (quick) measures them."
        )
    outside, same = cells[~cells["inside"]], [*CELL, "seed", "ndcg@10"]
    repeated = (rows.merge(reference[same], on=same)["engine"] == "exact").sum()
    percent = 100 * len(outside) / len(cells)
    print(
        f"{len(cells)} cells of exact search were compared with the reference; {repeated} rows "
        "equal its rows of the same seed, to the last digit.\n"
        f"{len(outside)} cells ({percent:.1f} %) are outside their 95 % interval; with another "
        "seed, 5 % are to be expected."
    )
    if len(outside):
        names = rows[[*CELL, "model"]].drop_duplicates(CELL)
        print(_shown(outside.merge(names, on=CELL), "model", "collection", *HEADLINE))
    print("\nWhat FT kmeans PF1-6 has over its rivals: k-means, PF6, mean of the collections.")
    print(_shown(headlines, "train_collection", "rival", "inside"))
    good = percent <= 100 * MOST_OUTSIDE and headlines["inside"].all()
    print(
        "\nThe run is within the spread of the reference's training seeds."
        if good
        else "\nThe run is NOT within the spread of the reference's training seeds: at most "
        f"{100 * MOST_OUTSIDE:.0f} % of the cells may be outside, and no headline difference."
    )
    return 0 if good else 1


def _shown(found: pd.DataFrame, *columns: str) -> str:
    """Text: `columns`, the length of the means, NDCG@10 of the run and where it is expected."""
    expected = [f"{low:.4f} to {high:.4f}" for low, high in found[["low", "high"]].to_numpy()]
    means = np.where(found["renormalized"], "unit length", "raw")
    shown = found.assign(means=means, here=found["ours"].round(4), expected=expected)
    return shown[[*columns, "means", "here", "expected"]].to_string(index=False)


if __name__ == "__main__":
    sys.exit(main())
