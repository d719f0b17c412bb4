"""The hub: repositories brought here whole, or an error that says which, why and what to do.

Takes a repository's id; gives the folder of one commit in the hub's own cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download

Kind = Literal["model", "dataset"]


def download(
    repository: str,
    kind: Kind = "model",
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
) -> Path:
    """Fetch a repository (or the files of it that match `patterns`); reuse what is here.

    Returns
    -------
    pathlib.Path
        The snapshot's folder; its name is the commit.
    """
    return Path(
        snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=patterns)
    )


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
