"""A published message is as durable as it looks to the relay."""

from __future__ import annotations

from sqlalchemy import text

from eoframework.db.outbox import Outbox
from eoframework.db.session import Database
from eoframework.message import OutboxMessage, new_id


def test_a_transaction_that_publishes_commits_durably(database: Database) -> None:
    """Seen to fail with `_DURABLE` taken out of Outbox._prepare: it stays off."""
    message = OutboxMessage(new_id(), "t", None, b"", "t", "s", "text/plain")
    with database.begin("test") as connection:
        connection.execute(text("SET LOCAL synchronous_commit = off"))
        Outbox(database.schema).insert(connection, [message])
        assert connection.scalar(text("SHOW synchronous_commit")) == "on"


def test_a_stronger_guarantee_is_left_alone(database: Database) -> None:
    message = OutboxMessage(new_id(), "t", b"k", b"", "t", "s", "text/plain")
    with database.begin("test") as connection:
        connection.execute(text("SET LOCAL synchronous_commit = remote_apply"))
        Outbox(database.schema).insert(connection, [message])
        assert connection.scalar(text("SHOW synchronous_commit")) == "remote_apply"
