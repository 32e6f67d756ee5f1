"""The brokers and the database of one project together: start, find again, stop, begin anew."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from eoframework.dev import cache, jars, logs, open_home, postgres_programs, processes
from eoframework.dev.cluster import KafkaCluster, as_many_as, delete_data, home
from eoframework.dev.kafka import LOG, KafkaBroker, KafkaOptions, name_of
from eoframework.dev.postgres import PostgresOptions, PostgresServer, StopMode
from eoframework.dev.postgres_programs import SystemUser
from eoframework.dev.processes import CalledOff, Identity
from eoframework.dev.state import KafkaState, PostgresState, State, StateDirectory
from eoframework.errors import ConfigurationError

DEFAULT_STATE_DIRECTORY = Path(".eo")
DATABASE_SETTING = "EO_DATABASE_URL"
KAFKA_SETTING = "EO_KAFKA_BOOTSTRAP_SERVERS"

_NEEDED_BYTES = 300_000_000
_FILES = ("postgres.log", "postgres.log.1", "state.json", ".gitignore", "lock")


class Watcher(Protocol):
    """Told what is being done, for the person who waits. Called from several threads."""

    def stage(self, what: str, /) -> None:
        """Something began."""

    def downloaded(self, done: int, total: int, /) -> None:
        """Bytes of Kafka's jars."""


class Silent:
    """A watcher that shows nothing."""

    def stage(self, what: str, /) -> None:
        """Nothing to show."""

    def downloaded(self, done: int, total: int, /) -> None:
        """Nothing to show."""


class Services:
    """Running brokers and database. `stop()` ends them; as a context manager it does so at the end of the block."""

    def __init__(
        self, directory: StateDirectory, state: State, cluster: KafkaCluster, postgres: PostgresServer
    ) -> None:
        self.directory = directory
        self.cluster = cluster
        self.postgres = postgres
        self.found_running = False
        self._state = state

    @property
    def kafka(self) -> KafkaBroker:
        """The broker; the first one where there are three (`cluster` has them all)."""
        return self.cluster.nodes[0]

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the database, password included."""
        return self.postgres.database_url

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` of every broker."""
        return self.cluster.bootstrap_servers

    def environment(self) -> dict[str, str]:
        """The settings by which eoframework finds the services."""
        return {DATABASE_SETTING: self.database_url, KAFKA_SETTING: self.bootstrap_servers}

    def stop(self, *, mode: StopMode = "fast") -> None:
        """End all services, data stay; `immediate` and `kill` end the brokers by SIGKILL."""
        try:
            if mode == "fast":
                self.cluster.stop()
            else:
                self.cluster.kill()
        finally:
            # Also when the state file cannot be written any more (full disk).
            self.postgres.stop(mode=mode)

    def __enter__(self) -> Services:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.found_running:
            self.stop()


def start(
    state_directory: Path = DEFAULT_STATE_DIRECTORY,
    *,
    kafka: KafkaOptions | None = None,
    postgres: PostgresOptions | None = None,
    bound_to_parent: bool = True,
    watcher: Watcher | None = None,
) -> Services:
    """All services run, ready for transactions: the ones already running from this directory, else new ones.

    Of three brokers that stay until `eo dev down` only those are started that do not run.

    On a crash: with `bound_to_parent` they end with this process, however it ends; without it they do so only while
    they start, and afterwards stay until `stop()` or `eo dev down`. Data and ports are kept in `state_directory`.
    Raises ConfigurationError (no Java, port taken, disk full, corrupt download) and Unreachable (a service died while
    starting, the repository does not answer); nothing is left running then.
    """
    watcher = watcher or Silent()
    directory = StateDirectory(state_directory)
    directory.prepare()
    with directory.locked(waiting=lambda: watcher.stage("waiting for another eo dev command")):
        services = _open(directory, kafka or KafkaOptions(), postgres or PostgresOptions(), watcher)
        if _found_running(services, watcher, kafka, postgres):
            services.found_running = True
            return services
        # One of the two died, or the machine restarted: the other may still run.
        services.stop()
        _start_both(services, watcher)
        if not bound_to_parent:
            services.cluster.keep()
            services.postgres.keep()
        services._state.owner = _this_process() if bound_to_parent else None
        directory.save(services._state)
    return services


