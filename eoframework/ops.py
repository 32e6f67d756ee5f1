"""What an operator does to a running system, one function a command; the command line only parses and prints."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eoframework import clock, events, transform_positions
from eoframework.app import App
from eoframework.db.position_admin import PositionAdmin, PositionLine
from eoframework.db.session import Database
from eoframework.db.transform_desk import StartLine, TransformDesk
from eoframework.errors import DecodeError, EoError, FailClosed, NotFound
from eoframework.kafka.admin import Admin
from eoframework.kafka.offsets import offset_mark
from eoframework.message import Record
from eoframework.topic import Topic
from eoframework.transform_positions import TransformLine, TransformMoved

Edge = Literal["earliest", "latest"]
Kind = Literal["handler", "transform"]
AnyLine = PositionLine | TransformLine

_log = logging.getLogger(__name__)


class BadInput(EoError):
    """What came in on standard input is wrong; nothing was published."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Moved:
    """A position, before and after."""

    line: PositionLine
    offset: int
    epoch: int
    group_follows: bool
    """Whether the group's offset in Kafka was set as well; running workers commit it themselves."""


def publish_lines(app: App, topic_name: str, lines: Iterable[bytes], *, key: str | None = None) -> int:
    """Publish each line, JSON of the topic's payload, through the outbox in one database transaction; returns how many.

    On a crash, or with one line wrong: none of them is published. Raises NotFound, BadInput.
    """
    topic = find_topic(app, topic_name)
    count = 0
    with app.session_factory.begin() as session:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                app.publish(session, topic, _payload(topic, line.strip(), number), key=key)
                count += 1
    return count


def find_topic(app: App, name: str) -> Topic[Any]:
    """The app's topic of that name. Raises NotFound with the nearest name."""
    topics = {topic.name: topic for topic in app.topics}
    if name not in topics:
        raise NotFound(f"app {app.name!r} has no topic {name!r}.", remedy=_nearest(name, topics))
    return topics[name]


def positions(database: Database, kafka: Callable[[], Admin], consumer: str | None = None) -> list[AnyLine]:
    """Where handlers, and then transforms, stand. Raises NotFound for a consumer the database does not know.

    kafka: called when there are transforms; where a handler stands, the database knows.
    """
    desk = PositionAdmin(database)
    handlers, starts = desk.lines(consumer), TransformDesk(database).lines(consumer)
    if not handlers and not starts and consumer is not None:
        _refuse_unknown(desk, consumer)
    return [*handlers, *(transform_positions.lines(kafka(), starts) if starts else [])]


def move_position(
    database: Database,
    admin: Admin,
    consumer: str,
    partition: int,
    to: int | Edge,
    *,
    topic: str | None = None,
) -> Moved | TransformMoved:
    """Move one partition of one consumer to an offset, in one database transaction; fences the worker that holds it.

    That worker claims the partition again and goes on from the new offset; messages whose ids were processed stay
    duplicates. On a crash: moved or not, `eo position show` tells. For a transform see transform_positions.move.
    Raises NotFound, FailClosed.
    """
    desk = PositionAdmin(database)
    line = _one_line(desk, consumer, _lines_of_one_kind(database, consumer), partition, topic)
    if isinstance(line, StartLine):
        transform_positions.refuse_elsewhere(admin, line)
    low, high = admin.watermarks(line.topic, partition)
    offset = {"earliest": low, "latest": high}[to] if isinstance(to, str) else to
    if not low <= offset <= high:
        raise NotFound(f"{line.topic}[{partition}] has offsets {low} to {high}, not {offset}.", remedy="Choose one.")
    if isinstance(line, StartLine):
        return transform_positions.move(database, admin, line, offset)
    epoch = desk.move(line, offset)
    _log.warning(
        "position of %s in %s[%d] moved by hand from %d to %d (epoch %d); its owner is fenced and goes on from there.",
        *(consumer, line.topic, partition, line.next_offset, offset, epoch),
        extra={"consumer": consumer, "partition": partition, "from_offset": line.next_offset, "to_offset": offset},
    )
    follows = admin.set_group_offset(consumer, line.topic, partition, offset, mark=offset_mark(epoch))
    if follows:
        events.emit("position.moved_in_kafka", consumer=consumer, partition=partition)
    return Moved(line, offset, epoch, follows)


