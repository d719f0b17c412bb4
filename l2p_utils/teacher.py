"""Miner and teacher: who proposes candidates, and who scores them.

The embedded teacher needs no download: it is the mean of dense cosine and unpooled late
interaction, each min-max normalised over a query's candidates, of the encoder before its warm-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from l2p_utils.collection import Collection
from l2p_utils.evaluation import autocast, encode
from l2p_utils.model import PooledColBERT, embedded_encoder_path, quiet_loading
from l2p_utils.search import maxsim_scores

EPSILON = 1e-8


@dataclass(frozen=True)
class EmbeddedTeacher:
    """Scores of every training query with every document.

    Attributes
    ----------
    query_ids, document_ids : list of str
        Rows and columns of the matrices.
    dense : numpy.ndarray
        (queries, documents) cosine of the dense encoder.
    late : numpy.ndarray
        (queries, documents) MaxSim of the late-interaction model.
    """

    query_ids: list[str]
    document_ids: list[str]
    dense: np.ndarray
    late: np.ndarray

    def scores(
        self, query_id: str, document_ids: Sequence[str], positives: Sequence[str]
    ) -> dict[str, float]:
        """Teacher scores in [0, 1] of a query's candidates, positives among them.

        The known positives are lifted to the best score of all: the teacher is too weak to doubt
        the judgments.
        """
        row = self.query_ids.index(query_id)
        position = {document: i for i, document in enumerate(self.document_ids)}
        columns = [position[document] for document in document_ids]
        mixed = (_min_max(self.dense[row, columns]) + _min_max(self.late[row, columns])) / 2
        found = dict(zip(document_ids, mixed.tolist(), strict=True))
        best = max(found.values())
        return found | {document: best for document in positives}


def _min_max(scores: np.ndarray) -> np.ndarray:
    scores = scores.astype(np.float64)
    return (scores - scores.min()) / (scores.max() - scores.min() + EPSILON)


def dense_similarities(
    collection: Collection, max_length: int, precision: str = "auto"
) -> np.ndarray:
    """Cosine of every query with every document by the embedded dense encoder.

    Parameters
    ----------
    max_length
        Word pieces at which documents are cut.

    Returns
    -------
    numpy.ndarray
        (queries, documents), float32, in the collection's order.
    """
    with quiet_loading():
        encoder = SentenceTransformer(str(embedded_encoder_path()), device="cpu")
    encoder.max_seq_length = max_length
    vectors = []
    for texts in (collection.queries.values(), collection.corpus.values()):
        with autocast(precision, torch.device("cpu")):
            found = encoder.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        vectors.append(torch.nn.functional.normalize(found.float(), dim=-1))
    return (vectors[0] @ vectors[1].T).numpy()


def embedded_teacher(
    collection: Collection, model: PooledColBERT, precision: str = "auto"
) -> EmbeddedTeacher:
    """Score a training collection with the embedded encoder, dense and as `model`, unpooled."""
    queries = encode(model, list(collection.queries.values()), True, precision)
    documents = encode(model, list(collection.corpus.values()), False, precision)
    return EmbeddedTeacher(
        list(collection.queries),
        list(collection.corpus),
        dense_similarities(collection, model.document_length, precision),
        maxsim_scores(queries, documents).numpy(),
    )
