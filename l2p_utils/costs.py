"""What a run of a hub profile would cost: jobs, GPU hours, memory and disk, estimated.

Takes a profile; gives a Markdown table. Computation is counted in FLOPs from the models' shapes;
pooling on the host comes from what `make bench` measured. Nothing here was measured on a GPU.
``python -m l2p_utils.costs paper``
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tabulate import tabulate

from l2p_utils.evaluation import evaluation_tasks
from l2p_utils.files import UserError
from l2p_utils.pooling import stored_variant
from l2p_utils.profile import Profile, Run, load_profile, plain_name

GIGA, HOUR = 1e9, 3600.0
READING = 5  # notebooks 04 to 08; with 00, which needs no rows, one more


@dataclass(frozen=True)
class Architecture:
    """The shape of a transformer: what its FLOPs and its size follow from."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool  # an MLP of three matrices instead of two

    @property
    def body(self) -> int:
        """Weights of the layers' matrices: those that every token meets."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        mlp = (3 if self.gated else 2) * self.hidden * self.intermediate
        return self.layers * (attention + mlp)

    @property
    def parameters(self) -> int:
        """`body` and the embedding of the vocabulary; norms and biases are left out."""
        return self.body + self.vocabulary * self.hidden

    def forward_flops(self, tokens: int) -> float:
        """FLOPs of one text of `tokens` through the layers, every token attending to every one.

        A multiplication and an addition count as two; layers with local attention count as global.
        """
        attention = 4 * self.layers * self.heads * self.head_dim * tokens**2
        return 2 * self.body * tokens + attention


#: Shapes by the models' configs. The first is Ettin's 32 M encoder, mxbai-edge-colbert's body.
ENCODER = Architecture(10, 384, 576, 6, 6, 64, 50_368, gated=True)
MINER = Architecture(12, 384, 1536, 12, 12, 32, 30_522, gated=False)
TEACHER = Architecture(18, 2048, 16_384, 8, 1, 256, 256_000, gated=True)

#: Documents, training queries, test queries; BEIR's as its paper has them, NanoBEIR's as published.
SIZES = {
    "beir:scifact": (5_183, 809, 300),
    "beir:fiqa": (57_638, 5_500, 648),
    "beir:nfcorpus": (3_633, 2_590, 323),
    "beir:scidocs": (25_657, 0, 1_000),
    "nano:scifact": (2_919, 0, 50),
    "nano:fiqa": (4_598, 0, 50),
    "nano:nfcorpus": (2_953, 0, 50),
    "nano:scidocs": (2_210, 0, 50),
    "nano:touche": (5_745, 0, 49),
}
#: Tokens of a query and a passage with the teacher's prompt: assumed from the texts' mean lengths.
PAIR_TOKENS = {"beir:scifact": 400, "beir:fiqa": 280}
#: Documents of 300 word pieces that one thread pools in a second, at PF4: `make bench`.
#: The variants that the bench leaves out took 1.4 and 3.0 times as long as `pylate` beside it.
POOLED = {
    "span": 46_743.0,
    "kmeans fast": 2_189.0,
    "kmeans sklearn": 235.0,
    "hierarchical pylate": 2_629.0,
    "hierarchical euclidean": 2_629.0 / 1.4,
    "hierarchical paper": 2_629.0 / 3.0,
}
PLAID_QUERY = 0.2  # seconds of a query in fast-plaid on a CPU core, as measured here
PLAID_INDEX = 1 / 1000  # seconds a document to index: assumed
#: GB of host memory that the Snakefile asks for, for a job of each rule of a hub profile.
HOST_MEMORY = {"score": 24.0, "mine": 16.0, "train": 24.0, "evaluate": 48.0, "read": 4.0}
START = 30.0  # seconds that a job takes to start: a kernel, a model, a collection
ACTIVATION_BYTES = 34  # a hidden unit, token and layer in training: Korthikanti et al. 2022
ADAM_BYTES = 16  # a parameter in training: weight, gradient, two moments, float32 each


@dataclass(frozen=True)
class Machine:
    """What the estimate assumes: peak TFLOP/s in bf16, the share of it that is reached, threads."""

    tflops: float = 312.0
    large: float = 0.4  # share of the peak that the teacher reaches
    small: float = 0.1  # the 32 M encoder: narrow matrices keep a large GPU waiting
    threads: int = 4

    def hours(self, flops: float, share: float) -> float:
        """Hours of computation."""
        return flops / (self.tflops * 1e12 * share) / HOUR


@dataclass(frozen=True)
class Line:
    """A kind of job: how many, hours of GPU and of pooling for all of them, memory and disk."""

    kind: str
    jobs: int
    gpu: float = 0.0  # hours computing on the GPU
    host: float = 0.0  # hours that the job holds the GPU while its processor works
    memory: float = 0.0  # GB of GPU memory of one job
    disk: float = 0.0  # GB that stay

    @property
    def hours(self) -> float:
        """GPU hours: the GPU is held while the host pools and while a job starts."""
        held = self.gpu + self.host
        return held + self.jobs * START / HOUR if held else 0.0

    @property
    def host_memory(self) -> float:
        """GB of host memory that one job asks for."""
        return HOST_MEMORY.get(re.split(r"[ ,:]", self.kind)[0], 0.0)


def estimate(profile: Profile, machine: Machine) -> list[Line]:
    """What each kind of a profile's jobs costs.

    Raises
    ------
    UserError
        For a profile whose model is bundled, or a collection whose size is not known here.
    """
    if profile.model.bundled:
        raise UserError(
            f"The profile {profile.name!r} needs no GPU; expected one with hub models, like paper."
        )
    return [_fetch(profile), *_scoring(profile, machine), *_training(profile, machine),
            *_evaluating(profile, machine), Line("read: 00, 04–08", READING + 1)]  # fmt: skip


def _size(collection: str) -> tuple[int, int, int]:
    name = plain_name(collection)
    if name not in SIZES:
        raise UserError(
            f"The size of {name} is not known to l2p_utils.costs. Known are: {', '.join(SIZES)}."
        )
    return SIZES[name]


def _fetch(profile: Profile) -> Line:
    """Weights are published in float32; a text takes about 1 kB, and is kept twice."""
    models = ENCODER.parameters * (1 + len(profile.released_models))
    if profile.training_data == "mined":
        models += MINER.parameters + TEACHER.parameters
    documents = sum(_size(name)[0] for name in profile.hub_collections)
    return Line("fetch", 1, disk=(4 * models + 2 * 1000 * documents) / GIGA)


def _scoring(profile: Profile, machine: Machine) -> Iterator[Line]:
    """The miner reads every document once, the teacher every candidate of every query."""
    candidates = profile.mining.hard_candidates + profile.mining.random_candidates + 1
    for name in profile.training_collections:
        documents, queries, _ = _size(name)
        if profile.training_data == "mined":
            tokens = PAIR_TOKENS[plain_name(name)]
            teacher = queries * candidates * TEACHER.forward_flops(tokens)
            hours = machine.hours(teacher, machine.large)
            hours += machine.hours(documents * MINER.forward_flops(300), machine.small)
            batch = profile.scoring.batch_size * (profile.scoring.max_length + 50)
            # two MLP activations of the longest batch, on top of the weights; two bytes each
            memory = 2 * (TEACHER.parameters + 2 * batch * TEACHER.intermediate) / GIGA
            pairs = f"{queries * candidates:,} pairs"
            yield Line(f"score {name} ({pairs})", profile.scoring.shards, hours, memory=memory)
        yield Line(f"mine {name}", 1, disk=queries * profile.mining.n_ways * 50 / GIGA)


def _training(profile: Profile, machine: Machine) -> Iterator[Line]:
    for name in profile.training_collections:
        for method in ("none", "span", "hierarchical", "kmeans"):
            runs = [r for r in profile.runs if (r.collection, r.pool_method) == (name, method)]
            if runs:
                single = [_one_training(profile, run, machine) for run in runs]
                yield replace(
                    single[0],
                    kind=f"train {name}, {'unpooled' if method == 'none' else method}",
                    jobs=len(runs),
                    gpu=sum(line.gpu for line in single),
                    host=sum(line.host for line in single),
                    disk=len(runs) * 4 * ENCODER.parameters / GIGA,
                )


def _one_training(profile: Profile, run: Run, machine: Machine) -> Line:
    """Forward and twice as much backward; documents padded to the model's length."""
    settings, length = profile.training, profile.model.document_length
    queries = min(_size(run.collection)[1], settings.max_rows or math.inf)
    steps = settings.epochs * math.ceil(queries / settings.batch_size)
    texts = settings.batch_size * profile.mining.n_ways
    flops = 3 * steps * texts * ENCODER.forward_flops(length)
    dev = profile.dev_collections.get(run.collection)
    measured = _size(dev)[0] if dev else settings.dev_documents
    flops += settings.epochs * measured * ENCODER.forward_flops(length)
    variant = stored_variant(run.pool_method, profile.hierarchical, profile.use_sklearn)
    pooled = sum(factor > 1 for factor in run.pool_factors) / len(run.pool_factors)
    seconds = steps * pooled * texts * _pooling_seconds(run.pool_method, variant, machine)
    activations = texts * length * ENCODER.hidden * ENCODER.layers * ACTIVATION_BYTES
    return Line(
        "train", 1,
        gpu=machine.hours(flops, machine.small),
        host=seconds / HOUR,
        memory=(ADAM_BYTES * ENCODER.parameters + activations) / GIGA,
    )  # fmt: skip


