"""What really happened, read from the database and from the topics by a plain read_committed consumer.

Nothing of eoframework is used to read the topics: a library that checked itself could be wrong twice in the same way.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from confluent_kafka import Consumer, KafkaError, TopicPartition
from sqlalchemy import Engine, text


@dataclass(frozen=True)
class Entry:
    """One order as it appears somewhere."""

    order_id: int
    sku: str
    number: int


@dataclass(frozen=True)
class Row:
    """One line of the table: how a place compares with the orders that were committed."""

    place: str
    found: int
    lost: int
    doubled: int
    reordered: int

    @property
    def clean(self) -> bool:
        return self.lost == self.doubled == self.reordered == 0


def compare(place: str, sent: Iterable[Entry], found: Iterable[Entry]) -> Row:
    """Hold what was found, in the order it was found, against what was sent."""
    wanted, seen = {entry.order_id for entry in sent}, list(found)
    counts = Counter(entry.order_id for entry in seen)
    doubled = sum(count - 1 for count in counts.values()) + len(counts.keys() - wanted)
    return Row(place, len(seen), len(wanted - counts.keys()), doubled, _reordered(seen))


def _reordered(entries: Iterable[Entry]) -> int:
    """How many entries stand behind a later one of their own key."""
    last: dict[str, int] = {}
    wrong = 0
    for entry in entries:
        wrong += entry.number < last.get(entry.sku, 0)
        last[entry.sku] = max(entry.number, last.get(entry.sku, 0))
    return wrong


def from_table(engine: Engine, table: str, *, id_column: str = "order_id") -> list[Entry]:
    """The rows of a table in the order they were written."""
    with engine.connect() as connection:
        rows = connection.execute(text(f"SELECT {id_column}, sku, number FROM {table} ORDER BY id"))
        return [Entry(*row) for row in rows]


def stock_taken(engine: Engine) -> tuple[int, int]:
    """The sum by which stock went down, and the sum of the quantities ordered: equal if every order counted once."""
    with engine.connect() as connection:
        taken = connection.scalar(text("SELECT coalesce(sum(1000000 - free), 0) FROM shop_item"))
        ordered = connection.scalar(text("SELECT coalesce(sum(qty), 0) FROM shop_order"))
    return int(taken or 0), int(ordered or 0)


def from_topic(bootstrap_servers: str, topic: str) -> list[Entry]:
    """Every committed record of the topic, partition by partition, each read to its end."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "reconciliation",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "enable.partition.eof": True,
        }
    )
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
        return _read_to_end(consumer, set(partitions))
    finally:
        consumer.close()


def _read_to_end(consumer: Consumer, open_partitions: set[int]) -> list[Entry]:
    found: dict[int, list[Entry]] = {partition: [] for partition in open_partitions}
    while open_partitions:
        for message in consumer.consume(1000, 1.0):
            partition = message.partition() or 0
            error = message.error()
            if error is None:
                found[partition].append(_entry(message.value() or b""))
            elif error.code() == KafkaError._PARTITION_EOF:
                open_partitions.discard(partition)
            else:
                raise RuntimeError(f"the reconciliation reader failed: {error}")
    return [entry for partition in sorted(found) for entry in found[partition]]


def _entry(value: bytes | str) -> Entry:
    payload = json.loads(value)
    return Entry(payload["order_id"], payload["sku"], payload["number"])
