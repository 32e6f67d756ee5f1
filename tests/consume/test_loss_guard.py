"""An exception out of the client's poll or consume: what it had fetched is gone while its position has moved on."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException
from pydantic import BaseModel
from sqlalchemy import text

from eoframework import Message, Topic, Tx
from eoframework.db.session import Database
from eoframework.settings import Settings
from tests.conftest import MakeTopic
from tests.consume.harness import Run, column, make_app, make_ledger, next_offsets, worker_of
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


@pytest.mark.parametrize("call", ["poll", "consume"])
def test_no_record_is_lost_when_a_fetch_raises(
    call: str, settings: Settings, database: Database, make_topic: MakeTopic
) -> None:
    """Seen to fail with both `rewind` after the failed `_poll` and `_check_nothing_was_lost` taken out of
    GroupConsumer.fetch: the records fetched by then were never processed, and the position went past them.
    """
    make_ledger(database.engine)
    topic = make_topic(partitions=2)
    produce(settings.require_bootstrap_servers(), topic, [(b"%d" % n, b'{"n": %d}' % n) for n in range(200)])
    app = make_app(settings, database)

    @app.handler(Topic(topic, Entry), name="book")
    def book(message: Message[Entry], tx: Tx) -> None:
        tx.session.execute(INSERT, {"p": message.partition, "o": message.offset, "n": str(message.payload.n)})

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
