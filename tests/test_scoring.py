"""Candidates and their scores: one rule, any number of jobs, killed at any moment."""

import errno
import json
import multiprocessing
import os
import shutil
import time

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from test_mining import write_beir
from tiny_reranker import tiny_reranker

from l2p_utils import candidates as candidates_module
from l2p_utils import files, hub, mining, scoring
from l2p_utils import profile as profiles
from l2p_utils.candidates import (
    Candidates,
    Proposer,
    candidates_folder,
    find_candidates,
    load_miner,
    propose_all,
)
from l2p_utils.collection import profile_split
from l2p_utils.files import UserError
from l2p_utils.hub import find_source
from l2p_utils.mining import mine, mined_folder, mined_provenance, rows_of_scores
from l2p_utils.model import bundled_encoder_path
from l2p_utils.profile import PROFILES, MiningSettings, Profile
from l2p_utils.scoring import main, make_plan, read_scores, score
from l2p_utils.teacher import RerankerTeacher

# --- who is proposed ------------------------------------------------------------------------------


def propose_by_sorting(similarities, ids, positives, hard_candidates, random_candidates, rng):
    """The rule, said as plainly as can be."""
    ranked = sorted(zip(similarities, ids, strict=True), key=lambda pair: pair, reverse=True)
    hard = [d for _, d in ranked[:hard_candidates] if d not in positives]
    rest = sorted(set(ids) - set(hard) - set(positives))
    chosen = rng.choice(len(rest), min(random_candidates, len(rest)), replace=False)
    return hard, [rest[i] for i in chosen]


@given(
    st.permutations([f"d{i}" for i in range(12)]),
    st.lists(st.sampled_from([-0.5, 0.0, 0.25, 0.5]), min_size=12, max_size=12),
    st.sets(st.sampled_from([f"d{i}" for i in range(12)]), max_size=3),
    st.integers(1, 14),
)
def test_candidates_are_the_largest_cosines_ties_by_id_descending(ids, values, positives, count):
    settings = MiningSettings(
        hard_candidates=count, random_candidates=4, hard=1, medium=0, random=0
    )
    rngs = [np.random.default_rng(7) for _ in range(2)]
    found = Proposer(ids, settings).propose(np.array(values, "f4"), sorted(positives), rngs[0])
    assert found == propose_by_sorting(values, ids, positives, count, 4, rngs[1])
    assert rngs[0].random() == rngs[1].random()  # nothing else was drawn


# --- a project with a miner and a teacher ---------------------------------------------------------


class HashingMiner:
    """A miner that needs no loading: a text's vector is drawn by its words."""

    def __init__(self):
        self.prompts = []

    def _encode(self, prompt, texts, normalize_embeddings, **_):
        self.prompts.append(prompt)
        vectors = [
            sum(np.random.default_rng(list(w.encode())).normal(size=8) for w in words.split())
            for words in texts
        ]
        found = torch.tensor(np.array(vectors), dtype=torch.float32)
        assert normalize_embeddings
        return torch.nn.functional.normalize(found, dim=-1)

    def encode_query(self, texts, **options):
        return self._encode("query", texts, **options)

    def encode_document(self, texts, **options):
        return self._encode("document", texts, **options)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return tiny_reranker(tmp_path_factory.mktemp("models") / "reranker")


@pytest.fixture
def project(tmp_path, monkeypatch, teacher_folder):
    """A project with one collection of 7 training queries, a miner and a teacher."""
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    monkeypatch.setattr(candidates_module, "load_miner", lambda folder: HashingMiner())
    write_beir(tmp_path / "corpus", queries=7)
    (tmp_path / "models" / "miner").mkdir(parents=True)
    shutil.copytree(teacher_folder, tmp_path / "models" / "reranker")
    return tmp_path


