"""What pooling does to one document, token by token: tables and figures of notebook 00."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ipywidgets
import matplotlib
import numpy as np
import pandas as pd
import torch
from IPython import get_ipython
from matplotlib.patches import Rectangle

from l2p_utils.figures import COLOURS, MARKERS, STYLE, NotebookFigure
from l2p_utils.files import UserError, atomic_path, from_root, read_json, write_json
from l2p_utils.pooling import (
    DEFAULT_VARIANT,
    HIERARCHICAL_VARIANTS,
    PoolMethod,
    PoolVariant,
    cluster_labels,
    pool,
)

METHODS: tuple[PoolMethod, ...] = ("span", "kmeans", "hierarchical")
FACTORS = (1, 2, 3, 4, 6)

# ---------------------------------------------------------------- the example


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """A text as a late-interaction model stores it.

    `tokens` are all word pieces; `counted` is False where no vector is stored: punctuation of
    documents. `vectors` are (counted tokens, dim) float32, of unit length.
    """

    text: str
    tokens: tuple[str, ...]
    counted: np.ndarray
    vectors: np.ndarray

    @property
    def counted_tokens(self) -> list[str]:
        """The tokens that have a vector, in the order of `vectors`."""
        return list(itertools.compress(self.tokens, self.counted))


@dataclasses.dataclass(frozen=True)
class Example:
    """A query, the document in focus (the first) and others; and the name of their encoder."""

    query: EncodedText
    documents: list[EncodedText]
    encoder: str


def load_example(source: str, text: str = "", model: str = "") -> Example:
    """The example stored in `source`, or another text or all texts encoded anew by `model`.

    Both are folders, seen from the project's root. `text` is the reader's own and needs a model:
    of several lines the first is the query and the rest the document; a single one is a document
    for the stored query.
    """
    if text.strip() and not model:
        raise UserError(
            "text was given and model was not: a text of your own has to be encoded. Set model "
            'to the folder of a saved model, such as "runs/quick/models/baseline".'
        )
    stored = read_example(from_root(source))
    if not model:
        return stored
    query, documents = stored.query.text, [document.text for document in stored.documents]
    if text.strip():
        first, _, rest = text.strip().partition("\n")
        query, own = (first.strip(), rest.strip()) if rest.strip() else (query, first)
        documents = [own, *documents]
    return encode_example(from_root(model), query, documents)


def encode_example(model_folder: str | Path, query: str, documents: Sequence[str]) -> Example:
    """Encode a query and documents in float32 with the model saved in `model_folder`."""
    from l2p_utils.model import load_model  # needs seconds to import; reading and drawing do not

    model = load_model(model_folder, device="cpu")

    def encode(text: str, is_query: bool) -> EncodedText:
        # output_value=None: PyLate gives every token's vector, with the mask of those that count
        options = {"pool_factor": 1, "output_value": None, "show_progress_bar": False}
        found = model.encode([text], is_query=is_query, **options)
        keys = ("input_ids", "token_embeddings", "masks")
        ids, vectors, counted = (torch.as_tensor(found[key][0]).cpu() for key in keys)
        tokens = tuple(map(str.strip, model.tokenizer.convert_ids_to_tokens(ids.tolist())))
        vectors = torch.nn.functional.normalize(vectors.float(), dim=-1)[counted.bool()]
        return EncodedText(text, tokens, counted.bool().numpy(), vectors.numpy())

    texts = [encode(document, is_query=False) for document in documents]
    return Example(encode(query, is_query=True), texts, Path(model_folder).name)


def write_example(example: Example, folder: str | Path) -> None:
    """Store an example as `example.json` (texts, tokens, masks) and `vectors.npy` (float16)."""
    texts = [example.query, *example.documents]
    with atomic_path(Path(folder) / "vectors.npy") as temporary:
        np.save(temporary, np.concatenate([text.vectors for text in texts]).astype(np.float16))
    query, *documents = (
        {"text": text.text, "tokens": text.tokens, "counted": text.counted.tolist()}
        for text in texts
    )
    stored = {"encoder": example.encoder, "query": query, "documents": documents}
    write_json(Path(folder) / "example.json", stored)


def read_example(folder: str | Path) -> Example:
    """Read what `write_example` stored; vectors come back as float32 of unit length."""
    try:
        stored = read_json(Path(folder) / "example.json")
        texts = [stored["query"], *stored["documents"]]
        masks = [np.array(text["counted"], dtype=bool) for text in texts]
        vectors = np.load(Path(folder) / "vectors.npy").astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)  # (counted tokens of all, dim)
        *ends, total = np.cumsum([mask.sum() for mask in masks])
        if len(vectors) != total:
            raise ValueError("example.json counts other tokens than vectors.npy has vectors")
        query, *documents = (
            EncodedText(text["text"], tuple(text["tokens"]), mask, part)
            for text, mask, part in zip(texts, masks, np.split(vectors, ends), strict=True)
        )
        return Example(query, documents, stored["encoder"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no readable example: {error!r}. Expected the example.json and "
            "vectors.npy of l2p_utils.explain.write_example, as in data/token_pooling."
        ) from error


# ---------------------------------------------------------------- pooling and MaxSim, in tables


@dataclasses.dataclass(frozen=True)
class Pooled:
    """One document after pooling: `labels` (counted tokens,) and `vectors` (clusters, dim)."""

    document: EncodedText
    method: str
    factor: int
    labels: np.ndarray
    vectors: np.ndarray

    @property
    def groups(self) -> list[list[str]]:
        """The tokens of each cluster, in the order of `vectors`."""
        tokens, labels = self.document.counted_tokens, self.labels
        return [list(itertools.compress(tokens, labels == n)) for n in range(len(self.vectors))]

    @property
    def numbers(self) -> dict[int, int]:
        """Label → 1, 2, 3, … of the clusters of two tokens and more, by first occurrence."""
        large = np.flatnonzero(np.bincount(self.labels, minlength=1) > 1)
        return {int(label): number for number, label in enumerate(large, start=1)}


def pool_document(
    document: EncodedText,
    pool_factor: int = 1,
    pool_method: PoolMethod = "none",
    variant: PoolVariant = DEFAULT_VARIANT,
) -> Pooled:
    """Pool one document with one protected token, as evaluation does, and keep its clusters."""
    tokens = torch.from_numpy(document.vectors)
    (vectors,) = pool([tokens], pool_factor, pool_method, variant=variant)
    labels = cluster_labels(document.vectors, [pool_factor], pool_method, variant=variant)
    return Pooled(document, pool_method, pool_factor, labels[pool_factor], vectors.numpy())


def maxsim(query: EncodedText, pooled: Pooled) -> float:
    """MaxSim(q, d) = Σ_i max_j q_i · d_j."""
    return float((query.vectors @ pooled.vectors.T).max(axis=1).sum())


def maxsim_table(query: EncodedText, pooled: Pooled) -> pd.DataFrame:
    """Each query token with its best match and their similarity; these add up to MaxSim."""
    table = query.vectors @ pooled.vectors.T  # (query tokens, document vectors)
    best = [group_name(pooled.groups[column], 3) for column in table.argmax(axis=1)]
    columns = {"query token": query.counted_tokens, "best match": best}
    return pd.DataFrame(columns | {"similarity": table.max(axis=1).round(3)})


def group_name(tokens: Sequence[str], most: int = 4) -> str:
    """A cluster's tokens in short: `derivative ×3, order ×2, of`; at most `most` of them."""
    named = [token if n == 1 else f"{token} ×{n}" for token, n in Counter(tokens).items()]
    return ", ".join(named[:most]) + (", …" if len(named) > most else "")


