"""The example in containers: docker-compose.yml for the services, the Dockerfile for workers and relay; and a kill."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest
from docker import DockerClient
from docker.errors import BuildError
from docker.models.containers import Container
from sqlalchemy import Engine as DatabaseEngine
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from eoframework.db.probe import select_one
from eoframework.dev import processes
from eoframework.errors import Unreachable
from eoframework.kafka.probe import commit_probe_transaction
from examples.shop import reconcile
from examples.shop.app import Base, Item, Product, delays, orders, place_order, refusals, reservations
from tests.conftest import REPOSITORY
from tests.containers.engine import Engine, compose
from tests.processes import eventually

APP = "examples.shop.app:app"
IMAGE = "eo-shop-test"
SKUS = [f"sku-{number}" for number in range(8)]
ORDERS = 400
TIMED_OUT = 124
SCHEMA_OUT_OF_DATE, UNREACHABLE = 3, 69
INSIDE = {
    "EO_DATABASE_URL": "postgresql://eo:eo@postgres:5432/eo",
    "EO_KAFKA_BOOTSTRAP_SERVERS": "kafka:19092",
    "EO_RELAY_LEASE": "2",
    "EO_MAX_BATCH": "20",
}


@dataclass
class Compose:
    """docker-compose.yml, up on free ports."""

    project: str
    kafka_port: int
    postgres_port: int

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self.kafka_port}"

    @property
    def database_url(self) -> str:
        return f"postgresql+psycopg://eo:eo@127.0.0.1:{self.postgres_port}/eo"

    def call(self, *arguments: str) -> None:
        ports = {"EO_DEV_KAFKA_PORT": str(self.kafka_port), "EO_DEV_POSTGRES_PORT": str(self.postgres_port)}
        done = subprocess.run(
            [*compose(), "-p", self.project, "-f", "docker-compose.yml", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **ports},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@dataclass
class Fleet:
    """The containers of the app."""

    client: DockerClient
    network: str
    started: list[Container] = field(default_factory=list)

    def start(
        self, *command: str, entrypoint: list[str] | None = None, variables: Mapping[str, str] | None = None
    ) -> Container:
        environment = {**INSIDE, **(variables or {})}
        container = self.client.containers.run(
            IMAGE, list(command), entrypoint=entrypoint, detach=True, network=self.network, environment=environment
        )
        self.started.append(container)
        return container

    def run(self, *command: str) -> tuple[int, str]:
        """A command to its end: exit code and output."""
        container = self.start(*command)
        code = int(container.wait(timeout=120)["StatusCode"])
        return code, container.logs().decode()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[DockerClient]:
    opened = engine.client()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def image(client: DockerClient) -> str:
    """The Dockerfile, built as its first lines say."""
    try:
        client.images.build(path=str(REPOSITORY), tag=IMAGE, rm=True, forcerm=True)
    except BuildError as error:
        log = "".join(str(line.get("stream", "")) for line in error.build_log if isinstance(line, dict))
        raise AssertionError(f"the image was not built: {error}\n{log}") from error
    return IMAGE


@pytest.fixture(scope="module")
def services(engine: Engine) -> Iterator[Compose]:
    kafka = processes.free_port()
    up = Compose(f"eo-test-{uuid.uuid4().hex[:6]}", kafka, processes.free_port(avoid=[kafka]))
    try:
        up.call("up", "-d")
        eventually(lambda: answers(up), "the services' probes")
        yield up
    finally:
        up.call("down", "--volumes", "--remove-orphans")


@pytest.fixture
def fleet(client: DockerClient, image: str, services: Compose) -> Iterator[Fleet]:
    made = Fleet(client, f"{services.project}_default")
    yield made
    for container in made.started:
        container.remove(force=True, v=True)


def answers(services: Compose) -> bool:
    try:
        select_one(services.database_url.replace("+psycopg", ""))
        commit_probe_transaction(services.bootstrap_servers, topic="eo.test.probe", timeout=3)
    except Unreachable:
        return False
    return True


def health(container: Container, within: float = 10) -> int:
    """The exit code of the container's own health check, run in it (podman without systemd runs none by itself)."""
    container.reload()
    kind, *test = container.attrs["Config"]["Healthcheck"]["Test"]
    command = ["sh", "-c", *test] if kind == "CMD-SHELL" else test
    return int(container.exec_run(["timeout", str(within), *command]).exit_code)


