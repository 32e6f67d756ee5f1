"""From which offset on the ids of processed messages are all still remembered.

Sending a message through a handler again is safe as long as its id is remembered, and ids are forgotten by age. So
before ids are forgotten, it is recorded up to which offset that may concern: `covered_from`, which only ever rises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from eoframework.db.processed import RENEW_AFTER
from eoframework.db.session import Database
from eoframework.schema import Schema

# As for pruning itself (retention.py), with the same lock: no batch waits for this, and one worker does it at a time.
_PREPARE = """
SELECT set_config('statement_timeout', '5s', true), set_config('lock_timeout', '500ms', true),
    pg_try_advisory_xact_lock(1701867117, hashtext(%(schema)s))
"""
# An id bears the time at which its transaction began, and becomes visible when that ends. So what is read after this
# holds for transactions that began before the oldest one still open: none of those can bring an older id any more. The
# margin: a session shows its transaction a moment after it has begun. Sessions of other roles may not be looked into;
# they get an hour.
_MARGIN = timedelta(seconds=5)
_HORIZON = """
SELECT least(min(a.xact_start), clock_timestamp()
    - make_interval(hours => bool_or(a.backend_start IS NULL)::int)) - %(margin)s
FROM pg_stat_activity a WHERE a.datname = current_database() AND a.usesysid IS NOT NULL
"""
# Never less than a sample before: a position that was set back has been further, and the ids of that time are older
# than those of the way back.
_SAMPLE = """
INSERT INTO {eo}.position_sample (consumer_id, topic_id, partition, at, reached)
SELECT p.consumer_id, p.topic_id, p.partition, %(horizon)s, greatest(p.next_offset, s.reached)
FROM {eo}.position p CROSS JOIN LATERAL (
    SELECT max(at) AS at, max(reached) AS reached FROM {eo}.position_sample s
    WHERE (s.consumer_id, s.topic_id, s.partition) = (p.consumer_id, p.topic_id, p.partition)) s
WHERE s.at IS NULL OR s.at < %(horizon)s - make_interval(secs => %(seconds)s / 100)
ON CONFLICT DO NOTHING
"""
# The first sample at or after the time says what was reached by then; later by the accuracy with which an id's time
# follows its duplicates. Without one: whatever has been reached at all. A consumer younger than that has no such ids.
_RAISE = """
INSERT INTO {eo}.coverage AS old (consumer_id, topic_id, partition, covered_from)
SELECT * FROM (
    SELECT s.consumer_id, s.topic_id, s.partition, coalesce(
        (array_agg(s.reached ORDER BY s.at) FILTER (WHERE s.at >= %(before)s + %(renew_after)s))[1],
        greatest(max(s.reached), max(p.next_offset))) AS covered_from
    FROM {eo}.position_sample s JOIN {eo}.consumer c ON c.id = s.consumer_id AND c.created_at < %(before)s
        LEFT JOIN {eo}.position p USING (consumer_id, topic_id, partition)
    GROUP BY s.consumer_id, s.topic_id, s.partition) AS new
WHERE covered_from > coalesce((SELECT known.covered_from FROM {eo}.coverage known
    WHERE (known.consumer_id, known.topic_id, known.partition) = (new.consumer_id, new.topic_id, new.partition)), 0)
ORDER BY 1, 2, 3
ON CONFLICT (consumer_id, topic_id, partition) DO UPDATE
    SET covered_from = excluded.covered_from WHERE old.covered_from < excluded.covered_from
"""
# One that a later one makes superfluous: both too old to be asked for, or both saying the same. The last one of a
# place stays for ever: it is what remains of a consumer whose positions were forgotten.
_THIN_OUT = """
DELETE FROM {eo}.position_sample s USING {eo}.position_sample later
WHERE (s.consumer_id, s.topic_id, s.partition) = (later.consumer_id, later.topic_id, later.partition)
    AND later.at > s.at AND later.reached >= s.reached AND (s.at < %(before)s OR s.reached = later.reached)
"""
# The position row is locked by the caller: nobody moves it on, and whoever began earlier is fenced.
_NOTE = """
INSERT INTO {eo}.position_sample AS s (consumer_id, topic_id, partition, at, reached)
SELECT p.consumer_id, p.topic_id, p.partition, clock_timestamp(), greatest(p.next_offset,
    (SELECT max(reached) FROM {eo}.position_sample o
     WHERE (o.consumer_id, o.topic_id, o.partition) = (p.consumer_id, p.topic_id, p.partition)))
FROM {eo}.position p JOIN {eo}.consumer c ON c.id = p.consumer_id WHERE c.name = %(consumer)s
    AND (%(partition)s::int IS NULL OR p.topic_id = %(topic_id)s AND p.partition = %(partition)s)
ON CONFLICT (consumer_id, topic_id, partition, at) DO UPDATE SET reached = greatest(s.reached, excluded.reached)
"""


@dataclass(frozen=True, slots=True)
class Covered:
    """What was done before ids are forgotten."""

    before: datetime
    """Ids older than this may go: every coverage says so already. The server's clock."""
    raised: int
    """How many partitions are now covered from a later offset on."""


def raise_coverage(database: Database, *, older_than: timedelta) -> Covered | None:
    """Record which offsets will no longer be covered once ids older than the window are gone; None if another is at it.

    On a crash: done or not. In a transaction of its own, committed before the first of those ids is deleted: after a
    crash between the two, messages whose ids are still there count as forgotten; the other way round effects would be
    repeated. No position row is locked, so no batch waits.
    """
    schema, seconds = database.schema, older_than.total_seconds()
    with database.begin("recording which offsets are covered") as connection:
        if not connection.exec_driver_sql(_PREPARE, {"schema": schema.name}).one()[-1]:
            return None
        # A statement of its own: in one with the sample, the positions would be read before the sessions are.
        horizon = connection.exec_driver_sql(_HORIZON, {"margin": _MARGIN}).scalar_one()
        before = connection.exec_driver_sql(
            "SELECT least(%(horizon)s, clock_timestamp() - make_interval(secs => %(seconds)s))",
            {"horizon": horizon, "seconds": seconds},
        ).scalar_one()
        connection.exec_driver_sql(schema.sql(_SAMPLE), {"horizon": horizon, "seconds": seconds})
        raised = connection.exec_driver_sql(schema.sql(_RAISE), {"before": before, "renew_after": RENEW_AFTER}).rowcount
        connection.exec_driver_sql(schema.sql(_THIN_OUT), {"before": before})
    return Covered(before, raised)


def note_reached(connection: Connection, schema: Schema, consumer: str, place: Mapping[str, Any] | None = None) -> None:
    """Remember how far a position got before it is set back or forgotten; its row is locked by the caller.

    place: `topic_id` and `partition`; all of the consumer without.
    """
    values = {"consumer": consumer, "topic_id": None, "partition": None, **(place or {})}
    connection.exec_driver_sql(schema.sql(_NOTE), values)
