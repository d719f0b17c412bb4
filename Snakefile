# Every notebook of a profile, in the order of what needs what; each job is one execution.
#
#   snakemake --cores 2 --config profile=offline       (-n: only show the plan)
#
# A job's output is its executed notebook. What the notebook makes (mined rows, model, results) is not
# declared: Snakemake deletes a job's declared outputs before running it again, while the stages keep
# what was made with the same settings and so make a rerun short.
#
# Each job says what it needs: threads, gpu, mem_mb, runtime (minutes). `--resources gpu=N` shares N
# GPUs among the jobs of one machine, each with its own, `mem_mb=N` its memory; cluster/ has a profile
# for Slurm.
import fcntl
import os
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from l2p_utils.files import UserError
from l2p_utils.profile import BASELINE, PROFILES, factors_name, load_profile, slug

NAME = str(config.get("profile", "quick"))
try:
    PROFILE = load_profile(NAME)
except UserError as error:
    sys.exit(str(error))  # without Snakemake's traceback
PROFILE_FILE = NAME if NAME.endswith((".yaml", ".yml")) else os.path.relpath(PROFILES / f"{NAME}.yaml")
NOTEBOOKS = config.get("notebooks") or os.path.relpath(Path(workflow.basedir) / "notebooks")
FOLDER = config.get("folder") or os.path.relpath(PROFILE.folder)
DONE = f"{FOLDER}/notebooks"  # executed notebooks

MINED = {slug(name): name for name in PROFILE.training_collections}
RUNS = {PROFILE.run_name(run): run for run in PROFILE.runs}
TRAINED = [*([BASELINE] if PROFILE.adaptation else []), *RUNS]
PREPARED = PROFILE.prepared_names
EVALUATED = PROFILE.evaluated_names
FETCHED = [f"{FOLDER}/fetched.json"] if PROFILE.needs_hub else []
RERANKED = PROFILE.training_data == "mined" and PROFILE.scoring.teacher != "bundled"
SMALL_MB = 3_800  # the most that a job of an bundled profile took, see the README
SHARDS = range(PROFILE.scoring.shards if RERANKED else 0)
ADAPTATION = slug(PROFILE.adaptation.collection) if PROFILE.adaptation else None
READING = [
    "04_inference_pooling", "05_pooling_aware", "06_cross_dataset", "07_beir_validation", "08_claims"
]
TOTAL = len(MINED) + len(TRAINED) + len(EVALUATED) + len(READING) + 1
# only `fetch` asks the network for anything: all jobs see the same files, with it and without it
OFFLINE = "HF_HUB_OFFLINE=1 "
# a job sees only the GPUs that are its own
PYTHON = f"exec {sys.executable} "
if PROFILE.gpu:
    PYTHON += "-m l2p_utils.devices {resources.gpu} "
EXECUTE = (
    f"{OFFLINE}{PYTHON}-m l2p_utils.execute {{input.notebook:q}} {{output.executed:q}}"
    f" --stop-with-parent --of {TOTAL} --log {{params.log:q}} --parameters {{params.values:q}}"
)


def values(**parameters):
    """`name=value` for the command line; a profile given as a file is found from anywhere."""
    name = str(Path(NAME).resolve()) if PROFILE_FILE == NAME else NAME
    return [f"profile={name}", *(f"{key}={value}" for key, value in parameters.items())]


def run_values(run):
    return values(
        collection=run.collection,
        pool_method=run.pool_method,
        pool_factors=factors_name(run.pool_factors),
        seed=PROFILE.seed if run.seed is None else run.seed,
    )


def executed(name):
    """The two files that a job gives."""
    return {"executed": f"{DONE}/{name}.ipynb", "html": f"{DONE}/{name}.html"}


def needs(gpu, mem_mb, minutes):
    """A job's resources, as a profile with hub models needs them; bundled ones take `SMALL_MB`."""
    memory = mem_mb if FETCHED else min(mem_mb, SMALL_MB)
    return {"gpu": gpu if PROFILE.gpu else 0, "mem_mb": memory, "runtime": minutes}


