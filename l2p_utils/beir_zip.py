"""BEIR's zips: fetched, verified, and unpacked as far as a collection needs them.

Takes a data set's name; gives a folder with corpus.jsonl, queries.jsonl and qrels/.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from l2p_utils.files import UserError
from l2p_utils.hub_faults import LONGEST_WAIT, PASSING, asked_wait, when

logger = logging.getLogger(__name__)

#: Environment variable with another address of BEIR's zips (http, https or file).
BEIR_URL = "L2P_BEIR_URL"
DEFAULT_BEIR_URL = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets"


class NotFound(UserError):
    """The zip is not there (404)."""


@contextlib.contextmanager
def writable(root: Path) -> Iterator[None]:
    """Turn an error of writing under the cache folder `root` into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The cache folder {root} can't be written ({error}). Free some space there, or set "
            "the environment variable L2P_CACHE to a folder that can."
        ) from error


def zip_address(dataset: str) -> str:
    """The address of a BEIR set's zip, under L2P_BEIR_URL where that is set."""
    base = os.environ.get(BEIR_URL) or DEFAULT_BEIR_URL
    url = f"{base.rstrip('/')}/{dataset}.zip"
    if not url.startswith(("http://", "https://", "file://")):
        raise UserError(f"{BEIR_URL} is {base!r}; expected an address with http, https or file.")
    return url


ATTEMPTS, TIMEOUT = 4, 60  # tries; seconds without a byte


def download(url: str, target: Path) -> str:
    """Fetch a zip, trying again what may pass, when the server allows; return its SHA-256.

    Raises
    ------
    NotFound
        When it is not there.
    UserError
        When it can't be fetched: the address, the cause and what to do.
    """
    for attempt in range(1, ATTEMPTS + 1):
        wait: float = 2**attempt
        try:
            return _stream(url, target)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise NotFound(f"{url}: not found") from error
            asked = asked_wait(error.headers)
            wait = wait if asked is None else asked
            if error.code not in PASSING or attempt == ATTEMPTS or wait > LONGEST_WAIT:
                raise _failed(url, error, attempt) from error
            reason: Exception = error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if isinstance(getattr(error, "reason", None), FileNotFoundError):  # file://
                raise NotFound(f"{url}: not found") from error
            passing = (urllib.error.URLError, http.client.HTTPException, ConnectionError)
            if not isinstance(error, (*passing, TimeoutError)):  # a full disk, …
                with writable(target.parent.parent):
                    raise
            if attempt == ATTEMPTS:
                raise _failed(url, error, attempt) from error
            reason = error
        logger.warning("%s: %s; trying again in %g s.", url, reason, wait)
        time.sleep(wait)
    raise AssertionError("unreachable")


def _failed(url: str, error: Exception, tries: int) -> UserError:
    advice = "Check the network and run again"
    if isinstance(error, urllib.error.HTTPError) and error.code in PASSING:
        advice = f"The server is there, but busy. Wait {when(error.headers)} and run again"
    return UserError(
        f"{url} can't be fetched ({error}), tried {'once' if tries == 1 else f'{tries} times'}. "
        f"{advice}, or set {BEIR_URL} to another address of BEIR's zips. What was fetched before "
        "is kept."
    )


def _stream(url: str, target: Path) -> str:
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, target.open("wb") as file:
        length = answer.headers.get("Content-Length")
        total = int(length) if length else None
        received = 0
        with tqdm(desc=target.name, total=total, unit="B", unit_scale=True, delay=2) as bar:
            while block := answer.read(1 << 20):
                digest.update(block)
                file.write(block)
                received += len(block)
                bar.update(len(block))
    if total is not None and received != total:
        raise http.client.IncompleteRead(b"", total - received)
    return digest.hexdigest()


def unpack(archive: Path, folder: Path, url: str) -> Path:
    """Unpack a zip's corpus, queries and judgments into `folder`; their checksums are verified.

    Raises
    ------
    UserError
        When the zip is damaged, holds no collection, or has a member that lies outside.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            for member in members:
                _check_member(member, url)
            for member, place in _wanted_members(members, url).items():
                target = folder / place
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"{url} is damaged ({error}). Run again to fetch it anew; if it stays so, set "
            f"{BEIR_URL} to another address of BEIR's zips."
        ) from error
    except OSError as error:
        with writable(folder.parent.parent):
            raise error
    return folder


def _check_member(member: zipfile.ZipInfo, url: str) -> None:
    parts = PurePosixPath(member.filename)
    outside = parts.is_absolute() or ".." in parts.parts
    strange = "\\" in member.filename or ":" in member.filename
    if outside or strange or stat.S_ISLNK(member.external_attr >> 16):
        raise UserError(
            f"{url}: its member {member.filename!r} would be written outside of its folder. "
            "Nothing was unpacked: do not use this zip."
        )


def _wanted_members(members: Iterable[zipfile.ZipInfo], url: str) -> dict[zipfile.ZipInfo, str]:
    """Member → place in the unpacked folder."""
    names = {member.filename: member for member in members}
    bases = [
        PurePosixPath(name).parent for name in names if PurePosixPath(name).name == "corpus.jsonl"
    ]
    if len(bases) != 1:
        there = ", ".join(list(names)[:12]) or "nothing"
        raise UserError(
            f"{url}: expected one corpus.jsonl with queries.jsonl and qrels/ beside it; "
            f"there is: {there}."
        )
    inside = {
        name: PurePosixPath(name).relative_to(bases[0]).as_posix()
        for name in names
        if PurePosixPath(name).is_relative_to(bases[0])
    }
    return {
        names[name]: place
        for name, place in inside.items()
        if place in ("corpus.jsonl", "queries.jsonl") or re.fullmatch(r"qrels/[^/]+\.tsv", place)
    }
