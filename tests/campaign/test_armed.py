"""Crash points are armed on throw-away databases only, and `eo` itself never ignores them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eoframework.crashtest.armed import CrashPoint
from eoframework.db.session import open_database
from eoframework.db.throw_away import is_throw_away, mark_throw_away
from eoframework.schema import Schema
from eoframework.settings import CRASH_POINTS
from tests.conftest import REPOSITORY, Addresses, database_named
from tests.consume.nursery import Nursery
from tests.consume.scene import Scene, open_scene
from tests.processes import settings_environment

ARMED = "eoframework.crashtest.armed"
APP = "tests.apps.ledger:app"


@pytest.fixture
def scene(services: Addresses, template: str, tmp_path: Path) -> Iterator[Scene]:
    """A database and topics of their own, with messages in them."""
    with Nursery() as nursery, open_scene(services, template, nursery, tmp_path) as opened:
        opened.send(20)
        yield opened


def run(scene: Scene, module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The finished process."""
    topics = {"LEDGER_TOPIC": scene.topic, "BOOKED_TOPIC": scene.booked, "EO_MAX_WAIT": "0.1"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **settings_environment(scene.settings, **topics), **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def mark(scene: Scene) -> None:
    database = open_database(scene.settings.require_database_url(), Schema())
    mark_throw_away(database)
    database.engine.dispose()


def test_a_database_that_is_not_a_throw_away_is_left_alone(scene: Scene) -> None:
    """Seen to fail without `_refuse_a_database_that_matters`: the process was killed."""
    refused = run(scene, ARMED, "run", APP, "--once", EO_CRASH_AT="db.committed:1", EO_MAX_BATCH="7")
    assert refused.returncode == 3, refused.stderr
    assert "is not marked as a throw-away" in refused.stderr
    assert "COMMENT ON DATABASE" in refused.stderr
    assert scene.count_booked() == 0


def test_armed_it_is_killed_at_the_point_and_its_successor_makes_up_for_it(scene: Scene) -> None:
    mark(scene)
    killed = run(scene, ARMED, "run", APP, EO_CRASH_AT="db.committed:2", EO_MAX_BATCH="7")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 2 <= scene.count_booked() <= 14
    assert run(scene, "eoframework.cli", "run", APP, "--once").returncode == 0
    scene.check()


def test_eo_itself_refuses_to_ignore_a_crash_point(scene: Scene) -> None:
    """Seen to fail without `refuse_crash_points`: it ran to the end, and a crash test would have counted a crash."""
    mark(scene)
    for name in CRASH_POINTS:
        refused = run(scene, "eoframework.cli", "run", APP, "--once", **{name: "db.committed:1"})
        assert refused.returncode == 3, refused.stderr
        assert name in refused.stderr
        assert "python -m eoframework.crashtest.armed" in refused.stderr
    assert scene.count_booked() == 0


def test_what_would_not_be_armed_is_refused(scene: Scene) -> None:
    mark(scene)
    for arguments, says in ((["--workers", "2"], "not armed"), (["--set", "database_url=postgresql://x/y"], "EO_DAT")):
        refused = run(scene, ARMED, "run", APP, *arguments, EO_CRASH_AT="db.committed:1")
        assert refused.returncode == 3, refused.stderr
        assert says in refused.stderr


def test_the_mark_is_not_copied_with_the_database(services: Addresses, scene: Scene) -> None:
    """A copy of a throw-away may be the one that somebody works with."""
    mine = open_database(scene.settings.require_database_url(), Schema())
    mark_throw_away(mine)
    assert is_throw_away(mine)
    name = str(mine.engine.url.database)
    mine.engine.dispose()
    scene.engine.dispose()
    with database_named(services, f"{name}_copy", source=name) as url:
        copy = open_database(url, Schema())
        assert not is_throw_away(copy)
        copy.engine.dispose()


def test_only_the_events_of_batches_are_counted() -> None:
    """How many polls come back empty, and how many other transactions there are, depends on the moment."""
    point = CrashPoint()
    for name, fields in (("kafka.polled", {"records": 0}), ("db.committing", {}), ("db.committed", {})):
        point.on_event(name, dict(fields))
    assert not point._seen
    for name in ("consume.handled", "db.committing", "db.committed"):
        point.on_event(name, {})
    assert dict(point._seen) == {"consume.handled": 1, "db.committing": 1, "db.committed": 1}
