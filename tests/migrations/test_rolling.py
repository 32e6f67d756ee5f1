"""A new release under load: the tables first, beside processes of the code before it, then the new code beside the old.

`releases/` has the code of each version as it was when the next one was begun; a release adds its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from eoframework.db import migrating
from eoframework.db.session import Database
from eoframework.errors import EoError
from eoframework.settings import environment
from tests.conftest import Addresses, mint_outbox
from tests.processes import eventually, read_topic

RELEASES = Path(__file__).parent / "releases"
SHOP = Path(__file__).parent / "rolling_shop.py"


class Deployment:
    """Processes of the old and of the new code on one database, in a directory that is no checkout."""

    def __init__(self, directory: Path, old: str, database: Database, servers: str) -> None:
        self.directory, self.old, self.database, self.servers = directory, old, database, servers
        self.suffix = uuid.uuid4().hex[:10]
        with tarfile.open(RELEASES / f"{old}.tar.xz") as archive:
            archive.extractall(directory / "release", filter="data")
        shutil.copy(SHOP, directory / "rolling_shop.py")
        self._environment = {
            "EO_DATABASE_URL": database.engine.url.render_as_string(hide_password=False),
            "EO_KAFKA_BOOTSTRAP_SERVERS": servers,
            "SHOP_SUFFIX": self.suffix,
            "EO_RELAY_LEASE": "2",
        }
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, code: str, *command: str) -> subprocess.Popen[str]:
        release = {"PYTHONPATH": str(self.directory / "release")} if code == self.old else {}
        with (self.directory / f"{len(self._processes)}-{code}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.directory,
                env=environment(**self._environment, **release, CODE=code),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._processes.append(process)
        return process

    def eo(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        return self.start(code, "-m", "eoframework.cli", *arguments)

    def run(self, code: str, *arguments: str) -> str:
        return self.ended(self.eo(code, *arguments))

    def ended(self, process: subprocess.Popen[str]) -> str:
        said, _ = process.communicate(timeout=90)
        assert process.returncode == 0, f"{process.args}: {process.returncode}\n{said}{self.logs()}"
        return said

    def stop(self, *processes: subprocess.Popen[str]) -> None:
        for process in processes:
            process.terminate()
        for process in processes:
            self.ended(process)

    def count(self, statement: str) -> int:
        with self.database.engine.connect() as connection:
            return int(connection.execute(text(statement)).scalar_one())

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        try:
            eventually(condition, what, seconds=120)
        except AssertionError as error:
            raise AssertionError(f"{error}{self.logs()}") from None

    def wait_for_bookings(self, code: str, more: int) -> None:
        before = self.count(f"SELECT count(*) FROM public.booking WHERE code = '{code}'")
        self.wait(
            lambda: self.count(f"SELECT count(*) FROM public.booking WHERE code = '{code}'") >= before + more,
            f"{more} more bookings by the code of {code}",
        )

    def logs(self) -> str:
        return "".join(
            f"\n--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.directory.glob("*.log"))
        )

    def end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.fixture(params=["eo0001", "eo0002", "eo0003"])
def deployment(
    request: pytest.FixtureRequest, tmp_path: Path, empty: Database, services: Addresses
) -> Iterator[Deployment]:
    with empty.begin("test") as connection:
        connection.execute(text("CREATE TABLE public.booking (id int, code text)"))
    made = Deployment(tmp_path, request.param, empty, services.bootstrap_servers)
    yield made
    made.end()


def test_workers_go_on_while_the_tables_change(deployment: Deployment) -> None:
    """Nothing is lost and nothing doubled by code that meets tables newer than it is, and by both codes side by side.

    Seen to fail with `first_at` added as NOT NULL without a default in 0002: the old workers stopped.
    """
    old, new, url = deployment.old, "new", deployment.database.engine.url
    deployment.run(old, "db", "upgrade")
    assert migrating.current(deployment.database) == old
    mint_outbox(url.render_as_string(hide_password=False))
    deployment.run(old, "topics", "apply", "rolling_shop:app")
    publishers = [deployment.start(old, "rolling_shop.py", "0")]
    before = [deployment.eo(old, *words, "rolling_shop:app") for words in (("relay",), ("run",), ("run",))]
    deployment.wait_for_bookings(old, 100)

    upgraded = json.loads(deployment.run(new, "db", "upgrade", "--json"))
    assert (upgraded["from"], upgraded["to"]) == (old, migrating.head())
    deployment.wait_for_bookings(old, 100)
    publishers.append(deployment.start(new, "rolling_shop.py", "1000000"))
    after = [deployment.eo(new, *words, "rolling_shop:app") for words in (("relay",), ("run",))]
    deployment.wait_for_bookings(new, 50)
    deployment.stop(*before)
    deployment.wait_for_bookings(new, 100)

    for code in (old, new):
        (deployment.directory / f"stop-{code}").touch()
    published = sum(int(deployment.ended(publisher)) for publisher in publishers)
    (deployment.directory / "mended").touch()
    deployment.wait(
        lambda: deployment.count("SELECT count(*) FROM public.booking") >= published, f"{published} bookings"
    )
    deployment.wait(lambda: deployment.count("SELECT count(*) FROM eo.outbox_message") == 0, "an empty outbox")
    deployment.stop(*after)
    assert deployment.count("SELECT count(DISTINCT id) FROM public.booking") == published
    assert deployment.count("SELECT count(*) FROM public.booking") == published
    assert deployment.count("SELECT count(*) FROM eo.parked_message") == 0
    servers = deployment.servers
    sent = [
        json.loads(m.value() or b"")["order_id"] for m in read_topic(servers, f"rolling.booked.{deployment.suffix}")
    ]
    assert len(sent) == len(set(sent)) == published
    migrating.check(deployment.database)


def test_an_upgrade_does_not_deadlock_with_batches(empty: Database, caplog: pytest.LogCaptureFixture) -> None:
    """Seen to fail without LOCK TABLE in 0002: up to 27 deadlocks in a row, of the upgrade as of the workers."""
    migrating.upgrade(empty, "eo0001")
    with empty.begin("test") as connection:
        connection.execute(text("INSERT INTO eo.consumer (name, topic) VALUES ('a.b', 't')"))
        connection.execute(
            text("""INSERT INTO eo.position (consumer_id, topic_id, partition, topic, cluster_id, next_offset)
                    SELECT 1, gen_random_uuid(), p, 't', 'c', 0 FROM generate_series(0, 3) AS p""")
        )
    stop, failures = threading.Event(), list[Exception]()

    def batches(partition: int) -> None:
        while not stop.is_set():
            try:
                with empty.begin("a batch") as connection:
                    moved = "UPDATE eo.position SET next_offset = next_offset + 1 WHERE partition = :partition"
                    connection.execute(text(moved), {"partition": partition})
                    time.sleep(0.01)
                    connection.execute(text("INSERT INTO eo.processed_message VALUES (1, gen_random_uuid())"))
            except EoError as error:
                failures.append(error)

    with ThreadPoolExecutor(4) as pool:
        for partition in range(4):
            pool.submit(batches, partition)
        time.sleep(0.2)
        with caplog.at_level("INFO", logger="eoframework.db.migrating"):
            migrating.upgrade(empty)
        stop.set()
    assert failures == []
    assert "trying again" not in caplog.text


def test_an_upgrade_waits_briefly_and_tries_again(
    empty: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen to fail with the exception not caught in migrating._attempt: Conflict, and the deployment had failed."""
    monkeypatch.setattr(migrating, "_LOCK_WAIT", "100ms")
    migrating.upgrade(empty, "eo0001")
    caplog.set_level("INFO", logger="eoframework.db.migrating")
    with ThreadPoolExecutor(1) as pool:
        with empty.begin("a long transaction") as connection:
            connection.execute(text("SELECT FROM eo.position"))
            upgrade = pool.submit(migrating.upgrade, empty)
            eventually(lambda: caplog.text.count("trying again") >= 2 or upgrade.done(), "a second attempt")
            assert not upgrade.done()
        assert upgrade.result(60) == migrating.head()
