"""What a run consists of: a YAML file, checked by a schema whose comments describe every key."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from l2p_utils.files import ROOT, UserError

PROFILES = Path(__file__).parent / "profiles"
BASELINE = "baseline"
BUNDLED = "docs:"
HUB = ("nano:", "beir:")
MAX_SEED = 2**32 - 1  # what NumPy takes


def plain_name(collection: str) -> str:
    """A hub collection's name without its revision: `beir:scifact@main` → `beir:scifact`."""
    return collection.partition("@")[0] if collection.startswith(HUB) else collection


def slug(collection: str) -> str:
    """A collection's name as part of a file name: `docs:scipy` → `docs-scipy`.

    A folder goes by its own name, in lower case; a revision is left out.
    """
    name = plain_name(collection)
    if not name.startswith((BUNDLED, *HUB)):
        name = Path(name).expanduser().resolve().name
    # macOS decomposes the letters of file names
    name = re.sub(r"\W+", "-", unicodedata.normalize("NFC", name).lower()).strip("-")
    if not name:
        raise UserError(f"{collection!r} names no collection; expected docs:scipy or a folder.")
    return name


def pinned(source: str) -> tuple[str, str | None]:
    """A hub id and the revision after it: `owner/name@v1` → `owner/name`, `v1`; else None.

    A folder, and any path that does not read owner/name, is itself.
    """
    found = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)@(.+)", source)
    return (found[1], found[2]) if found and not Path(source).exists() else (source, None)


def released_name(repository: str) -> str:
    """A released model's name in the rows: `owner/Some-Model@v1` → `released-some-model`."""
    return f"released-{slug(pinned(repository)[0].rstrip('/').rsplit('/', 1)[-1])}"


def factors_name(pool_factors: list[int | str]) -> str:
    """`[1, …, 6]` → `1-6`, `[2]` → `2`, `[2, 4]` → `2+4`, `["k8", "k16"]` → `k8+k16`."""
    first, last = pool_factors[0], pool_factors[-1]
    if len(pool_factors) > 1 and type(first) is int and pool_factors == [*range(first, last + 1)]:
        return f"{first}-{last}"
    return "+".join(map(str, pool_factors))


def parse_factors(value: Any) -> list[int | str]:
    """Pool factors from `3`, `"1-6"`, `"2+4"` or a list: sorted, each once.

    Or numbers of vectors that a document keeps: `"k16"`, `"k8+k16"`, `["k8", "k16"]`.
    """
    factors = [value] if type(value) is int else value
    if isinstance(value, str) and (found := re.fullmatch(r"(\d+)-(\d+)", value)):
        factors = [*range(int(found[1]), int(found[2]) + 1)]
    elif isinstance(value, str):
        factors = [int(part) if part.isdecimal() else part for part in value.split("+")]
    known = isinstance(factors, list | tuple) and (
        all(type(n) is int and n >= 1 for n in factors)
        # one vector is the first token's
        or all(isinstance(n, str) and re.fullmatch(r"k([2-9]|[1-9]\d+)", n) for n in factors)
    )
    if not known or not factors:
        raise UserError(
            f"pool_factors is {value!r}; expected a whole number of at least 1 (2), a range "
            '("1-6"), a list ([1, 2, 4]), or numbers of vectors to keep, 2 or more ("k8+k16").'
        )
    return sorted(set(factors), key=lambda n: int(str(n).removeprefix("k")))


def check_seed(value: Any) -> None:
    """Refuse what cannot be a seed."""
    if type(value) is not int or not 0 <= value <= MAX_SEED:
        raise UserError(f"seed is {value!r}; expected a whole number from 0 to {MAX_SEED}.")


def check_run(pool_method: str, pool_factors: list[int | str], renormalize: bool = False) -> None:
    """Refuse factors above 1 or `renormalize` without a method, a method with factor 1 alone."""
    if pool_method == "none" and renormalize:
        raise UserError(
            "renormalize scales means to unit length, and pool_method 'none' makes none: leave it "
            "False."
        )
    if (pool_method == "none") != (pool_factors == [1]):
        raise UserError(
            f"pool_method {pool_method!r} with pool_factors {pool_factors}: unpooled training is "
            "pool_method 'none' with pool_factors [1], and the other way round."
        )


def _refuse_repeats(values: Sequence[Any]) -> Sequence[Any]:
    if twice := sorted({str(value) for value in values if values.count(value) > 1}):
        raise ValueError(f"listed twice: {', '.join(twice)}; expected each once")
    return values


