"""Kill the application at each point of its own flow, and hold what it comes to against runs without a crash."""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eoframework import clock
from eoframework.crashtest.findings import Beside, History, PointResult, Report, number
from eoframework.crashtest.load import Sending, keys_of
from eoframework.crashtest.points import BOUNDARIES, FLOWS, NAMES
from eoframework.crashtest.reference import Difference, Reference
from eoframework.crashtest.state import LETTERS, TOPIC
from eoframework.crashtest.user_run import Result, Role, Run, UserApp
from eoframework.crashtest.user_stage import Stage
from eoframework.errors import ConfigurationError

_BATCH = 7
_OTHER_BATCHES = (5, 3)
_AHEAD = 1_000
_SMALLER = (1, 3, 10, 30)
_NOTHING_AFTER = "–"
# So much of a statement is compared: the log is cut, and placeholders have another length there.
_TOLD = 200
_PUBLISHED = ("relay.selected", "relay.made_due")


@dataclass(frozen=True, slots=True)
class Options:
    """How much of it."""

    seed: int
    minutes: float | None = None
    points: tuple[str, ...] = ()
    """Names of events or of flows; all that are passed without any."""
    allowed: tuple[str, ...] = ()
    """What handlers may do besides."""
    filled: frozenset[str] = frozenset()
    """Topics the application fills itself, by the looks of its code: nothing is sent there, unless that is wrong."""
    generated: bool = False
    """The load was made from payload types, and not chosen by anybody."""


def refuse_unknown_points(points: Collection[str]) -> None:
    """Raises ConfigurationError for what is neither an event nor a flow."""
    for name in sorted(set(points) - NAMES - set(FLOWS)):
        near = difflib.get_close_matches(name, [*NAMES, *FLOWS], n=1)
        meant = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigurationError(
            f"there is no point {name!r}.",
            remedy=f"{meant}Give a flow: {', '.join(FLOWS)}; or an event of DESIGN.md, section 5.",
        )


