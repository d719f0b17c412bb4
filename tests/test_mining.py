"""Mining: each of the candidate rules by a tiny case made by hand, then the whole stage."""

import json

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from l2p_utils import mining
from l2p_utils import profile as profiles
from l2p_utils.candidates import positives_of, propose, query_rng
from l2p_utils.collection import Collection, load_collection, training_split
from l2p_utils.files import UserError
from l2p_utils.mining import (
    HARD,
    MEDIUM,
    POSITIVE,
    RANDOM,
    Row,
    load_mined,
    mine,
    mine_rows,
    mined_folder,
    mined_provenance,
    negative_limit,
    select_row,
)
from l2p_utils.profile import PROFILES, MiningSettings, Profile
from l2p_utils.teacher import BundledTeacher


def settings_of(hard=1, medium=0, random=0, **changes):
    return MiningSettings(hard=hard, medium=medium, random=random, **changes)


def select(scores, positives, hard=(), random=(), seed=0, /, **settings):
    rng = np.random.default_rng(seed)
    return select_row("q", positives, hard, random, scores, settings_of(**settings), rng)


def labelled(row):
    return dict(zip(row.document_ids, row.labels, strict=True))


# --- positives and candidates ---------------------------------------------------------------------


def test_positives_are_judged_above_0_and_exist():
    judged = {"b": 1, "a": 2, "zero": 0, "negative": -1, "gone": 1}
    corpus = dict.fromkeys(["a", "b", "zero", "negative"], "text")
    assert positives_of(Collection("c", corpus, {"q": "?"}, {"q": judged}), "q") == ["a", "b"]


def candidates(similarities, positives, seed=0, hard_candidates=3, random_candidates=2):
    settings = MiningSettings(
        hard_candidates=hard_candidates,
        random_candidates=random_candidates,
        hard=1,
        medium=0,
        random=0,
    )
    documents, values = list(similarities), np.array(list(similarities.values()))
    return propose(values, documents, positives, settings, np.random.default_rng(seed))


SIMILARITIES = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6, "e": 0.5, "f": 0.4, "g": 0.3}


def test_hard_candidates_are_the_miners_top_without_the_positives():
    hard, _ = candidates(SIMILARITIES, ["b", "g"])
    assert hard == ["a", "c"]  # the top 3 less a positive; no other moves up


def test_equally_similar_documents_are_proposed_by_id_descending():
    hard, _ = candidates(dict.fromkeys("bdac", 0.5), [])
    assert hard == ["d", "c", "b"]


def test_random_candidates_are_neither_positive_nor_hard_and_each_comes_once():
    drawn = set()
    for seed in range(30):
        hard, random = candidates(SIMILARITIES, ["b", "g"], seed)
        assert len(random) == len(set(random)) == 2
        drawn |= set(random)
    assert drawn == {"d", "e", "f"}  # each of them comes up, and nothing else


def test_a_small_corpus_gives_as_many_random_candidates_as_there_are():
    assert candidates({"a": 1.0, "b": 0.5, "c": 0.2, "d": 0.1}, ["a"])[1] == ["d"]
    assert candidates({"a": 1.0, "b": 0.5}, ["a"]) == (["b"], [])


# --- threshold ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("score", "kept"), [(0.9501, False), (0.95, True), (0.9499, True)])
def test_a_negative_above_95_percent_of_the_positive_is_dropped(score, kept):
    row = select({"p": 1.0, "n": score}, ["p"], ["n"])
    assert (row == "too few candidates") != kept
    row = select({"p": 1.0, "n": score}, ["p"], [], ["n"])
    assert (row == "too few candidates") != kept


def test_the_anchor_is_the_top_positive_or_the_median_one():
    scores = [1.0, 0.4, 0.2]
    assert negative_limit(scores, settings_of()) == pytest.approx(0.95)
    assert negative_limit(scores, settings_of(anchor="median_positive")) == pytest.approx(0.38)
    assert negative_limit([1.0, 0.5], settings_of(anchor="median_positive")) == pytest.approx(
        0.7125
    )
    assert negative_limit(scores, settings_of(threshold=0.5)) == pytest.approx(0.5)


def test_the_median_anchor_drops_negatives_that_the_top_one_keeps():
    scores = {"p1": 1.0, "p2": 0.4, "p3": 0.2, "n": 0.6}
    positives = ["p1", "p2", "p3"]
    assert labelled(select(scores, positives, ["n"])) == {"p1": POSITIVE, "n": HARD}
    median = select(scores, positives, ["n"], anchor="median_positive")
    assert median == "too few candidates"


