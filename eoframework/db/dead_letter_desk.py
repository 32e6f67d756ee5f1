"""Dead letters of handlers in an operator's hands: listed, put back into their lanes, discarded.

Locks are taken in the worker's order, lane before processed id: whoever took a letter's id first and then waited for
its lane could meet a batch that holds the lane and waits for the id.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from eoframework import events
from eoframework.db import audit
from eoframework.db.external_calls import ExternalCallRows
from eoframework.db.outbox import decode_headers
from eoframework.db.parking import Parking, Waiting
from eoframework.db.position import Stream
from eoframework.db.session import Database
from eoframework.failures import Parked
from eoframework.message import Record

Place = tuple[int, UUID, int, int]
"""Consumer, topic, partition, offset: the order in which letters go back."""

_LETTERS = """
SELECT d.id, c.name AS consumer, d.consumer_id, d.topic_id, d.lane, d.message_id, d.has_id, d.attempts, d.crashes,
    d.first_failed_at, d.last_failed_at, d.died_at, d.cause, d.error_class, d.fingerprint, d.error, d.traceback,
    d.holds, coalesce(octet_length(d.payload), 0) AS size,
    EXISTS (SELECT FROM {eo}.position p WHERE p.consumer_id = d.consumer_id AND p.topic_id = d.topic_id)
        AS has_position,
    EXISTS (SELECT FROM {eo}.position p WHERE p.consumer_id = d.consumer_id) AS has_started,
    EXISTS (SELECT FROM {eo}.processed_message m WHERE d.has_id AND m.consumer_id = d.consumer_id
        AND m.message_id = d.message_id AND m.first_at > d.died_at) AS processed_since,
    d.topic, d.partition, d."offset", d.key, substring(d.payload FROM 1 FOR %(bytes)s) AS value, d.headers, d.timestamp,
    d.unreadable
FROM {eo}.dead_letter d JOIN {eo}.consumer c ON c.id = d.consumer_id
WHERE d.origin = 'handler' AND {conditions} ORDER BY {order} LIMIT %(limit)s
"""
_GROUPS = """
SELECT min(d.id), c.name, d.fingerprint, d.error_class, count(*), min(d.died_at), max(d.died_at),
    (array_agg(d.cause ORDER BY d.id DESC))[1]
FROM {eo}.dead_letter d JOIN {eo}.consumer c ON c.id = d.consumer_id
WHERE d.origin = 'handler' AND {conditions} GROUP BY c.name, d.fingerprint, d.error_class
HAVING min(d.id) > %(after)s ORDER BY min(d.id) LIMIT %(limit)s
"""
_COUNT = """
SELECT count(*), coalesce(max(d.id), 0) FROM {eo}.dead_letter d JOIN {eo}.consumer c ON c.id = d.consumer_id
WHERE d.origin = 'handler' AND {conditions}
"""
_ORIGINS = "SELECT id, origin FROM {eo}.dead_letter WHERE id = ANY(%(ids)s::bigint[])"
_CONSUMERS = "SELECT name FROM {eo}.consumer"

_LANE = "consumer_id = %(consumer_id)s AND topic_id = %(topic_id)s AND partition = %(partition)s AND lane = %(lane)s"
# Also where there is no lane yet: the row is the lock, and this changes nothing in one that exists.
_LOCK_OR_OPEN = """
INSERT INTO {eo}.parked_key AS k (consumer_id, topic_id, partition, lane, key, due_at)
VALUES (%(consumer_id)s, %(topic_id)s, %(partition)s, %(lane)s, %(key)s, clock_timestamp())
ON CONFLICT (consumer_id, topic_id, partition, lane) DO UPDATE SET held = k.held
"""
_LOCK = f"SELECT FROM {{eo}}.parked_key WHERE {_LANE} FOR UPDATE"
_TAKE = "DELETE FROM {eo}.dead_letter WHERE id = %(id)s AND origin = 'handler' RETURNING holds, died_at"
# Only the row of the burial: one that is younger says that another delivery of the message was processed since. By
# first_at: a duplicate that was not run makes processed_at younger.
_FORGET = """
DELETE FROM {eo}.processed_message WHERE %(has_id)s AND consumer_id = %(consumer_id)s
    AND message_id = %(message_id)s AND first_at <= %(died_at)s
