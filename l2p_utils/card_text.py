"""The words of a card: what a release is, how it is used, what was measured, where it comes from.

Takes facts that were stored (rows, provenance, the loaded model); gives Markdown. A number that was
not stored is written as "not measured" or "not recorded".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from l2p_utils.model import PooledColBERT
from l2p_utils.profile import BASELINE, BUNDLED, HUB, Profile, Run, factors_name, slug
from l2p_utils.results import default_variant, series

NOT_MEASURED = "not measured"
PAPER = (
    "S. Josef, *Learn to Pool: Lightweight Fine-Tuning for Flexible Multi-Vector Compression*, "
    "LIR workshop @ ECIR 2026"
)
ENGINES = {"exact": "Exact search (MaxSim in float32)", "plaid": "PLAID index (fast-plaid)"}


@dataclass(frozen=True)
class ModelFacts:
    """What a model card tells. `rows` are the result rows of the model and of the baseline."""

    profile: Profile
    name: str
    run: Run
    repository: str
    base: str
    base_revision: str | None
    model: PooledColBERT
    made: dict[str, Any]
    mined: dict[str, Any]
    rows: pd.DataFrame
    collection: str
    notices: Sequence[str]

    @property
    def pooled(self) -> bool:
        """Whether it was trained with pooled documents."""
        return self.run.pool_method != "none"


@dataclass(frozen=True)
class DatasetFacts:
    """What a data set card tells."""

    repository: str
    collection: str
    load_name: str
    made: dict[str, Any]
    rows: int
    notices: Sequence[str]


def shown(collection: str) -> str:
    """A collection's name as others may read it: of a folder its own name, not its path."""
    return collection if collection.startswith((BUNDLED, *HUB)) else slug(collection)


def sources(made: dict[str, Any]) -> dict[str, str]:
    """What rows come from, as their provenance tells: hub id → commit, a zip's URL → SHA-256."""
    places = [made, *(part for part in made.values() if isinstance(part, dict))]
    return next((dict(p["repositories"]) for p in places if p.get("repositories")), {})


def model_card(facts: ModelFacts) -> str:
    """The body of a model card."""
    sections = {
        "Model details": _model_details(facts),
        "Intended use": _intended_use(facts),
        "Usage": _model_usage(facts),
        "Evaluation": _evaluation(facts),
        "Training-data provenance": _rows_provenance(facts.mined, facts.collection),
        "Licence and notices": _notices(facts.notices),
        "Reference": f"The method: {PAPER}.",
    }
    return _page(facts.repository.split("/")[1], sections)


def dataset_card(facts: DatasetFacts) -> str:
    """The body of a data set card."""
    sections = {
        "What it holds": _row_layout(facts),
        "Usage": _dataset_usage(facts),
        "Provenance": _rows_provenance(facts.made, facts.collection),
        "Licence and notices": _notices(facts.notices),
        "Reference": f"The mining rules: {PAPER}.",
    }
    return _page(facts.repository.split("/")[1], sections)


def _page(title: str, sections: dict[str, str]) -> str:
    parts = [f"# {title}", *(f"## {name}\n\n{text}" for name, text in sections.items())]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _code(text: str) -> str:
    return f"```python\n{text.strip()}\n```"


def _recorded(value: Any) -> str:
    return "not recorded" if value in (None, "") else str(value)


# ---------------------------------------------------------------- the model


def _model_details(facts: ModelFacts) -> str:
    model, training = facts.model, facts.made["settings"].get("training", {})
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    link = f"[{facts.base}](https://huggingface.co/{facts.base})" if "/" in facts.base else None
    start = "warmed up unpooled on " + facts.profile.adaptation.collection if facts.profile.adaptation \
        else f"revision {_recorded(facts.base_revision)}"  # fmt: skip
    epoch = facts.made.get("epoch", {})
    best = {key: value for key, value in epoch.items() if key.startswith("dev_")}
    dev = ", ".join(f"{key} {value:.3f}" for key, value in best.items()) or "not recorded"
    rows = [
        ("architecture", f"{model[0].auto_model.config.model_type}, {millions:.1f} M parameters; "
         f"late interaction, {model.get_sentence_embedding_dimension()} dimensions a token"),
        ("base model", f"{link or facts.base + ' (a checkpoint of its own)'}, {start}"),
        ("trained on", f"{facts.collection}, {_recorded(facts.made.get('rows'))} rows, seed "
         f"{facts.profile.seed if facts.run.seed is None else facts.run.seed}"),
        ("pooling in training", _pooling(facts)),
        ("loss", "KL divergence to the teacher's scores, MaxSim scores min-max normalised"),
        ("schedule", ", ".join(f"{key} {training[key]}" for key in
         ("epochs", "batch_size", "learning_rate", "warmup_ratio", "frozen_layers")
         if key in training) or "not recorded"),
        ("kept", f"epoch {_recorded(epoch.get('epoch'))}, the best on {_dev_queries(facts)}, "
         f"unpooled ({dev})"),
        ("precision", _recorded(facts.made["settings"].get("precision"))),
        ("query, document length", f"{model.query_length}, {model.document_length} word pieces; "
         "longer texts are cut"),
        ("prefixes", f"query `{model.query_prefix}`, document `{model.document_prefix}`; query "
         f"expansion {'on' if model.do_query_expansion else 'off'}"),
        ("made with", _recorded(facts.made.get("versions")).replace(";", ", ")),
    ]  # fmt: skip
    return "A late-interaction (ColBERT) retrieval model" + (
        ", fine-tuned so that its document vectors can be pooled.\n\n" if facts.pooled
        else ", fine-tuned without pooling: the control of pooling-aware models.\n\n"
    ) + _table(["", ""], rows)  # fmt: skip


