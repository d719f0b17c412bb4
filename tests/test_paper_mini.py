"""The paper profile in miniature: every kind of its jobs, through a hub on loopback.

A copy of the project fetches miniature repositories by their real ids, with faults on the way, and
then runs all else without asking the hub for anything.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from datasets import load_from_disk
from hub.repositories import BASE, MINER, RELEASED, ROWS, TEACHER, make_repositories
from hub.server import commit_of, serving
from pylate import models as pylate

from l2p_utils import results
from l2p_utils.evaluation import EXPECTED
from l2p_utils.files import read_json
from l2p_utils.model import PooledColBERT
from l2p_utils.notebooks import READING
from l2p_utils.profile import load_profile
from l2p_utils.teacher import load_reranker

ROOT = Path(__file__).parents[1]
MINI = ROOT / "tests" / "hub" / "paper_mini.yaml"
NANO, BEIR = ["nano:fiqa", "nano:scifact"], ["beir:fiqa", "beir:scifact"]
KMEANS = "beir-scifact-kmeans-pf1-6-s42"
# what goes wrong while everything is fetched, once each
FAULTS = [
    ("/api/datasets/mteb/scifact", "429"),
    ("NanoSciFact/resolve", "500"),
    ("mteb/fiqa/resolve", "reset"),
    ("NanoFiQA2018/resolve", "wrong"),
]

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = make_repositories(tmp_path_factory.mktemp("repositories"))
    with serving(root) as server:
        yield server


@pytest.fixture(scope="module")
def mini(hub, tmp_path_factory):
    """A copy of the project after its run; what the hub was asked for while it was fetched."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("l2p_utils", "notebooks", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    shutil.copy(MINI, folder)
    for part, kind in FAULTS:
        hub.fail(part, kind)
    project = SimpleNamespace(folder=folder, home=tmp_path_factory.mktemp("home"))
    project.run = folder / "runs" / MINI.stem
    fetched = snakemake(project, hub.address, "--until", "fetch")
    assert fetched.returncode == 0, fetched.stdout[-4000:] + fetched.stderr[-8000:]
    project.asked = len(hub.asked)
    whole = snakemake(project, hub.address)
    assert whole.returncode == 0, whole.stdout[-4000:] + whole.stderr[-8000:]
    project.rows = results.read_rows(project.run / "results")
    return project


def environment(project, address):
    """That of a machine whose hub is at `address`, with caches of its own."""
    taken = ("HF_", "L2P_", "PYTEST", "TRANSFORMERS")
    here = {name: value for name, value in os.environ.items() if not name.startswith(taken)}
    here |= {"HF_ENDPOINT": address, "HF_HOME": str(project.home), "HF_HUB_DISABLE_XET": "1"}
    return here | {"L2P_CACHE": str(project.home / "l2p"), "PYTHONPATH": str(project.folder)}


