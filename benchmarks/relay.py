"""The relay against a hand-written loop that does the same without exactly-once: rows per second, and latency.

    eo dev run -- python -m benchmarks.relay [--rows 50000] [--rate 500] [--seconds 8]

Both drain the same rows (256 bytes, 1,000 keys) from the same server to the same broker, in the same run. The
hand-written loop has a table of its own with the one index it needs; it selects, produces with an idempotent producer,
flushes and deletes: a crash between flush and delete publishes a batch twice, two of them publish everything twice.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import uuid
from dataclasses import dataclass

import psycopg
from confluent_kafka import Consumer, Producer, TopicPartition
from sqlalchemy import Connection, create_engine, make_url, text

from eoframework import clock, lifecycle
from eoframework.checkpoint import checkpoint_topic
from eoframework.db import migrating
from eoframework.db.outbox import Outbox
from eoframework.db.session import Database, open_database
from eoframework.kafka.admin import Admin
from eoframework.message import OutboxMessage, new_id
from eoframework.relay import RelayWorker
from eoframework.schema import Schema
from eoframework.settings import Settings

_BY_HAND = """CREATE TABLE by_hand (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id uuid, topic text, key bytea, payload bytea)"""
_MOVE = """WITH gone AS (DELETE FROM eo.outbox_message RETURNING *)
    INSERT INTO by_hand (id, topic, key, payload) SELECT id, topic, key, payload FROM gone ORDER BY seq"""


@dataclass(frozen=True)
class Bench:
    """A database and a topic of this run."""

    database: Database
    settings: Settings
    topic: str

    def fill_by_hand(self, rows: int) -> None:
        self.fill(rows)
        with self.database.begin("filling the table of the hand-written loop") as connection:
            connection.execute(text(_MOVE))

    def fill(self, rows: int) -> None:
        outbox = Outbox(self.database.schema)
        for start in range(0, rows, 5000):
            batch = [self.message(number) for number in range(start, min(start + 5000, rows))]
            with self.database.begin("filling the outbox") as connection:
                outbox.insert(connection, batch)

    def message(self, number: int) -> OutboxMessage:
        return OutboxMessage(
            id=new_id(),
            topic=self.topic,
            key=f"key-{number % 1000}".encode(),
            payload=b"x" * 256,
            type="bench",
            source="bench",
            content_type="application/octet-stream",
        )

    def left(self) -> int:
        with self.database.begin("counting") as connection:
            return int(connection.execute(text("SELECT count(*) FROM eo.outbox_message")).scalar_one())


def drain_with_relay(bench: Bench, mode: str) -> float:
    """Seconds until the outbox is empty, start-up of the relay's producers included."""
    settings = bench.settings.model_copy(update={"relay_mode": mode})
    started = clock.monotonic()
    code = lifecycle.run([RelayWorker(bench.database, settings)], stop=threading.Event(), once=True)
    assert code == 0
    assert bench.left() == 0
    return clock.monotonic() - started


def drain_by_hand(bench: Bench, batch: int) -> float:
    """The loop that people write."""
    started = clock.monotonic()
    stop = threading.Event()
    hand_written_relay(bench, batch, stop, once=True)
    return clock.monotonic() - started


def hand_written_relay(bench: Bench, batch: int, stop: threading.Event, *, once: bool) -> None:
    producer = Producer(
        {
            "bootstrap.servers": bench.settings.require_bootstrap_servers(),
            "enable.idempotence": True,
            "linger.ms": 5,
        }
    )
    url = make_url(bench.settings.require_database_url()).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as connection:
        while not stop.is_set():
            rows = connection.execute(
                "SELECT seq, id, topic, key, payload FROM by_hand ORDER BY seq LIMIT %s", [batch]
            ).fetchall()
            if not rows and once:
                return
            if not rows:
                clock.wait(stop, 0.001)
                continue
            for _, message_id, topic, key, payload in rows:
                producer.produce(topic, payload, key, headers=[("message-id", str(message_id).encode())])
            producer.flush()
            connection.execute("DELETE FROM by_hand WHERE seq = ANY(%s)", [[row[0] for row in rows]])


def latencies(bench: Bench, rate: int, seconds: float, *, by_hand: bool) -> list[float]:
    """Milliseconds from the writer's COMMIT to a read_committed consumer, at `rate` transactions a second."""
    committed: dict[str, float] = {}
    arrived: dict[str, float] = {}
    stop, drained = threading.Event(), threading.Event()
    reader = threading.Thread(target=read, args=(bench, arrived, drained))
    reader.start()
    relay = threading.Thread(target=run_relay, args=(bench, stop), kwargs={"by_hand": by_hand})
    relay.start()
    write(bench, committed, count=rate, rate=rate, by_hand=by_hand)  # warm-up, forgotten
    committed.clear()
    write(bench, committed, count=int(rate * seconds), rate=rate, by_hand=by_hand)
    deadline = clock.monotonic() + 15
    while not committed.keys() <= arrived.keys() and clock.monotonic() < deadline:
        clock.sleep(0.05)
    stop.set()
    drained.set()
    relay.join()
    reader.join()
    return sorted((arrived[name] - when) * 1000 for name, when in committed.items())


