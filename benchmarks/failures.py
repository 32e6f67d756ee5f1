"""What failing messages cost the others: 1 % poison and a hot key that always fails, while 100 other keys flow.

    eo dev run -- python -m benchmarks.failures [--messages N] [--rounds N]

The same messages twice, in interleaved rounds: `clean`, where nothing fails, and `failing`, where every hundredth
message fails at each attempt (each with a key of its own) and so does every message of one hot key, another hundredth.
Counted is only what must flow: the messages of the 100 other keys, by the database's own clock, from the first
processed row to the last. A round counts only after these have had their effect once each, in the order of their keys,
and the failing ones none. The figure to quote is the paired ratio.
"""

from __future__ import annotations

import argparse
import statistics
import uuid

from confluent_kafka import Producer
from pydantic import BaseModel
from sqlalchemy import create_engine, text

from eoframework import App, Message, Retry, Topic, Tx, exponential
from eoframework.db import migrating
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from tests.consume.harness import make_app, running, scalar
from tests.processes import eventually

KEYS = 100
_LEDGER = (
    "CREATE TABLE IF NOT EXISTS flow (id bigint GENERATED ALWAYS AS IDENTITY, key text NOT NULL, n bigint NOT NULL)"
)
_INSERT = text("INSERT INTO flow (key, n) VALUES (:key, :n)")
_DONE = "SELECT count(*) FROM eo.processed_message WHERE message_id < '80000000-0000-0000-0000-000000000000'"
_RATE = """
SELECT sum(n) FILTER (WHERE at > first) / extract(epoch FROM max(at) - min(first)) FROM (
    SELECT processed_at AS at, count(*) AS n, min(min(processed_at)) OVER () AS first FROM eo.processed_message
    WHERE message_id < '80000000-0000-0000-0000-000000000000' GROUP BY processed_at) AS t
"""
_DISORDER = (
    "SELECT count(*) FROM (SELECT n < lag(n) OVER (PARTITION BY key ORDER BY id) AS back FROM flow) t WHERE back"
)


class Entry(BaseModel):
    n: int
    poison: bool


class Bench:
    """One broker, one database, one loaded topic."""

    def __init__(self, messages: int) -> None:
        self.settings = Settings.load()
        self.engine = create_engine(self.settings.require_database_url())
        self.database = App("bench", settings=self.settings).database
        migrating.upgrade(self.database)
        self.topic = f"bench.{uuid.uuid4().hex[:8]}"
        Admin(self.settings).create(self.topic, partitions=4, replicas=1, config={})
        with self.engine.begin() as connection:
            connection.execute(text(_LEDGER))
        self.flowing = self._load(messages)

    def _load(self, messages: int) -> int:
        producer = Producer({"bootstrap.servers": self.settings.require_bootstrap_servers(), "linger.ms": 20})
        flowing = 0
        for n in range(messages):
            key = {50: "hot", 99: f"poison-{n}"}.get(n % 100, f"key-{n % KEYS}")
            poison = n % 100 in {50, 99}
            flowing += not poison
            # The first bit tells them apart by their ids.
            identity = uuid.UUID(int=n + 1 + (poison << 127))
            value = Entry(n=n, poison=poison).model_dump_json()
            producer.produce(self.topic, value, key=key, headers=[("message-id", str(identity).encode())])
            producer.poll(0)
        producer.flush()
        return flowing

    def round(self, *, failing: bool) -> float:
        """Messages per second of those that must flow."""
        tables = "flow, eo.outbox_message, eo.processed_message, eo.position, eo.consumer"
        with self.engine.begin() as connection:
            connection.execute(text(f"TRUNCATE {tables} CASCADE"))
        app = make_app(self.settings, self.database)
        retry = Retry(attempts=4, backoff=exponential(0.2, 2))

        @app.handler(Topic(self.topic, Entry), name="flow", retry=retry, breaker=None)
        def flow(message: Message[Entry], tx: Tx) -> None:
            if failing and message.payload.poison:
                raise ValueError("it always fails")
            tx.session.execute(_INSERT, {"key": str(message.key), "n": message.payload.n})

        with running(app) as run:
            eventually(lambda: scalar(self.engine, _DONE) == self.flowing, "all that flows is processed", seconds=300)
            assert run.end() == 0
        self._verify()
        return float(scalar(self.engine, _RATE))

    def _verify(self) -> None:
        effects = scalar(self.engine, "SELECT count(*) FROM flow WHERE n % 100 NOT IN (50, 99)")
        distinct = scalar(self.engine, "SELECT count(DISTINCT n) FROM flow")
        total = scalar(self.engine, "SELECT count(*) FROM flow")
        if effects != self.flowing or distinct != total or scalar(self.engine, _DISORDER):
            raise SystemExit(
                f"INVALID: effects {effects} of {self.flowing}, distinct {distinct} of {total}, or disorder"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    bench = Bench(options.messages)
    ratios: list[float] = []
    for number in range(options.rounds):
        rates: dict[bool, float] = {}
        for failing in (number % 2 == 0, number % 2 == 1):
            rates[failing] = bench.round(failing=failing)
            print(
                f"round {number + 1}  {'failing' if failing else 'clean':<8} {rates[failing]:8.0f} messages/s",
                flush=True,
            )
        ratios.append(rates[True] / rates[False])
    print(f"\nwhat flows, failing / clean: {statistics.median(ratios):.2f} (median of {len(ratios)} paired ratios)")


if __name__ == "__main__":
    main()
