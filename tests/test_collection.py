"""Collections from folders in BEIR's layout: what is read, what is refused and with which words."""

import json
import logging
from pathlib import Path

import pytest

from l2p_utils.collection import Collection, load_collection
from l2p_utils.files import UserError

REAL = Path(__file__).parents[2] / "shared" / "collections"

CORPUS = [
    {"_id": "d1", "title": "Wings", "text": "lift of a wing"},
    {"_id": "d2", "title": "Only a title", "text": ""},
    {"_id": "d3", "text": "no title here"},
]
QUERIES = [{"_id": "q1", "text": "what lifts a wing"}, {"_id": "q2", "text": "asked by nobody"}]
QRELS = [("q1", "d1", 2), ("q1", "d3", 0)]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def write_qrels(folder, rows, split="test", header="query-id\tcorpus-id\tscore\n"):
    (folder / "qrels").mkdir(exist_ok=True)
    lines = ("\t".join(map(str, row)) + "\n" for row in rows)
    (folder / "qrels" / f"{split}.tsv").write_text(header + "".join(lines), "utf-8")


@pytest.fixture
def folder(tmp_path):
    """A whole collection of three documents, two queries and two judgments."""
    folder = tmp_path / "Tiny Wings"
    folder.mkdir()
    write_lines(folder / "corpus.jsonl", CORPUS)
    write_lines(folder / "queries.jsonl", QUERIES)
    write_qrels(folder, QRELS)
    return folder


def refusal(*arguments, **settings):
    with pytest.raises(UserError) as caught:
        load_collection(*arguments, **settings)
    return str(caught.value)


# --- what is read ---------------------------------------------------------------------------------


def test_title_and_text_are_joined_and_queries_are_those_that_the_split_judges(folder):
    loaded = load_collection(folder)
    assert loaded == Collection(
        name=str(folder),
        corpus={"d1": "Wings lift of a wing", "d2": "Only a title", "d3": "no title here"},
        queries={"q1": "what lifts a wing"},
        qrels={"q1": {"d1": 2, "d3": 0}},  # 0: judged irrelevant, kept as given
        split="test",
    )


def test_text_only_leaves_titles_out_and_drops_documents_without_text(folder, caplog):
    write_qrels(folder, [*QRELS, ("q1", "d2", 1), ("q2", "d2", 1)])
    with caplog.at_level(logging.WARNING):
        loaded = load_collection(folder, text_only=True)
    assert loaded.corpus == {"d1": "lift of a wing", "d3": "no title here"}
    assert loaded.qrels == {"q1": {"d1": 2, "d3": 0}}  # the dropped document's judgments are gone
    assert list(loaded.queries) == ["q1"]
    assert loaded.dropped == 1
    assert "1 of 3 documents have no text" in caplog.text


def test_ids_are_strings_whatever_the_json_says(folder):
    write_lines(folder / "corpus.jsonl", [{"_id": 7, "text": "seven"}])
    write_lines(folder / "queries.jsonl", [{"_id": 1, "text": "which number"}])
    write_qrels(folder, [(1, 7, 1)])
    loaded = load_collection(folder)
    assert (loaded.corpus, loaded.qrels) == ({"7": "seven"}, {"1": {"7": 1}})


def test_negative_scores_empty_lines_crlf_and_a_byte_order_mark_are_read(folder):
    content = "\ufeffquery-id\tcorpus-id\tscore\r\n\r\nq1\td1\t-1\r\nq1\td1\t-1\r\n"
    (folder / "qrels" / "test.tsv").write_bytes(content.encode())
    assert load_collection(folder).qrels == {"q1": {"d1": -1}}


def test_a_unicode_line_separator_inside_a_text_does_not_end_the_line(folder):
    record = {"_id": "d1", "text": "one\u2028two"}
    line = json.dumps(record, ensure_ascii=False)
    (folder / "corpus.jsonl").write_text(line + "\n", "utf-8")
    write_qrels(folder, [("q1", "d1", 1)])
    assert load_collection(folder).corpus == {"d1": "one\u2028two"}


