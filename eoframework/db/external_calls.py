"""The table of calls outside the database: who may be calling, and what came of it.

A row is a claim until it has a result. Every claim raises the fence, and whoever writes names the fence it holds, so
that a caller whose lease ended in the middle of its call cannot write over its successor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Connection

from eoframework.db.session import Database
from eoframework.schema import Schema

_ONE = "consumer_id = %(consumer_id)s AND message_id = %(message_id)s AND name = %(name)s"
_MINE = f"{_ONE} AND fence = %(fence)s AND done_at IS NULL"
_PROCESSED = """
EXISTS (SELECT FROM {eo}.processed_message p WHERE p.consumer_id = %(consumer_id)s AND p.message_id = %(message_id)s)
"""
_FIRST = f"""
INSERT INTO {{eo}}.external_call (consumer_id, message_id, name, partition, "offset", fence, calls, owner, lease_until)
SELECT %(consumer_id)s, %(message_id)s, %(name)s, %(partition)s, %(offset)s, 1, 1, %(owner)s,
    clock_timestamp() + make_interval(secs => %(lease)s)
WHERE NOT {_PROCESSED} ON CONFLICT (consumer_id, message_id, name) DO NOTHING
"""
_LOOK = f"""
SELECT {_PROCESSED} AS processed, id, owner, done_at IS NOT NULL AS done, result::text AS result, calls, error_class,
    extract(epoch FROM lease_until - clock_timestamp())::float8 AS seconds_left
FROM {{eo}}.external_call WHERE {_ONE} FOR UPDATE
"""
_TAKE = f"""
UPDATE {{eo}}.external_call SET fence = fence + 1, calls = calls + 1, owner = %(owner)s, error_class = NULL,
    lease_until = clock_timestamp() + make_interval(secs => %(lease)s)
WHERE {_ONE} AND done_at IS NULL RETURNING fence, calls
"""
_STORE = f"UPDATE {{eo}}.external_call SET result = %(result)s::json, done_at = clock_timestamp() WHERE {_MINE}"
_LEAVE = f"""
UPDATE {{eo}}.external_call SET lease_until = clock_timestamp(), error_class = %(error_class)s WHERE {_MINE}
"""
_RELEASE = f"UPDATE {{eo}}.external_call SET owner = NULL, error_class = %(error_class)s WHERE {_MINE}"
_SETTLE = """
UPDATE {eo}.external_call SET settled_at = clock_timestamp()
WHERE consumer_id = %(consumer_id)s AND message_id = %(message_id)s AND settled_at IS NULL
"""
_RESULTS = """
SELECT name, result::text FROM {eo}.external_call
WHERE consumer_id = %(consumer_id)s AND message_id = %(message_id)s AND done_at IS NOT NULL
"""
# As for processed messages (db/retention.py): what cannot be had quickly is left for the next time.
_PREPARE = """
SELECT set_config('statement_timeout', '5s', true), set_config('lock_timeout', '500ms', true),
    pg_try_advisory_xact_lock(1701867118, hashtext(%(schema)s))
"""
# Settled, not merely old: a dead letter is replayed, and a stopped consumer started, long after the call was made.
# claimed_at is there for the index; nothing is settled before it is claimed.
_FORGET = """
DELETE FROM {eo}.external_call WHERE ctid = ANY(ARRAY(
    SELECT c.ctid FROM {eo}.external_call c WHERE c.claimed_at < now() - make_interval(secs => %(seconds)s)
        AND c.settled_at < now() - make_interval(secs => %(seconds)s)
        AND NOT EXISTS (SELECT FROM {eo}.processed_message p
            WHERE p.consumer_id = c.consumer_id AND p.message_id = c.message_id)
    LIMIT %(limit)s FOR UPDATE SKIP LOCKED))
"""


@dataclass(frozen=True, slots=True)
class CallId:
    """One call: for whom, for which message, which one."""

    consumer_id: int
    message_id: UUID
    name: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """Ours to make."""

    fence: int
    calls: int
    """How often it has been claimed to be made, this time included."""


@dataclass(frozen=True, slots=True)
class Done:
    """Made, with this result."""

    result: str


@dataclass(frozen=True, slots=True)
class Busy:
    """Somebody else may be making it."""

    owner: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Open:
    """Begun by somebody who is not at it any more; nobody knows whether it happened."""

    id: int
    error_class: str | None


@dataclass(frozen=True, slots=True)
class Processed:
    """The message's effects are committed; it is not called for."""


