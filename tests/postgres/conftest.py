"""The ledger app and the shop on a database reached in some special way; timeouts are short, take-overs soon."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from eoframework.db import migrating
from eoframework.db.session import Database, open_database
from eoframework.kafka.admin import Admin
from eoframework.schema import Schema
from tests.apps.ledger import LEDGER
from tests.cli.conftest import Shell
from tests.conftest import Addresses, database_named, make_settings
from tests.consume.nursery import Nursery
from tests.outages.conftest import PARTITIONS, Scene
from tests.postgres.bouncer import Bouncer, bouncer_before

SHORT = {"EO_IDLE_IN_TRANSACTION_TIMEOUT": "1", "EO_LOCK_TIMEOUT": "2", "EO_STATEMENT_TIMEOUT": "3"}


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


@pytest.fixture(scope="session")
def bouncer(services: Addresses) -> Iterator[Bouncer]:
    """PgBouncer before the run's server."""
    with bouncer_before(services.database_url) as started:
        yield started


@contextmanager
def migrated(url: str) -> Iterator[Database]:
    """The database of this URL, with our tables and the ledger's."""
    database = open_database(url, Schema())
    migrating.upgrade(database)
    with database.engine.begin() as connection:
        connection.execute(text(LEDGER))
    yield database
    database.engine.dispose()


@contextmanager
def scene_at(url: str, services: Addresses, nursery: Nursery, directory: Path) -> Iterator[Scene]:
    """The ledger app's processes on the database of this URL; its topics are made, the checkpoint's too."""
    with migrated(url) as database:
        made = Scene(services, nursery, database.engine, url, directory)
        for topic in (made.topic, made.booked):
            Admin(made.settings).create(topic, partitions=PARTITIONS, replicas=1, config={})
        assert made.spawn("topics", "apply").wait() == 0
        yield made


@contextmanager
def fresh_scene(url: str, services: Addresses, nursery: Nursery, directory: Path) -> Iterator[Scene]:
    """The same on a database of its own, on the server of this URL."""
    place = Addresses(url, services.bootstrap_servers)
    with database_named(place, f"eo_{uuid.uuid4().hex[:10]}") as own, scene_at(own, place, nursery, directory) as scene:
        yield scene


@contextmanager
def empty_shell(url: str, services: Addresses, nursery: Nursery, directory: Path) -> Iterator[Shell]:
    """`eo` as a process on an empty database of its own, on the server of this URL."""
    place = Addresses(url, services.bootstrap_servers)
    with database_named(place, f"eo_{uuid.uuid4().hex[:10]}") as own:
        from_settings = open_database(own, Schema())
        settings = make_settings(own, services.bootstrap_servers)
        shell = Shell(nursery, from_settings, settings, uuid.uuid4().hex[:10], directory)
        yield shell
        for process in shell.processes:
            process.kill()
        from_settings.engine.dispose()
