"""What is kept of a failure: plain values, capped, and without the message's content where the settings say so."""

from __future__ import annotations

import hashlib
import math
import os
import re
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from uuid import UUID

from eoframework.cloudevents import is_reserved
from eoframework.message import Headers, OutboxMessage, Record, new_id

MAX_ERROR = 1_000
MAX_TRACEBACK = 8_000

_OURS = f"{Path(__file__).parent}{os.sep}"
_STDLIB = tuple({f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib")})
_SITE = tuple({f"{sysconfig.get_path(name)}{os.sep}" for name in ("purelib", "platlib")})
_SITES = re.compile(r"[/\\](?:site|dist)-packages[/\\]")


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a message failed, as it is stored."""

    error_class: str
    fingerprint: str
    """The same for failures of one class in one place of the application, whatever their text."""
    place: str
    """`file.py:function` of the application's innermost frame, empty without one."""
    error: str | None = None
    traceback: str | None = None

    def __str__(self) -> str:
        return f"{self.error_class}{f' in {self.place}' if self.place else ''}"


@dataclass(frozen=True, slots=True)
class Parked:
    """A stored message that waits in its lane."""

    lane: UUID
    record: Record
    attempts: int = 0
    """How often the handler has failed on it."""
    crashes: int = 0
    """How often it was the one in flight when a process died."""
    failed_at: float = math.inf
    """When it first failed, on this process's monotonic clock."""


def cause_of(error: Exception, *, text: bool) -> Cause:
    """The cause to store; `text` allows the error's message and traceback, which may quote the payload."""
    kind = type(error)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    place = _application_frame(error.__traceback__)
    fingerprint = hashlib.sha256(f"{name}\0{place}".encode()).hexdigest()[:12]
    if not text:
        return Cause(name[:200], fingerprint, place)
    told = "".join(traceback.format_exception(error, chain=False))
    return Cause(name[:200], fingerprint, place, clean(words(error), MAX_ERROR), clean(told, MAX_TRACEBACK))


def told(cause: Cause) -> str:
    """The cause in a line of the log, with the beginning of its text where that may be shown."""
    return f"{cause}: {' '.join(cause.error[:200].split())}" if cause.error else str(cause)


def dead_letter_message(
    group: str, topic: str, parked: Parked, cause: Cause, why: str, *, error: str | None = None
) -> OutboxMessage:
    """What is sent to a topic of dead letters: the record as it was, and in its headers what became of it.

    error: the error's text, where no row of the database has it.
    """
    record = parked.record
    what = {
        "eo-dlt-consumer": group,
        "eo-dlt-topic": record.topic,
        "eo-dlt-partition": str(record.partition),
        "eo-dlt-offset": str(record.offset),
        "eo-dlt-attempts": str(parked.attempts),
        "eo-dlt-cause": f"{cause}: {why}",
        "eo-dlt-fingerprint": cause.fingerprint,
    }
    if error is not None:
        what["eo-dlt-error"] = error
    return OutboxMessage(
        id=new_id(),
        topic=topic,
        key=record.key,
        payload=record.value,
        type="eoframework.dead-letter",
        source=group,
        content_type="application/octet-stream",
        headers=tuple((name, value.encode()) for name, value in what.items()) + _original(record.headers),
    )


def _original(headers: Headers) -> Headers:
    # Names that are ours to write would be read as those of the dead letter's own message: also when what died was read
    # from a topic of dead letters.
    def ours(name: str) -> bool:
        return is_reserved(name) or name.lower().startswith("eo-dlt-")

    return tuple((f"eo-original-{name}" if ours(name) else name, value) for name, value in headers)


def _application_frame(trace: TracebackType | None) -> str:
    """The innermost frame that is neither ours nor a library's; without one, the innermost one of what is installed.

    An application that was installed lives among the libraries, and is not to be told from them.
    """
    found = installed = ""
    for frame in traceback.walk_tb(trace):
        code = frame[0].f_code
        file, place = code.co_filename, f"{Path(code.co_filename).name}:{code.co_name}"
        if file.startswith(_OURS):
            continue
        # Before the standard library: without a virtual environment site-packages lies inside of it.
        if file.startswith(_SITE) or _SITES.search(file):
            installed = place
        elif not file.startswith((*_STDLIB, "<frozen")):
            found = place
    return found or installed


def words(error: BaseException) -> str:
    """The error's text, whatever its class makes of it."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a broken __str__ must not keep its message from being set aside
        return "(its text cannot be shown)"


def clean(text: str, limit: int) -> str:
    """The text as PostgreSQL can store it, at most `limit` characters."""
    # PostgreSQL stores no NUL, and a lone surrogate is no UTF-8: either would fail the transaction that sets aside.
    text = text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else f"{text[: limit - 20]} ... ({len(text)} long)"
