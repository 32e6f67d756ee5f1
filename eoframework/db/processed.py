"""The processed-message table: which message ids a consumer's effects are already committed for."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Connection

from eoframework.schema import Schema

# Sorted: two workers that insert the same ids in different order deadlock (10 in 244 commits; sorted none in 1,240).
_CLAIM = """
INSERT INTO {eo}.processed_message (consumer_id, message_id)
SELECT %(consumer_id)s, id FROM unnest(%(ids)s::uuid[]) AS given(id) ORDER BY id
ON CONFLICT ON CONSTRAINT processed_message_pkey DO NOTHING RETURNING message_id
"""
# An id is remembered from when it was last seen, within this accuracy: each time would be a write for each duplicate.
# A message whose id were forgotten earlier, because another one bore it long before, would count as covered and be run
# again (coverage.py). A row that is locked is being renewed by somebody else.
RENEW_AFTER = timedelta(hours=1)
_RENEW = """
UPDATE {eo}.processed_message SET processed_at = now() WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {eo}.processed_message WHERE consumer_id = %(consumer_id)s AND message_id = ANY(%(ids)s::uuid[])
        AND processed_at < now() - %(after)s FOR UPDATE SKIP LOCKED))
"""
_FORGET = """
DELETE FROM {eo}.processed_message WHERE consumer_id = %(consumer_id)s AND message_id = ANY(%(ids)s::uuid[])
"""


class ProcessedMessages:
    """One statement for a whole batch: who is first, and everybody else is a duplicate."""

    def __init__(self, schema: Schema) -> None:
        self._claim = schema.sql(_CLAIM)
        self._renew = schema.sql(_RENEW)
        self._forget = schema.sql(_FORGET)

    def claim(self, connection: Connection, consumer_id: int, ids: Collection[UUID]) -> set[UUID]:
        """Record the ids and return those seen for the first time; the others are remembered anew.

        An id that another open transaction has just inserted is waited for: if that one commits, ours is a duplicate;
        if it rolls back, ours is first. (PostgreSQL manual, INSERT, "ON CONFLICT Clause".)
        """
        if not ids:
            return set()
        rows = connection.exec_driver_sql(self._claim, {"consumer_id": consumer_id, "ids": list(ids)})
        new = {row[0] for row in rows}
        if len(new) < len(set(ids)):
            seen = {"consumer_id": consumer_id, "ids": list(set(ids) - new), "after": RENEW_AFTER}
            connection.exec_driver_sql(self._renew, seen)
        return new

    def forget(self, connection: Connection, consumer_id: int, ids: Collection[UUID]) -> None:
        """Take ids back that this same transaction recorded for messages it then did not run."""
        if ids:
            connection.exec_driver_sql(self._forget, {"consumer_id": consumer_id, "ids": list(ids)})
