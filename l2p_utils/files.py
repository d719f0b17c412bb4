"""Files that are either whole or absent; beside the contents of a folder, what made them."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

ROOT = Path(__file__).parent.parent
PROVENANCE = "provenance.json"
HOST = re.sub(r"\W+", "_", socket.gethostname())[:40]  # a shared folder has writers of several


class UserError(ValueError):
    """A mistake that the user can mend: says what was given, what was expected, what to do."""


def command(main: Callable) -> Callable[..., int]:
    """`main` of a command: prints a UserError without a traceback, and gives an exit status."""

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments) or 0
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
            return 1

    return run


def from_root(path: str | Path) -> Path:
    """`path` relative to the project's root, wherever a notebook runs; absolute paths stay."""
    return ROOT / Path(path).expanduser()


def cache_folder() -> Path:
    """What profiles share on this machine: $L2P_CACHE, or ~/.cache/l2p."""
    return Path(os.environ.get("L2P_CACHE") or "~/.cache/l2p").expanduser()


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, for a file or a folder; rename it when the block ends.

    If the block raises, what stood at `path` stays. A kill leaves the temporary, which the next
    write of the same path deletes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(path)
    token = f"{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = path.with_name(f".{path.stem}.{token}.tmp{path.suffix}")
    try:
        yield temporary
        if path.is_dir():  # a folder cannot be replaced in one step
            aside = path.with_name(f".{path.stem}.{token}-old.tmp{path.suffix}")
            os.rename(path, aside)
            os.rename(temporary, path)
            remove(aside)
        else:
            os.replace(temporary, path)
    finally:
        remove(temporary)


def _delete_leftovers(path: Path) -> None:
    """Delete what killed processes of this machine left of `path`; live ones keep theirs."""
    pattern = f".{glob.escape(path.stem)}.{HOST}-*.tmp{glob.escape(path.suffix)}"
    for leftover in path.parent.glob(pattern):
        process = re.search(rf"\.{HOST}-(\d+)-[0-9a-f]{{8}}", leftover.name)
        if process and not Path("/proc", process[1]).exists():
            remove(leftover)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a UserError names one that is broken."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}). Delete it and run again.") from error


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_match(folder: str | Path, settings: dict[str, Any]) -> bool:
    """Whether `folder` was made with exactly these `settings`, as its provenance.json says.

    Tuples equal lists, as in JSON. No or unreadable provenance, which is written last, is a "no".
    """
    try:
        stored = read_json(Path(folder) / PROVENANCE)
    except (OSError, UserError):
        return False
    return isinstance(stored, dict) and stored.get("settings") == json.loads(json.dumps(settings))


@contextlib.contextmanager
def locked(path: str | Path, doing: str) -> Iterator[None]:
    """Let one process at a time into the block; others wait and say for what ("makes …").

    `path` is the lock's file. A lock goes with its process, also when that is killed.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tqdm.write(f"Waiting for another process that {doing} ({Path(path).name}).")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def versions() -> str:
    """The libraries that results depend on, as result rows store them."""
    names = ["torch", "pylate", "fast-plaid", "scikit-learn", "scipy"]
    return ";".join(f"{name}={version(name)}" for name in names)
