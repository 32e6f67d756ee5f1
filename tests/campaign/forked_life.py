"""The life of one process of a cycle: it takes over, does whatever is left to do, and leaves. Killed anywhere in it.

All of it is the real code on a real PostgreSQL; only what the group and the broker would say comes from here.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from eoframework import clock, dead
from eoframework.consume.assembly import assemble, make_unit
from eoframework.consume.batch import Outcome
from eoframework.consume.ownership import Ownership
from eoframework.consume.rerun import Rerun
from eoframework.consume.start import GroupOffsets
from eoframework.db.external_admin import ExternalDesk
from eoframework.db.parking import Parking
from eoframework.db.position import Positions, Stream
from eoframework.db.reprocessing import Reprocessing
from eoframework.db.session import Database
from eoframework.db.unit_of_work import Timeouts, WorkerConnection
from eoframework.errors import FailClosed, Fenced, LostConnection, NotFound, Retryable
from eoframework.kafka import transaction
from eoframework.outbox_desk import OutboxDesk
from eoframework.prune import PruneWorker
from eoframework.relay import worker as relay_worker
from eoframework.relay.worker import RelayWorker
from eoframework.settings import Settings
from tests.campaign.forked_board import Board
from tests.campaign.forked_broker import FileAdmin, FileCheckpoints, FileProducer, LogFile
from tests.campaign.forked_case import TOPIC, WRITTEN, Case, decision
from tests.campaign.forked_world import OUTBOX, Booked, Shop, result_of

TOPIC_ID = uuid.UUID(int=4711)
CAREFUL_FOR = 3
_ROUNDS = 400
_WAITS = """
SELECT count(*) FROM eo.parked_message m JOIN eo.parked_key k USING (consumer_id, topic_id, partition, lane)
WHERE m.consumer_id = %s AND NOT k.held
"""
_TIME_PASSES = "UPDATE eo.parked_key SET due_at = now() WHERE consumer_id = %s AND NOT held"
_WRITTEN = text("INSERT INTO written VALUES (:n, :number) ON CONFLICT DO NOTHING RETURNING number")
# The ids of what was processed so far are eight days old, and 20 minutes after that the position was looked at.
_AGE = """
WITH aged AS (
    INSERT INTO eo.position_sample (consumer_id, topic_id, partition, at, reached)
    SELECT p.consumer_id, p.topic_id, p.partition, now() - interval '6 days 20 hours', p.next_offset FROM eo.position p
    WHERE p.consumer_id = :c AND NOT EXISTS (SELECT FROM eo.position_sample s WHERE s.consumer_id = :c)
    RETURNING consumer_id),
ids AS (UPDATE eo.processed_message SET processed_at = now() - interval '8 days' WHERE consumer_id = :c
    AND EXISTS (SELECT FROM aged))
UPDATE eo.consumer SET created_at = now() - interval '30 days' WHERE id = :c AND EXISTS (SELECT FROM aged)
"""


class GaveWay(Exception):
    """Somebody else owns a partition now: the group would tell this process so."""


class Group:
    """What a claim asks of Kafka: the topic is the one it was, nobody moved the group's offsets."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def ask_topic_id(self, topic: str) -> Callable[[], uuid.UUID]:
        return lambda: TOPIC_ID

    def group_offsets(self, group: str, topic: str) -> GroupOffsets:
        return {}

    def watermarks(self, topic: str, partition: int) -> tuple[int, int]:
        return 0, len(self._case.logs[partition])


