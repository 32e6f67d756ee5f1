"""Crash points for the processes under test: listeners on events, armed from outside by the environment.

CRASH_AT="db.committing:3" kills the process (SIGKILL) at the third such event, "db.committing+:3" a moment later, while
the call that follows is under way; FREEZE_AT stops it (SIGSTOP) there, and whoever wants it to go on sends SIGCONT.
FREEZE_MARK names a file that is made just before. CRASH_IN counts only the events of threads with this in their name.
Only the polls and COMMITs of batches count: how many others there are depends on the moment. A transform's Kafka
transactions that move its group's offsets without a batch are counted by themselves: "moving
kafka.transaction.committed:1".
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from pathlib import Path

from eoframework import clock, events


def arm_from_environment() -> None:
    """Called by the test's app module when it is imported."""
    crash_at, freeze_at = os.environ.get("CRASH_AT", ""), os.environ.get("FREEZE_AT", "")
    if crash_at or freeze_at:
        events.subscribe(_CrashPoint(crash_at, freeze_at, thread=os.environ.get("CRASH_IN", "")).on_event)


class _CrashPoint:
    def __init__(self, crash_at: str, freeze_at: str, *, thread: str) -> None:
        self._crash_at, self._freeze_at = crash_at, freeze_at
        self._thread = thread
        self._seen: Counter[str] = Counter()
        self._sending = False

    def on_event(self, name: str, fields: dict[str, object]) -> None:
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
            freeze()

    def _is_of_no_batch(self, name: str, fields: dict[str, object]) -> bool:
        outside = self._seen["consume.handled"] == self._seen["db.committed"]
        return fields.get("records") == 0 or (name.startswith("db.") and outside)

    def _note_batch(self, name: str) -> None:
        if name == "transform.produced":
            self._sending = True
        elif name in ("transform.committed", "transform.given_way"):
            self._sending = False


def _die_soon() -> None:
    clock.sleep(clock.jitter(0.0, 0.002))
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    """SIGSTOP, in the middle of what this thread is doing."""
    mark = os.environ.get("FREEZE_MARK")
    if mark:
        Path(mark).touch()
    # To this thread, not the process: another thread may take the process's signals, and this one runs on a bit.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
