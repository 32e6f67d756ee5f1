"""Calls in doubt: PostgreSQL's COMMIT and Kafka's EndTxn are cut, in short rounds that are judged from outside.

    python -m tests.campaign.cuts [--cuts N] [--minutes N] [--seed N] [--lanes N] [--replay SEED:ROUND]
                                  [--without NAME] [--report FILE]

Rounds go on until so many cuts of each kind were made or so many minutes are over; what they came to is added to
docs/campaign/cuts.json, and the next call goes on after the last round of its seed. SIGTERM and Ctrl-C end it after the
rounds under way. A round that finds something prints its seed:round and keeps its log; then the exit code is 4. With
--without one recovery is taken out, and nothing is added to the report: something has to be found.
"""

from __future__ import annotations

import argparse
import queue
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import make_url

from eoframework import clock, dev
from tests.campaign.cuts_fates import CALLS
from tests.campaign.cuts_lane import CONTEXT, Work, live
from tests.campaign.cuts_report import REPORT, Report
from tests.campaign.cuts_without import WITHOUT
from tests.campaign.cuts_world import Plan, Result
from tests.campaign.report_file import versions
from tests.conftest import Addresses, database_to_copy

_FOUND, _STUMBLED = 4, 1
_PROGRESS_EVERY = 10.0
_MOST_PROBLEMS = 3
_PATIENCE_WITHOUT = 30.0
"""Seconds for a round in which messages are lost, which would be waited for."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    cuts: int
    minutes: float
    seed: int
    lanes: int
    replay: str
    without: str
    report: Path

    @classmethod
    def parse(cls) -> Options:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--cuts", type=int, default=10**9, help="of each kind")
        parser.add_argument("--minutes", type=float, default=10.0)
        parser.add_argument("--seed", type=int, default=1)
        parser.add_argument("--lanes", type=int, default=4, help="rounds side by side")
        parser.add_argument("--replay", default="", metavar="SEED:ROUND", help="the same cuts in the same order")
        parser.add_argument("--without", default="", choices=WITHOUT, help="a recovery to run without")
        parser.add_argument("--report", type=Path, default=REPORT)
        options = cls(**vars(parser.parse_args()))
        return replace(options, lanes=1) if options.replay else options

    @property
    def counts(self) -> bool:
        """Whether this run is one to be added up."""
        return not (self.replay or self.without)

    def plan(self, number: int) -> Plan:
        seed = self.replay or f"{self.seed}:{number}"
        return Plan(seed, without=self.without, longest=_PATIENCE_WITHOUT if self.without else Plan.longest)


class Campaign:
    """Keeps the lanes at work until it is enough."""

    def __init__(self, options: Options, report: Report) -> None:
        self.options, self.report = options, report
        self.stopped = False
        self.found = self.problems = 0
        self._before = {call: report.cuts(call) for call in CALLS}
        self._next, self._given = report.next_run(options.seed), 0
        self._began = self._saved = self._told = clock.monotonic()
        self._versions: dict[str, str] = {}

    def run(self, addresses: Addresses, directory: Path) -> None:
        self._versions = versions(addresses.database_url)
        self._began = self._saved = self._told = clock.monotonic()
        with database_to_copy(addresses) as template:
            name = str(make_url(template).database)
            work = Work(addresses, name, directory, CONTEXT.Queue(), CONTEXT.Queue(), CONTEXT.Event())
            lanes = [CONTEXT.Process(target=live, args=(work,)) for _ in range(self.options.lanes)]
            for lane in lanes:
                lane.start()
                self._give(work)
            while any(lane.is_alive() for lane in lanes):
                self._take(work)
            for lane in lanes:
                lane.join()

    def _give(self, work: Work) -> None:
        """A lane's next round; none if it is enough."""
        made = min(self.report.cuts(call) - self._before[call] for call in CALLS)
        minutes = (clock.monotonic() - self._began) / 60
        enough = made >= self.options.cuts or minutes >= self.options.minutes or self.problems > _MOST_PROBLEMS
        over = enough or self.stopped or (self._given and self.options.replay)
        work.tasks.put(None if over else self.options.plan(self._next + self._given))
        self._given += 1

    def _take(self, work: Work) -> None:
        if self.stopped:
            work.stop.set()
        try:
            result = work.results.get(timeout=1.0)
        except queue.Empty:
            return
        self._note(result)
        self._give(work)

    def _note(self, result: Result | str) -> None:
        if isinstance(result, str):
            self.problems += 1
            print(result, flush=True)
            return
        self.report.add(result)
        for violation in result.violations:
            self.found += 1
            print(f"round {result.seed}: {violation}", flush=True)
        if result.log:
            print(f"round {result.seed}: its log is {result.log}", flush=True)
        now = clock.monotonic()
        if self.options.counts:
            self.report.write(seconds=now - self._saved, versions=self._versions)
        self._saved = now
        if now - self._told > _PROGRESS_EVERY or self.options.replay:
            self._told = now
            minutes = (now - self._began) / 60
            made = {call: self.report.cuts(call) - self._before[call] for call in CALLS}
            print(
                f"{made} in {minutes:.1f} min ({sum(made.values()) / minutes:.0f}/min): {self.report.statement()}",
                flush=True,
            )


@contextmanager
def _services(state: Path) -> Iterator[Addresses]:
    """A broker and a server that are gone at the end. Nothing is killed, so nothing has to reach the disk."""
    settings = {"fsync": "off", "full_page_writes": "off"}
    try:
        with dev.start(state, postgres=dev.PostgresOptions(settings=settings)) as services:
            yield Addresses(services.database_url, services.bootstrap_servers)
    finally:
        dev.reset(state)


def main() -> int:
    options = Options.parse()
    directory = Path(tempfile.mkdtemp(prefix="eo-cuts-"))
    print(f"seed {options.replay or options.seed}; logs of what goes wrong in {directory}", flush=True)
    campaign = Campaign(options, Report(options.report if options.counts else directory / "cuts.json"))

    def stop(*_: object) -> None:
        campaign.stopped = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with _services(directory / ".eo") as addresses:
        campaign.run(addresses, directory)
    if not any(directory.iterdir()):
        directory.rmdir()
    print(campaign.report.statement() if options.counts else f"{campaign.found} violations found")
    if campaign.found:
        return _FOUND
    return _STUMBLED if campaign.problems else 0


if __name__ == "__main__":
    sys.exit(main())
