"""Evaluation: metrics judged by trec_eval (pytrec_eval), and what is measured, kept and reused."""

import ast
import dataclasses
import functools
import gzip
import json
import math
import shutil

import matplotlib
import numpy as np
import pandas as pd
import pytest
import pytrec_eval
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_colbert

from l2p_utils import evaluation
from l2p_utils.collection import Collection
from l2p_utils.evaluation import (
    Encoded,
    Setting,
    evaluate_model,
    evaluation_tasks,
    measure,
    run_name,
    write_trec,
)
from l2p_utils.files import ROOT, UserError
from l2p_utils.model import encode
from l2p_utils.pooling import pool
from l2p_utils.profile import PROFILES, Profile
from l2p_utils.results import read_per_query, read_rows
from l2p_utils.search import Ranking

DOCUMENTS = [f"d{i}" for i in range(25)]
CORPUS = {document: f"text of {document}" for document in DOCUMENTS}
METRICS = ["ndcg@10", "recall@10", "mrr@10"]


def collection_of(qrels, corpus=None, queries=None, name="made-up"):
    queries = queries or {query: f"question {query}" for query in qrels}
    return Collection(name, corpus or CORPUS, queries, qrels)


def ranking_of(*documents):
    return Ranking([list(found) for found in documents], [[0.0] * len(d) for d in documents], 1.0)


# --- measures -------------------------------------------------------------------------------------


def test_measures_worked_by_hand():
    collection = collection_of({"q1": {"d1": 2, "d2": 1, "d9": -1}, "q2": {"d3": 1}})
    values = measure(collection, ranking_of(["d0", "d1", "d9", "d2"], ["d1", "d3"]))
    gain = 2 / math.log2(3) + 1 / math.log2(5)
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert values["query_id"].tolist() == ["q1", "q2"]
    assert values["ndcg@10"].tolist() == pytest.approx([gain / ideal, 1 / math.log2(3)])
    assert values["recall@10"].tolist() == [1.0, 1.0]
    assert values["mrr@10"].tolist() == [0.5, 0.5]


def test_what_counts_0():
    qrels = {"nothing found": {"d1": 1}, "none": {"d1": 0}, "unjudged": {}, "rank 11": {"d10": 1}}
    values = measure(collection_of(qrels), ranking_of([], ["d1"], ["d2"], DOCUMENTS))
    assert values[METRICS].to_numpy().tolist() == [[0, 0, 0]] * 4


STORED_RUNS = sorted((ROOT / "data" / "offline" / "runs").glob("*/*/*.trec.gz"))


@pytest.mark.parametrize("path", STORED_RUNS, ids=lambda path: path.stem)
def test_a_stored_run_gives_its_row(path):
    model, collection = path.parts[-3], path.parts[-2].replace("docs-", "docs:")
    rows = read_rows(STORED_RUNS[0].parents[3]).query("engine == 'exact'")
    rows = rows[(rows["model"] == model) & (rows["collection"] == collection)]
    values = rows.set_index(["pool_method", "pool_variant", "pool_factor", "renormalized"])
    expected = {f"{run_name(Setting(*k))}.trec.gz": v for k, v in values["ndcg@10"].items()}
    qrels = evaluation.load_collection(collection).qrels
    with gzip.open(path, "rt") as lines:
        run = pytrec_eval.parse_run(lines)
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10"}).evaluate(run).values()
    assert len(found) == len(qrels)
    mean = np.mean([value["ndcg_cut_10"] for value in found])
    assert mean == pytest.approx(expected[path.name], abs=1e-5)


SCORED = st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(0, 4), max_size=25)
JUDGED = st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(-2, 3), min_size=1, max_size=15)


