"""One message and its external calls on a real database: the step before the unit of work, and the unit itself."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, External, ExternalCall, Message, Topic, Tx
from eoframework.consume.external import ExternalCalls
from eoframework.db.position import Positions, Stream
from eoframework.db.processed import ProcessedMessages
from eoframework.db.session import Database
from eoframework.db.unit_of_work import Timeouts, WorkerConnection, handler_session
from eoframework.external import Results
from eoframework.handlers import Handler
from eoframework.message import Record, Source

TOPIC_ID = uuid.UUID(int=7)


class Order(BaseModel):
    order_id: int


orders = Topic("orders", Order, id="order_id")
Function = Callable[[Message[Order], ExternalCall], object]


def handler_with(*external: External) -> Handler:
    app = App("shop")

    @app.handler(orders, external=external)
    def pay(order: Order, tx: Tx) -> None: ...

    return app.handlers[0]


def order(number: int = 1, *, offset: int = 0) -> Message[Any]:
    value = b'{"order_id": %d}' % number
    return orders.decode(Record("orders", 0, offset, None, value, (), 0))


@dataclass
class Step:
    """An ExternalCalls of one worker, and the transaction that follows it."""

    database: Database
    handler: Handler
    owner: str = "one"

    def __post_init__(self) -> None:
        self.stream = register(self.database, self.handler)
        self.calls = ExternalCalls(self.handler, self.database, self.stream, owner=self.owner)

    def prepare(self, message: Message[Any] | None = None) -> Results:
        return self.calls.prepare(message or order())

    def commit(self, message: Message[Any] | None = None) -> None:
        """The message's unit of work, as far as external calls are concerned."""
        message = message or order()
        with self.database.begin("test") as connection:
            assert message.id is not None
            ProcessedMessages(self.database.schema).claim(connection, self.stream.consumer_id, {message.id})
            self.calls.settle(connection, message)


def register(database: Database, handler: Handler) -> Stream:
    with database.begin("test") as connection:
        number = Positions(database.schema).register(connection, name=handler.group, topic=handler.topic.name)
    return Stream(number, handler.group, handler.topic.name, TOPIC_ID, "cluster")


def run_handler(database: Database, step: Step, message: Message[Any]) -> None:
    """Prepare, then the handler in its unit of work, as the executor does."""
    results = step.prepare(message)
    connection = WorkerConnection(database, Timeouts(10, 5, 4), handler=step.handler.group)
    factory = App("other", engine=database.engine).session_factory
    with connection.begin("unit") as open_, handler_session(factory, open_, handler=step.handler.group) as session:
        tx = Tx(session, app_name="shop", consumer=step.handler.group)
        source = Source(step.handler.group, TOPIC_ID, message.partition, message.offset, 0)
        tx.enter(message, source, results)
        step.handler.call(message, tx)
        step.calls.settle(open_, message)
    connection.discard()


def row(database: Database) -> Any:
    """The only row of external_call."""
    with database.engine.connect() as connection:
        return connection.execute(text("SELECT *, result::text AS json FROM eo.external_call")).one()


def end_lease(database: Database) -> None:
    """As if the time had passed."""
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE eo.external_call SET lease_until = clock_timestamp() - interval '1 second'"))