def test_a_path_and_its_string_load_the_same(folder):
    assert load_collection(folder) == load_collection(str(folder))


# --- splits ---------------------------------------------------------------------------------------


def with_train_split(folder, count):
    queries = [{"_id": f"t{i}", "text": f"question number {i}"} for i in range(count)]
    write_lines(folder / "queries.jsonl", QUERIES + queries)
    write_qrels(folder, [(query["_id"], "d1", 1) for query in queries], "train")
    return {query["_id"] for query in queries}


@pytest.mark.parametrize(("train", "dev"), [(2, 1), (30, 3), (1_005, 100), (2_000, 100)])
def test_a_dev_split_is_a_tenth_of_train_at_most_100_and_absent_from_train(folder, train, dev):
    everything = with_train_split(folder, train)
    kept = set(load_collection(folder, "train").queries)
    held_out = set(load_collection(folder, "dev").queries)
    assert len(held_out) == dev
    assert not kept & held_out
    assert kept | held_out == everything


def test_the_dev_split_does_not_depend_on_the_order_of_the_file(folder):
    names = with_train_split(folder, 50)
    before = set(load_collection(folder, "dev").queries)
    write_qrels(folder, [(name, "d1", 1) for name in sorted(names, reverse=True)], "train")
    assert set(load_collection(folder, "dev").queries) == before


def test_a_dev_file_is_used_where_there_is_one_and_train_is_then_whole(folder):
    everything = with_train_split(folder, 30)
    write_qrels(folder, [("q2", "d3", 1)], "dev")
    assert list(load_collection(folder, "dev").queries) == ["q2"]
    assert set(load_collection(folder, "train").queries) == everything


def test_without_carving_train_is_whole_and_dev_an_error(folder):
    everything = with_train_split(folder, 30)
    assert set(load_collection(folder, "train", carve_dev=False).queries) == everything
    message = refusal(folder, "dev", carve_dev=False)
    assert "no split 'dev'" in message
    assert "test.tsv, train.tsv" in message


def test_a_missing_split_is_named_with_those_that_exist(folder):
    write_qrels(folder, QRELS, "validation")
    for split in ("train", "dev"):
        message = refusal(folder, split)
        assert f"no split {split!r}" in message
        assert "test.tsv, validation.tsv" in message


def test_one_training_query_is_not_taken_away_for_dev(folder):
    with_train_split(folder, 1)
    assert list(load_collection(folder, "train").queries) == ["t0"]
    assert "'dev' has no judgments (read from qrels/train.tsv)" in refusal(folder, "dev")


# --- fingerprint and slug -------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_content_not_of_the_order():
    one = Collection("x", {"a": "1", "b": "2"}, {"q": "?"}, {"q": {"a": 1, "b": 0}})
    other = Collection("y", {"b": "2", "a": "1"}, {"q": "?"}, {"q": {"b": 0, "a": 1}})
    assert one.fingerprint == other.fingerprint
    assert len(one.fingerprint) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"corpus": {"a": "1", "b": "3"}},
        {"queries": {"q": "!"}},
        {"qrels": {"q": {"a": 1}}},
        {"split": "dev"},
    ],
)
def test_any_change_of_content_changes_the_fingerprint(change):
    content = {"corpus": {"a": "1", "b": "2"}, "queries": {"q": "?"}, "qrels": {"q": {"a": 2}}}
    before = Collection("x", **content).fingerprint
    assert Collection("x", **{**content, **change}).fingerprint != before


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["docs", "hub:fiqa", "does/not/exist", "", "  "])
def test_a_name_that_is_neither_bundled_nor_a_folder_is_refused_with_what_there_is(name):
    message = refusal(name)
    assert repr(name) in message
    assert "docs:scipy" in message
    assert "nano:scifact" in message
    assert "corpus.jsonl" in message


