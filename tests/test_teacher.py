"""The embedded teacher: how it mixes two scores, and that they are what they are said to be."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sentence_transformers import SentenceTransformer

from l2p_utils.collection import Collection
from l2p_utils.model import embedded_encoder_path
from l2p_utils.search import maxsim_scores
from l2p_utils.teacher import EmbeddedTeacher, dense_similarities, embedded_teacher


def teacher_of(dense, late):
    """A teacher for one query, "q", and documents a, b, c, …"""
    documents = list("abcdefgh"[: len(dense)])
    return EmbeddedTeacher(["q"], documents, np.array([dense]), np.array([late]))


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
    teacher = EmbeddedTeacher(["q1", "q2"], ["a", "b", "c"], dense, dense)
    assert teacher.scores("q2", ["c", "b", "a"], []) == pytest.approx({"c": 0.75, "b": 0, "a": 1})


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
    encoder = SentenceTransformer(str(embedded_encoder_path()), device="cpu")
    vectors = [encoder.encode(list(t.values())) for t in (collection.queries, collection.corpus)]
    found = dense_similarities(collection, 128, "float32")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, encoder.similarity(*vectors), atol=1e-5)
    fast = dense_similarities(collection, 128, "bfloat16")
    np.testing.assert_allclose(fast, found, atol=0.03)


def test_documents_are_cut_at_the_given_length(collection):
    whole, cut = (dense_similarities(collection, length, "float32") for length in (128, 8))
    assert np.abs(whole - cut).max() > 0.01


def test_the_embedded_teacher_scores_every_query_with_every_document(collection, embedded_model):
    teacher = embedded_teacher(collection, embedded_model, "float32")
    assert teacher.query_ids == ["q1", "q2"]
    assert teacher.document_ids == list(collection.corpus)
    assert teacher.dense.shape == teacher.late.shape == (2, 8)
    vectors = [
        [torch.tensor(v) for v in embedded_model.encode(list(texts.values()), is_query=is_query)]
        for texts, is_query in ((collection.queries, True), (collection.corpus, False))
    ]
    np.testing.assert_allclose(teacher.late, maxsim_scores(*vectors), atol=1e-4)
    best = [teacher.document_ids[i] for i in teacher.late.argmax(axis=1)]
    assert best == ["d2", "d7"]
