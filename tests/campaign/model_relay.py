"""From the outbox to Kafka, as a machine: one shard, two relays, three rows, a coordinator and a network without order.

Rows 0 and 2 are of key a, row 1 is of key b, is committed by its user whenever it likes (or made due), and Kafka
refuses it for good. An EndTxn that the client sends again may arrive at any later moment, and ends whatever transaction
of its producer's epoch is open then; that of an earlier epoch is refused, so the network forgets it. A relay that
pauses is one that takes no step for a while: all the others need to know is that they may take it for dead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

from tests.campaign.exploration import Step

KEYS = ("a", "b", "a")
REFUSED = 1
ALL = frozenset(range(len(KEYS)))
MOST = 2
"""Rows of a batch."""

OUT, CLAIMED, DOUBTFUL, CHECKED, READY, READ, IDLE, SELECTED, PRODUCED, FULL, SENT, COMMITTED, BURYING = range(13)
_KNOWING = (IDLE, SELECTED, PRODUCED, FULL, SENT, COMMITTED)
"""Where it goes on from a batch number that it has settled."""
NONE, MINE, STALE = range(3)
"""A relay's epoch: the shard's, or an earlier one."""
NOBODY, GONE = -1, 2
_SWAPPED = {NOBODY: NOBODY, 0: 1, 1: 0, GONE: GONE}
NEVER, WAS_COMMITTED, WAS_ABORTED = range(3)
Rows = tuple[int, ...]


class Worker(NamedTuple):
    phase: int = OUT
    epoch: int = NONE
    known: int = 0
    """The batch number it goes on from."""
    read: int = 0
    """The checkpoint it read: its number ..."""
    named: Rows = ()
    """... and its rows."""
    rows: Rows = ()
    then: int = READY
    """What it does with a new producer."""
    slow: int = 0
    """A request of its producer may have been sent twice."""
    bury: int = 0


class World(NamedTuple):
    committed: Rows = ()
    """By users."""
    outbox: Rows = ()
    batch: int = 0
    bound: int = 0
    dead: int = 0
    log: Rows = ()
    """What readers see."""
    checkpoint: int = 0
    named: Rows = ()
    producer: int = NOBODY
    """Whose epoch is the transactional.id's newest."""
    open: int = 0
    inside: Rows = ()
    inside_checkpoint: int = 0
    inside_named: Rows = ()
    ended: int = NEVER
    commits: int = 0
    """EndTxn requests on their way."""
    aborts: int = 0
    cursor: int = -1
    workers: tuple[Worker, Worker] = (Worker(), Worker())
    bad: str = ""
    crashes: int = 2
    still: int = NOBODY
    """The relay that once stands still, for as long as anybody likes; GONE: that one has died."""
    late: int = 1
    luck: int = 1
    """One answer of Kafka's that is lost."""


