"""Training: the loss against PyLate's, resuming, accumulation, two processes, the baseline."""

import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from pylate import losses
from pylate.losses.contrastive import extract_skiplist_mask
from tiny import tiny_colbert

from l2p_utils import profile as profiles
from l2p_utils import training
from l2p_utils.collection import Collection
from l2p_utils.files import PROVENANCE, UserError, read_json, write_json
from l2p_utils.model import load_model, quiet_loading
from l2p_utils.pooling import Budget, pool, pool_padded
from l2p_utils.profile import Profile, TrainingSettings, load_profile
from l2p_utils.training import DEV_METRIC, PooledDistillation, fit, sample_pool_factor

TEXTS = [
    "Interpolate a function on a grid, with splines of any degree.",
    "Solve a linear system of equations!",
    "Return the eigenvalues (and vectors) of a symmetric matrix; sorted.",
    "Draw samples from a distribution.",
    "Filter a signal, forwards and backwards.",
    "Compute distances between all pairs of points in two sets.",
]
CORPUS = {f"d{i}": text for i, text in enumerate(TEXTS)}
QUERIES = {f"q{i}": text.split(",")[0].lower() for i, text in enumerate(TEXTS)}
TINY = Collection("tiny", CORPUS, QUERIES, {f"q{i}": {f"d{i}": 1} for i in range(6)}, "dev")


