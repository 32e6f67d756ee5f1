"""A transform's worker stepped by hand on the real broker, and independent readers of what it sent."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from confluent_kafka import Consumer, Message, Producer, TopicPartition
from pydantic import BaseModel

from eoframework import App, Topic, clock
from eoframework.errors import Retryable
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from eoframework.transform.mark import Mark
from eoframework.transform.worker import TransformWorker
from tests.processes import patiently

NEVER = 3600.0
"""A pause that no test waits for."""


class Grain(BaseModel):
    n: int


class Flour(BaseModel):
    n: int
    text: str = ""


class Mill:
    """Grain in, flour out: topics of this test, one transform named "grind", its worker."""

    def __init__(self, settings: Settings, *, partitions: int = 1, config: dict[str, str] | None = None) -> None:
        self.settings = settings
        self.admin = Admin(settings)
        mark = uuid.uuid4().hex[:8]
        self.app = App(f"mill{mark}", settings=settings)
        self.grain: Topic[Grain] = Topic(f"grain.{mark}", Grain)
        self.flour: Topic[Flour] = Topic(f"flour.{mark}", Flour)
        self.letters = f"{self.app.name}.grind.dlt"
        self.group = f"{self.app.name}.grind"
        self.worker: TransformWorker | None = None
        for name, of in ((self.grain.name, partitions), (self.flour.name, partitions), (self.letters, 1)):
            self.admin.create(name, partitions=of, replicas=1, config=config or {} if name == self.flour.name else {})

    def pour(self, numbers: Iterable[int], *, partition: int = 0, key: bytes | None = b"k") -> None:
        self.pour_raw([Grain(n=n).model_dump_json().encode() for n in numbers], partition=partition, key=key)

    def pour_raw(self, values: Iterable[bytes], *, partition: int = 0, key: bytes | None = b"k") -> None:
        producer = Producer({"bootstrap.servers": self.settings.require_bootstrap_servers()})
        for value in values:
            producer.produce(self.grain.name, value, key, partition)
        assert producer.flush(20) == 0

    # --- the worker ---

    def start(self, **changes: Any) -> TransformWorker:
        """A new worker, as after a restart of the process."""
        self.stop()
        settings = self.settings.model_copy(update={"max_wait": 0.1, **changes})
        worker = TransformWorker(
            self.app.transforms[0], app=self.app, settings=settings, admin=self.admin, stop=threading.Event()
        )
        # As `lifecycle.run` does it: a broker that has just been started still loads its coordinators.
        patiently(worker.start, trouble=Retryable, seconds=30)
        self.worker = worker
        return worker

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def run_until(self, condition: Callable[[], bool], *, within: float = 30, **changes: Any) -> None:
        """Step the worker until the condition holds."""
        worker = self.worker or self.start(**changes)
        deadline = clock.monotonic() + within
        while not condition():
            assert clock.monotonic() < deadline, f"not within {within:g} s: {self.ground()}, offsets {self.offsets()}"
            worker.step()

    def run_to(self, offset: int, *, partition: int = 0, **options: Any) -> None:
        """Until the group's offset is there."""
        self.run_until(lambda: self._is_at(partition, offset), **options)

    def _is_at(self, partition: int, offset: int) -> bool:
        try:
            return self.offset(partition) == offset
        except Retryable:
            # A transaction that has not ended may still move it: "not yet", as long as that takes.
            return False

    # --- what Kafka says ---

    def offsets(self) -> dict[int, tuple[int, str]]:
        return self.admin.group_offsets(self.group, self.grain.name)

    def offset(self, partition: int = 0) -> int | None:
        return self.offsets().get(partition, (None, ""))[0]

    def mark(self, partition: int = 0) -> Mark:
        return Mark.decode(self.offsets()[partition][1])

    def ground(self) -> list[int]:
        """What came out, as a read_committed reader sees it, by partition and in order."""
        return [Flour.model_validate_json(m.value() or b"").n for m in self.read(self.flour.name)]

    def dead(self) -> list[bytes | None]:
        return [m.value() for m in self.read(self.letters)]

    def read(self, topic: str, *, isolation: str = "read_committed") -> list[Message]:
        return list(read(self.settings, topic, isolation=isolation))


def read(settings: Settings, topic: str, *, isolation: str = "read_committed") -> Iterable[Message]:
    """Everything a plain consumer sees in the topic, partition by partition, up to the end of the log.

    To the log's end, not the client's "end of partition": that is where the oldest open transaction begins, and one
    that was committed a moment ago may still be open there.
    """
    config = {"bootstrap.servers": settings.require_bootstrap_servers(), "fetch.wait.max.ms": 20}
    ends = _ends(config, topic)
    consumer = Consumer({**config, "group.id": f"reader-{uuid.uuid4()}", "isolation.level": isolation})
    try:
        for partition, end in ends.items():
            consumer.assign([TopicPartition(topic, partition, 0)])
            deadline = clock.monotonic() + 20
            while consumer.position([TopicPartition(topic, partition)])[0].offset < end:
                message = consumer.poll(0.05)
                assert clock.monotonic() < deadline, f"{topic}[{partition}] cannot be read up to {end}"
                if message is not None:
                    assert message.error() is None, message.error()
                    yield message
    finally:
        consumer.close()


def _ends(config: dict[str, Any], topic: str) -> dict[int, int]:
    consumer = Consumer({**config, "group.id": "ends", "isolation.level": "read_uncommitted"})
    try:
        found = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        ends = {p: consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=10) for p in sorted(found)}
    finally:
        consumer.close()
    return {partition: at[1] for partition, at in ends.items() if at is not None and at[1] > at[0]}
