"""What a handler under test does outside its transaction: sentences that fail the test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from types import TracebackType

from sqlalchemy import Engine

from eoframework.crashtest.user_watch import CALLING, Call, Callers, Calls, Globals, home_of
from eoframework.db.elsewhere import Elsewhere


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
        self._elsewhere = Elsewhere(lambda: engine, self._on_statement)
        self._allowed = tuple(allowed)
        self._calls: list[Call] = []
        self._statements: list[str] = []

    def __enter__(self) -> Watch:
        self._globals.changes()
        self._hook = Calls(self._callers, self._calls.append)
        self._elsewhere.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._hook.close()
        self._elsewhere.close()

    def found(self) -> list[str]:
        """Sentences, each about one thing that would happen again when the message runs again."""
        sentences = [f"it wrote on another connection: {statement}" for statement in self._statements]
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

    def _on_statement(self, statement: str) -> None:
        where = self._callers.line(sys._getframe(1))
        if where is not None:
            self._statements.append(f"{statement[:120]!r} ({where or 'a library'})")
