"""The hand-written transactional loop that `benchmarks.transform` compares with, alone in its process.

It takes the group's metadata right after the poll, and replaces its producer after a slow commit: the same quarantine
as ours. Its ids are cheaper than ours: partition and offset only. It does not go on after an error (a message that
cannot be read, a rebalance, a fenced producer: it ends), retry, keep dead letters, notice lost offsets or a topic made
anew, check sizes, keys, headers or what is no `Booked`, or stop on SIGTERM.

Nothing of eoframework is imported here: its process should be as small as theirs who write such a loop.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition
from pydantic import BaseModel

BATCH = 5000
QUARANTINE = 0.05

Headers = list[tuple[str, str | bytes | None]]


class Deposit(BaseModel):
    n: int
    account: str
    amount: int


class Booked(BaseModel):
    n: int
    account: str
    total: int


def book(deposit: Deposit) -> Booked:
    return Booked(n=deposit.n, account=deposit.account, total=deposit.amount * 2)


class ByHand:
    """What a careful engineer writes."""

    def __init__(self, servers: str, protocol: str, name: str, source: str, target: str) -> None:
        self.servers, self.name, self.source, self.target = servers, name, source, target
        self.consumer = Consumer(
            {
                "bootstrap.servers": servers,
                "group.id": name,
                "group.protocol": protocol,
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
                "check.crcs": True,
            }
        )
        self.consumer.subscribe([source])
        self.producer = self.open_producer()

    def open_producer(self) -> Producer:
        producer = Producer(
            {
                "bootstrap.servers": self.servers,
                "transactional.id": self.name,
                "transaction.timeout.ms": 5000,
                "message.timeout.ms": 4000,
                "linger.ms": 5,
                "retry.backoff.ms": 100,
                "partitioner": "murmur2_random",
                "delivery.report.only.error": True,
            }
        )
        producer.init_transactions(15)
        return producer

    def run(self, messages: int, send: Callable[[list[Any]], None], usage: Usage) -> None:
        """`messages` of them, in transactions of BATCH."""
        while usage.seen < messages:
            first = self.consumer.poll(1)
            if first is None:
                continue
            batch = [first, *self.consumer.consume(BATCH - 1, 0.1)]
            membership = self.consumer.consumer_group_metadata()
            usage.seen += len(batch)
            self.producer.begin_transaction()
            send(batch)
            self.commit(batch, membership)
            usage.mark()
        self.consumer.close()

    def commit(self, batch: list[Any], membership: Any) -> None:
        ends = {message.partition(): message.offset() for message in batch}
        self.producer.flush()
        started = time.monotonic()
        offsets = [TopicPartition(self.source, partition, last + 1) for partition, last in ends.items()]
        self.producer.send_offsets_to_transaction(offsets, membership, 15)
        offsets_sent = time.monotonic()
        self.producer.commit_transaction(15)
        if max(offsets_sent - started, time.monotonic() - offsets_sent) >= QUARANTINE:
            self.producer = self.open_producer()

    def send(self, batch: list[Any]) -> None:
        """With the headers that eoframework writes."""
        produce, target = self.producer.produce, self.target
        always: Headers = [("ce_specversion", b"1.0"), ("ce_source", self.name.encode()), ("ce_type", b"Booked")]
        always += [("ce_time", datetime.now(UTC).isoformat().encode()), ("content-type", b"application/json")]
        for message in batch:
            if message.error() is not None:
                raise SystemExit(f"by hand: {message.error()}")
            booked = book(Deposit.model_validate_json(message.value()))
            identity = b"01900000-0000-7000-80%02x-%012x" % (message.partition(), message.offset())
            headers = [*always, ("ce_id", identity), ("message-id", identity)]
            for name, value in message.headers() or ():
                if name == "traceparent":
                    headers.append((name, value))
            produce(target, booked.model_dump_json(), message.key(), headers=headers)

    def send_bare(self, batch: list[Any]) -> None:
        """Without any headers."""
        produce, target = self.producer.produce, self.target
        for message in batch:
            if message.error() is not None:
                raise SystemExit(f"by hand: {message.error()}")
            booked = book(Deposit.model_validate_json(message.value()))
            produce(target, booked.model_dump_json(), message.key())


@dataclass
class Usage:
    """Processor time per message between the first commit and the last, and the most memory ever used."""

    seen: int = 0
    """Messages fetched so far."""
    marks: list[tuple[int, float]] = field(default_factory=list)

    def mark(self) -> None:
        """A transaction was committed."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        self.marks.append((self.seen, used.ru_utime + used.ru_stime))

    def tell(self) -> None:
        """Print it as JSON."""
        (first, began), (last, ended) = self.marks[0], self.marks[-1]
        cpu = (ended - began) / max(last - first, 1) * 1e6
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"cpu": cpu, "rss": peak, "transactions": len(self.marks)}))


def main() -> None:
    kind, servers, protocol, name, source, target, messages = sys.argv[1:]
    usage = Usage()
    loop = ByHand(servers, protocol, name, source, target)
    loop.run(int(messages), loop.send_bare if kind == "hand/bare" else loop.send, usage)
    usage.tell()


if __name__ == "__main__":
    main()
