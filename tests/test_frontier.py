"""Ways of storing less: each by hand, the measurements by evaluation, the front by brute force."""

import shutil
from operator import attrgetter

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from l2p_utils import frontier
from l2p_utils.collection import Collection
from l2p_utils.evaluation import encode_collection, evaluate_collection
from l2p_utils.files import UserError
from l2p_utils.frontier import (
    CODES,
    UNPOOLED,
    Tokens,
    Way,
    all_ways,
    by_idf,
    draw,
    fewer_dimensions,
    first_tokens,
    kept,
    measure,
    measure_model,
    pareto,
    read_tokens,
    recommended,
    span_within,
    stored_bytes,
    summary,
    to_mean,
)
from l2p_utils.pooling import pool, unit_length
from l2p_utils.profile import PROFILES, Profile
from l2p_utils.search import maxsim_scores
from l2p_utils.statistics import interval


@pytest.fixture(scope="module")
def collection(texts):
    """Eight documents; a query is a document's first words."""
    corpus = {f"d{i}": text for i, text in enumerate(texts)}
    queries = {f"q{i}": " ".join(text.split()[:4]) for i, text in enumerate(texts)}
    return Collection(
        "made-up", corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(len(texts))}
    )


@pytest.fixture(scope="module")
def tokens(bundled_model, collection):
    return read_tokens(bundled_model, collection)


def made(lengths, **parts):
    """Tokens of random documents, and a query for each."""
    generator = torch.Generator().manual_seed(0)
    documents = [unit_length(torch.randn(n, 8, generator=generator)) for n in lengths]
    ids = [str(i) for i in range(len(lengths))]
    known = Collection(
        "x", dict.fromkeys(ids, "t"), dict.fromkeys(ids, "t"), {i: {i: 1} for i in ids}
    )
    empty = dict.fromkeys(["norms", "pieces", "words", "sentences"], [])
    return Tokens(known, documents, [d[:2] for d in documents], **{**empty, **parts})


# --- reading --------------------------------------------------------------------------------------


def test_tokens_are_those_that_are_searched(bundled_model, collection, tokens):
    encoded = encode_collection(bundled_model, collection, progress=False)
    for ours, theirs in ((tokens.documents, encoded.documents), (tokens.queries, encoded.queries)):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
    for part in (tokens.norms, tokens.pieces, tokens.words, tokens.sentences):
        assert [len(found) for found in part] == [len(document) for document in tokens.documents]
    assert np.ptp(np.concatenate(tokens.norms)) > 0.1  # before they were normalised


def test_words_and_sentences_by_hand(bundled_model):
    corpus = {"a": "Interpolate with splines. The derivatives vanish", "b": "one"}
    found = read_tokens(bundled_model, Collection("x", corpus, {}, {}))
    pieces = bundled_model.tokenizer.convert_ids_to_tokens(found.pieces[0].tolist())
    words, sentences = found.words[0], found.sentences[0]
    for i in range(1, len(pieces)):
        assert (words[i] == words[i - 1]) == pieces[i].startswith("##")
    assert (sentences == (np.arange(len(pieces)) >= pieces.index("the"))).all()
    assert frontier._word_starts(["<s>", "Ġan", "Ġarr", "ay"]) == [False, True, True, False]


# --- ways -----------------------------------------------------------------------------------------


def test_span_at_words_and_sentences_by_hand():
    words = np.array([0, 1, 2, 2, 2, 3, 4, 5, 5])
    some = made([9], words=[words], sentences=[np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])])
    (document,) = some.documents

    def means(*groups):
        return unit_length(torch.stack([document[list(group)].mean(0) for group in groups]))

    found = span_within("words", 3)(some)[0]
    assert torch.allclose(found, means([0], [1], [2, 3, 4], [5, 6], [7, 8]))
    found = span_within("words", 2)(some)[0]  # a longer word is not parted
    assert torch.allclose(found, means([0], [1], [2, 3, 4], [5, 6], [7, 8]))
    found = span_within("sentences", 4)(some)[0]
    assert torch.allclose(found, means([0], [1, 2, 3, 4], [5], [6, 7, 8]))
    alone = made([1, 0], words=[np.array([0]), np.array([])])
    assert [len(d) for d in span_within("words", 2)(alone)] == [1, 0]


