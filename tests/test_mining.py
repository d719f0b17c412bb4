"""Mining: each candidate rule by a small case worked by hand, then the stage in its three forms."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from pylate.utils import KDProcessing
from sentence_transformers import SentenceTransformer
from tiny_reranker import tiny_reranker

from l2p_utils import mining
from l2p_utils import profile as profiles
from l2p_utils.collection import Collection, load_collection, profile_split
from l2p_utils.files import UserError
from l2p_utils.hub import Snapshot
from l2p_utils.mining import HARD, LABELS, MEDIUM, POSITIVE, RANDOM, Candidates, query_rng
from l2p_utils.model import bundled_encoder_path
from l2p_utils.profile import PROFILES, MiningSettings, Profile, load_profile
from l2p_utils.teacher import RerankerTeacher, load_reranker

FIXTURES = Path(__file__).parent / "fixtures"


def settings_of(hard=1, medium=0, random=0, **changes):
    return MiningSettings(hard=hard, medium=medium, random=random, **changes)


# --- candidates -----------------------------------------------------------------------------------


def propose(similarities, positives, texts, seed=0, **counts):
    """Candidates of one query, from the cosine of each document."""
    collection = Collection("c", texts, {"q": "?"}, {"q": dict.fromkeys(positives, 1)}, "train")
    values = np.array([similarities[document] for document in texts], "f4")
    proposer = mining.Proposer(collection, settings_of(**counts))
    return proposer.propose("q", values, np.random.default_rng(seed))


@given(
    st.permutations([f"d{i}" for i in range(12)]),
    st.lists(st.sampled_from([-0.5, 0.0, 0.25, 0.5]), min_size=12, max_size=12),
    st.sets(st.sampled_from([f"d{i}" for i in range(12)]), min_size=1, max_size=3),
    st.integers(1, 14),
)
def test_candidates_are_those_of_a_plain_sort(ids, values, positives, count):
    ranked = sorted(zip(values, ids, strict=True), reverse=True)
    hard = [d for _, d in ranked[:count] if d not in positives]
    rest = sorted(set(ids) - set(hard) - positives)
    chosen = np.random.default_rng(7).choice(len(rest), min(4, len(rest)), replace=False)
    similarities = dict(zip(ids, values, strict=True))
    counts = {"hard_candidates": count, "random_candidates": 4}
    found = propose(similarities, positives, {d: f"text of {d}" for d in ids}, 7, **counts)
    assert (found.hard, found.random) == (hard, [rest[i] for i in chosen])
    # the documents' order does not matter
    texts = {d: f"text of {d}" for d in sorted(ids)}
    assert propose(similarities, positives, texts, 7, **counts) == found


def test_copies_of_a_positive_are_no_candidates():
    """The same text under another id answers the query as well as the positive does."""
    texts = {"a": "answer", "b": "b", "c": "answer ", "d": "d", "e": "answer", "f": "f", "g": "g"}
    similarities = dict(zip(texts, np.linspace(0.9, 0.3, 7), strict=True))
    found = propose(similarities, ["a"], texts, hard_candidates=3, random_candidates=9)
    assert found.hard == ["b"] and sorted(found.random) == ["d", "f", "g"]


def test_a_question_under_two_ids_has_the_positives_of_both():
    queries = {"q1": "how to sort", "q2": "other", "q3": "how to  sort"}
    qrels = {"q1": {"a": 1}, "q2": {"c": 1}, "q3": {"b": 1, "c": 0}}
    collection = Collection("c", {d: f"text of {d}" for d in "abcd"}, queries, qrels, "train")
    proposer = mining.Proposer(collection, settings_of())
    assert proposer.positives == {"q1": ["a", "b"], "q2": ["c"], "q3": ["a", "b"]}
    assert list(proposer.positives) == list(queries) and proposer.repeated == 2


# --- threshold ------------------------------------------------------------------------------------


def select(scores, positives, hard=(), random=(), seed=0, /, **settings):
    candidates, rng = Candidates("q", [*positives], [*hard], [*random]), np.random.default_rng(seed)
    return mining.select_row(candidates, scores, settings_of(**settings), rng)


def labelled(row):
    return dict(zip(row.document_ids, row.labels, strict=True))


@pytest.mark.parametrize(
    ("positive", "negative", "kept"),
    [
        (1.0, 0.9501, False),
        (1.0, 0.95, True),
        (-2.0, -2.11, True),
        (-2.0, -2.05, False),  # below zero the limit lies below the anchor too
        (-2.0, -1.9, False),  # 0.95 × −2, above the positive
    ],
)
def test_a_negative_above_95_percent_of_the_positive_is_dropped(positive, negative, kept):
    scores = {"p": positive, "n": negative}
    assert (select(scores, ["p"], ["n"]) is not None) == kept
    assert (select(scores, ["p"], [], ["n"]) is not None) == kept


def test_the_anchor_is_the_top_positive_or_the_median_one():
    scores, median = [1.0, 0.4, 0.2], {"anchor": "median_positive"}
    assert mining.negative_limit(scores, settings_of()) == pytest.approx(0.95)
    assert mining.negative_limit(scores, settings_of(**median)) == pytest.approx(0.38)
    assert mining.negative_limit([1.0, 0.5], settings_of(**median)) == pytest.approx(0.7125)
    assert mining.negative_limit(scores, settings_of(threshold=0.5)) == pytest.approx(0.5)
    assert mining.negative_limit([0.0], settings_of()) == 0.0


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=4), st.floats(0.05, 1))
def test_no_negative_within_the_limit_beats_the_best_positive(scores, threshold):
    for anchor in ("top_positive", "median_positive"):
        limit = mining.negative_limit(scores, settings_of(threshold=threshold, anchor=anchor))
        assert limit <= max(scores)


# --- choice ---------------------------------------------------------------------------------------


def test_one_positive_is_kept_and_the_teachers_best_hard_negatives():
    scores = {"p1": 0.7, "p2": 1.0, "h1": 0.2, "h2": 0.8, "h3": 0.5, "too good": 0.97}
    row = select(scores, ["p1", "p2"], ["h1", "too good", "h2", "h3"], hard=2)
    assert labelled(row) == {"p2": POSITIVE, "h2": HARD, "h3": HARD}


def test_medium_and_random_negatives_are_drawn_from_the_rest_within_the_limit():
    hard, rest = [f"h{i}" for i in range(6)], ["r1", "r2", "too good"]
    scores = {"p": 1.0, **{d: 0.9 - i / 10 for i, d in enumerate(hard)}}
    scores |= {"r1": 0.1, "r2": 0.2, "too good": 0.99}
    drawn = {MEDIUM: set(), RANDOM: set()}
    for seed in range(60):
        row = select(scores, ["p"], hard, rest, seed, hard=2, medium=2, random=1)
        found = {label: {d for d, has in labelled(row).items() if has == label} for label in LABELS}
        assert found[HARD] == {"h0", "h1"}
        for label, sets in drawn.items():
            sets.add(frozenset(found[label]))
    assert drawn[MEDIUM] == {frozenset((a, b)) for a in hard[2:] for b in hard[2:] if a < b}
    assert drawn[RANDOM] == {frozenset(["r1"]), frozenset(["r2"])}


def test_a_short_group_is_filled_by_remaining_hard_ones_then_by_random_ones():
    scores = {"p": 1.0, "h1": 0.9, "h2": 0.8, "h3": 0.7, "h4": 0.6} | dict.fromkeys("rstu", 0.1)
    row = select(scores, ["p"], ["h4", "h2", "h3", "h1"], ["r"], hard=1, random=3)
    assert labelled(row) == {"p": POSITIVE, "h1": HARD, "h2": MEDIUM, "h3": MEDIUM, "r": RANDOM}
    row = select(scores, ["p"], ["h1"], "rstu", hard=2, medium=2, random=1)
    assert sorted(row.labels) == sorted([POSITIVE, HARD, *[RANDOM] * 4])
    row = select(scores, ["p"], ["h1", "h2"], "rst", hard=1, medium=3)
    assert sorted(row.labels) == sorted([POSITIVE, HARD, MEDIUM, RANDOM, RANDOM])
    assert select(scores, ["p"], ["h1"], ["r"], hard=1, medium=1, random=1) is None


def test_documents_are_ordered_by_score_the_positive_first_among_equals():
    scores = {"a": 0.0, "z": 0.0, "m": 0.0, "low": -1.0}
    row = select(scores, ["m"], ["a", "z", "low"], hard=3)
    assert row.document_ids == ["m", "z", "a", "low"]  # then by id, descending
    assert row.scores == [0.0, 0.0, 0.0, -1.0]
    assert select({"p1": 1.0, "p2": 1.0, "n": 0.0}, ["p1", "p2"], ["n"]).document_ids[0] == "p2"
    row = select({"p": 1.0, "a": 0.5, "b": 0.5, "c": 0.5}, ["p"], ["b", "a", "c"], hard=2)
    assert row.document_ids == ["p", "c", "b"]


def test_the_sigmoid_scale_keeps_the_order_of_documents():
    scored = [(Candidates("q", ["p"], ["n"], []), {"p": 2.0, "n": -1.0}, query_rng(1, "q"))]
    ((row,), dropped) = mining.mine_rows(scored, settings_of(teacher_scores="sigmoid"))
    assert row.document_ids == ["p", "n"] and not dropped
    assert row.scores == pytest.approx([1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(1.0))])


# --- the stage, by the bundled teacher ------------------------------------------------------------


def write_beir(folder, documents=24, queries=7):
    """A folder in BEIR's layout whose document i is about "topic<i>"; query i asks for it."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "text": f"About topic{i}."} for i in range(documents)]
    asked = [{"_id": f"q{i}", "text": f"what is topic{i}"} for i in range(queries)]
    for name, records in (("corpus", corpus), ("queries", asked)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(queries))]
    for split in ("train", "dev"):
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one collection, `corpus`, of 24 documents and 7 queries."""
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    write_beir(tmp_path / "corpus")
    return tmp_path


def make_profile(project, mining=(), **changes):
    content = yaml.safe_load((PROFILES / "smoke.yaml").read_text("utf-8"))
    content["mining"] = {
        "hard_candidates": 8, "random_candidates": 6, "hard": 1, "medium": 1, "random": 1,
        **dict(mining),
    }  # fmt: skip
    content["model"] |= {"query_length": 12, "document_length": 16, "projection_texts": 10}
    content["adaptation"]["collection"] = str(project / "corpus")
    return Profile.model_validate({"name": "tiny", **content, "runs": [], "plaid": [], **changes})


def mined_by(profile, project, folder=None):
    return mining.mine(profile, str(project / "corpus"), False, folder)


def provenance_of(profile, project):
    return mining.mined_provenance(mining.mined_folder(profile, str(project / "corpus")))


@pytest.fixture
def scored(monkeypatch):
    """Made-up scores in the bundled encoder's place; lists how often they were asked for."""
    calls = []

    def score(profile, collection, proposer, progress):
        calls.append(collection.name)
        for query in proposer.positives:
            rng = query_rng(profile.seed, query)
            found = proposer.propose(query, rng.random(len(collection.corpus)), rng)
            scores = {d: query_rng(0, query + d).random() for d in found.documents}
            yield found, scores | dict.fromkeys(found.positives, 1.1), rng

    monkeypatch.setattr(mining, "score_bundled", score)
    return calls


