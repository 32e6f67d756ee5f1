"""One stage for processes that crash or freeze: a database, two topics, and what the ledger must say in the end."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, create_engine, text

from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from tests.apps.ledger import LEDGER
from tests.conftest import Addresses, database_named, make_settings
from tests.consume.harness import scalar
from tests.consume.nursery import Forked, Nursery
from tests.processes import eventually, produce, settings_environment

KEYS = 5

Environment = dict[str, str]


class Scene:
    """The ledger app's processes on a database and topics of their own."""

    def __init__(
        self, settings: Settings, engine: Engine, nursery: Nursery, directory: Path, *, partitions: int
    ) -> None:
        self.settings = settings
        self.engine = engine
        self._nursery = nursery
        self._directory = directory
        self._spawned = 0
        unique = uuid.uuid4().hex[:10]
        self.topic, self.booked = f"scene.{unique}", f"scene.booked.{unique}"
        self._partitions = partitions
        Admin(settings).create(self.topic, partitions=partitions, replicas=1, config={})
        with engine.begin() as connection:
            connection.execute(text(LEDGER))
        self.sent = 0

    def send(self, count: int) -> None:
        """Messages of KEYS keys, every other one with an id; each key's numbers count up."""
        numbers = range(self.sent, self.sent + count)
        self.sent += count
        produce(
            self.settings.require_bootstrap_servers(),
            self.topic,
            [(b"k%d" % (n % KEYS), b'{"key": "k%d", "n": %d}' % (n % KEYS, n), _headers(n)) for n in numbers],
        )

    def spawn(self, *arguments: str, **environment: str) -> Forked:
        """An `eo run` of the ledger app."""
        self._spawned += 1
        return self._nursery.spawn(
            "run",
            "tests.apps.ledger:app",
            *arguments,
            environment=settings_environment(
                self.settings,
                LEDGER_TOPIC=self.topic,
                BOOKED_TOPIC=self.booked,
                EO_MAX_WAIT="0.1",
                **environment,
            ),
            log=self._directory / f"{self.topic}.{self._spawned}.log",
        )

    def done(self) -> bool:
        """Whether every message sent is behind its position."""
        return bool(scalar(self.engine, "SELECT coalesce(sum(next_offset), 0) FROM eo.position") >= self.sent)

    def count_booked(self) -> int:
        return int(scalar(self.engine, "SELECT count(*) FROM ledger"))

    def reach_the_end(self) -> None:
        eventually(self.done, f"all {self.sent} messages of {self.topic} behind the positions")

    def check(self) -> None:
        """Every message once and in its key's order, its outbox row once, and the position at the log's end."""
        with self.engine.connect() as connection:
            rows = connection.execute(text('SELECT partition, "offset", key, n FROM ledger ORDER BY id')).all()
            published = connection.execute(text("SELECT payload FROM eo.outbox_message ORDER BY seq")).scalars().all()
            positions = {
                row.partition: row.next_offset
                for row in connection.execute(text("SELECT partition, next_offset FROM eo.position"))
            }
        for key in range(KEYS):
            assert [row.n for row in rows if row.key == f"k{key}"] == list(range(key, self.sent, KEYS)), f"key k{key}"
        for partition in range(self._partitions):
            offsets = [row.offset for row in rows if row.partition == partition]
            assert offsets == list(range(len(offsets))), f"partition {partition}"
            assert positions.get(partition) == len(offsets), f"position of partition {partition}"
        assert len(published) == len(set(published)) == len(rows) == self.sent


@contextmanager
def open_scene(
    services: Addresses, template: str, nursery: Nursery, directory: Path, *, partitions: int = 2
) -> Iterator[Scene]:
    """A scene whose database is gone at the end."""
    source = template.rsplit("/", 1)[1]
    with database_named(services, f"eo_scene_{uuid.uuid4().hex[:12]}", source=source) as url:
        engine = create_engine(url)
        settings = make_settings(url, services.bootstrap_servers)
        yield Scene(settings, engine, nursery, directory, partitions=partitions)
        engine.dispose()


def _headers(n: int) -> list[tuple[str, bytes]]:
    return [("message-id", str(uuid.uuid5(uuid.NAMESPACE_OID, str(n))).encode())] if n % 2 else []