def make_profile(project, mining=(), **scoring_changes):
    content = yaml.safe_load((PROFILES / "smoke.yaml").read_text("utf-8"))
    content["mining"] = {
        "hard_candidates": 4, "random_candidates": 3, "hard": 1, "medium": 1, "random": 1,
        "threshold": 50.0, **dict(mining),
    }  # fmt: skip
    models = {name: str(project / "models" / name) for name in ("miner", "reranker")}
    content["scoring"] = {
        "miner": models["miner"], "teacher": models["reranker"], "max_length": 64,
        "batch_size": 4, "checkpoint_queries": 1, **scoring_changes,
    }  # fmt: skip
    content["dev_collections"] = {str(project / "corpus"): "nano:scifact"}
    return Profile.model_validate({"name": "tiny", **content, "runs": [], "plaid": []})


def plan_of(profile, project):
    collection = profile_split(profile, str(project / "corpus"))
    return make_plan(profile, collection, find_candidates(profile, collection, progress=False))


@pytest.fixture
def chunks_scored(monkeypatch):
    """The number of pairs of each call of the teacher; negative: of one that was killed."""
    calls = []
    scores = RerankerTeacher.scores

    def counted(self, pairs, batch_size):
        if len(calls) == counted.fatal:
            calls.append(-len(pairs))
            raise KeyboardInterrupt
        calls.append(len(pairs))
        return scores(self, pairs, batch_size)

    counted.fatal = None
    monkeypatch.setattr(RerankerTeacher, "scores", counted)
    return calls, counted


# --- the miner ------------------------------------------------------------------------------------


def test_a_block_of_queries_at_a_time_proposes_what_all_at_once_would(project, monkeypatch):
    profile = make_profile(project)
    collection = profile_split(profile, str(project / "corpus"))
    whole = propose_all(collection, HashingMiner(), profile.mining, 42, progress=False)
    assert [found.query_id for found in whole] == list(collection.queries)
    for size in (1, 50):  # one query at a time, two at a time
        monkeypatch.setattr(candidates_module, "SIMILARITIES", size)
        assert propose_all(collection, HashingMiner(), profile.mining, 42, False) == whole
    for found in whole:
        assert len(set(found.documents)) == len(found.documents) >= 1 + 3 + 3
        assert found.positives == [f"d{found.query_id[1:]}"]


def test_the_miners_prompts_for_queries_and_documents_are_used(project):
    profile = make_profile(project)
    collection = profile_split(profile, str(project / "corpus"))
    miner = HashingMiner()
    propose_all(collection, miner, profile.mining, 42, progress=False)
    assert miner.prompts == ["query", "document"]


def test_a_real_miner_proposes_its_nearest_documents(project):
    """Sentence Transformers itself, from a folder."""
    profile = make_profile(project)
    collection = profile_split(profile, str(project / "corpus"))
    encoder = SentenceTransformer(str(bundled_encoder_path()), device="cpu")
    texts = (collection.queries.values(), collection.corpus.values())
    cosines = encoder.similarity(*(encoder.encode(list(part)) for part in texts)).numpy()
    ids = list(collection.corpus)
    mined = propose_all(collection, load_miner(bundled_encoder_path()), profile.mining, 42, False)
    for found, row in zip(mined, cosines, strict=True):
        top = [ids[i] for i in np.argsort(-row)[:4]]
        assert found.hard == [d for d in top if d not in found.positives]


def test_what_is_no_miner_is_refused(tmp_path, teacher_folder):
    with pytest.raises(UserError, match="no Sentence Transformers model.*scoring.miner"):
        load_miner(teacher_folder)
    (tmp_path / "modules.json").write_text("[{")
    with pytest.raises(UserError, match="could not be loaded"):
        load_miner(tmp_path)


