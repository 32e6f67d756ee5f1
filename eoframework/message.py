"""The values a message is made of, and how messages are told apart."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, NamedTuple
from uuid import UUID, uuid5

from typing_extensions import TypeVar

from eoframework import clock

# Covariant: what takes any Message takes a Message[Order].
T_co = TypeVar("T_co", default=object, covariant=True)

Headers = tuple[tuple[str, bytes | None], ...]

_ID_NAMESPACE = UUID("5f1cbd0e-8f0f-5ea5-9d9c-0e0f00000001")
_TIME_BITS = (1 << 48) - 1
# A hex digit with its two upper bits set to those of RFC 9562's variant.
_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


class Record(NamedTuple):
    """One delivery as Kafka handed it over: raw bytes at topic, partition and offset.

    A tuple, since one is made of every message there is: that takes a third of what a frozen dataclass takes.
    """

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp: int
    """Milliseconds since the epoch; -1 when the broker gave none."""
    unreadable: str = ""
    """Why the client could not read all of it; then it cannot be decoded."""

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]@{self.offset}"


@dataclass(frozen=True, slots=True)
class Message(Generic[T_co]):
    """A decoded delivery, as a handler sees it.

    `id` is the producer's message id, None when it gave none. `attempt` counts from 1 and only for re-runs after the
    handler's own failure.
    """

    payload: T_co
    id: UUID | None
    key: bytes | None
    headers: Headers
    topic: str
    partition: int
    offset: int
    timestamp: datetime | None
    attempt: int = 1

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]@{self.offset}"


@dataclass(frozen=True, slots=True)
class OutboxMessage:
    """A message on its way to Kafka: everything the relay needs, already encoded."""

    id: UUID
    topic: str
    key: bytes | None
    payload: bytes | None
    type: str
    source: str
    content_type: str
    headers: Headers = ()
    deliver_at: datetime | None = None
    ordered: bool = True
    traceparent: str | None = None
    """W3C trace context of the message this one follows from."""


class Source(NamedTuple):
    """Where a message published by a handler came from; the seed of its deterministic id."""

    consumer: str
    topic_id: UUID
    partition: int
    offset: int
    timestamp: int


def new_id() -> UUID:
    """A time-ordered random id (RFC 9562, version 7): new rows land together in an index."""
    return _uuid7(int(clock.now().timestamp() * 1000), secrets.token_bytes(10))


class DerivedIds:
    """The ids of what a consumer publishes for the messages of one partition: the same however often it runs.

    Should effects ever be redone after a restore, everybody downstream still recognises the duplicates.

    48 bits of time, then 66 bits of a hash of where the message comes from, with its offset but for the last 8 bits,
    and these as they are: to be written for each message, the hash would cost more than all the rest.
    """

    def __init__(self, consumer: str, topic_id: UUID, partition: int) -> None:
        self._seed = hashlib.sha256(f"{consumer}\0{topic_id}\0{partition}\0".encode())
        self._timestamp: int | None = None
        self._head = ""
        self._block: int | None = None
        self._stems: dict[int, str] = {}
        """Of the messages of this block of offsets, by index."""

    def text(self, offset: int, timestamp: int, index: int) -> str:
        """The id, in canonical form, of the `index`-th message published for the one at `offset`.

        The bits of `_uuid7`, set in the text: a UUID object in between would cost more than the hash.
        """
        if timestamp != self._timestamp:
            time = f"{max(timestamp, 0) & _TIME_BITS:012x}"
            self._timestamp, self._head = timestamp, f"{time[:8]}-{time[8:]}-7"
        block = offset >> 8
        if block != self._block:
            self._block, self._stems = block, {}
        stem = self._stems.get(index)
        if stem is None:
            stem = self._stems[index] = self._stem(block, index)
        return f"{self._head}{stem}{offset & 0xFF:02x}"

    def _stem(self, block: int, index: int) -> str:
        seed = self._seed.copy()
        seed.update(b"%d\0%d" % (block, index))
        tail = seed.hexdigest()
        return f"{tail[1:4]}-{_VARIANT[tail[4]]}{tail[5:8]}-{tail[8:18]}"


def derived_id(source: Source, index: int) -> UUID:
    """The id of the `index`-th message a handler publishes for one input; see DerivedIds."""
    ids = DerivedIds(source.consumer, source.topic_id, source.partition)
    return UUID(ids.text(source.offset, source.timestamp, index))


def position_id(topic_id: UUID, partition: int, offset: int) -> UUID:
    """The name of a message that carries no id, wherever a table needs one."""
    return uuid5(topic_id, f"{partition}:{offset}")


def parse_id(text: str, *, namespace: str) -> UUID:
    """A message id as a UUID; an id that is none is folded into `namespace`, so it stays unique there.

    Only the canonical 36-character form counts as a UUID: `UUID()` also accepts braces and missing dashes, and two
    spellings of different producers must not become one id, which would be silent loss.
    """
    if len(text) == 36:
        try:
            parsed = UUID(text)
        except ValueError:
            return uuid5(uuid5(_ID_NAMESPACE, namespace), text)
        if str(parsed) == text.lower():
            return parsed
    return uuid5(uuid5(_ID_NAMESPACE, namespace), text)


def _uuid7(milliseconds: int, tail: bytes) -> UUID:
    number = (milliseconds & _TIME_BITS) << 80 | int.from_bytes(tail, "big")
    number = number & ~(0xF << 76) | 0x7 << 76
    number = number & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=number)
