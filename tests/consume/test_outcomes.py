"""What the executor reports of a batch that went partly well: only what is committed counts as moved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from eoframework import App, Message, Topic, Tx
from eoframework.consume.batch import Outcome
from eoframework.db.session import Database
from eoframework.errors import Conflict, LostConnection, TimedOut
from eoframework.settings import Settings
from tests.consume.harness import column, make_app, make_ledger
from tests.consume.rig import Rig

INSERT = text('INSERT INTO ledger (partition, "offset", note) VALUES (:p, :o, :n)')
CONFLICT = text("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$")


class Entry(BaseModel):
    n: int


Then = Callable[[Message[Entry], Tx], None]


@pytest.fixture
def app(settings: Settings, database: Database) -> App:
    make_ledger(database.engine)
    return make_app(settings, database)


def rig_of(app: App, then: Then = lambda message, tx: None, *, budget: float = 60) -> Rig:
    @app.handler(Topic("outcomes", Entry), name="book", retry=None)
    def book(message: Message[Entry], tx: Tx) -> None:
        tx.session.execute(INSERT, {"p": message.partition, "o": message.offset, "n": str(message.payload.n)})
        then(message, tx)

    return Rig(app, budget=budget)


def booked(rig: Rig) -> list[str]:
    return column(rig.app.database.engine, """SELECT partition || '@' || "offset" FROM ledger ORDER BY id""")


def test_an_undecodable_record_has_failed_only_once_all_before_it_is_done(app: App) -> None:
    """Seen to fail with `_reached` always true: reported while messages before it had not been run."""
    rig = rig_of(app, budget=0)
    records = [*(rig.record(b'{"n": 0}') for _ in range(2)), rig.record(b"{"), rig.record(b'{"n": 3}')]
    first = rig.run(records)
    assert (first.moved, first.failed) == ({0: 1}, {})
    second = rig.run(records[1:])
    assert second.moved == {0: 2}
    assert second.failed[0].record is records[2]
    third = rig.run(records[2:])
    assert third.moved == {}
    assert third.failed[0].record is records[2]
    assert booked(rig) == ["0@0", "0@1"]


def test_a_fenced_partition_takes_the_batch_back_whole(app: App) -> None:
    """Seen to fail with `raise Fence` taken out of Unit.fence: effects of a partition that was no longer ours."""
    rig = rig_of(app)
    with app.database.engine.begin() as connection:
        connection.execute(text("UPDATE eo.position SET epoch = epoch + 1 WHERE partition = 1"))
    records = [rig.record(b'{"n": 0}', partition=partition) for partition in (0, 1, 2)]
    outcome = rig.run(records)
    assert outcome == Outcome(fenced={1})
    assert booked(rig) == []
    assert rig.positions() == [0, 0, 0]
    assert rig.run([records[0], records[2]]).moved == {0: 1, 2: 1}


def test_a_position_set_back_in_the_same_epoch_takes_the_batch_back(app: App) -> None:
    """As when a standby that lagged was promoted behind a pooler: no connection broke, and the epoch is the same.

    Seen to fail with `p.next_offset = f.expected` taken out of `_ADVANCE`: what the failover took back was skipped.
    """
    rig = rig_of(app)
    assert rig.run([rig.record(b'{"n": %d}' % n) for n in range(3)]).moved == {0: 3}
    with app.database.engine.begin() as connection:
        connection.execute(text("UPDATE eo.position SET next_offset = 1 WHERE partition = 0"))
    assert rig.run([rig.record(b'{"n": 3}')]) == Outcome(fenced={0})
    assert booked(rig) == ["0@0", "0@1", "0@2"]
    assert rig.positions() == [1, 0, 0]


def test_smaller_parts_stop_at_a_conflict_and_keep_what_was_committed(app: App) -> None:
    """Seen to fail with the condition on trouble taken out of Executor._process: the next message overtook it and
    went past it.
    """
    runs: list[int] = []

    def fail(message: Message[Entry], tx: Tx) -> None:
        runs.append(message.payload.n)
        if runs == [0, 1, 2]:
            raise ValueError("the batch fails here")
        if runs == [0, 1, 2, 0, 1, 2]:
            tx.session.execute(CONFLICT)

    rig = rig_of(app, fail)
    records = [rig.record(b'{"n": %d}' % n) for n in range(3)]
    outcome = rig.run(records)
    assert outcome.moved == {0: 2}
    assert outcome.failed == {}
    assert isinstance(outcome.trouble, Conflict)
    assert rig.run(records[2:]).moved == {0: 3}
    assert booked(rig) == ["0@0", "0@1", "0@2"]


@pytest.mark.parametrize("hides", [False, True])
def test_a_connection_lost_in_the_handler_is_trouble_whatever_the_handler_makes_of_it(app: App, hides: bool) -> None:
    """Seen to fail with the question for `status()` taken out of Unit._failed: the message was blamed, with 70."""

    def die(message: Message[Entry], tx: Tx) -> None:
        try:
            tx.session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        except OperationalError as error:
            if hides:
                raise ValueError("something about the message") from error
            raise

    rig = rig_of(app, die)
    outcome = rig.run([rig.record(b'{"n": 0}')])
    assert isinstance(outcome.trouble, LostConnection)
    assert outcome.moved == outcome.failed == {}
    again = rig.run([rig.record(b'{"n": 0}', partition=1)])
    assert isinstance(again.trouble, LostConnection), "no batch on a connection that the claims do not name"
    assert booked(rig) == []


def test_a_statement_timeout_is_trouble_and_not_the_messages_fault(app: App) -> None:
    def slow(message: Message[Entry], tx: Tx) -> None:
        tx.session.execute(text("SET LOCAL statement_timeout = 10"))
        tx.session.execute(text("SELECT pg_sleep(1)"))

    rig = rig_of(app, slow)
    outcome = rig.run([rig.record(b'{"n": 0}')])
    assert type(outcome.trouble) is TimedOut
    assert outcome.failed == {}


def test_a_batch_that_fails_is_handed_over_again_in_halves(app: App) -> None:
    batches: list[int] = []

    @app.batch_handler(Topic("outcomes", Entry), name="book", retry=None)
    def book(batch: list[Message[Entry]], tx: Tx) -> None:
        batches.append(len(batch))
        for message in batch:
            tx.session.execute(INSERT, {"p": message.partition, "o": message.offset, "n": str(message.payload.n)})
            if message.payload.n == 2:
                raise ValueError("two")

    rig = Rig(app)
    outcome = rig.run([rig.record(b'{"n": %d}' % n) for n in range(4)])
    assert batches == [4, 2, 2, 1]
    assert outcome.moved == {0: 2}
    assert outcome.failed[0].record.offset == 2
    assert booked(rig) == ["0@0", "0@1"]
