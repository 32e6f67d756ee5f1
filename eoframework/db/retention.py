"""Forgetting old message ids, a bounded slice at a time."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import text

from eoframework.db.session import Database

# Short timeouts instead of patience: a slice that cannot be had quickly is left for the next time, so that no batch
# ever waits for pruning longer than this. The lock ends with the transaction; only one worker prunes at a time.
_PREPARE = """
SELECT set_config('statement_timeout', '5s', true), set_config('lock_timeout', '500ms', true),
    pg_try_advisory_xact_lock(1701867117, hashtext(:schema))
"""
# By ctid: DELETE has no LIMIT, and the primary key would be looked up a second time for every row.
_DELETE = """
DELETE FROM {eo}.processed_message WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM {eo}.processed_message WHERE processed_at < :before
    LIMIT :limit FOR UPDATE SKIP LOCKED))
"""


def forget_processed(database: Database, *, before: datetime, limit: int) -> int | None:
    """Delete at most `limit` processed messages recorded before that time; None if another worker is at it.

    On a crash: the slice is deleted or not, either is right. Only with a time that `coverage.raise_coverage` gave:
    then an id is never forgotten before its window is over, by the server's clock, which also wrote the row's time,
    nor without the coverage saying so.
    """
    with database.begin("pruning processed messages") as connection:
        prepared = connection.execute(text(_PREPARE), {"schema": database.schema.name}).one()
        if not prepared[-1]:
            return None
        values = {"before": before, "limit": limit}
        return connection.execute(text(database.schema.sql(_DELETE)), values).rowcount
