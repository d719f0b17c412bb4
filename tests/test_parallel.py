"""Several processes: two train what one trains, agree about everything, and end together.

As a script, this file is what each of the two processes runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from tiny import tiny_colbert

from l2p_utils import distillation, fitting, parallel, training
from l2p_utils import profile as profiles
from l2p_utils.collection import Collection
from l2p_utils.distillation import PooledDistillation
from l2p_utils.files import UserError, read_json, write_json
from l2p_utils.fitting import DEV_METRIC, fit
from l2p_utils.model import load_model
from l2p_utils.profile import Profile, Run, TrainingSettings, load_profile

SENTENCE = "a function on the grid returns sorted values of one matrix for all points in two sets"
WORDS = SENTENCE.split()
TEXTS = [" ".join(WORDS[i % 9 : i % 9 + 3 + i % 7]) for i in range(12)]
ROOT = Path(__file__).parents[1]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
RUN = Run(collection="tiny", pool_method="span", pool_factors="1-6")
# 17 rows in batches of 4: the fifth step has one row, so that the second process has none
SETTINGS = TrainingSettings(batch_size=4, learning_rate=1e-3, checkpoint_steps=2)
ROWS = 17


def the_collection() -> Collection:
    corpus = {f"d{i}": text for i, text in enumerate(TEXTS)}
    queries = {f"q{i}": " ".join(text.split()[:2]) for i, text in enumerate(TEXTS)}
    return Collection("tiny", corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(12)}, "dev")


def mined_rows() -> Dataset:
    shifted = [[f"d{(i + shift) % 12}" for shift in (0, 3, 5)] for i in range(ROWS)]
    rows = [
        {"query_id": f"q{i % 12}", "document_ids": ids, "scores": [1.0, 0.4, 0.1 * (i % 3)]}
        for i, ids in enumerate(shifted)
    ]
    return Dataset.from_list(rows)


def train_tiny(model_folder: Path, folder: Path) -> dict:
    """A training, watched: the live model's parameters, and what the loss was given."""
    seen = []
    forward = PooledDistillation.forward

    def watched(self, features, labels):
        factor = distillation.sample_pool_factor(self.pool_factors, self.seed, self.step)
        seen.append((self.step, factor, len(labels)))
        return forward(self, features, labels)

    model = load_model(model_folder, "cpu")
    rows = training.training_rows(mined_rows(), the_collection(), None)
    PooledDistillation.forward = watched
    try:
        fitted = fit(
            model, rows, the_collection(), RUN, SETTINGS, 7, folder, "float32", progress=False
        )
    finally:
        PooledDistillation.forward = forward
    return {
        "parameters": {name: value.detach() for name, value in model.named_parameters()},
        "seen": seen,
        "losses": fitted.log["loss"].dropna().tolist(),
        "factors": fitted.log.dropna(subset=["loss"])["pool_factor"].tolist(),
        "dev": fitted.log[DEV_METRIC].dropna().tolist(),
        "cost": vars(fitted.cost),
    }


# --- what each of two processes does


def short_of_memory(rank: int, most: int) -> None:
    """Let the loss of process `rank` fail for more than `most` rows."""
    scores = PooledDistillation._scores

    def limited(self, queries, *args):
        if parallel.rank() == rank and len(queries) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return scores(self, queries, *args)

    PooledDistillation._scores = limited


def stop_at(step: int) -> None:
    forward = PooledDistillation.forward

    def stopped(self, *args):
        if self.step == step:
            raise KeyboardInterrupt
        return forward(self, *args)

    PooledDistillation.forward = stopped


def interrupted(*args, **kwargs) -> None:
    raise KeyboardInterrupt


