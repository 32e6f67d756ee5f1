"""Kafka transactions of a Producer: all or nothing for who reads committed; what was aborted is seen to be there."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable

import pytest

from eoframework import ConfigurationError, EncodeError, Fenced, KafkaTransaction, Producer, Topic
from eoframework.errors import Permanent
from eoframework.settings import Settings, environment
from tests.processes import eventually
from tests.producer.conftest import REPOSITORY, MakeOrders, MakeProducer, Order, OrderTopic, numbers, read
from tests.producer.test_sending import noise

MORE_THAN_ARE_HELD = 2500


def both(kafka: Settings, topic: OrderTopic) -> tuple[int, int]:
    """How many messages readers of committed ones see, and how many there are."""
    return len(read(kafka, topic)), len(read(kafka, topic, isolation="read_uncommitted"))


@pytest.mark.parametrize("count", [1, 7, MORE_THAN_ARE_HELD])
def test_committed(producer: Producer, make_orders: MakeOrders, kafka: Settings, count: int) -> None:
    first, second = make_orders(), make_orders()
    with producer.transaction() as t:
        ids = [t.send((first, second)[n % 2], Order(number=n)) for n in range(count)]
    found = {(topic.name, place.partition, place.offset): place for topic in (first, second)
             for place in read(kafka, topic)}  # fmt: skip
    places = [found[sent.topic, sent.partition, sent.offset] for sent in t.sent]
    assert [place.number for place in places] == list(range(count))
    assert [place.id for place in places] == [str(one) for one in ids] == [str(sent.id) for sent in t.sent]
    assert len(found) == count


def test_one_after_the_other(producer: Producer, orders: OrderTopic, kafka: Settings) -> None:
    for n in range(20):
        with producer.transaction() as t:
            t.send(orders, Order(number=n), key="k")
    assert [place.number for place in read(kafka, orders)] == list(range(20))


def test_empty(producer: Producer) -> None:
    with producer.transaction() as t:
        pass
    assert t.sent == []


def test_not_visible_before_the_block_ends(producer: Producer, orders: OrderTopic, kafka: Settings) -> None:
    with producer.transaction() as t:
        for n in range(MORE_THAN_ARE_HELD):
            t.send(orders, Order(number=n))
        eventually(lambda: both(kafka, orders)[1] > 0, "some of it is in the log")
        assert both(kafka, orders)[0] == 0
        with pytest.raises(Permanent, match="is open; nothing is sent yet"):
            _ = t.sent
    assert both(kafka, orders) == (MORE_THAN_ARE_HELD, MORE_THAN_ARE_HELD)


@pytest.mark.parametrize("count", [5, MORE_THAN_ARE_HELD])
def test_an_exception_in_the_block(producer: Producer, orders: OrderTopic, kafka: Settings, count: int) -> None:
    """Nothing is committed, and the Producer goes on. Seen to fail (all committed) with `_commit` for `_abort` in
    `KafkaTransaction.__exit__`.
    """

    def block() -> None:
        with producer.transaction() as t:
            for n in range(count):
                t.send(orders, Order(number=n))
            if count == MORE_THAN_ARE_HELD:
                eventually(lambda: both(kafka, orders)[1] > 0, "some of it is in the log")
            raise LookupError("changed my mind")

    with pytest.raises(LookupError, match="changed my mind"):
        block()
    with producer.transaction() as t:
        t.send(orders, Order(number=-1))
    committed, there = both(kafka, orders)
    assert committed == 1
    assert (there > 1) == (count == MORE_THAN_ARE_HELD)


def test_a_delivery_error(producer: Producer, make_orders: MakeOrders, kafka: Settings) -> None:
    """One message of three topics is too large: nothing of any is committed, the block raises which one and why.

    Seen to fail (the others committed) without Kafka's transactions: `begin_transaction` and its like taken out of
    `TransactionalProducer`. Here it is protected twice: librdkafka, too, does not commit when a record was refused.
    """
    wide, narrow = make_orders(), make_orders(config={"max.message.bytes": "3000"})

    def block() -> None:
        with producer.transaction() as t:
            for n in range(50):
                t.send(wide, Order(number=n))
            t.send(narrow, Order(number=50, text=noise(10_000)))
            t.send(narrow, Order(number=51))

    with pytest.raises(EncodeError, match=r"has 100\d\d bytes, 3000 are allowed.*see nothing of it.*claim check"):
        block()
    assert both(kafka, wide)[0] == both(kafka, narrow)[0] == 0
    with producer.transaction() as t:
        t.send(narrow, Order(number=1))
        t.send(wide, Order(number=1))
    assert both(kafka, wide)[0] == both(kafka, narrow)[0] == 1


def test_a_delivery_error_swallowed_in_the_block(producer: Producer, make_orders: MakeOrders, kafka: Settings) -> None:
    """Caught by the user, it still aborts all. Seen to fail (the rest committed) without `_broken` in `__exit__`."""
    narrow = make_orders(partitions=1, config={"max.message.bytes": "3000"})
    caught: list[Exception] = []

    def block() -> None:
        with producer.transaction() as t:
            t.send(narrow, Order(number=0, text=noise(10_000)))
            eventually(lambda: refused_meanwhile(t), "the broker's refusal is heard", seconds=60)

    def refused_meanwhile(t: KafkaTransaction) -> bool:
        for n in range(1, 200):
            try:
                t.send(narrow, Order(number=n, text=noise(900)))
            except EncodeError as error:
                caught.append(error)
        return bool(caught)

    with pytest.raises(EncodeError, match="readers see nothing of it"):
        block()
    assert caught
    assert both(kafka, narrow)[0] == 0


def test_a_narrow_topic_that_comes_late(producer: Producer, make_orders: MakeOrders, kafka: Settings) -> None:
    """The size of requests was fixed when the transaction began. Seen to fail (EncodeError) without the `flush` in
    `KafkaTransaction._produce`.
    """
    wide, narrow = make_orders(), make_orders(partitions=1, config={"max.message.bytes": "3000"})
    with producer.transaction() as t:
        for n in range(1100):
            t.send(wide, Order(number=n))
        for n in range(50):
            t.send(narrow, Order(number=n, text=noise(500)))
    assert (both(kafka, wide)[0], both(kafka, narrow)[0]) == (1100, 50)


def test_a_wrong_message_may_be_left_out(producer: Producer, orders: OrderTopic, kafka: Settings) -> None:
    missing = Topic(f"missing.{uuid.uuid4().hex[:8]}", Order)
    with producer.transaction() as t:
        t.send(orders, Order(number=1))
        with pytest.raises(EncodeError):
            t.send(orders, "no order")  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="no topic"):
            t.send(missing, Order(number=2))
    assert numbers(kafka, orders) == [1]


def test_sending_beside_an_open_transaction(producer: Producer, orders: OrderTopic, kafka: Settings) -> None:
    def block() -> None:
        with producer.transaction() as t:
            t.send(orders, Order(number=1))
            producer.send(orders, Order(number=2))
            raise LookupError

    with pytest.raises(LookupError):
        block()
    assert numbers(kafka, orders) == [2]


# --- one at a time ----------------------------------------------------------------------------------------------------


def in_thread(work: Callable[[], object]) -> BaseException | None:
    heard: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
            heard.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return heard[0] if heard else None


def test_a_second_transaction_is_refused(producer: Producer, orders: OrderTopic, kafka: Settings) -> None:
    """Nested or in another thread. Seen to fail (both in one) without the lock in `Turn.take`."""

    def second() -> None:
        with producer.transaction() as t:
            t.send(orders, Order(number=2))

    with producer.transaction() as t:
        t.send(orders, Order(number=1))
        with pytest.raises(Permanent, match="open already, in thread MainThread"):
            second()
        assert "open already" in str(in_thread(second))
        assert "belongs to the thread" in str(in_thread(lambda: t.send(orders, Order(number=3))))
        with pytest.raises(Permanent, match="has an open Kafka transaction"):
            producer.close()
    assert in_thread(second) is None
    assert numbers(kafka, orders) == [1, 2]


def test_used_once_and_only_inside(producer: Producer, orders: OrderTopic) -> None:
    t = producer.transaction()
    with pytest.raises(Permanent, match="is new"):
        t.send(orders, Order(number=1))
    with t:
        t.send(orders, Order(number=1))
    with pytest.raises(Permanent, match="is committed; nothing was sent"):
        t.send(orders, Order(number=1))
    with pytest.raises(Permanent, match="used once"):
        t.__enter__()


# --- two of one name --------------------------------------------------------------------------------------------------


def test_the_newest_of_a_name_fences_the_others(
    make_producer: MakeProducer, orders: OrderTopic, kafka: Settings
) -> None:
    """The older one's open transaction is aborted, it is told why, and does not fence back.

    Seen to fail (the two take turns) without `_taken_over` in `Turn.take`.
    """
    name = f"till-{uuid.uuid4().hex[:8]}"
    older, newer = make_producer(name=name), make_producer(name=name)

    def block() -> None:
        with older.transaction() as t:
            for n in range(MORE_THAN_ARE_HELD):
                t.send(orders, Order(number=n))
            eventually(lambda: both(kafka, orders)[1] > 0, "some of it is in the log")
            with newer.transaction() as other:
                other.send(orders, Order(number=-1))

    with pytest.raises(Fenced, match=r"another Producer of this name has taken over.*readers see nothing"):
        block()
    with pytest.raises(Fenced, match="another Producer of this name has taken over"), older.transaction():
        pass
    with newer.transaction() as t:
        t.send(orders, Order(number=-2))
    assert older.send(orders, Order(number=-3))
    assert numbers(kafka, orders) == [-3, -2, -1]


def test_producers_without_a_name_do_not_fence_each_other(
    make_producer: MakeProducer, orders: OrderTopic, kafka: Settings
) -> None:
    """Seen to fail (Fenced) with one transactional.id for all."""
    first, second = make_producer(), make_producer()
    with first.transaction() as t:
        for n in range(MORE_THAN_ARE_HELD):
            t.send(orders, Order(number=n))
        with second.transaction() as other:
            other.send(orders, Order(number=-1))
    assert numbers(kafka, orders) == list(range(-1, MORE_THAN_ARE_HELD))


# --- crashes ----------------------------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, threading
from eoframework import Producer, Topic, events

point = sys.argv[2]
topic = Topic(sys.argv[1], dict[str, int], key=lambda payload: payload["number"])

def die(name, fields):
    if name == point:
        os.kill(os.getpid(), signal.SIGKILL)

events.subscribe(die)
producer = Producer(name=sys.argv[3])
with producer.transaction() as t:
    for n in range(2500):
        t.send(topic, {"number": n})
    if point == "block":
        sys.stdin.read()
"""


