"""Collections: bundled, from folders, from the hub's layouts; what is wrong with them."""

import gzip
import json
import logging

import numpy as np
import pytest
from hub.repositories import mteb, nano, table, vocabulary

from l2p_utils import collection as module
from l2p_utils.collection import Collection, carves_dev, load_collection, profile_split, subset
from l2p_utils.files import UserError
from l2p_utils.hub import Snapshot
from l2p_utils.profile import load_profile

DOCUMENTS = [{"_id": f"d{i}", "title": f"Title {i}", "text": f"text {i}"} for i in range(30)]
QUERIES = [{"_id": f"q{i}", "text": f"query {i}"} for i in range(30)]
TRAIN = [(f"q{i}", f"d{i}", 1) for i in range(20)]
TEST = [(f"q{i}", f"d{i}", 1) for i in range(20, 30)]


@pytest.fixture
def write(tmp_path):
    """Writes a folder in BEIR's layout and gives its path."""

    def written(documents=DOCUMENTS, queries=QUERIES, name="mine", **splits):
        folder = tmp_path / name
        (folder / "qrels").mkdir(parents=True, exist_ok=True)
        for file, records in (("corpus", documents), ("queries", queries)):
            lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
            (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        for split, rows in (splits or {"train": TRAIN, "test": TEST}).items():
            lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in rows)]
            (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", "utf-8")
        return folder

    return written


@pytest.mark.parametrize("name", ["mine", "коллекция", "合同 v1"])
def test_a_folder_of_any_name_gives_ids_texts_and_judgments(write, name):
    found = load_collection(write(name=name))
    assert found.corpus["d3"] == "Title 3 text 3"
    assert list(found.queries) == [query for query, _, _ in TEST]
    assert found.qrels["q20"] == {"d20": 1}
    assert load_collection(write(name=name), text_only=True).corpus["d3"] == "text 3"


def test_a_gzipped_folder_is_the_same_collection(write):
    folder = write()
    plain = load_collection(folder).fingerprint
    for name in ("corpus", "queries"):
        file = folder / f"{name}.jsonl"
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert load_collection(folder).fingerprint == plain
    whole = (folder / "corpus.jsonl.gz").read_bytes()
    for broken in (whole[:-4], whole[:40] + b"\xff" * 40 + whole[80:], b"no gzip"):
        (folder / "corpus.jsonl.gz").write_bytes(broken)
        with pytest.raises(UserError, match="not a whole gzip file"):
            load_collection(folder)


def test_dev_is_carved_out_of_train_where_it_is_missing(write):
    train, dev = (load_collection(write(), split) for split in ("train", "dev"))
    assert (len(train.queries), len(dev.queries)) == (18, 2)
    assert not train.queries.keys() & dev.queries.keys()
    assert len(load_collection(write(), "train", carve_dev=False).queries) == 20
    with pytest.raises(UserError, match="has no split 'dev'. It has: test, train"):
        load_collection(write(), "dev", carve_dev=False)
    own = write(train=TRAIN, dev=TEST[:3], test=TEST)
    assert len(load_collection(own, "train").queries) == 20
    assert len(load_collection(own, "dev").queries) == 3


def test_whether_titles_count_moves_no_query_between_train_and_dev(write):
    dev = load_collection(write(), "dev").queries.keys()
    others = [query for query, _, _ in TRAIN if query not in dev]
    empty = {query.replace("q", "d") for query in others[:5]}
    documents = [d | {"text": ""} if d["_id"] in empty else d for d in DOCUMENTS]
    train = load_collection(write(documents), "train", text_only=True)
    assert list(train.queries) == others[5:]


def test_what_has_no_text_is_left_out_and_counted(write, caplog):
    documents = [*DOCUMENTS, {"_id": "empty", "title": "", "text": " "}, {"_id": "null"}]
    queries = [*QUERIES, {"_id": "silent", "text": ""}]
    folder = write(documents, queries, test=[*TEST, ("q20", "empty", 1), ("silent", "d1", 1)])
    found = load_collection(folder)
    assert (found.dropped, len(found.corpus), found.judgments_dropped) == (2, 30, 0)
    assert found.qrels["q20"] == {"d20": 1} and "silent" not in found.queries
    assert "2 of 32 documents have no text" in caplog.text


def test_judgments_of_what_does_not_exist_are_dropped_with_a_notice_or_an_error(write, caplog):
    unknown = [(f"q{i}", f"gone{i}", 1) for i in range(5)]
    found = load_collection(write(train=[*TRAIN, *unknown[:1]]), "train", carve_dev=False)
    assert found.judgments_dropped == 1 and found.qrels["q0"] == {"d0": 1}
    assert "1 of 21 judgments" in caplog.text
    with pytest.raises(UserError) as refused:
        load_collection(write(test=[*TEST, *unknown]))
    message = str(refused.value)
    assert "5 of 15 judgments" in message
    assert "query 'q0', document 'gone0' (" in message and "test.tsv, line 12)" in message
    assert "gone2" in message and "gone3" not in message


def test_a_score_is_a_whole_number_of_64_bits_however_it_is_written(write):
    for written, score in {"1.0": 1, "-1": -1, " 2": 2, str(2**63 - 1): 2**63 - 1}.items():
        found = load_collection(write(test=[*TEST, ("q0", "d0", written)]))
        assert found.qrels["q0"] == {"d0": score}
    for written in ["0.5", "1_0", "yes", str(2**63), "9" * 5000, "1e300", "nan", ""]:
        with pytest.raises(UserError, match=r"test.tsv, line 12: expected a whole number"):
            load_collection(write(test=[*TEST, ("q0", "d0", written)]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"corpus.jsonl, line 31: bad JSON"),
        ("[1]", r"line 31: expected a JSON object"),
        ('{"text": "x"}', r'line 31: expected "_id"'),
        ('{"_id": true, "text": "x"}', r'line 31: expected "_id"'),
        ('{"_id": "d0", "text": "x"}', r"line 31: the id 'd0'"),
        ('{"_id": " ", "text": "x"}', r"line 31: the id ' '"),
        ('{"_id": "x", "text": 3}', r"line 31: expected .* strings"),
        (r'{"_id": "x", "text": "\ud800"}', r"line 31: .*no character"),
    ],
)
def test_a_broken_line_is_named(write, line, message):
    with pytest.raises(UserError, match=message):
        load_collection(write([*DOCUMENTS, line]))


