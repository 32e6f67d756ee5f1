"""The same message id in two transactions at once: the second waits until it is known what became of the first."""

from __future__ import annotations

import threading
import uuid

import pytest
from sqlalchemy import text

from eoframework.db.position import Positions
from eoframework.db.processed import ProcessedMessages
from eoframework.db.session import Database
from tests.consume.harness import scalar
from tests.processes import eventually

WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


@pytest.mark.parametrize("first_ends", ["commit", "rollback"])
def test_the_second_is_a_duplicate_only_if_the_first_commits(database: Database, first_ends: str) -> None:
    """Seen to fail with a SELECT before a plain INSERT in place of ON CONFLICT: both are first, or one raises."""
    processed, identity = ProcessedMessages(database.schema), uuid.uuid4()
    with database.begin("register") as connection:
        consumer = Positions(database.schema).register(connection, name="app.book", topic="t")
    second: list[set[uuid.UUID]] = []

    def claim_too() -> None:
        with database.begin("second") as connection:
            second.append(processed.claim(connection, consumer, [identity]))

    with database.engine.connect() as connection:
        assert processed.claim(connection, consumer, [identity]) == {identity}
        rival = threading.Thread(target=claim_too)
        rival.start()
        eventually(lambda: scalar(database.engine, WAITING) == 1, "the second waits for the first")
        assert second == []
        connection.commit() if first_ends == "commit" else connection.rollback()
    rival.join(20)
    assert second == [set() if first_ends == "commit" else {identity}]
    assert scalar(database.engine, "SELECT count(*) FROM eo.processed_message") == 1
    with database.engine.connect() as connection:
        assert connection.scalar(text("SELECT message_id FROM eo.processed_message")) == identity


def test_the_same_ids_in_another_order_are_no_deadlock(database: Database) -> None:
    """Seen to fail without the ORDER BY in `_CLAIM` of db/processed.py: each waits for an id that the other has."""
    processed, ids = ProcessedMessages(database.schema), [uuid.uuid4() for _ in range(20_000)]
    with database.begin("register") as connection:
        consumer = Positions(database.schema).register(connection, name="app.book", topic="t")
    ready = threading.Barrier(2)
    first: list[int] = []

    def claim(given: list[uuid.UUID]) -> None:
        with database.begin("claim") as connection:
            ready.wait(20)
            first.append(len(processed.claim(connection, consumer, given)))

    both = [threading.Thread(target=claim, args=(given,)) for given in (ids, ids[::-1])]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
    assert sorted(first) == [0, len(ids)]
