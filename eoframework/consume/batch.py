"""What goes into and comes out of one batch: plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from eoframework.db.parking import Lane
from eoframework.db.position import Claim
from eoframework.errors import Retryable
from eoframework.external import Results
from eoframework.message import Message, Record

Place = tuple[int, int]
"""Partition and offset."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A record, and what it means: a message, or the reason why it is not to be run."""

    record: Record
    lane: Lane
    id: UUID | None = None
    message: Message[object] | None = None
    error: Exception | None = None
    """It cannot be decoded, or it failed alone a moment ago: the handler is not called for it."""
    attempts: int = 0
    """How often the handler has failed on it before."""
    crashes: int = 0
    """How often it was in flight when its process died."""
    external: Results = field(default_factory=dict)
    """What the handler's calls outside the database have returned."""

    @property
    def place(self) -> Place:
        return self.record.partition, self.record.offset

    def failed(self, error: Exception) -> Delivery:
        """The same, known to fail."""
        return replace(self, error=error)

    def counted(self, attempts: int, crashes: int) -> Delivery:
        """The same, with what is known of earlier attempts."""
        message = self.message and replace(self.message, attempt=attempts + 1)
        return replace(self, message=message, attempts=attempts, crashes=crashes)


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

    def only(self, deliveries: Sequence[Delivery], moved: Mapping[int, int]) -> Batch:
        """A part of this batch, after the partitions have moved on as `moved` says."""
        touched = {delivery.record.partition for delivery in deliveries}
        claims = {p: c.moved(moved.get(p, c.next_offset)) for p, c in self.claims.items() if p in touched}
        return Batch(deliveries, claims)


@dataclass(frozen=True, slots=True)
class Failure:
    """A message that its partition cannot get past."""

    record: Record
    error: Exception
    retry_in: float | None = None
    """Seconds until it is tried again; None: a person must look."""


@dataclass(slots=True)
class Outcome:
    """What became of a batch. Whatever is not in `moved` did not happen and is fetched again."""

    moved: dict[int, int] = field(default_factory=dict)
    """Committed: partition -> next offset, as the position row now says."""
    failed: dict[int, Failure] = field(default_factory=dict)
    """Partitions that stop, or wait, at a message."""
    fenced: set[int] = field(default_factory=set)
    """Partitions whose row is no longer ours; nothing was written."""
    trouble: Retryable | None = None
    """Why the rest has to run again: a conflict, or a lost connection whose outcome only the row can tell."""
    error: Exception | None = None
    """Why one unit of work was rolled back: some message of it failed."""
    at: Place | None = None
    """The message that the handler was called for then."""
    culprits: dict[Place, Exception] = field(default_factory=dict)
    """Which ones, where that is known."""
    cut: bool = False
    """Time was up: only a part was run."""
    messages: int = 0
    duplicates: int = 0
    parked: int = 0
    """Set aside in this unit of work, or put behind what was."""
    dead: int = 0

    def add(self, other: Outcome) -> None:
        """Take in what became of a later part of the same batch."""
        self.moved.update(other.moved)
        self.failed.update(other.failed)
        self.fenced |= other.fenced
        self.trouble = other.trouble or self.trouble
        self.messages += other.messages
        self.duplicates += other.duplicates
        self.parked += other.parked
        self.dead += other.dead

    def stops(self, partition: int) -> bool:
        """Whether nothing more of this partition may run now."""
        return partition in self.failed or partition in self.fenced


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
