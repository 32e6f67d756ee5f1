"""Real services for every test: one broker and one server a run, a fresh database and fresh topics a test."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from eoframework.db import migrating
from eoframework.db.session import Database, open_database
from eoframework.kafka.admin import Admin
from eoframework.schema import Schema
from eoframework.settings import Settings
from tests.parallel import Controller, Worker, services_of_the_settings, start_services, told_by_the_controller

MakeTopic = Callable[..., str]


@dataclass(frozen=True)
class Addresses:
    """Where the run's services answer."""

    database_url: str
    bootstrap_servers: str


def pytest_configure(config: pytest.Config) -> None:
    # A worker has no number of workers.
    if config.getoption("numprocesses", None):
        config.pluginmanager.register(Controller(), "eo-controller")
    elif hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker(), "eo-worker")


@pytest.fixture(scope="session")
def services(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    """The services that EO_ settings point at, else our own for the length of the run."""
    found = services_of_the_settings() or told_by_the_controller(request.config)
    if found is not None:
        yield Addresses(*found)
        return
    with start_services(tmp_path_factory.mktemp("services")) as started:
        yield Addresses(started.database_url, started.bootstrap_servers)


@pytest.fixture(scope="session")
def template(services: Addresses) -> Iterator[str]:
    """A migrated database to copy: migrating for each test would cost more than most tests."""
    with database_to_copy(services) as url:
        yield url


@contextmanager
def database_to_copy(services: Addresses) -> Iterator[str]:
    """A migrated database that does not mind to be copied."""
    with database_named(services, f"eo_template_{uuid.uuid4().hex[:12]}") as url:
        database = open_database(url, Schema())
        migrating.upgrade(database)
        with database.begin("test") as connection:
            # Tests do on purpose what only somebody who copied a database would.
            connection.execute(text("UPDATE eo.outbox SET home = NULL"))
        database.engine.dispose()
        yield url


@pytest.fixture
def database_url(services: Addresses, template: str) -> Iterator[str]:
    """The URL of a fresh migrated database."""
    source = make_url(template).database
    with database_named(services, f"eo_test_{uuid.uuid4().hex[:12]}", source=source) as url:
        mint_outbox(url)
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A fresh migrated database."""
    opened = open_database(database_url, Schema())
    yield opened
    opened.engine.dispose()


@pytest.fixture
def settings(services: Addresses, database_url: str) -> Settings:
    """Settings of this test's database and the run's broker."""
    return make_settings(database_url, services.bootstrap_servers)


def make_settings(database_url: str, bootstrap_servers: str, **overrides: object) -> Settings:
    return Settings.load(database_url=database_url, kafka_bootstrap_servers=bootstrap_servers, **overrides)


@pytest.fixture
def make_topic(settings: Settings) -> MakeTopic:
    """Creates a topic with a name nobody else has."""
    admin = Admin(settings)

    def make(prefix: str = "t", *, partitions: int = 1, config: Mapping[str, str] | None = None) -> str:
        name = f"{prefix}.{uuid.uuid4().hex[:10]}"
        admin.create(name, partitions=partitions, replicas=1, config=dict(config or {}))
        return name

    return make


@pytest.fixture
def topic_name(make_topic: MakeTopic) -> str:
    """A fresh topic with one partition."""
    return make_topic()


def mint_outbox(url: str) -> None:
    """Copies of one template share the outbox's identity; the relays of two tests would fence each other."""
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE eo.outbox SET id = gen_random_uuid()"))
    engine.dispose()


class database_named:  # noqa: N801 - used as a context manager, reads as a function
    """Creates a database, yields its URL, drops it with whoever is still connected."""

    def __init__(self, services: Addresses, name: str, *, source: str | None = None) -> None:
        self._admin_url = make_url(services.database_url)
        self._name = name
        self._source = source

    def __enter__(self) -> str:
        template = f' TEMPLATE "{self._source}"' if self._source else ""
        if self._source:
            # A pooler keeps its sessions when its clients have gone, and who is copied must be alone.
            self._run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{self._source}'")
        self._run(f'CREATE DATABASE "{self._name}"{template}')
        return self._admin_url.set(database=self._name).render_as_string(hide_password=False)

    def __exit__(self, *_: object) -> None:
        self._run(f'DROP DATABASE "{self._name}" WITH (FORCE)')

    def _run(self, statement: str) -> None:
        engine = create_engine(self._admin_url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()


REPOSITORY = Path(__file__).resolve().parent.parent
