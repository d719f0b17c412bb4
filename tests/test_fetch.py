"""The fetch step, and the paper's profile as a plan; the hub is stood in for by folders."""

import json
import shutil

import pytest
from tiny import tiny_colbert

from l2p_utils import fetch as module
from l2p_utils import hub
from l2p_utils.evaluation import describe_model
from l2p_utils.files import UserError, read_json, write_json
from l2p_utils.model import PooledColBERT, load_checkpoint, load_model
from l2p_utils.profile import Profile, Run, load_profile

TEXTS = ["sort the rows of a table", "draw a random sample", "the mean of an array"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_colbert(tmp_path_factory.mktemp("checkpoints") / "colbert", TEXTS)


def profile_of(base, monkeypatch, tmp_path, **model):
    content = {
        "name": "mine",
        "description": "a checkpoint as it is",
        "model": {"base": str(base), "query_length": 8, "document_length": 16, **model},
        "mining": {},
        "training": {},
        "runs": [],
        "evaluation": {"collections": ["docs:scipy"]},
    }
    monkeypatch.setattr(Profile, "folder", property(lambda self: tmp_path / "run"))
    return Profile.model_validate(content)


def test_the_baseline_is_the_checkpoint_at_each_length(checkpoint, monkeypatch, tmp_path):
    profile = profile_of(checkpoint, monkeypatch, tmp_path, other_document_lengths=[12], dim=16)
    found = module.fetch(profile, progress=False)
    assert list(found["models"]) == ["baseline", "baseline-d12"]
    assert read_json(profile.folder / "fetched.json") == found
    lengths = {name: load_model(profile.folder / "models" / name) for name in found["models"]}
    assert {name: m.document_length for name, m in lengths.items()} == {
        "baseline": 16,
        "baseline-d12": 12,
    }
    ours = lengths["baseline"].encode(TEXTS, is_query=False)
    theirs = PooledColBERT(str(checkpoint), device="cpu").encode(TEXTS, is_query=False)
    assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))


def test_what_was_fetched_is_kept_until_its_source_changes(checkpoint, monkeypatch, tmp_path):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    profile = profile_of(base, monkeypatch, tmp_path)
    stamps = []
    for _ in range(2):
        module.fetch(profile, progress=False)
        made = profile.folder / "models" / "baseline" / "provenance.json"
        stamps.append(made.stat().st_mtime_ns)
    assert stamps[0] == stamps[1]
    config = base / "config_sentence_transformers.json"
    config.write_text(config.read_text().replace('"[Q] "', '"[D] "'))
    module.fetch(profile, progress=False)
    assert load_model(profile.folder / "models" / "baseline").query_prefix == "[D] "


def test_released_models_and_rows_may_name_a_revision(checkpoint, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(hub, "download", lambda *a: asked.append(a[:3]) or checkpoint)
    profile = profile_of(checkpoint, monkeypatch, tmp_path)
    pinned = {
        "released_models": ["owner/model@v1"],
        "released_rows": {"docs:scipy": "them/rows@v2"},
    }
    run = Run(collection="docs:scipy", pool_method="none", pool_factors=[1])
    pinned |= {"training_data": "released", "runs": [run]}
    found = module.fetch(profile.model_copy(update=pinned), progress=False)
    place = {"revision": "v1", "commit": checkpoint.name}
    assert found["models"]["released-model"] == {"source": "owner/model", **place}
    assert found["data"]["them/rows@v2"] == {**place, "revision": "v2"}
    assert set(asked) == {("owner/model", "model", "v1"), ("them/rows", "dataset", "v2")}
    made = read_json(profile.folder / "models" / "released-model" / "provenance.json")
    assert made["settings"]["origin"] == place


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"dim": 64}, "model.dim is 64 in the profile and 16 in the checkpoint"),
        (
            {"query_prefix": "[query] "},
            "model.query_prefix is '[query] ' in the profile and '[Q] ' in the checkpoint",
        ),
        ({"document_prefix": ""}, "model.document_prefix is '' in the profile and '[D] '"),
        (
            {"do_query_expansion": True},
            "model.do_query_expansion is True in the profile and False in the checkpoint",
        ),
        (
            {"skiplist": "none"},
            "model.skiplist is 'none' in the profile and 'punctuation' in the checkpoint",
        ),
    ],
)
def test_another_model_than_expected_is_refused_with_both_values(
    checkpoint, monkeypatch, tmp_path, expected, message
):
    profile = profile_of(checkpoint, monkeypatch, tmp_path, **expected)
    with pytest.raises(UserError) as refusal:
        module.fetch(profile, progress=False)
    assert message in str(refusal.value)
    assert not (profile.folder / "models").exists()


