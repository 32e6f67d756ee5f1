"""The processes in which the application under test runs: it never gets into the process that tests it.

... user_child eo REPORT MODULE:APP ARGS...      `eo ARGS...`, armed by EO_CRASH_AT
... user_child watched REPORT MODULE:APP ARGS... the same, and what it does is written down
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from eoframework import events
from eoframework.crashtest import armed
from eoframework.crashtest.user_chance import Chance
from eoframework.crashtest.user_watch import Call, Callers, Calls, Globals, home_of, line_of
from eoframework.db.elsewhere import Elsewhere
from eoframework.external import External
from eoframework.retry import GiveUp, Retry

# A handler may ask for minutes before the next attempt, and a test has to wait for all of them at each of its points.
_LONGEST_PAUSE = 0.3
# Whoever comes after a crash waits for the lease of a call that was being made, and nobody else is there to make it.
_LONGEST_LEASE = 1.0
# After these a handler has been called: nobody else's variables have changed meanwhile.
_AFTER_CALLS = frozenset(
    {"consume.handled", "consume.settled", "consume.failed", "consume.unparked", "transform.handled"}
)
_CLAIMS = frozenset({"consume.claimed", "transform.claimed", "relay.claimed"})


class Report:
    """A file of JSON lines: written at once, since the process may be killed."""

    def __init__(self, file: str) -> None:
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def add(self, kind: str, **fields: object) -> None:
        os.write(self._descriptor, (json.dumps({"kind": kind, **fields}) + "\n").encode())


class Watcher:
    """A listener that writes down what is passed, and what handlers do besides their transaction."""

    def __init__(self, report: Report, reference: str) -> None:
        self._report = report
        self._module, _, self._app = reference.partition(":")
        self._point = armed.CrashPoint()
        self._globals: Globals | None = None
        self._named: set[str] = set()
        self._counting = threading.Lock()
        atexit.register(self._end)

    def on_event(self, name: str, fields: dict[str, object]) -> None:
        """To be subscribed."""
        self._point.on_event(name, fields)
        with self._counting:
            if self._globals is None:
                self._begin()
            elif name in _AFTER_CALLS:
                self._look(self._globals)

    def _begin(self) -> None:
        """At the first event the application has been imported, and no handler was called yet."""
        home = home_of(sys.modules[self._module]) if self._module in sys.modules else None
        homes = [home] if home is not None else []
        self._globals = Globals(homes)
        self._callers = Callers(homes)
        Calls(self._callers, self._on_call)
        Elsewhere(self._engine, self._on_statement).listen()
        Chance(self._callers, lambda what, where: self._report.add("chance", what=what, where=where)).listen()

    def _engine(self) -> Any:
        app = getattr(sys.modules.get(self._module), self._app, None)
        return None if app is None else app.database.engine

    def _on_statement(self, statement: str) -> None:
        where = self._callers.line(sys._getframe(1))
        if where:
            self._report.add("statement", what=statement, where=where)

    def _look(self, found: Globals) -> None:
        for change in found.changes():
            if change.name not in self._named:
                self._named.add(change.name)
                self._report.add("global", **asdict(change), where=line_of(change.name))

    def _on_call(self, call: Call) -> None:
        self._report.add("call", **asdict(call))

    def _end(self) -> None:
        self._report.add("hits", hits=dict(self._point.seen))


def run(file: str, reference: str, arguments: Sequence[str], *, watched: bool) -> None:
    """Be `eo` with these arguments."""
    report = Report(file)

    def tell_claims(name: str, fields: dict[str, object]) -> None:
        if name in _CLAIMS:
            what = fields.get("partition", fields.get("shard"))
            report.add("claimed", who=threading.current_thread().name, what=what)

    # First: who is killed at its claim has told it.
    events.subscribe(tell_claims)
    if watched:
        events.subscribe(Watcher(report, reference).on_event)
    _retry_soon()
    _ask_nobody()
    armed.main(arguments)


def _retry_soon() -> None:
    decide = Retry.decide

    def decide_soon(self: Retry, attempt: int, error: Exception, *, dice: float = 0.5) -> float | GiveUp:
        verdict = decide(self, attempt, error, dice=dice)
        return verdict if isinstance(verdict, GiveUp) else min(verdict, _LONGEST_PAUSE)

    Retry.decide = decide_soon  # type: ignore[method-assign]


def _ask_nobody() -> None:
    """Let whoever comes after a crash make an external call again, soon, and not leave it to a person."""
    check = External.__post_init__

    def check_and_change(self: External) -> None:
        check(self)
        object.__setattr__(self, "lease", min(self.lease, _LONGEST_LEASE))
        object.__setattr__(self, "unresolved", "retry")

    External.__post_init__ = check_and_change  # type: ignore[method-assign]


def main(arguments: Sequence[str]) -> None:
    """See the module."""
    kind, file, reference, *rest = arguments
    run(file, reference, rest, watched=kind == "watched")


if __name__ == "__main__":
    main(sys.argv[1:])
