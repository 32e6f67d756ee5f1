"""Dead letters of handlers, for programs: what `eo dead` does, without the command line.

    from eoframework import dead

    page = dead.letters(database, dead.DeadFilter(handler="shop.book"), limit=50)
    dead.replay(app, [letter.id for letter in page.items])

Reading takes a Database, running handlers an App. Every change writes an audit row in its own transaction. Those of
transforms are not here: they are in Kafka, in the topic `<group>.dlt`.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Generic

from typing_extensions import TypeVar

from eoframework import clock, trial
from eoframework.app import App
from eoframework.db.audit import whoever
from eoframework.db.dead_letter_desk import DeadFilter, DeadGroup, DeadLetter, DeadLetterDesk, LetterGone, Place
from eoframework.db.lane_desk import LaneDesk, ParkedLane, ParkedMessage
from eoframework.db.session import Database
from eoframework.db.transform_desk import TransformDesk
from eoframework.dead_checks import UNCHANGED, check_replayable, handler_of
from eoframework.errors import EoError, NotFound
from eoframework.patience import patiently
from eoframework.trial import RowChange, TableChanges, Trial

__all__ = [  # noqa: RUF022 - by what they are for
    # what there is
    "DeadFilter",
    "DeadLetter",
    "DeadGroup",
    "ParkedLane",
    "ParkedMessage",
    "Page",
    "letters",
    "groups",
    "count",
    "Counted",
    "counted",
    "find",
    "lanes",
    "waiting",
    "of_app",
    # what can be done
    "Trial",
    "TableChanges",
    "RowChange",
    "try_letter",
    "Refusal",
    "Replayed",
    "replay",
    "replay_all",
    "discard",
    "discard_all",
    "count_parked",
    "counted_parked",
    "discard_parked",
]

T = TypeVar("T")

_ALL = DeadFilter()
_PREVIEW = 200
_AT_ONCE = 50

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some of a list, in a fixed order: what is added meanwhile comes later and moves nothing."""

    items: tuple[T, ...]
    after: str | None
    """What to give as `after` for the next page; None at the end."""


@dataclass(frozen=True, slots=True)
class Counted(Generic[T]):
    """How many there are, and what bounds them: what comes after the count is not among them."""

    count: int
    up_to: T
    """For the change that is made with this number in mind."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A letter that was left as it is, and why."""

    letter: DeadLetter
    why: EoError


@dataclass(slots=True)
class Replayed:
    """What a replay did; a dry run only says it."""

    moved: list[int] = field(default_factory=list)
    """Dead letters that wait in their lanes now, in this order."""
    gone: list[int] = field(default_factory=list)
    """Replayed or discarded by somebody else in the meantime."""
    stopped: bool = False
    """Whether `stop` was set before the end: say it again for the rest."""
    refused: list[Refusal] = field(default_factory=list)


# --- what there is ---


def letters(database: Database, which: DeadFilter = _ALL, *, limit: int = 50, after: int = 0) -> Page[DeadLetter]:
    """Dead letters, the oldest first, with the beginnings of their payloads. Raises NotFound for an unknown handler."""
    desk = _asked(database, which)
    return _page(desk.letters(which, after=after, limit=limit + 1, preview=_PREVIEW), limit, lambda x: str(x.id))


def groups(database: Database, which: DeadFilter = _ALL, *, limit: int = 50, after: int = 0) -> Page[DeadGroup]:
    """How many died of what: one line for each consumer and fingerprint. Raises NotFound for an unknown handler."""
    desk = _asked(database, which)
    return _page(desk.groups(which, after=after, limit=limit + 1), limit, lambda group: str(group.first_id))


def count(database: Database, which: DeadFilter = _ALL) -> int:
    """How many dead letters there are. Raises NotFound for an unknown handler."""
    return counted(database, which).count


def counted(database: Database, which: DeadFilter = _ALL) -> Counted[int]:
    """`count`, with the highest number among them: `up_to` for replay_all and discard_all."""
    return Counted(*_asked(database, which).count(which))


def find(database: Database, letter_id: int) -> DeadLetter:
    """One dead letter, whole. Raises NotFound, which says what became of it, when and by whom."""
    return _found(DeadLetterDesk(database), [letter_id], outbox="eo outbox show")[0]


def lanes(
    database: Database, which: DeadFilter = _ALL, *, limit: int = 50, after: str | None = None
) -> Page[ParkedLane]:
    """Keys whose messages wait, with the first of them. `since` and `until` ask when the lane was shut.

    Raises NotFound for an unknown handler, and for an `after` that is none.
    """
    _asked(database, which)
    found = LaneDesk(database).lanes(which, after=after, limit=limit + 1)
    return _page(found, limit, lambda lane: lane.cursor)