def forget_positions(database: Database, admin: Admin, consumer: str, *, kind: Kind | None = None) -> int:
    """Delete a consumer's positions and its group's offsets: its next start is a first start.

    Refused while a worker of it is connected, and while messages of it are parked. On a crash: run it again. The ids
    of processed messages are kept until they are too old. kind: which, for a handler that was made a transform or the
    other way round; the offsets are the transform's then. Raises NotFound, FailClosed.
    """
    desk = PositionAdmin(database)
    handlers, starts = desk.lines(consumer), TransformDesk(database).lines(consumer)
    if not handlers and not starts:
        _refuse_unknown(desk, consumer)
    if kind is None and handlers and starts:
        raise FailClosed(
            f"{consumer} has positions of a handler and offsets of a transform: it was made one of the other.",
            remedy=f"Say which is to go: eo position forget {consumer} --kind handler, or --kind transform. Without "
            "its offsets, the transform sends everything again.",
        )
    if (kind == "handler" and not handlers) or (kind == "transform" and not starts):
        raise NotFound(f"{consumer} has nothing of a {kind}.", remedy=f"See: eo position show {consumer}")
    if starts and kind != "handler":
        return transform_positions.forget(database, admin, starts, consumer)
    return _forget_handler(desk, admin, consumer, handlers, group_too=not starts)


def _forget_handler(
    desk: PositionAdmin, admin: Admin, consumer: str, lines: list[PositionLine], *, group_too: bool
) -> int:
    owners = sorted({line.owner or "?" for line in lines if line.owner_connected})
    desk.refuse_parked(consumer)
    # Under a running worker the partitions would begin again at offset 0.
    if owners or (group_too and not admin.delete_group(consumer)):
        raise FailClosed(
            f"{consumer} is running ({', '.join(owners) or 'its group has members'}).",
            remedy="Stop its workers first; after a kill, wait for the group's session timeout.",
        )
    if group_too:
        events.emit("position.forgotten_in_kafka", consumer=consumer)
    deleted = desk.forget(consumer) or 0
    _log.warning("%d positions of %s forgotten by hand at %s.", deleted, consumer, clock.now().isoformat())
    return deleted


def _payload(topic: Topic[Any], line: bytes, number: int) -> object:
    record = Record(topic.name, partition=0, offset=number, key=None, value=line, headers=(), timestamp=-1)
    try:
        return topic.decode(record).payload
    except DecodeError as error:
        raise BadInput(
            f"line {number}: {error.what.partition(': ')[2].rstrip('.')}.",
            remedy="Nothing was published; correct the line.",
        ) from error


def _lines_of_one_kind(database: Database, consumer: str) -> Sequence[PositionLine | StartLine]:
    handlers, starts = PositionAdmin(database).lines(consumer), TransformDesk(database).lines(consumer)
    if handlers and starts:
        raise FailClosed(
            f"{consumer} has positions of a handler and offsets of a transform: it was made one of the other.",
            remedy=f"Forget what is no longer so: eo position forget {consumer} --kind handler, or --kind transform.",
        )
    return handlers or starts


def _one_line(
    desk: PositionAdmin,
    consumer: str,
    lines: Sequence[PositionLine | StartLine],
    partition: int,
    topic: str | None,
) -> PositionLine | StartLine:
    if not lines:
        _refuse_unknown(desk, consumer)
    here = [line for line in lines if line.partition == partition and topic in (None, line.topic)]
    if not here:
        known = ", ".join(f"{line.topic}[{line.partition}]" for line in lines)
        raise NotFound(f"{consumer} has no position in partition {partition}.", remedy=f"It has: {known}.")
    if len({line.topic_id for line in here}) > 1:
        raise FailClosed(
            f"{consumer} has positions of several topics in partition {partition}: "
            f"{', '.join(f'{line.topic} ({line.topic_id})' for line in here)}.",
            remedy=f"Say which with --topic; if a topic was re-created: eo position forget {consumer}",
        )
    return here[0]


def _refuse_unknown(desk: PositionAdmin, consumer: str) -> None:
    known = desk.consumers()
    if consumer not in known:
        raise NotFound(f"the database knows no consumer {consumer!r}.", remedy=_nearest(consumer, known))


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Known: {', '.join(names)}." if names else "There is none yet."
