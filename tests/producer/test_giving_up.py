"""A Producer that is ended under what it holds: what may be in the log is never said not to be."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterable
from contextlib import suppress
from secrets import token_hex

import pytest
from confluent_kafka import Producer as Client

from eoframework import EncodeError, OutcomeUnknown, Producer, Retryable, Sent
from eoframework.errors import Fenced, Permanent
from eoframework.kafka import sending
from eoframework.kafka.destinations import Destination
from eoframework.kafka.producer import Outgoing
from eoframework.kafka.transaction import TransactionalProducer
from eoframework.settings import Settings
from tests.processes import eventually
from tests.producer.conftest import (
    REPOSITORY,
    MakeOrders,
    MakeProducer,
    Order,
    OrderTopic,
    Own,
    numbers,
    orders_on,
    outcome,
)
from tests.protocol_proxy import PRODUCE, Request


def test_written_and_waiting_to_be_sent_again(own: Own, intact: Own, make_producer: MakeProducer) -> None:
    """The answer got lost with the connection; the client waits to send it again, and is closed.

    Seen to fail (said not to be written, and to be sent again) with `_PURGE_QUEUE` taken for "never sent".
    """
    orders = orders_on(own.settings())
    producer = make_producer(own.settings())
    assert producer.send(orders, Order(number=0))
    forward = own.wire._forward
    hung_up: list[bytes] = []

    def last_request(frame: bytes, client: socket.socket, server: socket.socket) -> bool:
        client.shutdown(socket.SHUT_RDWR)
        if Request.parse(frame).key == PRODUCE and not hung_up:
            hung_up.append(frame)
            server.sendall(frame)
        return True

    own.wire._forward = last_request  # type: ignore[method-assign]
    try:
        future = producer.send_soon(orders, Order(number=1))
        eventually(lambda: bool(hung_up), "the record is on its way", seconds=20)
        with pytest.raises(OutcomeUnknown):
            producer.close(1)
        result = outcome(future)
    finally:
        own.wire._forward = forward  # type: ignore[method-assign]
    assert numbers(own.settings(), orders) == [0, 1]
    assert not isinstance(result, Sent)
    assert isinstance(result, OutcomeUnknown), result


# --- Kafka transactions -----------------------------------------------------------------------------------------------


def test_a_message_that_could_not_be_prepared_is_not_left_out(
    producer: Producer, orders: OrderTopic, kafka: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kafka is away for a moment at a topic's first message, and the block catches that.

    Seen to fail (committed without the message) with the error passed on as it was.
    """
    look = producer._destinations.look

    def away_once(topic: str, *, deadline: float) -> Destination:
        monkeypatch.setattr(producer._destinations, "look", look)
        raise Retryable(f"{topic}: nothing was sent: Kafka cannot be reached.")

    def block() -> None:
        with producer.transaction() as t:
            t.send(orders, Order(number=1))
            monkeypatch.setattr(producer._destinations, "look", away_once)
            with suppress(Retryable):
                t.send(orders, Order(number=2))

    with pytest.raises(Retryable, match=r"cannot be reached.*aborted"):
        block()
    assert numbers(kafka, orders) == []


class Alarm(Exception):
    pass


