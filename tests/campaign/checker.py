"""The invariants, as functions over a snapshot: each returns a sentence for everything that is wrong.

They compare what must be, from the input's log and the rules, with what is. None asks anybody anything, so each is seen
to fail on a snapshot that was broken on purpose (test_checker.py).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from tests.campaign import ledger_rules as rules
from tests.campaign.ledger import SOURCES, Read, Snapshot, by_key

DRAIN_WITHIN = 60.0
_SHOWN = 5


class Violation(NamedTuple):
    """Something that must not be."""

    invariant: str
    what: str


def check(snapshot: Snapshot) -> list[Violation]:
    """All that is wrong; of one invariant the first few."""
    return [Violation(name, what) for name, holds in INVARIANTS.items() for what in _first(holds(snapshot))]


def nothing_lost(s: Snapshot) -> Iterator[str]:
    """I1: what was confirmed is in the log; what is in a log had its effect, or is a dead letter."""
    there = Counter(read.item for read in s.committed.get("entries", ()))
    for send in s.sends:
        if send.outcome == "ok" and send.n not in there:
            yield f"entry {send.n} was confirmed and is not in the topic"
    for consumer in rules.CONSUMERS:
        done = {(e.id or (e.partition, e.offset)) for e in s.effects_of(consumer)}
        for read in s.due(consumer):
            if (read.id or (read.partition, read.offset)) not in done:
                yield f"{consumer}: {_shown(read)} had no effect"
    for read, made in _made(s):
        if made == 0 and rules.crumbs(read.item):
            yield f"crumble: nothing came of {_shown(read)}"


def nothing_doubled(s: Snapshot) -> Iterator[str]:
    """I2: one effect for a message, by its id or else its place; a key's balance is the sum of its effects."""
    for consumer in rules.CONSUMERS:
        yield from doubled_effects(s, consumer)
        due: Counter[str | None] = Counter()
        for read in s.due(consumer):
            due[read.key] += rules.amount(consumer, read.item)
        for key, account in s.accounts_of(consumer).items():
            if account.balance != due[key]:
                yield f"{consumer}: the balance of {key} is {account.balance}, not {due[key]}"
    for read, made in _made(s):
        if made > rules.crumbs(read.item) > 0:
            yield f"crumble: {made} records came of {_shown(read)}, not {rules.crumbs(read.item)}"


def doubled_effects(s: Snapshot, consumer: str) -> Iterator[str]:
    """Items that had their effect more than once."""
    for item, times in Counter(effect.item for effect in s.effects_of(consumer)).items():
        if times > 1:
            yield f"{consumer}: item {item} had its effect {times} times"


def in_order(s: Snapshot) -> Iterator[str]:
    """I3: per key each place has the same messages in the same order as the one before it, none left out between."""
    for consumer in rules.CONSUMERS:
        for key, reads in by_key(s.due(consumer)).items():
            account = s.accounts.get((consumer, key or ""))
            wanted = tuple(read.item for read in reads)
            if account is not None and account.items != wanted:
                yield f"{consumer}: key {key} {_difference(account.items, wanted)}"
    for above, below, makes in (("book", "steps", rules.steps_of), ("settle", "settled", lambda item: [item])):
        yield from _topic_order(s, above, below, makes)
    yield from _crumbs_order(s)


def all_agree(s: Snapshot) -> Iterator[str]:
    """I4: an effect, its processed id and its outbox rows are there together, and nowhere one without the others."""
    for consumer in rules.CONSUMERS:
        effects = {effect.id for effect in s.effects_of(consumer) if effect.id is not None}
        dead = {read.id for read in s.poisoned(consumer) if read.id is not None}
        processed = s.processed.get(consumer, frozenset())
        for lone in sorted(effects - processed):
            yield f"{consumer}: the effect of {lone} is there, its processed id is not"
        for lone in sorted(processed - effects - dead):
            yield f"{consumer}: {lone} counts as processed and had no effect"
    rows = Counter(row.xid for row in s.published)
    owed: Counter[int] = Counter()
    for effect in s.effects:
        owed[effect.xid] += rules.parts(effect.item) if effect.consumer == "book" else 1
    for xid in sorted(rows.keys() | owed.keys()):
        if rows[xid] != owed[xid]:
            yield f"transaction {xid}: effects that publish {owed[xid]} messages, and {rows[xid]} outbox rows"


