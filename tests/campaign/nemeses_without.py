"""Protections taken out of a process under test: whoever claims to see what they prevent must see it then."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from uuid import UUID

from confluent_kafka import KafkaException
from sqlalchemy import Connection, text

from eoframework.checkpoint import Checkpoint
from eoframework.db import shards as relay_claim
from eoframework.db.pending import PendingRows
from eoframework.db.position import Claim, Positions, Stream
from eoframework.db.processed import ProcessedMessages
from eoframework.kafka import transaction

_UNFENCED = text(
    "UPDATE eo.position SET next_offset = :to WHERE consumer_id = :consumer AND topic_id = :topic AND partition = :p"
)


def remove(name: str) -> None:
    """Without "ids": no processed id is recorded; "fence": whoever comes may write; "checkpoint": what Kafka knows of
    the last batch is not asked; "quarantine": a producer whose request may have been sent twice goes on, also after an
    abort. Raises KeyError for another name.
    """
    {"ids": _ids, "fence": _fence, "checkpoint": _checkpoint, "quarantine": _quarantine}[name]()


def _ids() -> None:
    def claim(_self: ProcessedMessages, _connection: Connection, _consumer: int, ids: Collection[UUID]) -> set[UUID]:
        return set(ids)

    ProcessedMessages.claim = claim  # type: ignore[method-assign,assignment]
    _fence()


def _fence() -> None:
    def advance(
        _self: Positions, connection: Connection, stream: Stream, claims: Iterable[Claim], to: Mapping[int, int]
    ) -> set[int]:
        for claim in claims:
            values = {"to": to[claim.partition], "consumer": stream.consumer_id, "topic": stream.topic_id}
            connection.execute(_UNFENCED, {**values, "p": claim.partition})
        return set()

    Positions.advance = advance  # type: ignore[method-assign,assignment]


def _checkpoint() -> None:
    def keep_rows(self: PendingRows, claim: relay_claim.Claim, checkpoint: Checkpoint) -> None:
        """As if the last batch had never been published: its rows stay, and are sent again."""
        with self._shards.writing(f"{claim}: forget") as connection:
            self._count_batch(connection, claim, checkpoint.batch_no - 1, checkpoint.batch_no)

    PendingRows.remove_published = keep_rows  # type: ignore[method-assign]


def _quarantine() -> None:
    def abort_and_keep(producer: transaction.TransactionalProducer) -> None:
        if producer._producer is None or producer._doubt:
            return
        # Nothing may be in flight: librdkafka would otherwise raise the epoch by itself, which is a protection too.
        client = producer._producer.client
        client.flush(5)
        with suppress(KafkaException):  # asked twice, the second time nothing is open
            client.abort_transaction(10)

    transaction._QUARANTINE_SHARE = float("inf")
    transaction.TransactionalProducer.abort = abort_and_keep  # type: ignore[method-assign,assignment]