def waiting(database: Database, lane: ParkedLane, *, limit: int = 50, after: int = -1) -> Page[ParkedMessage]:
    """The messages of one lane in their order; `after` is an offset."""
    found = LaneDesk(database).messages(lane, after=after, limit=limit + 1, preview=_PREVIEW)
    return _page(found, limit, lambda message: str(message.record.offset))


def of_app(which: DeadFilter, app: App) -> DeadFilter:
    """The filter, narrowed to the consumers of one app."""
    return dataclasses.replace(which, app=app.name)


# --- what can be done ---


def try_letter(app: App, letter_id: int, *, rows: int = trial.ROWS) -> Trial:
    """Run the handler on a dead letter's message, roll back, and return what it would do or why it fails.

    On a crash: nothing has happened. See trial.run for what no rollback takes back. Raises NotFound,
    ConfigurationError when the app has no such handler any more.
    """
    letter = find(app.database, letter_id)
    return trial.run(app, handler_of(app, letter), letter.stream(), letter.record, rows=rows)


def replay(
    app: App,
    ids: Collection[int],
    *,
    actor: str | None = None,
    rate: float | None = None,
    dry_run: bool = False,
    stop: threading.Event | None = None,
) -> Replayed:
    """Put dead letters back into their lanes, where the partition's owner runs them with fresh attempts; live or later.

    Each is one transaction, in the order of partition and offset. On a crash: every letter is dead or waits, never both
    and never neither; say it again for the rest. Issued twice: the second finds them gone. If one of them cannot be
    replayed, nothing is changed: raises NotFound (unknown, replayed or discarded before, of the outbox),
    ConfigurationError (the app has no such handler, or its topic type no longer reads the payload), FailClosed
    (positions forgotten, topic re-created, processed since).
    rate: letters a second. stop: leaves after the letter at hand. actor: for the audit, default user@host.
    """
    found = _found(DeadLetterDesk(app.database), ids, outbox="eo outbox retry", end=UNCHANGED)
    chosen = sorted(found, key=lambda letter: letter.place)
    for letter in chosen:
        check_replayable(app, letter)
    return _replay(app, chosen, actor=actor, rate=rate, dry_run=dry_run, stop=stop or threading.Event())


def replay_all(
    app: App,
    which: DeadFilter = _ALL,
    *,
    actor: str | None = None,
    rate: float | None = None,
    dry_run: bool = False,
    stop: threading.Event | None = None,
    up_to: int | None = None,
) -> Replayed:
    """`replay` for every letter of the app that there is now and that the filter lets through.

    What cannot be replayed stays as it is and is in `refused`. A letter that dies again meanwhile is not sent again.
    up_to: the highest number to be taken, of `counted`: what died since a person was asked is left alone.
    """
    desk = _asked(app.database, which)
    ours = of_app(which, app)
    last = desk.count(ours)[1] if up_to is None else up_to
    found = _in_order(desk, ours, up_to=last)
    return _replay(app, found, actor=actor, rate=rate, dry_run=dry_run, stop=stop or threading.Event())


def discard(
    database: Database, ids: Collection[int], *, actor: str | None = None, forget_id: bool = False
) -> list[int]:
    """Delete dead letters for good: their messages count as processed, and keys held for them go on.

    forget_id: their messages count as not processed, so that their payloads, published anew with the ids they had, are
    run. Save the payloads before. An id processed since in another delivery is kept.

    Each is one transaction with its audit row, which keeps the cause. On a crash: say it again for the rest. Raises
    NotFound if one of them does not exist; nothing is changed then. Returns the numbers deleted.
    """
    desk = DeadLetterDesk(database)
    found = _found(desk, ids, outbox="eo outbox discard", end=UNCHANGED)
    chosen = sorted(found, key=lambda letter: letter.place)
    return _discard(desk, chosen, whoever(actor), forget_id=forget_id)


def discard_all(
    database: Database, which: DeadFilter = _ALL, *, actor: str | None = None, up_to: int | None = None
) -> list[int]:
    """`discard` for every letter that there is now, or up to that number, and that the filter lets through."""
    desk = _asked(database, which)
    last = desk.count(which)[1] if up_to is None else up_to
    return _discard(desk, _in_order(desk, which, up_to=last, preview=0), whoever(actor))


def count_parked(database: Database, which: DeadFilter = _ALL) -> int:
    """How many messages wait in the lanes that the filter lets through. Raises NotFound for an unknown handler."""
    return counted_parked(database, which).count


def counted_parked(database: Database, which: DeadFilter = _ALL) -> Counted[datetime]:
    """`count_parked`, with the time of the count, by the database's clock: `up_to` for discard_parked."""
    _asked(database, which)
    return Counted(*LaneDesk(database).count(which))


