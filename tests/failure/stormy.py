"""The stage of tests/failure/storm.py: a topic whose messages fail or kill, and what must be true in the end."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text

from tests.conftest import Addresses, database_named, make_settings
from tests.consume.harness import column, scalar
from tests.consume.nursery import Forked, Nursery
from tests.consume.scene import KEYS, Scene
from tests.processes import produce, settings_environment

# The group gives a dead member's partitions away after this: the broker's own limit is 6 s in the tests.
SOON = {
    "EO_GROUP_PROTOCOL": "classic",
    "EO_KAFKA_SESSION_TIMEOUT_MS": "1500",
    "EO_KAFKA_HEARTBEAT_INTERVAL_MS": "400",
}
DEADLY = ("poison", "exit", "segfault", "exit when parked", "exit when decoded")


class Stormy(Scene):
    """A scene whose messages have fates."""

    fates: dict[int, str]

    def send(self, count: int, fates: dict[int, str] | None = None, *, otherwise: str = "ok") -> None:
        """`count` messages of KEYS keys, every other one with an id."""
        numbers = range(self.sent, self.sent + count)
        self.fates = getattr(self, "fates", {}) | (fates or {})
        self.sent += count
        produce(
            self.settings.require_bootstrap_servers(),
            self.topic,
            [(_key(n).encode(), _value(n, self.fates.get(n, otherwise)), _headers(n)) for n in numbers],
        )

    def spawn(self, *arguments: str, **environment: str) -> Forked:
        """An `eo run` of the storm."""
        self._spawned += 1
        own = {"LEDGER_TOPIC": self.topic, "BOOKED_TOPIC": self.booked, "EO_MAX_WAIT": "0.1", "EO_MAX_BATCH": "7"}
        return self._nursery.spawn(
            "run",
            "tests.failure.storm:app",
            *arguments,
            environment=settings_environment(self.settings, **(own | SOON | environment)),
            log=self._directory / f"{self.topic}.{self._spawned}.log",
        )

    def settled(self) -> bool:
        """Whether nothing is left to do."""
        return self.done() and not scalar(self.engine, "SELECT count(*) FROM eo.parked_key")

    def check(self) -> None:
        """Each message once and in its key's order, or dead once; and nothing else is left of any of them."""
        deadly = {n for n, fate in self.fates.items() if fate in DEADLY}
        alive = [n for n in range(self.sent) if n not in deadly]
        rows = self._rows("SELECT key, n FROM ledger ORDER BY id")
        for key in range(KEYS):
            assert [n for k, n in rows if k == f"k{key}"] == [n for n in alive if n % KEYS == key], f"key k{key}"
        assert sorted(n for _, n in rows) == alive
        published = "SELECT (convert_from(payload, 'UTF8')::json ->> 'n')::int FROM eo.outbox_message ORDER BY 1"
        assert column(self.engine, published) == alive
        dead = "SELECT (convert_from(payload, 'UTF8')::json ->> 'n')::int FROM eo.dead_letter ORDER BY 1"
        assert column(self.engine, dead) == sorted(deadly)
        processed = set(column(self.engine, "SELECT message_id FROM eo.processed_message"))
        assert processed == {id_of(n) for n in range(self.sent) if n % 2}
        assert scalar(self.engine, "SELECT sum(next_offset) FROM eo.position") == self.sent
        for table in ("parked_message", "parked_key", "attempt"):
            assert scalar(self.engine, f"SELECT count(*) FROM eo.{table}") == 0, table

    def _rows(self, statement: str) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(text(statement)))


@contextmanager
def open_storm(
    services: Addresses, template: str, nursery: Nursery, directory: Path, *, partitions: int = 2
) -> Iterator[Stormy]:
    """A stage whose database is gone at the end."""
    source = template.rsplit("/", 1)[1]
    with database_named(services, f"eo_storm_{uuid.uuid4().hex[:12]}", source=source) as url:
        engine = create_engine(url)
        settings = make_settings(url, services.bootstrap_servers)
        yield Stormy(settings, engine, nursery, directory, partitions=partitions)
        engine.dispose()


def ended(process: Forked) -> bool:
    """Whether the process is over and only waits to be asked how."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def stopped(process: Forked) -> bool:
    """Whether it has stopped itself with SIGSTOP."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def end(process: Forked) -> None:
    """SIGTERM, and a clean exit."""
    process.signal(signal.SIGTERM)
    assert process.wait() == 0, process.output()


def id_of(n: int) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_OID, str(n))


def _key(n: int) -> str:
    return f"k{n % KEYS}"


def _value(n: int, fate: str) -> bytes:
    return json.dumps({"key": _key(n), "n": n, "fate": fate}).encode()


def _headers(n: int) -> list[tuple[str, bytes]]:
    return [("message-id", str(id_of(n)).encode())] if n % 2 else []
