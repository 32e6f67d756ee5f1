"""An exception out of the client's poll or consume: what it had fetched is gone while its position has moved on."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException
from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, Message, Topic, Tx
from eoframework.db.session import Database
from eoframework.kafka.consumer import GroupConsumer
from eoframework.settings import Settings
from tests.conftest import MakeTopic
from tests.consume.harness import Run, column, make_app, make_ledger, next_offsets, scalar, worker_of
from tests.processes import produce

INSERT = text('INSERT INTO ledger (partition, "offset", note) VALUES (:p, :o, :n)')


class Entry(BaseModel):
    n: int


class Losing:
    """The real client, which twice throws away what one call has really fetched, and raises."""

    def __init__(self, consumer: Consumer, call: str) -> None:
        self._consumer = consumer
        self._call = call
        self.lost = 0
        self.raised = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._consumer, name)
        if name != self._call or self.raised == 2:
            return real

        def lose(*arguments: Any) -> Any:
            found = real(*arguments)
            fetched = found if isinstance(found, list) else [found] if found else []
            if not any(message.error() is None for message in fetched):
                return found
            self.lost += len(fetched)
            self.raised += 1
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))

        return lose


def booking_app(settings: Settings, database: Database, make_topic: MakeTopic) -> App:
    """An app that books 200 messages of two partitions."""
    make_ledger(database.engine)
    topic = make_topic(partitions=2)
    produce(settings.require_bootstrap_servers(), topic, [(b"%d" % n, b'{"n": %d}' % n) for n in range(200)])
    app = make_app(settings, database)

    @app.handler(Topic(topic, Entry), name="book")
    def book(message: Message[Entry], tx: Tx) -> None:
        tx.session.execute(INSERT, {"p": message.partition, "o": message.offset, "n": str(message.payload.n)})

    return app


@pytest.mark.parametrize("call", ["poll", "consume"])
def test_no_record_is_lost_when_a_fetch_raises(
    call: str, settings: Settings, database: Database, make_topic: MakeTopic
) -> None:
    """Seen to fail with both `rewind` after the failed `_poll` and `_check_nothing_was_lost` taken out of
    GroupConsumer.fetch: the records fetched by then were never processed, and the position went past them.
    """
    app = booking_app(settings, database, make_topic)
    stop = threading.Event()
    worker = worker_of(app, stop=stop, once=True)
    losing: list[Losing] = []
    start = worker.start

    def start_losing() -> None:
        start()
        member = worker._member()
        losing.append(Losing(member._consumer, call))
        member._consumer = losing[0]  # type: ignore[assignment]

    worker.start = start_losing  # type: ignore[method-assign]
    assert Run([worker], stop, once=True).wait() == 0
    assert losing[0].raised == 2
    assert losing[0].lost >= 2
    assert sorted(map(int, column(database.engine, "SELECT note FROM ledger"))) == list(range(200))
    assert sum(offset for _, offset in next_offsets(database)) == 200


class Rebalancing:
    """The real client; in the fetch after the first 50 records the group takes the partitions away and gives them back.

    Just what librdkafka does between a poll and a consume: the callbacks run, and the records fetched before are still
    handed out. Meanwhile somebody has said `eo position set` 0, to process it all again.
    """

    def __init__(self, consumer: Consumer, member: GroupConsumer, database: Database) -> None:
        self._consumer = consumer
        self._member = member
        self._database = database
        self._handed = 0
        self.rebalanced = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)

    def consume(self, *arguments: Any) -> Any:
        found = self._consumer.consume(*arguments)
        records = [message for message in found if message.error() is None]
        if records and self._handed >= 50 and not self.rebalanced:
            self.rebalanced = True
            partitions = self._consumer.assignment()
            with self._database.engine.begin() as connection:
                connection.execute(text("UPDATE eo.position SET next_offset = 0, epoch = epoch + 1"))
                connection.execute(text("DELETE FROM ledger"))
            self._member._revoked(self._consumer, partitions)
            self._consumer.incremental_unassign(partitions)
            self._member._assigned(self._consumer, partitions)
        self._handed += len(records)
        return found


def test_records_fetched_before_a_rebalance_are_not_taken_for_those_of_the_new_claim(
    settings: Settings, database: Database, make_topic: MakeTopic
) -> None:
    """Seen to fail with `if self._rebalances != before` taken out of GroupConsumer.fetch: records far beyond the new
    claim's position were processed first, and everything between was skipped.
    """
    app = booking_app(
        settings.model_copy(update={"max_batch": 20, "offset_commit_interval": 60.0}), database, make_topic
    )
    stop = threading.Event()
    worker = worker_of(app, stop=stop, once=True)
    clients: list[Rebalancing] = []
    start = worker.start

    def start_rebalancing() -> None:
        start()
        member = worker._member()
        clients.append(Rebalancing(member._consumer, member, database))
        member._consumer = clients[0]  # type: ignore[assignment]

    worker.start = start_rebalancing  # type: ignore[method-assign]
    assert Run([worker], stop, once=True).wait() == 0
    assert clients[0].rebalanced
    for partition in (0, 1):
        offsets = column(database.engine, f'SELECT "offset" FROM ledger WHERE partition = {partition} ORDER BY id')
        assert offsets == list(range(len(offsets)))
    assert scalar(database.engine, "SELECT count(*) FROM ledger") == 200
