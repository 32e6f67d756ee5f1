"""Messages per second through a handler, against hand-written loops doing the same work.

    eo dev run -- python -m benchmarks.consume [--messages N] [--rounds N]

Measured by the database's own clock, from the first processed row to the last, so start-up and shut-down count for
nobody. Every contender: 4 partitions, one process, batches of 500, an UPDATE, a processed-message row and
an outbox row per message, synchronous_commit=on. Rounds are interleaved in rotating order; a round counts only after
its effects have been verified; the figures to quote are the ratios of one run.

  hand/batch      one transaction per 500: UPDATE per message, processed ids and outbox rows by one unnest INSERT each
  hand/session    the same with a Session a batch, UPDATE by session.execute(text(...)): the peer of handler/session
  hand/single     one transaction per message, as most hand-written consumers do
  handler/driver  @app.handler, UPDATE by tx.session.connection().exec_driver_sql
  handler/session @app.handler, UPDATE by tx.session.execute(text(...))
  batch_handler   @app.batch_handler, one UPDATE ... FROM unnest for the whole batch
"""

from __future__ import annotations

import argparse
import statistics
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition
from pydantic import BaseModel
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.orm import Session

from eoframework import App, Message, Topic, Tx
from eoframework.db import migrating
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from tests.consume.harness import make_app, run_once

ACCOUNTS = 1000
OUT = "bench.out"


class Deposit(BaseModel):
    account: int
    amount: int


class Bench:
    """One broker, one database, one loaded topic, and the contenders."""

    def __init__(self, messages: int) -> None:
        self.messages = messages
        self.settings = Settings.load(max_batch=500)
        self.engine = create_engine(self.settings.require_database_url())
        self.app_database = App("bench", settings=self.settings).database
        migrating.upgrade(self.app_database)
        self.topic = f"bench.{uuid.uuid4().hex[:8]}"
        Admin(self.settings).create(self.topic, partitions=4, replicas=1, config={})
        with self.engine.begin() as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS account (id int PRIMARY KEY, amount bigint NOT NULL)"))
        self._load()

    def _load(self) -> None:
        producer = Producer({"bootstrap.servers": self.settings.require_bootstrap_servers(), "linger.ms": 20})
        for number in range(self.messages):
            account = number % ACCOUNTS
            headers = [("message-id", str(uuid.uuid4()).encode())]
            value = b'{"account": %d, "amount": 1}' % account
            producer.produce(self.topic, value, key=str(account).encode(), headers=headers)
            if number % 1000 == 0:
                producer.poll(0)
        producer.flush()

    def reset(self) -> None:
        """The same start for everyone."""
        with self.engine.begin() as connection:
            connection.execute(
                text("TRUNCATE account, eo.outbox_message, eo.processed_message, eo.position, eo.consumer CASCADE")
            )
            connection.execute(text(f"INSERT INTO account SELECT g, 0 FROM generate_series(0, {ACCOUNTS - 1}) g"))
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM account"))
            connection.execute(text("CHECKPOINT"))

    def verify(self) -> None:
        """Every message had its effect, its processed row and its outbox row, once."""
        with self.engine.connect() as connection:
            amounts = connection.scalar(text("SELECT sum(amount) FROM account"))
            rows = connection.scalar(text("SELECT count(*) FROM eo.outbox_message"))
            ids = connection.scalar(text("SELECT count(*) FROM eo.processed_message"))
        if not amounts == rows == ids == self.messages:
            raise SystemExit(f"INVALID: effects {amounts}, outbox {rows}, processed {ids}, messages {self.messages}")

    def rate(self) -> float:
        """Messages per second, by the transactions' own times: all but the first transaction's messages."""
        question = """
            SELECT sum(n) FILTER (WHERE at > first), extract(epoch FROM max(at) - min(first)) FROM (
                SELECT processed_at AS at, count(*) AS n, min(min(processed_at)) OVER () AS first
                FROM eo.processed_message GROUP BY processed_at) AS t
        """
        with self.engine.connect() as connection:
            messages, seconds = connection.execute(text(question)).one()
        return float(messages) / float(seconds)

    # --- contenders ---

    def handler(self, update: Callable[[Tx, Deposit], None]) -> None:
        app = make_app(self.settings, self.app_database, f"bench{uuid.uuid4().hex[:8]}")
        out = Topic(OUT, Deposit, key="account")

        @app.handler(Topic(self.topic, Deposit), name="deposit")
        def deposit(payload: Deposit, tx: Tx) -> None:
            update(tx, payload)
            tx.publish(out, payload)

        self._finish(run_once(app))

    def batch_handler(self) -> None:
        app = make_app(self.settings, self.app_database, f"bench{uuid.uuid4().hex[:8]}")
        out = Topic(OUT, Deposit, key="account")

        @app.batch_handler(Topic(self.topic, Deposit), name="deposit")
        def deposit(batch: list[Message[Deposit]], tx: Tx) -> None:
            sums = Counter[int]()
            for message in batch:
                sums[message.payload.account] += message.payload.amount
                tx.publish(out, message.payload, cause=message)
            tx.session.connection().exec_driver_sql(
                "UPDATE account a SET amount = a.amount + d.amount"
                " FROM unnest(%s::int[], %s::bigint[]) AS d(id, amount) WHERE a.id = d.id",
                (list(sums), list(sums.values())),
            )

        self._finish(run_once(app))

    @staticmethod
    def _finish(exit_code: int) -> None:
        if exit_code:
            raise SystemExit(f"the worker ended with {exit_code}")

    def by_hand(self, size: int, update: Callable[[Any, list[Deposit]], None]) -> None:
        """What a careful engineer writes: processed ids in the same transaction, everything batched."""
        consumer = Consumer(
            {
                "bootstrap.servers": self.settings.require_bootstrap_servers(),
                "group.id": uuid.uuid4().hex,
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
            }
        )
        consumer.assign([TopicPartition(self.topic, partition, 0) for partition in range(4)])
        done = 0
        with self.engine.begin() as connection:
            connection.execute(text("INSERT INTO eo.consumer (name, topic) VALUES ('hand', 'hand')"))
        with self.engine.connect() as connection:
            while done < self.messages:
                first = consumer.poll(1)
                batch = [first, *consumer.consume(size - 1, 0)] if first is not None else []
                if batch:
                    _hand_batch(connection, batch, update)
                    connection.commit()
                    done += len(batch)
        consumer.close()