def _found_running(
    services: Services, watcher: Watcher, kafka: KafkaOptions | None, postgres: PostgresOptions | None
) -> bool:
    """Whether the services run; of three brokers one that runs is enough, the others are started again."""
    missing = services.cluster.missing()
    if len(missing) == len(services.cluster.nodes) or not services.postgres.running():
        return False
    # Those that live and die with another process are its own: a broker that we start would outlive it.
    if missing and services._state.owner is not None:
        return False
    _refuse_other_ports(services, kafka, postgres)
    if missing:
        watcher.stage(f"starting {' and '.join(node.name for node in missing)} again")
        _need_space(services.directory.path)
        services.cluster.choose_ports()
        services.cluster.start()
        services.cluster.keep()
    return True


def _start_both(services: Services, watcher: Watcher) -> None:
    _need_space(services.directory.path)
    services.cluster.choose_ports()
    services.postgres.choose_port()
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        # PostgreSQL beside the JVM, which takes four times as long.
        postgres = pool.submit(services.postgres.start, stop=stop)
        postgres.add_done_callback(lambda ended: stop.set() if ended.exception() else None)
        try:
            watcher.stage("starting Kafka and PostgreSQL")
            services.cluster.start(stop=stop)
            postgres.result()
        except CalledOff:
            services.stop(mode="immediate")
            # PostgreSQL's failure called Kafka off: that is the one to tell.
            postgres.result()
            raise
        except BaseException:
            stop.set()
            # Waits for the thread; its own failure is the consequence of this one.
            postgres.exception()
            services.stop(mode="immediate")
            raise


@dataclass(frozen=True, kw_only=True)
class ServiceStatus:
    """One service as `eo dev status` tells it."""

    name: str
    state: str
    """`running`, `stopped`, `dead` (it should run, and does not) or `silent` (runs, and does not answer)."""
    port: int | None
    pid: int | None
    log: str
    cause: str
    """The decisive line of its log when it is dead."""


def status(state_directory: Path = DEFAULT_STATE_DIRECTORY) -> list[ServiceStatus]:
    """What runs from this directory, verified by process start time and an answer on the port, changing nothing."""
    directory = StateDirectory(state_directory)
    state = directory.load()
    brokers = state.kafka or [KafkaState()]
    kafka = [
        _status(name_of(broker, brokers), broker.process, broker.port, home(directory.path, broker, brokers) / LOG)
        for broker in brokers
    ]
    postgres = _status("postgres", state.postgres.process, state.postgres.port, directory.path / "postgres.log")
    return [*kafka, postgres]


def _status(name: str, process: Identity | None, port: int | None, log: Path) -> ServiceStatus:
    if process is None:
        state = "stopped"
    elif not process.alive():
        state = "dead"
    else:
        state = "running" if port is not None and processes.answers(port) else "silent"
    return ServiceStatus(
        name=name,
        state=state,
        port=port,
        pid=process.pid if process and state in ("running", "silent") else None,
        log=str(log),
        cause=logs.decisive_line(log) if state == "dead" else "",
    )


def find(state_directory: Path = DEFAULT_STATE_DIRECTORY, *, postgres: PostgresOptions | None = None) -> Services:
    """The services of this directory, running or not, to control them. Nothing is started."""
    directory = StateDirectory(state_directory)
    directory.prepare()
    return _open(directory, KafkaOptions(), postgres or PostgresOptions(), None)


def down(state_directory: Path = DEFAULT_STATE_DIRECTORY) -> bool:
    """Stop what runs from this directory; data stay. False when nothing ran."""
    if not state_directory.exists():
        return False
    directory = StateDirectory(state_directory)
    with directory.locked():
        services = _open(directory, KafkaOptions(), PostgresOptions(), None)
        identities = [services.postgres.identity, *(node.identity for node in services.cluster.nodes)]
        ran = any(identity is not None and identity.alive() for identity in identities)
        services.stop()
    return ran


