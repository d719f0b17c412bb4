"""Collections from the hub: NanoBEIR (``nano:``) and BEIR (``beir:``), kept as folders of ours.

Takes a name, fetches its repositories once, and gives a folder in BEIR's layout, which
`l2p_utils.collection.load_collection` reads from then on, also without a network.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import errors as hub_errors

from l2p_utils import hub
from l2p_utils.beir_zip import NotFound, download, unpack, writable, zip_address
from l2p_utils.docstrings import cache_folder
from l2p_utils.files import PROVENANCE, UserError, atomic_path, read_json, sha256, write_json
from l2p_utils.hub_folder import write_collection
from l2p_utils.hub_tables import PATTERNS, Repository
from l2p_utils.profile import HUB, plain_name, slug

logger = logging.getLogger(__name__)

#: Raise this by one whenever a rule below changes: folders made by older rules are made again.
BUILDER = 2
#: Environment variable that makes `fetch_collection` ask the hub again.
REFRESH = "L2P_REFRESH"

NANO = {
    "arguana": "NanoArguAna",
    "climatefever": "NanoClimateFEVER",
    "dbpedia": "NanoDBPedia",
    "fever": "NanoFEVER",
    "fiqa": "NanoFiQA2018",
    "hotpotqa": "NanoHotpotQA",
    "msmarco": "NanoMSMARCO",
    "nfcorpus": "NanoNFCorpus",
    "nq": "NanoNQ",
    "quora": "NanoQuoraRetrieval",
    "scidocs": "NanoSCIDOCS",
    "scifact": "NanoSciFact",
    "touche": "NanoTouche2020",
}
#: BEIR sets under names of ours: (name in BeIR/… and of the zip, name in mteb/…).
BEIR = {
    "climatefever": ("climate-fever", "climate-fever"),
    "dbpedia": ("dbpedia-entity", "dbpedia"),
    "dbpedia-entity": ("dbpedia-entity", "dbpedia"),
    "touche": ("webis-touche2020", "touche2020"),
    "webis-touche2020": ("webis-touche2020", "touche2020"),
}
COMMIT = re.compile(r"[0-9a-f]{7,64}")


@dataclass(frozen=True)
class HubName:
    """A collection's name in parts: ``beir:scifact@main`` is ("beir", "scifact", "main", None)."""

    family: str
    dataset: str
    revision: str | None = None
    qrels_revision: str | None = None

    @property
    def plain(self) -> str:
        """The name without its revision."""
        return f"{self.family}:{self.dataset}"


@dataclass(frozen=True)
class Source:
    """Where a collection comes from: a snapshot with corpus and queries, one with judgments."""

    kind: str
    texts: Repository
    qrels: Repository

    @property
    def repositories(self) -> dict[str, str]:
        """Repository → commit; of a zip its address → SHA-256."""
        return {self.texts.id: self.texts.commit, self.qrels.id: self.qrels.commit}


# --- what others call -----------------------------------------------------------------------------


def parse_name(name: str) -> HubName:
    """Take a collection's name apart.

    Parameters
    ----------
    name : str
        ``nano:<set>``, ``beir:<set>``, either with ``@<commit, branch or tag>``. The judgments of
        ``BeIR/<set>`` lie in a repository of their own: a branch or tag is asked of both, a commit
        of the texts alone, and ``@<commit>:<commit>`` of texts and judgments.

    Raises
    ------
    UserError
        For an unknown NanoBEIR set, a name that no BEIR set can have, an empty revision.
    """
    family, _, rest = name.partition(":")
    dataset, at, revisions = rest.partition("@")
    revision, colon, of_qrels = revisions.partition(":")
    if family == "nano" and dataset not in NANO:
        known = ", ".join(f"nano:{known}" for known in NANO)
        raise UserError(f"There is no collection nano:{dataset}. Known are: {known}.")
    if family not in ("nano", "beir") or not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", dataset):
        raise UserError(f"{name!r} names no hub collection; expected nano:scifact, beir:scifact, …")
    if (at and not revision) or (colon and not of_qrels) or (colon and family == "nano"):
        expected = "nano:scifact@<revision>, beir:scifact@<revision>[:<revision of the judgments>]"
        raise UserError(f"{name!r}: its revision is incomplete; expected {expected}.")
    if revision and not of_qrels and not COMMIT.fullmatch(revision):
        of_qrels = revision  # a branch or a tag is asked of both
    return HubName(family, dataset, revision or None, of_qrels or None)


