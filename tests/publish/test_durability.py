"""A published message is as durable as it looks to the relay, and so is whatever we commit ourselves."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, text

from eoframework.db.outbox import Outbox
from eoframework.db.session import Database
from eoframework.db.shards import Shards
from eoframework.db.unit_of_work import Timeouts, WorkerConnection
from eoframework.message import OutboxMessage, new_id
from eoframework.settings import Settings


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


@pytest.mark.parametrize("default", ["off", "local", "remote_apply"])
@pytest.mark.parametrize("who", ["a worker", "the relay", "an operator or a call"])
def test_what_we_commit_is_durable_whatever_the_default(
    database: Database, settings: Settings, who: str, default: str
) -> None:
    """Seen to fail, each for its case, with synchronous_commit taken out of `_SETTINGS` (db/unit_of_work.py), of
    Shards.writing and of `_BRIEF` (db/session.py): it stays off.
    """
    engine = create_engine(database.engine.url, connect_args={"options": f"-c synchronous_commit={default}"})
    here = Database(engine, database.schema)
    worker = WorkerConnection(here, Timeouts(statement=30, lock=5, idle=4), handler="test")
    begins = {
        "a worker": worker.begin,
        "the relay": Shards(here, settings).writing,
        "an operator or a call": here.brief,
    }
    with begins[who]("test") as connection:
        found = connection.scalar(text("SHOW synchronous_commit"))
    worker.discard()
    engine.dispose()
    assert found == ("remote_apply" if default == "remote_apply" else "on")