def _hand_batch(transaction: Connection, batch: list[Any], update: Callable[[Any, list[Deposit]], None]) -> None:
    deposits = [Deposit.model_validate_json(message.value()) for message in batch]
    ids = [dict(message.headers())["message-id"].decode() for message in batch]
    transaction.exec_driver_sql("SELECT 1")  # begins
    connection: Any = transaction.connection.dbapi_connection
    connection.execute(
        "INSERT INTO eo.processed_message (consumer_id, message_id) SELECT (SELECT id FROM eo.consumer WHERE name ="
        " 'hand'), m FROM unnest(%s::uuid[]) m ORDER BY m ON CONFLICT DO NOTHING RETURNING message_id",
        (ids,),
    ).fetchall()
    update(transaction, deposits)
    connection.execute(
        "INSERT INTO eo.outbox_message (id, shard, topic, key, type, source, content_type, payload)"
        " SELECT gen_random_uuid(), 0, %s, k, 'Deposit', 'bench', 'application/json', p"
        " FROM unnest(%s::bytea[], %s::bytea[]) AS m(k, p)",
        (OUT, [str(d.account).encode() for d in deposits], [d.model_dump_json().encode() for d in deposits]),
    )


def _hand_by_driver(transaction: Connection, deposits: list[Deposit]) -> None:
    driver: Any = transaction.connection.dbapi_connection
    for deposit in deposits:
        driver.execute("UPDATE account SET amount = amount + %s WHERE id = %s", (deposit.amount, deposit.account))


def _hand_by_session(transaction: Connection, deposits: list[Deposit]) -> None:
    session = Session(bind=transaction, join_transaction_mode="rollback_only")
    for deposit in deposits:
        session.execute(_UPDATE, {"amount": deposit.amount, "account": deposit.account})
    session.close()


def _by_driver(tx: Tx, deposit: Deposit) -> None:
    tx.session.connection().exec_driver_sql(
        "UPDATE account SET amount = amount + %s WHERE id = %s", (deposit.amount, deposit.account)
    )


_UPDATE = text("UPDATE account SET amount = amount + :amount WHERE id = :account")


def _by_session(tx: Tx, deposit: Deposit) -> None:
    tx.session.execute(_UPDATE, {"amount": deposit.amount, "account": deposit.account})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    bench = Bench(options.messages)
    contenders: dict[str, Callable[[], None]] = {
        "hand/batch": lambda: bench.by_hand(500, _hand_by_driver),
        "hand/session": lambda: bench.by_hand(500, _hand_by_session),
        "handler/driver": lambda: bench.handler(_by_driver),
        "handler/session": lambda: bench.handler(_by_session),
        "batch_handler": bench.batch_handler,
        "hand/single": lambda: bench.by_hand(1, _hand_by_driver),
    }
    names = list(contenders)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(options.rounds):
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            bench.reset()
            contenders[name]()
            bench.verify()
            rates[name].append(bench.rate())
            print(f"round {round_number + 1}  {name:<16} {rates[name][-1]:8.0f} messages/s", flush=True)
    print("\ncontender         median/s   ratio to hand/batch (median of paired ratios)")
    for name in names:
        paired = [ours / hand for ours, hand in zip(rates[name], rates["hand/batch"], strict=True)]
        print(f"{name:<16} {statistics.median(rates[name]):10.0f}   {statistics.median(paired):.2f}")


if __name__ == "__main__":
    main()
