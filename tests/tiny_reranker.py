"""A reranking language model of Gemma's shape, small enough to be made in a test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import GemmaConfig, GemmaForCausalLM, GemmaTokenizer

from l2p_utils.teacher import PROMPT

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
ALPHABET = [chr(i) for i in range(32, 127)] + ["\n", "▁"]
TEXTS = [PROMPT, "A: what is topic1", "B: About topic12. Sort the rows, and the columns."]


def tiny_tokenizer(yes: bool = True) -> GemmaTokenizer:
    """Gemma's kind of tokenizer on some hundred pieces; "Yes" is one of them, or not."""
    base = Tokenizer(models.BPE(unk_token="<unk>"))
    base.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=SPECIAL, initial_alphabet=ALPHABET, show_progress=False
    )
    # One word at a time: no piece then reaches over a space, as in Gemma's own vocabulary.
    words = [f" {word}" for text in TEXTS for word in text.replace("'Yes'", "").split()]
    base.train_from_iterator([*words * 3, *["Yes"] * 50 * yes], trainer)
    model = json.loads(base.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    return GemmaTokenizer(vocab=model["vocab"], merges=merges)


def tiny_reranker(folder: Path, yes: bool = True, seed: int = 0, positions: int = 4096) -> Path:
    """Save a two-layer Gemma with random weights and its tokenizer in `folder`."""
    tokenizer = tiny_tokenizer(yes)
    config = GemmaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, initializer_range=0.3,
        max_position_embeddings=positions, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GemmaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
