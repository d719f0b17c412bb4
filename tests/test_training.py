"""Training: the loss against PyLate's, pool factors, gradients, resuming, the best epoch."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from pylate import losses

from l2p_utils import pooling, training
from l2p_utils import profile as profiles
from l2p_utils.collection import Collection
from l2p_utils.files import UserError
from l2p_utils.model import load_model
from l2p_utils.profile import Run, TrainingSettings, load_profile
from l2p_utils.training import (
    DEV_METRIC,
    PooledDistillation,
    fit,
    freeze,
    sample_pool_factor,
    training_rows,
)

TEXTS = [
    "Interpolate a function on a grid, with splines of any degree.",
    "Solve a linear system of equations!",
    "Return the eigenvalues (and vectors) of a symmetric matrix; sorted.",
    "Draw samples from a distribution.",
    "Filter a signal, forwards and backwards.",
    "Compute distances between all pairs of points in two sets.",
]


@pytest.fixture
def model(model_folder):
    """A fresh copy of the embedded model, in float32 on the CPU."""
    return load_model(model_folder, "cpu")


@pytest.fixture
def batch(model):
    """Two queries with three documents each, tokenised, and teacher scores."""
    queries = model.tokenize(["spline interpolation", "pairwise distances"], is_query=True)
    documents = model.tokenize(TEXTS, is_query=False)
    return [queries, documents], torch.tensor([[1.0, 0.4, 0.1], [0.2, 0.3, 0.9]])


@pytest.fixture
def collection():
    corpus = {f"d{i}": text for i, text in enumerate(TEXTS)}
    queries = {f"q{i}": text.split(",")[0].lower() for i, text in enumerate(TEXTS)}
    return Collection("tiny", corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(6)}, "dev")


@pytest.fixture
def rows(collection):
    """Twelve rows of three documents, the positive first."""
    made = []
    for i in range(12):
        ids = [f"d{(i + shift) % 6}" for shift in range(3)]
        made.append({"query_id": f"q{i % 6}", "document_ids": ids, "scores": [1.0, 0.5, 0.2]})
    return training_rows(Dataset.from_list(made), collection, None)


def settings(**changes):
    return TrainingSettings(**{"batch_size": 2, "epochs": 1, "checkpoint_steps": 2, **changes})


KMEANS = Run(collection="tiny", pool_method="kmeans", pool_factors="1-6")


class Stub(torch.nn.Module):
    """Stands for a model: gives back the token vectors that it was made with."""

    skiplist = [99]
    do_query_expansion = False

    def __init__(self, queries, documents):
        super().__init__()
        self.outputs = [queries, documents]

    def forward(self, features):
        return {"token_embeddings": self.outputs[features["which"]]}


def features(which, ids):
    return {"which": which, "input_ids": ids, "attention_mask": (ids > 0).long()}


# --- the loss


@pytest.mark.parametrize("pool_method", ["none", "span", "kmeans", "hierarchical"])
def test_with_factor_1_the_loss_is_pylates(model, batch, pool_method):
    sentence_features, labels = batch
    expected = losses.Distillation(model)(sentence_features, labels)
    ours = PooledDistillation(model, pool_method, [1])(sentence_features, labels)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    assert ours.item() > 1e-4  # not two zeros


def test_with_factor_1_the_gradients_are_pylates(model, batch):
    sentence_features, labels = batch
    weight = model[1].linear.weight
    expected = torch.autograd.grad(losses.Distillation(model)(sentence_features, labels), weight)
    ours = torch.autograd.grad(PooledDistillation(model)(sentence_features, labels), weight)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("pool_method", ["span", "kmeans", "hierarchical"])
def test_a_pool_factor_above_1_changes_the_loss(model, batch, pool_method):
    sentence_features, labels = batch
    unpooled = PooledDistillation(model, pool_method, [1])(sentence_features, labels)
    pooled = PooledDistillation(model, pool_method, [4])(sentence_features, labels)
    assert abs(pooled.item() - unpooled.item()) > 1e-5


def test_the_divergence_is_the_hand_worked_one():
    loss = PooledDistillation(Stub(None, None))
    scores = torch.tensor([[3.0, 1.0, 2.0]])  # min-max normalised: 1, 0, 1/2
    teacher = torch.tensor([[0.0, 0.0, 0.0]])  # softmax: a third each
    log_sum = math.log(math.e + 1 + math.exp(0.5))
    expected = sum(1 / 3 * (math.log(1 / 3) - (x - log_sum)) for x in (1, 0, 0.5))
    assert loss._divergence(scores, teacher).item() == pytest.approx(expected, abs=1e-6)


def test_equal_scores_do_not_divide_by_zero():
    loss = PooledDistillation(Stub(None, None))
    assert torch.isfinite(loss._divergence(torch.ones(2, 3), torch.rand(2, 3)))


@pytest.mark.parametrize("pool_method", ["span", "kmeans", "hierarchical"])
def test_gradients_reach_every_unmasked_token_and_no_other(pool_method):
    # Each document: [CLS], then pairs of near-identical vectors along the axes, one masked token
    # (id 99, in the skiplist) in between, padding last. The query looks along every axis, so every
    # cluster wins the maximum for some query token.
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(8)
    tokens = axes.repeat_interleave(2, dim=0)[:9]  # axis 0 (twice), 1 (twice), …, axis 4 (once)
    noise = 0.05 * torch.rand(3, 12, 8, generator=generator)
    documents = noise + torch.cat([axes[5:6], tokens[:4], axes[7:], tokens[4:], axes[6:7]])
    documents = documents[:, :12].clone().requires_grad_()
    queries = (axes[None] + 0.1).requires_grad_()  # (1, 8, 8)
    ids = torch.full((3, 12), 7)
    ids[:, 5], ids[:, 11] = 99, 0
    loss = PooledDistillation(Stub(queries, documents), pool_method, [2])
    value = loss(
        [features(0, torch.ones(1, 8, dtype=torch.long)), features(1, ids)],
        torch.tensor([[1.0, 0.0, 0.3]]),
    )
    value.backward()
    norms = documents.grad.norm(dim=-1)  # (documents, tokens)
    kept = (ids != 99) & (ids != 0)
    assert (norms[kept] > 0).all()
    assert (norms[~kept] == 0).all()


def test_scores_are_summed_in_float32_under_autocast(model, batch):
    seen = []
    loss = PooledDistillation(model, "span", [2])
    score = loss.score_metric
    loss.score_metric = lambda q, d, **masks: (
        seen.append((q.dtype, d.dtype)) or score(q, d, **masks)
    )
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*batch)
    assert seen == [(torch.float32, torch.float32)]
    assert value.dtype == torch.float32


def test_an_impossible_loss_is_refused(model):
    with pytest.raises(UserError, match="pool_factor is 0"):
        PooledDistillation(model, "span", [0])
    with pytest.raises(UserError, match="median"):
        PooledDistillation(model, "median", [2])


# --- pool factors


def test_sampled_factors_are_uniform():
    drawn = [sample_pool_factor([1, 2, 3, 4, 5, 6], 42, step) for step in range(6000)]
    counts = np.bincount(drawn, minlength=7)[1:]
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 15.09  # 99 % quantile with 5 degrees of freedom


def test_sampled_factors_depend_on_seed_and_step_alone():
    first = [sample_pool_factor([1, 2, 3], 1, step) for step in range(50)]
    np.random.seed(0)
    torch.manual_seed(0)
    assert first == [sample_pool_factor([1, 2, 3], 1, step) for step in range(50)]
    assert first[20:] == [sample_pool_factor([1, 2, 3], 1, step) for step in range(20, 50)]
    assert first != [sample_pool_factor([1, 2, 3], 2, step) for step in range(50)]


# --- rows


def test_rows_get_texts_and_lose_their_labels(collection):
    mined = [
        {"query_id": "q1", "document_ids": ["d1", "d0"], "scores": [1.0, 0.0], "labels": ["a", "b"]}
    ]
    (row,) = training_rows(Dataset.from_list(mined), collection, None)
    assert row == {
        "query": collection.queries["q1"],
        "documents": [TEXTS[1], TEXTS[0]],
        "scores": [1.0, 0.0],
    }


def test_fewer_rows_are_spread_over_all(collection):
    mined = [{"query_id": "q0", "document_ids": ["d0"], "scores": [float(i)]} for i in range(11)]
    rows = training_rows(Dataset.from_list(mined), collection, 3)
    assert [row["scores"] for row in rows] == [[0.0], [5.0], [10.0]]


@pytest.mark.parametrize(("query", "document"), [("q0", "gone"), ("gone", "d0")])
def test_a_row_about_something_unknown_is_refused(collection, query, document):
    mined = Dataset.from_list([{"query_id": query, "document_ids": [document], "scores": [1.0]}])
    with pytest.raises(UserError, match="01_data_mining again"):
        training_rows(mined, collection, None)


# --- the trainer


def test_frozen_layers_stay_as_they_were(model, rows, collection, tmp_path):
    before = {name: p.clone() for name, p in model.named_parameters()}
    fit(
        model,
        rows.select(range(4)),
        collection,
        KMEANS,
        settings(frozen_layers=2),
        1,
        tmp_path / "c",
    )
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any("layer.2." in name for name in changed)
    assert not any("layer.0." in n or "layer.1." in n or "embeddings" in n for n in changed)


def test_more_frozen_layers_than_there_are_is_refused(model):
    with pytest.raises(UserError, match="the encoder has 6 layers"):
        freeze(model, 7)


def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    model_folder, rows, collection, tmp_path, monkeypatch
):
    whole = fit(
        load_model(model_folder, "cpu"), rows, collection, KMEANS, settings(), 7, tmp_path / "a"
    )
    forward = PooledDistillation.forward

    def fail_at_step_4(self, *args):
        if self.step == 4:
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(PooledDistillation, "forward", fail_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        fit(
            load_model(model_folder, "cpu"), rows, collection, KMEANS, settings(), 7, tmp_path / "b"
        )
    monkeypatch.setattr(PooledDistillation, "forward", forward)
    torch.manual_seed(999)  # the process that goes on is another one
    resumed = fit(
        load_model(model_folder, "cpu"), rows, collection, KMEANS, settings(), 7, tmp_path / "b"
    )
    assert whole[1]["pool_factor"].tolist() == resumed[1]["pool_factor"].tolist()
    assert len(resumed[1].dropna(subset=["loss"])) == 6
    np.testing.assert_allclose(
        whole[1]["loss"].dropna(), resumed[1]["loss"].dropna(), atol=1e-5, rtol=1e-3
    )
    for ours, theirs in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_a_half_written_checkpoint_is_not_used(tmp_path):
    whole, half, empty = (tmp_path / f"checkpoint-{n}" for n in (2, 4, 6))
    for folder in (whole, half, empty):
        folder.mkdir()
    (whole / "trainer_state.json").write_text('{"global_step": 2}')
    (half / "trainer_state.json").write_text('{"global_st')
    assert training._last_whole_checkpoint(tmp_path) == str(whole)
    assert not half.exists() and not empty.exists()


def test_the_best_epoch_is_kept(model, rows, collection, tmp_path, monkeypatch):
    scores, weights = iter([0.5, 0.9, 0.3]), []

    def judge(self, model, *args, **kwargs):
        weights.append(model[1].linear.weight.detach().clone())
        return {DEV_METRIC: next(scores)}

    monkeypatch.setattr(training.DevEvaluator, "__call__", judge)
    run = Run(collection="tiny", pool_method="none")
    three = settings(epochs=3, learning_rate=1e-3)
    best, log = fit(model, rows.select(range(4)), collection, run, three, 1, tmp_path / "c")
    assert log[DEV_METRIC].dropna().tolist() == [0.5, 0.9, 0.3]
    torch.testing.assert_close(best[1].linear.weight, weights[1])
    assert not torch.equal(weights[1], weights[2])


# --- the stage


@pytest.fixture
def tiny_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    return load_profile("smoke")


def test_training_without_mined_rows_says_what_to_do(tiny_profile):
    with pytest.raises(UserError, match="01_data_mining"):
        training.train(tiny_profile, "docs:scipy", "kmeans", [1, 2])


@pytest.mark.parametrize(("method", "factors"), [("kmeans", [1]), ("none", [1, 2]), ("none", [2])])
def test_a_run_that_means_nothing_is_refused(tiny_profile, method, factors):
    with pytest.raises(UserError, match="the other way round"):
        training.train(tiny_profile, "docs:scipy", method, factors)


def test_the_warm_up_is_unpooled(tiny_profile):
    with pytest.raises(UserError, match="warm-up's collection"):
        training.train(tiny_profile, "docs:transformers", "kmeans", [1, 2])


@pytest.fixture
def folder_profile(tiny_profile, collection, model_folder, tmp_path):
    """A profile whose runs are on a folder in BEIR's layout; its baseline is the embedded model."""
    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", collection.corpus), ("queries", collection.queries)):
        lines = [json.dumps({"_id": i, "text": text}) for i, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    judged = [f"q{i}\td{i}\t1" for i in range(6)]
    (folder / "qrels" / "train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]))
    (folder / "qrels" / "dev.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", judged[0]]))
    (tiny_profile.folder / "models").mkdir(parents=True)
    (tiny_profile.folder / "models" / "baseline").symlink_to(model_folder)
    return tiny_profile, folder