def _pooling_seconds(method: str, variant: str, machine: Machine) -> float:
    """Seconds to pool one document once; scikit-learn's k-means runs on one thread."""
    if method == "none":
        return 0.0
    threads = 1 if variant == "sklearn" else machine.threads
    return 1 / POOLED[f"{method} {variant}".strip()] / threads


def _evaluating(profile: Profile, machine: Machine) -> Iterator[Line]:
    """Each collection is encoded once a model, and pooled by every method and factor."""
    found = {"exact": Line("", 0, memory=2.0), "plaid": Line("", 0, memory=4.0)}
    factors = sum(factor > 1 for factor in profile.evaluation.pool_factors)
    for model in profile.evaluated_names:
        tasks = evaluation_tasks(profile, model)
        for engine in dict.fromkeys(task.engine for task in tasks):
            line = found[engine]
            found[engine] = replace(line, jobs=line.jobs + 1)
        for task in tasks:
            documents, _, queries = _size(task.collection)
            settings = {
                (method, stored_variant(method, variant, profile.use_sklearn))
                for method in task.pool_methods
                for variant in task.variants
            }
            line = found[task.engine]
            gpu = machine.hours(
                documents * ENCODER.forward_flops(profile.model.document_length), machine.small
            )
            seconds = sum(
                factors * documents * _pooling_seconds(*setting, machine) for setting in settings
            )
            if task.engine == "plaid":
                searched = 1 + factors * len(settings)
                seconds += searched * (queries * PLAID_QUERY + documents * PLAID_INDEX)
            found[task.engine] = replace(line, gpu=line.gpu + gpu, host=line.host + seconds / HOUR)
    yield replace(found["exact"], kind="evaluate, exact search")
    if found["plaid"].jobs:
        yield replace(found["plaid"], kind="— the same jobs, PLAID", jobs=0)


