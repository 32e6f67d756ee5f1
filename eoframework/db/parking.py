"""Parked messages: what waits behind a failing message of its key, in the order it came.

A lane is a row of parked_key as long as something waits in it, or a person has to decide. The owner of the partition
works under the position row's lock; an operator does not. So the batch reads lanes FOR SHARE and the drain takes one
FOR UPDATE, and neither ever trusts a cache.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from eoframework import clock
from eoframework.db.outbox import decode_headers, encode_headers
from eoframework.db.position import Stream
from eoframework.failures import Cause, Parked
from eoframework.message import Record
from eoframework.schema import Schema

Lane = tuple[int, UUID]
"""A partition, and what keeps its order in it: a key, or a message that has none."""

_HERE = "consumer_id = %(consumer_id)s AND topic_id = %(topic_id)s"
_LANE = f"{_HERE} AND partition = %(partition)s AND lane = %(lane)s"

# In the order of the key, as whoever takes several of them does: else two of them deadlock.
_SHUT = f"""
SELECT k.partition, k.lane FROM {{eo}}.parked_key k
WHERE {_HERE} AND (k.partition, k.lane) IN (SELECT * FROM unnest(%(partitions)s::int[], %(lanes)s::uuid[]))
ORDER BY k.partition, k.lane FOR SHARE
"""
_OPEN_LANES = """
INSERT INTO {eo}.parked_key AS k (consumer_id, topic_id, partition, lane, key, due_at, held)
SELECT %(consumer_id)s, %(topic_id)s, p, l, key, clock_timestamp() + make_interval(secs => wait), held
FROM unnest(%(partitions)s::int[], %(lanes)s::uuid[], %(keys)s::bytea[], %(waits)s::float8[], %(helds)s::bool[])
    AS given(p, l, key, wait, held) ORDER BY p, l
ON CONFLICT (consumer_id, topic_id, partition, lane) DO UPDATE
    SET due_at = least(k.due_at, excluded.due_at), held = excluded.held
"""
# A message that waits already is read again after `eo position set`: it keeps its place.
_PARK = """
INSERT INTO {eo}.parked_message (consumer_id, topic_id, partition, lane, "offset", topic, message_id, key, value,
    headers, timestamp, unreadable, attempts, crashes, first_failed_at, last_failed_at,
    error_class, fingerprint, error, traceback)
SELECT %(consumer_id)s, %(topic_id)s, m.partition, m.lane, m.place, %(topic)s, m.id, m.key, m.value,
    m.headers::json, m.timestamp, m.unreadable, m.attempts, m.crashes, CASE WHEN m.attempts > 0 THEN clock_timestamp()
    END, CASE WHEN m.attempts > 0 THEN clock_timestamp() END, m.error_class, m.fingerprint, m.error, m.traceback
FROM unnest(%(partitions)s::int[], %(lanes)s::uuid[], %(offsets)s::bigint[], %(ids)s::uuid[], %(keys)s::bytea[],
    %(values)s::bytea[], %(headers)s::text[], %(timestamps)s::bigint[], %(unreadables)s::text[], %(attempts)s::int[],
    %(crashes)s::int[], %(classes)s::text[], %(fingerprints)s::text[], %(errors)s::text[], %(tracebacks)s::text[])
    AS m(partition, lane, place, id, key, value, headers, timestamp, unreadable, attempts, crashes,
         error_class, fingerprint, error, traceback)
ON CONFLICT (consumer_id, topic_id, partition, lane, "offset") DO NOTHING
"""
# Only of topics that the consumer stands for: what is left of one that was re-created waits for a person, and would
# take the room of the others for ever.
_COUNT = """
SELECT count(*) FROM (SELECT FROM {eo}.parked_message WHERE consumer_id = %(consumer_id)s AND topic_id = ANY(ARRAY(
    SELECT DISTINCT topic_id FROM {eo}.position WHERE consumer_id = %(consumer_id)s)) LIMIT %(limit)s) m
"""
_NEXT = f"""
SELECT extract(epoch FROM min(due_at) - clock_timestamp()) FROM {{eo}}.parked_key
WHERE {_HERE} AND partition = ANY(%(partitions)s::int[]) AND NOT held
"""
_DUE = f"""
SELECT partition, lane FROM {{eo}}.parked_key
WHERE {_HERE} AND partition = ANY(%(partitions)s::int[]) AND NOT held AND due_at <= clock_timestamp()
ORDER BY due_at LIMIT %(limit)s
"""
_LOCK = f"""
SELECT FROM {{eo}}.parked_key WHERE {_LANE} AND NOT held AND due_at <= clock_timestamp() FOR UPDATE
"""
_HEAD = f"""
SELECT lane, topic, partition, "offset", key, value, headers, timestamp, unreadable, attempts, crashes,
    coalesce(extract(epoch FROM clock_timestamp() - first_failed_at), 0)::float8