@given(st.lists(st.tuples(SCORED, JUDGED), min_size=1, max_size=4))
def test_measures_agree_with_trec_eval_on_ties_and_graded_judgments(pairs):
    run = {f"q{i}": {d: float(s) for d, s in scored.items()} for i, (scored, _) in enumerate(pairs)}
    qrels = {f"q{i}": judged for i, (_, judged) in enumerate(pairs)}
    ranked = [sorted(found, key=lambda d: (found[d], d), reverse=True) for found in run.values()]
    ours = measure(collection_of(qrels), ranking_of(*ranked)).set_index("query_id")
    # pytrec_eval reads outside its arrays, and may crash, on judgments below 0.
    judged = {q: {d: max(score, 0) for d, score in found.items()} for q, found in qrels.items()}
    judge = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut_10", "recall_10", "recip_rank"})
    theirs = judge.evaluate({query: found for query, found in run.items() if found})
    for query in run:
        expected = theirs.get(query, {"ndcg_cut_10": 0, "recall_10": 0, "recip_rank": 0})
        reciprocal = expected["recip_rank"] if expected["recip_rank"] > 1 / 10.5 else 0
        values = [expected["ndcg_cut_10"], expected["recall_10"], reciprocal]
        assert ours.loc[query, METRICS].tolist() == pytest.approx(values, abs=1e-9)


def test_trec_eval_reads_a_written_run_as_we_measure_it(tmp_path):
    # d1 and d2 tie, and d0 is the query itself, ignored by the metrics
    texts = {"q0": SAME, "d1": "a", "d2": "b", "d3": "c"}
    collection = collection_of({"q0": {"d1": 2, "d3": 1}}, texts, {"q0": SAME}, "folder")
    ranking = Ranking([["q0", "d2", "d1", "d3"]], [[3.0, 1.0000001, 1.0000001, 1.0]], 0.1)
    for name in ("one", "two"):
        write_trec(tmp_path / name, collection, ranking, run_name(Setting("span", "", 3, True)))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with gzip.open(tmp_path / "one", "rt") as lines:
        first = lines.readline()
        run = pytrec_eval.parse_run([first, *lines])
    assert first == "q0 Q0 d2 1 1.0000001 span-pf3-unit\n"
    judge = pytrec_eval.RelevanceEvaluator(collection.qrels, {"ndcg_cut_10"})
    expected = measure(collection, ranking)["ndcg@10"][0]
    assert judge.evaluate(run)["q0"]["ndcg_cut_10"] == pytest.approx(expected)
    blank = collection_of({"q0": {"a b": 1}}, {"a b": "x"})
    with pytest.raises(UserError, match="'a b' of"):
        write_trec(tmp_path / "three", blank, Ranking([["a b"]], [[1.0]], 0.1), "x")


SAME, OTHER = "Should we?", "wing flutter"


@pytest.mark.parametrize(
    ("name", "text", "judged", "reciprocal_rank"),
    [
        ("folder", f"Title {SAME}", {"d2": 1}, 1),  # d1 is the query itself: ignored
        ("folder", SAME, {"d1": 0, "d2": 1}, 1),
        ("folder", SAME, {"d1": 1, "d2": 0}, 1),  # judged relevant: counts
        ("folder", OTHER, {"d2": 1}, 1 / 2),  # d1 only has the query's id
        ("beir:x", OTHER, {"d2": 1}, 1),  # on the hub the id is enough, as for BEIR's own tools
    ],
)
def test_a_query_does_not_find_itself(name, text, judged, reciprocal_rank):
    collection = collection_of({"d1": judged}, {"d1": text, "d2": "No"}, {"d1": SAME}, name)
    assert measure(collection, ranking_of(["d1", "d2"]))["mrr@10"].tolist() == [reciprocal_rank]


# --- encoding -------------------------------------------------------------------------------------


def test_vectors_are_float32_of_unit_length_in_any_precision(bundled_model, texts):
    for precision in ("float32", "bfloat16"):
        vectors = torch.cat(encode(bundled_model, texts, False, precision))
        assert vectors.dtype == torch.float32 and vectors.device.type == "cpu"
        lengths = vectors.norm(dim=-1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-6, rtol=0)


