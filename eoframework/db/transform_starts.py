"""Where each transform began in each partition, and whether the group has had an offset there since.

The group's offsets in Kafka are the truth; but they expire with an idle group and are deleted by tools, and then a
transform that has run for a year looks like one that has never run. These rows tell the two apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection

from eoframework.db.position import Stream
from eoframework.schema import Schema

_KNOWN = """
SELECT topic_id, cluster_id, partition, start_offset, begun FROM {eo}.transform_start
WHERE consumer_id = %(consumer_id)s AND topic = %(topic)s ORDER BY partition
"""
_PLAN = """
INSERT INTO {eo}.transform_start (consumer_id, topic_id, partition, topic, cluster_id, start_offset)
SELECT %(consumer_id)s, %(topic_id)s, p, %(topic)s, %(cluster_id)s, o
FROM unnest(%(partitions)s::int[], %(offsets)s::bigint[]) AS start(p, o) ORDER BY p
ON CONFLICT DO NOTHING
"""
_BEGUN = """
UPDATE {eo}.transform_start SET begun = true WHERE consumer_id = %(consumer_id)s AND topic_id = %(topic_id)s
    AND partition = ANY(%(partitions)s::int[]) AND NOT begun
"""


@dataclass(frozen=True, slots=True)
class PlannedStart:
    """Where a transform begins in a partition."""

    topic_id: UUID
    cluster_id: str
    partition: int
    offset: int
    begun: bool
    """The group has had an offset there since."""


class TransformStarts:
    """Each method is one statement in the caller's transaction."""

    def __init__(self, schema: Schema) -> None:
        self._known, self._plan, self._begun = (schema.sql(text) for text in (_KNOWN, _PLAN, _BEGUN))

    def known(self, connection: Connection, *, consumer_id: int, topic: str) -> list[PlannedStart]:
        """All rows for this topic name, also those of an earlier topic or another cluster of that name."""
        found = connection.exec_driver_sql(self._known, {"consumer_id": consumer_id, "topic": topic})
        return [PlannedStart(*row) for row in found]

    def plan(self, connection: Connection, stream: Stream, offsets: Mapping[int, int]) -> None:
        """Store where the transform begins (partition -> offset); a row that exists is left alone."""
        values = {"partitions": list(offsets), "offsets": list(offsets.values())}
        connection.exec_driver_sql(self._plan, {**stream.row(), **values})

    def begun(self, connection: Connection, stream: Stream, partitions: Iterable[int]) -> None:
        """The group has offsets there; missing ones are lost from now on."""
        connection.exec_driver_sql(self._begun, {**stream.key(), "partitions": list(partitions)})