def scenarios(model_folder: Path, folder: Path) -> None:
    """All that the tests ask of one start of two processes (starting takes most of the time)."""
    torch.set_num_threads(1)
    scores, forward = PooledDistillation._scores, PooledDistillation.forward
    with parallel.group():
        found = {"plain": train_tiny(model_folder, folder / "plain")}
        short_of_memory(rank=1, most=1)
        found["short"] = train_tiny(model_folder, folder / "short")
        short_of_memory(rank=0, most=0)
        try:
            train_tiny(model_folder, folder / "none")
        except UserError as error:
            found["none"] = str(error)
        PooledDistillation._scores = scores
        stop_at(3)
        try:
            train_tiny(model_folder, folder / "stopped")
        except KeyboardInterrupt:
            PooledDistillation.forward = forward
        judge, fitting.DevEvaluator.__call__ = fitting.DevEvaluator.__call__, interrupted
        try:
            train_tiny(model_folder, folder / "unjudged")
        except KeyboardInterrupt:
            fitting.DevEvaluator.__call__ = judge
        parallel.wait()  # the first has written the checkpoint
        found["judged"] = train_tiny(model_folder, folder / "unjudged")
        found["largest"] = parallel.largest(parallel.rank() + 0.5)
        found["first"] = parallel.from_first(parallel.rank())
        torch.save(found, folder / f"rank{parallel.rank()}.pt")


def train_command(root: str, *arguments: str) -> int:
    profiles.ROOT = Path(root)
    torch.set_num_threads(1)
    return training.main(list(arguments))


def sleep(folder: str) -> None:
    with parallel.group():
        Path(folder, f"{parallel.rank()}.pid").write_text(str(os.getpid()))
        time.sleep(300)


# --- tests


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_colbert(tmp_path_factory.mktemp("tiny") / "model", TEXTS)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(parallel.ROOT))


@pytest.fixture(scope="module")
def alone(model_folder, tmp_path_factory):
    return train_tiny(model_folder, tmp_path_factory.mktemp("alone") / "c")


@pytest.fixture(scope="module")
def two(model_folder, tmp_path_factory):
    """What both processes found, and the folder with their checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(parallel.ROOT))
        command = [__file__, "scenarios", str(model_folder), str(folder)]
        parallel.launch(command, 2, show=False)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)], folder


def assert_close(ours: dict, theirs: dict, atol: float) -> None:
    """Key biases aside: they shift all of a query's attention alike, so that their gradient is
    rounding alone, and Adam makes steps of full length of it."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.endswith("key.bias"):
            torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("training_of", ["plain", "short"])
def test_after_five_steps_both_have_the_same_finite_parameters(two, alone, training_of):
    (first, second), _ = two
    first, second = first[training_of], second[training_of]
    assert len(first["losses"]) == 5
    assert np.isfinite(first["losses"]).all()
    for name, value in first["parameters"].items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, second["parameters"][name]), name
    assert first["losses"] == second["losses"]
    assert first["dev"] == second["dev"]


def test_both_draw_the_same_factors_at_every_step(two, alone):
    (first, second), _ = two
    drawn = [dict((step, factor) for step, factor, _ in r["plain"]["seen"]) for r in two[0]]
    assert drawn[0] == {step: factor for step, factor, _ in alone["seen"]}
    assert drawn[1] == {step: drawn[0][step] for step in range(4)}  # it has no row in the last
    assert len(set(drawn[0].values())) > 1
    assert first["plain"]["factors"] == second["plain"]["factors"] == alone["factors"]


def test_the_rows_of_a_step_are_shared(two):
    counts = [[rows for _, _, rows in found["plain"]["seen"]] for found in two[0]]
    assert counts == [[2, 2, 2, 2, 1], [2, 2, 2, 2]]


@pytest.mark.parametrize("training_of", ["plain", "short"])
def test_two_processes_train_what_one_trains(two, alone, model_folder, training_of):
    found = two[0][0][training_of]
    assert_close(found["parameters"], alone["parameters"], atol=1e-5)
    np.testing.assert_allclose(found["losses"], alone["losses"], atol=1e-6)
    before = dict(load_model(model_folder, "cpu").named_parameters())
    moved = [(alone["parameters"][n] - p).abs().max().item() for n, p in before.items()]
    assert max(moved) > 1e-3  # a hundred times the tolerance


