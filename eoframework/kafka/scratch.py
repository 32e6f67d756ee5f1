"""Topics of a throw-away cluster: deleted and made again, filled, and read whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from eoframework.errors import Retryable
from eoframework.kafka.config import admin_config, sending_config
from eoframework.kafka.faults import classify, kafka_error
from eoframework.kafka.producer import BatchProducer, Outgoing
from eoframework.kafka.ranges import RangeReader
from eoframework.message import Record
from eoframework.settings import Settings

_TIMEOUT = 15.0
_AT_ONCE = 500
_READER = "eo.crashtest.reader"


def delete_topics(settings: Settings, names: Collection[str]) -> None:
    """Delete these topics and everything in them; those that are not there are no matter. Raises Retryable."""
    if not names:
        return
    client = AdminClient(admin_config(settings))
    for name, future in client.delete_topics(list(names), request_timeout=_TIMEOUT).items():
        try:
            future.result(_TIMEOUT)
        except KafkaException as error:
            if kafka_error(error).code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise classify(error, f"deleting topic {name}") from error
        except TimeoutError as error:
            raise Retryable(f"deleting topic {name}: no answer from Kafka.") from error


def send_all(settings: Settings, records: Iterable[Outgoing]) -> None:
    """Write these records, in their order for each key, and wait until they are there. Raises Rejected, Retryable."""
    producer = BatchProducer(sending_config(settings, client_id="eo-crashtest"), stopping=lambda: False)
    try:
        producer.send(records)
        producer.flush()
    finally:
        producer.close()


def read_all(settings: Settings, topic: str, partitions: int) -> list[Record]:
    """Everything that is committed in the topic, partition by partition."""
    found: list[Record] = []
    with RangeReader(settings, topic, group=_READER) as reader:
        for partition in range(partitions):
            first, end = reader.edges(partition)
            found += [record for some in reader.read(partition, first, end, limit=_AT_ONCE) for record in some]
    return found


def read_range(settings: Settings, topic: str, partitions: int, start: int, end: int) -> list[Record]:
    """The records of these offsets (`end` not included) in each partition, as far as they are there."""
    found: list[Record] = []
    with RangeReader(settings, topic, group=_READER) as reader:
        for partition in range(partitions):
            first, last = reader.edges(partition)
            stretch = reader.read(partition, max(first, start), min(last, end), limit=_AT_ONCE)
            found += [record for some in stretch for record in some]
    return found


def holds_records(settings: Settings, topic: str, partition: int, start: int, end: int) -> bool:
    """Whether there is anything between these offsets but the marks of transactions, or a transaction still open."""
    with RangeReader(settings, topic, group=_READER) as reader:
        _, committed = reader.edges(partition)
        return committed < end or any(reader.read(partition, start, end, limit=_AT_ONCE))
