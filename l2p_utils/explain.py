"""What pooling does to one document, looked at token by token.

Takes the stored example (or the reader's own text and a saved model); gives tables and pictures:
the document's tokens coloured by cluster, MaxSim worked out, a slider to step through.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from PIL import Image

from l2p_utils.files import UserError, atomic_path, from_root, read_json, write_json
from l2p_utils.pooling import (
    DEFAULT_VARIANT,
    HIERARCHICAL_VARIANTS,
    PoolMethod,
    PoolVariant,
    cluster_labels,
    pool,
)

if TYPE_CHECKING:
    import ipywidgets

METHODS: tuple[PoolMethod, ...] = ("span", "kmeans", "hierarchical")
FACTORS = (1, 2, 3, 4, 6)

# ---------------------------------------------------------------- the example


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """A text as a late-interaction model stores it.

    Attributes
    ----------
    tokens : tuple of str
        All word pieces, special tokens included.
    counted : numpy.ndarray
        (tokens,) bool; False where no vector is stored: punctuation of documents.
    vectors : numpy.ndarray
        (counted tokens, dim) float32, unit length.
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
    """A query, the document that is looked at (the first), and others; and what encoded them."""

    query: EncodedText
    documents: list[EncodedText]
    encoder: str


def load_example(source: str, text: str = "", model: str = "") -> Example:
    """The stored example, or the same notebook on another model or text.

    Parameters
    ----------
    source
        Folder of the stored example, seen from the project's root.
    text
        The reader's own text. With several lines, the first is the query and the rest the document;
        with one line, it is the document and the stored query is kept. The stored document becomes
        one of the others.
    model
        Folder of a saved model, seen from the project's root, which encodes all texts anew.

    Raises
    ------
    UserError
        When there is no such example or model, or a text was given without a model.
    """
    stored = read_example(from_root(source))
    if not model:
        if text.strip():
            raise UserError(
                "text was given and model was not: a text of your own has to be encoded. Set model "
                'to the folder of a saved model, such as "runs/quick/models/baseline".'
            )
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
    return Example(
        _encode(model, query, is_query=True),
        [_encode(model, document, is_query=False) for document in documents],
        Path(model_folder).name,
    )


def _encode(model, text: str, is_query: bool) -> EncodedText:
    # output_value=None: PyLate then gives every token's vector, with the mask of those that count
    features = model.encode([text], is_query=is_query, output_value=None, show_progress_bar=False)
    ids, vectors, counted = (
        torch.as_tensor(features[name][0]).cpu()
        for name in ("input_ids", "token_embeddings", "masks")
    )
    tokens = [token.strip() for token in model.tokenizer.convert_ids_to_tokens(ids.tolist())]
    vectors = torch.nn.functional.normalize(vectors.float(), dim=-1)[counted.bool()]
    return EncodedText(text, tuple(tokens), counted.bool().numpy(), vectors.numpy())


def write_example(example: Example, folder: str | Path) -> None:
    """Store an example as `example.json` (texts, tokens, masks) and `vectors.npy` (float16)."""
    texts = [example.query, *example.documents]
    with atomic_path(Path(folder) / "vectors.npy") as temporary:
        np.save(temporary, np.concatenate([text.vectors for text in texts]).astype(np.float16))
    query, *documents = (
        {"text": text.text, "tokens": text.tokens, "counted": text.counted.tolist()}
        for text in texts
    )
    write_json(
        Path(folder) / "example.json",
        {"encoder": example.encoder, "query": query, "documents": documents},
    )


