"""Pooling-aware fine-tuning: the loss, the trainer, and one of a profile's models from mined rows.

``torchrun --standalone --nproc-per-node 2 -m l2p_utils.training --profile paper
--collection beir:scifact --pool-method kmeans --pool-factors 1-6`` trains in two processes.

Source: S. Josef, *Learn to Pool* (LIR @ ECIR 2026), section on fine-tuning.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from datasets import Dataset
from pylate import losses, scores
from pylate.losses.contrastive import extract_skiplist_mask
from pylate.utils import ColBERTCollator
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.evaluation import SentenceEvaluator
from torch.utils.data import BatchSampler, Sampler
from transformers import PrinterCallback, TrainerCallback

from l2p_utils.collection import Collection, carves_dev, load_collection, profile_split, subset
from l2p_utils.evaluation import encode_collection, load_evaluated, measure
from l2p_utils.files import (
    PROVENANCE,
    UserError,
    atomic_path,
    cache_folder,
    locked,
    read_json,
    remove,
    settings_match,
    versions,
    write_json,
)
from l2p_utils.hub import snapshot
from l2p_utils.mining import load_mined, mined_fingerprint, mined_folder
from l2p_utils.model import (
    PooledColBERT,
    fingerprint,
    forward_precision,
    load_model,
    quiet_loading,
    save_model,
    use_threads,
)
from l2p_utils.pooling import (
    CACHE_VERSION,
    DEFAULT_VARIANT,
    PoolMethod,
    PoolVariant,
    pool_padded,
    stored_variant,
)
from l2p_utils.profile import (
    BASELINE,
    FitSettings,
    Profile,
    Run,
    check_run,
    check_seed,
    load_profile,
    parse_factors,
)
from l2p_utils.search import exact_search
from l2p_utils.teacher import untrained_model

EPSILON = 1e-8
DEV_METRIC = "dev_ndcg@10"
LOG_FILE = "training_log.csv"
LOG_COLUMNS = ["step", "epoch", "loss", "learning_rate", DEV_METRIC]
WORKERS = 2  # tokenise the next batches while a GPU computes


# --- the loss -------------------------------------------------------------------------------------


def sample_pool_factor(pool_factors: Sequence[int | str], seed: int, step: int) -> int | str:
    """The pool factor (or ``"k16"``: number of vectors) of one step, uniform over `pool_factors`.

    It depends on seed and step alone: a resumed training, and every process of a parallel one,
    draws the factors of an unbroken single one.
    """
    return list(pool_factors)[np.random.default_rng([seed, step]).choice(len(pool_factors))]


class PooledDistillation(losses.Distillation):
    """PyLate's `Distillation` on pooled documents.

    Per query, the MaxSim scores of the pooled documents are min-max normalised; the loss is
    KL(softmax(teacher) ‖ softmax(student)), the mean over the batch. Clusters are assigned on
    detached vectors, means are taken inside the graph. Scores are summed in float32, under autocast
    too. With pool factor 1 this is PyLate's loss, its treatment of padding included: a padded
    vector's similarity counts as 0, not −∞.

    One of `pool_factors` is drawn per step, from `seed` and the attribute `step`: the optimiser's,
    set by `fit`, so that all parts of a step share its factor. The teacher's scores are multiplied
    by `teacher_scale` before their softmax: more makes the targets sharper. `use_sklearn`,
    `variant`, `renormalize` (unit-length means, inside the graph): see `l2p_utils.pooling.pool`.
    """

    def __init__(
        self,
        model: PooledColBERT,
        pool_method: PoolMethod = "none",
        pool_factors: Sequence[int | str] = (1,),
        seed: int = 42,
        protected_tokens: int = 1,
        use_sklearn: bool = False,
        variant: PoolVariant = DEFAULT_VARIANT,
        renormalize: bool = False,
        teacher_scale: float = 1.0,
    ) -> None:
        super().__init__(model)
        self.pool_factors = list(pool_factors)
        self.pool_method = pool_method
        self.seed = seed
        self.protected_tokens = protected_tokens
        self.use_sklearn = use_sklearn
        self.variant = variant
        self.renormalize = renormalize
        self.teacher_scale = teacher_scale
        self.step = 0

    def forward(
        self, sentence_features: Iterable[dict[str, torch.Tensor]], labels: torch.Tensor
    ) -> torch.Tensor:
        """The loss of one batch: tokenised queries (batch) and documents (batch · n_ways).

        `labels` are the teacher's scores, (batch, n_ways).
        """
        sentence_features = list(sentence_features)
        model = getattr(self.model, "module", self.model)  # a data-parallel one is wrapped
        queries, documents = (  # (batch, tokens, dim), (batch · n_ways, tokens, dim)
            torch.nn.functional.normalize(self.model(features)["token_embeddings"], p=2, dim=-1)
            for features in sentence_features
        )
        query_mask, document_mask = extract_skiplist_mask(sentence_features, model.skiplist)
        with torch.autocast(queries.device.type, enabled=False):
            documents, document_mask = pool_padded(
                documents.float(),
                document_mask,
                sample_pool_factor(self.pool_factors, self.seed, self.step),
                self.pool_method,
                self.protected_tokens,
                variant=self.variant,
                use_sklearn=self.use_sklearn,
                renormalize=self.renormalize,
            )
            scores = self.score_metric(  # MaxSim: (batch, n_ways)
                queries.float(),
                documents.unflatten(0, labels.shape),  # (batch, n_ways, vectors, dim)
                queries_mask=None if model.do_query_expansion else query_mask,
                documents_mask=document_mask.unflatten(0, labels.shape),
            )
            return self._divergence(scores, self.teacher_scale * labels.float())

    def _divergence(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        low, high = scores.min(1, keepdim=True).values, scores.max(1, keepdim=True).values
        student = ((scores - low) / (high - low + EPSILON)).log_softmax(-1)
        return self.loss_function(student, labels.log_softmax(-1))


class Contrastive(losses.Contrastive):
    """PyLate's contrastive loss on unpooled documents, for the adaptation.

    Per query the cross-entropy of its own document among all documents of the batch, by MaxSim
    divided by `temperature`; the mean over the batch. Scores are summed in float32, under autocast
    too.
    """

    pool_factors = (1,)

    def __init__(self, model: PooledColBERT, temperature: float, seed: int = 42) -> None:
        super().__init__(model, self._score, temperature=temperature)
        self.seed = seed
        self.step = 0

    @staticmethod
    def _score(queries: torch.Tensor, documents: torch.Tensor, **masks: Any) -> torch.Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            return scores.ColBERTScores()(queries.float(), documents.float(), **masks)


# --- the trainer ----------------------------------------------------------------------------------


class DevEvaluator(SentenceEvaluator):
    """Unpooled NDCG@10 on held-out queries, by exact search."""

    def __init__(self, collection: Collection, precision: str = "auto") -> None:
        super().__init__()
        self.collection = collection
        self.precision = precision
        self.primary_metric = DEV_METRIC

    def __call__(self, model: PooledColBERT, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The metric of the model as it is now."""
        encoded = encode_collection(model, self.collection, self.precision, progress=False)
        ranking = exact_search(encoded.queries, encoded.documents, encoded.document_ids)
        return {DEV_METRIC: float(measure(self.collection, ranking)["ndcg@10"].mean())}