def mined_rows(count=12):
    """Rows of three documents, the positive first."""
    rows = [
        {
            "query_id": f"q{i % 6}",
            "document_ids": [f"d{(i + shift) % 6}" for shift in range(3)],
            "scores": [1.0, 0.5, 0.2],
            "labels": ["positive", "hard_negative", "random_negative"],
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def settings(**changes):
    given = {"batch_size": 4, "epochs": 1, "learning_rate": 1e-3, "checkpoint_steps": 2, **changes}
    return TrainingSettings(**given)


def fit_tiny(folder, checkpoints, rows=12, pool_method="kmeans", **changes):
    """Train the tiny model in `folder`; its rows hold the factors that each step has drawn."""
    loss = PooledDistillation(load_model(folder, "cpu"), pool_method, range(1, 7), 7)
    rows = training.training_rows(mined_rows(rows), TINY)
    return fit(loss, rows, TINY, settings(**changes), checkpoints, "float32", progress=False)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same(one, other, **tolerance):
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(other)[name], msg=name, **tolerance)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return tiny_colbert(tmp_path_factory.mktemp("tiny") / "bert", TEXTS)


@pytest.fixture
def model(model_folder):
    """A fresh copy of the bundled model, in float32 on the CPU."""
    return load_model(model_folder, "cpu")


@pytest.fixture
def batch(model):
    """Two queries with three documents each, tokenised, and teacher scores."""
    queries = model.tokenize(["spline interpolation", "pairwise distances"], is_query=True)
    scores = torch.tensor([[1.0, 0.4, 0.1], [0.2, 0.3, 0.9]])
    return [queries, model.tokenize(TEXTS, is_query=False)], scores


class Stub(torch.nn.Module):
    """Stands for a model: returns the token vectors that it was made with."""

    skiplist = [99]
    do_query_expansion = False

    def __init__(self, queries=None, documents=None):
        super().__init__()
        self.outputs = [queries, documents]

    def forward(self, features):
        return {"token_embeddings": self.outputs[features["which"]]}


# --- the loss


@pytest.mark.parametrize("pool_method", ["none", "span", "kmeans", "hierarchical"])
def test_with_factor_1_the_loss_and_its_gradients_are_pylates(model, batch, pool_method):
    weight = model[1].linear.weight
    expected = losses.Distillation(model)(*batch)
    ours = PooledDistillation(model, pool_method, [1])(*batch)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    assert ours.item() > 1e-4  # not two zeros
    gradients = [torch.autograd.grad(value, weight)[0] for value in (ours, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_a_number_of_vectors_is_drawn_and_kept(model, batch):
    loss = PooledDistillation(model, "kmeans", ["k3", "k5"])
    values = {}
    for loss.step in range(8):
        values.setdefault(sample_pool_factor(loss.pool_factors, 42, loss.step), loss(*batch).item())
    assert values.keys() == {"k3", "k5"}
    with torch.no_grad():
        (queries, documents), teacher = batch
        vectors = torch.nn.functional.normalize(model(documents)["token_embeddings"], dim=-1)
        mask = extract_skiplist_mask([queries, documents], model.skiplist)[1]
        for name, value in values.items():
            factor = Budget(max_vectors=int(name[1:]))
            pooled, kept = pool_padded(vectors, mask, factor, "kmeans")
            assert kept.sum(1).max() <= factor.max_vectors
            alone = PooledDistillation(model, "kmeans", [factor])(*batch)
            assert alone.item() == pytest.approx(value, abs=1e-6)


def test_the_divergence_is_the_hand_worked_one():
    scores = torch.tensor([[3.0, 1.0, 2.0]])  # min-max normalised: 1, 0, 1/2
    teacher = torch.tensor([[0.0, 0.0, 0.0]])  # softmax: a third each
    log_sum = math.log(math.e + 1 + math.exp(0.5))
    expected = sum(1 / 3 * (math.log(1 / 3) - (x - log_sum)) for x in (1, 0, 0.5))
    loss = PooledDistillation(Stub())
    assert loss._divergence(scores, teacher).item() == pytest.approx(expected, abs=1e-6)
    assert torch.isfinite(loss._divergence(torch.ones(2, 3), torch.rand(2, 3)))  # equal scores


def test_the_teachers_scale_multiplies_its_scores_before_their_softmax(model, batch):
    features, scores = batch
    scaled = PooledDistillation(model, teacher_scale=5)(features, scores)
    assert scaled.item() == PooledDistillation(model)(features, 5 * scores).item()
    assert scaled.item() != PooledDistillation(model)(features, scores).item()


@pytest.mark.parametrize("pool_method", ["span", "kmeans", "hierarchical"])
def test_unit_length_means_are_scored_as_pool_gives_them_and_pass_gradients(
    model, batch, pool_method
):
    features, scores = batch
    loss = PooledDistillation(model, pool_method, [3], renormalize=True)
    (gradient,) = torch.autograd.grad(loss(features, scores), model[1].linear.weight)
    queries, documents = (
        model.encode(texts, is_query=is_query, convert_to_tensor=True)
        for texts, is_query in (
            (["spline interpolation", "pairwise distances"], True),
            (TEXTS, False),
        )
    )
    pooled = pool(documents, 3, pool_method, renormalize=True)
    assert all(torch.allclose(d.norm(dim=1), torch.ones(len(d)), atol=1e-5) for d in pooled)
    similarities = [(queries[i // 3] @ d.T).amax(dim=1) for i, d in enumerate(pooled)]
    assert min(float(s.min()) for s in similarities) > 0  # PyLate counts padding as 0
    expected = loss._divergence(torch.stack([s.sum() for s in similarities]).view(2, 3), scores)
    assert loss(features, scores).item() == pytest.approx(expected.item(), abs=1e-5)
    raw = PooledDistillation(model, pool_method, [3])
    assert loss(features, scores).item() != pytest.approx(raw(features, scores).item(), abs=1e-5)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("pool_method", ["span", "kmeans", "hierarchical"])
def test_gradients_reach_every_unmasked_token_and_no_other(pool_method):
    # Each document: [CLS], then pairs of near-identical vectors along the axes, one masked token
    # (id 99, in the skiplist) in between, padding last. The query looks along every axis, so every
    # cluster wins the maximum for some query token.
    axes = torch.eye(8)
    tokens = axes.repeat_interleave(2, dim=0)[:9]  # axis 0 (twice), 1 (twice), …, axis 4 (once)
    noise = 0.05 * torch.rand(3, 12, 8, generator=torch.Generator().manual_seed(0))
    documents = noise + torch.cat([axes[5:6], tokens[:4], axes[7:], tokens[4:], axes[6:7]])
    documents = documents[:, :12].clone().requires_grad_()
    ids = torch.full((3, 12), 7)
    ids[:, 5], ids[:, 11] = 99, 0
    query_ids = torch.ones(1, 8, dtype=torch.long)
    features = [
        {"which": which, "input_ids": given, "attention_mask": (given > 0).long()}
        for which, given in enumerate([query_ids, ids])
    ]
    loss = PooledDistillation(Stub(axes[None] + 0.1, documents), pool_method, [2])
    loss(features, torch.tensor([[1.0, 0.0, 0.3]])).backward()
    norms = documents.grad.norm(dim=-1)  # (documents, tokens)
    kept = (ids != 99) & (ids != 0)
    assert (norms[kept] > 0).all()
    assert (norms[~kept] == 0).all()


def test_documents_are_pooled_as_asked_and_scored_in_float32(model, batch, monkeypatch):
    asked = {"use_sklearn": True, "variant": "paper"}
    loss = PooledDistillation(model, "kmeans", [3], protected_tokens=2, **asked)
    pooled, score, seen = training.pool_padded, loss.score_metric, []

    def note_pooling(*args, **kwargs):
        seen.append((*args[2:], kwargs))
        return pooled(*args, **kwargs)

    def note_scores(queries, documents, **masks):
        seen.append((queries.dtype, documents.dtype))
        return score(queries, documents, **masks)

    monkeypatch.setattr(training, "pool_padded", note_pooling)
    loss.score_metric = note_scores
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(*batch).dtype == torch.float32
    asked["renormalize"] = False
    assert seen == [(3, "kmeans", 2, asked), (torch.float32, torch.float32)]


def test_the_adaptations_loss_is_the_hand_worked_cross_entropy():
    # MaxSim of two queries of two tokens with two documents; padding of the second is masked
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.6, 0.8]]])
    documents = torch.tensor([[[1.0, 0.0], [0.8, 0.6]], [[0.0, 1.0], [1.0, 0.0]]])
    features = [
        {"which": 0, "input_ids": torch.ones(2, 2), "attention_mask": torch.ones(2, 2)},
        {
            "which": 1,
            "input_ids": torch.ones(2, 2),
            "attention_mask": torch.tensor([[1, 1], [1, 0]]),
        },
    ]
    scores = [[1.0 + 0.6, 0.0 + 1.0], [2 * 0.96, 2 * 0.8]]
    expected = -sum(
        row[i] / 0.5 - math.log(sum(math.exp(score / 0.5) for score in row))
        for i, row in enumerate(scores)
    )
    loss = training.Contrastive(Stub(queries, documents), temperature=0.5)
    assert loss(features).item() == pytest.approx(expected / 2, abs=1e-6)


def test_a_pair_is_a_query_with_its_best_judged_known_document():
    qrels = {"q0": {"d0": 1, "d1": 2, "gone": 3}, "q1": {"d1": 0}, "q2": {"d3": 1, "d2": 1}}
    queries = {query: QUERIES[query] for query in qrels}
    pairs = training.training_pairs(Collection("tiny", CORPUS, queries, qrels, "train"))
    assert [(pair["query"], pair["document"]) for pair in pairs] == [
        (QUERIES["q0"], TEXTS[1]), (QUERIES["q2"], TEXTS[2])
    ]  # fmt: skip
    assert len(training.training_pairs(TINY, 4)) == 4
    with pytest.raises(UserError, match="No training query of tiny"):
        training.training_pairs(Collection("tiny", CORPUS, {"q1": "a"}, {"q1": {"d1": 0}}, "train"))


# --- pool factors and rows


def test_sampled_factors_are_uniform_and_depend_on_seed_and_step_alone():
    drawn = [sample_pool_factor([1, 2, 3, 4, 5, 6], 42, step) for step in range(6000)]
    counts = np.bincount(drawn, minlength=7)[1:]
    assert ((counts - 1000) ** 2 / 1000).sum() < 15.09  # chi square, 99 % at 5 degrees of freedom
    np.random.seed(0)
    assert drawn[20:50] == [sample_pool_factor(range(1, 7), 42, step) for step in range(20, 50)]
    assert drawn[:50] != [sample_pool_factor(range(1, 7), 2, step) for step in range(50)]


def test_rows_get_texts_and_lose_their_labels_and_fewer_are_spread_over_all():
    (row,) = training.training_rows(mined_rows(1), TINY)
    assert row == {"query": QUERIES["q0"], "documents": TEXTS[:3], "scores": [1.0, 0.5, 0.2]}
    mined = [{"query_id": "q0", "document_ids": ["d0"], "scores": [float(i)]} for i in range(11)]
    rows = training.training_rows(Dataset.from_list(mined), TINY, 3)
    assert [row["scores"] for row in rows] == [[0.0], [5.0], [10.0]]


@pytest.mark.parametrize(("query", "document"), [("q0", "gone"), ("gone", "d0")])
def test_a_row_about_something_unknown_is_refused(query, document):
    mined = Dataset.from_list([{"query_id": query, "document_ids": [document], "scores": [1.0]}])
    with pytest.raises(UserError, match="names 'gone', .*01_data_mining again"):
        training.training_rows(mined, TINY)


# --- the trainer


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((16, 1, None), (16, 1)),
        ((16, 2, None), (8, 1)),
        ((16, 1, 4), (4, 4)),
        ((16, 2, 3), (2, 4)),  # 3 does not divide the share of 8
        ((8, 2, 100), (4, 1)),
    ],
)
def test_a_batch_is_divided_into_equal_parts(given, expected):
    assert training.divide_batch(*given) == expected


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(UserError, match="batch_size is 8, which 3 processes"):
        training.divide_batch(8, 3, None)


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_the_lowest_layers_are_frozen(tmp_path, architecture):
    model = load_model(tiny_colbert(tmp_path / "model", TEXTS, architecture), "cpu")
    training.freeze(model, 1)
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    lowest = {n for n, _ in model.named_parameters() if re.search(r"layers?\.0\.|embeddings", n)}
    assert frozen == lowest and len(lowest) > 3
    with pytest.raises(UserError, match="the encoder has 2 layers"):
        training.freeze(model, 3)


