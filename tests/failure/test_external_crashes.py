"""kill -9 around a real HTTP call of a real process: how often the other side is asked, and with which key."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from eoframework.db.external_admin import ExternalDesk
from eoframework.db.session import Database
from eoframework.settings import Settings, environment
from tests.conftest import REPOSITORY
from tests.consume.harness import column
from tests.failure.pay_once import UNRESOLVED
from tests.failure.till import Till
from tests.processes import eventually, settings_environment

POINTS = ["external.claimed:1", "external.called:1", "external.stored:1"]


@dataclass
class Shop:
    """Processes that pay one order each, and the service they pay at."""

    settings: Settings
    till: Till
    processes: list[subprocess.Popen[str]]

    def start(self, **changes: str) -> subprocess.Popen[str]:
        own = settings_environment(self.settings, TILL=self.till.url, **changes)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.failure.pay_once", "1"],
            cwd=REPOSITORY,
            env=environment(**own),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        return process

    def run(self, code: int, **changes: str) -> str:
        process = self.start(**changes)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == code, output
        return output


@pytest.fixture
def shop(settings: Settings, database: Database) -> Iterator[Shop]:
    with database.begin("test") as connection:
        connection.execute(text("CREATE TABLE ledger (charge int)"))
    with Till() as till:
        made = Shop(settings, till, [])
        yield made
        for process in made.processes:
            process.kill()
            process.communicate(timeout=10)


def booked(database: Database) -> list[Any]:
    return column(database.engine, "SELECT charge FROM ledger")


@pytest.mark.parametrize("point", POINTS)
def test_retry_at_a_receiver_that_honours_the_key(shop: Shop, database: Database, point: str) -> None:
    """One charge, one effect, whatever was killed when; after the result is stored not even a second request.

    Seen to fail with a random idempotency key (two charges), and without `if row.done` in ExternalCallRows.claim (what
    was stored was not found).
    """
    shop.run(-signal.SIGKILL, CRASH_AT=point)
    assert booked(database) == []
    shop.run(0)
    asked = shop.till.log()
    expected = {POINTS[0]: [2], POINTS[1]: [1, 2], POINTS[2]: [1]}[point]
    assert [entry["attempt"] for entry in asked] == [entry["fence"] for entry in asked] == expected
    assert len({entry["key"] for entry in asked}) == 1
    assert shop.till.charges() == 1
    assert booked(database) == [asked[-1]["charge"]]


def test_retry_at_a_receiver_that_ignores_the_key_charges_twice(shop: Shop, database: Database) -> None:
    """What the guard cannot promise: the effect is once in the database, the charge is not once in the world."""
    shop.run(-signal.SIGKILL, CRASH_AT="external.called:1", HONOUR="0")
    shop.run(0, HONOUR="0")
    assert shop.till.charges() == 2
    assert booked(database) == [2]


@pytest.mark.parametrize("point", POINTS[:2])
def test_ask(shop: Shop, database: Database, point: str) -> None:
    """Nobody calls again until a person has looked, whether the call had been made or not.

    Seen to fail with the claim's transaction rolled back: nothing was left of it, and it was called again.
    """
    shop.run(-signal.SIGKILL, CRASH_AT=point, POLICY="ask")
    made = shop.till.log()
    assert "eo external resolve" in shop.run(UNRESOLVED, POLICY="ask")
    assert shop.till.log() == made
    desk = ExternalDesk(database)
    (line,) = desk.lines()
    if made:
        assert line.key == made[0]["key"], "what a person looks for at the other side"
        desk.resolve(line.id, {"charge": made[0]["charge"]})
    else:
        desk.not_done(line.id)
    shop.run(0, POLICY="ask")
    assert shop.till.charges() == 1
    assert booked(database) == [1]


def test_a_frozen_caller_that_wakes_up_stores_nothing(shop: Shop, database: Database, tmp_path: Path) -> None:
    """Frozen with the answer in its hands until its lease is over and another process has done it all.

    Seen to fail with `AND fence = ... AND done_at IS NULL` removed from _MINE: the first answer took the place of the
    one that had been booked.
    """
    mark = tmp_path / "frozen"
    late = shop.start(FREEZE_AT="external.called:1", FREEZE_MARK=str(mark), HONOUR="0")
    eventually(mark.exists, "frozen")
    shop.run(0, HONOUR="0")
    os.kill(late.pid, signal.SIGCONT)
    told, _ = late.communicate(timeout=60)
    assert "outlasted its lease" in told
    assert late.returncode == 0
    assert set(column(database.engine, "SELECT result ->> 'charge' FROM eo.external_call")) == {"2"}
