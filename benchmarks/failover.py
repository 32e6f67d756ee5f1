"""What a failing broker costs: three brokers under load, one fault after the other, before, while and after.

    python -m benchmarks.failover [--flow spine | transform] [--rate 50] [--seconds 10] [--socket-timeout-ms N]

Starts three brokers and a database server of its own. Items come at a fixed rate, whatever happens; their latency
counts from when they were due to when a read_committed consumer has all their outputs, so that those which had to wait
count with all of their waiting.

  before      rate of items that came out, and latency, in the seconds before the fault
  gap         the longest time without any output, from the fault until it is undone
  half        seconds from the fault until half of the rate before came out again, for a second on end, and nothing fell
              below it any more before the fault was undone
  return      the same gap, from when the fault is undone (a broker starts again, or wakes up) to the end
  after       latency of what was due in the last seconds

The brokers here are given up by their cluster after 3 s; Kafka's default is 9 s: there, add 6 s to what a frozen broker
costs. `--socket-timeout-ms` overrides what our clients use, for comparison (librdkafka's default is 60000).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

from eoframework import clock
from tests.cluster.brokers import Brokers, three_brokers
from tests.cluster.faults import frozen, killed, restarted
from tests.cluster.flows import Chain, Flow, Role, Spine, running
from tests.cluster.places import migrated_database
from tests.processes import eventually

FLOWS: dict[str, type[Chain] | type[Spine]] = {"spine": Spine, "transform": Chain}
LONGEST = 120.0
# As `eo dev up` has it: above the transaction timeout of transforms, which then keep their defaults.
SESSION_TIMEOUT_MS = 6000
HEAD = ("fault", "rate", "p50 ms", "p99 ms", "gap s", "half s", "return gap s", "after p50", "after p99")

Times = list[float]


def faults(brokers: Brokers, flow: Flow) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """What is done, in this order; who is hit is asked when it is done."""
    roles = flow.roles
    found = {f"kill -9 the {role}": _killing(roles[role]) for role in roles}
    found["restart the coordinator of transactions"] = lambda: restarted(
        roles["coordinator of transactions"](), whole=brokers.in_sync
    )
    for role in ("leader of the target", "coordinator of transactions", "coordinator of the group"):
        found[f"freeze the {role}"] = _freezing(roles[role])
    return found


def _killing(role: Role) -> Callable[[], AbstractContextManager[None]]:
    return lambda: killed(role())


def _freezing(role: Role) -> Callable[[], AbstractContextManager[None]]:
    return lambda: frozen(role())


def measure(
    brokers: Brokers, flow: Flow, fault: Callable[[], AbstractContextManager[None]], seconds: float
) -> tuple[str, ...]:
    """One line of the table, without the fault's name."""
    eventually(brokers.in_sync, "all replicas in sync")
    flow.goes_on()
    began = clock.monotonic()
    _pass(began + seconds)
    failing = fault()
    struck = clock.monotonic()
    with failing:
        flow.goes_on(seconds=LONGEST)
        _pass(struck + seconds)
        mended = clock.monotonic()
    eventually(brokers.in_sync, "all replicas in sync again")
    flow.goes_on(seconds=LONGEST)
    calm = clock.monotonic()
    _pass(calm + seconds)
    ended = clock.monotonic()
    flow.goes_on()
    wholes = sorted(flow.watcher.whole_at.values())
    rate = sum(began <= at < struck for at in wholes) / (struck - began)
    before, after = _latencies(flow, began, struck), _latencies(flow, calm, ended)
    half = _back_at(wholes, struck, mended, rate / 2)
    return (
        f"{rate:.0f}",
        *_percentiles(before),
        f"{_longest_gap(wholes, struck, mended):.1f}",
        "not" if half is None else f"{half:.1f}",
        f"{_longest_gap(wholes, mended, ended):.1f}",
        *_percentiles(after),
    )


def _pass(until: float) -> None:
    clock.sleep(max(until - clock.monotonic(), 0))


def _latencies(flow: Flow, begin: float, end: float) -> Times:
    due = ((n, at) for n, at in enumerate(list(flow.load.due_at)) if begin <= at < end)
    whole = flow.watcher.whole_at
    return sorted((whole[n] - at) * 1000 for n, at in due if n in whole)


def _percentiles(values: Times) -> tuple[str, str]:
    if not values:
        return "-", "-"
    return f"{values[len(values) // 2]:.0f}", f"{values[min(int(len(values) * 0.99), len(values) - 1)]:.0f}"


def _longest_gap(wholes: Times, begin: float, end: float) -> float:
    points = [begin, *(at for at in wholes if begin <= at < end), end]
    return max(later - earlier for earlier, later in pairwise(points))


def _back_at(wholes: Times, struck: float, end: float, wanted: float) -> float | None:
    """Seconds until the last of the seconds (in steps of 0.1 s) with fewer than `wanted` was over; None: never."""
    steps = int((end - struck - 1) * 10)
    low = [
        step / 10
        for step in range(steps + 1)
        if sum(struck + step / 10 <= at < struck + step / 10 + 1 for at in wholes) < wanted
    ]
    if not low:
        return 0.0
    return None if low[-1] >= steps / 10 else low[-1] + 0.1


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    first, *others = widths
    return "\n".join(
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flow", choices=FLOWS, help="only this one")
    parser.add_argument("--fault", default="", help="only those with this in their name")
    parser.add_argument("--rate", type=float, default=50)
    parser.add_argument("--seconds", type=float, default=10, help="before, at least in, and after each fault")
    parser.add_argument("--socket-timeout-ms", type=int, help="instead of our clients' own")
    arguments = parser.parse_args()
    given = arguments.socket_timeout_ms
    environment = {"EO_KAFKA_SOCKET_TIMEOUT_MS": str(given)} if given else {}
    directory = Path(tempfile.mkdtemp(prefix="eo-failover-"))
    with three_brokers(directory, session_timeout_ms=SESSION_TIMEOUT_MS) as brokers:
        for name in [arguments.flow] if arguments.flow else FLOWS:
            rows: list[tuple[str, ...]] = [HEAD]
            with (
                migrated_database(brokers) as url,
                running(FLOWS[name], brokers, url, directory, rate=arguments.rate, **environment) as flow,
            ):
                for told, fault in faults(brokers, flow).items():
                    if arguments.fault in told:
                        rows.append((told, *measure(brokers, flow, fault, arguments.seconds)))
                        print("  ".join(rows[-1]), flush=True)
            print(f"\n{name}: {flow.load.sent} items, each once and in order\n{table(rows)}\n", flush=True)


if __name__ == "__main__":
    main()
