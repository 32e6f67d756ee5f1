"""The processes of a run: each slot has one after the other, each of which meets its fate."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from eoframework import clock
from tests.campaign.full_nursery import Zygote
from tests.campaign.history import History
from tests.campaign.nemeses import PEACE, Fate, Role, flow_of

APP = "tests.apps.campaign_flow:app"
_AFTERLIFE = 1.0
"""Seconds a process that stood still goes on for, as a zombie, before it is killed."""


@dataclass
class Tally:
    """What was done to processes, and what they did."""

    kinds: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    """What the broker said to requests that came late."""

    @property
    def kills(self) -> int:
        """kill -9, wherever it fell."""
        return sum(count for kind, count in self.kinds.items() if kind.startswith("kill"))


class Slot:
    """One place of the run, and the process that has it now."""

    def __init__(
        self,
        name: str,
        role: Role,
        fates: Iterator[Fate],
        *,
        zygote: Zygote,
        environment: Mapping[str, str],
        directory: Path,
        history: History,
        tally: Tally,
    ) -> None:
        self.name, self.role = name, role
        self.log = directory / f"{name}.log"
        self._mark = directory / f"{name}.frozen"
        self._fates, self._zygote, self._environment = fates, zygote, dict(environment)
        self._history, self._tally = history, tally
        self.pid = 0
        self.stand_in = 0
        self._fate = PEACE
        self._began = 0.0
        self._stage = "runs"
        self._until = 0.0
        self._last_point = ""
        self._number = -1

    @property
    def pids(self) -> list[int]:
        return [pid for pid in (self.pid, self.stand_in) if pid]

    # --- lives ---

    def start(self, fate: Fate | None = None) -> None:
        """The next process; None: what the seed has for it."""
        self._fate = next(self._fates) if fate is None else fate
        self._mark.unlink(missing_ok=True)
        self._number = self._history.begin("life", slot=self.name, fate=str(self._fate))
        self.pid = self._spawn({"EO_INSTANCE": self.name, **self._fate.environment(str(self._mark))})
        self._began, self._stage = clock.monotonic(), "runs"

    def look(self) -> None:
        """Do what is due now."""
        now = clock.monotonic()
        getattr(self, f"_{self._fate.kind}")(now)
        if self.pid and self._stage == "zombie" and now > self._until:
            self._kill("zombie")

    def ended(self, pid: int, code: int, *, expected: bool = False) -> bool:
        """Told of every process that has ended; True when it was this slot's, whose next one is due."""
        if pid == self.stand_in:
            self.stand_in = 0
        if pid != self.pid:
            return False
        self.pid = 0
        how = self._how(code)
        self._history.end(self._number, "ok", how=how)
        # One that died of another signal, a segfault in a client, is no kill of ours.
        self._tally.exits["killed" if code == -signal.SIGKILL else how] += 1
        if self.stand_in:
            self._signal(self.stand_in, signal.SIGKILL)
        return not expected

    # --- fates ---

    def _point(self, now: float) -> None:
        if self._fate.nudged and self._stage == "runs" and now > self._began + self._fate.after:
            self._stage, self._until = "asked", now + _AFTERLIFE * 3
            self._signal(self.pid, signal.SIGTERM)
        limit = self._until if self._stage == "asked" else self._began + self._fate.after
        if now > limit and (self._stage == "asked" or not self._fate.nudged):
            self._kill("moment")

    _raise = _point

    def _moment(self, now: float) -> None:
        if now > self._began + self._fate.after:
            self._kill("moment")

    def _term(self, now: float) -> None:
        if self._stage == "runs" and now > self._began + self._fate.after:
            self._tally.kinds["SIGTERM"] += 1
            self._stage, self._until = "asked", now + 10
            self._signal(self.pid, signal.SIGTERM)
        elif self._stage == "asked" and now > self._until:
            self._kill("moment")

    def _pause(self, now: float) -> None:
        if self._stage == "runs" and now > self._began + self._fate.after:
            self._signal(self.pid, signal.SIGSTOP)
            self._stands_still(now, "SIGSTOP")
        self._wake(now)

    def _freeze(self, now: float) -> None:
        if self._stage == "runs" and self._mark.exists():
            self._stands_still(now, "SIGSTOP at a point")
        elif self._stage == "runs" and now > self._began + self._fate.after:
            self._kill("moment")
        self._wake(now)

    def _stands_still(self, now: float, kind: str) -> None:
        self._tally.kinds[kind] += 1
        self._stage, self._until = "stands", now + self._fate.lasting
        if self._fate.lasting > 2:
            # Somebody takes its work over, who then meets the zombie.
            self.stand_in = self._spawn({"EO_INSTANCE": self.name if self.role == "crumble" else f"{self.name}.in"})

    def _wake(self, now: float) -> None:
        if self._stage == "stands" and now > self._until:
            self._signal(self.pid, signal.SIGCONT)
            self._stage, self._until = "zombie", now + _AFTERLIFE

    def _kill(self, kind: str) -> None:
        if self._stage != "dying":
            self._stage = "dying"
            self._tally.kinds[f"kill at a {kind}" if kind == "moment" else f"kill of a {kind}"] += 1
            self._signal(self.pid, signal.SIGKILL)

    # --- processes ---

    def end(self, number: signal.Signals) -> None:
        """A signal to all there is, which also wakes those that stand still."""
        for pid in self.pids:
            self._signal(pid, signal.SIGCONT)
            self._signal(pid, number)

    def _spawn(self, more: Mapping[str, str]) -> int:
        arguments = ["relay", APP] if self.role == "relay" else ["run", APP, "--handler", self.role]
        own = {"EO_KAFKA_GROUP_INSTANCE_ID": more["EO_INSTANCE"]} if "CAMPAIGN_STATIC" in self._environment else {}
        return self._zygote.spawn(arguments, {**self._environment, **own, **more}, self.log)

    def _signal(self, pid: int, number: signal.Signals) -> None:
        if pid:
            with suppress(ProcessLookupError):  # it has ended, and nobody has asked yet
                os.kill(pid, number)

    def _how(self, code: int) -> str:
        """Count what ended it; a SIGKILL that is not ours was the crash point's."""
        if code != -signal.SIGKILL:
            if self._fate.kind == "raise" and code > 0:
                self._tally.kinds["exception in a callback"] += 1
            self._last_point = ""
            return f"exit {code}"
        if self._fate.kind == "point" and self._stage != "dying":
            self._count_point()
            return f"killed at {self._fate.at}"
        self._last_point = ""
        return "killed"

    def _count_point(self) -> None:
        self._tally.kinds["kill at a point"] += 1
        if self._fate.clock:
            self._tally.kinds["clock an hour off"] += 1
        flow, point = flow_of(self.role), self._fate.point
        self._tally.points[f"{flow} {point}{'+' if self._fate.soon else ''}"] += 1
        if self._last_point:
            self._tally.pairs[f"{flow} {self._last_point} > {point}"] += 1
        self._last_point = point
