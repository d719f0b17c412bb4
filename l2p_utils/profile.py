"""What a run consists of: a YAML file, checked by a schema before anything starts.

Takes a profile's name (one of those that ship) or the path of a YAML file; gives a `Profile`.
``python -m l2p_utils.profile`` prints every key with its type, its default and what it does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from l2p_utils.files import ROOT, UserError

PROFILES = Path(__file__).parent / "profiles"
BASELINE = "baseline"
BUNDLED = "docs:"
HUB = ("nano:", "beir:")
Method = Literal["none", "span", "kmeans", "hierarchical"]
PooledMethod = Literal["span", "kmeans", "hierarchical"]
Variant = Literal["pylate", "paper", "euclidean"]
SEED = {"ge": 0, "le": 2**32 - 1}  # what NumPy takes


class _Settings(BaseModel):
    # strict: neither True nor "3" is a count of 1 or 3
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # a string after a key describes it
    )


def _source(value: str) -> str:
    if value != "bundled" and "/" not in value:
        raise ValueError("expected `bundled`, a hub id (owner/name) or a folder's path")
    return value


def _released(value: str) -> str:
    if value.endswith("@"):
        raise ValueError(f"{value!r}: its revision is empty; expected owner/name@<revision>")
    return value


Source = Annotated[str, AfterValidator(_source)]
Released = Annotated[str, AfterValidator(_released)]  # perhaps with a revision, see `pinned`
ReleasedSource = Annotated[Source, AfterValidator(_released)]


class ModelSettings(_Settings):
    """The encoder that all runs start from; lengths in word pieces, prefix token included.

    `base` is `bundled`, a hub id or a folder. `query_lengths` holds what differs from
    `query_length`, by collection; `other_document_lengths` are measured of the baseline as well.
    A base whose output dimension, prefixes, query expansion or skiplist are not `dim`,
    `query_prefix`, `document_prefix`, `do_query_expansion`, `skiplist` is refused.
    """

    base: Source = "bundled"
    """`bundled`, a hub id or a folder."""
    revision: str | None = None
    """Commit, branch or tag of a base from the hub; null: the newest."""
    query_length: int = Field(32, ge=4, le=8192)
    """Queries are cut here; in word pieces, prefix token included."""
    document_length: int = Field(128, ge=8, le=8192)
    """Documents are cut here; in word pieces, prefix token included."""
    query_lengths: dict[str, Annotated[int, Field(ge=4, le=8192)]] = {}
    """What differs from `query_length`, by collection; not for the bundled base."""
    other_document_lengths: list[Annotated[int, Field(ge=8, le=8192)]] = []
    """Measure a baseline from the hub with documents cut here as well."""
    dim: int | None = Field(None, ge=1)
    """The output dimension that the base must have; null: any."""
    query_prefix: str | None = None
    """The prefix of queries that the base must have; null: any."""
    document_prefix: str | None = None
    """The prefix of documents that the base must have; null: any."""
    do_query_expansion: bool | None = None
    """Whether a checkpoint pads its queries with [MASK]; null: as it is."""
    skiplist: Literal["punctuation", "none"] | None = None
    """Which tokens a checkpoint leaves out of documents; null: as it is."""
    projection_texts: int = Field(400, ge=10)
    """Texts whose token vectors give the bundled encoder's projection."""

    @property
    def bundled(self) -> bool:
        """Whether the base is the bundled encoder, which needs a warm-up."""
        return self.base == "bundled"

    def query_length_on(self, collection: str) -> int:
        """Length of the queries of `collection`, whichever revision of it."""
        lengths = {plain_name(name): length for name, length in self.query_lengths.items()}
        return lengths.get(plain_name(collection), self.query_length)