class _Steps(TrainerCallback):
    """Tells the loss the step, and saves a checkpoint every so many steps.

    At an epoch's end the trainer saves by itself, after the evaluation: what resumes from that
    checkpoint has the epoch's score.
    """

    def __init__(self, loss: PooledDistillation | Contrastive, checkpoint_steps: int) -> None:
        self.loss, self.checkpoint_steps = loss, checkpoint_steps

    def on_step_begin(self, args, state, control, **kwargs):
        self.loss.step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        within_epoch = state.epoch != int(state.epoch)
        control.should_save = within_epoch and state.global_step % self.checkpoint_steps == 0


class _EpochOrder(Sampler[int]):
    """All rows in an order that seed and epoch give."""

    def __init__(self, rows: int, trainer: SentenceTransformerTrainer) -> None:
        self.rows, self.trainer = rows, trainer

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        epoch = int(self.trainer.state.epoch or 0)
        generator = torch.Generator().manual_seed(self.trainer.args.seed + epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()


class _Trainer(SentenceTransformerTrainer):
    # sentence-transformers' own order of an epoch depends on the epochs drawn before it in this
    # process, so a resumed training would see other batches
    def get_batch_sampler(self, dataset, batch_size, drop_last, **kwargs):
        return BatchSampler(_EpochOrder(len(dataset), self), batch_size, drop_last)


def _processes() -> PartialState:
    """The processes of this training: those that torchrun started, or this one alone."""
    return PartialState(cpu=not torch.cuda.is_available())


def freeze(model: PooledColBERT, layers: int) -> None:
    """Keep the embeddings and the lowest `layers` encoder layers as they are."""
    if layers == 0:
        return
    encoder = model[0].auto_model
    stack = encoder.encoder.layer if hasattr(encoder, "encoder") else encoder.layers  # ModernBERT
    if layers > len(stack):
        raise UserError(f"training.frozen_layers is {layers}; the encoder has {len(stack)} layers.")
    for module in [encoder.embeddings, *stack[:layers]]:
        module.requires_grad_(False)


def divide_batch(batch_size: int, processes: int, micro_batch: int | None) -> tuple[int, int]:
    """Rows at a time per process, and how often their gradients are accumulated.

    The rows at a time are the largest even part of a process's share within `micro_batch`.
    """
    share, rest = divmod(batch_size, processes)
    if rest:
        raise UserError(
            f"training.batch_size is {batch_size}, which {processes} processes cannot share "
            "evenly. Start another number of processes, or change it."
        )
    at_once = next(n for n in range(min(micro_batch or share, share), 0, -1) if share % n == 0)
    return at_once, share // at_once


def fit(
    loss: PooledDistillation | Contrastive,
    rows: Dataset,
    dev: Collection,
    settings: FitSettings,
    folder: Path,
    precision: str = "auto",
    progress: bool = True,
) -> tuple[PooledColBERT, pd.DataFrame, dict[str, float]]:
    """Fine-tune the loss's model; in a folder with checkpoints, resume from the last whole one.

    Under torchrun every process calls this with the same arguments; the first one writes. `rows`
    are those of `training_rows` or `training_pairs`; their order depends on the loss's seed. `dev`
    is measured after every epoch.

    Returns
    -------
    tuple
        The best epoch's model; a log with one row per step (step, epoch, loss, learning_rate,
        pool_factor) and one per evaluation (`dev_ndcg@10`); the best `epoch` and its score.
    """
    model = loss.model.float()  # in half precision, where it may be stored, small updates are lost
    freeze(model, settings.frozen_layers)
    arguments = _arguments(settings, len(rows), loss, folder, precision)
    arguments.disable_tqdm = not progress
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        loss=loss,
        evaluator=DevEvaluator(dev, precision),
        # pad to the batch's longest text, not to the model's full length as PyLate does
        data_collator=ColBERTCollator(
            lambda texts, is_query, pad, task: model.tokenize(texts, is_query=is_query)
        ),
        callbacks=[_Steps(loss, settings.checkpoint_steps)],
    )
    trainer.remove_callback(PrinterCallback)
    # transformers divides a part's loss by the number of parts, and accelerate would do it again
    trainer.accelerator.gradient_accumulation_steps = 1
    with _processes().main_process_first():  # which deletes what is half-written
        checkpoint = _last_checkpoint(folder)
    try:
        with quiet_loading():
            trainer.train(resume_from_checkpoint=checkpoint)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Out of memory in training: {error}. Set training.micro_batch to fewer rows at a time "
            f"(now {arguments.per_device_train_batch_size}; a step keeps its "
            f"{settings.batch_size}), or freeze layers (training.frozen_layers)."
        ) from error
    evaluated = f"eval_{DEV_METRIC}"
    history = [line for line in trainer.state.log_history if line.keys() & {"loss", evaluated}]
    log = pd.DataFrame(history).rename(columns={evaluated: DEV_METRIC})[LOG_COLUMNS]
    log["pool_factor"] = [
        sample_pool_factor(loss.pool_factors, loss.seed, int(step) - 1) for step in log["step"]
    ]
    best = trainer.state.best_global_step
    epoch = float(log.loc[log["step"] == best, "epoch"].iloc[0])
    kept = load_model(folder / f"checkpoint-{best}", str(model.device))
    return kept, log, {DEV_METRIC: trainer.state.best_metric, "epoch": epoch}


