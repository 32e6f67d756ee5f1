"""Random faults of three brokers under load, for as long as you like; then everything is counted.

    python -m tests.cluster.campaign --minutes 30 [--seed N] [--flow spine | transform] [--faults 8]

Both flows in turn, each through so many faults; the first that loses, repeats, reorders or stands still ends the
campaign with exit code 1. `--seed` gives the same faults in the same order (what they hit still depends on the moment).
"""

from __future__ import annotations

import argparse
import random
import tempfile
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from eoframework import clock
from tests.cluster.brokers import Brokers, three_brokers
from tests.cluster.faults import frozen, killed, restarted, through
from tests.cluster.flows import SHORT_TIMEOUTS, Chain, Flow, Spine, running
from tests.cluster.places import migrated_database

FLOWS: dict[str, type[Chain] | type[Spine]] = {"spine": Spine, "transform": Chain}
RATE = 50.0
LONGEST_FREEZE = 20.0


def draw(chance: random.Random, brokers: Brokers, flow: Flow) -> tuple[str, Callable[[], AbstractContextManager[None]]]:
    """A fault, told in words, and the doing of it."""
    role = chance.choice(sorted(flow.roles))
    kind = chance.choice(["kill", "kill", "freeze", "freeze", "restart", "rolling restart"])
    if kind == "rolling restart":
        order = chance.sample(brokers.nodes, 3)
        return kind, lambda: restarted(*order, whole=brokers.in_sync)
    seconds = round(chance.uniform(0.5, LONGEST_FREEZE), 1)
    node = flow.roles[role]()
    does: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "kill": lambda: killed(node),
        "freeze": lambda: frozen(node, seconds=seconds),
        "restart": lambda: restarted(node, whole=brokers.in_sync),
    }
    told = f"{kind} for {seconds:g} s" if kind == "freeze" else kind
    return f"{told}: {role} ({node.name})", does[kind]


def one_run(name: str, brokers: Brokers, directory: Path, chance: random.Random, faults: int) -> None:
    with (
        migrated_database(brokers) as url,
        running(FLOWS[name], brokers, url, directory, rate=RATE, **SHORT_TIMEOUTS) as flow,
    ):
        for number in range(1, faults + 1):
            told, fault = draw(chance, brokers, flow)
            print(f"  {number:3} {told}", end="", flush=True)
            started = clock.monotonic()
            through(brokers, flow, fault())
            print(f": went on; whole again after {clock.monotonic() - started:.1f} s", flush=True)
    print(f"  {flow.load.sent} items, each once and in order", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=uuid.uuid4().int % 1_000_000)
    parser.add_argument("--flow", choices=FLOWS, help="only this one")
    parser.add_argument("--faults", type=int, default=8, help="of one run, before everything is counted")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    directory = Path(tempfile.mkdtemp(prefix="eo-campaign-"))
    print(f"seed {arguments.seed}, logs in {directory}", flush=True)
    until = clock.monotonic() + arguments.minutes * 60
    runs = 0
    with three_brokers(directory) as brokers:
        while clock.monotonic() < until or not runs:
            for name in [arguments.flow] if arguments.flow else FLOWS:
                runs += 1
                print(f"run {runs}: {name}", flush=True)
                logs = directory / f"run-{runs}"
                logs.mkdir()
                one_run(name, brokers, logs, chance, arguments.faults)
    print(f"{runs} runs, nothing lost, repeated or out of order")


if __name__ == "__main__":
    main()