class MiningSettings(_Settings):
    """The paper's candidate rules; `max_queries`, `max_documents` take a part of the collection."""

    hard_candidates: int = Field(100, ge=1)
    """The documents nearest to a query that may become negatives."""
    random_candidates: int = Field(30, ge=0)
    """Documents drawn at random that may become negatives."""
    hard: int = Field(5, ge=0)
    """Negatives of a row: the best-scored hard candidates."""
    medium: int = Field(5, ge=0)
    """Negatives of a row: drawn from the other hard candidates."""
    random: int = Field(5, ge=0)
    """Negatives of a row: drawn from the random candidates."""
    threshold: float = Field(0.95, gt=0)
    """Drop negatives scored above this share of the anchor's score."""
    anchor: Literal["top_positive", "median_positive"] = "top_positive"
    """The positive that `threshold` goes by: the best-scored one, or the median."""
    teacher_scale: Literal["raw", "sigmoid"] = "raw"
    """Store the teacher's scores as they are, or between 0 and 1."""
    text_only: bool = False
    """Leave titles out: for training queries that are the documents' titles."""
    max_queries: int | None = Field(None, ge=1)
    """Mine only so many training queries; null: all."""
    max_documents: int | None = Field(None, ge=1)
    """Mine only among so many documents, all relevant ones included; null: all."""

    @property
    def n_ways(self) -> int:
        """Documents in a row: the positive and its negatives."""
        return 1 + self.hard + self.medium + self.random

    @model_validator(mode="after")
    def _consistent(self) -> MiningSettings:
        candidates = self.hard_candidates + self.random_candidates
        if not 2 <= self.n_ways <= 1 + candidates:
            raise ValueError(
                f"hard + medium + random is {self.n_ways - 1}; expected at least 1 negative and at "
                f"most the {candidates} candidates (hard_candidates + random_candidates)"
            )
        return self


class Scoring(_Settings):
    """Who proposes candidates and who scores them: `bundled`, or hub ids (or folders).

    The teacher scores `checkpoint_queries` queries at a time: so much a kill can cost. `shards` is
    the number of jobs that the scoring of a collection is spread over.
    """

    miner: Source = "bundled"
    """Who proposes candidates: `bundled`, a hub id or a folder."""
    miner_revision: str | None = None
    """Commit, branch or tag of a miner from the hub; null: the newest."""
    teacher: Source = "bundled"
    """Who scores candidates: `bundled`, a hub id or a folder."""
    teacher_revision: str | None = None
    """Commit, branch or tag of a teacher from the hub; null: the newest."""
    max_length: int = Field(1024, ge=16)
    """A reranker's input, query and document together, is cut here; in tokens."""
    batch_size: int = Field(32, ge=1)
    """Pairs of query and document that a reranker scores at once."""
    checkpoint_queries: int = Field(16, ge=1)
    """Queries scored between two savings: so much a kill can cost."""
    shards: int = Field(1, ge=1)
    """Jobs that the scoring of one collection is spread over."""

    @model_validator(mode="after")
    def _consistent(self) -> Scoring:
        if (self.miner == "bundled") != (self.teacher == "bundled"):
            raise ValueError(
                f"miner {self.miner!r} with teacher {self.teacher!r}: expected both bundled, or "
                "neither"
            )
        if self.teacher == "bundled" and self.shards > 1:
            raise ValueError("shards: the bundled teacher scores in one go; expected 1")
        return self


class TrainingSettings(_Settings):
    """One fine-tuning; batch_size counts queries (rows)."""

    epochs: int = Field(1, ge=1)
    """Passes over the rows; the best on the dev queries is kept."""
    batch_size: int = Field(8, ge=1)
    """Queries (rows) of a step, in all processes together."""
    learning_rate: float = Field(5e-5, gt=0)
    """At its highest; it rises during the warm-up, then falls linearly to 0."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    frozen_layers: int = Field(0, ge=0)
    """Keep the embeddings and so many of the lowest layers; 0: train all."""
    max_rows: int | None = Field(None, ge=1)
    """Train on so many rows, spread evenly over the mined ones; null: all."""
    dev_queries: int = Field(100, ge=1)
    """Queries of the dev split that pick the epoch."""
    dev_documents: int = Field(500, ge=1)
    """Documents that they are searched in, all relevant ones included."""
    checkpoint_steps: int = Field(50, ge=1)
    """Steps between two checkpoints: so much a kill can cost."""


class Adaptation(TrainingSettings):
    """The unpooled training that makes the bundled encoder a late-interaction model."""

    collection: str = "docs:transformers"
    """What it trains on; no run may train on it."""


class Run(_Settings):
    """One trained model."""

    collection: str
    """What the model trains on: `docs:scipy`, `beir:scifact`, a folder's path."""
    pool_method: Method
    """How documents are pooled in training; `none` has only the factor 1."""
    pool_factors: list[int] = [1]
    """Each batch draws one: a number (2), a range ("1-6") or a list ([1, 2, 4])."""
    seed: int | None = Field(None, **SEED)
    """Of this training; null: the profile's."""

    @field_validator("pool_factors", mode="before")
    @classmethod
    def _factors(cls, value: Any) -> list[int]:
        return parse_factors(value)

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        check_run(self.pool_method, self.pool_factors)
        return self


