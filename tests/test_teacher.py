"""Teachers: that their scores are what they are said to be, alone and in batches."""

import re
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tiny_reranker import tiny_reranker
from transformers import AutoModelForCausalLM, AutoTokenizer

from l2p_utils import teacher as teacher_module
from l2p_utils.collection import Collection
from l2p_utils.files import UserError
from l2p_utils.model import bundled_encoder_path, forward_precision
from l2p_utils.search import maxsim_scores
from l2p_utils.teacher import (
    PROMPT,
    BundledTeacher,
    _words_apart,
    bundled_teacher,
    dense_similarities,
    load_reranker,
    scoring_dtype,
)


def teacher_of(dense, late):
    """A teacher for one query, "q", and documents a, b, c, …"""
    documents = list("abcdefgh"[: len(dense)])
    return BundledTeacher(["q"], documents, np.array([dense]), np.array([late]))


def test_scores_are_the_mean_of_both_normalised_over_the_candidates():
    teacher = teacher_of([0.0, 0.5, 1.0, 9.0], [10.0, 30.0, 20.0, -9.0])
    scores = teacher.scores("q", ["a", "b", "c"], [])  # d is no candidate
    assert scores == pytest.approx({"a": 0.0, "b": 0.75, "c": 0.75}, abs=1e-6)


def test_known_positives_are_lifted_to_the_best_score():
    teacher = teacher_of([0.0, 0.5, 1.0], [0.0, 1.0, 2.0])
    scores = teacher.scores("q", ["a", "b", "c"], ["a", "b"])
    assert scores["a"] == scores["b"] == scores["c"] == pytest.approx(1.0)
    assert teacher.scores("q", ["c", "b", "a"], ["c"]) == pytest.approx({"a": 0, "b": 0.5, "c": 1})


def test_scores_are_looked_up_by_id():
    dense = np.array([[0.0, 1.0, 0.25], [1.0, 0.0, 0.75]])
    teacher = BundledTeacher(["q1", "q2"], ["a", "b", "c"], dense, dense)
    assert teacher.scores("q2", ["c", "b", "a"], []) == pytest.approx({"c": 0.75, "b": 0, "a": 1})


def test_ids_are_gone_through_once_for_all_queries():
    gone_through = []

    class Ids(list):
        def __iter__(self):
            gone_through.append(self[0])
            return super().__iter__()

        def index(self, *_):
            raise AssertionError("searched from the start")

    scores = np.array([[0.0, 1.0], [1.0, 0.0]])
    teacher = BundledTeacher(Ids(["q1", "q2"]), Ids(["a", "b"]), scores, scores)
    for query in ("q1", "q2", "q1"):
        teacher.scores(query, ["a", "b"], [])
    assert sorted(gone_through) == ["a", "q1"]


def test_constant_scores_do_not_divide_by_zero():
    scores = teacher_of([0.5, 0.5, 0.5], [7.0, 7.0, 7.0]).scores("q", ["a", "b", "c"], ["b"])
    assert scores == {"a": 0.0, "b": 0.0, "c": 0.0}
    assert teacher_of([0.5], [7.0]).scores("q", ["a"], ["a"]) == {"a": 0.0}


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


def test_documents_are_cut_at_the_given_length(collection):
    whole, cut = (dense_similarities(collection, length, "float32") for length in (128, 8))
    assert np.abs(whole - cut).max() > 0.01


def test_the_bundled_teacher_scores_every_query_with_every_document(collection, bundled_model):
    teacher = bundled_teacher(collection, bundled_model, "float32")
    assert teacher.query_ids == ["q1", "q2"]
    assert teacher.document_ids == list(collection.corpus)
    assert teacher.dense.shape == teacher.late.shape == (2, 8)
    vectors = [
        [torch.tensor(v) for v in bundled_model.encode(list(texts.values()), is_query=is_query)]
        for texts, is_query in ((collection.queries, True), (collection.corpus, False))
    ]
    np.testing.assert_allclose(teacher.late, maxsim_scores(*vectors), atol=1e-4)
    best = [teacher.document_ids[i] for i in teacher.late.argmax(axis=1)]
    assert best == ["d2", "d7"]


