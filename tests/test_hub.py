"""Fetching repositories: what passes is tried again, the rest is told; nothing half is used."""

import errno
import hashlib
import os
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub import errors

from l2p_utils import hub, hub_faults
from l2p_utils.files import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = {"config.json": b"{}", "model.safetensors": b"weights" * 100}


def blob_id(content):
    """As `git hash-object` has it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """Stands in for the two calls of huggingface_hub; fails as told, once for each fault."""

    def __init__(self, folder):
        self.folder, self.faults, self.calls = folder / COMMIT, [], []
        self.content = dict(CONTENT)

    def repo_info(self, repository, repo_type, revision, files_metadata):
        self._call("info")
        sha = hashlib.sha256(CONTENT["model.safetensors"]).hexdigest()
        lfs = {"model.safetensors": SimpleNamespace(sha256=sha)}
        files = [
            SimpleNamespace(
                rfilename=name, size=len(content), lfs=lfs.get(name), blob_id=blob_id(content)
            )
            for name, content in CONTENT.items()
        ]
        return SimpleNamespace(sha=COMMIT, siblings=files)

    def snapshot_download(self, repository, repo_type, revision, allow_patterns):
        assert revision == COMMIT  # the one whose files are known
        self._call("download")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.content.items():
            if not (self.folder / name).exists():
                (self.folder / name).write_bytes(content)
        return str(self.folder)

    def _call(self, name):
        self.calls.append(name)
        if self.faults:
            raise self.faults.pop(0)


def status(number, kind=errors.HfHubHTTPError, **headers):
    request = httpx.Request("GET", "http://127.0.0.1/api")
    response = httpx.Response(number, headers=headers, request=request)
    return kind(f"{number} for url", response=response)


@pytest.fixture
def remote(monkeypatch, tmp_path):
    fake = Hub(tmp_path / "snapshots")
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    fake.waits = []
    monkeypatch.setattr(hub_faults.time, "sleep", fake.waits.append)
    return fake


def test_a_snapshot_is_the_commits_folder(remote):
    folder = hub.download("owner/name")
    assert folder.name == COMMIT
    assert {path.name for path in folder.iterdir()} == CONTENT.keys()
    assert remote.calls == ["info", "download"]


@pytest.mark.parametrize(
    "fault",
    [status(429), status(500), status(503), httpx.ReadError("reset"), httpx.ConnectTimeout("slow")],
    ids=["429", "500", "503", "reset", "timeout"],
)
@pytest.mark.parametrize("before", ["info", "download"])
def test_what_passes_is_tried_again(remote, fault, before):
    if before == "download":

        def call(name):
            remote.calls.append(name)
            if name == "download" and remote.calls.count("download") == 1:
                raise fault

        remote._call = call
    else:
        remote.faults = [fault]
    assert hub.download("owner/name").name == COMMIT
    assert len(remote.waits) == 1


def test_the_hubs_own_waiting_time_is_kept(remote):
    remote.faults = [status(429, **{"Retry-After": "7"}), status(503)]
    hub.download("owner/name")
    assert remote.waits == [7.0, 2.0]


BUSY = {"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        (BUSY, 56),  # a second more: the hub rounds
        ({**BUSY, "Retry-After": "90"}, 90),
        ({**BUSY, "ratelimit": '"api";r=12;t=55'}, None),  # on every answer: not why it is refused
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
def test_how_long_to_wait_is_read_from_the_headers(headers, wait):
    assert hub_faults.asked_wait(headers) == wait


def test_a_date_to_wait_for_is_the_seconds_until_then():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=120), usegmt=True)
    assert hub_faults.asked_wait({"Retry-After": soon}) == pytest.approx(120, abs=5)


@pytest.mark.parametrize("number", [429, 503])
def test_a_wait_beyond_the_bound_is_refused_with_its_time(remote, number):
    remote.faults = [status(number, **{"Retry-After": "3601"})]
    with pytest.raises(UserError, match="owner/name was not fetched whole before.*Wait 3601 s"):
        hub.download("owner/name")
    assert remote.waits == []


def test_a_hub_that_stays_busy_is_used_from_before(remote):
    folder = hub.download("owner/name")
    remote.faults = [status(429, **BUSY)] * hub_faults.ATTEMPTS
    assert hub.download("owner/name") == folder


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (status(404, errors.RepositoryNotFoundError), ["no model 'owner/name'", "spelling"]),
        (status(404, errors.RevisionNotFoundError), ["no revision 'v9'", "a branch, a tag"]),
        (status(403, errors.GatedRepoError), ["gated", "Accept its licence", "hf auth login"]),
        (status(401), ["refused model owner/name: 401", "hf auth login"]),
    ],
    ids=["repository", "revision", "gated", "401"],
)
def test_what_does_not_pass_is_told_at_once(remote, fault, words):
    remote.faults = [fault]
    with pytest.raises(UserError) as refusal:
        hub.download("owner/name", revision="v9")
    assert all(word in str(refusal.value) for word in ["owner/name", *words])
    assert remote.waits == [] and refusal.value.__cause__ is fault


def no_network():
    return [httpx.ConnectError("no route to host")] * hub_faults.ATTEMPTS


def test_without_a_network_what_was_whole_is_used(remote):
    folder = hub.download("owner/name")
    for faults in (no_network(), [errors.OfflineModeIsEnabled("offline")]):
        remote.faults = faults
        assert hub.download("owner/name") == folder


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_without_a_network_what_is_not_whole_is_refused(remote, damage):
    file = hub.download("owner/name") / "model.safetensors"
    file.write_bytes(b"weights") if damage == "shorter" else file.unlink()
    remote.faults = no_network()
    with pytest.raises(UserError, match="owner/name was not fetched whole before: no route"):
        hub.download("owner/name")


def test_without_a_network_nothing_is_made_up(remote):
    remote.faults = [errors.OfflineModeIsEnabled("offline")]
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set.*l2p_utils.fetch"):
        hub.download("owner/name")
    remote.faults = no_network()
    with pytest.raises(UserError, match="cannot be reached"):
        hub.download("owner/name")
    hub.download("owner/name", patterns=["*.json"])
    remote.faults = no_network()
    with pytest.raises(UserError, match="not fetched whole"):  # only a part of it was
        hub.download("owner/name")


WRONG = [
    ("model.safetensors", b"weights", "7 bytes, expected 700"),
    ("model.safetensors", b"WEIGHTS" * 100, "SHA-256"),
    ("config.json", b"[]", "git's SHA-1"),
]


@pytest.mark.parametrize(("name", "wrong", "found"), WRONG)
def test_a_damaged_file_is_fetched_once_more(remote, name, wrong, found):
    remote.content[name] = wrong
    fetch = remote.snapshot_download

    def once(*arguments, **keywords):
        folder = fetch(*arguments, **keywords)
        remote.content = dict(CONTENT)
        return folder

    hub.snapshot_download = once  # the fixture's monkeypatch puts the real one back
    folder = hub.download("owner/name")
    assert (folder / name).read_bytes() == CONTENT[name]
    assert remote.calls.count("download") == 2


@pytest.mark.parametrize("known", [False, True], ids=["at first", "once it was whole"])
@pytest.mark.parametrize(("name", "wrong", "found"), WRONG)
def test_a_file_that_stays_damaged_is_never_used(remote, name, wrong, found, known):
    if known:
        (hub.download("owner/name") / name).unlink()
    remote.content[name] = wrong
    with pytest.raises(UserError) as refusal:
        hub.download("owner/name")
    assert found in str(refusal.value) and name in str(refusal.value)
    assert not (remote.folder / name).exists()
    assert known or not list(Path(hub.constants.HF_HUB_CACHE).rglob("*.json"))


def test_what_was_verified_is_not_read_again_unless_it_changed(remote, monkeypatch):
    file = hub.download("owner/name") / "model.safetensors"
    read = []
    checksum = hub._checksum
    monkeypatch.setattr(hub, "_checksum", lambda p, kind: read.append(p.name) or checksum(p, kind))
    hub.download("owner/name")
    assert read == []
    file.write_bytes(b"WEIGHTS" * 100)
    os.utime(file, ns=(0, 0))
    hub.download("owner/name")
    assert read == [file.name] * 2 and file.read_bytes() == CONTENT[file.name]


def test_without_a_network_what_changed_is_refused(remote):
    file = hub.download("owner/name") / "config.json"
    file.write_bytes(b"[]")
    os.utime(file, ns=(0, 0))
    remote.faults = no_network()
    with pytest.raises(UserError, match="owner/name was not fetched whole before"):
        hub.download("owner/name")


# Xet's client raises what Rust gives it; texts as users have reported them.
XET = RuntimeError("Data processing error: CAS service error : Request failed after 5 retries")
SHORT = OSError("Consistency check failed: file should be of size 700 but has size 7 (model).")


def failing_downloads(remote, *faults):
    """Listing works; the downloads fail so."""
    left = list(faults)

    def call(name):
        remote.calls.append(name)
        if name == "download" and left:
            raise left.pop(0)

    remote._call = call


@pytest.mark.parametrize(
    "fault", [XET, SHORT, errors.XetDownloadError("gone"), TimeoutError("timed out")]
)
def test_a_transfer_that_breaks_is_tried_again_and_then_told(remote, fault):
    failing_downloads(remote, fault)
    assert hub.download("owner/name").name == COMMIT
    assert remote.waits == [1.0]
    failing_downloads(remote, *[fault] * hub_faults.ATTEMPTS)
    with pytest.raises(UserError) as refusal:
        hub.download("owner/other", "dataset")
    told = str(refusal.value)
    assert all(word in told for word in ["owner/other", str(fault)[:20], "HF_HUB_DISABLE_XET=1"])


def test_an_answer_hidden_in_a_missing_entry_is_found(remote):
    hidden = errors.LocalEntryNotFoundError("cannot find the requested files")
    hidden.__cause__ = status(503)
    failing_downloads(remote, hidden)
    assert hub.download("owner/name").name == COMMIT
    assert len(remote.waits) == 1


@pytest.mark.parametrize(
    "fault",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("Data processing error: I/O error: No space left on device (os error 28)"),
    ],
    ids=["number", "text"],
)
def test_a_full_disk_is_told_at_once(remote, fault):
    failing_downloads(remote, fault)
    with pytest.raises(UserError, match=r"The disk is full: .*cache.*owner/name.*HF_HOME"):
        hub.download("owner/name")
    assert remote.waits == []


def test_a_fault_of_our_own_is_not_hidden(remote):
    failing_downloads(remote, RecursionError("too deep"))
    with pytest.raises(RecursionError):
        hub.download("owner/name")


def test_patterns_choose_the_files(remote):
    hub.download("owner/name", patterns=["*.json"])
    with pytest.raises(UserError, match=r"no file that matches \['\*\.csv'\]"):
        hub.download("owner/name", patterns=["*.csv"])


def test_a_folder_is_itself_and_everything_else_an_id(remote, tmp_path):
    assert hub.local_folder(str(tmp_path)) == tmp_path and remote.calls == []
    assert hub.local_folder("owner/name").name == COMMIT
    assert hub.is_hub_id("owner/name")
    assert not hub.is_hub_id(str(tmp_path)) and not hub.is_hub_id("a/b/c")