class EvaluationSettings(_Settings):
    """What every model is measured on, by exact search."""

    collections: list[str] = Field(min_length=1)
    """Their test queries are searched: `docs:scipy`, `nano:scifact`, a folder's path."""
    pool_methods: list[PooledMethod] = ["span", "kmeans", "hierarchical"]
    """How documents are pooled."""
    pool_factors: list[int] = [1, 2, 3, 4, 5, 6]
    """Measured one by one: a number (2), a range ("1-6") or a list ([1, 2, 4])."""
    baseline_variants: list[Variant] = []
    """Variants of hierarchical that the baseline has beside the profile's."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Of the encoder in evaluation; null: the profile's. On a CPU float16 is float32."""
    max_queries: int | None = Field(None, ge=1)
    """Search only so many test queries; null: all."""
    max_documents: int | None = Field(None, ge=1)
    """Search a part, all relevant documents in it: scores too high; null: all."""

    @field_validator("pool_factors", mode="before")
    @classmethod
    def _factors(cls, value: Any) -> list[int]:
        return parse_factors(value)

    @field_validator("collections", "pool_methods", "baseline_variants")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        return refuse_repeats(value)


class PlaidJob(_Settings):
    """One model's documents in a PLAID index, once for every collection × method × factor.

    `max_queries` limits the test queries: on a CPU, fast-plaid takes a fifth of a second for each.
    """

    model: str
    """A model's name: `baseline`, or as in `runs/<profile>/models`."""
    collections: list[str] = Field(min_length=1)
    """Whose documents go into indexes."""
    pool_methods: list[PooledMethod] = Field(min_length=1)
    """How documents are pooled; with each factor of `evaluation.pool_factors`."""
    max_queries: int | None = Field(None, ge=1)
    """Search only so many test queries, the same for all jobs on them; null: all."""


