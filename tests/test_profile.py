"""Profiles: the ones that ship load; what is misspelt or impossible is refused by its key."""

import copy
import functools
import operator
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from l2p_utils.files import ROOT, UserError
from l2p_utils.profile import (
    PROFILES,
    ModelSettings,
    factors_name,
    load_profile,
    parse_factors,
    pinned,
    released_name,
    slug,
)

QUICK = yaml.safe_load((PROFILES / "quick.yaml").read_text("utf-8"))


@pytest.fixture
def write(tmp_path):
    """Write a changed `quick` profile: dotted key → value (an integer part indexes a list)."""

    def write(changes, name="mine.yaml"):
        content = copy.deepcopy(QUICK)
        for key, value in changes.items():
            *parents, last = [int(p) if p.isdigit() else p for p in key.split(".")]
            functools.reduce(operator.getitem, parents, content)[last] = value
        (tmp_path / name).write_text(yaml.safe_dump(content), "utf-8")
        return tmp_path / name

    return write


def refusal(path):
    with pytest.raises(UserError) as refused:
        load_profile(path)
    return str(refused.value)


@pytest.mark.parametrize("name", ["smoke", "quick", "offline", "paper"])
def test_shipped_profiles_load(name):
    profile = load_profile(name)
    assert profile.name == name and profile.folder == ROOT / "runs" / name
    for run in profile.runs:
        assert profile.find_run(profile.run_name(run)) is run
    with pytest.raises(UserError, match="no model 'docs-scipy-pf9-s42'; it has .*baseline"):
        profile.find_run("docs-scipy-pf9-s42")


def test_quick_is_a_part_of_the_reference():
    profile, reference = load_profile("quick"), load_profile("offline")
    for part in ("seed", "threads", "model", "mining", "adaptation", "training", "use_sklearn"):
        assert getattr(profile, part) == getattr(reference, part)
    assert {*profile.evaluated_names} <= {*reference.evaluated_names}
    measured = [one.evaluation for one in (profile, reference)]
    for part in ("collections", "pool_methods", "pool_factors", "means"):
        assert {*getattr(measured[0], part)} <= {*getattr(measured[1], part)}
    assert measured[0].max_documents == measured[1].max_documents
    assert profile.model_names == ["baseline", "docs-scipy-pf1-s42", "docs-scipy-kmeans-pf1-6-s42"]
    assert profile.fitted_collections == ["docs:mixed", "docs:scipy"]
    assert profile.evaluation.pool_factors == [1, 2, 3, 4, 5, 6, 8, 16]


@pytest.mark.parametrize(
    ("file", "name"),
    [("mine.yaml", "mine"), ("my own runs.yaml", "my-own-runs"), ("合同 v1.yml", "合同-v1")],
)
def test_a_file_of_ones_own_loads_under_its_name_without_spaces(write, file, name):
    profile = load_profile(write({}, file))
    assert profile.name == name and profile.runs[1].pool_factors == [1, 2, 3, 4, 5, 6]


MISSPELT = [
    "sed", "model.query_lenght", "mining.hards", "adaptation.colection", "training.epoch",
    "runs.0.pool_metod", "evaluation.pool_factor", "plaid.0.methods",
]  # fmt: skip
WRONG = {
    "name": ["../elsewhere", ""],
    "seed": ["42", True, -1, 2**32],
    "threads": ["two", 1.5, 0],
    "model": [None],
    "model.base": ["bert"],
    "model.query_length": [0],
    "model.document_length": [100_000],
    "mining.text_only": [1],
    "mining.threshold": [0.0, float("nan")],
    "training.epochs": ["3", True],
    "training.batch_size": [0],
    "training.micro_batch": [0],
    "training.learning_rate": ["fast", True, -1e-5, float("inf")],
    "training.warmup_ratio": [1.0],
    "training.max_rows": [0],
    "runs": ["docs:scipy"],
    "runs.0.collection": [3],
    "runs.1.pool_method": ["means"],
    "runs.1.pool_factors": [0, "two"],
    "evaluation.collections": ["docs:scipy", [], ["docs:scipy", "docs:scipy"]],
    "evaluation.pool_methods": [["kmeans", "kmeans"], ["none"], ["k-means"]],
    "evaluation.pool_factors": [0, "two", [1, 2.0], []],
    "plaid.0.pool_methods": [["none"]],
    "plaid.0.collections": [[]],
}


@pytest.mark.parametrize("key", MISSPELT)
def test_misspelt_key_is_named(write, key):
    assert f"{key}: unknown key" in refusal(write({key: 1}))


