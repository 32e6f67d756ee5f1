"""Parked lanes in an operator's hands: what waits, since when, until when, and for what; and discarded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Connection

from eoframework import events
from eoframework.db import audit
from eoframework.db.dead_letter_desk import DeadFilter
from eoframework.db.external_calls import ExternalCallRows
from eoframework.db.outbox import decode_headers
from eoframework.db.processed import ProcessedMessages
from eoframework.db.session import Database
from eoframework.errors import NotFound
from eoframework.message import Record, position_id

LaneState = Literal["held", "due", "waiting", "stranded"]

_COLUMNS = {
    **dict.fromkeys(("handler", "app"), "c.name"),
    "topic": "t.topic",
    "key": "k.key",
    "error": "coalesce(h.error_class, '')",
    "fingerprint": "coalesce(h.fingerprint, '')",
    **dict.fromkeys(("since", "until"), "k.since"),
}
_FROM = """
FROM {eo}.parked_key k JOIN {eo}.consumer c ON c.id = k.consumer_id
LEFT JOIN LATERAL (SELECT * FROM {eo}.parked_message m WHERE
    (m.consumer_id, m.topic_id, m.partition, m.lane) = (k.consumer_id, k.topic_id, k.partition, k.lane)
    ORDER BY m."offset" LIMIT 1) h ON true
CROSS JOIN LATERAL (SELECT coalesce(h.topic, (SELECT p.topic FROM {eo}.position p
    WHERE p.consumer_id = k.consumer_id AND p.topic_id = k.topic_id LIMIT 1), '') AS topic) t
WHERE {conditions}
"""
_MESSAGES_OF = """(SELECT count(*) FROM {eo}.parked_message m WHERE
    (m.consumer_id, m.topic_id, m.partition, m.lane) = (k.consumer_id, k.topic_id, k.partition, k.lane))"""
_LANES = f"""
SELECT k.consumer_id, k.topic_id, k.partition, k.lane, c.name, k.key, k.due_at, k.held,
    k.due_at <= clock_timestamp(), k.since, {_MESSAGES_OF},
    t.topic, h."offset", h.attempts, h.crashes, h.error_class, h.fingerprint,
    (SELECT min(d.id) FROM {{eo}}.dead_letter d WHERE k.held AND d.holds AND d.origin = 'handler' AND
        (d.consumer_id, d.topic_id, d.partition, d.lane) = (k.consumer_id, k.topic_id, k.partition, k.lane)),
    EXISTS (SELECT FROM {{eo}}.position p WHERE p.consumer_id = k.consumer_id AND p.topic_id = k.topic_id)
{_FROM}ORDER BY k.consumer_id, k.topic_id, k.partition, k.lane LIMIT %(limit)s
"""
_COUNT = f"SELECT coalesce(sum({_MESSAGES_OF}), 0), clock_timestamp() {_FROM}"
_STILL = f"SELECT 1 {_FROM} AND (k.consumer_id, k.topic_id, k.partition, k.lane) = (%(c)s, %(t)s, %(p)s, %(l)s)"
_AFTER = " AND (k.consumer_id, k.topic_id, k.partition, k.lane) > (%(c)s, %(t)s::uuid, %(p)s, %(l)s::uuid)"
_LANE = "consumer_id = %(c)s AND topic_id = %(t)s AND partition = %(p)s AND lane = %(l)s"
_LOCK = f"SELECT FROM {{eo}}.parked_key WHERE {_LANE} FOR UPDATE"
_DELETE = f"""
DELETE FROM {{eo}}.parked_message WHERE {_LANE} AND parked_at <= %(up_to)s RETURNING "offset", message_id
"""
# A dead letter that holds it is decided about by itself.
_OPEN = f"""
DELETE FROM {{eo}}.parked_key WHERE {_LANE} AND NOT EXISTS (
    SELECT FROM {{eo}}.dead_letter WHERE {_LANE} AND holds AND origin = 'handler')
    AND NOT EXISTS (SELECT FROM {{eo}}.parked_message WHERE {_LANE})
"""
# What was parked since has not failed yet: it need not wait for what is gone.
_GO_ON = f"UPDATE {{eo}}.parked_key SET due_at = clock_timestamp() WHERE {_LANE} AND NOT held"
_MESSAGES = """
SELECT m.topic, m.partition, m."offset", m.key, substring(m.value FROM 1 FOR %(bytes)s), m.headers, m.timestamp,
    m.unreadable, m.message_id, m.parked_at, m.attempts, m.crashes, m.first_failed_at, m.last_failed_at,
    m.error_class, m.fingerprint, m.error, coalesce(octet_length(m.value), 0)
FROM {eo}.parked_message m WHERE m.consumer_id = %(c)s AND m.topic_id = %(t)s AND m.partition = %(p)s
    AND m.lane = %(l)s AND m."offset" > %(after)s ORDER BY m."offset" LIMIT %(limit)s
