"""What the outbox and its shards hold when Kafka says something else, and the change that ends the contradiction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

from sqlalchemy import Connection

from eoframework.db import audit
from eoframework.db.session import Database
from eoframework.db.shards import Shards, ShardState
from eoframework.errors import ConfigurationError, FailClosed
from eoframework.settings import Settings

# What is delayed until later cannot have been sent; what is due by now can, if the database was set back.
_ROWS: Final = """
SELECT 'pending', shard, seq, id, topic, created_at FROM {eo}.outbox_message WHERE shard = ANY (%(shards)s::smallint[])
UNION ALL SELECT 'delayed', shard, seq, id, topic, created_at FROM {eo}.delayed_message
    WHERE shard = ANY (%(shards)s::smallint[]) AND deliver_at <= clock_timestamp()
UNION ALL SELECT 'dead', NULL, id, message_id, topic, created_at FROM {eo}.dead_letter WHERE origin = 'outbox'
"""
_MAY: Final = """
SELECT pg_get_userbyid(c.relowner), has_table_privilege(c.oid, 'UPDATE')
    AND has_table_privilege(%(audit)s::regclass, 'INSERT') FROM pg_class c WHERE c.oid = %(shards)s::regclass
"""
_LOCK: Final = """
SELECT shard, batch_no, cluster_id, checkpoint_topic_id, owner, coalesce(lease_until > clock_timestamp(), false)
FROM {eo}.relay_shard ORDER BY shard FOR UPDATE
"""
_DELETE: Final = """
DELETE FROM {eo}.{table} WHERE (shard, seq, id) IN (
    SELECT * FROM unnest(%(shards)s::smallint[], %(seqs)s::bigint[], %(ids)s::uuid[]))
"""
# epoch + 1: whatever relay had the shard changes nothing of it any more.
_SET: Final = """
UPDATE {eo}.relay_shard SET batch_no = %(batch_no)s, cluster_id = %(cluster_id)s, checkpoint_topic_id = %(topic_id)s,
    epoch = epoch + 1, owner = NULL, lease_until = NULL WHERE shard = %(shard)s
"""
_TABLES: Final = {"pending": "outbox_message", "delayed": "delayed_message"}


class Waiting(NamedTuple):
    """A message that the outbox would send, or could be told to."""

    state: Literal["pending", "delayed", "dead"]
    shard: int | None
    number: int
    """seq; of a dead letter its number."""
    id: UUID
    topic: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Change:
    """What is to become of the shards and of the rows."""

    before: Mapping[int, ShardState]
    after: Mapping[int, ShardState]
    sent: Sequence[Waiting]
    """Found in their topics: deleted."""
    discarded: Sequence[Waiting]
    """Nobody knows, and the operator said that they are not to be sent."""


class OutboxAdoption:
    """Each call is one transaction."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._schema = database.schema
        self.shards = Shards(database, settings)

    def waiting(self, shards: Collection[int]) -> list[Waiting]:
        """What these shards would send; and all dead letters of the outbox."""
        with self.shards.single("reading the outbox") as connection:
            rows = connection.exec_driver_sql(self._schema.sql(_ROWS), {"shards": list(shards)})
            return [Waiting(*row) for row in rows]

    def refuse(self) -> None:
        """Raises FailClosed while a relay runs, ConfigurationError for a role that may not change the shards."""
        with self.shards.writing("looking for relays") as connection:
            self._refuse(connection)

    def apply(self, outbox_id: UUID, change: Change, *, actor: str) -> None:
        """Delete the rows and set the shards, with an audit row. On a crash: all of it happened, or nothing.

        Raises FailClosed when a relay was started meanwhile, or a shard is not as it was.
        """
        with self.shards.writing("adopting what Kafka says") as connection:
            found = self._refuse(connection)
            if any(found.get(shard) != state for shard, state in change.before.items()):
                raise FailClosed("the outbox was changed meanwhile. Nothing was changed here.", remedy="Say it again.")
            for state, table in _TABLES.items():
                rows = [row for row in (*change.sent, *change.discarded) if row.state == state]
                self._delete(connection, table, rows)
            for shard, after in change.after.items():
                values = {"batch_no": after.batch_no, "cluster_id": after.cluster_id, "topic_id": after.topic_id}
                connection.exec_driver_sql(self._schema.sql(_SET), values | {"shard": shard})
            self._record(connection, outbox_id, change, actor)

    def _refuse(self, connection: Connection) -> dict[int, ShardState]:
        names = {"audit": self._schema.sql("{eo}.audit"), "shards": self._schema.sql("{eo}.relay_shard")}
        owner, may = connection.exec_driver_sql(_MAY, names).one()
        if not may:
            raise ConfigurationError(
                "this role may not say what was sent: it lacks UPDATE on relay_shard or INSERT on audit. Nothing was "
                "changed.",
                remedy=f"Log in as {owner} (EO_DATABASE_URL), who owns the tables.",
            )
        rows: list[Any] = list(connection.exec_driver_sql(self._schema.sql(_LOCK)))
        alive = [row for row in rows if row[5]]
        if alive:
            raise FailClosed(
                f"relay {alive[0][4]} is running. Nothing was changed.",
                remedy="Stop all relays first; after a kill, wait for its lease (EO_RELAY_LEASE).",
            )
        return {row[0]: ShardState(*row[1:4]) for row in rows}

    def _delete(self, connection: Connection, table: str, rows: Sequence[Waiting]) -> None:
        if not rows:
            return
        values = {
            "shards": [row.shard for row in rows],
            "seqs": [row.number for row in rows],
            "ids": [row.id for row in rows],
        }
        gone = connection.exec_driver_sql(self._schema.sql(_DELETE.replace("{table}", table)), values).rowcount
        if gone != len(rows):
            raise FailClosed("the outbox was changed meanwhile. Nothing was changed here.", remedy="Say it again.")

    def _record(self, connection: Connection, outbox_id: UUID, change: Change, actor: str) -> None:
        after = {shard: [change.before[shard].batch_no, state.batch_no] for shard, state in change.after.items()}
        detail = {
            "cluster_id": next((state.cluster_id for state in change.after.values()), None),
            "batches": after,
            "sent": [row.id for row in change.sent],
            "discarded": [row.id for row in change.discarded],
        }
        subject = f"outbox/{outbox_id}"
        audit.record(connection, self._schema, actor=actor, action="outbox.adopt", subject=subject, detail=detail)
