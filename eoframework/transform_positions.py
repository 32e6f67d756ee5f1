"""Where transforms stand, by an operator's hand: the group's offsets in Kafka are the truth.

The database only knows where they began, and that there were offsets once; both are changed together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from eoframework import events
from eoframework.db.audit import whoever
from eoframework.db.session import Database
from eoframework.db.transform_desk import StartLine, TransformDesk
from eoframework.errors import FailClosed, Retryable
from eoframework.identity import other_cluster, topic_recreated
from eoframework.kafka.admin import Admin
from eoframework.transform.mark import Mark

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TransformLine:
    """One partition of one transform."""

    start: StartLine
    offset: int | None
    """The group's, in Kafka; None where it has none."""
    mark: Mark

    @property
    def lost(self) -> bool:
        """Whether it had an offset once, and has none any more: it refuses to start."""
        return self.offset is None and self.start.begun


@dataclass(frozen=True, slots=True)
class TransformMoved:
    """An offset, before and after."""

    line: TransformLine
    offset: int


def lines(admin: Admin, starts: Iterable[StartLine]) -> list[TransformLine]:
    """Where transforms stand: what Kafka says now, whatever a Kafka transaction that is under way makes of it."""
    known = list(starts)
    found = {
        group: admin.group_offsets(*group, stable=False)
        for group in sorted({(one.consumer, one.topic) for one in known})
    }
    return [_line(one, found[one.consumer, one.topic].get(one.partition)) for one in known]


def refuse_elsewhere(admin: Admin, start: StartLine) -> None:
    """An offset counts the messages of one topic of one cluster. Raises FailClosed, UnknownTopic."""
    cluster_id = admin.cluster_id()
    if cluster_id != start.cluster_id:
        raise other_cluster(start.consumer, start.topic, stored=start.cluster_id, now=cluster_id)
    topic_id = admin.ask_topic_id(start.topic)()
    if topic_id != start.topic_id:
        raise topic_recreated(start.consumer, start.topic, start.topic_id, topic_id)


def move(
    database: Database, admin: Admin, start: StartLine, offset: int, *, actor: str | None = None
) -> TransformMoved:
    """Set the group's offset, with fresh counts of attempts; refused while the group has members.

    What the transform already sent for messages from there on, it sends again; what lies before is not transformed. On
    a crash: set or not, `eo position show` tells. Raises FailClosed.
    """
    refuse_elsewhere(admin, start)
    _refuse_unsettled(admin, start.consumer, {start.topic})
    (line,) = lines(admin, [start])
    who = whoever(actor)

    def in_kafka() -> None:
        if not admin.set_group_offset(start.consumer, start.topic, start.partition, offset, mark=Mark().encode()):
            raise _running(start.consumer)
        events.emit("position.moved_in_kafka", consumer=start.consumer, partition=start.partition)

    detail = {
        "topic": start.topic,
        "partition": start.partition,
        "from_offset": line.offset,
        "to_offset": offset,
        "mark": line.mark.encode(),
    }
    TransformDesk(database).move(start, actor=who, detail=detail, in_kafka=in_kafka)
    _log.warning(
        "offset of %s in %s[%d] set by hand from %s to %d; it goes on from there, and sends again what it sent beyond.",
        *(start.consumer, start.topic, start.partition, line.offset, offset),
        extra={"consumer": start.consumer, "partition": start.partition, "to_offset": offset},
    )
    return TransformMoved(line, offset)


def forget(database: Database, admin: Admin, starts: Iterable[StartLine], consumer: str) -> int:
    """Delete the group and where the transform began: its next start is a first start. Returns of how many partitions.

    On a crash: it refuses to start, or is forgotten; run it again. Raises FailClosed while the group has members.
    """
    _refuse_unsettled(admin, consumer, {one.topic for one in starts})

    def in_kafka() -> None:
        if not admin.delete_group(consumer):
            raise _running(consumer)
        events.emit("position.forgotten_in_kafka", consumer=consumer)

    gone = TransformDesk(database).forget(consumer, actor=whoever(), in_kafka=in_kafka)
    _log.warning("%d offsets of %s forgotten by hand; it begins anew, and sends again what it sent.", gone, consumer)
    return gone


def _line(start: StartLine, found: tuple[int, str] | None) -> TransformLine:
    return (
        TransformLine(start, None, Mark()) if found is None else TransformLine(start, found[0], Mark.decode(found[1]))
    )


def _refuse_unsettled(admin: Admin, consumer: str, topics: Iterable[str]) -> None:
    """Wait for what is under way, or refuse.

    A frozen worker is thrown out of its group before its Kafka transaction is over. Were the offset set in between, and
    the worker woke, the outputs of that transaction would appear, and be sent a second time from the offset set.
    """
    for topic in topics:
        try:
            admin.group_offsets(consumer, topic)
        except Retryable as trouble:
            admin.group_offsets(consumer, topic, stable=False)
            raise FailClosed(
                f"{consumer} has a Kafka transaction under way on {topic}, which may still move its offsets.",
                remedy="Nothing was changed. Stop its workers first; that of a dead one ends with its timeout "
                "(EO_TRANSFORM_TRANSACTION_TIMEOUT).",
            ) from trouble


def _running(consumer: str) -> FailClosed:
    return FailClosed(
        f"{consumer} is running (its group has members). Nothing was changed.",
        remedy="Stop its workers first; after a kill, wait for the group's session timeout.",
    )
