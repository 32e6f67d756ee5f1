"""Recoveries taken out: whoever claims to see what they prevent must see it then."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from eoframework.consume.batch import Outcome
from eoframework.consume.ownership import Ownership
from eoframework.consume.worker import ConsumeWorker
from eoframework.db.pending import PendingRows
from eoframework.db.position import Claim, Positions
from eoframework.errors import LostConnection
from eoframework.kafka import transaction
from eoframework.kafka.consumer import GroupConsumer
from eoframework.message import Record
from eoframework.transform.worker import TransformWorker
from tests.campaign import nemeses_without


@contextmanager
def without(name: str) -> Iterator[None]:
    """Until the end of the block without

    "position": after a doubt the handler's worker believes what it knew before, and writes unguarded;
    "happened": it believes that its COMMIT had happened;
    "checkpoint": what Kafka knows of the relay's last batch is not asked;
    "offsets": a transform whose commit is in doubt does not ask where its group stands;
    "quarantine": a producer whose EndTxn may have been sent twice goes on.
    """
    kept: list[tuple[object, str]] = [
        (transaction, "_QUARANTINE_SHARE"),
        (PendingRows, "remove_published"),
        (Positions, "advance"),
        (Ownership, "_renew"),
    ]
    kept += [(ConsumeWorker, "_apply"), (TransformWorker, "_doubt"), (TransformWorker, "_where")]
    originals = [(owner, attribute, getattr(owner, attribute)) for owner, attribute in kept]
    try:
        if name:
            _OUT[name]()
        yield
    finally:
        for owner, attribute, original in originals:
            setattr(owner, attribute, original)


def _checkpoint() -> None:
    nemeses_without.remove("checkpoint")


def _position() -> None:
    nemeses_without.remove("fence")
    renew = Ownership._renew

    def believe(self: Ownership, partition: int, doubtful: Claim) -> Claim | None:
        # What was believed is kept from it: a row behind that would look like a database that was set back.
        renewed = renew(self, partition, replace(doubtful, next_offset=0))
        return None if renewed is None else self._hold(renewed.moved(doubtful.next_offset))

    Ownership._renew = believe  # type: ignore[method-assign]


def _happened() -> None:
    _position()
    apply = ConsumeWorker._apply

    def believe(self: ConsumeWorker, consumer: GroupConsumer, outcome: Outcome, records: list[Record]) -> None:
        if isinstance(outcome.trouble, LostConnection):
            for record in records:
                claim = self._ownership.claims[record.partition]
                self._ownership.claims[record.partition] = claim.moved(record.offset + 1)
        apply(self, consumer, outcome, records)

    ConsumeWorker._apply = believe  # type: ignore[method-assign]


def _offsets() -> None:
    doubt, where = TransformWorker._doubt, TransformWorker._where
    believed: dict[int, tuple[int, str]] = {}

    def remember(self: TransformWorker, consumer: GroupConsumer, trouble: Exception) -> None:
        believed.update({partition: (at.offset, at.mark.encode()) for partition, at in self._stands.items()})
        doubt(self, consumer, trouble)

    def believe(self: TransformWorker, partitions: list[int], *, timeout: float) -> dict[int, tuple[int, str] | None]:
        found = where(self, partitions, timeout=timeout)
        return {partition: believed.pop(partition, at) for partition, at in found.items()}

    TransformWorker._doubt = remember  # type: ignore[method-assign]
    TransformWorker._where = believe  # type: ignore[method-assign]


def _quarantine() -> None:
    transaction._QUARANTINE_SHARE = math.inf


_OUT = {
    "position": _position,
    "happened": _happened,
    "checkpoint": _checkpoint,
    "offsets": _offsets,
    "quarantine": _quarantine,
}
WITHOUT = tuple(_OUT)
