"""From what the function returned to records for Kafka."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eoframework import clock
from eoframework.cloudevents import outgoing_headers, traceparent_of
from eoframework.db.position import Stream
from eoframework.errors import HandlerMisuse
from eoframework.kafka.producer import Outgoing
from eoframework.message import OutboxMessage, Record, Source, derived_id
from eoframework.transforms import Out, Transform


class Outputs:
    """Encodes the results of one transform, with ids that are the same however often it runs."""

    def __init__(self, transform: Transform, stream: Stream, *, source: str) -> None:
        """`source`: the CloudEvents source, the app's name."""
        self._transform = transform
        self._stream = stream
        self._source = source

    def of(self, record: Record, results: Sequence[Any]) -> list[Outgoing]:
        """The records to send for one message. Raises EncodeError, HandlerMisuse: a failure of that message."""
        return [self._record(record, result, index) for index, result in enumerate(results)]

    def _record(self, record: Record, result: Any, index: int) -> Outgoing:
        out = result if isinstance(result, Out) else Out(self._transform.target_of(result), result)
        if out.topic not in self._transform.targets:
            raise HandlerMisuse(
                f"{self._transform.group} ({self._transform.where}) sends to {out.topic.name!r}, not named by it.",
                remedy="Add the topic to to={...}.",
            )
        place = Source(self._stream.consumer, self._stream.topic_id, record.partition, record.offset, record.timestamp)
        # A tombstone has no payload to read a key from.
        key = record.key if out.key is None and out.payload is None else out.key
        message = out.topic.encode(
            out.payload,
            source=self._source,
            key=key,
            id=out.id,
            headers=out.headers,
            default_id=derived_id(place, index),
            traceparent=traceparent_of(record.headers),
        )
        # Without a key of its own it keeps the input's, and with it the input's order.
        return outgoing(message, key=record.key if message.key is None else message.key)


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