class Life:
    """One process of the cycle."""

    def __init__(
        self, case: Case, name: str, board: Board, database: Database, settings: Settings, broker: LogFile
    ) -> None:
        self.case, self.board, self.database = case, board, database
        self.settings = settings.model_copy(update={"relay_after_dead": case.flow.relay_after_dead})
        self.shop = Shop(case, name, board, database, self.settings)
        self._connect_to(broker)

    def _connect_to(self, broker: LogFile) -> None:
        FileProducer.file = FileCheckpoints.file = broker
        FileProducer.healed = lambda _: self.shop.healed
        setattr(transaction, "BatchProducer", FileProducer)  # noqa: B010 - mypy
        setattr(relay_worker, "CheckpointLog", FileCheckpoints)  # noqa: B010 - mypy

    def run(self) -> None:
        """Everything that is left to do. Raises GaveWay, Retryable: the supervisor would start it again."""
        flow = self.case.flow
        self._begin()
        if flow.prunes and not self.board.count("aged"):
            self.consume({partition: self.case.half(partition) for partition in self.case.logs})
            self._sql(_AGE, c=self.stream.consumer_id)
            self.board.note("aged")
        self.consume(self._ends)
        if flow.reprocesses:
            self.reprocess()
        if flow.prunes:
            self.prune()
        self.write()
        if flow.relays:
            self.relay()
        if flow.operator:
            self.board.note("healed")
            # Again and again: what was held behind one that cannot be decoded may be another such.
            while self.decide():
                self.consume(self._ends)
                if flow.relays:
                    self.relay()
        self.ownership.release()

    # --- taking over ---

    def _begin(self) -> None:
        handler, app = self.shop.handler, self.shop.app
        positions = Positions(self.database.schema)
        frozen = any(kill.how == "freeze" for kill in self.case.kills)
        # A zombie's open transaction is in its successor's way for as long as it may idle.
        timeouts = Timeouts(10, 5, 0.3 if frozen else 4)
        self.connection = WorkerConnection(self.database, timeouts, handler=handler.group)
        starts = {p: self.case.half(p) if self.case.flow.reprocesses else 0 for p in self.case.logs}
        with self.connection.begin("register") as connection:
            number = positions.register(connection, name=handler.group, topic=TOPIC)
            self.stream = Stream(number, handler.group, TOPIC, TOPIC_ID, "cluster")
            positions.start(connection, self.stream, starts)
        self.ownership = Ownership(
            self.stream,
            positions,
            self.connection,
            Group(self.case),
            owner=str(uuid.uuid4()),
            mark=lambda claim: None,
            careful_for=CAREFUL_FOR,
        )
        self._executor, self._drain = assemble(handler, app, self.stream, self.connection, self.settings)
        self.ownership.assigned(self.case.logs)

    @property
    def _ends(self) -> dict[int, int]:
        return {partition: len(log) for partition, log in self.case.logs.items()}

    # --- consuming ---

    def consume(self, ends: dict[int, int]) -> None:
        """Until nothing is left before these offsets, and nothing waits but for a person."""
        for _ in range(_ROUNDS):
            self._claim_waiting()
            records = []
            for partition, claim in sorted(self.ownership.claims.items()):
                log = self.case.logs[partition][: ends[partition]]
                records += [sent.record() for sent in log[claim.next_offset :][: self.case.size]]
            if records:
                self._batch(records)
            self._drain.look_soon()
            self._apply(self._drain.run(self.ownership.claims, self.ownership.unclean(), seconds=5))
            if self._is_done(ends):
                return
        raise AssertionError(f"not done after {_ROUNDS} rounds: {self.ownership.claims}")

    def _claim_waiting(self) -> None:
        for partition in self.ownership.due():
            try:
                claim = self.ownership.claim_waiting(partition)
            except Retryable:
                clock.sleep(0.005)  # it stays due
                continue
            if claim is None:
                raise GaveWay(f"partition {partition} went to somebody else while we were in doubt")

    def _batch(self, records: list[Any]) -> None:
        touched = {record.partition for record in records}
        claims = {partition: self.ownership.claims[partition] for partition in touched}
        outcome = self._executor.execute(records, claims, self.ownership.careful() & touched)
        for partition, offset in outcome.moved.items():
            self.ownership.claims[partition] = self.ownership.claims[partition].moved(offset)
            self.ownership.survived(partition, sum(r.partition == partition and r.offset < offset for r in records))
        self._apply(outcome)

    def _apply(self, outcome: Outcome) -> None:
        if outcome.fenced:
            raise GaveWay(f"fenced on {outcome.fenced}")
        if isinstance(outcome.trouble, LostConnection):
            self.ownership.in_doubt()

    def _is_done(self, ends: dict[int, int]) -> bool:
        claims = self.ownership.claims
        if any(p not in claims or claims[p].next_offset < end for p, end in ends.items()):
            return False
        if not self.case.may_park:
            return True
        # On the worker's own connection, past its events: a second one would cost as much as all of its work.
        if (connection := self.connection._connection) is None:
            return False
        driver: Any = connection.connection.dbapi_connection
        with driver.cursor() as cursor:
            cursor.execute(_WAITS, [self.stream.consumer_id])
            waits = bool(cursor.fetchone()[0])
            if waits:
                cursor.execute(_TIME_PASSES, [self.stream.consumer_id])
        driver.commit()
        return not waits

    def reprocess(self) -> None:
        """What lies before the position at which the consumer began."""
        unit = make_unit(self.shop.handler, self.shop.app, self.stream, self.connection, self.settings)
        rerun = Rerun(
            unit,
            Parking(self.database.schema),
            Reprocessing(self.database),
            ask_topic=lambda: lambda: None,
            stop=threading.Event(),
            failure_text=True,
        )
        for partition, log in self.case.logs.items():
            before = [sent.record() for sent in log[: self.case.half(partition)]]
            for record in range(0, len(before), 2):
                rerun.run(before[record : record + 2])

    # --- the others ---

    def prune(self) -> None:
        pruner = PruneWorker(self.database, self.settings)
        pruner.start()
        for _ in range(_ROUNDS):
            pruner.step()
            if pruner.drained() and not self._old_ids():
                return
            clock.sleep(0.002)
        raise AssertionError("ids that are old enough are not forgotten")

    def _old_ids(self) -> int:
        old = "consumer_id = :c AND processed_at < now() - interval '7 days'"
        return int(self._sql(f"SELECT count(*) FROM eo.processed_message WHERE {old}", c=self.stream.consumer_id)[0][0])

    def write(self) -> None:
        """The application's own transactions: each writes a row, and publishes two messages."""
        name = self.shop.app.name
        for number in range(self.case.flow.writes):
            with Session(self.database.engine) as session, session.begin():
                if session.execute(_WRITTEN, {"n": name, "number": number}).first() is not None:
                    for offset in (2 * number, 2 * number + 1):
                        self.shop.app.publish(session, OUTBOX, Booked(p=WRITTEN, o=offset), key="a")

    def relay(self) -> None:
        if any(sent.fails == "late" for sent in self.case.sent.values()):
            # Only who owns the shard is to make them due: whoever else asks whether all is sent would do so, too.
            clock.sleep(0.005)
        worker = RelayWorker(self.database, self.settings, admin=FileAdmin())  # type: ignore[arg-type]
        worker.start()
        try:
            for _ in range(5000):
                worker.step()
                if not self._sql("SELECT FROM eo.delayed_message LIMIT 1") and worker.drained():
                    return
                clock.sleep(0.002)
            raise AssertionError("the outbox is not drained")
        finally:
            worker.close()

    def decide(self) -> bool:
        """An operator: even offsets run again, what cannot is given up. Whether there was anything to decide."""
        app, found = self.shop.app, False
        if self.case.flow.external is not None:
            found = self._find_out()
        if not self.case.flow.relays:
            letters = dead.letters(self.database, dead.DeadFilter(handler=self.shop.handler.group)).items
            for letter in letters:
                sent = self.case.sent[letter.record.partition, letter.record.offset]
                with suppress(NotFound):  # somebody was faster
                    if decision(self.case, sent) == "replay":
                        dead.replay(app, [letter.id], actor="campaign")
                    else:
                        dead.discard(self.database, [letter.id], actor="campaign")
            return found or bool(letters)
        desk = OutboxDesk(self.database, self.settings, admin=FileAdmin(), actor="campaign")  # type: ignore[arg-type]
        lines = desk.lines("dead").items
        for line in lines:
            with suppress(NotFound):
                booked = Booked.model_validate_json(desk.find(line.number).payload or b"")
                if booked.o % 2 == 0:
                    desk.retry(line.number)
                else:
                    desk.discard(line.number)
        return found or bool(lines)

    def _find_out(self) -> bool:
        """About calls of which nobody knows whether they were made, the operator asks who was called."""
        desk = ExternalDesk(self.database, actor="campaign")
        lines = desk.lines(consumer=self.shop.handler.group)
        for line in lines:
            place = line.partition, line.offset
            made = any(fact.startswith(f"call {place[0]} {place[1]} ") for fact in self.board.lines())
            with suppress(FailClosed):  # somebody was faster
                if made:
                    desk.resolve(line.id, result_of(place))
                else:
                    desk.not_done(line.id)
        return bool(lines)

    def _sql(self, statement: str, **values: object) -> list[tuple[Any, ...]]:
        with self.database.engine.begin() as connection:
            for one in statement.split(";"):
                result = connection.execute(text(one), values)
            return [tuple(row) for row in result] if result.returns_rows else []


RESTARTED = (GaveWay, Retryable, Fenced)
"""How a process may end that its supervisor starts again."""