def test_a_half_precision_checkpoint_is_trained_in_float32_but_for_its_frozen_layers(
    tiny_folder, tmp_path
):
    half = load_model(tiny_folder, "cpu").bfloat16()
    with quiet_loading():
        half.save(str(tmp_path / "half"), create_model_card=False)
    before = weights(load_model(tmp_path / "half", "cpu").float())
    after = weights(fit_tiny(tmp_path / "half", tmp_path / "c", 4, frozen_layers=1)[0])
    assert {value.dtype for value in after.values()} == {torch.float32}
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("layer.1." in name for name in changed)
    assert not any("layer.0." in name or "embeddings" in name for name in changed)


def test_accumulated_parts_share_the_factor_and_give_the_whole_batchs_step(
    tiny_folder, tmp_path, monkeypatch
):
    whole, log, _ = fit_tiny(tiny_folder, tmp_path / "a")
    drawn, draw = [], training.sample_pool_factor
    note = lambda *given: drawn.append(draw(*given)) or drawn[-1]  # noqa: E731
    monkeypatch.setattr(training, "sample_pool_factor", note)
    parts, _, _ = fit_tiny(tiny_folder, tmp_path / "b", micro_batch=1)
    factors = log.dropna(subset=["loss"])["pool_factor"].tolist()
    assert drawn[:12] == [factor for factor in factors for _ in range(4)]
    assert len(set(factors)) > 1
    assert_same(whole, parts, atol=2e-4, rtol=0)