def read_example(folder: str | Path) -> Example:
    """Read what `write_example` stored; the vectors come back as float32 of unit length.

    Raises
    ------
    UserError
        When the folder holds no example, or one whose two files do not belong together.
    """
    files = [Path(folder) / name for name in ("example.json", "vectors.npy")]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{folder} holds no example: {' and '.join(missing)} missing. Expected a folder that "
            "l2p_utils.explain.write_example made, such as data/token_pooling."
        )
    try:
        stored = read_json(files[0])
        texts = [stored["query"], *stored["documents"]]
        masks = [np.array(text["counted"], dtype=bool) for text in texts]
        vectors = np.load(files[1]).astype(np.float32)  # (counted tokens of all texts, dim)
        parts = np.split(vectors, np.cumsum([mask.sum() for mask in masks]))
        if len(parts.pop()) or any(len(p) != m.sum() for p, m in zip(parts, masks, strict=True)):
            raise ValueError("example.json counts other tokens than vectors.npy has vectors")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The example in {folder} is damaged: {error!r}. Expected what "
            "l2p_utils.explain.write_example made; restore the folder or write it again."
        ) from error
    query, *documents = (
        EncodedText(text["text"], tuple(text["tokens"]), mask, _unit(part))
        for text, mask, part in zip(texts, masks, parts, strict=True)
    )
    return Example(query, documents, stored["encoder"])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


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
        groups: list[list[str]] = [[] for _ in self.vectors]
        for token, label in zip(self.document.counted_tokens, self.labels, strict=True):
            groups[label].append(token)
        return groups


def pool_document(
    document: EncodedText,
    pool_factor: int = 1,
    pool_method: PoolMethod = "none",
    variant: PoolVariant = DEFAULT_VARIANT,
) -> Pooled:
    """Pool one document with one protected token, as evaluation does, and keep who went where."""
    (vectors,) = pool(
        [torch.from_numpy(document.vectors)], pool_factor, pool_method, variant=variant
    )
    labels = cluster_labels(document.vectors, [pool_factor], pool_method, variant=variant)
    return Pooled(document, pool_method, pool_factor, labels[pool_factor], vectors.numpy())


def similarities(query: EncodedText, pooled: Pooled) -> np.ndarray:
    """Dot products of query tokens with the document's vectors: (query tokens, vectors)."""
    return query.vectors @ pooled.vectors.T


def maxsim(query: EncodedText, pooled: Pooled) -> float:
    """MaxSim(q, d) = Σ_i max_j q_i · d_j: each query token's best match, added up."""
    return float(similarities(query, pooled).max(axis=1).sum())


def maxsim_table(query: EncodedText, pooled: Pooled) -> pd.DataFrame:
    """Each query token with its best match and their similarity; these add up to the score."""
    table = similarities(query, pooled)
    best = [group_name(pooled.groups[column], 3) for column in table.argmax(axis=1)]
    return pd.DataFrame(
        {
            "query token": query.counted_tokens,
            "best match": best,
            "similarity": table.max(axis=1).round(3),
        }
    )


def group_name(tokens: Sequence[str], most: int = 4) -> str:
    """A cluster's tokens in short: `derivative ×3, order ×2, of`; `most` of them."""
    counts = Counter(tokens)
    named = [token if n == 1 else f"{token} ×{n}" for token, n in counts.items()]
    return ", ".join(named[:most]) + (", …" if len(named) > most else "")


def cluster_table(pooled: Pooled) -> pd.DataFrame:
    """Clusters of two tokens and more, the largest first.

    `cosine` is the mean over all pairs of different tokens in the cluster, `norm` the length of
    their mean vector.
    """
    rows = []
    for number, label in _numbers(pooled.labels).items():
        members = pooled.document.vectors[pooled.labels == label]  # (size, dim)
        size = len(members)
        pairs = (members @ members.T)[np.triu_indices(size, k=1)]
        norm = np.linalg.norm(pooled.vectors[label])
        rows.append((number, group_name(pooled.groups[label], 6), size, pairs.mean(), norm))
    table = pd.DataFrame(rows, columns=["cluster", "tokens", "size", "cosine", "norm"])
    table = table.set_index("cluster").sort_values("size", ascending=False, kind="stable")
    return table.round(3)


def sweep(
    example: Example,
    methods: Sequence[PoolMethod] = METHODS,
    factors: Sequence[int] = (1, 2, 3, 4, 5, 6),
) -> pd.DataFrame:
    """The first document under every method × factor.

    Returns
    -------
    pandas.DataFrame
        `pool_method`, `pool_factor`, `vectors` (count), `norm` (mean length of the vectors),
        `score` (MaxSim with the query).
    """
    rows = []
    for method, factor in itertools.product(methods, factors):
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
    names = [_shortened(document.text) for document in example.documents]
    return pd.DataFrame(columns, index=pd.Index(names, name="document")).round(2)


