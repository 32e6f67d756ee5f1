"""Random faults of three brokers under load, for as long as you like; then everything is counted.

    python -m tests.cluster.campaign --minutes 30 [--seed N] [--flow spine | transform] [--faults 8]

Both flows in turn, each through so many faults; the first that loses, repeats, reorders or stands still ends the
campaign with exit code 1. What it came to is added to docs/campaign/brokers.json. `--seed` gives the same faults in the
same order (what they hit still depends on the moment), after those of the runs of that seed that were made before.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from eoframework import clock
from tests.campaign.report_file import DIRECTORY, GrowingReport, statement, versions
from tests.cluster.brokers import Brokers, three_brokers
from tests.cluster.faults import frozen, killed, restarted, through
from tests.cluster.flows import SHORT_TIMEOUTS, Chain, Flow, Spine, running
from tests.cluster.places import migrated_database

FLOWS: dict[str, type[Chain] | type[Spine]] = {"spine": Spine, "transform": Chain}
RATE = 50.0
LONGEST_FREEZE = 20.0
REPORT = DIRECTORY / "brokers.json"
_WHAT = (
    "A chain of transforms, and the spine of worker and relay, by turns, under load on three brokers, of which the one "
    "with a part in it is killed, frozen or restarted, or all of them one after the other; the same processes go on, "
    "nobody lending a hand, and every item is there once and in order."
)


class Report(GrowingReport):
    """The layer's file."""

    def __init__(self) -> None:
        super().__init__(REPORT, {"layer": "brokers", "what": _WHAT, "points": {}, "runs": 0, "items": 0})

    def add(self, tally: Tally, *, seed: int, run: int, found: AssertionError | None) -> None:
        """A run that was judged: faults of one that was broken off would count as harmless."""
        if found is not None:
            self.violations.append({"run": f"{seed}:{run}", "invariant": tally.flow, "what": str(found)[:500]})
        self.count("injected", tally.injected)
        self.count("points", tally.points)
        self.document["runs"] += 1
        self.document["items"] += tally.items
        self.was_run(seed, run)


@dataclass
class Tally:
    """What one run came to."""

    flow: str
    injected: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    """Which part the broker had that it was done to."""
    items: int = 0


class Drawn(NamedTuple):
    """A fault, told in words, and the doing of it."""

    kind: str
    role: str
    told: str
    fault: Callable[[], AbstractContextManager[None]]


def draw(chance: random.Random, brokers: Brokers, flow: Flow) -> Drawn:
    """The next fault of this seed."""
    role = chance.choice(sorted(flow.roles))
    kind = chance.choice(["kill", "kill", "freeze", "freeze", "restart", "rolling restart"])
    if kind == "rolling restart":
        order = chance.sample(brokers.nodes, 3)
        return Drawn(kind, "all", kind, lambda: restarted(*order, whole=brokers.in_sync))
    seconds = round(chance.uniform(0.5, LONGEST_FREEZE), 1)
    node = flow.roles[role]()
    does: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "kill": lambda: killed(node),
        "freeze": lambda: frozen(node, seconds=seconds),
        "restart": lambda: restarted(node, whole=brokers.in_sync),
    }
    lasting = f" for {seconds:g} s" if kind == "freeze" else ""
    return Drawn(f"{kind} of a broker", role, f"{kind}{lasting}: {role} ({node.name})", does[kind])


def one_run(brokers: Brokers, directory: Path, chance: random.Random, faults: int, tally: Tally) -> None:
    with (
        migrated_database(brokers) as url,
        running(FLOWS[tally.flow], brokers, url, directory, rate=RATE, **SHORT_TIMEOUTS) as flow,
    ):
        for number in range(1, faults + 1):
            drawn = draw(chance, brokers, flow)
            print(f"  {number:3} {drawn.told}", end="", flush=True)
            tally.injected[drawn.kind] += 1
            tally.points[f"{tally.flow}: {drawn.role}"] += 1
            started = clock.monotonic()
            through(brokers, flow, drawn.fault())
            print(f": went on; whole again after {clock.monotonic() - started:.1f} s", flush=True)
    tally.items = flow.load.sent
    print(f"  {flow.load.sent} items, each once and in order", flush=True)


def noted_run(brokers: Brokers, directory: Path, report: Report, arguments: argparse.Namespace) -> None:
    """The next run of the seed, and what came of it in the report; raises what it found."""
    number, began = report.next_run(arguments.seed), clock.monotonic()
    tally = Tally(arguments.flow or list(FLOWS)[number % len(FLOWS)])
    print(f"run {arguments.seed}:{number}: {tally.flow}", flush=True)
    logs = directory / f"run-{number}"
    logs.mkdir()
    chance = random.Random(f"{arguments.seed}:{number}")
    found: AssertionError | None = None
    try:
        one_run(brokers, logs, chance, arguments.faults, tally)
    except AssertionError as error:
        found = error
    report.add(tally, seed=arguments.seed, run=number, found=found)
    report.write(seconds=clock.monotonic() - began, versions=versions(brokers.services.database_url))
    if found is not None:
        raise found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--flow", choices=FLOWS, help="only this one")
    parser.add_argument("--faults", type=int, default=8, help="of one run, before everything is counted")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="eo-campaign-"))
    report = Report()
    print(f"seed {arguments.seed}, logs in {directory}", flush=True)
    with three_brokers(directory) as brokers:
        until = clock.monotonic() + arguments.minutes * 60
        while clock.monotonic() < until:
            noted_run(brokers, directory, report, arguments)
    print(statement(len(report.violations), report.kills, "injected crashes"))


if __name__ == "__main__":
    main()
