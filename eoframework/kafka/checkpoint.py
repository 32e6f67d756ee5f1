"""Reading the relay's checkpoints back: the last committed record of a partition of a compacted topic."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from eoframework import clock
from eoframework.checkpoint import Checkpoint, checkpoint_topic
from eoframework.errors import ConfigurationError, Retryable
from eoframework.kafka.admin import Admin
from eoframework.kafka.config import consumer_config
from eoframework.kafka.faults import classify, kafka_error
from eoframework.settings import Settings

_log = logging.getLogger(__name__)

_TIMEOUT = 15.0
# The client looks for the coordinator of the group it has to be given, although it joins none: sometimes before it is
# closed, so that a relay without a right on that group started or did not.
_NO_TROUBLE = frozenset({KafkaError._PARTITION_EOF, KafkaError.GROUP_AUTHORIZATION_FAILED})
_FIRST_LOOK = 16
_SLICE = 0.01
_WIDEN = 8


@dataclass(frozen=True, slots=True)
class CheckpointPlace:
    """Which cluster and which incarnation of the checkpoint topic; a re-created topic has another id."""

    cluster_id: str
    topic_id: UUID


class CheckpointLog:
    """The checkpoint topic of one outbox."""

    def __init__(self, settings: Settings, admin: Admin, outbox_id: UUID) -> None:
        self.outbox_id = outbox_id
        self.topic = checkpoint_topic(outbox_id)
        self._admin = admin
        self._config = consumer_config(settings, group=self.topic, client_id="eo-relay-checkpoint") | {
            "enable.partition.eof": True,
            # A second look would have to wait for the first one's fetch, which waits for records that will not come.
            "fetch.wait.max.ms": 10,
        }

    def cluster_id(self) -> str:
        """Which cluster this is."""
        return self._admin.cluster_id()

    def place(self, *, shards: int) -> CheckpointPlace:
        """Where the checkpoints are, after verifying that they are kept.

        Raises UnknownTopic, and ConfigurationError when the topic could lose a shard's last checkpoint.
        """
        info = self._admin.describe(self.topic, settings_optional=True)
        policy = info.config.get("cleanup.policy")
        if policy is None:
            _log.warning(
                "may not read the settings of %s; that it keeps the relay's checkpoints (cleanup.policy=compact) is "
                "not verified. Grant DESCRIBE_CONFIGS on it.",
                self.topic,
            )
        elif policy != "compact":
            raise ConfigurationError(
                f"checkpoint topic {self.topic} has cleanup.policy={policy}: Kafka would delete checkpoints by age.",
                remedy=f"Set cleanup.policy=compact on {self.topic} (eo topics apply does it).",
            )
        if info.partitions < shards:
            raise ConfigurationError(
                f"checkpoint topic {self.topic} has {info.partitions} partitions, the outbox has {shards} shards.",
                remedy=f"Add partitions to {self.topic}: one per shard.",
            )
        return CheckpointPlace(self._admin.cluster_id(), info.id)

    def last(self, shard: int) -> Checkpoint | None:
        """The last committed checkpoint of a shard, None when there never was one.

        Only right after `init_transactions()` of the shard's transactional.id: before, a transaction that is still
        open, or whose commit markers are on their way, would be overlooked.
        """
        with self._consumer() as consumer:
            low, high = self._range(consumer, shard)
            look = _FIRST_LOOK
            while high > low:
                start = max(low, high - look)
                value = self._last_between(consumer, shard, start, high)
                if value is not None:
                    return Checkpoint.decode(value)
                if start == low:
                    break
                # Aborted transactions and markers fill offsets that hold no record.
                look *= _WIDEN
        return None

    def _range(self, consumer: Consumer, shard: int) -> tuple[int, int]:
        found = consumer.get_watermark_offsets(TopicPartition(self.topic, shard), timeout=_TIMEOUT, cached=False)
        # Less than 0 is no offset: taken for one, a checkpoint that is there would be one that was never written.
        if found is None or min(found) < 0:
            raise Retryable(f"Kafka did not tell the log ends of {self.topic}[{shard}].")
        return found

    def _last_between(self, consumer: Consumer, shard: int, start: int, end: int) -> bytes | None:
        consumer.assign([TopicPartition(self.topic, shard, start)])
        deadline = clock.monotonic() + _TIMEOUT
        last: bytes | None = None
        while True:
            message = consumer.poll(_SLICE)
            if message is not None:
                error = message.error()
                if error is None:
                    last = message.value() or b""
                elif error.code() not in _NO_TROUBLE:
                    raise classify(error, f"reading {self.topic}[{shard}]")
            # Markers and aborted records move the position without handing anything over. An end before `end` is a
            # replica that lags: the checkpoint it does not have yet would be taken for one that was never written.
            (place,) = consumer.position([TopicPartition(self.topic, shard)])
            if place.offset >= end:
                return last
            if clock.monotonic() > deadline:
                raise Retryable(f"{self.topic}[{shard}] could not be read up to offset {end} within {_TIMEOUT:g} s.")

    @contextmanager
    def _consumer(self) -> Iterator[Consumer]:
        consumer = Consumer(self._config)
        try:
            yield consumer
        except KafkaException as error:
            raise classify(kafka_error(error), f"reading checkpoint topic {self.topic}") from error
        finally:
            consumer.close()