def cluster_table(pooled: Pooled) -> pd.DataFrame:
    """Clusters of two tokens and more, the largest first.

    `cosine` is the mean over pairs of a cluster's tokens, `norm` the length of their mean vector.
    """
    rows = []
    for label, number in pooled.numbers.items():
        members = pooled.document.vectors[pooled.labels == label]  # (size, dim)
        pairs = (members @ members.T)[np.triu_indices(len(members), k=1)]
        name, norm = group_name(pooled.groups[label], 6), np.linalg.norm(pooled.vectors[label])
        rows.append((number, name, len(members), pairs.mean(), norm))
    table = pd.DataFrame(rows, columns=["cluster", "tokens", "size", "cosine", "norm"])
    table = table.set_index("cluster").sort_values("size", ascending=False, kind="stable")
    return table.round(3)


def sweep(example: Example, factors: Sequence[int] = (1, 2, 3, 4, 5, 6)) -> pd.DataFrame:
    """The first document at every method × factor: count and mean length of vectors, MaxSim."""
    rows = []
    for method, factor in itertools.product(METHODS, factors):
        pooled = pool_document(example.documents[0], factor, method)
        norm = np.linalg.norm(pooled.vectors, axis=1).mean()
        rows.append((method, factor, len(pooled.vectors), norm, maxsim(example.query, pooled)))
    columns = ["pool_method", "pool_factor", "vectors", "norm", "score"]
    return pd.DataFrame(rows, columns=columns).round(3)


def document_scores(
    example: Example, pool_method: PoolMethod, factors: Sequence[int] = FACTORS
) -> pd.DataFrame:
    """MaxSim of the query with every document (rows) at every pool factor (columns)."""
    columns = {
        f"factor {factor}": [
            maxsim(example.query, pool_document(document, factor, pool_method))
            for document in example.documents
        ]
        for factor in factors
    }
    names = [d.text if len(d.text) <= 48 else d.text[:46] + " …" for d in example.documents]
    return pd.DataFrame(columns, index=pd.Index(names, name="document")).round(2)


