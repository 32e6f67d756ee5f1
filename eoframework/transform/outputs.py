"""From what the function returned to records for Kafka.

Every message passes here, so what all records of one kind have in common is made once (`_Way`), and no value is made
that is only taken apart again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from eoframework import clock, parts
from eoframework.cloudevents import Envelope, event_time, outgoing_headers, traceparent_of
from eoframework.db.position import Stream
from eoframework.errors import HandlerMisuse
from eoframework.kafka.producer import Outgoing
from eoframework.message import DerivedIds, Headers, OutboxMessage, Record
from eoframework.topic import Topic
from eoframework.transforms import Out, Transform

_WAYS = 1000


class Outputs:
    """Encodes the results of one transform, with ids that are the same however often it runs."""

    def __init__(self, transform: Transform, stream: Stream, *, source: str) -> None:
        """`source`: the CloudEvents source, the app's name."""
        self._transform = transform
        self._source = source
        self._ids = _Ids(stream)
        self._names = {topic.name for topic in transform.targets}
        self._ways: dict[tuple[Topic[Any], type], _Way] = {}
        self._way_of = {kind: self._way(topic, kind) for kind, topic in transform.by_class.items()}
        """The way of a payload that names no topic, by its class."""
        self._time = b""
        self.begin()

    def begin(self) -> None:
        """What is made from now on is made now: `ce_time` is the same for all messages of a chunk."""
        self._time = event_time(clock.now())

    def of(self, record: Record, returned: Any) -> list[Outgoing]:
        """The records to send for what the function returned for one message, in their order.

        Raises EncodeError, HandlerMisuse: a failure of that message.
        """
        trace = traceparent_of(record.headers)
        if (way := self._way_of.get(type(returned))) is not None:
            return [self._record(record, trace, way, returned, 0)]
        results = self._transform.results(returned)
        return [self._any(record, trace, result, index) for index, result in enumerate(results)]

    def of_list(self, records: Sequence[Record], returned: Sequence[Any]) -> list[list[Outgoing]]:
        """As `of` for each of them, for less if one payload of one class was made of each, as of most lists."""
        kinds = set(map(type, returned))
        way = self._way_of.get(kinds.pop()) if len(kinds) == 1 else None
        if way is None or not way.derives_id:
            return list(map(self.of, records, returned))
        return self._alike(records, way, returned)

    def _alike(self, records: Sequence[Record], way: _Way, payloads: Sequence[Any]) -> list[list[Outgoing]]:
        topic, ids, encode_key = way.topic, self._ids, way.topic.encode_key
        name, time, headers_of, room = topic.name, self._time, way.envelope.headers, topic.max_bytes - way.size
        made: list[list[Outgoing]] = []
        for record, payload, value in zip(records, payloads, topic.encode_payloads(payloads), strict=True):
            _, partition, offset, own_key, _, headers, timestamp, _ = record
            key = encode_key(payload, None)
            if key is None:
                key = own_key
            if len(value or b"") + len(key or b"") > room:
                topic.check_size(key, value, way.size)
            identity = ids[partition].text(offset, timestamp, 0).encode()
            its_headers = headers_of(identity, time, traceparent_of(headers))
            # Not Outgoing(...), which costs twice as much.
            made.append([_new(Outgoing, (name, key, value, its_headers, -1, None))])
        return made

    def _any(self, record: Record, trace: bytes | None, result: Any, index: int) -> Outgoing:
        if isinstance(result, Out):
            return self._out(record, trace, result, index)
        way = self._way_of.get(type(result)) or self._way(self._transform.target_of(result), type(result))
        return self._record(record, trace, way, result, index)

    def _out(self, record: Record, trace: bytes | None, out: Out[Any], index: int) -> Outgoing:
        # By name, as Kafka knows it: the same topic may be declared in two modules, or anew in the function.
        if out.topic.name not in self._names:
            where = self._transform.where
            raise HandlerMisuse(
                f"{self._transform.group} ({where}) sends to {out.topic.name!r}, which it does not name.",
                remedy="Add the topic to to={...}.",
            )
        way = self._way(out.topic, type(out.payload))
        own = parts.headers(out.headers, out.topic.name)
        # A tombstone has no payload to read a key from.
        key = record.key if out.key is None and out.payload is None else out.key
        return self._record(record, trace, way, out.payload, index, key, out.id, own)

    def _record(
        self,
        record: Record,
        trace: bytes | None,
        way: _Way,
        payload: Any,
        index: int,
        key: parts.Part | None = None,
        identity: UUID | str | None = None,
        own: Headers = (),
    ) -> Outgoing:
        topic = way.topic
        value = topic.encode_payload(payload)
        encoded_key = topic.encode_key(payload, key)
        if encoded_key is None:
            # It keeps the input's, and with it the input's order.
            encoded_key = record.key
        chosen = None if way.derives_id and identity is None else topic.choose_id(payload, identity)
        text = self._ids[record.partition].text(record.offset, record.timestamp, index) if chosen is None else chosen
        topic.check_size(encoded_key, value, way.size + parts.size_of(own) if own else way.size)
        headers = way.envelope.headers(str(text).encode(), self._time, trace, own)
        return Outgoing(topic.name, encoded_key, value, list(headers))

    def _way(self, topic: Topic[Any], kind: type) -> _Way:
        way = self._ways.get((topic, kind))
        if way is None:
            if len(self._ways) >= _WAYS:
                # Topics or classes that are made anew for each message.
                self._ways.clear()
            type_ = topic.type_of(kind)
            envelope = Envelope(self._source, type_, topic.content_type)
            way = self._ways[topic, kind] = _Way(
                topic, envelope, topic.size_of_headers(self._source, type_), derives_id=not topic.has_id
            )
        return way


_new: Callable[[type[Outgoing], tuple[object, ...]], Outgoing] = tuple.__new__


@dataclass(frozen=True, slots=True)
class _Way:
    """What all payloads of one class that go to one topic have in common."""

    topic: Topic[Any]
    envelope: Envelope
    size: int
    """The bytes of their headers, at most."""
    derives_id: bool
    """The payload names no id."""


class _Ids(dict[int, DerivedIds]):
    """By the input's partition."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def __missing__(self, partition: int) -> DerivedIds:
        ids = self[partition] = DerivedIds(self._stream.consumer, self._stream.topic_id, partition)
        return ids


def outgoing(message: OutboxMessage, *, key: bytes | None) -> Outgoing:
    """An encoded message as the record that Kafka gets."""
    headers = outgoing_headers(
        id=message.id,
        source=message.source,
        type=message.type,
        time=clock.now(),
        content_type=message.content_type,
        headers=message.headers,
        traceparent=message.traceparent,
    )
    return Outgoing(message.topic, key, message.payload, list(headers))