def test_one_process_out_of_memory_makes_all_take_less_at_a_time(two):
    first, second = (found["short"] for found in two[0])
    assert first["cost"]["micro_batch"] == second["cost"]["micro_batch"] == 1
    assert [rows for _, _, rows in first["seen"]] == [2] + [1] * 9  # the whole first step again
    assert two[0][0]["plain"]["cost"]["micro_batch"] == 2
    assert first["cost"]["processes"] == 2


def test_all_stop_when_one_row_is_too_much_for_one(two):
    for found in two[0]:
        assert "one row at a time" in found["none"]
        assert "document_length" in found["none"]


def test_a_training_stopped_in_two_processes_goes_on_in_one(two, alone, model_folder):
    _, folder = two
    assert (folder / "stopped" / "checkpoint-2").is_dir()
    resumed = train_tiny(model_folder, folder / "stopped")
    assert [step for step, _, _ in resumed["seen"]] == [2, 3, 4]
    assert resumed["cost"]["resumed_at"] == 2
    assert resumed["cost"]["steps"] == 5
    assert_close(resumed["parameters"], alone["parameters"], atol=1e-5)


def test_two_processes_judge_an_epoch_that_was_killed_before(two):
    for found in two[0]:
        plain, judged = found["plain"], found["judged"]
        assert judged["seen"] == []  # every step was taken
        assert judged["dev"] == plain["dev"] and len(judged["dev"]) == 1
        assert judged["losses"] == plain["losses"]
        for name, value in plain["parameters"].items():
            assert torch.equal(judged["parameters"][name], value), name
    assert read_json(two[1] / "unjudged" / "best" / "provenance.json") == read_json(
        two[1] / "plain" / "best" / "provenance.json"
    )


def test_numbers_are_agreed_on(two):
    for found in two[0]:
        assert found["largest"] == 1.5
        assert found["first"] == 0
    assert (parallel.largest(3.0), parallel.from_first("x"), parallel.processes()) == (3.0, "x", 1)


# --- the stage


@pytest.fixture
def folder_profile(tmp_path, monkeypatch, model_folder):
    """Two processes on a folder in BEIR's layout, from a checkpoint, with rows that are there."""
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    monkeypatch.setattr(training, "COMMAND", [__file__, "train", str(tmp_path)])
    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    collection = the_collection()
    for name, texts in (("corpus", collection.corpus), ("queries", collection.queries)):
        lines = [json.dumps({"_id": i, "text": text}) for i, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    for split in ("train", "dev"):
        judged = [f"q{i}\td{i}\t1" for i in range(12)]
        lines = ["query-id\tcorpus-id\tscore", *judged]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines))
    settings = load_profile("smoke").model_dump()
    settings |= {"name": "two", "processes": 2, "adaptation": None, "precision": "float32"}
    settings["model"] = {"base": str(model_folder), "query_length": 6, "document_length": 12}
    settings["runs"] = [{"collection": str(folder), "pool_method": "none"}]
    settings["plaid"] = []
    settings["training"] |= {"epochs": 1, "checkpoint_steps": 100}
    profile = Profile.model_validate(settings)
    (profile.folder / "models").mkdir(parents=True)
    (profile.folder / "models" / "baseline").symlink_to(model_folder)
    mined = training.mined_folder(profile, str(folder))
    mined_rows().save_to_disk(str(mined))
    write_json(mined / "provenance.json", {})
    return profile, folder


def test_a_profile_of_two_processes_trains_in_two(folder_profile, capsys):
    profile, folder = folder_profile
    made = training.train(profile, str(folder), "kmeans", [1, 2])
    provenance = read_json(made / "provenance.json")
    assert provenance["cost"]["processes"] == 2
    assert provenance["cost"]["steps"] == 5
    assert provenance["settings"]["lengths"] == {"query_length": 6, "document_length": 12}
    assert provenance["dev"]["query_length"] == 6
    assert len(training.read_training_log(made).dropna(subset=["loss"])) == 5
    assert "5/5" in capsys.readouterr().err  # the progress of the first process
    model = load_model(made)
    assert (model.query_length, model.document_length) == (6, 12)
    assert not (profile.folder / "checkpoints" / made.name).exists()
    again = profile.model_copy(update={"processes": 1})
    assert training.train(again, str(folder), "kmeans", [1, 2], progress=False) == made


