"""Attempts at messages that are tried again where they lie: counted outside the transaction that may not survive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, CursorResult

from eoframework.db.position import Stream
from eoframework.failures import Cause
from eoframework.message import Record
from eoframework.schema import Schema

_HERE = """consumer_id = %(consumer_id)s AND topic_id = %(topic_id)s AND partition = %(partition)s
    AND "offset" = %(offset)s"""
_COUNTS = f"SELECT attempts, crashes FROM {{eo}}.attempt WHERE {_HERE}"
_CHARGE = """
INSERT INTO {eo}.attempt AS a (consumer_id, topic_id, partition, "offset", crashes)
VALUES (%(consumer_id)s, %(topic_id)s, %(partition)s, %(offset)s, 1)
ON CONFLICT (consumer_id, topic_id, partition, "offset") DO UPDATE SET crashes = a.crashes + 1
RETURNING attempts, crashes
"""
_CHARGED = f"{_HERE} AND crashes = %(crashes)s + 1"
_TAKE_BACK = f"""
WITH forgotten AS (DELETE FROM {{eo}}.attempt WHERE {_CHARGED} AND attempts = 0 AND %(crashes)s = 0)
UPDATE {{eo}}.attempt SET crashes = %(crashes)s WHERE {_CHARGED} AND (attempts > 0 OR %(crashes)s > 0)
"""
_FAILED = """
INSERT INTO {eo}.attempt AS a (consumer_id, topic_id, partition, "offset", attempts, crashes, first_failed_at,
    last_failed_at, error_class, fingerprint, error, traceback)
VALUES (%(consumer_id)s, %(topic_id)s, %(partition)s, %(offset)s, %(attempts)s, %(crashes)s, clock_timestamp(),
    clock_timestamp(), %(error_class)s, %(fingerprint)s, %(error)s, %(traceback)s)
ON CONFLICT (consumer_id, topic_id, partition, "offset") DO UPDATE SET attempts = excluded.attempts,
    crashes = excluded.crashes, first_failed_at = coalesce(a.first_failed_at, excluded.first_failed_at),
    last_failed_at = excluded.last_failed_at, error_class = excluded.error_class,
    fingerprint = excluded.fingerprint, error = excluded.error, traceback = excluded.traceback
"""
_CLEAR = """
DELETE FROM {eo}.attempt a USING unnest(%(partitions)s::int[], %(offsets)s::bigint[]) AS done(partition, place)
WHERE a.consumer_id = %(consumer_id)s AND a.topic_id = %(topic_id)s AND a.partition = done.partition
    AND a."offset" = done.place
"""


class Attempts:
    """Each method is one statement in the caller's transaction."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    def counts(self, connection: Connection, stream: Stream, record: Record) -> tuple[int, int]:
        """How often the handler failed on it, and how often it was in flight when its process died."""
        found = self._run(connection, _COUNTS, stream, record).one_or_none()
        return (int(found.attempts), int(found.crashes)) if found is not None else (0, 0)

    def charge(self, connection: Connection, stream: Stream, record: Record) -> tuple[int, int]:
        """As `counts`, after one more crash: committed before the handler runs, so that the crash itself counts."""
        charged = self._run(connection, _CHARGE, stream, record).one()
        return int(charged.attempts), int(charged.crashes)

    def take_back(self, connection: Connection, stream: Stream, place: tuple[int, int], crashes: int) -> None:
        """It was charged, with so many crashes before, and nobody died of it; nothing if it is not as we left it."""
        values = {"partition": place[0], "offset": place[1], "crashes": crashes}
        connection.exec_driver_sql(self._schema.sql(_TAKE_BACK), {**stream.key(), **values})

    def failed(
        self, connection: Connection, stream: Stream, record: Record, cause: Cause, *, attempts: int, crashes: int
    ) -> None:
        """The handler has now failed `attempts` times; a crash charged for this run is taken back by `crashes`."""
        values = {
            "attempts": attempts,
            "crashes": crashes,
            "error_class": cause.error_class,
            "fingerprint": cause.fingerprint,
            "error": cause.error,
            "traceback": cause.traceback,
        }
        self._run(connection, _FAILED, stream, record, **values)

    def clear(self, connection: Connection, stream: Stream, records: Sequence[Record]) -> None:
        """They are done with."""
        values = {"partitions": [r.partition for r in records], "offsets": [r.offset for r in records]}
        connection.exec_driver_sql(self._schema.sql(_CLEAR), {**stream.key(), **values})

    def _run(
        self, connection: Connection, sql: str, stream: Stream, record: Record, **values: object
    ) -> CursorResult[Any]:
        place = {"partition": record.partition, "offset": record.offset}
        return connection.exec_driver_sql(self._schema.sql(sql), {**stream.key(), **place, **values})
