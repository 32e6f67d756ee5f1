"""Statements that change data on other engines than the one a handler's transaction is on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, event

# What only reads may go anywhere; it sees nothing of the handler's own transaction, but nothing is doubled by it.
_WRITES = re.compile(
    r"\s*(INSERT|UPDATE|DELETE|MERGE|TRUNCATE|COPY|CREATE|DROP|ALTER|CALL|WITH\b.*\b(INSERT|UPDATE|DELETE))\b",
    re.I | re.S,
)


class Elsewhere:
    """Tells of each such statement that goes through SQLAlchemy, on the thread and in the call that runs it."""

    def __init__(self, engine: Callable[[], Engine | None], told: Callable[[str], None]) -> None:
        """engine: the one that is not told of."""
        self._engine = engine
        self._told = told

    def listen(self) -> None:
        """Begin, for all engines there are and will be."""
        event.listen(Engine, "before_cursor_execute", self._on_statement)

    def close(self) -> None:
        """Tell of nothing any more."""
        event.remove(Engine, "before_cursor_execute", self._on_statement)

    def _on_statement(self, connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not _WRITES.match(statement):
            return
        own = self._engine()
        # By the pool: engines with other options share one.
        if own is None or connection.engine.pool is not own.pool:
            self._told(" ".join(statement.split()))
