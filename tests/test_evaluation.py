"""Evaluation: metrics judged by trec_eval (pytrec_eval), and the bookkeeping around them."""

import dataclasses
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import pytrec_eval
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from l2p_utils import evaluation
from l2p_utils import profile as profiles
from l2p_utils.collection import Collection, load_collection, subset
from l2p_utils.evaluation import (
    Encoded,
    Setting,
    encode_collection,
    evaluate_collection,
    evaluate_model,
    evaluation_tasks,
    measure,
    pooled_documents,
)
from l2p_utils.files import UserError
from l2p_utils.model import encode
from l2p_utils.pooling import pool
from l2p_utils.profile import PROFILES, Profile
from l2p_utils.results import read_per_query, read_rows
from l2p_utils.search import Ranking

DOCUMENTS = [f"d{i}" for i in range(25)]
CORPUS = {document: f"text of {document}" for document in DOCUMENTS}


def collection_of(qrels, corpus=None, queries=None):
    queries = queries or {query: f"question {query}" for query in qrels}
    return Collection("made-up", corpus or CORPUS, queries, qrels)


def ranking_of(*documents):
    return Ranking([list(found) for found in documents], [[0.0] * len(d) for d in documents], 1.0)


# --- measures -------------------------------------------------------------------------------------


def test_measures_worked_by_hand():
    collection = collection_of({"q1": {"d1": 2, "d2": 1}, "q2": {"d3": 1}})
    values = measure(collection, ranking_of(["d0", "d1", "d9", "d2"], ["d1", "d3"]))
    gain = 2 / math.log2(3) + 1 / math.log2(5)
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert values["query_id"].tolist() == ["q1", "q2"]
    assert values["ndcg@10"].tolist() == pytest.approx([gain / ideal, 1 / math.log2(3)])
    assert values["recall@10"].tolist() == [1.0, 1.0]
    assert values["mrr@10"].tolist() == [0.5, 0.5]


def test_what_comes_after_rank_10_does_not_count():
    values = measure(collection_of({"q": {"d10": 1}}), ranking_of(DOCUMENTS))
    assert values[["ndcg@10", "recall@10", "mrr@10"]].to_numpy().tolist() == [[0, 0, 0]]


def test_a_query_that_finds_nothing_or_has_nothing_to_find_scores_0():
    collection = collection_of({"nothing found": {"d1": 1}, "none": {"d1": 0}, "unjudged": {}})
    values = measure(collection, ranking_of([], ["d1"], ["d2"]))
    assert values[["ndcg@10", "recall@10", "mrr@10"]].to_numpy().tolist() == [[0, 0, 0]] * 3


SCORED = st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(0, 4), max_size=25)
JUDGED = st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(-2, 3), min_size=1, max_size=15)


@given(st.lists(st.tuples(SCORED, JUDGED), min_size=1, max_size=4))
def test_measures_agree_with_trec_eval_on_ties_and_graded_judgments(pairs):
    run = {f"q{i}": {d: float(s) for d, s in scored.items()} for i, (scored, _) in enumerate(pairs)}
    qrels = {f"q{i}": judged for i, (_, judged) in enumerate(pairs)}
    ranked = [sorted(found, key=lambda d: (found[d], d), reverse=True) for found in run.values()]
    ours = measure(collection_of(qrels), ranking_of(*ranked)).set_index("query_id")
    judge = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10", "recall_10", "recip_rank"})
    theirs = judge.evaluate({query: found for query, found in run.items() if found})
    for query in run:
        expected = theirs.get(query, {"ndcg_cut_10": 0, "recall_10": 0, "recip_rank": 0})
        reciprocal = expected["recip_rank"] if expected["recip_rank"] > 1 / 10.5 else 0
        assert ours.loc[query, "ndcg@10"] == pytest.approx(expected["ndcg_cut_10"], abs=1e-9)
        assert ours.loc[query, "recall@10"] == pytest.approx(expected["recall_10"], abs=1e-9)
        assert ours.loc[query, "mrr@10"] == pytest.approx(reciprocal, abs=1e-9)


def test_a_query_that_is_a_document_does_not_find_itself():
    corpus = {"a": "Title Should we?", "b": "No, for", "c": "Yes, for"}
    collection = collection_of({"a": {"b": 1}}, corpus, {"a": "Should we?"})
    assert measure(collection, ranking_of(["a", "b", "c"]))["mrr@10"].tolist() == [1.0]


