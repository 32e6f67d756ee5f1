"""CloudEvents in Kafka's binary mode: the headers we write, and the message id we read out of foreign ones.

Source: CloudEvents 1.0.2 and its Kafka protocol binding, "binary content mode".
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache
from uuid import UUID

from eoframework.message import Headers, parse_id

MESSAGE_ID = "message-id"
RESERVED = frozenset({MESSAGE_ID, "content-type"})
RESERVED_PREFIX = "ce_"
TRACEPARENT = "traceparent"
_LENGTH = len(TRACEPARENT)
_OURS = 7
_IS_TRACE = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}").fullmatch
_SPECVERSION = ("ce_specversion", b"1.0")

MAX_ID_BYTES = 1024
MAX_HEADERS = 1000


def is_reserved(name: str) -> bool:
    """Whether a header is ours to write; asked without regard to case, since readers differ in that."""
    lowered = name.lower()
    return lowered in RESERVED or lowered.startswith(RESERVED_PREFIX)


class Envelope:
    """The headers of records that share source, type and media type: what they have in common is encoded once."""

    def __init__(self, source: str, type: str, content_type: str) -> None:  # noqa: A002 - the CloudEvents attribute
        self._source = ("ce_source", source.encode())
        self._type = ("ce_type", type.encode())
        self._content_type = ("content-type", content_type.encode())

    def headers(
        self, identity: bytes, time: bytes, traceparent: bytes | None, own: Headers = ()
    ) -> list[tuple[str, str | bytes | None]]:
        """CloudEvents attributes, `message-id`, then the publisher's own.

        `message-id` repeats `ce_id`: so a reader knows that the id was made to be unique by itself (`incoming_id`).
        """
        made: list[tuple[str, str | bytes | None]] = [
            _SPECVERSION,
            ("ce_id", identity),
            self._source,
            self._type,
            ("ce_time", time),
            self._content_type,
            (MESSAGE_ID, identity),
        ]
        if traceparent is not None and not (own and any(name.lower() == TRACEPARENT for name, _ in own)):
            made.append((TRACEPARENT, traceparent))
        if own:
            made += own
        return made


envelope = lru_cache(maxsize=1000)(Envelope)


def outgoing_headers(
    *,
    id: UUID,  # noqa: A002 - the CloudEvents attribute
    source: str,
    type: str,  # noqa: A002 - the CloudEvents attribute
    time: datetime,
    content_type: str,
    headers: Headers = (),
    traceparent: str | None = None,
) -> list[tuple[str, str | bytes | None]]:
    """The headers of a record that was an outbox message; see Envelope."""
    trace = None if traceparent is None else traceparent.encode()
    return envelope(source, type, content_type).headers(str(id).encode(), event_time(time), trace, headers)


def event_time(time: datetime) -> bytes:
    """A time as `ce_time` has it."""
    return time.astimezone(UTC).isoformat().encode()


def incoming_id(headers: Headers, *, topic: str) -> UUID | None:
    """The id a producer gave its message, None when it gave none that can be read. Never raises.

    CloudEvents say that source *and* id together name an event: two sources may count 1, 2, 3, or both use the id of
    the order they speak of. The id alone would make the second one a duplicate, which is silent loss; so both are
    folded into one. Only when `message-id` repeats a `ce_id` that is a UUID is it taken as it stands: that is what we
    write, and those ids are unique by themselves. Otherwise `message-id` counts, within its topic.
    """
    if len(headers) > MAX_HEADERS:
        return None
    found = dict(headers)
    event_id, source = _text(found.get("ce_id")), _text(found.get("ce_source"))
    own = _text(found.get(MESSAGE_ID))
    if event_id and source:
        if own == event_id and _is_canonical(own):
            return UUID(own)
        return parse_id(f"{len(source)}:{source}{event_id}", namespace="ce:source+id")
    return parse_id(own, namespace=topic) if own else None


def _text(value: bytes | None) -> str | None:
    # Hostile or broken headers count as absent: the position still protects the message.
    if not value or len(value) > MAX_ID_BYTES:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _is_canonical(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


def traceparent_of(headers: Headers) -> bytes | None:
    """The trace context a message came with; a malformed one is as good as none. Source: W3C Trace Context, 3.2."""
    # First where we write it: all headers of every message pass here.
    if len(headers) > _OURS:
        name, value = headers[_OURS]
        if name == TRACEPARENT and _IS_TRACE(value or b""):
            return value
    in_another_case = None
    for name, value in headers:
        if len(name) == _LENGTH and _IS_TRACE(value or b""):
            if name == TRACEPARENT:
                return value
            if in_another_case is None and name.lower() == TRACEPARENT:
                in_another_case = value
    return in_another_case