def _check_source(value: str) -> str:
    if value != "bundled" and "/" not in value:
        raise ValueError("expected `bundled`, a hub id (owner/name) or a folder's path")
    if value.endswith("@"):
        raise ValueError(f"{value!r}: its revision is empty; expected owner/name@<revision>")
    return value


Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
QueryLength = Annotated[int, Field(ge=4, le=8192)]  # lengths: word pieces, prefix token included
DocumentLength = Annotated[int, Field(ge=8, le=8192)]
# `bundled`, a hub id (see `pinned` for revisions) or a folder
Source = Annotated[str, AfterValidator(_check_source)]
Factors = Annotated[list[int], BeforeValidator(parse_factors)]
Budgets = Annotated[list[int | str], BeforeValidator(parse_factors)]
Method = Literal["span", "kmeans", "hierarchical"]
Variant = Literal["pylate", "paper", "euclidean"]
Unique = AfterValidator(_refuse_repeats)
Methods = Annotated[list[Method], Unique]
Collections = Annotated[list[str], Field(min_length=1), Unique]


class _Settings(BaseModel):
    # strict: neither True nor "3" is a count
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := list(self.contradictions()):
            raise ValueError("; ".join(problems))
        return self

    def contradictions(self) -> Iterable[str]:
        """What is wrong with the settings together."""
        return []


class Lengths(_Settings):
    """Where documents and queries are cut."""

    document_length: DocumentLength
    query_length: QueryLength


class ModelSettings(_Settings):
    """The encoder that all runs start from. What is null may be anything, else it must be that."""

    base: Source = "bundled"
    revision: str | None = None  # commit, branch or tag of a base from the hub; null: the newest
    query_length: QueryLength = 32  # queries are cut here
    document_length: DocumentLength = 128  # documents are cut here
    query_lengths: dict[str, QueryLength] = {}  # what differs, by collection
    other_lengths: list[Lengths] = []  # a hub baseline is measured at these too
    dim: Count | None = None  # output dimension
    query_prefix: str | None = None
    document_prefix: str | None = None
    do_query_expansion: bool | None = None  # whether queries are padded with [MASK]
    skiplist: Literal["punctuation", "none"] | None = None  # tokens left out of documents
    # texts that give the bundled encoder's projection
    projection_collection: str = "docs:transformers"
    projection_texts: int = Field(400, ge=10)

    @property
    def bundled(self) -> bool:
        """Whether the base is the bundled encoder, which needs an adaptation."""
        return self.base == "bundled"

    @property
    def baselines(self) -> dict[str, Lengths]:
        """The baselines at other lengths, by name: `baseline-d180-q32`, …"""
        return {
            f"{BASELINE}-d{lengths.document_length}-q{lengths.query_length}": lengths
            for lengths in self.other_lengths
        }

    def query_length_on(self, collection: str) -> int:
        """Length of the queries of `collection`, whichever revision of it."""
        lengths = {plain_name(name): length for name, length in self.query_lengths.items()}
        return lengths.get(plain_name(collection), self.query_length)


class MiningSettings(_Settings):
    """How a training query gets its documents; the defaults are the paper's."""

    hard_candidates: Count = 100  # documents nearest to the query that may become negatives
    random_candidates: CountOrZero = 30  # documents drawn at random that may become negatives
    hard: CountOrZero = 5  # negatives of a row: the best-scored hard candidates
    medium: CountOrZero = 5  # drawn from the other hard candidates
    random: CountOrZero = 5  # drawn from the random candidates
    threshold: float = Field(0.95, gt=0)  # drops negatives above this share of the anchor's score
    anchor: Literal["top_positive", "median_positive"] = "top_positive"
    teacher_scores: Literal["raw", "sigmoid"] = "raw"  # as they are, or between 0 and 1
    text_only: bool = False  # without titles: for training queries that are documents' titles
    max_queries: Count | None = None  # mine only so many training queries; null: all
    max_documents: Count | None = None  # … among so many documents, all relevant ones included

    @property
    def n_ways(self) -> int:
        """Documents in a row: the positive and its negatives."""
        return 1 + self.hard + self.medium + self.random

    def contradictions(self) -> Iterable[str]:
        candidates = self.hard_candidates + self.random_candidates
        if not 2 <= self.n_ways <= 1 + candidates:
            given = f"hard + medium + random is {self.n_ways - 1}; expected at least 1 negative"
            yield f"{given} and at most hard_candidates + random_candidates, {candidates}"


