"""Whether a topic is still the one whose offsets are stored; asked beside a batch, answered before it is committed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol
from uuid import UUID

from eoframework.identity import deleted_topic, topic_recreated
from eoframework.kafka.answers import UnknownTopic


class Cluster(Protocol):
    """What is asked of Kafka."""

    def ask_topic_id(self, topic: str) -> Callable[[], UUID]: ...


def ask_same_topic(cluster: Cluster, *, consumer: str, topic: str, topic_id: UUID) -> Callable[[], None]:
    """Ask now whether the topic is the one it was; calling what is returned takes the answer, or stops."""
    answer = cluster.ask_topic_id(topic)

    def confirm() -> None:
        try:
            found = answer()
        except UnknownTopic as error:
            raise deleted_topic(consumer, topic) from error
        if found != topic_id:
            raise topic_recreated(consumer, topic, topic_id, found)

    return confirm