def test_bars_say_what_is_worked_on_and_change_no_number(collection, bundled_model, capsys):
    quiet = bundled_teacher(collection, bundled_model, "float32", progress=False)
    assert "%" not in capsys.readouterr().err
    shown = bundled_teacher(collection, bundled_model, "float32")
    told = capsys.readouterr().err
    encoding = [
        f"{how} {what}"
        for how in ("Encoding", "Dense encoding")
        for what in ("queries", "documents")
    ]
    for work in (*encoding, "Late interaction"):
        assert re.search(rf"\b{work}.*100%", told), work
    assert np.array_equal(shown.dense, quiet.dense)
    assert np.array_equal(shown.late, quiet.late)


# --- the reranker ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reranker_folder(tmp_path_factory):
    return tiny_reranker(tmp_path_factory.mktemp("teachers") / "reranker")


def load(folder, max_length=96):
    return load_reranker(folder, max_length, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def reranker(reranker_folder):
    return load(reranker_folder)


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
    assert PROMPT == (
        "Given a query A and a passage B, determine whether the passage contains an answer to the "
        "query by providing a prediction of either 'Yes' or 'No'."
    )


@pytest.mark.parametrize("batch_size", [2, 3, 5, 32])
def test_scores_do_not_depend_on_batches_and_padding(reranker, batch_size):
    alone = [reranker.scores([pair], 1)[0] for pair in PAIRS]
    assert len({round(score, 4) for score in alone}) == len(PAIRS)  # a mix-up would show
    assert reranker.scores(PAIRS, batch_size) == pytest.approx(alone, abs=1e-5)
    assert reranker.scores(PAIRS[::-1], batch_size)[::-1] == pytest.approx(alone, abs=1e-5)
    assert reranker.scores([], batch_size) == []


def test_long_texts_are_cut_as_the_card_cuts_them(reranker):
    """Query to three quarters, passage to what is left; the prompt on top, whole."""
    tokenizer, end = reranker.tokenizer, plain(reranker.tokenizer, "\n" + PROMPT)
    query, passage = "sort the rows " * 60, "columns and rows " * 60
    asked = [tokenizer.bos_token_id, *plain(tokenizer, f"A: {query}")[:72]]
    found = [*plain(tokenizer, "\n"), *plain(tokenizer, f"B: {passage}")]
    assert reranker.tokens(query, passage) == [*asked, *found[: 96 - 73], *end]
    short = [tokenizer.bos_token_id, *plain(tokenizer, "A: sort")]
    assert reranker.tokens("sort", passage) == [*short, *found[: 96 - len(short)], *end]


def count_characters(reranker, monkeypatch):
    seen = []
    tokens = reranker._tokens
    monkeypatch.setattr(reranker, "_tokens", lambda text: seen.append(len(text)) or tokens(text))
    return seen


def test_of_a_document_of_100_000_characters_only_the_beginning_is_read(reranker, monkeypatch):
    words = ["sort", "topic12.", "the", "Yes", "naïve", "rows,", "\n", " ", "1.5"]
    rng = np.random.default_rng(0)
    document = " ".join(words[i] for i in rng.integers(len(words), size=30_000))[:100_000]
    whole = plain(reranker.tokenizer, f"B: {document}")
    seen = count_characters(reranker, monkeypatch)
    assert reranker._first_tokens(f"B: {document}", 96) == whole[:96]
    assert sum(seen) < 2_000
    unbroken = "sort" * 25_000  # no word's end to cut at: all of it is read
    assert reranker._first_tokens(unbroken, 96) == plain(reranker.tokenizer, unbroken)[:96]


PIECES = st.sampled_from(
    ["Y", "Yes", "e", "s", " ", "  ", "\n", "topic1", "é", "漢", ".", "1", "_"]
)


@given(st.lists(PIECES, max_size=400), st.integers(1, 40))
def test_the_first_tokens_are_those_of_the_whole_text(reranker, pieces, count):
    text = "".join(pieces)
    whole = plain(reranker.tokenizer, text)[:count]
    for characters in (1, 2, 8):  # with 1, the first look is too short and ends within tokens
        with mock.patch.object(teacher_module, "CHARACTERS_PER_TOKEN", characters):
            assert reranker._first_tokens(text, count) == whole


def test_where_tokens_reach_over_spaces_texts_are_read_whole(reranker):
    tokenizer = SimpleNamespace(get_vocab=lambda: {"▁of▁the": 0, "sort": 1})
    assert not _words_apart(tokenizer)
    assert _words_apart(SimpleNamespace(get_vocab=lambda: {"▁of": 0, "▁▁▁": 1, ".▁": 2}))
    assert _words_apart(reranker.tokenizer) and reranker.words_apart


def test_a_teacher_without_yes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'"Yes" as one token.*\[\'Y\', \'es?\'.*bge-reranker'):
        load(tiny_reranker(tmp_path / "reranker", yes=False))


