"""Whether a broker can do what we need of it: commit one Kafka transaction."""

from __future__ import annotations

import logging
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from eoframework.errors import Unreachable

_log = logging.getLogger(__name__)


def commit_probe_transaction(bootstrap_servers: str, *, topic: str, timeout: float) -> None:
    """Commit one record to `topic` (made when missing) in a Kafka transaction.

    Guarantee: when it returns, the broker serves produce requests, its transaction coordinator is loaded and its log
    takes writes; an open port or a log line tells none of these. Raises Unreachable within about `timeout` seconds
    for each of the four steps.
    """
    client: dict[str, Any] = {
        "bootstrap.servers": bootstrap_servers,
        "socket.connection.setup.timeout.ms": 2000,
        "log_level": 0,
    }
    try:
        quiet: dict[str, Any] = {**client, "logger": _log}
        _make_topic(AdminClient(quiet), topic, timeout)
        # Retry and reconnect faster than the defaults: the coordinator's topic is being made right now.
        client.update({"retry.backoff.ms": 20, "reconnect.backoff.ms": 20, "linger.ms": 0, "logger": _log})
        client["transactional.id"] = topic
        producer = Producer(client)
        producer.init_transactions(timeout)
        producer.begin_transaction()
        producer.produce(topic, b"probe")
        producer.commit_transaction(timeout)
    except KafkaException as error:
        raise Unreachable(
            f"The broker at {bootstrap_servers} does not commit a probe transaction: {error.args[0].str()}.",
            remedy="Look at the broker's log.",
        ) from error
    except TimeoutError as error:
        # The client's own time-out may come a moment after ours.
        raise Unreachable(
            f"The broker at {bootstrap_servers} has not answered for {timeout:g} s.", remedy="Look at the broker's log."
        ) from error


def _make_topic(admin: AdminClient, topic: str, timeout: float) -> None:
    try:
        # As many replicas as the broker's default: with one alone a cluster that demands two in sync takes no write.
        created = admin.create_topics([NewTopic(topic, 1)], request_timeout=timeout)
        created[topic].result(timeout)
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise
