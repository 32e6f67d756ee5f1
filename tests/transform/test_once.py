"""`--once` ends when all that is there was transformed, and not before."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from confluent_kafka import Producer

from eoframework import clock, lifecycle
from eoframework.settings import Settings
from eoframework.transform.worker import TransformWorker
from tests.transform.mill import Flour, Grain, Mill


@pytest.fixture
def mill(settings: Settings) -> Iterator[Mill]:
    made = Mill(settings)
    yield made
    made.stop()


def test_an_open_transaction_in_the_source_is_waited_for(mill: Mill) -> None:
    """What a predecessor has committed may look like this for a moment. Seen to end early, with exit code 0, when the
    client's end of partition counted: for read_committed that is where the open transaction begins."""

    @mill.app.transform(mill.grain, to=mill.flour, name="grind")
    def grind(grain: Grain) -> Flour:
        return Flour(n=grain.n)

    mill.pour([1, 2])
    servers = mill.settings.require_bootstrap_servers()
    producer = Producer({"bootstrap.servers": servers, "transactional.id": mill.group})
    producer.init_transactions()
    producer.begin_transaction()
    producer.produce(mill.grain.name, Grain(n=3).model_dump_json(), b"k", 0)
    producer.flush()
    worker = TransformWorker(mill.app.transforms[0], app=mill.app, settings=mill.settings, admin=mill.admin, once=True)
    code: list[int] = []
    run = threading.Thread(target=lambda: code.append(lifecycle.run([worker], stop=threading.Event(), once=True)))
    run.start()
    deadline = clock.monotonic() + 30
    while mill.offset() != 2 and clock.monotonic() < deadline:
        clock.sleep(0.05)
    clock.sleep(1.5)
    assert run.is_alive()
    producer.commit_transaction()
    run.join(30)
    assert (code, mill.ground()) == ([0], [1, 2, 3])
