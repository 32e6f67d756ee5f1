"""What the network and the broker do to a Producer: it never says what is not so. On a broker that the tests break."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from eoframework import ConfigurationError, OutcomeUnknown, Producer, Retryable, Sent, events
from eoframework.kafka import transaction
from eoframework.settings import Settings
from tests.processes import eventually, read_topic
from tests.producer.conftest import MakeProducer, Order, OrderTopic, Own, Wire, numbers, orders_on, outcome, read
from tests.relay.test_broken_services import allow, deny


@pytest.fixture
def settings(intact: Own) -> Settings:
    return intact.settings()


@pytest.fixture
def orders(settings: Settings) -> OrderTopic:
    return orders_on(settings)


@contextmanager
def when(event: str, act: object) -> Iterator[None]:
    """Do it at the first such event."""
    pending = [act]

    def listen(name: str, fields: dict[str, object]) -> None:
        if name == event and pending:
            pending.pop()()  # type: ignore[operator]

    unsubscribe = events.subscribe(listen)
    try:
        yield
    finally:
        unsubscribe()


@contextmanager
def cut(wire: Wire, end: Literal["lost", "unanswered"]) -> Iterator[None]:
    """What happens to the end of the next transaction, until its client is replaced."""

    def listen(name: str, fields: dict[str, object]) -> None:
        if name == "kafka.transaction.committing":
            wire.end = end
        elif name == "kafka.producer.replaced":
            wire.end = ""

    unsubscribe = events.subscribe(listen)
    try:
        yield
    finally:
        unsubscribe()
        wire.end = ""


# --- single messages --------------------------------------------------------------------------------------------------


def test_broker_killed_and_restarted(
    own: Own, settings: Settings, make_producer: MakeProducer, orders: OrderTopic, caplog: pytest.LogCaptureFixture
) -> None:
    """What was under way is tried again, by the client, within its time, and not silently."""
    caplog.set_level("INFO")
    producer = make_producer(settings)
    futures = []
    for number in range(300):
        futures.append(producer.send_soon(orders, Order(number=number)))
        if number == 150:
            own.services.kafka.restart()
    assert [type(outcome(future)) for future in futures] == [Sent] * 300
    assert numbers(settings, orders) == list(range(300))
    assert "wait and are tried again, each for at most 60 s" in caplog.text
    eventually(lambda: "nothing waits any more" in caplog.text, "the end of the wait is told", seconds=10)


def test_broker_frozen_for_longer_than_a_message_may_take(
    own: Own, settings: Settings, make_producer: MakeProducer, orders: OrderTopic
) -> None:
    """Some of it reaches the broker, which answers too late: unknown, not failed and not sent.

    Seen to fail (a message that is in the log is said not to be) with Retryable for OutcomeUnknown in
    `kafka/delivery.py`.
    """
    producer = make_producer(settings.model_copy(update={"transaction_timeout": 2.0}))
    before = [producer.send(orders, Order(number=number)) for number in range(3)]
    own.services.kafka.pause()
    eventually(lambda: stands_still(own), "the broker stands still")
    futures = [producer.send_soon(orders, Order(number=number)) for number in range(3, 30)]
    try:
        results = [outcome(future) for future in futures]
    finally:
        own.services.kafka.resume()
    unknown = [result for result in results if isinstance(result, OutcomeUnknown)]
    sent = before + [result for result in results if isinstance(result, Sent)]
    assert len(unknown) + len(sent) == 30
    assert unknown
    # Why it must not be called a failure.
    maybe = {str(error.ids[0]) for error in unknown}
    eventually(lambda: maybe & {place.id for place in read(settings, orders)}, "some of it is written all the same")
    sent.append(producer.send(orders, Order(number=100)))
    places = read(settings, orders)
    found = {(place.partition, place.offset): place.id for place in places}
    assert [found[one.partition, one.offset] for one in sent] == [str(one.id) for one in sent]
    assert len(set(found.values())) == len(found)


def test_not_authorised(own: Own, settings: Settings, make_producer: MakeProducer, orders: OrderTopic) -> None:
    client = AdminClient({"bootstrap.servers": settings.require_bootstrap_servers()})
    deny(client, orders.name, AclOperation.WRITE)
    producer = make_producer(settings)
    try:
        with pytest.raises(ConfigurationError, match=r"was not written: TOPIC_AUTHORIZATION_FAILED.*Grant WRITE"):
            producer.send(orders, Order(number=1))
        with (
            pytest.raises(ConfigurationError, match=r"readers see nothing of it.*Grant WRITE"),
            producer.transaction() as t,
        ):
            t.send(orders, Order(number=2))
    finally:
        allow(client, orders.name, AclOperation.WRITE)
    assert producer.send(orders, Order(number=3))
    assert numbers(settings, orders) == [3]


def test_a_topic_whose_settings_may_not_be_read(
    own: Own, settings: Settings, make_producer: MakeProducer, orders: OrderTopic
) -> None:
    client = AdminClient({"bootstrap.servers": settings.require_bootstrap_servers()})
    deny(client, orders.name, AclOperation.DESCRIBE_CONFIGS)
    assert make_producer(settings).send(orders, Order(number=1))


def test_a_client_that_can_send_nothing_any_more(
    own: Own, settings: Settings, make_producer: MakeProducer, orders: OrderTopic
) -> None:
    """Without the right to write anything the client itself breaks for good. The senders are told why at once, and
    another client goes on. Seen to fail (nothing is sent any more) without `known[1].fatal` in `SendingClients.send`.
    """
    client = AdminClient({"bootstrap.servers": settings.require_bootstrap_servers()})
    forbid_writing(client)
    producer = make_producer(settings)
    try:
        for number in range(2):
            with pytest.raises(ConfigurationError, match=r"not written: CLUSTER_AUTHORIZATION_FAILED.*Grant WRITE"):
                producer.send(orders, Order(number=number), timeout=30)
    finally:
        forget_rights(client)
    assert producer.send(orders, Order(number=2))
    assert numbers(settings, orders) == [2]


def forbid_writing(client: AdminClient) -> None:
    rows = (
        (ResourceType.BROKER, "kafka-cluster", AclOperation.IDEMPOTENT_WRITE, AclPermissionType.DENY),
        (ResourceType.BROKER, "kafka-cluster", AclOperation.ALL, AclPermissionType.ALLOW),
        (ResourceType.TOPIC, "*", AclOperation.WRITE, AclPermissionType.DENY),
        (ResourceType.TOPIC, "*", AclOperation.ALL, AclPermissionType.ALLOW),
    )
    bindings = [
        AclBinding(kind, name, ResourcePatternType.LITERAL, "User:ANONYMOUS", "*", operation, permission)
        for kind, name, operation, permission in rows
    ]
    for future in client.create_acls(bindings).values():
        future.result(10)


def forget_rights(client: AdminClient) -> None:
    everything = AclBindingFilter(
        ResourceType.ANY, None, ResourcePatternType.ANY, None, None, AclOperation.ANY, AclPermissionType.ANY
    )
    for future in client.delete_acls([everything]).values():
        future.result(10)


# --- the end of a Kafka transaction -----------------------------------------------------------------------------------


def transact(producer: Producer, orders: OrderTopic, count: int = 6) -> list[Sent]:
    with producer.transaction() as t:
        for number in range(count):
            t.send(orders, Order(number=number))
    return t.sent


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From then on the client's calls give up after a second."""
    return lambda: monkeypatch.setattr(transaction, "_CALL_TIMEOUT", 1.0)