def _arguments(
    settings: FitSettings,
    rows: int,
    loss: PooledDistillation | Contrastive,
    folder: Path,
    precision: str,
) -> SentenceTransformerTrainingArguments:
    device = loss.model.device
    processes, cuda = _processes().num_processes, device.type == "cuda"
    at_once, parts = divide_batch(settings.batch_size, processes, settings.micro_batch)
    steps = math.ceil(rows / settings.batch_size) * settings.epochs
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=parts,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(settings.warmup_ratio * steps),
        optim="adamw_torch_fused",
        bf16=forward_precision(precision, device) == "bfloat16",
        seed=loss.seed,
        eval_strategy="epoch",
        save_strategy="epoch",  # and within an epoch, see _Steps
        save_total_limit=1,  # beside the best one
        metric_for_best_model=DEV_METRIC,
        greater_is_better=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        dataloader_drop_last=processes > 1,
        dataloader_num_workers=WORKERS if cuda else 0,
        dataloader_pin_memory=cuda,
        use_cpu=not cuda,
    )
    # one GPU per process: otherwise a single process would use all GPUs, with a larger batch
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if not cuda:
        # several processes would have "cpu:0", which torch.load refuses: they could not resume
        arguments._setup_devices = device
    return arguments


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; half-written ones are deleted."""
    found = {}
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            found[read_json(checkpoint / "trainer_state.json")["global_step"]] = str(checkpoint)
        except (OSError, UserError, KeyError):  # the trainer writes that file last
            remove(checkpoint)
    return found[max(found)] if found else None


# --- the stage ------------------------------------------------------------------------------------


def training_rows(mined: Dataset, collection: Collection, max_rows: int | None = None) -> Dataset:
    """Mined rows with texts: `query` (str), `documents` (list of str), `scores` (list of float).

    PyLate's collator would take `labels` for text. Where there are more than `max_rows`, so many
    are taken, spread evenly.
    """
    rows = []
    for row in _spread(mined, max_rows):
        try:
            query = collection.queries[row["query_id"]]
            documents = [collection.corpus[document] for document in row["document_ids"]]
        except KeyError as error:
            raise UserError(
                f"The mined row of query {row['query_id']!r} names {error}, which "
                f"{collection.name} does not have. The collection has changed since it was mined: "
                "run 01_data_mining again."
            ) from error
        rows.append({"query": query, "documents": documents, "scores": row["scores"]})
    return Dataset.from_list(rows)


def training_pairs(collection: Collection, max_rows: int | None = None) -> Dataset:
    """Every query with its best-judged document, ties by id: `query` and `document` (str).

    Where there are more than `max_rows`, so many are taken, spread evenly.
    """
    pairs = []
    for query, text in collection.queries.items():
        judged = [(-score, d) for d, score in collection.qrels[query].items() if score > 0]
        known = [(score, d) for score, d in judged if d in collection.corpus]
        if known:
            pairs.append({"query": text, "document": collection.corpus[min(known)[1]]})
    if not pairs:
        raise UserError(f"No training query of {collection.name} has a relevant document.")
    return _spread(Dataset.from_list(pairs), max_rows)


def _spread(rows: Dataset, most: int | None) -> Dataset:
    if most is None or most >= len(rows):
        return rows
    return rows.select(np.linspace(0, len(rows) - 1, most).round().astype(int))


def train(
    profile: Profile,
    collection: str,
    pool_method: PoolMethod,
    pool_factors: Sequence[int | str],
    renormalize: bool = False,
    seed: int | None = None,
    progress: bool = True,
) -> Path:
    """Fine-tune the baseline on mined rows, or reuse the model that these settings made.

    A missing baseline is made first. On the adaptation's own collection the result is the baseline
    of that seed. Gives the folder of weights, log and provenance.
    """
    factors = list(pool_factors)
    check_run(pool_method, factors, renormalize)
    seed = profile.seed if seed is None else seed
    check_seed(seed)
    if profile.adaptation is not None and collection == profile.adaptation.collection:
        if pool_method != "none":
            raise UserError(
                f"{collection} is kept for the adaptation, which is unpooled; got pool_method "
                f"{pool_method!r}. Pass pool_method none and pool_factors 1."
            )
        return make_baseline(profile, progress, seed)
    mined = load_mined(mined_folder(profile, collection))
    start = make_baseline(profile, progress, seed)
    run = Run(
        collection=collection,
        pool_method=pool_method,
        pool_factors=factors,
        renormalize=renormalize,
        seed=seed,
    )
    name = profile.run_name(run)
    settings = {
        "model": name,
        **_settings(profile, run),
        "pooling": stored_variant(pool_method, profile.hierarchical, profile.use_sklearn),
        "start": fingerprint(start),
        "rows": mined_fingerprint(mined),
    }
    if not profile.model.bundled or collection in profile.model.query_lengths:
        settings["lengths"] = {
            "query_length": profile.model.query_length_on(collection),
            "document_length": profile.model.document_length,
        }
    target = profile.folder / "models" / name
    if not settings_match(target, settings):
        recipe = profile.training
        rows = training_rows(mined, profile_split(profile, collection), recipe.max_rows)
        model = load_model(start)
        for length, value in settings.get("lengths", {}).items():
            setattr(model, length, value)
        options = {"use_sklearn": profile.use_sklearn, "variant": profile.hierarchical}
        options |= {"renormalize": renormalize, "teacher_scale": recipe.teacher_scale}
        loss = PooledDistillation(model, pool_method, factors, seed, **options)
        checkpoints = profile.folder / "checkpoints" / name
        _fit_and_save(profile, settings, loss, rows, target, checkpoints, progress)
    return target


def make_baseline(profile: Profile, progress: bool = True, seed: int | None = None) -> Path:
    """The model that the trainings with `seed` start from; reused if it is up to date.

    In `models/baseline`, or `models/baseline-s<seed>` for another seed than the profile's. A base
    from the hub is saved as it is. The bundled encoder is adapted: trained on pairs of the
    adaptation's collection, unpooled, in an order that the seed gives. That is done once per
    machine and cached under a hash of everything that makes it; profiles with the same model and
    adaptation share it.
    """
    seed = profile.seed if seed is None else seed
    name = profile.baseline_name(seed)
    target = profile.folder / "models" / name
    if profile.adaptation is None:
        base = profile.model
        with _processes().main_process_first():
            commit = snapshot(base.base, "model", base.revision).commit
            origin = {"revision": base.revision, "commit": commit}
            settings = {"model": BASELINE, "origin": origin, "base": base.model_dump()}
            if not settings_match(target, settings):
                save_model(load_evaluated(profile, BASELINE), target, settings)
        return target
    run = Run(collection=profile.adaptation.collection, pool_method="none", seed=seed)
    settings = {
        "model": name,
        **_settings(profile, run),
        "base": profile.model.model_dump() | {"seed": profile.seed},
        "fingerprint": profile_split(profile, run.collection).fingerprint,
    }
    if settings_match(target, settings):
        return target
    if _processes().num_processes > 1:
        raise UserError(
            "There is no baseline yet, and it is made in one process. Run `python -m "
            "l2p_utils.training --profile … --baseline` first."
        )
    text = json.dumps([settings, profile.threads, versions()], sort_keys=True)
    cached = cache_folder() / "baselines" / hashlib.sha256(text.encode()).hexdigest()[:16]
    with locked(cached.with_suffix(".lock"), "makes the baseline"):
        if not settings_match(cached, settings):
            _adapt(profile, settings, cached, progress)
        if not settings_match(target, settings):  # another job may already train from it
            with atomic_path(target) as temporary:
                shutil.copytree(cached, temporary)
    return target


def _settings(profile: Profile, run: Run) -> dict[str, Any]:
    """What every trained model depends on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {
        "run": run.model_dump(),
        "code": CACHE_VERSION,
        "training": profile.recipe(run.collection).model_dump(),
        "precision": forward_precision(profile.precision, device),
    }
    if other := profile.dev_collections.get(run.collection):
        settings["dev"] = f"{other}, test split"
    return settings


