"""The life of one message, from the record that Kafka handed out to the COMMIT that makes it count.

    decode -> begin -> fence: move the position on -> who waits in a lane -> first-timers or duplicates -> handler
           -> set aside what failed -> outbox rows -> COMMIT

Everything between `begin` and COMMIT is one database transaction, so a crash anywhere leaves either all of it or
nothing, and the position row says which. Nothing here decides by an exception what happened: an unconfirmed COMMIT is
reported as trouble, and the worker reads the row (consume/worker.py).

What was set aside runs later, one message at a time: consume/drain.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from eoframework import clock, events
from eoframework.consume.batch import Batch, Delivery, Failure, Outcome, Place, split_undecodable
from eoframework.consume.failure import ParkingFull, Verdict
from eoframework.consume.unit import Unit
from eoframework.db.attempts import Attempts
from eoframework.db.faults import blameless
from eoframework.db.parking import Lane
from eoframework.db.position import Claim
from eoframework.db.session import Connection
from eoframework.errors import ProcessDied, Retryable
from eoframework.external import InFlight
from eoframework.message import Record
from eoframework.retry import GiveUp, Retry

log = logging.getLogger(__name__)

# After a failure, savepoints for so many batches: what failed now and then goes on failing now and then.
_WARY_BATCHES = 50
_FULL_PAUSE = 1.0


class Executor:
    """Runs batches of one handler."""

    def __init__(
        self,
        unit: Unit,
        attempts: Attempts,
        *,
        budget: float,
        stopping: Callable[[], bool] = lambda: False,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """`before_commit` raises if the batch may not count after all: its records may be another topic's."""
        self._unit = unit
        self._policy = unit.handler.policy
        self._attempts = attempts
        self._budget = budget
        self._stopping = stopping
        self._before_commit = before_commit
        self._deadline = 0.0
        self._wary = 0
        self._charges: dict[Place, tuple[int, int]] = {}
        """Messages already charged by this process with a crash, and their counts before."""
        self._tidied: dict[int, int] = {}
        """Partitions, and the epoch in which nothing is left there of the last owner's charges."""

    # --- 1. decode ---

    def execute(self, records: Sequence[Record], claims: dict[int, Claim], careful: Collection[int] = ()) -> Outcome:
        """Process the records; what the outcome does not list as moved has left no trace.

        A record that cannot be decoded, or whose handler raises, fails alone: everything before it and every other
        partition is committed all the same. `careful`: partitions whose last owner died, so one of these messages may
        have killed it.
        """
        self._deadline = clock.monotonic() + self._budget
        if self._policy.retry is None:
            return self._up_to_the_undecodable(records, claims)
        if careful or self._unit.handler.external:
            return self._singly(records, claims, careful)
        return self._process(Batch([self._unit.decode(record) for record in records], claims))

    def _up_to_the_undecodable(self, records: Sequence[Record], claims: dict[int, Claim]) -> Outcome:
        runnable, undecodable = split_undecodable(self._unit.decode(record) for record in records)
        batch = Batch(runnable, claims)
        if self._unit.handler.external:
            outcome = self._singly([delivery.record for delivery in runnable], claims, ())
        else:
            outcome = self._process(batch)
        if outcome.trouble is None:
            # Only once nothing before it is left: until then its partition has other work to do.
            reached = {p: f for p, f in undecodable.items() if outcome.moved.get(p) == batch.ends.get(p)}
            outcome.failed.update(reached)
        return outcome

    # --- 2. one batch, in as few transactions as its failures allow ---

    def _process(self, batch: Batch) -> Outcome:
        """Run it together. What fails is rolled back and run again in smaller parts, until the culprit is alone."""
        total = Outcome()
        parts: list[Sequence[Delivery]] = [batch.deliveries]
        while parts and total.trouble is None:
            part = [delivery for delivery in parts.pop(0) if not total.stops(delivery.record.partition)]
            if not part:
                continue
            if self._out_of_time():
                if total.moved or total.failed:
                    break
                part, parts = part[:1], []  # or a batch that fails for longer than its time would never get on
            outcome = self._stopped_at(part) or self._run(batch.only(part, total.moved))
            if outcome.error is not None:
                smaller = self._smaller(part, outcome)
                if smaller:
                    parts[:0] = smaller
                    continue
                outcome = self._fell(batch.only(part, total.moved), outcome.error)
            total.add(outcome)
            if outcome.cut:
                break
        return total

    def _run(self, batch: Batch) -> Outcome:
        outcome = self._unit.attempt(f"batch ({batch})", lambda connection: self._work(connection, batch))
        if outcome.error is None and self._wary:
            self._wary -= 1
        if outcome.trouble is not None and len(batch.deliveries) == 1:
            self._unit.failures.troubled(batch.deliveries[0].place, outcome.trouble)
        self._tidied.update({partition: batch.claims[partition].epoch for partition in outcome.moved})
        return outcome

    def _work(self, connection: Connection, batch: Batch) -> Outcome:
        """Everything that is committed together. The fence comes first: a zombie must not get as far as an effect."""
        unit = self._unit
        with blameless(unit.handler.group):
            unit.fence(connection, batch.claims.values(), batch.ends)
            shut = unit.failures.shut_lanes(connection, batch.deliveries)
            unit.failures.check_room(connection, [d for d in batch.deliveries if d.lane in shut])
            first = unit.first_timers(connection, [d for d in batch.deliveries if d.lane not in shut])
            if self._policy.ordering == "partition":
                first = self._counted(connection, first)
        walk = unit.calls.run(connection, first, shut=shut, wary=self._wary > 0, out_of_time=self._out_of_time)
        done = self._cut(connection, batch, walk.left)
        behind = [delivery for delivery in done.deliveries if delivery.lane in shut]
        outcome, letters = unit.failures.settle(connection, walk, behind)
        unit.failures.end_run(connection, outcome)
        unit.settle_calls(connection, walk.ran)
        self._forget_attempts(connection, done)
        # Asked after the records came and answered before they count. The client reads a re-created topic on from the
        # old offset, under KIP-848 too, until a heartbeat tells it: what is booked by then would be booked again when
        # the new topic is processed from its beginning.
        self._before_commit()
        unit.publish(connection, [*walk.outbox, *letters])
        events.emit("consume.handled", handler=unit.handler.name, messages=outcome.messages)
        if outcome.parked or outcome.dead:
            events.emit("consume.settled", parked=outcome.parked, dead=outcome.dead)
        duplicates = len(done.deliveries) - len(first) + len(walk.left) - len(behind)
        return replace(outcome, moved=done.ends, cut=bool(walk.left), duplicates=duplicates)

    def _cut(self, connection: Connection, batch: Batch, left: Sequence[Delivery]) -> Batch:
        """If time ran out inside the batch: take back the positions and ids of what was not run, keep the rest."""
        if not left:
            return batch
        stores, stream = self._unit.stores, self._unit.stream
        at = next(i for i, delivery in enumerate(batch.deliveries) if delivery.place == left[0].place)
        done = Batch(batch.deliveries[:at], batch.claims)
        ends = {p: done.ends.get(p, claim.next_offset) for p, claim in batch.claims.items()}
        stores.positions.cut(connection, stream, ends)
        unrun = {delivery.id for delivery in left if delivery.id is not None}
        stores.processed.forget(connection, stream.consumer_id, unrun)
        return done

    def _out_of_time(self) -> bool:
        return clock.monotonic() > self._deadline or self._stopping()

    # --- 3. what fails ---

    def _smaller(self, part: Sequence[Delivery], outcome: Outcome) -> list[Sequence[Delivery]]:
        """How to run a part again that was rolled back; empty when its only message is the culprit."""
        group, culprits = self._unit.handler.group, outcome.culprits
        named = [d for d in part if d.place in culprits]
        if named and self._policy.parks:
            return [[d.failed(culprits[d.place]) if d.place in culprits else d for d in part]]
        if len(part) == 1:
            return []
        if named:
            first = part.index(named[0])
            return [part[:first], [named[0].failed(culprits[named[0].place])], part[first + 1 :]]
        if self._policy.parks and not isinstance(outcome.error, ParkingFull):
            self._wary = _WARY_BATCHES
        suspect = outcome.error.at if isinstance(outcome.error, ParkingFull) else outcome.at
        at = next((place for place, delivery in enumerate(part) if delivery.place == suspect), None)
        if at is not None:
            log.info("%s: %s failed and took %d others along; it runs alone", group, part[at].record, len(part) - 1)
            return [part[:at], [part[at]], part[at + 1 :]]
        log.info("%s: %d messages failed together and were rolled back; they run again in halves", group, len(part))
        middle = len(part) // 2
        return [part[:middle], part[middle:]]

    def _stopped_at(self, part: Sequence[Delivery]) -> Outcome | None:
        """A message that the handler has named, and that nothing may get past: there is nothing to run."""
        named = part[0].error if len(part) == 1 and not self._policy.parks else None
        return Outcome(error=named) if named is not None else None

    def _fell(self, batch: Batch, error: Exception) -> Outcome:
        """A message that failed alone: set aside, given up, waited for in its place, or left for a person."""
        delivery = batch.deliveries[0]
        if isinstance(error, ParkingFull):
            return _stop(delivery, error, retry_in=_FULL_PAUSE)
        if self._policy.retry is None:
            # Another worker's lease is no failure, and ends by itself.
            return _stop(delivery, error, max(error.after or 0.0, 0.1) if isinstance(error, InFlight) else None)
        return self._set_aside(batch, delivery, error) if self._policy.parks else self._wait(batch, delivery, error)

    def _set_aside(self, batch: Batch, delivery: Delivery, error: Exception) -> Outcome:
        """The position moves past it, in the transaction that parks it or makes it a dead letter."""
        outcome = self._run(batch.only([delivery.failed(error)], {}))
        if outcome.error is None:
            return outcome
        return _stop(delivery, outcome.error, _FULL_PAUSE if isinstance(outcome.error, ParkingFull) else None)

    def _wait(self, batch: Batch, delivery: Delivery, error: Exception) -> Outcome:
        """Its partition waits for it: count the attempt, and say when the next one is."""
        verdicts: list[Verdict] = []

        def count(connection: Connection) -> Outcome:
            self._unit.fence(connection, batch.claims.values())
            verdicts.append(self._unit.failures.wait_in_place(connection, delivery, error))
            return Outcome()

        outcome = self._unit.certain(f"{delivery.record} failed", count)
        if not verdicts or outcome.trouble is not None:
            return outcome
        self._charges.pop(delivery.place, None)
        if isinstance(verdicts[0], GiveUp):
            return self._set_aside(batch, delivery, error)
        return _stop(delivery, error, retry_in=verdicts[0])

    # --- 4. one by one: after a crash, and for handlers that call outside ---

    def _singly(self, records: Sequence[Record], claims: dict[int, Claim], careful: Collection[int]) -> Outcome:
        """One message a transaction; after a crash each attempt is counted before it is made.

        A handler or a codec that ends its process (os._exit, a segfault) leaves no exception behind, only this count.
        It charges nobody but the message in flight: in a batch, the innocent ones would be charged along.
        """
        total, every = Outcome(), Batch((), claims)
        for record in records:
            if total.trouble is not None or ((total.moved or total.failed) and self._out_of_time()):
                break
            if total.stops(record.partition):
                continue
            fearful = record.partition in careful
            delivery = self._unit.unread(record) if fearful else self._unit.decode(record)
            one = every.only([delivery], total.moved)
            total.add(self._charged(one) if fearful else self._called(one))
        return total

    def _called(self, batch: Batch) -> Outcome:
        """The handler's calls outside the database come first: no transaction is open while they last."""
        delivery = batch.deliveries[0]
        if not self._unit.handler.external or delivery.error is not None:
            return self._process(batch)
        shut: set[Lane] = set()

        def look(connection: Connection) -> Outcome:
            self._unit.fence(connection, batch.claims.values())
            shut.update(self._unit.failures.shut_lanes(connection, [delivery]))
            return Outcome()

        outcome = self._unit.certain(f"{delivery.record} is about to be called for", look)
        if outcome.trouble is not None or outcome.fenced or shut:
            return outcome if not shut else self._process(batch)
        try:
            called = self._unit.call_outside(delivery)
        except Retryable as trouble:
            return Outcome(trouble=trouble)
        except Exception as error:  # noqa: BLE001 - whatever the call raised is its message's failure
            return self._fell(batch, error)
        return self._process(batch.only([called], {}))

    def _charged(self, batch: Batch) -> Outcome:
        delivery = batch.deliveries[0]
        outcome = self._charge(batch, delivery) if delivery.place not in self._charges else Outcome()
        if outcome.trouble is not None or outcome.fenced:
            return outcome
        delivery = read_or_died(self._unit, delivery.record, *self._charges[delivery.place])
        outcome = self._called(batch.only([delivery], {}))
        if outcome.moved:
            # Otherwise the same attempt goes on: this process lives, and a conflict is nobody's crash, nor is it when
            # there is no room to set the message aside.
            self._charges.pop(delivery.place, None)
        return outcome

    def _charge(self, batch: Batch, delivery: Delivery) -> Outcome:
        def charge(connection: Connection) -> Outcome:
            self._unit.fence(connection, batch.claims.values())
            attempts, crashes = self._attempts.charge(connection, self._unit.stream, delivery.record)
            self._charges[delivery.place] = attempts, crashes - 1
            return Outcome()

        outcome = self._unit.certain(f"{delivery.record} may have ended a process", charge)
        events.emit("consume.charged", record=delivery.record)
        return outcome

    def take_back(self, connection: Connection, partitions: Collection[int]) -> None:
        """See Charging."""
        for place, (_, crashes) in self._charges.items():
            if place[0] in partitions:
                self._attempts.take_back(connection, self._unit.stream, place, crashes)

    def forget(self, partitions: Collection[int]) -> None:
        """See Charging."""
        self._charges = {place: before for place, before in self._charges.items() if place[0] not in partitions}

    def _counted(self, connection: Connection, first: list[Delivery]) -> list[Delivery]:
        """With what is known of earlier attempts: they were made in this place, so at the first of a partition."""
        counted: list[Delivery] = []
        seen: set[int] = set()
        for delivery in first:
            if delivery.record.partition not in seen and not delivery.attempts:
                attempts, _ = self._attempts.counts(connection, self._unit.stream, delivery.record)
                # The crash that is counted before an attempt is not known to be one.
                delivery = delivery.counted(attempts, delivery.crashes)  # noqa: PLW2901
            seen.add(delivery.record.partition)
            counted.append(delivery)
        return counted

    def _forget_attempts(self, connection: Connection, done: Batch) -> None:
        # What the last owner had charged when it died stands at the first offset that we process.
        inherited = any(c.marked and self._tidied.get(p) != c.epoch for p, c in done.claims.items())
        if self._policy.ordering == "partition" or self._charges or inherited:
            self._attempts.clear(connection, self._unit.stream, [delivery.record for delivery in done.deliveries])


def read_or_died(unit: Unit, record: Record, attempts: int, crashes: int) -> Delivery:
    """The message with what is known of earlier attempts; not even decoded if its process died of it too often."""
    if crashes < (unit.handler.policy.retry or Retry()).crashes:
        return unit.decode(record).counted(attempts, crashes)
    died = ProcessDied(f"{record} was in flight {crashes} times when its process died.")
    return unit.unread(record).failed(died).counted(attempts, crashes)


def _stop(delivery: Delivery, error: Exception, retry_in: float | None = None) -> Outcome:
    return Outcome(failed={delivery.record.partition: Failure(delivery.record, error, retry_in)})
