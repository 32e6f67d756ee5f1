"""Members come, go and die about every second under load; nothing is lost, repeated or overtaken."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Producer
from sqlalchemy import Engine, text

from eoframework.db.session import Database
from eoframework.settings import Settings
from tests.apps.ledger import LEDGER
from tests.conftest import MakeTopic
from tests.consume.harness import rows_reach, scalar
from tests.consume.nursery import Forked, Nursery
from tests.processes import eventually, settings_environment

PARTITIONS = 6
MESSAGES = 3000
KEYS = 24
STORM_SECONDS = 10.0
MOST_MEMBERS = 4

PROTOCOLS = {
    "consumer": {"EO_GROUP_PROTOCOL": "consumer"},
    "cooperative": {"EO_GROUP_PROTOCOL": "classic", "EO_KAFKA_SESSION_TIMEOUT_MS": "3000"},
    "range": {
        "EO_GROUP_PROTOCOL": "classic",
        "EO_KAFKA_SESSION_TIMEOUT_MS": "3000",
        "EO_KAFKA_PARTITION_ASSIGNMENT_STRATEGY": "range",
    },
}


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


class Storm:
    """Members of one group, and what befalls them."""

    def __init__(self, nursery: Nursery, environment: dict[str, str], directory: Path, seed: int) -> None:
        self._nursery = nursery
        self._environment = environment
        self._directory = directory
        self._random = random.Random(seed)
        self._born = 0
        self.alive: list[Forked] = []
        self.happened: list[str] = []

    def join(self) -> None:
        self._born += 1
        log = self._directory / f"member{self._born}.log"
        self.alive.append(self._nursery.spawn("run", "tests.apps.ledger:app", environment=self._environment, log=log))
        self.happened.append("join")

    def leave(self) -> None:
        """SIGTERM: drains, releases and leaves the group."""
        member = self._take()
        eventually(member.output, "the first line of a member, which by then minds signals")
        member.signal(signal.SIGTERM)
        assert member.wait() == 0, member.output()
        self.happened.append("leave")

    def die(self) -> None:
        member = self._take()
        member.signal(signal.SIGKILL)
        assert member.wait() == -signal.SIGKILL, member.output()
        self.happened.append("die")

    def rage(self, seconds: float) -> None:
        """About every second something happens to somebody; at least one member is always there."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if len(self.alive) < 2:
                self.join()
            elif len(self.alive) >= MOST_MEMBERS:
                self._random.choice((self.leave, self.die))()
            else:
                self._random.choice((self.join, self.leave, self.die))()
            time.sleep(self._random.uniform(0.5, 1.3))

    def end(self) -> None:
        """Everybody leaves in order, whatever they went through."""
        while self.alive:
            self.leave()

    def _take(self) -> Forked:
        return self.alive.pop(self._random.randrange(len(self.alive)))


def send_steadily(servers: str, topic: str, seconds: float) -> threading.Thread:
    """MESSAGES messages, spread over the length of the storm; check_ledger finds any that was not sent."""

    def send() -> None:
        producer = Producer({"bootstrap.servers": servers, "enable.idempotence": True, "linger.ms": 1})
        for n in range(MESSAGES):
            producer.produce(topic, key=b"k%d" % (n % KEYS), value=b'{"key": "k%d", "n": %d}' % (n % KEYS, n))
            if n % 10 == 9:
                producer.poll(10 * seconds / MESSAGES)
        assert producer.flush(30) == 0

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def check_ledger(engine: Engine) -> None:
    """Each offset once and in order within its partition, each key's messages in the order they were sent."""
    with engine.connect() as connection:
        rows = connection.execute(text('SELECT partition, "offset", key, n FROM ledger ORDER BY id')).all()
    partitions: dict[int, list[int]] = {}
    keys: dict[str, list[int]] = {}
    for partition, offset, key, n in rows:
        partitions.setdefault(partition, []).append(offset)
        keys.setdefault(key, []).append(n)
    for partition, offsets in partitions.items():
        assert offsets == list(range(len(offsets))), f"partition {partition}: repeated, missing or out of order"
    for key, numbers in keys.items():
        assert numbers == list(range(int(key[1:]), MESSAGES, KEYS)), f"{key}: repeated, missing or out of order"
    assert len(rows) == MESSAGES


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_effects_once_and_in_order_while_members_come_go_and_die(
    protocol: str,
    nursery: Nursery,
    settings: Settings,
    database: Database,
    make_topic: MakeTopic,
    tmp_path: Path,
) -> None:
    """Seen to fail with partitions started at the group's offset (Ownership._start_of answering `offsets`) and
    `p.next_offset = f.expected` taken out of `_ADVANCE` in db/position.py: effects repeated.
    """
    topic = make_topic(partitions=PARTITIONS)
    with database.engine.begin() as connection:
        connection.execute(text(LEDGER))
    environment = settings_environment(
        settings, LEDGER_TOPIC=topic, EO_MAX_BATCH="50", EO_MAX_WAIT="0.1", **PROTOCOLS[protocol]
    )
    storm = Storm(nursery, environment, tmp_path, seed=len(protocol))
    sending = send_steadily(settings.require_bootstrap_servers(), topic, STORM_SECONDS)
    try:
        storm.join()
        rows_reach(database.engine, 1)
        storm.rage(STORM_SECONDS)
        sending.join()
        storm.join()
        rows_reach(database.engine, MESSAGES, seconds=60)
    finally:
        sending.join()
    storm.end()
    check_ledger(database.engine)
    assert {"join", "leave", "die"} <= set(storm.happened)
    eventually(
        lambda: scalar(database.engine, "SELECT sum(next_offset) FROM eo.position") == MESSAGES, "positions at the end"
    )
