"""`eo` as a process, on a database and topics of its own."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import pytest
from sqlalchemy import text

from eoframework.checkpoint import checkpoint_topic
from eoframework.db.session import Database
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from tests.conftest import REPOSITORY
from tests.consume.nursery import Nursery
from tests.processes import Eo, settings_environment

APP = "tests.cli.shop:app"


@dataclass
class Shell:
    """Runs `eo` commands in the repository; every process is gone at the end of the test.

    What `run` runs is forked from a process that has imported everything: starting anew takes a second of processor
    time a command. What `start` starts is started as a user would.
    """

    nursery: Nursery
    database: Database
    settings: Settings
    suffix: str
    directory: Path
    processes: list[Eo] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def orders(self) -> str:
        return f"shop.orders.{self.suffix}"

    @property
    def consumer(self) -> str:
        return f"shop-{self.suffix}.book"

    def run(
        self, *arguments: str, code: int = 0, stdin: str = "", cwd: Path = REPOSITORY, **changes: str
    ) -> subprocess.CompletedProcess[str]:
        """The finished command; anything but the expected exit code fails the test with what it said."""
        place = Path(mkdtemp(dir=self.directory))
        files = {name: place / name for name in ("stdin", "stdout", "stderr")}
        files["stdin"].write_text(stdin)
        process = self.nursery.spawn(
            *arguments,
            environment=self._environment() | changes,
            log=files["stderr"],
            stdin=files["stdin"],
            stdout=files["stdout"],
            directory=cwd,
        )
        ended = process.wait(90)
        done = subprocess.CompletedProcess(arguments, ended, files["stdout"].read_text(), files["stderr"].read_text())
        assert done.returncode == code, f"eo {arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *arguments: str, **changes: str) -> Eo:
        log = self.directory / f"eo-{len(self.processes)}.log"
        process = Eo(*arguments, environment=self._environment() | changes, log=log)
        self.processes.append(process)
        return process

    def publish(self, first: int, count: int) -> None:
        lines = "".join(f'{{"order_id": {number}}}\n' for number in range(first, first + count))
        self.run("publish", APP, self.orders, stdin=lines)

    @property
    def admin(self) -> Admin:
        return Admin(self.settings)

    def scalar(self, statement: str) -> int:
        with self.database.engine.connect() as connection:
            return int(connection.scalar(text(statement)) or 0)

    def _environment(self) -> dict[str, str]:
        own = {"SHOP_SUFFIX": self.suffix, "NO_COLOR": "1", "COLUMNS": "200"}
        return settings_environment(self.settings, **own) | self.extra


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


@pytest.fixture
def bare_shell(nursery: Nursery, database: Database, settings: Settings, tmp_path: Path) -> Iterator[Shell]:
    """A shell with an outbox of its own, and no topics yet."""
    with database.begin("test") as connection:
        # Databases of tests are copies of one template; outboxes of one identity would fence each other.
        connection.execute(text("UPDATE eo.outbox SET id = gen_random_uuid()"))
        connection.execute(text("CREATE TABLE booking (id int, pid int)"))
        connection.execute(text("CREATE TABLE confirmation (id int)"))
    shell = Shell(nursery, database, settings, uuid.uuid4().hex[:10], tmp_path)
    yield shell
    for process in shell.processes:
        process.kill()


@pytest.fixture
def shell(bare_shell: Shell) -> Shell:
    """A shell whose app's topics exist, made without `eo topics apply`: a process less for most tests."""
    with bare_shell.database.engine.connect() as connection:
        outbox_id = connection.scalar(text("SELECT id FROM eo.outbox"))
    admin = bare_shell.admin
    admin.create(bare_shell.orders, partitions=2, replicas=1, config={})
    admin.create(f"shop.booked.{bare_shell.suffix}", partitions=1, replicas=1, config={})
    admin.create(checkpoint_topic(outbox_id), partitions=4, replicas=1, config={"cleanup.policy": "compact"})
    return bare_shell
