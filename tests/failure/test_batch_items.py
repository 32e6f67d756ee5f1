"""Batch handlers: who failed is named by `tx.fail` or BatchItemFailed, else found by halving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy import text

from eoframework import App, BatchItemFailed, HandlerMisuse, Message, Reject, RetryLater, Topic, Tx
from eoframework.consume.batch import Outcome
from eoframework.db.session import Database
from eoframework.message import Record
from eoframework.settings import Settings
from tests.consume.harness import column, make_app, make_ledger
from tests.consume.rig import Rig
from tests.failure.workbench import Entry, entries, id_of, retrying

BOOK = text('INSERT INTO ledger (partition, "offset", note) VALUES (0, :o, :n)')
Item = Message[Entry]
Fate = Callable[[list[Item], Tx], None]


@pytest.fixture
def app(settings: Settings, database: Database) -> App:
    make_ledger(database.engine)
    return make_app(settings, database)


@dataclass
class Batches:
    """A batch handler that books what is left of its list after `fate` has had its say."""

    app: App
    fate: Fate
    seen: list[list[int]] = field(default_factory=list)
    skip: set[int] = field(default_factory=set)
    """Numbers that the handler does nothing for."""

    def declare(self, **options: Any) -> Rig:
        options = {"retry": retrying(3)} | options

        @self.app.batch_handler(entries, name="book", **options)
        def book(batch: list[Item], tx: Tx) -> None:
            self.seen.append([message.payload.n for message in batch])
            self.fate(batch, tx)
            for message in batch:
                if message.payload.n not in self.skip:
                    tx.session.execute(BOOK, {"o": message.offset, "n": str(message.payload.n)})

        return Rig(self.app)

    def booked(self) -> list[int]:
        return column(self.app.database.engine, "SELECT note::int FROM ledger ORDER BY id")

    def table(self, name: str, columns: str) -> list[Any]:
        with self.app.database.engine.connect() as connection:
            return list(connection.execute(text(f'SELECT {columns} FROM eo.{name} ORDER BY "offset"')))


def send(rig: Rig, numbers: range, *, keys: int = 100) -> Outcome:
    return rig.run([record(rig, n, f"k{n % keys}") for n in numbers])


def record(rig: Rig, n: int, key: str) -> Record:
    return rig.record(b'{"n": %d}' % n, identity=str(id_of(n)), key=key.encode())


def test_a_named_message_is_set_aside_and_the_others_stay(app: App) -> None:
    """One call is enough: nothing is rolled back.

    Seen to fail with `walk.fell` left out of HandlerCalls._set_aside: it counted as done.
    """

    def name(batch: list[Item], tx: Tx) -> None:
        for place, message in enumerate(batch):
            if message.payload.n == 2 and message.attempt == 1:
                tx.fail(place, ValueError("two"))
            elif message.payload.n == 4 and message.attempt == 1:
                tx.fail(message, "four")

    batches = Batches(app, name, skip={2, 4})
    rig = batches.declare()
    outcome = send(rig, range(6))
    assert (outcome.moved, outcome.messages, outcome.parked) == ({0: 6}, 4, 2)
    assert batches.seen == [list(range(6))]
    assert batches.booked() == [0, 1, 3, 5]
    causes = batches.table("parked_message", '"offset", attempts, error_class, error')
    assert causes == [(2, 1, "ValueError", "two"), (4, 1, "eoframework.errors.BatchItemFailed", "four")]
    batches.skip = set()
    rig.run_parked()
    assert batches.booked() == [0, 1, 3, 5, 2, 4]


def test_a_later_message_of_its_key_does_not_overtake_it(app: App) -> None:
    """It was in the same list, and had run: everything is rolled back and runs without the two.

    Seen to fail with `raise culprits` left out of HandlerCalls._set_aside: 4 before 1.
    """

    def name(batch: list[Item], tx: Tx) -> None:
        for message in batch:
            if message.payload.n == 1 and len(batch) > 1:
                tx.fail(message, ValueError("one"))

    batches = Batches(app, name)
    rig = batches.declare()
    outcome = send(rig, range(6), keys=3)
    assert (outcome.moved, outcome.messages, outcome.parked) == ({0: 6}, 4, 2)
    assert batches.seen == [[0, 1, 2, 3, 4, 5], [0, 2, 3, 5]]
    assert batches.booked() == [0, 2, 3, 5]
    rig.run_parked()
    assert batches.booked() == [0, 2, 3, 5, 1, 4]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_raised_name_rolls_all_back_and_runs_the_others_again(app: App, *, wrapped: bool) -> None:
    """The cause that is stored is the error it was raised from, which is also what the policy goes by.

    Seen to fail with `_item_error` answering the BatchItemFailed itself: retried, where `never` says otherwise.
    """

    def name(batch: list[Item], tx: Tx) -> None:
        for place, message in enumerate(batch):
            if message.payload.n == 3:
                tx.session.execute(BOOK, {"o": 99, "n": "99"})
                try:
                    raise KeyError("three")
                except KeyError as error:
                    raise BatchItemFailed(place) from (error if wrapped else None)

    batches = Batches(app, name)
    rig = batches.declare(retry=retrying(2, never=(KeyError,)))
    send(rig, range(6))
    assert batches.seen == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 5]]
    assert batches.booked() == [0, 1, 2, 4, 5]
    if not wrapped:
        assert batches.table("parked_message", "error_class") == [("eoframework.errors.BatchItemFailed",)]
        rig.run_parked()
    told = batches.table("dead_letter", "attempts, error_class")
    assert told == [(1, "KeyError")] if wrapped else [(2, "eoframework.errors.BatchItemFailed")]


@pytest.mark.parametrize("error", [Reject("no"), RetryLater(after=1000)], ids=["Reject", "RetryLater"])
@pytest.mark.parametrize("alone", [False, True], ids=["in a batch", "alone"])
def test_what_an_item_was_raised_from_decides(app: App, error: Exception, *, alone: bool) -> None:
    """Also for a list of one, where everything behind waits for it, and in its lane.

    Seen to fail with `Culprits` itself as the outcome's error in Unit.attempt: rejected messages were retried.
    """
    failing = ValueError("first")

    def name(batch: list[Item], tx: Tx) -> None:
        for place, message in enumerate(batch):
            if message.payload.n == 1:
                raise BatchItemFailed(place) from failing

    batches = Batches(app, name)
    rig = batches.declare(ordering="partition" if alone else "key", retry=retrying(3))
    if alone:
        failing = error  # type: ignore[assignment]
        outcome = rig.run([record(rig, 1, "k")])
        waits = outcome.failed[0].retry_in if outcome.failed else None
        assert waits == (None if isinstance(error, Reject) else 1000)
        assert len(batches.table("dead_letter", "id")) == isinstance(error, Reject)
        return
    send(rig, range(3))
    failing = error  # type: ignore[assignment]
    rig.run_parked()
    assert len(batches.table("dead_letter", "id")) == isinstance(error, Reject)
    assert len(batches.table("parked_message", "attempts")) == isinstance(error, RetryLater)


@pytest.mark.parametrize("index", [-1, 4, 10**9])
def test_an_index_that_is_none_is_a_mistake_of_the_handler(app: App, index: int) -> None:
    """It ends with the messages it was said of; nothing loops, nothing is lost."""

    def name(batch: list[Item], tx: Tx) -> None:
        if any(message.payload.n == 2 for message in batch):
            raise BatchItemFailed(index)

    batches = Batches(app, name)
    rig = batches.declare(retry=retrying(2))
    send(rig, range(4))
    rig.run_parked()
    assert batches.booked() == [0, 1, 3]
    (told,) = batches.table("dead_letter", '"offset", error_class, error')
    assert told[:2] == (2, "eoframework.errors.HandlerMisuse")
    assert f"BatchItemFailed({index})" in told[2]


def test_tx_fail_refuses_what_is_no_message_of_the_batch(app: App) -> None:
    mistakes: list[str] = []

    def name(batch: list[Item], tx: Tx) -> None:
        for item in (len(batch), -1):
            with pytest.raises(HandlerMisuse) as refused:
                tx.fail(item, "x")
            mistakes.append(str(refused.value))

    batches = Batches(app, name)
    send(batches.declare(), range(3))
    assert len(mistakes) == 2
    assert batches.booked() == [0, 1, 2]


@pytest.mark.parametrize("culprits", [{0}, {7}, {15}, {3, 4}, {0, 9, 15}, set(range(16))], ids=str)
def test_unnamed_culprits_are_found_by_halving(app: App, culprits: set[int]) -> None:
    """Seen to fail with Executor._smaller naming the first half as done: messages behind a culprit were lost."""

    def fail(batch: list[Item], tx: Tx) -> None:
        guilty = culprits & {message.payload.n for message in batch}
        if guilty:
            raise ValueError(f"one of {guilty}")

    batches = Batches(app, fail)
    rig = batches.declare(retry=retrying(2), breaker=None)
    keys = 5
    outcome = send(rig, range(16), keys=keys)
    waiting = [n for n in range(16) if any(c % keys == n % keys and c <= n for c in culprits)]
    assert (outcome.moved, outcome.parked) == ({0: 16}, len(waiting))
    assert batches.booked() == [n for n in range(16) if n not in waiting]
    rig.run_parked()
    assert sorted(batches.booked()) == [n for n in range(16) if n not in culprits]
    assert sorted(offset for (offset,) in batches.table("dead_letter", '"offset"')) == sorted(culprits)
    for key in range(keys):
        in_order = [n for n in batches.booked() if n % keys == key]
        assert in_order == sorted(in_order)


def test_halving_in_a_partition_that_waits(app: App) -> None:
    """ordering="partition": everything before the culprit counts, nothing behind it does."""

    def fail(batch: list[Item], tx: Tx) -> None:
        if any(message.payload.n == 5 for message in batch):
            raise ValueError("five")

    batches = Batches(app, fail)
    rig = batches.declare(ordering="partition", retry=retrying(2, pause=7))
    records = [record(rig, n, "k") for n in range(10)]
    outcome = rig.run(records)
    assert (outcome.moved, outcome.failed[0].retry_in) == ({0: 5}, 7)
    assert rig.run(records[5:]).moved == {0: 10}
    assert batches.booked() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert batches.table("dead_letter", '"offset", attempts') == [(5, 2)]


def test_a_waiting_message_knows_its_attempt_in_every_partition(app: App) -> None:
    """A batch is of several partitions, and each may begin with a message that is tried again in its place.

    Seen to fail with the counts read for the first message of the batch alone.
    """
    seen: list[tuple[int, int, int]] = []

    @app.handler(Topic("bench", Entry), name="book", ordering="partition", retry=retrying(5))
    def book(message: Message[Entry], tx: Tx) -> None:
        seen.append((message.partition, message.offset, message.attempt))
        if message.payload.n == 1 and message.attempt < 3:
            raise ValueError("not yet")

    rig = Rig(app)
    records = [rig.record(b'{"n": 1}', partition=partition, key=b"k") for partition in (0, 1)]
    for _ in range(2):
        assert set(rig.run(records).failed) == {0, 1}
    seen.clear()
    assert rig.run(records).moved == {0: 1, 1: 1}
    assert seen == [(0, 0, 3), (1, 0, 3)]
    assert column(app.database.engine, "SELECT count(*) FROM eo.attempt") == [0]


def test_a_record_that_means_nothing_does_not_die_before_the_failing_one_of_its_key(app: App) -> None:
    """Seen to fail without the question for `walk.fallen` in HandlerCalls._set_aside: the undecodable one was a dead
    letter that held its key, ahead of the failing one, whose lane then opened the key.
    """

    def first_of_c(batch: list[Item], tx: Tx) -> None:
        for index, message in enumerate(batch):
            if message.payload.n == 0:
                tx.fail(index, RetryLater(after=0))

    batches = Batches(app, first_of_c, skip={0})
    rig = batches.declare(after_dead="hold")
    rig.run([record(rig, 0, "c"), record(rig, 1, "d"), rig.record(b"{", key=b"c")])
    assert batches.table("parked_message", '"offset"') == [(0,), (2,)]
    assert batches.table("dead_letter", '"offset"') == []
    batches.fate = lambda batch, tx: None
    batches.skip.clear()
    rig.run_parked()
    assert batches.booked() == [1, 0]
    assert batches.table("dead_letter", '"offset", holds') == [(2, True)]
    assert column(app.database.engine, "SELECT held FROM eo.parked_key") == [True], "and now its key is held"
