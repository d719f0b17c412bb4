"""The training loop: from a model and rows to the best epoch's model and a log of every step.

Built on sentence-transformers' trainer. A step's rows are shared by the processes and, where
memory does not suffice, taken in parts; whatever the division, the step's gradient is the same.
Checkpoints make a killed training go on where it was.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from pylate.utils import ColBERTCollator
from sentence_transformers import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.evaluation import SentenceEvaluator
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import TrainerCallback

from l2p_utils import parallel
from l2p_utils.collection import Collection
from l2p_utils.distillation import PooledDistillation, sample_pool_factor
from l2p_utils.evaluation import encode_collection, measure
from l2p_utils.files import (
    PROVENANCE,
    UserError,
    atomic_path,
    full_disk_told,
    read_json,
    remove,
    write_json,
)
from l2p_utils.model import PooledColBERT, forward_precision, load_model, quiet_loading
from l2p_utils.pooling import DEFAULT_VARIANT, PoolVariant
from l2p_utils.profile import Run, TrainingSettings
from l2p_utils.search import exact_search

DEV_METRIC = "dev_ndcg@10"
TRAINER_STATE = "trainer_state.json"  # of a checkpoint
WORKERS = 2  # tokenising the next batches while a GPU computes
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",  # the processor's
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class Cost:
    """What a training took and on what; of the last leg when it was killed and went on."""

    device: str
    processes: int
    micro_batch: int  # rows at a time and process, after what memory allowed
    precision: str
    steps: int  # optimiser steps in all
    resumed_at: int  # the step that this leg began at
    seconds: float
    pooling_seconds: float  # of the seconds
    peak_gpu_megabytes: float | None  # of the fullest GPU; None on a processor


class Fitted(NamedTuple):
    """The best epoch's model; a row a step; what it took."""

    model: PooledColBERT
    log: pd.DataFrame
    cost: Cost


