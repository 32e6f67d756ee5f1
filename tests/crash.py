"""Crash points for the processes under test, armed by the app's module or the program itself when it is imported.

CRASH_AT, FREEZE_AT, FREEZE_MARK and CRASH_IN are EO_CRASH_AT and so on of eoframework/crashtest/armed.py, which says
what they mean. Other names: these processes are started as `eo` itself, which refuses to run with those.
"""

from __future__ import annotations

import os

from eoframework import events
from eoframework.crashtest import armed


def arm_from_environment() -> None:
    """Called by the test's app module when it is imported."""
    crash_at, freeze_at = os.environ.get("CRASH_AT", ""), os.environ.get("FREEZE_AT", "")
    if crash_at or freeze_at:
        mark, thread = os.environ.get("FREEZE_MARK", ""), os.environ.get("CRASH_IN", "")
        events.subscribe(armed.CrashPoint(crash_at, freeze_at, mark=mark, thread=thread).on_event)


def freeze() -> None:
    """SIGSTOP, in the middle of what this thread is doing."""
    armed.freeze(os.environ.get("FREEZE_MARK", ""))