FROM {{eo}}.parked_message WHERE {_LANE} ORDER BY "offset" LIMIT 1
"""
_CHARGE = f"""
UPDATE {{eo}}.parked_message SET crashes = %(crashes)s WHERE {_LANE} AND "offset" = %(offset)s
"""
_TAKE_BACK = f"""
UPDATE {{eo}}.parked_message SET crashes = %(crashes)s
WHERE {_LANE} AND "offset" = %(offset)s AND crashes = %(crashes)s + 1
"""
_FAILED = f"""
UPDATE {{eo}}.parked_message SET attempts = %(attempts)s, crashes = %(crashes)s,
    first_failed_at = coalesce(first_failed_at, clock_timestamp()), last_failed_at = clock_timestamp(),
    error_class = %(error_class)s, fingerprint = %(fingerprint)s, error = %(error)s, traceback = %(traceback)s
WHERE {_LANE} AND "offset" = %(offset)s
"""
_REMOVE = f"""DELETE FROM {{eo}}.parked_message WHERE {_LANE} AND "offset" = %(offset)s"""
_WAIT = f"""
UPDATE {{eo}}.parked_key SET due_at = clock_timestamp() + make_interval(secs => %(wait)s), held = %(held)s WHERE {_LANE}
"""
_OPEN_IF_EMPTY = f"""
DELETE FROM {{eo}}.parked_key k WHERE {_LANE} AND NOT EXISTS (SELECT FROM {{eo}}.parked_message m
    WHERE (m.consumer_id, m.topic_id, m.partition, m.lane) = (k.consumer_id, k.topic_id, k.partition, k.lane))
RETURNING true
"""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A message on its way into its lane; without a `wait` it only waits behind others."""

    parked: Parked
    message_id: UUID | None
    wait: float | None = None
    """Seconds until the lane is tried."""
    cause: Cause | None = None