@pytest.mark.parametrize(
    ("words", "found"),
    [(["!", "?"], "punctuation"), ([], "none"), (["!", "the"], "['!', 'the']")],
)
def test_the_skiplist_is_named_by_what_is_in_it(checkpoint, monkeypatch, tmp_path, words, found):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    config = read_json(base / "config_sentence_transformers.json") | {"skiplist_words": words}
    write_json(base / "config_sentence_transformers.json", config)
    wanted = "none" if found == "punctuation" else "punctuation"
    settings = profile_of(base, monkeypatch, tmp_path, skiplist=wanted).model
    with pytest.raises(UserError) as refusal:
        load_checkpoint(str(base), settings)
    assert f"is {wanted!r} in the profile and {found!r} in the" in str(refusal.value)
    right = settings.model_copy(update={"skiplist": found})
    assert load_checkpoint(str(base), right).skiplist_words == words


def test_the_checkpoints_own_lengths_are_told_where_they_are_not_used(
    checkpoint, monkeypatch, tmp_path, capsys
):
    settings = profile_of(checkpoint, monkeypatch, tmp_path).model
    load_checkpoint(str(checkpoint), settings)
    assert capsys.readouterr().err == ""
    model = load_checkpoint(str(checkpoint), settings, document_length=12)
    assert (model.query_length, model.document_length) == (8, 12)
    said = capsys.readouterr().err
    assert f"{checkpoint}: its own document_length is 16, the profile's 12 is used." in said
    assert "query_length" not in said


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (None, "there is no modules.json"),
        (["sentence_transformers.models.Transformer"], "modules.json lists"),
    ],
)
def test_a_plain_encoder_is_no_colbert(checkpoint, monkeypatch, tmp_path, modules, message):
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    if modules:
        listed = [{"idx": 0, "name": "0", "path": "", "type": name} for name in modules]
        (encoder / "modules.json").write_text(json.dumps(listed))
    settings = profile_of(encoder, monkeypatch, tmp_path).model
    with pytest.raises(UserError, match="is not a ColBERT") as refusal:
        load_checkpoint(str(encoder), settings)
    assert message in str(refusal.value)


def test_the_papers_profile_is_its_grid():
    profile = load_profile("paper")
    assert len(profile.runs) == 23 and profile.mining.n_ways == 16
    assert profile.mining.hard_candidates == 100 and profile.mining.random_candidates == 30
    trained = {
        (run.collection, run.pool_method, tuple(run.pool_factors), run.seed or 42)
        for run in profile.runs
    }
    every = (1, 2, 3, 4, 5, 6)
    for collection in ("beir:scifact", "beir:fiqa"):
        assert (collection, "none", (1,), 42) in trained
        for method in ("span", "kmeans", "hierarchical"):
            for factors in ((2,), (3,), every):
                assert (collection, method, factors, 42) in trained
            assert ((collection, method, every, 43) in trained) == (collection == "beir:scifact")
    assert profile.hub_collections == [
        "beir:scifact", "beir:fiqa", "nano:scifact", "nano:fiqa", "nano:nfcorpus", "nano:scidocs",
        "nano:touche", "beir:nfcorpus", "beir:scidocs",
    ]  # fmt: skip
    assert [profile.model.query_length_on(f"beir:{n}") for n in ("scifact", "fiqa")] == [48, 32]
    assert profile.model.do_query_expansion is False and profile.model.skiplist == "punctuation"
    assert profile.prepared_names[:2] == ["baseline", "baseline-d180"]
    assert profile.needs_hub and not load_profile("offline").needs_hub


def test_models_that_are_not_trained_here_are_told_from_the_baseline():
    profile = load_profile("paper")
    told = {
        name: tuple(
            describe_model(profile, name)[key]
            for key in ("train_collection", "train_method", "train_factors")
        )
        for name in profile.prepared_names
    }
    assert list(told.values()) == [
        ("", "", ""),
        ("", "none", ""),
        ("released:scifact", "kmeans", "1-6"),
        ("released:fiqa", "kmeans", "1-6"),
    ]


def test_the_command_says_what_is_wrong(capsys):
    assert module.main(["quick"]) == 0
    assert "needs nothing from the hub" in capsys.readouterr().out
    assert module.main(["papre"]) == 1
    assert "There is no profile 'papre'" in capsys.readouterr().err
