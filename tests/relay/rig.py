"""What the relay's tests do by hand: write rows, start and kill relay processes, read topics back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition
from sqlalchemy import Connection, Engine, text

from eoframework import clock, lifecycle
from eoframework.checkpoint import checkpoint_topic
from eoframework.db.outbox import Outbox
from eoframework.db.session import Database, open_database
from eoframework.kafka.admin import Admin
from eoframework.message import OutboxMessage, new_id
from eoframework.relay import RelayWorker
from eoframework.schema import Schema
from eoframework.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
SHARDS = 4


@dataclass(frozen=True)
class Read:
    """A record as an independent `read_committed` reader sees it."""

    id: str
    key: str
    value: int
    partition: int


@dataclass
class Rig:
    """One test's outbox and everything around it."""

    database: Database
    settings: Settings
    topic: str
    directory: Path
    outbox_id: uuid.UUID = field(default_factory=uuid.uuid4)
    processes: list[RelayProcess] = field(default_factory=list)
    _next: int = 0

    def mint_identity(self) -> None:
        """Databases of tests are copies of one template; two outboxes of one identity would fence each other."""
        self.sql("UPDATE eo.outbox SET id = :id", id=self.outbox_id)
        self.make_checkpoint_topic()

    @property
    def checkpoint_topic(self) -> str:
        return checkpoint_topic(self.outbox_id)

    def make_checkpoint_topic(self) -> None:
        config = {"cleanup.policy": "compact"}
        Admin(self.settings).create(self.checkpoint_topic, partitions=SHARDS, replicas=1, config=config)

    def on(self, engine: Engine) -> Rig:
        """The same outbox through another engine."""
        return replace(self, database=replace(self.database, engine=engine))

    def end(self) -> None:
        for process in self.processes:
            process.kill()

    # --- the outbox -----------------------------------------------------------------------------------------------

    def messages(self, count: int, *, keys: int = 10, size: int = 0, topic: str | None = None) -> list[OutboxMessage]:
        """`count` messages with ascending numbers as values; `size` pads them."""
        made = []
        for _ in range(count):
            made.append(self.message(key=f"k{self._next % keys}", topic=topic, size=size))
        return made

    def message(
        self, *, key: str | None, topic: str | None = None, size: int = 0, deliver_at: datetime | None = None
    ) -> OutboxMessage:
        number, self._next = self._next, self._next + 1
        return OutboxMessage(
            id=new_id(),
            topic=topic or self.topic,
            key=None if key is None else key.encode(),
            payload=str(number).ljust(size).encode(),
            type="test",
            source="test",
            content_type="text/plain",
            deliver_at=deliver_at,
        )

    def insert(self, connection: Connection, messages: Sequence[OutboxMessage]) -> None:
        Outbox(self.database.schema).insert(connection, messages)

    def publish(self, count: int, *, keys: int = 10, size: int = 0, topic: str | None = None) -> list[OutboxMessage]:
        """Commit `count` messages in one transaction."""
        made = self.messages(count, keys=keys, size=size, topic=topic)
        with self.database.begin("test") as connection:
            self.insert(connection, made)
        return made

    def sql(self, statement: str, **values: object) -> list[tuple[object, ...]]:
        with self.database.begin("test") as connection:
            result = connection.execute(text(statement), values)
            return [tuple(row) for row in result] if result.returns_rows else []

    def left(self) -> int:
        return int(str(self.sql("SELECT count(*) FROM eo.outbox_message")[0][0]))

    def wait_empty(self, *, within: float = 90) -> None:
        self.wait_for(lambda: self.left() == 0, within=within, what="the outbox to be empty")

    def wait_for(self, condition: object, *, what: str, within: float = 90) -> None:
        assert callable(condition)
        deadline = clock.monotonic() + within
        while not condition():
            if clock.monotonic() > deadline:
                logs = "\n".join(f"--- {p.name}\n{p.log()}" for p in self.processes)
                raise AssertionError(f"waited {within:g} s for {what}; {self.left()} rows left\n{logs}")
            clock.sleep(0.02)

    # --- processes ------------------------------------------------------------------------------------------------

    def start(
        self, *options: str, die_at: str = "", hold: str = "", once: bool = False, **changes: object
    ) -> RelayProcess:
        """A real relay process; `options`, `die_at` and `hold` are those of `tests/relay/process.py`."""
        arguments = ["--die-at", die_at, "--hold", hold, *options] + (["--once"] if once else [])
        process = RelayProcess(self, f"relay{len(self.processes)}", arguments, changes)
        self.processes.append(process)
        return process

    def run_here(self, *, once: bool = False, **changes: object) -> RelayThread:
        """A relay on a thread of this process: for tests in which no process has to die."""
        return RelayThread(self.database, self.settings.model_copy(update={"relay_lease": 1.5, **changes}), once)

    # --- Kafka ----------------------------------------------------------------------------------------------------

    def read(self, topic: str | None = None) -> list[Read]:
        """Everything committed in the topic, partition by partition, in order."""
        return list(read_committed(self.settings, topic or self.topic))

    def assert_published(self, messages: Iterable[OutboxMessage], topic: str | None = None) -> None:
        """Each of these once, nothing else, and each key in the order of `messages`."""
        expected = list(messages)
        found = self.read(topic)
        ids = [record.id for record in found]
        lost = {str(m.id) for m in expected} - set(ids)
        doubled = len(ids) - len(set(ids))
        strange = set(ids) - {str(m.id) for m in expected}
        assert (len(lost), doubled, len(strange)) == (0, 0, 0), f"lost {len(lost)}, doubled {doubled}, {strange=}"
        assert by_key(found) == by_key_expected(expected)