"""
_OTHER_HOLDS = f"SELECT EXISTS (SELECT FROM {{eo}}.dead_letter WHERE {_LANE} AND holds AND origin = 'handler')"
_HOLD = f"UPDATE {{eo}}.parked_key SET held = true WHERE {_LANE}"
_RELEASE = f"UPDATE {{eo}}.parked_key SET held = false, due_at = clock_timestamp() WHERE {_LANE}"
_OPEN = f"""
DELETE FROM {{eo}}.parked_key k WHERE {_LANE} AND NOT EXISTS (SELECT FROM {{eo}}.parked_message m
    WHERE (m.consumer_id, m.topic_id, m.partition, m.lane) = (k.consumer_id, k.topic_id, k.partition, k.lane))
"""

_WHOLE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class DeadFilter:
    """Which letters, or lanes; what is None does not matter. Times are aware; `until` itself is not included."""

    handler: str | None = None
    """The consumer group, <app>.<handler>."""
    topic: str | None = None
    key: bytes | None = None
    error: str | None = None
    """The error's class, with its module or without."""
    fingerprint: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    app: str | None = None
    """Only consumers of this app."""

    def conditions(self, columns: Mapping[str, str]) -> tuple[str, dict[str, object]]:
        """The SQL of what is asked for, and its values; `columns` says where each thing stands."""
        asked = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: value for name, value in asked.items() if value is not None}
        parts = [_CONDITIONS[name].replace("{column}", columns[name]) for name in values]
        return " AND ".join(["true", *parts]), values