def test_cut_documents_are_counted_in_word_pieces(tmp_path):
    """A document of 16 word pieces has [CLS], the prefix and [SEP] in three of them."""
    model = evaluation.load_model(tiny_colbert(tmp_path / "tiny", ["word"]), device="cpu")
    assert model.document_length == 16
    corpus = {str(n): "word " * n for n in (1, 13, 14, 24)}
    assert [len(v) for v in encode(model, list(corpus.values()), False)] == [4, 16, 16, 16]
    found = evaluation.cut_documents(model, collection_of({"q": {"1": 1}}, corpus))
    expected = {"collection": "made-up", "documents": 4, "document_length": 16, "cut": 2}
    assert found == {**expected, "lost": round(100 * (1 + 11) / (14 + 24), 1)}
    whole = evaluation.cut_documents(
        model, collection_of({"q": {"1": 1}}, {"1": "word", "13": "word " * 13})
    )
    assert (whole["cut"], whole["lost"]) == (0, 0.0)


# --- settings -------------------------------------------------------------------------------------


def random_encoded(documents=8, queries=3, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.nn.functional.normalize(torch.randn(length, dim, generator=generator), dim=-1)

    corpus = {d: CORPUS[d] for d in DOCUMENTS[:documents]}
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(queries)}
    vectors = [text(5 + 2 * i) for i in range(documents)]
    return Encoded(collection_of(qrels, corpus), [v[1:4] for v in vectors[:queries]], vectors)


@pytest.mark.parametrize(("use_sklearn", "name"), [(False, "fast"), (True, "sklearn")])
def test_every_setting_comes_once_and_the_unpooled_one_first(use_sklearn, name):
    methods, variants = ["span", "kmeans", "hierarchical"], ["pylate", "paper"]
    encoded = random_encoded()
    found = dict(evaluation.pooled_documents(encoded, methods, [1, 2, 3], variants, use_sklearn))
    kinds = [("span", ""), ("kmeans", name), ("hierarchical", "pylate"), ("hierarchical", "paper")]
    pooled = [Setting(*kind, factor) for kind in kinds for factor in (2, 3)]
    assert list(found) == [Setting("none", "", 1), *pooled]
    expected = pool(encoded.documents, 3, "kmeans", use_sklearn=use_sklearn)
    for vectors, other in zip(found[Setting("kmeans", name, 3)], expected, strict=True):
        assert torch.equal(vectors, other)


def test_unit_length_means_are_those_of_the_same_clusters():
    encoded = random_encoded()
    both = dict(evaluation.pooled_documents(encoded, ["kmeans"], [1, 2, 3], means=["raw", "unit"]))
    assert len(both) == 1 + 2 * 2
    for factor in (2, 3):
        raw, unit = (both[Setting("kmeans", "fast", factor, length)] for length in (False, True))
        for one, other in zip(raw, unit, strict=True):
            torch.testing.assert_close(one / one.norm(dim=1, keepdim=True), other)
            assert (one.norm(dim=1) < 0.999).any()
        expected = pool(encoded.documents, factor, "kmeans", renormalize=True)
        assert all(torch.equal(*pair) for pair in zip(unit, expected, strict=True))
    only = dict(evaluation.pooled_documents(encoded, ["span"], [2], means=["unit"]))
    assert list(only) == [Setting("none", "", 1), Setting("span", "", 2, True)]


def test_rows_tell_raw_from_unit_length_and_plaid_is_given_raw_ones():
    arguments = random_encoded(), ["span"], [1, 2, 3]
    rows, values = evaluation.evaluate_collection(*arguments, means=["raw", "unit"])
    assert rows["renormalized"].tolist() == [False, False, True, False, True]
    assert len(values) == 5 * 3 and set(values["renormalized"]) == {False, True}
    sizes = rows.groupby("pool_factor")["vectors_per_document"].nunique()
    assert sizes.tolist() == [1, 1, 1]
    rows, _ = evaluation.evaluate_collection(*arguments, engine="plaid", means=["raw", "unit"])
    assert rows["renormalized"].tolist() == [False] * 3