def test_candidates_are_kept_and_found_anew_only_when_something_changed(project, monkeypatch):
    made = []
    real = candidates_module.propose_all
    monkeypatch.setattr(
        candidates_module, "propose_all", lambda *a, **k: made.append(1) or real(*a, **k)
    )
    first = plan_of(make_profile(project), project)
    same = [
        make_profile(project, batch_size=1, shards=3, max_length=32, checkpoint_queries=5),
        make_profile(project, mining={"threshold": 0.9, "hard": 2, "teacher_scale": "sigmoid"}),
    ]
    for profile in same:
        again = plan_of(profile, project)
        assert sum(again.chunks, []) == sum(first.chunks, [])
    assert len(made) == 1
    plan_of(make_profile(project, mining={"hard_candidates": 5}), project)
    (project / "models" / "miner" / "weights").write_text("other")
    plan_of(make_profile(project, mining={"hard_candidates": 5}), project)
    with (project / "corpus" / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": "new", "text": "About something new."}\n')
    plan_of(make_profile(project, mining={"hard_candidates": 5}), project)
    assert len(made) == 4
    provenance = json.loads((candidates_folder(same[0], "corpus") / "provenance.json").read_text())
    assert provenance["queries"] == 7 and provenance["documents"] == 25


def _find(profile, name, log, results):
    def propose(collection, *_):
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.5)
        number = len(log.read_text().splitlines())
        return [Candidates(q, ["d0"], [f"d{number}"], []) for q in collection.queries]

    candidates_module.propose_all = propose
    results.put(find_candidates(profile, profile_split(profile, name), progress=False))


def test_jobs_that_start_at_once_have_the_same_candidates(project):
    profile, name, log = make_profile(project), str(project / "corpus"), project / "log"
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    jobs = [
        context.Process(target=_find, args=(profile, name, log, results), daemon=True)
        for _ in range(3)
    ]
    for job in jobs:
        job.start()
    found = [results.get(timeout=60) for _ in jobs]
    for job in jobs:
        job.join(60)
    assert found[0] == found[1] == found[2] and log.read_text() == "made\n"


def test_a_file_system_without_locks_is_named(project, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "lockf", no_locks)
    with pytest.raises(UserError, match=r"mined/\S+ cannot be locked .*No locks.*flock") as refusal:
        plan_of(make_profile(project), project)
    assert "file system" in str(refusal.value)


def test_damaged_candidates_are_named(project):
    profile = make_profile(project)
    plan_of(profile, project)
    file = candidates_folder(profile, "corpus") / "candidates.parquet"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=r"corpus\.candidates are damaged .*Delete the folder"):
        plan_of(profile, project)


# --- the teacher's scores -------------------------------------------------------------------------


def test_a_score_is_the_teachers_of_query_and_document(project):
    plan = plan_of(make_profile(project, checkpoint_queries=3), project)
    assert [len(chunk) for chunk in plan.chunks] == [3, 3, 1]
    assert score(make_profile(project), plan, progress=False) == 3
    scores, made = read_scores(plan)
    teacher = scoring.load_reranker(plan.teacher.folder, 64, torch.device("cpu"), torch.float32)
    for chunk in plan.chunks:
        for found in chunk:
            assert list(scores[found.query_id]) == found.documents
    pair = (plan.collection.queries["q5"], plan.collection.corpus["d5"])
    assert scores["q5"]["d5"] == pytest.approx(teacher.scores([pair], 1)[0], abs=1e-5)
    ((how, count),) = made.items()
    assert count == 3 and how.startswith("torch.float32 on cpu, torch=")


def test_a_killed_job_goes_on_with_the_chunk_it_was_at(project, chunks_scored):
    calls, counted = chunks_scored
    profile = make_profile(project)
    plan = plan_of(profile, project)
    pairs = [len(chunk[0].documents) for chunk in plan.chunks]
    counted.fatal = 2  # the third of seven chunks
    with pytest.raises(KeyboardInterrupt):
        score(profile, plan, progress=False)
    assert plan.missing(range(7)) == [2, 3, 4, 5, 6]
    assert not [path.name for path in plan.folder.iterdir() if path.name.startswith(".")]
    counted.fatal = None
    assert score(profile, plan, progress=False) == 5
    assert calls == [*pairs[:2], -pairs[2], *pairs[2:]]
    assert score(profile, plan, progress=False) == 0 and len(calls) == 8


