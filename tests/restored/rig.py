"""A shop on real services, its backups, and the commands that its errors print."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from confluent_kafka import Producer
from sqlalchemy import create_engine, make_url, text

from eoframework.db.session import Database, open_database
from eoframework.dev import postgres_programs
from eoframework.errors import Retryable
from eoframework.schema import Schema
from eoframework.settings import Settings
from tests.cli.conftest import Shell
from tests.conftest import make_settings
from tests.consume.nursery import Nursery
from tests.processes import Eo, patiently, read_topic
from tests.restored.shop import TABLES

APP = "tests.restored.shop:app"
STOPPED_TO_PROTECT_DATA = 70


@dataclass
class Shop:
    """One database and one cluster, as a user's shell sees them."""

    shell: Shell

    @classmethod
    def made(cls, nursery: Nursery, database_url: str, servers: str, directory: Path) -> Shop:
        """A migrated database that knows its home, and the app's topics: what a deployment leaves."""
        settings = make_settings(database_url, servers)
        database = open_database(database_url, Schema())
        shop = cls(Shell(nursery, database, settings, uuid.uuid4().hex[:8], directory))
        shop.shell.run("db", "upgrade")
        with database.begin("test") as connection:
            for statement in TABLES.split(";"):
                connection.execute(text(statement))
        shop.shell.run("topics", "apply", APP)
        return shop

    def elsewhere(self, *, database_url: str | None = None, servers: str | None = None) -> Shop:
        """The same app with another database, or on another cluster."""
        settings = make_settings(
            database_url or self.shell.settings.require_database_url(),
            servers or self.shell.settings.require_bootstrap_servers(),
        )
        database = open_database(database_url, Schema()) if database_url else self.shell.database
        return Shop(replace(self.shell, settings=settings, database=database, processes=[]))

    # --- names ---

    @property
    def settings(self) -> Settings:
        return self.shell.settings

    @property
    def database(self) -> Database:
        return self.shell.database

    @property
    def orders(self) -> str:
        return f"restored.orders.{self.shell.suffix}"

    @property
    def bills(self) -> str:
        return f"restored.bills.{self.shell.suffix}"

    @property
    def labels(self) -> str:
        return f"restored.labels.{self.shell.suffix}"

    def group(self, name: str) -> str:
        return f"restored-{self.shell.suffix}.{name}"

    @property
    def checkpoints(self) -> str:
        return f"eo.relay.{self.one('SELECT id FROM eo.outbox')}"

    # --- as a user ---

    def eo(self, *arguments: str, code: int = 0) -> str:
        """What the command said, on both ways out."""
        done = self.shell.run(*arguments, code=code)
        return done.stdout + done.stderr

    def start(self, *arguments: str) -> Eo:
        return self.shell.start(*arguments)

    def publish(self, first: int, count: int) -> None:
        lines = "".join(f'{{"order_id": {number}}}\n' for number in range(first, first + count))
        self.shell.run("publish", APP, self.orders, stdin=lines)

    def relay(self, *, code: int = 0) -> str:
        return self.eo("relay", APP, "--once", code=code)

    def run(self, *handlers: str, code: int = 0) -> str:
        chosen = [part for name in handlers for part in ("--handler", name)]
        return self.eo("run", APP, "--once", *chosen, code=code)

    def work(self) -> None:
        """Everything there is, to the end: orders, what they publish, and what reads that."""
        self.relay()
        self.run("book", "label")
        self.relay()
        self.run("collect")

    def follow(self, said: str, intro: str) -> list[str]:
        """Run the commands that the error prints behind these words, as it spells them."""
        found = re.search(re.escape(intro) + r" (eo [^.]*(?:\.\w[^.]*)*?)(?:\. | — |\.?\n|$)", said)
        assert found is not None, f"no command behind {intro!r} in:\n{said}"
        commands = found[1].split(" && ")
        for command in commands:
            words = command.replace("MODULE:APP", APP).split()
            assert words[0] == "eo"
            self.eo(*words[1:])
        return commands

    # --- what is there ---

    def one(self, statement: str) -> Any:
        with self.database.engine.connect() as connection:
            return connection.execute(text(statement)).scalar()

    def column(self, statement: str) -> list[Any]:
        with self.database.engine.connect() as connection:
            return list(connection.execute(text(statement)).scalars())

    def execute(self, statement: str) -> None:
        with self.database.begin("test") as connection:
            connection.execute(text(statement))

    def booked(self) -> list[int]:
        return self.column("SELECT id FROM booking ORDER BY id")

    def collected(self) -> list[int]:
        return self.column("SELECT id FROM collected ORDER BY id")

    def in_topic(self, topic: str) -> list[int]:
        """The orders in a topic, for a read_committed reader."""
        found = read_topic(self.settings.require_bootstrap_servers(), topic)
        return sorted(int(json.loads(message.value() or b"{}")["order_id"]) for message in found)

    def audited(self) -> list[str]:
        return self.column("SELECT action FROM eo.audit ORDER BY id")

    def state(self) -> tuple[object, ...]:
        """What a refused start must leave alone, here and in Kafka."""
        groups = [
            self._offsets(name, topic)
            for name, topic in (("book", self.orders), ("collect", self.bills), ("label", self.orders))
        ]
        partitions = [(self.orders, 0), (self.orders, 1), (self.bills, 0), (self.labels, 0)]
        topics = [self.shell.admin.watermarks(*partition) for partition in partitions]
        positions = self.column("SELECT (consumer_id, topic, partition, next_offset, epoch)::text FROM eo.position")
        outbox = self.column("SELECT id FROM eo.outbox_message UNION ALL SELECT id FROM eo.delayed_message ORDER BY id")
        return groups, topics, sorted(positions), outbox, self.booked(), self.collected()

    def _offsets(self, name: str, topic: str) -> object:
        # The group may have a coordinator only when somebody has asked for it.
        ask = functools.partial(self.shell.admin.group_offsets, self.group(name), topic)
        return patiently(ask, trouble=Retryable, seconds=30)

    def refused(self, command: str, *handlers: str) -> str:
        """A start that must stop with 70 and have changed nothing; returns what it said."""
        before = self.state()
        if command == "run":
            said = self.run(*handlers, code=STOPPED_TO_PROTECT_DATA)
        else:
            said = self.relay(code=STOPPED_TO_PROTECT_DATA)
        assert self.state() == before
        return said

    # --- backups ---

    def dump(self) -> Path:
        """A backup, as pg_dump makes it."""
        file = self.shell.directory / f"{uuid.uuid4().hex}.dump"
        _program("pg_dump", "--format=custom", f"--file={file}", _libpq(self.settings.require_database_url()))
        return file

    @contextmanager
    def restored(self, backup: Path, *, server: str | None = None) -> Iterator[Shop]:
        """That backup in a new database, of this server or of another one."""
        name, url = f"eo_restored_{uuid.uuid4().hex[:8]}", make_url(server or self.settings.require_database_url())
        admin = create_engine(url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        there = url.set(database=name).render_as_string(hide_password=False)
        _program("pg_restore", "--no-owner", "--exit-on-error", f"--dbname={_libpq(there)}", str(backup))
        shop = self.elsewhere(database_url=there)
        try:
            yield shop
        finally:
            shop.end()
            with admin.connect() as connection:
                connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
            admin.dispose()

    def end(self) -> None:
        for process in self.shell.processes:
            process.kill()
        self.database.engine.dispose()


def mirror(source: Shop, topic: str, target: Shop) -> None:
    """Copy a topic's records to the other cluster, as mirroring tools do: same key, value, headers and partition."""
    producer = Producer({"bootstrap.servers": target.settings.require_bootstrap_servers()})
    for message in read_topic(source.settings.require_bootstrap_servers(), topic):
        producer.produce(
            topic,
            key=message.key(),
            value=message.value(),
            headers=message.headers(),
            partition=message.partition() or 0,
            timestamp=message.timestamp()[1],
        )
    assert producer.flush(30) == 0


def _libpq(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _program(name: str, *arguments: str) -> None:
    program = postgres_programs.find().directory / name
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