def variant_table(document: EncodedText, factors: Sequence[int] = FACTORS[1:]) -> pd.DataFrame:
    """Token pairs that one hierarchical variant puts together and the other apart, by factor."""
    together = {}
    for variant in HIERARCHICAL_VARIANTS:
        found = cluster_labels(document.vectors, list(factors), "hierarchical", variant=variant)
        labels = np.stack([found[factor] for factor in factors])  # (factors, tokens)
        together[variant] = labels[:, :, None] == labels[:, None, :]  # each pair twice
    table = {
        (one, other): (together[one] != together[other]).sum(axis=(1, 2)) // 2
        for one, other in itertools.combinations(HIERARCHICAL_VARIANTS, 2)
    }
    index = pd.Index(factors, name="pool_factor")
    return pd.DataFrame(table, index=index).rename_axis(columns=["variant", "other"])


# ---------------------------------------------------------------- figures

# Paul Tol's "light" colours: backgrounds for black text, distinct to colour-blind readers.
FILLS = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00")
PALE = {"edgecolor": "white", "linewidth": 0.8, "linestyle": "-"}
DARK = {"edgecolor": "#222222", "linewidth": 1.2, "linestyle": "-"}
OUTLINES = (PALE, DARK, DARK | {"linestyle": ":"})  # a round of colours each
SMALL = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
COLUMNS, WIDTH = 118, 9.5  # characters per line; inches
FONT = {"family": "DejaVu Sans Mono", "fontsize": 9.5, "parse_math": False}


def draw_clusters(panels: Mapping[str, Pooled]) -> NotebookFigure:
    """Documents as running text; tokens of one cluster share a colour and a small number.

    A token that is alone in its cluster is pale grey, one without a vector has no box. Colours
    repeat from the ninth cluster on, with an outline. `panels` maps titles to pooled documents.
    """
    words = [list(_layout(pooled)) for pooled in panels.values()]
    lines = [boxes[-1][1] + 1 if boxes else 0 for boxes in words]
    total = sum(lines) + 1.6 * len(panels)
    with matplotlib.rc_context(STYLE):
        figure = NotebookFigure(figsize=(WIDTH, 0.285 * total))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set(xlim=(-0.5, COLUMNS + 0.5), ylim=(total, 0))  # in characters and lines
        axis.axis("off")
        top = 0.0
        for (title, pooled), boxes, height in zip(panels.items(), words, lines, strict=True):
            axis.text(0, top + 0.9, title, fontsize=11, va="center")
            for left, line, width, text, label in boxes:
                x, y = left + width / 2, top + 1.95 + line
                colour = "#8A8A8A" if label is None else "#222222"
                axis.text(x, y, text, ha="center", va="center", color=colour, **FONT)
                if label is not None:
                    look = _look(pooled.numbers.get(label)) | {"gid": f"cluster:{label}"}
                    axis.add_patch(Rectangle((left, y - 0.38), width, 0.76, **look))
            top += height + 1.6
    figure.alt = "A document's word pieces, coloured by cluster. " + " ".join(
        f"{title}; largest clusters: {'; '.join(cluster_table(pooled)['tokens'][:3]) or 'none'}."
        for title, pooled in panels.items()
    )
    return figure


def _layout(pooled: Pooled) -> Iterator[tuple[float, int, float, str, int | None]]:
    """Left edge, line, width (in characters), text and label of each token, words kept whole."""
    labels = iter(pooled.labels.tolist())
    words: list[list[tuple[float, str, int | None]]] = []
    for token, counted in zip(pooled.document.tokens, pooled.document.counted, strict=True):
        label = next(labels) if counted else None
        number = str(pooled.numbers.get(label, "")).translate(SMALL)
        text = token.removeprefix("##") + number
        if not token.startswith("##") or not words:
            words.append([])
        words[-1].append((len(text) + (0.6 if counted else 0), text, label))
    left, line = 0.0, 0
    for word in words:
        if left and left + sum(width for width, *_ in word) > COLUMNS:
            left, line = 0.0, line + 1
        for width, text, label in word:
            yield left, line, width, text, label
            left += width
        left += 0.6


def _look(number: int | None) -> dict[str, object]:
    if number is None:
        return PALE | {"facecolor": "#EFEFEF"}
    turn, colour = divmod(number - 1, len(FILLS))
    outline = OUTLINES[turn % len(OUTLINES)]
    return outline | {"facecolor": FILLS[colour], "zorder": 1 + 0.1 * turn}


