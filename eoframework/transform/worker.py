"""One transform's thread: fetch a batch, have it transformed and committed, and stand where the group's offsets say.

The rule for every doubt: the producer is replaced, which ends whatever its last transaction left open; then the group's
committed offsets say what happened, and the partitions begin there.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import uuid
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress

from eoframework import clock, events
from eoframework.app import App
from eoframework.errors import EoError, FailClosed, Fenced, HandlerFailed, RestartNeeded, Retryable
from eoframework.kafka.admin import Admin
from eoframework.kafka.config import consumer_config, transform_config
from eoframework.kafka.consumer import GroupConsumer
from eoframework.kafka.membership import Membership
from eoframework.kafka.offsets import OutOfRange
from eoframework.kafka.records import Fetched
from eoframework.kafka.rest import Rest
from eoframework.kafka.transaction import TransactionalProducer
from eoframework.lifecycle import Backoff
from eoframework.settings import Settings
from eoframework.transform.failure import Failures, Held
from eoframework.transform.ladder import check_ladder
from eoframework.transform.mark import Mark, Stand
from eoframework.transform.outputs import Outputs
from eoframework.transform.start import Beginning
from eoframework.transform.takeover import Suspicion
from eoframework.transform.targets import Targets
from eoframework.transform.transformer import DOUBTFUL, Outcome, TooMany, Transformer
from eoframework.transforms import Transform

log = logging.getLogger(__name__)

_CHECK_SECONDS = 5.0
_SHORT = 0.1
_IN_CALLBACK = 1.0
_PATIENCE = 10.0
_LONGEST_BACKOFF = 5.0
_TWINS = 3
_TWINS_WITHIN = 60.0
"""So often within these seconds another producer has to fence ours before its process is taken for a twin of this one.