@pytest.mark.parametrize("point", ["block", "kafka.transaction.committing", "kafka.transaction.committed"])
def test_killed_anywhere(make_producer: MakeProducer, orders: OrderTopic, kafka: Settings, point: str) -> None:
    """All or nothing; the next Producer of the name ends what was open, so that readers need not wait for it.

    Seen to fail (2,000 of 2,500 visible in "block") without Kafka's transactions, as above.
    """
    name = f"till-{uuid.uuid4().hex[:8]}"
    arguments = [sys.executable, "-c", PROGRAM, orders.name, point, name]
    servers = environment(EO_KAFKA_BOOTSTRAP_SERVERS=kafka.require_bootstrap_servers())
    with subprocess.Popen(arguments, cwd=REPOSITORY, env=servers, stdin=subprocess.PIPE) as victim:
        if point == "block":
            eventually(lambda: both(kafka, orders)[1] > 0, "some of it is in the log")
            victim.kill()
        assert victim.wait(60) == -signal.SIGKILL
    with make_producer(name=name).transaction() as t:
        t.send(orders, Order(number=-1))
    committed = numbers(kafka, orders)
    everything = point == "kafka.transaction.committed"
    assert committed == (list(range(-1, 2500)) if everything else [-1])
    assert both(kafka, orders)[1] > 1