@pytest.mark.parametrize(("key", "value"), [(key, x) for key, xs in WRONG.items() for x in xs])
def test_wrong_type_or_impossible_value_is_refused_with_its_key(write, key, value):
    assert f"\n  {key}" in refusal(write({key: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"mining.{kind}": 0 for kind in ("hard", "medium", "random")}, "at least 1 negative"),
        ({"mining.hard": 1000}, r"mining: .*at most .*_candidates, \d+"),
        ({"runs": [QUICK["runs"][1]] * 2, "plaid": []}, "twice: runs: docs-scipy-kmeans-pf1-6-s42"),
        ({"plaid.0.model": "basline"}, "plaid: model 'basline' is none of"),
        ({"plaid": [QUICK["plaid"][0]] * 2}, "listed twice: plaid: baseline"),
        ({"runs.0.collection": "docs:mixed"}, "kept for the adaptation"),
        ({"model.other_lengths": [{"document_length": 64, "query_length": 32}]}, "from the hub"),
        ({"released_models": ["owner/name"]}, "belong to a base from the hub"),
        ({"adaptation": None}, "adaptation: `{}` with the bundled model"),
        ({"model.base": "owner/name"}, "adaptation: .*else null; model.base is 'owner/name'"),
        ({"training_data": "released"}, "no released_rows of docs:scipy"),
        ({"scoring": {"teacher": "owner/name"}}, "scoring: .*expected both bundled, or neither"),
        ({"released_models": ["owner/name@"]}, "revision is empty; expected owner/name@<revision>"),
        ({"runs.1.pool_method": "none", "runs.1.pool_factors": 2}, "runs.1: .*unpooled training"),
        ({"runs.1.pool_factors": 1}, "runs.1: .*unpooled training"),
    ],
)
def test_values_that_contradict_each_other_are_refused(write, changes, message):
    assert re.search(message, refusal(write(changes)))


def test_lists_of_collections_and_seeds_are_a_run_each_with_a_baseline_per_seed(write):
    group = {"collection": ["docs:scipy", "docs:torch"], "pool_method": "span", "pool_factors": 2}
    plain = {"collection": "docs:scipy", "pool_method": "none", "seed": 7}
    profile = load_profile(
        write({"runs": [plain, group | {"seed": [42, 43], "renormalize": True}], "plaid": []})
    )
    assert profile.model_names == [
        "baseline", "baseline-s7", "baseline-s43", "docs-scipy-pf1-s7",
        "docs-scipy-span-pf2-unit-s42", "docs-scipy-span-pf2-unit-s43",
        "docs-torch-span-pf2-unit-s42", "docs-torch-span-pf2-unit-s43",
    ]  # fmt: skip
    assert profile.baselines == {"baseline": 42, "baseline-s7": 7, "baseline-s43": 43}
    starts = [profile.baseline_name(profile.seed_of(run)) for run in profile.runs]
    assert starts == ["baseline-s7", *["baseline", "baseline-s43"] * 2]
    assert set(load_profile("paper").baselines) == {"baseline"}  # though it has two seeds
    with pytest.raises(UserError, match="none.*leave it False"):
        load_profile(write({"runs": [plain | {"renormalize": True}], "plaid": []}))
    assert "listed twice: runs: docs-scipy-pf1-s7" in refusal(write({"runs": [plain] * 2}))


