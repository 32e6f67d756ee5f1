"""Whether a client has lost its cluster for good, of which it says nothing.

librdkafka forgets each broker that Kafka's answer about the cluster does not name. An answer that names none (from one
whose own lease at the controller has run out: frozen, overloaded, cut off) makes it begin anew at the bootstrap
servers; but what it does when it has read that answer to its end takes this back, if the first was quicker. Then it has
nobody to ask, now and for ever, without an error: librdkafka's issue 5301, there in 2.16. Seen in the campaign, where
handlers stood still for good after their only broker had been overloaded for 2 s; and with 150 topics and a broker that
missed every other heartbeat: 6 of 24 clients within a minute.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from eoframework import clock, kafka_keys
from eoframework.errors import RestartNeeded, Retryable
from eoframework.kafka.faults import classify, kafka_error

log = logging.getLogger(__name__)

_WITHIN = 2.0
# A broker that only stands still is given up, and others are asked, after one `socket.timeout.ms`.
_TIMEOUTS = 2.5


class Client(Protocol):
    """Any of confluent_kafka's."""

    def list_topics(self, topic: str | None = None, timeout: float = -1) -> Any: ...


class Contact:
    """Whether a consumer still finds its cluster: its silence alone may mean a topic in which nothing happens."""

    def __init__(self, client: Client, topic: str, config: dict[str, Any]) -> None:
        self._client, self._topic = client, topic
        self._patience = _TIMEOUTS * int(config["socket.timeout.ms"]) / 1000
        self._silent_since: float | None = None

    def check(self) -> None:
        """Ask the cluster by this client; to be called every few seconds, when another client has had an answer.

        Raises RestartNeeded when nobody has answered for longer than a frozen broker can account for.
        """
        asked = clock.monotonic()
        if _answers(self._client, self._topic):
            self._silent_since = None
            return
        self._silent_since = asked if self._silent_since is None else self._silent_since
        silent = clock.monotonic() - self._silent_since
        if silent > self._patience:
            raise RestartNeeded(
                f"the Kafka client of {self._topic!r} has found no broker for {silent:.0f} s, while others do; it may "
                "never again (librdkafka's issue 5301)."
            )


def has_lost_cluster(client: Client, config: dict[str, Any]) -> bool:
    """Whether this client gets no answer, and a new one to the same cluster does; takes some 6 s."""
    if _answers(client):
        return False
    same = {key: value for key, value in config.items() if key in kafka_keys.SHARED and not key.endswith("_cb")}
    try:
        other = AdminClient({**same, "log_level": 0})
    except KafkaException as error:
        # Say, a key file that is gone: another producer would not come about either.
        told = kafka_error(error).str()
        log.warning("no second Kafka client: %s; whether the first still finds its brokers is not known", told)
        return False
    return _answers(other) and not _answers(client)


def _answers(client: Client, topic: str | None = None) -> bool:
    try:
        client.list_topics(topic, timeout=_WITHIN)
    except KafkaException as error:
        # To be refused is an answer too.
        return not isinstance(classify(error, "asking for the brokers"), Retryable)
    return True