def test_three_shards_give_exactly_the_scores_of_one(project):
    one = make_profile(project)
    plan = plan_of(one, project)
    score(one, plan, progress=False)
    expected, _ = read_scores(plan)
    shutil.rmtree(plan.folder)
    three = make_profile(project, shards=3)
    again = plan_of(three, project)
    assert again.folder == plan.folder
    for shard, count in ((2, 2), (0, 3), (1, 2)):
        assert score(three, again, shard, progress=False) == count
        assert again.missing(range(shard, 7, 3)) == []
    assert read_scores(again)[0] == expected
    with pytest.raises(UserError, match="no shard 3: the profile 'tiny' has 3, numbered from 0"):
        score(three, again, 3, progress=False)


def test_a_chunk_that_another_job_scored_meanwhile_is_not_scored_again(
    project, monkeypatch, chunks_scored
):
    profile = make_profile(project)
    plan = plan_of(profile, project)
    score(profile, plan, progress=False)
    # as this job saw it when it began
    monkeypatch.setattr(scoring.Plan, "missing", lambda self, numbers: [*numbers])
    assert score(profile, plan, progress=False) == 0
    assert len(chunks_scored[0]) == 7


def test_other_settings_are_scored_anew_batches_and_shards_are_not(project, chunks_scored):
    profile = make_profile(project)
    score(profile, plan_of(profile, project), progress=False)
    for changes in ({"batch_size": 32}, {"shards": 4}, {"mining": {"threshold": 0.9}}):
        other = make_profile(project, **changes)
        assert score(other, plan_of(other, project), progress=False) == 0
    for changes in ({"max_length": 32}, {"mining": {"random_candidates": 4}}):
        other = make_profile(project, **changes)
        assert score(other, plan_of(other, project), progress=False) == 7
    tiny_reranker(project / "models" / "reranker", seed=1)
    assert score(profile, plan_of(profile, project), progress=False) == 7


@pytest.mark.parametrize("damage", ["half", "missing", "other documents"])
def test_damaged_scores_are_named(project, damage):
    profile = make_profile(project)
    plan = plan_of(profile, project)
    score(profile, plan, progress=False)
    if damage == "half":
        plan.path(3).write_bytes(plan.path(3).read_bytes()[:80])
    elif damage == "missing":
        plan.path(3).unlink()
    else:
        shutil.copy(plan.path(2), plan.path(3))
    with pytest.raises(UserError, match=r"chunk-00003\.parquet .*(Delete|delete)"):
        read_scores(plan)


# --- rows -----------------------------------------------------------------------------------------


def test_notebook_01_alone_scores_all_and_makes_the_rows(project, chunks_scored):
    profile, name = make_profile(project), str(project / "corpus")
    rows = mine(profile, name, progress=False)
    assert sorted(rows["query_id"]) == [f"q{i}" for i in range(7)]
    assert {len(row["document_ids"]) for row in rows} == {4}
    made = mined_provenance(mined_folder(profile, name))
    pairs = sum(chunks_scored[0])
    assert (made["pairs_scored"], made["queries"], made["documents"]) == (pairs, 7, 24)
    assert made["teacher"].startswith(str(project / "models" / "reranker") + " @ sha256:")
    assert '"Yes"' in made["teacher"] and "cosine" in made["miner"]
    assert sum(made["chunks_scored_in"].values()) == 7 and made["queries_dropped"] == {}
    assert mine(profile, name, progress=False).to_list() == rows.to_list()
    assert len(chunks_scored[0]) == 7


def test_rows_of_shards_are_the_rows_of_one_job(project, chunks_scored):
    profile, name = make_profile(project), str(project / "corpus")
    expected = mine(profile, name, progress=False).to_list()
    shutil.rmtree(profile.folder / "mined")
    sharded = make_profile(project, shards=2)
    for shard in (1, 0):
        score(sharded, plan_of(sharded, project), shard, progress=False)
    del chunks_scored[0][:]
    assert mine(sharded, name, progress=False).to_list() == expected
    assert chunks_scored[0] == []  # nothing was left to score


