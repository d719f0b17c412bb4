"""Pooling-aware fine-tuning: one of a profile's models, trained or reused.

Takes mined rows and a model; gives a model folder with its provenance and a log of every step. With
several processes in the profile it starts them; by hand, two of them:
``torchrun --standalone --nproc-per-node 2 -m l2p_utils.training --profile paper
--collection beir:scifact --pool-method kmeans --pool-factors 1-6``

Source: S. Josef, *Learn to Pool* (LIR @ ECIR 2026), section on fine-tuning.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from datasets import Dataset
from sentence_transformers.util import get_device_name

from l2p_utils import parallel
from l2p_utils.collection import Collection, carves_dev, load_collection, profile_split, subset
from l2p_utils.files import (
    PROVENANCE,
    UserError,
    atomic_path,
    locked,
    read_json,
    recover,
    remove,
    settings_match,
    versions,
    write_json,
)
from l2p_utils.fitting import Fitted, fit
from l2p_utils.mining import load_mined, mine, mined_fingerprint, mined_folder
from l2p_utils.model import fingerprint, forward_precision, load_model, quiet_loading, use_threads
from l2p_utils.pooling import CODE, PoolMethod, stored_variant
from l2p_utils.profile import (
    BASELINE,
    Profile,
    Run,
    TrainingSettings,
    check_run,
    check_seed,
    load_profile,
    model_name,
    parse_factors,
)
from l2p_utils.teacher import untrained_model

LOG_FILE = "training_log.csv"
COMMAND = ["-m", "l2p_utils.training"]  # what each of several processes runs


def training_rows(mined: Dataset, collection: Collection, max_rows: int | None) -> Dataset:
    """Mined rows with texts, in the columns that PyLate's collator wants.

    Parameters
    ----------
    mined
        `query_id, document_ids, scores` (and `labels`, which are left out: the collator would take
        them for text).
    max_rows
        Take so many, spread evenly over the mined rows.

    Returns
    -------
    datasets.Dataset
        `query` (str), `documents` (list of str), `scores` (list of float).

    Raises
    ------
    UserError
        When a row names a query or a document that the collection does not have.
    """
    if max_rows is not None and max_rows < len(mined):
        mined = mined.select(np.linspace(0, len(mined) - 1, max_rows).round().astype(int))
    rows = []
    for row in mined:
        unknown = [d for d in row["document_ids"] if d not in collection.corpus]
        if unknown or row["query_id"] not in collection.queries:
            raise UserError(
                f"The mined row of query {row['query_id']!r} names "
                f"{unknown[:3] or 'a query'} that {collection.name} does not have. The collection "
                "has changed since it was mined: run 01_data_mining again."
            )
        documents = [collection.corpus[d] for d in row["document_ids"]]
        query = collection.queries[row["query_id"]]
        rows.append({"query": query, "documents": documents, "scores": row["scores"]})
    return Dataset.from_list(rows)


def train(
    profile: Profile,
    collection: str,
    pool_method: PoolMethod,
    pool_factors: Sequence[int],
    seed: int | None = None,
    progress: bool = True,
) -> Path:
    """Train one of a profile's models, or reuse it when it was made with the same settings.

    On the warm-up's collection this makes ``baseline`` from the untrained bundled model; on any
    other it fine-tunes the baseline, which is warmed up first where it is missing. A profile with
    several `processes` has them started here, unless a launcher has started this one among others
    already.

    Returns
    -------
    pathlib.Path
        The model's folder, with `provenance.json` and the log of the training.

    Raises
    ------
    UserError
        When the mined rows or a baseline from the hub are missing, method and factors do not fit
        together, the seed cannot be one, or there are fewer GPUs than processes.
    """
    use_threads(profile.threads)
    factors = list(pool_factors)
    check_run(pool_method, factors)
    seed = profile.seed if seed is None else seed
    check_seed(seed)
    run = Run(collection=collection, pool_method=pool_method, pool_factors=factors, seed=seed)
    adaptation = profile.adaptation is not None and collection == profile.adaptation.collection
    if adaptation and pool_method != "none":
        raise UserError(
            f"{collection} is the warm-up's collection, trained unpooled; got pool_method "
            f"{pool_method!r}. Pass pool_method none and pool_factors 1."
        )
    name = BASELINE if adaptation else model_name(collection, pool_method, factors, seed)
    settings = profile.recipe(collection)
    target = profile.folder / "models" / name
    with parallel.first_alone():
        mined = load_mined(mined_folder(profile, collection))
    if not adaptation:
        _make_baseline(profile, progress)
    with parallel.first_alone():
        start = _start(profile, adaptation)
    made_with = {
        "model": name,
        "run": run.model_dump(),
        "code": CODE,
        "pooling": stored_variant(pool_method, profile.hierarchical, profile.use_sklearn),
        "training": settings.model_dump(),
        "start": fingerprint(start),
        "rows": mined_fingerprint(mined),
        "precision": forward_precision(profile.precision, torch.device(get_device_name())),
        **_lengths(profile, collection),
        **_dev(profile, collection),
    }
    made = parallel.from_first(settings_match(target, made_with))
    if made:
        return target
    if profile.processes > 1 and parallel.processes() == 1:
        _start_processes(profile, run, progress)
    else:
        _fit_and_save(profile, start, mined, run, settings, target, made_with, progress)
    return target


def _make_baseline(profile: Profile, progress: bool) -> None:
    """Mine the warm-up's collection and warm up, where that gives the baseline and none is there.

    One that is there is taken as it is. Of jobs that start at once, one makes it; the processes of
    one training make it together.
    """
    baseline = profile.folder / "models" / BASELINE
    if profile.adaptation is None or parallel.from_first(_has_weights(baseline)):
        return
    first = parallel.rank() == 0
    lock = locked(baseline.with_suffix(".lock"), "makes the baseline")
    with lock if first else contextlib.nullcontext():
        if parallel.from_first(_has_weights(baseline)):
            return
        collection = profile.adaptation.collection
        if first:
            print(
                f"There is no baseline yet: {collection} is mined and the bundled model warmed up "
                "on it first, once. That takes some minutes (less in the smoke profile).",
                flush=True,
            )
        with parallel.first_alone():
            mine(profile, collection, progress)
        train(profile, collection, "none", [1], progress=progress)


def _has_weights(folder: Path) -> bool:
    recover(folder)
    return any(folder.rglob("*.safetensors"))


def _start(profile: Profile, adaptation: bool) -> Path:
    """The folder of the model that the training starts from."""
    if adaptation:
        untrained_model(profile)
        return profile.folder / "models" / "bundled"
    baseline = profile.folder / "models" / BASELINE
    if not profile.model.bundled and not (baseline / "modules.json").is_file():
        raise UserError(
            f"There is no model in {baseline}: {profile.model.base} has not been fetched. Run "
            "`python -m l2p_utils.fetch` first (`make run` and Snakemake do it by themselves)."
        )
    return baseline


def _lengths(profile: Profile, collection: str) -> dict[str, Any]:
    """Lengths that this training sets; the bundled model is made with its own."""
    if profile.model.bundled and collection not in profile.model.query_lengths:
        return {}
    lengths = {
        "query_length": profile.model.query_length_on(collection),
        "document_length": profile.model.document_length,
    }
    return {"lengths": lengths}


def _dev(profile: Profile, collection: str) -> dict[str, str]:
    """Where the epoch is picked, when it is another collection's test queries."""
    other = profile.dev_collections.get(collection)
    return {"dev": f"{other}, test split"} if other else {}