class Scoring(_Settings):
    """Who proposes candidates (the miner) and who scores them (the teacher)."""

    miner: Source = "bundled"
    miner_revision: str | None = None
    teacher: Source = "bundled"
    teacher_revision: str | None = None
    max_length: int = Field(1024, ge=16)  # a reranker's input is cut here, in tokens
    batch_size: Count = 32  # pairs that a reranker scores at once
    checkpoint_queries: Count = 16  # queries between two savings

    def contradictions(self) -> Iterable[str]:
        if (self.miner == "bundled") != (self.teacher == "bundled"):
            yield f"miner {self.miner}, teacher {self.teacher}: expected both bundled, or neither"


class FitSettings(_Settings):
    """How a model is fitted, whatever the loss."""

    epochs: Count = 1  # the best on the dev queries is kept
    batch_size: Count = 8  # queries (rows) per step, in all processes together
    micro_batch: Count | None = None  # rows at a time; the rest accumulates. null: the whole batch
    learning_rate: float = Field(5e-5, gt=0)  # at its highest; it then falls linearly to 0
    warmup_ratio: float = Field(0.1, ge=0, lt=1)  # share of the steps in which it rises
    frozen_layers: CountOrZero = 0  # keep the embeddings and so many of the lowest layers
    max_rows: Count | None = None  # so many rows, spread evenly over the mined ones; null: all
    dev_queries: Count = 100  # queries of the dev split that pick the epoch
    dev_documents: Count = 500  # documents searched for them, all relevant ones included
    checkpoint_steps: Count = 50  # steps between two checkpoints


class TrainingSettings(FitSettings):
    """One fine-tuning: distillation on mined rows."""

    teacher_scale: float = Field(1.0, gt=0)  # multiplies the teacher's scores before their softmax


class Adaptation(FitSettings):
    """The unpooled, contrastive training that makes the bundled encoder a late-interaction model.

    A training query and its relevant document are a pair; the documents of the other queries that
    are computed at once (`micro_batch`, or the whole batch) are its negatives.
    """

    collection: str = "docs:mixed"  # no run may train on it
    batch_size: Count = 32
    learning_rate: float = Field(1e-4, gt=0)
    temperature: float = Field(0.2, gt=0)  # MaxSim is divided by it before the softmax


class Run(_Settings):
    """One trained model."""

    collection: str  # `docs:scipy`, `beir:scifact`, a folder's path
    pool_method: Literal["none", "span", "kmeans", "hierarchical"]
    pool_factors: Budgets = [1]  # each batch draws one: 2, "1-6", [1, 2, 4]; or "k8+k16" vectors
    renormalize: bool = False  # train with means scaled to unit length
    seed: Seed | None = None  # null: the profile's; the bundled model's adaptation has the same

    def contradictions(self) -> Iterable[str]:
        check_run(self.pool_method, self.pool_factors, self.renormalize)
        return []


def _expand_runs(runs: Any) -> Any:
    """A run with lists of collections or seeds is one run for each of their pairs."""
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        return runs  # refused by type
    expanded = []
    for run in runs:
        keys = [key for key in ("collection", "seed") if isinstance(run.get(key), list)]
        values = itertools.product(*(run[key] for key in keys))
        expanded += [run | dict(zip(keys, some, strict=True)) for some in values]
    return expanded


class Further(_Settings):
    """Models that are measured at another document length too, in ``results/d<length>``."""

    document_length: DocumentLength
    models: Annotated[list[str], Field(min_length=1)]  # names or patterns: "*-kmeans-*"
    collections: Collections


class EvaluationSettings(_Settings):
    """What every model is measured on, by exact search."""

    collections: Collections  # their test queries are searched
    pool_methods: Methods = ["span", "kmeans", "hierarchical"]
    pool_factors: Factors = [1, 2, 3, 4, 5, 6]  # measured one by one
    # variants of hierarchical that the baseline has beside the profile's
    baseline_variants: Annotated[list[Variant], Unique] = []
    # null: the profile's. On a CPU, float16 is float32
    precision: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    max_queries: Count | None = None  # search only so many test queries; null: all
    max_documents: Count | None = None  # … a part with all relevant documents: scores too high
    # pooled means as they are (the paper), scaled to unit length, or both
    means: Annotated[list[Literal["raw", "unit"]], Field(min_length=1), Unique] = ["raw", "unit"]
    # the pool methods of some models alone, by a pattern of their names: {"*-span-*": [span]}
    methods_of: dict[str, Methods] = {}
    further: list[Further] = []  # some models at another document length, stored apart
    trec_runs: bool = False  # keep every ranking: evaluated/<model>/<collection>-exact/runs/

    def methods(self, model: str) -> list[str]:
        """Pool methods that `model` is measured with: the first pattern's that it fits, or all."""
        fitting = (some for name, some in self.methods_of.items() if fnmatchcase(model, name))
        return list(next(fitting, self.pool_methods))


