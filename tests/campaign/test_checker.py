"""Each invariant is seen to fail on a snapshot that is broken in just that way; a whole one passes them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import pytest

from tests.campaign import history, ledger
from tests.campaign import ledger_rules as rules
from tests.campaign.checker import INVARIANTS, by_invariant, check
from tests.campaign.ledger import Account, Effect, Letter, Moved, Published, Read, Sample, Send, Snapshot

COUNT, KEYS = 400, 3


def _id(*parts: object) -> str:
    return str(uuid5(NAMESPACE_URL, " ".join(map(str, parts))))


class Whole:
    """What a run leaves in which everything went well, worked out step by step."""

    def __init__(self) -> None:
        self.effects: list[Effect] = []
        self.published: list[Published] = []
        self.moves: list[Moved] = []
        self.letters: list[Letter] = []
        self.accounts: dict[tuple[str, str], Account] = {}
        self.processed: dict[str, set[str]] = {"book": set(), "settle": set()}
        self._xid = 100

    def snapshot(self) -> Snapshot:
        entries = [
            Read(0, n, rules.key_of(n, KEYS), _id("entry", n) if rules.has_id(n) else None, n) for n in range(COUNT)
        ]
        again = next(read for read in entries[20:] if read.id is not None)
        entries.append(again._replace(offset=COUNT))
        steps = self._handle("book", entries, "steps", rules.steps_of)
        settled = self._handle("settle", steps, "settled", lambda item: [item])
        alive = [read for read in settled if not rules.poison("crumble", read.item)]
        crumbs = [(read, crumb) for read in alive for crumb in range(rules.crumbs(read.item))]
        dead = [read for read in settled if rules.poison("crumble", read.item)]
        committed = {
            "entries": tuple(entries),
            "steps": tuple(steps),
            "settled": tuple(settled),
            "crumbs": tuple(Read(0, at, read.key, None, read.item, crumb) for at, (read, crumb) in enumerate(crumbs)),
            "dead": tuple(read._replace(offset=at) for at, read in enumerate(dead)),
        }
        ghost = Read(0, COUNT + 1, "k0", _id("ghost"), rules.GHOSTS)
        places = {("book", 0): COUNT + 1, ("settle", 0): len(steps), ("crumble", 0): len(settled)}
        return Snapshot(
            sends=tuple(Send(n, "ok") for n in range(COUNT)),
            committed=committed,
            uncommitted={**committed, "entries": (*entries, ghost)},
            effects=tuple(self.effects),
            accounts=self.accounts,
            processed={name: frozenset(ids) for name, ids in self.processed.items()},
            published=tuple(self.published),
            moves=tuple(self.moves),
            letters=tuple(self.letters),
            positions=places,
            group_offsets=places,
            ends={("entries", 0): COUNT + 1, ("steps", 0): len(steps), ("settled", 0): len(settled)},
            samples=(Sample("book", 0, 10, 12),),
            drained_after=3.0,
        )

    def _handle(self, consumer: str, reads: list[Read], target: str, makes: Callable[[int], list[int]]) -> list[Read]:
        made: list[Read] = []
        seen: set[str] = set()
        for read in reads:
            self._xid += 1
            self.moves.append(Moved(consumer, 0, 1 + read.offset // 50, read.offset + 1, self._xid))
            if read.id in seen:
                continue
            if read.id is not None:
                seen.add(read.id)
                self.processed[consumer].add(read.id)
            if rules.poison(consumer, read.item):
                self.letters.append(Letter(consumer, 0, read.offset))
                continue
            self._book(consumer, read)
            for item in makes(read.item):
                made.append(Read(0, len(made), read.key, _id(target, item), item))
                self.published.append(Published(_id(target, item), target, self._xid))
        return made

    def _book(self, consumer: str, read: Read) -> None:
        key, amount = read.key or "", rules.amount(consumer, read.item)
        self.effects.append(Effect(consumer, 0, read.offset, read.id, key, read.item, amount, self._xid))
        balance, items = self.accounts.get((consumer, key), Account(0, ()))
        self.accounts[consumer, key] = Account(balance + amount, (*items, read.item))


def whole() -> Snapshot:
    return Whole().snapshot()


def _topic(s: Snapshot, topic: str, reads: list[Read]) -> Snapshot:
    return replace(s, committed={**s.committed, topic: tuple(reads)})


def _plain_effect(s: Snapshot, consumer: str) -> Effect:
    """One with an id and messages that follow from it."""
    return next(e for e in s.effects if e.consumer == consumer and e.id is not None and rules.parts(e.item) == 2)


def _swapped(s: Snapshot) -> Snapshot:
    (place, account), *_ = s.accounts.items()
    first, second, *others = account.items
    return replace(s, accounts={**s.accounts, place: account._replace(items=(second, first, *others))})


def _without(s: Snapshot, topic: str, *, some: bool) -> Snapshot:
    """Without the records that came of one message, or of several all but one."""
    many = next(r.item for r in s.committed["crumbs"] if rules.crumbs(r.item) == 3)
    gone = [read for read in s.committed[topic] if read.item == many][1 if some else 0 :]
    return _topic(s, topic, [read for read in s.committed[topic] if read not in gone])


def _aborted_read(s: Snapshot) -> Snapshot:
    effect = s.effects_of("book")[0]
    return replace(s, effects=(*s.effects, effect._replace(offset=COUNT + 1, item=rules.GHOSTS, id=None)))


def _poison_effect(s: Snapshot) -> Snapshot:
    read = s.poisoned("book")[0]
    effect = s.effects_of("book")[0]
    return replace(s, effects=(*s.effects, effect._replace(offset=read.offset, item=read.item, id=read.id)))


def _moved_again(s: Snapshot, **changes: Any) -> Snapshot:
    return replace(s, moves=(*s.moves, s.moves[-1]._replace(xid=9_999, **changes)))


BROKEN: list[tuple[str, str, Callable[[Snapshot], Snapshot]]] = [
    ("I1", "an effect is missing", lambda s: replace(s, effects=s.effects[:-1])),
    ("I1", "a confirmed entry is in no log", lambda s: replace(s, sends=(*s.sends, Send(COUNT + 5, "ok")))),
    ("I1", "nothing came of a settled item", lambda s: _without(s, "crumbs", some=False)),
    ("I2", "an effect twice", lambda s: replace(s, effects=(*s.effects, s.effects[0]))),
    (
        "I2",
        "a sum that was added twice",
        lambda s: replace(s, accounts={k: a._replace(balance=a.balance * 2) for k, a in s.accounts.items()}),
    ),
    ("I2", "a record twice", lambda s: _topic(s, "crumbs", [*s.committed["crumbs"], s.committed["crumbs"][0]])),
    ("I3", "two items of a key in the wrong order", _swapped),
    ("I3", "two messages of a key in the wrong order", lambda s: _topic(s, "steps", [*reversed(s.committed["steps"])])),
    ("I3", "two crumbs in the wrong order", lambda s: _topic(s, "crumbs", [*reversed(s.committed["crumbs"])])),
    (
        "I4",
        "an effect without its processed id",
        lambda s: replace(s, processed={**s.processed, "book": s.processed["book"] - {_plain_effect(s, "book").id}}),
    ),
    (
        "I4",
        "a processed id without an effect",
        lambda s: replace(s, processed={**s.processed, "settle": s.processed["settle"] | {_id("nobody")}}),
    ),
    ("I4", "an effect without its outbox row", lambda s: replace(s, published=s.published[1:])),
    ("I5", "an effect of an aborted entry", _aborted_read),
    (
        "I5",
        "a record of an item that was never settled",
        lambda s: _topic(s, "crumbs", [*s.committed["crumbs"], Read(0, 9_999, "k0", None, 7_777_777)]),
    ),
    ("I6", "a part of the records of an item", lambda s: _without(s, "crumbs", some=True)),
    ("I6", "a part of the messages of an entry", lambda s: _topic(s, "steps", _without_one_step(s))),
    ("I7", "a group ahead of its position", lambda s: replace(s, samples=(Sample("book", 0, 13, 12),))),
    ("I7", "a position before the log's end", lambda s: replace(s, positions={**s.positions, ("settle", 0): 1})),
    ("I7", "a group before the log's end", lambda s: replace(s, group_offsets={**s.group_offsets, ("book", 0): 1})),
    ("I8", "an outbox row that nobody can read", lambda s: _topic(s, "settled", [*s.committed["settled"][1:]])),
    (
        "I8",
        "a message that was never committed",
        lambda s: _topic(s, "steps", [*s.committed["steps"], s.committed["steps"][0]._replace(id=_id("forged"))]),
    ),
    (
        "I8",
        "a message twice",
        lambda s: _topic(s, "steps", [*s.committed["steps"], s.committed["steps"][0]]),
    ),
    ("I9", "a write under an old epoch", lambda s: _moved_again(s, epoch=0)),
    ("I9", "a position that went back", lambda s: _moved_again(s, next_offset=1)),
    ("I9", "an effect past the fence", lambda s: replace(s, moves=s.moves[:-1] + s.moves[:0], effects=_unfenced(s))),
    ("I10", "not drained", lambda s: replace(s, drained_after=None)),
    ("I10", "drained late", lambda s: replace(s, drained_after=61.0)),
    ("I10", "an open transaction", lambda s: replace(s, open_transactions=("1 idle in transaction",))),
    ("I11", "poison that had an effect", _poison_effect),
    ("I11", "poison that is no dead letter", lambda s: replace(s, letters=s.letters[1:])),
    ("I11", "a dead letter twice", lambda s: replace(s, letters=(*s.letters, s.letters[0]))),
    ("I11", "a dead letter of the transform twice", lambda s: _topic(s, "dead", [*s.committed["dead"]] * 2)),
    ("I12", "rows left over", lambda s: replace(s, leaks={"parked messages": 1})),
]


def _without_one_step(s: Snapshot) -> list[Read]:
    item = next(read.item for read in s.committed["steps"] if rules.parts(read.item // rules.PARTS) == 2)
    return [read for read in s.committed["steps"] if read.item != item]


def _unfenced(s: Snapshot) -> tuple[Effect, ...]:
    return (s.effects[0]._replace(xid=1), *s.effects[1:])


def test_a_whole_snapshot_passes() -> None:
    snapshot = whole()
    assert check(snapshot) == []
    assert all(snapshot.committed.values()), "nothing to judge"
    assert snapshot.poisoned("book")
    assert snapshot.poisoned("settle")
    assert snapshot.poisoned("crumble")


def test_what_a_transaction_takes_back_of_its_own_is_no_finding() -> None:
    """Seen to fail with every move judged: a batch whose time ran out inside had "gone back"."""
    snapshot = whole()
    last = snapshot.moves[-1]
    too_far = last._replace(next_offset=last.next_offset + 20)
    assert check(replace(snapshot, moves=(*snapshot.moves[:-1], too_far, last))) == []


@pytest.mark.parametrize(("invariant", "_what", "breaks"), BROKEN, ids=[f"{name} {what}" for name, what, _ in BROKEN])
def test_what_is_broken_is_reported(invariant: str, _what: str, breaks: Callable[[Snapshot], Snapshot]) -> None:
    """Seen to fail for each invariant that was taken out of the table of the checker."""
    assert invariant in by_invariant(check(breaks(whole())))


def test_every_invariant_has_been_broken() -> None:
    assert {invariant for invariant, _, _ in BROKEN} == set(INVARIANTS)


def test_an_operation_is_on_disk_before_it_begins(tmp_path: Path) -> None:
    """Seen to fail with a buffered file: nothing of the two operations was there."""
    path = tmp_path / "history"
    with history.History(path) as written:
        number = written.begin("send", messages=[1, 2, 3])
        written.begin("send", messages=[4])
        written.end(number, "ok", unknown=[2])
        found = history.read(path)
    assert [(o.what, o.outcome) for o in found] == [("send", "ok"), ("send", "unknown")]
    assert ledger.sends(found) == (Send(1, "ok"), Send(2, "unknown"), Send(3, "ok"), Send(4, "unknown"))


def test_only_the_last_line_may_be_torn(tmp_path: Path) -> None:
    path = tmp_path / "history"
    with history.History(path) as written:
        written.done("one")
    whole_file = path.read_bytes()
    path.write_bytes(whole_file + b'{"op":7,"wh')
    assert [operation.what for operation in history.read(path)] == ["one"]
    path.write_bytes(b'{"op":7,"wh\n' + whole_file)
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        history.read(path)
