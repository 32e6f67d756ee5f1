"""The life of one message, from the record that Kafka handed out to the COMMIT that makes it count.

    decode -> begin -> fence: move the position on -> first-timers or duplicates -> handler -> outbox rows -> COMMIT

Everything between `begin` and COMMIT is one database transaction, so a crash anywhere leaves either all of it or
nothing, and the position row says which. Nothing here decides by an exception what happened: an unconfirmed COMMIT is
reported as trouble, and the worker reads the row (consume/worker.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from eoframework import clock, events
from eoframework.consume.batch import Batch, Delivery, Failure, Outcome, split_undecodable
from eoframework.db.faults import passing_trouble
from eoframework.db.outbox import Outbox
from eoframework.db.position import Claim, Positions, Stream
from eoframework.db.processed import ProcessedMessages
from eoframework.db.session import Connection, SessionFactory
from eoframework.db.unit_of_work import WorkerConnection, handler_session
from eoframework.errors import ConfigurationError, DecodeError, FailClosed, Fenced, LostConnection, Retryable
from eoframework.handlers import Handler
from eoframework.message import Message, Record, Source
from eoframework.tx import Tx

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


class HandlerError(Exception):
    """What a handler raised, wrapped so that it is not taken for an error of ours."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Executor:
    """Runs batches of one handler."""

    def __init__(
        self,
        handler: Handler,
        stream: Stream,
        stores: Stores,
        connection: WorkerConnection,
        session_factory: SessionFactory,
        *,
        app_name: str,
        budget: float,
        stopping: Callable[[], bool] = lambda: False,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """`before_commit` raises if the batch may not count after all: its records may be another topic's."""
        self._handler = handler
        self._stream = stream
        self._stores = stores
        self._connection = connection
        self._session_factory = session_factory
        self._app_name = app_name
        self._budget = budget
        self._stopping = stopping
        self._before_commit = before_commit

    # --- 1. decode ---

    def execute(self, records: Sequence[Record], claims: dict[int, Claim]) -> Outcome:
        """Process the records; what the outcome does not list as moved has left no trace.

        A record that cannot be decoded, or whose handler raises, fails alone: everything before it and every other
        partition is committed all the same.
        """
        deadline = clock.monotonic() + self._budget
        runnable, undecodable = split_undecodable(self._decode(record) for record in records)
        batch = Batch(runnable, claims).only(runnable, {})
        outcome = self._run(batch, deadline) if runnable else Outcome()
        if outcome.failed and len(runnable) > 1:
            outcome = self._one_by_one(batch, deadline)
        if outcome.trouble is None:
            ends = batch.ends
            # Only once nothing before it is left: until then its partition has other work to do.
            reached = {p: failure for p, failure in undecodable.items() if outcome.moved.get(p) == ends.get(p)}
            outcome.failed.update(reached)
        return outcome

    def _decode(self, record: Record) -> Delivery:
        try:
            if record.unreadable:
                raise DecodeError(f"{record}: {record.unreadable}.")
            return Delivery(record, self._handler.topic.decode(record))
        except Exception as error:  # noqa: BLE001 - a codec may raise anything; it is this record's failure alone
            return Delivery(record, None, error)

    # --- 2. one transaction ---

    def _run(self, batch: Batch, deadline: float) -> Outcome:
        """One batch in one transaction; the one place that turns what happened into an outcome."""
        try:
            with self._connection.begin(f"{self._handler.group}: batch", opening=False) as connection:
                outcome = self._unit(connection, batch, deadline)
        except Fence as fence:
            return Outcome(fenced=fence.partitions)
        except Retryable as trouble:
            return Outcome(trouble=trouble)
        except (ConfigurationError, FailClosed):
            # No message's fault: the schema is gone, or the transaction was committed behind our back.
            log.error("%s: it happened with %s", self._handler.group, batch)
            raise
        except Exception as error:  # noqa: BLE001 - whatever came out of the handler or its flush is its message's failure
            return self._failed(batch, error)
        return outcome

    def _unit(self, connection: Connection, batch: Batch, deadline: float) -> Outcome:
        """Everything that is committed together. The fence comes first: a zombie must not get as far as an effect."""
        lost = self._stores.positions.advance(connection, self._stream, batch.claims.values(), batch.ends)
        if lost:
            raise Fence(lost)
        first = self._first_timers(connection, batch)
        tx, handled = self._handle(connection, first, deadline)
        done = self._cut(connection, batch, first, handled)
        self._stores.outbox.insert(connection, tx.take_outbox())
        # Asked after the records came and answered before they count. The client reads a re-created topic on from the
        # old offset, under KIP-848 too, until a heartbeat tells it: what is booked by then would be booked again when
        # the new topic is processed from its beginning.
        self._before_commit()
        self._connection.check_intact()
        events.emit("consume.handled", handler=self._handler.name, messages=handled)
        return Outcome(moved=done.ends, messages=handled, duplicates=len(done.deliveries) - handled)

    def _first_timers(self, connection: Connection, batch: Batch) -> list[Delivery]:
        """The deliveries to run: ids recorded now for the first time, and messages without an id.

        A message without an id is protected by the position alone: its offset is behind the row once it is committed.
        """
        ids = {d.message.id for d in batch.deliveries if d.message is not None and d.message.id is not None}
        new = self._stores.processed.claim(connection, self._stream.consumer_id, ids)
        first: list[Delivery] = []
        for delivery in batch.deliveries:
            identity = _message(delivery).id
            if identity is None:
                first.append(delivery)
            elif identity in new:
                new.discard(identity)  # the same id again in this batch is a duplicate
                first.append(delivery)
        return first

    # --- 3. the handler ---

    def _handle(self, connection: Connection, first: Sequence[Delivery], deadline: float) -> tuple[Tx, int]:
        """Call the handler for each first-timer, in order, in one session; returns how many were run."""
        factory, name = self._session_factory, self._handler.group
        with handler_session(factory, connection, handler=name) as session:
            tx = Tx(session, app_name=self._app_name, consumer=name)
            handled = self._call_batch(tx, first) if self._handler.batch else self._call_each(tx, first, deadline)
        return tx, handled

    def _call_each(self, tx: Tx, first: Sequence[Delivery], deadline: float) -> int:
        for count, delivery in enumerate(first):
            if count and (clock.monotonic() > deadline or self._stopping()):
                return count
            message = _message(delivery)
            tx.enter(message, self._source(message, delivery.record))
            self._call(partial(self._handler.call, message, tx))
        return len(first)

    def _call_batch(self, tx: Tx, first: Sequence[Delivery]) -> int:
        if first:
            messages = [_message(delivery) for delivery in first]
            tx.enter_batch(self._source(m, d.record) for m, d in zip(messages, first, strict=True))
            self._call(lambda: self._handler.call_batch(messages, tx))
        return len(first)

    def _call(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            raise HandlerError(error) from error
        self._connection.check_intact()

    def _source(self, message: Message[object], record: Record) -> Source:
        return Source(self._handler.group, self._stream.topic_id, message.partition, message.offset, record.timestamp)

    def _cut(self, connection: Connection, batch: Batch, first: Sequence[Delivery], handled: int) -> Batch:
        """If time ran out inside the batch: take back the positions and ids of what was not run, keep the rest."""
        if handled == len(first):
            return batch
        cut_at = batch.deliveries.index(first[handled])
        kept = batch.deliveries[:cut_at]
        done = Batch(kept, batch.claims)
        ends = {p: done.ends.get(p, claim.next_offset) for p, claim in batch.claims.items()}
        self._stores.positions.cut(connection, self._stream, ends)
        unrun = {identity for d in first[handled:] if (identity := _message(d).id) is not None}
        self._stores.processed.forget(connection, self._stream.consumer_id, unrun)
        return done

    # --- 4. failure ---

    def _failed(self, batch: Batch, error: Exception) -> Outcome:
        """A handler's exception; the database's passing trouble that came through it is no fault of the message."""
        cause = error.error if isinstance(error, HandlerError) else error
        trouble = passing_trouble(cause, self._handler.group)
        if trouble is None and self._connection.status() is None:
            # Whatever the handler made of it: without its connection it could not have succeeded.
            trouble = LostConnection(f"{self._handler.group}: the connection to PostgreSQL was lost ({cause}).")
        if trouble is not None:
            return Outcome(trouble=trouble)
        first = batch.deliveries[0].record
        return Outcome(failed={first.partition: Failure(first, cause)})

    def _one_by_one(self, batch: Batch, deadline: float) -> Outcome:
        """Run a failed batch again, a transaction for each message, so that only the culprit stays behind.

        Only its own partition stops: what lies behind it there may not overtake it.
        """
        log.info(
            "%s: a batch of %d failed and was rolled back; its messages run one by one",
            self._handler.group,
            len(batch.deliveries),
        )
        total = Outcome()
        for delivery in batch.deliveries:
            partition = delivery.record.partition
            if partition in total.failed or partition in total.fenced:
                continue
            if total.moved and (clock.monotonic() > deadline or self._stopping()):
                break
            total.add(self._run(batch.only([delivery], total.moved), deadline))
            if total.trouble is not None:
                break
        return total


def _message(delivery: Delivery) -> Message[object]:
    if delivery.message is None:
        raise AssertionError(f"{delivery.record} was not decoded")
    return delivery.message
