"""An index of one's own documents: what goes in, comes out, and survives."""

import json
import os
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from l2p_utils import index as module
from l2p_utils.collection import Collection
from l2p_utils.files import UserError
from l2p_utils.frontier import CODES
from l2p_utils.index import (
    Index,
    choose,
    excerpt,
    known_items,
    main,
    matched_words,
    passages,
    read_documents,
)
from l2p_utils.model import encode
from l2p_utils.pooling import Budget, pool
from l2p_utils.search import exact_search


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(module, "SEGMENT", 3)


@pytest.fixture
def documents(texts):
    return [(f"d{i}", text) for i, text in enumerate(texts)]


@pytest.fixture
def built(tmp_path, documents, bundled_model, model_folder):
    def build(name="index", given=documents, **options):
        options = {"progress": False, **options}
        return Index.build(tmp_path / name, given, bundled_model, str(model_folder), **options)

    return build


def ids(hits):
    return [hit.id for hit in hits]


# --- documents ------------------------------------------------------------------------------------


def test_documents_come_from_folders_and_files(tmp_path):
    (tmp_path / "notes" / "old").mkdir(parents=True)
    (tmp_path / "notes" / "b.txt").write_text("two")
    (tmp_path / "notes" / "old" / "a.MD").write_bytes(b"one \xff")
    (tmp_path / "notes" / "skipped.png").write_bytes(b"\x89")
    assert list(read_documents(tmp_path / "notes")) == [("b.txt", "two"), ("old/a.MD", "one �")]
    records = [
        {"_id": "x", "title": "T", "text": "one"},
        {"_id": "7", "title": None, "text": "two"},
    ]
    frame = pd.DataFrame(records)
    expected = [("x", "T one"), ("7", "two")]
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    lines = "\n".join(map(json.dumps, records))
    (tmp_path / "beir").mkdir()
    for name in ("a.jsonl", "beir/corpus.jsonl"):
        (tmp_path / name).write_text(lines)
    for name in ("a.parquet", "a.csv", "a.tsv", "a.jsonl", "beir"):
        assert list(read_documents(tmp_path / name)) == expected, name
    frame.drop(columns=["_id", "title"]).rename(columns={"text": "body"}).to_csv(tmp_path / "b.csv")
    assert list(read_documents(tmp_path / "b.csv")) == [("0", "one"), ("1", "two")]
    assert list(read_documents(tmp_path / "a.csv", "_id")) == [("x", "T x"), ("7", "7")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, "does not exist"),
        ("empty", "", "no .txt or .md"),
        ("a.pdf", "x", "expected a folder, or a .jsonl"),
        ("a.csv", "id,words\n1,x\n", r"record 1 has no text among its fields \['id', 'words'\]"),
        ("a.jsonl", '{"text": ', "cannot be read"),
        ("a.parquet", "x", "cannot be read"),
    ],
)
def test_what_holds_no_documents_is_refused(tmp_path, name, content, message):
    if content == "":
        (tmp_path / name).mkdir()
    elif content:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_documents(tmp_path / name))


def test_long_texts_become_passages_that_are_read_whole(bundled_model):
    text = "interpolating splines " * 40
    parts = list(passages(bundled_model, [("long", text), ("short", "one")]))
    assert parts[-1] == ("short", "one") and parts[0][0] == "long#1" and len(parts) > 3
    assert " ".join(part for _, part in parts[:-1]).split() == text.split()
    (_, whole), *_ = passages(bundled_model, [("one word", "xq" * 49)])  # cut where it must be
    assert 0 < len(whole) < 98
    for _, part in parts:
        tokens = bundled_model.tokenize([part], is_query=False)["input_ids"].shape[1]
        assert tokens <= bundled_model.document_length


def test_words_that_match_are_marked_in_an_excerpt(bundled_model):
    texts = ["A cubic spline goes through points. " + "x " * 200 + "splines, again.", "", "!"]
    (spans, *none) = matched_words(bundled_model, "cubic spline?", texts)
    words = [texts[0][a:b] for a, b in spans]
    assert none == [[], []] and set(words) <= {"cubic", "spline"} and "spline" in words
    assert excerpt("one two three", [(4, 7)]) == "one **two** three"
    assert excerpt("x " * 90 + "two\nthree four", [(180, 183), (184, 189)], width=10) == (
        "… **two** **three** …"
    )
    assert excerpt("x " * 90, [], width=4) == "x x …"