def test_below_zero_the_limit_lies_below_the_anchor_too():
    assert negative_limit([-2.0], settings_of()) == pytest.approx(-2.1)
    assert negative_limit([0.0], settings_of()) == 0.0
    assert isinstance(select({"p": -2.0, "n": -2.11}, ["p"], ["n"]), Row)
    for score in (-1.9, -2.0, -2.05):  # 0.95 × −2 is −1.9, above the positive
        assert select({"p": -2.0, "n": score}, ["p"], ["n"]) == "too few candidates"


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=4), st.floats(0.05, 1))
def test_no_negative_within_the_limit_beats_the_best_positive(scores, threshold):
    for anchor in ("top_positive", "median_positive"):
        limit = negative_limit(scores, settings_of(threshold=threshold, anchor=anchor))
        assert limit <= max(scores)


# --- choice ---------------------------------------------------------------------------------------


def test_the_best_scored_positive_is_the_only_one_kept():
    row = select({"p1": 0.7, "p2": 0.9, "n": 0.1}, ["p1", "p2"], ["n"])
    assert labelled(row) == {"p2": POSITIVE, "n": HARD}


def test_the_hard_negatives_are_the_teachers_best_ones():
    scores = {"p": 1.0, "h1": 0.2, "h2": 0.8, "h3": 0.5, "too good": 0.97}
    row = select(scores, ["p"], ["h1", "too good", "h2", "h3"], hard=2)
    assert labelled(row) == {"p": POSITIVE, "h2": HARD, "h3": HARD}


def test_medium_negatives_are_drawn_from_the_remaining_hard_ones():
    scores = {"p": 1.0} | {f"h{i}": 0.9 - i / 10 for i in range(6)}
    hard, drawn = [f"h{i}" for i in range(6)], set()
    for seed in range(40):
        found = labelled(select(scores, ["p"], hard, [], seed, hard=2, medium=2))
        assert [d for d, label in found.items() if label == HARD] == ["h0", "h1"]
        drawn |= {frozenset(d for d, label in found.items() if label == MEDIUM)}
    assert drawn == {frozenset((a, b)) for a in hard[2:] for b in hard[2:] if a < b}


def test_random_negatives_are_drawn_from_the_random_candidates_within_the_limit():
    scores = {"p": 1.0, "h": 0.5, "r1": 0.1, "r2": 0.2, "r3": 0.99}
    drawn = set()
    for seed in range(20):
        found = labelled(select(scores, ["p"], ["h"], ["r1", "r2", "r3"], seed, random=1))
        drawn |= {d for d, label in found.items() if label == RANDOM}
    assert drawn == {"r1", "r2"}


def test_a_short_random_group_is_filled_with_the_best_remaining_hard_ones():
    scores = {"p": 1.0, "h1": 0.9, "h2": 0.8, "h3": 0.7, "h4": 0.6, "r": 0.1}
    row = select(scores, ["p"], ["h4", "h2", "h3", "h1"], ["r"], hard=1, random=3)
    assert labelled(row) == {"p": POSITIVE, "h1": HARD, "h2": MEDIUM, "h3": MEDIUM, "r": RANDOM}


def test_short_hard_and_medium_groups_are_filled_with_random_ones():
    scores = {"p": 1.0, "h": 0.5} | {f"r{i}": 0.1 * i for i in range(5)}
    row = select(scores, ["p"], ["h"], [f"r{i}" for i in range(5)], hard=2, medium=2, random=1)
    assert sorted(row.labels) == sorted([POSITIVE, HARD, *[RANDOM] * 4])


def test_remaining_hard_ones_fill_up_before_random_ones():
    scores = {"p": 1.0, "h1": 0.9, "h2": 0.8, "r1": 0.1, "r2": 0.2, "r3": 0.3}
    for seed in range(10):
        row = select(scores, ["p"], ["h1", "h2"], ["r1", "r2", "r3"], seed, hard=1, medium=3)
        found = labelled(row)
        assert found["h1"] == HARD and found["h2"] == MEDIUM
        assert list(found.values()).count(RANDOM) == 2


def test_a_query_without_enough_candidates_gives_no_row():
    scores = {"p": 1.0, "h": 0.5, "r": 0.1}
    assert select(scores, ["p"], ["h"], ["r"], hard=1, medium=1, random=1) == "too few candidates"
    assert isinstance(select(scores, ["p"], ["h"], ["r"], hard=1, random=1), Row)


