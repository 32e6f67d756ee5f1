"""Which part of a topic's past is meant: from what a person said to the offsets of each partition."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from eoframework import clock
from eoframework.db.position import Stream
from eoframework.db.reprocessing import Stand
from eoframework.errors import EoError, FailClosed, NotFound
from eoframework.kafka.ranges import RangeReader

Bound = int | datetime | timedelta | Literal["earliest", "latest"]
"""An offset; a time; so long ago; the first offset kept; the end of what is committed."""


class InvertedRange(EoError):
    """The range ends before it begins; nothing was done."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Range:
    """Offsets of one partition, `end` not among them."""

    partition: int
    start: int
    end: int
    position: int
    """Where the live consumer stands: what follows is the group's to process."""
    covered_from: int

    @property
    def uncovered(self) -> bool:
        """Whether some of it lies where ids may have been forgotten."""
        return self.start < min(self.covered_from, self.end)


class Resolver:
    """From what the user said to the offsets of one partition."""

    def __init__(self, stream: Stream, reader: RangeReader, stand: Stand) -> None:
        self._where = f"{stream.topic}[{stand.row.partition}]"
        self._consumer = stream.consumer
        self._reader = reader
        self._stand = stand
        self._low, self._high = reader.edges(stand.row.partition)

    def range(self, start: Bound, end: Bound | None) -> Range:
        """The range; empty where there is nothing between the bounds."""
        position = self._stand.row.next_offset
        first = last = position
        if position > self._low:  # else nothing of it is kept
            begin = self._offset(start)
            stop = position if end is None else self._offset(end)
            if end is not None and begin > stop:
                raise inverted(f"{self._where}: {start} is offset {begin}, and {end} is {stop}")
            first = self._within(begin, start)
            last = position if end is None else self._within(stop, end)
        return Range(self._stand.row.partition, min(first, last), last, position, self._stand.covered_from)

    def _offset(self, bound: Bound) -> int:
        match bound:
            case int():
                if not self._low <= bound <= self._high:
                    text = f"{self._where} has offsets {self._low} to {self._high}, not {bound}."
                    raise NotFound(text, remedy="Choose one.")
                return bound
            case "earliest":
                return self._low
            case "latest":
                return self._high
            case timedelta():
                return self._at(clock.now() - bound)
            case datetime():
                return self._at(bound)

    def _at(self, time: datetime) -> int:
        # What was published since the edges were asked for counts as the end: `latest` is not before it.
        found = self._reader.offset_at(self._stand.row.partition, int(time.timestamp() * 1000))
        return self._high if found is None else min(self._high, max(self._low, found))

    def _within(self, offset: int, bound: Bound) -> int:
        """The offset, at most the position: the messages behind that are the group's, and would lose their order."""
        position = self._stand.row.next_offset
        if offset <= position:
            return offset
        # Behind the last message there may be transaction markers, which count as offsets.
        with closing(self._reader.read(self._stand.row.partition, position, min(offset, self._high), limit=1)) as ahead:
            if next(ahead, None) is None:
                return position
        raise FailClosed(
            f"{self._where}: {bound} is offset {offset}, and {self._consumer} stands at {position}: what follows is "
            "the group's to process; run here, it would lose its order.",
            remedy="Choose a range before the position; without --to it ends there.",
        )


def refuse_inverted(start: Bound, end: Bound | None) -> None:
    """Raise InvertedRange where that is plain without asking Kafka, also if nothing lies between the bounds."""
    if (start, end) == ("latest", "earliest"):
        raise inverted("latest is after earliest")
    first, last = _comparable(start), _comparable(end)
    if first is not None and last is not None and type(start) is type(end) and first > last:
        raise inverted(f"{start} is after {end}")


def _comparable(bound: Bound | None) -> float | None:
    if isinstance(bound, datetime):
        return bound.timestamp()
    # The longer ago, the earlier.
    return -bound.total_seconds() if isinstance(bound, timedelta) else bound if isinstance(bound, int) else None


def inverted(what: str) -> InvertedRange:
    """What is raised."""
    return InvertedRange(f"the range ends before it begins: {what}.", remedy="Change --from or --to.")
