"""One cluster of three brokers, with a database server, for all tests of this directory; each leaves it whole.

What brokers do to applications under load takes minutes, and a machine that is not busy with other tests: those files
are collected only when they, or this directory, are asked for by name (`make test-cluster`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from tests.cluster.brokers import Brokers, three_brokers
from tests.cluster.places import migrated_database
from tests.conftest import make_settings

HERE = Path(__file__).parent
LONG = ("test_transforms.py", "test_spine.py", "test_lost_clients.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest tests` leaves the long ones out."""
    if collection_path.parent != HERE or collection_path.name not in LONG:
        return None
    asked_for = any((config.invocation_params.dir / arg.split("::")[0]).is_relative_to(HERE) for arg in config.args)
    return None if asked_for else True


@pytest.fixture(scope="package")
def shared_brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Brokers]:
    with three_brokers(tmp_path_factory.mktemp("three")) as brokers:
        yield brokers


@pytest.fixture
def brokers(shared_brokers: Brokers) -> Iterator[Brokers]:
    """The three, all of them running and in sync; what the test did to them is undone."""
    yield shared_brokers
    shared_brokers.make_whole()


@pytest.fixture
def database_url(shared_brokers: Brokers) -> Iterator[str]:
    """The URL of a fresh migrated database on the server beside the three brokers."""
    with migrated_database(shared_brokers) as url:
        yield url


@pytest.fixture
def settings(shared_brokers: Brokers, database_url: str) -> Settings:
    """Settings of this test's database and the three brokers."""
    return make_settings(database_url, shared_brokers.bootstrap_servers)


@pytest.fixture
def make_topic(shared_brokers: Brokers) -> Callable[..., str]:
    """Creates a topic, three replicas of which two must be in sync, with a name nobody else has."""
    admin = Admin(Settings.load(kafka_bootstrap_servers=shared_brokers.bootstrap_servers))

    def make(prefix: str = "t", *, partitions: int = 1, config: Mapping[str, str] | None = None) -> str:
        name = f"{prefix}.{uuid.uuid4().hex[:10]}"
        wanted = {"min.insync.replicas": "2", **(config or {})}
        admin.create(name, partitions=partitions, replicas=3, config=wanted)
        return name

    return make
