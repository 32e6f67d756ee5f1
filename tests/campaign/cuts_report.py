"""The report of this layer: what all runs so far have cut, and what was found."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eoframework import clock
from tests.campaign.cuts_fates import CALLS, Call, cuts
from tests.campaign.cuts_world import Result
from tests.campaign.full_tally import REPORT as FULL
from tests.campaign.full_tally import commit

REPORT = FULL.with_name("cuts.json")
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


class Report:
    """A JSON file that long runs add to, written whole or not at all."""

    def __init__(self, path: Path = REPORT) -> None:
        self.path = path
        self.document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else _empty()

    @property
    def violations(self) -> list[Any]:
        found: list[Any] = self.document["violations"]
        return found

    def cuts(self, call: Call) -> int:
        return cuts(self.document["injected"], call)

    def next_round(self, seed: int) -> int:
        """The first round of this seed that was not made yet."""
        return int(self.document["seeds"].get(str(seed), 0))

    def add(self, result: Result) -> None:
        """Count one round."""
        document, (seed, number) = self.document, result.seed.split(":")
        for name, counts in (("injected", result.tally.kinds), ("points", result.tally.places)):
            document[name] = dict(sorted((Counter(document[name]) + Counter(counts)).items()))
        document["rounds"] += 1
        document["seeds"][seed] = max(self.next_round(int(seed)), int(number) + 1)
        document["violations"] += [{"round": result.seed, "what": what} for what in result.violations]

    def write(self, *, seconds: float, versions: Mapping[str, str]) -> None:
        """On a crash: the file is as it was, or as it is now."""
        self.document["seconds"] = round(self.document["seconds"] + seconds, 1)
        self.document["updated"] = clock.now().isoformat(timespec="seconds")
        self.document["commit"] = commit()
        self.document["versions"] = dict(versions)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(self.document, indent=1, sort_keys=True) + "\n")
        os.replace(fresh, self.path)

    def statement(self) -> str:
        """What that says, and no more."""
        made = {call: self.cuts(call) for call in CALLS}
        total = sum(made.values())
        kinds = f"{total:,} injected cuts ({', '.join(f'{count:,} of {call}' for call, count in made.items())})"
        if self.violations or not total:
            return f"{len(self.violations)} violations in {kinds}"
        return f"0 violations in {kinds}; rule of three: < {3 / total:.1e} at 95 %"


def _empty() -> dict[str, Any]:
    return {
        **{"layer": "cuts", "what": _WHAT, "conditions": _CONDITIONS, "seeds": {}, "injected": {}, "points": {}},
        **{"violations": [], "rounds": 0, "seconds": 0.0, "started": clock.now().isoformat(timespec="seconds")},
    }
