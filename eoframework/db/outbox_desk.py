"""The outbox in an operator's hands: what waits, what is due later, what Kafka refused; put back, discarded, counted.

Only relays send and delete pending rows. A tool may touch what no relay looks at: dead letters, and delayed messages
that are not due yet.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from sqlalchemy import Connection

from eoframework import events
from eoframework.db import audit
from eoframework.db.outbox_stats import OutboxStats, read_stats
from eoframework.db.session import Database
from eoframework.db.shards import Shards
from eoframework.keys import shard_hash
from eoframework.settings import Settings

OutboxState = Literal["dead", "delayed", "pending"]
Place = tuple[object, ...]
"""Where a line stands in its list: a dead letter's (number), a pending one's (shard, seq), a delayed one's (shard,
deliver_at, seq)."""

_HELD: Final = """(SELECT h.dead_letter_id FROM {eo}.outbox_held h
        WHERE h.topic = m.topic AND h.key_digest = sha256(m.key))"""
_SAME: Final = """m.topic, m.key, m.type, m.source, m.content_type, m.created_at,
    coalesce(octet_length(m.payload), 0)"""
_WHOLE: Final = "m.payload, m.headers::text, m.traceparent"
_LINES: Final[Mapping[OutboxState, str]] = {
    "dead": f"""
        SELECT 'dead', m.id, m.message_id, NULL::smallint, m.died_at, m.cause, m.error_class, m.fingerprint,
            (SELECT h.dead_letter_id FROM {{eo}}.outbox_held h WHERE h.dead_letter_id = m.id), {_SAME}{{whole}}
        FROM {{eo}}.dead_letter m WHERE m.origin = 'outbox' AND {{conditions}} ORDER BY m.id LIMIT %(limit)s""",
    "delayed": f"""
        SELECT 'delayed', m.seq, m.id, m.shard, m.deliver_at, NULL, NULL, NULL, NULL::bigint, {_SAME}{{whole}}
        FROM {{eo}}.delayed_message m WHERE {{conditions}} ORDER BY m.shard, m.deliver_at, m.seq LIMIT %(limit)s""",
    "pending": f"""
        SELECT 'pending', m.seq, m.id, m.shard, m.created_at, NULL, NULL, NULL, {_HELD}, {_SAME}{{whole}}
        FROM {{eo}}.outbox_message m WHERE {{conditions}} ORDER BY m.shard, m.seq LIMIT %(limit)s""",
}
_PLACES: Final[Mapping[OutboxState, tuple[str, ...]]] = {
    "dead": ("m.id",),
    "delayed": ("m.shard", "m.deliver_at", "m.seq"),
    "pending": ("m.shard", "m.seq"),
}
_AT: Final[Mapping[OutboxState, str]] = {"dead": "m.died_at", "delayed": "m.deliver_at", "pending": "m.created_at"}
_NUMBER: Final[Mapping[OutboxState, str]] = {
    "dead": "m.id = %(number)s",
    "delayed": "m.seq = %(number)s",
    "pending": "m.seq = %(number)s AND m.shard = ANY (ARRAY(SELECT shard FROM {eo}.relay_shard))",
}
_MESSAGE_ID: Final[Mapping[OutboxState, str]] = {
    "dead": "m.message_id = %(message_id)s",
    "delayed": "m.id = %(message_id)s",
    "pending": "m.id = %(message_id)s",
}
_COUNT: Final = """SELECT count(*), coalesce(max(m.id), 0) FROM {eo}.dead_letter m
    WHERE m.origin = 'outbox' AND {conditions}"""
_COUNT_DELAYED: Final = """SELECT count(*), coalesce(max(m.seq), 0) FROM {eo}.delayed_message m WHERE {conditions}"""

# The lock is what makes two commands at once follow one another; taken before anything is read or changed.
_LOCK: Final = """SELECT message_id, topic, key, outbox_seq, cause, error_class FROM {eo}.dead_letter
    WHERE id = %(id)s AND origin = 'outbox' FOR UPDATE"""
_OPEN: Final = "DELETE FROM {eo}.outbox_held WHERE dead_letter_id = %(id)s"
_COLUMNS: Final = "topic, key, type, source, content_type, payload, headers, traceparent, created_at"
# At its old number it stands before everything of its key that was published after it. Nobody can take it for a row
# that was published: it was refused, so it is in no committed checkpoint, and checkpoints tell rows by number and id.
# Without a number (buried by an older release) it goes to the end.
_PUT_BACK: Final = f"""
    WITH gone AS (DELETE FROM {{eo}}.dead_letter WHERE id = %(id)s RETURNING *)
    INSERT INTO {{eo}}.outbox_message ({{seq}}id, shard, {_COLUMNS}) {{overriding}}
    SELECT {{outbox_seq}}message_id, mod(%(hash)s, (SELECT shards FROM {{eo}}.outbox))::smallint, {_COLUMNS} FROM gone
    RETURNING shard, seq"""
_WAITS_FOR: Final = """SELECT dead_letter_id FROM {eo}.outbox_held
    WHERE topic = %(topic)s AND key_digest = sha256(%(key)s)"""
_DELETE: Final = "DELETE FROM {eo}.dead_letter WHERE id = %(id)s"
_DELETE_DELAYED: Final = """DELETE FROM {eo}.delayed_message
    WHERE shard = %(shard)s AND deliver_at = %(at)s AND seq = %(seq)s AND id = %(message_id)s"""
_DONE: Final = """SELECT subject FROM {eo}.audit WHERE action = ANY ('{outbox.retry,outbox.discard}'::text[])
    AND detail ->> 'message_id' = %(message_id)s ORDER BY id DESC LIMIT 1"""


@dataclass(frozen=True, slots=True)
class OutboxFilter:
    """Which messages; what is None does not matter. Times are aware; `until` itself is not included."""

    topic: str | None = None
    key: bytes | None = None
    error: str | None = None
    """Kafka's name of the refusal, or a part of the cause's text; only dead letters have one."""
    since: datetime | None = None
    """By the time of death, of delivery (delayed) or of publishing (pending)."""
    until: datetime | None = None

    def conditions(self, state: OutboxState) -> tuple[str, dict[str, object]]:
        """The SQL of what is asked for, and its values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: value for name, value in values.items() if value is not None}
        if "error" in values and state != "dead":
            return "false", {}
        return " AND ".join(["true", *(_CONDITIONS[name].replace("{at}", _AT[state]) for name in values)]), values


