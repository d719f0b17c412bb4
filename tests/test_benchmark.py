"""The bench: contestants pool alike, medians are right, every measurement is taken."""

import functools
import itertools
import math
import sys
import time

import pandas as pd
import pytest
import torch

from l2p_utils import benchmark, training
from l2p_utils.benchmark import FACTORS, METHODS, draw, poolers, read
from l2p_utils.collection import Collection
from l2p_utils.evaluation import encode_collection, evaluate_collection
from l2p_utils.files import UserError
from l2p_utils.model import load_model
from l2p_utils.pooling import pooled_count
from tests.tiny import tiny_colbert


def unit(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


@pytest.fixture(scope="module")
def documents():
    return list(unit(71, 16).split([30, 17, 24]))


@pytest.mark.parametrize("method", METHODS)
def test_contestants_of_a_method_do_the_same_work(method, documents):
    first, *others = [p.pool(documents, 3) for p in poolers() if p.method == method]
    for other in [first, *others]:
        for document, ours, theirs in zip(documents, first, other, strict=True):
            assert len(theirs) == pooled_count(len(document), 3, method)
            assert torch.equal(theirs[0], document[0])  # protected
            assert theirs.dtype == torch.float32
            if method != "kmeans":  # the same vectors, in any order
                distances = torch.cdist(ours, theirs)
                assert distances.min(dim=0).values.max() < 1e-3
                assert distances.min(dim=1).values.max() < 1e-3


def test_a_sweep_gives_what_single_factors_give(documents):
    for pooler in filter(lambda p: p.sweep, poolers()):
        for factor, pooled in pooler.sweep(documents, [2, 5]).items():
            for a, b in zip(pooled, pooler.pool(documents, factor), strict=True):
                torch.testing.assert_close(a, b)


def test_contestants_take_turns_and_the_median_counts(monkeypatch):
    took, seen, now = iter([1, 2, 9, 2, 3, 7]), [], [0]
    clock = "process_time" if torch.get_num_threads() == 1 else "perf_counter"
    monkeypatch.setattr(time, clock, lambda: now[0])

    def run(name):
        seen.append(name)
        now[0] += next(took)

    runs = {name: functools.partial(run, name) for name in "ab"}
    assert benchmark.in_turns(runs, 3, warm=False) == {"a": 3, "b": 2}  # of 1, 9, 3 and 2, 2, 7
    assert seen == ["a", "b"] * 3


def test_groups_are_the_same_in_any_order_and_at_any_length():
    a, b = unit(4, 8), unit(5, 8)
    assert benchmark.same_groups([a, b], [3 * a.flip(0), b]) == 1
    assert benchmark.same_groups([a, b], [a, b[1:]]) == 0.5  # one fewer
    assert benchmark.same_groups([a, b], [a, torch.cat([b[:4], -b[4:]])]) == 0.5


def test_peak_memory_sees_what_a_call_takes_and_gives_back():
    taken = benchmark.peak_memory(lambda: torch.ones(64, 2**20).sum())  # 256 MiB
    assert math.isnan(taken) or 200 < taken < 400


def test_pooling_is_measured_at_every_factor_and_over_all(documents):
    pooling = benchmark.bench_pooling({96: documents}, repetitions=1)
    for _, part in pooling.groupby(["method", "engine"]):
        assert set(part["pool_factor"]) == {"2", "3", "4", "5", "6", "2-6"}
        assert (part["documents_per_second"] > 0).all()
    pylate = pooling[pooling["engine"] == "PyLate"].set_index("pool_factor")["seconds"]
    assert pylate["2-6"] == pytest.approx(pylate.drop("2-6").sum())
    assert pooling.loc[pooling["pool_factor"] != "2-6", "inertia"].notna().all()
    assert benchmark.times_faster(pooling).shape == (len(poolers()) - len(METHODS), 6)


def test_inertia_speed_and_quality_are_compared_by_hand():
    document = torch.tensor([[9.0, 9.0], [0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    pooled = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 3.0]])  # the first is protected
    assert benchmark.inertia([document], [pooled]) == pytest.approx(1 + 1 + 0)
    keys = {"document_length": 96, "method": "kmeans", "pool_factor": "4"}
    speeds = {"engine": ["ours", "scikit-learn"], "documents_per_second": [60.0, 20.0]}
    faster = benchmark.times_faster(pd.DataFrame(keys | speeds))
    assert faster.loc[(96, "kmeans", "scikit-learn"), "4"] == 3
    quality = {"collection": "c", "pool_factor": [2, 3] * 2, "query_id": ["a", "a", "b", "b"]}
    quality |= {"ours": [0.6, 0.5, 1.0, 0.9], "scikit-learn": [0.5, 0.5, 1.0, 0.8]}
    quality |= {"inertia_ours": [1.0, 3.0] * 2, "inertia_scikit-learn": [2.0, 2.0] * 2}
    table = benchmark.quality_table(pd.DataFrame(quality))
    # the queries' mean differences are .05 and .05, so every resample's mean is 5 points
    assert table.loc["c"].tolist() == ["+5.0", "+5.0", "+5.00", "[+5.00, +5.00]", "1.000"]
    assert table.loc["all"].tolist() == table.loc["c"].tolist()


# ---------------------------------------------------------------- peers

STUBS = {
    "sentence_transformers/__init__.py": "",  # an old one
    "maxsim_cpu.py": "def maxsim_scores_variable(query, documents):\n"
    "    return [(query @ document.T).max(1).sum() for document in documents]\n",
    "maxsim_cpu-9.dist-info/METADATA": "Name: maxsim-cpu\nVersion: 9.1\n",
    "colpali_engine/compression/token_pooling.py": """
class HierarchicalTokenPooler:
    def pool_embeddings(self, documents, pool_factor):
        print("pooling")  # what a peer prints is no answer
        return [document[: len(document) // pool_factor] for document in documents]
""",
    "colpali_engine-9.dist-info/METADATA": "Name: colpali-engine\nVersion: 9.2\n",
}


def python(folder, *stubs):
    """This interpreter, with stubs of libraries in place of those that are installed."""
    for name in stubs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(STUBS[name])
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    with benchmark.started([python(tmp_path_factory.mktemp("peers"), *STUBS)], 1) as found:
        yield found
    assert all(peer.process.returncode == 0 for peer in found.values())


def test_peers_answer_from_a_python_of_their_own_and_time_themselves(peers, documents):
    numbers = {engine: peer.version for engine, peer in peers.items()}
    assert numbers == {"colpali-engine": "9.2", "maxsim-cpu": "9.1"}
    answer = peers["colpali-engine"](documents, 3)
    assert [len(part) for part in answer] == [10, 5, 8] and 0 < answer.seconds < 1
    assert all(torch.equal(a, d[: len(a)]) for a, d in zip(answer, documents, strict=True))
    assert benchmark.in_turns({"peer": lambda: answer}, 3) == {"peer": answer.seconds}
    memory = peers["colpali-engine"](documents, 3, memory=True)
    assert math.isnan(memory) or 0 <= memory < 50
    methods = [(p.method, p.engine) for p in poolers(peers)][-2:]
    assert methods == [("hierarchical, paper", e) for e in ("ours", "colpali-engine")]


def test_a_python_without_a_peer_is_refused(tmp_path):
    for given in (python(tmp_path, "sentence_transformers/__init__.py"), "/no/python"):
        with (
            pytest.raises(UserError, match="starts no peer.*maxsim-cpu"),
            benchmark.started([given], 1),
        ):
            pass


# ---------------------------------------------------------------- on a tiny model

TOPICS = ["matrix", "spline", "cluster", "integral", "filter", "random sample"]
TEXTS = [
    f"The {kind} {topic} is computed here from {kind} values of many kinds."
    for topic in TOPICS
    for kind in ("sparse", "dense")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    return load_model(tiny_colbert(folder, [*TEXTS, *TOPICS]), device="cpu")


@pytest.fixture(scope="module")
def collection():
    corpus = {str(i): text for i, text in enumerate(TEXTS)}
    queries = {f"q{i}": f"what is a {topic}" for i, topic in enumerate(TOPICS)}
    qrels = {f"q{i}": {str(2 * i): 1} for i in range(len(TOPICS))}
    return Collection("tiny", corpus, queries, qrels)


@pytest.fixture(scope="module")
def encoded(model, collection):
    return encode_collection(model, collection, progress=False)


def test_searches_of_the_same_vectors_agree_and_one_that_differs_is_reported(
    encoded, peers, monkeypatch
):
    found = benchmark.bench_search(encoded, peers, queries=6, repetitions=1).set_index("engine")
    engines = ["ours", "PyLate rank.rerank", "PyLate colbert_scores", "maxsim-cpu"]
    assert list(found.index) == engines
    assert (found["same_top_10"] == 1).all() and (found["seconds"] > 0).all()
    assert (found["queries"] == 6).all() and (found["documents"] == len(TEXTS)).all()
    exact = benchmark.exact_search
    shortened = lambda asked, documents, ids, k: exact(asked, documents[:10], ids[:10], k)  # noqa: E731
    monkeypatch.setattr(benchmark, "exact_search", shortened)
    found = benchmark.bench_search(encoded, {}, queries=6, repetitions=1).set_index("engine")
    assert found["same_top_10"]["ours"] == 1 and found["same_top_10"]["PyLate rank.rerank"] < 1


def test_the_quality_is_that_of_evaluations_with_either_kmeans(model, collection, monkeypatch):
    monkeypatch.setattr(benchmark, "load_collection", lambda name: collection)
    found = benchmark.bench_quality(model, ["docs:tiny"])
    encoded = encode_collection(model, benchmark.subset(collection, 100, 300), progress=False)
    for column, use_sklearn in {"ours": False, "scikit-learn": True}.items():
        rows, _ = evaluate_collection(encoded, ["kmeans"], FACTORS, use_sklearn=use_sklearn)
        expected = rows[rows["pool_method"] == "kmeans"].set_index("pool_factor")["ndcg@10"]
        for factor, part in found.groupby("pool_factor"):
            assert part[column].mean() == pytest.approx(expected[factor], abs=1e-6)
    assert (found["inertia_ours"] != found["inertia_scikit-learn"]).any()


def test_training_steps_pool_are_measured_and_leave_the_model_as_it_was(model, monkeypatch):
    seen, pooled = set(), training.pool_padded
    monkeypatch.setattr(
        training, "pool_padded", lambda *a, **k: seen.add((a[3], a[2])) or pooled(*a, **k)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = benchmark.bench_training(model, TEXTS * 3, TOPICS, 12).set_index("method")
    drawn = {factor for method, factor in seen if method != "none"}
    assert len(drawn) > 2 and drawn <= set(FACTORS)  # the same for all methods
    assert seen == {("none", 1), *itertools.product(METHODS, drawn)}
    assert list(found.index) == ["none", *METHODS]
    assert found.loc["none", "ratio"] == 1 and (found["seconds"] > 0).all()
    assert (found.loc[list(METHODS), "pooling_ms_per_document"] > 0).all()
    assert found.loc["none", "pooling_share"] == 0
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_growth_is_measured_with_all_that_pool_alike_and_who_is_slow_stops(peers, monkeypatch):
    monkeypatch.setattr(benchmark, "LENGTHS", (20, 40))
    monkeypatch.setattr(
        benchmark, "in_turns", lambda runs, _: {p: 2.0 * (p.engine == "SciPy") + 1 for p in runs}
    )
    growth = benchmark.bench_scaling([unit(200, 16)], peers)
    keys = ["document_length", "engine"]
    same = growth[growth["method"] == "hierarchical"].set_index(keys)["same_groups"]
    assert (same == 1).all() and len(same) == 4 + 3  # SciPy's 40 are missing
    other = growth[growth["engine"] == "colpali-engine"]
    assert (other["same_groups"] == 0).all()  # the stub cuts; ours pools
    assert growth["documents"].unique().tolist() == [10, 5]
    faster = benchmark.times_faster(growth, "document_length")
    assert faster.loc[("hierarchical", "PyLate")].tolist() == [1, 1]
    assert faster.loc[("hierarchical", "SciPy"), 20] == 3


# ---------------------------------------------------------------- what is stored


def test_what_is_measured_is_read_back_and_drawn(monkeypatch, tmp_path, model, collection):
    stored, _ = read()
    for name in stored:
        monkeypatch.setattr(benchmark, f"bench_{name}", lambda *_, name=name: stored[name])
    monkeypatch.setattr(benchmark, "untrained_model", lambda profile: model)
    monkeypatch.setattr(benchmark, "load_collection", lambda name: collection)
    threads = torch.get_num_threads()
    folder = benchmark.measure(tmp_path / "bench", threads=1)
    parts, machine = read(folder)
    assert set(parts) == set(stored) and machine["threads"] == 1
    assert torch.get_num_threads() == threads
    assert len(parts["training"]) == 2 * len(stored["training"])  # two lengths
    assert "1 thread" in draw(parts, machine).get_suptitle()


def test_the_stored_figure_shows_the_stored_measurements(tmp_path):
    benchmark.save(tmp_path)
    committed = benchmark.ROOT / "figures" / "bench" / "bench.svg"
    assert (tmp_path / "bench.svg").read_text("utf-8") == committed.read_text("utf-8")
    assert draw(*read()).alt.startswith("Documents pooled per second")
