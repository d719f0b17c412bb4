"""A release: a folder that plain PyLate loads, a card that tells only what was stored."""

import json
import re
import shutil

import datasets
import numpy as np
import pytest
import yaml
from datasets import Dataset, load_dataset
from synthetic import QUICK_MODELS, make_rows, write_synthetic

from l2p_utils.collection import load_collection
from l2p_utils.files import PROVENANCE, UserError, write_json
from l2p_utils.mining import mined_fingerprint
from l2p_utils.model import fingerprint
from l2p_utils.profile import PROFILES, Profile, slug
from l2p_utils.release import (
    ENGINES,
    load_both,
    release_dataset,
    release_model,
    repository_id,
    size_category,
)
from l2p_utils.results import read_rows, write_rows

NAME = "docs-scipy-kmeans-pf1-6-s42"
BASE = "mixedbread-ai/mxbai-edge-colbert-v0-32m"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
COLUMNS = ["query_id", "document_ids", "scores", "labels"]
REFUSED = "refused"


def make_profile(**changes):
    content = yaml.safe_load((PROFILES / "smoke.yaml").read_text("utf-8"))
    content["evaluation"] |= {"collections": ["docs:scipy", "docs:torch"], "pool_factors": "1-6"}
    return Profile.model_validate({"name": "tiny", **content, "plaid": [], **changes})


def hub_profile(collection, **changes):
    """As the paper's: a base and a training collection from the hub."""
    model = {"base": BASE, "revision": COMMIT, "query_length": 16, "document_length": 32}
    scoring = {"miner": "BAAI/bge-small-en-v1.5", "teacher": "BAAI/bge-reranker-v2-gemma"}
    runs = [{"collection": collection, "pool_method": "kmeans", "pool_factors": "1-6"}]
    settings = {"model": model, "scoring": scoring, "runs": runs, "adaptation": None}
    return make_profile(**settings | changes)


def write_mined(profile, collection, **provenance):
    """Two mined rows of the collection, with their provenance."""
    source = load_collection("docs:scipy", "train")
    documents = sorted(source.corpus)[:2]
    row = {
        "document_ids": documents,
        "scores": [1.5, 0.25],
        "labels": ["positive", "hard_negative"],
    }
    rows = Dataset.from_list([{"query_id": query} | row for query in sorted(source.queries)[:2]])
    folder = profile.folder / "mined" / slug(collection)
    rows.save_to_disk(folder)
    settings = {"collection": collection, "fingerprint": "f" * 64, "seed": 42}
    made = {"settings": settings, "miner": "miner", "teacher": "teacher", "rows": 2, "queries": 5}
    made |= {"documents": 77, "queries_dropped": {"no positive": 3}, "versions": "a=1;b=2"}
    write_json(folder / PROVENANCE, made | {"repositories": {}} | provenance)
    return rows


def write_model(profile, name, model_folder, rows, pooling="sklearn"):
    folder = profile.folder / "models" / name
    shutil.copytree(model_folder, folder)
    settings = {"rows": mined_fingerprint(rows), "pooling": pooling, "training": {"epochs": 2}}
    dev = {"looks_at_test_queries": bool(profile.dev_collections)}
    epoch = {"epoch": 2.0, "dev_ndcg@10": 0.625}
    write_json(folder / PROVENANCE, {"settings": settings, "rows": 2, "epoch": epoch, "dev": dev})


def prepare(profile, model_folder, **provenance):
    """Everything that a release of the profile's pooled model reads."""
    run, name = profile.runs[-1], profile.run_name(profile.runs[-1])
    rows = write_mined(profile, run.collection, **provenance)
    write_model(profile, name, model_folder, rows)
    for model, trained in (("baseline", QUICK_MODELS[0]), (name, QUICK_MODELS[2])):
        frames = [frame.assign(model=model) for frame in make_rows([trained], queries=8)]
        write_rows(profile.folder / "results", model, *frames)
    return name


