"""What a handler under test does outside its transaction: sentences that fail the test."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

from sqlalchemy import Engine, event

from eoframework.crashtest.user_watch import CALLING, Call, Callers, Calls, Globals, home_of

# What only reads may go anywhere; it sees nothing of the handler's own transaction, but nothing is doubled by it.
_WRITES = re.compile(
    r"\s*(INSERT|UPDATE|DELETE|MERGE|TRUNCATE|COPY|CREATE|DROP|ALTER|CALL|WITH\b.*\b(INSERT|UPDATE|DELETE))\b",
    re.I | re.S,
)


class Watch:
    """Sees what a function does while it is called for a message; `found` is empty if nothing would be doubled."""

    def __init__(self, function: Callable[..., object], engine: Engine, *, allowed: Collection[str] = ()) -> None:
        """engine: the test's own, whose transactions are the handler's. allowed: names of variables, and addresses."""
        home = home_of(sys.modules[function.__module__]) if function.__module__ in sys.modules else None
        homes = [home] if home is not None else []
        # The function itself too: a transform's is called by the test, and by no frame of ours that could be told.
        own = getattr(function, "__code__", None)
        self._callers = Callers(homes, calling=CALLING | ({own} if own is not None else set()))
        self._globals = Globals(homes)
        self._pool = engine.pool
        self._allowed = tuple(allowed)
        self._calls: list[Call] = []
        self._elsewhere: list[str] = []

    def __enter__(self) -> Watch:
        self._globals.changes()
        self._hook = Calls(self._callers, self._calls.append)
        event.listen(Engine, "before_cursor_execute", self._on_statement)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._hook.close()
        event.remove(Engine, "before_cursor_execute", self._on_statement)

    def found(self) -> list[str]:
        """Sentences, each about one thing that would happen again when the message runs again."""
        sentences = [f"it wrote on another connection: {statement}" for statement in self._elsewhere]
        for change in self._globals.changes():
            if change.name not in self._allowed:
                sentences.append(
                    f"it remembers something outside its transaction: {change}. (If that changes no effect: "
                    f"eo.allow({change.name!r}))"
                )
        for call in self._calls:
            if not any(name in call.what for name in self._allowed):
                sentences.append(
                    f"it called {call} inside its transaction: a message that runs again calls again. Declare an "
                    f"External, or publish a message. (If that changes nothing there: eo.allow({call.what!r}))"
                )
        return sentences

    def _on_statement(self, connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if connection.engine.pool is self._pool or not _WRITES.match(statement):
            return
        where = self._callers.line(sys._getframe(1))
        if where is not None:
            self._elsewhere.append(f"{' '.join(statement.split())[:120]!r} ({where or 'a library'})")
