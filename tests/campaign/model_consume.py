"""From Kafka to the database, as a machine: two workers, one partition, four records.

Offset 0 and 2 are of key a, 3 is 0 once more as its producer sent it twice, 1 is of key b and fails for good. Only 0
(and so 3) has an id: the others are protected by the position alone. The position's row can be locked by one
transaction at a time, which is all that PostgreSQL is needed for here. A worker that pauses is one that takes no step
for a while: all the others need to know is that the group, and the server, may take it for dead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

from tests.campaign.exploration import Step

KEYS = ("a", "b", "a", "a")
IDS = (0, None, None, 0)
POISON = 1
END = len(KEYS)
MOST = 2
"""Records of a batch."""

OUT, CLAIMING, IDLE, FETCHED, OPEN, HANDLED, SENT, MOVING, DOUBT, WAITING = range(10)
NONE, MINE, STALE = range(3)
"""A worker's claim: of the row's epoch, or of an earlier one."""
NOBODY, GONE = -1, 2
_SWAPPED = {NOBODY: NOBODY, 0: 1, 1: 0, GONE: GONE}


class Worker(NamedTuple):
    phase: int = OUT
    claim: int = NONE
    expected: int = 0
    client: int = 0
    """Where the Kafka client goes on."""
    start: int = 0
    end: int = 0
    """The batch."""


class Transaction(NamedTuple):
    """The one that holds the position row."""

    owner: int
    """A worker, or GONE: its process is dead, and the server does not know it yet."""
    sent: int
    """Its COMMIT is on the way."""
    start: int
    end: int
    stale: int
    """It got past the fence with an old epoch."""


NO_TRANSACTION = Transaction(NOBODY, 0, 0, 0, 0)


class World(NamedTuple):
    position: int = 0
    ids: int = 0
    effects: tuple[int, ...] = ()
    outbox: tuple[int, ...] = ()
    dead: int = 0
    group: int = 0
    """The group's offset in Kafka."""
    holder: int = NOBODY
    """Whom the group says the partition belongs to."""
    lock: Transaction = NO_TRANSACTION
    workers: tuple[Worker, Worker] = (Worker(), Worker())
    old_epoch: int = 0
    """Something was committed under one."""
    crashes: int = 2
    still: int = NOBODY
    """The worker that once stands still, for as long as anybody likes; GONE: that one has died."""
    moves: int = 1
    losses: int = 1
    cuts: int = 1


