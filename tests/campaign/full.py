"""The full stack on a real broker and a real server: many short runs under kills and other faults, each judged.

    python -m tests.campaign.full [--kills N] [--minutes N] [--seed N] [--points NAME,NAME] [--pairs] [--lanes N]
                                  [--outages] [--late] [--upkeep] [--full-disk]
                                  [--replay SEED:RUN]

Runs go on until so many kills were made or so many minutes are over; what they came to is added to
docs/campaign/full.json, and the next call goes on after the last run of its seed. SIGTERM and Ctrl-C end it cleanly.
A run that finds something keeps its history and logs. Nothing is ever proved by this: see the printed rule of three.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from eoframework import clock, dev
from tests.campaign.full_nursery import Zygote
from tests.campaign.full_places import template_database
from tests.campaign.full_plans import Options, plan_of
from tests.campaign.full_tally import Report
from tests.campaign.full_world import Result, World
from tests.campaign.nemeses_disk import SETTINGS, CannotMount, small_disk
from tests.campaign.nemeses_network import proxy_of_all_clients
from tests.campaign.nemeses_upkeep import BROKER
from tests.campaign.report_file import statement, versions
from tests.conftest import Addresses
from tests.protocol_proxy import ProtocolProxy

SESSION_TIMEOUT_MS = 3000
_PROGRESS_EVERY = 10.0


@dataclass(frozen=True)
class Stage:
    """What all runs have in common."""

    services: dev.Services
    addresses: Addresses
    proxy: ProtocolProxy | None = None
    """Before the broker, where requests are to come late."""
    disk: Path | None = None
    """The server's own, where that is to be full."""


class Campaign:
    """Lanes that take one run after the other, until it is enough."""

    def __init__(self, options: Options, report: Report, directory: Path) -> None:
        self.options, self.report, self.directory = options, report, directory
        self.stop = threading.Event()
        self.problems: list[str] = []
        self._lock = threading.Lock()
        self._began = self._saved = clock.monotonic()
        self._next = report.next_run(options.seed)
        self._kills_before = report.kills
        self._runs = 0
        self._versions: dict[str, str] = {}

    def run(self, stage: Stage) -> None:
        self._versions = versions(stage.services.database_url)
        with template_database(stage.addresses, f"campaign_{uuid.uuid4().hex[:10]}") as template:
            lanes = [
                threading.Thread(target=self._lane, args=(stage, template), name=f"lane-{number}")
                for number in range(self.options.lanes)
            ]
            for lane in lanes:
                lane.start()
            for lane in lanes:
                # One after the other: whichever lives longest, what is said is said every so often.
                while lane.is_alive():
                    lane.join(_PROGRESS_EVERY)
                    self._progress()
        self._save()

    def _lane(self, stage: Stage, template: str) -> None:
        with Zygote() as zygote:
            while (number := self._take()) is not None:
                plan = plan_of(self.options, number, stage.services, stage.proxy, stage.disk)
                try:
                    result = World(stage.addresses, template, zygote, self.directory, plan, stop=self.stop).run()
                except Exception:  # noqa: BLE001 - the harness stumbled: said, counted as nothing, and the rest goes on
                    with self._lock:
                        self.problems.append(f"run {plan.seed}:\n{traceback.format_exc()}")
                    print(self.problems[-1], flush=True)
                    continue
                self._note(result, number)

    def _take(self) -> int | None:
        with self._lock:
            minutes = (clock.monotonic() - self._began) / 60
            enough = self.report.kills - self._kills_before >= self.options.kills or minutes >= self.options.minutes
            if enough or self.stop.is_set() or self._runs >= self.options.runs or len(self.problems) > 3:
                return None
            self._next, self._runs = self._next + 1, self._runs + 1
            return self._next - 1

    def _note(self, result: Result, number: int) -> None:
        with self._lock:
            self.report.add(result, seed=self.options.seed, run=number)
            self._save()
            if self.options.verbose:
                print(f"run {result.plan.seed}: {result.tally.kills} kills, {result.sent} sent, drained in", end=" ")
                print(f"{result.drained and round(result.drained, 1)} s, {result.seconds:.0f} s in all", end=" ")
                print(dict(result.tally.answers or ()), flush=True)
        for violation in result.violations:
            print(f"run {result.plan.seed}: {violation.invariant}: {violation.what}", flush=True)

    def _save(self) -> None:
        now = clock.monotonic()
        # What is seen without a protection is no finding.
        if not self.options.replay and not self.options.without:
            self.report.write(seconds=now - self._saved, versions=self._versions)
        self._saved = now

    def _progress(self) -> None:
        minutes = (clock.monotonic() - self._began) / 60
        made = self.report.kills - self._kills_before
        rate = made / minutes if minutes else 0.0
        left = min(self.options.kills / rate if rate else self.options.minutes, self.options.minutes) - minutes
        print(
            f"{made} kills in {minutes:.1f} min ({rate:.0f}/min), {self.report.kills} in all, "
            f"{len(self.report.violations)} violations, {max(left, 0):.0f} min to go",
            flush=True,
        )


@contextmanager
def stage_of_our_own(state: Path, chosen: Options) -> Iterator[Stage]:
    """A broker that gives silent members up soon, and a server that need not survive the machine: kill -9 of its
    processes loses nothing that was handed to the kernel."""
    settings = {"fsync": "off", "full_page_writes": "off", "max_connections": "400"}
    with ExitStack() as stack:
        proxy, options = stack.enter_context(proxy_of_all_clients()) if chosen.late else (None, dev.KafkaOptions())
        disk = stack.enter_context(_disk(state)) if chosen.full_disk else None
        if disk is not None:
            settings |= SETTINGS
        properties = {**options.properties, **(BROKER if chosen.upkeep else {})}
        options = replace(options, session_timeout_ms=SESSION_TIMEOUT_MS, heap_mb=768, properties=properties)
        services = stack.enter_context(dev.start(state, kafka=options, postgres=dev.PostgresOptions(settings=settings)))
        servers = services.bootstrap_servers if proxy is None else f"127.0.0.1:{proxy.port}"
        yield Stage(services, Addresses(services.database_url, servers), proxy, disk)


@contextmanager
def _disk(state: Path) -> Iterator[Path | None]:
    """The server's own disk; None, and that is said, where we may not make one."""
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(state))
        except CannotMount as error:
            print(f"No disk is filled: {error}", flush=True)
            disk = None
        yield disk


def main() -> int:
    options = Options.parse(__doc__ or "")
    directory = Path(tempfile.mkdtemp(prefix="eo-campaign-"))
    state = options.state_dir or directory / ".eo"
    print(f"seed {options.seed}; histories and logs of what goes wrong in {directory}", flush=True)
    campaign = Campaign(options, Report(), directory)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: campaign.stop.set())
    with stage_of_our_own(state, options) as stage:
        campaign.run(stage)
    print(statement(len(campaign.report.violations), campaign.report.kills, "injected crashes"))
    return 1 if campaign.report.violations or campaign.problems else 0


if __name__ == "__main__":
    sys.exit(main())
