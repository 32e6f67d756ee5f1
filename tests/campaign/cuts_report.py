"""The report of this layer: what all runs so far have cut, and what was found."""

from __future__ import annotations

from pathlib import Path

from tests.campaign.cuts_fates import CALLS, Call, cuts
from tests.campaign.cuts_world import Result
from tests.campaign.report_file import DIRECTORY, GrowingReport, statement

REPORT = DIRECTORY / "cuts.json"
_WHAT = (
    "A web application that publishes, a handler, the relay and a transform, on a real broker and a real PostgreSQL: "
    "the connection is cut at COMMIT and at the EndTxn that commits, before the server has seen it, when it has seen "
    "it and nobody waited for the answer, or when it has answered and the client has not heard it. Each worker "
    "recovers by itself; then rows, sums, topics, positions and offsets are judged from outside."
)
_CONDITIONS = (
    "Nothing is killed, so the server runs with fsync=off. A producer gives up a commit that nobody answers after 1 s "
    "instead of 15."
)


class Report(GrowingReport):
    """The layer's file."""

    def __init__(self, path: Path = REPORT) -> None:
        super().__init__(path, {"layer": "cuts", "what": _WHAT, "conditions": _CONDITIONS, "points": {}, "rounds": 0})

    def cuts(self, call: Call) -> int:
        return cuts(self.document["injected"], call)

    def add(self, result: Result) -> None:
        """Count one round."""
        document, (seed, number) = self.document, result.seed.split(":")
        self.count("injected", result.tally.kinds)
        self.count("points", result.tally.places)
        document["rounds"] += 1
        self.was_run(int(seed), int(number))
        document["violations"] += [{"round": result.seed, "what": what} for what in result.violations]

    def statement(self) -> str:
        """What that says, and no more."""
        made = {call: self.cuts(call) for call in CALLS}
        kinds = ", ".join(f"{count:,} of {call}" for call, count in made.items())
        return statement(len(self.violations), sum(made.values()), f"injected cuts: {kinds}")
