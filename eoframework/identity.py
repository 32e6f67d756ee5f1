"""Whether topic, cluster and consumer are the ones they were: every reason not to go on from a stored offset."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol
from uuid import UUID

from eoframework.errors import ConfigurationError, FailClosed


def refuse_renamed(
    group: str, *, where: str, app: str, topic: str, known: Collection[str], declared: Collection[str]
) -> None:
    """Stop if the database knows consumers of this app and topic that it no longer declares, and not this one.

    Renaming the function would otherwise start a new consumer at the topic's beginning, without a word.
    """
    undeclared = sorted(set(known) - set(declared))
    if group in known or not undeclared:
        return
    old = undeclared[0].removeprefix(f"{app}.")
    raise ConfigurationError(
        f"{where}: consumer {group!r} is new on topic {topic!r}, but the database knows {', '.join(undeclared)}, which "
        "this app no longer declares. Renaming a handler would process the whole topic a second time.",
        remedy=f"If it is the same handler, say name={old!r}. If it is a new one, retire the old: "
        f"eo position forget {undeclared[0]}",
    )


class Stored(Protocol):
    """A stored offset's topic and cluster."""

    @property
    def topic_id(self) -> UUID: ...
    @property
    def cluster_id(self) -> str: ...


class Stream(Stored, Protocol):
    """A consumer's topic and cluster, as they are now."""

    @property
    def consumer(self) -> str: ...
    @property
    def topic(self) -> str: ...


def refuse_moved(stream: Stream, known: Iterable[Stored]) -> None:
    """Stop if what is stored belongs to another cluster, or to an earlier topic of the same name."""
    for row in known:
        if row.cluster_id != stream.cluster_id:
            raise other_cluster(stream.consumer, stream.topic, stored=row.cluster_id, now=stream.cluster_id)
        if row.topic_id != stream.topic_id:
            raise topic_recreated(stream.consumer, stream.topic, row.topic_id, stream.topic_id)


def other_cluster(consumer: str, topic: str, *, stored: str, now: str) -> FailClosed:
    """The offsets were stored for another cluster."""
    return FailClosed(
        f"{consumer}: its positions in {topic!r} were stored for Kafka cluster {stored}, this one is {now}: offsets "
        "mean nothing across clusters.",
        remedy="Check EO_KAFKA_BOOTSTRAP_SERVERS. If the topic moved here for good: eo position forget "
        f"{consumer}. It then begins here as at a first start; what bears an id that is remembered stays a duplicate.",
    )


def topic_recreated(consumer: str, topic: str, old: UUID, new: UUID) -> FailClosed:
    """The topic was deleted and made again: its offsets count other messages now."""
    return FailClosed(
        f"{consumer}: topic {topic!r} is not the one it was (its id changed from {old} to {new}): it was deleted and "
        "re-created, so the stored offsets count other messages.",
        remedy=f"Nothing was skipped. To process the new topic from its beginning: eo position forget {consumer}",
    )


def deleted_topic(consumer: str, topic: str) -> FailClosed:
    """The topic is gone while its consumer runs."""
    return FailClosed(
        f"{consumer}: topic {topic!r} no longer exists.",
        remedy=f"Its positions are kept. If it is re-created, begin with: eo position forget {consumer}",
    )


def of_the_original(consumer: str) -> FailClosed:
    """A copied database, and a group that somebody uses on this cluster: the one it was copied from."""
    return FailClosed(
        f"group {consumer!r} has committed offsets in Kafka, and this database is a copy of another (eo db adopt "
        "copy): the group is that one's, and would be robbed of its messages.",
        remedy="Point EO_KAFKA_BOOTSTRAP_SERVERS at a cluster of the copy's own, or give the App another name.",
    )
