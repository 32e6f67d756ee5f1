"""The parts of a message besides its payload: key, id, headers and times, checked and encoded."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from uuid import UUID

from pydantic import ValidationError

from eoframework import clock, cloudevents
from eoframework.errors import EncodeError, EoError
from eoframework.message import Headers

Part = str | bytes | int | UUID
"""What a key or an id may be; written as UTF-8 text: int in decimal, UUID in canonical form. bytes stay as they are."""

MAX_HEADERS = 100
MAX_HEADER_NAME = 255
MAX_HEADER_VALUE = 64 * 1024
MAX_DELAY = timedelta(days=3650)


def text(value: object, topic: str, what: str) -> str:
    # bool is an int to Python, and "True" as a key is a mistake in every case seen.
    if isinstance(value, bool) or not isinstance(value, (str, int, UUID)):
        raise EncodeError(
            f"{topic}: a {what} of type {type(value).__name__} has no agreed form.",
            remedy=f"Make it str, bytes, int or UUID: {what}=lambda payload: str(...).",
        )
    # The base class's own methods: an enum's text is its name, which changes with a rename in the source.
    plain = (
        int.__repr__(value) if isinstance(value, int) else str.__str__(value) if isinstance(value, str) else str(value)
    )
    try:
        plain.encode()
    except UnicodeEncodeError as error:
        raise EncodeError(f"{topic}: the {what} is not valid text: {error.reason}.") from error
    return plain


def headers(given: Mapping[str, str | bytes] | None, topic: str) -> Headers:
    if not given:
        return ()
    if len(given) > MAX_HEADERS:
        raise EncodeError(f"{topic}: {len(given)} headers, allowed are {MAX_HEADERS}.")
    return tuple((_header_name(name, topic), _header_value(name, value, topic)) for name, value in given.items())


def size_of(given: Headers) -> int:
    """The bytes that headers take in a record, at most."""
    return sum(len(name.encode()) + len(value or b"") + 8 for name, value in given)


def _header_name(name: str, topic: str) -> str:
    if cloudevents.is_reserved(name):
        raise EncodeError(
            f"{topic}: header {name!r} is written by eoframework; another value would change what the message is.",
            remedy="Use id= for the message id, another name for anything else.",
        )
    # PostgreSQL's text knows no NUL, and a lone surrogate is no UTF-8: both would fail at COMMIT.
    printable = name.isprintable() and name != ""
    if not printable or len(name.encode("utf-8", "replace")) > MAX_HEADER_NAME:
        raise EncodeError(f"{topic}: header name {name[:40]!r}.", remedy=f"Use 1 to {MAX_HEADER_NAME} printable bytes.")
    return name


def _header_value(name: str, value: str | bytes, topic: str) -> bytes:
    if not isinstance(value, (str, bytes)):
        raise EncodeError(f"{topic}: header {name!r} is a {type(value).__name__}.", remedy="Use str or bytes.")
    try:
        encoded = value.encode() if isinstance(value, str) else value
    except UnicodeEncodeError as error:
        raise EncodeError(f"{topic}: header {name!r} is not valid text: {error.reason}.") from error
    if len(encoded) > MAX_HEADER_VALUE:
        raise EncodeError(f"{topic}: header {name!r} has {len(encoded)} bytes, allowed are {MAX_HEADER_VALUE}.")
    return encoded


def due(delay: timedelta | float | None, deliver_at: datetime | None, topic: str) -> datetime | None:
    if deliver_at is not None:
        if delay is not None:
            raise EncodeError(f"{topic}: delay= and deliver_at= were both given.", remedy="Give one.")
        if deliver_at.tzinfo is None:
            raise EncodeError(f"{topic}: deliver_at has no time zone.", remedy="Use an aware datetime, such as UTC.")
        return deliver_at.astimezone(UTC)
    if delay is None:
        return None
    seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
    if not 0 <= seconds <= MAX_DELAY.total_seconds():
        raise EncodeError(
            f"{topic}: delay={delay!r}.", remedy=f"Use 0 to {MAX_DELAY.days} days, as seconds or timedelta."
        )
    return clock.now() + timedelta(seconds=seconds) if seconds else None


def timestamp(milliseconds: int) -> datetime | None:
    # The producer chooses it freely; what no calendar holds is no timestamp.
    if milliseconds < 0:
        return None
    try:
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)
    except OverflowError:
        return None


def describe(error: Exception) -> str:
    """What went wrong, without the payload's values: they end in logs and may be secret."""
    if isinstance(error, ValidationError):
        found = error.errors(include_input=False, include_url=False, include_context=False)
        shown = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'payload'}: {e['msg']}" for e in found[:3])
        return shown + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
    if isinstance(error, EoError):
        return str(error)
    return f"{type(error).__name__}: {str(error)[:300]}"
