"""Apache Kafka and PostgreSQL as testcontainers, with the settings of `eo dev` and ready when they commit.

    with KafkaContainer() as kafka, PostgresContainer() as postgres:
        Settings.load(kafka_bootstrap_servers=kafka.bootstrap_servers, database_url=postgres.database_url)

Needs `pip install 'eoframework[testing]'` and a Docker daemon. testcontainers' own KafkaContainer is made for another
image, whose scripts Apache's does not have, and waits for a log line.
"""

from __future__ import annotations

import io
import secrets
import tarfile
from collections.abc import Callable, Mapping
from typing import Self

from eoframework import clock
from eoframework.db.probe import select_one
from eoframework.dev.cluster import made_id
from eoframework.dev.jars import KAFKA_VERSION
from eoframework.dev.kafka_properties import behaviour
from eoframework.dev.postgres import BEHAVIOUR
from eoframework.errors import Unreachable
from eoframework.kafka.probe import commit_probe_transaction

try:
    from testcontainers.core.container import DockerContainer
except ImportError as error:
    raise ImportError(
        "eoframework.testing.containers needs testcontainers: run `pip install 'eoframework[testing]'`."
    ) from error

KAFKA_IMAGE = f"apache/kafka:{KAFKA_VERSION}"
POSTGRES_IMAGE = "postgres:17"
PROBE_TOPIC = "eo.testing.probe"

_KAFKA_PORT, _POSTGRES_PORT = 9092, 5432
_START_SECONDS = 90.0
_SESSION_TIMEOUT_MS = 6_000
_SCRIPT = "/tmp/eo-start.sh"
_TAIL = 2_000


class _Container(DockerContainer):
    """One that may be stopped twice: a start that failed has removed it before `with` does."""

    def stop(self, force: bool = True, delete_volume: bool = True) -> None:
        """Remove the container and its volumes."""
        super().stop(force, delete_volume)
        self._container = None


class KafkaContainer(_Container):
    """One broker (KRaft, broker and controller in one process); after `start()` it commits Kafka transactions.

    On a crash of the test's process: testcontainers' reaper removes the container, unless that was switched off.
    session_timeout_ms: how soon a silent group member is given up. properties: added to ours, and win over them.
    Raises Unreachable with the end of the container's log when the broker dies or is not ready after 90 s.
    """

    def __init__(
        self,
        image: str = KAFKA_IMAGE,
        *,
        session_timeout_ms: int = _SESSION_TIMEOUT_MS,
        properties: Mapping[str, str] | None = None,
        heap_mb: int = 512,
    ) -> None:
        super().__init__(image)
        self.with_exposed_ports(_KAFKA_PORT)
        named = {
            **behaviour(brokers=1, session_timeout_ms=session_timeout_ms),
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": "1@localhost:29093",
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "INSIDE",
            "listeners": f"OUTSIDE://:{_KAFKA_PORT},INSIDE://:19092,CONTROLLER://:29093",
            "listener.security.protocol.map": "OUTSIDE:PLAINTEXT,INSIDE:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": "/var/lib/kafka/data",
            **(properties or {}),
        }
        self.with_envs(**{_variable(name): value for name, value in named.items()})
        self.with_env("KAFKA_HEAP_OPTS", f"-Xmx{heap_mb}m")
        # The image's id is the same for all; data that belong to another cluster must be told apart.
        self.with_env("CLUSTER_ID", made_id())
        # Which port clients must be told is known only when the container runs: its script arrives after that.
        self.with_command(["sh", "-c", f"until [ -x {_SCRIPT} ]; do sleep 0.1; done; exec {_SCRIPT}"])

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` for clients outside of the container."""
        return f"{self.get_container_host_ip()}:{self.get_exposed_port(_KAFKA_PORT)}"

    def start(self) -> Self:
        """Start the broker and wait until it commits a probe transaction; on failure nothing is left."""
        super().start()
        try:
            address = self.bootstrap_servers
            advertised = f"OUTSIDE://{address},INSIDE://localhost:19092"
            script = f"#!/bin/sh\nexport KAFKA_ADVERTISED_LISTENERS={advertised}\nexec /etc/kafka/docker/run\n"
            self.get_wrapped_container().put_archive("/tmp", _archive(_SCRIPT.rpartition("/")[2], script))
            _wait(self, lambda: commit_probe_transaction(address, topic=PROBE_TOPIC, timeout=5.0), "Kafka")
        except BaseException:
            self.stop()
            raise
        return self


class PostgresContainer(_Container):
    """A PostgreSQL server with an empty database; after `start()` it answers.

    On a crash of the test's process: testcontainers' reaper removes the container, unless that was switched off.
    settings: server settings, added to ours. Raises Unreachable with the end of the container's log when the server
    dies or is not ready after 90 s.
    """

    def __init__(
        self,
        image: str = POSTGRES_IMAGE,
        *,
        user: str = "eo",
        database: str = "eo",
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(image)
        self._user, self._database, self._password = user, database, secrets.token_urlsafe(18)
        self.with_exposed_ports(_POSTGRES_PORT)
        self.with_envs(
            POSTGRES_USER=user,
            POSTGRES_DB=database,
            POSTGRES_PASSWORD=self._password,
            POSTGRES_INITDB_ARGS="--encoding=UTF8 --locale=C",
        )
        options = [f"{name}={value}" for name, value in {**BEHAVIOUR, **(settings or {})}.items()]
        self.with_command(["postgres", *(part for option in options for part in ("-c", option))])

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL, password included."""
        return f"postgresql+psycopg://{self._address()}"

    def start(self) -> Self:
        """Start the server and wait until its database answers by TCP; on failure nothing is left."""
        super().start()
        try:
            conninfo = f"postgresql://{self._address()}"
            _wait(self, lambda: select_one(conninfo), "PostgreSQL")
        except BaseException:
            self.stop()
            raise
        return self

    def _address(self) -> str:
        place = f"{self.get_container_host_ip()}:{self.get_exposed_port(_POSTGRES_PORT)}"
        return f"{self._user}:{self._password}@{place}/{self._database}"


def _variable(property_name: str) -> str:
    """The variable that the image turns into this property (`_` stands for `.`, `__` for `_`, `___` for `-`)."""
    escaped = property_name.replace("_", "__").replace("-", "___").replace(".", "_")
    return f"KAFKA_{escaped.upper()}"


def _wait(container: DockerContainer, probe: Callable[[], None], what: str) -> None:
    deadline = clock.monotonic() + _START_SECONDS
    while True:
        try:
            probe()
        except Unreachable as error:
            container.reload()
            if container.status not in ("created", "running"):
                raise _failed(container, f"{what}'s container ended while starting") from error
            if clock.monotonic() > deadline:
                raise _failed(container, f"{what} was not ready within {_START_SECONDS:.0f} s: {error.what}") from error
            clock.sleep(0.2)
        else:
            return


def _failed(container: DockerContainer, what: str) -> Unreachable:
    out, err = container.get_logs()
    log = (out + err).decode(errors="replace").strip()
    return Unreachable(f"{what}.", remedy=f"Look at the end of its log:\n{log[-_TAIL:]}")


def _archive(name: str, content: str) -> bytes:
    data = content.encode()
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o755
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
