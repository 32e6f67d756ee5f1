"""A partition that waits for its claim is started later; what the broker says late must not move it then."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer

from eoframework.kafka.config import consumer_config
from eoframework.kafka.consumer import GroupConsumer
from eoframework.settings import Settings
from tests.conftest import MakeTopic
from tests.kafka_proxy import KafkaProxy
from tests.processes import eventually

_LIST_OFFSETS = 2
_PROTOCOLS = {
    "consumer": {"group.protocol": "consumer"},
    "cooperative": {"group.protocol": "classic", "partition.assignment.strategy": "cooperative-sticky"},
    "eager": {"group.protocol": "classic", "partition.assignment.strategy": "range"},
}


class SlowToList(KafkaProxy):
    """The broker is busy: where a partition ends it says only after `tell`."""

    def __init__(self, broker: tuple[str, int]) -> None:
        self.tell = threading.Event()
        self.listed = 0
        super().__init__(broker)

    def answered(self, key: int) -> None:
        if key == _LIST_OFFSETS:
            self.listed += 1
            self.tell.wait(30)


class Counting:
    """The real client, and how many records it has handed out."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self.records = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)

    def poll(self, seconds: float) -> Any:
        message = self._consumer.poll(seconds)
        self.records += message is not None and message.error() is None
        return message

    def consume(self, limit: int, seconds: float) -> Any:
        messages = self._consumer.consume(limit, seconds)
        self.records += sum(message.error() is None for message in messages)
        return messages


@pytest.fixture
def broker(settings: Settings) -> Iterator[SlowToList]:
    host, _, port = settings.require_bootstrap_servers().rpartition(":")
    proxy = SlowToList((host, int(port)))
    yield proxy
    proxy.tell.set()
    proxy.close()


def member(settings: Settings, topic: str, change: dict[str, Any]) -> GroupConsumer:
    """A member that is to wait with whatever it is given."""
    config = consumer_config(settings, group=f"late-{uuid.uuid4().hex[:8]}", client_id="late")
    small = {"max.partition.fetch.bytes": 500, "queued.min.messages": 10, "fetch.queue.backoff.ms": 10}
    return GroupConsumer(config | small | change, topic, on_assigned=dict.fromkeys, on_revoked=lambda _: None)


def fill(settings: Settings, topic: str) -> None:
    """200 records, ten to a batch: the client has those of a few batches before it asks once more."""
    producer = Producer({"bootstrap.servers": settings.require_bootstrap_servers(), "batch.num.messages": 10})
    for n in range(200):
        producer.produce(topic, b"%d" % n)
    assert producer.flush(30) == 0


@pytest.mark.parametrize("protocol", _PROTOCOLS)
@pytest.mark.parametrize("start", [0, 150])
def test_nothing_is_skipped(
    protocol: str, start: int, broker: SlowToList, settings: Settings, make_topic: MakeTopic
) -> None:
    """Found by the campaign, on an overloaded machine. Seen to fail with partitions assigned at OFFSET_END until they
    are started: the client asks where that is, and when the answer comes late it goes there from wherever it was
    started meanwhile. And with the rewind of `_ours` taken out: it reads the log from its beginning.
    """
    topic = make_topic(partitions=1)
    fill(settings, topic)
    through = settings.model_copy(update={"kafka_bootstrap_servers": broker.address})
    consumer = member(through, topic, _PROTOCOLS[protocol])

    def waits() -> bool:
        assert not consumer.fetch(10, 0.1)
        return consumer.assigned() == {0}

    try:
        eventually(waits, "it is given the partition", seconds=30)
        for _ in range(5):
            assert waits()
        consumer._consumer = handed = Counting(consumer._consumer)  # type: ignore[assignment]
        consumer.start(0, start)
        broker.tell.set()
        found: list[int] = []

        def all_there() -> bool:
            found.extend(one.offset for one in consumer.fetch(10, 0.1))
            return bool(found) and found[-1] == 199

        eventually(all_there, "it has read to the end", seconds=30)
        assert found == list(range(start, 200))
        assert handed.records - len(found) < 100, "it read from the beginning"
    finally:
        consumer.close({})
