"""Crash points for the processes under test: listeners on events, armed from outside by the environment.

CRASH_AT="db.committing:3" kills the process (SIGKILL) at the third such event; FREEZE_AT stops it (SIGSTOP) there,
and whoever wants it to go on sends SIGCONT. FREEZE_MARK names a file that is made just before. Only the polls and
COMMITs of batches count: how many others there are depends on the moment.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from pathlib import Path

from eoframework import events


def arm_from_environment() -> None:
    """Called by the test's app module when it is imported."""
    seen: Counter[str] = Counter()
    crash_at, freeze_at = os.environ.get("CRASH_AT", ""), os.environ.get("FREEZE_AT", "")
    if not crash_at and not freeze_at:
        return

    def on_event(name: str, fields: dict[str, object]) -> None:
        no_batch = seen["consume.handled"] == seen["db.committed"]
        if fields.get("records") == 0 or (name.startswith("db.") and no_batch):
            return
        seen[name] += 1
        if f"{name}:{seen[name]}" == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if f"{name}:{seen[name]}" == freeze_at:
            freeze()

    events.subscribe(on_event)


def freeze() -> None:
    """SIGSTOP, in the middle of what this thread is doing."""
    mark = os.environ.get("FREEZE_MARK")
    if mark:
        Path(mark).touch()
    # To this thread, not the process: another thread may take the process's signals, and this one runs on a bit.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
