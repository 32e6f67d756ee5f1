"""Where a handler asks for the time or for chance: what it makes of them is another thing whenever its message runs.

That is no bug by itself, many a row has the time it was made. But such values cannot be compared, so the report names
the lines they come from.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from types import FrameType
from typing import Any

from eoframework.crashtest.user_watch import Callers
from eoframework.handlers import Handler
from eoframework.transform.transformer import Transformer
from eoframework.transforms import Transform

_CLOCKS = frozenset(
    {("time", "time"), ("time", "time_ns"), ("time", "localtime"), ("time", "gmtime"), ("posix", "urandom")}
)
_TODAY = frozenset({"now", "utcnow", "today"})
# Written in Python: asked for chance, they ask one of the above, or a Random.
_BETWEEN = ("/random.py", "/uuid.py", "/secrets.py")


class Chance:
    """Tells each line of the application that asks, once; only what it asks itself, and not through a library."""

    def __init__(self, callers: Callers, told: Callable[[str, str], None]) -> None:
        """told: what was asked, and `file:line`."""
        self._callers = callers
        self._told = told
        self._seen: set[str] = set()

    def listen(self) -> None:
        """While handlers and transforms are called, for as long as this process lives."""
        for owner, name in ((Handler, "_run"), (Transform, "call_batch"), (Transformer, "_handle_one")):
            setattr(owner, name, self._heard(getattr(owner, name)))

    def _heard(self, function: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(function)
        def heard(*arguments: object, **named: object) -> object:
            with self._watched():
                return function(*arguments, **named)

        return heard

    @contextmanager
    def _watched(self) -> Iterator[None]:
        before = sys.getprofile()
        sys.setprofile(self._on_call)
        try:
            yield
        finally:
            sys.setprofile(before)

    def _on_call(self, frame: FrameType, event: str, function: Any) -> None:
        if event != "c_call" or not _asks(function):
            return
        asking: FrameType | None = frame
        while asking is not None and asking.f_code.co_filename.endswith(_BETWEEN):
            asking = asking.f_back
        line = self._callers.own_line(asking)
        if line and line not in self._seen:
            self._seen.add(line)
            self._told(_name(function), line)


def _asks(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    if isinstance(owner, random.Random):
        return True
    if isinstance(owner, type) and issubclass(owner, date):
        return function.__name__ in _TODAY
    return (getattr(function, "__module__", ""), function.__name__) in _CLOCKS


def _name(function: Any) -> str:
    owner = getattr(function, "__self__", None)
    module = "random" if isinstance(owner, random.Random) else getattr(owner, "__name__", "")
    return f"{module}.{function.__name__}".lstrip(".")