class Relay:
    """See exploration.Machine."""

    name = "relay"
    PROTECTIONS: ClassVar = (
        "the checkpoint read before anything is sent",
        "the checkpoint in the Kafka transaction",
        "rows deleted after the commit",
        "rows chosen by state, not by a cursor",
        "the lock of a key until COMMIT",
        "the quarantine of a producer whose request may arrive twice",
        "the producer ready before the select",
        "the shard's state read after its checkpoint",
        "the epoch in the delete",
    )
    LEFT_OUT: ClassVar[Mapping[str, str]] = {
        "relay.topic_paused": "nothing is durable there: its rows are left out of the select for a while",
    }

    def __init__(self, without: str = "") -> None:
        assert without in ("", *self.PROTECTIONS), without
        self.without = without
        reads, inside, after, state, lock, quarantine, ready, late, epoch = (p != without for p in self.PROTECTIONS)
        self.reads, self.inside, self.delete_after, self.by_state, self.lock = reads, inside, after, state, lock
        self.quarantine, self.ready_first, self.state_last, self.epoch = quarantine, ready, late, epoch

    def first(self) -> World:
        # A protection that only keeps the work from standing still is missed in a small world, or all of it is visited.
        return World() if self.by_state else World(crashes=0, still=GONE, luck=0, late=0)

    def done(self, s: World) -> bool:
        return len(s.committed) == len(KEYS) and not s.outbox and not s.open

    def same(self, s: World) -> World:
        """Batch numbers count from the shard's, and what nobody will look at any more is forgotten."""
        one, two = (self._counted_from(worker, s.batch) for worker in s.workers)
        named = s.named if s.checkpoint > s.batch else ()
        inside = s.inside_checkpoint - s.batch if s.inside_named else 0
        producer = NOBODY if s.producer == GONE and not (s.open or s.commits or s.aborts) else s.producer
        sending = producer in (0, 1) and s.workers[producer].phase in (PRODUCED, FULL, SENT)
        still = s.still
        if one > two or (one == two and (producer == 1 or (producer not in (0, 1) and still == 1))):
            one, two = two, one
            producer, still = _SWAPPED[producer], _SWAPPED[still]
        return s._replace(
            batch=0,
            checkpoint=s.checkpoint - s.batch,
            named=named,
            inside_checkpoint=inside,
            ended=s.ended if not s.open and (sending or s.commits or s.aborts) else NEVER,
            producer=producer,
            still=still,
            workers=(one, two),
        )

    def _counted_from(self, worker: Worker, batch: int) -> Worker:
        reading = worker.phase == READ
        knowing = worker.phase in _KNOWING or worker.then != READY or (reading and not self.state_last)
        known = worker.known - batch if knowing else 0
        read = worker.read - batch if reading and self.state_last else 0
        return worker._replace(known=known, read=read, named=worker.named if read > 0 else ())

    def wrong(self, s: World) -> str:
        if s.bad:
            return s.bad
        if len(set(s.log)) < len(s.log):
            return "I2: a row is in Kafka twice"
        if s.dead > 1 or (s.dead and REFUSED in s.log):
            return "I11: a refused row has two dead letters, or was sent"
        if 2 in s.log and (0 not in s.log or s.log.index(2) < s.log.index(0)):
            return "I3: out of its key's order"
        for row in s.committed:
            if row not in s.outbox and row not in s.log and not (row == REFUSED and s.dead):
                return "I8: a row is gone and was not sent"
        return ""

    # --- what can happen ---

    def steps(self, s: World) -> Iterator[Step]:
        yield from self._users(s)
        yield from self._network(s)
        for w in (0, 1):
            yield from self._faults(s, w)
            yield from _WORK[s.workers[w].phase](self, s, w)

    def _users(self, s: World) -> Iterator[Step]:
        # Nobody sees it before the next select: at any moment before, it would only be the same states once more.
        if all(worker.phase != IDLE for worker in s.workers):
            return
        for row in sorted(ALL - set(s.committed)):
            if self.lock and row == 2 and 0 not in s.committed:
                continue
            there = s._replace(committed=_plus(s.committed, row), outbox=_plus(s.outbox, row))
            yield Step(f"row {row} is committed", "user", there, ("relay.made_due",) if row == REFUSED else ())

    def _network(self, s: World) -> Iterator[Step]:
        if s.commits:
            yield from self._commit_arrives(s._replace(commits=s.commits - 1))
        if s.aborts:
            less = s._replace(aborts=s.aborts - 1)
            yield Step("an abort arrives", "network", _ended(less, WAS_ABORTED) if s.open else less)
        # That of a dead producer the next init_transactions() ends in the same way, and nobody looks in between.
        if s.open and s.producer in (0, 1) and s.still in (NOBODY, s.producer):
            late = _ended(s, WAS_ABORTED)._replace(producer=NOBODY, commits=0, aborts=0, still=s.producer)
            yield Step("Kafka's timeout aborts", "network", late)

    def _commit_arrives(self, s: World) -> Iterator[Step]:
        if s.open:
            s = s._replace(log=(*s.log, *s.inside))
            if s.inside_named:
                s = s._replace(checkpoint=s.inside_checkpoint, named=s.inside_named)
            s = _ended(s, WAS_COMMITTED)
        asks = s.producer in (0, 1) and s.workers[s.producer].phase == SENT
        if not asks:
            yield Step("a commit arrives", "network", s)
        elif s.ended == WAS_COMMITTED:
            told = _with(s, s.producer, s.workers[s.producer]._replace(phase=COMMITTED))
            passed = ("kafka.transaction.committed", "relay.committed")
            yield Step("a commit arrives and is confirmed", "network", told, passed)
            if s.luck:
                lost = self._doubt(s._replace(luck=s.luck - 1), s.producer)
                yield Step("a commit arrives, the answer lost", "network", lost)
        else:
            yield Step("a commit arrives and is refused", "network", self._doubt(s, s.producer))

    def _faults(self, s: World, w: int) -> Iterator[Step]:
        if s.workers[w].phase != OUT and s.crashes:
            left = s._replace(
                crashes=s.crashes - 1,
                producer=GONE if s.producer == w else s.producer,
                still=GONE if s.still == w else s.still,
            )
            yield Step("crash", f"relay {w}", _with(left, w, Worker()))

    # --- a relay's work ---

    def _out(self, s: World, w: int) -> Iterator[Step]:
        other = s.workers[1 - w]
        taken = _with(s, w, Worker(CLAIMED, MINE))
        if other.epoch != MINE:
            yield Step("claim", f"relay {w}", taken, ("relay.claimed",))
        elif s.still in (NOBODY, 1 - w):
            after = _with(taken._replace(still=1 - w), 1 - w, other._replace(epoch=STALE))
            yield Step("claim, the other pauses", f"relay {w}", after, ("relay.claimed",))

    def _doubtful(self, s: World, w: int) -> Iterator[Step]:
        """Ask for the epoch, then make a producer."""
        me, who = s.workers[w], f"relay {w}"
        if me.epoch != MINE:
            yield self._lost(s, w)
            return
        replaced = ("kafka.producer.replaced",) if me.phase == DOUBTFUL else ()
        asked = _with(s, w, me._replace(phase=CHECKED, slow=0))
        yield Step("ask for the epoch", who, asked, (*replaced, "kafka.producer.opening"))

    def _checked(self, s: World, w: int) -> Iterator[Step]:
        me = s.workers[w]
        left = _ended(s, WAS_ABORTED if s.open else NEVER)._replace(producer=w, commits=0, aborts=0)
        ready = _with(left, w, me._replace(phase=me.then, then=READY))
        yield Step("init_transactions", f"relay {w}", ready, ("kafka.producer.ready",))

    def _ready(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"relay {w}"
        if self.state_last:
            seen = me._replace(phase=READ, read=s.checkpoint, named=s.named)
            yield Step("read the checkpoint", who, _with(s, w, seen))
        elif me.epoch != MINE:
            yield self._lost(s, w)
        else:
            yield Step("read the shard's state", who, _with(s, w, me._replace(phase=READ, known=s.batch)))

    def _read(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"relay {w}"
        if self.state_last:
            if me.epoch != MINE:
                yield self._lost(s, w)
                return
            known, read, named = s.batch, me.read, me.named
        else:
            known, read, named = me.known, s.checkpoint, s.named
        settled = me._replace(phase=BURYING if me.bury else IDLE, read=0, named=(), known=known)
        told = ("relay.refused",) if me.bury else ()
        if read == known or not self.reads:
            first = () if s.bound else ("relay.bound",)
            yield Step("nothing is in doubt", who, _with(s._replace(bound=1), w, settled), (*first, *told))
        elif read == known + 1 and set(named) <= set(s.outbox) and me.epoch == MINE:
            gone = s._replace(outbox=_minus(s.outbox, named), batch=read)
            after = _with(gone, w, settled._replace(known=read))
            yield Step("delete what was sent", who, after, ("relay.recovered", *told))
        elif read == known + 1 and me.epoch != MINE:
            yield self._lost(s, w)
        else:
            yield Step("fail closed", who, s._replace(bad="a contradiction that is none: it stops for nothing"))

    def _idle(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"relay {w}"
        if me.slow and self.ready_first:
            doubtful = me._replace(phase=DOUBTFUL, then=IDLE)
            yield Step("doubt the producer", who, _with(s, w, doubtful))
            return
        if me.epoch != MINE:
            yield self._lost(s, w)
            return
        there = [row for row in s.outbox if self.by_state or row > s.cursor]
        for count in range(1, min(len(there), MOST) + 1):
            rows = tuple(there[:count])
            chosen = me._replace(phase=SELECTED, rows=rows)
            yield Step(f"select {rows}", who, _with(s, w, chosen), ("relay.selected",))
        free = s._replace(producer=GONE if s.producer == w else s.producer)
        yield Step("leave", who, _with(free, w, Worker()), ("relay.released",))

    def _selected(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"relay {w}"
        if me.slow:
            yield Step("doubt the producer", who, _with(s, w, me._replace(phase=DOUBTFUL, then=SELECTED)))
        elif s.producer != w:
            yield Step("fenced by Kafka", who, self._doubt(s, w))
        else:
            inside = (*s.inside, *(row for row in me.rows if row != REFUSED))
            sent = s._replace(open=1, inside=inside)
            if REFUSED in me.rows:
                yield from self._refused(sent, w)
            else:
                yield Step("produce the rows", who, _with(sent, w, me._replace(phase=PRODUCED)))

    def _refused(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"relay {w}"
        kept = me._replace(rows=(), slow=0, bury=int(len(me.rows) == 1))
        phase = DOUBTFUL if self.quarantine else READY
        after = _ended(_with(s, w, kept._replace(phase=phase)), WAS_ABORTED)
        yield Step("a row is refused, abort", who, after, ("kafka.transaction.aborted",))
        if s.late:
            again = after._replace(aborts=s.aborts + 1, late=s.late - 1)
            yield Step("a row is refused, abort sent twice", who, again, ("kafka.transaction.aborted",))

    def _produced(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"relay {w}"
        if s.producer != w:
            yield Step("fenced by Kafka", who, self._doubt(s, w))
            return
        number = me.known + 1
        if self.inside:
            after = s._replace(open=1, inside_checkpoint=number, inside_named=me.rows)
        else:
            after = s._replace(checkpoint=number, named=me.rows)
        full = _with(after, w, me._replace(phase=FULL))
        yield Step("produce the checkpoint", who, full, ("relay.produced", "kafka.transaction.flushed"))

    def _full(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"relay {w}"
        if s.producer != w:
            yield Step("fenced by Kafka", who, self._doubt(s, w))
            return
        sent = _with(s._replace(commits=s.commits + 1), w, me._replace(phase=SENT))
        if not self.delete_after:
            sent = sent._replace(outbox=_minus(s.outbox, me.rows), batch=s.batch + 1)
        yield Step("send EndTxn", who, sent, ("kafka.transaction.committing",))

    def _sent(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"relay {w}"
        if s.producer != w:
            yield Step("fenced by Kafka", who, self._doubt(s, w))
            return
        if s.late:
            slow = me._replace(slow=int(self.quarantine))
            again = s._replace(commits=s.commits + 1, late=s.late - 1)
            yield Step("send EndTxn once more", who, _with(again, w, slow))
        if s.luck:
            yield Step("give the commit up", who, self._doubt(s._replace(luck=s.luck - 1), w))

    def _committed(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"relay {w}"
        mine = me.epoch == MINE or not self.epoch
        if not mine or (s.batch != me.known and self.delete_after):
            yield self._lost(s, w)
            return
        gone = s
        if self.delete_after:
            gone = s._replace(outbox=_minus(s.outbox, me.rows), batch=s.batch + 1)
        if me.epoch != MINE:
            gone = gone._replace(bad="I9: rows deleted under an old epoch")
        if not self.by_state:
            gone = gone._replace(cursor=me.rows[-1])
        idle = me._replace(phase=IDLE, known=me.known + 1, rows=())
        yield Step("delete the rows", who, _with(gone, w, idle), ("relay.deleted",))

    def _burying(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"relay {w}"
        if me.epoch != MINE:
            yield self._lost(s, w)
            return
        buried = s
        if REFUSED in s.outbox:
            buried = s._replace(outbox=_minus(s.outbox, (REFUSED,)), dead=s.dead + 1)
        yield Step("bury", who, _with(buried, w, me._replace(phase=IDLE, bury=0)), ("relay.dead_lettered",))

    def _lost(self, s: World, w: int) -> Step:
        left = s._replace(producer=GONE if s.producer == w else s.producer)
        return Step("find the shard taken over", f"relay {w}", _with(left, w, Worker()))

    def _doubt(self, s: World, w: int) -> World:
        """Anything but a confirmed commit: settle with a new producer."""
        return _with(s, w, Worker(DOUBTFUL, s.workers[w].epoch))


def _ended(s: World, how: int) -> World:
    return s._replace(open=0, inside=(), inside_checkpoint=0, inside_named=(), ended=how)


def _plus(rows: Rows, row: int) -> Rows:
    return tuple(sorted((*rows, row)))


def _minus(rows: Rows, gone: Rows) -> Rows:
    return tuple(row for row in rows if row not in gone)


def _with(s: World, w: int, worker: Worker) -> World:
    return s._replace(workers=(worker, s.workers[1]) if w == 0 else (s.workers[0], worker))


_WORK = {
    OUT: Relay._out,
    CLAIMED: Relay._doubtful,
    DOUBTFUL: Relay._doubtful,
    CHECKED: Relay._checked,
    READY: Relay._ready,
    READ: Relay._read,
    IDLE: Relay._idle,
    SELECTED: Relay._selected,
    PRODUCED: Relay._produced,
    FULL: Relay._full,
    SENT: Relay._sent,
    COMMITTED: Relay._committed,
    BURYING: Relay._burying,
}
