"""Notebook 00's helpers: what is drawn is what pooling does, and MaxSim adds up."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from l2p_utils import explain
from l2p_utils.explain import (
    FACTORS,
    METHODS,
    EncodedText,
    draw_clusters,
    load_example,
    pool_document,
    pooling_panels,
)
from l2p_utils.figures import render
from l2p_utils.files import UserError, from_root
from l2p_utils.pooling import HIERARCHICAL_VARIANTS, cluster_labels, pool
from l2p_utils.search import maxsim_scores

SOURCE = "data/token_pooling"


def png(figure):
    return render(figure, "png", dpi=50)


@pytest.fixture(scope="module")
def example():
    return load_example(SOURCE)


def unit(*rows):
    vectors = np.array(rows, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def small(tokens=("[CLS]", "spl", "##ine", ",", "spl", "##ine"), counted=(1, 1, 1, 0, 1, 1)):
    """A document in two dimensions: [CLS], two pieces, a comma without vector, the pieces again."""
    vectors = unit([1, 0], [1, 0.1], [0, 1], [1, 0.1], [0, 1])
    return EncodedText("spline, spline", tokens, np.array(counted, dtype=bool), vectors)


# ---------------------------------------------------------------- the example


def test_the_stored_example_is_whole(example):
    assert len(example.documents) >= 3 and example.query.counted.all()
    for text in (example.query, *example.documents):
        assert len(text.tokens) == len(text.counted)
        assert text.vectors.shape == (text.counted.sum(), 128)
        assert text.vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(text.vectors, axis=1), 1, atol=1e-6)
        pieces = "".join(t.removeprefix("##") for t in text.tokens if not t.startswith("["))
        assert pieces == text.text.lower().replace(" ", "")
    for document in example.documents:  # only punctuation has no vector
        left_out = set(document.tokens) - set(document.counted_tokens)
        assert left_out and not any(map(str.isalnum, "".join(left_out)))


def test_what_is_written_is_read_back(tmp_path, example):
    explain.write_example(example, tmp_path)
    again = explain.read_example(tmp_path)
    assert again.encoder == example.encoder
    texts = zip([example.query, *example.documents], [again.query, *again.documents], strict=True)
    for text, copy in texts:
        assert (copy.text, copy.tokens) == (text.text, text.tokens)
        assert (copy.counted == text.counted).all()
        np.testing.assert_allclose(copy.vectors, text.vectors, atol=1e-3)  # float16


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "vectors.npy").unlink(),
        lambda folder: (folder / "example.json").write_text("{"),
        lambda folder: (folder / "example.json").write_text('{"query": {}}'),
        lambda folder: (folder / "vectors.npy").write_bytes(b"no array"),
        lambda folder: np.save(folder / "vectors.npy", np.ones((3, 128), np.float16)),
        lambda folder: np.save(folder / "vectors.npy", np.ones((999, 128), np.float16)),
    ],
)
def test_a_damaged_example_is_refused(tmp_path, example, damage):
    explain.write_example(example, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match="no readable example|not valid JSON"):
        explain.read_example(tmp_path)


def test_text_without_model_and_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="model was not"):
        load_example(SOURCE, text="My own words.")
    with pytest.raises(UserError, match="not a saved model"):
        load_example(SOURCE, model=str(tmp_path))
    with pytest.raises(UserError, match="holds no readable example.*example.json"):
        load_example("data/no_such_folder")


def test_own_text_and_model_are_encoded_instead(model_folder, bundled_model, example):
    own = "Which spline?\nA cubic spline, twice continuously differentiable."
    found = load_example(SOURCE, own, str(model_folder))
    assert found.query.text == "Which spline?" and found.encoder == "bundled"
    assert found.documents[0].text == "A cubic spline, twice continuously differentiable."
    assert [d.text for d in found.documents[1:]] == [d.text for d in example.documents]
    for text, is_query in ((found.documents[0], False), (found.query, True)):
        (expected,) = bundled_model.encode([text.text], is_query=is_query)
        np.testing.assert_allclose(text.vectors, expected, atol=1e-5)
    for text in ("A cubic spline.", ""):  # what is not given is the stored text, encoded anew
        found = load_example(SOURCE, text, str(model_folder))
        documents = [text] * bool(text) + [document.text for document in example.documents]
        assert [document.text for document in found.documents] == documents
        assert found.query.text == example.query.text and found.encoder == "bundled"


def test_reading_and_drawing_load_no_model():
    command = (
        "import sys; from l2p_utils import explain as e; x = e.load_example('data/token_pooling');"
        "e.draw_clusters(e.pooling_panels(x, 'kmeans', [2]))._repr_png_();"
        "sys.exit(any(name in sys.modules for name in ('pylate', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", command], cwd=from_root("")).returncode == 0


# ---------------------------------------------------------------- pooling and MaxSim


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", FACTORS)
def test_groups_and_vectors_are_those_of_pooling_and_scores_those_of_search(
    example, method, factor
):
    document = example.documents[0]
    pooled = pool_document(document, factor, method)
    expected = cluster_labels(document.vectors, [factor], method)[factor]
    assert (pooled.labels == expected).all()
    (vectors,) = pool([torch.from_numpy(document.vectors)], factor, method)
    assert (pooled.vectors == vectors.numpy()).all()
    assert sum(map(len, pooled.groups)) == len(document.vectors)
    assert pooled.groups[0] == ["[CLS]"]
    query = torch.from_numpy(example.query.vectors)
    score = maxsim_scores([query], [torch.from_numpy(pooled.vectors)]).item()
    assert explain.maxsim(example.query, pooled) == pytest.approx(score, abs=1e-4)
    table = explain.maxsim_table(example.query, pooled)
    assert table["similarity"].sum() == pytest.approx(score, abs=0.0005 * len(table))


def test_maxsim_by_hand_and_of_all_documents_as_in_search(example):
    query = EncodedText("q", ("a", "b"), np.ones(2, bool), unit([1, 0], [0, 1]))
    document = EncodedText("d", ("x", "y"), np.ones(2, bool), unit([3, 4], [1, 0]))
    pooled = pool_document(document)
    assert explain.maxsim(query, pooled) == pytest.approx(1 + 0.8)
    assert explain.maxsim_table(query, pooled)["best match"].tolist() == ["y", "x"]
    documents = pool([torch.from_numpy(d.vectors) for d in example.documents], 2, "kmeans")
    (expected,) = maxsim_scores([torch.from_numpy(example.query.vectors)], documents).numpy()
    scores = explain.document_scores(example, "kmeans", [1, 2])
    np.testing.assert_allclose(scores["factor 2"], expected, atol=0.0051)


def test_the_cluster_table_has_lengths_that_follow_from_cosines_and_names_tokens(example):
    table = explain.cluster_table(pool_document(example.documents[0], 4, "kmeans"))
    formula = np.sqrt((1 + (table["size"] - 1) * table["cosine"]) / table["size"])
    np.testing.assert_allclose(table["norm"], formula, atol=0.002)
    assert table["size"].is_monotonic_decreasing
    pooled = pool_document(small(), 2, "hierarchical")
    assert pooled.labels.tolist() == [0, 1, 2, 1, 2]
    table = explain.cluster_table(pooled)
    assert table["tokens"].tolist() == ["spl ×2", "##ine ×2"]
    assert table["norm"].tolist() == [1, 1]
    assert explain.cluster_table(pool_document(small())).empty
    assert explain.group_name(["a", "b", "a", "c"], most=2) == "a ×2, b, …"


def test_sweep_begins_unpooled_and_covers_every_setting(example):
    table = explain.sweep(example)
    unpooled = table[table["pool_factor"] == 1]
    assert (unpooled["norm"] == 1).all() and unpooled["score"].nunique() == 1
    assert len(table) == len(METHODS) * 6


def test_the_variant_table_counts_the_pairs_that_two_variants_group_differently(example):
    table = explain.variant_table(example.documents[0], [2, 4])
    assert table.columns.tolist() == list(itertools.combinations(HIERARCHICAL_VARIANTS, 2))
    one, other = (
        pool_document(example.documents[0], 4, "hierarchical", variant).labels
        for variant in ("pylate", "paper")
    )
    pairs = itertools.combinations(range(len(one)), 2)
    expected = sum((one[i] == one[j]) != (other[i] == other[j]) for i, j in pairs)
    assert table.loc[4, ("pylate", "paper")] == expected > 0


# ---------------------------------------------------------------- drawing


SUBSCRIPTS = str.maketrans("", "", "₀₁₂₃₄₅₆₇₈₉")


def token_texts(figure):
    return [text for text in figure.axes[0].texts if "pool factor" not in text.get_text()]


@pytest.mark.parametrize("method", METHODS)
def test_every_token_and_the_clusters_of_pooling_are_drawn(example, method):
    panels = draw_clusters(pooling_panels(example, method))
    drawn = [text.get_text().translate(SUBSCRIPTS) for text in token_texts(panels)]
    tokens = [token.removeprefix("##") for token in example.documents[0].tokens]
    assert drawn == tokens * len(FACTORS)
    pooled = pool_document(example.documents[0], 2, method)
    boxes = draw_clusters({"pool factor 2": pooled}).axes[0].patches
    assert [box.get_gid() for box in boxes] == [f"cluster:{label}" for label in pooled.labels]
    looks = {}
    for box, label in zip(boxes, pooled.labels, strict=True):
        look = (box.get_facecolor(), box.get_edgecolor(), box.get_linestyle())
        assert looks.setdefault(label, look) == look  # a cluster looks the same throughout
    large = {looks[label] for label in pooled.numbers}
    assert len(large) == len(pooled.numbers) > 8  # and unlike the others


def test_boxes_of_a_word_touch_and_words_do_not():
    boxes = draw_clusters({"": pool_document(small())}).axes[0].patches
    ends = [(box.get_x(), box.get_x() + box.get_width()) for box in boxes]
    assert ends[1][1] == pytest.approx(ends[2][0])  # spl + ##ine
    assert ends[0][1] < ends[1][0] - 0.3  # [CLS] and spl


def test_no_token_leaves_its_box_or_the_page(example):
    figure = draw_clusters(pooling_panels(example, "kmeans"))
    figure.draw_without_rendering()
    page = figure.bbox
    for patch in figure.axes[0].patches:
        box = patch.get_window_extent()
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    counted = np.tile(example.documents[0].counted, len(FACTORS))
    texts = [text for text, box in zip(token_texts(figure), counted, strict=True) if box]
    for text, patch in zip(texts, figure.axes[0].patches, strict=True):
        inner, outer = text.get_window_extent(), patch.get_window_extent()
        assert outer.x0 <= inner.x0 and inner.x1 <= outer.x1, text.get_text()


def test_a_document_without_vectors_and_dollar_signs_can_be_drawn():
    nothing = EncodedText("", (), np.zeros(0, bool), np.zeros((0, 2), np.float32))
    dollars = small(tokens=("[CLS]", "$x", "$", "$", "_{", "$"))
    figure = draw_clusters({"empty": pool_document(nothing), "dollars": pool_document(dollars)})
    assert png(figure)
    assert len(token_texts(figure)) == 2 + 6  # with the titles


def test_the_heat_map_frames_the_best_match_of_each_row(example):
    pooled = pool_document(example.documents[0], 4, "kmeans")
    figure = explain.draw_maxsim(example.query, pooled)
    framed = [round(patch.get_x() + 0.5) for patch in figure.axes[0].patches]
    table = example.query.vectors @ pooled.vectors.T
    assert framed == table.argmax(axis=1).tolist()
    assert f"{explain.maxsim(example.query, pooled):.2f}" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda x: explain.draw_maxsim(x.query, pool_document(x.documents[0])), "derivative 0.91"),
        (lambda x: explain.draw_sweep(explain.sweep(x, factors=[1, 2])), "Three line charts by"),
        (
            lambda x: draw_clusters(pooling_panels(x, "hierarchical", [4], HIERARCHICAL_VARIANTS)),
            "hierarchical, variant euclidean, pool factor 4",
        ),
        (
            lambda _: draw_clusters({"title": pool_document(small(), 2, "hierarchical")}),
            "largest clusters: spl ×2; ##ine ×2",
        ),
    ],
)
def test_figures_are_the_same_every_time_and_have_alternative_texts(example, draw, words):
    figure = draw(example)
    assert words in figure.alt and png(figure) == png(draw(example))


# ---------------------------------------------------------------- the slider


def test_jupyterlab_gets_a_slider_that_redraws(example, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/00_token_pooling.ipynb")
    shown = []
    monkeypatch.setattr("ipywidgets.widgets.interaction.display", shown.append)
    box = explain.step_through(example)
    box.update()
    slider, buttons = box.children[:2]
    before = png(shown[-1])
    slider.value = 2
    assert png(shown[-1]) != before
    slider.value, buttons.value = 4, "span"
    assert "span, pool factor 4" in shown[-1].alt
    monkeypatch.delenv("JPY_SESSION_NAME")
    assert png(explain.step_through(example)) == before  # a figure where no slider can run
