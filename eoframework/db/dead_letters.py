"""Dead letters of handlers, as the worker writes them: given up on, kept whole, with their cause."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection

from eoframework.db.outbox import encode_headers
from eoframework.db.position import Stream
from eoframework.failures import Cause, Parked
from eoframework.message import position_id
from eoframework.schema import Schema

# The time of the first failure is where the attempts were counted: in its lane, or in its place. A producer may write
# any 64 bits as the timestamp, and this must not fail of it. A message without an id that `eo position set` sent
# through again may die once more: it is still one dead letter.
_BURY = """
INSERT INTO {eo}.dead_letter (origin, consumer_id, topic_id, partition, "offset", lane, message_id, has_id, topic, key,
    payload, headers, timestamp, unreadable, created_at, attempts, crashes, first_failed_at, last_failed_at,
    cause, error_class, fingerprint, error, traceback, holds)
SELECT 'handler', %(consumer_id)s, %(topic_id)s, %(partition)s, %(offset)s, %(lane)s, %(message_id)s, %(has_id)s,
    %(topic)s, %(key)s, %(payload)s, %(headers)s::json, %(timestamp)s, %(unreadable)s,
    CASE WHEN %(timestamp)s BETWEEN 0 AND 253402300799000 THEN to_timestamp(%(timestamp)s / 1000.0)
        ELSE clock_timestamp() END,
    %(attempts)s, %(crashes)s, coalesce(
        (SELECT m.first_failed_at FROM {eo}.parked_message m WHERE m.consumer_id = %(consumer_id)s
            AND m.topic_id = %(topic_id)s AND m.partition = %(partition)s AND m.lane = %(lane)s
            AND m."offset" = %(offset)s),
        (SELECT a.first_failed_at FROM {eo}.attempt a WHERE a.consumer_id = %(consumer_id)s
            AND a.topic_id = %(topic_id)s AND a.partition = %(partition)s AND a."offset" = %(offset)s),
        clock_timestamp()), clock_timestamp(),
    %(cause)s, %(error_class)s, %(fingerprint)s, %(error)s, %(traceback)s, %(holds)s
ON CONFLICT (consumer_id, topic_id, partition, "offset") WHERE origin = 'handler' DO UPDATE
    SET died_at = excluded.died_at, attempts = excluded.attempts, crashes = excluded.crashes,
        last_failed_at = excluded.last_failed_at, cause = excluded.cause, error_class = excluded.error_class,
        fingerprint = excluded.fingerprint, error = excluded.error,
        traceback = excluded.traceback, holds = excluded.holds
RETURNING id
"""
_RUN = "SELECT dead_run FROM {eo}.consumer WHERE id = %(consumer_id)s FOR NO KEY UPDATE"
_SET_RUN = "UPDATE {eo}.consumer SET dead_run = %(run)s WHERE id = %(consumer_id)s AND dead_run <> %(run)s"


@dataclass(frozen=True, slots=True)
class Dead:
    """A message to give up on; `why` is the sentence for people."""

    parked: Parked
    message_id: UUID | None
    why: str
    cause: Cause
    holds: bool = False
    """Its key waits until a person has decided."""


class DeadLetters:
    """Each method is one statement in the caller's transaction."""

    def __init__(self, schema: Schema) -> None:
        self._bury = schema.sql(_BURY)
        self._run = schema.sql(_RUN)
        self._set_run = schema.sql(_SET_RUN)

    def bury(self, connection: Connection, stream: Stream, dead: Dead) -> int:
        """Keep the message with its cause; returns the dead letter's number: one for each place."""
        record, cause = dead.parked.record, dead.cause
        values = {
            **stream.row(),
            "partition": record.partition,
            "offset": record.offset,
            "lane": dead.parked.lane,
            "message_id": dead.message_id or position_id(stream.topic_id, record.partition, record.offset),
            "has_id": dead.message_id is not None,
            "key": record.key,
            "payload": record.value,
            "headers": encode_headers(record.headers),
            "timestamp": record.timestamp,
            "unreadable": record.unreadable.replace("\0", "\\0"),
            "attempts": dead.parked.attempts,
            "crashes": dead.parked.crashes,
            "cause": f"{cause}: given up because {dead.why}",
            "error_class": cause.error_class,
            "fingerprint": cause.fingerprint,
            "error": cause.error,
            "traceback": cause.traceback,
            "holds": dead.holds,
        }
        return int(connection.exec_driver_sql(self._bury, values).scalar_one())

    def run(self, connection: Connection, consumer_id: int) -> int:
        """How many of this consumer's messages have died in a row; the number is ours until the transaction ends."""
        return int(connection.exec_driver_sql(self._run, {"consumer_id": consumer_id}).scalar_one())

    def set_run(self, connection: Connection, consumer_id: int, run: int) -> None:
        """Remember how many have died in a row."""
        connection.exec_driver_sql(self._set_run, {"consumer_id": consumer_id, "run": run})