def test_a_query_that_is_a_relevant_document_may_find_itself():
    corpus = {"a": "Should we?", "b": "No"}
    collection = collection_of({"a": {"a": 1, "b": 0}}, corpus, {"a": "Should we?"})
    assert measure(collection, ranking_of(["b", "a"]))["mrr@10"].tolist() == [0.5]
    judged_irrelevant = collection_of({"a": {"a": 0, "b": 1}}, corpus, {"a": "Should we?"})
    assert measure(judged_irrelevant, ranking_of(["a", "b"]))["mrr@10"].tolist() == [1.0]


def test_a_document_that_only_happens_to_have_the_querys_id_is_kept():
    corpus = {"1": "wing flutter", "2": "heat transfer"}
    collection = collection_of({"1": {"2": 1}}, corpus, {"1": "what is heat transfer"})
    assert measure(collection, ranking_of(["1", "2"]))["mrr@10"].tolist() == [0.5]


# --- part of a collection -------------------------------------------------------------------------

QRELS = {f"q{i}": {f"d{i}": 1, f"d{i + 10}": 0, f"d{i + 5}": -1} for i in range(5)}


def test_a_subset_keeps_every_relevant_document_and_no_other_beyond_the_limit():
    part = subset(collection_of(QRELS), None, 8)
    assert len(part.corpus) == 8
    assert {f"d{i}" for i in range(5)} <= set(part.corpus)
    assert set(subset(collection_of(QRELS), None, 2).corpus) == {f"d{i}" for i in range(5)}
    judged = {document for judged in part.qrels.values() for document in judged}
    assert judged <= set(part.corpus)


def test_a_subset_of_the_queries_frees_room_for_other_documents():
    part = subset(collection_of(QRELS), 2, 3)
    assert len(part.queries) == 2
    assert set(part.qrels) == set(part.queries)
    relevant = {f"d{query[1:]}" for query in part.queries}
    assert len(part.corpus) == 3 and relevant <= set(part.corpus)


def test_a_subset_does_not_depend_on_the_order_of_the_collection():
    there = collection_of(QRELS)
    back = collection_of(
        dict(reversed(QRELS.items())),
        dict(reversed(there.corpus.items())),
        dict(reversed(there.queries.items())),
    )
    for limits in [(3, 9), (None, 7), (2, None)]:
        assert subset(there, *limits).fingerprint == subset(back, *limits).fingerprint
    assert subset(there, 3, 9).fingerprint != subset(there, 2, 9).fingerprint


def test_without_limits_a_subset_is_the_whole():
    whole = dataclasses.replace(collection_of(QRELS), dropped=3)
    part = subset(whole, None, None)
    assert part == whole
    assert list(part.corpus) == list(whole.corpus)


# --- encoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_vectors_are_float32_of_unit_length_in_any_precision(bundled_model, texts, precision):
    vectors = encode(bundled_model, texts, False, precision)
    assert len(vectors) == len(texts)
    assert all(v.dtype == torch.float32 and v.device.type == "cpu" for v in vectors)
    lengths = torch.cat([v.norm(dim=-1) for v in vectors])
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-6, rtol=0)


def test_bfloat16_vectors_are_close_to_float32_ones(bundled_model, texts):
    exact, fast = (encode(bundled_model, texts, False, p) for p in ("float32", "bfloat16"))
    cosines = torch.cat([(a * b).sum(dim=-1) for a, b in zip(exact, fast, strict=True)])
    assert 0.99 < cosines.min() < 1 - 1e-7  # close, and not the same computation


def test_float32_vectors_are_the_models_own(bundled_model, texts):
    expected = bundled_model.encode(texts[:2], is_query=True, convert_to_tensor=True)
    for ours, theirs in zip(
        encode(bundled_model, texts[:2], True, "float32"), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs.float(), atol=1e-6, rtol=0)
    assert encode(bundled_model, [], True) == []


# --- settings -------------------------------------------------------------------------------------


def random_encoded(documents=8, queries=3, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.nn.functional.normalize(torch.randn(length, dim, generator=generator), dim=-1)

    corpus = {d: CORPUS[d] for d in DOCUMENTS[:documents]}
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(queries)}
    vectors = [text(5 + 2 * i) for i in range(documents)]
    return Encoded(collection_of(qrels, corpus), [v[1:4] for v in vectors[:queries]], vectors)


