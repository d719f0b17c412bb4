"""The hub's rules for the front matter of cards, restated: keys, types, licences, tasks, languages.

Takes the text of a model card or a data set card; refuses it by key. The hub checks cards when they
are uploaded, with a hosted service; this is the same before anything leaves the machine. Sources:
modelcard.md, datasetcard.md and docs/hub/repositories-licenses.md of huggingface/hub-docs, and
pipelines.ts of huggingface/huggingface.js.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from l2p_utils.files import UserError

Kind = Literal["model", "dataset"]
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)(.*)\Z", re.DOTALL)
OTHER = "other"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LICENCES = _words(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
    c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
    ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1
    ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3
    llama4 gemma unknown other
    """
)
TASKS = _words(
    """
    text-classification token-classification table-question-answering question-answering
    zero-shot-classification translation summarization feature-extraction text-generation
    text2text-generation fill-mask sentence-similarity text-to-speech text-to-audio
    automatic-speech-recognition audio-to-audio audio-classification audio-text-to-text
    voice-activity-detection depth-estimation image-classification object-detection
    image-segmentation text-to-image image-to-text image-to-image image-to-video
    unconditional-image-generation video-classification reinforcement-learning robotics
    tabular-classification tabular-regression tabular-to-text table-to-text multiple-choice
    text-ranking text-retrieval time-series-forecasting text-to-video image-text-to-text
    visual-question-answering document-question-answering zero-shot-image-classification graph-ml
    mask-generation zero-shot-object-detection text-to-3d image-to-3d image-feature-extraction
    video-text-to-text keypoint-detection visual-document-retrieval any-to-any other
    """
)
# ISO 639-1. The three-letter codes (639-2, 639-3: thousands) are only checked for their form.
LANGUAGES = _words(
    """
    aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de
    dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia
    id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo
    lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl
    ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk
    tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu code multilingual
    """
)
SIZES = (
    "n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B",
    "1B<n<10B", "10B<n<100B", "100B<n<1T", "n>1T",
)  # fmt: skip


def repository_id(value: str) -> str:
    """Return a hub id, ``owner/name``.

    Raises
    ------
    UserError
        For anything else.
    """
    try:
        validate_repo_id(value)
        if value.count("/") == 1:
            return value
        reason = "there is no owner in it"
    except HFValidationError as error:
        reason = str(error)
    raise UserError(f"{value!r} is no hub id: {reason}. Expected owner/name, as my-name/my-model.")


def size_category(rows: int) -> str:
    """The hub's size category of a data set of so many rows."""
    return SIZES[max(len(str(rows)) - 3, 0)] if rows < 10**12 else SIZES[-1]


def _one_of(allowed: frozenset[str] | tuple[str, ...], what: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"{value!r} is no {what} that the hub knows")
        return value

    return AfterValidator(check)


def _language(value: str) -> str:
    if value not in LANGUAGES and not re.fullmatch(r"[a-z]{3}", value):
        raise ValueError(f"{value!r} is no ISO 639 code (en, not en-US), `code` or `multilingual`")
    return value


def _listed(value: Any) -> Any:
    """The hub takes a single value where it takes a list."""
    return [value] if isinstance(value, str) else value


def _licence_link(value: str) -> str:
    if value not in ("LICENSE", "LICENSE.md") and not re.match(r"https?://\S+$", value):
        raise ValueError("expected LICENSE, LICENSE.md (a file beside the card) or a URL")
    return value


Text = Annotated[str, Field(min_length=1)]
Repository = Annotated[str, AfterValidator(repository_id)]
Licence = Annotated[str, _one_of(LICENCES, "licence")]
Task = Annotated[str, _one_of(TASKS, "task")]
Language = Annotated[str, AfterValidator(_language)]
Size = Annotated[str, _one_of(SIZES, "size category")]


def _many(kind: Any) -> Any:
    return Annotated[list[kind], BeforeValidator(_listed), Field(min_length=1)]


class _FrontMatter(BaseModel):
    # The hub keeps unknown keys without a word; here they are taken for misspelt ones.
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    language: _many(Language)
    license: Licence
    license_name: str = Field("", pattern=r"^[a-z0-9][a-z0-9._-]*$")
    license_link: Annotated[str, AfterValidator(_licence_link)] = ""
    tags: _many(Text)

    @model_validator(mode="after")
    def _name_goes_with_other(self) -> _FrontMatter:
        if self.license == OTHER and not self.license_name:
            raise ValueError("license_name: `license: other` needs one")
        named = {"license_name", "license_link"} & self.model_fields_set
        if self.license != OTHER and named:
            raise ValueError(f"{min(named)}: only goes with `license: other`")
        return self


class ModelFrontMatter(_FrontMatter):
    """What stands between the `---` of a model card."""

    library_name: Text
    pipeline_tag: Task
    base_model: _many(Repository) = []
    base_model_relation: Literal["finetune", "adapter", "merge", "quantized"] = "finetune"
    datasets: _many(Repository) = []
    metrics: _many(Text) = []


class DataFile(BaseModel):
    """The files of one split."""

    model_config = ConfigDict(extra="forbid", strict=True)

    split: str = Field(pattern=r"^\w+(\.\w+)*$")  # what `datasets` takes for a split's name
    path: _many(Text)


class DatasetConfig(BaseModel):
    """One subset of a data set."""

    model_config = ConfigDict(extra="forbid", strict=True)

    config_name: Text
    data_files: list[DataFile] = Field(min_length=1)
    default: bool = False


class DatasetFrontMatter(_FrontMatter):
    """What stands between the `---` of a data set card."""

    pretty_name: Text
    size_categories: _many(Size)
    task_categories: _many(Task)
    configs: list[DatasetConfig] = Field(min_length=1)
    source_datasets: _many(Text) = []
    annotations_creators: _many(
        Literal[
            "found", "crowdsourced", "expert-generated", "machine-generated", "no-annotation",
            "other",
        ]
    ) = []  # fmt: skip


SCHEMAS = {"model": ModelFrontMatter, "dataset": DatasetFrontMatter}


class _OnceLoader(yaml.SafeLoader):
    """YAML whose keys must be different, as the hub's reader has it; Python's keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)}: given twice")
        return super().construct_mapping(node, deep)


def check_card(text: str, kind: Kind) -> None:
    """Check the front matter of a card.

    Parameters
    ----------
    text
        The whole README.md.

    Raises
    ------
    UserError
        Naming every key that is missing, unknown or wrong.
    """
    found = FRONT_MATTER.match(text)
    if not found:
        raise UserError(
            f"The {kind} card was refused: it does not begin with a front matter, YAML between two "
            "lines `---`."
        )
    try:
        content = yaml.load(found[1], _OnceLoader)
    except yaml.YAMLError as error:
        raise UserError(
            f"The {kind} card was refused: its front matter is not valid YAML: {error}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"The {kind} card was refused: its front matter holds no keys.")
    try:
        SCHEMAS[kind].model_validate(content)
    except ValidationError as error:
        raise UserError(_explain(kind, error)) from error


def _explain(kind: Kind, error: ValidationError) -> str:
    lines = [f"The {kind} card was refused; wrong in its front matter:"]
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key; is it misspelt?"
        given = f" (given: {str(problem['input'])[:80]!r})" if key else ""
        lines.append(f"  {key}: {message}{given}" if key else f"  {message}")
    return "\n".join(lines)
