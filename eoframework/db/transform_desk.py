"""What the database remembers of transforms, in an operator's hands: shown, corrected, forgotten.

The group's offsets are in Kafka; so each change takes `in_kafka`, which makes it there or raises. It is the last thing
before the COMMIT: what Kafka refuses leaves no trace here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from eoframework import events
from eoframework.db import audit
from eoframework.db.session import Database
from eoframework.errors import FailClosed

_LINES = """
SELECT c.name, s.topic, s.topic_id, s.cluster_id, s.partition, s.start_offset, s.begun
FROM {eo}.transform_start s JOIN {eo}.consumer c ON c.id = s.consumer_id
WHERE %(consumer)s::text IS NULL OR c.name = %(consumer)s ORDER BY c.name, s.topic, s.partition
"""
_BEGUN = """
UPDATE {eo}.transform_start s SET begun = true FROM {eo}.consumer c WHERE c.id = s.consumer_id
    AND c.name = %(consumer)s AND s.topic_id = %(topic_id)s AND s.partition = %(partition)s RETURNING s.partition
"""
# Who registers for a first start waits here, and then plans it anew.
_LOCK = "SELECT FROM {eo}.consumer WHERE name = %(consumer)s FOR NO KEY UPDATE"
_FORGET = """
DELETE FROM {eo}.transform_start USING {eo}.consumer c WHERE c.id = consumer_id AND c.name = %(consumer)s
RETURNING partition
"""
# As for handlers: without a topic it no longer stands for any, and another may take its place.
_RETIRE = """
UPDATE {eo}.consumer c SET topic = '' WHERE c.name = %(consumer)s
    AND NOT EXISTS (SELECT FROM {eo}.position p WHERE p.consumer_id = c.id)
"""
_ONLY_TRANSFORM = """
SELECT 1 FROM {eo}.consumer c WHERE c.name = %(consumer)s
    AND EXISTS (SELECT FROM {eo}.transform_start s WHERE s.consumer_id = c.id)
    AND NOT EXISTS (SELECT FROM {eo}.position p WHERE p.consumer_id = c.id)
    AND NOT EXISTS (SELECT FROM {eo}.dead_letter d WHERE d.consumer_id = c.id)
"""


@dataclass(frozen=True, slots=True)
class StartLine:
    """Where one transform began in one partition."""

    consumer: str
    topic: str
    topic_id: UUID
    cluster_id: str
    partition: int
    start_offset: int
    begun: bool
    """The group has had an offset there since: without one now, it was lost."""


class TransformDesk:
    """Each call is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def lines(self, consumer: str | None = None) -> list[StartLine]:
        """All that is known, or of one transform."""
        with self._database.begin("reading where transforms began") as connection:
            return [StartLine(*row) for row in self._run(connection, _LINES, {"consumer": consumer})]

    def only_transform(self, consumer: str) -> bool:
        """Whether it is a transform, and nothing of a handler of that name is left."""
        with self._database.begin(f"asking what {consumer} is") as connection:
            return bool(self._run(connection, _ONLY_TRANSFORM, {"consumer": consumer}))

    def move(
        self, line: StartLine, *, actor: str, detail: Mapping[str, object], in_kafka: Callable[[], object]
    ) -> None:
        """Note that the group has an offset there, set by hand; with its audit row.

        On a crash right after `in_kafka`: the offset is set, and not noted. The next worker finds it, begins there, and
        notes it itself; only the audit row is missing. The other way round, a partition without an offset would be
        noted as begun, and its worker would refuse to start. Raises FailClosed when it was forgotten meanwhile.
        """
        where = {"consumer": line.consumer, "topic_id": line.topic_id, "partition": line.partition}
        with self._database.brief(f"setting the offset of {line.consumer}") as connection:
            if not self._run(connection, _BEGUN, where):
                raise FailClosed(f"{line.consumer} was forgotten meanwhile.", remedy="Nothing was changed.")
            self._record(connection, "position.set", line.consumer, actor, detail)
            events.emit("position.moving", consumer=line.consumer, partition=line.partition)
            in_kafka()
        events.emit("position.moved", consumer=line.consumer, partition=line.partition)

    def forget(self, consumer: str, *, actor: str, in_kafka: Callable[[], object]) -> int:
        """Delete what is known of the transform, with an audit row; returns of how many partitions.

        On a crash right after `in_kafka`: the rows are still there, so the lost offsets are seen, and the transform
        refuses to start until this was said again. The other way round it would go on at offsets nobody wants.
        """
        with self._database.brief(f"forgetting where {consumer} began") as connection:
            self._run_only(connection, _LOCK, {"consumer": consumer})
            gone = len(self._run(connection, _FORGET, {"consumer": consumer}))
            self._run_only(connection, _RETIRE, {"consumer": consumer})
            self._record(connection, "position.forget", consumer, actor, {"partitions": gone})
            events.emit("position.forgetting", consumer=consumer)
            in_kafka()
        events.emit("position.forgotten", consumer=consumer)
        return gone

    def _record(
        self, connection: Connection, action: str, consumer: str, actor: str, detail: Mapping[str, object]
    ) -> None:
        subject = f"consumer/{consumer}"
        audit.record(connection, self._database.schema, actor=actor, action=action, subject=subject, detail=detail)

    def _run(self, connection: Connection, template: str, values: Mapping[str, object]) -> Sequence[Any]:
        sql = self._database.schema.sql(template)
        return connection.exec_driver_sql(sql, dict(values)).all()

    def _run_only(self, connection: Connection, template: str, values: Mapping[str, object]) -> None:
        connection.exec_driver_sql(self._database.schema.sql(template), dict(values))