@contextmanager
def open_copy(rig: Rig, database_url: str) -> Iterator[Rig]:
    """The same outbox in another database."""
    database = open_database(database_url, Schema())
    try:
        yield replace(rig, database=database)
    finally:
        database.engine.dispose()


class RelayThread:
    """A relay inside the test's process, ended with its `with` block; the exit code is its `ended()`."""

    def __init__(self, database: Database, settings: Settings, once: bool) -> None:
        self._stop = threading.Event()
        self._code: int | None = None
        self.worker = RelayWorker(database, settings)
        self._thread = threading.Thread(target=self._live, args=(once,), daemon=True)

    def __enter__(self) -> RelayThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), "the relay did not end"

    def ended(self, within: float = 90) -> int:
        """The exit code, once it has ended by itself."""
        self._thread.join(within)
        assert self._code is not None, "the relay is still running"
        return self._code

    def _live(self, once: bool) -> None:
        self._code = lifecycle.run([self.worker], stop=self._stop, once=once)


class RelayProcess:
    """A relay as a process of its own."""

    def __init__(self, rig: Rig, name: str, arguments: Sequence[str], changes: Mapping[str, object]) -> None:
        self.name = name
        self._rig = rig
        self._log = rig.directory / f"{name}.log"
        self.told = rig.directory / f"{name}.told"
        settings = rig.settings.model_dump(mode="json", exclude={"database_url"})
        environment = {
            **os.environ,
            "EO_DATABASE_URL": rig.settings.require_database_url(),
            "EO_KAFKA_BOOTSTRAP_SERVERS": str(settings["kafka_bootstrap_servers"]),
            "EO_RELAY_LEASE": "1.5",
            **{f"EO_{key.upper()}": str(value) for key, value in changes.items()},
        }
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "tests.relay.process", *arguments, "--told", str(self.told)],
                cwd=REPOSITORY,
                env=environment,
                stdout=log,
                stderr=log,
            )

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def has_told(self, event: str) -> bool:
        """Whether the process passed the event of `hold` (it writes a file and waits there)."""
        return self.told.exists() and event in self.told.read_text()

    def owns(self) -> int:
        """How many shards the database says are this process's, by a lease that has not run out."""
        found = self._rig.sql(
            "SELECT count(*) FROM eo.relay_shard WHERE owner LIKE :name AND lease_until > clock_timestamp()",
            name=f"%:{self._popen.pid}:%",
        )
        return int(str(found[0][0]))

    def is_running(self) -> bool:
        return self._popen.poll() is None

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGKILL)
            self._popen.wait()

    def wait(self, within: float = 90) -> int:
        """The exit code; negative for a signal."""
        try:
            return self._popen.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {within:g} s\n{self.log()}") from None


def read_committed(settings: Settings, topic: str) -> Iterable[Read]:
    for message in raw_records(settings, topic):
        headers = dict(message.headers() or [])
        yield Read(
            id=bytes(headers["message-id"]).decode(),
            key=(message.key() or b"").decode(),
            value=int(message.value() or b"-1"),
            partition=int(message.partition() or 0),
        )


def raw_records(settings: Settings, topic: str) -> Iterable[Message]:
    """Read the whole topic with a consumer that shares no code with the product."""
    consumer = Consumer(
        {
            "bootstrap.servers": settings.require_bootstrap_servers(),
            "group.id": f"reader-{uuid.uuid4()}",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "fetch.wait.max.ms": 10,
            "auto.offset.reset": "error",
        }
    )
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        for partition in sorted(partitions):
            consumer.assign([TopicPartition(topic, partition, 0)])
            yield from _read_partition(consumer)
    finally:
        consumer.close()


def _read_partition(consumer: Consumer) -> Iterable[Message]:
    deadline = clock.monotonic() + 30
    while clock.monotonic() < deadline:
        message = consumer.poll(1)
        if message is None:
            continue
        error = message.error()
        if error is not None:
            assert error.code() == KafkaError._PARTITION_EOF, error
            return
        yield message
    raise AssertionError("the topic could not be read to its end")


def by_key(found: Iterable[Read]) -> dict[str, list[str]]:
    order: dict[str, list[str]] = {}
    for record in found:
        if record.key:
            order.setdefault(record.key, []).append(record.id)
    return order


def by_key_expected(messages: Iterable[OutboxMessage]) -> dict[str, list[str]]:
    order: dict[str, list[str]] = {}
    for message in messages:
        if message.key is not None:
            order.setdefault(message.key.decode(), []).append(str(message.id))
    return order
