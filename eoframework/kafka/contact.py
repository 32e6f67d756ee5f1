"""Whether a client has lost its cluster for good, of which it says nothing.

librdkafka forgets each broker that Kafka's answer about the cluster does not name. An answer that names none (from one
whose own lease at the controller has run out: frozen, overloaded, cut off) makes it begin anew at the bootstrap
servers; but what it does when it has read that answer to its end takes this back, if the first was quicker. Then it has
nobody to ask, now and for ever, without an error: librdkafka's issue 5301, there in 2.16. Seen in the campaign, where
handlers stood still for good after their only broker had been overloaded for 2 s; and with 150 topics and a broker that
missed every other heartbeat: 6 of 24 clients within a minute.
"""

from __future__ import annotations

from typing import Any, Protocol

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from eoframework import kafka_keys
from eoframework.errors import RestartNeeded, Retryable
from eoframework.kafka.faults import classify

_PATIENCE = 2.0
_ENOUGH = 3


class Client(Protocol):
    """Any of confluent_kafka's."""

    def list_topics(self, topic: str | None = None, timeout: float = -1) -> Any: ...


class Contact:
    """That of a client whose silence means nothing: a consumer of a topic in which nothing happens."""

    def __init__(self, client: Client, topic: str) -> None:
        self._client, self._topic = client, topic
        self._silent = 0

    def look(self) -> None:
        """Ask the cluster by this client; to be called every few seconds, when another client has had an answer.

        Raises RestartNeeded at the third question in a row that nobody answers: one or two are a busy machine's.
        """
        self._silent = 0 if _answers(self._client, self._topic) else self._silent + 1
        if self._silent >= _ENOUGH:
            raise RestartNeeded(
                f"the Kafka client of {self._topic!r} finds no broker any more, while others do; it never would again "
                "(librdkafka's issue 5301)."
            )


def has_lost_cluster(client: Client, config: dict[str, Any]) -> bool:
    """Whether this client gets no answer, and a new one to the same cluster does; takes up to 6 s."""
    if _answers(client):
        return False
    same = {key: value for key, value in config.items() if key in kafka_keys.SHARED and not key.endswith("_cb")}
    return _answers(AdminClient({**same, "log_level": 0})) and not _answers(client)


def _answers(client: Client, topic: str | None = None) -> bool:
    try:
        client.list_topics(topic, timeout=_PATIENCE)
    except KafkaException as error:
        # To be refused is an answer too.
        return not isinstance(classify(error, "asking for the brokers"), Retryable)
    return True
