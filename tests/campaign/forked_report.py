"""The layer's report: read when a run begins, added to, and written whole again and again."""

from __future__ import annotations

import json
import platform
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eoframework import clock
from tests.campaign.forked_case import Case
from tests.campaign.forked_lane import Ran
from tests.campaign.report_file import commit, statement, write_json

WHAT = (
    "Pre-forked processes run the real consume, failure, external, prune, replay, reprocess and relay code on a real "
    "PostgreSQL and are killed (SIGKILL) at durability boundaries; others take over, until one comes to the end."
)
CONDITIONS = (
    "Only clients are killed, never the server, so it runs with fsync=off and full_page_writes=off; sessions ask for "
    "synchronous_commit=on themselves. Kafka is not there: records are handed to the executor, and the relay's real "
    "transactional producer writes its transactions to a file, fsynced before and after each."
)
AT, WHILE, BY_MESSAGE, ZOMBIE = (
    "kill -9 at a boundary",
    "kill -9 while the call after a boundary is under way",
    "kill -9 by a message",
    "frozen, and woken after the successor's end",
)
_MOST_VIOLATIONS = 50


@dataclass
class Report:
    """What all runs together have done."""

    path: Path
    started: str = ""
    seconds: float = 0.0
    cycles: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    points: dict[str, Counter[str]] = field(default_factory=dict)
    """Flow -> event -> kills there."""
    cells: dict[str, Counter[str]] = field(default_factory=dict)
    """Flow -> "event > event of the process after it" -> how often both were killed there."""
    every: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Stage -> flow -> [cases done without a violation, all cases]."""
    done: dict[str, list[str]] = field(default_factory=dict)
    """Flow -> the pairs that were run, as POINT:n,POINT:n."""
    seeds: dict[str, int] = field(default_factory=dict)
    """Seed -> the next cycle."""
    violations: list[dict[str, Any]] = field(default_factory=list)
    mended: list[dict[str, str]] = field(default_factory=list)
    """Violations of before, and the commit since which they are none."""
    commits: list[str] = field(default_factory=list)
    postgresql: str = ""

    @classmethod
    def load(cls, path: Path) -> Report:
        """The one that is there, else an empty one."""
        report = cls(path, started=clock.now().isoformat(timespec="seconds"))
        if path.exists():
            stored = json.loads(path.read_text())
            report.started, report.seconds = stored["started"], stored["seconds"]
            report.cycles, report.seeds = stored["cycles"], stored["seeds"]
            report.injected = Counter(stored["injected"])
            report.points = {flow: Counter(found) for flow, found in stored["points"].items()}
            report.cells = {flow: Counter(found) for flow, found in stored["cells"].items()}
            report.every, report.done = stored["every"], stored["done"]
            report.violations, report.commits = stored["violations"], stored["commits"]
            report.mended = stored.get("mended", [])
        return report

    @property
    def kills(self) -> int:
        return self.injected[AT] + self.injected[WHILE] + self.injected[BY_MESSAGE]

    def add(self, ran: Ran) -> None:
        flow = Case.parse(ran.case).flow.name
        self.cycles += 1
        for point, count in ran.kills.items():
            self.injected[WHILE if point.endswith("+") else AT] += count
        self.injected[BY_MESSAGE] += ran.suicides
        self.injected[ZOMBIE] += ran.zombies
        self.points.setdefault(flow, Counter()).update(ran.kills)
        pairs = zip(ran.fired, ran.fired[1:], strict=False)
        self.cells.setdefault(flow, Counter()).update(f"{first} > {second}" for first, second in pairs)
        if ran.violations and len(self.violations) < _MOST_VIOLATIONS:
            replay = f"python -m tests.campaign.forked --replay '{ran.case}'"
            self.violations.append({"replay": replay, "what": ran.violations, "endings": ran.endings})

    def statement(self) -> str:
        return statement(len(self.violations), self.kills, "injected crashes")

    def write(self) -> None:
        """All of it or nothing: a run that is killed leaves the last whole report."""
        now_at = commit()
        if now_at not in self.commits:
            self.commits.append(now_at)
        document = {
            "layer": "forked",
            "what": WHAT,
            "conditions": CONDITIONS,
            "statement": self.statement(),
            "commit": now_at,
            "commits": self.commits,
            "versions": {
                "python": platform.python_version(),
                "postgresql": self.postgresql,
                **{name: version(name) for name in ("sqlalchemy", "psycopg")},
            },
            "seeds": self.seeds,
            "injected": self.injected,
            "kills": self.kills,
            "cycles": self.cycles,
            "violations": self.violations,
            "mended": self.mended,
            "seconds": round(self.seconds, 1),
            "started": self.started,
            "updated": clock.now().isoformat(timespec="seconds"),
            "every": self.every,
            "points": {flow: dict(sorted(found.items())) for flow, found in sorted(self.points.items())},
            "cells": {flow: dict(sorted(found.items())) for flow, found in sorted(self.cells.items())},
            "done": self.done,
        }
        write_json(self.path, document)
