"""`python -m eoframework.crashtest.armed ARGS...`: `eo ARGS...` that kills or freezes itself where it was told to.

EO_CRASH_AT="db.committing:3" kills the process (SIGKILL) at the third such event (crashtest/points.py),
"db.committing+:3" a moment later, while the call that follows is under way. EO_FREEZE_AT stops it (SIGSTOP) there, and
whoever wants it to go on sends SIGCONT; EO_FREEZE_MARK names a file that is made just before. EO_CRASH_IN counts only
the events of threads with this in their name.

Of `kafka.polled` and `db.*` only those of batches count: how many others there are depends on the moment. A transform's
Kafka transactions that move its group's offsets without a batch are counted by themselves:
"moving kafka.transaction.committed:1".
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from eoframework import clock, events, logs
from eoframework.db import throw_away
from eoframework.db.session import open_database
from eoframework.errors import ConfigurationError, EoError
from eoframework.lifecycle import exit_code
from eoframework.schema import Schema
from eoframework.settings import Settings, take_crash_points

_INSTANTLY = 0.002


class CrashPoint:
    """A listener on events that ends or stops its process at one of them."""

    def __init__(self, crash_at: str = "", freeze_at: str = "", *, mark: str = "", thread: str = "") -> None:
        self._crash_at, self._freeze_at = crash_at, freeze_at
        self._mark, self._thread = mark, thread
        self._seen: Counter[str] = Counter()
        self._sending = False

    @property
    def seen(self) -> Counter[str]:
        """How often each event has come by, as NAME:n counts them."""
        return self._seen

    def on_event(self, name: str, fields: dict[str, object]) -> None:
        """To be subscribed (eoframework.events)."""
        thread = threading.current_thread().name
        if self._thread not in thread or self._is_of_no_batch(name, fields):
            return
        self._note_batch(name)
        if thread.startswith("transform ") and name.startswith("kafka.transaction.") and not self._sending:
            name = f"moving {name}"
        self._seen[name] += 1
        hit = self._seen[name]
        if self._crash_at == f"{name}:{hit}":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._crash_at == f"{name}+:{hit}":
            threading.Thread(target=_die_soon, daemon=True).start()
        if self._freeze_at == f"{name}:{hit}":
            freeze(self._mark)

    def _is_of_no_batch(self, name: str, fields: dict[str, object]) -> bool:
        outside = self._seen["consume.handled"] == self._seen["db.committed"]
        return fields.get("records") == 0 or (name.startswith("db.") and outside)

    def _note_batch(self, name: str) -> None:
        if name == "transform.produced":
            self._sending = True
        elif name in ("transform.committed", "transform.given_way"):
            self._sending = False


def freeze(mark: str = "") -> None:
    """SIGSTOP, in the middle of what this thread is doing; the file `mark` is made just before."""
    if mark:
        Path(mark).touch()
    # To this thread, not the process: another thread may take the process's signals, and this one runs on a bit.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def arm(arguments: Sequence[str], told: dict[str, str]) -> None:
    """Kill or freeze this process where `told` says (EO_CRASH_AT and so on), once `eo` with these arguments runs.

    Raises ConfigurationError unless the database of the settings is marked as a throw-away: whoever leaves these
    variables in the environment of a real worker would have it killed in the middle of real work, for ever. An App with
    an engine of its own is expected to use the same database.
    """
    if any(argument.startswith("--workers") for argument in arguments):
        raise ConfigurationError(
            "--workers starts other processes, and those are not armed.",
            remedy="Start this command as often as you need workers.",
        )
    if any("database_url=" in argument for argument in arguments):
        raise ConfigurationError(
            "--set database_url names another database than the one that was looked at.",
            remedy="Set EO_DATABASE_URL instead.",
        )
    _refuse_a_database_that_matters()
    point = CrashPoint(
        told.get("EO_CRASH_AT", ""),
        told.get("EO_FREEZE_AT", ""),
        mark=told.get("EO_FREEZE_MARK", ""),
        thread=told.get("EO_CRASH_IN", ""),
    )
    events.subscribe(point.on_event)


def _refuse_a_database_that_matters() -> None:
    settings = Settings.load()
    logs.hide(settings.secrets())
    database = open_database(settings.require_database_url(), Schema(settings.database_schema))
    try:
        throw_away_ = throw_away.is_throw_away(database)
        name = str(database.engine.url.database)
    finally:
        database.engine.dispose()
    if not throw_away_:
        raise ConfigurationError(
            f"database {name!r} is not marked as a throw-away, and crash points kill in the middle of its work.",
            remedy=f"Take another database; or, if nothing in this one is needed: {throw_away.statement(name)};",
        )


def _die_soon() -> None:
    clock.sleep(clock.jitter(0.0, _INSTANTLY))
    os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: Sequence[str]) -> None:
    """Be `eo` with these arguments, armed. Exits with 3 when the database is not a throw-away."""
    try:
        arm(arguments, take_crash_points())
    except EoError as error:
        sys.stderr.write(logs.redact(f"eo: {error}") + "\n")
        sys.exit(exit_code(error))
    sys.argv = ["eo", *arguments]
    # By name: the command line is a layer above this one, and `eo crashtest` there knows this module.
    runpy.run_module("eoframework.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