def test_every_setting_comes_once_and_the_unpooled_one_first():
    found = pooled_documents(
        random_encoded(), ["span", "kmeans", "hierarchical"], [1, 2, 3], ["pylate", "paper"]
    )
    settings = [setting for setting, _ in found]
    expected = [Setting("none", "", 1)]
    ways = [
        ("span", ""),
        ("kmeans", "fast"),
        ("hierarchical", "pylate"),
        ("hierarchical", "paper"),
    ]
    expected += [Setting(*way, factor) for way in ways for factor in (2, 3)]
    assert settings == expected


def test_scikit_learns_kmeans_is_named_as_such_and_only_on_request():
    encoded = random_encoded()
    for use_sklearn, name in [(False, "fast"), (True, "sklearn")]:
        found = dict(pooled_documents(encoded, ["kmeans"], [3], use_sklearn=use_sklearn))
        pooled = pool(encoded.documents, 3, "kmeans", use_sklearn=use_sklearn)
        for ours, expected in zip(found[Setting("kmeans", name, 3)], pooled, strict=True):
            assert torch.equal(ours, expected)


def test_documents_shrink_with_the_factor_and_stay_in_order():
    encoded = random_encoded()
    sizes = {
        s.pool_factor: [len(d) for d in docs]
        for s, docs in pooled_documents(encoded, ["span"], [2, 4])
    }
    lengths = [len(document) for document in encoded.documents]
    assert sizes[1] == lengths
    assert sizes[2] == [1 + math.ceil((n - 1) / 2) for n in lengths]  # [CLS] is kept apart
    assert sizes[4] == [1 + math.ceil((n - 1) / 4) for n in lengths]


def test_rows_tell_what_was_stored_and_measured():
    encoded = random_encoded()
    rows, per_query = evaluate_collection(encoded, ["span"], [1, 2])
    assert rows["pool_factor"].tolist() == [1, 2]
    where = rows[["collection", "engine", "queries", "documents"]].to_numpy().tolist()
    assert where == [["made-up", "exact", 3, 8]] * 2
    unpooled = rows.iloc[0]
    assert unpooled["vectors_per_document"] == np.mean([len(d) for d in encoded.documents])
    assert unpooled["bytes_per_document"] == unpooled["vectors_per_document"] * 8 * 4
    assert unpooled["ndcg@10"] == 1.0  # queries are cut out of their documents
    assert rows["index_bytes"].isna().all()
    means = per_query.groupby("pool_factor")["ndcg@10"].mean()
    assert rows["ndcg@10"].tolist() == pytest.approx(means.tolist(), abs=1e-6)
    assert (
        per_query.groupby("pool_factor")["query_id"].apply(list).tolist()
        == [["q0", "q1", "q2"]] * 2
    )


def test_plaid_rows_have_the_size_of_their_index():
    rows, _ = evaluate_collection(random_encoded(), ["span"], [2], "plaid")
    assert rows["engine"].tolist() == ["plaid"] * 2
    assert rows["index_bytes"].iloc[0] > rows["index_bytes"].iloc[1] > 0


# --- a model's evaluation -------------------------------------------------------------------------

TOPICS = ["matrix", "spline", "cluster", "integral", "filter", "random sample"]


def write_beir(folder, topics):
    """A collection in BEIR's layout: two documents and a test query a topic."""
    (folder / "qrels").mkdir(parents=True)
    documents = [
        f'{{"_id": "{i}-{kind}", "title": "", "text": "The {kind} {topic} is computed here."}}'
        for i, topic in enumerate(topics)
        for kind in ("sparse", "dense")
    ]
    queries = [f'{{"_id": "q{i}", "text": "what is a {t}?"}}' for i, t in enumerate(topics)]
    judged = [f"q{i}\t{i}-sparse\t1" for i in range(len(topics))]
    (folder / "corpus.jsonl").write_text("\n".join(documents) + "\n")
    (folder / "queries.jsonl").write_text("\n".join(queries) + "\n")
    (folder / "qrels" / "test.tsv").write_text(
        "\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n"
    )
    return folder


def tiny_profile(collections, **changes):
    content = yaml.safe_load((PROFILES / "smoke.yaml").read_text("utf-8"))
    content["evaluation"] = {
        "collections": [str(collection) for collection in collections],
        "pool_methods": ["span"],
        "pool_factors": [1, 2],
    }
    return Profile.model_validate({"name": "tiny", **content, "plaid": [], **changes})