class Consume:
    """See exploration.Machine."""

    name = "consume"
    PROTECTIONS: ClassVar = (
        "the epoch in the fence",
        "the expected offset in the fence, and the row read after a doubt",
        "processed ids",
        "the position in the transaction",
        "the group's offset committed last",
        "outbox rows in the transaction",
        "the dead letter in the transaction",
        "the loss guard",
        "the second claim of who was fenced",
    )
    LEFT_OUT: ClassVar[Mapping[str, str]] = {
        "consume.registered": "one transaction before any worker acts: it is there or not, and said again",
        "kafka.offset_marked": "only where another program's offsets were adopted; moves nothing that decides",
        "consume.failed": "retry=None ends the process with its batch rolled back, as a crash before COMMIT does",
    }

    def __init__(self, without: str = "") -> None:
        assert without in ("", *self.PROTECTIONS), without
        self.without = without
        epoch, expected, ids, position, group, outbox, dead, guard, again = (p != without for p in self.PROTECTIONS)
        self.epoch, self.expected, self.ids, self.position = epoch, expected, ids, position
        self.group_last, self.outbox, self.dead, self.guard, self.again = group, outbox, dead, guard, again

    def first(self) -> World:
        # Without it the work only stands still, which is known when all states are: of a small world.
        return World() if self.again else World(crashes=0, moves=0, losses=0, cuts=0)

    def done(self, s: World) -> bool:
        return s.position == END and s.group == END and s.lock == NO_TRANSACTION

    def same(self, s: World) -> World:
        one, two = s.workers
        if (one, s.holder == 0, s.lock.owner == 0, s.still == 0) >= (
            two,
            s.holder == 1,
            s.lock.owner == 1,
            s.still == 1,
        ):
            return s
        lock = s.lock._replace(owner=_SWAPPED[s.lock.owner])
        return s._replace(workers=(two, one), holder=_SWAPPED[s.holder], still=_SWAPPED[s.still], lock=lock)

    def wrong(self, s: World) -> str:
        if s.old_epoch:
            return "I9: committed under an old epoch"
        if s.dead > 1 or POISON in s.effects:
            return "I11: the poison has two dead letters, or an effect"
        if len(set(s.effects)) < len(s.effects) or {0, 3} <= set(s.effects):
            return "I2: an effect twice"
        if s.group > s.position:
            return "I7: the group's offset is ahead of the position"
        for offset in range(s.position):
            settled = s.dead if offset == POISON else offset in s.effects or (offset == 3 and 0 in s.effects)
            if not settled:
                return "I1: a message is behind the position and has no effect"
        for key in set(KEYS):
            mine = [offset for offset in s.effects if KEYS[offset] == key]
            if mine != sorted(mine) or (2 in mine and 0 not in mine):
                return "I3: out of its key's order"
        with_id = any(IDS[offset] is not None for offset in s.effects)
        if sorted(s.outbox) != sorted(s.effects) or bool(s.ids) != with_id:
            return "I4: effects, processed ids and outbox rows differ"
        return ""

    # --- what can happen ---

    def steps(self, s: World) -> Iterator[Step]:
        yield from self._server(s)
        yield from self._group(s)
        for w in (0, 1):
            yield from self._faults(s, w)
            yield from _WORK[s.workers[w].phase](self, s, w)

    def _server(self, s: World) -> Iterator[Step]:
        lock = s.lock
        if lock.owner == NOBODY:
            return
        if lock.owner == GONE:
            yield Step("the dead one's transaction ends", "server", s._replace(lock=NO_TRANSACTION))
        if not lock.sent:
            return
        after = self._committed(s)
        if lock.owner == GONE:
            yield Step("commit of a dead one", "server", after)
            return
        done = s.workers[lock.owner]._replace(phase=IDLE, expected=lock.end, client=lock.end, start=0, end=0)
        if not self.position:
            done = done._replace(phase=MOVING, end=lock.end)
        yield Step("commit", "server", _with(after, lock.owner, done), ("db.committed",))
        if s.cuts:
            doubt = s.workers[lock.owner]._replace(phase=DOUBT, start=0, end=0)
            cut = s.cuts - 1
            yield Step("commit, the answer lost", "server", _with(after, lock.owner, doubt)._replace(cuts=cut))
            lost = _with(s, lock.owner, doubt)._replace(lock=NO_TRANSACTION, cuts=cut)
            yield Step("the COMMIT lost", "server", lost)

    def _committed(self, s: World) -> World:
        effects, ids = list(s.effects), s.ids
        ran = []
        for offset in range(s.lock.start, s.lock.end):
            known = IDS[offset] is not None and ids and self.ids
            if offset != POISON and not known:
                ran.append(offset)
                ids |= IDS[offset] is not None
        return s._replace(
            position=s.lock.end if self.position else s.position,
            ids=ids,
            effects=(*effects, *ran),
            outbox=(*s.outbox, *(ran if self.outbox else [])),
            dead=s.dead + (self.dead and s.lock.start <= POISON < s.lock.end),
            lock=NO_TRANSACTION,
            old_epoch=s.lock.stale,
        )

    def _group(self, s: World) -> Iterator[Step]:
        """Assignments: to whoever is there, away from who died or stands still, and once for no reason."""
        for w in (0, 1):
            if s.workers[w].phase != OUT:
                continue
            joined = _with(s._replace(holder=w), w, Worker(phase=CLAIMING))
            if s.holder == NOBODY or s.workers[s.holder].phase == OUT:
                yield Step("assigned", f"worker {w}", joined)
                continue
            if s.still in (NOBODY, s.holder):
                yield Step("assigned, the other pauses", f"worker {w}", joined._replace(still=s.holder))
            if s.moves and s.workers[s.holder].phase in (CLAIMING, IDLE, DOUBT, WAITING):
                left = _with(joined, s.holder, Worker())._replace(moves=s.moves - 1)
                yield Step("assigned", f"worker {w}", left, ("consume.revoked", "consume.released"))

    def _faults(self, s: World, w: int) -> Iterator[Step]:
        if s.workers[w].phase != OUT and s.crashes:
            lock = s.lock._replace(owner=GONE) if s.lock.owner == w else s.lock
            still = GONE if s.still == w else s.still
            left = s._replace(lock=lock, still=still, crashes=s.crashes - 1)
            yield Step("crash", f"worker {w}", _with(left, w, Worker()))

    # --- a worker's work ---

    def _out(self, _s: World, _w: int) -> Iterator[Step]:
        yield from ()

    def _claiming(self, s: World, w: int) -> Iterator[Step]:
        who = f"worker {w}"
        if s.lock.owner == NOBODY:
            other = s.workers[1 - w]
            if other.claim == MINE:
                s = _with(s, 1 - w, other._replace(claim=STALE))
            at = s.position
            if not self.group_last:
                at = s.group
                s = s._replace(position=at)
            mine = Worker(IDLE, MINE, at, at)
            yield Step("claim", who, _with(s, w, mine), ("consume.claiming", "consume.claimed"))
        elif not s.lock.sent and s.lock.owner != GONE:
            owner = s.lock.owner
            doubt = s.workers[owner]._replace(phase=DOUBT, start=0, end=0)
            ended = _with(s._replace(lock=NO_TRANSACTION), owner, doubt)
            yield Step("end the holder's transaction", who, ended, ("consume.holder_terminated",))

    def _idle(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"worker {w}"
        if s.holder != w:
            yield Step("learn that it was revoked", who, _with(s, w, Worker()), ("consume.revoked",))
        if s.losses and me.client == me.expected < END:
            lost = me._replace(client=me.client + 1)
            yield Step("an exception out of the poll", who, _with(s, w, lost)._replace(losses=s.losses - 1))
        if me.client != me.expected and self.guard:
            back = me._replace(client=me.expected)
            yield Step("seek back", who, _with(s, w, back), ("kafka.loss_guarded",))
        else:
            for end in range(me.client + 1, min(me.client + MOST, END) + 1):
                batch = me._replace(phase=FETCHED, start=me.client, end=end, client=end)
                after = s if self.group_last else s._replace(group=end)
                yield Step(f"fetch up to {end}", who, _with(after, w, batch), ("kafka.polled",))
        if s.group != me.expected and self.group_last:
            told = s._replace(group=me.expected)
            yield Step("tell the group", who, told, ("kafka.offsets_committed",))

    def _fetched(self, s: World, w: int) -> Iterator[Step]:
        if s.lock.owner != NOBODY:
            return
        me, who = s.workers[w], f"worker {w}"
        passes = (me.claim == MINE or not self.epoch) and (me.expected == s.position or not self.expected)
        if passes:
            lock = Transaction(w, 0, me.start, me.end, int(me.claim != MINE))
            yield Step("begin, past the fence", who, _with(s._replace(lock=lock), w, me._replace(phase=OPEN)))
        else:
            yield self._fenced(s, w)

    def _fenced(self, s: World, w: int) -> Step:
        return Step("fenced", f"worker {w}", _with(s, w, Worker(WAITING)), ("consume.fenced",))

    def _open(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"worker {w}"
        after = s
        if not self.dead and me.start <= POISON < me.end:
            after = after._replace(dead=after.dead + 1)
        if not self.outbox:
            ran = [o for o in range(me.start, me.end) if o != POISON and not (o == 3 and s.ids)]
            after = after._replace(outbox=(*after.outbox, *ran))
        yield Step("handle", who, _with(after, w, me._replace(phase=HANDLED)), ("consume.handled",))
        again = me._replace(phase=IDLE, client=me.expected, start=0, end=0)
        yield Step("conflict, rolled back", who, _with(s._replace(lock=NO_TRANSACTION), w, again))

    def _handled(self, s: World, w: int) -> Iterator[Step]:
        me = s.workers[w]._replace(phase=SENT)
        sent = _with(s._replace(lock=s.lock._replace(sent=1)), w, me)
        yield Step("send COMMIT", f"worker {w}", sent, ("db.committing",))

    def _moving(self, s: World, w: int) -> Iterator[Step]:
        # Only where the position is not part of the transaction.
        me = s.workers[w]
        moved = me._replace(phase=IDLE, expected=me.end, client=me.end, start=0, end=0)
        yield Step("move the position", f"worker {w}", _with(s._replace(position=me.end), w, moved))

    def _doubt(self, s: World, w: int) -> Iterator[Step]:
        me, who = s.workers[w], f"worker {w}"
        if not self.expected:
            guessed = me._replace(phase=IDLE, client=me.expected)
            yield Step("take it for a failure", who, _with(s, w, guessed))
        elif s.lock.owner == NOBODY and me.claim == MINE:
            renewed = me._replace(phase=IDLE, expected=s.position, client=s.position)
            yield Step("renew the claim", who, _with(s, w, renewed), ("consume.claimed",))
        elif s.lock.owner == NOBODY:
            yield self._fenced(s, w)

    def _waiting(self, s: World, w: int) -> Iterator[Step]:
        if s.holder != w:
            yield Step("learn that it was revoked", f"worker {w}", _with(s, w, Worker()), ("consume.revoked",))
        elif self.again:
            yield Step("claim again", f"worker {w}", _with(s, w, Worker(CLAIMING)))


def _with(s: World, w: int, worker: Worker) -> World:
    return s._replace(workers=(worker, s.workers[1]) if w == 0 else (s.workers[0], worker))


_WORK = {
    OUT: Consume._out,
    CLAIMING: Consume._claiming,
    IDLE: Consume._idle,
    FETCHED: Consume._fetched,
    OPEN: Consume._open,
    HANDLED: Consume._handled,
    SENT: Consume._out,
    MOVING: Consume._moving,
    DOUBT: Consume._doubt,
    WAITING: Consume._waiting,
}
