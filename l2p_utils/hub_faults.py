"""Faults of the hub: which of them pass and are tried again, and what is told of the rest.

Takes the exceptions of huggingface_hub, httpx and Xet's client; gives waits and messages.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import httpx
from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    XetDownloadError,
)

from l2p_utils.files import UserError, disk_is_full

logger = logging.getLogger(__name__)

ATTEMPTS = 5
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
            if not passing or isinstance(error, OfflineModeIsEnabled) or attempt == ATTEMPTS - 1:
                raise
            wait = _seconds(response, attempt)
            logger.warning("The hub: %s. Again in %.0f s.", first_line(error), wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _seconds(response: Any, attempt: int) -> float:
    """As long as the hub asks for, else 1, 2, 4, … seconds (L2P_HUB_WAIT times that)."""
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    if asked.isdigit():
        return min(float(asked), 300.0)
    return float(os.environ.get("L2P_HUB_WAIT", 1)) * 2**attempt


def told(what: str, error: Exception) -> str:
    """The last word on a fault that should have passed and did not, of something not here yet."""
    if isinstance(error, TransferBroke):
        return (
            f"The files of {what} did not come through, {ATTEMPTS} times: {error}. Run again: "
            "files that came whole are kept. If it stays so, transfer without Xet "
            "(HF_HUB_DISABLE_XET=1), or over another network."
        )
    why = " (HF_HUB_OFFLINE is set)" if isinstance(error, OfflineModeIsEnabled) else ""
    return (
        f"The hub cannot be reached{why}, and {what} was not fetched whole before: "
        f"{first_line(error)}. With a network, run `python -m l2p_utils.fetch PROFILE` once; "
        "after that none is needed."
    )


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
