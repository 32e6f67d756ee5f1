"""Which messages of a list are in their topic: for when nobody remembers any more what was sent."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from eoframework import clock
from eoframework.cloudevents import incoming_id
from eoframework.errors import FailClosed
from eoframework.kafka.admin import Admin
from eoframework.kafka.answers import UnknownTopic
from eoframework.kafka.ranges import RangeReader
from eoframework.settings import Settings

_log = logging.getLogger(__name__)

# A record bears the time of the client that sent it or of the broker, a row the database's.
_CLOCKS_DIFFER = timedelta(hours=1)
_AT_ONCE = 1000
_OPEN = 30.0
_SLICE = 0.2


@dataclass(frozen=True, slots=True)
class Search:
    """What a topic says of a list of ids."""

    found: frozenset[UUID]
    doubt: str = ""
    """Why one that is not found may have been sent all the same; empty when it was not."""


def find_sent(settings: Settings, admin: Admin, topic: str, ids: Collection[UUID], *, since: datetime) -> Search:
    """Look for the ids among all that was committed in the topic since shortly before that time.

    Reads only. Raises FailClosed while a Kafka transaction is open that may still bring some of them.
    """
    try:
        info = admin.describe(topic, settings_optional=True)
    except UnknownTopic:
        return Search(frozenset())
    wanted, found, doubts = set(ids), set[UUID](), set[str]()
    policy = info.config.get("cleanup.policy")
    if policy is None or "compact" in policy:
        doubts.add("it is compacted" if policy else "its cleanup.policy may not be read")
    milliseconds = int((since - _CLOCKS_DIFFER).timestamp() * 1000)
    for partition in range(info.partitions):
        _log.info("looking for %d messages in %s[%d].", len(wanted), topic, partition)
        with RangeReader(settings, topic, group=topic) as reader:
            low, high = _settled_edges(admin, reader, topic, partition)
            start = reader.offset_at(partition, milliseconds)
            if low > 0 and (low == high or start == low):
                doubts.add(f"records of that time were deleted from partition {partition}")
            for records in reader.read(partition, high if start is None else start, high, limit=_AT_ONCE):
                seen = {incoming_id(record.headers, topic=topic) for record in records}
                found |= {one for one in seen if one is not None and one in wanted}
    return Search(frozenset(found), " and ".join(sorted(doubts)))


def _settled_edges(admin: Admin, reader: RangeReader, topic: str, partition: int) -> tuple[int, int]:
    """The log's ends, once all that it holds now is committed or aborted: a relay that died leaves a transaction."""
    end, deadline = admin.watermarks(topic, partition)[1], clock.monotonic() + _OPEN
    while True:
        low, committed = reader.edges(partition)
        if committed >= end:
            return low, committed
        if clock.monotonic() > deadline:
            raise FailClosed(
                f"a Kafka transaction is open in {topic}[{partition}] from offset {committed} on, and what it sent may "
                "still appear. Nothing was changed.",
                remedy="Stop all relays and say it again; what a dead one left ends with its transaction timeout.",
            )
        clock.sleep(_SLICE)
