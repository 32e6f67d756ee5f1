"""Saying what a copied database is: the replacement of the one it comes from, or a copy beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from sqlalchemy import Connection

from eoframework.db import audit, home
from eoframework.db.coverage import note_reached
from eoframework.db.home import Home
from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, FailClosed

Meaning = Literal["replacement", "copy"]

_LOCK_WAIT = 60.0
"""Seconds; longer than a batch holds its positions."""
_MAY: Final = """
SELECT pg_get_userbyid(relowner), pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = %(table)s::regclass
"""
# Of a copy the owner's name stands in the rows too, but not its session.
_AT_WORK: Final = """
SELECT 'the worker ' || owner FROM {eo}.position p JOIN pg_stat_activity a ON a.pid = p.backend_pid
    AND coalesce(a.backend_start = p.backend_start, true)
UNION SELECT 'the relay ' || owner FROM {eo}.relay_shard WHERE lease_until > clock_timestamp() LIMIT 1
"""
_SETTLE_IN: Final = "UPDATE {eo}.outbox SET home = %(here)s"
_ANOTHER: Final = """
UPDATE {eo}.outbox SET id = gen_random_uuid(), home = %(here)s, copied_from = %(outbox_id)s RETURNING id
"""
# All that the original will send, run or try itself. What was processed, and the letters of its handlers, stay to be
# read. The order is the one in which workers lock: positions first.
_THE_ORIGINALS: Final[Mapping[str, str]] = {
    "positions": "DELETE FROM {eo}.position",
    "starts of transforms": "DELETE FROM {eo}.transform_start",
    "parked messages": "DELETE FROM {eo}.parked_message",
    "lanes": "DELETE FROM {eo}.parked_key",
    "attempts": "DELETE FROM {eo}.attempt",
    "pending messages": "DELETE FROM {eo}.outbox_message",
    "delayed messages": "DELETE FROM {eo}.delayed_message",
    "held keys": "DELETE FROM {eo}.outbox_held",
    "dead letters of the outbox": "DELETE FROM {eo}.dead_letter WHERE origin = 'outbox'",
}
_BEGIN_ANEW: Final = (
    "DELETE FROM {eo}.relay_member",
    "UPDATE {eo}.relay_shard SET epoch = epoch + 1, owner = NULL, lease_until = NULL, batch_no = 0, cluster_id = NULL, "
    "checkpoint_topic_id = NULL",
    # As after `eo position forget`: they stand for no topic until they start.
    "UPDATE {eo}.consumer SET topic = ''",
)


@dataclass(frozen=True, slots=True)
class Adopted:
    """What was declared, and what that deleted."""

    meaning: Meaning
    before: Home
    after: Home
    deleted: Mapping[str, int] = field(default_factory=dict)


def adopt(database: Database, meaning: Meaning, *, actor: str) -> Adopted:
    """Declare what this database is, with an audit row. On a crash: all of it happened, or nothing.

    As a replacement it keeps everything (and is left alone where it is at home): what Kafka knows and it does not is
    found when its processes start. As a copy it gets an outbox of its own and loses what the original will do itself:
    positions, parked messages, what waits in the outbox. Raises FailClosed while its processes run, ConfigurationError
    for a role that does not own the tables.
    """
    with database.brief("saying what this database is", lock_wait=_LOCK_WAIT) as connection:
        _refuse_stranger(connection, database)
        before = home.read(connection, database.schema)
        if meaning == "replacement" and before.stored is not None and before.stored == before.here:
            return Adopted(meaning, before, before)
        _refuse_running(connection, database)
        deleted = {}
        if meaning == "copy":
            deleted = _cut_off(connection, database)
            values = {"here": before.here, "outbox_id": before.outbox_id}
            connection.exec_driver_sql(database.schema.sql(_ANOTHER), values)
        else:
            connection.exec_driver_sql(database.schema.sql(_SETTLE_IN), {"here": before.here})
        after = home.read(connection, database.schema)
        detail = {"as": meaning, "from": before.stored, "to": after.stored, "was": before.outbox_id, **deleted}
        subject = f"outbox/{after.outbox_id}"
        audit.record(connection, database.schema, actor=actor, action="db.adopt", subject=subject, detail=detail)
    return Adopted(meaning, before, after, deleted)


def _cut_off(connection: Connection, database: Database) -> dict[str, int]:
    schema = database.schema
    for (name,) in connection.exec_driver_sql(schema.sql("SELECT name FROM {eo}.consumer ORDER BY name")).all():
        note_reached(connection, schema, name)
    deleted = {
        what: connection.exec_driver_sql(schema.sql(statement)).rowcount for what, statement in _THE_ORIGINALS.items()
    }
    for statement in _BEGIN_ANEW:
        connection.exec_driver_sql(schema.sql(statement))
    return deleted


def _refuse_running(connection: Connection, database: Database) -> None:
    found: Any = connection.exec_driver_sql(database.schema.sql(_AT_WORK)).first()
    if found is not None:
        raise FailClosed(
            f"{found[0]} is at work on this database. Nothing was changed.",
            remedy="Stop its workers and relays first; a relay's lease ends by itself (EO_RELAY_LEASE).",
        )


def _refuse_stranger(connection: Connection, database: Database) -> None:
    values = {"table": database.schema.sql("{eo}.outbox")}
    owner, may = connection.exec_driver_sql(_MAY, values).one()
    if not may:
        raise ConfigurationError(
            f"only the owner of the tables, {owner!r}, may say what this database is. Nothing was changed.",
            remedy=f"Log in as {owner} (EO_DATABASE_URL).",
        )
