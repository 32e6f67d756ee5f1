"""Where a consumer begins, and every reason to refuse to begin: checked before the first message is taken.

PostgreSQL is the truth for positions. If it says nothing, or says something about another topic or another cluster,
going on would mean guessing; each case stops with the command that resolves it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from eoframework.db.position import Claim, PositionRow, Positions, Stream
from eoframework.db.session import Connection
from eoframework.errors import FailClosed
from eoframework.handlers import Handler
from eoframework.identity import of_the_original, refuse_moved, refuse_renamed
from eoframework.kafka.offsets import epoch_of_mark

log = logging.getLogger(__name__)

GroupOffsets = Mapping[int, tuple[int, str]]


class Topology(Protocol):
    """What start-up asks of Kafka."""

    def watermarks(self, topic: str, partition: int) -> tuple[int, int]: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What Kafka says about the topic now."""

    cluster_id: str
    topic_id: UUID
    partitions: int
    group_offsets: GroupOffsets


class Start:
    """One handler's first statement in the database: its consumer row and its position rows."""

    def __init__(self, handler: Handler, positions: Positions, topology: Topology, *, adopt_offsets: bool) -> None:
        self._handler = handler
        self._positions = positions
        self._topology = topology
        self._adopt_offsets = adopt_offsets

    def register(
        self,
        connection: Connection,
        around: Surroundings,
        *,
        app: str,
        declared: Collection[str],
        copied: bool = False,
    ) -> Stream:
        """The stream with a position row for every partition the topic has at the first start.

        All partitions are stored at once, under the lock of the consumer's row: a partition that gets its row later
        is known to have appeared later, and begins at 0 whatever `start` says. `copied`: the database is a copy of one
        that lives on.
        """
        group, topic = self._handler.group, self._handler.topic.name
        siblings = self._positions.siblings(connection, app=app, topic=topic)
        refuse_renamed(group, where=self._handler.where, app=app, topic=topic, known=siblings, declared=declared)
        consumer_id = self._positions.register(connection, name=group, topic=topic)
        stream = Stream(consumer_id, group, topic, around.topic_id, around.cluster_id)
        known = self._positions.known(connection, consumer_id=consumer_id, topic=topic)
        refuse_moved(stream, known)
        refuse_set_back(stream, known, around.group_offsets)
        if not known:
            offsets = self._first_offsets(around, copied=copied)
            self._positions.start(connection, stream, offsets, adopted=bool(around.group_offsets))
            self._say_first_start(offsets, self._positions.siblings(connection, topic=topic) - set(declared))
        return stream

    def _say_first_start(self, offsets: Mapping[int, int], others: Collection[str]) -> None:
        group, topic = self._handler.group, self._handler.topic.name
        log.info("%s: first start on %s, beginning at offsets %s by partition", group, topic, dict(offsets))
        if others:
            # Renaming an App makes new consumers too, and no rule can tell that from an app that is really new.
            log.warning(
                "%s is new, and %s already consumed %s: if that is the same handler under an earlier name of the App, "
                "stop now; otherwise its messages are processed a second time",
                group,
                ", ".join(sorted(others)),
                topic,
            )

    def _first_offsets(self, around: Surroundings, *, copied: bool) -> dict[int, int]:
        if around.group_offsets and not self._adopt_offsets:
            if copied:
                raise of_the_original(self._handler.group)
            raise FailClosed(
                f"group {self._handler.group!r} has committed offsets in Kafka, but the database has no position of "
                "it: an empty, wrong or restored database would skip or repeat everything before them.",
                remedy="Check EO_DATABASE_URL. To begin at the group's offsets: eo run --adopt-offsets",
            )
        return {partition: self._first_offset(around, partition) for partition in range(around.partitions)}

    def _first_offset(self, around: Surroundings, partition: int) -> int:
        if partition in around.group_offsets:
            return around.group_offsets[partition][0]
        low, high = self._topology.watermarks(self._handler.topic.name, partition)
        return high if self._handler.start == "latest" else low


def refuse_moved_offset(stream: Stream, claim: Claim, offset: int, committed_under: int | None) -> None:
    """Stop if somebody moved the group's offset, or it is ahead of a database that was set back.

    `committed_under` is the epoch of the claim under which we committed it, None if it was not us. An offset ahead of
    ours from before the row's last epoch is left over from before `eo position set`; a restored row is never that new.
    """
    partition, position = claim.partition, claim.next_offset
    if committed_under is None and offset != position:
        raise FailClosed(
            f"{stream.consumer}: somebody set the group's offset in {stream.topic}[{partition}] to {offset}; the "
            f"database says {position}, and the database is what counts.",
            remedy=f"To move: eo position set {stream.consumer} {partition} {offset}. To keep {position}: "
            f"eo position set {stream.consumer} {partition} {position}",
        )
    if committed_under is not None and offset > position and committed_under >= claim.epoch - 1:
        raise set_back(stream, partition, position, offset)


def refuse_set_back(stream: Stream, known: Iterable[PositionRow], offsets: GroupOffsets) -> None:
    """Stop if the database was set back, and name every partition of which that can be seen.

    What a claim would find too, but one partition after the other, a start for each. The offsets were asked for before
    the rows were read, so that those of a worker at work are not ahead of them.
    """
    behind = [
        (row.partition, row.next_offset, offset)
        for row in known
        for offset, mark in [offsets.get(row.partition, (0, ""))]
        if offset > row.next_offset and (epoch_of_mark(mark) or 0) >= row.epoch > 0
    ]
    if behind:
        raise _set_back(stream, behind)


def set_back(stream: Stream, partition: int, position: int, offset: int) -> FailClosed:
    """The database knows less than it once did."""
    return _set_back(stream, [(partition, position, offset)])


def _set_back(stream: Stream, behind: Iterable[tuple[int, int, int]]) -> FailClosed:
    told, redo, leave_out = [], [], []
    for partition, position, offset in behind:
        where = f"{stream.topic}[{partition}]"
        told.append(f"{where} was processed up to {offset}, but the database's position is {position}")
        redo.append(f"eo position set {stream.consumer} {partition} {position}")
        leave_out.append(f"eo position set {stream.consumer} {partition} {offset}")
    return FailClosed(
        f"{stream.consumer}: {'; '.join(told)}: it was restored to an older state, or failed over to a standby that "
        "lagged, so the effects between were lost there.",
        remedy=f"To redo them: {' && '.join(redo)}. To leave them out: {' && '.join(leave_out)}",
    )
