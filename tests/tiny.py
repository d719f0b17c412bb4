"""ColBERT models with random weights, small enough to train in a blink; float32, no dropout."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from pylate import models as pylate
from sentence_transformers import SentenceTransformer
from sentence_transformers import models as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
)

from l2p_utils.model import PooledColBERT, quiet_loading

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_colbert(folder: Path, texts: list[str], architecture: str = "bert") -> Path:
    """Save a ColBERT of two layers, whose words are those of `texts`; give back its folder."""
    encoder = _save_encoder(folder, texts, architecture)
    with quiet_loading():
        model = PooledColBERT(
            str(encoder),
            device="cpu",
            embedding_size=16,
            query_length=8,
            document_length=16,
            do_query_expansion=False,
        )
        model.save(str(folder), create_model_card=False)
    return folder


def tiny_edge_colbert(folder: Path, texts: list[str], seed: int = 0) -> Path:
    """Save a ColBERT as mxbai-edge-colbert-v0 is built: ModernBERT, two Dense layers, 64 out."""
    encoder = _save_encoder(folder, texts, "modernbert", seed)
    linear = {"bias": False, "activation_function": torch.nn.Identity()}
    with quiet_loading():
        layers = [st.Transformer(str(encoder))]
        layers += [pylate.Dense(32, 128, **linear), pylate.Dense(128, 64, **linear)]
        model = PooledColBERT(
            modules=layers,
            device="cpu",
            query_prefix="[Q] ",
            document_prefix="[D] ",
            query_length=48,
            document_length=300,
            do_query_expansion=False,
        )
        model.save(str(folder), create_model_card=False)
    return folder


def tiny_miner(folder: Path, texts: list[str]) -> Path:
    """Save a dense encoder as bge-small-en-v1.5 is built: BERT, first token, unit length."""
    encoder = _save_encoder(folder, texts, "bert")
    layers = [st.Transformer(str(encoder)), st.Pooling(32, "cls"), st.Normalize()]
    SentenceTransformer(modules=layers, device="cpu").save(str(folder), create_model_card=False)
    return folder


def _save_encoder(folder: Path, texts: list[str], architecture: str, seed: int = 0) -> Path:
    encoder = folder.with_name(f"{folder.name}-encoder")
    tokenizer = _tokenizer(texts)
    tokenizer.save_pretrained(encoder)
    torch.manual_seed(seed)
    _encoder(architecture, len(tokenizer)).save_pretrained(encoder)
    return encoder


def _encoder(architecture: str, words: int) -> torch.nn.Module:
    sizes = {**SIZES, "intermediate_size": 64, "vocab_size": words, "max_position_embeddings": 64}
    if architecture == "bert":
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertModel(BertConfig(**sizes, **off))
    special = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}
    special |= {"bos_token_id": 2, "eos_token_id": 3}
    return ModernBertModel(ModernBertConfig(**sizes, **special))


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    words = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(texts).lower())))
    vocabulary = {word: number for number, word in enumerate([*SPECIAL.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    names = {f"{name}_token": token for name, token in SPECIAL.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
