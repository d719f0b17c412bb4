"""The bundled collections: the files are those that stored rows were measured on."""

import json
import re
from pathlib import Path

import pytest

from l2p_utils import collection
from l2p_utils.collection import load_collection
from l2p_utils.files import UserError

FINGERPRINTS = json.loads((Path(__file__).parent / "fixtures" / "fingerprints.json").read_text())


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_every_split_is_the_one_that_rows_were_measured_on(name):
    splits = {split: load_collection(f"docs:{name}", split) for split in ("train", "dev", "test")}
    assert {split: one.fingerprint for split, one in splits.items()} == FINGERPRINTS[name]
    assert (len(splits["test"].queries), len(splits["dev"].queries)) == (280, 100)


def test_an_unknown_collection_or_split_is_refused_with_those_that_exist():
    with pytest.raises(UserError, match="Known are: docs:mixed, docs:numpy, .*docs:transformers"):
        load_collection("docs:keras")
    with pytest.raises(UserError, match="It has: dev, test, train"):
        load_collection("docs:scipy", "validation")


def test_without_the_projects_folder_the_message_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(collection, "DOCS", tmp_path / "docs")
    with pytest.raises(UserError, match="pip install -e"):
        load_collection("docs:scipy")


def test_the_notice_holds_a_licence_for_each_package():
    notice = (collection.DOCS / "NOTICE").read_text("utf-8")
    for name in {*FINGERPRINTS, "networkx", "matplotlib", "sympy"} - {"mixed"}:
        assert re.search(rf"^{name} \d+\.\d+", notice, re.M), name