def test_patterns_choose_methods_and_lengths_of_models_and_must_fit_one(write):
    methods = {"*-kmeans-*": ["kmeans"], "docs-*": ["span"]}
    job = {"document_length": 300, "models": ["base*"], "collections": ["docs:torch"]}
    changes = {"evaluation.methods_of": methods, "evaluation.further": [job]}
    evaluation = load_profile(write(changes)).evaluation
    assert evaluation.methods("docs-scipy-kmeans-pf1-6-s42") == ["kmeans"]
    assert evaluation.methods("docs-scipy-pf1-s42") == ["span"]
    assert evaluation.methods("baseline") == ["span", "kmeans", "hierarchical"]
    for key, wrong in (
        ("evaluation.methods_of", {"*-hierarchical-*": ["span"]}),
        ("evaluation.further", [job | {"models": ["baseline-s43"]}]),
    ):
        assert "evaluation: no model is called" in refusal(write({key: wrong}))


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluation.collections": ["/a/x", "/b/X"]},
        {"evaluation.collections": ["docs:scipy", "/a/docs-scipy"]},
        {"evaluation.collections": ["beir:scifact@main", "beir:scifact@v2"]},
        {"evaluation.collections": ["/a/x", "/a/x/"]},
        {"plaid.0.collections": ["/a/x", "/b/x"]},
        {"runs.0.collection": "/a/x", "runs.1.collection": "/b/x"},
        {"runs.0.collection": "/a/x", "evaluation.collections": ["/b/x"]},
        {"runs.0.collection": "/a/docs-mixed"},
    ],
)
def test_two_collections_that_would_share_their_files_are_refused(write, changes):
    changes = changes if "plaid.0.collections" in changes else {**changes, "plaid": []}
    assert "same name in file names" in refusal(write(changes))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("5.0e-5", "5e-5", "learning_rate: expected a number.*5.0e-5"),
        ("training:", "training: {}\nmore:", "more: unknown key"),
        ("description:", "name:", "description: Field required"),
    ],
)
def test_what_a_file_says_otherwise_is_explained(tmp_path, old, new, message):
    text = (PROFILES / "quick.yaml").read_text("utf-8").replace(old, new, 1)
    (tmp_path / "a.yaml").write_text(text, "utf-8")
    assert re.search(message, refusal(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "content", [b"a: [1", b"", b"- 1\n- 2", b"just text", b"name: \xff\xfe", b"1: 2"]
)
def test_file_that_is_no_profile_is_refused_by_its_name(tmp_path, content):
    (tmp_path / "broken.yaml").write_bytes(content)
    assert "broken.yaml" in refusal(tmp_path / "broken.yaml")


@pytest.mark.parametrize("name", ["papper", "", "missing/profile.yaml"])
def test_unknown_profile_lists_those_that_exist(name):
    message = refusal(name)
    assert repr(name) in message
    assert all(known in message for known in ("smoke", "quick", "offline"))


@pytest.mark.parametrize(
    ("collection", "expected"),
    [
        ("docs:scipy", "docs-scipy"),
        ("path/to/Cranfield", "cranfield"),
        ("path/to/cranfield/", "cranfield"),
        ("/data/My Set (2)", "my-set-2"),
        ("beir.v2", "beir-v2"),
        ("beir:scifact@refs/pr/1", "beir-scifact"),
        ("folder@2", "folder-2"),
        ("合同 v1", "合同-v1"),
        ("e\u0301te\u0301", "été"),
    ],
)
def test_slug_is_safe_in_file_names(collection, expected):
    assert slug(collection) == expected


def test_a_name_with_nothing_in_it_is_refused_and_a_released_model_has_a_short_one():
    with pytest.raises(UserError, match="names no collection"):
        slug("///")
    assert released_name("owner/Some-Model@v1") == "released-some-model"


@pytest.mark.parametrize(
    ("value", "factors", "name"),
    [
        (3, [3], "3"),
        ("3", [3], "3"),
        ((1,), [1], "1"),
        ("1-6", [1, 2, 3, 4, 5, 6], "1-6"),
        ([3, 2], [2, 3], "2-3"),
        ("2+4", [2, 4], "2+4"),
        ([4, 2, 2, 1], [1, 2, 4], "1+2+4"),
        ("k16+k8", ["k8", "k16"], "k8+k16"),
        (["k4", "k32"], ["k4", "k32"], "k4+k32"),
    ],
)
def test_factors_are_sorted_and_named(value, factors, name):
    assert parse_factors(value) == factors and factors_name(factors) == name


@pytest.mark.parametrize(
    "bad",
    [0, -1, 2.0, True, None, "", "two", "0", "-3", "6-1", "1-2-3", "0-2", "1,2", [], [0], [True]]
    + [["2"], [1, 2.5], {"a": 1}, "k1", "k", "k4-8", "2+k4", [2, "k4"], "k08"],
)
def test_bad_factors_are_refused_with_what_was_given(bad):
    with pytest.raises(UserError) as refused:
        parse_factors(bad)
    assert repr(bad) in str(refused.value) and "1-6" in str(refused.value)


@given(st.sets(st.integers(1, 20), min_size=1))
def test_factors_survive_their_name(factors):
    assert parse_factors(factors_name(sorted(factors))) == sorted(factors)


def test_a_query_length_is_a_collections_whichever_revision():
    settings = ModelSettings(query_length=48, query_lengths={"beir:fiqa@main": 32})
    assert settings.query_length_on("beir:fiqa") == settings.query_length_on("beir:fiqa@v2") == 32
    assert settings.query_length_on("nano:fiqa") == 48


def test_a_repositorys_revision_stands_after_its_name_and_a_folder_has_none(tmp_path, monkeypatch):
    (tmp_path / "rows" / "old@2024").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for source in ("owner/name", "/data/rows@2024", "./rows@2024/train", "rows/old@2024"):
        assert pinned(source) == (source, None)
    for revision in ("v1", "refs/pr/1"):
        assert pinned(f"owner/name@{revision}") == ("owner/name", revision)
