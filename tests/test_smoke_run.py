"""The whole path once: a copy of the project runs its smoke profile, every notebook headless."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from l2p_utils import results
from l2p_utils.notebooks import READING, report
from l2p_utils.profile import load_profile

ROOT = Path(__file__).parents[1]
MODELS = ["baseline", "docs-scipy-kmeans-pf1-6-s42", "docs-scipy-pf1-s42"]


def snakemake(folder, *arguments):
    """Run Snakemake in a copy of the project, with that copy's package first on the path."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "profile=smoke"]
    command += ["--keep-going", "--rerun-incomplete", "--nolock", "--scheduler", "greedy"]
    command += arguments
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    environment["L2P_CACHE"] = str(folder / "cache")
    for variable in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        environment.pop(variable, None)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project in an empty folder, after one run of the smoke profile."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("l2p_utils", "notebooks", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    run = snakemake(folder)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]
    return folder


@pytest.mark.timeout(1800)
def test_every_job_leaves_an_executed_notebook_and_its_page(project):
    done = project / "runs" / "smoke" / "notebooks"
    names = {path.stem for path in done.glob("*.ipynb")}
    assert names == {
        "00_token_pooling",
        "01_data_mining--docs-scipy",
        *(f"02_training--{model}" for model in MODELS),
        *(f"03_evaluation--{model}" for model in MODELS),
        *READING,
    }
    for name in names:
        assert (done / f"{name}.html").stat().st_size > 10_000
        notebook = nbformat.read(done / f"{name}.ipynb", as_version=4)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert outputs and not any(output.output_type == "error" for output in outputs)


def test_the_rows_are_the_profiles_grid(project):
    rows = results.read_rows(project / "runs" / "smoke" / "results")
    exact = rows[rows["engine"] == "exact"]
    # 3 models × 2 collections × (unpooled + 3 methods × 2 factors × raw and unit length)
    assert len(exact) == 3 * 2 * (1 + 3 * 2 * 2)
    assert sorted(set(rows["model"])) == MODELS
    plaid = rows[rows["engine"] == "plaid"]
    assert len(plaid) == 2 * (1 + 2)
    assert (plaid["index_bytes"] > 0).all()
    assert rows["ndcg@10"].between(0.05, 1).all()  # random ranking of 100 documents: 0.05


def test_pooling_saves_what_it_says(project):
    rows = results.read_rows(project / "runs" / "smoke" / "results")
    vectors = rows[rows["engine"] == "exact"].groupby("pool_factor")["vectors_per_document"].mean()
    assert vectors[2] < 0.56 * vectors[1]
    assert vectors[4] < 0.32 * vectors[1]


def test_figures_and_tables_are_written(project):
    figures = project / "runs" / "smoke" / "figures"
    found = {path.name for path in figures.iterdir()}
    for number in (1, 2, 3, 4):
        assert {f"figure{number}.png", f"figure{number}.svg"} <= found
        assert {f"table{number}.csv", f"table{number}.md"} <= found


def test_the_report_and_the_plan_of_a_finished_run(project):
    smoke = load_profile("smoke")
    found = report(SimpleNamespace(folder=project / "runs" / "smoke"))
    stages = [line.split()[:2] for line in found.splitlines()[1:10]]
    assert ["train", "2"] in stages and ["evaluate", "3"] in stages
    assert "FAILED" not in found and all(word in found for word in ("figures", "results"))
    command = [sys.executable, "-m", "l2p_utils.notebooks", "plan", "smoke"]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    run = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    rows = {line.split()[0]: line.split()[1:4] for line in run.stdout.splitlines()}
    assert rows["train"] == [str(len(smoke.runs))] * 2 + ["0"], run.stderr


def test_a_trained_model_and_its_rows_can_be_released(project):
    smoke = project / "runs" / "smoke"
    parameters = ["profile=smoke", f"model={MODELS[1]}", "rows=me/rows", "repository=me/it"]
    command = [sys.executable, "-m", "l2p_utils.notebooks", "run", "notebooks/09_release.ipynb"]
    command += ["released.ipynb", "--parameters", *parameters]
    environment = {**os.environ, "PYTHONPATH": str(project), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    card = (smoke / "release" / "it" / "README.md").read_text("utf-8")
    assert "- me/rows" in card and "not measured" not in card
    assert (smoke / "release_data" / "rows" / "data" / "train-00000-of-00001.parquet").is_file()


def test_the_same_run_again_does_nothing(project):
    again = snakemake(project, "-n")
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout + again.stderr


def test_a_deleted_model_is_made_again_and_nothing_else_is_trained(project):
    smoke = project / "runs" / "smoke"
    made = {
        model: (smoke / "models" / model / "provenance.json").stat().st_mtime_ns for model in MODELS
    }
    before = json.loads((smoke / "models" / MODELS[1] / "provenance.json").read_text())
    shutil.rmtree(smoke / "models" / MODELS[1])
    run = snakemake(project, "--until", "train")
    assert run.returncode == 0, run.stderr[-4000:]
    after = json.loads((smoke / "models" / MODELS[1] / "provenance.json").read_text())
    assert after["settings"] == before["settings"]
    assert after["epoch"] == before["epoch"]  # the same seed gives the same model
    for model in (MODELS[0], MODELS[2]):
        stamp = (smoke / "models" / model / "provenance.json").stat().st_mtime_ns
        assert stamp == made[model]
