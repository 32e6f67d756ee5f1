"""A broker that is a file: the one thing about Kafka that matters here is that its outcome outlives every process.

A Kafka transaction is one line, written by one call, between two fsyncs; a line without an end is one that was not
committed. The relay's checkpoint is one of its records, as on a real broker. The transactional producer that writes to
it, and the relay, are the real ones; what is replaced is the client below them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import confluent_kafka

from eoframework.checkpoint import Checkpoint, checkpoint_topic
from eoframework.errors import EoError, Retryable
from eoframework.kafka.admin import TopicInfo
from eoframework.kafka.checkpoint import CheckpointPlace
from eoframework.kafka.producer import Outgoing, Rejected
from eoframework.settings import Settings

CLUSTER, CHECKPOINT_TOPIC_ID = "file", UUID(int=815)
REFUSED = b"refused"
"""In the value of a record that this broker does not take before it was healed."""


class LogFile:
    """The committed transactions: each a list of records."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def empty(self) -> None:
        self._path.write_bytes(b"")

    def append(self, records: list[dict[str, Any]]) -> None:
        """One transaction, all of it or nothing; it is on the disk when this returns."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.fsync(descriptor)
            os.write(descriptor, json.dumps(records).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def forget_the_unfinished(self) -> None:
        """What Kafka does for a new producer: a transaction that was never committed is aborted."""
        content = self._path.read_bytes()
        if content and not content.endswith(b"\n"):
            self._path.write_bytes(content[: content.rfind(b"\n") + 1])

    def transactions(self) -> list[list[dict[str, Any]]]:
        """What a read_committed reader sees."""
        return [json.loads(line) for line in self._path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


class FileClient:
    """The calls of confluent_kafka.Producer that TransactionalProducer makes itself."""

    def __init__(self, file: LogFile) -> None:
        self.file = file
        self.records: list[dict[str, Any]] | None = None

    def init_transactions(self, timeout: float) -> None:
        self.file.forget_the_unfinished()

    def begin_transaction(self) -> None:
        assert self.records is None, "a transaction within a transaction"
        self.records = []

    def commit_transaction(self, timeout: float) -> None:
        assert self.records is not None
        self.file.append(self.records)
        self.records = None

    def abort_transaction(self, timeout: float) -> None:
        self.records = None

    def purge(self) -> None:
        """Nothing is under way: `send` has done it."""


class FileProducer:
    """In the place of BatchProducer; refuses what `takes` does not let through, as a broker does: at the flush."""

    file: LogFile
    healed: Any = staticmethod(lambda: False)

    def __init__(self, config: Mapping[str, Any], *, stopping: object, reports: bool = False) -> None:
        self.client = FileClient(self.file)
        self.broken = False
        self.trouble = ""

    def send(self, records: Iterable[Outgoing]) -> None:
        assert self.client.records is not None
        for record in records:
            self.client.records.append(
                {
                    "topic": record.topic,
                    "key": None if record.key is None else record.key.decode(),
                    "value": None if record.value is None else record.value.decode(errors="replace"),
                    "partition": record.partition,
                }
            )

    def flush(self) -> None:
        for record in self.client.records or ():
            if REFUSED.decode() in (record["value"] or "") and not self.healed():
                what = f"sending to {record['topic']}: the record is not valid."
                raise Rejected(what, topic=record["topic"], topic_trouble=False, kind="INVALID_RECORD")

    def close(self) -> None:
        """An open transaction is gone with it."""

    def call_failed(self, error: confluent_kafka.KafkaException, what: str) -> EoError:
        return Retryable(f"{what}: {error}")


class FileAdmin:
    """Every topic exists and takes what a broker takes by default."""

    def describe(self, topic: str, **_: object) -> TopicInfo:
        return TopicInfo(topic, CHECKPOINT_TOPIC_ID, 4, 1, {"max.message.bytes": "1048588"}, {})


class FileCheckpoints:
    """In the place of CheckpointLog: the last checkpoint is the last one in a committed transaction."""

    file: LogFile

    def __init__(self, settings: Settings, admin: object, outbox_id: UUID) -> None:
        self.outbox_id = outbox_id
        self.topic = checkpoint_topic(outbox_id)
        self.shard_table = "eo.relay_shard"

    def cluster_id(self) -> str:
        return CLUSTER

    def place(self, *, shards: int) -> CheckpointPlace:
        return CheckpointPlace(CLUSTER, CHECKPOINT_TOPIC_ID)

    def last(self, shard: int) -> Checkpoint | None:
        found = None
        for records in self.file.transactions():
            for record in records:
                if record["topic"] == self.topic and record["partition"] == shard:
                    found = Checkpoint.decode(record["value"].encode())
        return found
