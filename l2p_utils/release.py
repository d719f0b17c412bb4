"""A trained model, or mined rows, as a folder that can be uploaded to the hub as it is.

The cards' text is in `templates/`; their numbers are the stored rows', their provenance is the
stored provenance. Nothing is uploaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pyarrow import parquet
from pylate import models

from l2p_utils.files import PROVENANCE, UserError, atomic_path, read_json
from l2p_utils.mining import load_mined, mined_fingerprint, mined_folder, mined_provenance
from l2p_utils.model import PooledColBERT, fingerprint, load_model, quiet_loading
from l2p_utils.profile import BUNDLED, HUB, Profile, Run, factors_name, pinned, slug
from l2p_utils.results import default_variant, read_rows, searched

TEMPLATES = Path(__file__).with_name("templates")
CARD, LICENCE_FILE = "README.md", "LICENSE"
ROWS_FILE = "data/train-00000-of-00001.parquet"
COLUMNS = ["query_id", "document_ids", "scores", "labels"]
MARK = "<!-- written by l2p_utils.release; a folder with this mark is replaced by the next one -->"
BUNDLED_BASE = "sentence-transformers/all-MiniLM-L6-v2"
PAPER = (
    "S. Josef, *Learn to Pool: Lightweight Fine-Tuning for Flexible Multi-Vector Compression*, "
    "LIR workshop @ ECIR 2026"
)
ENGINES = {"exact": "Exact search (MaxSim in float32)", "plaid": "PLAID index (fast-plaid)"}
LICENCES = """
apache-2.0 mit bsd-2-clause bsd-3-clause cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
cc-by-nc-nd-4.0 cdla-permissive-2.0 odc-by odbl mpl-2.0 gpl-3.0 lgpl-3.0 agpl-3.0 unlicense unknown
"""

# ---------------------------------------------------------------- terms


@dataclass(frozen=True)
class Terms:
    """A licence (the hub's identifier or ``other:name``) and the notice for the card.

    `restricts`: what is made from it must not be offered on wider terms.
    """

    licence: str
    notice: str
    restricts: bool = False

    @property
    def card_data(self) -> dict[str, str]:
        """The licence in a card's front matter."""
        kind, _, name = self.licence.partition(":")
        link = {"license_link": LICENCE_FILE} if name and self.restricts else {}
        return {"license": kind} | ({"license_name": name} if name else {}) | link


NAMES = {"apache-2.0": "Apache-2.0", "bsd-3-clause": "BSD-3-Clause", "mit": "MIT"}
DOCS = {"transformers": "apache-2.0"}
DOCS |= dict.fromkeys(["scipy", "numpy", "sklearn", "pandas", "torch"], "bsd-3-clause")
DATA = {
    f"docs:{name}": Terms(terms, f"Texts: the documentation of {name}: {NAMES[terms]}.")
    for name, terms in DOCS.items()
}
DATA["beir:fiqa"] = Terms(
    "other:fiqa-2018-non-commercial",
    "**FiQA-2018: non-commercial use only.** The FiQA-2018 data may be used for non-commercial "
    "purposes only, and so may what is made from it: this repository must not be used "
    "commercially.",
    restricts=True,
)
DATA["beir:scifact"] = Terms(  # of the annotations, which are what is learned from
    "cc-by-nc-2.0",
    "**SciFact: CC BY-NC 2.0.** SciFact's annotations, the relevance judgments among them, are "
    "licensed CC BY-NC 2.0: name their authors (Wadden et al., 2020), no commercial use. What is "
    "made from them is offered on the same terms here.",
    restricts=True,
)
BASES = {
    name: Terms("apache-2.0", f"Base model {name}: Apache-2.0.")
    for name in (BUNDLED_BASE, "mixedbread-ai/mxbai-edge-colbert-v0-32m")
}
TOOLS = {  # miners and teachers, by a name that provenance has
    "all-MiniLM-L6-v2": "apache-2.0",
    "BAAI/bge-small-en-v1.5": "mit",
    "BAAI/bge-reranker-v2-gemma": "apache-2.0",
}


def _terms(data: Terms | None, base: Terms | None, given: str | None, what: str) -> Terms:
    """Those of the data where they restrict, else those given, else the known ones."""
    if data and data.restricts:
        if given not in (None, data.licence):
            raise UserError(
                f"licence {given!r} contradicts what is known of a repository {what}: "
                f"{data.licence}. Leave the licence out."
            )
        return data
    if not given:
        if data and base:
            return base
        raise UserError(
            f"A repository {what} needs a licence: the terms of its texts or of its base model "
            "are not known here. Pass licence=, a hub identifier (apache-2.0, cc-by-4.0, unknown, "
            "…) or other:<name-of-the-licence>."
        )
    if given not in LICENCES.split() and not re.fullmatch(r"other:[a-z0-9][a-z0-9._-]*", given):
        raise UserError(
            f"licence {given!r} is none of {', '.join(LICENCES.split())}. For any other, pass "
            "other:<name>, in lower case without spaces."
        )
    name = given.partition(":")[2]
    add = f" The publisher adds its text as `{LICENCE_FILE}`." if name else ""
    return Terms(given, f"Released as `{name or given}`, chosen by the publisher.{add}")


# ---------------------------------------------------------------- releasing


def repository_id(value: str) -> str:
    """Return a hub id, ``owner/name``, or raise UserError."""
    try:
        validate_repo_id(value)
        if value.count("/") != 1:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise UserError(
            f"{value!r} is no hub id: {error}. Expected owner/name, as my-name/my-model."
        ) from error
    return value


def release_model(
    profile: Profile,
    name: str,
    repository: str,
    folder: str | Path | None = None,
    licence: str | None = None,
    dataset: str | None = None,
) -> Path:
    """Write a trained model of a run as a hub-ready folder: weights, tokenizer, config, card.

    The folder, which is returned, loads with `pylate.models.ColBERT` and with `PooledColBERT`.

    Parameters
    ----------
    name
        A trained and evaluated model of the profile (notebooks 02 and 03).
    repository, dataset
        The hub ids, ``owner/name``, that it will have, and its training rows if released too.
    folder
        Default: ``runs/<profile>/release/<name of the repository>``, of which an earlier release is
        replaced.
    licence
        A hub licence identifier, or ``other:<name>``. Needed where the terms of the base model or
        of the training collection are not known here (a folder of your own); refused where the
        collection's terms leave no choice (FiQA, SciFact).
    """
    repository = repository_id(repository)
    run = profile.find_run(name)
    target = _target(folder or profile.folder / "release" / repository.split("/")[1])
    base = BUNDLED_BASE if profile.model.bundled else profile.model.base
    if not profile.model.bundled and Path(base).expanduser().is_dir():
        base = slug(base)  # a folder of the publisher's is nobody else's business
    parts = [DATA.get(run.collection.split("@")[0]), BASES.get(base)]
    terms = _terms(*parts, licence, f"trained on {_shown(run.collection)}")
    provenance, mined = _provenances(profile, name, run)
    rows_id = dataset and repository_id(dataset)
    if profile.training_data == "released":
        rows_id = rows_id or pinned(profile.released_rows[run.collection])[0]
    pooling = [] if run.pool_method == "none" else ["pooling", run.pool_method]
    front = ModelCardData(
        language="en",
        **terms.card_data,
        library_name="PyLate",
        pipeline_tag="sentence-similarity",
        tags=["ColBERT", "PyLate", "sentence-transformers", "retrieval", *pooling, "distillation"],
        base_model=base if "/" in base else None,
        datasets=list(dict.fromkeys([*filter(None, [rows_id]), *mined["repositories"]])) or None,
    )
    model = load_model(profile.folder / "models" / name, device="cpu")
    card = ModelCard.from_template(
        front,
        template_path=str(TEMPLATES / "model_card.md"),
        **_shared_values(repository, run.collection, mined, [terms, *parts]),
        **_model_facts(profile, name, run, provenance),
        model=model,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        base=base,
    )
    with atomic_path(target) as temporary:
        with quiet_loading():
            model.save(str(temporary), create_model_card=False)
        _write_card(temporary, card, terms)
    return target


def size_category(rows: int) -> str:
    """The hub's name for a data set of so many rows."""
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M"]
    return names[min(max(len(str(rows)) - 3, 0), len(names) - 1)]


def release_dataset(
    profile: Profile,
    collection: str,
    repository: str,
    folder: str | Path | None = None,
    licence: str | None = None,
) -> Path:
    """Write the mined rows of a collection as a hub-ready data set: ids and scores, no texts.

    `collection` is a training collection of the profile, mined (notebook 01); the folder is by
    default ``runs/<profile>/release_data/<name of the repository>``. The rest is as in
    `release_model`. ``datasets.load_dataset(folder)`` reads the folder that is returned.
    """
    repository = repository_id(repository)
    if profile.training_data == "released":
        raise UserError(
            f"The profile {profile.name!r} trains on released rows "
            f"({profile.released_rows.get(collection, 'none of this collection')}); expected rows "
            "that it mined. Name that data set instead of releasing it again."
        )
    source = mined_folder(profile, collection)
    rows, provenance = load_mined(source), mined_provenance(source)
    target = _target(folder or profile.folder / "release_data" / repository.split("/")[1])
    data = DATA.get(collection.split("@")[0])
    terms = _terms(data, data, licence, f"mined from {_shown(collection)}")
    front = DatasetCardData(
        language="en",
        **terms.card_data,
        pretty_name=f"{_shown(collection)}: mined training rows with teacher scores",
        size_categories=size_category(len(rows)),
        task_categories=["text-retrieval"],
        tags=["distillation", "hard negatives", "late interaction", "ColBERT", "PyLate"],
        annotations_creators=["machine-generated"],
        source_datasets=list(provenance["repositories"]) or None,
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": ROWS_FILE}]}],
    )
    card = DatasetCard.from_template(
        front,
        template_path=str(TEMPLATES / "dataset_card.md"),
        **_shared_values(repository, collection, provenance, [terms, data]),
        load_name=collection if collection == _shown(collection) else "path/to/collection",
        provenance=provenance,
    )
    with atomic_path(target) as temporary:
        (temporary / ROWS_FILE).parent.mkdir(parents=True)
        table = rows.select_columns(COLUMNS).with_format("arrow")[:]
        parquet.write_table(table, temporary / ROWS_FILE)
        _write_card(temporary, card, terms)
    return target


def load_both(folder: str | Path) -> tuple[models.ColBERT, PooledColBERT]:
    """A released model as its users load it: by plain PyLate, and by this project's class."""
    with quiet_loading():
        plain = models.ColBERT(str(folder), device="cpu", local_files_only=True)
    return plain, load_model(folder, device="cpu")


def _shown(collection: str) -> str:
    """A collection's name as others may read it: of a folder its own name, not its path."""
    return collection if collection.startswith((BUNDLED, *HUB)) else slug(collection)


def _target(folder: str | Path) -> Path:
    """The folder to write, unless it holds anything but an earlier release."""
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


def _provenances(profile: Profile, name: str, run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's provenance and its rows'; UserError unless both and the results belong to it."""
    source, results = profile.folder / "models" / name, profile.folder / "results"
    if not (source / PROVENANCE).is_file():
        raise UserError(f"{source} has no {PROVENANCE}: train the model (notebook 02).")
    provenance, rows = read_json(source / PROVENANCE), mined_folder(profile, run.collection)
    if provenance["settings"]["rows"] != mined_fingerprint(load_mined(rows)):
        raise UserError(
            f"The rows in {rows} are not those that the model was trained on. Train it again "
            "(notebook 02, or `make run`)."
        )
    if name not in set(read_rows(results)["model"]):
        raise UserError(
            f"There are no result rows of {name!r} in {results}; a card without an evaluation is "
            "not written. Run notebook 03_evaluation (or `make run`) first."
        )
    weights = fingerprint(source)
    for file in sorted((profile.folder / "evaluated" / name).glob(f"[!.]*/{PROVENANCE}")):
        measured = read_json(file)["settings"]["model"]
        if measured != weights:
            raise UserError(
                f"{file.parent.name} was measured of other weights of {name!r} ({measured}) than "
                f"those stored now ({weights}). Run notebook 03_evaluation again."
            )
    return provenance, mined_provenance(rows)


def _write_card(folder: Path, card: ModelCard | DatasetCard, terms: Terms) -> None:
    card.save(folder / CARD)
    if "license_link" in terms.card_data:
        name, notice = terms.licence.partition(":")[2], terms.notice.replace("**", "")
        (folder / LICENCE_FILE).write_text(f"{name}\n\n{notice}\n", "utf-8")


# ---------------------------------------------------------------- the templates' values


def _shared_values(
    repository: str, collection: str, mined: dict[str, Any], terms: Iterable[Terms | None]
) -> dict[str, Any]:
    """What both templates show; the repository's own terms come first."""
    used = json.dumps([mined.get("miner"), mined.get("teacher"), mined["settings"]])
    tools = [f"Miner or teacher {t}: {NAMES[its]}." for t, its in TOOLS.items() if t in used]
    values = {
        "mark": MARK,
        "unknown": "not recorded",
        "paper": PAPER,
        "title": repository.split("/")[1],
        "repository": repository,
        "collection": _shown(collection),
        "notices": list(dict.fromkeys([*(part.notice for part in terms if part), *tools])),
    }
    template = jinja2.Template((TEMPLATES / "provenance.md").read_text("utf-8"))
    hub = {"from_hub": collection.startswith(HUB), "repositories": mined["repositories"]}
    return values | {"rows_table": template.render(values, provenance=mined, **hub)}


def _model_facts(profile: Profile, name: str, run: Run, provenance: dict) -> dict[str, Any]:
    """What the model's template shows of its training and evaluation."""
    variant = provenance["settings"]["pooling"]
    largest = run.pool_factors[-1]
    budget = (
        f"pool_factor={min(4, largest)}" if type(largest) is int else f'pool_factor="{largest}"'
    )
    options = f', {budget}, pool_method="{run.pool_method}"'
    options += ", use_sklearn=True" if variant == "sklearn" else ""
    options += f', pool_variant="{variant}"' if variant in ("paper", "euclidean") else ""
    options += ", renormalize=True" if run.renormalize else ""
    seed = profile.seed_of(run)
    start = profile.folder / "models" / profile.baseline_name(seed) / PROVENANCE
    origin = read_json(start)["settings"].get("origin") if start.is_file() else None
    other = profile.dev_collections.get(run.collection)
    return {
        "profile": profile,
        "run": run,
        "provenance": provenance,
        "training": provenance["settings"]["training"],
        "base_revision": (origin or {}).get("commit") or profile.model.revision,
        "seed": seed,
        "pooled": run.pool_method != "none",
        "variant": variant,
        "factors": factors_name(run.pool_factors),
        "dev_collection": _shown(other) if other else None,
        "pool_options": "" if run.pool_method == "none" else options,
        "evaluation": _evaluation(profile, name, run),
    }


def _evaluation(profile: Profile, name: str, run: Run) -> dict[str, str]:
    """Title → Markdown table of NDCG@10, one per engine and pool method.

    Of means of the length that the model was trained with, where those were measured.
    """
    measured = [mean == "unit" for mean in profile.evaluation.means]
    renormalized = run.renormalize if run.renormalize in measured else measured[0]
    rows = searched(read_rows(profile.folder / "results"), renormalized)
    baseline = profile.baseline_name(profile.seed_of(run))
    own, tables = rows[rows["model"] == name], {}
    for engine in [engine for engine in ENGINES if engine in set(own["engine"])]:
        part = rows[(rows["engine"] == engine) & rows["model"].isin([baseline, name])]
        wanted = profile.evaluation.collections if engine == "exact" else []
        collections = list(dict.fromkeys([*wanted, *sorted(part["collection"])]))
        factors = sorted({1, *profile.evaluation.pool_factors, *part["pool_factor"].astype(int)})
        sizes = part.groupby("collection")[["queries", "documents"]].first().reindex(collections)
        methods = [run.pool_method]
        if run.pool_method == "none":  # trained without pooling: every method that was measured
            methods = sorted(set(part["pool_method"]) - {"none"}) or methods
        for method in methods:
            variant = default_variant(own, method)
            pooled = (part["pool_method"] == method) & (part["pool_variant"] == variant)
            shown = part[pooled | (part["pool_method"] == "none")]
            curves = shown.pivot_table("ndcg@10", ["collection", "model"], "pool_factor")
            places = pd.MultiIndex.from_product([collections, (baseline, name)])
            lines = []
            for (collection, model), curve in curves.reindex(places, columns=factors).iterrows():
                label = "**this model**" if model == name else model
                size = [f"{n:,.0f}" for n in sizes.loc[collection]]
                lines.append([_shown(collection), label, *size, *(f"{v:.3f}" for v in curve)])
            columns = ["collection", "model", "queries", "documents", *map("PF{}".format, factors)]
            table = pd.DataFrame(lines, columns=columns).replace("nan", "not measured")
            title = f"{ENGINES[engine]}, {method}" + (f" ({variant})" if variant else "")
            title += ", unit-length means" if renormalized and engine == "exact" else ""
            tables[title] = table.to_markdown(index=False, disable_numparse=True)
    return tables