def test_the_mining_job_of_a_gpu_profile_leaves_the_teacher_to_the_jobs_that_have_a_gpu(
    project, chunks_scored
):
    """Its 60 minutes and 16 GB are for choosing rows."""
    profile, name = make_profile(project).model_copy(update={"gpu": True}), str(project / "corpus")
    plan = plan_of(profile, project)
    score(profile, plan, progress=False)
    plan.path(3).unlink()
    del chunks_scored[0][:]
    with pytest.raises(UserError) as refusal:
        mine(profile, name, progress=False)
    assert chunks_scored[0] == []
    said = str(refusal.value)
    assert f"1 of the 7 chunks of the teacher's scores of {plan.collection.name}" in said
    assert f"logs/scored--{profiles.slug(name)}--*" in said and "l2p_utils.scoring" in said
    score(profile, plan, progress=False)
    assert len(mine(profile, name, progress=False)) == 7


def test_on_a_gpu_the_notebook_may_score_by_hand(project, chunks_scored, monkeypatch):
    profile = make_profile(project).model_copy(update={"gpu": True})
    plan = plan_of(profile, project)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    scoring.check_scored(profile, plan)


def test_rules_that_change_nothing_of_the_scores_only_choose_again(project, chunks_scored):
    name = str(project / "corpus")
    raw = mine(make_profile(project), name, progress=False).to_list()
    sigmoid = make_profile(project, mining={"teacher_scale": "sigmoid"})
    squashed = {row["query_id"]: row for row in mine(sigmoid, name, progress=False)}
    assert len(chunks_scored[0]) == 7
    for row in raw:
        assert squashed[row["query_id"]]["document_ids"] == row["document_ids"]
        expected = [1 / (1 + np.exp(-value)) for value in row["scores"]]
        assert squashed[row["query_id"]]["scores"] == pytest.approx(expected)


def test_a_reranker_may_score_a_positive_below_others(project):
    """Unlike the bundled teacher, whose positives are lifted: negatives above it are dropped."""
    collection = profile_split(make_profile(project), str(project / "corpus"))
    settings = MiningSettings(hard=1, medium=0, random=0)
    found = [Candidates("q0", ["d0"], ["d1", "d2"], ["d3"])]
    scores = {"q0": {"d0": 1.0, "d1": 5.0, "d2": 0.5, "d3": 0.9}}
    rows, dropped = rows_of_scores(collection, found, scores, settings, 42)
    assert [(row.document_ids, row.scores) for row in rows] == [(["d0", "d2"], [1.0, 0.5])]
    assert dropped == {"no positive": 6}
    scores["q0"] |= {"d2": 0.99, "d3": 0.96}
    rows, dropped = rows_of_scores(collection, found, scores, settings, 42)
    assert rows == [] and dropped == {"no positive": 6, "too few candidates": 1}


# --- versions, the command ------------------------------------------------------------------------


def test_a_hub_model_is_known_by_its_commit(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "download", lambda *a: asked.append(a) or tmp_path / "abc123")
    source = find_source("owner/model", "v1")
    assert (source.version, str(source)) == ("abc123", "owner/model @ abc123")
    assert asked == [("owner/model", "model", "v1", None)]


def test_the_command_scores_one_shard(project, capsys):
    profile = make_profile(project, shards=3)
    path = project / "tiny.yaml"
    path.write_text(yaml.safe_dump(profile.model_dump(mode="json")), "utf-8")
    words = ["--profile", str(path), "--collection", str(project / "corpus"), "--shard"]
    assert main([*words, "1"]) == 0
    assert "Scored 2 chunks now; 2 of 7 are in" in capsys.readouterr().out
    assert plan_of(profile, project).missing(range(7)) == [0, 2, 3, 5, 6]
    assert main([*words, "3"]) == 1
    assert "no shard 3" in capsys.readouterr().err
    assert main(["--profile", "smoke", *words[2:], "0"]) == 1
    assert "bundled teacher" in capsys.readouterr().err


def test_the_bundled_teacher_needs_the_bundled_base():
    content = yaml.safe_load((PROFILES / "smoke.yaml").read_text("utf-8"))
    content |= {"runs": [], "plaid": []}
    del content["adaptation"]
    content["model"]["base"] = "owner/model"
    profile = Profile.model_validate({"name": "tiny", **content})
    with pytest.raises(UserError, match="model.base is 'owner/model'. Give scoring.miner"):
        mining.untrained_model(profile)
