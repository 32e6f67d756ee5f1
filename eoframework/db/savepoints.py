"""Messages published in a Session, kept until its transaction ends, and dropped with the savepoint they belong to.

SQLAlchemy tells about the end of a savepoint in two steps: `after_commit` only when it was released, then
`after_transaction_end` in any case. What was published inside is handed to the enclosing transaction at the first, and
what is still there at the second was rolled back.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from eoframework.message import OutboxMessage

_place = itertools.count()


def next_place() -> int:
    """A number that grows with every message published in this process: the order inside one transaction."""
    return next(_place)


@dataclass(slots=True)
class Pending:
    """A published message, and the savepoint it vanishes with (None: only with the whole transaction)."""

    message: OutboxMessage
    savepoint: SessionTransaction | None
    place: int


class SessionBuffer:
    """The messages published in one Session so far; follows the Session's savepoints."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._pending: list[Pending] = []
        self._listening = False

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, message: OutboxMessage) -> int:
        """Keep `message` until the current savepoint is rolled back; returns its place among all."""
        savepoint = self._session.get_nested_transaction()
        # Listening costs more than a message; without a savepoint there is nothing to listen for.
        if savepoint is not None and not self._listening:
            event.listen(self._session, "after_commit", self._released)
            event.listen(self._session, "after_transaction_end", self._ended)
            self._listening = True
        place = next_place()
        self._pending.append(Pending(message, savepoint, place))
        return place

    def take(self) -> list[Pending]:
        """Everything that was not rolled back, in the order of publishing; the buffer is empty afterwards."""
        taken, self._pending = self._pending, []
        return taken

    def drop(self) -> None:
        """Forget everything: the whole transaction was rolled back."""
        self._pending = []

    def _released(self, session: Session) -> None:
        savepoint = session.get_nested_transaction()
        if savepoint is None:
            return
        outer = _enclosing_savepoint(savepoint)
        for pending in self._pending:
            if pending.savepoint is savepoint:
                pending.savepoint = outer

    def _ended(self, _session: Session, transaction: SessionTransaction) -> None:
        self._pending = [pending for pending in self._pending if pending.savepoint is not transaction]


def _enclosing_savepoint(savepoint: SessionTransaction) -> SessionTransaction | None:
    # Between two savepoints there may be the Session's own bookkeeping transactions (a flush in progress).
    outer = savepoint.parent
    while outer is not None and not outer.nested:
        outer = outer.parent
    return outer
