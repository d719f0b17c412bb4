"""Writing that survives a kill: temporary sibling first, rename last; and reading what was written.

Beside a result stand the settings that made it. A reader of these files sees either the whole
output or none of it, never half. What a killed process left is cleared up with the next write or
read of the same name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm

PROVENANCE = "provenance.json"
# Part of a temporary's name: a process of another machine cannot be asked whether it is alive.
HOST = re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname())[:40]
FULL_DISK = (  # how libraries put it that do not pass on the error's number
    os.strerror(errno.ENOSPC),
    "(os error 28)",  # safetensors: "... I/O error: ... (os error 28)"
    "PytorchStreamWriter failed writing",  # torch.save: less was written than was to be
    "unexpected pos ",
    "basic_ios::clear: iostream error",
)


class UserError(ValueError):
    """Something that the caller can mend: says what was given, what was expected and what to do."""


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` when the block succeeds.

    The block may make a file or a folder of it. If the block raises, the temporary is deleted and
    what stood at `path` before stays untouched. An existing folder is moved aside for the instant
    of the rename, since a folder cannot be replaced in one step. See `recover` for what happens
    after a kill.

    Raises
    ------
    UserError
        When the disk is full, naming the path and that finished results are kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    token = f"{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = _temporary(path, token)
    try:
        with full_disk_told(path):
            yield temporary
            if not temporary.exists():
                raise RuntimeError(f"nothing was written to {temporary} for {path}")
            if path.is_dir():
                _replace_folder(temporary, path, _aside(path, token))
            else:
                os.replace(temporary, path)
    finally:
        remove(temporary)


@contextlib.contextmanager
def full_disk_told(path: str | Path) -> Iterator[None]:
    """While the block writes `path`, turn any library's error about a full disk into a UserError.

    Raises
    ------
    UserError
        When the disk is full, naming the path and that finished results are kept.
    """
    try:
        yield
    except Exception as error:
        if disk_is_full(error):
            raise UserError(
                f"The disk is full: {path} could not be written. What was finished before is kept; "
                "free some space (`make clean` removes runs/) and start the same command again."
            ) from error
        raise


def _replace_folder(new: Path, path: Path, aside: Path) -> None:
    os.rename(path, aside)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(aside, path)
        raise
    remove(aside)


def _temporary(path: Path, token: str) -> Path:
    return path.with_name(f".{path.stem}.{token}.tmp{path.suffix}")


def _aside(path: Path, token: str) -> Path:
    return path.with_name(f".{path.name}.{token}.old")


def recover(path: str | Path) -> None:
    """Clear up beside `path` what processes of this machine left there when they were killed.

    Killed between the two renames that replace a folder, one leaves no `path`: the new folder,
    which was finished, gets its name, or else the old one gets it back. All else of the dead is
    deleted. What a live process writes is left alone, and so is what comes from another machine.
    """
    path = Path(path)
    with contextlib.suppress(OSError):  # no such folder, not ours to change, or another was faster
        for token in _tokens_of_the_dead(path):
            new, old = _temporary(path, token), _aside(path, token)
            if old.exists() and not path.exists():
                os.rename(new if new.exists() else old, path)
            remove(new)
            remove(old)


def _tokens_of_the_dead(path: Path) -> list[str]:
    token = rf"({HOST}-(\d+)-[0-9a-f]{{8}})"
    ours = re.compile(
        rf"\.{re.escape(path.stem)}\.{token}\.tmp{re.escape(path.suffix)}"
        rf"|\.{re.escape(path.name)}\.{token}\.old"
    )
    found = filter(None, map(ours.fullmatch, os.listdir(path.parent)))
    pairs = {(match[1] or match[3], int(match[2] or match[4])) for match in found}
    return sorted(token for token, process in pairs if not _is_alive(process))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; no number of a process
        return True
    return True


def disk_is_full(error: Exception) -> bool:
    """Whether an error means so: by its number, or by its text where a library wraps the number."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(sign in str(error) for sign in FULL_DISK)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    UserError
        When the file is not JSON (half-written by another program, edited by hand).
    """
    path = Path(path)
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}). Delete it and run again to make it anew."
        ) from error


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_match(folder: str | Path, settings: dict[str, Any]) -> bool:
    """Whether `folder` was made with exactly these `settings` (as its provenance.json tells).

    `settings` is compared after a round trip through JSON, so tuples equal lists. A missing or
    unreadable provenance counts as "no": the stage is then made again. A folder that a kill left
    under another name is first put back (see `recover`).
    """
    recover(folder)
    provenance = Path(folder) / PROVENANCE
    if not provenance.is_file():
        return False
    try:
        stored = read_json(provenance)
    except UserError:
        return False
    return isinstance(stored, dict) and stored.get("settings") == json.loads(json.dumps(settings))


@contextlib.contextmanager
def locked(path: str | Path, doing: str) -> Iterator[None]:
    """Let one process at a time into the block; a killed one leaves no lock behind.

    Parameters
    ----------
    path
        The lock's file.
    doing
        What is done in the block, for those that wait: "finds candidates".

    Raises
    ------
    UserError
        When the file system has no locks.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            _lock(file, doing)
        except OSError as error:
            raise UserError(
                f"{path} cannot be locked ({error}), but jobs that start at once need a lock. "
                "Expected runs/ on a file system with flock; a shared one may need it switched on "
                "(NFS: version 4, or lockd; Lustre: the mount option flock)."
            ) from error
        yield


def _lock(file: TextIO, doing: str) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of them: the system decides
        tqdm.write(f"Waiting for another process that {doing} ({Path(file.name).name}).")
        fcntl.lockf(file, fcntl.LOCK_EX)


def versions() -> str:
    """The libraries that results depend on, as rows keep them."""
    names = ["torch", "pylate", "fast-plaid", "scikit-learn", "scipy"]
    return ";".join(f"{name}={version(name)}" for name in names)


ROOT = Path(__file__).parent.parent


def from_root(path: str | Path) -> Path:
    """`path` as seen from the project's root, wherever a notebook runs; absolute ones stay."""
    return ROOT / Path(path).expanduser()
