"""The loss of pooling-aware training: distillation on documents that are pooled on the way.

Takes tokenised queries and documents with teacher scores; gives the loss of the batch. Built on
PyLate's distillation loss.

Source: S. Josef, *Learn to Pool* (LIR @ ECIR 2026), section on fine-tuning.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from pylate import losses
from pylate.losses.contrastive import extract_skiplist_mask

from l2p_utils.model import PooledColBERT
from l2p_utils.pooling import (
    DEFAULT_VARIANT,
    PoolMethod,
    PoolVariant,
    check_pool_factor,
    check_pooling,
    pool_padded,
)

EPSILON = 1e-8


class Stopwatch:
    """Seconds spent in a part of each step, on the processor or on a GPU.

    A GPU computes on while Python has gone ahead, so there the time lies between two marks in its
    own queue; they are read only when it has passed them, which makes nobody wait.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> float:
        """All that was measured so far; waits for what a GPU has not finished."""
        self._read(wait=True)
        return self._seconds

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Add the time of the block."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        marks = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        marks[0].record()
        yield
        marks[1].record()
        self._marks.append(marks)
        self._read(wait=False)

    def _read(self, wait: bool) -> None:
        while self._marks and (wait or self._marks[0][1].query()):
            start, end = self._marks.pop(0)
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000  # from ms


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
    use_sklearn, variant
        See `l2p_utils.pooling.pool`.

    Attributes
    ----------
    step : int
        The optimiser step, 0-based; a callback of `fit` sets it before each step. All parts of a
        step, on whatever process, are pooled with the step's one factor.
    """

    def __init__(
        self,
        model: PooledColBERT,
        pool_method: PoolMethod = "none",
        pool_factors: Sequence[int] = (1,),
        seed: int = 42,
        protected_tokens: int = 1,
        use_sklearn: bool = False,
        variant: PoolVariant = DEFAULT_VARIANT,
    ) -> None:
        super().__init__(model)
        check_pooling(pool_method, variant)
        self.pool_factors = [check_pool_factor(factor) for factor in pool_factors]
        self.pool_method = pool_method
        self.seed = seed
        self.protected_tokens = protected_tokens
        self.use_sklearn = use_sklearn
        self.variant = variant
        self.step = 0
        self.stopwatch = Stopwatch()

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
    def pooling_seconds(self) -> float:
        """Time spent in pooling since the beginning, or since it was last set to 0."""
        return self.stopwatch.seconds

    @pooling_seconds.setter
    def pooling_seconds(self, value: float) -> None:
        self.stopwatch = Stopwatch()
        self.stopwatch._seconds = value

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
        factor = sample_pool_factor(self.pool_factors, self.seed, self.step)
        with self.stopwatch.measure(documents.device):
            documents, document_mask = pool_padded(
                documents,
                document_mask,
                factor,
                self.pool_method,
                self.protected_tokens,
                variant=self.variant,
                use_sklearn=self.use_sklearn,
            )
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
