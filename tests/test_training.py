"""Training: the loss against PyLate's, pool factors, gradients, resuming, the best epoch."""

import errno
import functools
import json
import math
import multiprocessing
import shutil
import time
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from pylate import losses
from safetensors import SafetensorError
from tiny import tiny_colbert
from transformers import TrainerState

from l2p_utils import candidates, distillation, evaluation, fitting, mining, pooling, training
from l2p_utils import profile as profiles
from l2p_utils.collection import Collection, carves_dev
from l2p_utils.distillation import PooledDistillation, sample_pool_factor
from l2p_utils.files import UserError, read_json
from l2p_utils.fitting import DEV_METRIC, fit, freeze
from l2p_utils.model import PooledColBERT, load_model, quiet_loading
from l2p_utils.profile import Run, TrainingSettings, load_profile
from l2p_utils.training import training_rows

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
    """A fresh copy of the bundled model, in float32 on the CPU."""
    return load_model(model_folder, "cpu")


@pytest.fixture
def batch(model):
    """Two queries with three documents each, tokenised, and teacher scores."""
    queries = model.tokenize(["spline interpolation", "pairwise distances"], is_query=True)
    documents = model.tokenize(TEXTS, is_query=False)
    return [queries, documents], torch.tensor([[1.0, 0.4, 0.1], [0.2, 0.3, 0.9]])


@pytest.fixture
def collection():
    return the_collection()


def the_collection():
    corpus = {f"d{i}": text for i, text in enumerate(TEXTS)}
    queries = {f"q{i}": text.split(",")[0].lower() for i, text in enumerate(TEXTS)}
    return Collection("tiny", corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(6)}, "dev")


@pytest.fixture
def rows():
    return the_rows()


def the_rows():
    """Twelve rows of three documents, the positive first."""
    made = []
    for i in range(12):
        ids = [f"d{(i + shift) % 6}" for shift in range(3)]
        made.append({"query_id": f"q{i % 6}", "document_ids": ids, "scores": [1.0, 0.5, 0.2]})
    return training_rows(Dataset.from_list(made), the_collection(), None)


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
    assert fitting._last_whole_checkpoint(tmp_path) == str(whole)
    assert not half.exists() and not empty.exists()


def test_the_best_epoch_is_kept(model, rows, collection, tmp_path, monkeypatch):
    scores, weights = iter([0.5, 0.9, 0.3]), []

    def judge(self, model, *args, **kwargs):
        weights.append(model[1].linear.weight.detach().clone())
        return {DEV_METRIC: next(scores)}

    monkeypatch.setattr(fitting.DevEvaluator, "__call__", judge)
    run = Run(collection="tiny", pool_method="none")
    three = settings(epochs=3, learning_rate=1e-3)
    best, log, _ = fit(model, rows.select(range(4)), collection, run, three, 1, tmp_path / "c")
    assert log[DEV_METRIC].dropna().tolist() == [0.5, 0.9, 0.3]
    torch.testing.assert_close(best[1].linear.weight, weights[1])
    assert not torch.equal(weights[1], weights[2])


# --- in parts: what memory does not hold at once


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return tiny_colbert(tmp_path_factory.mktemp("tiny") / "bert", TEXTS)


def trainer_of(model, rows, folder, **changes):
    loss = PooledDistillation(model, "kmeans", [2])
    return fitting.StepTrainer(
        model=model,
        args=fitting._arguments(
            settings(**changes), len(rows), 1, folder, "float32", False, torch.device("cpu")
        ),
        train_dataset=rows,
        loss=loss,
        evaluator=lambda *args, **kwargs: {},
        data_collator=fitting.ColBERTCollator(
            lambda texts, is_query, pad, task: model.tokenize(texts, is_query=is_query)
        ),
    )


