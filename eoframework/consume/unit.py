"""One unit of work: the database transaction that a handler's messages share with everything written about them.

Whether they come fresh from Kafka (executor.py) or have waited in a lane (drain.py), it is made of the same steps, and
what happened is told in one place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from eoframework.cloudevents import incoming_id
from eoframework.consume.batch import Delivery, Outcome
from eoframework.consume.calls import LEAVING, Culprits, HandlerCalls, HandlerError, message_of
from eoframework.consume.external import ExternalCalls
from eoframework.consume.failure import Failures
from eoframework.db.faults import passing_trouble
from eoframework.db.outbox import Outbox
from eoframework.db.position import Claim, Positions, Stream
from eoframework.db.processed import ProcessedMessages
from eoframework.db.session import Connection
from eoframework.db.unit_of_work import WorkerConnection
from eoframework.errors import (
    ConfigurationError,
    DecodeError,
    FailClosed,
    Fenced,
    HandlerMisuse,
    LostConnection,
    Permanent,
    Retryable,
)
from eoframework.failures import words
from eoframework.handlers import Handler
from eoframework.keys import lane_of_key
from eoframework.message import OutboxMessage, Record, position_id

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stores:
    """The tables a batch touches, in the order it touches them."""

    positions: Positions
    processed: ProcessedMessages
    outbox: Outbox


class Fence(Fenced):
    """The position rows of these partitions are no longer ours; carries them out of the rolled-back transaction."""

    def __init__(self, partitions: set[int]) -> None:
        super().__init__(f"partitions {sorted(partitions)} belong to another owner.")
        self.partitions = partitions


@dataclass(frozen=True, slots=True)
class Unit:
    """What all units of work of one handler have in common."""

    handler: Handler
    stream: Stream
    stores: Stores
    connection: WorkerConnection
    calls: HandlerCalls
    failures: Failures
    external: ExternalCalls

    def decode(self, record: Record) -> Delivery:
        """The message, or why there is none: a record that cannot be decoded fails alone, not its batch."""
        try:
            if record.unreadable:
                raise DecodeError(f"{record}: {record.unreadable}.")
            message = self.handler.topic.decode(record)
        except (Exception, *LEAVING) as error:  # noqa: BLE001 - a codec may raise anything; it is this record's failure
            if not isinstance(error, DecodeError):
                error = _decode_error(record, error)
            return self.unread(record).failed(error)
        place = record.partition, record.offset
        return Delivery(
            record, (record.partition, self._lane(record)), message.id, message, error=self.failures.timed_out(place)
        )

    def unread(self, record: Record) -> Delivery:
        """The record as it came, without a look at what it says: a codec may end the process like any handler."""
        return Delivery(record, (record.partition, self._lane(record)), incoming_id(record.headers, topic=record.topic))

    def certain(self, what: str, work: Callable[[Connection], Outcome]) -> Outcome:
        """As `attempt`, for work that calls no handler: an error of it is ours, and is raised."""
        outcome = self.attempt(what, work)
        if isinstance(outcome.error, Permanent):
            raise FailClosed(outcome.error.what, remedy="No message was run. Is the database what it was?")
        if outcome.error is not None:
            raise outcome.error
        return outcome

    def attempt(self, what: str, work: Callable[[Connection], Outcome]) -> Outcome:
        """Do `work` in one transaction; the one place that turns what happened into an outcome."""
        what = f"{self.handler.group}: {what}"
        self.failures.begin()
        try:
            with self.connection.begin(what, opening=False) as connection:
                outcome = work(connection)
        except Fence as fence:
            return Outcome(fenced=fence.partitions)
        except Culprits as culprits:
            return Outcome(error=next(iter(culprits.errors.values())), culprits=culprits.errors)
        except Retryable as trouble:
            return Outcome(trouble=trouble)
        except (ConfigurationError, FailClosed):
            # No message's fault: the schema is gone, the transaction was committed behind our back, the breaker.
            log.error("%s", what)
            raise
        except Exception as error:  # noqa: BLE001 - whatever came out of the handler or its flush is its message's failure
            return self._failed(error)
        self.failures.done(outcome)
        return outcome

    def fence(self, connection: Connection, claims: Iterable[Claim], ends: dict[int, int] | None = None) -> None:
        """Move the positions to `ends`, or nowhere; raises Fence. A zombie must not get as far as an effect.

        Also a position that stays is written: every transaction with effects writes WAL for its row, so a duplicate
        hit is not confirmed before what it relies on is on the standby.
        """
        held = list(claims)
        to = ends if ends is not None else {claim.partition: claim.next_offset for claim in held}
        lost = self.stores.positions.advance(connection, self.stream, held, to)
        if lost:
            raise Fence(lost)

    def first_timers(self, connection: Connection, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """The deliveries to run: ids recorded now for the first time, and messages without an id.

        A message without an id is protected by the position alone: its offset is behind the row once it is committed.
        """
        ids = {delivery.id for delivery in deliveries if delivery.id is not None}
        new = self.stores.processed.claim(connection, self.stream.consumer_id, ids)
        first: list[Delivery] = []
        for delivery in deliveries:
            if delivery.id is None:
                first.append(delivery)
            elif delivery.id in new:
                new.discard(delivery.id)  # the same id again in this batch is a duplicate
                first.append(delivery)
        return first

    def forget(self, connection: Connection, deliveries: Iterable[Delivery]) -> None:
        """Take back the ids that `first_timers` recorded for messages whose turn has not come."""
        ids = {delivery.id for delivery in deliveries if delivery.id is not None}
        self.stores.processed.forget(connection, self.stream.consumer_id, ids)

    def call_outside(self, delivery: Delivery) -> Delivery:
        """Make the handler's calls outside the database, with no transaction open; raises what they raise."""
        if not self.handler.external or delivery.message is None or delivery.error is not None:
            return delivery
        try:
            return replace(delivery, external=self.external.prepare(delivery.message))
        except LEAVING as error:
            raise HandlerMisuse(
                f"{self.handler.group}: an external call raised {type(error).__name__}, which is no Exception.",
                remedy="It counts as unresolved. Raise NotDone, or an error of this message.",
            ) from error

    def settle_calls(self, connection: Connection, ran: Iterable[Delivery]) -> None:
        """The results of outside calls are needed as long as the ids of their messages."""
        if self.handler.external:
            for delivery in ran:
                self.external.settle(connection, message_of(delivery))

    def publish(self, connection: Connection, messages: Sequence[OutboxMessage]) -> None:
        """The outbox rows: the last statement before COMMIT, for the key locks it takes."""
        self.stores.outbox.insert(connection, messages)
        self.connection.check_intact()

    def _lane(self, record: Record) -> UUID:
        if record.key is None or self.handler.policy.ordering == "none":
            return position_id(self.stream.topic_id, record.partition, record.offset)
        return lane_of_key(record.key)

    def _failed(self, error: Exception) -> Outcome:
        """A handler's exception; the database's passing trouble that came through it is no fault of the message."""
        cause = error.error if isinstance(error, HandlerError) else error
        at = error.at if isinstance(error, HandlerError) else None
        trouble = passing_trouble(cause, self.handler.group)
        if trouble is not None and at is not None:
            self.failures.troubled(at, trouble)
        if trouble is None and self.connection.status() is None:
            # Whatever the handler made of it: without its connection it could not have succeeded.
            trouble = LostConnection(f"{self.handler.group}: the connection to PostgreSQL was lost ({words(cause)}).")
        return Outcome(trouble=trouble) if trouble is not None else Outcome(error=cause, at=at)


def _decode_error(record: Record, error: BaseException) -> DecodeError:
    wrapped = DecodeError(f"{record}: {type(error).__name__}: {words(error)}.")
    wrapped.__cause__ = error
    return wrapped
