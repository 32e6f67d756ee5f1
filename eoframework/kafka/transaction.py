"""A transactional producer that is thrown away whenever its connection may still carry an old EndTxn.

librdkafka silently re-sends an `EndTxn` that got no answer in time, inside `commit_transaction()`, and speaks a
protocol (no KIP-890 part 2) in which the late copy ends whatever transaction is open when it arrives. Seen with a
proxy: a held abort lost 1,800 rows without any error, a held commit tore 48 of 50 batches. A new producer of the same
transactional.id has a new epoch, with which the broker refuses the late copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from eoframework import clock, events
from eoframework.errors import ConfigurationError, EoError, Fenced, RestartNeeded, Retryable
from eoframework.kafka.bounded import NoReturn, bounded
from eoframework.kafka.faults import classify, kafka_error
from eoframework.kafka.membership import Membership
from eoframework.kafka.producer import BatchProducer, Outgoing, lower_batch_size

_log = logging.getLogger(__name__)

_CALL_TIMEOUT = 15.0
_ABORT_TIMEOUT = 3.0
_INIT_SLICE = 1.0

# A re-send waits retry.backoff.ms - 20 % (83 ms was the shortest seen at 100 ms); a clean commit after a flush takes
# 0.5-1 ms, 33 ms at most of 2,200. Half of it lies between the two.
_QUARANTINE_SHARE = 0.5

_FORBIDDEN = frozenset({KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED})


def _always() -> None:
    return None


class TransactionalProducer:
    """Kafka transactions of one transactional.id, used from one thread.

    Guarantee: a transaction holds all of what was sent between `begin` and `commit`, or nothing; no late request of an
    earlier transaction can end it. After any error the producer is gone and the outcome is to be read from Kafka, after
    `make_ready` (which ends whatever was open), never guessed.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        may_open: Callable[[], None] = _always,
        stopping: Callable[[], bool] = lambda: False,
        reports: bool = False,
    ) -> None:
        """`may_open` is asked before every `init_transactions()` and raises when this process is no longer the owner:

        a stale owner's new producer would otherwise fence the rightful one, and the two take turns for ever.
        reports: every record's ticket is told where it stands, at a cost per record.
        """
        self._config = dict(config)
        self._reports = reports
        self._may_open = may_open
        self._stopping = stopping
        self._name = str(config["transactional.id"])
        self._quarantine_after = _QUARANTINE_SHARE * float(config["retry.backoff.ms"]) / 1000
        self._producer: BatchProducer | None = None
        self._doubt = self._late = ""
        self.found_fenced = False
        """Whether an abort found that another producer had ended the transaction, or Kafka for its length."""
        self.replaced = 0
        """How many producers were thrown away for doubt."""

    def make_ready(self) -> None:
        """Have a producer that no one doubts: at the first call, and after every doubt, a new one is made.

        Making it fences every earlier producer of this transactional.id and ends its open transaction. Whoever checks
        ownership must do so after this call and before `begin`: checked before, a process frozen in between would
        fence its successor and publish the successor's messages again.
        """
        if self._producer is not None and not self._doubt:
            return
        self._discard()
        self._may_open()
        producer = BatchProducer(self._config, stopping=self._stopping, reports=self._reports)
        events.emit("kafka.producer.opening", transactional_id=self._name)
        try:
            self._initialise(producer)
        except BaseException:
            producer.close()
            raise
        self._producer = producer
        events.emit("kafka.producer.ready", transactional_id=self._name)

    def begin(self) -> None:
        """Open a transaction. Needs `make_ready` before."""
        producer = self._ready()
        try:
            producer.client.begin_transaction()
        except KafkaException as error:
            raise self._doubted(producer, error, "beginning a Kafka transaction") from error

    def send(self, records: Iterable[Outgoing]) -> None:
        """Queue records, in their order, in the open transaction."""
        self._ready().send(records)

    def flush(self) -> None:
        """Wait until Kafka has confirmed all that was sent. Whoever fails here knows that nothing was committed."""
        self._ready().flush()

    def send_offsets(self, topic: str, offsets: Mapping[int, tuple[int, str]], membership: Membership) -> None:
        """Move the group's offsets (partition -> offset, metadata) with this transaction, after all of it is confirmed.

        Refused by Kafka when `membership` is no longer that of a member of the group: nothing happened then.
        After everything was produced: before, Kafka is still busy with the last transaction, and each of its refusals
        costs 100 to 500 ms. Source: KIP-447.
        """
        producer = self._ready()
        producer.flush()
        events.emit("kafka.transaction.flushed", transactional_id=self._name)
        moved = [TopicPartition(topic, p, offset, metadata=mark) for p, (offset, mark) in sorted(offsets.items())]
        try:
            taken = bounded(
                lambda timeout: producer.client.send_offsets_to_transaction(moved, membership.raw, timeout),
                _CALL_TIMEOUT,
            )
        except KafkaException as error:
            raise self._doubted(producer, error, "moving the group's offsets in a Kafka transaction") from error
        self._note_slow(taken, "moving the group's offsets")
        events.emit("kafka.transaction.offsets_sent", transactional_id=self._name)

    def commit(self) -> None:
        """Make everything sent visible at once to read_committed readers.

        On a crash: all or nothing; read which from Kafka. Source: KIP-98; the quarantine rule of DESIGN.md.
        """
        producer = self._ready()
        producer.flush()
        events.emit("kafka.transaction.flushed", transactional_id=self._name)
        events.emit("kafka.transaction.committing", transactional_id=self._name)
        # Timed alone, after the flush: a flush within the timing is slow for honest reasons in 5 % of the batches.
        try:
            taken = bounded(producer.client.commit_transaction, _CALL_TIMEOUT)
        except KafkaException as error:
            raise self._doubted(producer, error, "committing a Kafka transaction") from error
        self._note_slow(taken, "a commit")
        if self._late:
            self.doubt(self._late)
        events.emit("kafka.transaction.committed", transactional_id=self._name)

    def abort(self) -> None:
        """Give up the open transaction, so that readers need not wait for its timeout; the producer goes with it."""
        if self._producer is None:
            return
        self.doubt("a transaction was aborted")
        try:
            self._producer.client.purge()
            bounded(self._producer.client.abort_transaction, _ABORT_TIMEOUT)
            events.emit("kafka.transaction.aborted", transactional_id=self._name)
        except KafkaException as error:
            self._leave_alone(self._producer, error)
            _log.debug("%s: abort: %s; the next producer ends the transaction.", self._name, error)
            self.found_fenced = self.found_fenced or isinstance(classify(error, "aborting"), Fenced)

    def doubt(self, why: str) -> None:
        """Replace the producer at the next `make_ready`."""
        self._doubt = self._doubt or why

    def limit_request(self, size: int) -> bool:
        """Keep requests below a topic's limit, in bytes; True when that needs a new producer.

        A request of several small records that exceeds the limit fails them all, 100 good ones at once.
        """
        if not lower_batch_size(self._config, size):
            return False
        self.doubt(f"its requests must be below {size} bytes for a topic's max.message.bytes")
        return True

    def close(self) -> None:
        """End the client; an open transaction is aborted by Kafka, at the latest after its timeout."""
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.close()

    def _note_slow(self, taken: float, what: str) -> None:
        # Noted and not yet a doubt: a second copy within this transaction changes nothing, it may go on to its commit.
        if taken >= self._quarantine_after:
            self._late = f"{what} took {taken * 1000:.0f} ms, so a request may have been sent twice"

    def _ready(self) -> BatchProducer:
        if self._producer is None or self._doubt:
            raise RuntimeError("make_ready() comes first")
        return self._producer

    def _discard(self) -> None:
        self._late = ""
        if self._producer is None:
            self._doubt = ""
            return
        self.close()
        self.replaced += 1
        _log.info("%s: producer replaced (%d so far): %s; nothing is lost.", self._name, self.replaced, self._doubt)
        events.emit("kafka.producer.replaced", transactional_id=self._name, why=self._doubt, count=self.replaced)
        self._doubt = ""

    def _doubted(self, producer: BatchProducer, error: KafkaException, what: str) -> EoError:
        self.doubt(f"{what} failed: {kafka_error(error).str()}")
        self._leave_alone(producer, error)
        return producer.call_failed(error, f"{what} as {self._name}")

    def _leave_alone(self, producer: BatchProducer, error: KafkaException) -> None:
        # Closing it would wait for the call that does not come back. Of what it may still send the next one's epoch is
        # the fence.
        producer.broken = producer.broken or isinstance(error, NoReturn)

    def _initialise(self, producer: BatchProducer) -> None:
        deadline = clock.monotonic() + _CALL_TIMEOUT
        while True:
            try:
                producer.client.init_transactions(_INIT_SLICE)
                return
            except KafkaException as error:
                self._judge_init(error, producer, late=clock.monotonic() > deadline)

    def _judge_init(self, error: KafkaException, producer: BatchProducer, *, late: bool) -> None:
        fault = kafka_error(error)
        if fault.code() in _FORBIDDEN:
            raise ConfigurationError(
                f"Kafka refuses the transactional id {self._name}: {fault.str()}.",
                remedy=f"Grant WRITE and DESCRIBE on transactional ids with the prefix {_prefix(self._name)} "
                "to this principal.",
            ) from error
        if fault.code() == KafkaError.INVALID_TRANSACTION_TIMEOUT:
            # Said again at every start until somebody changes a setting: to retry it would look like an outage.
            raise ConfigurationError(
                f"Kafka refuses transactions of {self._config['transaction.timeout.ms']} ms, as {self._name} asks.",
                remedy="Lower EO_TRANSACTION_TIMEOUT (for a transform EO_TRANSFORM_TRANSACTION_TIMEOUT), or raise the "
                "brokers' transaction.max.timeout.ms.",
            ) from error
        if not fault.retriable() or late or self._stopping():
            found = producer.call_failed(error, f"starting the producer {self._name}")
            if isinstance(found, RestartNeeded) or fault.retriable():
                trouble = f" ({producer.trouble})" if producer.trouble else ""
                raise Retryable(f"{found.what}{trouble}") from error
            raise found from error


def _prefix(transactional_id: str) -> str:
    """What all ids of one kind begin with: `eo.relay.`, `eo.transform.`, `eo.producer.`."""
    return f"{'.'.join(transactional_id.split('.')[:2])}."
