"""Everything that a profile needs from the hub, fetched and checked before the first job.

Takes a profile; gives the models that are used as they are (`runs/<profile>/models/baseline` and
others), the collections in their cache, and `runs/<profile>/fetched.json`: repositories and
commits. After this no job asks the network for anything.
``python -m l2p_utils.fetch PROFILE``
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from l2p_utils.collection import carves_dev, load_collection
from l2p_utils.files import UserError, settings_match, write_json
from l2p_utils.hub import Kind, find_source
from l2p_utils.hub_collections import fetch_collection, provenance_of
from l2p_utils.model import CHECKED, load_checkpoint, save_model
from l2p_utils.profile import (
    BASELINE,
    Profile,
    length_name,
    load_profile,
    pinned,
    released_name,
)

FETCHED = "fetched.json"


def fetch(profile: Profile, progress: bool = True) -> dict[str, Any]:
    """Fetch what is not here yet; check models and collections.

    Returns
    -------
    dict
        What `fetched.json` holds: `models` and `data`, each source with its commit.

    Raises
    ------
    UserError
        Naming the repository, the cause and the remedy.
    """
    found: dict[str, Any] = {"profile": profile.name, "models": {}, "data": {}}
    steps = [*_collections(profile), *_rows(profile), *_models(profile), *_scorers(profile)]
    with tqdm(steps, desc=f"Fetching for {profile.name}", disable=not progress) as bar:
        for what, name, work in bar:
            bar.set_postfix_str(name)
            found[what][name] = work()
    write_json(profile.folder / FETCHED, found)
    return found


def _collections(profile: Profile) -> Iterator[tuple]:
    """Each hub collection in all the splits that the profile uses."""
    splits: dict[str, list[str]] = {name: [] for name in profile.hub_collections}
    for name in profile.training_collections:
        if name in splits:
            splits[name].append("train")
            if name not in profile.dev_collections:
                splits[name].append("dev")
    for name, used in splits.items():
        if not used or name in _evaluated(profile):
            used.append("test")

    def load(name: str, used: list[str]) -> dict[str, Any]:
        fetch_collection(name)
        for split in used:
            load_collection(name, split, carve_dev=carves_dev(profile, name))
        return provenance_of(name)

    for name, used in splits.items():
        yield "data", name, functools.partial(load, name, used)


def _evaluated(profile: Profile) -> set[str]:
    return {*profile.evaluation.collections, *(c for job in profile.plaid for c in job.collections)}


def _rows(profile: Profile) -> Iterator[tuple]:
    if profile.training_data == "released":
        for name in profile.training_collections:
            source = profile.released_rows[name]
            yield "data", source, functools.partial(_place, *pinned(source), "dataset")


def _models(profile: Profile) -> Iterator[tuple]:
    """The base model, at each length, and the released ones: as models of the run."""
    if profile.model.bundled:
        return
    lengths = {BASELINE: profile.model.document_length}
    lengths |= {length_name(length): length for length in profile.model.other_document_lengths}
    base = (profile.model.base, profile.model.revision)
    for name, length in lengths.items():
        yield "models", name, functools.partial(prepare, profile, name, *base, length)
    for source in profile.released_models:
        name = released_name(source)
        yield "models", name, functools.partial(prepare, profile, name, *pinned(source))


def _scorers(profile: Profile) -> Iterator[tuple]:
    """Miner and teacher: only brought here; the jobs that use them load and check them."""
    scoring = profile.scoring
    if profile.training_data != "mined" or scoring.teacher == "bundled":
        return
    for name, revision in (
        (scoring.miner, scoring.miner_revision),
        (scoring.teacher, scoring.teacher_revision),
    ):
        yield "models", name, functools.partial(_place, name, revision, "model")


def prepare(
    profile: Profile,
    name: str,
    source: str,
    revision: str | None = None,
    document_length: int | None = None,
) -> dict[str, Any]:
    """Put a checkpoint, checked, among the run's models as it is: `models/<name>`.

    Returns
    -------
    dict
        Its source and commit, as its provenance has them.
    """
    origin = _place(source, revision, "model")
    settings = {
        "model": name,
        "source": source,
        "origin": origin,
        "query_length": profile.model.query_length,
        "document_length": document_length or profile.model.document_length,
        "expected": profile.model.model_dump(include=set(CHECKED)),
    }
    folder = profile.folder / "models" / name
    if not settings_match(folder, settings):
        model = load_checkpoint(source, profile.model, revision, document_length)
        save_model(model, folder, settings)
    return {"source": source, **origin}


def _place(source: str, revision: str | None, kind: Kind) -> dict[str, str | None]:
    """The revision that was asked for, and the commit; of a folder the hash of its files."""
    return {"revision": revision, "commit": find_source(source, revision, kind).version}


def main(arguments: list[str] | None = None) -> int:
    """Fetch for a profile from the command line."""
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.fetch", description=main.__doc__)
    parser.add_argument("profile")
    options = parser.parse_args(arguments)
    try:
        profile = load_profile(options.profile)
        if not profile.needs_hub:
            print(f"The profile {profile.name!r} needs nothing from the hub.")
            return 0
        found = fetch(profile)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    for what in ("data", "models"):
        for name, origin in found[what].items():
            print(f"  {name:<60} {_short(origin)}")
    print(f"Fetched: {_relative(profile.folder / FETCHED)} lists repositories and commits.")
    return 0


def _short(origin: dict[str, Any]) -> str:
    commits = origin.get("repositories") or {"": origin.get("commit")}
    return ", ".join(str(commit)[:16] for commit in commits.values())


def _relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
