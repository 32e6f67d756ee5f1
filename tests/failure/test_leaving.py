"""Whoever leaves in order takes back what was charged before a message ran: nobody died of it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from confluent_kafka import Producer
from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, Message, Topic, Tx, events, lifecycle
from eoframework.db.session import Database
from eoframework.settings import Settings
from tests.consume.harness import column, make_app, worker_of
from tests.failure.workbench import NEVER, retrying


class Entry(BaseModel):
    n: int


class Desk:
    """One handler on one partition, whose worker is told to stop while it handles its message."""

    def __init__(self, settings: Settings, database: Database, topic: str) -> None:
        self._settings, self._database, self._topic = settings, database, topic
        self._name = f"app{uuid.uuid4().hex[:8]}"
        self._stop = threading.Event()
        self.handle: Callable[[Tx], None] = lambda _: None
        self.charged: list[int] = []
        """The offsets of what was charged in the last run."""

    def run(self, *, until_all_is_done: bool = False) -> None:
        self._stop = threading.Event()
        worker = worker_of(self._app(), stop=self._stop, once=until_all_is_done)
        self.charged.clear()
        assert lifecycle.run([worker], stop=self._stop, once=until_all_is_done) == 0

    def _app(self) -> App:
        app = make_app(self._settings, self._database, self._name)

        @app.handler(Topic(self._topic, Entry), name="book", retry=retrying(pause=NEVER))
        def book(_message: Message[Entry], tx: Tx) -> None:
            self.handle(tx)

        return app

    def stopped_in_vain(self, tx: Tx) -> None:
        """The attempt is rolled back, and nobody makes another before the worker leaves."""
        self._stop.set()
        tx.session.execute(text("SET LOCAL statement_timeout = 10"))
        tx.session.execute(text("SELECT pg_sleep(1)"))

    def failed(self, _tx: Tx) -> None:
        self._stop.set()
        raise ValueError("parks it")

    def send(self, n: int) -> None:
        producer = Producer({"bootstrap.servers": self._settings.require_bootstrap_servers()})
        producer.produce(self._topic, value=b'{"n": %d}' % n, partition=0)
        assert producer.flush(30) == 0

    def die_twice(self) -> None:
        """As if two owners in a row had been killed at the same offset."""
        self.execute("UPDATE eo.position SET owner = 'dead', claimed_at = now(), unclean_at = next_offset")

    def execute(self, statement: str) -> None:
        with self._database.engine.begin() as connection:
            connection.execute(text(statement))

    def column(self, statement: str) -> list[object]:
        return column(self._database.engine, statement)


@pytest.fixture
def desk(settings: Settings, database: Database, topic_name: str) -> Iterator[Desk]:
    made = Desk(settings, database, topic_name)

    def heard(name: str, fields: Mapping[str, Any]) -> None:
        if name == "consume.charged":
            made.charged.append(fields["record"].offset)

    forget = events.subscribe(heard)
    yield made
    forget()


def test_the_charge_of_a_message_that_harmed_nobody_is_taken_back(desk: Desk) -> None:
    """Seen to fail without Executor.take_back: its successor, which need not be careful, left it there for ever."""
    desk.run(until_all_is_done=True)
    desk.send(1)
    desk.die_twice()
    desk.handle = desk.stopped_in_vain
    desk.run()
    assert desk.charged == [0]
    assert desk.column("SELECT owner FROM eo.position") == [None], "it left in order"
    assert desk.column("SELECT crashes FROM eo.attempt") == []
    assert desk.column("SELECT next_offset FROM eo.position") == [0]


def test_a_death_before_one_who_leaves_without_getting_on_is_not_forgotten(desk: Desk) -> None:
    """Seen to fail with `marked` from the owner alone (Positions.claim): the dead owner's charge stayed for ever."""
    desk.run(until_all_is_done=True)
    desk.send(1)
    desk.execute("INSERT INTO eo.attempt SELECT consumer_id, topic_id, partition, next_offset, 0, 1 FROM eo.position")
    desk.die_twice()
    desk.handle = desk.stopped_in_vain
    desk.run()
    assert desk.charged == [0]
    assert desk.column("SELECT crashes FROM eo.attempt") == [1]
    desk.handle = lambda _: None
    desk.run(until_all_is_done=True)
    assert desk.column("SELECT next_offset FROM eo.position") == [1]
    assert desk.column("SELECT crashes FROM eo.attempt") == []


def test_and_that_of_one_that_waits_in_its_lane(desk: Desk) -> None:
    """Seen to fail without Drain.take_back: it would be given up as deadly, although no process has died of it."""
    desk.send(1)
    desk.handle = desk.failed
    desk.run()
    desk.handle = desk.stopped_in_vain
    desk.execute("UPDATE eo.parked_key SET due_at = now()")
    desk.die_twice()
    desk.run()
    assert desk.charged == [0]
    assert desk.column("SELECT crashes FROM eo.parked_message") == [0]