def _dev_queries(facts: ModelFacts) -> str:
    other = facts.profile.dev_collections.get(facts.run.collection)
    looks = facts.made.get("dev", {}).get("looks_at_test_queries", other is not None)
    if looks:
        where = shown(other) if other else "another collection"
        return f"the test queries of {where} (so its results there are not held out)"
    return f"development queries of {facts.collection}"


def _pooling(facts: ModelFacts) -> str:
    if not facts.pooled:
        return "none"
    drawn = ", one drawn for each batch" if len(facts.run.pool_factors) > 1 else ""
    variant = facts.made["settings"].get("pooling")
    name = facts.run.pool_method + (f" ({variant})" if variant else "")
    return f"{name}, pool factor {factors_name(facts.run.pool_factors)}{drawn}"


def _intended_use(facts: ModelFacts) -> str:
    pooled = (
        "With `pool_factor` *p* about one in *p* document vectors is stored; "
        f"{facts.run.pool_method} is the method that it was trained for. A pooled vector is a mean "
        "and shorter than 1: an index that scales vectors back to unit length (fast-plaid) scores "
        "it differently than exact search does. "
        if facts.pooled
        else ""
    )
    return (
        "Retrieval and reranking of English texts like those that it was trained on, with MaxSim "
        f"over token vectors. {pooled}Queries are never pooled.\n\n"
        "It was not tested on other languages, on texts longer than its document length, or on "
        "collections other than those below. One training, one seed: another seed gives "
        "somewhat other numbers."
    )


def _variant_option(variant: str | None) -> str:
    """What `encode` must be told to pool as in training, where that is not its default."""
    if variant == "sklearn":
        return ", use_sklearn=True"
    return f', pool_variant="{variant}"' if variant in ("paper", "euclidean") else ""


def _model_usage(facts: ModelFacts) -> str:
    factor = min(4, max(facts.run.pool_factors))
    options = f', pool_factor={factor}, pool_method="{facts.run.pool_method}"'
    options += _variant_option(facts.made["settings"].get("pooling"))
    texts = _code(f"""
from l2p_utils.model import PooledColBERT

model = PooledColBERT("{facts.repository}")
queries = model.encode(["{QUERY}"], is_query=True)
documents = model.encode(
    [
        "{DOCUMENTS[0]}",
        "{DOCUMENTS[1]}",
    ],
    is_query=False{options if facts.pooled else ""},
)
print([len(document) for document in documents], "vectors")
""")
    plain = _code(f"""
from pylate import models, rank

model = models.ColBERT("{facts.repository}")
queries = model.encode(["{QUERY}"], is_query=True)
texts = [
    "{DOCUMENTS[0]}",
    "{DOCUMENTS[1]}",
]
documents = model.encode([texts], is_query=False)  # the candidates of each query
ranking = rank.rerank(
    documents_ids=[["mean", "spline"]],
    queries_embeddings=queries,
    documents_embeddings=documents,
)
print(ranking)
""")
    how = "pooled" if facts.pooled else "which can pool its documents"
    return (
        f"With `PooledColBERT` of the Learn to Pool companion, {how}:\n\n{texts}\n\n"
        f"With [PyLate](https://pypi.org/project/pylate/) alone, unpooled:\n\n{plain}"
    )


QUERY = "How is a mean taken without missing values?"
DOCUMENTS = (
    "Compute the mean along the given axis, ignoring missing values.",
    "Interpolate between points with a cubic spline.",
)


def _evaluation(facts: ModelFacts) -> str:
    own = facts.rows[facts.rows["model"] == facts.name]
    parts = [
        f"NDCG@10 by pool factor (PF1: unpooled), beside the `{BASELINE}` that training started "
        f"from. Rows of the profile `{facts.profile.name}`: {facts.profile.description}."
    ]
    for engine in [name for name in ENGINES if name in set(own["engine"])]:
        rows = facts.rows[facts.rows["engine"] == engine]
        measured = sorted(set(own[own["engine"] == engine]["pool_method"]) - {"none"})
        # Unpooled training has no method of its own: every one that was measured is shown.
        for method in [facts.run.pool_method] if facts.pooled else measured or ["none"]:
            parts.append(_ndcg_table(facts, rows, engine, method))
    return "\n\n".join(parts)