_CONDITIONS: Final = {
    "topic": "m.topic = %(topic)s",
    "key": "m.key = %(key)s::bytea",
    "error": "(m.error_class = %(error)s OR position(lower(%(error)s::text) IN lower(m.cause)) > 0)",
    "since": "{at} >= %(since)s",
    "until": "{at} < %(until)s",
}


@dataclass(frozen=True, slots=True)
class OutboxLine:
    """A message of the outbox, wherever it stands. Lists leave out payload, headers and trace context."""

    state: OutboxState
    number: int
    """The dead letter's number, else the row's `seq`."""
    message_id: UUID
    shard: int | None
    at: datetime
    """When it died, is to be delivered, or was published."""
    cause: str | None
    error_class: str | None
    fingerprint: str | None
    held_by: int | None
    """The dead letter that its key waits for; a dead letter that holds its key names itself."""
    topic: str
    key: bytes | None
    type: str
    source: str
    content_type: str
    created_at: datetime
    size: int
    """Bytes of the payload."""
    payload: bytes | None = None
    headers: str | None = None
    """As stored, JSON."""
    traceparent: str | None = None

    @property
    def ref(self) -> str:
        """What `show`, `retry` and `discard` know it by."""
        return str(self.number) if self.state == "dead" else f"{self.state}/{self.number}"

    @property
    def place(self) -> Place:
        places: Mapping[OutboxState, Place] = {
            "dead": (self.number,),
            "delayed": (self.shard, self.at, self.number),
            "pending": (self.shard, self.number),
        }
        return places[self.state]