# --- choosing -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many():
    """Forty documents of two sentences, each with a word of its own."""
    things = [f"{a}{b}" for a in ("spline", "matrix", "array", "test", "row") for b in "abcdefgh"]
    return [
        (f"d{i}", f"The {thing} of it is found here. Then one more, a longer rest, for {thing}s "
                  "and all that is left of it, follows.")
        for i, thing in enumerate(things)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def choice(bundled_model, many):
    return choose(bundled_model, iter(many), max_loss=0.5, progress=False)


def test_a_choice_is_the_smallest_that_qualifies(choice):
    table = choice.table
    assert table["bytes_per_document"].is_monotonic_increasing and len(table) == 47
    first = table[table["qualifies"]].iloc[0]
    assert (first["budget"], first["code"]) == (choice.budget, choice.code)
    assert (table["upper"] >= table["loss"])[table["loss"] > 0].all()
    whole = table.set_index("way").loc["unpooled"]
    assert whole["qualifies"] and whole["best"] == whole["known"] == 0 and whole["same"] == 100
    assert table["best"].iloc[0] > 5 and table["same"].iloc[0] < 90  # the smallest loses much


def test_where_nothing_is_sure_all_vectors_are_kept(bundled_model, many, monkeypatch):
    monkeypatch.setattr(module, "predicted_loss", lambda best, error: (best, 9 + 0 * best))
    strict = choose(bundled_model, many, queries=["a spline", "rows"] * 15, progress=False)
    assert (strict.budget, strict.code) == (Budget(1), "float32")
    assert "known" not in strict.table  # what is right is not known


def test_judgments_are_used_where_there_are_some(bundled_model, many):
    names = [name for name, _ in many]
    queries = {name: text.split()[1] for name, text in many}
    judged = Collection("own", dict(many), queries, {name: {name: 1} for name in names})
    table = choose(bundled_model, judged, max_loss=0.2, progress=False).table
    assert table.set_index("way").loc["unpooled", "loss"] == 0 and "known" not in table


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_loss": 1}, "such as 0.01"), ({"queries": ["one"]}, "1 queries are too few")],
)
def test_what_cannot_be_chosen_by_is_refused(bundled_model, many, options, message):
    with pytest.raises(UserError, match=message):
        choose(bundled_model, many, progress=False, **options)


def test_known_items_take_the_query_out_of_the_document(bundled_model):
    rest = " ".join(f"word{i}" for i in range(12))
    documents = {
        "sentence": f"Short one. This has five words surely. {rest}",
        "title": f"A title\n{rest}",
        "nothing": "Too short to be taken apart.",
        "unread": f"{rest} {rest}. {rest} {rest}. This has five words surely.",
        "empty": "",
    }
    found = known_items(bundled_model, documents)
    assert found.queries == {"sentence": "This has five words surely."}
    assert found.corpus["sentence"].split() == ["Short", "one.", *rest.split()]
    assert found.corpus["nothing"] == documents["nothing"]
    assert found.qrels == {"sentence": {"sentence": 1}}
    titles = known_items(bundled_model, documents, titles=True)
    assert titles.queries == {"title": "A title"} and titles.corpus["title"].split() == rest.split()


def test_every_document_is_as_likely_in_the_sample():
    counts = Counter(
        name
        for seed in range(300)
        for name in module._sampled([(str(i), "x" * (i != 5)) for i in range(10)], 3, seed)
    )
    assert set(counts) == set("012346789") and all(60 < n < 140 for n in counts.values())


