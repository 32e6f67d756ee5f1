"""A producer that counts what Kafka refused and knows when all of a batch is confirmed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from eoframework import clock
from eoframework.errors import Abortable, ConfigurationError, EoError, Permanent, Retryable
from eoframework.kafka.delivery import OF_THE_RECORD, Ticket, report
from eoframework.kafka.faults import classify, is_topic_trouble, kafka_error

_log = logging.getLogger(__name__)

# Between slices a failed batch is noticed; a good one ends its slice early.
_FLUSH_SLICE = 0.02
_FLUSH_DEADLINE = 30.0

# A request carries more than its records; the limit of a topic counts that too.
REQUEST_SHARE = 0.97
# What a failing transaction does to the messages that waited in it: an effect, never the cause.
_PURGED = frozenset({KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT})


class Rejected(Permanent):
    """Kafka refuses something in this batch; which record it is, a batch cannot tell."""

    def __init__(self, what: str, *, topic: str | None, topic_trouble: bool, kind: str) -> None:
        """`kind` is Kafka's name of the error, such as MSG_SIZE_TOO_LARGE."""
        super().__init__(what)
        self.kind = kind
        self.topic = topic
        self.topic_trouble = topic_trouble


class Outgoing(NamedTuple):
    """One record to be produced; without a partition its key decides."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, str | bytes | None]]
    partition: int = -1
    ticket: Ticket | None = None
    """Told what became of it, by a producer with `reports`."""


class BatchProducer:
    """An idempotent producer used batch by batch, from one thread."""

    def __init__(self, config: Mapping[str, Any], *, stopping: Callable[[], bool], reports: bool = False) -> None:
        self._stopping = stopping
        self._reports = reports
        self._first_fault: tuple[KafkaError, str | None] | None = None
        self._faults = 0
        self.trouble = ""
        self.broken = False
        # By default only failures: 2,000 callbacks a batch that say "fine" would cost more than the batch.
        only_faults = {"delivery.report.only.error": not reports}
        told = {"on_delivery": self._on_delivery, "error_cb": self._on_error}
        try:
            self.client = Producer({**config, **only_faults, **told})
        except KafkaException as error:
            text = kafka_error(error).str()
            raise ConfigurationError(f"Kafka's settings: {text}.", remedy="Correct EO_KAFKA_*.") from error

    def send(self, records: Iterable[Outgoing]) -> None:
        """Queue records, in their order. Raises Rejected when the client itself refuses one."""
        produce = self.client.produce
        for record in records:
            topic, key, value, headers, partition, ticket = record
            try:
                if ticket is None:
                    produce(topic, value, key, partition, headers=headers)
                else:
                    self._produce(record)
            except BufferError:
                self._send_when_there_is_room(record)
            except (KafkaException, TypeError, ValueError) as error:
                raise self._refused(error, record.topic) from error

    def _send_when_there_is_room(self, record: Outgoing) -> None:
        while True:
            self._flush_slice()
            self._raise_fault()
            try:
                self._produce(record)
                return
            except BufferError:
                continue
            except (KafkaException, TypeError, ValueError) as error:
                raise self._refused(error, record.topic) from error

    def _produce(self, record: Outgoing) -> None:
        told = None if record.ticket is None else partial(self._tell, record.ticket)
        self.client.produce(
            record.topic, record.value, record.key, record.partition, on_delivery=told, headers=record.headers
        )

    def _tell(self, ticket: Ticket, error: KafkaError | None, message: Message) -> None:
        self._on_delivery(error, message)
        if error is None or error.code() not in _PURGED:
            report(ticket, error, message)

    def _refused(self, error: Exception, topic: str) -> EoError:
        if isinstance(error, KafkaException):
            fault = self._reason(kafka_error(error))
            self.broken = self.broken or fault.fatal()
            return _fault(fault, topic)
        what = f"the Kafka client cannot send this record to {topic}: {error}."
        return Rejected(what, topic=topic, topic_trouble=False, kind=type(error).__name__)

    def _reason(self, fault: KafkaError) -> KafkaError:
        """Why the client is broken for good: `produce` only says that it is, the next poll raises the reason."""
        if fault.code() != KafkaError._FATAL:
            return fault
        try:
            self.client.poll(0)
        except KafkaException as told:
            return kafka_error(told)
        return fault

    def flush(self) -> None:
        """Wait until Kafka has confirmed every record queued.

        Raises Rejected, Retryable, Abortable or Fenced: then at least one record is not confirmed, and nothing is
        known of the others.
        """
        deadline = clock.monotonic() + _FLUSH_DEADLINE
        while self._flush_slice() > 0:
            self._raise_fault()
            if self._stopping():
                raise Retryable("stopped while Kafka had not confirmed the batch.")
            if clock.monotonic() > deadline:
                trouble = f" ({self.trouble})" if self.trouble else ""
                raise Retryable(f"Kafka did not confirm a batch within {_FLUSH_DEADLINE:g} s{trouble}.")
        self._raise_fault()

    def close(self) -> None:
        """Drop what is queued and end the client; never raises."""
        if self.broken:
            # Closing would try to abort a transaction that is no longer this producer's, and warn about it; its
            # threads end with the object all the same.
            return
        try:
            self.client.purge()
            # It aborts what is open, and where a call goes on inside the client it warns that it cannot; whoever comes
            # next ends that transaction. Not closed, the client would live as long as the traceback of what failed, and
            # go on asking for a producer id: that fences its own successor.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Producer abort_transaction failed", RuntimeWarning)
                self.client.close()
        except (KafkaException, RuntimeError) as error:
            _log.debug("closing a Kafka producer: %s", error)

    def call_failed(self, error: KafkaException, what: str) -> EoError:
        """The error for a failed call of the client (not of one record)."""
        fault = kafka_error(error)
        self.broken = self.broken or fault.fatal()
        if is_topic_trouble(fault):
            text = f"{what}: {fault.name()}: {fault.str()}."
            return Rejected(text, topic=None, topic_trouble=True, kind=fault.name())
        return classify(fault, what)

    def _flush_slice(self) -> int:
        try:
            return self.client.flush(_FLUSH_SLICE)
        except KafkaException as error:
            raise self.call_failed(error, "sending a batch") from error

    def _raise_fault(self) -> None:
        if self._first_fault is None:
            return
        (error, topic), count = self._first_fault, self._faults
        self._first_fault, self._faults = None, 0
        fault = _fault(error, topic)
        _log.debug("Kafka refused %d records of a batch; the first: %s", count, fault)
        raise fault

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        if error is None or error.code() in _PURGED:
            return
        self._faults += 1
        if self._first_fault is None:
            self._first_fault = (error, message.topic())

    def _on_error(self, error: KafkaError) -> None:
        if error.code() != KafkaError._ALL_BROKERS_DOWN:
            self.trouble = error.str()


def _fault(error: KafkaError, topic: str | None) -> EoError:
    what = f"sending to {topic}"
    trouble = is_topic_trouble(error)
    if trouble or error.code() in OF_THE_RECORD:
        text = f"{what}: {error.name()}: {error.str()}."
        return Rejected(text, topic=topic, topic_trouble=trouble, kind=error.name())
    found = classify(error, what)
    return Abortable(found.what) if isinstance(found, Permanent) else found


class IdempotentProducer:
    """Batches without Kafka transactions, for clusters that have none; the same calls as TransactionalProducer.

    Guarantee: at least once. After a crash, and after an error, records of the batch may be in Kafka already; they are
    sent again, with the same message ids.
    """

    def __init__(self, config: Mapping[str, Any], *, stopping: Callable[[], bool]) -> None:
        self._config = dict(config)
        self._stopping = stopping
        self._producer: BatchProducer | None = None
        self._doubted = False

    def make_ready(self) -> None:
        """Have a producer without a failed batch in it."""
        if self._doubted:
            self.close()
        if self._producer is None:
            self._producer = BatchProducer(self._config, stopping=self._stopping)
        self._doubted = False

    def begin(self) -> None:
        """Nothing to open."""

    def send(self, records: Iterable[Outgoing]) -> None:
        """Queue records."""
        assert self._producer is not None
        self._producer.send(records)

    def commit(self) -> None:
        """Wait until Kafka has confirmed all that was sent."""
        assert self._producer is not None
        self._producer.flush()

    def abort(self) -> None:
        """Forget what is queued; what was sent stays sent."""
        self.doubt("a batch failed")

    def doubt(self, why: str) -> None:
        """Replace the producer at the next `make_ready`."""
        _log.debug("idempotent producer is to be replaced: %s", why)
        self._doubted = True

    def limit_request(self, size: int) -> bool:
        """Keep requests below a topic's limit, in bytes; True when that needs a new producer."""
        if not lower_batch_size(self._config, size):
            return False
        self.doubt(f"requests must be below {size} bytes")
        return True

    def close(self) -> None:
        """End the client."""
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.close()


def lower_batch_size(config: dict[str, Any], size: int) -> bool:
    """Set `batch.size` to at most `size` bytes; whether that changed anything."""
    if size >= int(config.get("batch.size", 1_000_000)):
        return False
    config["batch.size"] = size
    return True
