"""A lane: one process, and one round after the other in it."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

from eoframework import clock
from tests.campaign.cuts_check import judge
from tests.campaign.cuts_world import Plan, Result, Round
from tests.conftest import Addresses

# Not forked: the process that starts the lanes has clients of Kafka, whose threads a fork would not have.
CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Work:
    """What the lanes share."""

    addresses: Addresses
    template: str
    directory: Path
    tasks: Queue[Plan | None]
    """None: it is enough."""
    results: Queue[Result | str]
    """Of a round that the harness could not make, how it ended instead."""
    stop: Event


def run_round(addresses: Addresses, template: str, plan: Plan, directory: Path) -> Result:
    """One round, and what is found in the world that it leaves."""
    began = clock.monotonic()
    made = Round(addresses, template, plan, directory)
    with made.lived() as world:
        found = judge(world)
    return made.result(found, clock.monotonic() - began)


def live(work: Work) -> None:
    """Until there is no more to do, or the run is stopped, which is after a round."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # told by `stop`: what a Ctrl-C ends would look like a finding
    # The client tells of a transaction that it cannot abort because the commit it gave up is under way: on purpose.
    warnings.filterwarnings("ignore", "Producer abort_transaction failed during close", RuntimeWarning)
    while not work.stop.is_set() and (plan := work.tasks.get()) is not None:
        try:
            work.results.put(run_round(work.addresses, work.template, plan, work.directory))
        except Exception:  # noqa: BLE001 - the harness stumbled: said, counted as nothing, and the rest goes on
            work.results.put(f"round {plan.seed}:\n{traceback.format_exc()}")