def reset(state_directory: Path = DEFAULT_STATE_DIRECTORY) -> bool:
    """Stop what runs from this directory and delete its data. False when there was nothing.

    Only what eoframework put there is deleted: a directory that holds other files too keeps them.
    """
    if not state_directory.exists():
        return False
    directory = StateDirectory(state_directory)
    with directory.locked():
        _delete_services(directory)
    try:
        directory.path.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise jars.disk_error(error, directory.path) from error
    return True


def _delete_services(directory: StateDirectory) -> None:
    try:
        state = directory.load()
    except ConfigurationError:
        # An unreadable state file is one of the reasons to reset; its message said to stop the services by hand.
        state = State(kafka=[], postgres=PostgresState())
    ended = [(broker.process, signal.SIGKILL) for broker in state.kafka]
    for identity, number in (*ended, (state.postgres.process, signal.SIGQUIT)):
        if identity is not None:
            processes.end(identity, stop_signal=number, grace=5.0)
    delete_data(directory.path)
    shutil.rmtree(state.postgres.home or directory.path / "postgres", ignore_errors=True)
    for name in _FILES:
        (directory.path / name).unlink(missing_ok=True)


def _open(
    directory: StateDirectory, kafka: KafkaOptions, postgres: PostgresOptions, watcher: Watcher | None
) -> Services:
    """The services with what is remembered of them; with a watcher everything they need to start is at hand."""
    state = directory.load()
    state.kafka = as_many_as(kafka.brokers, state.kafka, directory.path)
    lock = threading.Lock()

    def changed() -> None:
        # The brokers and the database start and stop in several threads.
        with lock:
            directory.save(state)

    user = postgres_programs.unprivileged_user()
    if not state.postgres.home:
        state.postgres.home = str(_postgres_home(directory.path, user))
    brokers = KafkaCluster(
        directory.path,
        state.kafka,
        kafka,
        jar_files=lambda: _jar_files(kafka, watcher or Silent()),
        changed=changed,
    )
    server = PostgresServer(
        Path(state.postgres.home),
        directory.path / "postgres.log",
        state.postgres,
        postgres,
        programs=lambda: postgres_programs.reachable(
            postgres.programs or postgres_programs.find(), user, open_home.PROGRAMS
        ),
        user=user,
        changed=changed,
    )
    return Services(directory, state, brokers, server)


def _jar_files(options: KafkaOptions, watcher: Watcher) -> list[Path]:
    return jars.ensure(
        options.jar_directory or cache.directory() / "kafka-jars",
        repository=options.maven_repository or cache.maven_repository(),
        downloaded=watcher.downloaded,
        jars=jars.pinned(),
    )


def _postgres_home(directory: Path, user: SystemUser | None) -> Path:
    """Beside the rest, unless PostgreSQL's own user cannot get there (a project below /root)."""
    if postgres_programs.traversable(directory, user):
        return directory / "postgres"
    return open_home.home_for(directory)


def _need_space(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < _NEEDED_BYTES:
        raise ConfigurationError(
            f"The disk of {directory} is full: {free / 1e6:.0f} MB are free, the services need "
            f"{_NEEDED_BYTES / 1e6:.0f} MB to start.",
            remedy="Free some, or choose another place with --state-dir.",
        )


def _refuse_other_ports(services: Services, kafka: KafkaOptions | None, postgres: PostgresOptions | None) -> None:
    pairs = [("Kafka", kafka, services.kafka.port), ("PostgreSQL", postgres, services.postgres.port)]
    for name, options, port in pairs:
        if options is not None and options.port not in (None, port):
            raise ConfigurationError(
                f"{name} already runs for {services.directory.path}, on port {port} and not on {options.port}.",
                remedy="Leave the port option out to use it, or run `eo dev down` first.",
            )


def _this_process() -> Identity:
    return Identity(pid=os.getpid(), started=processes.start_time(os.getpid()))
