"""Messages that fail, conflicts and outages: what is stopped, what goes on, and that nothing is skipped."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient, NewPartitions
from pydantic import BaseModel
from sqlalchemy import make_url, text

from eoframework import App, Message, Topic, Tx, events
from eoframework.db.session import Database, open_database
from eoframework.schema import Schema
from eoframework.settings import Settings
from tests.conftest import MakeTopic, make_settings
from tests.consume.harness import (
    column,
    make_app,
    make_ledger,
    next_offsets,
    rows_reach,
    run_once,
    running,
    scalar,
)
from tests.consume.unreadable import produce_with_header_name
from tests.processes import eventually, produce
from tests.proxy import proxy_to

INSERT = text('INSERT INTO ledger (partition, "offset", note) VALUES (:p, :o, :n)')


class Entry(BaseModel):
    n: int


@pytest.fixture
def send(settings: Settings) -> Callable[..., None]:
    return lambda *args, **kw: produce(settings.require_bootstrap_servers(), *args, **kw)


@pytest.fixture
def app(settings: Settings, database: Database) -> App:
    make_ledger(database.engine)
    return make_app(settings, database)


def with_settings(settings: Settings, **overrides: Any) -> Settings:
    return make_settings(settings.require_database_url(), settings.require_bootstrap_servers(), **overrides)


def book(message: Message[Any], tx: Tx) -> None:
    tx.session.execute(INSERT, {"p": message.partition, "o": message.offset, "n": str(message.payload)})


def entry(n: int) -> bytes:
    return b'{"n": %d}' % n


def test_failing_messages_stop_their_partitions_alone_until_mended(
    settings: Settings, database: Database, make_topic: MakeTopic, send: Callable[..., None]
) -> None:
    """One raises, one cannot be decoded, in two of three partitions.

    Seen to fail without Executor._smaller (nothing before the failing message was processed), and without
    `total.stops` in `_process` (messages behind it overtook it).
    """
    make_ledger(database.engine)
    topic = make_topic(partitions=3)
    for partition in range(3):
        values = [entry(n) for n in range(10)]
        if partition == 2:
            values[3] = b"\xff{"
        send(topic, [(None, value) for value in values], partition=partition)
    app = make_app(with_settings(settings, on_failure="pause"), database)
    broken = True

    @app.handler(Topic(topic, Entry), name="book", retry=None)
    def picky(message: Message[Entry], tx: Tx) -> None:
        book(message, tx)
        if broken and message.partition == 1 and message.payload.n == 5:
            raise ValueError("five")

    assert run_once(app) == 0
    assert next_offsets(database) == [(0, 10), (1, 5), (2, 3)]
    broken = False
    with running(app) as run:
        eventually(lambda: next_offsets(database)[1] == (1, 10), "the mended partition goes on")
        assert run.end() == 0
    for partition, count in ((0, 10), (1, 10), (2, 3)):
        booked = column(database.engine, 'SELECT "offset" FROM ledger WHERE partition = :p ORDER BY id', p=partition)
        assert booked == list(range(count))


def test_hostile_but_legal_messages_are_processed(
    app: App, database: Database, topic_name: str, send: Callable[..., None]
) -> None:
    many = [(f"h{n}", b"v") for n in range(5000)]
    send(
        topic_name,
        [
            (None, entry(1)),
            (b"\xff\x00", entry(2)),
            (b"tombstone", None),
            (None, b'{"n": 3, "more": "%s"}' % (b"x" * 900_000)),
            (None, entry(4), [("huge", b"\xff" * 500_000)]),
            (None, entry(5), many),
            (None, entry(6), [("message-id", b"\xff\xfe"), ("ce_id", b"\xff"), ("ce_source", b"\xff")]),
            (None, entry(7), [("nothing", None), ("", b"")]),
        ],
    )
    seen: list[int | None] = []

    @app.handler(Topic[Entry | None](topic_name, Entry | None), name="book")
    def lenient(message: Message[Entry | None], tx: Tx) -> None:
        book(message, tx)
        seen.append(message.payload.n if message.payload else None)

    assert run_once(app) == 0
    assert seen == [1, 2, None, 3, 4, 5, 6, 7]
    assert next_offsets(database) == [(0, 8)]


@pytest.mark.parametrize("value", [b"", None, b"{", b'{"n": "x"}', b"\xff\xfe\x00"], ids=repr)
def test_a_record_that_means_nothing_stops_there_and_is_not_skipped(
    app: App,
    database: Database,
    topic_name: str,
    send: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    value: bytes | None,
) -> None:
    send(topic_name, [(None, entry(1)), (None, value), (None, entry(3))])
    app.handler(Topic(topic_name, Entry), name="book", retry=None)(book)
    assert run_once(app) == 70
    assert next_offsets(database) == [(0, 1)]
    assert f"{topic_name}[0]@1" in caplog.text


def test_a_header_name_the_client_cannot_read_fails_its_record_alone(
    app: App, database: Database, settings: Settings, topic_name: str, send: Callable[..., None]
) -> None:
    """Seen to fail with a plain `message.headers()` in `_headers` of kafka/consumer.py: once the interpreter has
    optimised that call, the client's error surfaces somewhere later; it ended the process with 1, nothing said which
    record it was, and those before it were not processed either.
    """
    send(topic_name, [(None, entry(n)) for n in range(100)])
    produce_with_header_name(settings.require_bootstrap_servers(), topic_name, entry(2), b"\xff\xfe")
    send(topic_name, [(None, entry(3))])
    app.handler(Topic(topic_name, Entry), name="book", retry=None)(book)
    assert run_once(app) == 70
    assert next_offsets(database) == [(0, 100)]


def test_a_partition_that_appears_later_is_read_from_its_beginning_even_with_start_latest(
    app: App, database: Database, settings: Settings, topic_name: str, send: Callable[..., None]
) -> None:
    """Seen to fail with `_CLAIM` inserting the log's end for a partition without a row: its first messages skipped."""
    send(topic_name, [(None, entry(n)) for n in range(3)])
    app.handler(Topic(topic_name, Entry), name="book", start="latest")(book)
    assert run_once(app) == 0
    admin = AdminClient({"bootstrap.servers": settings.require_bootstrap_servers()})
    admin.create_partitions([NewPartitions(topic_name, 2)])[topic_name].result()
    eventually(lambda: len(admin.list_topics(topic_name, 5).topics[topic_name].partitions) == 2, "two partitions")
    send(topic_name, [(None, entry(n)) for n in range(3)], partition=1)
    with running(app) as run:
        rows_reach(database.engine, 3)
        assert run.end() == 0
    assert column(database.engine, "SELECT partition FROM ledger") == [1, 1, 1]
    assert next_offsets(database) == [(0, 3), (1, 3)]


