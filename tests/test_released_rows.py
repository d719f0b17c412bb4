"""Released rows: taken as they are, or refused with the place and the reason."""

import json

import pytest
import yaml
from datasets import Dataset
from test_mining import write_beir

from l2p_utils import hub
from l2p_utils import profile as profiles
from l2p_utils.files import UserError
from l2p_utils.mining import mine, mined_folder, mined_provenance
from l2p_utils.profile import PROFILES, Profile

LABELS = ["positive", "hard_negative", "medium_negative", "random_negative"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a collection of 200 training queries and no dev split of its own."""
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    write_beir(tmp_path / "corpus", documents=220, queries=200)
    (tmp_path / "corpus" / "qrels" / "dev.tsv").unlink()
    return tmp_path


def make_profile(project, dev=True, rows="owner/rows", **mining):
    content = yaml.safe_load((PROFILES / "smoke.yaml").read_text("utf-8"))
    name = str(project / "corpus")
    content["mining"] = {"hard": 1, "medium": 1, "random": 1, **mining}
    content["training_data"] = "released"
    content["adaptation"]["collection"] = str(project / "corpus")
    content["released_rows"] = {name: rows}
    content["dev_collections"] = {name: "nano:scifact"} if dev else {}
    return Profile.model_validate({"name": "tiny", **content, "runs": [], "plaid": []})


def made_up(count=200):
    return [
        {
            "query_id": f"q{i}",
            "document_ids": [f"d{(i + k) % 220}" for k in range(4)],
            "scores": [3.5, 1.25, -0.5, -7.0],
            "labels": LABELS,
        }
        for i in range(count)
    ]


def release(project, monkeypatch, rows, name="data/train-00000-of-00001.parquet"):
    """Put rows where the hub would bring them."""
    path = project / "commit0" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    asked = []
    monkeypatch.setattr(hub, "download", lambda *a: asked.append(a) or project / "commit0")
    return asked


def mine_released(project, **options):
    return mine(make_profile(project, **options), str(project / "corpus"), progress=False)


@pytest.mark.parametrize("name", ["data/train-00000-of-00001.parquet", "train.jsonl", "rows.jsonl"])
def test_released_rows_are_taken_as_they_are(project, monkeypatch, name):
    asked = release(project, monkeypatch, made_up(), name)
    (project / "commit0" / "README.md").write_text("A card.")
    mined = mine_released(project)
    assert mined.to_list() == made_up()
    assert asked[0][:2] == ("owner/rows", "dataset")
    profile = make_profile(project)
    made = mined_provenance(mined_folder(profile, str(project / "corpus")))
    assert made["settings"]["released"] == ["owner/rows", "commit0"]
    assert made["teacher"] == made["miner"] == "released: owner/rows @ commit0"
    assert (made["rows"], made["queries"], made["queries_dropped"]) == (200, 200, {})
    assert made["labels"] == dict.fromkeys(LABELS, 200)


def test_rows_of_a_revision_are_asked_for_and_recorded(project, monkeypatch):
    asked = release(project, monkeypatch, made_up())
    assert len(mine_released(project, rows="owner/rows@v2")) == 200
    assert [call[:3] for call in asked] == [("owner/rows", "dataset", "v2")]
    made = mined_provenance(mined_folder(make_profile(project), str(project / "corpus")))
    assert made["settings"]["released"] == ["owner/rows", "commit0"]
    expected = {"repository": "owner/rows", "revision": "v2", "commit": "commit0"}
    assert made["released"] == expected


def test_another_split_of_the_set_is_not_read(project, monkeypatch):
    release(project, monkeypatch, made_up(2), "data/test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"owner/rows has no split `train`.*data/test-00000"):
        mine_released(project)
    release(project, monkeypatch, made_up())
    assert len(mine_released(project)) == 200


def test_whole_numbers_become_ids_and_whole_scores_become_floats(project, monkeypatch):
    corpus = project / "corpus"
    for file in [*corpus.glob("*.jsonl"), *corpus.glob("qrels/*.tsv")]:
        text = file.read_text()
        text = text.replace('"_id": "d', '"_id": "').replace('"_id": "q', '"_id": "')
        file.write_text(text.replace("\nq", "\n").replace("\td", "\t"))
    row = {"query_id": 3, "document_ids": [3, 4, 5, 6], "scores": [2, 1, 0, -1], "labels": LABELS}
    release(project, monkeypatch, [row])
    (found,) = mine_released(project).to_list()
    assert found["query_id"] == "3" and found["document_ids"] == ["3", "4", "5", "6"]
    assert found["scores"] == [2.0, 1.0, 0.0, -1.0]


def test_rows_with_unknown_ids_are_left_out_and_counted(project, monkeypatch):
    rows = made_up()
    rows[5]["query_id"] = "gone"
    rows[6]["document_ids"] = ["d6", "gone", "d8", "d9"]
    release(project, monkeypatch, rows)
    assert len(mine_released(project)) == 198
    made = mined_provenance(mined_folder(make_profile(project), str(project / "corpus")))
    assert made["queries_dropped"] == {"unknown query": 1, "unknown document": 1}


def test_more_than_1_percent_of_unknown_rows_are_refused(project, monkeypatch):
    rows = made_up()
    for row in rows[:3]:
        row["query_id"] = "gone"
    release(project, monkeypatch, rows)
    with pytest.raises(UserError, match=r"owner/rows: 3 of its 200 rows .*unknown query.*: 3"):
        mine_released(project)


def test_queries_that_pick_the_epoch_are_held_out(project, monkeypatch):
    release(project, monkeypatch, made_up())
    mined = mine_released(project, dev=False)
    assert len(mined) == 180
    profile = make_profile(project, dev=False)
    made = mined_provenance(mined_folder(profile, str(project / "corpus")))
    assert made["queries_dropped"] == {"held out": 20}
    assert len(mine_released(project, dev=False, max_queries=50)) == 50


def change(row, column, value):
    return {k: value if k == column else v for k, v in row.items() if (k, value) != (column, None)}


BAD = {
    "no column": ("labels", None, "no column labels; expected query_id, document_ids"),
    "lengths": ("scores", [1.0, 2.0], "lists of different lengths, .*'scores': 2"),
    "type of a list": ("scores", 1.5, "scores is 1.5; expected a list"),
    "type of a score": ("scores", ["a", 1, 2, 3], "scores has 'a'; expected a number"),
    "no number": ("scores", [float("nan"), 1, 2, 3], "scores has nan; expected a number"),
    "type of a label": ("labels", [1, 2, 3, 4], "labels has 1; expected a string"),
    "type of an id": ("document_ids", [1.5, 2, 3, 4], "document_ids has 1.5; expected a string"),
    "an unknown label": ("labels", ["good", *LABELS[1:]], "labels has 'good'; expected positive, "),
    "order": ("scores", [1.0, 2.0, 3.0, 4.0], "scores rise, from 1.0 to 2.0; expected descending"),
    "order at the end": ("scores", [3.0, 2.0, 1.0, 1.5], "scores rise, from 1.0 to 1.5"),
    "a document twice": ("document_ids", ["d1", "d2", "d1", "d4"], "the document 'd1' is there tw"),
    "no id": ("query_id", "", "query_id has ''"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(project, monkeypatch, case):
    column, value, message = BAD[case]
    rows = made_up(3)
    rows[1] = change(rows[1], column, value)
    release(project, monkeypatch, rows, "train.jsonl")
    with pytest.raises(UserError, match=r"owner/rows, train\.jsonl, row 2: " + message):
        mine_released(project)


def test_a_row_that_is_there_twice_is_taken_once_and_counted(project, monkeypatch):
    rows = made_up()
    release(project, monkeypatch, [*rows, rows[3], rows[7], rows[7]])
    assert mine_released(project).to_list() == rows
    made = mined_provenance(mined_folder(make_profile(project), str(project / "corpus")))
    assert made["queries_dropped"] == {"row twice": 3}


def test_rows_may_differ_in_what_others_may_do_otherwise(project, monkeypatch):
    """Two rows of a query, equal scores, labels in any number and order."""
    rows = made_up(3)
    rows[1] |= {"query_id": "q0", "labels": ["hard_negative"] * 4, "scores": [1.0] * 4}
    rows[2]["labels"] = LABELS[::-1]
    release(project, monkeypatch, rows)
    assert mine_released(project).to_list() == rows


def test_rows_of_another_number_of_documents_are_refused_with_both_numbers(project, monkeypatch):
    release(project, monkeypatch, made_up())
    with pytest.raises(UserError, match="row 1: 4 documents, but the profile's rows have 16"):
        mine_released(project, hard=5, medium=5, random=5)


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_a_file_that_cannot_be_read_is_named(project, monkeypatch, name):
    release(project, monkeypatch, made_up(2), name)
    file = project / "commit0" / name
    file.write_bytes(b"\xff" + file.read_bytes()[:50])
    with pytest.raises(UserError, match=f"owner/rows, {name} cannot be read"):
        mine_released(project)


def test_a_part_of_the_documents_is_refused(project, monkeypatch):
    release(project, monkeypatch, made_up())
    with pytest.raises(UserError, match="max_documents .*expected none"):
        mine_released(project, max_documents=50)
