"""Pooling-aware fine-tuning: distillation whose document vectors are pooled while it trains.

Takes mined rows and a model; gives a model folder with its provenance and a log of every step.
Built on PyLate's distillation loss and sentence-transformers' trainer; checkpoints make a killed
training go on where it was.

Source: S. Josef, *Learn to Pool* (LIR @ ECIR 2026), section on fine-tuning.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from pylate import losses
from pylate.losses.contrastive import extract_skiplist_mask
from pylate.utils import ColBERTCollator
from sentence_transformers import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.evaluation import SentenceEvaluator
from transformers import TrainerCallback

from l2p_utils.collection import Collection, load_collection
from l2p_utils.evaluation import (
    encode_collection,
    fingerprint,
    forward_precision,
    measure,
    subset,
    use_threads,
    versions,
)
from l2p_utils.files import (
    PROVENANCE,
    UserError,
    atomic_path,
    read_json,
    remove,
    settings_match,
    write_json,
)
from l2p_utils.mining import load_mined, mined_folder, training_split, untrained_model
from l2p_utils.model import PooledColBERT, load_model, quiet_loading
from l2p_utils.pooling import (
    PoolMethod,
    check_pool_factor,
    check_pooling,
    pool_padded,
    stored_variant,
)
from l2p_utils.profile import (
    BASELINE,
    Profile,
    Run,
    TrainingSettings,
    check_run,
    model_name,
)
from l2p_utils.search import exact_search

DEV_METRIC = "dev_ndcg@10"
LOG_FILE = "training_log.csv"
EPSILON = 1e-8


def sample_pool_factor(pool_factors: Sequence[int], seed: int, step: int) -> int:
    """The pool factor of one batch, uniform over `pool_factors`.

    It depends on the seed and the number of the optimiser step alone, so a resumed training, and
    every process of a parallel one, draws what an uninterrupted single one does.
    """
    return int(np.random.default_rng([seed, step]).choice(list(pool_factors)))


class PooledDistillation(losses.Distillation):
    """PyLate's `Distillation` on pooled documents.

    Per query, student MaxSim scores of the pooled documents are min-max normalised; the loss is
    KL(softmax(teacher) ‖ softmax(student)), averaged over the batch. Cluster assignments are made
    on detached vectors, means inside the graph. Scores are summed in float32 also under autocast.
    With pool factor 1 the loss is PyLate's, its treatment of padding included: a padded vector's
    similarity counts as 0, not −∞.

    Parameters
    ----------
    model
        The model that is trained.
    pool_method
        ``none``, ``span``, ``kmeans`` or ``hierarchical``.
    pool_factors
        Drawn from uniformly, once per batch.
    seed
        Of the draws, with `step`.
    use_sklearn
        See `l2p_utils.pooling.pool`.

    Attributes
    ----------
    step : int
        The optimiser step, 0-based; a callback of `train` sets it before each step.
    pooling_seconds : float
        Time spent in pooling since the beginning.
    """

    def __init__(
        self,
        model: PooledColBERT,
        pool_method: PoolMethod = "none",
        pool_factors: Sequence[int] = (1,),
        seed: int = 42,
        protected_tokens: int = 1,
        use_sklearn: bool = False,
    ) -> None:
        super().__init__(model)
        check_pooling(pool_method)
        self.pool_factors = [check_pool_factor(factor) for factor in pool_factors]
        self.pool_method = pool_method
        self.seed = seed
        self.protected_tokens = protected_tokens
        self.use_sklearn = use_sklearn
        self.step = 0
        self.pooling_seconds = 0.0

    def forward(
        self, sentence_features: Iterable[dict[str, torch.Tensor]], labels: torch.Tensor
    ) -> torch.Tensor:
        """The loss of one batch.

        Parameters
        ----------
        sentence_features
            Tokenised queries (batch) and documents (batch · n_ways).
        labels
            (batch, n_ways) teacher scores.
        """
        sentence_features = list(sentence_features)
        queries, documents = (
            torch.nn.functional.normalize(self.model(features)["token_embeddings"], p=2, dim=-1)
            for features in sentence_features
        )
        query_mask, document_mask = extract_skiplist_mask(
            sentence_features=sentence_features, skiplist=self._unwrapped.skiplist
        )
        with torch.autocast(queries.device.type, enabled=False):
            scores = self._scores(queries.float(), documents.float(), query_mask, document_mask)
            return self._divergence(scores, labels.float())

    @property
    def _unwrapped(self) -> PooledColBERT:
        """The model itself, also when data-parallel training has wrapped it."""
        return getattr(self.model, "module", self.model)

    def _scores(
        self,
        queries: torch.Tensor,
        documents: torch.Tensor,
        query_mask: torch.Tensor,
        document_mask: torch.Tensor,
    ) -> torch.Tensor:
        """MaxSim with the pooled documents: (batch, n_ways)."""
        start = time.perf_counter()
        factor = sample_pool_factor(self.pool_factors, self.seed, self.step)
        documents, document_mask = pool_padded(
            documents,
            document_mask,
            factor,
            self.pool_method,
            self.protected_tokens,
            use_sklearn=self.use_sklearn,
        )
        self.pooling_seconds += time.perf_counter() - start
        ways = (queries.shape[0], -1)
        return self.score_metric(
            queries,
            documents.unflatten(0, ways),  # (batch, n_ways, vectors, dim)
            queries_mask=None if self._unwrapped.do_query_expansion else query_mask,
            documents_mask=document_mask.unflatten(0, ways),
        )

    def _divergence(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        low, high = scores.min(1, keepdim=True).values, scores.max(1, keepdim=True).values
        student = ((scores - low) / (high - low + EPSILON)).log_softmax(-1)
        return self.loss_function(student, labels.log_softmax(-1))


class DevEvaluator(SentenceEvaluator):
    """Unpooled NDCG@10 on a held-out part of the training collection, by exact search."""

    def __init__(self, collection: Collection, precision: str = "auto") -> None:
        super().__init__()
        self.collection = collection
        self.precision = precision
        self.primary_metric = DEV_METRIC

    def __call__(self, model: PooledColBERT, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The metric of the model as it is now."""
        training = model.training
        encoded = encode_collection(model, self.collection, self.precision, progress=False)
        model.train(training)
        found = exact_search(encoded.queries, encoded.documents, encoded.document_ids)
        return {DEV_METRIC: float(measure(self.collection, found)["ndcg@10"].mean())}


