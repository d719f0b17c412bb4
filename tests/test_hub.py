"""The hub: repositories fetched whole from one on loopback, with faults, then read offline."""

import os
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
from hub.repositories import NANO, ROWS, TEACHER, make_repositories
from hub.server import commit_of, serving

from l2p_utils import hub
from l2p_utils.files import UserError
from l2p_utils.profile import load_profile

PRINT = "import sys; from l2p_utils.{}; print({})"
SNAPSHOT = "hub import snapshot", "snapshot(*sys.argv[1:]).folder"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = make_repositories(tmp_path_factory.mktemp("repositories"), models=False)
    with serving(root) as running:
        yield running


@pytest.fixture
def client(server, tmp_path):
    """Runs Python with the hub's address and a cache of its own: both are read at import."""
    server.faults.clear()
    here = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTEST"))}
    here |= {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}

    def run(code, *arguments, offline=False):
        command = [sys.executable, "-c", PRINT.format(*code), *arguments]
        told = here | ({"HF_HUB_OFFLINE": "1"} if offline else {})
        return subprocess.run(command, env=told, capture_output=True, text=True, timeout=120)

    return run


def test_faults_that_pass_are_retried_and_what_was_fetched_is_read_offline(server, client):
    server.fail("/api/datasets/mteb/fiqa", "429")
    server.fail("fiqa/resolve", "reset")
    server.fail("fiqa/resolve", "503")
    fetched = client(SNAPSHOT, "mteb/fiqa", "dataset")
    assert fetched.returncode == 0, fetched.stderr
    assert all(times == 0 for _, _, times in server.faults)

    asked = len(server.asked)
    load = "collection import load_collection", "load_collection(*sys.argv[1:]).fingerprint"
    first, second = (client(load, "beir:fiqa", "train", offline=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout != ""
    assert len(server.asked) == asked


def test_what_arrives_damaged_is_fetched_once_more(server, client):
    name = f"zeta-alpha-ai/{NANO[0]}"
    server.fail(f"{NANO[0]}/resolve", "wrong")
    code = (
        "hub import snapshot, _verify",
        "[_verify(s := snapshot(sys.argv[1], 'dataset'), 'dataset'), s.commit][1]",
    )
    fetched = client(code, name)
    assert fetched.returncode == 0, fetched.stderr
    assert fetched.stdout.strip() == commit_of(server.root / "datasets" / name)
    files = [path for path in server.asked if path.startswith("GET") and f"{NANO[0]}/res" in path]
    assert len(files) == len(set(files)) + 1  # each file once, and the damaged one again


@pytest.mark.parametrize(
    ("arguments", "fault", "message"),
    [
        (("mteb/nothing", "dataset"), None, "has no dataset mteb/nothing"),
        (("mteb/fiqa", "dataset", "v9"), None, "no revision 'v9'"),
        (("mteb/fiqa", "dataset"), "401", "set HF_TOKEN"),
        (("no such folder/x y",), None, "neither a folder nor a hub id"),
    ],
)
def test_a_fault_that_stays_says_what_to_do(server, client, arguments, fault, message):
    if fault:
        server.fail("/api/datasets/mteb/fiqa", fault, 99)
    refused = client(SNAPSHOT, *arguments)
    assert refused.returncode != 0
    assert message in refused.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionResetError(104, "reset"), True),
        (httpx.ReadError("broke off"), True),
        (OSError("Consistency check failed"), True),
        (OSError(28, "No space left on device"), False),
        (KeyboardInterrupt(), False),
        (ValueError("bad name"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error, again, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    assert hub._passes(error) is again
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert not hub._passes(error)


def test_offline_without_a_copy_says_how_to_get_one(client):
    refused = client(SNAPSHOT, "mteb/scidocs", "dataset", offline=True)
    assert "make fetch" in refused.stderr.strip().splitlines()[-1]


def test_a_folder_is_itself_and_its_commit_follows_its_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = hub.snapshot(str(tmp_path))
    assert before.folder == tmp_path and before.commit.startswith("sha256:")
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert hub.snapshot(str(tmp_path)).commit != before.commit


def test_the_repositories_of_the_paper_profile_are_all_listed_once():
    listed = hub.repositories(load_profile("paper"))
    assert len(listed) == len(set(listed))
    names = {name for _, name, _ in listed}
    assert names >= {TEACHER, "mteb/scifact", "mteb/nfcorpus", "zeta-alpha-ai/NanoTouche2020"}
    released = load_profile("paper").model_copy(update={"training_data": "released"})
    names = {name for _, name, _ in hub.repositories(released)}
    assert names >= set(ROWS.values()) and TEACHER not in names
    assert hub.repositories(load_profile("quick")) == []


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("nano:fiqa", ("zeta-alpha-ai/NanoFiQA2018", None)),
        ("beir:scifact@0228b52", ("mteb/scifact", "0228b52")),
        ("beir:touche", ("mteb/touche2020", None)),
    ],
)
def test_a_collections_repository(name, repository):
    assert hub.collection_repository(name) == repository


@pytest.mark.parametrize("name", ["nano:nothing", "beir:A B", "beir:scifact@", "beir:"])
def test_a_name_of_no_repository_is_refused(name):
    with pytest.raises(UserError):
        hub.collection_repository(name)


def test_fetching_writes_its_list_last(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    profile = SimpleNamespace(folder=folder)
    entries = [("model", "a/b", None), ("model", "c/d", None)]
    monkeypatch.setattr(hub, "repositories", lambda _: entries)
    monkeypatch.setattr(hub, "_verify", lambda *_: None)

    def snapshot(name, kind, revision):
        if name == "c/d" and not folder.exists():
            raise UserError("no")
        return hub.Snapshot(name, "1" * 40, tmp_path)

    monkeypatch.setattr(hub, "snapshot", snapshot)
    with pytest.raises(UserError):
        hub.fetch(profile)
    assert not (folder / "fetched.json").exists()
    folder.mkdir()
    assert hub.fetch(profile) == {"a/b": "1" * 40, "c/d": "1" * 40}
    assert (folder / "fetched.json").exists()