def test_an_interruption_between_two_records_leaves_none(
    producer: Producer, orders: OrderTopic, kafka: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler raises while records are handed over, and the block catches that.

    Seen to fail (a part was committed) without the last `except` of `_guarded`.
    """
    send, given = TransactionalProducer.send, []

    def interrupted(self: TransactionalProducer, records: Iterable[Outgoing]) -> None:
        given.append(records)
        if len(given) == 500:
            raise Alarm
        send(self, records)

    monkeypatch.setattr(TransactionalProducer, "send", interrupted)

    def block() -> None:
        with producer.transaction() as t:
            for number in range(1000):
                with suppress(Alarm):
                    t.send(orders, Order(number=number))

    with pytest.raises(Permanent, match=r"interrupted by Alarm.*aborted"):
        block()
    assert numbers(kafka, orders) == []
    with producer.transaction() as t:
        t.send(orders, Order(number=7))
    assert numbers(kafka, orders) == [7]


def test_a_transaction_of_a_closed_producer(producer: Producer, orders: OrderTopic, kafka: Settings) -> None:
    """Made before, entered after. Seen to fail: it opened a client that nobody ended, and committed."""
    t = producer.transaction()
    producer.close()
    with pytest.raises(Permanent, match="is closed"), t:
        t.send(orders, Order(number=1))
    assert numbers(kafka, orders) == []


FORKS_INSIDE = """
import os, sys
from eoframework import Producer, Topic
from tests.producer.conftest import Order

orders = Topic(sys.argv[1], Order)
parent = os.getpid()
try:
    with Producer() as producer:
        with producer.transaction() as t:
            t.send(orders, Order(number=1))
            if os.fork():
                os.wait()
except Exception as error:
    print(os.getpid() == parent, error)
"""


def test_a_fork_inside_the_block_sends_nothing_twice(kafka: Settings, orders: OrderTopic) -> None:
    """Both leave it. Seen to fail: the fork made a client of its own, and committed the messages a second time."""
    environment = {**os.environ, "EO_KAFKA_BOOTSTRAP_SERVERS": kafka.require_bootstrap_servers()}
    done = subprocess.run(
        [sys.executable, "-c", FORKS_INSIDE, orders.name],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=REPOSITORY,
        check=True,
    )
    assert "belongs to process" in done.stdout
    assert "True" not in done.stdout
    assert numbers(kafka, orders) == [1]


def test_fenced_while_its_block_fails(make_producer: MakeProducer, orders: OrderTopic, kafka: Settings) -> None:
    """The newest of a name goes on, also if the older one hears of it only at its abort.

    Seen to fail (the older one fenced the newer) without `found_fenced`.
    """
    name = uuid.uuid4().hex
    older, newer = make_producer(name=name), make_producer(name=name)

    def fails() -> None:
        with older.transaction() as t:
            for number in range(1500):
                t.send(orders, Order(number=number))
            with newer.transaction() as other:
                other.send(orders, Order(number=5000))
            raise Alarm

    with pytest.raises(Alarm):
        fails()
    with pytest.raises(Fenced, match="another Producer of this name"):
        fails()
    with newer.transaction() as t:
        t.send(orders, Order(number=5001))
    assert numbers(kafka, orders) == [5000, 5001]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_failures_that_were_heard_are_not_kept(
    producer: Producer, make_orders: MakeOrders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a program that never flushes. Seen to fail: all of them were kept. One that nobody heard still is."""
    monkeypatch.setattr("eoframework.producer._REMEMBERED", 10)
    producer._forget_at = 10
    narrow = make_orders(config={"max.message.bytes": "2000"})
    unheard = producer.send_soon(narrow, Order(number=0, text=token_hex(3000)))
    for number in range(40):
        with pytest.raises(EncodeError):
            producer.send(narrow, Order(number=number, text=token_hex(3000)))
    assert len(producer._failed) <= 20
    with pytest.raises(EncodeError, match=r"has 6\d\d\d bytes"):
        producer.flush()
    assert unheard.done()


# --- a client that finds nobody ---------------------------------------------------------------------------------------


def test_a_client_that_finds_no_broker_any_more_is_replaced(
    kafka: Settings, orders: OrderTopic, make_producer: MakeProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As librdkafka leaves it behind at times (kafka/contact.py); here by a wrong address. No message ends in silence.

    Seen to fail without `_break_if_lost`: nothing could be sent any more until the process was started again.
    """
    made: list[object] = []

    def first_nowhere(config: dict[str, object]) -> Client:
        made.append(config)
        return Client({**config, "bootstrap.servers": "127.0.0.1:1"} if len(made) == 1 else config)

    monkeypatch.setattr(sending, "Producer", first_nowhere)
    producer = make_producer(kafka.model_copy(update={"transaction_timeout": 1.0}))

    def sent() -> bool:
        return isinstance(outcome(producer.send_soon(orders, Order(number=1))), Sent)

    assert not sent()
    eventually(sent, "a new client sends", seconds=30)
    assert numbers(kafka, orders) == [1]


def test_a_client_that_was_confirmed_something_is_only_slow(
    kafka: Settings, orders: OrderTopic, make_producer: MakeProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked on its own connection, behind what it sends, it would not answer in time: all that it holds is given up.

    Seen to fail without `_confirmed_at` in `_break_if_lost`.
    """
    asked: list[object] = []
    monkeypatch.setattr(sending, "has_lost_cluster", lambda *given: asked.append(given))
    producer = make_producer(kafka)
    producer.send(orders, Order(number=1))
    (client,) = producer._clients._clients.values()
    client._timed_out = True
    for number in range(2, 5):  # the second hears its report after the first one's round
        producer.send(orders, Order(number=number))
    assert not asked
    client._confirmed_at = -client._patience
    eventually(lambda: asked, "it is asked after all")
