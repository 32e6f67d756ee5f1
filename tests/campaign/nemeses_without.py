"""Protections taken out of a process under test: whoever claims to see what they prevent must see it then."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from uuid import UUID

from sqlalchemy import Connection, text

from eoframework.checkpoint import Checkpoint
from eoframework.db import shards as relay_claim
from eoframework.db.pending import PendingRows
from eoframework.db.position import Claim, Positions, Stream
from eoframework.db.processed import ProcessedMessages

_UNFENCED = text(
    "UPDATE eo.position SET next_offset = :to WHERE consumer_id = :consumer AND topic_id = :topic AND partition = :p"
)


def remove(name: str) -> None:
    """Without "ids": no processed id is recorded; "fence": whoever comes may write; "checkpoint": what Kafka knows of
    the last batch is not asked. Raises KeyError for another name.
    """
    {"ids": _ids, "fence": _fence, "checkpoint": _checkpoint}[name]()


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