def draw_maxsim(query: EncodedText, pooled: Pooled) -> NotebookFigure:
    """Similarities as a heat map; the best match of each row is framed and named at the right."""
    table = query.vectors @ pooled.vectors.T  # (query tokens, document vectors)
    names = [group_name(group, 3) for group in pooled.groups]
    height = 0.24 * len(table) + 0.07 * max(map(len, names)) + 0.5
    unit = "tokens" if pooled.factor == 1 else f"{pooled.method} clusters, factor {pooled.factor}"
    what = f"the document's {len(pooled.vectors)} vectors ({unit})"
    with matplotlib.rc_context(STYLE):
        width = max(WIDTH, 2.2 + 0.16 * len(names))
        figure = NotebookFigure(figsize=(width, height), layout="constrained")
        axis = figure.subplots()
        axis.imshow(table, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_yticks(range(len(table)), query.counted_tokens, fontsize=9, parse_math=False)
        axis.set_xticks(range(len(names)), names, fontsize=8, rotation=90, parse_math=False)
        axis.set_title(f"Dot products of query tokens and {what}, 0 pale to 1 dark\n"
                       f"MaxSim, the sum of the framed: {table.max(axis=1).sum():.2f}",
                       fontsize=11, loc="left")  # fmt: skip
        values, best = axis.secondary_yaxis("right"), [f"{v:.2f}" for v in table.max(axis=1)]
        values.set_yticks(range(len(table)), best, fontsize=9, color="#B04A00")
        for side in (axis, values):
            side.tick_params(length=0)
            side.grid(False)
        for row, column in enumerate(table.argmax(axis=1)):
            frame = {"fill": False, "edgecolor": "#D55E00", "linewidth": 1.8, "clip_on": False}
            axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **frame))
    figure.alt = f"Heat map of query tokens against {what}. Best matches: " + "; ".join(
        f"{token} with {match} {value:.2f}"
        for token, match, value in maxsim_table(query, pooled).to_numpy()
    )
    return figure


def draw_sweep(table: pd.DataFrame) -> NotebookFigure:
    """Number of vectors, their mean length and the score, by pool factor (`table`: `sweep`'s)."""
    titles = {"vectors": "Vectors stored", "norm": "Mean length of a vector", "score": "MaxSim"}
    with matplotlib.rc_context(STYLE):
        figure = NotebookFigure(figsize=(WIDTH, 3), layout="constrained")
        for axis, (column, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
            for method, rows in table.groupby("pool_method", sort=False):
                style = {"color": COLOURS[method], "marker": MARKERS[method], "markersize": 5}
                axis.plot(rows["pool_factor"], rows[column], label=method, linewidth=1.8, **style)
            axis.set_title(title, fontsize=11, loc="left")
            ticks, top = sorted(table["pool_factor"].unique()), 1.08 * table[column].max()
            axis.set(xlabel="pool factor", xticks=ticks, ylim=(0, top))
        figure.axes[-1].legend(frameon=False, fontsize=9, loc="lower left")
    figure.alt = (
        "Three line charts by pool factor and method: vectors stored, mean length of a vector, "
        "MaxSim. All fall as the factor grows. The table below has the numbers."
    )
    return figure


def pooling_panels(
    example: Example,
    pool_method: PoolMethod,
    factors: Sequence[int] = FACTORS,
    variants: Sequence[PoolVariant] = (DEFAULT_VARIANT,),
) -> dict[str, Pooled]:
    """The first document at each pool factor and variant, under titles for `draw_clusters`."""
    panels = {}
    for factor, variant in itertools.product(factors, variants):
        pooled = pool_document(example.documents[0], factor, pool_method, variant)
        name = f"{pool_method}, variant {variant}" if len(variants) > 1 else pool_method
        counts = f"{len(pooled.vectors)} vectors, MaxSim {maxsim(example.query, pooled):.2f}"
        panels[f"{name}, pool factor {factor}:  {counts}"] = pooled
    return panels


def is_live() -> bool:
    """Whether a widget can run: VS Code sets the one, JupyterLab the other, papermill neither."""
    names = getattr(get_ipython(), "user_ns", {})
    return "__vsc_ipynb_file__" in names or "JPY_SESSION_NAME" in os.environ


def step_through(
    example: Example, pool_factor: int = 4, pool_method: PoolMethod = "kmeans"
) -> ipywidgets.Widget | NotebookFigure:
    """A slider and buttons in a live JupyterLab or VS Code; elsewhere their first position."""

    def show(factor: int, method: PoolMethod) -> NotebookFigure:
        return draw_clusters(pooling_panels(example, method, [factor]))

    if not is_live():
        return show(pool_factor, pool_method)
    slider = ipywidgets.IntSlider(pool_factor, min=1, max=6, description="pool factor")
    buttons = ipywidgets.ToggleButtons(options=METHODS, value=pool_method)
    return ipywidgets.interactive(show, {"auto_display": True}, factor=slider, method=buttons)