class Profile(_Settings):
    """Everything that a run needs to know; `python -m l2p_utils.profile` prints it key by key."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    """A folder under runs/. A file may leave it out: then it is the file's own name."""
    description: str
    """What the profile is for, in a line."""
    seed: int = Field(42, **SEED)
    """Of everything that is drawn at random."""
    threads: int = Field(1, ge=1)
    """Processor threads of each job."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the encoder; auto: bfloat16 where the processor computes in it, else float32."""
    use_sklearn: bool = False
    """k-means as the paper has it (scikit-learn's); false: ours, faster and tighter."""
    hierarchical: Variant = "pylate"
    """What Ward is given, in training and evaluation; `paper` is the paper's."""
    model: ModelSettings
    """The encoder that all runs start from."""
    training_data: Literal["mined", "released"] = "mined"
    """Mine rows, or take those that the authors published."""
    released_rows: dict[str, Released] = {}
    """By collection, the hub data set with its published rows (@revision)."""
    mining: MiningSettings
    """How a training query gets its documents."""
    scoring: Scoring = Scoring()
    """Who proposes candidates and who scores them."""
    adaptation: Adaptation | None = None
    """Makes the bundled encoder the baseline; {} where it is the base, else null."""
    training: TrainingSettings
    """How each of `runs` is trained."""
    gpu: bool = False
    """Whether jobs that compute ask for a GPU; a local run shares `gpu=N`."""
    processes: int = Field(1, ge=1)
    """Of one training, data-parallel; `training.batch_size` is of them all."""
    dev_collections: dict[str, str] = {}
    """By training collection, another whose test split picks the epoch."""
    runs: list[Run]
    """The models to train."""
    released_models: list[ReleasedSource] = []
    """Trained models from the hub, measured as they are (@revision)."""
    evaluation: EvaluationSettings
    """What every model is measured on, by exact search."""
    plaid: list[PlaidJob] = []
    """What is measured through PLAID as well."""

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        refuse_shared_names([*self.training_collections, *self.measured_collections])
        names = self.evaluated_names
        if len(set(names)) < len(names):
            raise ValueError(f"runs: the same model twice among {names}")
        if self.model.bundled != (self.adaptation is not None):
            raise ValueError(
                "adaptation: the bundled model needs one (`adaptation: {}`)"
                if self.model.bundled
                else f"adaptation: only the bundled model has one; model.base is {self.model.base!r}"
            )
        if self.model.bundled and self.prepared_names:
            raise ValueError(
                "model.other_document_lengths and released_models belong to a base from the hub; "
                "model.base is bundled"
            )
        if self.training.batch_size % self.processes:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} cannot be shared evenly by "
                f"{self.processes} processes"
            )
        unreleased = sorted(set(self.training_collections) - set(self.released_rows))
        if self.training_data == "released" and unreleased:
            raise ValueError(f"training_data: no released_rows of {', '.join(unreleased)}")
        for job in self.plaid:
            if job.model not in names:
                raise ValueError(f"plaid: model {job.model!r} is none of {names}")
        try:
            refuse_repeats(
                [(j.model, c, m) for j in self.plaid for c in j.collections for m in j.pool_methods]
            )
        except ValueError as error:
            raise ValueError(f"plaid: {error}") from error
        for run in self.runs:
            if self.adaptation and run.collection == self.adaptation.collection:
                raise ValueError(f"runs: {run.collection!r} is kept for the warm-up")
        return self

    @property
    def model_names(self) -> list[str]:
        """The baseline, then the trained models in the order of `runs`."""
        return [BASELINE, *(self.run_name(run) for run in self.runs)]

    @property
    def training_collections(self) -> list[str]:
        """Collections to mine: the warm-up's first, then those of the runs, each once."""
        first = [self.adaptation.collection] if self.adaptation else []
        return list(dict.fromkeys([*first, *(run.collection for run in self.runs)]))

    @property
    def prepared_names(self) -> list[str]:
        """Models that are fetched, not trained: by name, the baseline first.

        A base that is not bundled is the baseline as it is, once more at each other length.
        """
        base = [] if self.model.bundled else [BASELINE]
        lengths = [length_name(length) for length in self.model.other_document_lengths]
        return [*base, *lengths, *(released_name(name) for name in self.released_models)]

    @property
    def evaluated_names(self) -> list[str]:
        """Every model that is measured: the baseline, the trained ones, the other prepared ones."""
        names = self.model_names
        return [*names, *(name for name in self.prepared_names if name not in names[:1])]

    @property
    def measured_collections(self) -> list[str]:
        """Collections that models are measured on, by exact search or PLAID, each once."""
        plaid = [name for job in self.plaid for name in job.collections]
        return list(dict.fromkeys([*self.evaluation.collections, *plaid]))

    @property
    def hub_collections(self) -> list[str]:
        """Collections of this profile that come from the hub."""
        dev = [self.dev_collections.get(name) for name in self.training_collections]
        names = [*self.training_collections, *dev, *self.measured_collections]
        return list(dict.fromkeys(name for name in names if name and name.startswith(HUB)))

    @property
    def needs_hub(self) -> bool:
        """Whether anything has to be fetched before the first job."""
        models = [self.model.base, self.scoring.teacher, self.scoring.miner]
        return bool(self.hub_collections or self.prepared_names) or models != ["bundled"] * 3

    @property
    def folder(self) -> Path:
        """Where everything goes that this profile's run makes: runs/<name>."""
        return ROOT / "runs" / self.name

    def recipe(self, collection: str) -> TrainingSettings:
        """How a model is trained on a collection: by `adaptation` on its own, else by `training`."""
        if self.adaptation and collection == self.adaptation.collection:
            return self.adaptation
        return self.training

    def run_name(self, run: Run) -> str:
        """`<collection>-<method>-pf<factors>-s<seed>`, as in the result rows."""
        seed = self.seed if run.seed is None else run.seed
        return model_name(run.collection, run.pool_method, run.pool_factors, seed)

    def find_run(self, name: str) -> Run:
        """The run that makes the model `name`.

        Raises
        ------
        UserError
            When the profile has no such model.
        """
        for run in self.runs:
            if self.run_name(run) == name:
                return run
        raise UserError(
            f"The profile {self.name!r} has no model {name!r}; it has {self.model_names}."
        )


