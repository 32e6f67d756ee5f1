"""What a campaign did and what it was told, line by line, on disk before it is done.

Each operation is written, and synced, before it begins; its outcome when it is known: "ok", "fail" (it certainly had no
effect) or "unknown". Without a line about its outcome it is unknown: whoever wrote the history may itself have died.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from eoframework import clock

Outcome = Literal["ok", "fail", "unknown"]


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that was done, and what came of it."""

    number: int
    what: str
    at: float
    """Seconds since the history began."""
    fields: dict[str, Any] = field(default_factory=dict)
    outcome: Outcome = "unknown"
    told: dict[str, Any] = field(default_factory=dict)
    """What was learnt with the outcome."""


class History:
    """An append-only file of JSON lines. Safe to write from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()
        self._began = clock.monotonic()
        self._next = 0

    def __enter__(self) -> History:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def begin(self, what: str, **fields: Any) -> int:
        """An operation begins when this returns: its line is on disk. Returns its number, for its outcome."""
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._write({"op": number, "what": what, "at": self._now(), **fields})
            # Before the operation: one that is not in the file was never done, whenever the machine stops.
            os.fdatasync(self._file.fileno())
        return number

    def end(self, number: int, outcome: Outcome, **told: Any) -> None:
        """What came of an operation. Not synced: without this line it is unknown, which is always true."""
        with self._lock:
            self._write({"op": number, "outcome": outcome, "at": self._now(), **told})

    def done(self, what: str, **fields: Any) -> None:
        """Something that was seen, or done by others."""
        self.end(self.begin(what, **fields), "ok")

    def _now(self) -> float:
        return round(clock.monotonic() - self._began, 4)

    def _write(self, line: dict[str, Any]) -> None:
        # One write a line: a torn one can only be the last.
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


def read(path: Path) -> list[Operation]:
    """The operations in the order in which they began. Raises ValueError for a torn line that is not the last."""
    begun: dict[int, dict[str, Any]] = {}
    ended: dict[int, dict[str, Any]] = {}
    for line in _lines(path):
        (ended if "outcome" in line else begun)[line.pop("op")] = line
    return [_operation(number, line, ended.get(number, {})) for number, line in begun.items()]


def _operation(number: int, line: dict[str, Any], end: dict[str, Any]) -> Operation:
    what, at = line.pop("what"), line.pop("at")
    outcome = end.pop("outcome", "unknown")
    end.pop("at", None)
    return Operation(number, what, at, line, outcome, end)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    content = path.read_bytes().split(b"\n")
    for index, line in enumerate(content):
        if not line:
            continue
        try:
            yield json.loads(line)
        except ValueError:
            if index == len(content) - 1:
                return  # torn: its operation was never begun, or its outcome stays unknown
            raise