def test_mined_rows_have_pylates_distillation_layout_and_labels(project, scored):
    rows = mined_by(make_profile(project), project)
    kinds = {name: str(getattr(f, "feature", f).dtype) for name, f in rows.features.items()}
    text = dict.fromkeys(["query_id", "document_ids", "labels"], "string")
    assert kinds == text | {"scores": "float64"}
    assert rows["query_id"][:] == [f"q{i}" for i in range(7)]
    for row in rows:
        assert len(set(row["document_ids"])) == len(row["scores"]) == len(row["labels"]) == 4
        assert row["document_ids"][0] == f"d{row['query_id'][1:]}" and row["labels"][0] == POSITIVE
    collection = load_collection(project / "corpus", "train")
    texts = {"query_id": collection.queries, "document_id": collection.corpus}
    tables = [
        Dataset.from_dict({key: list(t), "text": list(t.values())}) for key, t in texts.items()
    ]
    rows.set_transform(KDProcessing(*tables).transform)
    assert (rows[3]["query"], rows[3]["documents"][0]) == ("what is topic3", "About topic3.")


def test_mining_again_reads_what_is_stored_and_another_seed_draws_others(project, scored):
    profile = make_profile(project)
    first = mined_by(profile, project)
    again = mined_by(profile, project)
    assert again.to_list() == first.to_list() and len(scored) == 1
    assert mining.mined_fingerprint(again) == mining.mined_fingerprint(first)
    other = profile.model_copy(update={"seed": 1})
    other = mined_by(other, project, project / "elsewhere" / "rows")
    assert mining.mined_fingerprint(other) != mining.mined_fingerprint(first)
    assert mining.load_mined(project / "elsewhere" / "rows").to_list() == other.to_list()
    mined_by(make_profile(project, {"threshold": 0.9}), project)
    with (project / "corpus" / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": "new", "text": "About something new."}\n')
    mined_by(make_profile(project, {"threshold": 0.9}), project)
    assert len(scored) == 4


def test_provenance_says_who_made_the_rows_and_what_was_left_out(project, scored):
    judged = project / "corpus" / "qrels" / "train.tsv"
    judged.write_text(judged.read_text().replace("q2\td2\t1", "q2\td2\t0"))
    corpus, queries = project / "corpus" / "corpus.jsonl", project / "corpus" / "queries.jsonl"
    corpus.write_text(corpus.read_text().replace("topic9.", "topic1."))
    queries.write_text(queries.read_text().replace("topic4", "topic3"))
    profile = make_profile(project)
    rows = mined_by(profile, project)
    made = provenance_of(profile, project)
    assert (made["rows"], made["queries"], made["documents"]) == (6, 7, 24)
    assert made["queries_dropped"] == {"no positive": 1}
    assert (made["queries_under_several_ids"], made["copies_of_positives_left_out"]) == (2, 1)
    by_query = {row["query_id"]: row["document_ids"] for row in rows}
    assert "d9" not in by_query["q1"] and {by_query["q3"][0], by_query["q4"][0]} <= {"d3", "d4"}
    assert len({"d3", "d4"} & set(by_query["q3"])) == len({"d3", "d4"} & set(by_query["q4"])) == 1
    assert made["labels"][POSITIVE] == 6 and sum(made["labels"].values()) == 24
    assert made["settings"]["seed"] == 42 and made["settings"]["mining"]["teacher_scores"] == "raw"
    assert "MiniLM" in made["miner"] and "MiniLM" in made["teacher"]


def test_when_no_query_gives_a_row_it_says_why_and_keeps_what_was_stored(project, scored):
    kept = mined_by(make_profile(project), project).to_list()
    with pytest.raises(UserError, match=r"None of the 7 .*4 documents .*too few candidates.*: 7"):
        mined_by(make_profile(project, {"threshold": 0.01}), project)
    assert mined_by(make_profile(project), project).to_list() == kept and len(scored) == 2
    for read in (mining.load_mined, mining.mined_provenance):
        with pytest.raises(UserError, match="no mined rows in .*nowhere.* 01_data_mining"):
            read(project / "nowhere")


def test_the_bundled_teacher_mines_the_rows_of_the_smoke_profile(tmp_path, monkeypatch):
    """Nothing made up: the encoder, its teacher, and the rows as they have always been."""
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    profile = load_profile("smoke").model_copy(update={"precision": "float32"})
    rows = mining.mine(profile, "docs:scipy", progress=False).to_list()
    expected = json.loads((FIXTURES / "mined_smoke_scipy.json").read_text("utf-8"))
    for row, pinned in zip(rows, expected, strict=True):
        assert row.pop("scores") == pytest.approx(pinned.pop("scores"), abs=1e-3)
        assert row == pinned


# --- by a miner and a reranker --------------------------------------------------------------------


class HashingMiner:
    """A miner that needs no loading: a text's vector is drawn from its words."""

    def encode_query(self, text, **_):
        words = [np.random.default_rng(list(w.encode())).normal(size=8) for w in text.split()]
        return torch.nn.functional.normalize(torch.tensor(sum(words)), dim=-1)

    def encode_document(self, texts, **options):
        return torch.stack([self.encode_query(text) for text in texts])


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return tiny_reranker(tmp_path_factory.mktemp("models") / "reranker")


@pytest.fixture
def hub(monkeypatch, teacher_folder):
    """A hub with a miner and a teacher."""
    monkeypatch.setattr(mining, "load_miner", lambda folder, device: HashingMiner())
    monkeypatch.setattr(
        mining, "snapshot", lambda name, kind, revision: Snapshot(name, revision, teacher_folder)
    )


def reranked(project, mining=(), revision="v1", **scoring):
    models = {"miner": "owner/miner", "teacher": "owner/teacher"}
    revisions = {"miner_revision": "v1", "teacher_revision": revision}
    sizes = {"max_length": 64, "batch_size": 4, "checkpoint_queries": 2}
    mining = {"hard_candidates": 4, "random_candidates": 3, "threshold": 50.0, **dict(mining)}
    return make_profile(project, mining, scoring={**models, **revisions, **sizes, **scoring})


@pytest.fixture
def queries_scored(monkeypatch):
    """Lists each query that the teacher scores; a number in `fatal` kills that call."""
    calls, scores = [], RerankerTeacher.scores

    def counted(self, pairs, batch_size):
        calls.append(pairs[0][0])
        if len(calls) == counted.fatal:
            raise KeyboardInterrupt
        return scores(self, pairs, batch_size)

    counted.fatal = 0
    monkeypatch.setattr(RerankerTeacher, "scores", counted)
    return calls, counted


def test_rows_have_the_rerankers_scores(project, hub, teacher_folder):
    profile = reranked(project)
    rows = mined_by(profile, project)
    assert rows["query_id"][:] == [f"q{i}" for i in range(7)] and len(rows[0]["labels"]) == 4
    collection = profile_split(profile, str(project / "corpus"))
    teacher = load_reranker(teacher_folder, 64, torch.device("cpu"))
    for row in rows:
        asked = collection.queries[row["query_id"]]
        pairs = [(asked, collection.corpus[d]) for d in row["document_ids"]]
        assert row["scores"] == pytest.approx(teacher.scores(pairs, 4), abs=1e-5)
    made = provenance_of(profile, project)
    assert made["teacher"] == 'owner/teacher @ v1, logit of "Yes", 64 tokens'
    assert made["miner"] == "owner/miner @ v1, cosine"


def test_an_interrupted_run_resumes_and_gives_the_rows_of_an_unbroken_one(
    project, hub, queries_scored
):
    calls, counted = queries_scored
    profile = reranked(project)
    expected = mined_by(profile, project).to_list()
    shutil.rmtree(profile.folder / "mined")
    calls.clear()
    counted.fatal = 4  # the second query of the second chunk
    with pytest.raises(KeyboardInterrupt):
        mined_by(profile, project)
    counted.fatal = 0
    assert mined_by(profile, project).to_list() == expected
    assert calls == [f"what is topic{i}" for i in (0, 1, 2, 3, 2, 3, 4, 5, 6)]


def test_scores_are_made_again_only_when_they_would_differ(project, hub, queries_scored):
    calls, _ = queries_scored
    mined_by(reranked(project), project)
    for rules in ({"threshold": 0.9}, {"teacher_scores": "sigmoid"}):
        mined_by(reranked(project, rules), project)
    mined_by(reranked(project, batch_size=32), project)
    assert len(calls) == 7
    changed = [
        reranked(project, max_length=32),
        reranked(project, {"random_candidates": 4}),
        reranked(project, revision="v2"),
    ]
    for number, profile in enumerate(changed, start=2):
        mined_by(profile, project)
        assert len(calls) == 7 * number


def test_a_real_miner_is_loaded_and_what_is_none_is_refused(tmp_path, teacher_folder):
    cpu = torch.device("cpu")
    assert isinstance(mining.load_miner(bundled_encoder_path(), cpu), SentenceTransformer)
    with pytest.raises(UserError, match=r"no modules.json.*Sentence Transformers.*scoring.miner"):
        mining.load_miner(teacher_folder, cpu)
    (tmp_path / "modules.json").write_text("[{")
    with pytest.raises(UserError, match="could not be loaded"):
        mining.load_miner(tmp_path, cpu)


# --- released rows --------------------------------------------------------------------------------


def released_row(i, **changes):
    documents = [f"d{(i + k) % 24}" for k in range(4)]
    scores = [3.5, 1.25, -0.5, -7.0]
    row = {"query_id": f"q{i}", "document_ids": documents, "scores": scores, "labels": [*LABELS]}
    return row | changes


@pytest.fixture
def release(project, monkeypatch):
    """Puts rows where the hub brings them, and mines them."""
    folder = project / "commit0"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", project / "cache")

    def put(rows, rules=(), name="data/train-00000-of-00001.parquet", revision=""):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / name).parent.mkdir(parents=True)
        data, asked = Dataset.from_list(rows), []
        (data.to_parquet if name.endswith("parquet") else data.to_json)(folder / name)
        monkeypatch.setattr(
            mining, "snapshot", lambda *a: asked.append(a) or Snapshot(a[0], "c0", folder)
        )
        released = {str(project / "corpus"): f"owner/rows{revision}"}
        profile = make_profile(project, rules, training_data="released", released_rows=released)
        rows = mined_by(profile, project).to_list()
        assert asked == [("owner/rows", "dataset", revision[1:] or None)]
        return rows, provenance_of(profile, project)

    return put