def discard_parked(
    database: Database, which: DeadFilter = _ALL, *, actor: str | None = None, up_to: datetime | None = None
) -> int:
    """Delete what waits in these lanes for good: the messages count as processed. Returns how many that were.

    Each lane is one transaction with its audit row. On a crash: say it again for the rest.
    up_to: only what was parked until then, by the database's clock; now without it. A lane that the filter no longer
    lets through when its turn comes is left alone.
    """
    last = counted_parked(database, which).up_to if up_to is None else up_to
    desk, who, gone = LaneDesk(database), whoever(actor), 0
    after: str | None = None
    while page := desk.lanes(which, after=after, limit=_AT_ONCE):
        for lane in page:
            count = patiently(partial(desk.discard, lane, which, up_to=last, actor=who), "This lane", gone)
            if count:
                _log.warning("%d messages that waited in lane %s of %s discarded.", count, lane.cursor, lane.consumer)
            gone += count
        after = page[-1].cursor
    return gone


# --- refusals ---


def _found(desk: DeadLetterDesk, ids: Collection[int], *, outbox: str, end: str = "") -> list[DeadLetter]:
    """The letters, all of them. Raises NotFound for the first that is missing.

    outbox: the command that does to a letter of the outbox what was asked for. end: what the refusal ends with.
    """
    found = desk.find(ids)
    missing = [number for number in ids if number not in found]
    if missing:
        fate = desk.fates(missing).get(missing[0])
        if fate == "outbox":
            raise NotFound(
                f"dead letter {missing[0]} is of the outbox, not of a handler.{end}", remedy=f"{outbox} {missing[0]}"
            )
        why = f"is no more: {fate}" if fate else "does not exist"
        raise NotFound(f"dead letter {missing[0]} {why}.{end}", remedy="See: eo dead ls")
    return list(found.values())


def _asked(database: Database, which: DeadFilter) -> DeadLetterDesk:
    """The desk, unless the filter names a handler nobody knows: an empty list would look like good news."""
    desk = DeadLetterDesk(database)
    if which.handler is not None:
        known = sorted(desk.consumers())
        if which.handler not in known:
            near = difflib.get_close_matches(which.handler, known, n=1)
            listed = f"Known: {', '.join(known)}." if known else "There is none yet."
            raise NotFound(
                f"the database knows no consumer {which.handler!r}.",
                remedy=f"Did you mean {near[0]!r}?" if near else listed,
            )
        if TransformDesk(database).only_transform(which.handler):
            raise NotFound(
                f"{which.handler} is a transform: what it gave up is in Kafka, in the topic {which.handler}.dlt.",
                remedy="Read it there, with any consumer.",
            )
    return desk


# --- doing it ---


def _in_order(
    desk: DeadLetterDesk, which: DeadFilter, *, up_to: int, preview: int | None = None
) -> Iterator[DeadLetter]:
    after: Place | None = None
    while page := desk.in_order(which, after=after, up_to=up_to, limit=_AT_ONCE, preview=preview):
        yield from page
        after = page[-1].place


def _replay(
    app: App,
    chosen: Sequence[DeadLetter] | Iterator[DeadLetter],
    *,
    actor: str | None,
    rate: float | None,
    dry_run: bool,
    stop: threading.Event,
) -> Replayed:
    desk, who, done = DeadLetterDesk(app.database), whoever(actor), Replayed()
    for letter in chosen:
        if rate is not None and done.moved and not dry_run:
            clock.wait(stop, 1 / rate)
        if stop.is_set():
            done.stopped = True
            break
        try:
            check_replayable(app, letter)
        except EoError as why:
            done.refused.append(Refusal(letter, why))
            continue
        if not dry_run:
            try:
                patiently(partial(desk.put_back, letter, actor=who), f"Dead letter {letter.id}", len(done.moved), stop)
            except LetterGone:
                done.gone.append(letter.id)
                continue
            _log.info("dead letter %d (%s) waits in its lane again.", letter.id, letter.consumer)
        done.moved.append(letter.id)
    return done


def _discard(
    desk: DeadLetterDesk, chosen: Sequence[DeadLetter] | Iterator[DeadLetter], who: str, *, forget_id: bool = False
) -> list[int]:
    done: list[int] = []
    for letter in chosen:
        try:
            change = partial(desk.discard, letter, actor=who, forget_id=forget_id)
            patiently(change, f"Dead letter {letter.id}", len(done))
        except LetterGone:
            continue  # somebody else was faster, and the audit says who
        _log.warning("dead letter %d (%s, %s) discarded: %s", letter.id, letter.consumer, letter.record, letter.cause)
        done.append(letter.id)
    return done


def _page(found: Sequence[T], limit: int, cursor: Callable[[T], str]) -> Page[T]:
    items = tuple(found[:limit])
    return Page(items, cursor(items[-1]) if len(found) > limit else None)
