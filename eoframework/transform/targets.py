"""The topics that a transform sends to, its dead letters' among them, as Kafka has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from eoframework.kafka.admin import TopicInfo
from eoframework.kafka.answers import UnknownTopic
from eoframework.transforms import Transform

_LIMIT = "max.message.bytes"
_SHARE = 0.97
"""A request carries more than its records; the limit of a topic counts that too."""


class Cluster(Protocol):
    """What is asked of Kafka."""

    def describe(self, topic: str, *, settings_optional: bool = False) -> TopicInfo: ...


class Targets:
    """What has to be known of all of them together."""

    def __init__(self, transform: Transform, cluster: Cluster) -> None:
        letters = transform.dead_letter_topic
        self._names = sorted({topic.name for topic in transform.targets} | ({letters} if letters else set()))
        self._cluster = cluster

    def largest_request(self) -> int | None:
        """The bytes of a request that all of them take; None if nobody tells. Raises UnknownTopic."""
        configs = [self._cluster.describe(name, settings_optional=True).config for name in self._names]
        told = [int(config[_LIMIT]) for config in configs if _LIMIT in config]
        return int(min(told) * _SHARE) if told else None

    def missing(self) -> Iterator[UnknownTopic]:
        """What is to be said of each that is not there: the client only says that a message timed out."""
        for name in self._names:
            try:
                self._cluster.describe(name, settings_optional=True)
            except UnknownTopic as error:
                yield error