@pytest.mark.parametrize("name", ["data/train-00000-of-00001.parquet", "train.jsonl"])
def test_released_rows_are_taken_as_they_are(release, name):
    """Also with two rows of a query, equal scores, labels in any number and order."""
    rows = [released_row(i) for i in range(7)]
    rows[1] |= {"query_id": "q0", "labels": ["hard_negative"] * 4, "scores": [1.0] * 4}
    mined, made = release(rows, name=name, revision="@v2")
    assert mined == rows
    assert made["settings"]["released"] == ["owner/rows", "c0"]
    assert made["repositories"] == {"owner/rows": "c0"}
    assert made["teacher"] == made["miner"] == "released: owner/rows @ c0"
    assert (made["rows"], made["queries"], made["queries_dropped"]) == (7, 7, {})


def test_ids_that_are_numbers_become_strings(release, project):
    for file in [*(project / "corpus").glob("*.jsonl"), *(project / "corpus").glob("qrels/*.tsv")]:
        text = file.read_text().replace('"_id": "d', '"_id": "').replace('"_id": "q', '"_id": "')
        file.write_text(text.replace("\nq", "\n").replace("\td", "\t"))
    mined, _ = release([released_row(3, query_id=3, document_ids=[3, 4, 5, 6])])
    assert mined[0]["query_id"] == "3" and mined[0]["document_ids"] == ["3", "4", "5", "6"]


