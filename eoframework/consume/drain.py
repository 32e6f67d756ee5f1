"""The life of a message that was set aside: due, run alone in its turn, done with.

    due lane -> begin -> fence -> lane FOR UPDATE, its first message -> first-timer or duplicate -> handler
             -> the parked row is deleted, the lane opens with the last -> outbox rows -> COMMIT

The deletion of the parked row in the transaction of its effect is its fence and its memory: after a COMMIT in doubt the
row is there or not, and nothing else is asked. The owner of the partition drains, on the thread that runs its batches,
so within a lane nothing overtakes anything.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping

from eoframework import clock, events
from eoframework.consume.batch import Delivery, Outcome, Place
from eoframework.consume.executor import read_or_died
from eoframework.consume.failure import error_of
from eoframework.consume.unit import Unit
from eoframework.db.faults import blameless
from eoframework.db.parking import Lane, Parking
from eoframework.db.position import Claim
from eoframework.db.session import Connection
from eoframework.errors import LostConnection, Retryable
from eoframework.failures import Parked

log = logging.getLogger(__name__)

_LANES = 100
# Messages of one lane before it is another's turn.
_TURN = 20
# A dead letter may be put back at any time.
_LONGEST_LOOK = 1.0
_SHORTEST_LOOK = 0.05
# How long a lane gives way whose message met passing trouble.
_GIVE_WAY = 2.0


class Drain:
    """Runs the parked messages of the partitions that a worker owns."""

    def __init__(self, unit: Unit, parking: Parking) -> None:
        self._unit = unit
        self._parking = parking
        self._next_look = 0.0
        self._lanes: list[Lane] = []
        self._owns: set[int] = set()
        self._in_turn = 0
        self._credit = 0.0
        """Seconds still to be used; below zero when a slow message took more than its share."""
        self._more = False
        """Whether a lane was left for others, with messages in it."""
        self._fearful: set[int] = set()
        """Partitions whose last owner may have died of a parked message: until all that is due has run."""
        self._charges: dict[Place, Parked] = {}
        """Messages already charged by this process with a crash, as they were before."""

    def look_soon(self) -> None:
        """Something was parked, or partitions were claimed."""
        self._next_look = 0.0

    def patience(self) -> float:
        """Seconds until there may be something to do."""
        if self.busy:
            return 0.0
        # Without a partition nothing is looked for: polling without a pause would only turn the processor.
        return max(0.0, self._next_look - clock.monotonic()) if self._owns else math.inf

    @property
    def busy(self) -> bool:
        """Whether due messages were left over."""
        return bool(self._lanes) or self._more

    def run(self, claims: Mapping[int, Claim], unclean: Collection[int], *, seconds: float) -> Outcome:
        """Run due messages of these partitions for about so long; nothing of a position moves.

        `unclean`: partitions that their last owner did not release.
        """
        new = claims.keys() - self._owns
        if new:
            self._next_look = 0.0  # what waits in a partition just claimed was not seen yet
        self._owns = set(claims)
        self._fearful = (self._fearful | (new & set(unclean))) & claims.keys()
        total = self._look(claims)
        self._credit += seconds
        started = clock.monotonic()
        while self._lanes and total.trouble is None and clock.monotonic() - started < self._credit:
            lane = self._lanes[0]
            claim = claims.get(lane[0])
            outcome = self._one(lane, claim) if claim is not None and not total.stops(lane[0]) else None
            total.add(outcome or Outcome())
            if outcome is not None and outcome.trouble is not None and claim is not None:
                total.add(self._give_way(lane, claim, outcome.trouble))
            self._next_turn(done=outcome is None)
            total.add(self._look(claims))
        # What one slow message took too much is paid back by the next steps; what was not used is not kept.
        self._credit = min(0.0, self._credit - (clock.monotonic() - started))
        return total

    def _give_way(self, lane: Lane, claim: Claim, trouble: Retryable) -> Outcome:
        """A lane whose message meets passing trouble again and again would always be the first that is due."""
        if isinstance(trouble, LostConnection):
            return Outcome()  # the claims are renewed first

        def postpone(connection: Connection) -> Outcome:
            self._unit.fence(connection, [claim])
            self._parking.postpone(connection, self._unit.stream, lane, _GIVE_WAY)
            return Outcome()

        return self._unit.certain("a lane gives way", postpone)

    def _next_turn(self, *, done: bool) -> None:
        """A lane that is fed as fast as it is drained must not keep the others from their turn for ever."""
        self._in_turn += 1
        if done or self._in_turn >= _TURN:
            self._lanes.pop(0)
            self._in_turn = 0
            self._more = self._more or not done

    def _look(self, claims: Mapping[int, Claim]) -> Outcome:
        now = clock.monotonic()
        if self._lanes or not claims or (now < self._next_look and not self._more):
            self._more = self._more and bool(claims)
            return Outcome()

        def look(connection: Connection) -> Outcome:
            stream = self._unit.stream
            self._lanes = self._parking.due(connection, stream, claims.keys(), limit=_LANES)
            next_due = self._parking.next_due(connection, stream, claims.keys())
            wait = _LONGEST_LOOK if next_due is None else min(_LONGEST_LOOK, max(_SHORTEST_LOOK, next_due))
            self._next_look = now + wait
            return Outcome()

        outcome = self._unit.certain("look for due messages", look)
        self._more = False
        if not self._lanes and outcome.trouble is None:
            self._fearful.clear()
        return outcome

    # --- one message ---

    def _one(self, lane: Lane, claim: Claim) -> Outcome | None:
        """Run the lane's first message; None when there is none that is due."""
        if lane[0] in self._fearful:
            outcome = self._charge(lane, claim)
            if outcome.trouble is not None or outcome.fenced:
                return outcome
        if self._unit.handler.external:
            return self._called(lane, claim)
        return self._run(lane, claim, self._delivery)

    def _run(self, lane: Lane, claim: Claim, deliver: Callable[[Parked], Delivery | None]) -> Outcome | None:
        found: list[tuple[Parked, Delivery]] = []

        def work(connection: Connection) -> Outcome:
            with blameless(self._unit.handler.group):
                self._unit.fence(connection, [claim])
                parked = self._parking.head(connection, self._unit.stream, lane)
            delivery = deliver(parked) if parked is not None else None
            if parked is None or delivery is None:
                return Outcome()
            found.append((parked, delivery))
            return self._work(connection, parked, delivery)

        outcome = self._unit.attempt(f"parked message of {self._unit.stream.topic}[{lane[0]}]", work)
        if outcome.trouble is not None or outcome.fenced:
            if found and outcome.trouble is not None:
                self._unit.failures.troubled(found[0][1].place, outcome.trouble)
            return outcome
        if not found:
            return None
        parked, delivery = found[0]
        if outcome.error is not None:
            outcome = self._failed_again(claim, parked, delivery, outcome.error)
        elif outcome.messages or outcome.duplicates:
            log.info("%s: %s, which had waited, is done with", self._unit.handler.group, parked.record)
            events.emit("consume.unparked", record=parked.record)
        if outcome.trouble is None:
            self._charges.pop(delivery.place, None)
        return outcome

    def _called(self, lane: Lane, claim: Claim) -> Outcome | None:
        """The handler's calls outside the database come first: no transaction is open while they last."""
        heads: list[Parked] = []

        def look(connection: Connection) -> Outcome:
            self._unit.fence(connection, [claim])
            parked = self._parking.head(connection, self._unit.stream, lane)
            heads.extend([parked] if parked is not None else [])
            return Outcome()

        outcome = self._unit.certain("a parked message is about to be called for", look)
        if outcome.trouble is not None or outcome.fenced or not heads:
            return outcome if heads or outcome.trouble is not None or outcome.fenced else None
        head, delivery = heads[0], self._delivery(heads[0])
        try:
            called = self._unit.call_outside(delivery)
        except Retryable as trouble:
            return Outcome(trouble=trouble)
        except Exception as error:  # noqa: BLE001 - whatever the call raised is its message's failure
            return self._failed_again(claim, head, delivery, error)
        # Nothing is locked while the call lasts: what stands first by now may be another message.
        return self._run(lane, claim, lambda parked: called if parked.record.offset == head.record.offset else None)

    def _delivery(self, parked: Parked) -> Delivery:
        place = parked.record.partition, parked.record.offset
        crashes = self._charges.get(place, parked).crashes
        if parked.crashes != crashes + 1:
            # Not as we charged it: it was settled by a COMMIT in doubt, and put back since.
            crashes = parked.crashes
        return read_or_died(self._unit, parked.record, parked.attempts, crashes)

    def _work(self, connection: Connection, parked: Parked, delivery: Delivery) -> Outcome:
        unit = self._unit
        events.emit("consume.due", record=parked.record)
        if delivery.error is not None:
            return self._settle(connection, parked, delivery, delivery.error)
        with blameless(unit.handler.group):
            first = unit.first_timers(connection, [delivery])
        # In a savepoint: a failure is booked in the same transaction.
        walk = unit.calls.run(connection, first, shut=set(), wary=True)
        if walk.fallen:
            unit.forget(connection, walk.fallen)
            return self._settle(connection, parked, delivery, error_of(walk.fallen[0]))
        self._parking.remove(connection, unit.stream, parked)
        outcome = Outcome(messages=len(walk.ran), duplicates=1 - len(first))
        unit.failures.end_run(connection, outcome)
        unit.settle_calls(connection, walk.ran)
        unit.publish(connection, walk.outbox)
        return outcome

    def _settle(self, connection: Connection, parked: Parked, delivery: Delivery, error: Exception) -> Outcome:
        outcome, letters = self._unit.failures.settle_parked(connection, parked, delivery, error)
        self._unit.publish(connection, letters)
        events.emit("consume.settled", parked=1 - outcome.dead, dead=outcome.dead)
        return outcome

    def _failed_again(self, claim: Claim, parked: Parked, delivery: Delivery, error: Exception) -> Outcome:
        """It was rolled back. Its lane was unlocked meanwhile: what stands first in it now may be another."""

        def settle(connection: Connection) -> Outcome:
            self._unit.fence(connection, [claim])
            head = self._parking.head(connection, self._unit.stream, (claim.partition, parked.lane))
            if head is None or head.record.offset != parked.record.offset:
                return Outcome()
            return self._settle(connection, head, delivery, error)

        return self._unit.certain(f"{parked.record} failed again", settle)

    def _charge(self, lane: Lane, claim: Claim) -> Outcome:
        """Count the attempt before it is made: see Executor._singly."""

        charged: list[Parked] = []

        def charge(connection: Connection) -> Outcome:
            self._unit.fence(connection, [claim])
            parked = self._parking.head(connection, self._unit.stream, lane)
            if parked is not None:
                place = parked.record.partition, parked.record.offset
                if place not in self._charges or self._charges[place].crashes != parked.crashes - 1:
                    self._parking.charge(connection, self._unit.stream, parked, parked.crashes + 1)
                    self._charges[place] = parked
                    charged.append(parked)
            return Outcome()

        outcome = self._unit.certain("a parked message may have ended a process", charge)
        if charged and outcome.trouble is None and not outcome.fenced:
            events.emit("consume.charged", record=charged[0].record)
        return outcome

    def take_back(self, connection: Connection, partitions: Collection[int]) -> None:
        """See Charging."""
        for place, parked in self._charges.items():
            if place[0] in partitions:
                self._parking.take_back(connection, self._unit.stream, parked)

    def forget(self, partitions: Collection[int]) -> None:
        """See Charging."""
        self._charges = {place: before for place, before in self._charges.items() if place[0] not in partitions}
