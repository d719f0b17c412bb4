"""Teachers: who scores the candidates of a training query.

The bundled teacher needs no download: the mean of dense cosine and unpooled late interaction of the
bundled encoder, each min-max normalised over the query's candidates. The paper's teacher is a
causal language model that is asked whether a passage answers a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from l2p_utils.collection import Collection, load_collection
from l2p_utils.files import UserError, locked
from l2p_utils.model import (
    PooledColBERT,
    autocast,
    build_bundled_model,
    bundled_encoder_path,
    encode,
    forward_precision,
    quiet_loading,
)
from l2p_utils.profile import Profile
from l2p_utils.search import maxsim_scores

EPSILON = 1e-8
#: What bge-reranker-v2-gemma was trained on, word for word from its model card.
PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the "
    "query by providing a prediction of either 'Yes' or 'No'."
)
#: What the libraries raise for a folder that holds no model, another one, or half of one.
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


# --- the bundled teacher --------------------------------------------------------------------------


@dataclass(frozen=True)
class BundledTeacher:
    """Scores of every training query with every document.

    Parameters
    ----------
    dense, late
        Cosine of the dense encoder and MaxSim of the late-interaction model: (queries, documents),
        by id.
    """

    dense: pd.DataFrame
    late: pd.DataFrame

    def scores(
        self, query_id: str, document_ids: Sequence[str], positives: Sequence[str]
    ) -> dict[str, float]:
        """Scores in [0, 1] of a query's candidates, positives among them.

        The positives are lifted to the best score of all: this teacher is too weak to doubt the
        judgments.
        """
        given = [matrix.loc[query_id][list(document_ids)] for matrix in (self.dense, self.late)]
        mixed = sum(_min_max(scores.to_numpy()) for scores in given) / 2
        scores = dict(zip(document_ids, mixed.tolist(), strict=True))
        return scores | dict.fromkeys(positives, max(scores.values()))


def _min_max(scores: np.ndarray) -> np.ndarray:
    scores = scores.astype(np.float64)
    return (scores - scores.min()) / (scores.max() - scores.min() + EPSILON)


def bundled_teacher(
    collection: Collection, model: PooledColBERT, precision: str = "auto", progress: bool = True
) -> BundledTeacher:
    """Score a training collection with the bundled encoder, dense and as `model`, unpooled."""
    queries = encode(model, list(collection.queries.values()), True, precision, progress=progress)
    documents = encode(model, list(collection.corpus.values()), False, precision, progress=progress)
    dense = dense_similarities(collection, model.document_length, precision, progress)
    late = maxsim_scores(queries, documents, progress=progress).numpy()
    ids = list(collection.queries), list(collection.corpus)
    return BundledTeacher(pd.DataFrame(dense, *ids), pd.DataFrame(late, *ids))


def dense_similarities(
    collection: Collection, max_length: int, precision: str = "auto", progress: bool = False
) -> np.ndarray:
    """Cosine of every query with every document by the bundled dense encoder.

    Texts are cut at `max_length` word pieces. Gives (queries, documents), float32.
    """
    with quiet_loading():
        encoder = SentenceTransformer(str(bundled_encoder_path()), device="cpu")
    encoder.max_seq_length = max_length
    with autocast(precision, torch.device("cpu")):
        vectors = [
            encoder.encode(list(texts), convert_to_tensor=True, show_progress_bar=progress).float()
            for texts in (collection.queries.values(), collection.corpus.values())
        ]
    queries, documents = (torch.nn.functional.normalize(found, dim=-1) for found in vectors)
    return (queries @ documents.T).numpy()


def untrained_model(profile: Profile) -> PooledColBERT:
    """The bundled model before its adaptation, made once per profile."""
    if profile.adaptation is None:
        raise UserError(
            "The bundled teacher is the bundled model before its adaptation, but model.base is "
            f"{profile.model.base!r}. Give scoring.miner and scoring.teacher from the hub, or take "
            "the released rows (training_data: released)."
        )
    corpus = load_collection(profile.model.projection_collection, split="train").corpus
    folder = profile.folder / "models" / "bundled"
    texts = [corpus[document] for document in sorted(corpus)[: profile.model.projection_texts]]
    lengths = profile.model.query_length, profile.model.document_length
    with locked(folder.with_suffix(".lock"), "makes the bundled model"):
        return build_bundled_model(folder, texts, *lengths, profile.seed)


# --- the paper's teacher --------------------------------------------------------------------------


class RerankerTeacher:
    """A causal language model's logit of "Yes" as the score of a passage for a query.

    Query and passage together are cut at `max_length` tokens; the prompt comes on top. A model
    whose tokenizer splits "Yes", or that has too few positions, is refused.

    Source: the model card of BAAI/bge-reranker-v2-gemma, "using Hugging Face transformers".
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        yes = self._tokens("Yes")
        if len(yes) != 1 or yes[0] == tokenizer.unk_token_id:
            raise UserError(
                f'The teacher {tokenizer.name_or_path} does not have "Yes" as one token: its '
                f"tokenizer makes {tokenizer.convert_ids_to_tokens(yes)} of it. Expected a "
                'reranker that answers "Yes" or "No", like BAAI/bge-reranker-v2-gemma '
                "(scoring.teacher)."
            )
        (self.yes,) = yes
        self.separator, self.prompt = self._tokens("\n"), self._tokens(PROMPT)
        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        longest = max_length + len(self.separator) + len(self.prompt)
        positions = getattr(model.config, "max_position_embeddings", None) or longest
        if longest > positions:
            raise UserError(
                f"scoring.max_length is {max_length}, {longest} with the prompt, but the teacher "
                f"{model.name_or_path} has {positions} positions. Expected at most "
                f"{max_length - longest + positions}."
            )

    def scores(self, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[float]:
        """Logits of "Yes" for (query, passage) pairs, in their order.

        Pairs of about the same length share a batch, the longest first: too little memory shows
        at once. A score does not depend on its batch, but for the rounding of the precision.
        """
        inputs = [self.tokens(query, passage) for query, passage in pairs]
        order = sorted(range(len(inputs)), key=lambda i: (-len(inputs[i]), i))
        scores = np.zeros(len(inputs))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            try:
                scores[batch] = self._logits([inputs[i] for i in batch])
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"Too little memory for {len(batch)} texts of {len(inputs[batch[0]])} tokens "
                    "at a time. Give a smaller scoring.batch_size and start again: scores that "
                    "were stored are kept."
                ) from error
        if not np.isfinite(scores).all():
            raise UserError(
                f"The teacher {self.model.name_or_path} gave a score that is not a number, in "
                f"{self.model.dtype}. Score in float32 (precision: float32), or take another one."
            )
        return scores.tolist()

    def tokens(self, query: str, passage: str) -> list[int]:
        """Token ids: <bos> A: query, B: passage, prompt, a line each; the passage is cut to fit."""
        asked = [*self.start, *self._tokens(f"A: {query}", self.max_length * 3 // 4)]
        passage_tokens = [*self.separator, *self._tokens(f"B: {passage}", self.max_length)]
        return [*(asked + passage_tokens)[: self.max_length], *self.separator, *self.prompt]

    def _tokens(self, text: str, max_length: int | None = None) -> list[int]:
        cut = {"truncation": True, "max_length": max_length} if max_length else {"verbose": False}
        return self.tokenizer(text, add_special_tokens=False, **cut)["input_ids"]

    @torch.inference_mode()
    def _logits(self, inputs: list[list[int]]) -> list[float]:
        # Padded on the left, as the card does: the last position is each text's last token.
        # Positions are counted from the first real token, so that padding changes nothing.
        width = max(map(len, inputs))
        ids = torch.tensor([[0] * (width - len(tokens)) + tokens for tokens in inputs])
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in inputs])
        device = self.model.device
        # logits_to_keep: (batch, width, 256 000) logits would be 17 GB for 32 passages
        logits = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
            logits_to_keep=1,
            use_cache=False,
        ).logits  # (batch, 1, vocabulary)
        return logits[:, -1, self.yes].float().tolist()


def load_reranker(
    folder: str | Path, max_length: int, device: torch.device, precision: str = "auto"
) -> RerankerTeacher:
    """Load a reranking causal language model from a folder.

    The precision ``auto`` is bfloat16 on a GPU that computes in it, else float32.
    """
    on_cpu = precision == "auto" and device.type == "cpu"
    dtype = torch.float32 if on_cpu else getattr(torch, forward_precision(precision, device))
    wanted = "Expected a whole causal language model, like BAAI/bge-reranker-v2-gemma"
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, found = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except LOADING_ERRORS as error:
        raise UserError(
            f"The teacher in {folder} could not be loaded: {error}. {wanted} (scoring.teacher)."
        ) from error
    if found["missing_keys"]:  # a BERT, say, would get a random head
        raise UserError(
            f"The teacher in {folder} lacks weights: {sorted(found['missing_keys'])[:3]}. {wanted} "
            "(scoring.teacher)."
        )
    return RerankerTeacher(model.to(device).eval(), tokenizer, max_length)