def test_a_query_without_a_positive_gives_no_row():
    assert select({"h": 0.5}, [], ["h"]) == "no positive"


def test_documents_come_by_descending_score_the_positive_first_among_equals():
    scores = {"a": 0.0, "z": 0.0, "m": 0.0, "low": -1.0}
    row = select(scores, ["m"], ["a", "z", "low"], hard=3)
    assert row.document_ids == ["m", "z", "a", "low"]  # then by id, descending
    assert row.scores == [0.0, 0.0, 0.0, -1.0]
    assert row.labels == [POSITIVE, HARD, HARD, HARD]
    assert select({"p1": 1.0, "p2": 1.0, "n": 0.0}, ["p1", "p2"], ["n"]).document_ids[0] == "p2"


def test_equal_hard_negatives_are_taken_by_id_descending():
    row = select({"p": 1.0, "a": 0.5, "b": 0.5, "c": 0.5}, ["p"], ["b", "a", "c"], hard=2)
    assert row.document_ids == ["p", "c", "b"]


# --- all queries ----------------------------------------------------------------------------------


def made_up(documents=30, queries=6, seed=0):
    """A training collection and a teacher whose scores are random; query i's positive is d<i>."""
    rng = np.random.default_rng(seed)
    corpus = {f"d{i:02d}": f"text {i}" for i in range(documents)}
    texts = {f"q{i}": f"question {i}" for i in range(queries)}
    qrels = {f"q{i}": {f"d{i:02d}": 1} for i in range(queries)}
    scores = rng.random((2, queries, documents))
    return Collection("c", corpus, texts, qrels, "train"), BundledTeacher(
        list(texts), list(corpus), *scores
    )


def permuted(collection, teacher, seed=1):
    """The same collection and scores in another order."""
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(len(teacher.query_ids)), rng.permutation(len(collection.corpus))
    queries = [teacher.query_ids[i] for i in rows]
    documents = [teacher.document_ids[i] for i in columns]
    return Collection(
        "c",
        {d: collection.corpus[d] for d in documents},
        {q: collection.queries[q] for q in queries},
        {q: collection.qrels[q] for q in reversed(queries)},
        "train",
    ), BundledTeacher(
        queries,
        documents,
        teacher.dense[np.ix_(rows, columns)],
        teacher.late[np.ix_(rows, columns)],
    )


SETTINGS = MiningSettings(hard_candidates=8, random_candidates=6, hard=2, medium=2, random=2)


def rows_by_query(collection, teacher, settings=SETTINGS, seed=42):
    rows, dropped = mine_rows(collection, teacher, settings, seed, progress=False)
    assert len(rows) + dropped.total() == len(collection.queries)
    return {row.query_id: row for row in rows}


def test_every_query_gets_one_row_of_n_ways_with_its_positive_on_top():
    rows = rows_by_query(*made_up())
    assert sorted(rows) == [f"q{i}" for i in range(6)]
    for row in rows.values():
        assert len(set(row.document_ids)) == len(row.document_ids) == SETTINGS.n_ways == 7
        assert row.scores == sorted(row.scores, reverse=True)
        assert (row.document_ids[0], row.labels[0]) == (f"d0{row.query_id[1:]}", POSITIVE)
        assert row.labels.count(POSITIVE) == 1


def test_rows_do_not_depend_on_the_order_of_queries_and_documents():
    collection, teacher = made_up()
    assert rows_by_query(collection, teacher) == rows_by_query(*permuted(collection, teacher))


def test_a_querys_row_does_not_depend_on_the_other_queries():
    collection, teacher = made_up()
    alone = Collection("c", collection.corpus, {"q3": "question 3"}, {"q3": {"d03": 1}}, "train")
    of_q3 = BundledTeacher(["q3"], teacher.document_ids, teacher.dense[3:4], teacher.late[3:4])
    assert rows_by_query(alone, of_q3)["q3"] == rows_by_query(collection, teacher)["q3"]


def test_another_seed_draws_other_documents():
    assert rows_by_query(*made_up(), seed=1) != rows_by_query(*made_up(), seed=2)
    same, other = (query_rng(1, query).random(3).tolist() for query in ("q1", "q2"))
    assert query_rng(1, "q1").random(3).tolist() == same != other