@pytest.mark.parametrize("micro_batch", [6, 4, 3, 1])
def test_a_step_in_parts_has_the_whole_batchs_gradient(model, rows, tmp_path, micro_batch):
    # Among the six rows are documents of many lengths; six in parts of four are four and two.
    trainer = trainer_of(model, rows.select(range(6)), tmp_path, batch_size=6)
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.loss([part(inputs, "query"), part(inputs, "documents")], inputs["label"])
    weights = {n: p for n, p in model.named_parameters() if "pooler" not in n}
    expected = torch.autograd.grad(loss, list(weights.values()))
    trainer.create_optimizer()
    trainer.micro_batch = micro_batch
    value = trainer.training_step(model, inputs)
    assert value.item() == pytest.approx(loss.item(), abs=1e-6)
    for (name, weight), gradient in zip(weights.items(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=0, msg=name)
    assert max(gradient.abs().max() for gradient in expected) > 1e-4


def part(inputs, column):
    start = f"{column}_"
    return {k[len(start) :]: v for k, v in inputs.items() if k.startswith(start)}


def fit_tiny(folder, rows, collection, checkpoints, **changes):
    model = load_model(folder, "cpu")
    four = settings(batch_size=4, learning_rate=1e-3, **changes)
    span = Run(collection="tiny", pool_method="span", pool_factors="1-6")
    fitted = fit(model, rows, collection, span, four, 7, checkpoints, "float32", progress=False)
    return {n: p.detach() for n, p in model.named_parameters()}, fitted


def limit_memory(monkeypatch, rows, error):
    """Let the loss fail for more than `rows` rows; give back the rows and texts of each try."""
    tried, scores = [], PooledDistillation._scores

    def limited(self, queries, *args):
        tried.append((self.step, len(queries)))
        if len(queries) > rows:
            raise error
        return scores(self, queries, *args)

    monkeypatch.setattr(PooledDistillation, "_scores", limited)
    return tried


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["torch", "cublas", "cpu"])
def test_out_of_memory_is_answered_by_fewer_rows_at_a_time(
    tiny_folder, rows, collection, tmp_path, monkeypatch, capsys, error
):
    rows = rows.select(range(11))  # the last step has three rows
    expected, whole = fit_tiny(tiny_folder, rows, collection, tmp_path / "a")
    assert whole.cost.micro_batch == 4
    tried = limit_memory(monkeypatch, 1, error)
    found, parts = fit_tiny(tiny_folder, rows, collection, tmp_path / "b")
    # step 0: four, two, then one at a time, and so it stays
    assert tried == [(0, 4), (0, 2), *[(0, 1)] * 4, *[(1, 1)] * 4, *[(2, 1)] * 3]
    assert parts.cost.micro_batch == 1
    notice = capsys.readouterr().err
    assert "Out of memory with 4 rows at a time" in notice
    assert "with 1 at a time; a step keeps its 4 rows" in notice
    for column in ("step", "pool_factor"):
        assert parts.log[column].tolist() == whole.log[column].tolist()
    np.testing.assert_allclose(parts.log["loss"], whole.log["loss"], atol=1e-6)
    for name, value in expected.items():
        if not name.endswith("key.bias"):  # no gradient but rounding, which Adam makes large
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)


def test_a_training_goes_on_in_its_second_epoch_with_the_same_rows(
    tiny_folder, rows, collection, tmp_path, monkeypatch
):
    given, forward = [], PooledDistillation.forward

    def watched(self, features, labels):
        given.append((self.step, features[0]["input_ids"].tolist()))
        if self.step == 5 and len(given) == 12:  # the last step, not of the first training
            raise KeyboardInterrupt
        return forward(self, features, labels)

    monkeypatch.setattr(PooledDistillation, "forward", watched)
    expected, whole = fit_tiny(tiny_folder, rows, collection, tmp_path / "a", epochs=2)
    with pytest.raises(KeyboardInterrupt):
        fit_tiny(tiny_folder, rows, collection, tmp_path / "b", epochs=2)
    found, resumed = fit_tiny(tiny_folder, rows, collection, tmp_path / "b", epochs=2)
    assert given[12:] == given[4:6]  # three steps an epoch, a checkpoint after the fourth
    assert [row for _, batch in given[:3] for row in batch] != [
        row for _, batch in given[3:6] for row in batch
    ]
    assert resumed.cost.resumed_at == 4
    assert resumed.log["loss"].dropna().tolist() == whole.log["loss"].dropna().tolist()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# --- killed at an epoch's end, between the checkpoint and the best epoch's model


