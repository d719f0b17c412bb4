"""A profile as a graph of jobs: the plan, and what happens when a run fails or is killed.

The runs use stand-in notebooks that write what the real ones would, and a profile of one model.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat
import pytest
import yaml
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_notebook
from snakemake.cli import get_argument_parser

from l2p_utils.notebooks import READING
from l2p_utils.profile import load_profile

ROOT = Path(__file__).parents[1]
KERNEL = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
PROFILE = """
description: one model, trained on one collection
model: {}
mining: {}
adaptation: {}
training: {}
runs: [{collection: "docs:scipy", pool_method: kmeans, pool_factors: "1-6"}]
evaluation: {collections: ["docs:scipy"]}
"""
TRAINED = "docs-scipy-kmeans-pf1-6-s42"
STAND_INS = {
    "01_data_mining": (
        "profile = ''\ncollection = ''",
        'product = f\'mined/{collection.replace(":", "-")}/provenance.json\'',
    ),
    "02_training": (
        "profile = ''\ncollection = ''\npool_method = ''\npool_factors = ''\n"
        "renormalize = False\nseed = 0",
        "name = 'baseline' if 'mixed' in collection else 'docs-scipy-kmeans-pf1-6-s42'\n"
        "product = f'models/{name}/provenance.json'",
    ),
    "03_evaluation": ("profile = ''\nmodel = ''", "product = f'results/rows/{model}.parquet'"),
    "00_token_pooling": ("source = ''", "product = 'figures/tokens.png'"),
    **{name: ("source = ''\noutput = ''", f"product = 'figures/{name}.png'") for name in READING},
}
# fails or waits where a file of that name asks for it
WORK = """
import os, pathlib, time
folder = pathlib.Path(os.environ["STAND_IN_FOLDER"])
target = folder / product
if (folder / "fail").exists() and product in (folder / "fail").read_text():
    raise RuntimeError(f"could not make {product}")
(folder / "at_work").write_text(product)
while (folder / "wait").exists() and product in (folder / "wait").read_text():
    time.sleep(0.1)
target.parent.mkdir(parents=True, exist_ok=True)
if not (folder / "keep").exists():
    target.write_text("{}")
"""


@pytest.fixture
def project(tmp_path):
    """A folder with stand-in notebooks and a small profile; runs go to tmp_path / "run"."""
    (tmp_path / "notebooks").mkdir()
    for name, (parameters, product) in STAND_INS.items():
        cells = [new_code_cell(parameters), new_code_cell(product), new_code_cell(WORK.strip())]
        cells[0].metadata["tags"] = ["parameters"]
        nbformat.write(
            new_notebook(cells=cells, metadata=KERNEL), tmp_path / "notebooks" / f"{name}.ipynb"
        )
    (tmp_path / "my small.yaml").write_text(PROFILE)
    (tmp_path / "run").mkdir()
    return tmp_path


def command(folder, *arguments, profile=None):
    """Snakemake's command line in `folder`, as the Makefile has it."""
    config = [
        "--config",
        f"profile={profile or folder / 'my small.yaml'}",
        f"folder={folder / 'run'}",
        *(f"have={have}" for have in [folder / "have"] if have.exists()),
        *(f"only={only.read_text()}" for only in [folder / "only"] if only.exists()),
    ]
    if profile is None:
        config += [f"notebooks={folder / 'notebooks'}"]
    options = ["--cores=2", "--keep-going", "--rerun-incomplete", "--nolock", "--scheduler=greedy"]
    snakefile = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    return [sys.executable, "-m", "snakemake", *snakefile, *options, *arguments, *config]


def environment(folder):
    here = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return here | {"PYTHONPATH": str(ROOT), "STAND_IN_FOLDER": str(folder / "run")}