def snakemake(project, address, *arguments, profile=MINI.name):
    """Run Snakemake as the Makefile does, on two imaginary GPUs."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--resources", "gpu=2"]
    command += ["--config", f"profile={profile}", "--keep-going", "--rerun-incomplete", "--nolock"]
    command += ["--scheduler", "greedy", *arguments]
    return subprocess.run(
        command,
        cwd=project.folder,
        env=environment(project, address),
        capture_output=True,
        text=True,
        timeout=1500,
    )


# --- the plan -------------------------------------------------------------------------------------


def test_every_kind_of_job_of_the_paper_profile_is_in_the_miniature():
    paper, mini = load_profile("paper"), load_profile(MINI)
    for name in ("base", *EXPECTED):
        assert getattr(mini.model, name) == getattr(paper.model, name)
    same = ("training_data", "released_rows", "dev_collections", "training_collections")
    for name in (*same, "use_sklearn", "hierarchical", "gpu", "adaptation"):
        assert getattr(mini, name) == getattr(paper, name), name
    for name in ("hub_collections", "released_models"):
        assert set(getattr(mini, name)) < set(getattr(paper, name)), name
    for name in ("miner", "teacher"):
        assert getattr(mini.scoring, name) == getattr(paper.scoring, name)
    for name in ("pool_methods", "pool_factors", "baseline_variants", "precision"):
        assert getattr(mini.evaluation, name) == getattr(paper.evaluation, name)


# --- the run --------------------------------------------------------------------------------------


def test_the_faults_happened_and_the_hub_was_asked_for_nothing_after_the_fetch(hub, mini):
    assert [left for *_, left in hub.faults] == [0] * len(FAULTS)
    assert len(hub.asked) == mini.asked


def test_what_was_fetched_is_listed_with_its_commits(hub, mini):
    found = read_json(mini.run / "fetched.json")
    for kind, names in {"models": [BASE, MINER, TEACHER], "datasets": ["mteb/fiqa"]}.items():
        for name in names:
            assert found[name] == commit_of(hub.root / kind / name)


def test_every_job_leaves_an_executed_notebook(mini):
    done = mini.run / "notebooks"
    profile = load_profile(MINI)
    assert {path.stem for path in done.glob("*.ipynb")} == {
        "00_token_pooling",
        "01_data_mining--beir-scifact",
        "01_data_mining--beir-fiqa",
        *(f"02_training--{profile.run_name(run)}" for run in profile.runs),
        *(f"03_evaluation--{model}" for model in profile.evaluated_names),
        *READING,
    }
    for path in done.glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        assert outputs and not any(output.output_type == "error" for output in outputs)


def test_the_rows_scores_are_the_rerankers(hub, mini):
    mined = load_from_disk(mini.run / "mined" / "beir-scifact")
    made = read_json(mini.run / "mined" / "beir-scifact" / "provenance.json")
    commit = commit_of(hub.root / "models" / TEACHER)
    assert made["teacher"] == f'{TEACHER} @ {commit}, logit of "Yes", 256 tokens'
    assert len(mined) >= 20 and set(map(len, mined["document_ids"])) == {4}
    teacher = load_reranker(hub.root / "models" / TEACHER, 256, torch.device("cpu"), "float32")
    texts = texts_of(hub, "scifact")
    for row in list(mined)[:5]:
        pairs = [(texts[row["query_id"]], texts[document]) for document in row["document_ids"]]
        assert np.allclose(teacher.scores(pairs, 4), row["scores"], atol=1e-4)


def texts_of(hub, name):
    """Texts of a set's documents (with their titles) and queries, by id."""
    folder = hub.root / "datasets" / "mteb" / name
    files = [folder / f"{kind}.jsonl" for kind in ("corpus", "queries")]
    frame = pd.concat([pd.read_json(path, lines=True, dtype=False) for path in files])
    whole = frame["title"].fillna("").str.cat(frame["text"], sep=" ").str.strip()
    return dict(zip(frame["_id"].astype(str), whole, strict=True))


def test_the_rows_are_the_profiles_grid(mini):
    rows, pooled = mini.rows, 5 * 2  # factors, raw and unit length
    profile = load_profile(MINI)
    exact = rows[rows["engine"] == "exact"]
    each = exact.groupby("model").size().to_dict()
    assert set(each) == set(profile.evaluated_names)
    assert each.pop("baseline") == len(NANO) * (1 + pooled * (2 + 3))
    assert set(each.values()) == {len(NANO) * (1 + pooled * 3)}
    variants = exact[exact["model"] != "baseline"].groupby("pool_method")["pool_variant"].unique()
    assert variants.map(list).to_dict() == {
        "none": [""], "span": [""], "kmeans": ["sklearn"], "hierarchical": ["paper"],
    }  # fmt: skip
    plaid = rows[rows["engine"] == "plaid"]
    assert plaid.groupby("model")["collection"].unique().map(sorted).to_dict() == {
        "baseline": BEIR,
        KMEANS: ["beir:scifact"],
    }
    assert (plaid["index_bytes"] > 0).all()


def test_lengths_are_the_profiles(mini):
    lengths = mini.rows.groupby("model")["document_length"].unique().map(list).to_dict()
    assert lengths.pop("baseline-d12-q8") == [12]
    assert list(lengths.values()) == [[24]] * 4
    other = mini.rows["model"] == "baseline-d12-q8"
    assert set(mini.rows.loc[other, "query_length"]) == {8}
    queries = mini.rows[~other].groupby("collection")["query_length"].unique().map(list).to_dict()
    assert queries == {name: [8 if name == "beir:fiqa" else 12] for name in [*NANO, *BEIR]}