def test_other_broken_files_are_named(write, tmp_path):
    folder = write()
    (folder / "qrels" / "test.tsv").write_text("q0 d0 1\n")
    with pytest.raises(UserError, match="line 1: expected query-id, corpus-id, score with tabs"):
        load_collection(folder)
    with pytest.raises(UserError, match="test.tsv, line 12: .*judged twice, 2 here and 1"):
        load_collection(write(test=[*TEST, ("q20", "d20", 2)]))
    (folder / "queries.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_collection(folder)
    (folder / "queries.jsonl").unlink()
    with pytest.raises(UserError, match="no queries.jsonl"):
        load_collection(folder)
    for missing in (tmp_path / "nowhere", ""):
        with pytest.raises(UserError, match="There is no collection"):
            load_collection(missing)
    with pytest.raises(UserError, match="no document has any text"):
        load_collection(write([{"_id": "a"}], test=TEST))


def test_ids_are_strings_and_a_byte_order_mark_is_no_text(write):
    folder = write([{"_id": 7, "text": "seven"}], [{"_id": 1, "text": "one"}], test=[(1, 7, 1)])
    file = folder / "corpus.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_collection(folder).qrels == {"1": {"7": 1}}


def test_training_on_test_queries_is_told(write, caplog):
    load_collection(write(train=TEST, test=TEST), "train", carve_dev=False)
    assert "10 of 10 training queries are test queries, too" in caplog.text
    caplog.clear()
    load_collection(write(), "train")
    assert caplog.text == ""


def test_a_subset_keeps_every_relevant_document_of_its_queries(write):
    found = load_collection(write(), "train", carve_dev=False)
    part = subset(found, 5, 7)
    assert (len(part.queries), len(part.corpus)) == (5, 7)
    assert all(d in part.corpus for judged in part.qrels.values() for d in judged)
    assert subset(found, None, None).fingerprint == found.fingerprint
    assert subset(found, 5, 2).corpus.keys() == {d for j in part.qrels.values() for d in j}


def test_a_profiles_training_split_is_limited_by_its_mining(write):
    profile = load_profile("smoke")
    mining = profile.mining.model_copy(update={"max_queries": 4, "max_documents": 6})
    profile = profile.model_copy(update={"mining": mining})
    found = profile_split(profile, str(write()))
    assert (len(found.queries), len(found.corpus)) == (4, 6)
    assert carves_dev(load_profile("paper"), "beir:scifact") is False
    assert carves_dev(profile, "beir:scifact") is True


def test_the_fingerprint_follows_the_content_and_not_its_order():
    one = Collection("a", {"1": "x", "2": "y"}, {"q": "z"}, {"q": {"1": 1}})
    other = Collection("b", {"2": "y", "1": "x"}, {"q": "z"}, {"q": {"1": 1}})
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != Collection("a", one.corpus, one.queries, {"q": {"1": 2}}).fingerprint


# --- the hub's layouts, read from folders ---------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """Snapshots of one collection in the layouts of NanoBEIR and of mteb."""
    words, tables = vocabulary(), {}
    for name, layout in (("NanoSciFact", nano), ("scifact", mteb)):
        train = 24 if layout is mteb else 0
        tables[name] = table(np.random.default_rng(0), words, "", 60, train)
        layout(tmp_path / name, tables[name])

    def snapshot(repository, kind, revision):
        name = repository.rpartition("/")[2]
        return Snapshot(repository, "1" * 40, tmp_path / name)

    monkeypatch.setattr(module, "snapshot", snapshot)
    return tables


@pytest.mark.parametrize(
    ("name", "repository", "split", "queries"),
    [
        ("nano:scifact", "NanoSciFact", "test", 10),
        ("beir:scifact@main", "scifact", "test", 10),
        ("beir:scifact", "scifact", "train", 24),
    ],
)
def test_hub_layouts_give_their_tables(hub_folder, caplog, name, repository, split, queries):
    caplog.set_level(logging.WARNING)
    rows, found = hub_folder[repository], load_collection(name, split)
    assert found.name == name.partition("@")[0]
    assert (len(found.corpus), len(found.queries), found.dropped) == (60, queries, 1)
    expected = {}
    for query, document, score in rows.splits[split]:
        if query in found.queries and document in found.corpus:
            expected.setdefault(query, {})[document] = score
    assert found.qrels == expected
    first = rows.corpus[0]
    title = "" if name.startswith("nano") else f"{first['title']} "
    assert found.corpus[first["_id"]] == f"{title}{first['text']}"
    assert found.judgments_dropped == (split == "test")


def test_splits_of_the_hub_and_a_repository_of_another_layout(hub_folder, tmp_path):
    with pytest.raises(UserError, match="has no split 'train'. It has: test"):
        load_collection("nano:scifact", "train")
    assert len(load_collection("beir:scifact", "dev", carve_dev=True).queries) == 2
    with pytest.raises(UserError, match="has no split 'dev'"):
        load_collection("beir:scifact", "dev")
    readme = tmp_path / "scifact" / "README.md"
    readme.write_text(readme.read_text().replace("split: train", "split: validation"))
    assert len(load_collection("beir:scifact", "dev").queries) == 24  # the hub's name of dev
    readme.write_text("---\nconfigs: []\n---\n")
    with pytest.raises(UserError, match="beir:scifact: mteb/scifact is not laid out as expected"):
        load_collection("beir:scifact")
