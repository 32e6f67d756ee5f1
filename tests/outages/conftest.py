"""A broker and a server of our own, since these tests break them, and the ledger app's processes on them."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Producer
from sqlalchemy import Engine, text

from eoframework import dev
from eoframework.db import migrating
from eoframework.db.session import open_database
from eoframework.kafka.admin import Admin
from eoframework.schema import Schema
from tests.apps.ledger import LEDGER
from tests.conftest import Addresses, database_named, make_settings
from tests.consume.harness import scalar
from tests.consume.nursery import Forked, Nursery
from tests.processes import eventually, read_topic, settings_environment

PARTITIONS = 4
KEYS = 16
SESSION_TIMEOUT_MS = 3000


@pytest.fixture(scope="package")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dev.Services]:
    """Services that nobody else uses."""
    options = dev.KafkaOptions(session_timeout_ms=SESSION_TIMEOUT_MS)
    with dev.start(tmp_path_factory.mktemp("own") / ".eo", kafka=options) as services:
        yield services


@pytest.fixture(scope="package")
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


class Scene:
    """The ledger app on a database and topics of its own, messages that keep coming, and the count at the end."""

    def __init__(self, own: dev.Services, nursery: Nursery, engine: Engine, url: str, directory: Path) -> None:
        self.own = own
        self.engine = engine
        self.settings = make_settings(url, own.bootstrap_servers)
        unique = uuid.uuid4().hex[:10]
        self.topic, self.booked = f"entries.{unique}", f"booked.{unique}"
        self._nursery = nursery
        self._directory = directory
        self._spawned = 0
        self.sent = 0

    def spawn(self, *command: str, **environment: str) -> Forked:
        """An `eo run`, or another command, of the ledger app."""
        self._spawned += 1
        words = command or ("run",)
        return self._nursery.spawn(
            *words,
            "tests.apps.ledger:app",
            environment=settings_environment(
                self.settings,
                LEDGER_TOPIC=self.topic,
                BOOKED_TOPIC=self.booked,
                EO_MAX_BATCH="50",
                EO_MAX_WAIT="0.1",
                EO_RELAY_LEASE="2",
                **environment,
            ),
            log=self._directory / f"{words[0]}{self._spawned}.log",
        )

    def send(self, count: int, *, over: float = 0.0) -> threading.Thread:
        """Send from a thread, spread over so many seconds; whatever happens to the broker, each message once."""
        first, self.sent = self.sent, self.sent + count

        def work() -> None:
            # Waits for a broker that is away longer than any test lets it be.
            servers = {"bootstrap.servers": self.own.bootstrap_servers, "reconnect.backoff.max.ms": 500}
            producer = Producer({**servers, "enable.idempotence": True, "linger.ms": 1})
            for n in range(first, first + count):
                value = b'{"key": "k%d", "n": %d}' % (n % KEYS, n)
                producer.produce(self.topic, key=b"k%d" % (n % KEYS), value=value)
                if n % 10 == 9:
                    producer.poll(10 * over / count)
            assert producer.flush(60) == 0

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def count(self) -> int:
        return int(scalar(self.engine, "SELECT count(*) FROM ledger"))

    def reach(self, count: int, worker: Forked) -> None:
        """Wait until so many are booked, by this process: that it has gone on by itself is the point."""
        eventually(lambda: self.count() >= count, f"{count} booked", log=worker.log)

    def check_ledger(self) -> None:
        """Each offset once and in order within its partition, each key's messages in the order they were sent."""
        with self.engine.connect() as connection:
            rows = connection.execute(text('SELECT partition, "offset", key, n FROM ledger ORDER BY id')).all()
        for partition in range(PARTITIONS):
            offsets = [row.offset for row in rows if row.partition == partition]
            assert offsets == list(range(len(offsets))), f"partition {partition}: repeated, missing or out of order"
        self._check_keys([(row.key, row.n) for row in rows])

    def check_published(self) -> None:
        """The relay has published each booked entry once, in order per key."""
        eventually(
            lambda: not scalar(self.engine, "SELECT count(*) FROM eo.outbox_message"), "empty outbox", seconds=60
        )
        found = read_topic(self.own.bootstrap_servers, self.booked)
        entries = [json.loads(message.value() or b"") for message in found]
        self._check_keys([(entry["key"], entry["n"]) for entry in entries])

    def _check_keys(self, entries: list[tuple[str, int]]) -> None:
        for key in range(KEYS):
            numbers = [n for name, n in entries if name == f"k{key}"]
            assert numbers == list(range(key, self.sent, KEYS)), f"k{key}: repeated, missing or out of order"
        assert len(entries) == self.sent


@pytest.fixture
def scene(own: dev.Services, nursery: Nursery, tmp_path: Path) -> Iterator[Scene]:
    addresses = Addresses(own.database_url, own.bootstrap_servers)
    with database_named(addresses, f"eo_{uuid.uuid4().hex[:10]}") as url:
        database = open_database(url, Schema())
        migrating.upgrade(database)
        made = Scene(own, nursery, database.engine, url, tmp_path)
        with database.engine.begin() as connection:
            connection.execute(text(LEDGER))
        for topic in (made.topic, made.booked):
            Admin(made.settings).create(topic, partitions=PARTITIONS, replicas=1, config={})
        # The relay's checkpoint topic.
        assert made.spawn("topics", "apply").wait() == 0
        yield made
        database.engine.dispose()
