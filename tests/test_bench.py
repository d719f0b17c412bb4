"""The bench: contestants pool alike, medians and verdicts are right, tables tell what came out."""

import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from l2p_utils import bench
from l2p_utils.bench import (
    METHODS,
    bench_ndcg,
    bench_pooling,
    bench_quality,
    bench_scaling,
    bench_search,
    bench_sweep,
    bench_training,
    in_turns,
    peak_memory,
    spread,
)
from l2p_utils.bench_figure import draw_bench, save_bench
from l2p_utils.bench_peers import poolers
from l2p_utils.bench_report import (
    FACTORS,
    PARTS,
    Target,
    projection,
    read_parts,
    tables,
    targets,
    write_report,
)
from l2p_utils.bench_report import main as report
from l2p_utils.collection import Collection
from l2p_utils.evaluation import encode_collection, evaluate_collection
from l2p_utils.files import ROOT, UserError
from l2p_utils.model import load_model
from l2p_utils.pooling import pooled_count
from tests.tiny import tiny_colbert


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
    engines = ["ours", "PyLate rank.rerank", "PyLate colbert_scores"]
    search = {"engine": engines, "seconds": [1.0, 9.0, 2.0], "same_top_10": [1.0, 1.0, 0.9]}
    search |= {"queries": 60, "documents": 1000, "peak_mib": 8.0}
    ndcg = {"method": "kmeans", "engine": "ours", "pool_factor": FACTORS, "ndcg@10": 0.5}
    return {
        "pooling": pooling,
        "search": pd.DataFrame(search),
        "ndcg": pd.DataFrame(ndcg),
        "sweep": pd.DataFrame({"stage": ["encode", "all settings"], "seconds": [4.0, 3.0]}),
        "training": pd.DataFrame(training | {"pooling_ms_per_document": 0.5}),
        "quality": pd.DataFrame(quality),
    }


def test_targets_by_hand(parts):
    found = {target.name: target for target in targets(parts)}
    assert found["exact search, times PyLate's rank"].value == 9
    assert not found["exact search, times PyLate's bare scoring"].met
    assert found["exact search, share of equal top 10 (least)"].value == 0.9
    assert found["all 16 settings / encoding once"].value == 0.75
    assert not found["training step with kmeans / unpooled, 128 tokens"].met
    assert found["training step with span / unpooled, 128 tokens"].met
    worst = found["kmeans inertia / scikit-learn's over collections, worst factor"]
    assert worst.value == 1.5 and not worst.met
    # differences of the queries' means: .05 and .05
    assert found["NDCG@10 points of kmeans less scikit-learn's: not higher than"].value == (
        pytest.approx(5)
    )


def test_targets_of_speed_by_hand(parts):
    seconds = {
        "kmeans": {"ours": [1, 1, 1, 1, 1, 2], "scikit-learn": [9, 9, 9, 9, 9, 14]},
        "hierarchical": {"ours": [1, 1, 1, 1, 1, 4], "PyLate": [5, 4, 3, 2, 1, 15]},
        "span": {"ours": [1, 1, 1, 1, 1, 5], "loop over groups": [50, 40, 30, 20, 11, 151]},
    }
    spreads = {"ours": [1.0, 1, 1, 1, 2, 0], "scikit-learn": [2.0, 2, 2, 2, 1.9, 0]}
    rows = [
        {"document_length": 96, "method": method, "engine": engine, "pool_factor": factor}
        | {"seconds": value, "documents_per_second": 60 / value, "spread": tight}
        for method, engines in seconds.items()
        for engine, values in engines.items()
        for factor, value, tight in zip(
            [*"23456", "2-6"], values, spreads.get(engine, [1.0] * 6), strict=True
        )
    ]
    found = {t.name: t.value for t in targets(parts | {"pooling": pd.DataFrame(rows)})}
    assert found["kmeans PF 2–6, times scikit-learn, 96 word pieces"] == 7
    assert found["kmeans inertia / scikit-learn's, worst factor, 96 word pieces"] == 2 / 1.9
    assert found["hierarchical, times PyLate at one factor (least), 96 word pieces"] == 1
    assert found["span, times a loop over groups (least), 96 word pieces"] == 11
    assert found["kmeans, five poolings / one sweep, 96 word pieces"] == 2.5
    assert found["hierarchical, five poolings / one sweep, 96 word pieces"] == 1.25