def plain_name(collection: str) -> str:
    """A hub collection's name without its revision: `beir:scifact@main` → `beir:scifact`."""
    return collection.partition("@")[0] if collection.startswith(HUB) else collection


def slug(collection: str) -> str:
    """A collection's name as part of a file name: `docs:scipy` → `docs-scipy`.

    A folder is called by its own name, lowercased. A hub collection's revision is no part of it.

    Raises
    ------
    UserError
        When nothing is left of the name.
    """
    name = plain_name(collection)
    if not name.startswith((BUNDLED, *HUB)):
        name = Path(name).expanduser().resolve().name
    name = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
    if not name:
        raise UserError(f"{collection!r} names no collection; expected docs:scipy or a folder.")
    return name


def length_name(document_length: int) -> str:
    """The name of the baseline with its documents cut at another length."""
    return f"{BASELINE}-d{document_length}"


def pinned(source: str) -> tuple[str, str | None]:
    """A hub id and the revision after it: `owner/name@v1` → `owner/name`, `v1`; else None.

    A folder is itself: one that is there, and any path that is not of the form owner/name.
    """
    found = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)@(.+)", source)
    return (found[1], found[2]) if found and not Path(source).exists() else (source, None)


def released_name(repository: str) -> str:
    """A released model's name in the rows: `owner/Some-Model` → `released-some-model`.

    Its revision is no part of it.
    """
    return f"released-{slug(pinned(repository)[0].rstrip('/').rsplit('/', 1)[-1])}"


def factors_name(pool_factors: list[int]) -> str:
    """`[1, …, 6]` → `1-6`, `[2]` → `2`, `[2, 4]` → `2+4`."""
    if len(pool_factors) > 1 and pool_factors == list(range(pool_factors[0], pool_factors[-1] + 1)):
        return f"{pool_factors[0]}-{pool_factors[-1]}"
    return "+".join(map(str, pool_factors))


def model_name(collection: str, pool_method: str, pool_factors: list[int], seed: int) -> str:
    """The name of a trained model; FT PF1 has no method in its name."""
    method = "" if pool_method == "none" else f"-{pool_method}"
    return f"{slug(collection)}{method}-pf{factors_name(pool_factors)}-s{seed}"


def parse_factors(value: Any) -> list[int]:
    """Pool factors from `3`, `"1-6"`, `"2+4"` or a list of whole numbers, sorted, each once.

    Raises
    ------
    UserError
        For anything else, and for a factor below 1.
    """
    given = value
    if isinstance(value, str):
        try:
            if "-" in value:
                low, high = (int(part) for part in value.split("-"))
                value = list(range(low, high + 1))
            else:
                value = [int(part) for part in value.split("+")]
        except ValueError:
            value = None
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    whole = isinstance(value, list | tuple) and all(
        isinstance(factor, int) and not isinstance(factor, bool) and factor >= 1 for factor in value
    )
    if not whole or not value:
        raise UserError(
            f"pool_factors is {given!r}; expected whole numbers of at least 1: a number (2), "
            'a range ("1-6") or a list ([1, 2, 4]).'
        )
    return sorted(set(value))


def refuse_repeats(values: Sequence[Any]) -> Sequence[Any]:
    """Return `values`; what is listed twice would be measured, and stored, twice.

    Raises
    ------
    UserError
        Naming what is listed twice.
    """
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise UserError(f"listed twice: {', '.join(twice)}; expected each once")
    return values


