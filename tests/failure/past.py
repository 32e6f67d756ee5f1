"""A handler with a past: messages it has processed, messages its position was moved past, and Reprocess on both."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, Message, Topic, Tx, events
from eoframework.consume.rerun import Tally
from eoframework.db.position_admin import PositionAdmin
from eoframework.db.session import Database
from eoframework.kafka.admin import Admin
from eoframework.reprocess import Bound, Plan, Reprocess
from eoframework.settings import Settings
from tests.consume.harness import column, make_app, make_ledger, run_once, scalar
from tests.processes import Sending, produce

INSERT = text('INSERT INTO ledger (partition, "offset", note) VALUES (:p, :o, :n)')
KEYS = 3


class Entry(BaseModel):
    n: int


@dataclass
class Past:
    """One topic, one handler that books each message and publishes it on; `poison` fails."""

    settings: Settings
    database: Database
    topic: str
    options: dict[str, Any] = field(default_factory=dict)
    batch: bool = False
    poison: set[int] = field(default_factory=set)
    ids: bool = True
    charges: bool = False
    """Books the result of the external call "charge"."""
    app: App = field(init=False)
    sent: int = 0

    def __post_init__(self) -> None:
        make_ledger(self.database.engine)
        self.app = self.declare(make_app(self.settings, self.database))

    def declare(self, app: App) -> App:
        entries, booked = Topic(self.topic, Entry), Topic("booked", Entry)

        def book(message: Message[Entry], tx: Tx) -> None:
            n = message.payload.n
            note = tx.external("charge") if self.charges else n
            tx.session.execute(INSERT, {"p": message.partition, "o": message.offset, "n": str(note)})
            tx.publish(booked, Entry(n=n), cause=message)
            if n in self.poison:
                raise ValueError(f"poison {n}")

        if self.batch:

            @app.batch_handler(entries, name="book", **self.options)
            def book_all(batch: list[Message[Entry]], tx: Tx) -> None:
                for message in batch:
                    book(message, tx)

        else:
            app.handler(entries, name="book", **self.options)(book)
        return app

    def send(self, count: int, *, ids: bool | None = None, partition: int = 0) -> None:
        numbers = range(self.sent, self.sent + count)
        self.sent += count
        sendings: list[Sending] = [self.sending(n, ids=self.ids if ids is None else ids) for n in numbers]
        produce(self.settings.require_bootstrap_servers(), self.topic, sendings, partition=partition)

    def sending(self, n: int, *, ids: bool = True) -> Sending:
        headers = [("message-id", str(uuid.uuid5(uuid.NAMESPACE_OID, str(n))).encode())] if ids else []
        return b"k%d" % (n % KEYS), b'{"n": %d}' % n, headers

    def live(self) -> None:
        """The group processes what there is."""
        assert run_once(self.app) == 0

    def move(self, offset: int, partition: int = 0) -> None:
        desk = PositionAdmin(self.database)
        desk.move(next(line for line in desk.lines(self.group) if line.partition == partition), offset)

    @property
    def group(self) -> str:
        return self.app.handlers[0].group

    @property
    def job(self) -> Reprocess:
        return Reprocess(self.app, self.app.handlers[0], Admin(self.settings))

    def plan(self, start: Bound = "earliest", end: Bound | None = None, *, partitions: Sequence[int] = ()) -> Plan:
        return self.job.plan(start, end, partitions=partitions)

    def again(self, start: Bound = "earliest", end: Bound | None = None, **options: Any) -> Tally:
        partitions = (0,) if isinstance(start, int) or isinstance(end, int) else ()
        return self.job.run(self.plan(start, end, partitions=partitions), **options)

    def repeat(self, start: Bound = "earliest", end: Bound | None = None) -> Tally:
        plan = self.plan(start, end, partitions=(0,))
        return self.job.run(plan, forget=True, confirmed=plan.counts.repeated)

    def booked(self) -> list[int]:
        return column(self.database.engine, "SELECT note::int FROM ledger ORDER BY id")

    def count(self, what: str) -> int:
        return int(scalar(self.database.engine, f"SELECT count(*) FROM {what}"))

    def run(self, statement: str, **values: object) -> None:
        with self.database.begin("test") as connection:
            connection.execute(text(statement), values)

    def stand(self) -> list[tuple[Any, ...]]:
        """Everything a group's members would notice."""
        with self.database.engine.connect() as connection:
            rows = connection.execute(text("SELECT partition, next_offset, epoch, owner FROM eo.position ORDER BY 1"))
            positions = [tuple(row) for row in rows]
        return [*positions, *sorted(Admin(self.settings).group_offsets(self.group, self.topic).items())]


@contextmanager
def listening(name: str, act: Callable[[], None]) -> Iterator[None]:
    """Do something whenever the boundary is passed."""
    unsubscribe = events.subscribe(lambda event, _: act() if event == name else None)
    try:
        yield
    finally:
        unsubscribe()
