"""Consume workers inside the test process: real broker, real database, real threads."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, text

from eoframework import App, lifecycle
from eoframework.consume.worker import ConsumeWorker
from eoframework.db.session import Database
from eoframework.handlers import Handler
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from tests.processes import eventually

LEDGER = """
CREATE TABLE ledger (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, partition int, "offset" bigint, note text)
"""


class Run:
    """Workers of one app, running in the background until the block ends."""

    def __init__(self, workers: list[ConsumeWorker], stop: threading.Event, *, once: bool) -> None:
        self.stop = stop
        self.exit_code: int | None = None
        self._thread = threading.Thread(target=self._run, args=(workers, once))
        self._thread.start()

    def _run(self, workers: list[ConsumeWorker], once: bool) -> None:
        self.exit_code = lifecycle.run(workers, stop=self.stop, once=once)

    def wait(self, seconds: float = 60) -> int:
        """The exit code, once every worker has ended by itself."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"still running after {seconds} s"
        assert self.exit_code is not None
        return self.exit_code

    def end(self) -> int:
        self.stop.set()
        return self.wait()


def make_app(settings: Settings, database: Database, name: str | None = None) -> App:
    """An App on this test's database; its consumer groups are nobody else's unless it is named."""
    return App(name or f"app-{uuid.uuid4().hex[:8]}", engine=database.engine, settings=settings)


def worker_of(app: App, handler: Handler | None = None, **options: Any) -> ConsumeWorker:
    """The worker of the app's only handler, or of the one given."""
    settings = app.settings
    return ConsumeWorker(handler or app.handlers[0], app=app, settings=settings, admin=Admin(settings), **options)


@contextmanager
def running(app: App, *, once: bool = False, **options: Any) -> Iterator[Run]:
    """A worker for each handler of the app."""
    stop = threading.Event()
    workers = [worker_of(app, handler, stop=stop, once=once, **options) for handler in app.handlers]
    run = Run(workers, stop, once=once)
    try:
        yield run
    finally:
        run.end()


def run_once(app: App, **options: Any) -> int:
    """Process what is there and return the exit code."""
    with running(app, once=True, **options) as run:
        return run.wait()


def scalar(engine: Engine, statement: str, **values: object) -> Any:
    with engine.connect() as connection:
        return connection.scalar(text(statement), values)


def column(engine: Engine, statement: str, **values: object) -> list[Any]:
    with engine.connect() as connection:
        return [row[0] for row in connection.execute(text(statement), values)]


def make_ledger(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text(LEDGER))


def rows_reach(engine: Engine, count: int, table: str = "ledger", seconds: float = 90) -> None:
    """Wait for the table to hold `count` rows."""
    eventually(
        lambda: scalar(engine, f"SELECT count(*) FROM {table}") >= count, f"{count} rows in {table}", seconds=seconds
    )


def next_offsets(database: Database) -> list[tuple[int, int]]:
    """(partition, next_offset) of every position row."""
    with database.engine.connect() as connection:
        rows = connection.execute(text("SELECT partition, next_offset FROM eo.position ORDER BY partition"))
        return [(row[0], row[1]) for row in rows]