def _ndcg_table(facts: ModelFacts, rows: pd.DataFrame, engine: str, method: str) -> str:
    own = rows[rows["model"] == facts.name]
    variant = default_variant(own, method)
    factors = sorted({1} | set(rows["pool_factor"].astype(int)) | set(_wanted_factors(facts)))
    lines = []
    for collection in _collections(facts, rows, engine):
        for label, model in (("baseline", BASELINE), ("**this model**", facts.name)):
            curve = series(rows, model, collection, method, engine, variant, factors=factors)
            lines.append([shown(collection), label, _size(rows, model, collection),
                          *(_number(value) for value in curve)])  # fmt: skip
    title = f"**{ENGINES[engine]}, {method + (f' ({variant})' if variant else '')}:**"
    header = ["collection", "model", "queries / documents", *(f"PF{factor}" for factor in factors)]
    return f"{title}\n\n{_table(header, lines)}"


def _wanted_factors(facts: ModelFacts) -> list[int]:
    return facts.profile.evaluation.pool_factors


def _collections(facts: ModelFacts, rows: pd.DataFrame, engine: str) -> list[str]:
    """Those that the profile wants measured, in its order, then others that were."""
    wanted = facts.profile.evaluation.collections
    if engine == "plaid":
        jobs = [job for job in facts.profile.plaid if job.model == facts.name]
        wanted = [collection for job in jobs for collection in job.collections]
    return list(dict.fromkeys([*wanted, *sorted(set(rows["collection"]))]))


def _size(rows: pd.DataFrame, model: str, collection: str) -> str:
    chosen = rows[(rows["model"] == model) & (rows["collection"] == collection)]
    sizes = {f"{q} / {d}" for q, d in zip(chosen["queries"], chosen["documents"], strict=True)}
    return ", ".join(sorted(sizes)) or NOT_MEASURED


def _number(value: float) -> str:
    return NOT_MEASURED if np.isnan(value) else f"{value:.3f}"


# ---------------------------------------------------------------- the rows


def _rows_provenance(made: dict[str, Any], collection: str) -> str:
    settings = made["settings"]
    dropped = made.get("queries_dropped")
    repositories = sources(made)
    labels = ", ".join(f"{n} {label}" for label, n in made.get("labels", {}).items())
    labels = labels and f" ({labels})"
    mining = settings.get("mining", {})
    rows = [
        ("collection", f"`{collection}`, training split"),
        ("repositories", ", ".join(_place(*item) for item in sorted(repositories.items()))
         or ("not recorded" if collection.startswith(HUB) else "none: not from the hub")),
        ("content", f"fingerprint `{_recorded(settings.get('fingerprint'))[:16]}`, "
         f"{_recorded(made.get('documents'))} documents, "
         f"{_recorded(made.get('queries'))} training queries"),
        ("rows", f"{_recorded(made.get('rows'))}, one a query" + labels),
        ("dropped queries", "not recorded" if dropped is None else
         ", ".join(f"{count} ({reason})" for reason, count in dropped.items()) or "none"),
        ("miner", _recorded(made.get("miner"))),
        ("teacher", _recorded(made.get("teacher"))),
        ("mining rules", ", ".join(f"{k} {v}" for k, v in mining.items() if v is not None)
         or "not recorded"),
        ("seed", _recorded(settings.get("seed"))),
        ("made with", _recorded(made.get("versions")).replace(";", ", ")),
    ]  # fmt: skip
    return _table(["", ""], rows)


def _place(name: str, commit: str) -> str:
    if "://" in name:
        return f"<{name}> (SHA-256 `{commit}`)"
    return f"[{name}](https://huggingface.co/datasets/{name}) at `{commit}`"


def _row_layout(facts: DatasetFacts) -> str:
    columns = [
        ("`query_id`", "string", "a training query's id in the collection"),
        ("`document_ids`", "list of string", "its documents, by descending teacher score"),
        ("`scores`", "list of float", "the teacher's score of each document"),
        ("`labels`", "list of string", "positive, hard_negative, medium_negative, random_negative"),
    ]
    return (
        f"{facts.rows} training rows for distillation, one a query of `{facts.collection}`. Ids "
        "only: the texts stay where they are, under their own terms.\n\n"
        + _table(["column", "type", "what"], columns)
    )


def _dataset_usage(facts: DatasetFacts) -> str:
    code = _code(f"""
from datasets import load_dataset

from l2p_utils.collection import load_collection

rows = load_dataset("{facts.repository}", split="train")
texts = load_collection("{facts.load_name}", split="train")
row = rows[0]
print(texts.queries[row["query_id"]])
for document, score in zip(row["document_ids"], row["scores"]):
    print(round(score, 3), texts.corpus[document][:80])
""")
    return (
        "The texts come from the collection, through the Learn to Pool companion:\n\n"
        f"{code}\n\nFor training with PyLate drop `labels` first: its collator takes every column "
        "that it does not know for text."
    )


def _notices(notices: Sequence[str]) -> str:
    return "\n".join(f"- {notice}" for notice in notices)
