"""The brokers of one project together: one alone, or three that replicate for each other."""

from __future__ import annotations

import base64
import shutil
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eoframework.dev import java, logs
from eoframework.dev.kafka import NUMBERS_OF_BROKERS, KafkaBroker, KafkaOptions, name_of, wait_until_ready
from eoframework.dev.state import KafkaState
from eoframework.errors import ConfigurationError

_FILES = ("kafka.log", "kafka.log.1", "server.properties")


class KafkaCluster:
    """All brokers of a state directory, in one KRaft quorum; each of `nodes` can be stopped and started by itself."""

    def __init__(
        self,
        directory: Path,
        states: Sequence[KafkaState],
        options: KafkaOptions,
        *,
        jar_files: Callable[[], list[Path]],
        changed: Callable[[], None],
    ) -> None:
        self._states = states
        self._options = options
        self._changed = changed
        self.nodes = [
            KafkaBroker(
                home(directory, state, states),
                state,
                options,
                quorum=states,
                jar_files=jar_files,
                changed=changed,
            )
            for state in states
        ]

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` of every broker, for clients; the same whichever of them runs."""
        return ",".join(node.bootstrap_servers for node in self.nodes)

    def node(self, node_id: int) -> KafkaBroker:
        """The broker with this `node.id`, as Kafka's metadata names it."""
        return next(node for node in self.nodes if node.node_id == node_id)

    def missing(self) -> list[KafkaBroker]:
        """The brokers that do not run."""
        return [node for node in self.nodes if not node.running()]

    def choose_ports(self) -> None:
        """Fix the ports of the brokers that do not run: pinned, else those of last time while free, else free ones."""
        pinned = self._options.port
        missing = self.missing()
        for number, node in enumerate(self.nodes):
            if node in missing:
                node.choose_ports(wanted=pinned + number if pinned else None, avoid=self._ports())

    def start(self, *, stop: threading.Event | None = None) -> None:
        """Start the brokers that do not run, and wait until each of them commits a probe transaction.

        Raises ConfigurationError or Unreachable with the decisive line of the log when one dies; those that this call
        started are gone then.
        """
        program = self._options.java or java.find()
        if not all(state.formatted for state in self._states):
            self._format(program)
        missing = self.missing()
        try:
            for node in missing:
                # One whose process lives, but whose port does not answer, would keep the data locked.
                node.kill()
                node.launch(program)
            wait_until_ready(missing, stop=stop)
        except BaseException:
            for node in missing:
                node.kill()
            raise

    def keep(self) -> None:
        """Let the brokers outlive this process."""
        for node in self.nodes:
            node.keep()

    def stop(self, *, grace: float = 15.0) -> None:
        """Shut all brokers down in order (SIGTERM), after `grace` seconds by SIGKILL."""
        # At once: one that is stopped when the majority has gone waits for it until its grace is over.
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(lambda node: node.stop(grace=grace), self.nodes))

    def kill(self) -> None:
        """SIGKILL all; data and ports stay, `start()` goes on with them."""
        for node in self.nodes:
            node.kill()

    def _ports(self) -> list[int]:
        ports = [port for state in self._states for port in (state.port, state.controller_port)]
        return [port for port in ports if port is not None]

    def _format(self, program: Path) -> None:
        # All or none: the nodes find each other by ids that are made here and that stand in the data of each one.
        voters = [f"{state.node_id}@127.0.0.1:{state.controller_port}:{made_id()}" for state in self._states]
        cluster_id, formatting = made_id(), []
        try:
            for node in self.nodes:
                tool = node.begin_format(program, cluster_id, voters=voters if len(voters) > 1 else [])
                formatting.append((node, tool))
            for node, tool in formatting:
                if (code := tool.wait()) != 0:
                    raise logs.died("Kafka's storage tool", node.log, code)
        finally:
            for _, tool in formatting:
                tool.end()
        for state in self._states:
            state.formatted = True
        self._changed()


def home(directory: Path, state: KafkaState, states: Sequence[KafkaState]) -> Path:
    """Where a broker has its data and log: the state directory itself, or one below for each of three."""
    return directory if len(states) == 1 else directory / name_of(state, states)


def as_many_as(brokers: int | None, states: Sequence[KafkaState], directory: Path) -> list[KafkaState]:
    """What is remembered of so many brokers, new where nothing is; None: of those that are there, else of one.

    Raises ConfigurationError when the data are those of another number of brokers.
    """
    there = len(states) if any(state.formatted or state.process for state in states) else 0
    wanted = brokers or there or 1
    if there not in (0, wanted):
        raise ConfigurationError(
            f"The data in {directory} are those of {_counted(there)}, not of {_counted(wanted)}.",
            remedy="Leave --brokers out to use them, or run `eo dev reset` to begin anew with empty data.",
        )
    return list(states) if there else [KafkaState(node_id=number) for number in range(1, wanted + 1)]


def delete_data(directory: Path) -> None:
    """Delete every broker's data, log and configuration; nobody may run from there any more."""
    shutil.rmtree(directory / "kafka-data", ignore_errors=True)
    for number in range(1, max(NUMBERS_OF_BROKERS) + 1):
        shutil.rmtree(directory / f"kafka-{number}", ignore_errors=True)
    for name in _FILES:
        (directory / name).unlink(missing_ok=True)


def _counted(brokers: int) -> str:
    return "one broker" if brokers == 1 else f"{brokers} brokers"


def made_id() -> str:
    """A new UUID as Kafka writes them."""
    while True:
        made = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
        # One in 64 would be taken for an option of the storage tool.
        if not made.startswith("-"):
            return made
