"""Writing that survives failures and kills; settings that say whether a folder is up to date."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from l2p_utils import files
from l2p_utils.files import (
    PROVENANCE,
    ROOT,
    UserError,
    atomic_path,
    cache_folder,
    locked,
    read_json,
    settings_match,
    write_json,
)

KIND = pytest.mark.parametrize("kind", ["file", "folder"])


def make(path, text, kind):
    if kind == "folder":
        path.mkdir()
    inside(path, kind).write_text(text)


def inside(path, kind):
    return path / "inside.txt" if kind == "folder" else path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start(script, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, text=True, **options)


@KIND
def test_the_new_one_replaces_the_old_one_whole_when_the_block_ends(tmp_path, kind):
    target = tmp_path / "new" / "out.x"
    for text in ("old", "new"):
        with atomic_path(target) as temporary:
            assert temporary.suffix == ".x" and temporary.parent == target.parent
            make(temporary, text, kind)
            assert text == "old" or inside(target, kind).read_text() == "old"
        assert inside(target, kind).read_text() == text
        assert names(tmp_path / "new") == ["out.x"]


@KIND
@pytest.mark.parametrize("raised", [ValueError("bad"), KeyboardInterrupt()])
def test_failure_keeps_the_old_one_and_leaves_no_temporary(tmp_path, kind, raised):
    target = tmp_path / "out"
    make(target, "old", kind)
    with pytest.raises(type(raised)), atomic_path(target) as temporary:
        make(temporary, "half", kind)
        raise raised
    assert inside(target, kind).read_text() == "old" and names(tmp_path) == ["out"]


@KIND
@pytest.mark.parametrize("name", ["out.json", "docs-scipy+x.y(1)[2].json", "合同 v1"])
def test_after_a_kill_the_old_one_is_whole_and_the_next_write_sweeps(tmp_path, kind, name):
    target, other = tmp_path / name, tmp_path / f"other-{name}"
    make(target, "old", kind)
    for path in (target, other):
        script = f"""
import os, signal
from l2p_utils.files import atomic_path
with atomic_path({str(path)!r}) as temporary:
    if {kind == "folder"}:
        temporary.mkdir()
        (temporary / "inside.txt").write_text("half")
    else:
        temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
        assert start(script).wait() == -signal.SIGKILL
    assert inside(target, kind).read_text() == "old" and len(names(tmp_path)) == 3
    with atomic_path(target) as temporary:
        make(temporary, "new", kind)
    assert inside(target, kind).read_text() == "new"
    assert len(names(tmp_path)) == 2  # what is left of the other path is not ours


def test_what_a_live_process_or_another_machine_writes_is_left_alone(tmp_path):
    target = tmp_path / "rows.csv"
    foreign = tmp_path / f".rows.other_{files.HOST}-1-0123abcd.tmp.csv"
    foreign.write_text("theirs")
    script = f"""
from l2p_utils.files import atomic_path
with atomic_path({str(target)!r}) as temporary:
    temporary.write_text("theirs")
    print("at work", flush=True)
    input()
"""
    writer = start(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout.readline() == "at work\n"
    with atomic_path(target) as temporary:
        temporary.write_text("ours")
    assert len(names(tmp_path)) == 3 and target.read_text() == "ours"
    writer.communicate("\n")
    assert writer.returncode == 0 and target.read_text() == "theirs"
    assert names(tmp_path) == sorted([foreign.name, "rows.csv"])


def test_a_lock_lets_one_process_in_and_goes_with_it_when_killed(tmp_path, capsys):
    lock = tmp_path / "deep" / "it.lock"
    script = f"""
import time
from l2p_utils.files import locked
with locked({str(lock)!r}, "works"):
    print("inside", flush=True)
    time.sleep(60)
"""
    holder = start(script, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "inside\n"
    subprocess.Popen(["/bin/sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    before = time.monotonic()
    with locked(lock, "makes the baseline"):
        assert time.monotonic() - before > 0.5
    holder.communicate()
    assert (
        "Waiting for another process that makes the baseline (it.lock)" in capsys.readouterr().out
    )


def test_json_comes_back_as_written(tmp_path):
    value = {"name": "Touché", "factors": [1, 2], "none": None}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("content", [b'{"a": ', b"", b"\xff\xfe{"])
def test_broken_json_is_named(tmp_path, content):
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


@pytest.mark.parametrize("content", [None, '{"settings": {"se', "", "[]", "3", '{"other": 1}'])
def test_missing_or_broken_provenance_matches_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / PROVENANCE).write_text(content)
    assert not settings_match(tmp_path, {}) and not settings_match(tmp_path / "absent", {})


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("L2P_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("L2P_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "l2p"
