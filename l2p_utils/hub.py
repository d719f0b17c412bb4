"""Models and data sets of the hub: fetched whole, then read from its cache without a network.

``python -m l2p_utils.hub PROFILE`` (``make fetch``) brings everything that a profile needs; all
other jobs read the cache.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import tenacity
from huggingface_hub import HfApi, constants, errors, snapshot_download

from l2p_utils.files import UserError, command, remove, sha256, write_json
from l2p_utils.profile import HUB, Profile, load_profile, pinned

Kind = Literal["model", "dataset"]
NANO = {
    "arguana": "NanoArguAna", "climatefever": "NanoClimateFEVER", "dbpedia": "NanoDBPedia",
    "fever": "NanoFEVER", "fiqa": "NanoFiQA2018", "hotpotqa": "NanoHotpotQA",
    "msmarco": "NanoMSMARCO", "nfcorpus": "NanoNFCorpus", "nq": "NanoNQ",
    "quora": "NanoQuoraRetrieval", "scidocs": "NanoSCIDOCS", "scifact": "NanoSciFact",
    "touche": "NanoTouche2020",
}  # fmt: skip
BEIR = {"climatefever": "climate-fever", "touche": "touche2020", "webis-touche2020": "touche2020"}
BUSY = (408, 429, 500, 502, 503, 504)
NETWORK = (httpx.HTTPError, OSError)  # the hub's own errors are among these
# Weights in other formats than the one that is loaded.
UNUSED = ["*.onnx", "onnx/*", "openvino/*", "*.h5", "*.msgpack", "*.ot", "*.gguf"]


@dataclass(frozen=True)
class Snapshot:
    """A repository's files: its name, the commit (of a folder: a hash of its files), the folder."""

    name: str
    commit: str
    folder: Path