def test_rows_of_unknown_and_held_out_ids_are_left_out_and_counted(release):
    mined, made = release([released_row(i) for i in range(7)], {"max_queries": 5})
    assert len(mined) == 5 and made["queries_dropped"] == {"held out": 2}
    rows = [released_row(i % 7) for i in range(200)]
    rows[5]["query_id"] = "gone"
    rows[6]["document_ids"] = ["d6", "gone", "d8", "d9"]
    mined, made = release(rows)
    assert len(mined) == 198
    assert made["queries_dropped"] == {"unknown query": 1, "unknown document": 1}
    rows[7]["query_id"] = "gone"
    with pytest.raises(UserError, match="owner/rows: 3 of its 200 rows"):
        release(rows, {"threshold": 0.9})


def test_rows_of_another_split_a_column_less_or_uneven_length_are_refused(release):
    rows = [released_row(i) for i in range(7)]
    with pytest.raises(UserError, match="owner/rows has no readable split `train`"):
        release(rows, name="data/test-00000-of-00001.parquet")
    for column in rows[0]:
        with pytest.raises(UserError, match=f"no readable split .*{column}"):
            release([{k: v for k, v in row.items() if k != column} for row in rows])
    for changes in ({"scores": [1.0]}, {"labels": ["positive"]}):
        with pytest.raises(UserError, match="owner/rows: rows have 1, 4 documents"):
            release([released_row(1), released_row(2, **changes)])