class Parking:
    """Each method is one or two statements in the caller's transaction."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    def shut(self, connection: Connection, stream: Stream, lanes: Collection[Lane]) -> set[Lane]:
        """Those of the lanes in which something waits; they stay as they are until the transaction ends."""
        if not lanes:
            return set()
        values = {"partitions": [p for p, _ in lanes], "lanes": [lane for _, lane in lanes]}
        return {(row[0], row[1]) for row in self._all(connection, _SHUT, {**stream.key(), **values})}

    def park(self, connection: Connection, stream: Stream, waiting: Sequence[Waiting]) -> None:
        """Append messages to their lanes; a lane opens with the first message that brings its own wait."""
        failing = [w for w in waiting if w.wait is not None]
        if failing:
            self._shut_lanes(connection, stream, [(w.parked, w.wait or 0.0, False) for w in failing])
        if waiting:
            self._all(connection, _PARK, {**stream.row(), **_columns(waiting)}, rows=False)

    def hold(self, connection: Connection, stream: Stream, heads: Iterable[Parked]) -> None:
        """Shut these lanes until a person has decided about their dead letters."""
        held = [(head, 0.0, True) for head in heads]
        if held:
            self._shut_lanes(connection, stream, held)

    def put_back(self, connection: Connection, stream: Stream, waiting: Waiting) -> None:
        """A dead letter waits in its lane again, at its old place in the order, due at once, with fresh attempts."""
        self._shut_lanes(connection, stream, [(waiting.parked, 0.0, False)])
        self._all(connection, _PARK, {**stream.row(), **_columns([waiting])}, rows=False)

    def count(self, connection: Connection, consumer_id: int, *, limit: int) -> int:
        """How many messages of the consumer wait that it may run; counts no further than `limit`."""
        return int(self._all(connection, _COUNT, {"consumer_id": consumer_id, "limit": limit})[0][0])

    def next_due(self, connection: Connection, stream: Stream, partitions: Collection[int]) -> float | None:
        """Seconds until a lane of these partitions is due; None when none waits, or only for a person."""
        found = self._all(connection, _NEXT, {**stream.key(), "partitions": list(partitions)})[0][0]
        return float(found) if found is not None else None

    def due(self, connection: Connection, stream: Stream, partitions: Collection[int], *, limit: int) -> list[Lane]:
        """Lanes of these partitions whose time has come, those that wait longest first."""
        values = {"partitions": list(partitions), "limit": limit}
        return [(row[0], row[1]) for row in self._all(connection, _DUE, {**stream.key(), **values})]

    def head(self, connection: Connection, stream: Stream, lane: Lane) -> Parked | None:
        """The lane's first message, with the lane locked; None when it is not due any more."""
        values = {**stream.key(), **_lane(lane)}
        locked = connection.exec_driver_sql(self._schema.sql(_LOCK), values).rowcount
        asked = clock.monotonic()  # before: what the answer took must not make the failure look later than a success
        found = self._all(connection, _HEAD, values) if locked else []
        return _parked(found[0], asked) if found else None

    def charge(self, connection: Connection, stream: Stream, parked: Parked, crashes: int) -> None:
        """Note how often its process died, before it runs."""
        self._one(connection, _CHARGE, stream, parked, {"crashes": crashes})

    def take_back(self, connection: Connection, stream: Stream, parked: Parked) -> None:
        """It was charged, as `parked` was before, and nobody died of it; nothing if it is not as we left it."""
        self._run(connection, _TAKE_BACK, stream, parked, {"crashes": parked.crashes})

    def postpone(self, connection: Connection, stream: Stream, lane: Lane, wait: float) -> None:
        """Let other lanes go first for so many seconds."""
        self._all(connection, _WAIT, {**stream.key(), **_lane(lane), "wait": wait, "held": False}, rows=False)

    def failed(self, connection: Connection, stream: Stream, parked: Parked, cause: Cause, *, wait: float) -> None:
        """It failed again (`parked` has the new counts); the lane waits."""
        values = {"attempts": parked.attempts, "crashes": parked.crashes, **_cause(cause)}
        self._one(connection, _FAILED, stream, parked, values)
        self._one(connection, _WAIT, stream, parked, {"wait": wait, "held": False})

    def remove(self, connection: Connection, stream: Stream, parked: Parked, *, hold: bool = False) -> None:
        """It is done with; the lane opens when it was the last, else its next message is due at once.

        The row must be there: its deletion in the transaction of its effect is what says that the effect happened.
        """
        self._one(connection, _REMOVE, stream, parked, {})
        if hold:
            self._one(connection, _WAIT, stream, parked, {"wait": 0.0, "held": True})
        elif not self._run(connection, _OPEN_IF_EMPTY, stream, parked, {}):
            self._one(connection, _WAIT, stream, parked, {"wait": 0.0, "held": False})

    def _shut_lanes(self, connection: Connection, stream: Stream, heads: Sequence[tuple[Parked, float, bool]]) -> None:
        # One row a lane: ON CONFLICT refuses to touch the same row twice in one statement.
        lanes = {(parked.record.partition, parked.lane): (parked, wait, held) for parked, wait, held in reversed(heads)}
        values = {
            "partitions": [partition for partition, _ in lanes],
            "lanes": [lane for _, lane in lanes],
            "keys": [parked.record.key for parked, _, _ in lanes.values()],
            "waits": [wait for _, wait, _ in lanes.values()],
            "helds": [held for _, _, held in lanes.values()],
        }
        self._all(connection, _OPEN_LANES, {**stream.key(), **values}, rows=False)

    def _one(self, connection: Connection, sql: str, stream: Stream, parked: Parked, values: dict[str, object]) -> None:
        if self._run(connection, sql, stream, parked, values) != 1:
            raise AssertionError(f"{stream.consumer}: {parked.record} is not parked any more, under a locked lane")

    def _run(self, connection: Connection, sql: str, stream: Stream, parked: Parked, values: dict[str, object]) -> int:
        place = {**_lane((parked.record.partition, parked.lane)), "offset": parked.record.offset}
        return connection.exec_driver_sql(self._schema.sql(sql), {**stream.key(), **place, **values}).rowcount

    def _all(
        self, connection: Connection, sql: str, values: dict[str, object], *, rows: bool = True
    ) -> list[tuple[Any, ...]]:
        result = connection.exec_driver_sql(self._schema.sql(sql), values)
        return [tuple(row) for row in result] if rows else []


def _lane(lane: Lane) -> dict[str, object]:
    return {"partition": lane[0], "lane": lane[1]}


def _parked(row: tuple[Any, ...], asked: float) -> Parked:
    lane, topic, partition, offset, key, value, headers, timestamp, unreadable, attempts, crashes, age = row
    stored = tuple(decode_headers(headers))
    record = Record(topic, partition, offset, key, value, stored, timestamp, unreadable)
    return Parked(lane, record, attempts, crashes, asked - age)


def _cause(cause: Cause | None) -> dict[str, object]:
    names = ("error_class", "fingerprint", "error", "traceback")
    return {name: getattr(cause, name) if cause is not None else None for name in names}


def _columns(waiting: Sequence[Waiting]) -> dict[str, object]:
    records = [w.parked.record for w in waiting]
    causes = [_cause(w.cause) for w in waiting]
    return {
        "partitions": [record.partition for record in records],
        "lanes": [w.parked.lane for w in waiting],
        "offsets": [record.offset for record in records],
        "ids": [w.message_id for w in waiting],
        "keys": [record.key for record in records],
        "values": [record.value for record in records],
        "headers": [encode_headers(record.headers) for record in records],
        "timestamps": [record.timestamp for record in records],
        "unreadables": [record.unreadable.replace("\0", "\\0") for record in records],
        "attempts": [w.parked.attempts for w in waiting],
        "crashes": [w.parked.crashes for w in waiting],
        "classes": [cause["error_class"] for cause in causes],
        "fingerprints": [cause["fingerprint"] for cause in causes],
        "errors": [cause["error"] for cause in causes],
        "tracebacks": [cause["traceback"] for cause in causes],
    }
