"""What really happened, read from the database and from the topics by a plain read_committed consumer.

Nothing of eoframework is used to read the topics: a library that checked itself could be wrong twice in the same way.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from confluent_kafka import Consumer, KafkaError, TopicPartition
from sqlalchemy import Engine, text

Place = tuple[int, int]
"""Partition and offset."""


@dataclass(frozen=True)
class Entry:
    """One order as it appears somewhere."""

    order_id: int
    sku: str
    number: int
    attempt: int = 1
    """At which attempt its effect was committed."""


@dataclass
class Records:
    """What stands in a topic."""

    entries: list[Entry] = field(default_factory=list)
    unreadable: list[Place] = field(default_factory=list)


@dataclass(frozen=True)
class Letter:
    """A dead letter."""

    id: int
    consumer: str
    place: Place
    order_id: int | None
    """None where the payload cannot be read."""
    cause: str


@dataclass(frozen=True)
class Row:
    """One line of the table: how a place compares with the orders that were committed."""

    place: str
    found: int
    lost: int
    doubled: int
    reordered: int
    consumer: str = ""
    """The group whose effects these are; empty for a topic."""

    @property
    def clean(self) -> bool:
        return self.lost == self.doubled == self.reordered == 0


def compare(place: str, sent: Iterable[Entry], found: Iterable[Entry], *, consumer: str = "") -> Row:
    """Hold what was found, in the order it was found, against what was sent."""
    wanted, seen = {entry.order_id for entry in sent}, list(found)
    counts = Counter(entry.order_id for entry in seen)
    doubled = sum(count - 1 for count in counts.values()) + len(counts.keys() - wanted)
    return Row(place, len(seen), len(wanted - counts.keys()), doubled, _reordered(seen), consumer)


def _reordered(entries: Iterable[Entry]) -> int:
    """How many entries stand behind a later one of their own key."""
    last: dict[str, int] = {}
    wrong = 0
    for entry in entries:
        wrong += entry.number < last.get(entry.sku, 0)
        last[entry.sku] = max(entry.number, last.get(entry.sku, 0))
    return wrong


def wrong_about_dead(poison: Iterable[int], unreadable: Iterable[Place], dead: Sequence[Letter]) -> list[str]:
    """Each poison order and each unreadable record has one dead letter, and nothing else has one."""
    orders = [letter.order_id for letter in dead if letter.order_id is not None]
    places = [letter.place for letter in dead if letter.order_id is None]
    return _unequal("dead letters of orders", orders, poison) + _unequal(
        "dead letters of unreadable records", places, unreadable
    )


def wrong_about_replayed(dead: Sequence[Letter], replayed: Iterable[int], left: Sequence[Letter]) -> list[str]:
    """Each dead letter that an order can be read from was replayed once; the others stay, and nothing new died."""
    readable = [letter.id for letter in dead if letter.order_id is not None]
    stays = [letter.id for letter in dead if letter.order_id is None]
    return _unequal("replays", replayed, readable) + _unequal("dead letters left", (one.id for one in left), stays)


def wrong_about_effects(effects: Iterable[Entry], without: Iterable[int]) -> list[str]:
    """An order that is dead has no effect."""
    found = sorted({entry.order_id for entry in effects} & set(without))
    return [f"effects of dead orders: {found}"] if found else []


def wrong_about_attempts(place: str, effects: Iterable[Entry], failures: Callable[[int], int]) -> list[str]:
    """Each message took one attempt more than its handler failed: neither kills nor freezes nor a death count."""
    found = [entry.order_id for entry in effects if entry.attempt != failures(entry.order_id) + 1]
    return [f"{place}: wrong count of attempts for orders {found}"] if found else []


def _unequal(what: str, found: Iterable[object], wanted: Iterable[object]) -> list[str]:
    is_there, should_be = Counter(found), Counter(wanted)
    more, fewer = list((is_there - should_be).elements()), list((should_be - is_there).elements())
    return [f"{what}: too many {more}, missing {fewer}"] if more or fewer else []


def from_table(engine: Engine, table: str) -> list[Entry]:
    """The effects in a table, in the order they were written."""
    return _entries(engine, f"SELECT order_id, sku, number, attempt FROM {table} ORDER BY id")


def committed_orders(engine: Engine) -> list[Entry]:
    """What was sent."""
    return _entries(engine, "SELECT id, sku, number FROM shop_order ORDER BY id")


def _entries(engine: Engine, query: str) -> list[Entry]:
    with engine.connect() as connection:
        return [Entry(*row) for row in connection.execute(text(query))]


def watch_parking(engine: Engine) -> None:
    """From now on every parked message is noted in the transaction that parks it: its own row goes when it has run."""
    with engine.begin() as connection:
        connection.execute(
            text("""
            CREATE TABLE shop_parked (consumer_id integer, partition integer, "offset" bigint);
            CREATE FUNCTION shop_note_parked() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                INSERT INTO shop_parked SELECT consumer_id, partition, "offset" FROM parked; RETURN NULL;
            END $$;
            CREATE TRIGGER shop_note_parked AFTER INSERT ON eo.parked_message REFERENCING NEW TABLE AS parked
                FOR EACH STATEMENT EXECUTE FUNCTION shop_note_parked()""")
        )


def parked(engine: Engine) -> Counter[str]:
    """How many messages of each consumer have been parked so far."""
    query = "SELECT c.name, count(*) FROM shop_parked p JOIN eo.consumer c ON c.id = p.consumer_id GROUP BY c.name"
    with engine.connect() as connection:
        return Counter(dict(connection.execute(text(query)).tuples().all()))


def dead_letters(engine: Engine) -> list[Letter]:
    """The dead letters that there are."""
    query = """
        SELECT d.id, c.name, d.partition, d."offset", d.payload, d.cause
        FROM eo.dead_letter d JOIN eo.consumer c ON c.id = d.consumer_id ORDER BY d.id"""
    with engine.connect() as connection:
        rows = connection.execute(text(query))
        return [Letter(i, name, (p, o), _order_id(payload), cause) for i, name, p, o, payload, cause in rows]


def replayed(engine: Engine) -> list[int]:
    """The dead letters that were replayed, as the audit knows them."""
    query = "SELECT substring(subject FROM '[0-9]+$') FROM eo.audit WHERE action = 'dead.replay' ORDER BY id"
    with engine.connect() as connection:
        return [int(number) for number in connection.scalars(text(query))]


def stock_taken(engine: Engine) -> tuple[int, int]:
    """The sum by which stock went down, and the sum of the quantities ordered: equal if every order counted once."""
    with engine.connect() as connection:
        taken = connection.scalar(text("SELECT coalesce(sum(1000000 - free), 0) FROM shop_item"))
        ordered = connection.scalar(text("SELECT coalesce(sum(qty), 0) FROM shop_order"))
    return int(taken or 0), int(ordered or 0)


def from_topic(bootstrap_servers: str, topic: str) -> Records:
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


def _read_to_end(consumer: Consumer, open_partitions: set[int]) -> Records:
    found: dict[Place, bytes | str] = {}
    while open_partitions:
        for message in consumer.consume(1000, 1.0):
            partition = message.partition() or 0
            error = message.error()
            if error is None:
                found[partition, message.offset() or 0] = message.value() or b""
            elif error.code() == KafkaError._PARTITION_EOF:
                open_partitions.discard(partition)
            else:
                raise RuntimeError(f"the reconciliation reader failed: {error}")
    records = Records()
    for place, value in sorted(found.items()):
        try:
            payload = json.loads(value)
        except ValueError:
            records.unreadable.append(place)
        else:
            records.entries.append(Entry(payload["order_id"], payload["sku"], payload["number"]))
    return records


def _order_id(payload: bytes) -> int | None:
    try:
        return int(json.loads(payload)["order_id"])
    except ValueError:
        return None