def test_documents_are_found(mini):
    """Random weights, but words in common: far better than chance (.1 to .2 of 30 documents)."""
    unpooled = mini.rows[mini.rows["pool_factor"] == 1]
    assert unpooled["ndcg@10"].mean() > 0.4
    assert mini.rows["ndcg@10"].between(0, 1).all()


def test_a_model_was_trained_from_the_fetched_one(mini):
    made = read_json(mini.run / "models" / KMEANS / "provenance.json")
    assert made["settings"]["pooling"] == "sklearn"
    assert made["dev"]["collection"] == "nano:scifact, test split"
    start, trained = (
        PooledColBERT(str(mini.run / "models" / name), device="cpu").state_dict()
        for name in ("baseline", KMEANS)
    )
    assert start.keys() == trained.keys()
    assert any(not torch.equal(start[name], trained[name]) for name in start)


def test_every_figure_and_table_and_the_papers_values_beside_ours(mini):
    figures = mini.run / "figures"
    for number in (1, 2, 3, 4):
        assert (figures / f"figure{number}.png").stat().st_size > 10_000
        assert (figures / f"table{number}.csv").is_file()
    compared = pd.read_csv(figures / "paper_vs_ours.csv")
    verdicts = compared["verdict"].value_counts()
    assert verdicts.sum() == len(compared) > 600
    assert verdicts["not run"] > 0 and verdicts["outside"] > 0  # a miniature is not the paper
    assert compared.loc[compared["verdict"] != "not run", "ours"].notna().all()


# --- afterwards -----------------------------------------------------------------------------------


def test_the_same_run_again_does_nothing(hub, mini):
    again = snakemake(mini, hub.address, "-n")
    assert again.returncode == 0 and "Nothing to be done" in again.stdout + again.stderr


def test_a_trained_model_can_be_released_and_pylate_reads_it(hub, mini):
    parameters = {"profile": MINI.name, "model": KMEANS, "rows": "me/rows", "repository": "me/it"}
    command = [sys.executable, "-m", "l2p_utils.notebooks", "run", "notebooks/09_release.ipynb"]
    command += ["released.ipynb", "--parameters", *(f"{k}={v}" for k, v in parameters.items())]
    here = environment(mini, hub.address) | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=mini.folder, env=here, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    folder = mini.run / "release" / "it"
    card = (folder / "README.md").read_text("utf-8")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == BASE
    texts = ["about this one", "and that"]
    theirs = pylate.ColBERT(str(folder), device="cpu").encode(texts, is_query=False)
    ours = PooledColBERT(str(folder), device="cpu").encode(texts, is_query=False)
    assert all(np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_released_rows_train_a_model(hub, mini):
    content = yaml.safe_load(MINI.read_text("utf-8")) | {"training_data": "released"}
    runs = [{"collection": "beir:scifact", "pool_method": "span", "pool_factors": "1-6"}]
    content |= {"runs": runs, "released_models": [RELEASED[0]], "plaid": []}
    (mini.folder / "mini_released.yaml").write_text(yaml.safe_dump(content))
    done = snakemake(mini, hub.address, "--until", "train", profile="mini_released.yaml")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    run = mini.folder / "runs" / "mini_released"
    mined = load_from_disk(run / "mined" / "beir-scifact")
    source = hub.root / "datasets" / ROWS["scifact"] / "data" / "train-00000-of-00001.parquet"
    assert mined["query_id"] == pd.read_parquet(source)["query_id"].tolist()
    assert not list((run / "mined").glob("*.scores"))  # no miner, no teacher
    made = read_json(run / "models" / "beir-scifact-span-pf1-6-s42" / "provenance.json")
    assert made["rows"] == len(mined)


def test_with_the_network_gone_all_is_made_again_from_what_was_fetched(hub, mini):
    """Last of all: it stops the hub and puts the run aside."""
    hub.shutdown()
    hub.server_close()
    before = mini.rows[mini.rows["model"] == "baseline-d12-q8"].reset_index(drop=True)
    mini.run.rename(mini.folder / "first_run")
    target = (
        mini.run.relative_to(mini.folder) / "notebooks" / "03_evaluation--baseline-d12-q8.ipynb"
    )
    done = snakemake(mini, hub.address, str(target))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    again = results.read_rows(mini.run / "results").reset_index(drop=True)
    pd.testing.assert_frame_equal(again.drop(columns="query_ms"), before.drop(columns="query_ms"))
