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
    recover,
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


def killed(script):
    """Run `script` in another process, which must end by killing itself."""
    start = "import os, signal\nfrom l2p_utils import files\n"
    kill = "def kill(*_):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    done = subprocess.run(
        [sys.executable, "-c", start + kill + script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == -signal.SIGKILL


def write(path, before_the_end):
    """A script that writes "new" to `path`, a folder or a file, and does something at the end."""
    target = "temporary" if path.suffix else "temporary / 'inside.txt'"
    return f"""
with files.atomic_path({str(path)!r}) as temporary:
    {"pass" if path.suffix else "temporary.mkdir()"}
    ({target}).write_text("new")
    {before_the_end}
"""


BETWEEN_THE_RENAMES = "rename = os.rename; os.rename = lambda a, b: (rename(a, b), kill())"
BEFORE_THE_OLD_IS_DELETED = "files.remove = kill"


@pytest.mark.parametrize("name", ["rows.csv", "model", "docs-scipy+x.y(1).json"])
def test_the_next_write_sweeps_what_a_killed_process_left(tmp_path, name):
    other = tmp_path / f"other-{name}"
    for path in (tmp_path / name, other):
        killed(write(path, "kill()"))
    assert len(names(tmp_path)) == 2 and not (tmp_path / name).exists()
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("new")
    assert name in names(tmp_path) and len(names(tmp_path)) == 2  # the other's is not ours
    recover(other)
    assert names(tmp_path) == [name]


def test_a_finished_folder_takes_its_place_after_a_kill_between_the_renames(tmp_path):
    target = tmp_path / "model"
    fill(target, "old")
    killed(write(target, BETWEEN_THE_RENAMES))
    assert not target.exists() and len(names(tmp_path)) == 2
    recover(target)
    assert (target / "inside.txt").read_text() == "new"
    assert names(tmp_path) == ["model"]


def test_reading_the_settings_finds_what_a_kill_left_under_another_name(tmp_path):
    target = tmp_path / "model"
    fill(target, "old")
    write_json(target / PROVENANCE, {"settings": {"seed": 1}})
    killed(f"os.rename({str(target)!r}, files._aside(files.Path({str(target)!r}), "
           "f'{files.HOST}-{os.getpid()}-0123abcd'))\nkill()")  # fmt: skip
    assert not target.exists()
    assert settings_match(target, {"seed": 1})
    assert (target / "inside.txt").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_an_old_folder_that_was_to_be_deleted_is(tmp_path):
    target = tmp_path / "model"
    fill(target, "old")
    killed(write(target, BEFORE_THE_OLD_IS_DELETED))
    assert len(names(tmp_path)) == 2
    assert not settings_match(target, {})
    assert names(tmp_path) == ["model"] and (target / "inside.txt").read_text() == "new"


def test_what_a_live_process_or_another_machine_writes_is_left_alone(tmp_path):
    target = tmp_path / "rows.csv"
    foreign = tmp_path / f".rows.other_{files.HOST}-1-0123abcd.tmp.csv"
    foreign.write_text("theirs")
    waiting = write(target, "print('at work', flush=True); input()")
    script = f"from l2p_utils import files\n{waiting}"
    writer = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout.readline() == "at work\n"
    with atomic_path(target) as temporary:
        temporary.write_text("ours")
        recover(target)  # nor our own
    assert len(names(tmp_path)) == 3 and target.read_text() == "ours"
    writer.communicate("\n")
    assert writer.returncode == 0 and target.read_text() == "new"
    assert names(tmp_path) == sorted([foreign.name, "rows.csv"])


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
