"""Three brokers under test: what Kafka says of them, and waiting until they are whole again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ClusterMetadata

from eoframework import dev
from tests.cluster import wire
from tests.processes import eventually


@contextmanager
def three_brokers(
    directory: Path, *, session_timeout_ms: int = 3000, properties: Mapping[str, str] | None = None
) -> Iterator[Brokers]:
    """Three brokers and a database server that nobody else uses, for as long as the block lasts."""
    options = dev.KafkaOptions(brokers=3, session_timeout_ms=session_timeout_ms, properties=properties or {})
    with dev.start(directory / ".eo", kafka=options) as services:
        yield Brokers(services)


class Brokers:
    """The three; each `dev.KafkaBroker` has `kill()`, `pause()`, `resume()`, `stop()`, `start()` and `restart()`."""

    def __init__(self, services: dev.Services) -> None:
        self.services = services

    @property
    def nodes(self) -> list[dev.KafkaBroker]:
        return self.services.cluster.nodes

    @property
    def bootstrap_servers(self) -> str:
        return self.services.bootstrap_servers

    def node(self, node_id: int) -> dev.KafkaBroker:
        return self.services.cluster.node(node_id)

    def others(self, node: dev.KafkaBroker) -> list[dev.KafkaBroker]:
        return [other for other in self.nodes if other is not node]

    def awake(self) -> list[dev.KafkaBroker]:
        """Those that run and are not paused."""
        return [node for node in self.nodes if _awake(node)]

    def leader_of(self, topic: str, partition: int = 0) -> dev.KafkaBroker:
        """Who leads the partition; waits until that is one that is awake."""
        return self._one(lambda node: _leader(node, topic, partition), f"a leader of {topic}/{partition}")

    def coordinator_of_group(self, group: str) -> dev.KafkaBroker:
        """Who coordinates the consumer group; waits until that is one that is awake."""
        return self._one(lambda node: wire.coordinator(node.port, group, wire.GROUP), f"a coordinator of {group}")

    def coordinator_of_transactions(self, transactional_id: str) -> dev.KafkaBroker:
        """Who coordinates the transactional id; waits until that is one that is awake."""
        what = f"a coordinator of {transactional_id}"
        return self._one(lambda node: wire.coordinator(node.port, transactional_id, wire.TRANSACTION), what)

    def controller(self) -> dev.KafkaBroker:
        """Who leads the quorum of the controllers; waits until that is one that is awake."""
        return self._one(lambda _: self._active_controller(), "an active controller")

    def in_sync(self) -> bool:
        """All three run, and each says that each partition has all its replicas in sync.

        Each: one that has just come back would tell what it knew before.
        """
        return len(self.awake()) == len(self.nodes) and all(self._whole(_metadata(node)) for node in self.nodes)

    def make_whole(self) -> None:
        """Undo what a test did: every broker runs again, and all replicas are in sync."""
        for node in self.nodes:
            if node.identity is not None and node.identity.alive():
                node.resume()
        self.services.cluster.start()
        eventually(self.in_sync, "all replicas in sync again")

    def _active_controller(self) -> int:
        # The latest epoch: one that was frozen believes for a moment that it leads.
        epochs = {node.node_id: wire.led_epoch(node.controller_port) for node in self.awake()}
        node_id = max(epochs, key=epochs.__getitem__)
        return node_id if epochs[node_id] >= 0 else -1

    def _whole(self, metadata: ClusterMetadata | None) -> bool:
        return (
            metadata is not None
            and len(metadata.brokers) == len(self.nodes)
            and all(
                partition.leader > 0 and set(partition.isrs) == set(partition.replicas)
                for topic in metadata.topics.values()
                for partition in topic.partitions.values()
            )
        )

    def _one(self, ask: Callable[[dev.KafkaBroker], int], what: str) -> dev.KafkaBroker:
        def found() -> dev.KafkaBroker | None:
            awake = self.awake()
            for asked in awake:
                with suppress(OSError):
                    node_id = ask(asked)
                    return next((node for node in awake if node.node_id == node_id), None)
            return None

        node: dev.KafkaBroker = eventually(found, what)
        return node


def _leader(asked: dev.KafkaBroker, topic: str, partition: int) -> int:
    metadata = _metadata(asked, topic)
    partitions = metadata.topics[topic].partitions if metadata is not None else {}
    return partitions[partition].leader if partition in partitions else -1


def _metadata(asked: dev.KafkaBroker, topic: str | None = None) -> ClusterMetadata | None:
    """What this very broker says: a new client knows no other."""
    client = AdminClient({"bootstrap.servers": asked.bootstrap_servers, "socket.timeout.ms": 3000, "log_level": 0})
    try:
        return client.list_topics(topic, timeout=3) if topic else client.list_topics(timeout=3)
    except KafkaException:
        return None


def _awake(node: dev.KafkaBroker) -> bool:
    if node.identity is None:
        return False
    try:
        # First: a frozen one's port refuses after a while to be asked whether it answers, for a second each time.
        if psutil.Process(node.identity.pid).status() == psutil.STATUS_STOPPED:
            return False
    except psutil.NoSuchProcess:
        return False
    return node.running()