def fetch_collection(
    name: str, cache: str | Path | None = None, refresh: bool | None = None
) -> Path:
    """Make sure that a hub collection is here; give its folder.

    A collection that was fetched once is read from the cache and the hub is not asked again: that
    all jobs of a run, on all machines that share the cache, see the same data matters more than
    the newest data. To ask again: ``refresh=True`` or L2P_REFRESH=1, which only this function
    heeds, so that a run's fetch step may renew its data and no later job does. A name with a
    revision is kept beside the one without.

    BEIR sets are looked for as ``BeIR/<set>`` with ``BeIR/<set>-qrels``, then as ``mteb/<set>``,
    then as a zip under L2P_BEIR_URL (default: BEIR's own server), which has no revisions. What is
    not found at one place is looked for at the next; any other failure ends the search.

    Parameters
    ----------
    name : str
        See `parse_name`.
    cache : path, optional
        See `l2p_utils.docstrings.cache_folder`; the collections lie in its folder ``hub``.
    refresh : bool, optional
        Whether to ask the hub though the collection is here. None: as L2P_REFRESH says.

    Returns
    -------
    pathlib.Path
        ``<cache>/hub/<slug>--<commits>`` with ``corpus.jsonl``, ``queries.jsonl``,
        ``qrels/<split>.tsv`` and ``provenance.json``.

    Raises
    ------
    UserError
        For a name or revision that is nowhere, what the hub answers, and tables that are no
        collection: names the repository, what was found and what was expected.
    """
    wanted = parse_name(name)
    root = cache_folder(cache) / "hub"
    if refresh is None:
        refresh = os.environ.get(REFRESH, "0") not in ("", "0")
    remembered = None if refresh else _remembered(root, wanted)
    if remembered:
        logger.info("%s: read from %s; %s=1 asks the hub again.", name, remembered, REFRESH)
        return remembered
    with writable(root):
        root.mkdir(parents=True, exist_ok=True)
    with _source(wanted, root) as source:
        folder = _store(root, wanted, source)
    with writable(root):
        pointer = {"name": wanted.plain, "revision": wanted.revision, "folder": folder.name}
        write_json(_pointer(root, wanted), pointer)
    return folder


def find_split(
    name: str, split: str, cache: str | Path | None = None, carve_dev: bool = False
) -> tuple[str, Path]:
    """Give (name without revision, folder) of a hub collection that has `split`.

    Raises
    ------
    UserError
        When it does not have it; else as `fetch_collection`.
    """
    wanted = parse_name(name)
    if wanted.family == "nano" and split != "test":
        raise UserError(
            f"{name} has no split {split!r}: the queries of NanoBEIR are for evaluation, its one "
            f"split is test. To train, take beir:{wanted.dataset}."
        )
    folder = fetch_collection(name, cache, refresh=False)
    splits = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
    carved = ["dev"] if carve_dev and "train" in splits else []
    if split not in splits + carved:
        advice = ""
        if split == "dev" and "train" in splits:
            advice = (
                " To pick the best epoch, name another collection in the profile's dev_collections "
                "(the paper takes NanoBEIR's), or carve a dev split out of train (carve_dev=True)."
            )
        raise UserError(f"{name} has no split {split!r}. It has: {', '.join(splits)}.{advice}")
    return wanted.plain, folder


def provenance_of(name: str, cache: str | Path | None = None) -> dict[str, Any]:
    """Where a collection's data came from, for the provenance of what is made of it.

    Returns
    -------
    dict
        `name`, `revision` (asked for, or None), `source` (NanoBEIR, BeIR, mteb or zip),
        `repositories` (id → commit, of a zip address → SHA-256) and `counts` (documents, queries,
        judgments, and what was left out); empty for a collection that is not from the hub.

    Raises
    ------
    UserError
        As `fetch_collection`, when the collection is not here yet.
    """
    if not name.startswith(HUB):
        return {}
    provenance = read_json(fetch_collection(name, cache, refresh=False) / PROVENANCE)
    kept = {key: provenance[key] for key in ("source", "repositories", "counts")}
    return {"name": plain_name(name), "revision": name.partition("@")[2] or None, **kept}


# --- the cache ------------------------------------------------------------------------------------


def _pointer(root: Path, wanted: HubName) -> Path:
    """File that remembers which folder a name stands for: the hub need not be asked again."""
    asked = [wanted.revision, wanted.qrels_revision]
    revision = ":".join(part for part in asked if part) if wanted.revision else ""
    suffix = f"@{urllib.parse.quote(revision, safe='')}" if revision else ""
    return root / "names" / f"{slug(wanted.plain)}{suffix}.json"


def _remembered(root: Path, wanted: HubName) -> Path | None:
    """The folder that a name stood for last time; None, with a notice, if it can't be used."""
    pointer = _pointer(root, wanted)
    if not pointer.is_file():
        return None
    content = read_json(pointer)
    name = content.get("folder") if isinstance(content, dict) else None
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"{pointer} names no folder. Delete it and run again to make it anew.")
    if not _intact(root / name):
        logger.warning(
            "Fetching %s again: %s is not there, damaged, or made by other rules.",
            wanted.plain,
            root / name,
        )
        return None
    return root / name


