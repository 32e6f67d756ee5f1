"""A handler slower than max_poll_interval: the group takes its partition away in the middle of a message."""

from __future__ import annotations

import uuid

import pytest
from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, Message, Topic, Tx, events
from eoframework.db.session import Database
from eoframework.settings import Settings
from tests.conftest import make_settings
from tests.consume.harness import column, make_app, make_ledger, next_offsets, rows_reach, running
from tests.processes import eventually, produce


class Entry(BaseModel):
    n: int


@pytest.fixture
def app(settings: Settings, database: Database) -> App:
    make_ledger(database.engine)
    # The ladder below max_poll_interval, shortened.
    short = {"idle_in_transaction_timeout": 1, "lock_timeout": 1.5, "statement_timeout": 2, "max_poll_interval": 2.5}
    made = make_settings(
        settings.require_database_url(),
        settings.require_bootstrap_servers(),
        max_wait=0.1,
        # In this protocol the member itself leaves when the time is up; under KIP-848 a session timeout comes on top.
        group_protocol="classic",
        kafka={"session.timeout.ms": "2500", "heartbeat.interval.ms": "500"},
        **short,
    )
    return make_app(made, database, f"app{uuid.uuid4().hex[:8]}")


def test_taken_over_in_the_middle_of_a_message(app: App, database: Database, topic_name: str) -> None:
    """The successor ends the transaction that holds it up; the slow one is fenced and neither repeats nor skips. Seen
    to fail with the call of `_terminate_holder` taken out of Ownership._claim: nobody ends it, it holds its successor
    up until it is done.
    """
    attempts: list[int] = []

    @app.handler(Topic(topic_name, Entry), name="book")
    def book(message: Message[Entry], tx: Tx) -> None:
        n = message.payload.n
        attempts.append(n)
        for _ in range(10 if n == 2 and attempts.count(2) == 1 else 0):
            tx.session.execute(text("SELECT pg_sleep(0.5)"))
        statement = text('INSERT INTO ledger (partition, "offset", note) VALUES (0, :o, :n)')
        tx.session.execute(statement, {"o": message.offset, "n": str(n)})

    terminated: list[str] = []
    unsubscribe = events.subscribe(lambda name, _: terminated.append(name))
    servers = app.settings.require_bootstrap_servers()
    try:
        with running(app) as first:
            produce(servers, topic_name, [(None, b'{"n": %d}' % n) for n in range(5)])
            eventually(lambda: 2 in attempts, "the slow message")
            with running(app) as second:
                rows_reach(database.engine, 5)
                assert second.end() == 0
            assert first.end() == 0
    finally:
        unsubscribe()
    assert column(database.engine, "SELECT note FROM ledger ORDER BY id") == ["0", "1", "2", "3", "4"]
    assert next_offsets(database) == [(0, 5)]
    assert "consume.holder_terminated" in terminated
