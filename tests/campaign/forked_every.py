"""Every crash there is in a flow: each point alone, and each pair of a point and one hit in the recovery from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.campaign.forked_case import FLOWS, Case, Kill
from tests.campaign.forked_lane import Ran

Run = Callable[[Case], Ran]


def uncrashed(flow: str) -> Case:
    return Case(FLOWS[flow], 0)


def points(trace: list[str]) -> list[Kill]:
    """Every event of a process, each as its name and how often that has come by then."""
    seen: Counter[str] = Counter()
    found = []
    for name in trace:
        seen[name] += 1
        found.append(Kill(name, seen[name]))
    return found


def singles(flow: str, trace: list[str]) -> Iterator[Case]:
    """Killed once, at each event of a run that is not killed."""
    for kill in points(trace):
        yield uncrashed(flow).killed(kill)


def zombies(single: Ran) -> Iterator[Case]:
    """Frozen where this one was killed. Not where it relays: a file does not fence, and what does that is Kafka's."""
    case = Case.parse(single.case)
    if not case.flow.relays:
        yield case.killed(*(replace(kill, how="freeze") for kill in case.kills))


def new_points(each: dict[str, list[Case]]) -> list[Case]:
    """Of all flows' cases one for each name; and one of every flow at least."""
    known: set[str] = set()
    found = []
    for cases in each.values():
        new = [case for case in cases if case.kills[0].nth == 1 and case.kills[0].point not in known]
        known |= {case.kills[0].point for case in new}
        first = [case for case in cases if case.kills[0].nth == 1]
        found += new or first[len(first) // 2 :][:1]
    return found


def first_hits(trace: list[str]) -> list[Kill]:
    """Every name once."""
    return [Kill(name, 1) for name in dict.fromkeys(trace)]


def pairs(single: Ran, *, all_hits: bool = False) -> Iterator[Case]:
    """Killed at the same point, and then at each name of the recovery (or at each of its events)."""
    case = Case.parse(single.case)
    if len(single.traces) < 2:
        return
    recovery = single.traces[1]
    for kill in points(recovery) if all_hits else first_hits(recovery):
        yield case.killed(*case.kills, kill)