def test_a_teacher_that_is_no_causal_language_model_is_refused():
    with pytest.raises(UserError, match="no causal language model: .*BertModel.*scoring.teacher"):
        load(bundled_encoder_path())


def test_a_teacher_that_is_not_whole_is_refused(tmp_path, reranker_folder):
    with pytest.raises(UserError, match="could not be loaded"):
        load(tmp_path / "nowhere")
    folder = tmp_path / "reranker"
    shutil.copytree(reranker_folder, folder)
    weights = folder / "model.safetensors"
    kept = load_file(weights)
    lost = sorted(kept)[-1]
    save_file({k: v for k, v in kept.items() if k != lost}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks weights: .*{lost}"):
        load(folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"could not be loaded.*scoring\.teacher"):
        load(folder)
    weights.unlink()
    with pytest.raises(UserError, match="could not be loaded"):
        load(folder)


def test_texts_that_would_not_fit_into_the_models_positions_are_refused(tmp_path):
    folder = tiny_reranker(tmp_path / "reranker", positions=100)
    with pytest.raises(UserError, match="max_length is 96, .* 100 positions. Expected at most"):
        load(folder)


def test_a_score_that_is_no_number_is_refused(reranker, monkeypatch):
    monkeypatch.setattr(reranker, "_logits", lambda inputs: [float("nan")] * len(inputs))
    with pytest.raises(UserError, match="no number, in torch.float32"):
        reranker.scores(PAIRS, 2)


def test_memory_that_does_not_suffice_is_told_with_the_remedy(reranker, monkeypatch):
    def no_memory(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reranker, "_logits", no_memory)
    with pytest.raises(UserError, match=r"for 2 texts of \d+ tokens.*smaller scoring.batch_size"):
        reranker.scores(PAIRS, 2)


@pytest.mark.parametrize("emulated", [False, True])
def test_the_precision_is_bfloat16_on_a_gpu_that_has_it_and_float32_elsewhere(
    monkeypatch, capsys, emulated
):
    """As torch answers on an A100, and on a T4 or V100, where bfloat16 is slower than float32."""

    def supported(including_emulation=True):
        return including_emulation or not emulated

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert scoring_dtype("auto", cpu) == scoring_dtype("float32", gpu) == torch.float32
    assert scoring_dtype("bfloat16", cpu) == scoring_dtype("bfloat16", gpu) == torch.bfloat16
    assert capsys.readouterr().err == ""
    assert scoring_dtype("auto", gpu) == (torch.float32 if emulated else torch.bfloat16)
    assert ("teacher scores in float32" in capsys.readouterr().err) == emulated
    assert forward_precision("auto", gpu) == ("float32" if emulated else "bfloat16")
    assert forward_precision("float16", gpu) == "float16"
