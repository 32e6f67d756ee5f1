"""All that the checker judges: what was sent, what stands in the topics, what stands in the database. Plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from tests.campaign import ledger_rules as rules
from tests.campaign.history import Operation, Outcome

Topic = Literal["entries", "steps", "settled", "crumbs", "dead"]
Place = tuple[str, int]
"""A consumer or topic, and a partition."""
SOURCES: Mapping[str, Topic] = {"book": "entries", "settle": "steps", "crumble": "settled"}


class Send(NamedTuple):
    """One message the harness sent, and what it was told."""

    n: int
    outcome: Outcome


class Read(NamedTuple):
    """One record of a topic, read by nobody's consumer group."""

    partition: int
    offset: int
    key: str | None
    id: str | None
    """The message id as the database has it."""
    item: int
    crumb: int = 0


class Effect(NamedTuple):
    """One row that a handler wrote."""

    consumer: str
    partition: int
    offset: int
    id: str | None
    key: str
    item: int
    amount: int
    xid: int


class Account(NamedTuple):
    """What a handler keeps about a key: a sum and a list, each read before it was written."""

    balance: int
    items: tuple[int, ...]


class Published(NamedTuple):
    """One row that was committed to the outbox, seen by a trigger."""

    id: str
    topic: str
    xid: int


class Moved(NamedTuple):
    """One change of a position row, in the order of their commits."""

    consumer: str
    partition: int
    epoch: int
    next_offset: int
    xid: int


class Letter(NamedTuple):
    """One dead letter of a handler."""

    consumer: str
    partition: int
    offset: int


class Sample(NamedTuple):
    """While it ran: the group's offset, and the position that was read after it."""

    consumer: str
    partition: int
    offset: int
    position: int


@dataclass(frozen=True)
class Snapshot:
    """Everything, after the drain."""

    sends: tuple[Send, ...] = ()
    committed: Mapping[str, tuple[Read, ...]] = field(default_factory=dict)
    """By topic: what a read_committed reader sees, partition by partition in the order of offsets."""
    uncommitted: Mapping[str, tuple[Read, ...]] = field(default_factory=dict)
    """What a read_uncommitted reader sees: the aborted ones too."""
    effects: tuple[Effect, ...] = ()
    accounts: Mapping[tuple[str, str], Account] = field(default_factory=dict)
    processed: Mapping[str, frozenset[str]] = field(default_factory=dict)
    published: tuple[Published, ...] = ()
    moves: tuple[Moved, ...] = ()
    letters: tuple[Letter, ...] = ()
    positions: Mapping[Place, int] = field(default_factory=dict)
    """Where each consumer stands: its position row, or, of the transform, its group's offset."""
    group_offsets: Mapping[Place, int] = field(default_factory=dict)
    ends: Mapping[Place, int] = field(default_factory=dict)
    """By topic and partition: the offset after the last record that a read_committed reader gets."""
    samples: tuple[Sample, ...] = ()
    drained_after: float | None = 0.0
    """Seconds from the end of the faults until nothing was left to do; None: not within the limit."""
    open_transactions: tuple[str, ...] = ()
    """Of the server after every process has ended; and partitions that an open Kafka transaction holds up."""
    leaks: Mapping[str, int] = field(default_factory=dict)
    """What is left over, by name: rows, connections, processes."""

    def effects_of(self, consumer: str) -> list[Effect]:
        return [effect for effect in self.effects if effect.consumer == consumer]

    def accounts_of(self, consumer: str) -> dict[str, Account]:
        """By key."""
        return {key: account for (name, key), account in self.accounts.items() if name == consumer}

    def first_deliveries(self, consumer: str) -> list[Read]:
        """Of what is in the consumer's topic: each message once, where it stands for the first time."""
        seen: set[str] = set()
        found = []
        for read in self.committed.get(SOURCES[consumer], ()):
            if read.id is None or read.id not in seen:
                found.append(read)
            if read.id is not None:
                seen.add(read.id)
        return found

    def due(self, consumer: str) -> list[Read]:
        """The deliveries that must have had their effect."""
        return [read for read in self.first_deliveries(consumer) if not rules.poison(consumer, read.item)]

    def poisoned(self, consumer: str) -> list[Read]:
        """The deliveries that must be dead letters."""
        return [read for read in self.first_deliveries(consumer) if rules.poison(consumer, read.item)]


def by_key(reads: Iterable[Read]) -> dict[str | None, list[Read]]:
    """The reads of each key, in their order."""
    found: dict[str | None, list[Read]] = {}
    for read in reads:
        found.setdefault(read.key, []).append(read)
    return found


def sends(operations: Iterable[Operation]) -> tuple[Send, ...]:
    """What was sent, from the history: each message with what was learnt of it."""
    found = []
    for operation in operations:
        if operation.what not in ("send", "abort"):
            continue
        told = operation.told
        for n in operation.fields["messages"]:
            outcome: Outcome = "unknown" if n in told.get("unknown", ()) else operation.outcome
            found.append(Send(n, outcome))
    return tuple(found)