def _shortened(text: str, most: int = 48) -> str:
    return text if len(text) <= most else text[: most - 2].rstrip() + " …"


def pairs_apart(first: np.ndarray, second: np.ndarray) -> int:
    """How many pairs of tokens are together in one grouping and apart in the other."""
    together = [labels[:, None] == labels for labels in (first, second)]  # (tokens, tokens)
    return int(np.triu(together[0] != together[1], k=1).sum())


def variant_table(document: EncodedText, factors: Sequence[int] = FACTORS[1:]) -> pd.DataFrame:
    """Token pairs that two hierarchical variants group differently, at each pool factor.

    `pairs together` counts the pairs that the first of the two puts together.
    """
    rows = []
    for factor in factors:
        groupings = {
            variant: pool_document(document, factor, "hierarchical", variant).labels
            for variant in HIERARCHICAL_VARIANTS
        }
        for (name, labels), (other, others) in itertools.combinations(groupings.items(), 2):
            together = pairs_apart(labels, np.arange(len(labels)))
            rows.append((factor, name, other, together, pairs_apart(labels, others)))
    columns = ["pool_factor", "variant", "other", "pairs together", "grouped differently"]
    return pd.DataFrame(rows, columns=columns)


# ---------------------------------------------------------------- drawing

# Paul Tol's "light" colours: made as backgrounds of black text, distinct to colour-blind readers.
FILLS = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00")
SINGLE, FAINT, DARK = "#EFEFEF", "#9A9A9A", "#222222"
OUTLINES = ((0, "-"), (1.2, "-"), (1.2, (0, (1.5, 1.2))), (2.2, "-"))  # width and dashes, a round
WIDTH = 684.0  # points: a notebook's page
FONT, SMALL, TITLE = 10.0, 6.5, 11.0  # points
PAD, GAP, BOX, LINE = 2.6, 4.2, 15.5, 21.0  # points: in a box, between words, heights
STYLE = {"font.sans-serif": ["DejaVu Sans"], "axes.edgecolor": "#999999"}  # comes with Matplotlib


class Picture(Figure):
    """A figure outside pyplot's state: shows itself in a notebook, and the same every time."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        with rc_context(STYLE):
            FigureCanvasAgg(self)
            self.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        small = BytesIO()  # 64 colours are enough, and a third of the bytes in the notebook
        Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
            small, format="png", optimize=True
        )
        return small.getvalue()


@dataclasses.dataclass(frozen=True)
class _Box:
    """A token's place in points: left edge, width, line; its text; its place among the counted."""

    left: float
    width: float
    line: int
    text: str
    vector: int | None
    number: str = ""


def draw_clusters(panels: Mapping[str, Pooled]) -> Picture:
    """Documents as flowing text, tokens of one cluster in one colour and with one small number.

    A token that is alone in its cluster is pale grey, one without a vector has no box. From the
    ninth cluster on colours come again, outlined.

    Parameters
    ----------
    panels
        Title → pooled document, drawn one below the other.
    """
    laid_out = [list(_layout(pooled)) for pooled in panels.values()]
    heights = [26 + LINE * (boxes[-1].line + 1 if boxes else 0) for boxes in laid_out]
    figure = Picture(figsize=(WIDTH / 72, sum(heights) / 72))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, WIDTH), ylim=(sum(heights), 0))  # in points, y downwards
    axis.axis("off")
    tops = np.cumsum([0, *heights])
    for panel, (title, pooled) in enumerate(panels.items()):
        axis.text(2, tops[panel] + 15, title, fontsize=TITLE, va="baseline", color=DARK)
        for place, box in enumerate(laid_out[panel]):
            _draw_box(axis, box, tops[panel] + 23 + LINE * box.line, pooled, f"{panel}:{place}")
    return figure