def nothing_aborted_read(s: Snapshot) -> Iterator[str]:
    """I5: nobody acts on a record that was never committed."""
    for consumer in rules.CONSUMERS:
        places = {(read.partition, read.offset): read for read in s.committed.get(SOURCES[consumer], ())}
        aborted = {(read.partition, read.offset) for read in s.uncommitted.get(SOURCES[consumer], ())} - places.keys()
        for effect in s.effects_of(consumer):
            place = effect.partition, effect.offset
            if place not in places or places[place].item != effect.item:
                what = "was aborted" if place in aborted else "is another one in the log, or none"
                yield f"{consumer}: an effect of item {effect.item} at {place[0]}@{place[1]}, which {what}"
    settled = {read.item for read in s.committed.get("settled", ())}
    for crumb in s.committed.get("crumbs", ()):
        if crumb.item not in settled:
            yield f"crumble: a record of item {crumb.item}, which was never committed"
    for topic, reads in s.committed.items():
        for read in reads:
            if read.item >= rules.GHOSTS:
                yield f"{topic}: {_shown(read)} is of an aborted transaction and can be read"
    yield from (f"{e.consumer}: an effect of the aborted entry {e.item}" for e in s.effects if e.item >= rules.GHOSTS)


def all_or_none(s: Snapshot) -> Iterator[str]:
    """I6: of what a transform or a handler makes of one message there is all or nothing."""
    for read, made in _made(s):
        if 0 < made < rules.crumbs(read.item):
            yield f"crumble: {made} of {rules.crumbs(read.item)} records of {_shown(read)}"
    there = Counter(read.item // rules.PARTS for read in s.committed.get("steps", ()))
    for n, made in there.items():
        if 0 < made < rules.parts(n):
            yield f"book: {made} of {rules.parts(n)} messages of entry {n}"


def offsets_behind_positions(s: Snapshot) -> Iterator[str]:
    """I7: the group's offset is never ahead of the position; in the end both are at the log's end."""
    for sample in s.samples:
        if sample.offset > sample.position:
            yield f"{sample.consumer}[{sample.partition}]: the group at {sample.offset}, the position {sample.position}"
    for (consumer, partition), end in _ends(s).items():
        for name, places in (("position", s.positions), ("group's offset", s.group_offsets)):
            at = places.get((consumer, partition), 0)
            if at < end:
                yield f"{consumer}[{partition}]: the {name} is {at}, the log ends at {end}"
        if s.group_offsets.get((consumer, partition), 0) > s.positions.get((consumer, partition), 0):
            yield f"{consumer}[{partition}]: the group's offset is ahead of the position"


def published_is_committed(s: Snapshot) -> Iterator[str]:
    """I8: what read_committed readers see is the committed outbox, each row once."""
    for topic in ("steps", "settled"):
        visible = Counter(read.id for read in s.committed.get(topic, ()))
        committed = {row.id for row in s.published if row.topic == topic}
        for name, times in visible.items():
            if times > 1:
                yield f"{topic}: message {name} can be read {times} times"
            if name not in committed:
                yield f"{topic}: message {name} can be read and was never committed to the outbox"
        for name in sorted(committed - visible.keys()):
            yield f"{topic}: outbox message {name} was committed and cannot be read"


def no_old_epoch(s: Snapshot) -> Iterator[str]:
    """I9: after a new epoch nothing is written under an earlier one; every effect passed the fence of its position.

    A transaction may move a position twice: when time runs out inside a batch it takes part of its own advance back.
    """
    latest: dict[tuple[str, int], tuple[int, int]] = {}
    fenced: set[tuple[str, int, int]] = set()
    last = {(move.consumer, move.partition, move.xid): move for move in s.moves}
    for move in last.values():
        place = move.consumer, move.partition
        epoch, offset = latest.get(place, (0, 0))
        if move.epoch < epoch:
            yield f"{place}: written under epoch {move.epoch} after {epoch}"
        if move.next_offset < offset:
            yield f"{place}: the position went back from {offset} to {move.next_offset}"
        latest[place] = max(epoch, move.epoch), max(offset, move.next_offset)
        fenced.add((*place, move.xid))
    for effect in s.effects:
        if (effect.consumer, effect.partition, effect.xid) not in fenced:
            yield f"{effect.consumer}: item {effect.item} was written in a transaction that did not pass the fence"


def drained(s: Snapshot) -> Iterator[str]:
    """I10: soon after the faults everything was done, and no transaction is open."""
    if s.drained_after is None or s.drained_after > DRAIN_WITHIN:
        yield f"not drained within {DRAIN_WITHIN:g} s of the last fault"
    yield from (f"open: {what}" for what in s.open_transactions)


def poison_is_dead(s: Snapshot) -> Iterator[str]:
    """I11: a message that is always rejected is one dead letter and never an effect; no other is a dead letter."""
    for consumer in rules.CONSUMERS:
        letters = Counter((x.partition, x.offset) for x in s.letters if x.consumer == consumer)
        yield from _letters(consumer, letters, s.poisoned(consumer))
        for effect in s.effects_of(consumer):
            if rules.poison(consumer, effect.item):
                yield f"{consumer}: item {effect.item} is poison and had an effect"
    dead = Counter(read.item for read in s.committed.get("dead", ()))
    for read in s.committed.get("settled", ()):
        wanted = 1 if rules.poison("crumble", read.item) else 0
        if dead[read.item] != wanted:
            yield f"crumble: {_shown(read)} is {dead[read.item]} dead letters, not {wanted}"
    for crumb in s.committed.get("crumbs", ()):
        if rules.poison("crumble", crumb.item):
            yield f"crumble: item {crumb.item} is poison and came out"


def no_leak(s: Snapshot) -> Iterator[str]:
    """I12: nothing is left over."""
    yield from (f"{count} {what} left" for what, count in s.leaks.items() if count)


INVARIANTS: dict[str, Callable[[Snapshot], Iterator[str]]] = {
    "I1": nothing_lost,
    "I2": nothing_doubled,
    "I3": in_order,
    "I4": all_agree,
    "I5": nothing_aborted_read,
    "I6": all_or_none,
    "I7": offsets_behind_positions,
    "I8": published_is_committed,
    "I9": no_old_epoch,
    "I10": drained,
    "I11": poison_is_dead,
    "I12": no_leak,
}


# --- what several of them need ----------------------------------------------------------------------------------------


def _made(s: Snapshot) -> Iterator[tuple[Read, int]]:
    """Each settled item that the transform takes, and how many records came of it."""
    there = Counter(read.item for read in s.committed.get("crumbs", ()))
    for read in s.due("crumble"):
        yield read, there[read.item]


def _ends(s: Snapshot) -> dict[tuple[str, int], int]:
    return {
        (consumer, partition): end
        for (topic, partition), end in s.ends.items()
        for consumer, source in SOURCES.items()
        if source == topic
    }


def _letters(consumer: str, letters: Counter[tuple[int, int]], poison: Iterable[Read]) -> Iterator[str]:
    wanted = {(read.partition, read.offset) for read in poison}
    for place in sorted(wanted - letters.keys()):
        yield f"{consumer}: {place[0]}@{place[1]} is poison and no dead letter"
    for place, times in letters.items():
        if place not in wanted or times > 1:
            yield f"{consumer}: {place[0]}@{place[1]} is {times} dead letters"


def _topic_order(s: Snapshot, consumer: str, topic: str, makes: Callable[[int], list[int]]) -> Iterator[str]:
    found = by_key(s.committed.get(topic, ()))
    for key, account in s.accounts_of(consumer).items():
        wanted = tuple(made for item in account.items for made in makes(item))
        there = tuple(read.item for read in found.get(key, ()))
        if there != wanted:
            yield f"{topic}: key {key} {_difference(there, wanted)}"


def _crumbs_order(s: Snapshot) -> Iterator[str]:
    found = by_key(s.committed.get("crumbs", ()))
    for key, reads in by_key(s.due("crumble")).items():
        wanted = tuple((read.item, crumb) for read in reads for crumb in range(rules.crumbs(read.item)))
        there = tuple((read.item, read.crumb) for read in found.get(key, ()))
        if there != wanted:
            yield f"crumbs: key {key} {_difference(there, wanted)}"


def _difference(found: tuple[object, ...], wanted: tuple[object, ...]) -> str:
    at = next((i for i, (one, other) in enumerate(zip(found, wanted, strict=False)) if one != other), None)
    if at is None:
        at = min(len(found), len(wanted))
    return f"has {found[at : at + 3]} at place {at} of {len(found)}, not {wanted[at : at + 3]} of {len(wanted)}"


def _shown(read: Read) -> str:
    return f"item {read.item} at {read.partition}@{read.offset}"


def _first(found: Iterable[str]) -> list[str]:
    shown = list(found)
    left = len(shown) - _SHOWN
    return shown[:_SHOWN] + ([f"... and {left} more"] if left > 0 else [])


def by_invariant(violations: Iterable[Violation]) -> dict[str, list[str]]:
    """The sentences of each invariant that does not hold."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for violation in violations:
        found[violation.invariant].append(violation.what)
    return dict(found)