@pytest.fixture
def workspace(tmp_path, monkeypatch, model_folder):
    """A project with a baseline and two collections; counts which collections were encoded."""
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    shutil.copytree(model_folder, tmp_path / "runs" / "tiny" / "models" / "baseline")
    write_beir(tmp_path / "one", TOPICS)
    write_beir(tmp_path / "two", TOPICS[:3])
    encoded = []

    def counting(model, collection, *args, **kwargs):
        encoded.append(collection.name)
        return encode_collection(model, collection, *args, **kwargs)

    monkeypatch.setattr(evaluation, "encode_collection", counting)
    return tmp_path, tiny_profile([tmp_path / "one", tmp_path / "two"]), encoded


def test_an_evaluation_writes_rows_and_values_that_can_be_read_back(workspace, bundled_model):
    root, profile, encoded = workspace
    rows = evaluate_model(profile, "baseline", bundled_model, progress=False)
    stored = read_rows(profile.folder / "results")
    values = read_per_query(profile.folder / "results")
    assert len(stored) == len(rows) == 4
    assert encoded == [str(root / "one"), str(root / "two")]
    assert set(stored["model"]) == {"baseline"} and set(stored["seed"]) == {42}
    assert set(stored["query_length"]) == {16} and set(stored["document_length"]) == {32}
    keys = ["collection", "pool_method", "pool_factor"]
    for column in ("ndcg@10", "recall@10", "mrr@10"):
        means = values.groupby(keys)[column].mean()
        assert stored.set_index(keys)[column].sort_index().tolist() == pytest.approx(
            means.sort_index().tolist(), abs=1e-6
        )
    assert stored["ndcg@10"].min() > 0.5  # the words are the same


def test_finished_tasks_are_reused(workspace, bundled_model):
    _, profile, encoded = workspace
    first = evaluate_model(profile, "baseline", bundled_model, progress=False)
    encoded.clear()
    again = evaluate_model(profile, "baseline", bundled_model, progress=False)
    assert encoded == []
    pd.testing.assert_frame_equal(first, again)