class DevEvaluator(SentenceEvaluator):
    """Unpooled NDCG@10 on held-out queries, by exact search.

    Of several processes the first measures and tells the others: all have one number.
    """

    def __init__(self, collection: Collection, precision: str = "auto") -> None:
        super().__init__()
        self.collection = collection
        self.precision = precision
        self.primary_metric = DEV_METRIC

    def __call__(self, model: PooledColBERT, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The metric of the model as it is now."""
        value = self._measure(model) if parallel.rank() == 0 else None
        return {DEV_METRIC: parallel.from_first(value)}

    def _measure(self, model: PooledColBERT) -> float:
        training = model.training
        encoded = encode_collection(model, self.collection, self.precision, progress=False)
        model.train(training)
        found = exact_search(encoded.queries, encoded.documents, encoded.document_ids)
        return float(measure(self.collection, found)["ndcg@10"].mean())


class _KeepBest(TrainerCallback):
    """Tells the loss the step; saves the model whenever an epoch is the best so far."""

    def __init__(self, loss: PooledDistillation, model: PooledColBERT, folder: Path) -> None:
        self.loss, self.model, self.folder = loss, model, folder
        self.first_step: int | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.loss.step = state.global_step
        if self.first_step is None:
            self.first_step = state.global_step

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not state.is_world_process_zero:
            return
        value = metrics[f"eval_{DEV_METRIC}"]
        best = read_json(self.folder / PROVENANCE)[DEV_METRIC] if self.folder.exists() else -1.0
        if value > best:
            with atomic_path(self.folder) as temporary, quiet_loading():
                self.model.save(str(temporary), create_model_card=False)
                write_json(temporary / PROVENANCE, {DEV_METRIC: value, "epoch": state.epoch})


class StepTrainer(SentenceTransformerTrainer):
    """A trainer that computes a step's gradient in as many parts as it takes.

    Every process reads the step's whole batch (so that all pad to one length, which the loss sees),
    takes its even share, and goes through it `micro_batch` rows at a time. Each part's mean loss is
    weighted by its share of the rows; the processes' gradients are added up at the end. So the
    gradient is the whole batch's however it is divided, also where the rows do not divide evenly.
    When memory does not suffice on any process, all start the step over with half the rows at a
    time: with the same rows and pool factor, and nothing trained so far is lost.

    Attributes
    ----------
    micro_batch : int
        Rows at a time and process.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.micro_batch = math.ceil(self.args.per_device_train_batch_size / parallel.processes())

    def get_train_dataloader(self) -> DataLoader:
        """Whole batches, the same on every process, in an order that seed and epoch give."""
        # not accelerate's loader, which deals the batches out and drops uneven ones
        size = self.args.per_device_train_batch_size
        order = _EpochOrder(len(self.train_dataset), size, self.args.seed, self)
        return DataLoader(
            self.train_dataset,
            batch_sampler=BatchSampler(order, size, drop_last=False),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with full_disk_told(folder):
            super()._save_checkpoint(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the trainer's, leaving the random numbers as they are.

        They would go on from another place after an evaluation that a resumed training makes up
        for: its random numbers are those of the checkpoint, which was written before.
        """
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Leave the step's gradient in the parameters; the loss of this process's rows.

        It is scaled so that the trainer's mean over processes is the batch's mean loss.
        """
        model.train()
        inputs = self._prepare_inputs(inputs)
        while (loss := self._attempt(model, inputs)) is None:
            self._halve(model)
        parallel.sum_gradients(model.parameters())
        return loss * parallel.processes()

    def _attempt(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
        """The step in parts of `micro_batch` rows; None when memory failed anywhere."""
        loss = None
        try:
            loss = self._accumulate(model, inputs)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # the error is gone here, and with its frames what they held
        return None if parallel.largest(loss is None) else loss

    def _accumulate(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        rows = len(inputs["label"])
        share = np.array_split(np.arange(rows), parallel.processes())[parallel.rank()]
        total = torch.zeros((), device=self.args.device)
        # without the wrapper's own averaging: it would count every process alike and, when one ran
        # out of memory, leave the others waiting
        with self.accelerator.no_sync(model):
            for start in range(0, len(share), self.micro_batch):
                part = share[start : start + self.micro_batch]
                piece = rows_of(inputs, part[0], part[-1] + 1)
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, piece) * (len(part) / rows)
                self.accelerator.backward(loss)
                total += loss.detach()
        return total

    def _halve(self, model: torch.nn.Module) -> None:
        model.zero_grad()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.micro_batch == 1:
            raise memory_error("one row at a time")
        before, self.micro_batch = self.micro_batch, math.ceil(self.micro_batch / 2)
        if parallel.rank() == 0:
            print(
                f"Out of memory with {before} rows at a time. Step {self.state.global_step + 1} "
                f"starts over with {self.micro_batch} at a time; a step keeps its "
                f"{self.args.per_device_train_batch_size} rows.",
                file=sys.stderr,
                flush=True,
            )


class _EpochOrder(Sampler[int]):
    """The rows in an order that seed and epoch give, so that a resumed epoch has the same."""

    def __init__(self, rows: int, batch_size: int, seed: int, trainer: StepTrainer) -> None:
        self.rows, self.batch_size, self.seed, self.trainer = rows, batch_size, seed, trainer

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        epoch = self.trainer.state.global_step // math.ceil(self.rows / self.batch_size)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()


def rows_of(inputs: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The rows from `start` to `stop` of a collated batch, padded as they were.

    A tensor's first dimension is the rows, or rows · n_ways (the documents).
    """
    rows = len(inputs["label"])

    def part(tensor: torch.Tensor) -> torch.Tensor:
        ways = len(tensor) // rows
        return tensor[start * ways : stop * ways]

    return {k: part(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means so: by its type, or by its text where a library raises another."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in str(error) for sign in OUT_OF_MEMORY
    )


def memory_error(when: str) -> UserError:
    """What to do about a device that is too small."""
    return UserError(
        f"Out of memory in training, {when}. Use a device with more memory, leave it to this job "
        "alone (fewer `processes` or jobs side by side on one device), or make a row smaller: "
        "shorter documents (model.document_length), fewer negatives (mining.hard, medium, random), "
        "more frozen layers (training.frozen_layers)."
    )


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
    stack = encoder.encoder.layer if hasattr(encoder, "encoder") else encoder.layers  # ModernBERT
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
    variant: PoolVariant = DEFAULT_VARIANT,
) -> Fitted:
    """Fine-tune a model; on a folder with checkpoints, go on from the last whole one.

    In several processes (`parallel.group`) each calls this with the same arguments; the first
    writes. A checkpoint may be gone on from in another number of processes.

    Parameters
    ----------
    dev
        Measured after every epoch; the best epoch is kept.
    folder
        For checkpoints and the best model.
    use_sklearn, variant
        See `l2p_utils.pooling.pool`.

    Returns
    -------
    Fitted
        The best epoch's model; one row a step: step, epoch, loss, pool_factor, evaluations have
        `dev_ndcg@10`; and what it took.

    Raises
    ------
    UserError
        When memory does not suffice for one row at a time, or the disk is full.
    """
    model.float()  # a checkpoint may be stored in half precision, where small updates are lost
    freeze(model, settings.frozen_layers)
    loss = PooledDistillation(
        model,
        run.pool_method,
        run.pool_factors,
        seed,
        use_sklearn=use_sklearn,
        variant=variant,
    )
    keep_best = _KeepBest(loss, model, folder / "best")
    trainer = StepTrainer(
        model=model,
        args=_arguments(settings, len(rows), seed, folder, precision, progress, model.device),
        train_dataset=rows,
        loss=loss,
        evaluator=DevEvaluator(dev, precision),
        # Pad to the batch's longest text, not to the model's full length as PyLate does.
        data_collator=ColBERTCollator(
            lambda texts, is_query, pad, task: model.tokenize(texts, is_query=is_query)
        ),
        callbacks=[keep_best],
    )
    checkpoint = parallel.from_first(
        _last_whole_checkpoint(folder) if parallel.rank() == 0 else None
    )
    start = time.perf_counter()
    _train(trainer, checkpoint)
    cost = _cost(trainer, loss, precision, keep_best.first_step, time.perf_counter() - start)
    parallel.wait()  # the first has written the best epoch
    best = load_model(folder / "best", str(model.device))
    return Fitted(best, _log(trainer, run, seed), cost)


def _train(trainer: StepTrainer, checkpoint: str | None) -> None:
    """Train, from a checkpoint on when there is one.

    One at an epoch's end was written before the epoch was judged: that comes first then.
    Out of memory elsewhere than in a step (the optimiser, the dev queries) ends the training.
    """
    if trainer.args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.args.device)
    trainer.args.eval_on_start = checkpoint is not None and _ends_epoch(trainer, checkpoint)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise memory_error(f"outside of a step's rows ({error})") from error


def _ends_epoch(trainer: StepTrainer, checkpoint: str) -> bool:
    step = read_json(Path(checkpoint) / TRAINER_STATE)["global_step"]
    return step % len(trainer.get_train_dataloader()) == 0


def _cost(
    trainer: StepTrainer,
    loss: PooledDistillation,
    precision: str,
    first_step: int | None,
    seconds: float,
) -> Cost:
    device = trainer.args.device
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else 0
    peak = parallel.largest(peak)
    steps = trainer.state.global_step
    return Cost(
        device=torch.cuda.get_device_name(device) if cuda else device.type,
        processes=parallel.processes(),
        micro_batch=trainer.micro_batch,
        precision=forward_precision(precision, device),
        steps=steps,
        resumed_at=steps if first_step is None else first_step,
        seconds=round(seconds, 1),
        pooling_seconds=round(loss.pooling_seconds, 1),
        peak_gpu_megabytes=round(peak) if cuda else None,
    )


def _log(trainer: StepTrainer, run: Run, seed: int) -> pd.DataFrame:
    log = pd.DataFrame(trainer.state.log_history)
    log = log.rename(columns={f"eval_{DEV_METRIC}": DEV_METRIC})
    log = log[[c for c in ("step", "epoch", "loss", "learning_rate", DEV_METRIC) if c in log]]
    log = log.dropna(subset=[c for c in ("loss", DEV_METRIC) if c in log], how="all")
    factors = [sample_pool_factor(run.pool_factors, seed, int(step) - 1) for step in log["step"]]
    return log.assign(pool_factor=factors)


def _arguments(
    settings: TrainingSettings,
    rows: int,
    seed: int,
    folder: Path,
    precision: str,
    progress: bool,
    device: torch.device,
) -> SentenceTransformerTrainingArguments:
    steps = math.ceil(rows / settings.batch_size) * settings.epochs
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,  # of all processes, see StepTrainer
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(settings.warmup_ratio * steps),
        optim="adamw_torch_fused",
        bf16=forward_precision(precision, device) == "bfloat16",
        seed=seed,
        eval_strategy="epoch",
        save_strategy="steps",
        save_steps=settings.checkpoint_steps,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=not progress,
        report_to="none",
        ddp_find_unused_parameters=False,
        # StepTrainer drops none; sentence-transformers would warn, and set this, by itself
        dataloader_drop_last=parallel.processes() > 1,
        **device_arguments(device),
    )
    # one GPU a process: left alone, one process would use all GPUs in threads, with another batch
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if device.type == "cpu":
        # several processes would have "cpu:0", which torch.load refuses: they could not go on
        arguments._setup_devices = device
    return arguments


def device_arguments(device: torch.device) -> dict[str, Any]:
    """What depends on the device: a GPU is fed by workers, from memory that it can read itself."""
    cuda = device.type == "cuda"
    return {
        "use_cpu": device.type == "cpu",
        "dataloader_num_workers": WORKERS if cuda else 0,
        "dataloader_pin_memory": cuda,
    }


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; half-written ones are deleted."""
    found = {}
    for checkpoint in folder.glob("checkpoint-*"):
        state = checkpoint / TRAINER_STATE  # the trainer writes it last
        try:
            found[read_json(state)["global_step"]] = str(checkpoint)
        except (OSError, UserError, KeyError):
            remove(checkpoint)
    return found[max(found)] if found else None
