"""Messages sent singly and many at a time: where they stand, what refuses them, and that every failure is heard."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from eoframework import (
    App,
    ConfigurationError,
    EncodeError,
    NotAllSent,
    Out,
    OutcomeUnknown,
    Producer,
    Retryable,
    Sent,
    Topic,
    clock,
)
from eoframework.errors import Permanent
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings, environment
from tests.processes import eventually, read_topic
from tests.producer.conftest import (
    REPOSITORY,
    MakeOrders,
    MakeProducer,
    Order,
    OrderTopic,
    numbers,
    outcome,
    read,
)

NOWHERE = "127.0.0.1:1"


def noise(size: int) -> str:
    """Text that compression cannot make small."""
    return os.urandom(size).hex()[:size]


# --- where they stand -------------------------------------------------------------------------------------------------


def test_sent_says_where_the_message_stands(producer: Producer, orders: OrderTopic, kafka: Settings) -> None:
    sent = [producer.send(orders, Order(number=number)) for number in range(10)]
    found = {(place.partition, place.offset): place for place in read(kafka, orders)}
    assert len(found) == 10
    for number, one in enumerate(sent):
        place = found[one.partition, one.offset]
        assert (place.number, place.id, one.topic) == (number, str(one.id), orders.name)
        assert one.timestamp is not None
        assert abs((clock.now() - one.timestamp).total_seconds()) < 60


def test_many_are_sent_in_their_order(producer: Producer, orders: OrderTopic, kafka: Settings) -> None:
    payloads = [Order(number=number % 5, text=str(number)) for number in range(5000)]
    sent = producer.send_many(orders, iter(payloads))
    found = {(m.partition(), m.offset()): m for m in read_topic(kafka.require_bootstrap_servers(), orders.name)}
    assert [Order.model_validate_json(found[s.partition, s.offset].value() or b"") for s in sent] == payloads
    for number in range(5):
        of_key = [(one.partition, one.offset) for one, payload in zip(sent, payloads, strict=True)
                  if payload.number == number]  # fmt: skip
        assert of_key == sorted(of_key)


def test_many_to_several_topics(producer: Producer, make_orders: MakeOrders, kafka: Settings) -> None:
    first, second = make_orders(), make_orders()
    outs = [Out(first if n % 2 else second, Order(number=n), key="k", id=f"order-{n}") for n in range(20)]
    sent = producer.send_many(outs)
    assert [one.topic for one in sent] == [out.topic.name for out in outs]
    assert numbers(kafka, first) == list(range(1, 20, 2))
    assert numbers(kafka, second) == list(range(0, 20, 2))


def test_headers_are_those_that_the_relay_writes(
    make_producer: MakeProducer, orders: OrderTopic, kafka: Settings
) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    producer = make_producer(source="shop")
    sent = producer.send(orders, Order(number=1), key="k", id="order-1", headers={"tenant": "a"}, traceparent=trace)
    (message,) = read_topic(kafka.require_bootstrap_servers(), orders.name)
    headers = dict(message.headers() or [])
    assert headers.pop("ce_time")
    assert message.key() == b"k"
    identity = str(sent.id).encode()
    assert headers == {
        "ce_specversion": b"1.0",
        "ce_id": identity,
        "ce_source": b"shop",
        "ce_type": b"Order",
        "content-type": b"application/json",
        "message-id": identity,
        "traceparent": trace.encode(),
        "tenant": b"a",
    }


def test_the_same_id_makes_the_same_message(producer: Producer, orders: OrderTopic) -> None:
    first, again = (producer.send(orders, Order(number=1), id="order-1") for _ in range(2))
    assert first.id == again.id
    assert producer.send(orders, Order(number=1), id=first.id).id == first.id


def test_many_threads_at_once(producer: Producer, orders: OrderTopic, kafka: Settings) -> None:
    with ThreadPoolExecutor(16) as pool:
        singly = list(pool.map(lambda n: producer.send(orders, Order(number=n)), range(400)))
        soon = list(pool.map(lambda n: producer.send_soon(orders, Order(number=n)), range(400, 800)))
        many = list(pool.map(lambda n: producer.send_many(orders, [Order(number=n)] * 10), range(800, 810)))
    sent = singly + [future.result(30) for future in soon] + [one for some in many for one in some]
    assert len({(one.partition, one.offset) for one in sent}) == 900
    assert {(place.partition, place.offset) for place in read(kafka, orders)} == {
        (one.partition, one.offset) for one in sent
    }


def test_the_apps_producer(kafka: Settings, orders: OrderTopic) -> None:
    app = App("shop", settings=kafka)
    first = app.producer
    assert first is app.producer
    first.send(orders, Order(number=1))
    app.close()
    with pytest.raises(Permanent, match="closed"):
        first.send(orders, Order(number=2))
    app.producer.send(orders, Order(number=3))
    app.close()
    assert numbers(kafka, orders) == [1, 3]


# --- what refuses them ------------------------------------------------------------------------------------------------


def test_too_large_for_the_topic(producer: Producer, make_orders: MakeOrders, kafka: Settings) -> None:
    """Named with size, limit and remedies; small ones of the same moment are sent.

    Seen to fail (all 21 refused) with `lower_batch_size` taken out of `SendingClients._client_for`.
    """
    narrow = make_orders(partitions=1, config={"max.message.bytes": "4000"})
    small = [producer.send_soon(narrow, Order(number=n, text=noise(1000))) for n in range(10)]
    large = producer.send_soon(narrow, Order(number=10, text=noise(20_000)))
    small += [producer.send_soon(narrow, Order(number=n, text=noise(1000))) for n in range(11, 21)]
    with pytest.raises(EncodeError, match=r"has 20\d\d\d bytes, 4000 are allowed .*not written.*claim check"):
        large.result(30)
    assert [type(outcome(future)) for future in small] == [Sent] * 20
    assert numbers(kafka, narrow) == [n for n in range(21) if n != 10]


def test_too_large_for_the_client(make_producer: MakeProducer, make_orders: MakeOrders, kafka: Settings) -> None:
    topic = make_orders(max_bytes=10_000_000)
    with pytest.raises(EncodeError, match=r"has 30000\d\d bytes, 1000000 are allowed.*EO_KAFKA_MESSAGE_MAX_BYTES"):
        make_producer().send(topic, Order(number=1, text="x" * 3_000_000))
    assert numbers(kafka, topic) == []


def test_good_ones_that_are_too_large_together(producer: Producer, make_orders: MakeOrders, kafka: Settings) -> None:
    """Seen to fail (NotAllSent) with `lower_batch_size` taken out of `SendingClients._client_for`."""
    narrow = make_orders(partitions=1, config={"max.message.bytes": "3000"})
    producer.send_many(narrow, [Order(number=n, text=noise(500)) for n in range(200)])
    assert numbers(kafka, narrow) == list(range(200))


def test_unknown_topic_is_told_at_once(producer: Producer) -> None:
    """Seen to fail (30 s, until the client gives up its hope) with `Destinations.look` not asking."""
    missing = Topic(f"missing.{uuid.uuid4().hex[:8]}", Order)
    with pytest.raises(ConfigurationError, match=r"no topic 'missing.*eo topics apply"):
        producer.send(missing, Order(number=1), timeout=5)
    with pytest.raises(NotAllSent, match="no topic") as raised:
        producer.send_many(missing, [Order(number=1)], timeout=5)
    assert isinstance(raised.value.results[0], ConfigurationError)


def test_a_topic_that_appears_later_is_found(producer: Producer, kafka: Settings, make_orders: MakeOrders) -> None:
    missing = Topic(f"later.{uuid.uuid4().hex[:8]}", Order)
    with pytest.raises(ConfigurationError):
        producer.send(missing, Order(number=1))
    Admin(kafka).create(missing.name, partitions=1, replicas=1, config={})
    assert producer.send(missing, Order(number=1)).offset == 0


def test_a_wrong_payload_stops_the_rest_and_says_what_was_sent(
    producer: Producer, orders: OrderTopic, kafka: Settings
) -> None:
    payloads: list[object] = [Order(number=1), Order(number=2), "no order", Order(number=3)]
    with pytest.raises(NotAllSent, match="2 of the 3 messages tried were sent") as raised:
        producer.send_many(orders, payloads)  # type: ignore[arg-type]
    assert [type(result) for result in raised.value.results] == [Sent, Sent, EncodeError]
    assert numbers(kafka, orders) == [1, 2]


def test_an_iterable_that_fails_is_waited_for(producer: Producer, orders: OrderTopic, kafka: Settings) -> None:
    def failing() -> object:
        yield Order(number=1)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more") as raised:
        producer.send_many(orders, failing())  # type: ignore[arg-type]
    assert "1 messages before it were sent" in raised.value.__notes__[0]
    assert numbers(kafka, orders) == [1]


def test_kafka_away_nothing_was_sent(make_producer: MakeProducer) -> None:
    producer = make_producer(Settings.load(kafka_bootstrap_servers=NOWHERE))
    with pytest.raises(Retryable, match=r"nothing was sent.*127\.0\.0\.1:1"):
        producer.send(Topic("orders", Order), Order(number=1), timeout=0.1)


def test_a_full_queue_is_waited_for(make_producer: MakeProducer, kafka: Settings, orders: OrderTopic) -> None:
    """Back-pressure. Seen to fail (BufferError) without `_wait_for_room`."""
    settings = kafka.model_copy(update={"kafka": {"queue.buffering.max.messages": "10", "linger.ms": "20"}})
    sent = make_producer(settings).send_many(orders, [Order(number=n) for n in range(500)])
    assert len(sent) == 500
    assert numbers(kafka, orders) == list(range(500))


def test_a_queue_that_stays_full_is_told(make_producer: MakeProducer, kafka: Settings, orders: OrderTopic) -> None:
    """Bounded, and what was refused was not sent."""
    options = {"queue.buffering.max.messages": "10", "linger.ms": "3000"}
    producer = make_producer(kafka.model_copy(update={"kafka": options}))
    queued = [producer.send_soon(orders, Order(number=n)) for n in range(10)]
    with pytest.raises(Retryable, match="nothing was sent: the client's queue stayed full; 10 messages wait"):
        producer.send(orders, Order(number=10), timeout=0.2)
    assert all(isinstance(outcome(future), Sent) for future in queued)
    assert numbers(kafka, orders) == list(range(10))


def test_not_confirmed_in_time_is_unknown(make_producer: MakeProducer, kafka: Settings, orders: OrderTopic) -> None:
    """It is still on its way, so it must not be called a failure; the id is there for a second attempt."""
    producer = make_producer(kafka.model_copy(update={"kafka": {"linger.ms": "1000"}}))
    with pytest.raises(OutcomeUnknown, match="not confirmed in time; it may be written") as raised:
        producer.send(orders, Order(number=1), timeout=0.2)
    producer.flush()
    (place,) = read(kafka, orders)
    assert (str(raised.value.ids[0]), raised.value.topics) == (place.id, (orders.name,))


def test_a_topic_with_one_replica_is_warned_of_once(
    producer: Producer, orders: OrderTopic, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        producer.send(orders, Order(number=number))
    assert caplog.text.count(f"topic {orders.name} has one replica") == 1


# --- that every failure is heard --------------------------------------------------------------------------------------


def fail_soon(producer: Producer, make_orders: MakeOrders) -> Future[Sent]:
    narrow = make_orders(config={"max.message.bytes": "2000"})
    return producer.send_soon(narrow, Order(number=1, text=noise(5000)))


def test_a_failure_nobody_asked_for_is_raised_by_flush(producer: Producer, make_orders: MakeOrders) -> None:
    """Seen to fail (flush returns as if all were well) without `_raise_unheard`."""
    fail_soon(producer, make_orders)
    fail_soon(producer, make_orders)
    with pytest.raises(EncodeError) as raised:
        producer.flush()
    assert raised.value.__notes__ == ["2 messages of send_soon failed that nobody has asked about; this is the first."]
    producer.flush()


def test_a_failure_that_was_asked_for_is_not_raised_again(producer: Producer, make_orders: MakeOrders) -> None:
    asked, called = fail_soon(producer, make_orders), fail_soon(producer, make_orders)
    heard: list[object] = []
    called.add_done_callback(lambda future: heard.append(future.exception()))
    assert isinstance(asked.exception(30), EncodeError)
    producer.flush()
    assert isinstance(heard[0], EncodeError)


def test_close_waits_for_what_was_sent(make_producer: MakeProducer, kafka: Settings, orders: OrderTopic) -> None:
    """Seen to fail (messages given up) with `flush` taken out of `SendingClient.close`."""
    slow = kafka.model_copy(update={"kafka": {"linger.ms": "300"}})
    with make_producer(slow) as producer:
        futures = [producer.send_soon(orders, Order(number=n)) for n in range(100)]
    assert all(future.done() for future in futures)
    assert numbers(kafka, orders) == list(range(100))
    producer.close()


def test_close_raises_what_nobody_asked_for(make_producer: MakeProducer, make_orders: MakeOrders) -> None:
    with pytest.raises(EncodeError), make_producer() as producer:
        fail_soon(producer, make_orders)

    def both() -> None:
        with make_producer() as producer:
            fail_soon(producer, make_orders)
            raise LookupError

    with pytest.raises(LookupError) as raised:
        both()
    assert "max.message.bytes" in raised.value.__notes__[0]


def test_a_message_cannot_be_called_back(producer: Producer, orders: OrderTopic) -> None:
    """Seen to fail (the client's thread meets InvalidStateError) without `set_running_or_notify_cancel`."""
    future = producer.send_soon(orders, Order(number=1))
    assert not future.cancel()
    assert future.result(30).topic == orders.name


def test_a_callback_that_raises_harms_no_other(producer: Producer, orders: OrderTopic, kafka: Settings) -> None:
    producer.send_soon(orders, Order(number=1)).add_done_callback(lambda _: 1 / 0)  # type: ignore[arg-type, return-value]
    assert producer.send(orders, Order(number=2)).topic == orders.name
    assert numbers(kafka, orders) == [1, 2]


def test_a_callback_that_would_wait_for_itself_is_refused(producer: Producer, orders: OrderTopic) -> None:
    """Seen to fail (hangs) without `_refuse_own_thread`."""
    heard: list[BaseException] = []
    done = threading.Event()

    def again(_: Future[Sent]) -> None:
        try:
            producer.send(orders, Order(number=2))
        except Permanent as error:
            heard.append(error)
        done.set()

    producer.send_soon(orders, Order(number=1)).add_done_callback(again)
    assert done.wait(30)
    assert "wait for the thread that it runs on" in str(heard[0])


# --- processes --------------------------------------------------------------------------------------------------------


def test_used_after_close(make_producer: MakeProducer, orders: OrderTopic) -> None:
    producer = make_producer()
    producer.close()
    with pytest.raises(Permanent, match="is closed; nothing was sent"):
        producer.send(orders, Order(number=1))
    with pytest.raises(Permanent, match="is closed"):
        producer.transaction()


PROGRAM = """
import os, sys
from eoframework import Producer, Topic
from eoframework.errors import Permanent
from eoframework.kafka.admin import Admin

topic = Topic(sys.argv[2], dict[str, int])
producer = Producer()
{body}
"""


def run(kafka: Settings, topic: str, body: str) -> str:
    """What a program with a Producer prints; its exit code must be 0."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body), "", topic],
        cwd=REPOSITORY,
        env=environment(EO_KAFKA_BOOTSTRAP_SERVERS=kafka.require_bootstrap_servers(), EO_KAFKA_LINGER_MS="200"),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_used_after_fork(kafka: Settings, orders: OrderTopic) -> None:
    """The child is told, and its end neither hangs nor waits for the parent's messages.

    Seen to fail (the child hangs in `send`) without the comparison of processes in `_check_usable`.
    """
    body = """
producer.send(topic, {"number": 1})
producer.send_soon(topic, {"number": 2})
child = os.fork()
if not child:
    for use in (lambda: producer.send(topic, {"number": 3}, timeout=5), producer.transaction, producer.close):
        try:
            use()
        except Permanent as error:
            print(error, flush=True)
    sys.exit(0)
_, status = os.waitpid(child, 0)
print("child ended with", status)
"""
    said = run(kafka, orders.name, body)
    assert said.count("is used in its fork") == 3
    assert "child ended with 0" in said
    assert numbers(kafka, orders) == [1, 2]


def test_opened_only_in_the_fork(kafka: Settings, orders: OrderTopic) -> None:
    body = """
if not os.fork():
    producer.send(topic, {"number": 1})
    sys.exit(0)
_, status = os.wait()
sys.exit(status)
"""
    run(kafka, orders.name, body)
    assert numbers(kafka, orders) == [1]


def test_the_end_of_the_process_waits(kafka: Settings, orders: OrderTopic) -> None:
    """Seen to fail (0 messages) without `atexit.register`."""
    run(kafka, orders.name, "for n in range(50): producer.send_soon(topic, {'number': n})")
    assert numbers(kafka, orders) == list(range(50))


def test_a_failure_at_the_end_of_the_process_is_logged(kafka: Settings, make_orders: MakeOrders) -> None:
    narrow = make_orders(config={"max.message.bytes": "300"})
    said = run(kafka, narrow.name, "producer.send_soon(topic, {f'n{n}{os.urandom(9).hex()}': n for n in range(200)})")
    assert "at the end of the process" in said
    assert "300 are allowed" in said


def test_nothing_is_left_of_a_closed_producer(make_producer: MakeProducer, orders: OrderTopic) -> None:
    before = threading.active_count()
    for _ in range(3):
        producer = make_producer()
        producer.send(orders, Order(number=1))
        producer.close()
    eventually(lambda: threading.active_count() <= before, "its threads end", seconds=10)
