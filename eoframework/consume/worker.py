"""One handler's thread: fetch a batch, have it executed, and make the client agree with what the database says.

The rule for every outcome: whatever was not committed is fetched again. So a batch can fail anywhere and in any way;
the client's position only ever follows the position row.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping

from eoframework import clock, events
from eoframework.app import App
from eoframework.consume.assembly import assemble
from eoframework.consume.batch import Failure, Outcome
from eoframework.consume.failure import ParkingFull
from eoframework.consume.ownership import Ownership
from eoframework.consume.start import Start, Surroundings
from eoframework.db import home
from eoframework.db.position import Claim, Positions, Stream, session_name
from eoframework.db.unit_of_work import Timeouts, WorkerConnection
from eoframework.errors import HandlerFailed, LostConnection, Retryable
from eoframework.handlers import Handler
from eoframework.kafka.admin import Admin
from eoframework.kafka.config import consumer_config
from eoframework.kafka.consumer import GroupConsumer
from eoframework.kafka.offsets import OutOfRange
from eoframework.kafka.rest import Rest
from eoframework.lifecycle import Backoff
from eoframework.message import Record
from eoframework.settings import Settings

log = logging.getLogger(__name__)

_CHECK_SECONDS = 5.0
_REPEAT_WARNING_SECONDS = 30.0
_LONGEST_BACKOFF = 5.0
# Parked messages get this share of the time that batches take, and at least so many seconds a step.
_DRAIN_SHARE = 0.1
_DRAIN_LEAST = 0.01
_DRAIN_IDLE = 1.0


class ConsumeWorker:
    """Consumes one handler's topic until told to stop; see lifecycle.Worker for who calls what."""

    def __init__(
        self,
        handler: Handler,
        *,
        app: App,
        settings: Settings,
        admin: Admin,
        stop: threading.Event | None = None,
        once: bool = False,
        adopt_offsets: bool = False,
    ) -> None:
        """`stop` ends a batch in flight after the message being handled; `once` makes `drained` possible."""
        self.name = f"consume {handler.group}"
        self._handler = handler
        self._app = app
        self._settings = settings
        self._admin = admin
        self._adopt_offsets = adopt_offsets
        self._largest = handler.max_batch or settings.max_batch
        self._limit = self._largest
        self._blocked: dict[int, Failure] = {}
        """Partitions that stand still at a message."""
        self._retry_at: dict[int, float] = {}
        """When those go on that only wait."""
        self._uncommitted: dict[int, Claim] = {}
        self._next_commit = self._next_check = self._next_warning = 0.0
        self._rerun_pause = Backoff(longest=_LONGEST_BACKOFF)
        self._outage_pause = Backoff(longest=_LONGEST_BACKOFF)
        self._topic_asked: Callable[[], None] = lambda: None
        self._consumer: GroupConsumer | None = None
        self._once = once
        self._rest = Rest(settings, admin, group=handler.group, topic=handler.topic.name)
        self._draining = stop or threading.Event()

    # --- lifecycle ---

    def start(self) -> None:
        """Register the consumer, refuse what would be a guess, and join the group."""
        settings, handler = self._settings, self._handler
        positions = Positions(self._app.database.schema)
        timeouts = Timeouts(settings.statement_timeout, settings.lock_timeout, settings.idle_in_transaction_timeout)
        owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._connection = WorkerConnection(
            self._app.database, timeouts, handler=handler.group, session=session_name(owner)
        )
        self._stream = self._register(positions)
        self._executor, self._drain = assemble(
            handler,
            self._app,
            self._stream,
            self._connection,
            settings,
            stopping=self._draining.is_set,
            before_commit=self._confirm_topic,
        )
        self._ownership = Ownership(
            self._stream,
            positions,
            self._connection,
            self._admin,
            owner=owner,
            mark=self._mark,
            charging=(self._executor, self._drain),
            careful_for=self._largest,
        )
        config = consumer_config(settings, group=handler.group, client_id=owner)
        config["enable.partition.eof"] = self._once
        self._consumer = GroupConsumer(
            config, handler.topic.name, on_assigned=self._ownership.assigned, on_revoked=self._revoked
        )

    def _register(self, positions: Positions) -> Stream:
        topic = self._admin.describe(self._handler.topic.name)
        offsets = self._admin.group_offsets(self._handler.group, topic.name)
        around = Surroundings(self._admin.cluster_id(), topic.id, topic.partitions, offsets)
        start = Start(self._handler, positions, self._admin, adopt_offsets=self._adopt_offsets)
        declared = self._app.groups
        with self._connection.begin(f"{self._handler.group}: register") as connection:
            copied = home.is_copy(connection, self._app.database.schema)
            stream = start.register(connection, around, app=self._app.name, declared=declared, copied=copied)
        events.emit("consume.registered", consumer=stream.consumer)
        return stream

    def drained(self) -> bool:
        """Everything has been processed to its end."""
        waits = any(not isinstance(self._blocked[p].error, ParkingFull) for p in self._retry_at if p in self._blocked)
        if self._consumer is None or self._ownership.waiting or self._drain.busy or waits:
            return False
        return self._rest.is_all_read(self._consumer, self._ownership.claims, but=self._blocked)

    def close(self) -> None:
        """Release the partitions, commit the group's offsets, leave the group."""
        consumer, self._consumer = self._consumer, None
        if consumer is None:
            return
        try:
            self._ownership.release()
        except Retryable as trouble:
            log.warning(
                "%s: left without releasing its partitions: %s The successor claims them all the same",
                self.name,
                trouble,
            )
        finally:
            consumer.close(_committable(self._uncommitted))
            self._connection.discard()

    # --- one step ---

    def step(self) -> float:
        """Claim what waits, fetch a batch, execute it, apply the outcome; then what was parked and is due."""
        consumer = self._member()
        self._claim_waiting(consumer)
        self._retry_waiting(consumer)
        records = self._fetch(consumer)
        self._release_left()
        started = clock.monotonic()
        records = [record for record in records if record.partition in self._ownership.claims]
        if records:
            touched = {record.partition for record in records}
            claims = {partition: self._ownership.claims[partition] for partition in touched}
            self._topic_asked = self._ownership.ask_topic()
            careful = self._ownership.careful() & touched
            self._apply(consumer, self._executor.execute(records, claims, careful), records)
        busy = clock.monotonic() - started
        self._drain_parked(consumer, max(_DRAIN_LEAST, _DRAIN_SHARE * busy) if records else _DRAIN_IDLE)
        self._keep_house(consumer)
        return 0.0

    def _drain_parked(self, consumer: GroupConsumer, seconds: float) -> None:
        outcome = self._drain.run(self._ownership.claims, self._ownership.unclean(), seconds=seconds)
        if outcome.fenced:
            self._give_way(consumer, outcome.fenced)
        if outcome.trouble is not None:
            self._recover(consumer, outcome.trouble, "The parked message")

    def _fetch(self, consumer: GroupConsumer) -> list[Record]:
        try:
            return [one.record() for one in consumer.fetch(self._limit, self._patience())]
        except OutOfRange:
            # A topic that was re-created is out of range until it has grown, and has another remedy.
            self._check_topic()
            raise

    def _patience(self) -> float:
        longest = 0.1 if self._ownership.waiting or self._retry_at else self._settings.max_wait
        return min(longest, self._settings.max_wait, self._drain.patience())

    def _release_left(self) -> None:
        try:
            self._ownership.release_left()
        except Retryable as trouble:
            log.info("%s: %s The new owners of our partitions are more careful for a while", self.name, trouble)

    def _claim_waiting(self, consumer: GroupConsumer) -> None:
        """Claim partitions that wait for it, if the group still says they are ours."""
        for partition in self._ownership.due():
            if partition not in consumer.assigned():
                self._ownership.revoked([partition])
                continue
            try:
                claim = self._ownership.claim_waiting(partition)
            except Retryable as trouble:
                self._outage(trouble)
                return
            self._outage_pause.reset()
            if claim is not None:
                self._uncommitted[partition] = claim
                self._forget_block(partition)
                self._drain.look_soon()
                consumer.start(partition, claim.next_offset)

    # --- outcomes ---

    def _apply(self, consumer: GroupConsumer, outcome: Outcome, records: list[Record]) -> None:
        """Make claims and client follow what was committed; rewind what was not."""
        for partition, next_offset in outcome.moved.items():
            self._ownership.claims[partition] = self._ownership.claims[partition].moved(next_offset)
            self._uncommitted[partition] = self._ownership.claims[partition]
            harmless = sum(record.partition == partition and record.offset < next_offset for record in records)
            self._ownership.survived(partition, harmless)
            self._forget_block(partition)
        if outcome.parked:
            self._drain.look_soon()
        if outcome.moved:
            self._rerun_pause.reset()
            self._grow()
        if outcome.fenced:
            self._give_way(consumer, outcome.fenced)
        if outcome.trouble is not None:
            self._limit = max(1, len(records) // 2)
            self._recover(consumer, outcome.trouble, f"The batch (now {self._limit} messages at a time)")
        self._rewind_rest(consumer, records)
        for failure in outcome.failed.values():
            self._block(consumer, failure)

    def _rewind_rest(self, consumer: GroupConsumer, records: list[Record]) -> None:
        ends = {record.partition: record.offset + 1 for record in records}
        claims = self._ownership.claims
        consumer.rewind(
            {p: claims[p].next_offset for p, end in ends.items() if p in claims and claims[p].next_offset != end}
        )

    def _give_way(self, consumer: GroupConsumer, partitions: set[int]) -> None:
        log.warning(
            "%s: fenced on partitions %s: another worker has claimed them; nothing more was written there",
            self.name,
            sorted(partitions),
        )
        events.emit("consume.fenced", partitions=sorted(partitions))
        consumer.pause(partitions)
        self._ownership.fenced(partitions)

    def _recover(self, consumer: GroupConsumer, trouble: Retryable, what: str) -> None:
        """Run the same again (a batch smaller: it meets fewer rows of others and fits into shorter timeouts).

        After a lost connection the rows are read first.
        """
        if isinstance(trouble, LostConnection):
            log.warning("%s: %s Whether the batch was committed is read from the position rows", self.name, trouble)
            consumer.pause(self._ownership.claims)
            self._ownership.in_doubt()
            return
        log.warning("%s: %s %s was rolled back and runs again", self.name, trouble, what)
        clock.wait(self._draining, self._rerun_pause.next())

    def _grow(self) -> None:
        if self._limit < self._largest:
            self._limit = min(self._largest, self._limit + max(1, self._limit // 10))

    def _outage(self, trouble: Retryable) -> None:
        """The database or Kafka is away: keep the membership by polling, and try again with growing pauses."""
        pause = self._outage_pause.next()
        log.warning("%s: %s Waiting %.1f s; nothing is lost", self.name, trouble, pause)
        self._ownership.postpone(pause)

    # --- a message that fails ---

    def _block(self, consumer: GroupConsumer, failure: Failure) -> None:
        """Stop at a failing message: nothing behind it in its partition is processed, nothing is skipped."""
        partition = failure.record.partition
        if failure.retry_in is not None:
            self._wait_for(consumer, partition, failure, failure.retry_in)
            return
        text = f": {failure.error}" if self._settings.failure_text else ""
        error = HandlerFailed(
            f"{self._handler.group} failed at {failure.record}: {type(failure.error).__name__}{text}.",
            remedy="Everything before it is committed; it and what follows in its partition wait. Mend the handler or "
            "the data and start again.",
        )
        events.emit("consume.failed", record=failure.record, error=failure.error)
        cause = failure.error if self._settings.failure_text else None
        if self._settings.on_failure == "stop":
            raise error from cause
        log.error("%s Its partition is paused; the others go on", error, exc_info=cause)
        self._blocked[partition] = failure
        consumer.pause([partition])

    def _wait_for(self, consumer: GroupConsumer, partition: int, failure: Failure, seconds: float) -> None:
        """The partition pauses and the polling goes on, so that the group does not think this member is dead."""
        if partition not in self._blocked and isinstance(failure.error, ParkingFull):
            log.error("%s: %s; it pauses at %s until there is room", self.name, failure.error, failure.record)
        self._blocked[partition] = failure
        self._retry_at[partition] = clock.monotonic() + seconds
        consumer.pause([partition])

    def _retry_waiting(self, consumer: GroupConsumer) -> None:
        now = clock.monotonic()
        for partition in [p for p, when in self._retry_at.items() if when <= now]:
            del self._retry_at[partition]
            claim = self._ownership.claims.get(partition)
            if claim is not None:
                consumer.start(partition, claim.next_offset)

    def _forget_block(self, partition: int) -> None:
        self._blocked.pop(partition, None)
        self._retry_at.pop(partition, None)

    def _revoked(self, partitions: list[int]) -> None:
        events.emit("consume.revoked", partitions=sorted(partitions))
        self._ownership.revoked(partitions)
        for partition in partitions:
            self._forget_block(partition)
            self._uncommitted.pop(partition, None)

    # --- now and then ---

    def _keep_house(self, consumer: GroupConsumer) -> None:
        now = clock.monotonic()
        if self._uncommitted and now >= self._next_commit:
            self._next_commit = now + self._settings.offset_commit_interval
            consumer.commit(_committable(self._uncommitted))
            self._uncommitted = {}
        if now >= self._next_check:
            self._next_check = now + _CHECK_SECONDS
            if self._check_topic():
                consumer.contact.check()
            self._check_claims(consumer)
            # What the group was told may have been refused, and is told again only when something moves: seen, lag
            # shown for ever of what had long been done, after the coordinator had been away for a moment.
            self._uncommitted |= self._ownership.claims
        if self._blocked and now >= self._next_warning:
            self._next_warning = now + _REPEAT_WARNING_SECONDS
            waiting = ", ".join(str(failure.record) for failure in self._blocked.values())
            log.error("%s: still blocked by %s; what follows there waits", self.name, waiting)

    def _check_topic(self) -> bool:
        """Whether Kafka answered."""
        try:
            self._ownership.check_topic()
        except Retryable as trouble:
            log.info("%s: topic not checked: %s It is checked again soon", self.name, trouble)
            return False
        return True

    def _confirm_topic(self) -> None:
        self._topic_asked()

    def _check_claims(self, consumer: GroupConsumer) -> None:
        """Find out about `eo position set` on a partition where nothing arrives."""
        try:
            lost = self._ownership.lost()
        except Retryable as trouble:
            log.warning("%s: %s The claims are renewed", self.name, trouble)
            consumer.pause(self._ownership.claims)
            self._ownership.in_doubt()
        else:
            if lost:
                self._give_way(consumer, lost)

    def _mark(self, claim: Claim) -> None:
        self._member().mark(claim.partition, claim.next_offset, claim.epoch)

    def _member(self) -> GroupConsumer:
        if self._consumer is None:
            raise AssertionError(f"{self.name}: step before start")
        return self._consumer


def _committable(claims: Mapping[int, Claim]) -> dict[int, tuple[int, int]]:
    return {partition: (claim.next_offset, claim.epoch) for partition, claim in claims.items()}
