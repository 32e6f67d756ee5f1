"""From a payload to the record that a Producer sends.

Every message passes here, so what all records of one kind have in common is made once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID

from eoframework import clock, parts
from eoframework.cloudevents import Envelope, event_time
from eoframework.kafka.delivery import Ticket
from eoframework.kafka.producer import Outgoing
from eoframework.message import new_id
from eoframework.parts import Part
from eoframework.topic import Topic

Headers: TypeAlias = Mapping[str, str | bytes] | None

_TIME_STEP = 0.001
_MANY = 1000


class Item(NamedTuple):
    """What the user asks to be sent."""

    topic: Topic[Any]
    payload: Any
    key: Part | None = None
    id: UUID | str | None = None
    headers: Headers = None
    traceparent: str | None = None


class Draft(NamedTuple):
    """A record that has no ticket yet."""

    id: UUID
    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, str | bytes | None]]

    @property
    def size(self) -> int:
        """Bytes of key and value."""
        return len(self.key or b"") + len(self.value or b"")

    def record(self, ticket: Ticket) -> Outgoing:
        """The record as it is sent."""
        return Outgoing(self.topic, self.key, self.value, self.headers, ticket=ticket)


@dataclass(frozen=True, slots=True)
class _Way:
    """What all payloads of one class that go to one topic have in common."""

    envelope: Envelope
    size: int
    """The bytes of their headers, at most."""


class Records:
    """Encodes the messages of one source; thread-safe."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._ways: dict[tuple[Topic[Any], type], _Way] = {}
        self._time = (0.0, b"")

    def make(self, item: Item) -> Draft:
        """The record of a message. Raises EncodeError."""
        topic, payload, key, given, headers, traceparent = item
        way = self._ways.get((topic, type(payload))) or self._way(topic, type(payload))
        value = topic.encode_payload(payload)
        encoded_key = topic.encode_key(payload, key)
        chosen = topic.choose_id(payload, given) or new_id()
        own = parts.headers(headers, topic.name)
        topic.check_size(encoded_key, value, way.size + parts.size_of(own) if own else way.size)
        trace = None if traceparent is None else traceparent.encode()
        made = way.envelope.headers(str(chosen).encode(), self._now(), trace, own)
        return Draft(chosen, topic.name, encoded_key, value, list(made))

    def _now(self) -> bytes:
        # To the millisecond: writing a time down takes longer than reading the clock.
        at, text = self._time
        now = clock.monotonic()
        if now - at >= _TIME_STEP or not text:
            text = event_time(clock.now())
            self._time = (now, text)
        return text

    def _way(self, topic: Topic[Any], kind: type) -> _Way:
        type_ = topic.type_of(kind)
        if len(self._ways) >= _MANY:
            self._ways.clear()
        way = _Way(Envelope(self._source, type_, topic.content_type), topic.size_of_headers(self._source, type_))
        self._ways[topic, kind] = way
        return way
