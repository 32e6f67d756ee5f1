"""The report of this layer: what all runs so far have injected, and what was found."""

from __future__ import annotations

from pathlib import Path

from tests.campaign.full_world import Result
from tests.campaign.report_file import DIRECTORY, GrowingReport

REPORT = DIRECTORY / "full.json"
_WHAT = (
    "Real processes on a real broker and a real PostgreSQL server: two handlers joined by the outbox and two relays, "
    "with a transform behind them, killed at crash points, frozen, cut off and disturbed under load; then all is "
    "counted."
)


class Report(GrowingReport):
    """The layer's file."""

    def __init__(self, path: Path = REPORT) -> None:
        counted = {"runs": 0, "messages": 0, "aborted_records": 0}
        super().__init__(path, {"layer": "full", "what": _WHAT, "points": {}, "pairs": {}, **counted})

    def add(self, result: Result, *, seed: int, run: int) -> None:
        """Count one run."""
        document, tally = self.document, result.tally
        self.count("injected", tally.kinds)
        self.count("points", tally.points)
        self.count("pairs", tally.pairs)
        self.count("late_answers", tally.answers)
        document["runs"] += 1
        document["messages"] += result.sent
        document["aborted_records"] += result.aborted
        self.was_run(seed, run)
        for violation in result.violations:
            document["violations"].append(
                {"run": result.plan.seed, "invariant": violation.invariant, "what": violation.what}
            )