@pytest.fixture(scope="module")
def unbroken(tiny_folder, tmp_path_factory):
    """Two epochs of three steps, a checkpoint every second step and at each epoch's end."""
    return fit_tiny(tiny_folder, tmp_path_factory.mktemp("unbroken"), epochs=2)


@pytest.mark.parametrize("stop", [1, 3, 4, 5, "evaluation"])
def test_an_interrupted_training_ends_as_an_unbroken_one(
    tiny_folder, tmp_path, monkeypatch, unbroken, stop
):
    whole, log, best = unbroken
    with monkeypatch.context() as patch:
        broken = training.DevEvaluator if stop == "evaluation" else PooledDistillation
        name = "__call__" if stop == "evaluation" else "forward"
        original = getattr(broken, name)

        def fail(self, *args, **kwargs):
            if stop == "evaluation" or self.step == stop:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        patch.setattr(broken, name, fail)
        with pytest.raises(KeyboardInterrupt):
            fit_tiny(tiny_folder, tmp_path, epochs=2)
    torch.manual_seed(999)  # the process that resumes is another one
    resumed, found, again = fit_tiny(tiny_folder, tmp_path, epochs=2)
    assert found.round(6).equals(log.round(6)) and len(found) == 8
    assert again == pytest.approx(best)
    assert_same(whole, resumed, atol=1e-6, rtol=1e-4)


