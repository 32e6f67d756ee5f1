"""What the outbox desk hands back: pages, counts, and what was done with several messages."""

from __future__ import annotations

from dataclasses import dataclass, field

from eoframework.db.outbox_desk import OutboxLine, PutBack
from eoframework.errors import EoError


@dataclass(frozen=True, slots=True)
class OutboxPage:
    """Some of a list, in a fixed order: what is added meanwhile comes later and moves nothing."""

    items: tuple[OutboxLine, ...]
    after: str | None
    """What to give as `after` for the next page; None at the end."""


@dataclass(frozen=True, slots=True)
class OutboxCount:
    """How many there are, and up to which number: what comes later was not counted."""

    count: int
    up_to: int


@dataclass(frozen=True, slots=True)
class OutboxRefusal:
    """A dead letter that was left as it is, and why."""

    letter: OutboxLine
    why: EoError


@dataclass(slots=True)
class Retried:
    """What was done with several dead letters."""

    moved: list[PutBack] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)
    """Retried or discarded by somebody else in the meantime."""
    refused: list[OutboxRefusal] = field(default_factory=list)


@dataclass(slots=True)
class Discarded:
    """What was done with several messages."""

    lines: list[OutboxLine] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    """Retried or discarded by somebody else in the meantime, or due."""