def test_tables_and_projection_say_what_was_measured(parts):
    text = tables(parts, targets(parts))
    assert "| kmeans | scikit-learn | 96 |" in text
    assert "| kmeans | ours | 0.500 |" in text
    assert "| PyLate rank.rerank | 60 | 1,000 | 9.000 | 9.0 × | 100% | 8 |" in text
    assert "| kmeans | 128 | 2.00 | 1.20 | 1.0% | 0.50 | 128 |" in text
    assert "| all 16 settings / encoding once | ≤ 1 | 0.75 | met |" in text
    assert "**not met**" in text
    # 256 documents at .5 ms: 128 ms beside a step of 250, 500, 1,000 ms
    assert "128 ms: 34% / 20% / 11%" in projection(parts["training"])


def test_the_figure_is_written(pooling, tmp_path):
    growth = {"axis": "tokens", "size": [64, 128], "method": "kmeans", "engine": "ours"}
    scaling = pd.DataFrame(growth | {"seconds_per_document": [0.001, 0.003]})
    machine = {"threads": 1, "processor": "some processor"}
    title = draw_bench(pooling, scaling, machine).get_suptitle()
    assert "1 thread" in title and "some processor" in title
    files = save_bench(pooling, scaling, tmp_path, machine)
    assert {file.name for file in files} == {"bench.png", "bench.svg"}
    assert all(file.stat().st_size > 1000 for file in files)


# --- every measurement, on a few documents of a tiny model ------------------------------------

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
    return Collection("made", corpus, queries, qrels)


@pytest.fixture(scope="module")
def encoded(model, collection):
    return encode_collection(model, collection, progress=False)


def test_all_searches_find_the_same_in_the_whole_collection(encoded):
    found = bench_search(encoded, queries=4, repetitions=1).set_index("engine")
    assert list(found.index) == ["ours", "PyLate rank.rerank", "PyLate colbert_scores"]
    assert (found["same_top_10"] == 1).all() and (found["seconds"] > 0).all()
    assert (found["queries"] == 4).all() and (found["documents"] == len(TEXTS)).all()


def test_a_search_that_finds_something_else_is_told(encoded, monkeypatch):
    exact = bench.exact_search

    def shortened(queries, documents, ids, top_k=20):
        return exact(queries, documents[:10], ids[:10], top_k)

    monkeypatch.setattr(bench, "exact_search", shortened)
    found = bench_search(encoded, queries=6, repetitions=1).set_index("engine")["same_top_10"]
    assert found["ours"] == 1 and found["PyLate rank.rerank"] < 1


def test_the_quality_is_that_of_evaluations_with_either_kmeans(model, collection, monkeypatch):
    monkeypatch.setattr(bench, "load_collection", lambda name: collection)
    monkeypatch.setattr(bench, "FACTORS", [2, 3])
    found = bench_quality(model, ["made"], progress=print)
    encoded = encode_collection(model, bench.subset(collection, 100, 300), progress=False)
    for column, use_sklearn in {"ours": False, "scikit-learn": True}.items():
        rows, _ = evaluate_collection(encoded, ["kmeans"], [2, 3], use_sklearn=use_sklearn)
        expected = rows[rows["pool_method"] == "kmeans"].set_index("pool_factor")["ndcg@10"]
        for factor, part in found.groupby("pool_factor"):
            assert part[column].mean() == pytest.approx(expected[factor], abs=1e-6)
    assert (found["spread_ours"] != found["spread_scikit-learn"]).any()


def test_ndcg_is_measured_with_every_contestant_and_factor(encoded):
    found = bench_ndcg(encoded).set_index(["method", "engine", "pool_factor"])["ndcg@10"]
    assert len(found) == len(poolers()) * len(FACTORS) and found.between(0, 1).all()
    for factor in FACTORS:
        assert found["hierarchical", "ours", factor] == found["hierarchical", "SciPy", factor]
        rows, _ = evaluate_collection(encoded, ["span"], [factor])
        assert found["span", "ours", factor] == pytest.approx(rows["ndcg@10"].iloc[1], abs=1e-6)


