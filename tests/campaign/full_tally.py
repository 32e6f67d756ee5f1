"""The report of a layer of the campaign: a JSON file that long runs add to, written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import confluent_kafka
from sqlalchemy import create_engine, text

from eoframework import clock
from eoframework.dev import jars
from tests.campaign.full_world import Result
from tests.conftest import REPOSITORY

REPORT = REPOSITORY / "docs" / "campaign" / "full.json"
_WHAT = (
    "Real processes on a real broker and a real PostgreSQL server: two handlers joined by the outbox and two relays, "
    "with a transform behind them, killed at crash points, frozen, cut off and disturbed under load; then all is "
    "counted."
)


class Report:
    """What all runs so far came to."""

    def __init__(self, path: Path = REPORT) -> None:
        self.path = path
        self.document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else _empty()

    @property
    def kills(self) -> int:
        return sum(count for kind, count in self.document["injected"].items() if kind.startswith("kill"))

    @property
    def violations(self) -> list[Any]:
        found: list[Any] = self.document["violations"]
        return found

    def next_run(self, seed: int) -> int:
        """The number of the first run of this seed that was not made yet."""
        return int(self.document["seeds"].get(str(seed), 0))

    def add(self, result: Result, *, seed: int, run: int) -> None:
        """Count one run."""
        document = self.document
        for name, counts in (("injected", result.tally.kinds), ("points", result.tally.points)):
            document[name] = _sum(document[name], counts)
        document["pairs"] = _sum(document["pairs"], result.tally.pairs)
        document["late_answers"] = _sum(document.get("late_answers", {}), result.tally.answers)
        document["runs"] += 1
        document["messages"] += result.sent
        document["aborted_records"] += result.aborted
        document["seeds"][str(seed)] = max(self.next_run(seed), run + 1)
        for violation in result.violations:
            document["violations"].append(
                {"run": result.plan.seed, "invariant": violation.invariant, "what": violation.what}
            )

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


def _empty() -> dict[str, Any]:
    return {
        **{"layer": "full", "what": _WHAT, "seeds": {}, "injected": {}, "points": {}, "pairs": {}, "violations": []},
        **{"runs": 0, "messages": 0, "aborted_records": 0, "seconds": 0.0},
        "started": clock.now().isoformat(timespec="seconds"),
    }


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in (Counter(one) + Counter(other)).items() if count}


def commit() -> str:
    """The commit of this checkout; "unknown" where there is none."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def versions(database_url: str) -> dict[str, str]:
    """Of all that was killed or asked."""
    engine = create_engine(database_url)
    with engine.connect() as connection:
        postgresql = str(connection.scalar(text("SHOW server_version")))
    engine.dispose()
    return {
        "python": platform.python_version(),
        "postgresql": postgresql,
        "kafka": jars.KAFKA_VERSION,
        "librdkafka": confluent_kafka.libversion()[0],
        "confluent-kafka": confluent_kafka.version()[0],
    }
