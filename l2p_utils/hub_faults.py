"""Faults of the hub: which of them pass and are tried again, and what is told of the rest.

Takes the exceptions of huggingface_hub, httpx and Xet's client; gives waits and messages.
"""

from __future__ import annotations

import email.utils
import logging
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import httpx
from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    XetDownloadError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from l2p_utils.files import UserError, disk_is_full

logger = logging.getLogger(__name__)

ATTEMPTS = 5
LONGEST_WAIT = 600  # seconds; the hub's windows are 300. Who asks for more is told to come back
PASSING = {408, 429, 500, 502, 503, 504}  # statuses that a later attempt may not meet
NO_NETWORK = (OfflineModeIsEnabled, LocalEntryNotFoundError, httpx.TransportError, ConnectionError)


class TransferBroke(Exception):
    """The bytes of a file did not come through; the next attempt may fare better."""


def transfer(work: Callable[[], str], what: str) -> str:
    """Call `work`, which moves files, with errors that say what went wrong.

    Xet's client raises bare RuntimeErrors with a text of its Rust code; huggingface_hub an OSError
    for a file that came short, and a missing local entry for every answer to the question before.

    Raises
    ------
    TransferBroke
        For what another attempt may mend.
    UserError
        When the disk is full.
    """
    try:
        return work()
    except LocalEntryNotFoundError as error:
        answers = (HfHubHTTPError, httpx.TransportError, OfflineModeIsEnabled)
        if isinstance(error.__cause__, answers):
            raise error.__cause__ from None
        raise
    except Exception as error:
        if disk_is_full(error):
            raise UserError(
                f"The disk is full: {constants.HF_HUB_CACHE} has no room for {what}. What was "
                "finished before is kept; free some space there, or set HF_HOME to a folder with "
                "more, and start the same command again."
            ) from error
        if _broke(error):
            raise TransferBroke(first_line(error)) from error
        raise


def _broke(error: Exception) -> bool:
    """Whether an error of a transfer is the network's or the far end's."""
    return (
        type(error) in (RuntimeError, XetDownloadError, ConnectionError, TimeoutError)
        or type(error).__module__.partition(".")[0] == "hf_xet"
        or (isinstance(error, OSError) and str(error).startswith("Consistency check failed"))
    )


def patiently(work: Callable[[], Any]) -> Any:
    """Call `work`; again, after a wait, when it fails in a way that may pass."""
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except (HfHubHTTPError, httpx.TransportError, ConnectionError, TransferBroke) as error:
            response = getattr(error, "response", None)
            passing = response is None or response.status_code in PASSING
            wait = _seconds(response, attempt)
            given_up = attempt == ATTEMPTS - 1 or wait > LONGEST_WAIT
            if not passing or isinstance(error, OfflineModeIsEnabled) or given_up:
                raise
            logger.warning("The hub: %s. Again in %.0f s.", first_line(error), wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _seconds(response: Any, attempt: int) -> float:
    """As long as the hub asks for, else 1, 2, 4, … seconds (L2P_HUB_WAIT times that)."""
    asked = asked_wait(response.headers) if response is not None else None
    return float(os.environ.get("L2P_HUB_WAIT", 1)) * 2**attempt if asked is None else asked


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """How many seconds an answer asks to wait; None if it does not say.

    The longer of the hub's RateLimit, which is on every answer and counts where nothing remains,
    and of Retry-After, in seconds or as a date (RFC 9110, 10.2.3).
    """
    waits = []
    limit = parse_ratelimit_headers(headers)
    if limit and limit.remaining == 0:
        waits.append(limit.reset_in_seconds + 1.0)  # it is in whole seconds, rounded
    asked = headers.get("Retry-After", "").strip()
    if asked.isdecimal():
        waits.append(float(asked))
    elif until := _date(asked):
        waits.append(max(0.0, (until - datetime.now(UTC)).total_seconds()))
    return max(waits, default=None)


def _date(text: str) -> datetime | None:
    try:
        date = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def when(headers: Mapping[str, str]) -> str:
    """How long to wait, as a message has it."""
    asked = asked_wait(headers)
    return "some minutes" if asked is None else f"{asked:.0f} s"


def told(what: str, error: Exception) -> str:
    """The last word on a fault that should have passed and did not, of something not here yet."""
    if isinstance(error, TransferBroke):
        return (
            f"The files of {what} did not come through, {ATTEMPTS} times: {error}. Run again: "
            "files that came whole are kept. If it stays so, transfer without Xet "
            "(HF_HUB_DISABLE_XET=1), or over another network."
        )
    response = getattr(error, "response", None)
    if response is not None:
        return _busy(what, error, response)
    why = " (HF_HUB_OFFLINE is set)" if isinstance(error, OfflineModeIsEnabled) else ""
    return (
        f"The hub cannot be reached{why}, and {what} was not fetched whole before: "
        f"{first_line(error)}. With a network, run `python -m l2p_utils.fetch PROFILE` once; "
        "after that none is needed."
    )


def _busy(what: str, error: Exception, response: httpx.Response) -> str:
    """The hub is there and has no time: too many requests, or a fault of its own."""
    status, more = response.status_code, ""
    if status == 429:
        said = "The hub limits how much you may ask (429)"
        more = " Who is logged in (`hf auth login`, or HF_TOKEN) may ask more."
    else:
        said = f"The hub answers {status}, a fault of its own"
    return (
        f"{said}, and {what} was not fetched whole before: {first_line(error)}. "
        f"Wait {when(response.headers)}, then run again: files that came whole are kept.{more}"
    )


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
