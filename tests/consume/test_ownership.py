"""Claims name the backend that a successor may have to end; all of them, also after the connection was replaced."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from eoframework.consume.ownership import Ownership
from eoframework.db.position import Positions, Stream
from eoframework.db.session import Database
from eoframework.db.unit_of_work import Timeouts, WorkerConnection
from eoframework.errors import LostConnection, RestartNeeded
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from tests.conftest import MakeTopic
from tests.consume.harness import column


@pytest.fixture
def connection(database: Database) -> WorkerConnection:
    return WorkerConnection(database, Timeouts(10, 5, 4), handler="app.book")


@pytest.fixture
def ownership(settings: Settings, database: Database, make_topic: MakeTopic, connection: WorkerConnection) -> Ownership:
    admin, positions = Admin(settings), Positions(database.schema)
    topic = admin.describe(make_topic(partitions=3))
    with connection.begin("register") as started:
        number = positions.register(started, name="app.book", topic=topic.name)
        stream = Stream(number, "app.book", topic.name, topic.id, admin.cluster_id())
        positions.start(started, stream, {0: 0, 1: 0, 2: 0})
    return Ownership(stream, positions, connection, admin, owner="me", mark=lambda claim: None)


def test_a_new_connection_renews_every_claim(
    ownership: Ownership, connection: WorkerConnection, database: Database
) -> None:
    """Seen to fail without `on_open`: the claim of partition 2 opened a new connection, and the batches of the others
    ran on it although their rows named the old one.
    """
    assert ownership.assigned([0, 1]) == {0: 0, 1: 0}
    with database.engine.begin() as other:
        other.execute(text("SELECT pg_terminate_backend(backend_pid) FROM eo.position WHERE partition = 0"))
    assert ownership.assigned([2]) == {2: None}, "the connection was found broken"
    with pytest.raises(LostConnection), connection.begin("a batch", opening=False):
        raise AssertionError("a batch on no connection")
    while due := ownership.due():
        ownership.claim_waiting(due[0])
    assert sorted(ownership.claims) == [0, 1, 2]
    with connection.begin("which backend", opening=False) as ours:
        backend = ours.scalar(text("SELECT pg_backend_pid()"))
    assert column(database.engine, "SELECT backend_pid FROM eo.position") == [backend] * 3


def test_a_renewed_claim_still_tells_that_the_last_owner_died(ownership: Ownership, database: Database) -> None:
    """Seen to fail with a new Claim in `claim_again`: what the dead owner had charged stood in eo.attempt for ever, and
    a parked message that may have killed it ran unguarded.
    """
    with database.engine.begin() as dead:
        dead.execute(text("UPDATE eo.position SET owner = 'dead', claimed_at = now(), epoch = 1 WHERE partition = 1"))
    ownership.assigned([0, 1])
    assert ownership.unclean() == {1}
    ownership.in_doubt()
    while due := ownership.due():
        ownership.claim_waiting(due[0])
    assert ownership.unclean() == {1}


def test_positions_forgotten_while_a_worker_starts_are_not_begun_at_0(ownership: Ownership, database: Database) -> None:
    """Seen to fail without the EXISTS in `_CLAIM`: the claim began at 0, whatever `start` says."""
    with database.engine.begin() as operator:
        operator.execute(text("DELETE FROM eo.position"))
    with pytest.raises(RestartNeeded, match="forgotten"):
        ownership.assigned([0])
    assert column(database.engine, "SELECT next_offset FROM eo.position") == []