def test_the_epochs_have_different_orders():
    trainer = SimpleNamespace(state=SimpleNamespace(), args=SimpleNamespace(seed=42))
    order, found = training._EpochOrder(12, trainer), []
    for trainer.state.epoch in (None, 0.5, 1.0, 1.9):
        found.append(list(order))
    assert found[0] == found[1] != found[2] == found[3]
    assert found[0] == torch.randperm(12, generator=torch.Generator().manual_seed(42)).tolist()


def test_a_half_written_checkpoint_is_not_used(tmp_path):
    whole, half, empty = (tmp_path / f"checkpoint-{n}" for n in (2, 4, 6))
    for folder in (whole, half, empty):
        folder.mkdir()
    (whole / "trainer_state.json").write_text('{"global_step": 2}')
    (half / "trainer_state.json").write_text('{"global_st')
    assert training._last_checkpoint(tmp_path) == str(whole)
    assert not half.exists() and not empty.exists()


def test_the_best_epoch_is_kept(tiny_folder, tmp_path, monkeypatch):
    scores, seen = iter([0.5, 0.9, 0.3, 0.9]), []

    def judge(self, model, *args, **kwargs):
        seen.append(weights(model))
        return {DEV_METRIC: next(scores)}

    monkeypatch.setattr(training.DevEvaluator, "__call__", judge)
    best, log, epoch = fit_tiny(tiny_folder, tmp_path, 4, epochs=4)
    assert log[DEV_METRIC].dropna().tolist() == [0.5, 0.9, 0.3, 0.9]
    assert epoch == {DEV_METRIC: 0.9, "epoch": 2.0}
    kept = weights(best)
    assert all(torch.equal(kept[name], seen[1][name]) for name in kept)
    assert any(not torch.equal(kept[name], seen[3][name]) for name in kept)


