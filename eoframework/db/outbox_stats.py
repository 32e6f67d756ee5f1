"""What is in the outbox, counted: for `eo outbox stats` and for whoever watches."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import Connection

from eoframework.schema import Schema

# The oldest row of a shard is its lowest number, which the index knows; a minimum over times would read every row.
_SHARDS: Final = """
SELECT s.shard, (SELECT count(*) FROM {eo}.outbox_message m WHERE m.shard = s.shard),
    (SELECT extract(epoch FROM clock_timestamp() - m.created_at)::float8 FROM {eo}.outbox_message m
      WHERE m.shard = s.shard ORDER BY m.seq LIMIT 1),
    s.owner, s.lease_until, coalesce(s.lease_until > clock_timestamp(), false), s.epoch, s.batch_no
FROM {eo}.relay_shard s ORDER BY s.shard
"""
# Which rows wait is only looked for when any key is held.
_TOTALS: Final = """
SELECT (SELECT count(*) FROM {eo}.delayed_message WHERE deliver_at <= clock_timestamp()),
    (SELECT count(*) FROM {eo}.delayed_message WHERE deliver_at > clock_timestamp()),
    (SELECT count(*) FROM {eo}.dead_letter WHERE origin = 'outbox'),
    (SELECT count(*) FROM {eo}.outbox_held),
    CASE WHEN EXISTS (SELECT FROM {eo}.outbox_held) THEN
        (SELECT count(*) FROM {eo}.outbox_message m JOIN {eo}.outbox_held h
            ON h.topic = m.topic AND h.key_digest = sha256(m.key)) ELSE 0 END
"""


@dataclass(frozen=True, slots=True)
class ShardStats:
    """One shard of the outbox."""

    shard: int
    pending: int
    oldest_age: float | None
    """Seconds since its first row was published, None without rows."""
    owner: str | None
    lease_until: datetime | None
    alive: bool
    """Whether the owner's lease has not run out."""
    epoch: int
    batch_no: int


@dataclass(frozen=True, slots=True)
class OutboxStats:
    """All of the outbox at one moment."""

    delayed_due: int
    delayed_later: int
    dead: int
    held_keys: int
    held_rows: int
    """Rows of held keys; part of `pending`."""
    shards: list[ShardStats]
    oldest_transaction: tuple[int, float] | None
    """Backend and age in seconds of the transaction that keeps PostgreSQL from removing dead rows."""

    @property
    def pending(self) -> int:
        return sum(shard.pending for shard in self.shards)


def read_stats(connection: Connection, schema: Schema, oldest_transaction: tuple[int, float] | None) -> OutboxStats:
    """Counts every row: as many as there are index entries are read."""
    shards = [ShardStats(*row) for row in connection.exec_driver_sql(schema.sql(_SHARDS))]
    due, later, dead, keys, rows = connection.exec_driver_sql(schema.sql(_TOTALS)).one()
    return OutboxStats(due, later, dead, keys, rows, shards, oldest_transaction)