def _adapt(profile: Profile, settings: dict[str, Any], target: Path, progress: bool) -> None:
    """Train the bundled model on the pairs of the adaptation's collection."""
    adaptation = profile.adaptation
    print(
        f"Making the baseline, once: the bundled model is adapted to late interaction on "
        f"{adaptation.collection}. This takes some minutes.",
        flush=True,
    )
    untrained_model(profile)
    start = load_model(profile.folder / "models" / "bundled")
    pairs = training_pairs(profile_split(profile, adaptation.collection), adaptation.max_rows)
    loss = Contrastive(start, adaptation.temperature, settings["run"]["seed"])
    checkpoints = target.with_name(f"{target.name}-unfinished")
    _fit_and_save(profile, settings, loss, pairs, target, checkpoints, progress)


def _fit_and_save(
    profile: Profile,
    settings: dict[str, Any],
    loss: PooledDistillation | Contrastive,
    rows: Dataset,
    target: Path,
    checkpoints: Path,
    progress: bool,
) -> None:
    """Train the loss's model; save the best epoch, the log and the provenance."""
    began = time.perf_counter()
    use_threads(profile.threads)
    name, processes = settings["run"]["collection"], _processes()
    recipe, mining = profile.recipe(name), profile.mining
    with processes.main_process_first():
        if not settings_match(checkpoints, settings):
            remove(checkpoints)  # of other settings
            write_json(checkpoints / PROVENANCE, {"settings": settings})
    if other := profile.dev_collections.get(name):
        dev = load_collection(other, "test")
    else:
        carve = carves_dev(profile, name)
        dev = load_collection(name, "dev", text_only=mining.text_only, carve_dev=carve)
        dev = subset(dev, recipe.dev_queries, recipe.dev_documents)
    best, log, epoch = fit(loss, rows, dev, recipe, checkpoints, profile.precision, progress)
    processes.wait_for_everyone()  # all have read the best epoch
    if processes.is_main_process:
        provenance = {
            "settings": settings,
            "rows": len(rows),
            "dev": {
                "collection": settings.get("dev", f"{dev.name}, dev split"),
                "looks_at_test_queries": "dev" in settings,
                "fingerprint": dev.fingerprint,
                "query_length": best.query_length,
            },
            "epoch": epoch,
            "seconds": round(time.perf_counter() - began, 1),  # since it was last resumed
            "processes": processes.num_processes,
            "device": torch.cuda.get_device_name() if best.device.type == "cuda" else "cpu",
            "versions": versions(),
        }
        with atomic_path(target) as temporary, quiet_loading():
            best.save(str(temporary), create_model_card=False)
            log.to_csv(temporary / LOG_FILE, index=False)
            write_json(temporary / PROVENANCE, provenance)
        remove(checkpoints)
    processes.wait_for_everyone()