def test_the_predicted_loss_is_fitted_to_stored_rows():
    best = np.array([0, 4, 10, 20, 40])
    rows = pd.DataFrame({"best": best, "true": 1.5 * best**2 / 100, "true_error": 1.0})
    loss, error = module.predicted_loss(10, 2, rows)
    assert loss == pytest.approx(1.5) and error == pytest.approx(1.5 * 10 * 2 / 50)  # no misfit
    rows["true"] += [1, -1, 2, -2, 3]
    assert module.predicted_loss(0, 0, rows)[1] > 0.2
    rows = module.predictions()
    assert rows["collection"].nunique() >= 5
    within = []
    for name, part in rows.groupby("collection"):  # each predicted from the others
        others = rows[rows["collection"] != name]
        loss, error = module.predicted_loss(part["best"], part["best_error"], others)
        within += [*(part["true"] <= loss + 1.96 * error)]
    assert np.mean(within) >= 0.95


# --- search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
def test_found_is_what_exact_search_finds_in_what_is_stored(built, documents, bundled_model, code):
    index = built(budget=2, code=code)
    asked = ["cubic spline", "sorted rows", "linear equations"]
    names, texts = zip(*documents, strict=True)
    vectors = pool(encode(bundled_model, texts, False), 2, "kmeans", renormalize=True)
    stored = [CODES[code].decode(document) for document in vectors]
    judge = exact_search(encode(bundled_model, asked, True), stored, names, 5)
    found = index.search(asked, k=5)
    assert [ids(hits) for hits in found] == judge.documents
    assert [[h.score for h in hits] for hits in found] == [pytest.approx(s) for s in judge.scores]
    assert dict(documents)[found[0][0].id] == found[0][0].text
    assert ids(Index.open(index.folder).search(asked[:1], k=1)[0]) == judge.documents[0][:1]


def test_an_index_grows_and_forgets(built, documents):
    index = built(given=documents[:4])
    index.add([*documents[4:], ("d0", "Fit a cubic spline.")])
    assert index.stats()["documents"] == 8
    assert set(ids(index.search(["cubic spline"], k=2)[0])) == {"d0", "d5"}
    assert index.remove(["d0", "unknown", "d5"]) == 2 and index.remove(["d0"]) == 0
    again = Index.open(index.folder)
    assert not {"d0", "d5"} & set(ids(again.search(["cubic spline"], k=10)[0]))
    assert again.stats()["documents"] == 6
    again.add([documents[0]])
    assert again.stats()["documents"] == 7 and "d0" in ids(again.search([documents[0][1]], k=1)[0])


def test_repeated_and_empty_texts_are_left_out_and_counted(built, documents):
    stats = built(given=[*documents, documents[0], ("empty", " \n"), ("e", "")]).stats()
    assert stats["documents"] == 8
    assert (stats["left out: repeated"], stats["left out: empty"]) == (1, 2)
    with pytest.raises(UserError, match="no documents with a text"):
        built(name="other", given=[("e", "")])


def test_the_numbers_of_an_index_by_hand(built, documents, bundled_model):
    stats = built(budget=Budget(max_vectors=5), code="1 bit").stats()
    tokens = [len(document) for document in encode(bundled_model, [t for _, t in documents], False)]
    vectors = sum(min(n, 5) for n in tokens)
    assert stats["bytes of vectors"] == vectors * 16 + 8 * 8
    ratio = (sum(tokens) * 512 + 64) / (vectors * 16 + 64)
    assert stats["times smaller than unpooled float32"] == pytest.approx(ratio, abs=0.05)
    long = built(name="long", given=[("a", "spline " * 60), ("b", "one")]).stats()
    pieces = len(bundled_model.tokenizer("spline " * 60, add_special_tokens=False)["input_ids"])
    read = bundled_model.document_length - 3  # [CLS], the prefix, [SEP]
    assert long["documents cut"] == 1
    assert long["word pieces lost, %"] == round(100 * (pieces - read) / (pieces + 1), 1)


# --- what survives --------------------------------------------------------------------------------


