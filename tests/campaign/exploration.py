"""Every state that a small machine can reach, breadth first: a trace to a wrong one is as short as there is one."""

from __future__ import annotations

import gc
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

State = tuple[Any, ...]


class Step(NamedTuple):
    """What somebody may do next."""

    action: str
    who: str
    state: State
    events: tuple[str, ...] = ()
    """The boundaries it passes, in their order."""


class Machine(Protocol):
    """One protocol with its surroundings."""

    name: str
    """That of the flow whose boundaries its steps pass (crashtest/points.py)."""
    PROTECTIONS: tuple[str, ...]
    """What can be taken away."""
    LEFT_OUT: Mapping[str, str]
    """Boundaries of the flow that no step passes, and why."""

    def first(self) -> State: ...

    def steps(self, state: State) -> Iterator[Step]:
        """Everything that can happen next."""

    def wrong(self, state: State) -> str:
        """Which invariant the state breaks, "" if none."""

    def done(self, state: State) -> bool:
        """Whether all work is done: from every state one such must be within reach."""

    def same(self, state: State) -> State:
        """One for all states that differ in the workers' names only."""


@dataclass
class Found:
    """What an exploration came to."""

    machine: str
    without: str
    states: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Of the processor: other work of the machine does not count."""
    wrong: str = ""
    trace: list[Step] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    """How often each action was possible."""
    passed: set[str] = field(default_factory=set)
    """The boundaries of its steps."""
    ended: int = 0
    """States in which all work is done."""

    def lines(self) -> list[str]:
        """For people."""
        missing = f" without {self.without!r}" if self.without else ""
        head = f"{self.machine}{missing}: {self.states} states, {self.steps} steps, {self.seconds:.1f} s: "
        shown = [f"  {n:2} {s.who:9} {s.action:32} {' '.join(s.events)}" for n, s in enumerate(self.trace, start=1)]
        return [head + (self.wrong or "no violation"), *shown]


def explore(machine: Machine, *, without: str = "") -> Found:
    """Visit every state the machine can reach, or as many as it takes to find one that is wrong."""
    started = time.process_time()
    collecting = gc.isenabled()
    gc.disable()  # millions of tuples, none of them garbage: looking through them took a third of the time
    try:
        found = _explore(machine, without)
    finally:
        if collecting:
            gc.enable()
    found.seconds = time.process_time() - started
    return found


def _explore(machine: Machine, without: str) -> Found:
    found = Found(machine.name, without)
    first = machine.same(machine.first())
    numbers: dict[State, int] = {first: 0}
    order: list[State] = [first]
    parents, sources, targets = array("l", [-1]), array("l"), array("l")
    ends: list[int] = []
    for number, state in enumerate(order):
        found.wrong = machine.wrong(state)
        if found.wrong:
            found.trace = _trace(machine, order, parents, number)
            break
        if machine.done(state):
            ends.append(number)
        for step in machine.steps(state):
            found.steps += 1
            found.fired[step.action] += 1
            found.passed.update(step.events)
            after = machine.same(step.state)
            known = numbers.setdefault(after, len(order))
            if known == len(order):
                order.append(after)
                parents.append(number)
            sources.append(number)
            targets.append(known)
    if not found.wrong:
        stuck = _stuck(len(order), sources, targets, ends)
        if stuck is not None:
            found.wrong = "I10: from here the work can never be finished"
            found.trace = _trace(machine, order, parents, stuck)
    found.states, found.ended = len(order), len(ends)
    return found


def _stuck(states: int, sources: Sequence[int], targets: Sequence[int], ends: Iterable[int]) -> int | None:
    """The first state from which no end can be reached."""
    before: list[list[int]] = [[] for _ in range(states)]
    for source, target in zip(sources, targets, strict=True):
        before[target].append(source)
    waiting = list(ends)
    reach = bytearray(states)
    for end in waiting:
        reach[end] = 1
    while waiting:
        for source in before[waiting.pop()]:
            if not reach[source]:
                reach[source] = 1
                waiting.append(source)
    at = reach.find(0)
    return None if at < 0 else at


def _trace(machine: Machine, order: Sequence[State], parents: Sequence[int], number: int) -> list[Step]:
    """The steps that lead there, each worker under one name all the way."""
    way: list[int] = []
    while number > 0:
        way.append(number)
        number = parents[number]
    state, trace = machine.first(), []
    for reached in reversed(way):
        step = next(step for step in machine.steps(state) if machine.same(step.state) == order[reached])
        trace.append(step)
        state = step.state
    return trace