Standing = Claimed | Done | Busy | Open | Processed


class ExternalCallRows:
    """`begin` is a short transaction on a connection of its own; each method is a statement or two inside one."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    @contextmanager
    def begin(self, database: Database, what: str) -> Iterator[Connection]:
        """A transaction that is not the worker's: committed before the call begins, or after it ended."""
        # Durable: a claim that a crash of the server takes back would let the same call be made twice without anybody
        # knowing.
        with database.brief(what) as connection:
            yield connection

    def claim(
        self,
        connection: Connection,
        call: CallId,
        *,
        place: tuple[int, int],
        owner: str,
        lease: float,
        again: bool,
        unmade: bool = False,
    ) -> Standing:
        """Take the call, or say why not. `again`: also one that may have happened already.

        owner: names one thread; a claim of its own that it finds here is one that it is not at any more. unmade: it
        knows that it never made the call of that claim. place: partition and offset, for people.
        """
        values = {**_values(call), "owner": owner, "lease": lease, "partition": place[0], "offset": place[1]}
        if self._changed(connection, _FIRST, values):
            return Claimed(1, 1)
        row = connection.exec_driver_sql(self._schema.sql(_LOOK), values).one_or_none()
        if row is None or row.processed:
            return Processed()
        if row.done:
            return Done(str(row.result))
        mine = row.owner == owner
        if row.owner is not None and not mine and row.seconds_left > 0:
            return Busy(row.owner, row.seconds_left)
        if not (again or row.owner is None or (mine and unmade)):
            return Open(row.id, row.error_class)
        taken = connection.exec_driver_sql(self._schema.sql(_TAKE), values).one()
        return Claimed(taken.fence, taken.calls)

    def store(self, connection: Connection, call: CallId, fence: int, result: str) -> bool:
        """Keep the result; False if the claim has been taken over, or resolved by hand: then it is not ours to keep."""
        return self._changed(connection, _STORE, {**_values(call), "fence": fence, "result": result})

    def leave(self, connection: Connection, call: CallId, fence: int, error_class: str) -> bool:
        """We are not at it any more, and do not know; the next one need not wait for the lease."""
        return self._changed(connection, _LEAVE, {**_values(call), "fence": fence, "error_class": error_class})

    def release(self, connection: Connection, call: CallId, fence: int, error_class: str) -> bool:
        """It surely did not happen: free for whoever comes.

        The row stays for its fence: a new one would begin at 1 again, and a result from before could pass for its.
        """
        return self._changed(connection, _RELEASE, {**_values(call), "fence": fence, "error_class": error_class})

    def settle(self, connection: Connection, consumer_id: int, message_id: UUID) -> None:
        """The message is done with, in this transaction: its results may be forgotten when its id is.

        Never by their age alone: a dead letter may be replayed, and a stopped consumer started, long after.
        """
        values = {"consumer_id": consumer_id, "message_id": message_id}
        connection.exec_driver_sql(self._schema.sql(_SETTLE), values)

    def results(self, connection: Connection, consumer_id: int, message_id: UUID) -> dict[str, str]:
        """The results stored for a message, as JSON, by name."""
        values = {"consumer_id": consumer_id, "message_id": message_id}
        return {row[0]: row[1] for row in connection.exec_driver_sql(self._schema.sql(_RESULTS), values)}

    def _changed(self, connection: Connection, sql: str, values: dict[str, object]) -> bool:
        return connection.exec_driver_sql(self._schema.sql(sql), values).rowcount == 1


def forget_external_calls(database: Database, *, older_than: timedelta, limit: int) -> int | None:
    """Delete at most `limit` results whose messages were done with before the window; None if another worker is at it.

    On a crash: the slice is deleted or not, either is right. A result outlives the id of its message: a duplicate of a
    message that counts as processed is never called for again.
    """
    with database.begin("pruning results of external calls") as connection:
        prepared = connection.exec_driver_sql(_PREPARE, {"schema": database.schema.name}).one()
        if not prepared[-1]:
            return None
        values = {"seconds": older_than.total_seconds(), "limit": limit}
        return connection.exec_driver_sql(database.schema.sql(_FORGET), values).rowcount


def _values(call: CallId) -> dict[str, object]:
    return {"consumer_id": call.consumer_id, "message_id": call.message_id, "name": call.name}
