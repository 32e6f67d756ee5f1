"""`eoframework.testing.containers`: ready when they say so, with the settings of `eo dev`, gone at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from confluent_kafka import Producer
from sqlalchemy import create_engine, text

from eoframework.dev.kafka_properties import behaviour
from eoframework.errors import Unreachable
from eoframework.kafka.admin import Admin
from eoframework.testing.containers import KafkaContainer, PostgresContainer
from tests.conftest import make_settings
from tests.containers.engine import Engine
from tests.containers.wire import broker_configuration


@pytest.fixture(scope="module")
def kafka(engine: Engine) -> Iterator[KafkaContainer]:
    with KafkaContainer(properties={"num.io.threads": "3"}) as container:
        yield container


@pytest.fixture(scope="module")
def postgres(engine: Engine) -> Iterator[PostgresContainer]:
    with PostgresContainer(settings={"work_mem": "7MB"}) as container:
        yield container


def ids(engine: Engine) -> set[str]:
    client = engine.client()
    try:
        return {container.id for container in client.containers.list(all=True)}
    finally:
        client.close()


def test_a_transaction_commits_at_once(kafka: KafkaContainer) -> None:
    """Seen to fail with the wait for a probe transaction taken out of start()."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "transactional.id": "at-once"})
    producer.init_transactions(2)
    producer.begin_transaction()
    producer.produce("eo.testing.probe", b"1")
    producer.commit_transaction(2)


def test_the_broker_behaves_as_that_of_eo_dev(kafka: KafkaContainer) -> None:
    found = broker_configuration(kafka.bootstrap_servers)
    wanted = {**behaviour(brokers=1, session_timeout_ms=6_000), "num.io.threads": "3"}
    assert {name: found.get(name) for name in wanted} == wanted


def test_two_clusters_have_two_ids(kafka: KafkaContainer) -> None:
    """Else data that belong to another cluster could not be told apart."""
    with KafkaContainer(heap_mb=256) as other:
        settings = [make_settings("postgresql://x/x", each.bootstrap_servers) for each in (kafka, other)]
        assert len({Admin(each).cluster_id() for each in settings}) == 2


def test_the_database_answers_at_once_with_its_settings(postgres: PostgresContainer) -> None:
    engine = create_engine(postgres.database_url)
    with engine.connect() as connection:
        names = ("max_connections", "work_mem", "fsync", "synchronous_commit", "server_encoding", "search_path")
        found = [connection.execute(text(f"SHOW {name}")).scalar_one() for name in names]
    engine.dispose()
    assert found == ["200", "7MB", "on", "on", "UTF8", "public"]


def test_a_broker_that_dies_tells_its_log_and_leaves_nothing(engine: Engine) -> None:
    before = ids(engine)
    broken = KafkaContainer(properties={"process.roles": "nonsense"})
    with pytest.raises(Unreachable, match="nonsense") as caught:
        broken.start()
    assert "Kafka's container ended while starting" in caught.value.what
    assert not ids(engine) - before


def test_a_server_that_dies_tells_its_log(engine: Engine) -> None:
    with pytest.raises(Unreachable, match="max_connections"):
        PostgresContainer(settings={"max_connections": "none"}).start()