def test_pruning_by_hand():
    pieces = [np.array([9, 1, 2, 3, 1]), np.array([9, 1, 1]), np.array([9, 2])]
    norms = [np.array([1.0, 5, 1, 4, 2]), np.array([9.0, 1, 2]), np.array([1.0, 1])]
    some = made([5, 3, 2], pieces=pieces, norms=norms)

    def chosen(score, factor):
        rows = zip(kept(score, factor)(some), some.documents, strict=True)
        return [[int((d == v).all(1).nonzero()) for v in stored] for stored, d in rows]

    assert chosen(first_tokens, 2) == [[0, 1, 2], [0, 1], [0, 1]]
    assert chosen(attrgetter("norms"), 2) == [[0, 1, 3], [0, 2], [0, 1]]
    assert chosen(by_idf, 4) == [[0, 3], [0, 1], [0, 1]]  # 3 is in one document, 1 and 2 in two


def test_all_dimensions_change_no_score_and_fewer_lose_least(tokens):
    scores = maxsim_scores(
        *(fewer_dimensions(attrgetter(side), 128)(tokens) for side in ("queries", "documents"))
    )
    expected = maxsim_scores(tokens.queries, tokens.documents)
    assert torch.allclose(scores, expected, atol=1e-4)
    projected = torch.cat(fewer_dimensions(attrgetter("documents"), 8)(tokens))
    whole = torch.cat(tokens.documents)
    values = torch.linalg.svdvals(whole[::7])
    assert projected.shape[1] == 8
    share = projected[::7].square().sum() / whole[::7].square().sum()
    expected = (values[:8] ** 2).sum() / (values**2).sum()
    assert share.item() == pytest.approx(expected.item(), rel=1e-3)


def test_codes_by_hand():
    vectors = torch.tensor([[0.5, -1.0, 0.25, 0.0], [3.0, 0.1, -0.2, 0.3]])
    assert CODES["1 bit"].decode(vectors).tolist() == [[0.5, -0.5, 0.5, 0.5], [0.5, 0.5, -0.5, 0.5]]
    for code, most in (("int8", 127), ("4 bits", 7)):
        decoded = CODES[code].decode(vectors)
        step = vectors.abs().amax(1, keepdim=True) / most
        assert ((decoded - vectors).abs() <= 0.51 * step).all()
        assert all(len(row.unique()) <= 2 * most + 1 for row in decoded)
    assert CODES["float16"].decode(vectors)[1, 1].item() == np.float16(0.1)
    assert CODES["4 bits"].decode(torch.zeros(1, 4)).tolist() == [[0] * 4]
    for dim in (1, 7, 128):  # what is stored is as long as is said, and none of it is lost
        some = torch.nn.functional.normalize(torch.randn(5, dim), dim=1)
        for name, code in CODES.items():
            packed = code.pack(some.numpy())
            assert packed.dtype == np.uint8 and packed.size == stored_bytes(5, dim, name) - 8
            again = code.pack(code.unpack(packed, dim))
            assert (code.unpack(again, dim) == code.unpack(packed, dim)).all()
    # 12 vectors of 128 dimensions: values, scales of two bytes, an offset of eight
    sizes = [stored_bytes(12, 128, code) for code in CODES]
    assert sizes == [12 * 512 + 8, 12 * 256 + 8, 12 * 130 + 8, 12 * 66 + 8, 12 * 16 + 8]


def test_shares_of_a_mean_number_are_as_many_in_all(tokens):
    expected = sum(len(document) for document in pool(tokens.documents, 4, "kmeans"))
    for rule in ("equal", "threshold"):
        assert sum(map(len, to_mean("kmeans", 4, rule)(tokens))) == expected


# --- measuring ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tokens):
    return measure(tokens, all_ways(), progress=False)


def test_measured_as_an_evaluation_does(bundled_model, collection, tokens, measured):
    rows, per_query = measured
    encoded = encode_collection(bundled_model, collection, progress=False)
    theirs, _ = evaluate_collection(encoded, ["kmeans"], [1, 2, 4], means=["raw", "unit"])
    theirs = theirs.set_index(["pool_factor", "renormalized"])
    names = {UNPOOLED: (1, False), "kmeans PF2": (2, True), "kmeans, raw means PF4": (4, False)}
    ours = rows.set_index("way")
    for name, key in names.items():
        assert ours.loc[name, "ndcg@10"] == pytest.approx(theirs.loc[key, "ndcg@10"], abs=1e-6)
        vectors = ours.loc[name, "vectors_per_document"]
        assert vectors == pytest.approx(theirs.loc[key, "vectors_per_document"], abs=1e-3)
    assert ours["bytes_per_document"].idxmax() == UNPOOLED and (rows["store_ms"] >= 0).all()
    assert set(rows["family"]) == set(frontier.LOOKS) and rows["way"].is_unique
    means = per_query.groupby("way")["ndcg@10"].mean()
    assert means[rows["way"]].to_numpy() == pytest.approx(rows["ndcg@10"].to_numpy())


