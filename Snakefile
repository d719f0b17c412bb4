# Every notebook of a profile, in the order of what needs what; each job runs one.
#
#   snakemake --cores 2 --config profile=offline       (-n: only show the plan)
#
# A job's output is its executed notebook and what that makes (mined rows, a model, result rows). The
# latter stand under `update()`: they are kept when a job runs again, and the stages reuse what the same
# settings made; one that was deleted is made again.
# Each job says what it needs: threads, gpu, mem_mb, runtime (minutes). `--resources gpu=N mem_mb=M`
# shares a machine's GPUs and memory among its jobs; cluster/ has a profile for Slurm.
import os
import shlex
import sys
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import FileLock, Timeout

sys.path.insert(0, workflow.basedir)

from l2p_utils.files import UserError
from l2p_utils.notebooks import READING
from l2p_utils.profile import PROFILES, factors_name, load_profile, slug

NAME = str(config.get("profile", "quick"))
try:
    PROFILE = load_profile(NAME)
except UserError as error:
    sys.exit(str(error))  # without Snakemake's traceback
OWN = NAME.endswith((".yaml", ".yml"))
PROFILE_FILE = str(Path(NAME).expanduser()) if OWN else os.path.relpath(PROFILES / f"{NAME}.yaml")
NOTEBOOKS = config.get("notebooks") or os.path.relpath(Path(workflow.basedir) / "notebooks")
FOLDER = config.get("folder") or os.path.relpath(PROFILE.folder)
DONE, LOGS = f"{FOLDER}/notebooks", f"{FOLDER}/logs"
ROWS = f"{FOLDER}/mined/{{}}/provenance.json".format
MODEL = f"{FOLDER}/models/{{}}/provenance.json".format
RESULT = f"{FOLDER}/results/rows/{{}}.parquet".format

ADAPTATION = PROFILE.adaptation
MINED = {slug(name): name for name in PROFILE.training_collections}
# A part of the models: `have=FOLDER`, not those whose rows are there; `only="*-s43 baseline"`, those
# that fit a pattern.
PART = {"have", "only"} & config.keys()
HAVE, ONLY = Path(config.get("have", ".")) / "rows", str(config.get("only", "*")).split()
EVALUATED = [
    name for name in PROFILE.evaluated_names
    if not (HAVE / f"{name}.parquet").exists() and any(fnmatchcase(name, some) for some in ONLY)
]
RUNS = {PROFILE.run_name(run): run for run in PROFILE.runs}
BASELINES = PROFILE.baselines  # with their seeds; one without adaptation
STARTS = {name: PROFILE.baseline_name(PROFILE.seed_of(run)) for name, run in RUNS.items()}
TRAINED = [*(BASELINES if ADAPTATION else []), *RUNS]
FETCHED = [f"{FOLDER}/fetched.json"] if PROFILE.needs_hub else []
TOTAL = len(MINED) + len(TRAINED) + len(PROFILE.evaluated_names) + len(READING) + 1
SMALL_MB = 3_800  # the most that a job of a bundled profile took
# only `fetch` asks the network for anything
PYTHON = f"{shlex.quote(sys.executable)} -m l2p_utils"
RUN = (
    f"HF_HUB_OFFLINE=1 exec {PYTHON}.notebooks run {{input.notebook:q}} {{output.executed:q}}"
    f" --end-with-parent --of {TOTAL} --parameters {{params.values:q}}"
)
COMPUTE = RUN + (" --gpus {resources.gpu}" if PROFILE.gpu else "")
# a base from the hub becomes models/baseline: no notebook is about that
SAVE_BASE = f"HF_HUB_OFFLINE=1 exec {PYTHON}.training --baseline --profile {{params.profile:q}}"

def values(*assignments):
    """For the command line; a profile given as a file is found from anywhere."""
    return [f"profile={Path(PROFILE_FILE).resolve() if OWN else NAME}", *assignments]

def training(collection, pool_method, pool_factors, renormalize=False, seed=None):
    run = {"collection": collection, "pool_method": pool_method, "renormalize": renormalize}
    run["seed"] = PROFILE.seed if seed is None else seed
    run["pool_factors"] = factors_name(pool_factors)
    return values(*(f"{name}={value}" for name, value in run.items()))

def needs(gpu, mem_mb, minutes):
    """A job's resources, as a profile with hub models needs them; bundled ones take `SMALL_MB`."""
    memory = mem_mb if FETCHED else min(mem_mb, SMALL_MB)
    return {"gpu": gpu if PROFILE.gpu else 0, "mem_mb": memory, "runtime": minutes}

def outputs(name, product):
    """A notebook executed, its page, and what it makes."""
    page = f"{DONE}/{name}.html"
    return {"executed": f"{DONE}/{name}.ipynb", "page": page, "product": update(product)}

wildcard_constraints:
    collection="|".join(map(re.escape, MINED)) or "(?!)",
    run="|".join(map(re.escape, RUNS)) or "(?!)",
    baseline="|".join(map(re.escape, BASELINES)),
    model="|".join(map(re.escape, PROFILE.evaluated_names)),
    reading="|".join(READING),

