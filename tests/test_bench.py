"""The bench: contestants pool alike, medians and verdicts are right, tables tell what came out."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from l2p_utils import bench
from l2p_utils.bench import Target, bench_pooling, in_turns, peak_memory, spread, targets
from l2p_utils.bench_figure import save_bench
from l2p_utils.bench_peers import poolers
from l2p_utils.pooling import pooled_count


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    lengths = [30, 17, 24]
    return [
        torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=1)
        for n in lengths
    ]


@pytest.fixture(scope="module")
def pooling(documents):
    return bench_pooling({96: documents}, repetitions=1)


@pytest.mark.parametrize("pooler", poolers(), ids=lambda p: f"{p.method}-{p.engine}")
def test_every_contestant_does_the_same_work(pooler, documents):
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    pooled = pooler.pool(documents, 3)
    expected = [pooled_count(len(document), 3, pooler.method) for document in documents]
    assert [len(document) for document in pooled] == expected
    for document, vectors in zip(documents, pooled, strict=True):
        assert torch.equal(vectors[0], document[0])  # protected
        assert vectors.dtype == torch.float32
    # fastkmeans seeds the global generators
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.random.get_rng_state(), before[1])


@pytest.mark.parametrize("method", ["span", "hierarchical"])
def test_contestants_of_a_deterministic_method_give_the_same_vectors(method, documents):
    first, *others = [p.pool(documents, 4) for p in poolers() if p.method == method]
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            distances = torch.cdist(ours, theirs)
            assert distances.min(dim=0).values.max() < 1e-3  # in any order
            assert distances.min(dim=1).values.max() < 1e-3


def test_the_sweep_gives_what_single_factors_give(documents):
    for pooler in poolers():
        if pooler.sweep:
            for factor, pooled in pooler.sweep(documents, [2, 5]).items():
                for a, b in zip(pooled, pooler.pool(documents, factor), strict=True):
                    torch.testing.assert_close(a, b)


def test_contestants_take_turns_and_the_median_counts(monkeypatch):
    seen, clock = [], iter([0, 1, 10, 12, 20, 29, 30, 32, 40, 43, 50, 57])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    found = in_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3, warm=False)
    assert seen == ["a", "b"] * 3
    assert found == {"a": 3, "b": 2}  # of 1, 9, 3 and of 2, 2, 7


def test_spread_by_hand():
    document = torch.tensor([[9.0, 9.0], [0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    pooled = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 3.0]])  # the first is protected
    assert spread([document], [pooled]) == pytest.approx(1 + 1 + 0)


def test_peak_memory_sees_what_a_call_takes_and_gives_back():
    taken = peak_memory(lambda: torch.ones(64, 2**20).sum())  # 256 MiB
    assert math.isnan(taken) or 200 < taken < 400


@pytest.mark.parametrize(
    ("value", "sign", "met"), [(3, "≥", True), (2.9, "≥", False), (3, "≤", True), (3.1, "≤", False)]
)
def test_verdicts(value, sign, met):
    assert Target("", value, sign, 3).met is met


def test_pooling_is_measured_at_every_factor_and_over_all(pooling):
    factors = {"2", "3", "4", "5", "6", "2-6"}
    for _, part in pooling.groupby(["method", "engine"]):
        assert set(part["pool_factor"]) == factors
        speed = part.set_index("pool_factor")["documents_per_second"]
        assert (speed > 0).all()
    single = pooling[(pooling["engine"] == "PyLate")].set_index("pool_factor")["seconds"]
    assert single["2-6"] == pytest.approx(single.drop("2-6").sum())


@pytest.fixture
def parts(pooling):
    methods = ["none", "span", "kmeans", "hierarchical"]
    training = {"document_length": 128, "method": methods, "seconds": 2.0}
    training |= {"ratio": [1, 1.05, 1.2, 1.1], "pooling_share": 0.01}
    quality = {"collection": "c", "pool_factor": [2, 3] * 2, "query_id": ["a", "a", "b", "b"]}
    quality |= {"ours": [0.6, 0.5, 1.0, 0.9], "scikit-learn": [0.5, 0.5, 1.0, 0.8]}
    quality |= {"spread_ours": [1.0, 3.0] * 2, "spread_scikit-learn": [2.0, 2.0] * 2}
    search = {"engine": ["ours", "x", "y"], "seconds": [1.0, 2.0, 9.0], "same_top_10": 1.0}
    return {
        "pooling": pooling,
        "search": pd.DataFrame(search),
        "sweep": pd.DataFrame({"stage": ["encode", "all settings"], "seconds": [4.0, 3.0]}),
        "training": pd.DataFrame(training | {"pooling_ms_per_document": 0.5}),
        "quality": pd.DataFrame(quality),
    }


def test_targets_by_hand(parts):
    found = {target.name: target for target in targets(parts)}
    assert found["exact search, times PyLate's faster way"].value == 2
    assert not found["exact search, times PyLate's faster way"].met
    assert found["all 16 settings / encoding once"].value == 0.75
    assert not found["training step with kmeans / unpooled, 128 tokens"].met
    assert found["training step with span / unpooled, 128 tokens"].met
    worst = found["kmeans inertia / scikit-learn's over collections, worst factor"]
    assert worst.value == 1.5 and not worst.met
    # differences of the queries' means: .05 and .05
    assert found["NDCG@10 points of kmeans less scikit-learn's: not higher than"].value == (
        pytest.approx(5)
    )


def test_tables_and_projection_say_what_was_measured(parts):
    text = bench.tables(parts, targets(parts))
    assert "| kmeans | scikit-learn | 96 |" in text
    assert "| kmeans | 128 | 2.00 | 1.20 | 1.0% | 0.50 | 128 |" in text
    assert "| all 16 settings / encoding once | ≤ 1 | 0.75 | met |" in text
    assert "**not met**" in text
    # 256 documents at .5 ms: 128 ms beside a step of 250, 500, 1,000 ms
    assert "128 ms: 34% / 20% / 11%" in bench.projection(parts["training"])


def test_the_figure_is_written(pooling, tmp_path):
    growth = {"axis": "tokens", "size": [64, 128], "method": "kmeans", "engine": "ours"}
    scaling = pd.DataFrame(growth | {"seconds_per_document": [0.001, 0.003]})
    files = save_bench(pooling, scaling, tmp_path)
    assert {file.name for file in files} == {"bench.png", "bench.svg"}
    assert all(file.stat().st_size > 1000 for file in files)