def test_rows_tell_what_was_stored_and_measured():
    encoded = random_encoded()
    rows, per_query = evaluation.evaluate_collection(encoded, ["span"], [1, 2])
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
    assert per_query["query_id"].tolist() == ["q0", "q1", "q2"] * 2


# --- a model's evaluation -------------------------------------------------------------------------

TOPICS = ["matrix", "spline", "cluster", "integral", "filter", "random sample"]


def write_beir(folder, topics):
    """A collection in BEIR's layout: two documents and a test query per topic."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [
        {"_id": f"{i}-{kind}", "title": "", "text": f"The {kind} {topic} is computed here."}
        for i, topic in enumerate(topics)
        for kind in ("sparse", "dense")
    ]
    queries = [{"_id": f"q{i}", "text": f"what is a {topic}?"} for i, topic in enumerate(topics)]
    for name, records in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\t{i}-sparse\t1" for i in range(len(topics)))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def tiny_content(collections, **changes):
    """The profile `tiny`: span at the factors 1 and 2 on `collections`, no PLAID."""
    content = yaml.safe_load((PROFILES / "smoke.yaml").read_text("utf-8"))
    content["evaluation"] = {
        "collections": [str(collection) for collection in collections],
        "pool_methods": ["span"],
        "pool_factors": [1, 2],
        "means": ["raw"],
    }
    return {**content, "name": "tiny", "plaid": [], **changes}


def tiny_profile(collections, **changes):
    return Profile.model_validate(tiny_content(collections, **changes))


@pytest.fixture
def root(tmp_path, monkeypatch, model_folder):
    """A project with a baseline and two collections, `one` and `two`."""
    monkeypatch.setattr(Profile, "folder", property(lambda self: tmp_path / "runs" / self.name))
    shutil.copytree(model_folder, tmp_path / "runs" / "tiny" / "models" / "baseline")
    write_beir(tmp_path / "one", TOPICS)
    write_beir(tmp_path / "two", TOPICS[:3])
    return tmp_path


@pytest.fixture
def encoded(monkeypatch):
    """Names of the collections that were encoded."""
    names, encode = [], evaluation.encode_collection

    def counting(model, collection, *args, **kwargs):
        names.append(collection.name)
        return encode(model, collection, *args, **kwargs)

    monkeypatch.setattr(evaluation, "encode_collection", counting)
    return names


@pytest.fixture
def profile(root):
    return tiny_profile([root / "one", root / "two"])


def evaluated(profile, model):
    return evaluate_model(profile, "baseline", model, progress=False)


def test_an_evaluation_writes_rows_and_values_and_is_reused(root, profile, encoded, bundled_model):
    rows = evaluated(profile, bundled_model)
    stored, values = (read(profile.folder / "results") for read in (read_rows, read_per_query))
    assert len(stored) == len(rows) == 4
    assert encoded == [str(root / "one"), str(root / "two")]
    assert set(stored["model"]) == {"baseline"} and set(stored["seed"]) == {42}
    assert set(stored["query_length"]) == {16} and set(stored["document_length"]) == {32}
    keys = ["collection", "pool_method", "pool_factor"]
    means = values.groupby(keys)[METRICS].mean()
    assert np.allclose(stored.set_index(keys)[METRICS].sort_index(), means.sort_index(), atol=1e-6)
    assert stored["ndcg@10"].min() > 0.5  # the words are the same
    pd.testing.assert_frame_equal(evaluated(profile, bundled_model), rows)
    assert len(encoded) == 2


def test_only_what_has_changed_is_measured_again(
    root, profile, encoded, bundled_model, capsys, monkeypatch
):
    evaluated(profile, bundled_model)
    assert "documents are longer" not in capsys.readouterr().out
    with (root / "two" / "corpus.jsonl").open("a") as corpus:
        corpus.write(f'{{"_id": "new", "text": "{"matrix " * 58}"}}\n')
    encoded.clear()
    rows = evaluated(profile, bundled_model)
    assert encoded == [str(root / "two")]
    assert rows["documents"].tolist() == [12, 12, 7, 7]
    notice = "1 of 7 documents are longer than document_length = 32 word pieces and end there: 50."
    assert notice in capsys.readouterr().out
    weights = profile.folder / "models" / "baseline" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    evaluated(profile, bundled_model)
    monkeypatch.setattr(evaluation, "CACHE_VERSION", evaluation.CACHE_VERSION + 1)
    evaluated(profile, bundled_model)
    assert len(encoded) == 1 + 2 * 2


def test_an_interrupted_evaluation_resumes_where_it_stopped(
    root, profile, encoded, bundled_model, monkeypatch
):
    search = evaluation.exact_search

    def failing(queries, *args):
        if len(queries) == 3:
            raise KeyboardInterrupt
        return search(queries, *args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "exact_search", failing)
        with pytest.raises(KeyboardInterrupt):
            evaluated(profile, bundled_model)
    assert not (profile.folder / "results").exists()
    encoded.clear()
    whole = evaluated(profile, bundled_model)
    assert encoded == [str(root / "two")]
    part = profile.folder / "evaluated" / "baseline" / "one-exact"
    (part / "provenance.json").write_text('{"settings": {"mod')  # half-written
    (part / "rows.parquet").write_text("PAR1")
    again = evaluated(profile, bundled_model)
    assert encoded == [str(root / "two"), str(root / "one")]
    pd.testing.assert_frame_equal(
        whole.drop(columns="query_ms"), again.drop(columns="query_ms"), check_exact=True
    )


def test_a_collection_whose_name_is_a_number_keeps_it(root, bundled_model, monkeypatch):
    monkeypatch.chdir(root)
    write_beir(root / "007", TOPICS[:2])
    profile = tiny_profile(["007"])
    rows = evaluated(profile, bundled_model)
    stored, values = (read(profile.folder / "results") for read in (read_rows, read_per_query))
    assert {*rows["collection"]} == {*stored["collection"]} == {*values["collection"]} == {"007"}


def test_plaid_takes_fewer_queries_over_the_same_documents(root, encoded, bundled_model):
    profile = tiny_profile([root / "one"], plaid=[plaid_job(root / "one", "span", 2)])
    rows = evaluated(profile, bundled_model)
    assert rows["engine"].tolist() == ["exact", "exact", "plaid", "plaid"]
    assert rows["queries"].tolist() == [6, 6, 2, 2]
    assert rows["index_bytes"].isna().tolist() == [True, True, False, False]
    assert rows["index_bytes"].iloc[2] > rows["index_bytes"].iloc[3] > 0
    assert set(rows["documents"]) == {12}
    assert encoded == [str(root / "one")]  # once for both engines


def test_another_document_length_is_measured_apart(root, encoded, bundled_model):
    job = {"document_length": 16, "models": ["base*"], "collections": [str(root / "two")]}
    content = tiny_content([root / "one", root / "two"])
    content["evaluation"]["further"] = [job]
    own = bundled_model.document_length
    with (root / "two" / "corpus.jsonl").open("a") as corpus:
        corpus.write(f'{{"_id": "new", "text": "{"matrix " * 20}"}}\n')
    profile = Profile.model_validate(content)
    rows = evaluated(profile, bundled_model)
    assert bundled_model.document_length == own
    results = profile.folder / "results"
    assert set(read_rows(results)["document_length"]) == {own}
    short = read_rows(results / "d16")
    assert set(short["document_length"]) == {16} and set(short["collection"]) == {str(root / "two")}
    assert len(rows) == len(read_rows(results)) + len(short)
    whole = read_rows(results).query("collection in @short.collection")
    assert (
        short["vectors_per_document"].to_numpy() < whole["vectors_per_document"].to_numpy()
    ).all()
    encoded.clear()
    pd.testing.assert_frame_equal(evaluated(profile, bundled_model), rows)
    assert encoded == []


def test_rankings_are_kept_as_trec_runs_where_asked(root, encoded, bundled_model):
    content = tiny_content([root / "one"])
    content["evaluation"]["trec_runs"] = True
    profile = Profile.model_validate(content)
    rows = evaluated(profile, bundled_model)
    runs = sorted(profile.folder.glob("evaluated/baseline/*-exact/runs/*.trec.gz"))
    assert len(runs) == len(rows) and runs[-1].name == "span-pf2.trec.gz"


# --- models ---------------------------------------------------------------------------------------


def test_a_trained_model_comes_from_its_folder_or_is_refused(profile, encoded, bundled_model):
    assert evaluation.load_evaluated(profile, "baseline").document_length == 32
    for name, message in [
        ("docs-scipy-kmeans-pf9-s42", "has no model 'docs-scipy-kmeans-pf9-s42'; it has"),
        ("docs-scipy-pf1-s42", "models/docs-scipy-pf1-s42.*02_training"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluation.load_evaluated(profile, name)
        with pytest.raises(UserError, match=message):
            evaluate_model(profile, name, bundled_model, progress=False)
    assert encoded == []  # before work


@pytest.fixture
def hub_profile(root):
    """A base from a folder, at other lengths too, and a released model."""
    base = tiny_colbert(root / "base", TOPICS)
    released = shutil.copytree(base, root / "Their-SciFact-KMeans-PF1-6")
    lengths = {"query_length": 10, "document_length": 20}
    lengths["other_lengths"] = [{"document_length": 12, "query_length": 8}]
    return tiny_profile(
        [root / "one"],
        model={"base": str(base), **lengths, "query_lengths": {str(root / "one"): 6}},
        adaptation=None,
        runs=[],
        released_models=[str(released)],
    )


def test_hub_models_are_measured_from_their_source_at_the_profiles_lengths(hub_profile):
    names = {
        "baseline": (10, 20),
        "baseline-d12-q8": (8, 12),
        "released-their-scifact-kmeans-pf1-6": (10, 20),
    }
    assert hub_profile.evaluated_names == list(names)
    for name, lengths in names.items():
        model = evaluation.load_evaluated(hub_profile, name)
        assert (model.query_length, model.document_length) == lengths
    # The collection has a query length of its own; other lengths hold on every collection.
    for other, lengths in (("baseline-d12-q8", (8, 12)), (name, (6, 20))):
        model = evaluation.load_evaluated(hub_profile, other)
        rows = evaluate_model(hub_profile, other, model, progress=False)
        columns = rows[["query_length", "document_length"]].drop_duplicates()
        assert list(columns.itertuples(index=False, name=None)) == [lengths]
    assert not (hub_profile.folder / "models" / name).exists()
    wrong = hub_profile.model.model_copy(update={"dim": 64})
    with pytest.raises(UserError, match="dim"):
        evaluation.load_evaluated(hub_profile.model_copy(update={"model": wrong}), "baseline")


def test_a_released_model_is_described_by_its_name(hub_profile, profile):
    described = {
        "baseline": ["", "", ""],
        "baseline-d12-q8": ["", "none", ""],
        "released-their-scifact-kmeans-pf1-6": ["released:scifact", "kmeans", "1-6"],
    }
    for name, training in described.items():
        found = evaluation.describe_model(hub_profile, name)
        assert list(found.values()) == [name, *training, False, 42]
    trained = evaluation.describe_model(profile, "docs-scipy-pf1-s42")
    assert list(trained.values()) == ["docs-scipy-pf1-s42", "docs:scipy", "none", "1", False, 42]


# --- tasks ----------------------------------------------------------------------------------------


def plaid_job(collection, method="span", max_queries=None):
    job = {"model": "baseline", "collections": [str(collection)], "pool_methods": [method]}
    return job | {"max_queries": max_queries}


def test_a_collections_tasks_follow_each_other_exact_first():
    jobs = [plaid_job(name) for name in ("docs:numpy", "docs:scipy")]
    profile = tiny_profile(["docs:scipy", "docs:torch"], plaid=jobs)
    tasks = [f"{task.collection} {task.engine}" for task in evaluation_tasks(profile, "baseline")]
    expected = ["docs:scipy exact", "docs:scipy plaid", "docs:torch exact", "docs:numpy plaid"]
    assert tasks == expected
    trained = evaluation_tasks(profile, "docs-scipy-pf1-s42")
    assert [task.engine for task in trained] == ["exact", "exact"]


def test_plaid_jobs_on_one_collection_share_the_unpooled_index():
    jobs = [plaid_job("docs:scipy", method, 10) for method in ("span", "kmeans")]
    tasks = evaluation_tasks(tiny_profile(["docs:scipy"], plaid=jobs), "baseline")
    found = [(task.engine, task.pool_methods) for task in tasks]
    assert found == [("exact", ["span"]), ("plaid", ["span", "kmeans"])]
    jobs[1]["max_queries"] = None
    with pytest.raises(UserError, match=r"max_queries is \[10, None\].*Give these jobs the same"):
        evaluation_tasks(tiny_profile(["docs:scipy"], plaid=jobs), "baseline")


def test_only_the_baseline_is_measured_in_all_hierarchical_variants():
    jobs = [plaid_job("docs:scipy", "hierarchical")]
    profile = tiny_profile(["docs:scipy"], plaid=jobs)
    settings = profile.evaluation.model_copy(update={"baseline_variants": ["pylate", "paper"]})
    for own, both in [("pylate", ["pylate", "paper"]), ("paper", ["paper", "pylate"])]:
        profile = profile.model_copy(update={"evaluation": settings, "hierarchical": own})
        variants = [task.variants for task in evaluation_tasks(profile, "baseline")]
        assert variants == [both, [own]]  # exact, PLAID
        assert evaluation_tasks(profile, "docs-scipy-pf1-s42")[0].variants == [own]


# --- the notebook ---------------------------------------------------------------------------------


def run_notebook(profile):
    """Run the cells of notebook 03 in this process; give what they display."""
    displayed = []
    names = {"display": displayed.append}
    notebook = json.loads((ROOT / "notebooks" / "03_evaluation.ipynb").read_text("utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        *statements, last = ast.parse("".join(cell["source"])).body
        if isinstance(last, ast.Expr):
            last = ast.Expr(ast.Call(ast.Name("display", ast.Load()), [last.value], []))
        module = ast.Module([*statements, last], [])
        exec(compile(ast.fix_missing_locations(module), "03_evaluation", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= {"profile": str(profile), "model": "baseline"}
    return [found for found in displayed if found is not None]


@pytest.mark.parametrize("plaid", [False, True])
def test_the_notebook_works_on_an_own_collection_with_and_without_plaid(
    root, capsys, plaid, monkeypatch
):
    matplotlib.use("Agg")
    indexed = functools.partial(dataclasses.replace, index_bytes=1000)  # a real one takes seconds
    search = evaluation.exact_search
    monkeypatch.setattr(evaluation, "plaid_search", lambda *given: indexed(search(*given)))
    own = [root / "one", root / "two"]
    jobs = [plaid_job(root / "one", "span", 2)] if plaid else []
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_content(own, plaid=jobs)))
    displayed = run_notebook(path)
    tables = [found for found in displayed if isinstance(found, pd.DataFrame)]
    assert len(tables) == 5 + plaid and len(displayed) == 6 + plaid  # and the figure
    for table in tables:
        assert len(table) and not table.isna().any(axis=None)
    assert ("measures nothing of this model through PLAID" in capsys.readouterr().out) is not plaid