def run_relay(bench: Bench, stop: threading.Event, *, by_hand: bool) -> None:
    if by_hand:
        hand_written_relay(bench, 500, stop, once=False)
    else:
        lifecycle.run([RelayWorker(bench.database, bench.settings)], stop=stop)


def write(bench: Bench, committed: dict[str, float], *, count: int, rate: int, by_hand: bool) -> None:
    outbox = Outbox(bench.database.schema)
    due = clock.monotonic()
    for number in range(count):
        due += 1 / rate
        clock.sleep(max(due - clock.monotonic(), 0))
        message = bench.message(number)
        with bench.database.begin("writing") as connection:
            if by_hand:
                insert_by_hand(connection, message)
            else:
                outbox.insert(connection, [message])
        committed[str(message.id)] = clock.monotonic()


def insert_by_hand(connection: Connection, message: OutboxMessage) -> None:
    statement = "INSERT INTO by_hand (id, topic, key, payload) VALUES (:id, :topic, :key, :payload)"
    values = {"id": message.id, "topic": message.topic, "key": message.key, "payload": message.payload}
    connection.execute(text(statement), values)


def read(bench: Bench, arrived: dict[str, float], drained: threading.Event) -> None:
    consumer = Consumer(
        {
            "bootstrap.servers": bench.settings.require_bootstrap_servers(),
            "group.id": f"bench-{uuid.uuid4()}",
            "isolation.level": "read_committed",
            "fetch.wait.max.ms": 5,
        }
    )
    consumer.assign([TopicPartition(bench.topic, partition, 0) for partition in range(4)])
    while not drained.is_set():
        # consume(n, t) alone would wait all of t for the n-th.
        first = consumer.poll(0.05)
        for message in [first, *consumer.consume(499, 0)] if first is not None else []:
            if message.error() is None:
                arrived.setdefault(bytes(dict(message.headers() or [])["message-id"]).decode(), clock.monotonic())
    consumer.close()


def percentile(values: list[float], share: float) -> float:
    return values[min(int(len(values) * share), len(values) - 1)]


def open_bench(settings: Settings) -> Bench:
    """A database of this run's own on the configured server, and a topic."""
    name = f"eo_bench_{uuid.uuid4().hex[:8]}"
    url = make_url(settings.require_database_url())
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    engine.dispose()
    own = url.set(database=name).render_as_string(hide_password=False)
    database = open_database(own, Schema())
    migrating.upgrade(database)
    outbox_id = uuid.uuid4()
    with database.begin("naming the outbox") as connection:
        connection.execute(text("UPDATE eo.outbox SET id = :id"), {"id": outbox_id})
        connection.execute(text(_BY_HAND))
    admin = Admin(settings)
    admin.create(checkpoint_topic(outbox_id), partitions=4, replicas=1, config={"cleanup.policy": "compact"})
    topic = f"bench.{uuid.uuid4().hex[:8]}"
    admin.create(topic, partitions=4, replicas=1, config={})
    return Bench(database, Settings.load(database_url=own), topic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rate", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    bench = open_bench(Settings.load())
    drains: dict[str, list[float]] = {"relay, transactional": [], "relay, idempotent": [], "by hand, 2000 rows": []}
    for _ in range(arguments.rounds):
        for name, taken in drains.items():
            if name.startswith("relay"):
                bench.fill(arguments.rows)
                taken.append(drain_with_relay(bench, name.split(", ")[1]))
            else:
                bench.fill_by_hand(arguments.rows)
                taken.append(drain_by_hand(bench, 2000))
    print(f"drain of {arguments.rows} rows, start-up included (median of {arguments.rounds}):")
    for name, taken in drains.items():
        print(f"  {name:22} {arguments.rows / statistics.median(taken):8.0f} rows/s")
    print(f"COMMIT to read_committed consumer at {arguments.rate} transactions/s:")
    for name, by_hand in (("relay, transactional", False), ("by hand", True)):
        values = latencies(bench, arguments.rate, arguments.seconds, by_hand=by_hand)
        print(f"  {name:22} p50 {percentile(values, 0.5):6.1f} ms   p99 {percentile(values, 0.99):6.1f} ms")


if __name__ == "__main__":
    main()