Not in a row: of twins, each commits now and then.
"""


class TransformWorker:
    """Runs one transform until told to stop; see lifecycle.Worker for who calls what."""

    def __init__(
        self,
        transform: Transform,
        *,
        app: App,
        settings: Settings,
        admin: Admin,
        stop: threading.Event | None = None,
        once: bool = False,
    ) -> None:
        """`stop` ends a batch in flight after the transaction under way; `once` makes `drained` possible."""
        self.name = f"transform {transform.group}"
        self._transform = transform
        self._app = app
        self._settings = settings
        self._admin = admin
        self._once = once
        self._draining = stop or threading.Event()
        self._largest = self._limit = settings.transform_batch
        self._fetched = 0
        self._stands: dict[int, Stand] = {}
        """Where the group stands in the partitions that are ours and known."""
        self._waiting: set[int] = set()
        """Partitions that are ours, and where the group stands is to be read."""
        self._blocked: dict[int, Held] = {}
        self._retry_at: dict[int, float] = {}
        """When those go on, also if where they stand is read anew meanwhile."""
        self._suspicion = Suspicion(careful_for=self._largest)
        self._rest = Rest(settings, admin, group=transform.group, topic=transform.topic.name)
        self._pause = Backoff(longest=_LONGEST_BACKOFF)
        self._next_check = 0.0
        self._fenced: list[float] = []
        """When that was by another producer, lately."""
        self._running_since = 0.0
        self._consumer: GroupConsumer | None = None
        self._producer: TransactionalProducer | None = None

    # --- lifecycle ---

    def start(self) -> None:
        """Check the timeouts, register the transform, refuse what would be a guess, and join the group."""
        settings, transform = self._settings, self._transform
        check_ladder(settings, self._admin)
        self._beginning = Beginning(transform, self._app.database, self._admin)
        self._stream = self._beginning.register(app=self._app.name, declared=self._app.groups)
        self._targets = Targets(transform, self._admin)
        client_id = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        name = f"eo.transform.{transform.group}.{settings.instance or uuid.uuid4()}"
        self._producer = TransactionalProducer(transform_config(settings, transactional_id=name, client_id=name))
        if (largest := self._targets.largest_request()) is not None:
            self._producer.limit_request(largest)
        self._transformer = Transformer(
            transform,
            self._producer,
            Outputs(transform, self._stream, source=self._app.name),
            Failures(transform, text=settings.failure_text),
            size=settings.transform_batch,
            interval=settings.transform_interval,
            stopping=self._draining.is_set,
        )
        members = consumer_config(settings, group=transform.group, client_id=client_id)
        members["enable.partition.eof"] = self._once
        self._consumer = GroupConsumer(
            members, transform.topic.name, on_assigned=self._assigned, on_revoked=self._revoked
        )

    def drained(self) -> bool:
        """Everything has been read to its end, and nothing waits."""
        if self._consumer is None or self._waiting or self._retry_at:
            return False
        return self._rest.is_all_read(self._consumer, self._stands, but=self._blocked)

    def close(self) -> None:
        """Leave the group and end the producer; nothing is in flight."""
        if self._consumer is not None:
            self._leave_no_charge(self._consumer)
        consumer, self._consumer = self._consumer, None
        producer, self._producer = self._producer, None
        if consumer is not None:
            consumer.close({})
        if producer is not None:
            producer.close()

    # --- one step ---

    def step(self) -> float:
        """Begin partitions that wait for it, fetch a batch, transform and commit it."""
        consumer = self._member()
        self._settle(consumer)
        self._retry_waiting(consumer)
        records = deque([record for record in self._fetch(consumer) if record.partition in self._stands])
        self._fetched = len(records)
        if records:
            try:
                self._run(consumer, records)
            except Retryable as trouble:
                # They count as handed out: to go on with the next ones would skip them.
                self._doubt(consumer, trouble)
        self._keep_house()
        return 0.0

    def _fetch(self, consumer: GroupConsumer) -> list[Fetched]:
        patience = _SHORT if self._waiting or self._retry_at else self._settings.max_wait
        try:
            return consumer.fetch(self._limit, patience, linger=self._settings.transform_interval)
        except OutOfRange:
            # A topic that was re-created is out of range until it has grown, and has another remedy. Without an answer
            # this error stays: it is told once, and what was fetched with it counts as handed out.
            with suppress(Retryable):
                self._beginning.ask_topic(self._stream)()
            raise

    def _run(self, consumer: GroupConsumer, records: deque[Fetched]) -> None:
        self._running_since = clock.monotonic()
        deadline = self._running_since + self._settings.max_poll_interval / 3
        touched = {record.partition for record in records}
        try:
            # Now, and not when the offsets are sent: if the group throws us out in between, this is what the broker
            # refuses. Then it would be the metadata of a stranger, which it accepts unchecked.
            membership = consumer.membership()
            self._note_takeovers(touched, membership)
        except DOUBTFUL as trouble:
            self._doubt(consumer, trouble)
            return
        alone = self._suspicion.careful(touched)
        same = self._beginning.ask_topic(self._stream)
        outcome = Outcome(dict(self._stands))
        for singly in (True, False) if alone else (False,):
            part = deque(record for record in records if (record.partition in alone) == singly) if alone else records
            if part and outcome.trouble is None:
                ends = {record.partition: record.offset + 1 for record in part}
                careful = list(part) if singly else []
                outcome = self._transformer.run(
                    part, membership, outcome.stands, deadline=deadline, confirm=same, singly=singly
                )
                self._apply(consumer, outcome, ends, careful)

    def _note_takeovers(self, touched: Iterable[int], membership: Membership) -> None:
        notes = self._suspicion.to_note(self._stands, set(touched))
        if notes:
            self._transformer.move(notes, membership)
            self._suspicion.noted(notes)
            self._stands |= notes

    # --- outcomes ---

    def _apply(self, consumer: GroupConsumer, outcome: Outcome, ends: dict[int, int], careful: list[Fetched]) -> None:
        """Follow what was committed; fetch again what was not."""
        if outcome.trouble is not None:
            self._doubt(consumer, outcome.trouble)
            return
        for partition, end in ends.items():
            stand, before = outcome.stands[partition], self._stands[partition]
            ran = sum(r.partition == partition and r.offset < stand.offset for r in careful)
            self._suspicion.survived(partition, ran)
            self._stands[partition] = stand
            if stand.offset != before.offset:
                self._blocked.pop(partition, None)
            if stand.offset != end and partition not in outcome.held:
                consumer.rewind({partition: stand.offset})
        self._pause.reset()
        self._limit = min(self._largest, self._limit * 2)
        for held in outcome.held.values():
            self._hold(consumer, held)

    def _doubt(self, consumer: GroupConsumer, trouble: Exception) -> None:
        """Not confirmed is not committed, until the group's offsets say otherwise: all partitions wait for that."""
        self._limit = max(1, self._fetched // 2)
        self._refuse_twin(trouble)
        log.warning(
            "%s: %s The transaction was given up; where the group stands is read anew, nothing is lost or sent twice",
            self.name,
            trouble,
        )
        events.emit("transform.given_way", error=trouble)
        consumer.pause(self._stands)
        self._waiting |= self._stands.keys()
        self._stands.clear()
        self._blocked.clear()
        if not isinstance(trouble, TooMany):
            clock.wait(self._draining, self._pause.next())

    def _refuse_twin(self, trouble: Exception) -> None:
        instance, now = self._settings.instance, clock.monotonic()
        # A transaction that was open for too long, frozen or not, is fenced by Kafka itself.
        itself = now - self._running_since >= self._settings.transform_transaction_timeout
        if itself and isinstance(trouble, (Fenced, RestartNeeded)):
            text = "%s: it took %.0f s. If this goes on, raise EO_TRANSFORM_TRANSACTION_TIMEOUT, or make less of each"
            log.warning(text, self.name, now - self._running_since)
        if instance is None or itself or not isinstance(trouble, Fenced):
            return
        self._fenced = [when for when in self._fenced if now - when < _TWINS_WITHIN] + [now]
        twin = f"another process seems to run with EO_INSTANCE={instance}"
        if len(self._fenced) < _TWINS:
            log.warning("%s: fenced: %s; two of one name hinder each other, nothing is lost", self.name, twin)
            return
        raise RestartNeeded(
            f"{self.name}: fenced {_TWINS} times within {_TWINS_WITHIN:g} s: {twin}.",
            remedy="Give each worker a name of its own, or none.",
        )

    def _hold(self, consumer: GroupConsumer, held: Held) -> None:
        """The partition pauses and the polling goes on, so that the group does not think this member is dead."""
        partition = held.record.partition
        self._blocked[partition] = held
        consumer.pause([partition])
        if held.retry_in is not None:
            self._retry_at[partition] = clock.monotonic() + held.retry_in
            return
        text = f": {held.error}" if self._settings.failure_text else ""
        error = HandlerFailed(
            f"{self._transform.group} failed at {held.record}: {type(held.error).__name__}{text}.",
            remedy="Everything before it is committed; it and what follows in its partition wait. Mend the transform "
            "or the data and start again.",
        )
        cause = held.error if self._settings.failure_text else None
        if self._settings.on_failure == "stop":
            raise error from cause
        log.error("%s Its partition is paused; the others go on", error, exc_info=cause)

    def _retry_waiting(self, consumer: GroupConsumer) -> None:
        now = clock.monotonic()
        for partition in [p for p, when in self._retry_at.items() if when <= now and p in self._stands]:
            del self._retry_at[partition]
            # With `once` it would count as drained before its message has run.
            self._blocked.pop(partition, None)
            consumer.start(partition, self._stands[partition].offset)

    # --- which partitions, and where they stand ---

    def _assigned(self, partitions: list[int]) -> dict[int, int | None]:
        """Where they start; None: paused, until `_settle` knows.

        Known here already if all goes well: a partition that is resumed later stands still for another second.
        """
        self._waiting |= set(partitions)
        starts: dict[int, int | None] = dict.fromkeys(partitions)
        try:
            found = self._where(partitions, timeout=_IN_CALLBACK)
        except DOUBTFUL as trouble:
            log.info("%s: %s Partitions %s wait; nothing is lost", self.name, trouble, partitions)
            return starts
        return starts | {p: at for p, at in self._stand_at(found).items() if p not in self._retry_at}

    def _revoked(self, partitions: list[int]) -> None:
        # No transaction is open: callbacks run inside fetch, and each step ends its transactions before the next fetch.
        for partition in partitions:
            self._waiting.discard(partition)
            self._stands.pop(partition, None)
            self._blocked.pop(partition, None)
            self._retry_at.pop(partition, None)
            self._suspicion.gone(partition)

    def _where(self, partitions: list[int], *, timeout: float) -> dict[int, tuple[int, str] | None]:
        """The group's offsets, and what was written with them."""
        # In this order: the new producer ends what the last one left open, and only then do the offsets tell.
        assert self._producer is not None
        self._producer.make_ready()
        return self._member().committed(partitions, timeout=timeout)

    def _stand_at(self, found: Mapping[int, tuple[int, str] | None]) -> dict[int, int]:
        begun = {partition: self._stand(partition, at) for partition, at in found.items() if at is not None}
        if begun:
            log.info("%s: goes on in %s at %s by partition", self._transform.group, self._stream.topic, begun)
        return begun

    def _stand(self, partition: int, at: tuple[int, str]) -> int:
        self._waiting.discard(partition)
        self._stands[partition] = Stand(at[0], Mark.decode(at[1]))
        self._suspicion.took_over(partition, self._stands[partition])
        retry, attempts = self._transform.policy.retry, self._stands[partition].mark.attempts
        if retry is None or not attempts:
            self._retry_at.pop(partition, None)
        else:
            # Each rebalance and each restart would take one of its attempts. When it was due a new owner cannot know.
            self._retry_at.setdefault(partition, clock.monotonic() + retry.backoff.after(attempts))
        events.emit("transform.claimed", partition=partition, offset=at[0])
        return at[0]

    def _settle(self, consumer: GroupConsumer) -> None:
        """Begin the waiting partitions where the group stands, and note, before anything is sent, that they have."""
        self._beginning.begun(self._stream, self._stands)
        waiting = sorted(self._waiting & consumer.assigned())
        if not waiting:
            return
        try:
            found = self._where(waiting, timeout=_PATIENCE)
            self._transformer.take_back(found, consumer.membership)
            if missing := [partition for partition in waiting if found[partition] is None]:
                self._begin(missing, consumer.membership())
        except DOUBTFUL as trouble:
            log.info("%s: %s Partitions %s wait; nothing is lost", self.name, trouble, waiting)
            clock.wait(self._draining, self._pause.next())
            return
        for partition, offset in self._stand_at(found).items():
            if partition not in self._retry_at:
                consumer.start(partition, offset)
        self._beginning.begun(self._stream, self._stands)

    def _leave_no_charge(self, consumer: GroupConsumer) -> None:
        charged = sorted(self._transformer.charged & consumer.assigned())
        try:
            if charged:
                self._transformer.take_back(self._where(charged, timeout=_IN_CALLBACK), consumer.membership)
        except EoError as trouble:
            log.info("%s: %s A message stays counted once as if its process had died", self.name, trouble)

    def _begin(self, missing: list[int], membership: Membership) -> None:
        """Commit the first offsets of these partitions, as a member: a successor's cannot be moved back by us."""
        try:
            first = self._beginning.missing(self._stream, missing)
        except FailClosed:
            # The rows may be younger than the answer: a worker frozen in between sees that its successor has begun,
            # and none of the offsets it began with. Kafka has the last word.
            if any(self._where(missing, timeout=_PATIENCE).values()):
                return
            raise
        self._transformer.move({p: Stand(offset, Mark()) for p, offset in first.items()}, membership)

    # --- now and then ---

    def _keep_house(self) -> None:
        now = clock.monotonic()
        if now >= self._next_check:
            self._next_check = now + _CHECK_SECONDS
            try:
                self._beginning.ask_topic(self._stream)()
                self._member().contact.check()
                if self._limit < self._largest:
                    for missing in self._targets.missing():
                        log.warning("%s: %s; what is made for it waits, nothing is lost", self.name, missing)
            except Retryable as trouble:
                log.info("%s: topic not checked: %s It is checked again soon", self.name, trouble)

    def _member(self) -> GroupConsumer:
        if self._consumer is None:
            raise AssertionError(f"{self.name}: step before start")
        return self._consumer