def _intact(folder: Path) -> bool:
    """Whether a collection's files are those that its provenance was written for."""
    if not (folder / PROVENANCE).is_file():
        return False
    try:
        provenance = read_json(folder / PROVENANCE)
    except UserError:
        return False
    if not isinstance(provenance, dict) or provenance.get("builder") != BUILDER:
        return False
    sums = provenance.get("sha256", {})
    return bool(sums) and all(
        (folder / file).is_file() and sha256(folder / file) == expected
        for file, expected in sums.items()
    )


class _Faster(Exception):
    """Another process wrote the same folder, and may be reading it: it is not to be replaced."""


def _store(root: Path, wanted: HubName, source: Source) -> Path:
    """Write a source as a folder in BEIR's layout, unless it is there already."""
    # 12 digits of each commit: 48 bits tell the commits of a few repositories apart.
    commits = "-".join(commit[:12] for commit in source.repositories.values())
    folder = root / f"{slug(wanted.plain)}--{commits}"
    if _intact(folder):
        return folder
    try:
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            nano = wanted.family == "nano"
            counts = write_collection(temporary, wanted.plain, source.texts, source.qrels, nano)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            provenance = {
                "name": wanted.plain,
                "builder": BUILDER,
                "source": source.kind,
                "repositories": source.repositories,
                "counts": counts,
                "sha256": {path.relative_to(temporary).as_posix(): sha256(path) for path in files},
            }
            write_json(temporary / PROVENANCE, provenance)
            if _intact(folder):
                raise _Faster
    except _Faster:
        logger.info("%s: another process wrote %s meanwhile.", wanted.plain, folder)
    except OSError as error:
        if not _intact(folder):  # the other one was faster in the very last moment
            with writable(root):
                raise error
    return folder


# --- where from -----------------------------------------------------------------------------------


def _missing(error: BaseException | None) -> bool:
    """Whether an error means that a repository or revision does not exist.

    Neither one that may not be read (gated) nor one that can't be reached.
    """
    missing = (
        hub_errors.RepositoryNotFoundError,
        hub_errors.RevisionNotFoundError,
        hub_errors.RemoteEntryNotFoundError,
        NotFound,
    )
    while error is not None:
        if isinstance(error, missing):
            return not isinstance(error, hub_errors.GatedRepoError)
        error = error.__cause__
    return False


def _snapshot(repository: str, revision: str | None) -> Repository:
    folder = hub.download(repository, "dataset", revision, PATTERNS)
    return Repository(repository, folder, folder.name)


@contextlib.contextmanager
def _source(wanted: HubName, root: Path) -> Iterator[Source]:
    """The first place that has the collection; a zip is unpacked for as long as this is open."""
    if wanted.family == "nano":
        snapshot = _snapshot(f"zeta-alpha-ai/{NANO[wanted.dataset]}", wanted.revision)
        yield Source("NanoBEIR", snapshot, snapshot)
        return
    tried: list[str] = []
    source = _hub_source(wanted, tried)
    if source:
        yield source
        return
    with contextlib.ExitStack() as stack:
        with writable(root):
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=root, prefix=".zip-"))
        yield _zip_source(wanted, Path(folder), tried)


def _hub_source(wanted: HubName, tried: list[str]) -> Source | None:
    """BeIR's two repositories, or else mteb's one; None, and what was `tried`, if there is none."""
    beir, mteb = BEIR.get(wanted.dataset, (wanted.dataset, wanted.dataset))
    asked = f" at {wanted.revision}" if wanted.revision else ""
    try:
        texts = _snapshot(f"BeIR/{beir}", wanted.revision)
        return Source("BeIR", texts, _snapshot(f"BeIR/{beir}-qrels", wanted.qrels_revision))
    except (UserError, hub_errors.HfHubHTTPError) as error:
        if not _missing(error):
            raise
        tried.append(f"BeIR/{beir} with BeIR/{beir}-qrels{asked} (not found)")
    try:
        snapshot = _snapshot(f"mteb/{mteb}", wanted.revision)
        return Source("mteb", snapshot, snapshot)
    except (UserError, hub_errors.HfHubHTTPError) as error:
        if not _missing(error):
            raise
        tried.append(f"mteb/{mteb}{asked} (not found)")
    return None


def _zip_source(wanted: HubName, folder: Path, tried: list[str]) -> Source:
    beir, _ = BEIR.get(wanted.dataset, (wanted.dataset, wanted.dataset))
    url = zip_address(beir)
    if wanted.revision:
        tried.append(f"{url} (a zip has no revisions)")
    else:
        try:
            digest = download(url, folder / "beir.zip")
            unpacked = unpack(folder / "beir.zip", folder / "unpacked", url)
            return Source("zip", *[Repository(url, unpacked, digest)] * 2)
        except NotFound:
            tried.append(f"{url} (not found)")
    asked = f" at the revision {wanted.revision}" if wanted.revision else ""
    raise UserError(
        f"There is no collection {wanted.plain}{asked}. Tried: {'; '.join(tried)}. Check the name"
        f"{' and the revision' * bool(asked)}; a private data set needs a token (HF_TOKEN)."
    )
