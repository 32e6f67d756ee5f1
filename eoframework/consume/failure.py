"""What becomes of a message that failed: tried again later, or given up. In the transaction that moves the position on.

failed ─┬─ attempts left ──> parked in its lane ── due ──> runs alone (consume/drain.py)
        └─ given up ───────> dead letter, its id processed; its key goes on, or is held for a person
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from eoframework import clock, events
from eoframework.consume.batch import Delivery, Outcome, Place
from eoframework.consume.calls import Walk
from eoframework.db.attempts import Attempts
from eoframework.db.dead_letters import Dead, DeadLetters
from eoframework.db.parking import Lane, Parking, Waiting
from eoframework.db.position import Stream
from eoframework.db.processed import ProcessedMessages
from eoframework.db.session import Connection
from eoframework.errors import DecodeError, FailClosed, HandlerTimedOut, IdledTooLong, Retryable, TimedOut
from eoframework.external import InFlight
from eoframework.failures import Cause, Parked, cause_of, dead_letter_message, told
from eoframework.handlers import Handler
from eoframework.message import OutboxMessage
from eoframework.retry import GiveUp, Retry, Tally, streaks

log = logging.getLogger(__name__)

Verdict = float | GiveUp
"""Seconds until the next attempt, or why there is none."""

_COUNT_EVERY = 1.0
_ASK_EVERY = 1.0
_SHORTLY = 0.1
_TIMEOUTS = 2


class ParkingFull(Exception):
    """There is no room to set more messages aside: their partition waits until there is."""

    def __init__(self, what: str, at: Place) -> None:
        """`at`: the first message that finds none."""
        super().__init__(what)
        self.at = at


@dataclass(frozen=True, slots=True)
class FailureStores:
    """The tables of messages that failed."""

    parking: Parking
    dead_letters: DeadLetters
    attempts: Attempts
    processed: ProcessedMessages


class Failures:
    """Decides about failing messages by the handler's policy, and writes down what was decided."""

    def __init__(self, handler: Handler, stream: Stream, stores: FailureStores, *, text: bool) -> None:
        """`text`: whether an error's message and traceback may be stored."""
        self._handler = handler
        self._policy = handler.policy
        self._retry = handler.policy.retry or Retry()
        self._stream = stream
        self._stores = stores
        self._text = text
        self._tally = Tally(handler.policy.breaker)
        self._run_unknown = True
        self._run_known_until = 0.0
        self._succeeded_at = -math.inf
        self._room = 0
        self._room_known_until = 0.0
        self._timeouts: dict[Place, int] = {}
        """How often a message has run into a timeout of the database since it last counted as failed."""
        self._news: list[Callable[[], None]] = []
        """What is told once it is committed."""

    # --- deciding ---

    def judge(self, delivery: Delivery, error: Exception) -> Verdict:
        """What to do about this failure of this message."""
        if isinstance(error, InFlight):
            # Somebody else's call for it may still be under way: it waits for that, and nothing has failed.
            return max(error.after or 0.0, _SHORTLY)
        return self._retry.decide(delivery.attempts + 1, error, dice=clock.jitter(0, 1))

    def shuts(self, delivery: Delivery, error: Exception) -> bool:
        """Whether later messages of its lane must wait for it, or for a person."""
        return not isinstance(self.judge(delivery, error), GiveUp) or self._policy.after_dead == "hold"

    def troubled(self, place: Place, trouble: Retryable) -> None:
        """The handler was being called for this message when the database said so."""
        if isinstance(trouble, (TimedOut, IdledTooLong)):
            self._timeouts[place] = self._timeouts.get(place, 0) + 1

    def timed_out(self, place: Place) -> HandlerTimedOut | None:
        """Why a message fails that was rolled back for the same timeout twice.

        Once may be the database's trouble, which is nobody's attempt. Taken for that each time, a statement that never
        ends in time would be run for ever, and everything behind it would wait.
        """
        if self._timeouts.get(place, 0) < _TIMEOUTS:
            return None
        return HandlerTimedOut(
            f"{self._handler.group}: each time it was called for offset {place[1]} of partition {place[0]}, its "
            "transaction ran into statement_timeout or idle_in_transaction_timeout."
        )

    def check_room(self, connection: Connection, behind: Sequence[Delivery]) -> None:
        """Raise ParkingFull before any handler is called, if what has to wait finds no room."""
        if behind:
            self._make_room(connection, behind[0].place, len(behind))

    def shut_lanes(self, connection: Connection, deliveries: Iterable[Delivery]) -> set[Lane]:
        """Lanes of these deliveries in which something waits; they stay so until the transaction ends."""
        return self._stores.parking.shut(connection, self._stream, {delivery.lane for delivery in deliveries})

    # --- writing down, in the transaction that moves the position on ---

    def settle(
        self, connection: Connection, walk: Walk, behind: Sequence[Delivery]
    ) -> tuple[Outcome, list[OutboxMessage]]:
        """Set aside what fell and what waits behind it; returns the counts, and what is to be published about it.

        `behind`: what has to wait for something of an earlier batch. Raises ParkingFull, FailClosed (the breaker).
        """
        verdicts = [(delivery, self.judge(delivery, error_of(delivery))) for delivery in walk.fallen]
        failing = [(delivery, verdict) for delivery, verdict in verdicts if not isinstance(verdict, GiveUp)]
        waiting = [self._waiting(delivery, verdict) for delivery, verdict in failing]
        waiting += [Waiting(Parked(d.lane[1], d.record), d.id) for d in (*behind, *walk.behind)]
        dying = [(delivery, verdict) for delivery, verdict in verdicts if isinstance(verdict, GiveUp)]
        published = self._bury(connection, dying, ran=walk.ran)
        held = [Parked(d.lane[1], d.record) for d, _ in dying if self._policy.after_dead == "hold"]
        # Before what waits behind them: a lane is there before the first message in it.
        self._stores.parking.hold(connection, self._stream, held)
        self._park(connection, waiting)
        # Only what was done keeps its id: what waits must not be a duplicate of itself when its time comes. The ids of
        # `behind` were not recorded; but the same id may have been, for a message of another key.
        recorded = {d.id for d in (*(delivery for delivery, _ in failing), *walk.behind)}
        self._stores.processed.forget(connection, self._stream.consumer_id, {i for i in recorded if i is not None})
        return Outcome(messages=len(walk.ran), parked=len(waiting), dead=len(dying)), published

    def settle_parked(
        self, connection: Connection, parked: Parked, delivery: Delivery, error: Exception
    ) -> tuple[Outcome, list[OutboxMessage]]:
        """A message that was waiting has failed again: it waits on, or is given up; its lane is locked."""
        verdict = self.judge(delivery, error)
        parking = self._stores.parking
        if not isinstance(verdict, GiveUp):
            again = Parked(parked.lane, parked.record, _attempts(delivery, error), delivery.crashes)
            cause = self._cause(error)
            parking.failed(connection, self._stream, again, cause, wait=verdict)
            self._say_waiting(delivery, error, verdict, cause)
            return Outcome(), []
        # A dead letter keeps its id as processed: its producer's duplicates are not run. If one of them was, this is
        # the duplicate, and nothing to give up.
        ids = {delivery.id} if delivery.id is not None else set()
        if ids and not self._stores.processed.claim(connection, self._stream.consumer_id, ids):
            parking.remove(connection, self._stream, parked)
            return Outcome(duplicates=1), []
        # What has succeeded since it first failed came between it and those that died before.
        between = self._succeeded_at > parked.failed_at
        published = self._bury(connection, [(delivery.failed(error), verdict)], ran=[], between=between)
        parking.remove(connection, self._stream, parked, hold=self._policy.after_dead == "hold")
        return Outcome(dead=1), published

    def wait_in_place(self, connection: Connection, delivery: Delivery, error: Exception) -> Verdict:
        """Count an attempt at a message that its partition waits for."""
        attempts, crashes = self._stores.attempts.counts(connection, self._stream, delivery.record)
        verdict = self.judge(delivery.counted(attempts, crashes), error)
        if not isinstance(verdict, GiveUp):
            cause = self._cause(error)
            self._stores.attempts.failed(
                connection,
                self._stream,
                delivery.record,
                cause,
                attempts=_attempts(delivery.counted(attempts, crashes), error),
                crashes=delivery.crashes,
            )
            self._say_waiting(delivery, error, verdict, cause)
        return verdict

    def begin(self) -> None:
        """A unit of work begins: what the last one had to tell and did not commit is forgotten."""
        self._news.clear()

    def done(self, outcome: Outcome) -> None:
        """The unit of work was committed: what the breaker goes by."""
        for tell in self._news:
            tell()
        self._room -= outcome.parked
        self._tally.done(outcome.messages)
        self._tally.died(outcome.dead)
        if outcome.messages:
            self._succeeded_at = clock.monotonic()
            self._run_unknown = self._run_unknown and bool(outcome.dead)

    def end_run(self, connection: Connection, outcome: Outcome) -> None:
        """A success ends a run of dead letters; costs a statement only if there may have been one."""
        now = clock.monotonic()
        if outcome.messages and not outcome.dead and (self._run_unknown or now >= self._run_known_until):
            # Now and then also without a reason of our own: another worker's run ends with our success, too.
            self._run_known_until = now + _ASK_EVERY
            self._stores.dead_letters.set_run(connection, self._stream.consumer_id, 0)

    # --- the steps ---

    def _waiting(self, delivery: Delivery, wait: float) -> Waiting:
        error = error_of(delivery)
        cause = self._cause(error)
        self._say_waiting(delivery, error, wait, cause)
        parked = Parked(delivery.lane[1], delivery.record, _attempts(delivery, error), delivery.crashes)
        return Waiting(parked, delivery.id, wait, cause)

    def _park(self, connection: Connection, waiting: Sequence[Waiting]) -> None:
        if waiting:
            first = min((w.parked.record.partition, w.parked.record.offset) for w in waiting)
            self._make_room(connection, first, len(waiting))
            self._stores.parking.park(connection, self._stream, waiting)

    def _make_room(self, connection: Connection, first: Place, messages: int) -> None:
        now, limit = clock.monotonic(), self._policy.max_parked
        if now >= self._room_known_until or self._room < messages:
            # Counted once a second: every batch would count thousands of rows while a hot key fails.
            self._room = limit - self._stores.parking.count(connection, self._stream.consumer_id, limit=limit)
            self._room_known_until = now + _COUNT_EVERY
        if self._room < messages:
            raise ParkingFull(
                f"{limit} messages of {self._handler.group} are parked (max_parked), none finds room any more", first
            )

    def _bury(
        self,
        connection: Connection,
        dying: Sequence[tuple[Delivery, GiveUp]],
        *,
        ran: Sequence[Delivery],
        between: bool = False,
    ) -> list[OutboxMessage]:
        if not dying:
            return []
        letters, consumer_id = self._stores.dead_letters, self._stream.consumer_id
        dead = {delivery.place for delivery, _ in dying}
        in_order = sorted(dead | {delivery.place for delivery in ran})
        before = letters.run(connection, consumer_id)
        longest, run = streaks(0 if between else before, [place in dead for place in in_order])
        refusal = self._tally.refuses(run=longest, dying=len(dying))
        if refusal is not None:
            raise self._tripped(dying[-1][0], refusal)
        letters.set_run(connection, consumer_id, run)
        self._run_unknown = True  # also if it is in doubt whether this was committed
        return [message for delivery, verdict in dying for message in self._bury_one(connection, delivery, verdict)]

    def _tripped(self, delivery: Delivery, refusal: str) -> FailClosed:
        error = error_of(delivery)
        tripped = FailClosed(
            f"{self._handler.group} at {delivery.record}: {refusal}; it failed with {self._cause(error)}.",
            remedy="None of these was given up, they all run again. Mend the handler or what it needs, and start "
            "again; meanwhile `eo run MODULE:APP --handler NAME` runs the others. If these really are to die, declare "
            "the handler with another breaker=.",
        )
        tripped.__cause__ = error
        return tripped

    def _bury_one(self, connection: Connection, delivery: Delivery, verdict: GiveUp) -> list[OutboxMessage]:
        error = error_of(delivery)
        cause = self._cause(error)
        parked = Parked(delivery.lane[1], delivery.record, _attempts(delivery, error), delivery.crashes)
        holds = self._policy.after_dead == "hold"
        number = self._stores.dead_letters.bury(
            connection, self._stream, Dead(parked, delivery.id, verdict.why, cause, holds)
        )
        self._news.append(partial(self._say_dead, delivery, cause, verdict, number))
        topic = self._handler.dead_letter_topic
        return [] if topic is None else [dead_letter_message(self._handler.group, topic, parked, cause, verdict.why)]

    def _cause(self, error: Exception) -> Cause:
        return cause_of(error, text=self._text)

    def _say_waiting(self, delivery: Delivery, error: Exception, wait: float, cause: Cause) -> None:
        def tell() -> None:
            log.warning(
                "%s: %s failed (attempt %d, %s); rolled back, it is tried again in %.1f s and %s waits behind it",
                *(self._handler.group, delivery.record, delivery.attempts + 1, told(cause), wait),
                "its key" if self._policy.parks else "its partition",
            )
            events.emit("consume.failed", record=delivery.record, error=error)
            self._timeouts.pop(delivery.place, None)

        self._news.append(tell)

    def _say_dead(self, delivery: Delivery, cause: Cause, verdict: GiveUp, number: int) -> None:
        log.error(
            "%s: %s is given up because %s (%s): dead letter %d; %s",
            *(self._handler.group, delivery.record, verdict.why, told(cause), number),
            "its key is held until somebody has decided" if self._policy.after_dead == "hold" else "its key goes on",
            # What a codec says is all in its message, and its own frames tell nothing about the application.
            exc_info=delivery.error if self._text and not isinstance(delivery.error, DecodeError) else None,
        )
        events.emit("consume.dead_lettered", record=delivery.record, id=number)
        self._timeouts.pop(delivery.place, None)


def _attempts(delivery: Delivery, error: Exception) -> int:
    """How often the handler has failed on it by now."""
    return delivery.attempts + (not isinstance(error, InFlight))


def error_of(delivery: Delivery) -> Exception:
    """Why a delivery failed that did."""
    if delivery.error is None:
        raise AssertionError(f"{delivery.record} did not fail")
    return delivery.error