def read_training_log(folder: str | Path) -> pd.DataFrame:
    """A trained model's log: a row per step and per evaluation, see `fit`."""
    return pd.read_csv(Path(folder) / LOG_FILE)


def main(arguments: list[str] | None = None) -> int:
    """Train one of a profile's models; under torchrun, as one of several processes."""
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.training", description=main.__doc__)
    parser.add_argument("--profile", required=True, help="a profile's name or a YAML file")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--baseline", action="store_true", help="make only the baseline")
    which.add_argument("--collection", help="the mined rows to train on")
    parser.add_argument("--pool-method", default="none")
    parser.add_argument("--pool-factors", default="1", help="3, 1-6 or 2+4")
    parser.add_argument("--renormalize", action="store_true", help="with unit-length means")
    parser.add_argument("--seed", type=int, help="of the rows' order and the factors")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    processes = _processes()
    progress = not options.quiet and processes.is_main_process
    try:
        profile = load_profile(options.profile)
        if options.baseline:
            folder = make_baseline(profile, progress, options.seed)
        else:
            factors = parse_factors(options.pool_factors)
            run = (options.collection, options.pool_method, factors, options.renormalize)
            folder = train(profile, *run, options.seed, progress)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)  # of whichever process: it may be the only one
        return 1
    processes.print(folder, flush=True)
    processes.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