def test_a_changed_collection_is_measured_again_and_the_other_is_not(workspace, bundled_model):
    root, profile, encoded = workspace
    evaluate_model(profile, "baseline", bundled_model, progress=False)
    with (root / "two" / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": "new", "text": "A new document about a matrix."}\n')
    encoded.clear()
    rows = evaluate_model(profile, "baseline", bundled_model, progress=False)
    assert encoded == [str(root / "two")]
    assert rows["documents"].tolist() == [12, 12, 7, 7]


def test_other_weights_are_measured_again(workspace, bundled_model):
    root, profile, encoded = workspace
    evaluate_model(profile, "baseline", bundled_model, progress=False)
    weights = profile.folder / "models" / "baseline" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    encoded.clear()
    evaluate_model(profile, "baseline", bundled_model, progress=False)
    assert encoded == [str(root / "one"), str(root / "two")]


def test_what_older_code_measured_is_measured_again(workspace, bundled_model, monkeypatch):
    root, profile, encoded = workspace
    before = evaluate_model(profile, "baseline", bundled_model, progress=False)
    encoded.clear()
    monkeypatch.setattr(evaluation, "CODE", evaluation.CODE + 1)
    rows = evaluate_model(profile, "baseline", bundled_model, progress=False)
    assert encoded == [str(root / "one"), str(root / "two")]
    assert list(rows.columns) == list(before.columns)


def test_after_a_failure_it_goes_on_where_it_was(workspace, bundled_model, monkeypatch):
    root, profile, encoded = workspace
    search = evaluation.exact_search

    def failing(queries, *args):
        if len(queries) == 3:
            raise RuntimeError("killed")
        return search(queries, *args)

    monkeypatch.setattr(evaluation, "exact_search", failing)
    with pytest.raises(RuntimeError, match="killed"):
        evaluate_model(profile, "baseline", bundled_model, progress=False)
    assert not (profile.folder / "results").exists()
    monkeypatch.setattr(evaluation, "exact_search", search)
    encoded.clear()
    evaluate_model(profile, "baseline", bundled_model, progress=False)
    assert encoded == [str(root / "two")]


def test_a_half_written_part_is_made_again(workspace, bundled_model):
    root, profile, encoded = workspace
    whole = evaluate_model(profile, "baseline", bundled_model, progress=False)
    part = profile.folder / "evaluated" / "baseline" / "one-exact"
    (part / "provenance.json").write_text('{"settings": {"mod')
    (part / "rows.csv").write_text("collection,eng")
    encoded.clear()
    again = evaluate_model(profile, "baseline", bundled_model, progress=False)
    assert encoded == [str(root / "one")]
    pd.testing.assert_frame_equal(
        whole.drop(columns="query_ms"), again.drop(columns="query_ms"), check_exact=True
    )


def test_plaid_takes_fewer_queries_over_the_same_documents(workspace, bundled_model):
    root, _, encoded = workspace
    job = {"model": "baseline", "collections": [str(root / "one")], "pool_methods": ["span"]}
    profile = tiny_profile([root / "one"], plaid=[{**job, "max_queries": 2}])
    rows = evaluate_model(profile, "baseline", bundled_model, progress=False)
    assert rows["engine"].tolist() == ["exact", "exact", "plaid", "plaid"]
    assert rows["queries"].tolist() == [6, 6, 2, 2]
    assert set(rows["documents"]) == {12}
    assert encoded == [str(root / "one")]  # once for both engines


def test_a_model_that_the_profile_does_not_have_is_refused_before_work(workspace, bundled_model):
    _, profile, encoded = workspace
    with pytest.raises(UserError, match="has no model 'docs-scipy-kmeans-pf9-s42'; it has"):
        evaluate_model(profile, "docs-scipy-kmeans-pf9-s42", bundled_model, progress=False)
    assert encoded == []


def test_a_model_that_was_not_made_yet_is_refused_before_work(workspace, bundled_model):
    _, profile, encoded = workspace
    with pytest.raises(UserError, match="no model weights .*models/docs-scipy-pf1-s42"):
        evaluate_model(profile, "docs-scipy-pf1-s42", bundled_model, progress=False)
    assert encoded == []


# --- tasks ----------------------------------------------------------------------------------------


def plaid_job(model, collection, method, max_queries=None):
    job = {"model": model, "collections": [collection], "pool_methods": [method]}
    return job | {"max_queries": max_queries}


def test_a_collections_tasks_follow_each_other_exact_first():
    jobs = [
        plaid_job("baseline", "docs:numpy", "span"),
        plaid_job("baseline", "docs:scipy", "span"),
    ]
    profile = tiny_profile(["docs:scipy", "docs:torch"], plaid=jobs)
    tasks = [(task.collection, task.engine) for task in evaluation_tasks(profile, "baseline")]
    assert tasks == [
        ("docs:scipy", "exact"),
        ("docs:scipy", "plaid"),
        ("docs:torch", "exact"),
        ("docs:numpy", "plaid"),
    ]
    trained = evaluation_tasks(profile, "docs-scipy-pf1-s42")
    assert [task.engine for task in trained] == ["exact", "exact"]


def test_plaid_jobs_on_one_collection_share_the_unpooled_index():
    jobs = [plaid_job("baseline", "docs:scipy", method, 10) for method in ("span", "kmeans")]
    tasks = evaluation_tasks(tiny_profile(["docs:scipy"], plaid=jobs), "baseline")
    assert [(t.engine, t.pool_methods) for t in tasks] == [
        ("exact", ["span"]),
        ("plaid", ["span", "kmeans"]),
    ]


def test_plaid_jobs_on_one_collection_must_agree_on_the_queries():
    jobs = [
        plaid_job("baseline", "docs:scipy", "span", 10),
        plaid_job("baseline", "docs:scipy", "kmeans"),
    ]
    profile = tiny_profile(["docs:scipy"], plaid=jobs)
    with pytest.raises(UserError, match=r"max_queries is \[10, None\].*Give these jobs the same"):
        evaluation_tasks(profile, "baseline")


def test_only_the_baseline_is_measured_in_all_hierarchical_variants():
    profile = tiny_profile(["docs:scipy"])
    settings = profile.evaluation.model_copy(update={"baseline_variants": ["pylate", "paper"]})
    for own, all_of_them in [("pylate", ["pylate", "paper"]), ("paper", ["paper", "pylate"])]:
        profile = profile.model_copy(update={"evaluation": settings, "hierarchical": own})
        assert evaluation_tasks(profile, "baseline")[0].variants == all_of_them
        assert evaluation_tasks(profile, "docs-scipy-pf1-s42")[0].variants == [own]


def test_plaid_pools_as_the_profile_says():
    plaid = [{"model": "baseline", "collections": ["docs:scipy"], "pool_methods": ["hierarchical"]}]
    profile = tiny_profile(["docs:scipy"], plaid=plaid).model_copy(update={"hierarchical": "paper"})
    assert [task.variants for task in evaluation_tasks(profile, "baseline")] == [["paper"]] * 2


def test_the_collections_here_are_whole(tmp_path):
    collection = load_collection(write_beir(tmp_path / "one", TOPICS))
    assert (len(collection.corpus), len(collection.queries)) == (12, 6)
