"""Whether a Kafka transaction was committed, read from the log: one of its own records tells it of all."""

from __future__ import annotations

import threading
from uuid import UUID

from eoframework import clock
from eoframework.cloudevents import incoming_id
from eoframework.errors import NotFound, Retryable
from eoframework.kafka.ranges import RangeReader
from eoframework.settings import Settings

_SLICE = 0.1
_NEVER = threading.Event()


def was_committed(
    settings: Settings,
    topic: str,
    partition: int,
    offset: int,
    id: UUID,  # noqa: A002 - the message's word for it
    *,
    deadline: float,
) -> bool:
    """Whether `read_committed` readers see message `id` at that place, once its Kafka transaction has ended.

    To be asked after the transaction's producer was fenced, else it is waited for until `deadline`.
    Raises Retryable, NotFound or another EoError: it cannot be told.
    """
    with RangeReader(settings, topic, group="eo.producer") as reader:
        while True:
            first, end = reader.edges(partition)
            if offset < end:
                break
            if clock.monotonic() >= deadline:
                raise Retryable(f"{topic}[{partition}]@{offset} is part of a Kafka transaction that is still open.")
            clock.wait(_NEVER, _SLICE)
        if offset < first:
            raise NotFound(f"{topic}[{partition}]@{offset} was deleted meanwhile.")
        found = [record for some in reader.read(partition, offset, offset + 1, limit=1) for record in some]
    return any(incoming_id(record.headers, topic=topic) == id for record in found)
