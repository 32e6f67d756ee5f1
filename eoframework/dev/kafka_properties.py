"""What stands in a development broker's `server.properties`: small, quick to notice the dead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eoframework.dev.state import KafkaState


def server_properties(
    node: KafkaState, quorum: Sequence[KafkaState], *, data: Path, session_timeout_ms: int
) -> dict[str, str]:
    """The configuration of one node, broker and controller; `quorum` are all nodes, this one too."""
    listeners = f"PLAINTEXT://127.0.0.1:{node.port},CONTROLLER://127.0.0.1:{node.controller_port}"
    return {
        "process.roles": "broker,controller",
        "node.id": str(node.node_id),
        "controller.quorum.bootstrap.servers": ",".join(f"127.0.0.1:{each.controller_port}" for each in quorum),
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "listeners": listeners,
        "advertised.listeners": listeners,
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": str(data),
        **behaviour(brokers=len(quorum), session_timeout_ms=session_timeout_ms),
    }


def behaviour(*, brokers: int, session_timeout_ms: int) -> dict[str, str]:
    """How a node behaves, wherever it runs: all of its configuration but names, addresses and directories."""
    return {
        "auto.create.topics.enable": "false",
        **(_ONE_BROKER if brokers == 1 else _THREE_BROKERS),
        **_SMALL,
        **group_timeouts(session_timeout_ms),
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
_THREE_BROKERS = {
    "default.replication.factor": "3",
    "min.insync.replicas": "2",
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
    "share.coordinator.state.topic.replication.factor": "3",
    "share.coordinator.state.topic.min.isr": "2",
    # Longer than alone: three JVMs that start on two processors would give each other up.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    # So long a broker waits for a frozen controller to which it has passed a request on (a new topic, a new group's
    # coordinator) before it looks for the one in charge by now; the client waits with it, by default for 30 s.
    "controller.socket.timeout.ms": "5000",
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