def test_the_stage_from_mining_to_a_model_that_is_reused(folder_profile, monkeypatch):
    profile, folder = folder_profile
    from l2p_utils import mining

    monkeypatch.setattr(
        mining, "untrained_model", lambda _: load_model(profile.folder / "models/baseline")
    )
    mining.mine(profile, str(folder), progress=False)
    made = training.train(profile, str(folder), "span", [1, 2], progress=False)
    assert made.name == "tiny-span-pf1-2-s42"
    log = training.read_training_log(made)
    assert {"step", "loss", "pool_factor", DEV_METRIC} <= set(log)
    assert load_model(made).encode(["a b c"], is_query=False)[0].shape[1] == 128
    assert not (profile.folder / "checkpoints" / made.name).exists()

    def not_again(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "fit", not_again)
    assert training.train(profile, str(folder), "span", [1, 2], progress=False) == made
    with pytest.raises(AssertionError, match="trained again"):
        training.train(profile, str(folder), "span", [1, 2], seed=43, progress=False)


def test_a_model_of_the_other_kmeans_is_not_reused(folder_profile, monkeypatch):
    profile, folder = folder_profile
    from l2p_utils import mining

    monkeypatch.setattr(
        mining, "untrained_model", lambda _: load_model(profile.folder / "models/baseline")
    )
    mining.mine(profile, str(folder), progress=False)
    asked = []

    class Asked(Exception):
        pass

    def note(model, rows, dev, run, settings, seed, folder, precision, progress, use_sklearn):
        asked.append((run.pool_method, use_sklearn))
        raise Asked

    monkeypatch.setattr(training, "fit", note)
    monkeypatch.setattr(
        training, "settings_match", lambda _, settings: asked.append(settings["pooling"])
    )
    for use_sklearn in (False, True):
        chosen = profile.model_copy(update={"use_sklearn": use_sklearn})
        with pytest.raises(Asked):
            training.train(chosen, str(folder), "kmeans", [1, 2], progress=False)
    once = ["fast", "fast", ("kmeans", False)]  # the model's settings, its checkpoints', the fit
    assert asked == [*once, "sklearn", "sklearn", ("kmeans", True)]


@pytest.mark.parametrize("use_sklearn", [False, True])
def test_the_loss_pools_with_the_kmeans_that_it_was_given(model, batch, monkeypatch, use_sklearn):
    refused = "_sklearn_kmeans" if not use_sklearn else "_fast_kmeans"
    monkeypatch.setattr(pooling, refused, None)
    PooledDistillation(model, "kmeans", [3], use_sklearn=use_sklearn)(*batch).backward()