def test_a_commit_without_an_answer_that_happened(
    own: Own, settings: Settings, make_producer: MakeProducer, orders: OrderTopic, hurry: Callable[[], None]
) -> None:
    """Found in the log, so the block ends well. Seen to fail (Retryable: a second run would double it) with
    `was_committed` saying False.
    """
    producer = make_producer(settings)
    transact(producer, orders, 1)
    hurry()
    with cut(own.wire, "unanswered"):
        sent = transact(producer, orders)
    assert len(sent) == 6
    assert numbers(settings, orders) == [0, *range(6)]
    transact(producer, orders, 1)


def test_a_commit_without_an_answer_that_did_not_happen(
    own: Own, settings: Settings, make_producer: MakeProducer, orders: OrderTopic, hurry: Callable[[], None]
) -> None:
    """Found to be missing from the log, so it may run again. Seen to fail (taken for committed, and lost) with
    `was_committed` saying True.
    """
    producer = make_producer(settings)
    transact(producer, orders, 1)
    hurry()
    with (
        cut(own.wire, "lost"),
        pytest.raises(Retryable, match="readers see nothing of it"),
    ):
        transact(producer, orders)
    assert numbers(settings, orders) == [0]
    assert len(read(settings, orders, isolation="read_uncommitted")) == 7
    transact(producer, orders)
    assert numbers(settings, orders) == [0, *range(6)]


@pytest.mark.parametrize("end", ["lost", "unanswered"])
def test_a_commit_that_nobody_can_tell_of(
    own: Own,
    settings: Settings,
    make_producer: MakeProducer,
    orders: OrderTopic,
    hurry: Callable[[], None],
    end: Literal["lost", "unanswered"],
) -> None:
    """Without the right to read, there is no way to know: OutcomeUnknown, with what a second attempt needs."""
    client = AdminClient({"bootstrap.servers": settings.require_bootstrap_servers()})
    producer = make_producer(settings)
    transact(producer, orders, 1)
    hurry()
    deny(client, orders.name, AclOperation.READ)
    try:
        with (
            cut(own.wire, end),
            pytest.raises(OutcomeUnknown, match=r"6 messages.*not answered.*same id=") as raised,
        ):
            transact(producer, orders)
    finally:
        allow(client, orders.name, AclOperation.READ)
    assert (len(set(raised.value.ids)), raised.value.topics) == (6, (orders.name,))
    assert len(read(settings, orders)) == (1 if end == "lost" else 7)
    again = producer.send_many(orders, [Order(number=n) for n in range(2)])
    assert len(again) == 2