class _KeepBest(TrainerCallback):
    """Tells the loss the step; saves the model whenever an epoch is the best so far."""

    def __init__(self, loss: PooledDistillation, model: PooledColBERT, folder: Path) -> None:
        self.loss, self.model, self.folder = loss, model, folder

    def on_step_begin(self, args, state, control, **kwargs):
        self.loss.step = state.global_step

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        value = metrics[f"eval_{DEV_METRIC}"]
        best = read_json(self.folder / PROVENANCE)[DEV_METRIC] if self.folder.exists() else -1.0
        if value > best:
            with atomic_path(self.folder) as temporary, quiet_loading():
                self.model.save(str(temporary), create_model_card=False)
                write_json(temporary / PROVENANCE, {DEV_METRIC: value, "epoch": state.epoch})


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


def freeze(model: PooledColBERT, layers: int) -> None:
    """Keep the embeddings and the lowest `layers` encoder layers as they are.

    Raises
    ------
    UserError
        When the encoder has not that many layers.
    """
    if layers == 0:
        return
    encoder = model[0].auto_model
    stack = encoder.encoder.layer if hasattr(encoder, "encoder") else encoder.layers
    if layers > len(stack):
        raise UserError(f"training.frozen_layers is {layers}; the encoder has {len(stack)} layers.")
    for module in [encoder.embeddings, *stack[:layers]]:
        module.requires_grad_(False)


def fit(
    model: PooledColBERT,
    rows: Dataset,
    dev: Collection,
    run: Run,
    settings: TrainingSettings,
    seed: int,
    folder: Path,
    precision: str = "auto",
    progress: bool = True,
    use_sklearn: bool = False,
) -> tuple[PooledColBERT, pd.DataFrame]:
    """Fine-tune a model; on a folder with checkpoints, go on from the last whole one.

    Parameters
    ----------
    dev
        Measured after every epoch; the best epoch is kept.
    folder
        For checkpoints and the best model.

    Returns
    -------
    tuple
        The best epoch's model, and one row a step: step, epoch, loss, pool_factor; evaluations have
        `dev_ndcg@10`.
    """
    freeze(model, settings.frozen_layers)
    loss = PooledDistillation(
        model, run.pool_method, run.pool_factors, seed, use_sklearn=use_sklearn
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=_arguments(settings, len(rows), seed, folder, precision, progress, model),
        train_dataset=rows,
        loss=loss,
        evaluator=DevEvaluator(dev, precision),
        # Pad to the batch's longest text, not to the model's full length as PyLate does.
        data_collator=ColBERTCollator(
            lambda texts, is_query, pad, task: model.tokenize(texts, is_query=is_query)
        ),
        callbacks=[_KeepBest(loss, model, folder / "best")],
    )
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(folder))
    log = pd.DataFrame(trainer.state.log_history)
    log = log.rename(columns={f"eval_{DEV_METRIC}": DEV_METRIC})
    log = log[[c for c in ("step", "epoch", "loss", "learning_rate", DEV_METRIC) if c in log]]
    log = log.dropna(subset=[c for c in ("loss", DEV_METRIC) if c in log], how="all")
    factors = [sample_pool_factor(run.pool_factors, seed, int(step) - 1) for step in log["step"]]
    return load_model(folder / "best", str(model.device)), log.assign(pool_factor=factors)