KILLED = KeyboardInterrupt("as a kill: nothing catches it")
PLACES = {  # whose call, and whether before or after what it does
    "after the checkpoint": (fitting.StepTrainer, "_save_checkpoint", "after"),
    "in the dev evaluation": (fitting, "exact_search", "before"),
    "before the best is saved": (fitting._KeepBest, "on_evaluate", "before"),
    "in saving the best": (fitting, "write_json", "before"),
    "after the best was saved": (fitting._KeepBest, "on_evaluate", "after"),
}


def kill_at(monkeypatch, place, epoch):
    """Kill at a place that is passed once an epoch."""
    owner, name, when = PLACES[place]
    original, calls = getattr(owner, name), []

    def killed(*args, **kwargs):
        calls.append(name)
        if len(calls) == epoch and when == "before":
            raise KILLED
        found = original(*args, **kwargs)
        if len(calls) == epoch:
            raise KILLED
        return found

    monkeypatch.setattr(owner, name, killed)


def judge_by_epoch(monkeypatch, dev):
    """Let these be the epochs' dev values; the real evaluation runs as well."""
    real = fitting.DevEvaluator.__call__

    def judge(self, model, *args, epoch, **kwargs):
        real(self, model)
        return {DEV_METRIC: dev[round(epoch) - 1]}

    monkeypatch.setattr(fitting.DevEvaluator, "__call__", judge)