@pytest.mark.parametrize(("flag", "processes"), [("--multi_gpu", 1), ("--cpu", 2)])
def test_accelerates_launcher_starts_it_too(folder_profile, tmp_path, monkeypatch, flag, processes):
    """Without a GPU as well: `--multi_gpu` starts two that compute on the processor. `--cpu` starts
    one, unless there is MPI, and it is the profile's `processes` that counts."""
    profile, folder = folder_profile
    (tmp_path / "l2p_utils").symlink_to(ROOT / "l2p_utils")  # so that runs/ is in tmp_path
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    content = profile.model_copy(update={"processes": processes}).model_dump(mode="json")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content), "utf-8")
    asked = [*ACCELERATE, flag, "--num_processes", "2", "-m", "l2p_utils.training"]
    asked += ["--profile", str(tmp_path / "two.yaml"), "--collection", str(folder), "--quiet"]
    asked += ["--pool-method", "kmeans", "--pool-factors", "1-2"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    made = re.findall(rf"^{tmp_path}/runs/.*$", done.stdout, re.M)
    assert len(made) == 1  # told by the first process alone
    cost = read_json(Path(made[0]) / "provenance.json")["cost"]
    assert (cost["processes"], cost["steps"]) == (2, 5)


def test_checkpoints_stay_until_every_process_has_read_the_best_epoch(folder_profile, monkeypatch):
    profile, folder = folder_profile
    order, fit, save = [], training.fit, training._save
    done = {
        "fit": lambda *a, **k: (fit(*a, **k), order.append("fit"))[0],
        "_save": lambda *a, **k: (order.append("save"), save(*a, **k))[1],
    }
    for name, function in done.items():
        monkeypatch.setattr(training, name, function)
    monkeypatch.setattr(training.parallel, "wait", lambda: order.append("wait"))
    alone = profile.model_copy(update={"processes": 1})
    training.train(alone, str(folder), "kmeans", [1, 2], progress=False)
    assert order[order.index("fit") :] == ["fit", "wait", "save", "wait"]


def test_an_error_in_a_process_reaches_the_user(folder_profile):
    profile, folder = folder_profile
    corpus = folder / "corpus.jsonl"
    corpus.write_text("\n".join(corpus.read_text().splitlines()[:-1]))
    for split in ("train", "dev"):
        qrels = folder / "qrels" / f"{split}.tsv"
        qrels.write_text("\n".join(qrels.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match="01_data_mining again"):
        training.train(profile, str(folder), "kmeans", [1, 2], progress=False)


def test_processes_end_with_the_one_that_launched_them(tmp_path):
    code = (
        f"from l2p_utils import parallel; parallel.launch({[__file__, 'sleep', str(tmp_path)]}, 2)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    files = [tmp_path / f"{rank}.pid" for rank in (0, 1)]
    try:
        _until(lambda: all(file.exists() and file.read_text() for file in files))
    finally:
        launcher.kill()
        launcher.wait()
    pids = [int(file.read_text()) for file in files]
    _until(lambda: not any(_lives(pid) for pid in pids))


def _until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    parallel.check_devices(2)
    with pytest.raises(UserError, match="has 2 GPU"):
        parallel.check_devices(3)


def test_each_process_gets_one_gpu_at_most():
    arguments = fitting._arguments(
        SETTINGS, ROWS, 1, Path("unused"), "float32", False, torch.device("cpu")
    )
    assert arguments.n_gpu <= 1


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    if what == "scenarios":
        scenarios(Path(given[0]), Path(given[1]))
        parallel.leave(0)
    elif what == "train":
        parallel.leave(train_command(*given))
    else:
        sleep(*given)