def runs_in(folder, patch):
    """Profiles keep their runs in `folder`."""
    patch.setattr(Profile, "folder", property(lambda profile: folder / "runs" / profile.name))
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    return runs_in(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def released(tmp_path_factory, model_folder):
    """A released model, its card, the run's profile and what its folder is called."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        runs_in(folder, patch)
        profile = make_profile()
        prepare(profile, model_folder)
        target = folder / "your-name" / "your-model"
        release_model(profile, NAME, "your-name/your-model", target)
        rows = read_rows(profile.folder / "results")
    return target, (target / "README.md").read_text("utf-8"), profile, rows


def release(profile, name, repository="me/x", **options):
    """The card of a new release."""
    folder = release_model(profile, name, repository, **options)
    return (folder / "README.md").read_text("utf-8")


def front(card):
    return yaml.safe_load(card.split("---\n")[1])


def code_of(card):
    return re.findall(r"```python\n(.*?)```", card, re.S)


def table_rows(card, title):
    """The cells of the table below a line that holds `title`, by (collection, model)."""
    block = card[card.index(title) :].split("\n\n")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in block]
    return {(a, b): dict(zip(cells[0][4:], line, strict=True)) for a, b, _, _, *line in cells[2:]}


# ---------------------------------------------------------------- the model's folder


def test_plain_pylate_and_pooled_colbert_load_it_and_agree(released, model_folder, texts):
    plain, pooled = load_both(released[0])
    assert type(plain).__name__ == "ColBERT" and type(pooled).__name__ == "PooledColBERT"
    _, trained = load_both(model_folder)
    for is_query in (True, False):
        vectors = [model.encode(texts, is_query=is_query) for model in (plain, pooled, trained)]
        for one, other, original in zip(*vectors, strict=True):
            assert np.array_equal(one, other) and np.array_equal(one, original) and len(one) > 1


def test_it_holds_what_the_hub_needs_and_nothing_of_this_machine(released):
    folder, *_ = released
    assert {path.name for path in folder.iterdir()} >= {
        "README.md", "config.json", "config_sentence_transformers.json", "model.safetensors",
        "modules.json", "tokenizer.json", "tokenizer_config.json", "1_Dense",
    }  # fmt: skip
    texts = [*folder.rglob("*.json"), folder / "README.md"]
    assert not any(str(folder.parents[1]) in path.read_text() for path in texts)
    assert not (folder / PROVENANCE).exists()


def test_the_code_of_the_card_runs_as_it_stands(released, monkeypatch, capsys):
    folder, card, *_ = released
    monkeypatch.chdir(folder.parents[1])  # where your-name/your-model is a folder
    pooled, plain = code_of(card)
    assert 'pool_factor=4, pool_method="kmeans", use_sklearn=True' in pooled
    assert "l2p_utils" not in plain
    for code in (pooled, plain):
        exec(compile(code, "card", "exec"), {})
    counts, ranking = capsys.readouterr().out.splitlines()
    assert max(json.loads(counts.split("]")[0] + "]")) <= 5  # of about a dozen tokens
    assert "mean" in ranking.split("spline")[0]  # first


# ---------------------------------------------------------------- the model's card


def test_the_card_says_what_it_is_and_its_provenance_is_the_stored_one(released):
    _, card, *_ = released
    assert front(card) == {
        "language": "en",
        "license": "apache-2.0",
        "library_name": "PyLate",
        "pipeline_tag": "sentence-similarity",
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "tags": ["ColBERT", "PyLate", "sentence-transformers", "retrieval", "pooling", "kmeans",
                 "distillation"],
    }  # fmt: skip
    for line in (
        "| trained on | docs:scipy, 2 rows, seed 42 |",
        "| pooling in training | kmeans (sklearn), pool factor 1-6, one drawn for each batch |",
        "| dropped queries | 3 (no positive) |",
        "| miner | miner |",
        "| schedule | epochs 2 |",
        "| repositories | none: not from the hub |",
    ):
        assert line in card
    assert "epoch 2.0" in card and "dev_ndcg@10 0.625" in card and "77 documents" in card
    for section in ("Model details", "Intended use", "Usage", "Evaluation",
                    "Training-data provenance", "Licence and notices"):  # fmt: skip
        assert f"\n## {section}\n" in card


def test_the_tables_numbers_are_the_rows(released):
    _, card, profile, rows = released
    for engine, title in ENGINES.items():
        table = table_rows(card, title)
        stored = rows[(rows["engine"] == engine) & rows["pool_method"].isin(["none", "kmeans"])]
        assert len(table) == 2 * stored["collection"].nunique()
        shown = [cell for line in table.values() for cell in line.values()]
        assert len(shown) == len(stored) and "not measured" not in shown
        for row in stored.to_dict("records"):
            label = "baseline" if row["model"] == "baseline" else "**this model**"
            cell = table[row["collection"], label][f"PF{row['pool_factor']}"]
            assert cell == f"{row['ndcg@10']:.3f}"


def test_what_was_not_measured_is_said_to_be(root, model_folder):
    evaluation = {"collections": ["docs:scipy", "docs:sklearn"], "pool_factors": [1, 2, 9]}
    profile = make_profile(evaluation=evaluation)
    prepare(profile, model_folder)
    results = profile.folder / "results"
    (results / "rows" / "baseline.parquet").unlink()
    frames = make_rows([QUICK_MODELS[2]], queries=8, plaid=False)
    write_rows(results, NAME, *(f[f["collection"] != "docs:sklearn"] for f in frames))
    card = release(profile, NAME)
    table = table_rows(card, "Exact search")
    assert set(table["docs:scipy", "baseline"].values()) == {"not measured"}
    assert set(table["docs:sklearn", "**this model**"].values()) == {"not measured"}
    assert table["docs:scipy", "**this model**"]["PF9"] == "not measured"
    assert re.fullmatch(r"0\.\d{3}", table["docs:scipy", "**this model**"]["PF6"])
    assert "PLAID index" not in card


def test_an_unpooled_control_shows_every_method(root, model_folder):
    profile = make_profile()
    write_model(profile, "docs-scipy-pf1-s42", model_folder, write_mined(profile, "docs:scipy"), "")
    write_synthetic(profile.folder / "results", QUICK_MODELS, queries=8)
    card = release(profile, "docs-scipy-pf1-s42")
    for method in ("span", "kmeans (sklearn)", "hierarchical (pylate)"):
        assert f"**Exact search (MaxSim in float32), {method}:**" in card
    assert "pooling" not in front(card)["tags"] and "pool_method=" not in card


# ---------------------------------------------------------------- licences


def test_fiqa_is_for_non_commercial_use(root, model_folder):
    profile = hub_profile("beir:fiqa", dev_collections={"beir:fiqa": "nano:fiqa"})
    repositories = {"BeIR/fiqa": COMMIT, "BeIR/fiqa-qrels": COMMIT[::-1]}
    tools = {"miner": "BAAI/bge-small-en-v1.5", "teacher": "BAAI/bge-reranker-v2-gemma"}
    name = prepare(profile, model_folder, repositories=repositories, **tools)
    card = release(profile, name, "me/fiqa", dataset="me/fiqa-rows")
    folder = root / "runs" / "tiny" / "release" / "fiqa"
    assert "non-commercial" in (folder / "LICENSE").read_text()
    head = front(card)
    assert head["license"] == "other" and head["license_link"] == "LICENSE"
    assert head["license_name"] == "fiqa-2018-non-commercial" and head["base_model"] == BASE
    assert head["datasets"] == ["me/fiqa-rows", "BeIR/fiqa", "BeIR/fiqa-qrels"]
    notices = card.split("## Licence and notices")[1]
    assert "FiQA-2018: non-commercial use only" in notices
    assert f"Base model {BASE}: Apache-2.0." in notices
    assert "BAAI/bge-small-en-v1.5: MIT" in notices and "gemma: Apache-2.0" in notices
    assert f"BeIR/fiqa) at `{COMMIT}`" in card and f"revision {COMMIT}" in card
    assert "best on the test queries of nano:fiqa (so its results there are not held out)" in card
    rows = release_dataset(profile, "beir:fiqa", "me/rows")
    assert rows == root / "runs" / "tiny" / "release_data" / "rows" and (rows / "LICENSE").is_file()
    head = front((rows / "README.md").read_text("utf-8"))
    assert head["license_name"] == "fiqa-2018-non-commercial"
    assert head["source_datasets"] == ["BeIR/fiqa", "BeIR/fiqa-qrels"]


def test_the_base_models_commit_is_the_fetched_one(root, model_folder):
    profile = hub_profile("beir:fiqa")
    name = prepare(profile, model_folder)
    fetched = profile.folder / "models" / "baseline" / PROVENANCE
    fetched.parent.mkdir()
    write_json(fetched, {"settings": {"origin": {"revision": None, "commit": "f00d" * 10}}})
    card = release(profile, name)
    assert f"revision {'f00d' * 10}" in card and COMMIT not in card


@pytest.mark.parametrize(
    ("collection", "own_base", "given", "licence", "text"),
    [
        (f"beir:scifact@{COMMIT}", False, None, "cc-by-nc-2.0", "| repositories | not recorded |"),
        ("docs:scipy", False, None, "apache-2.0", f"Base model {BASE}: Apache-2.0."),
        ("docs:scipy", False, "cc-by-4.0", "cc-by-4.0", "scipy: BSD-3-Clause"),
        ("docs:scipy", True, "mit", "mit", "| base model | bundled (a checkpoint of its own)"),
        ("own", False, "cc-by-4.0", "cc-by-4.0", "`cc-by-4.0`, chosen by the publisher"),
        ("own", False, "other:mine", "other", "adds its text as `LICENSE`"),
        ("own", False, None, REFUSED, "trained on my-notes needs a licence"),
        ("own", False, "cc-by-9.0", REFUSED, "'cc-by-9.0' is none of "),
        ("own", False, "other", REFUSED, "'other' is none"),
        ("docs:scipy", True, None, REFUSED, "needs a licence.*base model"),
        ("beir:fiqa", False, "mit", REFUSED, "contradicts.*fiqa-2018-non-commercial"),
    ],
)
def test_a_licence_is_the_known_or_the_chosen_one_unless_unknown_or_too_wide(
    root, model_folder, collection, own_base, given, licence, text
):
    collection = str(root / "private" / "My Notes") if collection == "own" else collection
    model = {"base": str(model_folder), "query_length": 16, "document_length": 32}
    profile = hub_profile(collection, **({"model": model} if own_base else {}))
    name = prepare(profile, model_folder)
    if licence == REFUSED:
        with pytest.raises(UserError, match=text):
            release(profile, name, licence=given)
        return
    card = release(profile, name, licence=given)
    head = front(card)
    assert head["license"] == licence and text in card
    assert head.get("license_name") == ("mine" if licence == "other" else None)
    assert ("base_model" in head) != own_base
    assert "private" not in card and str(model_folder.parent) not in card


# ---------------------------------------------------------------- what is refused


def test_a_repository_that_the_hub_would_refuse_is_refused(root):
    for repository in ("x", "a/b/c", "a b/c", "", "me/x.git", "me/-x"):
        with pytest.raises(UserError, match="Expected owner/name"):
            release_model(make_profile(), NAME, repository)
    assert repository_id("me/x") == "me/x"


def measured_of_other_weights(folder):
    path = folder / "evaluated" / NAME / "docs-scipy-exact" / PROVENANCE
    write_json(path, {"settings": {"model": "0123"}})


def mined_anew(folder):
    path = folder / "models" / NAME / PROVENANCE
    path.write_text(path.read_text().replace('"rows": "', '"rows": "0'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "models" / NAME), "train the model .notebook 02"),
        (
            lambda folder: (folder / "results" / "rows" / f"{NAME}.parquet").unlink(),
            "no result.*03_evaluation",
        ),
        (lambda folder: shutil.rmtree(folder / "results"), "no result rows"),
        (measured_of_other_weights, "measured of other weights"),
        (mined_anew, "not those that the model was trained on"),
    ],
)
def test_what_does_not_belong_together_is_refused(root, model_folder, damage, message):
    profile = make_profile()
    prepare(profile, model_folder)
    measured = profile.folder / "evaluated" / NAME / "docs-scipy-exact" / PROVENANCE
    write_json(measured, {"settings": {"model": fingerprint(profile.folder / "models" / NAME)}})
    release(profile, NAME)
    shutil.rmtree(profile.folder / "release")
    damage(profile.folder)
    with pytest.raises(UserError, match=message):
        release(profile, NAME)
    assert not (profile.folder / "release").exists()


def test_only_a_release_is_replaced(root, model_folder):
    profile = make_profile()
    prepare(profile, model_folder)
    other = root / "thesis"
    other.mkdir()
    (other / "README.md").write_text("chapter one")
    with pytest.raises(UserError, match="something else than a release"):
        release(profile, NAME, folder=other)
    assert (other / "README.md").read_text() == "chapter one"
    folder = release_model(profile, NAME, "me/x")
    (folder / "stale.txt").write_text("")
    before = (folder / "README.md").read_text()
    assert release(profile, NAME) == before and not (folder / "stale.txt").exists()
    (folder / ".git").mkdir()
    with pytest.raises(UserError, match="something else"):
        release(profile, NAME)


# ---------------------------------------------------------------- the data set


def test_the_released_rows_are_the_mined_ones_and_their_card_runs(root, monkeypatch, capsys):
    profile = make_profile()
    rows = write_mined(profile, "docs:scipy")
    folder = release_dataset(profile, "docs:scipy", "me/rows", root / "me" / "rows")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
    again = load_dataset(str(folder), split="train")
    assert again.column_names == COLUMNS and again.to_list() == rows.to_list()
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    assert files == ["README.md", "data/train-00000-of-00001.parquet"]
    card = (folder / "README.md").read_text("utf-8")
    head = front(card)
    assert head["license"] == "bsd-3-clause" and head["task_categories"] == ["text-retrieval"]
    assert head["size_categories"] == "n<1K" and "| dropped queries | 3 (no positive) |" in card
    monkeypatch.chdir(root)
    (code,) = code_of(card)
    exec(compile(code, "card", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert said[0] == load_collection("docs:scipy", "train").queries[rows[0]["query_id"]]
    assert [line.split()[0] for line in said[1:]] == ["1.5", "0.25"]


@pytest.mark.parametrize("rows", ["them/rows", "them/rows@v1"])
def test_released_rows_are_named_and_not_released_again(root, model_folder, rows):
    released = {"training_data": "released", "released_rows": {"beir:fiqa": rows}}
    profile = hub_profile("beir:fiqa", **released)
    card = release(profile, prepare(profile, model_folder))
    assert front(card)["datasets"] == ["them/rows"]
    with pytest.raises(UserError, match="released rows .them/rows"):
        release_dataset(profile, "beir:fiqa", "me/rows")


def test_sizes_are_named_as_the_hub_names_them():
    counts = [1, 999, 1000, 99_999, 100_000, 2_000_000]
    found = [size_category(count) for count in counts]
    assert found == ["n<1K", "n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M"]