def _layout(pooled: Pooled) -> Iterator[_Box]:
    """Places of a document's tokens; the pieces of one word touch and stay on one line."""
    numbers = {label: str(number) for number, label in _numbers(pooled.labels).items()}
    order = iter(range(len(pooled.labels)))
    left, line = 2.0, 0
    for word in _words(pooled.document):
        boxes = []
        for token, counted in word:
            vector = next(order) if counted else None
            number = numbers.get(pooled.labels[vector], "") if counted else ""
            text = token.removeprefix("##")
            width = _width(text, FONT) + (2 * PAD if counted else 0)
            width += _width(number, SMALL) + 1 if number else 0
            boxes.append(_Box(0, width, 0, text, vector, number))
        if left + sum(box.width for box in boxes) > WIDTH - 2 and left > 2:
            left, line = 2.0, line + 1
        for box in boxes:
            yield dataclasses.replace(box, left=left, line=line)
            left += box.width
        left += GAP


def _words(document: EncodedText) -> Iterator[list[tuple[str, bool]]]:
    """Tokens with their masks, the pieces of one word in one list."""
    word: list[tuple[str, bool]] = []
    for token, counted in zip(document.tokens, document.counted, strict=True):
        if word and not token.startswith("##"):
            yield word
            word = []
        word.append((token, bool(counted)))
    if word:
        yield word


def _width(text: str, size: float) -> float:
    """Width of a text in points."""
    font = FontProperties(family="DejaVu Sans", size=size)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]


def _numbers(labels: np.ndarray) -> dict[int, int]:
    """Number 1, 2, 3, … → label, for clusters of two and more in the order of first occurrence."""
    large = np.flatnonzero(np.bincount(labels) > 1) if len(labels) else []
    return {number: int(label) for number, label in enumerate(large, start=1)}


def _draw_box(axis, box: _Box, top: float, pooled: Pooled, gid: str) -> None:
    colour = FAINT if box.vector is None else DARK
    pad = 0 if box.vector is None else PAD
    baseline = top + 11.5
    if box.vector is not None:
        axis.add_patch(_background(box, top, int(pooled.labels[box.vector])))
    font = {"family": "DejaVu Sans", "va": "baseline", "parse_math": False}
    axis.text(box.left + pad, baseline, box.text, fontsize=FONT, color=colour, gid=gid, **font)
    right = box.left + box.width - 1.4
    axis.text(right, baseline + 2, box.number, fontsize=SMALL, color=colour, ha="right", **font)


def _background(box: _Box, top: float, label: int) -> Rectangle:
    """The box of a token; its gid tells the cluster."""
    fill, (width, dashes) = SINGLE, OUTLINES[0]
    if box.number:
        turn, colour = divmod(int(box.number) - 1, len(FILLS))
        fill, (width, dashes) = FILLS[colour], OUTLINES[turn % len(OUTLINES)]
    # the white edge of half a point separates the pieces of a word
    edge = {"edgecolor": DARK if width else "white", "linewidth": width or 0.8}
    inset = 0.6 if width else 0
    place = (box.left + inset, top + inset)
    size = (box.width - 2 * inset, BOX - 2 * inset)
    return Rectangle(place, *size, facecolor=fill, linestyle=dashes, gid=f"cluster:{label}", **edge)