def two_collections(measured):
    rows, per_query = measured
    keys = {"model": "m", "document_length": 32}
    frames = [
        [frame.assign(**keys, collection=name) for name in "ab"] for frame in (rows, per_query)
    ]
    frames[1][1] = frames[1][1].assign(**{"ndcg@10": frames[1][1]["ndcg@10"] * 0.5})
    frames[0][1] = frames[0][1].assign(**{"ndcg@10": frames[0][1]["ndcg@10"] * 0.5})
    return [pd.concat(frame, ignore_index=True) for frame in frames]


def test_a_summary_is_of_paired_percentages(measured):
    found = summary(*two_collections(measured)).set_index("way")
    assert found.loc[UNPOOLED, ["kept", "low", "high", "smaller"]].tolist() == [100, 100, 100, 1]
    wide = measured[1].pivot(index="query_id", columns="way", values="ndcg@10")
    a, b = wide["pruned by first PF6"], wide[UNPOOLED]
    ratio = a.mean() / b.mean()
    half = 50 / b.mean() * (a - ratio * b).to_numpy()  # of each of the two collections
    judge = interval([half, half])
    line = found.loc["pruned by first PF6"]
    assert line["kept"] == pytest.approx(100 * ratio)
    assert line["high"] - line["low"] == pytest.approx(float(judge.high - judge.low))
    assert (found["collections"] == 2).all()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_the_front_is_that_of_brute_force(points):
    costs, values = zip(*points, strict=True)
    found = pareto(costs, values)
    for (cost, value), front in zip(points, found, strict=True):
        beaten = any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
        assert not (front and beaten)
        assert front or beaten or points.count((cost, value)) > 1
    assert len({p for p, front in zip(points, found, strict=True) if front}) == found.sum()


def test_a_figure_and_a_recommendation(measured):
    found = summary(*two_collections(measured))
    figure = draw(found, {"m": "The model"})
    axis = figure.axes[0]
    assert axis.get_title() == "The model, 32 word pieces, 2 collections"
    drawn = np.concatenate([line.get_xydata() for line in axis.lines[1:-1]])
    assert len(drawn) == len(found)
    assert "The Pareto front: The model, " in figure.alt
    table = recommended(found, [0, 50])
    rows = table.reset_index()
    assert (rows["kept"] >= 100 - rows["loss"].str.split().str[0].astype(float)).all()
    sure = rows[rows[""] == "at the lower end"]
    assert (sure["low"] >= 100 - sure["loss"].str.split().str[0].astype(float)).all()


def test_models_are_measured_once(tmp_path, monkeypatch, model_folder, texts, capsys):
    monkeypatch.setattr(Profile, "folder", property(lambda self: tmp_path / "runs"))
    shutil.copytree(model_folder, tmp_path / "runs" / "models" / "baseline")
    content = yaml.safe_load((PROFILES / "smoke.yaml").read_text("utf-8"))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**content, "name": "mine"}))
    ways = [Way(UNPOOLED, UNPOOLED, lambda tokens: tokens.documents)]
    sources = content["evaluation"]["collections"]
    out, count = tmp_path / "out", []
    read_ = frontier.read_tokens
    monkeypatch.setattr(frontier, "read_tokens", lambda *a, **k: count.append(1) or read_(*a, **k))
    for _ in range(2):
        measure_model(str(tmp_path / "mine.yaml"), "baseline", sources, out, 24, ways)
    assert len(count) == len(sources)
    rows = frontier.read(out)
    assert set(rows["document_length"]) == {24} and set(rows["collection"]) == set(sources)
    assert len(frontier.read(out, "per_query")) == rows["queries"].sum()
    with pytest.raises(UserError, match="no measured ways"):
        frontier.read(tmp_path)
    assert frontier.main(["--out", str(tmp_path)]) == 1
    assert "holds no measured ways" in capsys.readouterr().err