class Campaign:
    """One load, and a crash at each point at which it can be hit."""

    def __init__(
        self, stage: Stage, app: UserApp, load: Sequence[Sending], options: Options, *, say: Callable[[str], None]
    ) -> None:
        """say: told what is being done, a line at a time."""
        refuse_unknown_points(options.points)
        self._stage = stage
        self._app = app
        self._load = load
        self._options = options
        self._say = say
        self._dice = random.Random(options.seed)
        self._deadline = None if options.minutes is None else clock.monotonic() + options.minutes * 60
        self._others = list(_OTHER_BATCHES)
        self._statements: set[str] = set()
        self._lines: dict[str, str] = {}

    def run(self) -> Report:
        """All points there is time for.

        Raises ConfigurationError when the application does not come to its end even without a crash.
        """
        began = clock.monotonic()
        report = Report(self._app.reference, self._options.seed, len(self._load))
        first = self._first_run()
        self._refuse_a_load_that_does_nothing(first)
        report.messages = len(self._load)
        # What has nothing to relay needs no relay.
        if not any(name in first.hits.get("relay", {}) for name in _PUBLISHED):
            self._app = replace(self._app, publishes=False)
        second = self._undisturbed(self._others.pop(0), ahead=_AHEAD)
        self._first = first
        reference = Reference.of(first.state, second.state, keys=keys_of(self._load))
        self._beside(report, (*first.told, *second.told))
        cells = self._cells(first)
        self._say(f"{len(cells)} points in {clock.monotonic() - began:.0f} s; each is one crash")
        try:
            reference = self._crash_at_each(report, reference, cells, began)
        except KeyboardInterrupt:
            # After half an hour what was found by then is not thrown away.
            report.interrupted = True
        report.skipped = len(cells) - len(report.points)
        self._beside(report, ())
        report.left_out, report.unsteady = reference.left_out, reference.unsteady
        report.seconds = clock.monotonic() - began
        return report

    def _crash_at_each(
        self, report: Report, reference: Reference, cells: Sequence[tuple[Role, str]], began: float
    ) -> Reference:
        for done, (role, point) in enumerate(cells, start=1):
            if self._deadline is not None and clock.monotonic() > self._deadline:
                break
            reference = self._cell(report, reference, role, point)
            spent = (clock.monotonic() - began) / (done + 2)
            self._say(f"{done}/{len(cells)} {_line(report.points[-1])}; {spent * (len(cells) - done):.0f} s left")
        return reference

    def _first_run(self) -> Result:
        """The first run without a crash, of the load that is left when each topic is filled by one side alone."""
        whole = self._load
        self._load = [one for one in whole if one.topic not in self._options.filled] or whole
        first = self._run_calmly(_BATCH)
        names = {one.topic for one in whole} - {one.topic for one in self._load}
        empty = {name for name in names if not first.state.tables[f"{TOPIC}{name}"].rows}
        if empty and not first.trouble:
            self._say(f"{', '.join(sorted(empty))}: not filled by the app itself, so messages are sent there")
            self._load = [one for one in whole if one.topic not in names - empty]
            first = self._run_calmly(_BATCH)
        if self._options.generated and self._leave_to_the_app(first):
            first = self._run_calmly(_BATCH)
        self._refuse_trouble(first)
        return first

    def _leave_to_the_app(self, first: Result) -> bool:
        """Take out of the load what is for topics that the application fills itself; whether there was any.

        Sent by both, one id would stand for two messages, and which of them comes first would depend on the moment.
        """
        sent = Counter(one.topic for one in self._load)
        filled = {name for name, ours in sent.items() if len(first.state.tables[f"{TOPIC}{name}"].rows) > ours}
        left = [one for one in self._load if one.topic not in filled]
        if not filled or not left:
            return False
        self._say(f"{', '.join(sorted(filled))}: filled by the app itself, so nothing is sent there")
        self._load = left
        return True

    def _refuse_a_load_that_does_nothing(self, first: Result) -> None:
        letters = first.state.tables[LETTERS].rows
        sent = {(one.topic, one.key, one.value) for one in self._load}
        if len(letters) >= len(sent):
            raise ConfigurationError(
                f"every message was given up, also without a crash; the first one: {letters[0]['consumer']}: "
                f"{letters[0]['error_class']}: {letters[0]['error']}.",
                remedy="Mend that, fill the tables with what they ask for (--setup), or send others (--sample).",
            )

    # --- runs ---

    def _undisturbed(self, batch: int, *, ahead: int = 0) -> Result:
        result = self._run_calmly(batch, ahead=ahead)
        self._refuse_trouble(result)
        return result

    def _run_calmly(self, batch: int, *, ahead: int = 0) -> Result:
        self._say(f"a run without a crash, {number(len(self._load), 'message')}, {batch} at a time")
        result = Run(self._stage, self._app, self._load, batch=batch).go(watched=True, ahead=ahead)
        self._statements.update(result.state.outside)
        return result

    def _refuse_trouble(self, result: Result) -> None:
        if result.trouble:
            raise ConfigurationError(
                f"{self._app.reference} does not come to its end even without a crash: {result.trouble}",
                remedy="\nMend that first, or give it another load (--sample).",
            )

    def _cell(self, report: Report, reference: Reference, role: Role, point: str) -> Reference:
        result = Run(self._stage, self._app, self._load, batch=_BATCH).go(crash=(role, point))
        self._statements.update(result.state.outside)
        found = [] if result.trouble else reference.compare(result.state)
        while found and self._others:
            # Two runs may have been the same by chance: what is another thing each time is no crash's doing.
            other = self._undisturbed(self._others.pop(0), ahead=_AHEAD * 7)
            reference = _steadier(reference, Reference.of(self._first.state, other.state, keys=keys_of(self._load)))
            found = reference.compare(result.state)
        report.points.append(PointResult(role, point, result.died, found, result.trouble))
        if found and report.history is None:
            report.history = self._smallest(reference, role, point, found)
        return reference

    def _smallest(self, reference: Reference, role: Role, point: str, found: list[Difference]) -> History:
        """The beginning of the load that is enough to see it."""
        points = dict.fromkeys((f"{point.rpartition(':')[0]}:1", point))
        for size in _SMALLER:
            if size >= len(self._load):
                break
            load = self._load[:size]
            self._say(f"the same with {number(size, 'message')}")
            calm = Run(self._stage, self._app, load, batch=_BATCH).go()
            smaller = replace(reference, state=calm.state)
            for at in points:
                crashed = Run(self._stage, self._app, load, batch=_BATCH).go(crash=(role, at))
                again = [] if calm.trouble or crashed.trouble else smaller.compare(crashed.state)
                if again:
                    return History(role, at, load, again)
        return History(role, point, self._load, found)

    # --- points ---

    def _cells(self, first: Result) -> list[tuple[Role, str]]:
        """Each point that was passed: at its first time, at some other, and in the call that follows it."""
        once: list[tuple[Role, str]] = []
        later: list[tuple[Role, str]] = []
        inside: list[tuple[Role, str]] = []
        writes = {boundary.name for boundary in BOUNDARIES if boundary.after != _NOTHING_AFTER}
        for role, hits in first.hits.items():
            for name, times in hits.items():
                if not self._wanted(name):
                    continue
                once.append((role, f"{name}:1"))
                if times > 1:
                    # How often it passes depends on the moment: the last times of one run may be missing in another.
                    later.append((role, f"{name}:{self._dice.randint(2, max(2, times // 2))}"))
                if name in writes:
                    inside.append((role, f"{name}+:1"))
        return [*once, *later, *inside]

    def _wanted(self, name: str) -> bool:
        bare = name.removeprefix("moving ")
        if bare not in NAMES:
            return False
        flows = {boundary.flow for boundary in BOUNDARIES if boundary.name == bare}
        return not self._options.points or bool({bare, *flows} & set(self._options.points))

    # --- besides ---

    def _beside(self, report: Report, told: Collection[dict[str, Any]]) -> None:
        known = {one.name for one in report.beside}
        self._lines.update({_bare(one["what"]): one["where"] for one in told if one["kind"] == "statement"})
        report.chance |= {f"{one['what']} at {one['where']}" for one in told if one["kind"] == "chance"}
        found = [_told(one) for one in told if one["kind"] not in ("statement", "chance")]
        found += [_statement(one, self._lines.get(_bare(one), "")) for one in sorted(self._statements)]
        for one in found:
            if one.name not in known and not any(name in one.name for name in self._options.allowed):
                known.add(one.name)
                report.beside.append(one)


