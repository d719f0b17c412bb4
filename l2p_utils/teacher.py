"""Teachers: who scores a query's candidates.

The bundled teacher needs no download: it is the mean of dense cosine and unpooled late
interaction, each min-max normalised over a query's candidates, of the encoder before its warm-up.
The paper's teacher is a causal language model that is asked whether a passage answers a query.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from l2p_utils.collection import Collection, load_collection
from l2p_utils.files import UserError
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
BATCH = 32  # texts at a time, dense
#: What bge-reranker-v2-gemma was trained on, word for word from its model card.
PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the "
    "query by providing a prediction of either 'Yes' or 'No'."
)
CHARACTERS_PER_TOKEN = 8  # of a first look at a long text; English has about 4
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class BundledTeacher:
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

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {query: row for row, query in enumerate(self.query_ids)}

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {document: column for column, document in enumerate(self.document_ids)}

    def scores(
        self, query_id: str, document_ids: Sequence[str], positives: Sequence[str]
    ) -> dict[str, float]:
        """Teacher scores in [0, 1] of a query's candidates, positives among them.

        The known positives are lifted to the best score of all: the teacher is too weak to doubt
        the judgments.
        """
        row = self._rows[query_id]
        columns = [self._columns[document] for document in document_ids]
        mixed = (_min_max(self.dense[row, columns]) + _min_max(self.late[row, columns])) / 2
        found = dict(zip(document_ids, mixed.tolist(), strict=True))
        best = max(found.values())
        return found | {document: best for document in positives}


def _min_max(scores: np.ndarray) -> np.ndarray:
    scores = scores.astype(np.float64)
    return (scores - scores.min()) / (scores.max() - scores.min() + EPSILON)


def dense_similarities(
    collection: Collection, max_length: int, precision: str = "auto", progress: bool = False
) -> np.ndarray:
    """Cosine of every query with every document by the bundled dense encoder.

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
        encoder = SentenceTransformer(str(bundled_encoder_path()), device="cpu")
    encoder.max_seq_length = max_length
    queries, documents = (
        _dense_vectors(encoder, list(texts.values()), what, precision, progress)
        for what, texts in (("queries", collection.queries), ("documents", collection.corpus))
    )
    return (queries @ documents.T).numpy()


def _dense_vectors(
    encoder: SentenceTransformer, texts: list[str], what: str, precision: str, progress: bool
) -> torch.Tensor:
    """Unit vectors, (texts, dim) float32; the encoder's own bar would not say of what."""
    batches = math.ceil(len(texts) / BATCH)
    with tqdm(total=batches, desc=f"Dense encoding {what}", disable=not progress) as bar:

        def advance(*_: Any) -> None:
            bar.update()

        hook = encoder[0].register_forward_hook(advance)
        with autocast(precision, torch.device("cpu")):
            found = encoder.encode(
                texts, batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False
            )
        hook.remove()
    return torch.nn.functional.normalize(found.float(), dim=-1)


def bundled_teacher(
    collection: Collection,
    model: PooledColBERT,
    precision: str = "auto",
    progress: bool = True,
) -> BundledTeacher:
    """Score a training collection with the bundled encoder, dense and as `model`, unpooled."""
    queries = encode(model, list(collection.queries.values()), True, precision, progress=progress)
    documents = encode(model, list(collection.corpus.values()), False, precision, progress=progress)
    return BundledTeacher(
        list(collection.queries),
        list(collection.corpus),
        dense_similarities(collection, model.document_length, precision, progress),
        maxsim_scores(queries, documents, progress=progress).numpy(),
    )


# --- the paper's teacher --------------------------------------------------------------------------


