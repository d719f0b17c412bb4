"""Release: a trained model, or mined rows, as a folder that can be uploaded to the hub as it is.

Takes what a run made; gives weights or rows beside a card whose numbers are the stored rows' and
whose provenance is the stored provenance. Nothing is uploaded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from datasets import Dataset
from huggingface_hub import DatasetCardData, ModelCardData
from pyarrow import parquet
from pylate import models

from l2p_utils.card_text import (
    DatasetFacts,
    ModelFacts,
    dataset_card,
    model_card,
    shown,
    sources,
)
from l2p_utils.cards import LICENCES, OTHER, check_card, repository_id, size_category
from l2p_utils.files import PROVENANCE, UserError, atomic_path, read_json
from l2p_utils.mining import load_mined, mined_fingerprint, mined_folder, mined_provenance
from l2p_utils.model import PooledColBERT, fingerprint, load_model, quiet_loading
from l2p_utils.profile import BASELINE, BUNDLED, HUB, Profile, Run, pinned, slug
from l2p_utils.results import read_rows

CARD, LICENCE_FILE = "README.md", "LICENSE"
ROWS_FILE = "data/train-00000-of-00001.parquet"
COLUMNS = ["query_id", "document_ids", "scores", "labels"]
MARK = "<!-- written by l2p_utils.release; a folder with this mark is replaced by the next one -->"
BUNDLED_BASE = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Terms:
    """What something may be used for: an identifier (``other:name`` if not the hub's), and why.

    `restricts` tells whether what is made from it must not be offered on wider terms.
    """

    licence: str
    notice: str
    restricts: bool = False


NAMES = {"apache-2.0": "Apache-2.0", "bsd-3-clause": "BSD-3-Clause", "mit": "MIT"}


def _permissive(licence: str, whose: str) -> Terms:
    return Terms(licence, f"{whose}: {NAMES[licence]}.")


FIQA = Terms(
    "other:fiqa-2018-non-commercial",
    "**FiQA-2018: non-commercial use only.** The FiQA-2018 data may be used for non-commercial "
    "purposes only, and so may what is made from it: this repository must not be used "
    "commercially.",
    restricts=True,
)
# CC BY-NC 2.0 is on the hub's list, so it needs no `other`. It is the licence of SciFact's
# annotations, which are what is learned from; Apache-2.0 of the base lets what is made from it be
# offered on further terms, so the whole is offered on the narrower ones.
SCIFACT = Terms(
    "cc-by-nc-2.0",
    "**SciFact: CC BY-NC 2.0.** SciFact's annotations, the relevance judgments among them, are "
    "licensed CC BY-NC 2.0: name their authors (Wadden et al., 2020), no commercial use. What is "
    "made from them is offered on the same terms here.",
    restricts=True,
)
DATA: dict[str, Terms] = {
    "beir:fiqa": FIQA,
    "beir:scifact": SCIFACT,
    **{
        f"docs:{name}": _permissive("bsd-3-clause", f"Texts: the documentation of {name}")
        for name in ("scipy", "numpy", "sklearn", "pandas", "torch")
    },
    "docs:transformers": _permissive("apache-2.0", "Texts: the documentation of transformers"),
}
BASES: dict[str, Terms] = {
    name: _permissive("apache-2.0", f"Base model {name}")
    for name in (BUNDLED_BASE, "mixedbread-ai/mxbai-edge-colbert-v0-32m")
}
# Miners and teachers, by a name that provenance has.
TOOLS = {
    "all-MiniLM-L6-v2": "apache-2.0",
    "BAAI/bge-small-en-v1.5": "mit",
    "BAAI/bge-reranker-v2-gemma": "apache-2.0",
}


def release_model(
    profile: Profile,
    name: str,
    repository: str,
    folder: str | Path | None = None,
    licence: str | None = None,
    dataset: str | None = None,
) -> Path:
    """Write a trained model of a run as a hub-ready folder: weights, tokenizer, config, card.

    Parameters
    ----------
    name
        A trained model of the profile, evaluated (notebook 03).
    repository
        The hub id that it will have, ``owner/name``; the card's usage code names it.
    folder
        Default: ``runs/<profile>/release/<name of the repository>``. An earlier release there is
        replaced.
    licence
        A hub licence identifier, or ``other:<name>``. Needed where the terms of the base model or
        of the training collection are not known here (a folder of your own); refused where the
        collection's terms leave no choice (FiQA, SciFact).
    dataset
        Hub id of the training rows where they are released too (`release_dataset`).

    Returns
    -------
    pathlib.Path
        The folder; it loads with `pylate.models.ColBERT` and with `PooledColBERT`.

    Raises
    ------
    UserError
        When the profile has no such trained model, it was not evaluated, its rows or measurements
        belong to another version of it, the licence is missing or contradicts, or the folder holds
        something else.
    """
    repository = repository_id(repository)
    run = _trained(profile, name)
    source = profile.folder / "models" / name
    target = _target(folder or profile.folder / "release" / repository.split("/")[1])
    base, base_terms = _base(profile)
    data_terms = DATA.get(_plain(run.collection))
    terms = _terms(data_terms, base_terms, licence, f"trained on {shown(run.collection)}")
    model = load_model(source, device="cpu")
    made = _provenance(source)
    mined = _rows_of(profile, run, made)
    _check_measured(profile, name, fingerprint(source))
    front = ModelCardData(
        language="en",
        **_licence_keys(terms),
        library_name="PyLate",
        pipeline_tag="sentence-similarity",
        tags=_tags(run),
        base_model=base if "/" in base else None,
        datasets=_datasets(profile, run, mined, dataset) or None,
    )
    facts = ModelFacts(
        profile=profile,
        name=name,
        run=run,
        repository=repository,
        base=base,
        base_revision=_base_revision(profile),
        model=model,
        made=made,
        mined=mined,
        rows=_measured(profile, name),
        collection=shown(run.collection),
        notices=_notices(terms, data_terms, base_terms, mined),
    )
    with atomic_path(target) as temporary:
        with quiet_loading():
            model.save(str(temporary), create_model_card=False)
        _write_card(temporary, front.to_yaml(), model_card(facts), "model", terms)
    return target


def release_dataset(
    profile: Profile,
    collection: str,
    repository: str,
    folder: str | Path | None = None,
    licence: str | None = None,
) -> Path:
    """Write the mined rows of a collection as a hub-ready data set: ids and scores, no texts.

    Parameters
    ----------
    collection
        A training collection of the profile, mined (notebook 01).
    repository, licence
        See `release_model`.
    folder
        Default: ``runs/<profile>/release_data/<name of the repository>``.

    Returns
    -------
    pathlib.Path
        The folder; ``datasets.load_dataset(folder)`` reads it.

    Raises
    ------
    UserError
        When there are no mined rows, they are others' published ones, the licence is missing or
        contradicts, or the folder holds something else.
    """
    repository = repository_id(repository)
    if profile.training_data == "released":
        raise UserError(
            f"The profile {profile.name!r} trains on released rows "
            f"({profile.released_rows.get(collection, 'none of this collection')}); expected rows "
            "that it mined. Name that data set instead of releasing it again."
        )
    source = mined_folder(profile, collection)
    rows, made = load_mined(source), mined_provenance(source)
    target = _target(folder or profile.folder / "release_data" / repository.split("/")[1])
    data_terms = DATA.get(_plain(collection))
    terms = _terms(data_terms, data_terms, licence, f"mined from {shown(collection)}")
    front = DatasetCardData(
        language="en",
        **_licence_keys(terms),
        pretty_name=f"{shown(collection)}: mined training rows with teacher scores",
        size_categories=size_category(len(rows)),
        task_categories=["text-retrieval"],
        tags=["distillation", "hard negatives", "late interaction", "ColBERT", "PyLate"],
        annotations_creators=["machine-generated"],
        source_datasets=_hub_ids(made) or None,
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": ROWS_FILE}]}],
    )
    facts = DatasetFacts(
        repository=repository,
        collection=shown(collection),
        load_name=collection if collection.startswith((BUNDLED, *HUB)) else "path/to/collection",
        made=made,
        rows=len(rows),
        notices=_notices(terms, data_terms, None, made),
    )
    with atomic_path(target) as temporary:
        (temporary / ROWS_FILE).parent.mkdir(parents=True)
        parquet.write_table(_only_columns(rows, source), temporary / ROWS_FILE)
        _write_card(temporary, front.to_yaml(), dataset_card(facts), "dataset", terms)
    return target


def load_both(folder: str | Path) -> tuple[models.ColBERT, PooledColBERT]:
    """A released model as its users load it: by plain PyLate, and by this project's class."""
    with quiet_loading():
        plain = models.ColBERT(str(folder), device="cpu", local_files_only=True)
    return plain, load_model(folder, device="cpu")


def _plain(collection: str) -> str:
    return collection.split("@")[0]


def _trained(profile: Profile, name: str) -> Run:
    trained = profile.model_names[1:]
    if name not in trained:
        raise UserError(
            f"The profile {profile.name!r} trains no model {name!r}; expected one of {trained}."
        )
    return profile.find_run(name)


def _target(folder: str | Path) -> Path:
    """The folder to write, unless it holds something that no release made."""
    folder = Path(folder).expanduser().resolve()
    if folder.is_dir() and any(folder.iterdir()):
        card = folder / CARD
        ours = card.is_file() and MARK in card.read_text("utf-8", errors="replace")
        if not ours or (folder / ".git").exists():
            raise UserError(
                f"{folder} holds something else than a release made here; a release replaces the "
                "whole folder. Name another one, or empty it."
            )
    return folder


def _base(profile: Profile) -> tuple[str, Terms | None]:
    """The base model by its hub id (a folder by its name), and its terms where they are known."""
    base = BUNDLED_BASE if profile.model.bundled else profile.model.base
    if base != BUNDLED_BASE and Path(base).expanduser().is_dir():
        return slug(base), None
    return base, BASES.get(base)


def _base_revision(profile: Profile) -> str | None:
    if profile.model.bundled:
        return None
    fetched = profile.folder / "models" / BASELINE / PROVENANCE
    origin = read_json(fetched)["settings"].get("origin", {}) if fetched.is_file() else {}
    return origin.get("commit") or profile.model.revision


def _terms(data: Terms | None, base: Terms | None, given: str | None, what: str) -> Terms:
    """On which terms it is released: those that restrict, else those given, else the known ones."""
    decided = data if data and data.restricts else base if data and base else None
    if decided and decided.restricts and given not in (None, decided.licence):
        raise UserError(
            f"licence {given!r} contradicts what is known of a repository {what}: "
            f"{decided.licence}. Leave the licence out."
        )
    if decided and (decided.restricts or not given):
        return decided
    if not given:
        raise UserError(
            f"A repository {what} needs a licence: the terms of its texts or of its base model "
            "are not known here. Pass licence=, a hub identifier (apache-2.0, cc-by-4.0, unknown, "
            "…) or other:<name-of-the-licence>."
        )
    name = given.partition(":")[2]
    if given not in LICENCES - {OTHER} and not re.fullmatch(r"other:[a-z0-9][a-z0-9._-]*", given):
        raise UserError(
            f"licence {given!r} is none that the hub knows; expected an identifier like "
            "apache-2.0, or other:<name> in lower case without spaces."
        )
    add = f" The publisher adds its text as `{LICENCE_FILE}`." if name else ""
    return Terms(given, f"Released as `{name or given}`, chosen by the publisher.{add}")


def _licence_keys(terms: Terms) -> dict[str, str]:
    kind, _, name = terms.licence.partition(":")
    link = {"license_link": LICENCE_FILE} if name and terms.restricts else {}
    return {"license": kind} | ({"license_name": name} if name else {}) | link


def _notices(
    terms: Terms, data: Terms | None, base: Terms | None, mined: dict[str, Any]
) -> list[str]:
    """Whose terms apply: the repository's own, then those of what it was made from."""
    known = [t.notice for t in (data, base) if t]
    named = json.dumps([mined.get("miner"), mined.get("teacher"), mined["settings"]])
    tools = [f"Miner or teacher {tool}: {NAMES[its]}." for tool, its in TOOLS.items()
             if tool in named]  # fmt: skip
    return list(dict.fromkeys([terms.notice, *known, *tools]))


def _provenance(folder: Path) -> dict[str, Any]:
    if not (folder / PROVENANCE).is_file():
        raise UserError(
            f"{folder} has no {PROVENANCE}, so nobody can say how the model was trained; expected "
            "a model that notebook 02_training made. Train it again."
        )
    return read_json(folder / PROVENANCE)


def _rows_of(profile: Profile, run: Run, made: dict[str, Any]) -> dict[str, Any]:
    """Provenance of the rows that the model was trained on."""
    folder = mined_folder(profile, run.collection)
    mined = mined_provenance(folder)
    trained_on = made["settings"].get("rows")
    if trained_on and trained_on != mined_fingerprint(load_mined(folder)):
        raise UserError(
            f"The rows in {folder} are not those that the model was trained on; its card would "
            "tell a wrong provenance. Train it again (notebook 02, or `make run`)."
        )
    return mined


def _measured(profile: Profile, name: str) -> pd.DataFrame:
    rows = read_rows(profile.folder / "results")
    if name not in set(rows["model"]):
        raise UserError(
            f"There are no result rows of {name!r} in {profile.folder / 'results'}; a card without "
            "an evaluation is not written. Run notebook 03_evaluation (or `make run`) first."
        )
    return rows[rows["model"].isin([BASELINE, name])]


def _check_measured(profile: Profile, name: str, weights: str) -> None:
    """The stored rows must have been measured of these weights (as far as is recorded)."""
    for file in sorted((profile.folder / "evaluated" / name).glob(f"[!.]*/{PROVENANCE}")):
        measured = read_json(file).get("settings", {}).get("model", weights)
        if measured != weights:
            raise UserError(
                f"{file.parent.name} was measured of other weights of {name!r} ({measured}) than "
                f"those stored now ({weights}). Run notebook 03_evaluation again."
            )


def _datasets(profile: Profile, run: Run, mined: dict, dataset: str | None) -> list[str]:
    rows = dataset and repository_id(dataset)
    if profile.training_data == "released":
        rows = rows or pinned(profile.released_rows[run.collection])[0]
    return list(dict.fromkeys([*([rows] if rows else []), *_hub_ids(mined)]))


def _hub_ids(made: dict[str, Any]) -> list[str]:
    """The sources that are repositories of the hub; a zip's address is none."""
    return sorted(name for name in sources(made) if "://" not in name)


def _tags(run: Run) -> list[str]:
    pooling = [] if run.pool_method == "none" else ["pooling", run.pool_method]
    return ["ColBERT", "PyLate", "sentence-transformers", "retrieval", *pooling, "distillation"]


def _only_columns(rows: Dataset, source: Path) -> pa.Table:
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        raise UserError(f"The rows in {source} lack {missing}; expected {COLUMNS}. Mine again.")
    return rows.select_columns(COLUMNS).with_format("arrow")[:]


def _write_card(folder: Path, front: str, body: str, kind: str, terms: Terms) -> None:
    text = f"---\n{front.strip()}\n---\n{MARK}\n\n{body}"
    check_card(text, kind)
    (folder / CARD).write_text(text, "utf-8")
    if "license_link" in _licence_keys(terms):
        name, notice = terms.licence.partition(":")[2], terms.notice.replace("**", "")
        (folder / LICENCE_FILE).write_text(f"{name}\n\n{notice}\n", "utf-8")
