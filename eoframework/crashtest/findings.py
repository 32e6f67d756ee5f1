"""What a crash test has found, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from eoframework.crashtest.load import Sending
from eoframework.crashtest.reference import Difference


@dataclass(frozen=True, slots=True)
class Beside:
    """Something that a handler does outside its transaction: it happens again when the message runs again."""

    kind: str
    """`variable`, `call` or `statement`."""
    name: str
    """What --allow takes."""
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy} (If that changes no effect: --allow {self.name!r})"


@dataclass(slots=True)
class PointResult:
    """One process killed at one point."""

    process: str
    point: str
    died: bool
    differences: list[Difference] = field(default_factory=list)
    trouble: str = ""

    @property
    def clean(self) -> bool:
        return not self.differences and not self.trouble

    def total(self, name: str) -> int:
        return sum(int(getattr(one, name)) for one in self.differences)


@dataclass(slots=True)
class History:
    """The fewest messages with which it was seen again."""

    process: str
    point: str
    messages: Sequence[Sending]
    differences: Sequence[Difference]

    def lines(self) -> list[str]:
        shown = [str(one) for one in self.messages[:_SHOWN]]
        if len(self.messages) > len(shown):
            shown.append(f"... {len(self.messages)} messages in all; --json has them")
        rows = [f"  {one.place}: {row}" for one in self.differences for row in one.rows]
        event = self.point.partition(":")[0].removeprefix("moving ").removesuffix("+")
        again = f"again: put these lines into a file, and add --sample FILE --points {event} to the command"
        head = f"eo {self.process} killed at {self.point}, after these messages were sent:"
        return [head, *shown, again, "differs:", *rows]

    def document(self) -> dict[str, Any]:
        return {
            "process": self.process,
            "point": self.point,
            "messages": [str(one) for one in self.messages],
            "differences": [asdict(one) for one in self.differences],
        }


@dataclass(slots=True)
class Report:
    """All of it."""

    app: str
    seed: int
    messages: int
    points: list[PointResult] = field(default_factory=list)
    beside: list[Beside] = field(default_factory=list)
    left_out: dict[str, frozenset[str]] = field(default_factory=dict)
    unsteady: dict[str, str] = field(default_factory=dict)
    chance: set[str] = field(default_factory=set)
    """Lines at which handlers ask for the time, or for chance."""
    history: History | None = None
    skipped: int = 0
    """Points for which there was no time."""
    interrupted: bool = False
    """By Ctrl-C, in the middle of a crash."""
    seconds: float = 0.0

    @property
    def injected(self) -> int:
        return sum(one.died for one in self.points)

    @property
    def bad(self) -> list[PointResult]:
        return [one for one in self.points if not one.clean]

    @property
    def clean(self) -> bool:
        return not self.bad and not self.beside

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "app": self.app,
            "seed": self.seed,
            "messages": self.messages,
            "injected": self.injected,
            **{name: sum(one.total(name) for one in self.points) for name in _COUNTS},
            "unresolved": sum(bool(one.trouble) for one in self.points),
            "points": [asdict(one) for one in self.points],
            "beside": [asdict(one) for one in self.beside],
            "left_out": {name: sorted(columns) for name, columns in self.left_out.items()},
            "unsteady": self.unsteady,
            "chance": sorted(self.chance),
            "history": self.history.document() if self.history is not None else None,
            "skipped": self.skipped,
            "interrupted": self.interrupted,
            "seconds": round(self.seconds, 1),
            "clean": self.clean,
        }

    def text(self) -> str:
        """For people."""
        return "\n".join([*self._table(), "", *self._notes(), *self._found(), self._verdict()])

    def _table(self) -> list[str]:
        width = max((len(f"{one.process} {one.point}") for one in self.points), default=10)
        heads = ("injected", "lost", "doubled", "changed", "reordered", "unresolved")
        lines = [f"{'killed at':<{width}}  " + "  ".join(heads)]
        for one in self.points:
            numbers = (int(one.died), *(one.total(name) for name in _COUNTS), int(bool(one.trouble)))
            cells = "  ".join(f"{number:>{len(head)}}" for number, head in zip(numbers, heads, strict=True))
            lines.append(f"{one.process + ' ' + one.point:<{width}}  {cells}")
        totals = (
            self.injected,
            *(sum(one.total(name) for one in self.points) for name in _COUNTS),
            sum(bool(one.trouble) for one in self.points),
        )
        cells = "  ".join(f"{number:>{len(head)}}" for number, head in zip(totals, heads, strict=True))
        return [*lines, f"{'all':<{width}}  {cells}"]

    def _notes(self) -> list[str]:
        lines = [
            f"not compared: {', '.join(sorted(columns))} of {name} (another value after each run, also without a crash)"
            for name, columns in sorted(self.left_out.items())
        ]
        lines += [f"not compared: {name}: {why}" for name, why in sorted(self.unsteady.items())]
        if self.left_out or self.unsteady:
            lines += [f"another value each time comes from: {one}" for one in sorted(self.chance)]
        missed = [one.point for one in self.points if not one.died]
        if missed:
            lines.append(f"not reached in this run: {', '.join(missed)}")
        if self.skipped:
            why = "interrupted before" if self.interrupted else "no time for"
            lines.append(f"{why} {number(self.skipped, 'more point')}")
        return [*lines, ""] if lines else []

    def _found(self) -> list[str]:
        lines = [f"FOUND: {one}" for one in self.beside]
        for one in self.bad:
            where = f"eo {one.process} killed at {one.point}" if one.died else f"eo {one.process}, not killed"
            lines += [f"FOUND: {where}: {_told(difference)}" for difference in one.differences]
            lines += [f"UNRESOLVED: {where}: {one.trouble}"] if one.trouble else []
        if self.history is not None:
            lines += ["", f"the smallest history that shows it (--seed {self.seed}):", *self.history.lines()]
        return [*lines, ""] if lines else []

    def _verdict(self) -> str:
        if self.clean and self.injected:
            odds = f"rule of three: < {3 / self.injected:.2g} of crashes at 95 %"
            crashes = number(self.injected, "injected crash", "es")
            but = f"; {len(self.unsteady)} of the tables and topics not compared" if self.unsteady else ""
            return f"0 violations in {crashes} ({odds}){but}; seed {self.seed}"
        violations, outside = number(len(self.bad), "violation"), number(len(self.beside), "effect")
        crashes = number(self.injected, "injected crash", "es")
        return f"{violations} in {crashes}, {outside} outside of transactions; seed {self.seed}"


_SHOWN = 10
_COUNTS = ("lost", "doubled", "changed", "reordered")


def number(count: int, what: str, plural: str = "s") -> str:
    """So many of them, in words that agree."""
    return f"{count} {what}{plural if count != 1 else ''}"


def _told(difference: Difference) -> str:
    counts = [f"{getattr(difference, name)} {name}" for name in _COUNTS if getattr(difference, name)]
    return f"{difference.place}: {', '.join(counts)}; {'; '.join(difference.rows[:2])}"
