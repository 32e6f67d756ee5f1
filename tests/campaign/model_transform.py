"""From Kafka to Kafka, as a machine: two workers with a transactional.id each, one partition, three messages.

Offsets 0 and 2 are of key a, 1 is of key b and fails for good: at the first attempt its partition waits for it, which
is noted in the metadata of the group's offset; at the second it becomes a dead letter. There is no duplicate of its
producer among them: a transform does not know ids, and its producer's duplicates count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

from tests.campaign.exploration import Step

KEYS = ("a", "b", "a")
POISON = 1
END = len(KEYS)
MOST = 2
"""Messages of a batch."""

OUT, ASSIGNED, DOUBTFUL, READY, FIRST, IDLE, FETCHED, HANDLED, PRODUCED, MOVED, SENT, BEHIND = range(12)
NONE, MINE, STALE = range(3)
"""As whom a batch was fetched: a member, or one who was thrown out since."""
NOBODY, GONE = -1, 2
_SWAPPED = {NOBODY: NOBODY, 0: 1, 1: 0, GONE: GONE}
NEVER, WAS_COMMITTED, WAS_ABORTED = range(3)
MISSING = -1
Offset = tuple[int, int]
"""The group's offset, and how often the message there was tried."""


class Producer(NamedTuple):
    """One transactional.id, as the coordinator and the network know it."""

    open: int = 0
    inside: tuple[int, ...] = ()
    moved: Offset = (MISSING, 0)
    """The group's offset inside the open transaction."""
    commits: int = 0
    """EndTxn requests on their way."""
    aborts: int = 0
    ended: int = NEVER
    fenced: int = 0
    """Kafka ended its transaction for its length."""


class Worker(NamedTuple):
    phase: int = OUT
    member: int = NONE
    at: Offset = (0, 0)
    start: int = 0
    end: int = 0
    outputs: tuple[int, ...] = ()
    after: Offset = (0, 0)
    """Where the group will stand."""
    slow: int = 0
    producer: Producer = Producer()


class World(NamedTuple):
    group: Offset = (MISSING, 0)
    begun: int = 0
    """The database knows that the group has had an offset."""
    visible: tuple[int, ...] = ()
    holder: int = NOBODY
    left: tuple[Producer, ...] = ()
    """Producers of dead processes whose commit may still arrive. What else they leave open Kafka's timeout aborts; that
    comes to nothing, and only has to be waited for."""
    workers: tuple[Worker, Worker] = (Worker(), Worker())
    stopped: int = 0
    crashes: int = 2
    still: int = NOBODY
    """The worker that once stands still, for as long as anybody likes; GONE: that one has died."""
    late: int = 1
    luck: int = 1
    """One answer of Kafka's that is lost."""
    expiry: int = 1