def test_a_step_whose_loss_is_no_number_stays_in_the_log(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(PooledDistillation, "_divergence", lambda self, scores, _: scores.sum() / 0)
    monkeypatch.setattr(training.DevEvaluator, "__call__", lambda *_, **__: {DEV_METRIC: 0.5})
    _, log, _ = fit_tiny(tiny_folder, tmp_path, pool_method="none")
    assert log["step"].tolist() == [1, 2, 3, 3] and not np.isfinite(log["loss"]).any()


def test_out_of_memory_says_what_to_do(tiny_folder, tmp_path, monkeypatch):
    def fail(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PooledDistillation, "forward", fail)
    with pytest.raises(UserError, match=r"training.micro_batch .*\(now 2; a step keeps its 4"):
        fit_tiny(tiny_folder, tmp_path, micro_batch=2)


# --- two processes


def run_as_one_of_two(model_folder, folder):
    """What each process of the next test does."""
    processes = training._processes()
    original, drawn, judged = training.sample_pool_factor, [], itertools.count()
    training.sample_pool_factor = lambda *given: drawn.append(original(*given)) or drawn[-1]

    def judge(*_, **__):
        if next(judged) == 0 and not (folder / "resumed").exists():
            raise KeyboardInterrupt  # after step 4's checkpoint, before the epoch's end is saved
        return {DEV_METRIC: 0.5}

    training.DevEvaluator.__call__ = judge
    try:
        model, log, _ = fit_tiny(model_folder, folder / "checkpoints", 20, "span", micro_batch=1)
    except KeyboardInterrupt:
        processes.wait_for_everyone()
        (folder / "resumed").touch()
        processes.wait_for_everyone()
        model, log, _ = fit_tiny(model_folder, folder / "checkpoints", 20, "span", micro_batch=1)
    torch.save(weights(model), folder / f"{processes.process_index}.pt")
    write_json(folder / f"{processes.process_index}.json", drawn)
    log.to_csv(folder / "log.csv")
    processes.destroy_process_group()


def test_two_processes_train_what_one_does(tiny_folder, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*torchrun, "--nproc-per-node", "2", __file__, str(tiny_folder), str(tmp_path)]
    path = os.pathsep.join([str(Path(training.__file__).parents[1]), str(Path(__file__).parent)])
    ended = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    single, log, _ = fit_tiny(tiny_folder, tmp_path / "single", 20, "span")
    factors = log.dropna(subset=["loss"])["pool_factor"].tolist()
    assert len(factors) == 5 and len(set(factors)) > 1
    drawn = [read_json(tmp_path / f"{rank}.json") for rank in range(2)]
    # a process has two of a step's four rows, one at a time; step 5 was done twice
    assert drawn[0][:10] == drawn[1][:10] == [factor for factor in factors for _ in range(2)]
    for name, value in weights(single).items():
        torch.testing.assert_close(value, first[name], atol=2e-4, rtol=0, msg=name)


# --- the stage


@pytest.fixture
def profile(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    monkeypatch.setenv("L2P_CACHE", str(tmp_path / "cache"))
    return load_profile("smoke")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("docs:scipy", "kmeans", [1, 2]), "01_data_mining"),  # not mined yet
        (("docs:mixed", "kmeans", [1, 2]), "kept for the adaptation, which is unpooled"),
        (("docs:scipy", "none", [1, 2]), "unpooled training is"),
        (("docs:scipy", "span", [2], False, -1), "seed is -1"),
    ],
)
def test_what_cannot_be_trained_is_refused(profile, asked, message):
    with pytest.raises(UserError, match=message):
        training.train(profile, *asked)


def write_collection(folder):
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", CORPUS), ("queries", QUERIES)):
        lines = [json.dumps({"_id": i, "text": text}) for i, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    judged = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(6))]
    for split, count in (("train", 6), ("dev", 1)):
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(judged[: count + 1]))


def save_mined(folder):
    mined_rows(8).save_to_disk(str(folder))
    write_json(folder / PROVENANCE, {})


@pytest.fixture
def own_profile(profile, tiny_folder, tmp_path, monkeypatch):
    """A profile on folders of our own, and the seeds of what was adapted."""
    for name in ("ours", "adaptation"):
        write_collection(tmp_path / name)
    save_mined(training.mined_folder(profile, str(tmp_path / "ours")))
    adapted, adapt = [], training._adapt

    def counting(profile, settings, *arguments):
        adapted.append(settings["run"]["seed"])
        adapt(profile, settings, *arguments)

    def untrained(profile):
        target = profile.folder / "models" / "bundled"
        shutil.copytree(tiny_folder, target, dirs_exist_ok=True)

    monkeypatch.setattr(training, "_adapt", counting)
    monkeypatch.setattr(training, "untrained_model", untrained)
    adaptation = {"collection": str(tmp_path / "adaptation"), "learning_rate": 1e-2}
    adaptation = profile.adaptation.model_copy(update=adaptation)
    return profile.model_copy(update={"adaptation": adaptation}), str(tmp_path / "ours"), adapted


