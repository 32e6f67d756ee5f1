"""Topics and Producers without a database, and a broker of our own for the tests that break it."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from eoframework import Producer, Sent, Topic, dev
from eoframework.dev import processes
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from tests.conftest import Addresses
from tests.processes import read_topic
from tests.protocol_proxy import END_TXN, Request
from tests.relay.endtxn_proxy import EndTxnProxy


class Order(BaseModel):
    number: int
    text: str = ""


OrderTopic = Topic[Order]
MakeOrders = Callable[..., OrderTopic]
MakeProducer = Callable[..., Producer]


@pytest.fixture
def kafka(services: Addresses) -> Settings:
    """Settings of the run's broker."""
    return Settings.load(kafka_bootstrap_servers=services.bootstrap_servers)


@pytest.fixture
def make_orders(kafka: Settings) -> MakeOrders:
    return lambda **options: orders_on(kafka, **options)


@pytest.fixture
def orders(make_orders: MakeOrders) -> OrderTopic:
    """A fresh topic with three partitions, keyed by the order's number."""
    return make_orders()


@pytest.fixture
def make_producer(kafka: Settings) -> Iterator[MakeProducer]:
    """Producers that are closed at the end of the test."""
    made: list[Producer] = []

    def make(settings: Settings = kafka, **options: Any) -> Producer:
        made.append(Producer(settings, **options))
        return made[-1]

    yield make
    for producer in made:
        producer.close(1)


@pytest.fixture
def producer(make_producer: MakeProducer) -> Producer:
    return make_producer()


def orders_on(
    settings: Settings, *, partitions: int = 3, config: Mapping[str, str] | None = None, **options: Any
) -> OrderTopic:
    name = f"orders.{uuid.uuid4().hex[:10]}"
    Admin(settings).create(name, partitions=partitions, replicas=1, config=dict(config or {}))
    return Topic(name, Order, key=lambda order: order.number, **options)


@dataclass(frozen=True)
class Place:
    """A record as a plain consumer sees it."""

    partition: int
    offset: int
    id: str
    number: int


def read(settings: Settings, topic: OrderTopic, *, isolation: str = "read_committed") -> list[Place]:
    found = []
    for message in read_topic(settings.require_bootstrap_servers(), topic.name, isolation=isolation):
        headers = dict(message.headers() or [])
        order = Order.model_validate_json(message.value() or b"")
        found.append(Place(message.partition() or 0, message.offset() or 0, headers["ce_id"].decode(), order.number))
    return found


def numbers(settings: Settings, topic: OrderTopic, *, isolation: str = "read_committed") -> list[int]:
    return sorted(place.number for place in read(settings, topic, isolation=isolation))


def outcome(future: Future[Sent]) -> Sent | BaseException:
    error = future.exception(90)
    return future.result() if error is None else error


class Wire(EndTxnProxy):
    """The wire to a broker, on which the end of a transaction may also get lost, or its answer."""

    end: Literal["", "lost", "unanswered"] = ""
    ends = 0

    def _forward(self, frame: bytes, client: socket.socket, server: socket.socket) -> bool:
        if Request.parse(frame).key == END_TXN:
            self.ends += 1
            if self.end:
                # In this order, or the answer gets through.
                client.shutdown(socket.SHUT_RDWR)
                if self.end == "unanswered":
                    server.sendall(frame)
                return True
        return super()._forward(frame, client, server)


@dataclass(frozen=True)
class Own:
    """A broker that nobody else uses, behind a wire that can be cut, with access rights."""

    services: dev.Services
    wire: Wire

    def settings(self, **overrides: object) -> Settings:
        return Settings.load(kafka_bootstrap_servers=f"127.0.0.1:{self.wire.port}", **overrides)


@pytest.fixture(scope="package")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    broker_port = processes.free_port()
    wire = Wire(processes.free_port(avoid=[broker_port]), ("127.0.0.1", broker_port))
    wire.start()
    properties = {
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{wire.port}",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "true",
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": "500",
    }
    options = dev.KafkaOptions(port=broker_port, properties=properties)
    with dev.start(tmp_path_factory.mktemp("own") / ".eo", kafka=options) as services:
        yield Own(services, wire)
    wire.close()


@pytest.fixture
def intact(own: Own) -> Iterator[Own]:
    """The broker with its wire as it should be, before and after."""
    yield own
    own.wire.hold, own.wire.end = "", ""


REPOSITORY = Path(__file__).resolve().parents[2]
