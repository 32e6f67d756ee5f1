"""What runs the messages of one handler, put together from its parts."""

from __future__ import annotations

import socket
from collections.abc import Callable
from uuid import uuid4

from eoframework.app import App
from eoframework.consume.calls import HandlerCalls
from eoframework.consume.drain import Drain
from eoframework.consume.executor import Executor
from eoframework.consume.external import ExternalCalls
from eoframework.consume.failure import Failures, FailureStores
from eoframework.consume.unit import Stores, Unit
from eoframework.db.attempts import Attempts
from eoframework.db.dead_letters import DeadLetters
from eoframework.db.outbox import Outbox
from eoframework.db.parking import Parking
from eoframework.db.position import Positions, Stream
from eoframework.db.processed import ProcessedMessages
from eoframework.db.unit_of_work import WorkerConnection
from eoframework.handlers import Handler
from eoframework.settings import Settings


def make_unit(handler: Handler, app: App, stream: Stream, connection: WorkerConnection, settings: Settings) -> Unit:
    """What all units of work of the handler have in common, for one thread."""
    schema = app.database.schema
    processed = ProcessedMessages(schema)
    stores = FailureStores(Parking(schema), DeadLetters(schema), Attempts(schema), processed)
    failures = Failures(handler, stream, stores, text=settings.failure_text)
    calls = HandlerCalls(handler, stream, connection, app.session_factory, app_name=app.name, shuts=failures.shuts)
    external = ExternalCalls(handler, app.database, stream, owner=f"{socket.gethostname()}:{uuid4()}")
    tables = Stores(Positions(schema), processed, Outbox(schema))
    return Unit(handler, stream, tables, connection, calls, failures, external)


def assemble(
    handler: Handler,
    app: App,
    stream: Stream,
    connection: WorkerConnection,
    settings: Settings,
    *,
    stopping: Callable[[], bool] = lambda: False,
    before_commit: Callable[[], None] = lambda: None,
) -> tuple[Executor, Drain]:
    """What runs fresh batches, and what runs those messages that had to wait."""
    unit = make_unit(handler, app, stream, connection, settings)
    executor = Executor(
        unit,
        Attempts(app.database.schema),
        # The batch ends early rather than letting the group think this member is dead.
        budget=settings.max_poll_interval / 3,
        stopping=stopping,
        before_commit=before_commit,
    )
    return executor, Drain(unit, Parking(app.database.schema))
