"""What goes into and comes out of one batch: plain values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from eoframework.db.position import Claim
from eoframework.errors import Retryable
from eoframework.message import Message, Record


@dataclass(frozen=True, slots=True)
class Delivery:
    """A record, and what it means: a message, or the reason why it means nothing."""

    record: Record
    message: Message[object] | None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Deliveries in the order they came, and the claims of exactly their partitions."""

    deliveries: Sequence[Delivery]
    claims: dict[int, Claim]

    def __str__(self) -> str:
        ends = self.ends
        return ", ".join(f"partition {p}: offsets {c.next_offset} to {ends[p] - 1}" for p, c in self.claims.items())

    @property
    def ends(self) -> dict[int, int]:
        """Where each partition stands once this batch is done."""
        return {delivery.record.partition: delivery.record.offset + 1 for delivery in self.deliveries}

    def only(self, deliveries: Sequence[Delivery], moved: dict[int, int]) -> Batch:
        """A part of this batch, after the partitions have moved on as `moved` says."""
        touched = {delivery.record.partition for delivery in deliveries}
        claims = {p: c.moved(moved.get(p, c.next_offset)) for p, c in self.claims.items() if p in touched}
        return Batch(deliveries, claims)


@dataclass(frozen=True, slots=True)
class Failure:
    """A message that failed alone: it blocks its partition."""

    record: Record
    error: Exception


@dataclass(slots=True)
class Outcome:
    """What became of a batch. Whatever is not in `moved` did not happen and is fetched again."""

    moved: dict[int, int] = field(default_factory=dict)
    """Committed: partition -> next offset, as the position row now says."""
    failed: dict[int, Failure] = field(default_factory=dict)
    fenced: set[int] = field(default_factory=set)
    """Partitions whose row is no longer ours; nothing was written."""
    trouble: Retryable | None = None
    """Why the rest has to run again: a conflict, or a lost connection whose outcome only the row can tell."""
    messages: int = 0
    duplicates: int = 0

    def add(self, other: Outcome) -> None:
        """Take in what became of a later part of the same batch."""
        self.moved.update(other.moved)
        self.failed.update(other.failed)
        self.fenced |= other.fenced
        self.trouble = other.trouble or self.trouble
        self.messages += other.messages
        self.duplicates += other.duplicates


def split_undecodable(deliveries: Iterable[Delivery]) -> tuple[list[Delivery], dict[int, Failure]]:
    """What can run, and the first undecodable record of each partition: nothing behind it may overtake it."""
    runnable: list[Delivery] = []
    failed: dict[int, Failure] = {}
    for delivery in deliveries:
        if delivery.record.partition in failed:
            continue
        if delivery.error is not None:
            failed[delivery.record.partition] = Failure(delivery.record, delivery.error)
        else:
            runnable.append(delivery)
    return runnable, failed
