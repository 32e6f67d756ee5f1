"""What a service's log says about why it died, and what to do about it."""

from __future__ import annotations

import re
from pathlib import Path

from eoframework.errors import ConfigurationError, EoError, Unreachable

_TAIL = 200_000
_WIDTH = 300
_DECISIVE = re.compile(r"\b(ERROR|FATAL|PANIC|Exception|Caused by|error:|Error occurred|OutOfMemory)", re.IGNORECASE)
_CAUSES = [
    (
        re.compile(r"Address already in use|could not bind"),
        "Run it again, for another free port, or stop the program on it.",
    ),
    (re.compile(r"No space left on device|Disk quota exceeded"), "Free about 500 MB of disk there, and start again."),
    (
        re.compile(r"OutOfMemory|Cannot allocate memory|Could not reserve enough"),
        "Free memory; Kafka needs 500 MB.",
    ),
    (re.compile(r"UnsupportedClassVersion"), "Install Java 17 or newer, or `pip install 'eoframework[dev]'`."),
]


def decisive_line(log: Path) -> str:
    """The line of the log's newest part that tells the cause; else a word that there is none."""
    lines = _last_lines(log)
    # Kafka writes "error" into lines that only inform, as while it waits for its killed predecessor's session to end.
    serious = [line for line in lines if " INFO " not in line]
    for pattern in [cause for cause, _ in _CAUSES] + [_DECISIVE]:
        for line in serious:
            if pattern.search(line):
                return line[:_WIDTH]
    return (
        f"no error in its log, so it was killed; the last line: {lines[-1][:_WIDTH]}" if lines else "its log is empty"
    )


def died(what: str, log: Path, code: int | None) -> EoError:
    """The error for a service that ended while it was starting."""
    line = decisive_line(log)
    ended = f"ended with exit code {code}" if code is not None else "is not there any more"
    for pattern, remedy in _CAUSES:
        if pattern.search(line):
            return ConfigurationError(f"{what} {ended} while starting: {line}", remedy=remedy)
    return Unreachable(
        f"{what} {ended} while starting: {line}",
        remedy=f"Its whole log is {log}; `eo dev reset` begins anew with empty data.",
    )


def mark(log: Path) -> None:
    """Begin a new log file, keeping the one before as `….1`, so that an old cause is not taken for today's."""
    if log.exists():
        log.rename(log.with_name(log.name + ".1"))
    log.touch(mode=0o644)


def _last_lines(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]