class RerankerTeacher:
    """A causal language model's logit of "Yes" as the score of a passage for a query.

    Parameters
    ----------
    model, tokenizer
        As `load_reranker` gives them.
    max_length
        Tokens of query and passage together; the prompt comes on top.

    Raises
    ------
    UserError
        When "Yes" is not one token, or a text would not fit into the model's positions.

    Notes
    -----
    Source: the model card of BAAI/bge-reranker-v2-gemma, "using Hugging Face transformers". The
    card's other way, FlagEmbedding, resolves with these versions (1.4.2 does) but is not used: it
    brings packages (peft among them) that nothing else here needs, for one logit, and gives the
    prompt's length to the passage as well, so that long passages are cut later there.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.yes = _yes_token(tokenizer)
        self.separator, self.prompt = self._tokens("\n"), self._tokens(PROMPT)
        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.words_apart = _words_apart(tokenizer)
        longest = max_length + len(self.separator) + len(self.prompt)
        room = getattr(model.config, "max_position_embeddings", None)
        if room is not None and longest > room:
            raise UserError(
                f"scoring.max_length is {max_length}, {longest} with the prompt, but the teacher "
                f"{model.name_or_path} has {room} positions. Expected at most "
                f"{max_length - longest + room}."
            )

    def scores(self, pairs: Sequence[tuple[str, str]], batch_size: int) -> list[float]:
        """Logits of "Yes" for (query, passage) pairs, in their order.

        Pairs of about the same length share a batch, the longest first: memory that does not
        suffice shows at once. A score does not depend on what it shares its batch with, but for
        the rounding of the model's precision.
        """
        inputs = [self.tokens(query, passage) for query, passage in pairs]
        order = sorted(range(len(inputs)), key=lambda i: (-len(inputs[i]), i))
        found = [0.0] * len(inputs)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            try:
                logits = self._logits([inputs[i] for i in batch])
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"Memory does not suffice for {len(batch)} texts of {len(inputs[batch[0]])} "
                    "tokens at a time. Give a smaller scoring.batch_size and start again: what was "
                    "scored is kept."
                ) from error
            for i, logit in zip(batch, logits, strict=True):
                found[i] = logit
        if not np.isfinite(found).all():
            raise UserError(
                f"The teacher {self.model.name_or_path} gave a score that is no number, in "
                f"{self.model.dtype}. Score in float32 (precision: float32), or take another one."
            )
        return found

    def tokens(self, query: str, passage: str) -> list[int]:
        """Token ids: <bos> A: query, B: passage, prompt, a line each; the passage is cut to fit."""
        asked = [*self.start, *self._first_tokens(f"A: {query}", self.max_length * 3 // 4)]
        found = [*self.separator, *self._first_tokens(f"B: {passage}", self.max_length)]
        return [*(asked + found)[: self.max_length], *self.separator, *self.prompt]

    def _first_tokens(self, text: str, count: int) -> list[int]:
        """The first `count` tokens of a text, of which only as much is read as that takes.

        Where no token reaches over the space after a word, what follows that space changes nothing
        before it: the text's beginning up to there has the tokens that the whole text begins with.
        """
        size = CHARACTERS_PER_TOKEN * count
        while self.words_apart and size < len(text):
            if end := _last_word_end(text, size):
                tokens = self._tokens(text[:end])
                if len(tokens) >= count:
                    return tokens[:count]
            size *= 2
        return self._tokens(text)[:count]

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @torch.inference_mode()
    def _logits(self, inputs: list[list[int]]) -> list[float]:
        # Padded on the left, as the card does, so that the last position is everybody's last token.
        # Positions are counted from the first real token: padding changes nothing then.
        width = max(map(len, inputs))
        ids = torch.zeros(len(inputs), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(inputs):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        device = self.model.device
        # logits_to_keep: (batch, width, 256 000) logits would be 17 GB for 32 passages
        logits = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            logits_to_keep=1,
            use_cache=False,
        ).logits  # (batch, 1, vocabulary)
        return logits[:, -1, self.yes].float().tolist()


def _yes_token(tokenizer: PreTrainedTokenizerBase) -> int:
    found = tokenizer("Yes", add_special_tokens=False)["input_ids"]
    if len(found) != 1 or found[0] == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(found)
        raise UserError(
            f'The teacher {tokenizer.name_or_path} does not have "Yes" as one token: its tokenizer '
            f'makes {pieces} of it. Expected a reranker that answers "Yes" or "No", like '
            "BAAI/bge-reranker-v2-gemma (scoring.teacher)."
        )
    return found[0]


def _words_apart(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether no token holds a letter or digit and, right after it, a space (however written)."""
    over = re.compile(r"[^\W_][ \u2581\u0120]")
    return not any(over.search(token) for token in tokenizer.get_vocab())


def _last_word_end(text: str, size: int) -> int:
    """The last place, up to `size`, where a letter or digit is followed by a space; 0: none."""
    ends = (i for i in range(size, 0, -1) if text[i] == " " and text[i - 1].isalnum())
    return next(ends, 0)


def scoring_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Bfloat16 on a GPU that has it, unless the profile's precision says float32; else float32."""
    if precision == "auto" and device.type == "cuda":
        precision = forward_precision(precision, device)
        if precision == "float32":
            tqdm.write(
                "This GPU only emulates bfloat16: the teacher scores in float32, in twice the "
                "memory and several times the time.",
                file=sys.stderr,
            )
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def load_reranker(
    folder: str | Path, max_length: int, device: torch.device, dtype: torch.dtype
) -> RerankerTeacher:
    """Load a reranking causal language model from a folder.

    Raises
    ------
    UserError
        When it is no causal language model, is damaged or incomplete, or lacks "Yes".
    """
    try:
        with quiet_loading():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            _check_causal(folder, config)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, found = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except UserError:
        raise
    except LOADING_ERRORS as error:
        raise UserError(
            f"The teacher in {folder} could not be loaded: {error}. Expected a whole causal "
            "language model with its tokenizer, like BAAI/bge-reranker-v2-gemma (scoring.teacher)."
        ) from error
    if found["missing_keys"]:
        raise UserError(
            f"The teacher in {folder} lacks weights: {sorted(found['missing_keys'])[:3]}. Expected "
            "a whole causal language model; delete the folder and fetch it again."
        )
    return RerankerTeacher(model.to(device).eval(), tokenizer, max_length)


def _check_causal(folder: str | Path, config: object) -> None:
    architectures = list(getattr(config, "architectures", None) or [])
    if not set(architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise UserError(
            f"The teacher in {folder} is no causal language model: its config.json names "
            f'{architectures or "no architecture"}. Expected a reranker that answers "Yes" or '
            '"No", like BAAI/bge-reranker-v2-gemma (scoring.teacher).'
        )


def untrained_model(profile: Profile) -> PooledColBERT:
    """The bundled model before its warm-up, made once per profile.

    Raises
    ------
    UserError
        When the profile's base is not the bundled model.
    """
    if profile.adaptation is None:
        raise UserError(
            f"The bundled teacher is the bundled model before its warm-up, but model.base is "
            f"{profile.model.base!r}. Give scoring.miner and scoring.teacher from the hub, or take "
            "the released rows (training_data: released)."
        )
    adaptation = load_collection(profile.adaptation.collection, split="train")
    texts = [
        adaptation.corpus[d] for d in sorted(adaptation.corpus)[: profile.model.projection_texts]
    ]
    return build_bundled_model(
        profile.folder / "models" / "bundled",
        texts,
        profile.model.query_length,
        profile.model.document_length,
        profile.seed,
    )