def test_dropped_queries_are_counted_by_reason():
    collection, teacher = made_up()
    qrels = collection.qrels | {"q1": {"d01": 0}, "q2": {"d02": -1}}
    judged = Collection("c", collection.corpus, collection.queries, qrels, "train")
    rows, dropped = mine_rows(judged, teacher, SETTINGS, 42, progress=False)
    assert [row.query_id for row in rows] == ["q0", "q3", "q4", "q5"]
    assert dropped == {"no positive": 2}
    strict = SETTINGS.model_copy(update={"threshold": 0.05})
    rows, dropped = mine_rows(judged, teacher, strict, 42, progress=False)
    assert (rows, dropped) == ([], {"no positive": 2, "too few candidates": 4})


def test_the_sigmoid_scale_keeps_the_order_and_is_what_it_says():
    loose = SETTINGS.model_copy(update={"threshold": 10.0})  # nothing is dropped in either scale
    raw = rows_by_query(*made_up(), loose)
    squashed = rows_by_query(*made_up(), loose.model_copy(update={"teacher_scale": "sigmoid"}))
    for query, row in raw.items():
        assert squashed[query].document_ids == row.document_ids
        expected = [1 / (1 + np.exp(-score)) for score in row.scores]
        assert squashed[query].scores == pytest.approx(expected)


# --- the stage ------------------------------------------------------------------------------------


def write_beir(folder, documents=24, queries=6, titles=False):
    """A folder in BEIR's layout whose document i is about "topic<i>"; query i asks for it."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [
        {"_id": f"d{i}", "title": f"Title{i}" if titles else "", "text": f"About topic{i}."}
        for i in range(documents)
    ]
    asked = [{"_id": f"q{i}", "text": f"what is topic{i}"} for i in range(queries)]
    judged = [f"q{i}\td{i}\t1" for i in range(queries)]
    for name, records in (("corpus", corpus), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    for split in ("train", "dev"):
        lines = ["query-id\tcorpus-id\tscore", *judged]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def tiny_profile(adaptation, **changes):
    content = yaml.safe_load((PROFILES / "smoke.yaml").read_text("utf-8"))
    content["mining"] = {
        "hard_candidates": 8, "random_candidates": 6, "hard": 1, "medium": 1, "random": 1, **changes
    }  # fmt: skip
    content["model"] |= {"query_length": 12, "document_length": 16, "projection_texts": 10}
    content["adaptation"]["collection"] = str(adaptation)
    return Profile.model_validate({"name": "tiny", **content, "runs": [], "plaid": []})


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one collection, `corpus`."""
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    write_beir(tmp_path / "corpus")
    return tmp_path


@pytest.fixture
def scored(monkeypatch):
    """A teacher of made-up scores in the real one's place; lists the collections it scored."""
    calls = []

    def teacher(collection, model, precision, progress):
        calls.append(collection)
        rng = np.random.default_rng(0)
        scores = rng.random((2, len(collection.queries), len(collection.corpus)))
        return BundledTeacher(list(collection.queries), list(collection.corpus), *scores)

    monkeypatch.setattr(mining, "untrained_model", lambda profile: None)
    monkeypatch.setattr(mining, "bundled_teacher", teacher)
    return calls


def test_mined_rows_have_pylates_distillation_layout_and_labels(project, scored):
    rows = mine(tiny_profile(project / "corpus"), str(project / "corpus"), progress=False)
    assert rows.column_names == ["query_id", "document_ids", "scores", "labels"]
    kinds = {name: str(getattr(f, "feature", f).dtype) for name, f in rows.features.items()}
    assert kinds == {
        "query_id": "string", "document_ids": "string", "scores": "float64", "labels": "string"
    }  # fmt: skip
    assert sorted(rows["query_id"]) == [f"q{i}" for i in range(6)]
    assert {len(row[name]) for row in rows for name in rows.column_names[1:]} == {4}


def test_pylate_reads_mined_rows(project, scored):
    from datasets import Dataset
    from pylate.utils import KDProcessing

    rows = mine(tiny_profile(project / "corpus"), str(project / "corpus"), progress=False)
    collection = load_collection(project / "corpus", "train")
    queries = Dataset.from_list([{"query_id": q, "text": t} for q, t in collection.queries.items()])
    documents = Dataset.from_list(
        [{"document_id": d, "text": t} for d, t in collection.corpus.items()]
    )
    rows.set_transform(KDProcessing(queries=queries, documents=documents).transform)
    first = rows[0]
    assert first["query"].startswith("what is topic")
    assert (
        first["documents"][0] == "About topic" + first["query"].removeprefix("what is topic") + "."
    )


