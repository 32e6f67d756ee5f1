"""The one place that reads clocks and sleeps, so that a test can see every wait there is."""

from __future__ import annotations

import random
import threading
import time
from datetime import UTC, datetime


def now() -> datetime:
    """The wall clock, for people and message headers; no decision about exactly-once rests on it."""
    return datetime.now(UTC)


def monotonic() -> float:
    """Seconds that only move forward, for durations and deadlines."""
    return time.monotonic()


def sleep(seconds: float) -> None:
    """Sleep without a way to be woken; only where nothing could want to stop (tests, tools)."""
    time.sleep(seconds)


def wait(stop: threading.Event, seconds: float) -> bool:
    """Sleep for at most `seconds`; return True at once when `stop` is set."""
    return stop.wait(seconds)


def jitter(low: float, high: float) -> float:
    """A random number of seconds between the two, so that contenders do not meet again at the same instant."""
    return random.uniform(low, high)