def _arguments(
    settings: TrainingSettings,
    rows: int,
    seed: int,
    folder: Path,
    precision: str,
    progress: bool,
    model: PooledColBERT,
) -> SentenceTransformerTrainingArguments:
    steps = math.ceil(rows / settings.batch_size) * settings.epochs
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(settings.warm_up_ratio * steps),
        optim="adamw_torch_fused",
        bf16=forward_precision(precision, model.device) == "bfloat16",
        use_cpu=model.device.type == "cpu",
        seed=seed,
        eval_strategy="epoch",
        save_strategy="steps",
        save_steps=settings.checkpoint_steps,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=not progress,
        report_to="none",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; half-written ones are deleted."""
    found = {}
    for checkpoint in folder.glob("checkpoint-*"):
        state = checkpoint / "trainer_state.json"  # the trainer writes it last
        try:
            found[read_json(state)["global_step"]] = str(checkpoint)
        except (OSError, UserError, KeyError):
            remove(checkpoint)
    return found[max(found)] if found else None


def train(
    profile: Profile,
    collection: str,
    pool_method: PoolMethod,
    pool_factors: Sequence[int],
    seed: int | None = None,
    progress: bool = True,
) -> Path:
    """Train one of a profile's models, or reuse it when it was made with the same settings.

    On the warm-up's collection this makes ``baseline`` from the untrained embedded model; on any
    other it fine-tunes the baseline.

    Returns
    -------
    pathlib.Path
        The model's folder, with `provenance.json` and the log of the training.

    Raises
    ------
    UserError
        When the mined rows or the baseline are missing, or method and factors do not fit together.
    """
    use_threads(profile.threads)
    factors = list(pool_factors)
    check_run(pool_method, factors)
    seed = profile.seed if seed is None else seed
    run = Run(collection=collection, pool_method=pool_method, pool_factors=factors, seed=seed)
    warm_up = profile.warm_up is not None and collection == profile.warm_up.collection
    if warm_up and pool_method != "none":
        raise UserError(
            f"{collection} is the warm-up's collection, trained unpooled; got pool_method "
            f"{pool_method!r}. Pass pool_method none and pool_factors 1."
        )
    name = BASELINE if warm_up else model_name(collection, pool_method, factors, seed)
    settings = profile.warm_up if warm_up else profile.training
    target = profile.folder / "models" / name
    mined = load_mined(mined_folder(profile, collection))
    model = (
        untrained_model(profile) if warm_up else load_model(profile.folder / "models" / BASELINE)
    )
    start = profile.folder / "models" / ("embedded" if warm_up else BASELINE)
    made_with = {
        "model": name,
        "run": run.model_dump(),
        "pooling": stored_variant(pool_method, use_sklearn=profile.use_sklearn),
        "training": settings.model_dump(),
        "start": fingerprint(start),
        "rows": mined_fingerprint(mined),
        "precision": forward_precision(profile.precision, model.device),
    }
    if not settings_match(target, made_with):
        _fit_and_save(profile, model, mined, run, settings, target, made_with, progress)
    return target


def mined_fingerprint(mined: Dataset) -> str:
    """Hash of mined rows' content, the same for the same rows wherever they are stored."""
    content = pd.util.hash_pandas_object(mined.to_pandas().astype("str"), index=False)
    return f"{int(content.sum()) & (2**64 - 1):016x}"


def _fit_and_save(
    profile: Profile,
    model: PooledColBERT,
    mined: Dataset,
    run: Run,
    settings: TrainingSettings,
    target: Path,
    made_with: dict[str, Any],
    progress: bool,
) -> None:
    checkpoints = profile.folder / "checkpoints" / target.name
    if not settings_match(checkpoints, made_with):
        remove(checkpoints)  # of other settings, or none
        write_json(checkpoints / PROVENANCE, {"settings": made_with})
    rows = training_rows(mined, training_split(run.collection, profile.mining), settings.max_rows)
    dev = load_collection(run.collection, "dev", text_only=profile.mining.text_only)
    dev = subset(dev, settings.dev_queries, settings.dev_documents)
    start = time.perf_counter()
    best, log = fit(
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
    )
    provenance = {
        "settings": made_with,
        "rows": len(rows),
        "epoch": read_json(checkpoints / "best" / PROVENANCE),
        "seconds": round(time.perf_counter() - start, 1),
        "versions": versions(),
    }
    with atomic_path(target) as temporary, quiet_loading():
        best.save(str(temporary), create_model_card=False)
        log.to_csv(temporary / LOG_FILE, index=False)
        write_json(temporary / PROVENANCE, provenance)
    remove(checkpoints)


def read_training_log(folder: str | Path) -> pd.DataFrame:
    """A trained model's log: one row a step, see `fit`."""
    return pd.read_csv(Path(folder) / LOG_FILE)