def snakemake(folder, *arguments, profile=None):
    """Run Snakemake in `folder`; give the exit status and all that it said."""
    done = subprocess.run(
        command(folder, *arguments, profile=profile),
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout


def plan(folder, profile=None):
    """The jobs that a dry run lists, as output notebook → (notebook, parameters)."""
    status, said = snakemake(folder, "-n", "-p", profile=profile)
    assert status == 0, said
    jobs = {}
    for line in re.findall(r"exec .*l2p_utils\.notebooks run (.*)", said):
        notebook, output, *rest = shlex.split(line)
        assignments = [word for word in rest[rest.index("--parameters") + 1 :] if "=" in word]
        parameters = dict(assignment.split("=", 1) for assignment in assignments)
        jobs[Path(output).stem] = (Path(notebook), parameters)
    return jobs


def known_parameters(notebook):
    """Names in the notebook's cell of parameters."""
    cells = nbformat.read(notebook, as_version=4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    return {target.id for node in ast.parse(cell.source).body for target in node.targets}


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    return plan(tmp_path_factory.mktemp("offline"), profile="offline")


def test_the_offline_plan_is_the_papers_grid(offline):
    stages = Counter(job.split("--")[0] for job in offline)
    models = len(load_profile("offline").model_names)
    # baselines, PF1 and PF1-6, one factor, a number of vectors
    assert models == 5 + 2 * (5 * 3 + 3 * 3) + (2 * 2 + 2) + 3
    assert stages["01_data_mining"] == 2
    assert stages["02_training"] == stages["03_evaluation"] == models
    assert {"00_token_pooling", *READING} <= stages.keys()
    assert len(offline) == 2 + 2 * models + 6


def test_the_papers_plan_is_its_grid_with_what_each_job_needs(tmp_path):
    status, said = snakemake(tmp_path, "-n", "-p", profile="paper")
    assert status == 0, said
    counts = dict(re.findall(r"^(\w+) +(\d+)$", said.split("Job stats:")[-1], re.M))
    assert counts == {
        "fetch": "1", "mine": "2", "baseline": "1", "train": "23", "evaluate": "28", "read": "5",
        "token_pooling": "1", "all": "1", "total": "62",
    }  # fmt: skip
    commands = re.findall(r"notebooks run \S+/(\d\d)_\S+ .*?(--gpus \d)?$", said, re.M)
    assert Counter(commands) == {
        ("01", "--gpus 1"): 2, ("02", "--gpus 1"): 23, ("03", "--gpus 1"): 28,
        **{(number, ""): 1 for number in ("00", "04", "05", "06", "07", "08")},
    }  # fmt: skip


def test_each_job_gets_its_parameters(offline):
    assert offline["01_data_mining--docs-torch"][1] == {
        "profile": "offline",
        "collection": "docs:torch",
    }
    adaptation = offline["02_training--baseline"][1]
    assert (adaptation["collection"], adaptation["pool_method"]) == ("docs:mixed", "none")
    trained = offline["02_training--docs-torch-kmeans-pf1-6-s42"][1]
    assert trained == {
        "profile": "offline",
        "collection": "docs:torch",
        "pool_method": "kmeans",
        "pool_factors": "1-6",
        "renormalize": "False",
        "seed": "42",
    }
    unit = offline["02_training--docs-scipy-span-pf1-6-unit-s43"][1]
    assert (unit["renormalize"], unit["seed"]) == ("True", "43")
    assert offline["02_training--baseline-s43"][1]["seed"] == "43"
    assert offline["03_evaluation--docs-scipy-pf1-s42"][1]["model"] == "docs-scipy-pf1-s42"
    read = offline["08_claims"][1]
    assert Path(read["source"]).parts[-2:] == ("run", "results")
    assert Path(read["output"]).parts[-2:] == ("run", "figures")


def test_what_is_read_waits_for_every_models_rows(tmp_path):
    status, said = snakemake(tmp_path, "-n", profile="quick")
    assert status == 0, said
    inputs = re.findall(r"^rule read:\n +input: (.*)$", said, re.M)
    models = load_profile("quick").evaluated_names
    assert len(inputs) == len(READING) and models[0] == "baseline"
    for line in inputs:
        named = [Path(name).stem for name in line.split(", ") if name.endswith(".parquet")]
        assert named == models


def test_the_notebooks_know_the_parameters_that_they_get(offline):
    for job, (notebook, parameters) in offline.items():
        assert parameters.keys() <= known_parameters(ROOT / "notebooks" / notebook.name), job


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("offlin", "There is no profile 'offlin'; expected one of"),
        ("small.yaml", "traning: unknown key; is it misspelt?"),
    ],
)
def test_a_misspelt_profile_is_refused_before_anything_runs(tmp_path, profile, message):
    (tmp_path / "small.yaml").write_text(PROFILE + "traning: {}\n")
    status, said = snakemake(tmp_path, profile=profile)
    assert status == 1
    assert message in said
    assert "Traceback" not in said and "Snakefile" not in said
    assert not (tmp_path / "runs").exists() and "started" not in said


