"""The primary dies under the full campaign's load and a standby is promoted: what is lost then, and whether it is told.

    python -m tests.campaign.promotions [--rounds N] [--seed N]

Rounds with a synchronous standby: two promotions, and nothing may be lost, by the campaign's own checker. Rounds with
an asynchronous one that is cut off before: what the new primary lacks must be what the workers refuse to guess about,
partition by partition and to the offset. They are added to docs/campaign/promotions.json.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from eoframework import clock, dev
from tests.campaign.checker import Violation
from tests.campaign.full import SESSION_TIMEOUT_MS
from tests.campaign.full_nursery import Zygote
from tests.campaign.full_places import template_database
from tests.campaign.full_world import Plan, Result, World
from tests.campaign.promotions_check import lost_and_told
from tests.campaign.report_file import DIRECTORY, GrowingReport, statement, versions
from tests.conftest import Addresses
from tests.postgres.servers import NEWEST, programs_of
from tests.postgres.standby import Replicas, replicas

PATH = DIRECTORY / "promotions.json"
_WHAT = (
    "The full campaign's processes on a primary with standbys: it is killed under load and a standby promoted, twice "
    "with synchronous ones, of which nothing may be lost; once with an asynchronous one that was cut off before, whose "
    "lost tail must be told to the offset."
)


class Promotions:
    """Kills the primary and promotes a standby, at moments that the seed draws."""

    def __init__(self, servers: Replicas, seed: str, *, synchronous: bool) -> None:
        self._servers, self._synchronous = servers, synchronous
        self._chance = random.Random(f"{seed} promotions")
        self._left = 2 if synchronous else 1
        self._next = self._chance.uniform(8.0, 14.0)

    def __call__(self, seconds: float, counts: Counter[str]) -> None:
        """One if it is time; it is over when this returns."""
        if not self._left or seconds < self._next:
            return
        self._left -= 1
        if not self._synchronous:
            self._servers.cut()
            clock.sleep(self._chance.uniform(0.2, 1.5))
        self._servers.kill_primary()
        clock.sleep(self._chance.uniform(0.0, 1.0))
        self._servers.promote()
        counts["kill of a primary, synchronous" if self._synchronous else "kill of a primary, asynchronous"] += 1
        self._next = seconds + self._chance.uniform(6.0, 12.0)

    def heal(self, counts: Counter[str]) -> None:
        """Those that were not made yet are not made."""


def play(kafka: dev.Services, seed: str, directory: Path, *, synchronous: bool) -> Result:
    """One round, on servers of its own."""
    with replicas(programs_of(NEWEST), synchronous=synchronous, count=3 if synchronous else 2) as servers:
        addresses = Addresses(servers.url, kafka.bootstrap_servers)
        plan = Plan(
            seed=seed,
            kills=1000,
            longest=35.0 if synchronous else 25.0,
            long=True,
            outage=Promotions(servers, seed, synchronous=synchronous),
            patience=60.0 if synchronous else 3.0,
        )
        with template_database(addresses, f"campaign_{uuid.uuid4().hex[:10]}") as template, Zygote() as zygote:
            return World(addresses, template, zygote, directory, plan).run()


class Report(GrowingReport):
    """The layer's file."""

    def __init__(self) -> None:
        counted = {"rounds": 0, "messages": 0, "lost_messages_that_were_told": 0}
        super().__init__(PATH, {"layer": "promotions", "what": _WHAT, **counted})

    def add(self, result: Result, violations: list[Violation], *, lost: int) -> None:
        """Count one round."""
        document = self.document
        self.count("injected", result.tally.kinds)
        document["rounds"] += 1
        document["messages"] += result.sent
        document["lost_messages_that_were_told"] += lost
        found = [{"run": result.plan.seed, "invariant": each.invariant, "what": each.what} for each in violations]
        document["violations"] += found


def seeds(chosen: int, report: Report) -> Iterator[tuple[str, bool]]:
    """Synchronous and asynchronous in turn, on from the last round."""
    number = int(report.document["rounds"])
    while True:
        yield f"{chosen}:{number}", number % 2 == 0
        number += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="eo-promotions-"))
    report = Report()
    print(f"histories and logs in {directory}", flush=True)
    # Its own PostgreSQL is there for nothing but its version: the replicas are of the same programs.
    kafka = dev.KafkaOptions(session_timeout_ms=SESSION_TIMEOUT_MS)
    with dev.start(directory / ".eo", kafka=kafka) as services:
        rounds = seeds(options.seed, report)
        for _ in range(options.rounds):
            seed, synchronous = next(rounds)
            result = play(services, seed, directory, synchronous=synchronous)
            lost, violations = (0, result.violations) if synchronous else lost_and_told(result, directory)
            report.add(result, violations, lost=lost)
            report.write(seconds=result.seconds, versions=versions(services.database_url))
            what = "synchronous" if synchronous else f"asynchronous, {lost} messages lost and told"
            print(f"round {seed}: {what}, {result.sent} sent, {result.tally.kills} kills", flush=True)
            for violation in violations:
                print(f"round {seed}: {violation.invariant}: {violation.what}", flush=True)
    print(statement(len(report.violations), report.kills, "injected crashes"))
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