def is_hub_id(name: str) -> bool:
    """Whether `name` reads ``owner/name`` and is no folder here."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def snapshot(repository: str, kind: Kind = "model", revision: str | None = None) -> Snapshot:
    """A repository of the hub, whole: fetched, or from the cache when offline; or a local folder.

    `repository` is ``owner/name``, or a folder, which is taken as it is; `revision` a commit,
    branch or tag, or None for the newest, offline the newest that was fetched. UserError when there
    is no such repository or revision, it may not be read, or the network fails.
    """
    folder = Path(repository).expanduser()
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)} {sha256(path)}\n".encode())
        return Snapshot(repository, f"sha256:{digest.hexdigest()}", folder)
    if not is_hub_id(repository):
        raise UserError(f"{repository!r} is neither a folder nor a hub id (owner/name).")
    asked = {"repo_type": kind, "revision": revision}
    try:
        found = Path(_download(repository, **asked, ignore_patterns=UNUSED))
    except (*NETWORK, ValueError) as error:
        raise UserError(_explain(repository, kind, revision, error)) from error
    return Snapshot(repository, found.name, found)


def _passes(error: BaseException) -> bool:
    """Whether trying again may help: the hub is busy or out of reach, or a connection broke."""
    response = getattr(error, "response", None)
    if constants.HF_HUB_OFFLINE or (response is not None and response.status_code not in BUSY):
        return False
    if isinstance(error, httpx.ConnectError):  # nobody is there
        return False
    if isinstance(error, ConnectionError):
        return True
    # an OSError with a number comes from this machine: its disk is full, or may not be written
    return isinstance(error, NETWORK) and not getattr(error, "errno", None)


# huggingface_hub itself tries a file again, but not the question which files exist.
_patient = tenacity.retry(
    retry=tenacity.retry_if_exception(_passes),
    wait=tenacity.wait_exponential(multiplier=0.5, max=60),
    stop=tenacity.stop_after_attempt(8),
    reraise=True,
)
_download = _patient(snapshot_download)


def _explain(repository: str, kind: Kind, revision: str | None, error: Exception) -> str:
    what = f"the {kind} {repository}" + (f" at {revision}" if revision else "")
    if isinstance(error, errors.RevisionNotFoundError):
        return f"The hub has no revision {revision!r} of the {kind} {repository}. Check its name."
    if isinstance(error, errors.GatedRepoError):
        return (
            f"The hub lets only some read {what}. Accept its terms on its page, then set HF_TOKEN "
            "to a token of your account."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"The hub has no {kind} {repository}, or it is private. Check the name; for a private "
            "one set HF_TOKEN to a token that may read it."
        )
    if constants.HF_HUB_OFFLINE:
        return f"There is no copy of {what} here. Run `make fetch PROFILE=<profile>` first."
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"Could not fetch {what}: {reason}. Try again; what is here already is kept."


def collection_repository(name: str) -> tuple[str, str | None]:
    """The repository and revision of a hub collection.

    ``nano:scifact`` is ``zeta-alpha-ai/NanoSciFact``, ``beir:scifact@main`` ``mteb/scifact`` at
    main. UserError for an unknown NanoBEIR set, an impossible name, or an empty revision.
    """
    family, _, rest = name.partition(":")
    dataset, at, revision = rest.partition("@")
    if family == "nano" and dataset not in NANO:
        known = ", ".join(f"nano:{known}" for known in NANO)
        raise UserError(f"There is no collection nano:{dataset}. Known are: {known}.")
    if f"{family}:" not in HUB or not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", dataset):
        raise UserError(f"{name!r} names no hub collection; expected nano:scifact, beir:scifact, …")
    if at and not revision:
        raise UserError(f"{name!r}: its revision is empty; expected {family}:{dataset}@<revision>.")
    owner = "zeta-alpha-ai" if family == "nano" else "mteb"
    return f"{owner}/{(NANO if family == 'nano' else BEIR).get(dataset, dataset)}", revision or None


def repositories(profile: Profile) -> list[tuple[Kind, str, str | None]]:
    """Everything that a profile takes from the hub: (kind, repository, revision), each once."""
    scoring, mined = profile.scoring, profile.training_data == "mined"
    found: list[tuple[Kind, str, str | None]] = [
        ("dataset", *collection_repository(name)) for name in profile.hub_collections
    ]
    found.append(("model", profile.model.base, profile.model.revision))
    found += [("model", *pinned(source)) for source in profile.released_models]
    if mined:
        found.append(("model", scoring.miner, scoring.miner_revision))
        found.append(("model", scoring.teacher, scoring.teacher_revision))
    else:
        rows = (profile.released_rows[name] for name in profile.training_collections)
        found += [("dataset", *pinned(source)) for source in rows]
    return [entry for entry in dict.fromkeys(found) if is_hub_id(entry[1])]


def fetch(profile: Profile) -> dict[str, str]:
    """Bring everything here that a profile takes from the hub; repository → commit.

    Also written to ``runs/<profile>/fetched.json``, last.
    """
    commits = {}
    for kind, repository, revision in repositories(profile):
        found = snapshot(repository, kind, revision)
        _verify(found, kind)
        commits[repository] = found.commit
        print(f"{kind:<8} {repository}  {found.commit[:12]}", flush=True)
    write_json(profile.folder / "fetched.json", commits)
    return commits


def _verify(found: Snapshot, kind: Kind) -> None:
    """Compare the files' checksums with the hub's; fetch once more what is wrong."""
    asked = {"repo_type": kind, "revision": found.commit}
    for _ in range(2):
        try:
            wrong = _patient(HfApi().verify_repo_checksums)(found.name, **asked).mismatches
            if not wrong:
                return
            for path in [found.folder / mismatch["path"] for mismatch in wrong]:
                remove(path.resolve())  # the content, which is shared by commits
                remove(path)
            _download(found.name, **asked, ignore_patterns=UNUSED)
        except httpx.ConnectError:  # then the snapshot came from the cache, whole
            print(f"The hub is out of reach: {found.name} is taken from the cache, unverified.")
            return
        except NETWORK as error:
            raise UserError(_explain(found.name, kind, found.commit, error)) from error
    raise UserError(
        f"{found.name}: {wrong[0]['path']} arrived damaged, twice: its checksum is "
        f"{wrong[0]['actual']}, the hub says {wrong[0]['expected']}. Try again later."
    )


@command
def main(arguments: list[str] | None = None) -> None:
    """Fetch everything that a profile needs from the hub."""
    parser = argparse.ArgumentParser(prog="python -m l2p_utils.hub", description=main.__doc__)
    parser.add_argument("profile", help="a profile's name or a YAML file")
    options = parser.parse_args(arguments)
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set: unset it to fetch.")
    fetch(load_profile(options.profile))


if __name__ == "__main__":
    sys.exit(main())
