"""What the tables say about messages that are to go through their handler again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from eoframework import events
from eoframework.db import audit
from eoframework.db.position import PositionRow, Stream
from eoframework.db.session import Database
from eoframework.schema import Schema

Place = tuple[int, int]

_ROWS = """
SELECT c.id, p.topic, p.topic_id, p.cluster_id, p.partition, p.next_offset, p.epoch, p.owner,
    coalesce(v.covered_from, 0)
FROM {eo}.position p JOIN {eo}.consumer c ON c.id = p.consumer_id
    LEFT JOIN {eo}.coverage v USING (consumer_id, topic_id, partition)
WHERE c.name = %(consumer)s AND p.topic = %(topic)s ORDER BY p.partition
"""
_POSITIONS = """
SELECT partition, next_offset FROM {eo}.position WHERE consumer_id = %(consumer_id)s AND topic_id = %(topic_id)s
    AND partition = ANY(%(partitions)s::int[])
"""
# One statement, one snapshot: a dead letter that is sent back to its lane meanwhile is the one or the other.
_SET_ASIDE = """
WITH given AS (SELECT p AS partition, o AS place FROM unnest(%(partitions)s::int[], %(offsets)s::bigint[]) AS g(p, o))
SELECT 'parked', g.partition, g.place FROM given g JOIN {eo}.parked_message m
    ON m.consumer_id = %(consumer_id)s AND m.topic_id = %(topic_id)s AND m.partition = g.partition
    AND m."offset" = g.place
UNION ALL SELECT 'dead', g.partition, g.place FROM given g JOIN {eo}.dead_letter d
    ON d.origin = 'handler' AND d.consumer_id = %(consumer_id)s AND d.topic_id = %(topic_id)s
    AND d.partition = g.partition AND d."offset" = g.place
"""
_WAITING = """
SELECT partition, lane FROM {eo}.parked_key WHERE consumer_id = %(consumer_id)s AND topic_id = %(topic_id)s
    AND (partition, lane) IN (SELECT * FROM unnest(%(partitions)s::int[], %(lanes)s::uuid[]))
"""
_REMEMBERED = """
SELECT message_id FROM {eo}.processed_message WHERE consumer_id = %(consumer_id)s AND message_id = ANY(%(ids)s::uuid[])
"""
# Locked in the order in which everybody inserts them. What was recorded after the repetition began has been repeated.
# first_at: a duplicate that came in live meanwhile makes processed_at younger, and repeats nothing.
_REPEAT = """
WITH old AS (SELECT message_id FROM {eo}.processed_message WHERE consumer_id = %(consumer_id)s
    AND message_id = ANY(%(ids)s::uuid[]) AND first_at < %(before)s ORDER BY message_id FOR UPDATE)
UPDATE {eo}.processed_message p SET processed_at = now(), first_at = now() FROM old
WHERE p.consumer_id = %(consumer_id)s AND p.message_id = old.message_id RETURNING p.message_id
"""


@dataclass(frozen=True, slots=True)
class Stand:
    """A consumer's position in a partition, and from where on ids are remembered."""

    consumer_id: int
    row: PositionRow
    covered_from: int


@dataclass(frozen=True, slots=True)
class SetAside:
    """Messages that live on elsewhere, and must not be run beside it."""

    parked: frozenset[Place]
    dead: frozenset[Place]


class Reprocessing:
    """Each method but `stands` and `note` is one statement in the caller's transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._schema: Schema = database.schema

    def stands(self, consumer: str, topic: str) -> list[Stand]:
        """Where the consumer stands in every partition of a topic of that name, whatever cluster it was on."""
        with self._database.begin(f"reading the positions of {consumer}") as connection:
            rows = self._all(connection, _ROWS, {"consumer": consumer, "topic": topic})
        return [Stand(row[0], PositionRow(*row[1:8]), row[8]) for row in rows]

    def note(self, actor: str, action: str, subject: str, detail: dict[str, object]) -> datetime:
        """Write an audit row in a transaction of its own; returns the server's time before anything after it."""
        with self._database.begin(action) as connection:
            audit.record(connection, self._schema, actor=actor, action=action, subject=subject, detail=detail)
            at: datetime = connection.exec_driver_sql("SELECT clock_timestamp()").scalar_one()
        events.emit("reprocess.noted", action=action)
        return at

    def positions(self, connection: Connection, stream: Stream, partitions: Collection[int]) -> dict[int, int]:
        """The next offset of each of the partitions, now."""
        rows = self._all(connection, _POSITIONS, {**stream.key(), "partitions": list(partitions)})
        return {row[0]: row[1] for row in rows}

    def set_aside(self, connection: Connection, stream: Stream, places: Sequence[Place]) -> SetAside:
        """Those of the messages that are parked, and those that are dead letters."""
        values = {"partitions": [p for p, _ in places], "offsets": [o for _, o in places]}
        rows = self._all(connection, _SET_ASIDE, {**stream.key(), **values})
        found = {kind: frozenset((p, o) for k, p, o in rows if k == kind) for kind in ("parked", "dead")}
        return SetAside(found["parked"], found["dead"])

    def waiting(self, connection: Connection, stream: Stream, lanes: Collection[tuple[int, UUID]]) -> set[Any]:
        """Those of the lanes in which something waits, without holding them."""
        values = {"partitions": [p for p, _ in lanes], "lanes": [lane for _, lane in lanes]}
        return {(row[0], row[1]) for row in self._all(connection, _WAITING, {**stream.key(), **values})}

    def remembered(self, connection: Connection, consumer_id: int, ids: Collection[UUID]) -> set[UUID]:
        """Those of the ids that are recorded as processed."""
        rows = self._all(connection, _REMEMBERED, {"consumer_id": consumer_id, "ids": list(ids)})
        return {row[0] for row in rows}

    def repeat(self, connection: Connection, consumer_id: int, ids: Collection[UUID], *, before: datetime) -> set[UUID]:
        """Take the ids that were recorded before that time as not yet processed, and record them anew; returns them.

        One of them that another transaction takes at this moment is waited for, and is then no longer as old.
        """
        values = {"consumer_id": consumer_id, "ids": list(ids), "before": before}
        return {row[0] for row in self._all(connection, _REPEAT, values)}

    def _all(self, connection: Connection, sql: str, values: dict[str, object]) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in connection.exec_driver_sql(self._schema.sql(sql), values)]
