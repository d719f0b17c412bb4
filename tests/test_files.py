"""Writing that survives failures, full disks and kills; settings that tell whether to make anew."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from l2p_utils import files
from l2p_utils.files import (
    PROVENANCE,
    UserError,
    atomic_path,
    read_json,
    settings_match,
    write_json,
)

ROOT = Path(__file__).parents[1]


def fill(folder, text):
    folder.mkdir()
    (folder / "inside.txt").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_under_its_name_only_when_the_block_is_done(tmp_path):
    target = tmp_path / "new" / "rows.csv"
    with atomic_path(target) as temporary:
        assert temporary.suffix == ".csv" and temporary.parent == target.parent
        temporary.write_text("a,b")
        assert not target.exists()
    assert target.read_text() == "a,b"
    assert names(target.parent) == ["rows.csv"]


def test_file_replaces_the_old_one(tmp_path):
    target = tmp_path / "rows.csv"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "model"
    fill(target, "old")
    (target / "only_in_old.txt").write_text("x")
    with atomic_path(target) as temporary:
        fill(temporary, "new")
        assert (target / "inside.txt").read_text() == "old"
    assert (target / "inside.txt").read_text() == "new"
    assert names(target) == ["inside.txt"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("raised", [ValueError("bad"), KeyboardInterrupt()])
def test_failure_keeps_the_old_one_and_leaves_no_temporary(tmp_path, kind, raised):
    target = tmp_path / "out"
    make = fill if kind == "folder" else Path.write_text
    make(target, "old")
    with pytest.raises(type(raised)), atomic_path(target) as temporary:
        make(temporary, "half")
        raise raised
    kept = target / "inside.txt" if kind == "folder" else target
    assert kept.read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_folder_that_cannot_be_renamed_is_put_back(tmp_path, monkeypatch):
    target = tmp_path / "model"
    fill(target, "old")
    rename = os.rename

    def broken(source, destination):
        if Path(destination) == target and ".tmp" in Path(source).name:
            raise PermissionError("no")
        rename(source, destination)

    monkeypatch.setattr(files.os, "rename", broken)
    with pytest.raises(PermissionError), atomic_path(target) as temporary:
        fill(temporary, "new")
    assert (target / "inside.txt").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="nothing was written"), atomic_path(tmp_path / "a.txt"):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left (os error 28) at path"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
)
def test_full_disk_says_what_to_do_and_keeps_the_old_file(tmp_path, monkeypatch, error):
    target = tmp_path / "rows.csv"
    target.write_text("old")

    def full(self, *args, **kwargs):
        with open(self, "w") as file:
            file.write("ha")
        raise error

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="disk is full: .*rows.csv.*free some space"):
        write_json(target, {"a": 1})
    monkeypatch.undo()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["rows.csv"]


def test_another_os_error_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), atomic_path(tmp_path / "rows.csv"):
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_kill_in_the_middle_leaves_the_old_output_readable(tmp_path, kind):
    target = tmp_path / "out.json"
    script = f"""
import os, signal, sys
from pathlib import Path
from l2p_utils.files import atomic_path
with atomic_path({str(target)!r}) as temporary:
    if {kind == "folder"}:
        temporary.mkdir()
        temporary = temporary / "inside.txt"
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    if kind == "folder":
        fill(target, "old")
    else:
        target.write_text("old")
    killed = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert killed.returncode == -signal.SIGKILL
    kept = target / "inside.txt" if kind == "folder" else target
    assert kept.read_text() == "old"
    with atomic_path(target) as temporary:  # and the next run goes on
        fill(temporary, "new") if kind == "folder" else temporary.write_text("new")
    assert kept.read_text() == "new"


def test_json_comes_back_as_written(tmp_path):
    value = {"name": "Touché", "factors": [1, 2], "none": None}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("content", [b'{"a": ', b"", b"\xff\xfe{"])
def test_half_written_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json is not valid JSON.*Delete it"):
        read_json(tmp_path / "a.json")


def test_settings_match_only_when_all_are_equal(tmp_path):
    write_json(tmp_path / PROVENANCE, {"settings": {"seed": 1, "factors": (1, 2)}, "rows": 7})
    assert settings_match(tmp_path, {"factors": (1, 2), "seed": 1})
    assert settings_match(tmp_path, {"factors": [1, 2], "seed": 1})
    assert not settings_match(tmp_path, {"factors": [1, 2], "seed": 2})
    assert not settings_match(tmp_path, {"factors": [1, 2]})
    assert not settings_match(tmp_path, {"factors": [1, 2], "seed": 1, "new": None})


@pytest.mark.parametrize(
    "content", [None, '{"settings": {"se', "", "[]", "null", "3", '{"other": 1}']
)
def test_missing_or_half_written_provenance_matches_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / PROVENANCE).write_text(content)
    assert not settings_match(tmp_path, {"seed": 1})
    assert not settings_match(tmp_path, {})


def test_settings_of_a_missing_folder_match_nothing(tmp_path):
    assert not settings_match(tmp_path / "absent", {"seed": 1})
