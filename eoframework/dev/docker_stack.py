"""Kafka and PostgreSQL in containers, for those who prefer it: `eo dev up --docker`, on docker-compose.yml.

What `stack` offers for processes: start or find again, stop, status, begin anew. A state directory is either one's.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from eoframework import clock
from eoframework.db.probe import select_one
from eoframework.dev import docker_compose, logs, processes, stack
from eoframework.dev.cluster import made_id
from eoframework.dev.docker_compose import Project
from eoframework.dev.jars import disk_error
from eoframework.dev.kafka import PROBE_TOPIC
from eoframework.dev.stack import DATABASE_SETTING, KAFKA_SETTING, ServiceStatus, Silent, Watcher
from eoframework.dev.state import StateDirectory
from eoframework.errors import ConfigurationError, EoError, Unreachable
from eoframework.kafka.probe import commit_probe_transaction

_log = logging.getLogger(__name__)

HOST = "127.0.0.1"
_FILE = "docker.json"
_START_SECONDS = 120.0
_PATIENCE = 2.0
_LOOK_SECONDS = 2.0


@dataclass(kw_only=True)
class _State:
    """What is remembered of the containers; the ports and the password are those of the data in the volumes."""

    project: str
    cluster_id: str
    password: str
    kafka_port: int | None = None
    postgres_port: int | None = None
    up: bool = False
    """False when they were stopped on purpose, or never ready."""


class ContainerServices:
    """The two containers. As a context manager it stops them at the end of the block, unless they ran before."""

    def __init__(self, directory: StateDirectory, state: _State) -> None:
        self.directory = directory
        self.found_running = False
        self._state = state

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the database, password included."""
        return f"postgresql+psycopg://{self._address}"

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` of the broker."""
        return f"{HOST}:{self._state.kafka_port}"

    @property
    def project(self) -> str:
        """The compose project's name, by which docker shows the containers."""
        return self._state.project

    def environment(self) -> dict[str, str]:
        """The settings by which eoframework finds the services."""
        return {DATABASE_SETTING: self.database_url, KAFKA_SETTING: self.bootstrap_servers}

    def probes(self) -> list[tuple[int | None, Callable[[], None]]]:
        """For each service its port, and what raises Unreachable unless it works."""
        return [
            (
                self._state.kafka_port,
                lambda: commit_probe_transaction(self.bootstrap_servers, topic=PROBE_TOPIC, timeout=_PATIENCE),
            ),
            (self._state.postgres_port, lambda: select_one(f"postgresql://{self._address}")),
        ]

    def stop(self) -> None:
        """Stop the containers; their data stay."""
        _compose(self._state).stop()
        self._state.up = False
        _save(self.directory, self._state)

    @property
    def _address(self) -> str:
        return f"eo:{self._state.password}@{HOST}:{self._state.postgres_port}/eo"

    def __enter__(self) -> ContainerServices:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.found_running:
            self.stop()


def chosen(state_directory: Path, *, asked: bool = False) -> bool:
    """Whether this directory's services are containers: asked for now, or when they were begun.

    Raises ConfigurationError when they are asked for and the directory has the data of services without containers.
    """
    directory = StateDirectory(state_directory)
    if (directory.path / _FILE).exists():
        return True
    if asked and directory.file.exists():
        raise ConfigurationError(
            f"The services of {directory.path} are no containers, and their data are not in a container's volume.",
            remedy="Leave --docker out to use them, name another --state-dir, or run `eo dev reset` to begin anew.",
        )
    return asked


def start(
    state_directory: Path,
    *,
    kafka_port: int | None = None,
    postgres_port: int | None = None,
    watcher: Watcher | None = None,
) -> ContainerServices:
    """Both containers run and commit transactions: the ones already running, else new ones on the data of last time.

    On a crash: they stay until `eo dev down`, whatever happens to this process. Raises ConfigurationError (no Docker
    here, port taken) and Unreachable (no daemon, an image that cannot be pulled, a container that ended); no container
    that this call started is left then.
    """
    watcher = watcher or Silent()
    directory = StateDirectory(state_directory)
    directory.prepare()
    with directory.locked(waiting=lambda: watcher.stage("waiting for another eo dev command")):
        remembered = _load(directory)
        state = remembered or _new(directory)
        services = ContainerServices(directory, state)
        if state.up and not any(_cause(*each) for each in services.probes()):
            _refuse_other_ports(services, kafka_port, postgres_port)
            services.found_running = True
            return services
        command = docker_compose.find()
        if state.up:
            # One of the two ended, or the machine restarted: the other may still run, and hold its port.
            services.stop()
        state.kafka_port = processes.choose_port(
            wanted=kafka_port, remembered=state.kafka_port, option="--kafka-port", what="Kafka"
        )
        state.postgres_port = processes.choose_port(
            wanted=postgres_port,
            remembered=state.postgres_port,
            option="--postgres-port",
            what="PostgreSQL",
            avoid=[state.kafka_port],
        )
        _save(directory, state)
        watcher.stage("starting the containers of Kafka and PostgreSQL (the first time their images are pulled)")
        _start(services, _compose(state, command), new=remembered is None)
        state.up = True
        _save(directory, state)
    return services


def down(state_directory: Path) -> bool:
    """Stop and remove the containers; the volumes with the data stay. False when they did not run."""
    directory = StateDirectory(state_directory)
    with directory.locked():
        state = _known(directory)
        ran = state.up
        ContainerServices(directory, state).stop()
    return ran


def reset(state_directory: Path) -> bool:
    """Remove the containers and their volumes, with all data."""
    directory = StateDirectory(state_directory)
    with directory.locked():
        _compose(_known(directory)).delete()
        for name in (_FILE, *map(_log_name, docker_compose.SERVICES)):
            (directory.path / name).unlink(missing_ok=True)
    stack.reset(state_directory)
    return True


def status(state_directory: Path) -> list[ServiceStatus]:
    """What runs, by asking the services themselves, changing nothing but the probe's topic."""
    directory = StateDirectory(state_directory)
    state = _known(directory)
    compose = _compose(state, ["docker", "compose"])
    found = []
    for name, (port, probe) in zip(docker_compose.SERVICES, ContainerServices(directory, state).probes(), strict=True):
        cause = _cause(port, probe) if state.up else ""
        told = ("dead" if cause else "running") if state.up else "stopped"
        log = compose.log_command(name)
        found.append(ServiceStatus(name=name, state=told, port=port, pid=None, log=log, cause=cause))
    return found


def _start(services: ContainerServices, compose: Project, *, new: bool) -> None:
    try:
        compose.up()
        for service, (port, probe) in zip(docker_compose.SERVICES, services.probes(), strict=True):
            _wait(compose, service, port, probe, services.directory.path / _log_name(service))
    except BaseException:
        # Also on Ctrl-C: what is left of a failed start must not hold the ports.
        _stop_after_failure(compose, delete=new)
        if new:
            # Else a directory whose first start failed could never again be used without Docker.
            (services.directory.path / _FILE).unlink(missing_ok=True)
        raise


def _wait(compose: Project, service: str, port: int | None, probe: Callable[[], None], log: Path) -> None:
    deadline = clock.monotonic() + _START_SECONDS
    next_look = clock.monotonic() + _LOOK_SECONDS
    while cause := _cause(port, probe):
        now = clock.monotonic()
        if now > next_look:
            next_look = now + _LOOK_SECONDS
            if not compose.runs(service):
                # Kept: the log goes with the container, which a failed start does not leave.
                log.write_text(compose.log(service))
                raise logs.died(f"The container of {service}", log, None)
        if now > deadline:
            log.write_text(compose.log(service))
            raise Unreachable(
                f"The container of {service} was not ready within {_START_SECONDS:.0f} s: {cause}",
                remedy=f"Its log is {log}.",
            )
        clock.sleep(0.1)


def _cause(port: int | None, probe: Callable[[], None]) -> str:
    """Why the service does not work; empty when it does."""
    # Asked first: a Kafka client would look for its broker for as long as it may.
    if port is None or not processes.answers(port):
        return f"nothing answers on port {port}."
    try:
        probe()
    except Unreachable as error:
        return error.what
    return ""


def _stop_after_failure(compose: Project, *, delete: bool) -> None:
    try:
        if delete:
            compose.delete()
        else:
            compose.stop()
    except EoError as error:
        # What failed before is what to tell; this has the same cause, or else `docker ps` shows what is left.
        _log.info("the containers of %s may be left: %s", compose.name, error)


def _refuse_other_ports(services: ContainerServices, kafka: int | None, postgres: int | None) -> None:
    for name, wanted, (port, _) in zip(("Kafka", "PostgreSQL"), (kafka, postgres), services.probes(), strict=True):
        if wanted not in (None, port):
            raise ConfigurationError(
                f"{name} already runs for {services.directory.path}, on port {port} and not on {wanted}.",
                remedy="Leave the port option out to use it, or run `eo dev down` first.",
            )


def _compose(state: _State, command: list[str] | None = None) -> Project:
    return Project(
        name=state.project,
        command=command or docker_compose.find(),
        variables={
            "EO_DEV_HOST": HOST,
            "EO_DEV_KAFKA_PORT": str(state.kafka_port),
            "EO_DEV_POSTGRES_PORT": str(state.postgres_port),
            "EO_DEV_POSTGRES_PASSWORD": state.password,
            "EO_DEV_KAFKA_CLUSTER_ID": state.cluster_id,
        },
    )


def _new(directory: StateDirectory) -> _State:
    where = re.sub(r"[^a-z0-9]+", "-", directory.path.parent.name.lower()).strip("-") or "project"
    return _State(
        # The suffix: two checkouts of one name, or a volume left by a state directory that was deleted by hand.
        project=f"eo-{where[:30]}-{secrets.token_hex(3)}",
        cluster_id=made_id(),
        password=secrets.token_urlsafe(18),
    )


def _known(directory: StateDirectory) -> _State:
    state = _load(directory)
    if state is None:
        raise ConfigurationError(
            f"{directory.path} has no containers.", remedy="Run `eo dev up --docker` to start some."
        )
    return state


def _load(directory: StateDirectory) -> _State | None:
    file = directory.path / _FILE
    try:
        return _State(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"The state file {file} cannot be used: {error}.",
            remedy="Remove the containers and volumes named eo-… with docker, delete the file, and run this again.",
        ) from error


def _save(directory: StateDirectory, state: _State) -> None:
    """Remember the state. On a crash: the old file or the new one stands there, whole."""
    file = directory.path / _FILE
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        # 0600 from the first byte: the database's password is in it.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as opened:
            json.dump(asdict(state), opened, indent=2)
        temporary.rename(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(error, file) from error


def _log_name(service: str) -> str:
    return f"docker-{service}.log"