def made_by(model):
    """What stands for a model that is there: its training's notebook, or that it was fetched."""
    return f"{DONE}/02_training--{model}.ipynb" if model in TRAINED else FETCHED


def again_if_lost(output, *products):
    """Have a job run again when what its notebook made has been deleted since.

    An input function calls this, and so for jobs that the targets need, while Snakemake puts its
    plan together: as with --forcerun. Nothing is deleted to that end, so a plan (-n) and a run that
    is refused leave all as it was. Returns no input.
    """
    # not in a process that the run starts for one job, as on a cluster
    if workflow.is_main_process and Path(output).exists():
        if not all(Path(FOLDER, product).exists() for product in products):
            workflow.dag.forcefiles.add(output)
    return []


def mined_again(wildcards):
    name = wildcards.collection
    return again_if_lost(f"{DONE}/01_data_mining--{name}.ipynb", f"mined/{name}/provenance.json")


def scored_again(wildcards):
    """Scores are missed where there are no rows either: those are what they are for."""
    rows, scores = (f"mined/{wildcards.collection}{end}" for end in ("/provenance.json", ".scores"))
    marker = f"{FOLDER}/logs/scored--{wildcards.collection}--{wildcards.shard}"
    return [] if Path(FOLDER, rows).exists() else again_if_lost(marker, scores)


def trained_again(model):
    return again_if_lost(f"{DONE}/02_training--{model}.ipynb", f"models/{model}/provenance.json")


def evaluated_again(wildcards):
    name = wildcards.model
    return again_if_lost(f"{DONE}/03_evaluation--{name}.ipynb", f"results/{name}.csv")


def fetched_again(wildcards):
    products = [f"models/{model}/provenance.json" for model in PREPARED]
    return again_if_lost(f"{FOLDER}/fetched.json", *products)


wildcard_constraints:
    collection="|".join(map(re.escape, MINED)),
    model="|".join(map(re.escape, EVALUATED)),
    reading="|".join(READING),


onstart:
    # one run of a profile at a time; the lock goes with the process, however it ends
    os.makedirs(FOLDER, exist_ok=True)
    lock = open(f"{FOLDER}/.lock", "w")
    globals()["LOCK"] = lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"Another run of the profile {PROFILE.name!r} is at work in {FOLDER}; wait for it.")
    except OSError as error:
        sys.exit(f"{FOLDER}/.lock cannot be locked ({error}): runs/ needs a file system with flock.")


# Priorities: the warm-up holds everything up, then the longest trainings come first.

localrules:
    fetch,


rule all:
    input:
        # all of them: a middle one that was deleted is made again too
        expand(f"{DONE}/01_data_mining--{{collection}}.ipynb", collection=MINED),
        expand(f"{DONE}/02_training--{{model}}.ipynb", model=TRAINED),
        expand(f"{DONE}/03_evaluation--{{model}}.ipynb", model=EVALUATED),
        expand(f"{DONE}/{{reading}}.ipynb", reading=READING),
        f"{DONE}/00_token_pooling.ipynb",


rule fetch:
    input:
        fetched_again,
        profile=PROFILE_FILE,
    output:
        f"{FOLDER}/fetched.json",
    params:
        profile=values()[0].removeprefix("profile="),
    shell:
        f"env -u HF_HUB_OFFLINE {sys.executable} -m l2p_utils.fetch {{params.profile:q}}"


rule score:
    input:
        FETCHED,
        scored_again,
        profile=PROFILE_FILE,
    output:
        touch(f"{FOLDER}/logs/scored--{{collection}}--{{shard}}"),
    params:
        profile=values()[0].removeprefix("profile="),
        name=lambda wildcards: MINED[wildcards.collection],
    threads: PROFILE.threads
    resources:
        **needs(1, 24_000, 720),
    priority: 100
    shell:
        f"{OFFLINE}{PYTHON}-m l2p_utils.scoring --profile {{params.profile:q}}"
        " --collection {params.name:q} --shard {wildcards.shard}"


