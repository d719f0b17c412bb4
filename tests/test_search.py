"""MaxSim search, judged by hand, by float64 arithmetic and by PyLate's own scoring."""

import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from pylate import rank
from torch.nn.utils.rnn import pad_sequence

from l2p_utils.files import UserError
from l2p_utils.search import exact_search, maxsim_scores, plaid_search


def unit_vectors(rows, dim=16, seed=0):
    vectors = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=-1)


def ragged(count, longest, dim=16, seed=0, shortest=1):
    """`count` texts of random lengths, (vectors, dim) each."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, count)
    return [unit_vectors(int(n), dim, seed * 1000 + i) for i, n in enumerate(lengths)]


def ids(documents):
    return [f"d{i:03d}" for i in range(len(documents))]


def slow_maxsim(query, document):
    """Σ_i max_j q_i · d_j in float64."""
    return float((query.double() @ document.double().T).amax(dim=1).sum())


def test_maxsim_adds_up_each_query_tokens_best_match():
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    near = torch.tensor([[0.5, 0.1], [0.2, 0.75], [0.25, 0.25]])  # .5 + .75
    far = torch.tensor([[0.125, 0.25]])  # .125 + .25
    scores = maxsim_scores([query, query[:1], query[:0]], [near, far, near[:0], -near[:1]])
    assert scores[:, :2].tolist() == [[1.25, 0.375], [0.5, 0.125], [0, 0]]
    assert scores[:, 2].isneginf().all()  # no vectors: below everything
    torch.testing.assert_close(scores[:, 3], torch.tensor([-0.6, -0.5, 0]))
    assert maxsim_scores([query[:0]], [near, far]).tolist() == [[0, 0]]


@pytest.mark.parametrize("block_bytes", [1, 2000, 20_000, 2**30])
def test_blocks_of_any_size_give_the_scores_of_the_definition(block_bytes):
    queries, documents = ragged(5, 7, seed=1), ragged(30, 20, seed=2)
    expected = [[slow_maxsim(q, d) for d in documents] for q in queries]
    np.testing.assert_allclose(maxsim_scores(queries, documents, block_bytes), expected, atol=1e-5)
    found = exact_search(queries, documents, ids(documents), top_k=5, block_bytes=block_bytes)
    np.testing.assert_allclose(found.scores, -np.sort(-np.array(expected))[:, :5], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vectors_are_multiplied_and_summed_in_float32(dtype):
    queries = [unit_vectors(64, seed=i).to(dtype) for i in range(3)]
    documents = [unit_vectors(30, seed=100 + i).to(dtype) for i in range(5)]
    scores = maxsim_scores(queries, documents)
    assert scores.dtype == torch.float32
    expected = [[slow_maxsim(q, d) for d in documents] for q in queries]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


SEARCHES = [exact_search, plaid_search]


@pytest.mark.parametrize("form", ["parameters", "padded array"])
def test_every_form_of_token_vectors_is_scored_and_found_alike(form):
    queries, documents = ragged(3, 5, seed=1), [-d.abs() for d in ragged(20, 9, seed=2)]
    forms = {
        "parameters": lambda texts: [torch.nn.Parameter(text) for text in texts],
        "padded array": lambda texts: pad_sequence(texts, batch_first=True).numpy(),
    }
    found = exact_search(forms[form](queries), forms[form](documents), ids(documents))
    expected = exact_search(queries, documents, ids(documents))
    assert (found.documents, found.scores) == (expected.documents, expected.scores)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document_ids": ["a", "b"]}, "holds 2 ids, .* 3 documents; expected one id"),
        ({"document_ids": ["a", "b", "b"]}, "holds 3 ids, 2 of them different"),
        ({"queries": [unit_vectors(2, 8)]}, "queries' dimensions are .8., the documents' .16."),
        ({"queries": unit_vectors(2)}, "Query 0 is .16,.*single text into a list"),
        ({"top_k": 0}, "top_k is 0; expected a whole number of at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(search, change, message):
    given = {"queries": [unit_vectors(2)], "documents": ragged(3, 4), "document_ids": list("abc")}
    with pytest.raises(UserError, match=message):
        search(**given | change)


def test_ranks_as_pylates_rerank_does():
    # in the first orthant: PyLate counts padding as a similarity of 0
    queries = [query.abs() for query in ragged(6, 8, seed=1)]
    documents = [document.abs() for document in ragged(40, 20, seed=2)]
    found = exact_search(queries, documents, ids(documents), top_k=40)
    reranked = rank.rerank([ids(documents)] * 6, queries, [documents] * 6)
    assert found.documents == [[hit["id"] for hit in hits] for hits in reranked]
    expected = [[hit["score"] for hit in hits] for hits in reranked]
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)


def test_padding_counts_as_0_for_pylate_and_never_here():
    query = torch.tensor([[1.0, 0.0]])
    short, long = torch.tensor([[-0.5, 0.0]]), torch.tensor([[-0.25, 0.0], [-0.75, 0.0]])
    (reranked,) = rank.rerank([["short", "long"]], [query], [[short, long]])
    assert [(hit["id"], hit["score"]) for hit in reranked] == [("short", 0.0), ("long", -0.25)]
    found = exact_search([query], [short, long], ["short", "long"])
    assert found.documents == [["long", "short"]]
    assert found.scores == [[-0.25, -0.5]]


@pytest.mark.parametrize("top_k", [1, 7, 99])
def test_finds_the_best_top_k_in_descending_order(top_k):
    queries, documents = ragged(4, 5, seed=3), ragged(50, 9, seed=4)
    found = exact_search(queries, documents, ids(documents), top_k)
    scores = maxsim_scores(queries, documents).numpy()
    best = np.argsort(-scores)[:, :top_k]
    assert found.documents == np.array(ids(documents))[best].tolist()
    assert found.scores == np.take_along_axis(scores, best, axis=1).tolist()


def test_equal_scores_are_ordered_by_id_descending():
    document = torch.tensor([[1.0, 0.0]])
    found = exact_search([document], [document, 2 * document, document], ["9", "a", "10"])
    assert found.documents == [["a", "9", "10"]]


def test_ties_across_blocks_are_ordered_too():
    query = unit_vectors(3)
    documents = [query * (1 + i % 4) for i in range(200)]  # 50 documents of each score
    names = [f"{i:03d}" for i in np.random.default_rng(0).permutation(200)]
    (found,) = exact_search([query], documents, names, top_k=60, block_bytes=2_000).documents
    groups = [sorted((n for i, n in enumerate(names) if i % 4 == k), reverse=True) for k in (3, 2)]
    assert found == sum(groups, [])[:60]


def test_documents_without_vectors_are_never_found_and_queries_without_find_the_first_by_id():
    query, none = unit_vectors(2), torch.empty(0, 16)
    found = exact_search([query, none], [none, query, query, query], list("abcd"), top_k=2)
    assert found.documents == [["d", "c"], ["d", "c"]]
    assert found.scores[1] == [0, 0]


@pytest.mark.parametrize("search", SEARCHES)
def test_an_empty_corpus_or_no_query_finds_nothing(search):
    query = unit_vectors(2)
    assert search([query] * 2, [], []).documents == [[], []]
    assert search([query] * 2, [query[:0]], ["a"]).documents == [[], []]
    assert search([], ragged(9, 4), ids(range(9))).documents == []


@pytest.fixture(scope="module")
def corpus():
    """200 documents, among them one without vectors (d150) and twins (d010, d020)."""
    documents = ragged(200, 12, seed=7, shortest=4)
    documents[20] = documents[10]
    documents[150] = documents[150][:0]
    return documents


@pytest.fixture(scope="module")
def queries(corpus):
    """20 queries, each near three vectors of one document, and the last one near the twins."""
    near = [*range(30, 49), 10]
    noise = [0.2 * unit_vectors(3, seed=500 + i) for i in near]
    clean = [corpus[i][:3] + noise for i, noise in zip(near, noise, strict=True)]
    return [torch.nn.functional.normalize(query, dim=-1) for query in clean]


@pytest.fixture(scope="module")
def found(corpus, queries):
    arrays = [document.numpy() for document in corpus]  # PLAID takes these too
    return plaid_search([query[None] for query in queries], arrays, ids(corpus), top_k=10)


def test_plaid_agrees_with_exact_search_and_orders_by_score_and_id(corpus, queries, found):
    exact = exact_search(queries, corpus, ids(corpus), top_k=10)
    same = [ours[0] == best[0] for ours, best in zip(found.documents, exact.documents, strict=True)]
    assert sum(same) >= 19  # of 20
    first = [[scores[0] for scores in ranking.scores] for ranking in (found, exact)]
    np.testing.assert_allclose(*first, atol=0.1)  # 4 bits a value
    for documents, scores in zip(found.documents, found.scores, strict=True):
        pairs = list(zip(scores, documents, strict=True))
        assert len(set(documents)) == 10 and pairs == sorted(pairs, reverse=True)
    assert found.documents[-1][:2] == ["d020", "d010"]  # the twins' scores are equal


def test_plaid_scores_vectors_at_unit_length(corpus, queries):
    documents = corpus[25:50]
    again = plaid_search(queries[:2], [d * 0.5 for d in documents], ids(documents), top_k=1)
    exact = exact_search(queries[:2], documents, ids(documents), top_k=1)
    assert again.documents == exact.documents
    np.testing.assert_allclose(again.scores, exact.scores, atol=0.15)  # not half of them


def test_plaid_neither_uses_nor_moves_the_callers_random_numbers(corpus, queries, found):
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(2).tolist(), np.random.rand(2).tolist()
    torch.manual_seed(3)
    np.random.seed(3)
    again = plaid_search(queries, corpus, ids(corpus), top_k=10)
    assert (again.documents, again.scores) == (found.documents, found.scores)
    assert (torch.rand(2).tolist(), np.random.rand(2).tolist()) == expected


def test_a_plaid_index_is_measured_and_left_behind_only_where_a_folder_was_named(
    corpus, tmp_path, monkeypatch, capsys
):
    query, documents = corpus[0], corpus[:40]
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    whole = plaid_search([query], documents, ids(documents), folder=tmp_path / "kept")
    stored = {f.name: f.stat().st_size for f in (tmp_path / "kept").rglob("*") if f.is_file()}
    vectors = sum(len(document) for document in documents)
    assert stored["embeddings.npy"] > 4 * vectors * documents[0].shape[1]  # not part of the index
    copies = [size for name, size in stored.items() if name.startswith(("embeddings", "merged_"))]
    assert whole.index_bytes == sum(stored.values()) - sum(copies)
    fewer = [document[:2] for document in documents]
    smaller = plaid_search([query], fewer, ids(documents), nbits=2).index_bytes
    assert 0 < smaller < whole.index_bytes
    assert not list((tmp_path / "temporary").glob("l2p-plaid-*"))
    assert exact_search([query], documents, ids(documents)).index_bytes is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("lengths", [[1], [0, 8, 1], [5, 0, 5]])
def test_plaid_over_a_handful_of_vectors_finds_what_exact_search_finds(lengths, caplog):
    documents = [unit_vectors(n, seed=i) for i, n in enumerate(lengths)]
    query = next(document for document in documents if len(document))
    found = plaid_search([query], [d / 2 for d in documents], ids(documents))
    exact = exact_search([query], documents, ids(documents))
    assert found.documents == exact.documents
    small = sum(lengths) < 10
    np.testing.assert_allclose(found.scores, exact.scores, atol=1e-5 if small else 0.15)
    assert (found.index_bytes is None) == small == ("searched exactly" in caplog.text)


PEAK = """
import resource, sys, torch
from l2p_utils.search import exact_search
torch.set_num_threads(1)
torch.manual_seed(0)
documents = [torch.nn.functional.normalize(torch.randn(40, 64), dim=1) for _ in range(100)]
queries = [document[:10] for document in documents]
def search(times):  # the same vectors again and again: what the caller holds does not grow
    ids = [str(i) for i in range(100 * times)]
    return exact_search(queries, documents * times, ids)
search(1)
for times in (1, 8, 32):
    search(times)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_of_a_search_stays_flat_as_the_corpus_grows():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    once, *more = (int(kibibytes) for kibibytes in done.stdout.split())
    # a block of similarities takes 8 MiB; all scores of the last search would take 2.5 MiB a copy,
    # all its similarities 1 GiB
    assert max(more) - once < 16 * 1024
