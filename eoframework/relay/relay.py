"""The life of one outbox row: selected, produced in a Kafka transaction with a checkpoint, committed, deleted.

    settle ──> select ──> begin, produce rows + checkpoint, commit ──> delete rows, count the batch ──┐
      ^           ^                      │ refused: halve / set aside              │                  │
      └───────────┼──── any error ───────┴─────────────────────────────────────────┘                  │
                  └───────────────────────────────────────────────────────────────────────────────────┘

The commit at Kafka and the delete at PostgreSQL cannot be one transaction. The checkpoint bridges them: it is one more
record of the Kafka transaction, so whoever owns the shard next reads from it whether the rows were published.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from eoframework import clock, events
from eoframework.checkpoint import Checkpoint, digest_of, transactional_id
from eoframework.cloudevents import outgoing_headers
from eoframework.db.pending import MALFORMED, OutboxRow, PendingRows, Refusal
from eoframework.db.shards import Claim, ShardLost, Shards
from eoframework.errors import Abortable, Fenced, RestartNeeded, Retryable
from eoframework.failures import MAX_ERROR, clean
from eoframework.kafka.checkpoint import CheckpointLog, CheckpointPlace
from eoframework.kafka.config import producer_config, transactional_config
from eoframework.kafka.producer import REQUEST_SHARE, IdempotentProducer, Outgoing, Rejected
from eoframework.kafka.transaction import TransactionalProducer
from eoframework.lifecycle import Backoff
from eoframework.relay.recovery import settle
from eoframework.relay.topics import Topics
from eoframework.settings import Settings

_log = logging.getLogger(__name__)

# What one batch may take in memory, twice: as rows and in the client's queue.
_MAX_BYTES = 16 * 1024 * 1024
_POLL_FIRST = 0.001
_POLL_LONGEST = 10.0


class Sender(Protocol):
    """What a batch is sent with: Kafka transactions, or none (`relay_mode`)."""

    def make_ready(self) -> None: ...
    def begin(self) -> None: ...
    def send(self, records: Iterable[Outgoing]) -> None: ...
    def commit(self) -> None: ...
    def abort(self) -> None: ...
    def doubt(self, why: str) -> None: ...
    def limit_request(self, size: int) -> bool: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Surroundings:
    """What all shards of a relay share."""

    settings: Settings
    shards: Shards
    rows: PendingRows
    checkpoints: CheckpointLog
    topics: Topics
    shard_count: int


class ShardRelay:
    """Moves the rows of one shard to Kafka for as long as it owns the shard; used from one thread."""

    def __init__(self, claim: Claim, around: Surroundings, *, overdue: Callable[[], bool]) -> None:
        """`overdue` says that a stop was asked for so long ago that not even Kafka's answer is waited for."""
        self.claim = claim
        self._around = around
        self._shards, self._rows, self._topics = around.shards, around.rows, around.topics
        self._transactional = around.settings.relay_mode == "transactional"
        self._overdue = overdue
        self._sender: Sender = self._transactions() if self._transactional else self._plain()
        self._place: CheckpointPlace | None = None
        self._batch_no = 0
        self._settled = False
        self._largest = around.settings.relay_batch
        self._limit = self._largest
        self._poll_delay = _POLL_FIRST
        self._due_at = 0.0
        self._backoff = Backoff()
        self._trouble = ""

    def step(self) -> float:
        """Move one batch; returns the seconds until the next step.

        On a crash at any point: every row is published once, in a transaction that names it in its checkpoint, and
        deleted once. Kafka or PostgreSQL being away is waited for. Raises Fenced when the shard was taken over,
        FailClosed when database and Kafka contradict each other.
        """
        try:
            delay = self._round()
        except ShardLost:
            raise
        except (Retryable, Abortable, Fenced, RestartNeeded) as error:
            return self._wait_after(error)
        if self._trouble:
            _log.info("relay %s goes on; nothing was lost.", self.claim)
            self._trouble = ""
            self._backoff.reset()
        return delay

    def close(self) -> None:
        """End the producer; a transaction still open is aborted, its rows are published by the next owner."""
        self._sender.close()

    def _round(self) -> float:
        if not self._settled:
            self._settle()
        # In this order: a producer that fences, then the select that checks the epoch, then begin. The other way
        # round, a relay frozen between the two would wake up, fence its successor, and publish again what that one
        # has published.
        self._sender.make_ready()
        rows, taken = self._select()
        if not rows:
            return self._idle(taken)
        self._poll_delay = _POLL_FIRST
        limits = {topic: self._topics.limit(topic) for topic in {row.topic for row in rows}}
        known = [size for size in limits.values() if size is not None]
        if known and self._sender.limit_request(int(min(known) * REQUEST_SHARE)):
            return 0.0
        sendable = [row for row in rows if limits[row.topic] is not None]
        if sendable:
            self._move(sendable)
        return 0.0

    def _move(self, rows: Sequence[OutboxRow]) -> None:
        try:
            self._publish(rows)
        except Rejected as rejected:
            self._set_aside(rows, rejected)
            return
        self._remove(rows)
        self._limit = min(self._limit * 2, self._largest)

    # --- the steps of a batch -------------------------------------------------------------------------------------

    def _select(self) -> tuple[list[OutboxRow], float]:
        now = clock.monotonic()
        if now >= self._due_at:
            if due := self._rows.move_due(self.claim.shard, limit=self._largest):
                events.emit("relay.made_due", shard=self.claim.shard, rows=due)
            self._due_at = now + self._around.settings.relay_poll_max
        started = clock.monotonic()
        found = self._rows.select(self.claim, limit=self._limit, max_bytes=_MAX_BYTES, paused=self._topics.paused())
        taken = clock.monotonic() - started
        if found.rows:
            if found.replicated:
                self._rows.settle_on_standby(self.claim)
            events.emit("relay.selected", shard=self.claim.shard, rows=len(found.rows))
        return found.rows, taken

    def _publish(self, rows: Sequence[OutboxRow]) -> None:
        self._sender.begin()
        self._sender.send(map(_record, rows))
        if self._transactional:
            # Last, so that it cannot be in a transaction that holds fewer rows than it names.
            self._sender.send([self._checkpoint(rows)])
        events.emit("relay.produced", shard=self.claim.shard, rows=len(rows))
        self._sender.commit()
        events.emit("relay.committed", shard=self.claim.shard, rows=len(rows))

    def _remove(self, rows: Sequence[OutboxRow]) -> None:
        next_batch_no = self._batch_no + 1 if self._transactional else self._batch_no
        self._rows.remove(self.claim, rows, batch_no=self._batch_no, next_batch_no=next_batch_no)
        self._batch_no = next_batch_no
        events.emit("relay.deleted", shard=self.claim.shard, rows=len(rows))

    def _checkpoint(self, rows: Sequence[OutboxRow]) -> Outgoing:
        assert self._place is not None
        topic = self._around.checkpoints.topic
        checkpoint = Checkpoint(
            outbox_id=self._around.checkpoints.outbox_id,
            cluster_id=self._place.cluster_id,
            topic_id=self._place.topic_id,
            shard=self.claim.shard,
            batch_no=self._batch_no + 1,
            seqs=tuple(row.seq for row in rows),
            digest=digest_of((row.seq, row.id) for row in rows),
        )
        key = str(self.claim.shard).encode()
        return Outgoing(topic, key, checkpoint.encode(), [], partition=self.claim.shard)

    # --- what is in doubt, and what is refused --------------------------------------------------------------------

    def _settle(self) -> None:
        """Find out, from the checkpoint, whether a batch was published whose rows are still there."""
        state = self._shards.check(self.claim)
        if self._transactional:
            self._sender.make_ready()
            self._place, self._batch_no = self._read_checkpoint()
        else:
            self._batch_no = state.batch_no
            if state.cluster_id is not None:
                self._settle_earlier_transactions()
        self._settled = True

    def _settle_earlier_transactions(self) -> None:
        # The outbox was used with transactions before: its last batch may be published and not yet deleted.
        sender = self._transactions()
        try:
            sender.make_ready()
            self._place, self._batch_no = self._read_checkpoint()
        finally:
            sender.close()

    def _read_checkpoint(self) -> tuple[CheckpointPlace, int]:
        around = self._around
        return settle(self.claim, around.shards, around.rows, around.checkpoints, shard_count=around.shard_count)

    def _set_aside(self, rows: Sequence[OutboxRow], rejected: Rejected) -> None:
        # A refusal proves nothing about any row of the batch (one large row failed three small ones of its request),
        # so only what fails alone is judged.
        self._sender.abort()
        self._settled = False
        if rejected.topic_trouble and rejected.topic is not None:
            self._topics.pause(rejected.topic, rejected.what)
        elif len(rows) > 1:
            self._limit = len(rows) // 2
        elif rejected.topic_trouble:
            self._topics.pause(rows[0].topic, rejected.what)
        else:
            self._bury(rows[0], Refusal(rejected.what, rejected.kind))

    def _bury(self, row: OutboxRow, refusal: Refusal) -> None:
        # First make sure that the transaction it was in did not happen after all. That also makes its number fit to be
        # used again: it stands in no committed checkpoint.
        self._settle()
        events.emit("relay.refused", shard=self.claim.shard, id=row.id)
        hold = self._around.settings.relay_after_dead == "hold"
        letter = self._rows.bury(self.claim, row, refusal, hold=hold)
        _log.error(
            "outbox message %s for %s can never be sent: %s It is dead letter %d; %sthe others flow.",
            row.id,
            row.topic,
            clean(refusal.what, MAX_ERROR),
            letter.dead_letter,
            "the later ones of its key wait (eo outbox retry, or discard), " if letter.holds else "",
        )
        events.emit("relay.dead_lettered", shard=self.claim.shard, id=row.id, dead_letter=letter.dead_letter)

    def _wait_after(self, error: Exception) -> float:
        self._settled = False
        self._sender.doubt(str(error))
        delay = self._backoff.next()
        if not self._trouble:
            _log.warning("relay %s waits: %s Trying again; nothing is lost, the batch runs again.", self.claim, error)
        self._trouble = str(error)
        return delay

    def _idle(self, taken: float) -> float:
        # Behind an old snapshot the select walks over dead rows (97 ms at a million); polling at full speed then
        # would load the server for nothing.
        self._poll_delay = min(self._poll_delay * 2, self._around.settings.relay_poll_max)
        return min(max(self._poll_delay, 10 * taken), _POLL_LONGEST)

    def _transactions(self) -> TransactionalProducer:
        name = transactional_id(self._around.checkpoints.outbox_id, self.claim.shard)
        config = transactional_config(self._around.settings, transactional_id=name, client_id=name)
        return TransactionalProducer(
            config, may_open=lambda: _nothing(self._shards.check(self.claim)), stopping=self._overdue
        )

    def _plain(self) -> IdempotentProducer:
        config = producer_config(self._around.settings, client_id=f"eo-relay-{self.claim.shard}")
        return IdempotentProducer(config, stopping=self._overdue)


def _record(row: OutboxRow) -> Outgoing:
    if row.unreadable:
        raise Rejected(row.unreadable, topic=row.topic, topic_trouble=False, kind=MALFORMED)
    headers = outgoing_headers(
        id=row.id,
        source=row.source,
        type=row.type,
        time=row.created_at,
        content_type=row.content_type,
        headers=row.headers or (),
        traceparent=row.traceparent,
    )
    return Outgoing(row.topic, row.key, row.payload, list(headers))


def _nothing(_: object) -> None:
    return None