def test_training_steps_are_measured_and_leave_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = bench_training(model, TEXTS * 3, TOPICS, 2).set_index("method")
    assert list(found.index) == ["none", *METHODS]
    assert found.loc["none", "ratio"] == 1 and (found["seconds"] > 0).all()
    assert (found.loc[METHODS, "pooling_ms_per_document"] > 0).all()
    assert (found["pooling_share"] < 1).all()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_every_measured_training_step_pools(model, monkeypatch):
    seen = []

    class Noted(bench.PooledDistillation):
        def __init__(self, *arguments):
            seen.append(list(arguments[2]) if len(arguments) > 2 else None)
            super().__init__(*arguments)

    monkeypatch.setattr(bench, "PooledDistillation", Noted)
    bench_training(model, TEXTS * 3, TOPICS, 1)
    assert seen == [None, FACTORS, FACTORS, FACTORS]


def test_growth_and_the_stages_of_an_evaluation_are_measured(model, encoded):
    line = torch.randn(24_576, 16, generator=torch.Generator().manual_seed(0))
    growth = bench_scaling([torch.nn.functional.normalize(line, dim=1)], repetitions=1)
    sizes = growth.groupby("axis")["size"].unique()
    assert list(sizes["tokens"]) == [64, 128, 256, 512, 1024]
    assert list(sizes["documents"]) == [16, 64, 256]
    assert len(growth) == 8 * 6 and (growth["seconds_per_document"] > 0).all()
    stages = bench_sweep(model, encoded, TEXTS)
    assert list(stages["stage"]) == ["encode", "all settings"] and (stages["seconds"] > 0).all()


STORED = ROOT / "figures" / "bench"


def test_the_stored_report_comes_of_the_stored_measurements(tmp_path):
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    for name in ("table.md", "bench.png", "bench.svg"):
        (tmp_path / name).unlink()
    report([str(tmp_path)])
    assert (tmp_path / "bench.png").stat().st_size > 1000
    for name in ("table.md", "bench.svg"):
        assert (tmp_path / name).read_text("utf-8") == (STORED / name).read_text("utf-8"), name


def test_nothing_in_the_figure_is_cut_off_or_written_over():
    parts = read_parts(STORED)
    machine = {"threads": 1, "processor": "AMD EPYC 7B13 64-Core Processor"}
    figure = draw_bench(parts["pooling"], parts["scaling"], machine)
    figure.draw_without_rendering()
    inches = figure.get_tightbbox()
    assert inches.x0 >= 0 and inches.y0 >= 0
    assert inches.x1 <= figure.get_figwidth() and inches.y1 <= figure.get_figheight()
    for left, right in zip(figure.axes[::2], figure.axes[1::2], strict=True):
        assert not left.xaxis.label.get_window_extent().overlaps(
            right.xaxis.label.get_window_extent()
        )


def test_a_folder_without_measurements_is_no_bench(tmp_path):
    (tmp_path / "pooling.csv").write_text("")
    with pytest.raises(UserError, match=r"lacks scaling.csv, .*make bench"):
        write_report(tmp_path)
    with pytest.raises(SystemExit, match="lacks"):
        report([str(tmp_path)])
    assert not (tmp_path / "table.md").exists()


def test_what_was_measured_is_kept_when_its_report_fails(monkeypatch, tmp_path, model, collection):
    made = pd.DataFrame({"a": [1]})
    for name in PARTS:
        monkeypatch.setattr(bench, f"bench_{name}", lambda *_, **__: made)
    profile = bench.load_profile("quick")
    monkeypatch.setattr(type(profile), "folder", tmp_path)
    monkeypatch.setattr(bench, "untrained_model", lambda profile: model)
    monkeypatch.setattr(bench, "load_collection", lambda name: collection)
    with pytest.raises(KeyError):  # made-up measurements have no such columns
        bench.run()
    assert {file.stem for file in tmp_path.glob("*.csv")} == set(PARTS)
    assert (tmp_path / "machine.json").is_file()
