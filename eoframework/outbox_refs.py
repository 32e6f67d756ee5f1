"""How a message of the outbox is named, and a place in a list of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from uuid import UUID

from eoframework.db.outbox_desk import OutboxState, Place
from eoframework.errors import NotFound


def parse(ref: str) -> tuple[OutboxState, int, UUID | None]:
    """The state and the number, or a message id, which does not say its state. Raises NotFound for anything else."""
    if ref.isascii() and ref.isdecimal():
        return "dead", int(ref), None
    states: tuple[OutboxState, ...] = ("delayed", "pending")
    for state in states:
        number = ref.removeprefix(f"{state}/")
        if number != ref and number.isascii() and number.isdecimal():
            return state, int(number), None
    try:
        return "dead", 0, UUID(ref)
    except ValueError as error:
        raise NotFound(
            f"{ref!r} names no outbox message.",
            remedy="Give a dead letter's number, delayed/SEQ, pending/SEQ or a message id, as eo outbox ls shows them.",
        ) from error


def cursor_of(place: Place) -> str:
    """The place as text, for `place_of`."""
    return "~".join(part.isoformat() if isinstance(part, datetime) else str(part) for part in place)


_PARTS: dict[OutboxState, tuple[Callable[[str], object], ...]] = {
    "dead": (int,),
    "delayed": (int, datetime.fromisoformat, int),
    "pending": (int, int),
}


def place_of(state: OutboxState, cursor: str) -> Place:
    """The place that `cursor_of` made text of. Raises NotFound for anything else."""
    parts = cursor.split("~")
    try:
        if len(parts) != len(_PARTS[state]):
            raise ValueError("too few or too many parts")
        return tuple(read(part) for read, part in zip(_PARTS[state], parts, strict=True))
    except ValueError as error:
        raise NotFound(
            f"{cursor!r} is no place in the list of {state} messages.", remedy="Copy it from the page before."
        ) from error
