"""A load that never stops, whatever happens to the brokers, and when each of its outputs became visible."""

from __future__ import annotations

import threading
from collections.abc import Callable

from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

from eoframework import clock

# A frozen broker must not hold up those who measure for longer than those who are measured.
_PATIENCE = {"socket.timeout.ms": 2000, "reconnect.backoff.max.ms": 500, "log_level": 0}
_FLUSH_SECONDS = 90.0


class Load:
    """So many numbered items a second into a topic, each once: what is due while no broker takes it is sent later."""

    def __init__(self, servers: str, topic: str, make: Callable[[int], tuple[bytes, bytes]], *, rate: float) -> None:
        """`make` gives the key and the value of an item."""
        self.rate = rate
        self.due_at: list[float] = []
        """When each item was due: the time that latencies count from, also if it could not be sent then."""
        self.failures: list[KafkaError] = []
        self._topic = topic
        self._make = make
        self._producer = Producer(
            {
                "bootstrap.servers": servers,
                "enable.idempotence": True,
                "linger.ms": 1,
                "request.timeout.ms": 1500,
                "on_delivery": self._delivered,
                **_PATIENCE,
            }
        )
        self._stop = threading.Event()
        self._unsent = 0
        self._thread = threading.Thread(target=self._work, name="load")

    @property
    def sent(self) -> int:
        """How many items there are."""
        return len(self.due_at)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> int:
        """Have everything acknowledged; how many items there are in the topic."""
        self._stop.set()
        self._thread.join()
        assert not self._unsent, f"{self._unsent} items not acknowledged"
        assert not self.failures, self.failures
        return self.sent

    def abandon(self) -> None:
        """Send no more, and wait for nothing."""
        self._stop.set()
        self._producer.purge()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        started = clock.monotonic()
        while not self._stop.is_set():
            due = started + self.sent / self.rate
            early = due - clock.monotonic()
            if early > 0:
                self._producer.poll(min(early, 0.05))
                continue
            key, value = self._make(self.sent)
            # By the id a handler recognises an item that its producer repeats; a transform does not look at it.
            headers = [("message-id", str(self.sent).encode())]
            self._producer.produce(self._topic, value, key, headers=headers)
            self.due_at.append(due)
        self._unsent = self._producer.flush(_FLUSH_SECONDS)

    def _delivered(self, error: KafkaError | None, _: Message) -> None:
        if error is not None:
            self.failures.append(error)


class Watcher:
    """Reads a topic as it grows, committed records only, and notes when all outputs of each item had come."""

    def __init__(
        self,
        servers: str,
        topic: str,
        partitions: int,
        *,
        item_of: Callable[[bytes], int],
        outputs: Callable[[int], int],
    ) -> None:
        """`item_of` tells from an output's value the item that it is made of, `outputs` how many an item has."""
        self.whole_at: dict[int, float] = {}
        self.arrivals: list[float] = []
        self.failures: list[str] = []
        self.too_many: dict[int, list[tuple[int, int]]] = {}
        """Items with more outputs than they have: who sent them, the flow or the load twice, is to be found out."""
        self._outputs = outputs
        self._item_of = item_of
        self._came: dict[int, set[tuple[int, int]]] = {}
        self._visible = 0
        self._where = [TopicPartition(topic, partition, 0) for partition in range(partitions)]
        self._consumer = Consumer(
            {
                "bootstrap.servers": servers,
                "group.id": f"watcher-{topic}",
                "isolation.level": "read_committed",
                "auto.offset.reset": "error",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 20,
                **_PATIENCE,
            }
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watcher")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def visible(self) -> int:
        """Of all items before this one every output has come."""
        while self._visible in self.whole_at or not self._outputs(self._visible):
            self._visible += 1
        return self._visible

    def _work(self) -> None:
        self._consumer.assign(self._where)
        while not self._stop.is_set():
            # consume(n, t) alone would wait all of t for the n-th.
            first = self._consumer.poll(0.05)
            for message in [first, *self._consumer.consume(499, 0)] if first is not None else []:
                self._note(message)
        self._consumer.close()

    def _note(self, message: Message) -> None:
        error = message.error()
        if error is not None:
            # Others pass: a broker that is away is what this is about.
            if error.code() == KafkaError._AUTO_OFFSET_RESET:
                self.failures.append(error.str())
            return
        item, now = self._item_of(message.value() or b""), clock.monotonic()
        self.arrivals.append(now)
        came = self._came.setdefault(item, set())
        here = message.partition() or 0, message.offset() or 0
        if here in came:
            self.failures.append(f"item {item}: read twice at {here}")
        came.add(here)
        if len(came) == self._outputs(item):
            self.whole_at[item] = now
        elif len(came) > self._outputs(item):
            self.too_many[item] = sorted(came)
