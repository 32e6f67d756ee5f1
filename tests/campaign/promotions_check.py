"""What an asynchronous standby lacked, counted in what is there now, against what the processes said of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.campaign import ledger_rules as rules
from tests.campaign.checker import Violation, doubled_effects
from tests.campaign.full_world import Result
from tests.campaign.ledger import SOURCES, Place, Snapshot, by_key

_TOLD = re.compile(r"\.(\w+)\[(\d+)\] was processed up to (\d+), but the database's position is (\d+)")
# Of the tail itself: that it is missing, that what was published of it is out, and that nobody went on. What I2 and I3
# say besides is asked of what is there.
_OF_THE_TAIL = frozenset({"I1", "I2", "I3", "I7", "I8", "I10", "I11", "I12"})


def lost_and_told(result: Result, directory: Path) -> tuple[int, list[Violation]]:
    """How many messages were lost whose loss was told, and all that is wrong."""
    told = dict(
        _told(
            path.read_text(errors="replace")
            for path in directory.glob(f"w{result.plan.seed.replace(':', '-')}-*/*.log")
        )
    )
    return judge(result.snapshot, told, [each for each in result.violations if each.invariant not in _OF_THE_TAIL])


def judge(
    snapshot: Snapshot, told: dict[Place, tuple[int, int]], others: list[Violation]
) -> tuple[int, list[Violation]]:
    """told: by consumer and partition, up to where it was processed and where the database stands."""
    found, lost = [*others, *(Violation("there", what) for what in _agrees(snapshot))], 0
    for consumer in rules.CONSUMERS:
        for partition in {place[1] for place in snapshot.positions if place[0] == consumer}:
            place = consumer, partition
            stands, committed = snapshot.positions[place], snapshot.group_offsets.get(place, 0)
            upto, said = told.get(place, (stands, stands))
            if committed > stands and place not in told:
                found.append(Violation("told", f"{place}: the group is at {committed}, the database at {stands}"))
            if said != stands or upto < committed:
                found.append(Violation("told", f"{place}: {said} to {upto} was told; it is {stands}, {committed}"))
            lost += sum(
                1 for read in snapshot.due(consumer) if read.partition == partition and stands <= read.offset < upto
            )
            found += [Violation("told", what) for what in _disagrees(snapshot, place, stands)]
    return lost, found


def _agrees(snapshot: Snapshot) -> Iterator[str]:
    """What is there is there once, in its order, and each key's balance is that of its effects."""
    for consumer in rules.CONSUMERS:
        yield from doubled_effects(snapshot, consumer)
        effects, due = snapshot.effects_of(consumer), by_key(snapshot.due(consumer))
        for key, account in snapshot.accounts_of(consumer).items():
            if account.balance != sum(effect.amount for effect in effects if effect.key == key):
                yield f"{consumer}: the balance of {key} is {account.balance}, its effects make another one"
            first = [read.item for read in due.get(key, ())][: len(account.items)]
            if list(account.items) != first:
                yield f"{consumer}: key {key} has {account.items[-3:]} in the end, which is not how its topic begins"


def _disagrees(snapshot: Snapshot, place: Place, stands: int) -> Iterator[str]:
    """Before the position everything has its effect, but for what is parked; from it on nothing has."""
    consumer, partition = place
    done = {(effect.partition, effect.offset) for effect in snapshot.effects_of(consumer)}
    # Parked ones may be far more than those that fail: all of the key that came behind.
    parked = snapshot.leaks.get("parked messages", 0)
    missing = [
        read.offset
        for read in snapshot.due(consumer)
        if read.partition == partition and read.offset < stands and (partition, read.offset) not in done
    ]
    if len(missing) > parked:
        yield f"{consumer}[{partition}]: {missing[:5]} are before the position {stands} and had no effect"
    beyond = sorted(offset for at, offset in done if at == partition and offset >= stands)
    if beyond:
        yield f"{consumer}[{partition}]: {beyond[:5]} had their effect and are not before the position {stands}"


def _told(logs: Iterable[str]) -> Iterator[tuple[Place, tuple[int, int]]]:
    names = {source: consumer for consumer, source in SOURCES.items()}
    found: dict[Place, tuple[int, int]] = {}
    for log in logs:
        for topic, partition, upto, position in _TOLD.findall(log):
            place = names.get(topic, topic), int(partition)
            # Who ran when it was lost knows more than who started later and asked the group.
            found[place] = max(found.get(place, (0, 0)), (int(upto), int(position)))
    yield from found.items()
