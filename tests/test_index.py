"""An index of one's own documents: what goes in, comes out, and survives."""

import gc
import http.server
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from qdrant_client import QdrantClient
from tiny import tiny_colbert

from l2p_utils import engines
from l2p_utils import index as module
from l2p_utils.collection import Collection, load_collection
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
from l2p_utils.model import PooledColBERT, encode
from l2p_utils.pooling import Budget, pool
from l2p_utils.search import exact_search


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(module, "SEGMENT", 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # one process where none is named


@pytest.fixture(params=["exact", "qdrant", "server"])
def engine(request, monkeypatch):
    """Options of `build`; a server's place is taken by the client's own engine."""
    if request.param != "server":
        return {"engine": request.param}
    client = QdrantClient(":memory:")
    monkeypatch.setattr(engines, "connect", lambda url: client)
    return {"url": "http://localhost:6333"}


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
    lines = "\n".join(json.dumps(record | {"tags": ["a", "b"]}) for record in records)
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
        ("a.pdf", "x", "another kind; expected a folder"),
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
    strict = choose(bundled_model, many, queries=["a row", "rows"] * 15, progress=False)
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


def test_a_choice_is_drawn_and_what_predicts_it(choice, bundled_model, many, tmp_path):
    best = choice.table[choice.table["qualifies"]].iloc[0]
    assert f"lose at most 50 % is {best['way']}: " in module.draw_choice(choice, 0.5).alt
    folder = tmp_path / "judged"
    (folder / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": name, "text": text}) for name, text in many]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"_id": f"q{name}", "text": text.split()[1]}) for name, text in many]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    lines = ["query-id\tcorpus-id\tscore", *(f"q{name}\t{name}\t1" for name, _ in many)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines))
    module.predict(bundled_model, str(folder), tmp_path / "stored")
    rows = module.predictions(tmp_path / "stored")
    seen = choice.table.set_index("way")["best"].reindex(rows["way"]).to_numpy()
    np.testing.assert_allclose(rows["best"], seen, atol=1e-3)  # the same documents and queries
    assert set(rows["collection"]) == {"judged"} and rows["true"].iloc[0] == 0
    both = pd.concat([rows, rows.assign(collection="another")])
    assert "94 ways on 2 collections" in module.draw_predictions(both).alt
    with pytest.raises(UserError, match="git restore data/frontier"):
        module.predictions(tmp_path)


def test_the_notebooks_box_shows_hits_and_what_a_smaller_index_loses(built, monkeypatch):
    index = built(code="float32", engine="exact", budget=1)
    still = module.search_box(index, "cubic spline", k=3).data
    assert still.count("<li>") == 3 and "<mark>spline</mark>" in still and "lost" not in still
    monkeypatch.setattr(module, "is_live", lambda: True)
    box, slider, _ = module.search_box(index, "cubic spline").children
    assert box.value == "cubic spline" and slider.options == (1, 2, 4, 8)


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


def test_made_queries_are_a_collection_to_train_on(tmp_path, model_folder, capsys):
    rest = " ".join(f"word{i}" for i in range(12))
    lines = [{"id": f"d{i}", "text": f"Sentence {i} has five words. {rest}"} for i in range(60)]
    (tmp_path / "in.jsonl").write_text(
        "\n".join(map(json.dumps, [*lines, {"id": "x", "text": "-"}]))
    )
    out = tmp_path / "made"
    given = ["queries", str(tmp_path / "in.jsonl"), "--out", str(out), "--model", str(model_folder)]
    assert main(given) == 0
    splits = [load_collection(out, split) for split in ("train", "dev", "test")]
    asked = [query for split in splits for query in split.queries]
    assert sorted(asked) == sorted(line["id"] for line in lines)  # no query twice
    assert 5 < len(splits[2].queries) < 20 and splits[0].corpus.keys() == splits[2].corpus.keys()
    assert splits[2].qrels == {query: {query: 1} for query in splits[2].queries}
    assert all(split.corpus[q].strip() == rest for split in splits for q in split.queries)
    said = capsys.readouterr().out
    assert said.startswith("61 documents and 60 queries are in")
    assert main(given) == 1 and "exists" in capsys.readouterr().err
    assert main([*given[:-4], "--out", str(tmp_path / "b"), "--queries", "mine.txt"]) == 1
    assert "expected titles" in capsys.readouterr().err


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
    assert rows["collection"].nunique() >= 3
    within = []
    for name, part in rows.groupby("collection"):  # each predicted from the others
        others = rows[rows["collection"] != name]
        loss, error = module.predicted_loss(part["best"], part["best_error"], others)
        within += [*(part["true"] <= loss + 1.96 * error)]
    assert np.mean(within) >= 0.95


# --- search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
def test_found_is_what_exact_search_finds_in_what_is_stored(
    built, documents, bundled_model, code, engine
):
    exact = engine == {"engine": "exact"}
    if not exact and code not in engines.Qdrant.codes:
        with pytest.raises(UserError, match="expected one of .'float32', 'float16', 'int8'.*exact"):
            built(code=code, **engine)
        return
    index = built(budget=2, code=code, **engine)
    asked = ["cubic spline", "sorted rows", "linear equations"]
    names, texts = zip(*documents, strict=True)
    vectors = pool(encode(bundled_model, texts, False), 2, "kmeans", renormalize=True)
    stored = index.engine.read(index.rows)
    for one, other in zip(stored, vectors, strict=True):
        close = torch.isclose(one, CODES[code].decode(other), atol=1e-5 if exact else 5e-3)
        assert close.float().mean() > 0.99  # rounded differently at the edge between two levels
    judge = exact_search(encode(bundled_model, asked, True), stored, names, 5)
    rounding = 2e-3 if code in ("float16", "int8") else 1e-5  # Qdrant rounds queries too
    for hits, ids_, scores in zip(
        index.search(asked, 5), judge.documents, judge.scores, strict=True
    ):
        assert [hit.score for hit in hits] == pytest.approx(scores, abs=rounding)
        assert ids(hits)[0] == ids_[0] and hits[0].text == dict(documents)[ids_[0]]
    again = Index.open(index.folder)
    assert ids(again.search(asked[:1], k=1)[0]) == judge.documents[0][:1]
    assert again.search([], 3) == [] and len(again.search(["x"] * 40, 99)[39]) == 8


def test_vectors_are_compared_at_their_own_length(tmp_path):
    """MaxSim by hand: max(3·1, 1·1) + max(0, 1·2) and 2 + 0."""
    shard = engines.Qdrant(
        tmp_path, {"collection": "x", "dim": 2, "code": "float32", "graph": False}
    )
    given = [torch.tensor([[3.0, 0], [1, 2]]), torch.tensor([[2.0, -1]])]
    shard.write(tmp_path, 0, ["a", "b"], given)
    rows = pd.DataFrame({"live": [True, True], "vectors": [2, 1]})
    ((numbers, scores),) = shard.search([torch.eye(2)], 2, rows)
    assert (numbers.tolist(), scores.tolist()) == ([0, 1], [5.0, 1.0])


def test_an_index_grows_and_forgets(built, documents, engine):
    index = built(given=documents[:4], **engine)
    index.add([*documents[4:], ("d0", "Fit a cubic spline.")])
    assert index.stats()["documents"] == 8
    assert set(ids(index.search(["cubic spline"], k=2)[0])) == {"d0", "d5"}
    assert index.remove(["d0", "unknown", "d5"]) == 2 and index.remove(["d0"]) == 0
    again = Index.open(index.folder)
    assert not {"d0", "d5"} & set(ids(again.search(["cubic spline"], k=10)[0]))
    assert again.stats()["documents"] == 6
    again.add([documents[0]])
    assert again.stats()["documents"] == 7 and "d0" in ids(again.search([documents[0][1]], k=1)[0])
    again.remove([f"d{i}" for i in range(8)])
    assert again.search(["cubic spline"]) == [[]]
    with pytest.raises(UserError, match="no documents left"):
        again.shrink(index.folder.with_name("small"))


def test_an_addition_that_was_killed_leaves_nothing_to_find(built, documents, engine):
    index = built(given=documents[:4], **engine)
    ghost = encode(index.model, [documents[5][1]], False)
    (index.folder / "00002").mkdir()
    index.engine.write(index.folder / "00002", 4, ["ghost"], ghost)  # and no more
    index.close()
    again = Index.open(index.folder)
    assert sorted(ids(again.search(["cubic spline"], k=9)[0])) == ["d0", "d1", "d2", "d3"]
    again.add(documents[4:6])
    assert ids(again.search(["cubic spline"], k=1)[0]) == ["d5"]


def test_another_process_is_told_that_a_shard_is_open(built):
    index = built(engine="qdrant")
    index.close()
    hold = "import sys, filelock as f; l = f.FileLock(sys.argv[1]); l.acquire(); input(print())"
    command = [sys.executable, "-uc", hold, str(index.folder / "qdrant.lock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="Another process holds the index .*index open"):
            index.search(["spline"])
        assert index.stats()["documents"] == 8
        other.communicate(b"\n")
    assert index.search(["spline"])[0]


@pytest.mark.parametrize("engine", ["qdrant", "server"], indirect=True)
def test_a_graph_says_what_it_finds(built, documents, engine):
    index = built(graph=True, **engine)
    assert index.stats()["recall@10 of the graph, against a scan"] == 1  # of eight documents
    index.add([("new", documents[5][1])])
    assert set(ids(Index.open(index.folder).search(["cubic spline"], k=2)[0])) == {"d5", "new"}


def test_plaid_searches_and_says_what_it_cannot_do(built, documents):
    other = built(name="other", code="1 bit")
    index = other.shrink(other.folder.with_name("plaid"), engine="plaid", code="int8")
    assert not [*index.folder.rglob("vectors.npy")] and index.stats()["engine"] == "plaid, int8"
    assert ids(index.search(["cubic spline"], k=1)[0]) == ["d5"]
    assert index.remove(["d5"]) == 1
    assert len(ids(Index.open(index.folder).search(["cubic spline"], k=8)[0])) == 7
    calls = (lambda: index.add(documents), lambda: index.export("x"), lambda: index.shrink("x", 2))
    for call in calls:
        with pytest.raises(UserError, match="keeps no vectors.*shrink … --engine plaid"):
            call()
    with pytest.raises(UserError, match="at least 10 vectors"):
        built(name="few", given=[("a", "one")], engine="plaid")


def test_repeated_and_empty_texts_are_left_out_and_counted(built, documents):
    stats = built(given=[*documents, documents[0], ("empty", " \n"), ("e", "")]).stats()
    assert stats["documents"] == 8
    assert (stats["left out: repeated"], stats["left out: empty"]) == (1, 2)
    with pytest.raises(UserError, match="no documents with a text"):
        built(name="other", given=[("e", "")])


def test_the_numbers_of_an_index_by_hand(built, documents, bundled_model):
    index = built(budget=Budget(max_vectors=5), code="1 bit")
    stats = index.stats()
    tokens = [len(document) for document in encode(bundled_model, [t for _, t in documents], False)]
    vectors = sum(min(n, 5) for n in tokens)
    assert stats["bytes of vectors"] == vectors * 16 + 8 * 8
    assert stats["bytes on this disk, texts included"] >= sum(
        file.stat().st_size for file in index.folder.rglob("*") if file.is_file()
    )
    assert stats["bytes of memory that search needs here"] > vectors * 16 + 8 * 8
    ratio = (sum(tokens) * 512 + 64) / (vectors * 16 + 64)
    assert stats["times smaller than unpooled float32"] == pytest.approx(ratio, abs=0.05)
    long = built(name="long", given=[("a", "spline " * 60), ("b", "one")]).stats()
    pieces = len(bundled_model.tokenizer("spline " * 60, add_special_tokens=False)["input_ids"])
    read = bundled_model.document_length - 3  # [CLS], the prefix, [SEP]
    assert long["documents cut"] == 1
    assert long["word pieces lost, %"] == round(100 * (pieces - read) / (pieces + 1), 1)


# --- what survives --------------------------------------------------------------------------------


def test_a_build_that_is_broken_off_goes_on(built, documents, monkeypatch, engine):
    index = built(given=documents[:2], **engine)  # a good one stands there
    encoded, encode_ = [], module.encode

    def failing(model, texts, **options):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(texts))
        return encode_(model, texts, **options)

    monkeypatch.setattr(module, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        built(**engine)
    assert encoded == [3, 3] and index.stats()["documents"] == 2
    monkeypatch.setattr(
        module, "encode", lambda m, texts, **k: encoded.append(len(texts)) or encode_(m, texts, **k)
    )
    whole = built(**engine)
    assert encoded == [3, 3, 2] and whole.stats()["documents"] == 8
    assert ids(whole.search(["cubic spline"], k=1)[0]) == ["d5"]
    if "url" in engine:  # the former's collection is gone, and nothing else is left there
        assert len(engines.connect("").get_collections().collections) == 1
    assert os.listdir(whole.folder.parent) == ["index"]
    with pytest.raises(UserError, match="'2 bits'; expected one of"):
        built(code="2 bits")


def test_processes_write_what_one_does_and_a_killed_one_loses_nothing(
    built, documents, monkeypatch
):
    given = [(f"{name} {i}", f"{text} {i}") for i in range(4) for name, text in documents]
    one = built(name="one", given=given, engine="exact")

    def killing():
        for number, document in enumerate(given):
            if number == 24:  # of the ninth segment
                multiprocessing.active_children()[0].kill()
            yield document

    with pytest.raises(UserError, match="was ended, .* with fewer --processes"):
        built(given=killing(), engine="exact", processes=2)
    gc.collect()  # the error's traceback holds what ends the other
    for child in multiprocessing.active_children():
        child.join(60)
    assert not multiprocessing.active_children()
    encoded, encode_ = [], module.encode
    monkeypatch.setattr(module, "encode", lambda *a, **k: encoded.append(0) or encode_(*a, **k))
    other = built(given=given, engine="exact")
    assert 0 < len(encoded) < 11
    for file in one.folder.glob("0*/*"):
        assert file.read_bytes() == (other.folder / file.relative_to(one.folder)).read_bytes()


@pytest.mark.parametrize("name", ["exact", "qdrant"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, texts, monkeypatch, name):
    monkeypatch.setattr(module, "SEGMENT", 250)
    model = PooledColBERT(str(tiny_colbert(tmp_path / "model", texts)))
    anonymous = []  # without the page cache, KiB

    def documents():
        for number in range(5000):
            if number % 1000 == 0:
                status = Path("/proc/self/status").read_text()
                anonymous.append(int(re.search(r"RssAnon:\s+(\d+)", status)[1]))
            yield str(number), f"{number} {texts[number % 8]} {' ' * 10_000}"

    Index.build(tmp_path / "index", documents(), model, "", 1, engine=name, progress=False)
    assert anonymous[-1] - anonymous[1] < 12_000  # 3,000 documents: 30 MB of text, 2.5 of vectors


@pytest.mark.parametrize("method", ["span", "kmeans"])
def test_an_index_shrinks_without_the_model(
    built, documents, bundled_model, method, monkeypatch, engine
):
    index = built(budget=2, code="float32", pool_method=method, **engine)
    index.remove(["d3"])
    monkeypatch.setattr(module, "encode", None)
    small = index.shrink(index.folder.with_name("small"), 2, "int8")
    assert {key: small.settings[key] for key in engine} == engine
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


def test_parts_that_two_jobs_build_are_merged_to_what_one_builds(
    tmp_path, documents, model_folder, bundled_model, engine, capsys
):
    lines = [json.dumps({"id": name, "text": text}) for name, text in [*documents, ("", " ")]]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    place = [f"--{key}={value}" for key, value in engine.items()]
    build = ["build", str(tmp_path / "in.jsonl"), "--model", str(model_folder), *place]
    outs = {part: str(tmp_path / part[0]) for part in ("1/2", "2/2", "one", "all")}
    for part in ("1/2", "2/2"):
        assert main([*build, "--part", part, "--out", outs[part]]) == 0
    assert main([*build, "--out", outs["one"]]) == 0
    parts = [outs[part] for part in ("1/2", "2/2")]
    assert main(["merge", *parts, "--out", outs["all"]]) == 0
    one, merged = Index.open(outs["one"], bundled_model), Index.open(outs["all"], bundled_model)
    assert merged.settings["left_out"] == one.settings["left_out"] == {"empty": 1}
    asked = [text for _, text in documents]
    pairs = zip(one.search(asked, 8), merged.search(asked, 8), strict=True)
    assert all(ids(a) == ids(b) for a, b in pairs)
    twice = Index.merge(tmp_path / "twice", [one, merged])
    assert twice.stats()["left out: repeated"] == twice.stats()["documents"] == 8
    other = Index.build(tmp_path / "o", documents, bundled_model, "x", 2, progress=False, **engine)
    with pytest.raises(UserError, match="made differently: budgets"):
        Index.merge(tmp_path / "twice", [one, other])
    capsys.readouterr()
    assert main([*build, "--part", "3/2", "--out", outs["one"]]) == 1
    assert "--part is 3/2; expected such as 1/2" in capsys.readouterr().err


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"code": "2 bits"}, "code is '2 bits'; expected one of"),
        ({"engine": "faiss"}, "expected one of .'qdrant', 'exact', 'plaid'."),
        ({"engine": "exact", "url": "http://x"}, "a url for Qdrant's server alone"),
        ({"engine": "plaid", "code": "float16"}, "the plaid engine can store"),
        ({"url": "http://127.0.0.1:9"}, "at http://127.0.0.1:9 does not answer: .*refused"),
    ],
)
def test_what_does_not_go_together_is_refused(built, options, message):
    with pytest.raises(UserError, match=message):
        built(**options)


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "asks for a key; .*QDRANT_API_KEY"), (400, "refused collection_exists: no turbo8")],
)
def test_a_servers_refusal_is_told_without_the_key(built, monkeypatch, status, message):
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["api-key"])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"status": {"error": "no turbo8"}}')

        log_message = print

    seen = []
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=message) as error, pytest.warns(match="insecure"):
            built(url=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert seen[-1] == "secret" and "secret" not in str(error.value)


def test_a_full_disk_costs_nothing(built, tmp_path, documents, model_folder, monkeypatch, capsys):
    index = built(given=documents[:4])
    usage = shutil._ntuple_diskusage(1, 1, 2**20)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "d9", "text": "Fit."}))
    assert main(["add", str(index.folder), str(tmp_path / "in.jsonl")]) == 1
    assert "The disk is full" in capsys.readouterr().err
    assert Index.open(index.folder).stats()["documents"] == 4 and index.search(["spline"])[0]


