"""The hub: repositories brought here whole, or an error that says which, why and what to do.

Takes a repository's id; gives the folder of one commit in the hub's own cache. What was fetched
whole once is used again when the network is gone.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from l2p_utils.files import UserError, read_json, remove, sha256, write_json
from l2p_utils.hub_faults import NO_NETWORK, PASSING, TransferBroke, patiently, told, transfer

logger = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
MANIFESTS = "l2p"  # folder in the hub's cache: one file for each snapshot that is whole
FORMAT = 2  # of these files; those of another are not read
SHA256, BLOB = "SHA-256", "git's SHA-1"  # what the hub tells of a large file, of any other


class _Damaged(Exception):
    """A file is not what the hub says it is."""


def download(
    repository: str,
    kind: Kind = "model",
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
) -> Path:
    """Fetch a repository (or the files of it that match `patterns`); reuse what is here.

    Failures that pass (too many requests, server errors, broken connections) are tried again,
    after the time that the hub asks for. Sizes are checked, and checksums: the SHA-256 of large
    files, git's of the others; not again of a file that was verified and is as it was since. A
    snapshot that was whole once is used when the hub cannot be reached.

    Returns
    -------
    pathlib.Path
        The snapshot's folder; its name is the commit.

    Raises
    ------
    UserError
        Naming the repository, the cause and the remedy: an unknown repository or revision, one
        that asks for a licence or a login, no network and nothing here, transfers that keep
        breaking, a full disk, a file that stays damaged.
    """
    try:
        wanted = patiently(lambda: _listing(repository, kind, revision, patterns))
        return _fetch(repository, kind, wanted, patterns)
    except GatedRepoError as error:
        raise UserError(
            f"The hub's {kind} {repository} is gated. Accept its licence on its page "
            f"({constants.ENDPOINT}/{repository}), then log in: `hf auth login`, or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"The hub has no {kind} {repository!r} that you may see. Check the spelling "
            "(owner/name); for a private one log in: `hf auth login`, or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"The hub's {kind} {repository} has no revision {revision!r}. Expected a branch, a tag "
            "or a commit of it."
        ) from error
    except (*NO_NETWORK, TransferBroke) as error:
        return _whole_before(repository, kind, revision, patterns, error)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        if status in PASSING:
            return _whole_before(repository, kind, revision, patterns, error)
        raise UserError(
            f"The hub refused {kind} {repository}: {status}. Check that you may read it; log in "
            "with `hf auth login`, or set HF_TOKEN."
        ) from error
    except _Damaged as error:
        raise UserError(
            f"The hub's {kind} {repository} arrived damaged, twice: {error}. Nothing of it was "
            "used. Try again later, or fetch it over another network."
        ) from error


def _listing(
    repository: str, kind: Kind, revision: str | None, patterns: Sequence[str] | None
) -> dict[str, Any]:
    """The commit, and of each wanted file the size, the kind of its checksum, the checksum."""
    info = HfApi().repo_info(repository, repo_type=kind, revision=revision, files_metadata=True)
    chosen = filter_repo_objects(
        info.siblings or [], allow_patterns=patterns, key=lambda file: file.rfilename
    )
    files = {
        file.rfilename: [
            file.size,
            *((SHA256, file.lfs.sha256) if file.lfs else (BLOB, file.blob_id)),
        ]
        for file in chosen
    }
    if not files:
        raise UserError(
            f"The hub's {kind} {repository} has no file that matches {list(patterns or ['*'])}."
        )
    return {"commit": info.sha, "revision": revision, "files": files}


def _fetch(
    repository: str, kind: Kind, wanted: dict[str, Any], patterns: Sequence[str] | None
) -> Path:
    """The snapshot, verified; a file that is damaged is fetched once more."""
    manifest = _manifest(repository, kind, wanted["revision"], patterns)
    what = f"the {kind} {repository}"
    for last in (False, True):
        folder = Path(
            patiently(lambda: transfer(lambda: _snapshot(repository, kind, wanted, patterns), what))
        )
        noted = read_json(manifest) if manifest.is_file() else {"files": {}}
        damage = _damage(folder, wanted["files"], noted)
        if not damage:
            verified = {name: _stamp(folder / name) for name in wanted["files"]}
            write_json(manifest, wanted | {"folder": str(folder), "verified": verified})
            return folder
        for name in damage:
            logger.warning("%s: %s is damaged (%s).", repository, name, damage[name])
            remove((folder / name).resolve())
            remove(folder / name)
        if last:
            raise _Damaged("; ".join(f"{name} ({why})" for name, why in damage.items()))
    raise AssertionError("unreachable")


def _snapshot(
    repository: str, kind: Kind, wanted: dict[str, Any], patterns: Sequence[str] | None
) -> str:
    return snapshot_download(
        repository,
        repo_type=kind,
        revision=wanted["commit"],
        allow_patterns=list(patterns) if patterns else None,
    )


def _damage(folder: Path, files: dict[str, list], noted: dict[str, Any]) -> dict[str, str]:
    """What is wrong with a snapshot's files, by name; `noted` is what its manifest says."""
    found = {}
    for name, (size, kind, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            found[name] = "not there"
        elif size is not None and path.stat().st_size != size:
            found[name] = f"{path.stat().st_size} bytes, expected {size}"
        elif noted["files"].get(name) == files[name] and noted["verified"][name] == _stamp(path):
            continue
        elif checksum and (is_now := _checksum(path, kind)) != checksum:
            found[name] = f"{kind} {is_now[:12]}…, expected {checksum[:12]}…"
    return found


def _stamp(path: Path) -> list[int]:
    """Tells whether a file is as it was: its size, and when it was written (in ns)."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _checksum(path: Path, kind: str) -> str:
    if kind == SHA256:
        return sha256(path)
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: blob).hexdigest()


def _whole_before(
    repository: str,
    kind: Kind,
    revision: str | None,
    patterns: Sequence[str] | None,
    error: Exception,
) -> Path:
    """The snapshot that was whole when the hub could be reached."""
    manifest = _manifest(repository, kind, revision, patterns)
    if manifest.is_file():
        stored = read_json(manifest)
        folder = Path(stored["folder"])
        if not _damage(folder, stored["files"], stored):
            logger.info("%s: the hub cannot be reached; taking commit %s.", repository, folder.name)
            return folder
    raise UserError(told(f"{kind} {repository}", error)) from error


def _manifest(
    repository: str, kind: Kind, revision: str | None, patterns: Sequence[str] | None
) -> Path:
    """Where it is noted that a snapshot is whole: one file for each way of asking."""
    asked = repr((FORMAT, constants.ENDPOINT, kind, repository, revision, sorted(patterns or [])))
    name = f"{repository.replace('/', '--')}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"
    return Path(constants.HF_HUB_CACHE) / MANIFESTS / f"{name}.json"


def is_hub_id(name: str) -> bool:
    """Whether a model or data set is named by a hub id, owner/name, and is no folder here."""
    path = Path(name)
    return name.count("/") == 1 and not path.is_absolute() and not path.exists()


def local_folder(
    name: str,
    revision: str | None = None,
    kind: Kind = "model",
    patterns: Sequence[str] | None = None,
) -> Path:
    """The folder itself if `name` is one, else what `download` brings."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else download(name, kind, revision, patterns)


@dataclass(frozen=True)
class Source:
    """A model or data set as it is here: its name in the profile, its folder and its version.

    `version` is the commit, or the hash of a folder's files.
    """

    name: str
    folder: Path
    version: str

    def __str__(self) -> str:
        return f"{self.name} @ {self.version}"


def find_source(name: str, revision: str | None, kind: Kind = "model") -> Source:
    """A hub repository (fetched if need be) or a folder."""
    folder = local_folder(name, revision, kind)
    return Source(name, folder, folder.name if is_hub_id(name) else _hash_files(folder))


def _hash_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(bytes.fromhex(sha256(path)))
    return f"sha256:{digest.hexdigest()[:16]}"