def test_broker_gone_at_the_commit(
    own: Own, settings: Settings, make_producer: MakeProducer, orders: OrderTopic, hurry: Callable[[], None]
) -> None:
    """Waited for as long as a transaction may take, then unknown."""
    producer = make_producer(settings.model_copy(update={"transaction_timeout": 3.0}))
    transact(producer, orders, 1)
    hurry()
    try:
        with (
            when("kafka.transaction.committing", own.services.kafka.kill),
            pytest.raises(OutcomeUnknown, match="was not answered"),
        ):
            transact(producer, orders)
    finally:
        own.services.kafka.start()
    assert len(read(settings, orders)) in (1, 7)
    transact(producer, orders, 1)


def test_broker_frozen_at_the_commit(
    own: Own, settings: Settings, make_producer: MakeProducer, orders: OrderTopic, hurry: Callable[[], None]
) -> None:
    """Whatever became of it, the block says what the log says."""
    producer = make_producer(settings)
    transact(producer, orders, 1)
    hurry()
    timer = threading.Timer(2.5, own.services.kafka.resume)

    def freeze() -> None:
        own.services.kafka.pause()
        timer.start()

    with when("kafka.transaction.committing", freeze):
        try:
            transact(producer, orders)
            committed = True
        except Retryable:
            committed = False
    timer.join()
    assert len(read(settings, orders)) == (7 if committed else 1)


def test_open_for_longer_than_kafka_allows(
    own: Own, settings: Settings, make_producer: MakeProducer, orders: OrderTopic
) -> None:
    """Kafka has aborted it: told so, and the Producer goes on."""
    producer = make_producer(settings.model_copy(update={"transaction_timeout": 1.0}))

    def block() -> None:
        with producer.transaction() as t:
            for number in range(1500):
                t.send(orders, Order(number=number))
            beside = [Order(number=-number) for number in range(1, 10)]
            other.send_many(orders, beside)
            eventually(lambda: len(read(settings, orders)) == 9, "Kafka ends it, and readers go on")

    other = make_producer(settings)
    with pytest.raises(Retryable, match=r"was open for \d+\.\d s and Kafka has ended it.*EO_TRANSACTION_TIMEOUT"):
        block()
    transact(producer, orders, 2)
    assert numbers(settings, orders) == [*range(-9, 0), 0, 1]


# --- a late EndTxn ----------------------------------------------------------------------------------------------------


def batches(producer: Producer, orders: OrderTopic, count: int) -> list[str]:
    """`count` transactions of 60 messages over all partitions; what each came to."""
    found = []
    for batch in range(count):
        try:
            with producer.transaction() as t:
                for number in range(60):
                    t.send(orders, Order(number=number, text=str(batch)))
            found.append("committed")
        except (Retryable, OutcomeUnknown) as error:
            found.append(type(error).__name__)
    return found


def torn(settings: Settings, orders: OrderTopic, results: list[str]) -> list[int]:
    """The transactions that are not in the log as their blocks said."""
    messages = read_topic(settings.require_bootstrap_servers(), orders.name)
    found = [Order.model_validate_json(message.value() or b"").text for message in messages]
    expected = {"committed": 60}
    return [n for n, result in enumerate(results) if found.count(str(n)) != expected.get(result, 0)]


def test_late_commits_tear_nothing(
    own: Own, settings: Settings, make_producer: MakeProducer, orders: OrderTopic
) -> None:
    """The quarantine rule at work; the next test shows what it is for."""
    own.wire.hold = "commit"
    results = batches(make_producer(settings), orders, 12)
    assert torn(settings, orders, results) == []
    assert own.wire.delivered >= 3


def test_late_commits_without_the_rule(
    own: Own,
    settings: Settings,
    make_producer: MakeProducer,
    orders: OrderTopic,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With infinite patience the late commit publishes a part of the next transaction."""
    monkeypatch.setattr(transaction, "_QUARANTINE_SHARE", float("inf"))
    own.wire.hold = "commit"
    results = batches(make_producer(settings), orders, 12)
    assert own.wire.delivered >= 3
    assert torn(settings, orders, results) != []


def stands_still(own: Own) -> bool:
    """Every thread of the broker is stopped: a signal takes a moment, in which it answers on."""
    broker = own.services.kafka.identity
    assert broker is not None
    states = [task.joinpath("stat").read_text() for task in Path(f"/proc/{broker.pid}/task").iterdir()]
    return all(state.rpartition(")")[2].split()[0] == "T" for state in states)