def test_a_renamed_handler_refuses_to_start(
    settings: Settings, database: Database, topic_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen to fail without `refuse_renamed` in consume/start.py: the new name began at the topic's beginning."""
    old = make_app(settings, database)
    old.handler(Topic(topic_name, Entry), name="old")(book)
    assert run_once(old) == 0
    new = make_app(settings, database, old.name)
    new.handler(Topic(topic_name, Entry), name="new")(book)
    assert run_once(new) == 3
    assert "name='old'" in caplog.text


def test_handlers_that_deadlock_run_smaller_and_both_succeed(
    app: App, database: Database, topic_name: str, send: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Two handlers update the same rows in opposite order, in step with each other the first time.

    Seen to fail with `passing_trouble` answering None: the deadlock's victim stopped the consumer with 70.
    """
    with database.engine.begin() as connection:
        connection.execute(text("CREATE TABLE account AS SELECT n, 0 AS seen FROM generate_series(0, 1) AS n"))
    send(topic_name, [(None, entry(0)), (None, entry(1))])
    meeting = threading.Barrier(2, timeout=20)
    met: set[str] = set()

    def update(name: str, n: int, row: int, tx: Tx) -> None:
        if n == 1 and name not in met:
            met.add(name)
            meeting.wait()
        tx.session.execute(text("UPDATE account SET seen = seen + 1 WHERE n = :n"), {"n": row})

    @app.handler(Topic(topic_name, Entry), name="up")
    def up(message: Message[Entry], tx: Tx) -> None:
        update("up", message.payload.n, message.payload.n, tx)

    @app.handler(Topic(topic_name, Entry), name="down")
    def down(message: Message[Entry], tx: Tx) -> None:
        update("down", message.payload.n, 1 - message.payload.n, tx)

    with caplog.at_level(logging.WARNING):
        assert run_once(app) == 0
    assert column(database.engine, "SELECT seen FROM account") == [2, 2]
    assert "40P01" in caplog.text
    assert "The batch (now 1 messages at a time) was rolled back and runs again" in caplog.text


def test_a_connection_lost_in_the_handler_is_replaced_and_the_claims_name_the_new_one(
    app: App, database: Database, topic_name: str, send: Callable[..., None]
) -> None:
    """Seen to fail with `opening=False` taken out of Executor._run and the class of the error lost in `_failed` (any
    Retryable): the batch ran on a backend that the position row did not name, so a successor could not have ended it.
    """
    send(topic_name, [(None, entry(n)) for n in range(6)])
    backends: list[int] = []

    @app.handler(Topic(topic_name, Entry), name="book")
    def unlucky(message: Message[Entry], tx: Tx) -> None:
        backends.append(tx.session.scalar(text("SELECT pg_backend_pid()")) or 0)
        if len(backends) == 4:
            tx.session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        book(message, tx)

    with running(app) as run:
        rows_reach(database.engine, 6)
        named = scalar(database.engine, "SELECT backend_pid FROM eo.position")
        assert run.end() == 0
    assert len(set(backends)) == 2
    assert named == backends[-1]
    assert column(database.engine, 'SELECT "offset" FROM ledger ORDER BY id') == list(range(6))


def test_a_worker_stops_cleanly_while_the_database_is_down(
    database: Database, settings: Settings, topic_name: str, send: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    make_ledger(database.engine)
    send(topic_name, [(None, entry(n)) for n in range(3)])
    url = make_url(settings.require_database_url())
    assert url.host is not None
    with proxy_to(url.host, url.port or 5432) as proxy:
        through = url.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        reached = open_database(through, Schema())
        app = make_app(make_settings(through, settings.require_bootstrap_servers()), reached)
        app.handler(Topic(topic_name, Entry), name="book")(book)
        with running(app) as run:
            rows_reach(database.engine, 3)
            proxy.close()
            send(topic_name, [(None, entry(n)) for n in range(3, 6)])
            eventually(lambda: "Waiting" in caplog.text, "the worker waits for the database")
            assert run.end() == 0
        reached.engine.dispose()
    again = make_app(settings, database, app.name)
    again.handler(Topic(topic_name, Entry), name="book")(book)
    assert run_once(again) == 0
    assert column(database.engine, 'SELECT "offset" FROM ledger ORDER BY id') == list(range(6))


def test_a_blocked_partition_that_another_member_had_meanwhile_runs_again(
    settings: Settings, database: Database, make_topic: MakeTopic, send: Callable[..., None]
) -> None:
    """Seen to fail with `consumer.resume` taken out of GroupConsumer._assigned: a partition paused when it was lost
    came back paused, and stood still.
    """
    make_ledger(database.engine)
    topic = make_topic(partitions=2)
    for partition in range(2):
        send(topic, [(None, entry(1))], partition=partition)
    app = make_app(with_settings(settings, on_failure="pause"), database)
    broken = threading.Event()
    broken.set()
    blocked: list[int] = []

    def note(name: str, fields: dict[str, Any]) -> None:
        if name == "consume.failed":
            blocked.append(fields["record"].partition)

    @app.handler(Topic(topic, Entry), name="book", retry=None)
    def picky(message: Message[Entry], tx: Tx) -> None:
        if broken.is_set():
            raise ValueError("not yet")
        book(message, tx)

    unsubscribe = events.subscribe(note)
    with running(app) as first:
        eventually(lambda: sorted(blocked) == [0, 1], "both partitions blocked")
        with running(app) as second:
            eventually(lambda: len(blocked) == 3, "one of them went to the second member, and is blocked there")
            broken.clear()
            assert second.end() == 0
        rows_reach(database.engine, 1)
        assert first.end() == 0
    unsubscribe()
    assert column(database.engine, "SELECT partition FROM ledger") == [blocked[2]]