def test_a_build_that_is_broken_off_goes_on(built, documents, monkeypatch):
    index = built(given=documents[:2])  # a good one stands there
    encoded, encode_ = [], module.encode

    def failing(model, texts, **options):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(texts))
        return encode_(model, texts, **options)

    monkeypatch.setattr(module, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        built()
    assert encoded == [3, 3] and index.stats()["documents"] == 2
    monkeypatch.setattr(module, "encode", lambda *a, **k: encoded.append(0) or encode_(*a, **k))
    whole = built()
    assert encoded == [3, 3, 0] and whole.stats()["documents"] == 8
    assert os.listdir(whole.folder.parent) == ["index"]
    with pytest.raises(UserError, match="'2 bits'; expected one of"):
        built(code="2 bits")


@pytest.mark.parametrize("method", ["span", "kmeans"])
def test_an_index_shrinks_without_the_model(built, documents, bundled_model, method, monkeypatch):
    index = built(budget=2, code="float32", pool_method=method)
    index.remove(["d3"])
    monkeypatch.setattr(module, "encode", None)
    small = index.shrink(index.folder.with_name("small"), 2, "int8")
    names, vectors, sizes = zip(
        *((f["id"].tolist(), v, s) for f, v, s in map(small._segment, small.settings["segments"])),
        strict=True,
    )
    assert sum(names, []) == [f"d{i}" for i in range(8) if i != 3]
    tokens = encode(bundled_model, [text for _, text in documents], False)
    direct = [d for i, d in enumerate(pool(tokens, 4, method, renormalize=True)) if i != 3]
    assert [len(v) for v in sum(vectors, [])] == pytest.approx([len(d) for d in direct], abs=1)
    assert [s.sum() for s in sum(sizes, [])] == [len(t) for i, t in enumerate(tokens) if i != 3]
    if method == "span":  # neighbours are the same groups
        for ours, theirs in zip(sum(vectors, []), direct, strict=True):
            assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.97
    with pytest.raises(UserError, match="is the index itself"):
        index.shrink(index.folder, 2)


def test_a_shrunken_index_grows_at_its_own_size(built, documents):
    index = built(budget=2)
    index.remove(["d0", "d1", "d2"])  # a whole segment
    small = index.shrink(index.folder.with_name("small"), 3)
    small.add([documents[0], ("d9", documents[5][1])])
    again = Index.open(small.folder)
    assert again.stats()["documents"] == 7
    assert set(ids(again.search(["cubic spline"], k=2)[0])) == {"d5", "d9"}
    counts = pd.concat([again._segment(name)[0] for name in again.settings["segments"]])
    counts = counts.set_index("id")["vectors"]
    assert counts["d9"] == counts["d5"]  # the same text


def test_what_is_no_index_is_never_replaced(built, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    (tmp_path / "empty").mkdir()
    index = built(name="empty")
    for make in (lambda: built(name="mine"), lambda: index.shrink(tmp_path / "mine", 2)):
        with pytest.raises(UserError, match="something else than an index"):
            make()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"


def test_export_has_everything(built, tmp_path, documents):
    index = built(code="float32")
    index.remove(["d1"])
    index.export(tmp_path / "all.parquet")
    frame = pd.read_parquet(tmp_path / "all.parquet")
    assert frame["id"].tolist() == [name for name, _ in documents if name != "d1"]
    vectors = np.stack(frame["vectors"][0])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert len(vectors) == len(frame["sizes"][0]) and frame["text"][0] == documents[0][1]


def test_the_shell(tmp_path, documents, model_folder, capsys, texts):
    for name, text in documents:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    out, small = str(tmp_path / "out"), str(tmp_path / "small")
    build = ["build", str(tmp_path / "in"), "--out", out, "--model", str(model_folder)]
    assert main([*build, "--max-vectors", "6", "--bits", "8", "--passages"]) == 0
    assert "times smaller than unpooled float32" in capsys.readouterr().out
    assert main(["search", out, "cubic spline", "-k", "2"]) == 0
    assert capsys.readouterr().out.split()[1] == "d5.txt"
    assert main(["remove", out, "d5.txt", "x"]) == 0
    assert "1 of 2 were in the index" in capsys.readouterr().out
    assert main(["add", out, str(tmp_path / "in")]) == 0
    assert main(["shrink", out, small, "--pool-factor", "2", "--bits", "1"]) == 0
    assert main(["export", small, str(tmp_path / "x.parquet")]) == 0
    assert len(pd.read_parquet(tmp_path / "x.parquet")) == len(texts)
    capsys.readouterr()
    assert main(["stats", str(tmp_path)]) == 1
    assert "holds no index" in capsys.readouterr().err
