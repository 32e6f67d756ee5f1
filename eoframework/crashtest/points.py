"""Where a process can be killed: every durability boundary of every flow, by the name of its event.

One table, told three times and compared by a test: here, in the source as `events.emit(name)`, in DESIGN.md section 5.
A name that several flows pass has a row for each: what a crash there leads to is another thing in each.
"""

from __future__ import annotations

from dataclasses import dataclass

from eoframework.crashtest.points_consuming import CONSUME, EXTERNAL, FAILURE, REPROCESS
from eoframework.crashtest.points_operating import MIGRATE, OPERATE, PRUNE, REPLAY
from eoframework.crashtest.points_sending import PRODUCER, PUBLISH, RELAY, TRANSFORM


@dataclass(frozen=True, slots=True)
class Boundary:
    """One event of one flow."""

    name: str
    flow: str
    before: str
    """What is durable when it is told: a crash at NAME finds this and no more."""
    after: str
    """What the call that follows makes durable: a crash at NAME+ may fall on either side. "–": nothing."""
    leads_to: str
    """What whoever comes next does about it. "–": nothing is left to do."""


_FLOWS = {
    "consume": CONSUME,
    "failure": FAILURE,
    "external": EXTERNAL,
    "relay": RELAY,
    "transform": TRANSFORM,
    "replay": REPLAY,
    "reprocess": REPROCESS,
    "prune": PRUNE,
    "migrate": MIGRATE,
    "producer": PRODUCER,
    "publish": PUBLISH,
    "operate": OPERATE,
}

FLOWS: tuple[str, ...] = tuple(_FLOWS)
"""consume: a batch; failure: parked messages and dead letters; replay: what operators do about those; operate:
positions and rights by hand; publish: from the user's own transaction."""

BOUNDARIES: tuple[Boundary, ...] = tuple(
    Boundary(name, flow, before, after, leads_to)
    for flow, rows in _FLOWS.items()
    for name, before, after, leads_to in rows
)

NAMES: frozenset[str] = frozenset(boundary.name for boundary in BOUNDARIES)


def of(flow: str) -> tuple[Boundary, ...]:
    """The boundaries of one flow, in the order in which it passes them. Raises KeyError."""
    return tuple(Boundary(name, flow, *rest) for name, *rest in _FLOWS[flow])
