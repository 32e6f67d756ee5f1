"""Positions in an operator's hands: shown, moved, forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from eoframework import events
from eoframework.db import audit
from eoframework.db.coverage import note_reached
from eoframework.db.session import Database
from eoframework.errors import FailClosed

# When a session of another role began may not be looked at; a number that is in use then counts as the owner's: whoever
# took a running worker for a dead one would move its partitions.
_ROWS = """
SELECT c.name, p.topic, p.topic_id, p.partition, p.next_offset, p.epoch, p.owner, p.claimed_at,
    CASE WHEN p.owner IS NULL OR p.backend_pid IS NOT NULL THEN EXISTS (SELECT FROM pg_stat_activity a
        WHERE a.pid = p.backend_pid AND coalesce(a.backend_start = p.backend_start, true)) END,
    coalesce(v.covered_from, 0)
FROM {eo}.position p JOIN {eo}.consumer c ON c.id = p.consumer_id
    LEFT JOIN {eo}.coverage v USING (consumer_id, topic_id, partition)
WHERE %(consumer)s::text IS NULL OR c.name = %(consumer)s ORDER BY c.name, p.topic, p.partition
"""
# A batch that is under way ends first, so that the offset read afterwards is how far the position ever got.
_LOCK = """
SELECT p.topic, p.partition, p.next_offset FROM {eo}.position p JOIN {eo}.consumer c ON c.id = p.consumer_id
WHERE c.name = %(consumer)s
    AND (%(partition)s::int IS NULL OR p.topic_id = %(topic_id)s AND p.partition = %(partition)s)
ORDER BY p.topic_id, p.partition FOR UPDATE OF p
"""
_BATCH = 60.0
"""Seconds; longer than a batch holds its positions."""
# epoch + 1 fences whoever holds the partition; that worker claims again and starts at the new offset.
_SET = """
UPDATE {eo}.position p SET next_offset = %(offset)s, epoch = epoch + 1 FROM {eo}.consumer c
WHERE c.id = p.consumer_id AND c.name = %(consumer)s AND p.topic_id = %(topic_id)s AND p.partition = %(partition)s
RETURNING p.epoch
"""
# The ids of processed messages stay until they are too old: should the consumer come back, they still count as done.
# Without a topic the consumer no longer stands for any, so a handler may take its place; unless it is a transform too.
_FORGET = """
WITH gone AS (
    DELETE FROM {eo}.position USING {eo}.consumer c WHERE c.id = consumer_id AND c.name = %(consumer)s
    RETURNING partition
), retired AS (
    UPDATE {eo}.consumer c SET topic = '' WHERE name = %(consumer)s
        AND NOT EXISTS (SELECT FROM {eo}.transform_start s WHERE s.consumer_id = c.id) RETURNING id
) SELECT (SELECT count(*) FROM gone), (SELECT count(*) FROM {eo}.consumer WHERE name = %(consumer)s)
"""
# Those of a topic that the consumer stands for. What is left of an earlier one is stranded already.
_PARKED = """
SELECT count(*) FROM {eo}.parked_message m JOIN {eo}.consumer c ON c.id = m.consumer_id WHERE c.name = %(consumer)s
    AND EXISTS (SELECT FROM {eo}.position p WHERE p.consumer_id = m.consumer_id AND p.topic_id = m.topic_id)