def _told(one: dict[str, Any]) -> Beside:
    if one["kind"] == "global":
        where = f" ({one['where']})" if one["where"] else ""
        return Beside(
            "variable",
            one["name"],
            f"a handler changed the variable {one['name']}{where}: it was {one['before']} and is {one['after']}",
            "After a crash it begins anew, and with more than one process each has its own: keep it in a table.",
        )
    where = f" at {one['where']}" if one["where"] else ""
    return Beside(
        "call",
        one["what"],
        f"a handler called {one['what']}{where} inside its transaction",
        "A message that runs again calls again: declare an External, or publish a message.",
    )


def _bare(statement: str) -> str:
    """The statement as both tell it: the one who sends it, and the server's log."""
    return re.sub(r"%\(\w+\)s|%s|\$\d+", "?", statement)[:_TOLD]


def _statement(statement: str, where: str) -> Beside:
    at = f" at {where}" if where else ""
    return Beside(
        "statement",
        statement,
        f"a handler wrote on another connection, outside its transaction{at}: {statement}",
        "It stays when the message is rolled back: use tx.session (a transform has none: make it a handler).",
    )


def _steadier(one: Reference, other: Reference) -> Reference:
    names = one.left_out.keys() | other.left_out.keys()
    nothing: frozenset[str] = frozenset()
    return Reference(
        one.state,
        {name: one.left_out.get(name, nothing) | other.left_out.get(name, nothing) for name in names},
        one.unsteady | other.unsteady,
        {name: lane for name, lane in one.lanes.items() if other.lanes.get(name) == lane},
    )


def _line(point: PointResult) -> str:
    said = "killed" if point.died else "not reached"
    what = "" if point.clean else f", {'unresolved' if point.trouble else 'DIFFERS'}"
    return f"eo {point.process} {point.point}: {said}{what}"