def fit_with_dropout(folder, rows, collection, checkpoints, epochs):
    """Three steps an epoch, a checkpoint after the third; dropout shows what was drawn before."""
    model = load_model(folder, "cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    three = settings(batch_size=4, epochs=epochs, checkpoint_steps=3, learning_rate=1e-3)
    span = Run(collection="tiny", pool_method="span", pool_factors="1-6")
    best, log, _ = fit(model, rows, collection, span, three, 7, checkpoints, "float32", False)
    weights = {name: value.detach() for name, value in best.named_parameters()}
    return weights, log, read_json(checkpoints / "best" / "provenance.json")


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder, tmp_path_factory):
    """The training by its dev values: each is made once."""

    @functools.cache
    def made(*dev):
        folder = tmp_path_factory.mktemp("whole") / "c"
        return fit_with_dropout(tiny_folder, the_rows(), the_collection(), folder, len(dev))

    return made


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("dev", "killed_in"), [([0.5], 1), ([0.4, 0.6], 1), ([0.4, 0.6], 2), ([0.6, 0.4], 1)]
)
def test_a_training_killed_at_an_epochs_end_ends_as_an_uninterrupted_one(
    tiny_folder, rows, collection, tmp_path, monkeypatch, uninterrupted, place, dev, killed_in
):
    judge_by_epoch(monkeypatch, dev)
    expected, log, best = uninterrupted(*dev)
    given = (tiny_folder, rows, collection, tmp_path / "c", len(dev))
    with monkeypatch.context() as patch:
        kill_at(patch, place, killed_in)
        with pytest.raises(KeyboardInterrupt):
            fit_with_dropout(*given)
    torch.manual_seed(999)  # the process that goes on is another one
    found = fit_with_dropout(*given)
    pd.testing.assert_frame_equal(found[1], log)
    assert found[2] == best == {DEV_METRIC: max(dev), "epoch": dev.index(max(dev)) + 1}
    assert all(torch.equal(found[0][name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("owner", "writing", "error"),
    [
        (torch, "save", RuntimeError("[enforce fail at …] . unexpected pos 576 vs 534")),
        (PooledColBERT, "save_pretrained", SafetensorError("I/O error: … (os error 28)")),
        (TrainerState, "save_to_json", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_full_disk_is_told_and_the_training_goes_on_from_the_checkpoint_before(
    tiny_folder, rows, collection, tmp_path, monkeypatch, owner, writing, error
):
    steps = {"checkpoint_steps": 1}
    expected, _ = fit_tiny(tiny_folder, rows, collection, tmp_path / "a", **steps)
    original = getattr(owner, writing)

    def write(*given, **kwargs):
        if any("checkpoint-2" in str(one) for one in given):
            raise error
        return original(*given, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, writing, write)
        with pytest.raises(UserError, match="disk is full: .*checkpoint-2.*free some space"):
            fit_tiny(tiny_folder, rows, collection, tmp_path / "b", **steps)
    found, resumed = fit_tiny(tiny_folder, rows, collection, tmp_path / "b", **steps)
    assert resumed.cost.resumed_at == 1
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_another_error_in_writing_a_checkpoint_is_no_full_disk(
    tiny_folder, rows, collection, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=PermissionError("denied")))
    with pytest.raises(PermissionError, match="denied"):
        fit_tiny(tiny_folder, rows, collection, tmp_path / "c")


def test_out_of_memory_with_one_row_says_what_to_do(
    tiny_folder, rows, collection, tmp_path, monkeypatch
):
    limit_memory(monkeypatch, 0, OUT_OF_MEMORY[0])
    with pytest.raises(UserError, match="one row at a time.*document_length.*frozen_layers"):
        fit_tiny(tiny_folder, rows, collection, tmp_path / "c")


def test_another_error_is_no_lack_of_memory(tiny_folder, rows, collection, tmp_path, monkeypatch):
    tried = limit_memory(monkeypatch, 0, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fit_tiny(tiny_folder, rows, collection, tmp_path / "c")
    assert len(tried) == 1


# --- the device


def test_only_a_gpu_is_fed_by_workers_from_pinned_memory():
    cpu, gpu = (fitting.device_arguments(torch.device(name)) for name in ("cpu", "cuda:1"))
    assert cpu["use_cpu"] and not gpu["use_cpu"]
    assert not cpu["dataloader_pin_memory"] and gpu["dataloader_pin_memory"]
    assert cpu["dataloader_num_workers"] == 0 < gpu["dataloader_num_workers"]


def test_workers_give_the_same_batches(tiny_folder, rows, tmp_path):
    model = load_model(tiny_folder, "cpu")
    trainer = trainer_of(model, rows, tmp_path)
    alone = list(trainer.get_train_dataloader())
    trainer.args.dataloader_num_workers = 2
    for ours, theirs in zip(trainer.get_train_dataloader(), alone, strict=True):
        for key in ("query_input_ids", "documents_input_ids", "label"):
            assert torch.equal(ours[key], theirs[key])


class Queue:
    """Stands for a GPU's queue: an event is passed when the clock reaches it."""

    def __init__(self, monkeypatch):
        self.now, self.done, self.waited = 0.0, 0.0, 0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))


class Event:
    def __init__(self, queue):
        self.queue = queue

    def record(self):
        self.time = self.queue.now

    def query(self):
        return self.queue.done >= self.time

    def synchronize(self):
        self.queue.waited += not self.query()

    def elapsed_time(self, other):
        return 1000 * (other.time - self.time)


def test_time_on_a_gpu_is_the_queues_and_nobody_waits_for_it(monkeypatch):
    queue, watch = Queue(monkeypatch), distillation.Stopwatch()
    for _ in range(3):
        with watch.measure(torch.device("cuda")):
            queue.now += 2
        queue.now += 5
        queue.done = queue.now - 6  # the GPU lags behind
    assert queue.waited == 0
    assert len(watch._marks) == 2  # the first one has been passed and read
    assert watch.seconds == 6
    assert queue.waited == 1


def test_what_a_training_cost_is_kept(tiny_folder, rows, collection, tmp_path):
    cost = fit_tiny(tiny_folder, rows, collection, tmp_path / "c", epochs=2)[1].cost
    assert (cost.device, cost.processes, cost.precision) == ("cpu", 1, "float32")
    assert (cost.steps, cost.resumed_at, cost.peak_gpu_megabytes) == (6, 0, None)
    assert cost.seconds > cost.pooling_seconds >= 0


def test_a_checkpoint_in_half_precision_is_trained_in_float32(
    tiny_folder, rows, collection, tmp_path
):
    half = load_model(tiny_folder, "cpu").bfloat16()
    with quiet_loading():
        half.save(str(tmp_path / "half"), create_model_card=False)
    found, fitted = fit_tiny(tmp_path / "half", rows, collection, tmp_path / "c")
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert {value.dtype for value in fitted.model.parameters()} == {torch.float32}


def test_the_lowest_layers_of_a_modernbert_are_frozen(tmp_path):
    model = load_model(tiny_colbert(tmp_path / "modern", TEXTS, "modernbert"), "cpu")
    freeze(model, 1)
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert {name for name in frozen if "layers.0." in name or "embeddings" in name} == frozen
    assert any("layers.0." in name for name in frozen)
    assert any("embeddings" in name for name in frozen)
    with pytest.raises(UserError, match="the encoder has 2 layers"):
        freeze(model, 3)


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


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_cannot_be_is_refused(tiny_profile, seed):
    with pytest.raises(UserError, match=f"seed is {seed}; expected .* from 0 to 4294967295"):
        training.train(tiny_profile, "docs:scipy", "kmeans", [1, 2], seed)


def test_the_adaptation_is_unpooled(tiny_profile):
    with pytest.raises(UserError, match="warm-up's collection"):
        training.train(tiny_profile, "docs:transformers", "kmeans", [1, 2])


@pytest.fixture
def folder_profile(tiny_profile, collection, model_folder, tmp_path):
    """A profile whose runs are on a folder in BEIR's layout; its baseline is the bundled model."""
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
    monkeypatch.setattr(training, "CODE", training.CODE + 1)
    with pytest.raises(AssertionError, match="trained again"):
        training.train(profile, str(folder), "span", [1, 2], progress=False)


@pytest.fixture
def fresh_profile(folder_profile):
    """As `folder_profile`, with nothing made yet, and with another folder to warm up on."""
    profile, folder = folder_profile
    (profile.folder / "models" / "baseline").unlink()
    (folder / "qrels" / "dev.tsv").rename(folder / "qrels" / "test.tsv")
    shutil.copytree(folder, folder.with_name("warm"))
    adaptation = profile.adaptation.model_copy(update={"collection": str(folder.with_name("warm"))})
    asked = {"collections": [str(folder)], "pool_factors": [1, 2]}
    evaluation = profile.evaluation.model_copy(update=asked)
    changes = {"adaptation": adaptation, "evaluation": evaluation, "plaid": []}
    return profile.model_copy(update=changes), str(folder)


def weights_of(folder):
    return {file.name: file.read_bytes() for file in folder.rglob("*.safetensors")}


def test_the_notebooks_in_order_from_nothing(fresh_profile, capsys):
    profile, name = fresh_profile
    mining.mine(profile, name, progress=False)
    made = training.train(profile, name, "span", [1, 2], progress=False)
    said = [line for line in capsys.readouterr().out.splitlines() if "baseline" in line]
    assert len(said) == 1 and "no baseline yet" in said[0] and "minutes" in said[0]
    baseline = profile.folder / "models" / "baseline"
    rows = evaluation.evaluate_model(profile, "baseline", load_model(baseline), progress=False)
    assert set(rows["pool_factor"]) == {1, 2} and set(rows["model"]) == {"baseline"}
    settings = read_json(made / "provenance.json")["settings"]
    assert settings["start"] == evaluation.fingerprint(baseline)
    assert training.train(profile, name, "none", [1], progress=False).name == "tiny-pf1-s42"
    assert "baseline" not in capsys.readouterr().out


def test_a_baseline_made_on_the_way_is_the_one_made_by_hand(fresh_profile):
    profile, name = fresh_profile
    models = profile.folder / "models"
    mining.mine(profile, name, progress=False)
    made = training.train(profile, name, "span", [1, 2], progress=False)
    on_the_way = [weights_of(models / "baseline"), weights_of(made)]
    settings = [read_json(folder / "provenance.json")["settings"] for folder in models.glob("*/")]
    shutil.rmtree(profile.folder)
    adaptation = profile.adaptation.collection
    mining.mine(profile, adaptation, progress=False)
    training.train(profile, adaptation, "none", [1], progress=False)
    mining.mine(profile, name, progress=False)
    training.train(profile, name, "span", [1, 2], progress=False)
    assert [weights_of(models / "baseline"), weights_of(made)] == on_the_way
    again = [read_json(folder / "provenance.json")["settings"] for folder in models.glob("*/")]
    assert sorted(map(str, again)) == sorted(map(str, settings))


def _make_baseline(profile, log, results):
    """A job of `test_jobs_that_start_at_once_…`: its patches are its own."""

    def mine(*_):
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.5)  # the others come meanwhile

    def train(*_, **__):
        (profile.folder / "models" / "baseline").mkdir(parents=True)
        (profile.folder / "models" / "baseline" / "model.safetensors").touch()

    training.mine, training.train = mine, train
    training._make_baseline(profile, progress=False)
    results.put(training._has_weights(profile.folder / "models" / "baseline"))


def test_jobs_that_start_at_once_make_one_baseline(tiny_profile, tmp_path):
    context = multiprocessing.get_context("fork")
    results, log = context.Queue(), tmp_path / "log"
    given = (tiny_profile, log, results)
    jobs = [context.Process(target=_make_baseline, args=given, daemon=True) for _ in range(3)]
    for job in jobs:
        job.start()
    assert [results.get(timeout=60) for _ in jobs] == [True] * 3
    for job in jobs:
        job.join(60)
    assert log.read_text() == "made\n"


@pytest.mark.parametrize(
    ("pool_method", "choices"),
    [
        ("kmeans", {"fast": {"use_sklearn": False}, "sklearn": {"use_sklearn": True}}),
        ("hierarchical", {v: {"hierarchical": v} for v in ("pylate", "paper", "euclidean")}),
    ],
)
def test_a_model_of_another_variant_is_not_reused(
    folder_profile, monkeypatch, pool_method, choices
):
    profile, folder = folder_profile
    from l2p_utils import mining

    monkeypatch.setattr(
        mining, "untrained_model", lambda _: load_model(profile.folder / "models/baseline")
    )
    mining.mine(profile, str(folder), progress=False)
    asked = []

    class Asked(Exception):
        pass

    def note(*given):
        run, use_sklearn, variant = given[3], *given[-2:]
        asked.append((run.pool_method, use_sklearn, variant))
        raise Asked

    monkeypatch.setattr(training, "fit", note)
    monkeypatch.setattr(
        training, "settings_match", lambda _, settings: asked.append(settings["pooling"])
    )
    for stored, choice in choices.items():
        chosen = profile.model_copy(update=choice)
        with pytest.raises(Asked):
            training.train(chosen, str(folder), pool_method, [1, 2], progress=False)
        fitted = (pool_method, chosen.use_sklearn, chosen.hierarchical)
        assert asked == [stored, stored, fitted]  # the model's settings, its checkpoints', the fit
        asked.clear()


@pytest.mark.parametrize("use_sklearn", [False, True])
def test_the_loss_pools_with_the_kmeans_that_it_was_given(model, batch, monkeypatch, use_sklearn):
    refused = "_sklearn_kmeans" if not use_sklearn else "_fast_kmeans"
    monkeypatch.setattr(pooling, refused, None)
    PooledDistillation(model, "kmeans", [3], use_sklearn=use_sklearn)(*batch).backward()


@pytest.mark.parametrize("variant", ["pylate", "paper", "euclidean"])
def test_the_loss_pools_with_the_variant_that_it_was_given(model, batch, monkeypatch, variant):
    seen = []
    original = pooling._hierarchical

    def noted(vectors, free, factors, used):
        seen.append(used)
        return original(vectors, free, factors, used)

    monkeypatch.setattr(pooling, "_hierarchical", noted)
    PooledDistillation(model, "hierarchical", [3], variant=variant)(*batch).backward()
    assert set(seen) == {variant}


# --- a checkpoint as the base, and another collection to pick the epoch


@pytest.fixture
def hub_profile(folder_profile):
    """As the paper's: no warm-up, lengths by collection, the epoch picked on a test split."""
    profile, folder = folder_profile
    given = profile.model_dump()
    given |= {"adaptation": None, "plaid": [], "dev_collections": {str(folder): "nano:tiny"}}
    given["model"] = {
        "base": "owner/model",
        "document_length": 20,
        "query_lengths": {str(folder): 12},
    }
    given["runs"] = [{"collection": str(folder), "pool_method": "none"}]
    profile = profiles.Profile.model_validate(given)
    mined = training.mined_folder(profile, str(folder))
    row = {"query_id": "q1", "document_ids": ["d1", "d2", "d3"], "scores": [1.0, 0.4, 0.1]}
    Dataset.from_list([row] * 4).save_to_disk(str(mined))
    (mined / "provenance.json").write_text("{}")
    return profile, folder


def test_the_paper_picks_the_epoch_on_the_test_queries_and_says_so(
    hub_profile, collection, monkeypatch
):
    profile, folder = hub_profile
    asked = []

    def load(name, split, **options):
        asked.append((name, split))
        return collection

    def split(name, settings, carve_dev=None):
        asked.append((name, "train", carve_dev))
        return collection

    monkeypatch.setattr(training, "load_collection", load)
    monkeypatch.setattr(candidates, "training_split", split)
    made = training.train(profile, str(folder), "span", [1, 2], progress=False)
    assert asked == [(str(folder), "train", False), ("nano:tiny", "test")]
    provenance = json.loads((made / "provenance.json").read_text())
    assert provenance["settings"]["dev"] == "nano:tiny, test split"
    assert provenance["dev"]["collection"] == "nano:tiny, test split"
    assert provenance["dev"]["looks_at_test_queries"] is True
    assert provenance["cost"]["micro_batch"] == 4
    model = load_model(made)
    assert (model.query_length, model.document_length) == (12, 20)


def test_dev_queries_are_kept_from_training_unless_others_pick_the_epoch(hub_profile):
    profile, folder = hub_profile
    assert carves_dev(profile, str(folder)) is False
    assert carves_dev(profile, "beir:scifact") is True
    assert carves_dev(profile, "docs:scipy") is None  # has a dev split of its own


def test_a_base_that_was_not_fetched_is_missed(hub_profile):
    profile, folder = hub_profile
    (profile.folder / "models" / "baseline").unlink()
    with pytest.raises(UserError, match="python -m l2p_utils.fetch"):
        training.train(profile, str(folder), "span", [1, 2])


def test_the_bundled_models_settings_are_as_they_were(folder_profile):
    profile, folder = folder_profile
    assert training._lengths(profile, str(folder)) == {}
    assert training._dev(profile, str(folder)) == {}


def test_the_command_trains_what_it_is_told(hub_profile, monkeypatch, capsys):
    asked = []

    def train(profile, *arguments, progress):
        asked.append((profile.name, *arguments, progress))
        return "the folder"

    monkeypatch.setattr(training, "train", train)
    given = "--profile smoke --collection docs:scipy --pool-method kmeans --pool-factors 1-3"
    assert training.main(given.split()) == 0
    assert asked == [("smoke", "docs:scipy", "kmeans", [1, 2, 3], None, True)]
    assert "the folder" in capsys.readouterr().out
    assert training.main([*given.split()[:-1], "0"]) == 1
    assert "pool_factors is '0'" in capsys.readouterr().err
