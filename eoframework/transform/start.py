"""Where a transform begins in a partition: at the group's offset, or, once, where its first start says.

The group's offsets are the truth. They can be lost (they expire with an idle group, tools delete them); the database
remembers that they were there, and then going on would mean to guess.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Protocol
from uuid import UUID

from eoframework import events
from eoframework.db import home
from eoframework.db.position import Positions, Stream
from eoframework.db.session import Connection, Database
from eoframework.db.transform_starts import PlannedStart, TransformStarts
from eoframework.errors import FailClosed
from eoframework.identity import of_the_original, refuse_moved, refuse_renamed
from eoframework.kafka.admin import TopicInfo
from eoframework.kafka.same_topic import ask_same_topic
from eoframework.transforms import Transform

log = logging.getLogger(__name__)


class Cluster(Protocol):
    """What is asked of Kafka."""

    def cluster_id(self) -> str: ...
    def describe(self, topic: str) -> TopicInfo: ...
    def ask_topic_id(self, topic: str) -> Callable[[], UUID]: ...
    def group_offsets(self, group: str, topic: str) -> Mapping[int, tuple[int, str]]: ...
    def watermarks(self, topic: str, partition: int) -> tuple[int, int]: ...


class Beginning:
    """One transform's rows in the database; each call is one transaction."""

    def __init__(self, transform: Transform, database: Database, cluster: Cluster) -> None:
        self._transform = transform
        self._database = database
        self._cluster = cluster
        self._positions = Positions(database.schema)
        self._starts = TransformStarts(database.schema)
        self._begun: set[int] = set()
        """Partitions of which the database knows it already."""

    def register(self, *, app: str, declared: Collection[str]) -> Stream:
        """The transform's stream; at its first start, where it begins is stored for all partitions at once.

        Raises ConfigurationError (a rename), FailClosed (another cluster, a re-created topic, a handler's group).
        """
        group, topic = self._transform.group, self._transform.topic.name
        info, cluster_id = self._cluster.describe(topic), self._cluster.cluster_id()
        with self._database.brief(f"{group}: register") as connection:
            siblings = self._positions.siblings(connection, app=app, topic=topic)
            refuse_renamed(group, where=self._transform.where, app=app, topic=topic, known=siblings, declared=declared)
            # The consumer's row stays locked: first starts of several workers come one after another.
            number = self._positions.register(connection, name=group, topic=topic)
            stream = Stream(number, group, topic, info.id, cluster_id)
            known = self._starts.known(connection, consumer_id=number, topic=topic)
            refuse_moved(stream, known)
            self._begun = {row.partition for row in known if row.begun}
            if not known:
                self._refuse_handler(connection, stream)
                self._refuse_original(connection)
                self._starts.plan(connection, stream, self._first_offsets(info.partitions))
        events.emit("transform.registered", consumer=group)
        return stream

    def missing(self, stream: Stream, partitions: Collection[int]) -> dict[int, int]:
        """Where partitions begin in which the group has no offset. Raises FailClosed if it once had one."""
        with self._database.brief(f"{stream.consumer}: where it begins") as connection:
            known = self._known(connection, stream) or self._start_over(connection, stream)
            lost = sorted(p for p in partitions if p in known and known[p].begun)
            if lost:
                raise self._lost(stream, lost)
            # A partition that appeared after the first start begins at 0, whatever `start` says: its first messages
            # would be skipped otherwise.
            self._starts.plan(connection, stream, {p: 0 for p in partitions if p not in known})
        events.emit("transform.planned", partitions=sorted(partitions))
        return {p: known[p].offset if p in known else 0 for p in partitions}

    def begun(self, stream: Stream, partitions: Collection[int]) -> None:
        """The group has offsets there: missing ones are lost from now on. Asks nobody when all of it is known."""
        if self._begun.issuperset(partitions):
            return
        with self._database.brief(f"{stream.consumer}: it has begun") as connection:
            # One that appeared after the first start, and was given its offset by a tool, has no row yet.
            self._starts.plan(connection, stream, dict.fromkeys(partitions, 0))
            self._starts.begun(connection, stream, sorted(partitions))
        events.emit("transform.begun", partitions=sorted(partitions))
        self._begun |= set(partitions)

    def ask_topic(self, stream: Stream) -> Callable[[], None]:
        """Ask now whether the topic is the one it was; calling what is returned takes the answer, or stops."""
        return ask_same_topic(self._cluster, consumer=stream.consumer, topic=stream.topic, topic_id=stream.topic_id)

    def _known(self, connection: Connection, stream: Stream) -> dict[int, PlannedStart]:
        rows = self._starts.known(connection, consumer_id=stream.consumer_id, topic=stream.topic)
        return {row.partition: row for row in rows if row.topic_id == stream.topic_id}

    def _start_over(self, connection: Connection, stream: Stream) -> dict[int, PlannedStart]:
        """`eo position forget` came after our registration: a first start again, which at 0 would ignore `start`."""
        self._positions.register(connection, name=stream.consumer, topic=stream.topic)
        partitions = self._cluster.describe(stream.topic).partitions
        self._starts.plan(connection, stream, self._first_offsets(partitions))
        self._begun.clear()
        return self._known(connection, stream)

    def _first_offsets(self, partitions: int) -> dict[int, int]:
        group, topic = self._transform.group, self._transform.topic.name
        there = self._cluster.group_offsets(group, topic)
        offsets = {}
        for partition in range(partitions):
            low, high = self._cluster.watermarks(topic, partition)
            offsets[partition] = high if self._transform.start == "latest" else low
        shown = {p: there[p][0] if p in there else offset for p, offset in offsets.items()}
        log.info("%s: first start on %s, beginning at offsets %s by partition", group, topic, shown)
        return offsets

    def _refuse_original(self, connection: Connection) -> None:
        group, topic = self._transform.group, self._transform.topic.name
        if home.is_copy(connection, self._database.schema) and self._cluster.group_offsets(group, topic):
            raise of_the_original(group)

    def _refuse_handler(self, connection: Connection, stream: Stream) -> None:
        # The offsets that a handler commits lag behind its positions, and its parked messages would lie there for ever.
        if self._positions.known(connection, consumer_id=stream.consumer_id, topic=stream.topic):
            raise FailClosed(
                f"{stream.consumer} was a handler, and the database knows its positions; as a transform it would begin "
                "at its group's offsets, which lag behind them.",
                remedy=f"Give the transform another name=. To make it of the same group: eo position forget "
                f"{stream.consumer} --kind handler, then eo position set where it is to begin.",
            )

    def _lost(self, stream: Stream, partitions: list[int]) -> FailClosed:
        return FailClosed(
            f"{stream.consumer}: group {stream.consumer!r} has no offsets any more in {stream.topic}, partitions "
            f"{', '.join(map(str, partitions))}: they expired or were deleted. To begin anew would send again what was "
            "sent.",
            remedy=f"Say for each where it is to go on: eo position set {stream.consumer} PARTITION OFFSET (or "
            f"kafka-consumer-groups --reset-offsets). To send everything again: eo position forget {stream.consumer}",
        )