def test_a_training_makes_the_baseline_first_and_is_reused(own_profile, monkeypatch, capsys):
    profile, name, adapted = own_profile
    folder = training.train(profile, name, "kmeans", [1, 2], progress=False)
    assert folder.name == "ours-kmeans-pf1-2-s42"
    assert capsys.readouterr().out.count("Making the baseline, once") == 1
    baseline = profile.folder / "models" / "baseline"
    assert adapted == [42]
    made = read_json(folder / PROVENANCE)
    assert made["settings"]["start"] == training.fingerprint(baseline)
    assert made["rows"] == 8 and made["dev"]["looks_at_test_queries"] is False
    for trained in (folder, baseline):
        log = training.read_training_log(trained)
        assert {"step", "loss", "pool_factor", DEV_METRIC} <= set(log)
        assert read_json(trained / PROVENANCE)["epoch"][DEV_METRIC] == log[DEV_METRIC].max()
        assert load_model(trained).encode(["a b c"], is_query=False)[0].shape[1] == 16
    assert list((profile.folder / "checkpoints").iterdir()) == []

    def again(loss, *_):
        options = [getattr(loss, name, None) for name in ("use_sklearn", "variant", "seed")]
        raise AssertionError(f"trained again: {options}")

    monkeypatch.setattr(training, "fit", again)
    other = profile.model_copy(update={"hierarchical": "paper"})  # of no concern to k-means
    assert training.train(other, name, "kmeans", [1, 2], progress=False) == folder
    adaptation = profile.adaptation.collection
    assert training.train(profile, adaptation, "none", [1], progress=False) == baseline
    sklearn = other.model_copy(update={"use_sklearn": True})
    with pytest.raises(AssertionError, match=r"trained again: \[True, .paper."):
        training.train(sklearn, name, "kmeans", [1, 2], progress=False)
    for changed in (([1, 2], True), ([1, 3],)):
        with pytest.raises(AssertionError, match=r"trained again: \[False, .pylate., 42"):
            training.train(profile, name, "kmeans", *changed, progress=False)
    monkeypatch.setattr(training, "CACHE_VERSION", training.CACHE_VERSION + 1)
    with pytest.raises(AssertionError, match="trained again"):
        training.train(profile, name, "kmeans", [1, 2], progress=False)


def test_a_training_with_another_seed_starts_from_the_baseline_of_that_seed(own_profile):
    profile, name, adapted = own_profile
    folder = training.train(profile, name, "span", [1, 2], True, 43, progress=False)
    assert folder.name == "ours-span-pf1-2-unit-s43" and adapted == [43]
    start = profile.folder / "models" / "baseline-s43"
    made = read_json(folder / PROVENANCE)["settings"]
    assert made["start"] == training.fingerprint(start) and made["run"]["renormalize"] is True
    assert (
        training.train(profile, profile.adaptation.collection, "none", [1], seed=43, progress=False)
        == start
    )
    own = training.make_baseline(profile, progress=False)
    assert own.name == "baseline" and adapted == [43, 42]
    assert training.fingerprint(own) != training.fingerprint(start)  # rows in another order


def test_profiles_with_the_same_adaptation_share_the_baseline(own_profile, monkeypatch):
    profile, _, adapted = own_profile
    with monkeypatch.context() as patch:
        patch.setattr(training, "_processes", lambda: SimpleNamespace(num_processes=2))
        with pytest.raises(UserError, match="made in one process"):
            training.make_baseline(profile)
    one = training.make_baseline(profile, progress=False)
    other = profile.model_copy(update={"name": "other", "hierarchical": "paper"})
    two = training.make_baseline(other, progress=False)
    assert one != two and len(adapted) == 1
    assert training.fingerprint(one) == training.fingerprint(two)
    assert read_json(one / PROVENANCE) == read_json(two / PROVENANCE)
    assert (two / training.LOG_FILE).is_file()
    longer = profile.adaptation.model_copy(update={"epochs": 3})
    training.make_baseline(profile.model_copy(update={"adaptation": longer}), progress=False)
    assert len(adapted) == 2  # and the run's own is replaced
    assert training.fingerprint(one) != training.fingerprint(two)


