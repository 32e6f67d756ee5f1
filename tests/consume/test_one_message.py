"""One message, one effect: the plain path, duplicates, and what a handler may publish."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest
from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, Message, Topic, Tx
from eoframework.db.session import Database
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from tests.conftest import MakeTopic
from tests.consume.harness import column, make_app, make_ledger, next_offsets, rows_reach, run_once, running, scalar
from tests.processes import produce

INSERT = text('INSERT INTO ledger (partition, "offset", note) VALUES (:p, :o, :n)')


class Entry(BaseModel):
    n: int


@pytest.fixture
def app(settings: Settings, database: Database) -> App:
    make_ledger(database.engine)
    return make_app(settings, database)


@pytest.fixture
def send(settings: Settings) -> Callable[..., None]:
    return lambda *args, **kw: produce(settings.require_bootstrap_servers(), *args, **kw)


def book(message: Message[Entry], tx: Tx) -> None:
    tx.session.execute(INSERT, {"p": message.partition, "o": message.offset, "n": str(message.payload.n)})


def entry(n: int) -> bytes:
    return b'{"n": %d}' % n


def test_every_message_has_its_effect_once_and_the_position_says_so(
    app: App, database: Database, make_topic: MakeTopic, send: Callable[..., None]
) -> None:
    topic = make_topic(partitions=2)
    send(topic, [(b"%d" % n, entry(n)) for n in range(300)])
    app.handler(Topic(topic, Entry), name="book")(book)
    assert run_once(app) == 0
    assert sorted(map(int, column(database.engine, "SELECT note FROM ledger"))) == list(range(300))
    assert sum(offset for _, offset in next_offsets(database)) == 300
    assert run_once(app) == 0
    assert scalar(database.engine, "SELECT count(*) FROM ledger") == 300


def test_effects_rolled_back_with_the_batch_when_the_handler_raises(
    app: App, database: Database, topic_name: str, send: Callable[..., None]
) -> None:
    send(topic_name, [(None, entry(n)) for n in range(10)])

    @app.handler(Topic(topic_name, Entry), name="book", retry=None)
    def fails_at_seven(message: Message[Entry], tx: Tx) -> None:
        book(message, tx)
        if message.payload.n == 7:
            raise ValueError("seven")

    assert run_once(app) == 70
    assert column(database.engine, "SELECT note FROM ledger ORDER BY id") == [str(n) for n in range(7)]
    assert next_offsets(database) == [(0, 7)]


@pytest.mark.parametrize("identity", [str(uuid.UUID(int=17)), "order-17", f"{{{uuid.UUID(int=18)}}}"])
def test_the_same_id_at_two_offsets_and_in_two_partitions_is_one_effect(
    app: App, database: Database, make_topic: MakeTopic, send: Callable[..., None], identity: str
) -> None:
    """Seen to fail with `ids` in Executor._first_timers emptied: four effects."""
    topic = make_topic(partitions=2)
    headers = [("message-id", identity.encode())]
    for partition in (0, 1):
        send(topic, [(None, entry(1), headers), (None, entry(1), headers)], partition=partition)
    app.handler(Topic(topic, Entry), name="book")(book)
    assert run_once(app) == 0
    assert scalar(database.engine, "SELECT count(*) FROM ledger") == 1
    assert next_offsets(database) == [(0, 2), (1, 2)]


def test_messages_without_an_id_are_protected_by_the_position(
    app: App, database: Database, topic_name: str, send: Callable[..., None]
) -> None:
    send(topic_name, [(None, entry(1)), (None, entry(1))])
    app.handler(Topic(topic_name, Entry), name="book")(book)
    assert [run_once(app), run_once(app)] == [0, 0]
    assert column(database.engine, 'SELECT "offset" FROM ledger ORDER BY id') == [0, 1]


def test_messages_arrive_while_the_worker_runs(
    app: App, database: Database, topic_name: str, send: Callable[..., None]
) -> None:
    app.handler(Topic(topic_name, Entry), name="book")(book)
    with running(app) as run:
        for n in range(5):
            send(topic_name, [(None, entry(n))])
            rows_reach(database.engine, n + 1)
        assert run.end() == 0
    assert column(database.engine, "SELECT note FROM ledger ORDER BY id") == ["0", "1", "2", "3", "4"]


def test_published_messages_are_outbox_rows_of_the_same_transaction(
    app: App, database: Database, make_topic: MakeTopic, send: Callable[..., None]
) -> None:
    source, target = make_topic(), make_topic()
    send(source, [(None, entry(n)) for n in range(4)])
    out = Topic(target, Entry)

    @app.handler(Topic(source, Entry), name="forward", retry=None)
    def forward(message: Message[Entry], tx: Tx) -> None:
        tx.publish(out, message.payload)
        if message.payload.n == 3:
            raise ValueError("not this one")

    assert run_once(app) == 70
    assert scalar(database.engine, "SELECT count(*) FROM eo.outbox_message WHERE topic = :t", t=target) == 3


def test_ids_of_published_messages_do_not_depend_on_the_run(
    app: App, database: Database, make_topic: MakeTopic, send: Callable[..., None]
) -> None:
    source, target = make_topic(), make_topic()
    send(source, [(None, entry(n)) for n in range(3)])
    out = Topic(target, Entry)

    @app.handler(Topic(source, Entry), name="forward")
    def forward(message: Message[Entry], tx: Tx) -> None:
        tx.publish(out, message.payload)
        tx.publish(out, message.payload)

    assert run_once(app) == 0
    first = column(database.engine, "SELECT id FROM eo.outbox_message ORDER BY seq")
    with database.engine.begin() as connection:
        connection.execute(text("DELETE FROM eo.outbox_message"))
        connection.execute(text("UPDATE eo.position SET next_offset = 0"))
        connection.execute(text("DELETE FROM eo.processed_message"))
    Admin(app.settings).delete_group(f"{app.name}.forward")  # or the offset ahead of a database set back would stop it
    assert run_once(app) == 0
    assert column(database.engine, "SELECT id FROM eo.outbox_message ORDER BY seq") == first
    assert len(set(first)) == 6


def test_the_trace_context_of_a_message_is_passed_on(
    app: App, database: Database, make_topic: MakeTopic, send: Callable[..., None]
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    source, target = make_topic(), make_topic()
    send(source, [(None, entry(1), [("traceparent", trace.encode())]), (None, entry(2), [("traceparent", b"x")])])
    out = Topic(target, Entry)

    @app.handler(Topic(source, Entry), name="forward")
    def forward(message: Message[Entry], tx: Tx) -> None:
        tx.publish(out, message.payload)

    assert run_once(app) == 0
    assert column(database.engine, "SELECT traceparent FROM eo.outbox_message ORDER BY seq") == [trace, None]
