"""The files in docs/campaign: one a layer, written whole or not at all; and which commit and versions they tell of."""

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
from tests.processes import REPOSITORY

DIRECTORY = REPOSITORY / "docs" / "campaign"


class GrowingReport:
    """What all runs of a layer so far came to: a file that long runs add to."""

    def __init__(self, path: Path, empty: Mapping[str, Any]) -> None:
        """The one that is there. empty: what a first one begins with, besides what all of them have."""
        self.path = path
        self.document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else _first() | empty

    @property
    def violations(self) -> list[Any]:
        found: list[Any] = self.document["violations"]
        return found

    @property
    def kills(self) -> int:
        return injected(self.document, "kill")

    def next_run(self, seed: int) -> int:
        """The number of the first run of this seed that was not made yet."""
        return int(self.document["seeds"].get(str(seed), 0))

    def was_run(self, seed: int, number: int) -> None:
        """The next call goes on after it."""
        self.document["seeds"][str(seed)] = max(self.next_run(seed), number + 1)

    def count(self, name: str, counts: Mapping[str, int]) -> None:
        """Add these to the counts of that name."""
        self.document[name] = dict(Counter(self.document.get(name, {})) + Counter(counts))

    def write(self, *, seconds: float, versions: Mapping[str, str]) -> None:
        """`seconds` more have passed. On a crash: the file is as it was, or as it is now."""
        self.document["seconds"] = round(self.document["seconds"] + seconds, 1)
        self.document["updated"] = clock.now().isoformat(timespec="seconds")
        self.document["commit"] = commit()
        self.document["versions"] = dict(versions)
        write_json(self.path, self.document, sort_keys=True)


def _first() -> dict[str, Any]:
    started = clock.now().isoformat(timespec="seconds")
    return {"seeds": {}, "injected": {}, "violations": [], "seconds": 0.0, "started": started}


def write_json(path: Path, document: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """On a crash: the file is as it was, or as it is now."""
    write_whole(path, json.dumps(document, indent=1, ensure_ascii=False, sort_keys=sort_keys) + "\n")


def write_whole(path: Path, content: str) -> None:
    """On a crash: the file is as it was, or as it is now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(content)
    os.replace(fresh, path)


def injected(document: Mapping[str, Any], begins: str) -> int:
    """How many faults of the kinds whose name begins so."""
    counts = (document.get("injected") or {}).items()
    return sum(count for kind, count in counts if kind.startswith(begins))


def statement(violations: int, faults: int, what: str) -> str:
    """What so many violations in so many faults say, and no more."""
    said = f"{violations} violations in {faults:,} {what}"
    return said if violations or not faults else f"{said} (rule of three: < {3 / faults:.1e} at 95 %)"


def commit() -> str:
    """The commit of this checkout; "unknown" where there is none."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def versions(database_url: str) -> dict[str, str]:
    """Of all that was killed or asked."""
    return {**client_versions(), "kafka": jars.KAFKA_VERSION, "postgresql": server_version(database_url)}


def client_versions() -> dict[str, str]:
    """Of Python and the Kafka client."""
    return {
        "python": platform.python_version(),
        "confluent-kafka": confluent_kafka.__version__,
        "librdkafka": confluent_kafka.libversion()[0],
    }


def server_version(database_url: str) -> str:
    """PostgreSQL's."""
    engine = create_engine(database_url)
    with engine.connect() as connection:
        found = str(connection.scalar(text("SHOW server_version")))
    engine.dispose()
    return found
