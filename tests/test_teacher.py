"""Teachers: that their scores are what they are said to be, alone and in batches."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tiny_reranker import tiny_reranker
from transformers import AutoModelForCausalLM, AutoTokenizer

from l2p_utils.collection import Collection
from l2p_utils.files import UserError
from l2p_utils.model import bundled_encoder_path
from l2p_utils.profile import PROFILES, Profile
from l2p_utils.search import maxsim_scores
from l2p_utils.teacher import (
    PROMPT,
    BundledTeacher,
    bundled_teacher,
    dense_similarities,
    load_reranker,
    untrained_model,
)

# --- the bundled teacher --------------------------------------------------------------------------


def teacher_of(dense, late):
    """A teacher for one query, "q", and documents a, b, c, …"""
    ids = ["q"], list("abcdefgh"[: len(dense)])
    return BundledTeacher(pd.DataFrame([dense], *ids), pd.DataFrame([late], *ids))


def test_scores_are_the_mean_of_both_normalised_over_the_candidates():
    teacher = teacher_of([0.0, 0.5, 1.0, 9.0], [10.0, 30.0, 20.0, -9.0])
    scores = teacher.scores("q", ["a", "b", "c"], [])  # d is no candidate
    assert scores == pytest.approx({"a": 0.0, "b": 0.75, "c": 0.75}, abs=1e-6)
    dense = pd.DataFrame([[0.0, 1.0, 0.25], [1.0, 0.0, 0.75]], ["q1", "q2"], ["a", "b", "c"])
    teacher = BundledTeacher(dense, dense)
    assert teacher.scores("q2", ["c", "b", "a"], []) == pytest.approx({"c": 0.75, "b": 0, "a": 1})


@pytest.mark.parametrize("positives", [["a", "b"], ["c"]])
def test_known_positives_are_lifted_to_the_best_score(positives):
    teacher = teacher_of([0.0, 0.5, 1.0], [0.0, 1.0, 2.0])
    expected = {"a": 0, "b": 0.5, "c": 1} | dict.fromkeys(positives, 1)
    assert teacher.scores("q", ["c", "b", "a"], positives) == pytest.approx(expected)
    constant = teacher_of([0.5, 0.5, 0.5], [7.0, 7.0, 7.0])  # nothing is divided by zero
    assert constant.scores("q", ["a", "b", "c"], positives) == {"a": 0.0, "b": 0.0, "c": 0.0}


VALUES = arrays.arrays(np.float32, (2, 8), elements=st.floats(-100, 100, width=32))


@given(VALUES, st.sets(st.sampled_from("abcdefgh"), max_size=3))
def test_scores_lie_in_0_to_1_and_no_candidate_beats_a_positive(values, positives):
    scores = teacher_of(*values).scores("q", list("abcdefgh"), sorted(positives))
    assert all(0 <= score <= 1 for score in scores.values())
    assert all(scores[positive] == max(scores.values()) for positive in positives)


@pytest.fixture(scope="module")
def collection(texts):
    corpus = {f"d{i}": text for i, text in enumerate(texts)}
    queries = {"q1": "how to sort rows", "q2": "solve linear equations"}
    return Collection("made-up", corpus, queries, {"q1": {"d2": 1}, "q2": {"d7": 1}}, "train")


def test_dense_similarities_are_the_encoders_own_cosines(collection):
    encoder = SentenceTransformer(str(bundled_encoder_path()), device="cpu")
    vectors = [encoder.encode(list(t.values())) for t in (collection.queries, collection.corpus)]
    found = dense_similarities(collection, 128, "float32")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, encoder.similarity(*vectors), atol=1e-5)
    fast = dense_similarities(collection, 128, "bfloat16")
    np.testing.assert_allclose(fast, found, atol=0.03)
    assert np.abs(dense_similarities(collection, 8, "float32") - found).max() > 0.01  # cut at 8


def test_the_bundled_teacher_scores_every_query_with_every_document(
    collection, bundled_model, capsys
):
    teacher = bundled_teacher(collection, bundled_model, "float32", progress=False)
    assert "%" not in capsys.readouterr().err
    for matrix in (teacher.dense, teacher.late):
        assert matrix.index.tolist() == ["q1", "q2"]
        assert matrix.columns.tolist() == list(collection.corpus)
    vectors = [
        [torch.tensor(v) for v in bundled_model.encode(list(texts.values()), is_query=is_query)]
        for texts, is_query in ((collection.queries, True), (collection.corpus, False))
    ]
    np.testing.assert_allclose(teacher.late, maxsim_scores(*vectors), atol=1e-4)
    assert teacher.late.idxmax(axis=1).tolist() == ["d2", "d7"]


def test_the_bundled_teacher_needs_the_bundled_base():
    content = yaml.safe_load((PROFILES / "smoke.yaml").read_text("utf-8"))
    content |= {"runs": [], "plaid": []}
    del content["adaptation"]
    content["model"]["base"] = "owner/model"
    profile = Profile.model_validate({"name": "tiny", **content})
    with pytest.raises(UserError, match="model.base is 'owner/model'. Give scoring.miner"):
        untrained_model(profile)


# --- the reranker ---------------------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reranker_folder(tmp_path_factory):
    return tiny_reranker(tmp_path_factory.mktemp("teachers") / "reranker")


@pytest.fixture(scope="module")
def reranker(reranker_folder):
    return load_reranker(reranker_folder, 96, CPU)


PAIRS = [
    ("what is topic1", "About topic1."),
    ("sort", "Sort the rows by one or more keys (stable), in ascending order."),
    ("solve linear equations", "x"),
    ("how to read a table", "Read a table from a file: comma-separated, with a header. " * 9),
    ("", ""),
]


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_score_is_the_logit_of_yes_after_the_cards_prompt(reranker, reranker_folder):
    tokenizer = AutoTokenizer.from_pretrained(reranker_folder)
    model = AutoModelForCausalLM.from_pretrained(reranker_folder, dtype=torch.float32).eval()
    query, passage = PAIRS[0]
    parts = [f"A: {query}", "\n", f"B: {passage}", "\n", PROMPT]
    ids = [tokenizer.bos_token_id, *(i for part in parts for i in plain(tokenizer, part))]
    assert len(ids) < 96 + len(plain(tokenizer, "\n" + PROMPT))  # nothing had to be cut
    assert tokenizer.convert_ids_to_tokens(plain(tokenizer, "Yes")) == ["Yes"]
    with torch.no_grad():  # one text, no padding, no mask
        logits = model(torch.tensor([ids])).logits[0, -1]
    expected = logits[plain(tokenizer, "Yes")[0]].item()
    assert reranker.scores(PAIRS[:1], 4) == [pytest.approx(expected, abs=1e-5)]


def test_scores_do_not_depend_on_batches_and_padding(reranker):
    alone = [reranker.scores([pair], 1)[0] for pair in PAIRS]
    assert len({round(score, 4) for score in alone}) == len(PAIRS)  # a mix-up would show
    for batch_size in (2, 3, 5, 32):
        assert reranker.scores(PAIRS, batch_size) == pytest.approx(alone, abs=1e-5)
    assert reranker.scores(PAIRS[::-1], 3)[::-1] == pytest.approx(alone, abs=1e-5)
    assert reranker.scores([], 3) == []


def test_long_texts_are_cut_as_the_card_cuts_them(reranker):
    """Query to three quarters, passage to what is left; the prompt on top, whole."""
    tokenizer, end = reranker.tokenizer, plain(reranker.tokenizer, "\n" + PROMPT)
    query, passage = "sort the rows " * 60, "columns and rows " * 60
    asked = [tokenizer.bos_token_id, *plain(tokenizer, f"A: {query}")[:72]]
    found = [*plain(tokenizer, "\n"), *plain(tokenizer, f"B: {passage}")]
    assert reranker.tokens(query, passage) == [*asked, *found[: 96 - 73], *end]
    short = [tokenizer.bos_token_id, *plain(tokenizer, "A: sort")]
    assert reranker.tokens("sort", passage) == [*short, *found[: 96 - len(short)], *end]


def test_a_teacher_without_yes_or_enough_positions_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'"Yes" as one token.*\[\'Y\', \'es?\'.*bge-reranker'):
        load_reranker(tiny_reranker(tmp_path / "no yes", yes=False), 96, CPU)
    short = tiny_reranker(tmp_path / "short", positions=100)
    with pytest.raises(UserError, match="max_length is 96, .* 100 positions. Expected at most"):
        load_reranker(short, 96, CPU)


def test_what_is_no_whole_causal_language_model_is_refused(tmp_path, reranker_folder):
    folder = tmp_path / "reranker"
    with pytest.raises(UserError, match="could not be loaded"):
        load_reranker(folder, 96, CPU)
    with pytest.raises(UserError, match=r"lacks weights.*scoring\.teacher"):
        load_reranker(bundled_encoder_path(), 96, CPU)
    shutil.copytree(reranker_folder, folder)
    weights = folder / "model.safetensors"
    kept = load_file(weights)
    lost = max(kept)
    save_file({k: v for k, v in kept.items() if k != lost}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks weights: .*{lost}"):
        load_reranker(folder, 96, CPU)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"could not be loaded.*scoring\.teacher"):
        load_reranker(folder, 96, CPU)


def test_no_number_and_too_little_memory_are_errors_that_name_the_remedy(reranker, monkeypatch):
    monkeypatch.setattr(reranker, "_logits", lambda inputs: [float("nan")] * len(inputs))
    with pytest.raises(UserError, match="not a number, in torch.float32"):
        reranker.scores(PAIRS, 2)

    def no_memory(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reranker, "_logits", no_memory)
    with pytest.raises(UserError, match=r"for 2 texts of \d+ tokens.*smaller scoring.batch_size"):
        reranker.scores(PAIRS, 2)


def test_on_a_cpu_the_precision_is_float32_unless_another_is_asked_for(reranker_folder):
    precisions = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    for precision, dtype in precisions.items():
        assert load_reranker(reranker_folder, 96, CPU, precision).model.dtype == dtype