def test_a_file_in_place_of_a_folder_is_refused(folder):
    assert "is a file" in refusal(folder / "corpus.jsonl")


def test_an_unknown_bundled_collection_is_refused_with_those_that_are_known():
    message = refusal("docs:django")
    assert "docs:django" in message
    assert "docs:scipy, docs:numpy, docs:sklearn, docs:pandas, docs:torch" in message


@pytest.mark.parametrize("missing", ["corpus.jsonl", "queries.jsonl"])
def test_a_folder_that_is_no_collection_is_told_what_it_lacks(folder, missing):
    (folder / missing).unlink()
    message = refusal(folder)
    assert f"has no {missing}." in message
    assert str(folder) in message


def test_a_folder_without_qrels_is_told_so(folder):
    (folder / "qrels" / "test.tsv").unlink()
    assert "In qrels/ there is: nothing" in refusal(folder)
    (folder / "qrels").rmdir()
    assert "has no folder qrels" in refusal(folder)


GOOD = '{"_id": "d1", "text": "lift"}'


@pytest.mark.parametrize(
    ("file", "lines", "line", "words"),
    [
        ("corpus.jsonl", [GOOD, '{"_id": "d2", "text"'], 2, "bad JSON"),
        ("corpus.jsonl", [GOOD, "", "[1, 2]"], 3, "expected a JSON object"),
        ("corpus.jsonl", ['{"id": "d1", "text": "lift"}'], 1, '"_id"'),
        ("corpus.jsonl", ['{"_id": null, "text": "lift"}'], 1, "found None"),
        ("corpus.jsonl", ['{"_id": 1.5, "text": "lift"}'], 1, "found 1.5"),
        ("corpus.jsonl", ['{"_id": "", "text": "lift"}'], 1, "found ''"),
        ("corpus.jsonl", ['{"_id": "d1", "text": ["lift"]}'], 1, '"text" to be a string'),
        ("corpus.jsonl", ['{"_id": "d1", "title": 3, "text": "x"}'], 1, '"title" to be a string'),
        ("corpus.jsonl", [GOOD, '{"_id": "d3", "text": "x"}', GOOD], 3, "'d1' is there already"),
        ("queries.jsonl", ['{"_id": "q1", "text": " "}'], 1, "'q1' has no text"),
        ("queries.jsonl", ['{"_id": "q1"}'], 1, "'q1' has no text"),
        ("qrels/test.tsv", ["q1\td1\t1", "q9\td1\t1"], 2, "query 'q9', which queries.jsonl"),
        ("qrels/test.tsv", ["q1\td1\t1", "q1\td9\t1"], 2, "document 'd9', which corpus.jsonl"),
        ("qrels/test.tsv", ["q1\td1\t1.5"], 1, "found '1.5'"),
        ("qrels/test.tsv", ["q1\td1\t1_0"], 1, "found '1_0'"),
        ("qrels/test.tsv", ["query-id\tcorpus-id\tscore", "q1\td1\t"], 2, "found ''"),
        ("qrels/test.tsv", ["query-id corpus-id score"], 1, "tabs between"),
        ("qrels/test.tsv", ["q1\t0\td1\t1"], 1, "4 fields"),
        ("qrels/test.tsv", ["q1\td1\t1", "q1\td1\t2"], 2, "score 2 here and 1 above"),
    ],
)
def test_an_error_names_the_file_and_the_line(folder, file, lines, line, words):
    (folder / file).write_text("\n".join(lines) + "\n", "utf-8")
    message = refusal(folder)
    assert message.startswith(f"{folder / file}, line {line}: ")
    assert words in message


def test_a_duplicate_id_is_told_with_both_lines(folder):
    write_lines(folder / "queries.jsonl", [*QUERIES, QUERIES[0]])
    message = refusal(folder)
    assert "line 3" in message
    assert "in line 1" in message