def test_mining_again_reads_what_is_there(project, scored):
    profile, name = tiny_profile(project / "corpus"), str(project / "corpus")
    first = mine(profile, name, progress=False).to_list()
    assert mine(profile, name, progress=False).to_list() == first
    assert len(scored) == 1
    mine(tiny_profile(project / "corpus", threshold=0.9), name, progress=False)
    assert len(scored) == 2
    with (project / "corpus" / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": "new", "text": "About something new."}\n')
    mine(tiny_profile(project / "corpus", threshold=0.9), name, progress=False)
    assert len(scored) == 3


def test_provenance_tells_models_sizes_seed_and_what_was_dropped(project, scored):
    with (project / "corpus" / "qrels" / "train.tsv").open("a") as qrels:
        qrels.write("q5\td5\t1\n")
    name = str(project / "corpus")
    judged = project / "corpus" / "qrels" / "train.tsv"
    judged.write_text(judged.read_text().replace("q2\td2\t1", "q2\td2\t0"))
    profile = tiny_profile(project / "corpus")
    mine(profile, name, progress=False)
    made = mined_provenance(mined_folder(profile, name))
    assert (made["rows"], made["queries"], made["documents"]) == (5, 6, 24)
    assert made["queries_dropped"] == {"no positive": 1}
    assert made["labels"][POSITIVE] == 5 and sum(made["labels"].values()) == 20
    assert made["settings"]["seed"] == 42 and made["settings"]["mining"]["anchor"] == "top_positive"
    assert made["settings"]["mining"]["teacher_scale"] == "raw"
    assert (
        "MiniLM" in made["miner"] and "MiniLM" in made["teacher"] and "torch=" in made["versions"]
    )


def test_mining_reads_title_and_text_or_text_alone(tmp_path):
    folder = str(write_beir(tmp_path / "titled", titles=True))
    assert training_split(folder, settings_of()).corpus["d1"] == "Title1 About topic1."
    assert training_split(folder, settings_of(text_only=True)).corpus["d1"] == "About topic1."


def test_mining_takes_part_of_a_collection_with_all_its_positives(tmp_path):
    folder = str(write_beir(tmp_path / "corpus"))
    part = training_split(folder, settings_of(max_queries=3, max_documents=10))
    assert (len(part.queries), len(part.corpus), part.split) == (3, 10, "train")
    assert all(document in part.corpus for judged in part.qrels.values() for document in judged)


def test_when_no_query_gives_a_row_it_says_why_and_keeps_what_was_there(project, scored):
    name = str(project / "corpus")
    profile = tiny_profile(project / "corpus")
    kept = mine(profile, name, progress=False).to_list()
    with pytest.raises(UserError, match=r"None of the 6 .*4 documents .*too few candidates.*: 6"):
        mine(tiny_profile(project / "corpus", threshold=0.01), name, progress=False)
    assert load_mined(mined_folder(profile, name)).to_list() == kept


def test_a_missing_folder_of_rows_is_named(tmp_path):
    for read in (load_mined, mined_provenance):
        with pytest.raises(UserError, match="no mined rows in .*nowhere.* 01_data_mining"):
            read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "damage", ["no state", "half a state", "half the rows", "no rows", "no JSON"]
)
def test_a_damaged_folder_of_rows_is_named(project, scored, damage):
    profile, name = tiny_profile(project / "corpus"), str(project / "corpus")
    mine(profile, name, progress=False)
    folder = mined_folder(profile, name)
    (arrow,) = folder.glob("*.arrow")
    if damage == "no state":
        (folder / "state.json").unlink()
    elif damage == "half a state":
        (folder / "state.json").write_text('{"_data_files": [')
    elif damage == "half the rows":
        arrow.write_bytes(arrow.read_bytes()[:200])
    elif damage == "no rows":
        arrow.unlink()
    else:
        (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match="mined rows in .* are damaged .*Delete the folder"):
        load_mined(folder)


def test_the_bundled_teacher_mines_a_small_collection(project, capsys):
    """Nothing made up: the encoder, its teacher and the rows."""
    profile, name = tiny_profile(project / "corpus"), str(project / "corpus")
    rows = mine(profile, name, progress=False)
    assert "Encoding" not in capsys.readouterr().err
    assert len(rows) == 6
    for row in rows:
        assert row["document_ids"][0] == f"d{row['query_id'][1:]}" and row["labels"][0] == POSITIVE
        assert min(row["scores"]) >= 0 and max(row["scores"]) <= 1
    assert (project / "runs" / "tiny" / "models" / "bundled" / "modules.json").is_file()