@dataclass(frozen=True, slots=True)
class PutBack:
    """A dead letter that is an outbox row again."""

    dead_letter: int
    message_id: UUID
    topic: str
    shard: int
    seq: int
    opened: bool
    """Its key waited for it, and goes on with it."""
    waits_for: int | None
    """The other dead letter that its key still waits for."""


class LetterGone(Exception):
    """Someone else has changed it meanwhile; the transaction is rolled back."""


class OutboxTable:
    """Each call is one transaction. Changes are durable, hold no lock for long, and write their audit row."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._schema = database.schema
        self._shards = Shards(database, settings)

    # --- reading ---

    def lines(self, state: OutboxState, which: OutboxFilter, *, after: Place | None, limit: int) -> list[OutboxLine]:
        """The next lines of the state in the order of their places, read along the index."""
        conditions, values = which.conditions(state)
        if after is not None:
            marks = ", ".join(f"%(p{index})s" for index in range(len(after)))
            conditions += f" AND ({', '.join(_PLACES[state])}) > ({marks})"
            values |= {f"p{index}": part for index, part in enumerate(after)}
        return self._lines(state, conditions, values | {"limit": limit}, whole=False)

    def by_number(self, state: OutboxState, number: int) -> OutboxLine | None:
        """One message with all there is of it."""
        found = self._lines(state, _NUMBER[state], {"number": number, "limit": 1}, whole=True)
        return found[0] if found else None

    def by_message_id(self, message_id: UUID) -> list[OutboxLine]:
        """All that carry this id, wherever they stand; has no index of its own, as it is asked by people only."""
        values = {"message_id": message_id, "limit": 20}
        states: tuple[OutboxState, ...] = ("dead", "delayed", "pending")
        return [line for state in states for line in self._lines(state, _MESSAGE_ID[state], values, whole=True)]

    def count(self, state: Literal["dead", "delayed"], which: OutboxFilter) -> tuple[int, int]:
        """How many there are, and the highest number among them."""
        conditions, values = which.conditions(state)
        template = (_COUNT if state == "dead" else _COUNT_DELAYED).replace("{conditions}", conditions)
        with self._shards.single("counting outbox messages") as connection:
            found = self._run(connection, template, values)[0]
        return int(found[0]), int(found[1])

    def fates(self, numbers: Collection[int]) -> dict[int, str]:
        """What is known of numbers that are no dead letter of the outbox: 'handler', or what the audit says."""
        with self._shards.single("reading what became of dead letters") as connection:
            sql = "SELECT id FROM {eo}.dead_letter WHERE id = ANY (%(ids)s::bigint[]) AND origin = 'handler'"
            fates = {int(row[0]): "handler" for row in self._run(connection, sql, {"ids": list(numbers)})}
            done = audit.last(connection, self._schema, [_subject(number) for number in numbers])
        return fates | {number: str(done[_subject(number)]) for number in numbers if _subject(number) in done}

    def fate_of(self, message_id: UUID) -> str | None:
        """What was last done to a message by a tool, None if nothing was."""
        with self._shards.single("reading what became of a message") as connection:
            found = self._run(connection, _DONE, {"message_id": str(message_id)})
            if not found:
                return None
            return str(audit.last(connection, self._schema, [found[0][0]])[found[0][0]])

    def stats(self) -> OutboxStats:
        """Everything there is, counted."""
        oldest = self._shards.oldest_snapshot()
        with self._shards.single("counting the outbox") as connection:
            return read_stats(connection, self._schema, oldest)

    # --- changing ---

    def put_back(self, number: int, *, actor: str) -> PutBack:
        """The dead letter is an outbox row again, with its message id, at its old place; its key is opened.

        On a crash: it is a dead letter or an outbox row, never both and never neither. Two at once: the second waits
        for the first, then raises LetterGone.
        """
        with self._shards.writing(f"putting dead letter {number} back") as connection:
            letter, opened = self._take(connection, number)
            exact = letter.outbox_seq is not None
            sql = _PUT_BACK.replace("{seq}", "seq, " if exact else "")
            sql = sql.replace("{outbox_seq}", "outbox_seq, " if exact else "")
            sql = sql.replace("{overriding}", "OVERRIDING SYSTEM VALUE" if exact else "")
            key_hash = shard_hash(letter.key, letter.message_id.bytes)
            shard, seq = self._run(connection, sql, {"id": number, "hash": key_hash})[0]
            waits = self._run(connection, _WAITS_FOR, {"topic": letter.topic, "key": letter.key})
            waits_for = int(waits[0][0]) if waits else None
            detail = _detail(letter) | {"shard": shard, "seq": seq, "opened": opened, "waits_for": waits_for}
            self._record(connection, "outbox.retry", _subject(number), detail, actor)
            events.emit("outbox.retrying", dead_letter=number)
        events.emit("outbox.retried", dead_letter=number)
        return PutBack(number, letter.message_id, letter.topic, shard, seq, opened, waits_for)

    def discard(self, number: int, *, actor: str) -> bool:
        """The dead letter is gone for good, and its key goes on without it; returns whether the key had waited.

        On a crash: all of it happened, or nothing. Raises LetterGone.
        """
        with self._shards.writing(f"discarding dead letter {number}") as connection:
            letter, opened = self._take(connection, number)
            self._run(connection, _DELETE, {"id": number}, rows=False)
            self._record(connection, "outbox.discard", _subject(number), _detail(letter) | {"opened": opened}, actor)
            events.emit("outbox.discarding", dead_letter=number)
        events.emit("outbox.discarded", dead_letter=number)
        return opened

    def discard_delayed(self, line: OutboxLine, *, actor: str) -> None:
        """The delayed message is never sent. On a crash: gone with its audit row, or there.

        Raises LetterGone when it has become due meanwhile: then the relay has it.
        """
        with self._shards.writing(f"discarding delayed message {line.message_id}") as connection:
            values = {"shard": line.shard, "at": line.at, "seq": line.number, "message_id": line.message_id}
            sql = self._schema.sql(_DELETE_DELAYED)
            if connection.exec_driver_sql(sql, values).rowcount != 1:
                raise LetterGone
            detail = {"message_id": line.message_id, "topic": line.topic, "deliver_at": line.at.isoformat()}
            self._record(connection, "outbox.discard", f"outbox_message/{line.message_id}", detail, actor)
            events.emit("outbox.discarding", message_id=line.message_id)
        events.emit("outbox.discarded", message_id=line.message_id)

    def _take(self, connection: Connection, number: int) -> tuple[Any, bool]:
        """Lock the letter and open its key."""
        found = self._run(connection, _LOCK, {"id": number})
        if not found:
            raise LetterGone
        opened = connection.exec_driver_sql(self._schema.sql(_OPEN), {"id": number}).rowcount == 1
        return found[0], opened

    def _record(
        self, connection: Connection, action: str, subject: str, detail: Mapping[str, object], actor: str
    ) -> None:
        audit.record(connection, self._schema, actor=actor, action=action, subject=subject, detail=detail)

    def _lines(
        self, state: OutboxState, conditions: str, values: dict[str, object], *, whole: bool
    ) -> list[OutboxLine]:
        sql = _LINES[state].replace("{whole}", f", {_WHOLE}" if whole else "").replace("{conditions}", conditions)
        with self._shards.in_index_order(f"listing {state} outbox messages") as connection:
            return [OutboxLine(*row) for row in self._run(connection, sql, values)]

    def _run(
        self, connection: Connection, template: str, values: Mapping[str, object], *, rows: bool = True
    ) -> Sequence[Any]:
        result = connection.exec_driver_sql(self._schema.sql(template), dict(values))
        return result.all() if rows else ()


def _detail(letter: Any) -> dict[str, object]:
    detail = letter._asdict()
    # The audit says what happened to which message, not what was in it.
    del detail["key"]
    return {**detail, "message_id": str(letter.message_id)}


def _subject(number: int) -> str:
    return f"dead_letter/{number}"