"""


@dataclass(frozen=True, slots=True)
class ParkedLane:
    """A key whose messages wait, or one message that has none; with its first message."""

    consumer_id: int
    topic_id: UUID
    partition: int
    lane: UUID
    consumer: str
    key: bytes | None
    due_at: datetime
    held: bool
    overdue: bool
    since: datetime
    messages: int
    topic: str
    offset: int | None
    attempts: int | None
    crashes: int | None
    error_class: str | None
    fingerprint: str | None
    held_by: int | None
    """The dead letter that a person has to decide about."""

    has_position: bool
    """Whether its consumer still stands for the topic that the messages came from."""

    @property
    def state(self) -> LaneState:
        """held: a person has to decide; due: it runs as soon as its owner comes to it; waiting: not before due_at.

        stranded: of a topic that the consumer no longer stands for; nobody will run it.
        """
        if not self.has_position:
            return "stranded"
        if self.held:
            return "held"
        return "due" if self.overdue else "waiting"

    @property
    def cursor(self) -> str:
        """Where the next page begins."""
        return f"{self.consumer_id}.{self.topic_id}.{self.partition}.{self.lane}"


@dataclass(frozen=True, slots=True)
class ParkedMessage:
    """One message in its lane. `record.value` holds its beginning only."""

    record: Record
    message_id: UUID | None
    parked_at: datetime
    attempts: int
    crashes: int
    first_failed_at: datetime | None
    last_failed_at: datetime | None
    error_class: str | None
    fingerprint: str | None
    error: str | None
    size: int


class LaneDesk:
    """Each call is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def lanes(self, which: DeadFilter, *, after: str | None, limit: int) -> list[ParkedLane]:
        """The lanes behind a cursor, in a fixed order. Raises NotFound for a cursor that is none."""
        conditions, values = which.conditions(_COLUMNS)
        if after is not None:
            conditions += _AFTER
            values |= _cursor(after)
        rows = self._read(_LANES.replace("{conditions}", conditions), {**values, "limit": limit})
        return [ParkedLane(*row) for row in rows]

    def messages(self, lane: ParkedLane, *, after: int, limit: int, preview: int) -> list[ParkedMessage]:
        """What waits in a lane behind an offset, in its order."""
        rows = self._read(_MESSAGES, {**_place(lane), "after": after, "limit": limit, "bytes": preview})
        return [_message(row) for row in rows]

    def count(self, which: DeadFilter) -> tuple[int, datetime]:
        """How many messages wait in the lanes that the filter lets through; and when that was."""
        conditions, values = which.conditions(_COLUMNS)
        number, now = self._read(_COUNT.replace("{conditions}", conditions), values)[0]
        return int(number), now

    def discard(self, lane: ParkedLane, which: DeadFilter, *, up_to: datetime, actor: str) -> int:
        """Delete what was parked in a lane until then; it counts as processed. Returns how many messages that were.

        0 as well if the filter no longer lets the lane through.

        On a crash: all of it happened, with its audit row, or nothing. A batch or the lane's owner waits for it.
        """
        what = f"discarding what waits in lane {lane.cursor} of {lane.consumer}"
        schema, place = self._database.schema, _place(lane)
        with self._database.brief(what) as connection:
            # Lane before processed id, as everybody takes them.
            connection.exec_driver_sql(schema.sql(_LOCK), place)
            conditions, values = which.conditions(_COLUMNS)
            still = schema.sql(_STILL.replace("{conditions}", conditions))
            if not connection.exec_driver_sql(still, {**values, **place}).all():
                return 0
            gone = sorted(connection.exec_driver_sql(schema.sql(_DELETE), {**place, "up_to": up_to}).all())
            if not gone:
                return 0
            connection.exec_driver_sql(schema.sql(_OPEN), place)
            connection.exec_driver_sql(schema.sql(_GO_ON), place)
            ids = {row.message_id for row in gone if row.message_id is not None}
            ProcessedMessages(schema).claim(connection, lane.consumer_id, ids)
            calls = ExternalCallRows(schema)
            for row in gone:
                identity = row.message_id or position_id(lane.topic_id, lane.partition, row.offset)
                calls.settle(connection, lane.consumer_id, identity)
            self._record(connection, lane, gone, actor)
            events.emit("parked.discarding", consumer=lane.consumer, messages=len(gone))
        events.emit("parked.discarded", consumer=lane.consumer, messages=len(gone))
        return len(gone)

    def _record(self, connection: Connection, lane: ParkedLane, gone: Sequence[Any], actor: str) -> None:
        detail = {
            "topic": lane.topic,
            "topic_id": lane.topic_id,
            "partition": lane.partition,
            "lane": lane.lane,
            "offsets": [row.offset for row in gone],
            "message_ids": [row.message_id for row in gone],
            "error_class": lane.error_class,
            "fingerprint": lane.fingerprint,
        }
        subject = f"consumer/{lane.consumer}"
        audit.record(
            connection, self._database.schema, actor=actor, action="parked.discard", subject=subject, detail=detail
        )

    def _read(self, template: str, values: dict[str, object]) -> Sequence[Any]:
        with self._database.begin("reading parked messages") as connection:
            return connection.exec_driver_sql(self._database.schema.sql(template), values).all()


def _place(lane: ParkedLane) -> dict[str, object]:
    return {"c": lane.consumer_id, "t": lane.topic_id, "p": lane.partition, "l": lane.lane}


def _cursor(text: str) -> dict[str, object]:
    try:
        consumer, topic, partition, lane = text.split(".")
        return {"c": int(consumer), "t": UUID(topic), "p": int(partition), "l": UUID(lane)}
    except ValueError as error:
        raise NotFound(
            f"{text!r} is no place in the list of lanes.", remedy="Give the one a page ended with."
        ) from error


def _message(row: Any) -> ParkedMessage:
    topic, partition, offset, key, value, headers, timestamp, unreadable = row[:8]
    record = Record(topic, partition, offset, key, value, tuple(decode_headers(headers)), timestamp, unreadable)
    return ParkedMessage(record, *row[8:])