rule mine:
    input:
        mined_again,
        FETCHED,
        lambda wildcards: [
            f"{FOLDER}/logs/scored--{wildcards.collection}--{shard}" for shard in SHARDS
        ],
        profile=PROFILE_FILE,
        notebook=f"{NOTEBOOKS}/01_data_mining.ipynb",
    output:
        **executed("01_data_mining--{collection}"),
    params:
        values=lambda wildcards: values(collection=MINED[wildcards.collection]),
        log=f"{FOLDER}/logs/01_data_mining--{{collection}}.json",
    threads: PROFILE.threads
    resources:
        **needs(0, 16_000, 60),
    priority: lambda wildcards: 100 if wildcards.collection == ADAPTATION else 80
    shell:
        EXECUTE


if PROFILE.adaptation:

    rule adaptation:
        input:
            lambda wildcards: trained_again(BASELINE),
            f"{DONE}/01_data_mining--{ADAPTATION}.ipynb",
            profile=PROFILE_FILE,
            notebook=f"{NOTEBOOKS}/02_training.ipynb",
        output:
            **executed(f"02_training--{BASELINE}"),
        params:
            values=values(
                collection=PROFILE.adaptation.collection,
                pool_method="none",
                pool_factors=1,
                seed=PROFILE.seed,
            ),
            log=f"{FOLDER}/logs/02_training--{BASELINE}.json",
        threads: PROFILE.threads
        resources:
            **needs(1, 16_000, 60),
        priority: 90
        shell:
            EXECUTE


rule train:
    input:
        lambda wildcards: trained_again(wildcards.run),
        lambda wildcards: f"{DONE}/01_data_mining--{slug(RUNS[wildcards.run].collection)}.ipynb",
        made_by(BASELINE),
        profile=PROFILE_FILE,
        notebook=f"{NOTEBOOKS}/02_training.ipynb",
    output:
        **executed("02_training--{run}"),
    wildcard_constraints:
        run="|".join(map(re.escape, RUNS)) or "(?!)",
    params:
        values=lambda wildcards: run_values(RUNS[wildcards.run]),
        log=f"{FOLDER}/logs/02_training--{{run}}.json",
    threads: PROFILE.threads * PROFILE.processes
    resources:
        **needs(PROFILE.processes, 24_000 * PROFILE.processes, 480),
    priority: lambda wildcards: 60 if "kmeans" in wildcards.run or "hier" in wildcards.run else 50
    shell:
        EXECUTE


rule evaluate:
    input:
        evaluated_again,
        lambda wildcards: made_by(wildcards.model),
        profile=PROFILE_FILE,
        notebook=f"{NOTEBOOKS}/03_evaluation.ipynb",
    output:
        **executed("03_evaluation--{model}"),
    params:
        values=lambda wildcards: values(model=wildcards.model),
        log=f"{FOLDER}/logs/03_evaluation--{{model}}.json",
    threads: PROFILE.threads
    resources:
        **needs(1, 48_000, 480),
    priority: 20
    shell:
        EXECUTE


rule read:
    input:
        expand(f"{DONE}/03_evaluation--{{model}}.ipynb", model=EVALUATED),
        notebook=f"{NOTEBOOKS}/{{reading}}.ipynb",
    output:
        **executed("{reading}"),
    params:
        values=[f"source={FOLDER}/results", f"output={FOLDER}/figures"],
        log=f"{FOLDER}/logs/{{reading}}.json",
    resources:
        **needs(0, 4_000, 15),
    shell:
        EXECUTE


rule token_pooling:
    input:
        notebook=f"{NOTEBOOKS}/00_token_pooling.ipynb",
    output:
        **executed("00_token_pooling"),
    params:
        values=[],
        log=f"{FOLDER}/logs/00_token_pooling.json",
    resources:
        **needs(0, 4_000, 15),
    shell:
        EXECUTE
