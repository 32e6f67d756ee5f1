"""Protections taken away, each in one place and by hand: what the checker must see, or it is no checker.

Each is applied in the forked process only, before its life begins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from eoframework import events, prune
from eoframework.checkpoint import Checkpoint
from eoframework.consume.drain import Drain
from eoframework.consume.executor import Executor
from eoframework.db import coverage, retention
from eoframework.db.attempts import Attempts
from eoframework.db.coverage import Covered
from eoframework.db.dead_letters import Dead, DeadLetters
from eoframework.db.external_calls import ExternalCallRows, Standing
from eoframework.db.outbox import Outbox
from eoframework.db.parking import Parking
from eoframework.db.pending import PendingRows
from eoframework.db.position import Claim, Positions, Stream
from eoframework.db.processed import ProcessedMessages
from eoframework.db.session import Connection, Database
from eoframework.message import OutboxMessage
from eoframework.relay import recovery

Without = Callable[[], None]


def _later(write: Callable[[Connection], object], connection: Connection) -> None:
    """Do it in a transaction of its own, once the one at hand is committed."""

    def on_event(name: str, fields: dict[str, object]) -> None:
        if name == "db.committed":
            stop()
            with connection.engine.begin() as other:
                write(other)

    stop = events.subscribe(on_event)


def without_processed_ids() -> None:
    """Every id is new."""

    def claim(self: Any, connection: Connection, consumer_id: int, ids: Collection[UUID]) -> set[UUID]:
        return set(ids)

    ProcessedMessages.claim = claim  # type: ignore[method-assign]


def without_fence() -> None:
    """Whoever held the partition moves it on, whatever its row says now."""

    def advance(
        self: Any, connection: Connection, stream: Stream, claims: Iterable[Claim], to: Mapping[int, int]
    ) -> set[int]:
        self.cut(connection, stream, dict(to))
        return set()

    Positions.advance = advance  # type: ignore[method-assign]


def with_the_position_in_a_second_transaction() -> None:
    """The position follows the effects, as an offset that is committed afterwards does."""
    real = Positions.advance

    def advance(
        self: Any, connection: Connection, stream: Stream, claims: Iterable[Claim], to: Mapping[int, int]
    ) -> set[int]:
        held = list(claims)
        _later(lambda other: real(self, other, stream, held, to), connection)
        return set()

    Positions.advance = advance  # type: ignore[method-assign]


def with_the_position_first() -> None:
    """The position is moved before the effects are there, as with auto-commit."""
    real = Positions.advance

    def advance(
        self: Any, connection: Connection, stream: Stream, claims: Iterable[Claim], to: Mapping[int, int]
    ) -> set[int]:
        with connection.engine.begin() as other:
            return real(self, other, stream, claims, to)

    Positions.advance = advance  # type: ignore[method-assign]


def without_forgetting() -> None:
    """What is set aside keeps its id."""
    ProcessedMessages.forget = lambda *_: None  # type: ignore[method-assign]


def with_dead_letters_in_a_second_transaction() -> None:
    real = DeadLetters.bury

    def bury(self: Any, connection: Connection, stream: Stream, dead: Dead) -> int:
        _later(lambda other: real(self, other, stream, dead), connection)
        return 0

    DeadLetters.bury = bury  # type: ignore[method-assign]


def with_the_outbox_in_a_second_transaction() -> None:
    real = Outbox.insert

    def insert(self: Any, connection: Connection, messages: Sequence[OutboxMessage]) -> None:
        if messages:
            _later(lambda other: real(self, other, messages), connection)

    Outbox.insert = insert  # type: ignore[method-assign]


def with_parking_in_a_second_transaction() -> None:
    real = Parking.park

    def park(self: Any, connection: Connection, stream: Stream, waiting: Sequence[Any]) -> None:
        if waiting:
            _later(lambda other: real(self, other, stream, waiting), connection)

    Parking.park = park  # type: ignore[method-assign]


def with_the_parked_row_deleted_first() -> None:
    """The parked message is taken out of its lane before it has run."""
    real = Drain._work

    def work(self: Any, connection: Connection, parked: Any, delivery: Any) -> Any:
        with connection.engine.begin() as other:
            table = 'DELETE FROM eo.parked_message WHERE consumer_id = %(c)s AND partition = %(p)s AND "offset" = %(o)s'
            place = {"c": self._unit.stream.consumer_id, "p": parked.record.partition, "o": parked.record.offset}
            other.exec_driver_sql(table, place)
        return real(self, connection, parked, delivery)

    Drain._work = work  # type: ignore[method-assign]
    Parking._one = lambda *_: None  # type: ignore[method-assign]


def without_the_lanes() -> None:
    """Nothing waits behind what waits."""
    Parking.shut = lambda *_: set()  # type: ignore[method-assign]


def without_charges() -> None:
    """A message that ends its process is not counted."""
    Attempts.charge = lambda *_: (0, 1)  # type: ignore[method-assign]
    Parking.charge = lambda *_: None  # type: ignore[method-assign]


def without_clearing_attempts() -> None:
    Executor._forget_attempts = lambda *_: None  # type: ignore[method-assign]


def without_asking_about_calls() -> None:
    """A call that was begun by somebody who died is made again."""
    real = ExternalCallRows.claim

    def claim(self: Any, connection: Connection, call: Any, **options: Any) -> Standing:
        return real(self, connection, call, **{**options, "again": True})

    ExternalCallRows.claim = claim  # type: ignore[method-assign]


def with_coverage_after_forgetting() -> None:
    """Ids are forgotten first, and said to be forgotten afterwards."""
    real_raise, real_forget = coverage.raise_coverage, retention.forget_processed
    kept: list[Any] = []

    def not_yet(database: Database, **options: Any) -> Covered | None:
        with database.engine.begin() as connection:
            before = connection.exec_driver_sql("SELECT now() - interval '7 days'").scalar_one()
        kept.append(lambda: real_raise(database, **options))
        return Covered(before, 0)

    def forget(database: Database, **options: Any) -> int | None:
        deleted = real_forget(database, **options)
        events.emit("without.coverage")
        kept.pop()()
        return deleted

    prune.raise_coverage = not_yet  # type: ignore[attr-defined]
    prune.forget_processed = forget  # type: ignore[attr-defined]


def with_replay_in_two_transactions() -> None:
    """The letter is deleted, and then put into its lane."""
    real = Parking.put_back

    def put_back(self: Any, connection: Connection, stream: Stream, waiting: Any) -> None:
        def on_event(name: str, fields: dict[str, object]) -> None:
            if name == "replay.moved":
                stop()
                with connection.engine.begin() as other:
                    real(self, other, stream, waiting)

        stop = events.subscribe(on_event)

    Parking.put_back = put_back  # type: ignore[method-assign]


def without_the_checkpoint() -> None:
    """After a crash the relay believes that nothing of its last batch was published."""

    def forget(claim: Any, rows: PendingRows, last: Checkpoint, *_: object) -> None:
        """The rows stay; as if the transaction had been aborted."""
        with rows._shards.writing("counting") as connection:
            rows._count_batch(connection, claim, last.batch_no - 1, last.batch_no)

    recovery._finish = forget


def with_rows_deleted_before_the_commit() -> None:
    """The relay deletes what it is about to publish."""
    lock = threading.Lock()
    real = PendingRows.remove

    def on_event(name: str, fields: dict[str, object]) -> None:
        if name == "relay.produced":
            with lock:
                last[0]()

    last: list[Callable[[], None]] = [lambda: None]
    select = PendingRows.select

    def selected(self: Any, claim: Any, **options: Any) -> Any:
        found = select(self, claim, **options)

        def delete() -> None:
            with self._shards.writing("deleting too early") as connection:
                self._delete(connection, claim, [row.seq for row in found.rows])

        last[0] = delete
        return found

    def count(self: Any, claim: Any, rows: Any, **numbers: int) -> None:
        real(self, claim, [], **numbers)

    PendingRows.select, PendingRows.remove = selected, count  # type: ignore[method-assign]
    events.subscribe(on_event)


CASES: dict[str, tuple[Without, str]] = {
    # What is taken away, and a case in which that shows.
    "processed ids": (without_processed_ids, "consume/0/"),
    "fence": (without_fence, "consume/0/db.committed!:4"),
    "position in a second transaction": (with_the_position_in_a_second_transaction, "consume/0/db.committed:4"),
    "position first": (with_the_position_first, "consume/0/consume.handled:1"),
    "forgetting": (without_forgetting, "failure/0/"),
    "dead letter in a second transaction": (with_dead_letters_in_a_second_transaction, "failure/0/db.committed:10"),
    "outbox in a second transaction": (with_the_outbox_in_a_second_transaction, "consume/0/db.committed:4"),
    "parking in a second transaction": (with_parking_in_a_second_transaction, "failure/0/db.committed:5"),
    "parked row deleted first": (with_the_parked_row_deleted_first, "failure/0/consume.due:1"),
    "lanes": (without_the_lanes, "waiting/0/"),
    "charges": (without_charges, "deadly/0/"),
    "clearing attempts": (without_clearing_attempts, "deadly/0/"),
    "asking about calls": (without_asking_about_calls, "external-ask/0/external.called:1"),
    "coverage after forgetting": (with_coverage_after_forgetting, "prune/0/without.coverage:1"),
    "replay in two transactions": (with_replay_in_two_transactions, "replay/0/replay.moved:1"),
    "checkpoint": (without_the_checkpoint, "relay/0/kafka.transaction.committed:1"),
    "rows deleted before the commit": (with_rows_deleted_before_the_commit, "relay/0/"),
}
