"""Reading a stretch of a topic again, beside the group that lives on it: no member, no commits."""

from __future__ import annotations

import logging
from collections.abc import Generator
from types import TracebackType

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as ClientMessage

from eoframework import clock
from eoframework.errors import NotFound, Retryable
from eoframework.kafka.config import offset_reader_config
from eoframework.kafka.faults import classify, kafka_error
from eoframework.kafka.records import record_of
from eoframework.message import Record
from eoframework.settings import Settings

_log = logging.getLogger(__name__)

_TIMEOUT = 15.0
_SLICE = 0.1
_STALLED = 60.0
_GONE = frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION, KafkaError.OFFSET_OUT_OF_RANGE})


class RangeReader:
    """Hands out the committed records of a stretch, each once and in order; used from one thread.

    Nothing it has taken from the client is ever asked for again: after any error reading is over, so no record can be
    lost between the client's position and ours. Whoever wants to go on makes a new one.
    """

    def __init__(self, settings: Settings, topic: str, *, group: str) -> None:
        """`group` only names the rights; it is not joined."""
        self._topic = topic
        # Slow handlers and --rate keep it waiting for longer than a member may be; nobody counts on its polls.
        patient = {"max.poll.interval.ms": 86_400_000}
        self._consumer = Consumer(offset_reader_config(settings, group=group) | patient)

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._consumer.close()

    def edges(self, partition: int) -> tuple[int, int]:
        """The first offset kept, and the end of what is committed: before the first transaction still open."""
        where = TopicPartition(self._topic, partition)
        try:
            found = self._consumer.get_watermark_offsets(where, timeout=_TIMEOUT, cached=False)
        except KafkaException as error:
            raise classify(error, f"asking for the log ends of {self._topic}[{partition}]") from error
        if found is None or min(found) < 0:
            raise Retryable(f"Kafka did not tell the log ends of {self._topic}[{partition}].")
        return found

    def offset_at(self, partition: int, milliseconds: int) -> int | None:
        """The first offset of that time or later (milliseconds since the epoch), None if all are earlier."""
        asked = [TopicPartition(self._topic, partition, milliseconds)]
        try:
            (found,) = self._consumer.offsets_for_times(asked, timeout=_TIMEOUT)
        except KafkaException as error:
            raise classify(error, f"looking up a time in {self._topic}[{partition}]") from error
        if found.error is not None:
            raise classify(found.error, f"looking up a time in {self._topic}[{partition}]")
        return found.offset if found.offset >= 0 else None

    def read(self, partition: int, start: int, end: int, *, limit: int) -> Generator[list[Record], None, None]:
        """The records of offsets `start` to `end` (exclusive, at most the end of what is committed), in lists.

        Raises NotFound when Kafka deleted some of them meanwhile, Retryable when it hands out nothing for a minute.
        """
        if start >= end:
            return
        here = TopicPartition(self._topic, partition, start)
        deadline, reached = clock.monotonic() + _STALLED, start
        try:
            self._consumer.assign([here])
            # Not until a record of `end` comes: markers and compaction leave offsets without one, and the last of them
            # may lie just before `end`. The client's position passes them.
            while reached < end:
                records = [record for record in self._take(limit) if record.offset < end]
                if records:
                    yield records
                place = self._consumer.position([here])[0].offset
                if records or place > reached:
                    deadline, reached = clock.monotonic() + _STALLED, max(reached, place)
                elif clock.monotonic() > deadline:
                    raise Retryable(f"Kafka handed out nothing of {here.topic}[{partition}] from {reached} on.")
        except KafkaException as error:
            raise classify(error, f"reading {self._topic}[{partition}]") from error
        finally:
            self._consumer.unassign()

    def _take(self, limit: int) -> list[Record]:
        first = self._consumer.poll(_SLICE)
        rest = self._consumer.consume(limit - 1, 0) if first is not None and limit > 1 else []
        messages = [message for message in (first, *rest) if message is not None]
        return [record_of(message) for message in messages if self._is_record(message)]

    def _is_record(self, message: ClientMessage) -> bool:
        fault = message.error()
        if fault is None:
            return True
        if fault.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
            return False  # the client looks for the coordinator of the group it has to be given, and joins none
        if fault.code() in _GONE:
            raise NotFound(
                f"{self._topic}[{message.partition()}]: records were deleted while they were read ({fault.str()}).",
                remedy="Begin again at a later offset, or with --from earliest.",
            )
        error = classify(kafka_error(fault), f"reading {self._topic}[{message.partition()}]")
        if not isinstance(error, Retryable):
            raise error
        _log.warning("%s The client tries again by itself; nothing is skipped.", error)
        return False