_CONDITIONS = {
    "handler": "{column} = %(handler)s",
    "app": "starts_with({column}, %(app)s || '.')",
    "topic": "{column} = %(topic)s",
    "key": "{column} = %(key)s::bytea",
    "error": "({column} = %(error)s OR right({column}, length(%(error)s) + 1) = '.' || %(error)s)",
    "fingerprint": "{column} = %(fingerprint)s",
    "since": "{column} >= %(since)s",
    "until": "{column} < %(until)s",
}
_COLUMNS = {
    **dict.fromkeys(("handler", "app"), "c.name"),
    "topic": "d.topic",
    "key": "d.key",
    "error": "d.error_class",
    "fingerprint": "d.fingerprint",
    **dict.fromkeys(("since", "until"), "d.died_at"),
}


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was given up on, as stored. In a list `record.value` holds its beginning only."""

    record: Record
    id: int
    consumer: str
    consumer_id: int
    topic_id: UUID
    lane: UUID
    message_id: UUID
    has_id: bool
    """False where the message carried no id; `message_id` then stands for its place."""
    attempts: int
    crashes: int
    first_failed_at: datetime | None
    last_failed_at: datetime | None
    died_at: datetime
    cause: str
    error_class: str | None
    fingerprint: str | None
    error: str | None
    traceback: str | None
    holds: bool
    """Its key waits for a decision about this letter."""
    size: int
    """Bytes of the payload."""
    has_position: bool
    """Whether its consumer still stands for the topic that the message came from."""
    has_started: bool
    """Whether its consumer stands anywhere at all; without it, its positions were forgotten."""
    processed_since: bool
    """Whether another delivery of the same message id was processed after this one was given up on."""

    @property
    def place(self) -> Place:
        return (self.consumer_id, self.topic_id, self.record.partition, self.record.offset)

    def stream(self) -> Stream:
        return Stream(self.consumer_id, self.consumer, self.record.topic, self.topic_id, "")


@dataclass(frozen=True, slots=True)
class DeadGroup:
    """Letters of one consumer that died of one thing."""

    first_id: int
    consumer: str
    fingerprint: str | None
    error_class: str | None
    count: int
    first: datetime
    last: datetime
    cause: str
    """Of the youngest."""


class LetterGone(Exception):
    """The letter was replayed or discarded meanwhile; the transaction is rolled back."""


class DeadLetterDesk:
    """Each call is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._parking = Parking(database.schema)
        self._calls = ExternalCallRows(database.schema)

    # --- reading ---

    def letters(self, which: DeadFilter, *, after: int, limit: int, preview: int = _WHOLE) -> list[DeadLetter]:
        """The letters with higher numbers than `after`, in the order of their numbers."""
        conditions, values = which.conditions(_COLUMNS)
        return self._letters(f"d.id > %(after)s AND {conditions}", "d.id", {**values, "after": after}, limit, preview)

    def in_order(
        self, which: DeadFilter, *, after: Place | None, up_to: int, limit: int, preview: int | None = None
    ) -> list[DeadLetter]:
        """The letters behind a place, in the order of their places, none with a higher number than `up_to`."""
        conditions, values = which.conditions(_COLUMNS)
        place = 'd.consumer_id, d.topic_id, d.partition, d."offset"'
        if after is not None:
            conditions += f" AND ({place}) > (%(p0)s, %(p1)s, %(p2)s, %(p3)s)"
            values |= {f"p{index}": part for index, part in enumerate(after)}
        values |= {"up_to": up_to}
        size = _WHOLE if preview is None else preview
        return self._letters(f"d.id <= %(up_to)s AND {conditions}", place, values, limit, size)

    def find(self, ids: Collection[int]) -> dict[int, DeadLetter]:
        """The letters of these numbers, as far as they exist."""
        found = self._letters("d.id = ANY(%(ids)s::bigint[])", "d.id", {"ids": list(ids)}, len(ids), _WHOLE)
        return {letter.id: letter for letter in found}

    def groups(self, which: DeadFilter, *, after: int, limit: int) -> list[DeadGroup]:
        """One line a fingerprint, in the order of their first letters."""
        conditions, values = which.conditions(_COLUMNS)
        rows = self._read(_GROUPS.replace("{conditions}", conditions), {**values, "after": after, "limit": limit})
        return [DeadGroup(*row) for row in rows]

    def count(self, which: DeadFilter) -> tuple[int, int]:
        """How many letters, and the highest number among them."""
        conditions, values = which.conditions(_COLUMNS)
        found = self._read(_COUNT.replace("{conditions}", conditions), values)[0]
        return int(found[0]), int(found[1])

    def consumers(self) -> list[str]:
        """The names of all consumers there ever were."""
        return [row[0] for row in self._read(_CONSUMERS, {})]

    def fates(self, ids: Collection[int]) -> dict[int, str]:
        """What is known of numbers that are no letter of a handler: 'outbox', or what the audit says was done."""
        with self._database.begin("reading what became of dead letters") as connection:
            rows = self._run(connection, _ORIGINS, {"ids": list(ids)})
            fates = {row[0]: row[1] for row in rows if row[1] != "handler"}
            done = audit.last(connection, self._database.schema, [_subject(number) for number in ids])
        return fates | {number: str(done[_subject(number)]) for number in ids if _subject(number) in done}

    # --- changing ---

    def put_back(self, letter: DeadLetter, *, actor: str) -> None:
        """The letter waits in its lane again, due at once, with fresh attempts, before everything that came after it.

        On a crash: it is a dead letter or a parked message, never both and never neither. Raises LetterGone.
        """
        with self._database.brief(f"replaying dead letter {letter.id}") as connection:
            lane = _lane(letter)
            self._run(connection, _LOCK_OR_OPEN, {**lane, "key": letter.record.key}, rows=False)
            # It may have died once more since the letter was read.
            died_at = self._take(connection, letter).died_at
            self._run(connection, _FORGET, {**_identity(letter), "died_at": died_at}, rows=False)
            fresh = Parked(letter.lane, letter.record)
            identity = letter.message_id if letter.has_id else None
            self._parking.put_back(connection, letter.stream(), Waiting(fresh, identity))
            if self._run(connection, _OTHER_HOLDS, lane)[0][0]:
                self._run(connection, _HOLD, lane, rows=False)
            self._record(connection, letter, "dead.replay", actor)
            events.emit("replay.moving", id=letter.id, consumer=letter.consumer)
        events.emit("replay.moved", id=letter.id, consumer=letter.consumer)

    def discard(self, letter: DeadLetter, *, actor: str, forget_id: bool = False) -> None:
        """The letter is gone for good; the message counts as processed, and a key held for it goes on.

        On a crash: all of it happened, or nothing. forget_id: the message counts as not processed. Raises LetterGone.
        """
        with self._database.brief(f"discarding dead letter {letter.id}") as connection:
            lane = _lane(letter)
            self._run(connection, _LOCK, lane)
            taken = self._take(connection, letter)
            if taken.holds and not self._run(connection, _OTHER_HOLDS, lane)[0][0]:
                self._run(connection, _RELEASE, lane, rows=False)
                self._run(connection, _OPEN, lane, rows=False)
            if forget_id and letter.has_id:
                self._run(connection, _FORGET, {**_identity(letter), "died_at": taken.died_at}, rows=False)
            else:
                # What is published anew is not called for a second time.
                self._calls.settle(connection, letter.consumer_id, letter.message_id)
            self._record(connection, letter, "dead.discard", actor, forgot_id=forget_id)
            events.emit("dead.discarding", id=letter.id, consumer=letter.consumer)
        events.emit("dead.discarded", id=letter.id, consumer=letter.consumer)

    def _take(self, connection: Connection, letter: DeadLetter) -> Any:
        found = self._run(connection, _TAKE, {"id": letter.id})
        if not found:
            raise LetterGone
        return found[0]

    def _record(self, connection: Connection, letter: DeadLetter, action: str, actor: str, **more: object) -> None:
        detail = {
            "consumer": letter.consumer,
            "place": str(letter.record),
            "topic_id": letter.topic_id,
            "message_id": letter.message_id if letter.has_id else None,
            "attempts": letter.attempts,
            "crashes": letter.crashes,
            "died_at": letter.died_at.isoformat(),
            "cause": letter.cause,
            "error_class": letter.error_class,
            "fingerprint": letter.fingerprint,
            "error": letter.error,
            **more,
        }
        schema = self._database.schema
        audit.record(connection, schema, actor=actor, action=action, subject=_subject(letter.id), detail=detail)

    def _letters(
        self, conditions: str, order: str, values: dict[str, object], limit: int, preview: int
    ) -> list[DeadLetter]:
        sql = _LETTERS.replace("{conditions}", conditions).replace("{order}", order)
        return [_letter(row) for row in self._read(sql, {**values, "limit": limit, "bytes": preview})]

    def _read(self, template: str, values: dict[str, object]) -> Sequence[Any]:
        with self._database.begin("reading dead letters") as connection:
            return self._run(connection, template, values)

    def _run(
        self, connection: Connection, template: str, values: dict[str, object], *, rows: bool = True
    ) -> Sequence[Any]:
        result = connection.exec_driver_sql(self._database.schema.sql(template), values)
        return result.all() if rows else ()


def _letter(row: Any) -> DeadLetter:
    stored = dict(row._mapping)
    record = {name: stored.pop(name) for name in Record._fields}
    return DeadLetter(Record(**{**record, "headers": tuple(decode_headers(record["headers"]))}), **stored)


def _lane(letter: DeadLetter) -> dict[str, object]:
    stream = letter.stream().key()
    return {**stream, "partition": letter.record.partition, "lane": letter.lane}


def _identity(letter: DeadLetter) -> dict[str, object]:
    names = ("has_id", "consumer_id", "message_id")
    return {name: getattr(letter, name) for name in names}


def _subject(number: int) -> str:
    return f"dead_letter/{number}"