def totals(lines: Sequence[Line]) -> Line:
    """All lines as one; memory is that of the largest job, `host` holds all hours but `gpu`."""
    gpu = sum(line.gpu for line in lines)
    return Line(
        "all",
        sum(line.jobs for line in lines),
        gpu=gpu,
        host=sum(line.hours for line in lines) - gpu,
        memory=max(line.memory for line in lines),
        disk=sum(line.disk for line in lines),
    )


def table(profile: Profile, machine: Machine) -> str:
    """The estimate in Markdown; the last line is the sum."""
    lines = estimate(profile, machine)
    shown = [[
        line.kind, line.jobs or "", _number(line.gpu), _number(line.hours),
        _number(line.memory), _number(line.host_memory), _number(line.disk),
    ] for line in lines]  # fmt: skip
    last = totals(lines)
    hours = sum(line.hours for line in lines)
    shown.append([f"**{cell}**" if cell else "" for cell in (
        last.kind, last.jobs, _number(last.gpu), _number(hours), _number(last.memory),
        _number(max(line.host_memory for line in lines)), _number(last.disk),
    )])  # fmt: skip
    heads = ["job", "jobs", "GPU computing, h", "GPU held, h", "GPU memory, GB",
             "host memory asked, GB", "disk, GB"]  # fmt: skip
    return tabulate(shown, heads, tablefmt="github", disable_numparse=True,
                    colalign=["left", *["right"] * 6]) + "\n"  # fmt: skip


def _number(value: float) -> str:
    if value < 0.005:
        return ""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what a run of a profile with hub models would cost: an estimate, never measured."""
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.costs", description=main.__doc__)
    parser.add_argument("profile")
    machine = Machine()
    for name in ("tflops", "large", "small", "threads"):
        default = getattr(machine, name)
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = vars(parser.parse_args(arguments))
    try:
        profile = load_profile(options.pop("profile"))
        print(table(profile, Machine(**options)), end="")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
