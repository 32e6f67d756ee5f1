"""Messages of the past through their handler again: the same unit of work, but for the position.

    sift (parked, dead, undecodable, behind a failure) -> first-timers or duplicates -> handler -> outbox rows -> COMMIT

The group goes on living beside it. What keeps an effect from happening twice is the id alone, recorded in the
transaction of the effect: whoever records it second, here or there, finds a duplicate.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from uuid import UUID

from eoframework import clock, events
from eoframework.consume.batch import Delivery, Place
from eoframework.consume.calls import Culprits, HandlerError
from eoframework.consume.unit import Unit
from eoframework.db.faults import passing_trouble
from eoframework.db.parking import Lane, Parking
from eoframework.db.reprocessing import Reprocessing
from eoframework.db.session import Connection
from eoframework.errors import ConfigurationError, FailClosed, LostConnection, Retryable
from eoframework.external import InFlight
from eoframework.failures import Cause, cause_of
from eoframework.lifecycle import Backoff
from eoframework.message import Record, position_id

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failed:
    """A message whose effects were rolled back, or that means nothing to the handler."""

    partition: int
    offset: int
    cause: Cause


@dataclass(slots=True)
class Tally:
    """What has become of the messages so far; every one is counted once."""

    ran: int = 0
    duplicates: int = 0
    parked: int = 0
    """They wait in their key's lane, or it waits: the group runs them."""
    dead: int = 0
    undecodable: int = 0
    behind: int = 0
    """Left out because a message before them failed, of their key or their partition."""
    failed: list[Failed] = field(default_factory=list)
    reached: dict[int, int] = field(default_factory=dict)
    """Partition -> the offset after the last message that was dealt with."""

    def add(self, other: Tally) -> None:
        for name in ("ran", "duplicates", "parked", "dead", "undecodable", "behind"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failed += other.failed
        self.reached.update(other.reached)


class _Fallen(Exception):
    """Some messages failed, and which is known: all is rolled back and runs without them."""

    def __init__(self, fallen: Mapping[Place, Exception]) -> None:
        super().__init__(f"{len(fallen)} messages failed")
        self.fallen = fallen


class Rerun:
    """Runs lists of records of one handler; each is settled when `run` returns, unless it was stopped."""

    def __init__(
        self,
        unit: Unit,
        parking: Parking,
        tables: Reprocessing,
        *,
        repeat_before: datetime | None = None,
        ask_topic: Callable[[], Callable[[], None]],
        stop: threading.Event,
        failure_text: bool,
    ) -> None:
        """repeat_before: effects recorded before this time of the server's are repeated; None: none are.

        ask_topic asks Kafka whether the topic is still the same, what it returns raises if it is not.
        """
        self.tally = Tally()
        self._unit = unit
        self._parking = parking
        self._tables = tables
        self._repeat_before = repeat_before
        self._ask_topic = ask_topic
        self._stop = stop
        self._failure_text = failure_text
        self._failed: dict[Place, Exception] = {}
        self._shut: dict[Lane, int] = {}
        """Lanes, and offsets, after which nothing may run: a message there failed."""
        self._pause = Backoff()

    def run(self, records: Sequence[Record]) -> None:
        """Process the records, in one transaction if nothing is wrong with them.

        On a crash: a transaction's effects, its ids and its messages for the outbox are there together or not at all;
        run again, what was committed is a duplicate. Raises what a person must see.
        """
        waiting: list[tuple[Sequence[Delivery], bool]] = [([self._unit.decode(record) for record in records], False)]
        while waiting and not self._stop.is_set():
            deliveries, wary = waiting.pop(0)
            waiting = [*self._attempt(deliveries, wary=wary), *waiting]

    def _attempt(self, deliveries: Sequence[Delivery], *, wary: bool) -> list[tuple[Sequence[Delivery], bool]]:
        """One transaction; returns what has to run again, and how."""
        unit = self._unit
        if unit.handler.external and len(deliveries) > 1:
            return [([delivery], False) for delivery in deliveries]  # their calls are made before the transaction
        try:
            deliveries = [self._call_outside(delivery) for delivery in deliveries]
            confirm_topic = self._ask_topic()
            with unit.connection.begin(f"{unit.handler.group}: reprocessing") as connection:
                done = self._work(connection, deliveries, confirm_topic, wary=wary)
        except _Fallen as error:
            for place, cause in error.fallen.items():
                self._fail(deliveries, place, cause)
            return [(deliveries, False)]
        except Retryable as trouble:
            return self._again(deliveries, trouble)
        except (ConfigurationError, FailClosed):
            raise
        except Exception as error:  # noqa: BLE001 - whatever came out of the handler or its flush is its message's failure
            return self._search(deliveries, error, wary=wary)
        self._pause.reset()
        self.tally.add(done)
        events.emit("reprocess.committed", messages=done.ran)
        return []

    def _work(
        self, connection: Connection, deliveries: Sequence[Delivery], confirm_topic: Callable[[], None], *, wary: bool
    ) -> Tally:
        done = Tally(reached={d.record.partition: d.record.offset + 1 for d in deliveries})
        ready = self._sift(connection, deliveries, done)
        first = self._first_timers(connection, ready)
        done.duplicates = len(ready) - len(first)
        first = [self._with_stored_results(connection, delivery) for delivery in first]
        walk = self._unit.calls.run(connection, first, shut=set(), wary=wary)
        if walk.fallen:
            raise _Fallen({d.place: d.error or AssertionError(f"{d.record} failed") for d in walk.fallen})
        self._unit.settle_calls(connection, walk.ran)
        self._unit.publish(connection, walk.outbox)
        # As in the real run: asked after the records came, answered before they count.
        confirm_topic()
        done.ran = len(walk.ran)
        events.emit("reprocess.handled", messages=done.ran)
        return done

    # --- calls outside the database ---

    def _call_outside(self, delivery: Delivery) -> Delivery:
        """Make its calls, if it is to run and they were not made before; no transaction is open."""
        if not self._unit.handler.external:
            return delivery
        with self._unit.connection.begin(f"{self._unit.handler.group}: reprocessing") as connection:
            ready = self._sift(connection, [delivery], Tally())
        return self._unit.call_outside(delivery) if ready else delivery

    def _with_stored_results(self, connection: Connection, delivery: Delivery) -> Delivery:
        """Where effects are repeated, what the calls returned the first time: they are not made a second time."""
        if delivery.external is not None or delivery.message is None:
            return delivery
        return replace(delivery, external=self._unit.external.stored(connection, delivery.message))

    # --- who runs ---

    def _sift(self, connection: Connection, deliveries: Sequence[Delivery], done: Tally) -> list[Delivery]:
        """Those that may run; the others are counted."""
        stream = self._unit.stream
        self._refuse_set_back(connection, deliveries)
        # First the lanes, which stay as they are from then on; then who is in one. The other way round a dead letter
        # could be sent back to its lane between the two, and be in neither.
        shut = self._parking.shut(connection, stream, {delivery.lane for delivery in deliveries})
        aside = self._tables.set_aside(connection, stream, [delivery.place for delivery in deliveries])
        ready: list[Delivery] = []
        for delivery in deliveries:
            if delivery.place in aside.dead:
                done.dead += 1
            elif delivery.place in aside.parked or delivery.lane in shut:
                done.parked += 1
            elif (error := self._failed.get(delivery.place) or delivery.error) is not None:
                undecodable = delivery.message is None
                done.undecodable += undecodable
                cause = cause_of(error, text=self._failure_text)
                done.failed.append(Failed(*delivery.place, cause))
            elif self._is_behind(delivery):
                done.behind += 1
            else:
                ready.append(delivery)
        return ready

    def _refuse_set_back(self, connection: Connection, deliveries: Sequence[Delivery]) -> None:
        ends = {delivery.record.partition: delivery.record.offset for delivery in deliveries}
        positions = self._tables.positions(connection, self._unit.stream, ends)
        for partition, last in ends.items():
            if positions.get(partition, 0) <= last:
                raise FailClosed(
                    f"{self._unit.handler.group}: the position in {self._unit.stream.topic}[{partition}] was set back "
                    "meanwhile: the group itself is to process these messages.",
                    remedy="What was committed stays, and counts as done for the group. Choose a range before the "
                    "position.",
                )

    def _is_behind(self, delivery: Delivery) -> bool:
        failed_at = self._shut.get(self._lane(delivery))
        return failed_at is not None and delivery.record.offset > failed_at

    def _lane(self, delivery: Delivery) -> Lane:
        partition, lane = delivery.lane
        return (partition, UUID(int=0)) if self._unit.handler.policy.ordering == "partition" else (partition, lane)

    def _first_timers(self, connection: Connection, ready: Sequence[Delivery]) -> list[Delivery]:
        """The deliveries to run; their ids are recorded now.

        When effects are repeated, a message without an id is recorded by its place: after a COMMIT in doubt the row
        says whether it was repeated.
        """
        unit, before = self._unit, self._repeat_before
        if before is None:
            nameless = next((delivery for delivery in ready if delivery.id is None), None)
            if nameless is not None:
                raise FailClosed(
                    f"{unit.handler.group}: {nameless.record} has no id: whether its effects were made, nobody knows.",
                    remedy="Leave it out of the range, or repeat effects with --forget.",
                )
            return unit.first_timers(connection, ready)
        named = [(self._identity(delivery), delivery) for delivery in ready]
        ids = {identity for identity, _ in named}
        consumer_id = unit.stream.consumer_id
        new = self._tables.repeat(connection, consumer_id, ids, before=before)
        new |= unit.stores.processed.claim(connection, consumer_id, ids - new)
        first: list[Delivery] = []
        for identity, delivery in named:
            if identity in new:
                new.discard(identity)
                first.append(delivery)
        return first

    def _identity(self, delivery: Delivery) -> UUID:
        return delivery.id or position_id(self._unit.stream.topic_id, *delivery.place)

    # --- what failed ---

    def _search(
        self, deliveries: Sequence[Delivery], error: Exception, *, wary: bool
    ) -> list[tuple[Sequence[Delivery], bool]]:
        """All was rolled back: find the culprit, so that only it stays behind."""
        if isinstance(error, Culprits):
            for place, cause in error.errors.items():
                self._fail(deliveries, place, cause)
            return [(deliveries, False)]
        cause = error.error if isinstance(error, HandlerError) else error
        trouble = passing_trouble(cause, self._unit.handler.group)
        if isinstance(cause, InFlight):
            trouble = Retryable(str(cause))
        if trouble is None and self._unit.connection.status() is None:
            trouble = LostConnection(f"{self._unit.handler.group}: the connection to PostgreSQL was lost ({cause}).")
        if trouble is not None:
            return self._again(deliveries, trouble)
        if len(deliveries) == 1:
            self._fail(deliveries, deliveries[0].place, cause)
            return [(deliveries, False)]
        if not wary and not self._unit.handler.batch:
            return [(deliveries, True)]
        half = len(deliveries) // 2
        return [(deliveries[:half], False), (deliveries[half:], False)]

    def _fail(self, deliveries: Sequence[Delivery], place: Place, error: Exception) -> None:
        delivery = next(delivery for delivery in deliveries if delivery.place == place)
        log.warning(
            "%s: %s failed: %s: %s; its effects were rolled back, what follows it in its order is left out",
            self._unit.handler.group,
            delivery.record,
            type(error).__name__,
            error,
        )
        self._failed[place] = error
        lane = self._lane(delivery)
        if self._unit.handler.policy.ordering != "none":
            self._shut[lane] = min(self._shut.get(lane, place[1]), place[1])

    def _again(self, deliveries: Sequence[Delivery], trouble: Retryable) -> list[tuple[Sequence[Delivery], bool]]:
        """The same again, smaller. Also after a COMMIT in doubt: if it happened, all of them are duplicates now."""
        pause = self._pause.next()
        log.warning(
            "%s: %s It runs again in %.1f s; what was committed is a duplicate then",
            self._unit.handler.group,
            trouble,
            pause,
        )
        clock.wait(self._stop, pause)
        half = max(1, len(deliveries) // 2)
        return [(part, False) for part in (deliveries[:half], deliveries[half:]) if part]