def test_only_what_is_missing_or_changed_runs_again(project):
    run, everything = project / "run", set(plan(project))
    assert len(everything) == 1 + 2 * 2 + 6
    for name in ("mined/docs-scipy", "models/baseline", f"models/{TRAINED}"):
        make_file(run / name / "provenance.json")
    for name in ("baseline", TRAINED):
        make_file(run / "results" / "rows" / f"{name}.parquet")
    for name in everything:
        for suffix in (".ipynb", ".html"):
            make_file(run / "notebooks" / f"{name}{suffix}")
    assert plan(project) == {}

    (run / "models" / TRAINED / "provenance.json").unlink()
    after_training = {f"02_training--{TRAINED}", f"03_evaluation--{TRAINED}", *READING}
    before = everything_in(run / "notebooks")
    assert set(plan(project)) == after_training
    assert everything_in(run / "notebooks") == before


def test_models_whose_rows_there_are_are_not_made_again(project):
    make_file(project / "have" / "rows" / "baseline.parquet")
    everything = {"00_token_pooling", "01_data_mining--docs-scipy", f"02_training--{TRAINED}"}
    # the baseline's training is what the other's starts from; nothing is read from a part of rows
    everything |= {f"03_evaluation--{TRAINED}", "02_training--baseline"}
    assert set(plan(project)) == everything
    make_file(project / "have" / "rows" / f"{TRAINED}.parquet")
    rest = {"00_token_pooling", "01_data_mining--docs-scipy"}
    assert set(plan(project)) == rest
    shutil.rmtree(project / "have")
    (project / "only").write_text("b*e *-s41")
    assert set(plan(project)) == rest | {"02_training--baseline", "03_evaluation--baseline"}


def test_what_a_job_made_is_kept_when_it_runs_again_and_made_again_when_deleted(project):
    run = project / "run"
    job = str(run / "notebooks" / "02_training--baseline.ipynb")
    product = run / "models" / "baseline" / "provenance.json"
    status, said = snakemake(project, job)
    assert status == 0, said
    product.write_text("made before")
    (run / "keep").touch()
    (project / "my small.yaml").write_text(PROFILE.replace("one model", "a model"))
    status, said = snakemake(project, job)
    assert status == 0 and "02_training--baseline: done" in said
    assert product.read_text() == "made before"
    status, said = snakemake(project, "-n", job)
    assert "Nothing to be done" in said

    (run / "keep").unlink()
    product.unlink()
    status, said = snakemake(project, job, str(product))  # as `all` asks for both
    assert status == 0 and product.read_text() == "{}"


def test_a_run_that_is_refused_deletes_nothing(project):
    run = project / "run"
    for suffix in (".ipynb", ".html"):
        make_file(run / "notebooks" / f"02_training--baseline{suffix}")
    before = everything_in(run / "notebooks")
    with FileLock(run / ".lock"):
        status, said = snakemake(project)
    assert status == 1 and "Another run of the profile 'my-small' is at work" in said
    assert everything_in(run / "notebooks") == before