def test_the_services_health_checks_pass_and_notice_a_frozen_broker(services: Compose, client: DockerClient) -> None:
    """Seen to fail for the frozen broker with an open port as the check."""
    of_project = {"label": f"com.docker.compose.project={services.project}"}
    containers = {
        each.labels["com.docker.compose.service"]: each for each in client.containers.list(filters=of_project)
    }
    assert {name: health(container) for name, container in containers.items()} == {"kafka": 0, "postgres": 0}
    kafka = containers["kafka"]
    # The broker's process alone: unlike in a paused container the health check can still be run.
    kafka.kill("SIGSTOP")
    try:
        assert health(kafka, within=3) == TIMED_OUT
    finally:
        kafka.kill("SIGCONT")
    assert health(kafka) == 0


def test_the_image_runs_eo_without_root(client: DockerClient, image: str) -> None:
    config = client.images.get(image).attrs["Config"]
    assert config["User"] == "10001"
    assert config["Entrypoint"] == ["eo"]
    assert b"Exactly-once processing" in client.containers.run(image, [], remove=True)
    assert client.containers.run(image, ["-u"], entrypoint="id", remove=True).strip() == b"10001"


def test_the_images_health_check_tells_a_database_that_does_not_fit(fleet: Fleet) -> None:
    asleep = {"entrypoint": ["sleep", "60"]}
    assert health(fleet.start(**asleep)) == SCHEMA_OUT_OF_DATE
    wrong = {"EO_DATABASE_URL": "postgresql://eo:eo@postgres:5433/eo"}
    assert health(fleet.start(**asleep, variables=wrong)) == UNREACHABLE


def test_the_shop_in_containers_with_kills(fleet: Fleet, services: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail with an entrypoint that is a shell around `eo`: SIGTERM does not reach it, and nothing drains."""
    monkeypatch.setenv("EO_DATABASE_URL", services.database_url)
    monkeypatch.setenv("EO_KAFKA_BOOTSTRAP_SERVERS", services.bootstrap_servers)
    database = create_engine(services.database_url)
    assert fleet.run("db", "upgrade") == (0, "no tables -> " + head(database) + "\n")
    assert fleet.run("topics", "apply", APP)[0] == 0
    open_shop(database)

    workers = [fleet.start("run", APP) for _ in range(2)]
    relays = [fleet.start("relay", APP)]
    for number in range(ORDERS):
        with Session(database) as session, session.begin():
            place_order(session, SKUS[number % len(SKUS)], 1)
        if number == ORDERS // 3:
            eventually(lambda: count(database, "shop_movement") > 0, "the first effects", seconds=60)
            workers.pop().kill()
            relays.pop().kill()
            workers.append(fleet.start("run", APP))
            relays.append(fleet.start("relay", APP))
        if number == 2 * ORDERS // 3:
            services.call("kill", "kafka")
            services.call("up", "-d", "kafka")
    eventually(
        lambda: count(database, "shop_confirmation") >= ORDERS,
        "all orders are confirmed",
        seconds=120,
        log=lambda: "\n\n".join(one.logs(tail=40).decode(errors="replace") for one in workers + relays),
    )

    assert [health(container) for container in [*workers, *relays]] == [0, 0, 0]
    # Nobody else is PID 1: SIGTERM reaches eo, which drains.
    for container in [*workers, *relays]:
        container.kill("SIGTERM")
    assert [container.wait(timeout=60)["StatusCode"] for container in [*workers, *relays]] == [0, 0, 0]
    assert_once(database, services.bootstrap_servers)
    database.dispose()


def open_shop(database: DatabaseEngine) -> None:
    Base.metadata.create_all(database)
    with Session(database) as session, session.begin():
        session.add_all(Product(sku=sku) for sku in SKUS)
        session.add_all(Item(sku=sku, free=1_000_000) for sku in SKUS)


def assert_once(database: DatabaseEngine, bootstrap_servers: str) -> None:
    """Every order has its effects and messages once, in order per key; each took the attempts its handler made it."""
    sent = reconcile.committed_orders(database)
    assert len(sent) == ORDERS
    movements = reconcile.from_table(database, "shop_movement")
    confirmations = reconcile.from_table(database, "shop_confirmation")
    places = {
        "orders": reconcile.from_topic(bootstrap_servers, orders.name).entries,
        "movements": movements,
        "reservations": reconcile.from_topic(bootstrap_servers, reservations.name).entries,
        "confirmations": confirmations,
    }
    rows = [reconcile.compare(place, sent, found) for place, found in places.items()]
    assert [row for row in rows if not row.clean] == []
    assert reconcile.wrong_about_attempts("movements", movements, refusals) == []
    assert reconcile.wrong_about_attempts("confirmations", confirmations, delays) == []


def count(database: DatabaseEngine, table: str) -> int:
    with database.connect() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def head(database: DatabaseEngine) -> str:
    with database.connect() as connection:
        return str(connection.execute(text("SELECT version_num FROM eo.alembic_version")).scalar_one())
