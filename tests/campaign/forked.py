"""Crash points on a real PostgreSQL, by the hundred thousand: `python -m tests.campaign.forked --kills 100000`.

One process imports everything, opens nothing, and forks one child for each life. A cycle is: a child is killed at a
boundary, its successor perhaps too, the last one comes to the end; then everything that is left is checked. First each
event of every flow alone, then every ordered pair of a boundary and one that the recovery from it hits, then a process
frozen at each event and woken when its successor has done everything, then cases drawn by seed with up to eight crashes
each. A run adds to its report and goes on where the last one ended.

    --replay 'failure/0/db.committing:3,consume.claimed:1'     one cycle again, with all that happened in it
    --replay 7:1234                                            the 1234th drawn cycle of seed 7
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

from eoframework import clock
from tests.campaign.forked_case import FLOWS, Case, Kill, random_case
from tests.campaign.forked_every import new_points, pairs, points, singles, uncrashed, zombies
from tests.campaign.forked_lane import Lane, Ran
from tests.campaign.forked_pool import Pool
from tests.campaign.forked_report import Report
from tests.campaign.forked_server import lane_database, own_server
from tests.campaign.forked_without import CASES
from tests.campaign.report_file import DIRECTORY, server_version

REPORT = DIRECTORY / "forked.json"
STAGES = ("singles", "pairs", "zombies", "random")
_TELL_EVERY = 15.0


class Campaign:
    """The stages of a run, in turn."""

    def __init__(self, pool: Pool, report: Report, options: argparse.Namespace, stop: threading.Event) -> None:
        self._pool, self._report, self._options = pool, report, options
        self._stop = stop
        self._begun = self._told = clock.monotonic()
        self._before = report.seconds
        self._kills_before = report.kills
        self._ends = self._begun + 60 * options.minutes if options.minutes else float("inf")
        self._flows: tuple[str, ...] = tuple(options.flow or FLOWS)

    def run(self) -> None:
        stages = self._options.stages.split(",")
        if {"singles", "pairs", "zombies"} & set(stages):
            found = self._singles()
            if "pairs" in stages:
                self._pairs(found)
            if "zombies" in stages:
                list(self._counted("zombies", [case for single in found for case in zombies(single)]))
        if "random" in stages:
            seed = self._options.seed
            list(self._run(self._drawn(seed)))
        self._tell(last=True)

    # --- stages ---

    def _singles(self) -> list[Ran]:
        left = [flow for flow in self._flows if not self._is_complete(flow)]
        traces = {ran.case.split("/")[0]: ran.traces[0] for ran in self._run(map(uncrashed, left))}
        each = {flow: list(singles(flow, trace)) for flow, trace in sorted(traces.items())}
        cases = new_points(each) if self._options.first else [case for found in each.values() for case in found]
        return list(self._counted("singles", cases))

    def _is_complete(self, flow: str) -> bool:
        """Whether an earlier run has done all pairs of it."""
        done, every = self._report.every.get("pairs", {}).get(flow, [0, 0])
        return done == every > 0 and not self._options.again

    def _pairs(self, found: list[Ran]) -> None:
        cases = [case for single in found if _is_first(single) for case in pairs(single)]
        if self._options.sample:
            each = [[case for case in cases if case.flow.name == flow] for flow in self._flows]
            cases = [case for of_flow in each for case in of_flow[:: self._options.sample]]
        known = {flow: set(done) for flow, done in self._report.done.items()}
        open_ones = [case for case in cases if _kills(case) not in known.get(case.flow.name, ())]
        for ran in self._counted("pairs", cases, open_ones):
            case = Case.parse(ran.case)
            if not ran.violations:
                self._report.done.setdefault(case.flow.name, []).append(_kills(case))

    def _drawn(self, seed: int) -> Iterator[Case]:
        while True:
            cycle = self._report.seeds.get(str(seed), 0)
            self._report.seeds[str(seed)] = cycle + 1
            yield random_case(seed, cycle, self._flows)

    def _counted(self, stage: str, cases: list[Case], left: list[Case] | None = None) -> Iterator[Ran]:
        """Run them, and count how many of all of them were run."""
        left = cases if left is None else left
        tally = self._report.every.setdefault(stage, {})
        for flow in {case.flow.name for case in cases}:
            those = [case for case in cases if case.flow.name == flow]
            tally[flow] = [len(those) - sum(case.flow.name == flow for case in left), len(those)]
        for ran in self._run(left):
            tally[ran.case.split("/")[0]][0] += not ran.violations
            yield ran

    # --- running ---

    def _run(self, cases: Iterable[Case]) -> Iterator[Ran]:
        for ran in self._pool.map(cases, stop=self._is_over):
            self._report.add(ran)
            for violation in ran.violations:
                print(f"VIOLATION {ran.case}: {violation}", flush=True)
            if clock.monotonic() > self._told + _TELL_EVERY:
                self._tell()
            yield ran

    def _is_over(self) -> bool:
        enough = self._report.kills >= self._options.kills
        return self._stop.is_set() or enough or clock.monotonic() > self._ends or len(self._report.violations) >= 20

    def _tell(self, *, last: bool = False) -> None:
        now = clock.monotonic()
        self._report.seconds = self._before + now - self._begun
        self._report.write()
        self._told = now
        rate = 60 * (self._report.kills - self._kills_before) / max(now - self._begun, 0.1)
        left = self._options.kills - self._report.kills
        eta = f", {left / rate:.0f} min to {self._options.kills:,}" if rate and left > 0 and not last else ""
        print(
            f"{self._report.statement()}; {self._report.cycles:,} cycles, {rate:,.0f} kills a minute{eta}", flush=True
        )


def _is_first(single: Ran) -> bool:
    """One whose kill was the first at its point."""
    return Case.parse(single.case).kills[0].nth == 1 and bool(single.fired)


def _kills(case: Case) -> str:
    return str(case).split("/", 2)[2]


# --- one cycle, or a protection taken away ---


def replay(text: str, url: str, directory: Path) -> int:
    """Run one cycle and tell all of it."""
    name, _, cycle = text.partition(":")
    case = random_case(int(name), int(cycle)) if name.isdigit() else Case.parse(text)
    for log in case.logs.values():
        for sent in log:
            print(f"  {sent.place} key={sent.key!r} id={sent.name} {sent.fails} {sent.times or ''}")
    ran = Lane(url, directory).run(case)
    for number, (trace, ending) in enumerate(zip(ran.traces, ran.endings, strict=False)):
        print(f"process {number}: {ending}\n    {' '.join(trace)}")
    print("\n".join(ran.violations or ["no violation"]))
    return 4 if ran.violations else 0


def look_for(names: Iterable[str], url: str, directory: Path) -> int:
    """Take each of these protections away: is it noticed? 0: all of them were."""
    return max(_in_a_fork(partial(_look_for, name, url, directory)) for name in names)


def _look_for(name: str, url: str, directory: Path) -> int:
    without, known = CASES[name]
    lane = Lane(url, directory, without=without)
    for case in chain([Case.parse(known)], _all_of(Case.parse(known).flow.name, lane)):
        ran = lane.run(case)
        if ran.violations:
            print(f"without {name}: {ran.case}: {ran.violations}", flush=True)
            return 0
    print(f"without {name}: NOT NOTICED", flush=True)
    return 1


def _all_of(flow: str, lane: Lane) -> Iterator[Case]:
    trace = lane.run(uncrashed(flow)).traces[0]
    yield uncrashed(flow)
    yield from singles(flow, trace)
    yield from (uncrashed(flow).killed(Kill(kill.point, kill.nth, "freeze")) for kill in points(trace))


def _in_a_fork(work: Callable[[], int]) -> int:
    """Its lane's checker and all that it patches are gone with it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.forked", description=__doc__)
    parser.add_argument("--kills", type=int, default=100_000, help="until the report counts so many")
    parser.add_argument("--minutes", type=float, help="and at most so long")
    parser.add_argument("--seed", type=int, default=1, help="of the drawn cycles")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--pairs", action="store_const", dest="stages", const="pairs", help="only every point and pair")
    parser.add_argument("--again", action="store_true", help="also the points and pairs that an earlier run has done")
    parser.add_argument("--first", action="store_true", help="each point only once, in one of the flows that hit it")
    parser.add_argument("--sample", type=int, default=0, help="only every n-th pair of a flow")
    parser.add_argument("--flow", action="append", choices=sorted(FLOWS), help="only this one; may be repeated")
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--database-url", help="of a server to make databases in; else a server of its own")
    parser.add_argument("--work", type=Path, help="where history and logs are kept; else nowhere")
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--replay", metavar="CASE", help="FLOW/SEED/KILL,KILL or SEED:CYCLE")
    parser.add_argument("--without", choices=[*CASES, "all"], help="a protection to take away: is that noticed?")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = _arguments(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with ExitStack() as stack:
        work: Path = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eo-campaign-")))
        work.mkdir(parents=True, exist_ok=True)
        url: str = options.database_url or stack.enter_context(own_server(work))
        alone = options.replay or options.without
        names = [f"forked_{clock.now():%H%M%S%f}_{lane}" for lane in range(1 if alone else options.lanes)]
        urls = [lane_database(url, name) for name in names]
        if options.replay:
            return replay(options.replay, urls[0], work)
        if options.without:
            return look_for(CASES if options.without == "all" else [options.without], urls[0], work)
        report = Report.load(options.report)
        report.postgresql = server_version(url)
        pool = Pool(urls, work)
        try:
            Campaign(pool, report, options, stop).run()
        finally:
            pool.close()
        return 4 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