def everything_in(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def make_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def test_a_failed_notebook_stops_only_what_depends_on_it(project):
    run = project / "run"
    (run / "fail").write_text("models/baseline/provenance.json")
    status, said = snakemake(project, "--quiet", "all")
    assert status == 1
    assert f"cell 3 of {project / 'notebooks' / '02_training.ipynb'} failed" in said
    assert "target = folder / product" in said  # the cell
    assert "RuntimeError: could not make models/baseline/provenance.json" in said
    executed = {path.stem for path in (run / "notebooks").glob("*.ipynb")}
    assert executed == {
        "00_token_pooling", "01_data_mining--docs-scipy", "02_training--baseline.failed",
    }  # fmt: skip
    (run / "fail").unlink()
    left = [f"{stage}--{name}" for stage in ("02_training", "03_evaluation")
            for name in ("baseline", TRAINED)]  # fmt: skip
    assert set(plan(project)) == {*left, *READING}


def test_a_killed_run_resumes(project):
    run = project / "run"
    target = str(run / "notebooks" / "03_evaluation--baseline.ipynb")
    product = "models/baseline/provenance.json"
    (run / "wait").write_text(product)
    first = subprocess.Popen(command(project, target), env=environment(project))
    at_work = run / "at_work"
    wait_for(lambda: at_work.exists() and at_work.read_text() == product)

    status, said = snakemake(project, target)
    assert status == 1 and "Another run of the profile 'my-small' is at work" in said

    first.kill()
    first.wait()
    assert not (run / "notebooks" / "02_training--baseline.ipynb").exists()
    (run / "wait").unlink()
    status, said = snakemake(project, target)
    assert status == 0, said
    assert Path(target).exists() and (run / product).exists()


def test_make_shares_the_machines_memory_among_the_jobs():
    said = {}
    for given in ([], ["MEM_MB=5000"], ["MEM_MB="]):
        make = ["make", "-n", "run", *given]
        said[tuple(given)] = subprocess.run(make, cwd=ROOT, capture_output=True, text=True).stdout
    total = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1])
    assert f"--resources gpu=1 mem_mb={total // 1000} --config" in said[()]
    assert "--resources gpu=1 mem_mb=5000 --config" in said["MEM_MB=5000",]
    assert "mem_mb" not in said["MEM_MB=",]


def test_make_stops_where_mining_or_the_baseline_failed_and_passes_options_on():
    make = ["make", "-n", "run", "lab", "PROFILE=my own.yaml", "LAB=--port 9 --allow-root"]
    # `make test` runs this under make, which would say so to a make of its own
    here = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    said = subprocess.run(make, cwd=ROOT, env=here, capture_output=True, text=True).stdout
    parts = r"(.*--until token_pooling mine baseline) && (.*--keep-going);"
    first, rest = re.search(parts, said).groups()
    assert "--keep-going" not in first
    assert first.count("'profile=my own.yaml'") + first.count('"profile=my own.yaml"') == 1
    assert said.rstrip().endswith("--port 9 --allow-root")


def test_two_jobs_of_a_bundled_profile_fit_into_8_gb(tmp_path):
    status, said = snakemake(tmp_path, "-n", profile="quick")
    assert status == 0, said
    asked = [int(number) for number in re.findall(r"mem_mb=(\d+)", said)]
    assert asked and 2 * max(asked) <= 7_700  # what is left of 8 GB for programs


def wait_for(condition, seconds=180):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.1)


def test_the_cluster_profile_has_options_that_snakemake_knows():
    options = {
        string.removeprefix("--")
        for action in get_argument_parser()._actions
        for string in action.option_strings
    }
    settings = yaml.safe_load((ROOT / "cluster" / "slurm" / "config.yaml").read_text())
    assert settings.keys() <= options


def test_on_the_cluster_a_job_has_the_threads_that_it_asks_for(tmp_path):
    # the executor is a package of its own: a plan does without
    cluster = ["--profile", str(ROOT / "cluster" / "slurm"), "--executor", "dryrun"]
    here = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *here, *cluster, "-n"]
        + ["--config", "profile=paper", f"folder={tmp_path / 'run'}"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    threads = Counter(re.findall(r"^ +threads: (\d+)$", said, re.M))
    assert threads == {str(load_profile("paper").threads): 2 + 1 + 23 + 28}
    assert said.count("slurm_partition=gpu") >= 54


def test_the_pod_asks_for_what_its_run_is_told():
    job = yaml.safe_load((ROOT / "cluster" / "kubernetes" / "job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    told = dict(word.split("=") for word in container["command"] if "=" in word)
    limits = container["resources"]["limits"]
    assert (told["GPUS"], told["CORES"]) == (str(limits["nvidia.com/gpu"]), limits["cpu"])
    assert int(told["MEM_MB"]) * 1e6 <= int(limits["memory"].removesuffix("Gi")) * 2**30
    assert int(told["CORES"]) == int(told["GPUS"]) * load_profile(told["PROFILE"]).threads