class PlaidJob(_Settings):
    """One model's documents in a PLAID index, per collection, method and factor."""

    model: str  # `baseline`, or as in runs/<profile>/models
    collections: Collections
    pool_methods: Annotated[Methods, Field(min_length=1)]
    max_queries: Count | None = None  # the same for all jobs on a collection; null: all


class Profile(_Settings):
    """Everything that a run needs to know."""

    name: str = Field(pattern=r"^\w[\w.-]*$")  # a folder under runs/; default: the file's name
    description: str  # what the profile is for, in a line
    seed: Seed = 42
    threads: Count = 1  # processor threads per job
    # of the encoder; auto: bfloat16 where the processor computes in it, else float32
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    use_sklearn: bool = False  # k-means of scikit-learn, as in the paper; false: ours, faster
    hierarchical: Variant = "pylate"  # Ward's input in training and evaluation
    model: ModelSettings
    training_data: Literal["mined", "released"] = "mined"  # or rows that the authors published
    released_rows: dict[str, Source] = {}  # by collection, the hub data set of those
    mining: MiningSettings
    scoring: Scoring = Scoring()
    adaptation: Adaptation | None = None  # {} with the bundled base, else null
    training: TrainingSettings
    gpu: bool = False  # whether jobs that compute ask for a GPU
    dev_collections: dict[str, str] = {}  # by training collection, whose test split picks epochs
    # one model each, or one per pair of listed collections and seeds
    runs: Annotated[list[Run], BeforeValidator(_expand_runs)]
    released_models: list[Source] = []  # from the hub, measured as they are
    evaluation: EvaluationSettings
    plaid: list[PlaidJob] = []

    def contradictions(self) -> Iterable[str]:
        base = f"model.base is {self.model.base!r}"
        if self.model.bundled != (self.adaptation is not None):
            yield f"adaptation: `{{}}` with the bundled model, else null; {base}"
        if self.model.bundled and self.prepared_names:
            yield f"other_lengths, released_models belong to a base from the hub; {base}"
        lacking = sorted({*self.training_collections} - {*self.released_rows})
        if self.training_data == "released" and lacking:
            yield f"training_data: no released_rows of {', '.join(lacking)}"
        if self.adaptation and self.adaptation.collection in self.training_collections:
            yield f"runs: {self.adaptation.collection!r} is kept for the adaptation"
        names, jobs = self.evaluated_names, []
        for job in self.plaid:
            jobs += [
                f"plaid: {job.model} {c} {m}" for c in job.collections for m in job.pool_methods
            ]
            if job.model not in names:
                yield f"plaid: model {job.model!r} is none of {names}"
        patterns = [*self.evaluation.methods_of]
        patterns += [model for job in self.evaluation.further for model in job.models]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                yield f"evaluation: no model is called {pattern!r}; there are {names}"
        _refuse_repeats([*(f"runs: {name}" for name in names), *jobs])
        owners: dict[str, str] = {}  # of file names: each would replace the other's files
        for name in [*self.fitted_collections, *self.measured_collections]:
            owner = owners.setdefault(slug(name), name)
            if owner != name:
                yield f"collections: {owner!r} and {name!r} have the same name in file names"
                yield "rename a folder, or write one collection the same way everywhere"

    @property
    def model_names(self) -> list[str]:
        """The baselines, then the trained models in the order of `runs`."""
        return [*self.baselines, *map(self.run_name, self.runs)]

    @property
    def baselines(self) -> dict[str, int]:
        """The models that trainings start from, with their seeds: `baseline`, the profile's, first.

        The bundled model is adapted once per training seed; a base from the hub has no seed.
        """
        seeds = [self.seed, *(map(self.seed_of, self.runs) if self.adaptation else [])]
        return {self.baseline_name(seed): seed for seed in seeds}

    def baseline_name(self, seed: int) -> str:
        """The model that the trainings with `seed` start from."""
        own = self.adaptation is None or seed == self.seed
        return BASELINE if own else f"{BASELINE}-s{seed}"

    @property
    def training_collections(self) -> list[str]:
        """Collections to mine and train on, each once."""
        return list(dict.fromkeys(run.collection for run in self.runs))

    @property
    def fitted_collections(self) -> list[str]:
        """Collections whose training split is read: the adaptation's too."""
        first = [self.adaptation.collection] if self.adaptation else []
        return [*first, *self.training_collections]

    @property
    def prepared_names(self) -> list[str]:
        """Models that come from the hub as they are: baseline, its other lengths, released ones."""
        base = [] if self.model.bundled else [BASELINE]
        return [*base, *self.model.baselines, *map(released_name, self.released_models)]

    @property
    def evaluated_names(self) -> list[str]:
        """Every model that is measured: the baseline, the trained ones, the others of the hub."""
        return [*self.model_names, *(name for name in self.prepared_names if name != BASELINE)]

    @property
    def measured_collections(self) -> list[str]:
        """Collections that models are measured on, each once."""
        jobs = [*self.plaid, *self.evaluation.further]
        others = [name for job in jobs for name in job.collections]
        return list(dict.fromkeys([*self.evaluation.collections, *others]))

    @property
    def hub_collections(self) -> list[str]:
        """Collections of this profile that come from the hub."""
        dev = [self.dev_collections.get(name) for name in self.fitted_collections]
        names = [*self.fitted_collections, *dev, *self.measured_collections]
        return list(dict.fromkeys(name for name in names if name and name.startswith(HUB)))

    @property
    def needs_hub(self) -> bool:
        """Whether anything has to be fetched before the first job."""
        models = {self.model.base, self.scoring.teacher, self.scoring.miner}
        return bool(self.hub_collections or self.prepared_names or models - {"bundled"})

    @property
    def folder(self) -> Path:
        """Where everything goes that this profile's run makes: runs/<name>."""
        return ROOT / "runs" / self.name

    def recipe(self, collection: str) -> FitSettings:
        """How a model is trained on a collection: `adaptation` on its own, else `training`."""
        special = self.adaptation and collection == self.adaptation.collection
        return self.adaptation if special else self.training

    def run_name(self, run: Run) -> str:
        """`<collection>-<method>-pf<factors>-s<seed>`, as in the result rows.

        Numbers of vectors stand for themselves: `<collection>-kmeans-k8+k16-s42`. An unpooled run
        has no method in its name; unit-length means are named before the seed.
        """
        method = "" if run.pool_method == "none" else f"-{run.pool_method}"
        factors = ("pf" if type(run.pool_factors[0]) is int else "") + factors_name(
            run.pool_factors
        )
        length = "-unit" if run.renormalize else ""
        return f"{slug(run.collection)}{method}-{factors}{length}-s{self.seed_of(run)}"

    def seed_of(self, run: Run) -> int:
        """A run's seed, which may be the profile's."""
        return self.seed if run.seed is None else run.seed

    def find_run(self, name: str) -> Run:
        """The run that makes the model `name`."""
        runs = {self.run_name(run): run for run in self.runs}
        if name not in runs:
            known = f"it has {self.model_names}"
            raise UserError(f"The profile {self.name!r} has no model {name!r}; {known}.")
        return runs[name]


def load_profile(name: str | Path) -> Profile:
    """Read a profile by name (`smoke`, `quick`, `offline`, `paper`) or from a YAML file."""
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(profile.stem for profile in PROFILES.glob("*.yaml"))
        raise UserError(
            f"There is no profile {str(name)!r}; expected one of {known} or a YAML file's path."
        )
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    own_name = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", path.stem)).strip("-.")
    named = {"name": own_name, **content} if isinstance(content, dict) else content
    try:
        return Profile.model_validate(named)
    except ValidationError as error:
        raise UserError(_explain(path, error)) from error


def _explain(path: Path, error: ValidationError) -> str:
    lines = [f"The profile {path.name} was refused, nothing was run:"]
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"])) or "(whole file)"
        text = f"{problem['msg']} (given: {str(problem['input'])[:80]!r})"
        if problem["type"] == "extra_forbidden":
            text = "unknown key; is it misspelt?"
        elif problem["type"] == "float_type" and isinstance(problem["input"], str):
            text = "expected a number; YAML wants a dot and a sign in the exponent, as in 5.0e-5: "
            text += f"{problem['input']!r}"
        lines.append(f"  {key}: {text}")
    return "\n".join(lines)