def test_a_number_and_a_string_that_read_the_same_are_one_id(folder):
    write_lines(folder / "corpus.jsonl", [{"_id": 1, "text": "a"}, {"_id": "1", "text": "b"}])
    assert "'1' is there already, in line 1" in refusal(folder)


@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_a_file_that_is_not_utf8_is_named(folder, file):
    (folder / file).write_bytes("query-id caf\xe9\n".encode("latin-1"))
    message = refusal(folder)
    assert message.startswith(f"{folder / file} is not UTF-8")


def test_an_empty_corpus_is_refused(folder):
    (folder / "corpus.jsonl").write_text("\n", "utf-8")
    assert "it is empty" in refusal(folder)
    write_lines(folder / "corpus.jsonl", [CORPUS[1]])
    assert "none of its 1 documents has any text" in refusal(folder, text_only=True)


def test_judgments_that_say_nothing_are_refused(folder):
    write_qrels(folder, [])
    assert "no judgments" in refusal(folder)
    write_qrels(folder, [("q1", "d2", 1)])
    assert "no document that the split 'test' judges has any text" in refusal(
        folder, text_only=True
    )


# --- real collections -----------------------------------------------------------------------------


def real(name):
    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL / name} is not there")
    return REAL / name


def test_cranfield_loads_whole():
    test = load_collection(real("cranfield"))
    assert (len(test.corpus), len(test.queries), test.dropped) == (1_398, 225, 0)
    assert sum(map(len, test.qrels.values())) == 1_611
    train = load_collection(REAL / "cranfield", "train")
    dev = load_collection(REAL / "cranfield", "dev")
    assert (len(train.queries), len(dev.queries)) == (1_253, 100)
    assert test.corpus == train.corpus == dev.corpus


def test_text_only_drops_the_1617_documents_of_cacm_that_are_titles():
    assert len(load_collection(real("cacm")).corpus) == 3_204
    train = load_collection(REAL / "cacm", "train", text_only=True)
    assert (len(train.corpus), train.dropped) == (1_587, 1_617)
    assert len(train.queries) == 1_307  # 1,407 less 100 for dev


def test_text_only_takes_the_title_that_is_the_query_out_of_its_document():
    train = load_collection(real("cranfield"), "train", text_only=True)
    with_title = load_collection(REAL / "cranfield", "train")
    relevant = {query: next(iter(judged)) for query, judged in train.qrels.items()}
    assert all(
        with_title.corpus[relevant[query]].startswith(text)
        for query, text in with_title.queries.items()
    )
    literal = sum(
        train.corpus[relevant[query]].startswith(text) for query, text in train.queries.items()
    )
    assert literal == 0


HALF = "wing \ud800 span"  # JSON's escape \ud800 without its other half: no character, no UTF-8


@pytest.mark.parametrize(
    ("file", "key"),
    [("corpus.jsonl", "text"), ("corpus.jsonl", "title"), ("queries.jsonl", "text")],
)
def test_half_a_surrogate_pair_is_refused_with_its_line(folder, file, key):
    records = {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES}[file]
    write_lines(folder / file, [records[0], records[1] | {key: HALF}, *records[2:]])
    message = refusal(folder)
    assert f'{file}, line 2: "{key}" has \\ud800, half of a surrogate pair' in message
    message.encode("utf-8")


def test_half_a_surrogate_pair_in_an_id_is_refused_with_its_line(folder):
    write_lines(folder / "corpus.jsonl", [{"_id": "d\udfff", "text": "a wing"}])
    assert 'corpus.jsonl, line 1: "_id" has \\udfff' in refusal(folder)


def test_a_whole_surrogate_pair_is_one_character(folder):
    write_lines(folder / "corpus.jsonl", [CORPUS[0] | {"text": "\U0001f600"}, *CORPUS[1:]])
    assert "\\ud83d\\ude00" in (folder / "corpus.jsonl").read_text()
    assert load_collection(folder).corpus["d1"] == "Wings \U0001f600"