def _load_dev(profile: Profile, collection: str, settings: TrainingSettings) -> Collection:
    """The queries that pick the epoch: a part of the dev split, or all of the other collection."""
    if other := profile.dev_collections.get(collection):
        return load_collection(other, "test")
    carve = carves_dev(profile, collection)
    dev = load_collection(collection, "dev", text_only=profile.mining.text_only, carve_dev=carve)
    return subset(dev, settings.dev_queries, settings.dev_documents)


def _start_processes(profile: Profile, run: Run, progress: bool) -> None:
    """Train in several processes of this machine, each running this module's command."""
    parallel.check_devices(profile.processes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.yaml"  # the profile as it is here, changed or not
        path.write_text(yaml.safe_dump(profile.model_dump(mode="json")), "utf-8")
        arguments = {
            "--profile": path,
            "--collection": run.collection,
            "--pool-method": run.pool_method,
            "--pool-factors": "+".join(map(str, run.pool_factors)),
            "--seed": run.seed,
        }
        words = [str(word) for argument in arguments.items() for word in argument]
        quiet = [] if progress else ["--quiet"]
        command = [*COMMAND, *words, *quiet]
        parallel.launch(command, profile.processes, profile.threads, show=progress)


def _fit_and_save(
    profile: Profile,
    start: Path,
    mined: Dataset,
    run: Run,
    settings: TrainingSettings,
    target: Path,
    made_with: dict[str, Any],
    progress: bool,
) -> None:
    checkpoints = profile.folder / "checkpoints" / target.name
    with parallel.first_alone():
        if not settings_match(checkpoints, made_with):
            remove(checkpoints)  # of other settings, or none
            write_json(checkpoints / PROVENANCE, {"settings": made_with})
        collection = profile_split(profile, run.collection)
        dev = _load_dev(profile, run.collection, settings)
    rows = training_rows(mined, collection, settings.max_rows)
    model = load_model(start)
    if "lengths" in made_with:
        model.query_length = made_with["lengths"]["query_length"]
        model.document_length = made_with["lengths"]["document_length"]
    fitted = fit(
        model,
        rows,
        dev,
        run,
        settings,
        run.seed,
        checkpoints,
        profile.precision,
        progress,
        profile.use_sklearn,
        profile.hierarchical,
    )
    parallel.wait()  # all have read the best epoch: saving removes the checkpoints
    if parallel.rank() == 0:
        _save(fitted, target, checkpoints, made_with, len(rows), dev)
    parallel.wait()


def _save(
    fitted: Fitted,
    target: Path,
    checkpoints: Path,
    made_with: dict[str, Any],
    rows: int,
    dev: Collection,
) -> None:
    cost = asdict(fitted.cost)
    provenance = {
        "settings": made_with,
        "rows": rows,
        "dev": {
            "collection": made_with.get("dev", f"{dev.name}, dev split"),
            "looks_at_test_queries": "dev" in made_with,
            "fingerprint": dev.fingerprint,
            "query_length": fitted.model.query_length,
        },
        "epoch": read_json(checkpoints / "best" / PROVENANCE),
        "seconds": cost.pop("seconds"),
        "cost": cost,
        "versions": versions(),
    }
    with atomic_path(target) as temporary, quiet_loading():
        fitted.model.save(str(temporary), create_model_card=False)
        fitted.log.to_csv(temporary / LOG_FILE, index=False)
        write_json(temporary / PROVENANCE, provenance)
    remove(checkpoints)


def read_training_log(folder: str | Path) -> pd.DataFrame:
    """A trained model's log: one row a step, see `fit`."""
    return pd.read_csv(Path(folder) / LOG_FILE)


def main(arguments: list[str] | None = None) -> int:
    """Train one of a profile's models, alone or as one of several processes."""
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.training", description=main.__doc__)
    parser.add_argument("--profile", required=True, help="a profile's name or a YAML file")
    parser.add_argument("--collection", required=True)
    parser.add_argument("--pool-method", default="none")
    parser.add_argument("--pool-factors", default="1", help="3, 1-6 or 2+4")
    parser.add_argument("--seed", type=int, help="of the rows' order and the factors")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    try:
        with parallel.group():
            folder = train(
                load_profile(options.profile),
                options.collection,
                options.pool_method,
                parse_factors(options.pool_factors),
                options.seed,
                progress=not options.quiet,
            )
            if parallel.rank() == 0:
                print(folder, flush=True)
    except UserError as error:
        parallel.report(error)
        return 1
    return 0


if __name__ == "__main__":
    parallel.leave(main())
