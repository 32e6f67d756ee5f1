"""Options that choose dead letters and lanes, and how their values are written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated

import typer

from eoframework import clock
from eoframework.dead import DeadFilter
from eoframework.legible import parse_bytes

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_AGO = re.compile(r"(\d+)([smhd])")
_RATE = re.compile(r"(\d+(?:\.\d+)?)(?:/([smh]))?")

Handler = Annotated[str | None, typer.Option("--handler", metavar="APP.HANDLER", help="Of this consumer group.")]
TopicName = Annotated[str | None, typer.Option("--topic", help="From this topic.")]
Key = Annotated[str | None, typer.Option("--key", help="With this key; base64:... for bytes that are no text.")]
Error = Annotated[str | None, typer.Option("--error", metavar="CLASS", help="Died of this class of error.")]
Fingerprint = Annotated[str | None, typer.Option("--fingerprint", help="Died of the same error in the same place.")]
Since = Annotated[str | None, typer.Option("--since", metavar="TIME", help="Not before: ISO 8601, or 30m, 2h, 7d ago.")]
Until = Annotated[str | None, typer.Option("--until", metavar="TIME", help="Before: ISO 8601, or 30m, 2h, 7d ago.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many at once.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
All = Annotated[bool, typer.Option("--all", help="All that the filters let through.")]
Actor = Annotated[str | None, typer.Option("--actor", help="Whom the audit names; user@host without.")]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The filter that the options make, and whether they narrow anything."""

    which: DeadFilter
    narrowed: bool


def choose(
    handler: str | None,
    topic: str | None,
    key: str | None,
    error: str | None,
    fingerprint: str | None,
    since: str | None,
    until: str | None,
) -> Chosen:
    """The filter. Raises a usage error for a time that is none."""
    given = (handler, topic, key, error, fingerprint, since, until)
    which = DeadFilter(
        handler=handler,
        topic=topic,
        key=parse_bytes(key) if key is not None else None,
        error=error,
        fingerprint=fingerprint,
        since=parse_time(since, "--since") if since is not None else None,
        until=parse_time(until, "--until") if until is not None else None,
    )
    return Chosen(which, any(value is not None for value in given))


def parse_time(text: str, option: str) -> datetime:
    """An aware time; one without a zone is in the zone of this machine."""
    ago = _AGO.fullmatch(text)
    if ago is not None:
        return clock.now() - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is no time; write 2026-01-31T12:00, or 30m, 2h, 7d for that long ago", param_hint=option
        ) from error


def parse_rate(text: str) -> float:
    """Letters a second. Raises a usage error."""
    found = _RATE.fullmatch(text)
    rate = float(found[1]) / {"s": 1, "m": 60, "h": 3600}[found[2] or "s"] if found is not None else 0.0
    if rate <= 0:
        raise typer.BadParameter(f"{text!r} is no rate; write 10/s, 30/m or 5", param_hint="--rate")
    return rate
