"""One handler, or transform, under test: its real executor on the test's database, fed with records made here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid5

from sqlalchemy.orm import sessionmaker

from eoframework import clock, events, trial
from eoframework.app import App
from eoframework.cloudevents import outgoing_headers
from eoframework.consume.assembly import make_unit
from eoframework.consume.drain import Drain
from eoframework.consume.executor import Executor
from eoframework.db.attempts import Attempts
from eoframework.db.dead_letter_desk import DeadFilter
from eoframework.db.lane_desk import LaneDesk, ParkedLane
from eoframework.db.parking import Parking
from eoframework.db.position import Positions, Stream
from eoframework.db.session import Database
from eoframework.db.unit_of_work import Timeouts, WorkerConnection
from eoframework.errors import HandlerFailed
from eoframework.handlers import Handler
from eoframework.kafka.producer import Outgoing
from eoframework.message import OutboxMessage, Record
from eoframework.transform.outputs import Outputs
from eoframework.transforms import Transform

_TOPICS = UUID("5f1cbd0e-8f0f-5ea5-9d9c-0e0f00000002")
_CLUSTER = "eo-test"
# Short: who waits here waits for what the test itself has left open.
_TIMEOUTS = {"statement_timeout": 10.0, "lock_timeout": 5.0, "idle_in_transaction_timeout": 4.0}
_TROUBLES = 3
_SECONDS = 30.0
_EVERY_ROW = 10_000


def bound(app: App, database: Database) -> App:
    """The app on the test's database: its own handlers, its own kind of Session, another engine.

    A copy, since the app is a global of the program under test, and may be used on its own engine in the next test.
    """
    other = copy.copy(app)
    other._settings = app.settings.model_copy(update=_TIMEOUTS)
    other._database = database
    # Its own factory makes its own class of Session; where it connects to is the worker's to say anyway.
    other._session_factory = app._session_factory or sessionmaker(database.engine)
    other._producer = None
    return other


def record_of(message: OutboxMessage, *, offset: int) -> Record:
    """The record that Kafka would hand out for it."""
    headers = outgoing_headers(
        id=message.id,
        source=message.source,
        type=message.type,
        time=clock.now(),
        content_type=message.content_type,
        headers=message.headers,
        traceparent=message.traceparent,
    )
    value = tuple((name, part.encode() if isinstance(part, str) else part) for name, part in headers)
    now = int(clock.now().timestamp() * 1000)
    return Record(message.topic, 0, offset, message.key, message.payload, value, now)


class HandlerBench:
    """One handler. Its messages come from one partition, and no retry is waited for."""

    def __init__(self, handler: Handler, app: App) -> None:
        """app: as `bound` returns it."""
        self.handler = handler
        self._app = app
        settings, database = app.settings, app.database
        timeouts = Timeouts(settings.statement_timeout, settings.lock_timeout, settings.idle_in_transaction_timeout)
        self._connection = WorkerConnection(database, timeouts, handler=handler.group)
        self._parking = Parking(database.schema)
        positions = Positions(database.schema)
        topic = handler.topic.name
        with self._connection.begin("registering the handler under test") as connection:
            number = positions.register(connection, name=handler.group, topic=topic)
            self.stream = Stream(number, handler.group, topic, uuid5(_TOPICS, topic), _CLUSTER)
            positions.start(connection, self.stream, {0: 0})
            self._claim = positions.claim(connection, self.stream, 0, owner="test")
        self._unit = make_unit(handler, app, self.stream, self._connection, settings)
        self._executor = Executor(self._unit, Attempts(database.schema), budget=_SECONDS)
        self._drain = Drain(self._unit, self._parking)

    @property
    def next_offset(self) -> int:
        """Of the next record."""
        return self._claim.next_offset

    def close(self) -> None:
        """Give the connection back."""
        self._connection.discard()

    def attempt(self, record: Record) -> trial.Trial:
        """Call the handler and roll back, as a crash before COMMIT would; what it would have changed."""
        return trial.run(self._app, self.handler, self.stream, record, rows=_EVERY_ROW)

    def process(self, record: Record) -> Processing:
        """Process it as a worker does, with all its retries at once, until it is done, dead, or waits for a person."""
        processing = Processing()
        forget = events.subscribe(processing.on_event)
        try:
            self._fresh(record, processing)
            lane = self._waiting(record)
            while lane is not None and not lane.held:
                self._hurry(lane)
                lane = self._waiting(record)
            processing.waits = lane is not None
        finally:
            forget()
        return processing

    def _fresh(self, record: Record, processing: Processing) -> None:
        troubles = 0
        while True:
            outcome = self._executor.execute([record], {0: self._claim})
            if 0 in outcome.moved:
                self._claim = self._claim.moved(outcome.moved[0])
                processing.ran, processing.duplicate = outcome.messages > 0, outcome.duplicates > 0
                return
            stopped = outcome.failed.get(0)
            if stopped is not None and stopped.retry_in is None:
                raise HandlerFailed(f"{self.handler.group} failed, and stops there: {stopped.error}") from stopped.error
            troubles += outcome.trouble is not None
            if outcome.trouble is not None and troubles == _TROUBLES:
                raise outcome.trouble
            if outcome.fenced:
                raise HandlerFailed(f"{self.handler.group}: its position was moved by something else in this test.")

    def _waiting(self, record: Record) -> ParkedLane | None:
        """The lane in which the message, or one before it, still waits."""
        mine = self._unit.unread(record).lane
        lanes = LaneDesk(self._app.database).lanes(DeadFilter(handler=self.handler.group), after=None, limit=1000)
        found = [
            lane for lane in lanes if (lane.partition, lane.lane) == mine and lane.topic_id == self.stream.topic_id
        ]
        waits = [lane for lane in found if lane.offset is not None and lane.offset <= record.offset]
        return waits[0] if waits else None

    def _hurry(self, lane: ParkedLane) -> None:
        with self._connection.begin("not waiting for the next attempt") as connection:
            self._parking.postpone(connection, self.stream, (0, lane.lane), -1.0)
        self._drain.look_soon()
        outcome = self._drain.run({0: self._claim}, (), seconds=_SECONDS)
        if outcome.trouble is not None:
            raise outcome.trouble


class Processing:
    """How a message was processed."""

    def __init__(self) -> None:
        self.ran = self.duplicate = self.waits = False
        self.failures: list[Exception] = []
        """Of its attempts that were followed by another."""
        self.letter: int | None = None
        """The number of its dead letter."""

    def on_event(self, name: str, fields: dict[str, Any]) -> None:
        if name == "consume.failed":
            self.failures.append(fields["error"])
        elif name == "consume.dead_lettered":
            self.letter = fields["id"]

    @property
    def done(self) -> bool:
        """Its effects are there."""
        return not self.duplicate and not self.waits and self.letter is None


class TransformBench:
    """One transform. What it sends is looked at instead of being sent."""

    def __init__(self, transform: Transform, app: App) -> None:
        self.transform = transform
        topic = transform.topic.name
        stream = Stream(0, transform.group, topic, uuid5(_TOPICS, topic), _CLUSTER)
        self._outputs = Outputs(transform, stream, source=app.name)
        self._call: Callable[[Any], Any] = transform.function
        self.next_offset = 0

    def run(self, record: Record) -> list[Outgoing]:
        """What it sends for the record; raises what the function raises."""
        transform = self.transform
        message = transform.topic.decode(record)
        given = message if transform.takes_messages else message.payload
        returned = transform.call_batch([given])[0] if transform.batch else self._call(given)
        return self._outputs.of(record, returned)

    def decoded(self, sent: Outgoing) -> Any:
        """The payload of something sent."""
        target = next(one for one in self.transform.targets if one.name == sent.topic)
        return target.decode_payload(Record(sent.topic, 0, 0, sent.key, sent.value, (), -1))