def refuse_shared_names(collections: Sequence[str]) -> None:
    """Refuse different collections with one `slug`: each would replace the other's files.

    Raises
    ------
    UserError
        Naming both.
    """
    owners: dict[str, str] = {}
    for collection in collections:
        owner = owners.setdefault(slug(collection), collection)
        if owner != collection:
            raise UserError(
                f"collections: {owner!r} and {collection!r} have the same name in file names, "
                f"{slug(collection)!r}; expected a name of its own for each: rename a folder, or, "
                "where both are one collection, write it the same way everywhere"
            )


def check_seed(value: Any) -> None:
    """Refuse what cannot be a seed.

    Raises
    ------
    UserError
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not SEED["ge"] <= value <= SEED["le"]:
        raise UserError(
            f"seed is {value!r}; expected a whole number from {SEED['ge']} to {SEED['le']}."
        )


def check_run(pool_method: str, pool_factors: list[int]) -> None:
    """Refuse a run that means nothing: no method but factors above 1, or a method that only has 1.

    Raises
    ------
    UserError
    """
    if (pool_method == "none") != (pool_factors == [1]):
        raise UserError(
            f"pool_method {pool_method!r} with pool_factors {pool_factors}: unpooled training is "
            "pool_method 'none' with pool_factors [1], and the other way round."
        )


def load_profile(name: str | Path) -> Profile:
    """Read a profile by name (`smoke`, `quick`, `offline`) or from a YAML file.

    Raises
    ------
    UserError
        For an unknown name, bad YAML, an unknown key (named), a wrong type or value.
    """
    path = Path(name)
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
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no keys; expected a mapping like profiles/quick.yaml.")
    try:
        return Profile.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        raise UserError(_explain(path, error)) from error


def _explain(path: Path, error: ValidationError) -> str:
    lines = [f"The profile {path.name} was refused, nothing was run:"]
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"])) or "(whole file)"
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {key}: unknown key; is it misspelt?")
        elif problem["type"] == "float_type" and isinstance(problem["input"], str):
            hint = "expected a number; YAML wants a dot and a sign in the exponent: 5.0e-5"
            lines.append(f"  {key}: {hint} (given: {problem['input']!r})")
        else:
            lines.append(f"  {key}: {problem['msg']} (given: {str(problem['input'])[:80]!r})")
    return "\n".join(lines)


def describe_keys(settings: type[BaseModel] = Profile, inside: str = "") -> Iterator[str]:
    """Every key of a profile as two lines: key, type and default; what it does.

    Keys of `runs` and `plaid`, which are lists, have `[]` before their own name.
    """
    for name, field in settings.model_fields.items():
        key = f"{inside}{name}"
        yield f"{key:<28} {_type_name(field.annotation) + _limits(field):<42} {_default(field)}"
        yield f"    {field.description}"
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                many = "[]" if get_origin(field.annotation) is list else ""
                yield from describe_keys(part, f"{key}{many}.")


def _parts(kind: Any) -> tuple[Any, ...]:
    """What a type is made of: of `Adaptation | None` and `list[Run]` what stands in them."""
    return get_args(kind) or (kind,)


def _type_name(kind: Any) -> str:
    """A type as a reader of YAML knows it."""
    parts = _parts(kind)
    if get_origin(kind) is Literal:
        return " | ".join(parts)
    if get_origin(kind) is UnionType or get_origin(kind) is Union:
        return " | ".join(map(_type_name, parts))
    if get_origin(kind) is Annotated:
        return _type_name(parts[0])
    if get_origin(kind):
        return f"{get_origin(kind).__name__}[{', '.join(map(_type_name, parts))}]"
    if kind is NoneType:
        return "null"
    return "keys" if issubclass(kind, BaseModel) else kind.__name__


def _limits(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in signs.items()
        if hasattr(limit, name)
    ]
    return " " + ", ".join(found) if found else ""


def _default(field: FieldInfo) -> str:
    """As YAML has it: what is printed can be copied into a profile."""
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return "{}"
    return yaml.safe_dump(field.default, default_flow_style=True).split("\n...")[0].strip()


if __name__ == "__main__":
    print("\n".join(describe_keys()))