def draw_maxsim(query: EncodedText, pooled: Pooled) -> Picture:
    """The similarities as a heat map, each best match framed, their sum at the right."""
    table = similarities(query, pooled)  # (query tokens, vectors)
    best = table.argmax(axis=1)
    labels = [group_name(group, 3) for group in pooled.groups]
    width = max(WIDTH / 72, 2.6 + 0.15 * len(labels))  # all in inches from here
    below = 0.1 + max(_width(label, 8) for label in labels) / 72  # the upright labels
    high, above = 0.24 * len(table), 0.3
    height = max(below, 0.3) + high + above
    figure = Picture(figsize=(width, height))
    axis = figure.add_axes(
        (1.1 / width, 1 - (above + high) / height, 1 - 1.95 / width, high / height)
    )
    axis.imshow(table, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axis.set_yticks(range(len(table)), query.counted_tokens, fontsize=9, parse_math=False)
    axis.set_xticks(range(len(labels)), labels, fontsize=8, rotation=90, parse_math=False)
    axis.tick_params(length=0, pad=3)
    for row, column in enumerate(best):
        corner = (column - 0.5, row - 0.5)
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#D55E00", linewidth=1.8))
        value = f"{table[row, column]:.2f}"
        axis.text(len(labels) - 0.3, row, value, fontsize=9, va="center", color="#B04A00")
    total = f"sum {table.max(axis=1).sum():.2f}"
    axis.text(len(labels) - 0.3, len(table), total, fontsize=9, va="center", weight="bold")
    axis.set_title(_maxsim_title(pooled), fontsize=TITLE, loc="left", color=DARK)
    return figure


def _maxsim_title(pooled: Pooled) -> str:
    what = "tokens" if pooled.factor == 1 else f"{pooled.method} clusters, factor {pooled.factor}"
    vectors = f"the document's {len(pooled.vectors)} vectors ({what})"
    return f"Query tokens × {vectors}: dot product, 0 pale to 1 dark"


def draw_sweep(table: pd.DataFrame) -> Picture:
    """What `sweep` found: vectors left, their mean length and the score, by pool factor."""
    from l2p_utils.figures import COLOURS, MARKERS

    figure = Picture(figsize=(WIDTH / 72, 2.9), layout="constrained")
    titles = {
        "vectors": "Vectors stored",
        "norm": "Mean length of a vector",
        "score": "MaxSim score",
    }
    for axis, (column, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for method, rows in table.groupby("pool_method", sort=False):
            style = {"color": COLOURS[method], "marker": MARKERS[method], "markersize": 5}
            axis.plot(rows["pool_factor"], rows[column], label=method, linewidth=1.8, **style)
        axis.set_title(title, fontsize=TITLE, loc="left")
        axis.set_xlabel("pool factor")
        axis.set_xticks(sorted(table["pool_factor"].unique()))
        axis.set_ylim(0, 1.08 * table[column].max())
        axis.grid(color="#E6E6E6")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def pooling_panels(
    example: Example, pool_method: PoolMethod, factors: Sequence[int] = FACTORS
) -> dict[str, Pooled]:
    """The first document at each pool factor, under titles for `draw_clusters`."""
    return dict(_panel(example, factor, pool_method) for factor in factors)


def variant_panels(example: Example, pool_factor: int) -> dict[str, Pooled]:
    """The first document pooled by each hierarchical variant, under titles for `draw_clusters`."""
    return dict(
        _panel(example, pool_factor, "hierarchical", variant) for variant in HIERARCHICAL_VARIANTS
    )


def _panel(
    example: Example, factor: int, method: PoolMethod, variant: PoolVariant | None = None
) -> tuple[str, Pooled]:
    pooled = pool_document(example.documents[0], factor, method, variant or DEFAULT_VARIANT)
    score = maxsim(example.query, pooled)
    name = f"{method}, variant {variant}" if variant else method
    counts = f"{len(pooled.vectors)} vectors, MaxSim {score:.2f}"
    return f"{name}, pool factor {factor}:  {counts}", pooled


# ---------------------------------------------------------------- stepping through


def step_through(
    example: Example, pool_factor: int = 4, pool_method: PoolMethod = "kmeans"
) -> ipywidgets.Widget | Picture:
    """The slider where somebody can move it; elsewhere the picture of its first position."""
    if _is_live():
        return slider(example, pool_factor, pool_method)
    return draw_clusters(dict([_panel(example, pool_factor, pool_method)]))


def _is_live() -> bool:
    """Whether a reader's front end started this kernel (papermill and nbconvert set neither)."""
    from IPython import get_ipython

    shell = get_ipython()
    in_vscode = shell is not None and "__vsc_ipynb_file__" in shell.user_ns
    return in_vscode or "JPY_SESSION_NAME" in os.environ


def slider(
    example: Example, pool_factor: int = 4, pool_method: PoolMethod = "kmeans"
) -> ipywidgets.VBox:
    """A slider for the pool factor and buttons for the method, above the coloured document."""
    import ipywidgets

    factor = ipywidgets.IntSlider(pool_factor, min=1, max=6, description="pool factor")
    method = ipywidgets.ToggleButtons(options=METHODS, value=pool_method)
    image = ipywidgets.Image(format="png", layout={"max_width": "100%"})

    def redraw(change: object = None) -> None:
        picture = draw_clusters(dict([_panel(example, factor.value, method.value)]))
        image.value = picture._repr_png_()

    factor.observe(redraw, names="value")
    method.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([ipywidgets.HBox([factor, method]), image])
