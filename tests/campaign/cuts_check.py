"""What must be so after a round, seen from outside: by plain SQL, and by readers that know nothing of ours."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from confluent_kafka import IsolationLevel, Message, TopicPartition
from confluent_kafka.admin import OffsetSpec
from sqlalchemy import text

from eoframework import clock
from tests.campaign.cuts_world import PARTITIONS, SLIPS, STRANGERS, World, reader
from tests.transform.scene import admin_client, committed, offsets_reader

_SETTLING = 15.0
_SHOWN = 5


class Line(NamedTuple):
    """A message or a row, as far as it matters: its key, its number and (of slips) its part."""

    key: str
    n: int
    part: int = 0


def judge(world: World) -> list[str]:
    """What is wrong, in a sentence each; nothing if all is well."""
    still_open = list(_open(world))
    rows = [Line(key, n) for key, n in _rows(world, "SELECT key, n FROM visit ORDER BY n")]
    visits, bookings, slips = _read(world)
    strangers = [line for line in _lines(visits) if line.n >= STRANGERS]
    handled = rows + strangers
    found = [*world.problems, *still_open, *_told(world, {row.n for row in rows})]
    found += same("visits", _lines(visits), handled)
    found += same("entries", [Line(*row) for row in _rows(world, "SELECT key, n FROM entry ORDER BY id")], handled)
    found += _accounts(world, handled)
    found += same("bookings", _lines(bookings), handled)
    found += same("slips", _lines(slips), [Line(k, n, part) for k, n, _ in handled for part in range(SLIPS)])
    found += _positions(world, visits, bookings)
    found += _left_over(world)
    return found


def _told(world: World, there: set[int]) -> Iterable[str]:
    """Confirmed is done. Cut before the server saw it is not done, cut after its answer is: or the cut was none."""
    for n, moment in world.told.items():
        if moment != "during" and (n in there) != (moment in (None, "after")):
            outcome = f"cut {moment} COMMIT" if moment else "confirmed"
            yield f"visit {n}: {outcome}, and its row is {'there' if n in there else 'not there'}"


def same(what: str, found: Sequence[Line], wanted: Sequence[Line]) -> Iterable[str]:
    """Everything once, nothing else, and each key in its order."""
    there, expected = Counter(found), Counter(wanted)
    if lost := expected - there:
        yield f"{what}: {lost.total()} lost: {sorted(lost)[:_SHOWN]}"
    if more := there - expected:
        known, strange = [one for one in more if one in expected], [one for one in more if one not in expected]
        if known:
            yield f"{what}: {sum(more[one] for one in known)} doubled: {sorted(known)[:_SHOWN]}"
        if strange:
            yield f"{what}: {len(strange)} that nobody made: {sorted(strange)[:_SHOWN]}"
    for key in sorted({line.key for line in found}):
        one, other = ([line for line in lines if line.key == key] for lines in (found, wanted))
        if Counter(one) == Counter(other) and one != other:
            yield f"{what}: key {key} out of order"


def _accounts(world: World, handled: Sequence[Line]) -> Iterable[str]:
    """The same once more by sums: an effect that leaves no row of its own."""
    there = {key: (entries, total) for key, entries, total in _rows(world, "SELECT key, entries, total FROM account")}
    for key in sorted({line.key for line in handled} | there.keys()):
        numbers = [line.n for line in handled if line.key == key]
        if there.get(key) != (len(numbers), sum(numbers)):
            yield f"account {key}: {there.get(key)} instead of {(len(numbers), sum(numbers))}"


def _positions(world: World, visits: Sequence[Message], bookings: Sequence[Message]) -> Iterable[str]:
    position = dict(_rows(world, "SELECT partition, next_offset FROM eo.position ORDER BY partition"))
    group = _group_offsets(world, "book", world.visits.name)
    for partition, end in _ends(visits).items():
        # A transaction's marker takes an offset of its own: the handler sees the end behind it or before it.
        if position.get(partition, -1) < end:
            yield f"position of visits[{partition}]: {position.get(partition)}, and records up to {end}"
        if group.get(partition, 0) > position.get(partition, 0):
            yield f"visits[{partition}]: the group is at {group[partition]}, the position at {position.get(partition)}"
    group = _group_offsets(world, "show", world.bookings.name)
    for partition, end in _ends(bookings).items():
        if group.get(partition, -1) < end:
            yield f"bookings[{partition}]: the group is at {group.get(partition)}, and records go up to {end}"


def _open(world: World) -> Iterable[str]:
    """Waits for it: a commit is confirmed a moment before each partition has its marker."""
    deadline = clock.monotonic() + _SETTLING
    while still := [topic for topic in world.topics if _end(world, topic, stable=True) != _end(world, topic)]:
        if clock.monotonic() > deadline:
            yield f"a transaction is still open in {', '.join(still)}"
            return
        clock.sleep(0.02)


def _left_over(world: World) -> Iterable[str]:
    for table in ("outbox_message", "dead_letter"):
        if count := world.number(f"SELECT count(*) FROM eo.{table}"):
            yield f"{count} rows left in eo.{table}"
    letters = f"{world.app.name}.show.dlt"
    if any(_end(world, letters, partitions=1)):
        yield f"there are dead letters in {letters}"


def _end(world: World, topic: str, *, stable: bool = False, partitions: int = PARTITIONS) -> list[int]:
    level = IsolationLevel.READ_COMMITTED if stable else IsolationLevel.READ_UNCOMMITTED
    asked = {TopicPartition(topic, partition): OffsetSpec.latest() for partition in range(partitions)}
    answers = admin_client(world.servers).list_offsets(asked, isolation_level=level, request_timeout=10)
    return [answer.result().offset for answer in answers.values()]


def _group_offsets(world: World, consumer: str, topic: str) -> dict[int, int]:
    reader = offsets_reader(world.servers, f"{world.app.name}.{consumer}")
    try:
        return committed(reader, [TopicPartition(topic, partition) for partition in range(PARTITIONS)])
    finally:
        reader.close()


def _read(world: World) -> list[list[Message]]:
    """All of each topic, by one read_committed client, partition by partition: to the log's end, past all markers."""
    ends = {(topic, partition): end for topic in world.topics for partition, end in enumerate(_end(world, topic))}
    found: dict[tuple[str, int], list[Message]] = {place: [] for place in ends}
    asked = [TopicPartition(topic, partition) for (topic, partition), end in ends.items() if end]
    with reader(world.servers, world.topics) as consumer:
        deadline = clock.monotonic() + _SETTLING
        while any(at.offset < ends[at.topic, at.partition] for at in consumer.position(asked)):
            assert clock.monotonic() < deadline, f"{world.topics} cannot be read to their ends"
            for message in consumer.consume(500, 0.05):
                assert message.error() is None, message.error()
                found[message.topic() or "", message.partition() or 0].append(message)
    return [[message for place in ends if place[0] == topic for message in found[place]] for topic in world.topics]


def _ends(messages: Iterable[Message]) -> dict[int, int]:
    """Partition -> the offset after its last record."""
    return {message.partition() or 0: (message.offset() or 0) + 1 for message in messages}


def _lines(messages: Iterable[Message]) -> list[Line]:
    """Partition by partition, in order."""
    payloads = ((message, json.loads(message.value() or b"{}")) for message in messages)
    return [Line((message.key() or b"").decode(), made["n"], made.get("part", 0)) for message, made in payloads]


def _rows(world: World, statement: str) -> list[tuple[Any, ...]]:
    with world.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(statement))]