class Transform:
    """See exploration.Machine."""

    name = "transform"
    PROTECTIONS: ClassVar = (
        "the group's offsets in the transaction",
        "the membership asked for right after the fetch",
        "offsets read when no transaction is under way",
        "a new producer after a doubt",
        "the quarantine of a producer whose request may arrive twice",
        "the dead letter in the transaction",
        "lost offsets known for lost",
        "the beginning noted before the first batch",
    )
    LEFT_OUT: ClassVar[Mapping[str, str]] = {
        "transform.registered": "one transaction before any worker acts: it is there or not, and said again",
    }

    def __init__(self, without: str = "") -> None:
        assert without in ("", *self.PROTECTIONS), without
        self.without = without
        inside, early, stable, anew, quarantine, dead, known, noted = (p != without for p in self.PROTECTIONS)
        self.inside, self.early, self.stable, self.anew = inside, early, stable, anew
        self.quarantine, self.dead, self.known, self.noted = quarantine, dead, known, noted

    def first(self) -> World:
        return World()

    def done(self, s: World) -> bool:
        return bool(s.stopped) or s.group == (END, 0)

    def same(self, s: World) -> World:
        one, two = map(_forgetful, s.workers)
        s = s._replace(workers=(one, two))
        if (one, s.holder == 0, s.still == 0) >= (two, s.holder == 1, s.still == 1):
            return s
        return s._replace(workers=(two, one), holder=_SWAPPED[s.holder], still=_SWAPPED[s.still])

    def wrong(self, s: World) -> str:
        if len(set(s.visible)) < len(s.visible):
            return "I2: an output twice"
        if 2 in s.visible and (0 not in s.visible or s.visible.index(2) < s.visible.index(0)):
            return "I3: out of its key's order"
        if s.group[0] != MISSING:
            if any(offset not in s.visible for offset in range(s.group[0])):
                return "I1: a message is behind the group's offset and has no output"
            if any(offset >= s.group[0] for offset in s.visible):
                return "I6: an output is visible, and the group's offset is not behind it"
        return ""

    # --- what can happen ---

    def steps(self, s: World) -> Iterator[Step]:
        if s.stopped:
            return
        yield from self._kafka(s)
        yield from self._group(s)
        for w in (0, 1):
            if s.workers[w].phase != OUT and s.crashes:
                yield self._crash(s, w)
            yield from _WORK[s.workers[w].phase](self, s, w)

    def _crash(self, s: World, w: int) -> Step:
        still = GONE if s.still == w else s.still
        dead = _closed(s, w)._replace(still=still, crashes=s.crashes - 1)
        return Step("crash", f"worker {w}", dead)

    def _kafka(self, s: World) -> Iterator[Step]:
        for number, producer in enumerate(s.left):
            rest = s._replace(left=s.left[:number] + s.left[number + 1 :])
            yield Step("Kafka's timeout aborts a dead one's", "network", rest)
            if producer.commits:
                yield Step("a dead one's commit arrives", "network", _visible(rest, producer))
        for w in (0, 1):
            producer = s.workers[w].producer
            if producer.commits:
                yield from self._commit_arrives(s, w)
            if producer.aborts:
                gone = producer._replace(aborts=producer.aborts - 1)
                yield Step(
                    "an abort arrives", "network", _having(s, w, _ended(gone, WAS_ABORTED) if gone.open else gone)
                )
            if producer.open and s.still in (NOBODY, w):
                fenced = Producer(fenced=1)
                yield Step("Kafka's timeout aborts", "network", _having(s, w, fenced)._replace(still=w))
        if s.expiry and s.group[0] != MISSING and not s.left and all(one.phase == OUT for one in s.workers):
            lost = s._replace(group=(MISSING, 0), expiry=0, holder=NOBODY)
            yield Step("the group's offsets expire", "Kafka", lost)

    def _commit_arrives(self, s: World, w: int) -> Iterator[Step]:
        me = s.workers[w]
        producer = me.producer._replace(commits=me.producer.commits - 1)
        if producer.open:
            s = _visible(s, producer)
            producer = _ended(producer, WAS_COMMITTED)
        s = _having(s, w, producer)
        if me.phase != SENT:
            yield Step("a commit arrives", "network", s)
        elif producer.ended == WAS_COMMITTED:
            yield self._confirmed(s, w)
            if s.luck:
                lost = self._doubt(s._replace(luck=s.luck - 1), w)
                yield Step("a commit arrives, the answer lost", "network", lost, ("transform.given_way",))
        else:
            yield Step("a commit arrives and is refused", "network", self._doubt(s, w), ("transform.given_way",))

    def _confirmed(self, s: World, w: int) -> Step:
        me = s.workers[w]
        passed = ["kafka.transaction.committed", "transform.committed"]
        passed += ["transform.held"] if me.after == (POISON, 1) else []
        passed += ["transform.dead_lettered"] if POISON in me.outputs else []
        fresh = Producer() if me.slow and self.quarantine else me.producer
        next_one = Worker(IDLE if self.inside else BEHIND, at=me.after, after=me.after, producer=fresh)
        if self.inside:
            next_one = next_one._replace(after=(0, 0))
        return Step("a commit arrives and is confirmed", "network", _with(s, w, next_one), tuple(passed))

    def _group(self, s: World) -> Iterator[Step]:
        for w in (0, 1):
            if s.workers[w].phase != OUT:
                continue
            joined = _with(s._replace(holder=w), w, Worker(ASSIGNED))
            if s.holder == NOBODY or s.workers[s.holder].phase == OUT:
                yield Step("assigned", f"worker {w}", joined)
            elif s.still in (NOBODY, s.holder):
                other = s.workers[s.holder]
                stale = other._replace(member=STALE if other.member == MINE else other.member)
                after = _with(joined, s.holder, stale)._replace(still=s.holder)
                yield Step("assigned, the other pauses", f"worker {w}", after)

    # --- a worker's work ---

    def _out(self, _s: World, _w: int) -> Iterator[Step]:
        yield from ()

    def _assigned(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"worker {w}"
        if s.holder != w:
            yield self._revoked(s, w)
        anew = me.phase == DOUBTFUL
        replaced = ("kafka.producer.replaced",) if anew else ()
        kept = me.producer if anew and not self.anew and not me.producer.fenced else Producer()
        passed = (*replaced, "kafka.producer.opening", "kafka.producer.ready")
        yield Step("init_transactions", who, _with(s, w, Worker(READY, producer=kept)), passed)

    def _revoked(self, s: World, w: int) -> Step:
        return Step("learn that it was revoked", f"worker {w}", _closed(s, w))

    def _ready(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"worker {w}"
        if s.holder != w:
            yield self._revoked(s, w)
        under_way = [*s.left, *(one.producer for one in s.workers)]
        if self.stable and any(one.open and one.moved[0] != MISSING for one in under_way):
            return
        if s.group[0] != MISSING:
            stands = me._replace(phase=IDLE, at=s.group)
            yield Step("read the group's offset", who, _with(s, w, stands), ("transform.claimed",))
        elif s.begun and self.known:
            yield Step("fail closed: the offsets are lost", who, s._replace(stopped=1))
        else:
            yield Step("ask where it begins", who, _with(s, w, me._replace(phase=FIRST)), ("transform.planned",))

    def _first(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"worker {w}"
        if s.holder != w:
            yield self._revoked(s, w)
        else:
            first = s._replace(group=(0, 0)) if s.group[0] == MISSING else s
            yield Step("commit the first offset", who, _with(first, w, me._replace(phase=READY)))

    def _idle(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"worker {w}"
        if s.holder != w:
            yield self._revoked(s, w)
        if not s.begun:
            yield Step("note that it has begun", who, s._replace(begun=1), ("transform.begun",))
        if self.noted and not s.begun:
            return
        if s.holder != w and self.early:
            yield Step("find that it is no member", who, self._doubt(s, w), ("transform.given_way",))
            return
        for end in range(me.at[0] + 1, min(me.at[0] + MOST, END) + 1):
            batch = me._replace(phase=FETCHED, member=MINE if s.holder == w else STALE, start=me.at[0], end=end)
            yield Step(f"fetch up to {end}", who, _with(s, w, batch), ("kafka.polled",))

    def _fetched(self, s: World, w: int) -> Iterator[Step]:
        me = s.workers[w]
        held = me.start <= POISON < me.end and me.at != (POISON, 1)
        after = (POISON, 1) if held else (me.end, 0)
        outputs = tuple(range(me.start, after[0]))
        seen = s
        if not self.dead and POISON in outputs:
            seen = s._replace(visible=(*s.visible, POISON))
            outputs = tuple(offset for offset in outputs if offset != POISON)
        handled = me._replace(phase=HANDLED, at=(0, 0), start=0, end=0, outputs=outputs, after=after)
        yield Step("transform", f"worker {w}", _with(seen, w, handled), ("transform.handled",))

    def _handled(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"worker {w}"
        if me.producer.fenced:
            yield Step("fenced by Kafka", who, self._doubt(s, w), ("transform.given_way",))
            return
        producer = me.producer._replace(open=1, inside=(*me.producer.inside, *me.outputs))
        produced = me._replace(phase=PRODUCED, producer=producer)
        yield Step("produce", who, _with(s, w, produced), ("transform.produced", "kafka.transaction.flushed"))

    def _produced(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"worker {w}"
        if me.producer.fenced:
            yield Step("fenced by Kafka", who, self._doubt(s, w), ("transform.given_way",))
        elif self.inside and self.early and me.member != MINE:
            yield from self._refused(s, w)
        else:
            # Asked for only now, one who was thrown out hands out the metadata of a stranger, which nobody checks.
            moved = me.after if self.inside else (MISSING, 0)
            producer = me.producer._replace(open=1, moved=moved)
            sent = me._replace(phase=MOVED, member=NONE, producer=producer)
            yield Step("move the group's offset", who, _with(s, w, sent), ("kafka.transaction.offsets_sent",))
            if s.luck:
                yield from self._refused(s._replace(luck=0), w)

    def _refused(self, s: World, w: int) -> Iterator[Step]:
        who, producer = f"worker {w}", s.workers[w].producer
        passed = ("kafka.transaction.aborted", "transform.given_way")
        over = self._doubt(_having(s, w, _ended(producer, WAS_ABORTED)), w)
        yield Step("refused, abort", who, over, passed)
        if s.late:
            twice = self._doubt(_having(s, w, _ended(producer, WAS_ABORTED)._replace(aborts=1)), w)
            yield Step("refused, abort sent twice", who, twice._replace(late=s.late - 1), passed)
        if s.luck:
            lost = self._doubt(s._replace(luck=s.luck - 1), w)
            yield Step("refused, the abort lost", who, lost, ("transform.given_way",))

    def _moved(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"worker {w}"
        if me.producer.fenced:
            yield Step("fenced by Kafka", who, self._doubt(s, w), ("transform.given_way",))
            return
        producer = me.producer._replace(commits=me.producer.commits + 1)
        sent = _with(s, w, me._replace(phase=SENT, producer=producer))
        yield Step("send EndTxn", who, sent, ("kafka.transaction.committing",))

    def _sent(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"worker {w}"
        if me.producer.fenced:
            yield Step("fenced by Kafka", who, self._doubt(s, w), ("transform.given_way",))
            return
        if s.late:
            producer = me.producer._replace(commits=me.producer.commits + 1)
            again = me._replace(slow=1, producer=producer)
            yield Step("send EndTxn once more", who, _with(s, w, again)._replace(late=s.late - 1))
        if s.luck:
            given_up = self._doubt(s._replace(luck=s.luck - 1), w)
            yield Step("give the commit up", who, given_up, ("transform.given_way",))

    def _behind(self, s: World, w: int) -> Iterator[Step]:
        # Only where the group's offset is not part of the transaction.
        me = s.workers[w]
        idle = me._replace(phase=IDLE, after=(0, 0))
        yield Step("commit the group's offset", f"worker {w}", _with(s._replace(group=me.after), w, idle))

    def _doubt(self, s: World, w: int) -> World:
        """Anything but a confirmed commit: read where the group stands, with a new producer."""
        return _with(s, w, Worker(DOUBTFUL, producer=s.workers[w].producer))


def _visible(s: World, producer: Producer) -> World:
    group = producer.moved if producer.moved[0] != MISSING else s.group
    return s._replace(visible=(*s.visible, *producer.inside), group=group)


def _closed(s: World, w: int) -> World:
    producer = s.workers[w].producer
    left = (*s.left, producer) if producer.open and producer.commits else s.left
    return _with(s, w, Worker())._replace(left=tuple(sorted(left)))


def _forgetful(worker: Worker) -> Worker:
    """How the last transaction ended only matters to a request about one that is over."""
    producer = worker.producer
    asked = producer.commits or producer.aborts or worker.phase in (PRODUCED, MOVED, SENT)
    if producer.ended and (producer.open or not asked):
        return worker._replace(producer=producer._replace(ended=NEVER))
    return worker


def _ended(producer: Producer, how: int) -> Producer:
    return producer._replace(open=0, inside=(), moved=(MISSING, 0), ended=how)


def _having(s: World, w: int, producer: Producer) -> World:
    return _with(s, w, s.workers[w]._replace(producer=producer))


def _with(s: World, w: int, worker: Worker) -> World:
    return s._replace(workers=(worker, s.workers[1]) if w == 0 else (s.workers[0], worker))


_WORK = {
    OUT: Transform._out,
    ASSIGNED: Transform._assigned,
    DOUBTFUL: Transform._assigned,
    READY: Transform._ready,
    FIRST: Transform._first,
    IDLE: Transform._idle,
    FETCHED: Transform._fetched,
    HANDLED: Transform._handled,
    PRODUCED: Transform._produced,
    MOVED: Transform._moved,
    SENT: Transform._sent,
    BEHIND: Transform._behind,
}