def test_jobs_that_start_at_once_make_one_baseline(own_profile, tmp_path, monkeypatch):
    profile, _, _ = own_profile

    def adapt(profile, settings, target, progress):
        with (tmp_path / "log").open("a") as file:
            file.write("made\n")
        write_json(target / PROVENANCE, {"settings": settings})

    monkeypatch.setattr(training, "_adapt", adapt)
    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=training.make_baseline, args=(profile, False)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    assert (tmp_path / "log").read_text() == "made\n"
    assert (profile.folder / "models" / "baseline" / PROVENANCE).is_file()


# --- a checkpoint as the base, and another collection to pick the epoch


@pytest.fixture
def hub_profile(own_profile, tiny_folder):
    """As the paper's: no adaptation, lengths by collection, the epoch picked on a test split."""
    profile, name, _ = own_profile
    given = profile.model_dump()
    given |= {"adaptation": None, "plaid": [], "dev_collections": {name: "nano:tiny"}}
    lengths = {"query_length": 8, "document_length": 16, "query_lengths": {name: 12}}
    given["model"] = {"base": str(tiny_folder), "dim": 16, **lengths}
    given["scoring"] = {"miner": "owner/miner", "teacher": "owner/teacher"}
    given["runs"] = [{"collection": name, "pool_method": "none"}]
    return Profile.model_validate(given), name


def test_the_paper_picks_the_epoch_on_the_test_queries_and_says_so(hub_profile, monkeypatch):
    profile, name = hub_profile
    asked, original = [], training.load_collection

    def load(name, split="test", **options):
        asked.append((name, split))
        return TINY if name == "nano:tiny" else original(name, split, **options)

    monkeypatch.setattr(training, "load_collection", load)
    folder = training.train(profile, name, "span", [1, 2], progress=False)
    assert asked == [("nano:tiny", "test")]
    made = read_json(folder / PROVENANCE)
    assert made["settings"]["dev"] == made["dev"]["collection"] == "nano:tiny, test split"
    assert made["dev"]["looks_at_test_queries"] is True
    model = load_model(folder)
    assert (model.query_length, model.document_length) == (12, 16)
    baseline = load_model(profile.folder / "models" / "baseline")
    assert (baseline.query_length, baseline.document_length) == (8, 16)
    other = profile.model.model_copy(update={"dim": 64})
    with pytest.raises(UserError, match="dim"):
        training.make_baseline(profile.model_copy(update={"model": other}))


def test_the_command_trains_what_it_is_told(monkeypatch, capsys):
    asked = []

    def train(profile, *arguments):
        asked.append((profile.name, *arguments))
        return "the folder"

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "make_baseline", train)
    given = "--profile smoke --collection docs:scipy --pool-method kmeans --pool-factors 1-3"
    assert training.main(given.split()) == 0
    assert asked == [("smoke", "docs:scipy", "kmeans", [1, 2, 3], False, None, True)]
    assert "the folder" in capsys.readouterr().out
    assert training.main([*given.split()[:-1], "0"]) == 1
    assert "pool_factors is '0'" in capsys.readouterr().err
    assert training.main(["--profile", "smoke", "--baseline", "--quiet"]) == 0
    assert asked[1:] == [("smoke", False, None)]
    with pytest.raises(SystemExit):
        training.main(["--profile", "smoke"])


if __name__ == "__main__":
    run_as_one_of_two(Path(sys.argv[1]), Path(sys.argv[2]))