"""


@dataclass(frozen=True, slots=True)
class PositionLine:
    """One partition of one consumer, as stored."""

    consumer: str
    topic: str
    topic_id: UUID
    partition: int
    next_offset: int
    epoch: int
    owner: str | None
    claimed_at: datetime | None
    owner_connected: bool | None
    """Whether the owner's database session is still open: a crash leaves the owner's name behind, but no session. None
    behind a pooler, where nobody keeps a session."""
    covered_from: int
    """From here on the ids of the messages processed are all remembered: sent again, they have no second effect."""


class PositionAdmin:
    """Each call is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def lines(self, consumer: str | None = None) -> list[PositionLine]:
        """Every position, or one consumer's."""
        with self._database.begin("reading positions") as connection:
            return [PositionLine(*row) for row in self._run(connection, _ROWS, {"consumer": consumer})]

    def consumers(self) -> list[str]:
        """The names of all consumers known and not forgotten."""
        with self._database.begin("reading consumers") as connection:
            return [
                row[0]
                for row in self._run(connection, "SELECT name FROM {eo}.consumer WHERE topic <> '' ORDER BY name", {})
            ]

    def move(self, line: PositionLine, offset: int, *, actor: str | None = None) -> int:
        """Set the position and fence its owner, with an audit row; returns the new epoch.

        On a crash: moved and recorded, or neither.
        """
        place = {"topic_id": line.topic_id, "partition": line.partition}
        with self._database.brief(f"moving the position of {line.consumer}", lock_wait=_BATCH) as connection:
            before = self._remember(connection, line.consumer, place)
            epoch = int(self._run(connection, _SET, {"consumer": line.consumer, **place, "offset": offset})[0][0])
            moved = {"from_offset": before[0][2] if before else None, "to_offset": offset, "epoch": epoch}
            detail = {"topic": line.topic, "partition": line.partition, **moved}
            self._record(connection, "position.set", line.consumer, actor, detail)
            events.emit("position.moving", consumer=line.consumer, partition=line.partition)
        events.emit("position.moved", consumer=line.consumer, partition=line.partition)
        return epoch

    def refuse_parked(self, consumer: str) -> None:
        """Raises FailClosed while messages of the consumer are parked: who forgot its positions would strand them."""
        with self._database.begin(f"counting the parked messages of {consumer}") as connection:
            _refuse(consumer, self._run(connection, _PARKED, {"consumer": consumer})[0][0])

    def forget(self, consumer: str, *, actor: str | None = None) -> int | None:
        """Delete all positions of the consumer, with an audit row that says where they stood; returns how many.

        None without such a consumer. On a crash: gone and recorded, or neither. Raises FailClosed while messages of it
        are parked.
        """
        with self._database.brief(f"forgetting the positions of {consumer}", lock_wait=_BATCH) as connection:
            before = self._remember(connection, consumer, {"topic_id": None, "partition": None})
            # Under the locked positions: nobody parks another one.
            _refuse(consumer, self._run(connection, _PARKED, {"consumer": consumer})[0][0])
            positions, consumers = self._run(connection, _FORGET, {"consumer": consumer})[0]
            if not consumers:
                return None
            detail = {"partitions": positions, "next_offsets": {f"{row[0]}[{row[1]}]": row[2] for row in before}}
            self._record(connection, "position.forget", consumer, actor, detail)
            events.emit("position.forgetting", consumer=consumer)
        events.emit("position.forgotten", consumer=consumer)
        return int(positions)

    def _remember(self, connection: Connection, consumer: str, place: dict[str, object]) -> Sequence[Any]:
        """Lock the positions and note how far they got: ids up to there are remembered, and will be forgotten."""
        found = self._run(connection, _LOCK, {"consumer": consumer, **place})
        note_reached(connection, self._database.schema, consumer, place)
        return found

    def _record(
        self, connection: Connection, action: str, consumer: str, actor: str | None, detail: Mapping[str, object]
    ) -> None:
        who, subject = audit.whoever(actor), f"consumer/{consumer}"
        audit.record(connection, self._database.schema, actor=who, action=action, subject=subject, detail=detail)

    def _run(self, connection: Connection, template: str, values: Mapping[str, object]) -> Sequence[Any]:
        sql = self._database.schema.sql(template)
        return connection.exec_driver_sql(sql, dict(values)).all()


def _refuse(consumer: str, parked: int) -> None:
    if parked:
        raise FailClosed(
            f"{consumer} has {parked} parked messages, which nobody could run without its positions. Nothing was "
            "changed.",
            remedy=f"Let it run until none is left in: eo dead ls --parked --handler {consumer}; or delete them for "
            f"good: eo dead discard --parked --handler {consumer}",
        )
