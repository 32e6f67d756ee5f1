"""`eo` processes under test, plain producers and readers, and waiting for conditions with a deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

from eoframework.settings import Settings

REPOSITORY = Path(__file__).resolve().parent.parent

Value = TypeVar("Value")


class Eo:
    """One `eo` process; its output is kept for the failure message."""

    def __init__(self, *arguments: str, environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "eoframework.cli", *arguments],
                env={**os.environ, **environment},
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 60) -> int:
        """The exit code; -9 after SIGKILL."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}") from error

    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self, timeout: float = 60) -> int:
        """SIGTERM and wait."""
        if self.running():
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> None:
        if self.running():
            self.signal(signal.SIGKILL)
        self._process.wait(10)

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]


@contextmanager
def eo_process(*arguments: str, environment: dict[str, str], log: Path) -> Iterator[Eo]:
    """A process that is gone at the end of the block, however it ends."""
    process = Eo(*arguments, environment=environment, log=log)
    try:
        yield process
    finally:
        process.kill()


def settings_environment(settings: Settings, **more: str) -> dict[str, str]:
    """The settings a child process needs to reach this test's database and broker."""
    return {
        "EO_DATABASE_URL": settings.require_database_url(),
        "EO_KAFKA_BOOTSTRAP_SERVERS": settings.require_bootstrap_servers(),
        **more,
    }


def eventually(
    condition: Callable[[], Any], what: str, *, seconds: float = 90, log: Path | Callable[[], str] | None = None
) -> Any:
    """Wait until the condition is true and return its value; the deadline is only there to end a broken run."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}{_end_of(log)}")


def _end_of(log: Path | Callable[[], str] | None) -> str:
    if isinstance(log, Path):
        return f"\n{log.read_text(errors='replace')[-6000:]}" if log.exists() else ""
    return f"\n{log()}" if log is not None else ""


def patiently(attempt: Callable[[], Value], *, trouble: type[Exception], seconds: float) -> Value:
    """What the attempt returns; with this trouble it is made again, until the deadline: then the trouble is raised."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return attempt()
        except trouble:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


Sending = tuple[bytes | None, bytes | None] | tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]


def produce(bootstrap_servers: str, topic: str, messages: Iterable[Sending], *, partition: int = -1) -> None:
    """Send with a plain producer and wait for every acknowledgement."""
    producer = Producer({"bootstrap.servers": bootstrap_servers, "enable.idempotence": True, "linger.ms": 1})
    failures: list[KafkaError] = []
    for message in messages:
        key, value, headers = (*message, [])[:3]
        producer.produce(
            topic,
            key=key,
            value=value,
            headers=headers,
            partition=partition,
            on_delivery=lambda error, _: failures.append(error) if error else None,
        )
        producer.poll(0)
    assert producer.flush(30) == 0
    assert not failures, failures


_MARKERS_WITHIN = 2.0


def read_topic(bootstrap_servers: str, topic: str, *, isolation: str = "read_committed") -> list[Message]:
    """Everything in the topic, partition by partition, read by a plain consumer.

    A partition ends for it where the oldest open transaction begins: for a moment that is also before one whose commit
    has been confirmed, so an end before the log's own is waited at, for as long as such a moment may last.
    """
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": f"reader-{os.getpid()}",
            "isolation.level": isolation,
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "enable.partition.eof": True,
            # That a partition ends is said with an answer that has nothing in it, and those are waited for one by one.
            "fetch.wait.max.ms": 10,
        }
    )
    try:
        waiting = set(consumer.list_topics(topic, timeout=10).topics[topic].partitions)
        found: dict[int, list[Message]] = {partition: [] for partition in waiting}
        consumer.assign([TopicPartition(topic, partition, 0) for partition in waiting])
        deadline = time.monotonic() + 60
        early: dict[int, float] = {}
        while waiting:
            now = time.monotonic()
            assert now < deadline, f"{topic} not read to its end: {waiting}"
            waiting -= {partition for partition, since in early.items() if now - since > _MARKERS_WITHIN}
            for message in consumer.consume(1000, 0.1):
                error = message.error()
                if error is None:
                    found[message.partition() or 0].append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    ended = TopicPartition(topic, message.partition() or 0)
                    if (message.offset() or 0) < consumer.get_watermark_offsets(ended, timeout=10)[1]:
                        early[ended.partition] = now
                    else:
                        waiting.discard(ended.partition)
                else:
                    raise AssertionError(f"reading {topic}: {error}")
        return [message for partition in sorted(found) for message in found[partition]]
    finally:
        consumer.close()


def contiguous(numbers: Sequence[int], count: int) -> bool:
    """0, 1, 2, ... each once and in order."""
    return list(numbers) == list(range(count))
