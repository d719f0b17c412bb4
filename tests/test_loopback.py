"""The real client against a hub on loopback: models and collections by their ids, and faults.

The client reads its settings when it is imported, so each pass is a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hub.server import commit_of, serving
from tiny import tiny_colbert

ROOT = Path(__file__).parents[1]
MODEL = "stefan-jo/mxbai-edge-colbert-v0-32m-fiqa-kmeans-pf1-6"
TEXTS = {
    "d1": "The Sharpe ratio is the excess return over its deviation.",
    "d2": "Bonds pay interest twice a year.",
    "d3": "A stock index follows many stocks.",
}
ENCODE = f"""
from l2p_utils.model import PooledColBERT
model = PooledColBERT("{MODEL}")
query = model.encode(["What is the Sharpe ratio?"], is_query=True)
options = dict(pool_factor=4, pool_method="kmeans", use_sklearn=True)
found = model.encode({list(TEXTS.values())!r}, is_query=False, **options)
print([list(vectors.shape) for vectors in [*query, *found]])
"""
NANO = """
import json
from l2p_utils.collection import load_collection
from l2p_utils.hub_collections import provenance_of
found = load_collection("nano:scifact")
print(json.dumps([found.corpus, found.queries, found.qrels, provenance_of("nano:scifact")]))
"""
DOWNLOAD = f'from l2p_utils.hub import download; print(download("{MODEL}"))'
# Waits are noted instead of waited for.
WAITS = f"import time; waits = []; time.sleep = waits.append; {DOWNLOAD}; print(waits)"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    tiny_colbert(root / "models" / MODEL, list(TEXTS.values()))
    nano = root / "datasets" / "zeta-alpha-ai" / "NanoSciFact"
    tables = {
        "corpus": {"_id": list(TEXTS), "text": list(TEXTS.values())},
        "queries": {"_id": ["q1"], "text": ["sharpe ratio"]},
        "qrels": {"query-id": ["q1"], "corpus-id": ["d1"]},
    }
    for name, table in tables.items():
        (nano / name).mkdir(parents=True)
        pd.DataFrame(table).to_parquet(nano / name / "train-00000-of-00001.parquet")
    configs = [
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in tables
    ]
    (nano / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    return root


@pytest.fixture
def hub(repositories):
    with serving(repositories) as server:
        yield server


def run(code, hub, home, **changes):
    """Run `code` in a process that takes `hub` for the hub; give (status, last line, errors)."""
    here = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    here |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "L2P_CACHE": str(home / "l2p")}
    here |= {"PYTHONPATH": str(ROOT), "L2P_HUB_WAIT": "0", "HF_HUB_DISABLE_XET": "1", **changes}
    done = subprocess.run(
        [sys.executable, "-c", code], env=here, capture_output=True, text=True, timeout=300
    )
    lines = done.stdout.strip().splitlines()
    return done.returncode, lines[-1] if lines else "", done.stderr


def test_the_model_cards_usage_works_and_again_without_the_network(hub, tmp_path):
    status, first, errors = run(ENCODE, hub, tmp_path)
    assert status == 0, errors
    shapes = json.loads(first)
    assert [shape[1] for shape in shapes] == [16] * 4 and all(s[0] <= 5 for s in shapes[1:])
    asked = len(hub.asked)
    status, again, errors = run(ENCODE, hub, tmp_path, HF_HUB_OFFLINE="1")
    assert status == 0, errors
    assert again == first and len(hub.asked) == asked


def test_a_collection_comes_with_its_commit_and_stays(hub, repositories, tmp_path):
    status, first, errors = run(NANO, hub, tmp_path)
    assert status == 0, errors
    corpus, queries, qrels, made = json.loads(first)
    assert (corpus, queries, qrels) == (TEXTS, {"q1": "sharpe ratio"}, {"q1": {"d1": 1}})
    commit = commit_of(repositories / "datasets" / "zeta-alpha-ai" / "NanoSciFact")
    assert made["repositories"] == {"zeta-alpha-ai/NanoSciFact": commit}
    status, again, errors = run(NANO, hub, tmp_path, HF_HUB_OFFLINE="1")
    assert status == 0 and again == first, errors


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("/api/models", "429"),
        ("/api/models", "500"),
        ("model.safetensors", "503"),
        ("model.safetensors", "reset"),
        ("model.safetensors", "truncated"),
        ("model.safetensors", "wrong"),
        ("/config.json", "wrong"),
        ("tokenizer.json", "wrong"),
    ],
)
def test_a_fault_that_passes_ends_in_a_whole_model(hub, repositories, tmp_path, part, kind):
    hub.fail(part, kind)
    status, folder, errors = run(DOWNLOAD, hub, tmp_path)
    assert status == 0, errors
    assert hub.faults[0][2] == 0  # it did happen
    for path in (repositories / "models" / MODEL).rglob("*"):
        if path.is_file():
            there = Path(folder, path.relative_to(repositories / "models" / MODEL))
            assert there.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("part", "kind", "words"),
    [
        ("/api/models", "401", "gated"),
        ("model.safetensors", "wrong", "arrived damaged, twice"),
        ("/api/models", "500", "not fetched whole before"),
    ],
)
def test_a_fault_that_stays_is_told_and_nothing_is_used(hub, tmp_path, part, kind, words):
    hub.fail(part, kind, times=100)
    status, _, errors = run(DOWNLOAD, hub, tmp_path)
    assert status != 0
    assert "UserError" in errors and MODEL in errors and words in errors


@pytest.mark.parametrize(("kind", "wait"), [("429:55", 56), ("503:7", 7)])
def test_the_hubs_own_waiting_time_is_kept(hub, tmp_path, kind, wait):
    hub.fail("/api/models", kind)
    status, waits, errors = run(WAITS, hub, tmp_path)
    assert status == 0, errors
    assert json.loads(waits) == [wait]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("429:55", ["limits how much you may ask", "Wait 56 s", "hf auth login", "HF_TOKEN"]),
        ("503:7", ["answers 503", "Wait 7 s"]),
        ("500", ["answers 500", "Wait some minutes"]),
    ],
)
def test_a_hub_that_stays_busy_is_not_called_unreachable(hub, tmp_path, kind, words):
    hub.fail("/api/models", kind, times=100)
    status, _, errors = run(WAITS, hub, tmp_path)
    assert status != 0 and "cannot be reached" not in errors
    assert all(word in errors for word in ["UserError", MODEL, "not fetched whole before", *words])


def test_an_unknown_repository_is_told(hub, tmp_path):
    status, _, errors = run(DOWNLOAD.replace("fiqa", "fika"), hub, tmp_path)
    assert status != 0 and "Check the spelling" in errors


def test_a_hub_that_is_gone_is_told(repositories, tmp_path):
    with serving(repositories) as gone:
        pass
    status, _, errors = run(DOWNLOAD, gone, tmp_path)
    assert status != 0 and "The hub cannot be reached" in errors and MODEL in errors