onstart:
    # one run of a profile at a time; the lock goes with the process, however it ends
    os.makedirs(FOLDER, exist_ok=True)
    globals()["LOCK"] = FileLock(f"{FOLDER}/.lock")
    try:
        LOCK.acquire(timeout=0)
    except Timeout:
        sys.exit(f"Another run of the profile {PROFILE.name!r} is at work in {FOLDER}; wait for it.")

localrules:
    fetch,

# Priorities: a first picture within a minute; all else waits for the baseline; of the rest, the longest
# trainings come first.
rule all:
    input:
        # all of them: a product in the middle that was deleted is made again too
        [[ROWS(name), f"{DONE}/01_data_mining--{name}.ipynb"] for name in MINED],
        [[MODEL(n), f"{DONE}/02_training--{n}.ipynb"] for n in TRAINED if n in EVALUATED],
        [[RESULT(n), f"{DONE}/03_evaluation--{n}.ipynb"] for n in EVALUATED],
        [] if PART else expand(f"{DONE}/{{reading}}.ipynb", reading=READING),
        f"{DONE}/00_token_pooling.ipynb",

rule fetch:
    input: profile=PROFILE_FILE
    output: f"{FOLDER}/fetched.json"
    params: profile=values()[0].removeprefix("profile=")
    shell: f"env -u HF_HUB_OFFLINE {PYTHON}.hub {{params.profile:q}}"

rule mine:
    input: FETCHED, profile=PROFILE_FILE, notebook=f"{NOTEBOOKS}/01_data_mining.ipynb"
    output: **outputs("01_data_mining--{collection}", ROWS("{collection}"))
    benchmark: f"{LOGS}/mine/{{collection}}.tsv"
    params: values=lambda wildcards: values(f"collection={MINED[wildcards.collection]}")
    threads: PROFILE.threads
    resources: **needs(1, 24_000, 720)
    priority: 80
    shell: COMPUTE

rule baseline:
    input: FETCHED, profile=PROFILE_FILE, notebook=f"{NOTEBOOKS}/02_training.ipynb"
    output:
        **outputs("02_training--{baseline}", MODEL("{baseline}")) if ADAPTATION
        else {"product": update(MODEL("{baseline}"))}
    benchmark: f"{LOGS}/baseline/{{baseline}}.tsv"
    params:
        values=lambda wildcards: training(
            ADAPTATION.collection, "none", [1], seed=BASELINES[wildcards.baseline]
        ) if ADAPTATION else [],
        profile=values()[0].removeprefix("profile="),
    threads: PROFILE.threads
    resources: **needs(1, 16_000, 60)
    priority: 100
    shell: COMPUTE if ADAPTATION else SAVE_BASE

rule train:
    input:
        lambda wildcards: ROWS(slug(RUNS[wildcards.run].collection)),
        lambda wildcards: MODEL(STARTS[wildcards.run]),
        profile=PROFILE_FILE,
        notebook=f"{NOTEBOOKS}/02_training.ipynb",
    output: **outputs("02_training--{run}", MODEL("{run}"))
    benchmark: f"{LOGS}/train/{{run}}.tsv"
    params: values=lambda wildcards: training(**RUNS[wildcards.run].model_dump())
    threads: PROFILE.threads
    resources: **needs(1, 24_000, 480)
    priority: lambda wildcards: 60 if "kmeans" in wildcards.run or "hier" in wildcards.run else 50
    shell: COMPUTE

rule evaluate:
    input:
        lambda wildcards: MODEL(wildcards.model) if wildcards.model in TRAINED else FETCHED,
        profile=PROFILE_FILE,
        notebook=f"{NOTEBOOKS}/03_evaluation.ipynb",
    output: **outputs("03_evaluation--{model}", RESULT("{model}"))
    benchmark: f"{LOGS}/evaluate/{{model}}.tsv"
    params: values=lambda wildcards: values(f"model={wildcards.model}")
    threads: PROFILE.threads
    resources: **needs(1, 48_000, 480)
    priority: 20
    shell: COMPUTE

rule read:
    input: [*map(RESULT, PROFILE.evaluated_names)], notebook=f"{NOTEBOOKS}/{{reading}}.ipynb"
    output: executed=f"{DONE}/{{reading}}.ipynb", page=f"{DONE}/{{reading}}.html"
    benchmark: f"{LOGS}/read/{{reading}}.tsv"
    params: values=[f"source={FOLDER}/results", f"output={FOLDER}/figures"]
    resources: **needs(0, 4_000, 15)
    shell: RUN

rule token_pooling:
    input: notebook=f"{NOTEBOOKS}/00_token_pooling.ipynb"
    output: executed=f"{DONE}/00_token_pooling.ipynb", page=f"{DONE}/00_token_pooling.html"
    benchmark: f"{LOGS}/token_pooling/00_token_pooling.tsv"
    params: values=[]
    resources: **needs(0, 4_000, 15)
    priority: 110
    shell: RUN
