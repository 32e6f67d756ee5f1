"""Trying an operator's change again when it met somebody else's."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from eoframework import clock
from eoframework.errors import Conflict, Retryable

T = TypeVar("T")

_TRIES = 5

_log = logging.getLogger(__name__)


def patiently(change: Callable[[], T], which: str, before: int, stop: threading.Event | None = None) -> T:
    """Change one of many; a deadlock, or a lock that is not to be had, is no reason to leave the others undone.

    which: for people, with a capital. before: how many were done. Raises Retryable after some tries, or with `stop`.
    """
    for tries in itertools.count(1):
        try:
            return change()
        except Retryable as error:
            passing = isinstance(error, Conflict) and tries < _TRIES
            if passing and not clock.wait(stop or threading.Event(), clock.jitter(0.05, 0.3)):
                _log.warning("%s It is as it was, and tried again.", error.what)
                continue
            raise Retryable(
                f"{error.what} {which} was given up after {tries} tries; {before} before it were done.",
                remedy="Say it again for the rest.",
            ) from error
    raise AssertionError("counting ended")