def test_another_model_is_refused(built, bundled_model, monkeypatch):
    index = built()
    monkeypatch.setattr(module, "_weights", lambda model: "others")
    for call in (lambda: index.search(["spline"]), lambda: index.add([("a", "one")])):
        with pytest.raises(UserError, match="was made with another model than"):
            index.__dict__.pop("model", None)
            call()


def test_the_shell(tmp_path, documents, model_folder, capsys, texts):
    for name, text in documents:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    out, small = str(tmp_path / "out"), str(tmp_path / "small")
    build = ["build", str(tmp_path / "in"), "--out", out, "--model", str(model_folder)]
    assert main([*build, "--max-vectors", "6", "--bits", "8", "--passages"]) == 0
    said = capsys.readouterr().out
    assert "times smaller than unpooled float32" in said
    assert "qdrant, int8" in said
    assert main(["search", out, "cubic spline", "-k", "2"]) == 0
    assert capsys.readouterr().out.split()[1] == "d5.txt"
    assert main(["remove", out, "d5.txt", "x"]) == 0
    assert "1 of 2 were in the index" in capsys.readouterr().out
    assert main(["add", out, str(tmp_path / "in")]) == 0
    assert main(["shrink", out, small, "--pool-factor", "2", "--bits", "1"]) == 0
    assert "exact, 1 bit" in capsys.readouterr().out
    assert main(["export", small, str(tmp_path / "x.parquet")]) == 0
    assert len(pd.read_parquet(tmp_path / "x.parquet")) == len(texts)
    capsys.readouterr()
    assert main(["stats", str(tmp_path)]) == 1
    assert "holds no index" in capsys.readouterr().err
